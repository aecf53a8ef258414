//! The relay: a connection whose next request is not ours goes to the upstream, every byte in order, both ways.

use crate::{policy::ListenerId, reason::PassReason, telemetry::RelayStats};
use std::{io, net::SocketAddr, os::fd::OwnedFd, sync::Arc, time::Duration};

/// How the upstream learns the client's address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ProxyProtocol {
    /// Asked of the upstream once (see `relay::detect`): v2 where it understands it, else off. Logged.
    #[default]
    Auto,
    /// Not sent.
    Off,
    /// PROXY protocol version 1 (text).
    V1,
    /// PROXY protocol version 2 (binary).
    V2,
}

/// Where the connections of one listener go.
#[derive(Clone, Debug)]
pub struct Upstream {
    /// The listener.
    pub listener: ListenerId,
    /// The proxy's address.
    pub address: SocketAddr,
    /// The client's address in front of the bytes.
    pub proxy_protocol: ProxyProtocol,
    /// Connect from the client's own address (IP_TRANSPARENT; needs CAP_NET_ADMIN and a routing rule).
    pub transparent: bool,
}

/// Bounds and times of the relay.
#[derive(Clone, Copy, Debug)]
pub struct RelayLimits {
    /// Relay threads.
    pub threads: usize,
    /// Connections relayed at once over all threads; beyond, a client gets a 503.
    pub max_connections: usize,
    /// To reach the upstream.
    pub connect_timeout: Duration,
    /// Without a byte in either direction; zero: none.
    pub idle_timeout: Duration,
    /// Buffer per direction in bytes.
    pub buffer_bytes: usize,
}

/// A connection on its way from a worker to the relay.
#[derive(Debug)]
pub struct Handoff {
    /// The client's socket: an ordinary descriptor, nothing of it in any ring.
    pub client: OwnedFd,
    /// The listener that it came by.
    pub listener: ListenerId,
    /// Bytes already read and not answered: they go to the upstream first.
    pub bytes: Vec<u8>,
    /// The client has already half-closed.
    pub eof: bool,
    /// Why it is not ours.
    pub reason: PassReason,
}

/// A worker's side of the relay: an rtrb ring and a wake.
#[derive(Debug)]
pub struct Handle {}

impl Handle {
    /// Hands a connection over. Full ring: gives it back, try again after the next batch of events.
    pub fn push(&mut self, handoff: Handoff) -> Result<(), Handoff> {
        Err(handoff)
    }
}

/// Running relay threads.
#[derive(Debug)]
pub struct Relay {}

impl Relay {
    /// Starts the threads; one handle for each worker.
    pub fn start(
        _upstreams: Vec<Upstream>,
        _limits: RelayLimits,
        _workers: usize,
        _stats: Arc<RelayStats>,
    ) -> io::Result<(Relay, Vec<Handle>)> {
        todo!()
    }

    /// No new connections after the handles are dropped; the running ones end by themselves, at most until `grace`
    /// is over. Does not block: see [`Relay::join`].
    pub fn shutdown(&self, _grace: Duration) {
        todo!()
    }

    /// Waits for the threads.
    pub fn join(self) -> io::Result<()> {
        todo!()
    }
}
