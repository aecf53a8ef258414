//! Which CPU the servers and the generator run on.
#![forbid(unsafe_code)]

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::io;

/// The two CPUs of a measurement.
#[derive(Clone, Copy, Debug)]
pub struct Cpus {
    /// The servers', one at a time.
    pub server: usize,
    /// The generator's (and with it most of the servers' receive path: loopback delivers on the sender's CPU).
    pub client: usize,
}

impl Cpus {
    /// The first two CPUs that this process may run on.
    ///
    /// # Errors
    /// There is only one: server and generator would take turns on it.
    pub fn choose() -> io::Result<Self> {
        let allowed = sched_getaffinity(None)?;
        let mut cpus = (0..CpuSet::MAX_CPU).filter(|&cpu| allowed.is_set(cpu));
        match (cpus.next(), cpus.next()) {
            (Some(server), Some(client)) => Ok(Self { server, client }),
            _ => Err(io::Error::other(
                "choosing CPUs: a server and the load generator need one each, and only one may be used here; \
                 run this where two are allowed (see taskset -p $$)",
            )),
        }
    }
}

/// Binds the calling thread, and every process that it starts from now on, to one CPU.
pub fn pin(cpu: usize) -> io::Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set)?;
    Ok(())
}
