//! The configuration as a whole: files in, findings at their lines out.

use super::*;
use crate::policy::Severity;

const EXAMPLE: &str = include_str!("../../../preflightd.example.toml");

/// The smallest configuration; policies are appended to it from line 5 on.
const BASE: &str = "[[listener]]\nname = \"web\"\naddress = \"127.0.0.1:80\"\nupstream = \"127.0.0.1:81\"\n";

/// The example with its defaults as active lines.
fn uncommented() -> String {
    let is_default =
        |line: &str| line.strip_prefix('#').is_some_and(|l| l.starts_with(|c: char| c.is_ascii_lowercase()));
    EXAMPLE
        .lines()
        .map(|line| if is_default(line) { &line[1..] } else { line })
        .fold(String::new(), |text, line| text + line + "\n")
}

#[test]
fn the_example_holds_the_defaults() {
    let (written, findings) = load_str("example", EXAMPLE);
    assert_eq!(findings, [], "the example has findings");
    let written = written.expect("the example loads");
    let (spelled_out, findings) = load_str("example", &uncommented());
    assert_eq!(findings, [], "the example with its defaults has findings");
    let spelled_out = spelled_out.expect("the example with its defaults loads");
    for config in [&written, &spelled_out] {
        let same =
            Config { policies: config.policies.clone(), ..Config::of_listeners(config.listeners.clone()) };
        assert_eq!(config.changed_sections(&same), [""; 0]);
        assert_eq!(config.steer, Steer::default(), "also what may change while running");
    }
    let listener = Listener::new(
        "web",
        "0.0.0.0:8000".parse().expect("an address"),
        Some("127.0.0.1:8080".parse().expect("an address")),
    );
    assert_eq!(written.listeners, std::slice::from_ref(&listener));
    assert_eq!(spelled_out.listeners, [listener]);
    assert_eq!(written.policies.len(), 4);
    for (a, b) in written.policies.iter().zip(&*spelled_out.policies) {
        // An `on_denied` that is written is not the same thing as the dialect's own, even if it says the same.
        let plain = |p: &PolicySpec| {
            let p = PolicySpec { source: a.source.clone(), on_denied: None, ..p.clone() };
            format!("{p:?}")
        };
        assert_eq!(plain(a), plain(b));
    }
}

#[test]
fn the_example_names_every_key() {
    for (name, text) in [
        ("root", "zzz = 1"),
        ("listener", "[[listener]]\nzzz = 1"),
        ("workers", "[workers]\nzzz = 1"),
        ("limits", "[limits]\nzzz = 1"),
        ("relay", "[relay]\nzzz = 1"),
        ("steer", "[steer]\nzzz = 1"),
        ("ask", "[ask]\nzzz = 1"),
        ("learn", "[learn]\nzzz = 1"),
        ("shadow", "[shadow]\nzzz = 1"),
        ("admin", "[admin]\nzzz = 1"),
        ("log", "[log]\nzzz = 1"),
        ("kubernetes", "[kubernetes]\nzzz = 1"),
        ("policy", "[[policy]]\nzzz = 1"),
        ("gateway-api", "[[policy]]\n[policy.gateway-api]\nzzz = 1"),
        ("envoy", "[[policy]]\n[policy.envoy]\nzzz = 1"),
    ] {
        let (_, findings) = load_str(name, text);
        let unknown = findings.iter().find(|d| d.code == "unknown-key").expect(name);
        let known = unknown.help.strip_prefix("known here: ").expect(name);
        for key in known.split(", ") {
            assert!(EXAMPLE.contains(key), "{name}: the example does not name `{key}`");
        }
    }
}

#[test]
fn findings_have_lines() {
    use Severity::{Error, Warning};
    const P: &str = "[[policy]]\nname = \"p\"\nhosts = [\"h\"]\norigins = [\"https://a.example\"]\n";
    // Beside a proxy, as long as BASE.
    const S: &str = "[[listener]]\nname = \"beside\"\naddress = \"0.0.0.0:80\"\nsteer = true\n";
    // Line, column (0: any), severity, code, a part of the message, a part of the help.
    type Want = (u32, u32, Severity, &'static str, &'static str, &'static str);
    let cases: &[(&str, String, &[Want])] = &[
        ("nothing", String::new(), &[(1, 1, Error, "no-listener", "nothing to listen on", "[[listener]]")]),
        (
            "syntax, every line of it",
            "a = = 1\n[[listener]]\nname = 'x\naddress = \"1.2.3.4:80\"\n".into(),
            &[(1, 5, Error, "syntax", "not valid TOML", ""), (3, 0, Error, "syntax", "not valid TOML", "")],
        ),
        (
            "unknown keys, all of them",
            format!("{BASE}upstrem = 1\n[limit]\n[relay]\nthread = 1\nzzz = 2\n{P}orgins = []\n"),
            &[
                (5, 1, Error, "unknown-key", "`upstrem`", "did you mean `upstream`?"),
                (6, 2, Error, "unknown-key", "`limit`", "did you mean `limits`?"),
                (8, 1, Error, "unknown-key", "`thread`", "did you mean `threads`?"),
                (9, 1, Error, "unknown-key", "`zzz`", "known here: threads, max_connections"),
                (14, 1, Error, "unknown-key", "`orgins`", "did you mean `origins`?"),
            ],
        ),
        (
            "hosts to learn of",
            format!("{BASE}[learn]\nhosts = [\"a.example\", \"https://b.example/\"]\n{P}"),
            &[(6, 23, Error, "invalid-value", "it has a scheme", "\"b.example\"")],
        ),
        (
            "asking the proxy, what is out of range",
            format!(
                "{BASE}[ask]\nper_second = 0\ntimeout = \"0s\"\n[learn]\nhosts = [\"a.example\", \
                 \"*\"]\nlisteners = [\"wep\"]\nmax_ttl = \"1s\"\nmax_entries = 0\n[shadow]\nenabled = \
                 true\nsample = 1.5\n{P}[[listener]]\nname = \"alone\"\naddress = \
                 \"1.2.3.4:80\"\nanswer_only = true\n"
            ),
            &[
                (6, 14, Error, "out-of-range", "ask.per_second is 0", "1 to 10000"),
                (7, 11, Error, "out-of-range", "ask.timeout is zero", ""),
                (9, 9, Warning, "shadow-learns-nothing", "nothing is learned", "choose one"),
                (9, 23, Error, "learn-any-host", "host by host", "*.example.com"),
                (10, 14, Error, "unknown-listener", "`wep`", "did you mean `web`?"),
                (11, 11, Error, "out-of-range", "less than 2 s", "\"2s\""),
                (12, 15, Error, "out-of-range", "learn.max_entries is 0", "1 to"),
                (14, 11, Error, "shadow-without-proxy", "`alone` has none", "upstream"),
                (15, 10, Error, "out-of-range", "shadow.sample is 1.5", "0 to 1"),
            ],
        ),
        (
            "wrong types and values, all of them",
            format!(
                "{BASE}proxy_protocol = \"v3\"\npublic_ports = [80, 65536]\n[workers]\ncount = \"four\"\nengine = \
                 \"iouring\"\n[limits]\nheader_timeout = 10\nidle_timeout = \"10 parsecs\"\nmax_connections = -1\n"
            ),
            &[
                (5, 18, Error, "invalid-value", "unknown value `v3`", "did you mean `v1`?"),
                (6, 21, Error, "invalid-value", "from 0 to 65535", ""),
                (8, 9, Error, "wrong-type", "string \"four\"", ""),
                (9, 10, Error, "invalid-value", "`iouring`", "did you mean `io_uring`?"),
                (11, 18, Error, "wrong-type", "a duration in quotes", ""),
                (12, 16, Error, "invalid-value", "`10 parsecs` is no duration", "\"10s\""),
                (13, 19, Error, "invalid-value", "a whole number from 0", ""),
            ],
        ),
        (
            "addresses",
            "[[listener]]\nname = \"a\"\naddress = \"80\"\nupstream = \"proxy:80\"\n[[listener]]\nname = \
             \"b\"\naddress = \"::1\"\nupstream = \"10.0.0.1\"\naddresses = [\"10.0.0.1:80\"]\n"
                .into(),
            &[
                (3, 11, Error, "invalid-value", "`80` is no address", "\"0.0.0.0:80\""),
                (4, 12, Error, "invalid-value", "`proxy:80`", "(no name)"),
                (7, 11, Error, "invalid-value", "`::1`", "\"[::1]:80\""),
                (8, 12, Error, "invalid-value", "`10.0.0.1`", "\"10.0.0.1:80\""),
                (9, 14, Error, "invalid-value", "no IP address", "without port"),
            ],
        ),
        (
            "missing keys",
            "[[listener]]\n[[listener]]\nname = \"a b\"\naddress = \"1.2.3.4:80\"\nanswer_only = true\n[[policy]]\n"
                .into(),
            &[
                (1, 1, Error, "missing-key", "no name", "name ="),
                (1, 1, Error, "missing-key", "no address", "address ="),
                (1, 1, Error, "missing-key", "no upstream", "answer_only"),
                (3, 8, Error, "invalid-value", "`a b` is no listener name", "letters"),
                (6, 1, Error, "missing-key", "no name", "name ="),
                (6, 1, Error, "missing-key", "no hosts", "hosts ="),
                (6, 1, Error, "origins-empty", "", ""),
            ],
        ),
        (
            "listeners against each other",
            format!(
                "{BASE}[[listener]]\nname = \"web\"\naddress = \"127.0.0.1:80\"\nupstream = \
                 \"127.0.0.1:80\"\nanswer_only = true\n{P}listeners = [\"web\", \"wep\"]\n"
            ),
            &[
                (6, 8, Error, "duplicate-name", "`web`", "own"),
                (7, 11, Error, "duplicate-address", "`web` has the address", "own"),
                (8, 12, Error, "upstream-loop", "this listener itself", "proxy"),
                (9, 15, Error, "answer-only-upstream", "exclude", "one of the two"),
                (14, 21, Error, "unknown-listener", "`wep`", "did you mean `web`?"),
            ],
        ),
        (
            "a loop through the wildcard",
            "[[listener]]\nname = \"a\"\naddress = \"0.0.0.0:80\"\nupstream = \"127.0.0.1:80\"\n".into(),
            &[
                (4, 12, Error, "upstream-loop", "itself", ""),
            ],
        ),
        (
            "the client's address is hidden",
            format!("{BASE}proxy_protocol = \"off\"\n{P}"),
            &[(5, 18, Warning, "client-address-hidden", "this node's address", "transparent")],
        ),
        ("no policies", BASE.into(), &[(1, 1, Warning, "no-policies", "no policies", "[[policy]]")]),
        (
            "out of range",
            format!("{BASE}{P}[limits]\nmax_head_bytes = 1\nheader_timeout = \"0s\"\n[admin]\nmax_routes = 0\n"),
            &[
                (10, 18, Error, "out-of-range", "limits.max_head_bytes is 1", "1024"),
                (11, 18, Error, "out-of-range", "header_timeout is zero", ""),
                (13, 14, Error, "out-of-range", "admin.max_routes is 0", ""),
            ],
        ),
        (
            "hosts and paths",
            format!(
                "{BASE}[[policy]]\nname = \"p\"\norigins = [\"https://a.example\"]\nhosts = [\n  \"https://h/x\",\n  \
                 \"h:80\",\n  \"a.*.b\",\n  \"h.\",\n  \"bücher.example\",\n  \"::1\",\n  \"1.2.3\",\n  \"a \
                 b\",\n]\npaths = [\n  {{ prefix = \"api\" }},\n  {{ exact = \"/a%20b\" }},\n  {{ prefix = \
                 \"/a/../b\" }},\n  {{ prefix = \"/a\", exact = \"/b\" }},\n  {{}},\n  {{ prefx = \"/\" }},\n  \
                 \"/a\",\n]\n"
            ),
            &[
                (9, 3, Error, "invalid-value", "a scheme", "\"h\""),
                (10, 3, Error, "invalid-value", "a port", "public_ports"),
                (11, 3, Error, "invalid-value", "whole labels", ""),
                (12, 3, Error, "invalid-value", "ends with a dot", ""),
                (13, 3, Error, "invalid-value", "not ASCII", "xn--bcher-kva.example"),
                (14, 3, Error, "invalid-value", "without brackets", "\"[::1]\""),
                (15, 3, Error, "invalid-value", "no IPv4 address", ""),
                (16, 3, Error, "invalid-value", "not a DNS name", ""),
                (19, 0, Error, "invalid-value", "does not begin with `/`", "`/api`"),
                (20, 0, Error, "invalid-value", "`%`", "leave it out"),
                (21, 0, Error, "invalid-value", "dot segments", ""),
                (22, 0, Error, "invalid-value", "several keys", ""),
                (23, 0, Error, "invalid-value", "without a key", ""),
                (24, 0, Error, "invalid-value", "no key `prefx`", "prefix, exact or regex"),
                (25, 3, Error, "wrong-type", "a path: {", ""),
            ],
        ),
        (
            "empty lists",
            format!("{BASE}{P}paths = []\n[[policy]]\nname = \"q\"\nhosts = []\norigins = [\"https://a.example\"]\n"),
            &[
                (9, 9, Error, "empty-list", "no path", ""),
                (12, 9, Error, "empty-list", "no host", ""),
            ],
        ),
        (
            "duplicate policies",
            format!("{BASE}{P}{P}"),
            &[(10, 8, Error, "duplicate-name", "`p`", "test:5")],
        ),
        (
            "two dialects",
            format!(
                "{BASE}{P}[policy.envoy]\n[[policy]]\nname = \"q\"\nhosts = [\"g\"]\n[policy.gateway-api]\nallowOrigins \
                 = [\"*\"]\n[policy.envoy]\n"
            ),
            &[
                (8, 11, Error, "two-dialects", "`origins` belongs to the native dialect", "one"),
                (10, 1, Error, "two-dialects", "several dialects", "one"),
            ],
        ),
        (
            "inheriting",
            format!(
                "{BASE}{P}inherit = \"a\"\n[[policy]]\nname = \"a\"\nhosts = [\"a\"]\ninherit = \
                 \"vhst\"\n[policy.envoy]\n[[policy]]\nname = \"vhost\"\nhosts = [\"v\"]\ninherit = \
                 \"a\"\n[policy.envoy]\n[[policy]]\nname = \"b\"\nhosts = [\"b\"]\ninherit = \"n\"\n[policy.envoy]\n[[policy]]\nname = \"n\"\nhosts = \
                 [\"n\"]\norigins = [\"https://a.example\"]\n"
            ),
            &[
                (9, 11, Error, "inherit-without-envoy", "only an envoy policy", "add the block"),
                (13, 11, Error, "inherit", "no policy is named `vhst`", "did you mean `vhost`?"),
                (18, 11, Error, "inherit", "`a` inherits from another", ""),
                (23, 11, Error, "inherit", "not of the envoy dialect", ""),
            ],
        ),
        (
            "the engine's findings",
            format!(
                "{BASE}{P}[[policy]]\nname = \"q\"\nhosts = [\"g\"]\norigins = [\n  \"https://b.example\",\n  \
                 \"https://b.example/\",\n]\n"
            ),
            &[(14, 3, Error, "", "", "")],
        ),
        (
            "listeners beside the proxy",
            format!(
                "{S}answer_only = true\n[[listener]]\nname = \"b\"\naddress = \"0.0.0.0:0\"\nsteer = \
                 true\n[[listener]]\nname = \"c\"\naddress = \"0.0.0.0:81\"\nsteer = true\nupstream = \
                 \"127.0.0.1:8080\"\n[[listener]]\nname = \"d\"\naddress = \"0.0.0.0:82\"\nsteer = \
                 \"yes\"\nanswer_only = true\n{P}"
            ),
            &[
                (5, 15, Error, "answer-only-steer", "exclude each other", "the proxy gets all"),
                (8, 11, Error, "invalid-value", "the port is 0", "that the proxy listens on"),
                (14, 12, Error, "client-address-hidden", "would have this node's", "leave `upstream` out"),
                (18, 9, Error, "wrong-type", "a boolean", ""),
            ],
        ),
        (
            "an upstream beside the proxy that does not keep the client's address",
            format!("{S}upstream = \"127.0.0.1:8080\"\nproxy_protocol = \"off\"\n{P}"),
            &[(5, 12, Error, "client-address-hidden", "knows each client by its address", "transparent = true")],
        ),
        (
            "steering out of range",
            format!(
                "{S}[steer]\npercent = 101\nmax_pending = 10\nstorm_below = 2000\npin_dir = \"pins\"\n{P}"
            ),
            &[
                (6, 11, Error, "out-of-range", "steer.percent is 101", "0 to 100"),
                (7, 15, Error, "out-of-range", "steer.max_pending is 10", "1024 to"),
                (8, 15, Error, "out-of-range", "2000, above steer.storm_above, 1000", "half"),
                (9, 11, Error, "out-of-range", "`pins`, which is no absolute path", "/sys/fs/bpf/preflightd"),
            ],
        ),
        (
            "no directory to pin in",
            format!("{S}[steer]\npin_dir = \"\"\n{P}"),
            &[(6, 11, Error, "out-of-range", "no absolute path", "bpffs")],
        ),
        (
            "words of steering",
            format!(
                "{S}[steer]\nmode = \"on\"\nengage = \"storms\"\nposition = \"front\"\nfirewall = \
                 \"Ignore\"\nself_test = \"no\"\nnetns = 1\ninterfaces = \"eth0\"\n{P}"
            ),
            &[
                (6, 8, Error, "invalid-value", "`on`", "known here: off, observe, steer"),
                (7, 10, Error, "invalid-value", "`storms`", "did you mean `storm`?"),
                (8, 12, Error, "invalid-value", "`front`", "known here: first, last"),
                (9, 12, Error, "invalid-value", "`Ignore`", "did you mean `ignore`?"),
                (10, 13, Error, "wrong-type", "a boolean", ""),
                (11, 9, Error, "wrong-type", "a string", ""),
                (12, 14, Error, "wrong-type", "a list", ""),
            ],
        ),
        (
            "steering without a port",
            format!("{BASE}{P}[steer]\nmode = \"observe\"\n"),
            &[(9, 0, Warning, "steer-without-listener", "no listener is steered", "steer = true")],
        ),
        ("no list", format!("policy = 1\n{BASE}"), &[(1, 10, Error, "wrong-type", "list of tables", "")]),
        ("no table", "listener = [1]\n".into(), &[(1, 13, Error, "wrong-type", "", ""), (1, 1, Error, "no-listener", "", "")]),
    ];
    let mut failed = Vec::new();
    for (name, text, want) in cases {
        let (config, got) = load_str("test", text);
        let matches = |got: &Diagnostic, want: &Want| {
            got.line == want.0
                && (want.1 == 0 || got.column == want.1)
                && got.severity == want.2
                && (want.3.is_empty() || got.code == want.3)
                && got.message.contains(want.4)
                && got.help.contains(want.5)
        };
        let refused = want.iter().any(|w| w.2 == Error);
        let fits = got.len() == want.len()
            && want.iter().all(|w| got.iter().any(|g| matches(g, w)))
            && config.is_none() == refused;
        if !fits {
            let shown: String = got.iter().map(ToString::to_string).collect();
            failed.push(format!("== {name}\n{}\nwant {want:#?}", anstream::adapter::strip_str(&shown)));
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

#[test]
fn no_input_panics() {
    let whole = format!("{EXAMPLE}\n{}", "[[policy]]\nname = \"\\u0000\u{e9}\"\nhosts = [\"\u{1f600}\"]\n");
    // Every prefix, and every line with a byte changed or removed, spread over the file.
    for end in (0..whole.len()).filter(|end| whole.is_char_boundary(*end)) {
        if end % 7 == 0 {
            load_str("prefix", &whole[..end]);
        }
    }
    for (i, line) in whole.lines().enumerate() {
        for (from, to) in
            [("=", ""), ("\"", ""), ("[", "]"), ("#", ""), ("true", "1"), ("\"", "\"\u{e9}"), (".", "..")]
        {
            let mut lines: Vec<_> = whole.lines().map(ToOwned::to_owned).collect();
            lines[i] = line.replacen(from, to, 1);
            let (_, findings) = load_str("mutated", &lines.join("\n"));
            for finding in findings {
                let _ = finding.to_string();
            }
        }
    }
}

/// However much is wrong, and be it all in one line: what is shown is bounded, and so is the work.
#[test]
fn many_findings_are_counted() {
    let listeners: String = (0..1000)
        .map(|i| format!("{{name=\"l{i}\",address=\"127.0.0.1:0\",answer_only=true}},"))
        .collect::<Vec<_>>()
        .concat();
    let policy = "{name=\"p\",hosts=[\"h\"],origins=[\"https://a.example\"],listeners=[\"unknown\"],inherit=\"none\"},";
    let text = format!("listener=[{listeners}]\npolicy=[{}]\n", policy.repeat(5000));
    let (config, findings) = load_str("test", &text);
    assert!(config.is_none());
    assert_eq!(findings.len(), 501);
    let last = findings.last().expect("the last one");
    assert!(last.is_error() && last.code == "too-many-findings", "{last}");
    assert!(last.message.starts_with("14499 further"), "{last}");
    assert!(findings.iter().all(|finding| finding.to_string().len() < 2000));
}

#[test]
fn values_become_what_the_others_need() {
    let (config, findings) = load_str(
        "test",
        "[[listener]]\nname = \"a\"\naddress = \"[::]:80\"\nupstream = \"[::1]:81\"\naddresses = \
         [\"2001:DB8::1\", \"10.0.0.1\"]\n[[listener]]\nname = \"b\"\naddress = \"192.0.2.1:80\"\nanswer_only = \
         true\npublic_ports = [8443]\n[workers]\ncount = 3\n[limits]\nheader_timeout = \"1500ms\"\n",
    );
    let config = config.unwrap_or_else(|| panic!("{findings:?}"));
    let specs = config.listener_specs();
    assert_eq!(specs[0].own_literals, ["[2001:db8::1]", "10.0.0.1"]);
    assert!(specs[0].loopback_is_own && !specs[1].loopback_is_own);
    assert_eq!(specs[1].own_literals, ["192.0.2.1"]);
    assert_eq!(specs[1].public_ports, [8443]);
    let upstreams = config.upstreams();
    assert_eq!(upstreams.len(), 1, "an answer-only listener has none");
    assert_eq!(upstreams[0].listener, ListenerId(0));
    assert_eq!(config.connection_limits().header_timeout, Duration::from_millis(1500));
    assert_eq!((config.worker_count(), config.relay_limits().threads), (3, 3));
}

#[test]
fn steering_has_its_values() {
    let load = |text: &str| {
        let (config, findings) = load_str("test", text);
        assert_eq!(findings, [], "{text}");
        config.expect("it loads")
    };
    let listener = |lines: &str| format!("[[listener]]\nname = \"a\"\naddress = \"[::]:80\"\n{lines}");
    let policy = "[[policy]]\nname = \"p\"\nhosts = [\"h\"]\norigins = [\"https://a.example\"]\n";
    for kept in ["proxy_protocol = \"v1\"", "proxy_protocol = \"v2\"", "transparent = true"] {
        let text = listener(&format!("steer = true\nupstream = \"127.0.0.1:81\"\n{kept}\n{policy}"));
        assert_eq!(load(&text).upstreams().len(), 1, "{kept}");
    }
    let text = listener(&format!("steer = true\n{policy}"));
    let plain = load(&text);
    assert!(plain.listeners[0].steer && plain.upstreams().is_empty());
    assert_eq!(plain.steer, Steer::default());
    let all = "[steer]\nmode = \"observe\"\nengage = \"storm\"\nstorm_above = 7\nstorm_below = 7\npercent = 0\n\
               firewall = \"ignore\"\n";
    let live = load(&format!("{text}{all}"));
    let want = Steer {
        mode: SteerMode::Observe,
        engage: Engage::Storm,
        storm_above: 7,
        storm_below: 7,
        percent: 0,
        firewall: Firewall::Ignore,
        ..Steer::default()
    };
    assert_eq!(live.steer, want);
    assert_eq!(live.changed_sections(&plain), [""; 0], "these take effect while running");
    for restart in [
        "interfaces = [\"eth0\"]",
        "position = \"last\"",
        "netns = \"1\"",
        "pin_dir = \"/sys/fs/bpf/x\"",
        "max_pending = 1024",
        "self_test = false",
    ] {
        let changed = load(&format!("{text}[steer]\n{restart}\n"));
        assert_eq!(changed.changed_sections(&plain), ["steer"], "{restart}");
    }
}

#[test]
fn policies_follow_listeners_by_name() {
    let load = |text: &str| {
        let (config, findings) = load_str("test", text);
        config.unwrap_or_else(|| panic!("{findings:?}"))
    };
    let listener = |name: &str, port: u16| {
        format!("[[listener]]\nname = \"{name}\"\naddress = \"127.0.0.1:{port}\"\nanswer_only = true\n")
    };
    let policy = |name: &str, listeners: &str| {
        format!(
            "[[policy]]\nname = \"{name}\"\nhosts = [\"{name}\"]\norigins = [\"https://a.example\"]\nlisteners = \
             [{listeners}]\n"
        )
    };
    let running = load(&(listener("a", 1) + &listener("b", 2)));
    let policies = [
        policy("all", ""),
        policy("on-b", "\"b\""),
        policy("on-c", "\"c\""),
        policy("on-bc", "\"b\", \"c\""),
    ];
    let new = load(&(listener("c", 3) + &listener("b", 2) + &policies.concat()));
    let got = new.policies_for(&running.listeners);
    let got: Vec<_> = got.iter().map(|p| (&*p.name, &*p.listeners)).collect();
    assert_eq!(
        got,
        [("all", &[][..]), ("on-b", &[ListenerId(1)]), ("on-bc", &[ListenerId(1)])],
        "a policy of a listener that does not run must not serve others"
    );
    assert_eq!(new.changed_sections(&running), ["listener"]);
}

#[test]
fn knows_policy_files() {
    for (text, want) in [
        ("", false),
        ("[[policy]]\n", true),
        ("[[policy]]\nname = = 1\n", true),
        ("[[policy]]\n[limits]\n", false),
        (BASE, false),
    ] {
        assert_eq!(is_policy_file(text), want, "{text:?}");
    }
}
