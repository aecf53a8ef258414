//! kgateway's policies: which one holds where, and what Envoy makes of their CORS fields.
//!
//! Source: kgateway, `api/v1alpha1/kgateway/traffic_policy_types.go` (fields), `internal/kgateway/utils` (`ToEnvoyCorsPolicy`).

use super::{ObjectName, Run, name_of, opted_out};
use crate::{
    policy::{
        Severity,
        dialect::{
            envoy::{self, StringMatcher},
            gateway_api,
        },
    },
    sources::kubernetes::objects::{
        Condition, ExtensionRef, GlooTrafficPolicy, HttpRoute, Key, Kind, Meta, Object, PolicyCors,
        PolicyTarget, RouteRule, TrafficPolicy, TrafficPolicySpec, World,
    },
};
use std::collections::BTreeMap;

/// Fields that change nothing of what Envoy's CORS filter answers: they act behind it, or on the way to the backend.
const MODELLED: &[&str] = &[
    "ai",
    "apiKeyAuth",
    "apiKeyAuthentication",
    "autoHostRewrite",
    "basicAuth",
    "buffer",
    "compression",
    "csrf",
    "extAuth",
    "hashPolicies",
    "internalRedirect",
    "jwt",
    "jwtAuth",
    "rateLimit",
    "rbac",
    "retry",
    "statPrefix",
    "timeouts",
    "tracing",
    "urlRewrite",
];

/// Whether an extension is one of these policies.
pub(super) fn is_policy(extension: &ExtensionRef) -> bool {
    let (group, kind) = (&*extension.group, &*extension.kind);
    (group, kind) == (TrafficPolicy::GROUP, TrafficPolicy::KIND)
        || (group, kind) == (GlooTrafficPolicy::GROUP, GlooTrafficPolicy::KIND)
}

/// The CORS fields of a level.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) enum Level {
    /// No policy has any.
    #[default]
    None,
    /// `disable: {}`.
    Disabled,
    /// What they mean is not known.
    Unreadable,
    Cors(gateway_api::Cors),
}

/// A rule's policies, as far as they concern preflights.
#[derive(Clone, Debug, Default)]
pub(super) struct Levels {
    /// Of the route.
    pub(super) route: Level,
    /// Of the Gateway or its listener.
    pub(super) gateway: Level,
}

/// What holds for a rule.
#[derive(Debug, Default)]
pub(super) struct Policies {
    pub(super) cors: Levels,
    /// A policy that the rule refers to.
    pub(super) missing: Option<String>,
    /// A policy with a field that is not modelled, and the field.
    pub(super) unmodelled: Option<(ObjectName, String)>,
}

/// One policy of either group.
#[derive(Debug)]
struct Policy<'w> {
    object: ObjectName,
    meta: &'w Meta,
    spec: &'w TrafficPolicySpec,
    off: bool,
    refused: bool,
}

/// All policies, by what they are attached to.
#[derive(Debug)]
pub(super) struct Attached<'w> {
    /// Oldest first.
    policies: Vec<Policy<'w>>,
    routes: BTreeMap<Key, Vec<(usize, Option<&'w str>)>>,
    gateways: BTreeMap<Key, Vec<(usize, Option<&'w str>)>>,
    by_name: BTreeMap<(&'static str, Key), usize>,
}

impl<'w> Attached<'w> {
    pub(super) fn of(world: &'w World) -> Self {
        let mut policies: Vec<Policy<'w>> = Vec::new();
        collect(world, &world.traffic_policies, &mut policies);
        collect(world, &world.gloo_traffic_policies, &mut policies);
        policies.sort_by(|a, b| {
            a.meta.creation_timestamp.cmp(&b.meta.creation_timestamp).then_with(|| a.object.cmp(&b.object))
        });
        let mut made = Self {
            by_name: policies
                .iter()
                .enumerate()
                .map(|(i, p)| ((p.object.kind, p.object.key.clone()), i))
                .collect(),
            policies: Vec::new(),
            routes: BTreeMap::new(),
            gateways: BTreeMap::new(),
        };
        for (number, policy) in policies.iter().enumerate() {
            let namespace = &policy.object.key.namespace;
            for target in &policy.spec.target_refs {
                if let Some(targets) = made.targets(target) {
                    let key = Key::new(namespace, &target.name);
                    targets.entry(key).or_default().push((number, target.section_name.as_deref()));
                }
            }
            for target in &policy.spec.target_selectors {
                let has = |meta: &Meta| {
                    (target.name.is_empty() || target.name == meta.name)
                        && target.match_labels.iter().all(|(k, v)| meta.labels.get(k) == Some(v))
                };
                let routes = world.http_routes.iter().filter(|(_, o)| has(&o.meta)).map(|(key, _)| key);
                let gateways = world.gateways.iter().filter(|(_, o)| has(&o.meta)).map(|(key, _)| key);
                let keys: Vec<&Key> =
                    if target.kind == "HTTPRoute" { routes.collect() } else { gateways.collect() };
                if let Some(targets) = made.targets(target) {
                    for key in keys {
                        targets
                            .entry(key.clone())
                            .or_default()
                            .push((number, target.section_name.as_deref()));
                    }
                }
            }
        }
        made.policies = policies;
        made
    }

    #[expect(clippy::type_complexity, reason = "one of two fields")]
    fn targets(
        &mut self,
        target: &PolicyTarget,
    ) -> Option<&mut BTreeMap<Key, Vec<(usize, Option<&'w str>)>>> {
        match &*target.kind {
            "HTTPRoute" => Some(&mut self.routes),
            "Gateway" => Some(&mut self.gateways),
            _ => None,
        }
    }

    /// Whether policies hold for a route, so that its Gateway must be one of kgateway's.
    pub(super) fn is_of_kgateway(&self, route: &Object<HttpRoute>) -> bool {
        let filters = route.spec.rules.iter().flat_map(|rule| &rule.filters);
        self.routes.contains_key(&route.key())
            || filters.filter_map(|filter| filter.extension_ref.as_ref()).any(is_policy)
    }

    /// `metadata` of a policy.
    pub(super) fn meta(&self, object: &ObjectName) -> Meta {
        let number = self.by_name.get(&(object.kind, object.key.clone()));
        number.map(|number| self.policies[*number].meta.clone()).unwrap_or_default()
    }

    /// What holds for a rule of a route on a Gateway's listener, highest first: extensions, the rule, the route; the
    /// listener, the Gateway. At one level the oldest has its way.
    pub(super) fn of_rule(
        &self,
        kgateway: bool,
        gateway: &Key,
        section: &str,
        route: &Object<HttpRoute>,
        rule: &RouteRule,
        extensions: &[&ExtensionRef],
    ) -> Policies {
        let mut made = Policies::default();
        if !kgateway {
            // Another proxy's, and what that makes of the extension is not known.
            made.missing =
                extensions.first().map(|e| format!("{} {}, which only kgateway knows", e.kind, e.name));
            return made;
        }
        let mut of_route: Vec<usize> = Vec::new();
        for extension in extensions {
            let kind = if extension.kind == TrafficPolicy::KIND {
                TrafficPolicy::KIND
            } else {
                GlooTrafficPolicy::KIND
            };
            let key = Key::new(&route.meta.namespace, &extension.name);
            let Some(number) = self.by_name.get(&(kind, key)) else {
                made.missing = Some(format!("{kind} {}", extension.name));
                return made;
            };
            of_route.push(*number);
        }
        let targets = self.routes.get(&route.key()).map_or(&[][..], Vec::as_slice);
        let named = targets.iter().filter(|(_, s)| s.is_some() && *s == rule.name.as_deref());
        of_route.extend(named.chain(targets.iter().filter(|(_, s)| s.is_none())).map(|(number, _)| *number));
        let targets = self.gateways.get(gateway).map_or(&[][..], Vec::as_slice);
        let named = targets.iter().filter(|(_, s)| *s == Some(section));
        let of_gateway: Vec<usize> =
            named.chain(targets.iter().filter(|(_, s)| s.is_none())).map(|(number, _)| *number).collect();
        for number in of_route.iter().chain(&of_gateway) {
            let policy = &self.policies[*number];
            // Which policies reach into other namespaces is a setting of kgateway's own.
            let global = *policy.object.key.namespace != *route.meta.namespace
                && policy.object.key.namespace != gateway.namespace;
            let reorders = policy.meta.annotations.contains_key("kgateway.dev/policy-weight");
            if global || reorders {
                let what = if global { "targetSelectors" } else { "metadata" };
                made.unmodelled = Some((policy.object.clone(), what.to_owned()));
                return made;
            }
            let field = policy.spec.others.iter().find(|field| !MODELLED.contains(&field.as_str()));
            if let Some(field) = field.cloned().or_else(|| policy.refused.then(|| "status".to_owned())) {
                made.unmodelled = Some((policy.object.clone(), field));
                return made;
            }
        }
        made.cors = Levels { route: self.level(&of_route), gateway: self.level(&of_gateway) };
        made
    }

    /// The first that says something.
    fn level(&self, policies: &[usize]) -> Level {
        let mut policies = policies.iter().map(|number| &self.policies[*number]);
        policies
            .find_map(|policy| {
                Some(match policy.spec.cors.as_ref()? {
                    _ if policy.off => Level::Disabled,
                    PolicyCors::Disabled => Level::Disabled,
                    PolicyCors::Fields(fields) => fields.0.clone().map_or(Level::Unreadable, Level::Cors),
                })
            })
            .unwrap_or_default()
    }
}

fn collect<'w, K>(world: &World, store: &'w super::super::objects::Store<K>, policies: &mut Vec<Policy<'w>>)
where
    K: Kind<Spec = TrafficPolicySpec, Status = super::super::objects::PolicyStatus>,
{
    policies.extend(store.values().map(|object| Policy {
        object: name_of::<K>(&object.meta),
        meta: &object.meta,
        spec: &object.spec,
        off: opted_out(world, &object.meta),
        refused: object.status.ancestors.iter().any(|a| a.conditions.iter().any(is_refused)),
    }));
}

fn is_refused(condition: &Condition) -> bool {
    condition.kind == "Accepted" && condition.status == "False"
}

impl Run<'_> {
    /// What is doubtful in the policies themselves.
    pub(super) fn lint_policies(&mut self) {
        let mut policies = Vec::new();
        collect(self.world, &self.world.traffic_policies, &mut policies);
        collect(self.world, &self.world.gloo_traffic_policies, &mut policies);
        for policy in policies {
            let Some(PolicyCors::Fields(fields)) = &policy.spec.cors else { continue };
            match &fields.0 {
                Ok(cors) => {
                    let found = gateway_api::validate(cors).1;
                    self.note_all(&policy.object, policy.meta, "spec.cors", found);
                }
                Err(error) => self.note(
                    &policy.object,
                    policy.meta,
                    "spec.cors",
                    (Severity::Error, "cors-unreadable"),
                    format!("cannot be read: {error}; preflights of its routes go to the proxy"),
                    "Write it as kgateway's CorsPolicy.",
                ),
            }
        }
    }
}

/// What Envoy gets of CORS fields, with those of the Gateway's policy behind them. `None`: releases of kgateway differ in
/// what it gets.
pub(super) fn envoy(cors: &gateway_api::Cors, fallback: Option<&gateway_api::Cors>) -> Option<envoy::Cors> {
    if cors.allow_credentials == Some(false) && fallback.is_some_and(|f| f.allow_credentials == Some(true)) {
        return None;
    }
    let fallback = fallback.map(fields);
    Some(envoy::effective(&fields(cors), fallback.as_ref()))
}

fn fields(cors: &gateway_api::Cors) -> envoy::Cors {
    let joined = |list: &[String]| (!list.is_empty()).then(|| list.join(", "));
    envoy::Cors {
        allow_origin_string_match: cors.allow_origins.iter().map(|origin| matcher(origin)).collect(),
        allow_methods: joined(&cors.allow_methods),
        allow_headers: joined(&cors.allow_headers),
        expose_headers: joined(&cors.expose_headers),
        max_age: cors.max_age.map(|seconds| seconds.to_string()),
        allow_credentials: (cors.allow_credentials == Some(true)).then_some(true),
        ..envoy::Cors::default()
    }
}

/// An origin with a wildcard is a pattern that differs between releases, and whose dots match any byte: here it allows what
/// all of them do and what the Gateway API means by it. The rest is the proxy's to answer.
fn matcher(origin: &str) -> StringMatcher {
    let regex = |pattern: String| StringMatcher { safe_regex: Some(pattern), ..StringMatcher::default() };
    if origin == "*" {
        return regex(".*".to_owned());
    }
    let Some((scheme, host)) = origin.split_once("://").filter(|(_, host)| host.contains('*')) else {
        return StringMatcher { exact: Some(origin.to_owned()), ..StringMatcher::default() };
    };
    let scheme = escaped(scheme);
    if host == "*" {
        return regex(format!("{scheme}://[a-zA-Z0-9_.:\\[\\]-]+"));
    }
    if let Some(port) = host.strip_prefix("*:").filter(|port| !port.contains('*')) {
        return regex(format!("{scheme}://[a-zA-Z0-9_.-]+:{}", escaped(port)));
    }
    match host.strip_prefix("*.").filter(|suffix| !suffix.contains('*')) {
        Some(suffix) => {
            regex(format!("{scheme}://([a-zA-Z0-9_-]+\\.)*[a-zA-Z0-9_-]{{2,}}\\.{}", escaped(suffix)))
        }
        // Nothing that the schema allows.
        None => StringMatcher { exact: Some(origin.to_owned()), ..StringMatcher::default() },
    }
}

/// Text as RE2 matches it literally.
pub(super) fn escaped(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut out, c| {
        if !c.is_ascii_alphanumeric() && c.is_ascii() && c != '/' && c != '_' {
            out.push('\\');
        }
        out.push(c);
        out
    })
}
