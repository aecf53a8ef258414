//! The set: namespaces, nginx, the daemon; and that all of it is gone at the end, also on Ctrl-C.
#![forbid(unsafe_code)]

use crate::{Fallible, beside, load::BY_NGINX};
use preflightd_tests::{
    Nginx,
    netns::Netns,
    site::{end, free_address, program, signal},
};
use rustix::process::Signal;
use std::{
    env, fs,
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{self, Child, Command, ExitCode, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

#[derive(clap::Args)]
pub(crate) struct Stage {
    /// How long the load runs, in seconds
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
    /// Stay afterwards, to try things by hand, until Ctrl-C
    #[arg(long)]
    stay: bool,
    /// Everything on loopback, though namespaces could be made
    #[arg(long)]
    loopback: bool,
}

/// The policy, as the viewer sees it.
pub(crate) const POLICY: &str = r#"[[policy]]
name = "shop-api"
hosts = ["api.example.com"]
origins = ["https://shop.example.com", "https://*.preview.example.com"]
methods = ["PUT", "DELETE"]
headers = ["content-type", "x-request-id"]
credentials = true
max_age = 7200
"#;

/// Builds the set, lets the client's part run in it, takes it down.
pub(crate) fn run(stage: &Stage) -> Fallible<ExitCode> {
    for name in ["nginx", "curl"] {
        program(name).ok_or_else(|| format!("{name} is not installed: run `cargo xtask setup`"))?;
    }
    let daemon_file = beside("preflightd")?;
    let interrupted = Interrupt::install()?;
    let directory =
        tempfile::TempDir::with_prefix("preflightd-demo-").map_err(|e| format!("making a directory: {e}"))?;
    let (net, no_namespaces) = Net::build(stage.loopback);
    let beside = match no_namespaces {
        Some(why) => Err(why),
        None => Set::beside(&net, &daemon_file, directory.path(), &interrupted),
    };
    let (mut set, place) = match beside {
        Ok(set) => (
            set,
            "client namespace ── veth ── node namespace: nginx on its own port 80, preflightd beside it, steering that \
             port"
                .to_owned(),
        ),
        Err(_) if interrupted.happened() => {
            println!("\nEnded; everything is cleaned up.");
            return Ok(ExitCode::from(130));
        }
        Err(why) => {
            let set = Set::before(&net, &daemon_file, directory.path())?;
            let place = match net {
                Net::Loopback => "client, preflightd and nginx on loopback",
                Net::Namespaces { .. } => "client namespace ── veth ── node namespace",
            };
            (set, format!("{place}: preflightd listens before nginx, and does not steer.\nWhy: {why}"))
        }
    };

    let this = env::current_exe().map_err(|e| format!("where is this program? {e}"))?;
    let mut show = net.on_client(&this);
    show.arg("show")
        .args(["--place", &place])
        .args(["--prefix", &net.prefix()])
        .args(["--site", &set.addresses.site.to_string()])
        .args(["--admin", &set.addresses.admin.to_string()])
        .args(["--daemon-pid", &set.daemon.0.id().to_string()])
        .args(["--nginx-pid", &set.nginx.pid().to_string()])
        .args(["--seconds", &stage.seconds.to_string()])
        .arg("--preflightd")
        .arg(&daemon_file)
        .arg("--config")
        .arg(directory.path().join(CONFIG));
    if let Some(pins) = &set.pins {
        show.arg("--pin-dir").arg(pins.directory());
    }
    if stage.stay {
        show.arg("--stay");
    }
    let status = interrupted.run(show, &mut set.daemon.0)?;
    let log = fs::read_to_string(directory.path().join(LOG)).unwrap_or_default();
    drop((set, net));
    if interrupted.happened() {
        println!("\nEnded; everything is cleaned up.");
        return Ok(if stage.stay { ExitCode::SUCCESS } else { ExitCode::from(130) });
    }
    if !status.success() {
        eprintln!("--- preflightd's log ---\n{log}---");
        return Err(format!("the client's part ended with {status}"));
    }
    Ok(ExitCode::SUCCESS)
}

/// Files of the demo's directory.
const CONFIG: &str = "preflightd.toml";
const LOG: &str = "log";
const SOCKET: &str = "admin.sock";
const BPFFS: &str = "bpf";

/// What runs on the node. Goes in this order: the daemon, then what it left in the kernel, then the proxy.
struct Set {
    daemon: Daemon,
    /// Only where it steers.
    pins: Option<Pins>,
    nginx: Nginx,
    addresses: Addresses,
}

impl Set {
    /// nginx on its own port, and the daemon beside it, which steers already.
    ///
    /// # Errors
    /// Why that cannot be here.
    fn beside(net: &Net, file: &Path, directory: &Path, interrupted: &Interrupt) -> Fallible<Self> {
        let at = |port: u16| SocketAddr::from(([10, 77, 0, 1], port));
        let addresses = Addresses { site: at(80), proxy: at(80), admin: at(9900) };
        let nginx = start_nginx(net, "listen 0.0.0.0:80; listen [::]:80;");
        interrupted.wait("nginx to listen", || {
            net.connects(SocketAddr::from(([127, 0, 0, 1], 80))).then_some(Ok(()))
        })?;
        let pins = Pins::mount(file, directory)?;
        probe(net, file, pins.directory())?;
        let config = format!(
            "[[listener]]\nname = \"web\"\naddress = \"0.0.0.0:80\"\nsteer = true\n\n\
             [steer]\npin_dir = \"{}\"\n\n[admin]\naddress = \"{}\"\nsocket = \"{}\"\n\n{POLICY}",
            pins.directory().display(),
            addresses.admin,
            directory.join(SOCKET).display(),
        );
        let mut daemon = Daemon::start(net, file, directory, &config)?;
        let mut reasons = String::new();
        let steering = interrupted.wait("preflightd to steer", || {
            if let Ok(Some(status)) = daemon.0.try_wait() {
                let log = fs::read_to_string(directory.join(LOG)).unwrap_or_default();
                let last = log.lines().last().unwrap_or_default();
                return Some(Err(format!("preflightd ended with {status}: {last}")));
            }
            let status = status(&directory.join(SOCKET)).ok()?;
            reasons = strings(&status["steer"]["reasons"]).join("; ");
            (status["ready"] == true && status["steer"]["state"] == "steering").then_some(Ok(()))
        });
        steering.map_err(|error| if reasons.is_empty() { error } else { reasons })?;
        Ok(Self { daemon, pins: Some(pins), nginx, addresses })
    }

    /// The daemon on the port, and nginx behind it.
    fn before(net: &Net, file: &Path, directory: &Path) -> Fallible<Self> {
        let addresses = net.addresses();
        let listen = format!(
            "listen {} proxy_protocol;
                set_real_ip_from 0.0.0.0/0;
                real_ip_header proxy_protocol;",
            addresses.proxy
        );
        let nginx = start_nginx(net, &listen);
        let config = format!(
            "[[listener]]\nname = \"web\"\naddress = \"{}\"\nupstream = \"{}\"\nproxy_protocol = \"v2\"\n\n\
             [admin]\naddress = \"{}\"\n\n{POLICY}",
            addresses.site, addresses.proxy, addresses.admin
        );
        let daemon = Daemon::start(net, file, directory, &config)?;
        Ok(Self { daemon, pins: None, nginx, addresses })
    }
}

fn start_nginx(net: &Net, listen: &str) -> Nginx {
    Nginx::start_with(&[], net.on_node(&program("nginx").unwrap_or_default()), |_| {
        format!(
            "server {{
                {listen}
                location / {{
                    if ($request_method = OPTIONS) {{
                        add_header {BY_NGINX} nginx always;
                        return 204;
                    }}
                    return 200 \"nginx: $request_method $request_uri for $remote_addr\\n\";
                }}
            }}"
        )
    })
}

/// Asks `preflightd probe`, and gives its reasons if it says no.
fn probe(net: &Net, file: &Path, pin_dir: &Path) -> Fallible<()> {
    let mut command = net.on_node(file);
    command.args(["probe", "--port", "80", "--format", "json", "--pin-dir"]).arg(pin_dir);
    let output = command.output().map_err(|e| format!("running preflightd probe: {e}"))?;
    let Ok(report) = serde_json::from_slice::<serde_json::Value>(&output.stdout) else {
        return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
    };
    if report["steer"] == true {
        return Ok(());
    }
    let checks = report["checks"].as_array().map(Vec::as_slice).unwrap_or_default();
    let missing = checks.iter().filter(|check| check["status"] == "missing").map(|check| {
        let text = |key: &str| check[key].as_str().unwrap_or_default().to_owned();
        format!("{}: {} ({})", text("name"), text("found"), text("remedy"))
    });
    Err(missing.collect::<Vec<_>>().join("; "))
}

/// What the daemon says of itself on its admin socket.
fn status(socket: &Path) -> io::Result<serde_json::Value> {
    let mut stream = UnixStream::connect(socket)?;
    stream.write_all(b"GET /status HTTP/1.1\r\nHost: demo\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    Ok(serde_json::from_str(body)?)
}

fn strings(value: &serde_json::Value) -> Vec<&str> {
    value.as_array().into_iter().flatten().filter_map(serde_json::Value::as_str).collect()
}

/// A BPF file system of the demo's own for what the daemon pins: nothing is left below `/sys/fs/bpf`.
struct Pins {
    mount: PathBuf,
    preflightd: PathBuf,
}

impl Pins {
    fn mount(preflightd: &Path, directory: &Path) -> Fallible<Self> {
        let mount = directory.join(BPFFS);
        fs::create_dir(&mount).map_err(|e| format!("making {}: {e}", mount.display()))?;
        execute(Command::new("mount").args(["-t", "bpf", "bpf"]).arg(&mount))?;
        Ok(Self { mount, preflightd: preflightd.to_owned() })
    }

    fn directory(&self) -> &Path {
        &self.mount
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        let mut detach = Command::new(&self.preflightd);
        let done = execute(detach.args(["detach", "--pin-dir"]).arg(&self.mount))
            .and_then(|()| execute(Command::new("umount").arg(&self.mount)));
        if let Err(error) = done {
            eprintln!("demo: cannot clean up: {error}");
        }
    }
}

/// Ends the daemon with its scope.
struct Daemon(Child);

impl Daemon {
    fn start(net: &Net, file: &Path, directory: &Path, config: &str) -> Fallible<Self> {
        let path = directory.join(CONFIG);
        fs::write(&path, config).map_err(|e| format!("writing {}: {e}", path.display()))?;
        let log = fs::File::create(directory.join(LOG)).map_err(|e| format!("making a log: {e}"))?;
        let second = log.try_clone().map_err(|e| format!("making a log: {e}"))?;
        let mut command = net.on_node(file);
        command.args(["run", "--config"]).arg(path).stdin(Stdio::null()).stdout(log).stderr(second);
        command.spawn().map(Self).map_err(|e| format!("starting {}: {e}", file.display()))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        end(&mut self.0);
    }
}

struct Addresses {
    /// Where clients connect.
    site: SocketAddr,
    /// Where nginx listens.
    proxy: SocketAddr,
    /// Where the metrics are.
    admin: SocketAddr,
}

/// Two namespaces joined by a veth pair; or loopback.
enum Net {
    Loopback,
    Namespaces { client: Netns, node: Netns },
}

impl Net {
    /// Makes the namespaces if that is possible; else says why not.
    fn build(loopback: bool) -> (Self, Option<String>) {
        let why = if loopback {
            "--loopback was asked for".to_owned()
        } else if !rustix::process::geteuid().is_root() {
            "only root may steer, and make network namespaces to show it in".to_owned()
        } else {
            match Self::namespaces() {
                Ok(net) => return (net, None),
                Err(error) => format!("no network namespaces: {error}"),
            }
        };
        (Self::Loopback, Some(why))
    }

    fn namespaces() -> Fallible<Self> {
        // Root in a container may not be allowed to: asked by doing it.
        let probe = format!("pf-demo-probe-{}", process::id());
        let ip = || Command::new(program("ip").unwrap_or_else(|| "ip".into()));
        execute(ip().args(["netns", "add", &probe]))?;
        execute(ip().args(["netns", "delete", &probe]))?;
        let (client, node) = (Netns::new("demo-client"), Netns::new("demo-node"));
        client.link("eth0", &["10.77.0.2/24"], &node, "eth0", &["10.77.0.1/24"]);
        Ok(Self::Namespaces { client, node })
    }

    /// For a daemon that listens.
    fn addresses(&self) -> Addresses {
        match self {
            Self::Loopback => {
                Addresses { site: free_address(), proxy: free_address(), admin: free_address() }
            }
            Self::Namespaces { .. } => {
                let at = |port: u16| SocketAddr::from(([10, 77, 0, 1], port));
                Addresses { site: at(80), proxy: at(8080), admin: at(9900) }
            }
        }
    }

    fn on_client(&self, program: &Path) -> Command {
        match self {
            Self::Loopback => Command::new(program),
            Self::Namespaces { client, .. } => client.command(program),
        }
    }

    /// What a user puts before a command to run it where the client is.
    fn prefix(&self) -> String {
        match self {
            Self::Loopback => String::new(),
            Self::Namespaces { client, .. } => format!("ip netns exec {} ", client.name()),
        }
    }

    /// Whether somebody listens on the node.
    fn connects(&self, address: SocketAddr) -> bool {
        let connect = || TcpStream::connect(address).is_ok();
        match self {
            Self::Loopback => connect(),
            Self::Namespaces { node, .. } => node.enter(connect),
        }
    }

    fn on_node(&self, program: &Path) -> Command {
        match self {
            Self::Loopback => Command::new(program),
            Self::Namespaces { node, .. } => node.command(program),
        }
    }
}

/// Runs a command to its end; what it says is told only if it fails.
fn execute(command: &mut Command) -> Fallible<()> {
    let output = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{command:?} says: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

/// Ctrl-C, SIGTERM and SIGHUP end the client's part; the set is then taken down in the ordinary way.
struct Interrupt {
    happened: Arc<AtomicBool>,
    child: Arc<Mutex<Option<Child>>>,
}

impl Interrupt {
    fn install() -> Fallible<Self> {
        let this = Self { happened: Arc::default(), child: Arc::default() };
        let (happened, child) = (Arc::clone(&this.happened), Arc::clone(&this.child));
        ctrlc::set_handler(move || {
            happened.store(true, Ordering::Release);
            if let Ok(child) = child.lock()
                && let Some(child) = &*child
            {
                signal(child, Signal::TERM);
            }
        })
        .map_err(|e| format!("watching for Ctrl-C: {e}"))?;
        Ok(this)
    }

    fn happened(&self) -> bool {
        self.happened.load(Ordering::Acquire)
    }

    /// Waits for something that takes a moment: until `probe` has an outcome.
    fn wait(&self, what: &str, mut probe: impl FnMut() -> Option<Fallible<()>>) -> Fallible<()> {
        const PATIENCE: Duration = Duration::from_secs(15);
        let until = Instant::now() + PATIENCE;
        while !self.happened() {
            if let Some(outcome) = probe() {
                return outcome;
            }
            if Instant::now() > until {
                return Err(format!("waited {PATIENCE:?} in vain for {what}"));
            }
            thread::sleep(Duration::from_millis(20));
        }
        Err("interrupted".to_owned())
    }

    /// Runs the client's part to its end, or to the daemon's.
    fn run(&self, mut command: Command, daemon: &mut Child) -> Fallible<process::ExitStatus> {
        let child = command.spawn().map_err(|e| format!("starting {command:?}: {e}"))?;
        *self.child.lock().map_err(|e| e.to_string())? = Some(child);
        loop {
            let mut child = self.child.lock().map_err(|e| e.to_string())?;
            if let Some(child) = child.as_mut() {
                if self.happened() || !matches!(daemon.try_wait(), Ok(None)) {
                    signal(child, Signal::TERM);
                }
                if let Some(status) = child.try_wait().map_err(|e| format!("waiting: {e}"))? {
                    return Ok(status);
                }
            }
            drop(child);
            thread::sleep(Duration::from_millis(20));
        }
    }
}
