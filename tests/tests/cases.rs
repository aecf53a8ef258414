//! Every case of `cases/*.json` — taken from the projects' own tests and sources — through the real daemon: preflights
//! over sockets, configurations through `check`.
//!
//! Each preflight goes to a worker that listens, and where there is root also to a steered port, where the kernel answers
//! what it can, a worker most of the rest, and the proxy what is left: the bytes must be the same, and what `explain` says.

use preflightd_tests::{
    Behaviour, Client, Config, Daemon, Response, Upstream,
    daemon::{preflightd, run},
    site::wait_until,
    steering::{Lab, Options, Proxy, can_run, plain},
};
use serde_json::{Value, json};
use std::{
    cell::Cell,
    fmt::Write as _,
    fs,
    io::Write as _,
    path::Path,
    process::Stdio,
    sync::{Arc, Mutex},
};
use tempfile::TempDir;

/// A daemon with one policy (or more) for each host, before an upstream whose next response the test chooses.
struct Bench {
    daemon: Daemon,
    upstream: Upstream,
    next: Arc<Mutex<Vec<u8>>>,
    steered: Option<Steered>,
}

impl Bench {
    fn start(policies: &[Value]) -> Self {
        let next = Arc::new(Mutex::new(Vec::new()));
        let response = Arc::clone(&next);
        let behaviour = Behaviour::Http(Arc::new(move |_| response.lock().expect("the response").clone()));
        let upstream = Upstream::start(behaviour.clone());
        let daemon = Daemon::start(Config::new(upstream.address(), toml(policies)));
        let steered = (!plain() && can_run()).then(|| Steered::start(policies, behaviour));
        Self { daemon, upstream, next, steered }
    }

    /// Expects the daemon's own answer.
    fn answered(&self, name: &str, request: &[u8]) -> Response {
        let before = self.upstream.count();
        let response = self.send(name, request);
        assert_eq!(self.upstream.count(), before, "{name}: reached the upstream, answered {response:?}");
        assert!(response.header("date").is_some(), "{name}: an answer without Date: {response:?}");
        if let Some(steered) = &self.steered {
            steered.answered(name, request, &response);
        }
        response
    }

    /// Expects that the upstream gets the very bytes and its answer comes back unchanged.
    fn passed(&self, name: &str, request: &[u8], status: u64, headers: &[(String, String)]) {
        let before = self.upstream.count();
        let mut response = format!("HTTP/1.1 {status} As The Case Says\r\n");
        for (header, value) in headers {
            write!(response, "{header}: {value}\r\n").expect("writing into a string");
        }
        if !headers.iter().any(|(header, _)| header.eq_ignore_ascii_case("content-length")) {
            response += "content-length: 0\r\n";
        }
        response += "\r\n";
        *self.next.lock().expect("the response") = response.clone().into_bytes();
        let got = self.send(name, request);
        assert_eq!(
            got.raw.escape_ascii().to_string(),
            response.as_bytes().escape_ascii().to_string(),
            "{name}"
        );
        assert_eq!(self.upstream.count(), before + 1, "{name}: one connection to the upstream");
        let recorded = self.upstream.ended(before).bytes;
        assert_eq!(recorded.escape_ascii().to_string(), request.escape_ascii().to_string(), "{name}");
        if let Some(steered) = &self.steered {
            steered.passed(name, request, response.as_bytes());
        }
    }

    /// Expects that the kernel has given at least so many of a hundred answers.
    fn kernel_gave(&self, least: u64) {
        if let Some(steered) = &self.steered {
            steered.kernel_gave(least);
        }
    }

    fn send(&self, name: &str, request: &[u8]) -> Response {
        let mut client = Client::connect(self.daemon.address());
        client.send(request);
        client.try_response().unwrap_or_else(|e| panic!("{name}: {e}"))
    }
}

/// The same policies on a steered port, before a proxy that answers as the upstream does.
struct Steered {
    lab: Lab,
    directory: TempDir,
    /// Answered requests; and by the kernel.
    answers: Cell<(u64, u64)>,
}

impl Steered {
    /// The client of what is answered, and that of what passes: what a worker had to turn away goes to the proxy from
    /// then on, and so does all with the same request line from that client.
    const CLIENTS: [usize; 2] = [0, 1];

    fn start(policies: &[Value], behaviour: Behaviour) -> Self {
        let lab = Lab::with(Options {
            clients: Self::CLIENTS.len(),
            proxy: Proxy::Upstream(behaviour),
            kernel_answers: true,
            policies: toml(policies),
            ..Options::default()
        });
        let directory = TempDir::with_prefix("cases-").expect("a directory");
        let text = lab.toml("127.0.0.1:9000".parse().expect("an address"));
        fs::write(directory.path().join("preflightd.toml"), text).expect("writing the configuration");
        Self { lab, directory, answers: Cell::new((0, 0)) }
    }

    /// Expects the answer that the listening worker has given, and that `explain` knows it.
    fn answered(&self, name: &str, request: &[u8], wanted: &Response) {
        let [client, _] = Self::CLIENTS;
        let report = self.explain(request);
        assert_eq!(report["verdict"], "answered", "{name}: {report}");
        for site in self.lab.sites_of(client) {
            let before = self.lab.upstream().count();
            let mut connection = self.lab.client(client).enter(|| Client::connect(site));
            let response = connection.exchange(request);
            assert_eq!(self.lab.upstream().count(), before, "{name}: reached the proxy: {response:?}");
            let by_kernel = response.header("connection").is_none();
            if by_kernel {
                let again = connection.exchange(request);
                assert_eq!(undated(&again), undated(&response), "{name}: again on the connection");
            } else {
                // A worker beside a proxy answers once.
                connection.expect_end();
            }
            let got = undated(&response);
            let mut kept = got.clone();
            kept.retain(|line| !line.eq_ignore_ascii_case("connection: close"));
            assert_eq!(got == kept, by_kernel, "{name} at {site}: {response:?}");
            assert_eq!(kept, undated(wanted), "{name} at {site}, by the kernel: {by_kernel}");
            assert_eq!(report["tier"] == "kernel", by_kernel, "{name} at {site}: {report}");
            assert_eq!(undated_text(text(&report["answer"])), got, "{name} at {site}: {report}");
            let (all, kernels) = self.answers.get();
            self.answers.set((all + 1, kernels + u64::from(by_kernel)));
        }
    }

    /// Expects that the proxy gets the very bytes, at the latest when they come again, and the client its answer.
    fn passed(&self, name: &str, request: &[u8], wanted: &[u8]) {
        let [_, client] = Self::CLIENTS;
        let report = self.explain(request);
        assert_eq!(report["verdict"], "passed", "{name}: {report}");
        assert_ne!(report["tier"], "kernel", "{name}: {report}");
        for site in self.lab.sites_of(client) {
            let before = self.lab.upstream().count();
            let exchange = || self.lab.client(client).enter(|| Client::connect(site)).exchange(request);
            let mut response = exchange();
            if response.status == 421 && wanted != response.raw {
                assert_eq!(report["tier"], "worker", "{name} at {site}: turned away, and {report}");
                response = exchange();
            }
            assert_eq!(
                response.raw.escape_ascii().to_string(),
                wanted.escape_ascii().to_string(),
                "{name} at {site}"
            );
            assert_eq!(
                self.lab.upstream().count(),
                before + 1,
                "{name} at {site}: one connection to the proxy"
            );
            let recorded = self.lab.upstream().ended(before).bytes;
            assert_eq!(
                recorded.escape_ascii().to_string(),
                request.escape_ascii().to_string(),
                "{name} at {site}"
            );
        }
    }

    /// What `explain` says of a request.
    fn explain(&self, request: &[u8]) -> Value {
        let mut command = preflightd();
        command.args(["explain", "--raw", "--format", "json", "--config"]);
        command.arg(self.directory.path().join("preflightd.toml"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut child = command.spawn().expect("starting explain");
        child.stdin.take().expect("its input").write_all(request).expect("writing the request");
        let output = child.wait_with_output().expect("waiting for explain");
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("explain: {e}: {output:?}"))
    }

    fn kernel_gave(&self, least: u64) {
        let (all, kernels) = self.answers.get();
        eprintln!("the kernel gave {kernels} of {all} answers");
        assert!(kernels * 100 >= all * least, "the kernel gave {kernels} of {all} answers");
        // As it says itself.
        wait_until("the counts", || {
            (self.lab.flows("kernel"), self.lab.flows("worker")) >= (kernels, all - kernels)
        });
        assert_eq!(self.lab.flows("kernel"), kernels);
    }
}

/// The lines of an answer, but for the value of its date.
fn undated(response: &Response) -> Vec<&str> {
    undated_text(std::str::from_utf8(&response.raw).expect("ASCII"))
}

fn undated_text(answer: &str) -> Vec<&str> {
    let is_date = |line: &str| line.to_ascii_lowercase().starts_with("date: ");
    answer.split("\r\n").map(|line| if is_date(line) { &line[..6] } else { line }).collect()
}

/// The cases are a copy of the shared ones, where those are at hand.
#[test]
fn copy_is_current() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let shared = here.join("../../shared/cases");
    if !shared.is_dir() {
        eprintln!("skipped: no {} beside this checkout", shared.display());
        return;
    }
    let names = |directory: &Path| {
        let entries = fs::read_dir(directory).expect("reading the cases");
        let mut names: Vec<_> = entries.map(|e| e.expect("a case file").file_name()).collect();
        names.sort();
        names
    };
    let copies = here.join("cases");
    assert_eq!(names(&copies), names(&shared));
    for name in names(&shared) {
        let read = |directory: &Path| fs::read(directory.join(&name)).expect("reading a case file");
        assert!(read(&copies) == read(&shared), "cases/{} is not the shared one", name.display());
    }
}

#[test]
fn envoy() {
    let cases = load("envoy");
    // The integration cases share one virtual host, whose policy the routes fall back to; the others have one each.
    let mut policies = Vec::new();
    for (path, policy) in object(&cases["integration_policies"]) {
        policies.push(match (path.as_str(), &policy["route"]) {
            ("vhost", _) => json!({"name": "vhost", "hosts": ["vhost.test"], "envoy": policy}),
            // No route policy: the virtual host's own serves the path.
            (_, Value::Null) => continue,
            (path, route) => json!({"name": path, "hosts": ["vhost.test"], "paths": [{"prefix": path}],
                "inherit": "vhost", "envoy": route}),
        });
    }
    let derived = array(&cases["derived_from_source"]);
    for (i, case) in derived.iter().enumerate() {
        let policy = &case["policy"];
        let (name, host) = (format!("derived-{i}"), derived_host(i));
        if policy["route"].is_null() {
            policies.push(json!({"name": name, "hosts": [host], "envoy": policy}));
            continue;
        }
        let vhost = format!("{name}-vhost");
        policies.push(json!({"name": vhost, "hosts": [&host], "envoy": policy["vhost"]}));
        policies.push(json!({"name": name, "hosts": [&host], "paths": [{"prefix": "/route"}],
            "inherit": vhost, "envoy": policy["route"]}));
    }
    let bench = Bench::start(&policies);

    for case in array(&cases["integration_cases"]) {
        let name = text(&case["name"]);
        let request = request(&case["request"], "vhost.test", None);
        let mut expected = strings(&case["expect_exact_headers"]);
        let status = take(&mut expected, ":status").parse().expect("a status");
        if text(&case["answered_by"]).starts_with("upstream") {
            bench.passed(name, &request, status, &expected);
            continue;
        }
        let response = bench.answered(name, &request);
        assert_eq!(u64::from(response.status), status, "{name}: {response:?}");
        // Exactly these, and what every answer has besides.
        let mut got = response.headers.clone();
        got.retain(|(header, _)| header != "date" && header != "vary");
        got.sort();
        expected.sort();
        assert_eq!(got, expected, "{name}");
    }
    for (i, case) in derived.iter().enumerate() {
        let name = text(&case["name"]);
        let path = if case["policy"]["route"].is_null() { "/" } else { "/route" };
        let request = request(&case["request"], &derived_host(i), Some(path));
        expect(&bench, name, &request, &case["expect"]);
    }
    bench.kernel_gave(50);
}

#[test]
fn gateway_api() {
    let cases = load("gateway_api");
    let policies = object(&cases["policies"]).map(|(name, policy)| {
        let path = &policy["match"]["pathPrefix"];
        json!({"name": name, "hosts": ["gateway.test"], "paths": [{"prefix": path}], "gateway-api": policy["cors"]})
    });
    let bench = Bench::start(&policies.collect::<Vec<_>>());
    for case in array(&cases["cases"]) {
        let name = text(&case["name"]);
        let request = request(&case["request"], "gateway.test", None);
        let expect = &case["expect"];
        let blanks = expect["ignore_whitespace_in_values"] == true;
        let valid = object(&expect["headers_valid_values"]);
        if case["kind"] == "actual" {
            // The proxy answers: any of the valid answers must come through as it is.
            let headers: Vec<_> = valid.map(|(h, values)| (h.clone(), text(&values[0]).to_owned())).collect();
            bench.passed(name, &request, 200, &headers);
            continue;
        }
        let response = bench.answered(name, &request);
        assert!(array(&expect["status_any_of"]).contains(&json!(response.status)), "{name}: {response:?}");
        for (header, values) in valid {
            let squeeze = |v: &str| if blanks { v.replace(' ', "") } else { v.to_owned() };
            let got = response.header(header).map(squeeze);
            let fits = array(values).iter().any(|v| got.as_deref() == Some(&squeeze(text(v))));
            assert!(fits, "{name}: {header} is {got:?}, not one of {values}");
        }
        for header in array(&expect["headers_absent"]) {
            assert_eq!(response.header(text(header)), None, "{name}: {header}");
        }
    }
    bench.kernel_gave(75);
}

#[test]
fn gateway_api_validation() {
    for case in array(&load("gateway_api")["crd_validation_cases"]) {
        let name = text(&case["name"]);
        let policy = json!({"name": "case", "hosts": ["gateway.test"], "gateway-api": case["filter"]});
        assert_checked(name, policy, case["accepted"] == true);
    }
}

#[test]
fn ingress_nginx() {
    let cases = load("ingress_nginx");
    let groups = ["e2e_cases", "config_cases", "derived_preflight_cases"];
    let all: Vec<_> = groups.iter().flat_map(|g| array(&cases[*g]).iter().map(move |c| (*g, c))).collect();
    let host = |i: usize| format!("i{i}.ingress.test");
    let policies = all.iter().enumerate().map(|(i, (_, case))| {
        json!({"name": format!("case-{i}"), "hosts": [host(i)], "ingress-nginx": case["annotations"]})
    });
    let bench = Bench::start(&policies.collect::<Vec<_>>());
    for (i, (group, case)) in all.iter().enumerate() {
        let name = text(&case["name"]);
        match *group {
            "e2e_cases" => {
                for wanted in array(&case["requests"]) {
                    ingress_exchange(&bench, name, &host(i), wanted);
                }
            }
            "config_cases" => ingress_parsed(&bench, name, &host(i), &case["parsed"], &cases["defaults"]),
            _ => expect(&bench, name, &request(&case["request"], &host(i), None), &case["expect"]),
        }
    }
    bench.kernel_gave(85);
}

/// The project's end-to-end tests send GETs: those pass. A preflight of the same origin must be answered where the GET
/// would have had CORS headers, and pass where not.
fn ingress_exchange(bench: &Bench, name: &str, host: &str, wanted: &Value) {
    let wanted_headers = &wanted["expect"]["headers"];
    let headers = if wanted_headers.is_null() { Vec::new() } else { strings(wanted_headers) };
    let status = wanted["expect"]["status"].as_u64().expect("a status");
    bench.passed(name, &request(wanted, host, None), status, &headers);
    let Some(origin) = wanted["headers"]["Origin"].as_str() else { return };
    let request = preflight(host, origin);
    if headers.is_empty() {
        bench.passed(name, &request, 200, &[]);
        return;
    }
    let response = bench.answered(name, &request);
    assert_eq!(response.status, 204, "{name}: {response:?}");
    for (header, value) in headers {
        assert_eq!(response.header(&header), Some(value.as_str()), "{name}: {header}");
    }
}

/// What the controller parses shows in the answers.
fn ingress_parsed(bench: &Bench, name: &str, host: &str, parsed: &Value, defaults: &Value) {
    if parsed["enabled"] == false {
        bench.passed(name, &preflight(host, "https://x.example"), 200, &[]);
        return;
    }
    let origins = parsed["origins"].as_array().map_or_else(
        || vec![("https://x.example", "*")],
        |list| list.iter().map(|o| (text(o), text(o))).collect(),
    );
    for (origin, echoed) in origins {
        let response = bench.answered(name, &preflight(host, origin));
        assert_eq!(response.header("access-control-allow-origin"), Some(echoed), "{name}");
        for (field, annotation, header) in [
            ("headers", "cors-allow-headers", "access-control-allow-headers"),
            ("methods", "cors-allow-methods", "access-control-allow-methods"),
            ("expose", "cors-expose-headers", "access-control-expose-headers"),
            ("max_age", "cors-max-age", "access-control-max-age"),
        ] {
            let value = match &parsed[field] {
                Value::Null => continue,
                value if value == "<default>" => &defaults[annotation],
                value => value,
            };
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            assert_eq!(response.header(header), Some(value.as_str()), "{name}: {header}");
        }
        if let Some(credentials) = parsed["credentials"].as_bool() {
            let got = response.header("access-control-allow-credentials");
            assert_eq!(got, credentials.then_some("true"), "{name}");
        }
    }
    if !parsed["origins"].is_null() {
        bench.passed(name, &preflight(host, "https://not-in-the-list.example"), 200, &[]);
    }
}

#[test]
fn native_request_headers() {
    let cases = load("native_strict");
    let cases = array(&cases["acrh"]["cases"]);
    let host = |i: usize| format!("acrh{i}.native.test");
    let policies = cases.iter().enumerate().map(|(i, case)| {
        json!({"name": format!("acrh-{i}"), "hosts": [host(i)], "origins": ["https://app.example"],
            "headers": case["allowed"]})
    });
    let bench = Bench::start(&policies.collect::<Vec<_>>());
    for (i, case) in cases.iter().enumerate() {
        let lines = |value: &Value| -> Vec<Vec<String>> {
            array(value).iter().map(|ls| array(ls).iter().map(|l| text(l).to_owned()).collect()).collect()
        };
        let (accepted, rejected) = (lines(&case["accepted"]), lines(&case["rejected"]));
        for (given, accept) in accepted.iter().map(|l| (l, true)).chain(rejected.iter().map(|l| (l, false))) {
            // Blanks at both ends of a line are not part of the value (RFC 9110 §5.5): over a socket the daemon
            // cannot see them, so a case that has some is judged by what is left of it.
            let seen: Vec<String> = given.iter().map(|l| l.trim_matches([' ', '\t']).to_owned()).collect();
            let accept = if seen == *given || accept { accept } else { accepted.contains(&seen) };
            let name = format!("{}: {given:?}", text(&case["desc"]));
            let mut request = format!(
                "OPTIONS / HTTP/1.1\r\nHost: {}\r\nOrigin: https://app.example\r\nAccess-Control-Request-Method: GET\r\n",
                host(i)
            );
            for line in given {
                write!(request, "Access-Control-Request-Headers:{line}\r\n").expect("writing into a string");
            }
            request += "\r\n";
            let response = bench.answered(&name, request.as_bytes());
            assert_eq!(response.status, if accept { 204 } else { 403 }, "{name}: {response:?}");
            assert_eq!(!response.cors_headers().is_empty(), accept, "{name}: {response:?}");
        }
    }
    bench.kernel_gave(15);
}

#[test]
fn native_answer() {
    let cases = load("native_strict");
    let answer = &cases["answer"];
    let bench = Bench::start(&[
        json!({"name": "answer", "hosts": ["*"], "origins": ["https://app.example"], "methods": ["PUT"]}),
    ]);
    let send = |origin: &str, method: &str| {
        let request = preflightd_tests::client::preflight("native.test", "/", origin, method, None);
        bench.answered(&format!("{method} from {origin}"), &request)
    };
    for method in array(&answer["methods_safelisted_need_no_ACAM"]) {
        assert_eq!(json!(send("https://app.example", text(method)).status), answer["success"], "{method}");
    }
    assert_eq!(json!(send("https://app.example", "PUT").status), answer["success"]);
    for (origin, method) in [("https://app.example", "DELETE"), ("https://evil.example", "PUT")] {
        let response = send(origin, method);
        assert_eq!(json!(response.status), answer["failure"]);
        assert_eq!(answer["failure_headers"], "none");
        assert!(response.cors_headers().is_empty(), "{response:?}");
    }
    bench.kernel_gave(100);
}

#[test]
fn native_origin_patterns() {
    let cases = load("native_strict");
    for pattern in array(&cases["origin_pattern_accepted"]) {
        assert_checked(text(pattern), json!({"name": "p", "hosts": ["*"], "origins": [pattern]}), true);
    }
    for (pattern, why) in object(&cases["origin_pattern_rejected"]) {
        let name = format!("{pattern} ({why})");
        assert_checked(&name, json!({"name": "p", "hosts": ["*"], "origins": [pattern]}), false);
    }
}

#[test]
fn native_refused_configurations() {
    let origin = "https://app.example";
    for kind in array(&load("native_strict")["refused_configs"]) {
        let kind = text(kind);
        let examples = match kind {
            "no origin" => vec![json!({}), json!({"origins": []})],
            "invalid origin pattern" => vec![json!({"origins": ["https://app.example/"]})],
            "null origin" => vec![json!({"origins": ["null"]})],
            "file scheme" => vec![json!({"origins": ["file://"]})],
            "default port written out" => {
                vec![
                    json!({"origins": ["https://app.example:443"]}),
                    json!({"origins": ["http://app.example:80"]}),
                ]
            }
            "'*' origin + credentialed" => vec![json!({"origins": ["*"], "credentials": true})],
            "insecure (non-https, non-loopback/localhost) origin + credentialed" => {
                vec![json!({"origins": ["http://app.example"], "credentials": true})]
            }
            "wildcard over a public suffix + credentialed" => vec![
                json!({"origins": ["https://*.com"], "credentials": true}),
                json!({"origins": ["https://*.co.uk"], "credentials": true}),
            ],
            "invalid method name" => vec![json!({"origins": [origin], "methods": ["P UT"]})],
            "forbidden method CONNECT/TRACE/TRACK" => {
                ["CONNECT", "TRACE", "TRACK"].map(|m| json!({"origins": [origin], "methods": [m]})).into()
            }
            "invalid header name" => vec![json!({"origins": [origin], "headers": ["x y"]})],
            "forbidden request-header name (Cookie, Host, Origin, Sec-*, Proxy-*, ...)" => {
                ["Cookie", "Host", "Origin", "Sec-X", "Proxy-X", "Connection", "Date"]
                    .map(|h| json!({"origins": [origin], "headers": [h]}))
                    .into()
            }
            "response-only names as request headers (Access-Control-Allow-*, -Expose-, -Max-Age)" => {
                ["Access-Control-Allow-Origin", "Access-Control-Expose-Headers", "Access-Control-Max-Age"]
                    .map(|h| json!({"origins": [origin], "headers": [h]}))
                    .into()
            }
            "forbidden response-header name (Set-Cookie, Set-Cookie2)" => {
                ["Set-Cookie", "Set-Cookie2"].map(|h| json!({"origins": [origin], "expose": [h]})).into()
            }
            "request-only names as exposed (Origin, Access-Control-Request-*)" => {
                ["Origin", "Access-Control-Request-Method"]
                    .map(|h| json!({"origins": [origin], "expose": [h]}))
                    .into()
            }
            "exposing '*' + credentialed" => {
                vec![json!({"origins": [origin], "expose": ["*"], "credentials": true})]
            }
            "max-age < -1 or > 86400" => {
                vec![
                    json!({"origins": [origin], "max_age": -2}),
                    json!({"origins": [origin], "max_age": 86_401}),
                ]
            }
            other => panic!("no example of: {other}"),
        };
        for mut policy in examples {
            policy["name"] = json!("refused");
            policy["hosts"] = json!(["*"]);
            assert_checked(&format!("{kind}: {policy}"), policy, false);
        }
    }
}

/// Expects what `expect` says: an answer with its status and headers, or that the request passes.
fn expect(bench: &Bench, name: &str, request: &[u8], expect: &Value) {
    if expect["answered_by"] == "upstream" {
        bench.passed(name, request, 200, &[]);
        return;
    }
    let response = bench.answered(name, request);
    assert_eq!(json!(response.status), expect["status"], "{name}: {response:?}");
    for (header, value) in strings(&expect["headers"]) {
        assert_eq!(response.header(&header), Some(value.as_str()), "{name}: {header}");
    }
    for header in expect["absent"].as_array().into_iter().flatten() {
        assert_eq!(response.header(text(header)), None, "{name}: {header}");
    }
}

/// Runs `check` on a file with this policy alone.
fn assert_checked(name: &str, policy: Value, good: bool) {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("policy.toml");
    fs::write(&file, toml(&[policy])).expect("writing the policy");
    let output = run([Path::new("check"), Path::new("--format"), Path::new("json"), &file]);
    let said = format!(
        "{name}:\n{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert_eq!(output.status.code(), Some(i32::from(!good)), "{said}");
}

/// A raw request of a case.
fn request(request: &Value, host: &str, path: Option<&str>) -> Vec<u8> {
    let path = request["path"].as_str().or(path).expect("a path");
    let mut head = format!("{} {path} HTTP/1.1\r\nHost: {host}\r\n", text(&request["method"]));
    for (header, value) in strings(&request["headers"]) {
        write!(head, "{header}: {value}\r\n").expect("writing into a string");
    }
    (head + "\r\n").into_bytes()
}

fn preflight(host: &str, origin: &str) -> Vec<u8> {
    preflightd_tests::client::preflight(host, "/", origin, "POST", None)
}

fn derived_host(i: usize) -> String {
    format!("d{i}.envoy.test")
}

fn toml(policies: &[Value]) -> String {
    toml::to_string(&json!({ "policy": policies })).expect("policies as TOML")
}

fn load(name: &str) -> Value {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("cases/{name}.json"));
    let bytes = fs::read(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    serde_json::from_slice(&bytes).unwrap_or_else(|e| panic!("{}: {e}", file.display()))
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text"))
}

fn array(value: &Value) -> &Vec<Value> {
    value.as_array().unwrap_or_else(|| panic!("{value} is no list"))
}

fn object(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().unwrap_or_else(|| panic!("{value} is no object")).iter()
}

/// An object of texts.
fn strings(value: &Value) -> Vec<(String, String)> {
    object(value).map(|(name, value)| (name.clone(), text(value).to_owned())).collect()
}

fn take(headers: &mut Vec<(String, String)>, name: &str) -> String {
    let at = headers.iter().position(|(header, _)| header == name).expect("a header of the case");
    headers.remove(at).1
}
