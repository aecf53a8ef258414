//! The requests that everything is measured with: a preflight as Chrome sends it, beside it a GET, and what their answers
//! must hold.
#![forbid(unsafe_code)]

use memchr::memmem;

/// Length of every keep-alive request in bytes.
pub const REQUEST_LEN: usize = 537;

/// What differs between two preflights of Chrome's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chrome<'a> {
    pub(crate) host: &'a str,
    /// Path and query.
    pub(crate) target: &'a str,
    pub(crate) origin: &'a str,
    /// Of the request that is to follow.
    pub(crate) method: &'a str,
    /// Of the same, as Chrome lists them; empty: it says nothing of them.
    pub(crate) headers: &'a str,
    /// In the `User-Agent`, as is the next.
    pub(crate) platform: &'a str,
    pub(crate) version: &'a str,
    pub(crate) languages: &'a str,
}

impl Chrome<'_> {
    /// The whole request.
    pub(crate) fn head(&self, connection: &str) -> String {
        let Self { host, target, origin, method, headers, platform, version, languages } = self;
        let (name, end) =
            if headers.is_empty() { ("", "") } else { ("Access-Control-Request-Headers: ", "\r\n") };
        format!(
            "OPTIONS {target} HTTP/1.1\r\nHost: {host}\r\nConnection: {connection}\r\nAccept: */*\r\n\
             Access-Control-Request-Method: {method}\r\n{name}{headers}{end}Origin: {origin}\r\n\
             User-Agent: Mozilla/5.0 ({platform}) AppleWebKit/537.36 (KHTML, like Gecko) {version} Safari/537.36\r\n\
             Sec-Fetch-Mode: cors\r\nSec-Fetch-Site: same-site\r\nSec-Fetch-Dest: empty\r\nReferer: {origin}/\r\n\
             Accept-Encoding: gzip, deflate\r\nAccept-Language: {languages}\r\n\r\n"
        )
    }
}

/// One request, ready to send, and what its answer must hold.
#[derive(Clone, Debug)]
pub struct Request {
    /// For a connection that stays open: [`REQUEST_LEN`] bytes if it is a preflight.
    pub keep_alive: Vec<u8>,
    /// The same with `Connection: close`.
    pub close: Vec<u8>,
    wanted: Wanted,
}

#[derive(Clone, Debug)]
enum Wanted {
    /// What a preflight's answer says after its `Access-Control-Allow-Origin:`, with blank and line end.
    Allowed(Vec<u8>),
    /// The body.
    Body(&'static [u8]),
}

impl Request {
    /// A preflight of Chrome's for `host` and `path` on behalf of a script from `origin` that wants to PUT JSON. Short
    /// paths are filled up with a query to [`REQUEST_LEN`].
    ///
    /// # Panics
    /// Host, path and origin are too long for that.
    pub fn new(host: &str, path: &str, origin: &str) -> Self {
        let head = |query: &str, connection: &str| {
            let preflight = Chrome {
                host,
                target: &format!("{path}{query}"),
                origin,
                method: "PUT",
                headers: "authorization,content-type",
                platform: "X11; Linux x86_64",
                version: "Chrome/142.0.0.0",
                languages: "en-US,en;q=0.9",
            };
            preflight.head(connection)
        };
        let spare =
            REQUEST_LEN.checked_sub(head("?q=", "keep-alive").len()).expect("the request is too long");
        let query = format!("?q={}", "x".repeat(spare));
        Self {
            keep_alive: head(&query, "keep-alive").into_bytes(),
            close: head(&query, "close").into_bytes(),
            wanted: Wanted::Allowed(format!(" {origin}\r\n").into_bytes()),
        }
    }

    /// A GET of `path` from `host`, whose answer is `body`: not empty, with nothing in it that could end a head.
    pub fn get(host: &str, path: &str, body: &'static str) -> Self {
        let head = |connection: &str| {
            format!(
                "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: {connection}\r\nAccept: */*\r\n\
                 User-Agent: Mozilla/5.0 (X11; Linux x86_64)\r\n\r\n"
            )
        };
        Self {
            keep_alive: head("keep-alive").into_bytes(),
            close: head("close").into_bytes(),
            wanted: Wanted::Body(body.as_bytes()),
        }
    }

    /// Whether `response`, what has come so far, is a whole one.
    pub fn is_whole(&self, response: &[u8]) -> bool {
        match &self.wanted {
            Wanted::Allowed(_) => response.ends_with(b"\r\n\r\n"),
            Wanted::Body(body) => {
                response.strip_suffix(*body).is_some_and(|head| head.ends_with(b"\r\n\r\n"))
            }
        }
    }

    /// Whether `response`, a whole one, is success for this request; for a preflight: status 200 or 204, no body, the origin.
    pub fn accepts(&self, response: &[u8]) -> bool {
        let status = response.get(..13);
        match &self.wanted {
            Wanted::Allowed(origin) => {
                (status == Some(b"HTTP/1.1 204 ")
                    || status == Some(b"HTTP/1.1 200 ")
                        && memmem::find(response, b"ontent-length: 0\r\n").is_some())
                    && memmem::find(response, origin).is_some()
            }
            Wanted::Body(_) => status == Some(b"HTTP/1.1 200 "),
        }
    }
}

/// Whether `response` says that the server closes the connection after it.
pub fn says_close(response: &[u8]) -> bool {
    memmem::find(response, b"onnection: close\r\n").is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_as_long_as_promised_and_differs_in_the_connection_only() {
        let request = Request::new("api.example.com", "/v1/orders", "https://app.example.com");
        assert_eq!(request.keep_alive.len(), REQUEST_LEN);
        let keep = String::from_utf8(request.keep_alive).expect("text");
        assert_eq!(keep.replace("Connection: keep-alive", "Connection: close").as_bytes(), request.close);
    }

    #[test]
    fn a_get_is_answered_by_its_body() {
        let request = Request::get("h", "/", "hello\n");
        for (name, response, whole, good) in [
            ("head only", "HTTP/1.1 200 OK\r\n\r\n", false, true),
            ("no head's end", "HTTP/1.1 200 OK\r\nhello\n", false, true),
            ("whole", "HTTP/1.1 200 OK\r\n\r\nhello\n", true, true),
            ("refused", "HTTP/1.1 503 Busy\r\n\r\nhello\n", true, false),
        ] {
            assert_eq!(request.is_whole(response.as_bytes()), whole, "{name}");
            assert_eq!(request.accepts(response.as_bytes()), good, "{name}");
        }
    }

    #[test]
    fn accepts_only_success_for_its_own_origin() {
        let request = Request::new("h", "/", "https://app.example.com");
        for (name, response, good) in [
            (
                "204",
                "HTTP/1.1 204 No Content\r\nAccess-Control-Allow-Origin: https://app.example.com\r\n\r\n",
                true,
            ),
            (
                "empty 200",
                "HTTP/1.1 200 OK\r\naccess-control-allow-origin: https://app.example.com\r\ncontent-length: 0\r\n\r\n",
                true,
            ),
            (
                "200 with a body",
                "HTTP/1.1 200 OK\r\nx: https://app.example.com\r\ncontent-length: 5\r\n\r\n",
                false,
            ),
            ("403", "HTTP/1.1 403 Forbidden\r\n\r\n", false),
            (
                "another origin",
                "HTTP/1.1 204 No Content\r\nAccess-Control-Allow-Origin: https://a.com\r\n\r\n",
                false,
            ),
            ("too short", "HTTP", false),
        ] {
            assert_eq!(request.accepts(response.as_bytes()), good, "{name}");
        }
    }
}
