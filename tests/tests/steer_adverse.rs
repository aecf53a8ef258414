//! A steered port under attack and over bad paths: real clients are served, and nothing grows.
#![forbid(unsafe_code)]

use std::{
    fmt::Display,
    io::ErrorKind,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use preflightd_tests::{
    Client, Response,
    client::get,
    load::{Kind, Load},
    steering::{
        HOST, Lab, Options, allowed_preflight, can_run, check_get, expect_either, expect_proxy, full,
        on_each_site,
    },
    wire::Wire,
};

/// SYNs of a flood; bounded, since no test may run for long.
fn flood_size() -> u32 {
    if full() { 1_000_000 } else { 200_000 }
}

/// A SYN flood from addresses that are not there. Connections that were there before, silent ones among them, and new
/// ones are served.
#[test]
fn a_syn_flood() {
    on_each_site(Options::default(), |lab, site| {
        lead_nowhere(lab);
        let mut kept: Vec<_> = (0..100).map(|_| lab.connect(site)).collect();
        for client in &mut kept {
            check_get(&client.exchange(get(HOST, "/kept")), "/kept");
        }
        let mut silent: Vec<_> = (0..100).map(|_| lab.connect(site)).collect();
        let mut most = 0;
        let wire = lab.deaf_wire(site);
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            let over = &over;
            scope.spawn(move || {
                flood(&wire, site, flood_size());
                over.store(true, Ordering::Relaxed);
            });
            let mut served = 0;
            while !over.load(Ordering::Relaxed) {
                lab.get(site, "/during");
                expect_either(lab, &lab.preflight(site), format_args!("{site}, during the flood"));
                served += 1;
                most = most.max(lab.sockets("syn-recv").len());
            }
            eprintln!("{site}: {served} times two real clients were served, at most {most} in SYN-RECV");
            assert!(served > 0, "{site}: the flood was over before a real client came");
        });
        for client in &mut kept {
            check_get(&client.exchange(get(HOST, "/kept")), "/kept");
        }
        let mut lost = 0;
        for client in &mut silent {
            match client.try_send(get(HOST, "/silent")).and_then(|()| client.try_response()) {
                Ok(response) => check_get(&response, "/silent"),
                // Its entry was evicted: reset at worst.
                Err(e) if e.kind() == ErrorKind::ConnectionReset => lost += 1,
                Err(e) => panic!("{site}: {e}"),
            }
        }
        eprintln!("{site}: {lost} of {} silent clients were reset", silent.len());
        // Half-open connections are bounded by the listener's backlog, with us and without.
        assert!(most <= 1024, "{site}: {most} half-open connections");
        lab.get(site, "/after");
        lab.wait_steered();
    });
}

/// A SYN flood while connections idle that only the kernel knows: it does not cost one of them.
#[test]
fn a_syn_flood_over_kernel_answered_connections() {
    if !can_run() {
        return;
    }
    // Less than the flood brings.
    let steer = "max_pending = 16384".to_owned();
    let lab = Lab::with(Options { kernel_answers: true, steer, ..Options::default() });
    lead_nowhere(&lab);
    let mut kept: Vec<_> = (0..1000)
        .map(|i| {
            let site = lab.sites()[i % 2];
            (format!("{site}, {i}"), lab.connect(site))
        })
        .collect();
    for (case, client) in &mut kept {
        lab.expect_kernel(&client.exchange(allowed_preflight("/x")), format_args!("{case}, before"));
    }
    let (in_use, idle) = kept.split_at_mut(20);
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let (lab, over) = (&lab, &over);
        scope.spawn(move || {
            for site in lab.sites() {
                flood(&lab.deaf_wire(site), site, flood_size() / 2);
            }
            over.store(true, Ordering::Relaxed);
        });
        let mut rounds = 0;
        while !over.load(Ordering::Relaxed) {
            for (case, client) in in_use.iter_mut() {
                let response = client.exchange(allowed_preflight("/x"));
                expect_kernel_or_proxy(lab, &response, format_args!("{case}, during the flood"));
            }
            rounds += 1;
            // The flood needs the machine as well.
            thread::sleep(Duration::from_millis(1));
        }
        eprintln!("{rounds} preflights on each connection that was in use");
        assert!(rounds > 0, "the flood was over before a real client came");
    });
    if lab.is_steered() {
        // The map of those that wait for their first data was as full as it may be.
        let refused = lab.metrics().count("preflightd_steer_fail_open_total", &[("reason", "pressure")]);
        assert!(refused > 0, "a flood that presses nothing proves nothing");
    }
    for (i, (case, client)) in idle.iter_mut().enumerate() {
        if i % 3 == 0 {
            check_get(&client.exchange(get(HOST, "/kept")), "/kept");
        }
        let response = client.exchange(allowed_preflight("/x"));
        expect_kernel_or_proxy(&lab, &response, format_args!("{case}, after the flood"));
        check_get(&client.exchange(get(HOST, "/kept")), "/kept");
    }
    for (_, client) in in_use {
        check_get(&client.exchange(get(HOST, "/kept")), "/kept");
    }
}

/// On a busy machine a heartbeat may be late, and the proxy gets a connection that the kernel could have answered on.
fn expect_kernel_or_proxy(lab: &Lab, response: &Response, case: impl Display) {
    if response.header("x-from").is_some() {
        expect_proxy(response, &case);
        assert_eq!(response.status, 405, "{case}: {response:?}");
    } else {
        lab.expect_kernel(response, case);
    }
}

/// The way back to the spoofed addresses is over the client's link, where nobody answers.
fn lead_nowhere(lab: &Lab) {
    lab.node().ip("route replace 198.18.0.0/15 via 10.78.0.3");
    lab.node().ip("-6 route replace fd00:bad::/32 via fd00:78::3");
}

fn flood(wire: &Wire, site: SocketAddr, size: u32) {
    for i in 0..size {
        // Like random ones, each only once.
        let word = i.wrapping_mul(2_654_435_761);
        wire.spoof_syn(spoofed(site, word), word);
    }
}

fn spoofed(site: SocketAddr, word: u32) -> SocketAddr {
    let port = 1024 + (word >> 17) as u16;
    let address: IpAddr = if site.is_ipv4() {
        Ipv4Addr::from_bits(Ipv4Addr::new(198, 18, 0, 0).to_bits() | (word & 0x1_ffff)).into()
    } else {
        Ipv6Addr::from([0xfd00, 0xbad, 0, 0, 0, 0, (word >> 16) as u16, word as u16]).into()
    };
    SocketAddr::new(address, port)
}

/// Segments that belong to no connection: floods of ACKs, data and RSTs do not disturb.
#[test]
fn strays() {
    on_each_site(Options::default(), |lab, site| {
        let load = Load::start(lab);
        let wire = lab.wire(site);
        for i in 0..2000 {
            let mut stray = wire.connection(preflightd_tests::wire::Offer::NONE);
            stray.pretend_syn_ack(i * 7919);
            match i % 4 {
                0 => stray.ack(),
                1 => stray.send(allowed_preflight("/x")),
                2 => stray.fin([]),
                _ => stray.rst(),
            }
        }
        load.go_on(100, "strays come");
        load.stop().expect_flawless();
    });
}

/// Three packets of a hundred are lost in each direction: TCP repairs it, and nobody is worse off than without us.
#[test]
fn lost_packets() {
    if !can_run() {
        return;
    }
    let lab = Lab::new();
    lab.client(0).nft(
        "table inet loss {
            chain in { type filter hook input priority 0; tcp sport 80 numgen random mod 100 < 3 drop; }
            chain out { type filter hook output priority 0; tcp dport 80 numgen random mod 100 < 3 drop; }
        }",
    );
    let body: Vec<u8> = (0..50_000u32).map(|i| (i * 7) as u8).collect();
    let (lab, body) = (&lab, &body);
    thread::scope(|scope| {
        for thread in 0..16 {
            scope.spawn(move || {
                for i in 0..if full() { 200 } else { 20 } {
                    let site = lab.sites()[i % 2];
                    let case = format!("{site}, thread {thread}, {i}");
                    lab.get(site, "/y");
                    expect_either(lab, &lab.preflight(site), &case);
                    let mut client = lab.connect(site);
                    let head = format!(
                        "POST /echo HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {}\r\n\r\n",
                        body.len()
                    );
                    let response = client.exchange([head.as_bytes(), body].concat());
                    assert!(response.status == 200 && response.body == *body, "{case}: another body");
                }
            });
        }
    });
}

/// Many clients connect at once and say nothing for a while, as browsers do ahead of need.
#[test]
fn many_silent_clients() {
    on_each_site(Options::default(), |lab, site| {
        let load = Load::of(lab, &[Kind::Get, Kind::Preflight]);
        let mut silent: Vec<Client> = (0..5000).map(|_| lab.connect(site)).collect();
        load.go_on(100, "many are silent");
        for (i, client) in silent.iter_mut().enumerate() {
            if i % 2 == 0 {
                check_get(&client.exchange(get(HOST, "/y")), "/y");
            } else {
                expect_either(lab, &client.exchange(allowed_preflight("/x")), format_args!("{site}, {i}"));
            }
        }
        load.stop().expect_flawless();
    });
}
