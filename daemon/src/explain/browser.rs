//! What a browser makes of an answer: the Fetch standard's CORS-preflight fetch (§4.8), step by step.

use crate::{http::PreflightHead, policy::is_token};
use serde::{Deserialize, Serialize};

/// Why a browser would refuse the real request; empty lists: it goes on.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Browser {
    /// Credentials mode `omit` or `same-origin`.
    pub without_credentials: Vec<String>,
    /// Credentials mode `include`.
    pub with_credentials: Vec<String>,
    /// Good to know.
    pub notes: Vec<String>,
}

impl Browser {
    /// It goes on, at least without credentials.
    pub fn allows(&self) -> bool {
        self.without_credentials.is_empty()
    }
}

/// Judges an answer to a preflight.
pub(crate) fn judge(asked: &PreflightHead<'_>, answer: &[u8]) -> Browser {
    let mut lines = [httparse::EMPTY_HEADER; 32];
    let mut response = httparse::Response::new(&mut lines);
    if !matches!(response.parse(answer), Ok(httparse::Status::Complete(_))) {
        let why = vec!["the answer is not well-formed HTTP/1".to_owned()];
        return Browser { without_credentials: why.clone(), with_credentials: why, notes: Vec::new() };
    }
    let status = response.code.unwrap_or(0);
    let mut notes = Vec::new();
    if matches!(asked.method, b"GET" | b"HEAD" | b"POST") && requested_headers(asked).next().is_none() {
        notes.push(format!(
            "for a plain {} without further headers a browser sends no preflight",
            asked.method.escape_ascii()
        ));
    }
    Browser {
        without_credentials: refusals(asked, status, response.headers, false),
        with_credentials: refusals(asked, status, response.headers, true),
        notes,
    }
}

fn refusals(
    asked: &PreflightHead<'_>,
    status: u16,
    answer: &[httparse::Header<'_>],
    credentials: bool,
) -> Vec<String> {
    let mut why = Vec::new();
    cors_check(asked, answer, credentials, &mut why);
    if !(200..=299).contains(&status) {
        why.push(format!("the status {status} is not 200 to 299"));
    }
    if !why.is_empty() {
        return why;
    }
    let (Some(methods), Some(headers)) =
        (list(answer, "access-control-allow-methods"), list(answer, "access-control-allow-headers"))
    else {
        why.push("Access-Control-Allow-Methods or -Headers is not a list of tokens".to_owned());
        return why;
    };
    let method = asked.method.escape_ascii();
    let any = |list: &[&str]| !credentials && list.contains(&"*");
    if !matches!(asked.method, b"GET" | b"HEAD" | b"POST")
        && !methods.iter().any(|m| m.as_bytes() == asked.method)
        && !any(&methods)
    {
        why.push(if methods.iter().any(|m| m.as_bytes().eq_ignore_ascii_case(asked.method)) {
            format!(
                "Access-Control-Allow-Methods lists {method} in another case, and methods are case-sensitive"
            )
        } else if credentials && methods.contains(&"*") {
            format!("Access-Control-Allow-Methods is `*`, which does not cover {method} with credentials")
        } else {
            format!("Access-Control-Allow-Methods does not list {method}")
        });
    }
    for name in requested_headers(asked) {
        if headers.iter().any(|h| h.as_bytes().eq_ignore_ascii_case(name)) {
            continue;
        }
        let shown = name.escape_ascii();
        if name.eq_ignore_ascii_case(b"authorization") && headers.contains(&"*") {
            why.push("Access-Control-Allow-Headers must name authorization: `*` never covers it".to_owned());
        } else if credentials && headers.contains(&"*") {
            why.push(format!(
                "Access-Control-Allow-Headers is `*`, which does not cover {shown} with credentials"
            ));
        } else if !any(&headers) {
            why.push(format!("Access-Control-Allow-Headers does not list {shown}"));
        }
    }
    why
}

/// The CORS check (Fetch §4.10).
fn cors_check(
    asked: &PreflightHead<'_>,
    answer: &[httparse::Header<'_>],
    credentials: bool,
    why: &mut Vec<String>,
) {
    let origins: Vec<_> = values(answer, "access-control-allow-origin").collect();
    match origins[..] {
        [] => why.push("there is no Access-Control-Allow-Origin".to_owned()),
        [b"*"] if !credentials => {}
        [b"*"] => {
            why.push("Access-Control-Allow-Origin is `*`, which does not do with credentials".to_owned());
        }
        [origin] if origin == asked.origin => {
            if credentials {
                let allow: Vec<_> = values(answer, "access-control-allow-credentials").collect();
                if allow[..] != [&b"true"[..]] {
                    why.push("Access-Control-Allow-Credentials is not `true`".to_owned());
                }
            }
        }
        [origin] => why.push(format!(
            "Access-Control-Allow-Origin is `{}`, not `{}`",
            origin.escape_ascii(),
            asked.origin.escape_ascii()
        )),
        _ => why.push("there are several Access-Control-Allow-Origin lines".to_owned()),
    }
}

pub(crate) fn values<'a>(
    answer: &'a [httparse::Header<'_>],
    name: &'static str,
) -> impl Iterator<Item = &'a [u8]> {
    answer.iter().filter(move |h| h.name.eq_ignore_ascii_case(name)).map(|h| h.value.trim_ascii())
}

/// A list of tokens over all lines (Fetch "extract header list values"); `None`: not parsable.
pub(crate) fn list<'a>(answer: &'a [httparse::Header<'_>], name: &'static str) -> Option<Vec<&'a str>> {
    let mut list = Vec::new();
    for value in values(answer, name) {
        for token in std::str::from_utf8(value).ok()?.split(',') {
            let token = token.trim_matches([' ', '\t']);
            if token.is_empty() {
                continue;
            }
            if !is_token(token.as_bytes()) {
                return None;
            }
            list.push(token);
        }
    }
    Some(list)
}

fn requested_headers<'a>(asked: &'a PreflightHead<'_>) -> impl Iterator<Item = &'a [u8]> {
    asked
        .headers
        .iter()
        .flat_map(|line| line.split(|b| *b == b','))
        .map(<[u8]>::trim_ascii)
        .filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::{Head, HeadLimits, HeadReader};

    #[test]
    fn judges_as_fetch_does() {
        const OK: &str = "";
        // Asked: origin https://a.example, PUT, these headers. Answer lines. Refusals without and with credentials.
        for (name, headers, answer, without, with) in [
            ("nothing", "", "", "no Access-Control-Allow-Origin", "no Access-Control-Allow-Origin"),
            ("all listed", "x-a", "O: A|C: true|M: PUT|H: X-A", OK, OK),
            ("no credentials", "x-a", "O: A|M: PUT|H: X-A", OK, "Allow-Credentials is not `true`"),
            ("wildcards", "x-a", "O: *|M: *|H: *", OK, "Allow-Origin is `*`"),
            ("wildcard method", "", "O: A|C: true|M: *", OK, "is `*`, which does not cover PUT"),
            ("wildcard header", "x-a", "O: A|C: true|M: PUT|H: *", OK, "does not cover x-a"),
            (
                "authorization",
                "authorization",
                "O: *|M: *|H: *",
                "must name authorization",
                "Allow-Origin is `*`",
            ),
            (
                "authorization named",
                "authorization",
                "O: *|M: *|H: *, Authorization",
                OK,
                "Allow-Origin is `*`",
            ),
            ("method", "", "O: A|M: DELETE", "does not list PUT", "Allow-Credentials"),
            ("method in lower case", "", "O: A|M: put", "another case", "Allow-Credentials"),
            ("header", "x-a,x-b", "O: A|M: PUT|H: x-a", "does not list x-b", "Allow-Credentials"),
            (
                "other origin",
                "",
                "O: https://b.example",
                "not `https://a.example`",
                "not `https://a.example`",
            ),
            ("two origins", "", "O: A|O: A", "several", "several"),
            ("credentials True", "", "O: A|C: True|M: PUT", OK, "Allow-Credentials is not `true`"),
            ("bad list", "", "O: A|M: PUT GET", "not a list", "Allow-Credentials"),
        ] {
            let request = format!(
                "OPTIONS / HTTP/1.1\r\nHost: h\r\nOrigin: https://a.example\r\nAccess-Control-Request-Method: \
                 PUT\r\nAccess-Control-Request-Headers: {headers}\r\n\r\n"
            );
            let Head::Preflight(asked) =
                HeadReader::new().read(request.as_bytes(), HeadLimits { max_bytes: 4096 })
            else {
                panic!("{name}: no preflight");
            };
            let mut lines = String::new();
            for line in answer.split('|').filter(|l| !l.is_empty()) {
                let line = line.replace(": A", ": https://a.example");
                let names =
                    [("O:", "Origin:"), ("C:", "Credentials:"), ("M:", "Methods:"), ("H:", "Headers:")];
                let (short, long) = names.iter().find(|(short, _)| line.starts_with(short)).expect("a name");
                lines += &["Access-Control-Allow-", long, &line[short.len()..], "\r\n"].concat();
            }
            let got = judge(&asked, format!("HTTP/1.1 204 No Content\r\n{lines}\r\n").as_bytes());
            for (how, got, want) in
                [("without", got.without_credentials, without), ("with", got.with_credentials, with)]
            {
                let got = got.join("; ");
                let fits = if want.is_empty() { got.is_empty() } else { got.contains(want) };
                assert!(fits, "{name}, {how}: {got:?}, want {want:?}");
            }
        }
    }

    #[test]
    fn a_bad_status_is_refused() {
        let request =
            b"OPTIONS / HTTP/1.1\r\nHost: h\r\nOrigin: o\r\nAccess-Control-Request-Method: GET\r\n\r\n";
        let Head::Preflight(asked) = HeadReader::new().read(request, HeadLimits { max_bytes: 4096 }) else {
            panic!("no preflight");
        };
        let got = judge(&asked, b"HTTP/1.1 403 Forbidden\r\nAccess-Control-Allow-Origin: o\r\n\r\n");
        assert_eq!(got.without_credentials, ["the status 403 is not 200 to 299"]);
        assert_eq!(got.notes.len(), 1, "a plain GET has no preflight");
        assert!(!judge(&asked, b"nonsense").allows());
    }
}
