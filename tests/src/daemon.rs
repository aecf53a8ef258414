//! The real daemon on free ports, from a generated configuration.
#![forbid(unsafe_code)]

use crate::{
    client::{Client, Response, fetch},
    site::{PATIENCE, free_address, signal, wait_exit, wait_until},
};
use rustix::process::Signal;
use std::{
    env,
    fmt::Write as _,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    thread,
};
use tempfile::TempDir;

/// Which engine the workers use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// The daemon's choice.
    Auto,
    /// io_uring.
    IoUring,
    /// epoll.
    Epoll,
}

impl Engine {
    /// Both concrete ones: what holds for a connection holds with either.
    pub const BOTH: [Engine; 2] = [Engine::IoUring, Engine::Epoll];

    /// Its name in the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::IoUring => "io_uring",
            Self::Epoll => "epoll",
        }
    }
}

/// What a daemon is to be started with: one listener, and TOML for the rest.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where it listens.
    pub address: SocketAddr,
    /// The proxy behind it; `None`: it only answers.
    pub upstream: Option<SocketAddr>,
    /// `proxy_protocol` of the listener.
    pub proxy_protocol: &'static str,
    /// Number of workers.
    pub workers: usize,
    /// `engine` of the workers.
    pub engine: Engine,
    /// Lines of `[limits]`.
    pub limits: String,
    /// Lines of `[relay]`.
    pub relay: String,
    /// Further lines of `[admin]`.
    pub admin: String,
    /// `[[policy]]` tables and whatever else comes at the end.
    pub policies: String,
}

impl Config {
    /// A listener on a free port before `upstream`, with these policies.
    pub fn new(upstream: impl Into<Option<SocketAddr>>, policies: impl Into<String>) -> Self {
        Self {
            address: free_address(),
            upstream: upstream.into(),
            proxy_protocol: "off",
            workers: 2,
            engine: Engine::Auto,
            limits: String::new(),
            relay: String::new(),
            admin: String::new(),
            policies: policies.into(),
        }
    }

    /// With this engine.
    #[must_use]
    pub fn engine(mut self, engine: Engine) -> Self {
        self.engine = engine;
        self
    }

    /// With these lines in `[limits]`.
    #[must_use]
    pub fn limits(mut self, lines: &str) -> Self {
        lines.clone_into(&mut self.limits);
        self
    }

    /// With these policies.
    #[must_use]
    pub fn policies(mut self, policies: &str) -> Self {
        policies.clone_into(&mut self.policies);
        self
    }

    /// The file's text, with the admin interface at `admin`.
    pub fn toml(&self, admin: SocketAddr) -> String {
        let mut toml = String::new();
        let upstream = match self.upstream {
            Some(upstream) => {
                format!("upstream = \"{upstream}\"\nproxy_protocol = \"{}\"\n", self.proxy_protocol)
            }
            None => "answer_only = true\n".to_owned(),
        };
        write!(
            toml,
            "[[listener]]\nname = \"web\"\naddress = \"{}\"\n{upstream}\n\
             [workers]\ncount = {}\nengine = \"{}\"\npin = false\n\n[limits]\n{}\n\n[relay]\n{}\n\n\
             [admin]\naddress = \"{admin}\"\n{}\n\n{}\n",
            self.address,
            self.workers,
            self.engine.as_str(),
            self.limits,
            self.relay,
            self.admin,
            self.policies,
        )
        .expect("writing into a string");
        toml
    }
}

/// A policy in the native dialect for every host and path: `https://app.example` may PUT and DELETE with
/// `content-type` and `x-demo`.
pub const POLICY: &str = r#"
[[policy]]
name = "demo"
hosts = ["*"]
origins = ["https://app.example"]
methods = ["PUT", "DELETE"]
headers = ["content-type", "x-demo"]
max_age = 600
"#;

/// The origin that [`POLICY`] allows.
pub const ORIGIN: &str = "https://app.example";

/// A running daemon.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    directory: TempDir,
    config: Config,
    admin: SocketAddr,
}

impl Daemon {
    /// Starts it and waits until it is ready.
    pub fn start(config: Config) -> Self {
        let directory = TempDir::with_prefix("preflightd-").expect("a directory for the daemon");
        let admin = free_address();
        let file = directory.path().join("preflightd.toml");
        fs::write(&file, config.toml(admin)).expect("writing the configuration");
        let mut command = preflightd();
        command.args(["run", "--config"]).arg(&file);
        let mut daemon = Self { child: spawn(command, directory.path()), directory, config, admin };
        daemon.wait_ready();
        daemon
    }

    /// A daemon with a recording upstream behind it that answers `200`, reporting the request line, and [`POLICY`].
    pub fn start_simple(engine: Engine) -> (Self, crate::Upstream) {
        let upstream = crate::Upstream::start(crate::Behaviour::report());
        (Self::start(Config::new(upstream.address(), POLICY).engine(engine)), upstream)
    }

    /// Waits for `/readyz`.
    pub fn wait_ready(&mut self) {
        wait_until("the daemon to be ready", || {
            if let Some(status) = self.child.try_wait().expect("waiting for the daemon") {
                panic!("the daemon ended with {status}");
            }
            fetch(self.admin, "/readyz").is_ok_and(|r| r.status == 200)
        });
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.config.address
    }

    /// What a client writes as `Host`.
    pub fn host(&self) -> String {
        self.config.address.to_string()
    }

    /// Where its admin interface is.
    pub fn admin(&self) -> SocketAddr {
        self.admin
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The configuration that it was last given.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Its configuration file.
    pub fn config_file(&self) -> PathBuf {
        self.directory.path().join("preflightd.toml")
    }

    /// Writes another configuration as editors do: a new file, renamed over the old one.
    pub fn rewrite(&mut self, config: Config) {
        let text = config.toml(self.admin);
        self.rewrite_text(&text);
        self.config = config;
    }

    /// As [`Daemon::rewrite`], with any text.
    pub fn rewrite_text(&self, text: &str) {
        let new = self.directory.path().join("preflightd.toml.new");
        fs::write(&new, text).expect("writing the configuration");
        fs::rename(new, self.config_file()).expect("renaming the configuration");
    }

    /// Opens a connection.
    pub fn connect(&self) -> Client {
        Client::connect(self.address())
    }

    /// One preflight on a connection of its own.
    pub fn preflight(&self, origin: &str, method: &str, headers: Option<&str>) -> Response {
        let request = crate::client::preflight(&self.host(), "/x", origin, method, headers);
        self.connect().exchange(request)
    }

    /// Reads all metrics.
    pub fn metrics(&self) -> Metrics {
        let response = fetch(self.admin, "/metrics").expect("reading /metrics");
        assert_eq!(response.status, 200, "/metrics: {response:?}");
        Metrics::parse(&String::from_utf8(response.body).expect("metrics in UTF-8"))
    }

    /// What it wrote so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// Number of open descriptors.
    pub fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid())).expect("reading /proc/PID/fd").count()
    }

    /// Resident memory in bytes.
    pub fn resident(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("/proc/PID/status");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
        line.trim().trim_end_matches("kB").trim().parse::<u64>().expect("a number of kB") * 1024
    }

    /// Sends a signal.
    pub fn signal(&self, number: Signal) {
        signal(&self.child, number);
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        wait_exit(&mut self.child, PATIENCE).expect("the daemon to end")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // At once: draining is what a test asks for by a signal.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("--- the daemon's log ---\n{}---", self.log());
        }
    }
}

/// The command that runs the daemon: the one built with the tests, or `PREFLIGHTD_BIN`.
pub fn preflightd() -> Command {
    let file = env::var_os("PREFLIGHTD_BIN").map_or_else(beside_this_test, PathBuf::from);
    let mut command = Command::new(file);
    command.env_remove("RUST_LOG").stdin(Stdio::null());
    command
}

/// Runs the daemon's command line to its end.
pub fn run<S: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = S>) -> Output {
    preflightd().args(arguments).output().expect("running preflightd")
}

/// `target/debug/preflightd-under-test`, seen from `target/debug/deps/a_test` or from a binary beside it.
fn beside_this_test() -> PathBuf {
    let this = env::current_exe().expect("the path of this test");
    let found =
        this.ancestors().skip(1).take(2).map(|d| d.join("preflightd-under-test")).find(|f| f.is_file());
    found.expect("preflightd-under-test is built with the tests of this package")
}

fn spawn(mut command: Command, directory: &Path) -> Child {
    let log = fs::File::create(directory.join("log")).expect("the daemon's log");
    let second = log.try_clone().expect("a second handle to the log");
    command.stdout(log).stderr(second).spawn().unwrap_or_else(|e| panic!("starting {command:?}: {e}"))
}

/// Samples in the Prometheus text format.
#[derive(Clone, Debug)]
pub struct Metrics(Vec<Sample>);

#[derive(Clone, Debug)]
struct Sample {
    name: String,
    labels: Vec<(String, String)>,
    value: f64,
}

impl Metrics {
    /// Reads the text format, strictly enough for what the daemon writes.
    pub fn parse(text: &str) -> Self {
        let samples = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
        Self(
            samples
                .map(|line| Sample::parse(line).unwrap_or_else(|| panic!("a bad sample: {line}")))
                .collect(),
        )
    }

    /// The sum of all samples of this name that carry these labels; 0 where there is none.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let carries = |s: &Sample, (k, v): &(&str, &str)| s.labels.iter().any(|(a, b)| a == k && b == v);
        let matching = self.0.iter().filter(|s| s.name == name && labels.iter().all(|l| carries(s, l)));
        matching.map(|s| s.value).sum()
    }

    /// As [`Metrics::sum`], of a counter.
    pub fn count(&self, name: &str, labels: &[(&str, &str)]) -> u64 {
        let sum = self.sum(name, labels);
        assert!(sum >= 0.0 && sum.fract() == 0.0, "{name} is {sum}, no count");
        #[expect(clippy::cast_sign_loss, reason = "checked above")]
        let count = sum as u64;
        count
    }

    /// Whether there is any sample of this name.
    pub fn has(&self, name: &str) -> bool {
        self.0.iter().any(|s| s.name == name)
    }

    /// Number of samples of this name.
    pub fn series(&self, name: &str) -> usize {
        self.0.iter().filter(|s| s.name == name).count()
    }
}

impl Sample {
    fn parse(line: &str) -> Option<Self> {
        let (series, value) = line.rsplit_once(' ')?;
        let (name, labels) = match series.split_once('{') {
            None => (series, Vec::new()),
            Some((name, rest)) => (name, parse_labels(rest.strip_suffix('}')?)?),
        };
        Some(Self { name: name.to_owned(), labels, value: value.parse().ok()? })
    }
}

/// `a="b",c="d"` with backslash escapes in the values.
fn parse_labels(mut text: &str) -> Option<Vec<(String, String)>> {
    let mut labels = Vec::new();
    while !text.is_empty() {
        let (name, rest) = text.split_once("=\"")?;
        let mut value = String::new();
        let mut characters = rest.char_indices();
        let end = loop {
            match characters.next()? {
                (at, '"') => break at,
                (_, '\\') => value.push(match characters.next()?.1 {
                    'n' => '\n',
                    other => other,
                }),
                (_, other) => value.push(other),
            }
        };
        labels.push((name.to_owned(), value));
        text = rest[end + 1..].trim_start_matches(',');
    }
    Some(labels)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_read() {
        let metrics = Metrics::parse("# HELP a b\na{x=\"1\",y=\"q\\\"}\"} 2\na{x=\"2\"} 3\nb 0.5\n");
        assert_eq!(metrics.count("a", &[]), 5);
        assert_eq!(metrics.count("a", &[("y", "q\"}")]), 2);
        assert_eq!(metrics.sum("b", &[]).to_bits(), 0.5f64.to_bits());
        assert!(!metrics.has("c"));
    }
}
