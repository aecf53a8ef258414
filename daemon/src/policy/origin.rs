//! Origin patterns: how they are written, and which request origins they match, for every dialect.

use super::host::{ends_in_number, parse_port};
use super::regex::Regexes;
use super::strings::{Index, Lengths, Strings, hash};
use std::{
    net::{Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

/// Longer origins are not judged. A serialised origin has at most 64 + 3 + 253 + 6 bytes.
pub(super) const MAX_ORIGIN: usize = 384;

/// Longest scheme of a pattern, as browsers' libraries bound it.
const MAX_SCHEME: usize = 64;
/// Longest host (RFC 1035), and longest one behind `*.`.
const MAX_HOST: usize = 253;
const MAX_WILDCARD_TAIL: usize = 251;

/// The origins that a policy allows.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Origins {
    /// All of them.
    All,
    /// By scheme, host and port.
    Web(Web),
    /// ingress-nginx: without regard to case, `*.` is one label.
    OneLabel(Arc<OneLabel>),
    /// Envoy's string matchers.
    Matchers(Arc<Matchers>),
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

/// Origins as whole strings and ends of hosts, as far as they can be said so.
#[derive(Debug, Default)]
pub(super) struct Plain {
    pub(super) all: bool,
    /// Byte-equal.
    pub(super) exact: Vec<Vec<u8>>,
    /// Hosts that end so (from a dot on; nothing: all), with `https` or not, without a port.
    pub(super) below: Vec<(bool, Vec<u8>)>,
    /// With exactly one label before them, of letters, digits and hyphens.
    pub(super) one_label: bool,
    /// An origin in lower case, with `http` or `https` and without a port, that is none of these may be allowed too.
    pub(super) more: bool,
}

impl Origins {
    /// What can be decided by look-ups alone.
    pub(super) fn plain(&self) -> Plain {
        let mut plain = Plain::default();
        match self {
            Origins::All => plain.all = true,
            Origins::Web(web) => web.tell(&mut plain),
            Origins::OneLabel(list) => {
                plain.one_label = true;
                plain.exact = list.exact.iter().map(<[u8]>::to_vec).collect();
                plain.below = list.wild.iter().filter_map(split_scheme).collect();
            }
            Origins::Matchers(matchers) => {
                let Literals { exact, prefixes, suffixes, contained, .. } = &matchers.exact_case;
                plain.exact = exact.iter().map(<[u8]>::to_vec).collect();
                plain.more = matchers.any_case.is_some()
                    || !(prefixes.is_empty() && suffixes.is_empty() && contained.is_empty())
                    || !matchers.regexes.is_empty();
            }
        }
        plain
    }
}

/// `https://.example.com` as whether it is https, and what the host ends with. `None`: another scheme, or a port.
fn split_scheme(joined: &[u8]) -> Option<(bool, Vec<u8>)> {
    let (https, rest) = match joined.strip_prefix(b"https://") {
        Some(rest) => (true, rest),
        None => (false, joined.strip_prefix(b"http://")?),
    };
    (!rest.contains(&b':')).then(|| (https, rest.to_vec()))
}

/// Whether an `Origin` value may be judged, and echoed: visible ASCII, not too long.
#[inline]
pub(super) fn is_plain(origin: &[u8]) -> bool {
    // No early exit: whole chunks vectorise, and a good origin is the common case.
    let strange = |bytes: &[u8]| bytes.iter().fold(0, |strange, b| strange | u8::from(!b.is_ascii_graphic()));
    let strange = match origin.last_chunk::<16>() {
        // The last chunk overlaps the one before it.
        Some(last) => {
            origin.as_chunks::<16>().0.iter().fold(strange(last), |all, chunk| all | strange(chunk))
        }
        None => strange(origin),
    };
    strange == 0 && !origin.is_empty() && origin.len() <= MAX_ORIGIN
}

/// A pattern's port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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
        let end = memchr::memchr(b':', rest).unwrap_or(rest.len());
        if !is_host(&rest[..end]) {
            return None;
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

/// Labels of lower-case letters, digits, `-` and `_`, none of them empty but maybe the last.
fn is_host(host: &[u8]) -> bool {
    let mut label = 0;
    for (i, &b) in host.iter().enumerate() {
        match b {
            b'.' if i == label => return false,
            b'.' => label = i + 1,
            _ if is_label_byte(b) => {}
            _ => return false,
        }
    }
    !host.is_empty()
}

fn is_label_byte(b: u8) -> bool {
    matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_')
}

/// Origins by scheme, host and port (native and gateway-api).
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Web {
    /// Byte-equal to the serialised origin.
    exact: Strings,
    /// Patterns that are more than one origin.
    tails: Option<Arc<Tails>>,
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
                    exact.push(format!("{}://{}", pattern.scheme, pattern.host));
                }
                (HostMatch::Exact, Port::Number(n)) => {
                    exact.push(format!("{}://{}:{n}", pattern.scheme, pattern.host));
                }
                (matching, port) => tails.push(Tail {
                    scheme: pattern.scheme.as_bytes().into(),
                    end: match matching {
                        HostMatch::Exact => pattern.host.as_bytes().into(),
                        HostMatch::Below => format!(".{}", pattern.host).into_bytes().into(),
                        HostMatch::Every => Box::default(),
                    },
                    port,
                }),
            }
        }
        let tails = (!tails.is_empty()).then(|| Arc::new(Tails::new(tails)));
        Self { exact: Strings::new(exact), tails, default_port_is_none }
    }

    fn tell(&self, plain: &mut Plain) {
        // What a request's origin is never compared with, its default port being stripped, is left out.
        let said = |text: &&[u8]| !self.default_port_is_none || strip_default_port(text) == *text;
        plain.exact = self.exact.iter().filter(said).map(<[u8]>::to_vec).collect();
        for tail in self.tails.iter().flat_map(|tails| &tails.list) {
            let https = match &*tail.scheme {
                b"https" => true,
                b"http" => false,
                _ => continue,
            };
            match (tail.end.first(), tail.port) {
                // Only origins with a port.
                (_, Port::Number(_)) => {}
                (None | Some(b'.'), _) => plain.below.push((https, tail.end.to_vec())),
                (Some(_), _) => plain.exact.push([&*tail.scheme, b"://", &*tail.end].concat()),
            }
        }
    }

    fn allow(&self, origin: &[u8]) -> bool {
        let origin = if self.default_port_is_none { strip_default_port(origin) } else { origin };
        self.exact.contains(origin)
            || self
                .tails
                .as_ref()
                .is_some_and(|tails| parse_serialised(origin).is_some_and(|o| tails.allow(&o)))
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

/// `end` is what the host ends with: `.example.com`, or nothing; or the whole host.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Tail {
    scheme: Box<[u8]>,
    end: Box<[u8]>,
    port: Port,
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct Tails {
    list: Box<[Tail]>,
    lengths: Lengths,
    /// By tail; empty where there are few.
    index: Index,
}

impl Tails {
    /// Up to this many are compared one by one.
    const LINEAR: usize = 4;

    fn new(list: Vec<Tail>) -> Self {
        let lengths = Lengths::of(list.iter().map(|t| &*t.end));
        let index = if list.len() > Self::LINEAR {
            let hashed: Vec<(u64, u32)> =
                list.iter().enumerate().map(|(i, tail)| (hash(0, &tail.end), i as u32)).collect();
            Index::new(&hashed)
        } else {
            Index::default()
        };
        Self { list: list.into(), lengths, index }
    }

    fn allow(&self, origin: &Serialised<'_>) -> bool {
        if self.list.len() <= Self::LINEAR {
            return self.list.iter().any(|t| t.covers(origin, t.matched_part(origin.host)));
        }
        let look = |part: &[u8]| {
            self.lengths.has(part.len())
                && self
                    .index
                    .find(hash(0, part), |i| self.list[i as usize].covers(origin, Some(part)))
                    .is_some()
        };
        look(origin.host)
            || memchr::memchr_iter(b'.', origin.host).any(|dot| dot > 0 && look(&origin.host[dot..]))
            || look(b"")
    }
}

impl Tail {
    /// The part of `host` that must equal the tail.
    fn matched_part<'h>(&self, host: &'h [u8]) -> Option<&'h [u8]> {
        match self.end.first() {
            None => Some(b""),
            Some(b'.') => (host.len() > self.end.len()).then(|| &host[host.len() - self.end.len()..]),
            Some(_) => Some(host),
        }
    }

    fn covers(&self, origin: &Serialised<'_>, part: Option<&[u8]>) -> bool {
        part == Some(&*self.end)
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
#[derive(Debug, Default, PartialEq, Eq, Hash)]
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
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct Matchers {
    exact_case: Literals,
    any_case: Option<Literals>,
    regexes: Regexes,
}

impl Matchers {
    /// `matchers` with their `ignore_case`. Regexes that cannot be modelled are named by their position, with the
    /// reason, and match nothing.
    pub(super) fn new(matchers: &[(Matcher<'_>, bool)]) -> (Self, Vec<(usize, String)>) {
        let (at, patterns): (Vec<usize>, Vec<&str>) = matchers
            .iter()
            .enumerate()
            .filter_map(|(i, (m, _))| if let Matcher::Regex(r) = m { Some((i, *r)) } else { None })
            .unzip();
        let (regexes, refused) = Regexes::new(&patterns);
        let any_case = Literals::new(matchers.iter().filter(|(_, ignore)| *ignore).map(|(m, _)| *m));
        let compiled = Self {
            exact_case: Literals::new(matchers.iter().filter(|(_, ignore)| !ignore).map(|(m, _)| *m)),
            any_case: (!any_case.is_empty()).then_some(any_case.lower()),
            regexes,
        };
        (compiled, refused.into_iter().map(|(i, reason)| (at[i], reason)).collect())
    }

    /// Whether any of them matches.
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

#[derive(Debug, Default, PartialEq, Eq, Hash)]
struct Literals {
    exact: Strings,
    prefixes: Strings,
    prefix_lengths: Lengths,
    suffixes: Strings,
    suffix_lengths: Lengths,
    contained: Box<[Box<[u8]>]>,
}

impl Literals {
    fn new<'a>(matchers: impl Iterator<Item = Matcher<'a>>) -> Self {
        let (mut exact, mut prefixes, mut suffixes, mut contained) = (vec![], vec![], vec![], vec![]);
        for matcher in matchers {
            match matcher {
                Matcher::Exact(s) => exact.push(s),
                Matcher::Prefix(s) => prefixes.push(s),
                Matcher::Suffix(s) => suffixes.push(s),
                Matcher::Contains(s) => contained.push(s.as_bytes().into()),
                Matcher::Regex(_) => {}
            }
        }
        Self::from_parts(&exact, &prefixes, &suffixes, contained)
    }

    fn from_parts<T: AsRef<[u8]>>(
        exact: &[T],
        prefixes: &[T],
        suffixes: &[T],
        contained: Vec<Box<[u8]>>,
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
        let contained = self.contained.iter().map(|needle| needle.to_ascii_lowercase().into()).collect();
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
            || self.contained.iter().any(|needle| memchr::memmem::find(origin, needle).is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn native(pattern: &str) -> Origins {
        let pattern = parse_pattern(pattern).unwrap_or_else(|e| panic!("{pattern}: {e:?}"));
        Origins::Web(Web::new(&[pattern], &[], false))
    }

    #[test]
    fn native_matches() {
        for (pattern, origin, expected) in [
            ("https://example.com", "https://example.com", true),
            ("https://example.com", "https://example.com:443", false),
            ("https://example.com", "https://example.com/", false),
            ("https://example.com", "HTTPS://example.com", false),
            ("https://example.com", "https://Example.com", false),
            ("https://example.com", "https://example.com.", false),
            ("https://example.com", "http://example.com", false),
            ("https://example.com", "https://example.com:8443", false),
            ("https://example.com:8443", "https://example.com:8443", true),
            ("https://*.example.com", "https://a.example.com", true),
            ("https://*.example.com", "https://a.b.example.com", true),
            ("https://*.example.com", "https://example.com", false),
            ("https://*.example.com", "https://.example.com", false),
            ("https://*.example.com", "https://a..example.com", false),
            ("https://*.example.com", "https://aexample.com", false),
            ("https://*.example.com", "https://a.example.com.evil", false),
            ("https://*.example.com", "https://evil.com/.example.com", false),
            ("https://*.example.com", "https://evil.com?.example.com", false),
            ("https://*.example.com", "https://evil@a.example.com", false),
            ("https://*.example.com", "https://a.example.com:8443", false),
            ("https://*.example.com", "https://A.example.com", false),
            ("https://*.example.com:8443", "https://a.example.com:8443", true),
            ("https://*.example.com:8443", "https://a.example.com", false),
            ("https://*.example.com:*", "https://a.example.com", true),
            ("https://*.example.com:*", "https://a.example.com:1", true),
            ("https://*.example.com:*", "https://a.example.com:443", false),
            ("https://*.example.com:*", "https://a.example.com:0", false),
            ("https://*.example.com:*", "https://a.example.com:", false),
            ("https://*.example.com:*", "https://a.example.com:08443", false),
            ("https://*.example.com:*", "https://a.example.com:65536", false),
            ("http://localhost:*", "http://localhost:3000", true),
            ("http://localhost:*", "http://localhost", true),
            ("http://localhost:*", "http://a.localhost:3000", false),
            ("http://[::1]:*", "http://[::1]:3000", true),
            ("http://[::1]:*", "http://[::2]:3000", false),
            ("http://[::1]:*", "http://[::1:3000", false),
            ("https://*.example.com", "null", false),
        ] {
            assert_eq!(native(pattern).allow(origin.as_bytes()), expected, "{pattern} on {origin}");
            // The same beside many others, where patterns are found by hash.
            let others: Vec<String> = (0..20).map(|i| format!("https://*.other{i}.example:*")).collect();
            let mut patterns: Vec<Pattern<'_>> =
                others.iter().filter_map(|o| parse_pattern(o).ok()).collect();
            patterns.push(parse_pattern(pattern).expect("parsed above"));
            let many = Origins::Web(Web::new(&patterns, &[], false));
            assert_eq!(many.allow(origin.as_bytes()), expected, "{pattern} among many on {origin}");
        }
    }

    #[test]
    fn plain_is_visible_ascii_and_short() {
        for (origin, expected) in [
            (b"https://a".to_vec(), true),
            (vec![b'a'; MAX_ORIGIN], true),
            (vec![b'a'; MAX_ORIGIN + 1], false),
            (b"".to_vec(), false),
            (b"https://a b".to_vec(), false),
            (b"https://a\x7f".to_vec(), false),
            (b"https://\xc3\xa9".to_vec(), false),
            (b"0123456789abcdef\n".to_vec(), false),
            (b"\n0123456789abcdef".to_vec(), false),
            (b"0123456789abcdef0123456789abcde\t".to_vec(), false),
        ] {
            assert_eq!(is_plain(&origin), expected, "{}", origin.escape_ascii());
        }
    }

    #[test]
    fn what_protects_nobody() {
        for (pattern, loopback, suffix) in [
            ("http://localhost:*", true, false),
            ("http://127.0.0.1", true, false),
            ("http://127.127.127.127:90", true, false),
            ("http://[::1]:90", true, false),
            ("http://*.localhost", true, false),
            ("http://169.254.169.254", false, false),
            ("http://example.com", false, false),
            ("https://*.com", false, true),
            ("https://*.co.uk", false, true),
            ("https://*.github.io", false, true),
            ("https://*.com.", false, true),
            ("https://*.example.com", false, false),
            ("https://com", false, false),
        ] {
            let pattern = parse_pattern(pattern).expect(pattern);
            assert_eq!(
                (pattern.is_loopback(), pattern.is_over_public_suffix()),
                (loopback, suffix),
                "{pattern:?}"
            );
        }
    }

    #[test]
    fn envoy_matchers() {
        use Matcher::{Contains, Exact, Prefix, Regex, Suffix};
        for (matcher, ignore_case, yes, no) in [
            (Exact("https://a"), false, &["https://a"][..], &["https://A", "https://a:1", "xhttps://a"][..]),
            (Exact("https://A"), true, &["https://a", "HTTPS://A"], &["https://b"]),
            (Prefix("https://a"), false, &["https://a", "https://a.evil"], &["http://a", "https://A"]),
            (Prefix("HTTPS://a"), true, &["https://A.x"], &["http://a"]),
            (Suffix(".a.example"), false, &["https://x.a.example", ".a.example"], &["https://a.example"]),
            (Suffix(".A.example"), true, &["https://x.a.EXAMPLE"], &["https://x.a.example:1"]),
            (Contains("a.ex"), false, &["https://a.example"], &["https://A.example"]),
            (Contains("A.ex"), true, &["https://a.EXample"], &["https://b.example"]),
            (Regex("https://[a-c]"), false, &["https://a"], &["https://d", "https://aa", "HTTPS://a"]),
        ] {
            let (matchers, refused) = Matchers::new(&[(matcher, ignore_case)]);
            assert_eq!(refused, []);
            for origin in yes {
                assert!(matchers.allow(origin.as_bytes()), "{matcher:?} {ignore_case} on {origin}");
            }
            for origin in no {
                assert!(!matchers.allow(origin.as_bytes()), "{matcher:?} {ignore_case} on {origin}");
            }
        }
        let (matchers, refused) =
            Matchers::new(&[(Exact("a"), false), (Regex("("), false), (Regex("b"), false)]);
        assert_eq!(refused.iter().map(|(i, _)| *i).collect::<Vec<_>>(), [1]);
        assert!(matchers.allow(b"a") && matchers.allow(b"b") && !matchers.allow(b"c"));
    }

    /// Scheme, labels and port of an origin or pattern, by nothing but splits.
    fn parts(text: &str) -> Option<(&str, Vec<&str>, Option<&str>)> {
        let (scheme, rest) = text.split_once("://")?;
        let (host, port) = rest.split_once(':').map_or((rest, None), |(h, p)| (h, Some(p)));
        Some((scheme, host.split('.').collect(), port))
    }

    /// One pattern on one origin, label by label.
    fn reference(pattern: &str, origin: &str, default_port_is_none: bool) -> bool {
        let Some((scheme, want, want_port)) = parts(pattern) else { return false };
        let Some((origin_scheme, labels, port)) = parts(origin) else { return false };
        let default = if scheme == "https" { "443" } else { "80" };
        let number = |p: &str| p.parse::<u16>().is_ok_and(|n| n > 0 && n.to_string() == p);
        if !port.is_none_or(number) {
            return false;
        }
        let (want_port, port) = if default_port_is_none {
            (want_port.filter(|p| *p != default), port.filter(|p| *p != default))
        } else if port == Some(default) {
            return false;
        } else {
            (want_port, port)
        };
        let port_fits = want_port == Some("*") || want_port == port;
        let good_label =
            |l: &&str| !l.is_empty() && l.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        let host_fits = if want == ["*"] {
            // A browser keeps a dot at the end of a host.
            let named = labels
                .split_last()
                .map_or(&labels[..], |(l, rest)| if l.is_empty() { rest } else { &labels });
            !named.is_empty() && named.iter().all(good_label)
        } else if want[0] == "*" {
            labels.len() >= want.len() && labels.ends_with(&want[1..]) && labels.iter().all(good_label)
        } else {
            labels == want
        };
        scheme == origin_scheme && port_fits && host_fits
    }

    /// Few letters, so that patterns and origins often meet, and what attackers put around them.
    const ORIGIN: &str =
        "(https|http|https|HTTPS)://[ab.A]?([ab]\\.){0,3}[ab]{1,2}[.]?(:(443|80|81|0|081|))?[/]?";

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn native_is_as_the_reference(
            patterns in prop::collection::vec("(https?)://(\\*\\.)?([ab]\\.){0,2}[ab]{1,2}(:(81|82|\\*))?", 1..12),
            origin in ORIGIN,
        ) {
            let parsed: Vec<Pattern<'_>> = patterns.iter().map(|p| parse_pattern(p).expect(p)).collect();
            let expected = patterns.iter().any(|p| reference(p, &origin, false));
            prop_assert_eq!(Web::new(&parsed, &[], false).allow(origin.as_bytes()), expected);
        }

        #[test]
        fn gateway_api_is_as_the_reference(
            patterns in prop::collection::vec("(https?)://(\\*|(\\*\\.)?([ab]\\.){0,2}[ab]{1,2})(:(80|81|443))?", 1..12),
            origin in ORIGIN,
        ) {
            let parsed: Vec<Pattern<'_>> = patterns
                .iter()
                .map(|p| {
                    let (scheme, host) = p.split_once("://").expect("generated");
                    let (host, port) = host.split_once(':').map_or((host, None), |(h, p)| (h, Some(p)));
                    let (matching, host) = match host.strip_prefix("*.") {
                        Some(tail) => (HostMatch::Below, tail),
                        None if host == "*" => (HostMatch::Every, ""),
                        None => (HostMatch::Exact, host),
                    };
                    let port = port.map_or(Port::Default, |p| Port::Number(p.parse().expect("generated")));
                    Pattern { scheme, matching, host, port }
                })
                .collect();
            let expected = patterns.iter().any(|p| reference(p, &origin, true));
            prop_assert_eq!(Web::new(&parsed, &[], true).allow(origin.as_bytes()), expected);
        }

        #[test]
        fn ingress_nginx_is_as_the_reference(
            entries in prop::collection::vec("(null|(https?|app)://(\\*\\.)?([ab]\\.){0,2}[abA]{1,2}(:(80|81))?)", 1..8),
            origin in "(null|NULL|(https|http|app|HTTPS)://[ab.-_]{0,2}\\.?([ab]\\.){0,2}[abA]{1,2}(:(80|81))?[/]?)",
        ) {
            let lower = origin.to_lowercase();
            let expected = entries.iter().map(|e| e.to_lowercase()).any(|entry| match entry.split_once('*') {
                None => entry == lower,
                Some((before, after)) => lower
                    .strip_prefix(before)
                    .and_then(|rest| rest.strip_suffix(after))
                    .is_some_and(|l| !l.is_empty() && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')),
            });
            let refs: Vec<&str> = entries.iter().map(String::as_str).collect();
            prop_assert_eq!(OneLabel::new(&refs).allow(origin.as_bytes()), expected);
        }

        #[test]
        fn envoy_is_as_the_reference(
            matchers in prop::collection::vec((0..4_usize, "[abA]{1,4}", any::<bool>()), 1..14),
            origin in "[abAB]{0,6}",
        ) {
            let list: Vec<(Matcher<'_>, bool)> = matchers
                .iter()
                .map(|(kind, text, ignore)| {
                    let make = [Matcher::Exact, Matcher::Prefix, Matcher::Suffix, Matcher::Contains][*kind];
                    (make(text), *ignore)
                })
                .collect();
            let expected = matchers.iter().any(|(kind, text, ignore)| {
                let fold = |s: &str| if *ignore { s.to_lowercase() } else { s.to_owned() };
                let (text, origin) = (fold(text), fold(&origin));
                match kind {
                    0 => origin == text,
                    1 => origin.starts_with(&text),
                    2 => origin.ends_with(&text),
                    _ => origin.contains(&text),
                }
            });
            prop_assert_eq!(Matchers::new(&list).0.allow(origin.as_bytes()), expected);
        }

        #[test]
        fn nothing_panics(pattern in "\\PC{0,40}", origin in prop::collection::vec(any::<u8>(), 0..400)) {
            if let Ok(pattern) = parse_pattern(&pattern) {
                Web::new(&[pattern], &[], true).allow(&origin);
            }
            OneLabel::new(&[&pattern]).allow(&origin);
            let _ = parse_serialised(&origin);
            is_plain(&origin);
        }
    }
}
