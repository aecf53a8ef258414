//! What one decision costs: nanoseconds on tables of many sizes, hostile header lists, head parsing, compile time, memory.
#![expect(clippy::cast_precision_loss, reason = "counts and nanoseconds of one run are far below 2^52")]

use clap::Parser;
use preflightd::{
    http::{Head, HeadLimits, HeadReader},
    policy::{Connection, Decision, Outcome, Table},
};
use preflightd_benches::{
    acrh,
    cpu::{self, Cpus},
    policies::{self, Combination, HEADERS, Size},
    process::{CpuTime, resident},
    report::{self, Figure},
    rounds::{self, ATTEMPTS, Rounds, Slice, TOLERATED},
    stats::Estimate,
    workload::REQUEST_LEN,
};
use rustix::time::{ClockId, clock_gettime};
use std::{
    alloc::{GlobalAlloc, Layout, System},
    hint::black_box,
    io,
    process::{self, ExitCode},
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    time::{Duration, Instant},
};

const ROUNDS: usize = 30;
/// Different preflights in rotation, so that no decision finds its policy in the first-level cache by itself.
const DIFFERENT: usize = 4096;
const BATCH: Duration = Duration::from_millis(20);
const ASKED: &[&[u8]] = &[b"authorization,content-type"];
const DATE: &[u8; 29] = b"Sun, 06 Nov 1994 08:49:37 GMT";
const LIMITS: HeadLimits = HeadLimits { max_bytes: 8 * 1024 };
const HOSTILE: usize = 16 * 1024;

/// Flat in hosts and origins, linear in a header list's length.
const RATIOS: [(&str, &str, &str); 4] = [
    ("decide_10000_hosts_vs_10", "decide_ns_10000x10x5", "decide_ns_10x10x5"),
    ("decide_5000_origins_vs_5", "decide_ns_100x1x5000", "decide_ns_100x1x5"),
    ("acrh_16k_vs_4k", "acrh_16k_us_listed", "acrh_4k_us_listed"),
    ("acrh_16k_vs_4k_echo", "acrh_16k_us_echo", "acrh_4k_us_echo"),
];

/// Nanoseconds of `decide` and of head parsing, compile time and memory of large tables.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench decide")]
struct Arguments {
    /// Rounds; results are written to benches/results with 30 or more.
    #[arg(long, default_value_t = ROUNDS)]
    rounds: usize,
    /// JSON lines on stdout instead of tables.
    #[arg(long)]
    json: bool,
    /// Keep batches that other work disturbed: for trying things out; nothing is written.
    #[arg(long)]
    accept_noise: bool,
    /// Only these figures, such as `decide_ns_1000x10x50`; nothing is written.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench decide: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> io::Result<()> {
    cpu::pin(Cpus::choose()?.server)?;
    // First, while the heap is empty, so that memory is this table's alone.
    let mut once = compile(Size { hosts: 10_000, routes: 10, origins: 5 })?;
    let mut subjects = subjects();
    if !arguments.only.is_empty() {
        subjects.retain(|subject| arguments.only.iter().any(|only| only == subject.name));
    }
    let names: Vec<usize> = (0..subjects.len()).collect();
    let rounds = Rounds::run(
        &names,
        arguments.rounds,
        rounds::tolerated(arguments.accept_noise),
        |round| eprintln!("round {} of {}", round + 1, arguments.rounds),
        |number| batch(&mut subjects[number]),
    )?;

    let mut figures = Vec::new();
    for (number, subject) in subjects.iter().enumerate() {
        if let Some(estimate) = rounds.estimate(number, |time| time / subject.unit.nanoseconds()) {
            figures.push(Figure { name: subject.name.into(), estimate, unit: subject.unit.name(), peer: "" });
        }
    }
    let mut ratios = 0;
    for (name, of, to) in RATIOS {
        let number = |name| subjects.iter().position(|subject| subject.name == name);
        let (Some(of), Some(to)) = (number(of), number(to)) else { continue };
        ratios += 1;
        if let Some(estimate) = rounds.ratio(of, to, |time| *time) {
            figures.push(Figure { name: name.into(), estimate, unit: "ratio", peer: "itself" });
        }
    }
    let missing = subjects.len() + ratios - figures.len();
    figures.append(&mut once);

    let noise = if arguments.accept_noise { ", **disturbed ones included**" } else { "" };
    let report = format!(
        "# Deciding\n\n{}\n\n{}\n\
         - `decide_ns_HxRxO`: H hosts with R routes each, every route with a policy of its own with O exact origins; one decision, \
         without rendering the answer, over {DIFFERENT} different allowed preflights in rotation.\n\
         - `head_ns`: finding, parsing and judging the {REQUEST_LEN} B head of a Chrome preflight. `render_ns`: writing the answer.\n\
         - `acrh_16k_us_…`: decision and answer for 16 KiB of hostile `Access-Control-Request-Headers`, the slowest of {} kinds, \
         where the policy lists its headers and where it echoes them.\n\
         - Each batch is preceded by a quarter of one that is not counted, so that caches are as this subject alone leaves them.\n\
         - No allocation happened in any of them: each batch counts.\n\
         - {} rounds in shuffled order; {} batches{noise}, {} of them thrown away because this thread had to wait for its CPU for more \
         than {:.0} % of the time (each is tried {ATTEMPTS} times).\n",
        report::provenance("cargo xtask bench decide")?,
        report::figures(&figures),
        acrh::hostile(HEADERS[0], 1).len(),
        arguments.rounds,
        rounds.slices,
        rounds.discarded,
        TOLERATED * 100.0,
    );
    report::print(arguments.json, &figures, &report);
    if missing > 0 {
        return Err(io::Error::other(
            "other work kept disturbing this machine: run this again when it is quiet",
        ));
    }
    if arguments.rounds >= ROUNDS && !arguments.accept_noise && arguments.only.is_empty() {
        report::save("decide.md", &report)?;
    } else {
        eprintln!("not written to benches/results: that takes {ROUNDS} undisturbed rounds");
    }
    Ok(())
}

/// Something that is measured again and again.
struct Subject {
    name: &'static str,
    unit: Unit,
    /// Does it so many times.
    repeat: Box<dyn FnMut(usize)>,
    /// How many fill a batch.
    count: usize,
}

#[derive(Clone, Copy)]
enum Unit {
    Nanoseconds,
    Microseconds,
}

impl Unit {
    fn name(self) -> &'static str {
        match self {
            Self::Nanoseconds => "ns",
            Self::Microseconds => "us",
        }
    }

    fn nanoseconds(self) -> f64 {
        match self {
            Self::Nanoseconds => 1.0,
            Self::Microseconds => 1e3,
        }
    }
}

impl Subject {
    fn new(name: &'static str, unit: Unit, repeat: impl FnMut(usize) + 'static) -> Self {
        let mut subject = Self { name, unit, repeat: Box::new(repeat), count: 16 };
        while subject.batch().1 < BATCH {
            subject.count *= 2;
        }
        subject
    }

    /// CPU nanoseconds of one, and those of the whole batch: what other threads take in between does not count. A quarter
    /// of a batch goes before and is not counted: what other subjects have pushed out of the caches comes back.
    fn batch(&mut self) -> (f64, Duration) {
        (self.repeat)(self.count / 4);
        let begin = cpu_time();
        (self.repeat)(self.count);
        let elapsed = cpu_time().saturating_sub(begin);
        (elapsed.as_nanos() as f64 / self.count as f64, elapsed)
    }
}

/// Of this thread, exact to the nanosecond.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

fn subjects() -> Vec<Subject> {
    let size = |hosts, routes, origins| Size { hosts, routes, origins };
    let mut subjects = vec![
        deciding("decide_ns_1000x10x50", Size::LARGE),
        deciding("decide_ns_10x10x5", size(10, 10, 5)),
        deciding("decide_ns_100x10x5", size(100, 10, 5)),
        deciding("decide_ns_1000x10x5", size(1000, 10, 5)),
        deciding("decide_ns_10000x10x5", size(10_000, 10, 5)),
        deciding("decide_ns_100x1x5", size(100, 1, 5)),
        deciding("decide_ns_100x1x500", size(100, 1, 500)),
        deciding("decide_ns_100x1x5000", size(100, 1, 5000)),
        rendering(),
        reading(),
    ];
    let listed = || policies::table(&policies::specs(Size::SMALL));
    let echoing = || policies::table(&policies::echoing());
    subjects.extend(facing_hostile_headers("acrh_16k_us_listed", "acrh_4k_us_listed", listed));
    subjects.extend(facing_hostile_headers("acrh_16k_us_echo", "acrh_4k_us_echo", echoing));
    subjects
}

fn deciding(name: &'static str, size: Size) -> Subject {
    let table = policies::table(&policies::specs(size));
    let mut next = rotation(size);
    Subject::new(name, Unit::Nanoseconds, move |count| {
        for _ in 0..count {
            let preflight = policies::preflight(next(), ASKED);
            let Decision::Answer(answer) = table.decide(black_box(&preflight)) else {
                panic!("{name}: a preflight was not answered")
            };
            assert!(answer.outcome == Outcome::Allowed, "{name}: {:?}", answer.outcome);
        }
    })
}

/// Different allowed preflights, over and over.
fn rotation(size: Size) -> impl FnMut() -> &'static Combination {
    let all: &'static [Combination] = policies::combinations(size, DIFFERENT).collect::<Vec<_>>().leak();
    let mut next = 0;
    move || {
        next = (next + 1) % all.len();
        &all[next]
    }
}

fn rendering() -> Subject {
    let table = policies::table(&policies::specs(Size::SMALL));
    let mut next = rotation(Size::SMALL);
    let mut out = Vec::with_capacity(64 << 10);
    Subject::new("render_ns", Unit::Nanoseconds, move |count| {
        let preflight = policies::preflight(next(), ASKED);
        let Decision::Answer(answer) = table.decide(&preflight) else {
            panic!("rendering: a preflight was not answered")
        };
        for _ in 0..count {
            out.clear();
            black_box(&answer).render(DATE, Connection::KeepAlive, &mut out);
            black_box(&out);
        }
    })
}

fn reading() -> Subject {
    let requests = policies::requests(Size::LARGE, DIFFERENT);
    let mut next = 0;
    Subject::new("head_ns", Unit::Nanoseconds, move |count| {
        for _ in 0..count {
            next = (next + 1) % requests.len();
            let head = HeadReader::new().read(black_box(&requests[next].keep_alive), LIMITS);
            assert!(matches!(head, Head::Preflight(_)), "reading: {head:?}");
        }
    })
}

/// Two lengths of hostile header lists, of each the slowest kind.
fn facing_hostile_headers(
    long: &'static str,
    short: &'static str,
    table: impl Fn() -> Table,
) -> [Subject; 2] {
    let slowest = |name, length| {
        acrh::hostile(HEADERS[0], length)
            .into_iter()
            .map(|(_, value)| {
                let mut subject = facing(name, table(), value);
                (subject.batch().0, subject)
            })
            .max_by(|(one, _), (other, _)| one.total_cmp(other))
            .expect("there are kinds")
            .1
    };
    [slowest(long, HOSTILE), slowest(short, HOSTILE / 4)]
}

fn facing(name: &'static str, table: Table, value: Vec<u8>) -> Subject {
    let mut next = rotation(Size { origins: 1, ..Size::SMALL });
    let mut out = Vec::with_capacity(64 << 10);
    Subject::new(name, Unit::Microseconds, move |count| {
        for _ in 0..count {
            let lines = [value.as_slice()];
            let preflight = policies::preflight(next(), &lines);
            if let Decision::Answer(answer) = table.decide(black_box(&preflight)) {
                out.clear();
                answer.render(DATE, Connection::KeepAlive, &mut out);
                black_box(&out);
            }
        }
    })
}

fn batch(subject: &mut Subject) -> io::Result<Slice<f64>> {
    let before = (CpuTime::of(process::id())?, ALLOCATIONS.load(Relaxed));
    let (nanoseconds, elapsed) = subject.batch();
    let allocations = ALLOCATIONS.load(Relaxed) - before.1;
    let waited = CpuTime::of(process::id())?.since(before.0).waiting;
    // Reading the CPU time allocates, after the count was taken.
    if allocations > 0 {
        return Err(io::Error::other(format!("{}: {allocations} allocations", subject.name)));
    }
    Ok(Slice::new(nanoseconds, Duration::from_nanos(waited), elapsed))
}

/// Compile time and memory of a table of that size, which is dropped.
fn compile(size: Size) -> io::Result<Vec<Figure>> {
    let specs = policies::specs(size);
    eprintln!("compiling {} policies", specs.len());
    let (mut seconds, mut heap, mut memory) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..5 {
        let before = (LIVE.load(Relaxed), resident(process::id())?);
        let begin = Instant::now();
        let table = policies::table(&specs);
        seconds.push(begin.elapsed().as_secs_f64());
        heap.push((LIVE.load(Relaxed) - before.0) as f64 / MIB);
        memory.push(resident(process::id())?.saturating_sub(before.1) as f64 / MIB);
        assert_eq!(table.policies(), specs.len());
    }
    // Only the first had to ask the kernel for memory; its specs came before.
    memory.truncate(1);
    let figure = |name: &'static str, values: Vec<f64>, unit| {
        Estimate::of(values).map(|estimate| Figure { name: name.into(), estimate, unit, peer: "" })
    };
    Ok([
        figure("compile_s_100000_policies", seconds, "s"),
        figure("table_heap_mib_100000_policies", heap, "MiB"),
        figure("table_rss_mib_100000_policies", memory, "MiB"),
    ]
    .into_iter()
    .flatten()
    .collect())
}

const MIB: f64 = 1_048_576.0;

/// Calls that asked for memory, and bytes in use.
static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);
static LIVE: AtomicUsize = AtomicUsize::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The system's allocator, counted.
struct Counting;

// SAFETY: every call goes to the system's allocator with the caller's arguments; counting touches no memory but two atomics.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Relaxed);
        LIVE.fetch_add(layout.size(), Relaxed);
        // SAFETY: the caller keeps the contract of `alloc`, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller keeps the contract of `dealloc`, and the pointer came from `System`.
        unsafe { System.dealloc(pointer, layout) }
    }
}
