//! A client that sends exactly the bytes it is told, and reads responses strictly.
#![forbid(unsafe_code)]

use crate::site::PATIENCE;
use std::{
    fmt,
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
};

/// One connection.
#[derive(Debug)]
pub struct Client {
    stream: TcpStream,
    buffer: Vec<u8>,
    lenient: bool,
}

/// A response, parsed strictly: whatever RFC 9112 does not allow a server to send is an error.
#[derive(Clone, PartialEq, Eq)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// Header lines in order, names as sent.
    pub headers: Vec<(String, String)>,
    /// The content, chunks joined.
    pub body: Vec<u8>,
    /// Every byte of it as it came.
    pub raw: Vec<u8>,
}

impl Client {
    /// Connects.
    pub fn connect(address: SocketAddr) -> Self {
        Self::try_connect(address).unwrap_or_else(|e| panic!("connecting to {address}: {e}"))
    }

    /// Connects, or says why not.
    pub fn try_connect(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        Self::from_stream(stream)
    }

    /// Takes a connected stream.
    pub fn from_stream(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self { stream, buffer: Vec::new(), lenient: false })
    }

    /// Bears a `Content-Length: 0` on a 204, which RFC 9110 §8.6 forbids and nginx with its headers-more module sends.
    #[must_use]
    pub fn lenient(self) -> Self {
        Self { lenient: true, ..self }
    }

    /// Sends bytes.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.try_send(bytes).unwrap_or_else(|e| panic!("sending: {e}"));
    }

    /// Sends bytes, or says why not.
    pub fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        self.stream.write_all(bytes.as_ref())
    }

    /// Says that nothing more will be sent (FIN).
    pub fn half_close(&mut self) {
        self.stream.shutdown(Shutdown::Write).unwrap_or_else(|e| panic!("half-closing: {e}"));
    }

    /// The stream below, for whoever needs threads on both directions.
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Sends bytes and reads one response.
    pub fn exchange(&mut self, bytes: impl AsRef<[u8]>) -> Response {
        self.send(bytes);
        self.response()
    }

    /// Reads one response.
    pub fn response(&mut self) -> Response {
        self.try_response().unwrap_or_else(|e| panic!("reading a response: {e}"))
    }

    /// Reads one response, or says what is wrong with it.
    ///
    /// # Errors
    /// `UnexpectedEof` where the connection ends before or within it, `InvalidData` where it is not HTTP, and what
    /// the socket says.
    pub fn try_response(&mut self) -> io::Result<Response> {
        loop {
            if let Some((response, length)) = Response::read(&self.buffer, false, self.lenient)? {
                self.buffer.drain(..length);
                return Ok(response);
            }
            if self.read_some()? == 0 {
                let whole = Response::read(&self.buffer, true, self.lenient)?;
                let (response, length) = whole.ok_or_else(|| {
                    let text = String::from_utf8_lossy(&self.buffer);
                    io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        format!("the connection ended after {text:?}"),
                    )
                })?;
                self.buffer.drain(..length);
                return Ok(response);
            }
        }
    }

    /// Reads `length` bytes, whatever they are.
    pub fn read_exact(&mut self, length: usize) -> Vec<u8> {
        while self.buffer.len() < length {
            let n = self.read_some().unwrap_or_else(|e| panic!("reading: {e}"));
            assert!(n > 0, "the connection ended after {} of {length} bytes", self.buffer.len());
        }
        self.buffer.drain(..length).collect()
    }

    /// Reads all that still comes.
    pub fn read_to_end(&mut self) -> Vec<u8> {
        self.try_read_to_end().unwrap_or_else(|e| panic!("reading to the end: {e}"))
    }

    /// Reads all that still comes, or says what ended it.
    pub fn try_read_to_end(&mut self) -> io::Result<Vec<u8>> {
        while self.read_some()? > 0 {}
        Ok(std::mem::take(&mut self.buffer))
    }

    /// Waits for the other side's end.
    ///
    /// # Panics
    /// Bytes come instead.
    pub fn expect_end(&mut self) {
        let rest = match self.try_read_to_end() {
            Ok(rest) => rest,
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => Vec::new(),
            Err(e) => panic!("waiting for the connection's end: {e}"),
        };
        assert!(rest.is_empty(), "bytes before the end: {}", rest.escape_ascii());
    }

    /// Whether the other side has ended its sending, as far as can be seen without waiting.
    pub fn has_ended(&mut self) -> bool {
        self.stream.set_nonblocking(true).expect("a socket that does not block");
        let read = loop {
            match self.read_some() {
                Ok(0) => break true,
                Ok(_) => {}
                Err(e) => break e.kind() != io::ErrorKind::WouldBlock,
            }
        };
        self.stream.set_nonblocking(false).expect("a socket that blocks");
        read
    }

    fn read_some(&mut self) -> io::Result<usize> {
        let mut chunk = [0; 16_384];
        let n = self.stream.read(&mut chunk)?;
        self.buffer.extend_from_slice(&chunk[..n]);
        Ok(n)
    }
}

impl Response {
    /// The value of a header that is there once; `None` where it is not there.
    ///
    /// # Panics
    /// It is there more than once.
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut values = self.headers.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name));
        let value = values.next()?.1.as_str();
        assert!(values.next().is_none(), "{name} is there more than once: {self:?}");
        Some(value)
    }

    /// Names of the CORS headers, in lower case.
    pub fn cors_headers(&self) -> Vec<String> {
        let names = self.headers.iter().map(|(name, _)| name.to_ascii_lowercase());
        names.filter(|name| name.starts_with("access-control-")).collect()
    }

    /// The response at the start of `bytes` and its length, if it is complete. `ended`: no more bytes will come.
    pub(crate) fn parse(bytes: &[u8], ended: bool) -> io::Result<Option<(Self, usize)>> {
        Self::read(bytes, ended, false)
    }

    fn read(bytes: &[u8], ended: bool, lenient: bool) -> io::Result<Option<(Self, usize)>> {
        let Some(head_length) = bytes.windows(4).position(|w| w == b"\r\n\r\n").map(|at| at + 4) else {
            return Ok(None);
        };
        let head = &bytes[..head_length - 2];
        let bad = |what: &str| {
            let text = String::from_utf8_lossy(head);
            io::Error::new(io::ErrorKind::InvalidData, format!("{what} in the response {text:?}"))
        };
        let text = std::str::from_utf8(head).map_err(|_| bad("bytes beyond ASCII"))?;
        if text.replace("\r\n", "").contains(['\r', '\n', '\0']) {
            return Err(bad("a bare CR or LF, or a NUL"));
        }
        let mut lines = text.split_terminator("\r\n");
        let line = lines.next().unwrap_or_default();
        let status = line
            .strip_prefix("HTTP/1.1 ")
            .and_then(|rest| rest.split_once(' '))
            .and_then(|(code, _)| (code.len() == 3).then(|| code.parse::<u16>().ok()).flatten())
            .ok_or_else(|| bad("a bad status line"))?;
        let mut headers = Vec::new();
        for line in lines {
            let (name, value) = line.split_once(':').ok_or_else(|| bad("a header line without a colon"))?;
            let is_token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
            if name.is_empty() || !name.bytes().all(is_token) {
                return Err(bad("a bad header name"));
            }
            headers.push((name.to_owned(), value.trim_matches([' ', '\t']).to_owned()));
        }
        let mut response = Self { status, headers, body: Vec::new(), raw: Vec::new() };
        let rest = &bytes[head_length..];
        let chunked = response.header("transfer-encoding").is_some_and(|v| v.eq_ignore_ascii_case("chunked"));
        let length = response.header("content-length").map(str::parse::<usize>);
        let body_length = if status < 200 || status == 204 || status == 304 {
            // RFC 9110 §8.6: no Content-Length in a 1xx or 204.
            let borne = lenient && length == Some(Ok(0));
            if status != 304 && (length.is_some() || chunked) && !borne {
                return Err(bad("a length where there is no content"));
            }
            0
        } else if chunked {
            let Some((body, length)) = dechunk(rest).ok_or_else(|| bad("a bad chunk"))? else {
                return Ok(None);
            };
            response.body = body;
            length
        } else if let Some(length) = length {
            length.map_err(|_| bad("a bad Content-Length"))?
        } else if ended {
            rest.len()
        } else {
            return Ok(None);
        };
        if rest.len() < body_length {
            return Ok(None);
        }
        if !chunked {
            response.body = rest[..body_length].to_vec();
        }
        response.raw = bytes[..head_length + body_length].to_vec();
        Ok(Some((response, head_length + body_length)))
    }
}

impl fmt::Debug for Response {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.raw.escape_ascii())
    }
}

/// The content of complete chunks and how many bytes they took; inner `None`: incomplete, outer: not chunks.
#[expect(clippy::option_option, reason = "incomplete and malformed are different things")]
fn dechunk(mut bytes: &[u8]) -> Option<Option<(Vec<u8>, usize)>> {
    let all = bytes.len();
    let mut body = Vec::new();
    loop {
        let Some(end) = bytes.windows(2).position(|w| w == b"\r\n") else { return Some(None) };
        let size = std::str::from_utf8(&bytes[..end]).ok()?;
        let size = usize::from_str_radix(size, 16).ok()?;
        bytes = &bytes[end + 2..];
        if bytes.len() < size + 2 {
            return Some(None);
        }
        if &bytes[size..size + 2] != b"\r\n" {
            return None;
        }
        body.extend_from_slice(&bytes[..size]);
        bytes = &bytes[size + 2..];
        if size == 0 {
            return Some(Some((body, all - bytes.len())));
        }
    }
}

/// A preflight as Chromium sends it.
pub fn preflight(host: &str, target: &str, origin: &str, method: &str, headers: Option<&str>) -> Vec<u8> {
    let headers = headers.map(|h| format!("Access-Control-Request-Headers: {h}\r\n")).unwrap_or_default();
    format!(
        "OPTIONS {target} HTTP/1.1\r\nHost: {host}\r\nConnection: keep-alive\r\nAccept: */*\r\n\
         Access-Control-Request-Method: {method}\r\n{headers}Origin: {origin}\r\nSec-Fetch-Mode: cors\r\n\
         Sec-Fetch-Site: same-site\r\nSec-Fetch-Dest: empty\r\nUser-Agent: Mozilla/5.0 (X11; Linux x86_64) \
         AppleWebKit/537.36 (KHTML, like Gecko) Chrome/142.0.0.0 Safari/537.36\r\nAccept-Encoding: gzip, deflate\r\n\
         Accept-Language: en-GB,en;q=0.9\r\n\r\n"
    )
    .into_bytes()
}

/// A plain GET.
pub fn get(host: &str, target: &str) -> Vec<u8> {
    format!("GET {target} HTTP/1.1\r\nHost: {host}\r\nAccept: */*\r\n\r\n").into_bytes()
}

/// GETs a URL on a connection of its own.
pub fn fetch(address: SocketAddr, target: &str) -> io::Result<Response> {
    let mut client = Client::try_connect(address)?;
    client.try_send(format!("GET {target} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"))?;
    client.try_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn responses_are_read_strictly() {
        type Parsed = Result<Option<usize>, ()>;
        let cases: [(&str, &str, Parsed); 9] = [
            ("incomplete head", "HTTP/1.1 204 No Content\r\nA: b\r\n", Ok(None)),
            ("no content", "HTTP/1.1 204 No Content\r\nA: b\r\n\r\nHTTP", Ok(Some(0))),
            ("204 with a length", "HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", Err(())),
            ("length", "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcd", Ok(Some(3))),
            ("short body", "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab", Ok(None)),
            (
                "chunks",
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n",
                Ok(Some(2)),
            ),
            (
                "bad chunk",
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabc\r\n0\r\n\r\n",
                Err(()),
            ),
            ("bare LF", "HTTP/1.1 200 OK\r\nA: b\nC: d\r\n\r\n", Err(())),
            ("blank before the colon", "HTTP/1.1 200 OK\r\nA : b\r\n\r\n", Err(())),
        ];
        for (name, bytes, want) in cases {
            let got = Response::parse(bytes.as_bytes(), false);
            let got = got.map(|r| r.map(|(response, _)| response.body.len())).map_err(|_| ());
            assert_eq!(got, want, "{name}");
        }
    }
}
