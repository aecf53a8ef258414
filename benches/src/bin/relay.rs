//! How fast preflightd passes on what is not its own, beside haproxy in TCP mode.
#![forbid(unsafe_code)]
#![expect(clippy::cast_precision_loss, reason = "bytes and nanoseconds of one run are far below 2^52")]

use clap::Parser;
use preflightd_benches::{
    bulk::{self, Direction},
    cpu::{self, Cpus},
    peers::{self, Relay, Server},
    process::{CpuTime, Everyone},
    report::{self, Figure, Table},
    rounds::{self, ATTEMPTS, Rounds, Slice, TOLERATED},
};
use std::{
    io,
    process::{self, ExitCode},
};

const ROUNDS: usize = 20;

/// Throughput of 1 GB up and down through preflightd, beside haproxy in TCP mode.
///
/// Both have one CPU, client and origin another. Takes about three minutes.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench relay")]
struct Arguments {
    /// Rounds; results are written to benches/results with 20 or more.
    #[arg(long, default_value_t = ROUNDS)]
    rounds: usize,
    /// Bytes of a transfer.
    #[arg(long, default_value_t = 1_000_000_000)]
    bytes: usize,
    /// JSON lines on stdout instead of tables.
    #[arg(long)]
    json: bool,
    /// Keep transfers that other work disturbed: for trying things out; nothing is written.
    #[arg(long)]
    accept_noise: bool,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    /// Bytes per second.
    throughput: f64,
    /// CPU seconds of the relay for each GB.
    cpu: f64,
}

type Key = (Direction, Relay);

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench relay: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> io::Result<()> {
    let cpus = Cpus::choose()?;
    cpu::pin(cpus.client)?;
    let origin = bulk::serve()?;
    let dir = peers::scratch("relay")?;
    let preflightd = Server::relay(Relay::Preflightd, &dir, cpus, origin)?;
    let haproxy = Server::relay(Relay::Haproxy, &dir, cpus, origin)?;
    let server = |relay| match relay {
        Relay::None => None,
        Relay::Preflightd => Some(&preflightd),
        Relay::Haproxy => Some(&haproxy),
    };

    let keys: Vec<Key> = [Direction::Up, Direction::Down]
        .into_iter()
        .flat_map(|direction| Relay::ALL.map(|relay| (direction, relay)))
        .collect();
    let rounds = Rounds::run(
        &keys,
        arguments.rounds,
        rounds::tolerated(arguments.accept_noise),
        |round| eprintln!("round {} of {}", round + 1, arguments.rounds),
        |(direction, relay)| {
            let everyone = Everyone::now()?;
            let time = || server(relay).map_or(Ok(CpuTime::default()), |server| CpuTime::of(server.pid()));
            let before = time()?;
            let address = server(relay).map_or(origin, |server| server.address);
            let elapsed = bulk::transfer(address, direction, arguments.bytes)?;
            let spent = time()?.since(before);
            let pid = server(relay).map_or(process::id(), Server::pid);
            let others = everyone.others_since(&[process::id(), pid], cpus)?;
            let sample = Sample {
                throughput: arguments.bytes as f64 / elapsed.as_secs_f64(),
                cpu: spent.running as f64 / arguments.bytes as f64,
            };
            // A relay of several threads waits for itself: only what others took counts.
            Ok(Slice::new(sample, others.work, elapsed))
        },
    )?;

    let figures = figures(&rounds)?;
    let report = markdown(arguments, &rounds, &figures)?;
    report::print(arguments.json, &figures, &report);
    if arguments.rounds >= ROUNDS && !arguments.accept_noise {
        report::save("relay.md", &report)?;
    } else {
        eprintln!("not written to benches/results: that takes {ROUNDS} undisturbed rounds");
    }
    if figures.iter().any(|figure| figure.estimate.count * 2 < arguments.rounds) {
        return Err(io::Error::other(
            "other work kept disturbing this machine: less than half of the rounds count; run this again when it is quiet",
        ));
    }
    Ok(())
}

fn figures(rounds: &Rounds<Key, Sample>) -> io::Result<Vec<Figure>> {
    const PEER: &str = "haproxy, TCP mode";
    let ratio = |name: &'static str, direction, value: fn(&Sample) -> f64| {
        let estimate =
            rounds.ratio((direction, Relay::Preflightd), (direction, Relay::Haproxy), value).ok_or_else(
                || io::Error::other("no round was undisturbed; run this again when the machine is quiet"),
            )?;
        Ok::<_, io::Error>(Figure { name: name.into(), estimate, unit: "ratio", peer: PEER })
    };
    let up = ratio("relay_vs_haproxy_tcp_up", Direction::Up, |sample| sample.throughput)?;
    let down = ratio("relay_vs_haproxy_tcp_down", Direction::Down, |sample| sample.throughput)?;
    let lower = if up.estimate.median < down.estimate.median { &up } else { &down };
    Ok(vec![
        Figure { name: "relay_vs_haproxy_tcp".into(), ..lower.clone() },
        up,
        down,
        ratio("relay_cpu_vs_haproxy_tcp_up", Direction::Up, |sample| sample.cpu)?,
        ratio("relay_cpu_vs_haproxy_tcp_down", Direction::Down, |sample| sample.cpu)?,
    ])
}

fn markdown(arguments: &Arguments, rounds: &Rounds<Key, Sample>, figures: &[Figure]) -> io::Result<String> {
    let mut table = Table::new(["relay", "up, GB/s", "down, GB/s", "up, CPU s/GB", "down, CPU s/GB"]);
    for relay in Relay::ALL {
        let of =
            |direction, value: fn(&Sample) -> f64| report::median(rounds.estimate((direction, relay), value));
        table.row([
            relay.to_string(),
            of(Direction::Up, |sample| sample.throughput / 1e9),
            of(Direction::Down, |sample| sample.throughput / 1e9),
            of(Direction::Up, |sample| sample.cpu),
            of(Direction::Down, |sample| sample.cpu),
        ]);
    }
    let noise = if arguments.accept_noise { ", **disturbed ones included**" } else { "" };
    Ok(format!(
        "# Passing on what is not a preflight\n\n{}\n\n{}\n{}\n\
         - One transfer of {} bytes on one connection: up as the body of a POST, down as the answer to a GET. The first figure is \
         the lower of the two directions.\n\
         - {} rounds in shuffled order; medians over rounds, ratios taken within rounds. {} transfers{noise}, {} of them thrown \
         away because other work took more than {:.0} % of a CPU meanwhile (each is tried {ATTEMPTS} times).\n\
         - All threads of a relay share one CPU; client and origin share another and do not touch the bytes (sendfile, \
         MSG_TRUNC). haproxy has its defaults and one thread.\n",
        report::provenance("cargo xtask bench relay")?,
        table.markdown(),
        report::figures(figures),
        arguments.bytes,
        arguments.rounds,
        rounds.slices,
        rounds.discarded,
        TOLERATED * 100.0,
    ))
}
