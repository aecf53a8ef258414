//! A table with something of everything, and requests to it: good ones, near misses, and mutations of both.

use crate::policy::{
    HostPattern, ListenerId, ListenerSpec, OnDenied, PathMatch, PolicySpec, RouteLabels, SourceRef, Table,
    dialect::{Rules, envoy, gateway_api, ingress_nginx, native},
};
use crate::reason::PassReason;

pub(crate) const LISTENER: ListenerId = ListenerId(0);
/// Longer than the kernel compares.
pub(crate) const LONG_PATH: &str = "/long/long/long/long/long/long/long/long/long/long/long/long/long/path";

fn strings(items: &[&str]) -> Vec<String> {
    items.iter().map(|item| (*item).to_owned()).collect()
}

fn policy(name: &str, hosts: &[&str], paths: &[&str], rules: Rules) -> PolicySpec {
    let host = |text: &&str| match (*text, text.strip_prefix('*')) {
        ("*", _) => HostPattern::Any,
        (_, Some(suffix)) => HostPattern::Wildcard(suffix.to_owned()),
        (_, None) => HostPattern::Exact((*text).to_owned()),
    };
    let path = |text: &&str| match (text.strip_prefix('~'), text.strip_prefix('=')) {
        (Some(regex), _) => PathMatch::Regex(regex.to_owned()),
        (_, Some(exact)) => PathMatch::Exact(exact.to_owned()),
        _ => PathMatch::Prefix((*text).to_owned()),
    };
    PolicySpec {
        name: name.to_owned(),
        source: SourceRef { origin: "samples".into(), line: 0 },
        listeners: vec![],
        hosts: hosts.iter().map(host).collect(),
        paths: paths.iter().map(path).collect(),
        for_methods: vec![],
        passes: None,
        on_denied: None,
        rules,
    }
}

fn native(cors: &native::Cors) -> Rules {
    Rules::Native(native::validate(cors).0.expect("valid"))
}

/// A table with a plain policy for `/declared` of these hosts.
pub(crate) fn declared(hosts: &[&str]) -> Table {
    let listener = ListenerSpec {
        id: LISTENER,
        name: "web".into(),
        own_literals: Vec::new(),
        loopback_is_own: true,
        public_ports: Vec::new(),
    };
    let cors = native::Cors {
        origins: strings(&["https://app.example"]),
        methods: strings(&["PUT"]),
        ..native::Cors::default()
    };
    let policies = [policy("declared", hosts, &["/declared"], native(&cors))];
    Table::compile(&[listener], &policies, &mut RouteLabels::new(10), 1).0
}

/// The table of everything.
pub(crate) fn table(public_ports: &[u16]) -> Table {
    let listener = ListenerSpec {
        id: LISTENER,
        name: "web".into(),
        own_literals: vec!["192.0.2.1".into()],
        loopback_is_own: true,
        public_ports: public_ports.to_vec(),
    };
    let cors = |max_age: i64| native::Cors {
        origins: strings(&[
            "https://app.example",
            "https://shop.example:8443",
            "https://*.preview.example",
            "http://*.local.example:*",
            "https://any.example:*",
            "http://localhost:*",
        ]),
        methods: strings(&["PUT", "DELETE"]),
        headers: strings(&["content-type", "x-a", "x-request-id", "authorization"]),
        max_age: Some(max_age),
        ..native::Cors::default()
    };
    let all = native::Cors { origins: strings(&["*"]), methods: strings(&["*"]), ..cors(7) };
    let echo = native::Cors { headers: strings(&["*"]), ..cors(8) };
    let unusual = native::Cors { methods: strings(&["PURGE"]), ..cors(9) };
    let annotations = [
        ("enable-cors", "true"),
        ("cors-allow-origin", "https://app.example, https://*.one.example, http://*.port.example:81"),
        ("cors-allow-methods", "GET, PUT"),
    ];
    let annotations = annotations.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    let ingress = || Rules::IngressNginx(ingress_nginx::validate(&annotations).0.expect("valid"));
    let exactly =
        |origin: &str| envoy::StringMatcher { exact: Some(origin.to_owned()), ..Default::default() };
    let envoy = |last: envoy::StringMatcher, headers: Option<&str>, forward: Option<bool>| {
        let cors = envoy::Cors {
            allow_origin_string_match: vec![exactly("https://app.example"), last],
            allow_methods: Some("GET, PUT".to_owned()),
            allow_headers: headers.map(str::to_owned),
            forward_not_matching_preflights: forward,
            ..envoy::Cors::default()
        };
        Rules::Envoy(envoy::validate(&cors, None).0.expect("valid"))
    };
    let end = envoy::StringMatcher { suffix: Some(".end.example".to_owned()), ..Default::default() };
    let gateway = gateway_api::Cors {
        allow_origins: strings(&["https://app.example", "https://*.gate.example", "http://*"]),
        allow_methods: strings(&["GET", "PUT"]),
        allow_headers: strings(&["x-a", "X-B"]),
        max_age: Some(11),
        ..gateway_api::Cors::default()
    };
    let mut policies = vec![
        policy("api", &["api.example", "*.tenant.example"], &["/", "/v1/items", "=/login"], native(&cors(1))),
        policy(
            "items",
            &["api.example"],
            &["/v1/items/special", "=/v1/items/one", "/v1/it"],
            native(&cors(2)),
        ),
        policy("far", &["*.far.tenant.example"], &["/far"], native(&cors(3))),
        policy("all", &["all.example", "a_b.example"], &["/"], native(&all)),
        policy("echo", &["echo.example"], &["/"], native(&echo)),
        policy("unusual", &["unusual.example"], &["/"], native(&unusual)),
        policy("ingress", &["ingress.example", "*.ingress.example"], &["/"], ingress()),
        policy("envoy", &["envoy.example"], &["/"], envoy(end, Some("x-a"), None)),
        policy("envoy-exact", &["exact.envoy.example"], &["/"], envoy(exactly("null"), None, Some(false))),
        policy(
            "gateway",
            &["gateway.example"],
            &["/"],
            Rules::GatewayApi(gateway_api::validate(&gateway).0.expect("valid")),
        ),
        policy("regex", &["regex.example"], &["/plain", "~/v[0-9]+/.*"], native(&cors(4))),
        policy("long", &["long.example"], &[LONG_PATH, "/short"], native(&cors(5))),
        policy("clash-a", &["clash.example"], &["/both", "/a"], native(&cors(6))),
        policy("clash-b", &["clash.example"], &["/both", "/b"], native(&cors(6))),
        policy("any", &["*"], &["/any"], native(&cors(10))),
    ];
    let mut off = policy("off", &["off.example"], &["/"], native(&cors(1)));
    off.passes = Some(PassReason::Disabled);
    let mut passing = policy("passing", &["pass.example"], &["/"], native(&cors(12)));
    passing.on_denied = Some(OnDenied::Pass);
    for (name, method) in [("split-put", Some("PUT")), ("split-others", None)] {
        let split = policy(name, &["split.example"], &["/v1"], native(&cors(13)));
        policies.push(PolicySpec { for_methods: method.into_iter().map(str::to_owned).collect(), ..split });
    }
    policies.extend([off, passing]);
    Table::compile(&[listener], &policies, &mut RouteLabels::new(100), 1).0
}

/// SplitMix64 (Steele, Lea, Flood, 2014): the same numbers each time.
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn of<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len())]
    }
}

pub(crate) const HOSTS: &[&str] = &[
    "api.example",
    "a.tenant.example",
    "a.b.tenant.example",
    "x.far.tenant.example",
    "x.y.far.tenant.example",
    "all.example",
    "a_b.example",
    "echo.example",
    "unusual.example",
    "ingress.example",
    "one.ingress.example",
    "a.b.ingress.example",
    "envoy.example",
    "exact.envoy.example",
    "gateway.example",
    "regex.example",
    "long.example",
    "clash.example",
    "off.example",
    "pass.example",
    "split.example",
    "other.example",
    "tenant.example",
    "API.example",
    "api.example.",
    ".api.example",
    "api..example",
    "api.example:80",
    "api.example:8080",
    "api.example:080",
    "api.example:",
    "api.example:99999",
    "192.0.2.1",
    "127.0.0.1",
    "[::1]",
    "api.example:80:80",
    "a.0x7f",
    "localhost",
    "xx-long-long-long-long-long-long-long-long-long-long-long.tenant.example",
];
pub(crate) const PATHS: &[&str] = &[
    "/",
    "/v1/items",
    "/v1/items/",
    "/v1/items/1",
    "/v1/items/special/9",
    "/v1/items/one",
    "/v1/items/one/x",
    "/v1/item",
    "/v1/it/x",
    "/login",
    "/login/",
    "/any",
    "/any/x",
    "/anyhow",
    "/far/x",
    "/plain",
    "/v2/x",
    "/short",
    "/both",
    "/a",
    "/b/c",
    "/v1/items?a=b/../c",
    "/?",
    "/v1//items",
    "/./",
    "/a/..",
    "/.well-known",
    "/%61",
    "/a;b",
    "/a\\b",
    "/a#b",
    "/?a#b",
    "/~x",
    "/@_&:",
    "/long/long/long/long/long/long/long/long/long/long/long/long/long/path",
    "/long/long/long/long/long/long/long/long/long/long/long/long/long/path/x",
    "/v1/items/aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa/b",
    "/v1/items/aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "*",
    "http://api.example/",
];
pub(crate) const ORIGINS: &[&str] = &[
    "https://app.example",
    "https://shop.example:8443",
    "https://x.preview.example",
    "https://x.y.preview.example",
    "https://preview.example",
    "http://x.local.example",
    "http://x.local.example:3000",
    "https://any.example",
    "https://any.example:1",
    "http://localhost:3000",
    "http://localhost",
    "https://a.one.example",
    "https://a_b.one.example",
    "https://a.b.one.example",
    "http://a.port.example:81",
    "http://a.port.example",
    "https://x.end.example",
    "https://a.gate.example",
    "http://whatever",
    "https://evil.example",
    "https://app.example.",
    "https://app.example/",
    "https://APP.example",
    "https://app.example:443",
    "null",
    "https://",
    "http://",
    "app.example",
    "chrome-extension://abcdef",
    "https://.preview.example",
    "https://x..preview.example",
    "https://[::1]",
    "https://a,b",
    "https://a b",
    "https://x.preview.example:443",
    "https://xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx.preview.example",
];
pub(crate) const METHODS: &[&str] = &[
    "GET",
    "HEAD",
    "POST",
    "PUT",
    "DELETE",
    "PATCH",
    "OPTIONS",
    "PURGE",
    "put",
    "PUTS",
    "P UT",
    "",
    "PROPPATCH",
    "X\tY",
];
pub(crate) const HEADERS: &[&str] = &[
    "content-type",
    "content-type,x-a",
    "authorization,content-type,x-a,x-request-id",
    "x-a,content-type",
    "x-a,x-a",
    "X-A",
    "x-b",
    "content-type, x-a",
    ",x-a",
    "x-a,",
    "",
    " ",
    "x-a;b",
    "x-a,,x-request-id",
    "x-request-id",
    "xaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
];
pub(crate) const LINES: &[&str] = &[
    "Connection: keep-alive",
    "Connection: close",
    "Connection: Close",
    "connection:keep-alive",
    "Connection: upgrade",
    "Accept: */*",
    "User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0.0.0 Safari/537.36",
    "Sec-Fetch-Mode: cors",
    "Sec-Fetch-Site: same-site",
    "Referer: https://app.example/",
    "Accept-Encoding: gzip, deflate, br, zstd",
    "Accept-Language: en-GB,en;q=0.9",
    "Cache-Control: no-cache",
    "Pragma: no-cache",
    "X-Forwarded-Host: other",
    "Via: 1.1 y",
    "Cookie: a=b",
    "Authorization: Basic x",
    "Content-Length: 0",
    "Content-Length: 5",
    "Transfer-Encoding: chunked",
    "Expect: 100-continue",
    "Upgrade: h2c",
    "TE: trailers",
    "Trailer: x",
    "Keep-Alive: 5",
    "Max-Forwards: 0",
    "HTTP2-Settings: AAA",
    "Proxy-Connection: close",
    "Proxy-Authorization: x",
    "X-HTTP-Method: PUT",
    "X-HTTP-Method-Override: PUT",
    "X-Original-URL: /b",
    "X-Rewrite-URL: /b",
    "X-Method-Override: x",
    "Access-Control-Request-Private-Network: true",
    "Access_Control_Request_Method: GET",
    "X_Y: 5",
    "x.y!: 5",
    "X: \t \r\nY:",
    "X: \u{e4}",
    "X: a\rb",
    " folded",
    "No colon",
    ": x",
    "Host : x",
    "Content-Type: text/plain",
    "Content-Language: de",
    "Origin: https://app.example",
    "Host: api.example",
    "Access-Control-Request-Method: PUT",
    "Access-Control-Request-Headers: x-a",
    "X: a\nY: b",
    "X: \0",
];

/// A request of these parts, mostly good ones.
pub(crate) fn request(numbers: &mut Numbers) -> Vec<u8> {
    let mut pick = |list: &[&'static str], good: usize| -> &'static str {
        if numbers.below(4) == 0 { numbers.of(list) } else { list[numbers.below(good)] }
    };
    let (host, path) = (pick(HOSTS, 20), pick(PATHS, 21));
    let (origin, method, headers) = (pick(ORIGINS, 19), pick(METHODS, 5), pick(HEADERS, 3));
    let mut lines = vec![format!("Host: {host}"), format!("Origin: {origin}")];
    lines.push(format!("Access-Control-Request-Method: {method}"));
    if numbers.below(3) > 0 {
        lines.push(format!("Access-Control-Request-Headers: {headers}"));
    }
    for _ in 0..numbers.below(8) {
        let good = numbers.below(6) > 0;
        let line = if good { LINES[numbers.below(16)] } else { numbers.of(LINES) };
        lines.insert(numbers.below(lines.len() + 1), line.to_owned());
    }
    if numbers.below(20) == 0 {
        lines.remove(numbers.below(lines.len()));
    }
    let version = ["HTTP/1.1", "HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/1.1 ", "HTTP/2.0"];
    let version = if numbers.below(8) > 0 { version[0] } else { numbers.of(&version) };
    let mut bytes = format!("OPTIONS {path} {version}\r\n{}\r\n\r\n", lines.join("\r\n")).into_bytes();
    if numbers.below(30) == 0 {
        bytes.extend_from_slice(b"GET / HTTP/1.1\r\n");
    }
    bytes
}

/// Changes a few bytes: flips, replaces, removes, repeats.
pub(crate) fn mutate(bytes: &mut Vec<u8>, numbers: &mut Numbers) {
    const ODD: &[u8] = b"\r\n\t :;,./?%#\\\0\x7f\x80\xff_-Aa0~[]*=";
    for _ in 0..numbers.below(4) {
        if bytes.is_empty() {
            return;
        }
        let at = numbers.below(bytes.len());
        match numbers.below(6) {
            0 => bytes[at] ^= 1 << numbers.below(8),
            1 => bytes[at] = numbers.of(ODD),
            2 => {
                bytes.remove(at);
            }
            3 => bytes.insert(at, numbers.of(ODD)),
            4 => {
                let end = (at + 1 + numbers.below(40)).min(bytes.len());
                let part = bytes[at..end].to_vec();
                bytes.splice(at..at, part);
            }
            _ => bytes[at] = numbers.next() as u8,
        }
    }
}
