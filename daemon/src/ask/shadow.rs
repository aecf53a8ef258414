//! Shadow mode: what the proxy answers against what we would have answered, as a browser judges both.
#![forbid(unsafe_code)]

use crate::{
    explain::browser::{self, Browser},
    http::{Head, HeadLimits, HeadReader},
    policy::{RouteId, labels::RouteLabel, learned::Question},
};
use ahash::AHashMap;
use serde_json::json;
use std::{
    collections::{BTreeSet, VecDeque},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

/// Bytes of an answer that are kept with a sample.
const MAX_KEPT: usize = 2048;
/// No browser remembers an answer for longer (Firefox's bound), in seconds.
const LONGEST: i64 = 86_400;
/// What browsers take where nothing is said (Fetch §4.8), in seconds.
const UNSAID: i64 = 5;

macro_rules! results {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)+) => {
        /// What came of a comparison. The name is a metric label: stable, never renamed.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub(crate) enum Compared { $($(#[$doc])* $variant,)+ }

        impl Compared {
            /// The metric label.
            pub(crate) fn as_str(self) -> &'static str {
                match self { $(Compared::$variant => $name,)+ }
            }
        }
    };
}

results! {
    /// A browser would do the same with both answers.
    Agree = "agree",
    /// The proxy's answer allows the request, ours does not.
    ProxyAllows = "proxy_allows_we_deny",
    /// Ours allows it, the proxy's does not.
    WeAllow = "we_allow_proxy_denies",
    /// Ours allows it, and the proxy's has no CORS header at all.
    ProxyNoCors = "proxy_no_cors",
    /// Only one of them allows it with credentials.
    Credentials = "credentials",
    /// Other methods are allowed besides.
    Methods = "methods",
    /// Other request headers are allowed besides.
    Headers = "headers",
    /// It is remembered for another time.
    MaxAge = "max_age",
    /// Other response headers are exposed.
    Expose = "expose",
    /// We would leave it to the proxy: there is nothing to compare.
    WePass = "we_pass",
    /// The proxy could not be asked.
    AskFailed = "ask_failed",
}

/// How two answers to a question differ; empty: not at all, for a browser.
pub(super) fn differences(question: &Question, ours: &[u8], theirs: &[u8]) -> Vec<Compared> {
    let bytes = question.bytes();
    let Head::Preflight(asked) = HeadReader::new().read(&bytes, HeadLimits { max_bytes: usize::MAX }) else {
        // A question is made of a preflight.
        return Vec::new();
    };
    let judge = |answer: &[u8]| browser::judge(&asked, answer);
    let (our, their): (Browser, Browser) = (judge(ours), judge(theirs));
    match (our.allows(), their.allows()) {
        (false, false) => return Vec::new(),
        (false, true) => return vec![Compared::ProxyAllows],
        (true, false) if Said::of(theirs).is_nothing() => return vec![Compared::ProxyNoCors],
        (true, false) => return vec![Compared::WeAllow],
        (true, true) => {}
    }
    let (ours, theirs) = (Said::of(ours), Said::of(theirs));
    [
        (Compared::Credentials, our.with_credentials.is_empty() != their.with_credentials.is_empty()),
        (Compared::Methods, ours.methods != theirs.methods),
        (Compared::Headers, ours.headers != theirs.headers),
        (Compared::MaxAge, ours.max_age != theirs.max_age),
        (Compared::Expose, ours.expose != theirs.expose),
    ]
    .into_iter()
    .filter_map(|(difference, is)| is.then_some(difference))
    .collect()
}

/// What an answer says beside the verdict.
#[derive(Debug, Default)]
struct Said {
    cors: bool,
    /// But those that need no permission.
    methods: BTreeSet<String>,
    headers: BTreeSet<String>,
    expose: BTreeSet<String>,
    max_age: i64,
}

impl Said {
    fn of(answer: &[u8]) -> Self {
        let mut lines = [httparse::EMPTY_HEADER; 64];
        let mut response = httparse::Response::new(&mut lines);
        if !matches!(response.parse(answer), Ok(httparse::Status::Complete(_))) {
            return Self::default();
        }
        let set = |name| -> BTreeSet<String> {
            let list = browser::list(response.headers, name).unwrap_or_default();
            list.into_iter().map(ToOwned::to_owned).collect()
        };
        let lower = |set: BTreeSet<String>| set.iter().map(|name| name.to_ascii_lowercase()).collect();
        let age = browser::values(response.headers, "access-control-max-age").next();
        let age =
            age.and_then(|value| std::str::from_utf8(value).ok()?.parse::<i64>().ok()).unwrap_or(UNSAID);
        let mut methods = set("access-control-allow-methods");
        methods.retain(|method| !matches!(&**method, "GET" | "HEAD" | "POST"));
        Self {
            cors: response.headers.iter().any(|h| is_cors(h.name)),
            methods,
            headers: lower(set("access-control-allow-headers")),
            expose: lower(set("access-control-expose-headers")),
            max_age: age.clamp(0, LONGEST),
        }
    }

    fn is_nothing(&self) -> bool {
        !self.cors
    }
}

fn is_cors(name: &str) -> bool {
    name.get(..15).is_some_and(|start| start.eq_ignore_ascii_case("access-control-"))
}

/// Everything that was compared.
#[derive(Debug)]
pub(crate) struct Shadow {
    counts: AHashMap<(RouteId, Compared), u64>,
    compared: u64,
    kept: VecDeque<Kept>,
    bound: usize,
}

/// A comparison that came out badly.
#[derive(Debug)]
struct Kept {
    at: u64,
    route: RouteId,
    question: Arc<Question>,
    results: Vec<Compared>,
    ours: String,
    theirs: String,
}

impl Shadow {
    pub(super) fn new(bound: usize) -> Self {
        Self { counts: AHashMap::new(), compared: 0, kept: VecDeque::new(), bound }
    }

    /// Counts what was not compared: [`Compared::WePass`].
    pub(super) fn passed(&mut self, route: RouteId) {
        self.count(route, Compared::WePass);
    }

    /// Compares; `theirs`: the head of the proxy's answer, or why there is none.
    pub(super) fn compare(
        &mut self,
        question: &Arc<Question>,
        route: RouteId,
        ours: &[u8],
        theirs: Result<&[u8], &str>,
    ) {
        let results = match theirs {
            Ok(theirs) => {
                self.compared += 1;
                differences(question, ours, theirs)
            }
            Err(_) => vec![Compared::AskFailed],
        };
        if results.is_empty() {
            return self.count(route, Compared::Agree);
        }
        for result in &results {
            self.count(route, *result);
        }
        if self.bound == 0 {
            return;
        }
        if self.kept.len() >= self.bound {
            self.kept.pop_front();
        }
        self.kept.push_back(Kept {
            at: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            route,
            question: Arc::clone(question),
            results,
            ours: essence(ours),
            theirs: theirs.map_or_else(ToOwned::to_owned, essence),
        });
    }

    fn count(&mut self, route: RouteId, result: Compared) {
        *self.counts.entry((route, result)).or_default() += 1;
    }

    /// Counts by route and result; a comparison with several differences counts under each.
    pub(crate) fn counts(&self) -> impl Iterator<Item = (RouteId, Compared, u64)> {
        self.counts.iter().map(|((route, result), count)| (*route, *result, *count))
    }

    /// For `preflightd shadow report`.
    pub(crate) fn json(
        &self,
        labels: &[RouteLabel],
        listener: impl Fn(&Question) -> String,
    ) -> serde_json::Value {
        let label = |route: RouteId| {
            let label = labels.get(route.0 as usize);
            let of = |text: fn(&RouteLabel) -> &str| label.map_or("", text).to_owned();
            (of(|l| &l.host), of(|l| &l.route), of(|l| &l.policy))
        };
        let mut counts: Vec<_> = self.counts().collect();
        counts.sort_unstable();
        let counts = counts.into_iter().map(|(route, result, count)| {
            let (host, route, policy) = label(route);
            json!({ "host": host, "route": route, "policy": policy, "result": result.as_str(), "count": count })
        });
        let samples = self.kept.iter().rev().map(|kept| {
            let (host, route, policy) = label(kept.route);
            json!({
                "at": kept.at,
                "listener": listener(&kept.question),
                "matched": { "host": host, "route": route, "policy": policy },
                "results": kept.results.iter().map(|result| result.as_str()).collect::<Vec<_>>(),
                "request": String::from_utf8_lossy(&kept.question.bytes()),
                "ours": kept.ours,
                "proxy": kept.theirs,
            })
        });
        json!({
            "compared": self.compared,
            "counts": counts.collect::<Vec<_>>(),
            "samples": samples.collect::<Vec<_>>(),
        })
    }
}

/// Status line and CORS lines of an answer.
fn essence(answer: &[u8]) -> String {
    let text = String::from_utf8_lossy(answer);
    let mut lines = text.lines();
    let mut kept = lines.next().unwrap_or_default().to_owned();
    for line in
        lines.filter(|line| is_cors(line) || line.get(..5).is_some_and(|n| n.eq_ignore_ascii_case("vary:")))
    {
        kept.push('\n');
        kept.push_str(line);
    }
    kept.truncate(kept.floor_char_boundary(MAX_KEPT));
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::ListenerId;

    fn question() -> Arc<Question> {
        Arc::new(Question {
            listener: ListenerId(0),
            host: "h".into(),
            target: "/x".into(),
            origin: "https://a.example".into(),
            method: "PUT".into(),
            headers: "x-a".into(),
        })
    }

    /// `204`, a blank, and lines by their first letters.
    fn answer(text: &str) -> Vec<u8> {
        let (status, lines) = text.split_once(' ').unwrap_or((text, ""));
        let mut out = format!("HTTP/1.1 {status} X\r\nDate: now\r\n");
        for line in lines.split('|').filter(|line| !line.is_empty()) {
            let (name, value) = line.split_once('=').expect("name=value");
            let name = match name {
                "O" => "Access-Control-Allow-Origin",
                "C" => "access-control-allow-credentials",
                "M" => "Access-Control-Allow-Methods",
                "H" => "Access-Control-Allow-Headers",
                "A" => "Access-Control-Max-Age",
                "E" => "Access-Control-Expose-Headers",
                other => other,
            };
            let value = if value == "a" { "https://a.example" } else { value };
            out.extend([name, ": ", value, "\r\n"]);
        }
        (out + "\r\n").into_bytes()
    }

    #[test]
    fn differences_are_those_that_a_browser_sees() {
        use Compared::{Credentials, Expose, Headers, MaxAge, Methods, ProxyAllows, ProxyNoCors, WeAllow};
        const ALLOWED: &str = "204 O=a|M=PUT|H=x-a";
        for (name, ours, theirs, expected) in [
            ("the same", ALLOWED, ALLOWED, &[][..]),
            ("another status, order and spelling", ALLOWED, "200 H=X-A|M=POST, PUT|O=a|Vary=Origin|A=5", &[]),
            ("both deny, each in its way", "403 ", "204 O=https://b.example", &[]),
            ("both deny", "403 ", "404 ", &[]),
            ("star for the origin", ALLOWED, "204 O=*|M=PUT|H=x-a", &[]),
            ("the proxy knows the origin", "403 ", ALLOWED, &[ProxyAllows]),
            ("the proxy does not know the method", ALLOWED, "204 O=a|M=DELETE|H=x-a", &[WeAllow]),
            ("the proxy has no CORS", ALLOWED, "404 ", &[ProxyNoCors]),
            ("a redirect", ALLOWED, "302 O=a|M=PUT|H=x-a", &[WeAllow]),
            ("credentials", "204 O=a|M=PUT|H=x-a|C=true", ALLOWED, &[Credentials]),
            ("further methods", ALLOWED, "204 O=a|M=PUT,DELETE|H=x-a", &[Methods]),
            ("further headers, and longer", ALLOWED, "204 O=a|M=PUT|H=x-a,x-b|A=60", &[Headers, MaxAge]),
            (
                "beyond what browsers take",
                "204 O=a|M=PUT|H=x-a|A=90000",
                "204 O=a|M=PUT|H=x-a|A=1728000",
                &[],
            ),
            ("expose", ALLOWED, "204 O=a|M=PUT|H=x-a|E=x-b", &[Expose]),
        ] {
            assert_eq!(differences(&question(), &answer(ours), &answer(theirs)), expected, "{name}");
        }
    }

    #[test]
    fn everything_is_counted_and_the_last_ones_are_kept() {
        let mut shadow = Shadow::new(2);
        let (good, bad) = (answer("204 O=a|M=PUT|H=x-a"), answer("404 Set-Cookie=secret"));
        shadow.passed(RouteId(1));
        shadow.compare(&question(), RouteId(1), &good, Ok(&good));
        shadow.compare(&question(), RouteId(1), &good, Err("refused"));
        for _ in 0..3 {
            shadow.compare(&question(), RouteId(1), &good, Ok(&bad));
        }
        let mut counts: Vec<_> = shadow.counts().map(|(_, result, count)| (result.as_str(), count)).collect();
        counts.sort_unstable();
        assert_eq!(counts, [("agree", 1), ("ask_failed", 1), ("proxy_no_cors", 3), ("we_pass", 1)]);
        let json = shadow.json(&[], |_| "web".to_owned());
        assert_eq!(json["compared"], 4);
        let samples = json["samples"].as_array().expect("a list");
        assert_eq!(samples.len(), 2);
        assert_eq!(samples[0]["proxy"], "HTTP/1.1 404 X", "nothing but CORS is kept");
        assert_eq!(samples[0]["results"][0], "proxy_no_cors");
    }
}
