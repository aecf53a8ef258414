//! A connection of our own each way, before the daemon says that it is ready: one that opens with a GET, and one that
//! opens with a preflight, both on loopback in the served namespace, to sockets that only this test has.
#![forbid(unsafe_code)]

use std::{
    io::{self, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

const PATIENCE: Duration = Duration::from_secs(3);

/// The listeners of the test for one address family.
#[derive(Debug)]
pub(super) struct Stage {
    pub(super) proxy: TcpListener,
    pub(super) worker: TcpListener,
}

impl Stage {
    /// In the namespace of the calling thread.
    pub(super) fn open(address: IpAddr) -> io::Result<Self> {
        let listen = || {
            let listener = TcpListener::bind((address, 0))?;
            listener.set_nonblocking(true)?;
            Ok::<_, io::Error>(listener)
        };
        Ok(Self { proxy: listen()?, worker: listen()? })
    }

    /// Where clients connect.
    pub(super) fn address(&self) -> io::Result<SocketAddr> {
        self.proxy.local_addr()
    }

    /// Sends both, from the namespace of the calling thread, and says what went wrong.
    pub(super) fn play(&self) -> io::Result<()> {
        let preflight = "OPTIONS / HTTP/1.1\r\nHost: self-test\r\nOrigin: https://self-test\r\n\
                         Access-Control-Request-Method: GET\r\n\r\n";
        let get = "GET / HTTP/1.1\r\nHost: self-test\r\n\r\n";
        self.send(get, &self.proxy, "a GET", "the proxy's")?;
        self.send(preflight, &self.worker, "a preflight", "a worker's")
    }

    fn send(&self, request: &str, to: &TcpListener, what: &str, whose: &str) -> io::Result<()> {
        let context = |error: io::Error| io::Error::new(error.kind(), format!("{what}: {error}"));
        let address = self.address()?;
        let mut client = TcpStream::connect_timeout(&address, PATIENCE).map_err(context)?;
        client.write_all(request.as_bytes()).map_err(context)?;
        let until = Instant::now() + PATIENCE;
        let mut server = loop {
            match to.accept() {
                Ok((server, _)) => break server,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < until => {
                    thread::sleep(Duration::from_millis(1));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(context(io::Error::other(format!("it did not come to {whose} socket"))));
                }
                Err(error) => return Err(context(error)),
            }
        };
        server.set_nonblocking(false)?;
        server.set_read_timeout(Some(PATIENCE))?;
        let mut received = vec![0; request.len()];
        server.read_exact(&mut received).map_err(context)?;
        if received != request.as_bytes() || server.local_addr()? != address {
            return Err(context(io::Error::other("other bytes arrived, or at another address")));
        }
        // And back.
        server.write_all(b"ok").map_err(context)?;
        drop(server);
        client.set_read_timeout(Some(PATIENCE))?;
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).map_err(context)?;
        if answer == b"ok" { Ok(()) } else { Err(context(io::Error::other("the answer did not come back"))) }
    }
}
