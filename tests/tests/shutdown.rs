//! SIGTERM: no new connections, what has begun is finished, exit code 0.

use preflightd_tests::{
    Behaviour, Client, Config, Daemon, Engine, Upstream,
    client::{fetch, preflight},
    daemon::{ORIGIN, POLICY},
    site::wait_until,
};
use rustix::process::Signal;
use std::{thread, time::Duration};

#[test]
fn drains_and_exits_with_0() {
    for engine in Engine::BOTH {
        let upstream = Upstream::start(Behaviour::Echo);
        let mut daemon = Daemon::start(Config::new(upstream.address(), POLICY).engine(engine));
        let request = preflight("api.test", "/x", ORIGIN, "PUT", None);
        let mut idle = daemon.connect();
        assert_eq!(idle.exchange(&request).status, 204, "{engine:?}");
        let mut begun = daemon.connect();
        begun.send(&request[..100]);
        let mut relayed = daemon.connect();
        relayed.send("hello");
        assert_eq!(relayed.read_exact(5), b"hello", "{engine:?}");
        // The begun request must have been seen, else it were a connection that never spoke.
        thread::sleep(Duration::from_millis(100));

        daemon.signal(Signal::TERM);
        idle.expect_end();
        wait_until("new connections to be refused", || Client::try_connect(daemon.address()).is_err());
        let ready = fetch(daemon.admin(), "/readyz").expect("/readyz while draining");
        assert_eq!(ready.status, 503, "{engine:?}: {ready:?}");
        begun.send(&request[100..]);
        let response = begun.response();
        assert_eq!(response.status, 204, "{engine:?}");
        assert_eq!(response.header("connection"), Some("close"), "{engine:?}: {response:?}");
        begun.expect_end();
        relayed.send("world");
        assert_eq!(relayed.read_exact(5), b"world", "{engine:?}");
        relayed.half_close();
        relayed.expect_end();
        assert_eq!(daemon.wait().code(), Some(0), "{engine:?}");
    }
}

/// Whatever was sent before the signal is answered.
#[test]
fn requests_in_flight_are_answered() {
    for engine in Engine::BOTH {
        let upstream = Upstream::start(Behaviour::report());
        let mut daemon = Daemon::start(Config::new(upstream.address(), POLICY).engine(engine));
        let request = preflight("api.test", "/x", ORIGIN, "PUT", None);
        let mut clients: Vec<_> = (0..200).map(|_| daemon.connect()).collect();
        for client in &mut clients {
            client.send(&request);
        }
        daemon.signal(Signal::TERM);
        for (i, client) in clients.iter_mut().enumerate() {
            let response = client.try_response().unwrap_or_else(|e| panic!("{engine:?}, client {i}: {e}"));
            assert_eq!(response.status, 204, "{engine:?}");
        }
        assert_eq!(daemon.wait().code(), Some(0), "{engine:?}");
    }
}

#[test]
fn sigint_ends_it_too() {
    let (mut daemon, _upstream) = Daemon::start_simple(Engine::Auto);
    daemon.signal(Signal::INT);
    assert_eq!(daemon.wait().code(), Some(0));
}
