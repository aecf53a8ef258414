//! The kernel's own answers, frame by frame: their very bytes, and what becomes of the connection.

use preflightd_common::{
    abi::{Answered, ask, config_flags, outcome},
    tcp::after,
};

use super::*;
use crate::{
    http::date::imf_fixdate,
    policy::{
        KernelTable, Table,
        kernel::{
            Tier,
            samples::{self, LISTENER, Numbers},
            tests::by_worker,
        },
    },
};

const GENERATION: u32 = 1;
const SECOND: u32 = 1_700_000_000;
const LIMIT: usize = 16_384;
const PREFLIGHT: &str = "OPTIONS /v1/items/42 HTTP/1.1\r\nHost: api.example\r\nOrigin: https://app.example\r\n\
    Access-Control-Request-Method: PUT\r\nAccess-Control-Request-Headers: content-type,x-a\r\n\r\n";
const STAMPS: &[u8] = &[1, 1, 8, 10, 0, 0, 2, 0, 0, 0, 0, 7];

fn answering() -> Config {
    let config = deferring();
    Config {
        flags: config.flags | config_flags::ANSWERS,
        generation: GENERATION,
        second: SECOND,
        max_head: LIMIT as u32,
        ..config
    }
}

/// The answer of the table of everything to a request, at a second.
fn answer(table: &KernelTable, request: &[u8], second: u32) -> Vec<u8> {
    let Tier::Kernel(number) = table.tier(LISTENER, request, LIMIT) else { panic!("not the kernel's") };
    let text = std::str::from_utf8(request).expect("ASCII");
    let origin =
        text.split("\r\nOrigin: ").nth(1).and_then(|rest| rest.split('\r').next()).expect("it has one");
    table.templates[number as usize].with(&imf_fixdate(u64::from(second)), origin.as_bytes())
}

fn publish(bench: &mut Bench, generation: u32, table: &KernelTable) {
    bench.maps.add_templates(generation, &table.templates).expect("TEMPLATES");
    bench.maps.add_terms(generation, &table.terms).expect("TERMS");
}

/// Where somebody listens on both families, with the table of everything.
fn while_answering(body: impl FnOnce(&mut Bench, &Table, &KernelTable) + Send) {
    while_listening(|bench| {
        let table = samples::table(&[]);
        let kernel = table.for_kernel(&[LISTENER]);
        publish(bench, GENERATION, &kernel);
        for second in SECOND..SECOND + 3 {
            bench.maps.set_date(second).expect("DATES");
        }
        bench.maps.set_config(answering()).expect("CONFIG");
        body(bench, &table, &kernel);
    });
}

/// A client's side of a connection.
struct Client {
    v6: bool,
    port: u16,
    options: &'static [u8],
    /// It has agreed upon window scales.
    scales: bool,
    /// What is sent next, and what is expected next.
    seq: u32,
    ack: u32,
}

/// A reply.
#[derive(Debug, PartialEq, Eq)]
struct Reply {
    flags: u8,
    seq: u32,
    ack: u32,
    data: Vec<u8>,
}

impl Client {
    /// Its handshake, by the program.
    fn connect(bench: &mut Bench, v6: bool, port: u16, options: &'static [u8]) -> Self {
        let scales = !options.is_empty();
        let mut client = Self { v6, port, options: &[], scales, seq: 0x0102_0304, ack: 0 };
        bench.maps.beat(true).expect("HEARTBEAT");
        let syn = client.frame(flags::SYN, if options.is_empty() { &[2, 4, 5, 0xb4] } else { LINUX }, b"");
        let (verdict, reply) = bench.run("steer", &syn);
        assert_eq!(verdict, REDIRECT, "{:?}", bench.fail_opens());
        client.options = options;
        client.ack = client.read(&reply).seq.wrapping_add(1);
        client.seq += 1;
        assert_eq!(client.say(bench, flags::ACK, b"").0, SHOT, "its acknowledgement is dropped");
        client
    }

    fn frame(&self, flags: u8, options: &[u8], data: &[u8]) -> Vec<u8> {
        let mut segment = tcp(80, flags, options, data);
        segment[..2].copy_from_slice(&self.port.to_be_bytes());
        segment[4..8].copy_from_slice(&self.seq.to_be_bytes());
        segment[8..12].copy_from_slice(&self.ack.to_be_bytes());
        segment[14..16].copy_from_slice(&60_000_u16.to_be_bytes());
        if self.v6 { v6(6, &[], &segment) } else { v4(&ipv4(5, 0, 6), &segment) }
    }

    /// Says something that is neither known nor followed up.
    fn say(&self, bench: &mut Bench, flags: u8, data: &[u8]) -> (i32, Vec<u8>) {
        bench.maps.beat(true).expect("HEARTBEAT");
        bench.run("steer", &self.frame(flags, self.options, data))
    }

    /// The same, where a reply is expected.
    fn ask(&self, bench: &mut Bench, flags: u8, data: &[u8]) -> Reply {
        let (verdict, reply) = self.say(bench, flags, data);
        assert_eq!(verdict, REDIRECT, "nothing was replied: {:?}", bench.asked());
        self.read(&reply)
    }

    /// A reply whose headers and checksums are right.
    fn read(&self, frame: &[u8]) -> Reply {
        let ip = if self.v6 { 40 } else { 20 };
        let tcp = 14 + ip;
        assert_eq!(checksum(frame, ip), 0, "the checksum is right");
        if self.v6 {
            assert_eq!(usize::from(u16::from_be_bytes([frame[18], frame[19]])), frame.len() - 54);
        } else {
            assert_eq!(folded(&frame[14..34], 0), 0xffff, "the header's too");
            assert_eq!(usize::from(u16::from_be_bytes([frame[16], frame[17]])), frame.len() - 14);
        }
        assert_eq!(frame[tcp..tcp + 4], [80_u16.to_be_bytes(), self.port.to_be_bytes()].concat());
        let header = usize::from(frame[tcp + 12] >> 4) * 4;
        let has_stamps = read_options(&frame[tcp + 20..tcp + header]).present;
        let reset = frame[tcp + 13] & flags::RST != 0;
        if frame[tcp + 13] & flags::SYN == 0 && !reset {
            assert_eq!(has_stamps, read_options(self.options).present);
            // Who has agreed upon no scale reads it as it is.
            let window = u16::from_be_bytes([frame[tcp + 14], frame[tcp + 15]]);
            assert_eq!(window, if self.scales { 64_240 >> 7 } else { 64_240 });
        }
        let number = |at: usize| u32::from_be_bytes(frame[at..at + 4].try_into().expect("four bytes"));
        Reply {
            flags: frame[tcp + 13],
            seq: number(tcp + 4),
            ack: number(tcp + 8),
            data: frame[tcp + header..].to_vec(),
        }
    }

    fn flow(&self) -> Flow {
        let address =
            words(if self.v6 { std::net::Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() });
        Flow { client: address, server: address, client_port: self.port.to_be(), server_port: 80_u16.to_be() }
    }

    fn entry(&self, bench: &mut Bench) -> Option<Answered> {
        bench.answered().get(&self.flow(), 0).ok()
    }
}

impl Bench {
    fn answered(&mut self) -> aya::maps::HashMap<&mut MapData, Flow, Answered> {
        let map = self.ebpf.map_mut("ANSWERED").expect("the programs' own");
        aya::maps::HashMap::try_from(map).expect("a hash map")
    }

    fn asked(&self) -> Vec<(&'static str, u64)> {
        let counts = self.maps.counts(1).expect("readable").asked;
        ask::NAMES.iter().copied().zip(counts).filter(|(_, count)| *count > 0).collect()
    }
}

const PUSH: u8 = flags::ACK | flags::PSH;

#[test]
fn answers_one_after_the_other_and_then_the_proxy() {
    while_answering(|bench, _, kernel| {
        let other = PREFLIGHT
            .replace("https://app.example", "https://pr-123.preview.example")
            .replace("PUT", "DELETE");
        let denied = PREFLIGHT.replace("https://app.example", "https://evil.example");
        for (port, v6, options) in
            [(50_001, false, STAMPS), (50_002, true, STAMPS), (50_003, false, &[]), (50_004, true, &[])]
        {
            let mut client = Client::connect(bench, v6, port, options);
            for request in [PREFLIGHT, &other, &denied, PREFLIGHT] {
                let reply = client.ask(bench, PUSH, request.as_bytes());
                client.seq += request.len() as u32;
                let want = answer(kernel, request.as_bytes(), SECOND);
                assert_eq!(reply, Reply { flags: PUSH, seq: client.ack, ack: client.seq, data: want });
                client.ack += reply.data.len() as u32;
                assert_eq!(client.say(bench, flags::ACK, b"").0, SHOT, "its acknowledgement is dropped");
            }
            // Here the kernel takes no connection over, for the frame is on no interface: see the tests with real clients.
            let (verdict, frame) = client.say(bench, PUSH, b"GET / HTTP/1.1\r\n");
            assert_eq!((verdict, &*frame), (NEXT, &*client.frame(PUSH, options, b"GET / HTTP/1.1\r\n")));
            assert_eq!(client.entry(bench), None);
        }
        assert_eq!(bench.event(event::KernelAnswer), 16);
        assert_eq!(bench.waiting(), 0, "none is left among those that wait");
        let outcomes = bench.maps.outcomes(64).expect("OUTCOMES");
        let sum = |slot: u32| outcomes.iter().map(|row| row[slot as usize]).sum::<u64>();
        assert_eq!([sum(outcome::Allowed), sum(outcome::DeniedOrigin)], [12, 4]);
    });
}

#[test]
fn the_last_answer_has_our_end() {
    while_answering(|bench, _, kernel| {
        let request = PREFLIGHT.replacen("\r\n", "\r\nConnection: close\r\n", 1);
        let mut client = Client::connect(bench, false, 50_001, STAMPS);
        let reply = client.ask(bench, PUSH, request.as_bytes());
        let data = answer(kernel, request.as_bytes(), SECOND);
        assert!(String::from_utf8_lossy(&data).contains("\r\nConnection: close\r\n"));
        client.seq += request.len() as u32;
        assert_eq!(reply, Reply { flags: PUSH | flags::FIN, seq: client.ack, ack: client.seq, data });
        // All but our end: that again.
        client.ack += reply.data.len() as u32;
        let end = Reply { flags: flags::ACK | flags::FIN, seq: client.ack, ack: client.seq, data: vec![] };
        assert_eq!(client.ask(bench, flags::ACK, b""), end);
        client.ack -= reply.data.len() as u32;
        // Lost: the request again, the same again.
        client.seq -= request.len() as u32;
        assert_eq!(client.ask(bench, PUSH, request.as_bytes()), reply);
        client.seq += request.len() as u32;
        client.ack += reply.data.len() as u32 + 1;
        assert_eq!(client.say(bench, flags::ACK, b"").0, SHOT);
        let last = client.ask(bench, flags::ACK | flags::FIN, b"");
        let want = Reply { flags: flags::ACK, seq: client.ack, ack: client.seq + 1, data: vec![] };
        assert_eq!(last, want);
        assert_eq!(client.entry(bench), None);
        // Somebody who goes on all the same is told.
        let mut client = Client::connect(bench, false, 50_002, STAMPS);
        let reply = client.ask(bench, PUSH, request.as_bytes());
        client.seq += request.len() as u32;
        client.ack += reply.data.len() as u32 + 1;
        let reset = client.ask(bench, PUSH, PREFLIGHT.as_bytes());
        assert_eq!((reset.flags, reset.seq), (flags::RST, client.ack));
        assert_eq!(client.entry(bench), None);
    });
}

/// Name, the request that comes again, what has happened meanwhile.
type Gone<'a> = (&'a str, &'a str, fn(&mut Bench));

#[test]
fn an_answer_that_was_lost_is_sent_again_in_the_same_bytes_or_not_at_all() {
    while_answering(|bench, _, kernel| {
        let other = samples::table(&[]).for_kernel(&[]);
        let mut port = 50_000;
        let mut lost = |bench: &mut Bench| {
            port += 1;
            bench.maps.set_config(answering()).expect("CONFIG");
            let client = Client::connect(bench, false, port, STAMPS);
            let reply = client.ask(bench, PUSH, PREFLIGHT.as_bytes());
            assert_eq!(reply.data, answer(kernel, PREFLIGHT.as_bytes(), SECOND));
            (client, reply)
        };
        // A second later, and when policies have been replaced, and the daemon is gone.
        let (client, reply) = lost(bench);
        bench.maps.set_config(Config { second: SECOND + 1, ..answering() }).expect("CONFIG");
        assert_eq!(client.ask(bench, PUSH, PREFLIGHT.as_bytes()), reply, "a second later");
        publish(bench, 2, &other);
        bench.maps.set_config(Config { generation: 2, ..answering() }).expect("CONFIG");
        assert_eq!(client.ask(bench, PUSH, PREFLIGHT.as_bytes()), reply, "after a change of policy");
        let old = bench.maps.terms_but(2).expect("TERMS");
        bench.maps.remove_terms(&old).expect("TERMS");
        bench.maps.keep_templates([2, GENERATION]).expect("TEMPLATES");
        assert_eq!(client.ask(bench, PUSH, PREFLIGHT.as_bytes()), reply, "after the old terms were cleared");
        bench.maps.set_config(Config { state: state::OFF, ..answering() }).expect("CONFIG");
        assert_eq!(
            client.ask(bench, PUSH, PREFLIGHT.as_bytes()),
            reply,
            "when nothing shall be answered any more"
        );
        publish(bench, GENERATION, kernel);
        // With more behind it, of the next request.
        let (client, reply) = lost(bench);
        let both = [PREFLIGHT.as_bytes(), b"GET / HTTP/1.1\r\n"].concat();
        assert_eq!(client.ask(bench, PUSH, &both), reply);
        // What the client then knows is not said again.
        let mut knows = client;
        knows.ack += reply.data.len() as u32;
        let again = knows.ask(bench, PUSH, PREFLIGHT.as_bytes());
        assert_eq!((again.flags, again.seq, &*again.data), (flags::ACK, knows.ack, &b""[..]));
        assert_eq!(again.ack, knows.seq + PREFLIGHT.len() as u32);

        let gone: [Gone<'_>; 4] = [
            ("another origin", &PREFLIGHT.replace("app.example", "evil.example"), |_| {}),
            ("templates gone", PREFLIGHT, |bench| bench.maps.keep_templates([7, 7]).expect("TEMPLATES")),
            ("the date gone", PREFLIGHT, |bench| bench.maps.set_date(SECOND + 64).expect("DATES")),
            ("the date about to go", PREFLIGHT, |bench| {
                let config = Config { second: SECOND + 61, ..answering() };
                bench.maps.set_config(config).expect("CONFIG");
            }),
        ];
        for (name, request, undo) in gone {
            let (client, reply) = lost(bench);
            undo(bench);
            let reset = client.ask(bench, PUSH, request.as_bytes());
            assert_eq!((reset.flags, reset.seq, &*reset.data), (flags::RST, reply.seq, &b""[..]), "{name}");
            assert_eq!(client.entry(bench), None, "{name}");
            publish(bench, GENERATION, kernel);
            bench.maps.set_date(SECOND).expect("DATES");
        }
    });
}

#[test]
fn what_else_may_come_on_such_a_connection() {
    while_answering(|bench, _, _| {
        let mut port = 50_000;
        let mut open = |bench: &mut Bench, acknowledged: bool| {
            port += 1;
            let mut client = Client::connect(bench, port % 2 == 0, port, STAMPS);
            let reply = client.ask(bench, PUSH, PREFLIGHT.as_bytes());
            client.seq += PREFLIGHT.len() as u32;
            if acknowledged {
                client.ack += reply.data.len() as u32;
                assert_eq!(client.say(bench, flags::ACK, b"").0, SHOT);
            }
            client
        };
        let pure = |client: &Client, reply: &Reply| {
            assert_eq!((reply.flags, reply.seq, &*reply.data), (flags::ACK, client.ack, &b""[..]));
            reply.ack
        };
        // TCP keepalives, without and with a byte.
        let mut client = open(bench, true);
        client.seq -= 1;
        for byte in [&b""[..], b"x"] {
            let reply = client.ask(bench, flags::ACK, byte);
            assert_eq!(pure(&client, &reply), client.seq + 1);
        }
        // One for a connection whose answer may be lost must not acknowledge the request.
        let mut client = open(bench, false);
        client.seq -= 1;
        let reply = client.ask(bench, flags::ACK, b"");
        assert_eq!(pure(&client, &reply), client.seq + 1 - PREFLIGHT.len() as u32);
        // Nor may anything that follows the request.
        let client = open(bench, false);
        for (flags, data) in [(PUSH, &b"GET / HT"[..]), (flags::ACK | flags::FIN, b""), (flags::ACK, b"")] {
            assert_eq!(client.say(bench, flags, data).0, SHOT, "{flags:#x}");
        }
        assert_eq!(client.entry(bench).map(|entry| entry.acknowledged), Some(0));
        // What comes too early comes again.
        let mut client = open(bench, true);
        client.seq += 8;
        assert_eq!(client.say(bench, PUSH, b"GET / HT").0, SHOT);
        client.seq -= 8;
        // Numbers of nobody.
        client.ack += 1;
        let reply = client.ask(bench, PUSH, b"GET / HT");
        assert_eq!((reply.flags, reply.seq, reply.ack), (flags::ACK, client.ack - 1, client.seq));
        client.ack -= 1;
        assert_eq!(client.say(bench, PUSH, b"GET / HT").0, NEXT, "and the proxy has it");

        // The client ends: our end, again if that was lost, and nothing more.
        let mut client = open(bench, true);
        let reply = client.ask(bench, flags::ACK | flags::FIN, b"");
        let end =
            Reply { flags: flags::ACK | flags::FIN, seq: client.ack, ack: client.seq + 1, data: vec![] };
        assert_eq!(reply, end);
        assert_eq!(client.ask(bench, flags::ACK | flags::FIN, b""), end);
        client.seq += 1;
        client.ack += 1;
        assert_eq!(client.say(bench, flags::ACK, b"").0, SHOT);
        assert_eq!(client.entry(bench), None);

        // Half of an answer: the rest cannot be asked for, so the client is told.
        let mut client = open(bench, false);
        client.ack += 10;
        client.seq += 1;
        let reply = client.ask(bench, flags::ACK, b"");
        assert_eq!(
            (reply.flags, reply.seq),
            (flags::ACK, client.ack - 10),
            "who guesses numbers resets nobody"
        );
        client.seq -= 1;
        let reset = client.ask(bench, flags::ACK, b"");
        assert_eq!((reset.flags, reset.seq), (flags::RST, client.ack));
        assert_eq!(client.entry(bench), None);

        // Resets: only of the right number.
        let mut client = open(bench, true);
        client.options = &[];
        client.seq += 1;
        let reply = client.ask(bench, flags::RST, b"");
        assert_eq!((reply.flags, reply.ack), (flags::ACK, client.seq - 1));
        client.seq -= 1;
        assert_eq!(client.say(bench, flags::RST, b"").0, SHOT);
        assert_eq!(client.entry(bench), None);

        // A SYN: who is there says so.
        let mut client = open(bench, true);
        let next = client.seq;
        client.seq = 0x5000_0000;
        let syn = client.frame(flags::SYN, LINUX, b"");
        let (verdict, frame) = bench.run("steer", &syn);
        client.options = &[];
        let reply = client.read(&frame);
        assert_eq!((verdict, reply.flags, reply.seq, reply.ack), (REDIRECT, flags::ACK, client.ack, next));
        // One for a connection that has ended begins a new one.
        client.options = STAMPS;
        client.seq = next;
        assert!(client.ask(bench, flags::ACK | flags::FIN, b"").flags & flags::FIN != 0);
        client.seq = next + 0x1000;
        assert!(after(client.seq, next));
        let (verdict, frame) = bench.run("steer", &client.frame(flags::SYN, LINUX, b""));
        client.options = &[];
        assert_eq!((verdict, client.read(&frame).flags), (REDIRECT, flags::ACK | flags::SYN));
        assert_eq!(client.entry(bench), None);
    });
}

#[test]
fn when_nothing_is_certain_the_proxy_has_it() {
    while_answering(|bench, _, _| {
        let empty = KernelTable::default();
        publish(bench, 2, &empty);
        let mut port = 50_000;
        let changes: [(&str, Config, bool, Option<&str>); 8] = [
            ("answers are off", Config { flags: deferring().flags, ..answering() }, true, Some("off")),
            ("no table", Config { generation: 0, ..answering() }, true, Some("off")),
            ("the policy is gone", Config { generation: 2, ..answering() }, true, Some("unknown_host")),
            ("half of another table", Config { generation: 3, ..answering() }, true, Some("unknown_host")),
            ("nothing new", Config { state: state::OBSERVE, ..answering() }, true, None),
            ("a date that is not there", Config { second: SECOND + 9, ..answering() }, true, Some("room")),
            ("a longer head than allowed", Config { max_head: 100, ..answering() }, true, Some("segment")),
            ("the daemon is gone", answering(), false, None),
        ];
        for (name, config, alive, why) in changes {
            for first in [true, false] {
                port += 1;
                bench.maps.set_config(answering()).expect("CONFIG");
                let mut client = Client::connect(bench, false, port, STAMPS);
                if !first {
                    let reply = client.ask(bench, PUSH, PREFLIGHT.as_bytes());
                    client.seq += PREFLIGHT.len() as u32;
                    client.ack += reply.data.len() as u32;
                }
                let before = bench.asked();
                bench.maps.set_config(config).expect("CONFIG");
                bench.maps.beat(alive).expect("HEARTBEAT");
                let frame = client.frame(PUSH, STAMPS, PREFLIGHT.as_bytes());
                let (verdict, after) = bench.run("steer", &frame);
                assert_eq!((verdict, after), (NEXT, frame), "{name}, first: {first}: untouched, the proxy's");
                let asked: Vec<_> =
                    bench.asked().into_iter().filter(|count| !before.contains(count)).collect();
                assert_eq!(asked.first().map(|(name, _)| *name), why, "{name}");
            }
        }
        // What the client has no room for.
        bench.maps.set_config(answering()).expect("CONFIG");
        let client = Client::connect(bench, false, 51_000, STAMPS);
        bench.maps.beat(true).expect("HEARTBEAT");
        let mut frame = client.frame(PUSH, STAMPS, PREFLIGHT.as_bytes());
        frame[48..50].copy_from_slice(&[0, 0]);
        set_checksum(&mut frame, 20, 34);
        frame[50..52].fill(0);
        set_checksum(&mut frame, 20, 34);
        assert_eq!(bench.run("steer", &frame).0, NEXT, "its window is shut");
        assert!(bench.asked().iter().any(|(name, _)| *name == "room"), "{:?}", bench.asked());
    });
}

/// Whatever comes: what the kernel answers, a worker answers in the same bytes, and all else goes on untouched.
#[test]
fn no_mutation_of_a_preflight_gets_a_wrong_answer() {
    while_answering(|bench, table, kernel| {
        let rounds = if std::env::var_os("PREFLIGHTD_FULL").is_some() { 1_000_000 } else { 20_000 };
        let mut numbers = Numbers(2);
        let client = Client::connect(bench, false, 50_001, &[]);
        // Answered once, so that there is an entry; each round sets it back.
        let first = client.ask(bench, PUSH, PREFLIGHT.as_bytes());
        let mut entry = client.entry(bench).expect("it was answered");
        let client = Client {
            seq: client.seq + PREFLIGHT.len() as u32,
            ack: client.ack + first.data.len() as u32,
            ..client
        };
        entry.acknowledged = 1;
        let date = imf_fixdate(u64::from(SECOND));
        let (mut answered, mut others) = (0, 0);
        for round in 0..rounds {
            let mut bytes =
                if round % 3 == 0 { PREFLIGHT.as_bytes().to_vec() } else { samples::request(&mut numbers) };
            samples::mutate(&mut bytes, &mut numbers);
            bytes.truncate(1400);
            if bytes.is_empty() {
                continue;
            }
            if round % 512 == 0 {
                bench.maps.beat(true).expect("HEARTBEAT");
            }
            bench.answered().insert(client.flow(), entry, 0).expect("ANSWERED");
            let frame = client.frame(PUSH, &[], &bytes);
            let (verdict, after) = bench.run("steer", &frame);
            if verdict == REDIRECT {
                answered += 1;
                let reply = client.read(&after);
                let (mut want, _) = by_worker(table, &bytes).expect("a worker answers it too");
                let at = want
                    .windows(6)
                    .position(|part| part.eq_ignore_ascii_case(b"date: "))
                    .expect("it has one")
                    + 6;
                want[at..at + 29].copy_from_slice(&date);
                assert_eq!(
                    reply.data.escape_ascii().to_string(),
                    want.escape_ascii().to_string(),
                    "{}",
                    bytes.escape_ascii()
                );
                assert_eq!((reply.seq, reply.ack), (client.ack, client.seq + bytes.len() as u32));
                let ends = reply.flags & flags::FIN != 0;
                assert_eq!(
                    ends,
                    want.windows(17).any(|part| part.eq_ignore_ascii_case(b"connection: close"))
                );
            } else {
                others += 1;
                assert_eq!(
                    (verdict, after),
                    (NEXT, frame),
                    "untouched, the proxy's: {}",
                    bytes.escape_ascii()
                );
                let tier = kernel.tier(LISTENER, &bytes, LIMIT);
                assert!(!matches!(tier, Tier::Kernel(_)), "the model answers: {}", bytes.escape_ascii());
            }
        }
        assert!(answered > rounds / 10 && others > rounds / 10, "{answered} of {rounds}");
    });
}
