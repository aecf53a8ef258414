//! A real headless Chromium, driven by chromedriver (WebDriver, <https://www.w3.org/TR/webdriver2/>).
#![forbid(unsafe_code)]

use crate::{
    client::Client,
    site::{end, free_address, have, program, wait_for},
};
use serde_json::{Value, json};
use std::{
    fs,
    net::SocketAddr,
    process::{Child, Command, Stdio},
};
use tempfile::TempDir;

/// A browser with one window and a fresh profile.
#[derive(Debug)]
pub struct Browser {
    driver: Child,
    address: SocketAddr,
    session: String,
    profile: TempDir,
}

/// No background traffic, no prompts; without its sandbox it also runs as root.
const ARGUMENTS: [&str; 10] = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--no-proxy-server",
];

impl Browser {
    /// Starts one; `None`, said on stderr, where Chromium is not installed (in CI that fails).
    pub fn start() -> Option<Self> {
        if !have(&["chromium", "chromedriver"]) {
            return None;
        }
        let profile = TempDir::with_prefix("chromium-").expect("a directory for Chromium");
        let address = free_address();
        let log = fs::File::create(profile.path().join("chromedriver.log")).expect("chromedriver's log");
        let driver = Command::new(program("chromedriver").expect("just looked for"))
            .arg(format!("--port={}", address.port()))
            .env("HOME", profile.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle to the log"))
            .stderr(log)
            .spawn()
            .expect("starting chromedriver");
        let mut browser = Self { driver, address, session: String::new(), profile };
        wait_for("chromedriver", || browser.command("GET", "/status", &Value::Null).ok());
        let data = browser.profile.path().join("data");
        let arguments: Vec<_> = ARGUMENTS
            .into_iter()
            .map(str::to_owned)
            .chain([format!("--user-data-dir={}", data.display())])
            .collect();
        let capabilities = json!({"capabilities": {"alwaysMatch": {
            "goog:chromeOptions": {"binary": program("chromium").expect("just looked for"), "args": arguments},
            "timeouts": {"script": 30_000, "pageLoad": 60_000},
        }}});
        let value = browser.command("POST", "/session", &capabilities).expect("a browser session");
        let id = value["sessionId"].as_str().expect("a session id");
        browser.session = format!("/session/{id}");
        Some(browser)
    }

    /// Loads a page.
    pub fn open(&self, url: &str) {
        self.command("POST", &format!("{}/url", self.session), &json!({ "url": url }))
            .unwrap_or_else(|e| panic!("opening {url}: {e}"));
    }

    /// Runs the body of an async function in the page; gives what it returns, or the text of what it throws.
    pub fn run(&self, body: &str) -> Result<Value, String> {
        let script = format!(
            "const done = arguments[arguments.length - 1];
            (async () => {{ {body} }})().then(ok => done({{ok}}), e => done({{thrown: String(e)}}));"
        );
        let command = json!({"script": script, "args": []});
        let mut value = self
            .command("POST", &format!("{}/execute/async", self.session), &command)
            .unwrap_or_else(|e| panic!("running {body}: {e}"));
        match value["thrown"].as_str() {
            Some(text) => Err(text.to_owned()),
            None => Ok(value["ok"].take()),
        }
    }

    fn command(&self, method: &str, path: &str, body: &Value) -> Result<Value, String> {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let mut client = Client::try_connect(self.address).map_err(|e| e.to_string())?;
        client
            .stream()
            .set_read_timeout(Some(std::time::Duration::from_mins(2)))
            .map_err(|e| e.to_string())?;
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            self.address,
            body.len()
        );
        client.try_send(head + &body).map_err(|e| e.to_string())?;
        let response = client.try_response().map_err(|e| e.to_string())?;
        let mut answer: Value = serde_json::from_slice(&response.body).map_err(|e| e.to_string())?;
        let value = answer["value"].take();
        if response.status == 200 { Ok(value) } else { Err(value.to_string()) }
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        if !self.session.is_empty() {
            // Ends Chromium; chromedriver alone would leave it behind.
            let _ = self.command("DELETE", &self.session, &Value::Null);
        }
        end(&mut self.driver);
    }
}
