//! One client connection as a state machine without sockets: bytes in, answers out, and what to do next.
//!
//! It works in turns: read, answer all complete requests, send, read again. While answers are being sent nothing is
//! read, so a client that does not read its answers is not read from either, and both buffers stay bounded. An engine
//! ([`super::uring`], [`super::epoll`]) does what [`Connection::advance`] says and tells what came of it.
#![forbid(unsafe_code)]

use crate::{
    ask::Sampler,
    http::{Head, HeadLimits, HeadReader, error::ErrorResponse},
    policy::{Connection as Persistence, Decision, ListenerId, Preflight, RouteId, Table},
    reason::PassReason,
    telemetry::WorkerStats,
    worker::Serves,
};
use std::{
    cell::{Cell, RefCell},
    mem,
    time::Duration,
};

/// Read buffer at first, in bytes: a browser's preflight is about 600. It doubles as a longer head needs it.
const INPUT: usize = 4096;

/// What a connection may keep of a read buffer that had to grow.
const INPUT_KEEP: usize = 16 * 1024;

/// Answers are rendered ahead up to this many bytes; then they are sent before the next request is looked at.
const OUTPUT_BOUND: usize = 64 * 1024;

/// What an idle connection may keep of a send buffer that had to grow.
const OUTPUT_KEEP: usize = 8 * 1024;

/// What is read and thrown away at most after the last answer, so that the client can take the answer.
const LINGER_BYTES: usize = 256 * 1024;

/// How long that may take.
pub(super) const LINGER: Duration = Duration::from_secs(2);

/// What answering needs beside the connection: borrowed from the worker for one call.
#[derive(Debug)]
pub(super) struct Context<'a> {
    pub(super) table: &'a Table,
    pub(super) date: &'a [u8; 29],
    pub(super) head: HeadLimits,
    pub(super) stats: &'a WorkerStats,
    /// Shutting down: the last answer of each connection says so.
    pub(super) draining: bool,
    /// Answers rendered, to weigh the latency by.
    pub(super) answers: &'a Cell<u64>,
    /// What preflights are shown to.
    pub(super) sampler: Option<&'a RefCell<Sampler>>,
}

/// What the engine must do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Read into [`Connection::space`].
    Read,
    /// Send [`Connection::unsent`].
    Send,
    /// Send, and when all is sent, read: nothing of another request is there, and nothing else is to be done while the
    /// connection is idle. Plain [`Step::Send`] will do as well.
    SendThenRead,
    /// Send, and when all is sent, close, best in one packet: nothing that was received is left unread, and the client
    /// has said that this was its last request. Plain [`Step::Send`] will do as well.
    SendThenClose,
    /// Shut the sending side, then tell by [`Connection::shut`].
    Shut,
    /// Everything is sent, the rest is the upstream's: [`Connection::take_rest`].
    HandOver(PassReason),
    /// Close.
    Close,
}

/// What a connection waits for; each has its timeout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Wait {
    /// The client's first byte.
    First,
    /// The next request to begin.
    Idle,
    /// A head to be completed.
    Head,
    /// The client to take its answers.
    Send,
    /// The client to close after its last answer.
    Linger,
    /// A place to hand the connection over to.
    Relay,
}

/// How the connection ends once all answers are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// Not in sight.
    Open,
    /// With a close; `linger` if the client may still be sending: what comes unread makes the kernel reset the
    /// connection, and eats the answer (RFC 9112 §9.6).
    Close { linger: bool },
    /// The sending side is shut; what still comes is thrown away.
    Lingering,
    /// At the upstream.
    HandOver(PassReason),
    /// At once: the socket is of no use any more.
    Dead,
}

/// One connection. Its buffers stay with it when it is used for the next client.
#[derive(Debug)]
pub(super) struct Connection {
    input: Vec<u8>,
    /// `input[begin..filled]` is read and not answered.
    begin: usize,
    filled: usize,
    output: Vec<u8>,
    sent: usize,
    reader: HeadReader,
    end: End,
    eof: bool,
    /// The socket has more to read.
    more: bool,
    lingered: usize,
    /// What the timer that runs is for, and whether to start it anew.
    wait: Wait,
    restart: bool,
    /// A byte has come.
    spoken: bool,
    listener: ListenerId,
    serves: Serves,
}

impl Connection {
    /// A connection without a client yet.
    pub(super) fn new() -> Self {
        Self {
            input: Vec::new(),
            begin: 0,
            filled: 0,
            output: Vec::new(),
            sent: 0,
            reader: HeadReader::new(),
            end: End::Open,
            eof: false,
            more: false,
            lingered: 0,
            wait: Wait::First,
            spoken: false,
            restart: true,
            listener: ListenerId(0),
            serves: Serves::Alone,
        }
    }

    /// Ready for another client of this listener.
    pub(super) fn reset(&mut self, listener: ListenerId, serves: Serves) {
        let mut input = mem::take(&mut self.input);
        let mut output = mem::take(&mut self.output);
        if input.len() != INPUT {
            input = vec![0; INPUT];
        }
        output.clear();
        output.shrink_to(OUTPUT_KEEP);
        *self = Self { input, output, listener, serves, ..Self::new() };
    }

    /// The listener that it came by.
    pub(super) fn listener(&self) -> ListenerId {
        self.listener
    }

    /// Room to read into; never empty. What was there before stays where it is until the next call.
    pub(super) fn space(&mut self) -> &mut [u8] {
        if self.begin > 0 {
            self.input.copy_within(self.begin..self.filled, 0);
            self.filled -= self.begin;
            self.begin = 0;
        }
        if self.filled == self.input.len() {
            // Bounded: beyond `HeadLimits::max_bytes` the head reader says `Pass`.
            self.input.resize((self.input.len() * 2).max(INPUT), 0);
        }
        &mut self.input[self.filled..]
    }

    /// `n` bytes were read into [`Connection::space`], `more` are known to wait; none: the client sends no more.
    pub(super) fn received(&mut self, n: usize, more: bool) {
        if n == 0 {
            self.eof = true;
            self.more = false;
            return;
        }
        self.more = more;
        if self.end == End::Lingering {
            self.lingered += n;
            return;
        }
        self.restart |= self.begin == self.filled;
        self.spoken = true;
        self.filled += n;
    }

    /// These were read elsewhere; `more` are known to wait.
    pub(super) fn take(&mut self, mut bytes: &[u8], more: bool) {
        while !bytes.is_empty() {
            let space = self.space();
            let (now, rest) = bytes.split_at(bytes.len().min(space.len()));
            space[..now.len()].copy_from_slice(now);
            self.received(now.len(), more || !rest.is_empty());
            bytes = rest;
        }
    }

    /// What is to be sent.
    pub(super) fn unsent(&self) -> &[u8] {
        &self.output[self.sent..]
    }

    /// The kernel took `n` bytes of [`Connection::unsent`].
    pub(super) fn sent(&mut self, n: usize) {
        self.sent += n;
        debug_assert!(self.sent <= self.output.len());
    }

    /// The kernel took all of it.
    pub(super) fn all_sent(&mut self) {
        self.sent = self.output.len();
    }

    /// The sending side is shut.
    pub(super) fn shut(&mut self) {
        self.end = End::Lingering;
    }

    /// The socket failed, or its time is over: close at once.
    pub(super) fn fail(&mut self) {
        self.end = End::Dead;
    }

    /// What it waited for did not come in time.
    pub(super) fn timed_out(&mut self, wait: Wait, cx: &Context<'_>) {
        match wait {
            Wait::Head => {
                cx.stats.header_timeouts.add(1);
                self.refuse(ErrorResponse::RequestTimeout, cx);
            }
            Wait::Relay => self.refuse(ErrorResponse::Overloaded, cx),
            Wait::First | Wait::Idle => {
                cx.stats.idle_timeouts.add(1);
                self.end = End::Dead;
            }
            Wait::Send => {
                cx.stats.send_timeouts.add(1);
                self.end = End::Dead;
            }
            Wait::Linger => self.end = End::Dead,
        }
    }

    /// The bytes that are the upstream's, and whether the client has half-closed.
    pub(super) fn take_rest(&mut self) -> (Vec<u8>, bool) {
        (self.input[self.begin..self.filled].to_vec(), self.eof)
    }

    /// Answers what can be answered and says what to do next.
    #[inline]
    pub(super) fn advance(&mut self, cx: &Context<'_>) -> Step {
        if self.end == End::Dead {
            return Step::Close;
        }
        if self.unsent().is_empty() {
            self.output.clear();
            self.sent = 0;
            if self.end == End::Open {
                self.answer(cx);
                if self.begin == self.filled && self.input.len() > INPUT_KEEP {
                    (self.begin, self.filled) = (0, 0);
                    self.input.truncate(INPUT);
                    self.input.shrink_to_fit();
                }
            }
        }
        let sending = !self.unsent().is_empty();
        match self.end {
            End::Open if sending && self.eof => Step::Send,
            End::Open if sending && self.begin == self.filled && self.output.capacity() <= OUTPUT_KEEP => {
                Step::SendThenRead
            }
            End::Close { linger: false } if sending => Step::SendThenClose,
            _ if sending => Step::Send,
            End::Open if self.eof => Step::Close,
            End::Open => {
                if self.filled == self.begin && self.output.capacity() > OUTPUT_KEEP {
                    self.output.shrink_to(OUTPUT_KEEP);
                }
                Step::Read
            }
            End::Close { linger: true } if !self.eof => Step::Shut,
            End::Lingering if !self.eof && self.lingered < LINGER_BYTES => Step::Read,
            End::Close { .. } | End::Lingering | End::Dead => Step::Close,
            End::HandOver(reason) => Step::HandOver(reason),
        }
    }

    /// What it waits for now, if the timer has to start anew for it.
    #[inline]
    pub(super) fn timer(&mut self) -> Option<Wait> {
        let wait = match self.end {
            _ if !self.unsent().is_empty() => Wait::Send,
            End::Close { .. } | End::Lingering | End::Dead => Wait::Linger,
            End::HandOver(_) => Wait::Relay,
            End::Open if self.begin < self.filled => Wait::Head,
            End::Open if self.spoken => Wait::Idle,
            End::Open => Wait::First,
        };
        let restart = mem::take(&mut self.restart) || wait != self.wait;
        self.wait = wait;
        restart.then_some(wait)
    }

    /// Has [`Connection::timer`] start the timer anew.
    pub(super) fn restart_timer(&mut self) {
        self.restart = true;
    }

    /// Reads the requests in the buffer in order: answers until one is not ours, not complete, or the last.
    fn answer(&mut self, cx: &Context<'_>) {
        while self.output.len() < OUTPUT_BOUND && self.begin < self.filled {
            let rest = &self.input[self.begin..self.filled];
            let only = self.serves == Serves::BesideProxy;
            match answer_one(&mut self.reader, rest, self.listener, self.more, only, &mut self.output, cx) {
                One::Incomplete if self.eof => return self.pass(PassReason::Truncated, RouteId::OTHER, cx),
                One::Incomplete => return,
                One::Pass(reason, route) => return self.pass(reason, route, cx),
                One::Answered { len, end } => {
                    self.begin += len;
                    self.reader = HeadReader::new();
                    self.restart = true;
                    if let End::Close { linger } = end {
                        self.end = End::Close { linger: linger || self.more || self.begin < self.filled };
                        return;
                    }
                }
            }
        }
    }

    /// The request at `begin` is not ours.
    fn pass(&mut self, reason: PassReason, route: RouteId, cx: &Context<'_>) {
        cx.stats.passed(route, reason);
        if self.serves == Serves::Alone {
            self.refuse(refusal(reason), cx);
        } else {
            self.end = End::HandOver(reason);
        }
    }

    /// An error response, then the end. The client may be sending a body: linger.
    fn refuse(&mut self, error: ErrorResponse, cx: &Context<'_>) {
        cx.stats.error_responses.add(1);
        error.render(cx.date, &mut self.output);
        self.begin = self.filled;
        self.end = End::Close { linger: true };
    }
}

/// What came of one request.
enum One {
    Incomplete,
    Pass(PassReason, RouteId),
    /// Its head had `len` bytes.
    Answered {
        len: usize,
        end: End,
    },
}

/// Answers the request that `bytes` begin with; `more` bytes are known to follow them. `only`: it is the connection's
/// only one.
#[inline]
fn answer_one(
    reader: &mut HeadReader,
    bytes: &[u8],
    listener: ListenerId,
    more: bool,
    only: bool,
    output: &mut Vec<u8>,
    cx: &Context<'_>,
) -> One {
    let head = match reader.read(bytes, cx.head) {
        Head::Incomplete => return One::Incomplete,
        Head::Pass(reason) => return One::Pass(reason, RouteId::OTHER),
        Head::Preflight(head) => head,
    };
    let request = Preflight {
        listener,
        host: head.host,
        target: head.target,
        origin: head.origin,
        method: head.method,
        headers: &head.headers,
        private_network: head.private_network,
    };
    let decision = cx.table.decide(&request);
    if let Some(sampler) = cx.sampler {
        let mut sampler = sampler.borrow_mut();
        sampler.see(listener, &bytes[..head.len], &decision);
        if let Decision::Answer(answer) = &decision
            && sampler.is_shadow()
        {
            return One::Pass(PassReason::Shadow, answer.route);
        }
    }
    let answer = match decision {
        Decision::Answer(answer) => answer,
        Decision::Pass(reason, route) => return One::Pass(reason, route),
    };
    let last = bytes.len() == head.len && !more;
    let persistence = if only || (cx.draining && last) { Persistence::Close } else { head.connection };
    answer.render(cx.date, persistence, output);
    cx.stats.answered(answer.route, answer.outcome);
    cx.answers.set(cx.answers.get() + 1);
    let end = match persistence {
        Persistence::Close => End::Close { linger: head.connection != Persistence::Close },
        _ => End::Open,
    };
    One::Answered { len: head.len, end }
}

/// What a client is told where there is nobody to pass its request to.
fn refusal(reason: PassReason) -> ErrorResponse {
    match reason {
        PassReason::HeadTooLarge => ErrorResponse::HeadTooLarge,
        PassReason::MalformedHead
        | PassReason::BareLf
        | PassReason::ObsFold
        | PassReason::Version
        | PassReason::Truncated
        | PassReason::BadTarget
        | PassReason::BadHost
        | PassReason::BadOrigin
        | PassReason::BadRequestMethod => ErrorResponse::BadRequest,
        _ => ErrorResponse::Misdirected,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::testing::{GET, HEAD_LIMITS, REQUEST, request, table};
    use PassReason::{NoHost, NotOptions, Truncated};

    const DATE: &[u8; 29] = b"Sun, 06 Nov 1994 08:49:37 GMT";

    /// What a client saw of a connection that was driven until it had to wait.
    #[derive(Debug, Default, PartialEq)]
    struct Seen {
        answers: Vec<u8>,
        end: Ended,
    }

    #[derive(Debug, Default, PartialEq)]
    enum Ended {
        #[default]
        Open,
        Closed,
        /// The sending side was shut and the rest read, then it was closed.
        Lingered,
        Passed(PassReason, Vec<u8>, bool),
    }

    struct Driver {
        connection: Connection,
        table: Table,
        stats: WorkerStats,
        draining: bool,
        answers: Cell<u64>,
        /// The kernel takes so many bytes at once.
        send: usize,
        /// The client is done sending.
        eof: bool,
        lingered: bool,
        seen: Seen,
    }

    impl Driver {
        fn new(serves: Serves) -> Self {
            let mut connection = Connection::new();
            connection.reset(ListenerId(0), serves);
            Self {
                connection,
                table: table(1),
                stats: WorkerStats::new(8),
                draining: false,
                answers: Cell::new(0),
                send: usize::MAX,
                eof: false,
                lingered: false,
                seen: Seen::default(),
            }
        }

        fn context(&self) -> Context<'_> {
            let Self { table, stats, draining, answers, .. } = self;
            Context {
                table,
                date: DATE,
                head: HEAD_LIMITS,
                stats,
                draining: *draining,
                answers,
                sampler: None,
            }
        }

        /// The next step; the borrow of the context ends with it.
        fn step(&mut self) -> Step {
            let mut connection = mem::replace(&mut self.connection, Connection::new());
            let step = connection.advance(&self.context());
            self.connection = connection;
            step
        }

        /// The client sends these bytes, of which the engine reads as many at once as there is room for.
        fn feed(&mut self, mut bytes: &[u8]) -> &mut Self {
            while self.seen.end == Ended::Open {
                match self.step() {
                    Step::Read if bytes.is_empty() && !self.eof => return self,
                    Step::Read => {
                        let space = self.connection.space();
                        let n = bytes.len().min(space.len());
                        space[..n].copy_from_slice(&bytes[..n]);
                        bytes = &bytes[n..];
                        self.connection.received(n, !bytes.is_empty());
                    }
                    Step::Send | Step::SendThenRead | Step::SendThenClose => {
                        let unsent = self.connection.unsent();
                        assert!(unsent.len() <= OUTPUT_BOUND + 4096, "unbounded answers");
                        let n = unsent.len().min(self.send);
                        self.seen.answers.extend_from_slice(&unsent[..n]);
                        self.connection.sent(n);
                    }
                    Step::Shut => {
                        self.lingered = true;
                        self.connection.shut();
                    }
                    Step::Close => {
                        self.seen.end = if self.lingered { Ended::Lingered } else { Ended::Closed }
                    }
                    Step::HandOver(reason) => {
                        assert!(self.connection.unsent().is_empty(), "answers come first");
                        let (mut rest, eof) = self.connection.take_rest();
                        // What the engine has not read is still in the socket.
                        rest.extend_from_slice(bytes);
                        self.seen.end = Ended::Passed(reason, rest, eof);
                    }
                }
            }
            self
        }

        fn end(&mut self) -> &mut Self {
            self.eof = true;
            self.feed(b"")
        }

        /// The status of each response; a body may name the protocol too.
        fn statuses(&self) -> Vec<u16> {
            let text = String::from_utf8(self.seen.answers.clone()).expect("text");
            text.split("HTTP/1.1 ").filter_map(|rest| rest.get(..3)?.parse().ok()).collect()
        }
    }

    fn closing() -> Vec<u8> {
        request("Connection: close\r\n")
    }

    #[test]
    fn what_becomes_of_a_connection_however_it_is_split() {
        /// Name, bytes, whether the client then half-closes, statuses, end.
        type Case<'a> = (&'a str, Vec<u8>, bool, &'a [u16], Ended);
        let two_then_get = [REQUEST, REQUEST, GET].concat();
        let cut = &REQUEST[..60];
        let foreign =
            String::from_utf8(REQUEST.to_vec()).expect("text").replace("api.example", "www.example");
        #[rustfmt::skip]
        let cases: &[Case<'_>] = &[
            ("keep-alive", REQUEST.to_vec(), false, &[204], Ended::Open),
            ("pipelined", REQUEST.repeat(3), false, &[204, 204, 204], Ended::Open),
            ("half-closed behind requests", REQUEST.repeat(2), true, &[204, 204], Ended::Closed),
            ("nothing at all", vec![], true, &[], Ended::Closed),
            ("close", closing(), false, &[204], Ended::Closed),
            ("close and half-close", closing(), true, &[204], Ended::Closed),
            ("two, then not ours", two_then_get, false, &[204, 204], Ended::Passed(NotOptions, GET.into(), false)),
            ("not ours", GET.to_vec(), false, &[], Ended::Passed(NotOptions, GET.into(), false)),
            ("foreign host", foreign.clone().into(), false, &[], Ended::Passed(NoHost, foreign.into(), false)),
            ("cut off", cut.to_vec(), true, &[], Ended::Passed(Truncated, cut.into(), true)),
            ("cut off behind one", [REQUEST, cut].concat(), true, &[204], Ended::Passed(Truncated, cut.into(), true)),
        ];
        for (name, bytes, eof, statuses, end) in cases {
            for split in 0..bytes.len().max(1) {
                let mut driver = Driver::new(Serves::BeforeProxy);
                driver.feed(&bytes[..split]);
                // What is beyond the end of a passed connection is the relay's to read.
                let passed = matches!(driver.seen.end, Ended::Passed(..));
                if let Ended::Passed(_, rest, _) = &mut driver.seen.end {
                    rest.extend_from_slice(&bytes[split..]);
                } else {
                    driver.feed(&bytes[split..]);
                }
                if *eof && !passed {
                    driver.end();
                }
                assert_eq!(driver.statuses(), *statuses, "{name}, split at {split}");
                assert_eq!(driver.seen.end, *end, "{name}, split at {split}");
            }
        }
    }

    #[test]
    fn without_an_upstream_it_says_why() {
        let large = [b"OPTIONS / HTTP/1.1\r\nHost: a\r\nX: ", &vec![b'a'; 20_000][..]].concat();
        for (name, bytes, eof, status) in [
            ("another method", GET.to_vec(), false, 421),
            ("malformed", b"OPTIONS / HTTP/1.1\r\nHost : a\r\n\r\n".to_vec(), false, 400),
            ("too large", large, false, 431),
            ("cut off", REQUEST[..40].to_vec(), true, 400),
        ] {
            let mut driver = Driver::new(Serves::Alone);
            driver.feed(&bytes);
            driver.end();
            assert_eq!(driver.statuses(), [status], "{name}");
            // The client may be in the midst of a body: it is read before the close, unless the client has ended.
            assert_eq!(driver.seen.end, if eof { Ended::Closed } else { Ended::Lingered }, "{name}");
            assert_eq!(driver.stats.error_responses.get(), 1, "{name}");
        }
    }

    #[test]
    fn bytes_behind_the_last_answer_are_read_but_not_without_end() {
        let mut driver = Driver::new(Serves::BeforeProxy);
        driver.feed(&[&closing(), REQUEST].concat());
        assert_eq!((driver.statuses(), &driver.seen.end), (vec![204], &Ended::Open), "lingers");
        driver.end();
        assert_eq!(driver.seen.end, Ended::Lingered);

        let mut driver = Driver::new(Serves::BeforeProxy);
        driver.feed(&[closing(), vec![b'x'; 10 << 20]].concat());
        assert_eq!(driver.seen.end, Ended::Lingered, "gives up");
    }

    #[test]
    fn a_slow_reader_bounds_what_is_answered_ahead() {
        let mut driver = Driver::new(Serves::BeforeProxy);
        driver.send = 100;
        driver.feed(&[REQUEST.repeat(1000), GET.to_vec()].concat());
        assert_eq!(driver.statuses(), [204; 1000]);
        assert_eq!(driver.seen.end, Ended::Passed(NotOptions, GET.into(), false));
        assert_eq!(driver.answers.get(), 1000);
    }

    #[test]
    fn what_a_burst_made_grow_shrinks() {
        let mut driver = Driver::new(Serves::BeforeProxy);
        driver.connection.take(&REQUEST.repeat(500), false);
        driver.feed(b"");
        assert_eq!(driver.statuses().len(), 500);
        assert!(driver.connection.input.len() <= INPUT_KEEP);
        assert!(driver.connection.output.capacity() <= OUTPUT_KEEP);
        driver.feed(REQUEST);
        assert_eq!(driver.statuses().len(), 501);
    }

    #[test]
    fn draining_the_last_answer_says_close() {
        let mut driver = Driver::new(Serves::BeforeProxy);
        driver.feed(&REQUEST[..50]);
        driver.draining = true;
        driver.feed(&[&REQUEST[50..], REQUEST].concat());
        let answers = String::from_utf8(driver.seen.answers.clone()).expect("text");
        assert_eq!(driver.statuses(), [204, 204]);
        assert_eq!(answers.matches("Connection: close").count(), 1);
        assert!(answers.rfind("Connection: close") > answers.rfind("204"));
        assert_eq!(driver.seen.end, Ended::Open, "it may be sending the next: lingers");
        driver.end();
        assert_eq!(driver.seen.end, Ended::Lingered);
    }

    #[test]
    fn timeouts() {
        for (name, wait, bytes, status, end) in [
            ("head", Wait::Head, &REQUEST[..10], Some(408), Ended::Lingered),
            ("relay", Wait::Relay, GET, Some(503), Ended::Lingered),
            ("idle", Wait::Idle, &b""[..], None, Ended::Closed),
            ("send", Wait::Send, &b""[..], None, Ended::Closed),
        ] {
            let mut driver = Driver::new(Serves::BeforeProxy);
            if wait != Wait::Relay {
                driver.feed(bytes);
            }
            let mut connection = mem::replace(&mut driver.connection, Connection::new());
            connection.timed_out(wait, &driver.context());
            driver.connection = connection;
            driver.feed(b"").end();
            assert_eq!(driver.statuses(), status.into_iter().collect::<Vec<_>>(), "{name}");
            assert_eq!(driver.seen.end, end, "{name}");
        }
    }

    #[test]
    fn timers_start_when_something_new_is_waited_for() {
        let mut driver = Driver::new(Serves::BeforeProxy);
        let mut steps = Vec::new();
        let (first, second) = REQUEST.split_at(40);
        let (second, third) = second.split_at(40);
        for bytes in [b"", first, second, third] {
            driver.feed(bytes);
            steps.push(driver.connection.timer());
        }
        // The second piece of a head does not give it more time; an answer begins a new idleness.
        assert_eq!(steps, [Some(Wait::First), Some(Wait::Head), None, Some(Wait::Idle)]);
        driver.feed(&[REQUEST, first].concat());
        assert_eq!(driver.connection.timer(), Some(Wait::Head));
        driver.feed(&[second, third, first].concat());
        assert_eq!(driver.connection.timer(), Some(Wait::Head), "the next head has its own time");
    }

    #[test]
    fn buffers_serve_the_next_client_clean() {
        let mut driver = Driver::new(Serves::BeforeProxy);
        driver.feed(&[REQUEST, &REQUEST[..30]].concat());
        driver.connection.reset(ListenerId(0), Serves::BeforeProxy);
        driver.seen = Seen::default();
        driver.feed(REQUEST);
        assert_eq!(driver.statuses(), [204]);
        assert_eq!(driver.connection.space().len(), INPUT);
    }
}
