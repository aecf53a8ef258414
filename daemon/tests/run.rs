//! The running daemon as its operator meets it: the admin socket, flags, reloads of files beside the configuration.

use serde_json::Value;
use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::{SocketAddr, TcpStream},
    os::unix::{
        fs::{PermissionsExt as _, symlink},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

/// Long enough on a busy machine; no test waits for it to pass.
const PATIENCE: Duration = Duration::from_secs(30);

/// A directory of its own, removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("preflightd-run-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).expect("a directory");
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).expect("a file");
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A running daemon; its log is read line by line.
struct Daemon {
    child: Child,
    log: mpsc::Receiver<String>,
    seen: Vec<String>,
}

impl Daemon {
    fn start(directory: &Scratch, args: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_preflightd"))
            .arg("run")
            .args(args)
            .current_dir(&directory.0)
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("preflightd");
        let lines = BufReader::new(child.stderr.take().expect("its log")).lines();
        let (sender, log) = mpsc::channel();
        thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| sender.send(line)));
        let mut daemon = Self { child, log, seen: Vec::new() };
        daemon.line(" ready ");
        daemon
    }

    /// Waits for a line of the log, from the beginning of what was not waited for yet.
    fn line(&mut self, part: &str) -> String {
        let end = Instant::now() + PATIENCE;
        loop {
            match self.log.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    self.seen.push(line.clone());
                    if line.contains(part) {
                        return line;
                    }
                }
                Err(e) => panic!("no line with `{part}` ({e}) in:\n{}", self.seen.join("\n")),
            }
        }
    }

    /// The address that it listens on or has its metrics at, from the log.
    fn address(&self, part: &str) -> SocketAddr {
        let line = self.seen.iter().find(|line| line.contains(part)).expect("a line of the log");
        let text = line.split("address=").nth(1).and_then(|rest| rest.split(' ').next()).expect("an address");
        text.parse().expect("an address")
    }

    fn signal(&self, signal: &str) {
        let done = Command::new("kill").args([signal, &self.child.id().to_string()]).status().expect("kill");
        assert!(done.success(), "kill {signal}");
    }

    fn wait(&mut self) -> ExitStatus {
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            if let Some(status) = self.child.try_wait().expect("its exit") {
                return status;
            }
            thread::sleep(Duration::from_millis(10));
        }
        panic!("it does not end:\n{}", self.seen.join("\n"));
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The answer to a request, as text.
fn exchange(mut stream: impl std::io::Read + std::io::Write, request: &str) -> String {
    stream.write_all(request.as_bytes()).expect("writing a request");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("reading an answer");
    answer
}

fn get(address: SocketAddr, path: &str) -> String {
    let stream = TcpStream::connect(address).expect("connecting");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    exchange(stream, &format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"))
}

fn status(socket: &Path) -> Value {
    let stream = UnixStream::connect(socket).expect("the admin socket");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let answer = exchange(stream, "GET /status HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    serde_json::from_str(answer.split("\r\n\r\n").nth(1).expect("a body")).expect("JSON")
}

fn explain(socket: &Path, more: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_preflightd"))
        .args(["explain", "--format", "json", "--admin-socket"])
        .arg(socket)
        .args(["--origin", "https://app.example", "--method", "GET"])
        .args(more)
        .output()
        .expect("preflightd explain")
}

/// A configuration that only answers, on free ports.
fn config(more: &str) -> String {
    format!(
        "policy_dir = \"policies\"\n[[listener]]\nname = \"web\"\naddress = \"127.0.0.1:0\"\nanswer_only = \
         true\n[workers]\ncount = 2\npin = false\n[admin]\naddress = \"127.0.0.1:0\"\nsocket = \"admin.sock\"\n{more}"
    )
}

fn policy(name: &str) -> String {
    format!("[[policy]]\nname = \"{name}\"\nhosts = [\"{name}.test\"]\norigins = [\"https://app.example\"]\n")
}

#[test]
fn the_admin_socket() {
    let files = Scratch::new("socket");
    fs::create_dir(files.path("policies")).expect("a directory");
    files.write("policies/a.toml", &policy("a"));
    files.write("config.toml", &config(""));
    let socket = files.path("admin.sock");

    // One that is left over is replaced.
    drop(UnixListener::bind(&socket).expect("a stale socket"));
    let mut daemon = Daemon::start(&files, &["--config", "config.toml"]);
    let mode = fs::metadata(&socket).expect("the socket").permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "only its owner may use it");

    let now = status(&socket);
    assert_eq!(now["ready"], true, "{now}");
    assert_eq!(now["policies"], 1, "{now}");
    assert_eq!(now["generations"], serde_json::json!([1, 1]), "{now}");
    assert_eq!(now["listeners"][0]["address"], daemon.address(" listening ").to_string(), "{now}");
    assert_eq!(now["listeners"][0]["steered"], false, "{now}");

    let allowed = explain(&socket, &["--url", "http://a.test/"]);
    assert_eq!(allowed.status.code(), Some(0), "{allowed:?}");
    let report: Value = serde_json::from_slice(&allowed.stdout).expect("JSON");
    assert_eq!(report["route"]["file"], "policies/a.toml", "{report}");
    assert_eq!(explain(&socket, &["--url", "http://b.test/"]).status.code(), Some(1));
    let nowhere = explain(&socket, &["--url", "http://a.test/", "--listener", "wep"]);
    assert_eq!(nowhere.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&nowhere.stderr).contains("there are: web"), "{nowhere:?}");

    // A second daemon may not take it away; a file of another kind is left alone.
    for (path, why) in [("admin.sock", "another process listens there"), ("config.toml", "no socket")] {
        let second = Command::new(env!("CARGO_BIN_EXE_preflightd"))
            .args(["run", "--config", "config.toml", "--admin-socket", path])
            .current_dir(&files.0)
            .output()
            .expect("preflightd");
        assert_eq!(second.status.code(), Some(1), "{path}");
        assert!(String::from_utf8_lossy(&second.stderr).contains(why), "{path}: {second:?}");
    }
    assert_eq!(status(&socket)["ready"], true, "the first one still has it");

    // Nothing of policies on the metrics address.
    let metrics = daemon.address(" metrics and health ");
    for path in ["/status", "/explain"] {
        assert!(get(metrics, path).starts_with("HTTP/1.1 404 "), "{path}");
    }
    daemon.signal("-TERM");
    assert_eq!(daemon.wait().code(), Some(0));
    assert!(!socket.exists(), "it goes with its daemon");
}

#[test]
fn policies_are_replaced_and_the_rest_asks_for_a_restart() {
    let files = Scratch::new("reload");
    // As Kubernetes mounts a ConfigMap: links into a directory that is swapped as a whole.
    let fill = |version: &str, names: &[&str]| {
        fs::create_dir(files.path(version)).expect("a directory");
        for name in names {
            files.write(&format!("{version}/{name}.toml"), &policy(name));
        }
        symlink(version, files.path("tmp")).expect("a link");
        fs::rename(files.path("tmp"), files.path("policies")).expect("a swap");
    };
    fill("..v1", &["a"]);
    files.write("config.toml", &config(""));
    let socket = files.path("admin.sock");
    let mut daemon = Daemon::start(&files, &["--config", "config.toml"]);
    assert_eq!(status(&socket)["policies"], 1);

    fill("..v2", &["a", "b"]);
    daemon.line("the policies were replaced generation=2");
    assert_eq!(status(&socket)["policies"], 2);
    assert_eq!(explain(&socket, &["--url", "http://b.test/"]).status.code(), Some(0));

    files.write("policies/c.toml", &policy("b"));
    let line = daemon.line("duplicate-name");
    assert!(line.contains("policies/c.toml:2:8"), "{line}");
    daemon.line("the policies stay as they were");
    let now = status(&socket);
    assert_eq!(
        (&now["policies"], &now["files_current"], &now["reloads"]["refused"]),
        (&2.into(), &false.into(), &1.into())
    );

    fs::remove_file(files.path("policies/c.toml")).expect("removing a file");
    daemon.line("the policies were replaced generation=3");
    assert_eq!(status(&socket)["files_current"], true);

    files.write("config.toml", &config("[limits]\nidle_timeout = \"1s\"\n").replace("\"web\"", "\"front\""));
    let line = daemon.line("restart");
    assert!(line.contains("sections=\"listener, limits\""), "{line}");
    daemon.line("the policies were replaced generation=4");
    assert_eq!(explain(&socket, &["--url", "http://a.test/", "--listener", "web"]).status.code(), Some(0));

    fs::remove_file(files.path("config.toml")).expect("removing a file");
    daemon.line("cannot read config.toml");
    assert_eq!(explain(&socket, &["--url", "http://a.test/"]).status.code(), Some(0));
    files.write("config.toml", &config(""));
    daemon.line("the policies were replaced generation=5");
}

#[test]
fn flags_instead_of_a_file() {
    let files = Scratch::new("flags");
    files.write("p.toml", &policy("p"));
    let upstream = std::net::TcpListener::bind("127.0.0.1:0").expect("an upstream");
    let address = upstream.local_addr().expect("its address").to_string();
    let mut daemon = Daemon::start(
        &files,
        &[
            "--listen",
            "127.0.0.1:0",
            "--upstream",
            &address,
            "--proxy-protocol",
            "v1",
            "--policy",
            "p.toml",
            "--workers",
            "1",
            "--engine",
            "epoll",
            "--admin",
            "127.0.0.1:0",
            "--admin-socket",
            "s.sock",
            "--log-level",
            "debug",
        ],
    );
    let now = status(&files.path("s.sock"));
    assert_eq!(
        (&now["workers"], &now["engine"], &now["listeners"][0]["name"]),
        (&1.into(), &"epoll".into(), &"default".into())
    );
    assert!(get(daemon.address(" metrics and health "), "/readyz").starts_with("HTTP/1.1 200 "));

    let mut client = TcpStream::connect(daemon.address(" listening ")).expect("connecting");
    client.write_all(b"GET / HTTP/1.1\r\nHost: p.test\r\n\r\n").expect("writing");
    let (relayed, _) = upstream.accept().expect("the relayed connection");
    let mut head = String::new();
    BufReader::new(&relayed).read_line(&mut head).expect("reading");
    assert_eq!(
        head,
        format!(
            "PROXY TCP4 127.0.0.1 127.0.0.1 {} {}\r\n",
            client.local_addr().expect("it").port(),
            client.peer_addr().expect("it").port()
        )
    );

    // A second signal does not wait for the connection that still runs.
    daemon.signal("-TERM");
    daemon.line("draining");
    assert!(get(daemon.address(" metrics and health "), "/readyz").contains("draining"));
    assert!(get(daemon.address(" metrics and health "), "/healthz").starts_with("HTTP/1.1 200 "));
    daemon.signal("-INT");
    assert_eq!(daemon.wait().code(), Some(1));
}

#[test]
fn what_cannot_be_started_says_why() {
    let files = Scratch::new("refused");
    files.write("p.toml", &policy("p"));
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a listener");
    let taken = taken.local_addr().expect("its address").to_string();
    let base = ["run", "--upstream", "127.0.0.1:1", "--policy", "p.toml", "--listen"];
    for (name, args, why) in [
        ("address", vec![&*taken], "cannot listen on"),
        ("admin address", vec!["127.0.0.1:0", "--admin", &taken], "cannot listen on the admin address"),
        ("admin socket", vec!["127.0.0.1:0", "--admin-socket", "none/s.sock"], "its directory must exist"),
        ("log level", vec!["127.0.0.1:0", "--log-level", "=="], "no log level"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_preflightd"))
            .args(base)
            .args(args)
            .current_dir(&files.0)
            .output()
            .expect("preflightd");
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(if name == "log level" { 2 } else { 1 }), "{name}: {text}");
        assert!(text.contains(why), "{name}: {text}");
    }
}

/// The exposition as Prometheus itself judges it. Needs promtool (Debian: prometheus).
#[test]
fn promtool_accepts_the_metrics() {
    let files = Scratch::new("promtool");
    fs::create_dir(files.path("policies")).expect("a directory");
    // A name that needs escaping as a label.
    files.write("policies/a.toml", &policy("a").replace("name = \"a\"", r#"name = 'a"b\c é'"#));
    files.write("config.toml", &config(""));
    let daemon = Daemon::start(&files, &["--config", "config.toml"]);
    let request = "OPTIONS / HTTP/1.1\r\nHost: a.test\r\nOrigin: https://app.example\r\n\
                   Access-Control-Request-Method: PUT\r\nConnection: close\r\n\r\n";
    let stream = TcpStream::connect(daemon.address(" listening ")).expect("connecting");
    assert!(exchange(stream, request).starts_with("HTTP/1.1 403 "));
    let answer = get(daemon.address(" metrics and health "), "/metrics");
    let text = answer.split_once("\r\n\r\n").expect("a body").1;
    assert!(
        text.contains(r#"policy="a\"b\\c é",outcome="denied",reason="method",tier="worker"} 1"#),
        "a label that needs escaping:\n{text}"
    );

    let child = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(e) if std::env::var_os("CI").is_none() => {
            eprintln!("skipped: promtool cannot be run ({e}); Debian's package prometheus has it");
            return;
        }
        Err(e) => panic!("promtool cannot be run ({e}): install Debian's package prometheus"),
    };
    child.stdin.take().expect("its input").write_all(text.as_bytes()).expect("writing to promtool");
    let output = child.wait_with_output().expect("promtool");
    let complaints = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && complaints.is_empty(), "{complaints}\n{text}");
}
