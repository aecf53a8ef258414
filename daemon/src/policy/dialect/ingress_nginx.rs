//! ingress-nginx's CORS annotations.

use super::super::Finding;
use std::collections::BTreeMap;

/// Annotations by name, with or without the `nginx.ingress.kubernetes.io/` prefix.
pub type Annotations = BTreeMap<String, String>;

/// Validated.
#[derive(Clone, Debug)]
pub struct Rules {}

/// Reads the annotations exactly as ingress-nginx does: what its regexes reject falls back to the default, with a
/// warning here. `enable-cors` other than true gives rules that pass.
pub fn validate(_annotations: &Annotations) -> (Option<Rules>, Vec<Finding>) {
    todo!()
}
