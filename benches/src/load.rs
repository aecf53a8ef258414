//! The load generator: one thread, one epoll, 64 connections; every response is checked.
#![forbid(unsafe_code)]

use crate::{
    connect::connect,
    stats::percentile,
    workload::{Request, says_close},
};
use rustix::{
    event::{Timespec, epoll},
    io::Errno,
    net::{self, RecvFlags, SendFlags, sockopt},
};
use std::{
    collections::VecDeque,
    fmt, io,
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

/// How requests come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pace {
    /// Each connection sends its next request once it has the answer.
    KeepAlive,
    /// Each request on a connection of its own, with `Connection: close`.
    NewConnection {
        /// The client closes once it has the answer; else it waits for the server to close.
        client_closes: bool,
    },
    /// Each connection sends so many requests, the next one once it has the answer; then the client closes without having
    /// announced it, as browsers do. Where a server wants to close before, it may.
    Visit {
        /// At least 1.
        requests: u32,
    },
    /// So many requests a second at even intervals on connections that stay open, answered in time or not; latency counts
    /// from when a request was due.
    Rate(u32),
}

/// A load on one server.
#[derive(Debug)]
pub struct Load<'a> {
    /// The server.
    pub address: SocketAddrV4,
    /// The requests, in rotation; not empty.
    pub requests: &'a [Request],
    /// How they come.
    pub pace: Pace,
    /// On so many connections at once.
    pub connections: usize,
    /// From these addresses in turn; empty: from the kernel's choice.
    pub sources: &'a [Ipv4Addr],
    /// Before anything counts.
    pub warm_up: Duration,
    /// What counts.
    pub duration: Duration,
}

/// What came of a load.
#[derive(Clone, Copy, Debug)]
pub struct Served {
    /// Requests answered, every one of them rightly.
    pub requests: u64,
    /// Within this time.
    pub elapsed: Duration,
    /// Requests answered, also before any counted.
    pub all: u64,
    /// How long the longest waiting one of those had been waiting that were not answered at the end.
    pub oldest: Duration,
    /// Median latency in nanoseconds.
    pub p50: u32,
    /// 99th percentile of the latency in nanoseconds.
    pub p99: u32,
    /// At a rate: nearly all that were due were answered in time. Else always.
    pub kept_up: bool,
}

/// Nothing at all was answered for so long.
const PATIENCE: Duration = Duration::from_secs(5);

/// Runs the load. `mark` is called when it begins to count and when it ends, for reading clocks of CPU time.
///
/// # Errors
/// The server cannot be reached, a response is not the right one, connections end in the middle of a response, or nothing
/// comes back for five seconds.
pub fn run(load: &Load<'_>, mark: impl FnMut() -> io::Result<()>) -> io::Result<Served> {
    let mut generator = Generator::new(load)?;
    generator.run(mark).map_err(|error| {
        io::Error::new(error.kind(), format!("loading {} ({}): {error}", load.address, load.pace))
    })
}

/// Sends one request of `requests` and waits for its right answer: is the server there and set up well?
///
/// # Errors
/// As [`run`].
pub fn probe(address: SocketAddrV4, requests: &[Request]) -> io::Result<()> {
    let load = Load {
        address,
        requests,
        pace: Pace::NewConnection { client_closes: true },
        connections: 1,
        sources: &[],
        warm_up: Duration::ZERO,
        duration: Duration::ZERO,
    };
    run(&load, || Ok(())).map(|_| ())
}

impl fmt::Display for Pace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::KeepAlive => f.write_str("keep-alive"),
            Self::NewConnection { .. } => f.write_str("a connection per request"),
            Self::Visit { requests } => write!(f, "a connection for {requests} requests"),
            Self::Rate(rate) => write!(f, "{rate} requests/s on keep-alive"),
        }
    }
}

struct Connection {
    socket: OwnedFd,
    state: State,
    /// What epoll was last told of it.
    watched: Option<epoll::EventFlags>,
    /// Which request it sends.
    request: usize,
    /// How many it has sent.
    asked: u32,
    /// When that was due.
    since: Instant,
    response: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Idle,
    /// The handshake is not over.
    Connecting,
    Waiting,
    /// The response is complete, the server has yet to close.
    Closing,
}

struct Generator<'a> {
    load: &'a Load<'a>,
    epoll: OwnedFd,
    connections: Vec<Connection>,
    /// For a rate: connections without a request, the longest idle one first.
    idle: VecDeque<usize>,
    next_request: usize,
    next_source: usize,
    counting: bool,
    all: u64,
    latencies: Vec<u32>,
    last_progress: Instant,
}

impl<'a> Generator<'a> {
    fn new(load: &'a Load<'a>) -> io::Result<Self> {
        let mut generator = Self {
            load,
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            connections: Vec::with_capacity(load.connections),
            idle: VecDeque::with_capacity(load.connections),
            next_request: 0,
            next_source: 0,
            counting: false,
            all: 0,
            latencies: Vec::with_capacity(1 << 18),
            last_progress: Instant::now(),
        };
        for _ in 0..load.connections {
            let socket = generator.connect()?;
            let connection = Connection {
                socket,
                state: State::Idle,
                watched: None,
                request: 0,
                asked: 0,
                since: Instant::now(),
                response: Vec::with_capacity(2048),
            };
            generator.connections.push(connection);
        }
        Ok(generator)
    }

    fn run(&mut self, mut mark: impl FnMut() -> io::Result<()>) -> io::Result<Served> {
        let begin = Instant::now();
        match self.load.pace {
            Pace::Rate(_) => {
                self.idle.extend(0..self.load.connections);
                (0..self.load.connections).try_for_each(|index| self.watch(index))?;
            }
            _ => (0..self.load.connections).try_for_each(|index| self.start(index, begin))?,
        }
        let interval = match self.load.pace {
            Pace::Rate(rate) => Some(Duration::from_secs(1) / rate),
            _ => None,
        };
        let mut due = Instant::now();
        let mut events = Vec::with_capacity(self.load.connections);
        let mut counting_since = None;
        loop {
            let now = Instant::now();
            match counting_since {
                None if now >= begin + self.load.warm_up => {
                    mark()?;
                    self.counting = true;
                    counting_since = Some(Instant::now());
                }
                // A probe counts one response, however long it takes.
                Some(since) if now >= since + self.load.duration && !self.latencies.is_empty() => {
                    mark()?;
                    return Ok(self.served(since.elapsed()));
                }
                _ => {}
            }
            if now > self.last_progress + PATIENCE {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "no response for five seconds"));
            }
            if let Some(interval) = interval {
                while due <= now
                    && let Some(index) = self.idle.pop_front()
                {
                    self.start(index, due)?;
                    due += interval;
                }
            }
            // At a rate the generator spins, so that each request leaves when it is due.
            let timeout = if interval.is_some() { 0 } else { 100_000_000 };
            events.clear();
            let timeout = Timespec { tv_sec: 0, tv_nsec: timeout };
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&timeout)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            for event in &events {
                self.progress(event.data.u64() as usize)?;
            }
        }
    }

    /// Goes on with a connection that has become readable or writable.
    fn progress(&mut self, index: usize) -> io::Result<()> {
        if self.connections[index].state == State::Connecting {
            sockopt::socket_error(&self.connections[index].socket)??;
            self.send(index)?;
            return self.watch(index);
        }
        let connection = &mut self.connections[index];
        connection.response.reserve(1024);
        match net::recv(
            &connection.socket,
            rustix::buffer::spare_capacity(&mut connection.response),
            RecvFlags::empty(),
        ) {
            Ok((_, 0)) => self.ended(index),
            Ok(_) => self.received(index),
            Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(error) => Err(io::Error::new(
                io::Error::from(error).kind(),
                format!("{error} while {:?}", self.connections[index].state),
            )),
        }
    }

    fn received(&mut self, index: usize) -> io::Result<()> {
        let connection = &mut self.connections[index];
        let unexpected = |connection: &Connection, what: &str| {
            let text = connection.response.escape_ascii().to_string();
            Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("{what} (it was {:?}): {text}", connection.state),
            ))
        };
        if connection.state != State::Waiting {
            return unexpected(connection, "a response that nobody asked for");
        }
        let request = &self.load.requests[connection.request];
        if !request.is_whole(&connection.response) {
            return Ok(());
        }
        if !request.accepts(&connection.response) {
            return unexpected(connection, "not the answer to this request");
        }
        self.last_progress = Instant::now();
        self.all += 1;
        if self.counting {
            let latency = (self.last_progress - connection.since).as_nanos();
            self.latencies.push(u32::try_from(latency).unwrap_or(u32::MAX));
        }
        let closes = match self.load.pace {
            Pace::NewConnection { client_closes } => !client_closes,
            Pace::Visit { requests } if connection.asked >= requests => false,
            _ => says_close(&connection.response),
        };
        connection.response.clear();
        connection.state = State::Idle;
        match self.load.pace {
            _ if closes => connection.state = State::Closing,
            Pace::NewConnection { .. } => self.reconnect(index)?,
            Pace::Visit { requests } if connection.asked >= requests => self.reconnect(index)?,
            Pace::KeepAlive | Pace::Visit { .. } => self.start(index, self.last_progress)?,
            Pace::Rate(_) => self.idle.push_back(index),
        }
        Ok(())
    }

    /// The server has closed: fine behind a whole response, or where nothing was asked.
    fn ended(&mut self, index: usize) -> io::Result<()> {
        match (self.connections[index].state, self.load.pace) {
            (State::Closing, Pace::Rate(_)) => {
                self.reconnect(index)?;
                self.idle.push_back(index);
                Ok(())
            }
            (State::Closing, _) | (State::Idle, Pace::Rate(_)) => self.reconnect(index),
            (state, _) => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!(
                    "the server closed while {state:?}, after {:?}",
                    self.connections[index].response.escape_ascii().to_string()
                ),
            )),
        }
    }

    /// Replaces a connection by a new one, which sends at once unless a clock tells when.
    fn reconnect(&mut self, index: usize) -> io::Result<()> {
        let since = Instant::now();
        self.connections[index].socket = self.connect()?;
        self.connections[index].state = State::Idle;
        self.connections[index].watched = None;
        self.connections[index].asked = 0;
        if matches!(self.load.pace, Pace::Rate(_)) { self.watch(index) } else { self.start(index, since) }
    }

    fn connect(&mut self) -> io::Result<OwnedFd> {
        let sources = self.load.sources;
        let source = (!sources.is_empty()).then(|| sources[self.next_source % sources.len()]);
        self.next_source += 1;
        connect(self.load.address, source)
    }

    /// Tells the kernel what the connection waits for, if that has changed.
    fn watch(&mut self, index: usize) -> io::Result<()> {
        let connection = &mut self.connections[index];
        let flags = match connection.state {
            State::Connecting => epoll::EventFlags::OUT,
            _ => epoll::EventFlags::IN,
        };
        let data = epoll::EventData::new_u64(index as u64);
        match connection.watched.replace(flags) {
            None => epoll::add(&self.epoll, &connection.socket, data, flags)?,
            Some(before) if before != flags => epoll::modify(&self.epoll, &connection.socket, data, flags)?,
            Some(_) => {}
        }
        Ok(())
    }

    fn start(&mut self, index: usize, since: Instant) -> io::Result<()> {
        let connection = &mut self.connections[index];
        connection.request = self.next_request;
        connection.asked += 1;
        connection.since = since;
        self.next_request = (self.next_request + 1) % self.load.requests.len();
        self.send(index)?;
        self.watch(index)
    }

    fn send(&mut self, index: usize) -> io::Result<()> {
        let connection = &mut self.connections[index];
        let request = &self.load.requests[connection.request];
        let bytes = match self.load.pace {
            Pace::NewConnection { .. } => &request.close,
            _ => &request.keep_alive,
        };
        connection.state = match net::send(&connection.socket, bytes, SendFlags::NOSIGNAL) {
            Ok(sent) if sent == bytes.len() => State::Waiting,
            Ok(sent) => {
                return Err(io::Error::other(format!("the socket took {sent} bytes of a request only")));
            }
            Err(Errno::AGAIN | Errno::NOTCONN | Errno::INPROGRESS) => State::Connecting,
            Err(error) => return Err(error.into()),
        };
        Ok(())
    }

    fn served(&mut self, elapsed: Duration) -> Served {
        self.latencies.sort_unstable();
        let requests = self.latencies.len() as u64;
        let kept_up = match self.load.pace {
            Pace::Rate(rate) => requests as f64 >= 0.97 * f64::from(rate) * elapsed.as_secs_f64(),
            _ => true,
        };
        let waits = |one: &&Connection| matches!(one.state, State::Connecting | State::Waiting);
        let oldest = self.connections.iter().filter(waits).map(|one| one.since.elapsed()).max();
        Served {
            requests,
            elapsed,
            all: self.all,
            oldest: oldest.unwrap_or_default(),
            p50: percentile(&self.latencies, 50),
            p99: percentile(&self.latencies, 99),
            kept_up,
        }
    }
}
