//! The kernel's counter against real TCP over a veth: every packet to a served port, exactly, and no other.
#![forbid(unsafe_code)]

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use preflightd::steer::{Counter, Hook};
use preflightd_tests::netns::{Netns, have_root};

const SERVED: u16 = 8080;
const OTHER: u16 = 8081;
/// Served, but nobody connects to it.
const IDLE: u16 = 8082;

const SERVER: [&str; 2] = ["10.77.0.1", "fd00:77::1"];
const REQUEST: &[u8] = b"OPTIONS / HTTP/1.1\r\n\r\n";

#[test]
fn counts_exactly_the_packets_to_served_ports_by_tcx() {
    counts_exactly_the_packets_to_served_ports(Hook::Tcx);
}

#[test]
fn counts_exactly_the_packets_to_served_ports_by_clsact() {
    counts_exactly_the_packets_to_served_ports(Hook::Clsact);
}

fn counts_exactly_the_packets_to_served_ports(hook: Hook) {
    if !have_root() {
        return;
    }
    let server = Netns::new("server");
    let client = Netns::new("client");
    server.link(
        "in0",
        &["10.77.0.1/24", "fd00:77::1/64"],
        &client,
        "out0",
        &["10.77.0.2/24", "fd00:77::2/64"],
    );
    // The client's own count of what it sends is what the kernel's counter must come to.
    nft(&client, "add table inet truth");
    nft(&client, "add chain inet truth out { type filter hook output priority 0; }");
    for port in [SERVED, OTHER] {
        nft(&client, &format!("add counter inet truth port{port}"));
        nft(&client, &format!("add rule inet truth out tcp dport {port} counter name port{port}"));
    }

    server.enter(|| {
        let counter = Counter::attach("in0", &[SERVED, IDLE], hook).expect("the counter attaches");
        let mut sent_before = 0;
        for address in SERVER {
            for port in [SERVED, OTHER] {
                let address = SocketAddr::new(address.parse().expect("an address"), port);
                let listener = TcpListener::bind(address).expect("the server listens");
                let echo = thread::spawn(move || echo_once(&listener));
                client.enter(|| exchange(address));
                echo.join().expect("the server serves");
            }
            let sent = settled(|| sent(&client, SERVED), || packets(&counter, SERVED));
            assert_eq!(
                packets(&counter, SERVED),
                sent,
                "{hook:?}: the packets that the client sent to {address}"
            );
            // At least SYN, ACK, request, FIN.
            assert!(sent >= sent_before + 4, "{hook:?}: {address} had only {} packets", sent - sent_before);
            sent_before = sent;
        }
        let other = settled(|| sent(&client, OTHER), || counter.uncounted().expect("readable").other_port);
        let uncounted = counter.uncounted().expect("readable");
        assert_eq!(uncounted.other_port, other, "{hook:?}: packets to the other port");
        assert_eq!((uncounted.fragment, uncounted.malformed), (0, 0), "{hook:?}");
        assert_eq!(packets(&counter, OTHER), 0, "{hook:?}: a port that is not served has no count");
        assert_eq!(packets(&counter, IDLE), 0, "{hook:?}: nobody came to the idle port");
        let count = counter.count(SERVED).expect("readable");
        // Ethernet, IPv4 and TCP headers, at least.
        assert!(count.bytes >= count.packets * 54, "{hook:?}: {count:?}");

        drop(counter);
        let left =
            server.command("tc").args(["filter", "show", "dev", "in0", "ingress"]).output().expect("tc runs");
        assert!(left.status.success() && left.stdout.is_empty(), "{hook:?}: a filter stays behind: {left:?}");
    });
}

#[test]
fn attaching_to_no_interface_says_what_to_do() {
    if !have_root() {
        return;
    }
    let netns = Netns::new("empty");
    for hook in [Hook::Tcx, Hook::Clsact] {
        let error = netns
            .enter(|| Counter::attach("none0", &[SERVED], hook).expect_err("there is no such interface"));
        let message = error.to_string();
        assert!(message.contains("none0") && message.contains("`ip link`"), "{hook:?}: {message}");
    }
}

/// Sends one request and reads the answer to its end.
fn exchange(address: SocketAddr) {
    let mut stream = TcpStream::connect(address).expect("the client connects");
    stream.write_all(REQUEST).expect("the client sends");
    stream.shutdown(Shutdown::Write).expect("the client ends");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("the client reads");
    assert_eq!(answer, REQUEST);
}

fn echo_once(listener: &TcpListener) {
    let (mut stream, _) = listener.accept().expect("the server accepts");
    let mut request = Vec::new();
    stream.read_to_end(&mut request).expect("the server reads");
    stream.write_all(&request).expect("the server answers");
}

fn packets(counter: &Counter, port: u16) -> u64 {
    counter.count(port).expect("readable").packets
}

fn nft(netns: &Netns, command: &str) -> String {
    let output = netns.command("nft").arg(command).output().expect("nft runs");
    assert!(output.status.success(), "nft {command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("nft prints text")
}

/// What the client's kernel counted towards `port`.
fn sent(client: &Netns, port: u16) -> u64 {
    // "… packets 12 bytes 734 …"
    let text = nft(client, &format!("list counter inet truth port{port}"));
    let mut words = text.split_whitespace().skip_while(|word| *word != "packets");
    words.nth(1).and_then(|count| count.parse().ok()).unwrap_or_else(|| panic!("no count in {text}"))
}

/// The expected figure once the actual one agrees with it: the last ACK may still be on its way.
fn settled(want: impl Fn() -> u64, have: impl Fn() -> u64) -> u64 {
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        let want = want();
        if want == have() || Instant::now() > end {
            return want;
        }
        thread::sleep(Duration::from_millis(10));
    }
}
