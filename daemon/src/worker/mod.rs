//! The workers: one thread per core, each with its own listening sockets, ring and table.

use crate::{
    ask::Sampler, http::HeadLimits, policy::ListenerId, publish::Subscriber, relay, telemetry::WorkerStats,
};
use epoll::Epoll;
use rustix::{
    process::{Resource, getrlimit, setrlimit},
    thread::{CpuSet, sched_setaffinity},
};
use shared::{Shared, Stop};
use std::{
    fmt, io,
    os::fd::OwnedFd,
    sync::{Arc, mpsc},
    thread::{self, JoinHandle},
    time::Duration,
};
use tracing::{error, info, warn};
use uring::{Features, Uring};

mod buffers;
mod connection;
mod epoll;
pub mod listen;
mod shared;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod uring;

/// Which engine drives the sockets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// io_uring where the kernel allows it, else epoll.
    #[default]
    Auto,
    /// io_uring, or an error.
    IoUring,
    /// epoll.
    Epoll,
}

/// Bounds and times of a connection that a worker owns.
#[derive(Clone, Copy, Debug)]
pub struct ConnectionLimits {
    /// The head.
    pub head: HeadLimits,
    /// From the first byte of a request to the end of its head.
    pub header_timeout: Duration,
    /// Between requests, and for connections that never sent a byte.
    pub idle_timeout: Duration,
    /// For a client that does not read its answers.
    pub send_timeout: Duration,
    /// Open connections per worker; beyond, the longest idle one is closed, else accepting pauses.
    pub max_connections: usize,
}

/// What one worker is made of. Its listening sockets can come from anywhere (own SO_REUSEPORT binds now).
#[derive(Debug)]
pub struct WorkerSetup {
    /// Its number from 0.
    pub index: usize,
    /// The CPU it is pinned to.
    pub cpu: Option<usize>,
    /// Its listening sockets.
    pub listeners: Vec<WorkerListener>,
    /// Its table.
    pub tables: Subscriber,
    /// Where connections go that are not ours; `None`: no listener has an upstream.
    pub relay: Option<relay::Handle>,
    /// Its counters.
    pub stats: Arc<WorkerStats>,
    /// What it shows its preflights to; `None`: the proxy is not asked.
    pub sampler: Option<Sampler>,
}

/// A listening socket of a worker.
#[derive(Debug)]
pub struct WorkerListener {
    /// The listener that the socket belongs to.
    pub id: ListenerId,
    /// Bound and listening.
    pub socket: OwnedFd,
    /// How its connections are served.
    pub serves: Serves,
}

/// How the connections of a listener are served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Serves {
    /// What is not ours ends with a 4xx.
    #[default]
    Alone,
    /// What is not ours goes to the relay.
    BeforeProxy,
    /// Beside the proxy: one answer, then the end, so that the next request goes to the proxy itself. What is not ours
    /// goes to the relay, which passes it on or has the client come again.
    BesideProxy,
}

/// Running workers.
#[derive(Debug)]
pub struct Workers {
    engine: String,
    threads: Vec<JoinHandle<io::Result<()>>>,
    stops: Vec<Arc<Stop>>,
}

impl Workers {
    /// Chooses the engine once, logs it, starts a thread for each set-up. They accept when this returns.
    ///
    /// # Errors
    /// The engine was asked for by name and the kernel has it not, or a thread or ring cannot be made.
    pub fn start(
        setups: Vec<WorkerSetup>,
        engine: EngineChoice,
        mut limits: ConnectionLimits,
    ) -> io::Result<Workers> {
        let open_files = raise_open_files();
        let engine = Engine::choose(engine)?;
        if let Engine::Uring(features) = engine
            && features.is_direct()
        {
            let listeners = setups.iter().map(|setup| setup.listeners.len()).max().unwrap_or(0);
            let beyond = uring::entries(limits.max_connections, listeners).saturating_sub(open_files);
            if beyond > 0 {
                let fits = limits.max_connections.saturating_sub(beyond).max(1);
                warn!(
                    max_connections = limits.max_connections,
                    open_files,
                    fits,
                    "the limit on open files is too low for limits.max_connections: raise it; using less"
                );
                limits.max_connections = fits;
            }
        }
        info!(engine = %engine, workers = setups.len(), "starting workers");
        Self::start_on(engine, setups, limits)
    }

    fn start_on(engine: Engine, setups: Vec<WorkerSetup>, limits: ConnectionLimits) -> io::Result<Workers> {
        let mut workers = Workers { engine: engine.to_string(), threads: Vec::new(), stops: Vec::new() };
        let (started, starts) = mpsc::channel();
        let count = setups.len();
        let mut spawn = |setup: WorkerSetup| {
            let stop = Arc::new(Stop::new()?);
            workers.stops.push(Arc::clone(&stop));
            let started = started.clone();
            let name = format!("worker-{}", setup.index);
            let run = move || run(setup, engine, limits, stop, started);
            workers.threads.push(thread::Builder::new().name(name).spawn(run)?);
            Ok(())
        };
        let spawned: io::Result<()> = setups.into_iter().try_for_each(&mut spawn);
        drop(started);
        // A worker drops its sender when it has started or failed.
        if spawned.is_ok() && starts.iter().count() == count {
            return Ok(workers);
        }
        workers.shutdown(Duration::ZERO);
        let failed = workers.join();
        spawned.and(failed).and(Err(io::Error::other("a worker ended while it was starting")))
    }

    /// The engine in use: `io_uring` or `epoll`, with its features, for logs and metrics.
    pub fn engine(&self) -> &str {
        &self.engine
    }

    /// Stops accepting (what the kernel had accepted is still served), closes idle connections, finishes the others,
    /// at most until `grace` is over, then ends the threads. Does not block: see [`Workers::join`].
    pub fn shutdown(&self, grace: Duration) {
        for stop in &self.stops {
            stop.order(grace);
        }
    }

    /// Whether a thread has ended: before a shutdown that is a defect.
    pub fn has_ended(&self) -> bool {
        self.threads.iter().any(JoinHandle::is_finished)
    }

    /// Waits for the threads.
    ///
    /// # Errors
    /// The first failure of a worker.
    pub fn join(self) -> io::Result<()> {
        let mut first = Ok(());
        for thread in self.threads {
            let result = thread.join().unwrap_or_else(|_| Err(io::Error::other("a worker panicked")));
            first = first.and(result);
        }
        first
    }
}

/// The engine as chosen.
#[derive(Clone, Copy, Debug)]
enum Engine {
    Uring(Features),
    Epoll,
}

impl Engine {
    fn choose(choice: EngineChoice) -> io::Result<Self> {
        if choice == EngineChoice::Epoll {
            return Ok(Engine::Epoll);
        }
        // On a thread of its own: a ring's end interrupts system calls of the thread that made it.
        let probed = thread::scope(|scope| scope.spawn(Features::probe).join());
        match probed.unwrap_or_else(|_| Err(io::Error::other("the probe panicked"))) {
            Ok(features) => Ok(Engine::Uring(features)),
            Err(error) if choice == EngineChoice::Auto && error.kind() == io::ErrorKind::Unsupported => {
                warn!(%error, "no io_uring here: the workers use epoll");
                Ok(Engine::Epoll)
            }
            Err(error) => Err(io::Error::new(
                error.kind(),
                format!(
                    "cannot use io_uring: {error}; allow it, or set workers.engine = \"auto\" or \"epoll\""
                ),
            )),
        }
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Engine::Uring(features) => features.fmt(f),
            Engine::Epoll => f.write_str("epoll"),
        }
    }
}

/// Asks for the longest time slice that there is: on a CPU that they share, a proxy that wakes up with a shorter one then goes
/// before this thread (`PREEMPT_SHORT`, kernel: kernel/sched/fair.c and features.h). Kernels before 6.12 ignore it.
///
/// # Errors
/// The system call is forbidden.
fn give_way() -> io::Result<()> {
    const LONGEST: u64 = 100_000_000; // nanoseconds: __setparam_fair, kernel/sched/syscalls.c
    let size = size_of::<libc::sched_attr>() as u32;
    // SAFETY: plain numbers, of which 0 is a value.
    let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
    // SAFETY: of the calling thread (0), into a struct of the size that is told.
    if unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    attributes.sched_runtime = LONGEST;
    // SAFETY: as above.
    if unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A worker's thread.
fn run(
    setup: WorkerSetup,
    engine: Engine,
    limits: ConnectionLimits,
    stop: Arc<Stop>,
    started: mpsc::Sender<()>,
) -> io::Result<()> {
    let WorkerSetup { index, cpu, listeners, tables, relay, stats, sampler } = setup;
    if let Some(cpu) = cpu {
        let mut set = CpuSet::new();
        set.set(cpu);
        if let Err(error) = sched_setaffinity(None, &set) {
            warn!(worker = index, cpu, %error, "cannot pin the worker to its CPU: it runs where the kernel puts it");
        }
    }
    if let Err(error) = give_way() {
        info!(worker = index, %error, "cannot lengthen the worker's time slice: the proxy waits for it a little longer");
    }
    let slots = uring::entries(limits.max_connections, listeners.len());
    let shared = Shared::new(tables, relay, stats, limits, stop, slots).with_sampler(sampler);
    // Moved, not borrowed: the starting thread waits until every sender is gone.
    let announce = |started: mpsc::Sender<()>| started.send(()).unwrap_or_default();
    let result = match engine {
        Engine::Uring(features) => Uring::new(features, listeners, shared).and_then(|uring| {
            announce(started);
            uring.run()
        }),
        Engine::Epoll => Epoll::new(listeners, shared).and_then(|epoll| {
            announce(started);
            epoll.run()
        }),
    };
    if let Err(error) = &result {
        error!(worker = index, %error, "the worker ended");
    }
    result
}

/// Raises the soft limit on open files to the hard one and returns it.
fn raise_open_files() -> usize {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // Refused only in odd set-ups; then the soft limit stays.
    let _ = setrlimit(Resource::Nofile, limit);
    getrlimit(Resource::Nofile)
        .current
        .map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX))
}
