//! Learned answers: an application that answers CORS itself is asked, remembered and followed, and what may not be
//! learned never is.
#![forbid(unsafe_code)]

use preflightd_tests::{
    Behaviour, Config, Daemon, Engine, Express, Response, Upstream,
    client::preflight,
    daemon::{ORIGIN, POLICY, run},
    express,
    site::{wait_for, wait_until},
    steering::{Lab, Options, can_run, plain},
};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

const HOST: &str = "app.test";

/// A daemon that learns of [`HOST`], with these lines in `[learn]` and these policies.
fn learning(upstream: std::net::SocketAddr, engine: Engine, learn: &str, policies: &str) -> Daemon {
    let directory = tempfile::tempdir().expect("a directory").keep();
    let mut config = Config::new(
        upstream,
        format!("[ask]\nper_second = 1000\n\n[learn]\nhosts = [\"{HOST}\"]\n{learn}\n\n{policies}"),
    )
    .engine(engine);
    config.admin = format!("socket = \"{}\"", directory.join("admin").display());
    Daemon::start(config)
}

fn socket(daemon: &Daemon) -> String {
    let line = &daemon.config().admin;
    line.split('"').nth(1).expect("a path").to_owned()
}

fn ask(daemon: &Daemon, target: &str, origin: &str, method: &str, headers: Option<&str>) -> Response {
    express::exchange(daemon.address(), preflight(HOST, target, origin, method, headers))
}

fn known(daemon: &Daemon) -> u64 {
    daemon.metrics().count("preflightd_learned_entries", &[("state", "known")])
}

fn answered(daemon: &Daemon) -> u64 {
    daemon.metrics().count("preflightd_requests_total", &[("policy", "learned"), ("outcome", "allowed")])
}

/// Asks until we answer.
fn learn(daemon: &Daemon, target: &str, origin: &str, method: &str, headers: Option<&str>) -> Response {
    let before = answered(daemon);
    wait_for("an answer to be learned", || {
        let response = ask(daemon, target, origin, method, headers);
        if answered(daemon) > before {
            return Some(response);
        }
        thread::sleep(Duration::from_millis(50));
        None
    })
}

/// What a browser looks at: names in lower case.
fn essence(response: &Response) -> BTreeMap<String, String> {
    let lower = |(name, value): &(String, String)| (name.to_ascii_lowercase(), value.clone());
    let all = response.headers.iter().map(lower);
    all.filter(|(name, _)| name.starts_with("access-control-")).collect()
}

fn list(daemon: &Daemon) -> Vec<Value> {
    let output = run(["learned", "list", "--admin-socket", &socket(daemon), "--format", "json"]);
    assert!(output.status.success(), "{output:?}");
    let told: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    told["entries"].as_array().expect("a list").clone()
}

#[test]
fn express_is_answered_as_express_answers() {
    if !express::can_run() {
        return;
    }
    for (name, options, cases) in [
        (
            "one of several origins, with credentials",
            r#"{"origin": ["https://app.example", "https://b.example"], "methods": ["GET", "PUT"],
                "allowedHeaders": ["content-type", "x-a"], "credentials": true, "maxAge": 60}"#,
            &[("https://app.example", "PUT", Some("content-type")), ("https://b.example", "PUT", None)][..],
        ),
        (
            "echoes the origin and the headers",
            r#"{"origin": true, "maxAge": 60, "exposedHeaders": ["x-b"]}"#,
            &[("https://any.example", "DELETE", Some("content-type,x-anything"))],
        ),
        (
            "everything, status 200",
            r#"{"maxAge": 60, "optionsSuccessStatus": 200}"#,
            &[(ORIGIN, "PATCH", None)],
        ),
        ("without a time", "{}", &[(ORIGIN, "PUT", Some("x-a"))]),
    ] {
        for engine in Engine::BOTH {
            let app = Express::start(options);
            let daemon = learning(app.address(), engine, "", "");
            for (origin, method, headers) in cases {
                let ours = learn(&daemon, "/v1/cart?q=1", origin, method, *headers);
                let request = preflight(HOST, "/v1/cart?q=1", origin, method, *headers);
                let theirs = express::exchange(app.address(), request);
                assert_eq!(essence(&ours), essence(&theirs), "{name}, {engine:?}");
                assert_eq!(ours.status, theirs.status, "{name}, {engine:?}");
                assert!(
                    !essence(&ours).is_empty() && ours.header("x-powered-by").is_none(),
                    "{name}: {ours:?}"
                );
                let vary = ours.header("vary").expect("Vary").to_ascii_lowercase();
                for varies in theirs.header("vary").unwrap_or_default().split(',') {
                    assert!(vary.contains(&varies.trim().to_ascii_lowercase()), "{name}: {vary}, {varies}");
                }
            }
            // From here on the application is not asked, also on one connection.
            let before = app.preflights();
            let (origin, method, headers) = cases[0];
            if name != "without a time" {
                let mut client = daemon.connect();
                for _ in 0..20 {
                    let again = client.exchange(preflight(HOST, "/v1/cart?q=1", origin, method, headers));
                    assert!(again.status == 204 || again.status == 200, "{name}: {again:?}");
                }
                assert_eq!(app.preflights(), before, "{name}, {engine:?}");
            }
            // Another question is another matter.
            assert_eq!(ask(&daemon, "/v1/cart?q=2", origin, method, headers).status, ours_status(name));
            assert!(app.preflights() > before, "{name}, {engine:?}");
        }
    }
}

fn ours_status(name: &str) -> u16 {
    if name.ends_with("200") { 200 } else { 204 }
}

#[test]
fn a_changed_policy_is_followed_within_its_time() {
    const TTL: Duration = Duration::from_secs(4);
    if !express::can_run() {
        return;
    }
    let options = |methods: &str| format!(r#"{{"origin": true, "methods": "{methods}", "maxAge": 4}}"#);
    let app = Express::start(&options("PUT"));
    let daemon = learning(app.address(), Engine::Auto, "", "");
    let methods =
        |response: &Response| response.header("access-control-allow-methods").map(ToOwned::to_owned);
    assert_eq!(methods(&learn(&daemon, "/", ORIGIN, "PUT", None)).as_deref(), Some("PUT"));
    for (before, after) in [("PUT", "PUT,DELETE"), ("PUT,DELETE", "PATCH")] {
        app.set(&options(after));
        let changed = Instant::now();
        loop {
            // As of when it was sent: the answer may take its time.
            let at = changed.elapsed();
            let got = methods(&ask(&daemon, "/", ORIGIN, "PUT", None)).expect("methods");
            if got == after {
                break;
            }
            assert_eq!(got, before);
            assert!(at < TTL, "{at:?} after the change the old answer is still given");
            thread::sleep(Duration::from_millis(20));
        }
        let learned = learn(&daemon, "/", ORIGIN, "PUT", None);
        assert_eq!(methods(&learned).as_deref(), Some(after), "and the new one is learned");
    }
}

/// An upstream that answers as the path says.
fn by_path() -> Upstream {
    const CORS: &str = "Access-Control-Allow-Origin: https://app.example\r\nAccess-Control-Max-Age: 600\r\n";
    let count = AtomicU64::new(0);
    Upstream::start(Behaviour::Http(Arc::new(move |request| {
        let n = count.fetch_add(1, Ordering::Relaxed);
        let path = request.head.split(' ').nth(1).unwrap_or_default();
        let (status, lines, body) = match path {
            "/cookie" => ("204 No Content", "Set-Cookie: a=b\r\n".to_owned(), ""),
            "/body" => ("200 OK", "Content-Length: 2\r\n".to_owned(), "ok"),
            "/vary" => ("204 No Content", "Vary: Origin, Cookie\r\n".to_owned(), ""),
            "/redirect" => ("302 Found", "Location: /\r\nContent-Length: 0\r\n".to_owned(), ""),
            "/missing" => ("404 Not Found", "Content-Length: 0\r\n".to_owned(), ""),
            "/conflict" => ("204 No Content", format!("Access-Control-Allow-Methods: M{n}\r\n"), ""),
            "/plain" => return b"HTTP/1.1 204 No Content\r\nAllow: GET\r\n\r\n".to_vec(),
            _ => ("204 No Content", String::new(), ""),
        };
        format!("HTTP/1.1 {status}\r\n{CORS}{lines}\r\n{body}").into_bytes()
    })))
}

#[test]
fn what_may_not_be_learned_is_not_and_nothing_of_a_client_is_asked() {
    for engine in Engine::BOTH {
        let upstream = by_path();
        let daemon = learning(upstream.address(), engine, "", "");
        let cases = [
            ("/cookie", "set_cookie"),
            ("/body", "body"),
            ("/vary", "vary"),
            ("/redirect", "status"),
            ("/missing", "status"),
            ("/plain", "no_origin"),
            ("/conflict", "conflict"),
        ];
        // A client with a story of its own.
        let request = |target: &str| {
            let head = preflight(HOST, target, ORIGIN, "PUT", Some("x-b, X-A"));
            let head = String::from_utf8(head).expect("ASCII");
            head.replace("\r\n\r\n", "\r\nX-Secret: of the client\r\nX-Forwarded-For: 192.0.2.1\r\n\r\n")
        };
        for (target, reason) in cases {
            let count = || daemon.metrics().count("preflightd_learned_total", &[("result", reason)]);
            let before = count();
            let passed = daemon.connect().exchange(request(target));
            wait_until(format_args!("{target} to be refused"), || count() > before);
            for _ in 0..3 {
                let again = daemon.connect().exchange(request(target));
                assert_eq!(again.status, passed.status, "{target}, {engine:?}");
            }
        }
        assert_eq!((known(&daemon), answered(&daemon)), (0, 0), "{engine:?}");
        let states: Vec<_> = list(&daemon).iter().map(|entry| entry["state"].clone()).collect();
        assert_eq!(states, vec!["refused"; cases.len()], "{engine:?}");
        let mut asked = 0;
        for index in 0..upstream.count() {
            let bytes = String::from_utf8(upstream.ended(index).bytes).expect("ASCII");
            if bytes.contains("X-Secret") {
                continue;
            }
            asked += 1;
            let target = bytes.split(' ').nth(1).expect("a target");
            let expected = format!(
                "OPTIONS {target} HTTP/1.1\r\nHost: {HOST}\r\nOrigin: {ORIGIN}\r\n\
                 Access-Control-Request-Method: PUT\r\nAccess-Control-Request-Headers: x-a,x-b\r\n\r\n"
            );
            assert_eq!(bytes, expected, "{engine:?}");
        }
        assert_eq!(asked, cases.len() + 1, "each once, and what conflicts twice");
    }
}

#[test]
fn nothing_is_learned_where_a_policy_answers_or_of_others() {
    let upstream = by_path();
    let daemon = learning(
        upstream.address(),
        Engine::Auto,
        "",
        &POLICY.replace("hosts = [\"*\"]", "hosts = [\"*.test\"]\npaths = [{ prefix = \"/declared\" }]"),
    );
    assert_eq!(
        ask(&daemon, "/declared/x", ORIGIN, "PUT", None).header("access-control-max-age"),
        Some("600")
    );
    assert_eq!(ask(&daemon, "/declared/x", "https://evil.example", "PUT", None).status, 403);
    assert_eq!(upstream.count(), 0);
    // Beside it the application is asked.
    learn(&daemon, "/other", ORIGIN, "PUT", None);
    // Not of hosts that nobody named, nor of what is no plain preflight.
    for (host, lines) in [("other.example", ""), (HOST, "Cookie: a=b\r\n"), (HOST, "Authorization: x\r\n")] {
        let head = String::from_utf8(preflight(host, "/third", ORIGIN, "PUT", None)).expect("ASCII");
        let head = head.replace("\r\n\r\n", &format!("\r\n{lines}\r\n"));
        assert_eq!(daemon.connect().exchange(head).status, 204, "{host}, {lines:?}");
    }
    thread::sleep(Duration::from_millis(800));
    let targets: Vec<_> = list(&daemon).iter().map(|entry| entry["target"].clone()).collect();
    assert_eq!(targets, ["/other"]);
}

#[test]
fn memory_is_bounded_and_a_purge_forgets() {
    let upstream = by_path();
    let daemon = learning(upstream.address(), Engine::Auto, "max_entries = 8", "");
    for i in 0..60 {
        ask(&daemon, &format!("/{i}"), ORIGIN, "PUT", None);
        assert!(known(&daemon) <= 8);
    }
    wait_until("entries to give way", || daemon.metrics().count("preflightd_learned_evicted_total", &[]) > 0);
    wait_until("answers to be learned", || known(&daemon) > 0);
    assert!(list(&daemon).len() <= 8);
    assert_eq!(daemon.metrics().count("preflightd_learned_entries_limit", &[]), 8);

    learn(&daemon, "/kept", ORIGIN, "PUT", None);
    let purge = |more: &[&str]| {
        let socket = socket(&daemon);
        let output = run([&["learned", "purge", "--admin-socket", &*socket], more].concat());
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).expect("text")
    };
    assert_eq!(purge(&["--host", "other.test"]), "forgotten: 0\n");
    assert_ne!(purge(&["--host", HOST]), "forgotten: 0\n");
    wait_until("the proxy to answer", || {
        let before = upstream.count();
        ask(&daemon, "/kept", ORIGIN, "PUT", None);
        upstream.count() > before
    });
    let text = run(["learned", "list", "--admin-socket", &socket(&daemon)]);
    assert!(String::from_utf8_lossy(&text.stdout).contains("of at most 8"), "{text:?}");
    // Learned anew.
    learn(&daemon, "/kept", ORIGIN, "PUT", None);
}

#[test]
fn a_daemon_that_learns_nothing_says_so() {
    let upstream = by_path();
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("admin").display().to_string();
    let mut config = Config::new(upstream.address(), POLICY);
    config.admin = format!("socket = \"{path}\"");
    let daemon = Daemon::start(config);
    for (command, expected) in [
        (&["learned", "list"][..], "learn.hosts"),
        (&["learned", "purge"], "learn.hosts"),
        (&["shadow", "report"], "shadow.enabled"),
    ] {
        let output = run([command, &["--admin-socket", &*path]].concat());
        assert_eq!(output.status.code(), Some(1), "{command:?}: {output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(expected), "{command:?}: {output:?}");
    }
    drop(daemon);
    let output = run(["learned", "list", "--admin-socket", &path]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
}

/// Steered: the kernel shows what goes to the proxy, which is asked in its own namespace, and workers answer then.
#[test]
fn a_steered_proxy_is_asked_and_answered_for() {
    const CORS: &str = "location /app {
        add_header Access-Control-Allow-Origin $http_origin always;
        add_header Access-Control-Allow-Methods PUT always;
        add_header Access-Control-Max-Age 600 always;
        add_header X-From nginx always;
        return 204;
    }";
    if !can_run() || plain() {
        return;
    }
    for outside in [false, true] {
        let lab = Lab::with(Options {
            kernel_answers: true,
            nginx: CORS.to_owned(),
            toml: format!("[learn]\nhosts = [\"{HOST}\"]"),
            policies: POLICY.replace("\"*\"", "\"api.test\""),
            outside,
            ..Options::default()
        });
        for site in lab.sites() {
            let request = preflight(HOST, "/app/x?y", ORIGIN, "PUT", Some("x-a"));
            let first = lab.exchange(site, &request);
            assert_eq!(first.header("x-from"), Some("nginx"), "{site}: nobody knows it yet: {first:?}");
            let learned = wait_for("a worker to answer", || {
                let response = lab.exchange(site, &request);
                response.header("x-from").is_none().then_some(response)
            });
            assert_eq!(learned.status, 204, "{site}");
            assert_eq!(essence(&learned), essence(&first), "{site}");
            // What is not known goes to the proxy at once, and comes to no worker.
            for (name, origin, method, target) in [
                ("another origin", "https://b.example", "PUT", "/app/x?y"),
                ("another method", ORIGIN, "DELETE", "/app/x?y"),
                ("another path", ORIGIN, "PUT", "/app/z"),
                ("another query", ORIGIN, "PUT", "/app/x?z"),
            ] {
                let response = lab.exchange(site, preflight(HOST, target, origin, method, Some("x-a")));
                assert_eq!(response.header("x-from"), Some("nginx"), "{site}, {name}: {response:?}");
            }
            lab.get(site, "/y");
        }
        assert_eq!(
            lab.metrics().count("preflightd_steer_turned_back_total", &[]),
            0,
            "nobody has to come again"
        );
    }
}
