//! A client that speaks TCP by itself over a packet socket: the test says which options it offers, when it acknowledges,
//! what is split, lost, doubled, reordered or wrapped. Every segment that it receives is checked as a strict client
//! would, checksums included.
//!
//! Its address belongs to no kernel, so nobody resets its connections; the node needs a neighbour entry for it.

mod connection;
mod packet;
mod socket;

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    hash::{BuildHasher as _, RandomState},
    io::{self, Read as _, Write as _},
    net::{IpAddr, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use socket2::Socket;

use self::packet::{Header, frames, read_frame, syn_options};
pub use self::{connection::Connection, socket::packet_socket};
use crate::netns::Netns;

/// The flags of a TCP header (RFC 9293 §3.1).
pub mod flag {
    /// No more data.
    pub const FIN: u8 = 0x01;
    /// Synchronise sequence numbers.
    pub const SYN: u8 = 0x02;
    /// Abort.
    pub const RST: u8 = 0x04;
    /// Push.
    pub const PSH: u8 = 0x08;
    /// The acknowledgement number counts.
    pub const ACK: u8 = 0x10;
    /// Congestion was seen; in a SYN: this side does ECN (RFC 3168 §6.1.1).
    pub const ECE: u8 = 0x40;
    /// The congestion window was reduced; in a SYN, with `ECE`: this side does ECN.
    pub const CWR: u8 = 0x80;
}

/// Timestamps do not begin at zero: an echo of one is then no accident.
const FIRST_CLOCK: u32 = 1_000_000;

/// A hardware address.
pub type Mac = [u8; 6];

/// What the SYN offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Maximum segment size.
    pub mss: Option<u16>,
    /// Selective acknowledgements.
    pub sack: bool,
    /// Timestamps.
    pub timestamps: bool,
    /// Window scaling, by this shift.
    pub wscale: Option<u8>,
    /// Explicit congestion notification.
    pub ecn: bool,
    /// Asks for a fast-open cookie (RFC 7413).
    pub fast_open: bool,
}

impl Offer {
    /// As Linux does over Ethernet.
    pub const LINUX: Self =
        Self { mss: Some(1460), sack: true, timestamps: true, wscale: Some(7), ecn: false, fast_open: false };
    /// No option at all.
    pub const NONE: Self =
        Self { mss: None, sack: false, timestamps: false, wscale: None, ecn: false, fast_open: false };
}

/// How segments travel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Shape {
    /// One packet each, the checksum complete: what comes from a wire.
    #[default]
    Plain,
    /// The checksum left for hardware to complete (`CHECKSUM_PARTIAL`): what comes from a veth or virtio peer.
    Partial,
    /// With options in the IPv4 header; an extension header (destination options) in IPv6.
    IpOptions,
    /// In two fragments.
    Fragments,
    /// With the tag of a VLAN (IEEE 802.1Q). VLAN 0 is none: such a tag only carries a priority.
    Tagged(u16),
}

/// A segment that was received and is sound.
#[derive(Clone, Debug)]
pub struct Segment {
    /// The local port that it came to.
    pub port: u16,
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgement number.
    pub ack: u32,
    /// Bits of [`flag`].
    pub flags: u8,
    /// Window, unscaled.
    pub window: u16,
    /// Its options.
    pub options: TcpOptions,
    /// Its data.
    pub data: Vec<u8>,
    /// Largest segment that this one becomes on a wire: less than its data where the device is to cut it (GSO).
    pub cut: usize,
}

/// The options of a TCP header.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TcpOptions {
    /// Maximum segment size (2).
    pub mss: Option<u16>,
    /// Window scale (3).
    pub wscale: Option<u8>,
    /// Selective acknowledgements permitted (4).
    pub sack: bool,
    /// Blocks of a selective acknowledgement (5).
    pub blocks: Vec<(u32, u32)>,
    /// Timestamp: value and echo (8).
    pub timestamp: Option<(u32, u32)>,
}

/// An address on an interface from which a test speaks, towards one server.
#[derive(Debug)]
pub struct Wire {
    socket: Socket,
    macs: (Mac, Mac),
    local: IpAddr,
    server: SocketAddr,
    queue: RefCell<VecDeque<Segment>>,
    next_port: Cell<u16>,
    /// Timestamps count milliseconds from here...
    epoch: Instant,
    /// ... and from this value.
    first_clock: Cell<u32>,
}

impl Wire {
    /// Opens `interface` of `netns`, whose hardware address is `mac`, as `local`. The server is behind the hardware
    /// address `gateway`.
    ///
    /// # Panics
    /// Without the right to open packet sockets (root).
    pub fn open(
        netns: &Netns,
        interface: &str,
        (mac, gateway): (Mac, Mac),
        local: IpAddr,
        server: SocketAddr,
    ) -> Self {
        let socket = packet_socket(netns, interface, true).unwrap_or_else(|e| panic!("{interface}: {e}"));
        let random = RandomState::new().hash_one(0);
        Self {
            socket,
            macs: (mac, gateway),
            local,
            server,
            queue: RefCell::default(),
            next_port: Cell::new(20_000 + (random % 10_000) as u16),
            epoch: Instant::now(),
            first_clock: Cell::new(FIRST_CLOCK),
        }
    }

    /// As [`Wire::open`], to send only: nothing is received.
    ///
    /// # Panics
    /// As [`Wire::open`].
    pub fn open_deaf(
        netns: &Netns,
        interface: &str,
        macs: (Mac, Mac),
        local: IpAddr,
        server: SocketAddr,
    ) -> Self {
        let socket = packet_socket(netns, interface, false).unwrap_or_else(|e| panic!("{interface}: {e}"));
        let (next_port, epoch) = (Cell::new(20_000), Instant::now());
        let first_clock = Cell::new(FIRST_CLOCK);
        Self { socket, macs, local, server, queue: RefCell::default(), next_port, epoch, first_clock }
    }

    /// A connection from the next port; nothing is sent yet.
    pub fn connection(&self, offer: Offer) -> Connection<'_> {
        let port = self.next_port.get();
        self.next_port.set(port + 1);
        self.connection_from(port, offer)
    }

    /// A connection from this port; nothing is sent yet.
    pub fn connection_from(&self, port: u16, offer: Offer) -> Connection<'_> {
        Connection::new(self, port, offer)
    }

    /// A connection whose handshake is done.
    ///
    /// # Panics
    /// If there is no sound SYN-ACK.
    pub fn connect(&self, offer: Offer) -> Connection<'_> {
        let mut connection = self.connection(offer);
        connection.handshake();
        connection
    }

    /// Sends a lone SYN from any source, as a flood does.
    pub fn spoof_syn(&self, source: SocketAddr, seq: u32) {
        let header = Header {
            source,
            destination: self.server,
            seq,
            ack: 0,
            flags: flag::SYN,
            window: 64_240,
            options: syn_options(&Offer::LINUX, 1),
            ecn: 0,
        };
        self.transmit(&header, &[], Shape::Plain);
    }

    /// Sets the value that timestamps count from; for connections that come.
    pub fn start_clock_at(&self, value: u32) {
        self.first_clock.set(value);
    }

    fn clock(&self) -> u32 {
        self.first_clock.get().wrapping_add(self.epoch.elapsed().as_millis() as u32)
    }

    /// Whether `value` may be a timestamp that was sent.
    fn was_sent(&self, value: u32) -> bool {
        let first = self.first_clock.get();
        value.wrapping_sub(first) <= self.clock().wrapping_sub(first)
    }

    fn transmit(&self, header: &Header, data: &[u8], shape: Shape) {
        for frame in frames(header, data, shape, self.macs) {
            loop {
                match (&self.socket).write(&frame) {
                    Ok(_) => break,
                    // The other side's queue is full for a moment.
                    Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => thread::yield_now(),
                    Err(e) => panic!("sending {header:?}: {e}"),
                }
            }
        }
    }

    /// The next segment to `port`, within `limit`.
    fn next(&self, port: u16, limit: Duration) -> Option<Segment> {
        let end = Instant::now() + limit;
        let mut buffer = vec![0; 80_000];
        loop {
            let mut queue = self.queue.borrow_mut();
            if let Some(at) = queue.iter().position(|segment| segment.port == port) {
                return queue.remove(at);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            self.socket.set_read_timeout(Some(left)).expect("a time limit");
            match (&self.socket).read(&mut buffer) {
                Ok(n) => queue.extend(read_frame(&buffer[..n], self.macs, self.local, self.server)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => panic!("receiving: {e}"),
            }
        }
    }
}
