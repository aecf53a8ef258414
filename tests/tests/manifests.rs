//! Manifests on the command line: `import`, `check` and `explain` take what `kubectl` takes.

use preflightd_tests::daemon::{preflightd, run};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Output, Stdio},
};
use tempfile::TempDir;

fn here() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn manifest(name: &str) -> PathBuf {
    here().join("manifests").join(name)
}

fn read(path: &Path) -> Value {
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs preflightd with something on its standard input.
fn run_with(arguments: &[&str], input: &[u8]) -> Output {
    let mut command = preflightd();
    let piped = || Stdio::piped();
    let mut child =
        command.args(arguments).stdin(piped()).stdout(piped()).stderr(piped()).spawn().expect("preflightd");
    child.stdin.take().expect("standard input").write_all(input).expect("writing to preflightd");
    child.wait_with_output().expect("waiting for preflightd")
}

/// What `explain` says of a request by these policies.
fn explain(policy: &Path, more: &[&str], request: &Value) -> Value {
    let path = policy.display().to_string();
    let mut head = format!(
        "{} {} HTTP/1.1\r\n",
        request["method"].as_str().expect("a method"),
        request["target"].as_str().expect("a target")
    );
    for (name, value) in request["headers"].as_object().expect("headers") {
        head += &[name, ": ", value.as_str().expect("a value"), "\r\n"].concat();
    }
    let arguments = [&["explain", "--policy", &path, "--raw", "--format", "json"], more].concat();
    let output = run_with(&arguments, (head + "\r\n").as_bytes());
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"))
}

/// Status and headers of the answer that `explain` shows.
fn answer(report: &Value) -> (u64, BTreeMap<String, String>) {
    let text = report["answer"].as_str().unwrap_or_else(|| panic!("no answer: {report}"));
    let mut lines = text.lines();
    let status =
        lines.next().and_then(|line| line.split(' ').nth(1)).expect("a status").parse().expect("a number");
    let headers = lines.filter_map(|line| line.split_once(": "));
    (status, headers.map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned())).collect())
}

fn expect(name: &str, report: &Value, expected: &Value) {
    if expected["pass"] == true {
        assert_eq!(report["verdict"], "passed", "{name}: {report}");
        return;
    }
    let (status, headers) = answer(report);
    assert!(
        expected["status_any_of"].as_array().expect("statuses").contains(&json!(status)),
        "{name}: {report}"
    );
    for (header, value) in expected["headers"].as_object().into_iter().flatten() {
        assert_eq!(headers.get(header).map(String::as_str), value.as_str(), "{name}: {header}: {report}");
    }
    for header in expected["absent"].as_array().into_iter().flatten() {
        assert!(!headers.contains_key(header.as_str().expect("a name")), "{name}: {header}: {report}");
    }
}

/// The manifests of the documents that the product started from, and what those say is answered; and the same from the
/// policy file that `import` makes of them.
#[test]
fn the_documents_examples() {
    let directory = TempDir::with_prefix("manifests-").expect("a directory");
    for (i, case) in read(&manifest("expected.json")).as_array().expect("cases").iter().enumerate() {
        let file = case["manifest"].as_str().expect("a manifest");
        let by_class = case["expect"]["by_gateway_class"].as_object();
        let ways: Vec<(&str, &Value)> = match by_class {
            None => vec![("unknown", &case["expect"])],
            Some(classes) => classes
                .iter()
                .map(|(class, expected)| {
                    (if class.contains("dialect envoy") { "envoy" } else { "gateway-api" }, expected)
                })
                .collect(),
        };
        for (dialect, expected) in ways {
            let name = format!("{i}: {file} as {dialect}");
            let how = ["--gateway-dialect", dialect];
            expect(&name, &explain(&manifest(file), &how, &case["request"]), expected);
            let path = manifest(file);
            let imported = run(["import", "-f", &path.display().to_string(), "--gateway-dialect", dialect]);
            assert_eq!(imported.status.code(), Some(0), "{name}: {imported:?}");
            let policies = directory.path().join(format!("{i}-{dialect}.toml"));
            fs::write(&policies, &imported.stdout).expect("writing the policies");
            expect(&format!("{name}, imported"), &explain(&policies, &[], &case["request"]), expected);
        }
    }
}

#[test]
fn the_examples_are_current() {
    let shared = here().join("../../shared/examples");
    if !shared.is_dir() {
        eprintln!("skipped: no {} beside this checkout", shared.display());
        return;
    }
    for entry in fs::read_dir(manifest("")).expect("the manifests") {
        let name = entry.expect("a manifest").file_name();
        let read = |directory: &Path| fs::read(directory.join(&name)).expect("reading a manifest");
        assert!(read(&manifest("")) == read(&shared), "manifests/{} is not the shared one", name.display());
    }
}

/// What the API server's validation refuses is an error here, with the object and the field.
#[test]
fn what_the_schema_refuses_is_found() {
    let cases = read(&here().join("cases/gateway_api.json"));
    let directory = TempDir::with_prefix("manifests-").expect("a directory");
    for case in cases["crd_validation_cases"].as_array().expect("cases") {
        let name = case["name"].as_str().expect("a name");
        let route = json!({
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "HTTPRoute",
            "metadata": { "name": "case", "namespace": "shop" },
            "spec": { "parentRefs": [{ "name": "web" }], "hostnames": ["a.example"], "rules": [{
                "filters": [{ "type": "CORS", "cors": case["filter"] }], "backendRefs": [{ "name": "api", "port": 80 }]
            }]}
        });
        let file = directory.path().join("route.json");
        fs::write(&file, route.to_string()).expect("writing a manifest");
        let output = run(["check", "--format", "json", &file.display().to_string()]);
        let accepted = case["accepted"] == true;
        assert_eq!(output.status.code(), Some(i32::from(!accepted)), "{name}: {output:?}");
        let errors: Vec<Value> = text(&output.stdout)
            .lines()
            .map(|line| serde_json::from_str(line).expect("JSON"))
            .filter(|finding: &Value| finding["severity"] == "error")
            .collect();
        assert_eq!(errors.is_empty(), accepted, "{name}: {errors:?}");
        for error in errors {
            assert_eq!(error["file"], "HTTPRoute shop/case", "{name}: {error}");
            let field = error["field"].as_str().unwrap_or_default();
            assert!(field.starts_with("spec.rules[0].filters[0].cors"), "{name}: {error}");
            assert!(!error["help"].as_str().unwrap_or_default().is_empty(), "{name}: {error}");
        }
    }
}

#[test]
fn lists_and_standard_input() {
    let list = json!({
        "apiVersion": "v1", "kind": "List", "items": [
            { "apiVersion": "v1", "kind": "Service", "metadata": { "name": "api" } },
            {
                "apiVersion": "networking.k8s.io/v1", "kind": "Ingress",
                "metadata": { "name": "a", "annotations": { "nginx.ingress.kubernetes.io/enable-cors": "true" } },
                "spec": { "ingressClassName": "nginx", "rules": [{ "host": "a.example", "http": { "paths": [
                    { "path": "/", "pathType": "Prefix" }
                ]}}]}
            }
        ]
    });
    let output = run_with(&["import", "-f", "-"], list.to_string().as_bytes());
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(text(&output.stdout).contains("hosts = [\"a.example\"]"), "{output:?}");
    let said = text(&output.stderr);
    assert!(said.contains("origin-star-credentials") && said.contains("Ingress default/a"), "{said}");
}

#[test]
fn what_is_no_manifest() {
    for (name, input, code, words) in [
        ("no YAML", "a: [", 2, "neither YAML nor JSON"),
        ("no object", "a: 1", 2, "no apiVersion"),
        ("other kinds", "apiVersion: v1\nkind: Service\nmetadata: {name: a}", 2, "no object says anything"),
        ("nothing", "", 2, "no object says anything"),
        (
            "an object that is wrong",
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: a}\nspec: {rules: 7}",
            1,
            "object-unreadable",
        ),
    ] {
        let output = run_with(&["import", "-f", "-"], input.as_bytes());
        assert_eq!(output.status.code(), Some(code), "{name}: {output:?}");
        assert!(text(&output.stderr).contains(words), "{name}: {output:?}");
    }
}
