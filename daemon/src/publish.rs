//! Table publication: how a new table reaches every worker and an old one comes back to be freed.
//!
//! Each worker owns its current table (an `Arc` of its own: reading is a plain pointer read). Tables travel through one
//! rtrb ring per worker with an eventfd to wake it; replaced tables return through a second ring, so that no worker
//! frees memory. The kernel tier will be one more subscriber.

use crate::policy::Table;
use std::{io, os::fd::BorrowedFd, sync::Arc};

/// The control thread's side.
#[derive(Debug)]
pub struct Publisher {}

/// One worker's side.
#[derive(Debug)]
pub struct Subscriber {}

impl Publisher {
    /// A publisher and `workers` subscribers that all own `first`.
    pub fn new(_workers: usize, _first: Arc<Table>) -> io::Result<(Publisher, Vec<Subscriber>)> {
        todo!()
    }

    /// Sends the table to every subscriber and wakes it. A subscriber that has not yet taken earlier tables gets
    /// only the newest (tables in between are dropped here).
    pub fn publish(&mut self, _table: &Arc<Table>) {
        todo!()
    }

    /// Sends what a full ring held back and frees what came back; call it now and then. True: nothing is pending.
    pub fn tick(&mut self) -> bool {
        todo!()
    }

    /// The generation that every subscriber has taken: readiness waits for it.
    pub fn acknowledged(&self) -> u64 {
        todo!()
    }

    /// The generation of each subscriber.
    pub fn generations(&self) -> impl Iterator<Item = u64> {
        std::iter::empty()
    }
}

impl Subscriber {
    /// The current table: a plain pointer read.
    #[inline]
    pub fn table(&self) -> &Table {
        todo!()
    }

    /// Becomes readable when a table waits.
    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        todo!()
    }

    /// Takes the newest waiting table and retires the old one. True if the table changed. Never blocks, never frees.
    pub fn poll(&mut self) -> bool {
        todo!()
    }
}
