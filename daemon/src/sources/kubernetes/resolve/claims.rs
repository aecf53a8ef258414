//! What objects claim, put together to policies.

use super::{Imported, ObjectName, Outcome, Resolver};
use crate::policy::{HostPattern, ListenerId, PathMatch, PolicySpec, SourceRef, dialect::Rules};
use crate::reason::PassReason;
use ahash::{AHashMap, AHashSet};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

/// Paths that share everything but their hosts.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Group {
    object: ObjectName,
    /// Position of the first rule that has this outcome.
    rule: usize,
    outcome: Outcome,
    methods: Vec<String>,
    listeners: Vec<ListenerId>,
    /// Its wildcards have one label for the star.
    one_label: bool,
}

/// Everything that is claimed.
#[derive(Debug, Default)]
pub(super) struct Claims {
    /// Proxies: a port of a Gateway, or a controller of Ingresses; their names, and our listeners before them.
    proxies: Vec<(String, Vec<ListenerId>)>,
    all: Vec<(usize, Group, HostPattern, PathMatch)>,
    /// Hosts of a proxy that another one may have, too.
    shared: AHashSet<(usize, HostPattern)>,
}

/// Who claims, and where.
#[derive(Clone, Copy, Debug)]
pub(super) struct Claim<'a> {
    pub(super) object: &'a ObjectName,
    pub(super) rule: usize,
    /// Of [`Claims::proxy`].
    pub(super) proxy: usize,
    pub(super) one_label: bool,
}

/// What a proxy does with a host: by path and methods.
type Ways<'a> = BTreeMap<(&'a PathMatch, &'a [String]), Outcome>;

impl Claims {
    /// A proxy that claims.
    pub(super) fn proxy(&mut self, name: String, listeners: &[ListenerId]) -> usize {
        self.proxies.push((name, listeners.to_vec()));
        self.proxies.len() - 1
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    /// Claims a path of a host, for these methods or all.
    pub(super) fn add(
        &mut self,
        claim: Claim<'_>,
        host: &HostPattern,
        path: PathMatch,
        methods: &[String],
        outcome: Outcome,
    ) {
        let group = Group {
            object: claim.object.clone(),
            rule: claim.rule,
            outcome,
            methods: methods.to_vec(),
            listeners: self.proxies[claim.proxy].1.clone(),
            one_label: claim.one_label,
        };
        self.all.push((claim.proxy, group, host.clone(), path));
    }

    /// Finds the hosts that several proxies may have on one listener of ours, unless all of them do the same there. Their
    /// claims pass from now on. Returns one object of each, the host, and the proxies' names.
    pub(super) fn find_shared(&mut self) -> Vec<(ObjectName, HostPattern, Vec<String>)> {
        if self.proxies.len() < 2 {
            return Vec::new();
        }
        let mut hosts: Vec<BTreeMap<&HostPattern, (&ObjectName, Ways<'_>)>> =
            vec![BTreeMap::new(); self.proxies.len()];
        for (proxy, group, host, path) in &self.all {
            let (_, ways) = hosts[*proxy].entry(host).or_insert_with(|| (&group.object, Ways::new()));
            ways.insert((path, &group.methods), group.outcome);
        }
        let meet = |a: &[ListenerId], b: &[ListenerId]| {
            a.is_empty() || b.is_empty() || a.iter().any(|listener| b.contains(listener))
        };
        let (mut shared, mut told) = (AHashSet::new(), Vec::new());
        for (a, of_a) in hosts.iter().enumerate() {
            for (b, of_b) in hosts.iter().enumerate() {
                if a == b || !meet(&self.proxies[a].1, &self.proxies[b].1) {
                    continue;
                }
                for (host, (object, ways)) in of_a {
                    let contested = match of_b.get(host) {
                        Some((_, others)) => ways != others,
                        None => broader(host).iter().any(|wider| of_b.contains_key(wider)),
                    };
                    if contested && shared.insert((a, (*host).clone())) {
                        let names = vec![self.proxies[a].0.clone(), self.proxies[b].0.clone()];
                        told.push(((*object).clone(), (*host).clone(), names));
                    }
                }
            }
        }
        self.shared = shared;
        told
    }

    /// The policies, with hosts together that have the same paths.
    pub(super) fn policies(self, resolver: &Resolver) -> Vec<Imported> {
        let mut of_object: AHashMap<ObjectName, usize> = AHashMap::new();
        let mut groups: BTreeMap<Group, BTreeMap<HostPattern, BTreeSet<PathMatch>>> = BTreeMap::new();
        for (proxy, mut group, host, path) in self.all {
            if self.shared.contains(&(proxy, host.clone())) {
                group.outcome = Outcome::Pass(PassReason::Conflict);
                group.methods.clear();
            }
            groups.entry(group).or_default().entry(host).or_default().insert(path);
        }
        let mut made: Vec<(Group, Vec<HostPattern>, BTreeSet<PathMatch>)> = Vec::with_capacity(groups.len());
        for (group, hosts) in groups {
            let mut by_paths: BTreeMap<BTreeSet<PathMatch>, Vec<HostPattern>> = BTreeMap::new();
            for (host, paths) in hosts {
                by_paths.entry(paths).or_default().push(host);
            }
            *of_object.entry(group.object.clone()).or_default() += by_paths.len();
            made.extend(by_paths.into_iter().map(|(paths, hosts)| (group.clone(), hosts, paths)));
        }
        let mut given: AHashSet<String> = AHashSet::new();
        let mut policies: Vec<Imported> = made
            .into_iter()
            .map(|(group, hosts, paths)| {
                let object = &group.object;
                let mut name = format!("{}/{}", object.kind.to_ascii_lowercase(), object.key);
                if of_object[object] > 1 {
                    name = format!("{name}.{}", group.rule);
                }
                if given.contains(&name) {
                    let numbered = (2..).map(|number| format!("{name}-{number}"));
                    name = numbered.into_iter().find(|name| !given.contains(name)).unwrap_or(name);
                }
                given.insert(name.clone());
                policy(resolver, group, name, hosts, paths)
            })
            .collect();
        policies.sort_by(|a, b| a.spec.name.cmp(&b.spec.name));
        policies
    }
}

fn policy(
    resolver: &Resolver,
    group: Group,
    name: String,
    hosts: Vec<HostPattern>,
    paths: BTreeSet<PathMatch>,
) -> Imported {
    let (passes, known) = match group.outcome {
        Outcome::Pass(reason) => (Some(reason), None),
        Outcome::Answer(number) => (None, Some(&resolver.known[number])),
    };
    let rules = known.and_then(|known| known.rules.clone());
    let passes = passes.or(rules.is_none().then_some(PassReason::Unsupported));
    Imported {
        spec: PolicySpec {
            name,
            source: SourceRef { origin: group.object.to_string().into(), line: 0 },
            listeners: group.listeners,
            hosts,
            paths: paths.into_iter().collect(),
            for_methods: group.methods,
            passes,
            on_denied: known.and_then(|known| known.on_denied),
            rules: rules
                .unwrap_or_else(|| if group.one_label { Rules::none_of_one_label() } else { Rules::none() }),
        },
        cors: known.filter(|_| passes.is_none()).map(|known| Arc::clone(&known.cors)),
        object: group.object,
    }
}

/// The patterns that have all that this one has, and more.
pub(super) fn broader(host: &HostPattern) -> Vec<HostPattern> {
    let (name, from) = match host {
        HostPattern::Any => return Vec::new(),
        HostPattern::Exact(name) => (name, 0),
        // Its own suffix begins with a dot.
        HostPattern::Wildcard(suffix) => (suffix, 1),
    };
    let dots = name.bytes().enumerate().skip(from).filter(|(_, b)| *b == b'.');
    dots.map(|(at, _)| HostPattern::Wildcard(name[at..].to_owned())).chain([HostPattern::Any]).collect()
}
