//! The dialects: whose answer is given. Each has its CORS fields in the words of its own documents, their checks, and
//! what they compile to.

pub mod envoy;
pub mod gateway_api;
pub mod ingress_nginx;
mod lint;
pub mod native;

use super::core::Core;
use crate::reason::PassReason;
use std::sync::{Arc, LazyLock};

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

    /// None at all, for a policy that passes everything.
    pub fn none() -> Self {
        static NONE: LazyLock<Arc<Core>> = LazyLock::new(|| Arc::new(Core::passing(PassReason::NoCors)));
        Rules::Native(native::Rules(Arc::clone(&NONE)))
    }

    /// The same, of Ingresses: their wildcard hosts have exactly one label for the star.
    pub fn none_of_one_label() -> Self {
        match Self::none() {
            Rules::Native(native::Rules(core)) => Rules::IngressNginx(ingress_nginx::Rules(core)),
            other => other,
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

#[cfg(test)]
mod tests {
    use super::super::{Finding, Severity};
    use super::*;
    use serde::de::DeserializeOwned;
    use serde_json::{Value, json};

    fn read<T: DeserializeOwned>(value: &Value) -> T {
        serde_json::from_value(value.clone()).unwrap_or_else(|e| panic!("{value}: {e}"))
    }

    /// `code field[item]`, those of errors in capitals.
    fn told(findings: &[Finding]) -> Vec<String> {
        let item = |f: &Finding| f.item.map_or(String::new(), |i| format!("[{i}]"));
        findings
            .iter()
            .map(|f| {
                let code =
                    if f.severity == Severity::Error { f.code.to_uppercase() } else { f.code.to_owned() };
                assert!(!f.message.is_empty() && !f.help.is_empty(), "{f:?}");
                format!("{code} {}{}", f.field, item(f))
            })
            .collect()
    }

    #[test]
    fn native_findings() {
        let origin = |o: &str| json!({ "origins": [o] });
        for (cors, expected) in [
            (json!({ "origins": ["https://a.example", "https://*.b.example:*"], "max_age": 7200 }), &[][..]),
            (origin("https://a.example/"), &["ORIGIN-TRAILING-SLASH origins[0]"]),
            (origin("https://a.example/x"), &["ORIGIN-PATH origins[0]"]),
            (origin("https://u@a.example"), &["ORIGIN-USERINFO origins[0]"]),
            (origin("https://A.example"), &["ORIGIN-CASE origins[0]"]),
            (origin("HTTPS://a.example"), &["ORIGIN-CASE origins[0]"]),
            (origin("https://a.example, https://b.example"), &["ORIGIN-LIST origins[0]"]),
            (origin("https://r\u{e9}sum\u{e9}.example"), &["ORIGIN-NON-ASCII origins[0]"]),
            (origin("https://xn--f"), &["ORIGIN-PUNYCODE origins[0]"]),
            (origin("https://xn--rsum-bpad.example"), &[]),
            (origin("https://*x.example"), &["ORIGIN-WILDCARD origins[0]"]),
            (origin("https://*"), &["ORIGIN-WILDCARD origins[0]"]),
            (origin("https://a.example:"), &["ORIGIN-PORT origins[0]"]),
            (origin("https://127.1"), &["ORIGIN-ADDRESS origins[0]"]),
            (origin("https://a..b"), &["ORIGIN-HOST origins[0]"]),
            (origin(" https://a.example"), &["ORIGIN-BLANK origins[0]"]),
            (origin("https://*.com"), &["origin-public-suffix origins[0]"]),
            (json!({ "origins": ["https://a.example", "null"] }), &["ORIGIN-NULL origins[1]"]),
            (json!({ "origins": ["https://a", "https://a"] }), &["origin-duplicate origins[1]"]),
            (json!({ "origins": ["*", "https://a.example"] }), &["origin-star-redundant origins[0]"]),
            (json!({ "origins": ["http://localhost:*", "http://127.0.0.1"], "credentials": true }), &[]),
            (
                json!({ "origins": ["*"], "methods": ["put", "*", "PUT", "PUT"], "headers": ["x-a", "x-a", "*"] }),
                &[
                    "method-redundant methods[0]",
                    "method-redundant methods[2]",
                    "method-redundant methods[3]",
                    "method-case methods[0]",
                    "header-redundant headers[0]",
                    "header-redundant headers[1]",
                ],
            ),
            (json!({ "origins": ["*"], "max_age": 7201 }), &["max-age-browser-cap max_age"]),
            (json!({ "origins": ["*"], "expose": ["*"] }), &[]),
            (json!({ "origins": ["*"], "expose": ["a b"] }), &["EXPOSE-INVALID expose[0]"]),
            (
                json!({ "credentials": true, "methods": ["TRACE"], "headers": ["cookie"], "max_age": 90000 }),
                &[
                    "ORIGINS-EMPTY origins",
                    "METHOD-FORBIDDEN methods[0]",
                    "HEADER-FORBIDDEN headers[0]",
                    "MAX-AGE-RANGE max_age",
                ],
            ),
        ] {
            let (rules, findings) = native::validate(&read(&cors));
            assert_eq!(told(&findings), expected, "{cors}");
            let refused = findings.iter().any(|f| f.severity == Severity::Error);
            assert_eq!(rules.is_none(), refused, "{cors}");
        }
        let (_, findings) = native::validate(&read(&origin("https://r\u{e9}sum\u{e9}.example:8443")));
        assert_eq!(findings[0].help, "Write `https://xn--rsum-bpad.example:8443`.");
    }

    #[test]
    fn gateway_api_findings() {
        for (cors, expected) in [
            (json!({ "allowOrigins": ["https://*", "http://*.a.example:8080"], "maxAge": 5 }), &[][..]),
            (json!({}), &["origins-empty allowOrigins"]),
            (
                json!({ "allowOrigins": ["*"], "allowCredentials": true }),
                &["origin-star-credentials allowOrigins[0]"],
            ),
            (json!({ "allowOrigins": ["https://a.example/"] }), &["origin-trailing-slash allowOrigins[0]"]),
            (json!({ "allowOrigins": ["https://A.example"] }), &["origin-case allowOrigins[0]"]),
            (json!({ "allowOrigins": ["https://a.example:080"] }), &["origin-port allowOrigins[0]"]),
            (json!({ "allowOrigins": ["https://a.example:99999"] }), &["origin-port allowOrigins[0]"]),
            (json!({ "allowOrigins": ["null"] }), &["ORIGIN-INVALID allowOrigins[0]"]),
            (
                json!({ "allowOrigins": ["http://a.example", "https://*.com", "https://*"], "allowCredentials": true }),
                &[
                    "origin-insecure-credentials allowOrigins[0]",
                    "origin-public-suffix-credentials allowOrigins[1]",
                    "origin-public-suffix-credentials allowOrigins[2]",
                ],
            ),
            (
                json!({
                    "allowOrigins": ["https://a"], "allowMethods": ["TRACE"], "allowHeaders": ["Origin"],
                    "exposeHeaders": ["*", "Set-Cookie"], "allowCredentials": true, "maxAge": 86_401
                }),
                &[
                    "method-forbidden allowMethods[0]",
                    "header-forbidden allowHeaders[0]",
                    "expose-star-credentials exposeHeaders[0]",
                    "expose-forbidden exposeHeaders[1]",
                    "max-age-browser-cap maxAge",
                ],
            ),
        ] {
            let (_, findings) = gateway_api::validate(&read(&cors));
            assert_eq!(told(&findings), expected, "{cors}");
        }
    }

    #[test]
    fn ingress_nginx_findings() {
        for (annotations, expected) in [
            (json!({ "enable-cors": "true", "cors-allow-origin": "https://a.example" }), &[][..]),
            (json!({ "enable-cors": "true" }), &["origin-star-credentials cors-allow-origin"]),
            (
                json!({ "nginx.ingress.kubernetes.io/enable-cors": "true", "cors-allow-credentials": "false" }),
                &[],
            ),
            (json!({ "cors-allow-origin": "https://a.example" }), &["cors-disabled enable-cors"]),
            (json!({ "unrelated": "yes" }), &[]),
            (
                json!({ "enable-cors": "yes", "cors-allow-origin": "https://a.example" }),
                &["annotation-default enable-cors", "cors-disabled enable-cors"],
            ),
            (
                json!({ "enable-cors": "true", "cors-allow-origin": "https://a.example/", "cors-allow-credentials": "f" }),
                &["annotation-default cors-allow-origin"],
            ),
            (
                json!({ "enable-cors": "true", "cors-allow-origin": "a.example, https://b.example, https://*.c.example" }),
                &["origin-skipped cors-allow-origin[0]", "wildcard-one-label cors-allow-origin[1]"],
            ),
            (
                json!({ "enable-cors": "true", "cors-allow-origin": "a.example" }),
                &["origin-skipped cors-allow-origin[0]", "origins-empty cors-allow-origin"],
            ),
            (
                json!({ "enable-cors": "true", "cors-allow-origin": "http://a.example, https://b.example:443, http://localhost" }),
                &[
                    "origin-insecure-credentials cors-allow-origin[0]",
                    "origin-default-port cors-allow-origin[1]",
                ],
            ),
            (
                json!({
                    "enable-cors": "true", "cors-allow-origin": "https://a.example", "cors-allow-headers": "*",
                    "cors-allow-methods": "*", "cors-expose-headers": "*", "cors-max-age": "90000"
                }),
                &[
                    "annotation-default cors-allow-methods",
                    "annotation-default cors-allow-headers",
                    "expose-star-credentials cors-expose-headers[0]",
                    "max-age-browser-cap cors-max-age",
                ],
            ),
            (
                json!({ "enable-cors": "true", "cors-allow-origin": "https://a.example", "cors-max-age": "1h" }),
                &["annotation-default cors-max-age"],
            ),
        ] {
            let (rules, findings) = ingress_nginx::validate(&read(&annotations));
            assert_eq!(told(&findings), expected, "{annotations}");
            assert!(rules.is_some(), "imported annotations are never refused");
        }
    }

    #[test]
    fn envoy_findings() {
        let exact = |o: &str| json!({ "allow_origin_string_match": [{ "exact": o }] });
        let with = |name: &str, value: Value| {
            let mut cors = exact("https://a.example");
            cors[name] = value;
            cors
        };
        for (cors, expected) in [
            (exact("https://a.example"), &[][..]),
            (exact("https://a.example/"), &["origin-trailing-slash allow_origin_string_match[0]"]),
            (exact("https://A.example"), &["origin-case allow_origin_string_match[0]"]),
            (json!({}), &["origins-empty allow_origin_string_match"]),
            (json!({ "allow_origin_string_match": [{}] }), &["MATCHER-PATTERN allow_origin_string_match[0]"]),
            (
                json!({ "allow_origin_string_match": [{ "exact": "a", "prefix": "b" }] }),
                &["MATCHER-PATTERN allow_origin_string_match[0]"],
            ),
            (
                json!({ "allow_origin_string_match": [{ "prefix": "" }] }),
                &["MATCHER-EMPTY allow_origin_string_match[0]"],
            ),
            (
                json!({ "allow_origin_string_match": [{ "exact": "https://a" }, { "safe_regex": "(?=x)" }] }),
                &["regex-unsupported allow_origin_string_match[1]"],
            ),
            (
                // Every origin is allowed whatever the regex would say.
                json!({ "allow_origin_string_match": [{ "safe_regex": "(?=x)" }, { "prefix": "*" }] }),
                &[],
            ),
            (
                json!({ "allow_origin_string_match": [{ "safe_regex": "a", "ignore_case": true }] }),
                &["matcher-ignore-case allow_origin_string_match[0]"],
            ),
            (
                json!({ "allow_origin_string_match": [{ "safe_regex": ".*" }], "allow_credentials": true }),
                &["origin-star-credentials allow_origin_string_match[0]"],
            ),
            (with("allow_headers", json!("Origin, x-a")), &["header-forbidden allow_headers[0]"]),
            (with("allow_methods", json!("GET, *")), &["star-with-names allow_methods"]),
            (
                with("allow_methods", json!("GET\r\nx: y")),
                &["VALUE-INVALID allow_methods", "method-invalid allow_methods[0]"],
            ),
            (with("max_age", json!("soon")), &["max-age-invalid max_age"]),
            (with("max_age", json!("90000")), &["max-age-browser-cap max_age"]),
            (with("filter_enabled_percent", json!(50)), &["percentage filter_enabled_percent"]),
            (with("shadow_enabled_percent", json!(1)), &["percentage shadow_enabled_percent"]),
            (with("filter_enabled_percent", json!(0)), &[]),
        ] {
            let (_, findings) = envoy::validate(&read(&cors), None);
            assert_eq!(told(&findings), expected, "{cors}");
        }
    }
}
