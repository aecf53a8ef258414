//! Is a parsed head a preflight that every proxy reads alike? Each doubt has its own reason to pass.
//!
//! The first offence in the order of the bytes is the reason; what is missing is told only if nothing else offends.
//!
//! Headers that a browser never puts on a preflight (Fetch §4.8) and that could make a proxy act otherwise than on the
//! request line and the CORS headers pass: credentials, bodies, everything hop-by-hop, names that claim another method
//! or target. What load balancers in front add (`Forwarded`, `X-Forwarded-*`, `Via`, …) is common and does not change
//! a CORS answer: it is ignored, as are all other headers, whatever their values (obs-text included, RFC 9110 §5.5).

use super::{MAX_REQUEST_HEADERS_LINES, PreflightHead};
use crate::{policy::Connection, reason::PassReason};
use arrayvec::ArrayVec;

/// Judges a well-formed request whose head is `len` bytes long.
pub(super) fn preflight<'a>(
    request: &httparse::Request<'_, 'a>,
    len: usize,
) -> Result<PreflightHead<'a>, PassReason> {
    let target = request.path.unwrap_or_default().as_bytes();
    check_target(target)?;

    let (mut host, mut origin, mut method) = (None, None, None);
    let (mut connection, mut content_length, mut te, mut private_network) = (None, None, None, None);
    let mut headers = ArrayVec::<&[u8], MAX_REQUEST_HEADERS_LINES>::new();

    for line in &*request.headers {
        let (name, value) = (line.name.as_bytes(), line.value);
        let is = |known: &str| name.eq_ignore_ascii_case(known.as_bytes());
        // The first letter spares most comparisons; names are never empty.
        match (name.len(), name.first().map_or(0, u8::to_ascii_lowercase)) {
            (4, b'h') if is("host") => once(&mut host, value, is_visible, PassReason::BadHost)?,
            (6, b'o') if is("origin") => once(&mut origin, value, is_origin, PassReason::BadOrigin)?,
            (29, b'a') if is("access-control-request-method") => {
                once(&mut method, value, is_token, PassReason::BadRequestMethod)?;
            }
            (30, b'a') if is("access-control-request-headers") => {
                headers.try_push(value).map_err(|_| PassReason::UnusableRequestHeaders)?;
            }
            (38, b'a') if is("access-control-request-private-network") => {
                once(&mut private_network, value, |_| true, PassReason::MalformedHead)?;
            }

            // One `close` or `keep-alive` and nothing else: a `Connection: Origin` would strip a header behind us.
            (10, b'c') if is("connection") => {
                once(&mut connection, value, is_close_or_keep_alive, PassReason::HopByHop)?;
            }
            // What Firefox says over HTTP/2, as gateways hand it on; an answer without a body has no trailers.
            (2, b't') if is("te") => {
                once(&mut te, value, |v| v.eq_ignore_ascii_case(b"trailers"), PassReason::HopByHop)?;
            }
            // `Max-Forwards` on OPTIONS asks a proxy on the way to answer for itself (RFC 9110 §7.6.2).
            (6, b'e') if is("expect") => return Err(PassReason::HopByHop),
            (7, b'u') if is("upgrade") => return Err(PassReason::HopByHop),
            (7, b't') if is("trailer") => return Err(PassReason::HopByHop),
            (10, b'k') if is("keep-alive") => return Err(PassReason::HopByHop),
            (12, b'm') if is("max-forwards") => return Err(PassReason::HopByHop),
            (14, b'h') if is("http2-settings") => return Err(PassReason::HopByHop),
            (16, b'p') if is("proxy-connection") => return Err(PassReason::HopByHop),

            (14, b'c') if is("content-length") => {
                once(&mut content_length, value, |v| v == b"0", PassReason::Body)?;
            }
            (17, b't') if is("transfer-encoding") => return Err(PassReason::Body),

            (6, b'c') if is("cookie") => return Err(PassReason::Credentials),
            (13, b'a') if is("authorization") => return Err(PassReason::Credentials),
            (19, b'p') if is("proxy-authorization") => return Err(PassReason::Credentials),

            (13, b'x') if is("x-http-method") || is("x-rewrite-url") => {
                return Err(PassReason::AmbiguousHeader);
            }
            (14, b'x') if is("x-original-url") || is("x-original-uri") => {
                return Err(PassReason::AmbiguousHeader);
            }
            (17, b'x') if is("x-method-override") || is("x-original-method") => {
                return Err(PassReason::AmbiguousHeader);
            }
            (22, b'x') if is("x-http-method-override") => return Err(PassReason::AmbiguousHeader),

            // Some proxies drop a name like `Content_Length`, some keep it, and CGI reads `_` and `-` alike.
            _ if !name.iter().all(|&b| b.is_ascii_alphanumeric() || b == b'-') => {
                return Err(PassReason::AmbiguousHeader);
            }
            _ => {}
        }
    }

    Ok(PreflightHead {
        origin: origin.ok_or(PassReason::NoOrigin)?,
        method: method.ok_or(PassReason::NoRequestMethod)?,
        host: host.ok_or(PassReason::BadHost)?,
        target,
        headers,
        private_network: private_network == Some(b"true"),
        connection: match (request.version, connection) {
            (Some(1), None) => Connection::KeepAlive,
            (_, None) => Connection::Close,
            (_, Some(word)) if word.eq_ignore_ascii_case(b"close") => Connection::Close,
            (Some(1), Some(_)) => Connection::KeepAlive,
            (_, Some(_)) => Connection::KeepAlive10,
        },
        len,
    })
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

/// Takes the value of a header that may stand once and must be `good`.
#[inline]
fn once<'a>(
    slot: &mut Option<&'a [u8]>,
    value: &'a [u8],
    good: impl FnOnce(&[u8]) -> bool,
    reason: PassReason,
) -> Result<(), PassReason> {
    if slot.is_some() || !good(value) {
        return Err(reason);
    }
    *slot = Some(value);
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
    if !query.iter().all(|&b| b.is_ascii_graphic() && b != b'#') {
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
    !value.is_empty() && value.iter().all(u8::is_ascii_graphic)
}

/// A comma is what a gateway leaves of two `Origin` lines.
fn is_origin(value: &[u8]) -> bool {
    is_visible(value) && !value.contains(&b',')
}

fn is_close_or_keep_alive(value: &[u8]) -> bool {
    value.eq_ignore_ascii_case(b"keep-alive") || value.eq_ignore_ascii_case(b"close")
}

/// A token (RFC 9110 §5.6.2).
fn is_token(value: &[u8]) -> bool {
    !value.is_empty()
        && value.iter().all(|&b| {
            b.is_ascii_alphanumeric()
                || matches!(
                    b,
                    b'!' | b'#'
                        | b'$'
                        | b'%'
                        | b'&'
                        | b'\''
                        | b'*'
                        | b'+'
                        | b'-'
                        | b'.'
                        | b'^'
                        | b'_'
                        | b'`'
                        | b'|'
                        | b'~'
                )
        })
}
