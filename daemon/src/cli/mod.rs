//! The command line.
//!
//! Exit codes: 0 good; 1 findings (errors in a file, a request that is denied or passed, a daemon that failed);
//! 2 usage (wrong arguments, a file that cannot be read, a daemon that cannot be asked).
#![forbid(unsafe_code)]

use crate::{
    config::{LogFormat, Manifests},
    sources::kubernetes::resolve::GatewayDialect,
};
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::{net::SocketAddr, path::PathBuf, process::ExitCode};

mod check;
mod explain;
mod import;
mod learned;
mod log;
mod probe;
mod run;
mod shadow;
mod socket;
mod steer;

/// Answers CORS preflights beside the proxy, and passes everything else to it, byte for byte.
#[derive(Debug, Parser)]
#[command(name = "preflightd", version, arg_required_else_help = true, max_term_width = 110)]
#[command(after_help = "Examples:
  preflightd run --config /etc/preflightd/config.toml
  preflightd check /etc/preflightd/config.toml
  preflightd probe --port 80
  preflightd explain --config config.toml --url https://api.example.com/v1 \\
      --origin https://app.example.com --method PUT --header content-type

Exit codes: 0 good, 1 findings, 2 usage.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(Run),
    Check(Check),
    Probe(Probe),
    Explain(Box<Explain>),
    Import(Import),
    Detach(Detach),
    Learned(learned::Learned),
    Shadow(shadow::Shadow),
}

/// Answers preflights, beside the proxy (steer) or before it (listen, relaying the rest).
///
/// Policies are read again when their files change, and on SIGHUP, and so are mode, engage, storm_above, storm_below,
/// percent and firewall of [steer]; everything else needs a restart. SIGTERM drains: it stops accepting, finishes what
/// has begun (limits.shutdown_grace), and exits with 0. A second one ends at once.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  preflightd run --config /etc/preflightd/config.toml
  preflightd run --steer 80 --policy cors.toml --admin 127.0.0.1:9900
  preflightd run --listen 0.0.0.0:80 --upstream 127.0.0.1:8080 --policy cors.toml --admin 127.0.0.1:9900")]
struct Run {
    /// The configuration file.
    #[arg(
        long,
        value_name = "FILE",
        required_unless_present_any = ["listen", "steer"],
        conflicts_with_all = ["listen", "steer", "policy"]
    )]
    config: Option<PathBuf>,
    /// Instead of a file: listen here (IP address and port).
    #[arg(long, value_name = "ADDR", requires = "upstream")]
    listen: Option<SocketAddr>,
    /// Instead of a file: the proxy behind.
    #[arg(long, value_name = "ADDR", requires = "listen")]
    upstream: Option<SocketAddr>,
    /// Instead of a file: a file of policies; may be repeated.
    #[arg(long, value_name = "FILE")]
    policy: Vec<PathBuf>,
    /// Instead of a file: steer this port, or address and port, of the proxy that runs here; may be repeated.
    #[arg(long, value_name = "PORT", value_parser = steered)]
    steer: Vec<SocketAddr>,
    /// With --steer: these interfaces, not all that clients can reach; may be repeated.
    #[arg(long, value_name = "NAME", requires = "steer")]
    interface: Vec<String>,
    /// With --steer: the proxy's network namespace, a path or a process.
    #[arg(long, value_name = "NETNS", requires = "steer")]
    netns: Option<String>,
    /// Overrides steer.mode.
    #[arg(long, value_name = "MODE")]
    mode: Option<crate::config::SteerMode>,
    /// Overrides shadow.enabled: answer nothing, and compare a share of the proxy's answers with ours.
    #[arg(long)]
    shadow: bool,
    /// Instead of a file: how the upstream learns the client's address.
    #[arg(long, value_name = "HOW", requires = "listen", default_value = "auto")]
    proxy_protocol: ProxyProtocol,
    /// Read policies from the API server too, as with kubernetes.enabled.
    #[arg(long)]
    kubernetes: bool,
    /// Overrides workers.count (0: one for each CPU).
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(0..=1024))]
    workers: Option<u16>,
    /// Overrides workers.engine.
    #[arg(long)]
    engine: Option<Engine>,
    /// Overrides admin.address: /metrics, /healthz, /readyz.
    #[arg(long, value_name = "ADDR")]
    admin: Option<SocketAddr>,
    /// Overrides admin.socket: the Unix socket that `explain --admin-socket` asks.
    #[arg(long, value_name = "PATH")]
    admin_socket: Option<PathBuf>,
    /// Overrides log.level and RUST_LOG: error, warn, info, debug, trace, or a filter.
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
    /// Overrides log.format.
    #[arg(long)]
    log_format: Option<LogFormat>,
}

/// Checks configuration files, policy files and manifests.
///
/// A file that holds nothing but [[policy]] tables is a policy file; .yaml, .yml and .json are manifests of Kubernetes. All
/// policy files and manifests of one call are checked together. Everything wrong or doubtful is printed with its line, or
/// its object and field, and a remedy.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  preflightd check /etc/preflightd/config.toml
  preflightd check --deny-warnings policies/*.toml
  preflightd check routes.yaml ingresses.yaml
  preflightd check --format json config.toml | jq -r .message

With --format json each finding is one object a line:
  {\"severity\", \"code\", \"file\", \"line\", \"column\", \"field\", \"message\", \"help\"}
where of a manifest's object `file` is its kind, namespace and name, and `field` stands only there.

Exit codes: 0 no errors, 1 errors (with --deny-warnings: any finding), 2 a file cannot be read.")]
struct Check {
    /// Configuration files, policy files or manifests.
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    #[command(flatten)]
    manifests: ManifestArgs,
    /// How findings are printed.
    #[arg(long, default_value = "text")]
    format: Format,
    /// Ask each upstream with proxy_protocol = "auto" whether it takes the PROXY protocol, and warn where it does not:
    /// there the proxy sees this node's address instead of the client's.
    #[arg(long)]
    ask_upstreams: bool,
    /// Warnings count as errors.
    #[arg(long)]
    deny_warnings: bool,
}

/// Takes the eBPF programs off every interface, and removes all that daemons have pinned.
///
/// The switch that puts steering out, with or without a daemon: the proxy then serves everything by itself. New
/// connections are left to it at once; those whose handshake has begun get a moment to finish it. A daemon that runs stays
/// up, says so, and steers again only after a restart.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  preflightd detach
  preflightd detach --pin-dir /sys/fs/bpf/preflightd --grace 10s

Exit codes: 0 nothing is left, 1 something could not be removed.")]
struct Detach {
    /// steer.pin_dir of the daemon.
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/preflightd")]
    pin_dir: PathBuf,
    /// How long handshakes that have begun may take.
    #[arg(long, value_name = "TIME", default_value = "3s")]
    grace: humantime::Duration,
}

/// Tells whether this node can steer, and what to do where it cannot.
///
/// Looks at the kernel, its settings, privileges, the proxy's listeners, interfaces, routes and firewall rules, and
/// changes nothing. Run it as the daemon will be run: with the same user, capabilities and container.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  preflightd probe --config /etc/preflightd/config.toml
  preflightd probe --port 80 --port 8080 --interface eth0
  preflightd probe --port 80 --netns /run/netns/web
  preflightd probe --port 80 --format json | jq '.checks[] | select(.status != \"ok\")'

With --format json one object is printed:
  {\"steer\", \"observe\", \"checks\": [{\"name\", \"status\", \"needed_for\", \"found\", \"costs\", \"remedy\"}]}
where status is ok, limited (less works for it) or missing.

Exit codes: 0 it can steer, 1 something is missing, 2 usage.")]
struct Probe {
    /// Look at the steered listeners of this configuration, with what [steer] says.
    #[arg(long, value_name = "FILE", conflicts_with = "port")]
    config: Option<PathBuf>,
    /// Instead of a file: a port that the proxy listens on; may be repeated.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    port: Vec<u16>,
    /// Overrides steer.netns, the proxy's network namespace: a path (/run/netns/web) or the number of a process.
    #[arg(long, value_name = "SPEC")]
    netns: Option<String>,
    /// Overrides steer.interfaces, by which clients come in; may be repeated.
    #[arg(long, value_name = "NAME")]
    interface: Vec<String>,
    /// Overrides steer.pin_dir, where maps and links are pinned: a directory on a BPF file system.
    #[arg(long, value_name = "DIR")]
    pin_dir: Option<PathBuf>,
    /// How the report is printed.
    #[arg(long, default_value = "text")]
    format: Format,
}

/// Tells what becomes of one request, step by step, and the answer's exact bytes.
///
/// The request goes the same way as one from the network: through the head reader, the policy table and the answer.
/// It is described by --url, --origin, --method and --header (then the bytes are a browser's), by curl's -X and -H,
/// or it is read as it is from standard input (--raw).
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  preflightd explain --config config.toml --url https://api.example.com/v1 \\
      --origin https://app.example.com --method PUT --header content-type --header x-token
  preflightd explain --policy cors.toml -X OPTIONS -H 'Origin: https://app.example.com' \\
      -H 'Access-Control-Request-Method: PUT' https://api.example.com/v1
  printf 'OPTIONS / HTTP/1.1\\r\\n…' | preflightd explain --admin-socket /run/preflightd.sock --raw

Exit codes: 0 answered, and a browser would go on; 1 denied, passed or incomplete, or errors in a file; 2 usage.")]
struct Explain {
    #[command(flatten)]
    from: ExplainFrom,
    #[command(flatten)]
    manifests: ManifestArgs,
    #[command(flatten)]
    request: ExplainRequest,
    /// The listener that takes the request; the first one if not given.
    #[arg(long, value_name = "NAME")]
    listener: Option<String>,
    /// How the report is printed.
    #[arg(long, default_value = "text")]
    format: Format,
}

#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
struct ExplainFrom {
    /// Ask the policies of this configuration.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Ask the policies of this policy file or manifest (.yaml, .yml, .json); may be repeated.
    #[arg(long, value_name = "FILE")]
    policy: Vec<PathBuf>,
    /// Ask the running daemon by its Unix socket (admin.socket).
    #[arg(long, value_name = "PATH")]
    admin_socket: Option<PathBuf>,
}

/// How manifests are read.
#[derive(Args, Debug)]
struct ManifestArgs {
    /// Of manifests: how a Gateway answers whose class is not among them, or not known.
    #[arg(long, value_name = "DIALECT", default_value = "unknown")]
    gateway_dialect: GatewayDialect,
    /// Of manifests: only Gateways of this class; may be repeated.
    #[arg(long, value_name = "NAME")]
    gateway_class: Vec<String>,
    /// Of manifests: only Ingresses of this class; may be repeated.
    #[arg(long, value_name = "NAME")]
    ingress_class: Vec<String>,
}

impl ManifestArgs {
    fn manifests(&self) -> Manifests {
        Manifests {
            dialect: self.gateway_dialect,
            gateway_classes: self.gateway_class.clone(),
            ingress_classes: self.ingress_class.clone(),
        }
    }
}

/// Prints the policies that Kubernetes objects come down to, as a policy file.
///
/// Reads HTTPRoutes, Gateways, kgateway's TrafficPolicies, Ingresses and what they refer to, from manifests or from the API
/// server, and changes nothing. Findings go to standard error: what is wrong, what is doubtful, and what cannot be modelled
/// and therefore will pass to the proxy.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  preflightd import -f routes.yaml -f policies.yaml > policies.toml
  kubectl get ingress -A -o yaml | preflightd import -f -
  preflightd import -f httproute.yaml --gateway-dialect envoy
  preflightd import --from cluster --context staging

Exit codes: 0 no errors, 1 an object has errors (the rest is printed), 2 usage, or nothing could be read.")]
struct Import {
    /// A manifest, YAML or JSON; `-`: standard input; may be repeated.
    #[arg(short = 'f', long = "file", value_name = "FILE", required_unless_present = "from")]
    files: Vec<PathBuf>,
    /// Read the objects of a cluster.
    #[arg(long, value_name = "SOURCE", conflicts_with = "files")]
    from: Option<ImportFrom>,
    /// With --from cluster: how the API server is reached, as for kubectl.
    #[arg(long, value_name = "FILE", requires = "from")]
    kubeconfig: Option<PathBuf>,
    /// With --from cluster: a context of the kubeconfig.
    #[arg(long, value_name = "NAME", requires = "from")]
    context: Option<String>,
    #[command(flatten)]
    manifests: ManifestArgs,
}

/// Where objects are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ImportFrom {
    /// The API server.
    Cluster,
}

#[derive(Args, Debug)]
struct ExplainRequest {
    /// The URL that the page fetches.
    #[arg(long = "url", value_name = "URL", conflicts_with = "positional_url")]
    url: Option<String>,
    /// The same, as curl has it.
    #[arg(value_name = "URL", id = "positional_url")]
    positional_url: Option<String>,
    /// The page's origin.
    #[arg(long, value_name = "ORIGIN")]
    origin: Option<String>,
    /// The method that the page asks for.
    #[arg(long, value_name = "METHOD")]
    method: Option<String>,
    /// A header that the page sets; may be repeated.
    #[arg(long, value_name = "NAME")]
    header: Vec<String>,
    /// The request's own method, as curl has it.
    #[arg(short = 'X', long = "request", value_name = "METHOD", default_value = "OPTIONS")]
    request_method: String,
    /// A line of the request, as curl has it; may be repeated.
    #[arg(short = 'H', value_name = "NAME: VALUE", id = "line")]
    line: Vec<String>,
    /// Read the request as it is from standard input.
    #[arg(long, conflicts_with_all = ["url", "positional_url", "origin", "method", "header", "request_method", "line"])]
    raw: bool,
    /// curl's; without effect here.
    #[arg(long, hide = true)]
    compressed: bool,
    /// curl's; without effect here.
    #[arg(short = 'k', long, hide = true)]
    insecure: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// A port of all addresses, or an address with its port.
fn steered(text: &str) -> Result<SocketAddr, String> {
    match text.parse::<u16>() {
        Ok(0) => Err("0 is no port: write the one that the proxy listens on".to_owned()),
        Ok(port) => Ok(SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, port))),
        Err(_) => text.parse().map_err(|_| {
            "write a port, such as 80, or an IP address and a port, such as 192.0.2.1:80 or [::]:80"
                .to_owned()
        }),
    }
}

/// How the upstream learns the client's address.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum ProxyProtocol {
    /// v2 if the upstream understands it, else off.
    Auto,
    /// Not sent: the upstream sees this node's address.
    Off,
    /// The text version.
    V1,
    /// The binary version.
    V2,
}

/// What drives the workers' sockets.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Engine {
    /// io_uring where the kernel allows it, else epoll.
    Auto,
    /// io_uring, or an error.
    #[value(name = "io_uring")]
    IoUring,
    /// epoll.
    Epoll,
}

/// Why a command ended badly.
#[derive(Debug)]
enum Failure {
    /// Already told; exit code 1.
    Findings,
    /// Exit code 1.
    Failed(String),
    /// Exit code 2.
    Usage(String),
}

/// Runs the command line; the exit code is 0 good, 1 findings, 2 usage.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            // Help and version are no errors. A closed standard output is nothing to tell anybody.
            let _ = e.print();
            return ExitCode::from(if e.use_stderr() { 2 } else { 0 });
        }
    };
    let result = match cli.command {
        Command::Run(args) => run::run(&args),
        Command::Check(args) => check::check(&args),
        Command::Probe(args) => probe::probe(&args),
        Command::Explain(args) => explain::explain(&args),
        Command::Import(args) => import::import(&args),
        Command::Detach(args) => steer::detach(&args),
        Command::Learned(args) => learned::learned(&args),
        Command::Shadow(args) => shadow::shadow(&args),
    };
    let (code, message) = match result {
        Ok(()) => return ExitCode::SUCCESS,
        Err(Failure::Findings) => return ExitCode::from(1),
        Err(Failure::Failed(message)) => (1, message),
        Err(Failure::Usage(message)) => (2, message),
    };
    let bad = anstyle::AnsiColor::Red.on_default().bold();
    anstream::eprintln!("{bad}error{bad:#}: {}", crate::config::escape(&message));
    ExitCode::from(code)
}

/// Prints to standard output; a reader that has gone away (`| head`) is no error.
fn print(text: impl std::fmt::Display) {
    use std::io::Write as _;
    let _ = write!(anstream::stdout(), "{text}");
}
