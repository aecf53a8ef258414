//! One TOML file (and policy files) to validated types, with every error at its line.
//!
//! `preflightd.example.toml` documents each key with its default.
#![forbid(unsafe_code)]

use crate::{
    http::HeadLimits,
    policy::{HostPattern, ListenerId, ListenerSpec, PolicySpec, RouteLabels, Table},
    relay::{self, ProxyProtocol, RelayLimits, Upstream},
    sources::kubernetes::{
        objects::LabelSelector,
        resolve::{self, GatewayDialect, Imported, Scope},
    },
    worker::{ConnectionLimits, EngineChoice},
};
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

mod build;
mod diagnostic;
mod raw;
mod source;
mod watch;

pub use diagnostic::{Diagnostic, escape};
pub use watch::Watch;

/// Everything that `preflightd run` must know.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where clients connect, by number (`ListenerId`).
    pub listeners: Vec<Listener>,
    /// `[workers]`.
    pub workers: Workers,
    /// `[limits]`.
    pub limits: Limits,
    /// `[relay]`.
    pub relay: Relay,
    /// `[steer]`.
    pub steer: Steer,
    /// `[ask]`.
    pub ask: Ask,
    /// `[learn]`.
    pub learn: Learn,
    /// `[shadow]`.
    pub shadow: Shadow,
    /// `[admin]`.
    pub admin: Admin,
    /// `[log]`.
    pub log: Log,
    /// `[kubernetes]`.
    pub kubernetes: Kubernetes,
    /// Every policy: of the file itself, of `policy_files`, of `policy_dir`, of manifests, in this order.
    pub policies: Arc<[PolicySpec]>,
}

/// One `[[listener]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    /// As policies and metrics call it.
    pub name: String,
    /// Bound here; port 0: any free one. With `steer`: where the proxy listens.
    pub address: SocketAddr,
    /// The proxy stays where it is, and the kernel gives us its preflights.
    pub steer: bool,
    /// The proxy behind it; `None` only with `answer_only` or `steer`.
    pub upstream: Option<SocketAddr>,
    /// How the upstream learns the client's address.
    pub proxy_protocol: ProxyProtocol,
    /// Connect to the upstream from the client's own address.
    pub transparent: bool,
    /// Ports that clients may name in `Host`; empty: any.
    pub public_ports: Vec<u16>,
    /// Further IP addresses by which clients rightly call it.
    pub addresses: Vec<IpAddr>,
    /// The Gateways that the proxy behind it serves, `namespace/name` or `namespace/name/listener`.
    pub gateways: Vec<String>,
    /// The IngressClasses that it serves. With both lists empty: all that `[kubernetes]` selects.
    pub ingress_classes: Vec<String>,
}

/// `[workers]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Workers {
    /// Threads; 0: one for each CPU that the process may use.
    pub count: usize,
    /// Each worker stays on a CPU of its own.
    pub pin: bool,
    /// What drives the sockets.
    #[serde(deserialize_with = "raw::engine")]
    pub engine: EngineChoice,
}

/// `[limits]`: of connections that a worker owns.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Request line and headers, in bytes; a longer head goes to the upstream.
    pub max_head_bytes: usize,
    /// From the first byte of a request to the end of its head.
    #[serde(deserialize_with = "raw::duration")]
    pub header_timeout: Duration,
    /// Between requests, and before the first one.
    #[serde(deserialize_with = "raw::duration")]
    pub idle_timeout: Duration,
    /// For a client that does not read its answers.
    #[serde(deserialize_with = "raw::duration")]
    pub send_timeout: Duration,
    /// Open connections of each worker.
    pub max_connections: usize,
    /// How long connections may go on after SIGTERM.
    #[serde(deserialize_with = "raw::duration")]
    pub shutdown_grace: Duration,
}

/// `[relay]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Relay {
    /// Threads; 0: as many as workers, which is also the most that are of use.
    pub threads: usize,
    /// Connections relayed at once; beyond, a client gets a 503.
    pub max_connections: usize,
    /// To reach the upstream.
    #[serde(deserialize_with = "raw::duration")]
    pub connect_timeout: Duration,
    /// Without a byte in either direction; zero: never.
    #[serde(deserialize_with = "raw::duration")]
    pub idle_timeout: Duration,
    /// Buffer for each direction of a connection.
    pub buffer_bytes: usize,
}

/// `[steer]`: what the kernel does on the ports of listeners with `steer`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Steer {
    /// What is done.
    pub mode: SteerMode,
    /// When handshakes are deferred.
    pub engage: Engage,
    /// Preflights a second above which a storm begins.
    pub storm_above: u32,
    /// Preflights a second below which, after ten seconds, it is over.
    pub storm_below: u32,
    /// Names of interfaces; empty: those that clients can reach.
    pub interfaces: Vec<String>,
    /// Where among other TCX programs.
    pub position: Position,
    /// The proxy's network namespace, a path or a process; empty: our own.
    pub netns: String,
    /// A directory of bpffs.
    pub pin_dir: PathBuf,
    /// Share of connections that may be steered, in 1/100.
    pub percent: u32,
    /// Connections that may wait for their first data.
    pub max_pending: u32,
    /// The kernel answers what it can decide.
    pub kernel_answers: bool,
    /// Connections that the kernel may have answered on, until they end or go on elsewhere.
    pub max_answered: u32,
    /// What firewall rules mean that may stop what the proxy would not.
    pub firewall: Firewall,
    /// A connection of our own each way before the daemon is ready.
    pub self_test: bool,
}

/// What steering does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum SteerMode {
    /// Nothing.
    Off,
    /// Counts what connections open with; touches nothing.
    Observe,
    /// Gives preflights to the workers.
    #[default]
    Steer,
}

/// When handshakes are deferred.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Engage {
    /// Always.
    #[default]
    Always,
    /// While there are many preflights.
    Storm,
}

/// Where the program stands among other TCX programs of an interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Position {
    /// Before them.
    #[default]
    First,
    /// Behind them.
    Last,
}

/// What firewall rules mean for steering, which goes past them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Firewall {
    /// While there are some that may stop or redirect connections to the ports, nothing is deferred.
    #[default]
    Refuse,
    /// They are known not to matter.
    Ignore,
}

/// `[ask]`: how the proxy itself is asked.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ask {
    /// Questions a second over all listeners.
    pub per_second: u32,
    /// For a connection and its answer.
    #[serde(deserialize_with = "raw::duration")]
    pub timeout: Duration,
}

/// `[learn]`: whose answers are learned of the proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Learn {
    /// None: nothing is learned. Never [`HostPattern::Any`].
    pub hosts: Vec<HostPattern>,
    /// Empty: all.
    pub listeners: Vec<ListenerId>,
    /// No answer holds longer.
    pub max_ttl: Duration,
    /// Questions that are kept, whatever became of them.
    pub max_entries: usize,
}

/// `[shadow]`: answers nothing, and compares.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Shadow {
    /// Whether it does.
    pub enabled: bool,
    /// Share of preflights that are compared, 0 to 1.
    pub sample: f64,
    /// Differences that are kept for the report.
    pub samples_kept: usize,
}

/// `[admin]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Admin {
    /// `/metrics`, `/healthz`, `/readyz`; none by default.
    #[serde(deserialize_with = "raw::optional_address")]
    pub address: Option<SocketAddr>,
    /// Unix socket for `explain` and the status; none by default.
    #[serde(deserialize_with = "raw::optional_path")]
    pub socket: Option<PathBuf>,
    /// Bound of the route labels in metrics.
    pub max_routes: usize,
}

/// `[log]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// A level or filter, such as `info`.
    #[serde(deserialize_with = "raw::log_filter")]
    pub level: String,
    /// How lines look.
    pub format: LogFormat,
}

/// `[kubernetes]`: policies from the API server.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Kubernetes {
    /// Read them.
    pub enabled: bool,
    /// How the API server is reached; empty: as a pod, else as kubectl does.
    pub kubeconfig: String,
    /// A context of it; empty: the current one.
    pub context: String,
    /// HTTPRoutes and Ingresses of other namespaces pass; empty: of none.
    pub namespaces: Vec<String>,
    /// HTTPRoutes and Ingresses without these labels pass; empty: none.
    #[serde(deserialize_with = "raw::label_selector")]
    pub label_selector: String,
    /// Only Gateways of these classes; empty: of all.
    pub gateway_classes: Vec<String>,
    /// Only Ingresses of these classes; empty: of all of ingress-nginx.
    pub ingress_classes: Vec<String>,
    /// How Gateways answer, by the name of their class or of its controller.
    pub dialects: BTreeMap<String, GatewayDialect>,
    /// From when on policies pass, if the API server cannot be asked.
    #[serde(deserialize_with = "raw::duration")]
    pub stale_after: Duration,
    /// How often everything is listed anew.
    #[serde(deserialize_with = "raw::duration")]
    pub resync: Duration,
    /// Findings are written to the objects as events.
    pub events: bool,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

impl Default for Workers {
    fn default() -> Self {
        Self { count: 0, pin: true, engine: EngineChoice::Auto }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            // nginx takes no longer lines, and browsers send none.
            max_head_bytes: 8_192,
            header_timeout: Duration::from_secs(10),
            // Chrome keeps a connection that it opened ahead of need for five minutes.
            idle_timeout: Duration::from_mins(5),
            send_timeout: Duration::from_secs(30),
            max_connections: 16_384,
            shutdown_grace: Duration::from_secs(20),
        }
    }
}

impl Default for Relay {
    fn default() -> Self {
        Self {
            threads: 0,
            max_connections: 16_384,
            connect_timeout: Duration::from_secs(5),
            idle_timeout: Duration::from_hours(1),
            buffer_bytes: 262_144,
        }
    }
}

impl Default for Steer {
    fn default() -> Self {
        Self {
            mode: SteerMode::Steer,
            engage: Engage::Always,
            storm_above: 1_000,
            storm_below: 500,
            interfaces: Vec::new(),
            position: Position::First,
            netns: String::new(),
            pin_dir: PathBuf::from("/sys/fs/bpf/preflightd"),
            percent: 100,
            max_pending: 65_536,
            kernel_answers: true,
            max_answered: 65_536,
            firewall: Firewall::Refuse,
            self_test: true,
        }
    }
}

impl Default for Ask {
    fn default() -> Self {
        Self { per_second: 20, timeout: Duration::from_secs(5) }
    }
}

impl Default for Learn {
    fn default() -> Self {
        Self { hosts: Vec::new(), listeners: Vec::new(), max_ttl: Duration::from_mins(10), max_entries: 4096 }
    }
}

impl Default for Shadow {
    fn default() -> Self {
        Self { enabled: false, sample: 0.01, samples_kept: 64 }
    }
}

impl Default for Admin {
    fn default() -> Self {
        Self { address: None, socket: None, max_routes: 512 }
    }
}

impl Default for Kubernetes {
    fn default() -> Self {
        Self {
            enabled: false,
            kubeconfig: String::new(),
            context: String::new(),
            namespaces: Vec::new(),
            label_selector: String::new(),
            gateway_classes: Vec::new(),
            ingress_classes: Vec::new(),
            dialects: BTreeMap::new(),
            stale_after: Duration::from_mins(5),
            resync: Duration::from_hours(1),
            events: false,
        }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self { level: "info".to_owned(), format: LogFormat::Text }
    }
}

/// What a load found: a configuration unless there are errors, and every finding at its line.
#[derive(Debug)]
pub struct Loaded {
    /// `None`: at least one diagnostic is an error.
    pub config: Option<Config>,
    /// Every finding, in order of files and lines.
    pub diagnostics: Vec<Diagnostic>,
    /// The files and directories that it was read from.
    pub files: Vec<PathBuf>,
    /// What manifests among the files came down to; part of the configuration's policies.
    pub imported: Vec<Imported>,
    origins: build::Origins,
}

/// Loads the configuration file with its policy files.
///
/// # Errors
/// The file itself cannot be read. Everything else is a diagnostic.
pub fn load(path: &Path) -> io::Result<Loaded> {
    build::load(path)
}

/// Loads a configuration from a string. No file is read: `policy_dir` and `policy_files` are not followed.
pub fn load_str(name: &str, text: &str) -> (Option<Config>, Vec<Diagnostic>) {
    let loaded = build::load_text(name, text);
    (loaded.config, loaded.diagnostics)
}

/// Loads policy files beside settings that come from elsewhere (such as the command line).
///
/// # Errors
/// A file cannot be read.
pub fn load_policies(base: Config, files: &[PathBuf]) -> io::Result<Loaded> {
    build::load_policies(base, files, Alone::No)
}

/// Loads policy files and manifests alone: every listener that a policy names is taken to exist, beside one named
/// `default`; of manifests, what is not among them is taken to be as `manifests` says.
///
/// # Errors
/// A file cannot be read.
pub fn load_policies_alone(files: &[PathBuf], manifests: Manifests) -> io::Result<Loaded> {
    build::load_policies(Config::of_listeners(Vec::new()), files, Alone::Yes(manifests))
}

/// How manifests are read that stand for themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifests {
    /// How Gateways answer whose class is not among them.
    pub dialect: GatewayDialect,
    /// Only Gateways of these classes; empty: of all.
    pub gateway_classes: Vec<String>,
    /// Only Ingresses of these classes; empty: those of ingress-nginx.
    pub ingress_classes: Vec<String>,
}

impl Default for Manifests {
    fn default() -> Self {
        Self { dialect: GatewayDialect::Unknown, gateway_classes: Vec::new(), ingress_classes: Vec::new() }
    }
}

/// Whether policy files are all there is.
enum Alone {
    Yes(Manifests),
    No,
}

/// Whether a file holds nothing but policies: such a file is no configuration, but part of one.
pub fn is_policy_file(text: &str) -> bool {
    let root = toml::de::DeTable::parse_recoverable(text).0;
    !root.get_ref().is_empty() && root.get_ref().keys().all(|key| key.get_ref() == "policy")
}

impl Loaded {
    /// Compiles the policies for `listeners`. `None`: there are errors, now or from before. What the table finds is
    /// added to the diagnostics.
    pub fn compile(
        &mut self,
        listeners: &[ListenerSpec],
        labels: &mut RouteLabels,
        generation: u64,
    ) -> Option<Table> {
        let policies = self.config.as_ref()?.policies.clone();
        let (table, mut found) = self.compile_all(listeners, &policies, labels, generation);
        self.diagnostics.append(&mut found);
        table
    }

    /// Compiles policies of which the first are these files' own; also returns what the table finds.
    pub fn compile_all(
        &self,
        listeners: &[ListenerSpec],
        policies: &[PolicySpec],
        labels: &mut RouteLabels,
        generation: u64,
    ) -> (Option<Table>, Vec<Diagnostic>) {
        let (table, findings) = Table::compile(listeners, policies, labels, generation);
        let found = self.origins.diagnostics(policies, findings);
        let refused = found.iter().any(Diagnostic::is_error);
        ((!refused).then_some(table), found)
    }

    /// Asks each upstream with `proxy_protocol = "auto"` whether it takes the PROXY protocol, and warns where the
    /// client's address would be hidden from it. Blocks, for at most twice `timeout` for each.
    pub fn ask_upstreams(&mut self, timeout: Duration) {
        let Some(config) = &self.config else { return };
        for (i, listener) in config.listeners.iter().enumerate() {
            let Some(upstream) = listener.upstream else { continue };
            if listener.proxy_protocol != ProxyProtocol::Auto || listener.transparent {
                continue;
            }
            let (code, message) = match relay::detect(upstream, timeout) {
                Ok(ProxyProtocol::Off) => (
                    "client-address-hidden",
                    format!(
                        "the upstream {upstream} of `{}` does not take the PROXY protocol: it will see this node's \
                         address instead of the client's in what is relayed",
                        listener.name
                    ),
                ),
                Ok(_) => continue,
                Err(e) => (
                    "upstream-unclear",
                    format!(
                        "cannot tell whether the upstream {upstream} of `{}` takes the PROXY protocol: {e}",
                        listener.name
                    ),
                ),
            };
            let help = "have the proxy expect the PROXY protocol, set transparent = true, or say with \
                        proxy_protocol = \"off\" that its rules do not depend on the client's address";
            let warning = build::listener_warning(&self.origins, i, "upstream", code, message, help);
            self.diagnostics.extend(warning);
        }
    }
}

impl Config {
    /// Defaults for these listeners, without policies.
    pub fn of_listeners(listeners: Vec<Listener>) -> Self {
        Self {
            listeners,
            workers: Workers::default(),
            limits: Limits::default(),
            relay: Relay::default(),
            steer: Steer::default(),
            ask: Ask::default(),
            learn: Learn::default(),
            shadow: Shadow::default(),
            admin: Admin::default(),
            log: Log::default(),
            kubernetes: Kubernetes::default(),
            policies: Arc::new([]),
        }
    }

    /// The listeners as the policy table knows them.
    pub fn listener_specs(&self) -> Vec<ListenerSpec> {
        self.listeners.iter().enumerate().map(|(i, l)| l.spec(ListenerId(i as u16))).collect()
    }

    /// Where connections that are not ours go.
    pub fn upstreams(&self) -> Vec<Upstream> {
        let upstream = |(i, l): (usize, &Listener)| {
            Some(Upstream {
                listener: ListenerId(i as u16),
                name: l.name.clone(),
                address: l.upstream?,
                proxy_protocol: l.proxy_protocol,
                transparent: l.transparent,
            })
        };
        self.listeners.iter().enumerate().filter_map(upstream).collect()
    }

    /// Number of worker threads: as configured, or one for each CPU that the process may use.
    pub fn worker_count(&self) -> usize {
        match self.workers.count {
            0 => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            n => n,
        }
    }

    /// Bounds of a worker's connections.
    pub fn connection_limits(&self) -> ConnectionLimits {
        ConnectionLimits {
            head: HeadLimits { max_bytes: self.limits.max_head_bytes },
            header_timeout: self.limits.header_timeout,
            idle_timeout: self.limits.idle_timeout,
            send_timeout: self.limits.send_timeout,
            max_connections: self.limits.max_connections,
        }
    }

    /// Bounds of the relay.
    pub fn relay_limits(&self) -> RelayLimits {
        RelayLimits {
            threads: match self.relay.threads {
                0 => self.worker_count(),
                n => n.min(self.worker_count()),
            },
            max_connections: self.relay.max_connections,
            connect_timeout: self.relay.connect_timeout,
            idle_timeout: self.relay.idle_timeout,
            buffer_bytes: self.relay.buffer_bytes,
        }
    }

    /// The sections that differ from `other`, apart from policies: they need a restart.
    pub fn changed_sections(&self, other: &Config) -> Vec<&'static str> {
        [
            ("listener", self.listeners != other.listeners),
            ("workers", self.workers != other.workers),
            ("limits", self.limits != other.limits),
            ("relay", self.relay != other.relay),
            ("steer", self.steer.without_live() != other.steer.without_live()),
            ("ask", self.ask != other.ask),
            ("learn", self.learn != other.learn),
            ("shadow", self.shadow != other.shadow),
            ("admin", self.admin != other.admin),
            ("log", self.log != other.log),
            ("kubernetes", self.kubernetes != other.kubernetes),
        ]
        .into_iter()
        .filter_map(|(name, changed)| changed.then_some(name))
        .collect()
    }

    /// What of Kubernetes' objects concerns us. `assume`: of manifests, what is not among them.
    pub fn resolve_settings(&self, assume: Option<GatewayDialect>) -> resolve::Settings {
        let scopes = self.listeners.iter().enumerate().map(|(i, listener)| Scope {
            listener: ListenerId(i as u16),
            gateways: listener.gateways.clone(),
            ingress_classes: listener.ingress_classes.clone(),
        });
        resolve::Settings {
            gateway_classes: self.kubernetes.gateway_classes.clone(),
            ingress_classes: self.kubernetes.ingress_classes.clone(),
            namespaces: self.kubernetes.namespaces.clone(),
            labels: LabelSelector::parse(&self.kubernetes.label_selector).unwrap_or_default(),
            dialects: self.kubernetes.dialects.clone(),
            assume,
            listeners: scopes.collect(),
        }
    }

    /// The policies by the numbers of the listeners in `running`, where both differ. A policy that serves only
    /// listeners which do not run is left out.
    pub fn policies_for(&self, running: &[Listener]) -> Arc<[PolicySpec]> {
        if self.listeners.iter().map(|l| &l.name).eq(running.iter().map(|l| &l.name)) {
            return self.policies.clone();
        }
        let number = |id: &ListenerId| {
            let name = &self.listeners.get(id.0 as usize)?.name;
            running.iter().position(|l| l.name == *name).map(|i| ListenerId(i as u16))
        };
        let policies = self.policies.iter().filter_map(|policy| {
            let listeners: Vec<_> = policy.listeners.iter().filter_map(number).collect();
            // An empty list means all listeners: it must not come about by leaving some out.
            (policy.listeners.is_empty() || !listeners.is_empty())
                .then(|| PolicySpec { listeners, ..policy.clone() })
        });
        policies.collect()
    }
}

impl Steer {
    /// Without what takes effect while running.
    fn without_live(&self) -> Self {
        let Self { mode, engage, storm_above, storm_below, percent, kernel_answers, firewall, .. } =
            Self::default();
        Self { mode, engage, storm_above, storm_below, percent, kernel_answers, firewall, ..self.clone() }
    }
}

impl Listener {
    /// One with an upstream and defaults.
    pub fn new(name: &str, address: SocketAddr, upstream: Option<SocketAddr>) -> Self {
        Self {
            name: name.to_owned(),
            address,
            steer: false,
            upstream,
            proxy_protocol: ProxyProtocol::Auto,
            transparent: false,
            public_ports: Vec::new(),
            addresses: Vec::new(),
            gateways: Vec::new(),
            ingress_classes: Vec::new(),
        }
    }

    fn spec(&self, id: ListenerId) -> ListenerSpec {
        let bind = self.address.ip();
        let own = (!bind.is_unspecified()).then_some(bind).into_iter().chain(self.addresses.iter().copied());
        let literal = |ip: IpAddr| match ip {
            IpAddr::V4(ip) => ip.to_string(),
            IpAddr::V6(ip) => format!("[{ip}]"),
        };
        ListenerSpec {
            id,
            name: self.name.clone(),
            own_literals: own.map(literal).collect(),
            loopback_is_own: bind.is_unspecified() || bind.is_loopback(),
            public_ports: self.public_ports.clone(),
        }
    }
}

#[cfg(test)]
mod tests;
