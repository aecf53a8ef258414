//! A real Envoy with its CORS filter, from policies in the words that `[policy.envoy]` has for them.
#![forbid(unsafe_code)]

use crate::site::{end, skip, wait_until};
use serde_json::{Map, Value, json};
use std::{
    fs,
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};
use tempfile::TempDir;

/// A virtual host and its routes.
#[derive(Clone, Debug)]
pub struct VirtualHost {
    /// A name, or `*.` and the rest of it.
    pub host: String,
    /// The policy that fills what a route's leaves unset.
    pub cors: Option<Value>,
    /// Path prefixes (by whole elements), the longest first, each with its policy.
    pub routes: Vec<(String, Option<Value>)>,
}

/// A running Envoy.
#[derive(Debug)]
pub struct Envoy {
    child: Child,
    directory: TempDir,
}

impl Envoy {
    /// Starts one with this configuration and waits until it listens on `address`; `None`, said on stderr, where
    /// it is not installed (in CI that fails).
    pub fn start(address: SocketAddr, config: &Value) -> Option<Self> {
        let Some(binary) = binary() else {
            skip("Envoy in .tools/envoy");
            return None;
        };
        let directory = TempDir::with_prefix("envoy-").expect("a directory for Envoy");
        let file = directory.path().join("envoy.json");
        fs::write(&file, config.to_string()).expect("writing envoy.json");
        let log = fs::File::create(directory.path().join("log")).expect("Envoy's log");
        let child = command(&binary, &file)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle to the log"))
            .stderr(log)
            .spawn()
            .expect("starting Envoy");
        let mut envoy = Self { child, directory };
        wait_until(format_args!("Envoy on {address}"), || {
            if let Some(status) = envoy.child.try_wait().expect("waiting for Envoy") {
                panic!("Envoy ended with {status}:\n{}", envoy.log());
            }
            TcpStream::connect(address).is_ok()
        });
        Some(envoy)
    }

    /// What it wrote so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Envoy {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// The binary in the Python environment below `.tools` that set-up makes.
pub fn binary() -> Option<PathBuf> {
    let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.tools/envoy/lib");
    let pythons = fs::read_dir(tools).ok()?;
    pythons
        .flatten()
        .map(|python| python.path().join("site-packages/envoy/_bin/envoy"))
        .find(|binary| binary.is_file())
}

/// Runs `binary` with one thread and this configuration.
pub fn command(binary: &Path, config: &Path) -> Command {
    let mut command = Command::new(binary);
    command.arg("-c").arg(config).args(["--concurrency", "1", "--disable-hot-restart", "-l", "warning"]);
    command
}

/// A configuration that listens on `address`. What the filter does not answer goes to `upstream`: it leaves direct
/// responses alone.
pub fn config(address: SocketAddr, hosts: &[VirtualHost], upstream: SocketAddr) -> Value {
    let hosts: Vec<Value> =
        hosts.iter().enumerate().map(|(i, host)| virtual_host(&format!("host-{i}"), host)).collect();
    let manager = json!({
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "lab",
        "http_filters": [
            {"name": FILTER, "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.cors.v3.Cors"}},
            {"name": "envoy.filters.http.router", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router",
                // Its times differ from answer to answer.
                "suppress_envoy_headers": true,
            }},
        ],
        "route_config": {"virtual_hosts": hosts},
    });
    json!({"static_resources": {
        "listeners": [{
            "address": socket_address(address),
            "filter_chains": [{"filters": [
                {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}
            ]}],
        }],
        "clusters": [{
            "name": "upstream",
            "type": "STATIC",
            "load_assignment": {"cluster_name": "upstream", "endpoints": [
                {"lb_endpoints": [{"endpoint": {"address": socket_address(upstream)}}]}
            ]},
        }],
    }})
}

const FILTER: &str = "envoy.filters.http.cors";

fn socket_address(address: SocketAddr) -> Value {
    json!({"socket_address": {"address": address.ip().to_string(), "port_value": address.port()}})
}

fn virtual_host(name: &str, host: &VirtualHost) -> Value {
    let routes: Vec<Value> = host.routes.iter().map(|(prefix, cors)| route(prefix, cors.as_ref())).collect();
    let mut domains = vec![host.host.clone()];
    if !host.host.starts_with('*') {
        // Whatever port the client writes, as gateways have it.
        domains.push(format!("{}:*", host.host));
    }
    let mut value = json!({"name": name, "domains": domains, "routes": routes});
    if let Some(cors) = &host.cors {
        value["typed_per_filter_config"] = per_filter(cors);
    }
    value
}

fn route(prefix: &str, cors: Option<&Value>) -> Value {
    // Of a prefix by whole elements Envoy wants no slash at the end.
    let path = if prefix == "/" { "prefix" } else { "path_separated_prefix" };
    let mut value = json!({"match": {path: prefix}, "route": {"cluster": "upstream"}});
    if let Some(cors) = cors {
        value["typed_per_filter_config"] = per_filter(cors);
    }
    value
}

/// `CorsPolicy` of the words of `[policy.envoy]`, which are its own but for regexes and percentages.
fn per_filter(cors: &Value) -> Value {
    let mut policy = Map::new();
    let kind = "type.googleapis.com/envoy.extensions.filters.http.cors.v3.CorsPolicy";
    policy.insert("@type".into(), kind.into());
    for (name, value) in cors.as_object().expect("a policy") {
        match name.as_str() {
            "allow_origin_string_match" => {
                let matchers = value.as_array().expect("matchers").iter().map(string_matcher).collect();
                policy.insert(name.clone(), Value::Array(matchers));
            }
            "filter_enabled_percent" | "shadow_enabled_percent" => {
                let percent = json!({"default_value": {"numerator": value, "denominator": "HUNDRED"}});
                policy.insert(name.trim_end_matches("_percent").to_owned(), percent);
            }
            _ => {
                policy.insert(name.clone(), value.clone());
            }
        }
    }
    json!({FILTER: policy})
}

fn string_matcher(matcher: &Value) -> Value {
    let mut matcher = matcher.clone();
    if let Some(regex) = matcher.get("safe_regex").cloned() {
        matcher["safe_regex"] = json!({"regex": regex});
    }
    matcher
}
