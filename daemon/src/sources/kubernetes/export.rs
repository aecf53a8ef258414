//! Imported policies as a policy file of ours.

use super::resolve::{Cors, Imported};
use crate::{
    policy::{OnDenied, PathMatch, dialect::Rules},
    reason::PassReason,
};
use serde::Serialize;
use std::fmt::Write as _;
use toml::Value;

/// The policies as TOML, each below the object that it is of. Read back, they decide alike.
pub fn to_toml(policies: &[Imported]) -> String {
    let mut out = String::new();
    for policy in policies {
        let spec = &policy.spec;
        // Writing to a string cannot fail.
        let _ = writeln!(
            out,
            "# {}{}",
            policy.object.to_string().escape_debug(),
            policy.spec.passes.map(why).unwrap_or_default()
        );
        out += "[[policy]]\n";
        line(&mut out, "name", spec.name.as_str());
        line(&mut out, "hosts", strings(spec.hosts.iter().map(ToString::to_string)));
        if spec.paths != [PathMatch::Prefix("/".to_owned())] {
            let paths = spec.paths.iter().map(|path| {
                let (key, text) = match path {
                    PathMatch::Exact(text) => ("exact", text),
                    PathMatch::Prefix(text) => ("prefix", text),
                    PathMatch::Regex(text) => ("regex", text),
                };
                Value::Table([(key.to_owned(), text.as_str().into())].into_iter().collect())
            });
            line(&mut out, "paths", Value::Array(paths.collect()));
        }
        if !spec.for_methods.is_empty() {
            line(&mut out, "for_methods", strings(spec.for_methods.iter().cloned()));
        }
        if spec.passes.is_some() {
            line(&mut out, "enabled", false);
        }
        match spec.on_denied {
            Some(OnDenied::Pass) => line(&mut out, "on_denied", "pass"),
            Some(OnDenied::Answer) => line(&mut out, "on_denied", "answer"),
            None => {}
        }
        match policy.cors.as_deref() {
            Some(Cors::GatewayApi { cors, .. }) => block(&mut out, "gateway-api", cors),
            Some(Cors::Envoy(cors)) => block(&mut out, "envoy", cors),
            Some(Cors::IngressNginx(annotations)) => block(&mut out, "ingress-nginx", annotations),
            // Says that a wildcard host has one label for the star.
            None if matches!(spec.rules, Rules::IngressNginx(_)) => {
                out += "[policy.ingress-nginx]\nenable-cors = \"false\"\n";
            }
            None => {}
        }
        out.push('\n');
    }
    out
}

/// Why a policy passes, as a comment.
fn why(reason: PassReason) -> &'static str {
    match reason {
        PassReason::NoCors => ": no CORS rules",
        PassReason::Disabled => ": switched off",
        PassReason::Conflict => ": which of two listeners of its Gateway has it is not certain",
        _ => ": not answered here, see the findings",
    }
}

fn strings(items: impl Iterator<Item = String>) -> Value {
    Value::Array(items.map(Value::String).collect())
}

fn line(out: &mut String, key: &str, value: impl Into<Value>) {
    let _ = writeln!(out, "{} = {}", quoted(key), value.into());
}

/// A key, in quotes where it needs them.
fn quoted(key: &str) -> String {
    let bare = !key.is_empty() && key.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'));
    if bare { key.to_owned() } else { Value::from(key).to_string() }
}

/// The fields of a dialect that are set.
fn block(out: &mut String, name: &str, cors: &impl Serialize) {
    let _ = writeln!(out, "[policy.{name}]");
    // The fields are strings, numbers, and lists of them: TOML has all of those.
    let fields = toml::Table::try_from(cors).unwrap_or_default();
    for (key, mut value) in fields {
        if let Value::Array(items) = &mut value {
            for item in items.iter_mut().filter_map(Value::as_table_mut) {
                item.retain(|_, value| *value != Value::Boolean(false));
            }
            if items.is_empty() {
                continue;
            }
        }
        line(out, &key, value);
    }
}
