//! Over a link that loses, doubles and reorders frames, by the sockets of a real kernel: every response is right, and none
//! is missing, wherever in a connection the kernel's answers end and the proxy begins.
#![forbid(unsafe_code)]

use std::{
    fs, io,
    net::SocketAddr,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

use preflightd_tests::{
    Client, Response,
    client::get,
    link::{Link, Trouble},
    netns::{Netns, have_root},
    site::have,
    steering::{HOST, Lab, Options, allowed_preflight, can_run, full},
};

const THREADS: u64 = 16;
/// Some of each in a hundred frames.
const TROUBLE: Trouble = Trouble { lost: 30, doubled: 30, late: 30, seed: 0x5eed };

#[test]
fn kernel_answers_and_the_proxys() {
    connections(Options { kernel_answers: true, trouble: Some(TROUBLE), ..Options::default() });
}

#[test]
fn workers_answers_and_the_proxys() {
    connections(Options { trouble: Some(TROUBLE), ..Options::default() });
}

#[test]
fn the_proxys_alone() {
    connections(Options { daemon: false, trouble: Some(TROUBLE), ..Options::default() });
}

/// Also where a test fails in the midst of it.
#[test]
fn nothing_is_left_of_a_link() {
    if !have_root() || !have(&["ip", "ethtool"]) {
        return;
    }
    let threads = || fs::read_dir("/proc/self/task").expect("the threads of this test").count();
    let before = threads();
    for panics in [false, true] {
        let (left, right) = (Netns::new("left"), Netns::new("right"));
        let mut name = String::new();
        let ended = catch_unwind(AssertUnwindSafe(|| {
            let ends: [(&Netns, &str, &[&str]); 2] =
                [(&left, "l0", &["10.79.0.1/24"]), (&right, "r0", &["10.79.0.2/24"])];
            let link = Link::new(ends, TROUBLE);
            link.middle().name().clone_into(&mut name);
            assert!(Path::new("/run/netns").join(&name).exists());
            assert_eq!(threads(), before + 2);
            assert!(!panics, "as wanted");
        }));
        assert_eq!(ended.is_err(), panics);
        assert!(!Path::new("/run/netns").join(&name).exists(), "{name} is still there");
        assert_eq!(threads(), before);
    }
}

fn connections(options: Options) {
    if !can_run() || !have(&["ethtool"]) {
        return;
    }
    let per_thread = if full() { 200 } else { 40 };
    let kernel_answers = options.kernel_answers;
    let lab = Lab::with(options);
    let tally = Tally::default();
    let failures: Vec<String> = lab.client(0).enter(|| {
        thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS)
                .map(|i| {
                    let (lab, tally) = (&lab, &tally);
                    scope.spawn(move || {
                        let mut mixer = Mixer { lab, tally, random: i + 1 };
                        let sites = lab.sites().into_iter().cycle().take(per_thread);
                        sites.filter_map(|site| mixer.connection(site).err()).collect::<Vec<_>>()
                    })
                })
                .collect();
            threads.into_iter().flat_map(|thread| thread.join().expect("a client's thread")).collect()
        })
    });
    let troubled = lab.links()[0].troubled();
    eprintln!("{tally:?}, {troubled:?}");
    let some = &failures[..failures.len().min(20)];
    let all = THREADS * per_thread as u64;
    assert!(failures.is_empty(), "{} of {all} connections failed: {some:#?}", failures.len());
    // It was bad enough, and what was to be tried was.
    let frames = troubled.frames.load(Ordering::Relaxed);
    for counter in [&troubled.lost, &troubled.doubled, &troubled.late] {
        assert!(counter.load(Ordering::Relaxed) > frames / 50, "{troubled:?}");
    }
    let [kernel, worker, proxy] =
        [&tally.kernel, &tally.worker, &tally.proxy].map(|n| n.load(Ordering::Relaxed));
    assert!(proxy > all / 4, "{tally:?}");
    if lab.is_steered() && kernel_answers {
        assert!(kernel > all && tally.handed_over.load(Ordering::Relaxed) > all / 4, "{tally:?}");
    } else if lab.is_steered() {
        assert!(kernel == 0 && worker > all / 4, "{tally:?}");
    } else {
        assert_eq!((kernel, worker), (0, 0));
    }
}

/// Who has answered how often.
#[derive(Debug, Default)]
struct Tally {
    kernel: AtomicU64,
    worker: AtomicU64,
    proxy: AtomicU64,
    /// Connections that the kernel has answered on before the proxy has.
    handed_over: AtomicU64,
}

/// Whose a connection is so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Whose {
    Nobodys,
    Kernels,
    Proxys,
    Ended,
}

struct Mixer<'a> {
    lab: &'a Lab,
    tally: &'a Tally,
    random: u64,
}

impl Mixer<'_> {
    /// A number below `limit` (xorshift).
    fn next(&mut self, limit: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) % limit
    }

    /// Some requests on one connection, and its end. What was done so far is in the error.
    fn connection(&mut self, site: SocketAddr) -> Result<(), String> {
        let mut done = Vec::new();
        let result = self.requests(site, &mut done);
        result.map_err(|e| format!("{site}, {}: {e}", done.join(", ")))
    }

    fn requests(&mut self, site: SocketAddr, done: &mut Vec<String>) -> io::Result<()> {
        let mut client = Client::try_connect(site)?;
        done.push(format!("from {}", client.stream().local_addr()?));
        let mut whose = Whose::Nobodys;
        // Half of them begin with a preflight or several, as browsers do.
        let preflights = self.next(4);
        let requests = preflights + self.next(5);
        for i in 0..requests {
            let kind = if i < preflights { 0 } else { self.next(6) };
            let before = whose;
            match kind {
                0 | 1 => {
                    done.push("preflight".to_owned());
                    client.try_send(allowed_preflight("/p"))?;
                    whose = self.check_preflight(&client.try_response()?, whose)?;
                }
                2 => {
                    let path = format!("/{}", self.next(1_000_000));
                    done.push(format!("GET {path}"));
                    client.try_send(get(HOST, &path))?;
                    let response = client.try_response()?;
                    let right = response.status == 200 && response.body == format!("nginx {path}").as_bytes();
                    whose = self.check_proxys(right, &response)?;
                }
                _ => {
                    let most = if kind == 5 { 100_000 } else { 3000 };
                    whose = self.post(&mut client, most, done)?;
                }
            }
            if (before, whose) == (Whose::Kernels, Whose::Proxys) {
                self.tally.handed_over.fetch_add(1, Ordering::Relaxed);
            }
            if whose == Whose::Ended {
                done.push("the other side's end".to_owned());
                return expect_end(&mut client);
            }
        }
        match self.next(3) {
            // It is simply dropped.
            0 => Ok(()),
            1 => {
                done.push("half-close".to_owned());
                client.half_close();
                expect_end(&mut client)
            }
            _ => {
                done.push("a preflight that closes".to_owned());
                let text = String::from_utf8_lossy(&allowed_preflight("/p")).into_owned();
                client.try_send(text.replace("Connection: keep-alive", "Connection: close"))?;
                let response = client.try_response()?;
                expect(response.header("connection") == Some("close"), "it does not close", &response)?;
                expect_end(&mut client)
            }
        }
    }

    fn post(&mut self, client: &mut Client, most: u64, done: &mut Vec<String>) -> io::Result<Whose> {
        let (length, first) = (self.next(most), self.next(251));
        let body: Vec<u8> = (0..length).map(|i| ((i * 31 + first) % 251) as u8).collect();
        done.push(format!("POST of {length}"));
        let head = format!("POST /echo HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {length}\r\n\r\n");
        if self.next(2) == 0 {
            client.try_send([head.as_bytes(), &body].concat())?;
        } else {
            client.try_send(head)?;
            client.try_send(&body)?;
        }
        let response = client.try_response()?;
        let right = response.status == 200 && response.body == body;
        self.check_proxys(right, &response)
    }

    fn check_proxys(&self, right: bool, response: &Response) -> io::Result<Whose> {
        self.tally.proxy.fetch_add(1, Ordering::Relaxed);
        expect(right && response.header("x-from") == Some("proxy"), "not the proxy's", response)?;
        Ok(Whose::Proxys)
    }

    /// Whose answer it is, who may give one now, and whether it is right.
    fn check_preflight(&self, response: &Response, whose: Whose) -> io::Result<Whose> {
        if response.header("x-from").is_some() {
            return self.check_proxys(response.status == 405, response);
        }
        expect(
            self.lab.is_steered() && whose != Whose::Proxys,
            "an answer on the proxy's connection",
            response,
        )?;
        let right = catch_unwind(AssertUnwindSafe(|| match response.header("connection") {
            None => self.lab.expect_kernel(response, "over a bad link"),
            Some(_) => self.lab.expect_worker(response, "over a bad link"),
        }));
        expect(right.is_ok(), "another answer", response)?;
        let (counter, whose) = match response.header("connection") {
            None => (&self.tally.kernel, Whose::Kernels),
            Some(_) => (&self.tally.worker, Whose::Ended),
        };
        counter.fetch_add(1, Ordering::Relaxed);
        Ok(whose)
    }
}

fn expect(right: bool, what: &str, response: &Response) -> io::Result<()> {
    if right { Ok(()) } else { Err(io::Error::other(format!("{what}: {response:?}"))) }
}

/// The server ends cleanly.
fn expect_end(client: &mut Client) -> io::Result<()> {
    let rest = client.try_read_to_end()?;
    if rest.is_empty() { Ok(()) } else { Err(io::Error::other("bytes behind the answer")) }
}
