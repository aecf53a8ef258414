//! The compiled table and `decide`.

use super::{Answer, Finding, ListenerId, ListenerSpec, PolicySpec, RouteId, RouteLabels, SourceRef};
use crate::reason::PassReason;

/// A well-formed preflight, as `http` read it. Values are raw (no OWS around them), unvalidated unless said.
#[derive(Clone, Copy, Debug)]
pub struct Preflight<'a> {
    /// The listener that took the connection.
    pub listener: ListenerId,
    /// The `Host` value.
    pub host: &'a [u8],
    /// Origin-form target: an unambiguous path, then maybe a query.
    pub target: &'a [u8],
    /// The `Origin` value, not empty.
    pub origin: &'a [u8],
    /// `Access-Control-Request-Method`: a valid token.
    pub method: &'a [u8],
    /// The `Access-Control-Request-Headers` lines in order.
    pub headers: &'a [&'a [u8]],
    /// `Access-Control-Request-Private-Network: true` was sent.
    pub private_network: bool,
}

/// What becomes of a preflight.
#[derive(Clone, Copy, Debug)]
pub enum Decision<'a> {
    /// Answered here.
    Answer(Answer<'a>),
    /// Left to the proxy; the route if one was found.
    Pass(PassReason, RouteId),
}

/// Watches `decide` step by step; `explain` prints what it hears. [`NoTrace`] compiles to nothing.
pub trait Trace {
    /// One step: what was looked at and what came of it. The closure runs only where somebody listens.
    fn step(&mut self, text: impl FnOnce() -> String);
}

/// Nobody listens.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoTrace;

impl Trace for NoTrace {
    #[inline(always)]
    fn step(&mut self, _text: impl FnOnce() -> String) {}
}

/// Every policy of one configuration, compiled, immutable.
#[derive(Debug)]
pub struct Table {
    generation: u64,
}

impl Table {
    /// Compiles. Never fails: what conflicts or cannot be modelled becomes an entry that passes, and a finding with
    /// the policy's source that says so (the caller decides whether findings refuse the configuration).
    pub fn compile(
        _listeners: &[ListenerSpec],
        _policies: &[PolicySpec],
        _labels: &mut RouteLabels,
        generation: u64,
    ) -> (Table, Vec<(SourceRef, Finding)>) {
        (Table { generation }, Vec::new())
    }

    /// The number it was compiled as; grows with each publication.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Number of policies.
    pub fn policies(&self) -> usize {
        0
    }

    /// Decides a preflight. No allocation, no I/O, linear in the request's length, flat in the table's size.
    #[inline]
    pub fn decide<'a>(&'a self, request: &Preflight<'a>) -> Decision<'a> {
        self.decide_traced(request, &mut NoTrace)
    }

    /// As [`Table::decide`], telling each step to `trace`.
    pub fn decide_traced<'a>(&'a self, _request: &Preflight<'a>, _trace: &mut impl Trace) -> Decision<'a> {
        Decision::Pass(PassReason::NoHost, RouteId::OTHER)
    }
}
