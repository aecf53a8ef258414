//! One question to the proxy, on a connection of its own, and what came back.
#![forbid(unsafe_code)]

use crate::{
    policy::learned::Question,
    relay::{self, ProxyProtocol},
};
use std::{io, net::SocketAddr, sync::OnceLock, time::Duration};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

/// More bytes of an answer's head than this are not read.
const MAX_HEAD: usize = 16 * 1024;
/// More header lines than this are not read.
const MAX_LINES: usize = 64;

/// How the proxy of a listener is reached.
#[derive(Debug)]
pub(super) struct Way {
    place: Place,
    /// What goes in front, once it is known.
    protocol: OnceLock<ProxyProtocol>,
}

#[derive(Debug)]
enum Place {
    Address(SocketAddr),
    /// In a network namespace; the addresses are tried in turn.
    #[cfg(feature = "ebpf")]
    Inside(crate::steer::netns::Netns, Vec<SocketAddr>),
}

/// A whole answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Reply {
    /// The status code.
    pub(super) status: u16,
    /// Header lines as they came, but for blanks around values.
    pub(super) lines: Vec<(String, String)>,
    /// The head's bytes.
    pub(super) head: Vec<u8>,
    /// There is content, or something that may be.
    pub(super) content: bool,
}

impl Reply {
    /// The values of a header, in order.
    pub(super) fn values(&self, name: &'static str) -> impl Iterator<Item = &str> {
        self.lines.iter().filter(move |(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| &**value)
    }
}

impl Way {
    /// To the upstream of a listener that we listen on ourselves.
    pub(super) fn upstream(upstream: &relay::Upstream) -> Self {
        let protocol = match upstream.proxy_protocol {
            ProxyProtocol::Auto => OnceLock::new(),
            known => OnceLock::from(known),
        };
        Self { place: Place::Address(upstream.address), protocol }
    }

    /// To a proxy where it listens itself.
    #[cfg(feature = "ebpf")]
    pub(super) fn beside(netns: crate::steer::netns::Netns, address: SocketAddr) -> Self {
        use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
        let own = match address.ip() {
            IpAddr::V4(Ipv4Addr::UNSPECIFIED) => vec![IpAddr::V4(Ipv4Addr::LOCALHOST)],
            // `[::]` stands for both families.
            IpAddr::V6(Ipv6Addr::UNSPECIFIED) => {
                vec![IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)]
            }
            one => vec![one],
        };
        let addresses = own.into_iter().map(|ip| SocketAddr::new(ip, address.port())).collect();
        Self { place: Place::Inside(netns, addresses), protocol: OnceLock::from(ProxyProtocol::Off) }
    }

    /// Asks, and gives what came back within `timeout`.
    ///
    /// # Errors
    /// The proxy cannot be reached, does not answer in time, or not in HTTP/1.
    pub(super) async fn ask(&self, question: &Question, timeout: Duration) -> io::Result<Reply> {
        let late = |_| io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {timeout:?}"));
        tokio::time::timeout(timeout, self.exchange(question, timeout)).await.map_err(late)?
    }

    async fn exchange(&self, question: &Question, timeout: Duration) -> io::Result<Reply> {
        let mut request = relay::own_header(self.protocol(timeout).await?);
        request.extend_from_slice(&question.bytes());
        let mut stream = self.connect(timeout).await?;
        stream.set_nodelay(true)?;
        stream.write_all(&request).await?;
        read(&mut stream).await
    }

    /// As configured, or as the upstream says: asked until it has said.
    async fn protocol(&self, timeout: Duration) -> io::Result<ProxyProtocol> {
        if let Some(known) = self.protocol.get() {
            return Ok(*known);
        }
        let address = match &self.place {
            Place::Address(address) => *address,
            // Never asked, as it is known.
            #[cfg(feature = "ebpf")]
            Place::Inside(..) => return Ok(ProxyProtocol::Off),
        };
        let known = blocking(move || relay::detect(address, timeout)).await?;
        Ok(*self.protocol.get_or_init(|| known))
    }

    async fn connect(&self, timeout: Duration) -> io::Result<TcpStream> {
        match &self.place {
            Place::Address(address) => tokio::time::timeout(timeout, TcpStream::connect(address)).await?,
            #[cfg(feature = "ebpf")]
            Place::Inside(netns, addresses) => {
                let (netns, addresses) = (netns.clone(), addresses.clone());
                let stream = blocking(move || connect_inside(&netns, &addresses, timeout)).await?;
                stream.set_nonblocking(true)?;
                TcpStream::from_std(stream)
            }
        }
    }
}

/// A socket stays in the namespace in which it was made.
#[cfg(feature = "ebpf")]
fn connect_inside(
    netns: &crate::steer::netns::Netns,
    addresses: &[SocketAddr],
    timeout: Duration,
) -> io::Result<std::net::TcpStream> {
    let connect = || {
        let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for address in addresses {
            match std::net::TcpStream::connect_timeout(address, timeout) {
                Ok(stream) => return Ok(stream),
                Err(error) => last = error,
            }
        }
        Err(last)
    };
    netns.enter(connect).map_err(io::Error::other)?
}

/// On a thread that may wait.
async fn blocking<T: Send + 'static>(f: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(f).await.unwrap_or_else(|e| Err(io::Error::other(e)))
}

/// Reads an answer's head, and whether content follows.
async fn read(stream: &mut TcpStream) -> io::Result<Reply> {
    let mut bytes = Vec::with_capacity(1024);
    let (mut reply, length) = loop {
        if let Some(parsed) = parse(&bytes)? {
            break parsed;
        }
        if bytes.len() >= MAX_HEAD {
            return Err(invalid("the head of its answer is longer than 16 KiB"));
        }
        if stream.read_buf(&mut bytes).await? == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it closed within its answer"));
        }
    };
    reply.content = loop {
        match content(&reply, &bytes[length..]) {
            Content::Some => break true,
            Content::None => break false,
            // To the end of the connection: any byte tells.
            Content::NotYet => match stream.read_buf(&mut bytes).await {
                Ok(0) => break !reply.is_to_the_end(),
                Ok(_) => {}
                Err(_) => break true,
            },
        }
    };
    Ok(reply)
}

#[derive(Debug, PartialEq, Eq)]
enum Content {
    None,
    Some,
    NotYet,
}

/// Whether an answer has content (RFC 9112 §6.3). `rest`: what came behind its head.
fn content(reply: &Reply, rest: &[u8]) -> Content {
    const EMPTY: &[u8] = b"0\r\n\r\n";
    let chunked = reply.values("transfer-encoding").next().is_some();
    let mut lengths = reply.values("content-length");
    match (chunked, lengths.next(), lengths.next()) {
        _ if reply.status == 204 || reply.status == 304 => {
            match (chunked, reply.values("content-length").next()) {
                (false, None | Some("0")) if rest.is_empty() => Content::None,
                _ => Content::Some,
            }
        }
        (true, None, None) if rest == EMPTY => Content::None,
        (true, None, None) if EMPTY.starts_with(rest) => Content::NotYet,
        (false, Some("0"), None) if rest.is_empty() => Content::None,
        (false, None, None) if rest.is_empty() => Content::NotYet,
        _ => Content::Some,
    }
}

impl Reply {
    /// Its content goes on to the end of the connection.
    fn is_to_the_end(&self) -> bool {
        self.values("transfer-encoding").next().is_none() && self.values("content-length").next().is_none()
    }
}

/// The answer that the bytes begin with, and the length of its head; `None`: it is not complete.
fn parse(bytes: &[u8]) -> io::Result<Option<(Reply, usize)>> {
    let mut lines = [httparse::EMPTY_HEADER; MAX_LINES];
    let mut response = httparse::Response::new(&mut lines);
    let length = match response.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(error) => return Err(invalid(format!("its answer is no HTTP/1: {error}"))),
    };
    let status = response.code.unwrap_or(0);
    if status < 200 {
        return Err(invalid(format!("it answers with the status {status}")));
    }
    let mut read = Vec::with_capacity(response.headers.len());
    for line in response.headers.iter() {
        let value = std::str::from_utf8(line.value).map_err(|_| invalid("its answer is not in UTF-8"))?;
        read.push((line.name.to_owned(), value.trim_matches([' ', '\t']).to_owned()));
    }
    Ok(Some((Reply { status, lines: read, head: bytes[..length].to_vec(), content: false }, length)))
}

fn invalid(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whether_there_is_content() {
        use Content::{None, NotYet, Some};
        for (head, rest, expected) in [
            ("204 No Content\r\n", "", None),
            ("204 No Content\r\nContent-Length: 0\r\n", "", None),
            ("204 No Content\r\n", "x", Some),
            ("204 No Content\r\nContent-Length: 5\r\n", "", Some),
            ("204 No Content\r\nTransfer-Encoding: chunked\r\n", "", Some),
            ("200 OK\r\nContent-Length: 0\r\n", "", None),
            ("200 OK\r\nContent-Length: 0\r\n", "x", Some),
            ("200 OK\r\nContent-Length: 00\r\n", "", Some),
            ("200 OK\r\nContent-Length: 2\r\n", "", Some),
            ("200 OK\r\nContent-Length: 0\r\nContent-Length: 0\r\n", "", Some),
            ("200 OK\r\nContent-Length: 0\r\nTransfer-Encoding: chunked\r\n", "", Some),
            ("200 OK\r\nTransfer-Encoding: chunked\r\n", "", NotYet),
            ("200 OK\r\nTransfer-Encoding: chunked\r\n", "0\r\n", NotYet),
            ("200 OK\r\nTransfer-Encoding: chunked\r\n", "0\r\n\r\n", None),
            ("200 OK\r\nTransfer-Encoding: chunked\r\n", "2\r\n", Some),
            ("200 OK\r\n", "", NotYet),
            ("200 OK\r\n", "o", Some),
        ] {
            let bytes = format!("HTTP/1.1 {head}\r\n{rest}");
            let (reply, length) = parse(bytes.as_bytes()).expect(head).expect(head);
            assert_eq!(content(&reply, &bytes.as_bytes()[length..]), expected, "{head:?} {rest:?}");
        }
    }

    #[test]
    fn what_is_no_answer() {
        for (bytes, expected) in [
            ("HTTP/1.1 204 No Content\r\nA: b\r\n", Some("incomplete")),
            ("HTTP/1.1 103 Early Hints\r\n\r\n", None),
            ("PRI * HTTP/2.0\r\n\r\n", None),
            ("HTTP/1.1 204 No Content\r\nA : b\r\n\r\n", None),
        ] {
            let got = parse(bytes.as_bytes());
            assert_eq!(got.is_ok(), expected.is_some(), "{bytes:?}: {got:?}");
            assert!(!matches!(got, Ok(Some(_))), "{bytes:?}");
        }
    }
}
