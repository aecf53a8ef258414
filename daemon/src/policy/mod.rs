//! The policy engine: origin patterns, routes, dialects, the compiled table and `decide`.
//!
//! Pure: no I/O, no clock, no allocation in [`Table::decide`]. Every tier and `explain` ask the same table.
#![forbid(unsafe_code)]

pub mod answer;
pub mod dialect;
pub mod labels;
pub mod spec;
pub mod table;

pub use answer::{Answer, Connection, DenyReason, Outcome};
pub use labels::{RouteId, RouteLabels};
pub use spec::{
    Finding, HostPattern, ListenerId, ListenerSpec, OnDenied, PathMatch, PolicySpec, Severity, SourceRef,
};
pub use table::{Decision, NoTrace, Preflight, Table, Trace};
