//! ingress-nginx's CORS annotations.

use super::super::answer::{AllowMethods, EchoHeaders, Template};
use super::super::core::{Core, Methods, bare_no_content};
use super::super::origin::{OneLabel, Origins, PatternError, parse_pattern};
use super::super::regex::Regexes;
use super::super::{Finding, OnDenied, Severity};
use super::lint::{self, Findings, Place};
use crate::reason::PassReason;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

/// Annotations by name, with or without the `nginx.ingress.kubernetes.io/` prefix.
pub type Annotations = BTreeMap<String, String>;

/// Validated.
#[derive(Clone, Debug)]
pub struct Rules(pub(in crate::policy) Arc<Core>);

const PREFIX: &str = "nginx.ingress.kubernetes.io/";

const DEFAULT_METHODS: &str = "GET, PUT, POST, DELETE, PATCH, OPTIONS";
const DEFAULT_HEADERS: &str = "DNT,Keep-Alive,User-Agent,X-Requested-With,If-Modified-Since,Cache-Control,Content-Type,Range,Authorization";
const DEFAULT_MAX_AGE: i64 = 1_728_000;

/// Reads the annotations exactly as ingress-nginx does: what its regexes reject falls back to the default, with a
/// warning here. `enable-cors` other than true gives rules that pass. Annotations that are not about CORS are ignored.
pub fn validate(annotations: &Annotations) -> (Option<Rules>, Vec<Finding>) {
    let mut findings = Findings::default();
    let config = Config::read(annotations, &mut findings);
    findings.finish(|| Rules(Arc::new(config.compile())))
}

/// What the controller makes of the annotations.
#[derive(Debug, PartialEq, Eq)]
struct Config {
    enabled: bool,
    /// `*` alone is every origin, none at all is none.
    origins: Vec<String>,
    methods: String,
    headers: String,
    credentials: bool,
    expose: String,
    max_age: i64,
    /// A list has a line break or a tab, which nginx sends as it stands: a head that is not modelled.
    broken: bool,
}

impl Config {
    fn read(annotations: &Annotations, findings: &mut Findings) -> Self {
        // As written: booleans and numbers with blanks around them are none.
        let get = |name: &str| {
            annotations.get(name).or_else(|| annotations.get(&format!("{PREFIX}{name}"))).map(String::as_str)
        };
        let enabled = boolean(findings, "enable-cors", get("enable-cors"), false);
        let mut config = Self {
            enabled,
            origins: origins(findings, get("cors-allow-origin")),
            methods: list(findings, "cors-allow-methods", get("cors-allow-methods"), DEFAULT_METHODS, |s| {
                // ^([A-Za-z]+,?\s?)+$
                separated(s, |b| b.is_ascii_alphabetic())
            }),
            headers: list(findings, "cors-allow-headers", get("cors-allow-headers"), DEFAULT_HEADERS, |s| {
                // ^[A-Za-z0-9-_, ]*$
                s.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b',' | b' '))
            }),
            credentials: boolean(findings, "cors-allow-credentials", get("cors-allow-credentials"), true),
            expose: list(findings, "cors-expose-headers", get("cors-expose-headers"), "", |s| {
                // ^(([A-Za-z0-9\-\_]+|\*),?\s?)+$
                separated(s, |b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'*'))
            }),
            max_age: integer(findings, "cors-max-age", get("cors-max-age"), DEFAULT_MAX_AGE),
            broken: false,
        };
        for (field, value) in
            [("cors-allow-methods", &config.methods), ("cors-expose-headers", &config.expose)]
        {
            if value.bytes().any(|b| b.is_ascii_control()) {
                config.broken = true;
                findings.warn(
                    "annotation-control",
                    (field, None),
                    format!(
                        "nginx sends `{}` as it stands; preflights of this Ingress go to the proxy",
                        value.escape_debug()
                    ),
                    "Write the names in one line, separated by commas.",
                );
            }
        }
        if enabled {
            config.lint(annotations, findings);
        } else if annotations.keys().any(|k| k.strip_prefix(PREFIX).unwrap_or(k).starts_with("cors-")) {
            findings.warn(
                "cors-disabled",
                ("enable-cors", None),
                "the other CORS annotations have no effect while `enable-cors` is not \"true\"",
                "Set `enable-cors: \"true\"`, or remove them.",
            );
        }
        config
    }

    fn lint(&self, annotations: &Annotations, findings: &mut Findings) {
        let star = self.origins == ["*"];
        if star && self.credentials {
            let unset =
                ["", PREFIX].iter().all(|p| !annotations.contains_key(&format!("{p}cors-allow-origin")));
            findings.warn(
                "origin-star-credentials",
                ("cors-allow-origin", None),
                if unset {
                    "unset, it is `*`, and credentials are on by default: no browser accepts the two together"
                } else {
                    "`*` and credentials: no browser accepts the two together"
                },
                "List the origins, or set `cors-allow-credentials: \"false\"`.",
            );
        }
        if self.origins.is_empty() {
            findings.warn(
                "origins-empty",
                ("cors-allow-origin", None),
                "no entry is valid, so nginx allows no origin; preflights of this Ingress go to the proxy",
                "List origins such as `https://app.example`.",
            );
        }
        for (i, origin) in self.origins.iter().enumerate() {
            self.lint_origin(origin, ("cors-allow-origin", Some(i)), findings);
        }
        let items = |s: &str| -> Vec<String> {
            s.split(',').map(|item| item.trim().to_owned()).filter(|item| !item.is_empty()).collect()
        };
        lint::methods(findings, Severity::Warning, "cors-allow-methods", &items(&self.methods));
        if self.headers != DEFAULT_HEADERS {
            lint::request_headers(findings, Severity::Warning, "cors-allow-headers", &items(&self.headers));
        }
        lint::expose(
            findings,
            Severity::Warning,
            "cors-expose-headers",
            &items(&self.expose),
            self.credentials,
        );
        if self.max_age != DEFAULT_MAX_AGE {
            lint::max_age(findings, "cors-max-age", self.max_age);
        }
    }

    fn lint_origin(&self, origin: &str, place: Place, findings: &mut Findings) {
        let Some((scheme, rest)) = origin.split_once("://") else { return };
        if rest.starts_with("*.") {
            findings.warn(
                "wildcard-one-label",
                place,
                format!("`{origin}` matches exactly one label here, in other dialects one or more"),
                "List deeper hosts too if pages live there.",
            );
        }
        // Read as a native pattern, for what the two have in common.
        let lower = origin.to_ascii_lowercase();
        match parse_pattern(&lower) {
            Ok(pattern) if self.credentials => {
                if scheme.eq_ignore_ascii_case("http") && !pattern.is_loopback() {
                    findings.warn(
                        "origin-insecure-credentials",
                        place,
                        format!("`{origin}` is not protected by TLS: whoever is on the network path could act as the visitor"),
                        "Use `https://`, or set `cors-allow-credentials: \"false\"`.",
                    );
                }
                if pattern.is_over_public_suffix() {
                    findings.warn(
                        "origin-public-suffix-credentials",
                        place,
                        format!("anybody can register a host that `{origin}` matches"),
                        "Name the registrable domain, such as `https://*.example.com`.",
                    );
                }
            }
            Err(PatternError::DefaultPort) => findings.warn(
                "origin-default-port",
                place,
                format!("`{origin}` never matches: browsers leave the scheme's default port out"),
                "Remove the port.",
            ),
            _ => {}
        }
    }

    fn compile(&self) -> Core {
        if !self.enabled {
            return Core::passing(PassReason::Disabled);
        }
        if self.broken {
            return Core::passing(PassReason::Unsupported);
        }
        let star = self.origins == ["*"];
        let origins: Vec<&str> = self.origins.iter().map(String::as_str).collect();
        let answer = Template::no_content()
            .origin(star)
            .credentials(self.credentials)
            .methods(&AllowMethods::Fixed(Cow::Borrowed(&self.methods)))
            .headers(Some(&self.headers), EchoHeaders::Never)
            .line_if("Access-Control-Expose-Headers", (!self.expose.is_empty()).then_some(&self.expose))
            .line("Access-Control-Max-Age", &self.max_age.to_string());
        Core {
            gate: None,
            on_denied: OnDenied::Pass,
            origins: if star { Origins::All } else { Origins::OneLabel(Arc::new(OneLabel::new(&origins))) },
            methods: Methods::Unchecked,
            headers: None,
            // With the literal `*` nothing in the answer depends on the request.
            allowed: if star { answer } else { answer.vary() }.build(),
            denied: bare_no_content(),
        }
    }
}

/// Each line trimmed, as the controller does; blank is unset.
fn normalise(value: &str) -> String {
    value.split('\n').map(str::trim).collect::<Vec<_>>().join("\n")
}

/// What the controller's check of an annotation sees (its `ValidateRegex`), before any line is trimmed.
fn without_blanks(value: &str) -> String {
    value.replace(' ', "")
}

/// `cors-allow-origin`: entries that the controller would not take are skipped, `*` takes all over.
fn origins(findings: &mut Findings, value: Option<&str>) -> Vec<String> {
    const FIELD: &str = "cors-allow-origin";
    let all = vec!["*".to_owned()];
    let Some(raw) = value else { return all };
    let value = normalise(raw);
    if value.is_empty() {
        findings.warn(
            "annotation-default",
            (FIELD, None),
            "blank, so nginx allows every origin (`*`)",
            "List the origins.",
        );
        return all;
    }
    if !is_origin_list(&without_blanks(raw)) {
        findings.warn(
            "annotation-default",
            (FIELD, None),
            format!("nginx rejects `{}` and falls back to `*`: every origin is allowed", raw.escape_debug()),
            "Write origins such as `https://app.example:8443` or `https://*.example.com`, separated by commas.",
        );
        return all;
    }
    let mut kept = Vec::new();
    for (i, entry) in value.split(',').map(str::trim).enumerate() {
        if entry == "*" {
            return all;
        }
        if entry.is_empty() {
            continue;
        }
        if is_origin_entry(entry) {
            kept.push(entry.to_owned());
        } else {
            findings.warn(
                "origin-skipped",
                (FIELD, Some(i)),
                format!("nginx skips `{}`: no scheme, or malformed", entry.escape_debug()),
                format!("Write `https://{entry}`."),
            );
        }
    }
    kept
}

/// `^((((([a-z]+://)?(\*\.)?[A-Za-z0-9\-.]*(:\d+)?,?)|null)+)|\*)?$`, blanks removed. The comma is optional, so it
/// is a run of such pieces; and a piece may be a lone `*.`.
fn is_origin_list(text: &str) -> bool {
    static REGEX: LazyLock<Regexes> =
        LazyLock::new(|| Regexes::new(&[r"((((([a-z]+://)?(\*\.)?[A-Za-z0-9\-.]*(:\d+)?,?)|null)+)|\*)?"]).0);
    // A `*` among others fails here too in nginx, and so ends as the same `*`: no reason for a warning.
    text.split(',').any(|entry| entry == "*") || REGEX.is_match(text.as_bytes())
}

/// `^([a-z]+://(\*\.)?[A-Za-z0-9\-.]*(:\d+)?|\*|null)?$`
fn is_origin_entry(text: &str) -> bool {
    if text == "null" {
        return true;
    }
    let Some((scheme, rest)) = text.split_once("://") else { return false };
    let (host, port) = match rest.split_once(':') {
        Some((host, port)) => (host, Some(port)),
        None => (rest, None),
    };
    let host = host.strip_prefix("*.").unwrap_or(host);
    !scheme.is_empty()
        && scheme.bytes().all(|b| b.is_ascii_lowercase())
        && host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.'))
        && port.is_none_or(|p| !p.is_empty() && p.bytes().all(|b| b.is_ascii_digit()))
}

/// One or more of: one or more of `inner`, then maybe a comma, then maybe a blank.
fn separated(text: &str, inner: impl Fn(u8) -> bool) -> bool {
    let bytes = text.as_bytes();
    let mut i = 0;
    while i < bytes.len() {
        let start = i;
        while i < bytes.len() && inner(bytes[i]) {
            i += 1;
        }
        if i == start {
            return false;
        }
        if bytes.get(i) == Some(&b',') {
            i += 1;
        }
        if bytes.get(i).is_some_and(|b| matches!(b, b' ' | b'\t' | b'\n' | 0x0c | b'\r')) {
            i += 1;
        }
    }
    !bytes.is_empty()
}

fn list(
    findings: &mut Findings,
    field: &'static str,
    value: Option<&str>,
    default: &str,
    valid: impl Fn(&str) -> bool,
) -> String {
    let Some(value) = value else { return default.to_owned() };
    let normal = normalise(value);
    // The check of the annotation must let it through, and the parser take it.
    if !normal.is_empty() && valid(&without_blanks(value)) && valid(&normal) {
        return normal;
    }
    let sent = if default.is_empty() { "sends none".to_owned() } else { format!("sends `{default}`") };
    let help = if normal == "*" {
        "`*` is not supported here: list the names."
    } else {
        "Write names separated by commas."
    };
    findings.warn(
        "annotation-default",
        (field, None),
        format!("nginx ignores `{}` and {sent}", value.escape_debug()),
        help,
    );
    default.to_owned()
}

/// As Go's `strconv.ParseBool`.
fn boolean(findings: &mut Findings, field: &'static str, value: Option<&str>, default: bool) -> bool {
    match value {
        None => default,
        Some("1" | "t" | "T" | "true" | "TRUE" | "True") => true,
        Some("0" | "f" | "F" | "false" | "FALSE" | "False") => false,
        Some(other) => {
            findings.warn(
                "annotation-default",
                (field, None),
                format!("nginx ignores `{}`, so it is \"{default}\"", other.escape_debug()),
                "Write \"true\" or \"false\".",
            );
            default
        }
    }
}

/// As Go's `strconv.Atoi`.
fn integer(findings: &mut Findings, field: &'static str, value: Option<&str>, default: i64) -> i64 {
    match value.map(|v| v.parse::<i64>().map_err(|_| v)) {
        None => default,
        Some(Ok(number)) => number,
        Some(Err(other)) => {
            findings.warn(
                "annotation-default",
                (field, None),
                format!("nginx ignores `{}`, so it is {default}", other.escape_debug()),
                "Write whole seconds.",
            );
            default
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn annotations_are_checked_as_written() {
        let read = |name: &str, value: &str| {
            let annotations =
                [("enable-cors", "true"), (name, value)].map(|(n, v)| (n.to_owned(), v.to_owned())).into();
            Config::read(&annotations, &mut Findings::default())
        };
        for (name, value, kept) in [
            // Numbers and booleans as Go reads them: with blanks they are none.
            ("cors-max-age", "600", true),
            ("cors-max-age", " 600", false),
            ("cors-max-age", "600\n", false),
            ("cors-allow-credentials", "false", true),
            ("cors-allow-credentials", "false ", false),
            // The check sees lists without blanks, but with all else that trimming would take away.
            ("cors-allow-origin", " https://a.example ", true),
            ("cors-allow-origin", "\thttps://a.example", false),
            ("cors-allow-origin", "https://a.example\n", false),
            ("cors-allow-headers", " x-a ", true),
            ("cors-allow-headers", "x-a\t", false),
            ("cors-allow-methods", " PUT ", true),
            ("cors-allow-methods", "PUT\t", true),
            ("cors-allow-methods", "\tPUT", false),
            ("cors-allow-methods", "GET,  PUT", false),
            ("cors-expose-headers", " x-a", true),
            ("cors-expose-headers", "\tx-a", false),
        ] {
            let default = read("unrelated", "");
            assert_eq!(read(name, value) != default, kept, "{name}: {value:?}");
        }
        assert!(read("enable-cors", "true").enabled);
        for value in [" true", "true\n", "\ttrue"] {
            assert!(!read("enable-cors", value).enabled, "{value:?}");
        }
    }

    #[test]
    fn control_characters_within_a_list_pass() {
        for (name, value, broken) in [
            ("cors-allow-methods", "GET,\tPUT", true),
            ("cors-allow-methods", "GET,\nPUT", true),
            ("cors-allow-methods", "PUT\n", true),
            ("cors-expose-headers", "x-a,\nx-b", true),
            // Not taken at all.
            ("cors-allow-headers", "x-a,\nx-b", false),
            ("cors-allow-methods", "GET,\n\nPUT", false),
        ] {
            let annotations =
                [("enable-cors", "true"), (name, value)].map(|(n, v)| (n.to_owned(), v.to_owned())).into();
            let (rules, findings) = validate(&annotations);
            let gate = rules.expect("imported annotations are never refused").0.gate;
            assert_eq!(gate, broken.then_some(PassReason::Unsupported), "{name}: {value:?}");
            assert_eq!(findings.iter().any(|f| f.code == "annotation-control"), broken, "{name}: {value:?}");
        }
    }
}
