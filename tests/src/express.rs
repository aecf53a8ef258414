//! A real Express application with the `cors` package, in a process of its own.
#![forbid(unsafe_code)]

use crate::{
    client::Response,
    site::{PATIENCE, end, free_address, have, program, wait_until},
};
use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};
use tempfile::TempDir;

/// A running application.
#[derive(Debug)]
pub struct Express {
    child: Child,
    directory: TempDir,
    address: SocketAddr,
}

/// The options of `cors` are in a file that is read anew for each request. Each preflight is counted on `/preflights`.
const APPLICATION: &str = r"
const express = require('express');
const cors = require('cors');
const fs = require('fs');
const [host, port, file] = process.argv.slice(2);
let preflights = 0;
const app = express();
app.get('/preflights', (request, response) => response.send(String(preflights)));
app.use((request, response, next) => {
  if (request.method === 'OPTIONS') preflights += 1;
  next();
});
app.use(cors((request, done) => done(null, JSON.parse(fs.readFileSync(file, 'utf8')))));
app.all('/{*any}', (request, response) => response.send('from the application'));
app.listen(Number(port), host);
";

/// Whether it can be run: node is there, and `cargo xtask setup` has installed the packages. In CI they must be.
pub fn can_run() -> bool {
    if !have(&["node"]) {
        return false;
    }
    let there = packages().join("express").is_dir() && packages().join("cors").is_dir();
    let in_ci = std::env::var("CI").is_ok_and(|value| !matches!(&*value, "" | "0" | "false"));
    assert!(there || !in_ci, "express and cors are not installed (`cargo xtask setup`)");
    if !there {
        eprintln!("skipped: not installed: express, cors (`cargo xtask setup`)");
    }
    there
}

/// Where `cargo xtask setup` puts them.
fn packages() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../.tools/express/node_modules")
}

/// One request without content in its answer, on a connection of its own. `cors` sends a 204 with `Content-Length: 0`,
/// which RFC 9110 §8.6 forbids and every browser bears: here it is left out.
///
/// # Panics
/// The answer is none.
pub fn exchange(address: SocketAddr, request: impl AsRef<[u8]>) -> Response {
    let mut stream = TcpStream::connect(address).expect("connecting");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    stream.write_all(request.as_ref()).expect("sending");
    let mut bytes = Vec::new();
    let mut chunk = [0; 4096];
    while !bytes.ends_with(b"\r\n\r\n") {
        let n = stream.read(&mut chunk).expect("reading");
        assert!(n > 0, "the connection ended after {}", bytes.escape_ascii());
        bytes.extend_from_slice(&chunk[..n]);
    }
    let mut text = String::from_utf8(bytes).expect("UTF-8");
    if text.starts_with("HTTP/1.1 204 ") {
        text = text.replace("Content-Length: 0\r\n", "");
    }
    let (response, _) = Response::parse(text.as_bytes(), true).expect("a response").expect("all of it");
    response
}

impl Express {
    /// Starts it with these options of `cors`, as JSON, and waits until it listens.
    ///
    /// # Panics
    /// It does not.
    pub fn start(options: &str) -> Self {
        let directory = TempDir::with_prefix("express-").expect("a directory for the application");
        let address = free_address();
        let (file, script) = (directory.path().join("cors.json"), directory.path().join("app.js"));
        fs::write(&file, options).expect("writing the options");
        fs::write(&script, APPLICATION).expect("writing the application");
        let log = fs::File::create(directory.path().join("log")).expect("the application's log");
        let child = Command::new(program("node").expect("node is installed"))
            .arg(&script)
            .args([address.ip().to_string(), address.port().to_string()])
            .arg(&file)
            .env("NODE_PATH", packages())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("starting node");
        let mut express = Self { child, directory, address };
        wait_until("the application to listen", || {
            if let Some(status) = express.child.try_wait().expect("waiting for node") {
                let log = fs::read_to_string(express.directory.path().join("log")).unwrap_or_default();
                panic!("node ended with {status}: {log}");
            }
            TcpStream::connect(address).is_ok()
        });
        express
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Other options, from the next request on.
    ///
    /// # Panics
    /// They cannot be written.
    pub fn set(&self, options: &str) {
        let new = self.directory.path().join("cors.json.new");
        fs::write(&new, options).expect("writing the options");
        fs::rename(new, self.directory.path().join("cors.json")).expect("renaming the options");
    }

    /// Preflights that came to it so far.
    ///
    /// # Panics
    /// It does not say.
    pub fn preflights(&self) -> u64 {
        let response = crate::client::fetch(self.address, "/preflights").expect("asking the application");
        String::from_utf8_lossy(&response.body).parse().expect("a number")
    }
}

impl Drop for Express {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}
