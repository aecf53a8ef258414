//! What objects claim, put together to policies.

use super::{Imported, ObjectName, Outcome, Resolver};
use crate::policy::{HostPattern, ListenerId, PathMatch, PolicySpec, SourceRef, dialect::Rules};
use ahash::AHashMap;
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
    groups: BTreeMap<Group, BTreeMap<HostPattern, BTreeSet<PathMatch>>>,
}

/// Who claims, and where.
#[derive(Clone, Copy, Debug)]
pub(super) struct Claim<'a> {
    pub(super) object: &'a ObjectName,
    pub(super) rule: usize,
    pub(super) listeners: &'a [ListenerId],
    pub(super) one_label: bool,
}

impl Claims {
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
            listeners: claim.listeners.to_vec(),
            one_label: claim.one_label,
        };
        let hosts = self.groups.entry(group).or_default();
        match hosts.get_mut(host) {
            Some(paths) => {
                paths.insert(path);
            }
            None => {
                hosts.insert(host.clone(), BTreeSet::from([path]));
            }
        }
    }

    /// The policies, with hosts together that have the same paths.
    pub(super) fn policies(self, resolver: &Resolver) -> Vec<Imported> {
        let mut of_object: AHashMap<ObjectName, usize> = AHashMap::new();
        let mut made: Vec<(Group, Vec<HostPattern>, BTreeSet<PathMatch>)> =
            Vec::with_capacity(self.groups.len());
        for (group, hosts) in self.groups {
            let mut by_paths: BTreeMap<BTreeSet<PathMatch>, Vec<HostPattern>> = BTreeMap::new();
            for (host, paths) in hosts {
                by_paths.entry(paths).or_default().push(host);
            }
            *of_object.entry(group.object.clone()).or_default() += by_paths.len();
            made.extend(by_paths.into_iter().map(|(paths, hosts)| (group.clone(), hosts, paths)));
        }
        let mut given: AHashMap<String, usize> = AHashMap::new();
        let mut policies: Vec<Imported> = made
            .into_iter()
            .map(|(group, hosts, paths)| {
                let object = &group.object;
                let mut name = format!("{}/{}", object.kind.to_ascii_lowercase(), object.key);
                if of_object[object] > 1 {
                    name = format!("{name}.{}", group.rule);
                }
                let times = given.entry(name.clone()).or_default();
                *times += 1;
                if *times > 1 {
                    name = format!("{name}-{times}");
                }
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
    let passes = passes.or(rules.is_none().then_some(crate::reason::PassReason::Unsupported));
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
