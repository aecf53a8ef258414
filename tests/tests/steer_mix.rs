//! A hundred thousand connections of every kind, many at once, shared out to three proxies and to one with kernel answers:
//! every response is checked, none may fail. With `PREFLIGHTD_FULL` set each run has as many.

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
    mix(28_000, Options { proxy: Proxy::Nginx { workers: 1, reuseport: false }, ..Options::default() });
}

#[test]
fn nginx_with_two_workers_and_a_socket_each() {
    mix(28_000, Options { proxy: Proxy::Nginx { workers: 2, reuseport: true }, ..Options::default() });
}

#[test]
fn nginx_with_kernel_answers() {
    let proxy = Proxy::Nginx { workers: 2, reuseport: false };
    mix(20_000, Options { proxy, kernel_answers: true, ..Options::default() });
}

#[test]
fn haproxy() {
    if have(&["haproxy"]) {
        mix(28_000, Options { proxy: Proxy::Haproxy, ..Options::default() });
    }
}

/// So many connections where there is not the time for more.
fn mix(connections: u64, options: Options) {
    if !can_run() {
        return;
    }
    let per_thread = if full() { 100_000 } else { connections } / THREADS;
    let kernel_answers = options.kernel_answers;
    let lab = Lab::with(options);
    lab.client(0).sysctl("net.ipv4.ip_local_port_range", "1024 65535");
    lab.client(0).sysctl("net.ipv4.tcp_tw_reuse", "1");
    let sites = lab.sites();
    let run = |thread: u64| {
        let mut mixer = Mixer::new(thread + 1);
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
        (failures, mixer.answers)
    };
    let results: Vec<_> = lab.client(0).enter(|| {
        thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS).map(|i| scope.spawn(move || run(i))).collect();
            threads.into_iter().map(|thread| thread.join().expect("a client's thread")).collect()
        })
    });
    let failures: Vec<_> = results.iter().flat_map(|(failures, _)| failures).collect();
    let some = &failures[..failures.len().min(20)];
    assert!(failures.is_empty(), "{} of {} failed: {some:#?}", failures.len(), per_thread * THREADS);
    let sum = |f: fn(&Answers) -> u64| results.iter().map(|(_, answers)| f(answers)).sum::<u64>();
    let (kernels, workers, proxys) = (sum(|a| a.kernels), sum(|a| a.workers), sum(|a| a.proxys));
    let missed = sum(|a| a.missed);
    eprintln!("preflights: {kernels} by the kernel, {workers} by workers, {proxys} by the proxy");
    assert!(proxys > 0, "preflights on connections of the proxy are its own");
    let many = per_thread * THREADS / 10;
    if plain() {
        assert_eq!((kernels, workers), (0, 0));
    } else if kernel_answers {
        assert!(kernels > many, "only {kernels} by the kernel");
        // What comes in pieces is a worker's, unless the first piece does not even show that.
        assert!(workers > 0, "none by workers");
        // A heartbeat that was late on a busy machine, or a port that is still in TIME_WAIT.
        assert!(missed < kernels / 100, "{missed} whole preflights were not the kernel's, against {kernels}");
    } else {
        assert_eq!(kernels, 0, "the kernel is not to answer");
        // Each connection that begins with a preflight alone is a worker's: several of all kinds begin so.
        assert!(workers > many, "only {workers} by workers");
    }
}

type Step = fn(&mut Mixer, SocketAddr) -> io::Result<()>;

/// What one connection does; each kind is as likely as any other.
const KINDS: [(&str, Step); 11] = [
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
    ("a mixture", Mixer::mixture),
];

struct Mixer {
    random: u64,
    answers: Answers,
}

/// Who answered preflights.
#[derive(Default)]
struct Answers {
    kernels: u64,
    workers: u64,
    proxys: u64,
    /// Whole ones in one segment, on connections that were nobody's yet, that the kernel did not answer.
    missed: u64,
}

/// Who answered a preflight.
#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    /// On the same connection more may follow, for whomever.
    Kernel,
    /// The connection is closed.
    Worker,
    /// The connection is the proxy's.
    Proxy,
}

impl Mixer {
    fn new(random: u64) -> Self {
        Self { random, answers: Answers::default() }
    }

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
        self.post_on(&mut Client::try_connect(site)?, length)
    }

    /// Random bytes there and back.
    fn post_on(&mut self, client: &mut Client, length: usize) -> io::Result<()> {
        let mut body = Vec::with_capacity(length + 8);
        while body.len() < length {
            self.next(1);
            body.extend_from_slice(&self.random.to_ne_bytes());
        }
        body.truncate(length);
        let head = format!("POST /echo HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {length}\r\n\r\n");
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
        self.whole_preflight(&mut client).map(drop)
    }

    fn preflight_in_pieces(&mut self, site: SocketAddr) -> io::Result<()> {
        let request = allowed_preflight("/p");
        let at = 1 + self.next(request.len() - 1);
        let mut client = Client::try_connect(site)?;
        client.try_send(&request[..at])?;
        client.try_send(&request[at..])?;
        self.check_preflight(&mut client).map(drop)
    }

    fn preflight_then_get(&mut self, site: SocketAddr) -> io::Result<()> {
        let mut client = Client::try_connect(site)?;
        if self.whole_preflight(&mut client)? == By::Worker {
            client = Client::try_connect(site)?;
        }
        self.get(&mut client)
    }

    fn get_then_preflight(&mut self, site: SocketAddr) -> io::Result<()> {
        let mut client = Client::try_connect(site)?;
        self.get(&mut client)?;
        self.proxys_preflight(&mut client)
    }

    fn pipelined(&mut self, site: SocketAddr) -> io::Result<()> {
        let mut client = Client::try_connect(site)?;
        client.try_send([allowed_preflight("/p"), get(HOST, "/g")].concat())?;
        let response = client.try_response()?;
        self.answers.proxys += 1;
        expect(is_the_proxys(&response), "not the proxy's", &response)?;
        check_get(&client.try_response()?, "/g")
    }

    /// Preflights, GETs and POSTs in any order on one connection: with the first that the proxy has answered all of it is
    /// the proxy's.
    fn mixture(&mut self, site: SocketAddr) -> io::Result<()> {
        let mut client = Client::try_connect(site)?;
        let mut proxys = false;
        let mut steps = String::new();
        for _ in 0..3 + self.next(13) {
            let step = ['O', 'G', 'P'][self.next(3)];
            steps.push(step);
            let result = match step {
                'O' if proxys => self.proxys_preflight(&mut client),
                'O' => self.whole_preflight(&mut client).and_then(|by| {
                    proxys = by == By::Proxy;
                    if by == By::Worker {
                        client = Client::try_connect(site)?;
                    }
                    Ok(())
                }),
                'G' => self.get(&mut client),
                _ => {
                    // Up to 100 kB, more often less.
                    let length = self.next(100_000) >> self.next(8);
                    self.post_on(&mut client, length)
                }
            };
            result.map_err(|e| io::Error::other(format!("{steps}: {e}")))?;
            proxys |= step != 'O';
        }
        Ok(())
    }

    /// A preflight on a connection that nobody has.
    fn whole_preflight(&mut self, client: &mut Client) -> io::Result<By> {
        client.try_send(allowed_preflight("/p"))?;
        let by = self.check_preflight(client)?;
        self.answers.missed += u64::from(by != By::Kernel);
        Ok(by)
    }

    /// A preflight on a connection that the proxy has.
    fn proxys_preflight(&mut self, client: &mut Client) -> io::Result<()> {
        client.try_send(allowed_preflight("/p"))?;
        let response = client.try_response()?;
        self.answers.proxys += 1;
        expect(is_the_proxys(&response), "not the proxy's", &response)
    }

    fn check_preflight(&mut self, client: &mut Client) -> io::Result<By> {
        let response = client.try_response()?;
        if is_the_proxys(&response) {
            self.answers.proxys += 1;
            return Ok(By::Proxy);
        }
        let origin = response.header("access-control-allow-origin");
        let right = response.status == 204 && origin == Some(preflightd_tests::daemon::ORIGIN);
        expect(right, "another answer to a preflight", &response)?;
        if response.header("connection").is_some() {
            self.answers.workers += 1;
            ended(client)?;
            return Ok(By::Worker);
        }
        self.answers.kernels += 1;
        Ok(By::Kernel)
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
