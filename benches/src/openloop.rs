//! Load at a fixed rate, answered or not: latency counts from when a request was due, so that a server which stands still
//! does not hide what it makes wait (no coordinated omission).
#![forbid(unsafe_code)]

use crate::{connect::connect, stats::percentile, workload::Request};
use rustix::{
    event::{Timespec, epoll},
    io::Errno,
    net::{self, RecvFlags, SendFlags, sockopt},
};
use std::{
    io,
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

/// Requests at even intervals, each on a connection of its own.
#[derive(Debug)]
pub struct OpenLoop<'a> {
    /// The server.
    pub address: SocketAddrV4,
    /// The clients' addresses, in turn; not empty.
    pub sources: &'a [Ipv4Addr],
    /// The requests, in turn; not empty.
    pub requests: &'a [Request],
    /// A second.
    pub rate: f64,
    /// At most so many wait at once; what is due meanwhile waits to be sent.
    pub in_flight: usize,
    /// How long requests are due. Those that are not answered in [`GRACE`] behind it have failed.
    pub duration: Duration,
}

/// See [`OpenLoop::duration`].
pub const GRACE: Duration = Duration::from_secs(3);

/// What came of it.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// Requests that were due.
    pub due: u64,
    /// Of these: sent while requests were due.
    pub sent: u64,
    /// Rightly answered while requests were due.
    pub answered: u64,
    /// Wrongly answered, reset, or not answered at the end.
    pub failed: u64,
    /// Median latency in nanoseconds of all that were due; what failed took [`u32::MAX`], 4.3 s.
    pub p50: u32,
    /// The 99th percentile of the same.
    pub p99: u32,
}

/// Runs it on this thread.
///
/// # Errors
/// The system gives no sockets.
pub fn run(load: &OpenLoop<'_>) -> io::Result<Outcome> {
    Generator::new(load)?.run()
}

struct Connection {
    socket: OwnedFd,
    due: Instant,
    request: usize,
    connected: bool,
    response: Vec<u8>,
    /// The whole response has come, and the server is to close.
    closing: bool,
}

struct Generator<'a> {
    load: &'a OpenLoop<'a>,
    epoll: OwnedFd,
    connections: Vec<Option<Connection>>,
    free: Vec<usize>,
    latencies: Vec<u32>,
    failed: u64,
}

impl<'a> Generator<'a> {
    fn new(load: &'a OpenLoop<'a>) -> io::Result<Self> {
        Ok(Self {
            load,
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            connections: (0..load.in_flight).map(|_| None).collect(),
            free: (0..load.in_flight).rev().collect(),
            latencies: Vec::with_capacity(1 << 18),
            failed: 0,
        })
    }

    fn run(mut self) -> io::Result<Outcome> {
        let interval = Duration::from_secs_f64(1.0 / self.load.rate);
        let begin = Instant::now();
        let end = begin + self.load.duration;
        let mut due = begin;
        let (mut all, mut sent, mut answered) = (0, 0, None);
        let mut events = Vec::with_capacity(64);
        loop {
            let now = Instant::now();
            while due <= now.min(end)
                && let Some(index) = self.free.pop()
            {
                self.start(index, due, all)?;
                due += interval;
                all += 1;
            }
            if now >= end && answered.is_none() {
                answered = Some(self.latencies.len() as u64);
                sent = all as u64;
            }
            let done = due > end && self.free.len() == self.connections.len();
            if done || now >= end + GRACE {
                break;
            }
            let next =
                if due <= end && !self.free.is_empty() { due } else { now + Duration::from_millis(10) };
            let timeout = next.saturating_duration_since(now);
            let timeout = Timespec { tv_sec: 0, tv_nsec: timeout.subsec_nanos().into() };
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&timeout)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            for event in &events {
                self.progress(event.data.u64() as usize);
            }
        }
        self.give_up(due, end, interval);
        let due = self.latencies.len() as u64;
        self.latencies.sort_unstable();
        Ok(Outcome {
            due,
            sent,
            answered: answered.unwrap_or(due),
            failed: self.failed,
            p50: percentile(&self.latencies, 50),
            p99: percentile(&self.latencies, 99),
        })
    }

    fn start(&mut self, index: usize, due: Instant, number: usize) -> io::Result<()> {
        let load = self.load;
        let socket = match connect(load.address, Some(load.sources[number % load.sources.len()])) {
            Ok(socket) => socket,
            // All ports are taken, or the like: one request less.
            Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {
                self.fail();
                self.free.push(index);
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        // Edge-triggered, and only once asked for: connected first, then readable.
        let flags = epoll::EventFlags::OUT | epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&self.epoll, &socket, epoll::EventData::new_u64(index as u64), flags)?;
        let request = number % load.requests.len();
        let response = Vec::with_capacity(1024);
        self.connections[index] =
            Some(Connection { socket, due, request, connected: false, response, closing: false });
        Ok(())
    }

    fn progress(&mut self, index: usize) {
        let Some(connection) = &mut self.connections[index] else { return };
        match connection.go_on(self.load.requests) {
            Progress::Waits => {}
            Progress::Answered => {
                let due = connection.due;
                self.note(due);
                self.progress(index);
            }
            Progress::Over => self.end(index),
            Progress::Failed => {
                self.fail();
                self.end(index);
            }
        }
    }

    fn end(&mut self, index: usize) {
        self.connections[index] = None;
        self.free.push(index);
    }

    fn note(&mut self, due: Instant) {
        self.latencies.push(u32::try_from(due.elapsed().as_nanos()).unwrap_or(u32::MAX));
    }

    fn fail(&mut self) {
        self.failed += 1;
        self.latencies.push(u32::MAX);
    }

    /// What still waits, or was never sent, has failed.
    fn give_up(&mut self, mut due: Instant, end: Instant, interval: Duration) {
        for _ in 0..self.connections.iter().flatten().filter(|one| !one.closing).count() {
            self.fail();
        }
        while due <= end {
            self.fail();
            due += interval;
        }
    }
}

enum Progress {
    Waits,
    Answered,
    Over,
    Failed,
}

impl Connection {
    /// Goes as far as the socket lets it.
    fn go_on(&mut self, requests: &[Request]) -> Progress {
        let request = &requests[self.request];
        if !self.connected {
            if !matches!(sockopt::socket_error(&self.socket), Ok(Ok(()))) {
                return Progress::Failed;
            }
            match net::send(&self.socket, &request.close, SendFlags::NOSIGNAL) {
                Ok(sent) if sent == request.close.len() => self.connected = true,
                Err(Errno::AGAIN | Errno::NOTCONN) => return Progress::Waits,
                _ => return Progress::Failed,
            }
        }
        loop {
            self.response.reserve(1024);
            match net::recv(
                &self.socket,
                rustix::buffer::spare_capacity(&mut self.response),
                RecvFlags::empty(),
            ) {
                Ok((_, 0)) if self.closing => return Progress::Over,
                Ok((_, 0)) => return Progress::Failed,
                Ok(_) if self.closing => return Progress::Over,
                Ok(_) if request.is_whole(&self.response) => {
                    if !request.accepts(&self.response) {
                        return Progress::Failed;
                    }
                    self.closing = true;
                    return Progress::Answered;
                }
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Progress::Waits,
                Err(_) if self.closing => return Progress::Over,
                Err(_) => return Progress::Failed,
            }
        }
    }
}
