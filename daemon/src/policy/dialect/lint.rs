//! Findings that several dialects share: what the Fetch standard forbids, and what no browser honours.

use super::super::acrh::is_token;
use super::super::{Finding, Severity};

/// Chromium caches a preflight no longer than this many seconds, Firefox 86,400.
const CHROMIUM_CAP: i64 = 7200;
const FIREFOX_CAP: i64 = 86_400;

/// The findings of one policy as they come up.
#[derive(Debug, Default)]
pub(super) struct Findings(Vec<Finding>);

/// Where a finding is: field and position in its list.
pub(super) type Place = (&'static str, Option<usize>);

impl Findings {
    pub(super) fn add(
        &mut self,
        severity: Severity,
        code: &'static str,
        (field, item): Place,
        message: impl Into<String>,
        help: impl Into<String>,
    ) {
        self.0.push(Finding { severity, code, field, item, message: message.into(), help: help.into() });
    }

    pub(super) fn error(
        &mut self,
        code: &'static str,
        place: Place,
        message: impl Into<String>,
        help: impl Into<String>,
    ) {
        self.add(Severity::Error, code, place, message, help);
    }

    pub(super) fn warn(
        &mut self,
        code: &'static str,
        place: Place,
        message: impl Into<String>,
        help: impl Into<String>,
    ) {
        self.add(Severity::Warning, code, place, message, help);
    }

    /// The rules, unless an error refuses them.
    pub(super) fn finish<T>(self, rules: impl FnOnce() -> T) -> (Option<T>, Vec<Finding>) {
        let refused = self.0.iter().any(|f| f.severity == Severity::Error);
        ((!refused).then(rules), self.0)
    }
}

/// Methods that no browser lets a page use (Fetch §2.2.1).
pub(super) fn is_forbidden_method(method: &str) -> bool {
    ["CONNECT", "TRACE", "TRACK"].iter().any(|m| method.eq_ignore_ascii_case(m))
}

/// Request headers that no page may set (Fetch §2.2.2): they never stand in a preflight.
pub(super) fn is_forbidden_request_header(name: &str) -> bool {
    const NAMES: &[&str] = &[
        "accept-charset",
        "accept-encoding",
        "access-control-request-headers",
        "access-control-request-method",
        "access-control-request-private-network",
        "connection",
        "content-length",
        "cookie",
        "cookie2",
        "date",
        "dnt",
        "expect",
        "host",
        "keep-alive",
        "origin",
        "referer",
        "set-cookie",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "via",
    ];
    let name = name.to_ascii_lowercase();
    NAMES.contains(&&*name) || name.starts_with("proxy-") || name.starts_with("sec-")
}

/// Response headers of the CORS protocol, which make no sense in a request.
pub(super) fn is_response_only(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    matches!(
        &*name,
        "access-control-allow-origin"
            | "access-control-allow-methods"
            | "access-control-allow-headers"
            | "access-control-allow-credentials"
            | "access-control-allow-private-network"
            | "access-control-expose-headers"
            | "access-control-max-age"
    )
}

/// Request headers of the CORS protocol, which make no sense in a response.
pub(super) fn is_request_only(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    matches!(
        &*name,
        "origin"
            | "access-control-request-headers"
            | "access-control-request-method"
            | "access-control-request-private-network"
    )
}

/// Response headers that no page may read (Fetch §2.2.6).
pub(super) fn is_forbidden_response_header(name: &str) -> bool {
    ["set-cookie", "set-cookie2"].iter().any(|n| name.eq_ignore_ascii_case(n))
}

/// Methods that a page can never use, and such that differ from the usual only in case.
pub(super) fn methods<S: AsRef<str>>(
    findings: &mut Findings,
    severity: Severity,
    field: &'static str,
    list: &[S],
) {
    for (i, method) in list.iter().enumerate() {
        let method = method.as_ref();
        let place = (field, Some(i));
        if !is_token(method.as_bytes()) {
            findings.add(
                severity,
                "method-invalid",
                place,
                format!("`{}` is not a method name", method.escape_debug()),
                "Write one method per item, such as `PUT`.",
            );
        } else if is_forbidden_method(method) {
            findings.add(
                severity,
                "method-forbidden",
                place,
                format!("no browser lets a page use {method}"),
                "Remove it.",
            );
        } else if method.bytes().any(|b| b.is_ascii_lowercase())
            && ["DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"]
                .contains(&&*method.to_ascii_uppercase())
        {
            findings.warn(
                "method-case",
                place,
                format!("methods are case-sensitive: `{method}` is not `{}`", method.to_ascii_uppercase()),
                format!("Write `{}`.", method.to_ascii_uppercase()),
            );
        }
    }
}

/// Request headers that a page can never set.
pub(super) fn request_headers<S: AsRef<str>>(
    findings: &mut Findings,
    severity: Severity,
    field: &'static str,
    list: &[S],
) {
    for (i, name) in list.iter().enumerate() {
        let name = name.as_ref();
        let place = (field, Some(i));
        if !is_token(name.as_bytes()) {
            findings.add(
                severity,
                "header-invalid",
                place,
                format!("`{}` is not a header name", name.escape_debug()),
                "Write one name per item, such as `x-requested-with`.",
            );
        } else if is_response_only(name) {
            findings.add(
                severity,
                "header-response-only",
                place,
                format!("`{name}` is a response header of the CORS protocol"),
                "Remove it: preflightd sends it where it belongs.",
            );
        } else if is_forbidden_request_header(name) {
            findings.add(
                severity,
                "header-forbidden",
                place,
                format!("no page can set `{name}`, so no preflight ever asks for it"),
                "Remove it.",
            );
        }
    }
}

/// Response headers that a page can never read.
pub(super) fn expose<S: AsRef<str>>(
    findings: &mut Findings,
    severity: Severity,
    field: &'static str,
    list: &[S],
    credentials: bool,
) {
    for (i, name) in list.iter().enumerate() {
        let name = name.as_ref();
        let place = (field, Some(i));
        if name == "*" && credentials {
            findings.add(
                severity,
                "expose-star-credentials",
                place,
                "with credentials `*` is no wildcard but a header of that name",
                "List the names, or turn credentials off.",
            );
        } else if !is_token(name.as_bytes()) {
            findings.add(
                severity,
                "expose-invalid",
                place,
                format!("`{}` is not a header name", name.escape_debug()),
                "Write one name per item, such as `x-request-id`.",
            );
        } else if is_forbidden_response_header(name) {
            findings.add(
                severity,
                "expose-forbidden",
                place,
                format!("no page may read `{name}`"),
                "Remove it.",
            );
        } else if is_request_only(name) {
            findings.add(
                severity,
                "expose-request-only",
                place,
                format!("`{name}` is a request header"),
                "Remove it.",
            );
        }
    }
}

/// A max-age that browsers cut off.
pub(super) fn max_age(findings: &mut Findings, field: &'static str, seconds: i64) {
    let capped = if seconds > FIREFOX_CAP {
        "Chromium caches 7200 seconds at most, Firefox 86400"
    } else if seconds > CHROMIUM_CAP {
        "Chromium caches 7200 seconds at most"
    } else {
        return;
    };
    findings.warn(
        "max-age-browser-cap",
        (field, None),
        format!("{seconds} s is cut off: {capped}"),
        "7200 or less works alike everywhere.",
    );
}
