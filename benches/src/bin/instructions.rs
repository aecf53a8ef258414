//! Instruction counts that gate: what one decision and one head cost, counted by callgrind, and what the kernel's verifier
//! goes through for the eBPF programs, against limits in a file.
//!
//! Unlike time, a count hardly changes from run to run, so that a loss of a tenth shows on any machine.
#![forbid(unsafe_code)]

use clap::{Parser, ValueEnum};
use preflightd::{
    http::{Head, HeadLimits, HeadReader},
    policy::{Answer, Connection, Decision, Preflight, Table},
    steer,
};
use preflightd_benches::{
    acrh,
    policies::{self, HEADERS, Size},
    report::{self, Figure, Table as Rows},
};
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    env, fs,
    hint::black_box,
    io,
    path::Path,
    process::{Command, ExitCode},
};

/// Each subject is run so often, over different requests, and the mean is taken.
const TIMES: u16 = 256;
const ASKED: &[&[u8]] = &[b"authorization,content-type"];
const DATE: &[u8; 29] = b"Sun, 06 Nov 1994 08:49:37 GMT";
const LIMITS: HeadLimits = HeadLimits { max_bytes: 8 * 1024 };

/// Instructions of one decision, one head, one answer, and those that the kernel verifies of each eBPF program (which needs
/// root); fails above the limits in benches/instructions.toml.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench instructions")]
struct Arguments {
    /// JSON lines on stdout instead of a table.
    #[arg(long)]
    json: bool,
    /// Runs one subject, for callgrind to watch.
    #[arg(long, hide = true)]
    subject: Option<Subject>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Subject {
    /// `decide` on 1,000 hosts × 10 routes × 50 origins.
    Decide,
    /// The same on 10 hosts × 10 routes × 5 origins: flat means that it is nearly as many.
    DecideSmall,
    /// Finding, parsing and judging the head of a Chrome preflight.
    Head,
    /// Writing the answer.
    Render,
    /// `decide` on 16 KiB of hostile request headers, all kinds.
    HostileHeaders,
}

impl Subject {
    const ALL: [Self; 5] = [Self::Decide, Self::DecideSmall, Self::Head, Self::Render, Self::HostileHeaders];

    fn name(self) -> &'static str {
        match self {
            Self::Decide => "instructions_decide_1000x10x50",
            Self::DecideSmall => "instructions_decide_10x10x5",
            Self::Head => "instructions_head",
            Self::Render => "instructions_render",
            Self::HostileHeaders => "instructions_acrh_16k",
        }
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Some(subject) = arguments.subject {
        subject.perform();
        return ExitCode::SUCCESS;
    }
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench instructions: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The file's limits.
#[derive(Debug, Deserialize)]
struct Limits {
    #[serde(flatten)]
    subjects: BTreeMap<Subject, f64>,
    /// By program.
    verified: BTreeMap<String, f64>,
}

fn run(arguments: &Arguments) -> io::Result<()> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("instructions.toml");
    let limits: Limits = toml::from_str(&fs::read_to_string(&file)?)
        .map_err(|error| io::Error::other(format!("reading benches/instructions.toml: {error}")))?;
    let without =
        |what: &str| io::Error::other(format!("benches/instructions.toml has no limit for {what}; add one"));
    let mut counts = Vec::new();
    for subject in Subject::ALL {
        let limit = limits.subjects.get(&subject).ok_or_else(|| without(&format!("{subject:?}")))?;
        counts.push((subject.name().to_owned(), subject.count()?, *limit));
    }
    for (program, count) in verified()? {
        let limit = limits.verified.get(program).ok_or_else(|| without(&format!("verified.{program}")))?;
        counts.push((format!("verified_instructions_{program}"), count.into(), *limit));
    }
    let mut table = Rows::new(["instructions of one", "count", "limit", ""]);
    let (mut figures, mut above) = (Vec::new(), Vec::new());
    for (name, count, limit) in counts {
        let good = count <= limit;
        if !good {
            above.push(format!("{name} takes {count:.0} instructions, and {limit} are allowed"));
        }
        table.row([
            name.clone(),
            format!("{count:.0}"),
            limit.to_string(),
            (if good { "good" } else { "TOO MANY" }).to_owned(),
        ]);
        figures.push(Figure { name, estimate: count.into(), unit: "instructions", peer: "" });
    }
    report::print(arguments.json, &figures, &table.markdown());
    if above.is_empty() {
        return Ok(());
    }
    Err(io::Error::other(format!(
        "{}; make them cheaper again, or raise the limit in benches/instructions.toml and say why",
        above.join("; ")
    )))
}

/// What the kernel verifies of each eBPF program. Without root nothing, and says so; in CI (the variable `CI` is set) that is
/// an error.
fn verified() -> io::Result<Vec<(&'static str, u32)>> {
    if rustix::process::geteuid().is_root() {
        return steer::verified_instructions().map_err(io::Error::other);
    }
    if env::var_os("CI").is_some() {
        return Err(io::Error::other("loading eBPF programs needs root, and in CI nothing may be skipped"));
    }
    eprintln!("skipped: what the kernel verifies of the eBPF programs, which takes root to ask");
    Ok(Vec::new())
}

impl Subject {
    /// Has callgrind count this program's own run of the subject, nothing but what happens inside of `watched_*`.
    fn count(self) -> io::Result<f64> {
        let name = self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default();
        let output = Command::new("valgrind")
            .args(["--tool=callgrind", "--callgrind-out-file=/dev/null", "--toggle-collect=*watched_*"])
            .arg(env::current_exe()?)
            .args(["--subject", &name])
            .output()
            .map_err(|error| {
                io::Error::new(
                    error.kind(),
                    format!("starting valgrind: {error}; `cargo xtask setup` installs it"),
                )
            })?;
        let text = String::from_utf8_lossy(&output.stderr);
        let collected =
            text.lines().find_map(|line| line.split_once("Collected : ")?.1.trim().parse::<f64>().ok());
        match collected {
            Some(count) if output.status.success() && count > 0.0 => Ok(count / f64::from(TIMES)),
            _ => Err(io::Error::other(format!("counting {name} under valgrind ({}): {text}", output.status))),
        }
    }

    fn perform(self) {
        match self {
            Self::Decide | Self::DecideSmall => {
                let small = Size { hosts: 10, routes: 10, origins: 5 };
                let size = if self == Self::Decide { Size::LARGE } else { small };
                let table = policies::table(&policies::specs(size));
                for of in policies::combinations(size, TIMES.into()) {
                    assert!(watched_decide(&table, &policies::preflight(&of, ASKED)), "{of:?}");
                }
            }
            Self::Head => {
                for request in policies::requests(Size::LARGE, TIMES.into()) {
                    assert!(watched_head(&request.keep_alive));
                }
            }
            Self::Render => {
                let table = policies::table(&policies::specs(Size::SMALL));
                let of = policies::combinations(Size::SMALL, 1).next().expect("there is one");
                let Decision::Answer(answer) = table.decide(&policies::preflight(&of, ASKED)) else {
                    panic!("not answered: {of:?}")
                };
                let mut out = Vec::with_capacity(4096);
                for _ in 0..TIMES {
                    out.clear();
                    watched_render(&answer, &mut out);
                }
                black_box(out);
            }
            Self::HostileHeaders => {
                let table = policies::table(&policies::echoing());
                let of = policies::combinations(Size::SMALL, 1).next().expect("there is one");
                let kinds = acrh::hostile(HEADERS[0], 16 * 1024);
                for number in 0..TIMES {
                    watched_decide(
                        &table,
                        &policies::preflight(&of, &[&kinds[usize::from(number) % kinds.len()].1]),
                    );
                }
            }
        }
    }
}

#[inline(never)]
fn watched_decide(table: &Table, preflight: &Preflight<'_>) -> bool {
    matches!(black_box(table.decide(black_box(preflight))), Decision::Answer(_))
}

#[inline(never)]
fn watched_head(bytes: &[u8]) -> bool {
    matches!(black_box(HeadReader::new().read(black_box(bytes), LIMITS)), Head::Preflight(_))
}

#[inline(never)]
fn watched_render(answer: &Answer<'_>, out: &mut Vec<u8>) {
    black_box(answer).render(DATE, Connection::KeepAlive, out);
}
