//! An upstream that records every byte of each connection and answers as the test wants.
#![forbid(unsafe_code)]

use crate::site::{PATIENCE, wait_for};
use socket2::SockRef;
use std::{
    fmt,
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

/// Builds the response to one request from its head and body.
type Responder = dyn Fn(&Request) -> Vec<u8> + Send + Sync;

/// What the upstream does with a connection.
#[derive(Clone)]
pub enum Behaviour {
    /// Reads until the client's end, then sends these bytes and closes.
    AtEnd(Vec<u8>),
    /// Answers every request (with Content-Length bodies) as it is complete, and keeps the connection.
    Http(Arc<Responder>),
    /// Sends back what it gets.
    Echo,
    /// Sends these bytes as soon as a byte has come, then closes its sending side and reads on.
    Hasty(Vec<u8>),
}

/// A request, as [`Behaviour::Http`] reads it.
#[derive(Clone, Debug)]
pub struct Request {
    /// Request line and headers, with the empty line.
    pub head: String,
    /// The content.
    pub body: Vec<u8>,
}

/// What came over one connection.
#[derive(Clone, Debug, Default)]
pub struct Recorded {
    /// The other side's address.
    pub peer: Option<SocketAddr>,
    /// Every byte, in order.
    pub bytes: Vec<u8>,
    /// The other side has ended its sending.
    pub ended: bool,
    /// The connection broke.
    pub broken: Option<io::ErrorKind>,
}

/// A listening upstream.
#[derive(Debug)]
pub struct Upstream {
    address: SocketAddr,
    /// The listener: shutting it down wakes the acceptor.
    waker: TcpListener,
    connections: Arc<Mutex<Vec<Recorded>>>,
    stop: Arc<AtomicBool>,
    acceptor: Option<JoinHandle<()>>,
}

impl Behaviour {
    /// Answers every request with the same bytes.
    pub fn always(response: impl Into<Vec<u8>>) -> Self {
        let response = response.into();
        Self::Http(Arc::new(move |_| response.clone()))
    }

    /// Answers `200` with the request line and the body's length as its content.
    pub fn report() -> Self {
        Self::Http(Arc::new(|request| {
            let line = request.head.lines().next().unwrap_or_default();
            let body = format!("{line} +{}", request.body.len());
            format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
        }))
    }

    /// Answers `200` with the request's body as its content.
    pub fn echo_body() -> Self {
        Self::Http(Arc::new(|request| {
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", request.body.len());
            [head.as_bytes(), &request.body].concat()
        }))
    }
}

impl fmt::Debug for Behaviour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AtEnd(_) => "AtEnd",
            Self::Http(_) => "Http",
            Self::Echo => "Echo",
            Self::Hasty(_) => "Hasty",
        })
    }
}

impl Upstream {
    /// Listens on a free port.
    pub fn start(behaviour: Behaviour) -> Self {
        Self::on(TcpListener::bind("127.0.0.1:0").expect("binding an upstream"), behaviour)
    }

    /// Serves a listening socket, of another network namespace, say.
    pub fn on(listener: TcpListener, behaviour: Behaviour) -> Self {
        let waker = listener.try_clone().expect("a second handle to the listener");
        let address = listener.local_addr().expect("the upstream's address");
        let connections = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let acceptor = {
            let (connections, stop) = (Arc::clone(&connections), Arc::clone(&stop));
            thread::spawn(move || accept(&listener, &behaviour, &connections, &stop))
        };
        Self { address, waker, connections, stop, acceptor: Some(acceptor) }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How many connections there were.
    pub fn count(&self) -> usize {
        self.connections.lock().expect("recordings").len()
    }

    /// Waits until connection `index` (from 0) has ended, and gives it.
    pub fn ended(&self, index: usize) -> Recorded {
        wait_for(format_args!("the end of upstream connection {index}"), || {
            let connections = self.connections.lock().expect("recordings");
            connections.get(index).filter(|c| c.ended || c.broken.is_some()).cloned()
        })
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // Wakes the acceptor; the threads of connections end with their clients.
        let _ = SockRef::from(&self.waker).shutdown(Shutdown::Both);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

fn accept(
    listener: &TcpListener,
    behaviour: &Behaviour,
    connections: &Arc<Mutex<Vec<Recorded>>>,
    stop: &AtomicBool,
) {
    for stream in listener.incoming() {
        if stop.load(Ordering::Acquire) {
            return;
        }
        let Ok(stream) = stream else { continue };
        let index = {
            let mut all = connections.lock().expect("recordings");
            all.push(Recorded { peer: stream.peer_addr().ok(), ..Recorded::default() });
            all.len() - 1
        };
        let recorder = Recorder { connections: Arc::clone(connections), index };
        let behaviour = behaviour.clone();
        thread::spawn(move || {
            if let Err(e) = serve(stream, &behaviour, &recorder) {
                recorder.note(|r| r.broken = Some(e.kind()));
            }
        });
    }
}

/// Writes into one connection's recording.
struct Recorder {
    connections: Arc<Mutex<Vec<Recorded>>>,
    index: usize,
}

impl Recorder {
    fn note(&self, write: impl FnOnce(&mut Recorded)) {
        write(&mut self.connections.lock().expect("recordings")[self.index]);
    }

    /// Reads and records; 0 is the end.
    fn read(&self, stream: &mut TcpStream, chunk: &mut [u8]) -> io::Result<usize> {
        let n = stream.read(chunk)?;
        self.note(|r| {
            r.bytes.extend_from_slice(&chunk[..n]);
            r.ended |= n == 0;
        });
        Ok(n)
    }
}

fn serve(mut stream: TcpStream, behaviour: &Behaviour, recorder: &Recorder) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE * 4))?;
    let mut chunk = vec![0; 65536];
    match behaviour {
        Behaviour::AtEnd(response) => {
            while recorder.read(&mut stream, &mut chunk)? > 0 {}
            stream.write_all(response)
        }
        Behaviour::Echo => loop {
            let n = recorder.read(&mut stream, &mut chunk)?;
            if n == 0 {
                return Ok(());
            }
            stream.write_all(&chunk[..n])?;
        },
        Behaviour::Hasty(response) => {
            recorder.read(&mut stream, &mut chunk)?;
            stream.write_all(response)?;
            stream.shutdown(Shutdown::Write)?;
            while recorder.read(&mut stream, &mut chunk)? > 0 {}
            Ok(())
        }
        Behaviour::Http(respond) => {
            let mut buffer = Vec::new();
            loop {
                while let Some(request) = take_request(&mut buffer) {
                    stream.write_all(&respond(&request))?;
                }
                let n = recorder.read(&mut stream, &mut chunk)?;
                if n == 0 {
                    return Ok(());
                }
                buffer.extend_from_slice(&chunk[..n]);
            }
        }
    }
}

/// Takes a complete request off the front. Content-Length only: this upstream is no proxy.
fn take_request(buffer: &mut Vec<u8>) -> Option<Request> {
    let head_length = buffer.windows(4).position(|w| w == b"\r\n\r\n")? + 4;
    let head = String::from_utf8_lossy(&buffer[..head_length]).into_owned();
    let length = head
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .and_then(|(_, value)| value.trim().parse::<usize>().ok())
        .unwrap_or(0);
    if buffer.len() < head_length + length {
        return None;
    }
    let body = buffer[head_length..head_length + length].to_vec();
    buffer.drain(..head_length + length);
    Some(Request { head, body })
}
