//! Policies and preflights that are drawn: near to what is allowed, and hostile.

use crate::{
    Ask, Peer, Policy,
    sharp::{doubts, filter, ingress},
};
use preflightd_tests::random::Random;
use serde_json::{Map, Value, json};

/// Drawn policies: for one host, or for two paths of one.
pub(crate) fn nginx_policies(random: &mut Random, number: u64, policies: &mut Vec<Policy>) {
    let (host, paths) = places(random, number);
    for path in paths {
        let mut annotations = vec![(
            "enable-cors",
            random.pick(&["true", "true", "true", "true", "True", "1", "yes", "true "]),
        )];
        let list = origin_list(random);
        if random.below(10) > 0 {
            annotations.push(("cors-allow-origin", list.as_str()));
        }
        let mut maybe = |name, values: &[&'static str]| {
            if random.below(2) == 0 {
                annotations.push((name, random.pick(values)));
            }
        };
        maybe("cors-allow-methods", &METHOD_LISTS);
        maybe("cors-allow-headers", &HEADER_LISTS);
        maybe("cors-expose-headers", &["x-a", "*", "x-a,  x-b", "x_a", "", "@", "X-A\t", "x-a,\tx-b"]);
        maybe("cors-allow-credentials", &["true", "false", "F", "no", "", "false "]);
        maybe("cors-max-age", &["600", "-1", "+5", "007", "0", "", "1h", "600 ", "99999999999999999999"]);
        policies.push(ingress(&drawn(number, path), &host, path, &annotations));
    }
}

/// Drawn policies, as [`nginx_policies`].
pub(crate) fn envoy_policies(random: &mut Random, number: u64, policies: &mut Vec<Policy>) {
    let (host, paths) = places(random, number);
    let base = (random.below(3) == 0).then(|| cors_policy(random));
    for path in paths {
        let rules = cors_policy(random);
        let mut policy = filter(&drawn(number, path), &host, path, rules);
        if let Some(base) = &base {
            let inherited = filter("", "", "/", base.clone());
            if policy.rules.get("allow_origin_string_match").is_none() {
                // The percentages are the route's alone.
                let shadow = policy.rules["shadow_enabled_percent"].as_u64().unwrap_or(0) > 0;
                let mut origins = base.clone();
                origins["shadow_enabled_percent"] = 0.into();
                policy.unmodelled = shadow || filter("", "", "/", origins).unmodelled;
                policy.origins = inherited.origins;
            }
            policy.base = Some(base.clone());
        }
        policies.push(policy);
    }
}

/// A preflight near to what the policy allows.
pub(crate) fn near(random: &mut Random, policy: &Policy) -> Ask {
    let host = match policy.host.strip_prefix('*') {
        None => policy.host.clone(),
        Some(rest) => random.pick(&["x", "X-y", "a_b", "y.x", "1", "www"]).to_owned() + rest,
    };
    let mut ask = Ask::new(&host, &near_origin(random, policy));
    ask.target = match random.below(4) {
        0 => random
            .pick(&["/", "/api", "/api/", "/api/x?y=%2f..", "/apix", "/API", "/api/v2/x", "/api/.x", "/?"])
            .into(),
        _ => policy.path.to_owned() + random.pick(&["", "?x=1"]),
    };
    let methods = ["GET", "POST", "PUT", "DELETE", "PATCH", "put", "Patch", "CUSTOM", "*", "OPTIONS", "X-1!"];
    ask.method = match random.below(30) {
        0 => random.pick(&["P UT", "a/b", "PUT,GET", "\u{e9}"]).into(),
        1 => "M".repeat(65),
        _ => random.pick(&methods).into(),
    };
    ask.headers = near_headers(random);
    match random.below(12) {
        0 => ask.more.push("Access-Control-Request-Private-Network: true"),
        1 => ask.more.push("X-Forwarded-For: 192.0.2.1"),
        2 => ask.more.push("Content-Length: 0"),
        3 => ask.more.push("TE: trailers"),
        4 => ask.more.push("Connection: keep-alive"),
        _ => {}
    }
    if random.below(20) == 0 {
        // Those that Envoy bears too.
        let all = doubts(&ask, Peer::Envoy);
        return all[random.below(all.len())].0.clone();
    }
    ask
}

const METHOD_LISTS: [&str; 12] = [
    "GET, PUT",
    "PUT",
    "put,get",
    "GET,PUT,PATCH,DELETE",
    "GET,  PUT",
    "GET PUT",
    "GET,",
    "\tGET",
    "*",
    "G-T",
    "GET, PUT\t",
    "GET,\tPUT",
];

const HEADER_LISTS: [&str; 9] =
    ["x-a", "X-A, x-b", "x-a,x-b,content-type", "x a", ",", "*", "x:a", "authorization\t", " x-a "];

/// What `cors-allow-origin` may hold, rightly and wrongly.
const ENTRIES: [&str; 28] = [
    "https://a.example",
    "https://b.a.example",
    "http://a.example:8080",
    "https://a-b.example",
    "https://*.w.example",
    "http://*.w.example:8443",
    "https://*.example",
    "https://*.xn--e1afmkfd.example",
    "https://A.EXAMPLE",
    "null",
    "tauri://localhost",
    "http://localhost:3000",
    "http://127.0.0.1",
    "https://a.example:443",
    "https://a.example:080",
    "https://.example",
    "https://*.",
    "https://",
    "x://a",
    "a.example",
    "*.a.example",
    "",
    " ",
    "https://a.example/",
    "https://a_b.example",
    "HTTPS://a.example",
    "*",
    "nullhttps://a.example",
];

fn origin_list(random: &mut Random) -> String {
    // The last ones spoil the whole list: seldom.
    let bound = if random.below(6) == 0 { ENTRIES.len() } else { ENTRIES.len() - 6 };
    let count = 1 + random.below(5);
    let entries: Vec<&str> = (0..count).map(|_| random.pick(&ENTRIES[..bound])).collect();
    let list = entries.join(random.pick(&[",", ", ", ",  ", " ,"]));
    list + match random.below(16) {
        0 => ",",
        1 => " ",
        2 => "\n",
        3 => "\t",
        _ => "",
    }
}

const REGEXES: [&str; 12] = [
    r"https://.*\.example",
    r"https://(a|b)\.example(:\d+)?",
    r"(?i)https://a\.example",
    ".*",
    r"https?://[a-z.]+",
    r".+\.w\.example:8443",
    r"\*",
    "[^.]*",
    r"^https://a\.example$",
    r"\Qhttps://a.example\E",
    r"https://\w{1,3}\.example",
    "null|https://a.example",
];

fn cors_policy(random: &mut Random) -> Value {
    let mut rules = Map::new();
    let matchers: Vec<Value> = (0..random.below(5)).map(|_| matcher(random)).collect();
    if !matchers.is_empty() {
        rules.insert("allow_origin_string_match".into(), matchers.into());
    }
    let mut maybe = |name: &str, values: &[Value]| {
        if random.below(2) == 0 {
            rules.insert(name.to_owned(), values[random.below(values.len())].clone());
        }
    };
    maybe("allow_methods", &["", "*", "GET, PUT", "put", "GET,*", " PUT"].map(Value::from));
    maybe("allow_headers", &["", "*", "*", "x-a, X-B", "x-a,*", "authorization"].map(Value::from));
    maybe("expose_headers", &["", "*", "x-a"].map(Value::from));
    maybe("max_age", &["", "600", "-1", "soon"].map(Value::from));
    maybe("allow_credentials", &[true, false].map(Value::from));
    maybe("allow_private_network_access", &[true, false].map(Value::from));
    maybe("forward_not_matching_preflights", &[true, false, false].map(Value::from));
    // A share of requests would be drawn anew for each.
    maybe("filter_enabled_percent", &[100, 100, 100, 100, 0].map(Value::from));
    maybe("shadow_enabled_percent", &[0, 0, 0, 0, 100].map(Value::from));
    Value::Object(rules)
}

fn matcher(random: &mut Random) -> Value {
    let text = random.pick(&[
        "https://a.example",
        "https://",
        "http://x.w.example:8443",
        ".w.example",
        "example",
        "null",
        "https://A.Example",
        "://a.",
        "s",
    ]);
    let kind = random.pick(&["exact", "exact", "exact", "prefix", "suffix", "contains", "safe_regex"]);
    let mut matcher = match kind {
        "safe_regex" => return json!({"safe_regex": random.pick(&REGEXES)}),
        "exact" if random.below(12) == 0 => json!({"exact": "*"}),
        kind => json!({kind: text}),
    };
    if random.below(4) == 0 {
        matcher["ignore_case"] = true.into();
    }
    matcher
}

/// A host and the paths that have a policy there.
fn places(random: &mut Random, number: u64) -> (String, &'static [&'static str]) {
    let host = match random.below(5) {
        0 => format!("*.w{number}.test"),
        _ => format!("h{number}.test"),
    };
    let paths: [&[&str]; 4] = [&["/"], &["/"], &["/api"], &["/api", "/api/v2"]];
    (host, random.pick(&paths))
}

/// A drawn policy's name.
fn drawn(number: u64, path: &str) -> String {
    format!("drawn-{number}{}", path.replace('/', "-"))
}

fn near_origin(random: &mut Random, policy: &Policy) -> String {
    let mut origin = match policy.origins.len() {
        0 => String::new(),
        n => policy.origins[random.below(n)].clone(),
    };
    if origin.is_empty() || random.below(6) == 0 {
        random.pick(&ENTRIES[..20]).clone_into(&mut origin);
    }
    if origin.contains('*') {
        let label = random.pick(&["x", "a-b", "X1", "a.b", "a_b", "", "-", "*", "xn--80ak6aa92e", "x:y"]);
        origin = origin.replacen('*', label, 1);
    }
    if origin.contains('\\') || origin.contains('(') {
        // A regex: what it is about rather than itself, mostly.
        let known = ["https://a.example", "https://b.example:1", "https://abc.example"];
        origin = if random.below(4) == 0 { origin } else { random.pick(&known).into() };
    }
    let at = random.below(origin.len().max(1));
    match random.below(24) {
        0 => origin.make_ascii_uppercase(),
        1 => origin.insert_str(0, random.pick(&["evil", "x", "https://evil.test/", "-", "."])),
        2 => origin.push_str(random.pick(&[
            ".evil.test",
            "/",
            ":443",
            ":80",
            ":8443",
            "x",
            ".",
            "@x",
            "\u{e9}",
        ])),
        3 => origin = origin.replace("https://", "http://"),
        4 => origin = origin.replacen('.', "x", 1),
        5 => origin = origin.replacen("://", "://x.", 1),
        6 if !origin.is_empty() => {
            origin.remove(at);
        }
        7 => origin
            .insert(at, random.pick(&['a', 'A', '-', '.', ':', '/', '_', '*', '\\', '$', ' ', ',', '\t'])),
        8 => random
            .pick(&["null", "NULL", "xnull", "nullx", "*", "file://", "https://"])
            .clone_into(&mut origin),
        9 => origin.push_str(&"x".repeat(400)),
        10 => origin.insert_str(0, &"x".repeat(400)),
        _ => {}
    }
    if origin.trim().is_empty() { "x".into() } else { origin }
}

fn near_headers(random: &mut Random) -> Vec<String> {
    let lines: &[&str] = match random.below(16) {
        0..4 => &[],
        4..8 => &["content-type,x-a"],
        8 => &["X-A, x-b"],
        9 => &["authorization"],
        10 => &["x-a", "x-b"],
        11 => &[""],
        12 => &["x-a", "", " x-b , ,"],
        13 => &["*"],
        14 => &[random.pick(&["x a", "x:a", "\"x\"", "x-\u{e9}", "a\tb", "(a)", "x-a;q=1"])],
        _ => {
            return match random.below(4) {
                0 => vec!["a".repeat(4096)],
                1 => vec!["x-a,".repeat(1500)],
                2 => vec!["x".to_owned(); 40],
                _ => vec![",".repeat(30)],
            };
        }
    };
    lines.iter().map(|&line| line.to_owned()).collect()
}
