//! The policies that servers are measured with: one that fits on a page, and one as big installations have it.
#![forbid(unsafe_code)]

use crate::workload::Request;
use preflightd::policy::{
    HostPattern, ListenerId, ListenerSpec, PathMatch, PolicySpec, Preflight, RouteLabels, SourceRef, Table,
    dialect::{Rules, native},
};
use std::sync::Arc;

/// Hosts × routes × origins per route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Hosts.
    pub hosts: usize,
    /// Path prefixes per host, each with a policy of its own.
    pub routes: usize,
    /// Exact origins per policy.
    pub origins: usize,
}

impl Size {
    /// What the other servers are configured with too.
    pub const SMALL: Self = Self { hosts: 1, routes: 1, origins: 5 };
    /// 10,000 policies with half a million origins.
    pub const LARGE: Self = Self { hosts: 1_000, routes: 10, origins: 50 };
}

/// What every policy allows.
pub const METHODS: [&str; 5] = ["GET", "PUT", "POST", "PATCH", "DELETE"];
/// What every policy allows.
pub const HEADERS: [&str; 3] = ["authorization", "content-type", "x-requested-with"];
/// Seconds that a browser may remember it.
pub const MAX_AGE: u32 = 7200;

/// The name of host number `host`.
pub fn host(host: usize) -> String {
    format!("api.shop-{host}.example")
}

/// Path prefix number `route`.
pub fn prefix(route: usize) -> String {
    format!("/v1/r{route}")
}

/// Origin number `origin` of a policy.
pub fn origin(host: usize, route: usize, origin: usize) -> String {
    format!("https://o{origin}-r{route}.shop-{host}.example")
}

/// The policies as preflightd's configuration has them, in its native dialect.
pub fn native(size: Size) -> String {
    let mut text = String::new();
    for host_number in 0..size.hosts {
        for route in 0..size.routes {
            let origins: Vec<_> =
                (0..size.origins).map(|number| origin(host_number, route, number)).collect();
            text += &native_policy(host_number, route, &prefix(route), &origins);
        }
    }
    text
}

/// A policy for one path prefix of a host.
pub(crate) fn native_policy(host_number: usize, route: usize, prefix: &str, origins: &[String]) -> String {
    format!(
        "\n[[policy]]\nname = \"h{host_number}-r{route}\"\nhosts = [\"{}\"]\npaths = [{{ prefix = \"{prefix}\" }}]\n\
         origins = {origins:?}\nmethods = {METHODS:?}\nheaders = {HEADERS:?}\ncredentials = true\n\
         max_age = {MAX_AGE}\n",
        host(host_number),
    )
}

/// The listener that every policy serves.
pub const LISTENER: ListenerId = ListenerId(0);

/// The same policies as a configuration would be read into.
///
/// # Panics
/// The native dialect does not take them.
pub fn specs(size: Size) -> Vec<PolicySpec> {
    let source: Arc<str> = "bench".into();
    (0..size.hosts * size.routes)
        .map(|number| {
            let (host_number, route) = (number / size.routes, number % size.routes);
            let origins = (0..size.origins).map(|number| origin(host_number, route, number)).collect();
            spec(&source, host_number, route, &native_cors(origins, HEADERS.map(str::to_owned).to_vec()))
        })
        .collect()
}

/// A policy for one origin of host 0 that allows any request header, with credentials: its answers echo what is asked for.
pub fn echoing() -> Vec<PolicySpec> {
    vec![spec(&"bench".into(), 0, 0, &native_cors(vec![origin(0, 0, 0)], vec!["*".into()]))]
}

/// Compiles `policies`.
///
/// # Panics
/// There are findings: these policies are flawless.
pub fn table(policies: &[PolicySpec]) -> Table {
    let listener = ListenerSpec {
        id: LISTENER,
        name: "bench".into(),
        own_literals: Vec::new(),
        loopback_is_own: true,
        public_ports: Vec::new(),
    };
    let (table, findings) = Table::compile(&[listener], policies, &mut RouteLabels::new(1000), 1);
    assert!(findings.is_empty(), "compiling the benchmark's policies: {:?}", findings[0]);
    table
}

/// The preflight of `of`, asking for `headers`.
pub fn preflight<'a>(of: &'a Combination, headers: &'a [&'a [u8]]) -> Preflight<'a> {
    Preflight {
        listener: LISTENER,
        host: of.host.as_bytes(),
        target: of.path.as_bytes(),
        origin: of.origin.as_bytes(),
        method: b"PUT",
        headers,
        private_network: false,
    }
}

fn native_cors(origins: Vec<String>, headers: Vec<String>) -> native::Cors {
    native::Cors {
        origins,
        methods: METHODS.map(str::to_owned).to_vec(),
        headers,
        credentials: true,
        max_age: Some(MAX_AGE.into()),
        ..native::Cors::default()
    }
}

fn spec(source: &Arc<str>, host_number: usize, route: usize, cors: &native::Cors) -> PolicySpec {
    let (rules, findings) = native::validate(cors);
    PolicySpec {
        name: format!("h{host_number}-r{route}"),
        source: SourceRef { origin: source.clone(), line: 0 },
        listeners: Vec::new(),
        hosts: vec![HostPattern::Exact(host(host_number))],
        paths: vec![PathMatch::Prefix(prefix(route))],
        for_methods: vec![],
        passes: None,
        on_denied: None,
        rules: Rules::Native(
            rules.unwrap_or_else(|| panic!("the benchmark's policy is refused: {findings:?}")),
        ),
    }
}

/// Whose preflight it is: a host, a path on it, an origin.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Combination {
    /// The host.
    pub host: String,
    /// A path that one of its routes holds.
    pub path: String,
    /// An origin that this route allows.
    pub origin: String,
}

/// Up to `count` different combinations that the policies of `size` allow, spread over hosts, routes and origins.
pub fn combinations(size: Size, count: usize) -> impl Iterator<Item = Combination> {
    let total = size.hosts * size.routes * size.origins;
    // Golden section, so that even few are spread; without a common factor none comes twice.
    let mut stride = total * 618 / 1000 + 1;
    while !coprime(stride, total) {
        stride += 1;
    }
    (0..count.min(total)).map(move |step| {
        let number = step * stride % total;
        let (host_number, rest) =
            (number / (size.routes * size.origins), number % (size.routes * size.origins));
        let (route, origin_number) = (rest / size.origins, rest % size.origins);
        Combination {
            host: host(host_number),
            path: format!("{}/orders", prefix(route)),
            origin: origin(host_number, route, origin_number),
        }
    })
}

/// The same as whole requests.
pub fn requests(size: Size, count: usize) -> Vec<Request> {
    combinations(size, count).map(|of| Request::new(&of.host, &of.path, &of.origin)).collect()
}

fn coprime(a: usize, b: usize) -> bool {
    if b == 0 { a == 1 } else { coprime(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn requests_are_spread() {
        let requests = requests(Size::LARGE, 1000);
        let different: HashSet<_> = requests.iter().map(|request| &request.keep_alive).collect();
        assert_eq!(different.len(), 1000);
        assert_eq!(super::requests(Size::SMALL, 1000).len(), 5);
    }
}
