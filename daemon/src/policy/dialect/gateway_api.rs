//! The HTTPRoute `CORS` filter.

use super::super::acrh::is_token;
use super::super::answer::{AllowMethods, EchoHeaders, Template};
use super::super::core::{Core, Methods, bare_no_content};
use super::super::host::parse_port;
use super::super::origin::{HostMatch, Origins, Pattern, Port, Web};
use super::super::{Finding, OnDenied, Severity};
use super::lint::{self, Findings, Place};
use crate::reason::PassReason;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::sync::Arc;

/// The filter's fields (`HTTPCORSFilter`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Deserialize, Serialize)]
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
pub struct Rules(pub(in crate::policy) Arc<Core>);

/// `maxAge` where the filter does not say.
const DEFAULT_MAX_AGE: i32 = 5;
/// The CRD's bounds.
const MAX_ORIGINS: usize = 64;
const MAX_METHODS: usize = 9;
const MAX_HEADERS: usize = 64;
const MAX_ORIGIN_LEN: usize = 253;
const MAX_HEADER_LEN: usize = 256;
const METHODS: &[&str] =
    &["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "*"];

/// Checks the fields as the CRD does, and warns of what no browser honours.
pub fn validate(cors: &Cors) -> (Option<Rules>, Vec<Finding>) {
    let mut findings = Findings::default();
    let credentials = cors.allow_credentials == Some(true);
    let lower: Vec<String> = cors.allow_origins.iter().map(|o| o.to_ascii_lowercase()).collect();
    let origins = check_origins(cors, &lower, &mut findings);
    check_lists(cors, &mut findings);
    lint::methods(&mut findings, Severity::Warning, "allowMethods", &cors.allow_methods);
    lint::request_headers(&mut findings, Severity::Warning, "allowHeaders", &cors.allow_headers);
    lint::expose(&mut findings, Severity::Warning, "exposeHeaders", &cors.expose_headers, credentials);
    match cors.max_age {
        Some(seconds) if seconds < 1 => findings.error(
            "max-age-range",
            ("maxAge", None),
            format!("maxAge: Invalid value: {seconds}: should be greater than or equal to 1"),
            "Write 1 or more; browsers cannot be told not to cache by this filter.",
        ),
        Some(seconds) => lint::max_age(&mut findings, "maxAge", i64::from(seconds)),
        None => {}
    }
    findings.finish(|| Rules(Arc::new(compile(cors, &origins))))
}

/// The origins as read.
struct Read<'c> {
    patterns: Vec<Pattern<'c>>,
    /// Matched byte for byte.
    literals: Vec<&'c str>,
    /// A port that implementations may read differently.
    unsupported: bool,
}

fn compile(cors: &Cors, origins: &Read<'_>) -> Core {
    if origins.unsupported {
        return Core::passing(PassReason::Unsupported);
    }
    let credentials = cors.allow_credentials == Some(true);
    let star = |list: &[String]| list.iter().any(|item| item == "*");
    let join = |list: &[String]| (!list.is_empty()).then(|| list.join(", "));
    let methods = match (star(&cors.allow_methods), credentials, join(&cors.allow_methods)) {
        (true, true, _) => AllowMethods::Echo,
        (_, _, Some(list)) => AllowMethods::Fixed(Cow::Owned(list)),
        (_, _, None) => AllowMethods::Omit,
    };
    let (headers, echo) = match (star(&cors.allow_headers), credentials) {
        (true, true) => (None, EchoHeaders::IfAny),
        (true, false) => (None, EchoHeaders::StarButAuthorization),
        (false, _) => (join(&cors.allow_headers), EchoHeaders::Never),
    };
    // With credentials `*` is no wildcard, and the specification forbids to send it.
    let expose: Vec<String> =
        cors.expose_headers.iter().filter(|name| !(credentials && *name == "*")).cloned().collect();
    let all = star(&cors.allow_origins);
    Core {
        gate: None,
        on_denied: OnDenied::Answer,
        origins: if all {
            Origins::All
        } else {
            Origins::Web(Web::new(&origins.patterns, &origins.literals, true))
        },
        methods: Methods::Unchecked,
        headers: None,
        allowed: Template::no_content()
            .origin(all && !credentials)
            .credentials(credentials)
            .methods(&methods)
            .headers(headers.as_deref(), echo)
            .line_if("Access-Control-Expose-Headers", join(&expose))
            .line("Access-Control-Max-Age", &cors.max_age.unwrap_or(DEFAULT_MAX_AGE).to_string())
            .vary()
            .build(),
        denied: bare_no_content(),
    }
}

/// `lower` is `allowOrigins` in lower case, as browsers send origins.
fn check_origins<'c>(cors: &Cors, lower: &'c [String], findings: &mut Findings) -> Read<'c> {
    const FIELD: &str = "allowOrigins";
    let credentials = cors.allow_credentials == Some(true);
    let mut read = Read { patterns: Vec::new(), literals: Vec::new(), unsupported: false };
    let star = lower.iter().any(|o| o == "*");
    if lower.is_empty() {
        findings.warn(
            "origins-empty",
            (FIELD, None),
            "no origin is allowed, so every preflight is denied",
            "List the origins of the pages that call this route, or remove the filter.",
        );
    }
    if star && lower.len() > 1 {
        findings.error(
            "origins-star-alongside",
            (FIELD, None),
            "AllowOrigins cannot contain '*' alongside other origins",
            "Keep `*` alone, or remove it.",
        );
    }
    if star && credentials {
        findings.warn(
            "origin-star-credentials",
            (FIELD, lower.iter().position(|o| o == "*")),
            "every page on the web may act as its visitor",
            "List the origins, or leave `allowCredentials` out.",
        );
    }
    for (i, (text, written)) in lower.iter().zip(&cors.allow_origins).enumerate() {
        let place = (FIELD, Some(i));
        if text == "*" {
            continue;
        }
        if text != written && read_origin(text).is_some() {
            findings.warn(
                "origin-case",
                place,
                format!("`{written}` has capitals, browsers send origins in lower case"),
                format!("Write `{text}`."),
            );
        }
        // Older CRDs let a slash through; implementations compare it literally.
        if let Some(bare) = text.strip_suffix('/')
            && read_origin(bare).is_some()
        {
            findings.warn(
                "origin-trailing-slash",
                place,
                format!(
                    "`{written}` is matched literally, and no browser sends an origin with a slash at its end"
                ),
                format!("Write `{bare}`."),
            );
            read.literals.push(text);
            continue;
        }
        match read_origin(text) {
            None => findings.error(
                "origin-invalid",
                place,
                format!(
                    "allowOrigins[{i}]: Invalid value: \"{}\": should match `scheme://host[:port]`",
                    written.escape_debug()
                ),
                "Write `http://` or `https://`, a host that may begin with `*.`, and maybe a port; no path.",
            ),
            Some(Err(port)) => {
                findings.warn(
                    "origin-port",
                    place,
                    format!(
                        "`{port}` is no port that browsers send; preflights of this route go to the proxy"
                    ),
                    "Write a port from 1 to 65535 without leading zeros.",
                );
                read.unsupported = true;
            }
            Some(Ok(pattern)) => {
                check_pattern(&pattern, written, credentials, place, findings);
                read.patterns.push(pattern);
            }
        }
    }
    read
}

fn check_pattern(
    pattern: &Pattern<'_>,
    text: &str,
    credentials: bool,
    place: Place,
    findings: &mut Findings,
) {
    if credentials && pattern.scheme != "https" && !pattern.is_loopback() {
        findings.warn(
            "origin-insecure-credentials",
            place,
            format!(
                "`{text}` is not protected by TLS: whoever is on the network path could act as the visitor"
            ),
            "Use `https://`, or leave `allowCredentials` out.",
        );
    }
    if credentials && (pattern.matching == HostMatch::Every || pattern.is_over_public_suffix()) {
        findings.warn(
            "origin-public-suffix-credentials",
            place,
            format!("anybody can register a host that `{text}` matches"),
            "Name the registrable domain, such as `https://*.example.com`.",
        );
    }
}

/// The CRD's pattern of an origin: `None` where it does not match, the port where no browser sends such a one.
fn read_origin(text: &str) -> Option<Result<Pattern<'_>, &str>> {
    let (scheme, rest) = text.split_once("://")?;
    if !matches!(scheme, "http" | "https") || text.len() > MAX_ORIGIN_LEN {
        return None;
    }
    let (host, port) = match rest.split_once(':') {
        Some((host, port)) => (host, Some(port)),
        None => (rest, None),
    };
    let (matching, host) = match host.strip_prefix("*.") {
        Some(tail) => (HostMatch::Below, tail),
        None if host == "*" => (HostMatch::Every, ""),
        None => (HostMatch::Exact, host),
    };
    let label =
        |label: &str| !label.is_empty() && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    if matching != HostMatch::Every && !host.split('.').all(label) {
        return None;
    }
    let port = match port {
        None => Port::Default,
        Some(digits) if (1..=5).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit()) => {
            match parse_port(digits.as_bytes()) {
                Some(number) => Port::Number(number),
                None => return Some(Err(digits)),
            }
        }
        Some(_) => return None,
    };
    Some(Ok(Pattern { scheme, matching, host, port }))
}

/// Bounds, sets and characters, in the API server's words.
fn check_lists(cors: &Cors, findings: &mut Findings) {
    for (field, list, most) in [
        ("allowOrigins", &cors.allow_origins, MAX_ORIGINS),
        ("allowMethods", &cors.allow_methods, MAX_METHODS),
        ("allowHeaders", &cors.allow_headers, MAX_HEADERS),
        ("exposeHeaders", &cors.expose_headers, MAX_HEADERS),
    ] {
        if list.len() > most {
            findings.error(
                "list-too-long",
                (field, None),
                format!("{field}: Too many: {}: must have at most {most} items", list.len()),
                "Remove some.",
            );
        }
        for (i, item) in list.iter().enumerate() {
            if list[..i].contains(item) {
                findings.error(
                    "list-duplicate",
                    (field, Some(i)),
                    format!("{field}[{i}]: Duplicate value: \"{}\"", item.escape_debug()),
                    "Remove one.",
                );
            }
            if field.ends_with("Headers") && (item.len() > MAX_HEADER_LEN || !is_token(item.as_bytes())) {
                findings.error(
                    "header-invalid",
                    (field, Some(i)),
                    format!(
                        "{field}[{i}]: Invalid value: \"{}\": should match a header name",
                        item.escape_debug()
                    ),
                    "Write one name per item.",
                );
            }
        }
    }
    for (i, method) in cors.allow_methods.iter().enumerate() {
        if !METHODS.contains(&&**method) {
            findings.error(
                "method-unsupported",
                ("allowMethods", Some(i)),
                format!("allowMethods[{i}]: Unsupported value: \"{}\"", method.escape_debug()),
                format!("Supported values: {}.", METHODS.join(", ")),
            );
        }
    }
    for (field, list, message) in [
        ("allowMethods", &cors.allow_methods, "AllowMethods cannot contain '*' alongside other methods"),
        ("allowHeaders", &cors.allow_headers, "AllowHeaders cannot contain '*' alongside other headers"),
    ] {
        if list.len() > 1 && list.iter().any(|item| item == "*") {
            findings.error("list-star-alongside", (field, None), message, "Keep `*` alone, or remove it.");
        }
    }
}
