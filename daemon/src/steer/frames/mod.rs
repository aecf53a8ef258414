//! Single frames through the programs (`BPF_PROG_TEST_RUN`): what is counted, what is left to the kernel and why, and the
//! very bytes of a SYN-ACK. Needs root.

use std::{
    collections::HashMap,
    net::{Ipv4Addr, TcpListener, TcpStream},
};

use aya::{
    Ebpf,
    maps::MapData,
    programs::{TestRun as _, TestRunOptions},
};
use preflightd_common::{
    abi::{Config, Endpoint, Flow, Interface, Pending, Service, config_flags, event, fail_open, state},
    tcp::{flags, read_options},
};

mod answers;

use super::{
    maps::{Maps, words},
    netns::tests::{Scratch, have_root},
    object,
};

const NEXT: i32 = -1;
const SHOT: i32 = 2;
const REDIRECT: i32 = 7;
const CLIENT_PORT: u16 = 50_000;

/// The programs with a map of served endpoints, in the namespace of the calling thread.
struct Bench {
    ebpf: Ebpf,
    maps: Maps,
    left: Vec<u64>,
}

impl Bench {
    fn new(port: u16, config: Config) -> Self {
        let mut ebpf = object::load(None, object::Sizes::SMALL).expect("the maps load").ebpf;
        for name in ["steer", "observe"] {
            object::load_program(&mut ebpf, name).expect(name);
        }
        let mut maps = Maps::take(&mut ebpf).expect("the maps are there");
        let services = [words(Ipv4Addr::LOCALHOST.into()), words(std::net::Ipv6Addr::LOCALHOST.into())];
        let service = Service { listener: 0, row: 0, first_socket: 0, sockets: 0, engaged: 1 };
        let endpoint = |address| (Endpoint { address, port: port.to_be(), zero: 0 }, service);
        maps.serve(&services.map(endpoint).into()).expect("SERVED");
        let loopback = Interface { mss_v4: 1460, mss_v6: 1440, symmetric_v4: 1, symmetric_v6: 1 };
        maps.set_interfaces(&HashMap::from([(1, loopback)])).expect("INTERFACES");
        maps.set_config(config).expect("CONFIG");
        maps.set_key(0, [1, 2]).expect("KEYS");
        maps.beat(true).expect("HEARTBEAT");
        Self { ebpf, maps, left: vec![0; fail_open::NAMES.len()] }
    }

    /// The verdict, and the frame afterwards.
    fn run(&mut self, program: &str, frame: &[u8]) -> (i32, Vec<u8>) {
        let mut out = vec![0; 4096];
        let options =
            TestRunOptions { data_in: Some(frame), data_out: Some(&mut out), ..TestRunOptions::default() };
        let result = object::program(&mut self.ebpf, program).test_run(options).expect("the kernel runs it");
        let length = result.data_size_out as usize;
        out.truncate(length);
        (result.return_value.cast_signed(), out)
    }

    fn event(&self, slot: u32) -> u64 {
        self.maps.counts(1).expect("readable").event(slot)
    }

    /// How many connections have an entry.
    fn waiting(&mut self) -> usize {
        self.pending().keys().filter_map(Result::ok).count()
    }

    /// Evicts them all.
    fn forget_all(&mut self) {
        let mut pending = self.pending();
        let flows: Vec<_> = pending.keys().filter_map(Result::ok).collect();
        for flow in flows {
            pending.remove(&flow).expect("PENDING");
        }
    }

    fn pending(&mut self) -> aya::maps::HashMap<&mut MapData, Flow, Pending> {
        let map = self.ebpf.map_mut("PENDING").expect("the programs' own");
        aya::maps::HashMap::try_from(map).expect("a hash map")
    }

    /// Why connections were left to the kernel since the last call.
    fn fail_opens(&mut self) -> Vec<&'static str> {
        let counts = self.maps.counts(1).expect("readable").fail_opens;
        let before = std::mem::replace(&mut self.left, counts);
        let new = fail_open::NAMES.iter().zip(self.left.iter().zip(before));
        new.filter(|(_, (now, before))| *now > before).map(|(name, _)| *name).collect()
    }
}

fn deferring() -> Config {
    Config {
        state: state::DEFER,
        flags: config_flags::TIMESTAMPS
            | config_flags::SACK
            | config_flags::WINDOW_SCALING
            | config_flags::ECN,
        percent: 100,
        window: 64_240,
        window_scale: 7,
        room: 100,
        ..Config::default()
    }
}

const LINUX: &[u8] = &[2, 4, 5, 0xb4, 4, 2, 8, 10, 0, 0, 1, 2, 0, 0, 0, 0, 1, 3, 3, 9];

#[test]
fn frames_that_are_counted_and_frames_that_are_not() {
    if !have_root() {
        return;
    }
    let ack = |port| tcp(port, flags::ACK, &[], b"");
    let mut bench = Bench::new(80, deferring());
    for (name, frame, counted) in [
        ("IPv4", v4(&ipv4(5, 0, 6), &ack(80)), true),
        ("IPv6", v6(6, &[], &ack(80)), true),
        ("IPv4, don't fragment", v4(&ipv4(5, 0x4000, 6), &ack(80)), true),
        ("IPv4 with options", v4(&ipv4(7, 0, 6), &ack(80)), true),
        ("IPv6, options for the destination", v6(60, &[6, 0, 1, 4, 0, 0, 0, 0], &ack(80)), true),
        ("IPv6, two extension headers", v6(60, &[60, 0, 1, 4, 0, 0, 0, 0], &ack(80)), false),
        ("IPv4, another port", v4(&ipv4(5, 0, 6), &ack(81)), false),
        ("IPv4, the port's bytes swapped", v4(&ipv4(5, 0, 6), &ack(80_u16.swap_bytes())), false),
        ("IPv4, UDP", v4(&ipv4(5, 0, 17), &ack(80)), false),
        ("IPv6, UDP", v6(17, &[], &ack(80)), false),
        ("IPv4, first fragment", v4(&ipv4(5, 0x2000, 6), &ack(80)), false),
        ("IPv4, later fragment", v4(&ipv4(5, 0x2001, 6), &ack(80)), false),
        ("IPv4, header too short to be one", v4(&ipv4(4, 0, 6), &ack(80)), false),
        ("TCP header too short to be one", v4(&ipv4(5, 0, 6), &with_offset(ack(80), 4)), false),
        ("TCP header beyond the frame", v4(&ipv4(5, 0, 6), &with_offset(ack(80), 15)), false),
        ("IPv4, cut in the TCP header", v4(&ipv4(5, 0, 6), &ack(80))[..50].to_vec(), false),
        ("IPv6, cut in the TCP header", v6(6, &[], &ack(80))[..70].to_vec(), false),
        ("for another machine", [&[2; 6][..], &v4(&ipv4(5, 0, 6), &ack(80))[6..]].concat(), false),
        ("IPv6 of an IPv4 address", mapped(v6(6, &[], &ack(80))), false),
    ] {
        for program in ["steer", "observe"] {
            let before = bench.event(event::Packet);
            let (verdict, after) = bench.run(program, &frame);
            assert_eq!(verdict, NEXT, "{program}, {name}: the packet goes on");
            assert_eq!(after, frame, "{program}, {name}: untouched");
            assert_eq!(bench.event(event::Packet) - before, u64::from(counted), "{program}, {name}");
        }
    }
}

#[test]
fn syns_that_are_left_to_the_kernel() {
    in_own_netns(|| {
        let listener = TcpListener::bind("127.0.0.1:80").expect("the namespace is ours");
        let syn = tcp(80, flags::SYN, LINUX, b"");
        let plain = v4(&ipv4(5, 0, 6), &syn);
        let off = Config { state: state::OFF, ..deferring() };
        let observe = Config { state: state::OBSERVE, ..deferring() };
        let pressed = Config { flags: config_flags::PRESSURE, ..deferring() };
        let options = |bytes: &[u8]| v4(&ipv4(5, 0, 6), &tcp(80, flags::SYN, bytes, b""));
        let flagged = |bits: u8| v4(&ipv4(5, 0, 6), &tcp(80, bits, LINUX, b""));
        let mut bench = Bench::new(80, deferring());
        for (name, config, frame, want) in [
            ("off", off, plain.clone(), vec![]),
            ("observing", observe, plain.clone(), vec![]),
            ("the map is nearly full", pressed, plain.clone(), vec!["pressure"]),
            ("no room", Config { room: 0, ..deferring() }, plain.clone(), vec!["pressure"]),
            ("nobody's share", Config { percent: 0, ..deferring() }, plain.clone(), vec!["percent"]),
            ("IP options", deferring(), v4(&ipv4(6, 0, 6), &syn), vec!["ip_options"]),
            ("a fragment", deferring(), v4(&ipv4(5, 0x2000, 6), &syn), vec!["ip_options"]),
            ("data", deferring(), v4(&ipv4(5, 0, 6), &tcp(80, flags::SYN, LINUX, b"x")), vec!["odd_syn"]),
            ("urgent", deferring(), flagged(flags::SYN | flags::URG), vec!["odd_syn"]),
            ("Fast Open", deferring(), options(&[34, 2, 1, 1]), vec!["odd_syn"]),
            ("an option of no length", deferring(), options(&[8, 0, 1, 1]), vec!["odd_syn"]),
            ("a small MSS", deferring(), options(&[2, 4, 2, 0x17]), vec!["mss"]),
            ("IPv6, where nobody listens", deferring(), v6(6, &[], &syn), vec!["no_listener"]),
            ("IPv6 without an MSS", deferring(), v6(6, &[], &tcp(80, flags::SYN, &[], b"")), vec!["mss"]),
            ("SYN and FIN", deferring(), flagged(flags::SYN | flags::FIN), vec![]),
            ("SYN and ACK", deferring(), flagged(flags::SYN | flags::ACK), vec![]),
        ] {
            bench.maps.set_config(config).expect("CONFIG");
            let (verdict, after) = bench.run("steer", &frame);
            assert_eq!((verdict, after), (NEXT, frame), "{name}: untouched");
            assert_eq!(bench.fail_opens(), want, "{name}");
            assert_eq!(bench.event(event::SynAck), 0, "{name}");
        }
        bench.maps.set_config(deferring()).expect("CONFIG");
        bench.maps.beat(false).expect("HEARTBEAT");
        assert_eq!(bench.run("steer", &plain).0, NEXT);
        assert_eq!(bench.fail_opens(), ["heartbeat"]);
        drop(listener);
        bench.maps.beat(true).expect("HEARTBEAT");
        assert_eq!(bench.run("steer", &plain).0, NEXT);
        assert_eq!(bench.fail_opens(), ["no_listener"]);
    });
}

#[test]
fn the_bytes_of_a_syn_ack() {
    while_listening(|bench| {
        let mut port = CLIENT_PORT;
        for options in [LINUX, &[2, 4, 5, 0xb4], &[2, 4, 5, 0xb4, 1, 1, 4, 2], &[2, 4, 5, 0xb4, 1, 3, 3, 7]] {
            let syn = tcp(80, flags::SYN | flags::ECE | flags::CWR, options, b"");
            for (ip, frame) in [(20, v4(&ipv4(5, 0, 6), &syn)), (40, v6(6, &[], &syn))] {
                port += 1;
                let frame = from_port(frame, ip, port);
                let (again_before, inserted_before) =
                    (bench.event(event::SynAgain), bench.event(event::Inserted));
                bench.maps.beat(true).expect("HEARTBEAT");
                let (verdict, reply) = bench.run("steer", &frame);
                assert_eq!(verdict, REDIRECT, "{options:?}: {:?}", bench.fail_opens());
                let tcp = 14 + ip;
                assert_eq!(reply[..6], frame[6..12], "to whom it came from");
                assert_eq!(reply[12..14], frame[12..14]);
                let (source, sent) = if ip == 20 { (26..30, 30..34) } else { (22..38, 38..54) };
                assert_eq!(reply[source.clone()], frame[sent.clone()]);
                assert_eq!(reply[sent], frame[source]);
                assert_eq!(
                    reply[tcp..tcp + 4],
                    [&80_u16.to_be_bytes()[..], &port.to_be_bytes()].concat(),
                    "the ports"
                );
                assert_eq!(
                    reply[tcp + 8..tcp + 12],
                    0x0102_0305_u32.to_be_bytes(),
                    "the client's number and 1"
                );
                assert_eq!(reply[tcp + 13], flags::SYN | flags::ACK | flags::ECE);
                assert_eq!(reply[tcp + 14..tcp + 16], 64_240_u16.to_be_bytes(), "the window");
                let length = usize::from(reply[tcp + 12] >> 4) * 4;
                assert_eq!(reply.len(), tcp + length, "no more and no less");
                let (asked, got) = (read_options(options), read_options(&reply[tcp + 20..]));
                assert_eq!((got.present, got.odd), (asked.present, 0), "{options:?}");
                assert_eq!(got.mss, if ip == 20 { 1460 } else { 1440 });
                assert_eq!(got.ts_echo, asked.ts_value);
                assert_eq!(checksum(&reply, ip), 0, "{options:?}: the checksum is right");
                if ip == 20 {
                    assert_eq!(folded(&reply[14..34], 0), 0xffff, "the header's too");
                    assert_eq!(reply[16..18], u16::try_from(reply.len() - 14).expect("short").to_be_bytes());
                }
                // The same SYN again: the same number.
                let (_, again) = bench.run("steer", &frame);
                assert_eq!(again[tcp + 4..tcp + 8], reply[tcp + 4..tcp + 8]);
                assert_eq!(bench.event(event::SynAgain) - again_before, 1);
                assert_eq!(bench.event(event::Inserted) - inserted_before, 1);
            }
        }
    });
}

/// A late packet of an earlier connection between the same ends must not hide the new one's.
#[test]
fn a_connection_that_waited_for_nothing_waits() {
    while_listening(|bench| {
        for (name, ip, framed) in [
            ("IPv4", 20, (|tcp| v4(&ipv4(5, 0, 6), tcp)) as fn(&[u8]) -> Vec<u8>),
            ("IPv6", 40, |tcp| v6(6, &[], tcp)),
        ] {
            let ack = framed(&tcp(80, flags::ACK, &[], b"GET / HT"));
            for _ in 0..2 {
                assert_eq!(bench.run("steer", &ack).0, NEXT, "{name}: nobody knows of it");
            }
            let (verdict, reply) = bench.run("steer", &framed(&tcp(80, flags::SYN, LINUX, b"")));
            assert_eq!(verdict, REDIRECT, "{name}: {:?}", bench.fail_opens());
            let number = 14 + ip + 4;
            let number = u32::from_be_bytes(reply[number..number + 4].try_into().expect("four bytes"));
            let mut ack = tcp(80, flags::ACK, &[], b"");
            ack[4..8].copy_from_slice(&0x0102_0305_u32.to_be_bytes());
            ack[8..12].copy_from_slice(&number.wrapping_add(1).to_be_bytes());
            assert_eq!(bench.run("steer", &framed(&ack)).0, SHOT, "{name}: it waits");
            assert_eq!(bench.run("steer", &framed(&ack)).0, SHOT, "{name}: and goes on waiting");
        }
    });
}

/// Under pressure a connection whose entry was evicted proves itself by its cookie. What the proxy has no room for must be
/// known when it comes again, and what it takes must not.
#[test]
fn who_was_evicted_is_known_by_the_cookie() {
    in_own_netns(|| {
        let listener =
            socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("socket");
        let address = std::net::SocketAddr::from((Ipv4Addr::LOCALHOST, 80));
        listener.bind(&address.into()).expect("the namespace is ours");
        listener.listen(0).expect("listen");
        let mut bench = Bench::new(80, deferring());
        let syn = v4(&ipv4(5, 0, 6), &tcp(80, flags::SYN, LINUX, b""));
        let (verdict, reply) = bench.run("steer", &syn);
        assert_eq!(verdict, REDIRECT, "{:?}", bench.fail_opens());
        let number = u32::from_be_bytes(reply[38..42].try_into().expect("four bytes"));
        let pressed = Config { cookie_budget: 100, ..deferring() };
        let pressed = Config { flags: pressed.flags | config_flags::PRESSURE, ..pressed };
        bench.maps.set_config(pressed).expect("CONFIG");
        let segment = |acknowledged: u32, data: &[u8]| {
            let mut segment = tcp(80, flags::ACK, &[1, 1, 8, 10, 0, 0, 1, 3, 0, 0, 0, 1], data);
            segment[4..8].copy_from_slice(&0x0102_0305_u32.to_be_bytes());
            segment[8..12].copy_from_slice(&acknowledged.to_be_bytes());
            v4(&ipv4(5, 0, 6), &segment)
        };
        let right = number.wrapping_add(1);
        let mut step = |name: &str, segment: &[u8], want: (i32, u64, u64, usize)| {
            bench.forget_all();
            let before = (bench.event(event::CookieGood), bench.event(event::CookieBad));
            let verdict = bench.run("steer", segment).0;
            let good = bench.event(event::CookieGood) - before.0;
            let bad = bench.event(event::CookieBad) - before.1;
            assert_eq!((verdict, good, bad, bench.waiting()), want, "{name}");
        };
        step("it waits on", &segment(right, b""), (SHOT, 1, 0, 1));
        step("another number", &segment(right ^ 0x100, b""), (NEXT, 0, 1, 0));
        step("the proxy has room", &segment(right, b"GET / HT"), (NEXT, 1, 0, 0));
        let _fills = TcpStream::connect(address).expect("the queue takes one");
        step("the proxy has none", &segment(right, b"GET / HT"), (SHOT, 1, 0, 1));
    });
}

/// Runs `body` in a namespace where somebody listens, on both families.
fn while_listening(body: impl FnOnce(&mut Bench) + Send) {
    in_own_netns(|| {
        let _v4 = TcpListener::bind("127.0.0.1:80").expect("the namespace is ours");
        let _v6 = TcpListener::bind("[::1]:80").expect("the namespace is ours");
        body(&mut Bench::new(80, deferring()));
    });
}

fn in_own_netns(body: impl FnOnce() + Send) {
    if have_root() {
        let scratch = Scratch::new("frames");
        let netns = super::netns::Netns::open(&scratch.path()).expect("just made");
        netns.enter(body).expect("entered");
    }
}

fn v4(ip: &[u8], tcp: &[u8]) -> Vec<u8> {
    let mut ip = ip.to_vec();
    let total = u16::try_from(ip.len() + tcp.len()).expect("a short packet");
    ip[2..4].copy_from_slice(&total.to_be_bytes());
    let mut frame = [&[0; 12][..], &[8, 0], &ip, tcp].concat();
    let at = 14 + ip.len();
    set_checksum(&mut frame, ip.len(), at);
    frame
}

fn v6(next: u8, extension: &[u8], tcp: &[u8]) -> Vec<u8> {
    let length = u16::try_from(extension.len() + tcp.len()).expect("a short packet").to_be_bytes();
    let loopback = std::net::Ipv6Addr::LOCALHOST.octets();
    let header = [&[0x60, 0, 0, 0, length[0], length[1], next, 64][..], &loopback, &loopback].concat();
    let mut frame = [&[0; 12][..], &[0x86, 0xdd], &header, extension, tcp].concat();
    set_checksum(&mut frame, 40, 54 + extension.len());
    frame
}

/// From another port.
fn from_port(mut frame: Vec<u8>, ip: usize, port: u16) -> Vec<u8> {
    let tcp = 14 + ip;
    frame[tcp..tcp + 2].copy_from_slice(&port.to_be_bytes());
    frame[tcp + 16..tcp + 18].fill(0);
    set_checksum(&mut frame, ip, tcp);
    frame
}

/// With IPv4 addresses in the guise of IPv6.
fn mapped(mut frame: Vec<u8>) -> Vec<u8> {
    frame[22..38].copy_from_slice(&Ipv4Addr::LOCALHOST.to_ipv6_mapped().octets());
    frame
}

fn ipv4(header_words: u8, flags_and_offset: u16, protocol: u8) -> Vec<u8> {
    let mut header = vec![1; usize::from(header_words) * 4];
    header[..12].copy_from_slice(&[0x40 | header_words, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0]);
    header[6..8].copy_from_slice(&flags_and_offset.to_be_bytes());
    if header.len() >= 20 {
        header[12..20].copy_from_slice(&[127, 0, 0, 1, 127, 0, 0, 1]);
    }
    header
}

fn tcp(port: u16, flags: u8, options: &[u8], data: &[u8]) -> Vec<u8> {
    let mut header = vec![0; 20];
    header[..2].copy_from_slice(&CLIENT_PORT.to_be_bytes());
    header[2..4].copy_from_slice(&port.to_be_bytes());
    header[4..8].copy_from_slice(&[1, 2, 3, 4]);
    header[12] = u8::try_from(5 + options.len() / 4).expect("options fit") << 4;
    header[13] = flags;
    [&header, options, data].concat()
}

fn with_offset(mut segment: Vec<u8>, words: u8) -> Vec<u8> {
    segment[12] = words << 4;
    segment
}

fn set_checksum(frame: &mut [u8], ip: usize, tcp: usize) {
    if frame.len() >= tcp + 18 {
        let sum = checksum_from(frame, ip, tcp);
        frame[tcp + 16..tcp + 18].copy_from_slice(&sum.to_be_bytes());
    }
}

/// 0 where the checksum of the segment is right.
fn checksum(frame: &[u8], ip: usize) -> u16 {
    checksum_from(frame, ip, 14 + ip)
}

fn checksum_from(frame: &[u8], ip: usize, tcp: usize) -> u16 {
    let addresses = if ip == 40 { &frame[22..54] } else { &frame[26..34] };
    let pseudo = u32::from(folded(addresses, 0)) + 6 + (frame.len() - tcp) as u32;
    !folded(&frame[tcp..], pseudo)
}

fn folded(bytes: &[u8], start: u32) -> u16 {
    let words =
        bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)));
    let mut sum = words.sum::<u32>() + start;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}
