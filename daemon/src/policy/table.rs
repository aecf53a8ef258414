//! The compiled table and `decide`.

use super::acrh::Names;
use super::core::Core;
use super::dialect::Rules;
use super::host::{Host, Own, parse_name};
use super::labels::RouteLabel;
use super::learned::Answers;
use super::routes::{Builder, CONFLICT, Claim, HostHit, Hosts, Routed, Target, Trouble};
use super::{
    Answer, Finding, HostPattern, ListenerId, ListenerSpec, PathMatch, PolicySpec, RouteId, RouteLabels,
    Severity, SourceRef,
};
use crate::reason::PassReason;
use ahash::{AHashMap, AHashSet};
use std::{hash::Hash, sync::Arc};

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
    listeners: Arc<[Option<Listener>]>,
    policies: Arc<[Core]>,
    /// Name and source of each policy, apart from what `decide` reads.
    names: Arc<[(Arc<str>, SourceRef, &'static str)]>,
    /// Policy of each route label that this table has.
    labelled: Arc<[u32]>,
    /// What is asked where no policy claims a request.
    learned: Option<Arc<Answers>>,
}

#[derive(Debug)]
struct Listener {
    name: Box<str>,
    own: Own,
    hosts: Arc<Hosts>,
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
        let mut hosts_of: AHashMap<Vec<u32>, Arc<Hosts>> = AHashMap::new();
        for spec in listeners {
            let served: Vec<u32> = (0..policies.len() as u32)
                .filter(|&i| {
                    let only = &policies[i as usize].listeners;
                    only.is_empty() || only.contains(&spec.id)
                })
                .collect();
            let hosts = hosts_of.entry(served).or_insert_with_key(|served| {
                Arc::new(compile_hosts(served, policies, &targets, &mut findings))
            });
            compiled[usize::from(spec.id.0)] = Some(Listener {
                name: spec.name.as_str().into(),
                own: Own::new(spec),
                hosts: Arc::clone(hosts),
            });
        }
        let mut shared = Shared::default();
        let table = Table {
            generation,
            listeners: compiled.into(),
            policies: policies.iter().map(|spec| shared.rules(spec)).collect(),
            names: policies
                .iter()
                .map(|p| (p.name.as_str().into(), p.source.clone(), p.rules.dialect()))
                .collect(),
            labelled: labelled.into(),
            learned: None,
        };
        (table, findings.finish())
    }

    /// The same policies, which both tables share, with these learned answers (`None`: nothing is learned).
    #[must_use]
    pub fn with_learned(&self, generation: u64, learned: Option<Arc<Answers>>) -> Self {
        Self {
            generation,
            listeners: Arc::clone(&self.listeners),
            policies: Arc::clone(&self.policies),
            names: Arc::clone(&self.names),
            labelled: Arc::clone(&self.labelled),
            learned,
        }
    }

    /// What was learned; `None`: nothing is.
    pub fn learned(&self) -> Option<&Arc<Answers>> {
        self.learned.as_ref()
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

    /// What a listener has.
    pub(super) fn listener(&self, id: ListenerId) -> Option<(&Own, &Arc<Hosts>)> {
        let listener = self.listeners.get(usize::from(id.0))?.as_ref()?;
        Some((&listener.own, &listener.hosts))
    }

    /// The rules of a policy.
    pub(super) fn core(&self, policy: u32) -> Option<&Core> {
        self.policies.get(policy as usize)
    }

    /// Its name.
    pub(super) fn policy_name(&self, policy: u32) -> Option<&Arc<str>> {
        self.names.get(policy as usize).map(|(name, ..)| name)
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

        let mut buffer = None;
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
            if foreign {
                return Decision::Pass(PassReason::ForeignHost, RouteId::OTHER);
            }
            return self.unclaimed(request, &host, PassReason::NoHost, RouteId::OTHER, trace);
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

        let target = match listener.hosts.route(entry, path, request.method) {
            Routed::To(target) => target,
            Routed::Nowhere => {
                trace.step(|| format!("path: {} has no policy on this host: passed", path.escape_ascii()));
                return self.unclaimed(request, &host, PassReason::NoRoute, RouteId::OTHER, trace);
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
        if policy.gate == Some(PassReason::NoCors) && self.learned.is_some() {
            trace.step(|| "policy: it leaves CORS to the application behind the proxy".to_owned());
            return self.unclaimed(request, &host, PassReason::NoCors, target.label, trace);
        }
        policy.judge(request, target.label, trace)
    }

    /// No policy claims the request: perhaps an answer of the proxy to it was learned.
    #[cold]
    fn unclaimed<'a>(
        &'a self,
        request: &Preflight<'a>,
        host: &Host<'_>,
        reason: PassReason,
        route: RouteId,
        trace: &mut impl Trace,
    ) -> Decision<'a> {
        let Some((learned, label)) = self.learned.as_deref().and_then(|learned| {
            Some((learned, learned.label(request.listener, host.name, host.literal.is_some())?))
        }) else {
            return Decision::Pass(reason, route);
        };
        let Some(answer) = learned.answer(request, label) else {
            trace.step(|| {
                "learned: no answer of the proxy to exactly this is known: passed, and perhaps asked for"
                    .to_owned()
            });
            return Decision::Pass(PassReason::NotLearned, label);
        };
        trace.step(|| {
            "learned: but the proxy's own answer to exactly this is known: answered alike".to_owned()
        });
        Decision::Answer(answer)
    }
}

/// What policies have in common: it is kept once, and so is at hand.
#[derive(Default)]
struct Shared {
    cores: AHashSet<Arc<Core>>,
    names: AHashSet<Arc<Names>>,
}

impl Shared {
    /// The rules of a policy, with what the policy itself says.
    fn rules(&mut self, spec: &PolicySpec) -> Core {
        let mut core = Core::clone(&share(&mut self.cores, spec.rules.core()));
        core.headers = core.headers.as_ref().map(|names| share(&mut self.names, names));
        core.on_denied = spec.on_denied.unwrap_or(core.on_denied);
        core.gate = spec.passes.or(core.gate);
        core
    }
}

/// The one that is known and equal, or this one.
fn share<T: Eq + Hash>(known: &mut AHashSet<Arc<T>>, new: &Arc<T>) -> Arc<T> {
    if let Some(equal) = known.get(new) {
        return Arc::clone(equal);
    }
    known.insert(Arc::clone(new));
    Arc::clone(new)
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
    // What somebody wrote in an object must not refuse what all others wrote.
    let of_file = if policy.source.is_file() { Severity::Error } else { Severity::Warning };
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
                    severity: of_file,
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
            (of_file, "path-relative", "does not begin with a slash", "Write it from the root on.")
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
pub(crate) fn is_host_pattern(name: &str) -> bool {
    let mut buffer = None;
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
                methods: &policy.for_methods,
            }));
        }
    }
    let mut builder = Builder::default();
    let mut troubles = Vec::new();
    let mut note = |host: &HostPattern, troubles: &mut Vec<Trouble<'_>>| {
        for trouble in troubles.drain(..) {
            let passes = |policy: u32| policies[policy as usize].passes.is_some();
            if matches!(trouble, Trouble::Clash { first, second, .. } if passes(first) && passes(second)) {
                continue;
            }
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
                severity: if other.source.is_file() && this.source.is_file() {
                    Severity::Error
                } else {
                    Severity::Warning
                },
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
            let of = &policies[*policy as usize];
            let native = matches!(of.rules, Rules::Native(_)) && of.source.is_file() && of.passes.is_none();
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::dialect::{envoy, ingress_nginx, native};
    use crate::policy::{Connection, DenyReason, OnDenied, Outcome};
    use proptest::prelude::*;
    use std::sync::LazyLock;

    /// Rules that tell by `Access-Control-Max-Age` which policy answered.
    fn native(max_age: i64) -> Rules {
        let cors = native::Cors {
            origins: vec!["https://app.example".into()],
            methods: vec!["PUT".into()],
            headers: vec!["x-a".into()],
            max_age: Some(max_age),
            ..native::Cors::default()
        };
        Rules::Native(native::validate(&cors).0.expect("valid"))
    }

    fn ingress(max_age: i64) -> Rules {
        let annotations = [
            ("enable-cors", "true".to_owned()),
            ("cors-allow-origin", "https://app.example".to_owned()),
            ("cors-max-age", max_age.to_string()),
        ];
        let annotations = annotations.map(|(name, value)| (name.to_owned(), value)).into();
        Rules::IngressNginx(ingress_nginx::validate(&annotations).0.expect("valid"))
    }

    fn policy(name: &str, hosts: &[&str], paths: &[&str], rules: Rules) -> PolicySpec {
        let host = |text: &&str| match (*text, text.strip_prefix('*')) {
            ("*", _) => HostPattern::Any,
            (_, Some(suffix)) => HostPattern::Wildcard(suffix.to_owned()),
            (_, None) => HostPattern::Exact((*text).to_owned()),
        };
        let path = |text: &&str| match (text.strip_prefix('~'), text.strip_prefix('=')) {
            (Some(regex), _) => PathMatch::Regex(regex.to_owned()),
            (_, Some(exact)) => PathMatch::Exact(exact.to_owned()),
            _ => PathMatch::Prefix((*text).to_owned()),
        };
        PolicySpec {
            name: name.to_owned(),
            source: SourceRef { origin: "test.toml".into(), line: 7 },
            listeners: vec![],
            hosts: hosts.iter().map(host).collect(),
            paths: paths.iter().map(path).collect(),
            for_methods: vec![],
            passes: None,
            on_denied: None,
            rules,
        }
    }

    fn listener(id: u16) -> ListenerSpec {
        ListenerSpec {
            id: ListenerId(id),
            name: format!("listener-{id}"),
            own_literals: vec!["192.0.2.1".into()],
            loopback_is_own: true,
            public_ports: vec![],
        }
    }

    fn compile(policies: &[PolicySpec]) -> (Table, Vec<Finding>) {
        let (table, findings) =
            Table::compile(&[listener(0), listener(3)], policies, &mut RouteLabels::new(1000), 5);
        (table, findings.into_iter().map(|(_, finding)| finding).collect())
    }

    const REQUEST: Preflight<'static> = Preflight {
        listener: ListenerId(0),
        host: b"a.example",
        target: b"/",
        origin: b"https://app.example",
        method: b"PUT",
        headers: &[],
        private_network: false,
    };

    /// The answer's max-age, or the reason of the pass.
    fn outcome(table: &Table, request: &Preflight<'_>) -> String {
        match table.decide(request) {
            Decision::Pass(reason, _) => reason.as_str().to_owned(),
            Decision::Answer(answer) => {
                let mut out = Vec::new();
                answer.render(b"Sun, 06 Nov 1994 08:49:37 GMT", Connection::KeepAlive, &mut out);
                let text = String::from_utf8(out).expect("ASCII");
                let age = text.lines().find_map(|l| l.strip_prefix("Access-Control-Max-Age: "));
                age.map_or_else(|| text.lines().next().expect("status").to_owned(), ToOwned::to_owned)
            }
        }
    }

    #[test]
    fn hosts_and_paths() {
        let (table, findings) = compile(&[
            policy("any", &["*"], &["/any"], native(1)),
            policy("wild", &["*.example"], &["/"], native(2)),
            policy("longer", &["*.b.example"], &["/"], native(3)),
            policy("nginx", &["*.n.b.example"], &["/"], ingress(4)),
            policy("exact", &["a.example", "203.0.113.9"], &["/api", "=/api/exact", "/api/deep/"], native(5)),
            policy("deep", &["a.example"], &["/api/deep/er"], native(6)),
            policy("regex", &["r.example"], &["~/v[0-9]+/.*", "=/v1/x"], native(7)),
            policy("beside", &["r.example"], &["/v2/other", "/w"], native(8)),
        ]);
        assert_eq!(findings, []);
        for (host, target, expected) in [
            ("x.example", "/", "2"),
            ("X.EXAMPLE:8080", "/", "2"),
            ("x.y.example", "/", "2"),
            ("example", "/", "no_route"),
            ("example", "/any/x", "1"),
            ("x.b.example", "/", "3"),
            ("b.example", "/", "2"),
            ("x.n.b.example", "/", "4"),
            // Two labels before ingress-nginx's star: on to the next wildcard.
            ("x.y.n.b.example", "/", "3"),
            ("elsewhere.test", "/any", "1"),
            ("elsewhere.test", "/anything", "no_route"),
            ("elsewhere.test", "/", "no_route"),
            // The most specific host decides alone.
            ("a.example", "/any", "no_route"),
            ("a.example", "/api", "5"),
            ("a.example", "/api/", "5"),
            ("a.example", "/api?q=/other", "5"),
            ("a.example", "/apis", "no_route"),
            ("a.example", "/API", "no_route"),
            ("a.example", "/api/exact", "5"),
            ("a.example", "/api/deep", "5"),
            ("a.example", "/api/deep/er/x", "6"),
            ("a.example", "/api/deep/err", "5"),
            ("r.example", "/v1/x", "7"),
            ("r.example", "/v2/y", "7"),
            ("r.example", "/v2/other/y", "conflict"),
            ("r.example", "/w/v1/x", "8"),
            ("r.example", "/x/v1/x", "no_route"),
            // Addresses.
            ("203.0.113.9", "/api", "5"),
            ("203.0.113.9:80", "/any", "no_route"),
            ("203.0.113.8", "/any", "foreign_host"),
            ("192.0.2.1", "/any", "1"),
            ("127.0.0.1:8080", "/any", "1"),
            ("[::1]", "/any", "1"),
            ("[2001:db8::1]", "/any", "foreign_host"),
            ("a.example.", "/api", "foreign_host"),
            ("user@a.example", "/api", "foreign_host"),
            ("a.example", "*", "bad_target"),
            ("a.example", "", "bad_target"),
            ("a.example", "http://a.example/api", "bad_target"),
            ("a.example", "?/api", "bad_target"),
        ] {
            let request = Preflight { host: host.as_bytes(), target: target.as_bytes(), ..REQUEST };
            assert_eq!(outcome(&table, &request), expected, "{host} {target}");
        }
    }

    #[test]
    fn listeners_are_apart() {
        let mut first = policy("first", &["a.example"], &["/"], native(1));
        first.listeners = vec![ListenerId(0)];
        let mut second = policy("second", &["a.example"], &["/"], native(2));
        second.listeners = vec![ListenerId(3)];
        let (table, findings) = compile(&[first, second, policy("both", &["b.example"], &["/"], native(3))]);
        assert_eq!(findings, [], "the same route on two listeners is no conflict");
        for (id, host, expected) in [
            (0, "a.example", "1"),
            (3, "a.example", "2"),
            (0, "b.example", "3"),
            (3, "b.example", "3"),
            (1, "b.example", "no_host"),
            (4, "b.example", "no_host"),
            (0, "c.example", "no_host"),
        ] {
            let request = Preflight { listener: ListenerId(id), host: host.as_bytes(), ..REQUEST };
            assert_eq!(outcome(&table, &request), expected, "{host} on {id}");
        }
        assert_eq!((table.policies(), table.generation()), (3, 5));
    }

    #[test]
    fn conflicts_pass_and_are_told_once() {
        let (table, findings) = compile(&[
            policy("one", &["a.example"], &["/", "/x", "/x/"], native(1)),
            policy("two", &["a.example", "b.example"], &["/x", "/y"], native(2)),
            policy("three", &["a.example"], &["~/z", "~/z"], native(3)),
            policy("four", &["a.example"], &["~/z"], native(4)),
        ]);
        let told: Vec<(Severity, &str)> = findings.iter().map(|f| (f.severity, f.code)).collect();
        assert_eq!(told, [(Severity::Error, "route-conflict"); 2], "{findings:?}");
        for part in ["`one`", "`two`", "test.toml:7", "/x*", "a.example"] {
            assert!(findings[0].message.contains(part), "{part} in {}", findings[0].message);
        }
        for (host, target, expected) in [
            ("a.example", "/", "1"),
            ("a.example", "/x/y", "conflict"),
            ("a.example", "/y", "2"),
            ("b.example", "/x", "2"),
            ("a.example", "/z", "conflict"),
        ] {
            let request = Preflight { host: host.as_bytes(), target: target.as_bytes(), ..REQUEST };
            assert_eq!(outcome(&table, &request), expected, "{host} {target}");
        }
    }

    #[test]
    fn what_cannot_be_modelled_passes() {
        let envoy_cors = envoy::Cors {
            allow_origin_string_match: vec![envoy::StringMatcher {
                exact: Some("*".into()),
                ..Default::default()
            }],
            ..envoy::Cors::default()
        };
        let envoy_rules = Rules::Envoy(envoy::validate(&envoy_cors, None).0.expect("valid"));
        let (table, findings) = compile(&[
            policy("regex", &["a.example"], &["~/(?=x)", "/own"], native(1)),
            policy("other", &["a.example"], &["/"], native(2)),
            policy("envoy", &["b.example"], &[r"~/\pL"], envoy_rules),
            policy("relative", &["c.example"], &["x", "/a//b", "/%61"], native(3)),
            policy("hosts", &["UPPER.example", "a..b", "*.*.c", "d.example."], &["/"], native(4)),
        ]);
        let told: Vec<(Severity, &str)> = findings.iter().map(|f| (f.severity, f.code)).collect();
        assert_eq!(
            told,
            [
                (Severity::Error, "regex-unsupported"),
                (Severity::Warning, "regex-unsupported"),
                (Severity::Warning, "path-passes"),
                (Severity::Warning, "path-passes"),
                (Severity::Error, "path-relative"),
                (Severity::Error, "host-invalid"),
                (Severity::Error, "host-invalid"),
                (Severity::Error, "host-invalid"),
                (Severity::Error, "host-invalid"),
            ],
            "{findings:?}"
        );
        for (host, target, expected) in [
            // The regex might match this too.
            ("a.example", "/", "unsupported"),
            ("a.example", "/own", "1"),
            ("b.example", "/", "unsupported"),
            ("c.example", "/x", "no_route"),
        ] {
            let request = Preflight { host: host.as_bytes(), target: target.as_bytes(), ..REQUEST };
            assert_eq!(outcome(&table, &request), expected, "{host} {target}");
        }
    }

    #[test]
    fn policies_by_method() {
        let by = |methods: &[&str], spec: PolicySpec| PolicySpec {
            for_methods: methods.iter().map(|m| (*m).to_owned()).collect(),
            ..spec
        };
        let (table, findings) = compile(&[
            by(&["PUT"], policy("put", &["a.example"], &["/x"], native(1))),
            by(&["GET", "DELETE"], policy("get", &["a.example"], &["/x"], native(2))),
            policy("others", &["a.example"], &["/x"], native(3)),
            policy("below", &["a.example"], &["/"], native(4)),
            by(&["PUT"], policy("alone", &["a.example"], &["/alone"], native(5))),
        ]);
        assert_eq!(findings, []);
        for (target, method, expected) in [
            ("/x", "PUT", "1"),
            ("/x/y", "PUT", "1"),
            ("/x", "GET", "2"),
            ("/x", "POST", "3"),
            ("/", "PUT", "4"),
            ("/alone", "PUT", "5"),
            // A path is the most specific one's, whatever the method.
            ("/alone", "GET", "no_route"),
        ] {
            let request = Preflight { target: target.as_bytes(), method: method.as_bytes(), ..REQUEST };
            assert_eq!(outcome(&table, &request), expected, "{method} {target}");
        }
        let (table, findings) = compile(&[
            by(&["PUT", "GET"], policy("one", &["a.example"], &["/x"], native(1))),
            by(&["GET"], policy("two", &["a.example"], &["/x"], native(2))),
        ]);
        assert_eq!(findings.len(), 1, "{findings:?}");
        for (method, expected) in [("PUT", "1"), ("GET", "conflict"), ("POST", "no_route")] {
            let request = Preflight { target: b"/x", method: method.as_bytes(), ..REQUEST };
            assert_eq!(outcome(&table, &request), expected, "{method}");
        }
    }

    #[test]
    fn switched_off_and_stale() {
        let mut off = policy("off", &["off.example"], &["/"], native(1));
        off.passes = Some(PassReason::Disabled);
        let mut stale = policy("stale", &["stale.example"], &["/"], native(1));
        stale.passes = Some(PassReason::Stale);
        let (table, _) = compile(&[off, stale]);
        for (host, expected) in [("off.example", "disabled"), ("stale.example", "stale")] {
            assert_eq!(outcome(&table, &Preflight { host: host.as_bytes(), ..REQUEST }), expected);
        }
    }

    #[test]
    fn on_denied_overrides_the_dialect() {
        let bad_origin = Preflight { origin: b"https://evil.example", ..REQUEST };
        let bad_method = Preflight { method: b"PATCH", ..REQUEST };
        let bad_headers = Preflight { headers: &[b"x-b"], ..REQUEST };
        for (rules, on_denied, expected) in [
            (native(1), None, ["HTTP/1.1 403 Forbidden"; 3]),
            (native(1), Some(OnDenied::Answer), ["HTTP/1.1 403 Forbidden"; 3]),
            (
                native(1),
                Some(OnDenied::Pass),
                ["origin_not_allowed", "method_not_allowed", "headers_not_allowed"],
            ),
            // Imported dialects judge origins alone; the browser does the rest.
            (ingress(2), None, ["origin_not_allowed", "2", "2"]),
            (ingress(2), Some(OnDenied::Pass), ["origin_not_allowed", "2", "2"]),
            (ingress(2), Some(OnDenied::Answer), ["HTTP/1.1 204 No Content", "2", "2"]),
        ] {
            let mut spec = policy("p", &["*"], &["/"], rules);
            spec.on_denied = on_denied;
            let (table, _) = compile(&[spec]);
            let got = [bad_origin, bad_method, bad_headers].map(|r| outcome(&table, &r));
            assert_eq!(got, expected, "{on_denied:?}");
        }
    }

    #[test]
    fn unusable_values_pass() {
        let echo = native::Cors {
            origins: vec!["https://app.example".into()],
            methods: vec!["*".into()],
            headers: vec!["*".into()],
            credentials: true,
            ..native::Cors::default()
        };
        let rules = Rules::Native(native::validate(&echo).0.expect("valid"));
        let (table, _) = compile(&[policy("echo", &["*"], &["/"], rules)]);
        let long = vec![b'a'; 16 << 10];
        for (request, expected) in [
            (Preflight { method: b"", ..REQUEST }, "bad_request_method"),
            (Preflight { method: b"A B", ..REQUEST }, "bad_request_method"),
            (Preflight { method: b"A\r\nX: y", ..REQUEST }, "bad_request_method"),
            (Preflight { method: &long, ..REQUEST }, "bad_request_method"),
            (Preflight { origin: b"", ..REQUEST }, "bad_origin"),
            (Preflight { origin: b"https://app.example\r\nX: y", ..REQUEST }, "bad_origin"),
            (Preflight { origin: &long, ..REQUEST }, "bad_origin"),
            (Preflight { headers: &[b"x\r\ny: z"], ..REQUEST }, "unusable_request_headers"),
            (Preflight { headers: &[&long], ..REQUEST }, "unusable_request_headers"),
            (Preflight { headers: &[b"x: y"], ..REQUEST }, "unusable_request_headers"),
        ] {
            assert_eq!(outcome(&table, &request), expected, "{request:?}");
        }
    }

    /// Every line of an answer, as the dialects' table in the documentation has it.
    #[test]
    fn native_answers_byte_for_byte() {
        let base = native::Cors { origins: vec!["https://app.example".into()], ..native::Cors::default() };
        let star = native::Cors { origins: vec!["*".into()], ..native::Cors::default() };
        let lists = native::Cors {
            methods: vec!["PUT".into(), "PURGE".into()],
            headers: vec!["X-A".into(), "content-type".into()],
            expose: vec!["x-e".into()],
            max_age: Some(-1),
            private_network: true,
            ..base.clone()
        };
        let stars = native::Cors { methods: vec!["*".into()], headers: vec!["*".into()], ..base.clone() };
        let credentials = native::Cors { credentials: true, ..stars.clone() };
        let origin = "Access-Control-Allow-Origin: https://app.example\r\n";
        let vary = "Vary: Origin, Access-Control-Request-Method, Access-Control-Request-Headers\r\n";
        let none: &[&[u8]] = &[];
        for (name, cors, headers, private_network, expected) in [
            ("least", &base, none, false, format!("{origin}{vary}")),
            ("all origins", &star, none, false, format!("Access-Control-Allow-Origin: *\r\n{vary}")),
            (
                "lists",
                &lists,
                &[b"content-type,x-a".as_slice()],
                true,
                format!(
                    "{origin}Access-Control-Allow-Methods: PUT, PURGE\r\nAccess-Control-Allow-Headers: x-a, content-type\r\n\
                     Access-Control-Max-Age: -1\r\n{vary}Access-Control-Allow-Private-Network: true\r\n"
                ),
            ),
            (
                "stars",
                &stars,
                &[b"x-b"],
                true,
                format!(
                    "{origin}Access-Control-Allow-Methods: *\r\n{vary}Access-Control-Allow-Headers: *\r\n"
                ),
            ),
            (
                "stars, authorization",
                &stars,
                &[b"Authorization", b"x-b"],
                false,
                format!(
                    "{origin}Access-Control-Allow-Methods: *\r\n{vary}Access-Control-Allow-Headers: Authorization,x-b\r\n"
                ),
            ),
            (
                "stars with credentials",
                &credentials,
                &[b"x-b"],
                false,
                format!(
                    "{origin}Access-Control-Allow-Credentials: true\r\n{vary}Access-Control-Allow-Methods: GET\r\n\
                     Access-Control-Allow-Headers: x-b\r\n"
                ),
            ),
            (
                "stars with credentials, empty lines",
                &credentials,
                &[b"".as_slice(), b"x-b", b"", b"x-c"],
                false,
                format!(
                    "{origin}Access-Control-Allow-Credentials: true\r\n{vary}Access-Control-Allow-Methods: GET\r\n\
                     Access-Control-Allow-Headers: x-b,x-c\r\n"
                ),
            ),
            (
                "stars with credentials, no headers",
                &credentials,
                none,
                false,
                format!(
                    "{origin}Access-Control-Allow-Credentials: true\r\n{vary}Access-Control-Allow-Methods: GET\r\n"
                ),
            ),
        ] {
            let (rules, findings) = native::validate(cors);
            let rules = Rules::Native(rules.unwrap_or_else(|| panic!("{name}: {findings:?}")));
            let (table, _) = compile(&[policy("p", &["*"], &["/"], rules)]);
            let request = Preflight { method: b"GET", headers, private_network, ..REQUEST };
            let Decision::Answer(answer) = table.decide(&request) else { panic!("{name}: passed") };
            for (connection, line) in [
                (Connection::KeepAlive, ""),
                (Connection::KeepAlive10, "Connection: keep-alive\r\n"),
                (Connection::Close, "Connection: close\r\n"),
            ] {
                let mut out = b"before".to_vec();
                answer.render(b"Sun, 06 Nov 1994 08:49:37 GMT", connection, &mut out);
                let expected = format!(
                    "beforeHTTP/1.1 204 No Content\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\n{line}{expected}\r\n"
                );
                assert_eq!(String::from_utf8_lossy(&out), expected, "{name}");
            }
        }
    }

    #[test]
    fn denials_byte_for_byte() {
        let (table, _) = compile(&[policy("p", &["*"], &["/"], native(1))]);
        let Decision::Answer(answer) =
            table.decide(&Preflight { origin: b"https://evil.example", ..REQUEST })
        else {
            panic!("passed")
        };
        assert_eq!(answer.outcome, Outcome::Denied(DenyReason::Origin));
        let mut out = Vec::new();
        answer.render(b"Sun, 06 Nov 1994 08:49:37 GMT", Connection::Close, &mut out);
        let expected = "HTTP/1.1 403 Forbidden\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\nConnection: close\r\n\
            Content-Length: 0\r\nVary: Origin, Access-Control-Request-Method, Access-Control-Request-Headers\r\n\r\n";
        assert_eq!(String::from_utf8_lossy(&out), expected);
    }

    #[derive(Default)]
    struct Steps(Vec<String>);

    impl Trace for Steps {
        fn step(&mut self, text: impl FnOnce() -> String) {
            self.0.push(text());
        }
    }

    #[test]
    fn traces_each_step() {
        let (table, _) = compile(&[policy("shop", &["*.example"], &["/"], native(1))]);
        let mut steps = Steps::default();
        let decision = table.decide_traced(&Preflight { headers: &[b"x-b"], ..REQUEST }, &mut steps);
        assert!(matches!(decision, Decision::Answer(a) if a.outcome == Outcome::Denied(DenyReason::Headers)));
        assert_eq!(
            steps.0,
            [
                "listener: listener-0",
                "host: a.example matches *.example, the longest wildcard",
                "path: / leads to policy shop (test.toml:7, native)",
                "origin: https://app.example is allowed: it is listed",
                "method: PUT is listed",
                "headers: x-b are not all listed, or not lower-case, sorted and unique as browsers send them",
                "answered: denied, the browser will refuse",
            ]
        );
    }

    #[test]
    fn describes_routes() {
        let mut labels = RouteLabels::new(2);
        let policies = [
            policy("one", &["a.example"], &["/"], native(1)),
            policy("beyond", &["b.example"], &["/"], native(1)),
        ];
        let (table, _) = Table::compile(&[listener(0)], &policies, &mut labels, 1);
        let Decision::Answer(answer) = table.decide(&REQUEST) else { panic!("passed") };
        let described = table.describe(answer.route).expect("labelled");
        assert_eq!((described.policy, described.dialect, described.source.line), ("one", "native", 7));
        let label = &labels.all()[answer.route.0 as usize];
        assert_eq!((&*label.host, &*label.route, &*label.policy), ("a.example", "/*", "one"));
        // Beyond the labels' bound routes work all the same.
        let request = Preflight { host: b"b.example", ..REQUEST };
        let Decision::Answer(answer) = table.decide(&request) else { panic!("passed") };
        assert_eq!(answer.route, RouteId::OTHER);
        assert!(table.describe(RouteId::OTHER).is_none() && table.describe(RouteId(99)).is_none());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        /// Against a scan of all routes; more than a few take the way by hash.
        #[test]
        fn routes_are_as_the_reference(
            prefixes in prop::collection::btree_set("(/[ab]{1,2}){0,4}", 1..24),
            exacts in prop::collection::btree_set("(/[ab]{1,2}){1,4}", 0..12),
            paths in prop::collection::vec("(/[ab]{0,2}){1,5}", 1..20),
        ) {
            let prefixes: Vec<String> = prefixes.into_iter().collect();
            let exacts: Vec<String> = exacts.into_iter().collect();
            let mut policies = Vec::new();
            for (i, prefix) in prefixes.iter().enumerate() {
                policies.push(policy("p", &["*"], &[&format!("{prefix}/")], native(i64::try_from(i).expect("few"))));
            }
            for (i, exact) in exacts.iter().enumerate() {
                policies.push(policy("e", &["*"], &[&format!("={exact}")], native(1000 + i64::try_from(i).expect("few"))));
            }
            let (table, _) = compile(&policies);
            for path in &paths {
                let exact = exacts.iter().position(|e| e == path).map(|i| 1000 + i);
                let prefix = prefixes
                    .iter()
                    .enumerate()
                    .filter(|(_, p)| path.strip_prefix(p.as_str()).is_some_and(|r| r.is_empty() || r.starts_with('/')))
                    .max_by_key(|(_, p)| p.len())
                    .map(|(i, _)| i);
                let expected = exact.or(prefix).map_or("no_route".to_owned(), |age| age.to_string());
                let request = Preflight { target: path.as_bytes(), ..REQUEST };
                prop_assert_eq!(outcome(&table, &request), expected, "{}", path);
            }
        }

        #[test]
        fn no_bytes_panic(
            host in prop::collection::vec(any::<u8>(), 0..300),
            target in prop::collection::vec(any::<u8>(), 0..100),
            origin in prop::collection::vec(any::<u8>(), 0..400),
            method in prop::collection::vec(any::<u8>(), 0..80),
            lines in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..100), 0..4),
        ) {
            static TABLE: LazyLock<Table> = LazyLock::new(|| {
                let policies = [
                    policy("n", &["*", "*.example"], &["/", "~/.*x"], native(1)),
                    policy("i", &["*.b.example"], &["/"], ingress(1)),
                ];
                compile(&policies).0
            });
            let table = &*TABLE;
            let headers: Vec<&[u8]> = lines.iter().map(Vec::as_slice).collect();
            for listener in [0, 1, u16::MAX] {
                for (host, target) in [(&host[..], &target[..]), (b"a.b.example", &target[..]), (b"x", b"/")] {
                    let request = Preflight {
                        listener: ListenerId(listener),
                        host,
                        target,
                        origin: &origin,
                        method: &method,
                        headers: &headers,
                        private_network: true,
                    };
                    outcome(table, &request);
                    outcome(table, &Preflight { origin: b"https://app.example", ..request });
                    outcome(table, &Preflight { origin: b"https://app.example", method: b"PUT", ..request });
                }
            }
        }
    }
}
