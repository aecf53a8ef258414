//! Origin patterns: how they are written, and which request origins they match, for every dialect.

use super::host::{ends_in_number, parse_port};
use super::regex::Regexes;
use super::strings::{Lengths, Strings, hash};
use hashbrown::HashTable;
use std::net::{Ipv4Addr, Ipv6Addr};

/// Longer origins are not judged. A serialised origin has at most 64 + 3 + 253 + 6 bytes.
pub(super) const MAX_ORIGIN: usize = 384;

/// Longest scheme of a pattern, as browsers' libraries bound it.
const MAX_SCHEME: usize = 64;
/// Longest host (RFC 1035), and longest one behind `*.`.
const MAX_HOST: usize = 253;
const MAX_WILDCARD_TAIL: usize = 251;

/// The origins that a policy allows.
#[derive(Debug)]
pub(super) enum Origins {
    /// All of them.
    All,
    /// By scheme, host and port.
    Web(Web),
    /// ingress-nginx: without regard to case, `*.` is one label.
    OneLabel(OneLabel),
    /// Envoy's string matchers.
    Matchers(Box<Matchers>),
}

impl Origins {
    /// Whether `origin` (visible ASCII, at most [`MAX_ORIGIN`] bytes) is allowed.
    #[inline]
    pub(super) fn allow(&self, origin: &[u8]) -> bool {
        match self {
            Origins::All => true,
            Origins::Web(web) => web.allow(origin),
            Origins::OneLabel(list) => list.allow(origin),
            Origins::Matchers(matchers) => matchers.allow(origin),
        }
    }

    /// In words, whether `origin` is allowed, and by what.
    pub(super) fn explain(&self, origin: &[u8]) -> String {
        let text = String::from_utf8_lossy(origin);
        match self {
            Origins::All => "is allowed, as every origin is".to_owned(),
            Origins::Web(web) if web.exact.contains(origin) => "is allowed: it is listed".to_owned(),
            _ if self.allow(origin) => "is allowed: a pattern matches it".to_owned(),
            _ if text.ends_with('/') => "is not allowed (an origin has no slash at its end)".to_owned(),
            _ if text.bytes().any(|b| b.is_ascii_uppercase()) => {
                "is not allowed (browsers send origins in lower case)".to_owned()
            }
            _ => "is not allowed: nothing listed matches it".to_owned(),
        }
    }
}

/// Whether an `Origin` value may be judged, and echoed: visible ASCII, not too long.
#[inline]
pub(super) fn is_plain(origin: &[u8]) -> bool {
    // No early exit: the loop vectorises, and a good origin is the common case.
    let strange = origin.iter().fold(false, |strange, &b| strange | !matches!(b, b'!'..=b'~'));
    !strange && !origin.is_empty() && origin.len() <= MAX_ORIGIN
}

/// A pattern's port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Port {
    /// None: the scheme's default.
    Default,
    /// This one.
    Number(u16),
    /// `:*`.
    Any,
}

/// A pattern's host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HostMatch {
    /// This one.
    Exact,
    /// One label or more before it (`*.` was written before it).
    Below,
    /// Every host (`*` was written instead of it).
    Every,
}

/// A parsed pattern `scheme://host[:port]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pattern<'a> {
    pub(super) scheme: &'a str,
    pub(super) matching: HostMatch,
    /// Without `*.`; empty for [`HostMatch::Every`].
    pub(super) host: &'a str,
    pub(super) port: Port,
}

/// What is wrong with a pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PatternError {
    Null,
    Blank,
    List,
    NoScheme,
    Scheme,
    File,
    TrailingSlash,
    Path,
    UserInfo,
    Upper,
    NonAscii,
    Wildcard,
    Host,
    Address,
    Punycode,
    HostTooLong,
    Port,
    DefaultPort,
}

/// Reads a native pattern: what it cannot match in any browser is an error.
pub(super) fn parse_pattern(text: &str) -> Result<Pattern<'_>, PatternError> {
    use PatternError as E;
    if text == "null" {
        return Err(E::Null);
    }
    if text.trim() != text || text.is_empty() {
        return Err(E::Blank);
    }
    if text.contains(',') {
        return Err(E::List);
    }
    if !text.is_ascii() {
        return Err(E::NonAscii);
    }
    let (scheme, rest) = text.split_once("://").ok_or(E::NoScheme)?;
    if scheme.eq_ignore_ascii_case("file") {
        return Err(E::File);
    }
    if scheme.len() > MAX_SCHEME || !is_scheme(scheme.as_bytes()) {
        let upper = is_scheme(scheme.to_ascii_lowercase().as_bytes());
        return Err(if upper { E::Upper } else { E::Scheme });
    }
    if let Some(slash) = rest.find(['/', '?', '#', '\\']) {
        return Err(if rest[slash..] == *"/" { E::TrailingSlash } else { E::Path });
    }
    if rest.contains('@') {
        return Err(E::UserInfo);
    }
    if rest.contains(|c: char| c.is_ascii_uppercase()) {
        return Err(E::Upper);
    }
    let (host, port) = split_host_port(rest)?;
    let port = match port {
        None => Port::Default,
        Some("*") => Port::Any,
        Some(digits) => Port::Number(parse_port(digits.as_bytes()).ok_or(E::Port)?),
    };
    if let Port::Number(n) = port
        && default_port(scheme.as_bytes()) == Some(n)
    {
        return Err(E::DefaultPort);
    }
    let (matching, host) = match host.strip_prefix("*.") {
        Some(tail) => (HostMatch::Below, tail),
        None => (HostMatch::Exact, host),
    };
    if host.contains('*') {
        return Err(E::Wildcard);
    }
    check_host(host, matching)?;
    Ok(Pattern { scheme, matching, host, port })
}

fn split_host_port(text: &str) -> Result<(&str, Option<&str>), PatternError> {
    let end = if text.starts_with('[') {
        text.find(']').ok_or(PatternError::Address)? + 1
    } else {
        text.find(':').unwrap_or(text.len())
    };
    match &text[end..] {
        "" => Ok((&text[..end], None)),
        rest => match rest.strip_prefix(':') {
            Some(port) => Ok((&text[..end], Some(port))),
            None => Err(PatternError::Host),
        },
    }
}

fn check_host(host: &str, matching: HostMatch) -> Result<(), PatternError> {
    use PatternError as E;
    let longest = if matching == HostMatch::Below { MAX_WILDCARD_TAIL } else { MAX_HOST };
    if host.len() > longest {
        return Err(E::HostTooLong);
    }
    if host.starts_with('[') {
        if matching == HostMatch::Below {
            return Err(E::Wildcard);
        }
        let text = &host[1..host.len() - 1];
        let address: Ipv6Addr = text.parse().map_err(|_| E::Address)?;
        let canonical = address.to_ipv4_mapped().is_none() && address.to_string() == text;
        return if canonical { Ok(()) } else { Err(E::Address) };
    }
    // One trailing dot is a host of its own for browsers; serialised origins keep it.
    let labels = host.strip_suffix('.').unwrap_or(host);
    if labels.is_empty() || labels.split('.').any(str::is_empty) {
        return Err(E::Host);
    }
    if !host.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_' | b'.'))
    {
        return Err(E::Host);
    }
    let last = labels.rsplit('.').next().unwrap_or(labels);
    if ends_in_number(last.as_bytes()) {
        let plain = host.parse::<Ipv4Addr>().is_ok();
        return match (plain, matching) {
            (true, HostMatch::Below) => Err(E::Wildcard),
            (true, _) => Ok(()),
            (false, _) => Err(E::Address),
        };
    }
    if labels.split('.').any(|label| label.starts_with("xn--")) && idna::domain_to_unicode(labels).1.is_err()
    {
        return Err(E::Punycode);
    }
    Ok(())
}

impl Pattern<'_> {
    /// `localhost`, hosts below it, and loopback addresses: only this machine's own pages.
    pub(super) fn is_loopback(&self) -> bool {
        match self.matching {
            HostMatch::Every => false,
            HostMatch::Below => self.host == "localhost",
            HostMatch::Exact => {
                let bare = self.host.trim_start_matches('[').trim_end_matches(']');
                self.host == "localhost"
                    || self.host.ends_with(".localhost")
                    || bare.parse::<Ipv4Addr>().is_ok_and(|a| a.is_loopback())
                    || bare.parse::<Ipv6Addr>().is_ok_and(|a| a.is_loopback())
            }
        }
    }

    /// Whether it matches everything below a public suffix, such as `*.com` or `*.github.io`.
    pub(super) fn is_over_public_suffix(&self) -> bool {
        let host = self.host.strip_suffix('.').unwrap_or(self.host);
        self.matching == HostMatch::Below
            && psl::suffix(host.as_bytes()).is_some_and(|s| s.is_known() && s.as_bytes() == host.as_bytes())
    }
}

/// RFC 3986 §3.1, lower-case.
fn is_scheme(scheme: &[u8]) -> bool {
    scheme.first().is_some_and(u8::is_ascii_lowercase)
        && scheme
            .iter()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'+' | b'-' | b'.'))
}

/// The port that a serialised origin of this scheme leaves out.
pub(super) fn default_port(scheme: &[u8]) -> Option<u16> {
    match scheme {
        b"http" | b"ws" => Some(80),
        b"https" | b"wss" => Some(443),
        b"ftp" => Some(21),
        _ => None,
    }
}

/// A request's origin: `scheme://host[:port]` as browsers serialise it (RFC 6454 §6.1, HTML §7.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Serialised<'a> {
    scheme: &'a [u8],
    host: &'a [u8],
    port: Option<u16>,
}

fn parse_serialised(origin: &[u8]) -> Option<Serialised<'_>> {
    let colon = memchr::memchr(b':', origin)?;
    let (scheme, rest) = origin.split_at(colon);
    if scheme.len() > MAX_SCHEME || !is_scheme(scheme) {
        return None;
    }
    let rest = rest.strip_prefix(b"://")?;
    let end = if rest.first() == Some(&b'[') {
        let end = memchr::memchr(b']', rest)? + 1;
        std::str::from_utf8(&rest[1..end - 1]).ok()?.parse::<Ipv6Addr>().ok()?;
        end
    } else {
        let mut previous = b'.';
        let mut end = rest.len();
        for (i, &b) in rest.iter().enumerate() {
            match b {
                b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' => {}
                b'.' if previous != b'.' => {}
                b':' => {
                    end = i;
                    break;
                }
                _ => return None,
            }
            previous = b;
        }
        end
    };
    let (host, rest) = rest.split_at(end);
    if host.is_empty() || host.len() > MAX_HOST {
        return None;
    }
    let port = match rest.split_first() {
        None => None,
        Some((b':', digits)) => Some(parse_port(digits)?),
        Some(_) => return None,
    };
    if port.is_some() && port == default_port(scheme) {
        return None;
    }
    Some(Serialised { scheme, host, port })
}

/// Origins by scheme, host and port (native and gateway-api).
#[derive(Debug, Default)]
pub(super) struct Web {
    /// Byte-equal to the serialised origin.
    exact: Strings,
    tails: Tails,
    /// `https://a:443` in a request is `https://a` (gateway-api); natively it is no serialised origin.
    default_port_is_none: bool,
}

impl Web {
    /// `literals` match byte for byte.
    pub(super) fn new(patterns: &[Pattern<'_>], literals: &[&str], default_port_is_none: bool) -> Self {
        let mut exact: Vec<String> = literals.iter().map(|&l| l.to_owned()).collect();
        let mut tails = Vec::new();
        for pattern in patterns {
            let port = match pattern.port {
                Port::Number(n) if default_port(pattern.scheme.as_bytes()) == Some(n) => Port::Default,
                port => port,
            };
            match (pattern.matching, port) {
                (HostMatch::Exact, Port::Default) => {
                    exact.push(format!("{}://{}", pattern.scheme, pattern.host))
                }
                (HostMatch::Exact, Port::Number(n)) => {
                    exact.push(format!("{}://{}:{n}", pattern.scheme, pattern.host));
                }
                (matching, port) => tails.push(Tail {
                    scheme: pattern.scheme.as_bytes().into(),
                    tail: match matching {
                        HostMatch::Exact => pattern.host.as_bytes().into(),
                        HostMatch::Below => format!(".{}", pattern.host).into_bytes().into(),
                        HostMatch::Every => Box::default(),
                    },
                    port,
                }),
            }
        }
        Self { exact: Strings::new(exact), tails: Tails::new(tails), default_port_is_none }
    }

    fn allow(&self, origin: &[u8]) -> bool {
        let origin = if self.default_port_is_none { strip_default_port(origin) } else { origin };
        self.exact.contains(origin)
            || (!self.tails.list.is_empty() && parse_serialised(origin).is_some_and(|o| self.tails.allow(&o)))
    }
}

fn strip_default_port(origin: &[u8]) -> &[u8] {
    let suffix: &[u8] = match origin {
        [b'h', b't', b't', b'p', b's', b':', ..] => b":443",
        [b'h', b't', b't', b'p', b':', ..] => b":80",
        _ => return origin,
    };
    origin.strip_suffix(suffix).unwrap_or(origin)
}

/// `tail` is what the host ends with: `.example.com`, or nothing; or the whole host.
#[derive(Debug, PartialEq, Eq)]
struct Tail {
    scheme: Box<[u8]>,
    tail: Box<[u8]>,
    port: Port,
}

#[derive(Debug, Default)]
struct Tails {
    list: Box<[Tail]>,
    lengths: Lengths,
    index: Option<HashTable<u32>>,
}

impl Tails {
    fn new(list: Vec<Tail>) -> Self {
        let lengths = Lengths::of(list.iter().map(|t| &*t.tail));
        let index = (list.len() > 4).then(|| {
            let mut index = HashTable::with_capacity(list.len());
            for (i, tail) in list.iter().enumerate() {
                index.insert_unique(hash(0, &tail.tail), i as u32, |&j| hash(0, &list[j as usize].tail));
            }
            index
        });
        Self { list: list.into(), lengths, index }
    }

    fn allow(&self, origin: &Serialised<'_>) -> bool {
        let Some(index) = &self.index else {
            return self.list.iter().any(|t| t.covers(origin, t.matched_part(origin.host)));
        };
        let look = |part: &[u8]| {
            self.lengths.has(part.len())
                && index.find(hash(0, part), |&i| self.list[i as usize].covers(origin, Some(part))).is_some()
        };
        look(origin.host)
            || memchr::memchr_iter(b'.', origin.host).any(|dot| dot > 0 && look(&origin.host[dot..]))
            || look(b"")
    }
}

impl Tail {
    /// The part of `host` that must equal the tail.
    fn matched_part<'h>(&self, host: &'h [u8]) -> Option<&'h [u8]> {
        match self.tail.first() {
            None => Some(b""),
            Some(b'.') => (host.len() > self.tail.len()).then(|| &host[host.len() - self.tail.len()..]),
            Some(_) => Some(host),
        }
    }

    fn covers(&self, origin: &Serialised<'_>, part: Option<&[u8]>) -> bool {
        part == Some(&*self.tail)
            && *self.scheme == *origin.scheme
            && match self.port {
                Port::Any => true,
                Port::Default => origin.port.is_none(),
                Port::Number(n) => origin.port == Some(n),
            }
    }
}

/// ingress-nginx: compared without regard to ASCII case; `scheme://*.rest` has exactly one label of letters, digits and
/// hyphens for the star, `rest` (with its port) is literal.
#[derive(Debug, Default)]
pub(super) struct OneLabel {
    exact: Strings,
    /// `scheme://` and `.rest` joined.
    wild: Strings,
}

impl OneLabel {
    /// `origins` as the annotation has them.
    pub(super) fn new(origins: &[&str]) -> Self {
        let (mut exact, mut wild) = (Vec::new(), Vec::new());
        for origin in origins {
            let origin = origin.to_ascii_lowercase();
            match origin.split_once("://*.") {
                Some((scheme, rest)) => wild.push(format!("{scheme}://.{rest}")),
                None => exact.push(origin),
            }
        }
        Self { exact: Strings::new(exact), wild: Strings::new(wild) }
    }

    fn allow(&self, origin: &[u8]) -> bool {
        let mut buffer = [0; MAX_ORIGIN];
        let Some(lower) = buffer.get_mut(..origin.len()) else { return false };
        lower.copy_from_slice(origin);
        lower.make_ascii_lowercase();
        if self.exact.contains(lower) {
            return true;
        }
        if self.wild.is_empty() {
            return false;
        }
        let Some(colon) = memchr::memchr(b':', lower) else { return false };
        let host = colon + 3;
        if lower.get(colon..host) != Some(b"://") {
            return false;
        }
        let label = lower[host..].iter().take_while(|b| b.is_ascii_alphanumeric() || **b == b'-').count();
        if label == 0 || lower.get(host + label) != Some(&b'.') {
            return false;
        }
        // Close the gap that the label leaves.
        lower.copy_within(host + label.., host);
        let joined = lower.len() - label;
        self.wild.contains(&lower[..joined])
    }
}

/// One of Envoy's string matchers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Matcher<'a> {
    Exact(&'a str),
    Prefix(&'a str),
    Suffix(&'a str),
    Contains(&'a str),
    Regex(&'a str),
}

/// Envoy's string matchers, in two sets: case-sensitive and not.
#[derive(Debug)]
pub(super) struct Matchers {
    exact_case: Literals,
    any_case: Option<Literals>,
    regexes: Regexes,
}

impl Matchers {
    /// `matchers` with their `ignore_case`; refuses the first regex that cannot be modelled, by its position.
    pub(super) fn new(matchers: &[(Matcher<'_>, bool)]) -> Result<Self, (usize, String)> {
        let (at, patterns): (Vec<usize>, Vec<&str>) = matchers
            .iter()
            .enumerate()
            .filter_map(|(i, (m, _))| if let Matcher::Regex(r) = m { Some((i, *r)) } else { None })
            .unzip();
        let regexes = Regexes::new(&patterns).map_err(|(i, error)| (at[i], error))?;
        let any_case = Literals::new(matchers.iter().filter(|(_, ignore)| *ignore).map(|(m, _)| *m));
        Ok(Self {
            exact_case: Literals::new(matchers.iter().filter(|(_, ignore)| !ignore).map(|(m, _)| *m)),
            any_case: (!any_case.is_empty()).then_some(any_case.lower()),
            regexes,
        })
    }

    /// As the filter asks: a matcher that matches the literal `*` allows every origin.
    pub(super) fn allow(&self, origin: &[u8]) -> bool {
        if self.exact_case.matches(origin) {
            return true;
        }
        if let Some(literals) = &self.any_case {
            let mut buffer = [0; MAX_ORIGIN];
            let Some(lower) = buffer.get_mut(..origin.len()) else { return false };
            lower.copy_from_slice(origin);
            lower.make_ascii_lowercase();
            if literals.matches(lower) {
                return true;
            }
        }
        self.regexes.is_match(origin)
    }
}

#[derive(Debug, Default)]
struct Literals {
    exact: Strings,
    prefixes: Strings,
    prefix_lengths: Lengths,
    suffixes: Strings,
    suffix_lengths: Lengths,
    contained: Box<[memchr::memmem::Finder<'static>]>,
}

impl Literals {
    fn new<'a>(matchers: impl Iterator<Item = Matcher<'a>>) -> Self {
        let (mut exact, mut prefixes, mut suffixes, mut contained) = (vec![], vec![], vec![], vec![]);
        for matcher in matchers {
            match matcher {
                Matcher::Exact(s) => exact.push(s),
                Matcher::Prefix(s) => prefixes.push(s),
                Matcher::Suffix(s) => suffixes.push(s),
                Matcher::Contains(s) => contained.push(memchr::memmem::Finder::new(s).into_owned()),
                Matcher::Regex(_) => {}
            }
        }
        Self::from_parts(&exact, &prefixes, &suffixes, contained)
    }

    fn from_parts<T: AsRef<[u8]>>(
        exact: &[T],
        prefixes: &[T],
        suffixes: &[T],
        contained: Vec<memchr::memmem::Finder<'static>>,
    ) -> Self {
        Self {
            exact: Strings::new(exact),
            prefixes: Strings::new(prefixes),
            prefix_lengths: Lengths::of(prefixes.iter().map(AsRef::as_ref)),
            suffixes: Strings::new(suffixes),
            suffix_lengths: Lengths::of(suffixes.iter().map(AsRef::as_ref)),
            contained: contained.into(),
        }
    }

    fn lower(&self) -> Self {
        let all = |set: &Strings| set.iter().map(<[u8]>::to_ascii_lowercase).collect::<Vec<_>>();
        let contained = self
            .contained
            .iter()
            .map(|f| memchr::memmem::Finder::new(&f.needle().to_ascii_lowercase()).into_owned())
            .collect();
        Self::from_parts(&all(&self.exact), &all(&self.prefixes), &all(&self.suffixes), contained)
    }

    fn is_empty(&self) -> bool {
        self.exact.is_empty()
            && self.prefixes.is_empty()
            && self.suffixes.is_empty()
            && self.contained.is_empty()
    }

    fn matches(&self, origin: &[u8]) -> bool {
        let n = origin.len();
        self.exact.contains(origin)
            || (!self.prefixes.is_empty()
                && (1..=n).any(|l| self.prefix_lengths.has(l) && self.prefixes.contains(&origin[..l])))
            || (!self.suffixes.is_empty()
                && (1..=n).any(|l| self.suffix_lengths.has(l) && self.suffixes.contains(&origin[n - l..])))
            || self.contained.iter().any(|needle| needle.find(origin).is_some())
    }
}
