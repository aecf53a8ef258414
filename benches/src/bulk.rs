//! Bulk transfers through a relay: a server that takes or gives any number of bytes, and its client.
//!
//! Neither touches the bytes (sendfile from memory, MSG_TRUNC), so that the relay between them does most of the work.
#![forbid(unsafe_code)]

use rustix::{
    fs::{MemfdFlags, ftruncate, memfd_create, sendfile},
    io::Errno,
    net::{RecvFlags, recv},
};
use std::{
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream},
    os::fd::OwnedFd,
    thread,
    time::{Duration, Instant},
};

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// In the body of a POST.
    Up,
    /// In the answer to a GET.
    Down,
}

/// Sent at once.
const CHUNK: usize = 1 << 20;
/// A transfer that stands still for so long has failed.
const PATIENCE: Duration = Duration::from_secs(10);

/// Starts the server in threads of this process, which inherit the caller's CPU and end with the process.
pub fn serve() -> io::Result<SocketAddrV4> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let SocketAddr::V4(address) = listener.local_addr()? else {
        return Err(io::Error::other("binding to 127.0.0.1 gave no IPv4 address"));
    };
    thread::Builder::new().name("bulk-server".into()).spawn(move || {
        for client in listener.incoming().flatten() {
            let exchange = thread::Builder::new().name("bulk-exchange".into()).spawn(move || {
                if let Err(error) = exchange(&client) {
                    eprintln!("serving a bulk transfer: {error}");
                }
            });
            drop(exchange);
        }
    })?;
    Ok(address)
}

/// Moves `bytes` through whatever listens at `address`, and says how long that took from the request's first byte to the
/// response's last.
///
/// # Errors
/// The connection breaks, stands still for ten seconds, or carries another number of bytes.
pub fn transfer(address: SocketAddrV4, direction: Direction, bytes: usize) -> io::Result<Duration> {
    let server = TcpStream::connect(address)?;
    server.set_nodelay(true)?;
    patient(&server)?;
    let begin = Instant::now();
    match direction {
        Direction::Up => {
            write!(&server, "POST /up HTTP/1.1\r\nHost: bulk.example\r\nContent-Length: {bytes}\r\n\r\n")?;
            send(&server, bytes)?;
            let length = head(&server)?.1;
            if length != 0 {
                return Err(io::Error::other(format!("the server answered an upload with {length} bytes")));
            }
        }
        Direction::Down => {
            write!(&server, "GET /{bytes} HTTP/1.1\r\nHost: bulk.example\r\n\r\n")?;
            let length = head(&server)?.1;
            if length != bytes {
                return Err(io::Error::other(format!("the server sends {length} bytes, not {bytes}")));
            }
            discard(&server, bytes)?;
        }
    }
    Ok(begin.elapsed())
}

fn exchange(client: &TcpStream) -> io::Result<()> {
    client.set_nodelay(true)?;
    patient(client)?;
    let (line, length) = head(client)?;
    if line.starts_with("POST ") {
        discard(client, length)?;
        (&mut &*client).write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")?;
    } else {
        let bytes = line.split(['/', ' ']).nth(2).and_then(|number| number.parse().ok());
        let bytes = bytes.ok_or_else(|| io::Error::other(format!("not a request for bytes: {line:?}")))?;
        write!(&mut &*client, "HTTP/1.1 200 OK\r\nContent-Length: {bytes}\r\n\r\n")?;
        send(client, bytes)?;
    }
    // Wait for the client to close: the relay's half-closes are not what is measured.
    (&mut &*client).read(&mut [0]).map(|_| ())
}

fn patient(socket: &TcpStream) -> io::Result<()> {
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))
}

/// First line and `Content-Length` (0 without) of a head; not a byte behind it is read.
fn head(socket: &TcpStream) -> io::Result<(String, usize)> {
    let mut reader = BufReader::with_capacity(1, socket);
    let (mut first, mut length) = (String::new(), 0);
    reader.read_line(&mut first)?;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("no whole head: {first:?}")));
        }
        if let Some(value) = line.strip_prefix("Content-Length: ") {
            length =
                value.trim().parse().map_err(|_| io::Error::other(format!("not a length: {value:?}")))?;
        }
        if line == "\r\n" {
            return Ok((first, length));
        }
    }
}

fn send(socket: &TcpStream, mut bytes: usize) -> io::Result<()> {
    let source = source()?;
    while bytes > 0 {
        let mut offset = 0;
        match sendfile(socket, &source, Some(&mut offset), bytes.min(CHUNK)) {
            Ok(sent) => bytes -= sent,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn source() -> io::Result<OwnedFd> {
    let file = memfd_create("bulk", MemfdFlags::CLOEXEC)?;
    ftruncate(&file, CHUNK as u64)?;
    Ok(file)
}

fn discard(socket: &TcpStream, mut bytes: usize) -> io::Result<()> {
    let mut buffer = vec![0_u8; CHUNK];
    while bytes > 0 {
        let most = bytes.min(CHUNK);
        match recv(socket, &mut buffer[..most], RecvFlags::TRUNC) {
            Ok((_, 0)) => {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    format!("{bytes} bytes are missing"),
                ));
            }
            Ok((_, received)) => bytes -= received,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways() {
        let address = serve().expect("listening");
        for direction in [Direction::Up, Direction::Down] {
            for bytes in [0, 1, CHUNK, 5 * CHUNK + 17] {
                transfer(address, direction, bytes)
                    .unwrap_or_else(|error| panic!("{direction:?} {bytes}: {error}"));
            }
        }
    }
}
