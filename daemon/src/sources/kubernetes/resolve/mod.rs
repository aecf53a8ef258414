//! From objects to policies: which object answers on which listener, host and path, and in whose dialect.
//!
//! Pure. Every route and Ingress that the proxies have is in the result, also those without CORS rules: what they serve
//! passes, so that no other policy answers for it. What cannot be modelled exactly passes too, and a finding says why.

mod claims;
mod ingress;
mod kgateway;
mod routes;

use super::objects::{Ingress, Key, Kind, LabelSelector, Meta, World};
use crate::{
    policy::{
        Finding, HostPattern, ListenerId, OnDenied, PathMatch, PolicySpec, Severity,
        dialect::{Rules, envoy, gateway_api, ingress_nginx},
        is_host_pattern,
    },
    reason::PassReason,
};
use ahash::AHashMap;
use claims::Claims;
use std::{collections::BTreeMap, fmt, sync::Arc};

/// What speaks for whom.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Names of GatewayClasses; empty: all whose controller is known, or has a dialect.
    pub gateway_classes: Vec<String>,
    /// Names of IngressClasses; empty: all of ingress-nginx.
    pub ingress_classes: Vec<String>,
    /// Only HTTPRoutes and Ingresses of these namespaces are answered for; empty: of all.
    pub namespaces: Vec<String>,
    /// The same by their labels.
    pub labels: LabelSelector,
    /// The dialect of a GatewayClass, by its name or its controller's.
    pub dialects: BTreeMap<String, GatewayDialect>,
    /// Of manifests: Gateways, classes and statuses that are not there are taken to be as their users need them.
    pub assume: Option<GatewayDialect>,
    /// Our listeners; none: there is only one, for everything.
    pub listeners: Vec<Scope>,
}

/// Whose objects a listener of ours has before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scope {
    /// The listener.
    pub listener: ListenerId,
    /// `namespace/name` of Gateways, or with `/listener` behind.
    pub gateways: Vec<String>,
    /// Names of IngressClasses. With both empty: everything.
    pub ingress_classes: Vec<String>,
}

/// How a Gateway's proxy answers; see `semantics`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum GatewayDialect {
    /// As Envoy's filter, configured by kgateway.
    Envoy,
    /// As the Gateway API says.
    GatewayApi,
    /// Not known: allowed origins are answered as the Gateway API says, all else passes.
    #[default]
    Unknown,
    /// Its Gateways do not concern us.
    Ignore,
}

/// Controllers that program Envoy's CORS filter, beside kgateway.
const ENVOYS: &[&str] = &["gateway.envoyproxy.io/gatewayclass-controller", "istio.io/gateway-controller"];

/// Whether kgateway's policies hold on a controller's Gateways. (`kgateway.dev/agentgateway` is another proxy.)
fn is_kgateway(controller: &str) -> bool {
    matches!(controller, "kgateway" | "kgateway.dev/kgateway" | "solo.io/gloo-gateway")
}

/// The dialect of a controller that is known.
pub fn dialect_of_controller(controller: &str) -> GatewayDialect {
    if ENVOYS.contains(&controller) || is_kgateway(controller) {
        GatewayDialect::Envoy
    } else {
        GatewayDialect::Unknown
    }
}

/// CORS rules as they were declared, in the dialect that answers.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Cors {
    /// `unmatched` origins pass if the controller is not known.
    GatewayApi {
        /// The filter.
        cors: gateway_api::Cors,
        /// What is not allowed passes.
        pass: bool,
    },
    /// With what its Gateway's policy fills.
    Envoy(envoy::Cors),
    /// The annotations, without the prefix.
    IngressNginx(ingress_nginx::Annotations),
}

/// What becomes of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Outcome {
    Pass(PassReason),
    /// By the rules of this number.
    Answer(usize),
}

/// An object that a policy, or a finding, is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName {
    /// Its kind.
    pub kind: &'static str,
    /// Namespace and name.
    pub key: Key,
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.key)
    }
}

/// A finding about an object.
#[derive(Clone, Debug, PartialEq)]
pub struct Noted {
    /// Which.
    pub object: ObjectName,
    /// For events: its unique number.
    pub uid: Arc<str>,
    /// The field, such as `spec.rules[0].filters[1].cors.allowOrigins[2]`; empty: the object as a whole.
    pub field: String,
    /// Whether it is refused (then its preflights pass) or doubtful.
    pub severity: Severity,
    /// As in [`Finding`].
    pub code: &'static str,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    pub help: String,
}

/// A policy of the result, and what it was made of.
#[derive(Clone, Debug)]
pub struct Imported {
    /// For the table.
    pub spec: PolicySpec,
    /// The rules; `None`: it passes.
    pub cors: Option<Arc<Cors>>,
    /// The object that it is of.
    pub object: ObjectName,
}

/// What objects come down to.
#[derive(Debug, Default)]
pub struct Import {
    /// Sorted by name.
    pub policies: Vec<Imported>,
    /// In order of objects.
    pub findings: Vec<Noted>,
}

/// Whether an object has opted out, by its own annotation or its namespace's.
fn opted_out(world: &World, meta: &Meta) -> bool {
    let off = |meta: &Meta| meta.annotations.get(OPT_OUT).is_some_and(|value| value == "false");
    off(meta)
        || world.namespaces.get(&Key::new("", &meta.namespace)).is_some_and(|namespace| off(&namespace.meta))
}

/// `"false"`: preflights of the object, or of all objects of the namespace, pass.
pub const OPT_OUT: &str = "preflightd.io/answer";

/// Validated rules, with what was found about them.
struct Known {
    cors: Arc<Cors>,
    rules: Option<Rules>,
    on_denied: Option<OnDenied>,
}

/// Resolves, and remembers the rules that it has validated: one changed object is soon resolved.
#[derive(Default)]
pub struct Resolver {
    known: Vec<Known>,
    numbers: AHashMap<Arc<Cors>, usize>,
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resolver").field("known", &self.known.len()).finish_non_exhaustive()
    }
}

/// One resolution.
struct Run<'a> {
    world: &'a World,
    settings: &'a Settings,
    resolver: &'a mut Resolver,
    claims: Claims,
    findings: Vec<Noted>,
    /// An object of the Gateways' kinds, or of the Ingresses', cannot be read: nothing of these is answered then, for nobody
    /// knows which hosts and paths it has.
    unreadable: (bool, bool),
}

impl Resolver {
    /// What the objects come down to.
    pub fn resolve(&mut self, world: &World, settings: &Settings) -> Import {
        // Rules that objects have no more are forgotten now and then.
        if self.known.len() > 2 * (world.http_routes.len() + world.ingresses.len()) + 1024 {
            *self = Self::default();
        }
        let mut run = Run {
            world,
            settings,
            resolver: self,
            claims: Claims::default(),
            findings: Vec::new(),
            unreadable: (false, false),
        };
        run.unreadable();
        run.routes();
        run.lint_policies();
        run.ingresses();
        run.shared_hosts();
        let Run { claims, findings, unreadable, .. } = run;
        let mut policies = claims.policies(self);
        for policy in &mut policies {
            let hidden = if policy.object.kind == Ingress::KIND { unreadable.1 } else { unreadable.0 };
            if hidden && policy.spec.passes.is_none() {
                policy.spec.passes = Some(PassReason::Unsupported);
                policy.cors = None;
            }
        }
        Import { policies, findings }
    }

    /// The number of these rules; they are validated once.
    fn rules(&mut self, cors: Cors) -> usize {
        if let Some(number) = self.numbers.get(&cors) {
            return *number;
        }
        let (rules, on_denied) = match &cors {
            Cors::GatewayApi { cors, pass } => {
                (gateway_api::validate(cors).0.map(Rules::GatewayApi), pass.then_some(OnDenied::Pass))
            }
            Cors::Envoy(cors) => (envoy::validate(cors, None).0.map(Rules::Envoy), None),
            Cors::IngressNginx(annotations) => {
                (ingress_nginx::validate(annotations).0.map(Rules::IngressNginx), None)
            }
        };
        let cors = Arc::new(cors);
        let number = self.known.len();
        self.known.push(Known { cors: Arc::clone(&cors), rules, on_denied });
        self.numbers.insert(cors, number);
        number
    }
}

impl Run<'_> {
    /// Notes a finding about an object.
    fn note(
        &mut self,
        object: &ObjectName,
        meta: &Meta,
        field: impl Into<String>,
        (severity, code): (Severity, &'static str),
        message: impl Into<String>,
        help: impl Into<String>,
    ) {
        let (field, message) = (field.into(), message.into());
        // A route may hang on many listeners.
        if self
            .findings
            .iter()
            .rev()
            .take(32)
            .any(|f| f.object == *object && f.field == field && f.code == code)
        {
            return;
        }
        self.findings.push(Noted {
            object: object.clone(),
            uid: meta.uid.as_str().into(),
            field,
            severity,
            code,
            message,
            help: help.into(),
        });
    }

    /// Notes what a dialect found about the rules at `field`.
    fn note_all(&mut self, object: &ObjectName, meta: &Meta, field: &str, found: Vec<Finding>) {
        for finding in found {
            let item = finding.item.map(|item| format!("[{item}]")).unwrap_or_default();
            let dot = if finding.field.is_empty() { "" } else { "." };
            self.note(
                object,
                meta,
                format!("{field}{dot}{}{item}", finding.field),
                (finding.severity, finding.code),
                finding.message,
                finding.help,
            );
        }
    }

    /// What could not be read: nothing else is known of it.
    fn unreadable(&mut self) {
        for ((kind, key), error) in &self.world.unreadable {
            let object = ObjectName { kind, key: key.clone() };
            let of_ingresses = matches!(*kind, "Ingress" | "IngressClass");
            self.unreadable.0 |= !of_ingresses;
            self.unreadable.1 |= of_ingresses || *kind == "Namespace";
            let meta =
                Meta { name: key.name.to_string(), namespace: key.namespace.to_string(), ..Meta::default() };
            self.note(
                &object,
                &meta,
                "",
                (Severity::Error, "object-unreadable"),
                format!(
                    "cannot be read, so which hosts and paths it has is not known: nothing is answered beside it: {error}"
                ),
                "Write it as its schema says, or delete it.",
            );
        }
    }

    /// Notes hosts that several proxies have on one listener of ours.
    fn shared_hosts(&mut self) {
        for (object, host, names) in self.claims.find_shared() {
            self.note(
                &object,
                &Meta::default(),
                "",
                (Severity::Warning, "host-shared"),
                format!(
                    "{} both have hosts like {host} on one listener, and which of them gets a request is not known here: its \
                     preflights go to the proxy",
                    names.join(" and ")
                ),
                "Say in the listeners' `gateways` and `ingress_classes` which is before which.",
            );
        }
    }

    /// Whether an object is to be answered for. What is not has its hosts and paths all the same.
    fn is_selected(&self, meta: &Meta) -> bool {
        let Settings { namespaces, labels, .. } = self.settings;
        (namespaces.is_empty() || namespaces.contains(&meta.namespace))
            && labels.matches(&meta.labels).unwrap_or(false)
            && !opted_out(self.world, meta)
    }

    /// Our listeners that have this before them; empty: all of them. `None`: none has.
    fn listeners(&self, has: impl Fn(&Scope) -> bool) -> Option<Vec<ListenerId>> {
        let scopes = &self.settings.listeners;
        let serves =
            |scope: &&Scope| scope.gateways.is_empty() && scope.ingress_classes.is_empty() || has(scope);
        let ids: Vec<ListenerId> = scopes.iter().filter(serves).map(|scope| scope.listener).collect();
        match ids.len() {
            0 if !scopes.is_empty() => None,
            n if n == scopes.len() => Some(Vec::new()),
            _ => Some(ids),
        }
    }
}

/// The name of an object of a kind.
fn name_of<K: Kind>(meta: &Meta) -> ObjectName {
    ObjectName { kind: K::KIND, key: Key::new(&meta.namespace, &meta.name) }
}

/// A host as an object has it; `None`: it can never match.
fn host_pattern(text: &str) -> Option<HostPattern> {
    let host = text.trim().to_ascii_lowercase();
    if host.is_empty() || host == "*" {
        return Some(HostPattern::Any);
    }
    let (name, wildcard) = host.strip_prefix("*.").map_or((&*host, false), |name| (name, true));
    let label = |l: &str| {
        !l.is_empty()
            && l.len() <= 63
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
    };
    if name.len() > 253 || !name.split('.').all(label) {
        return None;
    }
    if !is_host_pattern(name) {
        return None;
    }
    Some(if wildcard { HostPattern::Wildcard(format!(".{name}")) } else { HostPattern::Exact(host) })
}

/// Whether requests with such a path always pass anyway, so that nothing need stand for it.
fn always_passes(path: &str) -> bool {
    path.contains("//")
        || path.split('/').any(|segment| matches!(segment, "." | ".."))
        || path.bytes().any(|b| matches!(b, b'%' | b'\\' | b';' | b'?' | b'#') || !b.is_ascii_graphic())
}

/// `/foo/` and `/foo` are the same prefix, and `/` is the empty one.
fn element_prefix(path: &str) -> PathMatch {
    match path.strip_suffix('/').unwrap_or(path) {
        "" => PathMatch::Prefix("/".to_owned()),
        path => PathMatch::Prefix(path.to_owned()),
    }
}

#[cfg(test)]
mod tests;
