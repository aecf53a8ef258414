//! What is read of Kubernetes objects: the fields that say whose preflights are answered, and how.
//!
//! Of other fields nothing is kept, and a word that is not known (a filter's type, say) is kept as it is: an object of a
//! later version must not hide all others. Fields are named as in the objects, so that messages can name them.
//!
//! Sources: Gateway API v1 (`apis/v1/*_types.go`), kgateway (`api/v1alpha1/kgateway/traffic_policy_types.go`), Kubernetes
//! `networking.k8s.io/v1`.
#![expect(missing_docs, reason = "fields are those of the objects, and documented there")]

use crate::policy::dialect::gateway_api;
use serde::Deserialize;
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
};

/// Namespace and name; the namespace of what has none is empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// Empty where the kind has none.
    pub namespace: Arc<str>,
    /// The name.
    pub name: Arc<str>,
}

impl Key {
    /// One of a name within a namespace.
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            f.write_str(&self.name)
        } else {
            write!(f, "{}/{}", self.namespace, self.name)
        }
    }
}

/// What is read of `metadata`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Meta {
    /// The name.
    pub name: String,
    /// Its namespace; empty in manifests means `default`.
    pub namespace: String,
    /// Labels.
    #[serde(deserialize_with = "or_default")]
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    #[serde(deserialize_with = "or_default")]
    pub annotations: BTreeMap<String, String>,
    /// RFC 3339, in UTC: older sorts first.
    #[serde(deserialize_with = "or_default")]
    pub creation_timestamp: String,
    /// For events that speak of it.
    pub uid: String,
    /// For status conditions: the specification that a controller has seen.
    pub generation: i64,
}

/// A kind of object.
pub trait Kind: Clone + fmt::Debug + Send + Sync + 'static {
    /// Its name.
    const KIND: &'static str;
    /// Its group; that of the core is empty.
    const GROUP: &'static str;
    /// The version that is asked for.
    const VERSION: &'static str;
    /// Its name in paths.
    const PLURAL: &'static str;
    /// Objects belong to namespaces.
    const NAMESPACED: bool = true;
    /// `spec`.
    type Spec: Clone + fmt::Debug + Default + PartialEq + Send + Sync + for<'de> Deserialize<'de>;
    /// `status`.
    type Status: Clone + fmt::Debug + Default + PartialEq + Send + Sync + for<'de> Deserialize<'de>;
    /// Where the world has them.
    fn of(world: &World) -> &Store<Self>;
    /// The same, to be changed.
    fn of_mut(world: &mut World) -> &mut Store<Self>;
}

/// An object.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Object<K: Kind> {
    /// `metadata`.
    pub meta: Meta,
    /// `spec`.
    pub spec: K::Spec,
    /// `status`.
    pub status: K::Status,
}

impl<K: Kind> Object<K> {
    /// Namespace and name.
    pub fn key(&self) -> Key {
        Key::new(&self.meta.namespace, &self.meta.name)
    }
}

/// Objects of a kind.
pub type Store<K> = BTreeMap<Key, Arc<Object<K>>>;

/// All objects that concern us.
#[derive(Clone, Debug, Default)]
pub struct World {
    /// GatewayClasses.
    pub gateway_classes: Store<GatewayClass>,
    /// Gateways.
    pub gateways: Store<Gateway>,
    /// HTTPRoutes.
    pub http_routes: Store<HttpRoute>,
    /// GRPCRoutes.
    pub grpc_routes: Store<GrpcRoute>,
    /// ListenerSets.
    pub listener_sets: Store<ListenerSet>,
    /// XListenerSets.
    pub x_listener_sets: Store<XListenerSet>,
    /// ReferenceGrants.
    pub reference_grants: Store<ReferenceGrant>,
    /// kgateway's TrafficPolicies.
    pub traffic_policies: Store<TrafficPolicy>,
    /// GlooTrafficPolicies.
    pub gloo_traffic_policies: Store<GlooTrafficPolicy>,
    /// Ingresses.
    pub ingresses: Store<Ingress>,
    /// IngressClasses.
    pub ingress_classes: Store<IngressClass>,
    /// Namespaces.
    pub namespaces: Store<Namespace>,
    /// Objects that could not be read, by kind, and why.
    pub unreadable: BTreeMap<(&'static str, Key), String>,
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident: $kind:literal, $group:literal, $version:literal, $plural:literal, $namespaced:literal,
        $spec:ty, $status:ty, $field:ident;)+) => {
        $($(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $name;

        impl Kind for $name {
            const KIND: &'static str = $kind;
            const GROUP: &'static str = $group;
            const VERSION: &'static str = $version;
            const PLURAL: &'static str = $plural;
            const NAMESPACED: bool = $namespaced;
            type Spec = $spec;
            type Status = $status;
            fn of(world: &World) -> &Store<Self> {
                &world.$field
            }
            fn of_mut(world: &mut World) -> &mut Store<Self> {
                &mut world.$field
            }
        })+

        /// Runs `$do!(Kind)` for each kind.
        macro_rules! for_each_kind {
            ($do:ident) => { $($do!($name);)+ };
        }
        pub(super) use for_each_kind;

        impl World {
            /// The number of objects of each kind.
            pub fn counts(&self) -> Vec<(&'static str, usize)> {
                vec![$(($kind, self.$field.len())),+]
            }

            /// There is nothing in it.
            pub fn is_empty(&self) -> bool {
                $(self.$field.is_empty())&&+ && self.unreadable.is_empty()
            }
        }
    };
}

kinds! {
    /// Which controller serves a class of Gateways.
    GatewayClass: "GatewayClass", "gateway.networking.k8s.io", "v1", "gatewayclasses", false,
        GatewayClassSpec, Nothing, gateway_classes;
    /// A proxy's listeners.
    Gateway: "Gateway", "gateway.networking.k8s.io", "v1", "gateways", true, GatewaySpec, Nothing, gateways;
    /// Routes.
    HttpRoute: "HTTPRoute", "gateway.networking.k8s.io", "v1", "httproutes", true, HttpRouteSpec, RouteStatus, http_routes;
    /// Routes of gRPC: their hosts are not those of HTTPRoutes.
    GrpcRoute: "GRPCRoute", "gateway.networking.k8s.io", "v1", "grpcroutes", true, HostsSpec, Nothing, grpc_routes;
    /// Listeners that others add to a Gateway.
    ListenerSet: "ListenerSet", "gateway.networking.k8s.io", "v1", "listenersets", true,
        ListenerSetSpec, Nothing, listener_sets;
    /// The same, before it was stable.
    XListenerSet: "XListenerSet", "gateway.networking.x-k8s.io", "v1alpha1", "xlistenersets", true,
        ListenerSetSpec, Nothing, x_listener_sets;
    /// Who may refer to what in another namespace.
    ReferenceGrant: "ReferenceGrant", "gateway.networking.k8s.io", "v1beta1", "referencegrants", true,
        ReferenceGrantSpec, Nothing, reference_grants;
    /// kgateway's policies.
    TrafficPolicy: "TrafficPolicy", "gateway.kgateway.dev", "v1alpha1", "trafficpolicies", true,
        TrafficPolicySpec, PolicyStatus, traffic_policies;
    /// The same under Gloo's name.
    GlooTrafficPolicy: "GlooTrafficPolicy", "gateway.solo.io", "v1alpha1", "glootrafficpolicies", true,
        TrafficPolicySpec, PolicyStatus, gloo_traffic_policies;
    /// Hosts and paths, with annotations.
    Ingress: "Ingress", "networking.k8s.io", "v1", "ingresses", true, IngressSpec, Nothing, ingresses;
    /// Which controller serves a class of Ingresses.
    IngressClass: "IngressClass", "networking.k8s.io", "v1", "ingressclasses", false,
        IngressClassSpec, Nothing, ingress_classes;
    /// Labels by which Gateways choose whose routes they take, and the annotation that opts out.
    Namespace: "Namespace", "", "v1", "namespaces", false, Nothing, Nothing, namespaces;
}

/// Nothing of it is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Nothing {}

/// `GatewayClass.spec`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct GatewayClassSpec {
    pub controller_name: String,
}

/// `Gateway.spec`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct GatewaySpec {
    pub gateway_class_name: String,
    #[serde(deserialize_with = "or_default")]
    pub listeners: Vec<GatewayListener>,
}

/// `Gateway.spec.listeners[]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct GatewayListener {
    pub name: String,
    pub hostname: Option<String>,
    pub port: u16,
    pub protocol: String,
    #[serde(deserialize_with = "or_default")]
    pub allowed_routes: AllowedRoutes,
}

/// `allowedRoutes`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct AllowedRoutes {
    #[serde(deserialize_with = "or_default")]
    pub namespaces: RouteNamespaces,
    #[serde(deserialize_with = "or_default")]
    pub kinds: Vec<RouteKind>,
}

/// `allowedRoutes.namespaces`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RouteNamespaces {
    /// `All`, `Selector`, or unset for `Same`.
    pub from: Option<String>,
    pub selector: Option<LabelSelector>,
}

/// `allowedRoutes.kinds[]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RouteKind {
    pub kind: String,
}

/// `metav1.LabelSelector`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LabelSelector {
    #[serde(deserialize_with = "or_default")]
    pub match_labels: BTreeMap<String, String>,
    #[serde(deserialize_with = "or_default")]
    pub match_expressions: Vec<LabelExpression>,
}

/// `matchExpressions[]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LabelExpression {
    pub key: String,
    pub operator: String,
    #[serde(deserialize_with = "or_default")]
    pub values: Vec<String>,
}

impl LabelSelector {
    /// Reads what `kubectl get -l` takes, such as `team=shop,tier notin (test, dev),!old`.
    ///
    /// # Errors
    /// The part that cannot be read.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut depth = 0;
        let parts = text.split(|c| {
            depth += i32::from(c == '(') - i32::from(c == ')');
            c == ',' && depth == 0
        });
        let expression = |key: &str, operator: &str, values: &str| {
            let values: Vec<String> = values
                .split(',')
                .map(|value| value.trim().to_owned())
                .filter(|value| !value.is_empty())
                .collect();
            LabelExpression { key: key.trim().to_owned(), operator: operator.to_owned(), values }
        };
        let mut match_expressions = Vec::new();
        for part in parts.map(str::trim).filter(|part| !part.is_empty()) {
            let set = |word: &str| {
                let (key, rest) = part.split_once(word)?;
                Some((key, rest.trim().strip_prefix('(')?.strip_suffix(')')?))
            };
            let made = if let Some((key, values)) = set(" notin ") {
                expression(key, "NotIn", values)
            } else if let Some((key, values)) = set(" in ") {
                expression(key, "In", values)
            } else if let Some((key, value)) = part.split_once("!=") {
                expression(key, "NotIn", value)
            } else if let Some((key, value)) = part.split_once("==").or_else(|| part.split_once('=')) {
                expression(key, "In", value)
            } else if let Some(key) = part.strip_prefix('!') {
                expression(key, "DoesNotExist", "")
            } else {
                expression(part, "Exists", "")
            };
            let plain = |text: &String| {
                text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'/'))
            };
            if made.key.is_empty() || !plain(&made.key) || !made.values.iter().all(plain) {
                return Err(part.to_owned());
            }
            match_expressions.push(made);
        }
        Ok(Self { match_expressions, ..Self::default() })
    }

    /// Whether labels match (`k8s.io/apimachinery/pkg/labels`); `None`: an operator that is not known.
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> Option<bool> {
        let mut all = self.match_labels.iter().all(|(key, value)| labels.get(key) == Some(value));
        for expression in &self.match_expressions {
            let value = labels.get(&expression.key);
            let among = value.is_some_and(|value| expression.values.contains(value));
            all &= match &*expression.operator {
                "In" => among,
                "NotIn" => !among,
                "Exists" => value.is_some(),
                "DoesNotExist" => value.is_none(),
                _ => return None,
            };
        }
        Some(all)
    }
}

/// `GRPCRoute.spec`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HostsSpec {
    #[serde(deserialize_with = "or_default")]
    pub parent_refs: Vec<ParentRef>,
    #[serde(deserialize_with = "or_default")]
    pub hostnames: Vec<String>,
}

/// `ListenerSet.spec`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ListenerSetSpec {
    pub parent_ref: ParentRef,
    #[serde(deserialize_with = "or_default")]
    pub listeners: Vec<GatewayListener>,
}

/// `HTTPRoute.spec`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpRouteSpec {
    #[serde(deserialize_with = "or_default")]
    pub parent_refs: Vec<ParentRef>,
    #[serde(deserialize_with = "or_default")]
    pub hostnames: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    pub rules: Vec<RouteRule>,
}

/// `parentRefs[]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ParentRef {
    pub group: Option<String>,
    pub kind: Option<String>,
    pub namespace: Option<String>,
    pub name: String,
    pub section_name: Option<String>,
    pub port: Option<u16>,
}

/// `HTTPRoute.spec.rules[]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RouteRule {
    pub name: Option<String>,
    #[serde(deserialize_with = "or_default")]
    pub matches: Vec<RouteMatch>,
    #[serde(deserialize_with = "or_default")]
    pub filters: Vec<Filter>,
    #[serde(deserialize_with = "or_default")]
    pub backend_refs: Vec<BackendRef>,
}

/// `rules[].matches[]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RouteMatch {
    pub path: Option<PathMatchSpec>,
    pub method: Option<String>,
    /// How many there are is all that matters.
    #[serde(deserialize_with = "count")]
    pub headers: usize,
    /// The same.
    #[serde(deserialize_with = "count")]
    pub query_params: usize,
}

/// `matches[].path`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct PathMatchSpec {
    #[serde(rename = "type")]
    pub kind: Option<String>,
    pub value: Option<String>,
}

/// A filter of a rule or of a backend.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Filter {
    #[serde(rename = "type")]
    pub kind: String,
    pub cors: Option<CorsFilter>,
    pub extension_ref: Option<ExtensionRef>,
}

/// `cors`: the filter's fields, or what is wrong with them.
#[derive(Clone, Debug, PartialEq)]
pub struct CorsFilter(pub Result<gateway_api::Cors, String>);

impl<'de> Deserialize<'de> for CorsFilter {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        Ok(Self::of(Value::deserialize(d)?))
    }
}

impl CorsFilter {
    fn of(mut value: Value) -> Self {
        if let Value::Object(fields) = &mut value {
            fields.retain(|_, value| !value.is_null());
        }
        Self(serde_json::from_value(value).map_err(|e| e.to_string()))
    }
}

/// `extensionRef`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ExtensionRef {
    pub group: String,
    pub kind: String,
    pub name: String,
}

/// `backendRefs[]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct BackendRef {
    pub group: Option<String>,
    pub kind: Option<String>,
    pub namespace: Option<String>,
    pub name: String,
    pub port: Option<u32>,
    pub weight: Option<i32>,
    #[serde(deserialize_with = "or_default")]
    pub filters: Vec<Filter>,
}

/// `HTTPRoute.status`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RouteStatus {
    #[serde(deserialize_with = "or_default")]
    pub parents: Vec<RouteParentStatus>,
}

/// `status.parents[]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RouteParentStatus {
    pub parent_ref: ParentRef,
    pub controller_name: String,
    #[serde(deserialize_with = "or_default")]
    pub conditions: Vec<Condition>,
}

/// `metav1.Condition`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Condition {
    #[serde(rename = "type")]
    pub kind: String,
    pub status: String,
    pub reason: String,
    pub observed_generation: i64,
}

/// `ReferenceGrant.spec`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ReferenceGrantSpec {
    #[serde(deserialize_with = "or_default")]
    pub from: Vec<GrantFrom>,
    #[serde(deserialize_with = "or_default")]
    pub to: Vec<GrantTo>,
}

/// `ReferenceGrant.spec.from[]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct GrantFrom {
    pub group: String,
    pub kind: String,
    pub namespace: String,
}

/// `ReferenceGrant.spec.to[]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct GrantTo {
    pub group: String,
    pub kind: String,
    pub name: Option<String>,
}

/// `TrafficPolicy.spec`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TrafficPolicySpec {
    pub target_refs: Vec<PolicyTarget>,
    pub target_selectors: Vec<PolicyTarget>,
    pub cors: Option<PolicyCors>,
    /// All other fields that are set.
    pub others: BTreeSet<String>,
}

/// `targetRefs[]` or `targetSelectors[]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PolicyTarget {
    pub kind: String,
    pub name: String,
    pub section_name: Option<String>,
    #[serde(deserialize_with = "or_default")]
    pub match_labels: BTreeMap<String, String>,
}

/// `TrafficPolicy.spec.cors`.
#[derive(Clone, Debug, PartialEq)]
pub enum PolicyCors {
    /// `disable: {}`.
    Disabled,
    /// As an HTTPRoute's filter has them.
    Fields(CorsFilter),
}

impl<'de> Deserialize<'de> for TrafficPolicySpec {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let mut fields = serde_json::Map::deserialize(d)?;
        fields.retain(|_, value| !value.is_null());
        let targets = |value: Option<Value>| {
            value.map_or(Ok(Vec::new()), serde_json::from_value).map_err(serde::de::Error::custom)
        };
        let target_refs = targets(fields.remove("targetRefs"))?;
        let target_selectors = targets(fields.remove("targetSelectors"))?;
        let cors = fields.remove("cors").map(|cors| {
            if cors.get("disable").is_some_and(|disable| !disable.is_null()) {
                return PolicyCors::Disabled;
            }
            PolicyCors::Fields(CorsFilter::of(cors))
        });
        let others = fields.into_iter().map(|(name, _)| name).collect();
        Ok(Self { target_refs, target_selectors, cors, others })
    }
}

/// `TrafficPolicy.status`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PolicyStatus {
    #[serde(deserialize_with = "or_default")]
    pub ancestors: Vec<PolicyAncestor>,
}

/// `TrafficPolicy.status.ancestors[]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PolicyAncestor {
    #[serde(deserialize_with = "or_default")]
    pub conditions: Vec<Condition>,
}

/// `Ingress.spec`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct IngressSpec {
    pub ingress_class_name: Option<String>,
    #[serde(deserialize_with = "or_default")]
    pub rules: Vec<IngressRule>,
    #[serde(deserialize_with = "or_default")]
    pub tls: Vec<IngressTls>,
    #[serde(deserialize_with = "present")]
    pub default_backend: bool,
}

/// `Ingress.spec.rules[]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct IngressRule {
    pub host: Option<String>,
    #[serde(deserialize_with = "or_default")]
    pub http: IngressHttp,
}

/// `Ingress.spec.rules[].http`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct IngressHttp {
    #[serde(deserialize_with = "or_default")]
    pub paths: Vec<IngressPath>,
}

/// `Ingress.spec.rules[].http.paths[]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct IngressPath {
    pub path: Option<String>,
    pub path_type: Option<String>,
}

/// `Ingress.spec.tls[]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct IngressTls {
    #[serde(deserialize_with = "or_default")]
    pub hosts: Vec<String>,
}

/// `IngressClass.spec`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct IngressClassSpec {
    pub controller: String,
}

/// An object of any kind, as manifests have it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", default, bound = "")]
pub(super) struct Manifest<K: Kind> {
    metadata: Meta,
    #[serde(deserialize_with = "or_default")]
    spec: K::Spec,
    #[serde(deserialize_with = "or_default")]
    status: K::Status,
}

impl<K: Kind> Default for Manifest<K> {
    fn default() -> Self {
        Self { metadata: Meta::default(), spec: K::Spec::default(), status: K::Status::default() }
    }
}

impl<K: Kind> Manifest<K> {
    pub(super) fn object(self) -> Object<K> {
        let mut meta = self.metadata;
        if K::NAMESPACED && meta.namespace.is_empty() {
            "default".clone_into(&mut meta.namespace);
        }
        Object { meta, spec: self.spec, status: self.status }
    }
}

/// `null` is what Go writes for an empty list or map.
fn or_default<'de, D, T>(d: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::deserialize(d)?.unwrap_or_default())
}

fn count<'de, D: serde::Deserializer<'de>>(d: D) -> Result<usize, D::Error> {
    Ok(Option::<Vec<serde::de::IgnoredAny>>::deserialize(d)?.map_or(0, |list| list.len()))
}

fn present<'de, D: serde::Deserializer<'de>>(d: D) -> Result<bool, D::Error> {
    Ok(Option::<serde::de::IgnoredAny>::deserialize(d)?.is_some())
}
