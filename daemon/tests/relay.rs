//! The relay over real sockets: every byte in order both ways, ends passed on as they came, nothing left behind; and
//! before real proxies: the client's address is kept.
//!
//! What needs root (namespaces) says so and is left out elsewhere, but fails in CI.

use preflightd::{
    policy::ListenerId,
    reason::PassReason,
    relay::{Backend, Handle, Handoff, ProxyProtocol, Relay, RelayLimits, Upstream, detect},
    telemetry::RelayStats,
};
use std::{
    fs,
    io::{self, ErrorKind, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd as _,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

/// A test that waits longer than this for bytes has failed.
const PATIENCE: Duration = Duration::from_secs(20);
/// As `/proc/self/fdinfo` shows an operation that waits for its descriptor.
const IORING_OP_READ: &str = "op=22,";
const LISTENER: ListenerId = ListenerId(7);
const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\n\r\n";

/// One after the other: the tests count descriptors and share two cores.
fn alone() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What this kernel gives, and the fall-back.
fn backends() -> Vec<Backend> {
    vec![Backend::choose().expect("a backend"), Backend::Epoll]
}

fn limits() -> RelayLimits {
    RelayLimits {
        threads: 1,
        max_connections: 10_000,
        connect_timeout: Duration::from_secs(2),
        idle_timeout: Duration::ZERO,
        buffer_bytes: 64 << 10,
    }
}

/// What a worker does before the handoff.
#[derive(Clone, Copy)]
enum Before {
    /// Nothing.
    Hand,
    /// Reads up to the end of the head.
    ReadHead,
    /// Reads up to the end of what the client sends.
    ReadAll,
}

/// A relay, and in place of a worker a thread that accepts and hands over.
struct Front {
    address: SocketAddr,
    stats: Arc<RelayStats>,
    relay: Option<Relay>,
    ending: Arc<AtomicBool>,
    acceptor: Option<JoinHandle<()>>,
}

struct Options {
    backend: Backend,
    bind: &'static str,
    upstream: SocketAddr,
    protocol: ProxyProtocol,
    transparent: bool,
    limits: RelayLimits,
    workers: usize,
    before: Before,
}

impl Options {
    fn new(backend: Backend, upstream: SocketAddr) -> Self {
        Self {
            backend,
            bind: "127.0.0.1:0",
            upstream,
            protocol: ProxyProtocol::Off,
            transparent: false,
            limits: limits(),
            workers: 1,
            before: Before::Hand,
        }
    }

    fn start(self) -> Front {
        let stats = Arc::new(RelayStats::default());
        let upstream = Upstream {
            listener: LISTENER,
            name: "test".into(),
            address: self.upstream,
            proxy_protocol: self.protocol,
            transparent: self.transparent,
        };
        let (relay, handles) =
            Relay::start_on(self.backend, vec![upstream], self.limits, self.workers, stats.clone())
                .expect("the relay starts");
        assert_eq!(relay.backend(), self.backend);
        let listener = TcpListener::bind(self.bind).expect("bind");
        let address = listener.local_addr().expect("address");
        let ending = Arc::new(AtomicBool::new(false));
        let acceptor = {
            let (ending, before) = (ending.clone(), self.before);
            thread::spawn(move || accept(&listener, handles, before, &ending))
        };
        Front { address, stats, relay: Some(relay), ending, acceptor: Some(acceptor) }
    }
}

fn accept(listener: &TcpListener, mut handles: Vec<Handle>, before: Before, ending: &AtomicBool) {
    for (client, turn) in listener.incoming().zip(0..) {
        if ending.load(Ordering::SeqCst) {
            return;
        }
        let mut client = client.expect("accept");
        let (mut bytes, mut eof) = (Vec::new(), false);
        match before {
            Before::Hand => {}
            Before::ReadHead => {
                let mut byte = [0];
                while !bytes.ends_with(b"\r\n\r\n") {
                    client.read_exact(&mut byte).expect("a head");
                    bytes.push(byte[0]);
                }
            }
            Before::ReadAll => {
                client.read_to_end(&mut bytes).expect("all");
                eof = true;
            }
        }
        let mut handoff =
            Handoff { client: client.into(), listener: LISTENER, bytes, eof, reason: PassReason::NotOptions };
        let workers = handles.len();
        while let Err(back) = handles[turn % workers].push(handoff) {
            handoff = back;
            thread::yield_now();
        }
    }
}

impl Front {
    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).expect("connect to the relay's front");
        stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
        stream.set_write_timeout(Some(PATIENCE)).expect("timeout");
        stream
    }

    /// Ends the intake: the acceptor drops its handle.
    fn end_intake(&mut self) {
        if let Some(acceptor) = self.acceptor.take() {
            self.ending.store(true, Ordering::SeqCst);
            drop(TcpStream::connect(self.address));
            acceptor.join().expect("the acceptor");
        }
    }

    /// Ends all in order; every connection must have ended by itself.
    fn finish(mut self) -> Arc<RelayStats> {
        self.end_intake();
        self.relay.take().expect("a relay").join().expect("the relay's threads");
        let stats = self.stats.clone();
        assert_eq!(stats.open.load(Ordering::Relaxed), 0, "open connections at the end");
        stats
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        if let Some(relay) = &self.relay {
            relay.shutdown(Duration::ZERO);
        }
        if !thread::panicking() {
            self.end_intake();
        }
    }
}

/// Any HTTP-less upstream: runs `serve` for each connection, one after the other.
fn upstream(
    bind: &str,
    connections: usize,
    serve: impl Fn(TcpStream) + Send + 'static,
) -> (SocketAddr, JoinHandle<()>) {
    let listener = TcpListener::bind(bind).expect("bind");
    let address = listener.local_addr().expect("address");
    let thread = thread::spawn(move || {
        for _ in 0..connections {
            let (stream, _) = listener.accept().expect("accept");
            stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
            serve(stream);
        }
    });
    (address, thread)
}

fn read_all(mut stream: &TcpStream) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    match stream.read_to_end(&mut out) {
        Ok(_) => Ok(out),
        Err(e) => Err(e),
    }
}

/// Until an error: the bytes before it, and the error.
fn read_to_error(mut stream: &TcpStream) -> (usize, io::Result<()>) {
    let (mut total, mut chunk) = (0, vec![0; 64 << 10]);
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => return (total, Ok(())),
            Ok(n) => total += n,
            Err(e) => return (total, Err(e)),
        }
    }
}

/// Closes by a reset.
fn reset(stream: TcpStream) {
    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("linger");
    drop(stream);
}

/// Bytes that differ everywhere, from a seed (xorshift).
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(len);
    out
}

/// Writes in pieces of all sizes.
fn write_in_pieces(mut stream: &TcpStream, mut bytes: &[u8], seed: u64) {
    let mut state = seed | 1;
    while !bytes.is_empty() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let exponent = (state >> 40) % 19;
        let n = (1 + (state >> 45) as usize % (1 << exponent)).min(bytes.len());
        stream.write_all(&bytes[..n]).expect("write");
        bytes = &bytes[n..];
    }
}

#[test]
fn runs_on_tokio_uring_where_the_kernel_allows_it() {
    let _alone = alone();
    let disabled = fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_else(|_| "0".into());
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("kernel release");
    let major: u32 = release.split('.').next().and_then(|n| n.parse().ok()).expect("kernel major");
    let backend = Backend::choose().expect("a backend");
    if disabled.trim() != "0" || major < 6 {
        println!("kernel {release}, io_uring_disabled {disabled}: {backend}");
        return;
    }
    assert_eq!(backend, Backend::IoUring { coop_taskrun: true, single_issuer: true });
    assert_eq!(backend.to_string(), "io_uring (tokio-uring, COOP_TASKRUN, SINGLE_ISSUER)");

    // A ring for each thread; and an idle connection is two reads that wait in one of them.
    let rings = || {
        let paths =
            fs::read_dir("/proc/self/fd").expect("/proc").filter_map(|entry| Some(entry.ok()?.path()));
        paths
            .filter(|path| {
                fs::read_link(path).is_ok_and(|target| target.to_string_lossy().contains("[io_uring]"))
            })
            .map(|path| {
                let info =
                    fs::read_to_string(path.to_string_lossy().replace("/fd/", "/fdinfo/")).expect("fdinfo");
                info.lines().filter(|line| line.contains(IORING_OP_READ)).count()
            })
            .collect::<Vec<_>>()
    };
    assert_eq!(rings(), [0; 0], "before");
    let (address, served) = upstream("127.0.0.1:0", 1, |mut stream| {
        stream.write_all(b"hello").expect("write");
        drop(read_all(&stream));
    });
    let mut options = Options::new(backend, address);
    (options.limits.threads, options.workers) = (3, 4);
    let front = options.start();
    assert_eq!(rings(), [0; 3], "one for each thread");
    let mut client = front.connect();
    client.read_exact(&mut [0; 5]).expect("read");
    for _ in 0..1000 {
        if rings().iter().sum::<usize>() == 2 {
            break;
        }
        thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(rings().iter().sum::<usize>(), 2, "waiting reads");
    drop(client);
    served.join().expect("upstream");
    front.finish();
    assert_eq!(rings(), [0; 0], "after");
}

#[test]
fn falls_back_to_epoll_under_seccomp() {
    let denied = thread::spawn(|| {
        deny_io_uring();
        Backend::choose().expect("a backend")
    });
    assert_eq!(denied.join().expect("thread"), Backend::Epoll);
}

/// For the calling thread, as container runtimes do it.
fn deny_io_uring() {
    let filter = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let errno = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    let mut program = [
        filter(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        filter(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, libc::SYS_io_uring_setup as u32),
        filter(libc::BPF_RET | libc::BPF_K, 0, 0, errno),
        filter(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: 4, filter: program.as_mut_ptr() };
    // SAFETY: both calls concern only this thread; the program and its instructions outlive the call.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program), 0);
    }
}

#[test]
fn bytes_are_identical_both_ways() {
    const SIZE: usize = 50_000_000;
    let _alone = alone();
    for backend in backends() {
        let (up, down) = (Arc::new(noise(1, SIZE)), Arc::new(noise(2, SIZE)));
        let (address, served) = upstream("127.0.0.1:0", 1, {
            let (up, down) = (up.clone(), down.clone());
            move |stream| {
                thread::scope(|scope| {
                    scope.spawn(|| {
                        write_in_pieces(&stream, &down, 3);
                        stream.shutdown(Shutdown::Write).expect("shutdown");
                    });
                    assert!(read_all(&stream).expect("read") == *up, "upload differs");
                });
            }
        });
        let front = Options::new(backend, address).start();
        let client = front.connect();
        thread::scope(|scope| {
            scope.spawn(|| {
                write_in_pieces(&client, &up, 4);
                client.shutdown(Shutdown::Write).expect("shutdown");
            });
            assert!(read_all(&client).expect("read") == *down, "{backend}: download differs");
        });
        served.join().expect("upstream");
        let stats = front.finish();
        assert_eq!(stats.bytes_up.load(Ordering::Relaxed), SIZE as u64, "{backend}");
        assert_eq!(stats.bytes_down.load(Ordering::Relaxed), SIZE as u64, "{backend}");
        assert_eq!(stats.aborted.load(Ordering::Relaxed), 0, "{backend}");
    }
}

#[test]
fn half_closes_pass_both_ways() {
    let _alone = alone();
    for backend in backends() {
        // The client ends first, and still gets its answer.
        let (address, served) = upstream("127.0.0.1:0", 1, |mut stream| {
            assert_eq!(read_all(&stream).expect("to the end"), b"question");
            stream.write_all(b"answer").expect("write");
        });
        let front = Options::new(backend, address).start();
        let mut client = front.connect();
        client.write_all(b"question").expect("write");
        client.shutdown(Shutdown::Write).expect("shutdown");
        assert_eq!(read_all(&client).expect("to the end"), b"answer", "{backend}: client first");
        served.join().expect("upstream");
        front.finish();

        // The upstream ends first, and still reads what comes.
        let (address, served) = upstream("127.0.0.1:0", 1, |mut stream| {
            stream.write_all(b"greeting").expect("write");
            stream.shutdown(Shutdown::Write).expect("shutdown");
            assert_eq!(read_all(&stream).expect("to the end"), b"late");
        });
        let front = Options::new(backend, address).start();
        let mut client = front.connect();
        assert_eq!(read_all(&client).expect("to the end"), b"greeting", "{backend}: upstream first");
        client.write_all(b"late").expect("write");
        drop(client);
        served.join().expect("upstream");
        assert_eq!(front.finish().aborted.load(Ordering::Relaxed), 0, "{backend}");
    }
}

#[test]
fn bytes_already_read_go_first() {
    let _alone = alone();
    for backend in backends() {
        for (name, before) in [("a head", Before::ReadHead), ("all and the end", Before::ReadAll)] {
            let (address, served) = upstream("127.0.0.1:0", 1, |mut stream| {
                assert_eq!(read_all(&stream).expect("to the end"), [REQUEST, b"and more"].concat());
                stream.write_all(b"answer").expect("write");
            });
            let front = Options { before, ..Options::new(backend, address) }.start();
            let mut client = front.connect();
            client.write_all(REQUEST).expect("write");
            client.write_all(b"and more").expect("write");
            client.shutdown(Shutdown::Write).expect("shutdown");
            assert_eq!(read_all(&client).expect("to the end"), b"answer", "{backend}: {name}");
            served.join().expect("upstream");
            let stats = front.finish();
            let sent = (REQUEST.len() + b"and more".len()) as u64;
            assert_eq!(stats.bytes_up.load(Ordering::Relaxed), sent, "{backend}: {name}");
        }
    }
}

/// An address for a server that is started later: of this process alone, so that no other takes the port meanwhile.
fn free() -> SocketAddr {
    let [_, high, middle, low] = std::process::id().to_be_bytes();
    let ours = Ipv4Addr::new(127, 64 | high, middle, low);
    TcpListener::bind((ours, 0)).and_then(|listener| listener.local_addr()).expect("a free port")
}

/// An address on which nobody listens, nor will while this process lives: it stays bound.
fn nowhere() -> SocketAddr {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("socket");
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("a free port");
    let address = socket.local_addr().expect("its address").as_socket().expect("IPv4");
    std::mem::forget(socket);
    address
}

#[test]
fn upstream_down_is_one_502() {
    let _alone = alone();
    for backend in backends() {
        for protocol in [ProxyProtocol::Off, ProxyProtocol::Auto] {
            let front =
                Options { before: Before::ReadHead, protocol, ..Options::new(backend, nowhere()) }.start();
            let mut client = front.connect();
            // Unread bytes at the close must not turn it into a reset.
            client.write_all(&[REQUEST, &noise(5, 100_000)].concat()).expect("write");
            let answer = String::from_utf8(read_all(&client).expect("an orderly end")).expect("text");
            assert!(answer.starts_with("HTTP/1.1 502 "), "{backend}: {answer}");
            assert_eq!(answer.matches("HTTP/1.1").count(), 1, "{backend}: {answer}");
            drop(client);

            // Not HTTP: no HTTP back.
            let mut client = front.connect();
            client.write_all(b"\x16\x03\x01\r\n\r\n").expect("write");
            assert_eq!(read_all(&client).expect("an orderly end"), b"", "{backend}");
            drop(client);
            let stats = front.finish();
            assert_eq!(stats.upstream_errors.load(Ordering::Relaxed), 2, "{backend}");
            assert_eq!(stats.connections.load(Ordering::Relaxed), 2, "{backend}");
        }
    }
}

#[test]
fn over_the_limit_is_a_503() {
    let _alone = alone();
    for backend in backends() {
        let (address, served) = upstream("127.0.0.1:0", 2, |mut stream| {
            let asked = read_all(&stream).expect("to the end");
            stream.write_all(&asked).expect("write");
        });
        let mut options = Options { before: Before::ReadHead, ..Options::new(backend, address) };
        options.limits.max_connections = 1;
        let front = options.start();
        let mut first = front.connect();
        first.write_all(REQUEST).expect("write");
        let mut second = front.connect();
        second.write_all(REQUEST).expect("write");
        let answer = String::from_utf8(read_all(&second).expect("an orderly end")).expect("text");
        assert!(answer.starts_with("HTTP/1.1 503 "), "{backend}: {answer}");
        drop(second);
        first.shutdown(Shutdown::Write).expect("shutdown");
        assert_eq!(read_all(&first).expect("to the end"), REQUEST, "{backend}: the first is not touched");
        drop(first);
        // And there is room again, as soon as the relay has seen the end.
        while front.stats.open.load(Ordering::Relaxed) > 0 {
            thread::yield_now();
        }
        let mut third = front.connect();
        third.write_all(REQUEST).expect("write");
        third.shutdown(Shutdown::Write).expect("shutdown");
        assert_eq!(read_all(&third).expect("to the end"), REQUEST, "{backend}: the third");
        drop(third);
        served.join().expect("upstream");
        assert_eq!(front.finish().overloaded.load(Ordering::Relaxed), 1, "{backend}");
    }
}

#[test]
fn a_reset_of_the_upstream_reaches_the_client_after_the_bytes() {
    const SENT: usize = 3_000_000;
    let _alone = alone();
    for backend in backends() {
        // Waits until all of it has left: a reset would take back the rest.
        let (address, served) = upstream("127.0.0.1:0", 1, |mut stream| {
            stream.write_all(&noise(6, SENT)).expect("write");
            let mut go = [0];
            stream.read_exact(&mut go).expect("the client has all");
            reset(stream);
        });
        let front = Options::new(backend, address).start();
        let mut client = front.connect();
        let mut all = vec![0; SENT];
        client.read_exact(&mut all).expect("read");
        assert!(all == noise(6, SENT), "{backend}");
        client.write_all(b"!").expect("write");
        let (more, end) = read_to_error(&client);
        assert_eq!(more, 0, "{backend}");
        assert_eq!(end.expect_err("not an orderly end").kind(), ErrorKind::ConnectionReset, "{backend}");
        served.join().expect("upstream");
        assert_eq!(front.finish().aborted.load(Ordering::Relaxed), 1, "{backend}");
    }
}

#[test]
fn an_answer_before_a_reset_is_delivered() {
    let _alone = alone();
    for backend in backends() {
        // A server that answers early and closes with bytes unread: its kernel sends a reset behind the answer.
        let (address, served) = upstream("127.0.0.1:0", 1, |mut stream| {
            let mut some = [0; 1000];
            stream.read_exact(&mut some).expect("read");
            stream.write_all(b"HTTP/1.1 413 Too Large\r\n\r\n").expect("write");
        });
        let front = Options::new(backend, address).start();
        let client = front.connect();
        let (mut writer, upload) = (client.try_clone().expect("clone"), noise(7, 20_000_000));
        // Fails as soon as the reset is passed on; Linux then tells the reader of the end alone.
        let uploading = thread::spawn(move || writer.write_all(&upload));
        let mut start = [0; 12];
        (&client).read_exact(&mut start).expect("the answer");
        assert_eq!(&start, b"HTTP/1.1 413", "{backend}");
        uploading.join().expect("upload").expect_err("then the reset");
        served.join().expect("upstream");
        assert_eq!(front.finish().aborted.load(Ordering::Relaxed), 1, "{backend}");
    }
}

#[test]
fn a_reset_of_the_client_reaches_the_upstream() {
    let _alone = alone();
    for backend in backends() {
        let (address, served) = upstream("127.0.0.1:0", 1, |stream| {
            let (_, end) = read_to_error(&stream);
            assert_eq!(end.expect_err("not an orderly end").kind(), ErrorKind::ConnectionReset);
        });
        let front = Options::new(backend, address).start();
        let mut client = front.connect();
        client.write_all(b"half a requ").expect("write");
        while front.stats.bytes_up.load(Ordering::Relaxed) == 0 {
            thread::yield_now();
        }
        reset(client);
        served.join().expect("upstream");
        assert_eq!(front.finish().aborted.load(Ordering::Relaxed), 1, "{backend}");
    }
}

#[test]
fn a_slow_reader_holds_the_sender_back() {
    let _alone = alone();
    for backend in backends() {
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let wait = Mutex::new(wait);
        let (address, served) = upstream("127.0.0.1:0", 1, move |stream| {
            wait.lock().expect("lock").recv().expect("go");
            let all = read_all(&stream).expect("to the end");
            (&stream).write_all(&(all.len() as u64).to_le_bytes()).expect("write");
        });
        let front = Options::new(backend, address).start();
        let mut client = front.connect();
        // The kernel's buffers of both connections (tcp_rmem and tcp_wmem: 10 MB at most here) and one of ours.
        client.set_nonblocking(true).expect("nonblocking");
        let (chunk, mut sent, mut stuck) = (noise(8, 1 << 20), 0_u64, 0);
        while stuck < 50 {
            match client.write(&chunk) {
                Ok(n) => {
                    sent += n as u64;
                    stuck = 0;
                }
                Err(e) => {
                    assert_eq!(e.kind(), ErrorKind::WouldBlock, "{backend}");
                    stuck += 1;
                    thread::sleep(Duration::from_millis(10));
                }
            }
            assert!(sent < 100 << 20, "{backend}: nothing holds the sender back");
        }
        let inside = sent - front.stats.bytes_up.load(Ordering::Relaxed);
        assert!(inside > 0, "{backend}: the relay still reads");
        // Nothing is lost of what was taken.
        client.set_nonblocking(false).expect("blocking");
        go.send(()).expect("go");
        client.shutdown(Shutdown::Write).expect("shutdown");
        assert_eq!(read_all(&client).expect("to the end"), sent.to_le_bytes(), "{backend}");
        served.join().expect("upstream");
        front.finish();
    }
}

#[test]
fn proxy_headers_arrive_exactly() {
    const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
    let _alone = alone();
    let v4 = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let v6 = IpAddr::V6(Ipv6Addr::LOCALHOST);
    for backend in backends() {
        for (name, bind, target, upstream_bind) in [
            ("v4", "127.0.0.1:0", v4, "127.0.0.1:0"),
            ("v6", "[::1]:0", v6, "127.0.0.1:0"),
            ("v4 on a dual-stack socket", "[::]:0", v4, "[::1]:0"),
        ] {
            for protocol in [ProxyProtocol::V1, ProxyProtocol::V2] {
                let (seen, see) = std::sync::mpsc::channel();
                let (address, served) = upstream(upstream_bind, 1, move |stream| {
                    seen.send(read_all(&stream).expect("to the end")).expect("send");
                });
                let front =
                    Options { bind, protocol, before: Before::ReadHead, ..Options::new(backend, address) }
                        .start();
                let server = SocketAddr::new(target, front.address.port());
                let mut client = TcpStream::connect(server).expect("connect");
                client.write_all(REQUEST).expect("write");
                let local = client.local_addr().expect("address");
                client.shutdown(Shutdown::Write).expect("shutdown");
                let got = see.recv_timeout(PATIENCE).expect("a connection");
                let (from, to) = (local.port(), server.port());
                let header = match (protocol, target) {
                    (ProxyProtocol::V1, IpAddr::V4(ip)) => {
                        format!("PROXY TCP4 {ip} {ip} {from} {to}\r\n").into()
                    }
                    (ProxyProtocol::V1, IpAddr::V6(ip)) => {
                        format!("PROXY TCP6 {ip} {ip} {from} {to}\r\n").into()
                    }
                    (_, IpAddr::V4(ip)) => {
                        let ip = &ip.octets()[..];
                        [SIGNATURE, b"\x21\x11\0\x0c", ip, ip, &from.to_be_bytes(), &to.to_be_bytes()]
                            .concat()
                    }
                    (_, IpAddr::V6(ip)) => {
                        let ip = &ip.octets()[..];
                        [SIGNATURE, b"\x21\x21\0\x24", ip, ip, &from.to_be_bytes(), &to.to_be_bytes()]
                            .concat()
                    }
                };
                assert_eq!(got, [&header, REQUEST].concat(), "{backend}: {name}, {protocol:?}");
                drop(client);
                served.join().expect("upstream");
                front.finish();
            }
        }
    }
}

#[test]
fn an_idle_connection_ends_in_order() {
    let _alone = alone();
    for backend in backends() {
        let (address, served) = upstream("127.0.0.1:0", 1, |stream| {
            assert_eq!(read_all(&stream).expect("an orderly end"), b"");
        });
        let mut options = Options::new(backend, address);
        options.limits.idle_timeout = Duration::from_millis(200);
        let front = options.start();
        let client = front.connect();
        assert_eq!(read_all(&client).expect("an orderly end"), b"", "{backend}");
        served.join().expect("upstream");
        let stats = front.finish();
        assert_eq!(stats.idle_timeouts.load(Ordering::Relaxed), 1, "{backend}");
        assert_eq!(stats.aborted.load(Ordering::Relaxed), 0, "{backend}");
    }
}

#[test]
fn a_cut_in_the_middle_of_bytes_is_a_reset() {
    let _alone = alone();
    for backend in backends() {
        // More than fits anywhere: the relay has to hold some of it.
        let much = vec![b'x'; 100 << 20];
        let (address, served) = upstream("127.0.0.1:0", 1, move |mut stream| {
            stream.write_all(&much).expect_err("cut");
        });
        let mut options = Options::new(backend, address);
        options.limits.idle_timeout = Duration::from_secs(2);
        let front = options.start();
        let client = front.connect();
        while front.stats.idle_timeouts.load(Ordering::Relaxed) == 0 {
            thread::sleep(Duration::from_millis(10));
        }
        let (_, end) = read_to_error(&client);
        let Err(end) = end else { panic!("{backend}: an orderly end") };
        assert_eq!(end.kind(), ErrorKind::ConnectionReset, "{backend}");
        served.join().expect("upstream");
        front.finish();
    }
}

#[test]
fn shutdown_lets_connections_end_by_themselves() {
    let _alone = alone();
    for backend in backends() {
        let (address, served) = upstream("127.0.0.1:0", 1, |mut stream| {
            let mut byte = [0];
            while stream.read(&mut byte).expect("read") == 1 {
                stream.write_all(&byte).expect("write");
            }
        });
        let mut front = Options::new(backend, address).start();
        let mut client = front.connect();
        let ping = |client: &mut TcpStream| {
            let mut byte = [0];
            client.write_all(b"x").expect("write");
            client.read_exact(&mut byte).expect("read");
        };
        ping(&mut client);
        front.end_intake();
        let relay = front.relay.take().expect("a relay");
        relay.shutdown(Duration::from_hours(1));
        // Idle for a while, then still there.
        thread::sleep(Duration::from_millis(100));
        ping(&mut client);
        drop(client);
        relay.join().expect("join");
        served.join().expect("upstream");
        assert_eq!(front.stats.open.load(Ordering::Relaxed), 0, "{backend}");
        assert_eq!(front.stats.aborted.load(Ordering::Relaxed), 0, "{backend}");
    }
}

#[test]
fn the_end_of_the_grace_cuts_what_is_left() {
    let _alone = alone();
    for backend in backends() {
        let (address, served) = upstream("127.0.0.1:0", 1, |mut stream| {
            stream.write_all(b"hello").expect("write");
            drop(read_all(&stream));
        });
        let mut front = Options::new(backend, address).start();
        let client = front.connect();
        let mut hello = [0; 5];
        (&client).read_exact(&mut hello).expect("read");
        let relay = front.relay.take().expect("a relay");
        // With the handle still there: the grace ends the intake, too.
        relay.shutdown(Duration::from_millis(100));
        relay.join().expect("join");
        assert_eq!(read_all(&client).expect("an orderly end"), b"", "{backend}");
        served.join().expect("upstream");
        assert_eq!(front.stats.open.load(Ordering::Relaxed), 0, "{backend}");
    }
}

/// What every descriptor of this process is.
fn fds() -> Vec<String> {
    let mut targets: Vec<_> = fs::read_dir("/proc/self/fd")
        .expect("/proc")
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .map(|target| target.to_string_lossy().into_owned())
        .collect();
    targets.sort_unstable();
    targets
}

#[test]
fn nothing_leaks_over_thousands_of_connections() {
    const EACH: usize = 500;
    let _alone = alone();
    for backend in backends() {
        let (address, served) = upstream("127.0.0.1:0", 4 * EACH, |mut stream| {
            let mut start = [0; 4];
            match stream.read(&mut start) {
                Ok(4) if start == *b"RST!" => reset(stream),
                _ => drop(stream.write_all(b"bye")),
            }
        });
        let front = Options::new(backend, address).start();
        let down = Options { before: Before::ReadHead, ..Options::new(backend, nowhere()) }.start();
        // Both of them have begun.
        drop(down.connect().write_all(REQUEST));
        while down.stats.upstream_errors.load(Ordering::Relaxed) == 0
            || down.stats.open.load(Ordering::Relaxed) > 0
        {
            thread::yield_now();
        }
        let before = fds().len();
        for i in 0..EACH {
            let mut orderly = front.connect();
            orderly.write_all(b"x").expect("write");
            assert_eq!(read_all(&orderly).unwrap_or_else(|e| panic!("{backend} {i}: {e}")), b"bye");
            drop(front.connect());
            let gone = front.connect();
            reset(gone);
            let mut cut = front.connect();
            cut.write_all(b"RST!").expect("write");
            drop(read_to_error(&cut));
            let mut refused = down.connect();
            refused.write_all(REQUEST).expect("write");
            assert!(read_all(&refused).expect("502").starts_with(b"HTTP/1.1 502"));
        }
        while front.stats.connections.load(Ordering::Relaxed) < 4 * EACH as u64
            || front.stats.open.load(Ordering::Relaxed) + down.stats.open.load(Ordering::Relaxed) > 0
        {
            thread::yield_now();
        }
        for _ in 0..100 {
            if fds().len() <= before {
                break;
            }
            thread::sleep(Duration::from_millis(50));
        }
        assert!(fds().len() <= before, "{backend}: {} descriptors before, now {:#?}", before, fds());
        front.finish();
        down.finish();
        // A client that was gone before its handoff was looked at never reached the upstream.
        while !served.is_finished() {
            drop(TcpStream::connect(address));
        }
    }
}

/// A real proxy as a child process, with its files in a directory of its own; gone when dropped.
struct Proxy {
    child: Child,
    directory: PathBuf,
}

impl Proxy {
    /// `within`: a namespace.
    fn start(program: &str, config: &str, ready: SocketAddr, within: Option<&Namespace>) -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let directory =
            std::env::temp_dir().join(format!("preflightd-relay-{}-{number}", std::process::id()));
        fs::create_dir_all(&directory).expect("a directory");
        let file = directory.join("config");
        fs::write(&file, config.replace("DIRECTORY", directory.to_str().expect("UTF-8"))).expect("write");
        let mut command = match within {
            None => Command::new(program),
            Some(namespace) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", &namespace.0, program]);
                command
            }
        };
        if program == "haproxy" {
            command.arg("-db").arg("-f")
        } else {
            command.arg("-c")
        };
        let child = command
            .arg(&file)
            .stdout(Stdio::null())
            .stderr(fs::File::create(directory.join("stderr")).expect("a file"))
            .spawn()
            .unwrap_or_else(|e| panic!("{program} (install it: apt-get install {program}): {e}"));
        let mut proxy = Self { child, directory };
        while TcpStream::connect(ready).is_err() {
            if let Some(status) = proxy.child.try_wait().expect("wait") {
                let why = fs::read_to_string(proxy.directory.join("stderr")).unwrap_or_default();
                panic!("{program} ended with {status}: {why}");
            }
            thread::sleep(Duration::from_millis(20));
        }
        proxy
    }

    /// `servers`: what stands between the braces of `http`.
    fn nginx(servers: &str, ready: SocketAddr, within: Option<&Namespace>) -> Self {
        let config = format!(
            "daemon off; master_process off; pid DIRECTORY/pid; error_log DIRECTORY/error.log;
             events {{}}
             http {{ access_log off; client_body_temp_path DIRECTORY/body; proxy_temp_path DIRECTORY/proxy;
                     fastcgi_temp_path DIRECTORY/fastcgi; uwsgi_temp_path DIRECTORY/uwsgi;
                     scgi_temp_path DIRECTORY/scgi;
                     {servers} }}"
        );
        Self::start("nginx", &config, ready, within)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
        drop(fs::remove_dir_all(&self.directory));
    }
}

/// Status and body of a request; from a given address, if any.
fn get(server: SocketAddr, from: Option<Ipv4Addr>) -> (u16, String) {
    let socket = socket2::Socket::new(socket2::Domain::for_address(server), socket2::Type::STREAM, None);
    let socket = socket.expect("socket");
    if let Some(from) = from {
        socket.bind(&SocketAddr::from((from, 0)).into()).expect("bind");
    }
    socket.connect(&server.into()).expect("connect");
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
    stream.write_all(REQUEST).expect("write");
    let answer = read_all(&stream).expect("read");
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n").expect("a whole head");
    (head.split(' ').nth(1).and_then(|s| s.parse().ok()).expect("a status"), body.to_owned())
}

#[test]
fn the_upstream_is_asked_what_it_understands() {
    let _alone = alone();
    let [plain, expecting, through, both, backend] = std::array::from_fn(|_| free());
    let _nginx = Proxy::nginx(
        &format!(
            "server {{ listen {plain}; return 204; }}
             server {{ listen {expecting} proxy_protocol; return 204; }}
             server {{ listen {backend}; return 204; }}"
        ),
        plain,
        None,
    );
    let _haproxy = Proxy::start(
        "haproxy",
        &format!(
            "defaults\n mode http\n timeout connect 5s\n timeout client 5s\n timeout server 5s\n
             frontend through\n bind {through}\n default_backend nginx\n
             frontend both\n bind {both} accept-proxy\n default_backend nginx\n
             backend nginx\n server nginx {backend}\n"
        ),
        through,
        None,
    );
    let timeout = Duration::from_secs(5);
    for (name, address, expected) in [
        ("nginx", plain, ProxyProtocol::Off),
        ("nginx, listen … proxy_protocol", expecting, ProxyProtocol::V2),
        ("haproxy", through, ProxyProtocol::Off),
        ("haproxy, accept-proxy", both, ProxyProtocol::V2),
    ] {
        assert_eq!(detect(address, timeout).expect(name), expected, "{name}");
    }
    let down = detect(nowhere(), timeout).expect_err("down");
    assert_eq!(down.kind(), ErrorKind::ConnectionRefused);
    let (silent, served) = upstream("127.0.0.1:0", 2, drop);
    let neither = detect(silent, timeout).expect_err("not HTTP");
    assert!(neither.to_string().contains("set proxy_protocol"), "{neither}");
    served.join().expect("upstream");
}

#[test]
fn an_upstream_that_comes_up_late_is_asked_then() {
    let _alone = alone();
    for backend in backends() {
        let address = free();
        let front = Options {
            protocol: ProxyProtocol::Auto,
            before: Before::ReadHead,
            ..Options::new(backend, address)
        }
        .start();
        assert_eq!(get(front.address, None).0, 502, "{backend}: nobody to ask");
        let nginx = Proxy::nginx(
            &format!(
                "server {{ listen {address} proxy_protocol; return 200 $proxy_protocol_addr:$proxy_protocol_port; }}"
            ),
            address,
            None,
        );
        let mut client = front.connect();
        client.write_all(REQUEST).expect("write");
        let local = client.local_addr().expect("address");
        let answer = String::from_utf8(read_all(&client).expect("read")).expect("text");
        assert!(answer.ends_with(&format!("\r\n\r\n{local}")), "{backend}: {answer}");
        drop((client, nginx));
        front.finish();
    }
}

#[test]
fn nginx_decides_by_the_clients_address() {
    let _alone = alone();
    for protocol in [ProxyProtocol::Auto, ProxyProtocol::V1, ProxyProtocol::V2] {
        let [direct, behind] = std::array::from_fn(|_| free());
        let rules = "location / { empty_gif; allow 127.0.0.2; deny all; } }";
        let _nginx = Proxy::nginx(
            &format!(
                "server {{ listen {direct}; {rules}
                 server {{ listen {behind} proxy_protocol; set_real_ip_from 127.0.0.1;
                           real_ip_header proxy_protocol; {rules}"
            ),
            direct,
            None,
        );
        let front =
            Options { protocol, before: Before::ReadHead, ..Options::new(backends()[0], behind) }.start();
        for (client, expected) in [([127, 0, 0, 2], 200), ([127, 0, 0, 3], 403), ([127, 0, 0, 1], 403)] {
            let client = Some(client.into());
            assert_eq!(get(direct, client).0, expected, "{client:?} directly");
            assert_eq!(get(front.address, client).0, expected, "{client:?} by {protocol:?}");
        }
        front.finish();
    }
}

/// A network namespace of this test alone; gone when dropped.
struct Namespace(String);

impl Namespace {
    fn new(kind: &str) -> Self {
        let this = Self(format!("pfd-relay-{kind}-{}", std::process::id()));
        ip(&["netns", "add", &this.0]);
        this.ip(&["link", "set", "lo", "up"]);
        this
    }

    fn ip(&self, arguments: &[&str]) {
        ip(&[&["-n", &self.0], arguments].concat());
    }

    /// Runs `work` on a thread inside; threads and sockets that it makes are inside, too.
    fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                let namespace = fs::File::open(format!("/run/netns/{}", self.0)).expect("a namespace");
                let kind = rustix::thread::LinkNameSpaceType::Network;
                rustix::thread::move_into_link_name_space(namespace.as_fd(), Some(kind)).expect("enter");
                work()
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(Command::new("ip").args(["netns", "del", &self.0]).status());
    }
}

fn ip(arguments: &[&str]) {
    let done =
        Command::new("ip").args(arguments).output().expect("ip (install it: apt-get install iproute2)");
    assert!(done.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
}

/// Tests in namespaces need root: left out elsewhere, but not in CI.
fn may_make_namespaces() -> bool {
    if rustix::process::geteuid().is_root() {
        return true;
    }
    assert!(
        std::env::var_os("CI").is_none(),
        "this test needs root to make network namespaces: run CI as root"
    );
    println!("left out: it needs root to make network namespaces");
    false
}

/// A client's host and a node, joined by a veth; on the node an nginx that decides by address.
#[test]
fn transparent_keeps_address_and_port() {
    let _alone = alone();
    if !may_make_namespaces() {
        return;
    }
    let (client, node) = (Namespace::new("client"), Namespace::new("node"));
    client.ip(&["link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", &node.0]);
    for (namespace, last) in [(&client, 1), (&node, 2)] {
        namespace.ip(&["addr", "add", &format!("10.77.0.{last}/24"), "dev", "eth0"]);
        namespace.ip(&["addr", "add", &format!("fd77::{last}/64"), "dev", "eth0", "nodad"]);
        namespace.ip(&["link", "set", "eth0", "up"]);
    }
    client.ip(&["addr", "add", "10.77.0.3/24", "dev", "eth0"]);
    for (name, bind, upstream_bind, server) in [
        ("v4", "10.77.0.2:8000", "127.0.0.1:8080", IpAddr::from([10, 77, 0, 2])),
        ("v4 on a dual-stack socket", "[::]:8000", "127.0.0.1:8080", IpAddr::from([10, 77, 0, 2])),
        ("v6", "[fd77::2]:8000", "[::1]:8080", "fd77::2".parse().expect("an address")),
    ] {
        let start = |limits| {
            node.run(|| {
                Options {
                    bind,
                    transparent: true,
                    before: Before::ReadHead,
                    limits,
                    ..Options::new(backends()[0], upstream_bind.parse().expect("an address"))
                }
                .start()
            })
        };
        let (seen, see) = std::sync::mpsc::channel();
        let (_, served) = node.run(|| {
            upstream(upstream_bind, 2, move |mut stream| {
                seen.send(stream.peer_addr().expect("address")).expect("send");
                drop(read_all(&stream));
                stream.write_all(b"answer").expect("write");
            })
        });

        // Without the routing the answers are lost: an error, not the node's own address.
        let front = start(RelayLimits { connect_timeout: Duration::from_millis(300), ..limits() });
        let port = front.address.port();
        let (status, body) = client.run(|| get(SocketAddr::new(server, port), None));
        assert_eq!(status, 502, "{name}: {body}");
        node.run(|| front.finish());

        let family = if server.is_ipv4() { "-4" } else { "-6" };
        let (local, all) = if server.is_ipv4() { ("127.0.0.1", "0.0.0.0/0") } else { ("::1", "::/0") };
        let rule = ["from", local, "ipproto", "tcp", "sport", "8080", "lookup", "123"];
        let route = ["local", all, "dev", "lo", "table", "123"];
        node.ip(&[&[family, "rule", "add"], &rule[..]].concat());
        node.ip(&[&[family, "route", "add"], &route[..]].concat());
        let front = start(limits());
        let expected = client.run(|| {
            let mut stream = TcpStream::connect(SocketAddr::new(server, port)).expect("connect");
            stream.write_all(REQUEST).expect("write");
            stream.shutdown(Shutdown::Write).expect("shutdown");
            assert_eq!(read_all(&stream).expect("read"), b"answer", "{name}");
            stream.local_addr().expect("address")
        });
        assert_eq!(see.recv_timeout(PATIENCE).expect("a connection"), expected, "{name}");
        // A client on the node itself holds its port: only the address is kept.
        let local = node.run(|| {
            let stream = TcpStream::connect(SocketAddr::new(server, port)).expect("connect");
            (&stream).write_all(REQUEST).expect("write");
            stream.shutdown(Shutdown::Write).expect("shutdown");
            assert_eq!(read_all(&stream).expect("read"), b"answer", "{name}: on the node");
            stream.local_addr().expect("address")
        });
        assert_eq!(see.recv_timeout(PATIENCE).expect("a connection").ip(), local.ip(), "{name}: on the node");
        served.join().expect("upstream");

        if name == "v4" {
            // The same verdict directly and by the relay.
            let nginx = node.run(|| {
                let rules = "location / { empty_gif; allow 10.77.0.1; deny all; } }";
                let servers = format!("server {{ listen 10.77.0.2:8081; listen {upstream_bind}; {rules}");
                Proxy::nginx(&servers, upstream_bind.parse().expect("an address"), Some(&node))
            });
            for (from, expected) in [([10, 77, 0, 1], 200), ([10, 77, 0, 3], 403)] {
                for port in [8081, port] {
                    let (status, _) = client.run(|| get(SocketAddr::new(server, port), Some(from.into())));
                    assert_eq!(status, expected, "{from:?} at port {port}");
                }
            }
            drop(nginx);
        }
        node.run(|| front.finish());
        node.ip(&[&[family, "rule", "del"], &rule[..]].concat());
        node.ip(&[&[family, "route", "del"], &route[..]].concat());
    }
}

#[test]
fn transparent_without_the_capability_says_what_to_do() {
    let _alone = alone();
    let refused = thread::spawn(|| {
        // Only this thread loses it.
        let none = rustix::thread::CapabilitySets {
            effective: rustix::thread::CapabilitySet::empty(),
            permitted: rustix::thread::CapabilitySet::empty(),
            inheritable: rustix::thread::CapabilitySet::empty(),
        };
        rustix::thread::set_capabilities(None, none).expect("drop capabilities");
        let upstream = Upstream {
            listener: LISTENER,
            name: "web".into(),
            address: "127.0.0.1:8080".parse().expect("an address"),
            proxy_protocol: ProxyProtocol::Off,
            transparent: true,
        };
        Relay::start(vec![upstream], limits(), 1, Arc::default()).map(drop).expect_err("refused").to_string()
    });
    let message = refused.join().expect("thread");
    for part in [
        "\"web\"",
        "CAP_NET_ADMIN",
        "ip rule add from 127.0.0.1 ipproto tcp sport 8080 lookup 123",
        "ip route add local 0.0.0.0/0 dev lo table 123",
    ] {
        assert!(message.contains(part), "{part:?} is missing: {message}");
    }
}
