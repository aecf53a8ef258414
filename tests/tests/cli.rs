//! The command line's stable words: `run` by arguments, `check`, `explain`, and their exit codes 0, 1 and 2.

use preflightd_tests::{
    Behaviour, Config, Daemon, Upstream,
    client::preflight,
    daemon::{ORIGIN, POLICY, run},
};
use std::{fs, process::Output};

fn text(output: &Output) -> String {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    format!("{}\n{out}{err}", output.status)
}

#[test]
fn run_by_arguments() {
    let upstream = Upstream::start(Behaviour::report());
    let config = Config::new(upstream.address(), POLICY);
    let daemon = Daemon::start_by_arguments(config);
    assert_eq!(daemon.preflight(ORIGIN, "PUT", Some("x-demo")).status, 204);
    assert_eq!(daemon.preflight("https://evil.example", "PUT", None).status, 403);
    let response = daemon.connect().exchange(preflightd_tests::client::get("a.test", "/y"));
    assert_eq!(response.body, b"GET /y HTTP/1.1 +0");
}

#[test]
fn exit_codes() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = |name: &str, text: &str| {
        let file = directory.path().join(name);
        fs::write(&file, text).expect("writing a file");
        file.display().to_string()
    };
    let good = file("good.toml", POLICY);
    let bad = file("bad.toml", &POLICY.replace("https://app.example", "https://app.example/"));
    let explain = ["--url", "http://api.test/x", "--method", "PUT", "--origin"];
    let cases: [(&str, Vec<&str>, i32); 9] = [
        ("a good file", vec!["check", &good], 0),
        ("a bad file", vec!["check", &bad], 1),
        ("a good and a bad file", vec!["check", &good, &bad], 1),
        ("no such file", vec!["check", "/nonexistent.toml"], 2),
        ("no file named", vec!["check"], 2),
        ("no such word", vec!["chekc", &good], 2),
        ("an allowed preflight", [&["explain", "--policy", &good], &explain[..], &[ORIGIN]].concat(), 0),
        (
            "a denied preflight",
            [&["explain", "--policy", &good], &explain[..], &["https://evil.example"]].concat(),
            1,
        ),
        ("run without a listener", vec!["run"], 2),
    ];
    for (name, arguments, code) in cases {
        let output = run(&arguments);
        assert_eq!(output.status.code(), Some(code), "{name}: {}", text(&output));
    }
}

/// A refused policy is named with file and line, and with what to do about it.
#[test]
fn findings_have_a_place_and_a_remedy() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("bad.toml");
    fs::write(&file, POLICY.replace("https://app.example", "https://app.example/")).expect("writing a file");
    let line = 1 + POLICY.lines().position(|l| l.starts_with("origins")).expect("the line");
    let output = run(["check".as_ref(), file.as_os_str()]);
    let said = text(&output);
    assert!(said.contains(&format!("bad.toml:{line}:")), "{said}");
    assert!(said.contains("help"), "{said}");
    let output = run(["check".as_ref(), "--format".as_ref(), "json".as_ref(), file.as_os_str()]);
    let first = output.stdout.split(|b| *b == b'\n').next().unwrap_or_default();
    let finding: serde_json::Value = serde_json::from_slice(first).expect("one JSON object a line");
    assert_eq!((&finding["severity"], &finding["line"]), (&"error".into(), &line.into()), "{finding}");
}

/// `explain` prints the very bytes that the running daemon sends.
#[test]
fn explain_tells_the_bytes_on_the_wire() {
    let upstream = Upstream::start(Behaviour::report());
    let daemon = Daemon::start(Config::new(upstream.address(), POLICY));
    let config = daemon.config_file();
    for (origin, method) in [(ORIGIN, "PUT"), (ORIGIN, "PATCH"), ("https://evil.example", "PUT")] {
        let request = preflight("api.test", "/x", origin, method, Some("x-demo"));
        let sent = daemon.connect().exchange(request).raw.escape_ascii().to_string();
        let output = run([
            "explain".as_ref(),
            "--config".as_ref(),
            config.as_os_str(),
            "--url".as_ref(),
            "http://api.test/x".as_ref(),
            "--origin".as_ref(),
            origin.as_ref(),
            "--method".as_ref(),
            method.as_ref(),
            "--header".as_ref(),
            "x-demo".as_ref(),
        ]);
        // Each line of the answer stands in a line of its own, its ends made visible.
        let said = text(&output);
        for line in sent.split_inclusive("\\r\\n").filter(|line| !line.starts_with("Date")) {
            assert!(said.lines().any(|l| l.trim() == line), "{line} is not in: {said}");
        }
    }
}
