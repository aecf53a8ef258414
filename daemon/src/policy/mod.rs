//! The policy engine: origin patterns, routes, dialects, the compiled table and `decide`.
//!
//! Pure: no I/O, no clock, no allocation in [`Table::decide`]. Every tier and `explain` ask the same table.
#![forbid(unsafe_code)]

mod acrh;
pub mod answer;
mod core;
pub mod dialect;
mod host;
pub mod kernel;
pub mod labels;
pub mod learned;
mod origin;
mod regex;
mod routes;
pub mod spec;
mod strings;
pub mod table;

pub(crate) use acrh::is_token;
pub use answer::{Answer, Connection, DenyReason, Outcome, Pieces};
pub use kernel::KernelTable;
pub use labels::{RouteId, RouteLabels};
pub use spec::{
    Finding, HostPattern, ListenerId, ListenerSpec, OnDenied, PathMatch, PolicySpec, Severity, SourceRef,
};
pub(crate) use table::is_host_pattern;
pub use table::{Decision, Described, NoTrace, Preflight, Table, Trace};
