//! Any bytes as a head: no panic, the same however they arrive, and a preflight where the plain reference reads the very
//! same one, and only there.
#![no_main]

use libfuzzer_sys::{
    arbitrary::{self, Arbitrary},
    fuzz_target,
};
use preflightd::{
    http::{Head, HeadLimits, HeadReader},
    policy::Connection,
};
use preflightd_fuzz::Edits;

#[path = "../../daemon/src/http/reference.rs"]
mod reference;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    piece: u8,
    limit: u8,
    edits: Edits<'a>,
}

const PREFLIGHT: &[u8] = b"OPTIONS /a/b.c?d=e HTTP/1.1\r\n\
    Host: h\r\n\
    Connection: keep-alive\r\n\
    Access-Control-Request-Method: PUT\r\n\
    Access-Control-Request-Headers: a,b\r\n\
    Origin: https://o\r\n\
    Sec-Fetch-Mode: cors\r\n\
    \r\n";

const WORDS: &[&str] = &[
    "OPTIONS ",
    " HTTP/1.1\r\n",
    " HTTP/1.0\r\n",
    "\r\n",
    "\r\n\r\n",
    "\r\n ",
    "\n",
    "\r",
    "\0",
    "\t",
    ":",
    ",",
    "_",
    "Host: h\r\n",
    "Origin: https://o\r\n",
    "Access-Control-Request-Method: PUT\r\n",
    "Access-Control-Request-Headers: c\r\n",
    "Access-Control-Request-Private-Network: true\r\n",
    "Content-Length: 0\r\n",
    "Content_Length: 0\r\n",
    "Transfer-Encoding: chunked\r\n",
    "Connection: keep-alive\r\n",
    "Connection: close\r\n",
    "TE: trailers\r\n",
    "Upgrade: h2c\r\n",
    "Expect: 100-continue\r\n",
    "Trailer: x\r\n",
    "Keep-Alive: 5\r\n",
    "Max-Forwards: 0\r\n",
    "HTTP2-Settings: x\r\n",
    "Proxy-Connection: close\r\n",
    "Cookie: a=b\r\n",
    "Authorization: x\r\n",
    "Proxy-Authorization: x\r\n",
    "X-HTTP-Method: PUT\r\n",
    "X-HTTP-Method-Override: PUT\r\n",
    "X-Method-Override: PUT\r\n",
    "X-Original-Method: PUT\r\n",
    "X-Original-URI: /\r\n",
    "X-Original-URL: /\r\n",
    "X-Rewrite-URL: /\r\n",
    "X: \u{e9}\r\n",
    "/../",
    "/./",
    "//",
    "%2e",
    "?",
    "#",
    ";",
    "\\",
    "*",
    "http://h",
    "GET / HTTP/1.1\r\n\r\n",
];

fuzz_target!(|input: Input<'_>| {
    let bytes = input.edits.apply(PREFLIGHT, WORDS);
    let limits = HeadLimits { max_bytes: if input.limit == 0 { 300 } else { 16 * usize::from(input.limit) } };

    let whole = HeadReader::new().read(&bytes, limits);
    let mut reader = HeadReader::new();
    let pieces = (0..bytes.len()).step_by(usize::from(input.piece).max(1)).chain([bytes.len()]);
    let in_pieces = pieces
        .map(|end| reader.read(&bytes[..end], limits))
        .find(|head| !matches!(head, Head::Incomplete))
        .unwrap_or(Head::Incomplete);
    assert_eq!(format!("{whole:?}"), format!("{in_pieces:?}"));

    let ours = match whole {
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
    assert_eq!(ours, reference::preflight(&bytes, limits.max_bytes));
});
