//! The publication protocol, apart from what carries it: the daemon runs it over rtrb rings and an eventfd, the model
//! checker over loom's primitives.
#![forbid(unsafe_code)]

use std::mem;

/// What is published carries its generation.
pub(super) trait Versioned: Clone {
    /// Grows with each publication.
    fn generation(&self) -> u64;
}

/// The control side's ends of one subscriber's queues.
pub(super) trait Outlet<T> {
    /// Into the queue of new values; given back if there is no room.
    fn send(&mut self, value: T) -> Result<(), T>;
    /// Wakes the subscriber.
    fn wake(&self);
    /// From the queue of retired values.
    fn take_back(&mut self) -> Option<T>;
    /// The generation that the subscriber says it uses.
    fn acknowledged(&self) -> u64;
}

/// The subscriber's ends.
pub(super) trait Inlet<T> {
    /// Takes the wake-up back; what is sent from here on wakes again.
    fn clear_wake(&self);
    /// From the queue of new values.
    fn receive(&mut self) -> Option<T>;
    /// Into the queue of retired values.
    fn retire(&mut self, value: T) -> Result<(), T>;
    /// Says that this generation is in use.
    fn acknowledge(&self, generation: u64);
}

/// What the control side keeps of one subscriber.
///
/// It counts the values in the subscriber's hands: the current one, those sent and not taken, those retired and not
/// yet taken back. It sends only while that count is at most `depth`, so at most `1 + depth` are ever out. One of them
/// is always the current one, hence neither queue ever holds more than `depth`: with queues of that capacity neither
/// `send` nor `retire` can find its queue full.
#[derive(Debug)]
pub(super) struct Control<T, O> {
    outlet: O,
    depth: usize,
    out: usize,
    waiting: Option<T>,
}

impl<T: Versioned, O: Outlet<T>> Control<T, O> {
    /// For a subscriber that owns its first value already.
    pub(super) fn new(outlet: O, depth: usize) -> Self {
        Self { outlet, depth, out: 1, waiting: None }
    }

    /// Sends the value, or keeps it until [`Control::tick`] finds room; a value kept from before is dropped here.
    pub(super) fn publish(&mut self, value: T) {
        self.waiting = Some(value);
        self.tick();
    }

    /// Frees what came back and sends what waits. True: nothing waits and nothing but the current value,
    /// which is the newest and acknowledged, is out.
    pub(super) fn tick(&mut self) -> bool {
        while let Some(retired) = self.outlet.take_back() {
            self.out -= 1;
            drop(retired);
        }
        if self.out <= self.depth
            && let Some(value) = self.waiting.take()
        {
            match self.outlet.send(value) {
                Ok(()) => {
                    self.out += 1;
                    self.outlet.wake();
                }
                Err(value) => self.waiting = Some(value),
            }
        }
        self.waiting.is_none() && self.out == 1
    }

    /// The generation in use.
    pub(super) fn acknowledged(&self) -> u64 {
        self.outlet.acknowledged()
    }
}

/// The subscriber's half.
#[derive(Debug)]
pub(super) struct Holder<T, I> {
    pub(super) inlet: I,
    current: T,
}

impl<T: Versioned, I: Inlet<T>> Holder<T, I> {
    /// A holder of `first`.
    pub(super) fn new(inlet: I, first: T) -> Self {
        inlet.acknowledge(first.generation());
        Self { inlet, current: first }
    }

    /// The current value.
    #[inline]
    pub(super) fn current(&self) -> &T {
        &self.current
    }

    /// Takes the newest value that waits and retires all before it. True if there was one.
    pub(super) fn poll(&mut self) -> bool {
        // First the wake-up, then the queue: a value that is sent in between is taken here or wakes again.
        self.inlet.clear_wake();
        let mut changed = false;
        while let Some(value) = self.inlet.receive() {
            let old = mem::replace(&mut self.current, value);
            changed = true;
            // Before the old one goes back: once the control side has it, it also sees who replaced it.
            self.inlet.acknowledge(self.current.generation());
            if let Err(old) = self.inlet.retire(old) {
                // Cannot be (see `Control`). Were it so, a leak is better than to free here.
                debug_assert!(false, "the retire queue is full");
                mem::forget(old);
            }
        }
        changed
    }
}
