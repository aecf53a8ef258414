//! `preflightd run`: the control thread.
//!
//! It starts the others, watches files and signals, brings new policies to the workers, and shows what happens. No
//! request passes through it. A worker or relay thread that ends takes the process down: half a daemon loses
//! connections in silence.

use super::{Engine, Failure, ProxyProtocol, Run, log, steer::Steered};
use crate::{
    ask::{self, Asker},
    config::{self, Config, Diagnostic, Listener, Loaded, Watch},
    explain::{self, Sources},
    policy::{ListenerId, PolicySpec, RouteLabels, Table, labels::RouteLabel, learned::Answers},
    publish::Publisher,
    reason::PassReason,
    relay::{self, Relay, Ways},
    sources::kubernetes::State,
    telemetry::{
        RelayStats, ReloadResult, Running, Status, WorkerStats,
        admin::{self, AdminSocket},
    },
    worker::{EngineChoice, Serves, WorkerListener, WorkerSetup, Workers, listen},
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::{
    io,
    net::{SocketAddr, TcpListener},
    os::fd::OwnedFd,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
    task::{JoinError, JoinHandle},
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};
use tracing::{debug, error, info, warn};

/// How often what comes back from the workers is freed, and the threads are looked after.
const TICK: Duration = Duration::from_millis(200);
/// A packet that was given to a worker is surely in its queue by then.
const IN_FLIGHT: Duration = Duration::from_millis(10);
/// Descriptors beside those of connections.
const SPARE_DESCRIPTORS: u64 = 256;

pub(super) fn run(args: &Run) -> Result<(), Failure> {
    let mut files = Files::new(args);
    let mut labels = RouteLabels::new(config::Admin::default().max_routes);
    let mut loaded = files.load().map_err(|e| Failure::Usage(e.to_string()))?;
    let table = loaded.config.as_ref().map(Config::listener_specs).and_then(|specs| {
        if let Some(config) = &loaded.config {
            labels = RouteLabels::new(config.admin.max_routes);
        }
        loaded.compile(&specs, &mut labels, 1)
    });
    let (Some(table), Some(config)) = (table, loaded.config.clone()) else {
        for finding in &loaded.diagnostics {
            anstream::eprintln!("{finding}");
        }
        return Err(Failure::Failed("the configuration has errors: nothing was started".to_owned()));
    };
    let config = files.overridden(config);
    let learned = ask::nothing_yet(&config, &mut labels);
    let table = table.with_learned(table.generation(), learned);
    log::init(&config.log, args.log_level.as_deref())?;
    log_findings(&loaded.diagnostics);
    files.paths.clone_from(&loaded.files);
    loaded.config = Some(config.clone());

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::Failed(format!("cannot start the control thread's runtime: {e}")))?;
    let work = Work { labels, files: loaded };
    let ended = runtime.block_on(control(files, config, table, work));
    // A reload that still compiles must not hold up the end.
    runtime.shutdown_background();
    ended.map_err(|e| {
        error!("{e}");
        Failure::Findings
    })
}

/// Where the configuration comes from.
#[derive(Clone, Debug)]
struct Files {
    from: From,
    workers: Option<u16>,
    engine: Option<EngineChoice>,
    mode: Option<config::SteerMode>,
    shadow: bool,
    admin: Option<SocketAddr>,
    admin_socket: Option<PathBuf>,
    log_format: Option<config::LogFormat>,
    kubernetes: bool,
    /// What was read the last time.
    paths: Vec<PathBuf>,
}

#[derive(Clone, Debug)]
enum From {
    File(PathBuf),
    Arguments { listeners: Vec<Listener>, steer: config::Steer, policies: Vec<PathBuf> },
}

impl Files {
    fn new(args: &Run) -> Self {
        let mut listeners = Vec::new();
        for address in &args.steer {
            let name =
                if args.steer.len() == 1 { "web".to_owned() } else { format!("port-{}", address.port()) };
            listeners.push(Listener { steer: true, ..Listener::new(&name, *address, None) });
        }
        let from = match (args.listen, &args.config) {
            (Some(address), _) => {
                let proxy_protocol = match args.proxy_protocol {
                    ProxyProtocol::Auto => relay::ProxyProtocol::Auto,
                    ProxyProtocol::Off => relay::ProxyProtocol::Off,
                    ProxyProtocol::V1 => relay::ProxyProtocol::V1,
                    ProxyProtocol::V2 => relay::ProxyProtocol::V2,
                };
                let listener =
                    Listener { proxy_protocol, ..Listener::new("default", address, args.upstream) };
                listeners.insert(0, listener);
                Self::by_arguments(args, listeners)
            }
            (None, _) if !listeners.is_empty() => Self::by_arguments(args, listeners),
            (None, path) => From::File(path.clone().unwrap_or_default()),
        };
        Self {
            from,
            workers: args.workers,
            engine: args.engine.map(|engine| match engine {
                Engine::Auto => EngineChoice::Auto,
                Engine::IoUring => EngineChoice::IoUring,
                Engine::Epoll => EngineChoice::Epoll,
            }),
            mode: args.mode,
            shadow: args.shadow,
            admin: args.admin,
            admin_socket: args.admin_socket.clone(),
            log_format: args.log_format,
            kubernetes: args.kubernetes,
            paths: Vec::new(),
        }
    }

    fn by_arguments(args: &Run, listeners: Vec<Listener>) -> From {
        let steer = config::Steer {
            interfaces: args.interface.clone(),
            netns: args.netns.clone().unwrap_or_default(),
            ..config::Steer::default()
        };
        From::Arguments { listeners, steer, policies: args.policy.clone() }
    }

    fn load(&self) -> io::Result<Loaded> {
        match &self.from {
            From::File(path) => config::load(path),
            From::Arguments { listeners, steer, policies } => {
                let config = Config { steer: steer.clone(), ..Config::of_listeners(listeners.clone()) };
                config::load_policies(config, policies)
            }
        }
    }

    /// The configuration with what the command line says instead.
    fn overridden(&self, mut config: Config) -> Config {
        if let Some(count) = self.workers {
            config.workers.count = count.into();
        }
        if let Some(engine) = self.engine {
            config.workers.engine = engine;
        }
        if let Some(mode) = self.mode {
            config.steer.mode = mode;
        }
        config.shadow.enabled |= self.shadow;
        if self.admin.is_some() {
            config.admin.address = self.admin;
        }
        if self.admin_socket.is_some() {
            config.admin.socket.clone_from(&self.admin_socket);
        }
        if let Some(format) = self.log_format {
            config.log.format = format;
        }
        config.kubernetes.enabled |= self.kubernetes;
        config
    }
}

/// The signals that mean something to us.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    async fn next(&mut self) -> Told {
        tokio::select! {
            _ = self.terminate.recv() => Told::End("SIGTERM"),
            _ = self.interrupt.recv() => Told::End("SIGINT"),
            _ = self.hangup.recv() => Told::Reload,
        }
    }
}

fn on_signal(kind: SignalKind) -> io::Result<Signal> {
    signal(kind).map_err(|e| doing("listen for signals", &e))
}

/// What a signal says.
enum Told {
    End(&'static str),
    Reload,
}

async fn control(files: Files, config: Config, table: Table, work: Work) -> io::Result<()> {
    // First of all: to reload while starting is to start. SIGTERM may end us until all runs.
    let hangup = on_signal(SignalKind::hangup())?;
    let metrics = match config.admin.address {
        Some(address) => Some(admin::bind(address).await?),
        None => None,
    };
    let socket = config.admin.socket.as_deref().map(AdminSocket::bind).transpose()?;
    let grace = config.limits.shutdown_grace;
    let kubernetes = Kubernetes::start(&config)?;
    let (mut daemon, status) = Daemon::start(config, table, &work.labels)?;
    if let Some(state) = kubernetes.state() {
        status.set_kubernetes(state);
    }
    let mut signals = Signals {
        terminate: on_signal(SignalKind::terminate())?,
        interrupt: on_signal(SignalKind::interrupt())?,
        hangup,
    };

    let mut surfaces = Vec::new();
    if let Some(listener) = metrics {
        info!(address = %listener.local_addr()?, "metrics and health");
        surfaces.push(tokio::spawn(admin::serve(listener, status.clone())));
    }
    if let Some(socket) = socket {
        surfaces.push(tokio::spawn(socket.serve(status.clone())));
    }
    let learned = daemon.asker.as_ref().map(Asker::answers);
    let mut reloader = Reloader::new(files, work, status.clone(), kubernetes, learned);
    let mut interfaces = daemon.steered.watch()?;
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let ended = loop {
        tokio::select! {
            signal = signals.next() => match signal {
                Told::Reload => reloader.wanted("SIGHUP", true),
                Told::End(signal) => {
                    info!(signal, grace = ?grace, "draining: no new connections; a second signal ends at once");
                    break daemon.drain(grace, &status, &mut signals).await;
                }
            },
            reloaded = reloader.next() => if let Some(reloaded) = reloaded {
                daemon.publisher.publish(&reloaded.table);
                daemon.steered.reloaded(&reloaded.policies, &reloaded.table, reloaded.steer.as_ref());
            },
            () = interfaces.changed() => daemon.steered.changed(),
            _ = ticks.tick() => if let Err(e) = daemon.tick(&status).and_then(|()| reloader.is_well()) {
                break Err(e);
            }
        }
    };
    // Their sockets go with them.
    for surface in surfaces {
        surface.abort();
        let _ = surface.await;
    }
    ended
}

/// The threads that serve.
struct Daemon {
    publisher: Publisher,
    workers: Option<Workers>,
    relay: Option<Relay>,
    steered: Steered,
    /// `None`: the proxy is not asked.
    asker: Option<Asker>,
}

impl Daemon {
    fn start(config: Config, table: Table, labels: &RouteLabels) -> io::Result<(Self, Arc<Status>)> {
        raise_open_files(&config);
        let count = config.worker_count();
        let mut addresses = Vec::with_capacity(config.listeners.len());
        let mut sockets: Vec<Vec<WorkerListener>> = (0..count).map(|_| Vec::new()).collect();
        let mut steered = Steered::open(&config, count)?;
        for (worker, beside) in sockets.iter_mut().zip(steered.listen()?) {
            let beside = beside.into_iter();
            worker.extend(beside.map(|(id, socket)| WorkerListener {
                id,
                socket,
                serves: Serves::BesideProxy,
            }));
        }
        for (i, listener) in config.listeners.iter().enumerate() {
            if listener.steer {
                info!(listener = listener.name, proxy = %listener.address, "beside the proxy");
                addresses.push(listener.address);
                continue;
            }
            let (address, opened) = open(listener.address, count)?;
            info!(listener = listener.name, %address, upstream = ?listener.upstream, "listening");
            addresses.push(address);
            for (worker, socket) in sockets.iter_mut().zip(opened) {
                let id = ListenerId(i as u16);
                let serves = if listener.upstream.is_some() { Serves::BeforeProxy } else { Serves::Alone };
                worker.push(WorkerListener { id, socket, serves });
            }
        }

        let relay_stats = Arc::new(RelayStats::default());
        let ways = Ways { upstreams: config.upstreams(), turn_back: steered.turn_back() };
        let (relay, handles) = if ways.upstreams.is_empty() && ways.turn_back.is_none() {
            (None, Vec::new())
        } else {
            let (relay, handles) = Relay::start(ways, config.relay_limits(), count, relay_stats.clone())?;
            (Some(relay), handles)
        };

        let table = Arc::new(table);
        let learned = table.learned().cloned();
        let sources = explain::sources(&config.policies);
        let (publisher, subscribers) = Publisher::new(count, table.clone())?;
        let cpus = if config.workers.pin { cpus() } else { Vec::new() };
        if config.workers.pin && cpus.len() < count {
            warn!(workers = count, cpus = cpus.len(), "more workers than CPUs: not pinned");
        }
        let stats: Vec<_> = (0..count).map(|_| Arc::new(WorkerStats::new(labels.capacity()))).collect();
        let mut handles = handles.into_iter();
        let (asking, samplers) = ask::prepare(&config, count).unzip();
        let mut samplers = samplers.into_iter().flatten();
        let setups = sockets.into_iter().zip(subscribers).zip(&stats).enumerate();
        let setups = setups.map(|(index, ((listeners, tables), stats))| WorkerSetup {
            index,
            cpu: if cpus.len() < count { None } else { cpus.get(index).copied() },
            listeners,
            tables,
            relay: handles.next(),
            stats: stats.clone(),
            sampler: samplers.next(),
        });
        let workers = Workers::start(setups.collect(), config.workers.engine, config.connection_limits())?;
        steered.engage(&config.policies, &table)?;

        let running = Running::new(table, labels.all(), sources);
        info!(
            version = env!("CARGO_PKG_VERSION"),
            engine = workers.engine(),
            workers = count,
            policies = running.table.policies(),
            "started"
        );
        let backend = relay.as_ref().map(|relay| relay.backend().to_string()).unwrap_or_default();
        let status =
            Status::new(stats, relay_stats, config, addresses, workers.engine().to_owned(), backend, running);
        let status = Arc::new(status);
        let asker = match asking {
            Some(asking) => Some(asking.start(&status, learned.as_ref(), steered.shown())?),
            None => None,
        };
        Ok((Self { publisher, workers: Some(workers), relay, steered, asker }, status))
    }

    /// What must be done now and then.
    fn tick(&mut self, status: &Status) -> io::Result<()> {
        self.steered.tick(status);
        self.publisher.tick();
        let acknowledged = self.publisher.acknowledged();
        {
            let mut running = status.running();
            running.generations.clear();
            running.generations.extend(self.publisher.generations());
        }
        if !status.is_ready() && acknowledged >= 1 && self.steered.is_well() {
            status.set_ready();
            info!(generation = acknowledged, "ready");
        }
        let ended = if self.workers.as_ref().is_some_and(Workers::has_ended) {
            "worker"
        } else if self.relay.as_ref().is_some_and(Relay::has_ended) {
            "relay"
        } else if self.asker.as_ref().is_some_and(Asker::has_ended) {
            "asking"
        } else {
            return Ok(());
        };
        Err(io::Error::other(format!(
            "a {ended} thread has ended: the daemon ends, so that it can be started anew"
        )))
    }

    /// Stops accepting, lets connections end, ends the threads.
    async fn drain(mut self, grace: Duration, status: &Status, signals: &mut Signals) -> io::Result<()> {
        status.set_draining();
        // Threads look at their orders at once, and end a little after the grace.
        let latest = Instant::now() + grace + Duration::from_secs(5);
        let (workers, relay) = (self.workers.take(), self.relay.take());
        if let Some(asker) = &self.asker {
            asker.shutdown();
        }
        if self.steered.release() {
            // A packet may be on its way to a worker on another CPU.
            tokio::time::sleep(IN_FLIGHT).await;
        }
        if let Some(workers) = &workers {
            workers.shutdown(grace);
        }
        if let Some(relay) = &relay {
            relay.shutdown(grace);
        }
        let mut joined = tokio::task::spawn_blocking(move || {
            workers.map_or(Ok(()), Workers::join).and(relay.map_or(Ok(()), Relay::join))
        });
        let mut ticks = interval(TICK);
        loop {
            tokio::select! {
                result = &mut joined => {
                    info!("ended");
                    return result.unwrap_or_else(|e| Err(io::Error::other(e)));
                }
                signal = signals.next() => if let Told::End(signal) = signal {
                    return Err(io::Error::other(format!("a second signal ({signal}): ended with open connections")));
                },
                () = sleep_until(latest) => {
                    return Err(io::Error::other("the threads did not end in time: ended with open connections"));
                }
                // The workers go on taking and retiring tables.
                _ = ticks.tick() => { self.publisher.tick(); }
            }
        }
    }
}

/// Policies from the API server, if they are wanted.
struct Kubernetes {
    state: Option<watch::Receiver<Arc<State>>>,
    /// What was compiled last.
    revision: u64,
    #[cfg(feature = "kubernetes")]
    _source: Option<crate::sources::kubernetes::client::Source>,
}

impl Kubernetes {
    #[cfg(feature = "kubernetes")]
    fn start(config: &Config) -> io::Result<Self> {
        use crate::sources::kubernetes::client::Source;
        let source = config
            .kubernetes
            .enabled
            .then(|| Source::start(config))
            .transpose()
            .map_err(|e| doing("start the thread that reads Kubernetes", &e))?;
        Ok(Self { state: source.as_ref().map(Source::state), revision: 0, _source: source })
    }

    #[cfg(not(feature = "kubernetes"))]
    fn start(config: &Config) -> io::Result<Self> {
        if config.kubernetes.enabled {
            return Err(io::Error::other(
                "this preflightd was built without Kubernetes: build it with the feature `kubernetes`",
            ));
        }
        Ok(Self { state: None, revision: 0 })
    }

    fn state(&self) -> Option<watch::Receiver<Arc<State>>> {
        self.state.clone()
    }

    fn has_ended(&self) -> bool {
        self.state.as_ref().is_some_and(|state| state.has_changed().is_err())
    }

    /// Waits until there is something to compile.
    async fn changed(&mut self) {
        let Some(state) = &mut self.state else { return std::future::pending().await };
        loop {
            if state.changed().await.is_err() {
                return std::future::pending().await;
            }
            if state.borrow_and_update().revision != self.revision {
                return;
            }
        }
    }

    /// The policies that hold now.
    fn policies(&mut self) -> Vec<PolicySpec> {
        let Some(state) = &self.state else { return Vec::new() };
        let state = state.borrow().clone();
        self.revision = state.revision;
        let stale = state.stale.then_some(PassReason::Stale);
        let specs = state.policies.iter().map(|policy| &policy.spec);
        specs.map(|spec| PolicySpec { passes: spec.passes.or(stale), ..spec.clone() }).collect()
    }
}

/// What one reload leaves to the next.
struct Work {
    /// Numbers of labels must not be given twice.
    labels: RouteLabels,
    /// The last files without errors.
    files: Loaded,
}

/// Compiles anew when files or objects have changed, off the control thread, one reload at a time.
struct Reloader {
    files: Files,
    status: Arc<Status>,
    watch: Option<Watch>,
    kubernetes: Kubernetes,
    /// With the reload while one runs.
    work: Option<Work>,
    generation: u64,
    running: Option<JoinHandle<Reload>>,
    /// Once more after the one that runs; true: reading the files.
    again: Option<bool>,
    /// Nothing can be reloaded any more: why.
    broken: Option<String>,
    /// What was learned, as it changes; `None`: nothing is.
    learned: Option<watch::Receiver<Option<Arc<Answers>>>>,
    /// The policies that run.
    policies: Arc<[PolicySpec]>,
}

/// What a reload brings.
struct Reload {
    work: Work,
    /// The files that were read; `None`: none was.
    files: Option<Vec<PathBuf>>,
    outcome: Result<Reloaded, ReloadResult>,
}

struct Reloaded {
    table: Arc<Table>,
    labels: Arc<[RouteLabel]>,
    sources: Arc<Sources>,
    policies: Arc<[PolicySpec]>,
    findings: Arc<[Diagnostic]>,
    /// `None`: as before.
    steer: Option<config::Steer>,
}

impl Reloader {
    fn new(
        files: Files,
        work: Work,
        status: Arc<Status>,
        kubernetes: Kubernetes,
        learned: Option<watch::Receiver<Option<Arc<Answers>>>>,
    ) -> Self {
        let watch =
            Watch::new().map_err(|e| warn!("cannot watch files, only SIGHUP reloads policies: {e}")).ok();
        let policies = status.config.policies.clone();
        let mut this = Self {
            files,
            status,
            watch,
            kubernetes,
            work: Some(work),
            generation: 1,
            running: None,
            again: None,
            broken: None,
            learned,
            policies,
        };
        this.watch_files();
        this
    }

    fn watch_files(&mut self) {
        if let Some(watch) = &mut self.watch
            && let Err(e) = watch.set(&self.files.paths)
        {
            warn!("some changes of files will not be seen (SIGHUP reloads too): {e}");
        }
    }

    /// Waits for changed files or objects, which begin a reload, or for the end of one, which may bring a new table.
    async fn next(&mut self) -> Option<Reloaded> {
        let changed = async {
            match &self.watch {
                Some(watch) => watch.changed().await,
                None => std::future::pending().await,
            }
        };
        let done = async {
            match &mut self.running {
                Some(running) => running.await,
                None => std::future::pending().await,
            }
        };
        let learned = async {
            match &mut self.learned {
                // Its thread has ended: the daemon is about to, too.
                Some(learned) => match learned.changed().await {
                    Ok(()) => {}
                    Err(_) => std::future::pending().await,
                },
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = changed => {
                self.wanted("changed files", true);
                None
            }
            () = self.kubernetes.changed() => {
                self.wanted("changed objects of Kubernetes", false);
                None
            }
            reload = done => self.done(reload),
            () = learned => Some(self.learned()),
        }
    }

    /// An error if changes are not followed any more: policies would stay as they are, whatever is said.
    fn is_well(&self) -> io::Result<()> {
        let broken = self.broken.clone().or_else(|| {
            self.kubernetes.has_ended().then(|| "the thread that reads Kubernetes has ended".to_owned())
        });
        broken.map_or(Ok(()), |why| {
            Err(io::Error::other(format!("{why}: the daemon ends, so that it can be started anew")))
        })
    }

    /// Other answers were learned, or hold no longer: the same policies with these.
    fn learned(&mut self) -> Reloaded {
        let (table, labels, sources) = {
            let running = self.status.running();
            (running.table.clone(), running.labels.clone(), running.sources.clone())
        };
        let table = self.stamped(&table);
        self.status.running().table = table.clone();
        tracing::debug!(generation = table.generation(), "other answers are known");
        let findings = self.status.running().findings.clone();
        Reloaded { table, labels, sources, policies: self.policies.clone(), findings, steer: None }
    }

    /// A table as the next generation, with what was learned by now.
    fn stamped(&mut self, table: &Table) -> Arc<Table> {
        self.generation += 1;
        let learned = self.learned.as_mut().and_then(|learned| learned.borrow_and_update().clone());
        Arc::new(table.with_learned(self.generation, learned))
    }

    /// Begins to reload, or does it again after the present one: what it read may have changed since. `read`: the files too.
    fn wanted(&mut self, why: &str, read: bool) {
        let Some(mut work) = self.work.take() else {
            self.again = Some(self.again.unwrap_or(false) || read);
            return;
        };
        if read {
            info!(why, "reading the policies anew");
        } else {
            debug!(why, "compiling the policies anew");
        }
        let objects = self.kubernetes.policies();
        let files = read.then(|| self.files.clone());
        let (status, generation) = (self.status.clone(), self.generation + 1);
        self.running = Some(tokio::task::spawn_blocking(move || {
            let (outcome, files) = reload(files.as_ref(), &objects, &status, &mut work, generation);
            Reload { work, files, outcome }
        }));
    }

    /// Takes note of a reload that ended: the new table, if there is one.
    fn done(&mut self, reload: Result<Reload, JoinError>) -> Option<Reloaded> {
        self.running = None;
        let reload = match reload {
            Ok(reload) => reload,
            Err(e) => {
                // The labels are lost with it, and nothing would ever change again.
                self.broken = Some(format!("a reload broke off: {e}"));
                return None;
            }
        };
        self.work = Some(reload.work);
        let read = reload.files.is_some();
        if let Some(files) = reload.files {
            if !files.is_empty() {
                self.files.paths = files;
            }
            self.watch_files();
        }
        let result = reload.outcome.as_ref().map_or_else(|result| *result, |_| ReloadResult::Applied);
        let outcome = reload.outcome.map(|reloaded| {
            self.policies = reloaded.policies.clone();
            Reloaded { table: self.stamped(&reloaded.table), ..reloaded }
        });
        let reloaded = {
            let mut running = self.status.running();
            if read {
                running.reloads[result as usize] += 1;
                running.current = result == ReloadResult::Applied;
            }
            outcome.ok().inspect(|reloaded| {
                running.table = reloaded.table.clone();
                running.labels = reloaded.labels.clone();
                running.sources = reloaded.sources.clone();
                running.findings = reloaded.findings.clone();
            })
        };
        if let Some(Reloaded { table, .. }) = &reloaded {
            let (generation, policies) = (table.generation(), table.policies());
            if read {
                info!(generation, policies, "the policies were replaced");
            } else {
                debug!(generation, policies, "the policies were replaced");
            }
        } else {
            error!(result = result.as_str(), "the policies stay as they were");
        }
        if let Some(read) = self.again.take() {
            self.wanted("changed meanwhile", read);
        }
        reloaded
    }
}

/// Reads the files, if any are given, and compiles them with what objects came down to. Also returns which files were read.
fn reload(
    files: Option<&Files>,
    objects: &[PolicySpec],
    status: &Status,
    work: &mut Work,
    generation: u64,
) -> (Result<Reloaded, ReloadResult>, Option<Vec<PathBuf>>) {
    let mut read = None;
    let mut new = None;
    if let Some(files) = files {
        let mut loaded = match files.load() {
            Ok(loaded) => loaded,
            Err(e) => {
                error!("{e}");
                return (Err(ReloadResult::Unreadable), Some(Vec::new()));
            }
        };
        read = Some(std::mem::take(&mut loaded.files));
        if let Some(config) = &mut loaded.config {
            *config = files.overridden(config.clone());
            let changed = config.changed_sections(&status.config);
            if !changed.is_empty() {
                warn!(
                    sections = changed.join(", "),
                    "these need a restart: only policies, and what [steer] says of mode, storm, share, firewall and kernel answers, change while running"
                );
            }
            config.policies = config.policies_for(&status.config.listeners);
        }
        new = Some(loaded);
    }
    let loaded = new.as_ref().unwrap_or(&work.files);
    let Some(config) = &loaded.config else {
        log_findings(&loaded.diagnostics);
        return (Err(ReloadResult::Refused), read);
    };
    let policies: Arc<[PolicySpec]> = if objects.is_empty() {
        config.policies.clone()
    } else {
        config.policies.iter().chain(objects).cloned().collect()
    };
    let specs = status.config.listener_specs();
    let (table, found) = loaded.compile_all(&specs, &policies, &mut work.labels, generation);
    if read.is_some() || table.is_none() {
        log_findings(&loaded.diagnostics);
        log_findings(&found);
    }
    let Some(table) = table else { return (Err(ReloadResult::Refused), read) };
    let findings = loaded.diagnostics.iter().cloned().chain(found).collect();
    let steer = config.steer.clone();
    if let Some(new) = new {
        work.files = new;
    }
    let reloaded = Reloaded {
        table: Arc::new(table),
        labels: work.labels.all().into(),
        sources: Arc::new(explain::sources(&policies)),
        policies,
        findings,
        steer: read.is_some().then_some(steer),
    };
    (Ok(reloaded), read)
}

fn log_findings(findings: &[Diagnostic]) {
    for finding in findings {
        let (place, code, help) = (finding.place(), finding.code, finding.help.replace('\n', "; "));
        if finding.is_error() {
            error!(place, code, help, "{}", finding.message);
        } else {
            warn!(place, code, help, "{}", finding.message);
        }
    }
}

/// One listening socket for each worker, and the address that they got.
fn open(address: SocketAddr, count: usize) -> io::Result<(SocketAddr, Vec<OwnedFd>)> {
    let first = TcpListener::from(listen::open(address)?);
    let address = first.local_addr().map_err(|e| doing("ask a listener for its address", &e))?;
    let mut sockets = vec![OwnedFd::from(first)];
    for _ in 1..count {
        sockets.push(listen::open(address)?);
    }
    Ok((address, sockets))
}

/// The CPUs that the process may use.
fn cpus() -> Vec<usize> {
    match rustix::thread::sched_getaffinity(None) {
        Ok(set) => (0..rustix::thread::CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect(),
        Err(_) => Vec::new(),
    }
}

/// Descriptors for all connections that the limits allow.
fn raise_open_files(config: &Config) {
    let workers = (config.worker_count() * config.limits.max_connections) as u64;
    let relayed = if config.upstreams().is_empty() { 0 } else { 2 * config.relay.max_connections as u64 };
    let needed = workers + relayed + SPARE_DESCRIPTORS;
    let now = getrlimit(Resource::Nofile);
    if now.maximum.is_some_and(|maximum| maximum < needed) {
        let more = Rlimit { current: Some(needed), maximum: Some(needed) };
        if setrlimit(Resource::Nofile, more).is_ok() {
            return;
        }
        warn!(
            allowed = now.maximum,
            needed,
            "fewer file descriptors than limits.max_connections and relay.max_connections may need: raise the limit \
             (LimitNOFILE, ulimit -n) or lower them"
        );
    }
    // Up to the hard limit nothing is asked for that was not granted already.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: now.maximum, maximum: now.maximum });
}

fn doing(what: &str, e: &io::Error) -> io::Error {
    io::Error::new(e.kind(), format!("cannot {what}: {e}"))
}
