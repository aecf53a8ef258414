//! What runs, as the admin surfaces show it: written by the control thread, read by whoever asks.

use super::{RelayStats, WorkerStats};
use crate::{
    config::{Config, Diagnostic},
    explain::{self, Context, Report, Sources},
    http::HeadLimits,
    policy::{KernelTable, ListenerId, Table, labels::RouteLabel},
    sources::kubernetes::State,
};
use serde_json::json;
use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Instant, SystemTime, UNIX_EPOCH},
};
use tokio::sync::watch;

/// More findings are counted, and not shown.
const SHOWN_FINDINGS: usize = 1000;

/// What runs.
#[derive(Debug)]
pub struct Status {
    /// Each worker's counters.
    pub workers: Vec<Arc<WorkerStats>>,
    /// The relay's counters.
    pub relay: Arc<RelayStats>,
    /// The configuration that it was started with; its policies may have been replaced since.
    pub config: Config,
    /// The addresses that the listeners got.
    pub addresses: Vec<SocketAddr>,
    /// The workers' engine.
    pub engine: String,
    /// What drives the relay; empty without one.
    pub relay_backend: String,
    /// When it was started.
    pub started: (SystemTime, Instant),
    ready: AtomicBool,
    draining: AtomicBool,
    running: Mutex<Running>,
    kubernetes: OnceLock<watch::Receiver<Arc<State>>>,
    ask: OnceLock<Arc<crate::ask::Shared>>,
    #[cfg(feature = "ebpf")]
    steer: Mutex<Option<crate::steer::Report>>,
}

/// What a reload replaces.
#[derive(Debug)]
pub struct Running {
    /// The policies.
    pub table: Arc<Table>,
    /// Route labels by number.
    pub labels: Arc<[RouteLabel]>,
    /// Where each policy was written.
    pub sources: Arc<Sources>,
    /// The generation that each worker has taken.
    pub generations: Vec<u64>,
    /// Reloads by result, in order of [`ReloadResult`].
    pub reloads: [u64; 3],
    /// Whether what runs is what the files say: false after a refused reload.
    pub current: bool,
    /// What is doubtful in what runs, but for objects of Kubernetes taken alone.
    pub findings: Arc<[Diagnostic]>,
}

/// How a reload ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReloadResult {
    /// The new policies run.
    Applied,
    /// The files have errors; what ran before runs on.
    Refused,
    /// A file cannot be read; what ran before runs on.
    Unreadable,
}

impl ReloadResult {
    /// All, in order.
    pub const ALL: [ReloadResult; 3] =
        [ReloadResult::Applied, ReloadResult::Refused, ReloadResult::Unreadable];

    /// The metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            ReloadResult::Applied => "applied",
            ReloadResult::Refused => "refused",
            ReloadResult::Unreadable => "unreadable",
        }
    }
}

impl Running {
    /// The first table.
    pub fn new(table: Arc<Table>, labels: &[RouteLabel], sources: Sources) -> Self {
        Self {
            table,
            labels: labels.into(),
            sources: Arc::new(sources),
            generations: Vec::new(),
            reloads: [0; 3],
            current: true,
            findings: Arc::new([]),
        }
    }
}

impl Status {
    /// Everything that is known when the workers run; not ready yet.
    pub fn new(
        workers: Vec<Arc<WorkerStats>>,
        relay: Arc<RelayStats>,
        config: Config,
        addresses: Vec<SocketAddr>,
        engine: String,
        relay_backend: String,
        running: Running,
    ) -> Self {
        Self {
            workers,
            relay,
            config,
            addresses,
            engine,
            relay_backend,
            started: (SystemTime::now(), Instant::now()),
            ready: AtomicBool::new(false),
            draining: AtomicBool::new(false),
            running: Mutex::new(running),
            kubernetes: OnceLock::new(),
            ask: OnceLock::new(),
            #[cfg(feature = "ebpf")]
            steer: Mutex::new(None),
        }
    }

    /// The API server is a source of policies.
    pub fn set_kubernetes(&self, state: watch::Receiver<Arc<State>>) {
        // Only once.
        let _ = self.kubernetes.set(state);
    }

    /// What is known of it; `None`: it is none.
    pub fn kubernetes(&self) -> Option<Arc<State>> {
        self.kubernetes.get().map(|state| state.borrow().clone())
    }

    /// What a reload replaces.
    pub fn running(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread that asks the proxy runs.
    pub(crate) fn set_ask(&self, ask: Arc<crate::ask::Shared>) {
        // There is one for each status.
        let _ = self.ask.set(ask);
    }

    /// What was learned and compared; `None`: the proxy is not asked.
    pub(crate) fn ask(&self) -> Option<&crate::ask::Shared> {
        self.ask.get().map(Arc::as_ref)
    }

    /// The name of a listener.
    pub(crate) fn listener_name(&self, listener: ListenerId) -> String {
        self.config.listeners.get(usize::from(listener.0)).map(|l| l.name.clone()).unwrap_or_default()
    }

    /// What steering does at present.
    #[cfg(feature = "ebpf")]
    pub fn set_steer(&self, report: crate::steer::Report) {
        *self.steer.lock().unwrap_or_else(PoisonError::into_inner) = Some(report);
    }

    /// The same; `None`: no listener is steered.
    #[cfg(feature = "ebpf")]
    pub fn steer(&self) -> Option<crate::steer::Report> {
        self.steer.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Every worker answers by the first table.
    pub fn set_ready(&self) {
        self.ready.store(true, Ordering::Relaxed);
    }

    /// It shuts down.
    pub fn set_draining(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// Whether new connections should come here.
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed) && !self.is_draining()
    }

    /// Whether it shuts down.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Sends the bytes of a request through the policies that run.
    ///
    /// # Errors
    /// No listener has that name.
    pub fn explain(&self, listener: Option<&str>, bytes: &[u8]) -> Result<Report, String> {
        let index = explain::pick_listener(&self.config.listeners, listener)?;
        let (table, labels, sources) = {
            let running = self.running();
            (running.table.clone(), running.labels.clone(), running.sources.clone())
        };
        let kernel = self.kernel_table();
        let context = Context {
            table: &table,
            listener: ListenerId(index as u16),
            listener_name: &self.config.listeners[index].name,
            steered: self.config.listeners[index].steer,
            kernel: kernel.as_deref(),
            labels: &labels,
            sources: &sources,
            limits: HeadLimits { max_bytes: self.config.limits.max_head_bytes },
        };
        Ok(explain::explain(&context, bytes))
    }

    /// What the kernel answers by, if it does.
    fn kernel_table(&self) -> Option<Arc<KernelTable>> {
        #[cfg(feature = "ebpf")]
        return self.steer().filter(|report| report.kernel.on).map(|report| report.kernel.table);
        #[cfg(not(feature = "ebpf"))]
        None
    }

    /// For people and scripts who look after it.
    pub fn json(&self) -> serde_json::Value {
        let running = self.running();
        let listeners = self.config.listeners.iter().zip(&self.addresses).map(|(listener, address)| {
            json!({
                "name": listener.name,
                "address": address.to_string(),
                "upstream": listener.upstream.map(|a| a.to_string()),
                "steered": listener.steer,
            })
        });
        let reloads: serde_json::Map<_, _> = ReloadResult::ALL
            .iter()
            .map(|result| (result.as_str().to_owned(), json!(running.reloads[*result as usize])))
            .collect();
        let findings = running.findings.iter().take(SHOWN_FINDINGS).collect::<Vec<_>>();
        #[cfg(feature = "ebpf")]
        let steer = self.steer().map(|report| report.json());
        #[cfg(not(feature = "ebpf"))]
        let steer = json!(null);
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "pid": std::process::id(),
            "started": self.started.0.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            "ready": self.is_ready(),
            "draining": self.is_draining(),
            "engine": self.engine,
            "relay": self.relay_backend,
            "workers": self.workers.len(),
            "listeners": listeners.collect::<Vec<_>>(),
            "steer": steer,
            "policies": running.table.policies(),
            "generation": running.table.generation(),
            "generations": running.generations,
            "reloads": reloads,
            "files_current": running.current,
            "findings": findings,
            "findings_total": running.findings.len(),
            "kubernetes": self.kubernetes().map(|state| state.json()),
        })
    }
}
