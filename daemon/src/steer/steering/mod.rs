//! The daemon's hand on the programs: brings them up, keeps them informed, and lets go of them.
#![forbid(unsafe_code)]

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd as _, OwnedFd},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use aya::{Ebpf, util::KernelVersion};
use preflightd_common::{
    abi::{
        self, Endpoint, Host, MAX_PORTS, MAX_SERVED, MAX_SOCKETS, Service as AbiService, config_flags, event,
        host_kind, kind, state,
    },
    preflight::HostHash,
};

use super::{
    Counts, Error, Marks, firewall,
    interfaces::{Interface, Routes},
    maps::{Maps, Samples, words},
    netns::Netns,
    object::{self, Fitted, Sizes},
    pins::Pins,
    sysctl::Sysctls,
};
use crate::{
    config::{Engage, Firewall, Steer, SteerMode},
    policy::{HostPattern, ListenerId, PolicySpec, Table, learned},
    worker::listen,
};
use answers::Answers;
use look::Attached;
use measure::{Disengaged, Occupancy, Storm};

mod answers;
mod look;
mod measure;
mod play;
mod report;

pub use report::{KernelReport, PortReport, Report, State};

type Result<T> = std::result::Result<T, Error>;

/// How often a new secret signs the cookies; the one before stays good as long.
const KEY_LIFE: Duration = Duration::from_mins(10);
/// How often interfaces, settings and links are looked at even if nothing was told of them.
const LOOK: Duration = Duration::from_secs(5);
/// In this time a daemon that runs sees that it is replaced: more than a tick.
const TAKE_OVER: Duration = Duration::from_millis(300);
/// How often entries that nobody goes on with are swept out, in calm and while the map fills up.
const SWEEP: Duration = Duration::from_secs(10);
const SWEEP_PRESSED: Duration = Duration::from_secs(1);
/// A sweep of a full map takes milliseconds, in which its CPU processes no packets: one part in so many of the time, as far
/// as [`SWEEP`] lets it.
const SWEEP_SHARE: u32 = 500;
/// Cookies that each CPU checks in a second while entries are being evicted.
const COOKIE_BUDGET: u32 = 1000;
/// Preflights that each CPU shows in a second at most.
const SAMPLES: u32 = 64;
/// Pairs of address and port: half of what fits, for while they are replaced the old and the new ones are there, and the
/// self-test's.
const ROOM: usize = MAX_SERVED as usize / 2 - 1;
const TEST_ROW: u32 = MAX_PORTS - 1;

/// A port of the proxy that is steered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// The listener of the configuration.
    pub listener: ListenerId,
    /// Its name.
    pub name: String,
    /// Where the proxy listens. An unspecified address stands for all addresses of the node; `[::]` for those of IPv4
    /// too, unless another service has them.
    pub address: SocketAddr,
    /// Further IP addresses by which clients rightly call it.
    pub literals: Vec<IpAddr>,
}

/// Everything of one network namespace.
pub struct Steering {
    options: Steer,
    netns: Netns,
    services: Vec<Service>,
    /// Ports and their rows.
    rows: BTreeMap<u16, Port>,
    workers: u32,
    ebpf: Ebpf,
    maps: Maps,
    pins: Option<Pins>,
    cannot_steer: Option<String>,
    time_wait: bool,
    owner: u32,
    config: abi::Config,
    sysctls: Sysctls,
    /// All that are known, and those that have the program.
    known: Vec<Interface>,
    routes: Routes,
    attached: BTreeMap<u32, Attached>,
    program: &'static str,
    engaged: bool,
    /// Preflights are shown to whoever asks the proxy.
    shows: bool,
    /// Nothing is deferred, for nothing is answered.
    shadow: bool,
    /// `None`: not yet.
    tested: Option<std::result::Result<(), String>>,
    sockets: Vec<(u32, OwnedFd)>,
    obstacles: Vec<String>,
    /// `None`: the kernel has no nf_tables.
    changes: Option<firewall::Changes>,
    looking: Option<mpsc::Receiver<std::result::Result<Vec<String>, String>>>,
    replaced: bool,
    /// What the programs were told of addresses and ports; `None`: that may be something else.
    served: Option<HashMap<Endpoint, AbiService>>,
    /// Addresses and ports that do not fit.
    beyond: usize,
    max_pending: u32,
    answers: Answers,
    cpus: u64,
    times: Times,
    counts: Counts,
    /// Counters of a while ago, for rates.
    earlier: (Instant, u64),
    judged: (Instant, Counts),
    storm: Storm,
    pending: Occupancy,
    /// Told already, so that nothing is told twice.
    told: Option<(State, Vec<String>)>,
}

struct Port {
    row: u32,
    disengaged: Option<Disengaged>,
    /// How long it is disengaged the next time.
    pause: Duration,
    /// Connections that opened with plain HTTP/1 of late, fading.
    spoken: f64,
    /// Clients that waited already when the port was engaged.
    silent_before: u32,
}

struct Times {
    key: Instant,
    look: Instant,
    firewall: Instant,
    sweep: Instant,
    /// How long the last sweep took, in which this CPU processed no packets.
    sweeping: Duration,
    /// The self-test is due.
    test: Instant,
}

impl Steering {
    /// Loads the programs, or takes over what an earlier daemon pinned. Nothing is attached yet. `max_head`: longer heads
    /// are not for the kernel to answer, in bytes; `labels`: so many routes are counted apart.
    ///
    /// # Errors
    /// The namespace cannot be entered, the kernel refuses the maps, or bpffs is missing.
    pub fn open(
        options: &Steer,
        services: Vec<Service>,
        workers: usize,
        max_head: usize,
        labels: usize,
    ) -> Result<Self> {
        let netns = Netns::open(&options.netns)?;
        let tcx = KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(6, 6, 0));
        let rows = rows(&services)?;
        let workers = workers as u32;
        let needed = services.len() as u32 * 2 * workers;
        if needed >= MAX_SOCKETS {
            let what = format!("steer {} listeners with {workers} workers", services.len());
            return Err(Error::new(what, "use fewer workers (workers.count)")(format!(
                "that makes {needed} sockets, of at most {}",
                MAX_SOCKETS - 1
            )));
        }
        let sysctls =
            netns.enter(Sysctls::read)?.map_err(Error::new("read the kernel's settings", "mount /proc"))?;
        // Without a link there is nothing that could outlive us.
        let pins = if tcx { Some(Pins::open(&options.pin_dir, netns.number()?)?) } else { None };
        let sizes =
            Sizes { pending: options.max_pending, answered: options.max_answered, labels: labels as u32 };
        let Fitted { mut ebpf, cannot_steer, time_wait } =
            object::load(pins.as_ref().map(Pins::directory), sizes)?;
        let mut cannot_steer = cannot_steer.map(|error| error.to_string());
        if cannot_steer.is_none()
            && let Err(error) = object::load_program(&mut ebpf, "steer")
        {
            cannot_steer = Some(error.to_string());
        }
        let program = if cannot_steer.is_none() { "steer" } else { "observe" };
        object::load_program(&mut ebpf, program)?;
        object::load_program(&mut ebpf, "sweep_pending")?;
        let max_pending = object::entries_of(&ebpf, "PENDING")?;
        let max_answered = object::entries_of(&ebpf, "ANSWERED")?;
        for (name, now, wanted) in [
            ("max_pending", max_pending, options.max_pending),
            ("max_answered", max_answered, options.max_answered),
        ] {
            if now != wanted {
                tracing::warn!(
                    now,
                    wanted,
                    "steer.{name} takes effect with new maps: run `preflightd detach` before the daemon starts"
                );
            }
        }
        let maps = Maps::take(&mut ebpf)?;
        let counts = maps.counts(rows.len() as u32)?;
        let now = Instant::now();
        let preflights = preflights(&counts);
        Ok(Self {
            options: options.clone(),
            netns,
            services,
            rows,
            workers,
            ebpf,
            maps,
            pins,
            cannot_steer,
            time_wait,
            owner: 0,
            config: abi::Config::default(),
            sysctls,
            known: Vec::new(),
            routes: Routes::default(),
            attached: BTreeMap::new(),
            program,
            engaged: false,
            shows: false,
            shadow: false,
            tested: None,
            sockets: Vec::new(),
            obstacles: Vec::new(),
            changes: None,
            looking: None,
            replaced: false,
            served: None,
            beyond: 0,
            max_pending,
            answers: Answers::new(max_answered, max_head),
            cpus: aya::util::online_cpus().map_or(1, |cpus| cpus.len() as u64),
            times: Times {
                key: now,
                look: now,
                firewall: now,
                sweep: now,
                sweeping: Duration::ZERO,
                test: now,
            },
            judged: (now, counts.clone()),
            counts,
            earlier: (now, preflights),
            storm: Storm { on: false, rate: 0.0, calm_since: None },
            pending: Occupancy::default(),
            told: None,
        })
    }

    /// Has the programs show preflights (see [`Steering::shown`]); `shadow`: and defer nothing.
    #[must_use]
    pub fn showing(self, shows: bool, shadow: bool) -> Self {
        Self { shows, shadow, ..self }
    }

    /// The preflights that the programs show, and the namespace that the proxy is in. `None`: they show none, or somebody
    /// has them already.
    pub fn shown(&mut self) -> Option<(Netns, Samples)> {
        let samples = self.maps.take_samples().filter(|_| self.shows)?;
        Some((self.netns.clone(), samples))
    }

    /// Makes the listening sockets of the workers, in the served namespace: for each worker those of all services.
    ///
    /// # Errors
    /// A socket cannot be made.
    pub fn listen(&mut self) -> Result<Vec<Vec<(ListenerId, OwnedFd)>>> {
        let mut all: Vec<_> = (0..self.workers).map(|_| Vec::new()).collect();
        if self.cannot_steer.is_some() {
            return Ok(all);
        }
        let failed = |error: std::io::Error| {
            Error::new("make a worker's listening socket", "bring up loopback (`ip link set lo up`)")(error)
        };
        for (index, service) in self.services.iter().enumerate() {
            for (family, address) in
                [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)].iter().enumerate()
            {
                for (worker, sockets) in all.iter_mut().enumerate() {
                    let socket = match self.netns.enter(|| listen::open(SocketAddr::new(*address, 0)))? {
                        Ok(socket) => socket,
                        // A node without IPv6 has no clients that speak it.
                        Err(_) if address.is_ipv6() => continue,
                        Err(error) => return Err(failed(error)),
                    };
                    let slot = self.slot(index, family) + worker as u32;
                    let ours = socket.as_fd().try_clone_to_owned().map_err(failed)?;
                    self.sockets.push((slot, ours));
                    sockets.push((service.listener, socket));
                }
            }
        }
        Ok(all)
    }

    /// What workers mark requests with that they turn away.
    pub fn marks(&self) -> Marks {
        self.maps.marks()
    }

    /// Brings everything up: the workers accept already, and answer by these policies.
    ///
    /// # Errors
    /// The kernel refuses a map or the program; a named interface does not exist.
    pub fn engage(&mut self, policies: &[PolicySpec], table: &Table) -> Result<()> {
        let (earlier, predecessor) = (self.maps.config()?, self.maps.owner()?);
        self.owner = loop {
            let number = random()?[0] as u32;
            if number != 0 && number != predecessor {
                break number;
            }
        };
        // From its next tick on the earlier daemon keeps its hands off; what it writes until then is written again here.
        self.maps.set_owner(self.owner)?;
        if predecessor != 0 {
            thread::sleep(TAKE_OVER);
        }
        // An earlier daemon's key stays good; ours is new.
        let key = 1 - (earlier.key & 1);
        self.maps.set_key(key, random()?)?;
        // Until all is in its place nothing new is deferred: what an earlier daemon served may be something else now.
        self.config = abi::Config { key, state: state::OFF, ..earlier };
        self.maps.set_config(self.config)?;
        for row in self.rows.values() {
            self.maps.clear_row(row.row)?;
        }
        self.counts = self.maps.counts(self.rows.len() as u32)?;
        self.earlier = (Instant::now(), preflights(&self.counts));
        self.judged = (Instant::now(), self.counts.clone());
        self.set_date()?;
        // Whom an earlier daemon left waiting says nothing of a port: idle browsers do not speak when we start.
        self.sweep()?;
        for row in self.rows.values_mut() {
            row.silent_before = self.pending.silent.get(row.row as usize).copied().unwrap_or(0);
        }
        self.changes = self.netns.enter(firewall::Changes::open)?.ok();
        self.look_at_firewall(true)?;
        self.look(true)?;
        self.serve()?;
        self.set_policies(policies, table)?;
        for (slot, socket) in &self.sockets {
            self.maps.set_socket(*slot, socket)?;
        }
        self.test_if_due(Instant::now());
        self.engaged = true;
        self.apply()?;
        self.maps.beat(true)
    }

    /// New policies: their hosts, and what the kernel can decide by the table that they were compiled to.
    ///
    /// # Errors
    /// The kernel refuses a map.
    pub fn set_policies(&mut self, policies: &[PolicySpec], table: &Table) -> Result<()> {
        if !self.is_in_charge()? {
            return Ok(());
        }
        // Whatever becomes of the hosts: what the kernel answers must not stay as it was.
        let answers = self.set_answers(table);
        let mut hosts = hosts(&self.services, policies);
        // Where the kernel has no table, a worker would get all preflights of these hosts, and turn most of them away.
        if self.options.kernel_answers {
            hosts.extend(table.learned().into_iter().flat_map(|learned| learned_hosts(learned)));
        }
        let beyond = self.maps.set_hosts(&hosts)?;
        if beyond > 0 {
            tracing::warn!(hosts = beyond, "more hosts than fit: the proxy answers the preflights of these");
        }
        answers
    }

    /// A new configuration: mode, engagement and share take effect at once.
    ///
    /// # Errors
    /// The kernel refuses a map.
    pub fn set_options(&mut self, options: &Steer) -> Result<()> {
        let Steer { mode, engage, storm_above, storm_below, percent, firewall, kernel_answers, .. } =
            options.clone();
        self.options = Steer {
            mode,
            engage,
            storm_above,
            storm_below,
            percent,
            kernel_answers,
            firewall,
            ..self.options.clone()
        };
        // The next tick looks at what matters now; until then what is known holds.
        self.times.firewall = long_ago();
        self.times.look = long_ago();
        self.tick()
    }

    /// What must be done several times a second. The heartbeat comes last, when all of it was done.
    ///
    /// # Errors
    /// The kernel refuses a map: the programs then see no heartbeat, and defer nothing.
    pub fn tick(&mut self) -> Result<()> {
        if !self.engaged || !self.is_in_charge()? {
            return Ok(());
        }
        let now = Instant::now();
        self.counts = self.maps.counts(self.rows.len() as u32)?;
        self.measure(now);
        self.judge(now);
        self.set_date()?;
        if let Err(error) = self.publish_if_due(now) {
            tracing::warn!(%error, "the kernel still answers nothing");
        }
        let pressed = self.config.flags & config_flags::PRESSURE != 0 || self.fill() > 0.5;
        let pause =
            if pressed { (self.times.sweeping * SWEEP_SHARE).clamp(SWEEP_PRESSED, SWEEP) } else { SWEEP };
        if now >= self.times.sweep + pause {
            self.times.sweep = now;
            self.sweep()?;
        }
        if now >= self.times.key + KEY_LIFE {
            self.times.key = now;
            let key = 1 - (self.config.key & 1);
            self.maps.set_key(key, random()?)?;
            self.config.key = key;
        }
        if now >= self.times.look + LOOK {
            self.look(false)?;
        }
        self.look_at_firewall(false)?;
        self.test_if_due(now);
        self.apply()?;
        self.maps.beat(true)
    }

    /// Interfaces, addresses or routes have changed.
    ///
    /// # Errors
    /// As [`Steering::tick`].
    pub fn changed(&mut self) -> Result<()> {
        if !self.engaged || !self.is_in_charge()? {
            return Ok(());
        }
        self.look(false)?;
        self.apply()
    }

    /// Whether the programs are still ours to tell. Asked before anything is written: a daemon that was stopped for a while
    /// may have been replaced meanwhile.
    fn is_in_charge(&mut self) -> Result<bool> {
        if !self.replaced && self.maps.owner()? != self.owner {
            self.replaced = true;
            self.attached.clear();
            self.tell();
        }
        Ok(!self.replaced)
    }

    /// Whether what is asked for works: the self-test passed.
    pub fn is_well(&self) -> bool {
        !matches!(self.tested, Some(Err(_)))
    }

    /// The served namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Lets go: nothing new is deferred, and no worker gets another connection. What was begun is finished by the
    /// programs, which stay where they are.
    pub fn release(&mut self) {
        if !self.engaged || !self.is_in_charge().unwrap_or(false) {
            return;
        }
        self.engaged = false;
        self.config.state = state::OFF;
        let done = self.maps.set_config(self.config).and_then(|()| self.maps.beat(false));
        if let Err(error) = done {
            // Within a second they see it by themselves.
            tracing::warn!(%error, "cannot tell the eBPF programs that the daemon ends");
        }
        for index in 0..self.services.len() {
            for slot in self.slot(index, 0)..self.slot(index + 1, 0) {
                self.maps.clear_socket(slot);
            }
        }
    }

    /// What can be told.
    pub fn report(&self) -> Report {
        let ports = self.rows.iter().map(|(port, row)| PortReport {
            port: *port,
            row: row.row,
            listeners: self
                .services
                .iter()
                .filter(|s| s.address.port() == *port)
                .map(|s| s.name.clone())
                .collect(),
            disengaged: row.disengaged.as_ref().map(|off| off.why.clone()),
        });
        Report {
            state: self.state(),
            reasons: self.reasons(),
            interfaces: self.attached.values().filter(|a| !a.removed).map(|a| a.name.clone()).collect(),
            ports: ports.collect(),
            counts: self.counts.clone(),
            pending: self.pending.now,
            max_pending: self.max_pending,
            kernel: self
                .answers
                .report(self.options.kernel_answers && self.state() == State::Steering, &self.counts),
        }
    }

    fn state(&self) -> State {
        let works = self.attached.values().any(|attached| !attached.removed);
        match (self.replaced, self.config.state) {
            (true, _) => State::Replaced,
            // Nothing comes to the programs.
            _ if !works => State::Off,
            (_, state::DEFER) => State::Steering,
            (_, state::OBSERVE) => State::Observing,
            _ => State::Off,
        }
    }

    /// Why not more is done.
    fn reasons(&self) -> Vec<String> {
        if self.replaced {
            return vec!["another daemon or `preflightd detach` has taken the eBPF programs over".to_owned()];
        }
        let mut reasons = Vec::new();
        if self.shadow && self.options.mode == SteerMode::Steer {
            reasons
                .push("shadow mode: the proxy answers everything, and its answers are compared".to_owned());
        }
        if self.options.mode == SteerMode::Steer {
            reasons.extend(self.cannot_steer.clone());
            if self.sysctls.syncookies == 0 {
                reasons.push(
                    "net.ipv4.tcp_syncookies is 0, and the kernel makes no connection that it has not begun: set it to 1"
                        .to_owned(),
                );
            }
            if self.options.firewall == Firewall::Refuse {
                reasons.extend(self.obstacles.iter().cloned());
            }
            if let Some(Err(error)) = &self.tested {
                reasons.push(format!("the self-test failed: {error}"));
            }
            if reasons.is_empty() && self.options.engage == Engage::Storm && !self.storm.on {
                reasons.push(format!(
                    "calm: {:.0} preflights a second, and deferral begins above {}",
                    self.storm.rate, self.options.storm_above
                ));
            }
        }
        if self.options.mode == SteerMode::Steer && self.options.kernel_answers {
            reasons.extend(self.answers.reasons(&self.counts));
        }
        if self.beyond > 0 {
            reasons.push(format!(
                "{} pairs of address and port are the proxy's alone, for only {ROOM} fit: name the listeners' \
                 addresses",
                self.beyond
            ));
        }
        for attached in self.attached.values().filter(|attached| attached.removed) {
            reasons.push(format!(
                "the program was taken off {} by somebody else: restart the daemon to put it back",
                attached.name
            ));
        }
        if self.attached.is_empty() && self.options.mode != SteerMode::Off {
            reasons.push("no interface has the program: name some in steer.interfaces".to_owned());
        }
        reasons
    }

    fn is_tested(&self) -> bool {
        !self.options.self_test || matches!(self.tested, Some(Ok(())))
    }

    fn may_defer(&self) -> bool {
        self.cannot_steer.is_none()
            && self.sysctls.syncookies != 0
            && (self.options.firewall == Firewall::Ignore || self.obstacles.is_empty())
            && self.is_tested()
            && match self.options.engage {
                Engage::Always => true,
                Engage::Storm => self.storm.on,
            }
    }

    /// Tells the programs what is to be done.
    fn apply(&mut self) -> Result<()> {
        let state = match self.options.mode {
            SteerMode::Off => state::OFF,
            SteerMode::Steer if !self.shadow && self.may_defer() => state::DEFER,
            SteerMode::Observe | SteerMode::Steer => state::OBSERVE,
        };
        let sysctls = &self.sysctls;
        let config = abi::Config {
            state,
            flags: self.flags(),
            percent: self.options.percent,
            key: self.config.key,
            window: u32::from(sysctls.syn_window()),
            window_scale: if sysctls.window_scaling { u32::from(sysctls.rcv_wscale()) } else { 0 },
            cookie_budget: COOKIE_BUDGET,
            room: self.room(),
            round: self.config.round.wrapping_add(1),
            generation: self.answers.generation(),
            second: self.answers.second(),
            max_head: self.answers.max_head(),
            // Where nothing is answered anyway, the proxy need not be asked.
            samples: if self.shows && (self.shadow || self.options.mode == SteerMode::Steer) {
                SAMPLES
            } else {
                0
            },
            zero: 0,
        };
        self.serve()?;
        self.config = config;
        self.maps.set_config(config)?;
        self.tell();
        Ok(())
    }

    fn flags(&self) -> u32 {
        let flag = |on: bool, flag: u32| if on { flag } else { 0 };
        let sysctls = &self.sysctls;
        let pressure =
            self.fill() > if self.config.flags & config_flags::PRESSURE == 0 { 0.875 } else { 0.75 };
        flag(sysctls.timestamps, config_flags::TIMESTAMPS)
            | flag(sysctls.sack, config_flags::SACK)
            | flag(sysctls.window_scaling, config_flags::WINDOW_SCALING)
            | flag(sysctls.ecn != 0, config_flags::ECN)
            | flag(sysctls.ecn > 2, config_flags::ACCURATE_ECN)
            | flag(pressure, config_flags::PRESSURE)
            | flag(self.time_wait, config_flags::TIME_WAIT)
            | flag(self.options.kernel_answers, config_flags::ANSWERS)
            | flag(self.answers.fill(&self.counts) > 0.5, config_flags::HALF_FULL)
            | flag(self.answers.fill(&self.counts) > answers::CROWDED, config_flags::CROWDED)
            | flag(self.routes.sure_v4, config_flags::ROUTES_V4)
            | flag(self.routes.sure_v6, config_flags::ROUTES_V6)
    }

    /// Says once what has changed.
    fn tell(&mut self) {
        let mut now = (self.state(), self.reasons());
        // A rate is no news.
        now.1.retain(|reason| !reason.starts_with("calm: "));
        if self.told.as_ref() == Some(&now) {
            return;
        }
        let interfaces: Vec<_> = self.attached.values().map(|attached| &*attached.name).collect();
        let ports: Vec<_> = self.rows.keys().collect();
        match now.0 {
            State::Steering => tracing::info!(?interfaces, ?ports, "steering"),
            state => tracing::info!(?interfaces, ?ports, "not steering: {}", state.as_str()),
        }
        for reason in &now.1 {
            tracing::warn!("{reason}");
        }
        self.told = Some(now);
    }

    /// First socket slot of a service and address family (0: IPv4).
    fn slot(&self, service: usize, family: usize) -> u32 {
        (service * 2 + family) as u32 * self.workers
    }

    /// Tells the programs where clients connect, as of the interfaces that are known.
    fn serve(&mut self) -> Result<()> {
        let mut served = HashMap::new();
        let v4_served: HashSet<u16> =
            self.services.iter().filter(|s| s.address.is_ipv4()).map(|s| s.address.port()).collect();
        for (index, service) in self.services.iter().enumerate() {
            let bound = service.address.ip();
            let port = service.address.port();
            let row = &self.rows[&port];
            // Not those of loopback and of interfaces without a wire: there stand the addresses of load balancers, whose
            // answers leave another way.
            let wired = self.known.iter().filter(|interface| interface.ethernet && !interface.loopback);
            let all = wired.flat_map(|interface| interface.addresses.iter().copied());
            let addresses: Vec<IpAddr> = match bound {
                IpAddr::V4(Ipv4Addr::UNSPECIFIED) => all.filter(IpAddr::is_ipv4).collect(),
                IpAddr::V6(Ipv6Addr::UNSPECIFIED) => {
                    all.filter(|address| address.is_ipv6() || !v4_served.contains(&port)).collect()
                }
                address => vec![address],
            };
            for address in addresses {
                let value = AbiService {
                    listener: u32::from(service.listener.0),
                    row: row.row,
                    first_socket: self.slot(index, usize::from(address.is_ipv6())),
                    sockets: self.workers,
                    engaged: u32::from(row.disengaged.is_none() && self.is_tested() && self.engaged),
                };
                // An address that is named goes before "all addresses".
                if bound.is_unspecified() {
                    served.entry(endpoint(address, port)).or_insert(value);
                } else {
                    served.insert(endpoint(address, port), value);
                }
            }
        }
        self.beyond = served.len().saturating_sub(ROOM);
        if self.beyond > 0 {
            let mut endpoints: Vec<_> = served.keys().copied().collect();
            endpoints.sort_unstable_by_key(|endpoint| (endpoint.port, endpoint.address));
            for endpoint in endpoints.split_off(ROOM) {
                served.remove(&endpoint);
            }
        }
        if self.served.as_ref() != Some(&served) {
            // Not known, should it fail half-way.
            self.served = None;
            self.maps.serve(&served)?;
            self.served = Some(served);
        }
        Ok(())
    }
}

impl std::fmt::Debug for Steering {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Steering").field("report", &self.report()).finish_non_exhaustive()
    }
}

/// A row for each port.
fn rows(services: &[Service]) -> Result<BTreeMap<u16, Port>> {
    let ports: std::collections::BTreeSet<u16> =
        services.iter().map(|service| service.address.port()).collect();
    // The last row is the self-test's.
    if ports.len() as u32 > TEST_ROW {
        let what = format!("steer {} ports", ports.len());
        return Err(Error::new(what, "run several daemons")(format!("at most {TEST_ROW} fit")));
    }
    Ok(ports
        .into_iter()
        .zip(0..)
        .map(|(port, row)| {
            (port, Port { row, disengaged: None, pause: measure::FIRST_PAUSE, spoken: 0.0, silent_before: 0 })
        })
        .collect())
}

fn endpoint(address: IpAddr, port: u16) -> Endpoint {
    Endpoint { address: words(address), port: port.to_be(), zero: 0 }
}

/// The hosts of policies by listener.
fn hosts(services: &[Service], policies: &[PolicySpec]) -> HashSet<Host> {
    let mut hosts = HashSet::new();
    for service in services {
        let listener = u32::from(service.listener.0);
        let serves = |policy: &&PolicySpec| {
            policy.passes.is_none()
                && (policy.listeners.is_empty() || policy.listeners.contains(&service.listener))
        };
        for pattern in policies.iter().filter(serves).flat_map(|policy| &policy.hosts) {
            let (kind, hash) = match pattern {
                HostPattern::Any => {
                    // An address is a host of "every host" only if it is named as ours.
                    let own = service.literals.iter().copied().chain([service.address.ip()]);
                    for address in own.filter(|address| !address.is_unspecified()) {
                        let text = match address {
                            IpAddr::V4(v4) => v4.to_string(),
                            IpAddr::V6(v6) => format!("[{v6}]"),
                        };
                        hosts.insert(Host {
                            hash: HostHash::of(text.as_bytes()),
                            listener,
                            kind: host_kind::EXACT,
                        });
                    }
                    (host_kind::ANY, 0)
                }
                HostPattern::Exact(host) => (host_kind::EXACT, HostHash::of(host.as_bytes())),
                HostPattern::Wildcard(suffix) => (host_kind::SUFFIX, HostHash::of(suffix.as_bytes())),
            };
            hosts.insert(Host { hash, listener, kind });
        }
    }
    hosts
}

/// The hosts of learned answers.
fn learned_hosts(learned: &learned::Answers) -> impl Iterator<Item = Host> {
    learned.questions().map(|question| Host {
        hash: HostHash::of(question.host_name().as_bytes()),
        listener: u32::from(question.listener.0),
        kind: host_kind::EXACT,
    })
}

/// Those that open a connection, and those that the kernel answers later on one.
fn preflights(counts: &Counts) -> u64 {
    let sum = |kind| (0..TEST_ROW).map(|row| counts.port(row, kind)).sum::<u64>();
    let (first, by_kernel) = (sum(kind::Preflight), sum(kind::Kernel));
    let answers = counts.event(event::KernelAnswer).saturating_sub(counts.event(event::KernelAnswerAgain));
    first + answers.saturating_sub(by_kernel)
}

/// A time after which anything is due.
fn long_ago() -> Instant {
    let now = Instant::now();
    now.checked_sub(Duration::from_hours(1)).unwrap_or(now)
}

/// 128 random bits of the kernel.
fn random() -> Result<[u64; 2]> {
    let mut bytes = [0; 16];
    let failed = Error::new("get random bytes", "allow getrandom(2)");
    let length =
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).map_err(failed)?;
    if length < bytes.len() {
        return Err(Error::new("get random bytes", "start anew")("the kernel gave too few"));
    }
    let number = u128::from_ne_bytes(bytes);
    Ok([number as u64, (number >> 64) as u64])
}
