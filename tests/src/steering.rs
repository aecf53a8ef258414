//! The steering lab: clients and a node in network namespaces, a real proxy on port 80 of the node for both IP versions,
//! and the daemon that steers it.
//!
//! With `PREFLIGHTD_LAB=plain` in the environment there is no daemon, and every preflight is expected from the proxy: the
//! yardstick that the rows of the tests are themselves held against.

mod place;
mod proxy;
mod steerer;

use std::{
    env, fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU32, Ordering},
    thread,
};

use serde_json::Value;
use socket2::Protocol;

use self::{
    place::{Addresses, addresses, link, listen, mount_bpffs},
    proxy::{BACKEND, Running},
    steerer::{ADMIN_SOCKET, inside},
};
pub use self::{
    proxy::{BIG, Proxy, big},
    steerer::Steerer,
};
use crate::{
    Behaviour, Client, Nginx, Response, Upstream,
    client::{get, preflight},
    daemon::{Metrics, ORIGIN, POLICY, preflightd},
    link::{Link, Trouble},
    netns::{Netns, have_root},
    site::{have, wait_until},
    wire::Wire,
};

/// What a lab is to consist of.
#[derive(Clone, Debug)]
pub struct Options {
    /// Hosts that clients run on, each with a link to the node.
    pub clients: usize,
    /// The proxy on port 80.
    pub proxy: Proxy,
    /// Whether the daemon runs at all.
    pub daemon: bool,
    /// The kernel answers what it can: not unless a test is about it, for most want to see workers.
    pub kernel_answers: bool,
    /// Further lines of `[steer]`.
    pub steer: String,
    /// The policies.
    pub policies: String,
    /// Further lines at the top level of the daemon's file, and tables.
    pub toml: String,
    /// Further directives of nginx's server block.
    pub nginx: String,
    /// MTU of all links.
    pub mtu: u32,
    /// What goes wrong on them.
    pub trouble: Option<Trouble>,
    /// The daemon runs in a network namespace of its own, and is told where the node's is.
    pub outside: bool,
    /// Kernel parameters of the node, set before anything starts there.
    pub sysctls: &'static [(&'static str, &'static str)],
}

impl Default for Options {
    fn default() -> Self {
        Self {
            clients: 1,
            proxy: Proxy::Nginx { workers: 1, reuseport: false },
            daemon: true,
            kernel_answers: false,
            steer: String::new(),
            policies: POLICY.to_owned(),
            toml: String::new(),
            nginx: String::new(),
            mtu: 1500,
            trouble: None,
            outside: false,
            sysctls: &[],
        }
    }
}

/// A running lab; dropping it removes everything.
#[derive(Debug)]
pub struct Lab {
    daemon: Option<Steerer>,
    proxy: Running,
    /// Serves `/echo`.
    _backend: Upstream,
    /// Those with trouble.
    links: Vec<Link>,
    clients: Vec<Netns>,
    /// Where the daemon runs, if not on the node.
    outside: Option<Netns>,
    node: Netns,
    pin_dir: PathBuf,
    options: Options,
}

/// The `Host` of every request.
pub const HOST: &str = "api.test";

/// Where the node's admin interface is, within its namespace.
const ADMIN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9000);
impl Lab {
    /// A lab with nginx and the daemon.
    pub fn new() -> Self {
        Self::with(Options::default())
    }

    /// A lab of these parts; the proxy listens, the daemon is ready.
    ///
    /// # Panics
    /// If any of them cannot be started.
    pub fn with(options: Options) -> Self {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let node = Netns::new("node");
        for (key, value) in options.sysctls {
            node.sysctl(key, value);
        }
        let clients: Vec<_> = (0..options.clients).map(|_| Netns::new("client")).collect();
        let links = clients
            .iter()
            .enumerate()
            .filter_map(|(i, client)| link(&node, client, i, options.mtu, options.trouble))
            .collect();
        let outside = options.outside.then(|| Netns::new("host"));
        let backend = Upstream::on(listen(&node, BACKEND, Protocol::TCP), Behaviour::echo_body());
        let pin_dir = PathBuf::from(format!(
            "/sys/fs/bpf/pf-test-{}-{}",
            process::id(),
            COUNTER.fetch_add(1, Ordering::Relaxed)
        ));
        let mut lab = Self {
            daemon: None,
            proxy: Running::None,
            _backend: backend,
            links,
            clients,
            outside,
            node,
            pin_dir,
            options,
        };
        lab.start_proxy();
        if lab.options.daemon && !plain() {
            mount_bpffs();
            lab.start_daemon();
        }
        lab
    }

    /// Whether the daemon is there to answer. If not, all is the proxy's.
    pub fn is_steered(&self) -> bool {
        self.daemon.is_some()
    }

    /// The served addresses as the first client calls them: IPv4 and IPv6.
    pub fn sites(&self) -> [SocketAddr; 2] {
        self.sites_of(0)
    }

    /// The served addresses as client `i` calls them.
    pub fn sites_of(&self, i: usize) -> [SocketAddr; 2] {
        let Addresses { node, .. } = addresses(i);
        node.map(|address| SocketAddr::new(address, 80))
    }

    /// The node's namespace; its interface towards client `i` is `n0`, `n1`...
    pub fn node(&self) -> &Netns {
        &self.node
    }

    /// The namespace that the daemon runs in.
    pub fn home(&self) -> &Netns {
        self.outside.as_ref().unwrap_or(&self.node)
    }

    /// Adds a client, on a new interface of the node.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn add_client(&mut self) {
        let client = Netns::new("client");
        let link = link(&self.node, &client, self.clients.len(), self.options.mtu, self.options.trouble);
        self.links.extend(link);
        self.clients.push(client);
    }

    /// The namespace of client `i`; its interface is `c0`, `c1`...
    pub fn client(&self, i: usize) -> &Netns {
        &self.clients[i]
    }

    /// The bad links, in the order of the clients.
    pub fn links(&self) -> &[Link] {
        &self.links
    }

    /// The address of client `i` that belongs to the site's IP version.
    pub fn client_address(&self, i: usize, site: SocketAddr) -> IpAddr {
        addresses(i).client[usize::from(site.is_ipv6())]
    }

    /// A connection from the first client.
    ///
    /// # Panics
    /// If it is refused.
    pub fn connect(&self, site: SocketAddr) -> Client {
        self.try_connect(site).unwrap_or_else(|e| panic!("connecting to {site}: {e}"))
    }

    /// A connection from the first client, or why there is none.
    pub fn try_connect(&self, site: SocketAddr) -> io::Result<Client> {
        self.clients[0].enter(|| Client::try_connect(site))
    }

    /// One request on a connection of its own.
    ///
    /// # Panics
    /// If there is no sound response.
    pub fn exchange(&self, site: SocketAddr, request: impl AsRef<[u8]>) -> Response {
        self.connect(site).exchange(request)
    }

    /// [`allowed_preflight`] on a connection of its own.
    ///
    /// # Panics
    /// As [`Lab::exchange`].
    pub fn preflight(&self, site: SocketAddr) -> Response {
        self.exchange(site, allowed_preflight("/x"))
    }

    /// A GET on a connection of its own, which the proxy must answer.
    ///
    /// # Panics
    /// If it does not.
    pub fn get(&self, site: SocketAddr, path: &str) {
        let mut client = self.connect(site);
        check_get(&client.exchange(get(HOST, path)), path);
    }

    /// The client that speaks TCP by itself, on the link of the first client.
    pub fn wire(&self, site: SocketAddr) -> Wire {
        let Addresses { wire, macs, .. } = addresses(0);
        Wire::open(&self.clients[0], "c0", macs, wire[usize::from(site.is_ipv6())], site)
    }

    /// As [`Lab::wire`], for sending only.
    pub fn deaf_wire(&self, site: SocketAddr) -> Wire {
        let Addresses { wire, macs, .. } = addresses(0);
        Wire::open_deaf(&self.clients[0], "c0", macs, wire[usize::from(site.is_ipv6())], site)
    }

    /// Checks that a worker answered, or in a lab without the daemon the proxy.
    ///
    /// # Panics
    /// It was someone else, or the answer is not as it must be.
    #[track_caller]
    pub fn expect_worker(&self, response: &Response, case: impl std::fmt::Display) {
        if !self.is_steered() {
            expect_proxy(response, case);
            return;
        }
        assert_eq!(response.status, 204, "{case}: a worker's answer: {response:?}");
        assert_eq!(response.header("x-from"), None, "{case}: the proxy answered");
        assert_eq!(response.header("access-control-allow-origin"), Some(ORIGIN), "{case}: {response:?}");
        let connection = response.header("connection").map(str::to_ascii_lowercase);
        assert_eq!(connection.as_deref(), Some("close"), "{case}: {response:?}");
    }

    /// Checks that the kernel answered, or in a lab without the daemon the proxy.
    ///
    /// # Panics
    /// It was someone else, or the answer is not as it must be.
    #[track_caller]
    pub fn expect_kernel(&self, response: &Response, case: impl std::fmt::Display) {
        if !self.is_steered() {
            expect_proxy(response, case);
            return;
        }
        assert_eq!(response.status, 204, "{case}: the kernel's answer: {response:?}");
        assert_eq!(response.header("x-from"), None, "{case}: the proxy answered");
        assert_eq!(response.header("access-control-allow-origin"), Some(ORIGIN), "{case}: {response:?}");
        assert_eq!(response.header("connection"), None, "{case}: a worker answered: {response:?}");
    }

    /// Waits until the kernel answers at every site; in a lab without the daemon, not at all.
    ///
    /// # Panics
    /// It does not.
    pub fn wait_kernel(&self) {
        for site in self.sites().into_iter().filter(|_| self.is_steered()) {
            wait_until(format_args!("the kernel to answer at {site}"), || {
                let response = self.preflight(site);
                response.header("x-from").is_none() && response.header("connection").is_none()
            });
        }
    }

    /// Who answers a preflight now: a worker, or the proxy. `None`: nobody.
    ///
    /// # Panics
    /// The answer is neither's.
    pub fn answered_by_worker(&self, site: SocketAddr) -> Option<bool> {
        let mut client = self.try_connect(site).ok()?;
        client.try_send(allowed_preflight("/x")).ok()?;
        let response = client.try_response().ok()?;
        expect_either(self, &response, site);
        Some(response.header("x-from").is_none())
    }

    /// Waits until workers answer at every site; in a lab without the daemon, not at all.
    ///
    /// # Panics
    /// They do not.
    pub fn wait_steered(&self) {
        for site in self.sites().into_iter().filter(|_| self.is_steered()) {
            wait_until(format_args!("a worker to answer at {site}"), || {
                self.answered_by_worker(site) == Some(true)
            });
        }
    }

    /// Waits until the proxy answers preflights at every site.
    ///
    /// # Panics
    /// It does not.
    pub fn wait_proxied(&self) {
        for site in self.sites() {
            wait_until(format_args!("the proxy to answer at {site}"), || {
                self.answered_by_worker(site) == Some(false)
            });
        }
    }

    /// The daemon.
    ///
    /// # Panics
    /// In a lab without it.
    pub fn daemon(&mut self) -> &mut Steerer {
        self.daemon.as_mut().expect("the daemon runs in this lab")
    }

    /// Starts the daemon and waits until it steers.
    ///
    /// # Panics
    /// It does not.
    pub fn start_daemon(&mut self) {
        let mut daemon = self.another_daemon(ADMIN);
        daemon.wait_ready(self.home());
        self.daemon = Some(daemon);
    }

    /// Starts one more daemon with the same configuration, but for its admin interface. It may not be ready yet.
    ///
    /// # Panics
    /// It cannot be started.
    pub fn another_daemon(&self, admin: SocketAddr) -> Steerer {
        self.another_daemon_with(admin, &self.toml(admin))
    }

    /// Starts one more daemon with this configuration, whose admin interface is at `admin`.
    ///
    /// # Panics
    /// It cannot be started.
    pub fn another_daemon_with(&self, admin: SocketAddr, text: &str) -> Steerer {
        Steerer::start(self.home(), admin, text)
    }

    /// From now on this is the lab's daemon; gives the one that was.
    pub fn replace_daemon(&mut self, daemon: Steerer) -> Option<Steerer> {
        self.daemon.replace(daemon)
    }

    /// The daemon's configuration with the admin interface at `admin`.
    pub fn toml(&self, admin: SocketAddr) -> String {
        self.toml_with(admin, &self.options.policies)
    }

    /// The node's addresses of a family, as TOML has a list of them.
    fn own_addresses(&self, v6: bool) -> String {
        let sites = (0..self.options.clients).flat_map(|client| self.sites_of(client));
        let own: Vec<_> =
            sites.filter(|site| site.is_ipv6() == v6).map(|site| site.ip().to_string()).collect();
        format!("{own:?}")
    }

    /// The same with other policies.
    pub fn toml_with(&self, admin: SocketAddr, policies: &str) -> String {
        let netns = match self.outside {
            Some(_) => format!("netns = \"/run/netns/{}\"\n", self.node.name()),
            None => String::new(),
        };
        format!(
            "{toml}\n\
             [steer]\npin_dir = \"{pin_dir}\"\nkernel_answers = {kernel_answers}\n{netns}{steer}\n\n\
             [[listener]]\nname = \"web4\"\naddress = \"0.0.0.0:80\"\naddresses = {v4}\nsteer = true\n\n\
             [[listener]]\nname = \"web6\"\naddress = \"[::]:80\"\naddresses = {v6}\nsteer = true\n\n\
             [workers]\ncount = 2\npin = false\n\n\
             [admin]\naddress = \"{admin}\"\nsocket = \"{ADMIN_SOCKET}\"\n\n{policies}\n",
            // The browser's pages are called by these.
            v4 = self.own_addresses(false),
            v6 = self.own_addresses(true),
            toml = self.options.toml,
            pin_dir = self.pin_dir.display(),
            steer = self.options.steer,
            kernel_answers = self.options.kernel_answers,
        )
    }

    /// Where the daemon pins what outlives it.
    pub fn pin_dir(&self) -> &Path {
        &self.pin_dir
    }

    /// Removes the program, as an operator would in need.
    ///
    /// # Panics
    /// If `preflightd detach` fails.
    pub fn detach(&self) {
        self.detach_from(&self.pin_dir);
    }

    /// Removes what is pinned in another directory.
    ///
    /// # Panics
    /// If `preflightd detach` fails.
    pub fn detach_from(&self, pin_dir: impl AsRef<Path>) {
        let mut command = inside(self.home(), &preflightd());
        let output = command.args(["detach", "--pin-dir"]).arg(pin_dir.as_ref()).output();
        assert!(output.as_ref().is_ok_and(|o| o.status.success()), "preflightd detach: {output:?}");
        // It may leave the directory itself.
        let _ = fs::remove_dir(&pin_dir);
    }

    /// The daemon's metrics.
    ///
    /// # Panics
    /// As [`Steerer::metrics`]; in a lab without the daemon.
    pub fn metrics(&self) -> Metrics {
        self.daemon.as_ref().expect("the daemon runs in this lab").metrics(self.home())
    }

    /// The daemon's status.
    ///
    /// # Panics
    /// As [`Steerer::status`]; in a lab without the daemon.
    pub fn status(&self) -> Value {
        self.daemon.as_ref().expect("the daemon runs in this lab").status()
    }

    /// How many flows went to `to`: `kernel`, `worker` or `proxy`.
    pub fn flows(&self, to: &str) -> u64 {
        self.metrics().count("preflightd_steer_flows_total", &[("to", to)])
    }

    /// Starts the proxy and waits until it listens.
    ///
    /// # Panics
    /// It does not.
    pub fn start_proxy(&mut self) {
        self.proxy = Running::start(&self.options.proxy, &self.node, &self.options.nginx);
        if matches!(self.proxy, Running::Nginx(_) | Running::Haproxy { .. }) {
            for site in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
                let site = SocketAddr::new(site, 80);
                wait_until(format_args!("the proxy on {site}"), || {
                    self.node.enter(|| TcpStream::connect(site)).is_ok()
                });
            }
        }
    }

    /// Ends the proxy.
    pub fn stop_proxy(&mut self) {
        self.proxy = Running::None;
    }

    /// nginx.
    ///
    /// # Panics
    /// If it is not the proxy here.
    pub fn nginx(&self) -> &Nginx {
        match &self.proxy {
            Running::Nginx(nginx) => nginx,
            other => panic!("no nginx here: {other:?}"),
        }
    }

    /// The recording proxy.
    ///
    /// # Panics
    /// If it is not the proxy here.
    pub fn upstream(&self) -> &Upstream {
        match &self.proxy {
            Running::Upstream(upstream) => upstream,
            other => panic!("no recording proxy here: {other:?}"),
        }
    }

    /// How many requests of nginx's log hold this.
    ///
    /// # Panics
    /// As [`Lab::nginx`].
    pub fn logged(&self, what: &str) -> usize {
        self.nginx().access_log().iter().filter(|line| line.contains(what)).count()
    }

    /// The node's TCP sockets on the served port in this state (as `ss` names it), without listeners.
    ///
    /// # Panics
    /// If `ss` fails.
    pub fn sockets(&self, state: &str) -> Vec<String> {
        let mut ss = self.node.command("ss");
        let output = ss.args(["-Htan", "state", state, "sport", "=", ":80"]).output().expect("running ss");
        assert!(output.status.success(), "ss: {output:?}");
        String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect()
    }
}

impl Default for Lab {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if thread::panicking()
            && let Running::Nginx(nginx) = &self.proxy
        {
            let log = nginx.error_log();
            let complaints: Vec<_> = log.lines().filter(|line| !line.contains("[notice]")).collect();
            eprintln!("--- nginx's error log ---\n{}\n---", complaints.join("\n"));
        }
        self.daemon = None;
        if self.pin_dir.exists() && !thread::panicking() {
            self.detach();
            assert!(!self.pin_dir.exists(), "left behind: {}", self.pin_dir.display());
        } else if self.pin_dir.exists() {
            // Nothing may be left behind, and a second panic would hide the first.
            let _ = catch_unwind(AssertUnwindSafe(|| self.detach()));
        }
        self.stop_proxy();
    }
}

/// Runs a test in one lab of these parts, for the IPv4 and then for the IPv6 address of the site.
///
/// # Panics
/// As the test does.
pub fn on_each_site(options: Options, test: impl Fn(&Lab, SocketAddr)) {
    if !can_run() {
        return;
    }
    let lab = Lab::with(options);
    for site in lab.sites() {
        eprintln!("site {site}");
        test(&lab, site);
    }
}

/// Whether labs can be built here; says on stderr why not. In CI that fails.
pub fn can_run() -> bool {
    have_root() && have(&["nginx", "ip", "ss"])
}

/// A preflight that the default policy allows.
pub fn allowed_preflight(target: &str) -> Vec<u8> {
    preflight(HOST, target, ORIGIN, "PUT", Some("content-type,x-demo"))
}

/// Checks that the proxy answered.
///
/// # Panics
/// It was someone else.
#[track_caller]
pub fn expect_proxy(response: &Response, case: impl std::fmt::Display) {
    assert_eq!(response.header("x-from"), Some("proxy"), "{case}: not the proxy's: {response:?}");
    assert!(response.cors_headers().is_empty(), "{case}: {response:?}");
}

/// Checks the proxy's answer to a GET.
///
/// # Panics
/// It is another.
#[track_caller]
pub fn check_get(response: &Response, path: &str) {
    expect_proxy(response, format_args!("GET {path}"));
    let body = String::from_utf8_lossy(&response.body);
    assert_eq!((response.status, &*body), (200, &*format!("nginx {path}")), "GET {path}");
}

/// Checks that someone answered a preflight as they should: a worker or the proxy.
///
/// # Panics
/// Neither did.
#[track_caller]
pub fn expect_either(lab: &Lab, response: &Response, case: impl std::fmt::Display) {
    if response.header("x-from").is_some() {
        expect_proxy(response, &case);
        assert_eq!(response.status, 405, "{case}: {response:?}");
    } else {
        lab.expect_worker(response, case);
    }
}

/// Whether labs are to be built without the daemon.
pub fn plain() -> bool {
    env::var("PREFLIGHTD_LAB").is_ok_and(|value| value == "plain")
}

/// Whether there is time for the long forms of tests.
pub fn full() -> bool {
    env::var_os("PREFLIGHTD_FULL").is_some()
}
