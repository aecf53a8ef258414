//! `preflightd explain`.

use super::{Explain, ExplainRequest, Failure, Format, print};
use crate::{
    config::{self, Loaded},
    explain::{self, Context, Report},
    policy::{ListenerId, RouteLabels},
};
use http_body_util::{BodyExt as _, Full};
use hyper::{Request, body::Bytes};
use hyper_util::rt::TokioIo;
use std::{
    io::{IsTerminal as _, Read as _},
    path::Path,
    time::Duration,
};
use tokio::net::UnixStream;

/// No request read from standard input may be longer.
const MAX_RAW: u64 = 1 << 20;

pub(super) fn explain(args: &Explain) -> Result<(), Failure> {
    let bytes = request_bytes(&args.request)?;
    let report = if let Some(socket) = &args.from.admin_socket {
        ask_daemon(socket, args.listener.as_deref(), &bytes)?
    } else if let Some(path) = &args.from.config {
        explain_files(config::load(path), args.listener.as_deref(), &bytes)?
    } else {
        explain_files(
            config::load_policies_alone(&args.from.policy, args.manifests.manifests()),
            args.listener.as_deref(),
            &bytes,
        )?
    };
    match args.format {
        Format::Text => print(explain::render(&report)),
        Format::Json => {
            let json = serde_json::to_string_pretty(&report)
                .map_err(|e| Failure::Failed(format!("cannot write the report as JSON: {e}")))?;
            print(format_args!("{json}\n"));
        }
    }
    if report.allowed() { Ok(()) } else { Err(Failure::Findings) }
}

fn explain_files(
    loaded: std::io::Result<Loaded>,
    listener: Option<&str>,
    bytes: &[u8],
) -> Result<Report, Failure> {
    let mut loaded = loaded.map_err(|e| Failure::Usage(e.to_string()))?;
    let specs = loaded.config.as_ref().map(config::Config::listener_specs).unwrap_or_default();
    let mut labels = RouteLabels::new(usize::MAX);
    let table = loaded.compile(&specs, &mut labels, 1);
    let (Some(table), Some(config)) = (table, &loaded.config) else {
        for finding in loaded.diagnostics.iter().filter(|d| d.is_error()) {
            anstream::eprintln!("{finding}");
        }
        return Err(Failure::Failed("the files have errors: nothing can be explained by them".to_owned()));
    };
    let index = explain::pick_listener(&config.listeners, listener).map_err(Failure::Usage)?;
    let kernel = config.steer.kernel_answers.then(|| {
        let steered = (0..).map(ListenerId).zip(&config.listeners).filter(|(_, listener)| listener.steer);
        table.for_kernel(&steered.map(|(id, _)| id).collect::<Vec<_>>())
    });
    let context = Context {
        table: &table,
        listener: ListenerId(index as u16),
        listener_name: &config.listeners[index].name,
        steered: config.listeners[index].steer,
        kernel: kernel.as_ref(),
        labels: labels.all(),
        sources: &explain::sources(&config.policies),
        limits: config.connection_limits().head,
    };
    Ok(explain::explain(&context, bytes))
}

/// Asks the running daemon: `POST /explain` on its Unix socket.
fn ask_daemon(socket: &Path, listener: Option<&str>, bytes: &[u8]) -> Result<Report, Failure> {
    let cannot = |e: &dyn std::fmt::Display| {
        Failure::Usage(format!(
            "cannot ask the daemon at {}: {e}; is it running, with admin.socket set to this path, under your user?",
            socket.display()
        ))
    };
    let query = listener.map(|name| format!("?listener={name}")).unwrap_or_default();
    let request = Request::post(format!("/explain{query}"))
        .header("host", "preflightd")
        .body(Full::new(Bytes::copy_from_slice(bytes)))
        .map_err(|_| Failure::Usage(format!("`{}` is no listener name", listener.unwrap_or_default())))?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| cannot(&e))?;
    let (status, body) = runtime
        .block_on(async {
            let exchange = async {
                let stream = UnixStream::connect(socket).await?;
                let (mut sender, connection) =
                    hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
                tokio::spawn(connection);
                let response = sender.send_request(request).await?;
                let status = response.status();
                let body = response.into_body().collect().await?.to_bytes();
                Ok::<_, Box<dyn std::error::Error>>((status, body))
            };
            let late = |_| Err("it does not answer".into());
            tokio::time::timeout(Duration::from_secs(15), exchange).await.unwrap_or_else(late)
        })
        .map_err(|e| cannot(&e))?;
    if !status.is_success() {
        return Err(Failure::Usage(String::from_utf8_lossy(&body).trim().to_owned()));
    }
    serde_json::from_slice(&body).map_err(|e| cannot(&e))
}

/// The bytes of the request as they would come over the network.
fn request_bytes(request: &ExplainRequest) -> Result<Vec<u8>, Failure> {
    if request.raw {
        let stdin = std::io::stdin();
        if stdin.is_terminal() {
            eprintln!("reading a request from standard input; end it with an empty line and Ctrl-D");
        }
        let mut bytes = Vec::new();
        stdin
            .take(MAX_RAW)
            .read_to_end(&mut bytes)
            .map_err(|e| Failure::Usage(format!("cannot read the request from standard input: {e}")))?;
        return Ok(bytes);
    }
    let Some(url) = request.url.as_ref().or(request.positional_url.as_ref()) else {
        return Err(Failure::Usage(
            "say which request: --url URL, a URL with curl's -X and -H, or --raw".to_owned(),
        ));
    };
    head(url, request).map_err(Failure::Usage)
}

/// Builds a head. What the user writes goes into it as it is, so that wrong requests can be explained too; only line
/// ends are refused, because they would make other lines of it.
fn head(url: &str, request: &ExplainRequest) -> Result<Vec<u8>, String> {
    let (host, target) = split_url(url)?;
    let mut lines = vec![format!("{} {target} HTTP/1.1", request.request_method)];
    let named = |name: &str| {
        let same =
            |line: &String| line.split(':').next().is_some_and(|n| n.trim().eq_ignore_ascii_case(name));
        request.line.iter().any(same)
    };
    if !named("host") {
        lines.push(format!("Host: {host}"));
    }
    for line in &request.line {
        // As curl has it: `Name;` sends the name without a value, `Name:` sends nothing.
        match line.split_once(':') {
            Some((_, "")) => {}
            Some((name, value)) => lines.push(format!("{name}: {}", value.trim())),
            None => match line.strip_suffix(';') {
                Some(name) => lines.push(format!("{name}:")),
                None => return Err(format!("`-H {line}` is no header line\nwrite -H 'Name: value'")),
            },
        }
    }
    if let Some(method) = &request.method {
        lines.push(format!("Access-Control-Request-Method: {method}"));
    }
    if !request.header.is_empty() {
        // As a browser writes them (Fetch, CORS-unsafe request-header names): lower-case, sorted, unique.
        let split = request.header.iter().flat_map(|names| names.split(','));
        let mut names: Vec<_> = split.map(|name| name.trim().to_ascii_lowercase()).collect();
        names.sort();
        names.dedup();
        lines.push(format!("Access-Control-Request-Headers: {}", names.join(",")));
    }
    if let Some(origin) = &request.origin {
        lines.push(format!("Origin: {origin}"));
    }
    if lines.iter().any(|line| line.contains(['\r', '\n'])) {
        return Err("a line end within an argument; use --raw for such a request".to_owned());
    }
    let mut bytes = lines.join("\r\n").into_bytes();
    bytes.extend_from_slice(b"\r\n\r\n");
    Ok(bytes)
}

/// Host (with a port that is not the scheme's own) and target of a URL.
fn split_url(url: &str) -> Result<(String, String), String> {
    let scheme = url.split_once("://").map(|(scheme, rest)| (scheme.to_ascii_lowercase(), rest));
    let (default_port, rest) = match &scheme {
        Some((scheme, rest)) if scheme == "http" => (":80", *rest),
        Some((scheme, rest)) if scheme == "https" => (":443", *rest),
        Some((scheme, _)) => return Err(format!("`{scheme}` URLs have no preflights: use http or https")),
        None => return Err(format!("`{url}` is no URL: write https://host/path")),
    };
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, rest) = rest.split_at(end);
    if authority.is_empty() || authority.contains('@') {
        return Err(format!("`{url}` has no host, or a user in front of it: write https://host/path"));
    }
    let host = authority.strip_suffix(default_port).unwrap_or(authority).to_ascii_lowercase();
    let path = rest.split('#').next().unwrap_or("");
    Ok((host, if path.starts_with('/') { path.to_owned() } else { format!("/{path}") }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    fn built(args: &[&str]) -> Result<String, String> {
        let start = ["preflightd", "explain", "--policy", "p.toml"];
        let cli = super::super::Cli::try_parse_from(start.iter().chain(args)).map_err(|e| e.to_string())?;
        let super::super::Command::Explain(args) = cli.command else { panic!("not explain") };
        let request = args.request;
        let url = request.url.as_ref().or(request.positional_url.as_ref()).expect("a URL");
        head(url, &request).map(|bytes| String::from_utf8(bytes).expect("UTF-8"))
    }

    #[test]
    fn builds_what_a_browser_sends() {
        let got = built(&[
            "--url",
            "HTTPS://API.example.com:443/v1?q=1#top",
            "--origin",
            "https://app.example",
            "--method",
            "PUT",
            "--header",
            "X-B",
            "--header",
            "x-a,X-B",
        ]);
        let want = "OPTIONS /v1?q=1 HTTP/1.1\r\nHost: api.example.com\r\nAccess-Control-Request-Method: \
                    PUT\r\nAccess-Control-Request-Headers: x-a,x-b\r\nOrigin: https://app.example\r\n\r\n";
        assert_eq!(got.as_deref(), Ok(want));
    }

    #[test]
    fn builds_what_curl_sends() {
        let got = built(&[
            "-X",
            "GET",
            "-H",
            "Host:other",
            "-H",
            "X-Empty;",
            "-H",
            "Accept:",
            "--compressed",
            "http://h:81",
        ]);
        assert_eq!(got.as_deref(), Ok("GET / HTTP/1.1\r\nHost: other\r\nX-Empty:\r\n\r\n"));
    }

    #[test]
    fn refuses_what_is_no_request() {
        for (name, args, want) in [
            ("no scheme", &["--url", "api.example.com/"][..], "no URL"),
            ("other scheme", &["--url", "ftp://h/"], "ftp"),
            ("no host", &["--url", "http:///x"], "no host"),
            ("user", &["--url", "http://u@h/"], "a user"),
            ("line end", &["--url", "http://h/", "--origin", "a\r\nCookie: x"], "line end"),
            ("no line", &["-H", "nonsense", "http://h/"], "no header line"),
            ("two URLs", &["--url", "http://h/", "http://h/"], "cannot be used with"),
            ("raw and URL", &["--raw", "http://h/"], "cannot be used with"),
        ] {
            let got = built(args).expect_err(name);
            assert!(got.contains(want), "{name}: {got}");
        }
    }
}
