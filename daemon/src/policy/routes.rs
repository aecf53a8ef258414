//! Which policy serves a host and path: exact hosts before the longest wildcard before all; in a host the exact path
//! before the longest prefix, and regexes beside them.

use super::RouteId;
use super::host::Host;
use super::regex::Regexes;
use super::spec::PathMatch;
use super::strings::{Index, Lengths, Strings, hash};
use ahash::AHashMap;

/// Up to this many routes of a host are compared one by one, in order of precedence.
const LINEAR: usize = 4;

/// Stands for "several policies" in [`Target::policy`].
pub(super) const CONFLICT: u32 = u32::MAX;
/// From here on [`Target::policy`] depends on the method.
const BY_METHOD: u32 = 1 << 31;
/// No such host entry.
const NONE: u32 = u32::MAX;

/// Where a route leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Target {
    /// Position of the policy, [`CONFLICT`], or from [`BY_METHOD`] on one of [`Hosts::splits`].
    pub(super) policy: u32,
    pub(super) label: RouteId,
}

/// One path of one policy, before compilation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Claim<'p> {
    pub(super) path: &'p PathMatch,
    pub(super) target: Target,
    /// The policy's wildcard hosts have exactly one label for the star.
    pub(super) one_label: bool,
    /// Only where one of these methods is asked for; empty: all.
    pub(super) methods: &'p [String],
}

/// Where a path leads that several policies share by method.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Split {
    by_method: Box<[(Box<[u8]>, Target)]>,
    /// Where all other methods lead.
    others: Option<Target>,
}

impl Target {
    /// Whether it depends on the method.
    pub(super) fn is_by_method(self) -> bool {
        (BY_METHOD..CONFLICT).contains(&self.policy)
    }
}

/// All hosts of a listener and their routes.
#[derive(Debug)]
pub(super) struct Hosts {
    exact: Strings,
    wild: Strings,
    wild_lengths: Lengths,
    /// Entry of each wildcard: for hosts with one label before it, and for those with more.
    wild_entries: Box<[(u32, u32)]>,
    any: u32,
    /// In the order of `exact`, then what wildcards and `any` refer to.
    entries: Box<[Entry]>,
    routes: Box<[Route]>,
    paths: Box<[u8]>,
    prefix_lengths: Box<[u32]>,
    splits: Box<[Split]>,
    /// Routes of the hosts that have many of them.
    index: Index,
}

/// A host's slice of the routes.
#[derive(Debug)]
struct Entry {
    first: u32,
    count: u32,
    /// Slice of the distinct prefix lengths, descending; empty where routes are compared one by one.
    lengths: (u32, u32),
    has_exact: bool,
    regexes: Option<Box<RegexRoutes>>,
}

#[derive(Debug)]
struct RegexRoutes {
    regexes: Regexes,
    targets: Vec<Target>,
    /// Policies with a regex that cannot be modelled: it might match any path.
    opaque: Vec<u32>,
}

#[derive(Clone, Copy, Debug)]
struct Route {
    start: u32,
    len: u32,
    exact: bool,
    target: Target,
}

/// Which entry matched a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HostHit {
    Exact,
    /// Length of the suffix, with its dot.
    Wildcard(usize),
    Any,
}

/// A host and its entries.
#[derive(Clone, Copy, Debug)]
pub(super) enum HostEntry<'a> {
    Exact(&'a [u8], u32),
    /// For hosts with one label before the suffix, and with more.
    Below {
        suffix: &'a [u8],
        one: Option<u32>,
        more: Option<u32>,
    },
    Any(u32),
}

/// What a path leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Routed {
    To(Target),
    Nowhere,
    /// Several policies of equal right.
    Conflict(RouteId),
    /// A regex of this host that cannot be modelled may match.
    Opaque,
}

impl Hosts {
    /// The entry of a host. `own`: an IP literal of this listener, which counts as any host.
    #[inline]
    pub(super) fn find(&self, host: &Host<'_>, own: bool) -> Option<(u32, HostHit)> {
        if let Some(i) = self.exact.find(host.name) {
            return Some((i, HostHit::Exact));
        }
        if host.literal.is_none() && !self.wild.is_empty() {
            for (i, dot) in memchr::memchr_iter(b'.', host.name).enumerate() {
                let suffix = &host.name[dot..];
                if self.wild_lengths.has(suffix.len())
                    && let Some(at) = self.wild.find(suffix)
                {
                    let (one, more) = self.wild_entries[at as usize];
                    let entry = if i == 0 { one } else { more };
                    if entry != NONE {
                        return Some((entry, HostHit::Wildcard(suffix.len())));
                    }
                }
            }
        }
        (self.any != NONE && (host.literal.is_none() || own)).then_some((self.any, HostHit::Any))
    }

    /// Where `path`, which begins with a slash, leads on the host of `entry` if `method` is asked for.
    #[inline]
    pub(super) fn route(&self, entry: u32, path: &[u8], method: &[u8]) -> Routed {
        let host = &self.entries[entry as usize];
        let literal = if host.lengths.0 == host.lengths.1 {
            let routes = &self.routes[host.first as usize..(host.first + host.count) as usize];
            routes.iter().find(|r| r.matches(self.path(r), path)).map(|r| r.target)
        } else {
            let exact = if host.has_exact { self.look(entry, true, path) } else { None };
            exact.or_else(|| {
                self.prefix_lengths[host.lengths.0 as usize..host.lengths.1 as usize].iter().find_map(
                    |&len| {
                        let prefix = path.get(..len as usize)?;
                        is_boundary(path, prefix.len()).then(|| self.look(entry, false, prefix))?
                    },
                )
            })
        };
        let literal = match literal {
            Some(target) if target.is_by_method() => self.by_method(target, method),
            plain => plain,
        };
        match &host.regexes {
            None => literal.map_or(Routed::Nowhere, Routed::from),
            Some(regexes) => regexes.route(literal, path),
        }
    }

    #[cold]
    fn by_method(&self, target: Target, method: &[u8]) -> Option<Target> {
        let split = &self.splits[(target.policy - BY_METHOD) as usize];
        split.by_method.iter().find(|(name, _)| **name == *method).map(|(_, target)| *target).or(split.others)
    }

    /// The policies that a target may lead to.
    pub(super) fn policies_of(&self, target: Target) -> Vec<u32> {
        if !target.is_by_method() {
            return vec![target.policy];
        }
        let split = &self.splits[(target.policy - BY_METHOD) as usize];
        split.by_method.iter().map(|(_, target)| *target).chain(split.others).map(|t| t.policy).collect()
    }

    /// Each host: its name or suffix, and the entries for it and, if that is a suffix, for hosts far below it.
    pub(super) fn each_host(&self, mut host: impl FnMut(HostEntry<'_>)) {
        for (entry, name) in (0..).zip(self.exact.iter()) {
            host(HostEntry::Exact(name, entry));
        }
        for (suffix, (one, more)) in self.wild.iter().zip(&self.wild_entries) {
            let there = |entry: u32| (entry != NONE).then_some(entry);
            host(HostEntry::Below { suffix, one: there(*one), more: there(*more) });
        }
        if self.any != NONE {
            host(HostEntry::Any(self.any));
        }
    }

    /// Each literal path of an entry: whether it is the whole path, its text without a slash at the end if not, and where
    /// it leads.
    pub(super) fn each_route(&self, entry: u32, mut route: impl FnMut(bool, &[u8], Target)) {
        let host = &self.entries[entry as usize];
        for found in &self.routes[host.first as usize..(host.first + host.count) as usize] {
            route(found.exact, self.path(found), found.target);
        }
    }

    /// Where the regular expressions of an entry lead.
    pub(super) fn regex_targets(&self, entry: u32) -> impl Iterator<Item = Target> {
        let regexes = self.entries[entry as usize].regexes.iter();
        regexes.flat_map(|regexes| regexes.targets.iter().copied())
    }

    /// Whether policies share a path of an entry by method.
    pub(super) fn is_by_method(&self, entry: u32) -> bool {
        let host = &self.entries[entry as usize];
        let routes = &self.routes[host.first as usize..(host.first + host.count) as usize];
        routes.iter().any(|route| route.target.is_by_method())
    }

    /// Whether an entry has regular expressions.
    pub(super) fn has_regexes(&self, entry: u32) -> bool {
        self.entries[entry as usize].regexes.is_some()
    }

    /// How many entries there are.
    pub(super) fn entries(&self) -> u32 {
        self.entries.len() as u32
    }

    fn look(&self, entry: u32, exact: bool, path: &[u8]) -> Option<Target> {
        self.index
            .find(hash(salt(entry, exact), path), |i| {
                let route = &self.routes[i as usize];
                let host = &self.entries[entry as usize];
                route.exact == exact
                    && (host.first..host.first + host.count).contains(&i)
                    && self.path(route) == path
            })
            .map(|i| self.routes[i as usize].target)
    }

    fn path(&self, route: &Route) -> &[u8] {
        &self.paths[route.start as usize..(route.start + route.len) as usize]
    }
}

impl Route {
    fn matches(&self, pattern: &[u8], path: &[u8]) -> bool {
        path.len() >= pattern.len()
            && if self.exact {
                path == pattern
            } else {
                is_boundary(path, pattern.len()) && path.starts_with(pattern)
            }
    }
}

impl From<Target> for Routed {
    fn from(target: Target) -> Self {
        if target.policy == CONFLICT { Routed::Conflict(target.label) } else { Routed::To(target) }
    }
}

impl RegexRoutes {
    fn route(&self, literal: Option<Target>, path: &[u8]) -> Routed {
        let mut found = literal;
        let mut conflict = None;
        self.regexes.each_match(path, |i| match found {
            None => found = Some(self.targets[i]),
            Some(other) if other.policy != self.targets[i].policy => conflict = Some(other.label),
            Some(_) => {}
        });
        if let Some(label) = conflict {
            return Routed::Conflict(label);
        }
        match found {
            Some(target) if self.opaque.iter().all(|&p| p == target.policy) => target.into(),
            None if self.opaque.is_empty() => Routed::Nowhere,
            _ => Routed::Opaque,
        }
    }
}

/// Whether a path element ends at `at`.
fn is_boundary(path: &[u8], at: usize) -> bool {
    path.get(at).is_none_or(|&b| b == b'/')
}

fn salt(entry: u32, exact: bool) -> u64 {
    u64::from(entry) << 1 | u64::from(exact)
}

/// What compilation found wrong with a host's claims.
#[derive(Debug)]
pub(super) enum Trouble<'p> {
    /// Two policies claim the same path.
    Clash { path: &'p PathMatch, first: u32, second: u32 },
    /// A regex cannot be modelled.
    Regex { pattern: &'p str, policy: u32, reason: String },
}

/// Puts [`Hosts`] together.
#[derive(Debug, Default)]
pub(super) struct Builder {
    exact: Vec<String>,
    wild: Vec<String>,
    wild_entries: Vec<(u32, u32)>,
    any: Option<u32>,
    entries: Vec<Entry>,
    routes: Vec<Route>,
    paths: Vec<u8>,
    prefix_lengths: Vec<u32>,
    /// Where a path, and a list of prefix lengths, is already: hosts are alike, and what they share is at hand.
    splits: Vec<Split>,
    path_starts: AHashMap<Vec<u8>, u32>,
    length_slices: AHashMap<Vec<u32>, (u32, u32)>,
}

impl Builder {
    /// Adds a host; all exact ones must come before the others.
    pub(super) fn exact<'p>(&mut self, name: &str, claims: &[Claim<'p>], troubles: &mut Vec<Trouble<'p>>) {
        debug_assert_eq!(self.exact.len(), self.entries.len(), "exact hosts come first");
        self.exact.push(name.to_owned());
        self.entry(claims, troubles);
    }

    /// Adds a wildcard; `suffix` begins with a dot.
    pub(super) fn wildcard<'p>(
        &mut self,
        suffix: &str,
        claims: &[Claim<'p>],
        troubles: &mut Vec<Trouble<'p>>,
    ) {
        let deep: Vec<Claim<'p>> = claims.iter().filter(|c| !c.one_label).copied().collect();
        let one = self.entry(claims, troubles);
        let more = match deep.len() {
            0 => NONE,
            n if n == claims.len() => one,
            _ => self.entry(&deep, troubles),
        };
        self.wild.push(suffix.to_owned());
        self.wild_entries.push((one, more));
    }

    /// Adds the host of all names.
    pub(super) fn any<'p>(&mut self, claims: &[Claim<'p>], troubles: &mut Vec<Trouble<'p>>) {
        self.any = Some(self.entry(claims, troubles));
    }

    pub(super) fn build(self) -> Hosts {
        let mut hosts = Hosts {
            exact: Strings::new(&self.exact),
            wild_lengths: Lengths::of(self.wild.iter().map(String::as_bytes)),
            wild: Strings::new(&self.wild),
            wild_entries: self.wild_entries.into(),
            any: self.any.unwrap_or(NONE),
            entries: self.entries.into(),
            routes: self.routes.into(),
            paths: self.paths.into(),
            prefix_lengths: self.prefix_lengths.into(),
            splits: self.splits.into(),
            index: Index::default(),
        };
        let hashed: Vec<(u64, u32)> = hosts
            .entries
            .iter()
            .enumerate()
            .filter(|(_, entry)| entry.lengths.0 != entry.lengths.1)
            .flat_map(|(number, entry)| {
                (entry.first..entry.first + entry.count).map(move |i| (number as u32, i))
            })
            .map(|(number, i)| {
                let route = &hosts.routes[i as usize];
                (hash(salt(number, route.exact), hosts.path(route)), i)
            })
            .collect();
        hosts.index = Index::new(&hashed);
        hosts
    }

    fn entry<'p>(&mut self, claims: &[Claim<'p>], troubles: &mut Vec<Trouble<'p>>) -> u32 {
        let mut literal: Vec<(bool, &[u8], &Claim<'p>)> = Vec::new();
        let mut patterns: Vec<(&'p str, &Claim<'p>)> = Vec::new();
        for claim in claims {
            match claim.path {
                PathMatch::Exact(path) => literal.push((true, path.as_bytes(), claim)),
                // `/foo/` and `/foo` are the same prefix, and `/` is the empty one.
                PathMatch::Prefix(path) => {
                    literal.push((false, path.strip_suffix('/').unwrap_or(path).as_bytes(), claim));
                }
                PathMatch::Regex(pattern) => patterns.push((pattern, claim)),
            }
        }
        literal.sort_by(|(a_exact, a, _), (b_exact, b, _)| {
            b_exact.cmp(a_exact).then(b.len().cmp(&a.len())).then(a.cmp(b))
        });
        let first = self.routes.len() as u32;
        for group in literal.chunk_by(|a, b| a.0 == b.0 && a.1 == b.1) {
            let (exact, path, _) = group[0];
            let claims: Vec<&Claim<'p>> = group.iter().map(|(_, _, c)| *c).collect();
            let target = self.target(&claims, troubles);
            let start = self.path(path);
            self.routes.push(Route { start, len: path.len() as u32, exact, target });
        }
        let count = self.routes.len() as u32 - first;
        let mut lengths = (0, 0);
        if count as usize > LINEAR {
            let mut list: Vec<u32> =
                self.routes[first as usize..].iter().filter(|r| !r.exact).map(|r| r.len).collect();
            list.dedup();
            // Never empty, so that the slice tells that this host's routes are hashed.
            if list.is_empty() {
                list.push(0);
            }
            lengths = self.lengths(list);
        }
        let regexes = (!patterns.is_empty()).then(|| Box::new(regex_routes(patterns, troubles)));
        let has_exact = self.routes[first as usize..].first().is_some_and(|r| r.exact);
        self.entries.push(Entry { first, count, lengths, has_exact, regexes });
        self.entries.len() as u32 - 1
    }
}

impl Builder {
    /// Where claims to one path lead.
    fn target<'p>(&mut self, claims: &[&Claim<'p>], troubles: &mut Vec<Trouble<'p>>) -> Target {
        if claims.iter().all(|claim| claim.methods.is_empty()) {
            return merge(claims.iter().copied(), troubles);
        }
        let mut methods: Vec<&[u8]> = claims.iter().flat_map(|c| c.methods).map(String::as_bytes).collect();
        methods.sort_unstable();
        methods.dedup();
        let others = claims.iter().copied().filter(|claim| claim.methods.is_empty()).collect::<Vec<_>>();
        let split = Split {
            by_method: methods
                .into_iter()
                .map(|method| {
                    let asks = |claim: &&Claim<'p>| claim.methods.iter().any(|m| m.as_bytes() == method);
                    (method.into(), merge(claims.iter().copied().filter(asks), troubles))
                })
                .collect(),
            others: (!others.is_empty()).then(|| merge(others.into_iter(), troubles)),
        };
        // The label of the path's first policy stands for what none of them is asked.
        let label = claims[0].target.label;
        self.splits.push(split);
        Target { policy: BY_METHOD + (self.splits.len() - 1) as u32, label }
    }

    fn path(&mut self, path: &[u8]) -> u32 {
        if let Some(start) = self.path_starts.get(path) {
            return *start;
        }
        let start = self.paths.len() as u32;
        self.paths.extend_from_slice(path);
        self.path_starts.insert(path.to_vec(), start);
        start
    }

    fn lengths(&mut self, list: Vec<u32>) -> (u32, u32) {
        let all = &mut self.prefix_lengths;
        *self.length_slices.entry(list).or_insert_with_key(|list| {
            let from = all.len() as u32;
            all.extend_from_slice(list);
            (from, all.len() as u32)
        })
    }
}

/// The target of claims to one path; a conflict if they are of several policies.
fn merge<'p, 'c>(claims: impl Iterator<Item = &'c Claim<'p>>, troubles: &mut Vec<Trouble<'p>>) -> Target
where
    'p: 'c,
{
    let mut target: Option<(Target, u32)> = None;
    for claim in claims {
        match &mut target {
            None => target = Some((claim.target, claim.target.policy)),
            Some((_, first)) if *first == claim.target.policy => {}
            Some((target, first)) => {
                target.policy = CONFLICT;
                troubles.push(Trouble::Clash {
                    path: claim.path,
                    first: *first,
                    second: claim.target.policy,
                });
            }
        }
    }
    // The callers' groups are never empty.
    target.map_or(Target { policy: CONFLICT, label: RouteId::OTHER }, |(target, _)| target)
}

fn regex_routes<'p>(mut claims: Vec<(&'p str, &Claim<'p>)>, troubles: &mut Vec<Trouble<'p>>) -> RegexRoutes {
    claims.sort_by_key(|(pattern, _)| *pattern);
    let merged: Vec<(&'p str, Target, Vec<u32>)> = claims
        .chunk_by(|a, b| a.0 == b.0)
        .map(|group| {
            let policies = group.iter().map(|(_, c)| c.target.policy).collect();
            (group[0].0, merge(group.iter().map(|(_, c)| *c), troubles), policies)
        })
        .collect();
    let patterns: Vec<&str> = merged.iter().map(|(pattern, ..)| *pattern).collect();
    let (regexes, refused) = Regexes::new(&patterns);
    let mut opaque = Vec::new();
    if claims.iter().any(|(_, claim)| !claim.methods.is_empty()) {
        // Which of them a path belongs to is nothing that one match tells.
        opaque.push(CONFLICT);
    }
    for (i, reason) in refused {
        let (pattern, _, policies) = &merged[i];
        for &policy in policies {
            troubles.push(Trouble::Regex { pattern, policy, reason: reason.clone() });
        }
        opaque.extend(policies);
    }
    RegexRoutes { regexes, targets: merged.iter().map(|(_, target, _)| *target).collect(), opaque }
}
