//! Which CPU the servers and the generator run on.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::io;

/// The two CPUs of a measurement, or something of each.
#[derive(Clone, Copy, Debug)]
pub struct Cpus<T = usize> {
    /// The servers', one at a time.
    pub server: T,
    /// The generator's (and with it most of the servers' receive path: loopback delivers on the sender's CPU).
    pub client: T,
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

/// Lets the calling thread go before all others on its CPU: for one that sleeps most of the time and must be on time.
pub fn go_first() -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: 1 };
    // SAFETY: of the calling thread (0), with the parameters' address.
    if unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameters) } == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error())
}
