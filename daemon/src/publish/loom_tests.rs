//! The publication protocol under loom, in every interleaving: rtrb itself and the eventfd are modelled (a bounded
//! queue, a flag to sleep on), [`Control`] and [`Holder`] are the daemon's own.

use super::protocol::{Control, Holder, Inlet, Outlet, Versioned};
use loom::{
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    thread,
};
use std::collections::VecDeque;

/// Counts how often each generation was freed and by which side.
#[derive(Debug)]
struct Ledger {
    made: AtomicUsize,
    freed: AtomicUsize,
}

/// A value as `Arc<Table>` is one: the last clone frees.
#[derive(Clone, Debug)]
struct Value {
    generation: u64,
    _body: Arc<Body>,
}

#[derive(Debug)]
struct Body {
    ledger: std::sync::Arc<Ledger>,
}

impl Drop for Body {
    fn drop(&mut self) {
        self.ledger.freed.fetch_add(1, Ordering::Relaxed);
    }
}

impl Versioned for Value {
    fn generation(&self) -> u64 {
        self.generation
    }
}

impl Ledger {
    fn new() -> std::sync::Arc<Self> {
        std::sync::Arc::new(Self { made: AtomicUsize::new(0), freed: AtomicUsize::new(0) })
    }

    fn value(self: &std::sync::Arc<Self>, generation: u64) -> Value {
        self.made.fetch_add(1, Ordering::Relaxed);
        Value { generation, _body: Arc::new(Body { ledger: std::sync::Arc::clone(self) }) }
    }

    fn alive(&self) -> usize {
        self.made.load(Ordering::Relaxed) - self.freed.load(Ordering::Relaxed)
    }
}

/// A bounded queue that, like rtrb, never blocks; the lock makes what was written before a push seen after its pop.
struct Queue {
    items: Mutex<VecDeque<Value>>,
    capacity: usize,
}

impl Queue {
    fn push(&self, value: Value) -> Result<(), Value> {
        let mut items = self.items.lock().expect("lock");
        if items.len() == self.capacity {
            return Err(value);
        }
        items.push_back(value);
        Ok(())
    }

    fn pop(&self) -> Option<Value> {
        self.items.lock().expect("lock").pop_front()
    }
}

/// Both queues, the eventfd (a flag that stays set until it is read) and the acknowledged generation.
struct Model {
    new: Queue,
    retired: Queue,
    woken: Mutex<bool>,
    wakes: Condvar,
    acknowledged: AtomicU64,
}

struct End(Arc<Model>);

impl End {
    /// As poll(2) on the eventfd: returns when it is readable, reads nothing.
    fn sleep(&self) {
        let mut woken = self.0.woken.lock().expect("lock");
        while !*woken {
            woken = self.0.wakes.wait(woken).expect("lock");
        }
    }
}

impl Outlet<Value> for End {
    fn send(&mut self, value: Value) -> Result<(), Value> {
        self.0.new.push(value).expect("the sender counts: the queue has room");
        Ok(())
    }

    fn wake(&self) {
        *self.0.woken.lock().expect("lock") = true;
        self.0.wakes.notify_one();
    }

    fn take_back(&mut self) -> Option<Value> {
        self.0.retired.pop()
    }

    fn acknowledged(&self) -> u64 {
        self.0.acknowledged.load(Ordering::Acquire)
    }
}

impl Inlet<Value> for End {
    fn clear_wake(&self) {
        *self.0.woken.lock().expect("lock") = false;
    }

    fn receive(&mut self) -> Option<Value> {
        self.0.new.pop()
    }

    fn retire(&mut self, value: Value) -> Result<(), Value> {
        self.0.retired.push(value).expect("the sender counts: the retire queue has room");
        Ok(())
    }

    fn acknowledge(&self, generation: u64) {
        self.0.acknowledged.store(generation, Ordering::Release);
    }
}

fn pair(depth: usize, first: Value) -> (Control<Value, End>, Holder<Value, End>) {
    let queue = || Queue { items: Mutex::new(VecDeque::new()), capacity: depth };
    let model = Arc::new(Model {
        new: queue(),
        retired: queue(),
        woken: Mutex::new(false),
        wakes: Condvar::new(),
        acknowledged: AtomicU64::new(0),
    });
    let holder = Holder::new(End(Arc::clone(&model)), first);
    (Control::new(End(model), depth), holder)
}

/// One publisher, one subscriber that sleeps until woken, `publications` in a row through queues of `depth`.
/// `preemptions`: at most so many per interleaving, where all of them would take minutes.
fn publish_all(depth: usize, publications: u64, preemptions: Option<usize>) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = preemptions;
    model.check(move || {
        let ledger = Ledger::new();
        let (mut control, mut holder) = pair(depth, ledger.value(0));
        let worker = thread::spawn(move || {
            // A wake-up that gets lost is a deadlock here, which loom reports.
            while holder.current().generation() < publications {
                holder.inlet.sleep();
                let before = holder.current().generation();
                let changed = holder.poll();
                assert_eq!(changed, holder.current().generation() > before, "only ever newer");
            }
            holder
        });
        for generation in 1..=publications {
            control.publish(ledger.value(generation));
            assert!(control.acknowledged() <= generation, "ahead of what was published");
            assert!(ledger.alive() <= 2 + depth, "current, on their way, waiting");
        }
        while !control.tick() {
            thread::yield_now();
        }
        assert_eq!(control.acknowledged(), publications);
        let holder = worker.join().expect("worker");
        assert_eq!(holder.current().generation(), publications, "the newest wins");
        assert_eq!(ledger.alive(), 1, "all but the current one are freed, by the control side's tick");
        drop((holder, control));
        assert_eq!(ledger.alive(), 0, "each exactly once");
    });
}

#[test]
fn loom_every_table_arrives_or_is_superseded_and_is_freed_once() {
    publish_all(1, 2, None);
}

#[test]
fn loom_deeper_queues() {
    publish_all(2, 3, Some(2));
}

#[test]
fn loom_acknowledged_is_never_ahead_of_the_table_in_use() {
    loom::model(|| {
        let ledger = Ledger::new();
        let (mut control, mut holder) = pair(1, ledger.value(0));
        let in_use = Arc::new(AtomicU64::new(0));
        let seen = Arc::clone(&in_use);
        control.publish(ledger.value(1));
        let worker = thread::spawn(move || {
            // What a request that begins now would be answered from. Written before poll() ends, as the
            // acknowledgement is: whoever sees the acknowledgement must not see an older table in use afterwards.
            if holder.poll() {
                seen.store(holder.current().generation(), Ordering::Relaxed);
            }
            holder
        });
        let acknowledged = control.acknowledged();
        let holder = worker.join().expect("worker");
        assert!(acknowledged <= holder.current().generation());
        assert_eq!(in_use.load(Ordering::Relaxed), holder.current().generation());
    });
}

#[test]
fn loom_a_subscriber_that_ends_midway_leaks_nothing() {
    loom::model(|| {
        let ledger = Ledger::new();
        let (mut control, mut holder) = pair(1, ledger.value(0));
        let worker = thread::spawn(move || {
            holder.poll();
        });
        control.publish(ledger.value(1));
        control.publish(ledger.value(2));
        worker.join().expect("worker");
        control.tick();
        drop(control);
        assert_eq!(ledger.alive(), 0);
    });
}
