//! Any `Access-Control-Request-Headers`, origin, method and host at the policy table: no panic, and every answer is one
//! well-formed response that says nothing but what the policies and the request allow it to say.
#![no_main]

use libfuzzer_sys::{
    arbitrary::{self, Arbitrary},
    fuzz_target,
};
use preflightd::{
    config,
    policy::{Connection, Decision, ListenerId, Preflight, RouteLabels, Table},
};
use preflightd_fuzz::Edits;
use std::sync::LazyLock;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    host: (u8, Edits<'a>),
    path: (u8, Edits<'a>),
    origin: (u8, Edits<'a>),
    method: (u8, Edits<'a>),
    lines: Vec<Edits<'a>>,
    private_network: bool,
}

/// Every way to answer: lists, `*`, echoes; with and without credentials.
const POLICIES: &str = r#"
[[listener]]
name = "web"
address = "127.0.0.1:80"
upstream = "127.0.0.1:81"

[[policy]]
name = "list"
hosts = ["list.test"]
origins = ["https://a.test", "https://*.b.test", "https://c.test:*"]
methods = ["PUT"]
headers = ["content-type", "x-a"]
credentials = true
private_network = true

[[policy]]
name = "all"
hosts = ["all.test"]
origins = ["*"]
methods = ["*"]
headers = ["*"]

[[policy]]
name = "echo"
hosts = ["echo.test"]
origins = ["https://a.test", "https://*.b.test"]
methods = ["*"]
headers = ["*"]
credentials = true

[[policy]]
name = "gateway"
hosts = ["gateway.test"]
paths = [{ prefix = "/x" }, { regex = "/v[0-9]+/.*" }]
[policy.gateway-api]
allowOrigins = ["https://a.test", "https://*.b.test"]
allowMethods = ["*"]
allowHeaders = ["*"]
allowCredentials = true

[[policy]]
name = "gateway-all"
hosts = ["*.gateway.test"]
[policy.gateway-api]
allowOrigins = ["*"]
allowMethods = ["*"]
allowHeaders = ["*"]

[[policy]]
name = "nginx"
hosts = ["*.nginx.test"]
[policy.ingress-nginx]
enable-cors = "true"
cors-allow-origin = "https://a.test, https://*.b.test"

[[policy]]
name = "envoy"
hosts = ["envoy.test"]
[policy.envoy]
allow_origin_string_match = [{ prefix = "https://a" }, { suffix = ".b.test", ignore_case = true }, { safe_regex = "https://[a-z]+" }]
allow_methods = "*"
allow_headers = "*"
allow_credentials = true
forward_not_matching_preflights = false

[[policy]]
name = "envoy-star"
hosts = ["*"]
[policy.envoy]
allow_origin_string_match = [{ exact = "*" }]
allow_methods = "*"
allow_headers = "*"
"#;

static TABLE: LazyLock<Table> = LazyLock::new(|| {
    let (config, diagnostics) = config::load_str("policies", POLICIES);
    let config = config.unwrap_or_else(|| panic!("{diagnostics:?}"));
    Table::compile(&config.listener_specs(), &config.policies, &mut RouteLabels::new(64), 1).0
});

const HOSTS: &[&str] = &[
    "list.test",
    "all.test",
    "echo.test",
    "gateway.test",
    "a.gateway.test",
    "a.nginx.test",
    "envoy.test",
    "x.test",
];
const PATHS: &[&str] = &["/", "/x", "/x/y?z", "/v1/a"];
const ORIGINS: &[&str] =
    &["https://a.test", "https://a.b.test", "https://c.test:8443", "null", "https://other.test"];
const METHODS: &[&str] = &["PUT", "GET", "PATCH"];
const WORDS: &[&str] = &[
    ",",
    ", ",
    " ",
    "\t",
    "*",
    "\r\n",
    "\r\nSet-Cookie: a=b",
    "\0",
    "authorization",
    "Authorization",
    "content-type",
    "x-a",
    "x-aa",
    "a,b,c,",
    "\u{e9}",
    "\"",
    ":80",
    ":",
    ".",
    "[::1]",
    "127.0.0.1",
    "@",
    "/",
    ".test",
    "https://",
    "http://",
];
const DATE: &[u8; 29] = b"Sun, 06 Nov 1994 08:49:37 GMT";

fn value((which, edits): &(u8, Edits<'_>), base: &[&str]) -> Vec<u8> {
    edits.apply(base[usize::from(*which) % base.len()].as_bytes(), WORDS)
}

fn is_token(value: &[u8]) -> bool {
    !value.is_empty() && value.iter().all(|b| b.is_ascii_graphic() && !b"\"(),/:;<=>?@[\\]{}".contains(b))
}

fuzz_target!(|input: Input<'_>| {
    let (host, path) = (value(&input.host, HOSTS), value(&input.path, PATHS));
    let (origin, method) = (value(&input.origin, ORIGINS), value(&input.method, METHODS));
    let lines: Vec<Vec<u8>> =
        input.lines.iter().take(32).map(|edits| edits.apply(b"content-type,x-a", WORDS)).collect();
    let lines: Vec<&[u8]> = lines.iter().map(Vec::as_slice).collect();
    // What the head reader promises of its values.
    let visible = |value: &[u8]| !value.is_empty() && value.iter().all(u8::is_ascii_graphic);
    if !is_token(&method) || !visible(&origin) || !visible(&host) || !visible(&path) || path[0] != b'/' {
        return;
    }
    if lines.iter().any(|line| line.iter().any(|b| b.is_ascii_control() && *b != b'\t')) {
        return;
    }

    let request = Preflight {
        listener: ListenerId(0),
        host: &host,
        target: &path,
        origin: &origin,
        method: &method,
        headers: &lines,
        private_network: input.private_network,
    };
    let Decision::Answer(answer) = TABLE.decide(&request) else { return };
    for connection in [Connection::KeepAlive, Connection::KeepAlive10, Connection::Close] {
        let mut out = Vec::with_capacity(answer.max_len());
        let capacity = out.capacity();
        answer.render(DATE, connection, &mut out);
        assert_eq!(out.capacity(), capacity, "max_len was too small");
        check(&out, &request);
    }
});

/// One response, each header at most once, no value that is not ours or the request's.
fn check(out: &[u8], request: &Preflight<'_>) {
    let text = out.escape_ascii().to_string();
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut response = httparse::Response::new(&mut headers);
    assert_eq!(response.parse(out), Ok(httparse::Status::Complete(out.len())), "{text}");
    assert_eq!(out.iter().filter(|b| **b == b'\n').count(), response.headers.len() + 2, "{text}");

    let one = |name: &str| {
        let mut found = response.headers.iter().filter(|h| h.name.eq_ignore_ascii_case(name));
        let value = found.next().map(|h| h.value);
        assert!(found.next().is_none(), "{name} twice: {text}");
        value
    };
    assert_eq!(one("date"), Some(&DATE[..]), "{text}");
    assert_eq!(one("set-cookie"), None, "{text}");
    let (origin, credentials) = (one("access-control-allow-origin"), one("access-control-allow-credentials"));
    assert!(origin.is_none_or(|origin| origin == b"*" || origin == request.origin), "{text}");
    assert!(credentials.is_none_or(|value| value == b"true"), "{text}");
    if let Some(methods) = one("access-control-allow-methods") {
        assert!(methods.split(|b| *b == b',').all(|method| is_token(method.trim_ascii())), "{text}");
    }
    if let Some(names) = one("access-control-allow-headers") {
        // An echo is checked byte by byte, not as a list: its blanks are the client's.
        assert!(names.iter().all(|b| b", \t".contains(b) || is_token(&[*b])), "{text}");
    }
    assert!(request.private_network || one("access-control-allow-private-network").is_none(), "{text}");
}
