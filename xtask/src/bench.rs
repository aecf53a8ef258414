//! `cargo xtask bench`: builds in release what a benchmark needs, and runs it.

use anyhow::{Context as _, Result, ensure};

use crate::{setup, sh};

/// Measure preflightd beside real proxies, or count what gates
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Which one
    name: Name,
    /// Handed on to it, such as --json or --rounds 5; all of them: cargo xtask bench NAME -- --help
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<String>,
}

#[derive(Clone, Copy, clap::ValueEnum)]
pub(crate) enum Name {
    /// Server CPU, latency and memory per answered preflight, beside nginx, haproxy, Envoy and a floor
    Answer,
    /// Nanoseconds of a decision, tables of many sizes, hostile header lists
    Decide,
    /// Throughput of what is passed on, beside haproxy in TCP mode
    Relay,
    /// What steering costs the traffic that is not its own, and which share of preflights it gets; needs root
    Steer,
    /// GETs beside a storm of preflights, steered and not; needs root
    Storm,
    /// What a preflight costs that is answered in the kernel, beside nginx, and how many of a realistic mix are; needs root
    KernelAnswer,
    /// Instruction counts, against the limits in benches/instructions.toml
    Instructions,
}

/// Builds and runs a benchmark. Its stdout is this program's: nothing else is printed there.
///
/// # Errors
/// If it cannot be built, fails, or finds a count above its limit.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if !arguments.rest.iter().any(|argument| argument == "--json") {
        // What is missing then shows as a server that is left out, or as an error that names the package.
        if let Err(error) = setup::run(&setup::Arguments::default()) {
            eprintln!("going on without all of the set-up: {error:#}");
        }
    }
    measure(arguments.name, &arguments.rest)
}

/// As [`run`], where everything has been set up.
pub(crate) fn measure(name: Name, rest: &[String]) -> Result<()> {
    const RELEASE: [&str; 3] = ["--quiet", "--release", "--locked"];
    let binary = match name {
        Name::Answer => "bench-answer",
        Name::Decide => "bench-decide",
        Name::Relay => "bench-relay",
        Name::Steer => "bench-steer",
        Name::Storm => "bench-storm",
        Name::KernelAnswer => "bench-kernel-answer",
        Name::Instructions => "bench-instructions",
    };
    let mut bench = sh::cargo();
    bench.arg("run").args(RELEASE).args(["--package=preflightd-benches", "--bin", binary, "--"]).args(rest);
    let mut commands = vec![];
    if matches!(name, Name::Answer | Name::Relay | Name::Steer | Name::Storm | Name::KernelAnswer) {
        // What they start: preflightd, the floor.
        let mut build = sh::cargo();
        build.arg("build").args(RELEASE).args([
            "--package=preflightd",
            "--package=preflightd-benches",
            "--bins",
        ]);
        commands.push(build);
    }
    commands.push(bench);
    for command in &mut commands {
        let line = sh::show(command);
        let status =
            command.current_dir(sh::root()).status().with_context(|| format!("cannot run `{line}`"))?;
        ensure!(status.success(), "`{line}` failed ({status})");
    }
    Ok(())
}
