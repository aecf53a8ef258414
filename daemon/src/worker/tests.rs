//! Both engines over real sockets, with a real relay and upstream behind them.

use super::{
    ConnectionLimits, Engine, EngineChoice, Features, Serves, WorkerListener, WorkerSetup, Workers, listen,
    testing::{GET, HEAD_LIMITS, REQUEST, request, table},
};
use crate::{
    policy::ListenerId,
    publish::Publisher,
    relay::{ProxyProtocol, Relay, RelayLimits, Upstream},
    telemetry::{RelayStats, WorkerStats},
};
use rustix::net::{AddressFamily, SocketType, sockopt};
use std::{
    io::{self, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::OwnedFd,
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

/// All engines, io_uring also as older kernels have it.
fn engines() -> impl Iterator<Item = Engine> {
    let features = Features::probe().expect("io_uring");
    let older = features.of_older_kernels().map(Engine::Uring);
    [Engine::Uring(features), Engine::Epoll].into_iter().chain(older)
}

/// Nothing here takes so long unless it hangs.
const PATIENCE: Duration = Duration::from_secs(20);

const LIMITS: ConnectionLimits = ConnectionLimits {
    head: HEAD_LIMITS,
    header_timeout: PATIENCE,
    idle_timeout: PATIENCE,
    send_timeout: PATIENCE,
    max_connections: 512,
};

/// Running workers and what is behind them.
struct Site {
    engine: Engine,
    address: SocketAddr,
    publisher: Publisher,
    stats: Arc<WorkerStats>,
    workers: Workers,
    upstream: Option<(Relay, mpsc::Receiver<Vec<u8>>)>,
}

impl Site {
    /// One worker; `upstream`: with one that records what each connection brings and answers it at its end.
    fn start(engine: Engine, limits: ConnectionLimits, upstream: bool) -> Self {
        let socket = listen::open("127.0.0.1:0".parse().expect("address")).expect("listen");
        Self::start_on(socket, engine, limits, upstream)
    }

    fn start_on(socket: OwnedFd, engine: Engine, limits: ConnectionLimits, upstream: bool) -> Self {
        let address = TcpListener::from(socket.try_clone().expect("clone")).local_addr().expect("address");
        let (publisher, tables) = Publisher::new(1, Arc::new(table(1))).expect("publisher");
        let stats = Arc::new(WorkerStats::new(8));
        let (mut relay, mut handle) = (None, None);
        if upstream {
            let (address, recorded) = recording_upstream();
            let (running, handles) = start_relay(address);
            relay = Some((running, recorded));
            handle = handles.into_iter().next();
        }
        let serves = if upstream { Serves::BeforeProxy } else { Serves::Alone };
        let listener = WorkerListener { id: ListenerId(0), socket, serves };
        let setup = WorkerSetup {
            index: 0,
            cpu: None,
            listeners: vec![listener],
            tables: tables.into_iter().next().expect("one"),
            relay: handle,
            stats: Arc::clone(&stats),
            sampler: None,
        };
        let workers = Workers::start_on(engine, vec![setup], limits).expect("workers");
        Self { engine, address, publisher, stats, workers, upstream: relay }
    }

    fn connect(&self) -> TcpStream {
        connect(self.address)
    }

    /// Ends it; the worker must have counted an end for each beginning.
    fn stop(self) {
        self.workers.shutdown(PATIENCE);
        self.workers.join().expect("workers");
        let ended = self.stats.closed.get() + self.stats.handed_over.get();
        assert_eq!(self.stats.accepted.get(), ended, "{:?}", self.engine);
        if let Some((relay, _)) = self.upstream {
            relay.shutdown(PATIENCE);
            relay.join().expect("relay");
        }
    }
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).expect("connect");
    stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
    stream
}

fn recording_upstream() -> (SocketAddr, mpsc::Receiver<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("upstream");
    let address = listener.local_addr().expect("address");
    let (record, recorded) = mpsc::channel();
    thread::spawn(move || {
        for client in listener.incoming() {
            let mut client = client.expect("accept");
            let record = record.clone();
            thread::spawn(move || {
                let mut bytes = Vec::new();
                let _ = client.read_to_end(&mut bytes);
                let _ = client.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
                let _ = record.send(bytes);
            });
        }
    });
    (address, recorded)
}

fn start_relay(address: SocketAddr) -> (Relay, Vec<crate::relay::Handle>) {
    let upstream = Upstream {
        listener: ListenerId(0),
        name: "test".into(),
        address,
        proxy_protocol: ProxyProtocol::Off,
        transparent: false,
    };
    let limits = RelayLimits {
        threads: 1,
        max_connections: 1000,
        connect_timeout: PATIENCE,
        idle_timeout: PATIENCE,
        buffer_bytes: 16 * 1024,
    };
    Relay::start(vec![upstream], limits, 1, Arc::new(RelayStats::default())).expect("relay")
}

/// Reads one response head (none here has a body but the errors, which end the connection).
fn response(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        if let Err(error) = stream.read_exact(&mut byte) {
            panic!("{error} after {:?}", String::from_utf8_lossy(&head));
        }
        head.push(byte[0]);
    }
    String::from_utf8(head).expect("text")
}

fn exchange(stream: &mut TcpStream, bytes: &[u8]) -> String {
    stream.write_all(bytes).expect("send");
    response(stream)
}

fn rest(stream: &mut TcpStream) -> io::Result<String> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    Ok(String::from_utf8(bytes).expect("text"))
}

fn is_allowed(response: &str) -> bool {
    response.starts_with("HTTP/1.1 204 ")
        && response.contains("Access-Control-Allow-Origin: https://app.example\r\n")
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    for _ in 0..2000 {
        if done() {
            return;
        }
        thread::sleep(PATIENCE / 2000);
    }
    panic!("waited in vain for {what}");
}

#[test]
fn answers_keep_alive_and_close() {
    for engine in engines() {
        let site = Site::start(engine, LIMITS, false);
        let mut client = site.connect();
        for _ in 0..100 {
            assert!(is_allowed(&exchange(&mut client, REQUEST)), "{engine:?}");
        }
        let last = exchange(&mut client, &request("Connection: close\r\n"));
        assert!(is_allowed(&last) && last.contains("Connection: close\r\n"), "{engine:?}: {last}");
        assert_eq!(rest(&mut client).expect("a clean end"), "", "{engine:?}");
        site.stop();
    }
}

#[test]
fn pipelined_in_order_then_the_upstreams() {
    for engine in engines() {
        let site = Site::start(engine, LIMITS, true);
        let mut client = site.connect();
        let body = vec![b'x'; 200_000];
        client.write_all(&[&REQUEST.repeat(300), GET, &body].concat()).expect("send");
        client.shutdown(Shutdown::Write).expect("shutdown");
        let all = rest(&mut client).expect("all answers");
        assert_eq!(all.matches("HTTP/1.1 204 ").count(), 300, "{engine:?}");
        assert!(all.ends_with("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"), "{engine:?}");
        let recorded = site.upstream.as_ref().expect("upstream").1.recv_timeout(PATIENCE).expect("recorded");
        assert!(recorded == [GET, &body].concat(), "{engine:?}: other bytes");
        site.stop();
    }
}

#[test]
fn a_cut_off_head_and_the_end_of_file_reach_the_upstream() {
    for engine in engines() {
        let site = Site::start(engine, LIMITS, true);
        for len in [1, 8, 40, REQUEST.len() - 1] {
            let mut client = site.connect();
            client.write_all(&REQUEST[..len]).expect("send");
            client.shutdown(Shutdown::Write).expect("shutdown");
            assert!(rest(&mut client).expect("response").starts_with("HTTP/1.1 200 "), "{engine:?}, {len}");
            let recorded =
                site.upstream.as_ref().expect("upstream").1.recv_timeout(PATIENCE).expect("recorded");
            assert_eq!(recorded, &REQUEST[..len], "{engine:?}, {len}");
        }
        site.stop();
    }
}

/// A close with unread bytes is a reset, which takes the answer along. With pipelined bytes, with a body on its way.
#[test]
fn no_reset_eats_the_last_answer() {
    for engine in engines() {
        let site = Site::start(engine, LIMITS, false);
        for i in 0..50 {
            let mut client = site.connect();
            let close = request("Connection: close\r\n");
            client.write_all(&[&close, &REQUEST.repeat(100)[..]].concat()).expect("send");
            let all = rest(&mut client).unwrap_or_else(|error| panic!("{engine:?}, {i}: {error}"));
            assert!(is_allowed(&all) && all.matches("HTTP/1.1").count() == 1, "{engine:?}, {i}");

            let mut client = site.connect();
            client.write_all(b"POST / HTTP/1.1\r\nContent-Length: 100000\r\n\r\n").expect("send");
            thread::sleep(Duration::from_millis(1));
            client.write_all(&vec![b'x'; 100_000]).unwrap_or_else(|error| panic!("{engine:?}, {i}: {error}"));
            let all = rest(&mut client).unwrap_or_else(|error| panic!("{engine:?}, {i}: {error}"));
            assert!(all.starts_with("HTTP/1.1 421 "), "{engine:?}, {i}: {all}");
        }
        site.stop();
    }
}

#[test]
fn timeouts_end_what_hangs() {
    let short = Duration::from_millis(200);
    for engine in engines() {
        let limits =
            ConnectionLimits { header_timeout: short, idle_timeout: short, send_timeout: short, ..LIMITS };
        let site = Site::start(engine, limits, true);
        let mut silent = site.connect();
        let mut spoken = site.connect();
        assert!(is_allowed(&exchange(&mut spoken, REQUEST)), "{engine:?}");
        let mut begun = site.connect();
        begun.write_all(&REQUEST[..50]).expect("send");
        assert!(rest(&mut begun).expect("408").starts_with("HTTP/1.1 408 "), "{engine:?}");
        assert_eq!(rest(&mut silent).expect("end"), "", "{engine:?}");
        assert_eq!(rest(&mut spoken).expect("end"), "", "{engine:?}");
        assert_eq!(site.stats.header_timeouts.get(), 1, "{engine:?}");
        assert_eq!(site.stats.idle_timeouts.get(), 2, "{engine:?}");
        site.stop();
    }
}

#[test]
fn a_client_that_does_not_read_is_not_read_from_and_then_closed() {
    for engine in engines() {
        let limits = ConnectionLimits { send_timeout: Duration::from_millis(500), ..LIMITS };
        let site = Site::start(engine, limits, false);
        let mut client = site.connect();
        client.set_write_timeout(Some(PATIENCE)).expect("timeout");
        // Much more than all buffers in between: it ends with an error once the worker closes.
        let many = REQUEST.repeat(1000);
        let sent = (0..10_000).find_map(|_| client.write_all(&many).err());
        let kind = sent.expect("an end").kind();
        assert!(
            matches!(kind, io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe),
            "{engine:?}: {kind}"
        );
        assert_eq!(site.stats.send_timeouts.get(), 1, "{engine:?}");
        site.stop();
    }
}

/// With the small buffers at both ends, answers go out in many short sends; a linked close must not cut them.
#[test]
fn a_slow_reader_gets_all_answers_before_the_close() {
    for engine in engines() {
        let site = Site::start(engine, LIMITS, false);
        let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).expect("socket");
        sockopt::set_socket_recv_buffer_size(&socket, 2048).expect("buffer");
        rustix::net::connect(&socket, &site.address).expect("connect");
        let mut client = TcpStream::from(socket);
        client.set_read_timeout(Some(PATIENCE)).expect("timeout");
        let mut sender = client.try_clone().expect("clone");
        let sender = thread::spawn(move || {
            let all = [REQUEST.repeat(50_000), request("Connection: close\r\n")].concat();
            sender.write_all(&all).expect("send");
        });
        // Everything is full by then.
        thread::sleep(Duration::from_millis(200));
        let all = rest(&mut client).expect("all answers");
        assert_eq!(all.matches("HTTP/1.1 204 ").count(), 50_001, "{engine:?}");
        assert_eq!(all.matches("Connection: close").count(), 1, "{engine:?}");
        sender.join().expect("sender");
        site.stop();
    }
}

/// Each request comes by itself, so each answer is sent by itself, until the socket takes no more; then many come at
/// once, two to a buffer of the kernel's.
#[test]
fn a_late_reader_gets_each_answer_once() {
    const SINGLY: usize = 5_000;
    const AT_ONCE: usize = 500;
    let padding = 1024 - REQUEST.len() - b"X-Padding: \r\n".len();
    let padded = request(&format!("X-Padding: {}\r\n", "x".repeat(padding)));
    for engine in engines() {
        let socket = listen::open("127.0.0.1:0".parse().expect("address")).expect("listen");
        sockopt::set_socket_send_buffer_size(&socket, 4096).expect("buffer");
        let site = Site::start_on(socket, engine, LIMITS, true);
        let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).expect("socket");
        sockopt::set_socket_recv_buffer_size(&socket, 2048).expect("buffer");
        rustix::net::connect(&socket, &site.address).expect("connect");
        let mut client = TcpStream::from(socket);
        client.set_nodelay(true).expect("no delay");
        client.set_read_timeout(Some(PATIENCE)).expect("timeout");
        let mut sender = client.try_clone().expect("clone");
        let (padded, stats) = (padded.clone(), Arc::clone(&site.stats));
        let answered = move || stats.requests().map(|(.., count)| count).sum::<u64>();
        let sender = thread::spawn(move || {
            for number in 1..=SINGLY {
                sender.write_all(&padded).expect("send");
                // In vain when the socket is full.
                for _ in 0..20 {
                    if answered() >= number as u64 {
                        break;
                    }
                    thread::sleep(Duration::from_micros(20));
                }
            }
            sender.write_all(&[&padded.repeat(AT_ONCE), GET].concat()).expect("send");
            sender.shutdown(Shutdown::Write).expect("shutdown");
        });
        thread::sleep(Duration::from_millis(500));
        let all = rest(&mut client).expect("all answers");
        sender.join().expect("sender");
        let (answers, from_upstream) = all.split_at(all.find("HTTP/1.1 200 ").expect("the upstream's"));
        let first = &answers[..answers.find("\r\n\r\n").expect("an answer") + 4];
        assert_eq!(answers.len(), (SINGLY + AT_ONCE) * first.len(), "{engine:?}: not each answer once");
        assert_eq!(answers.matches("HTTP/1.1 204 ").count(), SINGLY + AT_ONCE, "{engine:?}");
        assert_eq!(from_upstream, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "{engine:?}");
        let recorded = site.upstream.as_ref().expect("upstream").1.recv_timeout(PATIENCE).expect("recorded");
        assert!(recorded == GET, "{engine:?}: other bytes");
        site.stop();
    }
}

/// More at once than the kernel has buffers for.
#[test]
fn many_at_once_on_connections_that_are_kept() {
    for engine in engines() {
        let site = Site::start(engine, LIMITS, false);
        let mut clients: Vec<_> = (0..100).map(|_| site.connect()).collect();
        for _ in 0..20 {
            for client in &mut clients {
                client.write_all(REQUEST).expect("send");
            }
            for client in &mut clients {
                assert!(is_allowed(&exchange(client, b"")), "{engine:?}");
            }
        }
        site.stop();
    }
}

#[test]
fn beyond_the_cap_the_longest_idle_goes() {
    for engine in engines() {
        let limits = ConnectionLimits { max_connections: 4, ..LIMITS };
        let site = Site::start(engine, limits, true);
        let mut clients: Vec<_> = (0..4).map(|_| site.connect()).collect();
        for client in &mut clients {
            assert!(is_allowed(&exchange(client, REQUEST)), "{engine:?}");
            // So that the timers tell them apart.
            thread::sleep(Duration::from_millis(5));
        }
        let mut fifth = site.connect();
        assert!(is_allowed(&exchange(&mut fifth, REQUEST)), "{engine:?}");
        assert_eq!(rest(&mut clients[0]).expect("end"), "", "{engine:?}: the longest idle");
        assert!(is_allowed(&exchange(&mut clients[1], REQUEST)), "{engine:?}: the others stay");
        assert_eq!(site.stats.capped.get(), 1, "{engine:?}");
        site.stop();
    }
}

/// None can be closed for it: accepting pauses until one ends.
#[test]
fn beyond_the_cap_of_busy_ones_others_wait() {
    for engine in engines() {
        let limits = ConnectionLimits { max_connections: 2, ..LIMITS };
        let site = Site::start(engine, limits, true);
        let mut busy: Vec<_> = (0..4).map(|_| site.connect()).collect();
        for client in &mut busy {
            client.write_all(&REQUEST[..50]).expect("send");
        }
        until("the cap", || site.stats.capped.get() > 0);
        assert!(site.stats.accepted.get() <= 3, "{engine:?}");
        for client in &mut busy {
            assert!(is_allowed(&exchange(client, &REQUEST[50..])), "{engine:?}");
        }
        site.stop();
    }
}

#[test]
fn tables_change_between_two_requests() {
    for engine in engines() {
        let mut site = Site::start(engine, LIMITS, false);
        let mut client = site.connect();
        let mut begun = site.connect();
        begun.write_all(&REQUEST[..50]).expect("send");
        for generation in 1..50 {
            if generation > 1 {
                site.publisher.publish(&Arc::new(table(generation)));
            }
            until("the acknowledgement", || {
                site.publisher.tick();
                site.publisher.acknowledged() == generation
            });
            let answer = exchange(&mut client, REQUEST);
            assert!(
                answer.contains(&format!("Access-Control-Max-Age: {generation}\r\n")),
                "{engine:?}: {answer}"
            );
        }
        let answer = exchange(&mut begun, &REQUEST[50..]);
        assert!(answer.contains("Access-Control-Max-Age: 49\r\n"), "{engine:?}");
        site.stop();
    }
}

#[test]
fn shutdown_serves_what_was_accepted_and_what_has_begun() {
    for engine in engines() {
        let site = Site::start(engine, LIMITS, true);
        let mut idle = site.connect();
        assert!(is_allowed(&exchange(&mut idle, REQUEST)), "{engine:?}");
        let mut begun = site.connect();
        begun.write_all(&REQUEST[..50]).expect("send");
        until("the begun one", || site.stats.accepted.get() == 2);
        let mut queued: Vec<_> = (0..100).map(|_| site.connect()).collect();
        for client in &mut queued {
            client.write_all(REQUEST).expect("send");
        }
        site.workers.shutdown(PATIENCE);
        assert_eq!(rest(&mut idle).expect("end"), "", "{engine:?}");
        for (i, client) in queued.iter_mut().enumerate() {
            let all = rest(client).unwrap_or_else(|error| panic!("{engine:?}, {i}: {error}"));
            assert!(is_allowed(&all), "{engine:?}, {i}: {all:?}");
        }
        until("the listener to close", || TcpStream::connect(site.address).is_err());
        let last = exchange(&mut begun, &REQUEST[50..]);
        assert!(is_allowed(&last) && last.contains("Connection: close\r\n"), "{engine:?}: {last}");
        assert_eq!(rest(&mut begun).expect("end"), "", "{engine:?}");
        site.stop();
    }
}

#[test]
fn grace_is_the_longest_that_a_shutdown_takes() {
    for engine in engines() {
        let site = Site::start(engine, LIMITS, true);
        let mut begun = site.connect();
        begun.write_all(&REQUEST[..50]).expect("send");
        until("the connection", || site.stats.accepted.get() == 1);
        site.workers.shutdown(Duration::from_millis(100));
        site.workers.join().expect("workers");
        // Closed, by whatever means.
        let _ = rest(&mut begun);
    }
}

/// All kinds of ends, thousands of times: no connection and no descriptor stays behind.
#[test]
fn nothing_is_left_of_thousands_of_connections() {
    for engine in engines() {
        let site = Site::start(engine, LIMITS, true);
        let address = site.address;
        let close = request("Connection: close\r\n");
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for i in 0..1000 {
                        let mut client = connect(address);
                        match i % 6 {
                            0 => assert!(is_allowed(&exchange(&mut client, REQUEST)), "{engine:?}"),
                            1 => {
                                client.write_all(&close).expect("send");
                                assert!(is_allowed(&rest(&mut client).expect("end")), "{engine:?}");
                            }
                            2 => client.write_all(&REQUEST[..30]).expect("send"),
                            // Unread bytes make the client's close a reset.
                            3 => client.write_all(&REQUEST.repeat(3)).expect("send"),
                            4 => {}
                            _ => {
                                client.write_all(GET).expect("send");
                                client.shutdown(Shutdown::Write).expect("shutdown");
                                assert!(
                                    rest(&mut client).expect("end").starts_with("HTTP/1.1 200"),
                                    "{engine:?}"
                                );
                            }
                        }
                    }
                });
            }
        });
        until("all to end", || {
            let stats = &site.stats;
            // Each is counted at its end; a reset before it was accepted is none of ours.
            stats.accepted.get() == stats.closed.get() + stats.handed_over.get()
        });
        site.stop();
    }
}

#[test]
fn an_engine_by_name() {
    for (choice, name) in [
        (EngineChoice::Auto, "io_uring ("),
        (EngineChoice::IoUring, "io_uring ("),
        (EngineChoice::Epoll, "epoll"),
    ] {
        let workers = Workers::start(Vec::new(), choice, LIMITS).expect(name);
        assert!(workers.engine().starts_with(name), "{}", workers.engine());
        workers.join().expect(name);
    }
}

#[test]
fn one_worker_that_cannot_start_stops_all() {
    for engine in engines() {
        let (_publisher, tables) = Publisher::new(2, Arc::new(table(1))).expect("publisher");
        let good = listen::open("127.0.0.1:0".parse().expect("address")).expect("listen");
        let address = TcpListener::from(good.try_clone().expect("clone")).local_addr().expect("address");
        // What can be neither polled nor made blocking.
        let bad = rustix::fs::open("/", rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).expect("open");
        let setups =
            tables.into_iter().zip([good, bad]).enumerate().map(|(index, (tables, socket))| WorkerSetup {
                index,
                cpu: None,
                listeners: vec![WorkerListener { id: ListenerId(0), socket, serves: Serves::Alone }],
                tables,
                relay: None,
                stats: Arc::new(WorkerStats::new(1)),
                sampler: None,
            });
        let failed = Workers::start_on(engine, setups.collect(), LIMITS);
        assert_eq!(failed.expect_err("no listener").raw_os_error(), Some(libc::EBADF), "{engine:?}");
        assert!(TcpStream::connect(address).is_err(), "{engine:?}: the other one still listens");
    }
}
