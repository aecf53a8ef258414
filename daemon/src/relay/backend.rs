//! What drives the sockets: tokio-uring, or plain tokio (epoll) where the kernel has no io_uring for us. The choice is
//! made once; the rest of the relay sees one `Socket`.

use std::{
    fmt, io,
    net::Shutdown,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};
use tokio_uring::buf::BoundedBuf;

/// Submission queue entries per thread; every direction has at most one operation in flight.
const ENTRIES: u32 = 1024;
/// Completion queue entries per thread; beyond, the kernel keeps completions until there is room.
const COMPLETIONS: u32 = 8 * ENTRIES;

/// What drives relayed connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// io_uring by tokio-uring (kernel 5.7). DEFER_TASKRUN is never used: tokio-uring hangs with it.
    IoUring {
        /// IORING_SETUP_COOP_TASKRUN (kernel 5.19).
        coop_taskrun: bool,
        /// IORING_SETUP_SINGLE_ISSUER (kernel 6.0).
        single_issuer: bool,
    },
    /// epoll by tokio.
    Epoll,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::IoUring { coop_taskrun, single_issuer } => {
                f.write_str("io_uring (tokio-uring")?;
                f.write_str(if *coop_taskrun { ", COOP_TASKRUN" } else { "" })?;
                f.write_str(if *single_issuer { ", SINGLE_ISSUER)" } else { ")" })
            }
            Self::Epoll => f.write_str("epoll (tokio)"),
        }
    }
}

impl Backend {
    /// Asks the kernel, by making a small ring with the best flags that it takes.
    ///
    /// # Errors
    /// The kernel has io_uring but gives no ring for another reason than that we may not have one.
    pub fn choose() -> io::Result<Self> {
        let mut refusal = None;
        for (coop_taskrun, single_issuer) in [(true, true), (true, false), (false, false)] {
            let mut ring = io_uring::IoUring::<io_uring::squeue::Entry>::builder();
            if coop_taskrun {
                ring.setup_coop_taskrun();
            }
            if single_issuer {
                ring.setup_single_issuer();
            }
            match ring.build(8) {
                // Without it (before 5.7) every read that has to wait holds a kernel thread.
                Ok(ring) if !ring.params().is_feature_fast_poll() => {
                    tracing::warn!(
                        "the relay runs on epoll: this kernel's io_uring is too old (5.7 is needed)"
                    );
                    return Ok(Self::Epoll);
                }
                Ok(_) => return Ok(Self::IoUring { coop_taskrun, single_issuer }),
                Err(e) => match e.raw_os_error() {
                    Some(libc::EINVAL) => refusal = Some(e),
                    Some(libc::ENOSYS | libc::EPERM | libc::EACCES) => {
                        tracing::warn!(
                            error = %e,
                            "the relay runs on epoll: io_uring is not to be had here (kernel.io_uring_disabled, \
                             a seccomp profile, or a kernel without it)"
                        );
                        return Ok(Self::Epoll);
                    }
                    _ => {
                        let why = format!(
                            "cannot make an io_uring for the relay: {e}; raise RLIMIT_MEMLOCK or RLIMIT_NOFILE"
                        );
                        return Err(io::Error::new(e.kind(), why));
                    }
                },
            }
        }
        let e = refusal.unwrap_or_else(|| io::Error::from_raw_os_error(libc::EINVAL));
        Err(io::Error::new(
            e.kind(),
            format!("the kernel refuses an io_uring for the relay whatever its flags: {e}"),
        ))
    }
}

/// One thread's runtime.
pub(super) enum Runtime {
    Uring(tokio_uring::Runtime),
    Epoll(tokio::runtime::Runtime),
}

impl Runtime {
    /// On the calling thread: with SINGLE_ISSUER only the thread that made a ring may submit to it.
    pub(super) fn new(backend: Backend) -> io::Result<Self> {
        match backend {
            Backend::IoUring { coop_taskrun, single_issuer } => {
                let mut ring = tokio_uring::uring_builder();
                ring.setup_cqsize(COMPLETIONS);
                if coop_taskrun {
                    ring.setup_coop_taskrun();
                }
                if single_issuer {
                    ring.setup_single_issuer();
                }
                let mut builder = tokio_uring::builder();
                tokio_uring::Runtime::new(builder.entries(ENTRIES).uring_builder(&ring)).map(Self::Uring)
            }
            Backend::Epoll => {
                tokio::runtime::Builder::new_current_thread().enable_all().build().map(Self::Epoll)
            }
        }
    }

    pub(super) fn block_on<F: Future>(&self, future: F) -> F::Output {
        match self {
            Self::Uring(runtime) => runtime.block_on(future),
            Self::Epoll(runtime) => tokio::task::LocalSet::new().block_on(runtime, future),
        }
    }
}

/// A connected TCP socket. Closed when it and its operations in flight are gone.
pub(super) enum Socket {
    Uring(tokio_uring::net::TcpStream),
    Epoll(tokio::net::TcpStream),
}

impl Socket {
    /// Inside the runtime of the same backend.
    pub(super) fn adopt(backend: Backend, socket: socket2::Socket) -> io::Result<Self> {
        match backend {
            Backend::IoUring { .. } => {
                // io_uring waits by itself only on a blocking socket: on the other kind it says EAGAIN.
                socket.set_nonblocking(false)?;
                Ok(Self::Uring(tokio_uring::net::TcpStream::from_std(socket.into())))
            }
            Backend::Epoll => {
                socket.set_nonblocking(true)?;
                tokio::net::TcpStream::from_std(socket.into()).map(Self::Epoll)
            }
        }
    }

    /// Reads into the empty `buffer`, at most its capacity; 0 is the end.
    pub(super) async fn read(&self, mut buffer: Vec<u8>) -> (io::Result<usize>, Vec<u8>) {
        debug_assert!(buffer.is_empty() && buffer.capacity() > 0);
        match self {
            Self::Uring(stream) => stream.read(buffer).await,
            Self::Epoll(stream) => loop {
                if let Err(e) = stream.readable().await {
                    return (Err(e), buffer);
                }
                match stream.try_read_buf(&mut buffer) {
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                    result => return (result, buffer),
                }
            },
        }
    }

    /// Writes `buffer[from..]`, or the beginning of it.
    pub(super) async fn write(&self, buffer: Vec<u8>, from: usize) -> (io::Result<usize>, Vec<u8>) {
        match self {
            // An OP_WRITE has no MSG_NOSIGNAL: SIGPIPE is ignored in every Rust program.
            Self::Uring(stream) => {
                let (result, slice) = stream.write(buffer.slice(from..)).submit().await;
                (result, slice.into_inner())
            }
            Self::Epoll(stream) => loop {
                if let Err(e) = stream.writable().await {
                    return (Err(e), buffer);
                }
                match stream.try_write(&buffer[from..]) {
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                    result => return (result, buffer),
                }
            },
        }
    }

    /// Ends one or both directions; what has been written is still sent. A read in flight returns 0.
    pub(super) fn shutdown(&self, how: Shutdown) {
        // Fails only on a connection that is already gone.
        let _ = socket2::SockRef::from(&self).shutdown(how);
    }

    /// Resets the connection at once (connect(2): AF_UNSPEC dissolves the association); operations in flight end.
    pub(super) fn reset(&self) {
        // Fails only on a connection that is already gone.
        let _ = rustix::net::connect_unspec(self);
    }

    /// All that was written has reached the peer's kernel, or can no longer.
    pub(super) fn is_drained(&self) -> bool {
        let mut unsent: libc::c_int = 0;
        // SAFETY: SIOCOUTQ (the same number as TIOCOUTQ) writes one int, and `unsent` is one.
        let result = unsafe { libc::ioctl(self.as_fd().as_raw_fd(), libc::TIOCOUTQ, &raw mut unsent) };
        result != 0 || unsent == 0
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            // SAFETY: the stream owns this descriptor, and closes it no sooner than it is dropped.
            Self::Uring(stream) => unsafe { BorrowedFd::borrow_raw(stream.as_raw_fd()) },
            Self::Epoll(stream) => stream.as_fd(),
        }
    }
}
