//! Hot reload: a good file takes effect without one failed request, a bad one changes nothing.

use preflightd_tests::{
    Behaviour, Config, Daemon, Upstream,
    client::{get, preflight},
    daemon::{ORIGIN, POLICY},
    site::wait_until,
};
use rustix::process::Signal;
use std::{
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
};

fn request() -> Vec<u8> {
    preflight("api.test", "/x", ORIGIN, "PUT", Some("x-demo"))
}

/// [`POLICY`] with another `max_age`, so that answers tell which table gave them.
fn policy(max_age: usize) -> String {
    POLICY.replace("600", &max_age.to_string())
}

/// What a fresh connection gets now.
fn current(daemon: &Daemon) -> Option<usize> {
    max_age(&daemon.preflight(ORIGIN, "PUT", Some("x-demo")))
}

fn max_age(response: &preflightd_tests::Response) -> Option<usize> {
    response.header("access-control-max-age").and_then(|v| v.parse().ok())
}

#[test]
fn under_load_no_request_fails() {
    const RELOADS: usize = 12;
    let upstream = Upstream::start(Behaviour::report());
    let mut daemon = Daemon::start(Config::new(upstream.address(), policy(1)));
    let (address, config) = (daemon.address(), daemon.config().clone());
    // The newest table that may already be in use, and the newest that surely is.
    let (newest, stop, served) = (AtomicUsize::new(1), AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        let connect = || preflightd_tests::Client::connect(address);
        for thread in 0..8 {
            let (newest, stop, served) = (&newest, &stop, &served);
            scope.spawn(move || {
                let mut client = connect();
                let mut last = 0;
                for i in 0.. {
                    if stop.load(Ordering::Acquire) {
                        break;
                    }
                    if thread % 2 == 1 && i % 3 == 0 {
                        // New connections reach any worker, which may be a reload behind another.
                        (client, last) = (connect(), 0);
                    }
                    if thread >= 6 {
                        client = connect();
                        let response = client.exchange(get("api.test", "/y"));
                        assert_eq!(response.status, 200, "{response:?}");
                    } else {
                        let response = client.exchange(request());
                        assert_eq!(response.status, 204, "{response:?}");
                        let table = max_age(&response).expect("max-age");
                        let limit = newest.load(Ordering::Acquire);
                        assert!(last <= table && table <= limit, "{last} <= {table} <= {limit}");
                        last = table;
                    }
                    served.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for generation in 2..2 + RELOADS {
            newest.store(generation, Ordering::Release);
            let before = served.load(Ordering::Relaxed);
            daemon.rewrite(config.clone().policies(&policy(generation)));
            if generation % 2 == 0 {
                daemon.signal(Signal::HUP);
            }
            wait_until("the new table", || current(&daemon) == Some(generation));
            wait_until("some load", || served.load(Ordering::Relaxed) > before + 400);
        }
        stop.store(true, Ordering::Release);
    });
    let served = served.into_inner();
    assert!(served > 2_000, "only {served} requests");
    eprintln!("{served} requests over {RELOADS} reloads");
}

#[test]
fn a_bad_file_changes_nothing() {
    let upstream = Upstream::start(Behaviour::report());
    let mut daemon = Daemon::start(Config::new(upstream.address(), policy(1)));
    let good = daemon.config().clone();
    let mut kept = daemon.connect();
    assert_eq!(kept.exchange(request()).status, 204);
    let toml = |policies: &str| good.clone().policies(policies).toml(daemon.admin());
    for (name, text) in [
        ("no TOML", "[[listener".to_owned()),
        ("unknown key", toml(&policy(2).replace("max_age", "max_edge"))),
        ("a refused origin", toml(&policy(2).replace("https://app.example", "https://app.example/"))),
        ("empty", String::new()),
    ] {
        let refused = || daemon.metrics().count("preflightd_reloads_total", &[("result", "refused")]);
        let before = refused();
        daemon.rewrite_text(&text);
        wait_until(format_args!("{name} to be refused"), || refused() > before);
        assert_eq!(daemon.metrics().count("preflightd_policies_current", &[]), 0, "{name}");
        assert_eq!(current(&daemon), Some(1), "{name}");
        assert_eq!(max_age(&kept.exchange(request())), Some(1), "{name}");
        let ready = preflightd_tests::client::fetch(daemon.admin(), "/readyz").expect("/readyz");
        assert_eq!(ready.status, 200, "{name}");
    }
    assert!(daemon.log().contains("max_edge"), "the log names what was wrong");
    daemon.rewrite(good.policies(&policy(3)));
    wait_until("the next good file", || current(&daemon) == Some(3));
    assert_eq!(max_age(&kept.exchange(request())), Some(3));
    assert_eq!(daemon.metrics().count("preflightd_policies_current", &[]), 1);
}

#[test]
fn sighup_alone_reloads() {
    let upstream = Upstream::start(Behaviour::report());
    let daemon = Daemon::start(Config::new(upstream.address(), policy(1)));
    let reloads = || daemon.metrics().count("preflightd_reloads_total", &[]);
    let before = reloads();
    daemon.signal(Signal::HUP);
    wait_until("a reload", || reloads() > before);
    assert_eq!(current(&daemon), Some(1));
}

#[test]
fn requests_in_flight_notice_nothing() {
    let upstream = Upstream::start(Behaviour::Echo);
    let mut daemon = Daemon::start(Config::new(upstream.address(), policy(1)));
    let request = request();
    let mut begun = daemon.connect();
    begun.send(&request[..100]);
    let mut relayed = daemon.connect();
    relayed.send("GET ");
    assert_eq!(relayed.read_exact(4), b"GET ");
    let config = daemon.config().clone().policies(&policy(2));
    daemon.rewrite(config);
    wait_until("the new table", || current(&daemon) == Some(2));
    begun.send(&request[100..]);
    assert_eq!(max_age(&begun.response()), Some(2));
    relayed.send("/ HTTP/1.1");
    assert_eq!(relayed.read_exact(10), b"/ HTTP/1.1");
}
