//! Envoy's CORS filter, as kgateway and other Envoy-based gateways program it.

use super::super::answer::{AllowMethods, EchoHeaders, Template};
use super::super::core::{Core, Methods};
use super::super::origin::{Matcher, Matchers, Origins};
use super::super::{Finding, OnDenied, Severity};
use super::lint::{self, Findings, Place};
use crate::reason::PassReason;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::sync::Arc;

/// `envoy.type.matcher.v3.StringMatcher`: exactly one of the patterns.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Deserialize, Serialize)]
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
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Deserialize, Serialize)]
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
pub struct Rules(pub(in crate::policy) Arc<Core>);

/// Checks the fields. `fallback` is the virtual host's policy: it fills, field by field, what `cors` leaves unset.
pub fn validate(cors: &Cors, fallback: Option<&Cors>) -> (Option<Rules>, Vec<Finding>) {
    let mut findings = Findings::default();
    let effective = effective(cors, fallback);
    let matchers = check_matchers(&effective.allow_origin_string_match, &mut findings);
    check_values(&effective, &mut findings);
    let gate = gate(cors, &mut findings);
    let origins = if gate.is_none() { compile_matchers(&matchers, &mut findings) } else { None };
    findings.finish(|| {
        Rules(Arc::new(match origins {
            Some(origins) => compile(&effective, origins),
            None => Core::passing(gate.unwrap_or(PassReason::Unsupported)),
        }))
    })
}

/// `None` if a regex cannot be modelled and may decide. The filter asks each matcher whether it matches the text `*`,
/// and if so allows every origin: then such a regex does not matter.
fn compile_matchers(matchers: &[(usize, Matcher<'_>, bool)], findings: &mut Findings) -> Option<Origins> {
    let plain: Vec<(Matcher<'_>, bool)> =
        matchers.iter().map(|&(_, matcher, ignore)| (matcher, ignore)).collect();
    let (compiled, refused) = Matchers::new(&plain);
    if compiled.allow(b"*") {
        return Some(Origins::All);
    }
    if refused.is_empty() {
        return Some(Origins::Matchers(Arc::new(compiled)));
    }
    for (i, error) in refused {
        findings.warn(
            "regex-unsupported",
            ("allow_origin_string_match", Some(matchers[i].0)),
            format!("the regex cannot be modelled: {error}; preflights of this policy go to the proxy"),
            "Write it in RE2's common syntax, shorter, or as `exact`, `prefix` or `suffix` matchers.",
        );
    }
    None
}

fn compile(cors: &Cors, origins: Origins) -> Core {
    let credentials = cors.allow_credentials == Some(true);
    let private_network = cors.allow_private_network_access == Some(true);
    let answer = || {
        let methods = match cors.allow_methods.as_deref() {
            None => AllowMethods::Omit,
            Some("*") => AllowMethods::Echo,
            Some(list) => AllowMethods::Fixed(Cow::Borrowed(list)),
        };
        let (headers, echo) = match cors.allow_headers.as_deref() {
            Some("*") => (None, EchoHeaders::Always),
            list => (list, EchoHeaders::Never),
        };
        Template::envoy_ok()
            .credentials(credentials)
            .methods(&methods)
            .headers(headers, echo)
            .line_if("Access-Control-Max-Age", cors.max_age.as_deref())
            .private_network(private_network)
            .vary()
    };
    Core {
        gate: None,
        on_denied: if cors.forward_not_matching_preflights == Some(false) {
            OnDenied::Answer
        } else {
            OnDenied::Pass
        },
        origins,
        methods: Methods::Unchecked,
        headers: None,
        allowed: answer()
            .origin(false)
            .line_if("Access-Control-Expose-Headers", cors.expose_headers.as_deref())
            .build(),
        // The filter leaves out only what it adds where the origin is allowed.
        denied: Arc::new(answer().build()),
    }
}

/// The route's policy with the virtual host's behind it, as the filter reads them; empty is unset.
pub fn effective(cors: &Cors, fallback: Option<&Cors>) -> Cors {
    let text = |field: fn(&Cors) -> &Option<String>| {
        [Some(cors), fallback].into_iter().flatten().find_map(|c| field(c).clone().filter(|s| !s.is_empty()))
    };
    let flag = |field: fn(&Cors) -> Option<bool>| field(cors).or_else(|| fallback.and_then(field));
    let origins = match fallback {
        Some(fallback) if cors.allow_origin_string_match.is_empty() => &fallback.allow_origin_string_match,
        _ => &cors.allow_origin_string_match,
    };
    Cors {
        allow_origin_string_match: origins.clone(),
        allow_methods: text(|c| &c.allow_methods),
        allow_headers: text(|c| &c.allow_headers),
        expose_headers: text(|c| &c.expose_headers),
        max_age: text(|c| &c.max_age),
        allow_credentials: flag(|c| c.allow_credentials),
        allow_private_network_access: flag(|c| c.allow_private_network_access),
        forward_not_matching_preflights: flag(|c| c.forward_not_matching_preflights),
        // The filter asks the most specific policy alone.
        filter_enabled_percent: cors.filter_enabled_percent,
        shadow_enabled_percent: cors.shadow_enabled_percent,
    }
}

/// Why every request passes, if so.
fn gate(cors: &Cors, findings: &mut Findings) -> Option<PassReason> {
    let mut partial = |field, what: String| {
        findings.warn(
            "percentage",
            (field, None),
            format!("{what}; preflights of this policy go to the proxy"),
            "Only a filter that is wholly on, and not in shadow mode, is answered here.",
        );
        Some(PassReason::Unsupported)
    };
    match (cors.filter_enabled_percent, cors.shadow_enabled_percent) {
        (_, Some(shadow)) if shadow > 0 => {
            partial("shadow_enabled_percent", format!("shadow mode at {shadow} %"))
        }
        (Some(0), _) => Some(PassReason::Disabled),
        (Some(n), _) if n != 100 => partial("filter_enabled_percent", format!("the filter is on for {n} %")),
        _ => None,
    }
}

/// Each with its position and `ignore_case`.
fn check_matchers<'c>(list: &'c [StringMatcher], findings: &mut Findings) -> Vec<(usize, Matcher<'c>, bool)> {
    const FIELD: &str = "allow_origin_string_match";
    if list.is_empty() {
        findings.warn(
            "origins-empty",
            (FIELD, None),
            "no origin is allowed, so every preflight goes to the proxy as one of an unknown origin",
            "List matchers, or remove the policy.",
        );
    }
    let mut matchers = Vec::new();
    for (i, entry) in list.iter().enumerate() {
        let place = (FIELD, Some(i));
        let given: Vec<Matcher<'_>> = [
            entry.exact.as_deref().map(Matcher::Exact),
            entry.prefix.as_deref().map(Matcher::Prefix),
            entry.suffix.as_deref().map(Matcher::Suffix),
            entry.contains.as_deref().map(Matcher::Contains),
            entry.safe_regex.as_deref().map(Matcher::Regex),
        ]
        .into_iter()
        .flatten()
        .collect();
        let &[matcher] = &given[..] else {
            findings.error(
                "matcher-pattern",
                place,
                format!("{} patterns in one matcher", given.len()),
                "Give exactly one of `exact`, `prefix`, `suffix`, `contains` and `safe_regex`.",
            );
            continue;
        };
        match matcher {
            Matcher::Prefix("") | Matcher::Suffix("") | Matcher::Contains("") | Matcher::Regex("") => {
                findings.error(
                    "matcher-empty",
                    place,
                    "the pattern is empty",
                    "Write a pattern, or remove it.",
                );
                continue;
            }
            Matcher::Regex(_) if entry.ignore_case => findings.warn(
                "matcher-ignore-case",
                place,
                "`ignore_case` has no effect on `safe_regex`",
                "Begin the pattern with `(?i)`.",
            ),
            Matcher::Exact(text) if text != "*" => check_exact(text, entry.ignore_case, place, findings),
            _ => {}
        }
        matchers.push((i, matcher, entry.ignore_case));
    }
    matchers
}

/// What no browser sends as an origin.
fn check_exact(text: &str, ignore_case: bool, place: Place, findings: &mut Findings) {
    if text != "null" && text.contains("://") && text.ends_with('/') {
        findings.warn(
            "origin-trailing-slash",
            place,
            format!("`{text}` is matched literally, and no browser sends an origin with a slash at its end"),
            format!("Write `{}`.", text.trim_end_matches('/')),
        );
    } else if !ignore_case && text.bytes().any(|b| b.is_ascii_uppercase()) {
        findings.warn(
            "origin-case",
            place,
            format!("`{text}` is matched with its capitals, and browsers send origins in lower case"),
            format!("Write `{}`.", text.to_ascii_lowercase()),
        );
    }
}

fn check_values(cors: &Cors, findings: &mut Findings) {
    let credentials = cors.allow_credentials == Some(true);
    for (field, value) in [
        ("allow_methods", &cors.allow_methods),
        ("allow_headers", &cors.allow_headers),
        ("expose_headers", &cors.expose_headers),
        ("max_age", &cors.max_age),
    ] {
        let Some(value) = value else { continue };
        if !value.bytes().all(|b| matches!(b, b' '..=b'~')) {
            findings.error(
                "value-invalid",
                (field, None),
                format!("`{}` cannot stand in a header", value.escape_debug()),
                "Use visible ASCII characters and blanks.",
            );
        }
        if field == "max_age" {
            match value.parse::<i64>() {
                Ok(seconds) => lint::max_age(findings, "max_age", seconds),
                Err(_) => findings.warn(
                    "max-age-invalid",
                    (field, None),
                    format!("`{}` is no number, so browsers cache for 5 seconds", value.escape_debug()),
                    "Write whole seconds.",
                ),
            }
        } else if value.split(',').count() > 1 && value.split(',').any(|item| item.trim() == "*") {
            findings.warn(
                "star-with-names",
                (field, None),
                "`*` together with names is sent as it stands, not as an echo of the request",
                "Write `*` alone.",
            );
        }
    }
    let items = |value: &Option<String>| -> Vec<String> {
        value
            .iter()
            .flat_map(|v| v.split(','))
            .map(|item| item.trim().to_owned())
            .filter(|i| !i.is_empty())
            .collect()
    };
    lint::methods(findings, Severity::Warning, "allow_methods", &items(&cors.allow_methods));
    lint::request_headers(findings, Severity::Warning, "allow_headers", &items(&cors.allow_headers));
    lint::expose(findings, Severity::Warning, "expose_headers", &items(&cors.expose_headers), credentials);
    if credentials
        && let Some(i) = cors.allow_origin_string_match.iter().position(|m| {
            m.exact.as_deref() == Some("*")
                || matches!(m.safe_regex.as_deref(), Some(".*" | ".+" | "^.*$" | "^.+$"))
        })
    {
        findings.warn(
            "origin-star-credentials",
            ("allow_origin_string_match", Some(i)),
            "every page on the web may act as its visitor",
            "List the origins, or turn `allow_credentials` off.",
        );
    }
}
