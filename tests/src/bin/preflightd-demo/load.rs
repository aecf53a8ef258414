//! A mixed load at a steady rate: many preflights, some from an origin that is not allowed, some requests for nginx.
#![forbid(unsafe_code)]

use preflightd_tests::{
    Client, Response,
    client::{get, preflight},
};
use std::{
    net::SocketAddr,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, Scope},
    time::{Duration, Instant},
};

/// One kind of client: how many there are, how often each asks, whether on a new connection each time.
struct Kind {
    clients: usize,
    every: Duration,
    new_connections: bool,
    requests: fn() -> Vec<u8>,
    wanted: u16,
}

/// About 6,000 requests a second, nine of ten preflights: what a busy node sees, and little enough for any machine.
const KINDS: [Kind; 5] = [
    Kind {
        clients: 20,
        every: Duration::from_millis(5),
        new_connections: false,
        requests: allowed,
        wanted: 204,
    },
    Kind {
        clients: 4,
        every: Duration::from_millis(5),
        new_connections: true,
        requests: allowed,
        wanted: 204,
    },
    Kind {
        clients: 2,
        every: Duration::from_millis(5),
        new_connections: false,
        requests: denied,
        wanted: 403,
    },
    Kind { clients: 2, every: Duration::from_millis(5), new_connections: false, requests: page, wanted: 200 },
    Kind { clients: 2, every: Duration::from_millis(10), new_connections: true, requests: page, wanted: 200 },
];

fn allowed() -> Vec<u8> {
    preflight(
        "api.example.com",
        "/v1/cart",
        "https://shop.example.com",
        "PUT",
        Some("content-type,x-request-id"),
    )
}

fn denied() -> Vec<u8> {
    preflight("api.example.com", "/v1/cart", "https://evil.example", "PUT", None)
}

fn page() -> Vec<u8> {
    get("api.example.com", "/v1/cart")
}

/// nginx's own answers to preflights carry this header, so that they can be told from preflightd's.
pub(crate) const BY_NGINX: &str = "x-answered-by";

/// What the clients saw.
#[derive(Default)]
pub(crate) struct Seen {
    stop: AtomicBool,
    passed: AtomicU64,
    preflights_passed: AtomicU64,
    failed: AtomicU64,
    /// Of preflights since it was last taken, in nanoseconds.
    latencies: Mutex<Vec<u64>>,
}

impl Seen {
    /// Starts every client within `scope`.
    pub(crate) fn start<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>, site: SocketAddr) {
        for kind in &KINDS {
            for _ in 0..kind.clients {
                scope.spawn(move || self.client(kind, site));
            }
        }
    }

    /// Ends them.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
    }

    /// Requests that nginx has answered, but for preflights.
    pub(crate) fn passed(&self) -> u64 {
        self.passed.load(Ordering::Relaxed)
    }

    /// Preflights that nginx has answered.
    pub(crate) fn preflights_passed(&self) -> u64 {
        self.preflights_passed.load(Ordering::Relaxed)
    }

    /// Requests that got no answer or a wrong one.
    pub(crate) fn failed(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }

    /// Takes the latencies since the last call.
    pub(crate) fn take(&self) -> Vec<u64> {
        self.latencies.lock().map(|mut l| std::mem::take(&mut *l)).unwrap_or_default()
    }

    fn client(&self, kind: &Kind, site: SocketAddr) {
        let request = (kind.requests)();
        let mut client = None;
        let mut due = Instant::now();
        while !self.stop.load(Ordering::Acquire) {
            let start = Instant::now();
            let outcome = exchange(&mut client, site, &request);
            let taken = start.elapsed();
            match &outcome {
                // What is not steered, nginx answers by rules of its own.
                Ok(response) if response.header(BY_NGINX).is_some() => add(&self.preflights_passed),
                Ok(response) if response.status != kind.wanted => add(&self.failed),
                Ok(_) if kind.wanted == 200 => add(&self.passed),
                Ok(_) => {
                    if let Ok(mut latencies) = self.latencies.lock() {
                        latencies.push(u64::try_from(taken.as_nanos()).unwrap_or(u64::MAX));
                    }
                }
                Err(_) => add(&self.failed),
            }
            match outcome {
                // A worker beside the proxy ends each connection with its answer.
                Ok(response) if is_last(&response) => {
                    if let Some(mut client) = client.take() {
                        let _ = client.try_read_to_end();
                    }
                }
                Ok(_) if !kind.new_connections => {}
                _ => client = None,
            }
            due += kind.every;
            match due.checked_duration_since(Instant::now()) {
                Some(rest) => thread::sleep(rest),
                // Too slow for the rate: no burst afterwards.
                None => due = Instant::now(),
            }
        }
    }
}

fn add(count: &AtomicU64) {
    count.fetch_add(1, Ordering::Relaxed);
}

fn is_last(response: &Response) -> bool {
    response.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"))
}

fn exchange(client: &mut Option<Client>, site: SocketAddr, request: &[u8]) -> std::io::Result<Response> {
    let client = match client {
        Some(client) => client,
        None => client.insert(Client::try_connect(site)?),
    };
    client.try_send(request)?;
    client.try_response()
}
