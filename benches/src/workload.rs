//! The request that everything is measured with: a preflight as Chrome sends it, and what its answer must hold.
#![forbid(unsafe_code)]

use memchr::memmem;

/// Length of every keep-alive request in bytes.
pub const REQUEST_LEN: usize = 537;

/// One preflight, ready to send, and the origin that its answer must allow.
#[derive(Clone, Debug)]
pub struct Request {
    /// For a connection that stays open: [`REQUEST_LEN`] bytes.
    pub keep_alive: Vec<u8>,
    /// The same with `Connection: close`.
    pub close: Vec<u8>,
    /// What the answer says after its `Access-Control-Allow-Origin:`, with blank and line end.
    allowed: Vec<u8>,
}

impl Request {
    /// A preflight of Chrome's for `host` and `path` on behalf of a script from `origin` that wants to PUT JSON. Short
    /// paths are filled up with a query to [`REQUEST_LEN`].
    ///
    /// # Panics
    /// Host, path and origin are too long for that.
    pub fn new(host: &str, path: &str, origin: &str) -> Self {
        let head = |query: &str, connection: &str| {
            format!(
                "OPTIONS {path}{query} HTTP/1.1\r\nHost: {host}\r\nConnection: {connection}\r\nAccept: */*\r\n\
                 Access-Control-Request-Method: PUT\r\nAccess-Control-Request-Headers: authorization,content-type\r\n\
                 Origin: {origin}\r\nUser-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) \
                 Chrome/142.0.0.0 Safari/537.36\r\nSec-Fetch-Mode: cors\r\nSec-Fetch-Site: same-site\r\n\
                 Sec-Fetch-Dest: empty\r\nReferer: {origin}/\r\nAccept-Encoding: gzip, deflate\r\n\
                 Accept-Language: en-US,en;q=0.9\r\n\r\n"
            )
        };
        let spare =
            REQUEST_LEN.checked_sub(head("?q=", "keep-alive").len()).expect("the request is too long");
        let query = format!("?q={}", "x".repeat(spare));
        Self {
            keep_alive: head(&query, "keep-alive").into_bytes(),
            close: head(&query, "close").into_bytes(),
            allowed: format!(" {origin}\r\n").into_bytes(),
        }
    }

    /// Whether `response`, a whole head, is a preflight's success for this request: status 200 or 204, no body, the origin.
    pub fn accepts(&self, response: &[u8]) -> bool {
        let status = response.get(..13);
        (status == Some(b"HTTP/1.1 204 ")
            || status == Some(b"HTTP/1.1 200 ") && memmem::find(response, b"ontent-length: 0\r\n").is_some())
            && memmem::find(response, &self.allowed).is_some()
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
