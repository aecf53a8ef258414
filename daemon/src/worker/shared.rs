//! What a worker has whatever engine drives it: its table, its clock, the timers, the way to the relay, and the order
//! to stop.
#![forbid(unsafe_code)]

use super::{
    ConnectionLimits,
    connection::{Context, LINGER, Wait},
};
use crate::{
    ask::Sampler,
    http::{date::imf_fixdate, error::ErrorResponse},
    publish::Subscriber,
    relay::{self, Handoff},
    telemetry::WorkerStats,
};
use rustix::{
    event::{EventfdFlags, eventfd},
    net::SendFlags,
};
use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    io, mem,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// How often a connection is tried again that the relay had no room for.
pub(super) const HANDOFF_RETRY: Duration = Duration::from_millis(5);

/// How long accepting pauses after it failed for want of descriptors or memory.
pub(super) const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// How long a new connection has to send its first byte before it may be closed for others, in milliseconds.
const FIRST: u64 = 1000;

/// The order to stop, from any thread to one worker.
#[derive(Debug)]
pub(super) struct Stop {
    /// Readable once the order is given.
    pub(super) wake: OwnedFd,
    /// 0: run. Else one more than the grace in milliseconds.
    order: AtomicU64,
}

impl Stop {
    pub(super) fn new() -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { wake, order: AtomicU64::new(0) })
    }

    /// Gives the order.
    pub(super) fn order(&self, grace: Duration) {
        let grace = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX).saturating_add(1);
        self.order.store(grace, Ordering::Release);
        // Refused only where the counter is at its top: readable already.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    fn grace(&self) -> Option<u64> {
        self.order.load(Ordering::Acquire).checked_sub(1)
    }
}

/// What both engines keep beside their sockets.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) tables: Subscriber,
    pub(super) stats: Arc<WorkerStats>,
    pub(super) limits: ConnectionLimits,
    pub(super) clock: Clock,
    pub(super) timers: Timers,
    pub(super) stop: Arc<Stop>,
    /// Millisecond of the clock by which a worker that was told to stop has ended.
    pub(super) draining: Option<u64>,
    /// Connections that the worker itself serves.
    pub(super) live: usize,
    sampler: Option<RefCell<Sampler>>,
    relay: Option<relay::Handle>,
    waiting: VecDeque<(Handoff, u64)>,
    /// Answers rendered and not noted yet.
    answers: Cell<u64>,
    latency: Latency,
}

/// How the answer latency is measured: one batch in [`MEASURED_EVERY_MS`] stands for those since the last one.
#[derive(Debug)]
struct Latency {
    /// Millisecond of the clock from which on the next batch is measured.
    next: u64,
    /// What it took, in nanoseconds.
    last: u64,
    /// Answers of batches since then that were not measured.
    carried: u64,
}

/// To know when the kernel has the answers takes a system call more.
const MEASURED_EVERY_MS: u64 = 10;

/// Tests of the engines go the usual way.
const FIRST_MEASURED_MS: u64 = if cfg!(test) { u64::MAX } else { 0 };

impl Shared {
    /// The parts of `setup` but its sockets, for connections numbered below `slots`.
    pub(super) fn new(
        tables: Subscriber,
        relay: Option<relay::Handle>,
        stats: Arc<WorkerStats>,
        limits: ConnectionLimits,
        stop: Arc<Stop>,
        slots: usize,
    ) -> Self {
        Self {
            tables,
            stats,
            limits,
            clock: Clock::new(),
            timers: Timers::new(slots),
            stop,
            draining: None,
            live: 0,
            sampler: None,
            relay,
            waiting: VecDeque::new(),
            answers: Cell::new(0),
            latency: Latency { next: FIRST_MEASURED_MS, last: 0, carried: 0 },
        }
    }

    /// With somebody to show preflights to.
    pub(super) fn with_sampler(self, sampler: Option<Sampler>) -> Self {
        Self { sampler: sampler.map(RefCell::new), ..self }
    }

    /// For [`super::connection::Connection::advance`].
    #[inline]
    pub(super) fn context(&self) -> Context<'_> {
        Context {
            table: self.tables.table(),
            date: &self.clock.date,
            head: self.limits.head,
            stats: &self.stats,
            draining: self.draining.is_some(),
            answers: &self.answers,
            sampler: self.sampler.as_ref(),
        }
    }

    /// Starts the timer of a connection.
    #[inline]
    pub(super) fn start_timer(&mut self, slot: usize, wait: Wait) {
        let timeout = match wait {
            Wait::First | Wait::Idle => self.limits.idle_timeout,
            Wait::Head | Wait::Relay => self.limits.header_timeout,
            Wait::Send => self.limits.send_timeout,
            Wait::Linger => LINGER,
        };
        self.timers.start(slot, wait, self.clock.now + timeout.as_millis() as u64);
    }

    /// Has the timer run out with the next tick.
    pub(super) fn expire_next(&mut self, slot: usize, wait: Wait) {
        self.timers.start(slot, wait, self.clock.now);
    }

    /// The connection to close for one beyond the cap: the longest idle one. Who has just come and not sent a byte yet
    /// is about to; only after [`FIRST`] it counts as idle. Its timer stops.
    pub(super) fn take_victim(&mut self) -> Option<usize> {
        let first_before =
            (self.clock.now + self.limits.idle_timeout.as_millis() as u64).saturating_sub(FIRST);
        self.timers.take_longest_idle(first_before)
    }

    /// Any idle connection; its timer stops.
    pub(super) fn take_idle(&mut self) -> Option<usize> {
        self.timers.take_longest_idle(NONE)
    }

    /// How often timers are looked at.
    pub(super) fn tick(&self) -> Duration {
        let limits = &self.limits;
        let shortest = limits.header_timeout.min(limits.idle_timeout).min(limits.send_timeout).min(LINGER);
        (shortest / 8).clamp(Duration::from_millis(5), Duration::from_millis(500))
    }

    /// Gives a connection to the relay, or keeps it until there is room.
    pub(super) fn hand_over(&mut self, handoff: Handoff) {
        let deadline = self.clock.now + self.limits.header_timeout.as_millis() as u64;
        self.waiting.push_back((handoff, deadline));
        self.retry_handoffs();
    }

    /// Tries those again that the relay had no room for, oldest first. One that waited too long gets a 503.
    pub(super) fn retry_handoffs(&mut self) {
        while let Some((handoff, deadline)) = self.waiting.pop_front() {
            let back = match &mut self.relay {
                Some(relay) => relay.push(handoff),
                None => Err(handoff),
            };
            match back {
                Ok(()) => self.stats.handed_over.add(1),
                Err(handoff) if self.relay.is_none() || deadline <= self.clock.now => {
                    self.turn_away(&handoff);
                }
                Err(handoff) => return self.waiting.push_front((handoff, deadline)),
            }
        }
    }

    /// Connections that count for the cap: those of clients that are served, and those that wait for the relay.
    pub(super) fn open(&self) -> usize {
        self.live + self.waiting.len()
    }

    /// Connections wait for room in the relay.
    pub(super) fn handoffs_wait(&self) -> bool {
        !self.waiting.is_empty()
    }

    fn turn_away(&self, handoff: &Handoff) {
        let mut response = Vec::new();
        ErrorResponse::Overloaded.render(&self.clock.date, &mut response);
        self.stats.error_responses.add(1);
        self.stats.closed.add(1);
        // Best effort: it fits into the send buffer of a client that has taken all answers before, or is lost.
        let _ = rustix::net::send(&handoff.client, &response, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
    }

    /// Looks whether the order to stop was given. True: it has just been seen.
    pub(super) fn check_stop(&mut self) -> bool {
        if self.draining.is_none()
            && let Some(grace) = self.stop.grace()
        {
            self.draining = Some(self.clock.now.saturating_add(grace));
            return true;
        }
        false
    }

    /// Whether this batch is one whose latency is measured.
    #[inline]
    pub(super) fn measures_latency(&self) -> bool {
        self.clock.now >= self.latency.next
    }

    /// A batch ends. `sent`: when the kernel had its answers, if it is measured.
    #[inline]
    pub(super) fn note_latency(&mut self, batch: Batch, sent: Option<Instant>) {
        let answers = self.answers.take();
        match sent {
            Some(sent) if answers > 0 => {
                self.latency.next = batch.now + MEASURED_EVERY_MS;
                self.latency.last = sent.duration_since(batch.began).as_nanos() as u64;
                self.stats.latency(self.latency.last, answers + mem::take(&mut self.latency.carried));
            }
            // A lull: none is left unnoted for longer than a tick.
            _ if answers == 0 && self.latency.carried > 0 => {
                self.stats.latency(self.latency.last, mem::take(&mut self.latency.carried));
            }
            _ => self.latency.carried += answers,
        }
    }

    /// The same at the end of a batch that has sent its answers itself: each is measured.
    pub(super) fn note_latency_now(&mut self) {
        if self.answers.get() > 0 {
            self.note_latency(self.clock.batch(), Some(Instant::now()));
        }
    }
}

/// When a batch of events began.
#[derive(Clone, Copy, Debug)]
pub(super) struct Batch {
    began: Instant,
    now: u64,
}

/// A clock that is read once per batch of events.
#[derive(Debug)]
pub(super) struct Clock {
    start: Instant,
    /// When the batch began.
    batch: Instant,
    /// The same in milliseconds since the worker began.
    pub(super) now: u64,
    /// For the `Date` header.
    pub(super) date: [u8; 29],
    date_until: u64,
}

impl Clock {
    fn new() -> Self {
        let start = Instant::now();
        let mut clock = Self { start, batch: start, now: 0, date: [0; 29], date_until: 0 };
        clock.read();
        clock
    }

    pub(super) fn batch(&self) -> Batch {
        Batch { began: self.batch, now: self.now }
    }

    /// A batch begins; gives the time.
    #[inline]
    pub(super) fn read(&mut self) -> Instant {
        self.batch = Instant::now();
        self.now = self.batch.duration_since(self.start).as_millis() as u64;
        if self.now >= self.date_until {
            let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            self.date = imf_fixdate(unix.as_secs());
            self.date_until = self.now + 1000 - u64::from(unix.subsec_millis());
        }
        self.batch
    }
}

/// One timer per connection: starting one is a store, all of them are looked through a few times a second (eight bytes
/// each, in a row: 10,000 take some microseconds). No list to keep in order, no timer in the kernel.
#[derive(Debug)]
pub(super) struct Timers {
    /// Deadline in milliseconds, shifted by [`KIND_BITS`], and the kind below.
    deadlines: Vec<u64>,
    /// The longest idle ones, longest last, as of when the list was made.
    idle: Vec<(u64, u32)>,
}

const KIND_BITS: u32 = 3;
const NONE: u64 = u64::MAX;
/// So many candidates are found in one look-through, so that it is not done for every connection beyond the cap.
const CANDIDATES: usize = 64;

impl Timers {
    fn new(slots: usize) -> Self {
        Self { deadlines: vec![NONE; slots], idle: Vec::new() }
    }

    #[inline]
    fn start(&mut self, slot: usize, wait: Wait, deadline: u64) {
        self.deadlines[slot] = deadline << KIND_BITS | wait as u64;
    }

    /// No timer for this connection.
    #[inline]
    pub(super) fn stop(&mut self, slot: usize) {
        self.deadlines[slot] = NONE;
    }

    /// The first connection from `slot` on whose time is over; its timer stops.
    pub(super) fn next_expired(&mut self, slot: usize, now: u64) -> Option<(usize, Wait)> {
        let limit = (now + 1) << KIND_BITS;
        let found = slot + self.deadlines.get(slot..)?.iter().position(|deadline| *deadline < limit)?;
        let wait = kind(self.deadlines[found]);
        self.deadlines[found] = NONE;
        Some((found, wait))
    }

    /// Every idle connection, in no order.
    pub(super) fn idle(&self) -> impl Iterator<Item = usize> {
        (0..self.deadlines.len()).filter(|slot| self.is_idle(*slot))
    }

    /// Whether the connection is idle.
    pub(super) fn is_idle(&self, slot: usize) -> bool {
        is_idle(self.deadlines[slot], NONE)
    }

    /// The connection that has been idle for longest; its timer stops. One that has not sent a byte yet counts only if
    /// its time is over before `first_before`.
    fn take_longest_idle(&mut self, first_before: u64) -> Option<usize> {
        for _ in 0..2 {
            while let Some((deadline, slot)) = self.idle.pop() {
                // Still the same idleness?
                if self.deadlines[slot as usize] == deadline {
                    self.deadlines[slot as usize] = NONE;
                    return Some(slot as usize);
                }
            }
            let all = self.deadlines.iter().zip(0..);
            let idle = all.filter(|(deadline, _)| is_idle(**deadline, first_before));
            self.idle.extend(idle.map(|(deadline, slot)| (*deadline, slot)));
            if self.idle.len() > CANDIDATES {
                self.idle.select_nth_unstable(CANDIDATES);
                self.idle.truncate(CANDIDATES);
            }
            self.idle.sort_unstable_by(|a, b| b.cmp(a));
        }
        None
    }
}

fn is_idle(deadline: u64, first_before: u64) -> bool {
    deadline != NONE
        && match kind(deadline) {
            Wait::Idle => true,
            Wait::First => deadline >> KIND_BITS <= first_before,
            _ => false,
        }
}

fn kind(deadline: u64) -> Wait {
    const KINDS: [Wait; 6] = [Wait::First, Wait::Idle, Wait::Head, Wait::Send, Wait::Linger, Wait::Relay];
    KINDS[(deadline & ((1 << KIND_BITS) - 1)) as usize]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers_expire_by_their_deadline_and_kind() {
        let mut timers = Timers::new(5);
        timers.start(0, Wait::Idle, 100);
        timers.start(1, Wait::Head, 50);
        timers.start(2, Wait::Send, 101);
        timers.start(4, Wait::Linger, 100);
        assert_eq!(timers.next_expired(0, 49), None);
        assert_eq!(timers.next_expired(0, 100), Some((0, Wait::Idle)));
        assert_eq!(timers.next_expired(1, 100), Some((1, Wait::Head)));
        assert_eq!(timers.next_expired(2, 100), Some((4, Wait::Linger)));
        assert_eq!(timers.next_expired(5, 100), None);
        assert_eq!(timers.next_expired(0, 100), None, "each once");
        timers.stop(2);
        assert_eq!(timers.next_expired(0, 1000), None);
    }

    #[test]
    fn the_longest_idle_goes_first_and_only_while_it_is_idle() {
        let mut timers = Timers::new(300);
        for slot in 0..300 {
            timers.start(slot, if slot % 3 == 0 { Wait::Head } else { Wait::Idle }, 1000 - slot as u64);
        }
        assert_eq!(timers.take_longest_idle(NONE), Some(299));
        timers.start(298, Wait::Idle, 5000);
        timers.start(296, Wait::Head, 1);
        let order: Vec<_> = std::iter::from_fn(|| timers.take_longest_idle(NONE)).collect();
        assert_eq!(order.len(), 198);
        assert_eq!(&order[..3], [295, 293, 292]);
        assert_eq!(order.last(), Some(&298));
    }

    #[test]
    fn who_has_just_come_is_not_idle() {
        let mut timers = Timers::new(2);
        timers.start(0, Wait::First, 650);
        timers.start(1, Wait::First, 600);
        assert_eq!(timers.take_longest_idle(599), None);
        assert_eq!(timers.take_longest_idle(600), Some(1));
        assert_eq!(timers.take_longest_idle(600), None);
    }

    #[test]
    fn the_date_is_now() {
        let clock = Clock::new();
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
        assert!((unix - 1..=unix).any(|second| imf_fixdate(second) == clock.date));
    }
}
