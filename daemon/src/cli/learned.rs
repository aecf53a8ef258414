//! `preflightd learned`: what a running daemon has learned of the proxy, and how it is forgotten.

use super::{Failure, Format, print, socket};
use crate::config::escape;
use clap::{Args, Subcommand};
use hyper::Method;
use serde::Deserialize;
use std::{fmt::Write as _, path::PathBuf};

/// Shows, or has a running daemon forget, what it learned of the proxy's answers ([learn]).
#[derive(Args, Debug)]
pub(super) struct Learned {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    List(List),
    Purge(Purge),
}

/// Lists every question that is remembered, and what became of it.
///
/// `known`: its answer is given until the time is over. `asked`: the proxy is being asked. `refused`: the answer may not
/// be learned, and why; it is asked again later.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  preflightd learned list --admin-socket /run/preflightd/admin.sock
  preflightd learned list --admin-socket /run/preflightd/admin.sock --host app.example.com --format json

With --format json one object is printed:
  {\"entries\": [{\"listener\", \"host\", \"target\", \"origin\", \"method\", \"headers\", \"state\", \"why\", \"seconds_left\"}],
   \"max_entries\"}

Exit codes: 0 good, 1 the daemon learns nothing, 2 it cannot be asked.")]
struct List {
    #[command(flatten)]
    of: Of,
    /// How the list is printed.
    #[arg(long, default_value = "text")]
    format: Format,
}

/// Has the daemon forget, at once: what is forgotten goes to the proxy, and may be learned anew.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  preflightd learned purge --admin-socket /run/preflightd/admin.sock
  preflightd learned purge --admin-socket /run/preflightd/admin.sock --host app.example.com

Exit codes: 0 good, 1 the daemon learns nothing, 2 it cannot be asked.")]
struct Purge {
    #[command(flatten)]
    of: Of,
}

#[derive(Args, Debug)]
struct Of {
    /// The running daemon's Unix socket (admin.socket).
    #[arg(long, value_name = "PATH")]
    admin_socket: PathBuf,
    /// Only this host, with or without the port that clients name.
    #[arg(long, value_name = "HOST", value_parser = host)]
    host: Option<String>,
}

impl Of {
    fn target(&self, path: &str) -> String {
        self.host.as_ref().map_or_else(|| path.to_owned(), |host| format!("{path}?host={host}"))
    }
}

/// A host as questions have it.
fn host(text: &str) -> Result<String, String> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b':' | b'[' | b']');
    if text.is_empty() || !text.bytes().all(plain) {
        return Err(
            "write a host as clients send it, such as app.example.com or app.example.com:8080".to_owned()
        );
    }
    Ok(text.to_ascii_lowercase())
}

pub(super) fn learned(args: &Learned) -> Result<(), Failure> {
    match &args.command {
        Command::List(args) => list(args),
        Command::Purge(args) => purge(&args.of),
    }
}

#[derive(Deserialize)]
struct Listed {
    entries: Vec<Entry>,
    max_entries: usize,
}

#[derive(Deserialize)]
struct Entry {
    listener: String,
    host: String,
    target: String,
    origin: String,
    method: String,
    headers: String,
    state: String,
    why: Option<String>,
    seconds_left: u64,
}

fn list(args: &List) -> Result<(), Failure> {
    let answer = socket::ask(&args.of.admin_socket, Method::GET, &args.of.target("/learned"))?;
    if args.format == Format::Json {
        print(format_args!("{answer:#}\n"));
        return Ok(());
    }
    let Listed { entries, max_entries } = serde_json::from_value(answer).map_err(|e| {
        Failure::Failed(format!("the daemon's list is not as expected: {e}; is it another version?"))
    })?;
    let mut out = String::new();
    for entry in &entries {
        let state = match &entry.why {
            Some(why) => format!("{} ({why})", entry.state),
            None => entry.state.clone(),
        };
        // Writing to a string cannot fail.
        let _ = writeln!(
            out,
            "{state:<20} {:>5} s  {} {} {}{} from {}{}",
            entry.seconds_left,
            escape(&entry.listener),
            escape(&entry.method),
            escape(&entry.host),
            escape(&entry.target),
            escape(&entry.origin),
            if entry.headers.is_empty() {
                String::new()
            } else {
                format!(" with {}", escape(&entry.headers))
            },
        );
    }
    let _ = writeln!(out, "{} of at most {max_entries}", entries.len());
    print(out);
    Ok(())
}

fn purge(of: &Of) -> Result<(), Failure> {
    let answer = socket::ask(&of.admin_socket, Method::POST, &of.target("/learned/purge"))?;
    print(format_args!("forgotten: {}\n", answer["purged"]));
    Ok(())
}
