//! The dialects: whose answer is given. Each has its CORS fields in the words of its own documents, their checks, and
//! what they compile to.

pub mod envoy;
pub mod gateway_api;
pub mod ingress_nginx;
pub mod native;

/// Validated rules of one policy.
#[derive(Clone, Debug)]
pub enum Rules {
    /// preflightd's own strict rules.
    Native(native::Rules),
    /// HTTPRoute `CORS` filter (Gateway API v1.6, GEP-1767).
    GatewayApi(gateway_api::Rules),
    /// `nginx.ingress.kubernetes.io/*` annotations.
    IngressNginx(ingress_nginx::Rules),
    /// Envoy's `CorsPolicy`, as kgateway programs it.
    Envoy(envoy::Rules),
}
