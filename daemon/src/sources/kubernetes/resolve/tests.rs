use super::*;
use crate::{
    policy::{Connection, Decision, ListenerSpec, Preflight, RouteLabels, Table},
    sources::kubernetes::{export, manifests},
};

fn world(text: &str) -> World {
    let mut world = World::default();
    manifests::read(text, &mut world).unwrap_or_else(|e| panic!("{e}\n{text}"));
    world
}

fn assuming(dialect: GatewayDialect) -> Settings {
    Settings { assume: Some(dialect), ..Settings::default() }
}

fn resolve(text: &str, settings: &Settings) -> Import {
    Resolver::default().resolve(&world(text), settings)
}

fn table_of(policies: &[PolicySpec]) -> Table {
    let listener = ListenerSpec {
        id: ListenerId(0),
        name: "web".into(),
        own_literals: vec![],
        loopback_is_own: true,
        public_ports: vec![],
    };
    Table::compile(&[listener], policies, &mut RouteLabels::new(1 << 16), 1).0
}

fn table(import: &Import) -> Table {
    let policies: Vec<PolicySpec> = import.policies.iter().map(|policy| policy.spec.clone()).collect();
    table_of(&policies)
}

/// The answer's head without its date, or why it passes.
fn ask(table: &Table, url: &str, origin: &str, method: &str, headers: &[&str]) -> String {
    let (host, path) = url.split_at(url.find('/').unwrap_or(url.len()));
    let headers: Vec<&[u8]> = headers.iter().map(|line| line.as_bytes()).collect();
    let request = Preflight {
        listener: ListenerId(0),
        host: host.as_bytes(),
        target: if path.is_empty() { b"/" } else { path.as_bytes() },
        origin: origin.as_bytes(),
        method: method.as_bytes(),
        headers: &headers,
        private_network: false,
    };
    match table.decide(&request) {
        Decision::Pass(reason, _) => reason.as_str().to_owned(),
        Decision::Answer(answer) => {
            let mut out = Vec::new();
            answer.render(b"Sun, 06 Nov 1994 08:49:37 GMT", Connection::KeepAlive, &mut out);
            let text = String::from_utf8(out).expect("ASCII");
            text.lines().filter(|line| !line.starts_with("Date:")).collect::<Vec<_>>().join("\n")
        }
    }
}

/// The same, cut down to the max-age, by which policies are told apart here.
fn age(table: &Table, url: &str, method: &str) -> String {
    let answer = ask(table, url, "https://app.example", method, &[]);
    let age = answer.lines().find_map(|line| {
        line.to_ascii_lowercase().strip_prefix("access-control-max-age: ").map(ToOwned::to_owned)
    });
    age.unwrap_or(answer)
}

fn codes(import: &Import) -> Vec<String> {
    import.findings.iter().map(|f| format!("{} {} {}", f.code, f.object, f.field)).collect()
}

/// A Gateway of this class with listeners `name port hostname`.
fn gateway(class: &str, listeners: &[(&str, u16, &str)]) -> String {
    let mut text = format!(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{name: web, namespace: infra}}\nspec:\n  gatewayClassName: {class}\n  listeners:\n"
    );
    for (name, port, hostname) in listeners {
        let hostname = if hostname.is_empty() { String::new() } else { format!(", hostname: '{hostname}'") };
        let rest = format!("protocol: HTTP{hostname}, allowedRoutes: {{namespaces: {{from: All}}}}");
        text = format!("{text}  - {{name: {name}, port: {port}, {rest}}}\n");
    }
    text
}

fn class(name: &str, controller: &str) -> String {
    format!(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: GatewayClass\nmetadata: {{name: {name}}}\nspec: {{controllerName: {controller}}}\n"
    )
}

/// An HTTPRoute of the namespace `shop` at the Gateway `infra/web`.
fn route(name: &str, created: &str, hosts: &[&str], rules: &str) -> String {
    let hosts = hosts.iter().map(|host| format!("'{host}'")).collect::<Vec<_>>().join(", ");
    format!(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: {name}, namespace: shop, creationTimestamp: '{created}'}}\nspec:\n  parentRefs: [{{name: web, namespace: infra}}]\n  hostnames: [{hosts}]\n  rules:\n{rules}"
    )
}

/// A rule with a filter that is told by its max-age; 0: without one.
fn rule(matches: &str, max_age: u32) -> String {
    let filters = if max_age == 0 {
        String::new()
    } else {
        format!(
            "    filters: [{{type: CORS, cors: {{allowOrigins: ['https://app.example'], allowMethods: [PUT], maxAge: {max_age}}}}}]\n"
        )
    };
    format!("  - matches: [{matches}]\n{filters}    backendRefs: [{{name: api, port: 80}}]\n")
}

const PREFIX: &str = "{path: {type: PathPrefix, value: ";

fn prefix(path: &str, more: &str) -> String {
    format!("{PREFIX}'{path}'}}{more}}}")
}

#[test]
fn precedence_of_routes() {
    let rules = [
        rule(&prefix("/", ""), 1),
        rule(&prefix("/api", ""), 2),
        rule(&prefix("/api/deep/", ""), 3),
        rule("{path: {type: Exact, value: /api/deep/x}}", 4),
        rule(&prefix("/none", ""), 0),
        // By method; GET alone has no rule for others but that of the shorter path.
        rule(&prefix("/by", ", method: GET"), 5),
        rule(&prefix("/by", ", method: PUT"), 6),
        rule(&prefix("/same", ", method: GET"), 7),
        rule(&prefix("/same", ""), 7),
        // An OPTIONS rule to the same backend, and one with other rules.
        rule(&prefix("/options", ", method: OPTIONS"), 8),
        rule(&prefix("/options", ""), 8),
        rule(&prefix("/other", ", method: OPTIONS"), 0),
        rule(&prefix("/other", ""), 9),
        // By header and query: alike, and not.
        rule(&prefix("/alike", ", headers: [{name: v, value: '2'}]"), 10),
        rule(&prefix("/alike", ""), 10),
        rule(&prefix("/header", ", headers: [{name: v, value: '2'}]"), 11),
        rule(&prefix("/header", ""), 12),
        rule(&prefix("/query", ", queryParams: [{name: v, value: '2'}]"), 13),
        rule("{path: {type: RegularExpression, value: '/v[0-9]+/.*'}}", 14),
        rule("{path: {type: Nonsense, value: '/x'}}", 15),
    ];
    let older = route("older", "2024-01-01T00:00:00Z", &["a.example"], &rules[..18].concat());
    let newer = route("newer", "2025-01-01T00:00:00Z", &["a.example"], &rule(&prefix("/api", ""), 20));
    let regex = route(
        "regex",
        "2025-01-01T00:00:00Z",
        &["r.example"],
        &(rules[18].clone() + &rule(&prefix("/v1", ""), 16)),
    );
    let odd = route("odd", "2025-01-01T00:00:00Z", &["o.example"], &(rules[19].clone() + &rules[0]));
    let text = [newer, older, regex, odd].concat();
    let import = resolve(&text, &assuming(GatewayDialect::Envoy));
    let made = table(&import);
    for (url, method, expected) in [
        ("a.example/", "PUT", "1"),
        ("a.example/x", "DELETE", "1"),
        ("a.example/api", "PUT", "2"),
        ("a.example/apis", "PUT", "1"),
        // To Envoy it is `/api/deep/` as it stands.
        ("a.example/api/deep", "PUT", "unsupported"),
        ("a.example/api/deep/", "PUT", "3"),
        ("a.example/api/deep/x", "PUT", "4"),
        ("a.example/api/deep/x/y", "PUT", "3"),
        ("a.example/none/x", "PUT", "no_cors"),
        ("a.example/by", "GET", "5"),
        ("a.example/by/x", "PUT", "6"),
        ("a.example/by", "DELETE", "1"),
        ("a.example/same", "GET", "7"),
        ("a.example/same", "PUT", "7"),
        ("a.example/options", "PUT", "8"),
        ("a.example/other", "PUT", "unsupported"),
        ("a.example/alike", "PUT", "10"),
        ("a.example/header", "PUT", "unsupported"),
        ("a.example/query", "PUT", "unsupported"),
        ("r.example/v2/x", "PUT", "14"),
        // A pattern and a prefix: which goes first is each proxy's own.
        ("r.example/v1/x", "PUT", "conflict"),
        ("r.example/v1", "PUT", "16"),
        ("o.example/", "PUT", "conflict"),
        ("b.example/", "PUT", "no_host"),
    ] {
        assert_eq!(age(&made, url, method), expected, "{method} {url}");
    }
}

#[test]
fn hosts_and_listeners() {
    let all = rule(&prefix("/", ""), 1);
    let text = [
        class("kgateway", "kgateway.dev/kgateway"),
        gateway(
            "kgateway",
            &[("any", 80, ""), ("special", 80, "special.example"), ("wild", 8080, "*.wild.example")],
        ),
        route("plain", "2024-01-01T00:00:00Z", &["plain.example", "*.plain.example"], &all),
        route("any", "2024-01-01T00:00:00Z", &[], &rule(&prefix("/", ""), 2)),
        route("special", "2024-01-01T00:00:00Z", &["special.example"], &rule(&prefix("/", ""), 3))
            .replace("namespace: infra}]", "namespace: infra, sectionName: any}]"),
        route(
            "deep",
            "2024-01-01T00:00:00Z",
            &["x.y.wild.example", "wild.example"],
            &rule(&prefix("/", ""), 4),
        )
        .replace("namespace: infra}]", "namespace: infra, sectionName: wild}]"),
    ]
    .concat();
    let import = resolve(&text, &assuming(GatewayDialect::Unknown));
    let made = table(&import);
    for (url, expected) in [
        ("plain.example/", "1"),
        ("a.plain.example/", "1"),
        ("a.b.plain.example/", "1"),
        ("elsewhere.example/", "2"),
        // On another port: which of the two a request came to is not known here.
        ("x.y.wild.example/", "conflict"),
        // The listener that has this name has its requests.
        ("special.example/", "conflict"),
        // Not within the listener's hostname, so not of that route.
        ("wild.example/", "2"),
    ] {
        assert_eq!(age(&made, url, "PUT"), expected, "{url}");
    }
}

#[test]
fn only_what_the_controller_has_accepted() {
    let text = [
        class("kgateway", "kgateway.dev/kgateway"),
        gateway("kgateway", &[("http", 80, "")]),
        route("taken", "2024-01-01T00:00:00Z", &["yes.example"], &rule(&prefix("/", ""), 1)),
        route("refused", "2024-01-01T00:00:00Z", &["no.example"], &rule(&prefix("/", ""), 2)),
        route("new", "2024-01-01T00:00:00Z", &["new.example"], &rule(&prefix("/", ""), 3)),
        route("broken", "2024-01-01T00:00:00Z", &["broken.example"], &rule(&prefix("/", ""), 4)),
    ]
    .concat();
    let mut objects = world(&text);
    let accept = |objects: &mut World, name: &str, accepted: &str, resolved: &str| {
        let status: RouteStatus = serde_json::from_value(serde_json::json!({ "parents": [{
            "parentRef": { "name": "web", "namespace": "infra" },
            "controllerName": "kgateway.dev/kgateway",
            "conditions": [
                { "type": "Accepted", "status": accepted }, { "type": "ResolvedRefs", "status": resolved }
            ]
        }]}))
        .expect("a status");
        let object = objects.http_routes.get_mut(&Key::new("shop", name)).expect("a route");
        Arc::make_mut(object).status = status;
    };
    accept(&mut objects, "taken", "True", "True");
    accept(&mut objects, "refused", "False", "True");
    accept(&mut objects, "broken", "True", "False");
    let made = table(&Resolver::default().resolve(&objects, &Settings::default()));
    for (url, expected) in [
        ("yes.example/", "1"),
        ("no.example/", "no_host"),
        ("new.example/", "no_host"),
        ("broken.example/", "unsupported"),
    ] {
        assert_eq!(age(&made, url, "PUT"), expected, "{url}");
    }
    let other = Settings { gateway_classes: vec!["other".into()], ..Settings::default() };
    assert!(Resolver::default().resolve(&objects, &other).policies.is_empty());
}

use super::super::objects::RouteStatus;

/// A TrafficPolicy of the namespace.
fn traffic_policy(name: &str, namespace: &str, created: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: gateway.kgateway.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: {name}, namespace: {namespace}, creationTimestamp: '{created}'}}\nspec: {{{spec}}}\n"
    )
}

#[test]
fn precedence_of_kgateways_policies() {
    let cors = |age: u32| format!("cors: {{allowOrigins: ['https://app.example'], maxAge: {age}}}");
    let to = |kind: &str, name: &str, section: &str| {
        let section = if section.is_empty() { String::new() } else { format!(", sectionName: {section}") };
        format!("targetRefs: [{{group: gateway.networking.k8s.io, kind: {kind}, name: {name}{section}}}]")
    };
    let (old, new) = ("2024-01-01T00:00:00Z", "2025-01-01T00:00:00Z");
    let extension = "    filters: [{type: ExtensionRef, extensionRef: {group: gateway.kgateway.dev, kind: TrafficPolicy, name: referred}}]\n";
    let named = |name: &str, rule: String| rule.replacen("  - ", &format!("  - name: {name}\n    "), 1);
    let with_extension =
        rule(&prefix("/ext", ""), 0).replace("    backendRefs", &format!("{extension}    backendRefs"));
    let text = [
        class("kgateway", "kgateway.dev/kgateway"),
        gateway("kgateway", &[("http", 80, ""), ("other", 8080, "other.example")]),
        route(
            "api",
            old,
            &["a.example"],
            &[
                rule(&prefix("/own", ""), 1),
                with_extension,
                named("sec", rule(&prefix("/sec", ""), 0)),
                rule(&prefix("/", ""), 0),
            ]
            .concat(),
        ),
        route("bare", old, &["bare.example"], &rule(&prefix("/", ""), 0)),
        route("disabled", old, &["off.example"], &rule(&prefix("/", ""), 0)),
        route("else", old, &["other.example"], &rule(&prefix("/", ""), 0))
            .replace("namespace: infra}]", "namespace: infra, sectionName: other}]"),
        route("changed", old, &["changed.example"], &rule(&prefix("/", ""), 9)),
        traffic_policy("referred", "shop", new, &cors(2)),
        traffic_policy("section", "shop", new, &format!("{}, {}", to("HTTPRoute", "api", "sec"), cors(3))),
        traffic_policy("whole", "shop", old, &format!("{}, {}", to("HTTPRoute", "api", ""), cors(4))),
        traffic_policy("younger", "shop", new, &format!("{}, {}", to("HTTPRoute", "api", ""), cors(5))),
        traffic_policy("listener", "infra", new, &format!("{}, {}", to("Gateway", "web", "http"), cors(6))),
        traffic_policy(
            "gateway",
            "infra",
            old,
            &format!(
                "{}, cors: {{allowOrigins: ['https://app.example'], allowHeaders: [x-filled], maxAge: 7}}",
                to("Gateway", "web", "")
            ),
        ),
        traffic_policy(
            "disabling",
            "shop",
            old,
            &format!("{}, cors: {{disable: {{}}}}", to("HTTPRoute", "disabled", "")),
        ),
        traffic_policy(
            "changes",
            "shop",
            old,
            &format!("{}, transformation: {{response: {{}}}}", to("HTTPRoute", "changed", "")),
        ),
    ]
    .concat();
    let import = resolve(&text, &assuming(GatewayDialect::Unknown));
    let made = table(&import);
    for (url, expected) in [
        ("a.example/own", "1"),
        ("a.example/ext", "2"),
        ("a.example/sec", "3"),
        ("a.example/", "4"),
        ("bare.example/", "6"),
        ("other.example/", "7"),
        ("off.example/", "disabled"),
        ("changed.example/", "unsupported"),
    ] {
        assert_eq!(age(&made, url, "GET"), expected, "{url}");
    }
    assert_eq!(
        codes(&import).iter().filter(|c| c.starts_with("policy-unmodelled")).collect::<Vec<_>>(),
        ["policy-unmodelled TrafficPolicy shop/changes spec.transformation"]
    );
    // Fields that the route's policy leaves out are the listener's: of the listener's policy as a whole.
    let text = text
        .replace("name: listener,", "name: listener2,")
        .replace("sectionName: http}", "sectionName: none}");
    let made = table(&resolve(&text, &assuming(GatewayDialect::Unknown)));
    let answer = ask(&made, "a.example/", "https://app.example", "GET", &[]);
    assert!(
        answer.contains("access-control-allow-headers: x-filled") && answer.contains("max-age: 4"),
        "{answer}"
    );
}

#[test]
fn origins_of_kgateway() {
    let origins = "['https://*.wild.example', 'https://exact.example/', 'http://localhost:8080']";
    let text = route(
        "api",
        "",
        &["a.example"],
        &format!(
            "  - filters: [{{type: CORS, cors: {{allowOrigins: {origins}}}}}]\n    backendRefs: [{{name: api, port: 80}}]\n"
        ),
    );
    let made = table(&resolve(&text, &assuming(GatewayDialect::Envoy)));
    for (origin, allowed) in [
        ("https://app.wild.example", true),
        ("https://a.bc.wild.example", true),
        // kgateway's pattern needs two characters there, and its dots are any: the proxy answers.
        ("https://a.wild.example", false),
        ("https://appxwild.example", false),
        ("https://wild.example", false),
        ("https://app.wild.example.evil", false),
        ("https://exact.example/", true),
        ("https://exact.example", false),
        ("http://localhost:8080", true),
    ] {
        let answer = ask(&made, "a.example/", origin, "GET", &[]);
        assert_eq!(answer.starts_with("HTTP/1.1 200"), allowed, "{origin}: {answer}");
        assert!(allowed || answer == "origin_not_allowed", "{origin}: {answer}");
    }
}

#[test]
fn backends() {
    let cors = |age: u32| {
        format!("filters: [{{type: CORS, cors: {{allowOrigins: ['https://app.example'], maxAge: {age}}}}}]")
    };
    let backends = |path: &str, list: &[String]| {
        format!("  - matches: [{}]\n    backendRefs: [{}]\n", prefix(path, ""), list.join(", "))
    };
    let one =
        |name: &str, weight: u32, rest: &str| format!("{{name: {name}, port: 80, weight: {weight}, {rest}}}");
    let rules = [
        backends("/same", &[one("a", 1, &cors(1)), one("b", 1, &cors(1))]),
        backends("/differ", &[one("a", 1, &cors(1)), one("b", 1, &cors(2))]),
        backends("/idle", &[one("a", 1, &cors(3)), one("b", 0, &cors(2))]),
        backends("/half", &[one("a", 1, &cors(3)), one("b", 1, "filters: []")]),
        backends("/delegated", &[one("a", 1, "kind: HTTPRoute")]),
        backends("/foreign", &[one("a", 1, &format!("namespace: other, {}", cors(4)))]),
        backends("/granted", &[one("b", 1, &format!("namespace: other, {}", cors(5)))]),
        "  - matches: [{path: {value: /redirect}}]\n    filters: [{type: RequestRedirect, requestRedirect: {scheme: https}}]\n".to_owned(),
        rule(&prefix("/headers", ""), 6).replace("filters: [", "filters: [{type: ResponseHeaderModifier}, "),
        rule(&prefix("/twice", ""), 7).replace("filters: [", "filters: [{type: CORS, cors: {}}, "),
    ];
    let grant = "---\napiVersion: gateway.networking.k8s.io/v1beta1\nkind: ReferenceGrant\nmetadata: {name: g, namespace: other}\nspec:\n  from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: shop}]\n  to: [{group: '', kind: Service, name: b}]\n";
    let text = route("api", "", &["a.example"], &rules.concat()) + grant;
    let import = resolve(&text, &assuming(GatewayDialect::GatewayApi));
    let made = table(&import);
    for (path, expected) in [
        ("/same", "1"),
        ("/differ", "unsupported"),
        ("/idle", "3"),
        ("/half", "unsupported"),
        ("/delegated", "unsupported"),
        ("/foreign", "unsupported"),
        ("/granted", "5"),
        ("/redirect", "unsupported"),
        ("/headers", "unsupported"),
        ("/twice", "unsupported"),
    ] {
        assert_eq!(age(&made, &format!("a.example{path}"), "GET"), expected, "{path}");
    }
    for code in ["backends-differ", "reference-not-granted", "cors-repeated"] {
        assert!(codes(&import).iter().any(|c| c.starts_with(code)), "{code}: {:?}", codes(&import));
    }
}

#[test]
fn objects_and_namespaces_opt_out() {
    let text = [
        route("a", "", &["a.example"], &rule(&prefix("/", ""), 1))
            .replace("namespace: shop,", "namespace: shop, annotations: {preflightd.io/answer: 'false'},"),
        route("b", "", &["b.example"], &rule(&prefix("/", ""), 2)),
        "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: shop, annotations: {preflightd.io/answer: 'NO'}}\n".to_owned(),
    ]
    .concat();
    for (text, expected) in [(text.clone(), "2"), (text.replace("'NO'", "'false'"), "disabled")] {
        let made = table(&resolve(&text, &assuming(GatewayDialect::GatewayApi)));
        assert_eq!(age(&made, "a.example/", "GET"), "disabled");
        assert_eq!(age(&made, "b.example/", "GET"), expected);
    }
}

/// An Ingress of the class `nginx`; `paths` are `type path`.
fn ingress(name: &str, created: &str, annotations: &str, host: &str, paths: &[&str], more: &str) -> String {
    let paths = paths
        .iter()
        .map(|path| {
            let (kind, path) = path.split_once(' ').expect("a type and a path");
            format!("{{path: '{path}', pathType: {kind}, backend: {{service: {{name: a, port: {{number: 80}}}}}}}}")
        })
        .collect::<Vec<_>>()
        .join(", ");
    let host = if host.is_empty() { String::new() } else { format!("host: '{host}', ") };
    format!(
        "---\napiVersion: networking.k8s.io/v1\nkind: Ingress\nmetadata: {{name: {name}, namespace: shop, creationTimestamp: '{created}', annotations: {{{annotations}}}}}\nspec: {{ingressClassName: nginx, rules: [{{{host}http: {{paths: [{paths}]}}}}]{more}}}\n"
    )
}

fn cors(age: u32) -> String {
    format!(
        "nginx.ingress.kubernetes.io/enable-cors: 'true', nginx.ingress.kubernetes.io/cors-allow-origin: 'https://app.example', nginx.ingress.kubernetes.io/cors-max-age: '{age}'"
    )
}

#[test]
fn paths_of_ingresses() {
    let (old, new) = ("2024-01-01T00:00:00Z", "2025-01-01T00:00:00Z");
    let annotated = |age: u32, more: &str| format!("{}, nginx.ingress.kubernetes.io/{more}", cors(age));
    let text = [
        ingress(
            "types",
            old,
            &cors(1),
            "types.example",
            &["Prefix /p/", "Exact /e", "ImplementationSpecific /i", "ImplementationSpecific /d/"],
            "",
        ),
        ingress("root", old, &cors(2), "two.example", &["Prefix /"], ""),
        ingress(
            "strings",
            old,
            &cors(3),
            "two.example",
            &["ImplementationSpecific /api", "ImplementationSpecific /dir/"],
            "",
        ),
        ingress("late", new, &cors(4), "two.example", &["Prefix /", "Prefix /late"], ""),
        ingress("none", old, "", "two.example", &["Prefix /none"], ""),
        ingress("wild", old, &cors(5), "*.wild.example", &["Prefix /"], ""),
        ingress(
            "regex",
            old,
            &annotated(6, "use-regex: 'true'"),
            "regex.example",
            &["ImplementationSpecific /v[0-9]"],
            "",
        ),
        ingress("plain", old, &cors(7), "regex.example", &["Prefix /plain"], ""),
        ingress("tls", old, &cors(8), "tls.example", &["Prefix /"], ", tls: [{hosts: [tls.example]}]"),
        ingress(
            "ended",
            old,
            &annotated(9, "ssl-redirect: 'false'"),
            "ended.example",
            &["Prefix /"],
            ", tls: [{hosts: [ended.example]}]",
        ),
        ingress(
            "snippet",
            old,
            &annotated(10, "configuration-snippet: 'return 204;'"),
            "snippet.example",
            &["Prefix /"],
            "",
        ),
        ingress("canary", old, &annotated(11, "canary: 'true'"), "canary.example", &["Prefix /"], ""),
        ingress(
            "alias",
            old,
            &annotated(12, "server-alias: 'alias.example'"),
            "named.example",
            &["Prefix /"],
            "",
        ),
        ingress("all", old, &cors(13), "", &["Prefix /"], ""),
        ingress("other", old, &cors(14), "other.example", &["Prefix /"], "")
            .replace("ingressClassName: nginx", "ingressClassName: traefik"),
    ]
    .concat();
    let import = resolve(&text, &assuming(GatewayDialect::Unknown));
    let made = table(&import);
    for (url, expected) in [
        // nginx redirects what has lost its slash.
        ("types.example/p", "unsupported"),
        ("types.example/p/x", "1"),
        ("types.example/px", "no_route"),
        ("types.example/e", "1"),
        ("types.example/e/", "no_route"),
        ("types.example/i", "1"),
        ("types.example/i/x", "1"),
        // `/i` has it too, and nobody else: not answering is no harm.
        ("types.example/ix", "no_route"),
        ("types.example/d/x", "1"),
        ("types.example/d", "unsupported"),
        ("two.example/", "2"),
        ("two.example/late", "4"),
        ("two.example/none/x", "no_cors"),
        // `/api` has `/apis` too, and what is not `/` there is a question of strings.
        ("two.example/api/x", "conflict"),
        ("two.example/apis", "conflict"),
        ("two.example/dir/x", "3"),
        ("two.example/dir", "unsupported"),
        ("a.wild.example/", "5"),
        // One label only: then it is the host of all names.
        ("a.b.wild.example/", "13"),
        ("regex.example/plain", "unsupported"),
        ("tls.example/", "unsupported"),
        ("ended.example/", "9"),
        ("snippet.example/", "unsupported"),
        ("canary.example/", "13"),
        ("named.example/", "12"),
        ("alias.example/", "unsupported"),
        ("elsewhere.example/", "13"),
        ("other.example/", "13"),
    ] {
        assert_eq!(age(&made, url, "GET"), expected, "{url}");
    }
    let codes = codes(&import);
    for code in [
        "redirects-to-https Ingress shop/tls",
        "annotation-unmodelled Ingress shop/snippet",
        "host-by-regex Ingress shop/regex",
    ] {
        assert!(codes.iter().any(|c| c.starts_with(code)), "{code}: {codes:#?}");
    }
}

#[test]
fn classes_of_ingresses() {
    let class = |name: &str, controller: &str, default: bool| {
        format!(
            "---\napiVersion: networking.k8s.io/v1\nkind: IngressClass\nmetadata: {{name: {name}, annotations: {{ingressclass.kubernetes.io/is-default-class: '{default}'}}}}\nspec: {{controller: {controller}}}\n"
        )
    };
    let text = [
        class("inner", "k8s.io/ingress-nginx", true),
        class("outer", "k8s.io/ingress-nginx", false),
        class("traefik", "traefik.io/ingress-controller", false),
        ingress("a", "", &cors(1), "a.example", &["Prefix /"], "").replace("ingressClassName: nginx, ", ""),
        ingress("b", "", &cors(2), "b.example", &["Prefix /"], "")
            .replace("ingressClassName: nginx", "ingressClassName: outer"),
        ingress("c", "", &cors(3), "c.example", &["Prefix /"], "")
            .replace("ingressClassName: nginx", "ingressClassName: traefik"),
        ingress(
            "d",
            "",
            &format!("{}, kubernetes.io/ingress.class: outer", cors(4)),
            "d.example",
            &["Prefix /"],
            "",
        )
        .replace("ingressClassName: nginx, ", ""),
        ingress("e", "", &cors(5), "e.example", &["Prefix /"], ""),
    ]
    .concat();
    let objects = world(&text);
    for (wanted, expected) in [
        // What names no class, or only by the old annotation, its controller may have or not.
        (&[][..], ["unsupported", "2", "no_host", "unsupported", "no_host"]),
        (&["outer"], ["no_host", "2", "no_host", "4", "no_host"]),
        (&["traefik"], ["no_host", "no_host", "3", "no_host", "no_host"]),
    ] {
        let ingress_classes = wanted.iter().map(|name| (*name).to_owned()).collect();
        let settings = Settings { ingress_classes, ..Settings::default() };
        let made = table(&Resolver::default().resolve(&objects, &settings));
        let got = ["a", "b", "c", "d", "e"].map(|host| age(&made, &format!("{host}.example/"), "GET"));
        assert_eq!(got, expected, "{wanted:?}");
    }
}

#[test]
fn listeners_have_their_own_objects() {
    let text = [
        class("kgateway", "kgateway.dev/kgateway"),
        gateway("kgateway", &[("http", 80, ""), ("inner", 8080, "")]),
        route("both", "", &["a.example"], &rule(&prefix("/", ""), 1)),
        ingress("i", "", &cors(2), "i.example", &["Prefix /"], ""),
    ]
    .concat();
    let scope = |listener: u16, gateways: &[&str], classes: &[&str]| Scope {
        listener: ListenerId(listener),
        gateways: gateways.iter().map(|name| (*name).to_owned()).collect(),
        ingress_classes: classes.iter().map(|name| (*name).to_owned()).collect(),
    };
    let settings = |listeners: Vec<Scope>| Settings { listeners, ..assuming(GatewayDialect::Unknown) };
    let listeners = |settings: &Settings, kind: &str| -> Vec<Vec<u16>> {
        let import = resolve(&text, settings);
        let of = import.policies.into_iter().filter(|policy| policy.object.kind == kind);
        of.map(|policy| policy.spec.listeners.iter().map(|id| id.0).collect()).collect()
    };
    let all = settings(vec![scope(0, &[], &[]), scope(1, &[], &[])]);
    assert_eq!(listeners(&all, "HTTPRoute"), [Vec::<u16>::new()]);
    let one = settings(vec![scope(0, &["infra/web/http"], &[]), scope(1, &[], &["nginx"])]);
    assert_eq!(listeners(&one, "HTTPRoute"), [[0]]);
    assert_eq!(listeners(&one, "Ingress"), [[1]]);
    let none = settings(vec![scope(0, &["infra/other"], &[]), scope(1, &["infra/web"], &[])]);
    assert_eq!(listeners(&none, "HTTPRoute"), [[1]]);
    assert!(listeners(&none, "Ingress").is_empty());
}

#[test]
fn what_cannot_be_read_may_have_any_host() {
    let text = [
        route("good", "", &["good.example"], &rule(&prefix("/", ""), 1)),
        route("bad", "", &["bad.example"], "    nonsense\n"),
        route("later", "", &["later.example"], &rule(&prefix("/", ""), 2))
            .replace("maxAge: 2", "maxAge: 2, fromTheFuture: true"),
        route("filter", "", &["filter.example"], &rule(&prefix("/", ""), 3))
            .replace("filters: [", "filters: [{type: FromTheFuture}, "),
    ]
    .concat();
    let import = resolve(&text, &assuming(GatewayDialect::GatewayApi));
    assert_eq!(age(&table(&import), "good.example/", "GET"), "unsupported");
    let mut readable = world(&text);
    readable.unreadable.clear();
    let made = table(&Resolver::default().resolve(&readable, &assuming(GatewayDialect::GatewayApi)));
    assert_eq!(age(&made, "good.example/", "GET"), "1");
    assert_eq!(age(&made, "later.example/", "GET"), "unsupported");
    assert_eq!(age(&made, "filter.example/", "GET"), "unsupported");
    let codes = codes(&import);
    assert!(codes.iter().any(|c| c.starts_with("object-unreadable HTTPRoute shop/bad")), "{codes:?}");
    assert!(
        codes
            .iter()
            .any(|c| c.starts_with("cors-unreadable HTTPRoute shop/later spec.rules[0].filters[0].cors")),
        "{codes:?}"
    );
}

/// What is exported and read back decides alike.
#[test]
fn policies_survive_a_policy_file() {
    let text = [
        class("kgateway", "kgateway.dev/kgateway"),
        gateway("kgateway", &[("http", 80, "")]),
        route(
            "api",
            "",
            &["a.example", "*.b.example"],
            &[
                rule(&prefix("/by", ", method: PUT"), 1),
                rule(&prefix("/", ""), 2),
                rule("{path: {type: Exact, value: '/x'}}", 0),
            ]
            .concat(),
        ),
        ingress("wild", "", &cors(5), "*.wild.example", &["Prefix /"], ""),
        ingress("none", "", "", "*.none.example", &["Prefix /"], ""),
        ingress("strings", "", &cors(3), "two.example", &["ImplementationSpecific /api"], ""),
        ingress("root", "", &cors(4), "two.example", &["Prefix /"], ""),
    ]
    .concat();
    let import = resolve(&text, &assuming(GatewayDialect::Unknown));
    let toml = export::to_toml(&import.policies);
    let (config, findings) = crate::config::load_str(
        "exported.toml",
        &format!(
            "{toml}\n[[listener]]\nname = \"web\"\naddress = \"127.0.0.1:1\"\nupstream = \"127.0.0.1:2\"\n"
        ),
    );
    let config = config.unwrap_or_else(|| panic!("{findings:#?}\n{toml}"));
    let (before, after) = (table(&import), table_of(&config.policies));
    for url in [
        "a.example/",
        "a.example/by",
        "a.example/x",
        "x.b.example/",
        "x.y.b.example/by/1",
        "a.wild.example/",
        "a.b.wild.example/",
        "x.none.example/",
        "two.example/api",
        "two.example/apis",
        "two.example/",
    ] {
        for method in ["GET", "PUT"] {
            for origin in ["https://app.example", "https://evil.example"] {
                let (one, two) =
                    (ask(&before, url, origin, method, &["x-a"]), ask(&after, url, origin, method, &["x-a"]));
                let passed = |text: &str| !text.starts_with("HTTP");
                assert!(
                    one == two || passed(&one) && passed(&two),
                    "{method} {url} {origin}: {one}\n{two}\n{toml}"
                );
            }
        }
    }
}

use proptest::prelude::*;

const HOSTS: &[&str] = &["a.example", "*.example", "b.a.example", "*.a.example"];
const PATHS: &[&str] = &["/", "/x", "/x/", "/x/y", "/xy"];

prop_compose! {
    /// A rule in YAML.
    fn any_rule()(
        path in 0..PATHS.len(), kind in 0..3usize, method in 0..4usize, header in any::<bool>(), age in 0..4u32,
    ) -> String {
        let kind = ["PathPrefix", "Exact", "RegularExpression"][kind];
        let method = ["", ", method: PUT", ", method: GET", ", method: OPTIONS"][method];
        let header = if header && age == 1 { ", headers: [{name: v, value: '1'}]" } else { "" };
        rule(&format!("{{path: {{type: {kind}, value: '{}'}}{method}{header}}}", PATHS[path]), age)
    }
}

prop_compose! {
    /// Objects in YAML.
    fn any_objects()(
        routes in prop::collection::vec((0..HOSTS.len(), prop::collection::vec(any_rule(), 1..4)), 1..5),
        ingresses in prop::collection::vec((0..HOSTS.len(), 0..PATHS.len(), 0..3usize, 0..3u32), 0..4),
    ) -> String {
        let routes = routes.iter().enumerate().map(|(i, (host, rules))| {
            route(&format!("r{i}"), &format!("202{i}-01-01T00:00:00Z"), &[HOSTS[*host]], &rules.concat())
        });
        let ingresses = ingresses.iter().enumerate().map(|(i, (host, path, kind, age))| {
            let kind = ["Prefix", "Exact", "ImplementationSpecific"][*kind];
            let annotations = if *age == 0 { String::new() } else { cors(*age) };
            let host = HOSTS[*host].replace("example", "test");
            ingress(&format!("i{i}"), "", &annotations, &host, &[&format!("{kind} {}", PATHS[*path])], "")
        });
        routes.chain(ingresses).collect::<Vec<_>>().concat()
    }
}

/// By the rules of the Gateway API, one request at a time: which max-age answers; `None`: the proxy.
fn model(objects: &World, host: &str, path: &str, method: &str) -> Option<i32> {
    // The most specific host, by its length.
    let matches = |pattern: &str| {
        pattern.strip_prefix('*').map_or(pattern == host, |end| host.ends_with(end) && host.len() > end.len())
    };
    let best = objects
        .http_routes
        .values()
        .flat_map(|r| &r.spec.hostnames)
        .filter(|h| matches(h))
        .max_by_key(|h| (!h.starts_with('*'), h.len()))?;
    let mut routes: Vec<_> =
        objects.http_routes.values().filter(|r| r.spec.hostnames.contains(best)).collect();
    routes.sort_by_key(|r| r.meta.creation_timestamp.clone());
    let asks = |asked: &str, with_header: bool| {
        let mut found: Vec<(usize, usize, bool, bool, usize, Option<i32>)> = Vec::new();
        for (number, rule) in routes.iter().flat_map(|r| &r.spec.rules).enumerate() {
            let wanted = &rule.matches[0];
            let (kind, value) = wanted
                .path
                .as_ref()
                .map(|p| (p.kind.clone().unwrap_or_default(), p.value.clone().unwrap_or_default()))
                .unwrap_or_default();
            let prefix = value.trim_end_matches('/');
            let (rank, length) = match &*kind {
                "Exact" if path == value => (2, value.len()),
                "PathPrefix" if path == prefix || path.starts_with(&format!("{prefix}/")) => {
                    (1, prefix.len())
                }
                _ => continue,
            };
            if wanted.method.as_deref().is_some_and(|m| m != asked) || wanted.headers > 0 && !with_header {
                continue;
            }
            let age =
                rule.filters.first().and_then(|f| f.cors.as_ref()).and_then(|c| c.0.as_ref().ok()?.max_age);
            found.push((rank, length, wanted.method.is_some(), wanted.headers > 0, usize::MAX - number, age));
        }
        found.into_iter().max().map(|best| best.5)
    };
    let (plain, with) = (asks(method, false), asks(method, true));
    (plain == with).then_some(plain?)?
}

proptest! {
    /// An answer is always that of the rule that the Gateway API names, whatever else is there; and the same from a policy
    /// file.
    #[test]
    fn answers_are_those_of_the_rule_that_has_the_request(text in any_objects()) {
        let objects = world(&text);
        let import = Resolver::default().resolve(&objects, &assuming(GatewayDialect::GatewayApi));
        let made = table(&import);
        let toml = export::to_toml(&import.policies);
        let listener = "\n[[listener]]\nname = \"web\"\naddress = \"127.0.0.1:1\"\nupstream = \"127.0.0.1:2\"\n";
        let (config, findings) = crate::config::load_str("exported.toml", &(toml.clone() + listener));
        prop_assert!(config.is_some(), "{findings:#?}\n{toml}");
        let again = table_of(&config.expect("it is there").policies);
        for host in ["a.example", "b.a.example", "c.a.example", "c.example", "d.c.example", "a.test", "b.test", "c.b.test"] {
            for path in ["/", "/x", "/x/", "/x/y", "/x/z", "/xy", "/xyz", "/z"] {
                for method in ["PUT", "GET", "DELETE"] {
                    let url = format!("{host}{path}");
                    let answer = age(&made, &url, method);
                    let number = answer.parse::<i32>().ok();
                    // Where a pattern stands among rules is each proxy's own.
                    let pattern = text.contains(&format!("type: RegularExpression, value: '{path}'"));
                    if host.ends_with("example") && number.is_some() && !pattern {
                        prop_assert_eq!(number, model(&objects, host, path, method), "{} {}\n{}", method, url, text);
                    }
                    let other = age(&again, &url, method);
                    prop_assert_eq!(number, other.parse::<i32>().ok(), "{} {}: {} {}\n{}\n{}", method, url, answer, other, text, toml);
                }
            }
        }
    }
}

/// What others have on a host is not answered for, in whatever way they have it.
#[test]
fn what_others_have_is_theirs() {
    let any = || rule(&prefix("/", ""), 1);
    let nginx = "nginx.ingress.kubernetes.io/";
    let grpc = "---\napiVersion: gateway.networking.k8s.io/v1\nkind: GRPCRoute\nmetadata: {name: g, namespace: shop}\nspec:\n  parentRefs: [{name: web, namespace: infra}]\n  hostnames: [grpc.example]\n  rules: [{matches: [{method: {service: x}}]}]\n";
    let set = "---\napiVersion: gateway.networking.x-k8s.io/v1alpha1\nkind: XListenerSet\nmetadata: {name: s, namespace: other}\nspec:\n  parentRef: {name: web, namespace: infra}\n  listeners: [{name: l, hostname: set.example, port: 80, protocol: HTTP}]\n";
    let gateways =
        [class("kgateway", "kgateway.dev/kgateway"), gateway("kgateway", &[("http", 80, "")])].concat();
    let text = [
        gateways,
        grpc.to_owned(),
        set.to_owned(),
        route("wild", "", &["*.example"], &any()),
        route("odd", "", &["odd.example"], &rule("{path: {type: Exact, value: '/x;y'}}", 2)),
        route("label", "", &["label.example"], &any().replace("{name: api, port: 80}", "{group: delegation.kgateway.dev, kind: label, name: x}")),
        route("weight", "", &["weight.example"], &any()).replace("namespace: shop,", "namespace: shop, annotations: {kgateway.dev/policy-weight: '1'},"),
        route("old", "", &["old.example"], &any()).replace("namespace: shop,", "namespace: shop, generation: 2,")
            + "status: {parents: [{parentRef: {name: web, namespace: infra}, controllerName: kgateway.dev/kgateway, conditions: [{type: Accepted, status: 'True', observedGeneration: 1}]}]}\n",
        route("numeric", "", &["foo.123"], &any()),
        // The same host by a Gateway and by Ingresses, on one listener.
        route("both", "", &["both.example"], &any()),
        ingress("both", "", &cors(2), "both.example", &["Prefix /"], ""),
        ingress("mixed", "", &cors(3), "mixed.test", &["Prefix /api"], ""),
        ingress("certificate", "", "", "mixed.test", &["Prefix /"], ", tls: [{hosts: [mixed.test]}]"),
        ingress("forced", "", &format!("{}, {nginx}force-ssl-redirect: 'True'", cors(4)), "forced.test", &["Prefix /"], ""),
        ingress("first", "", &cors(5), "tie.test", &["Prefix /"], ""),
        ingress("second", "", &cors(6), "tie.test", &["Prefix /"], ""),
        ingress("root", "", &format!("{}, {nginx}app-root: /x", ""), "root.test", &["Prefix /admin"], "").replace("annotations: {, ", "annotations: {"),
        ingress("app", "", &cors(7), "root.test", &["Prefix /"], ""),
        ingress("regex", "", &format!("{nginx}use-regex: '1'"), "regex.test", &["ImplementationSpecific /.*"], ""),
        ingress("beside", "", &cors(8), "regex.test", &["Prefix /x"], ""),
        ingress("every", "", &cors(9), "*.test", &["Prefix /"], ""),
        ingress("bare", "", "", "bare.test", &[], ""),
    ]
    .concat();
    let import = resolve(&text, &assuming(GatewayDialect::Unknown));
    let made = table(&import);
    for (url, expected) in [
        ("wild.example/", "1"),
        ("grpc.example/", "unsupported"),
        ("set.example/", "unsupported"),
        ("odd.example/", "no_cors"),
        ("label.example/", "unsupported"),
        ("weight.example/", "unsupported"),
        ("old.example/", "unsupported"),
        ("both.example/", "conflict"),
        ("mixed.test/api", "unsupported"),
        ("forced.test/", "unsupported"),
        // Of the same age the later name is the first.
        ("tie.test/", "6"),
        ("root.test/", "unsupported"),
        ("regex.test/x", "unsupported"),
        ("every.test/", "9"),
        ("bare.test/", "no_cors"),
    ] {
        assert_eq!(age(&made, url, "GET"), expected, "{url}");
    }
    let codes = codes(&import);
    assert!(codes.iter().any(|code| code.starts_with("host-shared")), "{codes:#?}");
    assert!(codes.iter().any(|code| code.starts_with("host-invalid HTTPRoute shop/numeric")), "{codes:#?}");
}

#[test]
fn only_what_is_selected() {
    let text = [
        route("a", "", &["a.example"], &rule(&prefix("/", ""), 1)),
        route("b", "", &["a.example"], &rule(&prefix("/api", ""), 2))
            .replace("namespace: shop,", "namespace: other, labels: {team: b},"),
    ]
    .concat();
    let by = |namespaces: &[&str], labels: &str| Settings {
        namespaces: namespaces.iter().map(|name| (*name).to_owned()).collect(),
        labels: LabelSelector::parse(labels).expect("a selector"),
        ..assuming(GatewayDialect::GatewayApi)
    };
    for (settings, expected) in [
        (by(&[], ""), ["1", "2"]),
        // What is not selected still has its paths.
        (by(&["shop"], ""), ["1", "disabled"]),
        (by(&[], "team=b"), ["disabled", "2"]),
        (by(&[], "team in (a, b),!old"), ["disabled", "2"]),
        (by(&[], "team notin (b)"), ["1", "disabled"]),
        (by(&[], "!team"), ["1", "disabled"]),
        (by(&[], "team,team!=c"), ["disabled", "2"]),
    ] {
        let made = table(&resolve(&text, &settings));
        assert_eq!(
            ["a.example/", "a.example/api"].map(|url| age(&made, url, "GET")),
            expected,
            "{settings:?}"
        );
    }
    assert!(LabelSelector::parse("team in (a").is_err() && LabelSelector::parse("a b").is_err());
}

/// One object cannot refuse what others declared: neither by its host nor by its pattern.
#[test]
fn no_object_refuses_the_others() {
    let text = [
        route("good", "", &["good.example"], &rule(&prefix("/", ""), 1)),
        route("host", "", &["a.0x1"], &rule(&prefix("/", ""), 2)),
        route("regex", "", &["r.example"], &rule("{path: {type: RegularExpression, value: '/\\pL+'}}", 0)),
        ingress("i", "", &cors(3), "i.example", &["ImplementationSpecific relative"], ""),
    ]
    .concat();
    let import = resolve(&text, &assuming(GatewayDialect::Envoy));
    let policies: Vec<PolicySpec> = import.policies.iter().map(|policy| policy.spec.clone()).collect();
    let listener = ListenerSpec {
        id: ListenerId(0),
        name: "web".into(),
        own_literals: vec![],
        loopback_is_own: true,
        public_ports: vec![],
    };
    let (_, findings) = Table::compile(&[listener], &policies, &mut RouteLabels::new(100), 1);
    assert!(findings.iter().all(|(_, finding)| finding.severity == Severity::Warning), "{findings:#?}");
    assert_eq!(age(&table(&import), "good.example/", "GET"), "1");
}
