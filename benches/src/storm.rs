//! A storm of preflights from clients of our own making: a TCP that does just enough, over a packet socket. The kernel's
//! clients would cost more than the servers that they are to saturate, on the CPU of those whose latency is measured.
#![forbid(unsafe_code)]

use crate::workload::Request;
use preflightd_common::tcp::flags;
use preflightd_tests::{netns::Netns, wire::packet_socket};
use socket2::Socket;
use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap},
    io::{self, Read as _},
    net::{Ipv4Addr, SocketAddrV4},
    thread,
    time::{Duration, Instant},
};

/// Addresses that the clients have: the hosts 1 to 250 of a /24.
const HOSTS: u64 = 250;
/// Their ports: so many connections go by before addresses and port come again.
const FIRST_PORT: u16 = 1024;
const PORTS: u64 = 64_000;
/// Those that are not answered so long behind the last one have failed.
const GRACE: Duration = Duration::from_secs(3);
/// Before a SYN is sent again (RFC 6298 §2), and a request; doubled each time.
const SYN_AGAIN: Duration = Duration::from_secs(1);
const REQUEST_AGAIN: Duration = Duration::from_millis(250);
const TRIES: u32 = 4;
/// What has come is read, and what is due is sent, so often: a network card too collects packets before it interrupts. One
/// by one, each would cost the server an interrupt from CPU to CPU, which costs more than the packet where CPUs are virtual.
const TICK: Duration = Duration::from_micros(200);

const VNET: usize = 10;
const IP: usize = VNET + 14;
const TCP: usize = IP + 20;
const OPTIONS: usize = TCP + 20;
/// As Linux asks: MSS, SACK, timestamps, window scale.
const SYN_OPTIONS: [u8; 20] = [2, 4, 0x05, 0xb4, 4, 2, 8, 10, 0, 0, 0, 0, 0, 0, 0, 0, 1, 3, 3, 7];
const OPTIONS_AFTERWARDS: [u8; 12] = [1, 1, 8, 10, 0, 0, 0, 0, 0, 0, 0, 0];

/// The clients of one node.
#[derive(Debug)]
pub struct Clients {
    socket: Socket,
    /// Ethernet, to the node.
    ethernet: [u8; 14],
    network: Ipv4Addr,
    node: SocketAddrV4,
    born: Instant,
    /// Connections so far.
    count: u64,
}

/// How it blows.
#[derive(Clone, Copy, Debug)]
pub struct Storm<'a> {
    /// In turn; not empty.
    pub requests: &'a [Request],
    /// Connections with a request each, a second, at even intervals.
    pub rate: f64,
    /// At most so many wait at once; what is due meanwhile waits to be sent.
    pub in_flight: usize,
    /// How long.
    pub duration: Duration,
}

/// What came of it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Outcome {
    /// Requests that were due.
    pub due: u64,
    /// Of these: begun while requests were due.
    pub sent: u64,
    /// Rightly answered meanwhile.
    pub answered: u64,
    /// Wrongly answered, reset, or not answered at the end.
    pub failed: u64,
}

impl Clients {
    /// Clients with the addresses of `network`, a /24, behind `interface` of the namespace `netns`, which has the hardware
    /// address `own`; `next` is the one of the node's. The node must have a route there.
    ///
    /// # Errors
    /// No such interface.
    pub fn new(
        (netns, interface): (&Netns, &str),
        (own, next): ([u8; 6], [u8; 6]),
        network: Ipv4Addr,
        node: SocketAddrV4,
    ) -> io::Result<Self> {
        let mut ethernet = [0; 14];
        ethernet[..6].copy_from_slice(&next);
        ethernet[6..12].copy_from_slice(&own);
        ethernet[12..].copy_from_slice(&[8, 0]);
        let socket = packet_socket(netns, interface, true)?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, ethernet, network, node, born: Instant::now(), count: 0 })
    }

    /// Lets it blow, on this thread.
    ///
    /// # Errors
    /// The kernel takes no frames.
    pub fn run(&mut self, storm: &Storm<'_>) -> io::Result<Outcome> {
        let mut blowing = Blowing {
            clients: self,
            storm,
            open: HashMap::with_capacity(storm.in_flight),
            again: BinaryHeap::new(),
            outcome: Outcome::default(),
        };
        blowing.run()
    }

    fn send(&self, client: Client, segment: &Segment<'_>) -> io::Result<()> {
        let mut frame = [0; 2048];
        let length = self.frame(&mut frame, client, segment);
        match self.socket.send(&frame[..length]) {
            Ok(_) => Ok(()),
            // Lost, as on a wire.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOBUFS | libc::EAGAIN)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The segment in a frame with a `virtio_net_hdr` in front, by which the checksum is the receiver's interface's to
    /// make; the length of all that.
    fn frame(&self, frame: &mut [u8; 2048], client: Client, segment: &Segment<'_>) -> usize {
        const NEEDS_CHECKSUM: u8 = 1; // VIRTIO_NET_HDR_F_NEEDS_CSUM
        let syn = segment.flags & flags::SYN != 0;
        let options: &[u8] = if syn { &SYN_OPTIONS } else { &OPTIONS_AFTERWARDS };
        let data = OPTIONS + options.len();
        let end = data + segment.data.len();
        let mut put = |at: usize, bytes: &[u8]| frame[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &[NEEDS_CHECKSUM]);
        put(6, &((TCP - VNET) as u16).to_ne_bytes());
        put(8, &16_u16.to_ne_bytes());
        put(VNET, &self.ethernet);
        put(IP, &[0x45, 0]);
        put(IP + 2, &((end - IP) as u16).to_be_bytes());
        put(IP + 6, &[0x40, 0, 64, 6]);
        let [a, b, c, _] = self.network.octets();
        put(IP + 12, &[a, b, c, client.host]);
        put(IP + 16, &self.node.ip().octets());
        put(TCP, &client.port.to_be_bytes());
        put(TCP + 2, &self.node.port().to_be_bytes());
        put(TCP + 4, &segment.seq.to_be_bytes());
        put(TCP + 8, &segment.ack.to_be_bytes());
        put(TCP + 12, &[((data - TCP) as u8 / 4) << 4, segment.flags, 0xfa, 0xf0]);
        put(OPTIONS, options);
        let timestamps = OPTIONS + if syn { 8 } else { 4 };
        put(timestamps, &(self.born.elapsed().as_millis() as u32 + 1).to_be_bytes());
        put(timestamps + 4, &segment.ts_echo.to_be_bytes());
        put(data, segment.data);
        let header = !sum(&frame[IP..TCP], 0);
        frame[IP + 10..IP + 12].copy_from_slice(&header.to_be_bytes());
        let pseudo = sum(&frame[IP + 12..TCP], 6 + (end - TCP) as u32);
        frame[TCP + 16..TCP + 18].copy_from_slice(&pseudo.to_be_bytes());
        end
    }
}

/// Who: the last byte of the address, and the port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Client {
    host: u8,
    port: u16,
}

impl Client {
    /// The one who makes connection `number`.
    fn of(number: u64) -> Self {
        Self { host: (number % HOSTS) as u8 + 1, port: FIRST_PORT + (number / HOSTS % PORTS) as u16 }
    }
}

/// What is sent.
#[derive(Clone, Copy, Debug, Default)]
struct Segment<'a> {
    seq: u32,
    ack: u32,
    flags: u8,
    ts_echo: u32,
    data: &'a [u8],
}

/// What has come.
#[derive(Clone, Copy, Debug)]
struct Arrival<'a> {
    client: Client,
    seq: u32,
    ack: u32,
    flags: u8,
    ts_value: u32,
    data: &'a [u8],
}

impl<'a> Arrival<'a> {
    /// A segment from the node to one of the clients; `None`: it is another frame.
    fn read(frame: &'a [u8], clients: &Clients) -> Option<Self> {
        let header = frame.get(..OPTIONS)?;
        let word =
            |at: usize| u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let half = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
        if half(IP - 2) != 0x0800 || header[IP] != 0x45 || header[IP + 9] != 6 {
            return None;
        }
        let to = Ipv4Addr::from_bits(word(IP + 16) & 0xffff_ff00);
        if to != clients.network || half(TCP) != clients.node.port() {
            return None;
        }
        let data = TCP + usize::from(header[TCP + 12] >> 4) * 4;
        let end = IP + usize::from(half(IP + 2));
        let options = preflightd_common::tcp::read_options(frame.get(OPTIONS..data)?);
        Some(Self {
            client: Client { host: header[IP + 19], port: half(TCP + 2) },
            seq: word(TCP + 4),
            ack: word(TCP + 8),
            flags: header[TCP + 13],
            ts_value: options.ts_value,
            data: frame.get(data..end)?,
        })
    }

    fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Opening,
    Asking,
    /// Answered; our FIN is out, and the server's is awaited.
    Closing,
}

#[derive(Debug)]
struct Connection {
    number: u64,
    state: State,
    request: usize,
    /// Our next byte, their next byte.
    seq: u32,
    ack: u32,
    ts_echo: u32,
    response: Vec<u8>,
    tries: u32,
}

impl Connection {
    fn segment<'a>(&self, flags: u8, data: &'a [u8]) -> Segment<'a> {
        Segment { seq: self.seq, ack: self.ack, flags, ts_echo: self.ts_echo, data }
    }
}

struct Blowing<'a> {
    clients: &'a mut Clients,
    storm: &'a Storm<'a>,
    open: HashMap<Client, Connection>,
    /// When to look whether a connection's state has changed.
    again: BinaryHeap<Reverse<(Instant, Client, u64)>>,
    outcome: Outcome,
}

impl Blowing<'_> {
    fn run(&mut self) -> io::Result<Outcome> {
        let interval = Duration::from_secs_f64(1.0 / self.storm.rate);
        let begin = Instant::now();
        let end = begin + self.storm.duration;
        let mut due = begin;
        let mut over = None;
        let mut frame = [0; 4096];
        loop {
            let now = Instant::now();
            self.hear(&mut frame)?;
            self.repeat(now)?;
            while due <= now && now < end && self.open.len() < self.storm.in_flight {
                self.begin(now)?;
                due += interval;
            }
            if now >= end && over.is_none() {
                let due = (self.storm.duration.as_nanos() / interval.as_nanos()) as u64;
                over = Some(Outcome { due, ..self.outcome });
            }
            if now >= end && (self.open.is_empty() || now >= end + GRACE) {
                break;
            }
            thread::sleep(TICK.saturating_sub(now.elapsed()));
        }
        let outcome = over.unwrap_or(self.outcome);
        let unanswered = self.open.values().filter(|one| one.state != State::Closing).count() as u64;
        Ok(Outcome {
            failed: self.outcome.failed + unanswered + (outcome.due.saturating_sub(outcome.sent)),
            ..outcome
        })
    }

    fn begin(&mut self, now: Instant) -> io::Result<()> {
        let number = self.clients.count;
        self.clients.count += 1;
        let client = Client::of(number);
        let connection = Connection {
            number,
            state: State::Opening,
            request: (number % self.storm.requests.len() as u64) as usize,
            // Later ones of the same ends have later numbers.
            seq: (number as u32).wrapping_mul(1 << 12),
            ack: 0,
            ts_echo: 0,
            response: Vec::new(),
            tries: 1,
        };
        self.outcome.sent += 1;
        self.clients.send(client, &connection.segment(flags::SYN, b""))?;
        self.again.push(Reverse((now + SYN_AGAIN, client, number)));
        self.open.insert(client, connection);
        Ok(())
    }

    /// Reads what has come.
    fn hear(&mut self, frame: &mut [u8; 4096]) -> io::Result<()> {
        loop {
            match (&self.clients.socket).read(frame) {
                Ok(length) => {
                    if let Some(arrival) = Arrival::read(&frame[..length], self.clients) {
                        self.take(&arrival)?;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    fn take(&mut self, arrival: &Arrival<'_>) -> io::Result<()> {
        let client = arrival.client;
        let Some(connection) = self.open.get_mut(&client) else {
            // The server did not hear the last acknowledgement of a connection that is over.
            if arrival.has(flags::FIN) {
                let ack = arrival.seq.wrapping_add(arrival.data.len() as u32 + 1);
                let (seq, ts_echo) = (arrival.ack, arrival.ts_value);
                self.clients.send(client, &Segment { seq, ack, flags: flags::ACK, ts_echo, data: b"" })?;
            }
            return Ok(());
        };
        if arrival.has(flags::RST) {
            self.fail(client);
            return Ok(());
        }
        connection.ts_echo = arrival.ts_value;
        match connection.state {
            State::Opening => {
                let first = connection.seq.wrapping_add(1);
                if !arrival.has(flags::SYN) || arrival.ack != first {
                    return Ok(());
                }
                (connection.seq, connection.ack) = (first, arrival.seq.wrapping_add(1));
                self.clients.send(client, &connection.segment(flags::ACK, b""))?;
                let request = &self.storm.requests[connection.request].close;
                self.clients.send(client, &connection.segment(flags::ACK | flags::PSH, request))?;
                connection.seq = first.wrapping_add(request.len() as u32);
                connection.state = State::Asking;
                connection.tries = 1;
                self.again.push(Reverse((Instant::now() + REQUEST_AGAIN, client, connection.number)));
            }
            State::Asking if arrival.seq == connection.ack && !arrival.has(flags::SYN) => {
                if arrival.data.is_empty() && !arrival.has(flags::FIN) {
                    return Ok(());
                }
                connection.ack = connection.ack.wrapping_add(arrival.data.len() as u32);
                connection.response.extend_from_slice(arrival.data);
                let request = &self.storm.requests[connection.request];
                let whole = request.is_whole(&connection.response);
                let fin = arrival.has(flags::FIN);
                connection.ack = connection.ack.wrapping_add(u32::from(fin));
                if !whole && !fin {
                    return self.clients.send(client, &connection.segment(flags::ACK, b""));
                }
                self.clients.send(client, &connection.segment(flags::ACK | flags::FIN, b""))?;
                connection.seq = connection.seq.wrapping_add(1);
                if whole && request.accepts(&connection.response) {
                    self.outcome.answered += 1;
                    connection.state = State::Closing;
                    if fin {
                        self.open.remove(&client);
                    }
                } else {
                    self.fail(client);
                }
            }
            State::Closing if arrival.seq == connection.ack && arrival.has(flags::FIN) => {
                connection.ack = connection.ack.wrapping_add(arrival.data.len() as u32 + 1);
                self.clients.send(client, &connection.segment(flags::ACK, b""))?;
                self.open.remove(&client);
            }
            // Something again, or too early.
            State::Asking | State::Closing => {
                if !arrival.data.is_empty() || arrival.has(flags::SYN | flags::FIN) {
                    self.clients.send(client, &connection.segment(flags::ACK, b""))?;
                }
            }
        }
        Ok(())
    }

    /// Sends again what was not heard.
    fn repeat(&mut self, now: Instant) -> io::Result<()> {
        while let Some(Reverse((at, client, number))) = self.again.peek().copied()
            && at <= now
        {
            self.again.pop();
            let Some(connection) = self.open.get_mut(&client).filter(|one| one.number == number) else {
                continue;
            };
            let (segment, after) = match connection.state {
                State::Opening => (connection.segment(flags::SYN, b""), SYN_AGAIN),
                State::Asking => {
                    let request = &self.storm.requests[connection.request].close;
                    let mut segment = connection.segment(flags::ACK | flags::PSH, request);
                    segment.seq = segment.seq.wrapping_sub(request.len() as u32);
                    (segment, REQUEST_AGAIN)
                }
                State::Closing => continue,
            };
            if connection.tries == TRIES {
                self.fail(client);
                continue;
            }
            self.clients.send(client, &segment)?;
            self.again.push(Reverse((now + after * 2_u32.pow(connection.tries), client, number)));
            connection.tries += 1;
        }
        Ok(())
    }

    fn fail(&mut self, client: Client) {
        if let Some(connection) = self.open.remove(&client)
            && connection.state != State::Closing
        {
            self.outcome.failed += 1;
        }
    }
}

/// The ones' complement sum (RFC 1071) of `bytes`, an even number of them, and `start`.
fn sum(bytes: &[u8], start: u32) -> u16 {
    let words = bytes.as_chunks::<2>().0.iter().map(|word| u32::from(u16::from_be_bytes(*word)));
    let mut sum = words.sum::<u32>() + start;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}
