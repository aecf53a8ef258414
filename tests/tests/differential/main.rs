//! The proxies' own answers: preflights to a real nginx configured as ingress-nginx configures it, and to a real Envoy with
//! its CORS filter; then the same bytes to preflightd, which has the same policies in the proxy's dialect and that very
//! proxy behind it. Both answers must be the same, but for the differences that [`Named`] names.
//!
//! Policies and preflights are drawn, always the same for a seed (`PREFLIGHTD_SEED`, which is printed). A table of sharp
//! cases goes first: every name must be seen.
#![forbid(unsafe_code)]

mod drawn;
mod pair;
mod sharp;

use pair::Pair;
use preflightd_tests::{random::Random, steering::full};
use serde_json::Value;
use std::{env, fmt::Write as _, time::Instant};

/// A difference that may be. The quoted rules are those of the dialects: what an answer must be, and what passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Named {
    // In answers that preflightd gives.
    /// "Vary: Origin, ACRM, ACRH". The proxies send none, and caches may then mix up the answers to two origins.
    Vary,
    /// nginx says `Connection: keep-alive`, which is what HTTP/1.1 means without it (RFC 9112 §9.3).
    KeepAlive,
    /// "204 carries neither Content-Length nor Content-Type." nginx with its headers-more module sends a length of 0.
    ContentLength,
    /// Envoy has its header lines in another order, which means nothing (RFC 9110 §5.3).
    Order,
    /// "HTTP/1.1 (or 1.0)". Envoy refuses 1.0 with 426, unless it is told otherwise.
    Http10,

    // The proxy answers by itself, and preflightd passes. What the client gets is the same, byte for byte.
    /// "Anchored at both ends (nginx forgets the left one)": to nginx `evilhttps://a.example` is `https://a.example`.
    LeftAnchor,
    /// "Exactly one `Origin` line, exactly one ACRM line".
    RepeatedLine,
    /// "The path is unambiguous: no `//`, dot segments, `%2e`, `%2f`, `%5c`, `\`, `;`", nor any other encoding.
    Path,
    /// "Target is origin-form".
    TargetForm,
    /// "No body, no Upgrade, no Expect".
    BodyOrUpgrade,
    /// "No Cookie, no Authorization (a browser sends none on a preflight)".
    Credentials,
    /// "A well-formed head (no bare LF, no obs-fold)", and none with more than 32 ACRH lines.
    HeadForm,
    /// "A trailing dot, userinfo or a foreign IP literal passes".
    Host,
    /// An origin that no browser serialises: blanks, commas, other bytes than visible ASCII, or longer than any.
    OriginForm,
    /// ACRM "a valid token", and none longer than any in use.
    MethodForm,
    /// "An echo holds only validated bytes (token characters, comma, blanks), capped in length."
    Echo,
    /// "Shadow or percentage settings, matchers that cannot be modelled".
    Unmodelled,
}

impl Named {
    /// Those that each proxy shows. All must be seen: a name that nothing goes by is a lie.
    const NGINX: &[Named] = &[
        Self::Vary,
        Self::KeepAlive,
        Self::ContentLength,
        Self::LeftAnchor,
        Self::RepeatedLine,
        Self::Path,
        Self::TargetForm,
        Self::BodyOrUpgrade,
        Self::Credentials,
        Self::HeadForm,
        Self::Host,
        Self::OriginForm,
        Self::MethodForm,
        Self::Unmodelled,
    ];
    const ENVOY: &[Named] = &[
        Self::Vary,
        Self::Order,
        Self::Http10,
        Self::RepeatedLine,
        Self::Path,
        Self::TargetForm,
        Self::BodyOrUpgrade,
        Self::Credentials,
        Self::HeadForm,
        Self::OriginForm,
        Self::MethodForm,
        Self::Echo,
        Self::Unmodelled,
    ];
}

/// Which proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Peer {
    Nginx,
    Envoy,
}

/// One policy, on a host of its own (or on paths of one).
#[derive(Clone, Debug)]
struct Policy {
    name: String,
    host: String,
    path: &'static str,
    /// The annotations, or Envoy's policy.
    rules: Value,
    /// Envoy: the virtual host's, which fills what is unset.
    base: Option<Value>,
    /// It has a part that preflightd leaves to the proxy.
    unmodelled: bool,
    /// Origins that it is about, to draw near ones from.
    origins: Vec<String>,
}

/// A preflight, or nearly one.
#[derive(Clone, Debug)]
struct Ask {
    host: String,
    target: String,
    version: &'static str,
    origin: String,
    method: String,
    headers: Vec<String>,
    /// Further lines.
    more: Vec<&'static str>,
    /// Content, and what the lines end in.
    body: &'static str,
    newline: &'static str,
    /// What makes it pass, if the writer of it knows that.
    doubt: Option<Named>,
}

impl Ask {
    fn new(host: &str, origin: &str) -> Self {
        Self {
            host: host.to_owned(),
            target: "/".into(),
            version: "HTTP/1.1",
            origin: origin.to_owned(),
            method: "PUT".into(),
            headers: Vec::new(),
            more: Vec::new(),
            body: "",
            newline: "\r\n",
            doubt: None,
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let n = self.newline;
        let mut head = format!("OPTIONS {} {}{n}Host: {}{n}", self.target, self.version, self.host);
        let mut line = |name: &str, value: &str| write!(head, "{name}: {value}{n}").expect("a string");
        line("Accept", "*/*");
        line("Access-Control-Request-Method", &self.method);
        for value in &self.headers {
            line("Access-Control-Request-Headers", value);
        }
        line("Origin", &self.origin);
        line("User-Agent", "Mozilla/5.0 (X11; Linux x86_64)");
        for more in &self.more {
            write!(head, "{more}{n}").expect("a string");
        }
        (head + n + self.body).into_bytes()
    }

    /// Whether what follows on the connection may be read otherwise.
    fn alone(&self) -> bool {
        self.doubt.is_some() || self.version != "HTTP/1.1"
    }
}

#[test]
fn nginx() {
    let start = Instant::now();
    let seed = seed();
    let (mut policies, count) = (sharp::nginx_table(), policies_count());
    for i in 0..count {
        let random = &mut stream(seed, 1, i);
        drawn::nginx_policies(random, i, &mut policies);
    }
    let Some(mut pair) = Pair::start(Peer::Nginx, &policies) else { return };
    pair.table(&policies, sharp::nginx_rows());
    generated(&mut pair, &policies, seed);
    pair.finish(Named::NGINX, start);
}

#[test]
fn envoy() {
    let start = Instant::now();
    let seed = seed();
    let (mut policies, count) = (sharp::envoy_table(), policies_count());
    for i in 0..count {
        let random = &mut stream(seed, 2, i);
        drawn::envoy_policies(random, i, &mut policies);
    }
    let Some(mut pair) = Pair::start(Peer::Envoy, &policies) else { return };
    pair.table(&policies, sharp::envoy_rows());
    generated(&mut pair, &policies, seed);
    pair.finish(Named::ENVOY, start);
}

fn seed() -> u64 {
    let seed = env::var("PREFLIGHTD_SEED").map_or(20_240_607, |text| text.parse().expect("a number"));
    eprintln!("PREFLIGHTD_SEED={seed}");
    seed
}

/// Numbers of their own for each seed, use and policy.
fn stream(seed: u64, purpose: u64, policy: u64) -> Random {
    Random::new((seed << 24) ^ (purpose << 20) ^ policy)
}

/// 120 policies by 40 preflights; in the long form 40 times as many.
fn policies_count() -> u64 {
    if full() { 960 } else { 120 }
}

fn generated(pair: &mut Pair, policies: &[Policy], seed: u64) {
    let each = if full() { 200 } else { 40 };
    for (i, policy) in (0..).zip(policies) {
        let random = &mut stream(seed, 3, i);
        for _ in 0..each {
            let ask = drawn::near(random, policy);
            if let Err(why) = pair.ask(serving(policies, policy, &ask), &ask) {
                pair.faults.push(why);
            }
        }
        if pair.faults.len() > 50 {
            return;
        }
    }
}

/// Which policy of the same host the target leads to: the one with the longest path.
fn serving<'p>(policies: &'p [Policy], policy: &'p Policy, ask: &Ask) -> &'p Policy {
    let path = ask.target.split('?').next().unwrap_or_default();
    let leads = |other: &&Policy| {
        let rest = path.strip_prefix(other.path.trim_end_matches('/'));
        other.host == policy.host && rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    policies.iter().filter(leads).max_by_key(|other| other.path.len()).unwrap_or(policy)
}
