//! When a port is steered and when not: modes, thresholds, shares, interfaces, firewalls, and ports that turn out to serve
//! something else.
#![forbid(unsafe_code)]

use std::{net::SocketAddr, thread, time::Duration};

use preflightd_tests::{
    Behaviour, Client,
    client::{get, preflight},
    daemon::{ORIGIN, POLICY},
    load::{Kind, Load},
    site::wait_until,
    steering::{
        HOST, Lab, Options, Proxy, allowed_preflight, can_run, check_get, expect_proxy, full, on_each_site,
        plain,
    },
};
use serde_json::json;

/// A lab with the daemon, or none where tests run without it.
fn steered_lab(options: Options) -> Option<Lab> {
    (can_run() && !plain()).then(|| Lab::with(options))
}

fn with_steer(steer: &str) -> Options {
    Options { steer: steer.to_owned(), ..Options::default() }
}

/// Checks that neither a preflight nor a GET meets a worker.
fn expect_untouched(lab: &Lab, case: &str) {
    for site in lab.sites() {
        for i in 0..20 {
            expect_proxy(&lab.preflight(site), format_args!("{site}, {case}, {i}"));
            lab.get(site, &format!("/{i}"));
        }
    }
}

#[test]
fn off() {
    let Some(lab) = steered_lab(with_steer("mode = \"off\"")) else { return };
    expect_untouched(&lab, "off");
}

#[test]
fn observed_only() {
    let Some(lab) = steered_lab(with_steer("mode = \"observe\"")) else { return };
    let count = |kind: &str| lab.metrics().count("preflightd_steer_port_flows_total", &[("kind", kind)]);
    expect_untouched(&lab, "observe");
    wait_until("the preflights to be counted", || count("preflight") == 40);
    assert_eq!(count("other"), 40, "GETs");
    for site in lab.sites() {
        lab.exchange(site, format!("OPTIONS /x HTTP/1.1\r\nHost: {HOST}\r\n\r\n"));
        // Preflights on a connection that the proxy has cannot be steered: users want to know how many there are.
        let mut client = lab.connect(site);
        check_get(&client.exchange(get(HOST, "/y")), "/y");
        expect_proxy(&client.exchange(allowed_preflight("/x")), site);
    }
    wait_until("the OPTIONS to be counted", || count("options") == 2);
    wait_until("the pooled OPTIONS to be counted", || count("pooled_options") == 2);
    assert_eq!((count("preflight"), count("other")), (40, 42));
    assert_eq!((lab.flows("worker"), lab.flows("proxy")), (0, 0), "nothing is deferred");
}

#[test]
fn a_share_of_flows() {
    for (percent, wanted) in [(0, 0..=0), (50, 50..=150), (100, 200..=200)] {
        let Some(lab) = steered_lab(with_steer(&format!("percent = {percent}"))) else { return };
        for site in lab.sites() {
            let workers = (0..200).filter(|_| lab.answered_by_worker(site) == Some(true)).count();
            assert!(wanted.contains(&workers), "{site}, {percent} %: {workers} of 200");
            lab.get(site, "/y");
        }
    }
}

#[test]
fn in_a_storm_only() {
    let steer = "engage = \"storm\"\nstorm_above = 200\nstorm_below = 100";
    let Some(lab) = steered_lab(with_steer(steer)) else { return };
    let site = lab.sites()[0];
    for i in 0..20 {
        expect_proxy(&lab.preflight(site), format_args!("calm, {i}"));
        thread::sleep(Duration::from_millis(50));
    }
    // SYNs alone are no storm, wherever they come from.
    let wire = lab.deaf_wire(site);
    lab.node().ip("route replace 198.18.0.0/15 via 10.78.0.3");
    for i in 0..20_000u32 {
        let source = SocketAddr::from(([198, 18, (i >> 8) as u8, i as u8], 1024 + (i >> 4) as u16));
        wire.spoof_syn(source, i);
    }
    thread::sleep(Duration::from_secs(2));
    expect_proxy(&lab.preflight(site), "after a SYN flood");

    let load = Load::of(&lab, &[Kind::Get, Kind::Preflight, Kind::Preflight]);
    wait_until("workers to answer in the storm", || load.workers() > 100);
    load.stop().expect_flawless();
    // Asked rarely, lest this be a storm.
    wait_until("the proxy to answer when the storm is over", || {
        thread::sleep(Duration::from_millis(500));
        lab.answered_by_worker(site) == Some(false)
    });
}

#[test]
fn a_new_interface_is_steered() {
    let Some(mut lab) = steered_lab(Options::default()) else { return };
    lab.wait_steered();
    lab.add_client();
    for site in lab.sites_of(1) {
        wait_until(format_args!("a worker to answer at {site}"), || {
            let mut client = lab.client(1).enter(|| Client::connect(site));
            client.exchange(allowed_preflight("/x")).header("x-from").is_none()
        });
    }
    lab.wait_steered();
}

#[test]
fn only_the_named_interfaces() {
    let options = Options { clients: 2, ..with_steer("interfaces = [\"n1\"]") };
    let Some(lab) = steered_lab(options) else { return };
    expect_untouched(&lab, "another interface");
    for site in lab.sites_of(1) {
        let mut client = lab.client(1).enter(|| Client::connect(site));
        lab.expect_worker(&client.exchange(allowed_preflight("/x")), site);
    }
}

/// The daemon in a network namespace of its own, told where the proxy's is.
#[test]
fn another_network_namespace() {
    let Some(lab) = steered_lab(Options { outside: true, ..Options::default() }) else { return };
    for site in lab.sites() {
        for i in 0..20 {
            lab.expect_worker(&lab.preflight(site), format_args!("{site}, {i}"));
            lab.get(site, &format!("/{i}"));
        }
    }
}

/// Another TCX program on the same interface, in front and behind: here another daemon that only observes.
#[test]
fn beside_another_program() {
    for steerer_first in [true, false] {
        let mode = |steering: bool| with_steer(if steering { "" } else { "mode = \"observe\"" });
        let Some(lab) = steered_lab(mode(steerer_first)) else { return };
        let admin = SocketAddr::from(([127, 0, 0, 1], 9002));
        let other_pins = format!("{}-other", lab.pin_dir().display());
        let text = lab.toml(admin).replace(&*lab.pin_dir().to_string_lossy(), &other_pins);
        let text = if steerer_first {
            text.replace("[steer]", "[steer]\nmode = \"observe\"")
        } else {
            text.replace("mode = \"observe\"", "")
        };
        let mut other = lab.another_daemon_with(admin, &text);
        other.wait_ready(lab.home());
        for site in lab.sites() {
            for i in 0..20 {
                let case = format!("{site}, the steerer is first: {steerer_first}, {i}");
                lab.expect_worker(&lab.preflight(site), &case);
                lab.get(site, "/y");
            }
        }
        drop(other);
        lab.detach_from(&other_pins);
    }
}

#[test]
fn policies_change_while_running() {
    let policy = |host: &str| POLICY.replace("hosts = [\"*\"]", &format!("hosts = [\"{host}\"]"));
    let Some(mut lab) = steered_lab(Options { policies: policy("old.test"), ..Options::default() }) else {
        return;
    };
    let ask =
        |lab: &Lab, host: &str| lab.exchange(lab.sites()[0], preflight(host, "/x", ORIGIN, "PUT", None));
    lab.expect_worker(&ask(&lab, "old.test"), "old host before");
    expect_proxy(&ask(&lab, "new.test"), "new host before");
    let load = Load::of(&lab, &[Kind::Get, Kind::KeepAlive]);
    let admin = lab.daemon().admin();
    let text = lab.toml_with(admin, &policy("new.test"));
    lab.daemon().rewrite(&text);
    wait_until("the new host to be a worker's", || ask(&lab, "new.test").header("x-from").is_none());
    lab.expect_worker(&ask(&lab, "new.test"), "new host after");
    wait_until("the old host to be the proxy's", || ask(&lab, "old.test").header("x-from").is_some());
    load.stop().expect_flawless_gets();
}

/// What the kernel can decide, what it leaves to workers and why, and what it has decided: in the status and the metrics.
#[test]
fn kernel_answers_are_told_of() {
    let policy = |name: &str, more: &str| {
        POLICY
            .replace("\"demo\"", &format!("\"{name}\""))
            .replace("hosts = [\"*\"]", &format!("hosts = [\"{name}.test\"]\n{more}"))
    };
    let policies = policy("api", "paths = [{ prefix = \"/x\" }]")
        + &policy("patterns", "paths = [{ regex = \"/v[0-9]+\" }, { exact = \"/v\" }]")
        + &policy("unusual", "").replace("\"DELETE\"", "\"BREW\"");
    let options = Options { kernel_answers: true, policies, ..Options::default() };
    let Some(lab) = steered_lab(options) else { return };
    let asked_of = |site: SocketAddr, times: usize, host: &str, path: &str, origin: &str, method: &str| {
        let mut client = lab.connect(site);
        for _ in 0..times {
            client.send(preflight(host, path, origin, method, Some("x-demo")));
            client.response();
        }
    };
    for site in lab.sites() {
        asked_of(site, 3, "api.test", "/x", ORIGIN, "PUT");
        asked_of(site, 2, "api.test", "/x/y", "https://evil.example", "PUT");
        asked_of(site, 4, "api.test", "/x", ORIGIN, "PATCH");
        asked_of(site, 1, "api.test", "/elsewhere", ORIGIN, "PUT");
        asked_of(site, 1, "patterns.test", "/v1", ORIGIN, "PUT");
        asked_of(site, 5, "unusual.test", "/", ORIGIN, "PUT");
        asked_of(site, 1, "unusual.test", "/", ORIGIN, "BREW");
    }
    for (tier, policy, outcome, reason, wanted) in [
        ("kernel", "api", "allowed", "", 6),
        ("kernel", "api", "denied", "origin", 4),
        ("kernel", "api", "denied", "method", 8),
        ("kernel", "", "passed", "no_route", 2),
        ("kernel", "unusual", "allowed", "", 10),
        ("kernel", "patterns", "", "", 0),
        ("worker", "patterns", "allowed", "", 2),
        ("worker", "unusual", "allowed", "", 2),
        ("worker", "api", "", "", 0),
    ] {
        let labels = [("tier", tier), ("policy", policy), ("outcome", outcome), ("reason", reason)];
        // Where no outcome is named, none is wanted.
        let labels = if outcome.is_empty() { &labels[..2] } else { &labels[..] };
        let count = || lab.metrics().count("preflightd_requests_total", labels);
        wait_until(format_args!("{wanted} of {labels:?}"), || count() == wanted);
    }
    let status = lab.status();
    let kernel = &status["steer"]["kernel"];
    assert_eq!(kernel["on"], true, "{kernel:#}");
    assert_eq!(kernel["generation"], status["generation"], "{kernel:#}");
    assert_eq!(kernel["max_connections"], 65_536, "{kernel:#}");
    assert_eq!(kernel["answers"], 28, "{kernel:#}");
    assert_eq!((&kernel["asked"]["regex"], &kernel["asked"]["method"]), (&json!(2), &json!(2)), "{kernel:#}");
    let table = &kernel["table"];
    // Each host on two listeners; a path that is a pattern is none of the kernel's.
    assert_eq!((&table["hosts"], &table["paths"]), (&json!(6), &json!(3)), "{table:#}");
    assert_eq!((&table["origins"], &table["header_names"]), (&json!(1), &json!(2)), "{table:#}");
    assert_eq!(table["too_large"], json!(null), "{table:#}");
    assert_eq!(table["left_to_workers"], 2, "{table:#}");
    let left: Vec<_> = table["left"].as_array().expect("a list").iter().map(|left| &left["policy"]).collect();
    assert_eq!(left, ["patterns", "unusual"], "{table:#}");
    assert!(table["left"][0]["why"].as_str().expect("words").contains("regular expression"), "{table:#}");
    assert_eq!(lab.metrics().count("preflightd_steer_kernel_answers", &[]), 1);
}

/// Rules that could keep packets from the port: SYN-ACKs of the program would pass them by.
#[test]
fn firewalls() {
    let rules = [
        ("a ban", "ip saddr 203.0.113.0/24 tcp dport 80 drop"),
        ("strict tracking", "tcp dport 80 ct state new tcp flags & (fin|syn|rst|ack) != syn drop"),
        ("invalid", "ct state invalid drop"),
    ];
    for (name, rule) in rules {
        let Some(lab) = steered_lab(Options::default()) else { return };
        lab.wait_steered();
        lab.node().nft(&format!(
            "table inet wall {{ chain in {{ type filter hook input priority 0; {rule}; }}; }}"
        ));
        // A connection that was begun before the daemon has seen the rule may be lost to it.
        wait_until(format_args!("the daemon to see the rule: {name}"), || {
            lab.metrics().count("preflightd_steer_state", &[("state", "steering")]) == 0
        });
        lab.wait_proxied();
        expect_untouched(&lab, name);
        lab.node().nft("delete table inet wall");
        lab.wait_steered();
    }
}

/// A client that the firewall refuses is refused, whatever it sends.
#[test]
fn a_ban_holds() {
    let Some(lab) = steered_lab(Options { clients: 2, ..Options::default() }) else { return };
    lab.wait_steered();
    lab.node().nft(
        "table inet wall { chain in { type filter hook input priority 0; ip saddr 10.78.1.2 tcp dport 80 reject with tcp reset; }; }",
    );
    let [site, _] = lab.sites_of(1);
    let connect = || lab.client(1).enter(|| Client::try_connect(site));
    wait_until("the ban to hold", || connect().is_err());
    for _ in 0..20 {
        assert!(connect().is_err(), "the banned client gets through");
    }
    lab.get(lab.sites()[0], "/y");
}

#[test]
fn a_firewall_may_be_ignored_by_name() {
    let Some(lab) = steered_lab(with_steer("firewall = \"ignore\"")) else { return };
    lab.node().nft(
        "table inet wall { chain in { type filter hook input priority 0; ip saddr 203.0.113.0/24 tcp dport 80 drop; }; }",
    );
    // Longer than from one look at the rules to the next.
    thread::sleep(Duration::from_secs(12));
    for site in lab.sites() {
        lab.expect_worker(&lab.preflight(site), site);
    }
}

/// What a port serves shows in what clients send first: such a port is let go, and not a byte is lost.
#[test]
fn ports_that_serve_something_else() {
    let client_hello: &[u8] = &[0x16, 0x03, 0x01, 0x00, 0x05, 0x01, 0x00, 0x00, 0x01, 0x00];
    let v2: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc0\0\x02\x01\xc0\0\x02\x02\x12\x34\0\x50";
    let cases: [(&str, &str, &[u8]); 4] = [
        ("TLS", "tls", client_hello),
        ("HTTP/2 by prior knowledge", "h2c", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0"),
        (
            "PROXY protocol v1",
            "proxy_protocol",
            b"PROXY TCP4 192.0.2.1 192.0.2.2 4660 80\r\nGET / HTTP/1.1\r\n\r\n",
        ),
        ("PROXY protocol v2", "proxy_protocol", v2),
    ];
    let refusal = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n";
    for (name, kind, bytes) in cases {
        let proxy = Proxy::Upstream(Behaviour::AtEnd(refusal.to_vec()));
        on_each_site(Options { proxy, ..Options::default() }, |lab, site| {
            let send = |bytes: &[u8]| {
                let mut client = lab.connect(site);
                client.send(bytes);
                client.half_close();
                client.read_to_end()
            };
            let pass = || {
                let index = lab.upstream().count();
                assert_eq!(send(bytes), refusal, "{site}, {name}");
                let recorded = lab.upstream().ended(index).bytes;
                assert_eq!(recorded, bytes, "{site}, {name}");
            };
            pass();
            wait_until(format_args!("{site} to be let go for {name}"), || {
                pass();
                send(&allowed_preflight("/x")) == refusal
            });
            if lab.is_steered() {
                let count = lab.metrics().count("preflightd_steer_port_flows_total", &[("kind", kind)]);
                assert!(count > 0, "{site}, {name}: it is counted");
            }
        });
    }
}

/// Chrome keeps a connection that it opened ahead of need for five minutes.
#[test]
fn silent_for_five_minutes() {
    if !full() {
        return;
    }
    on_each_site(Options::default(), |lab, site| {
        let mut clients: Vec<_> = (0..20).map(|_| lab.connect(site)).collect();
        thread::sleep(Duration::from_secs(if site.is_ipv4() { 310 } else { 70 }));
        for client in &mut clients {
            check_get(&client.exchange(get(HOST, "/y")), "/y");
        }
    });
}
