//! Envoy's CORS filter, as kgateway and other Envoy-based gateways program it.

use super::super::Finding;
use serde::Deserialize;

/// `envoy.type.matcher.v3.StringMatcher`: exactly one of the patterns.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StringMatcher {
    /// Byte-equal.
    pub exact: Option<String>,
    /// Begins with.
    pub prefix: Option<String>,
    /// Ends with.
    pub suffix: Option<String>,
    /// Contains.
    pub contains: Option<String>,
    /// RE2 full match.
    pub safe_regex: Option<String>,
    /// ASCII case is ignored (not for `safe_regex`).
    pub ignore_case: bool,
}

/// `envoy.extensions.filters.http.cors.v3.CorsPolicy`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Cors {
    /// Allowed origins.
    pub allow_origin_string_match: Vec<StringMatcher>,
    /// Value of ACAM.
    pub allow_methods: Option<String>,
    /// Value of ACAH.
    pub allow_headers: Option<String>,
    /// Value of ACEH.
    pub expose_headers: Option<String>,
    /// Value of ACMA.
    pub max_age: Option<String>,
    /// ACAC.
    pub allow_credentials: Option<bool>,
    /// Answer Private Network Access.
    pub allow_private_network_access: Option<bool>,
    /// Unset: true.
    pub forward_not_matching_preflights: Option<bool>,
    /// `filter_enabled` in percent; 0 is off, 100 on, anything between passes.
    pub filter_enabled_percent: Option<u32>,
    /// `shadow_enabled` in percent; anything above 0 passes.
    pub shadow_enabled_percent: Option<u32>,
}

/// Validated.
#[derive(Clone, Debug)]
pub struct Rules {}

/// Checks the fields. `fallback` is the virtual host's policy: it fills, field by field, what `cors` leaves unset.
pub fn validate(_cors: &Cors, _fallback: Option<&Cors>) -> (Option<Rules>, Vec<Finding>) {
    todo!()
}
