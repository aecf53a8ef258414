//! Nodes with a real nginx in network namespaces of their own, bare, with an empty eBPF program or steered, and clients.
//!
//! Everything is gone when its value is dropped, and after Ctrl-C.
#![forbid(unsafe_code)]

use crate::{
    bulk::{self, Direction},
    cpu::Cpus,
    load, mix,
    peers::{self, Server},
    policies::{self, Size},
    storm,
    workload::Request,
};
use aya::programs::{ProgramInfo, SchedClassifier, TcAttachType};
use preflightd::steer::{self, EmptyProgram};
use preflightd_tests::{client, daemon::Metrics, ingress_nginx, netns::Netns};
use std::{
    fmt::{self, Display},
    fs, io,
    net::{Ipv4Addr, SocketAddrV4},
    path::{Path, PathBuf},
    process::{self, Command},
    slice, thread,
    time::{Duration, Instant},
};

/// What is attached to the ingress of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Variant {
    /// No program.
    None,
    /// A program that does nothing: the control.
    Empty,
    /// preflightd steers.
    Steer,
}

impl Variant {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::None, Self::Empty, Self::Steer];
}

impl Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "no program",
            Self::Empty => "an empty program",
            Self::Steer => "preflightd steering",
        })
    }
}

/// How the nodes' nginx is configured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proxy {
    /// By somebody who knows nginx well, without an access log; with files to download and a place to upload to.
    ByHand,
    /// By ingress-nginx, without its Lua phases, with its access log.
    Ingress,
}

/// What a node's nginx and preflightd are configured with.
#[derive(Clone, Debug)]
pub struct Serving {
    nginx: String,
    /// Whether this nginx has files to download and a place to upload to.
    files: bool,
    /// preflightd's policies.
    policies: String,
    /// Lines of preflightd's `[steer]`.
    steer: &'static str,
    /// A preflight that is allowed.
    sample: Request,
}

impl Serving {
    /// One host with five origins, of which nginx says the same as preflightd.
    pub fn small(proxy: Proxy) -> Self {
        let nginx = match proxy {
            Proxy::ByHand => {
                let entry = |origin| format!("        \"{origin}\" $http_origin;");
                peers::fill(include_str!("../peers/nginx-node.conf"), LISTEN, entry, "\n")
                    .replace("@BODY@", &body())
            }
            Proxy::Ingress => node_ingress(&peers::ingress(LISTEN)),
        };
        Self {
            nginx,
            files: proxy == Proxy::ByHand,
            policies: policies::native(Size::SMALL),
            steer: "",
            sample: policies::requests(Size::SMALL, 1).remove(0),
        }
    }

    /// The policies of the [`mix`]. nginx is there for what preflightd leaves to it: it answers every preflight of the mix
    /// rightly, but does not tell the origins of one policy from another's.
    pub fn mixed() -> Self {
        let origins = "(https://o[0-9]+\\-r[0-9]+\\.shop\\-[0-9]+\\.example)|(https://[a-z0-9\\-]+\\.preview\\.example\\.com)";
        let config = peers::ingress_for(
            LISTEN,
            "~^api\\.shop\\-[0-9]+\\.example$",
            "~ ^",
            ingress_nginx::allow_matching(origins),
        );
        Self {
            nginx: node_ingress(&config),
            files: false,
            policies: mix::native(),
            steer: "",
            sample: mix::sample(),
        }
    }

    /// The same, but nginx writes no access log.
    #[must_use]
    pub fn without_access_log(self) -> Self {
        Self { nginx: self.nginx.replace("access_log access.log", "access_log off"), ..self }
    }

    /// The same, but preflightd leaves every preflight to its workers.
    #[must_use]
    pub fn without_kernel_answers(self) -> Self {
        Self { steer: "kernel_answers = false", ..self }
    }
}

/// Where the nodes' proxies listen.
const LISTEN: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 80);
/// The body of nginx's answer to a GET.
pub const BODY: &str = "hello\n";
/// The interface of each node that its clients come in by.
pub const INTERFACE: &str = "eth0";
/// How many addresses the clients have in each node's network: so many that addresses and ports seldom come again while
/// their last connection is in TIME_WAIT.
const CLIENTS: u8 = 128;
const BPFFS: &str = "/sys/fs/bpf";

/// A directory in memory, and a promise that Ctrl-C leaves nothing behind.
#[derive(Debug)]
pub struct Lab {
    /// Which CPU is whose.
    pub cpus: Cpus,
    proxy: Proxy,
    directory: PathBuf,
    pin_dir: PathBuf,
}

impl Lab {
    /// Checks what is needed, and begins.
    ///
    /// # Errors
    /// Not root, no bpffs, only one CPU.
    pub fn open(proxy: Proxy) -> io::Result<Self> {
        if !rustix::process::geteuid().is_root() {
            return Err(io::Error::other("network namespaces and eBPF need root: run this as root"));
        }
        let pid = process::id();
        let lab = Self {
            cpus: Cpus::choose()?,
            proxy,
            directory: PathBuf::from(format!("/dev/shm/preflightd-bench-{pid}")),
            pin_dir: PathBuf::from(format!("{BPFFS}/preflightd-bench-{pid}")),
        };
        if !fs::read_to_string("/proc/mounts")?.lines().any(|line| line.split(' ').nth(1) == Some(BPFFS)) {
            run(Command::new("mount").args(["-t", "bpf", "bpf", BPFFS]))?;
        }
        fs::create_dir_all(&lab.directory)?;
        let (directory, pin_dir) = (lab.directory.clone(), lab.pin_dir.clone());
        // Its children end with it: they were started so.
        ctrlc::set_handler(move || {
            remove(&directory, &pin_dir);
            let mine = format!("-{pid}-");
            for entry in fs::read_dir("/run/netns").into_iter().flatten().flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                if name.starts_with("pf-") && name.contains(&mine) {
                    let _ = Command::new("ip").args(["netns", "delete", &name]).status();
                }
            }
            process::exit(130);
        })
        .map_err(io::Error::other)?;
        Ok(lab)
    }

    /// A namespace for clients. What comes to them is processed on the clients' CPU.
    pub fn clients(&self) -> Netns {
        Netns::new("clients")
    }

    /// A node in network `number`, linked to the clients' namespace, with `bytes` zeros to download, ready.
    ///
    /// # Errors
    /// Something cannot be started, or does not do what it should; its own words are in the message.
    pub fn node(&self, variant: Variant, number: u8, clients: &Netns, bytes: usize) -> io::Result<Node> {
        self.serve(&Serving::small(self.proxy), variant, number, clients, bytes)
    }

    /// The same with servers of another configuration.
    ///
    /// # Errors
    /// As [`Lab::node`].
    pub fn serve(
        &self,
        serving: &Serving,
        variant: Variant,
        number: u8,
        clients: &Netns,
        bytes: usize,
    ) -> io::Result<Node> {
        let netns = Netns::new("node");
        let address = SocketAddrV4::new(Ipv4Addr::new(10, 1, number, 1), LISTEN.port());
        let sources: Vec<_> = (0..CLIENTS).map(|host| Ipv4Addr::new(10, 1, number, 100 + host)).collect();
        let of_clients: Vec<_> = sources.iter().map(|source| format!("{source}/24")).collect();
        let of_clients: Vec<_> = of_clients.iter().map(String::as_str).collect();
        let to_node = format!("node{number}");
        netns.link(INTERFACE, &[&format!("{}/24", address.ip())], clients, &to_node, &of_clients);
        deliver_on(&netns, INTERFACE, Some(self.cpus.server))?;
        deliver_on(clients, &to_node, Some(self.cpus.client))?;
        let stormy = Ipv4Addr::new(10, 3, number, 0);
        for (netns, interface, address) in [
            (&netns, INTERFACE, hardware_address(number, 1)),
            (clients, &to_node, hardware_address(number, 2)),
        ] {
            let address = address.map(|byte| format!("{byte:02x}")).join(":");
            netns.ip(&format!("link set {interface} address {address}"));
        }
        // Packet sockets see it before.
        clients.nft(&format!(
            "table netdev {to_node} {{ chain storm {{ type filter hook ingress device {to_node} priority 0; \
             ip daddr {stormy}/24 drop; }}; }}"
        ));
        netns.ip(&format!("route add {stormy}/24 via {}", sources[0]));

        let directory = self.directory.join(format!("node{number}"));
        let nginx = start_nginx(&netns, &directory, self, (serving, bytes), address, clients)?;
        let access_log = directory.join("access.log");
        let mut node = Node {
            nginx,
            daemon: None,
            empty: None,
            address,
            sources,
            stormy,
            far_end: to_node,
            access_log,
            netns,
        };
        match variant {
            Variant::None => {}
            Variant::Empty => {
                let netns = steer::netns::Netns::open(&node.path()).map_err(io::Error::other)?;
                node.empty = Some(EmptyProgram::attach(&netns, INTERFACE).map_err(io::Error::other)?);
            }
            Variant::Steer => node.daemon = Some(Daemon::start(&node.path(), &directory, self, serving)?),
        }
        clients.enter(|| load::probe(address, slice::from_ref(&serving.sample)))?;
        Ok(node)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        remove(&self.directory, &self.pin_dir);
    }
}

/// The GET that is measured, and every client's preflight: different ones of the policy.
pub fn get() -> Request {
    Request::get(&policies::host(0), &format!("{}/orders", policies::prefix(0)), BODY)
}

/// Takes down what a daemon pinned, and the files.
fn remove(directory: &Path, pin_dir: &Path) {
    if let Err(error) = steer::detach(pin_dir, Duration::ZERO) {
        eprintln!("{error}");
    }
    let _ = fs::remove_dir(pin_dir);
    let _ = fs::remove_dir_all(directory);
}

/// A node: a namespace, its nginx, and what is attached.
#[derive(Debug)]
pub struct Node {
    /// Where nginx listens.
    pub address: SocketAddrV4,
    /// The clients' addresses in this network.
    pub sources: Vec<Ipv4Addr>,
    /// A /24 that is behind the clients' namespace too, and that no kernel knows as its own.
    stormy: Ipv4Addr,
    /// The clients' interface to it.
    far_end: String,
    access_log: PathBuf,
    // In the order in which they go.
    daemon: Option<Daemon>,
    empty: Option<EmptyProgram>,
    nginx: Server,
    /// The namespace.
    pub netns: Netns,
}

impl Node {
    /// Clients that can blow a storm. What comes to the clients from this node is processed on the node's CPU from now on: to
    /// interrupt one virtual CPU from another costs as much as the packet.
    ///
    /// # Errors
    /// The kernel takes no packets from us.
    pub fn storm_clients(&self, clients: &Netns) -> io::Result<storm::Clients> {
        deliver_on(clients, &self.far_end, None)?;
        let number = self.address.ip().octets()[2];
        let addresses = (hardware_address(number, 2), hardware_address(number, 1));
        storm::Clients::new((clients, &self.far_end), addresses, self.stormy, self.address)
    }

    /// The processes that work for it.
    pub fn pids(&self) -> impl Iterator<Item = u32> {
        [Some(self.nginx.pid()), self.daemon.as_ref().map(|daemon| daemon.server.pid())].into_iter().flatten()
    }

    /// nginx.
    pub fn nginx(&self) -> u32 {
        self.nginx.pid()
    }

    /// preflightd, if the node is steered.
    pub fn preflightd(&self) -> Option<u32> {
        self.daemon.as_ref().map(|daemon| daemon.server.pid())
    }

    /// What preflightd counts, once it has counted all that went before. All zero without it.
    ///
    /// # Errors
    /// It does not answer.
    pub fn metrics(&self) -> io::Result<Metrics> {
        let Some(daemon) = &self.daemon else { return Ok(Metrics::parse("")) };
        // The maps are read several times a second.
        thread::sleep(Duration::from_secs(1));
        daemon.metrics()
    }

    /// Empties nginx's access log, which is in memory.
    ///
    /// # Errors
    /// It cannot be written to.
    pub fn empty_access_log(&self) -> io::Result<()> {
        // nginx appends.
        fs::File::create(&self.access_log).map(drop)
    }

    /// What the kernel tells of the program on [`INTERFACE`]; `None`: there is none.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn program(&self) -> io::Result<Option<ProgramInfo>> {
        let query = || SchedClassifier::query_tcx(INTERFACE, TcAttachType::Ingress);
        let (_, programs) = self.netns.enter(query).map_err(io::Error::other)?;
        Ok(programs.into_iter().next())
    }

    /// Links the node to another namespace, which all that is not the clients' goes to from now on, and waits until
    /// preflightd, if it is there, steers what comes from there.
    ///
    /// # Errors
    /// preflightd does not.
    pub fn link_world(&self, world: &Netns, number: u8, cpus: Cpus) -> io::Result<()> {
        const INTERFACE: &str = "world";
        let to_node = format!("node{number}");
        let theirs = format!("10.2.{number}.2");
        self.netns.link(
            INTERFACE,
            &[&format!("10.2.{number}.1/24")],
            world,
            &to_node,
            &[&format!("{theirs}/24")],
        );
        self.netns.ip(&format!("route add default via {theirs}"));
        // As on a node of Kubernetes. With routes by several interfaces, preflightd asks the kernel for the way back, which it
        // tells only where packets are forwarded.
        self.netns.enter(|| fs::write("/proc/sys/net/ipv4/ip_forward", "1"))?;
        world.ip(&format!("route add {}/32 via 10.2.{number}.1", self.address.ip()));
        deliver_on(&self.netns, INTERFACE, Some(cpus.server))?;
        deliver_on(world, &to_node, Some(cpus.client))?;
        let Some(daemon) = &self.daemon else { return Ok(()) };
        let deadline = Instant::now() + Duration::from_secs(10);
        while daemon.metrics()?.sum("preflightd_steer_interface", &[("interface", INTERFACE)]) < 1.0 {
            if Instant::now() > deadline {
                return Err(io::Error::other("preflightd does not attach to an interface that has come up"));
            }
            thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    fn path(&self) -> String {
        format!("/run/netns/{}", self.netns.name())
    }
}

/// preflightd beside the nginx of a node.
#[derive(Debug)]
struct Daemon {
    server: Server,
    admin: SocketAddrV4,
}

impl Daemon {
    fn start(netns: &str, directory: &Path, lab: &Lab, serving: &Serving) -> io::Result<Self> {
        let admin = peers::free_address()?;
        let config = include_str!("../peers/preflightd-steer.toml")
            .replace("@NETNS@", netns)
            .replace("@PIN_DIR@", &lab.pin_dir.to_string_lossy())
            .replace("@STEER@", serving.steer)
            .replace("@ADMIN@", &admin.to_string());
        // A directory of its own: it is watched.
        let directory = directory.join("preflightd");
        fs::create_dir_all(&directory)?;
        let file = peers::write(&directory, "preflightd.toml", &(config + &serving.policies))?;
        let mut command = Command::new(peers::bin_dir()?.join("preflightd"));
        command.args(["run", "--config"]).arg(file);
        let server = Server::spawn(command, admin, &directory, lab.cpus)?;
        let mut daemon = Self { server, admin };
        daemon.server.wait(&directory, || {
            let ready = client::fetch(admin.into(), "/readyz")?;
            if ready.status == 200 { Ok(()) } else { Err(io::Error::other("it is not ready")) }
        })?;
        let steering = daemon.metrics()?.sum("preflightd_steer_state", &[("state", "steering")]);
        if steering < 1.0 {
            let log = fs::read_to_string(directory.join("log"))?;
            return Err(io::Error::other(format!("preflightd does not steer: {}", log.trim())));
        }
        Ok(daemon)
    }

    fn metrics(&self) -> io::Result<Metrics> {
        let response = client::fetch(self.admin.into(), "/metrics")?;
        Ok(Metrics::parse(&String::from_utf8_lossy(&response.body)))
    }
}

fn start_nginx(
    netns: &Netns,
    directory: &Path,
    lab: &Lab,
    (serving, bytes): (&Serving, usize),
    address: SocketAddrV4,
    clients: &Netns,
) -> io::Result<Server> {
    let files = directory.join("files");
    fs::create_dir_all(&files)?;
    fs::File::create(files.join(bytes.to_string()))?.set_len(bytes as u64)?;
    // Its own user could not read the files.
    let config = format!("user root;\n{}", serving.nginx);
    let nginx = peers::nginx(directory, &config)?;
    let mut command = netns.command(nginx.get_program());
    command.args(nginx.get_args());
    let mut server = Server::spawn(command, address, directory, lab.cpus)?;
    let get = [get()];
    server.wait(directory, || {
        clients.enter(|| {
            load::probe(address, &get)?;
            if serving.files {
                bulk::transfer(address, Direction::Down, bytes)?;
                bulk::transfer(address, Direction::Up, bytes)?;
            }
            Ok(())
        })
    })?;
    Ok(server)
}

/// ingress-nginx's configuration with its access log and a body for GETs, of which the measurement of answers alone needs neither.
fn node_ingress(config: &str) -> String {
    config
        .replace("access_log off", "access_log access.log")
        .replace("return 503", &format!("return 200 \"{}\"", body()))
}

/// [`BODY`] as nginx's configuration has it.
fn body() -> String {
    BODY.replace('\n', "\\n")
}

/// Of an interface in network `number`, locally administered.
fn hardware_address(number: u8, host: u8) -> [u8; 6] {
    [2, 0, 0, 1, number, host]
}

/// Has the kernel process what comes in by an interface on one CPU, as a network card would that interrupts it (receive
/// packet steering, kernel: Documentation/networking/scaling.rst); `None`: on the sender's.
fn deliver_on(netns: &Netns, interface: &str, cpu: Option<usize>) -> io::Result<()> {
    let file = format!("/sys/class/net/{interface}/queues/rx-0/rps_cpus");
    // Words of 32 CPUs, the highest first.
    let mask = cpu.map(|cpu| format!("{:x}{}", 1_u32 << (cpu % 32), ",00000000".repeat(cpu / 32)));
    let mask = mask.unwrap_or_else(|| "0".into());
    // Unlike `Netns::command`, this sees the namespace's own /sys.
    run(Command::new("ip").args([
        "netns",
        "exec",
        netns.name(),
        "sh",
        "-c",
        &format!("echo {mask} > {file}"),
    ]))
}

fn run(command: &mut Command) -> io::Result<()> {
    let status = command.status()?;
    if status.success() { Ok(()) } else { Err(io::Error::other(format!("{command:?}: {status}"))) }
}
