//! The relay: a connection whose next request is not ours goes to the upstream, every byte in order, both ways.
//!
//! A few threads of their own, each with a tokio-uring runtime (plain tokio where the kernel has no io_uring for us).
//! Workers hand connections over through rtrb rings, each with an eventfd that wakes the thread behind it.
//! From then on a connection belongs to one task of one thread: connect, PROXY header, bytes already read, then both
//! directions side by side, each reading only after all that it read before is written.

use crate::{policy::ListenerId, reason::PassReason, telemetry::RelayStats};
use rustix::event::{EventfdFlags, eventfd};
use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::OwnedFd,
    rc::Rc,
    sync::{Arc, mpsc},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{Semaphore, watch},
    task::JoinSet,
};

mod backend;
mod connection;
mod detect;
mod proxy_header;
mod upstream;

pub use backend::Backend;
pub use detect::detect;

/// What goes in front of a connection that we make to an upstream for ourselves: a header without a client. Empty with
/// [`ProxyProtocol::Off`], and with [`ProxyProtocol::Auto`], which must be asked for first.
pub(crate) fn own_header(protocol: ProxyProtocol) -> Vec<u8> {
    let mut header = Vec::new();
    match protocol {
        // proxy-protocol.txt, §2.1: the address is to be that of the connection itself.
        ProxyProtocol::V1 => header.extend_from_slice(b"PROXY UNKNOWN\r\n"),
        ProxyProtocol::V2 => proxy_header::v2_local(&mut header),
        ProxyProtocol::Off | ProxyProtocol::Auto => {}
    }
    header
}

/// Connections that wait in one worker's ring at most; the worker keeps what does not fit.
const RING: usize = 1024;
/// Clients that are being told of a full relay at once, per thread; beyond, they are closed without a word.
const TURNING_AWAY: usize = 256;

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
    /// Its name, for logs.
    pub name: String,
    /// The proxy's address.
    pub address: SocketAddr,
    /// The client's address in front of the bytes.
    pub proxy_protocol: ProxyProtocol,
    /// Connect from the client's own address (IP_TRANSPARENT; needs CAP_NET_ADMIN and a routing rule).
    pub transparent: bool,
}

/// Where connections go: to upstreams, or back to the client.
#[derive(Default)]
pub struct Ways {
    /// By listener.
    pub upstreams: Vec<Upstream>,
    /// For listeners without an upstream. The client is told to come again (421); first this is told the client's
    /// address and the bytes, so that it can see to it that the next attempt goes elsewhere.
    pub turn_back: Option<TurnBack>,
}

/// See [`Ways::turn_back`].
pub type TurnBack = Arc<dyn Fn(IpAddr, &[u8]) + Send + Sync>;

impl From<Vec<Upstream>> for Ways {
    fn from(upstreams: Vec<Upstream>) -> Self {
        Self { upstreams, turn_back: None }
    }
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
    /// Largest buffer per direction in bytes; it grows to this only while reads fill it. `cargo xtask bench relay`
    /// compares it with haproxy in TCP mode.
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

/// A worker's side of the relay: an rtrb ring and a wake. Dropping it ends this worker's intake.
#[derive(Debug)]
pub struct Handle {
    // Dropped before the wake, so that the thread finds the ring abandoned when it looks.
    ring: rtrb::Producer<Handoff>,
    wake: Wake,
}

impl Handle {
    /// Hands a connection over. Full ring: gives it back, try again after the next batch of events.
    pub fn push(&mut self, handoff: Handoff) -> Result<(), Handoff> {
        match self.ring.push(handoff) {
            Ok(()) => {
                self.wake.wake();
                Ok(())
            }
            Err(rtrb::PushError::Full(handoff)) => Err(handoff),
        }
    }
}

/// Running relay threads.
#[derive(Debug)]
pub struct Relay {
    backend: Backend,
    threads: Vec<JoinHandle<()>>,
    end: watch::Sender<Option<Instant>>,
}

impl Relay {
    /// Starts the threads; one handle for each worker. Several workers may share a thread.
    ///
    /// # Errors
    /// A thread, ring or eventfd cannot be made, or a listener asks for `transparent` without CAP_NET_ADMIN.
    pub fn start(
        ways: impl Into<Ways>,
        limits: RelayLimits,
        workers: usize,
        stats: Arc<RelayStats>,
    ) -> io::Result<(Relay, Vec<Handle>)> {
        Self::start_on(Backend::choose()?, ways, limits, workers, stats)
    }

    /// [`Relay::start`] on a backend of the caller's choice.
    ///
    /// # Errors
    /// As [`Relay::start`]; also if the kernel does not have that backend.
    pub fn start_on(
        backend: Backend,
        ways: impl Into<Ways>,
        limits: RelayLimits,
        workers: usize,
        stats: Arc<RelayStats>,
    ) -> io::Result<(Relay, Vec<Handle>)> {
        let Ways { upstreams, turn_back } = ways.into();
        for upstream in &upstreams {
            upstream::check_transparent(upstream)?;
        }
        let upstreams: HashMap<_, _> = upstreams
            .into_iter()
            .map(|config| (config.listener.0, upstream::Upstream::new(config)))
            .collect();
        // A thread without a worker would have nothing to do.
        let count = limits.threads.clamp(1, workers.max(1));
        tracing::info!(%backend, threads = count, "relay starts");

        let (end, ended) = watch::channel(None);
        let shared = Arc::new(Shared { backend, limits, upstreams, turn_back, stats, ended });
        let mut relay = Relay { backend, threads: Vec::with_capacity(count), end };
        let mut wakes = Vec::with_capacity(count);
        let mut intakes: Vec<Vec<rtrb::Consumer<Handoff>>> = (0..count).map(|_| Vec::new()).collect();
        let mut handles = Vec::with_capacity(workers);
        for _ in 0..count {
            wakes.push(Wake::new()?);
        }
        for worker in 0..workers {
            let (ring, intake) = rtrb::RingBuffer::new(RING);
            intakes[worker % count].push(intake);
            handles.push(Handle { ring, wake: wakes[worker % count].clone() });
        }
        let (report, reports) = mpsc::channel();
        for (index, (intake, wake)) in intakes.into_iter().zip(wakes).enumerate() {
            let shared = shared.clone();
            let report = report.clone();
            // One thread asks the upstreams of unknown ways at the start, so that the first client need not wait.
            let asks = index == 0;
            relay.threads.push(
                thread::Builder::new()
                    .name(format!("relay-{index}"))
                    .spawn(move || run(&shared, intake, wake, asks, &report))
                    .map_err(|e| context("start a relay thread", &e))?,
            );
        }
        drop(report);
        // The threads keep their senders: one report from each.
        for started in reports.iter().take(count) {
            started?;
        }
        Ok((relay, handles))
    }

    /// What drives the connections, chosen once at the start.
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// No new connections after the handles are dropped; the running ones end by themselves, at most until `grace`
    /// is over. Does not block: see [`Relay::join`].
    pub fn shutdown(&self, grace: Duration) {
        self.end.send_replace(Some(Instant::now() + grace));
    }

    /// Whether a thread has ended: before a shutdown that is a defect.
    pub fn has_ended(&self) -> bool {
        self.threads.iter().any(JoinHandle::is_finished)
    }

    /// Waits for the threads: they end when all handles are dropped and the last connection has ended.
    ///
    /// # Errors
    /// A thread panicked.
    pub fn join(self) -> io::Result<()> {
        for thread in self.threads {
            let name = thread.thread().name().unwrap_or_default().to_owned();
            thread
                .join()
                .map_err(|_| io::Error::other(format!("{name} panicked: its connections are lost")))?;
        }
        Ok(())
    }
}

/// Wakes a relay thread; a handle that goes away wakes it too, so that it sees its intake end.
#[derive(Clone, Debug)]
struct Wake(Arc<OwnedFd>);

impl Wake {
    fn new() -> io::Result<Self> {
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        Ok(Self(Arc::new(
            eventfd(0, flags).map_err(|e| context("make an eventfd for the relay", &e.into()))?,
        )))
    }

    fn wake(&self) {
        // Only a full counter can refuse, and then a wake is pending already.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }
}

impl Drop for Wake {
    fn drop(&mut self) {
        self.wake();
    }
}

/// What the threads share.
struct Shared {
    backend: Backend,
    limits: RelayLimits,
    upstreams: HashMap<u16, upstream::Upstream>,
    turn_back: Option<TurnBack>,
    stats: Arc<RelayStats>,
    ended: watch::Receiver<Option<Instant>>,
}

impl Shared {
    /// Returns when the grace of a shutdown is over.
    async fn grace_over(&self) {
        let mut ended = self.ended.clone();
        let at = match ended.wait_for(Option::is_some).await {
            Ok(at) => *at,
            Err(_) => None,
        };
        match at {
            Some(at) => tokio::time::sleep_until(at.into()).await,
            // The relay was dropped without a shutdown: its connections end by themselves.
            None => std::future::pending().await,
        }
    }
}

/// A relay thread.
fn run(
    shared: &Arc<Shared>,
    intake: Vec<rtrb::Consumer<Handoff>>,
    wake: Wake,
    asks: bool,
    report: &mpsc::Sender<io::Result<()>>,
) {
    let runtime = match backend::Runtime::new(shared.backend) {
        Ok(runtime) => runtime,
        Err(e) => {
            let _ = report.send(Err(context("start the runtime of a relay thread", &e)));
            return;
        }
    };
    runtime.block_on(serve(shared, intake, wake, asks, report));
}

async fn serve(
    shared: &Arc<Shared>,
    mut intake: Vec<rtrb::Consumer<Handoff>>,
    wake: Wake,
    asks: bool,
    report: &mpsc::Sender<io::Result<()>>,
) {
    // SAFETY: the eventfd is open for as long as its `Arc` lives, and `woken` holds one.
    let woken = match unsafe { AsyncFd::register_with_interest(wake.0.clone(), Interest::READABLE) } {
        Ok(woken) => woken,
        Err(e) => {
            let _ = report.send(Err(context("watch the eventfd of a relay thread", &e.into())));
            return;
        }
    };
    let _ = report.send(Ok(()));
    let turning_away = Rc::new(Semaphore::new(TURNING_AWAY));
    let mut tasks = JoinSet::new();
    if asks {
        for &listener in shared.upstreams.keys() {
            let shared = shared.clone();
            tasks.spawn_local(async move {
                let upstream = &shared.upstreams[&listener];
                tokio::select! {
                    asked = upstream.protocol(shared.limits.connect_timeout) => {
                        if let Err(e) = asked {
                            upstream.not_known_yet(&e);
                        }
                    }
                    () = shared.grace_over() => {}
                }
            });
        }
    }
    loop {
        intake.retain_mut(|ring| {
            // Asked before the ring is emptied: what was pushed before the handle went away is still taken.
            let abandoned = ring.is_abandoned();
            while let Ok(handoff) = ring.pop() {
                tasks.spawn_local(connection::relay(handoff, shared.clone(), turning_away.clone()));
            }
            !abandoned
        });
        if intake.is_empty() && tasks.is_empty() {
            break;
        }
        tokio::select! {
            ready = woken.readable(), if !intake.is_empty() => {
                if let Ok(mut ready) = ready {
                    let _ = rustix::io::read(ready.get_inner(), &mut [0; 8]);
                    ready.clear_ready();
                }
            }
            Some(ended) = tasks.join_next() => {
                if let Err(e) = ended {
                    tracing::error!(error = %e, "a relayed connection was lost to a defect in the relay");
                }
            }
            // The connections watch for it themselves; what still waits in the rings is closed with them.
            () = shared.grace_over(), if !intake.is_empty() => intake.clear(),
        }
    }
}

/// The error with what was being done.
fn context(doing: &str, e: &io::Error) -> io::Error {
    io::Error::new(e.kind(), format!("cannot {doing}: {e}"))
}
