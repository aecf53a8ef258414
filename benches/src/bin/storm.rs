//! What a storm of preflights does to everybody else's requests, with steering and without.
#![forbid(unsafe_code)]
#![expect(clippy::cast_precision_loss, reason = "counts and nanoseconds of one run are far below 2^52")]

use clap::Parser;
use preflightd_benches::{
    cpu,
    lab::{self, Lab, Node, Proxy, Variant},
    openloop::{self, OpenLoop, Outcome},
    policies::{self, Size},
    process::{Busy, Everyone},
    report::{self, Figure, Table},
    rounds::{ATTEMPTS, Rounds, Slice},
    stats::{self, Estimate},
    storm::{self, Clients, Storm},
};
use preflightd_tests::netns::Netns;
use std::{
    collections::BTreeMap,
    io,
    process::{self, ExitCode},
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

const ROUNDS: usize = 8;
/// More than elsewhere: thousands of sockets that come and go cost those their time who watch a machine.
const TOLERATED: f64 = 0.1;
/// How long a storm blows before the GETs begin.
const AHEAD: Duration = Duration::from_millis(500);
/// Between two slices: what a storm has left in queues goes.
const CALM: Duration = Duration::from_millis(500);
/// How often nginx's saturation is measured.
const SATURATIONS: usize = 3;
/// Where the search for it begins, a second, and how it goes on.
const LEAST_RATE: f64 = 10_000.0;
const STEP: f64 = 1.07;
/// The share that must be answered while more are due.
const IN_TIME: f64 = 0.98;
/// Preflights that may wait at once, as many as nginx takes connections and a bit more than its accept queue.
const IN_FLIGHT: usize = 8192;

/// The latency of GETs at a fixed rate, in calm and in a storm of as many preflights as nginx can answer, with preflightd
/// steering and without.
///
/// Needs root. Nodes and clients are network namespaces; nginx, preflightd and the nodes' network stack share one CPU, the
/// clients have another. Takes about three minutes.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench storm")]
struct Arguments {
    /// Rounds; results are written to benches/results with 8 or more.
    #[arg(long, default_value_t = ROUNDS)]
    rounds: usize,
    /// Length of a slice in milliseconds.
    #[arg(long, default_value_t = 2000)]
    slice: u64,
    /// GETs a second.
    #[arg(long, default_value_t = 1000.0)]
    gets: f64,
    /// The storm: times the rate of preflights at which nginx is saturated.
    #[arg(long, default_value_t = 1.0)]
    factor: f64,
    /// One object of JSON on stdout instead of tables.
    #[arg(long)]
    json: bool,
    /// Keep slices that other work disturbed: for trying things out; nothing is written.
    #[arg(long)]
    accept_noise: bool,
}

/// Where, and whether there is a storm.
type Key = (Variant, bool);

const VARIANTS: [(Variant, &str); 2] = [(Variant::Steer, ""), (Variant::None, "_without")];

#[derive(Clone, Copy, Debug)]
struct Sample {
    /// Of GETs, in milliseconds.
    p50: f64,
    p99: f64,
    /// GETs, in percent.
    failed: f64,
    /// Preflights a second.
    due: f64,
    sent: f64,
    answered: f64,
    /// Preflights, in percent of those that were due.
    lost: f64,
    /// Of the node's CPU, the clients' one.
    server: f64,
    client: f64,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench storm: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> io::Result<()> {
    let lab = Lab::open(Proxy::Ingress)?;
    let clients = lab.clients();
    let nodes: io::Result<BTreeMap<_, _>> = (1..)
        .zip(VARIANTS)
        .map(|(number, (variant, _))| Ok((variant, lab.node(variant, number, &clients, 1 << 20)?)))
        .collect();
    let nodes = nodes?;
    let storms: io::Result<BTreeMap<_, _>> = nodes
        .iter()
        .map(|(variant, node)| Ok((*variant, Mutex::new(node.storm_clients(&clients)?))))
        .collect();
    let scene = Scene { arguments, lab: &lab, clients: &clients, nodes, storms: storms? };
    let saturated: io::Result<Vec<_>> = (0..SATURATIONS).map(|_| scene.saturation()).collect();
    let saturated = saturated?;
    let saturation = stats::median(saturated.iter().map(|sample| sample.0));
    let storm = saturation * arguments.factor;
    eprintln!("nginx is saturated by {saturation:.0} preflights/s, the storm is {storm:.0}/s");

    let keys: Vec<Key> =
        VARIANTS.iter().flat_map(|(variant, _)| [(*variant, false), (*variant, true)]).collect();
    let rounds = Rounds::run(
        &keys,
        arguments.rounds,
        if arguments.accept_noise { f64::INFINITY } else { TOLERATED },
        |round| eprintln!("round {} of {}", round + 1, arguments.rounds),
        |(variant, stormy)| scene.slice(variant, stormy.then_some(storm)),
    )?;

    let figures = figures(arguments, &rounds, saturation)?;
    let saturated_cpu = stats::median(saturated.iter().map(|sample| sample.1));
    let report = markdown(&scene, &rounds, &figures, saturation, saturated_cpu)?;
    if arguments.json {
        println!("{}", report::object(&figures));
    } else {
        println!("{report}");
    }
    if arguments.rounds >= ROUNDS && !arguments.accept_noise {
        report::save("storm.md", &report)?;
    } else {
        eprintln!("not written to benches/results: that takes {ROUNDS} undisturbed rounds");
    }
    Ok(())
}

struct Scene<'a> {
    arguments: &'a Arguments,
    lab: &'a Lab,
    clients: &'a Netns,
    nodes: BTreeMap<Variant, Node>,
    storms: BTreeMap<Variant, Mutex<Clients>>,
}

impl Scene<'_> {
    /// The highest rate of preflights, a connection each, of which the bare nginx still answers nearly all in time, and the
    /// share of its CPU that this takes. Rates rise until it has failed twice in a row: once may be the machine's.
    fn saturation(&self) -> io::Result<(f64, f64)> {
        let requests = policies::requests(Size::SMALL, 5);
        let duration = Duration::from_millis(700);
        let mut clients = self.storms[&Variant::None].lock().expect("a storm panicked");
        let (mut best, mut failed, mut rate) = ((0.0, 0.0), 0, LEAST_RATE);
        while failed < 2 {
            let storm = Storm { requests: &requests, rate, in_flight: IN_FLIGHT, duration };
            let (begin, started) = (Busy::now(self.lab.cpus)?, Instant::now());
            let outcome = clients.run(&storm)?;
            let elapsed = started.elapsed();
            let busy = Busy::now(self.lab.cpus)?.since(begin);
            if outcome.answered as f64 >= IN_TIME * outcome.due as f64 {
                best = (rate, busy.server.as_secs_f64() / elapsed.as_secs_f64());
                failed = 0;
            } else {
                failed += 1;
            }
            rate *= STEP;
            thread::sleep(CALM);
        }
        if best.0 == 0.0 {
            return Err(io::Error::other(format!(
                "nginx does not answer even {LEAST_RATE:.0} preflights/s here: run this on a faster or a quieter machine"
            )));
        }
        Ok(best)
    }

    /// GETs for a while, in a storm of so many preflights a second.
    fn slice(&self, variant: Variant, storm: Option<f64>) -> io::Result<Slice<Sample>> {
        let cpus = self.lab.cpus;
        let duration = Duration::from_millis(self.arguments.slice);
        let node = &self.nodes[&variant];
        let mut clients = self.storms[&variant].lock().expect("a storm panicked");
        let clients = &mut *clients;
        let requests = policies::requests(Size::SMALL, 5);
        let everyone = Everyone::now()?;
        let (gets, preflights, busy) = thread::scope(|scope| {
            let storm = storm.map(|rate| {
                let storm =
                    Storm { requests: &requests, rate, in_flight: IN_FLIGHT, duration: AHEAD + duration };
                scope.spawn(move || clients.run(&storm))
            });
            thread::sleep(AHEAD);
            let gets = scope.spawn(|| self.clients.enter(|| self.visit(node, duration)));
            let begin = Busy::now(cpus)?;
            thread::sleep(duration);
            let busy = Busy::now(cpus)?.since(begin);
            let gets = gets.join().expect("the clients panicked")?;
            let storm = storm.map(|storm| storm.join().expect("the storm panicked")).transpose()?;
            Ok::<_, io::Error>((gets, storm, busy))
        })?;
        let ours: Vec<_> = self.nodes.values().flat_map(Node::pids).chain([process::id()]).collect();
        let others = everyone.others_since(&ours, cpus)?;
        thread::sleep(CALM);
        let per_second = |count: fn(&storm::Outcome) -> u64| {
            preflights.as_ref().map_or(0.0, |storm| count(storm) as f64 / (AHEAD + duration).as_secs_f64())
        };
        let sample = Sample {
            p50: f64::from(gets.p50) / 1e6,
            p99: f64::from(gets.p99) / 1e6,
            failed: 100.0 * gets.failed as f64 / gets.due as f64,
            due: per_second(|storm| storm.due),
            sent: per_second(|storm| storm.sent),
            answered: per_second(|storm| storm.answered),
            lost: preflights.map_or(0.0, |storm| 100.0 * storm.failed as f64 / storm.due as f64),
            server: busy.server.as_secs_f64() / duration.as_secs_f64(),
            client: busy.client.as_secs_f64() / duration.as_secs_f64(),
        };
        Ok(Slice::new(sample, others.work, AHEAD + duration))
    }

    /// GETs, a connection each.
    fn visit(&self, node: &Node, duration: Duration) -> io::Result<Outcome> {
        // Those who storm share the CPU, and are not to be what is measured.
        cpu::go_first()?;
        openloop::run(&OpenLoop {
            address: node.address,
            sources: &node.sources,
            requests: &[lab::get()],
            rate: self.arguments.gets,
            in_flight: IN_FLIGHT,
            duration,
        })
    }
}

fn figures(arguments: &Arguments, rounds: &Rounds<Key, Sample>, saturation: f64) -> io::Result<Vec<Figure>> {
    let enough = |estimate: Option<Estimate>| {
        estimate.filter(|estimate| estimate.count * 2 >= arguments.rounds).ok_or_else(|| {
            io::Error::other(
                "other work kept disturbing this machine: less than half of the rounds count; run this again when it is quiet",
            )
        })
    };
    let mut figures = Vec::new();
    let mut add = |name: String, estimate, unit, peer| {
        figures.push(Figure { name, estimate: enough(estimate)?, unit, peer });
        Ok::<_, io::Error>(())
    };
    for (variant, behind) in VARIANTS {
        let (calm, storm) = ((variant, false), (variant, true));
        let name = |name: &str| format!("{name}{behind}");
        add(name("get_p99_storm_vs_calm"), rounds.ratio(storm, calm, |one| one.p99), "ratio", "calm")?;
        add(name("get_p99_calm_ms"), rounds.estimate(calm, |one| one.p99), "ms", "")?;
        add(name("get_p99_storm_ms"), rounds.estimate(storm, |one| one.p99), "ms", "")?;
        add(name("get_failed_storm_percent"), rounds.estimate(storm, |one| one.failed), "%", "")?;
        let answered = rounds.estimate(storm, |one| one.answered);
        add(name("preflights_answered_per_second"), answered, "1/s", "")?;
        let calm_cpu = rounds.estimate(calm, |one| one.server).map_or(0.0, |estimate| estimate.median);
        let each = rounds.estimate(storm, |one| (one.server - calm_cpu) * 1e6 / one.answered);
        add(name("node_cpu_us_per_preflight"), each, "us", "")?;
        let offered = rounds.estimate(storm, |one| one.sent / saturation);
        add(name("storm_sent_vs_saturation"), offered, "ratio", "nginx's saturation")?;
    }
    let estimate = saturation.into();
    figures.push(Figure { name: "nginx_saturation_per_second".into(), estimate, unit: "1/s", peer: "" });
    Ok(figures)
}

fn markdown(
    scene: &Scene<'_>,
    rounds: &Rounds<Key, Sample>,
    figures: &[Figure],
    saturation: f64,
    saturated_cpu: f64,
) -> io::Result<String> {
    let arguments = scene.arguments;
    let mut table = Table::new([
        "",
        "GETs p50, ms",
        "p99, ms",
        "failed, %",
        "preflights due/s",
        "sent/s",
        "answered/s",
        "not answered, %",
        "node's CPU",
        "clients' CPU",
    ]);
    for (variant, _) in VARIANTS {
        for (stormy, when) in [(false, "calm"), (true, "storm")] {
            let of = |value: fn(&Sample) -> f64| report::median(rounds.estimate((variant, stormy), value));
            table.row([
                format!("{variant}, {when}"),
                of(|one| one.p50),
                of(|one| one.p99),
                of(|one| one.failed),
                of(|one| one.due),
                of(|one| one.sent),
                of(|one| one.answered),
                of(|one| one.lost),
                of(|one| one.server),
                of(|one| one.client),
            ]);
        }
    }
    let noise = if arguments.accept_noise { ", **disturbed ones included**" } else { "" };
    Ok(format!(
        "# GETs in a storm of preflights\n\n{}\n\n{}\n{}\n\
         - Two nodes (network namespaces) with an nginx each, one steered. nginx (as ingress-nginx configures it, without its \
         Lua), preflightd's worker and the nodes' network stack (receive packet steering) share CPU {}; the clients, who send \
         GETs and storm, have CPU {}, but what comes to them is received on CPU {}: that adds to the node's CPU, on both nodes. \
         There were no more CPUs to give nginx one of its own.\n\
         - {} GETs a second at even intervals, a connection each; latency counts from when a GET was due, and what failed counts as \
         4.3 s. They go before the storm on the clients' CPU.\n\
         - The storm: preflights with Connection: close, a connection each, by a TCP of our own that costs the clients' CPU \
         little, due at {} times what saturates the bare nginx: the highest rate, in steps of 7 %, of which it answers 98 % in \
         time (median of {SATURATIONS} searches: {saturation:.0}/s, which takes {:.0} % of its CPU), at most {IN_FLIGHT} \
         waiting at once.\n\
         - CPU for each preflight is the node's CPU in the storm, less that in calm, over what was answered.\n\
         - {} rounds in shuffled order, slices of {} ms; medians over rounds, ratios taken within rounds, bounds by order \
         statistics. {} slices{noise}, {} of them thrown away because other work took more than {:.0} % of a CPU meanwhile (each is \
         tried {ATTEMPTS} times).\n",
        report::provenance("cargo xtask bench storm")?,
        table.markdown(),
        report::figures(figures),
        scene.lab.cpus.server,
        scene.lab.cpus.client,
        scene.lab.cpus.server,
        arguments.gets,
        arguments.factor,
        saturated_cpu * 100.0,
        arguments.rounds,
        arguments.slice,
        rounds.slices,
        rounds.discarded,
        TOLERATED * 100.0,
    ))
}
