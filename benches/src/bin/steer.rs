//! What steering costs the traffic that is not its own, how many preflights it gets, and what a SYN flood does to it.
#![forbid(unsafe_code)]
#![expect(clippy::cast_precision_loss, reason = "counts and nanoseconds of one run are far below 2^52")]

use aya::{
    programs::{ProgramInfo, SchedClassifier, TestRun as _, TestRunOptions},
    sys::{Stats, enable_stats},
};
use clap::{Parser, ValueEnum};
use preflightd_benches::{
    bulk::{self, Direction},
    cpu, flood,
    lab::{self, Lab, Node, Proxy, Variant},
    load::{self, Load, Pace},
    openloop::{self, OpenLoop, Outcome},
    policies::{self, Size},
    process::{Busy, Everyone},
    report::{self, Figure, Table},
    rounds::{self, ATTEMPTS, Rounds, Slice, TOLERATED},
    share::{self, Answered},
    stats::Estimate,
};
use preflightd_tests::{daemon::Metrics, netns::Netns};
use std::{
    collections::BTreeMap,
    fmt, fs, io,
    process::{self, ExitCode},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

const CONNECTIONS: usize = 64;
const ROUNDS: usize = 20;
const WARM_UP: Duration = Duration::from_millis(50);
/// Rounds of the cost of one packet.
const PACKET_ROUNDS: usize = 10;
/// Packets of one BPF_PROG_TEST_RUN.
const REPEAT: u32 = 200_000;
/// SYNs a second.
const FLOOD: u32 = 50_000;
/// GETs a second beside them.
const VISITS: f64 = 500.0;
/// So few local ports that each is used again while the server still has its last connection in TIME_WAIT.
const FEW_PORTS: &str = "20000 20999";

/// Steering against no program and an empty one: throughput of all that is not a preflight, cost of a packet, share of
/// preflights, SYN flood.
///
/// Needs root. Nodes and clients are network namespaces; nginx, preflightd and the nodes' network stack share one CPU, the
/// clients have another. Takes about seven minutes.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench steer")]
struct Arguments {
    /// Rounds; results are written to benches/results with 20 or more.
    #[arg(long, default_value_t = ROUNDS)]
    rounds: usize,
    /// Length of a slice in milliseconds.
    #[arg(long, default_value_t = 450)]
    slice: u64,
    /// Bytes of an upload or download.
    #[arg(long, default_value_t = 400_000_000)]
    bytes: usize,
    /// Connections that open with a preflight.
    #[arg(long, default_value_t = 100_000)]
    preflights: usize,
    /// SYNs of a flood.
    #[arg(long, default_value_t = 1_000_000)]
    syns: u32,
    /// One object of JSON on stdout instead of tables.
    #[arg(long)]
    json: bool,
    /// Keep slices that other work disturbed: for trying things out; nothing is written.
    #[arg(long)]
    accept_noise: bool,
    /// Only these parts; nothing is written.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Throughput of what is not a preflight.
    Passthrough,
    /// Nanoseconds of one packet.
    Packet,
    /// Who answers preflights.
    Share,
    /// A SYN flood.
    Flood,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    NewConnections,
    KeepAlive,
    Download,
    Upload,
}

impl Kind {
    const ALL: [Self; 4] = [Self::NewConnections, Self::KeepAlive, Self::Download, Self::Upload];

    fn name(self) -> &'static str {
        match self {
            Self::NewConnections => "new_connections",
            Self::KeepAlive => "keepalive",
            Self::Download => "download",
            Self::Upload => "upload",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NewConnections => "GETs/s, a connection each",
            Self::KeepAlive => "GETs/s, keep-alive",
            Self::Download => "download, MB/s",
            Self::Upload => "upload, MB/s",
        })
    }
}

/// What is measured, whether clients send TCP timestamps, and where.
type Key = (Kind, bool, Variant);

#[derive(Clone, Copy, Debug)]
struct Sample {
    /// Requests, or MB, a second.
    rate: f64,
    /// Time of both CPUs for each in microseconds.
    cpu: f64,
}

/// What all parts work with.
struct Scene<'a> {
    arguments: &'a Arguments,
    lab: &'a Lab,
    clients: &'a Netns,
    nodes: BTreeMap<Variant, Node>,
}

/// Measures a part: adds its figures, and returns its chapter of the report.
type Measure = fn(&Scene<'_>, &mut Vec<Figure>) -> io::Result<String>;

/// A figure of a slice.
type Value = fn(&Sample) -> f64;

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench steer: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> io::Result<()> {
    let lab = Lab::open(Proxy::ByHand)?;
    let clients = lab.clients();
    let nodes: io::Result<BTreeMap<_, _>> = (1..)
        .zip(Variant::ALL)
        .map(|(number, variant)| Ok((variant, lab.node(variant, number, &clients, arguments.bytes)?)))
        .collect();
    let scene = Scene { arguments, lab: &lab, clients: &clients, nodes: nodes? };
    let wanted = |part| arguments.only.is_empty() || arguments.only.contains(&part);
    let (mut figures, mut text) = (Vec::new(), String::new());
    let parts: [(Part, Measure); 4] = [
        (Part::Passthrough, passthrough),
        (Part::Packet, packet),
        (Part::Share, steered_share),
        (Part::Flood, syn_flood),
    ];
    for (part, measure) in parts.into_iter().filter(|(part, _)| wanted(*part)) {
        eprintln!("{part:?}");
        text += &measure(&scene, &mut figures)?;
    }

    let report = format!(
        "# What steering costs, and what it gets\n\n{}\n\n{}\n{text}",
        report::provenance("cargo xtask bench steer")?,
        report::figures(&figures),
    );
    if arguments.json {
        println!("{}", report::object(&figures));
    } else {
        println!("{report}");
    }
    if arguments.rounds >= ROUNDS && !arguments.accept_noise && arguments.only.is_empty() {
        report::save("steer.md", &report)?;
    } else {
        eprintln!("not written to benches/results: that takes {ROUNDS} undisturbed rounds of all parts");
    }
    Ok(())
}

/// All that is not a preflight, with no program, an empty one, and steering.
fn passthrough(scene: &Scene<'_>, figures: &mut Vec<Figure>) -> io::Result<String> {
    let arguments = scene.arguments;
    let keys: Vec<Key> = Kind::ALL
        .into_iter()
        .flat_map(|kind| [true, false].map(|timestamps| (kind, timestamps)))
        .flat_map(|(kind, timestamps)| Variant::ALL.map(|variant| (kind, timestamps, variant)))
        .collect();
    let rounds = scene.clients.enter(|| {
        Rounds::run(
            &keys,
            arguments.rounds,
            rounds::tolerated(arguments.accept_noise),
            |round| eprintln!("round {} of {}, {} slices", round + 1, arguments.rounds, keys.len()),
            |(kind, timestamps, variant)| {
                set_timestamps(timestamps)?;
                scene.slice(kind, &scene.nodes[&variant]).map_err(|error| {
                    let without = if timestamps { "" } else { ", no timestamps" };
                    io::Error::new(error.kind(), format!("{kind}{without}, {variant}: {error}"))
                })
            },
        )
    })?;
    scene.clients.enter(|| set_timestamps(true))?;

    let mut table = Table::new(["", "no program", "an empty one", "steering", "steering, CPU µs for each"]);
    for (timestamps, behind) in [(true, ""), (false, "_no_ts")] {
        for kind in Kind::ALL {
            let of =
                |variant, value: Value| report::median(rounds.estimate((kind, timestamps, variant), value));
            let without = if timestamps { "" } else { ", no timestamps" };
            table.row([
                format!("{kind}{without}"),
                of(Variant::None, |sample| sample.rate),
                of(Variant::Empty, |sample| sample.rate),
                of(Variant::Steer, |sample| sample.rate),
                of(Variant::Steer, |sample| sample.cpu),
            ]);
            for (variant, name) in [(Variant::Steer, "passthrough"), (Variant::Empty, "empty")] {
                let values: [(&str, Value); 2] = [("", |sample| sample.rate), ("_cpu", |sample| sample.cpu)];
                for (what, value) in values {
                    let of = (kind, timestamps, variant);
                    let estimate = rounds.ratio(of, (kind, timestamps, Variant::None), value);
                    let enough = estimate.filter(|estimate| estimate.count * 2 >= arguments.rounds);
                    figures.push(Figure {
                        name: format!("{name}_{}{what}_vs_none{behind}", kind.name()),
                        estimate: enough.ok_or_else(|| {
                            io::Error::other(
                                "other work kept disturbing this machine: less than half of the rounds count; \
                                 run this again when it is quiet",
                            )
                        })?,
                        unit: "ratio",
                        peer: "no program",
                    });
                }
            }
        }
    }
    let noise = if arguments.accept_noise { ", **disturbed ones included**" } else { "" };
    Ok(format!(
        "## All that is not a preflight\n\n{}\n\
         - Three nodes (network namespaces) with an nginx each, one with no program on its interface, one with an empty one, one \
         steered; nothing is attached or detached during the run. nginx, preflightd and the nodes' network stack (receive packet \
         steering) share CPU {}, the clients and theirs have CPU {}.\n\
         - {} rounds in shuffled order, slices of {} ms with {CONNECTIONS} connections, or {} bytes; medians over rounds, ratios \
         taken within rounds, bounds by order statistics. {} slices{noise}, {} of them thrown away because other work took more \
         than {:.0} % of a CPU meanwhile (each is tried {ATTEMPTS} times).\n\
         - CPU is the time that both CPUs were not idle, clients included: for each GET, or each MB. The kernel tells it in steps \
         of 10 ms.\n\
         - Uploads are read by nginx and written to memory before it answers.\n\n",
        table.markdown(),
        scene.lab.cpus.server,
        scene.lab.cpus.client,
        arguments.rounds,
        arguments.slice,
        arguments.bytes,
        rounds.slices,
        rounds.discarded,
        TOLERATED * 100.0,
    ))
}

impl Scene<'_> {
    /// One slice, from the clients' namespace.
    fn slice(&self, kind: Kind, node: &Node) -> io::Result<Slice<Sample>> {
        let cpus = self.lab.cpus;
        let everyone = Everyone::now()?;
        let mut marks = Vec::with_capacity(2);
        let (count, elapsed) = self.work(kind, node, || {
            marks.push(Busy::now(cpus)?);
            Ok(())
        })?;
        let ours: Vec<_> = self.nodes.values().flat_map(Node::pids).chain([process::id()]).collect();
        let others = everyone.others_since(&ours, cpus)?;
        let [begin, end] = marks[..] else {
            return Err(io::Error::other("the load must mark beginning and end"));
        };
        let busy = end.since(begin);
        let sample = Sample {
            rate: count / elapsed.as_secs_f64(),
            cpu: (busy.server + busy.client).as_secs_f64() * 1e6 / count,
        };
        Ok(Slice::new(sample, others.work, elapsed))
    }

    /// Loads a node, and says with how many requests or MB, and how long that took.
    fn work(
        &self,
        kind: Kind,
        node: &Node,
        mut mark: impl FnMut() -> io::Result<()>,
    ) -> io::Result<(f64, Duration)> {
        let pace = match kind {
            Kind::NewConnections => Pace::NewConnection { client_closes: false },
            Kind::KeepAlive => Pace::KeepAlive,
            Kind::Download | Kind::Upload => {
                let direction = if kind == Kind::Download { Direction::Down } else { Direction::Up };
                mark()?;
                let elapsed = bulk::transfer(node.address, direction, self.arguments.bytes)?;
                mark()?;
                return Ok((self.arguments.bytes as f64 / 1e6, elapsed));
            }
        };
        let load = Load {
            address: node.address,
            requests: &[lab::get()],
            pace,
            connections: CONNECTIONS,
            sources: &node.sources,
            warm_up: WARM_UP,
            duration: Duration::from_millis(self.arguments.slice).saturating_sub(WARM_UP),
        };
        let served = load::run(&load, mark)?;
        Ok((served.requests as f64, served.elapsed))
    }
}

/// Whether clients in the namespace of this thread ask for TCP timestamps.
fn set_timestamps(on: bool) -> io::Result<()> {
    fs::write("/proc/sys/net/ipv4/tcp_timestamps", if on { "1" } else { "0" })
}

/// What the program takes for a packet of a connection that is established.
fn packet(scene: &Scene<'_>, figures: &mut Vec<Figure>) -> io::Result<String> {
    const KINDS: [(Kind, &str); 3] = [
        (Kind::KeepAlive, "established_packet_ns_above_empty"),
        (Kind::Download, "established_packet_ns_above_empty_download"),
        (Kind::Upload, "established_packet_ns_above_empty_upload"),
    ];
    let mut table =
        Table::new(["ns for a packet of an established connection", "an empty program", "steering"]);
    {
        // Until this is dropped the kernel measures every run of every program.
        let _stats = enable_stats(Stats::RunTime).map_err(io::Error::other)?;
        for (kind, name) in KINDS {
            let pairs: io::Result<Vec<_>> = (0..PACKET_ROUNDS)
                .map(|_| Ok((scene.run_time(kind, Variant::Empty)?, scene.run_time(kind, Variant::Steer)?)))
                .collect();
            note_pairs(&pairs?, name, &kind.to_string(), figures, &mut table);
        }
    }
    let frame = acknowledgement(&scene.nodes[&Variant::Steer]);
    let pairs: io::Result<Vec<_>> = (0..PACKET_ROUNDS)
        .map(|_| Ok((scene.test_run(&frame, Variant::Empty)?, scene.test_run(&frame, Variant::Steer)?)))
        .collect();
    note_pairs(
        &pairs?,
        "established_packet_ns_above_empty_test_run",
        "the same packet again and again",
        figures,
        &mut table,
    );
    Ok(format!(
        "## A packet of an established connection\n\n{}\n\
         - Run times as the kernel measures them (kernel.bpf_stats_enabled), which adds to each about as much as the empty program \
         takes; and by BPF_PROG_TEST_RUN, {REPEAT} times an acknowledgement of a connection that the programs know nothing of. \
         Medians of {PACKET_ROUNDS}, taken in turn; the figures are differences.\n\n",
        table.markdown(),
    ))
}

fn note_pairs(pairs: &[(f64, f64)], name: &str, title: &str, figures: &mut Vec<Figure>, table: &mut Table) {
    let median = |value: fn(&(f64, f64)) -> f64| report::median(Estimate::of(pairs.iter().map(value)));
    table.row([title.to_owned(), median(|pair| pair.0), median(|pair| pair.1)]);
    if let Some(estimate) = Estimate::of(pairs.iter().map(|(empty, steer)| steer - empty)) {
        figures.push(Figure { name: name.into(), estimate, unit: "ns", peer: "an empty program" });
    }
}

impl Scene<'_> {
    fn program(&self, variant: Variant) -> io::Result<ProgramInfo> {
        let program = self.nodes[&variant].program()?;
        program.ok_or_else(|| io::Error::other(format!("the node with {variant} has no program")))
    }

    /// Nanoseconds for a packet under load.
    fn run_time(&self, kind: Kind, variant: Variant) -> io::Result<f64> {
        let mut marks = Vec::with_capacity(2);
        let node = &self.nodes[&variant];
        self.clients.enter(|| {
            self.work(kind, node, || {
                let program = self.program(variant)?;
                marks.push((program.run_time(), program.run_count()));
                Ok(())
            })
        })?;
        let [(time_before, count_before), (time, count)] = marks[..] else {
            return Err(io::Error::other("the load must mark beginning and end"));
        };
        Ok(time.saturating_sub(time_before).as_secs_f64() * 1e9 / (count - count_before) as f64)
    }

    /// Nanoseconds for `frame`, again and again.
    fn test_run(&self, frame: &[u8], variant: Variant) -> io::Result<f64> {
        let program = SchedClassifier::from_program_info(self.program(variant)?, "program".into())
            .map_err(io::Error::other)?;
        let options = TestRunOptions { data_in: Some(frame), repeat: REPEAT, ..TestRunOptions::default() };
        let result = program.test_run(options).map_err(io::Error::other)?;
        Ok(result.duration.as_secs_f64() * 1e9)
    }
}

/// A bare acknowledgement to a node, of a connection that nobody has: no SYN ever had these addresses and ports.
fn acknowledgement(node: &Node) -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend([0x08, 0x00]);
    frame.extend([0x45, 0, 0, 52, 0, 0, 0x40, 0, 64, 6, 0, 0]);
    frame.extend([192, 0, 2, 1]);
    frame.extend(node.address.ip().octets());
    frame.extend(40_000_u16.to_be_bytes());
    frame.extend(node.address.port().to_be_bytes());
    frame.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x80, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
    frame.extend([1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 1]);
    frame
}

/// Who answers preflights.
fn steered_share(scene: &Scene<'_>, figures: &mut Vec<Figure>) -> io::Result<String> {
    let node = &scene.nodes[&Variant::Steer];
    let all = scene.arguments.preflights;
    let mut table = Table::new([
        "connections that open with a preflight",
        "all",
        "deferred",
        "by preflightd",
        "by nginx",
        "failed",
        "TIME_WAIT reused",
        "left to the kernel",
    ]);
    let mut measure = |name: &str, title: &str, count, sources: &[_]| {
        let before = node.metrics()?;
        let requests = policies::requests(Size::SMALL, 5);
        let answered = scene.clients.enter(|| share::ask(node.address, sources, &requests, count))?;
        let seen = Seen::between(&before, &node.metrics()?);
        let worker = answered.worker as f64;
        let mut figure = |behind: &str, value: f64, unit| {
            figures.push(Figure { name: format!("{name}{behind}"), estimate: value.into(), unit, peer: "" });
        };
        figure("", worker / seen.deferred as f64, "ratio");
        figure("_of_all", worker / answered.all() as f64, "ratio");
        figure("_failed", answered.failed as f64, "connections");
        figure("_time_wait_reused", seen.time_wait_reused as f64, "connections");
        for (reason, count) in &seen.left {
            figure(&format!("_fail_open_{reason}"), *count as f64, "connections");
        }
        table.row(row(title, &answered, &seen));
        Ok::<_, io::Error>(())
    };
    measure("steered_share", "from many addresses", all, &node.sources)?;
    // The last address, which was used the least.
    let few = &node.sources[node.sources.len() - 1..];
    let ports = "/proc/sys/net/ipv4/ip_local_port_range";
    let before = scene.clients.enter(|| {
        let before = fs::read_to_string(ports)?;
        fs::write(ports, FEW_PORTS)?;
        Ok::<_, io::Error>(before)
    })?;
    measure("steered_share_few_ports", "from one address, 1,000 ports", all / 2, few)?;
    scene.clients.enter(|| set_timestamps(false))?;
    measure("steered_share_few_ports_no_ts", "the same without timestamps", all / 2, few)?;
    scene.clients.enter(|| {
        set_timestamps(true)?;
        fs::write(ports, before.trim())
    })?;
    Ok(format!(
        "## Who answers preflights\n\n{}\n\
         - Several clients at once, each preflight on a connection of its own; the server closes, and so keeps its addresses and \
         ports in TIME_WAIT for a minute. `steered_share` is of those whose SYN the program answered.\n\n",
        table.markdown(),
    ))
}

/// What preflightd counted.
struct Seen {
    /// Connections whose SYN the program answered.
    deferred: u64,
    time_wait_reused: u64,
    /// Connections that were left to the kernel's own handshake, by reason.
    left: BTreeMap<&'static str, u64>,
}

impl Seen {
    fn between(before: &Metrics, after: &Metrics) -> Self {
        let counted =
            |name, label, value| after.count(name, &[(label, value)]) - before.count(name, &[(label, value)]);
        let event = |value| counted("preflightd_steer_events_total", "event", value);
        let reasons = preflightd::steer::fail_open::NAMES.iter();
        let left =
            reasons.map(|reason| (*reason, counted("preflightd_steer_fail_open_total", "reason", reason)));
        Self {
            deferred: event("syn_ack") - event("syn_again"),
            time_wait_reused: event("time_wait_reused"),
            left: left.filter(|(_, count)| *count > 0).collect(),
        }
    }

    fn reasons(&self) -> String {
        let reasons: Vec<_> = self.left.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
        if reasons.is_empty() { "–".into() } else { reasons.join(", ") }
    }
}

fn row(title: &str, answered: &Answered, seen: &Seen) -> [String; 8] {
    [
        title.to_owned(),
        answered.all().to_string(),
        seen.deferred.to_string(),
        answered.worker.to_string(),
        answered.proxy.to_string(),
        answered.failed.to_string(),
        seen.time_wait_reused.to_string(),
        seen.reasons(),
    ]
}

/// A SYN flood from a namespace of its own, beside clients that are real.
fn syn_flood(scene: &Scene<'_>, figures: &mut Vec<Figure>) -> io::Result<String> {
    let world = Netns::new("world");
    let mut table = Table::new([
        "SYN flood",
        "SYNs/s",
        "p99 of GETs calm, ms",
        "p99 in the flood, ms",
        "GETs failed",
        "request socks, KiB more",
        "slab, MiB more",
        "available, MiB less",
        "left to the kernel",
    ]);
    let variants = [(1, Variant::None, "_without"), (2, Variant::Steer, "")];
    for (number, variant, _) in variants {
        scene.nodes[&variant].link_world(&world, number, scene.lab.cpus)?;
    }
    for (_, variant, behind) in variants {
        let node = &scene.nodes[&variant];
        let calm = scene.visit(node)?;
        let before = node.metrics()?;
        let (flooded, elapsed, growth) = scene.flood(node, &world)?;
        let seen = Seen::between(&before, &node.metrics()?);
        let ms = |nanoseconds: u32| f64::from(nanoseconds) / 1e6;
        let mut figure = |name: &str, value: f64, unit| {
            figures.push(Figure { name: format!("{name}{behind}"), estimate: value.into(), unit, peer: "" });
        };
        figure("flood_get_p99_vs_calm", ms(flooded.p99) / ms(calm.p99), "ratio");
        figure("flood_get_p99_ms", ms(flooded.p99), "ms");
        figure("flood_get_failed", flooded.failed as f64, "connections");
        figure("flood_request_sock_bytes", growth.request_socks as f64, "bytes");
        figure("flood_slab_bytes", growth.slab as f64, "bytes");
        figure("flood_memory_bytes", growth.used as f64, "bytes");
        let mib = |bytes: u64| report::number(bytes as f64 / f64::from(1 << 20));
        table.row([
            variant.to_string(),
            report::number(f64::from(scene.arguments.syns) / elapsed.as_secs_f64()),
            report::number(ms(calm.p99)),
            report::number(ms(flooded.p99)),
            format!("{} of {}", flooded.failed, flooded.due),
            report::number(growth.request_socks as f64 / 1024.0),
            mib(growth.slab),
            mib(growth.used),
            seen.reasons(),
        ]);
    }
    Ok(format!(
        "## A SYN flood\n\n{}\n\
         - {} SYNs with all options from as many addresses and ports, {FLOOD} a second, from a namespace beside the clients'; \
         meanwhile {VISITS} GETs a second, a connection each, whose latency counts from when they were due (what failed counts as \
         4.3 s). Memory is the machine's: the most that was seen above what there was before.\n\n",
        table.markdown(),
        scene.arguments.syns,
    ))
}

impl Scene<'_> {
    /// Real clients, for a while.
    fn visit(&self, node: &Node) -> io::Result<Outcome> {
        let load = OpenLoop {
            address: node.address,
            sources: &node.sources,
            requests: &[lab::get()],
            rate: VISITS,
            in_flight: 4096,
            // Well within the flood.
            duration: Duration::from_secs((self.arguments.syns / FLOOD).saturating_sub(1).max(1).into()),
        };
        self.clients.enter(|| {
            // They share a CPU with those who flood.
            cpu::go_first()?;
            openloop::run(&load)
        })
    }

    /// The same in a flood, how long that took, and what it took of memory.
    fn flood(&self, node: &Node, world: &Netns) -> io::Result<(Outcome, Duration, Memory)> {
        let syns = self.arguments.syns;
        let over = AtomicBool::new(false);
        let before = Memory::now()?;
        thread::scope(|scope| {
            let flood = scope.spawn(|| {
                let sent = world.enter(|| flood::send(node.address, syns, FLOOD));
                over.store(true, Ordering::Relaxed);
                sent
            });
            let growth = scope.spawn(|| {
                let mut most = Memory::default();
                while !over.load(Ordering::Relaxed) {
                    most = most.max(&Memory::now()?.above(&before));
                    thread::sleep(Duration::from_millis(100));
                }
                Ok::<_, io::Error>(most)
            });
            thread::sleep(Duration::from_millis(500));
            let visited = self.visit(node);
            let elapsed = flood.join().expect("the flood panicked")?;
            Ok((visited?, elapsed, growth.join().expect("the observer panicked")?))
        })
    }
}

/// Of the machine, in bytes.
#[derive(Clone, Copy, Debug, Default)]
struct Memory {
    /// Connections that the kernel has half made, and what became of them since.
    request_socks: u64,
    slab: u64,
    /// Not available to anybody else.
    used: u64,
}

impl Memory {
    fn now() -> io::Result<Self> {
        let info = fs::read_to_string("/proc/meminfo")?;
        let of = |name: &str| {
            let kib = info
                .lines()
                .find_map(|line| line.strip_prefix(name)?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
            kib.map(|kib| kib * 1024)
                .ok_or_else(|| io::Error::other(format!("reading /proc/meminfo: there is no {name}")))
        };
        // name, active objects, objects, size of each, … (slabinfo(5))
        let slabs = fs::read_to_string("/proc/slabinfo")?;
        let request_socks = slabs
            .lines()
            .filter_map(|line| {
                let mut fields = line.split_ascii_whitespace();
                fields.next().filter(|name| *name == "request_sock_TCP")?;
                let objects: u64 = fields.nth(1)?.parse().ok()?;
                Some(objects * fields.next()?.parse::<u64>().ok()?)
            })
            .sum();
        Ok(Self { request_socks, slab: of("Slab:")?, used: of("MemTotal:")? - of("MemAvailable:")? })
    }

    fn above(&self, before: &Self) -> Self {
        Self {
            request_socks: self.request_socks.saturating_sub(before.request_socks),
            slab: self.slab.saturating_sub(before.slab),
            used: self.used.saturating_sub(before.used),
        }
    }

    fn max(&self, other: &Self) -> Self {
        Self {
            request_socks: self.request_socks.max(other.request_socks),
            slab: self.slab.max(other.slab),
            used: self.used.max(other.used),
        }
    }
}
