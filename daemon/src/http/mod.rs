//! HTTP/1 heads: what is a complete, unambiguous preflight, and what is not ours.
//!
//! [`HeadReader`] finds the end of a head that arrives in pieces and lets httparse read it once; `judge` then asks of
//! every line whether a browser would send it and whether all proxies read it alike. What either of them doubts passes.
#![forbid(unsafe_code)]

use crate::{policy::Connection, reason::PassReason};
use arrayvec::ArrayVec;
use preflightd_common::preflight::{FirstBytes, classify};
use std::mem::MaybeUninit;

pub mod date;
pub mod error;
mod judge;
#[cfg(test)]
mod reference;

/// More `Access-Control-Request-Headers` lines than this pass to the proxy.
pub const MAX_REQUEST_HEADERS_LINES: usize = 32;

/// More header lines than this pass to the proxy ([`PassReason::HeadTooLarge`]).
pub const MAX_HEADER_LINES: usize = 64;

/// Bounds of a head.
#[derive(Clone, Copy, Debug)]
pub struct HeadLimits {
    /// Request line and headers with the empty line, in bytes.
    pub max_bytes: usize,
}

/// A complete preflight head. All slices point into the read buffer.
#[derive(Clone, Debug)]
pub struct PreflightHead<'a> {
    /// `Host` value: visible ASCII, not empty.
    pub host: &'a [u8],
    /// Origin-form target: unambiguous path, then maybe a query.
    pub target: &'a [u8],
    /// `Origin` value: visible ASCII, not empty.
    pub origin: &'a [u8],
    /// `Access-Control-Request-Method` value: a token.
    pub method: &'a [u8],
    /// `Access-Control-Request-Headers` values in order.
    pub headers: ArrayVec<&'a [u8], MAX_REQUEST_HEADERS_LINES>,
    /// `Access-Control-Request-Private-Network: true`.
    pub private_network: bool,
    /// What becomes of the connection after the answer.
    pub connection: Connection,
    /// Length of the head in bytes: the next request begins here.
    pub len: usize,
}

/// What the bytes so far are.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "it lives for one decision on the stack; a box would allocate")]
pub enum Head<'a> {
    /// May still become a preflight: read on.
    Incomplete,
    /// A complete one.
    Preflight(PreflightHead<'a>),
    /// Not ours to answer: every byte goes to the proxy.
    Pass(PassReason),
}

/// Reads one head that arrives in pieces; total work is linear in its length however it is split.
///
/// What comes out does not depend on the pieces: the first byte that decides, decides, whenever it arrives.
#[derive(Clone, Copy, Debug, Default)]
pub struct HeadReader {
    /// Bytes that were already searched for the end.
    scanned: usize,
    /// The request line was complete and of a version that we speak.
    request_line_seen: bool,
}

impl HeadReader {
    /// A reader at the start of a request.
    pub fn new() -> Self {
        Self::default()
    }

    /// Looks at all bytes of the request so far (`buf` begins where the request begins and only ever grows).
    /// After [`Head::Preflight`] or [`Head::Pass`] start anew with [`HeadReader::new`].
    pub fn read<'a>(&mut self, buf: &'a [u8], limits: HeadLimits) -> Head<'a> {
        match classify(buf) {
            FirstBytes::Other => return Head::Pass(PassReason::NotOptions),
            FirstBytes::Undecided => return Head::Incomplete,
            FirstBytes::Options => {}
        }
        let window = &buf[..buf.len().min(limits.max_bytes)];
        // The usual read ends with the head, or with one pipelined behind it: then there is nothing to search for.
        let complete = if window.ends_with(b"\r\n\r\n") {
            window
        } else {
            match self.scan(window) {
                Scan::End(len) => &window[..len],
                Scan::Pass(reason) => return Head::Pass(reason),
                Scan::More if window.len() < limits.max_bytes => return Head::Incomplete,
                Scan::More => return Head::Pass(PassReason::HeadTooLarge),
            }
        };
        let mut lines = [const { MaybeUninit::uninit() }; MAX_HEADER_LINES];
        let mut request = httparse::Request::new(&mut []);
        match parse(complete, &mut request, &mut lines) {
            Ok(len) => judge::preflight(&request, len),
            Err(error) => Head::Pass(why_refused(complete, error)),
        }
    }

    /// Searches on for the empty line, and for what passes before it comes.
    fn scan(&mut self, window: &[u8]) -> Scan {
        for lf in memchr::memchr_iter(b'\n', &window[self.scanned..]).map(|at| self.scanned + at) {
            let Some(line) = window[..lf].strip_suffix(b"\r") else {
                return Scan::Pass(PassReason::BareLf);
            };
            if !self.request_line_seen {
                // Here rather than at the end: who speaks HTTP/0.9 sends no more and waits.
                if let Some(reason) = judge::version(line) {
                    return Scan::Pass(reason);
                }
                self.request_line_seen = true;
            } else if line.ends_with(b"\r\n") {
                return Scan::End(lf + 1);
            }
        }
        self.scanned = window.len();
        Scan::More
    }
}

enum Scan {
    /// Length of the head.
    End(usize),
    Pass(PassReason),
    More,
}

/// Parses a complete head and gives its length; what stands behind it is left alone.
///
/// httparse is lenient where RFC 9112 §2.2 allows it: it skips empty lines in front (the first bytes were checked) and
/// takes a bare LF for the end of a line. All other CRs it refuses, so each line ended in CRLF if there are as many CRs
/// as lines.
#[inline]
fn parse<'h, 'a>(
    buf: &'a [u8],
    request: &mut httparse::Request<'h, 'a>,
    lines: &'h mut [MaybeUninit<httparse::Header<'a>>],
) -> Result<usize, httparse::Error> {
    let httparse::Status::Complete(len) = request.parse_with_uninit_headers(buf, lines)? else {
        return Err(httparse::Error::NewLine);
    };
    if memchr::memchr_iter(b'\r', &buf[..len]).count() != request.headers.len() + 2 {
        return Err(httparse::Error::NewLine);
    }
    Ok(len)
}

/// Why [`parse`] refused: what a scan from the start finds first, else what is wrong with a line.
#[cold]
fn why_refused(complete: &[u8], error: httparse::Error) -> PassReason {
    match HeadReader::new().scan(complete) {
        Scan::End(len) => judge::malformed(&complete[..len], error),
        Scan::Pass(reason) => reason,
        Scan::More => PassReason::MalformedHead,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMITS: HeadLimits = HeadLimits { max_bytes: 4096 };

    /// What Chrome 140 sends.
    const CHROME: &str = "OPTIONS /v1/orders/42?expand=lines HTTP/1.1\r\n\
        Host: api.shop.example\r\n\
        Connection: keep-alive\r\n\
        Accept: */*\r\n\
        Access-Control-Request-Method: PUT\r\n\
        Access-Control-Request-Headers: authorization,content-type,x-request-id\r\n\
        Origin: https://www.shop.example\r\n\
        User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0.0.0 Safari/537.36\r\n\
        Sec-Fetch-Mode: cors\r\n\
        Sec-Fetch-Site: same-site\r\n\
        Sec-Fetch-Dest: empty\r\n\
        Referer: https://www.shop.example/\r\n\
        Accept-Encoding: gzip, deflate, br, zstd\r\n\
        Accept-Language: en-GB,en;q=0.9\r\n\r\n";

    /// The short preflight that most cases bend: `{}` stands for more header lines.
    fn with_lines(lines: &str) -> Vec<u8> {
        format!(
            "OPTIONS /a HTTP/1.1\r\nHost: h\r\nOrigin: https://o\r\nAccess-Control-Request-Method: PUT\r\n{lines}\r\n"
        )
        .into_bytes()
    }

    fn with_target(target: &str) -> Vec<u8> {
        String::from_utf8(with_lines("")).expect("ASCII").replacen("/a", target, 1).into_bytes()
    }

    fn with(from: &str, to: &str) -> Vec<u8> {
        let whole = String::from_utf8(with_lines("")).expect("ASCII");
        assert!(whole.contains(from), "{from}");
        whole.replacen(from, to, 1).into_bytes()
    }

    /// The head after each piece has arrived, as a worker reads it: the first answer other than `Incomplete`.
    fn read_in_pieces(bytes: &[u8], ends: impl IntoIterator<Item = usize>, limits: HeadLimits) -> String {
        let mut reader = HeadReader::new();
        for end in ends.into_iter().chain([bytes.len()]) {
            let head = reader.read(&bytes[..end], limits);
            if !matches!(head, Head::Incomplete) {
                return format!("{head:?}");
            }
        }
        "Incomplete".into()
    }

    fn agrees_with_reference(bytes: &[u8]) {
        let ours = match HeadReader::new().read(bytes, LIMITS) {
            Head::Preflight(head) => Some(reference::Preflight {
                host: head.host.to_vec(),
                target: head.target.to_vec(),
                origin: head.origin.to_vec(),
                method: head.method.to_vec(),
                headers: head.headers.iter().map(|line| line.to_vec()).collect(),
                private_network: head.private_network,
                keep: head.connection != Connection::Close,
                keep_1_0: head.connection == Connection::KeepAlive10,
                len: head.len,
            }),
            _ => None,
        };
        assert_eq!(ours, reference::preflight(bytes, LIMITS.max_bytes), "{}", bytes.escape_ascii());
    }

    #[test]
    fn reads_a_browsers_preflight() {
        let mut bytes = CHROME.as_bytes().to_vec();
        bytes.extend_from_slice(b"GET /next HTTP/1.1\r\n");
        for end in [CHROME.len(), bytes.len()] {
            let Head::Preflight(head) = HeadReader::new().read(&bytes[..end], LIMITS) else {
                panic!("not read as a preflight with {end} bytes");
            };
            assert_eq!(head.len, CHROME.len());
            assert_eq!(head.host, b"api.shop.example");
            assert_eq!(head.target, b"/v1/orders/42?expand=lines");
            assert_eq!(head.origin, b"https://www.shop.example");
            assert_eq!(head.method, b"PUT");
            assert_eq!(head.headers[..], [&b"authorization,content-type,x-request-id"[..]]);
            assert!(!head.private_network);
            assert_eq!(head.connection, Connection::KeepAlive);
        }
    }

    #[test]
    fn preflights() {
        let many =
            |n: usize, line: &str| (0..n).map(|i| line.replace('#', &i.to_string())).collect::<String>();
        for (name, bytes, connection) in [
            ("smallest", with_lines(""), Connection::KeepAlive),
            ("close", with_lines("Connection: close\r\n"), Connection::Close),
            ("Close in capitals", with_lines("CONNECTION:\tCLOSE \r\n"), Connection::Close),
            ("keep-alive", with_lines("Connection: Keep-Alive\r\n"), Connection::KeepAlive),
            ("1.0", with("1.1", "1.0"), Connection::Close),
            ("1.0 close", with("1.1\r\n", "1.0\r\nConnection: close\r\n"), Connection::Close),
            ("1.0 keep-alive", with("1.1\r\n", "1.0\r\nConnection: keep-alive\r\n"), Connection::KeepAlive10),
            ("content-length 0", with_lines("Content-Length: 0\r\n"), Connection::KeepAlive),
            ("content-type", with_lines("Content-Type: text/plain\r\n"), Connection::KeepAlive),
            ("te trailers", with_lines("te: trailers\r\n"), Connection::KeepAlive),
            ("odd names", with_lines("X_Y: 5\r\nx.y!: 5\r\n"), Connection::KeepAlive),
            ("blank values", with_lines("X: \t \r\nY:\r\n"), Connection::KeepAlive),
            ("blanks around values", with("Host: h", "Host:\t h \t"), Connection::KeepAlive),
            ("obs-text elsewhere", with_lines("X: \u{e4}\r\n"), Connection::KeepAlive),
            ("load balancer", with_lines("X-Forwarded-Host: x\r\nVia: 1.1 y\r\n"), Connection::KeepAlive),
            ("root", with_target("/"), Connection::KeepAlive),
            ("dots in names", with_target("/.a/b./..c/d../..."), Connection::KeepAlive),
            ("sub-delims", with_target("/a!$&'()*+,=:@-._~[]/"), Connection::KeepAlive),
            ("query", with_target("/?//../%2e;\\\"<>^`{|}?"), Connection::KeepAlive),
            (
                "32 request-headers lines",
                with_lines(&many(32, "Access-Control-Request-Headers: x#\r\n")),
                Connection::KeepAlive,
            ),
            ("64 lines", with_lines(&many(61, "X-#: #\r\n")), Connection::KeepAlive),
        ] {
            match HeadReader::new().read(&bytes, LIMITS) {
                Head::Preflight(head) => {
                    assert_eq!(head.connection, connection, "{name}");
                    assert_eq!(head.len, bytes.len(), "{name}");
                    assert_eq!(head.host, b"h", "{name}");
                }
                other => panic!("{name}: {other:?}"),
            }
            agrees_with_reference(&bytes);
        }
    }

    fn passes() -> Vec<(&'static str, Vec<u8>, PassReason)> {
        let many =
            |n: usize, line: &str| (0..n).map(|i| line.replace('#', &i.to_string())).collect::<String>();
        vec![
            ("get", b"GET / HTTP/1.1\r\n\r\n".to_vec(), PassReason::NotOptions),
            ("one byte", b"o".to_vec(), PassReason::NotOptions),
            ("empty line in front", [b"\r\n".to_vec(), with_lines("")].concat(), PassReason::NotOptions),
            ("tab after method", with("OPTIONS ", "OPTIONS\t"), PassReason::NotOptions),
            ("0.9", b"OPTIONS /\r\n".to_vec(), PassReason::Version),
            ("1.2", with("HTTP/1.1", "HTTP/1.2"), PassReason::Version),
            ("2.0", with("HTTP/1.1", "HTTP/2.0"), PassReason::Version),
            ("2", with("HTTP/1.1", "HTTP/2"), PassReason::Version),
            ("lower-case version", with("HTTP/1.1", "http/1.1"), PassReason::MalformedHead),
            ("blank behind version", with("HTTP/1.1", "HTTP/1.1 "), PassReason::MalformedHead),
            ("two blanks", with(" HTTP/1.1", "  HTTP/1.1"), PassReason::MalformedHead),
            ("two blanks before target", with_target(" /a"), PassReason::MalformedHead),
            ("no target", with_target(""), PassReason::MalformedHead),
            ("blank in target", with_target("/a b"), PassReason::MalformedHead),
            ("tab in target", with_target("/a\tb"), PassReason::BadTarget),
            ("tab before version", with(" HTTP", "\tHTTP"), PassReason::MalformedHead),
            ("CR in target", with_target("/a\rb"), PassReason::MalformedHead),
            ("CR CR LF", with("1.1\r\n", "1.1\r\r\n"), PassReason::MalformedHead),
            ("NUL in target", with_target("/a\0"), PassReason::BadTarget),
            ("DEL in target", with_target("/a\x7f"), PassReason::BadTarget),
            ("UTF-8 in target", with_target("/\u{e4}"), PassReason::BadTarget),
            ("UTF-8 in query", with_target("/?\u{e4}"), PassReason::BadTarget),
            ("fragment", with_target("/a#b"), PassReason::BadTarget),
            ("fragment in query", with_target("/a?b#c"), PassReason::BadTarget),
            ("braces", with_target("/{a}"), PassReason::BadTarget),
            ("query only", with_target("?a"), PassReason::BadTarget),
            ("asterisk", with_target("*"), PassReason::AsteriskForm),
            ("absolute", with_target("http://h/a"), PassReason::AbsoluteForm),
            ("authority", with_target("h:80"), PassReason::AbsoluteForm),
            ("IPv6 authority", with_target("[::1]:80"), PassReason::AbsoluteForm),
            ("two slashes", with_target("//a"), PassReason::AmbiguousPath),
            ("dot", with_target("/./a"), PassReason::AmbiguousPath),
            ("dot at the end", with_target("/a/."), PassReason::AmbiguousPath),
            ("two dots", with_target("/a/../b"), PassReason::AmbiguousPath),
            ("two dots before the query", with_target("/a/..?b"), PassReason::AmbiguousPath),
            ("semicolon", with_target("/a;b"), PassReason::AmbiguousPath),
            ("backslash", with_target("/a\\b"), PassReason::AmbiguousPath),
            ("encoded", with_target("/%61"), PassReason::EncodedPath),
            ("bare LF after request line", with("1.1\r\n", "1.1\n"), PassReason::BareLf),
            ("bare LF after a header", with("Host: h\r\n", "Host: h\n"), PassReason::BareLf),
            ("bare LF at the end", with("PUT\r\n\r\n", "PUT\r\n\n"), PassReason::BareLf),
            ("bare LF, no end yet", b"OPTIONS / HTTP/1.1\r\nHost: h\nOri".to_vec(), PassReason::BareLf),
            ("bare CR in a value", with_lines("X: a\rb\r\n"), PassReason::MalformedHead),
            ("bare CR in Origin", with("//o", "//o\r"), PassReason::MalformedHead),
            ("NUL in a value", with_lines("X: \0\r\n"), PassReason::MalformedHead),
            ("NUL in a name", with_lines("X\0: a\r\n"), PassReason::MalformedHead),
            ("NUL in Host", with("Host: h", "Host: h\0"), PassReason::BadHost),
            ("NUL in Origin", with("//o", "//o\0"), PassReason::BadOrigin),
            ("NUL in method", with("PUT", "P\0UT"), PassReason::BadRequestMethod),
            ("non-ASCII in Host", with("Host: h", "Host: \u{e4}"), PassReason::BadHost),
            ("non-ASCII in Origin", with("//o", "//\u{e4}"), PassReason::BadOrigin),
            ("non-ASCII in method", with("PUT", "\u{e4}"), PassReason::BadRequestMethod),
            ("fold", with("Host: h", "Host: h\r\n x"), PassReason::ObsFold),
            ("fold by tab", with_lines("X: a\r\n\tb\r\n"), PassReason::ObsFold),
            ("fold of nothing", with_lines("X: a\r\n \r\n"), PassReason::ObsFold),
            ("fold first", with("Host", " Host"), PassReason::ObsFold),
            ("blank before colon", with("Host:", "Host :"), PassReason::MalformedHead),
            ("no colon", with_lines("X\r\n"), PassReason::MalformedHead),
            ("no name", with_lines(": x\r\n"), PassReason::MalformedHead),
            ("bad name", with_lines("X(: x\r\n"), PassReason::MalformedHead),
            ("65 lines", with_lines(&many(62, "X-#: #\r\n")), PassReason::HeadTooLarge),
            ("too long", with_lines(&format!("X: {}\r\n", "x".repeat(5000))), PassReason::HeadTooLarge),
            ("too long, no end yet", with_target(&"/a".repeat(3000)), PassReason::HeadTooLarge),
            ("no Host", with("Host: h\r\n", ""), PassReason::BadHost),
            ("empty Host", with("Host: h", "Host:"), PassReason::BadHost),
            ("blank in Host", with("Host: h", "Host: h, i"), PassReason::BadHost),
            ("two Hosts", with_lines("host: h\r\n"), PassReason::BadHost),
            ("no Origin", with("Origin: https://o\r\n", ""), PassReason::NoOrigin),
            ("empty Origin", with("https://o", ""), PassReason::BadOrigin),
            ("two Origins", with_lines("ORIGIN: https://o\r\n"), PassReason::BadOrigin),
            ("merged Origins", with("https://o", "https://o,https://o"), PassReason::BadOrigin),
            ("no method", with("Access-Control-Request-Method: PUT\r\n", ""), PassReason::NoRequestMethod),
            ("empty method", with("PUT", " "), PassReason::BadRequestMethod),
            ("two methods", with("PUT", "PUT, GET"), PassReason::BadRequestMethod),
            (
                "method twice",
                with_lines("access-control-request-method: PUT\r\n"),
                PassReason::BadRequestMethod,
            ),
            (
                "33 request-headers lines",
                with_lines(&many(33, "Access-Control-Request-Headers: x\r\n")),
                PassReason::UnusableRequestHeaders,
            ),
            ("body", with_lines("Content-Length: 1\r\n"), PassReason::Body),
            ("signed length", with_lines("Content-Length: +0\r\n"), PassReason::Body),
            ("length 00", with_lines("Content-Length: 00\r\n"), PassReason::Body),
            ("length list", with_lines("Content-Length: 0, 0\r\n"), PassReason::Body),
            ("no length", with_lines("Content-Length:\r\n"), PassReason::Body),
            ("length twice", with_lines("Content-Length: 0\r\nContent-Length: 0\r\n"), PassReason::Body),
            ("chunked", with_lines("Transfer-Encoding: chunked\r\n"), PassReason::Body),
            ("empty transfer-encoding", with_lines("transfer-encoding:\r\n"), PassReason::Body),
            ("upgrade", with_lines("Upgrade: h2c\r\n"), PassReason::HopByHop),
            ("expect", with_lines("Expect: 100-continue\r\n"), PassReason::HopByHop),
            ("te", with_lines("TE: gzip\r\n"), PassReason::HopByHop),
            ("te twice", with_lines("TE: trailers\r\nTE: trailers\r\n"), PassReason::HopByHop),
            ("trailer", with_lines("Trailer: x\r\n"), PassReason::HopByHop),
            ("keep-alive header", with_lines("Keep-Alive: 300\r\n"), PassReason::HopByHop),
            ("proxy-connection", with_lines("Proxy-Connection: close\r\n"), PassReason::HopByHop),
            ("http2-settings", with_lines("HTTP2-Settings: AAA\r\n"), PassReason::HopByHop),
            ("max-forwards", with_lines("Max-Forwards: 0\r\n"), PassReason::HopByHop),
            ("connection: origin", with_lines("Connection: Origin\r\n"), PassReason::HopByHop),
            ("connection list", with_lines("Connection: keep-alive, x\r\n"), PassReason::HopByHop),
            (
                "connection twice",
                with_lines("Connection: close\r\nConnection: close\r\n"),
                PassReason::HopByHop,
            ),
            ("empty connection", with_lines("Connection:\r\n"), PassReason::HopByHop),
            ("cookie", with_lines("Cookie: a=b\r\n"), PassReason::Credentials),
            ("authorization", with_lines("AUTHORIZATION: Basic x\r\n"), PassReason::Credentials),
            ("proxy-authorization", with_lines("Proxy-Authorization: x\r\n"), PassReason::Credentials),
            ("method override", with_lines("X-HTTP-Method-Override: PUT\r\n"), PassReason::AmbiguousHeader),
            ("method override 2", with_lines("X-HTTP-Method: PUT\r\n"), PassReason::AmbiguousHeader),
            ("method override 3", with_lines("X-Method-Override: PUT\r\n"), PassReason::AmbiguousHeader),
            ("original method", with_lines("X-Original-Method: PUT\r\n"), PassReason::AmbiguousHeader),
            ("original URL", with_lines("X-Original-URL: /b\r\n"), PassReason::AmbiguousHeader),
            ("original URI", with_lines("X-Original-URI: /b\r\n"), PassReason::AmbiguousHeader),
            ("rewritten URL", with_lines("X-Rewrite-URL: /b\r\n"), PassReason::AmbiguousHeader),
            ("underscore", with_lines("Content_Length: 5\r\n"), PassReason::AmbiguousHeader),
            ("underscores", with_lines("X_Original-URL: /b\r\n"), PassReason::AmbiguousHeader),
            (
                "private network twice",
                with_lines(&many(2, "Access-Control-Request-Private-Network: true\r\n")),
                PassReason::MalformedHead,
            ),
        ]
    }

    #[test]
    fn passes_with_its_reason() {
        for (name, bytes, want) in passes() {
            match HeadReader::new().read(&bytes, LIMITS) {
                Head::Pass(reason) => assert_eq!(reason, want, "{name}"),
                other => panic!("{name}: {other:?}"),
            }
            agrees_with_reference(&bytes);
        }
    }

    #[test]
    fn private_network() {
        for (value, want) in [("true", true), ("\ttrue ", true), ("True", false), ("1", false), ("", false)] {
            let bytes = with_lines(&format!("Access-Control-Request-Private-Network:{value}\r\n"));
            match HeadReader::new().read(&bytes, LIMITS) {
                Head::Preflight(head) => assert_eq!(head.private_network, want, "{value:?}"),
                other => panic!("{value:?}: {other:?}"),
            }
        }
    }

    #[test]
    fn incomplete_until_the_last_byte() {
        let bytes = CHROME.as_bytes();
        let mut reader = HeadReader::new();
        for end in 0..bytes.len() {
            assert!(matches!(reader.read(&bytes[..end], LIMITS), Head::Incomplete), "{end}");
        }
        assert!(matches!(reader.read(bytes, LIMITS), Head::Preflight(_)));
    }

    #[test]
    fn the_limit_is_exact() {
        let bytes = with_lines("");
        let limits = |max_bytes| HeadLimits { max_bytes };
        let read = |end: usize, max| HeadReader::new().read(&bytes[..end], limits(max));
        assert!(matches!(read(bytes.len(), bytes.len()), Head::Preflight(_)));
        assert!(matches!(read(bytes.len(), bytes.len() - 1), Head::Pass(PassReason::HeadTooLarge)));
        assert!(matches!(read(30, 31), Head::Incomplete));
        // A buffer of that size is full and there is no end in it.
        assert!(matches!(read(30, 30), Head::Pass(PassReason::HeadTooLarge)));
    }

    #[test]
    fn every_split_in_two_reads_alike() {
        let chrome = ("chrome", CHROME.as_bytes().to_vec(), PassReason::NotOptions);
        for (name, bytes, _) in passes().into_iter().chain([chrome]) {
            for limits in [LIMITS, HeadLimits { max_bytes: 60 }] {
                let whole = read_in_pieces(&bytes, [], limits);
                for at in 0..bytes.len() {
                    assert_eq!(read_in_pieces(&bytes, [at], limits), whole, "{name}, split at {at}");
                }
                assert_eq!(read_in_pieces(&bytes, 0..bytes.len(), limits), whole, "{name}, byte by byte");
            }
        }
    }

    /// Heads made of pieces that are often wrong together.
    fn heads() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            Just("Host: h\r\n"),
            Just("Origin: https://o\r\n"),
            Just("Access-Control-Request-Method: PUT\r\n"),
            Just("Access-Control-Request-Headers: x\r\n"),
            Just("Content-Length: 0\r\n"),
            Just("Connection: close\r\n"),
            Just("te: trailers\r\n"),
            Just("X: y \t\r\n"),
            Just("X:\r\n"),
            Just("X_Y: z\r\n"),
            Just("Keep_Alive: z\r\n"),
            Just(" fold\r\n"),
            Just("Cookie: a\r\n"),
            Just("\r\n"),
            Just("\n"),
            Just("\r"),
            Just("\0"),
            Just(":"),
            Just(" "),
        ];
        let target = prop_oneof![Just("/".to_owned()), "[/.?a%;#*\\\\]{1,6}", "/[!-~]{0,8}",];
        let version = prop_oneof![4 => Just("HTTP/1.1"), 1 => Just("HTTP/1.0"), 1 => Just("HTTP/2.0")];
        (target, version, prop::collection::vec(piece, 0..8), prop::collection::vec(any::<u8>(), 0..4))
            .prop_map(|(target, version, pieces, tail)| {
                let required = "Host: h\r\nOrigin: https://o\r\nAccess-Control-Request-Method: PUT\r\n";
                let mut bytes = format!("OPTIONS {target} {version}\r\n").into_bytes();
                if pieces.len() % 2 == 0 {
                    bytes.extend_from_slice(required.as_bytes());
                }
                bytes.extend(pieces.concat().into_bytes());
                bytes.extend_from_slice(b"\r\n");
                bytes.extend(tail);
                bytes
            })
    }

    /// A good head with a few bytes changed.
    fn mutants() -> impl Strategy<Value = Vec<u8>> {
        prop::collection::vec((0..CHROME.len(), any::<u8>()), 0..4).prop_map(|changes| {
            let mut bytes = CHROME.as_bytes().to_vec();
            for (at, byte) in changes {
                bytes[at] = byte;
            }
            bytes
        })
    }

    proptest! {
        #[test]
        fn any_split_reads_alike(
            bytes in prop_oneof![heads(), mutants()],
            mut ends in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
            max_bytes in 20_usize..700,
        ) {
            ends.sort_by_key(|end| end.index(bytes.len()));
            let ends = ends.iter().map(|end| end.index(bytes.len()));
            let limits = HeadLimits { max_bytes };
            prop_assert_eq!(read_in_pieces(&bytes, ends, limits), read_in_pieces(&bytes, [], limits));
        }

        #[test]
        fn any_head_reads_as_the_reference_does(bytes in prop_oneof![heads(), mutants()]) {
            agrees_with_reference(&bytes);
        }
    }
}
