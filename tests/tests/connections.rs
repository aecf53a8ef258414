//! What a client may do with a connection: split, pipeline, keep, half-close, dawdle, crowd. With either engine.

use preflightd_tests::{
    Behaviour, Config, Daemon, Engine, Upstream,
    client::{get, preflight},
    daemon::{ORIGIN, POLICY},
    site::wait_until,
};
use std::{
    net::{Ipv6Addr, TcpListener},
    thread,
    time::Duration,
};

/// Long enough for the daemon to see pieces one by one, mostly; nothing fails if it does not.
const PIECES: Duration = Duration::from_micros(300);

fn allowed() -> Vec<u8> {
    preflight("api.test", "/x?a=b", ORIGIN, "PUT", Some("content-type,x-demo"))
}

fn denied() -> Vec<u8> {
    preflight("api.test", "/x", "https://evil.example", "PUT", None)
}

/// An OPTIONS that is no preflight.
const OPTIONS: &[u8] = b"OPTIONS /x HTTP/1.1\r\nHost: api.test\r\nAccept: */*\r\n\r\n";

#[test]
fn a_preflight_split_at_every_byte() {
    for engine in Engine::BOTH {
        let (daemon, upstream) = Daemon::start_simple(engine);
        let request = allowed();
        let mut client = daemon.connect();
        for at in 1..request.len() {
            client.send(&request[..at]);
            thread::sleep(PIECES);
            client.send(&request[at..]);
            assert_eq!(client.response().status, 204, "{engine:?}, split at {at}");
        }
        for byte in &request {
            client.send([*byte]);
            thread::sleep(PIECES);
        }
        assert_eq!(client.response().status, 204, "{engine:?}, byte by byte");
        assert_eq!(upstream.count(), 0, "{engine:?}");
    }
}

#[test]
fn a_passed_request_split_at_every_byte() {
    for engine in Engine::BOTH {
        let (daemon, upstream) = Daemon::start_simple(engine);
        // Behind a preflight, so that both the worker and the relay see the split; and one that only its end tells
        // from a preflight.
        for request in [[allowed(), get("api.test", "/y")].concat(), OPTIONS.to_vec()] {
            let answers = usize::from(request.starts_with(&allowed()));
            let passed = if answers == 1 { get("api.test", "/y") } else { OPTIONS.to_vec() };
            for at in 1..request.len() {
                let index = upstream.count();
                let mut client = daemon.connect();
                client.send(&request[..at]);
                thread::sleep(PIECES);
                client.send(&request[at..]);
                if answers == 1 {
                    assert_eq!(client.response().status, 204, "{engine:?}, split at {at}");
                }
                assert_eq!(client.response().status, 200, "{engine:?}, split at {at}");
                drop(client);
                assert_eq!(upstream.ended(index).bytes, passed, "{engine:?}, split at {at}");
            }
        }
    }
}

#[test]
fn keep_alive() {
    for engine in Engine::BOTH {
        let (daemon, upstream) = Daemon::start_simple(engine);
        let mut client = daemon.connect();
        for i in 0..1000 {
            let request = if i % 3 == 0 { denied() } else { allowed() };
            let wanted = if i % 3 == 0 { 403 } else { 204 };
            assert_eq!(client.exchange(request).status, wanted, "{engine:?}, request {i}");
        }
        assert_eq!(upstream.count(), 0);
    }
}

#[test]
fn connection_close_and_http_1_0() {
    for engine in Engine::BOTH {
        let (daemon, _upstream) = Daemon::start_simple(engine);
        let core = format!("Host: a.test\r\nOrigin: {ORIGIN}\r\nAccess-Control-Request-Method: PUT\r\n");
        for (name, line, connection, stays) in [
            ("1.1", "OPTIONS / HTTP/1.1\r\n", "", true),
            ("1.1, close", "OPTIONS / HTTP/1.1\r\n", "Connection: close\r\n", false),
            ("1.0", "OPTIONS / HTTP/1.0\r\n", "", false),
            ("1.0, keep-alive", "OPTIONS / HTTP/1.0\r\n", "Connection: keep-alive\r\n", true),
        ] {
            let mut client = daemon.connect();
            let request = format!("{line}{core}{connection}\r\n");
            let response = client.exchange(&request);
            assert_eq!(response.status, 204, "{engine:?}, {name}");
            let says_close = response.header("connection").is_some_and(|c| c.eq_ignore_ascii_case("close"));
            assert_eq!(says_close, !stays, "{engine:?}, {name}: {response:?}");
            if stays {
                assert_eq!(client.exchange(&request).status, 204, "{engine:?}, {name}");
            } else {
                client.expect_end();
            }
        }
    }
}

#[test]
fn pipelined_preflights_are_answered_in_order() {
    for engine in Engine::BOTH {
        let (daemon, _upstream) = Daemon::start_simple(engine);
        let mut client = daemon.connect();
        let (allowed, denied) = (allowed(), denied());
        let pattern = |i: usize| i % 3 == 1 || i.is_multiple_of(7);
        let all: Vec<u8> =
            (0..60).flat_map(|i| if pattern(i) { denied.clone() } else { allowed.clone() }).collect();
        client.send(all);
        for i in 0..60 {
            let wanted = if pattern(i) { 403 } else { 204 };
            assert_eq!(client.response().status, wanted, "{engine:?}, answer {i}");
        }
    }
}

/// A client that sends without reading must neither lose an answer nor make the daemon hoard.
#[test]
fn a_client_that_does_not_read() {
    const REQUESTS: usize = 40_000;
    for engine in Engine::BOTH {
        let (daemon, _upstream) = Daemon::start_simple(engine);
        let before = daemon.resident();
        let mut reader = daemon.connect();
        let mut writer = reader.stream().try_clone().expect("a second handle");
        let sender = thread::spawn(move || {
            use std::io::Write as _;
            let many = allowed().repeat(100);
            for _ in 0..REQUESTS / 100 {
                writer.write_all(&many).expect("sending");
            }
        });
        // All buffers in between fill up meanwhile.
        thread::sleep(Duration::from_millis(500));
        let grown = daemon.resident().saturating_sub(before);
        assert!(grown < 8 << 20, "{engine:?}: {grown} bytes more for one slow client");
        for i in 0..REQUESTS {
            assert_eq!(reader.response().status, 204, "{engine:?}, answer {i}");
        }
        sender.join().expect("the sender");
    }
}

#[test]
fn preflight_then_get_on_one_connection() {
    for engine in Engine::BOTH {
        let (daemon, upstream) = Daemon::start_simple(engine);
        for pipelined in [false, true] {
            let index = upstream.count();
            let mut client = daemon.connect();
            let both = [allowed(), get("api.test", "/y")];
            if pipelined {
                client.send(both.concat());
            } else {
                client.send(&both[0]);
            }
            assert_eq!(client.response().status, 204, "{engine:?}");
            if !pipelined {
                client.send(&both[1]);
            }
            assert_eq!(client.response().body, b"GET /y HTTP/1.1 +0", "{engine:?}");
            // Whatever comes later on this connection: the proxy answers.
            let again = client.exchange(allowed());
            assert_eq!(again.body, b"OPTIONS /x?a=b HTTP/1.1 +0", "{engine:?}");
            drop(client);
            let recorded = upstream.ended(index).bytes;
            assert_eq!(recorded, [get("api.test", "/y"), allowed()].concat(), "{engine:?}");
        }
    }
}

#[test]
fn preflight_then_a_large_post() {
    for engine in Engine::BOTH {
        let (daemon, upstream) = Daemon::start_simple(engine);
        let body: Vec<u8> = (0..1 << 20).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let head = format!("POST /y HTTP/1.1\r\nHost: api.test\r\nContent-Length: {}\r\n\r\n", body.len());
        let post = [head.into_bytes(), body].concat();
        for (first, name) in [(allowed(), "preflight"), (OPTIONS.to_vec(), "other OPTIONS")] {
            let index = upstream.count();
            let mut client = daemon.connect();
            client.send([first.as_slice(), &post].concat());
            let status = client.response().status;
            assert_eq!(status, if name == "preflight" { 204 } else { 200 }, "{engine:?}, {name}");
            assert_eq!(client.response().body, b"POST /y HTTP/1.1 +1048576", "{engine:?}, {name}");
            drop(client);
            let wanted = if name == "preflight" { post.clone() } else { [OPTIONS, &post].concat() };
            assert!(upstream.ended(index).bytes == wanted, "{engine:?}, {name}: other bytes arrived");
        }
    }
}

#[test]
fn half_close() {
    for engine in Engine::BOTH {
        let (daemon, upstream) = Daemon::start_simple(engine);
        let mut client = daemon.connect();
        client.send(allowed());
        client.half_close();
        assert_eq!(client.response().status, 204, "{engine:?}");
        client.expect_end();

        let mut client = daemon.connect();
        client.half_close();
        client.expect_end();
        assert_eq!(upstream.count(), 0, "{engine:?}: nothing was asked of the upstream");

        let mut client = daemon.connect();
        client.send([allowed(), get("api.test", "/y")].concat());
        client.half_close();
        assert_eq!(client.response().status, 204, "{engine:?}");
        assert_eq!(client.response().status, 200, "{engine:?}");
        client.expect_end();
        assert!(upstream.ended(0).ended, "{engine:?}: the half-close reached the upstream");
    }
}

/// A head that ends too early is not ours to judge.
#[test]
fn a_cut_off_head_reaches_the_upstream() {
    for engine in Engine::BOTH {
        let upstream =
            Upstream::start(Behaviour::AtEnd(b"HTTP/1.1 400 Bad\r\nContent-Length: 0\r\n\r\n".into()));
        let daemon = Daemon::start(Config::new(upstream.address(), POLICY).engine(engine));
        let request = allowed();
        for (index, length) in [1, 7, 8, 30, request.len() - 1].into_iter().enumerate() {
            let mut client = daemon.connect();
            client.send(&request[..length]);
            client.half_close();
            assert_eq!(client.response().status, 400, "{engine:?}, {length} bytes");
            client.expect_end();
            assert_eq!(upstream.ended(index).bytes, &request[..length], "{engine:?}, {length} bytes");
        }
    }
}

/// The upstream may end its side first: the client can still send.
#[test]
fn the_upstream_half_closes_first() {
    for engine in Engine::BOTH {
        let response = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
        let upstream = Upstream::start(Behaviour::Hasty(response.into()));
        let daemon = Daemon::start(Config::new(upstream.address(), POLICY).engine(engine));
        let mut client = daemon.connect();
        client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 6\r\n\r\nabc");
        assert_eq!(client.read_to_end(), response, "{engine:?}");
        client.send("def");
        client.half_close();
        assert!(upstream.ended(0).bytes.ends_with(b"abcdef"), "{engine:?}");
    }
}

/// What is not HTTP at all passes too, both ways.
#[test]
fn any_protocol_passes() {
    for engine in Engine::BOTH {
        let upstream = Upstream::start(Behaviour::Echo);
        let daemon = Daemon::start(Config::new(upstream.address(), POLICY).engine(engine));
        let hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03";
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
        for bytes in [&hello[..], preface, b"\n", b"\0\0\0\0", b"O\n"] {
            let mut client = daemon.connect();
            client.send(bytes);
            assert_eq!(client.read_exact(bytes.len()), bytes, "{engine:?}");
        }
    }
}

#[test]
fn slow_heads_end_with_408_and_disturb_nobody() {
    for engine in Engine::BOTH {
        let upstream = Upstream::start(Behaviour::report());
        let config = Config::new(upstream.address(), POLICY).engine(engine);
        let daemon = Daemon::start(config.limits("header_timeout = \"1s\"\nidle_timeout = \"60s\""));
        let request = allowed();
        let mut slow: Vec<_> = (0..100).map(|_| daemon.connect()).collect();
        let mut other = daemon.connect();
        for part in request[..120].chunks(30) {
            for client in &mut slow {
                client.send(part);
            }
            assert_eq!(other.exchange(&request).status, 204, "{engine:?}");
            thread::sleep(Duration::from_millis(50));
        }
        for client in &mut slow {
            let response = client.response();
            assert_eq!(response.status, 408, "{engine:?}");
            assert_eq!(response.header("connection"), Some("close"), "{engine:?}");
            client.expect_end();
        }
        assert_eq!(other.exchange(&request).status, 204, "{engine:?}");
        assert_eq!(upstream.count(), 0, "{engine:?}");
    }
}

/// The time for a head runs from its first byte, not from its last one.
#[test]
fn a_trickle_does_not_keep_a_connection() {
    for engine in Engine::BOTH {
        let upstream = Upstream::start(Behaviour::report());
        let config = Config::new(upstream.address(), POLICY).engine(engine);
        let daemon = Daemon::start(config.limits("header_timeout = \"500ms\""));
        let mut client = daemon.connect();
        let request = allowed();
        // Byte by byte until the daemon has had enough; the whole would take longer than any test should.
        let mut sent = 0;
        while sent < request.len() && client.try_send(&request[sent..=sent]).is_ok() {
            sent += 1;
            if client.has_ended() {
                break;
            }
            thread::sleep(Duration::from_millis(50));
        }
        assert!(sent < request.len(), "{engine:?}: the whole head was taken");
        assert_eq!(client.response().status, 408, "{engine:?}, after {sent} bytes");
        assert_eq!(upstream.count(), 0, "{engine:?}");
        let closed =
            || daemon.metrics().count("preflightd_connections_closed_total", &[("cause", "header_timeout")]);
        wait_until("the counter", || closed() == 1);
    }
}

#[test]
fn ipv6() {
    if TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_err() {
        eprintln!("skipped: no IPv6 on loopback");
        return;
    }
    for engine in Engine::BOTH {
        let upstream = Upstream::start(Behaviour::report());
        let mut config = Config::new(upstream.address(), POLICY).engine(engine);
        config.address.set_ip(Ipv6Addr::LOCALHOST.into());
        let daemon = Daemon::start(config);
        let mut client = daemon.connect();
        let preflight = preflight(&daemon.host(), "/x", ORIGIN, "PUT", None);
        assert_eq!(client.exchange(preflight).status, 204, "{engine:?}");
        assert_eq!(client.exchange(get(&daemon.host(), "/y")).body, b"GET /y HTTP/1.1 +0", "{engine:?}");
    }
}

#[test]
fn silent_connections_are_closed() {
    for engine in Engine::BOTH {
        let upstream = Upstream::start(Behaviour::report());
        let config = Config::new(upstream.address(), POLICY).engine(engine);
        let daemon = Daemon::start(config.limits("idle_timeout = \"300ms\""));
        // One that never spoke, and one between requests: both end without a byte.
        let mut silent = daemon.connect();
        let mut spoken = daemon.connect();
        assert_eq!(spoken.exchange(allowed()).status, 204, "{engine:?}");
        silent.expect_end();
        spoken.expect_end();
        assert_eq!(upstream.count(), 0, "{engine:?}");
    }
}

#[test]
fn the_connection_cap_makes_room() {
    for engine in Engine::BOTH {
        let upstream = Upstream::start(Behaviour::report());
        let mut config = Config::new(upstream.address(), POLICY).engine(engine);
        config.workers = 1;
        let daemon = Daemon::start(config.limits("max_connections = 10"));
        let mut idle: Vec<_> = (0..50)
            .map(|i| {
                let mut client = daemon.connect();
                assert_eq!(client.exchange(allowed()).status, 204, "{engine:?}, connection {i}");
                client
            })
            .collect();
        // The longest idle had to go; the youngest still stands.
        idle[0].expect_end();
        assert_eq!(idle[49].exchange(allowed()).status, 204, "{engine:?}");
        assert!(daemon.descriptors() < 100, "{engine:?}: {} descriptors", daemon.descriptors());
    }
}

#[test]
fn descriptors_are_given_back() {
    const EACH: usize = 2_500;
    for engine in Engine::BOTH {
        let (daemon, _upstream) = Daemon::start_simple(engine);
        // A few of each kind first, so that whatever is made once is there.
        for i in 0..8 {
            one_connection(&daemon, i);
        }
        let settled = |limit: usize| wait_until("descriptors to be closed", || daemon.descriptors() <= limit);
        thread::sleep(Duration::from_millis(300));
        let start = daemon.descriptors();
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..EACH).for_each(|i| one_connection(&daemon, i)));
            }
        });
        settled(start);
    }
}

fn one_connection(daemon: &Daemon, i: usize) {
    let mut client = daemon.connect();
    match i % 8 {
        // The relay.
        0 => assert_eq!(client.exchange(get("api.test", "/y")).status, 200),
        1 => {
            client.send([allowed(), get("api.test", "/y")].concat());
            assert_eq!((client.response().status, client.response().status), (204, 200));
        }
        // Begun and abandoned.
        2 => client.send(&allowed()[..50]),
        3 => {}
        // Reset: unread bytes make the close one.
        4 => client.send(allowed()),
        _ => assert_eq!(client.exchange(allowed()).status, 204),
    }
}
