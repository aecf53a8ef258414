//! Steered flows segment by segment: options, losses, order, wrappings. The client speaks TCP by itself and checks every
//! segment that it gets; each row must hold with the proxy alone as well.
#![forbid(unsafe_code)]

use std::{net::SocketAddr, thread, time::Duration};

use preflightd_tests::{
    client::get,
    steering::{
        HOST, Lab, Options, allowed_preflight, big, check_get, expect_either, expect_proxy, on_each_site,
    },
    wire::{Connection, Offer, Shape, flag},
};

/// Longer than the kernel's pause between two answers to segments outside of the window (500 ms).
const ANSWERED_AGAIN: Duration = Duration::from_millis(600);

/// The length of the range of `/big` that [`download`] fetches: some windows' worth.
const RANGE: usize = 100_000;

#[test]
fn any_offer_is_served() {
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
    on_each_site(Options::default(), |lab, site| {
        for (name, offer) in offers {
            let case = format!("{site}, {name}");
            let wire = lab.wire(site);
            let mut connection = wire.connection(offer);
            let syn_ack = connection.handshake();
            let options = &syn_ack.options;
            // What is offered is taken, so that a steered flow is no worse than another.
            assert_eq!(options.sack, offer.sack, "{case}: SACK");
            assert_eq!(options.wscale.is_some(), offer.wscale.is_some(), "{case}: window scaling");
            assert_eq!(options.timestamp.is_some(), offer.timestamps, "{case}: timestamps");
            assert_eq!(syn_ack.flags & flag::ECE != 0, offer.ecn, "{case}: ECN");
            assert_eq!(options.mss, Some(if site.is_ipv4() { 1460 } else { 1440 }), "{case}: MSS");
            connection.send(allowed_preflight("/x"));
            let answer = connection.expect_response();
            // The kernel makes no connection of less than this from a cookie.
            let least = if site.is_ipv4() { 536 } else { 1220 };
            if offer.mss.is_some_and(|mss| mss >= least) && !offer.fast_open {
                lab.expect_worker(&answer, &case);
            } else {
                expect_either(lab, &answer, &case);
            }
            connection.close();

            let mut connection = wire.connect(offer);
            check_get(&exchange(&mut connection, &get(HOST, "/y")), "/y");
            download(&mut connection);
            connection.close();
        }
    });
}

#[test]
fn jumbo_frames() {
    on_each_site(Options { mtu: 9000, ..Options::default() }, |lab, site| {
        let wire = lab.wire(site);
        let offer = Offer { mss: Some(8940), ..Offer::LINUX };
        let mut connection = wire.connection(offer);
        let syn_ack = connection.handshake();
        assert_eq!(syn_ack.options.mss, Some(if site.is_ipv4() { 8960 } else { 8940 }), "{site}");
        // A head of one segment that no ordinary frame could hold.
        connection.send(with_padding(&allowed_preflight("/x"), 6000));
        lab.expect_worker(&connection.expect_response(), site);
        connection.close();

        let mut connection = wire.connect(offer);
        check_get(&exchange(&mut connection, &with_padding(&get(HOST, "/y"), 6000)), "/y");
        download(&mut connection);
        connection.close();
        for path in ["/1", "/2"] {
            lab.get(site, path);
            lab.expect_worker(&lab.preflight(site), site);
        }
    });
}

#[test]
fn a_small_window_is_respected() {
    on_each_site(Options::default(), |lab, site| {
        for (name, offer) in
            [("scaled", Offer { wscale: Some(0), ..Offer::LINUX }), ("unscaled", Offer::NONE)]
        {
            let wire = lab.wire(site);
            let mut connection = wire.connection(offer);
            connection.window = 1000;
            connection.handshake();
            connection.send(ranged_get());
            connection.acking = false;
            // No more than the window, however long it waits.
            connection.settle(Duration::from_millis(300));
            assert!((1..=1000).contains(&connection.received()), "{site}, {name}: {}", connection.received());
            connection.acking = true;
            connection.ack();
            check_range(&connection.expect_response().body);
            connection.close();
        }
    });
}

#[test]
fn a_syn_again_gets_the_same_answer() {
    both_requests(|lab, site, request, check| {
        let wire = lab.wire(site);
        let mut connection = wire.connection(Offer::LINUX);
        // `expect_syn_ack` fails where the sequence number is another.
        for _ in 0..3 {
            connection.syn();
            connection.expect_syn_ack();
        }
        connection.ack();
        check(&exchange(&mut connection, request), "after three SYNs");
        connection.close();
    });
}

#[test]
fn the_third_ack_is_lost() {
    both_requests(|lab, site, request, check| {
        let wire = lab.wire(site);
        let mut connection = wire.connection(Offer::LINUX);
        connection.syn();
        connection.expect_syn_ack();
        check(&exchange(&mut connection, request), "without a bare ACK");
        connection.close();
    });
}

#[test]
fn the_first_data_segment_is_lost() {
    both_requests(|lab, site, request, check| {
        let wire = lab.wire(site);
        let mut connection = wire.connect(Offer::LINUX);
        connection.lose(request);
        connection.persist(request);
        check(&connection.expect_response(), "first segment lost");
        connection.close();
    });
}

#[test]
fn the_first_of_five_is_lost() {
    any_of_five(&[None, Some(1), Some(2), Some(3), Some(4)]);
}

#[test]
fn reordered_segments() {
    any_of_five(&[Some(1), Some(0), Some(2), Some(3), Some(4)]);
    any_of_five(&[Some(4), Some(3), Some(2), Some(1), Some(0)]);
    any_of_five(&[Some(0), Some(2), Some(1), Some(4), Some(3)]);
}

#[test]
fn doubled_segments() {
    any_of_five(&[Some(0), Some(0), Some(1), Some(1), Some(2), Some(3), Some(0), Some(4), Some(4)]);
}

/// Sends a long request in five segments in this order; `None` is a lost one. What was not acknowledged is sent again.
fn any_of_five(order: &[Option<usize>]) {
    both_requests(|lab, site, request, check| {
        let request = with_padding(request, 4000);
        let pieces: Vec<_> = request.chunks(request.len().div_ceil(5)).collect();
        let wire = lab.wire(site);
        let mut connection = wire.connect(Offer::LINUX);
        connection.lose(&request);
        for piece in order.iter().flatten() {
            connection.send_at((pieces[0].len() * piece) as u32, pieces[*piece]);
        }
        connection.persist(&request);
        let response = connection.expect_response();
        if request.starts_with(b"OPTIONS") {
            expect_either(lab, &response, format_args!("{site}, {order:?}"));
        } else {
            check(&response, "in five");
        }
        connection.close();
    });
}

#[test]
fn everything_comes_twice() {
    both_requests(|lab, site, request, check| {
        let wire = lab.wire(site);
        let mut connection = wire.connection(Offer::LINUX);
        connection.syn();
        connection.syn();
        connection.expect_syn_ack();
        connection.ack();
        connection.ack();
        connection.send(request);
        connection.send_at(0, request);
        check(&connection.expect_response(), "twice");
        connection.send_at(0, request);
        connection.close();
        // One connection, one answer.
        lab.get(site, "/after");
    });
}

#[test]
fn a_lost_answer_is_sent_again() {
    both_requests(|lab, site, request, check| {
        let wire = lab.wire(site);
        let mut connection = wire.connect(Offer::LINUX);
        connection.acking = false;
        connection.send(request);
        let response = connection.expect_response();
        check(&response, "the first time");
        // The client did not get it, and sends its request again; the retransmits hold the very bytes (checked there).
        connection.send_at(0, request);
        while connection.again() < response.raw.len() {
            connection.expect_segment("the answer again");
        }
        connection.acking = true;
        connection.ack();
        connection.close();
    });
}

#[test]
fn keepalives_of_a_silent_client_are_answered() {
    both_requests(|lab, site, request, check| {
        let wire = lab.wire(site);
        let mut connection = wire.connect(Offer::LINUX);
        for i in 0..3 {
            connection.probe();
            let answer = connection.expect_segment("the answer to a keepalive");
            assert_eq!(answer.flags, flag::ACK, "{site}, probe {i}: {answer:?}");
            assert_eq!(answer.seq, connection.peer_isn().wrapping_add(1), "{site}, probe {i}: {answer:?}");
            assert!(answer.data.is_empty(), "{site}, probe {i}: {answer:?}");
            thread::sleep(ANSWERED_AGAIN);
        }
        check(&exchange(&mut connection, request), "after keepalives");
        connection.close();
    });
}

#[test]
fn data_in_the_syn() {
    both_requests(|lab, site, request, check| {
        for offer in [Offer::LINUX, Offer { fast_open: true, ..Offer::LINUX }] {
            let wire = lab.wire(site);
            let mut connection = wire.connection(offer);
            connection.syn_with(request);
            // Not taken: the SYN-ACK acknowledges the SYN alone (checked there).
            connection.expect_syn_ack();
            connection.ack();
            let response = exchange(&mut connection, request);
            if request.starts_with(b"OPTIONS") {
                expect_either(lab, &response, site);
            } else {
                check(&response, "data in the SYN");
            }
            connection.close();
        }
    });
}

#[test]
fn a_fin_with_the_request() {
    both_requests(|lab, site, request, check| {
        let wire = lab.wire(site);
        let mut connection = wire.connect(Offer::LINUX);
        connection.fin(request);
        check(&connection.expect_response(), "FIN with the request");
        connection.expect_fin();
    });
}

#[test]
fn a_half_close_after_the_request() {
    both_requests(|lab, site, request, check| {
        let wire = lab.wire(site);
        let mut connection = wire.connect(Offer::LINUX);
        connection.send(request);
        connection.fin([]);
        check(&connection.expect_response(), "half-closed");
        connection.expect_fin();
    });
}

#[test]
fn a_fin_without_data_gets_one() {
    on_each_site(Options::default(), |lab, site| {
        let wire = lab.wire(site);
        wire.connect(Offer::LINUX).close();
        // The FIN is the third ACK; and lost, so sent again.
        let mut connection = wire.connection(Offer::LINUX);
        connection.syn();
        connection.expect_syn_ack();
        connection.fin([]);
        connection.expect_fin();
        connection.expect_acked(1);
        assert!(!connection.was_reset(), "{site}");
        lab.get(site, "/after");
    });
}

/// A port is free for the next connection at once.
#[test]
fn a_reset_leaves_nothing_behind() {
    both_requests(|lab, site, request, check| {
        let wire = lab.wire(site);
        for i in 0..5 {
            let mut connection = wire.connection_from(40_000, Offer::LINUX);
            connection.handshake();
            if i % 2 == 1 {
                // Some of a request; its ACK is awaited, lest it meet the next connection.
                connection.send(&request[..20]);
                connection.expect_acked(20);
            }
            connection.rst();
        }
        let mut connection = wire.connection_from(40_000, Offer::LINUX);
        connection.handshake();
        check(&exchange(&mut connection, request), "after resets");
        connection.rst();
    });
}

#[test]
fn sequence_numbers_and_clocks_wrap() {
    both_requests(|lab, site, request, check| {
        let wire = lab.wire(site);
        for isn in [0, 1 << 31, u32::MAX, u32::MAX - 1, u32::MAX - 20, u32::MAX - request.len() as u32] {
            for clock in [1, 1 << 31, u32::MAX - 1] {
                wire.start_clock_at(clock);
                let mut connection = wire.connection(Offer::LINUX);
                connection.start_at(isn);
                connection.handshake();
                connection.probe();
                connection.expect_segment("the answer to a keepalive");
                check(&exchange(&mut connection, request), &format!("from {isn}, clock from {clock}"));
                connection.close();
            }
        }
    });
}

/// Who does not know the sequence number of the SYN-ACK gets no answer.
#[test]
fn guessing_the_sequence_number() {
    both_requests(|lab, site, request, _| {
        let wire = lab.wire(site);
        for off in [1, 2, 1 << 8, 1 << 16, 1 << 24, 1 << 31, u32::MAX] {
            let mut connection = wire.connection(Offer::LINUX);
            connection.syn();
            let syn_ack = connection.expect_syn_ack();
            connection.pretend_syn_ack(syn_ack.seq.wrapping_add(off));
            connection.send(request);
            connection.expect_rst_or_silence(Duration::from_millis(50));
        }
        // And without a SYN.
        let mut connection = wire.connection(Offer::NONE);
        connection.pretend_syn_ack(0x1234_5678);
        connection.send(request);
        connection.expect_rst_or_silence(Duration::from_millis(50));
        lab.get(site, "/after");
    });
}

#[test]
fn every_shape_is_served() {
    let shapes = [Shape::Plain, Shape::Partial, Shape::IpOptions, Shape::Fragments, Shape::Tagged(0)];
    both_requests(|lab, site, request, check| {
        let wire = lab.wire(site);
        for shape in shapes {
            let mut connection = wire.connection(Offer::LINUX);
            connection.shape = shape;
            connection.handshake();
            let response = exchange(&mut connection, request);
            if matches!(shape, Shape::Plain | Shape::Partial) || request.starts_with(b"GET") {
                check(&response, &format!("{shape:?}"));
            } else {
                expect_either(lab, &response, format_args!("{site}, {shape:?}"));
            }
            connection.close();
        }
    });
}

/// A path changes within a flow: what follows the handshake comes in another shape.
#[test]
fn the_shape_changes_after_the_handshake() {
    let shapes = [Shape::Plain, Shape::Partial, Shape::IpOptions, Shape::Fragments, Shape::Tagged(0)];
    both_requests(|lab, site, request, check| {
        let wire = lab.wire(site);
        for first in shapes {
            for then in shapes {
                let case = format!("{site}, {first:?}, then {then:?}");
                let mut connection = wire.connection(Offer::LINUX);
                connection.shape = first;
                connection.handshake();
                connection.shape = then;
                connection.send(request);
                let deferred = !matches!(first, Shape::IpOptions | Shape::Fragments) && lab.is_steered();
                if deferred && then == Shape::Fragments {
                    // Fragments cannot be given to a socket: the client learns it at once, and nobody answers wrongly.
                    connection.expect_rst();
                    continue;
                }
                let response = connection.expect_response();
                if request.starts_with(b"GET") {
                    check(&response, &case);
                } else {
                    expect_either(lab, &response, &case);
                }
                connection.close();
            }
        }
    });
}

/// Checksums complete or left to the device, in both directions.
#[test]
fn both_checksum_paths() {
    both_requests(|lab, site, request, check| {
        for client in ["on", "off"] {
            for node in ["on", "off"] {
                let case = format!("client tx {client}, node tx {node}");
                ethtool(lab.client(0), "c0", client);
                ethtool(lab.node(), "n0", node);
                check(&lab.exchange(site, request), &case);
                let wire = lab.wire(site);
                for shape in [Shape::Plain, Shape::Partial] {
                    let mut connection = wire.connection(Offer::LINUX);
                    connection.shape = shape;
                    connection.handshake();
                    connection.probe();
                    connection.expect_segment("the answer to a keepalive");
                    check(&exchange(&mut connection, request), &case);
                    connection.close();
                }
            }
        }
    });
}

/// A VLAN that the node has no interface for is not the node's, as without us.
#[test]
fn a_foreign_vlan_gets_no_answer() {
    on_each_site(Options::default(), |lab, site| {
        let wire = lab.wire(site);
        let mut connection = wire.connection(Offer::LINUX);
        connection.shape = Shape::Tagged(5);
        connection.syn();
        assert!(!connection.hears(Duration::from_millis(300)), "{site}: a SYN of VLAN 5 was answered");
        lab.get(site, "/after");
    });
}

/// Many flows between their SYN and their data at once, finished in another order.
#[test]
fn many_at_once() {
    on_each_site(Options::default(), |lab, site| {
        let wire = lab.wire(site);
        let mut connections: Vec<_> = (0..500).map(|_| wire.connection(Offer::LINUX)).collect();
        for connection in &mut connections {
            connection.syn();
        }
        for connection in &mut connections {
            connection.expect_syn_ack();
            connection.ack();
        }
        for (i, connection) in connections.iter_mut().enumerate().rev() {
            if i % 2 == 0 {
                connection.send(allowed_preflight("/x"));
            } else {
                connection.send(get(HOST, &format!("/{i}")));
            }
        }
        for (i, connection) in connections.iter_mut().enumerate() {
            let response = connection.expect_response();
            if i % 2 == 0 {
                lab.expect_worker(&response, format_args!("{site}, {i}"));
            } else {
                check_get(&response, &format!("/{i}"));
            }
        }
        for connection in connections {
            connection.close();
        }
    });
}

/// A test for the two kinds of requests: a preflight, which a worker answers, and a GET, which is the proxy's.
fn both_requests(test: impl Fn(&Lab, SocketAddr, &[u8], &dyn Fn(&preflightd_tests::Response, &str))) {
    on_each_site(Options::default(), |lab, site| {
        test(lab, site, &allowed_preflight("/x"), &|response, case| {
            lab.expect_worker(response, format_args!("{site}, preflight, {case}"));
        });
        test(lab, site, &get(HOST, "/y"), &|response, case| {
            expect_proxy(response, format_args!("{site}, GET, {case}"));
            check_get(response, "/y");
        });
    });
}

fn exchange(connection: &mut Connection<'_>, request: &[u8]) -> preflightd_tests::Response {
    connection.send(request);
    connection.expect_response()
}

fn ranged_get() -> Vec<u8> {
    format!("GET /big HTTP/1.1\r\nHost: {HOST}\r\nRange: bytes=0-{}\r\n\r\n", RANGE - 1).into_bytes()
}

fn check_range(body: &[u8]) {
    assert_eq!(body.len(), RANGE);
    assert!(body == &big()[..RANGE], "other bytes than the file's");
}

/// Fetches some of `/big`.
fn download(connection: &mut Connection<'_>) {
    check_range(&exchange(connection, &ranged_get()).body);
}

/// The request with a header of so many bytes at its end.
fn with_padding(request: &[u8], length: usize) -> Vec<u8> {
    let head = &request[..request.len() - 2];
    [head, b"X-Padding: ", "x".repeat(length).as_bytes(), b"\r\n\r\n"].concat()
}

fn ethtool(netns: &preflightd_tests::netns::Netns, interface: &str, tx: &str) {
    let output = netns.command("ethtool").args(["-K", interface, "tx", tx]).output().expect("ethtool runs");
    assert!(output.status.success(), "ethtool -K {interface} tx {tx}: {output:?}");
}
