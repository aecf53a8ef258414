//! One listener's upstream: how it is reached, what it is told of the client, and how its failures are logged.
#![forbid(unsafe_code)]

use super::{ProxyProtocol, detect, proxy_header};
use crate::telemetry::RelayStats;
use socket2::{Domain, Protocol, Socket, Type};
use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::{
        Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// A log line about one upstream at most this often.
const LOG_EVERY: Duration = Duration::from_secs(1);

/// Shared by all threads.
pub(super) struct Upstream {
    config: super::Upstream,
    /// What is sent, once it is known.
    protocol: OnceLock<ProxyProtocol>,
    /// Held while the upstream is asked; the last failure.
    asking: tokio::sync::Mutex<Option<(io::ErrorKind, String)>>,
    /// Times that it was asked in vain.
    failures: AtomicU64,
    log: Mutex<Gate>,
}

/// Lets one line through now and then, and counts the others.
#[derive(Default)]
struct Gate {
    last: Option<Instant>,
    held_back: u64,
}

impl Upstream {
    pub(super) fn new(config: super::Upstream) -> Self {
        let protocol = match config.proxy_protocol {
            ProxyProtocol::Auto => OnceLock::new(),
            known => OnceLock::from(known),
        };
        Self {
            config,
            protocol,
            asking: tokio::sync::Mutex::new(None),
            failures: AtomicU64::new(0),
            log: Mutex::default(),
        }
    }

    /// A connection to the upstream (non-blocking) and the header that goes before the client's bytes.
    /// `client` and `server` are the two ends of the client's connection.
    ///
    /// # Errors
    /// The upstream cannot be reached in time, nothing is known of its ways, or the client's address cannot be taken.
    pub(super) async fn connect(
        &self,
        client: SocketAddr,
        server: SocketAddr,
        timeout: Duration,
    ) -> io::Result<(Socket, Vec<u8>)> {
        let mut header = Vec::new();
        match self.protocol(timeout).await? {
            ProxyProtocol::V1 => proxy_header::v1(client, server, &mut header),
            ProxyProtocol::V2 => proxy_header::v2(client, server, &mut header),
            ProxyProtocol::Off | ProxyProtocol::Auto => {}
        }
        let client = self.config.transparent.then_some(client);
        let connecting = async {
            match self.connect_from(client).await {
                // The client's port is taken on this node, or was used for the upstream a moment ago: its address
                // is what matters.
                Err(e)
                    if client.is_some()
                        && matches!(e.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable) =>
                {
                    self.connect_from(client.map(|c| SocketAddr::new(c.ip(), 0))).await
                }
                result => result,
            }
        };
        let socket = tokio::time::timeout(timeout, connecting).await.map_err(|_| {
            io::Error::new(io::ErrorKind::TimedOut, format!("no connection within {timeout:?}"))
        })??;
        Ok((socket, header))
    }

    /// What is sent to the upstream: as configured, or as the upstream said when asked. Asked until it has said; the
    /// callers that wait meanwhile get the same failure.
    pub(super) async fn protocol(&self, timeout: Duration) -> io::Result<ProxyProtocol> {
        if let Some(known) = self.protocol.get() {
            return Ok(*known);
        }
        let failures = self.failures.load(Ordering::Acquire);
        let mut last = self.asking.lock().await;
        if let Some(known) = self.protocol.get() {
            return Ok(*known);
        }
        if let Some((kind, why)) = &*last
            && self.failures.load(Ordering::Acquire) != failures
        {
            return Err(io::Error::new(*kind, why.clone()));
        }
        let address = self.config.address;
        let (answer, answered) = tokio::sync::oneshot::channel();
        // A thread of its own, which no shutdown waits for.
        thread::Builder::new().name("relay-detect".to_owned()).spawn(move || {
            // The asker may be gone.
            let _ = answer.send(detect(address, timeout));
        })?;
        match answered.await.unwrap_or_else(|_| Err(io::Error::other("the asking thread panicked"))) {
            Ok(known) => {
                self.log_protocol(known);
                Ok(*self.protocol.get_or_init(|| known))
            }
            Err(e) => {
                let why = format!("cannot ask it for the PROXY protocol: {e}");
                *last = Some((e.kind(), why.clone()));
                self.failures.fetch_add(1, Ordering::Release);
                Err(io::Error::new(e.kind(), why))
            }
        }
    }

    /// Logs that the upstream could not be asked at the start.
    pub(super) fn not_known_yet(&self, e: &io::Error) {
        tracing::warn!(
            listener = self.config.name, upstream = %self.config.address, error = %e,
            "not known yet whether the upstream takes the PROXY protocol: asked again before the next connection; {}",
            self.remedy(e),
        );
    }

    /// Counts a client that got a 502, and logs it if it is time.
    pub(super) fn failed(&self, e: &io::Error, stats: &RelayStats) {
        stats.upstream_errors.fetch_add(1, Ordering::Relaxed);
        self.log(|held_back| {
            tracing::warn!(
                listener = self.config.name, upstream = %self.config.address, error = %e, held_back,
                "cannot reach the upstream, the client gets a 502: {}", self.remedy(e),
            );
        });
    }

    /// Counts a client that got a 503, and logs it if it is time.
    pub(super) fn overloaded(&self, max_connections: usize, stats: &RelayStats) {
        stats.overloaded.fetch_add(1, Ordering::Relaxed);
        self.log(|held_back| {
            tracing::warn!(
                listener = self.config.name, upstream = %self.config.address, max_connections, held_back,
                "the relay is full, the client gets a 503: raise relay.max_connections, or find out what holds them",
            );
        });
    }

    fn log(&self, line: impl FnOnce(u64)) {
        let held_back = self.log.lock().unwrap_or_else(PoisonError::into_inner).admit(Instant::now());
        if let Some(held_back) = held_back {
            line(held_back);
        }
    }

    fn log_protocol(&self, known: ProxyProtocol) {
        let (listener, upstream) = (&self.config.name, self.config.address);
        match known {
            ProxyProtocol::V2 => tracing::info!(
                listener, %upstream,
                "the upstream takes the PROXY protocol: relayed connections carry the client's address (v2)"
            ),
            _ if self.config.transparent => tracing::info!(
                listener, %upstream,
                "the upstream does not take the PROXY protocol: none is sent, the connections come from the \
                 client's own address"
            ),
            _ => tracing::warn!(
                listener, %upstream,
                "the upstream does not take the PROXY protocol: it sees this node's address on relayed connections; \
                 where it decides by address, let it accept the PROXY protocol or set `transparent = true`"
            ),
        }
    }

    /// With `client`: from its address (and port, if not 0).
    async fn connect_from(&self, client: Option<SocketAddr>) -> io::Result<Socket> {
        let upstream = self.config.address;
        let socket = tcp(upstream)?;
        socket.set_nonblocking(true)?;
        if let Some(client) = client {
            let client = SocketAddr::new(client.ip().to_canonical(), client.port());
            if client.is_ipv4() != upstream.is_ipv4() {
                return Err(io::Error::new(
                    io::ErrorKind::Unsupported,
                    format!("the client {} has not the address family of the upstream", client.ip()),
                ));
            }
            set_transparent(&socket, upstream)?;
            // The same client port may be in use towards another listener.
            socket.set_reuse_address(true)?;
            socket.bind(&client.into())?;
        }
        match socket.connect(&upstream.into()) {
            Ok(()) => return Ok(socket),
            Err(e) if e.raw_os_error() == Some(libc::EINPROGRESS) => {}
            Err(e) => return Err(e),
        }
        let connecting = tokio::net::TcpStream::from_std(socket.into())?;
        connecting.writable().await?;
        match connecting.take_error()? {
            None => connecting.into_std().map(Socket::from),
            Some(e) => Err(e),
        }
    }

    fn remedy(&self, e: &io::Error) -> String {
        let Self { config: super::Upstream { address, transparent, .. }, .. } = self;
        match e.kind() {
            io::ErrorKind::Unsupported => {
                "`transparent` needs an upstream of the clients' address family, or one listener for each"
                    .to_owned()
            }
            io::ErrorKind::ConnectionRefused => format!("is it running and listening on {address}?"),
            _ if *transparent => {
                format!("with `transparent` its replies must come back to this node: {}", routing(*address))
            }
            io::ErrorKind::TimedOut => format!(
                "is {address} the right address, does a firewall drop the packets, is relay.connect_timeout enough?"
            ),
            _ => match e.raw_os_error() {
                Some(libc::EMFILE | libc::ENFILE) => "raise the limit of open files (LimitNOFILE)".to_owned(),
                Some(libc::EADDRNOTAVAIL) => {
                    "all local ports towards it are in use: widen net.ipv4.ip_local_port_range".to_owned()
                }
                _ => format!("is {address} the right address, and is there a route to it?"),
            },
        }
    }
}

impl Gate {
    /// How many lines were held back since the last, or nothing if this one is held back too.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        if self.last.is_some_and(|last| now.saturating_duration_since(last) < LOG_EVERY) {
            self.held_back += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.held_back))
    }
}

/// Fails early where `transparent` cannot work.
pub(super) fn check_transparent(upstream: &super::Upstream) -> io::Result<()> {
    if !upstream.transparent {
        return Ok(());
    }
    set_transparent(&tcp(upstream.address)?, upstream.address).map_err(|e| {
        io::Error::new(
            e.kind(),
            format!(
                "listener {:?}: `transparent` cannot connect from the clients' addresses: {e}; give the daemon \
                 CAP_NET_ADMIN, and let replies come back to this node: {}",
                upstream.name,
                routing(upstream.address)
            ),
        )
    })
}

fn tcp(upstream: SocketAddr) -> io::Result<Socket> {
    Socket::new(Domain::for_address(upstream), Type::STREAM, Some(Protocol::TCP))
}

fn set_transparent(socket: &Socket, upstream: SocketAddr) -> io::Result<()> {
    match upstream {
        SocketAddr::V4(_) => socket.set_ip_transparent_v4(true),
        SocketAddr::V6(_) => socket.set_ip_transparent_v6(true),
    }
}

/// What the administrator has to run: replies of the upstream to the clients' addresses are delivered on this node.
fn routing(upstream: SocketAddr) -> String {
    let (ip, all) = match upstream.ip() {
        IpAddr::V4(_) => ("ip", "0.0.0.0/0"),
        IpAddr::V6(_) => ("ip -6", "::/0"),
    };
    format!(
        "`{ip} rule add from {} ipproto tcp sport {} lookup 123` and `{ip} route add local {all} dev lo table 123`",
        upstream.ip(),
        upstream.port()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::ListenerId;

    #[test]
    fn every_failure_has_its_remedy() {
        let errno = io::Error::from_raw_os_error;
        for (name, transparent, error, expected) in [
            ("refused", false, errno(libc::ECONNREFUSED), "is it running and listening on 192.0.2.1:8080?"),
            ("refused, transparent", true, errno(libc::ECONNREFUSED), "is it running"),
            ("no answer", false, errno(libc::ETIMEDOUT), "does a firewall drop the packets"),
            (
                "no answer, transparent",
                true,
                errno(libc::ETIMEDOUT),
                "`ip rule add from 192.0.2.1 ipproto tcp sport 8080 lookup 123`",
            ),
            ("no route", false, errno(libc::EHOSTUNREACH), "is there a route to it?"),
            ("no descriptors", false, errno(libc::EMFILE), "LimitNOFILE"),
            ("no ports", false, errno(libc::EADDRNOTAVAIL), "ip_local_port_range"),
            ("other family, transparent", true, io::ErrorKind::Unsupported.into(), "one listener for each"),
        ] {
            let upstream = Upstream::new(super::super::Upstream {
                listener: ListenerId(0),
                name: "web".to_owned(),
                address: SocketAddr::from(([192, 0, 2, 1], 8080)),
                proxy_protocol: ProxyProtocol::Off,
                transparent,
            });
            let remedy = upstream.remedy(&error);
            assert!(remedy.contains(expected), "{name}: {remedy}");
        }
    }

    #[test]
    fn one_line_a_second_with_a_count() {
        let mut gate = Gate::default();
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let admitted: Vec<_> =
            [0, 1, 999, 1000, 1001, 2500].into_iter().map(|ms| gate.admit(at(ms))).collect();
        assert_eq!(admitted, [Some(0), None, None, Some(2), None, Some(1)]);
    }
}
