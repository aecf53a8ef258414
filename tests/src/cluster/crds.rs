//! The custom resources that clusters know: Gateway API's, with the schemas of the crate whose types preflightd reads them
//! into, and policies of kgateway and Gloo.
#![forbid(unsafe_code)]

use gateway_api::{
    gatewayclasses::GatewayClass, gateways::Gateway, httproutes::HttpRoute, referencegrants::ReferenceGrant,
};
use kube::CustomResourceExt;
use serde_json::{Value, json};

/// All definitions.
pub(super) fn all() -> Vec<Value> {
    let mut all = vec![gateway_class(), gateway(), http_route(), reference_grant()];
    for text in
        [include_str!("../../crds/trafficpolicies.yaml"), include_str!("../../crds/glootrafficpolicies.yaml")]
    {
        all.push(serde_saphyr::from_str(text).expect("a definition in YAML"));
    }
    all
}

fn gateway_class() -> Value {
    let mut class = definition::<GatewayClass>();
    default(&mut class, "status", json!({ "conditions": [waiting("Accepted")] }));
    class
}

fn gateway() -> Value {
    let mut gateway = definition::<Gateway>();
    let conditions = json!([waiting("Accepted"), waiting("Programmed")]);
    default(&mut gateway, "status", json!({ "conditions": conditions }));
    let routes = "spec.listeners.[].allowedRoutes";
    default(&mut gateway, routes, json!({ "namespaces": { "from": "Same" } }));
    default(&mut gateway, &format!("{routes}.namespaces"), json!({ "from": "Same" }));
    default(&mut gateway, &format!("{routes}.namespaces.from"), json!("Same"));
    gateway
}

fn http_route() -> Value {
    let mut route = definition::<HttpRoute>();
    let path = json!({ "type": "PathPrefix", "value": "/" });
    for (field, value) in [
        ("spec.parentRefs.[].group", json!("gateway.networking.k8s.io")),
        ("spec.parentRefs.[].kind", json!("Gateway")),
        ("spec.rules", json!([{ "matches": [{ "path": path }] }])),
        ("spec.rules.[].matches", json!([{ "path": path }])),
        ("spec.rules.[].matches.[].path", json!(path)),
        ("spec.rules.[].matches.[].path.type", json!("PathPrefix")),
        ("spec.rules.[].matches.[].path.value", json!("/")),
        ("spec.rules.[].matches.[].headers.[].type", json!("Exact")),
        ("spec.rules.[].matches.[].queryParams.[].type", json!("Exact")),
        ("spec.rules.[].filters.[].cors.maxAge", json!(5)),
        ("spec.rules.[].backendRefs.[].group", json!("")),
        ("spec.rules.[].backendRefs.[].kind", json!("Service")),
        ("spec.rules.[].backendRefs.[].weight", json!(1)),
    ] {
        default(&mut route, field, value);
    }
    route
}

/// Served as v1beta1 too: most that exist are written so.
fn reference_grant() -> Value {
    let mut grant = definition::<ReferenceGrant>();
    let mut older = grant["spec"]["versions"][0].clone();
    older["name"] = json!("v1beta1");
    older["storage"] = json!(false);
    grant["spec"]["versions"].as_array_mut().expect("versions").push(older);
    grant
}

/// What the crate says of a resource. Without the rules in CEL and the defaults that Gateway API publishes: the crate has
/// neither, the server knows no CEL, and what defaults matter here is added by [`default`].
fn definition<T: CustomResourceExt>() -> Value {
    let mut definition = serde_json::to_value(T::crd()).expect("a definition in JSON");
    drop_nulls(&mut definition);
    // Groups of Kubernetes' own are refused without an approval or the admission that there is none.
    definition["metadata"]["annotations"] = json!({ "api-approved.kubernetes.io": "unapproved, for tests" });
    definition
}

/// Drops `null` from enumerations: it says what `nullable` says, and before 1.21 the server stumbles over it.
fn drop_nulls(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            if let Some(Value::Array(values)) = fields.get_mut("enum") {
                values.retain(|value| !value.is_null());
            }
            fields.values_mut().for_each(drop_nulls);
        }
        Value::Array(elements) => elements.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

/// Adds a default to the schema's field at this path; `[]` means an array's elements.
fn default(definition: &mut Value, path: &str, value: Value) {
    let mut schema = &mut definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
    for name in path.split('.') {
        let inner = if name == "[]" {
            schema.get_mut("items")
        } else {
            schema.get_mut("properties").and_then(|properties| properties.get_mut(name))
        };
        schema = inner.unwrap_or_else(|| panic!("the schema has no {name} of {path}"));
    }
    schema["default"] = value;
}

/// A condition before any controller has seen the object.
fn waiting(kind: &str) -> Value {
    json!({
        "type": kind,
        "status": "Unknown",
        "reason": "Pending",
        "message": "Waiting for controller",
        "lastTransitionTime": "1970-01-01T00:00:00Z",
    })
}
