//! The API server: all objects that concern us, listed and watched, and what they come down to.
//!
//! A thread of its own, so that neither a large list nor a slow server holds up anything. What cannot be asked leaves the
//! last policies in force until they are stale; then they pass.

use super::{
    events,
    objects::{
        Gateway, GatewayClass, GlooTrafficPolicy, GrpcRoute, HttpRoute, Ingress, IngressClass, Key, Kind,
        ListenerSet, Meta, Namespace, Object, ReferenceGrant, Store, TrafficPolicy, World, XListenerSet,
        for_each_kind,
    },
    resolve::{Import, Imported, Resolver, Settings},
    state::State,
};
use crate::config::{Config, Kubernetes};
use ahash::AHashMap;
use futures_util::StreamExt as _;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{
    Api, Client,
    client::ClientBuilder,
    core::{DeserializeGuard, DynamicResourceScope},
    runtime::{
        WatchStreamExt as _,
        utils::Backoff,
        watcher::{self, Event},
    },
};
use serde::Deserialize;
use std::{
    borrow::Cow,
    fmt, io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    thread,
    time::{Duration, Instant},
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
    time::{MissedTickBehavior, interval, sleep_until, timeout},
};
use tower_layer::Layer;
use tower_service::Service;
use tracing::{info, warn};

/// Changes are awaited this long after one, and in all so long, before everything is resolved anew.
const QUIET: Duration = Duration::from_millis(5);
const LATEST: Duration = Duration::from_millis(200);
/// How often the server is asked whether it is there, and how long it may take.
const ASK: Duration = Duration::from_secs(15);
const ANSWER: Duration = Duration::from_secs(5);
/// Between attempts.
const SHORTEST: Duration = Duration::from_millis(200);
const LONGEST: Duration = Duration::from_secs(10);
/// The server ends each watch after so long, and a connection without a byte for longer is dead.
const WATCH: u32 = 50;
const SILENCE: Duration = Duration::from_secs(80);
/// Objects in one answer to a list.
const PAGE: u32 = 500;

/// Why there is no source.
#[derive(Debug)]
pub struct Error(String);

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

/// The source at work; ends when dropped.
#[derive(Debug)]
pub struct Source {
    state: watch::Receiver<Arc<State>>,
    _stop: oneshot::Sender<()>,
}

impl Source {
    /// Begins. Returns at once, whatever the server does.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn start(config: &Config) -> io::Result<Self> {
        let (tell, state) = watch::channel(Arc::new(State::default()));
        let (stop, stopped) = oneshot::channel();
        let (kubernetes, settings) = (config.kubernetes.clone(), config.resolve_settings(None));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        thread::Builder::new().name("kubernetes".to_owned()).spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    () = serve(kubernetes, settings, tell) => {}
                    // Also when the sender is gone.
                    _ = stopped => {}
                }
            });
        })?;
        Ok(Self { state, _stop: stop })
    }

    /// What is known now, and later.
    pub fn state(&self) -> watch::Receiver<Arc<State>> {
        self.state.clone()
    }
}

/// All objects of a cluster, once.
///
/// # Errors
/// The server cannot be reached, or does not allow it.
pub fn list(kubernetes: &Kubernetes) -> Result<World, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Error(format!("cannot start a runtime: {e}")))?;
    runtime.block_on(async {
        let client = connect(kubernetes, &Seen::default()).await?;
        let mut world = World::default();
        macro_rules! all {
            ($name:ident) => {
                list_kind::<$name>(&api(&client), &mut world).await?;
            };
        }
        for_each_kind!(all);
        Ok(world)
    })
}

async fn list_kind<K: Kind>(api: &Api<DeserializeGuard<Wire<K>>>, world: &mut World) -> Result<(), Error> {
    let mut params = kube::api::ListParams::default().limit(PAGE);
    loop {
        let page = match api.list(&params).await {
            Ok(page) => page,
            Err(error) if is_absent(&error) => return Ok(()),
            Err(error) => return Err(Error(format!("cannot list {}: {}", K::PLURAL, words(&error)))),
        };
        for found in page.items {
            add(world, found);
        }
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params = params.continue_token(&token),
            None => return Ok(()),
        }
    }
}

/// How the server is reached.
async fn connect(kubernetes: &Kubernetes, seen: &Seen) -> Result<Client, Error> {
    let options = kube::config::KubeConfigOptions {
        context: (!kubernetes.context.is_empty()).then(|| kubernetes.context.clone()),
        ..Default::default()
    };
    let config = if !kubernetes.kubeconfig.is_empty() {
        let file = kube::config::Kubeconfig::read_from(&kubernetes.kubeconfig);
        match file {
            Ok(file) => kube::Config::from_custom_kubeconfig(file, &options).await,
            Err(error) => Err(error),
        }
        .map_err(|e| format!("cannot use the kubeconfig {}: {e}", kubernetes.kubeconfig))
    } else if !kubernetes.context.is_empty() {
        kube::Config::from_kubeconfig(&options).await.map_err(|e| format!("cannot use the kubeconfig: {e}"))
    } else {
        kube::Config::infer().await.map_err(|e| {
            format!("neither a pod's service account nor a kubeconfig says where the API server is: {e}")
        })
    };
    let mut config = config.map_err(Error)?;
    config.connect_timeout = Some(ANSWER);
    config.read_timeout = Some(SILENCE);
    let client = ClientBuilder::try_from(config)
        .map_err(|e| Error(format!("cannot make a client for the API server: {e}")))?;
    Ok(client.with_layer(seen).build())
}

/// An object as the server sends it.
#[derive(Clone, Debug, Deserialize)]
#[serde(bound = "")]
struct Wire<K: Kind> {
    metadata: ObjectMeta,
    spec: Option<K::Spec>,
    status: Option<K::Status>,
}

impl<K: Kind> kube::Resource for Wire<K> {
    type DynamicType = ();
    type Scope = DynamicResourceScope;
    fn kind((): &()) -> Cow<'_, str> {
        K::KIND.into()
    }
    fn group((): &()) -> Cow<'_, str> {
        K::GROUP.into()
    }
    fn version((): &()) -> Cow<'_, str> {
        K::VERSION.into()
    }
    fn plural((): &()) -> Cow<'_, str> {
        K::PLURAL.into()
    }
    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }
    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

/// What is read of metadata.
fn meta(full: ObjectMeta) -> Meta {
    let mut annotations = full.annotations.unwrap_or_default();
    // kubectl's copy of the object.
    annotations.remove("kubectl.kubernetes.io/last-applied-configuration");
    Meta {
        name: full.name.unwrap_or_default(),
        namespace: full.namespace.unwrap_or_default(),
        labels: full.labels.unwrap_or_default(),
        annotations,
        creation_timestamp: full.creation_timestamp.map(|time| time.0.to_string()).unwrap_or_default(),
        uid: full.uid.unwrap_or_default(),
        generation: full.generation.unwrap_or_default(),
    }
}

/// An object, or why it cannot be read.
type Found<K> = Result<Object<K>, Box<(Meta, String)>>;

fn found<K: Kind>(guard: DeserializeGuard<Wire<K>>) -> Found<K> {
    match guard.0 {
        Ok(Wire { metadata, spec, status }) => Ok(Object {
            meta: meta(metadata),
            spec: spec.unwrap_or_default(),
            status: status.unwrap_or_default(),
        }),
        Err(invalid) => Err(Box::new((meta(invalid.metadata), invalid.error))),
    }
}

/// Puts an object into the world; false: it is as it was, as far as it concerns us.
fn put<K: Kind>(world: &mut World, found: Found<K>) -> bool {
    match found {
        Ok(object) => {
            let key = object.key();
            let readable = world.unreadable.remove(&(K::KIND, key.clone())).is_none();
            let store = K::of_mut(world);
            if let Some(known) = store.get(&key) {
                let same = |a: &Meta, b: &Meta| {
                    (&a.labels, &a.annotations, &a.creation_timestamp)
                        == (&b.labels, &b.annotations, &b.creation_timestamp)
                };
                if readable
                    && known.spec == object.spec
                    && known.status == object.status
                    && same(&known.meta, &object.meta)
                {
                    return false;
                }
            }
            store.insert(key, Arc::new(object));
        }
        Err(unreadable) => {
            let (meta, error) = *unreadable;
            let key = Key::new(&meta.namespace, &meta.name);
            K::of_mut(world).remove(&key);
            world.unreadable.insert((K::KIND, key), error);
        }
    }
    true
}

fn add<K: Kind>(world: &mut World, guard: DeserializeGuard<Wire<K>>) {
    put(world, found(guard));
}

/// Objects of all namespaces: what is not wanted has its hosts and paths all the same.
fn api<K: Kind>(client: &Client) -> Api<DeserializeGuard<Wire<K>>> {
    Api::all_with(client.clone(), &())
}

/// When the server has begun to answer a request well, by its path.
#[derive(Clone, Debug, Default)]
struct Seen(Arc<Mutex<AHashMap<String, Instant>>>);

impl Seen {
    fn since(&self, path: &str, when: Instant) -> bool {
        let seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        seen.get(path).is_some_and(|at| *at > when)
    }
}

/// Notes which requests are answered: a watch that goes on after an error says nothing until something changes.
impl<S> Layer<S> for Seen {
    type Service = Noting<S>;
    fn layer(&self, inner: S) -> Noting<S> {
        Noting { inner, seen: self.clone() }
    }
}

/// A client that notes in [`Seen`].
#[derive(Clone, Debug)]
struct Noting<S> {
    inner: S,
    seen: Seen,
}

impl<S, B, R> Service<http::Request<B>> for Noting<S>
where
    S: Service<http::Request<B>, Response = http::Response<R>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let (path, seen) = (request.uri().path().to_owned(), self.seen.clone());
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await?;
            if answer.status().is_success() {
                seen.0.lock().unwrap_or_else(PoisonError::into_inner).insert(path, Instant::now());
            }
            Ok(answer)
        })
    }
}

fn is_absent(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404)
}

/// An error with its causes.
fn words(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// What a watch tells.
enum Told {
    /// A change of the world; true: it concerns us.
    Change(Box<dyn FnOnce(&mut World) -> bool + Send>),
    /// All objects of a kind have been listed; of a stream, which has this number.
    Listed(Stream),
    /// The kind is not known to the server.
    Absent(Stream),
    Failed(Stream, String),
}

/// A watch: its kind.
type Stream = &'static str;

/// Pauses between attempts: twice as long each time, a little different for each of us.
struct Pauses(Duration);

impl Iterator for Pauses {
    type Item = Duration;
    fn next(&mut self) -> Option<Duration> {
        let pause = self.0;
        self.0 = (pause * 2).min(LONGEST);
        let parts = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |now| now.subsec_nanos());
        Some(pause.mul_f64(0.75 + f64::from(parts % 1000) / 4000.0))
    }
}

impl Backoff for Pauses {
    fn reset(&mut self) {
        self.0 = SHORTEST;
    }
}

/// Watches one kind for ever; lists it anew every `resync`.
async fn follow<K: Kind>(api: Api<DeserializeGuard<Wire<K>>>, resync: Duration, tell: mpsc::Sender<Told>) {
    let stream = K::KIND;
    loop {
        let config = watcher::Config::default().timeout(WATCH).page_size(PAGE);
        let mut events = watcher::watcher(api.clone(), config).backoff(Pauses(SHORTEST)).boxed();
        let mut listed: Vec<Found<K>> = Vec::new();
        let until = tokio::time::Instant::now() + resync;
        loop {
            let event = tokio::select! {
                event = events.next() => event,
                () = sleep_until(until) => break,
            };
            let told = match event {
                None => break,
                Some(Ok(Event::Init)) => {
                    listed.clear();
                    continue;
                }
                Some(Ok(Event::InitApply(object))) => {
                    listed.push(found(object));
                    continue;
                }
                Some(Ok(Event::InitDone)) => {
                    let all = std::mem::take(&mut listed);
                    let change = move |world: &mut World| replace(world, all);
                    if tell.send(Told::Change(Box::new(change))).await.is_err() {
                        return;
                    }
                    Told::Listed(stream)
                }
                Some(Ok(Event::Apply(object))) => {
                    let object = found(object);
                    Told::Change(Box::new(move |world| put(world, object)))
                }
                Some(Ok(Event::Delete(object))) => {
                    let meta = match found(object) {
                        Ok(object) => object.meta,
                        Err(unreadable) => unreadable.0,
                    };
                    let key = Key::new(&meta.namespace, &meta.name);
                    Told::Change(Box::new(move |world| {
                        let unreadable = world.unreadable.remove(&(K::KIND, key.clone())).is_some();
                        K::of_mut(world).remove(&key).is_some() || unreadable
                    }))
                }
                Some(Err(watcher::Error::InitialListFailed(error))) if is_absent(&error) => {
                    let change = move |world: &mut World| replace::<K>(world, Vec::new());
                    if tell.send(Told::Change(Box::new(change))).await.is_err() {
                        return;
                    }
                    Told::Absent(stream)
                }
                Some(Err(error)) => Told::Failed(stream, words(&error)),
            };
            if tell.send(told).await.is_err() {
                return;
            }
        }
    }
}

/// Puts a whole list in the place of what was there before.
fn replace<K: Kind>(world: &mut World, all: Vec<Found<K>>) -> bool {
    let mut gone: Store<K> = K::of(world).clone();
    let before = world.unreadable.len();
    world.unreadable.retain(|(kind, _), _| *kind != K::KIND);
    let mut changed = before != world.unreadable.len();
    for found in all {
        let key = match &found {
            Ok(object) => object.key(),
            Err(unreadable) => Key::new(&unreadable.0.namespace, &unreadable.0.name),
        };
        gone.remove(&key);
        changed |= put(world, found);
    }
    for key in gone.keys() {
        K::of_mut(world).remove(key);
        changed = true;
    }
    changed
}

/// A stream that does not do what it should.
struct Trouble {
    last: Instant,
    why: String,
}

/// The source's own task.
async fn serve(kubernetes: Kubernetes, settings: Settings, tell: watch::Sender<Arc<State>>) {
    let mut state = State::default();
    let seen = Seen::default();
    let client = loop {
        match connect(&kubernetes, &seen).await {
            Ok(client) => break client,
            Err(error) => {
                if state.failing.is_empty() {
                    warn!("no policies from Kubernetes: {error}");
                }
                state.failing = vec![("configuration", error.to_string())];
                tell.send_replace(Arc::new(state.clone()));
                tokio::time::sleep(LONGEST).await;
            }
        }
    };
    state.failing.clear();
    let (sender, mut told) = mpsc::channel(1024);
    let mut waiting: Vec<Stream> = Vec::new();
    let mut paths = AHashMap::new();
    // Whatever ends of these ends all: half of the objects mean something else than all of them.
    let mut tasks = JoinSet::new();
    macro_rules! watch {
        ($name:ident) => {
            let api = api::<$name>(&client);
            waiting.push($name::KIND);
            paths.insert($name::KIND, api.resource_url().to_owned());
            tasks.spawn(follow::<$name>(api, kubernetes.resync, sender.clone()));
        };
    }
    for_each_kind!(watch);
    let mut source = Watched {
        world: World::default(),
        resolver: Resolver::default(),
        settings,
        stale_after: kubernetes.stale_after,
        waiting,
        seen,
        paths,
        troubles: AHashMap::new(),
        absent: Vec::new(),
        answered: None,
        state,
        tell,
        teller: kubernetes.events.then(|| events::Teller::start(client.clone())),
        untold: false,
    };
    let (alive, mut lives) = mpsc::channel(1);
    tasks.spawn(async move {
        // Asks for something that it must look up, with our own rights: not only whether anybody is there.
        let api = api::<Namespace>(&client);
        let one = kube::api::ListParams::default().limit(1);
        let mut ticks = interval(ASK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let result = match timeout(ANSWER, api.list(&one)).await {
                Ok(Ok(_)) => Ok(()),
                Ok(Err(error)) => Err(words(&error)),
                Err(_) => Err("it does not answer in time".to_owned()),
            };
            if alive.send(result).await.is_err() {
                return;
            }
        }
    });
    let mut ticks = interval(Duration::from_secs(1));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // When the first unresolved change came, and when it is resolved.
    let mut due: Option<(Instant, Instant)> = None;
    loop {
        let at = due.map(|(_, at)| tokio::time::Instant::from_std(at));
        tokio::select! {
            Some(told) = told.recv() => {
                if source.take(told) {
                    let now = Instant::now();
                    let first = due.map_or(now, |(first, _)| first);
                    due = Some((first, (now + QUIET).min(first + LATEST)));
                }
            }
            Some(alive) = lives.recv() => source.alive(alive),
            Some(_) = tasks.join_next() => return,
            () = async { match at { Some(at) => sleep_until(at).await, None => std::future::pending().await } } => {
                due = None;
                source.resolve();
            }
            _ = ticks.tick() => source.tick(),
        }
    }
}

/// Everything that is known.
struct Watched {
    world: World,
    resolver: Resolver,
    settings: Settings,
    stale_after: Duration,
    /// Not listed yet.
    waiting: Vec<Stream>,
    /// What was answered, by paths; and those of the watches.
    seen: Seen,
    paths: AHashMap<Stream, String>,
    troubles: AHashMap<Stream, Trouble>,
    absent: Vec<Stream>,
    /// When the server answered the last time, with anything.
    answered: Option<Instant>,
    state: State,
    tell: watch::Sender<Arc<State>>,
    teller: Option<events::Teller>,
    /// Findings that may not have been told.
    untold: bool,
}

impl Watched {
    /// Takes what a watch tells; true: everything must be resolved anew.
    fn take(&mut self, told: Told) -> bool {
        match told {
            Told::Change(change) => {
                self.answered = Some(Instant::now());
                // Before all is there, what is there may mean something else.
                change(&mut self.world) && self.waiting.is_empty()
            }
            Told::Listed(stream) => {
                self.absent.retain(|absent| *absent != stream);
                self.troubles.remove(&stream);
                self.arrived(stream)
            }
            Told::Absent(stream) => {
                self.answered = Some(Instant::now());
                self.troubles.remove(&stream);
                if !self.absent.contains(&stream) {
                    self.absent.push(stream);
                }
                self.arrived(stream)
            }
            Told::Failed(stream, why) => {
                let kind = stream;
                match self.state.failures.iter_mut().find(|(known, _)| *known == kind) {
                    Some((_, count)) => *count += 1,
                    None => self.state.failures.push((kind, 1)),
                }
                if !self.troubles.contains_key(&stream) {
                    warn!(kind, "cannot watch: {why}");
                }
                self.troubles.insert(stream, Trouble { last: Instant::now(), why });
                false
            }
        }
    }

    fn arrived(&mut self, stream: Stream) -> bool {
        let before = self.waiting.len();
        self.waiting.retain(|waiting| *waiting != stream);
        before > 0 && self.waiting.is_empty()
    }

    /// Takes the answer to whether the server is there.
    fn alive(&mut self, alive: Result<(), String>) {
        const SERVER: Stream = "server";
        match alive {
            Ok(()) => {
                self.answered = Some(Instant::now());
                self.troubles.remove(&SERVER);
            }
            Err(why) => {
                if !self.troubles.contains_key(&SERVER) {
                    warn!("the API server cannot be asked: {why}");
                }
                self.troubles.insert(SERVER, Trouble { last: Instant::now(), why });
            }
        }
    }

    fn tick(&mut self) {
        if self.untold
            && let Some(teller) = &mut self.teller
        {
            self.untold = !teller.tell(&self.state.findings);
        }
        let now = Instant::now();
        let answers = self.answered.is_some_and(|at| now.duration_since(at) < 2 * ASK + ANSWER);
        let (seen, paths) = (&self.seen, &self.paths);
        self.troubles
            .retain(|stream, trouble| !paths.get(stream).is_some_and(|path| seen.since(path, trouble.last)));
        if answers && self.troubles.is_empty() && self.waiting.is_empty() {
            self.state.fresh = Some(now);
        }
        let stale = self.state.synced
            && self.state.fresh.is_none_or(|fresh| now.duration_since(fresh) > self.stale_after);
        if stale != self.state.stale {
            if stale {
                warn!(after = ?self.stale_after, "the policies of Kubernetes are stale: their preflights go to the proxy");
            } else {
                info!("the policies of Kubernetes are fresh again");
            }
            self.state.stale = stale;
            self.state.revision += 1;
        }
        self.publish();
    }

    fn resolve(&mut self) {
        let start = Instant::now();
        let Import { policies, findings } = self.resolver.resolve(&self.world, &self.settings);
        self.state.resolving = start.elapsed();
        let first = !self.state.synced;
        self.state.synced = true;
        if first {
            self.state.fresh = Some(start);
        }
        if self.state.findings[..] != findings[..] {
            self.state.findings = findings.into();
            self.untold = true;
        }
        if first || !same(&self.state.policies, &policies) {
            self.state.policies = policies.into();
            self.state.revision += 1;
        }
        if first {
            info!(
                policies = self.state.policies.len(),
                findings = self.state.findings.len(),
                resolving = ?self.state.resolving,
                "all objects of Kubernetes are listed"
            );
        }
        self.publish();
    }

    fn publish(&mut self) {
        self.state.objects = self.world.counts();
        let failing = self.troubles.iter().map(|(kind, trouble)| (*kind, trouble.why.clone()));
        self.state.failing = failing.collect();
        self.state.failing.sort();
        self.state.absent.clone_from(&self.absent);
        self.tell.send_replace(Arc::new(self.state.clone()));
    }
}

/// Whether nothing has changed that the table would see.
fn same(before: &[Imported], after: &[Imported]) -> bool {
    let equal = |(a, b): (&Imported, &Imported)| {
        a.cors == b.cors
            && a.object == b.object
            && a.spec.name == b.spec.name
            && a.spec.listeners == b.spec.listeners
            && a.spec.hosts == b.spec.hosts
            && a.spec.paths == b.spec.paths
            && a.spec.for_methods == b.spec.for_methods
            && a.spec.passes == b.spec.passes
            && a.spec.on_denied == b.spec.on_denied
    };
    before.len() == after.len() && before.iter().zip(after).all(equal)
}
