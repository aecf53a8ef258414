//! Kernel answers while policies change, and while the daemon dies, stands still or is replaced: on connections that are
//! open, and that no socket has.
#![forbid(unsafe_code)]

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use preflightd_tests::{
    Client, Response,
    client::{get, preflight},
    daemon::{ORIGIN, POLICY},
    site::wait_until,
    steering::{HOST, Lab, Options, allowed_preflight, can_run, check_get, expect_proxy, plain},
};
use rustix::process::Signal;

/// After this the heartbeat is stale (1 s), with room.
const STALE: Duration = Duration::from_millis(2500);

/// The second daemon's admin interface, in an upgrade.
const SECOND_ADMIN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9001);

/// Connections that are open when something happens: half of them have traffic.
const KEPT: usize = 200;

/// A lab with kernel answers, or none where tests run without the daemon.
fn kernel_lab(policies: &str) -> Option<Lab> {
    let options = Options { kernel_answers: true, policies: policies.to_owned(), ..Options::default() };
    (can_run() && !plain()).then(|| Lab::with(options))
}

/// The daemon is killed; when all is the proxy's, another one starts.
#[test]
fn connections_outlive_a_killed_daemon() {
    let Some(mut lab) = kernel_lab(POLICY) else { return };
    let (traffic, idle, resting) = open_connections(&lab);
    traffic.go_on(500, "all is well");
    assert_eq!(traffic.proxys(), 0, "the kernel answers before");
    lab.daemon().kill();
    traffic.go_on(500, "the daemon is dead");
    thread::sleep(STALE);
    let busy = without_daemon(traffic, idle);
    lab.start_daemon();
    expect_kernel_again(&lab, resting);
    for mut kept in busy {
        kept.get().expect("what is the proxy's stays so");
        kept.preflight().expect("what is the proxy's stays so");
    }
}

/// The daemon stands still for a while, as one that is starved.
#[test]
fn connections_outlive_a_stopped_daemon() {
    let Some(mut lab) = kernel_lab(POLICY) else { return };
    let (traffic, idle, resting) = open_connections(&lab);
    traffic.go_on(500, "all is well");
    assert_eq!(traffic.proxys(), 0, "the kernel answers before");
    lab.daemon().signal(Signal::STOP);
    traffic.go_on(500, "the daemon stands still");
    thread::sleep(STALE);
    let busy = without_daemon(traffic, idle);
    lab.daemon().signal(Signal::CONT);
    expect_kernel_again(&lab, resting);
    for mut kept in busy {
        kept.get().expect("what is the proxy's stays so");
        kept.preflight().expect("what is the proxy's stays so");
    }
}

#[test]
fn connections_outlive_a_daemon_that_is_told_to_end() {
    let Some(mut lab) = kernel_lab(POLICY) else { return };
    let (traffic, idle, resting) = open_connections(&lab);
    traffic.go_on(500, "all is well");
    lab.daemon().signal(Signal::TERM);
    let status = lab.daemon().wait();
    assert!(status.success(), "{status}");
    // It has said so: nothing need become stale.
    traffic.go_on(500, "the daemon has ended");
    without_daemon(traffic, idle);
    lab.start_daemon();
    expect_kernel_again(&lab, resting);
}

/// A second daemon takes over what the first has pinned; then the first ends.
#[test]
fn connections_outlive_an_upgrade() {
    let Some(mut lab) = kernel_lab(POLICY) else { return };
    let (traffic, idle, mut resting) = open_connections(&lab);
    traffic.go_on(500, "the first daemon runs");
    let mut second = lab.another_daemon(SECOND_ADMIN);
    second.wait_ready(lab.home());
    traffic.go_on(500, "both run");
    let mut first = lab.replace_daemon(second).expect("the first daemon");
    first.signal(Signal::TERM);
    let status = first.wait();
    assert!(status.success(), "{status}\n{}", first.log());
    traffic.go_on(500, "the second runs alone");
    thread::sleep(STALE);
    traffic.go_on(500, "the first is long since gone");
    let busy = traffic.stop();
    resting.extend(idle);
    expect_kernel_again(&lab, resting);
    for mut kept in busy {
        // The kernel's or, of the moment between the two, the proxy's.
        kept.preflight().expect("a preflight after the upgrade");
        kept.get().expect("a GET after the upgrade");
    }
}

/// Two policies in turn, a change after the other, while clients ask without pause on connections that they keep and on new
/// ones: each answer is wholly of one of the two, and once the daemon reports a change only of the new one.
#[test]
fn policies_change_in_mid_storm() {
    const CHANGES: usize = 20;
    let Some(mut lab) = kernel_lab(&Edition::of(0).policy()) else { return };
    lab.wait_kernel();
    let storm = Storm::start(&lab);
    for change in 0..CHANGES {
        storm.go_on(100, "nothing changes");
        storm.phase.fetch_add(1, Ordering::SeqCst);
        replace_policies(&mut lab, &Edition::of(change + 1).policy());
        storm.phase.fetch_add(1, Ordering::SeqCst);
    }
    storm.go_on(100, "nothing changes any more");
    let asked = storm.stop();
    let [kernels, workers] = [&asked.kernels, &asked.workers].map(|count| count.load(Ordering::Relaxed));
    let [settled, denied] = [&asked.settled, &asked.denied].map(|count| count.load(Ordering::Relaxed));
    eprintln!(
        "{kernels} by the kernel, {workers} by workers; {settled} while nothing changed, {denied} denied"
    );
    // Not all of one kind.
    assert!(kernels > workers && workers > 100 && settled > 100 && denied > 100);
}

/// Hosts and paths that no policy has any more are the proxy's: on open connections, and on new ones.
#[test]
fn a_removed_policy_is_nobodys() {
    let of = |name: &str, scope: &str| {
        POLICY.replace("\"demo\"", &format!("\"{name}\"")).replace("hosts = [\"*\"]", scope)
    };
    let stays = of("api", &format!("hosts = [\"{HOST}\"]\npaths = [{{ prefix = \"/x\" }}]"));
    let goes = of("host", "hosts = [\"gone.test\"]")
        + &of("path", &format!("hosts = [\"{HOST}\"]\npaths = [{{ prefix = \"/gone\" }}]"));
    let Some(mut lab) = kernel_lab(&(stays.clone() + &goes)) else { return };
    lab.wait_kernel();
    let removed = [("the host", "gone.test", "/x"), ("the path", HOST, "/gone/x")];
    let ask = |(_, host, path): (&str, &str, &str)| preflight(host, path, ORIGIN, "PUT", None);
    let mut open = Vec::new();
    for i in 0..100 {
        let site = lab.sites()[i % 2];
        let mut client = lab.connect(site);
        let asked = removed[i / 2 % 2];
        // Some have had an answer by what will be removed, some by what will stay.
        let first = if i < 50 { ask(asked) } else { allowed_preflight("/x") };
        lab.expect_kernel(&client.exchange(first), format_args!("{site}, {asked:?}, before"));
        open.push((site, asked, client));
    }
    replace_policies(&mut lab, &stays);
    for (i, (site, asked, client)) in open.iter_mut().enumerate() {
        let case = format!("{site}, {asked:?}, open connection {i}");
        if i % 5 == 0 {
            lab.expect_kernel(&client.exchange(allowed_preflight("/x")), format_args!("{case}, what stays"));
        }
        let response = client.exchange(ask(*asked));
        expect_proxy(&response, &case);
        assert_eq!(response.status, 405, "{case}");
        check_get(&client.exchange(get(HOST, "/y")), "/y");
    }
    for site in lab.sites() {
        for asked in removed {
            for i in 0..10 {
                let case = format!("{site}, {asked:?}, new connection {i}");
                expect_proxy(&lab.exchange(site, ask(asked)), case);
                lab.expect_kernel(&lab.preflight(site), format_args!("{site}, what stays"));
            }
        }
    }
}

/// Switched off while connections are open: a worker takes each over with its next preflight, and ends it.
#[test]
fn kernel_answers_are_switched_off_and_on() {
    let Some(mut lab) = kernel_lab(POLICY) else { return };
    lab.wait_kernel();
    let mut open: Vec<_> = (0..90).map(|i| Kept::open(&lab, lab.sites()[i % 2])).collect();
    let resting = open.split_off(60);
    let admin = lab.daemon().admin();
    let on = lab.toml(admin);
    lab.daemon().rewrite(&on.replace("kernel_answers = true", "kernel_answers = false"));
    wait_until("kernel answers to be off", || lab.status()["steer"]["kernel"]["on"] == false);
    for (i, mut kept) in open.into_iter().enumerate() {
        let case = format!("{}, open connection {i}", kept.site);
        if i % 4 < 2 {
            lab.expect_worker(&kept.client.exchange(allowed_preflight("/x")), &case);
            assert_eq!(kept.client.try_read_to_end().expect("a clean end"), b"", "{case}");
        } else {
            check_get(&kept.client.exchange(get(HOST, "/y")), "/y");
        }
        lab.expect_worker(&lab.preflight(kept.site), format_args!("{case}, a new one"));
    }
    lab.daemon().rewrite(&on);
    wait_until("kernel answers to be on", || lab.status()["steer"]["kernel"]["on"] == true);
    expect_kernel_again(&lab, resting);
}

/// Connections of the kernel's: some with traffic, some that are idle, some that are not to be touched for now.
fn open_connections(lab: &Lab) -> (Traffic, Vec<Kept>, Vec<Kept>) {
    lab.wait_kernel();
    let mut busy: Vec<_> = (0..KEPT).map(|i| Kept::open(lab, lab.sites()[i % 2])).collect();
    let mut idle = busy.split_off(KEPT / 2);
    let resting = idle.split_off(KEPT / 4);
    (Traffic::start(busy), idle, resting)
}

/// No daemon is there any more: everything is the proxy's, on every connection. Gives those that had traffic.
fn without_daemon(traffic: Traffic, idle: Vec<Kept>) -> Vec<Kept> {
    let kernels = traffic.kernels();
    traffic.go_on(500, "no daemon is there");
    assert_eq!(traffic.kernels(), kernels, "the kernel does not answer for the dead");
    let mut busy = traffic.stop();
    for (i, mut kept) in idle.into_iter().enumerate() {
        let case = format!("{}, idle connection {i}", kept.site);
        for step in 0..4 {
            if (i + step) % 2 == 0 {
                expect_proxy(&kept.client.exchange(allowed_preflight("/x")), format_args!("{case}, {step}"));
            } else {
                check_get(&kept.client.exchange(get(HOST, "/idle")), "/idle");
            }
        }
    }
    for (i, kept) in busy.iter_mut().enumerate() {
        kept.get().unwrap_or_else(|e| panic!("{}, busy connection {i}: {e}", kept.site));
        let response = kept.client.exchange(allowed_preflight("/x"));
        expect_proxy(&response, format_args!("{}, busy connection {i}", kept.site));
    }
    busy
}

/// A daemon is there again, and goes on where the other left these connections.
fn expect_kernel_again(lab: &Lab, connections: Vec<Kept>) {
    lab.wait_kernel();
    for (i, mut kept) in connections.into_iter().enumerate() {
        let case = format!("{}, connection {i}, again", kept.site);
        for _ in 0..2 {
            lab.expect_kernel(&kept.client.exchange(allowed_preflight("/x")), &case);
        }
        check_get(&kept.client.exchange(get(HOST, "/again")), "/again");
        expect_proxy(&kept.client.exchange(allowed_preflight("/x")), &case);
    }
}

/// A connection that the kernel has answered on.
struct Kept {
    client: Client,
    site: SocketAddr,
    /// The proxy has answered on it, and has it.
    proxys: bool,
}

impl Kept {
    fn open(lab: &Lab, site: SocketAddr) -> Self {
        let mut client = lab.connect(site);
        lab.expect_kernel(&client.exchange(allowed_preflight("/first")), site);
        Self { client, site, proxys: false }
    }

    /// One more preflight, which the kernel or the proxy answers, the kernel not behind the proxy.
    fn preflight(&mut self) -> io::Result<()> {
        self.client.try_send(allowed_preflight("/x"))?;
        let response = self.client.try_response()?;
        match (response.status, response.header("x-from"), response.header("connection")) {
            (405, Some("proxy"), _) => self.proxys = true,
            (204, None, None) if !self.proxys => {}
            _ => return Err(wrong(&response)),
        }
        Ok(())
    }

    fn get(&mut self) -> io::Result<()> {
        self.client.try_send(get(HOST, "/kept"))?;
        let response = self.client.try_response()?;
        self.proxys = true;
        let right = response.status == 200 && response.body == b"nginx /kept";
        if right { Ok(()) } else { Err(wrong(&response)) }
    }
}

fn wrong(response: &Response) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("a wrong answer: {response:?}"))
}

/// Preflights on connections in the background, and GETs on those that have become the proxy's.
struct Traffic {
    counts: Arc<Counts>,
    threads: Vec<JoinHandle<Vec<Kept>>>,
}

#[derive(Default)]
struct Counts {
    stop: AtomicBool,
    kernels: AtomicU64,
    proxys: AtomicU64,
    failures: Mutex<Vec<String>>,
}

impl Traffic {
    fn start(mut connections: Vec<Kept>) -> Self {
        let counts = Arc::new(Counts::default());
        let mut threads = Vec::new();
        while !connections.is_empty() {
            let mut some = connections.split_off(connections.len().saturating_sub(25));
            let counts = Arc::clone(&counts);
            threads.push(thread::spawn(move || {
                while !counts.stop.load(Ordering::Relaxed) {
                    for (i, kept) in some.iter_mut().enumerate() {
                        let result = kept.preflight();
                        let count = if kept.proxys { &counts.proxys } else { &counts.kernels };
                        count.fetch_add(1, Ordering::Relaxed);
                        let result = result.and_then(|()| if kept.proxys { kept.get() } else { Ok(()) });
                        if let Err(e) = result {
                            let what = format!("{}, connection {i}: {e}", kept.site);
                            counts.failures.lock().expect("the failures").push(what);
                            counts.stop.store(true, Ordering::Relaxed);
                        }
                    }
                }
                some
            }));
        }
        Self { counts, threads }
    }

    fn kernels(&self) -> u64 {
        self.counts.kernels.load(Ordering::Relaxed)
    }

    fn proxys(&self) -> u64 {
        self.counts.proxys.load(Ordering::Relaxed)
    }

    /// Waits until so many more preflights were answered, by whomever.
    fn go_on(&self, count: u64, while_what: &str) {
        let all = || self.kernels() + self.proxys();
        let before = all();
        wait_until(format_args!("{count} answers more while {while_what}"), || all() >= before + count);
        let failures = self.counts.failures.lock().expect("the failures");
        assert!(failures.is_empty(), "while {while_what}: {failures:#?}");
    }

    /// Ends it; gives the connections.
    fn stop(self) -> Vec<Kept> {
        self.counts.stop.store(true, Ordering::Relaxed);
        let all = self.threads.into_iter().flat_map(|thread| thread.join().expect("a client's thread"));
        let all = all.collect();
        let failures = self.counts.failures.lock().expect("the failures");
        assert!(failures.is_empty(), "{failures:#?}");
        all
    }
}

/// Gives the daemon other policies, and waits until it reports that all that answers has them.
fn replace_policies(lab: &mut Lab, policies: &str) {
    let before = lab.status()["generation"].as_u64().expect("a generation");
    let daemon = lab.daemon();
    let admin = daemon.admin();
    let text = lab.toml_with(admin, policies);
    lab.daemon().rewrite(&text);
    wait_until("all to have the new policies", || {
        let status = lab.status();
        let now = &status["generation"];
        let workers = status["generations"].as_array().expect("the workers' generations");
        now.as_u64() > Some(before)
            && workers.iter().all(|worker| worker == now)
            && status["steer"]["kernel"]["generation"] == *now
    });
}

/// One of two policies, all of whose answers differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Edition {
    First,
    Second,
}

impl Edition {
    fn of(change: usize) -> Self {
        if change.is_multiple_of(2) { Self::First } else { Self::Second }
    }

    fn max_age(self) -> &'static str {
        match self {
            Self::First => "600",
            Self::Second => "77",
        }
    }

    fn methods(self) -> [&'static str; 2] {
        match self {
            Self::First => ["PUT", "DELETE"],
            Self::Second => ["PATCH", "PUT"],
        }
    }

    fn policy(self) -> String {
        let methods = format!("methods = {:?}", self.methods());
        let policy = POLICY.replace("methods = [\"PUT\", \"DELETE\"]", &methods);
        let policy = policy.replace("max_age = 600", &format!("max_age = {}", self.max_age()));
        assert_eq!(policy != POLICY, self == Self::Second);
        policy
    }

    /// Whether this one gives this answer to a preflight for a method, whatever its tier.
    fn gives(self, response: &Response, method: &str) -> bool {
        let of = |name: &str| response.header(name);
        let methods = self.methods();
        if !methods.contains(&method) {
            return response.status == 403 && response.cors_headers().is_empty();
        }
        response.status == 204
            && of("access-control-allow-origin") == Some(ORIGIN)
            && of("access-control-allow-methods") == Some(&*methods.join(", "))
            && of("access-control-max-age") == Some(self.max_age())
    }
}

/// Clients that send preflights without pause, and check the answers against the editions that may be in force.
struct Storm {
    /// Twice the number of changes that are over; odd while one is under way.
    phase: Arc<AtomicUsize>,
    asked: Arc<Asked>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Asked {
    stop: AtomicBool,
    kernels: AtomicU64,
    workers: AtomicU64,
    /// Asked and answered while nothing changed.
    settled: AtomicU64,
    denied: AtomicU64,
    failures: Mutex<Vec<String>>,
}

/// How a client of a [`Storm`] asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asks {
    /// On one connection, as long as it lasts.
    Kept,
    /// On a new connection each time.
    New,
    /// By a head that is too long for the kernel to look at.
    Long,
}

impl Storm {
    fn start(lab: &Lab) -> Self {
        lab.client(0).sysctl("net.ipv4.ip_local_port_range", "10000 65000");
        lab.client(0).sysctl("net.ipv4.tcp_tw_reuse", "1");
        let (phase, asked) = (Arc::new(AtomicUsize::new(0)), Arc::new(Asked::default()));
        let mut threads = Vec::new();
        for site in lab.sites() {
            for asks in [Asks::Kept, Asks::Kept, Asks::New, Asks::Long] {
                let (phase, asked) = (Arc::clone(&phase), Arc::clone(&asked));
                // A new thread is where its parent is: in the client's namespace.
                let start = move || {
                    thread::spawn(move || {
                        let mut kept = None;
                        for i in 0.. {
                            if asked.stop.load(Ordering::Relaxed) {
                                return;
                            }
                            if let Err(e) = ask_once(&mut kept, asks, site, i, &phase, &asked) {
                                let what = format!("{site}, {asks:?}, {i}: {e}");
                                asked.failures.lock().expect("the failures").push(what);
                                return;
                            }
                        }
                    })
                };
                threads.push(lab.client(0).enter(start));
            }
        }
        Self { phase, asked, threads }
    }

    /// Waits for so many answers more of each tier.
    fn go_on(&self, count: u64, while_what: &str) {
        let both = || [&self.asked.kernels, &self.asked.workers].map(|count| count.load(Ordering::Relaxed));
        let before = both();
        wait_until(format_args!("{count} answers more while {while_what}"), || {
            self.check();
            both().into_iter().zip(before).all(|(now, before)| now >= before + count)
        });
    }

    fn check(&self) {
        let failures = self.asked.failures.lock().expect("the failures");
        assert!(failures.is_empty(), "{failures:#?}");
    }

    fn stop(self) -> Arc<Asked> {
        self.asked.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().expect("a client's thread");
        }
        let failures = self.asked.failures.lock().expect("the failures");
        assert!(failures.is_empty(), "{failures:#?}");
        drop(failures);
        self.asked
    }
}

fn ask_once(
    kept: &mut Option<Client>,
    asks: Asks,
    site: SocketAddr,
    i: usize,
    phase: &AtomicUsize,
    asked: &Asked,
) -> io::Result<()> {
    let method = ["PUT", "DELETE", "PATCH"][i % 3];
    let mut request = preflight(HOST, "/x", ORIGIN, method, Some("content-type,x-demo"));
    if asks == Asks::Long {
        request.truncate(request.len() - 2);
        request.extend_from_slice(format!("X-Padding: {}\r\n\r\n", "x".repeat(2500)).as_bytes());
    }
    let mut client = match kept.take() {
        Some(client) => client,
        None => Client::try_connect(site)?,
    };
    let before = phase.load(Ordering::SeqCst);
    client.try_send(request)?;
    let response = client.try_response()?;
    let after = phase.load(Ordering::SeqCst);
    let closes = response.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"));
    let count = if closes { &asked.workers } else { &asked.kernels };
    count.fetch_add(1, Ordering::Relaxed);
    asked.denied.fetch_add(u64::from(response.status == 403), Ordering::Relaxed);
    asked.settled.fetch_add(u64::from(before == after && before.is_multiple_of(2)), Ordering::Relaxed);
    // From the change before which, to the one behind which it was asked.
    if !(before / 2..=after.div_ceil(2)).any(|change| Edition::of(change).gives(&response, method)) {
        return Err(io::Error::other(format!("{method}, phases {before} to {after}: {response:?}")));
    }
    if closes {
        let rest = client.try_read_to_end()?;
        return if rest.is_empty() { Ok(()) } else { Err(io::Error::other("bytes behind the answer")) };
    }
    if asks == Asks::Kept {
        *kept = Some(client);
    }
    Ok(())
}
