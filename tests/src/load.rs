//! Clients in the background of a [`Lab`]: they ask and check all the time, while a test breaks things.
#![forbid(unsafe_code)]

use std::{
    fmt::Display,
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use crate::{
    Client, Response,
    client::get,
    site::wait_until,
    steering::{HOST, Lab, allowed_preflight},
};

/// What a client does, over and over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A GET on a connection of its own, which in turn either side closes.
    Get,
    /// GETs on one connection, a new one where the proxy closes it between requests.
    KeepAlive,
    /// A preflight on a connection of its own.
    Preflight,
}

/// Running clients: one of each kind for each site.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    counts: Arc<Counts>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Counts {
    gets: AtomicU64,
    workers: AtomicU64,
    proxys: AtomicU64,
    failed_gets: Mutex<Vec<String>>,
    failed_preflights: Mutex<Vec<String>>,
}

/// What became of a load.
#[derive(Debug)]
pub struct Report {
    /// GETs that the proxy answered rightly.
    pub gets: u64,
    /// Preflights that a worker answered rightly.
    pub workers: u64,
    /// Preflights that the proxy answered.
    pub proxys: u64,
    /// What went wrong with GETs.
    pub failed_gets: Vec<String>,
    /// What went wrong with preflights.
    pub failed_preflights: Vec<String>,
}

/// How many clients send preflights: as many can have one under way at any time.
pub const PREFLIGHTERS: usize = 2;

/// Between two requests of a client: the machine has other work.
const PAUSE: Duration = Duration::from_micros(300);

impl Load {
    /// Starts clients of all kinds on the lab's first client host.
    pub fn start(lab: &Lab) -> Self {
        Self::of(lab, &[Kind::Get, Kind::KeepAlive, Kind::Preflight])
    }

    /// Starts clients of these kinds.
    pub fn of(lab: &Lab, kinds: &[Kind]) -> Self {
        // So many short connections need ports again soon.
        lab.client(0).sysctl("net.ipv4.ip_local_port_range", "10000 65000");
        lab.client(0).sysctl("net.ipv4.tcp_tw_reuse", "1");
        let stop = Arc::new(AtomicBool::new(false));
        let counts = Arc::new(Counts::default());
        let mut threads = Vec::new();
        for site in lab.sites() {
            for kind in kinds.iter().copied() {
                let (stop, counts) = (Arc::clone(&stop), Arc::clone(&counts));
                // A new thread is where its parent is: in the client's namespace.
                let start = move || thread::spawn(move || run(kind, site, &stop, &counts));
                threads.push(lab.client(0).enter(start));
            }
        }
        Self { stop, counts, threads }
    }

    /// GETs answered so far.
    pub fn gets(&self) -> u64 {
        self.counts.gets.load(Ordering::Relaxed)
    }

    /// Preflights that workers have answered so far.
    pub fn workers(&self) -> u64 {
        self.counts.workers.load(Ordering::Relaxed)
    }

    /// Preflights that the proxy has answered so far.
    pub fn proxys(&self) -> u64 {
        self.counts.proxys.load(Ordering::Relaxed)
    }

    /// How many preflights have failed so far.
    ///
    /// # Panics
    /// Never, unless a client did.
    pub fn failed_preflights(&self) -> usize {
        self.counts.failed_preflights.lock().expect("the failures").len()
    }

    /// Waits until so many of each more were answered, by whomever.
    ///
    /// # Panics
    /// They are not.
    pub fn go_on(&self, count: u64, while_what: impl Display) {
        let preflights = || self.workers() + self.proxys();
        let (gets, before) = (self.gets(), preflights());
        wait_until(format_args!("{count} answers more while {while_what}"), || {
            self.gets() >= gets + count && preflights() >= before + count
        });
    }

    /// Ends the clients.
    ///
    /// # Panics
    /// If one did.
    pub fn stop(mut self) -> Report {
        self.end();
        let failed = |list: &Mutex<Vec<String>>| std::mem::take(&mut *list.lock().expect("the failures"));
        let report = Report {
            gets: self.gets(),
            workers: self.workers(),
            proxys: self.proxys(),
            failed_gets: failed(&self.counts.failed_gets),
            failed_preflights: failed(&self.counts.failed_preflights),
        };
        eprintln!(
            "load: {} GETs, {} preflights by workers, {} by the proxy; failed: {} and {}",
            report.gets,
            report.workers,
            report.proxys,
            report.failed_gets.len(),
            report.failed_preflights.len()
        );
        report
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let ended = thread.join();
            assert!(ended.is_ok() || thread::panicking(), "a client panicked");
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.end();
    }
}

impl Report {
    /// Checks that nothing went wrong.
    ///
    /// # Panics
    /// Something did.
    #[track_caller]
    pub fn expect_flawless(&self) {
        self.expect_flawless_gets();
        assert!(
            self.failed_preflights.is_empty(),
            "preflights failed: {:#?}",
            first(&self.failed_preflights)
        );
    }

    /// Checks that nothing went wrong with GETs.
    ///
    /// # Panics
    /// Something did.
    #[track_caller]
    pub fn expect_flawless_gets(&self) {
        assert!(self.failed_gets.is_empty(), "GETs failed: {:#?}", first(&self.failed_gets));
    }
}

fn first(failures: &[String]) -> (usize, &[String]) {
    (failures.len(), &failures[..failures.len().min(10)])
}

fn run(kind: Kind, site: SocketAddr, stop: &AtomicBool, counts: &Counts) {
    let mut kept = None;
    for i in 0u64.. {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        if kind == Kind::Preflight {
            match preflight(site) {
                Ok(true) => &counts.workers,
                Ok(false) => &counts.proxys,
                Err(e) => {
                    fail(&counts.failed_preflights, format!("{site}, preflight {i}: {e}"));
                    continue;
                }
            }
            .fetch_add(1, Ordering::Relaxed);
        } else {
            let path = format!("/{i}");
            let result =
                if kind == Kind::Get { one_get(site, &path) } else { next_get(&mut kept, site, &path) };
            match result {
                Ok(()) => drop(counts.gets.fetch_add(1, Ordering::Relaxed)),
                Err(e) => {
                    kept = None;
                    fail(&counts.failed_gets, format!("{site}, {kind:?} {i}: {e}"));
                }
            }
        }
        thread::sleep(PAUSE);
    }
}

fn fail(failures: &Mutex<Vec<String>>, what: String) {
    failures.lock().expect("the failures").push(what);
    // Where everything fails, ten a second are enough.
    thread::sleep(Duration::from_millis(100));
}

/// Whether a worker answered.
fn preflight(site: SocketAddr) -> io::Result<bool> {
    let mut client = Client::try_connect(site)?;
    client.try_send(allowed_preflight("/x"))?;
    let response = client.try_response()?;
    match (response.status, response.header("x-from")) {
        (204, None) => Ok(true),
        (405, Some("proxy")) => Ok(false),
        _ => Err(wrong(&response)),
    }
}

fn one_get(site: SocketAddr, path: &str) -> io::Result<()> {
    let mut client = Client::try_connect(site)?;
    let request = if path.ends_with(['0', '2', '4', '6', '8']) {
        format!("GET {path} HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n").into_bytes()
    } else {
        get(HOST, path)
    };
    client.try_send(request)?;
    check(&client.try_response()?, path)
}

fn next_get(kept: &mut Option<Client>, site: SocketAddr, path: &str) -> io::Result<()> {
    if kept.as_mut().is_some_and(Client::has_ended) {
        *kept = None;
    }
    let client = match kept {
        Some(client) => client,
        None => kept.insert(Client::try_connect(site)?),
    };
    client.try_send(get(HOST, path))?;
    check(&client.try_response()?, path)
}

fn check(response: &Response, path: &str) -> io::Result<()> {
    let right = response.status == 200
        && response.header("x-from") == Some("proxy")
        && response.body == format!("nginx {path}").as_bytes();
    if right { Ok(()) } else { Err(wrong(response)) }
}

fn wrong(response: &Response) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("a wrong answer: {response:?}"))
}
