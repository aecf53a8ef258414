//! The floor: what answering costs at least on this machine. One thread, raw io_uring set up as well as we know how (direct
//! descriptors, one-shot receive, linked send → close, deferred accept), httparse, one fixed answer, no policy.
//!
//! `bench-floor ADDRESS ORIGIN`

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use socket2::{Domain, Protocol, Socket, Type};
use std::{
    env, io,
    net::SocketAddrV4,
    os::fd::{AsRawFd as _, RawFd},
    process::ExitCode,
};

const CONNECTIONS: usize = 4096;
const BUFFER: usize = 4096;
/// User data of the accept; below it stand connection numbers, with what was done in the upper half.
const ACCEPT: u64 = u64::MAX;
const RECEIVE: u64 = 0;
const SEND: u64 = 1 << 32;
const CLOSE: u64 = 2 << 32;

fn main() -> ExitCode {
    let arguments: Vec<_> = env::args().skip(1).collect();
    let parsed = match arguments.as_slice() {
        [address, origin] => address.parse::<SocketAddrV4>().ok().map(|address| (address, origin)),
        _ => None,
    };
    let Some((address, origin)) = parsed else {
        eprintln!("usage: bench-floor ADDRESS:PORT ORIGIN");
        return ExitCode::from(2);
    };
    match listen(address).and_then(|listener| Floor::new(listener.as_raw_fd(), origin)?.serve()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-floor on {address}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn listen(address: SocketAddrV4) -> io::Result<Socket> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.set_tcp_nodelay(true)?;
    let seconds: libc::c_int = 1;
    // SAFETY: the descriptor is open, and the option's value is the int that tcp(7) asks for.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_DEFER_ACCEPT,
            (&raw const seconds).cast(),
            size_of_val(&seconds) as libc::socklen_t,
        )
    };
    if set != 0 {
        return Err(io::Error::last_os_error());
    }
    socket.bind(&address.into())?;
    socket.listen(4096)?;
    Ok(socket)
}

struct Floor {
    ring: IoUring,
    listener: RawFd,
    /// One buffer for each connection; allocated once and never moved, as the kernel writes into it.
    buffers: Vec<[u8; BUFFER]>,
    filled: Vec<usize>,
    keep_alive: Vec<u8>,
    close: Vec<u8>,
}

impl Floor {
    fn new(listener: RawFd, origin: &str) -> io::Result<Self> {
        let ring =
            IoUring::builder().setup_single_issuer().setup_defer_taskrun().setup_cqsize(8192).build(2048)?;
        ring.submitter().register_files_sparse(CONNECTIONS as u32)?;
        let answer = |connection: &str| {
            format!(
                "HTTP/1.1 204 No Content\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\nAccess-Control-Allow-Origin: {origin}\r\n\
                 Access-Control-Allow-Credentials: true\r\nAccess-Control-Allow-Methods: GET, PUT, POST, PATCH, DELETE\r\n\
                 Access-Control-Allow-Headers: authorization, content-type, x-requested-with\r\n\
                 Access-Control-Max-Age: 7200\r\n\
                 Vary: Origin, Access-Control-Request-Method, Access-Control-Request-Headers\r\n{connection}\r\n"
            )
            .into_bytes()
        };
        Ok(Self {
            ring,
            listener,
            buffers: vec![[0; BUFFER]; CONNECTIONS],
            filled: vec![0; CONNECTIONS],
            keep_alive: answer(""),
            close: answer("Connection: close\r\n"),
        })
    }

    fn serve(mut self) -> io::Result<()> {
        self.accept()?;
        let mut completions = Vec::with_capacity(8192);
        loop {
            match self.ring.submit_and_wait(1) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
            completions.extend(self.ring.completion());
            for completion in completions.drain(..) {
                self.complete(&completion)?;
            }
        }
    }

    fn complete(&mut self, completion: &cqueue::Entry) -> io::Result<()> {
        let (data, result) = (completion.user_data(), completion.result());
        let connection = (data & u64::from(u32::MAX)) as usize;
        if data == ACCEPT {
            if !cqueue::more(completion.flags()) {
                self.accept()?;
            }
            // Out of connections or a client that went away: the next accept may do better.
            let Ok(accepted) = usize::try_from(result) else { return Ok(()) };
            self.filled[accepted] = 0;
            return self.receive(accepted);
        }
        match data & !u64::from(u32::MAX) {
            RECEIVE => match usize::try_from(result) {
                Ok(0) | Err(_) => self.end(connection),
                Ok(received) => {
                    self.filled[connection] += received;
                    self.answer(connection)
                }
            },
            // The client is gone: the receive or close behind it ends the connection.
            _ => Ok(()),
        }
    }

    fn answer(&mut self, connection: usize) -> io::Result<()> {
        let filled = self.filled[connection];
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut request = httparse::Request::new(&mut headers);
        match request.parse(&self.buffers[connection][..filled]) {
            Ok(httparse::Status::Complete(length)) if length == filled => {}
            Ok(httparse::Status::Partial) if filled < BUFFER => return self.receive(connection),
            // No pipelining here.
            _ => return self.end(connection),
        }
        let close = request.headers.iter().any(|header| {
            header.name.eq_ignore_ascii_case("connection") && header.value.eq_ignore_ascii_case(b"close")
        });
        self.filled[connection] = 0;
        let answer = if close { &self.close } else { &self.keep_alive };
        // WAITALL: the kernel itself goes on after a short send. MORE: the FIN goes out with the answer.
        let more = if close { libc::MSG_MORE } else { 0 };
        let send = opcode::Send::new(fixed(connection), answer.as_ptr(), answer.len() as u32)
            .flags(libc::MSG_NOSIGNAL | libc::MSG_WAITALL | more)
            .build()
            .user_data(SEND | connection as u64)
            .flags(squeue::Flags::SKIP_SUCCESS);
        if close {
            self.push(&send.flags(squeue::Flags::IO_LINK | squeue::Flags::SKIP_SUCCESS))?;
            self.end(connection)
        } else {
            self.push(&send)?;
            self.receive(connection)
        }
    }

    fn accept(&mut self) -> io::Result<()> {
        let accept = opcode::AcceptMulti::new(types::Fd(self.listener)).allocate_file_index(true).build();
        self.push(&accept.user_data(ACCEPT))
    }

    fn receive(&mut self, connection: usize) -> io::Result<()> {
        let free = &mut self.buffers[connection][self.filled[connection]..];
        let receive = opcode::Recv::new(fixed(connection), free.as_mut_ptr(), free.len() as u32);
        let receive = receive.build().user_data(RECEIVE | connection as u64);
        self.push(&receive)
    }

    fn end(&mut self, connection: usize) -> io::Result<()> {
        let close = opcode::Close::new(fixed(connection)).build();
        self.push(&close.user_data(CLOSE | connection as u64).flags(squeue::Flags::SKIP_SUCCESS))
    }

    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: the entries point into `buffers`, `keep_alive` and `close`, which live, unmoved, as long as the
            // ring; a connection has one receive at a time, so its buffer has one writer.
            match unsafe { self.ring.submission().push(entry) } {
                Ok(()) => return Ok(()),
                Err(_) => self.ring.submit()?,
            };
        }
    }
}

fn fixed(connection: usize) -> types::Fixed {
    types::Fixed(connection as u32)
}
