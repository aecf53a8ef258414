//! The few error responses of our own: only where a request cannot be passed on.
#![forbid(unsafe_code)]

/// Errors that end a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorResponse {
    /// 400: malformed, and there is no upstream to pass it to.
    BadRequest,
    /// 408: the head did not come in time (RFC 9110 §15.5.9).
    RequestTimeout,
    /// 421: not a preflight of ours, and there is no upstream (RFC 9110 §15.5.20).
    Misdirected,
    /// 421: not a preflight that we have a policy for, and the proxy takes it on another connection.
    ComeAgain,
    /// 431: the head is too large, and there is no upstream (RFC 6585 §5).
    HeadTooLarge,
    /// 502: the upstream cannot be reached.
    BadGateway,
    /// 503: too many connections to relay.
    Overloaded,
}

impl ErrorResponse {
    /// Appends the whole response with `Connection: close`, `Date`, a short plain-text body that says what and why.
    pub fn render(self, date: &[u8; 29], out: &mut Vec<u8>) {
        let (status, body) = self.texts();
        let length = body.len().to_string();
        for piece in [
            b"HTTP/1.1 ",
            status.as_bytes(),
            b"\r\nDate: ",
            date,
            b"\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: ",
            length.as_bytes(),
            b"\r\nConnection: close\r\n\r\n",
            body.as_bytes(),
        ] {
            out.extend_from_slice(piece);
        }
    }

    /// Status line without the version, and body.
    fn texts(self) -> (&'static str, &'static str) {
        match self {
            ErrorResponse::BadRequest => (
                "400 Bad Request",
                "preflightd: the request is malformed, and no upstream is configured that could judge it.\n\
                 Send a well-formed HTTP/1.1 request (RFC 9112).\n",
            ),
            ErrorResponse::RequestTimeout => (
                "408 Request Timeout",
                "preflightd: the head of the request did not arrive in time.\n\
                 Open a new connection and send the request at once.\n",
            ),
            ErrorResponse::Misdirected => (
                "421 Misdirected Request",
                "preflightd: this address answers CORS preflights, this request is none that it has a policy for, \
                 and no upstream is configured that could take it.\n\
                 Send it to the server itself, or set an upstream for this listener.\n",
            ),
            ErrorResponse::ComeAgain => (
                "421 Misdirected Request",
                "preflightd: the proxy behind this address will answer this request, but not on this connection.\n\
                 Open a new connection and send it again (RFC 9110, section 15.5.20).\n",
            ),
            ErrorResponse::HeadTooLarge => (
                "431 Request Header Fields Too Large",
                "preflightd: the head of the request is too large, and no upstream is configured that could take it.\n\
                 Send fewer or shorter headers.\n",
            ),
            ErrorResponse::BadGateway => (
                "502 Bad Gateway",
                "preflightd: the upstream behind it cannot be reached.\n\
                 Try again; if it lasts, preflightd's log names the upstream and the cause.\n",
            ),
            ErrorResponse::Overloaded => (
                "503 Service Unavailable",
                "preflightd: it relays as many connections as it may.\n\
                 Try again in a moment; if it lasts, raise the limit on relayed connections.\n",
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::date::imf_fixdate;

    #[test]
    fn renders_whole_responses() {
        for (error, status) in [
            (ErrorResponse::BadRequest, "400 Bad Request"),
            (ErrorResponse::RequestTimeout, "408 Request Timeout"),
            (ErrorResponse::Misdirected, "421 Misdirected Request"),
            (ErrorResponse::ComeAgain, "421 Misdirected Request"),
            (ErrorResponse::HeadTooLarge, "431 Request Header Fields Too Large"),
            (ErrorResponse::BadGateway, "502 Bad Gateway"),
            (ErrorResponse::Overloaded, "503 Service Unavailable"),
        ] {
            let mut out = b"before".to_vec();
            error.render(&imf_fixdate(784_111_777), &mut out);
            let mut lines = [httparse::EMPTY_HEADER; 8];
            let mut response = httparse::Response::new(&mut lines);
            let response_bytes = out.strip_prefix(b"before").expect(status);
            let httparse::Status::Complete(len) = response.parse(response_bytes).expect(status) else {
                panic!("{status}: no end");
            };
            let body = &response_bytes[len..];
            let value = |name: &str| {
                let values: Vec<_> = response.headers.iter().filter(|h| h.name == name).collect();
                assert_eq!(values.len(), 1, "{status}: {name}");
                values[0].value.to_vec()
            };
            assert!(response_bytes.starts_with(format!("HTTP/1.1 {status}\r\n").as_bytes()), "{status}");
            assert_eq!(value("Date"), b"Sun, 06 Nov 1994 08:49:37 GMT", "{status}");
            assert_eq!(value("Connection"), b"close", "{status}");
            assert_eq!(value("Content-Length"), body.len().to_string().as_bytes(), "{status}");
            assert!(body.starts_with(b"preflightd: ") && body.ends_with(b".\n"), "{status}");
        }
    }
}
