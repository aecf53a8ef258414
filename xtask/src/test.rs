//! `cargo xtask test`: the gate. Runs every kind of test that the repository has and says at the end what ran, what was
//! skipped and why. With `CI` set nothing may be skipped.

use std::{
    fmt, fs,
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{bench, lint, setup, sh};

/// Set up, check, build and test everything
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Take the time: ten minutes for each fuzz target, 40 times as many cases for each property, the long forms of tests
    /// of steering, and nothing left out that can be installed
    #[arg(long)]
    full: bool,
}

/// Runs all steps, also those behind one that failed, but for a build that did.
///
/// # Errors
/// If a step failed, or in CI was skipped.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let start = Instant::now();
    setup::run(&setup::Arguments::default())?;
    let full = arguments.full;
    let steps: &[(&str, &dyn Fn() -> Result<Outcome>)] = &[
        ("format", &|| lint::format().map(|()| Outcome::ran(""))),
        ("build", &build),
        ("clippy", &|| lint::clippy().map(|()| Outcome::ran("no warnings"))),
        ("tests", &|| nextest(full)),
        ("doc tests", &doc_tests),
        ("instructions", &instructions),
        ("fuzzing", &|| fuzz(full)),
        ("dependencies", &|| dependencies(full)),
    ];
    let mut report: Vec<(&str, Outcome, Duration)> = Vec::new();
    for (name, step) in steps {
        if report.iter().any(|(name, outcome, _)| *name == "build" && matches!(outcome, Outcome::Failed(_))) {
            report.push((*name, Outcome::Skipped("the build failed".into()), Duration::ZERO));
            continue;
        }
        println!("\n== {name}");
        let start = Instant::now();
        let outcome = step().unwrap_or_else(|error| {
            println!("{name}: {error:#}");
            Outcome::Failed(format!("{error:#}"))
        });
        report.push((*name, outcome, start.elapsed()));
    }
    println!("\n== summary ({} s{})", start.elapsed().as_secs(), if full { ", --full" } else { "" });
    for (name, outcome, time) in &report {
        println!("{name:>14}  {:>4} s  {outcome}", time.as_secs());
    }
    let bad = |outcome: &Outcome| match outcome {
        Outcome::Ran(_) => false,
        Outcome::Skipped(_) => sh::in_ci(),
        Outcome::Failed(_) => true,
    };
    let bad: Vec<&str> =
        report.iter().filter(|(_, outcome, _)| bad(outcome)).map(|(name, ..)| *name).collect();
    ensure!(bad.is_empty(), "failed, or skipped where nothing may be: {}", bad.join(", "));
    Ok(())
}

enum Outcome {
    /// It passed; with what, where there is a figure to tell.
    Ran(String),
    /// It did not run, and why.
    Skipped(String),
    Failed(String),
}

impl Outcome {
    fn ran(what: impl Into<String>) -> Self {
        Self::Ran(what.into())
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ran(what) if what.is_empty() => write!(f, "passed"),
            Self::Ran(what) => write!(f, "passed: {what}"),
            Self::Skipped(why) => write!(f, "SKIPPED: {why}"),
            Self::Failed(why) => write!(f, "FAILED: {why}"),
        }
    }
}

/// All that the tests run, in the profile that they run in.
fn build() -> Result<Outcome> {
    sh::run(sh::cargo().args(["nextest", "run", "--locked", "--no-run"]))?;
    Ok(Outcome::ran(""))
}

/// Unit and integration tests, the loom models among them.
fn nextest(full: bool) -> Result<Outcome> {
    let mut cargo = sh::cargo();
    cargo.args(["nextest", "run", "--locked", "--no-fail-fast"]);
    if full {
        cargo.env("PROPTEST_CASES", "10240").env("PREFLIGHTD_FULL", "1");
    }
    let closing = run_nextest(&mut cargo)?;
    Ok(Outcome::ran(if sh::is_root() {
        closing
    } else {
        format!("{closing}; those that need root (namespaces, eBPF) only said so")
    }))
}

fn doc_tests() -> Result<Outcome> {
    sh::run(sh::cargo().args(["test", "--quiet", "--locked", "--doc"]))?;
    Ok(Outcome::ran(""))
}

/// Instruction counts of the hot path, against their limits.
fn instructions() -> Result<Outcome> {
    bench::measure(bench::Name::Instructions, &[])?;
    Ok(Outcome::ran("within benches/instructions.toml"))
}

/// Every fuzz target for a while: on `fuzz/seeds/TARGET` and on what earlier runs found, with `fuzz/TARGET.dict`.
fn fuzz(full: bool) -> Result<Outcome> {
    if !setup::has_nightly() {
        return Ok(Outcome::Skipped("needs a nightly toolchain: rustup toolchain install nightly".into()));
    }
    setup::cargo_tool("fuzz")?;
    let targets =
        sh::output(sh::cargo_of("nightly").args(["fuzz", "list"])).context("cannot list fuzz/'s targets")?;
    ensure!(!targets.is_empty(), "fuzz/ has no targets");
    let seconds = if full { 600 } else { 10 };
    for target in targets.lines() {
        // What is found goes to the first directory that is named.
        let corpus = format!("fuzz/corpus/{target}");
        fs::create_dir_all(sh::root().join(&corpus)).with_context(|| format!("cannot create {corpus}"))?;
        let (seeds, dictionary) = (format!("fuzz/seeds/{target}"), format!("fuzz/{target}.dict"));
        let mut cargo = sh::cargo_of("nightly");
        cargo.args(["fuzz", "run", target, &corpus]);
        if sh::root().join(&seeds).is_dir() {
            cargo.arg(&seeds);
        }
        // Without a line for each input that it keeps: what failed before it should still be in sight.
        cargo.args(["--", &format!("-max_total_time={seconds}"), "-verbosity=0", "-print_final_stats=1"]);
        if sh::root().join(&dictionary).is_file() {
            cargo.arg(format!("-dict={dictionary}"));
        }
        sh::run(&mut cargo)?;
    }
    Ok(Outcome::ran(format!("{} for {seconds} s each", targets.replace('\n', ", "))))
}

/// Licences, bans and sources of all dependencies.
fn dependencies(full: bool) -> Result<Outcome> {
    if !setup::has_cargo_tool("deny") && !full && !sh::in_ci() {
        return Ok(Outcome::Skipped(
            "no cargo-deny, which takes two minutes to build: --full installs it".into(),
        ));
    }
    setup::cargo_tool("deny")?;
    sh::run(sh::cargo().args(["deny", "--workspace", "check", "bans", "licenses", "sources"]))?;
    Ok(Outcome::ran("bans, licences, sources; advisories are not checked"))
}

/// Runs nextest and returns its closing line, for the summary.
fn run_nextest(command: &mut Command) -> Result<String> {
    let line = sh::show(command);
    println!("$ {line}");
    let mut nextest = command
        .current_dir(sh::root())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run `{line}`"))?;
    let mut closing = String::new();
    for text in BufReader::new(nextest.stderr.take().expect("it is piped")).lines() {
        let text = text.context("cannot read what nextest prints")?;
        eprintln!("{text}");
        if let Some((_, summary)) = text.split_once("Summary [") {
            summary.split_once("] ").map_or(summary, |(_, counts)| counts).trim().clone_into(&mut closing);
        }
    }
    let status = nextest.wait().context("cannot wait for nextest")?;
    if !status.success() {
        bail!("{}", if closing.is_empty() { format!("`{line}`: {status}") } else { closing });
    }
    Ok(closing)
}
