//! What a connection opens with: is it a preflight that a policy may answer?
//!
//! This is a filter, not a judge: it may send a worker what the worker turns away, and the proxy what a worker could
//! have answered. It never answers anything.

use crate::{
    abi::kind,
    words::{Buffer, LOOKED_AT, LOWER, byte, equal, front, lowest, word},
};

/// The only way a preflight can begin (RFC 9112 §3: method, one SP). Methods are case-sensitive.
pub const METHOD: &[u8; 8] = b"OPTIONS ";

/// So many steps always suffice for a head that is worth it: the words of [`LOOKED_AT`], and a step for each line.
pub const MAX_STEPS: u32 = (LOOKED_AT / 8) as u32 + 128;

/// The column of `PORT_COUNTS` for a connection that opens with these eight bytes (of which `len` count), before the
/// head of an OPTIONS is looked at.
#[inline(always)]
pub fn opening(first: u64, len: u32) -> u32 {
    // The record header of a ClientHello (RFC 8446 §5.1): handshake, version 3.x.
    if len >= 2 && first & 0xffff == 0x0316 {
        kind::Tls
    } else if len >= 8 && first == u64::from_le_bytes(*METHOD) {
        kind::Options
    } else if len >= 8 && first == u64::from_le_bytes(*b"PRI * HT") {
        kind::H2c // RFC 9113 §3.4
    } else if len >= 8
        && (first == u64::from_le_bytes(*b"\r\n\r\n\0\r\nQ")
            || first << 16 == u64::from_le_bytes(*b"\0\0PROXY "))
    {
        kind::ProxyProtocol // the two versions' signatures
    } else {
        kind::Other
    }
}

/// What the lines of a head said.
pub mod seen {
    /// `Host`.
    pub const HOST: u32 = 1;
    /// `Origin`.
    pub const ORIGIN: u32 = 2;
    /// `Access-Control-Request-Method`.
    pub const METHOD: u32 = 4;
    /// A header that no browser sends on a preflight (Cookie, Authorization), or that announces something else than one
    /// (a body, an upgrade, an expectation).
    pub const FOREIGN: u32 = 8;
    /// The empty line at the end.
    pub const END: u32 = 16;
}

/// Looks through a head, a step for each eight bytes and for each line: loops are the caller's, as eBPF has its own.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Scan {
    /// Hash of the request line, feed included.
    pub line: u64,
    /// Line feeds of the present word that were not looked at yet: the high bits of their bytes.
    feeds: u64,
    /// Where the next word begins.
    at: u32,
    /// How many bytes of the buffer count, at most [`LOOKED_AT`].
    pub len: u32,
    /// Of [`seen`].
    pub seen: u32,
    /// Where the value of `Host` begins; 0: not seen.
    pub host: u32,
    /// Where its line ends.
    pub host_end: u32,
    /// Where the head ends.
    pub end: u32,
    /// 1: the request line is complete.
    lines: u32,
    /// Keeps the size a multiple of eight.
    zero: u32,
}

const LINE_MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;

impl Scan {
    /// Over the first `len` bytes.
    #[inline(always)]
    pub fn new(len: u32) -> Self {
        Self { len, ..Self::default() }
    }

    /// Takes the next word, or the next line of the present one; false: nothing further matters.
    #[inline(always)]
    pub fn step(&mut self, bytes: &Buffer) -> bool {
        if self.feeds == 0 {
            let at = self.at;
            if at >= self.len || at >= LOOKED_AT as u32 {
                return false;
            }
            self.at = at + 8;
            let word = word(bytes, at);
            self.feeds = equal(word, b'\n');
            if self.lines == 0 {
                let mask = if self.feeds == 0 { u64::MAX } else { up_to(self.feeds) };
                self.line = mix(self.line, word & mask);
            }
            return true;
        }
        let feed = self.at - 8 + lowest(self.feeds);
        self.feeds &= self.feeds - 1;
        if feed >= self.len {
            return false;
        }
        self.line_begins(bytes, feed);
        self.seen & (seen::END | seen::FOREIGN) == 0
    }

    /// A line begins behind `feed`.
    #[inline(always)]
    fn line_begins(&mut self, bytes: &Buffer, feed: u32) {
        self.lines = 1;
        if self.host != 0 && self.host_end == 0 {
            self.host_end = feed;
        }
        let at = feed + 1;
        let left = self.len - at;
        if left >= 2 && byte(bytes, at) == b'\r' && byte(bytes, at + 1) == b'\n' {
            self.seen |= seen::END;
            self.end = at + 2;
            return;
        }
        // Lower case; a few other bytes become letters too, which is the worker's to judge.
        let name = word(bytes, at) | LOWER;
        if left >= 5 && name << 24 == front(b"\0\0\0host:") {
            // A second one is for the worker to see.
            self.host = at + 5;
            self.host_end = 0;
            self.seen |= seen::HOST;
        } else if left >= 7 && name << 8 == front(b"\0origin:") {
            self.seen |= seen::ORIGIN;
        } else if left >= 30 && name == front(b"access-c") {
            let rest = word(bytes, at + 8) | LOWER;
            let third = word(bytes, at + 16) | LOWER;
            if rest == front(b"ontrol-r") && third == front(b"equest-m") {
                self.seen |= seen::METHOD;
            }
        } else if (left >= 7 && (name << 8 == front(b"\0cookie:") || name << 8 == front(b"\0expect:")))
            || (left >= 8
                && (name == front(b"authoriz") || name == front(b"transfer") || name == front(b"upgrade:")))
            || (left >= 9 && name == front(b"content-") && byte(bytes, at + 8) | 0x20 == b'l')
        {
            self.seen |= seen::FOREIGN;
        }
    }

    /// Whether a worker may answer, its host being known: all that a preflight must have is there, nothing foreign, and
    /// nothing behind its head (`segment`: bytes of the segment). A head may go on in the next segment.
    #[inline(always)]
    pub fn may_be_answered(&self, segment: u32) -> bool {
        const ALL: u32 = seen::HOST | seen::ORIGIN | seen::METHOD;
        if self.seen & (ALL | seen::FOREIGN) != ALL || self.host_end == 0 {
            return false;
        }
        self.seen & seen::END == 0 || self.end == segment
    }
}

/// Mask of a word's bytes up to the lowest bit of `feeds`, its byte included.
#[inline(always)]
fn up_to(feeds: u64) -> u64 {
    let bit = feeds & feeds.wrapping_neg();
    bit | (bit - 1)
}

#[inline(always)]
fn mix(hash: u64, word: u64) -> u64 {
    let hash = (hash ^ word).wrapping_mul(LINE_MULTIPLIER);
    hash ^ hash >> 32
}

/// What a mark in `MARKS` stands for: requests with this line from this client (address as in [`crate::abi::Flow`]).
#[inline(always)]
pub fn mark(line: u64, client: &[u32; 4]) -> u64 {
    let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    mix(mix(line, pair(client[0], client[1])), pair(client[2], client[3]))
}

/// [`Scan::line`] of a request, where a plain loop will do. `None`: its line is not complete within [`LOOKED_AT`].
pub fn line_of(request: &[u8]) -> Option<u64> {
    let mut hash = 0;
    for chunk in request[..request.len().min(LOOKED_AT)].chunks(8) {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        if let Some(feed) = chunk.iter().position(|byte| *byte == b'\n') {
            word[feed + 1..].fill(0);
            return Some(mix(hash, u64::from_le_bytes(word)));
        }
        hash = mix(hash, u64::from_le_bytes(word));
    }
    None
}

/// Hashes a host from its end, so that one pass gives the hash of each suffix too. Case and a port at the end count for
/// nothing.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostHash {
    /// Of what was taken so far.
    pub value: u64,
    /// 1: only digits so far, which a colon would make a port, and a dot an IPv4 address.
    pub digits: u32,
    /// Bytes that count.
    pub len: u32,
}

impl Default for HostHash {
    fn default() -> Self {
        Self::new()
    }
}

impl HostHash {
    const EMPTY: u64 = 0xcbf2_9ce4_8422_2325;

    /// Of nothing.
    #[inline(always)]
    pub fn new() -> Self {
        Self { value: Self::EMPTY, digits: 1, len: 0 }
    }

    /// Takes the byte before.
    #[inline(always)]
    pub fn take(&mut self, byte: u8) {
        if byte == b':' && self.digits == 1 {
            *self = Self::new();
            return;
        }
        if !byte.is_ascii_digit() && byte != b'.' {
            self.digits = 0;
        }
        let lower = if byte.is_ascii_uppercase() { byte | 0x20 } else { byte };
        // FNV-1a.
        self.value = (self.value ^ u64::from(lower)).wrapping_mul(0x0100_0000_01b3);
        self.len += 1;
    }

    /// Whether what was taken ends as an IP address does: a last label of digits, or a bracket.
    #[inline(always)]
    pub fn ends_as_address(&self, last: u8) -> bool {
        (self.digits == 1 && last == b'.') || (self.len == 1 && last == b']')
    }

    /// Of a host, or of a suffix.
    pub fn of(host: &[u8]) -> u64 {
        let mut hash = Self::new();
        for byte in host.iter().rev() {
            hash.take(*byte);
        }
        hash.value
    }
}

/// What the first bytes of a request say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FirstBytes {
    /// Not `OPTIONS`: never a preflight.
    Other,
    /// A proper prefix of `OPTIONS `, or nothing yet: more bytes decide.
    Undecided,
    /// `OPTIONS `: may be a preflight; the head decides.
    Options,
}

/// Classifies the first bytes of a request. Looks at eight bytes at most.
#[inline]
pub fn classify(bytes: &[u8]) -> FirstBytes {
    let mut i = 0;
    while i < METHOD.len() {
        if i == bytes.len() {
            return FirstBytes::Undecided;
        }
        if bytes[i] != METHOD[i] {
            return FirstBytes::Other;
        }
        i += 1;
    }
    FirstBytes::Options
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_bytes() {
        for (bytes, want) in [
            (&b""[..], FirstBytes::Undecided),
            (b"O", FirstBytes::Undecided),
            (b"OPTIONS", FirstBytes::Undecided),
            (b"OPTIONS ", FirstBytes::Options),
            (b"OPTIONS /x HTTP/1.1\r\n", FirstBytes::Options),
            (b"options ", FirstBytes::Other),
            (b"OPTIONSX", FirstBytes::Other),
            (b"OPTIONS\t/", FirstBytes::Other),
            (b"GET / ", FirstBytes::Other),
            (b"\r\nOPTIONS ", FirstBytes::Other),
            (b"\x16\x03\x01", FirstBytes::Other),
        ] {
            assert_eq!(classify(bytes), want, "{bytes:?}");
        }
    }

    #[test]
    fn openings() {
        for (bytes, want) in [
            (&b"OPTIONS /"[..], kind::Options),
            (b"OPTIONS", kind::Other),
            (b"OPT", kind::Other),
            (b"GET / HTTP/1.1", kind::Other),
            (b"", kind::Other),
            (b"\x16\x03\x01\x02\x00", kind::Tls),
            (b"\x16", kind::Other),
            (b"\x16\x02", kind::Other),
            (b"PRI * HTTP/2.0\r\n", kind::H2c),
            (b"PRIOR ", kind::Other),
            (b"PROXY TCP4 1", kind::ProxyProtocol),
            (b"PROXYING", kind::Other),
            (b"\r\n\r\n\0\r\nQUIT\n", kind::ProxyProtocol),
        ] {
            let mut first = [0xee; 8];
            let len = bytes.len().min(8);
            first[..len].copy_from_slice(&bytes[..len]);
            assert_eq!(opening(u64::from_le_bytes(first), bytes.len() as u32), want, "{bytes:?}");
        }
    }

    fn scan(request: &[u8]) -> Scan {
        // What lies behind is of an earlier connection.
        let mut buffer: Buffer = [b'\n'; 2112];
        let len = request.len().min(LOOKED_AT);
        buffer[..len].copy_from_slice(&request[..len]);
        let mut scan = Scan::new(len as u32);
        for _ in 0..MAX_STEPS {
            if !scan.step(&buffer) {
                break;
            }
        }
        scan
    }

    const PREFLIGHT: &str = "OPTIONS /x HTTP/1.1\r\nHost: api.test\r\nConnection: keep-alive\r\nAccept: */*\r\n\
        Access-Control-Request-Method: PUT\r\nAccess-Control-Request-Headers: content-type\r\nOrigin: https://app.test\r\n\r\n";

    #[test]
    fn a_preflight_may_be_answered_wherever_its_lines_fall() {
        // Each shift moves the lines against the words.
        for shift in 0..16 {
            let request = PREFLIGHT.replace("/x", &format!("/{}", "x".repeat(shift)));
            let found = scan(request.as_bytes());
            assert!(found.may_be_answered(request.len() as u32), "{shift}: {found:?}");
            assert_eq!(found.end as usize, request.len());
            let host = &request.as_bytes()[found.host as usize..found.host_end as usize];
            assert_eq!(host, b" api.test\r");
            assert_eq!(Some(found.line), line_of(request.as_bytes()));
            // Something behind the head.
            let more = format!("{request}GET");
            assert!(!scan(more.as_bytes()).may_be_answered(more.len() as u32));
        }
    }

    #[test]
    fn what_is_no_preflight_may_not() {
        let lower = PREFLIGHT.to_ascii_lowercase().replace("options /", "OPTIONS /");
        assert!(scan(lower.as_bytes()).may_be_answered(lower.len() as u32));
        let upper = PREFLIGHT.to_ascii_uppercase();
        assert!(scan(upper.as_bytes()).may_be_answered(upper.len() as u32));
        for (from, to) in [
            ("Origin:", "Ogirin:"),
            ("Host:", "Tsoh:"),
            ("Request-Method", "Request-Dohtem"),
            ("Accept: */*", "Cookie: a=b"),
            ("Accept: */*", "Authorization: Basic x"),
            ("Accept: */*", "Content-Length: 0"),
            ("Accept: */*", "Transfer-Encoding: chunked"),
            ("Accept: */*", "Upgrade: h2c"),
            ("Accept: */*", "Expect: 100-continue"),
            ("https://app.test\r\n\r\n", "https://app.test\r\nCookie: a\r\n\r\n"),
        ] {
            let request = PREFLIGHT.replacen(from, to, 1);
            assert!(!scan(request.as_bytes()).may_be_answered(request.len() as u32), "{to}");
        }
        for (from, to) in [
            ("Accept: */*", "Accept-Cookie: a"),
            ("Accept: */*", "Content-Type: x"),
            ("Accept: */*", "X: host:"),
        ] {
            let request = PREFLIGHT.replacen(from, to, 1);
            assert!(scan(request.as_bytes()).may_be_answered(request.len() as u32), "{to}");
        }
    }

    #[test]
    fn a_head_that_goes_on_may_be_answered_once_all_is_there() {
        for len in 0..PREFLIGHT.len() {
            let found = scan(&PREFLIGHT.as_bytes()[..len]);
            let origin = PREFLIGHT.find("Origin:").expect("there is one") + 7;
            assert_eq!(found.may_be_answered(len as u32), len >= origin, "{len}: {found:?}");
        }
        let long = PREFLIGHT.replace("\r\n\r\n", &format!("\r\nX: {}\r\n\r\n", "y".repeat(6000)));
        assert!(scan(long.as_bytes()).may_be_answered(long.len() as u32));
    }

    #[test]
    fn a_line_is_the_same_for_both_sides_and_a_mark_is_of_one_client() {
        for len in 1..60 {
            let request = format!("{}\r\nHost: a\r\n\r\n", "x".repeat(len));
            assert_eq!(line_of(request.as_bytes()), Some(scan(request.as_bytes()).line), "{len}");
            let other = format!("{}\r\nHost: b, and more\r\n\r\n", "x".repeat(len));
            assert_eq!(line_of(request.as_bytes()), line_of(other.as_bytes()));
        }
        assert_eq!(line_of(b"OPTIONS / HTTP/1.1\r"), None);
        assert_ne!(mark(1, &[0, 0, 0, 1]), mark(1, &[0, 0, 0, 2]));
        assert_ne!(mark(1, &[0, 0, 0, 1]), mark(2, &[0, 0, 0, 1]));
    }

    #[test]
    fn hosts_hash_alike_with_port_and_in_any_case() {
        let host = HostHash::of(b"api.example.com");
        for same in
            [&b"API.example.COM"[..], b"api.example.com:80", b"Api.Example.Com:65535", b"api.example.com:"]
        {
            assert_eq!(HostHash::of(same), host, "{same:?}");
        }
        for other in [&b"api.example.com.:8a"[..], b"pi.example.com", b"api.example.co", b"", b"80"] {
            assert_ne!(HostHash::of(other), host, "{other:?}");
        }
        assert_eq!(HostHash::of(b"[::1]:80"), HostHash::of(b"[::1]"));
        let mut hash = HostHash::new();
        for byte in b".example.com:8080".iter().rev() {
            hash.take(*byte);
        }
        assert_eq!(hash.value, HostHash::of(b".example.com"));
    }

    #[test]
    fn addresses_are_told_from_names() {
        for (host, want) in [
            (&b"10.0.0.1"[..], true),
            (b"10.0.0.1:80", true),
            (b"[::1]", true),
            (b"[::1]:8080", true),
            (b"api.example.com", false),
            (b"api.example.com:80", false),
            (b"api.1a", false),
            (b"localhost", false),
            (b"1", false),
        ] {
            let mut hash = HostHash::new();
            let mut address = false;
            for byte in host.iter().rev() {
                hash.take(*byte);
                address |= hash.ends_as_address(*byte);
            }
            assert_eq!(address, want, "{host:?}");
        }
    }
}
