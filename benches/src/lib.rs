//! How preflightd is measured: a load generator, servers to compare with, and honest arithmetic over the rounds.
//!
//! Wall-clock figures are only ever compared within one run: every server is up at once, one thread each on one CPU, the
//! generator on another, in interleaved slices. Slices that other work disturbed are measured again or left out.

#![expect(clippy::cast_precision_loss, reason = "counts and nanoseconds of one run are far below 2^52")]

pub mod acrh;
pub mod bulk;
mod connect;
pub mod cpu;
pub mod flood;
pub mod lab;
pub mod load;
pub mod mix;
pub mod openloop;
pub mod peers;
pub mod policies;
pub mod process;
pub mod report;
pub mod rounds;
pub mod share;
pub mod stats;
pub mod storm;
pub mod workload;
