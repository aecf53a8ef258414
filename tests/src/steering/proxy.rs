//! The proxies of a lab.
#![forbid(unsafe_code)]

use std::{
    fs::{self, File},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    process::{Child, Stdio},
};

use socket2::Protocol;
use tempfile::TempDir;

use super::place::listen;
use crate::{
    Behaviour, Nginx, Upstream,
    netns::Netns,
    site::{end, program},
};

/// What stands behind the served port.
#[derive(Clone, Debug)]
pub enum Proxy {
    /// nginx. Its answers carry `X-From: proxy`, its bodies are `nginx URI`; OPTIONS is 405. `POST /echo` gives the
    /// body back; `/big` is [`BIG`] bytes.
    Nginx {
        /// Processes that accept.
        workers: u32,
        /// Each with a listening socket of its own.
        reuseport: bool,
    },
    /// haproxy, with the same answers.
    Haproxy,
    /// A server of ours that records every byte, on one socket for both IP versions.
    Upstream(Behaviour),
    /// The same on a socket for Multipath TCP, as Go's servers listen.
    MptcpUpstream(Behaviour),
    /// Nothing listens.
    None,
}

/// The length of nginx's `/big`.
pub const BIG: usize = 8 << 20;

/// What `/big` holds.
pub fn big() -> Vec<u8> {
    (0..BIG as u32 / 4).flat_map(|i| i.wrapping_mul(2_654_435_761).to_be_bytes()).collect()
}

/// A proxy that was started.
#[derive(Debug)]
pub(super) enum Running {
    Nginx(Nginx),
    Haproxy { child: Child, _directory: TempDir },
    Upstream(Upstream),
    None,
}

impl Running {
    /// Starts the proxy in the node's namespace, with further directives in nginx's server block. It may not listen yet.
    pub(super) fn start(proxy: &Proxy, node: &Netns, more: &str) -> Self {
        let upstream = |protocol, behaviour: &Behaviour| {
            Self::Upstream(Upstream::on(listen(node, EVERYWHERE, protocol), behaviour.clone()))
        };
        match proxy {
            Proxy::None => Self::None,
            Proxy::Nginx { workers, reuseport } => nginx(node, *workers, *reuseport, more),
            Proxy::Haproxy => haproxy(node),
            Proxy::Upstream(behaviour) => upstream(Protocol::TCP, behaviour),
            Proxy::MptcpUpstream(behaviour) => upstream(Protocol::MPTCP, behaviour),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Self::Haproxy { child, .. } = self {
            end(child);
        }
    }
}

/// The port of the site on all addresses of both IP versions.
const EVERYWHERE: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 80);
/// Where `/echo` is served, within the node's namespace.
pub(super) const BACKEND: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8081);

fn nginx(node: &Netns, workers: u32, reuseport: bool, more: &str) -> Running {
    let command = node.command(program("nginx").expect("nginx is installed"));
    let reuseport = if reuseport { "reuseport" } else { "" };
    Running::Nginx(Nginx::start_workers(workers, &[], command, |directory| {
        fs::write(directory.join("big"), big()).expect("writing /big");
        format!(
            "upstream backend {{ server {BACKEND}; keepalive 64; }}
            server {{
                listen 0.0.0.0:80 {reuseport};
                listen [::]:80 {reuseport};
                add_header X-From proxy always;
                {more}
                location = /echo {{
                    proxy_http_version 1.1;
                    proxy_set_header Connection '';
                    proxy_pass http://backend;
                }}
                location = /big {{ root {directory}; }}
                location / {{
                    if ($request_method = OPTIONS) {{ return 405; }}
                    return 200 'nginx $request_uri';
                }}
            }}",
            directory = directory.display()
        )
    }))
}

fn haproxy(node: &Netns) -> Running {
    let directory = TempDir::with_prefix("haproxy-").expect("a directory for haproxy");
    let config = format!(
        "global
            nbthread 1
            maxconn 8192
        defaults
            mode http
            timeout connect 30s
            timeout client 60s
            timeout server 60s
        frontend web
            bind 0.0.0.0:80
            bind [::]:80 v6only
            use_backend echo if {{ path /echo }}
            http-request return status 405 hdr X-From proxy if METH_OPTIONS !{{ path /echo }}
            http-request return status 200 content-type text/plain hdr X-From proxy lf-string \"nginx %[url]\" unless {{ path /echo }}
        backend echo
            http-response set-header X-From proxy
            server echo {BACKEND}\n"
    );
    let file = directory.path().join("haproxy.cfg");
    fs::write(&file, config).expect("writing haproxy.cfg");
    let log = File::create(directory.path().join("log")).expect("haproxy's log");
    let child = node
        .command(program("haproxy").expect("haproxy is installed"))
        .args(["-db", "-f"])
        .arg(&file)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .expect("starting haproxy");
    Running::Haproxy { child, _directory: directory }
}
