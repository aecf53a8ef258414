//! Is a parsed head a preflight that every proxy reads alike? Each doubt has its own reason to pass.
//!
//! The first offence in the order of the bytes is the reason; what is missing is told only if nothing else offends.
//!
//! Headers that a browser never puts on a preflight (Fetch §4.8) and that could make a proxy act otherwise than on the
//! request line and the CORS headers pass: credentials, bodies, everything hop-by-hop, names that claim another method
//! or target, and any name that matters here with `_` for `-` (some proxies drop it, some keep it, CGI reads both
//! alike). What load balancers in front add (`Forwarded`, `X-Forwarded-*`, `Via`, …) is common and does not change a
//! CORS answer: it is ignored, as are all other headers, whatever their values (obs-text included, RFC 9110 §5.5).

use super::{Head, PreflightHead};
use crate::{
    policy::{Connection, is_token},
    reason::PassReason,
};
use arrayvec::ArrayVec;
use std::mem::replace;

/// Judges a well-formed request whose head is `len` bytes long.
#[inline]
pub(super) fn preflight<'a>(request: &httparse::Request<'_, 'a>, len: usize) -> Head<'a> {
    let mut head = PreflightHead {
        host: b"",
        target: request.path.unwrap_or_default().as_bytes(),
        origin: b"",
        method: b"",
        headers: ArrayVec::new(),
        private_network: false,
        connection: if request.version == Some(1) { Connection::KeepAlive } else { Connection::Close },
        len,
    };
    if let Err(reason) = check_target(head.target).and_then(|()| take_headers(request.headers, &mut head)) {
        return Head::Pass(reason);
    }
    Head::Preflight(head)
}

#[inline]
fn take_headers<'a>(lines: &[httparse::Header<'a>], head: &mut PreflightHead<'a>) -> Result<(), PassReason> {
    // Of the headers that may stand once.
    let (mut content_length, mut connection, mut te, mut private_network) = (false, false, false, false);

    for line in lines {
        let (name, value) = (line.name.as_bytes(), line.value);
        let Some(field) = Field::of(name) else { continue };
        if !all(name, |b| b != b'_') {
            return Err(PassReason::AmbiguousHeader);
        }
        match field {
            Field::Host => once(&mut head.host, value, is_visible, PassReason::BadHost)?,
            Field::Origin => once(&mut head.origin, value, is_origin, PassReason::BadOrigin)?,
            Field::RequestMethod => once(&mut head.method, value, is_token, PassReason::BadRequestMethod)?,
            Field::RequestHeaders => {
                head.headers.try_push(value).map_err(|_| PassReason::UnusableRequestHeaders)?;
            }
            Field::RequestPrivateNetwork => {
                if replace(&mut private_network, true) {
                    return Err(PassReason::MalformedHead);
                }
                head.private_network = value == b"true";
            }
            Field::Connection => {
                head.connection = match (replace(&mut connection, true), head.connection) {
                    (false, _) if value.eq_ignore_ascii_case(b"close") => Connection::Close,
                    (false, Connection::KeepAlive) if value.eq_ignore_ascii_case(b"keep-alive") => {
                        Connection::KeepAlive
                    }
                    (false, _) if value.eq_ignore_ascii_case(b"keep-alive") => Connection::KeepAlive10,
                    _ => return Err(PassReason::HopByHop),
                };
            }
            Field::Te => {
                if replace(&mut te, true) || !value.eq_ignore_ascii_case(b"trailers") {
                    return Err(PassReason::HopByHop);
                }
            }
            Field::ContentLength => {
                if replace(&mut content_length, true) || value != b"0" {
                    return Err(PassReason::Body);
                }
            }
            Field::Never(reason) => return Err(reason),
        }
    }

    if head.origin.is_empty() {
        return Err(PassReason::NoOrigin);
    }
    if head.method.is_empty() {
        return Err(PassReason::NoRequestMethod);
    }
    if head.host.is_empty() {
        return Err(PassReason::BadHost);
    }
    Ok(())
}

/// The headers that matter here.
enum Field {
    Host,
    Origin,
    RequestMethod,
    RequestHeaders,
    RequestPrivateNetwork,
    /// One `close` or `keep-alive` and nothing else: a `Connection: Origin` would strip a header behind us.
    Connection,
    /// `trailers` is what Firefox says over HTTP/2 and gateways hand on; an answer without a body has none.
    Te,
    /// `0` or none.
    ContentLength,
    /// No preflight has it.
    Never(PassReason),
}

impl Field {
    /// Finds a header by its name, in which `_` counts as `-`. Length and first letter spare most comparisons.
    #[inline]
    fn of(name: &[u8]) -> Option<Field> {
        use PassReason::{AmbiguousHeader, Body, Credentials, HopByHop};
        let first = name.first()? | 0x20;
        Some(match (name.len(), first) {
            (4, b'h') if is(name, b"host") => Field::Host,
            (6, b'o') if is(name, b"origin") => Field::Origin,
            (29, b'a') if is(name, b"access-control-request-method") => Field::RequestMethod,
            (30, b'a') if is(name, b"access-control-request-headers") => Field::RequestHeaders,
            (38, b'a') if is(name, b"access-control-request-private-network") => Field::RequestPrivateNetwork,
            (10, b'c') if is(name, b"connection") => Field::Connection,
            (2, b't') if is(name, b"te") => Field::Te,
            (14, b'c') if is(name, b"content-length") => Field::ContentLength,

            (17, b't') if is(name, b"transfer-encoding") => Field::Never(Body),
            (6, b'c') if is(name, b"cookie") => Field::Never(Credentials),
            (13, b'a') if is(name, b"authorization") => Field::Never(Credentials),
            (19, b'p') if is(name, b"proxy-authorization") => Field::Never(Credentials),

            (6, b'e') if is(name, b"expect") => Field::Never(HopByHop),
            (7, b'u') if is(name, b"upgrade") => Field::Never(HopByHop),
            (7, b't') if is(name, b"trailer") => Field::Never(HopByHop),
            (10, b'k') if is(name, b"keep-alive") => Field::Never(HopByHop),
            // On OPTIONS it asks a proxy on the way to answer for itself (RFC 9110 §7.6.2).
            (12, b'm') if is(name, b"max-forwards") => Field::Never(HopByHop),
            (14, b'h') if is(name, b"http2-settings") => Field::Never(HopByHop),
            (16, b'p') if is(name, b"proxy-connection") => Field::Never(HopByHop),

            (13, b'x') if is(name, b"x-http-method") => Field::Never(AmbiguousHeader),
            (13, b'x') if is(name, b"x-rewrite-url") => Field::Never(AmbiguousHeader),
            (14, b'x') if is(name, b"x-original-url") => Field::Never(AmbiguousHeader),
            (14, b'x') if is(name, b"x-original-uri") => Field::Never(AmbiguousHeader),
            (17, b'x') if is(name, b"x-method-override") => Field::Never(AmbiguousHeader),
            (17, b'x') if is(name, b"x-original-method") => Field::Never(AmbiguousHeader),
            (22, b'x') if is(name, b"x-http-method-override") => Field::Never(AmbiguousHeader),
            _ => return None,
        })
    }
}

/// Is `name`, a token, this lower-case name? Without an early exit, so that the compiler compares many bytes at once.
#[inline]
fn is<const N: usize>(name: &[u8], known: &[u8; N]) -> bool {
    let Ok(name) = <&[u8; N]>::try_from(name) else { return false };
    let mut difference = 0;
    for (&b, &k) in name.iter().zip(known) {
        // 0x20 makes a letter lower-case and leaves digits and `-` as they are.
        difference |= (if b == b'_' { b'-' } else { b } | 0x20) ^ k;
    }
    difference == 0
}

/// Judges a request line (without its CRLF) by its end alone: `None` for ` HTTP/1.0` and ` HTTP/1.1`.
pub(super) fn version(line: &[u8]) -> Option<PassReason> {
    if line.ends_with(b" HTTP/1.1") || line.ends_with(b" HTTP/1.0") {
        return None;
    }
    let last = line.rsplit(|&b| b == b' ').next().unwrap_or_default();
    let spaces = memchr::memchr_iter(b' ', line).count();
    Some(match (spaces, last) {
        // `OPTIONS /x`: HTTP/0.9.
        (1, target) if is_visible(target) => PassReason::Version,
        (2.., [b'H', b'T', b'T', b'P', b'/', major, b'.', minor])
            if major.is_ascii_digit() && minor.is_ascii_digit() =>
        {
            PassReason::Version
        }
        // `HTTP/2` as in `OPTIONS /x HTTP/2`.
        (2.., [b'H', b'T', b'T', b'P', b'/', major]) if major.is_ascii_digit() => PassReason::Version,
        _ => PassReason::MalformedHead,
    })
}

/// Why httparse refused a whole head in which each line ends in CRLF: the first line that offends says it.
#[cold]
pub(super) fn malformed(head: &[u8], error: httparse::Error) -> PassReason {
    if error == httparse::Error::TooManyHeaders {
        return PassReason::HeadTooLarge;
    }
    let mut lines = head.split(|&b| b == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    let mut request_line = lines.next().unwrap_or_default().split(|&b| b == b' ').skip(1);
    match (request_line.next(), request_line.next(), request_line.next()) {
        (Some(target), Some(_), None) if !target.is_empty() && !target.contains(&b'\r') => {
            if !is_visible(target) {
                return PassReason::BadTarget;
            }
        }
        _ => return PassReason::MalformedHead,
    }
    for line in lines {
        if line.starts_with(b" ") || line.starts_with(b"\t") {
            return PassReason::ObsFold;
        }
        let colon = line.iter().position(|&b| b == b':');
        let Some((name, value)) = colon.map(|at| (&line[..at], &line[at + 1..])) else {
            return PassReason::MalformedHead;
        };
        if !is_token(name) || value.contains(&b'\r') {
            return PassReason::MalformedHead;
        }
        if value.iter().any(|&b| b.is_ascii_control() && b != b'\t') {
            return match () {
                () if name.eq_ignore_ascii_case(b"host") => PassReason::BadHost,
                () if name.eq_ignore_ascii_case(b"origin") => PassReason::BadOrigin,
                () if name.eq_ignore_ascii_case(b"access-control-request-method") => {
                    PassReason::BadRequestMethod
                }
                () => PassReason::MalformedHead,
            };
        }
    }
    PassReason::MalformedHead
}

/// Takes the value of a header that must stand once and not be empty, and must be `good`.
#[inline]
fn once<'a>(
    slot: &mut &'a [u8],
    value: &'a [u8],
    good: impl FnOnce(&[u8]) -> bool,
    reason: PassReason,
) -> Result<(), PassReason> {
    if !slot.is_empty() || !good(value) {
        return Err(reason);
    }
    *slot = value;
    Ok(())
}

/// Origin-form (RFC 9112 §3.2.1) with a path that every proxy normalises to itself.
#[inline]
fn check_target(target: &[u8]) -> Result<(), PassReason> {
    match target.first() {
        Some(b'/') => {}
        Some(b'*') if target.len() == 1 => return Err(PassReason::AsteriskForm),
        Some(b) if b.is_ascii_alphanumeric() || *b == b'[' => return Err(PassReason::AbsoluteForm),
        _ => return Err(PassReason::BadTarget),
    }
    let mut previous = 0;
    let mut dot_after_slash = false;
    let mut path_len = target.len();
    for (at, &b) in target.iter().enumerate() {
        match PATH_BYTES[usize::from(b)] {
            PathByte::Slash if previous == b'/' => return Err(PassReason::AmbiguousPath),
            PathByte::Plain | PathByte::Slash => {}
            PathByte::Dot => dot_after_slash |= previous == b'/',
            PathByte::Query => {
                path_len = at;
                break;
            }
            PathByte::Ambiguous => return Err(PassReason::AmbiguousPath),
            PathByte::Percent => return Err(PassReason::EncodedPath),
            PathByte::Bad => return Err(PassReason::BadTarget),
        }
        previous = b;
    }
    let (path, query) = target.split_at(path_len);
    if dot_after_slash && path.split(|&b| b == b'/').any(|segment| matches!(segment, b"." | b"..")) {
        return Err(PassReason::AmbiguousPath);
    }
    if !all(query, |b| b.is_ascii_graphic() && b != b'#') {
        return Err(PassReason::BadTarget);
    }
    Ok(())
}

#[derive(Clone, Copy)]
enum PathByte {
    Plain,
    Slash,
    Dot,
    Query,
    Ambiguous,
    Percent,
    Bad,
}

static PATH_BYTES: [PathByte; 256] = {
    let mut table = [PathByte::Bad; 256];
    let mut b = 0x21;
    while b < 0x7f {
        table[b] = match b as u8 {
            b'/' => PathByte::Slash,
            b'.' => PathByte::Dot,
            b'?' => PathByte::Query,
            b'%' => PathByte::Percent,
            b';' | b'\\' => PathByte::Ambiguous,
            b'#' | b'"' | b'<' | b'>' | b'^' | b'`' | b'{' | b'|' | b'}' => PathByte::Bad,
            _ => PathByte::Plain,
        };
        b += 1;
    }
    table
};

fn is_visible(value: &[u8]) -> bool {
    !value.is_empty() && all(value, |b| b.is_ascii_graphic())
}

/// A comma is what a gateway leaves of two `Origin` lines.
fn is_origin(value: &[u8]) -> bool {
    !value.is_empty() && all(value, |b| b.is_ascii_graphic() && b != b',')
}

/// Without an early exit: the usual value is good, and the compiler looks at many bytes at once.
#[inline]
fn all(value: &[u8], good: impl Fn(u8) -> bool) -> bool {
    value.iter().fold(true, |so_far, &b| so_far & good(b))
}
