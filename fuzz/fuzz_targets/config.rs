//! Any text as a configuration: no panic, every refusal has a reason at a line that exists, and what is accepted compiles
//! to a table that decides.
#![no_main]

use libfuzzer_sys::fuzz_target;
use preflightd::{
    config,
    policy::{HostPattern, ListenerId, Preflight, RouteLabels, Table},
};
use preflightd_fuzz::Edits;

const EXAMPLE: &str = include_str!("../../preflightd.example.toml");

const WORDS: &[&str] = &[
    "\n",
    "#",
    "\"",
    "[",
    "]",
    "{",
    "}",
    "=",
    ",",
    "\\u0000",
    "*",
    "\"*\"",
    "*.",
    "null",
    "https://",
    "http://",
    "file:",
    "localhost",
    "127.0.0.1",
    "[::1]",
    ":443",
    ":*",
    ".com",
    "co.uk",
    "xn--",
    "\u{e9}",
    "-1",
    "0",
    "99999999999999999999",
    "1e400",
    "0.5",
    "true",
    "false",
    "[[policy]]\n",
    "[[listener]]\n",
    "[policy.gateway-api]\n",
    "[policy.ingress-nginx]\n",
    "[policy.envoy]\n",
    "name = \"a\"\n",
    "inherit = \"envoy\"\n",
    "inherit = \"api\"\n",
    "credentials = true\n",
    "allowCredentials = true\n",
    "safe_regex = \"(a|b)*\"",
    "{ regex = \"/[a-z]{1,900}\" }",
    "{ exact = \"/a\" }",
    "{ prefix = \"/a/\" }",
    "(",
    ")",
    "{1000}",
    "10s",
    "-5m",
    "9999999999999h",
];

fuzz_target!(|edits: Edits<'_>| {
    // Half of it in use: the example holds its defaults in comments.
    let bytes = edits.apply(EXAMPLE.as_bytes(), WORDS);
    let text = String::from_utf8_lossy(&bytes);
    let (config, diagnostics) = config::load_str("fuzz.toml", &text);
    let lines = text.lines().count() + 1;
    for diagnostic in &diagnostics {
        let shown = diagnostic.to_string();
        assert!(!shown.is_empty());
        assert!(diagnostic.line as usize <= lines, "{shown}");
    }
    let Some(config) = config else {
        assert!(diagnostics.iter().any(config::Diagnostic::is_error), "refused without a reason");
        return;
    };

    let (table, _) = Table::compile(&config.listener_specs(), &config.policies, &mut RouteLabels::new(16), 1);
    for host in config.policies.iter().flat_map(|policy| &policy.hosts) {
        let host = match host {
            HostPattern::Any => "a.test".to_owned(),
            HostPattern::Exact(host) => host.clone(),
            HostPattern::Wildcard(suffix) => format!("a{suffix}"),
        };
        let _ = table.decide(&Preflight {
            listener: ListenerId(0),
            host: host.as_bytes(),
            target: b"/a",
            origin: b"https://app.example.com",
            method: b"PUT",
            headers: &[b"content-type"],
            private_network: true,
        });
    }
});
