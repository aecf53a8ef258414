//! Whether an upstream expects, understands or refuses the PROXY protocol: asked of the upstream itself.
#![forbid(unsafe_code)]

use super::{ProxyProtocol, proxy_header};
use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

/// `/`, as nginx refuses `*` whatever stands before it. The host is one that nobody has (RFC 6761 §6.4).
const QUESTION: &[u8] =
    b"OPTIONS / HTTP/1.1\r\nHost: preflightd-probe.invalid\r\nUser-Agent: preflightd-probe\r\nConnection: close\r\n\r\n";

/// What came back, from worse to better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
enum Reply {
    /// Nothing that is HTTP: closed, reset, silent.
    None,
    /// 400: these bytes are no request to it.
    Refused,
    /// Any other status.
    Answered([u8; 3]),
}

/// Asks the upstream whether it takes a PROXY protocol v2 header: once with, once without one in front of a plain
/// `OPTIONS`. The header is of the LOCAL kind, which every receiver must accept and none takes an address from.
/// Blocks, for at most twice `timeout`. The answer is [`ProxyProtocol::V2`] or [`ProxyProtocol::Off`].
///
/// # Errors
/// The upstream cannot be reached, or speaks HTTP neither way.
pub fn detect(upstream: SocketAddr, timeout: Duration) -> io::Result<ProxyProtocol> {
    let mut question = Vec::new();
    let plain = ask(upstream, timeout, QUESTION)?;
    proxy_header::v2_local(&mut question);
    question.extend_from_slice(QUESTION);
    let v2 = ask(upstream, timeout, &question)?;
    decide(plain, v2).ok_or_else(|| {
        io::Error::other(
            "it answers HTTP neither with nor without a PROXY protocol header; if that is right, \
             set proxy_protocol to off, v1 or v2 for this listener",
        )
    })
}

fn decide(plain: Reply, v2: Reply) -> Option<ProxyProtocol> {
    match (plain, v2) {
        (Reply::None, Reply::None) => None,
        // Both understood. Another status than without the header would be a complaint about it.
        (Reply::Answered(plain), Reply::Answered(v2)) if plain == v2 => Some(ProxyProtocol::V2),
        (Reply::Answered(_), _) => Some(ProxyProtocol::Off),
        (plain, v2) if v2 > plain => Some(ProxyProtocol::V2),
        _ => Some(ProxyProtocol::Off),
    }
}

fn ask(upstream: SocketAddr, timeout: Duration, question: &[u8]) -> io::Result<Reply> {
    let until = Instant::now() + timeout;
    let mut stream = TcpStream::connect_timeout(&upstream, timeout)?;
    let mut head = Vec::new();
    // From here on a failure is an answer: it did not like what it read.
    if stream.set_write_timeout(Some(timeout)).and_then(|()| stream.write_all(question)).is_err() {
        return Ok(Reply::None);
    }
    let mut chunk = [0; 64];
    while head.len() < b"HTTP/1.1 204".len() {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() || stream.set_read_timeout(Some(left)).is_err() {
            break;
        }
        match stream.read(&mut chunk) {
            Ok(n) if n > 0 => head.extend_from_slice(&chunk[..n]),
            _ => break,
        }
    }
    Ok(match head.get(..12) {
        Some(line) if line.starts_with(b"HTTP/1.") && line[8] == b' ' => {
            match [line[9], line[10], line[11]] {
                [b'4', b'0', b'0'] => Reply::Refused,
                status => Reply::Answered(status),
            }
        }
        _ => Reply::None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_replies_mean() {
        const OK: Reply = Reply::Answered(*b"204");
        const OTHER: Reply = Reply::Answered(*b"501");
        const BAD: Reply = Reply::Refused;
        const NONE: Reply = Reply::None;
        let (off, v2) = (Some(ProxyProtocol::Off), Some(ProxyProtocol::V2));
        for (name, plain, with, expected) in [
            ("understands both", OK, OK, v2),
            ("another answer than without is a complaint", OK, OTHER, off),
            ("refuses the header", OK, BAD, off),
            ("closes on the header", OK, NONE, off),
            ("insists on the header by a 400", BAD, OK, v2),
            ("insists on the header by closing", NONE, OK, v2),
            ("insists on the header, and does not like our question", NONE, BAD, v2),
            ("does not like our question either way", BAD, BAD, off),
            ("does not like our question, closes on the header", BAD, NONE, off),
            ("not HTTP", NONE, NONE, None),
        ] {
            assert_eq!(decide(plain, with), expected, "{name}");
        }
    }
}
