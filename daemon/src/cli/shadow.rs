//! `preflightd shadow`: how the proxy's answers compare with ours.

use super::{Failure, Format, print, socket};
use crate::config::escape;
use clap::{Args, Subcommand};
use hyper::Method;
use serde::Deserialize;
use std::{fmt::Write as _, path::PathBuf};

/// Tells how a running daemon's answers compare with the proxy's ([shadow]).
#[derive(Args, Debug)]
pub(super) struct Shadow {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Report(Report),
}

/// Prints what was compared, route by route, and the last differences with both answers.
///
/// Answers are compared as a browser judges them: `agree`; `proxy_allows_we_deny`, `we_allow_proxy_denies`,
/// `proxy_no_cors` (the verdict differs); `credentials`, `methods`, `headers`, `max_age`, `expose` (both allow the
/// request, and differ in what else they allow); `we_pass` (we leave it to the proxy), `ask_failed` (the proxy did not
/// answer). A comparison with several differences counts under each.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  preflightd shadow report --admin-socket /run/preflightd/admin.sock
  preflightd shadow report --admin-socket /run/preflightd/admin.sock --format json | jq '.samples[0]'

With --format json one object is printed:
  {\"compared\", \"counts\": [{\"host\", \"route\", \"policy\", \"result\", \"count\"}],
   \"samples\": [{\"at\", \"listener\", \"matched\", \"results\", \"request\", \"ours\", \"proxy\"}]}

Exit codes: 0 all that was compared agrees; 1 there are differences, or nothing is compared; 2 the daemon cannot be
asked.")]
struct Report {
    /// The running daemon's Unix socket (admin.socket).
    #[arg(long, value_name = "PATH")]
    admin_socket: PathBuf,
    /// How the report is printed.
    #[arg(long, default_value = "text")]
    format: Format,
}

#[derive(Deserialize)]
struct Told {
    compared: u64,
    counts: Vec<Row>,
    samples: Vec<Sample>,
}

#[derive(Deserialize)]
struct Row {
    host: String,
    route: String,
    policy: String,
    result: String,
    count: u64,
}

#[derive(Deserialize)]
struct Sample {
    listener: String,
    results: Vec<String>,
    request: String,
    ours: String,
    proxy: String,
}

pub(super) fn shadow(args: &Shadow) -> Result<(), Failure> {
    let Command::Report(args) = &args.command;
    let answer = socket::ask(&args.admin_socket, Method::GET, "/shadow")?;
    let told: Told = serde_json::from_value(answer.clone()).map_err(|e| {
        Failure::Failed(format!("the daemon's report is not as expected: {e}; is it another version?"))
    })?;
    match args.format {
        Format::Json => print(format_args!("{answer:#}\n")),
        Format::Text => print(render(&told)),
    }
    let bad = |row: &Row| !matches!(&*row.result, "agree" | "we_pass" | "ask_failed");
    if told.counts.iter().any(bad) { Err(Failure::Findings) } else { Ok(()) }
}

fn render(told: &Told) -> String {
    let mut out = format!("compared: {}\n", told.compared);
    for Row { host, route, policy, result, count } in &told.counts {
        let route = if host.is_empty() {
            "(no route)".to_owned()
        } else {
            format!("{} {} ({})", escape(host), escape(route), escape(policy))
        };
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{count:>10}  {result:<22}  {route}");
    }
    for Sample { listener, results, request, ours, proxy } in &told.samples {
        let _ = writeln!(out, "\n{} on {}", results.join(", "), escape(listener));
        for (who, text) in [("asked", request), ("ours", ours), ("proxy", proxy)] {
            for (i, line) in text.lines().filter(|line| !line.is_empty()).enumerate() {
                let _ = writeln!(out, "  {:<5}  {}", if i == 0 { who } else { "" }, escape(line));
            }
        }
    }
    out
}
