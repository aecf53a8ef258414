//! A real nginx from a generated configuration, in a directory of its own.
#![forbid(unsafe_code)]

use crate::site::{end, program, wait_until};
use std::{
    fmt::Write as _,
    fs,
    net::{SocketAddr, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
};
use tempfile::TempDir;

/// A running nginx.
#[derive(Debug)]
pub struct Nginx {
    child: Child,
    directory: TempDir,
}

impl Nginx {
    /// Starts nginx with these `server` blocks and waits until it listens on `addresses`. The closure gets the
    /// directory of this nginx and may put files there.
    pub fn start(addresses: &[SocketAddr], servers: impl FnOnce(&Path) -> String) -> Self {
        Self::start_with(addresses, Command::new(program("nginx").expect("nginx is installed")), servers)
    }

    /// As [`Nginx::start`], by a command that runs nginx with the arguments that will be added (within a network
    /// namespace, say). Without addresses the caller waits for it.
    pub fn start_with(
        addresses: &[SocketAddr],
        command: Command,
        servers: impl FnOnce(&Path) -> String,
    ) -> Self {
        Self::start_workers(1, addresses, command, servers)
    }

    /// As [`Nginx::start_with`], with so many worker processes.
    pub fn start_workers(
        workers: u32,
        addresses: &[SocketAddr],
        command: Command,
        servers: impl FnOnce(&Path) -> String,
    ) -> Self {
        Self::start_main(&format!("worker_processes {workers};"), addresses, command, servers)
    }

    /// As [`Nginx::start_with`], with these directives outside of all blocks: modules to load, say.
    pub fn start_main(
        main: &str,
        addresses: &[SocketAddr],
        mut command: Command,
        servers: impl FnOnce(&Path) -> String,
    ) -> Self {
        let directory = TempDir::with_prefix("nginx-").expect("a directory for nginx");
        let path = directory.path();
        let mut config = String::new();
        if rustix::process::geteuid().is_root() {
            // Its workers would otherwise be another user, who may not read the directory.
            config.push_str("user root;\n");
        }
        write!(
            config,
            "{main}
            pid {dir}/nginx.pid;
            error_log {dir}/error.log notice;
            events {{ worker_connections 16384; }}
            http {{
                log_format lab '$server_port $remote_addr \"$request\" $status';
                access_log {dir}/access.log lab;
                client_body_temp_path {dir}/body;
                proxy_temp_path {dir}/proxy;
                fastcgi_temp_path {dir}/fastcgi;
                uwsgi_temp_path {dir}/uwsgi;
                scgi_temp_path {dir}/scgi;
                client_max_body_size 64m;
                keepalive_requests 1000000;
                default_type text/plain;
                types {{ text/html html; }}
                {servers}
            }}\n",
            dir = path.display(),
            servers = servers(path),
        )
        .expect("writing into a string");
        let file = path.join("nginx.conf");
        fs::write(&file, config).expect("writing nginx.conf");
        let log = fs::File::create(path.join("error.log")).expect("nginx's log");
        let child = command
            .args(["-g", "daemon off;", "-c"])
            .arg(&file)
            .arg("-p")
            .arg(path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap_or_else(|e| panic!("starting {command:?}: {e}"));
        let mut nginx = Self { child, directory };
        for address in addresses {
            wait_until(format_args!("nginx on {address}"), || {
                if let Some(status) = nginx.child.try_wait().expect("waiting for nginx") {
                    panic!("nginx ended with {status}:\n{}", nginx.error_log());
                }
                TcpStream::connect(address).is_ok()
            });
        }
        nginx
    }

    /// The lines of its access log so far: port, client, request line, status. A line is written when a request has
    /// ended, which may be a moment after its client has the response.
    pub fn access_log(&self) -> Vec<String> {
        let text = fs::read_to_string(self.directory.path().join("access.log")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// Its error log.
    pub fn error_log(&self) -> String {
        fs::read_to_string(self.directory.path().join("error.log")).unwrap_or_default()
    }

    /// Its process (the master).
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}
