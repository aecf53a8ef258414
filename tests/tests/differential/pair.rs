//! A proxy and preflightd before it: the same bytes to both, and what their answers differ in.

use crate::{Ask, Named, Peer, Policy, sharp::Row};
use preflightd_tests::{
    Client, Config, Daemon, Nginx, Response,
    envoy::{self, Envoy, VirtualHost},
    ingress_nginx::{self, Annotations, Cors, Server},
    site::{free_address, have},
};
use serde_json::{Value, json};
use std::{any::Any, collections::BTreeMap, fmt::Write as _, net::SocketAddr, time::Instant};

/// Who gave the answer that came through preflightd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    Preflightd,
    Proxy,
}

/// A proxy with policies, and preflightd before it.
pub(crate) struct Pair {
    peer: Peer,
    direct: Line,
    through: Line,
    daemon: Daemon,
    answered: u64,
    passed: u64,
    /// Of the passed ones, those that the proxy answered by itself.
    cautious: u64,
    seen: BTreeMap<Named, u64>,
    /// What has no name.
    pub(crate) faults: Vec<String>,
    /// Kept running.
    _proxy: Box<dyn Any>,
    _upstream: Nginx,
}

/// A connection that is kept while it may be.
struct Line {
    address: SocketAddr,
    client: Option<Client>,
}

impl Line {
    fn new(address: SocketAddr) -> Self {
        Self { address, client: None }
    }

    fn ask(&mut self, bytes: &[u8], alone: bool) -> Response {
        let mut client = match self.client.take() {
            Some(client) if !alone => client,
            _ => Client::connect(self.address).lenient(),
        };
        let response = client.exchange(bytes);
        let closes = response.header("connection").is_some_and(|v| v.eq_ignore_ascii_case("close"));
        if !alone && !closes {
            self.client = Some(client);
        }
        response
    }
}

impl Pair {
    /// `None`, said on stderr, where the proxy is not installed (in CI that fails).
    pub(crate) fn start(peer: Peer, policies: &[Policy]) -> Option<Self> {
        if !have(&["nginx"]) {
            return None;
        }
        let (backend, proxy) = (free_address(), free_address());
        let upstream = Nginx::start(&[backend], |_| {
            format!(
                "access_log off; server {{ listen {backend}; location / {{ return 404 \"the upstream\\n\"; }} }}"
            )
        });
        let running: Box<dyn Any> = match peer {
            Peer::Nginx => Box::new(ingress_nginx::start(proxy, &servers(policies), backend)?),
            Peer::Envoy => Box::new(Envoy::start(proxy, &envoy::config(proxy, &hosts(policies), backend))?),
        };
        let daemon = Daemon::start(Config::new(proxy, toml(peer, policies)));
        Some(Self {
            peer,
            direct: Line::new(proxy),
            through: Line::new(daemon.address()),
            daemon,
            answered: 0,
            passed: 0,
            cautious: 0,
            seen: BTreeMap::new(),
            faults: Vec::new(),
            _proxy: running,
            _upstream: upstream,
        })
    }

    /// Asks both, and compares.
    ///
    /// # Errors
    /// They differ by something that has no name.
    pub(crate) fn ask(&mut self, policy: &Policy, ask: &Ask) -> Result<(By, Vec<Named>), String> {
        let bytes = ask.bytes();
        let direct = self.direct.ask(&bytes, ask.alone());
        let through = self.through.ask(&bytes, ask.alone());
        let by = self.author(&through);
        let named = match by {
            By::Preflightd => {
                self.answered += 1;
                self.compare(&direct, &through)
            }
            By::Proxy => {
                self.passed += 1;
                // The connection is the proxy's from here on.
                self.through.client = None;
                self.passed(policy, ask, &direct, &through)
            }
        };
        let named = named.map_err(|why| {
            format!(
                "{why}\n  policy {}: {}\n  base: {:?}\n  asked: {}\n  {:?}: {direct:?}\n  preflightd, by {by:?}: {through:?}",
                policy.name,
                policy.rules,
                policy.base,
                bytes.escape_ascii(),
                self.peer
            )
        })?;
        for name in &named {
            *self.seen.entry(*name).or_default() += 1;
        }
        Ok((by, named))
    }

    /// The proxies never send what preflightd always does, and the other way round.
    fn author(&self, through: &Response) -> By {
        let ours = match self.peer {
            Peer::Nginx => through.header("connection").is_none() || through.header("vary").is_some(),
            Peer::Envoy => through.header("vary").is_some(),
        };
        if ours { By::Preflightd } else { By::Proxy }
    }

    fn compare(&self, direct: &Response, through: &Response) -> Result<Vec<Named>, String> {
        if self.peer == Peer::Envoy && direct.status == 426 {
            return Ok(vec![Named::Http10]);
        }
        if (direct.status, &direct.body) != (through.status, &through.body) {
            return Err("another status or content".into());
        }
        let mut named = Vec::new();
        let values = |r: &Response, name: &str| -> Vec<String> {
            r.headers.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.clone()).collect()
        };
        let names = |r: &Response| -> Vec<String> { r.headers.iter().map(|(n, _)| n.clone()).collect() };
        let mut all: Vec<String> =
            names(direct).iter().chain(&names(through)).map(|n| n.to_lowercase()).collect();
        all.sort();
        all.dedup();
        for name in &all {
            let (theirs, ours) = (values(direct, name), values(through, name));
            match name.as_str() {
                "date" if same_moment(&theirs, &ours) => {}
                "vary" if theirs.is_empty() && ours == [VARY] => named.push(Named::Vary),
                "connection" if theirs == ["keep-alive"] && ours.is_empty() => named.push(Named::KeepAlive),
                "content-length" if theirs == ["0"] && ours.is_empty() && through.status == 204 => {
                    named.push(Named::ContentLength);
                }
                _ if theirs == ours => {}
                _ => return Err(format!("{name} is {theirs:?} of the proxy and {ours:?} of preflightd")),
            }
        }
        // Of those that both have; their spelling too is the proxy's.
        let (mut theirs, mut ours) = (names(direct), names(through));
        theirs.retain(|name| !values(through, name).is_empty());
        ours.retain(|name| !values(direct, name).is_empty());
        if theirs != ours {
            theirs.sort();
            ours.sort();
            if theirs != ours {
                return Err("names in another spelling".into());
            }
            named.push(Named::Order);
        }
        named.sort_unstable();
        Ok(named)
    }

    fn passed(
        &mut self,
        policy: &Policy,
        ask: &Ask,
        direct: &Response,
        through: &Response,
    ) -> Result<Vec<Named>, String> {
        if undated(direct) != undated(through) {
            return Err("it passed, and the proxy's answer changed on the way".into());
        }
        if direct.cors_headers().is_empty() {
            return Ok(Vec::new());
        }
        self.cautious += 1;
        match caution(self.peer, policy, ask) {
            Some(name) => Ok(vec![name]),
            None => Err("the proxy answered by itself, and nothing says why preflightd passed".into()),
        }
    }

    /// The sharp cases: who answers, and which differences there are.
    pub(crate) fn table(&mut self, policies: &[Policy], rows: Vec<Row>) {
        for (name, policy, ask, by, named) in rows {
            let policy = policies.iter().find(|p| p.name == policy).expect("a policy of the table");
            match self.ask(policy, &ask) {
                Ok(got) if got == (by, named.to_vec()) => {}
                Ok(got) => {
                    let wanted = (by, named);
                    self.faults
                        .push(format!("{name}: {got:?}, not {wanted:?}: {}", ask.bytes().escape_ascii()));
                }
                Err(why) => self.faults.push(format!("{name}: {why}")),
            }
        }
    }

    pub(crate) fn finish(self, names: &[Named], start: Instant) {
        let all = self.answered + self.passed;
        let mut report = format!(
            "{:?}: {all} preflights, {} answered by preflightd, {} passed; of these the proxy answered {} by itself ({:.1} s)\n",
            self.peer,
            self.answered,
            self.passed,
            self.cautious,
            start.elapsed().as_secs_f64()
        );
        for (name, count) in &self.seen {
            writeln!(report, "  {name:?}: {count}").expect("a string");
        }
        eprintln!("{report}");
        let metrics = self.daemon.metrics();
        let Self { peer, answered, passed, seen, faults, daemon, .. } = self;
        // A panic would print its log, of which nothing is of interest here.
        drop(daemon);
        assert!(faults.is_empty(), "{} differences without a name:\n{}", faults.len(), faults.join("\n\n"));
        let unseen: Vec<_> = names.iter().filter(|name| !seen.contains_key(name)).collect();
        assert!(unseen.is_empty(), "never seen, so there is no such difference: {unseen:?}");
        let unlisted: Vec<_> = seen.keys().filter(|name| !names.contains(name)).collect();
        assert!(unlisted.is_empty(), "differences that {peer:?} is not said to show: {unlisted:?}");
        // Who answered was told by the bytes: the daemon's own counts must agree.
        let count = |outcome| metrics.count("preflightd_requests_total", &[("outcome", outcome)]);
        assert_eq!((count("allowed") + count("denied"), count("passed")), (answered, passed));
    }
}

const VARY: &str = "Origin, Access-Control-Request-Method, Access-Control-Request-Headers";

/// Why preflightd leaves to the proxy what that answers by itself.
fn caution(peer: Peer, policy: &Policy, ask: &Ask) -> Option<Named> {
    let origin = ask.origin.trim_matches([' ', '\t']);
    let is_token = |text: &str| {
        !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
    };
    if ask.doubt.is_some() {
        return ask.doubt;
    }
    if policy.unmodelled {
        return Some(Named::Unmodelled);
    }
    if origin.len() > 384 || !origin.bytes().all(|b| b.is_ascii_graphic() && b != b',') {
        return Some(Named::OriginForm);
    }
    if ask.method.len() > 64 || !is_token(&ask.method) {
        return Some(Named::MethodForm);
    }
    if ask.headers.len() > 32 {
        return Some(Named::HeadForm);
    }
    match peer {
        Peer::Nginx => left_anchor(policy, origin).then_some(Named::LeftAnchor),
        Peer::Envoy => {
            let unset = |value: &&Value| value.as_str().is_none_or(str::is_empty);
            let field = |rules: &Value| Some(rules["allow_headers"].clone()).filter(|v| !unset(&v));
            let allow = field(&policy.rules).or_else(|| policy.base.as_ref().and_then(field));
            let list = |text: &str| {
                let good = |b: u8| b" \t,".contains(&b) || is_token(char::from(b).encode_utf8(&mut [0; 4]));
                text.bytes().all(good)
            };
            let length: usize = ask.headers.iter().map(|line| line.len() + 1).sum();
            let echo = allow.is_some_and(|allow| allow == "*");
            // 4,096 bytes in all.
            let bad = length > 4097 || !ask.headers.iter().all(|l| list(l));
            (echo && bad).then_some(Named::Echo)
        }
    }
}

/// Whether something stands before an allowed origin.
fn left_anchor(policy: &Policy, origin: &str) -> bool {
    let allowed = ingress_nginx::origins(&annotations(policy));
    let covers = |entry: &String, origin: &str| {
        let (entry, origin) = (entry.to_ascii_lowercase(), origin.to_ascii_lowercase());
        match entry.split_once('*') {
            None => entry == origin,
            Some((front, back)) => {
                origin.strip_prefix(front).and_then(|rest| rest.strip_suffix(back)).is_some_and(|label| {
                    !label.is_empty() && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
                })
            }
        }
    };
    (1..origin.len()).any(|at| allowed.iter().any(|entry| covers(entry, &origin[at..])))
}

/// The second may turn between two answers, and clocks are read once a second.
fn same_moment(theirs: &[String], ours: &[String]) -> bool {
    let seconds = |values: &[String]| {
        let [date] = values else { return None };
        // Sun, 06 Nov 1994 08:49:37 GMT
        let time = date.strip_suffix(" GMT")?.get(17..)?;
        let parts: Vec<i64> = time.split(':').filter_map(|part| part.parse().ok()).collect();
        let &[h, m, s] = &parts[..] else { return None };
        Some(h * 3600 + m * 60 + s)
    };
    let (Some(theirs), Some(ours)) = (seconds(theirs), seconds(ours)) else { return false };
    let apart = (theirs - ours).rem_euclid(86_400);
    apart.min(86_400 - apart) <= 3
}

/// The bytes, but for the value of the date.
fn undated(response: &Response) -> Vec<u8> {
    let text = String::from_utf8_lossy(&response.raw).into_owned();
    let is_date = |line: &str| line.to_ascii_lowercase().starts_with("date: ");
    let lines: Vec<&str> = text.split("\r\n").map(|line| if is_date(line) { "date" } else { line }).collect();
    lines.join("\r\n").into_bytes()
}

fn annotations(policy: &Policy) -> Annotations {
    serde_json::from_value(policy.rules.clone()).expect("annotations")
}

/// nginx's servers, one for each host.
fn servers(policies: &[Policy]) -> Vec<Server> {
    let mut servers: Vec<Server> = Vec::new();
    for policy in policies {
        let path = (policy.path.to_owned(), Cors::read(&annotations(policy)));
        match servers.iter_mut().find(|server| server.host == policy.host) {
            Some(server) => server.paths.push(path),
            None => servers.push(Server { host: policy.host.clone(), paths: vec![path] }),
        }
    }
    servers
}

/// Envoy's virtual hosts.
fn hosts(policies: &[Policy]) -> Vec<VirtualHost> {
    let mut hosts: Vec<VirtualHost> = Vec::new();
    for policy in policies {
        let route = (policy.path.to_owned(), Some(policy.rules.clone()));
        match hosts.iter_mut().find(|host| host.host == policy.host) {
            Some(host) => host.routes.push(route),
            None => hosts.push(VirtualHost {
                host: policy.host.clone(),
                cors: policy.base.clone(),
                routes: vec![route],
            }),
        }
    }
    for host in &mut hosts {
        host.routes.sort_by_key(|(path, _)| std::cmp::Reverse(path.len()));
    }
    hosts
}

/// preflightd's policies.
fn toml(peer: Peer, policies: &[Policy]) -> String {
    let dialect = match peer {
        Peer::Nginx => "ingress-nginx",
        Peer::Envoy => "envoy",
    };
    let mut all = Vec::new();
    for policy in policies {
        let mut value =
            json!({"name": policy.name, "hosts": [policy.host], "paths": [{"prefix": policy.path}]});
        value[dialect] = policy.rules.clone();
        if let Some(base) = &policy.base {
            // A policy is inherited from by its name, whatever it serves itself.
            let name = format!("{}-base", policy.name);
            let host = format!("{name}.unused");
            all.push(json!({"name": name, "hosts": [host], dialect: base}));
            value["inherit"] = name.into();
        }
        all.push(value);
    }
    toml::to_string(&json!({"policy": all})).expect("policies as TOML")
}
