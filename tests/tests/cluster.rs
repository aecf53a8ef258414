//! The Kubernetes lab itself, tried with the client and the watcher that preflightd has, but without preflightd.

use std::{sync::mpsc, time::Duration};

use futures_util::{StreamExt as _, TryStreamExt as _};
use gateway_api::httproutes::HttpRoute;
use kube::{
    Api, Client, Error, ResourceExt as _,
    api::{ListParams, WatchEvent, WatchParams},
    runtime::{
        WatchStreamExt as _,
        watcher::{self, Event},
    },
};
use preflightd_tests::{
    Cluster,
    client::Client as Plain,
    cluster::{Options, can_run},
    netns::{Netns, have_root},
    site::PATIENCE,
};
use serde_json::{Value, json};

/// An HTTPRoute named `name` with a CORS filter.
fn route(namespace: &str, name: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata:
  namespace: {namespace}
  name: {name}
spec:
  parentRefs: [{{ name: web }}]
  hostnames: [{name}.test]
  rules:
    - filters:
        - type: CORS
          cors:
            allowOrigins: ['https://app.example']
            allowMethods: [PUT]
      backendRefs: [{{ name: {name}, port: 80 }}]
"
    )
}

/// What a service account needs that reads routes.
fn reader() -> Value {
    json!([{
        "apiGroups": ["gateway.networking.k8s.io"],
        "resources": ["httproutes"],
        "verbs": ["get", "list", "watch"],
    }])
}

fn routes(client: Client) -> Api<HttpRoute> {
    Api::namespaced(client, "shop")
}

/// What a watcher sees of routes, in words: `init`, `ready`, `NAME`, `-NAME`, `error: …`.
struct Seen(mpsc::Receiver<String>);

impl Seen {
    fn of(cluster: &Cluster, token: &str) -> Self {
        let (tell, told) = mpsc::channel();
        let routes = routes(cluster.client(token));
        cluster.spawn(async move {
            let mut events = watcher::watcher(routes, watcher::Config::default()).default_backoff().boxed();
            while let Some(event) = events.next().await {
                let told = tell.send(match event {
                    Ok(Event::Init) => "init".into(),
                    Ok(Event::InitDone) => "ready".into(),
                    Ok(Event::InitApply(route) | Event::Apply(route)) => route.name_any(),
                    Ok(Event::Delete(route)) => format!("-{}", route.name_any()),
                    Err(watcher::Error::WatchError(status)) => format!("error: {}", status.code),
                    Err(error) => format!("error: {error}"),
                });
                if told.is_err() {
                    return;
                }
            }
        });
        Self(told)
    }

    fn next(&self) -> String {
        self.0.recv_timeout(PATIENCE).expect("an event")
    }

    /// Reads on to the first that is not an error, and says whether there was one of these words before it.
    fn next_but_errors(&self, word: &str) -> (bool, String) {
        let mut had = false;
        loop {
            match self.next() {
                error if error.starts_with("error") => had |= error.contains(word),
                other => return (had, other),
            }
        }
    }

    fn expect<const N: usize>(&self, words: [&str; N]) {
        assert_eq!([(); N].map(|()| self.next()), words);
    }
}

/// The code of the error that a watch from this version brings; `None` if it goes on for a second.
fn watch_from(cluster: &Cluster, version: &str) -> Option<u16> {
    let (routes, version) = (routes(cluster.admin()), version.to_owned());
    cluster.run(async move {
        let watch = routes.watch(&WatchParams::default(), &version).await;
        let mut events = watch.expect("an answer that begins with 200").boxed();
        loop {
            match tokio::time::timeout(Duration::from_secs(1), events.try_next()).await {
                Ok(Ok(Some(WatchEvent::Error(status)))) => return Some(status.code),
                Ok(Ok(Some(_))) => {}
                Ok(end) => panic!("the watch ended: {end:?}"),
                Err(_) => return None,
            }
        }
    })
}

/// The version of a list of routes.
fn version(cluster: &Cluster) -> String {
    let list = cluster.get("/apis/gateway.networking.k8s.io/v1/httproutes");
    list["metadata"]["resourceVersion"].as_str().expect("a version").to_owned()
}

#[test]
fn objects_are_put_watched_and_deleted() {
    if !can_run() {
        return;
    }
    let cluster = Cluster::start();
    let token = cluster.service_account("preflightd", "reader", &reader());
    let seen = Seen::of(&cluster, &token);
    seen.expect(["init", "ready"]);
    let applied = cluster.apply(&format!("{}---\n{}", route("shop", "cart"), route("shop", "pay")));
    seen.expect(["cart", "pay"]);
    // As Gateway API says, by the server.
    let rule = &applied[0]["spec"]["rules"][0];
    assert_eq!(rule["matches"][0]["path"], json!({ "type": "PathPrefix", "value": "/" }));
    assert_eq!(rule["filters"][0]["cors"]["maxAge"], 5);
    assert_eq!(rule["backendRefs"][0]["group"], "");

    let accepted = json!({
        "parents": [{
            "controllerName": "test/controller",
            "parentRef": { "name": "web" },
            "conditions": [{
                "type": "Accepted",
                "status": "True",
                "reason": "Accepted",
                "message": "",
                "lastTransitionTime": "2024-01-01T00:00:00Z",
            }],
        }],
    });
    let patched = cluster.patch_status("HTTPRoute", "shop", "cart", &accepted);
    assert_eq!(patched["status"]["parents"][0]["conditions"][0]["status"], "True");
    assert_eq!(patched["metadata"]["generation"], applied[0]["metadata"]["generation"]);
    seen.expect(["cart"]);
    cluster.delete("HTTPRoute", "shop", "pay");
    seen.expect(["-pay"]);
    cluster.delete("HTTPRoute", "shop", "pay");
}

#[test]
fn every_kind_is_served() {
    if !can_run() {
        return;
    }
    let cluster = Cluster::start();
    let gateway = cluster.apply(
        "
apiVersion: gateway.networking.k8s.io/v1
kind: GatewayClass
metadata: { name: envoy }
spec: { controllerName: test/controller }
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: { namespace: infra, name: web }
spec:
  gatewayClassName: envoy
  listeners: [{ name: http, port: 80, protocol: HTTP }]
",
    );
    assert_eq!(
        gateway[1]["spec"]["listeners"][0]["allowedRoutes"],
        json!({ "namespaces": { "from": "Same" } })
    );
    assert_eq!(gateway[1]["status"]["conditions"][1]["type"], "Programmed");
    cluster.patch_status("GatewayClass", "", "envoy", &json!({ "conditions": [] }));
    let grant = "
apiVersion: gateway.networking.k8s.io/v1beta1
kind: ReferenceGrant
metadata: { namespace: infra, name: grant }
spec:
  from: [{ group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: shop }]
  to: [{ group: '', kind: Service }]
";
    cluster.apply(grant);
    let served = cluster.get("/apis/gateway.networking.k8s.io/v1/namespaces/infra/referencegrants/grant");
    assert_eq!(served["spec"]["to"][0]["kind"], "Service");
    for (group, kind) in [("gateway.kgateway.dev", "TrafficPolicy"), ("gateway.solo.io", "GlooTrafficPolicy")]
    {
        let policy = json!({
            "apiVersion": format!("{group}/v1alpha1"),
            "kind": kind,
            "metadata": { "namespace": "shop", "name": "cors" },
            "spec": { "cors": { "allowOrigins": ["*"], "maxAge": 60 } },
        });
        let applied = cluster.apply(&policy.to_string());
        assert_eq!(applied[0]["spec"], policy["spec"], "{kind}");
        let patched =
            cluster.patch_status(kind, "shop", "cors", &json!({ "ancestors": [{ "any": "thing" }] }));
        assert_eq!(patched["status"]["ancestors"][0]["any"], "thing", "{kind}");
    }
    let ingress = cluster.apply(
        "
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata:
  name: cart
  annotations: { nginx.ingress.kubernetes.io/enable-cors: 'true' }
spec:
  ingressClassName: nginx
  rules:
    - host: cart.test
      http:
        paths: [{ path: /, pathType: Prefix, backend: { service: { name: cart, port: { number: 80 } } } }]
",
    );
    assert_eq!(ingress[0]["metadata"]["namespace"], "default");
    let lease = "{ apiVersion: coordination.k8s.io/v1, kind: Lease, metadata: { name: leader } }";
    cluster.apply(lease);
    cluster.delete("Lease", "default", "leader");
}

#[test]
fn a_token_may_do_what_its_rules_say() {
    if !can_run() {
        return;
    }
    let cluster = Cluster::start();
    cluster.apply(&route("shop", "cart"));
    let token = cluster.service_account("preflightd", "reader", &reader());
    let routes = routes(cluster.client(&token));
    let (listed, deleted) = cluster.run(async move {
        (
            routes.list(&ListParams::default()).await,
            routes.delete("cart", &kube::api::DeleteParams::default()).await,
        )
    });
    assert_eq!(listed.expect("may list").items.len(), 1);
    let refused = |error: &Error| matches!(error, Error::Api(status) if status.code == 403);
    assert!(refused(&deleted.expect_err("may not delete")), "deleting");
    let code = |token: &str| {
        let client = cluster.client(token);
        let asked = cluster.run(async move { routes_of(client).await });
        asked.expect_err("may not")
    };
    // Another account's, with no rules; and nobody's.
    let other = cluster.service_account("preflightd", "other", &json!([]));
    assert!(refused(&code(&other)), "without rules");
    assert!(matches!(code("no-token-at-all"), Error::Api(status) if status.code == 401), "no token");
    assert_ne!(cluster.token("preflightd", "reader"), token);
}

async fn routes_of(client: Client) -> Result<(), Error> {
    routes(client).list(&ListParams::default()).await.map(|_| ())
}

#[test]
fn a_watcher_comes_back_with_the_server() {
    if !can_run() {
        return;
    }
    let mut cluster = Cluster::start();
    cluster.apply(&route("shop", "cart"));
    let token = cluster.service_account("preflightd", "reader", &reader());
    let seen = Seen::of(&cluster, &token);
    seen.expect(["init", "cart", "ready"]);
    let address = cluster.address();
    cluster.stop_server();
    assert!(cluster.try_get("/readyz").is_err());
    cluster.start_server();
    assert_eq!(cluster.address(), address);
    cluster.apply(&route("shop", "pay"));
    // Whether it lists anew or goes on depends on when it comes.
    loop {
        match seen.next_but_errors("").1.as_str() {
            "pay" => break,
            "init" | "cart" => {}
            other => panic!("seen: {other}"),
        }
    }
    cluster.freeze_server();
    cluster.thaw_server();
    cluster.apply(&route("shop", "more"));
    while seen.next_but_errors("").1 != "more" {}
}

#[test]
fn compacted_versions_are_gone() {
    if !can_run() {
        return;
    }
    let mut cluster = Cluster::with(Options { watch_cache: false, ..Options::default() });
    cluster.apply(&route("shop", "cart"));
    let old = version(&cluster);
    let token = cluster.service_account("preflightd", "reader", &reader());
    let seen = Seen::of(&cluster, &token);
    seen.expect(["init", "cart", "ready"]);
    assert_eq!(watch_from(&cluster, &old), None, "before");
    let oldest = cluster.compact();
    assert!(oldest > old.parse().expect("a number"));
    assert_eq!(watch_from(&cluster, &old), Some(410), "after");
    assert_eq!(watch_from(&cluster, &version(&cluster)), None, "the present");
    // A watch that is under way does not mind.
    cluster.apply(&route("shop", "pay"));
    seen.expect(["pay"]);
    cluster.compact();
    cluster.stop_server();
    cluster.start_server();
    let (gone, first) = seen.next_but_errors("410");
    assert!(gone, "the watcher is told that its version is gone");
    assert_eq!(first, "init");
    seen.expect(["cart", "pay", "ready"]);
}

#[test]
fn a_server_that_was_away_has_no_old_versions() {
    if !can_run() {
        return;
    }
    let mut cluster = Cluster::start();
    cluster.apply(&route("shop", "cart"));
    let old = version(&cluster);
    cluster.apply(&route("shop", "pay"));
    cluster.compact();
    assert_eq!(watch_from(&cluster, &old), None, "out of memory");
    cluster.stop_server();
    cluster.start_server();
    assert_eq!(watch_from(&cluster, &old), Some(410), "out of an empty memory");
}

#[test]
fn many_objects() {
    if !can_run() {
        return;
    }
    let cluster = Cluster::start();
    cluster.apply(&route("shop", "cart"));
    let object = |i: usize| -> Value {
        json!({
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "HTTPRoute",
            "metadata": { "namespace": "shop", "name": format!("r{i}") },
            "spec": { "hostnames": [format!("r{i}.test")], "parentRefs": [{ "name": "web" }] },
        })
    };
    let start = std::time::Instant::now();
    assert_eq!(cluster.bulk((0..2000).map(object)), 2000);
    eprintln!("2000 objects in {:?}", start.elapsed());
    let routes = routes(cluster.admin());
    let listed = cluster.run(async move { routes.list_metadata(&ListParams::default()).await });
    assert_eq!(listed.expect("a list").items.len(), 2001);
}

#[test]
fn it_runs_in_a_network_namespace() {
    if !can_run() || !have_root() {
        return;
    }
    let netns = Netns::new("cluster");
    let cluster = Cluster::with(Options { netns: Some(&netns), crds: false, ..Options::default() });
    assert!(cluster.try_get("/apis/gateway.networking.k8s.io/v1").is_err(), "no custom resources");
    assert!(Plain::try_connect(cluster.address()).is_err(), "it is not on this loopback");
    netns.enter(|| Plain::connect(cluster.address()));
    cluster.install_crds();
    cluster.apply(&route("shop", "cart"));
}
