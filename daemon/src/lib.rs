//! preflightd answers CORS preflights beside the proxy from a compiled policy table, and passes all else to it.
//!
//! The rooms, from the pure core outwards: [`policy`] decides, [`http`] reads heads, [`publish`] brings tables to
//! workers, [`worker`] answers on sockets, [`relay`] passes the rest, `steer` loads the kernel's part, [`ask`] asks the
//! proxy itself, [`config`] and [`cli`] are the user's side, [`explain`] tells what a request meets, [`telemetry`] shows
//! what happens.

pub mod ask;
pub mod cli;
pub mod config;
pub mod explain;
pub mod http;
pub mod policy;
pub mod publish;
pub mod reason;
pub mod relay;
pub mod sources;
#[cfg(feature = "ebpf")]
pub mod steer;
pub mod telemetry;
pub mod worker;
