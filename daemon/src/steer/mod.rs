//! The kernel's part: the eBPF programs, and everything that they need of user space.
//!
//! [`Steering`] is the whole of it for one network namespace. It loads the embedded object (`object`), keeps maps and
//! links where they outlive a daemon (`pins`), finds out what it must know of the namespace ([`interfaces`], [`sysctl`],
//! [`firewall`]), and tells the programs.

use std::{error, fmt};

mod barrier;
pub mod firewall;
#[cfg(test)]
mod frames;
pub mod interfaces;
pub mod listeners;
mod maps;
pub mod netns;
mod object;
mod pins;
pub mod probe;
mod self_test;
mod steering;
pub mod sysctl;

pub use maps::{Counts, Marks, Outcomes, Samples};
pub use object::{EmptyProgram, verified_instructions};
pub use pins::{Detached, detach};
pub use preflightd_common::abi::{ask, event, fail_open, kind, outcome};
pub use steering::{KernelReport, PortReport, Report, Service, State, Steering};

const PRIVILEGES: &str = "run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON";

/// Why the kernel's part does not work: what was being done, the cause, and what to do about it.
#[derive(Debug)]
pub struct Error {
    what: String,
    remedy: String,
    cause: Box<dyn error::Error + Send + Sync>,
}

impl Error {
    fn new<E: Into<Box<dyn error::Error + Send + Sync>>>(
        what: impl Into<String>,
        remedy: impl Into<String>,
    ) -> impl FnOnce(E) -> Self {
        |cause| Self { what: what.into(), remedy: remedy.into(), cause: cause.into() }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {}: {}", self.what, self.cause)?;
        let mut source = self.cause.source();
        while let Some(cause) = source {
            write!(f, ": {cause}")?;
            source = cause.source();
        }
        write!(f, "; {}", self.remedy)
    }
}

impl error::Error for Error {}
