//! A connection of a [`Wire`]: the state of a TCP client, each step of which a test takes by itself.
#![forbid(unsafe_code)]

use std::{
    cell::Cell,
    collections::BTreeMap,
    hash::{BuildHasher as _, RandomState},
    net::SocketAddr,
    time::{Duration, Instant},
};

use super::{
    Offer, Segment, Shape, Wire,
    flag::{ACK, CWR, ECE, FIN, PSH, RST, SYN},
    packet::{Header, syn_options},
};
use crate::{client::Response, site::PATIENCE};

/// One TCP connection, moved by the test. Offsets count the bytes of data in a direction from 0.
#[derive(Debug)]
pub struct Connection<'w> {
    wire: &'w Wire,
    port: u16,
    offer: Offer,
    /// How what is sent from now on travels.
    pub shape: Shape,
    /// Whether what arrives is acknowledged at once. If not, whatever is sent acknowledges only what was before.
    pub acking: bool,
    /// The window that is advertised, unscaled.
    pub window: u16,
    isn: u32,
    peer_isn: Option<u32>,
    /// Both sides send timestamps.
    timestamps: bool,
    /// The latest timestamp of the other side.
    peer_clock: u32,
    /// Everything in front of this offset was sent.
    sent: u32,
    /// Everything in front of this offset was acknowledged; a FIN counts as a byte.
    acked: u32,
    /// The offset that was acknowledged to the other side.
    told: Cell<u32>,
    received: Vec<u8>,
    /// Data that came ahead of other data, by offset.
    early: BTreeMap<u32, Vec<u8>>,
    /// So much of `received` was given to the test.
    taken: usize,
    /// How many SYN-ACKs came.
    syn_acks: usize,
    /// How many bytes came that had come before.
    again: usize,
    /// The other side's FIN came, and all in front of it.
    ended: bool,
    /// The other side's RST came.
    reset: bool,
}

impl<'w> Connection<'w> {
    pub(super) fn new(wire: &'w Wire, port: u16, offer: Offer) -> Self {
        Self {
            wire,
            port,
            offer,
            shape: Shape::Plain,
            acking: true,
            window: u16::MAX,
            isn: RandomState::new().hash_one(port) as u32,
            peer_isn: None,
            timestamps: false,
            peer_clock: 0,
            sent: 0,
            acked: 0,
            told: Cell::new(0),
            received: Vec::new(),
            early: BTreeMap::new(),
            taken: 0,
            syn_acks: 0,
            again: 0,
            ended: false,
            reset: false,
        }
    }

    /// The local port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The local address and port.
    pub fn local(&self) -> SocketAddr {
        SocketAddr::new(self.wire.local, self.port)
    }

    /// How many SYN-ACKs came so far.
    pub fn syn_acks(&self) -> usize {
        self.syn_acks
    }

    /// How many bytes came so far that had come before: what retransmits brought.
    pub fn again(&self) -> usize {
        self.again
    }

    /// The initial sequence number of the other side.
    ///
    /// # Panics
    /// Before the SYN-ACK.
    pub fn peer_isn(&self) -> u32 {
        self.peer_isn.expect("a SYN-ACK came")
    }

    /// Chooses the initial sequence number; before the SYN.
    pub fn start_at(&mut self, isn: u32) {
        self.isn = isn;
    }

    /// Sends the SYN; again: a retransmit of it.
    pub fn syn(&mut self) {
        self.syn_with(&[]);
    }

    /// Sends the SYN with data, which stands at offset 0.
    pub fn syn_with(&mut self, data: &[u8]) {
        let flags = if self.offer.ecn { SYN | ECE | CWR } else { SYN };
        let header = Header {
            source: self.local(),
            destination: self.wire.server,
            seq: self.isn,
            ack: 0,
            flags,
            window: self.window,
            options: syn_options(&self.offer, self.wire.clock()),
            ecn: 0,
        };
        self.wire.transmit(&header, data, self.shape);
    }

    /// Waits for a SYN-ACK, which must fit the offer.
    ///
    /// # Panics
    /// There is none, or it does not.
    pub fn expect_syn_ack(&mut self) -> Segment {
        let segment = self.wire.next(self.port, PATIENCE).expect("a SYN-ACK");
        self.take_syn_ack(&segment);
        segment
    }

    /// SYN, SYN-ACK, ACK.
    ///
    /// # Panics
    /// As [`Connection::expect_syn_ack`].
    pub fn handshake(&mut self) -> Segment {
        self.syn();
        let segment = self.expect_syn_ack();
        self.ack();
        segment
    }

    /// SYN, SYN-ACK, ACK from a port on which the other side knows of an earlier connection: what belongs to that is
    /// answered by a RST, as a host does that knows nothing of it (RFC 9293 §3.10.7.3). Gives how often.
    ///
    /// # Panics
    /// The other side never takes it.
    pub fn handshake_anew(&mut self) -> usize {
        let mut resets = 0;
        for _ in 0..5 {
            self.syn();
            let limit = resets + 5;
            while let Some(segment) = self.wire.next(self.port, Duration::from_millis(100)) {
                if segment.flags & SYN != 0 {
                    self.take_syn_ack(&segment);
                    self.ack();
                    return resets;
                }
                if segment.flags & RST == 0 {
                    assert!(resets < limit, "{}: does not believe a RST: {segment:?}", self.local());
                    self.transmit(segment.ack.wrapping_sub(self.isn).wrapping_sub(1), RST, &[]);
                    resets += 1;
                }
            }
        }
        panic!("{}: no SYN-ACK after {resets} resets", self.local());
    }

    /// Acknowledges everything that came.
    pub fn ack(&self) {
        self.told.set(self.next());
        self.emit(self.sent, ACK, &[]);
    }

    /// Sends data behind all that was sent, in one segment.
    pub fn send(&mut self, data: impl AsRef<[u8]>) {
        let at = self.sent;
        self.send_at(at, data);
    }

    /// Sends data at an offset, in one segment: again, ahead of time, or late.
    pub fn send_at(&mut self, offset: u32, data: impl AsRef<[u8]>) {
        let data = data.as_ref();
        self.sent = self.sent.max(offset + data.len() as u32);
        self.emit(offset, ACK | PSH, data);
    }

    /// Passes over data as if it had been sent and lost.
    pub fn lose(&mut self, data: impl AsRef<[u8]>) {
        self.sent += data.as_ref().len() as u32;
    }

    /// Sends what is not acknowledged again and again, as a client does, until all of `data` (everything since offset 0)
    /// is.
    ///
    /// # Panics
    /// It never is.
    pub fn persist(&mut self, data: &[u8]) {
        let end = Instant::now() + PATIENCE;
        let step = usize::from(self.offer.mss.unwrap_or(536)) - 60;
        loop {
            self.settle(Duration::from_millis(100));
            assert!(!self.reset, "{}: reset while sending", self.local());
            let missing = &data[(self.acked as usize).min(data.len())..];
            if missing.is_empty() {
                return;
            }
            assert!(Instant::now() < end, "{}: {} bytes are never acknowledged", self.local(), missing.len());
            self.send_at(self.acked, &missing[..missing.len().min(step)]);
        }
    }

    /// Goes on as if a SYN-ACK with this sequence number had come: for those who guess.
    pub fn pretend_syn_ack(&mut self, isn: u32) {
        self.peer_isn = Some(isn);
    }

    /// How many bytes of data came so far, in order.
    pub fn received(&self) -> usize {
        self.received.len()
    }

    /// Asks whether the other side is alive: the byte before the next one, without data (RFC 9293 §3.8.4).
    pub fn probe(&self) {
        self.emit(self.sent.wrapping_sub(1), ACK, &[]);
    }

    /// Ends the sending, with data in the same segment or without. Further data may no more be sent.
    pub fn fin(&mut self, data: impl AsRef<[u8]>) {
        let data = data.as_ref();
        self.emit(self.sent, ACK | FIN | if data.is_empty() { 0 } else { PSH }, data);
        self.sent += data.len() as u32 + 1;
    }

    /// Sends the FIN that [`Connection::fin`] has sent again and again, as a client does, until it is acknowledged.
    ///
    /// # Panics
    /// It never is.
    pub fn persist_fin(&mut self) {
        let end = Instant::now() + PATIENCE;
        loop {
            self.settle(Duration::from_millis(100));
            assert!(!self.reset, "{}: reset while ending", self.local());
            if self.acked >= self.sent {
                return;
            }
            assert!(Instant::now() < end, "{}: the FIN is never acknowledged", self.local());
            self.emit(self.sent.wrapping_sub(1), ACK | FIN, &[]);
        }
    }

    /// Sends a segment that the connection knows nothing of: far away, or by somebody else who guesses. Its numbers are
    /// so far from what this side sends and acknowledges next.
    pub fn forge(&self, (seq, ack): (u32, u32), flags: u8, data: &[u8]) {
        let acknowledged = self.told.get();
        self.told.set(self.next().wrapping_add(ack));
        self.transmit(self.sent.wrapping_add(seq), flags, data);
        self.told.set(acknowledged);
    }

    /// Takes what comes within `time`: bare acknowledgements that say where the connection stands, with all that was sent
    /// and received; before the other side knows what was received, also what it sent before. Who answers a forged segment
    /// need not know the client's clock.
    ///
    /// A RST that is not the next segment is nobody's end (RFC 5961 §3.2): the answer to what cannot be.
    ///
    /// # Panics
    /// Anything else comes.
    pub fn expect_acks_or_silence(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while let Some(segment) = self.wire.next(self.port, end.saturating_duration_since(Instant::now())) {
            let at = segment.seq.wrapping_sub(self.peer_isn()).wrapping_sub(1) as usize;
            if segment.flags & RST != 0 && at != self.next() as usize {
                continue;
            }
            let acked = segment.ack.wrapping_sub(self.isn).wrapping_sub(1);
            let stands = segment.data.is_empty() && at == self.next() as usize && acked == self.sent;
            let before = self.told.get() != self.next()
                && acked <= self.sent
                && self.received.get(at..at + segment.data.len()).is_some_and(|known| known == segment.data);
            assert!(
                segment.flags & !PSH == ACK && (stands || before),
                "{}: not where it stands (received {}, sent {}): {segment:?}",
                self.local(),
                self.next(),
                self.sent
            );
        }
    }

    /// Aborts.
    pub fn rst(&self) {
        self.emit(self.sent, RST | ACK, &[]);
    }

    /// Waits until everything up to `offset` is acknowledged. A FIN counts as a byte.
    ///
    /// # Panics
    /// It is not.
    pub fn expect_acked(&mut self, offset: u32) {
        self.pump(format_args!("an ACK of {offset} bytes"), |c| c.acked >= offset);
    }

    /// Waits for any further segment and gives it.
    ///
    /// # Panics
    /// None comes.
    pub fn expect_segment(&mut self, what: &str) -> Segment {
        let segment = self.wire.next(self.port, PATIENCE);
        let segment = segment.unwrap_or_else(|| panic!("waited in vain for {what}"));
        self.take(&segment);
        segment
    }

    /// The next `length` bytes of data.
    ///
    /// # Panics
    /// They do not come.
    pub fn expect_data(&mut self, length: usize) -> Vec<u8> {
        self.pump(format_args!("{length} bytes of data"), |c| c.received.len() >= c.taken + length);
        let data = self.received[self.taken..self.taken + length].to_vec();
        self.taken += length;
        data
    }

    /// The next HTTP response.
    ///
    /// # Panics
    /// It does not come, or is malformed.
    pub fn expect_response(&mut self) -> Response {
        let mut got = None;
        self.pump("a response", |c| {
            got = Response::parse(&c.received[c.taken..], c.ended).expect("a sound response");
            got.is_some()
        });
        let (response, length) = got.expect("it was waited for");
        self.taken += length;
        response
    }

    /// Waits for the other side's FIN, with nothing in front of it that was not taken.
    ///
    /// # Panics
    /// There is data, or no FIN.
    pub fn expect_fin(&mut self) {
        self.pump("a FIN", |c| c.ended);
        let rest = &self.received[self.taken..];
        assert!(rest.is_empty(), "{}: data before the FIN: {}", self.local(), rest.escape_ascii());
    }

    /// Waits for the other side's RST.
    ///
    /// # Panics
    /// There is none.
    pub fn expect_rst(&mut self) {
        let end = Instant::now() + PATIENCE;
        while !self.reset {
            let left = end.saturating_duration_since(Instant::now());
            let segment = self.wire.next(self.port, left);
            self.take(&segment.unwrap_or_else(|| panic!("{}: no RST", self.local())));
        }
    }

    /// Takes what comes within `time`: nothing but a RST may.
    ///
    /// # Panics
    /// Data comes.
    pub fn expect_rst_or_silence(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while let Some(segment) = self.wire.next(self.port, end.saturating_duration_since(Instant::now())) {
            // A SYN-ACK may be a retransmit of the kernel's.
            let harmless = segment.data.is_empty() && segment.flags & (RST | SYN) != 0;
            assert!(harmless, "{}: neither a RST nor silence: {segment:?}", self.local());
        }
    }

    /// Whether anything comes within `time`.
    pub fn hears(&mut self, time: Duration) -> bool {
        self.wire.next(self.port, time).is_some()
    }

    /// Takes what has come within `time`.
    pub fn settle(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while let Some(segment) = self.wire.next(self.port, end.saturating_duration_since(Instant::now())) {
            self.take(&segment);
        }
    }

    /// Whether the other side reset the connection, as far as was seen.
    pub fn was_reset(&self) -> bool {
        self.reset
    }

    /// Ends both directions: FIN, and the other side's, each acknowledged.
    ///
    /// # Panics
    /// The other side does not.
    pub fn close(mut self) {
        self.fin([]);
        let all = self.sent;
        self.pump("the end of both sides", |c| c.ended && c.acked >= all);
    }

    fn pump(&mut self, what: impl std::fmt::Display, mut done: impl FnMut(&mut Self) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !done(self) {
            assert!(!self.reset, "{}: reset while waiting for {what}", self.local());
            let left = end.saturating_duration_since(Instant::now());
            let Some(segment) = self.wire.next(self.port, left) else {
                panic!(
                    "{}: waited in vain for {what}; sent {}, acknowledged {}, received {}, ended: {}",
                    self.local(),
                    self.sent,
                    self.acked,
                    self.received.len(),
                    self.ended
                );
            };
            self.take(&segment);
        }
    }

    fn take_syn_ack(&mut self, segment: &Segment) {
        let (name, offer, options) = (self.local(), self.offer, &segment.options);
        assert_eq!(segment.flags & !ECE, SYN | ACK, "{name}: not a SYN-ACK: {segment:?}");
        assert_eq!(segment.ack, self.isn.wrapping_add(1), "{name}: the SYN-ACK acknowledges something else");
        assert!(segment.data.is_empty(), "{name}: a SYN-ACK with data");
        assert!(
            self.peer_isn.is_none_or(|isn| isn == segment.seq),
            "{name}: another initial sequence number than before"
        );
        assert!(options.mss.is_some(), "{name}: a SYN-ACK without MSS");
        // RFC 7323 §1.3, RFC 2018 §2: only what was offered.
        assert!(offer.sack || !options.sack, "{name}: SACK was not offered");
        assert!(offer.wscale.is_some() || options.wscale.is_none(), "{name}: window scaling was not offered");
        assert!(offer.timestamps || options.timestamp.is_none(), "{name}: timestamps were not offered");
        assert!(offer.ecn || segment.flags & ECE == 0, "{name}: ECN was not offered");
        assert!(segment.window > 0, "{name}: a closed window in the SYN-ACK");
        self.peer_isn = Some(segment.seq);
        self.timestamps = options.timestamp.is_some();
        self.take_clock(segment);
        self.syn_acks += 1;
    }

    /// Takes a segment after the handshake.
    fn take(&mut self, segment: &Segment) {
        let name = self.local();
        if segment.flags & RST != 0 {
            self.reset = true;
            return;
        }
        if segment.flags & SYN != 0 {
            self.take_syn_ack(segment);
            if self.acking {
                self.ack();
            }
            return;
        }
        assert_ne!(segment.flags & ACK, 0, "{name}: a segment without ACK: {segment:?}");
        assert_eq!(
            segment.options.timestamp.is_some(),
            self.timestamps,
            "{name}: RFC 7323 §3.2: timestamps on every segment or on none: {segment:?}"
        );
        self.take_clock(segment);
        let acked = segment.ack.wrapping_sub(self.isn).wrapping_sub(1);
        assert!(acked <= self.sent, "{name}: acknowledges {acked} of {} bytes: {segment:?}", self.sent);
        self.acked = self.acked.max(acked);
        let most = usize::from(self.offer.mss.unwrap_or(if self.wire.local.is_ipv4() { 536 } else { 1220 }));
        assert!(segment.cut <= most, "{name}: {} bytes of data in a segment, MSS {most}", segment.cut);
        // Offsets wrap for what lies before the data: a keepalive probe.
        let offset = segment.seq.wrapping_sub(self.peer_isn()).wrapping_sub(1);
        let fin = segment.flags & FIN != 0;
        if !segment.data.is_empty() {
            self.take_data(offset, segment.data.clone());
        }
        if fin && offset.wrapping_add(segment.data.len() as u32) == self.received.len() as u32 {
            self.ended = true;
        }
        if self.acking && (fin || !segment.data.is_empty() || offset != self.next()) {
            self.ack();
        }
    }

    fn take_data(&mut self, offset: u32, data: Vec<u8>) {
        self.early.insert(offset, data);
        while let Some((offset, data)) = self.early.pop_first() {
            let have = self.received.len();
            let offset = offset as usize;
            if offset > have {
                self.early.insert(offset as u32, data);
                return;
            }
            let again = (have - offset).min(data.len());
            assert_eq!(
                self.received[offset..offset + again].escape_ascii().to_string(),
                data[..again].escape_ascii().to_string(),
                "{}: other bytes than before at {offset}",
                self.local()
            );
            self.again += again;
            self.received.extend_from_slice(&data[again..]);
        }
    }

    /// RFC 7323 §5.3: a client drops what has an older timestamp than it has seen.
    fn take_clock(&mut self, segment: &Segment) {
        let Some((value, echo)) = segment.options.timestamp else { return };
        let name = self.local();
        if segment.flags & SYN == 0 || self.syn_acks > 0 {
            assert!(
                value.wrapping_sub(self.peer_clock).cast_signed() >= 0,
                "{name}: the timestamp {value} is older than {}: {segment:?}",
                self.peer_clock
            );
        }
        assert!(self.wire.was_sent(echo), "{name}: echoes {echo}, which was never sent");
        self.peer_clock = value;
    }

    /// The offset of what is awaited from the other side; its FIN counts as a byte.
    fn next(&self) -> u32 {
        self.received.len() as u32 + u32::from(self.ended)
    }

    fn emit(&self, offset: u32, flags: u8, data: &[u8]) {
        if self.acking {
            self.told.set(self.next());
        }
        self.transmit(offset, flags, data);
    }

    fn transmit(&self, offset: u32, flags: u8, data: &[u8]) {
        let ack = self.peer_isn.map_or(0, |isn| isn.wrapping_add(1).wrapping_add(self.told.get()));
        let mut options = Vec::new();
        if self.timestamps {
            options.extend([1, 1, 8, 10]);
            options.extend(self.wire.clock().to_be_bytes());
            options.extend(self.peer_clock.to_be_bytes());
        }
        let header = Header {
            source: self.local(),
            destination: self.wire.server,
            seq: self.isn.wrapping_add(1).wrapping_add(offset),
            ack,
            flags,
            window: self.window,
            options,
            ecn: if self.offer.ecn && !data.is_empty() { 2 } else { 0 },
        };
        self.wire.transmit(&header, data, self.shape);
    }
}
