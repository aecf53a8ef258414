//! Asks the proxy itself: to learn its answers, and in shadow mode to compare them with ours.
//!
//! Workers and the kernel show preflights, a share of them or as many as there is room for, and never wait. A thread of
//! its own asks the proxy the same question in canonical form: `Host`, `Origin`, `Access-Control-Request-Method` and the
//! normalised `Access-Control-Request-Headers`, and nothing else that a client has sent. What a client itself got from the
//! proxy is never looked at.

mod exchange;
mod learned;
mod sampler;
mod shadow;

use crate::{
    config::Config,
    http::{Head, HeadLimits, HeadReader, date},
    policy::{
        Connection, Decision, ListenerId, Preflight, RouteId, RouteLabels,
        learned::{Answers, Learnable, Question},
    },
    reason::PassReason,
    telemetry::Status,
};
use exchange::{Reply, Way};
use learned::{AGAIN, Answer, Ask, Refusal};
use sampler::{Lots, MAX_SAMPLE, Sample};
use std::{
    collections::{HashMap, VecDeque},
    fmt, io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};
use tokio::{
    sync::{Notify, watch},
    task::JoinSet,
};

pub(crate) use learned::{Sizes, Store};
pub use sampler::Sampler;
pub(crate) use shadow::Shadow;

/// Questions that wait at most.
const QUEUE: usize = 256;
/// Questions that are asked at once.
const AT_ONCE: usize = 8;
/// A question that was not asked by then may be wanted anew.
const PATIENCE: Duration = Duration::from_secs(30);
/// New answers come into force at most so often.
const PUBLISH: Duration = Duration::from_millis(500);
/// A line about a proxy that cannot be asked at most this often.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// What the kernel shows of steered listeners, and where their proxy is.
#[derive(Default)]
pub struct Kernel {
    /// The proxy's namespace, and the ring that the program writes to.
    #[cfg(feature = "ebpf")]
    pub(crate) inside: Option<(crate::steer::netns::Netns, crate::steer::Samples)>,
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kernel").finish_non_exhaustive()
    }
}

/// Counted by several threads, seldom.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    /// Preflights that were shown.
    pub(crate) sampled: AtomicU64,
    /// Preflights that were to be, but there was no room, or questions for which there was none.
    pub(crate) dropped: AtomicU64,
    /// Questions that the proxy answered.
    pub(crate) answered: AtomicU64,
    /// Questions that it did not.
    pub(crate) failed: AtomicU64,
}

/// What others see of the asker.
#[derive(Debug)]
pub struct Shared {
    /// `None`: nothing is learned.
    store: Option<Mutex<Store>>,
    /// `None`: nothing is compared.
    shadow: Option<Mutex<Shadow>>,
    pub(crate) counters: Arc<Counters>,
    wake: Arc<Notify>,
    end: AtomicBool,
    /// What was purged must leave the table now.
    urgent: AtomicBool,
    answers: watch::Sender<Option<Arc<Answers>>>,
}

impl Shared {
    /// What was learned; `None`: nothing is.
    pub(crate) fn store(&self) -> Option<MutexGuard<'_, Store>> {
        self.store.as_ref().map(|store| store.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What was compared; `None`: nothing is.
    pub(crate) fn shadow(&self) -> Option<MutexGuard<'_, Shadow>> {
        self.shadow.as_ref().map(|shadow| shadow.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Forgets all that was learned, or all of a host, and has the table without it published at once. `None`: nothing is
    /// learned.
    pub(crate) fn purge(&self, host: Option<&str>) -> Option<usize> {
        let purged = self.store()?.purge(host);
        self.urgent.store(true, Ordering::Release);
        self.wake.notify_one();
        Some(purged)
    }
}

/// The empty set of answers of a configuration that learns; `None`: it does not. The hosts get their labels.
pub fn nothing_yet(config: &Config, labels: &mut RouteLabels) -> Option<Arc<Answers>> {
    if config.learn.hosts.is_empty() || config.shadow.enabled {
        return None;
    }
    let learnable = Learnable::new(&config.learn.listeners, &config.learn.hosts, labels);
    Some(Arc::new(Answers::new(Arc::new(learnable), Vec::new())))
}

/// What is there before the workers are.
pub struct Prepared {
    rings: Vec<rtrb::Consumer<Sample>>,
    counters: Arc<Counters>,
    wake: Arc<Notify>,
}

impl fmt::Debug for Prepared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Prepared").field("workers", &self.rings.len()).finish_non_exhaustive()
    }
}

/// Makes a sampler for each worker; `None`: this configuration asks nothing.
pub fn prepare(config: &Config, workers: usize) -> Option<(Prepared, Vec<Sampler>)> {
    if config.learn.hosts.is_empty() && !config.shadow.enabled {
        return None;
    }
    let (wake, counters) = (Arc::new(Notify::new()), Arc::new(Counters::default()));
    let share = config.shadow.enabled.then_some(config.shadow.sample);
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64);
    let (mut samplers, mut rings) = (Vec::new(), Vec::new());
    for worker in 0..workers as u64 {
        let seed = (seed ^ worker).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let lots = share.map(|share| Lots::new(share, seed));
        let (sampler, ring) = Sampler::new(wake.clone(), counters.clone(), lots);
        samplers.push(sampler);
        rings.push(ring);
    }
    Some((Prepared { rings, counters, wake }, samplers))
}

/// The running thread.
#[derive(Debug)]
pub struct Asker {
    thread: JoinHandle<()>,
    shared: Arc<Shared>,
}

impl Asker {
    /// Whether the thread has ended: before a shutdown that is a defect, for what was learned would hold for ever.
    pub fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }

    /// The answers that hold, whenever they change.
    pub fn answers(&self) -> watch::Receiver<Option<Arc<Answers>>> {
        self.shared.answers.subscribe()
    }

    /// Has the thread end. Does not wait for it.
    pub fn shutdown(&self) {
        self.shared.end.store(true, Ordering::Release);
        self.shared.wake.notify_one();
    }
}

impl Prepared {
    /// Starts the thread, which the status then shows. `learned`: as of [`nothing_yet`].
    ///
    /// # Errors
    /// The thread or its runtime cannot be made, or the kernel's ring cannot be watched.
    pub fn start(
        self,
        status: &Arc<Status>,
        learned: Option<&Arc<Answers>>,
        kernel: Kernel,
    ) -> io::Result<Asker> {
        let Self { rings, counters, wake } = self;
        let config = &status.config;
        let store =
            |empty: &Arc<Answers>| Store::new(Arc::clone(empty.learnable()), config.learn.max_entries);
        let store = learned.map(|empty| Mutex::new(store(empty)));
        let shadow = config.shadow.enabled.then(|| Mutex::new(Shadow::new(config.shadow.samples_kept)));
        let shared = Arc::new(Shared {
            store,
            shadow,
            counters,
            wake,
            end: AtomicBool::new(false),
            urgent: AtomicBool::new(false),
            answers: watch::Sender::new(learned.cloned()),
        });
        let ways = ways(config, &kernel);
        status.set_ask(Arc::clone(&shared));
        let room = Room {
            shared: Arc::clone(&shared),
            status: Arc::clone(status),
            ways,
            rings,
            queue: VecDeque::new(),
            later: VecDeque::new(),
            bucket: Bucket::new(config.ask.per_second, Instant::now()),
            timeout: config.ask.timeout,
            tasks: JoinSet::new(),
            published: Instant::now(),
            logged: None,
            lots: config.shadow.enabled.then(|| Lots::new(config.shadow.sample, 0x5851_f42d_4c95_7f2d)),
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = thread::Builder::new().name("ask".to_owned()).spawn(move || {
            let result = runtime.block_on(room.run(kernel));
            runtime.shutdown_background();
            if let Err(error) = result {
                tracing::error!(%error, "the thread that asks the proxy has ended");
            }
        })?;
        Ok(Asker { thread, shared })
    }
}

/// How the proxy of each listener is reached.
fn ways(config: &Config, kernel: &Kernel) -> HashMap<u16, Arc<Way>> {
    let upstreams = config.upstreams();
    let upstreams = upstreams.iter().map(|upstream| (upstream.listener.0, Way::upstream(upstream)));
    let beside = kernel.ways(config);
    upstreams.chain(beside).map(|(listener, way)| (listener, Arc::new(way))).collect()
}

impl Kernel {
    /// To the proxies that we run beside, by listener.
    #[cfg(feature = "ebpf")]
    fn ways(&self, config: &Config) -> Vec<(u16, Way)> {
        let Some((netns, _)) = &self.inside else { return Vec::new() };
        let steered = (0..).zip(&config.listeners).filter(|(_, listener)| listener.steer);
        steered.map(|(i, listener)| (i, Way::beside(netns.clone(), listener.address))).collect()
    }

    #[cfg(not(feature = "ebpf"))]
    #[expect(clippy::unused_self, reason = "as with eBPF")]
    fn ways(&self, _: &Config) -> Vec<(u16, Way)> {
        Vec::new()
    }
}

/// What a question is asked for.
enum Purpose {
    Learn(Ask),
    Compare { question: Arc<Question>, route: RouteId, ours: Vec<u8> },
}

impl Purpose {
    fn question(&self) -> &Arc<Question> {
        match self {
            Purpose::Learn(ask) => &ask.question,
            Purpose::Compare { question, .. } => question,
        }
    }
}

struct Done {
    purpose: Purpose,
    asked: Instant,
    result: io::Result<Reply>,
}

/// The thread's own.
struct Room {
    shared: Arc<Shared>,
    status: Arc<Status>,
    /// By listener.
    ways: HashMap<u16, Arc<Way>>,
    rings: Vec<rtrb::Consumer<Sample>>,
    queue: VecDeque<Purpose>,
    /// What is asked once more, and when.
    later: VecDeque<(Instant, Purpose)>,
    bucket: Bucket,
    timeout: Duration,
    tasks: JoinSet<Done>,
    published: Instant,
    logged: Option<Instant>,
    /// Which of the kernel's samples are compared; workers draw for themselves.
    lots: Option<Lots>,
}

impl Room {
    async fn run(mut self, kernel: Kernel) -> io::Result<()> {
        let mut kernel = Ring::new(kernel)?;
        loop {
            self.take_samples(&mut kernel);
            if self.shared.end.load(Ordering::Acquire) {
                return Ok(());
            }
            let next = self.work(Instant::now());
            let shared = Arc::clone(&self.shared);
            tokio::select! {
                () = shared.wake.notified() => {}
                () = kernel.readable() => {}
                Some(done) = self.tasks.join_next() => match done {
                    Ok(done) => self.done(done),
                    Err(error) => tracing::error!(%error, "a question was lost to a defect"),
                },
                () = tokio::time::sleep_until(next.into()) => {}
            }
        }
    }

    /// Takes what workers and the kernel have shown.
    fn take_samples(&mut self, kernel: &mut Ring) {
        let mut rings = std::mem::take(&mut self.rings);
        for ring in &mut rings {
            while let Ok(sample) = ring.pop() {
                self.sampled(sample.listener, sample.bytes());
            }
        }
        self.rings = rings;
        kernel.each(|listener, bytes| {
            if self.lots.as_mut().is_none_or(Lots::draw) {
                self.sampled(listener, bytes);
            }
        });
    }

    /// A preflight was shown: `bytes` begin with its head, if it is one.
    fn sampled(&mut self, listener: ListenerId, bytes: &[u8]) {
        let counters = &self.shared.counters;
        counters.sampled.fetch_add(1, Ordering::Relaxed);
        let limits = HeadLimits { max_bytes: self.status.config.limits.max_head_bytes.min(MAX_SAMPLE) };
        let Head::Preflight(head) = HeadReader::new().read(bytes, limits) else { return };
        let request = Preflight {
            listener,
            host: head.host,
            target: head.target,
            origin: head.origin,
            method: head.method,
            headers: &head.headers,
            private_network: head.private_network,
        };
        let Some(question) = Question::of(&request) else { return };
        if !self.ways.contains_key(&listener.0) {
            return;
        }
        if self.queue.len() >= QUEUE {
            counters.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let table = Arc::clone(&self.status.running().table);
        if let Some(mut shadow) = self.shared.shadow() {
            // In canonical form, as the proxy is asked: what differs is not the question.
            let headers: &[&[u8]] =
                if question.headers.is_empty() { &[] } else { &[question.headers.as_bytes()] };
            match table.decide(&Preflight { headers, ..request }) {
                Decision::Pass(_, route) => shadow.passed(route),
                Decision::Answer(answer) => {
                    let mut ours = Vec::with_capacity(answer.max_len());
                    answer.render(&date::imf_fixdate(0), Connection::KeepAlive, &mut ours);
                    let route = answer.route;
                    let question = Arc::new(question);
                    self.queue.push_back(Purpose::Compare { question, route, ours });
                }
            }
        } else if let Some(mut store) = self.shared.store()
            && matches!(table.decide(&request), Decision::Pass(PassReason::NotLearned, _))
        {
            let now = Instant::now();
            if let Some(ask) = store.wanted(question, now, now + PATIENCE) {
                self.queue.push_back(Purpose::Learn(ask));
            }
        }
    }

    /// Does what is due, and says when there will be more.
    fn work(&mut self, now: Instant) -> Instant {
        let mut next = now + Duration::from_hours(1);
        while let Some((due, _)) = self.later.front() {
            if *due > now {
                next = next.min(*due);
                break;
            }
            if let Some((_, purpose)) = self.later.pop_front() {
                self.queue.push_front(purpose);
            }
        }
        // The end of a task wakes us, too.
        while self.tasks.len() < AT_ONCE && !self.queue.is_empty() {
            if let Err(at) = self.bucket.take(now) {
                next = next.min(at);
                break;
            }
            if let Some(purpose) = self.queue.pop_front() {
                self.ask(purpose);
            }
        }
        if let Some(mut store) = self.shared.store() {
            next = next.min(store.expire(now).unwrap_or(next));
            let due = self.published + PUBLISH;
            if store.is_changed() && due > now && !self.shared.urgent.swap(false, Ordering::AcqRel) {
                next = next.min(due);
            } else if let Some(answers) = store.take_changed() {
                self.published = now;
                self.shared.answers.send_replace(Some(answers));
            }
        }
        next
    }

    fn ask(&mut self, purpose: Purpose) {
        let Some(way) = self.ways.get(&purpose.question().listener.0).cloned() else { return };
        let timeout = self.timeout;
        self.tasks.spawn(async move {
            let asked = Instant::now();
            let result = way.ask(purpose.question(), timeout).await;
            Done { purpose, asked, result }
        });
    }

    fn done(&mut self, done: Done) {
        let Done { purpose, asked, result } = done;
        let now = Instant::now();
        let counters = &self.shared.counters;
        match &result {
            Ok(_) => counters.answered.fetch_add(1, Ordering::Relaxed),
            Err(_) => counters.failed.fetch_add(1, Ordering::Relaxed),
        };
        if let Err(error) = &result {
            self.log(purpose.question(), error, now);
        }
        match purpose {
            Purpose::Learn(ask) => {
                let longest = self.status.config.learn.max_ttl;
                let answer =
                    result.map_err(|_| Refusal::Unreachable).and_then(|reply| Answer::of(&reply, longest));
                let again = self.shared.store().is_some_and(|mut store| store.told(&ask, answer, asked, now));
                if again {
                    self.later.push_back((now + AGAIN, Purpose::Learn(ask)));
                }
            }
            Purpose::Compare { question, route, ours } => {
                if let Some(mut shadow) = self.shared.shadow() {
                    let failed = result.as_ref().err().map(ToString::to_string).unwrap_or_default();
                    let theirs = result.as_ref().map(|reply| &*reply.head).map_err(|_| &*failed);
                    shadow.compare(&question, route, &ours, theirs);
                }
            }
        }
    }

    fn log(&mut self, question: &Question, error: &io::Error, now: Instant) {
        if self.logged.is_some_and(|at| now.saturating_duration_since(at) < LOG_EVERY) {
            return;
        }
        self.logged = Some(now);
        let listener = self.status.config.listeners.get(usize::from(question.listener.0));
        let listener = listener.map_or("", |listener| &listener.name);
        tracing::warn!(listener, %error, "cannot ask the proxy: is it running, and does it answer within ask.timeout?");
    }
}

/// So many questions a second, and as many at once after a pause.
struct Bucket {
    per_second: f64,
    tokens: f64,
    at: Instant,
}

impl Bucket {
    fn new(per_second: u32, at: Instant) -> Self {
        let per_second = f64::from(per_second.max(1));
        Self { per_second, tokens: per_second, at }
    }

    /// # Errors
    /// None is left: when there will be one.
    fn take(&mut self, now: Instant) -> Result<(), Instant> {
        let since = now.saturating_duration_since(self.at).as_secs_f64();
        self.tokens = (self.tokens + since * self.per_second).min(self.per_second);
        self.at = now;
        if self.tokens >= 1.0 {
            self.tokens -= 1.0;
            return Ok(());
        }
        Err(now + Duration::from_secs_f64((1.0 - self.tokens) / self.per_second))
    }
}

/// The kernel's ring, if there is one.
#[cfg(feature = "ebpf")]
struct Ring(Option<tokio::io::unix::AsyncFd<crate::steer::Samples>>);

#[cfg(feature = "ebpf")]
impl Ring {
    fn new(kernel: Kernel) -> io::Result<Self> {
        let Some((_, samples)) = kernel.inside else { return Ok(Self(None)) };
        // SAFETY: the samples own their descriptor, which stays open and the same until they are dropped.
        let watched = unsafe {
            tokio::io::unix::AsyncFd::register_with_interest(samples, tokio::io::Interest::READABLE)
        };
        watched.map(Some).map(Self).map_err(io::Error::from)
    }

    fn each(&mut self, sample: impl FnMut(ListenerId, &[u8])) {
        if let Some(watched) = &mut self.0 {
            watched.get_mut().each(sample);
        }
    }

    async fn readable(&mut self) {
        match &mut self.0 {
            Some(watched) => {
                // The ring is emptied before this is asked again; an error of the poll itself cannot come.
                if let Ok(mut ready) = watched.readable().await {
                    ready.clear_ready();
                }
            }
            None => std::future::pending().await,
        }
    }
}

#[cfg(not(feature = "ebpf"))]
struct Ring;

#[cfg(not(feature = "ebpf"))]
impl Ring {
    #[expect(clippy::unnecessary_wraps, reason = "as with eBPF")]
    fn new(_: Kernel) -> io::Result<Self> {
        Ok(Self)
    }

    #[expect(clippy::unused_self, reason = "as with eBPF")]
    fn each(&mut self, _: impl FnMut(ListenerId, &[u8])) {}

    async fn readable(&mut self) {
        std::future::pending::<()>().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_gives_so_many_a_second() {
        let start = Instant::now();
        let mut bucket = Bucket::new(4, start);
        let mut taken =
            |ms| (0..100).filter(|_| bucket.take(start + Duration::from_millis(ms)).is_ok()).count();
        assert_eq!([taken(0), taken(100), taken(250), taken(10_000)], [4, 0, 1, 4]);
        let mut empty = Bucket::new(2, start);
        while empty.take(start).is_ok() {}
        assert_eq!(empty.take(start), Err(start + Duration::from_millis(500)));
    }
}
