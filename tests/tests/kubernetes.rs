//! Policies from a real API server: the daemon reads objects with the rights that are deployed, follows their changes, and
//! goes on by what it knows while the server is away.

use preflightd_tests::{
    Behaviour, Client, Cluster, Config, Daemon, Response, Upstream,
    client::preflight,
    cluster::{Options, can_run},
    site::wait_until,
};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::Duration,
};

const ORIGIN: &str = "https://app.example";
const CONTROLLER: &str = "kgateway.dev/kgateway";

/// A Gateway of kgateway with a plain port, and an IngressClass of ingress-nginx.
const INFRA: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: GatewayClass
metadata: { name: kgateway }
spec: { controllerName: kgateway.dev/kgateway }
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: { name: web, namespace: infra }
spec:
  gatewayClassName: kgateway
  listeners:
    - { name: http, port: 80, protocol: HTTP, allowedRoutes: { namespaces: { from: All } } }
---
apiVersion: networking.k8s.io/v1
kind: IngressClass
metadata: { name: nginx }
spec: { controller: k8s.io/ingress-nginx }
";

/// The objects of a `deploy/` file.
fn deployed(file: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(file);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A cluster with the rights of `deploy/`, and a token of that service account.
fn cluster(options: Options<'_>) -> (Cluster, String) {
    let cluster = Cluster::with(options);
    cluster.apply(&deployed("kubernetes/rbac.yaml"));
    cluster.apply(INFRA);
    let token = cluster.token("preflightd", "preflightd");
    (cluster, token)
}

/// An HTTPRoute that its Gateway has accepted; its filter is told by its max-age, 0: none.
fn route(cluster: &Cluster, name: &str, max_age: u32) {
    let filters = if max_age == 0 {
        String::new()
    } else {
        format!(
            "filters: [{{ type: CORS, cors: {{ allowOrigins: ['{ORIGIN}'], allowMethods: [PUT], maxAge: {max_age} }} }}]"
        )
    };
    cluster.apply(&format!(
        "
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{ name: {name}, namespace: shop }}
spec:
  parentRefs: [{{ name: web, namespace: infra }}]
  hostnames: [{name}.test]
  rules:
    - backendRefs: [{{ name: api, port: 80 }}]
      {filters}
"
    ));
    accept(cluster, name, "True");
}

fn accept(cluster: &Cluster, name: &str, accepted: &str) {
    let condition = |kind: &str| {
        json!({
            "type": kind, "status": accepted, "reason": "Lab", "message": "said by the test",
            "lastTransitionTime": "2024-01-01T00:00:00Z"
        })
    };
    let status = json!({ "parents": [{
        "parentRef": { "name": "web", "namespace": "infra" },
        "controllerName": CONTROLLER,
        "conditions": [condition("Accepted"), condition("ResolvedRefs")]
    }]});
    cluster.patch_status("HTTPRoute", "shop", name, &status);
}

fn ingress(cluster: &Cluster, name: &str, annotations: &[(&str, &str)]) {
    let annotations: Vec<_> = annotations
        .iter()
        .map(|(key, value)| format!("nginx.ingress.kubernetes.io/{key}: '{value}'"))
        .collect();
    let annotations = annotations.join(", ");
    cluster.apply(&format!(
        "
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {{ name: {name}, namespace: shop, annotations: {{ {annotations} }} }}
spec:
  ingressClassName: nginx
  rules:
    - host: {name}.test
      http: {{ paths: [{{ path: /, pathType: Prefix, backend: {{ service: {{ name: api, port: {{ number: 80 }} }} }} }}] }}
"
    ));
}

/// A daemon before an upstream, which reads the cluster; `more`: lines of `[kubernetes]`.
struct Site {
    daemon: Daemon,
    upstream: Upstream,
}

impl Site {
    fn start(cluster: &Cluster, token: &str, more: &str) -> Self {
        let kubeconfig = cluster.kubeconfig(token);
        Self::with(&format!("enabled = true\nkubeconfig = \"{}\"\n{more}", kubeconfig.display()))
    }

    fn with(kubernetes: &str) -> Self {
        let upstream = Upstream::start(Behaviour::report());
        let directory = tempfile::tempdir().expect("a directory").keep();
        let mut config = Config::new(upstream.address(), format!("[kubernetes]\n{kubernetes}"));
        config.admin = format!("socket = \"{}/admin.sock\"", directory.display());
        Self { daemon: Daemon::start(config), upstream }
    }

    /// The whole answer to a preflight.
    fn ask(&self, host: &str, target: &str, origin: &str, method: &str) -> Response {
        let mut client = Client::connect(self.daemon.address());
        client.exchange(preflight(host, target, origin, method, Some("x-a")))
    }

    /// Its max-age; `None`: it went to the proxy.
    fn age(&self, name: &str) -> Option<u32> {
        let answer = self.ask(&format!("{name}.test"), "/", ORIGIN, "PUT");
        answer.header("access-control-max-age").map(|age| age.parse().expect("a number"))
    }

    /// Waits until a host's preflights are answered so.
    fn wait(&self, name: &str, age: Option<u32>) {
        wait_until(format!("{name} to be answered with {age:?}"), || self.age(name) == age);
    }

    fn metric(&self, name: &str) -> f64 {
        self.daemon.metrics().sum(name, &[])
    }

    fn wait_metric(&self, name: &str, value: f64) {
        wait_until(format!("{name} to be {value}"), || (self.metric(name) - value).abs() < 1e-9);
    }
}

#[test]
fn objects_become_answers_and_changes_are_followed() {
    if !can_run() {
        return;
    }
    let (cluster, token) = cluster(Options::default());
    route(&cluster, "one", 11);
    ingress(
        &cluster,
        "two",
        &[("enable-cors", "true"), ("cors-allow-origin", ORIGIN), ("cors-max-age", "12")],
    );
    let site = Site::start(&cluster, &token, "");
    site.wait("one", Some(11));
    site.wait("two", Some(12));
    // The words of the dialects: Envoy's 200 and nginx's 204.
    assert_eq!(site.ask("one.test", "/", ORIGIN, "PUT").status, 200);
    assert_eq!(site.ask("two.test", "/", ORIGIN, "PUT").status, 204);
    let before = site.upstream.count();
    assert_eq!(site.ask("one.test", "/", "https://evil.example", "PUT").status, 200);
    assert_eq!(site.upstream.count(), before + 1, "what Envoy would forward goes to the proxy");

    route(&cluster, "one", 21);
    site.wait("one", Some(21));
    cluster.apply(&format!(
        "
apiVersion: gateway.kgateway.dev/v1alpha1
kind: TrafficPolicy
metadata: {{ name: by-policy, namespace: shop }}
spec:
  targetRefs: [{{ group: gateway.networking.k8s.io, kind: HTTPRoute, name: three }}]
  cors: {{ allowOrigins: ['{ORIGIN}'], maxAge: 13 }}
"
    ));
    route(&cluster, "three", 0);
    site.wait("three", Some(13));
    cluster.delete("TrafficPolicy", "shop", "by-policy");
    site.wait("three", None);
    // A route that is refused is as if it were not there.
    accept(&cluster, "one", "False");
    site.wait("one", None);
    accept(&cluster, "one", "True");
    site.wait("one", Some(21));
    cluster.delete("HTTPRoute", "shop", "one");
    site.wait("one", None);
    cluster.delete("Ingress", "shop", "two");
    site.wait("two", None);
    assert!((site.metric("preflightd_kubernetes_synced") - 1.0).abs() < 1e-9);
    assert!(site.metric("preflightd_kubernetes_stale").abs() < 1e-9);
    assert!(site.metric("preflightd_kubernetes_failures_total").abs() < 1e-9, "{}", site.daemon.log());
}

#[test]
fn answers_go_on_while_everything_changes() {
    if !can_run() {
        return;
    }
    let (cluster, token) = cluster(Options::default());
    route(&cluster, "steady", 1);
    let site = Site::start(&cluster, &token, "");
    site.wait("steady", Some(1));
    let (stop, asked) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            let request = preflight("steady.test", "/", ORIGIN, "PUT", None);
            let mut client = Client::connect(site.daemon.address());
            while !stop.load(Ordering::Acquire) {
                let answer = client.exchange(&request);
                assert_eq!(answer.header("access-control-max-age"), Some("1"), "{answer:?}");
                asked.fetch_add(1, Ordering::Relaxed);
            }
        });
        for round in 2..22 {
            route(&cluster, "other", round);
            site.wait("other", Some(round));
        }
        stop.store(true, Ordering::Release);
    });
    assert!(asked.load(Ordering::Relaxed) > 100);
}

#[test]
fn a_server_that_is_away() {
    if !can_run() {
        return;
    }
    let (mut cluster, token) = cluster(Options::default());
    route(&cluster, "one", 1);
    let site = Site::start(&cluster, &token, "stale_after = \"3s\"");
    site.wait("one", Some(1));
    cluster.stop_server();
    // The last policies stay, until they are stale.
    assert_eq!(site.age("one"), Some(1));
    site.wait_metric("preflightd_kubernetes_stale", 1.0);
    site.wait("one", None);
    assert!(site.daemon.log().contains("stale"), "{}", site.daemon.log());
    cluster.start_server();
    site.wait("one", Some(1));
    site.wait_metric("preflightd_kubernetes_stale", 0.0);
    route(&cluster, "one", 2);
    site.wait("one", Some(2));
}

#[test]
fn a_server_that_hangs() {
    if !can_run() {
        return;
    }
    let (cluster, token) = cluster(Options::default());
    route(&cluster, "one", 1);
    let site = Site::start(&cluster, &token, "stale_after = \"2s\"");
    site.wait("one", Some(1));
    cluster.freeze_server();
    site.wait_metric("preflightd_kubernetes_stale", 1.0);
    assert_eq!(site.age("one"), None);
    cluster.thaw_server();
    site.wait("one", Some(1));
}

#[test]
fn versions_that_are_gone() {
    if !can_run() {
        return;
    }
    let (mut cluster, token) = cluster(Options { watch_cache: false, ..Options::default() });
    route(&cluster, "one", 1);
    route(&cluster, "gone", 3);
    let site = Site::start(&cluster, &token, "");
    site.wait("one", Some(1));
    site.wait("gone", Some(3));
    // What happens while nobody watches cannot be watched from the old version any more: 410, and everything is listed.
    cluster.stop_server();
    thread::sleep(Duration::from_millis(300));
    cluster.start_server();
    route(&cluster, "one", 2);
    cluster.delete("HTTPRoute", "shop", "gone");
    cluster.compact();
    site.wait("one", Some(2));
    site.wait("gone", None);
}

#[test]
fn a_right_that_is_missing() {
    if !can_run() {
        return;
    }
    let (cluster, _) = cluster(Options::default());
    route(&cluster, "one", 1);
    let rules = json!([{
        "apiGroups": ["gateway.networking.k8s.io"],
        "resources": ["gatewayclasses", "gateways", "httproutes", "referencegrants"],
        "verbs": ["get", "list", "watch"],
    }]);
    let token = cluster.service_account("shop", "half", &rules);
    let site = Site::start(&cluster, &token, "");
    wait_until("failures to be counted", || site.metric("preflightd_kubernetes_failures_total") > 0.0);
    // Half of the objects mean something else than all of them: none is used.
    assert!(site.metric("preflightd_kubernetes_synced").abs() < 1e-9);
    assert_eq!(site.age("one"), None);
    assert!(site.daemon.log().contains("forbidden"), "{}", site.daemon.log());
}

#[test]
fn nowhere_to_ask() {
    let missing = "enabled = true\nkubeconfig = \"/nonexistent/kubeconfig\"";
    let site = Site::with(missing);
    // Nothing is answered, and everything works.
    assert_eq!(site.age("one"), None);
    wait_until("it to be said", || site.daemon.log().contains("/nonexistent/kubeconfig"));
}

#[test]
fn findings_are_shown_and_written_to_their_objects() {
    if !can_run() {
        return;
    }
    let (cluster, token) = cluster(Options::default());
    ingress(&cluster, "open", &[("enable-cors", "true")]);
    route(&cluster, "one", 100_000);
    let site = Site::start(&cluster, &token, "events = true");
    site.wait("one", Some(100_000));
    let found = |code: &str| site.daemon.metrics().sum("preflightd_policy_findings", &[("code", code)]);
    wait_until("findings to be counted", || {
        found("origin-star-credentials") > 0.0 && found("max-age-browser-cap") > 0.0
    });
    let events = || {
        let list = cluster.get("/apis/events.k8s.io/v1/namespaces/shop/events");
        let items = list["items"].as_array().cloned().unwrap_or_default();
        items
            .iter()
            .map(|event| {
                (
                    event["regarding"]["name"].as_str().unwrap_or("").to_owned(),
                    event["reason"].as_str().unwrap_or("").to_owned(),
                )
            })
            .collect::<Vec<_>>()
    };
    let wanted = [("one", "MaxAgeBrowserCap"), ("open", "OriginStarCredentials")];
    wait_until("events to be written", || {
        let events = events();
        wanted.iter().all(|(name, reason)| events.contains(&((*name).to_owned(), (*reason).to_owned())))
    });
    // Another daemon writes none of them again.
    let count = events().len();
    let other = Site::start(&cluster, &token, "events = true");
    other.wait("one", Some(100_000));
    thread::sleep(Duration::from_secs(1));
    assert_eq!(events().len(), count);
}

/// The conformance cases of the Gateway API, from objects as its own tests apply them.
#[test]
fn gateway_api_conformance() {
    if !can_run() {
        return;
    }
    let cases: Value = read_cases("gateway_api.json");
    let (cluster, token) = cluster(Options::default());
    cluster.apply(
        "
apiVersion: gateway.networking.k8s.io/v1
kind: GatewayClass
metadata: { name: conformant }
spec: { controllerName: example.com/conformant }
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: { name: same-namespace, namespace: conformance }
spec: { gatewayClassName: conformant, listeners: [{ name: http, port: 80, protocol: HTTP }] }
",
    );
    let mut rules: BTreeMap<&str, Vec<Value>> = BTreeMap::new();
    for policy in cases["policies"].as_object().expect("policies").values() {
        rules.entry(policy["route"].as_str().expect("a route")).or_default().push(json!({
            "matches": [{ "path": { "type": "PathPrefix", "value": policy["match"]["pathPrefix"] } }],
            "filters": [{ "type": "CORS", "cors": policy["cors"] }],
            "backendRefs": [{ "name": "infra-backend-v1", "port": 8080 }],
        }));
    }
    for (name, rules) in &rules {
        let parent = json!({ "name": "same-namespace" });
        cluster.apply(
            &json!({
                "apiVersion": "gateway.networking.k8s.io/v1",
                "kind": "HTTPRoute",
                "metadata": { "name": name, "namespace": "conformance" },
                "spec": { "parentRefs": [parent], "hostnames": ["cors.test"], "rules": rules },
            })
            .to_string(),
        );
        let condition = json!({
            "type": "Accepted", "status": "True", "reason": "Lab", "message": "said by the test",
            "lastTransitionTime": "2024-01-01T00:00:00Z"
        });
        let status = json!({ "parents": [{
            "parentRef": parent, "controllerName": "example.com/conformant", "conditions": [condition]
        }]});
        cluster.patch_status("HTTPRoute", "conformance", name, &status);
    }
    let site = Site::start(&cluster, &token, "dialects = { conformant = \"gateway-api\" }");
    wait_until("all routes to be there", || {
        site.ask("cors.test", "/cors-1", "https://www.foo.com", "GET")
            .header("access-control-max-age")
            .is_some()
            && site.daemon.metrics().count("preflightd_kubernetes_objects", &[("kind", "HTTPRoute")])
                >= rules.len() as u64
    });
    let mut seen = 0;
    for case in cases["cases"].as_array().expect("cases").iter().filter(|case| case["kind"] == "preflight") {
        let (name, request, expect) =
            (case["name"].as_str().expect("a name"), &case["request"], &case["expect"]);
        let header = |name: &str| request["headers"][name].as_str();
        let bytes = preflight(
            "cors.test",
            request["path"].as_str().expect("a path"),
            header("Origin").expect("an origin"),
            header("Access-Control-Request-Method").expect("a method"),
            header("Access-Control-Request-Headers"),
        );
        let before = site.upstream.count();
        let answer = Client::connect(site.daemon.address()).exchange(bytes);
        assert_eq!(site.upstream.count(), before, "{name}: went to the proxy");
        let status = json!(answer.status);
        assert!(
            expect["status_any_of"].as_array().expect("statuses").contains(&status),
            "{name}: {answer:?}"
        );
        let plain = |text: &str| text.replace(' ', "").to_ascii_lowercase();
        for (header, values) in expect["headers_valid_values"].as_object().into_iter().flatten() {
            let got = answer.header(header).map(plain);
            let values: Vec<_> = values
                .as_array()
                .expect("values")
                .iter()
                .map(|v| Some(plain(v.as_str().expect("text"))))
                .collect();
            assert!(values.contains(&got), "{name}: {header} is {got:?}, not one of {values:?}");
        }
        for header in expect["headers_absent"].as_array().into_iter().flatten() {
            assert_eq!(answer.header(header.as_str().expect("a header")), None, "{name}: {header}");
        }
        seen += 1;
    }
    assert!(seen >= 10, "{seen} cases");
}

/// The cases that the projects' own tests have; see `tests/cases`.
fn read_cases(file: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("cases").join(file);
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).expect("JSON")
}
