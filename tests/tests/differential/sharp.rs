//! The sharp cases, by hand: every name is seen here at least once.

use crate::{
    Ask, Named, Peer, Policy,
    pair::By::{self, Preflightd, Proxy},
};
use serde_json::{Map, Value, json};

/// What is asked, of which policy, who answers, and which differences there are.
pub(crate) type Row = (&'static str, &'static str, Ask, By, &'static [Named]);

pub(crate) fn ingress(name: &str, host: &str, path: &'static str, annotations: &[(&str, &str)]) -> Policy {
    let rules: Map<String, Value> =
        annotations.iter().map(|(name, value)| ((*name).to_owned(), (*value).into())).collect();
    let text = rules.get("cors-allow-origin").and_then(Value::as_str).unwrap_or_default();
    let origins = text.split(',').map(|entry| entry.trim().to_owned()).filter(|e| !e.is_empty()).collect();
    // A tab in a list ends up in the answer's head. (So does a line break, which no client here would read.)
    let lists = ["cors-allow-methods", "cors-expose-headers"];
    let unmodelled = lists.iter().any(|list| {
        rules
            .get(*list)
            .and_then(Value::as_str)
            .is_some_and(|v| v.trim().contains(|c: char| c.is_ascii_control()))
    });
    let rules = Value::Object(rules);
    Policy { name: name.into(), host: host.into(), path, rules, base: None, unmodelled, origins }
}

pub(crate) fn filter(name: &str, host: &str, path: &'static str, rules: Value) -> Policy {
    let matchers = rules["allow_origin_string_match"].as_array().cloned().unwrap_or_default();
    let texts = matchers.iter().flat_map(|m| m.as_object().into_iter().flat_map(Map::values));
    let mut origins: Vec<String> = texts.filter_map(Value::as_str).map(str::to_owned).collect();
    origins.extend(["https://a.example", "http://x.w.example:8443"].map(str::to_owned));
    let all = matchers.iter().any(|m| m["exact"] == "*" || m["safe_regex"] == ".*");
    let strange = matchers.iter().any(|m| m["safe_regex"].as_str().is_some_and(|r| r.contains(r"\Q")));
    let shadow = rules["shadow_enabled_percent"].as_u64().unwrap_or(0) > 0;
    let unmodelled = shadow || (strange && !all);
    Policy { name: name.into(), host: host.into(), path, rules, base: None, unmodelled, origins }
}

const ON: (&str, &str) = ("enable-cors", "true");

pub(crate) fn nginx_table() -> Vec<Policy> {
    let origins =
        ("cors-allow-origin", "https://a.example, http://*.w.example:8080, null, tauri://localhost");
    vec![
        ingress("sharp", "sharp.test", "/", &[ON, origins]),
        ingress("star", "star.test", "/", &[ON]),
        ingress("one-label", "*.label.test", "/", &[ON, origins]),
        ingress("path", "path.test", "/v1", &[ON, origins]),
        ingress("off", "off.test", "/", &[origins]),
        ingress("on with a blank", "blank.test", "/", &[("enable-cors", " true"), origins]),
        ingress("age with a blank", "age.test", "/", &[ON, origins, ("cors-max-age", " 600")]),
        ingress(
            "line break behind",
            "behind.test",
            "/",
            &[ON, ("cors-allow-origin", "https://a.example\n"), ("cors-allow-headers", "x-a\n")],
        ),
        ingress("tab before", "before.test", "/", &[ON, origins, ("cors-allow-headers", "\tx-a")]),
        ingress("tab behind", "tabs.test", "/", &[ON, ("cors-allow-origin", "https://a.example\t")]),
        ingress("blanks between", "between.test", "/", &[ON, origins, ("cors-allow-methods", "GET,  PUT")]),
        ingress("tab between", "tab.test", "/", &[ON, origins, ("cors-allow-methods", "GET,\tPUT")]),
        ingress("scheme-less", "less.test", "/", &[ON, ("cors-allow-origin", "a.example")]),
        ingress("with a slash", "slash.test", "/", &[ON, ("cors-allow-origin", "https://a.example/")]),
        ingress(
            "all lists",
            "lists.test",
            "/",
            &[
                ON,
                origins,
                ("cors-allow-methods", "get,put PATCH"),
                ("cors-allow-headers", "x_a, X-B,,"),
                ("cors-expose-headers", "*, x-c"),
                ("cors-allow-credentials", "False"),
                ("cors-max-age", "-1"),
            ],
        ),
    ]
}

pub(crate) fn nginx_rows() -> Vec<Row> {
    const OURS: &[Named] = &[Named::Vary, Named::KeepAlive, Named::ContentLength];
    const STAR: &[Named] = &[Named::KeepAlive, Named::ContentLength];
    const CLOSED: &[Named] = &[Named::Vary, Named::ContentLength];
    let sharp = |origin: &str| Ask::new("sharp.test", origin);
    let at = |host: &str| Ask::new(host, "https://a.example");
    let plain = || at("sharp.test");
    let mut rows = vec![
        ("allowed", "sharp", plain(), Preflightd, OURS),
        ("another case", "sharp", sharp("HTTPS://A.Example"), Preflightd, OURS),
        ("null", "sharp", sharp("null"), Preflightd, OURS),
        ("NULL", "sharp", sharp("NULL"), Preflightd, OURS),
        ("another scheme", "sharp", sharp("tauri://localhost"), Preflightd, OURS),
        ("one label", "sharp", sharp("http://x-1.w.example:8080"), Preflightd, OURS),
        ("two labels", "sharp", sharp("http://y.x.w.example:8080"), Proxy, &[]),
        ("the apex", "sharp", sharp("http://w.example:8080"), Proxy, &[]),
        ("a label with _", "sharp", sharp("http://x_1.w.example:8080"), Proxy, &[]),
        ("without the port", "sharp", sharp("http://x.w.example"), Proxy, &[]),
        ("default port", "sharp", sharp("https://a.example:443"), Proxy, &[]),
        ("a dot that is none", "sharp", sharp("https://a-example"), Proxy, &[]),
        ("behind", "sharp", sharp("https://a.example.evil.test"), Proxy, &[]),
        ("before", "sharp", sharp("evilhttps://a.example"), Proxy, &[Named::LeftAnchor]),
        ("before a label", "sharp", sharp("xhttp://x.w.example:8080"), Proxy, &[Named::LeftAnchor]),
        ("before null", "sharp", sharp("https://evil.test/null"), Proxy, &[Named::LeftAnchor]),
        ("literal *", "star", at("star.test"), Preflightd, STAR),
        ("literal * from null", "star", Ask::new("star.test", "null"), Preflightd, STAR),
        ("one label of host", "one-label", at("x.label.test"), Preflightd, OURS),
        ("two labels of host", "one-label", at("y.x.label.test"), Proxy, &[]),
        ("in the path", "path", Ask { target: "/v1/x?y".into(), ..at("path.test") }, Preflightd, OURS),
        ("the path itself", "path", Ask { target: "/v1".into(), ..at("path.test") }, Preflightd, OURS),
        ("beside the path", "path", Ask { target: "/v10".into(), ..at("path.test") }, Proxy, &[]),
        ("not enabled", "off", at("off.test"), Proxy, &[]),
        ("not enabled by a blank", "on with a blank", at("blank.test"), Proxy, &[]),
        ("default age by a blank", "age with a blank", at("age.test"), Preflightd, OURS),
        ("defaults by a line break", "line break behind", at("behind.test"), Preflightd, STAR),
        ("default headers by a tab", "tab before", at("before.test"), Preflightd, OURS),
        ("any origin by a tab", "tab behind", at("tabs.test"), Preflightd, STAR),
        ("default methods by two blanks", "blanks between", at("between.test"), Preflightd, OURS),
        ("a tab in the methods", "tab between", at("tab.test"), Proxy, &[Named::Unmodelled]),
        ("no entry is valid", "scheme-less", at("less.test"), Proxy, &[]),
        ("the list is not valid", "with a slash", at("slash.test"), Preflightd, STAR),
        ("all lists", "all lists", at("lists.test"), Preflightd, OURS),
        ("unknown method", "sharp", Ask { method: "put".into(), ..plain() }, Preflightd, OURS),
        ("HTTP/1.0", "sharp", Ask { version: "HTTP/1.0", ..plain() }, Preflightd, CLOSED),
        ("close", "sharp", Ask { more: vec!["Connection: close"], ..plain() }, Preflightd, CLOSED),
        (
            "trailing dot",
            "sharp",
            Ask { doubt: Some(Named::Host), ..at("sharp.test.") },
            Proxy,
            &[Named::Host],
        ),
        ("another host in capitals", "sharp", at("SHARP.test"), Preflightd, OURS),
    ];
    let origins = ["https://a.example,https://a.example", "\u{e9}https://a.example"];
    rows.extend(origins.map(|o| ("origin's form", "sharp", sharp(o), Proxy, &[Named::OriginForm][..])));
    rows.push((
        "method's form",
        "sharp",
        Ask { method: "P UT".into(), ..plain() },
        Proxy,
        &[Named::MethodForm],
    ));
    rows.extend(
        doubts(&plain(), Peer::Nginx)
            .into_iter()
            .map(|(ask, names)| ("doubtful", "sharp", ask, Proxy, names)),
    );
    rows
}

pub(crate) fn envoy_table() -> Vec<Policy> {
    let exact = |more: &Value| {
        let mut rules =
            json!({"allow_origin_string_match": [{"exact": "https://a.example"}], "allow_methods": "PUT"});
        for (name, value) in more.as_object().expect("fields") {
            rules[name] = value.clone();
        }
        rules
    };
    let regex = |regex: &str| exact(&json!({"allow_origin_string_match": [{"safe_regex": regex}]}));
    let mut inheriting = filter(
        "inheriting",
        "inheriting.test",
        "/",
        json!({"allow_methods": "", "allow_credentials": false}),
    );
    inheriting.base = Some(exact(&json!({
        "allow_headers": "*", "allow_credentials": true, "max_age": "60", "expose_headers": "x-a",
        "forward_not_matching_preflights": false, "filter_enabled_percent": 0,
    })));
    vec![
        filter("sharp", "sharp.test", "/", exact(&json!({}))),
        filter("echo", "echo.test", "/", exact(&json!({"allow_methods": "*", "allow_headers": "*"}))),
        filter(
            "lists with *",
            "lists.test",
            "/",
            exact(&json!({"allow_methods": "*, PUT", "allow_headers": "*,x-a"})),
        ),
        filter(
            "everything",
            "everything.test",
            "/",
            exact(&json!({
                "allow_headers": "x-a, X-B", "expose_headers": "x-c", "max_age": "soon", "allow_credentials": true,
                "allow_private_network_access": true,
            })),
        ),
        filter(
            "answering",
            "answering.test",
            "/",
            exact(&json!({
                "forward_not_matching_preflights": false, "allow_credentials": true, "expose_headers": "x-c",
                "allow_headers": "*",
            })),
        ),
        filter("any", "any.test", "/", regex(".*")),
        filter("star in a regex", "star.test", "/", regex(r"\*|x")),
        filter("quoted", "quoted.test", "/", regex(r"\Qhttps://a.example\E")),
        filter("shadow", "shadow.test", "/", exact(&json!({"shadow_enabled_percent": 100}))),
        filter("off", "off.test", "/", exact(&json!({"filter_enabled_percent": 0}))),
        filter("no origin", "none.test", "/", json!({"allow_methods": "PUT"})),
        filter(
            "without case",
            "case.test",
            "/",
            exact(&json!({"allow_origin_string_match": [
                {"prefix": "https://A.", "ignore_case": true}, {"suffix": ".W.example", "ignore_case": true},
                {"contains": "needle"},
            ]})),
        ),
        filter("path", "path.test", "/v1", exact(&json!({}))),
        filter("below", "*.below.test", "/", exact(&json!({}))),
        inheriting,
    ]
}

pub(crate) fn envoy_rows() -> Vec<Row> {
    const OURS: &[Named] = &[Named::Vary, Named::Order];
    let from = |host: &str, origin: &str| Ask::new(host, origin);
    let at = |host: &str| Ask::new(host, "https://a.example");
    let plain = || at("sharp.test");
    let asking = |host: &str, headers: &[&str]| Ask {
        headers: headers.iter().map(|&line| line.to_owned()).collect(),
        ..at(host)
    };
    let private = |host: &str, value| Ask { more: vec![value], ..at(host) };
    let long = "a".repeat(4097);
    let mut rows = vec![
        ("allowed", "sharp", plain(), Preflightd, OURS),
        ("another case", "sharp", from("sharp.test", "HTTPS://a.example"), Proxy, &[][..]),
        ("default port", "sharp", from("sharp.test", "https://a.example:443"), Proxy, &[]),
        ("before", "sharp", from("sharp.test", "xhttps://a.example"), Proxy, &[]),
        ("with a port in Host", "sharp", at("sharp.test:8080"), Preflightd, OURS),
        ("echoed", "echo", asking("echo.test", &["x-a,x-b"]), Preflightd, OURS),
        ("nothing to echo", "echo", asking("echo.test", &[]), Preflightd, OURS),
        ("two lines to echo", "echo", asking("echo.test", &["x-a", "x-b, x-c"]), Preflightd, OURS),
        ("an empty line to echo", "echo", asking("echo.test", &["", "x-b"]), Preflightd, OURS),
        ("no list to echo", "echo", asking("echo.test", &["x:a"]), Proxy, &[Named::Echo]),
        ("too long to echo", "echo", asking("echo.test", &[&long]), Proxy, &[Named::Echo]),
        ("* among names", "lists with *", asking("lists.test", &["x-b"]), Preflightd, OURS),
        ("everything", "everything", asking("everything.test", &["x-b"]), Preflightd, OURS),
        (
            "private network",
            "everything",
            private("everything.test", "Access-Control-Request-Private-Network: true"),
            Preflightd,
            OURS,
        ),
        (
            "no private network",
            "everything",
            private("everything.test", "Access-Control-Request-Private-Network: false"),
            Preflightd,
            OURS,
        ),
        ("answering, allowed", "answering", at("answering.test"), Preflightd, OURS),
        ("answering, denied", "answering", from("answering.test", "https://b.example"), Preflightd, OURS),
        ("any", "any", from("any.test", "anything"), Preflightd, OURS),
        ("a regex that matches *", "star in a regex", at("star.test"), Preflightd, OURS),
        ("a regex that is not modelled", "quoted", at("quoted.test"), Proxy, &[Named::Unmodelled]),
        ("shadow mode", "shadow", at("shadow.test"), Proxy, &[Named::Unmodelled]),
        ("filter off", "off", at("off.test"), Proxy, &[]),
        ("no origin", "no origin", at("none.test"), Proxy, &[]),
        ("prefix without case", "without case", at("case.test"), Preflightd, OURS),
        ("suffix without case", "without case", from("case.test", "x.w.EXAMPLE"), Preflightd, OURS),
        ("contained", "without case", from("case.test", "x-needle-y"), Preflightd, OURS),
        ("contained in another case", "without case", from("case.test", "x-Needle-y"), Proxy, &[]),
        ("in the path", "path", Ask { target: "/v1/x?y".into(), ..at("path.test") }, Preflightd, OURS),
        ("the path itself", "path", Ask { target: "/v1".into(), ..at("path.test") }, Preflightd, OURS),
        ("beside the path", "path", Ask { target: "/v10".into(), ..at("path.test") }, Proxy, &[]),
        ("two labels of host", "below", at("y.x.below.test"), Preflightd, OURS),
        ("the apex of hosts", "below", at("below.test"), Proxy, &[]),
        ("inherited", "inheriting", asking("inheriting.test", &["x-a"]), Preflightd, OURS),
        ("inherited denial", "inheriting", from("inheriting.test", "https://b.example"), Preflightd, OURS),
        ("HTTP/1.0", "sharp", Ask { version: "HTTP/1.0", ..plain() }, Preflightd, &[Named::Http10]),
        ("close", "sharp", Ask { more: vec!["Connection: close"], ..plain() }, Preflightd, OURS),
    ];
    rows.push((
        "too many lines",
        "sharp",
        Ask { headers: vec!["x".into(); 33], ..plain() },
        Proxy,
        &[Named::HeadForm],
    ));
    rows.extend([
        ("origin's form", "any", from("any.test", "https://a.example,x"), Proxy, &[Named::OriginForm][..]),
        ("method's form", "sharp", Ask { method: "P UT".into(), ..plain() }, Proxy, &[Named::MethodForm]),
    ]);
    rows.extend(
        doubts(&plain(), Peer::Envoy)
            .into_iter()
            .map(|(ask, names)| ("doubtful", "sharp", ask, Proxy, names)),
    );
    rows
}

/// Heads that preflightd leaves to the proxy.
pub(crate) fn doubts(plain: &Ask, peer: Peer) -> Vec<(Ask, &'static [Named])> {
    use Named::{BodyOrUpgrade, Credentials, HeadForm, Path, RepeatedLine, TargetForm};
    let target = |target: &str| Ask { target: target.into(), ..plain.clone() };
    let more = |line| Ask { more: vec![line], ..plain.clone() };
    let absolute = format!("http://{}/", plain.host);
    let mut all: Vec<(Ask, &'static [Named])> = vec![
        (more("Access-Control-Request-Method: PUT"), &[RepeatedLine]),
        (target("//"), &[Path]),
        (target("/%61"), &[Path]),
        (target("/x;y"), &[Path]),
        (target("/x/../y"), &[Path]),
        (target(&absolute), &[TargetForm]),
        (Ask { body: "abc", ..more("Content-Length: 3") }, &[BodyOrUpgrade]),
        (more("Cookie: a=b"), &[Credentials]),
        (more("Authorization: Basic YTpi"), &[Credentials]),
    ];
    match peer {
        Peer::Nginx => all.extend([
            (more("Upgrade: websocket"), &[BodyOrUpgrade][..]),
            (Ask { newline: "\n", ..plain.clone() }, &[HeadForm]),
        ]),
        Peer::Envoy => {}
    }
    all.into_iter().map(|(ask, names)| (Ask { doubt: Some(names[0]), ..ask }, names)).collect()
}
