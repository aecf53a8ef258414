//! The test lab: the real daemon, real proxies, a real browser, upstreams that record every byte, and a client that
//! sends bytes as it is told. Tests by behaviour are in `tests/`; `cargo xtask demo` stands on the same parts.
//!
//! In the environment, `PREFLIGHTD_LAB=plain` runs the tests of steering against the proxy alone, and `PREFLIGHTD_FULL=1`
//! in their long forms.
//!
//! Every part runs on free ports in a temporary directory of its own and is gone when its value is dropped.

pub mod browser;
pub mod client;
pub mod cluster;
pub mod daemon;
pub mod envoy;
pub mod express;
pub mod ingress_nginx;
pub mod link;
pub mod load;
pub mod netns;
pub mod nginx;
pub mod random;
pub mod site;
pub mod smuggling;
pub mod steering;
pub mod upstream;
pub mod wire;

pub use client::{Client, Response};
pub use cluster::Cluster;
pub use daemon::{Config, Daemon, Engine};
pub use express::Express;
pub use nginx::Nginx;
pub use upstream::{Behaviour, Upstream};
