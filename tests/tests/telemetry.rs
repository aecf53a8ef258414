//! What the admin address shows: every request counted once, where it belongs; health; bounded labels.

use preflightd_tests::{
    Behaviour, Config, Daemon, Engine, Upstream,
    client::{fetch, get, preflight},
    daemon::{ORIGIN, POLICY},
    site::wait_until,
};

const REQUESTS: &str = "preflightd_requests_total";

#[test]
fn requests_are_counted_by_route_and_outcome() {
    let policies = r#"
        [[policy]]
        name = "shop"
        hosts = ["shop.test"]
        paths = [{ prefix = "/v1" }, { exact = "/login" }]
        origins = ["https://app.example"]
        methods = ["PUT"]
        headers = ["x-demo"]

        [[policy]]
        name = "wide"
        hosts = ["*.wide.test"]
        origins = ["https://app.example"]
        on_denied = "pass"
    "#;
    for engine in Engine::BOTH {
        let upstream = Upstream::start(Behaviour::report());
        let daemon = Daemon::start(Config::new(upstream.address(), policies).engine(engine));
        let send = |times: u64, host: &str, path: &str, origin: &str, method: &str, headers: Option<&str>| {
            for _ in 0..times {
                daemon.connect().exchange(preflight(host, path, origin, method, headers));
            }
        };
        send(3, "shop.test", "/v1/cart", ORIGIN, "PUT", Some("x-demo"));
        send(2, "shop.test", "/login", ORIGIN, "GET", None);
        send(4, "shop.test", "/v1", "https://evil.example", "PUT", None);
        send(1, "shop.test", "/v1", ORIGIN, "DELETE", None);
        send(2, "shop.test", "/v1", ORIGIN, "PUT", Some("x-other"));
        send(1, "shop.test", "/elsewhere", ORIGIN, "PUT", None);
        send(5, "a.wide.test", "/", ORIGIN, "GET", None);
        send(2, "b.wide.test", "/", "https://evil.example", "GET", None);
        send(1, "nobody.test", "/", ORIGIN, "GET", None);
        daemon.connect().exchange(get("shop.test", "/v1"));

        let metrics = daemon.metrics();
        for (policy, host, outcome, reason, wanted) in [
            ("shop", "shop.test", "allowed", "", 5),
            ("shop", "shop.test", "denied", "origin", 4),
            ("shop", "shop.test", "denied", "method", 1),
            ("shop", "shop.test", "denied", "headers", 2),
            ("wide", "*.wide.test", "allowed", "", 5),
            ("wide", "*.wide.test", "passed", "origin_not_allowed", 2),
            ("", "", "passed", "no_route", 1),
            ("", "", "passed", "no_host", 1),
            ("", "", "passed", "not_options", 1),
        ] {
            let labels = [("policy", policy), ("host", host), ("outcome", outcome), ("reason", reason)];
            assert_eq!(metrics.count(REQUESTS, &labels), wanted, "{engine:?}: {labels:?}");
        }
        assert_eq!(metrics.count(REQUESTS, &[]), 22, "{engine:?}");
        assert_eq!(metrics.count(REQUESTS, &[("route", "/login")]), 2, "{engine:?}");

        let histogram = "preflightd_answer_duration_seconds";
        // Those of batches that were not measured are noted in the next lull.
        wait_until("every answer's duration", || {
            daemon.metrics().count(&format!("{histogram}_count"), &[]) == 17
        });
        let metrics = daemon.metrics();
        let answers = metrics.count(&format!("{histogram}_count"), &[]);
        assert_eq!(metrics.count(&format!("{histogram}_bucket"), &[("le", "+Inf")]), answers, "{engine:?}");
        assert!(metrics.sum(&format!("{histogram}_sum"), &[]) > 0.0, "{engine:?}");
    }
}

#[test]
fn connections_and_relayed_bytes() {
    for engine in Engine::BOTH {
        let upstream = Upstream::start(Behaviour::Echo);
        let daemon = Daemon::start(Config::new(upstream.address(), POLICY).engine(engine));
        // One that has spoken: the kernel may keep a silent one to itself for a while (TCP_DEFER_ACCEPT).
        let mut idle = daemon.connect();
        idle.exchange(preflight("a.test", "/", ORIGIN, "PUT", None));
        let mut answered = daemon.connect();
        answered.exchange(preflight("a.test", "/", ORIGIN, "PUT", None));
        drop(answered);
        let mut relayed = daemon.connect();
        relayed.send([b'x'; 1000]);
        relayed.read_exact(1000);
        let count = |name: &str, labels: &[(&str, &str)]| daemon.metrics().count(name, labels);
        wait_until("the closed connection", || {
            count("preflightd_connections_closed_total", &[("cause", "done")]) == 1
        });
        assert_eq!(count("preflightd_connections_accepted_total", &[]), 3, "{engine:?}");
        assert_eq!(count("preflightd_connections_handed_over_total", &[]), 1, "{engine:?}");
        assert_eq!(count("preflightd_connections_open", &[]), 1, "{engine:?}");
        assert_eq!(count("preflightd_relay_connections_open", &[]), 1, "{engine:?}");
        drop((idle, relayed));
        wait_until("all to be closed", || {
            count("preflightd_relay_connections_open", &[]) + count("preflightd_connections_open", &[]) == 0
        });
        for direction in ["up", "down"] {
            let bytes = count("preflightd_relay_bytes_total", &[("direction", direction)]);
            assert_eq!(bytes, 1000, "{engine:?}, {direction}");
        }
    }
}

/// Neither many policies nor made-up hosts make many series.
#[test]
fn labels_are_bounded() {
    use std::fmt::Write as _;
    let mut policies = String::new();
    for i in 0..50 {
        writeln!(
            policies,
            "[[policy]]\nname = \"p{i}\"\nhosts = [\"h{i}.test\"]\norigins = [\"https://app.example\"]"
        )
        .expect("writing into a string");
    }
    let upstream = Upstream::start(Behaviour::report());
    let mut config = Config::new(upstream.address(), policies);
    config.admin = "max_routes = 10".to_owned();
    let daemon = Daemon::start(config);
    for i in 0..100 {
        // From 50 on there is no such policy.
        daemon.connect().exchange(preflight(&format!("h{i}.test"), "/", ORIGIN, "GET", None));
    }
    let metrics = daemon.metrics();
    assert_eq!(metrics.count(REQUESTS, &[("outcome", "allowed")]), 50);
    assert_eq!(metrics.count(REQUESTS, &[("reason", "no_host")]), 50);
    let series = metrics.series(REQUESTS);
    assert!(series <= 11, "{series} series");
}

#[test]
fn health_and_state() {
    for engine in Engine::BOTH {
        let (daemon, _upstream) = Daemon::start_simple(engine);
        for (path, status) in [("/healthz", 200), ("/readyz", 200), ("/metrics", 200), ("/else", 404)] {
            assert_eq!(fetch(daemon.admin(), path).expect("a response").status, status, "{path}");
        }
        let metrics = daemon.metrics();
        assert_eq!(metrics.count("preflightd_ready", &[]), 1);
        assert_eq!(metrics.series("preflightd_worker_table_generation"), 2, "one for each worker");
        let generation = metrics.count("preflightd_table_generation", &[]);
        for worker in ["0", "1"] {
            let labels = [("worker", worker)];
            assert_eq!(metrics.count("preflightd_worker_table_generation", &labels), generation);
        }
        assert!(metrics.has("preflightd_build_info"));
        // Which engine was chosen is in the log and in the metrics.
        let text = fetch(daemon.admin(), "/metrics").expect("/metrics").body;
        let text = String::from_utf8(text).expect("metrics in UTF-8");
        let info =
            text.lines().find(|l| l.starts_with("preflightd_engine_info")).expect("preflightd_engine_info");
        assert!(info.contains(engine.as_str()), "{info}");
        assert!(daemon.log().contains(engine.as_str()), "the log names the engine");
    }
}
