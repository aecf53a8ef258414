//! What a preflight costs that is answered in the kernel, beside nginx that answers it itself, and how many are.
#![forbid(unsafe_code)]
#![expect(clippy::cast_precision_loss, reason = "counts and nanoseconds of one run are far below 2^52")]

use clap::{Parser, ValueEnum};
use preflightd_benches::{
    lab::{Lab, Node, Proxy, Serving, Variant},
    load::{self, Load, Pace, Served},
    mix,
    policies::{self, Size},
    process::{Busy, Everyone},
    report::{self, Figure, Table},
    rounds::{self, ATTEMPTS, Rounds, Slice, TOLERATED},
    share,
    stats::Estimate,
    workload::Request,
};
use preflightd_tests::netns::Netns;
use std::{
    cell::RefCell,
    collections::BTreeMap,
    fmt, io,
    process::{self, ExitCode},
    slice, thread,
    time::{Duration, Instant},
};

const CONNECTIONS: usize = 64;
const ROUNDS: usize = 20;
const WARM_UP: Duration = Duration::from_millis(100);
/// In this time preflightd has counted all that the kernel has.
const COUNTED: Duration = Duration::from_secs(2);
/// The share of a slice's preflights that must have been answered by whom the slice is about.
const SHARE: f64 = 0.99;
/// An answer that takes longer is lost.
const LOST: Duration = Duration::from_millis(500);
/// How often preflightd is asked until it answers as it should, once a second.
const TRIES: usize = 10;
/// Whom figures are compared with.
const NGINX: &str = "nginx as ingress-nginx";
const UNLOGGED: &str = "the same without a log";
/// The network of the node that the mix is sent to.
const MIX: u8 = 9;

/// CPU time of a preflight that the kernel answers against one that nginx answers, on keep-alive and with a connection each,
/// and the share that the kernel answers of a realistic mix.
///
/// Needs root. Nodes and clients are network namespaces; nginx, preflightd and the nodes' network stack share one CPU, the
/// clients have another. Takes about four minutes.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench kernel-answer")]
struct Arguments {
    /// Rounds; results are written to benches/results with 20 or more.
    #[arg(long, default_value_t = ROUNDS)]
    rounds: usize,
    /// Length of a slice in milliseconds.
    #[arg(long, default_value_t = 800)]
    slice: u64,
    /// Preflights of the mix.
    #[arg(long, default_value_t = 200_000)]
    preflights: usize,
    /// Preflights of the mix on one connection.
    #[arg(long, default_value_t = 32)]
    per_connection: usize,
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
    /// CPU time of a preflight.
    Cpu,
    /// Who answers a realistic mix.
    Mix,
}

/// Who answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Server {
    Kernel,
    Workers,
    Nginx,
    NginxBehindEmpty,
    NginxUnlogged,
}

impl Server {
    const ALL: [Self; 5] =
        [Self::Kernel, Self::Workers, Self::Nginx, Self::NginxBehindEmpty, Self::NginxUnlogged];

    /// Behind the names of its figures.
    fn name(self) -> &'static str {
        match self {
            Self::Kernel => "",
            Self::Workers => "_workers",
            Self::Nginx => "_nginx",
            Self::NginxBehindEmpty => "_nginx_behind_empty",
            Self::NginxUnlogged => "_nginx_unlogged",
        }
    }

    /// What preflightd calls those of it that answer here.
    fn tier(self) -> Option<&'static str> {
        match self {
            Self::Kernel => Some("kernel"),
            Self::Workers => Some("worker"),
            _ => None,
        }
    }

    /// A worker closes behind each answer, so that there is no keep-alive.
    fn modes(self) -> &'static [Mode] {
        if self == Self::Workers { &[Mode::NewConnection] } else { &Mode::ALL }
    }

    fn start(self, lab: &Lab, number: u8, clients: &Netns) -> io::Result<Node> {
        let serving = Serving::small(Proxy::Ingress);
        let (variant, serving) = match self {
            Self::Kernel => (Variant::Steer, serving),
            Self::Workers => (Variant::Steer, serving.without_kernel_answers()),
            Self::Nginx => (Variant::None, serving),
            Self::NginxBehindEmpty => (Variant::Empty, serving),
            Self::NginxUnlogged => (Variant::None, serving.without_access_log()),
        };
        lab.serve(&serving, variant, number, clients, 0)
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kernel => "preflightd, in the kernel",
            Self::Workers => "preflightd, its worker",
            Self::Nginx => "nginx",
            Self::NginxBehindEmpty => "nginx behind an empty program",
            Self::NginxUnlogged => "nginx without an access log",
        })
    }
}

/// How preflights come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Mode {
    KeepAlive,
    NewConnection,
}

impl Mode {
    const ALL: [Self; 2] = [Self::KeepAlive, Self::NewConnection];

    fn name(self) -> &'static str {
        match self {
            Self::KeepAlive => "keepalive",
            Self::NewConnection => "new_connection",
        }
    }

    fn pace(self) -> Pace {
        match self {
            Self::KeepAlive => Pace::KeepAlive,
            Self::NewConnection => Pace::Visit { requests: 1 },
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::KeepAlive => "keep-alive",
            Self::NewConnection => "a connection each",
        })
    }
}

type Key = (Server, Mode);

#[derive(Clone, Copy, Debug)]
struct Sample {
    /// Time of the node's CPU for each preflight in microseconds.
    node: f64,
    /// The same of the clients' CPU.
    clients: f64,
    /// Preflights a second.
    rate: f64,
    /// Of the node's CPU.
    busy: f64,
    /// Median latency in microseconds.
    p50: f64,
    /// Of the preflights, how many were answered by whom they are counted for.
    share: f64,
}

impl Sample {
    /// Time of both CPUs for each preflight.
    fn machine(&self) -> f64 {
        self.node + self.clients
    }
}

/// A figure of a slice.
type Value = fn(&Sample) -> f64;

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench kernel-answer: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> io::Result<()> {
    let lab = Lab::open(Proxy::Ingress)?;
    let clients = lab.clients();
    let wanted = |part| arguments.only.is_empty() || arguments.only.contains(&part);
    let (mut figures, mut text) = (Vec::new(), String::new());
    if wanted(Part::Cpu) {
        text += &cpu(arguments, &lab, &clients, &mut figures)?;
    }
    if wanted(Part::Mix) {
        text += &answered_mix(arguments, &lab, &clients, &mut figures)?;
    }
    let report = format!(
        "# Preflights answered in the kernel\n\n{}\n\n{}\n{text}",
        report::provenance("cargo xtask bench kernel-answer")?,
        report::figures(&figures),
    );
    if arguments.json {
        println!("{}", report::object(&figures));
    } else {
        println!("{report}");
    }
    if arguments.rounds >= ROUNDS && !arguments.accept_noise && arguments.only.is_empty() {
        report::save("kernel-answer.md", &report)?;
    } else {
        eprintln!("not written to benches/results: that takes {ROUNDS} undisturbed rounds of all parts");
    }
    Ok(())
}

/// CPU time of a preflight: adds its figures, and returns its chapter of the report.
fn cpu(arguments: &Arguments, lab: &Lab, clients: &Netns, figures: &mut Vec<Figure>) -> io::Result<String> {
    let nodes: io::Result<BTreeMap<_, _>> = (1..)
        .zip(Server::ALL)
        .map(|(number, server)| Ok((server, server.start(lab, number, clients)?)))
        .collect();
    let requests = policies::requests(Size::SMALL, 5);
    let scene = Scene { arguments, lab, clients, nodes: nodes?, requests, answered: RefCell::default() };
    for (server, node) in &scene.nodes {
        if let Some(tier) = server.tier() {
            let answered = wait_for(node, clients, tier, &scene.requests[0])?;
            scene.answered.borrow_mut().insert(*server, answered);
        }
    }
    let keys: Vec<Key> = Server::ALL
        .into_iter()
        .flat_map(|server| server.modes().iter().map(move |&mode| (server, mode)))
        .collect();
    let rounds = Rounds::run(
        &keys,
        arguments.rounds,
        rounds::tolerated(arguments.accept_noise),
        |round| eprintln!("round {} of {}, {} slices", round + 1, arguments.rounds, keys.len()),
        |(server, mode)| {
            scene
                .slice(server, mode)
                .map_err(|error| io::Error::new(error.kind(), format!("{server}, {mode}: {error}")))
        },
    )?;
    note(arguments, &keys, &rounds, figures)?;
    Ok(chapter(&scene, &keys, &rounds))
}

/// Asks until preflightd answers in this tier, since what the programs know is published behind its readiness; what it has
/// answered there by then.
fn wait_for(node: &Node, clients: &Netns, tier: &str, request: &Request) -> io::Result<u64> {
    let load = Load {
        address: node.address,
        requests: slice::from_ref(request),
        pace: Pace::Visit { requests: 1 },
        connections: 1,
        sources: &node.sources,
        warm_up: Duration::ZERO,
        duration: Duration::ZERO,
    };
    let before = answered(node, tier)?;
    for _ in 0..TRIES {
        clients.enter(|| load::run(&load, || Ok(())))?;
        let now = answered(node, tier)?;
        if now > before {
            return Ok(now);
        }
    }
    Err(io::Error::other(format!(
        "preflightd answers nothing in its tier `{tier}`: it counts no preflightd_requests_total{{outcome=\"answered\",\
         tier=\"{tier}\"}} of {TRIES} preflights"
    )))
}

/// What preflightd has allowed in this tier.
fn answered(node: &Node, tier: &str) -> io::Result<u64> {
    let labels = [("outcome", "allowed"), ("tier", tier)];
    Ok(node.metrics()?.count("preflightd_requests_total", &labels))
}

struct Scene<'a> {
    arguments: &'a Arguments,
    lab: &'a Lab,
    clients: &'a Netns,
    nodes: BTreeMap<Server, Node>,
    requests: Vec<Request>,
    /// What preflightd had counted when it was last asked.
    answered: RefCell<BTreeMap<Server, u64>>,
}

impl Scene<'_> {
    fn slice(&self, server: Server, mode: Mode) -> io::Result<Slice<Sample>> {
        let (cpus, node) = (self.lab.cpus, &self.nodes[&server]);
        let load = Load {
            address: node.address,
            requests: &self.requests,
            pace: mode.pace(),
            connections: CONNECTIONS,
            sources: &node.sources,
            warm_up: WARM_UP,
            duration: Duration::from_millis(self.arguments.slice).saturating_sub(WARM_UP),
        };
        let everyone = Everyone::now()?;
        let mut marks = Vec::with_capacity(2);
        let served = self.clients.enter(|| {
            load::run(&load, || {
                marks.push(Busy::now(cpus)?);
                Ok(())
            })
        })?;
        let ours: Vec<_> = self.nodes.values().flat_map(Node::pids).chain([process::id()]).collect();
        let others = everyone.others_since(&ours, cpus)?;
        let [begin, end] = marks[..] else {
            return Err(io::Error::other("the load must mark beginning and end"));
        };
        let busy = end.since(begin);
        if served.oldest > LOST {
            return Err(io::Error::other(format!(
                "a preflight was not answered for {} ms",
                served.oldest.as_millis()
            )));
        }
        let share = self.share(server, &served)?;
        node.empty_access_log()?;
        let each = |time: Duration| time.as_secs_f64() * 1e6 / served.requests as f64;
        let sample = Sample {
            node: each(busy.server),
            clients: each(busy.client),
            rate: served.requests as f64 / served.elapsed.as_secs_f64(),
            busy: busy.server.as_secs_f64() / served.elapsed.as_secs_f64(),
            p50: f64::from(served.p50) / 1e3,
            share,
        };
        Ok(Slice::new(sample, others.work, served.elapsed))
    }

    /// The share of a slice that was answered by whom it is about.
    fn share(&self, server: Server, served: &Served) -> io::Result<f64> {
        // All else is answered by nginx alone.
        let Some(tier) = server.tier() else { return Ok(1.0) };
        let before = self.answered.borrow().get(&server).copied().unwrap_or(0);
        // It reads what the kernel has counted now and then only.
        let until = Instant::now() + COUNTED;
        let (now, share) = loop {
            let now = answered(&self.nodes[&server], tier)?;
            // Those that were under way at the end are among what preflightd counts only.
            let share = ((now - before) as f64 / served.all as f64).min(1.0);
            if share >= 1.0 || Instant::now() >= until {
                break (now, share);
            }
            thread::sleep(COUNTED / 20);
        };
        self.answered.borrow_mut().insert(server, now);
        if share < SHARE {
            return Err(io::Error::other(format!(
                "of {} preflights preflightd has answered {} in its tier `{tier}`: this would measure something else",
                served.all,
                now - before
            )));
        }
        Ok(share)
    }
}

fn note(
    arguments: &Arguments,
    keys: &[Key],
    rounds: &Rounds<Key, Sample>,
    figures: &mut Vec<Figure>,
) -> io::Result<()> {
    use Server::{Kernel, Nginx, NginxBehindEmpty, NginxUnlogged, Workers};
    let enough = |estimate: Option<Estimate>| {
        estimate.filter(|estimate| estimate.count * 2 >= arguments.rounds).ok_or_else(|| {
            io::Error::other(
                "other work kept disturbing this machine: less than half of the rounds count; run this again when it is quiet",
            )
        })
    };
    let ratios: [(&str, Server, Server, Value, &str); 7] = [
        ("cpu_vs_nginx", Kernel, Nginx, |one| one.node, NGINX),
        ("machine_vs_nginx", Kernel, Nginx, Sample::machine, NGINX),
        ("cpu_vs_nginx_unlogged", Kernel, NginxUnlogged, |one| one.node, UNLOGGED),
        ("machine_vs_nginx_unlogged", Kernel, NginxUnlogged, Sample::machine, UNLOGGED),
        ("workers_cpu_vs_nginx", Workers, Nginx, |one| one.node, NGINX),
        ("workers_machine_vs_nginx", Workers, Nginx, Sample::machine, NGINX),
        ("empty_cpu_vs_nginx", NginxBehindEmpty, Nginx, |one| one.node, NGINX),
    ];
    for (name, of, to, value, peer) in ratios {
        for &mode in of.modes() {
            figures.push(Figure {
                name: format!("{name}_{}", mode.name()),
                estimate: enough(rounds.ratio((of, mode), (to, mode), value))?,
                unit: "ratio",
                peer,
            });
        }
    }
    let values: [(&str, Value, &str); 3] = [
        ("node_cpu_us", |one| one.node, "us"),
        ("clients_cpu_us", |one| one.clients, "us"),
        ("preflights_per_second", |one| one.rate, "1/s"),
    ];
    for &(server, mode) in keys {
        for (name, value, unit) in values {
            figures.push(Figure {
                name: format!("{name}_{}{}", mode.name(), server.name()),
                estimate: enough(rounds.estimate((server, mode), value))?,
                unit,
                peer: "",
            });
        }
    }
    Ok(())
}

fn chapter(scene: &Scene<'_>, keys: &[Key], rounds: &Rounds<Key, Sample>) -> String {
    let arguments = scene.arguments;
    let mut table = Table::new([
        "a preflight",
        "node's CPU, µs",
        "clients' CPU, µs",
        "both, µs",
        "a second",
        "of the node's CPU",
        "p50, µs",
        "answered so, %",
    ]);
    for &(server, mode) in keys {
        let of = |value: Value| report::median(rounds.estimate((server, mode), value));
        table.row([
            format!("{server}, {mode}"),
            of(|one| one.node),
            of(|one| one.clients),
            of(Sample::machine),
            of(|one| one.rate),
            of(|one| one.busy),
            of(|one| one.p50),
            of(|one| 100.0 * one.share),
        ]);
    }
    let noise = if arguments.accept_noise { ", **disturbed ones included**" } else { "" };
    format!(
        "## CPU time of a preflight\n\n{}\n\
         - Five nodes (network namespaces) with an nginx each, as ingress-nginx configures it without its Lua, with its access \
         log (to memory) but where it is said: two steered by preflightd, of which one leaves all preflights to its worker, one \
         with an empty eBPF program, the control, and two bare. Nothing is attached or detached during the run. All of them hold \
         the same host with five origins.\n\
         - nginx, preflightd and the nodes' network stack (receive packet steering) share CPU {}, the clients and theirs have \
         CPU {}. CPU is all the time that a CPU was not idle, interrupts and eBPF programs included, over the preflights \
         answered meanwhile. The kernel tells it in steps of 10 ms. To wake the other CPU is on either side, at what that costs \
         where CPUs are virtual.\n\
         - Closed loop, {CONNECTIONS} connections, a 537 B Chrome preflight; every answer is checked. The clients' CPU is the \
         bottleneck where the node's has time left, which then also goes to sleep and wakes up.\n\
         - A connection each: the client closes once it has the answer and has not announced it, as browsers do (no \
         `Connection: close`); a worker says so and closes by itself.\n\
         - By whom preflights were answered is what preflightd counts. A slice of which it has not answered {:.0} % as it \
         should ends the run, as do a wrong answer, none for {} ms, and a connection that is reset.\n\
         - {} rounds in shuffled order, slices of {} ms; medians over rounds, ratios taken within rounds, bounds by order \
         statistics. {} slices{noise}, {} of them thrown away because other work took more than {:.0} % of a CPU meanwhile (each \
         is tried {ATTEMPTS} times).\n\n",
        table.markdown(),
        scene.lab.cpus.server,
        scene.lab.cpus.client,
        SHARE * 100.0,
        LOST.as_millis(),
        arguments.rounds,
        arguments.slice,
        rounds.slices,
        rounds.discarded,
        TOLERATED * 100.0,
    )
}

/// Who answers a realistic mix: adds its figures, and returns its chapter of the report.
fn answered_mix(
    arguments: &Arguments,
    lab: &Lab,
    clients: &Netns,
    figures: &mut Vec<Figure>,
) -> io::Result<String> {
    eprintln!("the mix");
    let node = lab.serve(&Serving::mixed(), Variant::Steer, MIX, clients, 0)?;
    wait_for(&node, clients, "kernel", &mix::sample())?;
    let before = node.metrics()?;
    let visits = arguments.preflights.div_ceil(arguments.per_connection.max(1));
    let visited = clients
        .enter(|| share::visit(node.address, &node.sources, visits, arguments.per_connection.max(1)))?;
    thread::sleep(COUNTED);
    let after = node.metrics()?;
    let counted = |name, labels: &[_]| after.count(name, labels) - before.count(name, labels);
    let answered = |tier| counted("preflightd_requests_total", &[("outcome", "allowed"), ("tier", tier)]);
    let (kernel, worker) = (answered("kernel"), answered("worker"));
    let again = counted("preflightd_steer_events_total", &[("event", "kernel_answer_again")]);
    if visited.asked == 0 || visited.wrong + visited.failed > 0 {
        return Err(io::Error::other(format!(
            "of {} preflights of the mix {} were answered wrongly and {} not at all",
            visited.asked, visited.wrong, visited.failed
        )));
    }
    let proxy = visited.asked.checked_sub(kernel + worker).ok_or_else(|| {
        io::Error::other(format!(
            "preflightd says to have answered {kernel} in the kernel and {worker} by its worker, of {} preflights",
            visited.asked
        ))
    })?;
    let mut table = Table::new(["", "preflights", "share, %"]);
    let all = visited.asked as f64;
    for (who, count) in [
        ("in the kernel", kernel),
        ("by the worker", worker),
        ("by nginx", proxy),
        ("all", visited.asked),
        ("answers that the kernel has sent again", again),
    ] {
        table.row([who.into(), count.to_string(), format!("{:.3}", 100.0 * count as f64 / all)]);
    }
    let mut figure = |name: &str, value: f64, unit| {
        figures.push(Figure { name: name.into(), estimate: value.into(), unit, peer: "" });
    };
    figure("hit_rate", kernel as f64 / all, "ratio");
    figure("mix_preflights", all, "preflights");
    figure("mix_by_worker", worker as f64, "preflights");
    figure("mix_by_proxy", proxy as f64, "preflights");
    figure("mix_wrong", visited.wrong as f64, "preflights");
    figure("mix_failed", visited.failed as f64, "preflights");
    Ok(format!(
        "## A realistic mix\n\n{}\n\
         - {} routes ({} hosts, {} path prefixes each) with a policy each, in the native dialect: {} exact origins of its own \
         and {}, methods and headers listed, with credentials.\n\
         - {} preflights on each connection, which the client then closes; one after the other, each of another host, route, \
         path with a number, method, header list and browser. {} % come from preview origins, nearly each from another one. \
         Nothing is warmed up but by one preflight.\n\
         - What preflightd does not count among its answers was nginx's. A right answer is a 204 with which a browser lets the \
         script go on: origin, credentials, method and every header. A wrong one ends the run, as does none.\n",
        table.markdown(),
        mix::HOSTS * mix::PREFIXES.len(),
        mix::HOSTS,
        mix::PREFIXES.len(),
        mix::ORIGINS,
        mix::PREVIEWS,
        arguments.per_connection,
        mix::PREVIEWS_PERCENT,
    ))
}
