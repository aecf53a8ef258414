//! What happens to a steered port when something breaks: the proxy serves everything, as if there were no daemon.

use std::{
    io::ErrorKind,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    thread,
    time::Duration,
};

use preflightd_tests::{
    Behaviour, Client,
    client::get,
    load::{Load, PREFLIGHTERS},
    site::wait_until,
    steering::{
        HOST, Lab, Options, Proxy, allowed_preflight, can_run, check_get, expect_either, expect_proxy,
        on_each_site,
    },
    wire::Offer,
};
use rustix::process::{Pid, Signal, kill_process};

/// After this the heartbeat is stale (1 s), with room.
const STALE: Duration = Duration::from_millis(2500);

/// The second daemon's admin interface, in an upgrade.
const SECOND_ADMIN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9001);

#[test]
fn no_proxy_means_refused() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::new();
    for _ in 0..2 {
        lab.wait_steered();
        for site in lab.sites() {
            lab.get(site, "/before");
        }
        lab.stop_proxy();
        for site in lab.sites() {
            for _ in 0..10 {
                let error = lab.try_connect(site).expect_err("nobody listens");
                assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{site}: {error}");
            }
        }
        lab.start_proxy();
        for site in lab.sites() {
            lab.get(site, "/after");
        }
    }
    lab.wait_steered();
}

/// nginx replaces its workers, and keeps its listening sockets: nobody may notice.
#[test]
fn the_proxy_reloads_under_load() {
    if !can_run() {
        return;
    }
    let lab = Lab::new();
    let load = Load::start(&lab);
    load.go_on(200, "all is well");
    let nginx = Pid::from_raw(lab.nginx().pid().cast_signed()).expect("nginx's process");
    for _ in 0..3 {
        kill_process(nginx, Signal::HUP).expect("a signal to nginx");
        load.go_on(200, "nginx reloads");
    }
    lab.wait_steered();
    let report = load.stop();
    // What a client keeps alive, nginx may close as the request arrives: as without us.
    assert!(report.failed_gets.iter().all(|f| f.contains("KeepAlive")), "{:#?}", report.failed_gets);
    assert!(report.failed_preflights.is_empty(), "{:#?}", report.failed_preflights);
    assert!(!lab.is_steered() || report.workers > 0);
}

#[test]
fn a_killed_daemon_in_mid_storm() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::new();
    lab.wait_steered();
    let load = Load::start(&lab);
    load.go_on(300, "all is well");
    if lab.is_steered() {
        assert!(load.workers() > 0 && load.proxys() == 0, "workers answer before");
        lab.daemon().kill();
    }
    load.go_on(300, "the daemon is dead");
    thread::sleep(STALE);
    let workers = load.workers();
    load.go_on(300, "the heartbeat is stale");
    assert_eq!(load.workers(), workers, "the dead do not answer");
    for site in lab.sites() {
        expect_proxy(&lab.preflight(site), format_args!("{site}, after the daemon's death"));
    }
    let report = load.stop();
    report.expect_flawless_gets();
    // Only what a worker had at that moment dies with it.
    assert!(report.failed_preflights.len() <= PREFLIGHTERS, "{:#?}", report.failed_preflights);
    assert!(report.proxys > 0);
}

#[test]
fn a_daemon_that_comes_back_steers_again() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::new();
    if !lab.is_steered() {
        return;
    }
    let load = Load::start(&lab);
    for _ in 0..2 {
        lab.wait_steered();
        lab.daemon().kill();
        lab.wait_proxied();
        lab.start_daemon();
    }
    lab.wait_steered();
    load.stop().expect_flawless_gets();
}

/// A daemon that does not run for a while (stopped, or starved) is as a dead one; it may come back.
#[test]
fn a_stopped_daemon() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::new();
    if !lab.is_steered() {
        return;
    }
    lab.wait_steered();
    let load = Load::start(&lab);
    load.go_on(300, "all is well");
    lab.daemon().signal(Signal::STOP);
    thread::sleep(STALE);
    for site in lab.sites() {
        for _ in 0..20 {
            expect_proxy(&lab.preflight(site), format_args!("{site}, while the daemon is stopped"));
            lab.get(site, "/stopped");
        }
    }
    lab.daemon().signal(Signal::CONT);
    lab.wait_steered();
    load.go_on(300, "the daemon goes on");
    // What workers had been given is answered late, not lost.
    load.stop().expect_flawless();
}

#[test]
fn a_daemon_that_is_told_to_end() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::new();
    if !lab.is_steered() {
        return;
    }
    lab.wait_steered();
    let load = Load::start(&lab);
    load.go_on(300, "all is well");
    lab.daemon().signal(Signal::TERM);
    let status = lab.daemon().wait();
    assert!(status.success(), "{status}");
    load.go_on(300, "the daemon has ended");
    lab.wait_proxied();
    load.stop().expect_flawless();
}

/// A second daemon takes over what the first has pinned; then the first ends.
#[test]
fn an_upgrade_in_place() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::new();
    if !lab.is_steered() {
        return;
    }
    lab.wait_steered();
    let load = Load::start(&lab);
    load.go_on(300, "the first daemon runs");
    let mut second = lab.another_daemon(SECOND_ADMIN);
    second.wait_ready(lab.home());
    load.go_on(300, "both run");
    let mut first = lab.replace_daemon(second).expect("the first daemon");
    first.signal(Signal::TERM);
    let status = first.wait();
    assert!(status.success(), "{status}\n{}", first.log());
    load.go_on(300, "the second runs alone");
    thread::sleep(STALE);
    for site in lab.sites() {
        for i in 0..20 {
            lab.expect_worker(&lab.preflight(site), format_args!("{site}, {i}, after the upgrade"));
        }
    }
    // While the second one puts everything in its place, preflights are the proxy's.
    load.stop().expect_flawless();
}

/// Clients that an earlier daemon left waiting, as idle browsers do, do not make a port one of a server that speaks first.
#[test]
fn an_upgrade_among_silent_clients() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::new();
    if !lab.is_steered() {
        return;
    }
    lab.wait_steered();
    for site in lab.sites() {
        for i in 0..5 {
            lab.expect_worker(&lab.preflight(site), format_args!("{site}, {i}, before"));
        }
    }
    let wire = lab.wire(lab.sites()[0]);
    let _silent: Vec<_> = (0..12).map(|_| wire.connect(Offer::LINUX)).collect();
    // From ten seconds on they count; a port is judged every ten.
    thread::sleep(Duration::from_secs(11));
    let mut second = lab.another_daemon(SECOND_ADMIN);
    second.wait_ready(lab.home());
    let mut first = lab.replace_daemon(second).expect("the first daemon");
    first.signal(Signal::TERM);
    assert!(first.wait().success(), "{}", first.log());
    thread::sleep(Duration::from_secs(22));
    for site in lab.sites() {
        lab.expect_worker(&lab.preflight(site), format_args!("{site}, after"));
    }
}

#[test]
fn a_detached_program_under_load() {
    if !can_run() {
        return;
    }
    let lab = Lab::new();
    if !lab.is_steered() {
        return;
    }
    lab.wait_steered();
    let load = Load::start(&lab);
    load.go_on(300, "all is well");
    lab.detach();
    load.go_on(300, "nothing is attached");
    let workers = load.workers();
    load.go_on(300, "nothing is attached");
    assert_eq!(load.workers(), workers, "nothing steers");
    for site in lab.sites() {
        expect_proxy(&lab.preflight(site), format_args!("{site}, detached"));
    }
    let report = load.stop();
    // A flow whose SYN-ACK was the program's, and whose data came when it was gone, is nobody's: one per client at most.
    let failed = report.failed_gets.len() + report.failed_preflights.len();
    assert!(failed <= 3 * PREFLIGHTERS, "{:#?} {:#?}", report.failed_gets, report.failed_preflights);
}

/// Flows whose SYN-ACK is out, and those that are the proxy's, outlive the daemon.
#[test]
fn what_has_begun_outlives_the_daemon() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::new();
    let sites = lab.sites();
    let mut kept: Vec<_> = sites.iter().map(|site| lab.connect(*site)).collect();
    for client in &mut kept {
        check_get(&client.exchange(get(HOST, "/kept")), "/kept");
    }
    let wires = sites.map(|site| lab.wire(site));
    let mut begun: Vec<_> = wires.iter().flat_map(|w| (0..50).map(|_| w.connect(Offer::LINUX))).collect();
    let mut half: Vec<_> = wires.iter().flat_map(|w| (0..50).map(|_| w.connection(Offer::LINUX))).collect();
    for connection in &mut half {
        connection.syn();
        connection.expect_syn_ack();
    }
    if lab.is_steered() {
        lab.daemon().kill();
    }
    // Some at once, in the second in which the heartbeat is still fresh; some later. No preflights in that second: the
    // kernel closes a dead process's ring a little later, and a worker's socket with it; what was given to it meanwhile is
    // reset. What is the proxy's is never.
    for (i, connection) in begun.iter_mut().chain(&mut half).enumerate() {
        if i == 50 {
            thread::sleep(STALE);
        }
        let case = connection.local();
        if i < 50 || i % 2 == 0 {
            connection.send(get(HOST, "/y"));
            check_get(&connection.expect_response(), "/y");
        } else {
            connection.send(allowed_preflight("/x"));
            expect_proxy(&connection.expect_response(), case);
        }
    }
    for client in &mut kept {
        check_get(&client.exchange(get(HOST, "/kept")), "/kept");
    }
}

/// Without SYN cookies the kernel takes no connection from a cookie: then nothing is deferred.
#[test]
fn no_syn_cookies() {
    if !can_run() {
        return;
    }
    let lab = Lab::new();
    lab.wait_steered();
    for round in 0..2 {
        lab.node().sysctl("net.ipv4.tcp_syncookies", "0");
        lab.wait_proxied();
        for site in lab.sites() {
            for i in 0..20 {
                lab.get(site, &format!("/{i}"));
                expect_proxy(&lab.preflight(site), format_args!("{site}, round {round}, {i}"));
            }
        }
        lab.node().sysctl("net.ipv4.tcp_syncookies", "1");
        lab.wait_steered();
    }
}

/// The kernel gives no connection from a cookie to an MPTCP listener, which Go's servers have.
#[test]
fn an_mptcp_listener_is_left_alone() {
    if !can_run() {
        return;
    }
    let proxy = Proxy::MptcpUpstream(Behaviour::report());
    on_each_site(Options { proxy, ..Options::default() }, |lab, site| {
        for i in 0..20 {
            let case = format!("{site}, {i}");
            let mut client = lab.connect(site);
            assert_eq!(client.exchange(get(HOST, "/y")).body, b"GET /y HTTP/1.1 +0", "{case}");
            let mut client = lab.connect(site);
            let body = client.exchange(allowed_preflight("/x")).body;
            assert_eq!(body, b"OPTIONS /x HTTP/1.1 +0", "{case}");
        }
    });
}

/// A load balancer with few source ports comes back on those that the node still holds in TIME_WAIT.
#[test]
fn ports_in_time_wait_are_used_again() {
    for timestamps in ["1", "0"] {
        on_each_site(Options::default(), |lab, site| {
            lab.client(0).sysctl("net.ipv4.ip_local_port_range", "40000 40009");
            lab.client(0).sysctl("net.ipv4.tcp_timestamps", timestamps);
            let closing = |request: Vec<u8>| {
                let text =
                    String::from_utf8(request).expect("text").replace("Connection: keep-alive\r\n", "");
                text.replacen("\r\n", "\r\nConnection: close\r\n", 1)
            };
            let (get, preflight) = (closing(get(HOST, "/y")), closing(allowed_preflight("/x")));
            for i in 0..300 {
                // The server closes first, so that TIME_WAIT is on the node.
                let mut client = lab.connect(site);
                if i % 2 == 0 {
                    check_get(&client.exchange(&get), "/y");
                } else {
                    let response = client.exchange(&preflight);
                    expect_either(lab, &response, format_args!("{site}, {i}, timestamps {timestamps}"));
                }
                client.expect_end();
            }
            assert!(!lab.sockets("time-wait").is_empty(), "{site}: the test means nothing without TIME_WAIT");
        });
    }
}

/// The workers accept nothing, and their queues overflow: all that they cannot take is the proxy's.
#[test]
fn the_workers_queues_are_full() {
    if !can_run() {
        return;
    }
    let sysctls = &[("net.core.somaxconn", "128")];
    let mut lab = Lab::with(Options { sysctls, ..Options::default() });
    if !lab.is_steered() {
        return;
    }
    lab.wait_steered();
    lab.daemon().signal(Signal::STOP);
    let mut clients = Vec::new();
    for i in 0..2000 {
        let site = lab.sites()[i % 2];
        let mut client = lab.connect(site);
        client.send(allowed_preflight("/x"));
        clients.push((site, client));
    }
    for site in lab.sites() {
        lab.get(site, "/full");
    }
    lab.daemon().signal(Signal::CONT);
    for (site, client) in &mut clients {
        expect_either(&lab, &client.response(), site);
    }
    lab.wait_steered();
}

/// More silent clients than may be pending: those beyond are the kernel's, none is lost.
#[test]
fn the_pending_map_is_full() {
    let steer = "max_pending = 1024".to_owned();
    on_each_site(Options { steer, ..Options::default() }, |lab, site| {
        let mut silent: Vec<Client> = Vec::new();
        for i in 0..3000 {
            silent.push(lab.connect(site));
            if i % 100 == 0 {
                lab.get(site, "/meanwhile");
                expect_either(lab, &lab.preflight(site), format_args!("{site}, {i} silent clients"));
            }
        }
        let mut lost = 0;
        for client in &mut silent {
            match client.try_send(get(HOST, "/y")).and_then(|()| client.try_response()) {
                Ok(response) => check_get(&response, "/y"),
                // An entry that was evicted: reset at worst.
                Err(e) if e.kind() == ErrorKind::ConnectionReset => lost += 1,
                Err(e) => panic!("{site}: {e}"),
            }
        }
        assert_eq!(lost, 0, "{site}: silent clients were reset");
        drop(silent);
        if lab.is_steered() {
            wait_until("workers to answer again", || lab.answered_by_worker(site) == Some(true));
        }
    });
}
