//! Who answers preflights that open a connection each: preflightd's worker, or the proxy; and whether those of a mix are
//! answered rightly, on connections that stay open.
#![forbid(unsafe_code)]

use crate::{
    connect::connect,
    mix::{self, Preflight},
    workload::{Request, says_close},
};
use memchr::memmem;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::{
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddrV4, TcpStream},
    os::fd::{AsFd, OwnedFd},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

/// A connection that stands still for so long has failed.
const PATIENCE: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };
/// After this time nobody begins another connection.
const ENOUGH: Duration = Duration::from_mins(1);
const THREADS: usize = 4;

/// How connections ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Answered {
    /// By a worker: the answer names no server.
    pub worker: u64,
    /// By nginx.
    pub proxy: u64,
    /// Not at all, or wrongly.
    pub failed: u64,
}

impl Answered {
    /// All connections.
    pub fn all(&self) -> u64 {
        self.worker + self.proxy + self.failed
    }
}

/// Opens `count` connections (less, if that takes a minute) with one of `requests` each, some at once, from `sources` in turn.
///
/// # Errors
/// A thread cannot be started.
pub fn ask(
    address: SocketAddrV4,
    sources: &[Ipv4Addr],
    requests: &[Request],
    count: usize,
) -> io::Result<Answered> {
    let next = AtomicUsize::new(0);
    let until = Instant::now() + ENOUGH;
    let ended = at_once(|| {
        let mut answered = Answered::default();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count || Instant::now() > until {
                return answered;
            }
            let request = &requests[number % requests.len()];
            match exchange(address, sources[number % sources.len()], request) {
                Ok(response) if !request.accepts(&response) => answered.failed += 1,
                Ok(response) if memmem::find(&response, b"\r\nServer: nginx").is_some() => {
                    answered.proxy += 1;
                }
                Ok(_) => answered.worker += 1,
                Err(error) => {
                    // The first ones tell enough.
                    if answered.failed == 0 {
                        eprintln!("a preflight failed: {error}");
                    }
                    answered.failed += 1;
                }
            }
        }
    })?;
    Ok(ended.into_iter().fold(Answered::default(), |sum, one| Answered {
        worker: sum.worker + one.worker,
        proxy: sum.proxy + one.proxy,
        failed: sum.failed + one.failed,
    }))
}

/// What came of a mix.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Visited {
    /// Preflights sent.
    pub asked: u64,
    /// Of these: answered as no browser would be content with.
    pub wrong: u64,
    /// Of these: not answered.
    pub failed: u64,
}

/// Opens `visits` connections (less, if that takes a minute) with `preflights` of the [`mix`] each, one after the other,
/// some connections at once, from `sources` in turn. The client closes; where the server does so before, it connects again.
///
/// # Errors
/// A thread cannot be started.
pub fn visit(
    address: SocketAddrV4,
    sources: &[Ipv4Addr],
    visits: usize,
    preflights: usize,
) -> io::Result<Visited> {
    let next = AtomicUsize::new(0);
    let until = Instant::now() + ENOUGH;
    let ended = at_once(|| {
        let mut visited = Visited::default();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= visits || Instant::now() > until {
                return visited;
            }
            let source = sources[number % sources.len()];
            let mut connection = None;
            for preflight in mix::preflights(number as u64).take(preflights) {
                visited.asked += 1;
                let response = converse(&mut connection, address, source, &preflight);
                let bad = match &response {
                    Ok(response) if preflight.is_right(response) => continue,
                    Ok(response) => {
                        visited.wrong += 1;
                        format!("answered by {}", response.escape_ascii())
                    }
                    Err(error) => {
                        visited.failed += 1;
                        error.to_string()
                    }
                };
                connection = None;
                // The first ones tell enough.
                if visited.wrong + visited.failed == 1 {
                    eprintln!("a preflight failed: {bad}; it was {}", preflight.head.escape_ascii());
                }
            }
        }
    })?;
    Ok(ended.into_iter().fold(Visited::default(), |sum, one| Visited {
        asked: sum.asked + one.asked,
        wrong: sum.wrong + one.wrong,
        failed: sum.failed + one.failed,
    }))
}

/// Runs `client` on some threads at once, to their end.
fn at_once<T: Send>(client: impl Fn() -> T + Sync) -> io::Result<Vec<T>> {
    thread::scope(|scope| {
        let threads: io::Result<Vec<_>> =
            (0..THREADS).map(|_| thread::Builder::new().spawn_scoped(scope, &client)).collect();
        Ok(threads?.into_iter().map(|thread| thread.join().expect("a client panicked")).collect())
    })
}

/// What is answered on `connection`, which is opened if it is not, and given up if the server says that it closes.
fn converse(
    connection: &mut Option<TcpStream>,
    address: SocketAddrV4,
    source: Ipv4Addr,
    preflight: &Preflight,
) -> io::Result<Vec<u8>> {
    let mut stream = match connection.take() {
        Some(stream) => stream,
        None => open(address, source)?,
    };
    stream.write_all(&preflight.head)?;
    let mut response = Vec::with_capacity(1024);
    let mut buffer = [0; 2048];
    while memmem::find(&response, b"\r\n\r\n").is_none() {
        wait(&stream, PollFlags::IN)?;
        let length = stream.read(&mut buffer)?;
        response.extend_from_slice(&buffer[..length]);
        if length == 0 {
            let text = format!("the server closed after {:?}", response.escape_ascii().to_string());
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
        }
    }
    if !says_close(&response) {
        *connection = Some(stream);
    }
    Ok(response)
}

/// The whole response, and that the server has closed behind it: its side keeps the TIME_WAIT.
fn exchange(address: SocketAddrV4, source: Ipv4Addr, request: &Request) -> io::Result<Vec<u8>> {
    let mut stream = open(address, source)?;
    stream.write_all(&request.close)?;
    let mut response = Vec::with_capacity(1024);
    let mut buffer = [0; 2048];
    loop {
        wait(&stream, PollFlags::IN)?;
        let length = stream.read(&mut buffer)?;
        response.extend_from_slice(&buffer[..length]);
        if length == 0 {
            return Ok(response);
        }
    }
}

/// Reads and writes do not block.
fn open(address: SocketAddrV4, source: Ipv4Addr) -> io::Result<TcpStream> {
    let socket: OwnedFd = connect(address, Some(source))?;
    wait(&socket, PollFlags::OUT)?;
    Ok(TcpStream::from(socket))
}

fn wait(socket: impl AsFd, flags: PollFlags) -> io::Result<()> {
    match poll(&mut [PollFd::new(&socket, flags)], Some(&PATIENCE))? {
        0 => Err(io::Error::new(io::ErrorKind::TimedOut, format!("nothing for {} s", PATIENCE.tv_sec))),
        _ => Ok(()),
    }
}
