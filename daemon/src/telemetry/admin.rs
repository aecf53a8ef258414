//! The two admin surfaces.
//!
//! On an address of the node, read-only and without anything of policies or denials in detail: `/metrics`, `/healthz`,
//! `/readyz`. On a Unix socket that only its owner may use: `POST /explain[?listener=NAME]` with the bytes of a request
//! as the body, `GET /status`, `GET /learned[?host=HOST]`, `POST /learned/purge[?host=HOST]` and `GET /shadow`; all answer
//! in JSON.

use super::{Metrics, Status};
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue},
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::{fs::Mode, process::umask};
use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::Semaphore,
};

/// Connections at once on each surface; further ones wait.
const MAX_CONNECTIONS: usize = 64;
/// For a client to send a request's head, and for the whole of a request and its answer.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of a request to explain.
const MAX_BODY: usize = 1 << 20;

/// Told to who asks for what was learned.
const NOTHING_LEARNED: &str = "the daemon learns nothing: name hosts in learn.hosts and restart it\n";

type Answer = Response<Full<Bytes>>;

/// Opens the address.
///
/// # Errors
/// It cannot be had: says which and what to do about it.
pub async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|e| {
        io::Error::new(
            e.kind(),
            format!("cannot listen on the admin address {address}: {e}; choose another one"),
        )
    })
}

/// Serves `/metrics`, `/healthz` and `/readyz` for good.
pub async fn serve(listener: TcpListener, status: Arc<Status>) {
    let metrics = Arc::new(Metrics::new());
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let Some(stream) = accepted(listener.accept().await.map(|(stream, _)| stream)).await else {
            continue;
        };
        let (status, metrics) = (status.clone(), metrics.clone());
        tokio::spawn(async move {
            connection(stream, |request| {
                let answer = public(&request, &status, &metrics);
                async { answer }
            })
            .await;
            drop(place);
        });
    }
}

/// A Unix socket that is removed when this is dropped.
#[derive(Debug)]
pub struct AdminSocket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode: another daemon may have replaced it.
    identity: (u64, u64),
}

impl AdminSocket {
    /// Opens the socket with mode 0600. One that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// Somebody listens on it, the path is no socket, or it cannot be made.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let context = |e: io::Error, help: &str| {
            io::Error::new(e.kind(), format!("cannot open the admin socket {}: {e}; {help}", path.display()))
        };
        if let Ok(metadata) = path.symlink_metadata() {
            if !metadata.file_type().is_socket() {
                let e = io::Error::from(io::ErrorKind::AlreadyExists);
                return Err(context(e, "there is a file that is no socket: choose another path"));
            }
            match std::os::unix::net::UnixStream::connect(path) {
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                    std::fs::remove_file(path).map_err(|e| context(e, "the old socket cannot be removed"))?;
                }
                Ok(_) | Err(_) => {
                    let e = io::Error::from(io::ErrorKind::AddrInUse);
                    return Err(context(e, "another process listens there: stop it or choose another path"));
                }
            }
        }
        // From the first moment, not by a later chmod.
        let before = umask(Mode::RWXG | Mode::RWXO | Mode::XUSR);
        let listener = UnixListener::bind(path);
        umask(before);
        let listener = listener.map_err(|e| context(e, "its directory must exist and be writable"))?;
        let metadata = path.symlink_metadata().map_err(|e| context(e, "it was removed at once"))?;
        Ok(Self { listener, path: path.to_owned(), identity: (metadata.dev(), metadata.ino()) })
    }

    /// Serves `/explain` and `/status` for good.
    pub async fn serve(self, status: Arc<Status>) {
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let Ok(place) = places.clone().acquire_owned().await else { return };
            let Some(stream) = accepted(self.listener.accept().await.map(|(stream, _)| stream)).await else {
                continue;
            };
            let status = status.clone();
            tokio::spawn(async move {
                connection(stream, |request| private(request, status.clone())).await;
                drop(place);
            });
        }
    }
}

impl Drop for AdminSocket {
    fn drop(&mut self) {
        let ours = self.path.symlink_metadata().is_ok_and(|m| (m.dev(), m.ino()) == self.identity);
        if ours {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// An accepted stream; after an error a pause, as most of them last (too few descriptors).
async fn accepted<S>(result: io::Result<S>) -> Option<S> {
    match result {
        Ok(stream) => Some(stream),
        Err(error) => {
            tracing::warn!(%error, "cannot accept an admin connection");
            tokio::time::sleep(Duration::from_millis(100)).await;
            None
        }
    }
}

async fn connection<S, F, A>(stream: S, answer: F)
where
    S: AsyncRead + AsyncWrite + Unpin,
    F: Fn(Request<Incoming>) -> A,
    A: Future<Output = Answer>,
{
    let service = service_fn(|request| {
        let answer = answer(request);
        async {
            let late = |_| plain(StatusCode::REQUEST_TIMEOUT, "The request took too long.\n");
            Ok::<_, Infallible>(tokio::time::timeout(TIMEOUT, answer).await.unwrap_or_else(late))
        }
    });
    // What goes wrong on a connection of this kind is its client's affair.
    let _ = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(TIMEOUT)
        .max_buf_size(64 << 10)
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

fn public(request: &Request<Incoming>, status: &Status, metrics: &Metrics) -> Answer {
    if let Some(refusal) = wrong_method(request, &[Method::GET, Method::HEAD]) {
        return refusal;
    }
    match request.uri().path() {
        "/metrics" => {
            let mut answer = plain(StatusCode::OK, metrics.render(status));
            answer
                .headers_mut()
                .insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8"));
            answer
        }
        "/healthz" => plain(StatusCode::OK, "ok\n"),
        "/readyz" if status.is_ready() => plain(StatusCode::OK, "ready\n"),
        "/readyz" if status.is_draining() => plain(StatusCode::SERVICE_UNAVAILABLE, "draining\n"),
        "/readyz" => plain(StatusCode::SERVICE_UNAVAILABLE, "starting\n"),
        _ => plain(StatusCode::NOT_FOUND, "There are /metrics, /healthz and /readyz.\n"),
    }
}

async fn private(request: Request<Incoming>, status: Arc<Status>) -> Answer {
    match request.uri().path() {
        "/status" => match wrong_method(&request, &[Method::GET, Method::HEAD]) {
            Some(refusal) => refusal,
            None => json(&status.json()),
        },
        "/explain" => match wrong_method(&request, &[Method::POST]) {
            Some(refusal) => refusal,
            None => explain(request, &status).await,
        },
        "/learned" => match wrong_method(&request, &[Method::GET, Method::HEAD]) {
            Some(refusal) => refusal,
            None => learned(&request, &status),
        },
        "/learned/purge" => match wrong_method(&request, &[Method::POST]) {
            Some(refusal) => refusal,
            None => purge(&request, &status),
        },
        "/shadow" => match wrong_method(&request, &[Method::GET, Method::HEAD]) {
            Some(refusal) => refusal,
            None => shadow(&status),
        },
        _ => plain(
            StatusCode::NOT_FOUND,
            "There are POST /explain, GET /status, GET /learned, POST /learned/purge and GET /shadow.\n",
        ),
    }
}

/// `host` of the query. A host has no byte that would have to be encoded.
fn host_of(request: &Request<Incoming>) -> Option<&str> {
    request.uri().query()?.split('&').find_map(|pair| pair.strip_prefix("host="))
}

fn learned(request: &Request<Incoming>, status: &Status) -> Answer {
    match status.ask().and_then(crate::ask::Shared::store) {
        Some(store) => {
            json(&store.json(host_of(request), |question| status.listener_name(question.listener)))
        }
        None => plain(StatusCode::CONFLICT, NOTHING_LEARNED),
    }
}

fn purge(request: &Request<Incoming>, status: &Status) -> Answer {
    match status.ask().and_then(|ask| ask.purge(host_of(request))) {
        Some(purged) => json(&serde_json::json!({ "purged": purged })),
        None => plain(StatusCode::CONFLICT, NOTHING_LEARNED),
    }
}

fn shadow(status: &Status) -> Answer {
    let labels = status.running().labels.clone();
    match status.ask().and_then(crate::ask::Shared::shadow) {
        Some(shadow) => json(&shadow.json(&labels, |question| status.listener_name(question.listener))),
        None => {
            plain(StatusCode::CONFLICT, "the daemon compares nothing: set shadow.enabled and restart it\n")
        }
    }
}

async fn explain(request: Request<Incoming>, status: &Status) -> Answer {
    let query = request.uri().query().unwrap_or("").to_owned();
    let listener = query.split('&').find_map(|pair| pair.strip_prefix("listener="));
    let body = match Limited::new(request.into_body(), MAX_BODY).collect().await {
        Ok(body) => body.to_bytes(),
        Err(e) if e.is::<LengthLimitError>() => {
            return plain(StatusCode::PAYLOAD_TOO_LARGE, "A request to explain has at most 1 MiB.\n");
        }
        Err(_) => return plain(StatusCode::BAD_REQUEST, "The body did not arrive.\n"),
    };
    match status.explain(listener, &body) {
        Ok(report) => match serde_json::to_value(report) {
            Ok(report) => json(&report),
            Err(e) => plain(StatusCode::INTERNAL_SERVER_ERROR, format!("{e}\n")),
        },
        Err(e) => plain(StatusCode::BAD_REQUEST, format!("{e}\n")),
    }
}

fn wrong_method(request: &Request<Incoming>, allowed: &[Method]) -> Option<Answer> {
    if allowed.contains(request.method()) {
        return None;
    }
    let mut answer = plain(StatusCode::METHOD_NOT_ALLOWED, "Not with this method.\n");
    let allowed: Vec<_> = allowed.iter().map(Method::as_str).collect();
    if let Ok(value) = HeaderValue::from_str(&allowed.join(", ")) {
        answer.headers_mut().insert(ALLOW, value);
    }
    Some(answer)
}

fn json(value: &serde_json::Value) -> Answer {
    let mut answer = plain(StatusCode::OK, format!("{value:#}\n"));
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    answer
}

fn plain(status: StatusCode, text: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(text.into()));
    *answer.status_mut() = status;
    let headers = answer.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    answer
}
