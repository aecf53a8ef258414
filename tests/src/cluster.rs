//! A real Kubernetes API server on its own etcd, without any controller: what tests put there stays as it is.
//!
//! The server is of an old Kubernetes (1.20: `cargo xtask setup` builds it, see there why). It has RBAC, bound tokens of
//! service accounts, watches with bookmarks, server-side apply and custom resources with schemas; it knows no CEL, no
//! streaming lists, and EndpointSlices only as v1beta1. As there is no controller manager, a deleted namespace stays
//! (`Terminating`), and nobody collects what a deleted object owned.
//!
//! # What tells a watcher that it is too late (410 Gone)
//! By default the server answers watches out of a cache in its memory: compacting etcd under it changes nothing, but a
//! server that was away begins with an empty cache, and whoever comes back with a version from before, and there has been
//! any write since, is too late. With [`Options::watch_cache`] off, watches are etcd's: then [`Cluster::compact`] makes all
//! versions before it too old at once, for who begins a watch; one that is under way goes on. Either way the watch is
//! answered 200, with an event of type ERROR that holds the 410.
#![forbid(unsafe_code)]

mod crds;
mod place;

use std::{
    collections::HashMap,
    fmt, fs,
    io::Write as _,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Child,
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, stream};
use http::Request;
// The API's client that preflightd has, too: retries, TLS and tokens are then those of the product, and the dependency is
// there anyway.
use kube::{
    Api, Client, Config, Error, Resource as _,
    api::{ApiResource, DeleteParams, DynamicObject, GroupVersionKind, Patch, PatchParams},
    config::{KubeConfigOptions, Kubeconfig},
    discovery::{Scope, pinned_kind},
};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use self::place::Place;
use crate::{
    client,
    netns::Netns,
    site::{PATIENCE, end, free_address, have, program, signal, wait_for},
};

/// What a cluster is to be.
#[derive(Clone, Copy, Debug)]
pub struct Options<'a> {
    /// The network namespace that it runs in, on loopback; `None`: this process's.
    pub netns: Option<&'a Netns>,
    /// The server answers watches from memory, as servers do. Off, they are etcd's, for [`Cluster::compact`].
    pub watch_cache: bool,
    /// It knows the custom resources of [`Cluster::install_crds`].
    pub crds: bool,
}

impl Default for Options<'_> {
    fn default() -> Self {
        Self { netns: None, watch_cache: true, crds: true }
    }
}

/// A running cluster; dropping it ends its processes.
pub struct Cluster {
    server: Option<Child>,
    etcd: Child,
    address: SocketAddr,
    etcd_address: SocketAddr,
    arguments: Vec<String>,
    admin: Client,
    /// By API version and kind.
    resources: Mutex<HashMap<(String, String), Resource>>,
    directory: TempDir,
    place: Place,
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cluster").field("address", &self.address).finish_non_exhaustive()
    }
}

/// Whether clusters can be had here; says on stderr why not. In CI that fails.
pub fn can_run() -> bool {
    have(&["etcd", "kube-apiserver", "setpriv"])
}

/// The token of the test itself, which may do anything.
const ADMIN: &str = "the-admin-of-the-lab";

/// How long the server may take to be ready: seconds, if nobody else wants the machine's CPUs.
const START: Duration = Duration::from_secs(90);

/// Requests at a time in [`Cluster::bulk`].
const AT_A_TIME: usize = 32;

/// What [`Cluster::delete`] and [`Cluster::patch_status`] know by its kind alone, beside what has been applied.
const KINDS: &[(&str, &[&str])] = &[
    ("v1", &["ConfigMap", "Namespace", "Secret", "Service", "ServiceAccount"]),
    ("apiextensions.k8s.io/v1", &["CustomResourceDefinition"]),
    ("coordination.k8s.io/v1", &["Lease"]),
    ("gateway.kgateway.dev/v1alpha1", &["TrafficPolicy"]),
    ("gateway.networking.k8s.io/v1", &["Gateway", "GatewayClass", "HTTPRoute", "ReferenceGrant"]),
    ("gateway.solo.io/v1alpha1", &["GlooTrafficPolicy"]),
    ("networking.k8s.io/v1", &["Ingress", "IngressClass"]),
    ("rbac.authorization.k8s.io/v1", &["ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"]),
];

impl Cluster {
    /// A cluster on this process's loopback, with a watch cache and the custom resources; it is ready.
    pub fn start() -> Self {
        Self::with(Options::default())
    }

    /// A cluster as the options say; it is ready.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn with(options: Options<'_>) -> Self {
        let directory = TempDir::with_prefix("cluster-").expect("a directory for the cluster");
        let path = directory.path();
        let place = Place::new(options.netns);
        let (address, etcd_address, etcd_peers) = (free_address(), free_address(), free_address());
        write_credentials(path, address);
        let etcd = start_etcd(&place, path, etcd_address, etcd_peers);
        let admin = connect(&place, kubeconfig(path, address, ADMIN));
        let mut cluster = Self {
            server: None,
            etcd,
            address,
            etcd_address,
            arguments: server_arguments(path, address, etcd_address, options.watch_cache),
            admin,
            resources: Mutex::default(),
            directory,
            place,
        };
        cluster.start_server();
        if options.crds {
            cluster.install_crds();
        }
        cluster
    }

    /// Where the server listens, with TLS.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The certificate of its authority, in PEM.
    pub fn ca(&self) -> PathBuf {
        self.directory.path().join(CA)
    }

    /// Writes a kubeconfig with the server, its authority and this token.
    pub fn kubeconfig(&self, token: &str) -> PathBuf {
        kubeconfig(self.directory.path(), self.address, token)
    }

    /// The kubeconfig of the test itself, which may do anything.
    pub fn admin_kubeconfig(&self) -> PathBuf {
        self.kubeconfig(ADMIN)
    }

    /// A client with this token. It works within [`Cluster::run`] and [`Cluster::spawn`].
    pub fn client(&self, token: &str) -> Client {
        connect(&self.place, self.kubeconfig(token))
    }

    /// The client of the test itself, as [`Cluster::client`].
    pub fn admin(&self) -> Client {
        self.admin.clone()
    }

    /// Runs something that awaits, in the cluster's network namespace, to its end.
    pub fn run<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> T {
        self.place.run(work)
    }

    /// Begins something that awaits, in the cluster's network namespace; it ends with the cluster.
    pub fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.place.spawn(work);
    }

    /// Defines the custom resources: `Gateway`, `GatewayClass`, `HTTPRoute` and `ReferenceGrant` of Gateway API, with
    /// schemas and the defaults that matter; `TrafficPolicy` of kgateway and `GlooTrafficPolicy` of Gloo, without.
    ///
    /// # Panics
    /// If they are refused or do not come to be served.
    pub fn install_crds(&self) {
        let definitions = crds::all();
        for definition in &definitions {
            self.apply_value(definition);
        }
        for definition in &definitions {
            let name = definition["metadata"]["name"].as_str().expect("a name");
            let path = format!("/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}");
            wait_for(format_args!("{name} to be served"), || {
                let conditions = self.get(&path)["status"]["conditions"].take();
                let established = |c: &Value| c["type"] == "Established" && c["status"] == "True";
                conditions.as_array().is_some_and(|all| all.iter().any(established)).then_some(())
            });
            let (group, kind) = (&definition["spec"]["group"], &definition["spec"]["names"]["kind"]);
            for version in definition["spec"]["versions"].as_array().expect("versions") {
                let api_version = format!("{}/{}", text(group), text(&version["name"]));
                self.resource(&api_version, text(kind));
            }
        }
    }

    /// Makes or replaces objects (documents in YAML, or JSON), by a server-side apply, and gives them as they are then. In
    /// the namespace `default` unless they say another; their namespaces are made as well.
    ///
    /// # Panics
    /// If one is refused.
    pub fn apply(&self, documents: &str) -> Vec<Value> {
        let objects: Vec<Value> = serde_saphyr::from_multiple(documents).expect("objects in YAML");
        objects.iter().map(|object| self.apply_value(object)).collect()
    }

    /// Deletes an object, if it is there. The namespace is ignored where the kind has none.
    ///
    /// # Panics
    /// If that is refused.
    pub fn delete(&self, kind: &str, namespace: &str, name: &str) {
        let api = self.resource_of(kind).api(&self.admin, namespace);
        let wanted = name.to_owned();
        match self.run(async move { api.delete(&wanted, &DeleteParams::default()).await }) {
            Ok(_) => {}
            Err(Error::Api(status)) if status.is_not_found() => {}
            Err(error) => panic!("deleting {kind} {namespace}/{name}: {error}"),
        }
    }

    /// Merges into the `status` of an object, as its controller does, and gives the object. Lists are replaced.
    ///
    /// # Panics
    /// If that is refused.
    pub fn patch_status(&self, kind: &str, namespace: &str, name: &str, status: &Value) -> Value {
        let api = self.resource_of(kind).api(&self.admin, namespace);
        let (wanted, patch) = (name.to_owned(), Patch::Merge(json!({ "status": status })));
        let patched =
            self.run(async move { api.patch_status(&wanted, &PatchParams::default(), &patch).await });
        to_value(patched, format_args!("the status of {kind} {namespace}/{name}"))
    }

    /// Reads a path of the API.
    ///
    /// # Panics
    /// If that is refused.
    pub fn get(&self, path: &str) -> Value {
        self.try_get(path).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    /// Reads a path of the API, or says why not.
    pub fn try_get(&self, path: &str) -> Result<Value, Error> {
        let request = Request::get(path).body(Vec::new()).expect("a request");
        let admin = self.admin();
        self.run(async move { admin.request(request).await })
    }

    /// Creates many objects, many at a time, and says how many. Their namespaces must be there.
    ///
    /// # Panics
    /// If one is refused.
    pub fn bulk(&self, objects: impl IntoIterator<Item = Value>) -> usize {
        let creations: Vec<Request<Vec<u8>>> =
            objects.into_iter().map(|object| self.creation(&object)).collect();
        let admin = self.admin();
        self.run(async move {
            let create = |request: Request<Vec<u8>>| {
                let admin = admin.clone();
                async move {
                    let path = request.uri().path().to_owned();
                    // As text: reading 10,000 objects back takes longer than creating them.
                    let created = admin.request_text(request).await;
                    created.unwrap_or_else(|error| panic!("creating one of {path}: {error}"));
                }
            };
            stream::iter(creations).map(create).buffer_unordered(AT_A_TIME).count().await
        })
    }

    /// Makes a service account with a cluster role of these rules (an array of RBAC's `PolicyRule`s), and a token for it.
    ///
    /// # Panics
    /// If that is refused.
    pub fn service_account(&self, namespace: &str, name: &str, rules: &Value) -> String {
        let full = format!("{namespace}:{name}");
        self.apply_value(&json!({
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": { "namespace": namespace, "name": name },
        }));
        self.apply_value(&json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRole",
            "metadata": { "name": full },
            "rules": rules,
        }));
        self.apply_value(&json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": { "name": full },
            "subjects": [{ "kind": "ServiceAccount", "namespace": namespace, "name": name }],
            "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": full },
        }));
        self.token(namespace, name)
    }

    /// A new token for a service account, good for an hour.
    ///
    /// # Panics
    /// If there is no such account.
    pub fn token(&self, namespace: &str, name: &str) -> String {
        let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token");
        let wanted = json!({
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": { "expirationSeconds": 3600 },
        });
        let granted = self.post(&path, &wanted);
        text(&granted["status"]["token"]).to_owned()
    }

    /// Takes the server away: what was connected is cut off, new connections are refused. etcd stays.
    pub fn stop_server(&mut self) {
        if let Some(mut server) = self.server.take() {
            // At once: asked to end, it waits for watches.
            server.kill().expect("killing kube-apiserver");
            server.wait().expect("waiting for kube-apiserver");
        }
    }

    /// Starts the server, where it was, and waits until it is ready.
    ///
    /// # Panics
    /// If it does not become ready.
    pub fn start_server(&mut self) {
        assert!(self.server.is_none(), "the server is there");
        let program = program("kube-apiserver").expect("kube-apiserver is there");
        self.server = Some(self.place.start(&program, self.arguments.clone(), &self.log_file()));
        let give_up = Instant::now() + START;
        while !self.is_ready() {
            let server = self.server.as_mut().expect("it was started");
            if let Some(status) = server.try_wait().expect("waiting for kube-apiserver") {
                panic!("kube-apiserver ended with {status}");
            }
            assert!(Instant::now() < give_up, "kube-apiserver is not ready after {START:?}");
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Lets the server hang (SIGSTOP): connections stay and new ones are taken, but nothing is answered.
    pub fn freeze_server(&self) {
        signal(self.server.as_ref().expect("a running server"), Signal::STOP);
    }

    /// Lets it go on.
    pub fn thaw_server(&self) {
        signal(self.server.as_ref().expect("a running server"), Signal::CONT);
    }

    /// Makes etcd forget all versions of objects but the present ones. A watch from an earlier version that comes to etcd
    /// gets 410 Gone; which do is said above, in the module's words. Returns the oldest version that can still be watched
    /// from.
    ///
    /// # Panics
    /// If etcd refuses.
    pub fn compact(&self) -> u64 {
        // Two writes of no object: all versions that anybody has seen are then before the last but one.
        let put = json!({ "key": "bGFi", "value": "bGFi" });
        self.ask_etcd("/v3/kv/put", &put);
        let header = self.ask_etcd("/v3/kv/put", &put)["header"].take();
        let revision = text(&header["revision"]).to_owned();
        self.ask_etcd("/v3/kv/compaction", &json!({ "revision": revision, "physical": true }));
        revision.parse().expect("etcd's revision")
    }

    /// What the server wrote so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_file()).unwrap_or_default()
    }

    fn log_file(&self) -> PathBuf {
        self.directory.path().join("kube-apiserver.log")
    }

    /// Ready, and with the namespace that everything may be put into.
    fn is_ready(&self) -> bool {
        let admin = self.admin();
        let ask = async move {
            for path in ["/readyz", "/api/v1/namespaces/default"] {
                admin.request_text(Request::get(path).body(Vec::new()).expect("a request")).await?;
            }
            Ok::<_, Error>(())
        };
        // Its first answers may take long, but not for ever.
        self.run(async move { matches!(tokio::time::timeout(PATIENCE, ask).await, Ok(Ok(()))) })
    }

    fn apply_value(&self, object: &Value) -> Value {
        let (resource, namespace) = self.resource_and_namespace(object);
        if resource.namespaced && namespace != "default" {
            self.apply_value(
                &json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": namespace } }),
            );
        }
        let name = text(&object["metadata"]["name"]).to_owned();
        let what = format!("applying {} {namespace}/{name}", resource.api.kind);
        let (api, patch) = (resource.api(&self.admin, &namespace), Patch::Apply(object.clone()));
        let applied =
            self.run(async move { api.patch(&name, &PatchParams::apply("lab").force(), &patch).await });
        to_value(applied, what)
    }

    /// The request that creates an object.
    fn creation(&self, object: &Value) -> Request<Vec<u8>> {
        let (resource, namespace) = self.resource_and_namespace(object);
        let path = DynamicObject::url_path(&resource.api, resource.namespaced.then_some(namespace.as_str()));
        post(&path, object)
    }

    fn post(&self, path: &str, body: &Value) -> Value {
        let (admin, request) = (self.admin(), post(path, body));
        let answered: Result<Value, Error> = self.run(async move { admin.request(request).await });
        answered.unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    fn resource_and_namespace(&self, object: &Value) -> (Resource, String) {
        let resource = self.resource(text(&object["apiVersion"]), text(&object["kind"]));
        (resource, object["metadata"]["namespace"].as_str().unwrap_or("default").to_owned())
    }

    fn resource_of(&self, kind: &str) -> Resource {
        let listed = KINDS.iter().find(|(_, kinds)| kinds.contains(&kind)).map(|(version, _)| *version);
        if let Some(api_version) = listed {
            return self.resource(api_version, kind);
        }
        let known = self.resources.lock().expect("resources");
        let applied = known.iter().find(|((_, known), _)| known == kind);
        applied.unwrap_or_else(|| panic!("no {kind} has been applied")).1.clone()
    }

    /// Where a kind is served, as the server says.
    fn resource(&self, api_version: &str, kind: &str) -> Resource {
        let key = (api_version.to_owned(), kind.to_owned());
        if let Some(known) = self.resources.lock().expect("resources").get(&key) {
            return known.clone();
        }
        let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
        let kind = GroupVersionKind::gvk(group, version, kind);
        // A resource is listed a moment after it is defined.
        let (api, capabilities) = wait_for(format_args!("{} of {api_version}", kind.kind), || {
            let (admin, kind) = (self.admin(), kind.clone());
            self.run(async move { pinned_kind(&admin, &kind).await }).ok()
        });
        let found = Resource { api, namespaced: capabilities.scope == Scope::Namespaced };
        self.resources.lock().expect("resources").insert(key, found.clone());
        found
    }

    /// Asks etcd by its JSON gateway.
    fn ask_etcd(&self, path: &str, body: &Value) -> Value {
        let (address, body) = (self.etcd_address, body.to_string());
        let request = format!(
            "POST {path} HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let response = self.run(async move { client::Client::connect(address).exchange(request) });
        assert_eq!(response.status, 200, "{path}: {response:?}");
        serde_json::from_slice(&response.body).expect("JSON of etcd's")
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.stop_server();
        end(&mut self.etcd);
        if thread::panicking() {
            let log = self.log();
            let lines: Vec<_> = log.lines().collect();
            let tail = lines[lines.len().saturating_sub(40)..].join("\n");
            eprintln!("--- the end of kube-apiserver's log ---\n{tail}\n---");
        }
    }
}

/// A kind of object: where the API serves it.
#[derive(Clone)]
struct Resource {
    api: ApiResource,
    namespaced: bool,
}

impl Resource {
    fn api(&self, client: &Client, namespace: &str) -> Api<DynamicObject> {
        if self.namespaced {
            Api::namespaced_with(client.clone(), namespace, &self.api)
        } else {
            Api::all_with(client.clone(), &self.api)
        }
    }
}

// The files in a cluster's directory.
const CA: &str = "ca.pem";
const CERTIFICATE: &str = "server.pem";
const KEY: &str = "server.key";
const TOKENS: &str = "tokens.csv";
const TOKEN_KEY: &str = "tokens.key";
const TOKEN_PUBLIC_KEY: &str = "tokens.pub";

/// An authority, the server's certificate by it, the key that signs tokens, and the admin's token.
fn write_credentials(directory: &Path, address: SocketAddr) {
    let key = || KeyPair::generate().expect("a key");
    let mut authority = CertificateParams::default();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.distinguished_name.push(DnType::CommonName, "authority of the lab");
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    let authority_key = key();
    let ca = authority.self_signed(&authority_key).expect("the authority's certificate");
    let names = [address.ip().to_string(), "localhost".into(), "kubernetes.default.svc".into()];
    let mut server = CertificateParams::new(names).expect("the server's names");
    server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let server_key = key();
    let token_key = key();
    let issuer = Issuer::new(authority, authority_key);
    let certificate = server.signed_by(&server_key, &issuer).expect("the server's certificate");
    for (name, text) in [
        (CA, ca.pem()),
        (CERTIFICATE, certificate.pem()),
        (KEY, server_key.serialize_pem()),
        (TOKEN_KEY, token_key.serialize_pem()),
        (TOKEN_PUBLIC_KEY, token_key.public_key_pem()),
        (TOKENS, format!("{ADMIN},admin,admin,system:masters\n")),
    ] {
        fs::write(directory.join(name), text).expect("writing credentials");
    }
}

fn start_etcd(place: &Place, directory: &Path, clients: SocketAddr, peers: SocketAddr) -> Child {
    let arguments = vec![
        format!("--data-dir={}", directory.join("etcd").display()),
        format!("--listen-client-urls=http://{clients}"),
        format!("--advertise-client-urls=http://{clients}"),
        format!("--listen-peer-urls=http://{peers}"),
        format!("--initial-advertise-peer-urls=http://{peers}"),
        format!("--initial-cluster=default=http://{peers}"),
        "--log-level=warn".into(),
    ];
    let program = program("etcd").expect("etcd is installed");
    place.start(&program, arguments, &directory.join("etcd.log"))
}

fn server_arguments(
    directory: &Path,
    address: SocketAddr,
    etcd: SocketAddr,
    watch_cache: bool,
) -> Vec<String> {
    let file = |name| directory.join(name).display().to_string();
    vec![
        format!("--etcd-servers=http://{etcd}"),
        // Only when it is asked for.
        "--etcd-compaction-interval=0".into(),
        format!("--watch-cache={watch_cache}"),
        format!("--bind-address={}", address.ip()),
        format!("--secure-port={}", address.port()),
        // It would look for a route to the world, and then refuse to publish loopback.
        format!("--advertise-address={}", address.ip()),
        "--endpoint-reconciler-type=none".into(),
        "--service-cluster-ip-range=10.96.0.0/16".into(),
        format!("--tls-cert-file={}", file(CERTIFICATE)),
        format!("--tls-private-key-file={}", file(KEY)),
        format!("--cert-dir={}", directory.display()),
        "--authorization-mode=RBAC".into(),
        format!("--token-auth-file={}", file(TOKENS)),
        "--service-account-issuer=https://kubernetes.default.svc".into(),
        format!("--service-account-key-file={}", file(TOKEN_PUBLIC_KEY)),
        format!("--service-account-signing-key-file={}", file(TOKEN_KEY)),
    ]
}

fn kubeconfig(directory: &Path, server: SocketAddr, token: &str) -> PathBuf {
    // JSON is YAML.
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{
            "name": "lab",
            "cluster": { "server": format!("https://{server}"), "certificate-authority": directory.join(CA) },
        }],
        "users": [{ "name": "user", "user": { "token": token } }],
        "contexts": [{ "name": "lab", "context": { "cluster": "lab", "user": "user" } }],
        "current-context": "lab",
    });
    let (mut file, path) = tempfile::Builder::new()
        .prefix("kubeconfig-")
        .tempfile_in(directory)
        .and_then(|file| file.keep().map_err(Into::into))
        .expect("a file for a kubeconfig");
    file.write_all(config.to_string().as_bytes()).expect("writing a kubeconfig");
    path
}

/// A client by a kubeconfig. It belongs to the place: there it has a task of its own.
fn connect(place: &Place, kubeconfig: PathBuf) -> Client {
    place.run(async move {
        let kubeconfig = Kubeconfig::read_from(kubeconfig).expect("a kubeconfig");
        let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await;
        Client::try_from(config.expect("a configuration")).expect("a client")
    })
}

fn post(path: &str, body: &Value) -> Request<Vec<u8>> {
    let request = Request::post(path).header("content-type", "application/json");
    request.body(body.to_string().into_bytes()).expect("a request")
}

fn to_value(object: Result<DynamicObject, Error>, what: impl fmt::Display) -> Value {
    let object = object.unwrap_or_else(|error| panic!("{what}: {error}"));
    serde_json::to_value(object).expect("an object in JSON")
}

#[track_caller]
fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text"))
}
