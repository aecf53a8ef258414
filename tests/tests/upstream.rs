//! The proxy behind: what happens when it is away, and that it learns the client's address.

use preflightd_tests::{
    Behaviour, Client, Config, Daemon, Engine, Nginx, Upstream,
    client::{get, preflight},
    daemon::{ORIGIN, POLICY},
    site::{free_address, have, wait_until},
};
use socket2::{Domain, Socket, Type};
use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

/// A connection from another loopback address: another client to the proxy.
fn connect_from(last: u8, to: SocketAddr) -> Client {
    let from = SocketAddr::from((Ipv4Addr::new(127, 0, 0, last), 0));
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    socket.bind(&from.into()).expect("binding the client's address");
    socket.connect(&to.into()).expect("connecting");
    Client::from_stream(socket.into()).expect("a client")
}

#[test]
fn down_means_one_502() {
    for engine in Engine::BOTH {
        let nobody = free_address();
        let daemon = Daemon::start(Config::new(nobody, POLICY).engine(engine));
        let errors = || daemon.metrics().count("preflightd_relay_failures_total", &[("cause", "upstream")]);
        let mut client = daemon.connect();
        client.send([get("api.test", "/y"), get("api.test", "/z")].concat());
        let response = client.response();
        assert_eq!(response.status, 502, "{engine:?}");
        assert_eq!(response.header("connection"), Some("close"), "{engine:?}: {response:?}");
        client.expect_end();
        wait_until("the counter", || errors() == 1);
        wait_until("the log to name the upstream", || daemon.log().contains(&nobody.to_string()));
        // Preflights need no upstream.
        assert_eq!(daemon.preflight(ORIGIN, "PUT", None).status, 204, "{engine:?}");
    }
}

#[test]
fn comes_back() {
    if !have(&["nginx"]) {
        return;
    }
    let address = free_address();
    let daemon = Daemon::start(Config::new(address, POLICY));
    assert_eq!(daemon.connect().exchange(get("api.test", "/")).status, 502);
    let _nginx = Nginx::start(&[address], |_| {
        format!("server {{ listen {address}; location / {{ return 200 ok; }} }}")
    });
    assert_eq!(daemon.connect().exchange(get("api.test", "/")).body, b"ok");
}

/// The daemon must never lend its own address to a client (`allow`/`deny` in the proxy): the verdict is the same
/// whether a GET comes alone, behind a preflight, or behind an OPTIONS that passes.
#[test]
fn the_proxy_judges_the_client_not_the_daemon() {
    if !have(&["nginx"]) {
        return;
    }
    let proxy = free_address();
    let _nginx = Nginx::start(&[proxy], |_| {
        format!(
            "server {{
                listen {proxy} proxy_protocol;
                set_real_ip_from 127.0.0.1;
                real_ip_header proxy_protocol;
                location / {{ return 200 \"$remote_addr $request_method\"; }}
                location /admin {{ allow 127.0.0.2; deny all; root /nonexistent; }}
            }}"
        )
    });
    for engine in Engine::BOTH {
        for protocol in ["auto", "v1", "v2"] {
            let mut config = Config::new(proxy, POLICY).engine(engine);
            config.proxy_protocol = protocol;
            let daemon = Daemon::start(config);
            let name = format!("{engine:?}, {protocol}");
            for (client, verdict) in [(2, 404), (3, 403), (1, 403)] {
                let admin = get("api.test", "/admin");
                let alone = connect_from(client, daemon.address()).exchange(&admin);
                assert_eq!(alone.status, verdict, "{name}, 127.0.0.{client}, alone: {alone:?}");

                let mut after_preflight = connect_from(client, daemon.address());
                let preflight = preflight("api.test", "/admin", ORIGIN, "PUT", None);
                assert_eq!(after_preflight.exchange(preflight).status, 204, "{name}");
                let response = after_preflight.exchange(&admin);
                assert_eq!(response.status, verdict, "{name}, 127.0.0.{client}, after a preflight");

                let mut after_options = connect_from(client, daemon.address());
                let options = "OPTIONS /who HTTP/1.1\r\nHost: api.test\r\n\r\n";
                let seen = format!("127.0.0.{client} OPTIONS");
                assert_eq!(after_options.exchange(options).body, seen.as_bytes(), "{name}");
                let response = after_options.exchange(&admin);
                assert_eq!(response.status, verdict, "{name}, 127.0.0.{client}, after an OPTIONS");
            }
        }
    }
}

/// `auto` leaves a proxy alone that does not understand the protocol.
#[test]
fn auto_finds_no_proxy_protocol() {
    if !have(&["nginx"]) {
        return;
    }
    let proxy = free_address();
    let _nginx = Nginx::start(&[proxy], |_| {
        format!("server {{ listen {proxy}; location / {{ return 200 $remote_addr; }} }}")
    });
    let mut config = Config::new(proxy, POLICY);
    config.proxy_protocol = "auto";
    let daemon = Daemon::start(config);
    for _ in 0..3 {
        let response = daemon.connect().exchange(get("api.test", "/"));
        assert_eq!((response.status, response.body.as_slice()), (200, &b"127.0.0.1"[..]));
    }
}

/// The PROXY line comes first and once, then the client's bytes as they were.
#[test]
fn proxy_protocol_v1_bytes() {
    let upstream = Upstream::start(Behaviour::AtEnd(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n".into()));
    let mut config = Config::new(upstream.address(), POLICY);
    config.proxy_protocol = "v1";
    let daemon = Daemon::start(config);
    let index = upstream.count();
    let mut client = connect_from(5, daemon.address());
    let port = client.stream().local_addr().expect("the client's address").port();
    client.send(get("api.test", "/y"));
    client.half_close();
    assert_eq!(client.response().status, 200);
    let line = format!("PROXY TCP4 127.0.0.5 127.0.0.1 {port} {}\r\n", daemon.address().port());
    let wanted = [line.into_bytes(), get("api.test", "/y")].concat();
    let recorded = upstream.ended(index);
    assert_eq!(recorded.bytes.escape_ascii().to_string(), wanted.escape_ascii().to_string());
    assert_eq!(recorded.peer.map(|p| p.ip()), Some(IpAddr::V4(Ipv4Addr::LOCALHOST)));
}

/// A large download to a client that dawdles, a large upload to an upstream that reads as it can: every byte, and no
/// more memory than the buffers.
#[test]
fn back_pressure_both_ways() {
    const LENGTH: usize = 32 << 20;
    let upstream = Upstream::start(Behaviour::Echo);
    let daemon = Daemon::start(Config::new(upstream.address(), POLICY));
    let before = daemon.resident();
    let mut client = daemon.connect();
    let mut writer = client.stream().try_clone().expect("a second handle");
    let block: Vec<u8> = (0..65_536u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let sent = block.clone();
    let sender = std::thread::spawn(move || {
        use std::io::Write as _;
        for _ in 0..LENGTH / sent.len() {
            writer.write_all(&sent).expect("sending");
        }
    });
    std::thread::sleep(Duration::from_millis(500));
    let grown = daemon.resident().saturating_sub(before);
    assert!(grown < 16 << 20, "{grown} bytes more for one slow client");
    for at in 0..LENGTH / block.len() {
        assert!(client.read_exact(block.len()) == block, "block {at} came back changed");
    }
    sender.join().expect("the sender");
}

/// Without an upstream, what is not ours ends with a clear 4xx.
#[test]
fn answer_only() {
    for engine in Engine::BOTH {
        let daemon = Daemon::start(Config::new(None, POLICY).engine(engine));
        assert_eq!(daemon.preflight(ORIGIN, "PUT", None).status, 204, "{engine:?}");
        for (name, request, status) in [
            ("not ours", get("api.test", "/"), 421),
            ("malformed", b"OPTIONS / HTTP/1.1\r\nHost : a\r\n\r\n".to_vec(), 400),
        ] {
            let mut client = daemon.connect();
            let response = client.exchange(request);
            assert_eq!(response.status, status, "{engine:?}, {name}");
            client.expect_end();
        }
    }
}
