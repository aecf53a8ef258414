//! Preflights that the kernel answers, on connections that then become the proxy's: by the sockets of a real kernel.

use std::{
    io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    thread,
    time::Duration,
};

use preflightd_tests::{
    client::{get, preflight},
    site::{PATIENCE, wait_until},
    steering::{
        HOST, Lab, Options, Proxy, allowed_preflight, big, can_run, check_get, expect_proxy, on_each_site,
    },
};
use socket2::{Domain, Protocol, Socket, Type};

fn options() -> Options {
    Options { kernel_answers: true, ..Options::default() }
}

#[test]
fn preflights_and_then_the_proxys_requests_on_one_connection() {
    on_each_site(options(), |lab: &Lab, site| {
        let before = lab.is_steered().then(|| (lab.flows("kernel"), lab.flows("proxy")));
        for i in 0..20 {
            let mut client = lab.connect(site);
            for j in 0..=i % 4 {
                let response = client.exchange(allowed_preflight(&format!("/items/{j}")));
                lab.expect_kernel(&response, format_args!("{site}, {i}, {j}"));
            }
            let denied = client.exchange(preflight(HOST, "/x", "https://evil.example", "PUT", None));
            if lab.is_steered() {
                assert_eq!((denied.status, denied.header("connection")), (403, None), "{site}: {denied:?}");
            }
            for path in ["/a", "/b"] {
                check_get(&client.exchange(get(HOST, path)), path);
            }
        }
        if let Some((kernel, proxy)) = before {
            // From the client's own address, and no preflight.
            let client = lab.client_address(0, site);
            let line = format!("80 {client} \"GET /b HTTP/1.1\" 200");
            wait_until("the GETs in the log", || lab.logged(&line) == 20);
            assert_eq!(lab.logged(&format!("{client} \"OPTIONS")), 0, "{:#?}", lab.nginx().access_log());
            wait_until("the counts", || (lab.flows("kernel"), lab.flows("proxy")) == (kernel + 20, proxy));
        }
    });
}

#[test]
fn a_long_upload_behind_answers_arrives_whole() {
    let nginx = format!(
        "location = /upload {{
            client_max_body_size 0;
            proxy_request_buffering off;
            proxy_http_version 1.1;
            proxy_pass http://{SINK};
        }}"
    );
    on_each_site(Options { nginx, ..options() }, |lab: &Lab, site| {
        let sink = lab.node().enter(|| TcpListener::bind(SINK)).expect("a sink for uploads");
        let mut client = lab.connect(site);
        for i in 0..3 {
            let response = client.exchange(allowed_preflight(&format!("/items/{i}")));
            lab.expect_kernel(&response, format_args!("{site}, {i}"));
        }
        let sender = client.stream().try_clone().expect("a second handle");
        let response = thread::scope(|scope| {
            scope.spawn(|| serve_upload(&sink));
            scope.spawn(move || {
                let head =
                    format!("POST /upload HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {UPLOAD}\r\n\r\n");
                let mut pieces = Pieces::new();
                // The head and the first piece go together: the proxy gets the connection with a full segment.
                let mut first = head.into_bytes();
                first.extend_from_slice(pieces.piece(0));
                (&sender).write_all(&first).expect("sending the head");
                for number in 1..UPLOAD.div_ceil(PIECE) {
                    (&sender).write_all(pieces.piece(number)).expect("sending the body");
                }
            });
            client.response()
        });
        expect_proxy(&response, site);
        let verdict = String::from_utf8_lossy(&response.body);
        assert_eq!(verdict, format!("{UPLOAD} bytes, all right"), "{site}");
        // Of what is in a body nothing is a request, and behind it all is the proxy's.
        check_get(&client.exchange(get(HOST, "/behind")), "/behind");
        expect_proxy(&client.exchange(allowed_preflight("/behind")), site);
        assert_eq!(lab.logged("POST /upload HTTP/1.1\" 200"), 1 + usize::from(site.is_ipv6()), "{site}");
    });
}

#[test]
fn a_long_download_behind_answers_arrives_whole() {
    on_each_site(options(), |lab: &Lab, site| {
        let mut client = lab.connect(site);
        for i in 0..3 {
            lab.expect_kernel(&client.exchange(allowed_preflight("/x")), format_args!("{site}, {i}"));
        }
        for i in 0..2 {
            let response = client.exchange(get(HOST, "/big"));
            expect_proxy(&response, site);
            assert!(response.body == big(), "{site}, {i}: /big is not what it was");
        }
        check_get(&client.exchange(get(HOST, "/behind")), "/behind");
    });
}

/// Segments of a body that look like requests which the kernel would answer.
#[test]
fn a_body_of_preflights_is_a_body() {
    on_each_site(options(), |lab: &Lab, site| {
        for answers in 0..3 {
            let case = format!("{site}, behind {answers} answers");
            let mut client = lab.connect(site);
            for _ in 0..answers {
                lab.expect_kernel(&client.exchange(allowed_preflight("/x")), &case);
            }
            let body = allowed_preflight("/in-a-body").repeat(20);
            client.send(format!(
                "POST /echo HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {}\r\n\r\n",
                body.len()
            ));
            for piece in body.chunks(body.len() / 20) {
                client.send(piece);
                // So that it travels by itself, mostly; nothing fails if it does not.
                thread::sleep(Duration::from_micros(300));
            }
            let response = client.response();
            expect_proxy(&response, &case);
            assert!(response.status == 200 && response.body == body, "{case}: {response:?}");
        }
    });
}

/// The proxy is gone for a while: preflights are answered, other requests refused as on any port that nobody listens on, and
/// who waits is served by the proxy that comes back.
#[test]
fn connections_outlive_the_proxy() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::with(options());
    if !lab.is_steered() {
        return;
    }
    lab.wait_kernel();
    let mut open: Vec<_> = (0..40)
        .map(|i| {
            let site = lab.sites()[i % 2];
            (format!("{site}, {i}"), lab.connect(site))
        })
        .collect();
    for (case, client) in &mut open {
        lab.expect_kernel(&client.exchange(allowed_preflight("/x")), format_args!("{case}, before"));
    }
    lab.stop_proxy();
    for (i, (case, client)) in open.iter_mut().enumerate() {
        lab.expect_kernel(&client.exchange(allowed_preflight("/x")), format_args!("{case}, no proxy"));
        if i % 4 < 2 {
            client.send(get(HOST, "/nobody"));
            let error = client.try_response().expect_err("nobody is there to answer");
            assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{case}: {error}");
        }
    }
    lab.start_proxy();
    for (_, (case, client)) in open.iter_mut().enumerate().filter(|(i, _)| i % 4 >= 2) {
        lab.expect_kernel(&client.exchange(allowed_preflight("/x")), format_args!("{case}, a new proxy"));
        check_get(&client.exchange(get(HOST, "/y")), "/y");
    }
}

/// The proxy accepts nothing for a while, and its queue is full: connections that are its own now wait, as without us.
#[test]
fn connections_wait_for_a_busy_proxy() {
    const CONNECTIONS: usize = 150;
    if !can_run() {
        return;
    }
    let lab = Lab::with(Options { proxy: Proxy::None, ..options() });
    if !lab.is_steered() {
        return;
    }
    let busy = lab.node().enter(|| {
        let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP)).expect("a socket");
        socket.set_only_v6(false).expect("IPV6_V6ONLY");
        let everywhere = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 80);
        socket.bind(&everywhere.into()).expect("port 80");
        socket.listen(64).expect("listening");
        TcpListener::from(socket)
    });
    // Not by asking: who is not answered by the kernel would wait in the queue.
    let mut open: Vec<_> = (0..CONNECTIONS).map(|i| lab.connect(lab.sites()[i % 2])).collect();
    for (i, client) in open.iter_mut().enumerate() {
        lab.expect_kernel(&client.exchange(allowed_preflight("/x")), i);
    }
    for client in &mut open {
        client.send(get(HOST, "/y"));
    }
    let full = || lab.metrics().count("preflightd_steer_events_total", &[("event", "proxy_full")]);
    wait_until("the proxy's queue to be full", || full() > 0);
    thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..CONNECTIONS {
                let (mut stream, peer) = busy.accept().expect("a connection");
                stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
                let mut request = vec![0; get(HOST, "/y").len()];
                stream.read_exact(&mut request).unwrap_or_else(|e| panic!("{peer}: {e}"));
                assert_eq!(
                    request,
                    get(HOST, "/y"),
                    "{peer}: the proxy gets what is its own, and no preflight"
                );
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").expect("answering");
            }
        });
        for (i, client) in open.iter_mut().enumerate() {
            assert_eq!(client.response().status, 200, "{i}");
        }
    });
}

/// More connections than there is room for: those beyond are a worker's, and once the others have ended there is room again.
#[test]
fn more_connections_than_the_kernel_can_answer_on() {
    const ROOM: usize = 1024;
    on_each_site(Options { steer: format!("max_answered = {ROOM}"), ..options() }, |lab: &Lab, site| {
        let beyond = || lab.metrics().count("preflightd_steer_asked_total", &[("reason", "connections")]);
        let before = lab.is_steered().then(|| {
            // Those of the other site have ended, and of those before none is swept yet.
            wait_until("all the room", || lab.metrics().count("preflightd_steer_answered", &[]) == 0);
            beyond()
        });
        let mut kept = Vec::new();
        let mut workers = 0;
        for i in 0..3000 {
            let mut client = lab.connect(site);
            let response = client.exchange(allowed_preflight("/x"));
            let case = format!("{site}, {i}");
            if response.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close")) {
                lab.expect_worker(&response, &case);
                assert_eq!(client.try_read_to_end().expect("a clean end"), b"", "{case}");
                workers += 1;
            } else {
                lab.expect_kernel(&response, &case);
                kept.push(client);
            }
        }
        if let Some(before) = before {
            assert_eq!(kept.len(), ROOM, "{site}: so many are the kernel's");
            wait_until("all others to be counted", || beyond() == before + workers);
        }
        for (i, client) in kept.iter_mut().enumerate() {
            let case = format!("{site}, {i}, kept");
            lab.expect_kernel(&client.exchange(allowed_preflight("/x")), &case);
            if i % 2 == 0 {
                check_get(&client.exchange(get(HOST, "/y")), "/y");
            }
        }
        drop(kept);
        lab.wait_kernel();
    });
}

/// Where `/upload` goes, within the node's namespace.
const SINK: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8082);

/// The length of an upload.
const UPLOAD: usize = 200_000_000;

/// What an upload consists of, one behind the other: no two are alike, and none ends where a segment or a buffer does.
const PIECE: usize = 65_521;

/// The pieces of an upload.
struct Pieces(Vec<u8>);

impl Pieces {
    fn new() -> Self {
        Self(big()[..PIECE].to_vec())
    }

    /// Piece `number`.
    fn piece(&mut self, number: usize) -> &[u8] {
        let length = PIECE.min(UPLOAD - number * PIECE);
        self.0[..8].copy_from_slice(&number.to_le_bytes());
        &self.0[..length]
    }
}

/// Reads one upload, compares it with what it should be, and says in the answer where they differ: to record as much would
/// be too much.
fn serve_upload(listener: &TcpListener) {
    let (stream, _) = listener.accept().expect("nginx's connection");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let mut reader = BufReader::with_capacity(1 << 18, stream);
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        assert!(reader.read_until(b'\n', &mut head).expect("the head") > 0, "the end within the head");
    }
    let (mut pieces, mut got) = (Pieces::new(), vec![0; PIECE]);
    let mut verdict = format!("{UPLOAD} bytes, all right");
    for number in 0..UPLOAD.div_ceil(PIECE) {
        let wanted = pieces.piece(number);
        let got = &mut got[..wanted.len()];
        if let Err(e) = reader.read_exact(got) {
            verdict = format!("piece {number}: {e}");
            break;
        }
        if got != wanted {
            verdict = format!("piece {number} is another");
            break;
        }
    }
    let length = verdict.len();
    let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{verdict}");
    reader.get_mut().write_all(answer.as_bytes()).expect("answering nginx");
}
