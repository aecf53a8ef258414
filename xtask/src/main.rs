//! `cargo xtask`: everything that is done with this repository, one file for each subcommand.
#![forbid(unsafe_code)]

mod bench;
mod build_ebpf;
mod demo;
mod ebpf_object;
mod lint;
mod setup;
mod sh;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Set-up, tests, demo and benchmarks of preflightd.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    Setup(setup::Arguments),
    Demo(demo::Arguments),
    BuildEbpf(build_ebpf::Arguments),
    Lint(lint::Arguments),
    Test(test::Arguments),
    Bench(bench::Arguments),
}

fn main() -> ExitCode {
    let done = match Arguments::parse().task {
        Task::Setup(arguments) => setup::run(&arguments),
        Task::Demo(arguments) => demo::run(&arguments),
        Task::BuildEbpf(arguments) => build_ebpf::run(&arguments),
        Task::Lint(arguments) => lint::run(&arguments),
        Task::Test(arguments) => test::run(&arguments),
        Task::Bench(arguments) => bench::run(&arguments),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
