//! The maps: keys, values and named slots, laid out alike for the eBPF programs and for user space.
//!
//! Every type is `repr(C)` without padding and holds no `bool`; the assertions below hold the sizes. Maps may be pinned
//! and taken over by another version of the daemon: whoever changes a layout or a slot raises [`VERSION`].

/// Version of everything here; part of the path where maps and links are pinned.
pub const VERSION: u32 = 3;

/// How many (port, listener) pairs can be counted; also bounds the served ports.
pub const MAX_PORTS: u32 = 64;

/// Entries of `SERVED`: served ports times the addresses of the node.
pub const MAX_SERVED: u32 = 4096;

/// Entries of `SOCKETS`: listening sockets of workers.
pub const MAX_SOCKETS: u32 = 4096;

/// Entries of `PENDING` unless the configuration says otherwise.
pub const DEFAULT_PENDING: u32 = 65_536;

/// Entries of `HOSTS`.
pub const MAX_HOSTS: u32 = 131_072;

/// Entries of `ROUTES`.
pub const MAX_ROUTES: u32 = 16_384;

/// Entries of `MARKS`.
pub const MAX_MARKS: u32 = 16_384;

/// Entries of `ANSWERED` unless the configuration says otherwise.
pub const DEFAULT_ANSWERED: u32 = 65_536;

/// Entries of `TERMS`; half of them is used, for while they are replaced the old and the new ones are there.
pub const MAX_TERMS: u32 = 524_288;

/// Entries of `TEMPLATES`; half of them is used, as of `TERMS`.
pub const MAX_TEMPLATES: u32 = 8_192;

/// Entries of `DATES`: so many seconds an answer can be sent again.
pub const MAX_DATES: u32 = 64;

/// A connection as its client sees it: addresses (IPv4 as `::ffff:a.b.c.d`) and ports in network order.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Flow {
    /// The client's address.
    pub client: [u32; 4],
    /// The address that it connects to.
    pub server: [u32; 4],
    /// The client's port.
    pub client_port: u16,
    /// The served port.
    pub server_port: u16,
}

/// Key of `SERVED`: where clients connect, in network order; the address as in [`Flow`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Endpoint {
    /// An address of this node.
    pub address: [u32; 4],
    /// The port.
    pub port: u16,
    /// Zero.
    pub zero: u16,
}

/// Value of `SERVED`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// The listener's number.
    pub listener: u32,
    /// Row of the port in `PORT_COUNTS`.
    pub row: u32,
    /// First slot of the workers' sockets of this listener and address family in `SOCKETS`.
    pub first_socket: u32,
    /// How many there are, one for each worker.
    pub sockets: u32,
    /// 1: its connections may be deferred.
    pub engaged: u32,
}

/// What the programs do; the value of [`Config::state`].
pub mod state {
    /// Finish what was begun.
    pub const OFF: u32 = 0;
    /// And count new connections.
    pub const OBSERVE: u32 = 1;
    /// And defer new connections.
    pub const DEFER: u32 = 2;
}

/// The one entry of `CONFIG`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// One of [`state`].
    pub state: u32,
    /// Of [`config_flags`].
    pub flags: u32,
    /// Share of connections that may be deferred, in 1/100.
    pub percent: u32,
    /// Which of the two `KEYS` signs new cookies.
    pub key: u32,
    /// Window of a SYN-ACK in bytes.
    pub window: u32,
    /// Window scale of a SYN-ACK.
    pub window_scale: u32,
    /// Cookies that each CPU may check in a [`BUDGET_SHIFT`] period while entries are being evicted.
    pub cookie_budget: u32,
    /// Entries that each CPU may make in `PENDING` until [`Config::round`] changes: so many are surely free.
    pub room: u32,
    /// Changes each time that the daemon has counted.
    pub round: u32,
    /// Which `TERMS` and `TEMPLATES` are in force; 0: none, and the kernel answers nothing.
    pub generation: u32,
    /// The time in seconds since 1970; its entry of `DATES` is there.
    pub second: u32,
    /// Longer heads are not answered (`limits.max_head_bytes`).
    pub max_head: u32,
    /// First segments that each CPU may show in a [`BUDGET_SHIFT`] period; 0: none are shown.
    pub samples: u32,
    /// Zero.
    pub zero: u32,
}

/// Bits of [`Config::flags`].
pub mod config_flags {
    /// `net.ipv4.tcp_timestamps`.
    pub const TIMESTAMPS: u32 = 1;
    /// `net.ipv4.tcp_sack`.
    pub const SACK: u32 = 2;
    /// `net.ipv4.tcp_window_scaling`.
    pub const WINDOW_SCALING: u32 = 4;
    /// `net.ipv4.tcp_ecn` is 1 or 2.
    pub const ECN: u32 = 8;
    /// `net.ipv4.tcp_ecn` is above 2: accurate ECN, whose handshake is left to the kernel.
    pub const ACCURATE_ECN: u32 = 16;
    /// `PENDING` is nearly full: new connections are left to the kernel, and evicted ones may prove themselves by
    /// their cookie alone.
    pub const PRESSURE: u32 = 32;
    /// The fields of TIME_WAIT sockets can be read.
    pub const TIME_WAIT: u32 = 64;
    /// `ROUTES` says by which interface the kernel answers an IPv4 client.
    pub const ROUTES_V4: u32 = 128;
    /// The same for IPv6.
    pub const ROUTES_V6: u32 = 256;
    /// The program answers by itself what `TERMS` decide.
    pub const ANSWERS: u32 = 512;
    /// `ANSWERED` is half full.
    pub const HALF_FULL: u32 = 1024;
    /// `ANSWERED` is nearly full.
    pub const CROWDED: u32 = 2048;
}

/// Bytes of `SAMPLES`.
pub const SAMPLES_BYTES: u32 = 1 << 18;

/// A record of `SAMPLES`: the first segment of a connection that looks like a preflight.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// The listener's number.
    pub listener: u32,
    /// Bytes that follow.
    pub length: u32,
    /// The segment; behind its end whatever was there before.
    pub bytes: [u8; 2048],
}

/// Nanoseconds after which a heartbeat is stale.
pub const HEARTBEAT_STALE: u64 = 1_000_000_000;

/// The budget of cookies is renewed each 2^this nanoseconds (about a second).
pub const BUDGET_SHIFT: u32 = 30;

/// A clock tick in [`Pending`] and in TCP timestamps is 2^this nanoseconds (1.05 ms; RFC 7323 §5.4 wants 1 ms to 1 s).
pub const TICK_SHIFT: u32 = 20;

/// Value of `INTERFACES`, by interface index.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interface {
    /// What a SYN-ACK over IPv4 announces as MSS.
    pub mss_v4: u16,
    /// The same over IPv6.
    pub mss_v6: u16,
    /// 1: all routes of IPv4 leave by it, so an answer may too.
    pub symmetric_v4: u16,
    /// The same for IPv6.
    pub symmetric_v6: u16,
}

/// Where a connection in `PENDING` stands; the value of [`Pending::stage`].
pub mod stage {
    /// The kernel made the handshake; its first data is waited for, to be counted.
    pub const OBSERVED: u8 = 0;
    /// Our SYN-ACK is out.
    pub const DEFERRED: u8 = 1;
    /// The client has acknowledged it.
    pub const ACKNOWLEDGED: u8 = 2;
    /// A listener has been chosen; the kernel makes, or has made, the connection.
    pub const GIVEN: u8 = 3;
    /// The kernel may have had no room when a worker was chosen: next time the proxy.
    pub const GIVEN_TO_WORKER: u8 = 4;
    /// The program has answered, and waits for the next request.
    pub const OPEN: u8 = 5;
    /// The same, and the answer was the last one: our FIN is out.
    pub const ENDING: u8 = 6;
    /// The client has ended the connection, and our FIN is out.
    pub const ENDED: u8 = 7;
}

/// Bits of [`Pending::options`]: what the handshake agreed upon.
pub mod options {
    /// Timestamps (RFC 7323).
    pub const TIMESTAMPS: u8 = 1;
    /// Selective acknowledgements (RFC 2018).
    pub const SACK: u8 = 2;
    /// Window scaling (RFC 7323).
    pub const WINDOW_SCALE: u8 = 4;
    /// ECN (RFC 3168).
    pub const ECN: u8 = 8;
}

/// Value of `PENDING`: a connection between its SYN and its first data.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pending {
    /// The client's initial sequence number.
    pub client_isn: u32,
    /// Ours; while observing, what the client first acknowledged (0: nothing yet).
    pub server_isn: u32,
    /// Last packet, in ticks ([`TICK_SHIFT`]).
    pub touched: u32,
    /// The client's MSS.
    pub mss: u16,
    /// The client's window scale.
    pub client_scale: u8,
    /// Ours.
    pub server_scale: u8,
    /// Of [`options`].
    pub options: u8,
    /// One of [`stage`].
    pub stage: u8,
    /// Row of the port in `PORT_COUNTS`.
    pub row: u16,
}

/// Value of `ANSWERED`: a connection that the program has answered on, and that has no socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Answered {
    /// As if the connection had begun behind the last answer: [`Pending::client_isn`] is the last byte that was taken from
    /// the client, [`Pending::server_isn`] the last one that was sent.
    pub pending: Pending,
    /// Bytes of the last request.
    pub request: u32,
    /// Sequence numbers of the last answer: its bytes, and its FIN.
    pub answer: u32,
    /// Which template it was made from.
    pub template: Template,
    /// The second of its `Date`.
    pub second: u32,
    /// The sum of its bytes, as checksums sum.
    pub sum: u32,
    /// 1: the client has acknowledged it.
    pub acknowledged: u32,
}

/// Ticks without a packet after which an entry of `PENDING` or `ANSWERED` is swept, by stage.
pub mod expiry {
    /// A client that has not acknowledged our SYN-ACK sends its SYN again after 1, 3, 7 and 15 s.
    pub const DEFERRED: u32 = ticks(20);
    /// Chrome keeps a connection that it opened ahead of need for five minutes.
    pub const ACKNOWLEDGED: u32 = ticks(600);
    /// Only counted.
    pub const OBSERVED: u32 = ticks(120);
    /// The kernel's.
    pub const GIVEN: u32 = ticks(60);
    /// While there is room: longer than anybody keeps an idle connection, for its end cannot be told to the client.
    pub const OPEN: u32 = ticks(6 * 3600);
    /// With [`super::config_flags::HALF_FULL`]: longer than any browser keeps one (Chrome: five minutes).
    pub const OPEN_HALF_FULL: u32 = ticks(600);
    /// With [`super::config_flags::CROWDED`].
    pub const OPEN_CROWDED: u32 = ticks(120);
    /// As long as Linux waits for the other side's FIN (`tcp_fin_timeout`).
    pub const ENDING: u32 = ticks(60);
    /// The client sends its FIN again, if it has not got ours.
    pub const ENDED: u32 = ticks(20);
    /// A client that has waited for so long waits for the server to speak, or is in no hurry.
    pub const SILENT: u32 = ticks(10);

    const fn ticks(seconds: u64) -> u32 {
        ((seconds * 1_000_000_000) >> super::TICK_SHIFT) as u32
    }
}

/// Key of `HOSTS`: a host of some policy, by the hash of [`crate::preflight::HostHash`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Host {
    /// Of the host, or of the suffix with its dot; 0 with [`host_kind::ANY`].
    pub hash: u64,
    /// The listener's number.
    pub listener: u32,
    /// One of [`host_kind`].
    pub kind: u32,
}

/// What a key of `HOSTS` stands for.
pub mod host_kind {
    /// This very host.
    pub const EXACT: u32 = 0;
    /// Every host that ends so.
    pub const SUFFIX: u32 = 1;
    /// Every host.
    pub const ANY: u32 = 2;
}

/// Bytes of the text of a [`Term`]: longer ones are not the kernel's.
pub const MAX_TEXT: u32 = 64;

/// Key of `TERMS`, which hold the part of the policy table that the program decides by. Compared byte for byte: nothing
/// that a client sends can be taken for something else.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Term {
    /// The table's generation.
    pub generation: u32,
    /// One of [`term`].
    pub kind: u16,
    /// Bytes of text, at most [`MAX_TEXT`].
    pub length: u16,
    /// What it belongs to: a listener, a host, a set.
    pub of: u32,
    /// Zero.
    pub zero: u32,
    /// The text as words of eight bytes, the first byte lowest; zeros behind it.
    pub text: [u64; MAX_TEXT as usize / 8],
}

/// What a [`Term`] stands for; the value of [`Term::kind`].
pub mod term {
    /// A listener's ports: their number (0: any), then the ports.
    pub const LISTENER: u16 = 1;
    /// A host of a listener. Value: [`super::Routes`].
    pub const HOST: u16 = 2;
    /// What a host of a listener ends with, from a dot on, if one label is before it.
    pub const HOST_BELOW: u16 = 3;
    /// The same, with more labels before it.
    pub const HOST_FAR_BELOW: u16 = 4;
    /// Every host of a listener; no text.
    pub const ANY_HOST: u16 = 5;
    /// A path of a host, all of it. Value: [`super::Rule`].
    pub const PATH: u16 = 6;
    /// What a path of a host begins with, on element boundaries, without a slash at its end.
    pub const PATH_BELOW: u16 = 7;
    /// An origin of a set.
    pub const ORIGIN: u16 = 8;
    /// What the host of an origin with `https` ends with, from a dot on; no text: every host.
    pub const HTTPS_BELOW: u16 = 9;
    /// The same with `http`.
    pub const HTTP_BELOW: u16 = 10;
    /// The name of a request header in a set. Value: its position in ascending order.
    pub const NAME: u16 = 11;
    /// A question to the paths of a host that an answer was learned for: no text, but in its first word a hash, as
    /// [`crate::decide::question`] has it. A worker compares the question itself.
    pub const LEARNED: u16 = 12;
}

/// Value of a [`Term`], as one of the types below or as the kind says.
pub type Value = [u32; 8];

/// The paths of a host.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Routes {
    /// What its paths are kept under.
    pub host: u32,
    /// Of [`routes_flags`].
    pub flags: u32,
    /// A bit for each length that a [`term::PATH`] has, below 64.
    pub exact: u64,
    /// A bit for each length that a [`term::PATH_BELOW`] has, below 64.
    pub prefixes: u64,
}

/// Bits of [`Routes::flags`].
pub mod routes_flags {
    /// There are paths of 64 bytes and more, which are not in `TERMS`.
    pub const LONG: u32 = 1;
    /// There are regular expressions.
    pub const REGEX: u32 = 2;
}

impl Routes {
    /// As a map has it.
    #[inline(always)]
    pub fn value(&self) -> Value {
        let (low, high) = (self.exact as u32, (self.exact >> 32) as u32);
        [self.host, self.flags, low, high, self.prefixes as u32, (self.prefixes >> 32) as u32, 0, 0]
    }

    /// The other way round.
    #[inline(always)]
    pub fn of(value: &Value) -> Self {
        let [host, flags, a, b, c, d, _, _] = *value;
        let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        Self { host, flags, exact: pair(a, b), prefixes: pair(c, d) }
    }
}

/// What a policy says, as far as the program can decide by it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// Of [`rule_flags`].
    pub flags: u32,
    /// Allowed methods, by the bits of [`crate::decide::method_bit`].
    pub methods: u32,
    /// The set of origins.
    pub origins: u32,
    /// The set of names of request headers.
    pub names: u32,
    /// Number of the template for what is allowed; the next one has `Connection: close`.
    pub allowed: u32,
    /// The same for what is not.
    pub denied: u32,
    /// Number of the route's label.
    pub label: u32,
    /// Zero.
    pub zero: u32,
}

impl Rule {
    /// As a map has it.
    #[inline(always)]
    pub fn value(&self) -> Value {
        let Self { flags, methods, origins, names, allowed, denied, label, zero } = *self;
        [flags, methods, origins, names, allowed, denied, label, zero]
    }

    /// The other way round.
    #[inline(always)]
    pub fn of(value: &Value) -> Self {
        let [flags, methods, origins, names, allowed, denied, label, zero] = *value;
        Self { flags, methods, origins, names, allowed, denied, label, zero }
    }
}

/// Bits of [`Rule::flags`].
pub mod rule_flags {
    /// The program may decide.
    pub const DECIDES: u32 = 1;
    /// Every origin is allowed.
    pub const ALL_ORIGINS: u32 = 2;
    /// There are [`super::term::HTTPS_BELOW`] or [`super::term::HTTP_BELOW`].
    pub const ORIGINS_BELOW: u32 = 4;
    /// Of these only with one label before them, of letters, digits and `-`.
    pub const ONE_LABEL: u32 = 8;
    /// Further origins may be allowed: one that is not found is a worker's to judge.
    pub const MORE_ORIGINS: u32 = 16;
    /// Methods are left to the browser.
    pub const ALL_METHODS: u32 = 32;
    /// Names of request headers are left to the browser.
    pub const ALL_NAMES: u32 = 64;
    /// What is not allowed goes to the proxy.
    pub const DENIED_PASS: u32 = 128;
    /// What is not allowed is a worker's to answer.
    pub const DENIED_ASK: u32 = 256;
    /// Everything goes to the proxy: the policy is switched off, stale, not wholly understood, or in conflict with another.
    pub const PASSES: u32 = 512;
    /// Answers of the proxy were learned: what has a [`super::term::LEARNED`] is a worker's, all else the proxy's.
    pub const LEARNED: u32 = 1024;
}

/// Key of `TEMPLATES`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Template {
    /// The table's generation.
    pub generation: u32,
    /// As in [`Rule`].
    pub number: u32,
}

/// Bytes that fit before the date of an answer, between date and origin, and behind the origin.
pub const MAX_FRONT: usize = 40;
/// The same.
pub const MAX_MIDDLE: usize = 56;
/// The same.
pub const MAX_TAIL: usize = 1024;

/// Value of `TEMPLATES`: the bytes of an answer before its date, between date and origin, and behind the origin.
///
/// Sums are of 16-bit words in the order of memory (RFC 1071), as if each piece began at an even offset.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pieces {
    /// Bytes before the date.
    pub front_length: u32,
    /// Bytes between date and origin.
    pub middle_length: u32,
    /// Bytes behind the origin.
    pub tail_length: u32,
    /// 1: the origin stands before the tail.
    pub origin: u32,
    /// Sum of the front.
    pub front_sum: u32,
    /// Sum of the middle.
    pub middle_sum: u32,
    /// Sum of the tail.
    pub tail_sum: u32,
    /// Zero.
    pub zero: u32,
    /// Before the date.
    pub front: [u8; MAX_FRONT],
    /// Between date and origin.
    pub middle: [u8; MAX_MIDDLE],
    /// Behind the origin.
    pub tail: [u8; MAX_TAIL],
}

/// Bytes of a date.
pub const DATE: u32 = 29;

/// Value of `DATES`: the `Date` of a second.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Date {
    /// Since 1970.
    pub second: u32,
    /// Sum of the text, as in [`Pieces`].
    pub sum: u32,
    /// IMF-fixdate (RFC 9110 §5.6.7), 29 bytes, and zeros.
    pub text: [u8; 32],
}

macro_rules! slots {
    ($(#[$module:meta])* $name:ident { $($(#[$doc:meta])* $slot:ident = $label:literal,)+ }) => {
        $(#[$module])*
        pub mod $name {
            #[repr(u32)]
            enum Slot { $($slot,)+ }
            $($(#[$doc])* #[expect(non_upper_case_globals, reason = "named like the variants of an enum")]
              pub const $slot: u32 = Slot::$slot as u32;)+
            /// The stable name of each slot, in order: a metric label.
            pub const NAMES: &[&str] = &[$($label,)+];
            /// How many slots there are.
            pub const SLOTS: u32 = NAMES.len() as u32;
        }
    };
}

slots! {
    /// Slots of `EVENTS`, one `u64` for each CPU: what the program did.
    event {
        /// Packets to served ports.
        Packet = "packet",
        /// SYNs to served ports.
        Syn = "syn",
        /// SYN-ACKs sent by the program; a resent one counts.
        SynAck = "syn_ack",
        /// Of these: to a SYN that was sent again.
        SynAgain = "syn_again",
        /// Of these: to a SYN whose addresses and ports were in TIME_WAIT.
        TimeWaitReused = "time_wait_reused",
        /// Acknowledgements sent to a SYN for a connection that waits already (RFC 9293 §3.10.7.4).
        Challenge = "challenge",
        /// Acknowledgements of a SYN-ACK, dropped: the connection waits for its first data.
        Ack = "ack",
        /// TCP keepalives of clients that nobody else has, answered.
        Keepalive = "keepalive",
        /// Data behind the first segment that came before it, dropped: the client sends it again.
        OutOfOrder = "out_of_order",
        /// Segments of a connection that is ours with impossible numbers: left to the kernel, which resets, or answered by an
        /// acknowledgement if it was answered on.
        BadNumbers = "bad_numbers",
        /// Connections that the client reset while they were ours.
        ClientReset = "client_reset",
        /// Connections that were given to a listener a second time, as the kernel had no room at first.
        GivenAgain = "given_again",
        /// The kernel refused to make the connection.
        AssignFailed = "assign_failed",
        /// A preflight for a worker whose socket is gone: given to the proxy.
        WorkerGone = "worker_gone",
        /// A preflight for a worker with a full accept queue: given to the proxy.
        WorkerFull = "worker_full",
        /// The proxy's accept queue is full: the segment is dropped, as the kernel does.
        ProxyFull = "proxy_full",
        /// A preflight that a worker had to turn away before: given to the proxy.
        Marked = "marked",
        /// Connections whose entry was evicted, accepted by their cookie.
        CookieGood = "cookie_good",
        /// Segments without an entry whose cookie is wrong.
        CookieBad = "cookie_bad",
        /// Segments whose cookie was not looked at: too many in this second.
        CookieBudget = "cookie_budget",
        /// Entries made in `PENDING`.
        Inserted = "inserted",
        /// Entries removed by the program.
        Removed = "removed",
        /// Nanoseconds that sampled packets took.
        SampledNs = "sampled_ns",
        /// How many were sampled.
        Sampled = "sampled",
        /// Answers sent by the program; a resent one counts.
        KernelAnswer = "kernel_answer",
        /// Of these: to a request that was sent again.
        KernelAnswerAgain = "kernel_answer_again",
        /// Requests that were sent again when the bytes of their answer were gone: reset.
        KernelAnswerGone = "kernel_answer_gone",
        /// Connections that the program has answered on, and then given to a worker or the proxy.
        HandedOver = "handed_over",
        /// Ends of such connections that were answered; a resent one counts.
        KernelEnd = "kernel_end",
        /// Entries made in `ANSWERED`.
        AnsweredInserted = "answered_inserted",
        /// Entries of it removed by the program.
        AnsweredRemoved = "answered_removed",
        /// Nanoseconds that answers took, of those among the sampled packets.
        AnswerNs = "answer_ns",
        /// How many these are.
        AnswerSampled = "answer_sampled",
    }
}

slots! {
    /// Slots of `ASKED`, one `u64` for each CPU: why a preflight, or what began like one, was not the program's to answer.
    ask {
        /// Nothing: it was answered.
        Nothing = "nothing",
        /// Kernel answers are off, or there is no table yet.
        Off = "off",
        /// The segment is longer than what is looked at, was merged of several, ends the connection, or is odd in another way.
        Segment = "segment",
        /// The head is not complete.
        Incomplete = "incomplete",
        /// A byte that is no printable ASCII, or a line that does not end in CRLF.
        Bytes = "bytes",
        /// More lines than a head may have.
        Lines = "lines",
        /// Another version than HTTP/1.1.
        Version = "version",
        /// A target that is not origin-form, or that proxies may read differently.
        Target = "target",
        /// A header's name is odd.
        Name = "name",
        /// A header that the program does not judge.
        Header = "header",
        /// A header that may stand once stands twice.
        Repeated = "repeated",
        /// A value that the program does not judge.
        Value = "value",
        /// Something stands behind the head.
        Behind = "behind",
        /// `Host`, `Origin` or `Access-Control-Request-Method` is missing.
        NoPreflight = "no_preflight",
        /// A host that is odd, long, an address, or has a port that is not the listener's.
        Host = "host",
        /// A host that is not in the table.
        UnknownHost = "unknown_host",
        /// The host has paths longer than the program compares.
        LongPath = "long_path",
        /// The host has regular expressions.
        Regex = "regex",
        /// The policy echoes, is switched off, stale, in conflict, or too long.
        Rules = "rules",
        /// An origin that the program cannot judge.
        Origin = "origin",
        /// A method that the program cannot judge.
        Method = "method",
        /// Requested headers that the program cannot judge.
        Names = "names",
        /// The answer does not fit in what the client takes.
        Room = "room",
        /// `ANSWERED` is full.
        Connections = "connections",
    }
}

slots! {
    /// Columns of `OUTCOMES`, one `u64` for each CPU: what the program decided, by route.
    outcome {
        /// Answered: allowed.
        Allowed = "allowed",
        /// Answered: the origin is not allowed.
        DeniedOrigin = "denied_origin",
        /// Answered: the method is not allowed.
        DeniedMethod = "denied_method",
        /// Answered: a requested header is not allowed.
        DeniedHeaders = "denied_headers",
        /// The proxy's: the origin is not allowed.
        PassedOrigin = "passed_origin",
        /// The proxy's: the method is not allowed.
        PassedMethod = "passed_method",
        /// The proxy's: a requested header is not allowed.
        PassedHeaders = "passed_headers",
        /// The proxy's: no policy has the path, or none that answers.
        PassedRoute = "passed_route",
    }
}

slots! {
    /// Slots of `FAIL_OPENS`, one `u64` for each CPU: why a new connection was left to the kernel's own handshake.
    fail_open {
        /// The daemon's heartbeat is stale.
        Heartbeat = "heartbeat",
        /// The port was disengaged.
        Disengaged = "disengaged",
        /// Not among the share of `steer.percent`.
        Percent = "percent",
        /// Nobody listens.
        NoListener = "no_listener",
        /// There is a connection of these addresses and ports.
        Existing = "existing",
        /// These addresses and ports are in TIME_WAIT, and the kernel would not reuse them.
        TimeWait = "time_wait",
        /// The proxy listens with MPTCP.
        Mptcp = "mptcp",
        /// The proxy's accept queue is full.
        AcceptQueue = "accept_queue",
        /// `PENDING` is nearly full.
        Pressure = "pressure",
        /// The entry could not be made.
        Insert = "insert",
        /// The packet is a fragment, or has IP options or IPv6 extension headers.
        IpOptions = "ip_options",
        /// The SYN has data, TCP Fast Open, or flags that are not a plain SYN's.
        OddSyn = "odd_syn",
        /// The client's MSS is below what the kernel takes, or its options make no sense.
        Mss = "mss",
        /// The answer might leave by another interface.
        Route = "route",
        /// The interface is not known yet.
        Interface = "interface",
        /// The reply could not be written.
        Reply = "reply",
    }
}

slots! {
    /// Slots of `SWEPT`: what the last sweep of `PENDING` found.
    swept {
        /// Entries by stage.
        Observed = "observed",
        /// A SYN-ACK is out.
        Deferred = "deferred",
        /// It is acknowledged.
        Acknowledged = "acknowledged",
        /// A listener has it.
        Given = "given",
        /// Of the acknowledged ones: silent for ten seconds.
        Silent = "silent",
        /// Removed by this sweep, and in none of the others.
        Removed = "removed",
        /// Entries of `ANSWERED`.
        Answered = "answered",
        /// Entries of it that were removed, and are in none of the others.
        AnsweredRemoved = "answered_removed",
    }
}

slots! {
    /// Columns of `PORT_COUNTS`, one `u64` for each CPU: what connections to a port turned out to be.
    kind {
        /// New connections seen.
        Syn = "syn",
        /// Opens with a preflight that a policy may answer.
        Preflight = "preflight",
        /// Opens with another OPTIONS.
        Options = "options",
        /// Opens with another request.
        Other = "other",
        /// TLS.
        Tls = "tls",
        /// HTTP/2 without TLS.
        H2c = "h2c",
        /// PROXY protocol in front.
        ProxyProtocol = "proxy_protocol",
        /// The server spoke first.
        ServerFirst = "server_first",
        /// OPTIONS later on a connection: the proxy's. Seen while observing only.
        Pooled = "pooled_options",
        /// Answered by the program.
        Kernel = "kernel",
        /// Given to a worker.
        Worker = "worker",
        /// Given to the proxy.
        Proxy = "proxy",
        /// Ended without data: a health check, or a connection opened ahead of need.
        Silent = "silent",
    }
}

const _: () = assert!(size_of::<Flow>() == 36);
const _: () = assert!(size_of::<Endpoint>() == 20);
const _: () = assert!(size_of::<Service>() == 20);
const _: () = assert!(size_of::<Config>() == 56);
const _: () = assert!(size_of::<Interface>() == 8);
const _: () = assert!(size_of::<Pending>() == 20);
const _: () = assert!(size_of::<Host>() == 16);
const _: () = assert!(size_of::<Answered>() == 48);
const _: () = assert!(size_of::<Term>() == 80);
const _: () = assert!(size_of::<Value>() == 32 && size_of::<Rule>() == 32 && size_of::<Routes>() == 24);
const _: () = assert!(size_of::<Template>() == 8);
const _: () = assert!(size_of::<Pieces>() == 1152);
const _: () = assert!(size_of::<Date>() == 40);
const _: () = assert!(size_of::<Sample>() == 2056);

#[cfg(feature = "user")]
mod pod {
    #![expect(
        unsafe_code,
        reason = "aya's marker for types that may cross into a map is unsafe to implement"
    )]

    use super::{
        Answered, Config, Date, Endpoint, Flow, Host, Interface, Pending, Pieces, Service, Template, Term,
    };

    macro_rules! pod {
        ($($type:ty),+) => {
            // SAFETY: each is `repr(C)` over integers, without padding (sizes asserted above); every bit pattern is a value.
            $(unsafe impl aya::Pod for $type {})+
        };
    }

    pod!(Answered, Config, Date, Endpoint, Flow, Host, Interface, Pending, Pieces, Service, Template, Term);
}
