//! The admin socket of a running daemon, as commands ask it.

use super::Failure;
use http_body_util::{BodyExt as _, Empty};
use hyper::{Method, Request, body::Bytes};
use hyper_util::rt::TokioIo;
use std::{path::Path, time::Duration};
use tokio::net::UnixStream;

/// For all of it.
const TIMEOUT: Duration = Duration::from_secs(15);

/// Sends a request without a body, and gives the answer's JSON.
pub(super) fn ask(socket: &Path, method: Method, target: &str) -> Result<serde_json::Value, Failure> {
    let cannot = |e: &dyn std::fmt::Display| {
        Failure::Usage(format!(
            "cannot ask the daemon at {}: {e}; is it running, with admin.socket set to this path, under your user?",
            socket.display()
        ))
    };
    let request = Request::builder().method(method).uri(target).header("host", "preflightd");
    let request = request.body(Empty::<Bytes>::new()).map_err(|e| cannot(&e))?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| cannot(&e))?;
    let exchange = async {
        let stream = UnixStream::connect(socket).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let response = sender.send_request(request).await?;
        let status = response.status();
        Ok::<_, Box<dyn std::error::Error>>((status, response.into_body().collect().await?.to_bytes()))
    };
    let late = |_| Err("it does not answer".into());
    let (status, body) = runtime
        .block_on(async { tokio::time::timeout(TIMEOUT, exchange).await.unwrap_or_else(late) })
        .map_err(|e| cannot(&e))?;
    if !status.is_success() {
        return Err(Failure::Failed(String::from_utf8_lossy(&body).trim().to_owned()));
    }
    serde_json::from_slice(&body).map_err(|e| cannot(&e))
}
