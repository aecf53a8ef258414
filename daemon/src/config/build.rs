//! From shapes to a configuration: what concerns several values at once, and where policies come from.

use super::{
    Alone, Config, Diagnostic, Listener, Loaded, raw,
    source::{At, Problem, Source, Step, did_you_mean, shape, take_tables},
};
use crate::{
    policy::{
        Finding, HostPattern, ListenerId, PathMatch, PolicySpec, Severity, SourceRef,
        dialect::{self, Rules},
    },
    reason::PassReason,
    relay::ProxyProtocol,
    sources::kubernetes::{
        manifests,
        objects::World,
        resolve::{GatewayDialect, Resolver},
    },
};
use ahash::{AHashMap, AHashSet};
use std::{
    fs, io,
    net::SocketAddr,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

/// More listeners than this are a slip.
const MAX_LISTENERS: usize = 1024;

/// Where the policies of a configuration were written.
#[derive(Debug, Default)]
pub(super) struct Origins {
    sources: Vec<Source>,
    /// One for each policy of the configuration.
    places: Vec<Place>,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    source: usize,
    /// Position among the file's policies.
    index: usize,
    block: Option<&'static str>,
}

pub(super) fn load(path: &Path) -> io::Result<Loaded> {
    let name = path.display().to_string();
    let mut build = Build { files: vec![path.to_owned()], ..Build::default() };
    let root = build.config_file(Source::new(&name, read(path)?));
    if let Some(root) = &root {
        build.follow(root, path.parent().unwrap_or(Path::new("")));
    }
    Ok(build.finish(root.map(|root| root.config)))
}

pub(super) fn load_text(name: &str, text: &str) -> Loaded {
    let mut build = Build::default();
    let root = build.config_file(Source::new(name, text));
    build.finish(root.map(|root| root.config))
}

pub(super) fn load_policies(mut base: Config, files: &[PathBuf], alone: Alone) -> io::Result<Loaded> {
    let mut build = Build { files: files.to_vec(), ..Build::default() };
    for path in files {
        build.policies_in(path, read(path)?);
    }
    if let Alone::Yes(manifests) = alone {
        base.kubernetes.gateway_classes = manifests.gateway_classes;
        base.kubernetes.ingress_classes = manifests.ingress_classes;
        build.assume = manifests.dialect;

        let named = build.policies.iter().flat_map(|p| p.raw.listeners.iter().cloned());
        let mut names: Vec<String> = std::iter::once("default".to_owned()).chain(named).collect();
        let mut seen = AHashSet::new();
        names.retain(|name| seen.insert(name.clone()));
        names.truncate(MAX_LISTENERS);
        let anywhere = SocketAddr::from(([0, 0, 0, 0], 0));
        base.listeners = names.iter().map(|name| Listener::new(name, anywhere, None)).collect();
    }
    Ok(build.finish(Some(base)))
}

impl Origins {
    /// The lines of what the table found.
    pub(super) fn diagnostics(
        &self,
        policies: &[PolicySpec],
        findings: Vec<(SourceRef, Finding)>,
    ) -> Vec<Diagnostic> {
        if findings.is_empty() {
            return Vec::new();
        }
        let by_line: AHashMap<(&str, u32), &Place> = policies
            .iter()
            .zip(&self.places)
            .map(|(policy, place)| ((&*policy.source.origin, policy.source.line), place))
            .collect();
        let mut problems = vec![Vec::new(); self.sources.len()];
        let mut placeless = Vec::new();
        for (source, finding) in findings {
            match by_line.get(&(&*source.origin, source.line)) {
                Some(place) => problems[place.source].push(place.problem(finding)),
                None => placeless.push(Diagnostic {
                    line: source.line,
                    ..Diagnostic::of_file(
                        finding.severity,
                        finding.code,
                        &source.origin,
                        finding.message,
                        finding.help,
                    )
                }),
            }
        }
        in_order(&self.sources, problems).chain(placeless).collect()
    }
}

/// A warning about a key of a listener of the configuration file.
pub(super) fn listener_warning(
    origins: &Origins,
    listener: usize,
    key: &'static str,
    code: &'static str,
    message: String,
    help: &str,
) -> Option<Diagnostic> {
    let path = vec![Step::Key("listener".into()), Step::Item(listener), Step::Key(key.into())];
    let problem = Problem::warning(code, At::Path(path), message, help);
    origins.sources.first()?.diagnostics(vec![problem]).pop()
}

impl Place {
    fn at(self, steps: impl IntoIterator<Item = Step>) -> At {
        let mut path = vec![Step::Key("policy".into()), Step::Item(self.index)];
        path.extend(steps);
        At::Path(path)
    }

    /// A finding of the engine: its field is a key of the block, or of the policy itself.
    fn problem(self, finding: Finding) -> Problem {
        let block = self.block.map(Step::Maybe);
        let steps = match finding.field {
            "" => vec![],
            "name" | "listeners" | "hosts" | "paths" | "enabled" | "for_methods" | "on_denied" => {
                vec![Step::Key(finding.field.into())]
            }
            field => block.into_iter().chain([Step::Key(field.into())]).collect(),
        };
        Problem {
            severity: finding.severity,
            code: finding.code,
            at: self.at(steps.into_iter().chain(finding.item.map(Step::Item))),
            message: finding.message,
            help: finding.help,
        }
    }
}

/// A configuration in the making.
#[derive(Default)]
struct Build {
    sources: Vec<Source>,
    problems: Vec<Vec<Problem>>,
    policies: Vec<ReadPolicy>,
    files: Vec<PathBuf>,
    /// Of manifests.
    world: World,
    assume: GatewayDialect,
    /// Findings about files that are no TOML.
    others: Vec<Diagnostic>,
}

struct ReadPolicy {
    raw: raw::Policy,
    /// No part of it had to be left out: what is missing, is missing.
    whole: bool,
    line: u32,
    place: Place,
}

/// The configuration file without its policies.
struct Root {
    config: Config,
    policy_dir: String,
    policy_files: Vec<String>,
}

impl Build {
    fn add(&mut self, source: Source) -> usize {
        self.sources.push(source);
        self.problems.push(Vec::new());
        self.sources.len() - 1
    }

    /// Reads the configuration file. `None`: it is no TOML.
    fn config_file(&mut self, source: Source) -> Option<Root> {
        let text = source.clone();
        let index = self.add(source);
        let mut problems = Vec::new();
        let root = text.root(&mut problems).map(|mut table| {
            let listeners = take_tables(&mut table, "listener").unwrap_or_default();
            self.policies_of(index, &mut table, &mut problems);
            let (root, whole) = shape::<raw::Root>(table, &(0..0), &mut problems);
            if whole {
                check_numbers(&root, &mut problems);
            }
            let listeners = self::listeners(listeners, &mut problems);
            if whole {
                check_steer(&root.steer, &listeners, &mut problems);
                check_asking(&root, &listeners, &mut problems);
            }
            let learn = learn(root.learn, &listeners, &mut problems);
            let config = Config {
                workers: root.workers,
                limits: root.limits,
                relay: root.relay,
                steer: root.steer,
                ask: root.ask,
                learn,
                shadow: root.shadow,
                admin: root.admin,
                log: root.log,
                kubernetes: root.kubernetes,
                ..Config::of_listeners(listeners)
            };
            Root { config, policy_dir: root.policy_dir, policy_files: root.policy_files }
        });
        self.problems[index].append(&mut problems);
        root
    }

    /// A policy file, or a manifest.
    fn policies_in(&mut self, path: &Path, text: Arc<str>) {
        let name = path.display().to_string();
        if !manifests::is_manifest(path) {
            self.policy_file(Source::new(&name, text));
            return;
        }
        let (severity, message, help) = match manifests::read(&text, &mut self.world) {
            Ok(read) if read.objects > 0 => return,
            Ok(read) => (
                Severity::Warning,
                format!("no object in it says anything about preflights ({} of other kinds)", read.others),
                "name manifests of HTTPRoutes, TrafficPolicies or Ingresses",
            ),
            Err(error) => (Severity::Error, error, "write it as `kubectl apply -f` takes it"),
        };
        self.others.push(Diagnostic::of_file(severity, "manifest", &name, message, help.to_owned()));
    }

    fn policy_file(&mut self, source: Source) {
        let text = source.clone();
        let index = self.add(source);
        let mut problems = Vec::new();
        if let Some(mut table) = text.root(&mut problems) {
            self.policies_of(index, &mut table, &mut problems);
            shape::<raw::PolicyRoot>(table, &(0..0), &mut problems);
        }
        self.problems[index].append(&mut problems);
    }

    fn policies_of(&mut self, source: usize, table: &mut toml::de::DeTable<'_>, problems: &mut Vec<Problem>) {
        for (index, (span, table)) in take_tables(table, "policy").unwrap_or_default().into_iter().enumerate()
        {
            let dialect = |raw: &raw::Policy| {
                [
                    ("gateway-api", raw.gateway_api.is_some()),
                    ("ingress-nginx", raw.ingress_nginx.is_some()),
                    ("envoy", raw.envoy.is_some()),
                ]
                .into_iter()
                .find_map(|(name, set)| set.then_some(name))
            };
            let line = self.sources[source].line(span.start);
            let (raw, whole) = shape::<raw::Policy>(table, &span, problems);
            let block = dialect(&raw);
            self.policies.push(ReadPolicy { raw, whole, line, place: Place { source, index, block } });
        }
    }

    /// Reads `policy_files`, then `policy_dir`; both relative to the configuration file.
    fn follow(&mut self, root: &Root, base: &Path) {
        for (i, file) in root.policy_files.iter().enumerate() {
            let at = At::Path(vec![Step::Key("policy_files".into()), Step::Item(i)]);
            self.policy_path(&base.join(file), &at);
        }
        if root.policy_dir.is_empty() {
            return;
        }
        let dir = base.join(&root.policy_dir);
        self.files.push(dir.clone());
        let at = At::Path(vec![Step::Key("policy_dir".into())]);
        match policy_files_in(&dir) {
            Ok(files) => {
                for file in files {
                    self.policy_path(&file, &at);
                }
            }
            Err(e) => self.unreadable(format!("cannot read the directory {}: {e}", dir.display()), at),
        }
    }

    fn policy_path(&mut self, path: &Path, at: &At) {
        self.files.push(path.to_owned());
        match read(path) {
            Ok(text) => self.policies_in(path, text),
            Err(e) => self.unreadable(e.to_string(), at.clone()),
        }
    }

    fn unreadable(&mut self, message: String, at: At) {
        let help = "paths are relative to the configuration file";
        self.problems[0].push(Problem::error("unreadable", at, message, help));
    }

    /// Checks the policies against each other and the listeners.
    fn finish(mut self, config: Option<Config>) -> Loaded {
        let listeners = config.as_ref().map_or(&[][..], |c| &c.listeners);
        let (policies, places) = self.policy_specs(listeners);
        if config.as_ref().is_some_and(|config| config.learn.hosts.is_empty())
            && self.policies.is_empty()
            && self.world.is_empty()
            && config.as_ref().is_none_or(|config| !config.kubernetes.enabled)
            && self.problems.iter().flatten().all(|p| p.severity == Severity::Warning)
            && let Some(problems) = self.problems.first_mut()
        {
            let help = "add a [[policy]], or name files in policy_files or policy_dir";
            let message = "no policies: every request goes to the upstream";
            problems.push(Problem::warning("no-policies", At::Span(0..0), message, help));
        }
        let mut diagnostics: Vec<_> = in_order(&self.sources, self.problems).chain(self.others).collect();
        let refused = diagnostics.iter().any(Diagnostic::is_error);
        let mut policies = policies;
        let mut imported = Vec::new();
        if let Some(config) = &config
            && !self.world.is_empty()
        {
            let settings = config.resolve_settings(Some(self.assume));
            let import = Resolver::default().resolve(&self.world, &settings);
            // What is wrong in an object makes its preflights pass, and refuses nothing.
            diagnostics.extend(import.findings.iter().map(Diagnostic::of_object));
            policies.extend(import.policies.iter().map(|policy| policy.spec.clone()));
            imported = import.policies;
        }
        Loaded {
            config: config.filter(|_| !refused).map(|config| Config { policies: policies.into(), ..config }),
            diagnostics,
            files: self.files,
            imported,
            origins: Origins { sources: self.sources, places },
        }
    }

    fn policy_specs(&mut self, listeners: &[Listener]) -> (Vec<PolicySpec>, Vec<Place>) {
        let numbers: AHashMap<&str, ListenerId> =
            listeners.iter().enumerate().map(|(i, l)| (&*l.name, ListenerId(i as u16))).collect();
        let bases: AHashMap<&str, &ReadPolicy> = if self.policies.iter().any(|p| p.raw.inherit.is_some()) {
            self.policies.iter().filter_map(|p| Some((&*p.raw.name.as_ref()?.0, p))).collect()
        } else {
            AHashMap::new()
        };
        let mut names = AHashMap::with_capacity(self.policies.len());
        let mut specs = Vec::with_capacity(self.policies.len());
        let mut places = Vec::with_capacity(self.policies.len());
        for policy in &self.policies {
            let problems = &mut self.problems[policy.place.source];
            let origin = self.sources[policy.place.source].name.clone();
            let source = SourceRef { origin, line: policy.line };
            if let Some(spec) = policy.spec(source, &numbers, &bases, &mut names, problems) {
                specs.push(spec);
                places.push(policy.place);
            }
        }
        (specs, places)
    }
}

impl ReadPolicy {
    fn spec<'a>(
        &'a self,
        source: SourceRef,
        listeners: &AHashMap<&str, ListenerId>,
        bases: &AHashMap<&str, &ReadPolicy>,
        names: &mut AHashMap<&'a str, SourceRef>,
        problems: &mut Vec<Problem>,
    ) -> Option<PolicySpec> {
        let raw = &self.raw;
        let place = self.place;
        let key = |name: &'static str| place.at([Step::Key(name.into())]);
        let before = problems.len();
        match &raw.name {
            None if self.whole => problems.push(Problem::error(
                "missing-key",
                place.at([]),
                "this policy has no name",
                "add a name of its own: name = \"api\"",
            )),
            None => {}
            Some(name) => {
                if let Some(first) = names.insert(&name.0, source.clone()) {
                    let message = format!("another policy is named `{}` too", name.0);
                    let help = format!("the other is at {}:{}", first.origin, first.line);
                    problems.push(Problem::error("duplicate-name", key("name"), message, help));
                }
            }
        }
        let mut ids = Vec::with_capacity(raw.listeners.len());
        for (i, name) in raw.listeners.iter().enumerate() {
            match listeners.get(&**name) {
                Some(id) => ids.push(*id),
                // Where the listeners themselves are wrong, their names say nothing.
                None if listeners.is_empty() => {}
                None => {
                    let help = match did_you_mean(name, listeners.keys().copied().take(suggested(problems))) {
                        Some(known) => format!("did you mean `{known}`?"),
                        None => "name a [[listener]], or leave `listeners` out for all of them".to_owned(),
                    };
                    let at = place.at([Step::Key("listeners".into()), Step::Item(i)]);
                    problems.push(Problem::error(
                        "unknown-listener",
                        at,
                        format!("no listener is named `{name}`"),
                        help,
                    ));
                }
            }
        }
        let mut hosts = Vec::new();
        match &raw.hosts {
            None if !self.whole => {}
            None => problems.push(Problem::error(
                "missing-key",
                place.at([]),
                "this policy has no hosts",
                "add hosts = [\"api.example.com\"], or hosts = [\"*\"] for every host",
            )),
            Some(list) if list.is_empty() && !self.whole => {}
            Some(list) if list.is_empty() => problems.push(Problem::error(
                "empty-list",
                key("hosts"),
                "this policy serves no host",
                "write hosts = [\"*\"] for every host, or enabled = false to switch the policy off",
            )),
            Some(list) => {
                let mut seen = AHashSet::new();
                hosts = list.iter().map(|h| h.0.clone()).filter(|h| seen.insert(h.clone())).collect();
            }
        }
        let paths = match &raw.paths {
            None => vec![PathMatch::Prefix("/".to_owned())],
            Some(list) => {
                if list.is_empty() && self.whole {
                    let help = "leave `paths` out for the whole host, or write enabled = false to switch the policy off";
                    problems.push(Problem::error(
                        "empty-list",
                        key("paths"),
                        "this policy serves no path",
                        help,
                    ));
                }
                let mut seen = AHashSet::new();
                list.iter().map(|p| p.0.clone()).filter(|p| seen.insert(p.clone())).collect()
            }
        };
        if !raw.for_methods.is_empty() && paths.iter().any(|path| matches!(path, PathMatch::Regex(_))) {
            problems.push(Problem::error(
                "regex-by-method",
                key("for_methods"),
                "a policy for some methods cannot have a path by regular expression",
                "write exact and prefix paths, or leave `for_methods` out",
            ));
        }
        let rules = self.rules(bases, problems);
        if problems[before..].iter().any(|p| p.severity == Severity::Error) {
            return None;
        }
        Some(PolicySpec {
            name: raw.name.as_ref()?.0.clone(),
            source,
            listeners: ids,
            hosts,
            paths,
            for_methods: raw.for_methods.iter().map(|m| m.0.clone()).collect(),
            passes: (raw.enabled == Some(false)).then_some(PassReason::Disabled),
            on_denied: raw.on_denied,
            rules: rules?,
        })
    }

    /// The CORS rules, of exactly one dialect.
    fn rules(&self, bases: &AHashMap<&str, &ReadPolicy>, problems: &mut Vec<Problem>) -> Option<Rules> {
        let raw = &self.raw;
        let place = self.place;
        let blocks = [raw.gateway_api.is_some(), raw.ingress_nginx.is_some(), raw.envoy.is_some()];
        if let (Some(block), Some(field)) = (place.block, raw.native_field()) {
            problems.push(Problem::error(
                "two-dialects",
                place.at([Step::Key(field.into())]),
                format!(
                    "`{field}` belongs to the native dialect, but the policy has a [policy.{block}] block"
                ),
                "a policy is of one dialect: keep one of the two",
            ));
            return None;
        }
        if blocks.iter().filter(|set| **set).count() > 1 {
            problems.push(Problem::error(
                "two-dialects",
                place.at([]),
                "this policy has blocks of several dialects",
                "a policy is of one dialect: keep the one of the proxy that serves it",
            ));
            return None;
        }
        if let Some(inherit) = &raw.inherit
            && raw.envoy.is_none()
        {
            problems.push(Problem::error(
                "inherit-without-envoy",
                place.at([Step::Key("inherit".into())]),
                format!("only an envoy policy inherits, and this one (from `{inherit}`) has no [policy.envoy] block"),
                "add the block (it may be empty), or leave `inherit` out",
            ));
            return None;
        }
        let (rules, findings) = if let Some(cors) = &raw.gateway_api {
            let (rules, findings) = dialect::gateway_api::validate(cors);
            (rules.map(Rules::GatewayApi), findings)
        } else if let Some(annotations) = &raw.ingress_nginx {
            let (rules, findings) = dialect::ingress_nginx::validate(annotations);
            (rules.map(Rules::IngressNginx), findings)
        } else if let Some(cors) = &raw.envoy {
            let base = match &raw.inherit {
                Some(name) => Some(self.base(name, bases, problems)?),
                None => None,
            };
            let (rules, findings) = dialect::envoy::validate(cors, base);
            (rules.map(Rules::Envoy), findings)
        } else {
            // What had to be left out may have been the dialect: its absence says nothing then.
            if !self.whole {
                return None;
            }
            // What is switched off needs no rules.
            if raw.enabled == Some(false) && raw.native_field().is_none() {
                return Some(Rules::none());
            }
            let (rules, findings) = dialect::native::validate(&raw.native());
            (rules.map(Rules::Native), findings)
        };
        problems.extend(findings.into_iter().map(|finding| place.problem(finding)));
        rules
    }

    /// The policy whose fields fill what this one leaves unset.
    fn base<'a>(
        &self,
        name: &str,
        bases: &AHashMap<&str, &'a ReadPolicy>,
        problems: &mut Vec<Problem>,
    ) -> Option<&'a dialect::envoy::Cors> {
        let suggested = suggested(problems);
        let mut refuse = |message: String, help: &str| {
            let at = self.place.at([Step::Key("inherit".into())]);
            problems.push(Problem::error("inherit", at, message, help));
            None
        };
        let Some(base) = bases.get(name) else {
            let help = match did_you_mean(name, bases.keys().copied().take(suggested)) {
                Some(known) => format!("did you mean `{known}`?"),
                None => "name another policy that has a [policy.envoy] block".to_owned(),
            };
            return refuse(format!("no policy is named `{name}`"), &help);
        };
        if base.raw.inherit.is_some() {
            return refuse(
                format!(
                    "`{name}` inherits from another policy: Envoy falls back once, from route to virtual host"
                ),
                "name the virtual host's policy here",
            );
        }
        match &base.raw.envoy {
            Some(cors) => Some(cors),
            None => refuse(
                format!("`{name}` is not of the envoy dialect"),
                "name a policy that has a [policy.envoy] block",
            ),
        }
    }
}

fn listeners(
    tables: Vec<(Range<usize>, toml::de::DeTable<'_>)>,
    problems: &mut Vec<Problem>,
) -> Vec<Listener> {
    if tables.is_empty() {
        problems.push(Problem::error(
            "no-listener",
            At::Span(0..0),
            "no listener: nothing to listen on",
            "add a [[listener]] with name, address and upstream",
        ));
    }
    if tables.len() > MAX_LISTENERS {
        let message = format!("{} listeners; at most {MAX_LISTENERS} are supported", tables.len());
        problems.push(Problem::error("too-many-listeners", At::Span(0..0), message, "run several daemons"));
    }
    let mut names = AHashSet::new();
    let mut addresses = AHashMap::new();
    let mut listeners = Vec::new();
    for (index, (span, table)) in tables.into_iter().take(MAX_LISTENERS).enumerate() {
        let (raw, whole) = shape::<raw::Listener>(table, &span, problems);
        let at = |key: &'static str| {
            At::Path(vec![Step::Key("listener".into()), Step::Item(index), Step::Key(key.into())])
        };
        let mut missing = |key: &'static str, help: &str| {
            if whole {
                let message = format!("this listener has no {key}");
                problems.push(Problem::error("missing-key", At::Span(span.clone()), message, help));
            }
        };
        if raw.name.is_none() {
            missing("name", "add a name of its own: name = \"web\"");
        }
        if raw.address.is_none() {
            missing("address", "add the address to listen on: address = \"0.0.0.0:80\"");
        }
        if raw.upstream.is_none() && !raw.answer_only && !raw.steer {
            missing(
                "upstream",
                "add the proxy's address: upstream = \"127.0.0.1:8080\"; or answer_only = true, and all that is no \
                 preflight of a policy ends with an error",
            );
        }
        if raw.steer && raw.answer_only {
            problems.push(Problem::error(
                "answer-only-steer",
                at("answer_only"),
                "answer_only and steer exclude each other",
                "keep one of the two: with steer the proxy gets all that is no preflight of a policy",
            ));
        }
        if raw.upstream.is_some() && raw.answer_only {
            problems.push(Problem::error(
                "answer-only-upstream",
                at("answer_only"),
                "answer_only and upstream exclude each other",
                "keep one of the two",
            ));
        }
        if let Some(i) = raw.public_ports.iter().position(|port| *port == 0) {
            let path = vec![
                Step::Key("listener".into()),
                Step::Item(index),
                Step::Key("public_ports".into()),
                Step::Item(i),
            ];
            problems.push(Problem::error(
                "invalid-value",
                At::Path(path),
                "0 is no port",
                "write the port that clients connect to",
            ));
        }
        let (Some(name), Some(address)) = (raw.name, raw.address) else { continue };
        let listener = Listener {
            name: name.0,
            address: address.0,
            steer: raw.steer,
            upstream: raw.upstream.map(|upstream| upstream.0),
            proxy_protocol: raw.proxy_protocol,
            transparent: raw.transparent,
            public_ports: raw.public_ports,
            addresses: raw.addresses.into_iter().map(|ip| ip.0).collect(),
            gateways: raw.gateways.into_iter().map(|name| name.0).collect(),
            ingress_classes: raw.ingress_classes,
        };
        if !names.insert(listener.name.clone()) {
            let message = format!("another listener is named `{}` too", listener.name);
            problems.push(Problem::error(
                "duplicate-name",
                at("name"),
                message,
                "give each a name of its own",
            ));
        }
        if listener.address.port() != 0
            && let Some(other) = addresses.insert(listener.address, listener.name.clone())
        {
            let message = format!("listener `{other}` has the address {} too", listener.address);
            problems.push(Problem::error(
                "duplicate-address",
                at("address"),
                message,
                "give each its own address or port",
            ));
        }
        if listener.steer {
            steer_findings(&listener, &at, problems);
        } else {
            upstream_findings(&listener, &at, problems);
        }
        listeners.push(listener);
    }
    listeners
}

fn upstream_findings(listener: &Listener, at: &dyn Fn(&'static str) -> At, problems: &mut Vec<Problem>) {
    let Some(upstream) = listener.upstream else { return };
    let bind = listener.address;
    let ours = upstream.ip() == bind.ip()
        || listener.addresses.contains(&upstream.ip())
        || (bind.ip().is_unspecified()
            && bind.is_ipv4() == upstream.is_ipv4()
            && (upstream.ip().is_loopback() || upstream.ip().is_unspecified()));
    if upstream.port() == bind.port() && bind.port() != 0 && ours {
        problems.push(Problem::error(
            "upstream-loop",
            at("upstream"),
            format!("the upstream {upstream} is this listener itself"),
            "name the proxy's address",
        ));
    }
    if upstream.port() == 0 {
        problems.push(Problem::error(
            "invalid-value",
            at("upstream"),
            "the upstream's port is 0",
            "write the port that the proxy listens on",
        ));
    }
    if listener.proxy_protocol == ProxyProtocol::Off && !listener.transparent {
        problems.push(Problem::warning(
            "client-address-hidden",
            at("proxy_protocol"),
            format!(
                "the upstream of `{}` will see this node's address instead of the client's in what is relayed: its \
                 allow and deny rules by address, rate limits and logs then mean this node",
                listener.name
            ),
            "use proxy_protocol = \"v2\" (and have the proxy expect it), or transparent = true",
        ));
    }
}

fn steer_findings(listener: &Listener, at: &dyn Fn(&'static str) -> At, problems: &mut Vec<Problem>) {
    if listener.address.port() == 0 {
        problems.push(Problem::error(
            "invalid-value",
            at("address"),
            "the port is 0, but with steer the proxy's own is needed",
            "write the address and port that the proxy listens on",
        ));
    }
    let keeps_address =
        listener.transparent || matches!(listener.proxy_protocol, ProxyProtocol::V1 | ProxyProtocol::V2);
    if listener.upstream.is_some() && !keeps_address {
        problems.push(Problem::error(
            "client-address-hidden",
            at("upstream"),
            "with steer the proxy knows each client by its address, and what is relayed to this upstream would have \
             this node's",
            "leave `upstream` out (the client is told to come again, and goes to the proxy), or add proxy_protocol = \
             \"v2\" where that address expects it, or transparent = true",
        ));
    }
}

/// Numbers and names of `[steer]`.
fn check_steer(steer: &super::Steer, listeners: &[Listener], problems: &mut Vec<Problem>) {
    let mut wrong = |key: &'static str, message: String, help: &str| {
        let at = At::Path(vec![Step::Key("steer".into()), Step::Key(key.into())]);
        problems.push(Problem::error("out-of-range", at, message, help));
    };
    if steer.percent > 100 {
        wrong("percent", format!("steer.percent is {}", steer.percent), "use 0 to 100");
    }
    if !(1024..=16_777_216).contains(&steer.max_pending) {
        wrong("max_pending", format!("steer.max_pending is {}", steer.max_pending), "use 1024 to 16777216");
    }
    if !(1024..=16_777_216).contains(&steer.max_answered) {
        wrong(
            "max_answered",
            format!("steer.max_answered is {}", steer.max_answered),
            "use 1024 to 16777216",
        );
    }
    if steer.storm_below > steer.storm_above {
        let message = format!(
            "steer.storm_below is {}, above steer.storm_above, {}: a storm would begin and end at once",
            steer.storm_below, steer.storm_above
        );
        wrong("storm_below", message, "use about half of steer.storm_above");
    }
    if steer.pin_dir.as_os_str().is_empty() || !steer.pin_dir.is_absolute() {
        wrong(
            "pin_dir",
            format!("steer.pin_dir is `{}`, which is no absolute path", steer.pin_dir.display()),
            "name a directory in bpffs, such as \"/sys/fs/bpf/preflightd\"",
        );
    }
    if steer != &super::Steer::default() && !listeners.iter().any(|listener| listener.steer) {
        let at = At::Path(vec![Step::Key("steer".into())]);
        let message = "[steer] has no effect: no listener is steered";
        let help = "add steer = true to a [[listener]], or leave [steer] out";
        problems.push(Problem::warning("steer-without-listener", at, message, help));
    }
}

/// Names that are searched for a similar one: none any more where so much is wrong that it would take long.
fn suggested(problems: &[Problem]) -> usize {
    if problems.len() < 100 { usize::MAX } else { 0 }
}

/// Numbers that would not work.
fn check_numbers(root: &raw::Root, problems: &mut Vec<Problem>) {
    let mut range = |section: &'static str, key: &'static str, value: usize, least: usize, most: usize| {
        if !(least..=most).contains(&value) {
            let at = At::Path(vec![Step::Key(section.into()), Step::Key(key.into())]);
            let message = format!("{section}.{key} is {value}");
            problems.push(Problem::error("out-of-range", at, message, format!("use {least} to {most}")));
        }
    };
    let (stale, resync) = (root.kubernetes.stale_after.as_secs(), root.kubernetes.resync.as_secs());
    range("kubernetes", "stale_after", stale as usize, 1, 366 * 86_400);
    range("kubernetes", "resync", resync as usize, 60, 366 * 86_400);
    range("workers", "count", root.workers.count, 0, 1024);
    range("limits", "max_head_bytes", root.limits.max_head_bytes, 1024, 1 << 20);
    range("limits", "max_connections", root.limits.max_connections, 1, 1 << 20);
    range("relay", "threads", root.relay.threads, 0, 1024);
    range("relay", "max_connections", root.relay.max_connections, 1, 1 << 22);
    range("relay", "buffer_bytes", root.relay.buffer_bytes, 4096, 1 << 20);
    range("admin", "max_routes", root.admin.max_routes, 1, 1 << 16);
    range("ask", "per_second", root.ask.per_second as usize, 1, 10_000);
    range("learn", "max_entries", root.learn.max_entries, 1, 1 << 16);
    range("shadow", "samples_kept", root.shadow.samples_kept, 0, 4096);
    for (section, key, value) in [
        ("limits", "header_timeout", root.limits.header_timeout),
        ("limits", "idle_timeout", root.limits.idle_timeout),
        ("limits", "send_timeout", root.limits.send_timeout),
        ("relay", "connect_timeout", root.relay.connect_timeout),
        ("ask", "timeout", root.ask.timeout),
    ] {
        if value.as_millis() == 0 {
            let at = At::Path(vec![Step::Key(section.into()), Step::Key(key.into())]);
            let message = format!("{section}.{key} is zero: every connection would end at once");
            problems.push(Problem::error("out-of-range", at, message, "use at least \"1ms\""));
        }
    }
}

/// What is learned, by the numbers of listeners.
fn learn(raw: raw::Learn, listeners: &[Listener], problems: &mut Vec<Problem>) -> super::Learn {
    let at = |key: &'static str, item| {
        At::Path(vec![Step::Key("learn".into()), Step::Key(key.into()), Step::Item(item)])
    };
    let mut hosts = Vec::with_capacity(raw.hosts.len());
    for (i, raw::Text(host)) in raw.hosts.into_iter().enumerate() {
        if host == HostPattern::Any {
            let help = "name each host whose application may be asked, such as \"app.example.com\" or \"*.example.com\"";
            let message = "learning is allowed host by host, and `*` is every host";
            problems.push(Problem::error("learn-any-host", at("hosts", i), message, help));
        }
        hosts.push(host);
    }
    let mut numbers = Vec::with_capacity(raw.listeners.len());
    for (i, name) in raw.listeners.iter().enumerate() {
        match listeners.iter().position(|listener| listener.name == *name) {
            Some(number) => numbers.push(ListenerId(number as u16)),
            None if listeners.is_empty() => {}
            None => {
                let message = format!("no listener is named `{name}`");
                let known = listeners.iter().map(|listener| &*listener.name);
                let help = match did_you_mean(name, known) {
                    Some(known) => format!("did you mean `{known}`?"),
                    None => "name a [[listener]], or leave `listeners` out for all of them".to_owned(),
                };
                problems.push(Problem::error("unknown-listener", at("listeners", i), message, help));
            }
        }
    }
    super::Learn { hosts, listeners: numbers, max_ttl: raw.max_ttl, max_entries: raw.max_entries }
}

/// What asking the proxy needs.
fn check_asking(root: &raw::Root, listeners: &[Listener], problems: &mut Vec<Problem>) {
    let at = |section: &'static str, key: &'static str| {
        At::Path(vec![Step::Key(section.into()), Step::Key(key.into())])
    };
    if !(0.0..=1.0).contains(&root.shadow.sample) {
        let message = format!("shadow.sample is {}", root.shadow.sample);
        let help = "use a share of 0 to 1, such as 0.01";
        problems.push(Problem::error("out-of-range", at("shadow", "sample"), message, help));
    }
    if !root.learn.hosts.is_empty() && root.learn.max_ttl < Duration::from_secs(2) {
        let message = "learn.max_ttl is less than 2 s: every answer would be gone before it is learned";
        problems.push(Problem::error("out-of-range", at("learn", "max_ttl"), message, "use \"2s\" or more"));
    }
    if root.shadow.enabled {
        for listener in listeners.iter().filter(|listener| listener.upstream.is_none() && !listener.steer) {
            let message = format!(
                "in shadow mode the proxy answers everything, and the listener `{}` has none",
                listener.name
            );
            let help = "give the listener an upstream instead of answer_only, or leave shadow mode out";
            problems.push(Problem::error("shadow-without-proxy", at("shadow", "enabled"), message, help));
        }
        if !root.learn.hosts.is_empty() {
            let message = "nothing is learned while shadow mode is on, for nothing is answered";
            let help = "nothing, or choose one of them";
            problems.push(Problem::warning("shadow-learns-nothing", at("learn", "hosts"), message, help));
        }
    }
}

/// Findings file by file, in order of lines.
fn in_order(sources: &[Source], problems: Vec<Vec<Problem>>) -> impl Iterator<Item = Diagnostic> {
    sources.iter().zip(problems).flat_map(|(source, problems)| {
        let mut found = source.diagnostics(problems);
        found.sort_by_key(|d| (d.line, d.column));
        found
    })
}

/// `*.toml` in a directory, sorted by name; no hidden files.
fn policy_files_in(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if !hidden && path.extension().is_some_and(|e| e == "toml") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn read(path: &Path) -> io::Result<Arc<str>> {
    let bytes = fs::read(path)
        .map_err(|e| io::Error::new(e.kind(), format!("cannot read {}: {e}", path.display())))?;
    let text = String::from_utf8(bytes).map_err(|e| {
        let message = format!("{} is not UTF-8 (at byte {})", path.display(), e.utf8_error().valid_up_to());
        io::Error::new(io::ErrorKind::InvalidData, message)
    })?;
    Ok(text.into())
}
