//! The workers: one thread per core, each with its own listening sockets, ring and table.

use crate::{http::HeadLimits, policy::ListenerId, publish::Subscriber, relay, telemetry::WorkerStats};
use std::{io, os::fd::OwnedFd, sync::Arc, time::Duration};

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
}

/// A listening socket of a worker.
#[derive(Debug)]
pub struct WorkerListener {
    /// The listener that the socket belongs to.
    pub id: ListenerId,
    /// Bound and listening.
    pub socket: OwnedFd,
    /// Without one, what is not ours ends with a 4xx.
    pub has_upstream: bool,
}

/// Running workers.
#[derive(Debug)]
pub struct Workers {}

impl Workers {
    /// Chooses the engine once, logs it, starts a thread for each set-up.
    ///
    /// # Errors
    /// The engine was asked for by name and the kernel has it not, or a thread or ring cannot be made.
    pub fn start(
        _setups: Vec<WorkerSetup>,
        _engine: EngineChoice,
        _limits: ConnectionLimits,
    ) -> io::Result<Workers> {
        todo!()
    }

    /// The engine in use: `io_uring` or `epoll`, with its features, for logs and metrics.
    pub fn engine(&self) -> &str {
        todo!()
    }

    /// Stops accepting (what the kernel had accepted is still served), closes idle connections, finishes the others,
    /// at most until `grace` is over, then ends the threads. Does not block: see [`Workers::join`].
    pub fn shutdown(&self, _grace: Duration) {
        todo!()
    }

    /// Waits for the threads.
    pub fn join(self) -> io::Result<()> {
        todo!()
    }
}
