//! The demo: a real nginx as the proxy, preflightd before it, a client with a mixed load, each at its end of a veth pair
//! (without root all three on loopback), a live display, a few exchanges by curl. `cargo xtask demo` builds and runs it.
#![forbid(unsafe_code)]

mod load;
mod scene;
mod show;

use clap::{Parser, Subcommand};
use std::{path::PathBuf, process::ExitCode};

/// preflightd before a real nginx, live.
#[derive(Parser)]
#[command(name = "cargo xtask demo")]
struct Arguments {
    #[command(flatten)]
    stage: scene::Stage,
    #[command(subcommand)]
    part: Option<Part>,
}

#[derive(Subcommand)]
enum Part {
    /// What runs where the client is (the demo starts this itself).
    #[command(hide = true)]
    Show(show::Scene),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let outcome = match &arguments.part {
        None => scene::run(&arguments.stage),
        Some(Part::Show(scene)) => show::run(scene).map(|()| ExitCode::SUCCESS),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("demo: {error}");
        ExitCode::FAILURE
    })
}

/// What can go wrong, said to the user.
type Fallible<T> = Result<T, String>;

/// A file beside this program.
fn beside(name: &str) -> Fallible<PathBuf> {
    let this = std::env::current_exe().map_err(|e| format!("where is this program? {e}"))?;
    let file = this.with_file_name(name);
    if file.is_file() {
        return Ok(file);
    }
    Err(format!("{} is not built: run `cargo xtask demo`, which builds it", file.display()))
}
