//! Where things are and what a test may count on: free ports, programs, waiting.
#![forbid(unsafe_code)]

use std::{
    env,
    fmt::Display,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::PathBuf,
    process::{self, Child, ExitStatus},
    sync::atomic::{AtomicU16, Ordering},
    thread,
    time::{Duration, Instant},
};

/// How long anything may take that is expected to happen. Generous: no test is about time.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Ports below the kernel's ephemeral range (from 32768), so that no outgoing connection of another test takes one
/// between its choice and its use.
const PORTS: std::ops::Range<u16> = 10_000..32_000;

/// An address on 127.0.0.1 that nothing listens on.
pub fn free_address() -> SocketAddr {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let count = PORTS.end - PORTS.start;
    // Tests of one process count upwards; processes start far from each other.
    let start = (process::id() % u32::from(count)) as u16;
    for _ in 0..count {
        let step = NEXT.fetch_add(1, Ordering::Relaxed);
        let port = PORTS.start + ((u32::from(start) * 101 + u32::from(step)) % u32::from(count)) as u16;
        if TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok() {
            return SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        }
    }
    panic!("no free port in {PORTS:?}");
}

/// Finds a program in `PATH`, the system directories that a user's `PATH` may lack, or what the set-up has made.
pub fn program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let made = concat!(env!("CARGO_MANIFEST_DIR"), "/../.tools");
    env::split_paths(&path)
        .chain(["/usr/sbin", "/usr/bin", "/sbin", made].map(PathBuf::from))
        .map(|directory| directory.join(name))
        .find(|file| file.is_file())
}

/// True if all programs are here. A missing one fails the test in CI; elsewhere the test says that it is skipped.
pub fn have(programs: &[&str]) -> bool {
    let missing: Vec<_> = programs.iter().filter(|name| program(name).is_none()).copied().collect();
    if missing.is_empty() {
        return true;
    }
    skip(&missing.join(", "));
    false
}

/// Says that a test is skipped because `missing` is not installed.
///
/// # Panics
/// In CI, where nothing may be skipped.
pub fn skip(missing: &str) {
    let what = format!("not installed: {missing}");
    let in_ci = env::var("CI").is_ok_and(|value| !matches!(&*value, "" | "0" | "false"));
    assert!(!in_ci, "{what} (`cargo xtask setup` installs what the tests need)");
    eprintln!("skipped: {what}");
}

/// Waits until `probe` gives something.
///
/// # Panics
/// It does not within [`PATIENCE`].
pub fn wait_for<T>(what: impl Display, mut probe: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = probe() {
            return value;
        }
        assert!(Instant::now() < end, "waited {PATIENCE:?} in vain for {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Waits until `probe` is true, as [`wait_for`].
pub fn wait_until(what: impl Display, mut probe: impl FnMut() -> bool) {
    wait_for(what, || probe().then_some(()));
}

/// Sends a signal to a child that has not been waited for.
pub fn signal(child: &Child, signal: rustix::process::Signal) {
    // A child that has just ended is nobody's business here.
    let _ = rustix::process::kill_process(rustix::process::Pid::from_child(child), signal);
}

/// Waits for a child's end, at most for `limit`.
pub fn wait_exit(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let end = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait().expect("waiting for a child") {
            return Some(status);
        }
        if Instant::now() > end {
            return None;
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Asks a child to end (SIGTERM), kills it if it does not.
pub fn end(child: &mut Child) {
    if matches!(child.try_wait(), Ok(Some(_))) {
        return;
    }
    signal(child, rustix::process::Signal::TERM);
    if wait_exit(child, Duration::from_secs(5)).is_none() {
        let _ = child.kill();
        let _ = child.wait();
    }
}
