//! The daemon in a network namespace.
#![forbid(unsafe_code)]

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    net::SocketAddr,
    os::unix::net::UnixStream,
    process::{Child, Command, ExitStatus, Stdio},
    thread,
};

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    client::{Response, fetch},
    daemon::{Metrics, preflightd},
    netns::Netns,
    site::{PATIENCE, signal, wait_exit, wait_until},
};

/// The admin socket of each daemon, in the directory that it runs in.
pub(super) const ADMIN_SOCKET: &str = "admin.sock";

/// A daemon in the node's namespace.
#[derive(Debug)]
pub struct Steerer {
    child: Child,
    admin: SocketAddr,
    directory: TempDir,
}

impl Steerer {
    pub(super) fn start(node: &Netns, admin: SocketAddr, text: &str) -> Self {
        let directory = TempDir::with_prefix("preflightd-").expect("a directory for the daemon");
        let file = directory.path().join("preflightd.toml");
        fs::write(&file, text).expect("writing the configuration");
        let log = File::create(directory.path().join("log")).expect("the daemon's log");
        let second = log.try_clone().expect("a second handle to the log");
        let mut command = inside(node, &preflightd());
        command.env_remove("RUST_LOG").args(["run", "--config"]).arg(file);
        // Where the configuration says `admin.sock`.
        command.current_dir(directory.path());
        command.stdin(Stdio::null()).stdout(log).stderr(second);
        let child = command.spawn().unwrap_or_else(|e| panic!("starting {command:?}: {e}"));
        Self { child, admin, directory }
    }

    /// Waits for `/readyz` in its namespace.
    ///
    /// # Panics
    /// The daemon ends, or does not become ready.
    pub fn wait_ready(&mut self, node: &Netns) {
        wait_until("the daemon to steer", || {
            if let Some(status) = self.child.try_wait().expect("waiting for the daemon") {
                panic!("the daemon ended with {status}");
            }
            node.enter(|| fetch(self.admin, "/readyz")).is_ok_and(|r| r.status == 200)
        });
    }

    /// Reads all metrics.
    ///
    /// # Panics
    /// They cannot be had.
    pub fn metrics(&self, node: &Netns) -> Metrics {
        let response = node.enter(|| fetch(self.admin, "/metrics")).expect("reading /metrics");
        assert_eq!(response.status, 200, "/metrics: {response:?}");
        Metrics::parse(&String::from_utf8(response.body).expect("metrics in UTF-8"))
    }

    /// Reads its status from the admin socket.
    ///
    /// # Panics
    /// It cannot be had.
    pub fn status(&self) -> Value {
        let socket = self.directory.path().join(ADMIN_SOCKET);
        let mut stream = UnixStream::connect(&socket).expect("connecting to the admin socket");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let request = "GET /status HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        stream.write_all(request.as_bytes()).expect("asking for the status");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).expect("reading the status");
        let whole = Response::parse(&answer, true).expect("a response").expect("a whole response");
        serde_json::from_slice(&whole.0.body).expect("a status in JSON")
    }

    /// Replaces its configuration file, as editors do; it notices by itself.
    ///
    /// # Panics
    /// If the file cannot be written.
    pub fn rewrite(&self, text: &str) {
        let new = self.directory.path().join("preflightd.toml.new");
        fs::write(&new, text).expect("writing the configuration");
        fs::rename(new, self.directory.path().join("preflightd.toml")).expect("renaming the configuration");
    }

    /// Where its admin interface is, in its namespace.
    pub fn admin(&self) -> SocketAddr {
        self.admin
    }

    /// What it wrote so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    pub fn signal(&self, number: Signal) {
        signal(&self.child, number);
    }

    /// Kills it, and waits for its end.
    ///
    /// # Panics
    /// It cannot be killed.
    pub fn kill(&mut self) {
        self.child.kill().expect("killing the daemon");
        self.child.wait().expect("waiting for the daemon");
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// It does not end.
    pub fn wait(&mut self) -> ExitStatus {
        wait_exit(&mut self.child, PATIENCE).expect("the daemon to end")
    }
}

impl Drop for Steerer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("--- the daemon's log ---\n{}---", self.log());
        }
    }
}

/// The same command in a namespace.
pub(super) fn inside(netns: &Netns, command: &Command) -> Command {
    let mut wrapped = netns.command(command.get_program());
    wrapped.args(command.get_args());
    wrapped
}
