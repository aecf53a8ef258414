//! One client connection as a state machine without sockets: bytes in, answers out, and what to do next.
//!
//! It works in turns: read, answer all complete requests, send, read again. While answers are being sent nothing is
//! read, so a client that does not read its answers is not read from either, and both buffers stay bounded. An engine
//! ([`super::uring`], [`super::epoll`]) does what [`Connection::advance`] says and tells what came of it.
#![forbid(unsafe_code)]

use crate::{
    http::{Head, HeadLimits, HeadReader, error::ErrorResponse},
    policy::{Connection as Persistence, Decision, ListenerId, Preflight, RouteId, Table},
    reason::PassReason,
    telemetry::WorkerStats,
};
use std::{cell::Cell, mem, time::Duration};

/// Read buffer at first, in bytes: a browser's preflight is about 600. It doubles as a longer head needs it.
const INPUT: usize = 4096;

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
}

/// What the engine must do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Read into [`Connection::space`].
    Read,
    /// Send [`Connection::unsent`].
    Send,
    /// Send, and when all is sent, read: no other request waits. Plain [`Step::Send`] will do as well.
    SendThenRead,
    /// Send, and when all is sent, close: nothing that was received is left unread, which would make the kernel
    /// reset the connection and eat the answer. Plain [`Step::Send`] will do as well.
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
    /// A request to begin.
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
    /// With a close; `linger` if the client may still be sending.
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
    listener: ListenerId,
    has_upstream: bool,
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
            wait: Wait::Idle,
            restart: true,
            listener: ListenerId(0),
            has_upstream: false,
        }
    }

    /// Ready for another client of this listener.
    pub(super) fn reset(&mut self, listener: ListenerId, has_upstream: bool) {
        let mut input = mem::take(&mut self.input);
        let mut output = mem::take(&mut self.output);
        if input.len() != INPUT {
            input = vec![0; INPUT];
        }
        output.clear();
        output.shrink_to(OUTPUT_KEEP);
        *self = Self { input, output, listener, has_upstream, ..Self::new() };
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
        self.filled += n;
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

    /// The kernel took all of them.
    pub(super) fn sent_all(&mut self) {
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
            Wait::Idle => {
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
            }
        }
        let sending = !self.unsent().is_empty();
        match self.end {
            End::Open if sending && self.eof => Step::Send,
            End::Open if sending && self.output.len() < OUTPUT_BOUND => Step::SendThenRead,
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
        let wait = if !self.unsent().is_empty() {
            Wait::Send
        } else {
            match self.end {
                End::Close { .. } | End::Lingering | End::Dead => Wait::Linger,
                End::HandOver(_) => Wait::Relay,
                End::Open if self.begin < self.filled => Wait::Head,
                End::Open => Wait::Idle,
            }
        };
        let restart = mem::take(&mut self.restart) | (wait != self.wait);
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
            match answer_one(&mut self.reader, rest, self.listener, self.more, &mut self.output, cx) {
                One::Incomplete if self.eof => return self.pass(PassReason::Truncated, RouteId::OTHER, cx),
                One::Incomplete => return,
                One::Pass(reason, route) => return self.pass(reason, route, cx),
                One::Answered { len, close } => {
                    self.begin += len;
                    self.reader = HeadReader::new();
                    self.restart = true;
                    if close {
                        self.end = End::Close { linger: self.more || self.begin < self.filled };
                        return;
                    }
                }
            }
        }
    }

    /// The request at `begin` is not ours.
    fn pass(&mut self, reason: PassReason, route: RouteId, cx: &Context<'_>) {
        cx.stats.passed(route, reason);
        if self.has_upstream {
            self.end = End::HandOver(reason);
        } else {
            self.refuse(refusal(reason), cx);
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
    /// Its head had `len` bytes; `close`: no other is answered after it.
    Answered {
        len: usize,
        close: bool,
    },
}

/// Answers the request that `bytes` begin with; `more` bytes are known to follow them.
#[inline]
fn answer_one(
    reader: &mut HeadReader,
    bytes: &[u8],
    listener: ListenerId,
    more: bool,
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
    let answer = match cx.table.decide(&request) {
        Decision::Answer(answer) => answer,
        Decision::Pass(reason, route) => return One::Pass(reason, route),
    };
    let last = bytes.len() == head.len && !more;
    let persistence = if cx.draining && last { Persistence::Close } else { head.connection };
    answer.render(cx.date, persistence, output);
    cx.stats.answered(answer.route, answer.outcome);
    cx.answers.set(cx.answers.get() + 1);
    One::Answered { len: head.len, close: persistence == Persistence::Close }
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
