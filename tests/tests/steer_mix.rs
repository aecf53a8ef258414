//! A hundred thousand connections of every kind, many at once, shared out to three proxies: every response is checked, none
//! may fail. With `PREFLIGHTD_FULL` set each proxy gets as many.

use std::{io, net::SocketAddr, thread};

use preflightd_tests::{
    Client, Response,
    client::get,
    site::have,
    steering::{HOST, Lab, Options, Proxy, allowed_preflight, can_run, full, plain},
};

const THREADS: u64 = 8;

#[test]
fn nginx_with_one_worker() {
    mix(Proxy::Nginx { workers: 1, reuseport: false });
}

#[test]
fn nginx_with_two_workers_and_a_socket_each() {
    mix(Proxy::Nginx { workers: 2, reuseport: true });
}

#[test]
fn haproxy() {
    if have(&["haproxy"]) {
        mix(Proxy::Haproxy);
    }
}

fn mix(proxy: Proxy) {
    if !can_run() {
        return;
    }
    let per_thread = if full() { 100_000 } else { 34_000 } / THREADS;
    let lab = Lab::with(Options { proxy, ..Options::default() });
    lab.client(0).sysctl("net.ipv4.ip_local_port_range", "1024 65535");
    lab.client(0).sysctl("net.ipv4.tcp_tw_reuse", "1");
    let sites = lab.sites();
    let run = |thread: u64| {
        let mut mixer = Mixer { random: thread + 1, by_workers: 0, by_proxy: 0 };
        let failures: Vec<_> = (0..per_thread)
            .filter_map(|i| {
                let site = sites[(i % 2) as usize];
                let kind = mixer.next(KINDS.len());
                let result = (KINDS[kind].1)(&mut mixer, site);
                result
                    .err()
                    .map(|e| format!("thread {thread}, connection {i}, {}, {site}: {e}", KINDS[kind].0))
            })
            .collect();
        (failures, mixer.by_workers, mixer.by_proxy)
    };
    let results: Vec<_> = lab.client(0).enter(|| {
        thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS).map(|i| scope.spawn(move || run(i))).collect();
            threads.into_iter().map(|thread| thread.join().expect("a client's thread")).collect()
        })
    });
    let failures: Vec<_> = results.iter().flat_map(|(failures, ..)| failures).collect();
    let some = &failures[..failures.len().min(20)];
    assert!(failures.is_empty(), "{} of {} failed: {some:#?}", failures.len(), per_thread * THREADS);
    let sum = |f: fn(&(Vec<String>, u64, u64)) -> u64| results.iter().map(f).sum::<u64>();
    let (workers, proxys) = (sum(|r| r.1), sum(|r| r.2));
    eprintln!("preflights: {workers} by workers, {proxys} by the proxy");
    assert!(proxys > 0, "preflights on connections of the proxy are its own");
    if plain() {
        assert_eq!(workers, 0);
    } else {
        // Each connection that begins with a preflight alone is a worker's: several of ten kinds begin so.
        assert!(workers > per_thread * THREADS / 10, "only {workers} by workers");
    }
}

type Step = fn(&mut Mixer, SocketAddr) -> io::Result<()>;

/// What one connection does; each kind is as likely as any other.
const KINDS: [(&str, Step); 10] = [
    ("GET", |m, site| m.gets(site, 1)),
    ("GET, closed by the proxy", Mixer::closing_get),
    ("GETs, kept alive", |m, site| m.gets(site, 5)),
    ("POST", |m, site| m.post(site, 2000)),
    ("a long POST", |m, site| m.post(site, 100_000)),
    ("preflight", Mixer::preflight),
    ("preflight in pieces", Mixer::preflight_in_pieces),
    ("preflight, then GET", Mixer::preflight_then_get),
    ("GET, then preflight", Mixer::get_then_preflight),
    ("preflight and GET in one segment", Mixer::pipelined),
];

struct Mixer {
    random: u64,
    by_workers: u64,
    by_proxy: u64,
}

impl Mixer {
    /// A number below `limit` (xorshift).
    fn next(&mut self, limit: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random % limit as u64) as usize
    }

    fn gets(&mut self, site: SocketAddr, count: usize) -> io::Result<()> {
        let mut client = Client::try_connect(site)?;
        (0..count).try_for_each(|_| self.get(&mut client))
    }

    fn get(&mut self, client: &mut Client) -> io::Result<()> {
        let path = format!("/{}", self.next(1_000_000));
        client.try_send(get(HOST, &path))?;
        check_get(&client.try_response()?, &path)
    }

    fn closing_get(&mut self, site: SocketAddr) -> io::Result<()> {
        let path = format!("/{}", self.next(1_000_000));
        let mut client = Client::try_connect(site)?;
        client.try_send(format!("GET {path} HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n"))?;
        check_get(&client.try_response()?, &path)?;
        ended(&mut client)
    }

    fn post(&mut self, site: SocketAddr, most: usize) -> io::Result<()> {
        let length = self.next(most);
        let body: Vec<u8> = (0..length).map(|i| (i as u8).wrapping_mul(31)).collect();
        let head = format!("POST /echo HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {length}\r\n\r\n");
        let mut client = Client::try_connect(site)?;
        if self.next(2) == 0 {
            client.try_send([head.as_bytes(), &body].concat())?;
        } else {
            client.try_send(head)?;
            client.try_send(&body)?;
        }
        let response = client.try_response()?;
        expect(response.status == 200 && response.body == body, "another body than was sent", &response)
    }

    fn preflight(&mut self, site: SocketAddr) -> io::Result<()> {
        let mut client = Client::try_connect(site)?;
        client.try_send(allowed_preflight("/p"))?;
        self.check_preflight(&mut client)
    }

    fn preflight_in_pieces(&mut self, site: SocketAddr) -> io::Result<()> {
        let request = allowed_preflight("/p");
        let at = 1 + self.next(request.len() - 1);
        let mut client = Client::try_connect(site)?;
        client.try_send(&request[..at])?;
        client.try_send(&request[at..])?;
        self.check_preflight(&mut client)
    }

    fn preflight_then_get(&mut self, site: SocketAddr) -> io::Result<()> {
        let mut client = Client::try_connect(site)?;
        client.try_send(allowed_preflight("/p"))?;
        let before = self.by_workers;
        self.check_preflight(&mut client)?;
        if self.by_workers > before {
            client = Client::try_connect(site)?;
        }
        self.get(&mut client)
    }

    fn get_then_preflight(&mut self, site: SocketAddr) -> io::Result<()> {
        let mut client = Client::try_connect(site)?;
        self.get(&mut client)?;
        client.try_send(allowed_preflight("/p"))?;
        let response = client.try_response()?;
        self.by_proxy += 1;
        expect(is_the_proxys(&response), "not the proxy's", &response)
    }

    fn pipelined(&mut self, site: SocketAddr) -> io::Result<()> {
        let mut client = Client::try_connect(site)?;
        client.try_send([allowed_preflight("/p"), get(HOST, "/g")].concat())?;
        let response = client.try_response()?;
        self.by_proxy += 1;
        expect(is_the_proxys(&response), "not the proxy's", &response)?;
        check_get(&client.try_response()?, "/g")
    }

    fn check_preflight(&mut self, client: &mut Client) -> io::Result<()> {
        let response = client.try_response()?;
        if is_the_proxys(&response) {
            self.by_proxy += 1;
            return Ok(());
        }
        self.by_workers += 1;
        let origin = response.header("access-control-allow-origin");
        let right = response.status == 204 && origin == Some(preflightd_tests::daemon::ORIGIN);
        expect(right, "another answer to a preflight", &response)?;
        ended(client)
    }
}

fn is_the_proxys(response: &Response) -> bool {
    response.status == 405 && response.header("x-from") == Some("proxy")
}

fn expect(right: bool, what: &str, response: &Response) -> io::Result<()> {
    if right { Ok(()) } else { Err(io::Error::other(format!("{what}: {response:?}"))) }
}

fn check_get(response: &Response, path: &str) -> io::Result<()> {
    let right = response.status == 200
        && response.header("x-from") == Some("proxy")
        && response.body == format!("nginx {path}").as_bytes();
    expect(right, "another answer to a GET", response)
}

/// The server ends cleanly.
fn ended(client: &mut Client) -> io::Result<()> {
    let rest = client.try_read_to_end()?;
    if rest.is_empty() { Ok(()) } else { Err(io::Error::other("bytes behind the answer")) }
}
