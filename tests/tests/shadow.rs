//! Shadow mode: nothing is answered, and the proxy's answers are compared with ours.
#![forbid(unsafe_code)]

use preflightd_tests::{
    Behaviour, Config, Daemon, Engine, Upstream,
    client::preflight,
    daemon::{ORIGIN, POLICY, run},
    site::wait_until,
    steering::{Lab, Options, can_run, expect_proxy, plain},
};
use serde_json::Value;
use std::sync::Arc;

/// An upstream whose answers differ from those of [`POLICY`] as the path says.
fn upstream() -> Upstream {
    Upstream::start(Behaviour::Http(Arc::new(|request| {
        const ORIGIN_LINE: &str = "Access-Control-Allow-Origin: https://app.example\r\n";
        const METHODS: &str = "Access-Control-Allow-Methods: DELETE, PUT\r\n";
        const HEADERS: &str = "Access-Control-Allow-Headers: X-Demo, Content-Type\r\n";
        const AGE: &str = "Access-Control-Max-Age: 600\r\n";
        let path = request.head.split(' ').nth(1).unwrap_or_default();
        let lines = match path {
            "/none" => String::new(),
            "/age" => [ORIGIN_LINE, METHODS, HEADERS, "Access-Control-Max-Age: 60\r\n"].concat(),
            "/less" => [ORIGIN_LINE, METHODS, AGE].concat(),
            "/methods" => {
                [ORIGIN_LINE, "Access-Control-Allow-Methods: PATCH, PUT\r\n", HEADERS, AGE].concat()
            }
            _ => [ORIGIN_LINE, METHODS, HEADERS, AGE].concat(),
        };
        format!("HTTP/1.1 204 No Content\r\nX-Upstream: yes\r\n{lines}\r\n").into_bytes()
    })))
}

fn report(path: &str) -> (Option<i32>, Value) {
    let output = run(["shadow", "report", "--admin-socket", path, "--format", "json"]);
    (output.status.code(), serde_json::from_slice(&output.stdout).expect("JSON"))
}

#[test]
fn every_difference_is_counted_and_nothing_is_answered() {
    for engine in Engine::BOTH {
        let upstream = upstream();
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("admin").display().to_string();
        let mut config = Config::new(
            upstream.address(),
            format!(
                "[ask]\nper_second = 1000\n\n[shadow]\nenabled = true\nsample = 1.0\nsamples_kept = 3\n\n{}",
                POLICY.replace("\"*\"", "\"api.test\"")
            ),
        )
        .engine(engine);
        config.admin = format!("socket = \"{path}\"");
        let daemon = Daemon::start(config);
        let count =
            |result: &str| daemon.metrics().count("preflightd_shadow_compared_total", &[("result", result)]);
        let mut sent = 0;
        for (name, host, target, origin, method, headers, result) in [
            ("the same", "api.test", "/", ORIGIN, "PUT", Some("x-demo"), "agree"),
            ("time", "api.test", "/age", ORIGIN, "PUT", Some("x-demo"), "max_age"),
            ("headers", "api.test", "/less", ORIGIN, "PUT", None, "headers"),
            (
                "headers that are asked for",
                "api.test",
                "/less",
                ORIGIN,
                "PUT",
                Some("x-demo"),
                "we_allow_proxy_denies",
            ),
            ("methods", "api.test", "/methods", ORIGIN, "PUT", None, "methods"),
            ("no CORS", "api.test", "/none", ORIGIN, "PUT", None, "proxy_no_cors"),
            ("we deny the method", "api.test", "/methods", ORIGIN, "PATCH", None, "proxy_allows_we_deny"),
            ("no policy", "other.test", "/", ORIGIN, "PUT", None, "we_pass"),
        ] {
            let before = count(result);
            let response = daemon.connect().exchange(preflight(host, target, origin, method, headers));
            assert_eq!(response.header("x-upstream"), Some("yes"), "{name}, {engine:?}: {response:?}");
            sent += 1;
            wait_until(format_args!("{name} to be compared"), || count(result) == before + 1);
        }
        let both_deny =
            daemon.connect().exchange(preflight("api.test", "/", "https://evil.example", "PUT", None));
        assert_eq!(both_deny.header("x-upstream"), Some("yes"));
        wait_until("a denial to be compared", || count("agree") == 2);
        assert_eq!(
            daemon.metrics().sum("preflightd_shadow_compared_total", &[]).to_bits(),
            f64::from(sent + 1).to_bits()
        );
        assert_eq!(
            daemon
                .metrics()
                .count("preflightd_requests_total", &[("reason", "shadow"), ("outcome", "passed")]),
            8,
            "all but one would have been answered"
        );
        let allowed = daemon.metrics().count("preflightd_requests_total", &[("outcome", "allowed")]);
        assert_eq!(allowed, 0, "{engine:?}");

        let (code, told) = report(&path);
        assert_eq!(code, Some(1), "there are differences");
        assert_eq!(told["compared"], 8);
        let samples = told["samples"].as_array().expect("a list");
        assert_eq!(samples.len(), 3, "no more are kept");
        assert_eq!(samples[0]["results"][0], "proxy_allows_we_deny", "the last one first");
        assert_eq!(samples[0]["matched"]["policy"], "demo");
        assert!(samples[0]["request"].as_str().is_some_and(|text| text.starts_with("OPTIONS /methods ")));
        let text = run(["shadow", "report", "--admin-socket", &path]);
        let text = String::from_utf8(text.stdout).expect("text");
        for part in ["compared: 8", "we_pass", "api.test /* (demo)", "proxy  HTTP/1.1 204"] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }
}

/// Beside a proxy: the programs observe, and show what they see.
#[test]
fn a_steered_proxy_is_compared_and_untouched() {
    if !can_run() || plain() {
        return;
    }
    let lab = Lab::with(Options {
        kernel_answers: true,
        toml: "[shadow]\nenabled = true\nsample = 1.0".to_owned(),
        ..Options::default()
    });
    for site in lab.sites() {
        for i in 0..5 {
            expect_proxy(&lab.preflight(site), format_args!("{site}, {i}"));
            lab.get(site, "/y");
        }
    }
    let total = || lab.metrics().sum("preflightd_shadow_compared_total", &[]);
    wait_until("the preflights to be compared", || total() >= 10.0);
    assert_eq!(
        (lab.flows("worker"), lab.flows("proxy"), lab.flows("kernel")),
        (0, 0, 0),
        "nothing is deferred"
    );
}
