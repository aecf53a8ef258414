//! Who answers preflights that open a connection each: preflightd's worker, or the proxy.
#![forbid(unsafe_code)]

use crate::{connect::connect, workload::Request};
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
    let client = || {
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
    };
    thread::scope(|scope| {
        let threads: io::Result<Vec<_>> =
            (0..THREADS).map(|_| thread::Builder::new().spawn_scoped(scope, client)).collect();
        let ended = threads?.into_iter().map(|thread| thread.join().expect("a client panicked"));
        Ok(ended.fold(Answered::default(), |sum, one| Answered {
            worker: sum.worker + one.worker,
            proxy: sum.proxy + one.proxy,
            failed: sum.failed + one.failed,
        }))
    })
}

/// The whole response, and that the server has closed behind it: its side keeps the TIME_WAIT.
fn exchange(address: SocketAddrV4, source: Ipv4Addr, request: &Request) -> io::Result<Vec<u8>> {
    let socket: OwnedFd = connect(address, Some(source))?;
    wait(&socket, PollFlags::OUT)?;
    let mut stream = TcpStream::from(socket);
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

fn wait(socket: impl AsFd, flags: PollFlags) -> io::Result<()> {
    match poll(&mut [PollFd::new(&socket, flags)], Some(&PATIENCE))? {
        0 => Err(io::Error::new(io::ErrorKind::TimedOut, format!("nothing for {} s", PATIENCE.tv_sec))),
        _ => Ok(()),
    }
}
