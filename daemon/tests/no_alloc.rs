//! `decide` and `render` allocate nothing, whatever the request: counted by the allocator itself.

use preflightd::policy::dialect::{Rules, envoy, gateway_api, ingress_nginx, native};
use preflightd::policy::learned::{Answers, Learnable, Learned, Question};
use preflightd::policy::{
    Connection, Decision, HostPattern, ListenerId, ListenerSpec, PathMatch, PolicySpec, Preflight,
    RouteLabels, SourceRef, Table,
};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

/// Counts what the calling thread allocates.
struct Counting;

// SAFETY: every call goes to the system's allocator unchanged; counting in a const-initialised thread-local without a
// destructor allocates nothing itself.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|n| n.set(n.get() + 1));
        // SAFETY: the caller keeps `alloc`'s contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps `dealloc`'s contract, and `ptr` came from `System`.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn policy(host: HostPattern, path: PathMatch, rules: Rules) -> PolicySpec {
    PolicySpec {
        name: format!("{host:?}"),
        source: SourceRef { origin: "test".into(), line: 0 },
        listeners: vec![],
        hosts: vec![host],
        paths: vec![path],
        for_methods: vec![],
        passes: None,
        on_denied: None,
        rules,
    }
}

fn table() -> Table {
    let strings = |items: &[&str]| items.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
    let many: Vec<String> = (0..50).map(|i| format!("https://app{i}.example")).collect();
    let wild: Vec<String> = (0..50).map(|i| format!("https://*.site{i}.example:*")).collect();
    let native = |cors: native::Cors| Rules::Native(native::validate(&cors).0.expect("valid"));
    let gateway = |cors: gateway_api::Cors| Rules::GatewayApi(gateway_api::validate(&cors).0.expect("valid"));
    let exact = |name: &str| HostPattern::Exact(name.to_owned());
    let root = || PathMatch::Prefix("/".to_owned());
    let mut policies = vec![
        policy(
            exact("native.example"),
            root(),
            native(native::Cors {
                origins: [many, wild].concat(),
                methods: strings(&["PUT"]),
                headers: strings(&["content-type", "x-a"]),
                ..native::Cors::default()
            }),
        ),
        policy(
            exact("echo.example"),
            root(),
            gateway(gateway_api::Cors {
                allow_origins: strings(&["*"]),
                allow_methods: strings(&["*"]),
                allow_headers: strings(&["*"]),
                allow_credentials: Some(true),
                ..gateway_api::Cors::default()
            }),
        ),
        policy(
            HostPattern::Wildcard(".nginx.example".into()),
            root(),
            Rules::IngressNginx(
                ingress_nginx::validate(
                    &[
                        ("enable-cors", "true"),
                        ("cors-allow-origin", "https://*.a.example, https://app1.example"),
                    ]
                    .map(|(k, v)| (k.to_owned(), v.to_owned()))
                    .into(),
                )
                .0
                .expect("valid"),
            ),
        ),
        policy(
            HostPattern::Any,
            PathMatch::Regex("/v[0-9]+/.*".into()),
            Rules::Envoy(
                envoy::validate(
                    &envoy::Cors {
                        allow_origin_string_match: vec![
                            envoy::StringMatcher {
                                suffix: Some(".A.example".into()),
                                ignore_case: true,
                                ..Default::default()
                            },
                            envoy::StringMatcher {
                                safe_regex: Some("https://[a-z0-9]+\\.example".into()),
                                ..Default::default()
                            },
                        ],
                        allow_headers: Some("*".into()),
                        forward_not_matching_preflights: Some(false),
                        ..envoy::Cors::default()
                    },
                    None,
                )
                .0
                .expect("valid"),
            ),
        ),
    ];
    for i in 0..40 {
        policies.push(policy(
            exact("native.example"),
            PathMatch::Prefix(format!("/p{i}")),
            policies[1].rules.clone(),
        ));
    }
    let listener = ListenerSpec {
        id: ListenerId(0),
        name: "l".into(),
        own_literals: vec![],
        loopback_is_own: true,
        public_ports: vec![],
    };
    let (table, findings) = Table::compile(&[listener], &policies, &mut RouteLabels::new(1000), 1);
    assert_eq!(findings, []);
    table
}

#[test]
fn decide_and_render_allocate_nothing() {
    let table = table();
    let hostile_names = "a,".repeat(8192);
    let hostile_blanks = " ".repeat(16384);
    let deep = "/a".repeat(4096);
    let long = "a.".repeat(126) + "b";
    let hosts = [
        "native.example",
        "NATIVE.example:443",
        "echo.example",
        "a.nginx.example",
        "a.b.nginx.example",
        "other.example",
        "127.0.0.1:8080",
        "192.0.2.1",
        "[::1]",
        "user@x",
        "",
        &long,
    ];
    let targets = ["/", "/p7/x?q=%20", "/v1/x", &deep, "*", ""];
    let origins = [
        "https://app1.example",
        "https://x.site7.example:8443",
        "https://b.a.example",
        "HTTPS://B.A.EXAMPLE",
        "null",
        "https://evil.example",
        "\u{1}",
        &long,
    ];
    let lines: &[&[&[u8]]] = &[
        &[],
        &[b"content-type,x-a"],
        &[b"authorization"],
        &[hostile_names.as_bytes()],
        &[hostile_blanks.as_bytes()],
        &[b"", b"x-a"],
        &[b"x\0"],
    ];
    let mut out = Vec::with_capacity(64 << 10);
    let (mut answers, mut passes) = (0, 0);
    let mut run = || {
        for host in hosts {
            for target in targets {
                for origin in origins {
                    for method in ["GET", "PUT", "bad method", ""] {
                        for headers in lines {
                            let request = Preflight {
                                listener: ListenerId(0),
                                host: host.as_bytes(),
                                target: target.as_bytes(),
                                origin: origin.as_bytes(),
                                method: method.as_bytes(),
                                headers,
                                private_network: true,
                            };
                            match table.decide(&request) {
                                Decision::Answer(answer) => {
                                    answers += 1;
                                    out.clear();
                                    let max = answer.max_len();
                                    answer.render(
                                        b"Sun, 06 Nov 1994 08:49:37 GMT",
                                        Connection::Close,
                                        &mut out,
                                    );
                                    assert!(out.len() <= max);
                                }
                                Decision::Pass(..) => passes += 1,
                            }
                        }
                    }
                }
            }
        }
    };
    // The first round may fill caches that the process has once.
    run();
    let before = ALLOCATIONS.with(Cell::get);
    run();
    assert_eq!(ALLOCATIONS.with(Cell::get) - before, 0, "allocations");
    assert!(answers > 1000 && passes > 1000, "{answers} answers, {passes} passes");
}

#[test]
fn learned_answers_allocate_nothing() {
    const REQUEST: Preflight<'static> = Preflight {
        listener: ListenerId(0),
        host: b"learned.example:8080",
        target: b"/x?y=%20",
        origin: b"https://app1.example",
        method: b"PUT",
        headers: &[b"content-type,x-a"],
        private_network: false,
    };
    let hosts = [HostPattern::Exact("learned.example".to_owned())];
    let learnable = Learnable::new(&[], &hosts, &mut RouteLabels::new(10));
    let question = Arc::new(Question::of(&REQUEST).expect("a question"));
    let lines = [("Access-Control-Allow-Origin".to_owned(), "https://app1.example".to_owned())];
    let learned = Arc::new(Learned::new(question, false, &lines));
    let table = table().with_learned(2, Some(Arc::new(Answers::new(Arc::new(learnable), vec![learned]))));
    let hostile_names = "a,".repeat(8192);
    let mut out = Vec::with_capacity(4096);
    let mut run = || {
        for (request, answered) in [
            (REQUEST, true),
            (Preflight { headers: &[b"content-type ", b" x-a"], ..REQUEST }, true),
            (Preflight { headers: &[hostile_names.as_bytes()], ..REQUEST }, false),
            (Preflight { target: b"/x", ..REQUEST }, false),
            (Preflight { host: b"LEARNED.example:8080", ..REQUEST }, false),
        ] {
            match table.decide(&request) {
                Decision::Answer(answer) => {
                    assert!(answered);
                    out.clear();
                    answer.render(b"Sun, 06 Nov 1994 08:49:37 GMT", Connection::Close, &mut out);
                }
                Decision::Pass(..) => assert!(!answered),
            }
        }
    };
    run();
    let before = ALLOCATIONS.with(Cell::get);
    run();
    assert_eq!(ALLOCATIONS.with(Cell::get) - before, 0, "allocations");
}
