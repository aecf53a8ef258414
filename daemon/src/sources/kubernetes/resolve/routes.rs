//! HTTPRoutes: where they hang, and which of their rules a preflight meets.
//!
//! Source: Gateway API v1, `HTTPRouteRule.matches` and `HTTPRouteSpec.hostnames` for precedence, `ParentReference` and
//! `AllowedRoutes` for attachment.

use super::{
    Cors, GatewayDialect, ObjectName, Outcome, Run, always_passes,
    claims::Claim,
    dialect_of_controller, element_prefix, host_pattern, is_kgateway,
    kgateway::{self, Attached, Level},
    name_of,
};
use crate::{
    policy::{HostPattern, ListenerId, PathMatch, Severity, dialect::gateway_api},
    reason::PassReason,
    sources::kubernetes::objects::{
        BackendRef, Filter, Gateway, GatewayListener, HttpRoute, Key, Meta, Object, ParentRef, RouteMatch,
        RouteRule,
    },
};
use ahash::AHashMap;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

const GROUP: &str = "gateway.networking.k8s.io";
/// What `maxAge` is where a filter does not say: the schema's default, which the API server writes into each object.
const DEFAULT_MAX_AGE: i32 = 5;

/// Kinds of backends that have requests for themselves.
const BACKENDS: &[(&str, &str)] = &[
    ("", "Service"),
    ("gateway.kgateway.dev", "Backend"),
    ("inference.networking.k8s.io", "InferencePool"),
    ("multicluster.x-k8s.io", "ServiceImport"),
];
/// So many patterns, and matches of rules, of one host are followed; with more of them the host passes.
const MAX_PATTERNS: usize = 16;
const MAX_CANDIDATES: usize = 4096;

/// Listeners of a Gateway that share a port, and so the hosts.
struct Port {
    gateway: ObjectName,
    dialect: GatewayDialect,
    /// kgateway's policies hold there.
    kgateway: bool,
    listeners: Vec<ListenerId>,
    /// Hostnames of its listeners; one is [`HostPattern::Any`] if it has none.
    hostnames: Vec<HostPattern>,
    hosts: BTreeMap<HostPattern, Vec<Hung>>,
    /// Hosts that objects have of which no more is read.
    foreign: BTreeSet<HostPattern>,
}

/// A route on a host of a port.
#[derive(Clone)]
struct Hung {
    route: usize,
    /// The Gateway's listener, by its name.
    section: Arc<str>,
    /// Another listener of the port may have the host's requests.
    contested: bool,
}

/// What was made of rules already: by Gateway, listener, route and rule.
type Judged = AHashMap<(Key, Arc<str>, usize, usize), (Outcome, u64)>;

/// A rule's match that may have a request.
struct Candidate {
    /// Longer first, of equal ones those for one method, with more headers, with more query parameters, of older routes, of
    /// earlier names, of earlier rules.
    rank: (bool, usize, usize, usize, usize),
    method: Option<String>,
    /// Headers or the query decide too.
    conditional: bool,
    route: usize,
    rule: usize,
    outcome: Outcome,
    backend: u64,
    /// A prefix that is written with a slash at its end.
    slash: bool,
}

/// What a walk through candidates ends with.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Found {
    outcome: Outcome,
    route: usize,
    rule: usize,
    backend: u64,
}

impl Run<'_> {
    pub(super) fn routes(&mut self) {
        let world = self.world;
        // By age, then by name, as ties are broken; what has no age is a manifest.
        let mut routes: Vec<&Arc<Object<HttpRoute>>> = world.http_routes.values().collect();
        routes.sort_by(|a, b| {
            let key = |route: &Object<HttpRoute>| route.meta.creation_timestamp.clone();
            key(a).cmp(&key(b)).then_with(|| a.key().to_string().cmp(&b.key().to_string()))
        });
        let attached = Attached::of(world);
        let mut ports = self.ports(&attached);
        for (number, route) in routes.iter().enumerate() {
            self.hang(number, route, &mut ports);
        }
        self.foreign(&mut ports);
        let mut judged = AHashMap::new();
        for (number, port) in &ports {
            self.port(number, port, &routes, &attached, &mut judged);
        }
        for route in &routes {
            self.lint_route(route);
        }
    }

    /// The plain-text ports of the Gateways that concern us.
    fn ports(&mut self, attached: &Attached<'_>) -> BTreeMap<(Key, u16), Port> {
        let mut ports = BTreeMap::new();
        for (key, gateway) in &self.world.gateways {
            let Some((dialect, kgateway)) = self.dialect(gateway) else { continue };
            let plain = || gateway.spec.listeners.iter().filter(|listener| listener.protocol == "HTTP");
            for listener in plain() {
                let (whole, section) = (key.to_string(), format!("{key}/{}", listener.name));
                let Some(ours) = self.listeners(|scope| {
                    scope.gateways.iter().any(|wanted| *wanted == whole || *wanted == section)
                }) else {
                    continue;
                };
                let port = ports.entry((key.clone(), listener.port)).or_insert_with(|| Port {
                    gateway: name_of::<Gateway>(&gateway.meta),
                    dialect,
                    kgateway,
                    listeners: ours.clone(),
                    // Also those of listeners that are not ours: they have their hosts' requests.
                    hostnames: plain()
                        .filter(|other| other.port == listener.port)
                        .filter_map(|other| host_pattern(other.hostname.as_deref().unwrap_or("")))
                        .collect(),
                    hosts: BTreeMap::new(),
                    foreign: BTreeSet::new(),
                });
                if ours.is_empty() {
                    port.listeners.clear();
                } else if !port.listeners.is_empty() {
                    port.listeners.extend(ours);
                    port.listeners.sort_unstable();
                    port.listeners.dedup();
                }
            }
        }
        // Of manifests: Gateways that routes name and that are not among them.
        if let Some(assumed) = self.settings.assume {
            for (key, route) in &self.world.http_routes {
                for parent in route.spec.parent_refs.iter().filter(|parent| is_gateway(parent)) {
                    let gateway = gateway_of(parent, &key.namespace);
                    if self.world.gateways.contains_key(&gateway) {
                        continue;
                    }
                    let kgateway = attached.is_of_kgateway(route);
                    let port =
                        ports.entry((gateway.clone(), parent.port.unwrap_or(0))).or_insert_with(|| Port {
                            gateway: ObjectName { kind: "Gateway", key: gateway },
                            dialect: assumed,
                            kgateway: assumed == GatewayDialect::Envoy,
                            listeners: Vec::new(),
                            hostnames: vec![HostPattern::Any],
                            hosts: BTreeMap::new(),
                            foreign: BTreeSet::new(),
                        });
                    if kgateway && port.dialect == GatewayDialect::Unknown {
                        (port.dialect, port.kgateway) = (GatewayDialect::Envoy, true);
                    }
                }
            }
        }
        ports
    }

    /// The dialect of a Gateway, and whether kgateway's policies hold on it; `None`: it does not concern us.
    fn dialect(&self, gateway: &Object<Gateway>) -> Option<(GatewayDialect, bool)> {
        let settings = self.settings;
        let name = &gateway.spec.gateway_class_name;
        if !settings.gateway_classes.is_empty() && !settings.gateway_classes.contains(name) {
            return None;
        }
        let class = self.world.gateway_classes.get(&Key::new("", name));
        let controller = match class {
            Some(class) => &*class.spec.controller_name,
            // Its class is not among the manifests.
            None if settings.assume.is_some() => name,
            None => return None,
        };
        let said = settings.dialects.get(name).or_else(|| settings.dialects.get(controller)).copied();
        let mut dialect = said.unwrap_or_else(|| dialect_of_controller(controller));
        if class.is_none()
            && said.is_none()
            && dialect == GatewayDialect::Unknown
            && let Some(assumed) = settings.assume
        {
            dialect = assumed;
        }
        let kgateway = is_kgateway(controller);
        (dialect != GatewayDialect::Ignore)
            .then_some((dialect, kgateway || class.is_none() && dialect == GatewayDialect::Envoy))
    }

    /// Hangs a route on the listeners that take it.
    fn hang(&mut self, number: usize, route: &Object<HttpRoute>, ports: &mut BTreeMap<(Key, u16), Port>) {
        let object = name_of::<HttpRoute>(&route.meta);
        let mut hostnames = Vec::new();
        for (i, hostname) in route.spec.hostnames.iter().enumerate() {
            match host_pattern(hostname) {
                Some(HostPattern::Any) | None => self.note(
                    &object,
                    &route.meta,
                    format!("spec.hostnames[{i}]"),
                    (Severity::Error, "host-invalid"),
                    format!("`{}` is no host name", hostname.escape_debug()),
                    "Write a name such as `api.example.com` or `*.example.com`.",
                ),
                Some(host) => hostnames.push(host),
            }
        }
        if hostnames.is_empty() {
            if !route.spec.hostnames.is_empty() {
                return;
            }
            hostnames.push(HostPattern::Any);
        }
        for parent in route.spec.parent_refs.iter().filter(|parent| is_gateway(parent)) {
            let key = gateway_of(parent, &route.meta.namespace);
            let gateway = self.world.gateways.get(&key);
            if gateway.is_none() && self.settings.assume.is_none() {
                continue;
            }
            let has_status = self.settings.assume.is_none() || !route.status.parents.is_empty();
            if has_status && !self.is_accepted(route, parent, gateway) {
                continue;
            }
            let Some(gateway) = gateway else {
                if let Some(port) = ports.get_mut(&(key, parent.port.unwrap_or(0))) {
                    for host in &hostnames {
                        port.hosts.entry(host.clone()).or_default().push(Hung {
                            route: number,
                            section: parent.section_name.as_deref().unwrap_or("").into(),
                            contested: false,
                        });
                    }
                }
                continue;
            };
            for listener in &gateway.spec.listeners {
                if parent.section_name.as_ref().is_some_and(|name| *name != listener.name)
                    || parent.port.is_some_and(|port| port != listener.port)
                    || !self.takes(gateway, listener, route)
                {
                    continue;
                }
                let Some(port) = ports.get_mut(&(key.clone(), listener.port)) else { continue };
                let Some(served) = host_pattern(listener.hostname.as_deref().unwrap_or("")) else { continue };
                for host in hostnames.iter().filter_map(|host| intersection(host, &served)) {
                    // The listener with the most specific name has a host's requests.
                    let contested = port.hostnames.iter().any(|other| {
                        *other != served
                            && intersection(&host, other).is_some_and(|both| both == host)
                            && intersection(other, &served).is_some_and(|both| both == *other)
                    });
                    let hung = Hung { route: number, section: listener.name.as_str().into(), contested };
                    let there = port.hosts.entry(host).or_default();
                    if !there.iter().any(|h| h.route == number && h.section == hung.section) {
                        there.push(hung);
                    }
                }
            }
        }
    }

    /// Hosts of other kinds of routes, and of listeners that are declared elsewhere: of them no more is read.
    fn foreign(&self, ports: &mut BTreeMap<(Key, u16), Port>) {
        let mut add = |gateway: &Key, hosts: &[&str]| {
            for (_, port) in ports.iter_mut().filter(|((key, _), _)| key == gateway) {
                let all: &[&str] = if hosts.is_empty() { &[""] } else { hosts };
                for host in all.iter().filter_map(|host| host_pattern(host)) {
                    let within = port.hostnames.iter().filter_map(|served| intersection(&host, served));
                    let within: Vec<HostPattern> = within.collect();
                    port.foreign.extend(within);
                }
            }
        };
        for (key, route) in &self.world.grpc_routes {
            let hosts: Vec<&str> = route.spec.hostnames.iter().map(String::as_str).collect();
            for parent in route.spec.parent_refs.iter().filter(|parent| is_gateway(parent)) {
                add(&gateway_of(parent, &key.namespace), &hosts);
            }
        }
        let sets = self.world.listener_sets.iter().map(|(key, set)| (key, &set.spec));
        let older = self.world.x_listener_sets.iter().map(|(key, set)| (key, &set.spec));
        for (key, set) in sets.chain(older) {
            for listener in &set.listeners {
                let host = listener.hostname.as_deref().unwrap_or("");
                add(&gateway_of(&set.parent_ref, &key.namespace), &[host]);
            }
        }
    }

    /// Whether annotations turn kgateway's order of policies around.
    fn is_reordered(&self, gateway: &Key, route: &Object<HttpRoute>) -> bool {
        let reorders = |meta: &Meta| {
            meta.annotations.keys().any(|name| {
                matches!(&**name, "kgateway.dev/policy-weight" | "kgateway.dev/inherited-policy-priority")
            })
        };
        reorders(&route.meta)
            || self.world.gateways.get(gateway).is_some_and(|gateway| reorders(&gateway.meta))
    }

    /// Whether the Gateway's controller has taken the route, and found all that it refers to.
    fn is_accepted(
        &self,
        route: &Object<HttpRoute>,
        parent: &ParentRef,
        gateway: Option<&Arc<Object<Gateway>>>,
    ) -> bool {
        // Of manifests: a Gateway that is not among them.
        let Some(gateway) = gateway else {
            let mut conditions = route.status.parents.iter().flat_map(|parent| &parent.conditions);
            return conditions.any(|condition| condition.kind == "Accepted" && condition.status == "True");
        };
        let class = self.world.gateway_classes.get(&Key::new("", &gateway.spec.gateway_class_name));
        let same = |a: &ParentRef, b: &ParentRef| {
            gateway_of(a, &route.meta.namespace) == gateway_of(b, &route.meta.namespace)
                && a.section_name == b.section_name
                && a.port == b.port
        };
        route.status.parents.iter().any(|status| {
            same(&status.parent_ref, parent)
                && class.is_none_or(|class| class.spec.controller_name == status.controller_name)
                && status.conditions.iter().any(|c| c.kind == "Accepted" && c.status == "True")
        })
    }

    /// Whether a listener takes routes of this kind from this namespace.
    fn takes(
        &self,
        gateway: &Object<Gateway>,
        listener: &GatewayListener,
        route: &Object<HttpRoute>,
    ) -> bool {
        let allowed = &listener.allowed_routes;
        if !allowed.kinds.is_empty() && allowed.kinds.iter().all(|kind| kind.kind != "HTTPRoute") {
            return false;
        }
        match allowed.namespaces.from.as_deref() {
            Some("All") => true,
            Some("Selector") => {
                let namespace = self.world.namespaces.get(&Key::new("", &route.meta.namespace));
                let selector = allowed.namespaces.selector.as_ref();
                match (namespace, selector) {
                    (Some(namespace), Some(selector)) => {
                        selector.matches(&namespace.meta.labels).unwrap_or(false)
                    }
                    // Of manifests, whose Namespaces are elsewhere.
                    (None, Some(_)) => self.settings.assume.is_some(),
                    _ => false,
                }
            }
            None | Some("Same") => gateway.meta.namespace == route.meta.namespace,
            Some(_) => false,
        }
    }

    /// Claims what the routes of a port have.
    fn port(
        &mut self,
        port_number: &(Key, u16),
        port: &Port,
        routes: &[&Arc<Object<HttpRoute>>],
        attached: &Attached<'_>,
        judged: &mut Judged,
    ) {
        let number = port_number.1;
        let proxy = self.claims.proxy(format!("{} (port {number})", port.gateway), &port.listeners);
        let whole = PathMatch::Prefix("/".to_owned());
        let of_gateway = Claim { object: &port.gateway, rule: 0, proxy, one_label: false };
        for host in &port.foreign {
            self.claims.add(of_gateway, host, whole.clone(), &[], Outcome::Pass(PassReason::Unsupported));
        }
        // A listener without routes still has its hosts' requests.
        if port.hostnames.len() > 1 {
            for hostname in port.hostnames.iter().filter(|name| !port.hosts.contains_key(name)) {
                self.claims.add(of_gateway, hostname, whole.clone(), &[], Outcome::Pass(PassReason::NoCors));
            }
        }
        let any = [RouteMatch::default()];
        for (host, hung) in &port.hosts {
            let matches_of = |hung: &Hung| -> usize {
                routes[hung.route].spec.rules.iter().map(|rule| rule.matches.len().max(1)).sum()
            };
            if port.foreign.contains(host) || hung.iter().map(matches_of).sum::<usize>() > MAX_CANDIDATES {
                self.claims.add(of_gateway, host, whole.clone(), &[], Outcome::Pass(PassReason::Unsupported));
                continue;
            }
            let before = self.claims.len();
            let contested = hung.iter().any(|hung| hung.contested);
            let mut exact: BTreeMap<&str, Vec<Candidate>> = BTreeMap::new();
            let mut prefixes: BTreeMap<String, Vec<Candidate>> = BTreeMap::new();
            let mut patterns: BTreeMap<&str, Vec<Candidate>> = BTreeMap::new();
            for hung in hung {
                let route = routes[hung.route];
                for (rule_number, rule) in route.spec.rules.iter().enumerate() {
                    let key = (port.gateway.key.clone(), Arc::clone(&hung.section), hung.route, rule_number);
                    let (mut outcome, backend) = if let Some(known) = judged.get(&key) {
                        *known
                    } else {
                        let made = self.judge(port, hung, route, rule_number, rule, attached);
                        judged.insert(key, made);
                        made
                    };
                    if contested {
                        outcome = Outcome::Pass(PassReason::Conflict);
                    }
                    let matches = if rule.matches.is_empty() { &any[..] } else { &rule.matches };
                    for (match_number, wanted) in matches.iter().enumerate() {
                        let candidate = Candidate {
                            rank: (
                                wanted.method.is_none(),
                                usize::MAX - wanted.headers,
                                usize::MAX - wanted.query_params,
                                hung.route,
                                rule_number * 1024 + match_number,
                            ),
                            method: wanted.method.clone(),
                            conditional: wanted.headers + wanted.query_params > 0,
                            route: hung.route,
                            rule: rule_number,
                            outcome,
                            backend,
                            slash: false,
                        };
                        let path = wanted.path.as_ref();
                        let value = path.and_then(|p| p.value.as_deref()).unwrap_or("/");
                        match path.and_then(|p| p.kind.as_deref()).unwrap_or("PathPrefix") {
                            "Exact" if !always_passes(value) => {
                                exact.entry(value).or_default().push(candidate);
                            }
                            "PathPrefix" if !always_passes(value) => {
                                let prefix = value.strip_suffix('/').unwrap_or(value).to_owned();
                                let slash = !prefix.is_empty() && value.ends_with('/');
                                prefixes.entry(prefix).or_default().push(Candidate { slash, ..candidate });
                            }
                            "Exact" | "PathPrefix" => {}
                            // Only of Envoy is it known that the whole path must match.
                            "RegularExpression" if port.dialect == GatewayDialect::Envoy => {
                                patterns.entry(value).or_default().push(candidate);
                            }
                            // Nobody knows which paths it has: any of the host.
                            _ => patterns.entry(".*").or_default().push(Candidate {
                                outcome: Outcome::Pass(PassReason::Unsupported),
                                ..candidate
                            }),
                        }
                    }
                }
            }
            if patterns.len() > MAX_PATTERNS {
                self.claims.add(of_gateway, host, whole.clone(), &[], Outcome::Pass(PassReason::Unsupported));
                continue;
            }
            // To Envoy kgateway gives `/x/` as it stands: then `/x` is not of it, and it goes before `/x`.
            let mut not_of_it = Vec::new();
            for (prefix, list) in &mut prefixes {
                if port.dialect != GatewayDialect::Envoy || list.iter().all(|candidate| !candidate.slash) {
                    continue;
                }
                not_of_it.push((prefix.clone(), list[0].found()));
                if list.iter().any(|candidate| !candidate.slash) {
                    for candidate in list {
                        candidate.outcome = Outcome::Pass(PassReason::Unsupported);
                    }
                }
            }
            for list in exact.values_mut().chain(prefixes.values_mut()).chain(patterns.values_mut()) {
                list.sort_by_key(|candidate| candidate.rank);
            }
            let mut claim = |path: PathMatch, methods: &[String], found: Found| {
                let object = name_of::<HttpRoute>(&routes[found.route].meta);
                let claim = Claim { object: &object, rule: found.rule, proxy, one_label: false };
                self.claims.add(claim, host, path, methods, found.outcome);
            };
            for path in exact.keys().filter(|path| !not_of_it.iter().any(|(other, _)| other == *path)) {
                let ways = ways(&ancestors(path, Some(&exact[path]), &prefixes));
                ways.claim(&PathMatch::Exact((*path).to_owned()), &mut claim);
            }
            for (path, found) in not_of_it {
                let outcome = Outcome::Pass(PassReason::Unsupported);
                claim(PathMatch::Exact(path), &[], Found { outcome, ..found });
            }
            for prefix in prefixes.keys() {
                let ways = ways(&ancestors(prefix, None, &prefixes));
                ways.claim(&element_prefix(prefix), &mut claim);
            }
            for (pattern, candidates) in &patterns {
                let first = candidates[0].found();
                // Which of several rules a pattern's paths meet is each proxy's own matter.
                let plain = candidates
                    .iter()
                    .all(|c| c.method.is_none() && !c.conditional && c.outcome == first.outcome);
                let outcome = if plain { first.outcome } else { Outcome::Pass(PassReason::Unsupported) };
                claim(PathMatch::Regex((*pattern).to_owned()), &[], Found { outcome, ..first });
            }
            // A host whose paths all pass anyway is still not a wildcard's.
            if self.claims.len() == before {
                self.claims.add(of_gateway, host, whole.clone(), &[], Outcome::Pass(PassReason::NoCors));
            }
            let pages = exact.iter().map(|(path, own)| (*path, Some(own)));
            let pages: Vec<_> = pages.chain(prefixes.keys().map(|path| (path.as_str(), None))).collect();
            for (path, own) in pages {
                self.lint_options(routes, &ancestors(path, own, &prefixes));
            }
        }
    }

    /// A rule with CORS rules that no OPTIONS request ever meets.
    fn lint_options(&mut self, routes: &[&Arc<Object<HttpRoute>>], list: &[&Candidate]) {
        if list.iter().any(|c| c.method.as_deref().is_none_or(|method| method == "OPTIONS")) {
            return;
        }
        for candidate in list.iter().filter(|c| matches!(c.outcome, Outcome::Answer(_))) {
            let route = routes[candidate.route];
            let method = candidate.method.as_deref().unwrap_or("");
            self.note(
                &name_of::<HttpRoute>(&route.meta),
                &route.meta,
                format!("spec.rules[{}].matches", candidate.rule),
                (Severity::Warning, "route-without-options"),
                format!("only {method} is routed there: at the proxy its preflights are a 404, and here they are answered"),
                "Add a match for the method OPTIONS, for when preflightd is not there.",
            );
        }
    }

    /// What becomes of preflights that a rule has, and a number that tells backends apart.
    fn judge(
        &mut self,
        port: &Port,
        hung: &Hung,
        route: &Object<HttpRoute>,
        number: usize,
        rule: &RouteRule,
        attached: &Attached<'_>,
    ) -> (Outcome, u64) {
        use std::hash::{BuildHasher as _, Hasher as _};
        let mut hasher = ahash::RandomState::with_seeds(1, 2, 3, 4).build_hasher();
        for backend in &rule.backend_refs {
            hasher.write(format!("{:?}", (backend, &route.meta.namespace)).as_bytes());
        }
        let backends = hasher.finish();
        let outcome = self.outcome(port, hung, route, number, rule, attached).unwrap_or_else(Outcome::Pass);
        (outcome, backends)
    }

    /// The same; `Err`: it passes.
    fn outcome(
        &mut self,
        port: &Port,
        hung: &Hung,
        route: &Object<HttpRoute>,
        number: usize,
        rule: &RouteRule,
        attached: &Attached<'_>,
    ) -> Result<Outcome, PassReason> {
        let object = name_of::<HttpRoute>(&route.meta);
        let field = format!("spec.rules[{number}]");
        if !self.is_selected(&route.meta) {
            return Err(PassReason::Disabled);
        }
        let mut conditions = route.status.parents.iter().flat_map(|parent| &parent.conditions);
        if conditions.any(|condition| {
            let old =
                condition.observed_generation > 0 && condition.observed_generation < route.meta.generation;
            match (&*condition.kind, &*condition.status) {
                ("ResolvedRefs", "False") | ("PartiallyInvalid", "True") => true,
                // The proxy still does what was said before.
                (kind, _) => kind == "Accepted" && old,
            }
        }) {
            return Err(PassReason::Unsupported);
        }
        if port.kgateway && self.is_reordered(&port.gateway.key, route) {
            return Err(PassReason::Unsupported);
        }
        let (own, extensions) = self.filters(&object, route, &rule.filters, &format!("{field}.filters"))?;
        let policies =
            attached.of_rule(port.kgateway, &port.gateway.key, &hung.section, route, rule, &extensions);
        if let Some(missing) = policies.missing {
            self.note(
                &object,
                &route.meta,
                format!("{field}.filters"),
                (Severity::Warning, "extension-missing"),
                format!("refers to {missing}, which is not there; its preflights go to the proxy"),
                "Create it in the route's namespace, or remove the filter.",
            );
            return Err(PassReason::Unsupported);
        }
        if let Some((policy, what)) = policies.unmodelled {
            self.note(
                &policy,
                &attached.meta(&policy),
                format!("spec.{what}"),
                (Severity::Warning, "policy-unmodelled"),
                format!("`{what}` may change what the proxy answers to a preflight, so those of its routes go to the proxy"),
                "Nothing; or leave it out of routes whose preflights should be answered here.",
            );
            return Err(PassReason::Unsupported);
        }
        // Backends may have rules of their own, and those go before their route's.
        if rule.backend_refs.is_empty() {
            return Err(PassReason::NoCors);
        }
        let mut outcome: Option<Result<Outcome, PassReason>> = None;
        for (i, backend) in rule.backend_refs.iter().enumerate() {
            if backend.weight == Some(0) {
                continue;
            }
            let at = format!("{field}.backendRefs[{i}]");
            let group = backend.group.as_deref().unwrap_or("");
            let kind = backend.kind.as_deref().unwrap_or("Service");
            // Others may be routes in turn, with rules of their own.
            if !BACKENDS.contains(&(group, kind)) {
                return Err(PassReason::Unsupported);
            }
            if !self.is_granted(route, backend) {
                self.note(
                    &object,
                    &route.meta,
                    at.clone(),
                    (Severity::Warning, "reference-not-granted"),
                    "the backend is in another namespace, and no ReferenceGrant there allows it: the proxy answers 500",
                    "Add a ReferenceGrant to the backend's namespace.",
                );
                return Err(PassReason::Unsupported);
            }
            let (of_backend, extensions) =
                self.filters(&object, route, &backend.filters, &format!("{at}.filters"))?;
            if !extensions.is_empty() {
                return Err(PassReason::Unsupported);
            }
            let found =
                self.effective(port, &object, route, of_backend.or_else(|| own.clone()), &policies.cors);
            match outcome {
                None => outcome = Some(found),
                Some(first) if first == found => {}
                Some(_) => {
                    self.note(
                        &object,
                        &route.meta,
                        format!("{field}.backendRefs"),
                        (Severity::Warning, "backends-differ"),
                        "backends have different CORS rules, and which one a preflight meets is the proxy's choice; \
                         its preflights go to the proxy",
                        "Put the filter on the rule.",
                    );
                    return Err(PassReason::Unsupported);
                }
            }
        }
        // All weights are 0: the proxy answers 503.
        outcome.unwrap_or(Err(PassReason::NoCors))
    }

    /// By which rules a rule answers: its own filter's, else those of kgateway's policies.
    fn effective(
        &mut self,
        port: &Port,
        object: &ObjectName,
        route: &Object<HttpRoute>,
        own: Option<(gateway_api::Cors, String)>,
        policies: &kgateway::Levels,
    ) -> Result<Outcome, PassReason> {
        let with_default = |mut cors: gateway_api::Cors| {
            cors.max_age.get_or_insert(DEFAULT_MAX_AGE);
            cors
        };
        let (route_level, gateway_level) = match own {
            Some((cors, _)) => (Level::Cors(with_default(cors)), policies.gateway.clone()),
            None => (policies.route.clone(), policies.gateway.clone()),
        };
        let (cors, fallback) = match (route_level, gateway_level) {
            (Level::Disabled, _) | (Level::None, Level::Disabled) => return Err(PassReason::Disabled),
            (Level::Unreadable, _) | (_, Level::Unreadable) => return Err(PassReason::Unsupported),
            (Level::None, Level::None) => return Err(PassReason::NoCors),
            (Level::Cors(cors), Level::Cors(fallback)) => (cors, Some(fallback)),
            (Level::Cors(cors), _) | (Level::None, Level::Cors(cors)) => (cors, None),
        };
        let cors = match port.dialect {
            GatewayDialect::Envoy => {
                let fallback = fallback.map(with_default);
                let Some(cors) = kgateway::envoy(&with_default(cors), fallback.as_ref()) else {
                    self.note(
                        object,
                        &route.meta,
                        "",
                        (Severity::Warning, "credentials-unclear"),
                        "`allowCredentials: false` here and `true` on the Gateway: releases of the proxy differ in which one \
                         holds; its preflights go to the proxy",
                        "Say the same in both places.",
                    );
                    return Err(PassReason::Unsupported);
                };
                Cors::Envoy(cors)
            }
            GatewayDialect::GatewayApi => Cors::GatewayApi { cors, pass: false },
            GatewayDialect::Unknown | GatewayDialect::Ignore => Cors::GatewayApi { cors, pass: true },
        };
        Ok(Outcome::Answer(self.resolver.rules(cors)))
    }

    /// The CORS filter among filters, with its place, and extensions. `Err`: one of them may change the answer.
    #[expect(clippy::type_complexity, reason = "two lists of one walk")]
    fn filters<'f>(
        &mut self,
        object: &ObjectName,
        route: &Object<HttpRoute>,
        filters: &'f [Filter],
        field: &str,
    ) -> Result<(Option<(gateway_api::Cors, String)>, Vec<&'f super::super::objects::ExtensionRef>), PassReason>
    {
        let mut cors = None;
        let mut extensions = Vec::new();
        for (i, filter) in filters.iter().enumerate() {
            let at = format!("{field}[{i}]");
            match &*filter.kind {
                "CORS" => {
                    let fields = match filter.cors.as_ref().map(|cors| &cors.0) {
                        Some(Ok(fields)) => fields.clone(),
                        Some(Err(error)) => {
                            self.note(
                                object,
                                &route.meta,
                                format!("{at}.cors"),
                                (Severity::Error, "cors-unreadable"),
                                format!("cannot be read: {error}; its preflights go to the proxy"),
                                "Write it as the Gateway API's HTTPCORSFilter.",
                            );
                            return Err(PassReason::Unsupported);
                        }
                        None => return Err(PassReason::Unsupported),
                    };
                    if cors.is_some() {
                        self.note(
                            object,
                            &route.meta,
                            at,
                            (Severity::Error, "cors-repeated"),
                            "a second CORS filter, and at most one may stand here; its preflights go to the proxy",
                            "Put both into one filter.",
                        );
                        return Err(PassReason::Unsupported);
                    }
                    cors = Some((fields, format!("{at}.cors")));
                }
                "ExtensionRef" => match &filter.extension_ref {
                    Some(extension) if kgateway::is_policy(extension) => extensions.push(extension),
                    _ => return Err(PassReason::Unsupported),
                },
                "RequestHeaderModifier" | "RequestMirror" | "URLRewrite" => {}
                // Redirects, what changes answers, and what is not known.
                _ => return Err(PassReason::Unsupported),
            }
        }
        Ok((cors, extensions))
    }

    /// Whether a backend may be referred to.
    fn is_granted(&self, route: &Object<HttpRoute>, backend: &BackendRef) -> bool {
        let Some(namespace) = backend.namespace.as_ref().filter(|n| **n != route.meta.namespace) else {
            return true;
        };
        let group = backend.group.as_deref().unwrap_or("");
        let kind = backend.kind.as_deref().unwrap_or("Service");
        self.world.reference_grants.values().filter(|grant| grant.meta.namespace == *namespace).any(|grant| {
            let from = &grant.spec.from;
            let to = &grant.spec.to;
            from.iter()
                .any(|f| f.group == GROUP && f.kind == "HTTPRoute" && f.namespace == route.meta.namespace)
                && to.iter().any(|t| {
                    t.group == group
                        && t.kind == kind
                        && t.name.as_ref().is_none_or(|name| *name == backend.name)
                })
        })
    }

    /// What is doubtful in a route's own filters, wherever it hangs.
    fn lint_route(&mut self, route: &Object<HttpRoute>) {
        let object = name_of::<HttpRoute>(&route.meta);
        let mut places = Vec::new();
        for (i, rule) in route.spec.rules.iter().enumerate() {
            let filters = rule.filters.iter().enumerate();
            places.extend(filters.map(|(j, filter)| (format!("spec.rules[{i}].filters[{j}].cors"), filter)));
            for (j, backend) in rule.backend_refs.iter().enumerate() {
                let at = |k| format!("spec.rules[{i}].backendRefs[{j}].filters[{k}].cors");
                places.extend(backend.filters.iter().enumerate().map(|(k, filter)| (at(k), filter)));
            }
        }
        for (field, filter) in places {
            if let Some(Ok(cors)) = filter.cors.as_ref().map(|cors| &cors.0) {
                let found = gateway_api::validate(cors).1;
                self.note_all(&object, &route.meta, &field, found);
            }
        }
    }
}

impl Candidate {
    fn found(&self) -> Found {
        Found { outcome: self.outcome, route: self.route, rule: self.rule, backend: self.backend }
    }
}

/// All candidates for requests whose most specific path is this one, in order of precedence.
fn ancestors<'c>(
    path: &str,
    own: Option<&'c Vec<Candidate>>,
    prefixes: &'c BTreeMap<String, Vec<Candidate>>,
) -> Vec<&'c Candidate> {
    let mut list: Vec<&Candidate> = own.into_iter().flatten().collect();
    // An exact path with a slash at its end is below the prefix without it.
    let mut rest = if own.is_some() { path.strip_suffix('/').unwrap_or(path) } else { path };
    loop {
        list.extend(prefixes.get(rest).into_iter().flatten());
        match rest.rfind('/') {
            Some(at) => rest = &rest[..at],
            None => return list,
        }
    }
}

/// Where requests with one path go, by method.
struct Ways {
    by_method: BTreeMap<String, Option<Found>>,
    others: Option<Found>,
}

fn ways(list: &[&Candidate]) -> Ways {
    let mut methods: BTreeSet<&str> = list.iter().filter_map(|c| c.method.as_deref()).collect();
    // A rule for OPTIONS of its own: what the proxy does with the preflight is that rule's.
    let options = methods.remove("OPTIONS").then(|| walk(list, "OPTIONS"));
    let through_options = |found: Option<Found>| match (options, found) {
        (None, found) => found,
        (Some(Some(options)), Some(found))
            if options.outcome == found.outcome && options.backend == found.backend =>
        {
            Some(found)
        }
        (Some(options), found) => {
            found.or(options).map(|found| Found { outcome: Outcome::Pass(PassReason::Unsupported), ..found })
        }
    };
    let others = through_options(walk(list, ""));
    let by_method =
        methods.into_iter().map(|method| (method.to_owned(), through_options(walk(list, method)))).collect();
    Ways { by_method, others }
}

/// Which candidate has a preflight that asks for this method.
fn walk(list: &[&Candidate], method: &str) -> Option<Found> {
    let mut first: Option<Found> = None;
    let mut same = true;
    for candidate in list.iter().filter(|c| c.method.as_deref().is_none_or(|m| m == method)) {
        let found = candidate.found();
        same &= first.is_none_or(|first| first.outcome == found.outcome);
        let first = first.get_or_insert(found);
        if !candidate.conditional {
            let outcome = if same { first.outcome } else { Outcome::Pass(PassReason::Unsupported) };
            return Some(Found { outcome, ..*first });
        }
    }
    // Headers or the query decide whether any rule has it at all.
    first.map(|first| Found { outcome: Outcome::Pass(PassReason::Unsupported), ..first })
}

impl Ways {
    fn claim(&self, path: &PathMatch, claim: &mut impl FnMut(PathMatch, &[String], Found)) {
        let same = |found: &Option<Found>| found.map(|f| f.outcome) == self.others.map(|f| f.outcome);
        if let Some(others) = self.others {
            claim(path.clone(), &[], others);
        }
        for (method, found) in self.by_method.iter().filter(|(_, found)| !same(found)) {
            if let Some(found) = found {
                claim(path.clone(), std::slice::from_ref(method), *found);
            }
        }
    }
}

fn is_gateway(parent: &ParentRef) -> bool {
    parent.group.as_deref().unwrap_or(GROUP) == GROUP
        && parent.kind.as_deref().unwrap_or("Gateway") == "Gateway"
}

fn gateway_of(parent: &ParentRef, namespace: &str) -> Key {
    Key::new(parent.namespace.as_deref().unwrap_or(namespace), &parent.name)
}

/// The hosts that both have (`HTTPRouteSpec.hostnames`); `None`: there is none.
fn intersection(a: &HostPattern, b: &HostPattern) -> Option<HostPattern> {
    use HostPattern::{Any, Exact, Wildcard};
    match (a, b) {
        (Any, other) | (other, Any) => Some(other.clone()),
        (Exact(x), Exact(y)) => (x == y).then(|| a.clone()),
        (Exact(name), Wildcard(suffix)) | (Wildcard(suffix), Exact(name)) => {
            (name.len() > suffix.len() && name.ends_with(&**suffix)).then(|| Exact(name.clone()))
        }
        (Wildcard(x), Wildcard(y)) => {
            if x.ends_with(&**y) {
                Some(a.clone())
            } else {
                y.ends_with(&**x).then(|| b.clone())
            }
        }
    }
}
