//! The `Host` value: lower-cased, its port checked, everything that proxies may read differently refused.

use super::spec::ListenerSpec;
use std::net::{Ipv4Addr, Ipv6Addr};

/// Longest host (RFC 1035).
const MAX: usize = 253;

/// Room for a host that has to be lower-cased; browsers send it so.
pub(super) type Buffer = Option<[u8; MAX]>;

/// A well-formed host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Host<'a> {
    /// Lower-case, without port; IPv6 with its brackets.
    pub(super) name: &'a [u8],
    /// The IP address, if it is a literal.
    pub(super) literal: Option<Literal>,
}

/// An IP literal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Literal {
    /// In 127.0.0.0/8, or `[::1]`.
    pub(super) loopback: bool,
}

/// What the table keeps of a listener.
#[derive(Debug)]
pub(super) struct Own {
    literals: Vec<Box<[u8]>>,
    loopback: bool,
    ports: Vec<u16>,
}

impl Own {
    pub(super) fn new(spec: &ListenerSpec) -> Self {
        let mut ports = spec.public_ports.clone();
        ports.sort_unstable();
        Self {
            literals: spec.own_literals.iter().map(|l| l.to_ascii_lowercase().into_bytes().into()).collect(),
            loopback: spec.loopback_is_own,
            ports,
        }
    }

    /// Reads a `Host` value; `None` if it is not a host and port that this listener serves. `buffer` is overwritten.
    pub(super) fn parse<'b>(&self, value: &'b [u8], buffer: &'b mut Buffer) -> Option<Host<'b>> {
        let len = name_len(value)?;
        let (name, rest) = value.split_at(len);
        match rest.split_first() {
            None => {}
            Some((b':', digits)) => {
                let port = parse_port(digits)?;
                if !self.ports.is_empty() && self.ports.binary_search(&port).is_err() {
                    return None;
                }
            }
            Some(_) => return None,
        }
        parse_name(name, buffer)
    }

    /// Addresses by which a client may rightly call this listener, but for those of loopback.
    pub(super) fn literals(&self) -> impl Iterator<Item = &[u8]> {
        self.literals.iter().map(|literal| &**literal)
    }

    /// Ports that may stand in `Host`, ascending; none: any.
    pub(super) fn ports(&self) -> &[u16] {
        &self.ports
    }

    /// Whether a client may rightly call this listener by this literal.
    pub(super) fn has(&self, name: &[u8], literal: Literal) -> bool {
        (self.loopback && literal.loopback) || self.literals.iter().any(|l| **l == *name)
    }
}

/// Where the name of `host`, `host:port`, `[v6]` or `[v6]:port` ends.
fn name_len(value: &[u8]) -> Option<usize> {
    match value {
        [b'[', ..] => Some(value.iter().position(|&b| b == b']')? + 1),
        // Most have no port: one look tells whether the last bytes can be one.
        [.., last] if !last.is_ascii_digit() && *last != b':' => Some(value.len()),
        _ => Some(memchr::memchr(b':', value).unwrap_or(value.len())),
    }
}

/// 1 to 65535 without leading zeros.
pub(super) fn parse_port(digits: &[u8]) -> Option<u16> {
    if digits.is_empty() || digits.len() > 5 || digits[0] == b'0' {
        return None;
    }
    let mut port = 0_u32;
    for &digit in digits {
        if !digit.is_ascii_digit() {
            return None;
        }
        port = port * 10 + u32::from(digit - b'0');
    }
    u16::try_from(port).ok()
}

/// Lower-cases a host without port; `None` if it is no plain host.
pub(super) fn parse_name<'b>(name: &'b [u8], buffer: &'b mut Buffer) -> Option<Host<'b>> {
    if name.is_empty() || name.len() > MAX {
        return None;
    }
    if name[0] == b'[' {
        let lower = &mut buffer.insert([0; MAX])[..name.len()];
        lower.copy_from_slice(name);
        lower.make_ascii_lowercase();
        let lower: &'b [u8] = lower;
        let text = std::str::from_utf8(&lower[1..lower.len() - 1]).ok()?;
        let address: Ipv6Addr = text.parse().ok()?;
        return Some(Host { name: lower, literal: Some(Literal { loopback: address.is_loopback() }) });
    }
    let (mut seen, mut before) = (0, DOT);
    for &b in name {
        let class = CLASS[usize::from(b)];
        // An empty label is two dots in a row, or one at the beginning.
        seen |= class | (class & before & DOT) << 1;
        before = class;
    }
    if seen & (STRANGE | DOTS) != 0 || before == DOT {
        return None;
    }
    let lower: &'b [u8] = if seen & UPPER == 0 {
        name
    } else {
        let lower = &mut buffer.insert([0; MAX])[..name.len()];
        lower.copy_from_slice(name);
        lower.make_ascii_lowercase();
        lower
    };
    let label = lower.iter().rposition(|&b| b == b'.').map_or(0, |dot| dot + 1);
    if !ends_in_number(&lower[label..]) {
        return Some(Host { name: lower, literal: None });
    }
    // URL parsers read such a host as an IPv4 address (WHATWG URL §3.5); only the plain form is unambiguous.
    let address: Ipv4Addr = std::str::from_utf8(lower).ok()?.parse().ok()?;
    Some(Host { name: lower, literal: Some(Literal { loopback: address.is_loopback() }) })
}

const UPPER: u8 = 1;
const DOT: u8 = 2;
const DOTS: u8 = DOT << 1;
const STRANGE: u8 = 8;
/// What the bytes of a host are; 0 for lower-case letters, digits, `-` and `_`.
const CLASS: [u8; 256] = {
    let mut table = [STRANGE; 256];
    let mut b = 0;
    while b < 128 {
        match b as u8 {
            b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' => table[b] = 0,
            b'A'..=b'Z' => table[b] = UPPER,
            b'.' => table[b] = DOT,
            _ => {}
        }
        b += 1;
    }
    table
};

/// Whether URL parsers take a host with this last label for an IPv4 address: decimal digits, or hexadecimal after `0x`.
pub(super) fn ends_in_number(label: &[u8]) -> bool {
    if !label.first().is_some_and(u8::is_ascii_digit) {
        return false;
    }
    match label.strip_prefix(b"0x") {
        Some(hex) => hex.iter().all(u8::is_ascii_hexdigit),
        None => label.iter().all(u8::is_ascii_digit),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::ListenerId;

    fn own(ports: &[u16]) -> Own {
        Own::new(&ListenerSpec {
            id: ListenerId(0),
            name: "l".into(),
            own_literals: vec!["192.0.2.1".into(), "[2001:db8::1]".into()],
            loopback_is_own: true,
            public_ports: ports.to_vec(),
        })
    }

    #[test]
    fn hosts() {
        for (value, expected) in [
            ("example.com", Some("example.com")),
            ("EXAMPLE.com:8080", Some("example.com")),
            ("a_b-c.example", Some("a_b-c.example")),
            ("localhost", Some("localhost")),
            ("192.0.2.1:80", Some("192.0.2.1")),
            ("[2001:DB8::1]:80", Some("[2001:db8::1]")),
            ("1a.example", Some("1a.example")),
            ("example.0xg", Some("example.0xg")),
            ("", None),
            (":80", None),
            ("example.com.", None),
            (".example.com", None),
            ("a..b", None),
            ("user@example.com", None),
            ("example.com:", None),
            ("example.com:0", None),
            ("example.com:080", None),
            ("example.com:65536", None),
            ("example.com:99999", None),
            ("example.com:8080x", None),
            ("example.com:+80", None),
            ("example.com:80:80", None),
            ("exa mple.com", None),
            ("ex%61mple.com", None),
            ("exämple.com", None),
            ("127.1", None),
            ("0x7f.1", None),
            ("example.0x7f", None),
            ("010.0.0.1", None),
            ("1.2.3.4.5", None),
            ("[::1", None),
            ("[::1]x", None),
            ("[::1%eth0]", None),
            ("::1", None),
            ("[]", None),
            ("[", None),
        ] {
            let mut buffer = None;
            let host = own(&[]).parse(value.as_bytes(), &mut buffer);
            assert_eq!(host.map(|h| h.name), expected.map(str::as_bytes), "{value}");
        }
        let mut buffer = None;
        assert!(own(&[]).parse(&[b'a'; 253], &mut buffer).is_some());
        assert!(own(&[]).parse(&[b'a'; 254], &mut buffer).is_none());
    }

    #[test]
    fn public_ports_and_own_literals() {
        let own = own(&[443, 80]);
        let mut buffer = None;
        assert!(own.parse(b"example.com", &mut buffer).is_some());
        assert!(own.parse(b"example.com:443", &mut buffer).is_some());
        assert!(own.parse(b"example.com:8443", &mut buffer).is_none());
        for (value, expected) in [
            ("192.0.2.1", true),
            ("127.8.9.1", true),
            ("[::1]", true),
            ("[2001:db8::1]", true),
            ("192.0.2.2", false),
            ("[::2]", false),
        ] {
            let host = own.parse(value.as_bytes(), &mut buffer).expect(value);
            assert_eq!(own.has(host.name, host.literal.expect(value)), expected, "{value}");
        }
    }
}
