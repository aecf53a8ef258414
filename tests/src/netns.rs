//! Network namespaces for tests: made, entered and, also after a panic, removed.
#![forbid(unsafe_code)]

use std::{
    ffi::OsStr,
    fs::{self, File},
    os::fd::AsFd as _,
    panic,
    process::{self, Command},
    sync::atomic::{AtomicU32, Ordering},
    thread::{self, JoinHandle},
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Whether this process may make namespaces and load eBPF programs; says why the test is skipped if not.
///
/// # Panics
/// In CI (the variable `CI` is set), where nothing may be skipped.
pub fn have_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        assert!(std::env::var_os("CI").is_none(), "CI must run this test as root");
        eprintln!("skipped: network namespaces need root");
    }
    root
}

/// A network namespace of its own with `lo` up. Dropping it removes it, and with it the interfaces in it.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Makes a namespace named after its role in the test, this process and a counter.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn new(role: &str) -> Self {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let name = format!("pf-{role}-{}-{}", process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        run(Command::new("ip").args(["netns", "add", &name]));
        let netns = Self { name };
        netns.ip("link set lo up");
        netns
    }

    /// Its name, as `ip netns` knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `ip` in the namespace with blank-separated arguments.
    ///
    /// # Panics
    /// If it fails.
    pub fn ip(&self, arguments: &str) {
        run(Command::new("ip").args(["-n", &self.name]).args(arguments.split_whitespace()));
    }

    /// A veth pair between two namespaces, both ends up, with these names and addresses (`10.0.0.1/24`). IPv6 addresses
    /// can be used at once.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn link(
        &self,
        interface: &str,
        addresses: &[&str],
        peer: &Self,
        peer_interface: &str,
        peer_addresses: &[&str],
    ) {
        self.ip(&format!("link add {interface} type veth peer name {peer_interface} netns {}", peer.name));
        for (netns, interface, addresses) in
            [(self, interface, addresses), (peer, peer_interface, peer_addresses)]
        {
            for address in addresses {
                let no_dad = if address.contains(':') { "nodad" } else { "" };
                netns.ip(&format!("address add {address} dev {interface} {no_dad}"));
            }
            netns.ip(&format!("link set {interface} up"));
        }
    }

    /// A command that runs in the namespace and, unlike with `ip netns exec`, sees the same `/sys` as this process.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path())).arg(program);
        command
    }

    /// Sets a kernel parameter of the namespace: `net.ipv4.tcp_syncookies`.
    ///
    /// # Panics
    /// If it cannot be set.
    pub fn sysctl(&self, key: &str, value: &str) {
        let file = format!("/proc/sys/{}", key.replace('.', "/"));
        // These files mean the namespace of the thread that opens them.
        self.enter(|| fs::write(&file, value)).unwrap_or_else(|error| panic!("{file}: {error}"));
    }

    /// Loads nftables rules in the namespace, in the language of `nft -f`.
    ///
    /// # Panics
    /// If they are refused.
    pub fn nft(&self, rules: &str) {
        run(self.command("nft").arg(rules));
    }

    /// Runs `f` on a thread of its own in the namespace; sockets that it opens stay there.
    ///
    /// # Panics
    /// If the namespace cannot be entered, and as `f` does.
    pub fn enter<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                move_into(&self.path());
                f()
            });
            inside.join().unwrap_or_else(|payload| panic::resume_unwind(payload))
        })
    }

    /// Begins `f` on a thread of its own in the namespace, as [`Netns::enter`].
    pub fn spawn<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        let path = self.path();
        thread::spawn(move || {
            move_into(&path);
            f()
        })
    }

    fn path(&self) -> String {
        format!("/run/netns/{}", self.name)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let removed = Command::new("ip").args(["netns", "delete", &self.name]).status();
        if !removed.is_ok_and(|status| status.success()) {
            eprintln!("cannot remove the namespace: ip netns delete {}", self.name);
        }
    }
}

/// Moves this thread.
fn move_into(path: &str) {
    let netns = File::open(path).unwrap_or_else(|error| panic!("cannot open {path}: {error}"));
    move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network))
        .unwrap_or_else(|error| panic!("cannot enter {path}: {error}"));
}

fn run(command: &mut Command) {
    let status = command.status().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    assert!(status.success(), "{command:?}: {status}");
}
