//! The dialects: whose answer is given. Each has its CORS fields in the words of its own documents, their checks, and
//! what they compile to.

pub mod envoy;
pub mod gateway_api;
pub mod ingress_nginx;
mod lint;
pub mod native;

use super::core::Core;
use std::sync::Arc;

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

impl Rules {
    /// The dialect's name, as configurations write it.
    pub fn dialect(&self) -> &'static str {
        match self {
            Rules::Native(_) => "native",
            Rules::GatewayApi(_) => "gateway-api",
            Rules::IngressNginx(_) => "ingress-nginx",
            Rules::Envoy(_) => "envoy",
        }
    }

    pub(super) fn core(&self) -> &Arc<Core> {
        match self {
            Rules::Native(rules) => &rules.0,
            Rules::GatewayApi(rules) => &rules.0,
            Rules::IngressNginx(rules) => &rules.0,
            Rules::Envoy(rules) => &rules.0,
        }
    }
}
