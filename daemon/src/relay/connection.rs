//! One relayed connection, from the handoff to the close.
//!
//! Plain reads and writes: splice(2) saves a copy, but tokio-uring has no such operation, and it costs two pipes and
//! four descriptors a connection. Large buffers make the copies cheap enough (`cargo xtask bench relay`).
//!
//! An end comes through as it came: half-closes in order, a reset as a reset once all that was sent before it is
//! delivered. A reset is noticed by whoever reads from or writes to that peer; if both directions wait for the other
//! peer, it is the idle timeout that ends them.
#![forbid(unsafe_code)]

use super::{Handoff, Shared, backend::Socket, upstream::Upstream};
use crate::http::{date::imf_fixdate, error::ErrorResponse};
use socket2::TcpKeepalive;
use std::{
    cell::Cell,
    io,
    net::Shutdown,
    pin::pin,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::{
    sync::Semaphore,
    time::{Instant, sleep, sleep_until, timeout},
};

/// A peer that vanished without a word is noticed within two minutes.
const KEEPALIVE: TcpKeepalive = TcpKeepalive::new()
    .with_time(Duration::from_mins(1))
    .with_interval(Duration::from_secs(15))
    .with_retries(4);
/// For a client that gets an error response: to read it and to close.
const LINGER: Duration = Duration::from_secs(2);
/// Before a reset is passed on: for what the other peer had sent before it to arrive.
const DELIVERY: Duration = Duration::from_secs(1);
/// Between looks whether it has arrived.
const DELIVERY_STEP: Duration = Duration::from_millis(5);
/// A direction begins with a buffer of this size in bytes, and gets the whole one when a read has filled it: most
/// connections never do.
const FIRST_BUFFER: usize = 16 << 10;
/// What a turned-away client still sends is read in pieces of this size, in bytes, and dropped.
const DISCARD: usize = 4096;

/// Takes a connection over; returns when nothing of it is left.
pub(super) async fn relay(handoff: Handoff, shared: Arc<Shared>, turning_away: Rc<Semaphore>) {
    let Handoff { client, listener, bytes, eof, reason } = handoff;
    let stats = &*shared.stats;
    stats.connections.fetch_add(1, Ordering::Relaxed);
    let client = socket2::Socket::from(client);
    // Both fail if the client has already reset the connection.
    let (Ok(peer), Ok(local)) = (client.peer_addr(), client.local_addr()) else {
        stats.aborted.fetch_add(1, Ordering::Relaxed);
        return;
    };
    let (Some(peer), Some(local)) = (peer.as_socket(), local.as_socket()) else {
        tracing::error!(listener = listener.0, "a connection that is not TCP came to the relay");
        return;
    };
    let client = match prepare(&shared, client) {
        Ok(client) => client,
        Err(e) => {
            tracing::warn!(%peer, error = %e, "cannot prepare a client's socket for the relay");
            return;
        }
    };
    let Some(upstream) = shared.upstreams.get(&listener.0) else {
        let Some(turn_back) = &shared.turn_back else {
            tracing::error!(
                listener = listener.0,
                "a connection came to the relay by a listener without an upstream"
            );
            return;
        };
        tracing::debug!(%peer, listener = listener.0, reason = reason.as_str(), "to come again");
        stats.turned_back.fetch_add(1, Ordering::Relaxed);
        turn_back(peer.ip(), &bytes);
        if let Ok(_permit) = turning_away.try_acquire() {
            turn_away(&client, Some(ErrorResponse::ComeAgain)).await;
        }
        return;
    };
    let is_http = bytes.first().is_some_and(u8::is_ascii_uppercase);

    let Some(_open) = Open::take(&stats.open, shared.limits.max_connections) else {
        upstream.overloaded(shared.limits.max_connections, stats);
        if let Ok(_permit) = turning_away.try_acquire() {
            turn_away(&client, is_http.then_some(ErrorResponse::Overloaded)).await;
        }
        return;
    };
    tracing::debug!(%peer, listener = listener.0, reason = reason.as_str(), "relaying");
    let connected = tokio::select! {
        connected = connect(upstream, &shared, peer, local) => connected,
        () = shared.grace_over() => return,
    };
    match connected {
        Ok((proxy, header)) => {
            let first = First { header, bytes, eof };
            Flow {
                client,
                proxy,
                shared: &shared,
                last: Cell::new(Instant::now()),
                writing: Cell::new(0),
                broken: Cell::new(false),
            }
            .run(first)
            .await;
        }
        Err(e) => {
            upstream.failed(&e, stats);
            turn_away(&client, is_http.then_some(ErrorResponse::BadGateway)).await;
        }
    }
}

/// One of the connections that are open now.
struct Open<'a>(&'a AtomicU64);

impl<'a> Open<'a> {
    fn take(open: &'a AtomicU64, max: usize) -> Option<Self> {
        // Made before the comparison, so that it is given back if there are too many.
        let before = open.fetch_add(1, Ordering::Relaxed);
        let this = Self(open);
        (before < max as u64).then_some(this)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn connect(
    upstream: &Upstream,
    shared: &Shared,
    peer: std::net::SocketAddr,
    local: std::net::SocketAddr,
) -> io::Result<(Socket, Vec<u8>)> {
    let (socket, header) = upstream.connect(peer, local, shared.limits.connect_timeout).await?;
    Ok((prepare(shared, socket)?, header))
}

fn prepare(shared: &Shared, socket: socket2::Socket) -> io::Result<Socket> {
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(&KEEPALIVE)?;
    Socket::adopt(shared.backend, socket)
}

/// The response, then an orderly close: a reset because of unread bytes would take the response with it.
async fn turn_away(client: &Socket, response: Option<ErrorResponse>) {
    let orderly = async {
        if let Some(response) = response {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
            let mut bytes = Vec::new();
            response.render(&imf_fixdate(now), &mut bytes);
            let mut sent = 0;
            while sent < bytes.len() {
                let (result, buffer) = client.write(bytes, sent).await;
                bytes = buffer;
                match result {
                    Ok(n) if n > 0 => sent += n,
                    _ => return,
                }
            }
        }
        client.shutdown(Shutdown::Write);
        let mut buffer = Vec::with_capacity(DISCARD);
        loop {
            buffer.clear();
            let (result, back) = client.read(buffer).await;
            buffer = back;
            if !matches!(result, Ok(n) if n > 0) {
                return;
            }
        }
    };
    if timeout(LINGER, orderly).await.is_err() {
        // Also ends what is still in flight, which would keep the descriptor.
        client.reset();
    }
}

/// What goes to the upstream before anything is read.
struct First {
    header: Vec<u8>,
    bytes: Vec<u8>,
    eof: bool,
}

/// Two connected sockets, and what both directions must know of each other.
struct Flow<'a> {
    client: Socket,
    proxy: Socket,
    shared: &'a Shared,
    /// When a byte last moved.
    last: Cell<Instant>,
    /// Directions that hold bytes which are not written yet.
    writing: Cell<u8>,
    /// A peer no longer takes bytes: what it had sent is still delivered, but its end is not an orderly one.
    broken: Cell<bool>,
}

/// Why a direction did not come to an orderly end.
enum Broken {
    /// Its source was reset or lost: there is nothing to wait for.
    Source,
    /// Its destination was reset or lost: the other direction ends by itself.
    Destination,
}

impl Flow<'_> {
    async fn run(&self, first: First) {
        let stats = &*self.shared.stats;
        let (client, proxy) = (&self.client, &self.proxy);
        let mut up = pin!(self.first_then_pump(first));
        let mut down = pin!(self.pump(proxy, client, &stats.bytes_down));
        let mut ending = pin!(self.ending());
        let (mut up_open, mut down_open, mut cut, mut reset) = (true, true, false, false);
        // The side that has to hear that the other is lost.
        let mut survivor = None;
        while up_open || down_open {
            let (ended, from, to) = tokio::select! {
                ended = &mut up, if up_open => {
                    up_open = false;
                    (ended, client, proxy)
                }
                ended = &mut down, if down_open => {
                    down_open = false;
                    (ended, proxy, client)
                }
                () = &mut ending, if !cut => {
                    cut = true;
                    self.cut();
                    continue;
                }
            };
            match ended {
                Ok(()) => {}
                Err(Broken::Source) => {
                    let survivor = *survivor.get_or_insert(to);
                    // The other direction may wait for ever.
                    if !reset && (up_open || down_open) {
                        reset = true;
                        self.reset(survivor).await;
                    }
                }
                Err(Broken::Destination) => {
                    survivor.get_or_insert(from);
                }
            }
        }
        if let Some(survivor) = survivor
            && !cut
        {
            stats.aborted.fetch_add(1, Ordering::Relaxed);
            if !reset {
                self.reset(survivor).await;
            }
        }
    }

    async fn first_then_pump(&self, first: First) -> Result<(), Broken> {
        let First { mut header, bytes, eof } = first;
        let bytes_up = &self.shared.stats.bytes_up;
        bytes_up.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        header.extend_from_slice(&bytes);
        drop(bytes);
        if !header.is_empty() {
            self.write_all(&self.proxy, header).await?;
        }
        if eof {
            self.proxy.shutdown(Shutdown::Write);
            return Ok(());
        }
        self.pump(&self.client, &self.proxy, bytes_up).await
    }

    /// One direction until its end: reads again only when all is written, so a slow reader holds its sender back.
    async fn pump(&self, from: &Socket, to: &Socket, count: &AtomicU64) -> Result<(), Broken> {
        let most = self.shared.limits.buffer_bytes.max(1);
        let mut buffer = Vec::with_capacity(most.min(FIRST_BUFFER));
        loop {
            if buffer.len() == buffer.capacity() && buffer.capacity() < most {
                buffer = Vec::with_capacity(most);
            }
            buffer.clear();
            let (result, back) = from.read(buffer).await;
            match result {
                Ok(0) if self.broken.get() => return Err(Broken::Source),
                Ok(0) => {
                    to.shutdown(Shutdown::Write);
                    return Ok(());
                }
                Ok(n) => count.fetch_add(n as u64, Ordering::Relaxed),
                Err(_) => return Err(Broken::Source),
            };
            self.last.set(Instant::now());
            buffer = self.write_all(to, back).await?;
        }
    }

    async fn write_all(&self, to: &Socket, mut buffer: Vec<u8>) -> Result<Vec<u8>, Broken> {
        self.writing.set(self.writing.get() + 1);
        let mut written = 0;
        while written < buffer.len() {
            let (result, back) = to.write(buffer, written).await;
            buffer = back;
            match result {
                Ok(n) if n > 0 => written += n,
                _ => {
                    self.broken.set(true);
                    return Err(Broken::Destination);
                }
            }
            self.last.set(Instant::now());
        }
        self.writing.set(self.writing.get() - 1);
        Ok(buffer)
    }

    /// Returns when the connection has been idle for too long, or the grace of a shutdown is over.
    async fn ending(&self) {
        let idle = async {
            let limit = self.shared.limits.idle_timeout;
            if limit.is_zero() {
                return std::future::pending().await;
            }
            while self.last.get().elapsed() < limit {
                sleep_until(self.last.get() + limit).await;
            }
            self.shared.stats.idle_timeouts.fetch_add(1, Ordering::Relaxed);
        };
        tokio::select! {
            () = idle => {}
            () = self.shared.grace_over() => {}
        }
    }

    /// Ends both sides now: in order if all that was read is written, else by a reset, so that nobody takes a part for
    /// the whole.
    fn cut(&self) {
        for socket in [&self.client, &self.proxy] {
            if self.writing.get() == 0 {
                socket.shutdown(Shutdown::Both);
            } else {
                socket.reset();
            }
        }
    }

    /// Resets both sides, but lets `survivor` have what was sent to it before.
    async fn reset(&self, survivor: &Socket) {
        let until = Instant::now() + DELIVERY;
        while !survivor.is_drained() && Instant::now() < until {
            sleep(DELIVERY_STEP).await;
        }
        self.client.reset();
        self.proxy.reset();
    }
}
