//! The set: namespaces, nginx, the daemon; and that all of it is gone at the end, also on Ctrl-C.
#![forbid(unsafe_code)]

use crate::{Fallible, beside};
use preflightd_tests::{
    Nginx,
    netns::Netns,
    site::{end, free_address, program, signal},
};
use rustix::process::Signal;
use std::{
    env, fs,
    net::SocketAddr,
    path::Path,
    process::{self, Child, Command, ExitCode, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
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
    let (net, place) = Net::build(stage.loopback);
    let addresses = net.addresses();

    let nginx = Nginx::start_with(&[], net.on_node(&program("nginx").unwrap_or_default()), |_| {
        format!(
            "server {{
                listen {} proxy_protocol;
                set_real_ip_from 0.0.0.0/0;
                real_ip_header proxy_protocol;
                location / {{ return 200 \"nginx: $request_method $request_uri for $remote_addr\\n\"; }}
            }}",
            addresses.proxy
        )
    });
    let directory =
        tempfile::TempDir::with_prefix("preflightd-demo-").map_err(|e| format!("making a directory: {e}"))?;
    let mut daemon = Daemon(start_daemon(&net, &daemon_file, &addresses, directory.path())?);

    let this = env::current_exe().map_err(|e| format!("where is this program? {e}"))?;
    let mut show = net.on_client(&this);
    show.arg("show")
        .args(["--place", &place])
        .args(["--prefix", &net.prefix()])
        .args(["--site", &addresses.site.to_string()])
        .args(["--admin", &addresses.admin.to_string()])
        .args(["--daemon-pid", &daemon.0.id().to_string()])
        .args(["--nginx-pid", &nginx.pid().to_string()])
        .args(["--seconds", &stage.seconds.to_string()])
        .arg("--preflightd")
        .arg(&daemon_file)
        .arg("--config")
        .arg(directory.path().join("preflightd.toml"));
    if stage.stay {
        show.arg("--stay");
    }
    let status = interrupted.run(show, &mut daemon.0)?;
    let log = fs::read_to_string(directory.path().join("log")).unwrap_or_default();
    drop((daemon, nginx, net));
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

fn start_daemon(net: &Net, file: &Path, addresses: &Addresses, directory: &Path) -> Fallible<Child> {
    let config = format!(
        "[[listener]]\nname = \"web\"\naddress = \"{}\"\nupstream = \"{}\"\nproxy_protocol = \"v2\"\n\n\
         [admin]\naddress = \"{}\"\n\n{POLICY}",
        addresses.site, addresses.proxy, addresses.admin
    );
    let path = directory.join("preflightd.toml");
    fs::write(&path, config).map_err(|e| format!("writing {}: {e}", path.display()))?;
    let log = fs::File::create(directory.join("log")).map_err(|e| format!("making a log: {e}"))?;
    let second = log.try_clone().map_err(|e| format!("making a log: {e}"))?;
    let mut command = net.on_node(file);
    command.args(["run", "--config"]).arg(path).stdin(Stdio::null()).stdout(log).stderr(second);
    command.spawn().map_err(|e| format!("starting {}: {e}", file.display()))
}

/// Ends the daemon with its scope.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        end(&mut self.0);
    }
}

struct Addresses {
    /// Where preflightd listens.
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
    /// Makes the namespaces if that is possible. Also gives what the viewer is told about it.
    fn build(loopback: bool) -> (Self, String) {
        let here = "client, preflightd and nginx on loopback";
        if loopback {
            return (Self::Loopback, here.to_owned());
        }
        if !rustix::process::geteuid().is_root() {
            return (Self::Loopback, format!("{here} (as root each has a network namespace of its own)"));
        }
        match Self::namespaces() {
            Ok(net) => {
                (net, "client namespace ── veth ── node namespace with preflightd and nginx".to_owned())
            }
            Err(error) => (Self::Loopback, format!("{here} (no namespaces: {error})")),
        }
    }

    fn namespaces() -> Fallible<Self> {
        // Root in a container may not be allowed to: asked by doing it.
        let probe = format!("pf-demo-probe-{}", process::id());
        ip(&["netns", "add", &probe])?;
        ip(&["netns", "delete", &probe])?;
        let (client, node) = (Netns::new("demo-client"), Netns::new("demo-node"));
        client.link("eth0", &["10.77.0.2/24"], &node, "eth0", &["10.77.0.1/24"]);
        Ok(Self::Namespaces { client, node })
    }

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

    fn on_node(&self, program: &Path) -> Command {
        match self {
            Self::Loopback => Command::new(program),
            Self::Namespaces { node, .. } => node.command(program),
        }
    }
}

fn ip(arguments: &[&str]) -> Fallible<()> {
    let line = || format!("ip {}", arguments.join(" "));
    let output = Command::new(program("ip").unwrap_or_else(|| "ip".into()))
        .args(arguments)
        .output()
        .map_err(|e| format!("{}: {e}", line()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("`{}` says: {}", line(), String::from_utf8_lossy(&output.stderr).trim()))
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
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}
