//! Every metric, label and bucket; health.
//!
//! Workers count into cells of their own (single writer, plain loads and stores, no shared cache line); a scrape adds
//! them up ([`metrics`]). Two surfaces ([`admin`]): metrics and health on an address of the node, `explain` and the
//! status on a Unix socket.
#![forbid(unsafe_code)]

pub mod admin;
mod metrics;
mod status;

pub use metrics::Metrics;
pub use status::{ReloadResult, Running, Status};

use crate::{
    policy::{DenyReason, Outcome, RouteId},
    reason::PassReason,
};
use std::sync::atomic::{AtomicU64, Ordering};

/// Upper bounds of the answer latency histogram in microseconds; one more bucket for what lies above.
pub const LATENCY_BUCKETS_US: &[u64] =
    &[5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 50_000, 250_000];

/// A counter that one thread writes and any thread reads: no locked instruction.
#[derive(Debug, Default)]
pub struct Cell(AtomicU64);

impl Cell {
    /// Adds; only ever called by the owning thread.
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// Reads; from any thread.
    #[inline]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// One worker's counters.
#[derive(Debug)]
#[repr(align(128))]
pub struct WorkerStats {
    /// Connections accepted.
    pub accepted: Cell,
    /// Connections ended by the worker or the client (not those handed to the relay).
    pub closed: Cell,
    /// Connections handed to the relay.
    pub handed_over: Cell,
    /// Connections closed for header timeout.
    pub header_timeouts: Cell,
    /// Connections closed for idleness.
    pub idle_timeouts: Cell,
    /// Connections closed because the client did not read.
    pub send_timeouts: Cell,
    /// Times that accepting paused or an idle connection was closed for the connection cap.
    pub capped: Cell,
    /// Errors of accept (such as EMFILE).
    pub accept_errors: Cell,
    /// Error responses (4xx/5xx of our own).
    pub error_responses: Cell,
    routes: Box<[[Cell; OUTCOMES]]>,
    latency: [Cell; LATENCY_BUCKETS_US.len() + 1],
    latency_ns: Cell,
}

/// Columns of a route: allowed, three denials, then every pass reason.
const DENIALS: usize = 3;
const OUTCOMES: usize = 1 + DENIALS + PassReason::ALL.len();

impl WorkerStats {
    /// Counters for `routes` route labels (see `RouteLabels::capacity`).
    pub fn new(routes: usize) -> Self {
        let row = || std::array::from_fn(|_| Cell::default());
        Self {
            accepted: Cell::default(),
            closed: Cell::default(),
            handed_over: Cell::default(),
            header_timeouts: Cell::default(),
            idle_timeouts: Cell::default(),
            send_timeouts: Cell::default(),
            capped: Cell::default(),
            accept_errors: Cell::default(),
            error_responses: Cell::default(),
            routes: (0..routes.max(1)).map(|_| row()).collect(),
            latency: std::array::from_fn(|_| Cell::default()),
            latency_ns: Cell::default(),
        }
    }

    /// Counts an answer.
    #[inline]
    pub fn answered(&self, route: RouteId, outcome: Outcome) {
        let column = match outcome {
            Outcome::Allowed => 0,
            Outcome::Denied(DenyReason::Origin) => 1,
            Outcome::Denied(DenyReason::Method) => 2,
            Outcome::Denied(DenyReason::Headers) => 3,
        };
        self.row(route)[column].add(1);
    }

    /// Counts a pass.
    #[inline]
    pub fn passed(&self, route: RouteId, reason: PassReason) {
        self.row(route)[1 + DENIALS + reason.index()].add(1);
    }

    /// Notes `answers` answers that took `nanoseconds` each, from complete head to the kernel's taking the answer.
    #[inline]
    pub fn latency(&self, nanoseconds: u64, answers: u64) {
        let us = nanoseconds / 1000;
        let bucket = LATENCY_BUCKETS_US.iter().position(|le| us < *le).unwrap_or(LATENCY_BUCKETS_US.len());
        self.latency[bucket].add(answers);
        self.latency_ns.add(nanoseconds.saturating_mul(answers));
    }

    /// Every counter of a route that is not zero: the route's number, outcome and reason as labels, the count.
    pub fn requests(&self) -> impl Iterator<Item = (RouteId, &'static str, &'static str, u64)> {
        self.routes.iter().enumerate().flat_map(|(route, row)| {
            row.iter().enumerate().filter_map(move |(column, cell)| {
                let (outcome, reason) = labels_of(column);
                let count = cell.get();
                (count > 0).then_some((RouteId(route as u32), outcome, reason, count))
            })
        })
    }

    /// The latency histogram: answers per bucket (the last is what lies above all bounds), and the sum in nanoseconds.
    pub fn latencies(&self) -> ([u64; LATENCY_BUCKETS_US.len() + 1], u64) {
        (std::array::from_fn(|i| self.latency[i].get()), self.latency_ns.get())
    }

    #[inline]
    fn row(&self, route: RouteId) -> &[Cell; OUTCOMES] {
        self.routes.get(route.0 as usize).unwrap_or(&self.routes[0])
    }
}

/// Outcome and reason of a column.
fn labels_of(column: usize) -> (&'static str, &'static str) {
    match column {
        0 => ("allowed", ""),
        1 => ("denied", "origin"),
        2 => ("denied", "method"),
        3 => ("denied", "headers"),
        column => ("passed", PassReason::ALL[column - 1 - DENIALS].as_str()),
    }
}

/// The relay's counters: written by several threads, seldom.
#[derive(Debug, Default)]
pub struct RelayStats {
    /// Connections taken over.
    pub connections: AtomicU64,
    /// Connections open now.
    pub open: AtomicU64,
    /// Bytes from client to upstream.
    pub bytes_up: AtomicU64,
    /// Bytes from upstream to client.
    pub bytes_down: AtomicU64,
    /// Upstream refused, unreachable or too slow to connect (a 502 each).
    pub upstream_errors: AtomicU64,
    /// Told to come again, with a 421, for they are the proxy's.
    pub turned_back: AtomicU64,
    /// Turned away with a 503.
    pub overloaded: AtomicU64,
    /// Ended by a reset or an I/O error after connecting.
    pub aborted: AtomicU64,
    /// Ended for idleness.
    pub idle_timeouts: AtomicU64,
}
