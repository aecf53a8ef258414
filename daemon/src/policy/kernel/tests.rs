//! What the kernel decides, the worker decides too, and in the same bytes.

use super::samples::{self, LISTENER, Numbers};
use super::{KernelTable, Tier};
use crate::http::{Head, HeadLimits, HeadReader};
use crate::policy::learned::{Answers, Learnable, Learned, Question};
use crate::policy::{Decision, HostPattern, Preflight, RouteLabels, Table};
use preflightd_common::abi::{ask, outcome};
use preflightd_common::decide::verdict;
use std::sync::Arc;

const DATE: &[u8; 29] = b"Sun, 06 Nov 1994 08:49:37 GMT";
const LIMIT: usize = 16_384;

/// The worker's answer, and the number of the route's label.
pub(crate) fn by_worker(table: &Table, bytes: &[u8]) -> Option<(Vec<u8>, u32)> {
    let Head::Preflight(head) = HeadReader::new().read(bytes, HeadLimits { max_bytes: LIMIT }) else {
        return None;
    };
    let request = Preflight {
        listener: LISTENER,
        host: head.host,
        target: head.target,
        origin: head.origin,
        method: head.method,
        headers: &head.headers,
        private_network: head.private_network,
    };
    assert_eq!(head.len, bytes.len(), "the kernel answers nothing that has something behind it");
    let Decision::Answer(answer) = table.decide(&request) else { return None };
    let mut out = Vec::new();
    answer.render(DATE, head.connection, &mut out);
    Some((out, answer.route.0))
}

/// Says which tier it is, and fails if the kernel's decision is not the worker's.
fn check(table: &Table, kernel: &KernelTable, bytes: &[u8]) -> Tier {
    let tier = kernel.tier(LISTENER, bytes, LIMIT);
    let shown = bytes.escape_ascii();
    match tier {
        Tier::Worker(why) => assert_ne!(why, ask::Nothing, "{shown}"),
        Tier::Proxy => {
            let worker = by_worker(table, bytes);
            assert_eq!(worker, None, "the kernel passes what a worker answers: {shown}");
        }
        Tier::Kernel(number) => {
            let head_of = |name: &str| {
                let text = std::str::from_utf8(bytes).expect("the kernel takes ASCII only");
                text.lines()
                    .find_map(|line| line.split_once(':').filter(|(n, _)| n.eq_ignore_ascii_case(name)))
                    .map(|(_, value)| value.trim().as_bytes().to_vec())
                    .expect("it is there")
            };
            let answer = kernel.templates[number as usize].with(DATE, &head_of("origin"));
            let decided = kernel.decide(LISTENER, bytes, LIMIT).expect("it was decided");
            let Some((worker, label)) = by_worker(table, bytes) else {
                panic!("the kernel answers what a worker passes: {shown}")
            };
            assert_eq!(answer.escape_ascii().to_string(), worker.escape_ascii().to_string(), "{shown}");
            assert_eq!(decided.rule.label, label, "{shown}");
            assert_eq!(decided.verdict, verdict::ANSWER);
        }
    }
    tier
}

/// `PREFLIGHTD_FULL=1`: a million requests, and each mutated.
fn rounds() -> usize {
    if std::env::var_os("PREFLIGHTD_FULL").is_some() { 1_000_000 } else { 60_000 }
}

#[test]
fn whatever_the_kernel_decides_the_worker_decides_too() {
    let tables: Vec<_> = [&[][..], &[80, 8080], &[1, 2, 3, 4, 5, 6, 7, 8]]
        .map(|ports| {
            let table = samples::table(ports);
            let kernel = table.for_kernel(&[LISTENER]);
            (table, kernel)
        })
        .into();
    let mut numbers = Numbers(1);
    let (mut tiers, mut reasons) = ([0; 3], [0; ask::SLOTS as usize]);
    let mut outcomes = [0; outcome::SLOTS as usize];
    for round in 0..rounds() {
        let (table, kernel) = &tables[round % tables.len()];
        let mut bytes = samples::request(&mut numbers);
        for _ in 0..2 {
            match check(table, kernel, &bytes) {
                Tier::Kernel(_) => tiers[0] += 1,
                Tier::Proxy => tiers[1] += 1,
                Tier::Worker(why) => {
                    tiers[2] += 1;
                    reasons[why as usize] += 1;
                }
            }
            if let Ok(decided) = kernel.decide(LISTENER, &bytes, LIMIT)
                && decided.verdict != verdict::ASK
            {
                outcomes[decided.outcome as usize] += 1;
            }
            samples::mutate(&mut bytes, &mut numbers);
        }
    }
    // Otherwise nothing was compared.
    assert!(tiers.iter().all(|count| *count > rounds() / 50), "{tiers:?}");
    assert!(outcomes.iter().all(|count| *count > 0), "{outcomes:?}");
    let missed: Vec<_> = (0..).zip(reasons).filter(|(_, count)| *count == 0).map(|(why, _)| why).collect();
    // What the program alone can find out, what would take a longer head, and that some policy has every host.
    let others =
        [ask::Nothing, ask::Off, ask::Segment, ask::Room, ask::Connections, ask::Lines, ask::UnknownHost];
    assert!(missed.iter().all(|why| others.contains(why)), "{missed:?}");
}

/// Everything that a browser sends to a policy of plain lists is the kernel's.
#[test]
fn the_kernel_decides_what_browsers_send() {
    let table = samples::table(&[]);
    let kernel = table.for_kernel(&[LISTENER]);
    let chrome = |host: &str, path: &str, origin: &str, method: &str, headers: &str| {
        format!(
            "OPTIONS {path} HTTP/1.1\r\nHost: {host}\r\nConnection: keep-alive\r\nAccept: */*\r\n\
             Access-Control-Request-Method: {method}\r\nAccess-Control-Request-Headers: {headers}\r\nOrigin: {origin}\r\n\
             User-Agent: Mozilla/5.0 (X11; Linux x86_64)\r\nSec-Fetch-Mode: cors\r\n\
             Accept-Encoding: gzip, deflate\r\nAccept-Language: en-GB,en;q=0.9\r\n\r\n"
        )
    };
    let app = "https://app.example";
    for (host, path, origin, method, headers, want) in [
        ("api.example", "/v1/items/42?expand=1", app, "PUT", "content-type,x-request-id", outcome::Allowed),
        ("api.example:8080", "/", "https://pr-7.preview.example", "GET", "authorization", outcome::Allowed),
        ("x.y.tenant.example", "/login", "http://localhost", "DELETE", "x-a", outcome::Allowed),
        ("api.example", "/", "https://evil.example", "PUT", "x-a", outcome::DeniedOrigin),
        ("api.example", "/", app, "PATCH", "x-a", outcome::DeniedMethod),
        ("api.example", "/", app, "PUT", "x-evil", outcome::DeniedHeaders),
        ("ingress.example", "/x", "https://a.one.example", "PATCH", "x-evil", outcome::Allowed),
        ("ingress.example", "/x", "https://a.b.one.example", "PUT", "x-a", outcome::PassedOrigin),
        ("pass.example", "/x", app, "PATCH", "x-a", outcome::PassedMethod),
        ("pass.example", "/x", app, "PUT", "x-evil", outcome::PassedHeaders),
        ("exact.envoy.example", "/", app, "PUT", "x-b", outcome::Allowed),
        ("exact.envoy.example", "/", "https://evil.example", "PUT", "x-b", outcome::DeniedOrigin),
        ("gateway.example", "/", "https://a.gate.example", "PUT", "x-a", outcome::Allowed),
        ("gateway.example", "/", "http://whatever.test", "PUT", "x-a", outcome::Allowed),
        ("all.example", "/", "https://evil.example", "PATCH", "x-a", outcome::Allowed),
        ("off.example", "/", app, "PUT", "x-a", outcome::PassedRoute),
        ("clash.example", "/both", app, "PUT", "x-a", outcome::PassedRoute),
        ("clash.example", "/c", app, "PUT", "x-a", outcome::PassedRoute),
        ("other.example", "/any/1", app, "PUT", "x-a", outcome::Allowed),
        ("192.0.2.1", "/any/1", app, "PUT", "x-a", outcome::Allowed),
    ] {
        let bytes = chrome(host, path, origin, method, headers);
        check(&table, &kernel, bytes.as_bytes());
        let decided = kernel.decide(LISTENER, bytes.as_bytes(), LIMIT).expect("a plain head");
        assert_ne!(decided.verdict, verdict::ASK, "{host}{path} from {origin}: asked for {}", decided.why);
        assert_eq!(decided.outcome, want, "{host}{path} from {origin}, {method}, {headers}");
    }
    for (host, path, origin, method, headers, want) in [
        ("echo.example", "/", app, "PUT", "x-a", ask::Rules),
        ("split.example", "/v1", app, "PUT", "x-a", ask::Rules),
        ("regex.example", "/plain", app, "PUT", "x-a", ask::Regex),
        ("long.example", samples::LONG_PATH, app, "PUT", "x-a", ask::LongPath),
        ("envoy.example", "/", "https://x.end.example", "PUT", "x-a", ask::Origin),
        ("unusual.example", "/", app, "PURGE", "x-a", ask::Method),
        ("api.example", "/", app, "PUT", "content-type, x-a", ask::Names),
        ("192.0.2.2", "/any", app, "PUT", "x-a", ask::Host),
    ] {
        let bytes = chrome(host, path, origin, method, headers);
        assert_eq!(
            check(&table, &kernel, bytes.as_bytes()),
            Tier::Worker(want),
            "{host}{path} from {origin}"
        );
    }
    let left: Vec<_> = kernel.summary.left.keys().map(|name| &**name).collect();
    assert_eq!(left, ["echo", "envoy", "long", "regex", "split-others", "split-put", "unusual"]);
}

#[test]
fn what_does_not_fit_is_no_table_at_all() {
    use crate::policy::dialect::{Rules, native};
    use crate::policy::{HostPattern, ListenerSpec, PathMatch, PolicySpec, RouteLabels, SourceRef};
    let cors = native::Cors { origins: vec!["https://app.example".into()], ..native::Cors::default() };
    let rules = Rules::Native(native::validate(&cors).0.expect("valid"));
    let hosts = (0..140_000).map(|i| HostPattern::Exact(format!("h{i}.example"))).collect();
    let policy = PolicySpec {
        name: "many".into(),
        source: SourceRef { origin: "test".into(), line: 0 },
        listeners: vec![],
        hosts,
        paths: vec![PathMatch::Prefix("/".into())],
        for_methods: vec![],
        passes: None,
        on_denied: None,
        rules,
    };
    let listener = ListenerSpec {
        id: LISTENER,
        name: "web".into(),
        own_literals: vec![],
        loopback_is_own: false,
        public_ports: vec![],
    };
    let (table, _) = Table::compile(&[listener], &[policy], &mut RouteLabels::new(10), 1);
    let kernel = table.for_kernel(&[LISTENER]);
    assert!(kernel.terms.is_empty() && kernel.templates.is_empty());
    assert!(kernel.summary.too_large.is_some_and(|why| why.contains("do not fit")));
}

/// What was learned is a worker's, to the byte; all else of its paths is the proxy's at once.
#[test]
fn the_kernel_asks_a_worker_for_what_was_learned_and_for_nothing_else() {
    const A: &str = "https://a.example";
    const NAMES: &str = "Access-Control-Request-Headers: content-type,x-a\r\n";
    let request = |host: &str, target: &str, origin: &str, method: &str, headers: &str| {
        format!(
            "OPTIONS {target} HTTP/1.1\r\nHost: {host}\r\nOrigin: {origin}\r\nAccess-Control-Request-Method: \
             {method}\r\n{headers}\r\n"
        )
        .into_bytes()
    };
    let hosts = ["learned.test", "free.test"].map(|host| HostPattern::Exact(host.to_owned()));
    let learnable = Learnable::new(&[], &hosts, &mut RouteLabels::new(1000));
    let known = [
        ("free.test:8080", "/v1/cart?q=12345678", A, "PUT", NAMES),
        ("free.test", "/", A, "PURGE", ""),
        ("learned.test", "/beside", A, "GET", ""),
    ];
    let learned = known.map(|(host, target, origin, method, headers)| {
        let names: [&[u8]; 1] = [b"content-type,x-a"];
        let question = Question::of(&Preflight {
            listener: LISTENER,
            host: host.as_bytes(),
            target: target.as_bytes(),
            origin: origin.as_bytes(),
            method: method.as_bytes(),
            headers: if headers.is_empty() { &[] } else { &names },
            private_network: false,
        });
        let lines = [("Access-Control-Allow-Origin".to_owned(), "*".to_owned())];
        Arc::new(Learned::new(Arc::new(question.expect("a question")), true, &lines))
    });
    let answers = Arc::new(Answers::new(Arc::new(learnable), learned.into()));
    let table = samples::declared(&["learned.test"]).with_learned(2, Some(answers));
    let kernel = table.for_kernel(&[LISTENER]);
    for (host, target, origin, method, headers) in known {
        let bytes = request(host, target, origin, method, headers);
        assert_eq!(kernel.tier(LISTENER, &bytes, LIMIT), Tier::Worker(ask::Rules), "{host}{target}");
        assert!(by_worker(&table, &bytes).is_some(), "{host}{target}");
    }
    let cart = "/v1/cart?q=12345678";
    for (name, bytes) in [
        ("another port", request("free.test", cart, A, "PUT", NAMES)),
        ("another query", request("free.test:8080", "/v1/cart?q=12345679", A, "PUT", NAMES)),
        ("no query", request("free.test:8080", "/v1/cart", A, "PUT", NAMES)),
        ("another origin", request("free.test:8080", cart, "https://b.example", "PUT", NAMES)),
        ("another method", request("free.test:8080", cart, A, "DELETE", NAMES)),
        ("no names", request("free.test:8080", cart, A, "PUT", "")),
        ("another path", request("free.test", "/other", A, "PUT", NAMES)),
        ("another path beside a policy", request("learned.test", "/other", A, "GET", "")),
    ] {
        assert_eq!(kernel.tier(LISTENER, &bytes, LIMIT), Tier::Proxy, "{name}");
        assert!(by_worker(&table, &bytes).is_none(), "{name}");
    }
    let declared = request("learned.test", "/declared", "https://app.example", "PUT", "");
    assert!(matches!(check(&table, &kernel, &declared), Tier::Kernel(_)), "policies go before");
}
