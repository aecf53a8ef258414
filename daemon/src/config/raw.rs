//! The shapes that the files have: what serde reads. Each single value is checked here; what concerns several of them
//! is `build`'s.

use crate::{
    policy::{
        HostPattern, OnDenied, PathMatch,
        dialect::{envoy, gateway_api, ingress_nginx, native},
    },
    relay::ProxyProtocol,
    worker::EngineChoice,
};
use serde::{Deserialize, Deserializer, de};
use std::{
    fmt,
    marker::PhantomData,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    str::FromStr,
    time::Duration,
};

/// Keys at the root of the configuration file that are no arrays of tables.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Root {
    pub(super) workers: super::Workers,
    pub(super) limits: super::Limits,
    pub(super) relay: super::Relay,
    pub(super) steer: super::Steer,
    pub(super) ask: super::Ask,
    pub(super) learn: Learn,
    pub(super) shadow: super::Shadow,
    pub(super) admin: super::Admin,
    pub(super) log: super::Log,
    pub(super) kubernetes: super::Kubernetes,
    pub(super) policy_dir: String,
    pub(super) policy_files: Vec<String>,
    /// Read table by table before; here only if they have another type.
    #[serde(rename = "listener")]
    _listener: Tables,
    #[serde(rename = "policy")]
    _policy: Tables,
}

/// `[learn]`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Learn {
    pub(super) hosts: Vec<Text<Host>>,
    pub(super) listeners: Vec<String>,
    #[serde(deserialize_with = "duration")]
    pub(super) max_ttl: Duration,
    pub(super) max_entries: usize,
}

impl Default for Learn {
    fn default() -> Self {
        let super::Learn { max_ttl, max_entries, .. } = super::Learn::default();
        Self { hosts: Vec::new(), listeners: Vec::new(), max_ttl, max_entries }
    }
}

/// Keys at the root of a policy file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct PolicyRoot {
    #[serde(rename = "policy")]
    _policy: Tables,
}

/// A list of tables, of which nothing is kept.
#[derive(Debug, Default)]
struct Tables;

impl<'de> Deserialize<'de> for Tables {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Refuse;
        impl<'de> de::Visitor<'de> for Refuse {
            type Value = Tables;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of tables, each under a `[[…]]` line")
            }
            fn visit_seq<A: de::SeqAccess<'de>>(self, mut seq: A) -> Result<Tables, A::Error> {
                while seq.next_element::<toml::Table>()?.is_some() {}
                Ok(Tables)
            }
        }
        d.deserialize_seq(Refuse)
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Listener {
    pub(super) name: Option<Text<ListenerName>>,
    pub(super) address: Option<Text<Address>>,
    pub(super) steer: bool,
    pub(super) upstream: Option<Text<Address>>,
    pub(super) answer_only: bool,
    #[serde(deserialize_with = "proxy_protocol")]
    pub(super) proxy_protocol: ProxyProtocol,
    pub(super) transparent: bool,
    pub(super) public_ports: Vec<u16>,
    pub(super) addresses: Vec<Text<Ip>>,
    pub(super) gateways: Vec<Text<GatewayName>>,
    pub(super) ingress_classes: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Policy {
    pub(super) name: Option<Text<PolicyName>>,
    pub(super) listeners: Vec<String>,
    pub(super) hosts: Option<Vec<Text<Host>>>,
    pub(super) paths: Option<Vec<Path>>,
    pub(super) enabled: Option<bool>,
    pub(super) for_methods: Vec<Text<Method>>,
    #[serde(deserialize_with = "on_denied")]
    pub(super) on_denied: Option<OnDenied>,
    pub(super) inherit: Option<String>,
    // The native dialect, inline.
    pub(super) origins: Option<Vec<String>>,
    pub(super) methods: Option<Vec<String>>,
    pub(super) headers: Option<Vec<String>>,
    pub(super) expose: Option<Vec<String>>,
    pub(super) credentials: Option<bool>,
    pub(super) max_age: Option<i64>,
    pub(super) private_network: Option<bool>,
    // The others, each in a block of its own.
    #[serde(rename = "gateway-api")]
    pub(super) gateway_api: Option<gateway_api::Cors>,
    #[serde(rename = "ingress-nginx")]
    pub(super) ingress_nginx: Option<ingress_nginx::Annotations>,
    pub(super) envoy: Option<envoy::Cors>,
}

impl Policy {
    /// The inline fields as the native dialect has them.
    pub(super) fn native(&self) -> native::Cors {
        native::Cors {
            origins: self.origins.clone().unwrap_or_default(),
            methods: self.methods.clone().unwrap_or_default(),
            headers: self.headers.clone().unwrap_or_default(),
            expose: self.expose.clone().unwrap_or_default(),
            credentials: self.credentials.unwrap_or_default(),
            max_age: self.max_age,
            private_network: self.private_network.unwrap_or_default(),
        }
    }

    /// The first inline field of the native dialect that is set.
    pub(super) fn native_field(&self) -> Option<&'static str> {
        [
            ("origins", self.origins.is_some()),
            ("methods", self.methods.is_some()),
            ("headers", self.headers.is_some()),
            ("expose", self.expose.is_some()),
            ("credentials", self.credentials.is_some()),
            ("max_age", self.max_age.is_some()),
            ("private_network", self.private_network.is_some()),
        ]
        .into_iter()
        .find_map(|(name, set)| set.then_some(name))
    }
}

/// A method that a preflight asks for.
#[derive(Debug)]
pub(super) struct Method;

impl FromText for Method {
    type Value = String;
    const EXPECTED: &'static str = "a method in quotes, such as \"PUT\"";
    fn from_text(text: &str) -> Result<String, String> {
        if text.len() > 64 || !crate::policy::is_token(text.as_bytes()) {
            return Err(format!(
                "`{text}` is no method\nwrite one as requests have it, such as \"PUT\"; leave `for_methods` out for all"
            ));
        }
        Ok(text.to_owned())
    }
}

/// A path match: a table with one of three keys.
#[derive(Debug)]
pub(super) struct Path(pub(super) PathMatch);

impl<'de> Deserialize<'de> for Path {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct OneOf;
        impl<'de> de::Visitor<'de> for OneOf {
            type Value = Path;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(
                    "a path: { prefix = \"/api\" }, { exact = \"/login\" } or { regex = \"/v[0-9]+/.*\" }",
                )
            }
            fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Path, A::Error> {
                let mut path = None;
                while let Some(key) = map.next_key::<String>()? {
                    let value = map.next_value::<String>()?;
                    let wanted = path_match(&key, value).map_err(de::Error::custom)?;
                    if path.replace(wanted).is_some() {
                        return Err(de::Error::custom(
                            "one path has several keys\nwrite one table for each: [{ prefix = \"/a\" }, { exact = \
                             \"/b\" }]",
                        ));
                    }
                }
                path.map(Path).ok_or_else(|| {
                    de::Error::custom("a path without a key\nwrite { prefix = \"/\" } for the whole host")
                })
            }
        }
        d.deserialize_map(OneOf)
    }
}

fn path_match(key: &str, path: String) -> Result<PathMatch, String> {
    match key {
        "prefix" | "exact" => {}
        "regex" => return Ok(PathMatch::Regex(path)),
        _ => return Err(format!("a path has no key `{key}`\nwrite prefix, exact or regex")),
    }
    if !path.starts_with('/') {
        return Err(format!("the path `{path}` does not begin with `/`\nwrite `/{path}`"));
    }
    if let Some(c) = path.chars().find(|c| matches!(c, '?' | '#' | '%' | ';' | '\\') || !c.is_ascii_graphic())
    {
        return Err(format!(
            "the path `{path}` can never match: requests with `{}` in the path go to the proxy\nleave it out; \
             queries play no part in the match",
            c.escape_default()
        ));
    }
    if path.contains("//") || path.split('/').any(|segment| matches!(segment, "." | "..")) {
        return Err(format!(
            "the path `{path}` can never match: requests with empty or dot segments go to the proxy\nwrite it \
             without them"
        ));
    }
    Ok(if key == "exact" { PathMatch::Exact(path) } else { PathMatch::Prefix(path) })
}

/// A string that is read by [`FromText`]: an error points at the string itself.
#[derive(Debug)]
pub(super) struct Text<T: FromText>(pub(super) T::Value);

/// Reads a value; an error is what is wrong, a line feed, what to do about it.
pub(super) trait FromText: fmt::Debug {
    type Value: fmt::Debug;
    const EXPECTED: &'static str;
    fn from_text(text: &str) -> Result<Self::Value, String>;
}

impl<'de, T: FromText> Deserialize<'de> for Text<T> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        text::<T, D>(d).map(Text)
    }
}

fn text<'de, T: FromText, D: Deserializer<'de>>(d: D) -> Result<T::Value, D::Error> {
    struct Read<T>(PhantomData<T>);
    impl<T: FromText> de::Visitor<'_> for Read<T> {
        type Value = T::Value;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(T::EXPECTED)
        }
        fn visit_str<E: de::Error>(self, text: &str) -> Result<T::Value, E> {
            T::from_text(text).map_err(E::custom)
        }
    }
    d.deserialize_str(Read::<T>(PhantomData))
}

/// Reads a duration such as `10s`; for `deserialize_with`.
pub(super) fn duration<'de, D: Deserializer<'de>>(d: D) -> Result<Duration, D::Error> {
    text::<Time, D>(d)
}

/// Reads an address, or none from the empty string; for `deserialize_with`.
pub(super) fn optional_address<'de, D: Deserializer<'de>>(d: D) -> Result<Option<SocketAddr>, D::Error> {
    text::<OptionalAddress, D>(d)
}

/// Reads a path, or none from the empty string; for `deserialize_with`.
pub(super) fn optional_path<'de, D: Deserializer<'de>>(d: D) -> Result<Option<std::path::PathBuf>, D::Error> {
    text::<OptionalPath, D>(d)
}

/// Reads a filter such as `info` or `preflightd::relay=debug`; for `deserialize_with`.
pub(super) fn log_filter<'de, D: Deserializer<'de>>(d: D) -> Result<String, D::Error> {
    text::<LogFilter, D>(d)
}

/// Reads `auto`, `io_uring` or `epoll`; for `deserialize_with`.
pub(super) fn engine<'de, D: Deserializer<'de>>(d: D) -> Result<EngineChoice, D::Error> {
    #[derive(Deserialize)]
    #[serde(rename_all = "snake_case")]
    enum Word {
        Auto,
        IoUring,
        Epoll,
    }
    Ok(match Word::deserialize(d)? {
        Word::Auto => EngineChoice::Auto,
        Word::IoUring => EngineChoice::IoUring,
        Word::Epoll => EngineChoice::Epoll,
    })
}

fn proxy_protocol<'de, D: Deserializer<'de>>(d: D) -> Result<ProxyProtocol, D::Error> {
    #[derive(Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum Word {
        Auto,
        Off,
        V1,
        V2,
    }
    Ok(match Word::deserialize(d)? {
        Word::Auto => ProxyProtocol::Auto,
        Word::Off => ProxyProtocol::Off,
        Word::V1 => ProxyProtocol::V1,
        Word::V2 => ProxyProtocol::V2,
    })
}

fn on_denied<'de, D: Deserializer<'de>>(d: D) -> Result<Option<OnDenied>, D::Error> {
    #[derive(Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum Word {
        Answer,
        Pass,
    }
    Ok(Some(match Word::deserialize(d)? {
        Word::Answer => OnDenied::Answer,
        Word::Pass => OnDenied::Pass,
    }))
}

/// A duration with its unit.
#[derive(Debug)]
struct Time;

impl FromText for Time {
    type Value = Duration;
    const EXPECTED: &'static str = "a duration in quotes, such as \"10s\" or \"500ms\"";
    fn from_text(text: &str) -> Result<Duration, String> {
        let d = humantime::parse_duration(text).map_err(|e| {
            format!("`{text}` is no duration: {e}\nwrite a number and its unit, such as \"10s\", \"500ms\", \"5m\"")
        })?;
        if d > Duration::from_hours(366 * 24) {
            return Err(format!("`{text}` is more than a year\nwrite a shorter duration"));
        }
        Ok(d)
    }
}

/// An IP address with its port.
#[derive(Debug)]
pub(super) struct Address;

impl FromText for Address {
    type Value = SocketAddr;
    const EXPECTED: &'static str = "an address in quotes, such as \"127.0.0.1:8080\" or \"[::]:80\"";
    fn from_text(text: &str) -> Result<SocketAddr, String> {
        text.parse().map_err(|_| {
            let help = if text.parse::<Ipv4Addr>().is_ok() {
                format!("add the port: \"{text}:80\"")
            } else if text.parse::<Ipv6Addr>().is_ok() {
                format!("put it in brackets and add the port: \"[{text}]:80\"")
            } else if let Ok(port) = text.trim_start_matches(':').parse::<u16>() {
                format!("add the IP address: \"0.0.0.0:{port}\", \"[::]:{port}\" or \"127.0.0.1:{port}\"")
            } else {
                "write an IP address (no name) and a port, such as \"127.0.0.1:8080\" or \"[::1]:8080\""
                    .to_owned()
            };
            format!("`{text}` is no address\n{help}")
        })
    }
}

#[derive(Debug)]
struct OptionalAddress;

impl FromText for OptionalAddress {
    type Value = Option<SocketAddr>;
    const EXPECTED: &'static str = Address::EXPECTED;
    fn from_text(text: &str) -> Result<Option<SocketAddr>, String> {
        if text.is_empty() { Ok(None) } else { Address::from_text(text).map(Some) }
    }
}

#[derive(Debug)]
struct OptionalPath;

impl FromText for OptionalPath {
    type Value = Option<std::path::PathBuf>;
    const EXPECTED: &'static str = "a path in quotes";
    fn from_text(text: &str) -> Result<Self::Value, String> {
        // A Unix socket's path has 108 bytes with the final zero (unix(7)).
        if text.len() > 107 || text.contains('\0') {
            return Err(format!(
                "`{text}` cannot be a socket's path\nuse at most 107 bytes, none of them zero"
            ));
        }
        Ok((!text.is_empty()).then(|| text.into()))
    }
}

#[derive(Debug)]
struct LogFilter;

impl FromText for LogFilter {
    type Value = String;
    const EXPECTED: &'static str = "a log level in quotes, such as \"info\"";
    fn from_text(text: &str) -> Result<String, String> {
        match tracing_subscriber::EnvFilter::from_str(text) {
            Ok(_) if !text.trim().is_empty() => Ok(text.to_owned()),
            _ => Err(format!(
                "`{text}` is no log level\nwrite error, warn, info, debug or trace, or a filter such as \
                 \"info,preflightd::relay=debug\""
            )),
        }
    }
}

/// An IP address.
#[derive(Debug)]
pub(super) struct Ip;

impl FromText for Ip {
    type Value = IpAddr;
    const EXPECTED: &'static str = "an IP address in quotes";
    fn from_text(text: &str) -> Result<IpAddr, String> {
        text.parse().map_err(|_| {
            format!("`{text}` is no IP address\nwrite the address alone, without port or brackets")
        })
    }
}

/// A Gateway, or a listener of one.
#[derive(Debug)]
pub(super) struct GatewayName;

impl FromText for GatewayName {
    type Value = String;
    const EXPECTED: &'static str = "a Gateway in quotes, such as \"infra/web\"";
    fn from_text(text: &str) -> Result<String, String> {
        if !matches!(text.split('/').count(), 2 | 3) || text.split('/').any(str::is_empty) {
            return Err(format!(
                "`{text}` is no Gateway\nwrite \"namespace/name\", or \"namespace/name/listener\" for one of its listeners"
            ));
        }
        Ok(text.to_owned())
    }
}

/// A selector of labels, as `kubectl -l` has it; for `deserialize_with`.
pub(super) fn label_selector<'de, D: Deserializer<'de>>(d: D) -> Result<String, D::Error> {
    text::<Selector, D>(d)
}

#[derive(Debug)]
struct Selector;

impl FromText for Selector {
    type Value = String;
    const EXPECTED: &'static str = "labels in quotes, such as \"team=shop,tier!=test\"";
    fn from_text(text: &str) -> Result<String, String> {
        if let Err(part) = crate::sources::kubernetes::objects::LabelSelector::parse(text) {
            return Err(format!(
                "`{part}` selects no labels\nwrite it as for `kubectl get -l`, such as \"team=shop,tier!=test\""
            ));
        }
        Ok(text.trim().to_owned())
    }
}

/// A listener's name: a metric label, and a word on the command line.
#[derive(Debug)]
pub(super) struct ListenerName;

impl FromText for ListenerName {
    type Value = String;
    const EXPECTED: &'static str = "a name in quotes";
    fn from_text(text: &str) -> Result<String, String> {
        let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        if text.is_empty() || text.len() > 64 || !text.bytes().all(fits) {
            return Err(format!(
                "`{text}` is no listener name\nuse 1 to 64 letters, digits, `.`, `_` or `-`"
            ));
        }
        Ok(text.to_owned())
    }
}

/// A policy's name: a metric label.
#[derive(Debug)]
pub(super) struct PolicyName;

impl FromText for PolicyName {
    type Value = String;
    const EXPECTED: &'static str = "a name in quotes";
    fn from_text(text: &str) -> Result<String, String> {
        if text.is_empty() || text.len() > 512 || text.chars().any(char::is_control) {
            return Err(format!("`{text}` is no policy name\nuse 1 to 512 bytes without control characters"));
        }
        Ok(text.to_owned())
    }
}

/// A host pattern.
#[derive(Debug)]
pub(super) struct Host;

impl FromText for Host {
    type Value = HostPattern;
    const EXPECTED: &'static str = "a host in quotes, such as \"api.example.com\" or \"*.example.com\"";
    fn from_text(text: &str) -> Result<HostPattern, String> {
        let wrong = |why: &str, help: &str| Err(format!("`{text}` is no host: {why}\n{help}"));
        let host = text.to_ascii_lowercase();
        if host == "*" {
            return Ok(HostPattern::Any);
        }
        if let Some((_, rest)) = host.split_once("://") {
            let end = rest.find(['/', ':']).unwrap_or(rest.len());
            return wrong("it has a scheme", &format!("write the host alone: \"{}\"", &rest[..end]));
        }
        if let Some(literal) = host.strip_prefix('[') {
            return match literal.strip_suffix(']').map(str::parse::<Ipv6Addr>) {
                Some(Ok(ip)) => Ok(HostPattern::Exact(format!("[{ip}]"))),
                _ => {
                    wrong("not an IPv6 address in brackets", "write it as \"[2001:db8::1]\", without a port")
                }
            };
        }
        if host.parse::<Ipv6Addr>().is_ok() {
            return wrong("an IPv6 address without brackets", &format!("write \"[{host}]\""));
        }
        if let Some((name, _)) = host.split_once([':', '/', '@']) {
            let help = format!(
                "write the name alone, such as \"{name}\"; ports belong to a listener's public_ports"
            );
            return wrong("it has a port, a path or a user", &help);
        }
        let (name, wildcard) = match host.strip_prefix("*.") {
            Some(suffix) => (suffix, true),
            None => (&*host, false),
        };
        if name.contains('*') {
            return wrong(
                "`*` stands for whole labels at the front only",
                "write \"*.example.com\", or \"*\" for all",
            );
        }
        if name.ends_with('.') {
            return wrong("it ends with a dot", "leave the dot out; requests that have one go to the proxy");
        }
        if !name.is_ascii() {
            let help = match idna::domain_to_ascii(name) {
                Ok(ascii) => format!(
                    "write the form that clients send: \"{}{ascii}\"",
                    if wildcard { "*." } else { "" }
                ),
                Err(_) => "write the form that clients send (xn--…)".to_owned(),
            };
            return wrong("it is not ASCII", &help);
        }
        let label = |l: &str| {
            !l.is_empty()
                && l.len() <= 63
                && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        };
        if name.len() > 253 || !name.split('.').all(label) {
            return wrong("not a DNS name", "use labels of letters, digits and `-`, joined by dots");
        }
        let numeric = name.rsplit('.').next().is_some_and(|l| l.bytes().all(|b| b.is_ascii_digit()));
        if numeric && (wildcard || name.parse::<Ipv4Addr>().is_err()) {
            return wrong(
                "it ends with a number and is no IPv4 address",
                "write a name, or four decimal numbers",
            );
        }
        Ok(if wildcard { HostPattern::Wildcard(format!(".{name}")) } else { HostPattern::Exact(host) })
    }
}
