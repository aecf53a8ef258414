//! The io_uring engine: one ring per worker, on the raw crate.
//!
//! Connections live in the ring's file table (direct descriptors): slot N of the table is entry N here. Each entry owns
//! the buffers that the kernel reads and writes for it, and is given to the next client only when no operation of its
//! own is in flight. Linked operations save rounds: accept → recv (the listeners defer accepting until data is there)
//! and send → close. A connection that is kept alive gets a multishot recv with its first answer, which stays while it
//! answers, and whose bytes come in buffers of the kernel's choice; its answers are sent without waiting and without a
//! word if all goes well.

use super::{
    Serves, WorkerListener,
    buffers::{self, Buffers},
    connection::{Connection, Step, Wait},
    shared::{ACCEPT_BACKOFF, HANDOFF_RETRY, Shared},
};
use crate::{policy::ListenerId, reason::PassReason, relay::Handoff};
use io_uring::{
    IoUring, Probe, cqueue, opcode,
    squeue::{self, Flags},
    types::{CancelBuilder, DestinationSlot, Fd, Fixed, Timespec},
};
use rustix::net::SocketFlags;
use std::{
    fmt, io,
    mem::{self, MaybeUninit},
    os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd},
    time::Duration,
};

/// Accepts that are armed at once per listener: so many connections can come in one batch. Measured with a connection
/// per request: from 4 to 8 as good as a multishot accept, which needs a round more; 1 and 64 a fifth dearer.
const ARMED: usize = 8;

/// Entries beyond the connection cap: accepts that are armed at the cap, connections that are being closed for it.
const SPARE: usize = 64;

const SUBMISSIONS: u32 = 1024;

/// IORING_RECVSEND_POLL_FIRST: who has its answer seldom has sent the next request already, so do not try in vain.
const POLL_FIRST: u16 = 1;

/// IORING_RECV_MULTISHOT. Measured on keep-alive: a twentieth of the worker's CPU less than a recv for each request.
const RECV_MULTISHOT: u16 = 2;

/// IORING_ACCEPT_POLL_FIRST (Linux 6.10): the queue is mostly empty when an accept is armed, and the kernel makes a socket
/// and a file before it finds that out. Measured with a connection per request: a seventh of the worker's CPU.
const ACCEPT_POLL_FIRST: u16 = 4;

/// Completions that are handled before a look at the room in the submission queue; each submits three at most.
const CHUNK: usize = 128;

/// What the kernel offers, found out once.
#[derive(Clone, Copy, Debug)]
pub(super) struct Features {
    single_issuer: bool,
    defer_taskrun: bool,
    coop_taskrun: bool,
    /// Connections in the ring's file table. Needs FIXED_FD_INSTALL (Linux 6.8), for those that the relay gets.
    direct: bool,
    accept_poll_first: bool,
    /// Multishot recv into a ring of buffers (Linux 6.0). With deferred task work only: then a send that could not be
    /// done at once has said so before anything else is heard of its connection.
    multishot: bool,
}

impl Features {
    /// Tries what the kernel allows, the best first.
    ///
    /// # Errors
    /// `Unsupported` with the cause where io_uring is switched off, forbidden or too old (Linux 5.19 has all that is
    /// needed); any other error as it is.
    pub(super) fn probe() -> io::Result<Self> {
        let candidates =
            [(true, true, true), (true, false, true), (false, false, true), (false, false, false)];
        let mut refusal = io::Error::from(io::ErrorKind::Unsupported);
        for (single_issuer, defer_taskrun, coop_taskrun) in candidates {
            let mut features = Self {
                single_issuer,
                defer_taskrun,
                coop_taskrun,
                direct: false,
                accept_poll_first: false,
                multishot: false,
            };
            let mut ring = match features.ring(8, 16) {
                Ok(ring) => ring,
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                    refusal = error;
                    continue;
                }
                Err(error) => return Err(unsupported(error)),
            };
            let mut probe = Probe::new();
            ring.submitter().register_probe(&mut probe).map_err(unsupported)?;
            let needed = [
                ("accept", opcode::Accept::CODE),
                ("recv", opcode::Recv::CODE),
                ("send", opcode::Send::CODE),
                ("close", opcode::Close::CODE),
                ("shutdown", opcode::Shutdown::CODE),
                ("timeout", opcode::Timeout::CODE),
                ("poll", opcode::PollAdd::CODE),
                ("cancel", opcode::AsyncCancel::CODE),
            ];
            if let Some((name, _)) = needed.iter().find(|(_, code)| !probe.is_supported(*code)) {
                return Err(io::Error::new(
                    io::ErrorKind::Unsupported,
                    format!("this kernel's io_uring has no {name}"),
                ));
            }
            // Its age shows by an operation that came with it. Before, a recv did not tell whether more waits.
            if !probe.is_supported(opcode::Socket::CODE) {
                let text = "this kernel's io_uring is older than Linux 5.19";
                return Err(io::Error::new(io::ErrorKind::Unsupported, text));
            }
            features.direct = probe.is_supported(opcode::FixedFdInstall::CODE)
                && ring.submitter().register_files_sparse(8).is_ok();
            features.accept_poll_first = knows_accept_poll_first(&mut ring)?;
            // FIXED_FD_INSTALL is younger than multishot recv.
            features.multishot =
                features.direct && defer_taskrun && Buffers::register(&ring.submitter()).is_ok();
            return Ok(features);
        }
        Err(unsupported(refusal))
    }

    fn ring(self, submissions: u32, completions: u32) -> io::Result<IoUring> {
        let mut builder = IoUring::builder();
        builder.setup_clamp().setup_cqsize(completions);
        if self.single_issuer {
            builder.setup_single_issuer();
        }
        if self.defer_taskrun {
            builder.setup_defer_taskrun();
        } else if self.coop_taskrun {
            builder.setup_coop_taskrun().setup_taskrun_flag();
        }
        builder.build(submissions)
    }

    /// As on a kernel without FIXED_FD_INSTALL, or without deferred task work either.
    #[cfg(test)]
    pub(super) fn of_older_kernels(self) -> [Self; 2] {
        let plain = Self { direct: false, accept_poll_first: false, multishot: false, ..self };
        [plain, Self { single_issuer: false, defer_taskrun: false, ..plain }]
    }

    /// The file table is registered whole, and may not be larger than the limit on open files.
    pub(super) fn is_direct(self) -> bool {
        self.direct
    }
}

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("io_uring (")?;
        if self.single_issuer {
            f.write_str("single issuer, ")?;
        }
        f.write_str(match (self.defer_taskrun, self.coop_taskrun) {
            (true, _) => "deferred task work, ",
            (false, true) => "cooperative task work, ",
            (false, false) => "",
        })?;
        f.write_str(if self.direct {
            "direct descriptors, installed for the relay"
        } else {
            "plain descriptors: no FIXED_FD_INSTALL before Linux 6.8"
        })?;
        f.write_str(if self.accept_poll_first {
            ", accepts that poll first"
        } else {
            ", accepts that try first: no ACCEPT_POLL_FIRST before Linux 6.10"
        })?;
        f.write_str(if self.multishot { ", multishot recv" } else { ", one-shot recv" })?;
        f.write_str(")")
    }
}

/// Whether the kernel has IORING_ACCEPT_POLL_FIRST: it looks at an accept's flags before its descriptor (io_accept_prep in
/// io_uring/net.c), which is none here.
fn knows_accept_poll_first(ring: &mut IoUring) -> io::Result<bool> {
    let accept = opcode::Accept::new(Fd(-1), std::ptr::null_mut(), std::ptr::null_mut()).build();
    // SAFETY: it refers to no memory.
    let pushed = unsafe { ring.submission().push(&with_ioprio(accept, ACCEPT_POLL_FIRST)) };
    debug_assert!(pushed.is_ok(), "the ring is new");
    ring.submit_and_wait(1)?;
    Ok(ring.completion().next().is_some_and(|completion| completion.result() == -libc::EBADF))
}

/// Sets the flags of an operation that the crate has no word for.
fn with_ioprio(mut sqe: squeue::Entry, ioprio: u16) -> squeue::Entry {
    const { assert!(size_of::<squeue::Entry>() == 64, "struct io_uring_sqe") };
    // SAFETY: the entry is a `struct io_uring_sqe` (repr(C), as the kernel reads it): bytes 2 and 3 are `ioprio`.
    unsafe { (&raw mut sqe).cast::<u16>().add(1).write(ioprio) };
    sqe
}

/// The expected refusals of io_uring become `Unsupported`, with what they mean.
fn unsupported(error: io::Error) -> io::Error {
    let why = match error.raw_os_error() {
        Some(libc::ENOSYS) => "the kernel has no io_uring, or a seccomp profile hides it",
        Some(libc::EPERM | libc::EACCES) => {
            "io_uring is forbidden here (kernel.io_uring_disabled, or a seccomp profile)"
        }
        Some(libc::EINVAL) => "the kernel's io_uring is too old",
        _ => return error,
    };
    io::Error::new(io::ErrorKind::Unsupported, format!("{why}: {error}"))
}

/// Entries that a worker needs for so many connections.
pub(super) fn entries(max_connections: usize, listeners: usize) -> usize {
    max_connections + listeners + SPARE
}

/// What an operation is, in the low byte of its `user_data`; above come the entry's generation and number. Those of
/// entries are bits, so that an entry's operations in flight are a set.
mod op {
    pub(super) const ACCEPT: u8 = 1;
    pub(super) const RECV: u8 = 2;
    pub(super) const SEND: u8 = 4;
    pub(super) const CLOSE: u8 = 8;
    pub(super) const SHUT: u8 = 16;
    pub(super) const INSTALL: u8 = 32;
    /// A multishot recv: the kernel has none of the entry's buffers for it.
    pub(super) const MULTI: u8 = 64;

    pub(super) const TICK: u8 = 65;
    pub(super) const RETRY: u8 = 66;
    pub(super) const TABLE: u8 = 67;
    pub(super) const STOP: u8 = 68;
    pub(super) const CANCEL: u8 = 69;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    /// An accept is armed for it.
    Accepting,
    /// The accept failed; the recv that was linked to it is still to come back.
    Failed,
    Open,
    /// It is about to be the relay's.
    Leaving(PassReason),
}

/// Why an operation in flight was cancelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doom {
    Timeout(Wait),
    /// For the connection cap.
    Evict,
    /// Idle at shutdown.
    Drain,
}

#[derive(Debug)]
struct Entry {
    connection: Connection,
    state: State,
    /// Operations of the kernel's that may touch the connection's buffers or its descriptor.
    in_flight: u8,
    generation: u32,
    doom: Option<Doom>,
    /// The round in which a send was pushed that tells of itself only if it was not done at once.
    silent: Option<u64>,
    /// The multishot recv is being cancelled.
    stopping: bool,
    listener: u16,
    /// Its socket, where it is no direct descriptor; on leaving, the ordinary one.
    fd: Option<OwnedFd>,
}

#[derive(Debug)]
struct Listener {
    id: ListenerId,
    serves: Serves,
    socket: Option<OwnedFd>,
    armed: usize,
}

/// A worker on io_uring.
pub(super) struct Uring {
    ring: IoUring,
    features: Features,
    entries: Vec<Entry>,
    max_entries: usize,
    /// For multishot receives; `None` without [`Features::multishot`].
    buffers: Option<Buffers>,
    /// Grows with each batch when all that was pushed is submitted, and nothing of before is left to be looked at: what a
    /// submission makes known at once comes before all else that happens to its connections.
    round: u64,
    /// Connections of which more was received before their answer was submitted: looked at when it is.
    again: Vec<u32>,
    free: Vec<u32>,
    listeners: Vec<Listener>,
    armed: usize,
    /// Connections that were cancelled for the cap and are not closed yet.
    evicting: usize,
    /// Accepting pauses until this millisecond.
    accept_after: u64,
    /// Accepting pauses for the cap.
    capped: bool,
    /// Connections for the relay that got no descriptor.
    stuck: Vec<u32>,
    tick: Timer,
    retry: Timer,
    shared: Shared,
}

/// A timeout operation; the kernel reads the time when it is submitted.
struct Timer {
    spec: Box<Timespec>,
    armed: bool,
}

impl Uring {
    /// Makes the ring: on the thread that will run it, as the kernel holds it to that.
    pub(super) fn new(
        features: Features,
        listeners: Vec<WorkerListener>,
        shared: Shared,
    ) -> io::Result<Self> {
        let max_entries = entries(shared.limits.max_connections, listeners.len());
        // An end and an answer of each at once, and what the buffers bring.
        let completions = (2 * max_entries + 1024).next_power_of_two().clamp(4096, 65536) as u32;
        let ring = features
            .ring(SUBMISSIONS, completions)
            .map_err(|error| io::Error::new(error.kind(), format!("cannot make a ring: {error}")))?;
        if features.direct {
            ring.submitter().register_files_sparse(max_entries as u32).map_err(|error| {
                let text = format!(
                    "cannot register {max_entries} descriptors: {error}; raise the limit on open files"
                );
                io::Error::new(error.kind(), text)
            })?;
        }
        let buffers = features.multishot.then(|| Buffers::register(&ring.submitter())).transpose()?;
        let listeners = listeners
            .into_iter()
            .map(|listener| {
                rustix::io::ioctl_fionbio(&listener.socket, false)?;
                let WorkerListener { id, socket, serves } = listener;
                Ok(Listener { id, serves, socket: Some(socket), armed: 0 })
            })
            .collect::<io::Result<_>>()?;
        Ok(Self {
            ring,
            features,
            entries: Vec::new(),
            max_entries,
            buffers,
            round: 0,
            again: Vec::new(),
            free: Vec::new(),
            listeners,
            armed: 0,
            evicting: 0,
            accept_after: 0,
            capped: false,
            stuck: Vec::new(),
            tick: Timer::new(),
            retry: Timer::new(),
            shared,
        })
    }

    /// Runs until it is told to stop and all connections have ended.
    ///
    /// # Errors
    /// The ring itself failed.
    pub(super) fn run(mut self) -> io::Result<()> {
        self.watch(op::TABLE);
        self.watch(op::STOP);
        let mut chunk = [const { MaybeUninit::<cqueue::Entry>::uninit() }; CHUNK];
        loop {
            self.arm_accepts();
            self.arm_timers();
            if self.finished() {
                return Ok(());
            }
            // One system call per batch. In a batch that is measured sends tell of their end, which is at once while the
            // client reads, and that ends the wait.
            let (batch, measured) = (self.shared.clock.batch(), self.shared.measures_latency());
            let again = mem::take(&mut self.again);
            let nothing_unread = self.ring.completion().is_empty() && !self.ring.submission().cq_overflow();
            submit_and_wait(&self.ring, usize::from(again.is_empty()))?;
            if nothing_unread && self.ring.submission().is_empty() {
                self.round += 1;
            }
            let now = self.shared.clock.read();
            self.shared.note_latency(batch, measured.then_some(now));
            loop {
                let completions = self.ring.completion().fill(&mut chunk);
                let full = completions.len() == CHUNK;
                for completion in completions {
                    self.complete(completion);
                }
                if !full {
                    break;
                }
                self.make_room()?;
            }
            for slot in again {
                self.look_again(slot as usize);
            }
            self.shared.retry_handoffs();
        }
    }

    fn finished(&self) -> bool {
        self.shared.draining.is_some_and(|deadline| {
            let open = self.listeners.iter().any(|listener| listener.socket.is_some());
            let ended = self.shared.live == 0 && !open && !self.shared.handoffs_wait();
            ended || deadline <= self.shared.clock.now
        })
    }

    fn complete(&mut self, completion: &cqueue::Entry) {
        let user_data = completion.user_data();
        let (kind, slot) = (user_data as u8, (user_data >> 32) as usize);
        let result = completion.result();
        match kind {
            op::ACCEPT => self.accepted(slot, result),
            op::RECV => self.received(slot, result, cqueue::sock_nonempty(completion.flags())),
            op::MULTI => self.received_multi(slot, result, completion.flags()),
            op::SEND => self.sent(slot, result),
            op::CLOSE => self.closed(slot, result),
            op::SHUT => {
                let entry = &mut self.entries[slot];
                entry.in_flight &= !op::SHUT;
                if result < 0 {
                    entry.connection().fail();
                } else {
                    entry.connection().shut();
                }
                self.step(slot);
            }
            op::INSTALL => self.installed(slot, result),
            op::TICK => {
                self.tick.armed = false;
                self.expire();
            }
            op::RETRY => self.retry.armed = false,
            op::TABLE => {
                self.shared.tables.poll();
                if !cqueue::more(completion.flags()) {
                    self.watch(op::TABLE);
                }
            }
            op::STOP => self.begin_drain(),
            op::CANCEL => self.not_cancelled(slot, (user_data >> 8) as u32 & GENERATION),
            _ => {}
        }
    }

    fn accepted(&mut self, slot: usize, result: i32) {
        let entry = &mut self.entries[slot];
        entry.in_flight &= !op::ACCEPT;
        self.listeners[usize::from(entry.listener)].armed -= 1;
        self.armed -= 1;
        if result < 0 {
            entry.state = State::Failed;
            if !matches!(-result, libc::ECANCELED | libc::EAGAIN | libc::EINTR) {
                self.accept_failed(-result);
            }
            if self.entries[slot].in_flight == 0 {
                self.free(slot);
            }
            return;
        }
        entry.state = State::Open;
        if !self.features.direct {
            // SAFETY: accept made this descriptor for us alone.
            entry.fd = Some(unsafe { OwnedFd::from_raw_fd(result) });
        }
        self.shared.live += 1;
        self.shared.stats.accepted.add(1);
        if self.entries[slot].in_flight == 0 {
            self.step(slot);
        } else {
            self.shared.start_timer(slot, Wait::First);
        }
    }

    fn received(&mut self, slot: usize, result: i32, nonempty: bool) {
        let entry = &mut self.entries[slot];
        entry.in_flight &= !op::RECV;
        if entry.state != State::Open {
            if entry.in_flight == 0 {
                self.free(slot);
            }
            return;
        }
        let doom = self.take_doom(slot);
        let entry = &mut self.entries[slot];
        match completed(result) {
            Ok(n) => entry.connection().received(n, nonempty),
            Err(libc::ECANCELED) if let Some(doom) = doom => return self.apply(slot, doom),
            Err(libc::EAGAIN | libc::EINTR) => {}
            Err(_) => entry.connection().fail(),
        }
        if doom.is_some() {
            // It came just in time. Its timer has stopped.
            entry.connection().restart_timer();
        }
        self.step(slot);
    }

    /// Bytes of a multishot recv, or its end.
    fn received_multi(&mut self, slot: usize, result: i32, flags: u32) {
        self.settle(slot);
        let entry = &mut self.entries[slot];
        let connection = &mut entry.connection;
        let came = completed(result);
        let buffer = cqueue::buffer_select(flags).zip(self.buffers.as_mut());
        match (came, &buffer) {
            (Ok(n @ 1..), Some((id, buffers))) => {
                connection.take(buffers.bytes(*id, n), cqueue::sock_nonempty(flags));
            }
            (Ok(_), _) => connection.received(0, false),
            // No buffer was left, or it was cancelled: what the connection waits for says how it goes on.
            (Err(libc::ENOBUFS | libc::ECANCELED | libc::EAGAIN | libc::EINTR), _) => {}
            (Err(_), _) => connection.fail(),
        }
        if let Some((id, buffers)) = buffer {
            buffers.give_back(id);
        }
        if !cqueue::more(flags) {
            entry.in_flight &= !op::MULTI;
            entry.stopping = false;
        }
        match self.take_doom(slot) {
            // The recv is what was cancelled, unless it has ended by itself.
            Some(doom) if came == Err(libc::ECANCELED) && self.entries[slot].in_flight == 0 => {
                return self.apply(slot, doom);
            }
            // It came just in time. Its timer has stopped.
            Some(_) => self.entries[slot].connection.restart_timer(),
            None => {}
        }
        if self.entries[slot].silent.is_some() {
            // Its answer is not submitted yet.
            return self.again.push(slot as u32);
        }
        if self.entries[slot].in_flight & op::SEND != 0 {
            // Who does not read its answers is not read from either.
            self.stop_multi(slot);
        }
        self.resume(slot);
    }

    /// A connection of which more was received before its answer was submitted.
    fn look_again(&mut self, slot: usize) {
        self.settle(slot);
        let entry = &self.entries[slot];
        if entry.silent.is_some() {
            return self.again.push(slot as u32);
        }
        if entry.state == State::Open && entry.in_flight & !op::MULTI == 0 && entry.doom.is_some() {
            // It was taken for idle, but what came was not looked at yet.
            self.take_doom(slot);
            self.entries[slot].connection.restart_timer();
        }
        self.resume(slot);
    }

    /// Goes on with a connection of which bytes have come, if it waits for nothing else.
    fn resume(&mut self, slot: usize) {
        self.settle(slot);
        let entry = &self.entries[slot];
        if entry.state == State::Open && entry.in_flight & !op::MULTI == 0 {
            self.step(slot);
        }
    }

    /// A silent send of an earlier round was done: else it had told.
    fn settle(&mut self, slot: usize) {
        let entry = &mut self.entries[slot];
        if entry.silent.is_some_and(|round| round < self.round) {
            entry.silent = None;
            entry.in_flight &= !op::SEND;
            entry.connection.all_sent();
        }
    }

    /// Whether there is a multishot recv, which is then cancelled: its end comes as a completion.
    fn stop_multi(&mut self, slot: usize) -> bool {
        let entry = &mut self.entries[slot];
        let armed = entry.in_flight & op::MULTI != 0;
        if armed && !mem::replace(&mut entry.stopping, true) {
            self.push_cancel(slot, op::MULTI);
        }
        armed
    }

    fn sent(&mut self, slot: usize, result: i32) {
        let doom = self.take_doom(slot);
        let entry = &mut self.entries[slot];
        let silent = entry.silent.take().is_some();
        // A failed or short send took a linked close with it: that one posts nothing.
        entry.in_flight &= !(op::SEND | op::CLOSE);
        match completed(result) {
            Ok(n) => entry.connection().sent(n),
            Err(libc::ECANCELED) if let Some(doom) = doom => return self.apply(slot, doom),
            Err(libc::EAGAIN | libc::EINTR) => {}
            Err(_) => entry.connection().fail(),
        }
        if doom.is_some() || silent {
            entry.connection().restart_timer();
        }
        self.go_on(slot, !silent);
    }

    fn closed(&mut self, slot: usize, result: i32) {
        let entry = &mut self.entries[slot];
        entry.in_flight &= !(op::SEND | op::CLOSE);
        if let State::Leaving(reason) = entry.state {
            if entry.in_flight == 0 {
                self.leave(slot, reason);
            }
            return;
        }
        if let Some(fd) = entry.fd.take()
            && result >= 0
        {
            // Closed by the ring.
            let _ = fd.into_raw_fd();
        }
        self.shared.timers.stop(slot);
        self.shared.stats.closed.add(1);
        self.shared.live -= 1;
        self.take_doom(slot);
        self.free(slot);
    }

    fn installed(&mut self, slot: usize, result: i32) {
        let entry = &mut self.entries[slot];
        entry.in_flight &= !op::INSTALL;
        if result >= 0 {
            // SAFETY: the ring made this descriptor for us alone.
            entry.fd = Some(unsafe { OwnedFd::from_raw_fd(result) });
        } else {
            self.shared.stats.accept_errors.add(1);
        }
        if let State::Leaving(reason) = entry.state
            && entry.in_flight == 0
        {
            self.leave(slot, reason);
        }
    }

    /// To the relay, if there is an ordinary descriptor for it; else once more later.
    fn leave(&mut self, slot: usize, reason: PassReason) {
        let entry = &mut self.entries[slot];
        let Some(client) = entry.fd.take() else {
            entry.state = State::Open;
            self.stuck.push(slot as u32);
            return;
        };
        let listener = entry.connection().listener();
        let (bytes, eof) = entry.connection().take_rest();
        self.shared.timers.stop(slot);
        self.shared.live -= 1;
        self.free(slot);
        self.shared.hand_over(Handoff { client, listener, bytes, eof, reason });
    }

    /// Does what the connection says.
    fn step(&mut self, slot: usize) {
        self.go_on(slot, true);
    }

    /// The same; `at_once`: answers may be sent in the way that does not wait for a client that takes no more.
    fn go_on(&mut self, slot: usize, at_once: bool) {
        let entry = &mut self.entries[slot];
        let connection = entry.connection();
        let step = connection.advance(&self.shared.context());
        let wait = connection.timer();
        let multi = entry.in_flight & op::MULTI != 0;
        if step == Step::SendThenRead && at_once && self.buffers.is_some() && !self.shared.measures_latency()
        {
            self.shared.start_timer(slot, Wait::Idle);
            return self.push_answer(slot);
        }
        if let Some(wait) = wait {
            self.shared.start_timer(slot, wait);
        }
        match step {
            Step::Read if multi => {}
            Step::Read => self.push_recv(slot, POLL_FIRST),
            Step::Send | Step::SendThenRead => self.push_send(slot, Flags::empty(), 0),
            // A recv would keep the socket open.
            Step::SendThenClose if multi => {
                self.push_send(slot, Flags::empty(), 0);
                self.stop_multi(slot);
            }
            Step::HandOver(_) | Step::Close if self.stop_multi(slot) => {}
            Step::SendThenClose => {
                // MSG_MORE: the FIN of the close goes out with the answer, which saves a packet (and with a connection
                // per request a fifth of the worker's CPU, measured). A client that goes on sending after it has said
                // that this was its last request is reset, and may lose the answer (RFC 9112 §9.6 forbids it that).
                self.push_send(slot, Flags::IO_LINK | Flags::SKIP_SUCCESS, libc::MSG_MORE);
                self.push_close(slot);
            }
            Step::Shut => {
                let sqe = opcode::Shutdown::new(self.fd(slot), libc::SHUT_WR).build();
                self.push(slot, op::SHUT, sqe);
            }
            Step::HandOver(reason) if self.features.direct => {
                self.entries[slot].state = State::Leaving(reason);
                self.reserve(2);
                let sqe = opcode::FixedFdInstall::new(Fixed(slot as u32), 0).build();
                self.push(slot, op::INSTALL, sqe.flags(Flags::IO_LINK));
                self.push_close(slot);
            }
            Step::HandOver(reason) => self.leave(slot, reason),
            Step::Close => self.push_close(slot),
        }
    }

    fn apply(&mut self, slot: usize, doom: Doom) {
        let entry = &mut self.entries[slot];
        match doom {
            Doom::Timeout(wait) => entry.connection().timed_out(wait, &self.shared.context()),
            Doom::Drain => entry.connection().fail(),
            Doom::Evict => {
                // Counts until it is closed: no other has to go for the same newcomer.
                entry.connection().fail();
                entry.doom = Some(Doom::Evict);
                self.evicting += 1;
            }
        }
        self.step(slot);
    }

    /// Ends what a connection waits for: cancels it, or lets it come to its own end if that is near.
    fn doom(&mut self, slot: usize, doom: Doom) {
        self.settle(slot);
        let entry = &mut self.entries[slot];
        if self.again.contains(&(slot as u32)) {
            // More has come.
            return entry.connection.restart_timer();
        }
        let kind = match entry.in_flight {
            op::RECV => op::RECV,
            in_flight if in_flight & op::SEND != 0 && entry.silent.is_none() => op::SEND,
            in_flight if in_flight & op::MULTI != 0 => op::MULTI,
            0 if entry.state == State::Open => {
                self.stuck.retain(|stuck| *stuck as usize != slot);
                return self.apply(slot, doom);
            }
            _ => return,
        };
        // One that could not be cancelled keeps its doom.
        if entry.doom.is_none() {
            entry.doom = Some(doom);
            if doom == Doom::Evict {
                self.evicting += 1;
            }
        }
        self.push_cancel(slot, kind);
    }

    /// An operation was not there to be cancelled: its end comes with the next completion, or it was not begun yet, and
    /// is cancelled with the next tick.
    fn not_cancelled(&mut self, slot: usize, generation: u32) {
        let entry = &mut self.entries[slot];
        if entry.generation & GENERATION != generation {
            return;
        }
        match entry.doom {
            Some(Doom::Timeout(wait)) => self.shared.expire_next(slot, wait),
            Some(Doom::Evict | Doom::Drain) => self.shared.expire_next(slot, Wait::Linger),
            None if entry.stopping => {
                self.push_cancel(slot, op::MULTI);
            }
            None => {}
        }
    }

    fn take_doom(&mut self, slot: usize) -> Option<Doom> {
        let doom = self.entries[slot].doom.take();
        if doom == Some(Doom::Evict) {
            self.evicting -= 1;
        }
        doom
    }

    /// Looks at the timers.
    fn expire(&mut self) {
        let mut from = 0;
        // What finds no room waits for the next tick.
        while self.room() > CHUNK
            && let Some((slot, wait)) = self.shared.timers.next_expired(from, self.shared.clock.now)
        {
            from = slot + 1;
            self.doom(slot, Doom::Timeout(wait));
        }
        for slot in mem::take(&mut self.stuck) {
            self.step(slot as usize);
        }
        self.drain_idle();
    }

    fn drain_idle(&mut self) {
        while self.shared.draining.is_some()
            && self.room() > CHUNK
            && let Some(slot) = self.shared.take_idle()
        {
            self.doom(slot, Doom::Drain);
        }
    }

    /// Stops accepting: first the armed accepts, then ([`Uring::drain_listener`]) what the kernel has in its queue.
    fn begin_drain(&mut self) {
        if !self.shared.check_stop() {
            return;
        }
        for slot in 0..self.entries.len() {
            if self.entries[slot].state == State::Accepting {
                self.push_cancel(slot, op::ACCEPT);
            }
        }
        self.drain_idle();
    }

    /// Takes what the kernel has accepted and closes the socket.
    fn drain_listener(&mut self, index: usize) {
        let Some(socket) = self.listeners[index].socket.take() else { return };
        if rustix::io::ioctl_fionbio(&socket, true).is_err() {
            return;
        }
        while let Ok(client) = rustix::net::accept_with(&socket, SocketFlags::CLOEXEC) {
            let Some(slot) = self.allocate(index) else { return };
            let entry = &mut self.entries[slot];
            entry.state = State::Open;
            if !self.features.direct {
                entry.fd = Some(client);
            } else if self.ring.submitter().register_files_update(slot as u32, &[client.as_raw_fd()]).is_err()
            {
                self.free(slot);
                continue;
            }
            self.shared.live += 1;
            self.shared.stats.accepted.add(1);
            self.step(slot);
        }
    }

    fn accept_failed(&mut self, errno: i32) {
        self.shared.stats.accept_errors.add(1);
        if errno != libc::ECONNABORTED {
            self.accept_after = self.shared.clock.now + ACCEPT_BACKOFF.as_millis() as u64;
        }
    }

    /// Arms accepts up to [`ARMED`] per listener, within the cap; makes room beyond it.
    fn arm_accepts(&mut self) {
        if self.shared.draining.is_some() {
            for index in 0..self.listeners.len() {
                if self.listeners[index].armed == 0 {
                    self.drain_listener(index);
                }
            }
            return;
        }
        let max = self.shared.limits.max_connections;
        while self.shared.open() > max + self.evicting {
            let Some(slot) = self.shared.take_victim() else {
                if !mem::replace(&mut self.capped, true) {
                    self.shared.stats.capped.add(1);
                }
                return;
            };
            self.shared.stats.capped.add(1);
            self.doom(slot, Doom::Evict);
        }
        self.capped = false;
        if self.shared.clock.now < self.accept_after {
            return;
        }
        for index in 0..self.listeners.len() {
            // At the cap one accept per listener stays armed: it is how a connection beyond the cap shows.
            while self.listeners[index].armed == 0
                || self.listeners[index].armed < ARMED
                    && self.shared.open() + self.armed < max + self.evicting
            {
                let Some(slot) = self.allocate(index) else { return };
                self.push_accept(slot, index);
            }
        }
    }

    fn arm_timers(&mut self) {
        if self.shared.live > 0 || self.shared.draining.is_some() {
            let tick = self.shared.tick();
            self.arm_timer(op::TICK, tick);
        }
        if self.shared.handoffs_wait() {
            self.arm_timer(op::RETRY, HANDOFF_RETRY);
        } else if self.shared.clock.now < self.accept_after {
            self.arm_timer(op::RETRY, ACCEPT_BACKOFF);
        }
    }

    fn arm_timer(&mut self, kind: u8, after: Duration) {
        let timer = if kind == op::TICK { &mut self.tick } else { &mut self.retry };
        if mem::replace(&mut timer.armed, true) {
            return;
        }
        *timer.spec = Timespec::from(after);
        let sqe = opcode::Timeout::new(&raw const *timer.spec).build().user_data(u64::from(kind));
        self.submit_entry(&sqe);
    }

    fn watch(&mut self, kind: u8) {
        let fd = if kind == op::TABLE {
            self.shared.tables.wake_fd().as_raw_fd()
        } else {
            self.shared.stop.wake.as_raw_fd()
        };
        let sqe =
            opcode::PollAdd::new(Fd(fd), libc::POLLIN as u32).multi(true).build().user_data(u64::from(kind));
        self.submit_entry(&sqe);
    }

    fn allocate(&mut self, listener: usize) -> Option<usize> {
        let slot = match self.free.pop() {
            Some(slot) => slot as usize,
            None if self.entries.len() < self.max_entries => {
                self.entries.push(Entry {
                    connection: Connection::new(),
                    state: State::Free,
                    in_flight: 0,
                    generation: 0,
                    doom: None,
                    silent: None,
                    stopping: false,
                    listener: 0,
                    fd: None,
                });
                self.entries.len() - 1
            }
            None => return None,
        };
        let entry = &mut self.entries[slot];
        entry.listener = listener as u16;
        let Listener { id, serves, .. } = self.listeners[listener];
        entry.connection().reset(id, serves);
        Some(slot)
    }

    fn free(&mut self, slot: usize) {
        let entry = &mut self.entries[slot];
        debug_assert_eq!(entry.in_flight, 0, "freed with an operation in flight");
        entry.state = State::Free;
        entry.generation = entry.generation.wrapping_add(1);
        self.free.push(slot as u32);
    }

    /// The descriptor to use with [`Uring::push`], which marks it direct where it is.
    fn fd(&self, slot: usize) -> Fd {
        Fd(match &self.entries[slot].fd {
            Some(fd) => fd.as_raw_fd(),
            None => (slot as u32).cast_signed(),
        })
    }

    fn push_accept(&mut self, slot: usize, listener: usize) {
        let Some(socket) = &self.listeners[listener].socket else { return };
        let fd = Fd(socket.as_raw_fd());
        let accept = opcode::Accept::new(fd, std::ptr::null_mut(), std::ptr::null_mut());
        self.entries[slot].state = State::Accepting;
        self.listeners[listener].armed += 1;
        self.armed += 1;
        if self.features.direct {
            let target = DestinationSlot::try_from_slot_target(slot as u32).ok();
            self.reserve(2);
            let accept = accept.file_index(target).build().flags(Flags::IO_LINK);
            self.push_plain(slot, op::ACCEPT, self.poll_first(accept));
            self.push_recv(slot, 0);
        } else {
            let accept = accept.flags(libc::SOCK_CLOEXEC).build();
            self.push_plain(slot, op::ACCEPT, self.poll_first(accept));
        }
    }

    fn poll_first(&self, accept: squeue::Entry) -> squeue::Entry {
        if self.features.accept_poll_first { with_ioprio(accept, ACCEPT_POLL_FIRST) } else { accept }
    }

    fn push_recv(&mut self, slot: usize, ioprio: u16) {
        let fd = self.fd(slot);
        // The space stays where it is: the connection is not touched again before this operation is complete.
        let space = self.entries[slot].connection.space();
        let sqe = opcode::Recv::new(fd, space.as_mut_ptr(), space.len() as u32).ioprio(ioprio).build();
        self.push(slot, op::RECV, sqe);
    }

    /// MSG_WAITALL: the kernel goes on until all is sent; should it fail in between, a linked close is not done.
    fn push_send(&mut self, slot: usize, flags: Flags, message: libc::c_int) {
        self.reserve(2);
        let fd = self.fd(slot);
        let bytes = self.entries[slot].connection.unsent();
        let sqe = opcode::Send::new(fd, bytes.as_ptr(), bytes.len() as u32)
            .flags(libc::MSG_WAITALL | libc::MSG_NOSIGNAL | message)
            .build();
        self.push(slot, op::SEND, sqe.flags(flags));
    }

    /// Sends the answer and reads on. The send is done at once or tells how much was (MSG_DONTWAIT: it is never waited
    /// for), in which case [`Uring::sent`] does the rest; while nothing is heard it is done as soon as it is submitted.
    fn push_answer(&mut self, slot: usize) {
        self.reserve(2);
        self.entries[slot].silent = Some(self.round);
        self.push_send(slot, Flags::SKIP_SUCCESS, libc::MSG_DONTWAIT);
        if self.entries[slot].in_flight & op::MULTI == 0 {
            let recv = opcode::RecvMulti::new(self.fd(slot), buffers::GROUP).build();
            self.push(slot, op::MULTI, with_ioprio(recv, RECV_MULTISHOT | POLL_FIRST));
        }
    }

    fn push_close(&mut self, slot: usize) {
        let sqe = match &self.entries[slot].fd {
            Some(fd) => opcode::Close::new(Fd(fd.as_raw_fd())).build(),
            None => opcode::Close::new(Fixed(slot as u32)).build(),
        };
        self.push_plain(slot, op::CLOSE, sqe);
    }

    fn push_cancel(&mut self, slot: usize, kind: u8) {
        let target = user_data(kind, self.entries[slot].generation, slot);
        let sqe = opcode::AsyncCancel::new(target).build().flags(Flags::SKIP_SUCCESS).user_data(user_data(
            op::CANCEL,
            self.entries[slot].generation,
            slot,
        ));
        self.submit_entry(&sqe);
    }

    /// An operation on the entry's socket.
    fn push(&mut self, slot: usize, kind: u8, sqe: squeue::Entry) {
        self.push_plain(slot, kind, if self.features.direct { sqe.flags(Flags::FIXED_FILE) } else { sqe });
    }

    fn push_plain(&mut self, slot: usize, kind: u8, sqe: squeue::Entry) {
        let entry = &mut self.entries[slot];
        entry.in_flight |= kind;
        let sqe = sqe.user_data(user_data(kind, entry.generation, slot));
        self.submit_entry(&sqe);
    }

    fn submit_entry(&mut self, sqe: &squeue::Entry) {
        self.reserve(1);
        // SAFETY: buffers belong to the entry and are neither moved, freed nor touched while `in_flight` has the
        // operation's bit; times are read on submission and boxed.
        let pushed = unsafe { self.ring.submission().push(sqe) };
        debug_assert!(pushed.is_ok(), "room was reserved");
    }

    fn room(&mut self) -> usize {
        let queue = self.ring.submission();
        queue.capacity() - queue.len()
    }

    /// Makes sure that `n` operations fit, so that a chain is submitted whole.
    fn reserve(&mut self, n: usize) {
        if self.room() < n {
            // Only with hundreds of operations outside of a batch's completions; the kernel takes them all.
            while self.ring.submit().is_err() && self.room() < n {}
        }
    }

    fn make_room(&mut self) -> io::Result<()> {
        if self.room() < CHUNK * 3 { submit_and_wait(&self.ring, 0) } else { Ok(()) }
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        // The kernel may still read or write buffers: take everything back before they are freed.
        let sqe = opcode::AsyncCancel2::new(CancelBuilder::any()).build().user_data(u64::from(op::CANCEL));
        self.submit_entry(&sqe);
        let mut rounds = 0;
        while self.entries.iter().any(|entry| entry.in_flight != 0) && rounds < 1000 {
            rounds += 1;
            let _ = submit_and_wait(&self.ring, 1);
            self.round += 1;
            for slot in 0..self.entries.len() {
                self.settle(slot);
            }
            for completion in self.ring.completion() {
                let (kind, slot) = (completion.user_data() as u8, (completion.user_data() >> 32) as usize);
                match (kind, self.entries.get_mut(slot)) {
                    (op::INSTALL, Some(entry)) if completion.result() >= 0 => {
                        // SAFETY: the ring made this descriptor for us alone.
                        entry.fd = Some(unsafe { OwnedFd::from_raw_fd(completion.result()) });
                        entry.in_flight &= !kind;
                    }
                    (op::SEND | op::CLOSE, Some(entry)) => entry.in_flight &= !(op::SEND | op::CLOSE),
                    (op::MULTI, Some(entry)) if !cqueue::more(completion.flags()) => entry.in_flight &= !kind,
                    (op::ACCEPT | op::RECV | op::SHUT | op::INSTALL, Some(entry)) => entry.in_flight &= !kind,
                    _ => {}
                }
            }
        }
        if self.entries.iter().any(|entry| entry.in_flight != 0) {
            // Better lost than written to by the kernel.
            mem::forget(mem::take(&mut self.entries));
            mem::forget(self.buffers.take());
        }
        if self.features.direct {
            let _ = self.ring.submitter().unregister_files();
        }
    }
}

impl Entry {
    /// The connection, while the kernel has none of its buffers.
    fn connection(&mut self) -> &mut Connection {
        debug_assert_eq!(
            self.in_flight & !(op::CLOSE | op::INSTALL | op::MULTI),
            0,
            "touched with an operation in flight"
        );
        &mut self.connection
    }
}

impl Timer {
    fn new() -> Self {
        Self { spec: Box::new(Timespec::new()), armed: false }
    }
}

/// Bits of an entry's generation that go into `user_data`.
const GENERATION: u32 = 0xff_ffff;

fn user_data(kind: u8, generation: u32, slot: usize) -> u64 {
    (slot as u64) << 32 | u64::from(generation & GENERATION) << 8 | u64::from(kind)
}

/// The bytes of a completion, or its errno.
fn completed(result: i32) -> Result<usize, i32> {
    usize::try_from(result).map_err(|_| -result)
}

/// One `io_uring_enter`; what only means "reap completions first" or "interrupted" is no error.
fn submit_and_wait(ring: &IoUring, want: usize) -> io::Result<()> {
    match ring.submit_and_wait(want) {
        Ok(_) => Ok(()),
        Err(error) => match error.raw_os_error() {
            Some(libc::EINTR | libc::EBUSY | libc::EAGAIN) => Ok(()),
            _ => Err(io::Error::new(error.kind(), format!("io_uring_enter failed: {error}"))),
        },
    }
}
