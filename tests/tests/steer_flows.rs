//! What a client may do with a connection to a steered port, by the sockets of a real kernel: preflights are a worker's,
//! everything else is the proxy's, nothing is lost, and nothing looks different from a port that is not steered.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpStream},
    thread,
    time::Duration,
};

use preflightd_tests::{
    Behaviour, Client, Response,
    client::{get, preflight},
    daemon::ORIGIN,
    site::wait_until,
    smuggling,
    steering::{
        BIG, HOST, Lab, Options, Proxy, allowed_preflight, big, check_get, expect_either, expect_proxy,
        on_each_site,
    },
};
use socket2::SockRef;

/// Long enough for the pieces to travel one by one, mostly; nothing fails if they do not.
const PIECES: Duration = Duration::from_micros(300);

#[test]
fn a_preflight_is_a_workers_and_a_get_the_proxys() {
    on_each_site(Options::default(), |lab, site| {
        let before = lab.is_steered().then(|| (lab.flows("worker"), lab.flows("proxy")));
        for i in 0..10 {
            lab.expect_worker(&lab.preflight(site), format_args!("{site}, {i}"));
            lab.get(site, &format!("/{i}"));
        }
        // The proxy saw the GETs, from the client's own address, and no preflight.
        let client = lab.client_address(0, site);
        let line = format!("80 {client} \"GET /9 HTTP/1.1\" 200");
        wait_until("the last GET in the log", || lab.logged(&line) == 1);
        let options = lab.logged(&format!("{client} \"OPTIONS"));
        if let Some((workers, proxys)) = before {
            assert_eq!(options, 0, "{site}: {:#?}", lab.nginx().access_log());
            wait_until("the counts", || {
                (lab.flows("worker"), lab.flows("proxy")) == (workers + 10, proxys + 10)
            });
        } else {
            assert_eq!(options, 10, "{site}");
        }
    });
}

#[test]
fn a_denied_preflight_is_a_workers() {
    on_each_site(Options::default(), |lab, site| {
        let response = lab.exchange(site, preflight(HOST, "/x", "https://evil.example", "PUT", None));
        if lab.is_steered() {
            assert_eq!(response.status, 403, "{site}: {response:?}");
            assert_eq!(response.header("access-control-allow-origin"), None, "{site}: {response:?}");
        } else {
            expect_proxy(&response, site);
        }
    });
}

#[test]
fn what_is_no_preflight_is_the_proxys() {
    let bent = |from: &str, to: &str| {
        let text = String::from_utf8(allowed_preflight("/x")).expect("text");
        assert!(text.contains(from), "{from}");
        text.replacen(from, to, 1).into_bytes()
    };
    let cases = [
        ("a cookie", bent("\r\n\r\n", "\r\nCookie: a=b\r\n\r\n"), 405),
        ("a cookie, first", bent("\r\nHost", "\r\nCookie: a=b\r\nHost"), 405),
        ("authorization", bent("\r\n\r\n", "\r\nAuthorization: Basic YTpi\r\n\r\n"), 405),
        ("authorization in capitals", bent("\r\n\r\n", "\r\nAUTHORIZATION: Basic YTpi\r\n\r\n"), 405),
        ("no origin", bent(&format!("Origin: {ORIGIN}\r\n"), ""), 405),
        ("no method asked for", bent("Access-Control-Request-Method: PUT\r\n", ""), 405),
        ("a GET with all of its headers", bent("OPTIONS", "GET"), 200),
        ("a POST with all of its headers", bent("OPTIONS", "POST"), 200),
        ("OPTIONS alone", format!("OPTIONS /x HTTP/1.1\r\nHost: {HOST}\r\n\r\n").into_bytes(), 405),
        ("lower case", bent("OPTIONS", "options"), 400),
        ("no request", b"OPTIONS\r\n\r\n".to_vec(), 400),
    ];
    on_each_site(Options::default(), |lab, site| {
        let before = lab.is_steered().then(|| lab.flows("worker"));
        for (name, request, status) in &cases {
            let case = format!("{site}, {name}");
            let response = lab.exchange(site, request);
            // nginx adds no headers of ours to a request that it cannot parse.
            if *status != 400 {
                expect_proxy(&response, &case);
            }
            assert_eq!(response.status, *status, "{case}: {response:?}");
            assert!(
                response.header("server").is_some_and(|s| s.starts_with("nginx")),
                "{case}: {response:?}"
            );
        }
        if let Some(before) = before {
            assert_eq!(lab.flows("worker"), before, "{site}: none of these is a worker's");
        }
    });
}

#[test]
fn a_request_split_at_every_byte() {
    on_each_site(Options::default(), |lab, site| {
        let preflight = allowed_preflight("/x");
        for at in 1..preflight.len() {
            let mut client = lab.connect(site);
            client.send(&preflight[..at]);
            thread::sleep(PIECES);
            client.send(&preflight[at..]);
            expect_either(lab, &client.response(), format_args!("{site}, split at {at}"));
        }
        let get = get(HOST, "/y");
        for at in 1..get.len() {
            let mut client = lab.connect(site);
            client.send(&get[..at]);
            thread::sleep(PIECES);
            client.send(&get[at..]);
            check_get(&client.response(), "/y");
        }
        let mut client = lab.connect(site);
        for byte in &preflight {
            client.send([*byte]);
            thread::sleep(PIECES);
        }
        expect_either(lab, &client.response(), format_args!("{site}, byte by byte"));
    });
}

#[test]
fn a_long_head_is_a_workers() {
    on_each_site(Options::default(), |lab, site| {
        let preflight = allowed_preflight("/x");
        let padding = format!("X-Padding: {}\r\n", "x".repeat(1000)).repeat(6);
        let end = preflight.len() - 2;
        let last = [&preflight[..end], padding.as_bytes(), b"\r\n"].concat();
        assert!(last.len() > 6000);
        lab.expect_worker(&lab.exchange(site, &last), format_args!("{site}, 6 KB behind"));
        // What decides is not in the first segment: anyone may answer.
        let line = preflight.iter().position(|b| *b == b'\n').expect("a request line") + 1;
        let first = [&preflight[..line], padding.as_bytes(), &preflight[line..]].concat();
        expect_either(lab, &lab.exchange(site, &first), format_args!("{site}, 6 KB in front"));
    });
}

#[test]
fn options_then_get() {
    on_each_site(Options::default(), |lab, site| {
        for i in 0..20 {
            let mut client = lab.connect(site);
            let response = client.exchange(allowed_preflight("/x"));
            lab.expect_worker(&response, format_args!("{site}, {i}"));
            if closes(&response) {
                // A clean end, no reset: the client opens another connection.
                assert_eq!(client.try_read_to_end().expect("a clean end"), b"", "{site}, {i}");
                client = lab.connect(site);
            }
            check_get(&client.exchange(get(HOST, "/y")), "/y");
        }
    });
}

#[test]
fn get_then_options() {
    on_each_site(Options::default(), |lab, site| {
        let mut client = lab.connect(site);
        for i in 0..20 {
            check_get(&client.exchange(get(HOST, "/y")), "/y");
            expect_proxy(&client.exchange(allowed_preflight("/x")), format_args!("{site}, {i}"));
        }
    });
}

#[test]
fn pipelined_in_one_segment() {
    on_each_site(Options::default(), |lab, site| {
        for i in 0..20 {
            let mut client = lab.connect(site);
            client.send([allowed_preflight("/x"), get(HOST, "/y")].concat());
            let first = client.response();
            expect_proxy(&first, format_args!("{site}, {i}"));
            assert_eq!(first.status, 405, "{site}, {i}");
            check_get(&client.response(), "/y");
        }
    });
}

/// A GET that comes before the answer to the preflight in front of it: it is answered, or the connection ends behind the
/// preflight's answer and the client asks again.
#[test]
fn pipelined_in_two_segments() {
    on_each_site(Options::default(), |lab, site| {
        let mut unanswered = 0;
        for i in 0..200 {
            let mut client = lab.connect(site);
            client.send(allowed_preflight("/x"));
            if i % 2 == 0 {
                thread::sleep(PIECES);
            }
            // The worker may have closed already.
            let _ = client.try_send(get(HOST, "/y"));
            expect_either(lab, &client.response(), format_args!("{site}, {i}"));
            if let Ok(response) = client.try_response() {
                check_get(&response, "/y");
            } else {
                unanswered += 1;
                lab.get(site, "/y");
            }
        }
        assert!(lab.is_steered() || unanswered == 0, "{site}: the proxy alone answers all");
    });
}

/// Hostile and ambiguous heads, alone and behind a good preflight, are the proxy's: byte by byte.
#[test]
fn hostile_requests_reach_the_proxy_byte_by_byte() {
    let refusal = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n";
    let policies = format!(
        "[[policy]]\nname = \"all\"\nhosts = [\"{}\"]\norigins = [\"{}\"]\nmethods = [\"*\"]\nheaders = [\"*\"]\n",
        smuggling::HOST,
        smuggling::ORIGIN
    );
    let options = Options {
        proxy: Proxy::Upstream(Behaviour::AtEnd(refusal.to_vec())),
        policies,
        ..Options::default()
    };
    on_each_site(options, |lab, site| {
        let mut control = lab.connect(site);
        control.send(smuggling::PREFLIGHT);
        control.half_close();
        let status = control.response().status;
        assert_eq!(
            status,
            if lab.is_steered() { 204 } else { 400 },
            "{site}: the preflight that all cases bend"
        );
        let mut misdirected = 0;
        for case in smuggling::cases() {
            for front in ["", smuggling::PREFLIGHT] {
                let name =
                    format!("{site}, {}{}", case.name, if front.is_empty() { "" } else { ", pipelined" });
                let bytes = [front.as_bytes(), &case.bytes].concat();
                let (index, mut answer) = send_all(lab, site, &bytes);
                if answer.starts_with(b"HTTP/1.1 421 ") {
                    // A worker found out late, and the client asks again.
                    misdirected += 1;
                    assert_eq!(lab.upstream().count(), index, "{name}: both a worker's and the proxy's");
                    answer = send_all(lab, site, &bytes).1;
                }
                assert_eq!(answer.escape_ascii().to_string(), refusal.escape_ascii().to_string(), "{name}");
                let recorded = lab.upstream().ended(index).bytes;
                assert!(
                    recorded == bytes,
                    "{name}:\n  sent     {}\n  recorded {}",
                    bytes.escape_ascii(),
                    recorded.escape_ascii()
                );
            }
        }
        eprintln!("{site}: {misdirected} were told to ask again");
    });
}

/// Sends all, ends, reads all; also gives the index that the next connection to the upstream has.
fn send_all(lab: &Lab, site: SocketAddr, bytes: &[u8]) -> (usize, Vec<u8>) {
    let index = lab.upstream().count();
    let mut client = lab.connect(site);
    client.send(bytes);
    client.half_close();
    (index, client.read_to_end())
}

/// A listener on `[::]` that takes IPv4 as well, as Go's do.
#[test]
fn a_dual_stack_proxy_sees_the_client() {
    let proxy = Proxy::Upstream(Behaviour::report());
    on_each_site(Options { proxy, ..Options::default() }, |lab, site| {
        let index = lab.upstream().count();
        let mut client = lab.connect(site);
        assert_eq!(client.exchange(get(HOST, "/y")).body, b"GET /y HTTP/1.1 +0", "{site}");
        let local = client.stream().local_addr().expect("an address");
        drop(client);
        let peer = lab.upstream().ended(index).peer.expect("the peer");
        assert_eq!((peer.ip().to_canonical(), peer.port()), (local.ip(), local.port()), "{site}");
        let response = lab.preflight(site);
        if lab.is_steered() {
            lab.expect_worker(&response, site);
        } else {
            assert_eq!(response.status, 200, "{site}");
        }
    });
}

#[test]
fn silent_clients_are_waited_for() {
    on_each_site(Options::default(), |lab, site| {
        let clients: Vec<_> = (0..50).map(|_| lab.connect(site)).collect();
        thread::sleep(Duration::from_secs(2));
        for (i, mut client) in clients.into_iter().enumerate() {
            let case = format!("{site}, {i}");
            match i % 3 {
                0 => check_get(&client.exchange(get(HOST, "/y")), "/y"),
                1 => lab.expect_worker(&client.exchange(allowed_preflight("/x")), &case),
                _ => {
                    client.half_close();
                    assert_eq!(client.try_read_to_end().expect("a clean end"), b"", "{case}");
                }
            }
        }
    });
}

#[test]
fn health_checks_by_tcp_succeed() {
    on_each_site(Options::default(), |lab, site| {
        for i in 0..50 {
            let mut client = lab.connect(site);
            if i % 2 == 0 {
                client.half_close();
                assert_eq!(client.try_read_to_end().expect("a clean end"), b"", "{site}, {i}");
            }
        }
        nothing_is_left(lab, site);
        lab.get(site, "/after");
    });
}

#[test]
fn resets_leave_nothing_behind() {
    on_each_site(Options::default(), |lab, site| {
        let preflight = allowed_preflight("/x");
        for i in 0..60 {
            let mut client = lab.connect(site);
            match i % 4 {
                0 => {}
                1 => client.send(&preflight[..100]),
                2 => client.send(&preflight),
                _ => client.send(get(HOST, "/big")),
            }
            if i % 8 < 4 {
                thread::sleep(PIECES);
            }
            SockRef::from(client.stream()).set_linger(Some(Duration::ZERO)).expect("SO_LINGER");
        }
        nothing_is_left(lab, site);
        lab.get(site, "/after");
        lab.expect_worker(&lab.preflight(site), site);
    });
}

/// The node forgets what clients have ended.
fn nothing_is_left(lab: &Lab, site: SocketAddr) {
    for state in ["established", "syn-recv", "close-wait", "fin-wait-1", "last-ack"] {
        wait_until(format_args!("no sockets in {state} ({site})"), || lab.sockets(state).is_empty());
    }
}

#[test]
fn a_half_close_gets_its_answer() {
    on_each_site(Options::default(), |lab, site| {
        for i in 0..20 {
            let case = format!("{site}, {i}");
            let mut client = lab.connect(site);
            client.send(allowed_preflight("/x"));
            client.half_close();
            lab.expect_worker(&client.response(), &case);
            assert_eq!(client.try_read_to_end().expect("a clean end"), b"", "{case}");

            let mut client = lab.connect(site);
            client.send(get(HOST, "/y"));
            client.half_close();
            check_get(&client.response(), "/y");
            assert_eq!(client.try_read_to_end().expect("a clean end"), b"", "{case}");
        }
    });
}

#[test]
fn a_fin_with_the_request_gets_its_answer() {
    on_each_site(Options::default(), |lab, site| {
        for i in 0..20 {
            let client = lab.connect(site);
            let request = if i % 2 == 0 { allowed_preflight("/x") } else { get(HOST, "/y") };
            // Held back by the cork until the FIN can go with it.
            let socket = SockRef::from(client.stream());
            socket.set_tcp_cork(true).expect("TCP_CORK");
            let mut stream: &TcpStream = client.stream();
            stream.write_all(&request).expect("sending");
            stream.shutdown(Shutdown::Write).expect("half-closing");
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes).expect("a clean end");
            let answer = String::from_utf8_lossy(&bytes).into_owned();
            let wanted = match (i % 2 == 0, lab.is_steered()) {
                (true, true) => "HTTP/1.1 204 ",
                (true, false) => "HTTP/1.1 405 ",
                (false, _) => "HTTP/1.1 200 ",
            };
            assert!(answer.starts_with(wanted), "{site}, {i}: {answer}");
        }
    });
}

#[test]
fn an_unknown_host_is_the_proxys() {
    let options =
        Options { policies: policies("hosts = [\"api.test\", \"*.wild.test\"]"), ..Options::default() };
    on_each_site(options, |lab, site| {
        let before = lab.is_steered().then(|| lab.flows("worker"));
        for host in ["other.test", "api.test.evil", "wild.test", "xapi.test", "api.tes", "192.0.2.1", ""] {
            let request = preflight(host, "/x", ORIGIN, "PUT", None);
            let response = lab.exchange(site, &request);
            assert!(response.cors_headers().is_empty(), "{site}, {host:?}: {response:?}");
            assert!([400, 405].contains(&response.status), "{site}, {host:?}: {response:?}");
        }
        if let Some(before) = before {
            assert_eq!(lab.flows("worker"), before, "{site}: no flow of an unknown host is a worker's");
        }
        for host in ["api.test", "API.test", "api.test:80", "a.wild.test"] {
            let response = lab.exchange(site, preflight(host, "/x", ORIGIN, "PUT", None));
            lab.expect_worker(&response, format_args!("{site}, {host:?}"));
        }
    });
}

/// A worker that finds no policy says so once; the same client's next try is the proxy's.
#[test]
fn a_path_without_policy_is_misdirected_once() {
    let policies = policies("hosts = [\"*\"]\npaths = [{ prefix = \"/api\" }]");
    on_each_site(Options { clients: 2, policies, ..Options::default() }, |lab, site| {
        let other_site = lab.sites_of(1)[usize::from(site.is_ipv6())];
        let statuses = |client: usize, path: &str| {
            let request = allowed_preflight(path);
            let site = if client == 0 { site } else { other_site };
            let once = || {
                let mut client = lab.client(client).enter(|| Client::connect(site));
                let response = client.exchange(&request);
                if response.status == 421 {
                    assert!(closes(&response), "{site}, {path}: {response:?}");
                    assert_eq!(client.try_read_to_end().expect("a clean end"), b"", "{site}, {path}");
                }
                response.status
            };
            [once(), once(), once()]
        };
        let wanted = if lab.is_steered() { [421, 405, 405] } else { [405; 3] };
        let path = |name: &str| format!("/{name}/{}", u8::from(site.is_ipv6()));
        assert_eq!(statuses(0, &path("one")), wanted, "{site}");
        // Neither another request line nor another client is marked by that.
        assert_eq!(statuses(0, &path("two")), wanted, "{site}: another path");
        assert_eq!(statuses(1, &path("one")), wanted, "{site}: another client");
        lab.expect_worker(&lab.exchange(site, allowed_preflight("/api/x")), site);
        lab.get(site, &path("one"));
    });
}

/// Rules by address mean the client, also behind a preflight: there is no way around them.
#[test]
fn the_proxy_judges_the_client() {
    let nginx = "location = /private {
        allow 10.78.0.2; allow fd00:78::2; deny all;
        empty_gif;
    }";
    on_each_site(Options { clients: 2, nginx: nginx.to_owned(), ..Options::default() }, |lab, site| {
        let sites = [site, lab.sites_of(1)[usize::from(site.is_ipv6())]];
        for (client, (site, verdict)) in sites.into_iter().zip([200, 403]).enumerate() {
            let case = format!("{site}, client {client}");
            let connect = || lab.client(client).enter(|| Client::connect(site));
            assert_eq!(connect().exchange(get(HOST, "/private")).status, verdict, "{case}");
            for first in [allowed_preflight("/private"), allowed_preflight("/other")] {
                let mut client = connect();
                client.send(&first);
                client.response();
                let _ = client.try_send(get(HOST, "/private"));
                if let Ok(response) = client.try_response() {
                    assert_eq!(response.status, verdict, "{case}: behind a preflight");
                }
                assert_eq!(connect().exchange(get(HOST, "/private")).status, verdict, "{case}: after one");
                // In one segment.
                let mut client = connect();
                client.send([first, get(HOST, "/private")].concat());
                client.response();
                assert_eq!(client.response().status, verdict, "{case}: pipelined");
            }
        }
    });
}

#[test]
fn long_bodies_arrive_whole() {
    on_each_site(Options::default(), |lab, site| {
        let mut client = lab.connect(site);
        let response = client.exchange(get(HOST, "/big"));
        assert!(response.body == big(), "{site}: /big is not what it was");
        for length in [0, 1, 1000, 65_536, BIG] {
            let body = &big()[..length];
            let head = format!("POST /echo HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {length}\r\n\r\n");
            // On a connection that exists, and with the head and the start of the body in the first segment.
            for mut client in [lab.connect(site), take(&mut client, lab, site)] {
                let sender = client.stream().try_clone().expect("a second handle");
                let response = thread::scope(|scope| {
                    let bytes = [head.as_bytes(), body].concat();
                    scope.spawn(move || { &sender }.write_all(&bytes).expect("sending the body"));
                    client.response()
                });
                assert_eq!(response.status, 200, "{site}, {length} bytes");
                assert!(response.body == body, "{site}: {length} bytes came back otherwise");
            }
        }
    });
}

/// The connection; a new one in its place.
fn take(client: &mut Client, lab: &Lab, site: SocketAddr) -> Client {
    std::mem::replace(client, lab.connect(site))
}

fn closes(response: &Response) -> bool {
    response.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"))
}

/// The usual policy for these hosts and paths.
fn policies(scope: &str) -> String {
    format!(
        "[[policy]]\nname = \"demo\"\n{scope}\norigins = [\"{ORIGIN}\"]\nmethods = [\"PUT\", \"DELETE\"]\n\
         headers = [\"content-type\", \"x-demo\"]\nmax_age = 600\n"
    )
}
