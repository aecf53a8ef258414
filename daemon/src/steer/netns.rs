//! Network namespaces: our own, or that of a proxy that runs in one of its own.
#![forbid(unsafe_code)]

use std::{
    fs::{self, File},
    io,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    panic,
    sync::Arc,
    thread,
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::Error;

/// `NSFS_MAGIC` of `linux/magic.h`: the file system that namespaces live in.
const NSFS_MAGIC: u64 = 0x6e73_6673;

/// A network namespace. A clone is the same one; it lives at least as long as they do.
#[derive(Clone, Debug)]
pub struct Netns(Option<Arc<File>>);

impl Netns {
    /// That of this process.
    pub fn own() -> Self {
        Self(None)
    }

    /// Opens what `spec` names: nothing for our own, a process by its number, else a path (`/run/netns/web`,
    /// `/proc/1/ns/net`). Our own by another name is our own.
    ///
    /// # Errors
    /// If there is no such process or file, it may not be opened, or it is no network namespace.
    pub fn open(spec: &str) -> Result<Self, Error> {
        if spec.is_empty() {
            return Ok(Self::own());
        }
        let by_pid = spec.bytes().all(|byte| byte.is_ascii_digit());
        let path = if by_pid { format!("/proc/{spec}/ns/net") } else { spec.to_owned() };
        let remedy = |error: &io::Error| match error.kind() {
            io::ErrorKind::NotFound if by_pid => {
                "name a process that runs, by the number that it has in our own PID namespace"
            }
            io::ErrorKind::NotFound => {
                "name a file below /run/netns (`ip netns list`) or /proc/PID/ns/net, or a process by its number"
            }
            io::ErrorKind::PermissionDenied => {
                "run as root, or with CAP_SYS_PTRACE for processes of other users"
            }
            _ => "name a file below /run/netns or /proc/PID/ns/net, or a process by its number",
        };
        let fail = |error: io::Error| {
            let remedy = remedy(&error);
            Err(Error::new(format!("open the network namespace {path}"), remedy)(error))
        };
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) => return fail(error),
        };
        match rustix::fs::fstatfs(&file) {
            Ok(stat) if u64::try_from(stat.f_type) == Ok(NSFS_MAGIC) => {}
            Ok(_) => return fail(io::Error::other("this is no namespace")),
            Err(error) => return fail(error.into()),
        }
        // Without /proc it counts as another one, which only asks for more privileges.
        let same = fs::metadata("/proc/thread-self/ns/net").is_ok_and(|own| {
            file.metadata().is_ok_and(|file| (own.dev(), own.ino()) == (file.dev(), file.ino()))
        });
        Ok(if same { Self::own() } else { Self(Some(Arc::new(file))) })
    }

    /// Whether it is that of this process, which needs no privileges to enter.
    pub fn is_own(&self) -> bool {
        self.0.is_none()
    }

    /// The number by which the kernel tells namespaces apart.
    ///
    /// # Errors
    /// For our own, if `/proc` is not there.
    pub fn number(&self) -> Result<u64, Error> {
        let metadata = match &self.0 {
            Some(netns) => netns.metadata(),
            None => fs::metadata("/proc/thread-self/ns/net"),
        };
        Ok(metadata.map_err(Error::new("tell network namespaces apart", "mount /proc"))?.ino())
    }

    /// Runs `f` on a thread of its own in the namespace; sockets that it opens stay there. Panics as `f` does.
    ///
    /// # Errors
    /// If the namespace may not be entered: another than our own needs `CAP_SYS_ADMIN`.
    pub fn enter<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T, Error> {
        let inside = || {
            if let Some(netns) = &self.0 {
                move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network)).map_err(
                    Error::new(
                        "enter the network namespace",
                        "run as root or with CAP_SYS_ADMIN, or in that namespace; check that it is a network \
                         namespace",
                    ),
                )?;
            }
            Ok(f())
        };
        thread::scope(|scope| {
            let thread = thread::Builder::new()
                .name("netns".to_owned())
                .spawn_scoped(scope, inside)
                .map_err(Error::new("start a thread", "raise the limit of threads (ulimit -u, pids.max)"))?;
            thread.join().unwrap_or_else(|payload| panic::resume_unwind(payload))
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::{
        io::Write as _,
        process::{Command, Stdio},
        sync::atomic::{AtomicU32, Ordering},
    };

    use super::*;

    /// Whether this process may make namespaces; in CI it must.
    pub(in crate::steer) fn have_root() -> bool {
        let root = rustix::process::geteuid().is_root();
        if !root {
            assert!(std::env::var_os("CI").is_none(), "CI must run this test as root");
            eprintln!("skipped: network namespaces need root");
        }
        root
    }

    /// A namespace for a test, with `lo` up; removed at the end.
    pub(in crate::steer) struct Scratch(String);

    impl Scratch {
        pub(in crate::steer) fn new(role: &str) -> Self {
            static COUNTER: AtomicU32 = AtomicU32::new(0);
            let count = COUNTER.fetch_add(1, Ordering::Relaxed);
            let name = format!("pf-{role}-{}-{count}", std::process::id());
            run(Command::new("ip").args(["netns", "add", &name]));
            let scratch = Self(name);
            scratch.ip("link set lo up");
            scratch
        }

        pub(in crate::steer) fn path(&self) -> String {
            format!("/run/netns/{}", self.0)
        }

        pub(in crate::steer) fn open(&self) -> Netns {
            Netns::open(&self.path()).expect("the namespace that was just made")
        }

        /// Runs `ip` in it with blank-separated arguments.
        pub(in crate::steer) fn ip(&self, arguments: &str) {
            run(Command::new("ip").args(["-n", &self.0]).args(arguments.split_whitespace()));
        }

        /// Runs many commands of `ip` at once, a line each.
        pub(in crate::steer) fn ip_batch(&self, lines: &str) {
            let mut ip = Command::new("ip")
                .args(["-n", &self.0, "-batch", "-"])
                .stdin(Stdio::piped())
                .spawn()
                .expect("ip can be run");
            let mut stdin = ip.stdin.take().expect("a pipe");
            stdin.write_all(lines.as_bytes()).expect("ip reads");
            drop(stdin);
            assert!(ip.wait().expect("ip ends").success(), "ip -batch");
        }

        /// Sets a sysctl of its own.
        pub(in crate::steer) fn sysctl(&self, name: &str, value: &str) {
            let path = format!("/proc/sys/{name}");
            let set = self.open().enter(|| fs::write(&path, value)).expect("entered");
            set.unwrap_or_else(|error| panic!("cannot set {path}: {error}"));
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let removed = Command::new("ip").args(["netns", "delete", &self.0]).status();
            if !removed.is_ok_and(|status| status.success()) {
                eprintln!("cannot remove the namespace: ip netns delete {}", self.0);
            }
        }
    }

    fn run(command: &mut Command) {
        let status = command.status().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
        assert!(status.success(), "{command:?}: {status}");
    }

    #[test]
    fn what_is_no_namespace_is_refused_with_a_remedy() {
        for (name, spec, want) in [
            ("no such file", "/run/netns/no-such-namespace", "ip netns list"),
            ("no such process", "4194304999", "name a process that runs"),
            ("an ordinary file", "/proc/self/status", "this is no namespace"),
        ] {
            let error = Netns::open(spec).expect_err(name).to_string();
            assert!(error.contains(want), "{name}: {error}");
        }
    }

    #[test]
    fn our_own_needs_no_privileges() {
        let pid = std::process::id().to_string();
        for spec in ["", "/proc/self/ns/net", &pid] {
            let netns = Netns::open(spec).expect(spec);
            assert!(netns.is_own(), "{spec}");
            assert_eq!(netns.enter(|| 7).expect(spec), 7, "{spec}");
        }
    }

    #[test]
    fn only_the_thread_of_its_own_enters() {
        if !have_root() {
            return;
        }
        let scratch = Scratch::new("enter");
        let netns = scratch.open();
        assert!(!netns.is_own());
        let inode = || fs::metadata("/proc/thread-self/ns/net").expect("/proc").ino();
        let before = inode();
        let inside = netns.enter(inode).expect("root may enter");
        assert_eq!(inside, fs::metadata(scratch.path()).expect("the namespace").ino());
        assert_ne!(inside, before);
        assert_eq!(inode(), before);
        let uts = Netns::open("/proc/self/ns/uts").expect("a namespace");
        let error = uts.enter(|| ()).expect_err("of another type").to_string();
        assert!(error.contains("check that it is a network namespace"), "{error}");
    }
}
