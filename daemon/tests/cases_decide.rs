//! Every case that was taken from other projects' own tests, through `validate` and `decide`.
//!
//! An actual (non-preflight) request of a case is no business of `decide`: the head reader passes it as `not_options`.
//! What its answer says about the origin is asked here by a preflight from the same origin, where there is one.
#![forbid(unsafe_code)]

use preflightd::policy::dialect::{Rules, envoy, gateway_api, ingress_nginx, native};
use preflightd::policy::{
    Answer, Connection, Decision, DenyReason, Finding, HostPattern, ListenerId, ListenerSpec, Outcome,
    PathMatch, PolicySpec, Preflight, RouteLabels, Severity, SourceRef, Table,
};
use preflightd::reason::PassReason;
use serde_json::Value;
use std::collections::BTreeMap;

const DATE: &[u8; 29] = b"Sun, 06 Nov 1994 08:49:37 GMT";
const VARY: &str = "Origin, Access-Control-Request-Method, Access-Control-Request-Headers";

fn cases(name: &str) -> Value {
    let path = format!("{}/../tests/cases/{name}.json", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("reading {path}: {e}"));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("parsing {path}: {e}"))
}

fn items(value: &Value) -> &[Value] {
    value.as_array().unwrap_or_else(|| panic!("not a list: {value}"))
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("not a string: {value}"))
}

/// One policy for each path prefix, on all hosts.
fn table(routes: Vec<(&str, Rules)>) -> Table {
    let listener = ListenerSpec {
        id: ListenerId(0),
        name: "l".into(),
        own_literals: vec![],
        loopback_is_own: true,
        public_ports: vec![],
    };
    let policies: Vec<PolicySpec> = routes
        .into_iter()
        .map(|(prefix, rules)| PolicySpec {
            name: prefix.to_owned(),
            source: SourceRef { origin: "cases".into(), line: 0 },
            listeners: vec![],
            hosts: vec![HostPattern::Any],
            paths: vec![PathMatch::Prefix(prefix.to_owned())],
            for_methods: vec![],
            passes: None,
            on_denied: None,
            rules,
        })
        .collect();
    let (table, findings) = Table::compile(&[listener], &policies, &mut RouteLabels::new(100), 1);
    assert_eq!(findings, [], "compiling");
    table
}

/// A response as a list of header lines.
#[derive(Debug)]
struct Response {
    status: u64,
    headers: Vec<(String, String)>,
}

impl Response {
    fn of(answer: &Answer<'_>) -> Self {
        let mut bytes = Vec::new();
        answer.render(DATE, Connection::KeepAlive, &mut bytes);
        assert!(bytes.len() <= answer.max_len(), "max_len is a bound");
        let text = String::from_utf8(bytes).expect("ASCII");
        let head = text.strip_suffix("\r\n\r\n").expect("ends in an empty line");
        let mut lines = head.split("\r\n");
        let status =
            lines.next().expect("status line").split(' ').nth(1).expect("status").parse().expect("number");
        let headers: Vec<(String, String)> = lines
            .map(|line| line.split_once(": ").unwrap_or_else(|| panic!("no `: ` in {line:?}")))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
            .collect();
        assert_eq!(headers[0].0, "date", "Date comes first: {text}");
        let mut names: Vec<&String> = headers.iter().map(|(n, _)| n).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), headers.len(), "no header twice: {text}");
        Self { status, headers }
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.as_str())
    }
}

/// What became of a request.
#[derive(Debug)]
enum Got {
    Answered(Outcome, Response),
    Passed(PassReason),
}

impl Got {
    fn response(&self, name: &str) -> &Response {
        match self {
            Got::Answered(_, response) => response,
            Got::Passed(reason) => panic!("{name}: passed: {}", reason.as_str()),
        }
    }
}

type Headers = BTreeMap<String, String>;

fn headers<const N: usize>(list: [(&str, &str); N]) -> Headers {
    list.into_iter().map(|(n, v)| (n.to_ascii_lowercase(), v.to_owned())).collect()
}

fn headers_of(request: &Value) -> Headers {
    let headers = request["headers"].as_object().expect("headers");
    headers.iter().map(|(n, v)| (n.to_ascii_lowercase(), text(v).to_owned())).collect()
}

/// A preflight with these headers; GET is asked for where they do not say.
fn preflight(table: &Table, path: &str, headers: &Headers) -> Got {
    let get = |name: &str| headers.get(name).map(String::as_bytes);
    let lines: Vec<&[u8]> = get("access-control-request-headers").into_iter().collect();
    let request = Preflight {
        listener: ListenerId(0),
        host: b"example.com",
        target: path.as_bytes(),
        origin: get("origin").unwrap_or_else(|| panic!("no origin in {headers:?}")),
        method: get("access-control-request-method").unwrap_or(b"GET"),
        headers: &lines,
        private_network: get("access-control-request-private-network") == Some(b"true"),
    };
    match table.decide(&request) {
        Decision::Answer(answer) => Got::Answered(answer.outcome, Response::of(&answer)),
        Decision::Pass(reason, _) => Got::Passed(reason),
    }
}

fn codes(findings: &[Finding], severity: Severity) -> Vec<&'static str> {
    findings.iter().filter(|f| f.severity == severity).map(|f| f.code).collect()
}

// native

fn native_cors(change: impl FnOnce(&mut native::Cors)) -> native::Cors {
    let mut cors = native::Cors { origins: vec!["https://app.example".into()], ..native::Cors::default() };
    change(&mut cors);
    cors
}

fn native_rules(cors: &native::Cors) -> Rules {
    let (rules, findings) = native::validate(cors);
    Rules::Native(rules.unwrap_or_else(|| panic!("{cors:?}: {findings:?}")))
}

#[test]
fn native_request_headers() {
    let cases = cases("native_strict");
    let (success, failure) = (&cases["answer"]["success"], &cases["answer"]["failure"]);
    for case in items(&cases["acrh"]["cases"]) {
        let allowed: Vec<String> = items(&case["allowed"]).iter().map(|n| text(n).to_owned()).collect();
        let table = table(vec![("/", native_rules(&native_cors(|c| c.headers = allowed)))]);
        for (list, accepted) in [("accepted", true), ("rejected", false)] {
            for lines in items(&case[list]) {
                let lines: Vec<&[u8]> = items(lines).iter().map(|l| text(l).as_bytes()).collect();
                let request = Preflight {
                    listener: ListenerId(0),
                    host: b"example.com",
                    target: b"/",
                    origin: b"https://app.example",
                    method: b"GET",
                    headers: &lines,
                    private_network: false,
                };
                let Decision::Answer(answer) = table.decide(&request) else {
                    panic!("{}: passed", case["desc"])
                };
                let expected = if accepted { Outcome::Allowed } else { Outcome::Denied(DenyReason::Headers) };
                assert_eq!(answer.outcome, expected, "{}: {lines:?}", case["desc"]);
                let response = Response::of(&answer);
                assert_eq!(response.get("vary"), Some(VARY));
                if accepted {
                    assert_eq!(*success, response.status);
                    assert_eq!(response.get("content-length"), None);
                } else {
                    assert_eq!(*failure, response.status);
                    assert!(
                        !response.headers.iter().any(|(n, _)| n.starts_with("access-control-")),
                        "{response:?}"
                    );
                    assert_eq!(response.get("content-length"), Some("0"));
                }
            }
        }
    }
}

#[test]
fn native_safelisted_methods_need_no_permission() {
    let table = table(vec![("/", native_rules(&native_cors(|_| {})))]);
    let got = |method: &str| {
        preflight(
            &table,
            "/",
            &headers([("origin", "https://app.example"), ("access-control-request-method", method)]),
        )
    };
    for method in items(&cases("native_strict")["answer"]["methods_safelisted_need_no_ACAM"]) {
        let got = got(text(method));
        let response = got.response(text(method));
        assert_eq!((response.status, response.get("access-control-allow-methods")), (204, None), "{method}");
    }
    assert!(matches!(got("PUT"), Got::Answered(Outcome::Denied(DenyReason::Method), r) if r.status == 403));
    assert!(matches!(got("get"), Got::Answered(Outcome::Denied(DenyReason::Method), _)));
}

#[test]
fn native_origin_patterns() {
    let cases = cases("native_strict");
    for pattern in items(&cases["origin_pattern_accepted"]) {
        native_rules(&native_cors(|c| c.origins = vec![text(pattern).to_owned()]));
    }
    for (pattern, why) in cases["origin_pattern_rejected"].as_object().expect("object") {
        let (rules, findings) = native::validate(&native_cors(|c| c.origins = vec![pattern.clone()]));
        assert!(rules.is_none(), "{pattern} ({why}) was accepted");
        assert_eq!(codes(&findings, Severity::Error).len(), 1, "{pattern}: {findings:?}");
        assert_eq!((findings[0].field, findings[0].item), ("origins", Some(0)), "{pattern}");
        assert!(!findings[0].help.is_empty(), "{pattern}");
    }
    // The limits that come with them.
    let limits = &cases["origin_pattern_limits"];
    let limit = |name: &str| limits[name].as_u64().expect("limit") as usize;
    let host = |n: usize| format!("{}.com", "a".repeat(n - 4));
    for (pattern, accepted) in [
        (format!("{}://a.example", "s".repeat(limit("scheme"))), true),
        (format!("{}://a.example", "s".repeat(limit("scheme") + 1)), false),
        (format!("https://{}", host(limit("host"))), true),
        (format!("https://{}", host(limit("host") + 1)), false),
        (format!("https://*.{}", host(limit("wildcard_host_tail"))), true),
        (format!("https://*.{}", host(limit("wildcard_host_tail") + 1)), false),
        ("https://a.example:1".to_owned(), true),
        ("https://a.example:0".to_owned(), false),
        ("https://a.example:65535".to_owned(), true),
    ] {
        let (rules, findings) = native::validate(&native_cors(|c| c.origins = vec![pattern.clone()]));
        assert_eq!(rules.is_some(), accepted, "{pattern}: {findings:?}");
    }
}

#[test]
fn native_refused_configs() {
    type Change = fn(&mut native::Cors);
    fn origins(c: &mut native::Cors, origin: &str) {
        c.origins = vec![origin.to_owned()];
    }
    fn with_credentials(c: &mut native::Cors, origin: &str) {
        origins(c, origin);
        c.credentials = true;
    }
    // The case's words, the code of the finding, its field, and configurations that earn it.
    let expected: &[(&str, &str, &str, &[Change])] = &[
        ("no origin", "origins-empty", "origins", &[|c| c.origins.clear()]),
        (
            "invalid origin pattern",
            "origin-scheme",
            "origins",
            &[|c| origins(c, "ab"), |c| origins(c, "a b://c")],
        ),
        ("null origin", "origin-null", "origins", &[|c| origins(c, "null")]),
        ("file scheme", "origin-file", "origins", &[|c| origins(c, "file://x"), |c| origins(c, "file:///x")]),
        (
            "default port written out",
            "origin-default-port",
            "origins",
            &[|c| origins(c, "https://a.example:443"), |c| origins(c, "http://*.a.example:80")],
        ),
        ("'*' origin + credentialed", "origin-star-credentials", "origins", &[|c| with_credentials(c, "*")]),
        (
            "insecure (non-https, non-loopback/localhost) origin + credentialed",
            "origin-insecure-credentials",
            "origins",
            &[
                |c| with_credentials(c, "http://a.example"),
                |c| with_credentials(c, "http://69.254.169.254"),
                |c| with_credentials(c, "connector://foo"),
            ],
        ),
        (
            "wildcard over a public suffix + credentialed",
            "origin-public-suffix-credentials",
            "origins",
            &[|c| with_credentials(c, "https://*.com"), |c| with_credentials(c, "https://*.github.io")],
        ),
        (
            "invalid method name",
            "method-invalid",
            "methods",
            &[|c| c.methods = vec!["PUT, PATCH".into()], |c| c.methods = vec![String::new()]],
        ),
        (
            "forbidden method CONNECT/TRACE/TRACK",
            "method-forbidden",
            "methods",
            &[
                |c| c.methods = vec!["CONNECT".into()],
                |c| c.methods = vec!["trace".into()],
                |c| c.methods = vec!["TRACK".into()],
            ],
        ),
        ("invalid header name", "header-invalid", "headers", &[|c| c.headers = vec!["x foo".into()]]),
        (
            "forbidden request-header name (Cookie, Host, Origin, Sec-*, Proxy-*, ...)",
            "header-forbidden",
            "headers",
            &[
                |c| c.headers = vec!["Cookie".into()],
                |c| c.headers = vec!["Host".into()],
                |c| c.headers = vec!["Origin".into()],
                |c| c.headers = vec!["Sec-Fetch-Mode".into()],
                |c| c.headers = vec!["Proxy-Authorization".into()],
                |c| c.headers = vec!["access-control-request-method".into()],
            ],
        ),
        (
            "response-only names as request headers (Access-Control-Allow-*, -Expose-, -Max-Age)",
            "header-response-only",
            "headers",
            &[
                |c| c.headers = vec!["Access-Control-Allow-Origin".into()],
                |c| c.headers = vec!["Access-Control-Expose-Headers".into()],
                |c| c.headers = vec!["Access-Control-Max-Age".into()],
            ],
        ),
        (
            "forbidden response-header name (Set-Cookie, Set-Cookie2)",
            "expose-forbidden",
            "expose",
            &[|c| c.expose = vec!["Set-Cookie".into()], |c| c.expose = vec!["set-cookie2".into()]],
        ),
        (
            "request-only names as exposed (Origin, Access-Control-Request-*)",
            "expose-request-only",
            "expose",
            &[
                |c| c.expose = vec!["Origin".into()],
                |c| c.expose = vec!["Access-Control-Request-Headers".into()],
            ],
        ),
        (
            "exposing '*' + credentialed",
            "expose-star-credentials",
            "expose",
            &[|c| {
                c.expose = vec!["*".into()];
                c.credentials = true;
            }],
        ),
        (
            "max-age < -1 or > 86400",
            "max-age-range",
            "max_age",
            &[|c| c.max_age = Some(-2), |c| c.max_age = Some(86_401)],
        ),
    ];
    let cases = cases("native_strict");
    let listed: Vec<&str> = items(&cases["refused_configs"]).iter().map(text).collect();
    assert_eq!(listed, expected.iter().map(|e| e.0).collect::<Vec<_>>(), "every refusal is tried here");
    for (name, code, field, changes) in expected {
        for change in *changes {
            let cors = native_cors(change);
            let (rules, findings) = native::validate(&cors);
            assert!(rules.is_none(), "{name}: {cors:?} was accepted");
            assert_eq!(codes(&findings, Severity::Error), [*code], "{name}: {findings:?}");
            let finding = findings.iter().find(|f| f.code == *code).expect("just seen");
            assert_eq!(finding.field, *field, "{name}");
            assert!(!finding.message.is_empty() && !finding.help.is_empty(), "{name}");
        }
    }
}

// envoy

fn envoy_cors(value: &Value) -> envoy::Cors {
    serde_json::from_value(value.clone()).unwrap_or_else(|e| panic!("{value}: {e}"))
}

fn envoy_rules(cors: &envoy::Cors, fallback: Option<&envoy::Cors>) -> Rules {
    let (rules, findings) = envoy::validate(cors, fallback);
    Rules::Envoy(rules.unwrap_or_else(|| panic!("{cors:?}: {findings:?}")))
}

#[test]
fn envoy_integration() {
    let cases = cases("envoy");
    let policies = cases["integration_policies"].as_object().expect("object");
    let vhost = envoy_cors(&policies["vhost"]);
    let routes = policies
        .iter()
        .filter(|(name, _)| *name != "vhost")
        .map(|(path, policy)| {
            let rules = match &policy["route"] {
                Value::Null => envoy_rules(&vhost, None),
                route => envoy_rules(&envoy_cors(route), Some(&vhost)),
            };
            (path.as_str(), rules)
        })
        .collect();
    let table = table(routes);
    for case in items(&cases["integration_cases"]) {
        let name = text(&case["name"]);
        let request = &case["request"];
        let got = preflight(&table, text(&request["path"]), &headers_of(request));
        let expected = case["expect_exact_headers"].as_object().expect("object");
        match (text(&case["kind"]), text(&case["answered_by"])) {
            ("preflight", "upstream") => assert!(
                matches!(got, Got::Passed(PassReason::OriginNotAllowed | PassReason::Disabled)),
                "{name}: {got:?}"
            ),
            ("preflight", _) => {
                let response = got.response(name);
                // Beyond what Envoy's test sees: Date, as in every answer, and Vary.
                assert_eq!(response.get("vary"), Some(VARY), "{name}");
                let mut seen: Headers =
                    response.headers.iter().filter(|(n, _)| n != "date" && n != "vary").cloned().collect();
                seen.insert(":status".into(), response.status.to_string());
                let expected: Headers =
                    expected.iter().map(|(n, v)| (n.clone(), text(v).to_owned())).collect();
                assert_eq!(seen, expected, "{name}");
            }
            // As a preflight from the same origin: where the filter adds ACAO there, it is answered here.
            ("actual", "upstream+filter") => {
                let response = got.response(name);
                for header in ["access-control-allow-origin", "access-control-expose-headers"] {
                    assert_eq!(response.get(header), expected.get(header).map(text), "{name}: {header}");
                }
            }
            // The filter added nothing; the headers are the upstream's. The policy for credentials takes only
            // `test-origin-1`, the one for the regex only `*.envoyproxy.io`: neither allows the case's origin.
            ("actual", "upstream") => match got {
                Got::Passed(reason) => assert_eq!(reason, PassReason::OriginNotAllowed, "{name}"),
                Got::Answered(outcome, response) => {
                    assert_eq!(outcome, Outcome::Denied(DenyReason::Origin), "{name}");
                    assert_eq!(response.get("access-control-allow-origin"), None, "{name}");
                }
            },
            other => panic!("{name}: {other:?}"),
        }
    }
}

#[test]
fn envoy_derived() {
    for case in items(&cases("envoy")["derived_from_source"]) {
        let name = text(&case["name"]);
        let policy = &case["policy"];
        let rules = match policy.get("vhost") {
            Some(vhost) => envoy_rules(&envoy_cors(&policy["route"]), Some(&envoy_cors(vhost))),
            None => envoy_rules(&envoy_cors(policy), None),
        };
        let table = table(vec![("/", rules)]);
        let got = preflight(&table, "/", &headers_of(&case["request"]));
        let expected = &case["expect"];
        if expected["answered_by"] == "upstream" {
            assert!(matches!(got, Got::Passed(PassReason::BadRequestMethod)), "{name}: {got:?}");
            continue;
        }
        let response = got.response(name);
        assert_eq!(expected["status"], response.status, "{name}");
        for (header, value) in expected["headers"].as_object().expect("object") {
            assert_eq!(response.get(header), Some(text(value)), "{name}: {header}");
        }
        for header in expected.get("absent").map_or(&[][..], items) {
            assert_eq!(response.get(text(header)), None, "{name}: {header}");
        }
        assert_eq!(response.get("server"), Some("envoy"), "{name}");
        assert_eq!(response.get("content-length"), Some("0"), "{name}");
    }
}

// gateway-api

fn gateway_cors(value: &Value) -> gateway_api::Cors {
    serde_json::from_value(value.clone()).unwrap_or_else(|e| panic!("{value}: {e}"))
}

#[test]
fn gateway_api_conformance() {
    let cases = cases("gateway_api");
    let routes = cases["policies"]
        .as_object()
        .expect("object")
        .iter()
        .map(|(name, policy)| {
            let (rules, findings) = gateway_api::validate(&gateway_cors(&policy["cors"]));
            let rules = rules.unwrap_or_else(|| panic!("{name}: {findings:?}"));
            (text(&policy["match"]["pathPrefix"]), Rules::GatewayApi(rules))
        })
        .collect();
    let table = table(routes);
    for case in items(&cases["cases"]) {
        let name = text(&case["name"]);
        let request = &case["request"];
        let got = preflight(&table, text(&request["path"]), &headers_of(request));
        let response = got.response(name);
        let expected = &case["expect"];
        // The status of an actual request is the backend's.
        if text(&case["kind"]) == "preflight" {
            let statuses = items(&expected["status_any_of"]);
            assert!(statuses.iter().any(|s| *s == response.status), "{name}: {}", response.status);
        }
        let blind = expected["ignore_whitespace_in_values"] == true;
        let clean = |value: &str| if blind { value.replace(' ', "") } else { value.to_owned() };
        for (header, values) in expected["headers_valid_values"].as_object().expect("object") {
            let got = response.get(header).unwrap_or_else(|| panic!("{name}: no {header} in {response:?}"));
            assert!(items(values).iter().any(|v| clean(text(v)) == clean(got)), "{name}: {header}: {got}");
        }
        for header in items(&expected["headers_absent"]) {
            assert_eq!(response.get(text(header)), None, "{name}: {header}");
        }
    }
}

#[test]
fn gateway_api_crd_validation() {
    for case in items(&cases("gateway_api")["crd_validation_cases"]) {
        let name = text(&case["name"]);
        let (rules, findings) = gateway_api::validate(&gateway_cors(&case["filter"]));
        assert_eq!(rules.is_some(), case["accepted"] == true, "{name}: {findings:?}");
        if let Some(part) = case["error_contains"].as_str() {
            assert!(
                findings.iter().any(|f| f.severity == Severity::Error && f.message.contains(part)),
                "{name}: {findings:?}"
            );
        }
    }
}

#[test]
fn gateway_api_crd_constraints() {
    let cases = cases("gateway_api");
    let constraints = &cases["crd_constraints"];
    let most = |field: &str, key: &str| constraints[field][key].as_u64().expect("bound") as usize;
    let json = |field: &str, list: Vec<String>| gateway_cors(&serde_json::json!({ field: list }));
    let names = |n: usize| (0..n).map(|i| format!("x-{i}")).collect::<Vec<_>>();
    let origins = |n: usize| (0..n).map(|i| format!("https://o{i}.example")).collect::<Vec<_>>();
    let host = |n: usize| format!("https://{}", "a".repeat(n - 8));
    let all_methods: Vec<String> = items(&constraints["allowMethods"]["enum"])
        .iter()
        .map(|m| text(m).to_owned())
        .filter(|m| m != "*")
        .collect();
    for (name, cors, accepted) in [
        ("origins", json("allowOrigins", origins(most("allowOrigins", "maxItems"))), true),
        ("too many origins", json("allowOrigins", origins(most("allowOrigins", "maxItems") + 1)), false),
        ("long origin", json("allowOrigins", vec![host(most("CORSOrigin", "maxLength"))]), true),
        ("too long origin", json("allowOrigins", vec![host(most("CORSOrigin", "maxLength") + 1)]), false),
        ("empty origin", json("allowOrigins", vec![String::new()]), false),
        ("origin twice", json("allowOrigins", vec!["https://a".into(), "https://a".into()]), false),
        ("every method", json("allowMethods", all_methods), true),
        ("headers", json("allowHeaders", names(most("allowHeaders", "maxItems"))), true),
        ("too many headers", json("allowHeaders", names(most("allowHeaders", "maxItems") + 1)), false),
        ("* with headers", json("allowHeaders", vec!["*".into(), "x-a".into()]), false),
        ("bad header", json("allowHeaders", vec!["x a".into()]), false),
        ("long header", json("allowHeaders", vec!["x".repeat(257)]), false),
        ("too many exposed", json("exposeHeaders", names(most("exposeHeaders", "maxItems") + 1)), false),
        ("* with exposed", json("exposeHeaders", vec!["*".into(), "x-a".into()]), true),
        ("max-age 1", gateway_cors(&serde_json::json!({ "maxAge": 1 })), true),
        ("max-age 0", gateway_cors(&serde_json::json!({ "maxAge": 0 })), false),
    ] {
        let (rules, findings) = gateway_api::validate(&cors);
        assert_eq!(rules.is_some(), accepted, "{name}: {findings:?}");
    }
    let (rules, _) =
        gateway_api::validate(&gateway_cors(&serde_json::json!({ "allowOrigins": ["https://a"] })));
    let table = table(vec![("/", Rules::GatewayApi(rules.expect("valid")))]);
    let got = preflight(&table, "/", &headers([("origin", "https://a")]));
    let default = constraints["maxAge"]["default"].to_string();
    assert_eq!(got.response("default").get("access-control-max-age"), Some(&*default));
}

// ingress-nginx

fn ingress_rules(value: &Value) -> (Rules, Vec<Finding>) {
    let annotations: ingress_nginx::Annotations =
        value.as_object().expect("object").iter().map(|(n, v)| (n.clone(), text(v).to_owned())).collect();
    let (rules, findings) = ingress_nginx::validate(&annotations);
    (Rules::IngressNginx(rules.unwrap_or_else(|| panic!("{value}: {findings:?}"))), findings)
}

#[test]
fn ingress_nginx_e2e_as_preflights() {
    let (mut with_origin, mut without) = (0, 0);
    for case in items(&cases("ingress_nginx")["e2e_cases"]) {
        let name = text(&case["name"]);
        let table = table(vec![("/", ingress_rules(&case["annotations"]).0)]);
        for request in items(&case["requests"]) {
            let mut headers = headers_of(request);
            // Without an origin it is no preflight, and the head reader passes it (`no_origin`). All of these
            // expect the literal `*`, which every origin must then get.
            if headers.contains_key("origin") {
                with_origin += 1;
            } else {
                without += 1;
                assert_eq!(request["expect"]["headers"]["Access-Control-Allow-Origin"], "*", "{name}");
                headers.insert("origin".into(), "https://any.example".into());
            }
            let got = preflight(&table, text(&request["path"]), &headers);
            match request["expect"].get("headers").map(|h| text(&h["Access-Control-Allow-Origin"])) {
                Some(origin) => {
                    let response = got.response(name);
                    assert_eq!(response.status, 204, "{name}");
                    assert_eq!(response.get("access-control-allow-origin"), Some(origin), "{name}");
                    assert_eq!(response.get("vary"), (origin != "*").then_some(VARY), "{name}");
                }
                None => assert!(
                    matches!(got, Got::Passed(PassReason::OriginNotAllowed)),
                    "{name}: {headers:?}: {got:?}"
                ),
            }
        }
    }
    assert!(with_origin > 20 && without > 3, "{with_origin} and {without} requests");
}

#[test]
fn ingress_nginx_configs() {
    let cases = cases("ingress_nginx");
    let defaults = &cases["defaults"];
    for case in items(&cases["config_cases"]) {
        let name = text(&case["name"]);
        let mut annotations = case["annotations"].clone();
        let parsed = &case["parsed"];
        let (rules, findings) = ingress_rules(&annotations);
        let warned = codes(&findings, Severity::Warning);
        let from = |origin: &str| headers([("origin", origin)]);
        if parsed["enabled"] == false {
            let got = preflight(&table(vec![("/", rules)]), "/", &from("https://x.example"));
            assert!(matches!(got, Got::Passed(PassReason::Disabled)), "{name}: {got:?}");
            // The rest as it would be with CORS on.
            annotations["enable-cors"] = "true".into();
        }
        let origins: Vec<&str> =
            parsed.get("origins").map_or(vec![], |o| items(o).iter().map(text).collect());
        if parsed.get("origins").is_some() && origins.is_empty() {
            // nginx's regex of an empty list matches every origin: left to nginx.
            let got = preflight(
                &table(vec![("/", ingress_rules(&annotations).0)]),
                "/",
                &from("https://x.example"),
            );
            assert!(matches!(got, Got::Passed(PassReason::Unsupported)), "{name}: {got:?}");
            assert_eq!(
                warned.iter().filter(|c| **c == "annotation-default").count(),
                6,
                "{name}: {findings:?}"
            );
            assert!(warned.contains(&"origin-skipped"), "{name}: {findings:?}");
            // The rest as it would be with an origin that is valid.
            annotations["cors-allow-origin"] = "https://ok.example".into();
        }
        let table = table(vec![("/", ingress_rules(&annotations).0)]);
        for origin in &origins {
            let got = preflight(&table, "/", &from(origin));
            assert_eq!(got.response(name).get("access-control-allow-origin"), Some(*origin), "{name}");
        }
        if !origins.is_empty() {
            let got = preflight(&table, "/", &from("https://unlisted.example"));
            assert!(matches!(got, Got::Passed(PassReason::OriginNotAllowed)), "{name}: {got:?}");
        }
        let got = preflight(&table, "/", &from(origins.first().copied().unwrap_or("https://ok.example")));
        let response = got.response(name);
        for (key, default, header) in [
            ("headers", "cors-allow-headers", "access-control-allow-headers"),
            ("methods", "cors-allow-methods", "access-control-allow-methods"),
            ("expose", "cors-expose-headers", "access-control-expose-headers"),
        ] {
            if let Some(value) = parsed.get(key).map(text) {
                let value = if value == "<default>" { text(&defaults[default]) } else { value };
                assert_eq!(response.get(header), (!value.is_empty()).then_some(value), "{name}: {header}");
            }
        }
        if let Some(seconds) = parsed.get("max_age") {
            assert_eq!(response.get("access-control-max-age"), Some(&*seconds.to_string()), "{name}");
        }
        if let Some(credentials) = parsed.get("credentials") {
            let expected = (credentials == true).then_some("true");
            assert_eq!(response.get("access-control-allow-credentials"), expected, "{name}");
        }
        if name.starts_with("derived") {
            assert!(warned.contains(&"annotation-default"), "{name}: {findings:?}");
        }
    }
}

#[test]
fn ingress_nginx_derived_preflights() {
    for case in items(&cases("ingress_nginx")["derived_preflight_cases"]) {
        let name = text(&case["name"]);
        let (rules, findings) = ingress_rules(&case["annotations"]);
        let table = table(vec![("/", rules)]);
        let got = preflight(&table, text(&case["request"]["path"]), &headers_of(&case["request"]));
        let expected = &case["expect"];
        if expected["answered_by"] == "upstream" {
            assert!(matches!(got, Got::Passed(PassReason::OriginNotAllowed)), "{name}: {got:?}");
            continue;
        }
        let response = got.response(name);
        assert_eq!(expected["status"], response.status, "{name}");
        for (header, value) in expected["headers"].as_object().expect("object") {
            assert_eq!(response.get(header), Some(text(value)), "{name}: {header}");
        }
        for header in expected.get("absent").map_or(&[][..], items) {
            assert_eq!(response.get(text(header)), None, "{name}: {header}");
        }
        let star = response.get("access-control-allow-origin") == Some("*");
        assert_eq!(response.get("vary"), (!star).then_some(VARY), "{name}");
        assert_eq!(codes(&findings, Severity::Warning).contains(&"origin-star-credentials"), star, "{name}");
    }
}
