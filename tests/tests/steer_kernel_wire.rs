//! Connections that the kernel answers on, segment by segment: losses, order, ends, wrappings, and what is handed over. The
//! client speaks TCP by itself and checks every segment that it gets; each row must hold with the proxy alone as well.
#![forbid(unsafe_code)]

use std::{net::SocketAddr, sync::Arc, thread, time::Duration};

use preflightd_tests::{
    Behaviour, Response,
    client::{get, preflight},
    daemon::POLICY,
    netns::Netns,
    site::wait_until,
    steering::{
        HOST, Lab, Options, Proxy, allowed_preflight, big, can_run, check_get, expect_either, expect_proxy,
        on_each_site,
    },
    wire::{Connection, Offer, Shape, flag},
};
use socket2::SockRef;

/// Longer than the kernel's pause between two answers to segments outside of the window (500 ms).
const ANSWERED_AGAIN: Duration = Duration::from_millis(600);
/// What is answered at all is answered within this, mostly; nothing fails if it is not.
const A_MOMENT: Duration = Duration::from_millis(50);
/// The length of the range of `/big` that [`download`] fetches: some windows' worth.
const RANGE: usize = 100_000;

fn options() -> Options {
    Options { kernel_answers: true, ..Options::default() }
}

#[test]
fn any_offer_is_answered_and_handed_over() {
    let mss = |mss| Offer { mss: Some(mss), ..Offer::LINUX };
    let offers = [
        ("as Linux", Offer::LINUX),
        ("no option", Offer::NONE),
        ("no timestamps", Offer { timestamps: false, ..Offer::LINUX }),
        ("no SACK", Offer { sack: false, ..Offer::LINUX }),
        ("no window scaling", Offer { wscale: None, ..Offer::LINUX }),
        ("window scaling by 0", Offer { wscale: Some(0), ..Offer::LINUX }),
        ("window scaling by 14", Offer { wscale: Some(14), ..Offer::LINUX }),
        ("timestamps only", Offer { timestamps: true, ..Offer::NONE }),
        ("SACK only", Offer { sack: true, ..Offer::NONE }),
        ("window scaling only", Offer { wscale: Some(3), ..Offer::NONE }),
        ("no MSS", Offer { mss: None, ..Offer::LINUX }),
        ("ECN", Offer { ecn: true, ..Offer::LINUX }),
        ("ECN only", Offer { ecn: true, ..Offer::NONE }),
        ("asks for a fast-open cookie", Offer { fast_open: true, ..Offer::LINUX }),
        ("MSS 100", mss(100)),
        ("MSS 536", mss(536)),
        ("MSS 1220", mss(1220)),
        ("MSS 1459", mss(1459)),
        ("jumbo MSS", mss(8960)),
        ("MSS 65535", mss(65535)),
    ];
    on_each_site(options(), |lab, site| {
        let wire = lab.wire(site);
        for (name, offer) in offers {
            let case = format!("{site}, {name}");
            let mut connection = wire.connect(offer);
            // The kernel makes no connection of less than this from a cookie.
            let least = if site.is_ipv4() { 536 } else { 1220 };
            let large = offer.mss.unwrap_or(536) >= least;
            for path in ["/1", "/2"] {
                let answer = exchange(&mut connection, &allowed_preflight(path));
                if large && !offer.fast_open {
                    lab.expect_kernel(&answer, &case);
                } else {
                    expect_proxy(&answer, &case);
                }
            }
            check_get(&exchange(&mut connection, &get(HOST, "/y")), "/y");
            download(&mut connection);
            // The proxy's for good.
            expect_proxy(&exchange(&mut connection, &allowed_preflight("/3")), &case);
            connection.close();
        }
    });
}

/// A client that takes less at once than the answer has is answered by somebody who can cut it.
#[test]
fn a_small_window_is_respected() {
    on_each_site(options(), |lab, site| {
        let wire = lab.wire(site);
        for window in [1, 60, 200] {
            let case = format!("{site}, window {window}");
            let mut connection = wire.connection(Offer { wscale: Some(0), ..Offer::LINUX });
            connection.window = window;
            connection.handshake();
            connection.acking = false;
            connection.send(allowed_preflight("/x"));
            connection.settle(Duration::from_millis(300));
            assert!(connection.received() <= usize::from(window), "{case}: {} bytes", connection.received());
            connection.acking = true;
            connection.window = 60_000;
            connection.ack();
            expect_any(lab, &connection.expect_response(), &case);
            connection.rst();
        }
    });
}

/// Checksums complete or left to the device, in both directions.
#[test]
fn both_checksum_paths() {
    on_each_site(options(), |lab, site| {
        for client in ["on", "off"] {
            for node in ["on", "off"] {
                let case = format!("{site}, client tx {client}, node tx {node}");
                ethtool(lab.client(0), "c0", client);
                ethtool(lab.node(), "n0", node);
                let mut socket = lab.connect(site);
                for i in 0..3 {
                    lab.expect_kernel(&socket.exchange(allowed_preflight("/x")), format_args!("{case}, {i}"));
                }
                check_get(&socket.exchange(get(HOST, "/y")), "/y");
                let wire = lab.wire(site);
                for shape in [Shape::Plain, Shape::Partial] {
                    let mut connection = wire.connection(Offer::LINUX);
                    connection.shape = shape;
                    connection.handshake();
                    kernel(lab, &mut connection, "/1");
                    kernel(lab, &mut connection, "/2");
                    connection.probe();
                    connection.expect_segment("the answer to a keepalive");
                    go_on(&mut connection);
                    connection.close();

                    let mut connection = wire.connection(Offer::LINUX);
                    connection.shape = shape;
                    connection.handshake();
                    kernel(lab, &mut connection, "/x");
                    connection.close();
                }
            }
        }
    });
}

/// Pieces of an answer begin at odd and at even offsets; the client sums all.
#[test]
fn answers_of_any_length() {
    let origins: Vec<_> = (1..12).map(|length| format!("https://{}.example", "a".repeat(length))).collect();
    let policies = POLICY.replace("[\"https://app.example\"]", &format!("{origins:?}"));
    on_each_site(Options { policies, ..options() }, |lab, site| {
        for node in ["on", "off"] {
            ethtool(lab.node(), "n0", node);
            let wire = lab.wire(site);
            for shape in [Shape::Plain, Shape::Partial] {
                let mut connection = wire.connection(Offer::LINUX);
                connection.shape = shape;
                connection.handshake();
                for origin in &origins {
                    let answer = exchange(&mut connection, &preflight(HOST, "/x", origin, "PUT", None));
                    if lab.is_steered() {
                        let said = answer.header("access-control-allow-origin");
                        assert_eq!(said, Some(&**origin), "{site}, node tx {node}, {shape:?}");
                        assert_eq!(answer.header("connection"), None, "{site}: a worker's");
                    } else {
                        expect_proxy(&answer, site);
                    }
                }
                connection.close();
            }
        }
    });
}

/// What the kernel looks at is bounded; a longer head is a worker's, on a fresh connection and on one that was answered on.
#[test]
fn jumbo_frames() {
    on_each_site(Options { mtu: 9000, ..options() }, |lab, site| {
        let wire = lab.wire(site);
        let offer = Offer { mss: Some(8940), ..Offer::LINUX };
        let long = with_padding(&allowed_preflight("/x"), 6000);
        for answers in 0..3 {
            let case = format!("{site}, after {answers} answers");
            let mut connection = wire.connect(offer);
            for _ in 0..answers {
                kernel(lab, &mut connection, "/x");
            }
            lab.expect_worker(&exchange(&mut connection, &long), &case);
            connection.close();

            let mut connection = wire.connect(offer);
            for _ in 0..answers {
                kernel(lab, &mut connection, "/x");
            }
            check_get(&exchange(&mut connection, &with_padding(&get(HOST, "/y"), 6000)), "/y");
            go_on(&mut connection);
            connection.close();
        }
    });
}

/// A path changes within a flow: the answered request comes in one shape, what follows in another.
#[test]
fn any_shape_then_any_other() {
    let shapes = [Shape::Plain, Shape::Partial, Shape::IpOptions, Shape::Fragments, Shape::Tagged(0)];
    on_each_site(options(), |lab, site| {
        let wire = lab.wire(site);
        for first in [Shape::Plain, Shape::Partial, Shape::Tagged(0)] {
            for then in shapes {
                for request in [allowed_preflight("/x"), get(HOST, "/y")] {
                    let case = format!("{site}, {first:?}, then {then:?}: {}", request.escape_ascii());
                    let mut connection = wire.connection(Offer::LINUX);
                    connection.shape = first;
                    connection.handshake();
                    kernel(lab, &mut connection, "/x");
                    connection.shape = then;
                    connection.send(&request);
                    if then == Shape::Fragments && lab.is_steered() {
                        // Fragments cannot be given to a socket: the client learns it at once, and nobody answers wrongly.
                        connection.expect_rst();
                        continue;
                    }
                    let response = connection.expect_response();
                    if request.starts_with(b"GET") {
                        check_get(&response, "/y");
                        download(&mut connection);
                    } else if then == Shape::IpOptions {
                        expect_either(lab, &response, &case);
                    } else {
                        lab.expect_kernel(&response, &case);
                    }
                    connection.close();
                }
            }
        }
        lab.get(site, "/after");
    });
}

#[test]
fn a_lost_syn_ack() {
    on_each_site(options(), |lab, site| {
        let wire = lab.wire(site);
        let mut connection = wire.connection(Offer::LINUX);
        // `expect_syn_ack` fails where the sequence number is another.
        for _ in 0..3 {
            connection.syn();
            connection.expect_syn_ack();
        }
        // And the third ACK is lost too.
        kernel(lab, &mut connection, "/x");
        // One more that was on its way for long. It is for nobody: the connection is there.
        connection.syn();
        connection.expect_acks_or_silence(A_MOMENT);
        kernel(lab, &mut connection, "/x");
        go_on(&mut connection);
        connection.close();
    });
}

#[test]
fn a_lost_request() {
    on_each_site(options(), |lab, site| {
        let wire = lab.wire(site);
        let request = allowed_preflight("/x");
        let mut connection = wire.connect(Offer::LINUX);
        let mut all = Vec::new();
        for i in 0..3 {
            all.extend_from_slice(&request);
            connection.lose(&request);
            connection.persist(&all);
            lab.expect_kernel(&connection.expect_response(), format_args!("{site}, {i}"));
        }
        let get = get(HOST, "/y");
        all.extend_from_slice(&get);
        connection.lose(&get);
        connection.persist(&all);
        check_get(&connection.expect_response(), "/y");
        connection.close();
    });
}

/// The retransmits hold the very bytes; the client checks it wherever it gets some again.
#[test]
fn a_lost_answer_is_the_same_again() {
    on_each_site(options(), |lab, site| {
        let wire = lab.wire(site);
        let request = allowed_preflight("/x");
        for before in 0..3 {
            let mut connection = wire.connect(Offer::LINUX);
            for _ in 0..before {
                kernel(lab, &mut connection, "/before");
            }
            let again = count_again(lab);
            let at = before * allowed_preflight("/before").len();
            let answer = lose_answer(lab, &mut connection, &request, at);
            // Dates differ where it was made anew.
            thread::sleep(Duration::from_millis(1100));
            for _ in 0..2 {
                get_again(&mut connection, &request, at, &answer);
                assert!(!connection.was_reset(), "{site}");
            }
            if let Some(again) = again {
                wait_until("the count", || count_again(lab) == Some(again + 2));
            }
            connection.acking = true;
            connection.ack();
            kernel(lab, &mut connection, "/x");
            go_on(&mut connection);
            connection.close();
        }
    });
}

/// After the policies have changed the very bytes again, or none.
#[test]
fn a_lost_answer_and_other_policies() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::with(options());
    let mut age = 600;
    let request = allowed_preflight("/x");
    for site in lab.sites() {
        for changes in [1, 2, 4] {
            let wire = lab.wire(site);
            let mut connection = wire.connect(Offer::LINUX);
            let (port, answer) = (connection.port(), lose_answer(&lab, &mut connection, &request, 0));
            for _ in 0..changes {
                age += 1;
                change_max_age(&mut lab, site, age);
            }
            get_again(&mut connection, &request, 0, &answer);
            eprintln!("{site}, {changes} changes: reset: {}", connection.was_reset());
            if !connection.was_reset() {
                connection.acking = true;
                connection.ack();
                kernel(&lab, &mut connection, "/x");
                go_on(&mut connection);
                connection.close();
            }
            // As a client does that was reset.
            let mut connection = wire.connection_from(port, Offer::LINUX);
            connection.handshake();
            let response = exchange(&mut connection, &request);
            lab.expect_kernel(&response, site);
            if lab.is_steered() {
                let given = response.header("access-control-max-age").map(str::to_owned);
                assert_eq!(given, Some(age.to_string()), "{site}: {response:?}");
            }
            connection.rst();
        }
    }
}

/// The next request brings the acknowledgement that was lost.
#[test]
fn a_lost_acknowledgement() {
    on_each_site(options(), |lab, site| {
        let wire = lab.wire(site);
        for next in [allowed_preflight("/z"), get(HOST, "/y")] {
            let mut connection = wire.connect(Offer::LINUX);
            lose_answer(lab, &mut connection, &allowed_preflight("/x"), 0);
            connection.acking = true;
            connection.send(&next);
            let response = connection.expect_response();
            if next.starts_with(b"GET") {
                check_get(&response, "/y");
            } else {
                lab.expect_kernel(&response, site);
            }
            go_on(&mut connection);
            connection.close();
        }
    });
}

/// A client that does not wait for the answer, and has lost it: it is still there when it asks again.
#[test]
fn a_lost_answer_and_the_next_request_in_front_of_the_retransmit() {
    on_each_site(options(), |lab, site| {
        let wire = lab.wire(site);
        let request = allowed_preflight("/x");
        for next in [allowed_preflight("/z"), get(HOST, "/y")] {
            let mut connection = wire.connect(Offer::LINUX);
            let answer = lose_answer(lab, &mut connection, &request, 0);
            connection.send(&next);
            connection.settle(A_MOMENT);
            get_again(&mut connection, &request, 0, &answer);
            assert!(!connection.was_reset(), "{site}");
            connection.acking = true;
            connection.persist(&[&*request, &*next].concat());
            let response = connection.expect_response();
            if next.starts_with(b"GET") {
                check_get(&response, "/y");
            } else {
                lab.expect_kernel(&response, site);
            }
            connection.close();
        }
    });
}

/// A client that has lost the answer, and has more to say, sends both at once.
#[test]
fn a_lost_answer_and_the_next_request_behind_the_retransmit() {
    on_each_site(options(), |lab, site| {
        let wire = lab.wire(site);
        let request = allowed_preflight("/x");
        for next in [allowed_preflight("/z"), get(HOST, "/y")] {
            for cut in [1, next.len() / 2, next.len()] {
                let case = format!("{site}, {cut} bytes of {}", next.escape_ascii());
                let mut connection = wire.connect(Offer::LINUX);
                lose_answer(lab, &mut connection, &request, 0);
                let both = [&*request, &*next].concat();
                connection.lose(&next);
                // `take` fails where other bytes come.
                connection.send_at(0, &both[..request.len() + cut]);
                connection.settle(A_MOMENT);
                connection.acking = true;
                connection.persist(&both);
                let response = connection.expect_response();
                if next.starts_with(b"GET") {
                    check_get(&response, "/y");
                } else {
                    lab.expect_kernel(&response, &case);
                }
                connection.close();
            }
        }
    });
}

#[test]
fn keepalives_after_an_answer_are_answered() {
    on_each_site(options(), |lab, site| {
        let wire = lab.wire(site);
        let mut connection = wire.connect(Offer::LINUX);
        for answers in 1..3 {
            kernel(lab, &mut connection, "/x");
            connection.ack();
            for i in 0..2 {
                thread::sleep(ANSWERED_AGAIN);
                connection.settle(Duration::ZERO);
                connection.probe();
                let answer = connection.expect_segment("the answer to a keepalive");
                let case = format!("{site}, {answers} answers, probe {i}: {answer:?}");
                let next = connection.peer_isn().wrapping_add(1).wrapping_add(connection.received() as u32);
                assert_eq!((answer.flags, answer.seq), (flag::ACK, next), "{case}");
                assert!(answer.data.is_empty(), "{case}");
            }
        }
        go_on(&mut connection);
        connection.close();
    });
}

/// Nothing of the connection is the node's: neither while it lasts nor behind its end.
#[test]
fn a_fin_after_the_answer() {
    on_each_site(options(), |lab, site| {
        let wire = lab.wire(site);
        for answers in 1..4 {
            let mut connection = wire.connect(Offer::LINUX);
            let local = connection.local();
            for _ in 0..answers {
                kernel(lab, &mut connection, "/x");
            }
            if lab.is_steered() {
                assert_eq!(sockets_of(lab, local), [""; 0], "{site}: a socket for what the kernel answered");
            }
            connection.fin([]);
            connection.expect_fin();
            connection.expect_acked((answers * allowed_preflight("/x").len()) as u32 + 1);
            assert!(!connection.was_reset(), "{site}");
            if lab.is_steered() {
                assert_eq!(sockets_of(lab, local), [""; 0], "{site}: a socket behind the end");
                wait_until("its entry to go", || lab.metrics().count("preflightd_steer_answered", &[]) == 0);
            }
        }
        // That sockets would have been seen:
        let mut connection = wire.connect(Offer::LINUX);
        kernel(lab, &mut connection, "/x");
        check_get(&exchange(&mut connection, &get(HOST, "/y")), "/y");
        assert_eq!(sockets_of(lab, connection.local()).len(), 1, "{site}: handed over");
        connection.close();
    });
}

/// The FIN that ends the other direction is lost, so the client sends its own again.
#[test]
fn a_lost_fin() {
    on_each_site(options(), |lab, site| {
        let wire = lab.wire(site);
        let mut connection = wire.connect(Offer::LINUX);
        kernel(lab, &mut connection, "/x");
        connection.acking = false;
        connection.fin([]);
        connection.expect_fin();
        for _ in 0..3 {
            // The client's own FIN, and what it acknowledged before.
            connection.forge((u32::MAX, u32::MAX), flag::FIN | flag::ACK, &[]);
            if lab.is_steered() {
                let again = connection.expect_segment("the FIN again");
                assert_eq!(again.flags, flag::FIN | flag::ACK, "{site}: {again:?}");
            }
        }
        connection.acking = true;
        connection.ack();
        connection.settle(A_MOMENT);
        assert!(!connection.was_reset(), "{site}");
    });
}

#[test]
fn a_fin_with_the_request() {
    on_each_site(options(), |lab, site| {
        let wire = lab.wire(site);
        for answers in 0..3 {
            let mut connection = wire.connect(Offer::LINUX);
            for _ in 0..answers {
                kernel(lab, &mut connection, "/x");
            }
            connection.fin(allowed_preflight("/x"));
            expect_either(lab, &connection.expect_response(), format_args!("{site}, after {answers}"));
            connection.expect_fin();

            let mut connection = wire.connect(Offer::LINUX);
            for _ in 0..answers {
                kernel(lab, &mut connection, "/x");
            }
            connection.fin(get(HOST, "/y"));
            check_get(&connection.expect_response(), "/y");
            connection.expect_fin();
        }
    });
}

/// The FIN comes before the answer is acknowledged: the answer still arrives, and the end too.
#[test]
fn a_half_close_after_the_request() {
    on_each_site(options(), |lab, site| {
        let wire = lab.wire(site);
        for answers in 0..3 {
            let mut connection = wire.connect(Offer::LINUX);
            for _ in 0..answers {
                kernel(lab, &mut connection, "/x");
            }
            connection.send(allowed_preflight("/x"));
            connection.fin([]);
            lab.expect_kernel(&connection.expect_response(), format_args!("{site}, after {answers}"));
            connection.persist_fin();
            connection.expect_fin();
            assert!(!connection.was_reset(), "{site}, after {answers}");
            if lab.is_steered() {
                assert_eq!(sockets_of(lab, connection.local()), [""; 0], "{site}, after {answers}");
            }
        }
    });
}

/// The answer is lost too, and the client sends request and FIN again as one.
#[test]
fn a_half_close_and_a_lost_answer() {
    on_each_site(options(), |lab, site| {
        let wire = lab.wire(site);
        let request = allowed_preflight("/x");
        let mut connection = wire.connect(Offer::LINUX);
        let answer = lose_answer(lab, &mut connection, &request, 0);
        connection.fin([]);
        let seen = connection.again();
        connection.forge(
            ((request.len() as u32 + 1).wrapping_neg(), (answer.raw.len() as u32).wrapping_neg()),
            flag::FIN | flag::PSH | flag::ACK,
            &request,
        );
        while lab.is_steered() && connection.again() < seen + answer.raw.len() {
            connection.expect_segment("the answer again");
        }
        connection.acking = true;
        connection.ack();
        connection.persist_fin();
        connection.expect_fin();
        assert!(!connection.was_reset(), "{site}");
    });
}

/// A reset at any time leaves nothing behind: its ports are free for the next connection at once.
#[test]
fn a_reset_at_each_stage() {
    on_each_site(options(), |lab, site| {
        let wire = lab.wire(site);
        for (name, stage) in STAGES {
            eprintln!("{name}");
            for next in [allowed_preflight("/x"), get(HOST, "/y")] {
                let mut connection = wire.connection_from(40_000, Offer::LINUX);
                stage(lab, &mut connection);
                connection.rst();
                let mut connection = wire.connection_from(40_000, Offer::LINUX);
                connection.handshake();
                let response = exchange(&mut connection, &next);
                if next.starts_with(b"GET") {
                    check_get(&response, "/y");
                } else {
                    lab.expect_kernel(&response, format_args!("{site}, {name}"));
                }
                go_on(&mut connection);
                connection.rst();
            }
        }
    });
}

/// A client that knows nothing of its connection any more, or another one behind the same address, begins anew: it is told
/// where the old one stands, resets it, and is served.
#[test]
fn the_same_ports_while_the_connection_lasts() {
    on_each_site(options(), |lab, site| {
        let wire = lab.wire(site);
        for (name, stage) in STAGES {
            eprintln!("{name}");
            // The earlier one's is 2^31: higher, lower.
            for isn in [(1 << 31) + (1 << 24), 1 << 30] {
                let case = format!("{site}, {name}, {isn}");
                let mut connection = wire.connection_from(42_000, Offer::LINUX);
                connection.start_at(1 << 31);
                stage(lab, &mut connection);
                connection.settle(A_MOMENT);
                let mut connection = wire.connection_from(42_000, Offer::LINUX);
                connection.start_at(isn);
                connection.handshake_anew();
                lab.expect_kernel(&exchange(&mut connection, &allowed_preflight("/x")), &case);
                go_on(&mut connection);
                connection.rst();
            }
        }
    });
}

/// How far a connection has come.
type Stage = fn(&Lab, &mut Connection<'_>);

const STAGES: [(&str, Stage); 9] = [
    ("the SYN-ACK is out", |_, connection| {
        connection.syn();
        connection.expect_syn_ack();
    }),
    ("connected", |_, connection| {
        connection.handshake();
    }),
    ("answered, not acknowledged", |lab, connection| {
        connection.handshake();
        lose_answer(lab, connection, &allowed_preflight("/x"), 0);
    }),
    ("answered", |lab, connection| {
        connection.handshake();
        kernel(lab, connection, "/x");
    }),
    ("answered twice", |lab, connection| {
        connection.handshake();
        kernel(lab, connection, "/x");
        kernel(lab, connection, "/x");
    }),
    ("answered, then a part of a request", |lab, connection| {
        connection.handshake();
        kernel(lab, connection, "/x");
        connection.send("GET ");
        connection.expect_acked(allowed_preflight("/x").len() as u32 + 4);
    }),
    ("handed over", |lab, connection| {
        connection.handshake();
        kernel(lab, connection, "/x");
        go_on(connection);
    }),
    ("its end is out, not acknowledged", |lab, connection| {
        connection.handshake();
        kernel(lab, connection, "/x");
        connection.acking = false;
        connection.fin([]);
        connection.expect_fin();
    }),
    ("the kernel's end is out", |_, connection| {
        connection.handshake();
        let response = exchange(connection, &closing_preflight());
        assert_eq!(response.header("connection"), Some("close"), "{response:?}");
        connection.expect_fin();
    }),
];

/// A client's kernel that has given up a connection whose answer it never got says so, and is believed: no two machines go
/// on about it for ever.
#[test]
fn an_aborted_connection_falls_silent() {
    on_each_site(options(), |lab, site| {
        if !lab.is_steered() {
            return;
        }
        // Answers are lost, all else arrives.
        lab.client(0).nft("add table inet lossy");
        lab.client(0).nft("add chain inet lossy in { type filter hook prerouting priority -300; }");
        lab.client(0).nft("add rule inet lossy in tcp sport 80 tcp flags psh drop");
        let answers = |event| lab.metrics().count("preflightd_steer_events_total", &[("event", event)]);
        let before = answers("kernel_answer");
        let mut client = lab.connect(site);
        client.send(allowed_preflight("/x"));
        wait_until("the answer that is lost", || answers("kernel_answer") > before);
        client.half_close();
        // Closing means a RST from now on, here behind the FIN.
        let socket = SockRef::from(client.stream());
        socket.set_linger(Some(Duration::ZERO)).expect("SO_LINGER");
        drop(client);
        wait_until("its entry to go", || lab.metrics().count("preflightd_steer_answered", &[]) == 0);
        lab.client(0).nft("delete table inet lossy");
    });
}

/// The kernel closes where the client asks for it, by itself, and remembers nothing that is in the way of the next.
#[test]
fn the_same_ports_after_an_answer_that_closes() {
    on_each_site(options(), |lab, site| {
        let wire = lab.wire(site);
        let mut isn = 1_u32 << 30;
        let mut begin = || {
            let mut connection = wire.connection_from(41_000, Offer::LINUX);
            isn = isn.wrapping_add(1 << 22);
            connection.start_at(isn);
            connection.handshake();
            connection
        };
        for round in 0..6 {
            let mut connection = begin();
            for _ in 0..round % 3 {
                kernel(lab, &mut connection, "/x");
            }
            let at = round % 3 * allowed_preflight("/x").len();
            let request = closing_preflight();
            let answer = exchange_unacknowledged(&mut connection, &request);
            assert_eq!(answer.header("connection"), Some("close"), "{site}, {round}: {answer:?}");
            if lab.is_steered() {
                assert_eq!((answer.status, answer.header("x-from")), (204, None), "{site}, {round}");
                assert_eq!(sockets_of(lab, connection.local()), [""; 0], "{site}, {round}");
            }
            connection.expect_fin();
            if round >= 3 {
                get_again(&mut connection, &request, at, &answer);
            }
            connection.acking = true;
            connection.ack();
            if round % 2 == 1 && lab.is_steered() {
                // The client is one that forgets the connection without a word.
                continue;
            }
            connection.close();
        }
        let mut connection = begin();
        kernel(lab, &mut connection, "/x");
        go_on(&mut connection);
        connection.close();
    });
}

#[test]
fn a_preflight_and_a_get_in_one_segment() {
    on_each_site(options(), |lab, site| {
        let wire = lab.wire(site);
        for answers in 0..3 {
            let mut connection = wire.connect(Offer::LINUX);
            for _ in 0..answers {
                kernel(lab, &mut connection, "/x");
            }
            connection.send([allowed_preflight("/z"), get(HOST, "/y")].concat());
            expect_proxy(&connection.expect_response(), format_args!("{site}, after {answers}"));
            check_get(&connection.expect_response(), "/y");
            go_on(&mut connection);
            connection.close();
        }
    });
}

/// The next request comes before the answer to the one before is acknowledged: all are answered, in order.
#[test]
fn requests_that_do_not_wait_for_answers() {
    on_each_site(options(), |lab, site| {
        let requests =
            [allowed_preflight("/1"), allowed_preflight("/2"), allowed_preflight("/3"), get(HOST, "/y")];
        let all = requests.concat();
        let check = |response: Response, at: usize| match at {
            0 => lab.expect_kernel(&response, site),
            3 => check_get(&response, "/y"),
            _ => expect_any(lab, &response, format_args!("{site}, {at}")),
        };
        let wire = lab.wire(site);
        let mut connection = wire.connect(Offer::LINUX);
        for request in &requests {
            connection.send(request);
        }
        connection.persist(&all);
        for at in 0..requests.len() {
            check(connection.expect_response(), at);
        }
        connection.close();

        let mut client = lab.connect(site);
        for request in &requests {
            client.send(request);
        }
        for at in 0..requests.len() {
            check(client.response(), at);
        }
    });
}

#[test]
fn a_preflight_in_two_segments() {
    let request = allowed_preflight("/x");
    let all = request.len();
    on_each_site(options(), |lab, site| {
        let wire = lab.wire(site);
        for answers in 0..2 {
            for at in [1, 7, 8, 9, 20, all / 2, all - 4, all - 2, all - 1] {
                let case = format!("{site}, after {answers}, split at {at}");
                let mut connection = wire.connect(Offer::LINUX);
                for _ in 0..answers {
                    kernel(lab, &mut connection, "/x");
                }
                connection.send(&request[..at]);
                connection.send(&request[at..]);
                expect_either(lab, &connection.expect_response(), case);
                connection.close();
            }
        }
    });
}

/// What is handed over the proxy gets byte for byte, and nothing of what was in front of it.
#[test]
fn a_preflight_with_a_body_behind_an_answer() {
    let bent = |more: &str| {
        let text = String::from_utf8(allowed_preflight("/x")).expect("text");
        text.replacen("\r\n\r\n", &format!("\r\n{more}"), 1).into_bytes()
    };
    let smuggled = String::from_utf8(allowed_preflight("/smuggled")).expect("text");
    let requests = [
        ("a body", bent("Content-Length: 5\r\n\r\nhello")),
        ("no body, said so", bent("Content-Length: 0\r\n\r\n")),
        ("a preflight as its body", bent(&format!("Content-Length: {}\r\n\r\n{smuggled}", smuggled.len()))),
    ];
    let answer = b"HTTP/1.1 405 Not Allowed\r\nX-From: proxy\r\nContent-Length: 0\r\n\r\n";
    let proxy = Proxy::Upstream(Behaviour::Http(Arc::new(|_| answer.to_vec())));
    on_each_site(Options { proxy, ..options() }, |lab, site| {
        let wire = lab.wire(site);
        let plain = allowed_preflight("/x");
        for (name, request) in &requests {
            for whole in [true, false] {
                let case = format!("{site}, {name}, in one segment: {whole}");
                let before = lab.upstream().count();
                let mut connection = wire.connect(Offer::LINUX);
                kernel(lab, &mut connection, "/x");
                kernel(lab, &mut connection, "/x");
                if whole {
                    connection.send(request);
                } else {
                    let at =
                        request.windows(4).position(|w| w == b"\r\n\r\n").expect("an end of the head") + 4;
                    connection.send(&request[..at]);
                    if at < request.len() {
                        connection.send(&request[at..]);
                    }
                }
                expect_proxy(&connection.expect_response(), &case);
                connection.close();
                let mut wanted = request.clone();
                if !lab.is_steered() {
                    wanted = [&*plain, &*plain, request].concat();
                }
                let recorded = lab.upstream().ended(before).bytes;
                assert_eq!(recorded.escape_ascii().to_string(), wanted.escape_ascii().to_string(), "{case}");
                assert_eq!(lab.upstream().count(), before + 1, "{case}");
            }
        }
    });
}

/// The first of a long request comes late: what came before it comes again, and is whole.
#[test]
fn a_post_out_of_order_behind_an_answer() {
    let body: Vec<u8> = (0..5000_u32).map(|i| (i * 31 % 251) as u8).collect();
    let head = format!("POST /echo HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {}\r\n\r\n", body.len());
    let post = [head.as_bytes(), &body].concat();
    let pieces: Vec<_> = post.chunks(1400).collect();
    let orders: [&[usize]; 6] = [&[1, 0], &[1, 0, 2, 3], &[3, 2, 1, 0], &[1, 1, 0, 0], &[2], &[0, 2, 3]];
    on_each_site(options(), |lab, site| {
        let wire = lab.wire(site);
        for order in orders {
            let mut connection = wire.connect(Offer::LINUX);
            kernel(lab, &mut connection, "/x");
            let base = allowed_preflight("/x").len();
            let all = [&*allowed_preflight("/x"), &*post].concat();
            connection.lose(&post);
            for &piece in order {
                connection.send_at((base + 1400 * piece) as u32, pieces[piece]);
            }
            connection.persist(&all);
            let response = connection.expect_response();
            assert_eq!(response.status, 200, "{site}, {order:?}: {response:?}");
            assert!(response.body == body, "{site}, {order:?}: another body than was sent");
            go_on(&mut connection);
            connection.close();
        }
    });
}

/// Some of the answered request comes again together with what follows.
#[test]
fn overlapping_retransmits() {
    on_each_site(options(), |lab, site| {
        let wire = lab.wire(site);
        let request = allowed_preflight("/x");
        let base = request.len();
        for next in [get(HOST, "/y"), allowed_preflight("/x")] {
            for from in [0, 1, base / 2, base - 1] {
                let case = format!("{site}, from {from}: {}", next.escape_ascii());
                let mut connection = wire.connect(Offer::LINUX);
                kernel(lab, &mut connection, "/x");
                connection.ack();
                let both = [&*request, &*next].concat();
                connection.send_at(from as u32, &both[from..]);
                connection.persist(&both);
                let response = connection.expect_response();
                if next.starts_with(b"GET") {
                    check_get(&response, "/y");
                } else {
                    lab.expect_kernel(&response, &case);
                }
                // And the first of the next request, and again with the second half, of the proxy's.
                let (get, at) = (get(HOST, "/w"), both.len());
                connection.send_at(at as u32, &get[..10]);
                connection.send_at(at as u32 + 5, &get[5..]);
                connection.persist(&[&*both, &*get].concat());
                check_get(&connection.expect_response(), "/w");
                connection.close();
            }
        }
    });
}

#[test]
fn segments_far_outside_the_window() {
    on_each_site(options(), |lab, site| {
        let wire = lab.wire(site);
        for request in [get(HOST, "/stray"), allowed_preflight("/stray")] {
            for off in [1 << 20, 1 << 30, (1 << 31) - 1, 1 << 31, 0_u32.wrapping_sub(1 << 30)] {
                for ack in [0, 1 << 20, 1 << 31, 0_u32.wrapping_sub(1 << 20)] {
                    let mut connection = wire.connect(Offer::LINUX);
                    kernel(lab, &mut connection, "/x");
                    connection.ack();
                    connection.forge((off, ack), flag::ACK | flag::PSH, &request);
                    connection.expect_acks_or_silence(A_MOMENT / 5);
                    kernel(lab, &mut connection, "/x");
                    check_get(&exchange(&mut connection, &get(HOST, "/y")), "/y");
                    connection.close();
                }
            }
        }
        assert_eq!(lab.logged("/stray"), 0, "{site}: {:#?}", lab.nginx().access_log());
    });
}

/// Who does not know the sequence numbers cannot end the connection, nor speak on it.
#[test]
fn somebody_elses_segments() {
    let resets = [1, 2, 100, 10_000, 1 << 30, 1 << 31, u32::MAX, u32::MAX - 500];
    on_each_site(options(), |lab, site| {
        let wire = lab.wire(site);
        for acknowledged in [true, false] {
            let mut connection = wire.connect(Offer::LINUX);
            lose_answer(lab, &mut connection, &allowed_preflight("/x"), 0);
            if acknowledged {
                connection.acking = true;
                connection.ack();
            }
            for off in resets {
                connection.forge((off, 0), flag::RST, &[]);
                connection.forge((off, 1 << 30), flag::RST | flag::ACK, &[]);
                connection.forge((off, 1 << 30), flag::SYN | flag::ACK, &[]);
                // A SYN as of one that begins there, and one with ends and resets.
                let mut other = wire.connection_from(connection.port(), Offer::LINUX);
                other.start_at(off.wrapping_mul(0x9e37_79b1));
                other.syn();
                connection.forge((off, 0), flag::SYN | flag::FIN, &[]);
                connection.forge((off, 0), 0, b"GET / HTTP/1.1\r\n\r\n");
            }
            // In the right place, but without knowing what the other side has sent.
            for ack in [1, 1 << 16, 1 << 30, 1 << 31, 0_u32.wrapping_sub(1 << 30)] {
                if !lab.is_steered() && ack >= 1 << 31 {
                    // The kernel does not look at an old one where all else is as it was predicted.
                    continue;
                }
                connection.forge((0, ack), flag::ACK | flag::PSH, &get(HOST, "/blind"));
                connection.forge((0, ack), flag::ACK | flag::PSH, &allowed_preflight("/blind"));
                connection.forge((0, ack), flag::ACK | flag::FIN, &[]);
            }
            connection.expect_acks_or_silence(A_MOMENT);
            connection.acking = true;
            connection.ack();
            kernel(lab, &mut connection, "/x");
            check_get(&exchange(&mut connection, &get(HOST, "/y")), "/y");
            download(&mut connection);
            connection.close();
        }
        assert_eq!(lab.logged("/blind"), 0, "{site}: {:#?}", lab.nginx().access_log());
    });
}

/// One preflight on the connection that the kernel answers.
#[track_caller]
fn kernel(lab: &Lab, connection: &mut Connection<'_>, path: &str) {
    let response = exchange(connection, &allowed_preflight(path));
    lab.expect_kernel(&response, connection.local());
}

/// The kernel, a worker, or the proxy: whoever it is, the answer is right.
#[track_caller]
fn expect_any(lab: &Lab, response: &Response, case: impl std::fmt::Display) {
    if response.header("x-from").is_none() && response.header("connection").is_none() {
        lab.expect_kernel(response, case);
    } else {
        expect_either(lab, response, case);
    }
}

/// The connection is the proxy's from here on.
fn go_on(connection: &mut Connection<'_>) {
    check_get(&exchange(connection, &get(HOST, "/y")), "/y");
    download(connection);
}

fn exchange(connection: &mut Connection<'_>, request: &[u8]) -> Response {
    connection.send(request);
    connection.expect_response()
}

/// From here on nothing is acknowledged.
fn exchange_unacknowledged(connection: &mut Connection<'_>, request: &[u8]) -> Response {
    connection.ack();
    connection.acking = false;
    exchange(connection, request)
}

/// Sends a request at the next offset, which must be `at`, and loses the kernel's answer.
fn lose_answer(lab: &Lab, connection: &mut Connection<'_>, request: &[u8], at: usize) -> Response {
    let response = exchange_unacknowledged(connection, request);
    lab.expect_kernel(&response, format_args!("{}, at {at}", connection.local()));
    response
}

/// Sends the request at `at` again, and waits for all of its answer again, or for a RST.
fn get_again(connection: &mut Connection<'_>, request: &[u8], at: usize, answer: &Response) {
    let seen = connection.again();
    connection.send_at(at as u32, request);
    while !connection.was_reset() && connection.again() < seen + answer.raw.len() {
        connection.expect_segment("the answer again");
    }
}

fn closing_preflight() -> Vec<u8> {
    let text = String::from_utf8(allowed_preflight("/x")).expect("text");
    let closing = text.replace("Connection: keep-alive", "Connection: close");
    assert_ne!(text, closing);
    closing.into_bytes()
}

fn ranged_get() -> Vec<u8> {
    format!("GET /big HTTP/1.1\r\nHost: {HOST}\r\nRange: bytes=0-{}\r\n\r\n", RANGE - 1).into_bytes()
}

/// Fetches some of `/big`.
fn download(connection: &mut Connection<'_>) {
    let body = exchange(connection, &ranged_get()).body;
    assert_eq!(body.len(), RANGE);
    assert!(body == big()[..RANGE], "other bytes than the file's");
}

/// The request with a header of so many bytes at its end.
fn with_padding(request: &[u8], length: usize) -> Vec<u8> {
    let head = &request[..request.len() - 2];
    [head, b"X-Padding: ", "x".repeat(length).as_bytes(), b"\r\n\r\n"].concat()
}

/// The node's sockets that are connected to this address.
fn sockets_of(lab: &Lab, client: SocketAddr) -> Vec<String> {
    let client = client.to_string();
    lab.sockets("connected").into_iter().filter(|line| line.split_whitespace().any(|w| w == client)).collect()
}

/// How many answers were sent again; `None` in a lab without the daemon.
fn count_again(lab: &Lab) -> Option<u64> {
    let event = [("event", "kernel_answer_again")];
    lab.is_steered().then(|| lab.metrics().count("preflightd_steer_events_total", &event))
}

/// Lets the daemon take policies with another `max_age`, and waits until the kernel answers by them.
fn change_max_age(lab: &mut Lab, site: SocketAddr, age: u32) {
    if !lab.is_steered() {
        return;
    }
    let admin = lab.daemon().admin();
    let text = lab.toml_with(admin, &POLICY.replace("600", &age.to_string()));
    lab.daemon().rewrite(&text);
    wait_until(format_args!("answers with {age}"), || {
        let response = lab.preflight(site);
        response.header("connection").is_none()
            && response.header("access-control-max-age") == Some(&*age.to_string())
    });
}

fn ethtool(netns: &Netns, interface: &str, tx: &str) {
    let output = netns.command("ethtool").args(["-K", interface, "tx", tx]).output().expect("ethtool runs");
    assert!(output.status.success(), "ethtool -K {interface} tx {tx}: {output:?}");
}
