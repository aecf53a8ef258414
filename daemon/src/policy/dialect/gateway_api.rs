//! The HTTPRoute `CORS` filter.

use super::super::Finding;
use serde::Deserialize;

/// The filter's fields (`HTTPCORSFilter`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct Cors {
    /// `allowOrigins`.
    pub allow_origins: Vec<String>,
    /// `allowMethods`.
    pub allow_methods: Vec<String>,
    /// `allowHeaders`.
    pub allow_headers: Vec<String>,
    /// `exposeHeaders`.
    pub expose_headers: Vec<String>,
    /// `allowCredentials`.
    pub allow_credentials: Option<bool>,
    /// `maxAge` in seconds; 5 if unset.
    pub max_age: Option<i32>,
}

/// Validated.
#[derive(Clone, Debug)]
pub struct Rules {}

/// Checks the fields as the CRD does, and warns of what no browser honours.
pub fn validate(_cors: &Cors) -> (Option<Rules>, Vec<Finding>) {
    todo!()
}
