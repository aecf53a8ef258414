//! Hostile and ambiguous requests: what a proxy might read otherwise than we do. Each must arrive at the upstream byte by
//! byte, whatever the policies say, and for its own reason.
#![forbid(unsafe_code)]

use preflightd::reason::PassReason;

/// The host of every case. Give it a policy for all paths that allows [`ORIGIN`], every method and every header, so that
/// nothing but the reading of the head keeps a case from being answered.
pub const HOST: &str = "api.example.test";

/// The origin of every case.
pub const ORIGIN: &str = "https://app.example.test";

/// The preflight that all cases bend: this one is answered.
pub const PREFLIGHT: &str = "OPTIONS /a HTTP/1.1\r\n\
    Host: api.example.test\r\n\
    Origin: https://app.example.test\r\n\
    Access-Control-Request-Method: PUT\r\n\
    Access-Control-Request-Headers: content-type\r\n\
    \r\n";

/// One hostile connection.
#[derive(Clone, Debug)]
pub struct Case {
    /// Says what is wrong.
    pub name: &'static str,
    /// What the client sends before it half-closes.
    pub bytes: Vec<u8>,
    /// So many bytes at the front are preflights that are answered; the upstream gets all behind them.
    pub answered: usize,
    /// Why the rest passes. [`PassReason::Truncated`] shows only at the half-close.
    pub reason: PassReason,
}

impl Case {
    /// What must arrive at the upstream.
    pub fn passed(&self) -> &[u8] {
        &self.bytes[self.answered..]
    }
}

/// All cases; their names are unique.
pub fn cases() -> Vec<Case> {
    use PassReason as R;
    let mut cases = Vec::new();
    let mut case = |name, bytes: Vec<u8>, reason| cases.push(Case { name, bytes, answered: 0, reason });

    // Where does the body end?
    case("body by content-length", plus("Content-Length: 5\r\n", "hello"), R::Body);
    case("body that is a request", plus("Content-Length: 24\r\n", "GET /admin HTTP/1.1\r\n\r\nxx"), R::Body);
    case(
        "body that is a preflight",
        plus(&format!("Content-Length: {}\r\n", PREFLIGHT.len()), PREFLIGHT),
        R::Body,
    );
    case("content-length 0 twice", plus("Content-Length: 0\r\nContent-Length: 0\r\n", ""), R::Body);
    case("content-length 0 and 5", plus("Content-Length: 0\r\nContent-Length: 5\r\n", "hello"), R::Body);
    case("content-length 5 and 0", plus("Content-Length: 5\r\nContent-Length: 0\r\n", "hello"), R::Body);
    case("content-length +0", plus("Content-Length: +0\r\n", ""), R::Body);
    case("content-length -0", plus("Content-Length: -0\r\n", ""), R::Body);
    case("content-length 00", plus("Content-Length: 00\r\n", ""), R::Body);
    case("content-length 0x0", plus("Content-Length: 0x0\r\n", ""), R::Body);
    case("content-length list", plus("Content-Length: 0, 0\r\n", ""), R::Body);
    case("content-length list of two", plus("Content-Length: 0,5\r\n", "hello"), R::Body);
    case("content-length empty", plus("Content-Length:\r\n", ""), R::Body);
    case("content-length with a blank within", plus("Content-Length: 0 5\r\n", "hello"), R::Body);
    case("content-length of 2^64", plus("Content-Length: 18446744073709551616\r\n", ""), R::Body);
    case("content-length in capitals", plus("CONTENT-LENGTH: 5\r\n", "hello"), R::Body);
    case("content_length", plus("Content_Length: 5\r\n", "hello"), R::AmbiguousHeader);
    case("content-length with a vertical tab", plus("Content-Length:\x0b0\r\n", ""), R::MalformedHead);
    case("chunked", plus("Transfer-Encoding: chunked\r\n", "5\r\nhello\r\n0\r\n\r\n"), R::Body);
    case("xchunked", plus("Transfer-Encoding: xchunked\r\n", "0\r\n\r\n"), R::Body);
    case("chunked in capitals", plus("TRANSFER-ENCODING: CHUNKED\r\n", "0\r\n\r\n"), R::Body);
    case("chunked, quoted", plus("Transfer-Encoding: \"chunked\"\r\n", "0\r\n\r\n"), R::Body);
    case("chunked after a tab", plus("Transfer-Encoding:\tchunked\r\n", "0\r\n\r\n"), R::Body);
    case("chunked, identity", plus("Transfer-Encoding: chunked, identity\r\n", "0\r\n\r\n"), R::Body);
    case("identity", plus("Transfer-Encoding: identity\r\n", ""), R::Body);
    case("transfer-encoding empty", plus("Transfer-Encoding:\r\n", ""), R::Body);
    case(
        "transfer-encoding twice",
        plus("Transfer-Encoding: x\r\nTransfer-Encoding: chunked\r\n", "0\r\n\r\n"),
        R::Body,
    );
    case("transfer_encoding", plus("Transfer_Encoding: chunked\r\n", "0\r\n\r\n"), R::AmbiguousHeader);
    case("transfer-encoding, folded", plus("Transfer-Encoding:\r\n chunked\r\n", "0\r\n\r\n"), R::ObsFold);
    case(
        "transfer-encoding, blank before the colon",
        plus("Transfer-Encoding : chunked\r\n", "0\r\n\r\n"),
        R::MalformedHead,
    );
    case(
        "transfer-encoding behind a bare CR",
        plus("X: y\rTransfer-Encoding: chunked\r\n", "0\r\n\r\n"),
        R::MalformedHead,
    );
    case(
        "transfer-encoding behind a bare LF",
        plus("X: y\nTransfer-Encoding: chunked\r\n", "0\r\n\r\n"),
        R::BareLf,
    );
    case(
        "transfer-encoding behind a NUL",
        plus("X: y\0Transfer-Encoding: chunked\r\n", "0\r\n\r\n"),
        R::MalformedHead,
    );
    case("CL.TE", plus("Content-Length: 6\r\nTransfer-Encoding: chunked\r\n", "0\r\n\r\nG"), R::Body);
    case(
        "TE.CL",
        plus(
            "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n",
            "5c\r\nGPOST / HTTP/1.1\r\n\r\n0\r\n\r\n",
        ),
        R::Body,
    );
    case("CL 0 and TE", plus("Content-Length: 0\r\nTransfer-Encoding: chunked\r\n", "0\r\n\r\n"), R::Body);
    case("expect", plus("Expect: 100-continue\r\nContent-Length: 5\r\n", "hello"), R::HopByHop);

    // Where does a line end?
    case("bare LF after the request line", bent("1.1\r\n", "1.1\n"), R::BareLf);
    case("bare LF after a header", bent(".test\r\nOrigin", ".test\nOrigin"), R::BareLf);
    case("bare LF before the empty line", bent("content-type\r\n\r\n", "content-type\n\r\n"), R::BareLf);
    case("bare LF for the empty line", bent("content-type\r\n\r\n", "content-type\r\n\n"), R::BareLf);
    case("bare LFs throughout", PREFLIGHT.replace("\r\n", "\n").into_bytes(), R::BareLf);
    case("LF CR", bent(".test\r\nOrigin", ".test\n\rOrigin"), R::BareLf);
    case("bare CR after a header", bent(".test\r\nOrigin", ".test\rOrigin"), R::MalformedHead);
    case("bare CR in the request line", bent("/a HTTP", "/a\rHTTP"), R::MalformedHead);
    case("CR CR LF", bent(".test\r\nOrigin", ".test\r\r\nOrigin"), R::MalformedHead);
    case("CR CR LF after the request line", bent("1.1\r\n", "1.1\r\r\n"), R::MalformedHead);
    case("bare CR for the name's end", plus("X\r: y\r\n", ""), R::MalformedHead);
    case("empty line in front", bent("OPTIONS", "\r\nOPTIONS"), R::NotOptions);
    case("bare LF in front", bent("OPTIONS", "\nOPTIONS"), R::NotOptions);
    case("blank in front", bent("OPTIONS", " OPTIONS"), R::NotOptions);
    case("fold in Host", bent("Host: ", "Host:\r\n "), R::ObsFold);
    case("fold in Origin", bent("https://app", "https://\r\n\tapp"), R::ObsFold);
    case("fold in the request method", bent("PUT", "PUT\r\n ,GET"), R::ObsFold);
    case("fold in the request headers", bent("content-type", "content-type\r\n ,x-admin"), R::ObsFold);
    case("fold of blanks before the end", plus(" \r\n", ""), R::ObsFold);
    case("fold before the first header", bent("Host", "\tHost"), R::ObsFold);

    // What is a header?
    case("blank before Host's colon", bent("Host:", "Host :"), R::MalformedHead);
    case("tab before Origin's colon", bent("Origin:", "Origin\t:"), R::MalformedHead);
    case("no colon", plus("Transfer-Encoding chunked\r\n", ""), R::MalformedHead);
    case("no name", plus(": chunked\r\n", ""), R::MalformedHead);
    case("name with a parenthesis", plus("Transfer-Encoding(): chunked\r\n", ""), R::MalformedHead);
    case("name with a NUL", plus("X\0: y\r\n", ""), R::MalformedHead);
    case("name with obs-text", plus("X\u{e9}: y\r\n", ""), R::MalformedHead);
    case("NUL in a value", plus("X: a\0b\r\n", ""), R::MalformedHead);
    case("DEL in a value", plus("X: a\x7fb\r\n", ""), R::MalformedHead);
    case("1000 headers", plus(&"X: y\r\n".repeat(1000), ""), R::HeadTooLarge);
    case("65 headers", plus(&"X: y\r\n".repeat(61), ""), R::HeadTooLarge);
    case("a header of 64 KB", plus(&format!("X: {}\r\n", "y".repeat(65536)), ""), R::HeadTooLarge);
    case("a target of 64 KB", bent("/a", &"/a".repeat(32768)), R::HeadTooLarge);
    case(
        "a head that never ends",
        latin1(&format!("OPTIONS /a HTTP/1.1\r\n{}", "X: y\r\n".repeat(20_000))),
        R::HeadTooLarge,
    );

    // Whose host, origin and method?
    case("two Hosts", plus("Host: other.test\r\n", ""), R::BadHost);
    case("the same Host twice", plus("Host: api.example.test\r\n", ""), R::BadHost);
    case("two Hosts in one line", bent("Host: ", "Host: other.test, "), R::BadHost);
    case("no Host", bent("Host: api.example.test\r\n", ""), R::BadHost);
    case("empty Host", bent("Host: api.example.test", "Host: "), R::BadHost);
    case("NUL in Host", bent(".test\r\nOrigin", ".test\0.other.test\r\nOrigin"), R::BadHost);
    case("obs-text in Host", bent("Host: api", "Host: \u{e9}pi"), R::BadHost);
    case("host_ for Host", bent("Host:", "Host_:"), R::BadHost);
    case("two Origins", plus("Origin: https://other.test\r\n", ""), R::BadOrigin);
    case("the same Origin twice", plus("origin: https://app.example.test\r\n", ""), R::BadOrigin);
    case("two Origins in one line", bent("https://app", "https://other.test https://app"), R::BadOrigin);
    case("merged Origins", bent("https://app", "https://other.test,https://app"), R::BadOrigin);
    case("empty Origin", bent("https://app.example.test", ""), R::BadOrigin);
    case("NUL in Origin", bent("https://app", "https://\0app"), R::BadOrigin);
    case("obs-text in Origin", bent("https://app", "https://\u{e9}pp"), R::BadOrigin);
    case("no Origin", bent("Origin: https://app.example.test\r\n", ""), R::NoOrigin);
    case("two request methods", plus("Access-Control-Request-Method: DELETE\r\n", ""), R::BadRequestMethod);
    case("request methods in one line", bent("PUT", "PUT,DELETE"), R::BadRequestMethod);
    case("empty request method", bent("PUT", ""), R::BadRequestMethod);
    case("NUL in the request method", bent("PUT", "PUT\0"), R::BadRequestMethod);
    case("quoted request method", bent("PUT", "\"PUT\""), R::BadRequestMethod);
    case("no request method", bent("Access-Control-Request-Method: PUT\r\n", ""), R::NoRequestMethod);
    case(
        "access_control_request_method",
        bent("Access-Control-Request-Method", "Access_Control_Request_Method"),
        R::AmbiguousHeader,
    );
    case(
        "50 lines of request headers",
        plus(&"Access-Control-Request-Headers: x\r\n".repeat(49), ""),
        R::UnusableRequestHeaders,
    );

    // Which target?
    case("absolute-form, own authority", bent("/a", "http://api.example.test/a"), R::AbsoluteForm);
    case("absolute-form, other authority", bent("/a", "http://other.test/a"), R::AbsoluteForm);
    case("authority-form", bent("/a", "api.example.test:443"), R::AbsoluteForm);
    case("asterisk-form", bent("/a", "*"), R::AsteriskForm);
    case("two slashes in front", bent("/a", "//other.test/a"), R::AmbiguousPath);
    case("two slashes within", bent("/a", "/a//b"), R::AmbiguousPath);
    case("dot element", bent("/a", "/./a"), R::AmbiguousPath);
    case("two dots", bent("/a", "/public/../admin"), R::AmbiguousPath);
    case("two dots at the end", bent("/a", "/public/.."), R::AmbiguousPath);
    case("two dots and a semicolon", bent("/a", "/public/..;/admin"), R::AmbiguousPath);
    case("path parameter", bent("/a", "/a;v=1"), R::AmbiguousPath);
    case("backslash", bent("/a", "/public\\..\\admin"), R::AmbiguousPath);
    case("encoded slash", bent("/a", "/public%2fadmin"), R::EncodedPath);
    case("encoded dots", bent("/a", "/public/%2e%2e/admin"), R::EncodedPath);
    case("encoded backslash", bent("/a", "/public%5cadmin"), R::EncodedPath);
    case("encoded letter", bent("/a", "/%61"), R::EncodedPath);
    case("encoded NUL", bent("/a", "/a%00.html"), R::EncodedPath);
    case("encoded twice", bent("/a", "/%252e%252e/a"), R::EncodedPath);
    case("broken encoding", bent("/a", "/%zz"), R::EncodedPath);
    case("fragment", bent("/a", "/a#/b"), R::BadTarget);
    case("fragment in the query", bent("/a", "/a?b#c"), R::BadTarget);
    case("obs-text in the path", bent("/a", "/\u{e9}"), R::BadTarget);
    case("NUL in the path", bent("/a", "/a\0"), R::BadTarget);
    case("braces in the path", bent("/a", "/{a}"), R::BadTarget);
    case("no slash in front", bent("/a", "?a"), R::BadTarget);
    case("two blanks before the target", bent(" /a", "  /a"), R::MalformedHead);
    case("two blanks before the version", bent("/a ", "/a  "), R::MalformedHead);
    case("blank in the target", bent("/a", "/a /b"), R::MalformedHead);
    case("blank after the version", bent("1.1\r\n", "1.1 \r\n"), R::MalformedHead);
    case("tab before the target", bent("OPTIONS ", "OPTIONS\t"), R::NotOptions);
    case("tab before the version", bent("/a ", "/a\t"), R::MalformedHead);
    case("vertical tab in the target", bent("/a", "/a\x0b"), R::BadTarget);

    // Which method and version?
    case("lower-case method", bent("OPTIONS", "options"), R::NotOptions);
    case("longer method", bent("OPTIONS", "OPTIONSX"), R::NotOptions);
    case("quoted method", bent("OPTIONS", "\"OPTIONS\""), R::NotOptions);
    case("another method", bent("OPTIONS", "GET"), R::NotOptions);
    case("HTTP/0.9", b"OPTIONS /a\r\n".to_vec(), R::Version);
    case("HTTP/0.9 with headers", bent(" HTTP/1.1", ""), R::Version);
    case("HTTP/1.2", bent("HTTP/1.1", "HTTP/1.2"), R::Version);
    case("HTTP/2.0", bent("HTTP/1.1", "HTTP/2.0"), R::Version);
    case("HTTP/3", bent("HTTP/1.1", "HTTP/3"), R::Version);
    case("HTTP/01.1", bent("HTTP/1.1", "HTTP/01.1"), R::MalformedHead);
    case("lower-case version", bent("HTTP/1.1", "http/1.1"), R::MalformedHead);
    case("another protocol", bent("HTTP/1.1", "RTSP/1.0"), R::MalformedHead);
    case("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec(), R::NotOptions);
    case("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(), R::NotOptions);

    // What does it ask of the hops?
    case("connection: origin", plus("Connection: Origin\r\n", ""), R::HopByHop);
    case(
        "connection: close, request method",
        plus("Connection: close, Access-Control-Request-Method\r\n", ""),
        R::HopByHop,
    );
    case("connection twice", plus("Connection: close\r\nConnection: keep-alive\r\n", ""), R::HopByHop);
    case("connection empty", plus("Connection:\r\n", ""), R::HopByHop);
    case("proxy-connection", plus("Proxy-Connection: keep-alive\r\n", ""), R::HopByHop);
    case("keep_alive", plus("Keep_Alive: timeout=5\r\n", ""), R::AmbiguousHeader);
    case("keep-alive header", plus("Keep-Alive: timeout=5\r\n", ""), R::HopByHop);
    case(
        "h2c upgrade",
        plus(
            "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n",
            "",
        ),
        R::HopByHop,
    );
    case("h2c upgrade without connection", plus("Upgrade: h2c\r\n", ""), R::HopByHop);
    case("http2-settings alone", plus("HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n", ""), R::HopByHop);
    case("websocket", plus("Upgrade: websocket\r\nConnection: Upgrade\r\n", ""), R::HopByHop);
    case("te: chunked", plus("TE: trailers, chunked\r\n", ""), R::HopByHop);
    case("trailer", plus("Trailer: Origin\r\n", ""), R::HopByHop);
    case("max-forwards", plus("Max-Forwards: 0\r\n", ""), R::HopByHop);

    // What does no preflight have?
    case("cookie", plus("Cookie: session=1\r\n", ""), R::Credentials);
    case("empty cookie", plus("Cookie:\r\n", ""), R::Credentials);
    case("authorization", plus("Authorization: Bearer x\r\n", ""), R::Credentials);
    case("proxy-authorization", plus("Proxy-Authorization: Basic eDp5\r\n", ""), R::Credentials);
    case("proxy_authorization", plus("Proxy_Authorization: Basic eDp5\r\n", ""), R::AmbiguousHeader);
    case("method override", plus("X-HTTP-Method-Override: DELETE\r\n", ""), R::AmbiguousHeader);
    case("method override by its short name", plus("X-HTTP-Method: DELETE\r\n", ""), R::AmbiguousHeader);
    case("original URL", plus("X-Original-URL: /admin\r\n", ""), R::AmbiguousHeader);
    case("rewritten URL", plus("X-Rewrite-URL: /admin\r\n", ""), R::AmbiguousHeader);
    case("x_original_url", plus("X_Original_URL: /admin\r\n", ""), R::AmbiguousHeader);

    // Another request first: the whole connection is the upstream's.
    let get = "GET /a HTTP/1.1\r\nHost: api.example.test\r\n\r\n";
    case("preflight behind a GET", [get, PREFLIGHT].concat().into_bytes(), R::NotOptions);
    case(
        "preflight in a POST's body",
        format!(
            "POST /a HTTP/1.1\r\nHost: api.example.test\r\nContent-Length: {}\r\n\r\n{PREFLIGHT}",
            PREFLIGHT.len()
        )
        .into_bytes(),
        R::NotOptions,
    );
    case(
        "preflight behind an asterisk OPTIONS",
        [bent("/a", "*"), PREFLIGHT.into()].concat(),
        R::AsteriskForm,
    );

    // Never whole.
    case("end in the method", b"OPTI".to_vec(), R::Truncated);
    case("end in the target", b"OPTIONS /a".to_vec(), R::Truncated);
    case("end before the last LF", PREFLIGHT.as_bytes()[..PREFLIGHT.len() - 1].to_vec(), R::Truncated);

    // Something else behind a preflight that is answered.
    let mut behind = |name, preflights: usize, rest: Vec<u8>, reason| {
        let mut bytes = PREFLIGHT.repeat(preflights).into_bytes();
        let answered = bytes.len();
        bytes.extend(rest);
        cases.push(Case { name, bytes, answered, reason });
    };
    behind("GET behind a preflight", 1, get.into(), R::NotOptions);
    behind("GET behind three preflights", 3, get.into(), R::NotOptions);
    behind("empty line and GET behind a preflight", 1, format!("\r\n{get}").into_bytes(), R::NotOptions);
    behind(
        "chunked POST behind a preflight",
        1,
        format!(
            "POST /a HTTP/1.1\r\nHost: {HOST}\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n{PREFLIGHT}"
        )
        .into_bytes(),
        R::NotOptions,
    );
    behind(
        "GET with a chunked body behind a preflight",
        1,
        format!("GET /a HTTP/1.1\r\nHost: {HOST}\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
            .into_bytes(),
        R::NotOptions,
    );
    behind("OPTIONS with a body behind a preflight", 1, plus("Content-Length: 5\r\n", "hello"), R::Body);
    behind("OPTIONS with a cookie behind a preflight", 1, plus("Cookie: a=b\r\n", ""), R::Credentials);
    behind("bare LF behind a preflight", 1, bent("1.1\r\n", "1.1\n"), R::BareLf);
    behind("end in the second preflight", 1, PREFLIGHT.as_bytes()[..60].to_vec(), R::Truncated);
    behind(
        "a preflight between two other requests",
        1,
        [bent("/a", "*"), PREFLIGHT.into()].concat(),
        R::AsteriskForm,
    );
    behind("garbage behind a preflight", 1, vec![0; 100], R::NotOptions);

    cases
}

/// The preflight with more header lines, and what follows the head.
fn plus(lines: &str, body: &str) -> Vec<u8> {
    let head = PREFLIGHT.strip_suffix("\r\n").unwrap_or_else(|| unreachable!("it ends with an empty line"));
    latin1(&format!("{head}{lines}\r\n{body}"))
}

/// The preflight with one thing changed.
fn bent(from: &str, to: &str) -> Vec<u8> {
    assert!(PREFLIGHT.contains(from), "{from:?} is not in the preflight");
    latin1(&PREFLIGHT.replacen(from, to, 1))
}

/// One byte for each char, so that obs-text stands in the cases as it is sent.
fn latin1(text: &str) -> Vec<u8> {
    text.chars().map(|c| u8::try_from(c).unwrap_or(b'?')).collect()
}
