//! Table publication: how a new table reaches every worker and an old one comes back to be freed.
//!
//! Each worker owns its current table (an `Arc` of its own: reading is a plain pointer read). Tables travel through one
//! rtrb ring per worker with an eventfd to wake it; replaced tables return through a second ring, so that no worker
//! frees memory. The kernel tier will be one more subscriber.
#![forbid(unsafe_code)]

mod protocol;

#[cfg(test)]
mod loom_tests;

use crate::policy::Table;
use protocol::{Control, Holder, Inlet, Outlet, Versioned};
use rtrb::{Consumer, Producer, PushError, RingBuffer};
use rustix::event::{EventfdFlags, eventfd};
use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

/// Tables that may be on their way to a worker at once. Beyond, the newest waits on the control side: a worker that
/// does not run cannot pile tables up.
const DEPTH: usize = 4;

/// The control thread's side.
#[derive(Debug)]
pub struct Publisher {
    subscribers: Vec<Control<Arc<Table>, RingOutlet>>,
}

/// One worker's side.
#[derive(Debug)]
pub struct Subscriber {
    holder: Holder<Arc<Table>, RingInlet>,
}

impl Publisher {
    /// A publisher and `workers` subscribers that all own `first`.
    ///
    /// # Errors
    /// No eventfd can be made (descriptor limit).
    #[expect(
        clippy::needless_pass_by_value,
        reason = "the caller must keep no table: its last owner frees it"
    )]
    pub fn new(workers: usize, first: Arc<Table>) -> io::Result<(Publisher, Vec<Subscriber>)> {
        let mut controls = Vec::with_capacity(workers);
        let mut subscribers = Vec::with_capacity(workers);
        for _ in 0..workers {
            let (outlet, inlet) = ring_pair(DEPTH)?;
            controls.push(Control::new(outlet, DEPTH));
            subscribers.push(Subscriber { holder: Holder::new(inlet, Arc::clone(&first)) });
        }
        Ok((Publisher { subscribers: controls }, subscribers))
    }

    /// Sends the table to every subscriber and wakes it. A subscriber that does not take its tables gets only the
    /// newest, with the next [`Publisher::tick`] after it has (those in between are dropped here).
    pub fn publish(&mut self, table: &Arc<Table>) {
        for subscriber in &mut self.subscribers {
            subscriber.publish(Arc::clone(table));
        }
    }

    /// Sends what a full ring held back and frees what came back; call it now and then. True: nothing is pending.
    pub fn tick(&mut self) -> bool {
        self.subscribers.iter_mut().map(Control::tick).filter(|settled| !settled).count() == 0
    }

    /// The generation that every subscriber has taken: readiness waits for it. `u64::MAX` without subscribers.
    pub fn acknowledged(&self) -> u64 {
        self.generations().min().unwrap_or(u64::MAX)
    }

    /// The generation of each subscriber.
    pub fn generations(&self) -> impl Iterator<Item = u64> {
        self.subscribers.iter().map(Control::acknowledged)
    }
}

impl Subscriber {
    /// The current table: a plain pointer read.
    #[inline]
    pub fn table(&self) -> &Table {
        self.holder.current()
    }

    /// Becomes readable when a table waits.
    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        self.holder.inlet.shared.wake.as_fd()
    }

    /// Takes the newest waiting table and retires the old one. True if the table changed. Never blocks, never frees.
    pub fn poll(&mut self) -> bool {
        self.holder.poll()
    }
}

impl Versioned for Arc<Table> {
    fn generation(&self) -> u64 {
        Table::generation(self)
    }
}

/// What both sides of one subscriber share beside the rings.
#[derive(Debug)]
struct Shared {
    wake: OwnedFd,
    acknowledged: AtomicU64,
}

#[derive(Debug)]
struct RingOutlet {
    new: Producer<Arc<Table>>,
    retired: Consumer<Arc<Table>>,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct RingInlet {
    new: Consumer<Arc<Table>>,
    retired: Producer<Arc<Table>>,
    shared: Arc<Shared>,
}

fn ring_pair(depth: usize) -> io::Result<(RingOutlet, RingInlet)> {
    let (new_tx, new_rx) = RingBuffer::new(depth);
    let (retired_tx, retired_rx) = RingBuffer::new(depth);
    let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let shared = Arc::new(Shared { wake, acknowledged: AtomicU64::new(0) });
    let outlet = RingOutlet { new: new_tx, retired: retired_rx, shared: Arc::clone(&shared) };
    Ok((outlet, RingInlet { new: new_rx, retired: retired_tx, shared }))
}

impl Outlet<Arc<Table>> for RingOutlet {
    fn send(&mut self, table: Arc<Table>) -> Result<(), Arc<Table>> {
        self.new.push(table).map_err(|PushError::Full(table)| table)
    }

    fn wake(&self) {
        // The only refusal, EAGAIN, is a counter at its top: readable already.
        let _ = rustix::io::write(&self.shared.wake, &1u64.to_ne_bytes());
    }

    fn take_back(&mut self) -> Option<Arc<Table>> {
        self.retired.pop().ok()
    }

    fn acknowledged(&self) -> u64 {
        self.shared.acknowledged.load(Ordering::Acquire)
    }
}

impl Inlet<Arc<Table>> for RingInlet {
    fn clear_wake(&self) {
        // EAGAIN: nobody woke us.
        let _ = rustix::io::read(&self.shared.wake, &mut [0; 8]);
    }

    fn receive(&mut self) -> Option<Arc<Table>> {
        self.new.pop().ok()
    }

    fn retire(&mut self, table: Arc<Table>) -> Result<(), Arc<Table>> {
        self.retired.push(table).map_err(|PushError::Full(table)| table)
    }

    fn acknowledge(&self, generation: u64) {
        self.shared.acknowledged.store(generation, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::RouteLabels;
    use std::{sync::Weak, thread};

    fn table(generation: u64) -> Arc<Table> {
        Arc::new(Table::compile(&[], &[], &mut RouteLabels::new(1), generation).0)
    }

    fn readable(fd: BorrowedFd<'_>) -> bool {
        let mut fds = [rustix::event::PollFd::from_borrowed_fd(fd, rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut fds, Some(&rustix::time::Timespec::default())).expect("poll") == 1
    }

    #[test]
    fn a_table_reaches_every_worker_and_the_old_one_is_freed_by_the_publisher() {
        let first = table(1);
        let weak = Arc::downgrade(&first);
        let (mut publisher, mut subscribers) = Publisher::new(2, first).expect("publisher");
        assert_eq!(publisher.acknowledged(), 1);
        assert!(!readable(subscribers[0].wake_fd()));

        publisher.publish(&table(2));
        assert!(readable(subscribers[0].wake_fd()) && readable(subscribers[1].wake_fd()));
        assert_eq!(subscribers[0].table().generation(), 1, "not before poll");
        assert!(subscribers[0].poll());
        assert!(!readable(subscribers[0].wake_fd()));
        assert_eq!(publisher.generations().collect::<Vec<_>>(), [2, 1]);
        assert_eq!(publisher.acknowledged(), 1);
        assert!(!publisher.tick());
        assert!(subscribers[1].poll());
        assert!(!subscribers[1].poll());
        assert_eq!(publisher.acknowledged(), 2);
        assert!(weak.upgrade().is_some(), "the workers do not free");
        assert!(publisher.tick());
        assert!(weak.upgrade().is_none());
    }

    #[test]
    fn a_worker_that_does_not_run_gets_the_newest_and_piles_nothing_up() {
        let (mut publisher, mut subscribers) = Publisher::new(1, table(0)).expect("publisher");
        let weak: Vec<Weak<Table>> = (1..=100)
            .map(|generation| {
                let table = table(generation);
                publisher.publish(&table);
                Arc::downgrade(&table)
            })
            .collect();
        assert!(weak.iter().filter(|table| table.upgrade().is_some()).count() <= DEPTH + 1);
        while !publisher.tick() {
            subscribers[0].poll();
        }
        assert_eq!(subscribers[0].table().generation(), 100);
        assert_eq!(publisher.acknowledged(), 100);
    }

    #[test]
    fn threads_under_a_storm_of_tables_see_generations_grow_to_the_last() {
        const LAST: u64 = 2_000;
        let (mut publisher, subscribers) = Publisher::new(2, table(0)).expect("publisher");
        let threads: Vec<_> = subscribers
            .into_iter()
            .map(|mut subscriber| {
                thread::spawn(move || {
                    let mut seen = 0;
                    while seen < LAST {
                        let mut fds = [rustix::event::PollFd::from_borrowed_fd(
                            subscriber.wake_fd(),
                            rustix::event::PollFlags::IN,
                        )];
                        rustix::event::poll(&mut fds, None).expect("poll");
                        subscriber.poll();
                        let generation = subscriber.table().generation();
                        assert!(generation >= seen, "{generation} after {seen}");
                        seen = generation;
                    }
                })
            })
            .collect();
        for generation in 1..=LAST {
            publisher.publish(&table(generation));
            assert!(publisher.acknowledged() <= generation);
        }
        while !publisher.tick() {
            thread::yield_now();
        }
        assert_eq!(publisher.acknowledged(), LAST);
        for thread in threads {
            thread.join().expect("subscriber");
        }
    }
}
