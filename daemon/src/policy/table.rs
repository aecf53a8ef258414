//! The compiled table and `decide`.

use super::core::Core;
use super::dialect::Rules;
use super::host::{Own, parse_name};
use super::labels::RouteLabel;
use super::routes::{Builder, CONFLICT, Claim, HostHit, Hosts, Routed, Target, Trouble};
use super::{
    Answer, Finding, HostPattern, ListenerId, ListenerSpec, OnDenied, PathMatch, PolicySpec, RouteId,
    RouteLabels, Severity, SourceRef,
};
use crate::reason::PassReason;
use ahash::{AHashMap, AHashSet};
use std::sync::Arc;

/// A well-formed preflight, as `http` read it. Values are raw (no OWS around them), unvalidated unless said.
#[derive(Clone, Copy, Debug)]
pub struct Preflight<'a> {
    /// The listener that took the connection.
    pub listener: ListenerId,
    /// The `Host` value.
    pub host: &'a [u8],
    /// Origin-form target: an unambiguous path, then maybe a query.
    pub target: &'a [u8],
    /// The `Origin` value, not empty.
    pub origin: &'a [u8],
    /// `Access-Control-Request-Method`: a valid token.
    pub method: &'a [u8],
    /// The `Access-Control-Request-Headers` lines in order.
    pub headers: &'a [&'a [u8]],
    /// `Access-Control-Request-Private-Network: true` was sent.
    pub private_network: bool,
}

/// What becomes of a preflight.
#[derive(Clone, Copy, Debug)]
pub enum Decision<'a> {
    /// Answered here.
    Answer(Answer<'a>),
    /// Left to the proxy; the route if one was found.
    Pass(PassReason, RouteId),
}

/// Watches `decide` step by step; `explain` prints what it hears. [`NoTrace`] compiles to nothing.
pub trait Trace {
    /// One step: what was looked at and what came of it. The closure runs only where somebody listens.
    fn step(&mut self, text: impl FnOnce() -> String);
}

/// Nobody listens.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoTrace;

impl Trace for NoTrace {
    #[inline(always)]
    fn step(&mut self, _text: impl FnOnce() -> String) {}
}

/// Every policy of one configuration, compiled, immutable.
#[derive(Debug)]
pub struct Table {
    generation: u64,
    /// By [`ListenerId`]; `None` where no listener has that number.
    listeners: Box<[Option<Listener>]>,
    policies: Box<[Policy]>,
    /// Name and source of each policy, apart from what `decide` reads.
    names: Box<[(Arc<str>, SourceRef, &'static str)]>,
    /// Policy of each route label that this table has.
    labelled: Box<[u32]>,
}

#[derive(Debug)]
struct Listener {
    name: Box<str>,
    own: Own,
    hosts: Arc<Hosts>,
}

#[derive(Debug)]
struct Policy {
    core: Arc<Core>,
    gate: Option<PassReason>,
    on_denied: OnDenied,
}

/// Which policy a route belongs to, for people.
#[derive(Clone, Copy, Debug)]
pub struct Described<'a> {
    /// The policy's name.
    pub policy: &'a str,
    /// Where it was written.
    pub source: &'a SourceRef,
    /// Its dialect, as configurations write it.
    pub dialect: &'static str,
}

impl Table {
    /// Compiles. Never fails: what conflicts or cannot be modelled becomes an entry that passes, and a finding with
    /// the policy's source that says so (the caller decides whether findings refuse the configuration).
    pub fn compile(
        listeners: &[ListenerSpec],
        policies: &[PolicySpec],
        labels: &mut RouteLabels,
        generation: u64,
    ) -> (Table, Vec<(SourceRef, Finding)>) {
        let mut findings = Reports { policies, seen: AHashSet::new(), list: Vec::new() };
        let targets = intern_routes(policies, labels);
        let mut labelled = vec![CONFLICT; labels.all().len()];
        for target in targets.iter().flatten().filter(|t| t.label != RouteId::OTHER) {
            labelled[target.label.0 as usize] = target.policy;
        }
        for (i, policy) in policies.iter().enumerate() {
            check_patterns(i as u32, policy, &mut findings);
        }

        let size = listeners.iter().map(|l| usize::from(l.id.0) + 1).max().unwrap_or(0);
        let mut compiled: Vec<Option<Listener>> = (0..size).map(|_| None).collect();
        // Listeners with the same policies share their hosts.
        let mut shared: AHashMap<Vec<u32>, Arc<Hosts>> = AHashMap::new();
        for spec in listeners {
            let served: Vec<u32> = (0..policies.len() as u32)
                .filter(|&i| {
                    let only = &policies[i as usize].listeners;
                    only.is_empty() || only.contains(&spec.id)
                })
                .collect();
            let hosts = shared.entry(served).or_insert_with_key(|served| {
                Arc::new(compile_hosts(served, policies, &targets, &mut findings))
            });
            compiled[usize::from(spec.id.0)] = Some(Listener {
                name: spec.name.as_str().into(),
                own: Own::new(spec),
                hosts: Arc::clone(hosts),
            });
        }
        let table = Table {
            generation,
            listeners: compiled.into(),
            policies: policies.iter().map(Policy::new).collect(),
            names: policies
                .iter()
                .map(|p| (p.name.as_str().into(), p.source.clone(), p.rules.dialect()))
                .collect(),
            labelled: labelled.into(),
        };
        (table, findings.finish())
    }

    /// The number it was compiled as; grows with each publication.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Number of policies.
    pub fn policies(&self) -> usize {
        self.policies.len()
    }

    /// The policy behind a route of this table; `None` for [`RouteId::OTHER`] and routes of other tables.
    pub fn describe(&self, route: RouteId) -> Option<Described<'_>> {
        let policy = *self.labelled.get(route.0 as usize)?;
        let (policy, source, dialect) = self.names.get(policy as usize)?;
        Some(Described { policy, source, dialect })
    }

    /// Decides a preflight. No allocation, no I/O, linear in the request's length, flat in the table's size.
    #[inline]
    pub fn decide<'a>(&'a self, request: &Preflight<'a>) -> Decision<'a> {
        self.decide_traced(request, &mut NoTrace)
    }

    /// As [`Table::decide`], telling each step to `trace`.
    pub fn decide_traced<'a>(&'a self, request: &Preflight<'a>, trace: &mut impl Trace) -> Decision<'a> {
        let Some(listener) = self.listeners.get(usize::from(request.listener.0)).and_then(Option::as_ref)
        else {
            trace.step(|| format!("listener: number {} is not configured: passed", request.listener.0));
            return Decision::Pass(PassReason::NoHost, RouteId::OTHER);
        };
        trace.step(|| format!("listener: {}", listener.name));
        let Some(path) = path_of(request.target) else {
            trace.step(|| {
                format!("path: {} does not begin with a slash: passed", request.target.escape_ascii())
            });
            return Decision::Pass(PassReason::BadTarget, RouteId::OTHER);
        };

        let mut buffer = [0; 255];
        let Some(host) = listener.own.parse(request.host, &mut buffer) else {
            trace.step(|| {
                format!(
                    "host: {} is not a plain host with a port of this listener: passed",
                    request.host.escape_ascii()
                )
            });
            return Decision::Pass(PassReason::ForeignHost, RouteId::OTHER);
        };
        let own = host.literal.is_some_and(|literal| listener.own.has(host.name, literal));
        let Some((entry, hit)) = listener.hosts.find(&host, own) else {
            let foreign = host.literal.is_some() && !own;
            trace.step(|| {
                let what =
                    if foreign { "is an address that is not this listener's" } else { "has no policy" };
                format!("host: {} {what}: passed", host.name.escape_ascii())
            });
            let reason = if foreign { PassReason::ForeignHost } else { PassReason::NoHost };
            return Decision::Pass(reason, RouteId::OTHER);
        };
        trace.step(|| {
            let name = host.name.escape_ascii();
            match hit {
                HostHit::Exact => format!("host: {name} is listed"),
                HostHit::Wildcard(len) => {
                    let suffix = host.name[host.name.len() - len..].escape_ascii();
                    format!("host: {name} matches *{suffix}, the longest wildcard")
                }
                HostHit::Any => format!("host: {name} is served by the policies of every host"),
            }
        });

        let target = match listener.hosts.route(entry, path) {
            Routed::To(target) => target,
            Routed::Nowhere => {
                trace.step(|| format!("path: {} has no policy on this host: passed", path.escape_ascii()));
                return Decision::Pass(PassReason::NoRoute, RouteId::OTHER);
            }
            Routed::Conflict(label) => {
                trace
                    .step(|| format!("path: {} is claimed by several policies: passed", path.escape_ascii()));
                return Decision::Pass(PassReason::Conflict, label);
            }
            Routed::Opaque => {
                trace.step(|| {
                    format!("path: {} may match a regex that cannot be modelled: passed", path.escape_ascii())
                });
                return Decision::Pass(PassReason::Unsupported, RouteId::OTHER);
            }
        };
        // A target that is no conflict names a policy of this very table.
        let policy = &self.policies[target.policy as usize];
        trace.step(|| {
            let (name, source, dialect) = &self.names[target.policy as usize];
            format!("path: {} leads to policy {name} ({source}, {dialect})", path.escape_ascii())
        });
        if let Some(reason) = policy.gate {
            trace.step(|| format!("passed: the policy is {}", reason.as_str()));
            return Decision::Pass(reason, target.label);
        }
        policy.core.judge(request, policy.on_denied, target.label, trace)
    }
}

impl Policy {
    fn new(spec: &PolicySpec) -> Self {
        let core = Arc::clone(spec.rules.core());
        let gate = match (spec.enabled, spec.stale) {
            (false, _) => Some(PassReason::Disabled),
            (true, true) => Some(PassReason::Stale),
            (true, false) => core.gate,
        };
        Self { gate, on_denied: spec.on_denied.unwrap_or(core.on_denied), core }
    }
}

/// The path of an origin-form target.
fn path_of(target: &[u8]) -> Option<&[u8]> {
    let path = &target[..memchr::memchr(b'?', target).unwrap_or(target.len())];
    (path.first() == Some(&b'/')).then_some(path)
}

/// Findings of a compilation, each told once however many listeners it concerns.
struct Reports<'p> {
    policies: &'p [PolicySpec],
    seen: AHashSet<(u32, String)>,
    list: Vec<(u32, Finding)>,
}

impl Reports<'_> {
    fn add(&mut self, policy: u32, finding: Finding) {
        if self.seen.insert((policy, finding.message.clone())) {
            self.list.push((policy, finding));
        }
    }

    /// In the order of the policies.
    fn finish(mut self) -> Vec<(SourceRef, Finding)> {
        self.list.sort_by(|(a, left), (b, right)| a.cmp(b).then_with(|| left.message.cmp(&right.message)));
        self.list
            .into_iter()
            .map(|(i, finding)| (self.policies[i as usize].source.clone(), finding))
            .collect()
    }
}

/// The target of every (host, path) of every policy, hosts outermost.
fn intern_routes(policies: &[PolicySpec], labels: &mut RouteLabels) -> Vec<Vec<Target>> {
    policies
        .iter()
        .enumerate()
        .map(|(i, policy)| {
            let name: Arc<str> = policy.name.as_str().into();
            let pairs = policy.hosts.iter().flat_map(|h| policy.paths.iter().map(move |p| (h, p)));
            pairs
                .map(|(host, path)| Target {
                    policy: i as u32,
                    label: labels.intern(RouteLabel {
                        host: host.to_string().into(),
                        route: path.to_string().into(),
                        policy: Arc::clone(&name),
                    }),
                })
                .collect()
        })
        .collect()
}

/// Hosts and paths that can never match a request that is answered here.
fn check_patterns(number: u32, policy: &PolicySpec, findings: &mut Reports<'_>) {
    for (i, host) in policy.hosts.iter().enumerate() {
        let valid = match host {
            HostPattern::Any => true,
            HostPattern::Exact(name) => is_host_pattern(name),
            HostPattern::Wildcard(suffix) => {
                suffix.strip_prefix('.').is_some_and(|name| is_host_pattern(name) && !name.starts_with('['))
            }
        };
        if !valid {
            findings.add(
                number,
                Finding {
                    severity: Severity::Error,
                    code: "host-invalid",
                    field: "hosts",
                    item: Some(i),
                    message: format!("`{}` matches no host", host.to_string().escape_debug()),
                    help: "Write a lower-case host without port, or `*.` and a host.".to_owned(),
                },
            );
        }
    }
    for (i, path) in policy.paths.iter().enumerate() {
        let (PathMatch::Exact(text) | PathMatch::Prefix(text)) = path else { continue };
        let (severity, code, message, help) = if !text.starts_with('/') {
            (Severity::Error, "path-relative", "does not begin with a slash", "Write it from the root on.")
        } else if text.contains("//")
            || text.split('/').any(|segment| matches!(segment, "." | ".."))
            || text.bytes().any(|b| matches!(b, b'%' | b'\\' | b';' | b'?' | b'#') || !b.is_ascii_graphic())
        {
            (
                Severity::Warning,
                "path-passes",
                "never matches: requests with such a path always go to the proxy, which may read it otherwise",
                "Nothing, or write a plain path.",
            )
        } else {
            continue;
        };
        findings.add(
            number,
            Finding {
                severity,
                code,
                field: "paths",
                item: Some(i),
                message: format!("`{}` {message}", text.escape_debug()),
                help: help.to_owned(),
            },
        );
    }
}

/// Whether a `Host` can equal this once it is lower-cased and stripped of its port.
fn is_host_pattern(name: &str) -> bool {
    let mut buffer = [0; 255];
    parse_name(name.as_bytes(), &mut buffer).is_some_and(|host| host.name == name.as_bytes())
}

fn compile_hosts(
    served: &[u32],
    policies: &[PolicySpec],
    targets: &[Vec<Target>],
    findings: &mut Reports<'_>,
) -> Hosts {
    let mut claims: AHashMap<&HostPattern, Vec<Claim<'_>>> = AHashMap::with_capacity(served.len());
    for &i in served {
        let policy = &policies[i as usize];
        let one_label = matches!(policy.rules, Rules::IngressNginx(_));
        for (host, targets) in policy.hosts.iter().zip(targets[i as usize].chunks(policy.paths.len().max(1)))
        {
            let routes = policy.paths.iter().zip(targets).filter(|(path, _)| match path {
                PathMatch::Exact(text) | PathMatch::Prefix(text) => text.starts_with('/'),
                PathMatch::Regex(_) => true,
            });
            claims.entry(host).or_default().extend(routes.map(|(path, &target)| Claim {
                path,
                target,
                one_label,
            }));
        }
    }
    let mut builder = Builder::default();
    let mut troubles = Vec::new();
    let mut note = |host: &HostPattern, troubles: &mut Vec<Trouble<'_>>| {
        for trouble in troubles.drain(..) {
            let (policy, finding) = report(host, &trouble, policies);
            findings.add(policy, finding);
        }
    };
    for (host, claims) in &claims {
        if let HostPattern::Exact(name) = host {
            builder.exact(name, claims, &mut troubles);
            note(host, &mut troubles);
        }
    }
    for (host, claims) in &claims {
        match host {
            HostPattern::Exact(_) => continue,
            HostPattern::Wildcard(suffix) => builder.wildcard(suffix, claims, &mut troubles),
            HostPattern::Any => builder.any(claims, &mut troubles),
        }
        note(host, &mut troubles);
    }
    builder.build()
}

/// What to tell of a trouble, and to the source of which policy.
fn report(host: &HostPattern, trouble: &Trouble<'_>, policies: &[PolicySpec]) -> (u32, Finding) {
    match trouble {
        Trouble::Clash { path, first, second } => {
            let other = &policies[*first as usize];
            let this = &policies[*second as usize];
            let finding = Finding {
                severity: Severity::Error,
                code: "route-conflict",
                field: "paths",
                item: None,
                message: format!(
                    "policies `{}` ({}) and `{}` ({}) both claim {path} on host {host}: its preflights go to the proxy",
                    other.name, other.source, this.name, this.source
                ),
                help: "Give the route to one of them.".to_owned(),
            };
            (*second, finding)
        }
        Trouble::Regex { pattern, policy, reason } => {
            let native = matches!(policies[*policy as usize].rules, Rules::Native(_));
            let finding = Finding {
                severity: if native { Severity::Error } else { Severity::Warning },
                code: "regex-unsupported",
                field: "paths",
                item: None,
                message: format!(
                    "the path regex `{}` cannot be modelled: {reason}; preflights to host {host} that it may match go to the proxy",
                    pattern.escape_debug()
                ),
                help: "Write it in RE2's common syntax, shorter, or as exact and prefix paths.".to_owned(),
            };
            (*policy, finding)
        }
    }
}
