//! The command line as scripts use it: words, exit codes, what is printed where.

use serde_json::Value;
use std::{
    fs,
    io::Write as _,
    path::PathBuf,
    process::{Command, Output, Stdio},
};

const CONFIG: &str = r#"
[[listener]]
name = "web"
address = "127.0.0.1:80"
upstream = "127.0.0.1:8080"

[[listener]]
name = "internal"
address = "127.0.0.1:81"
upstream = "127.0.0.1:8080"

[[policy]]
name = "api"
hosts = ["api.example.com"]
listeners = ["web"]
origins = ["https://app.example.com"]
methods = ["PUT"]
headers = ["content-type"]

[[policy]]
name = "gateway"
hosts = ["gateway.example.com"]
[policy.gateway-api]
allowOrigins = ["https://app.example.com"]
allowMethods = ["PUT"]
"#;

const POLICY: &str = r#"
[[policy]]
name = "one"
hosts = ["one.example.com"]
origins = ["https://app.example.com"]
listeners = ["somewhere"]
"#;

/// A directory with files of its own, removed at the end.
struct Files(PathBuf);

impl Files {
    fn new(name: &str, files: &[(&str, &str)]) -> Self {
        let path = std::env::temp_dir().join(format!("preflightd-cli-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).expect("a directory");
        for (name, text) in files {
            let path = path.join(name);
            fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
            fs::write(path, text).expect("a file");
        }
        Self(path)
    }

    fn run(&self, args: &[&str]) -> Output {
        self.run_with(args, "")
    }

    fn run_with(&self, args: &[&str], input: &str) -> Output {
        let mut child = Command::new(env!("CARGO_BIN_EXE_preflightd"))
            .args(args)
            .current_dir(&self.0)
            .env_remove("RUST_LOG")
            .env_remove("CLICOLOR_FORCE")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("preflightd");
        // It may end without reading it.
        let _ = child.stdin.take().expect("its input").write_all(input.as_bytes());
        child.wait_with_output().expect("its output")
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("UTF-8")
}

#[test]
fn exit_codes_and_words() {
    let files = Files::new(
        "codes",
        &[
            ("good.toml", CONFIG),
            ("policy.toml", POLICY),
            ("warned.toml", &CONFIG.replacen("8080\"\n", "8080\"\nproxy_protocol = \"off\"\n", 1)),
            ("bad.toml", &CONFIG.replacen("origins", "orgins", 1)),
            ("conflict.toml", &(POLICY.to_owned() + &POLICY.replace("\"one\"", "\"two\""))),
            ("asks.toml", &CONFIG.replace(":8080", ":1")),
            ("latin1.toml", ""),
            (
                "split/config.toml",
                &(CONFIG.to_owned()
                    + "[[policy]]\nname = \"x\"\nhosts = [\"x\"]\norigins = [\"https://a.example\"]\n")
                    .replacen('\n', "policy_dir = \"d\"\npolicy_files = [\"p.toml\", \"gone.toml\"]\n", 1),
            ),
            ("split/p.toml", POLICY),
            ("split/d/a.toml", "[[policy]]\nname = \"x\"\n"),
            ("split/d/ignored.txt", "="),
            ("split/d/.hidden.toml", "="),
        ],
    );
    fs::write(files.0.join("latin1.toml"), b"# \xe9\n").expect("a file");
    let ask: &[&str] =
        &["--origin", "https://app.example.com", "--method", "PUT", "--header", "Content-Type"];
    let explain = |more: &[&'static str]| [&["explain", "--config", "good.toml"][..], ask, more].concat();
    // Name, arguments, exit code, parts of the standard output, parts of the standard error.
    #[expect(clippy::type_complexity, reason = "a table of cases, read once")]
    let cases: &[(&str, Vec<&str>, i32, &[&str], &[&str])] = &[
        ("no command", vec![], 2, &[], &["Usage:"]),
        ("help", vec!["--help"], 0, &["Examples:", "Exit codes:"], &[]),
        ("help of run", vec!["run", "--help"], 0, &["Examples:", "SIGHUP"], &[]),
        ("help of probe", vec!["probe", "--help"], 0, &["Examples:", "changes nothing"], &[]),
        ("probe of port 0", vec!["probe", "--port", "0"], 2, &[], &["--port"]),
        (
            "probe with both",
            vec!["probe", "--config", "good.toml", "--port", "80"],
            2,
            &[],
            &["cannot be used"],
        ),
        ("version", vec!["--version"], 0, &["preflightd "], &[]),
        ("unknown flag", vec!["check", "--nonsense"], 2, &[], &["--nonsense"]),
        ("run without anything", vec!["run"], 2, &[], &["--config"]),
        ("run with half of it", vec!["run", "--listen", "127.0.0.1:0"], 2, &[], &["--upstream"]),
        (
            "run with both",
            vec!["run", "--config", "good.toml", "--listen", "127.0.0.1:0"],
            2,
            &[],
            &["cannot be used"],
        ),
        ("run a missing file", vec!["run", "--config", "none.toml"], 2, &[], &["cannot read none.toml"]),
        (
            "run a bad file",
            vec!["run", "--config", "bad.toml"],
            1,
            &[],
            &["bad.toml:16:1", "did you mean `origins`?"],
        ),
        ("check good", vec!["check", "good.toml"], 0, &["ok: 2 policies in 1 file, 0 warnings"], &[]),
        ("check a policy file", vec!["check", "policy.toml"], 0, &["ok: 1 policy in 1 file"], &[]),
        ("check both", vec!["check", "good.toml", "policy.toml"], 0, &["ok: 3 policies in 2 files"], &[]),
        (
            "check bad",
            vec!["check", "bad.toml"],
            1,
            &["error[unknown-key]", "--> bad.toml:16:1", "^^^^^^", "1 error"],
            &[],
        ),
        (
            "check warned",
            vec!["check", "warned.toml"],
            0,
            &["warning[client-address-hidden]", "1 warning"],
            &[],
        ),
        ("check warned strictly", vec!["check", "--deny-warnings", "warned.toml"], 1, &["1 warning"], &[]),
        (
            "check and ask a dead upstream",
            vec!["check", "--ask-upstreams", "asks.toml"],
            0,
            &["warning[upstream-unclear]", "--> asks.toml:5:12", "2 warnings"],
            &[],
        ),
        ("check a conflict", vec!["check", "conflict.toml"], 1, &["error[", "--> conflict.toml:8:1"], &[]),
        ("check missing", vec!["check", "none.toml"], 2, &[], &["cannot read none.toml"]),
        ("check no UTF-8", vec!["check", "latin1.toml"], 2, &[], &["latin1.toml is not UTF-8"]),
        (
            "check policies in other files",
            vec!["check", "split/config.toml"],
            1,
            &[
                "config.toml:2:27",
                "cannot read split/gone.toml: No such file",
                "--> split/p.toml:6:14",
                "no listener is named `somewhere`",
                "--> split/d/a.toml:2:8",
                "another policy is named `x` too",
                "split/config.toml:",
            ],
            &[],
        ),
        (
            "explain allowed",
            explain(&["--url", "https://api.example.com/v1"]),
            0,
            &["good.toml:12", "HTTP/1.1 204 No Content\\r\\n", "goes on"],
            &[],
        ),
        (
            "explain denied",
            explain(&["--url", "https://api.example.com/", "--header", "x-other"]),
            1,
            &["denied_headers", "403", "refuses"],
            &[],
        ),
        (
            "explain passed",
            explain(&["--url", "https://other.example.com/"]),
            1,
            &["passed, no_host", "no policy on this listener serves this host"],
            &[],
        ),
        (
            "explain another listener",
            explain(&["--url", "http://api.example.com/", "--listener", "internal"]),
            1,
            &["no_host", "listener internal"],
            &[],
        ),
        (
            "explain no listener",
            explain(&["--url", "http://api.example.com/", "--listener", "wep"]),
            2,
            &[],
            &["there are: web, internal"],
        ),
        (
            "explain what the browser refuses",
            explain(&["--url", "https://gateway.example.com/"]),
            1,
            &["answered, allowed", "Access-Control-Allow-Headers does not list content-type"],
            &[],
        ),
        ("explain no URL", explain(&[]), 2, &[], &["--url"]),
        ("explain nowhere", vec!["explain", "--url", "http://h/"], 2, &[], &["--config"]),
        (
            "explain a policy file",
            vec![
                "explain",
                "--policy",
                "policy.toml",
                "--listener",
                "somewhere",
                "-H",
                "Origin: https://app.example.com",
                "-H",
                "Access-Control-Request-Method: GET",
                "http://one.example.com/",
            ],
            0,
            &["policy.toml:2"],
            &[],
        ),
        (
            "explain by a bad file",
            vec!["explain", "--config", "bad.toml", "--url", "http://h/"],
            1,
            &[],
            &["bad.toml:16:1"],
        ),
        (
            "explain by a dead daemon",
            vec!["explain", "--admin-socket", "none.sock", "--url", "http://h/"],
            2,
            &[],
            &["cannot ask the daemon at none.sock"],
        ),
    ];
    let mut failed = Vec::new();
    for (name, args, code, out, err) in cases {
        let got = files.run(args);
        let (text, errors) = (stdout(&got), stderr(&got));
        let fits = got.status.code() == Some(*code)
            && out.iter().all(|part| text.contains(part))
            && err.iter().all(|part| errors.contains(part))
            && (out.is_empty() == text.is_empty());
        if !fits {
            failed.push(format!(
                "== {name}: {}, want {code}\n{text}---\n{errors}want {out:?} and {err:?}",
                got.status
            ));
        }
        assert!(!text.contains('\u{1b}') && !errors.contains('\u{1b}'), "{name}: colours into a pipe");
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

#[test]
fn findings_as_json_are_one_a_line() {
    let files =
        Files::new("json", &[("bad.toml", &CONFIG.replace("origins", "orgins").replace(":8080", ""))]);
    let got = files.run(&["check", "--format", "json", "bad.toml"]);
    assert_eq!(got.status.code(), Some(1));
    let findings: Vec<Value> =
        stdout(&got).lines().map(|line| serde_json::from_str(line).expect("an object a line")).collect();
    let places: Vec<_> =
        findings.iter().map(|f| (f["code"].as_str(), f["line"].as_u64(), f["column"].as_u64())).collect();
    assert_eq!(
        places,
        [
            (Some("invalid-value"), Some(5), Some(12)),
            (Some("invalid-value"), Some(10), Some(12)),
            (Some("unknown-key"), Some(16), Some(1)),
        ]
    );
    for finding in &findings {
        assert_eq!(finding["severity"], "error");
        assert_eq!(finding["file"], "bad.toml");
        assert!(finding["message"].is_string() && finding["help"].is_string(), "{finding}");
    }
}

#[test]
fn explains_a_raw_request() {
    let files = Files::new("raw", &[("good.toml", CONFIG)]);
    let preflight = "OPTIONS /v1 HTTP/1.1\r\nHost: api.example.com\r\nOrigin: https://app.example.com\r\n\
                     Access-Control-Request-Method: PUT\r\n\r\n";
    for (name, request, code, verdict, outcome) in [
        ("a preflight", preflight.to_owned(), 0, "answered", "allowed"),
        ("with a cookie", preflight.replace("Origin", "Cookie: a=b\r\nOrigin"), 1, "passed", "credentials"),
        ("with bare LF", preflight.replace("\r\n", "\n"), 1, "passed", "bare_lf"),
        ("without an end", preflight.trim_end().to_owned(), 1, "incomplete", "incomplete"),
        ("nothing", String::new(), 1, "incomplete", "incomplete"),
        ("another", "GET / HTTP/1.1\r\n\r\n".to_owned(), 1, "passed", "not_options"),
    ] {
        let got =
            files.run_with(&["explain", "--config", "good.toml", "--raw", "--format", "json"], &request);
        assert_eq!(got.status.code(), Some(code), "{name}: {}", stderr(&got));
        let report: Value = serde_json::from_str(&stdout(&got)).expect(name);
        assert_eq!(report["verdict"], verdict, "{name}");
        assert_eq!(report["outcome"], outcome, "{name}");
        if verdict == "answered" {
            let answer = report["answer"].as_str().expect("an answer");
            assert!(answer.starts_with("HTTP/1.1 204 No Content\r\nDate: "), "{name}: {answer}");
            assert_eq!(report["route"]["policy"], "api", "{name}");
            assert_eq!(report["route"]["line"], 12, "{name}");
        }
    }
}

#[test]
#[cfg(feature = "ebpf")]
fn explains_what_a_steered_listener_answers() {
    let steered = CONFIG.replacen("upstream = \"127.0.0.1:8080\"", "steer = true", 1);
    let by_workers = steered.clone() + "[steer]\nkernel_answers = false\n";
    let files = Files::new(
        "steered",
        &[("good.toml", CONFIG), ("steered.toml", &steered), ("by_workers.toml", &by_workers)],
    );
    let preflight = "OPTIONS /v1 HTTP/1.1\r\nHost: api.example.com\r\nOrigin: https://app.example.com\r\n\
                     Access-Control-Request-Method: PUT\r\n\r\n";
    // The kernel keeps the connection, a worker beside the proxy ends it.
    for (file, closes, whose) in [
        ("good.toml", false, "upstream"),
        ("steered.toml", false, "to the proxy"),
        ("by_workers.toml", true, "to the proxy"),
    ] {
        let explain = |request: &str| {
            let got = files.run_with(&["explain", "--config", file, "--raw", "--format", "json"], request);
            serde_json::from_str::<Value>(&stdout(&got)).expect(file)
        };
        let answered = explain(preflight);
        let answer = answered["answer"].as_str().expect("an answer");
        assert_eq!(answer.contains("\r\nConnection: close\r\n"), closes, "{file}: {answer}");
        let passed = explain("GET / HTTP/1.1\r\n\r\n");
        let words = passed["words"].as_str().expect("words");
        assert!(words.contains(whose), "{file}: {words}");
    }
}

#[test]
#[cfg(feature = "ebpf")]
fn explains_which_tier_decides() {
    let paths = CONFIG.replacen("listeners = [\"web\"]", "paths = [{ prefix = \"/v1\" }]", 1);
    let steered = paths.replacen("upstream = \"127.0.0.1:8080\"", "steer = true", 1);
    let by_workers = steered.clone() + "[steer]\nkernel_answers = false\n";
    let files = Files::new("tiers", &[("steered.toml", &steered), ("by_workers.toml", &by_workers)]);
    let preflight = "OPTIONS /v1 HTTP/1.1\r\nHost: api.example.com\r\nOrigin: https://app.example.com\r\n\
                     Access-Control-Request-Method: PUT\r\n\r\n";
    let with = |from: &str, to: &str| {
        assert!(preflight.contains(from), "{from}");
        preflight.replacen(from, to, 1)
    };
    let long = with("\r\n\r\n", &format!("\r\nX-Padding: {}\r\n\r\n", "x".repeat(2100)));
    for (name, file, listener, request, tier, words, verdict) in [
        ("allowed", "steered", "web", preflight.to_owned(), "kernel", "stays open", "answered"),
        ("denied", "steered", "web", with("https://app", "https://evil"), "kernel", "stays open", "answered"),
        ("host in capitals", "steered", "web", with("api", "API"), "worker", "its host", "answered"),
        ("long head", "steered", "web", long, "worker", "longer", "answered"),
        ("unusual method", "steered", "web", with("PUT", "BREW"), "worker", "method", "answered"),
        ("no such path", "steered", "web", with("/v1", "/v2"), "proxy", "to the proxy", "passed"),
        ("switched off", "by_workers", "web", preflight.to_owned(), "worker", "off", "answered"),
        ("not steered", "steered", "internal", preflight.to_owned(), "worker", "", "answered"),
    ] {
        let file = format!("{file}.toml");
        let arguments = ["explain", "--config", &file, "--listener", listener, "--raw", "--format", "json"];
        let got = files.run_with(&arguments, &request);
        let report: Value = serde_json::from_str(&stdout(&got)).expect(name);
        assert_eq!(report["tier"], tier, "{name}: {report:#}");
        let said = report["tier_words"].as_str().expect("words");
        assert!(if words.is_empty() { said.is_empty() } else { said.contains(words) }, "{name}: {said}");
        assert_eq!(report["verdict"], verdict, "{name}: {report:#}");
        // For people the same words.
        let got = files.run_with(&arguments[..6], &request);
        assert!(stdout(&got).contains(said), "{name}: {}", stdout(&got));
    }
}

/// What a request says may not steer the terminal of who looks at it.
#[test]
fn hostile_requests_are_shown_escaped() {
    let files = Files::new("hostile", &[("good.toml", CONFIG)]);
    for request in [
        "OPTIONS /\u{1b}[2J HTTP/1.1\r\nHost: h\u{1b}[31m\r\nOrigin: \u{9b}x\r\n\r\n",
        "OPTIONS / HTTP/1.1\r\nHost: api.example.com\r\nOrigin: https://app.example.com\u{1b}]0;x\u{7}\r\n\
         Access-Control-Request-Method: PUT\r\n\r\n",
        "OPTIONS / HTTP/1.1\r\nHost: api.example.com\r\nOrigin: https://app.example.com\r\n\
         Access-Control-Request-Method: PUT\r\nAccess-Control-Request-Headers: \u{202e}x\r\n\r\n",
    ] {
        let got = files.run_with(&["explain", "--config", "good.toml", "--raw"], request);
        let text = stdout(&got) + &stderr(&got);
        let steers = |c: char| (c.is_control() && c != '\n') || c == '\u{202e}';
        assert!(!text.contains(steers), "{text:?}");
    }
}

#[test]
#[cfg(feature = "ebpf")]
fn a_probe_says_what_is_missing_and_what_to_do() {
    let netns = "/run/netns/no-such-one";
    let steered = format!(
        "[[listener]]\nname = \"web\"\naddress = \"0.0.0.0:80\"\nsteer = true\n[steer]\nnetns = \"{netns}\"\n"
    );
    let files = Files::new("probe", &[("steered.toml", &steered), ("bad.toml", "[[listener]]\n")]);
    let output = files.run(&["probe", "--config", "steered.toml", "--format", "json"]);
    assert_eq!(output.status.code(), Some(1));
    let report: Value = serde_json::from_str(&stdout(&output)).expect("one object");
    assert_eq!((&report["steer"], &report["observe"]), (&Value::Bool(false), &Value::Bool(false)));
    let checks = report["checks"].as_array().expect("checks");
    for check in checks {
        let met = check["status"] == "ok";
        assert_eq!(check["remedy"] == "", met, "{check}");
    }
    let of = |name: &str| checks.iter().find(|check| check["name"] == name);
    assert_eq!(of("network namespace").expect("looked at")["needed_for"], "observe");

    let output = files.run(&["probe", "--port", "80", "--netns", netns]);
    assert_eq!(output.status.code(), Some(1));
    let text = stdout(&output);
    assert!(text.contains("\nmissing  network namespace"), "{text}");
    assert!(text.ends_with("this node can neither steer nor observe\n"), "{text}");

    let output = files.run(&["probe", "--config", "bad.toml"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("nothing was looked at"), "{}", stderr(&output));
    assert_eq!(files.run(&["probe", "--config", "no-such.toml"]).status.code(), Some(2));
}

#[test]
#[cfg(not(feature = "ebpf"))]
fn a_probe_without_ebpf_says_so() {
    let files = Files::new("probe", &[]);
    let output = files.run(&["probe"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("feature `ebpf`"), "{}", stderr(&output));
}
