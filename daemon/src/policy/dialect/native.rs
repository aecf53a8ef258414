//! preflightd's own strict dialect.

use super::super::answer::{AllowMethods, EchoHeaders, Template};
use super::super::core::{Core, Methods, bare_forbidden};
use super::super::origin::{Origins, Pattern, PatternError, Web, parse_pattern};
use super::super::{Finding, OnDenied, Severity, acrh};
use super::lint::{self, Findings, Place};
use serde::Deserialize;
use std::borrow::Cow;
use std::sync::Arc;

/// The fields, as a TOML policy has them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cors {
    /// `https://app.example`, `https://*.example`, `https://app.example:*`, `*`. Never `null`: any page can have
    /// that origin.
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
pub struct Rules(pub(in crate::policy) Arc<Core>);

/// Checks the fields. Errors refuse the policy; warnings stand beside `Ok`.
pub fn validate(cors: &Cors) -> (Option<Rules>, Vec<Finding>) {
    let mut findings = Findings::default();
    let patterns = check_origins(cors, &mut findings);
    // `*` is a token like any name, so the checks of names let it through.
    redundant(&cors.methods, "methods", "method-redundant", &mut findings);
    lint::methods(&mut findings, Severity::Error, "methods", &cors.methods);
    redundant(&cors.headers, "headers", "header-redundant", &mut findings);
    lint::request_headers(&mut findings, Severity::Error, "headers", &cors.headers);
    lint::expose(&mut findings, Severity::Error, "expose", &cors.expose, cors.credentials);
    if let Some(seconds) = cors.max_age {
        if (-1..=86_400).contains(&seconds) {
            lint::max_age(&mut findings, "max_age", seconds);
        } else {
            findings.error(
                "max-age-range",
                ("max_age", None),
                format!("{seconds} is not between -1 and 86400 seconds"),
                "No browser caches longer than 86400; -1 and 0 turn caching off; leave it out for the browser's 5 seconds.",
            );
        }
    }
    findings.finish(|| Rules(Arc::new(compile(cors, &patterns))))
}

fn compile(cors: &Cors, patterns: &[Pattern<'_>]) -> Core {
    let star = cors.origins.iter().any(|o| o == "*");
    let any_method = cors.methods.iter().any(|m| m == "*");
    let any_header = cors.headers.iter().any(|h| h == "*");
    let names: Vec<String> = cors.headers.iter().map(|h| h.to_ascii_lowercase()).collect();
    let allow_methods = match (any_method, cors.credentials) {
        // With credentials `*` is no wildcard for browsers.
        (true, true) => AllowMethods::Echo,
        (true, false) => AllowMethods::Fixed(Cow::Borrowed("*")),
        (false, _) if cors.methods.is_empty() => AllowMethods::Omit,
        (false, _) => AllowMethods::Fixed(Cow::Owned(cors.methods.join(", "))),
    };
    let (allow_headers, echo) = match (any_header, cors.credentials) {
        (true, true) => (None, EchoHeaders::IfAny),
        (true, false) => (None, EchoHeaders::StarButAuthorization),
        (false, _) => ((!names.is_empty()).then(|| names.join(", ")), EchoHeaders::Never),
    };
    Core {
        gate: None,
        on_denied: OnDenied::Answer,
        origins: if star { Origins::All } else { Origins::Web(Web::new(patterns, &[], false)) },
        methods: if any_method { Methods::Unchecked } else { Methods::listed(&cors.methods) },
        headers: (!any_header).then(|| Arc::new(acrh::Names::new(&names))),
        allowed: Template::no_content()
            .origin(star && !cors.credentials)
            .credentials(cors.credentials)
            .methods(&allow_methods)
            .headers(allow_headers.as_deref(), echo)
            .line_if("Access-Control-Max-Age", cors.max_age.map(|s| s.to_string()))
            .private_network(cors.private_network)
            .vary()
            .build(),
        denied: bare_forbidden(),
    }
}

fn check_origins<'c>(cors: &'c Cors, findings: &mut Findings) -> Vec<Pattern<'c>> {
    if cors.origins.is_empty() {
        findings.error(
            "origins-empty",
            ("origins", None),
            "no origin is allowed, so every preflight would be denied",
            "List the origins of the pages that call this host, such as `https://app.example`; or `*` for all.",
        );
    }
    let mut patterns = Vec::new();
    for (i, text) in cors.origins.iter().enumerate() {
        let place = ("origins", Some(i));
        if cors.origins[..i].contains(text) {
            findings.warn("origin-duplicate", place, format!("`{text}` is listed twice"), "Remove one.");
            continue;
        }
        if text == "*" {
            if cors.credentials {
                findings.error(
                    "origin-star-credentials",
                    place,
                    "`*` with credentials would let every page on the web act as its visitor",
                    "List the origins, or turn credentials off.",
                );
            } else if cors.origins.len() > 1 {
                findings.warn(
                    "origin-star-redundant",
                    place,
                    "`*` allows every origin, the others say nothing more",
                    "Keep `*` alone, or remove it.",
                );
            }
            continue;
        }
        match parse_pattern(text) {
            Ok(pattern) => {
                check_pattern(&pattern, text, cors.credentials, place, findings);
                patterns.push(pattern);
            }
            Err(error) => {
                let (code, message, help) = describe(error, text);
                findings.error(code, place, message, help);
            }
        }
    }
    patterns
}

fn check_pattern(
    pattern: &Pattern<'_>,
    text: &str,
    credentials: bool,
    place: Place,
    findings: &mut Findings,
) {
    if credentials && pattern.scheme != "https" && !pattern.is_loopback() {
        findings.error(
            "origin-insecure-credentials",
            place,
            format!(
                "`{text}` is not protected by TLS: whoever is on the network path could act as the visitor"
            ),
            "Use `https://`, or turn credentials off.",
        );
    }
    if pattern.is_over_public_suffix() {
        let severity = if credentials { Severity::Error } else { Severity::Warning };
        findings.add(
            severity,
            if credentials { "origin-public-suffix-credentials" } else { "origin-public-suffix" },
            place,
            format!("`{}` is a public suffix: anybody can register a host below it", pattern.host),
            "Name the registrable domain, such as `https://*.example.com`.",
        );
    }
}

/// Code, message and remedy of a pattern that cannot be read.
fn describe(error: PatternError, text: &str) -> (&'static str, String, String) {
    use PatternError as E;
    let shown = text.escape_debug();
    let (code, why, help): (_, &str, String) = match error {
        E::Null => (
            "origin-null",
            "any page can have the origin `null` (a sandboxed frame, a file)",
            "Serve the page from a real origin and list that.".into(),
        ),
        E::Blank => {
            ("origin-blank", "blanks around it, or nothing in it", format!("Write `{}`.", text.trim()))
        }
        E::List => (
            "origin-list",
            "it holds a comma",
            "Write each origin as an item of its own; the answer never carries a list.".into(),
        ),
        E::NoScheme => (
            "origin-scheme",
            "it has no scheme",
            format!("Write `https://{}`.", text.trim_start_matches('/')),
        ),
        E::Scheme => ("origin-scheme", "the scheme is malformed", "Write `https://` or `http://`.".into()),
        E::File => (
            "origin-file",
            "browsers send `null` for pages from files",
            "Serve the page over http, from `http://localhost:*` say.".into(),
        ),
        E::TrailingSlash => (
            "origin-trailing-slash",
            "an origin has no path, so with a slash at its end it never matches",
            format!("Write `{}`.", text.trim_end_matches('/')),
        ),
        E::Path => (
            "origin-path",
            "an origin has no path, query or fragment",
            "Write scheme, host and port only.".into(),
        ),
        E::UserInfo => ("origin-userinfo", "an origin has no user", "Remove all before the `@`.".into()),
        E::Upper => (
            "origin-case",
            "browsers send origins in lower case",
            format!("Write `{}`.", text.to_ascii_lowercase()),
        ),
        E::NonAscii => (
            "origin-non-ascii",
            "browsers send internationalised hosts in their ASCII form",
            ascii_form(text).map_or_else(
                || "Write the host in its `xn--` form.".to_owned(),
                |ascii| format!("Write `{ascii}`."),
            ),
        ),
        E::Wildcard => (
            "origin-wildcard",
            "`*` stands for whole labels at the left of a host name, or for a port",
            "Write `https://*.example.com`, or `https://example.com:*`.".into(),
        ),
        E::Host => {
            ("origin-host", "the host is malformed", "Write a host name such as `app.example.com`.".into())
        }
        E::Address => (
            "origin-address",
            "the address is not in the form that browsers serialise",
            "Write IPv4 as four decimal numbers, IPv6 compressed, in lower case and in brackets.".into(),
        ),
        E::Punycode => ("origin-punycode", "a label is not valid Punycode", "Check the `xn--` label.".into()),
        E::HostTooLong => {
            ("origin-host", "the host is too long", "A host has at most 253 characters.".into())
        }
        E::Port => {
            ("origin-port", "the port is not between 1 and 65535", "Write a port, or `*` for any.".into())
        }
        E::DefaultPort => (
            "origin-default-port",
            "browsers leave the scheme's default port out, so it never matches",
            format!("Write `{}`.", text.rsplit_once(':').map_or(text, |(before, _)| before)),
        ),
    };
    (code, format!("`{shown}`: {why}"), help)
}

/// `https://résumé.example` with its host as browsers send it.
fn ascii_form(text: &str) -> Option<String> {
    let (scheme, rest) = text.split_once("://")?;
    let (host, port) = rest.split_once(':').map_or((rest, String::new()), |(h, p)| (h, format!(":{p}")));
    let (star, host) = host.strip_prefix("*.").map_or(("", host), |h| ("*.", h));
    let ascii = idna::domain_to_ascii(host).ok()?;
    let whole = format!("{scheme}://{star}{ascii}{port}");
    parse_pattern(&whole).is_ok().then_some(whole)
}

/// Items that say nothing more: repeated ones, and those beside `*`.
fn redundant(list: &[String], field: &'static str, code: &'static str, findings: &mut Findings) {
    let star = list.iter().any(|item| item == "*");
    for (i, item) in list.iter().enumerate() {
        if list[..i].contains(item) {
            findings.warn(code, (field, Some(i)), format!("`{item}` is listed twice"), "Remove one.");
        } else if star && item != "*" {
            findings.warn(
                code,
                (field, Some(i)),
                format!("`*` covers `{item}` already"),
                "Remove one of them.",
            );
        }
    }
}
