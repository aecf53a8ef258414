//! What runs where the client is: the load, the live display, the exchanges by curl.
#![forbid(unsafe_code)]

use crate::{Fallible, load::Seen, scene::POLICY};
use preflightd_tests::{client::fetch, daemon::Metrics};
use std::{
    fs,
    io::{self, IsTerminal, Write as _},
    net::SocketAddr,
    path::PathBuf,
    process::Command,
    thread,
    time::{Duration, Instant},
};

#[derive(clap::Args)]
pub(crate) struct Scene {
    /// Where everything is, in words
    #[arg(long)]
    place: String,
    /// What to put before a command that shall run where the client is
    #[arg(long)]
    prefix: String,
    #[arg(long)]
    site: SocketAddr,
    #[arg(long)]
    admin: SocketAddr,
    #[arg(long)]
    daemon_pid: u32,
    #[arg(long)]
    nginx_pid: u32,
    #[arg(long)]
    seconds: u64,
    #[arg(long)]
    stay: bool,
    #[arg(long)]
    preflightd: PathBuf,
    #[arg(long)]
    config: PathBuf,
    /// The daemon steers, and pins here
    #[arg(long)]
    pin_dir: Option<PathBuf>,
}

impl Scene {
    fn is_steered(&self) -> bool {
        self.pin_dir.is_some()
    }
}

pub(crate) fn run(scene: &Scene) -> Fallible<()> {
    wait_ready(scene)?;
    println!("{}", scene.place);
    if scene.is_steered() {
        println!("The site is nginx's own {}; preflightd has this policy:\n", scene.site);
    } else {
        println!("preflightd on {}, nginx behind it, with this policy:\n", scene.site);
    }
    for line in POLICY.lines() {
        println!("    {line}");
    }
    println!("\nA mixed load for {} s: preflights (some denied), and requests for nginx.\n", scene.seconds);
    load(scene)?;
    println!("\nThe same by hand:");
    exchanges(scene)?;
    what_next(scene);
    if scene.stay {
        println!("\nStays until Ctrl-C.");
        loop {
            thread::park();
        }
    }
    Ok(())
}

fn wait_ready(scene: &Scene) -> Fallible<()> {
    let end = Instant::now() + Duration::from_secs(15);
    while !fetch(scene.admin, "/readyz").is_ok_and(|r| r.status == 200) {
        if Instant::now() > end {
            return Err("preflightd is not ready after 15 s".to_owned());
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Runs the load and shows it once a second.
fn load(scene: &Scene) -> Fallible<()> {
    let seen = Seen::default();
    let mut screen = Screen::new();
    let outcome = thread::scope(|scope| {
        seen.start(scope, scene.site);
        let outcome = watch(scene, &seen, &mut screen);
        seen.stop();
        outcome
    });
    outcome?;
    match seen.failed() {
        0 => Ok(()),
        n => Err(format!("{n} requests were not answered as they should be")),
    }
}

fn watch(scene: &Scene, seen: &Seen, screen: &mut Screen) -> Fallible<()> {
    let start = Instant::now();
    let first = Totals::read(scene, seen)?;
    let mut last = first;
    let mut all = Vec::new();
    for second in 1..=scene.seconds {
        let due = start + Duration::from_secs(second);
        thread::sleep(due.saturating_duration_since(Instant::now()));
        let now = Totals::read(scene, seen)?;
        let latencies = seen.take();
        let title = format!("{second:>3} of {} s", scene.seconds);
        screen.frame(&Frame::new(scene, title, &last, &now, latencies.clone(), seen.failed()));
        all.extend(latencies);
        last = now;
    }
    screen.last(&Frame::new(scene, "altogether".to_owned(), &first, &last, all, seen.failed()));
    Ok(())
}

/// Counters at one moment.
#[derive(Clone, Copy)]
struct Totals {
    at: Instant,
    allowed: u64,
    denied: u64,
    passed: u64,
    preflights_passed: u64,
    /// Of the answers, those of the kernel.
    by_kernel: u64,
    /// Steered: connections that the kernel or workers answered on, that nginx got, that were left to the kernel's own
    /// handshake, and the state.
    to_us: u64,
    to_proxy: u64,
    left: u64,
    state: &'static str,
    daemon_cpu: Duration,
    nginx_cpu: Duration,
}

impl Totals {
    fn read(scene: &Scene, seen: &Seen) -> Fallible<Self> {
        let response = fetch(scene.admin, "/metrics").map_err(|e| format!("reading the metrics: {e}"))?;
        let metrics = Metrics::parse(&String::from_utf8_lossy(&response.body));
        let count = |outcome: &str| metrics.count("preflightd_requests_total", &[("outcome", outcome)]);
        let kernel = [("tier", "kernel")];
        let flows = |to: &str| metrics.count("preflightd_steer_flows_total", &[("to", to)]);
        let is = |state: &&str| metrics.count("preflightd_steer_state", &[("state", *state)]) == 1;
        Ok(Self {
            at: Instant::now(),
            allowed: count("allowed"),
            denied: count("denied"),
            // Seen from the client: the daemon counts a relayed connection once, whatever follows on it.
            passed: seen.passed(),
            preflights_passed: seen.preflights_passed(),
            by_kernel: metrics.count("preflightd_requests_total", &kernel),
            to_us: flows("kernel") + flows("worker"),
            to_proxy: flows("proxy"),
            left: metrics.count("preflightd_steer_fail_open_total", &[]),
            state: ["steering", "observing", "off", "replaced"].into_iter().find(is).unwrap_or_default(),
            daemon_cpu: cpu(scene.daemon_pid),
            nginx_cpu: cpu(scene.nginx_pid),
        })
    }
}

/// CPU time of a process, its threads and its children, by the scheduler's own nanoseconds.
fn cpu(pid: u32) -> Duration {
    let mut total = Duration::ZERO;
    for thread in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let schedstat = fs::read_to_string(thread.path().join("schedstat")).unwrap_or_default();
        let nanoseconds = schedstat.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0);
        total += Duration::from_nanos(nanoseconds);
        let children = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        total += children.split_whitespace().filter_map(|pid| pid.parse().ok()).map(cpu).sum::<Duration>();
    }
    total
}

/// What is shown of a stretch of time.
struct Frame {
    title: String,
    seconds: f64,
    allowed: f64,
    denied: f64,
    passed: f64,
    steered: Option<Steered>,
    p50: u64,
    p99: u64,
    daemon_cpu: f64,
    nginx_cpu: f64,
    failed: u64,
}

/// What is shown of steering.
struct Steered {
    state: &'static str,
    to_us: f64,
    by_kernel: f64,
    to_nginx: f64,
    left: f64,
    preflights_passed: f64,
}

impl Frame {
    fn new(
        scene: &Scene,
        title: String,
        from: &Totals,
        to: &Totals,
        mut latencies: Vec<u64>,
        failed: u64,
    ) -> Self {
        latencies.sort_unstable();
        let quantile = |q: usize| latencies.get(latencies.len() * q / 100).map_or(0, |ns| ns / 1000);
        let seconds = to.at.duration_since(from.at).as_secs_f64();
        Self {
            title,
            seconds,
            allowed: difference(from.allowed, to.allowed),
            denied: difference(from.denied, to.denied),
            passed: difference(from.passed, to.passed),
            steered: scene.is_steered().then(|| Steered {
                state: to.state,
                to_us: difference(from.to_us, to.to_us),
                by_kernel: difference(from.by_kernel, to.by_kernel),
                to_nginx: difference(from.to_proxy + from.left, to.to_proxy + to.left),
                left: difference(from.left, to.left),
                preflights_passed: difference(from.preflights_passed, to.preflights_passed),
            }),
            p50: quantile(50),
            p99: quantile(99),
            daemon_cpu: (to.daemon_cpu.saturating_sub(from.daemon_cpu)).as_secs_f64(),
            nginx_cpu: (to.nginx_cpu.saturating_sub(from.nginx_cpu)).as_secs_f64(),
            failed,
        }
    }

    fn line(&self) -> String {
        let steered = self.steered.as_ref().map_or_else(String::new, |steered| {
            format!(
                "  {}  connections to preflightd {:.0}/s to nginx {:.0}/s  preflights by the kernel {:.0}/s by nginx {:.0}/s",
                steered.state,
                steered.to_us / self.seconds,
                steered.to_nginx / self.seconds,
                steered.by_kernel / self.seconds,
                steered.preflights_passed / self.seconds,
            )
        });
        format!(
            "{}{steered}  answered {:.0}/s ({:.0} denied)  passed {:.0}/s  p50 {} µs  p99 {} µs  CPU preflightd {:.1} % \
             nginx {:.1} %  failed {}",
            self.title,
            (self.allowed + self.denied) / self.seconds,
            self.denied / self.seconds,
            self.passed / self.seconds,
            self.p50,
            self.p99,
            100.0 * self.daemon_cpu / self.seconds,
            100.0 * self.nginx_cpu / self.seconds,
            self.failed,
        )
    }

    fn block(&self) -> Vec<String> {
        let rate = |n: f64| format!("{:>7.0} /s", n / self.seconds);
        let short = |n: f64| rate(n).trim().to_owned();
        let mut lines = vec![format!("  {}", self.title)];
        let by_kernel = self.steered.as_ref().map_or_else(
            || " by workers".to_owned(),
            |steered| format!(", {} of them by the kernel", short(steered.by_kernel)),
        );
        let passed = match &self.steered {
            None => "to nginx, byte for byte".to_owned(),
            Some(steered) => {
                lines.push(format!("  state      {}", steered.state));
                lines.push(format!(
                    "  opened     {}   connections for preflightd; for nginx {}, of which {} by the kernel's own handshake",
                    rate(steered.to_us),
                    short(steered.to_nginx),
                    short(steered.left),
                ));
                format!("by nginx itself; and preflights {}", short(steered.preflights_passed))
            }
        };
        lines.extend([
            format!(
                "  answered   {}   preflights{by_kernel}: allowed {}, denied {}",
                rate(self.allowed + self.denied),
                short(self.allowed),
                short(self.denied)
            ),
            format!("  passed     {}   {passed}", rate(self.passed)),
            format!("  latency    {:>7} µs   p50 of a preflight; p99 {} µs", self.p50, self.p99),
            format!(
                "  CPU        {:>7.1} %    of one core for preflightd's process; nginx {:.1} %",
                100.0 * self.daemon_cpu / self.seconds,
                100.0 * self.nginx_cpu / self.seconds
            ),
            format!("  failed     {:>7}", self.failed),
        ]);
        lines
    }
}

#[expect(clippy::cast_precision_loss, reason = "no demo counts to 2^52")]
fn difference(from: u64, to: u64) -> f64 {
    to.saturating_sub(from) as f64
}

/// A block that is drawn over on a terminal, lines elsewhere.
struct Screen {
    terminal: bool,
    drawn: usize,
}

impl Screen {
    fn new() -> Self {
        Self { terminal: io::stdout().is_terminal(), drawn: 0 }
    }

    fn frame(&mut self, frame: &Frame) {
        if !self.terminal {
            println!("{}", frame.line());
            return;
        }
        let block = frame.block();
        let mut out = io::stdout().lock();
        if self.drawn > 0 {
            // To the first column, that many lines up, and clear from there.
            let _ = write!(out, "\x1b[{}F\x1b[J", self.drawn);
        }
        for line in &block {
            let _ = writeln!(out, "{line}");
        }
        let _ = out.flush();
        self.drawn = block.len();
    }

    fn last(&mut self, frame: &Frame) {
        self.frame(frame);
        self.drawn = 0;
    }
}

/// A few exchanges by curl, each with its command.
fn exchanges(scene: &Scene) -> Fallible<()> {
    let url = format!("http://{}/v1/cart", scene.site);
    let preflight = |origin: &str| {
        ["-i", "-X", "OPTIONS", &url, "-H", "Host: api.example.com", "-H", &format!("Origin: {origin}"), "-H"]
            .map(str::to_owned)
            .into_iter()
            .chain(["Access-Control-Request-Method: PUT".to_owned()])
            .collect::<Vec<_>>()
    };
    let get = ["-i", &url, "-H", "Host: api.example.com", "-H", "Origin: https://shop.example.com"];
    for (title, arguments, wanted) in [
        ("A preflight that is allowed", preflight("https://shop.example.com"), "204"),
        ("One from elsewhere", preflight("https://evil.example"), "403"),
        ("The request itself goes to nginx, with the client's address", get.map(str::to_owned).into(), "200"),
    ] {
        println!("\n# {title}");
        println!("$ curl {}", arguments.iter().map(|a| quote(a)).collect::<Vec<_>>().join(" "));
        let output = Command::new("curl")
            .args(["--silent", "--show-error", "--max-time", "10"])
            .args(&arguments)
            .output()
            .map_err(|e| format!("running curl: {e}"))?;
        let said = String::from_utf8_lossy(&output.stdout).replace('\r', "");
        println!("{}", said.trim_end());
        if !output.status.success() || said.split(' ').nth(1) != Some(wanted) {
            let error = String::from_utf8_lossy(&output.stderr);
            return Err(format!("curl was expected to get {wanted}: {}", error.trim()));
        }
    }
    explain(scene)
}

/// The daemon's own account of the second one.
fn explain(scene: &Scene) -> Fallible<()> {
    let arguments =
        ["--url", "http://api.example.com/v1/cart", "--origin", "https://evil.example", "--method", "PUT"];
    println!("\n# Why was the second one denied?");
    println!("$ preflightd explain --config preflightd.toml {}", arguments.join(" "));
    let output = Command::new(&scene.preflightd)
        .args(["explain", "--config"])
        .arg(&scene.config)
        .args(arguments)
        .output()
        .map_err(|e| format!("running preflightd explain: {e}"))?;
    println!("{}", String::from_utf8_lossy(&output.stdout).trim_end());
    // 1 is a finding: the request is denied.
    if output.status.code() == Some(1) {
        return Ok(());
    }
    Err(format!("explain: {} {}", output.status, String::from_utf8_lossy(&output.stderr).trim()))
}

fn quote(argument: &str) -> String {
    if argument.contains([' ', '*', '&']) { format!("'{argument}'") } else { argument.to_owned() }
}

fn what_next(scene: &Scene) {
    println!("\nWhat to try next:");
    println!(
        "  cargo xtask demo --stay      the same, and it stays until Ctrl-C, to be asked and changed by hand"
    );
    if scene.stay {
        println!("    {}curl http://{}/metrics", scene.prefix, scene.admin);
        println!("    {}curl -i -X OPTIONS http://{}/v1/cart -H …", scene.prefix, scene.site);
        if let Some(pin_dir) = &scene.pin_dir {
            let preflightd = scene.preflightd.display();
            println!(
                "    {preflightd} detach --pin-dir {}      puts steering out: nginx serves everything",
                pin_dir.display()
            );
        }
        println!("    edit {}: what changes in its policies is in force at once", scene.config.display());
    }
    println!(
        "  target/release/preflightd probe --port 80   whether this machine can steer, and what to do if not"
    );
    println!("  target/release/preflightd check FILE        what is wrong or doubtful in a configuration");
    println!("  target/release/preflightd explain --help    why a preflight is answered or passed");
    println!("  cargo xtask bench answer     what a preflight costs, beside nginx and others");
}
