//! What one answered preflight costs the server: preflightd, real proxies and a floor in one interleaved run.
#![forbid(unsafe_code)]
#![expect(clippy::cast_precision_loss, reason = "counts and nanoseconds of one run are far below 2^52")]

use clap::{Parser, ValueEnum};
use preflightd_benches::{
    cpu::{self, Cpus},
    load::{self, Load, Pace},
    peers::{self, Peer, Server},
    policies,
    process::{CpuTime, Everyone},
    report::{self, Bars, Figure, Table},
    rounds::{self, ATTEMPTS, Rounds, Slice, TOLERATED},
    workload::Request,
};
use std::{
    collections::BTreeMap,
    io,
    process::{self, ExitCode},
    time::Duration,
};

const CONNECTIONS: usize = 64;
const ROUNDS: usize = 20;
const WARM_UP: Duration = Duration::from_millis(100);

/// Server CPU, latency and memory per answered preflight, against nginx, haproxy, Envoy and a floor.
///
/// One server thread on one CPU, the generator on another, over loopback. Takes about nine minutes.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench answer")]
struct Arguments {
    /// Rounds; results are written to benches/results with 20 or more.
    #[arg(long, default_value_t = ROUNDS)]
    rounds: usize,
    /// Length of a slice in milliseconds.
    #[arg(long, default_value_t = 800)]
    slice: u64,
    /// JSON lines on stdout instead of tables.
    #[arg(long)]
    json: bool,
    /// Keep slices that other work disturbed: for trying things out; nothing is written.
    #[arg(long)]
    accept_noise: bool,
    /// Only these servers, such as `preflightd,floor`; nothing is written.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Only these loads; nothing is written.
    #[arg(long, value_enum, value_delimiter = ',')]
    loads: Vec<Shape>,
}

/// One slice's figures.
#[derive(Clone, Copy, Debug)]
struct Sample {
    /// Server CPU time per request in microseconds.
    cpu: f64,
    p50: f64,
    p99: f64,
    per_second: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ValueEnum)]
enum Shape {
    KeepAlive,
    NewConnection,
    #[value(name = "10k")]
    TenThousand,
    #[value(name = "1k")]
    Thousand,
}

impl Shape {
    const ALL: [Self; 4] = [Self::KeepAlive, Self::NewConnection, Self::TenThousand, Self::Thousand];

    fn pace(self, peer: Peer) -> Pace {
        match self {
            Self::KeepAlive => Pace::KeepAlive,
            Self::NewConnection => Pace::NewConnection { client_closes: peer.closes_late() },
            Self::TenThousand => Pace::Rate(10_000),
            Self::Thousand => Pace::Rate(1_000),
        }
    }
}

type Key = (Shape, Peer);

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench answer: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> io::Result<()> {
    let cpus = Cpus::choose()?;
    let small = policies::requests(Peer::Preflightd.size(), 1);
    let large = policies::requests(Peer::PreflightdLarge.size(), 4096);
    let requests = |peer| if peer == Peer::PreflightdLarge { &large } else { &small };
    let (servers, missing) = start(arguments, cpus, requests)?;

    let keys: Vec<Key> =
        loads(arguments).flat_map(|shape| servers.keys().map(move |&peer| (shape, peer))).collect();
    let slice = Duration::from_millis(arguments.slice);
    let rounds = Rounds::run(
        &keys,
        arguments.rounds,
        rounds::tolerated(arguments.accept_noise),
        |round| eprintln!("round {} of {}, {} slices", round + 1, arguments.rounds, keys.len()),
        |(shape, peer)| measure(&servers[&peer], requests(peer), shape.pace(peer), slice, cpus),
    )?;

    let figures = figures(&rounds);
    let report = markdown(arguments, &servers, &missing, &rounds, &figures)?;
    report::print(arguments.json, &figures, &report);
    if arguments.rounds >= ROUNDS
        && !arguments.accept_noise
        && arguments.only.is_empty()
        && arguments.loads.is_empty()
    {
        report::save("answer.md", &report)?;
        report::save("answer.svg", &chart(&servers, &rounds))?;
    } else {
        eprintln!("not written to benches/results: that takes {ROUNDS} undisturbed rounds of all servers");
    }
    require(&rounds, &servers, arguments)
}

/// Starts what can be started. A proxy that is not there is left out with the reason; ours must be there.
fn start<'a>(
    arguments: &Arguments,
    cpus: Cpus,
    requests: impl Fn(Peer) -> &'a Vec<Request>,
) -> io::Result<(BTreeMap<Peer, Server>, Vec<String>)> {
    let dir = peers::scratch("answer")?;
    let (mut servers, mut missing) = (BTreeMap::new(), Vec::new());
    for peer in Peer::ALL {
        if !arguments.only.is_empty() && !arguments.only.iter().any(|name| name == peer.file_name()) {
            continue;
        }
        match Server::start(peer, &dir, cpus, requests(peer)) {
            Ok(server) => drop(servers.insert(peer, server)),
            Err(error) if matches!(peer, Peer::Haproxy | Peer::Envoy) => {
                eprintln!("without {peer}: {error}");
                missing.push(format!("- Left out: {peer}: {}\n", error.to_string().replace('\n', "; ")));
            }
            Err(error) => return Err(io::Error::new(error.kind(), format!("{peer}: {error}"))),
        }
    }
    cpu::pin(cpus.client)?;
    Ok((servers, missing))
}

fn measure(
    server: &Server,
    requests: &[Request],
    pace: Pace,
    duration: Duration,
    cpus: Cpus,
) -> io::Result<Slice<Sample>> {
    let load = Load {
        address: server.address,
        requests,
        pace,
        connections: CONNECTIONS,
        sources: &[],
        warm_up: WARM_UP,
        duration,
    };
    let everyone = Everyone::now()?;
    let mut marks = Vec::with_capacity(2);
    let served = load::run(&load, || {
        marks.push((CpuTime::of(server.pid())?, CpuTime::of(process::id())?));
        Ok(())
    })?;
    let others = everyone.others_since(&[process::id(), server.pid()], cpus)?;
    let [(server_begin, client_begin), (server_end, client_end)] = marks[..] else {
        return Err(io::Error::other("the generator must mark beginning and end"));
    };
    let (server_time, client_time) = (server_end.since(server_begin), client_end.since(client_begin));
    // Time in which either had to wait for its CPU was somebody else's, even if that task is gone by now.
    let waited = Duration::from_nanos(server_time.waiting.max(client_time.waiting));
    let disturbed = others.work.max(waited.saturating_sub(others.kernel));
    let count = served.requests as f64;
    let sample = Sample {
        cpu: server_time.running as f64 / 1e3 / count,
        p50: f64::from(served.p50) / 1e3,
        p99: f64::from(served.p99) / 1e3,
        per_second: count / served.elapsed.as_secs_f64(),
    };
    // A rate that was missed is a slice lost, whoever was too slow.
    let lost = if served.kept_up { Duration::ZERO } else { served.elapsed };
    Ok(Slice::new(sample, disturbed.max(lost), served.elapsed))
}

/// The loads that were asked for.
fn loads(arguments: &Arguments) -> impl Iterator<Item = Shape> {
    Shape::ALL.into_iter().filter(|shape| arguments.loads.is_empty() || arguments.loads.contains(shape))
}

fn figures(rounds: &Rounds<Key, Sample>) -> Vec<Figure> {
    use Peer::{Envoy, Floor, Haproxy, NginxIngress, NginxTuned, Preflightd, PreflightdLarge};
    use Shape::{KeepAlive, NewConnection, TenThousand, Thousand};
    let ratios = [
        ("answer_cpu_vs_nginx_keepalive", KeepAlive, Preflightd, NginxIngress, "nginx as ingress-nginx"),
        (
            "answer_cpu_vs_nginx_new_connection",
            NewConnection,
            Preflightd,
            NginxIngress,
            "nginx as ingress-nginx",
        ),
        ("answer_cpu_vs_floor_keepalive", KeepAlive, Preflightd, Floor, "io_uring floor"),
        ("answer_cpu_vs_nginx_tuned_10k", TenThousand, Preflightd, NginxTuned, "nginx, hand-tuned"),
        ("answer_cpu_vs_floor_new_connection", NewConnection, Preflightd, Floor, "io_uring floor"),
        ("answer_cpu_vs_nginx_10k", TenThousand, Preflightd, NginxIngress, "nginx as ingress-nginx"),
        ("answer_cpu_vs_nginx_tuned_1k", Thousand, Preflightd, NginxTuned, "nginx, hand-tuned"),
        ("answer_cpu_vs_nginx_tuned_keepalive", KeepAlive, Preflightd, NginxTuned, "nginx, hand-tuned"),
        (
            "answer_cpu_vs_nginx_tuned_new_connection",
            NewConnection,
            Preflightd,
            NginxTuned,
            "nginx, hand-tuned",
        ),
        ("answer_cpu_vs_haproxy_keepalive", KeepAlive, Preflightd, Haproxy, "haproxy"),
        ("answer_cpu_vs_envoy_keepalive", KeepAlive, Preflightd, Envoy, "Envoy"),
        (
            "answer_cpu_large_vs_small_keepalive",
            KeepAlive,
            PreflightdLarge,
            Preflightd,
            "itself with 5 origins",
        ),
        (
            "answer_cpu_large_vs_nginx_keepalive",
            KeepAlive,
            PreflightdLarge,
            NginxIngress,
            "nginx as ingress-nginx",
        ),
    ];
    ratios
        .into_iter()
        .filter_map(|(name, shape, of, to, peer)| {
            let estimate = rounds.ratio((shape, of), (shape, to), |sample| sample.cpu)?;
            Some(Figure { name: name.into(), estimate, unit: "ratio", peer })
        })
        .collect()
}

fn markdown(
    arguments: &Arguments,
    servers: &BTreeMap<Peer, Server>,
    missing: &[String],
    rounds: &Rounds<Key, Sample>,
    figures: &[Figure],
) -> io::Result<String> {
    let mut table = Table::new([
        "server CPU µs per preflight",
        "keep-alive",
        "new connection",
        "10,000/s",
        "1,000/s",
        "p50 / p99 µs, keep-alive",
        "p50 / p99 µs, 10,000/s",
        "keep-alive/s",
        "RSS MiB",
    ]);
    for (&peer, server) in servers {
        let of = |shape, value: fn(&Sample) -> f64| report::median(rounds.estimate((shape, peer), value));
        let latency =
            |shape| format!("{} / {}", of(shape, |sample| sample.p50), of(shape, |sample| sample.p99));
        table.row([
            peer.to_string(),
            of(Shape::KeepAlive, |sample| sample.cpu),
            of(Shape::NewConnection, |sample| sample.cpu),
            of(Shape::TenThousand, |sample| sample.cpu),
            of(Shape::Thousand, |sample| sample.cpu),
            latency(Shape::KeepAlive),
            latency(Shape::TenThousand),
            of(Shape::KeepAlive, |sample| sample.per_second),
            report::number(server.resident()? as f64 / f64::from(1 << 20)),
        ]);
    }
    let left_out = missing.concat();
    let noise = if arguments.accept_noise { ", **disturbed ones included**" } else { "" };
    Ok(format!(
        "# Answering a preflight\n\n{}\n\n{}\n{}\n\
         - {} rounds, each with every server and load in shuffled order, slices of {} ms; medians over rounds, ratios taken \
         within rounds.\n\
         - {} slices measured{noise}, {} of them thrown away because other work took more than {:.0} % of a CPU meanwhile \
         (each is tried {ATTEMPTS} times).\n\
         - One server thread on one CPU, the generator with {CONNECTIONS} connections on another, loopback, a 537 B Chrome \
         preflight; every answer is checked. CPU is user and kernel time of all threads of the server (schedstat); on \
         loopback most of the receive path runs on the generator's CPU, for all alike.\n\
         - Access logs are off everywhere. nginx as ingress-nginx is its generated CORS block without the Lua phases, a lower \
         bound. The proxies and the first line of preflightd hold one host with 5 origins.\n\
         - At a fixed rate latency counts from when a request was due.\n{left_out}",
        report::provenance("cargo xtask bench answer")?,
        table.markdown(),
        report::figures(figures),
        arguments.rounds,
        arguments.slice,
        rounds.slices,
        rounds.discarded,
        TOLERATED * 100.0,
    ))
}

fn chart(servers: &BTreeMap<Peer, Server>, rounds: &Rounds<Key, Sample>) -> String {
    let group = |title: &str, shape| Bars {
        title: title.into(),
        bars: servers
            .keys()
            .filter_map(|&peer| {
                let cpu = rounds.estimate((shape, peer), |sample| sample.cpu)?.median;
                Some((peer.to_string(), cpu, matches!(peer, Peer::Preflightd | Peer::PreflightdLarge)))
            })
            .collect(),
    };
    report::chart(
        "Server CPU per answered preflight, µs (less is better)",
        &[
            group("Keep-alive, saturated", Shape::KeepAlive),
            group("A connection per request", Shape::NewConnection),
            group("Keep-alive, 10,000/s", Shape::TenThousand),
        ],
    )
}

/// A run that could not measure what it is for has failed.
fn require(
    rounds: &Rounds<Key, Sample>,
    servers: &BTreeMap<Peer, Server>,
    arguments: &Arguments,
) -> io::Result<()> {
    let fewest = loads(arguments)
        .flat_map(|shape| servers.keys().map(move |&peer| (shape, peer)))
        .map(|key| rounds.estimate(key, |sample| sample.cpu).map_or(0, |estimate| estimate.count))
        .min();
    if fewest.is_some_and(|fewest| fewest * 2 < arguments.rounds) {
        return Err(io::Error::other(
            "other work kept disturbing this machine: less than half of the rounds count; run this again when it is quiet",
        ));
    }
    Ok(())
}
