//! The servers that are measured: preflightd, a floor below which no server gets, and real proxies configured alike.
//!
//! All of them run with one thread on the same CPU, without an access log, and give the same answer to the same preflight.

use crate::{
    bulk::{self, Direction},
    cpu::{self, Cpus},
    load,
    policies::{self, HEADERS, MAX_AGE, METHODS, Size},
    process,
    workload::Request,
};
use preflightd_tests::{
    envoy::{self, VirtualHost},
    ingress_nginx,
};
use serde_json::json;
use std::{
    env, fmt, fs, io,
    net::{Ipv4Addr, SocketAddrV4, TcpListener},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// A kind of server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Peer {
    /// preflightd with the same policy as the others.
    Preflightd,
    /// preflightd with 1,000 hosts × 10 routes × 50 origins.
    PreflightdLarge,
    /// io_uring and httparse, one fixed answer, no policy.
    Floor,
    /// nginx as ingress-nginx 1.x configures it for an Ingress with CORS annotations, without its Lua phases (a lower bound).
    NginxIngress,
    /// nginx as an expert would write it by hand: `map` and `return 204`.
    NginxTuned,
    /// haproxy in HTTP mode: `http-request return`.
    Haproxy,
    /// Envoy with its CORS filter.
    Envoy,
}

impl Peer {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Preflightd,
        Self::PreflightdLarge,
        Self::Floor,
        Self::NginxIngress,
        Self::NginxTuned,
        Self::Haproxy,
        Self::Envoy,
    ];

    /// The table that preflightd has; the others have the small one.
    pub fn size(self) -> Size {
        if self == Self::PreflightdLarge { Size::LARGE } else { Size::SMALL }
    }

    /// Whether it leaves connections open for a while after `Connection: close`, so that the client must close first.
    pub fn closes_late(self) -> bool {
        self == Self::Envoy
    }

    /// A word for files and the command line.
    pub fn file_name(self) -> &'static str {
        match self {
            Self::Preflightd => "preflightd",
            Self::PreflightdLarge => "preflightd-large",
            Self::Floor => "floor",
            Self::NginxIngress => "nginx-ingress",
            Self::NginxTuned => "nginx-tuned",
            Self::Haproxy => "haproxy",
            Self::Envoy => "envoy",
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Preflightd => "preflightd",
            Self::PreflightdLarge => "preflightd, 500,000 origins",
            Self::Floor => "io_uring floor, no policy",
            Self::NginxIngress => "nginx as ingress-nginx",
            Self::NginxTuned => "nginx, hand-tuned",
            Self::Haproxy => "haproxy",
            Self::Envoy => "Envoy",
        })
    }
}

/// What a bulk transfer goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Relay {
    /// Nothing: how fast client and origin are by themselves.
    None,
    /// preflightd, one worker and one relay thread.
    Preflightd,
    /// haproxy in TCP mode, one thread.
    Haproxy,
}

impl Relay {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::None, Self::Preflightd, Self::Haproxy];
}

impl fmt::Display for Relay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none, for comparison",
            Self::Preflightd => "preflightd",
            Self::Haproxy => "haproxy, TCP mode",
        })
    }
}

/// A running server; ended when dropped.
#[derive(Debug)]
pub struct Server {
    /// Where it listens.
    pub address: SocketAddrV4,
    child: Child,
}

impl Server {
    /// Starts `peer` on the servers' CPU with its files in `dir`, and waits until it answers `requests` rightly.
    ///
    /// # Errors
    /// It is not installed, or does not answer within half a minute; its own words are in the message.
    pub fn start(peer: Peer, dir: &Path, cpus: Cpus, requests: &[Request]) -> io::Result<Self> {
        let dir = dir.join(peer.file_name());
        fs::create_dir_all(&dir)?;
        let address = free_address()?;
        let command = command(peer, &dir, address)?;
        let mut server = Self::spawn(command, address, &dir, cpus)?;
        server.wait(&dir, || load::probe(address, requests))?;
        Ok(server)
    }

    /// Starts `relay` on the servers' CPU, in front of a [`bulk`] server, and waits until it passes bytes on both ways.
    ///
    /// # Errors
    /// As [`Server::start`].
    pub fn relay(relay: Relay, dir: &Path, cpus: Cpus, origin: SocketAddrV4) -> io::Result<Self> {
        let dir = dir.join(format!("{relay:?}").to_lowercase());
        fs::create_dir_all(&dir)?;
        let address = free_address()?;
        let command = match relay {
            Relay::None => return Err(io::Error::other("there is nothing to start")),
            Relay::Preflightd => preflightd(&dir, address, origin, Size::SMALL)?,
            Relay::Haproxy => haproxy_relays(&dir, address, origin)?,
        };
        let mut server = Self::spawn(command, address, &dir, cpus)?;
        server.wait(&dir, || {
            bulk::transfer(address, Direction::Up, 100_000)?;
            bulk::transfer(address, Direction::Down, 100_000).map(|_| ())
        })?;
        Ok(server)
    }

    /// Starts `command` on the servers' CPU, with what it prints in `dir`. The kernel ends it with this thread.
    pub(crate) fn spawn(
        mut command: Command,
        address: SocketAddrV4,
        dir: &Path,
        cpus: Cpus,
    ) -> io::Result<Self> {
        let log = fs::File::create(dir.join("log"))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        // SAFETY: between fork and exec the closure makes one system call and touches no memory of this process.
        unsafe {
            command.pre_exec(|| {
                rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
                Ok(())
            });
        }
        // A child inherits its parent's CPU.
        cpu::pin(cpus.server)?;
        let child = command.spawn();
        cpu::pin(cpus.client)?;
        let program = command.get_program().to_string_lossy().into_owned();
        let child = child.map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("starting {program}: {error}; `cargo xtask setup` installs it"),
            )
        })?;
        Ok(Self { address, child })
    }

    /// Tries `ready` until it succeeds, the server ends, or half a minute is over.
    pub(crate) fn wait(&mut self, dir: &Path, mut ready: impl FnMut() -> io::Result<()>) -> io::Result<()> {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let error = match ready() {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            let ended = self.child.try_wait()?;
            if ended.is_some() || Instant::now() > deadline {
                let log = fs::read_to_string(dir.join("log"))?;
                let state = ended.map_or("runs".into(), |status| format!("ended ({status})"));
                let name = dir.file_name().unwrap_or_default().to_string_lossy();
                return Err(io::Error::other(format!(
                    "waiting for {name}: it {state}; {error}; it says: {}",
                    log.trim()
                )));
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its resident memory in bytes.
    pub fn resident(&self) -> io::Result<u64> {
        process::resident(self.pid())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It keeps nothing that a kill could harm; one that has ended already is what we want.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A directory for the files of one run of a benchmark, empty.
pub fn scratch(name: &str) -> io::Result<PathBuf> {
    let dir = bin_dir()?.join("bench-run").join(name);
    match fs::remove_dir_all(&dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => fs::create_dir_all(&dir)?,
    }
    Ok(dir)
}

/// An address on loopback that nobody listens on.
pub fn free_address() -> io::Result<SocketAddrV4> {
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
    Ok(SocketAddrV4::new(Ipv4Addr::LOCALHOST, port))
}

/// Where cargo has put this program and its neighbours.
pub(crate) fn bin_dir() -> io::Result<PathBuf> {
    let exe = env::current_exe()?;
    Ok(exe.parent().map(Path::to_path_buf).unwrap_or_default())
}

/// Where nobody listens: the discard port.
const NOBODY: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 9);

/// preflightd with one listener, one worker and one relay thread.
fn preflightd(dir: &Path, address: SocketAddrV4, upstream: SocketAddrV4, size: Size) -> io::Result<Command> {
    let config = include_str!("../peers/preflightd.toml")
        .replace("@ADDRESS@", &address.to_string())
        .replace("@UPSTREAM@", &upstream.to_string());
    let mut command = Command::new(bin_dir()?.join("preflightd"));
    command.args(["run", "--config"]);
    command.arg(write(dir, "preflightd.toml", &(config + &policies::native(size)))?);
    Ok(command)
}

fn command(peer: Peer, dir: &Path, address: SocketAddrV4) -> io::Result<Command> {
    match peer {
        Peer::Preflightd | Peer::PreflightdLarge => preflightd(dir, address, NOBODY, peer.size()),
        Peer::Floor => {
            let mut command = Command::new(bin_dir()?.join("bench-floor"));
            command.arg(address.to_string()).arg(policies::origin(0, 0, 0));
            Ok(command)
        }
        Peer::NginxIngress => nginx(dir, &ingress(address)),
        Peer::NginxTuned => {
            let entry = |origin| format!("        \"{origin}\" $http_origin;");
            nginx(dir, &fill(include_str!("../peers/nginx-tuned.conf"), address, entry, "\n"))
        }
        Peer::Haproxy => {
            let config = fill(include_str!("../peers/haproxy-http.cfg"), address, |origin| origin, " ");
            haproxy(dir, &config)
        }
        Peer::Envoy => {
            let binary = envoy::binary().ok_or_else(|| {
                let what =
                    "looking for Envoy in .tools/envoy: it is not there; `cargo xtask setup` installs it";
                io::Error::new(io::ErrorKind::NotFound, what)
            })?;
            let config = envoy::config(address.into(), &[envoy_host()], NOBODY.into()).to_string();
            Ok(envoy::command(&binary, &write(dir, "envoy.json", &config)?))
        }
    }
}

/// The policy that all servers share, in Envoy's words.
fn envoy_host() -> VirtualHost {
    let origins = (0..Size::SMALL.origins).map(|number| json!({"exact": policies::origin(0, 0, number)}));
    let cors = json!({
        "allow_origin_string_match": origins.collect::<Vec<_>>(),
        "allow_methods": METHODS.join(", "),
        "allow_headers": HEADERS.join(", "),
        "max_age": MAX_AGE.to_string(),
        "allow_credentials": true,
    });
    VirtualHost { host: policies::host(0), cors: None, routes: vec![(policies::prefix(0), Some(cors))] }
}

fn haproxy_relays(dir: &Path, address: SocketAddrV4, upstream: SocketAddrV4) -> io::Result<Command> {
    let config = include_str!("../peers/haproxy-tcp.cfg")
        .replace("@ADDRESS@", &address.to_string())
        .replace("@UPSTREAM@", &upstream.to_string());
    haproxy(dir, &config)
}

/// Fills in the policy that all servers share; each origin is put down as `origin` says.
pub(crate) fn fill(
    template: &str,
    address: SocketAddrV4,
    origin: impl Fn(String) -> String,
    between: &str,
) -> String {
    let origins: Vec<_> =
        (0..Size::SMALL.origins).map(|number| origin(policies::origin(0, 0, number))).collect();
    fill_for(template, address, &policies::host(0), &policies::prefix(0), &origins.join(between))
}

/// The same for others than the shared host, path prefix and origins.
fn fill_for(template: &str, address: SocketAddrV4, host: &str, prefix: &str, origins: &str) -> String {
    [
        ("@ADDRESS@", address.to_string()),
        ("@IP@", address.ip().to_string()),
        ("@PORT@", address.port().to_string()),
        ("@HOST@", host.to_owned()),
        ("@PREFIX@", prefix.to_owned()),
        ("@ORIGINS@", origins.to_owned()),
        ("@METHODS@", METHODS.join(", ")),
        ("@HEADERS@", HEADERS.join(", ")),
        ("@MAX_AGE@", MAX_AGE.to_string()),
    ]
    .into_iter()
    .fold(template.to_owned(), |text, (name, value)| text.replace(name, &value))
}

pub(crate) fn nginx(dir: &Path, config: &str) -> io::Result<Command> {
    let mut command = Command::new("nginx");
    command.arg("-p").arg(dir).arg("-e").arg("stderr").arg("-c").arg(write(dir, "nginx.conf", config)?);
    Ok(command)
}

/// The configuration that ingress-nginx writes, for a server at `address`.
pub(crate) fn ingress(address: SocketAddrV4) -> String {
    let origins: Vec<_> = (0..Size::SMALL.origins).map(|number| policies::origin(0, 0, number)).collect();
    ingress_for(address, &policies::host(0), &policies::prefix(0), ingress_nginx::allow(&origins))
}

/// The same for other hosts, path prefixes and origins; the latter as the directives that allow them.
pub(crate) fn ingress_for(address: SocketAddrV4, host: &str, prefix: &str, allow: String) -> String {
    let cors = ingress_nginx::Cors {
        allow,
        methods: METHODS.join(", "),
        headers: HEADERS.join(", "),
        credentials: true,
        expose: String::new(),
        max_age: MAX_AGE.into(),
    };
    let template = include_str!("../peers/nginx-ingress.conf")
        .replace("@LOAD_MODULE@", &ingress_nginx::load_module())
        .replace("@CORS@", &cors.directives());
    fill_for(&template, address, host, prefix, "")
}

fn haproxy(dir: &Path, config: &str) -> io::Result<Command> {
    let mut command = Command::new("haproxy");
    // -db: no daemon, no master.
    command.arg("-db").arg("-f").arg(write(dir, "haproxy.cfg", config)?);
    Ok(command)
}

pub(crate) fn write(dir: &Path, name: &str, text: &str) -> io::Result<PathBuf> {
    let path = dir.join(name);
    fs::write(&path, text)?;
    Ok(path)
}
