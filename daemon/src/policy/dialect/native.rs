//! preflightd's own strict dialect.

use super::super::Finding;
use serde::Deserialize;

/// The fields, as a TOML policy has them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cors {
    /// `https://app.example`, `https://*.example`, `https://app.example:*`, `*`, `null`.
    #[serde(default)]
    pub origins: Vec<String>,
    /// Methods beyond GET, HEAD and POST, or `*`.
    #[serde(default)]
    pub methods: Vec<String>,
    /// Request header names, or `*`.
    #[serde(default)]
    pub headers: Vec<String>,
    /// Response header names; checked, but not part of a preflight answer.
    #[serde(default)]
    pub expose: Vec<String>,
    /// `Access-Control-Allow-Credentials: true`.
    #[serde(default)]
    pub credentials: bool,
    /// Seconds; -1 and 0 forbid caching; unset: the header is omitted.
    #[serde(default)]
    pub max_age: Option<i64>,
    /// Answer `Access-Control-Request-Private-Network`.
    #[serde(default)]
    pub private_network: bool,
}

/// Validated.
#[derive(Clone, Debug)]
pub struct Rules {}

/// Checks the fields. Errors refuse the policy; warnings stand beside `Ok`.
pub fn validate(_cors: &Cors) -> (Option<Rules>, Vec<Finding>) {
    todo!()
}
