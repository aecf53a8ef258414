//! The demo: a real nginx on its port 80, preflightd beside it, which steers that port, and a client with a mixed load at
//! the other end of a veth pair; a live display, a few exchanges by curl. Where the port cannot be steered preflightd
//! listens before nginx, without root all three on loopback; it says so and why. `cargo xtask demo` builds and runs it.
#![forbid(unsafe_code)]

mod load;
mod scene;
mod show;

use clap::{Parser, Subcommand};
use std::{path::PathBuf, process::ExitCode};

/// preflightd beside a real nginx, live.
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
