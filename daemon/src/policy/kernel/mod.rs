//! The part of a compiled table that the eBPF program decides by: whole strings and ends of hosts and paths, and answers
//! in pieces. Everything else is marked as a worker's to decide.

use super::answer::{Connection, Pieces, Template};
use super::core::{Core, Methods};
use super::host::Own;
use super::learned::Question;
use super::origin::Origins;
use super::routes::{CONFLICT, HostEntry, HostHit, Hosts, Target};
use super::table::Table;
use super::{ListenerId, OnDenied};
use ahash::AHashMap;
use preflightd_common::{
    abi::{
        MAX_FRONT, MAX_MIDDLE, MAX_TAIL, MAX_TEMPLATES, MAX_TERMS, MAX_TEXT, Routes, Rule, Term, Value, ask,
        routes_flags, rule_flags, term,
    },
    decide::{self, Decide, verdict},
    head,
    preflight::Scan,
    words::{Buffer, LOOKED_AT},
};
use std::{collections::BTreeMap, sync::Arc};

/// What goes into the maps `TERMS` and `TEMPLATES`, generations apart.
#[derive(Clone, Debug, Default)]
pub struct KernelTable {
    /// By their key with generation 0.
    pub terms: AHashMap<Term, Value>,
    /// By their number.
    pub templates: Vec<Pieces>,
    /// How much of what there is.
    pub summary: Summary,
}

/// What a [`KernelTable`] holds, for people.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Hosts, by listener.
    pub hosts: usize,
    /// Paths, by host.
    pub paths: usize,
    /// Origins and ends of origins.
    pub origins: usize,
    /// Names of request headers.
    pub names: usize,
    /// Answers.
    pub templates: usize,
    /// Policies that are not wholly the kernel's, and why not.
    pub left: BTreeMap<Arc<str>, &'static str>,
    /// Why it is empty, if it would have to hold more.
    pub too_large: Option<String>,
}

/// What the kernel would do with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// It answers: number of the template.
    Kernel(u32),
    /// It gives the request to the proxy: by the table, or since no worker could answer it.
    Proxy,
    /// It leaves the request to a worker: why, a slot of [`ask`].
    Worker(u32),
}

impl Tier {
    /// In a word.
    pub fn name(self) -> &'static str {
        match self {
            Tier::Kernel(_) => "kernel",
            Tier::Proxy => "proxy",
            Tier::Worker(_) => "worker",
        }
    }

    /// In words.
    pub fn words(self) -> String {
        match self {
            // The second of two templates closes.
            Tier::Kernel(number) if number & 1 != 0 => {
                "the kernel answers, and ends the connection".to_owned()
            }
            Tier::Kernel(_) => "the kernel answers, and the connection stays open".to_owned(),
            Tier::Proxy => "the kernel gives it to the proxy".to_owned(),
            Tier::Worker(why) => format!("not the kernel, for {}", asked_words(why)),
        }
    }
}

/// Why the kernel leaves a request to a worker, as a clause.
fn asked_words(why: u32) -> &'static str {
    match why {
        ask::Off => "kernel answers are off",
        ask::Segment => "the head is longer than the kernel looks at",
        ask::Incomplete => "the head is not complete",
        ask::Bytes => "a byte is no printable ASCII, or a line does not end in CR LF",
        ask::Lines => "it has too many lines",
        ask::Version => "it is not HTTP/1.1",
        ask::Target => "its target has bytes that the kernel does not judge",
        ask::Name => "a header's name is odd",
        ask::Header => "it has a header that the kernel does not judge",
        ask::Repeated => "a header stands twice",
        ask::Value => "a value is empty, or has blanks around it",
        ask::Behind => "something stands behind its head",
        ask::NoPreflight => "it is no preflight",
        ask::Host => {
            "its host is an address, too long, not in lower case, or has a port that is not the listener's"
        }
        ask::UnknownHost => "its host is not in the kernel's table",
        ask::LongPath => "its host has longer paths than the kernel compares",
        ask::Regex => "its host has regular expressions",
        ask::Rules => {
            "its policy echoes what was asked for, or depends on the method, or its answer was learned"
        }
        ask::Origin => "its origin is too long, or matches by a rule that the kernel does not know",
        ask::Method => "its method is an unusual one",
        ask::Names => "its requested headers are not as browsers write them",
        ask::Room => "the answer is longer than the client takes at once",
        ask::Connections => "no more connections fit",
        _ => "the kernel cannot decide it",
    }
}

/// Whether bytes look like a preflight that a worker may answer, its host being known.
fn is_for_workers(bytes: &[u8]) -> bool {
    let mut buffer: Buffer = [0; 2112];
    let length = bytes.len().min(LOOKED_AT);
    buffer[..length].copy_from_slice(&bytes[..length]);
    let mut scan = Scan::new(length as u32);
    while scan.step(&buffer) {}
    bytes.starts_with(b"OPTIONS /") && scan.may_be_answered(u32::try_from(bytes.len()).unwrap_or(u32::MAX))
}

impl KernelTable {
    /// What the kernel would do with the first bytes of a request to a host that some policy has; `limit`: of its head.
    pub fn tier_of_any(&self, listener: ListenerId, bytes: &[u8], limit: usize) -> Tier {
        match self.tier(listener, bytes, limit) {
            Tier::Worker(_) if !is_for_workers(bytes) => Tier::Proxy,
            tier => tier,
        }
    }

    /// The same of a preflight that would be a worker's, if not the kernel's.
    pub fn tier(&self, listener: ListenerId, bytes: &[u8], limit: usize) -> Tier {
        self.decide(listener, bytes, limit).map_or_else(Tier::Worker, |decided| match decided.verdict {
            verdict::ANSWER => Tier::Kernel(decided.template),
            verdict::PROXY => Tier::Proxy,
            _ => Tier::Worker(decided.why),
        })
    }

    /// One more than the highest number of a label.
    pub fn labels(&self) -> u32 {
        let rules = self.terms.iter().filter(|(term, _)| matches!(term.kind, term::PATH | term::PATH_BELOW));
        rules.map(|(_, value)| Rule::of(value).label + 1).max().unwrap_or(1)
    }

    /// The decision, as the program makes it.
    ///
    /// # Errors
    /// The head is not the kernel's to judge: why, a slot of [`ask`].
    pub fn decide(&self, listener: ListenerId, bytes: &[u8], limit: usize) -> Result<Decide, u32> {
        if bytes.len() > LOOKED_AT.min(limit) {
            return Err(ask::Segment);
        }
        let mut buffer: Buffer = [0; 2112];
        buffer[..bytes.len()].copy_from_slice(bytes);
        let head = head::read(&mut buffer, bytes.len() as u32)?;
        let found = |term: &Term| self.terms.get(term).copied();
        Ok(decide::decide(0, u32::from(listener.0), &buffer, &head, found))
    }
}

/// A key without its generation. `None`: the text is longer than the kernel compares.
fn key(kind: u16, of: u32, text: &[u8]) -> Option<Term> {
    if text.len() > MAX_TEXT as usize {
        return None;
    }
    let mut words = [0; MAX_TEXT as usize / 8];
    for (word, chunk) in words.iter_mut().zip(text.chunks(8)) {
        let mut bytes = [0; 8];
        bytes[..chunk.len()].copy_from_slice(chunk);
        *word = u64::from_le_bytes(bytes);
    }
    Some(Term { generation: 0, kind, length: text.len() as u16, of, zero: 0, text: words })
}

impl Table {
    /// What the kernel can decide of this table, on these listeners. More than fits is no table at all, for a part of one
    /// would decide otherwise.
    pub fn for_kernel(&self, listeners: &[ListenerId]) -> KernelTable {
        let mut build = Build { table: self, made: KernelTable::default(), sets: Sets::default() };
        for &id in listeners {
            if let Some((own, hosts)) = self.listener(id) {
                let ports = own.ports();
                if let Ok(count) = u32::try_from(ports.len())
                    && count <= 7
                {
                    let mut value = [0; 8];
                    value[0] = count;
                    for (slot, port) in value[1..].iter_mut().zip(ports) {
                        *slot = u32::from(*port);
                    }
                    build.add(term::LISTENER, u32::from(id.0), b"", value);
                }
                build.listener(id, own, hosts);
                build.learned(id, own, hosts);
            }
            if build.made.terms.len() > MAX_TERMS as usize / 2
                || build.made.templates.len() > MAX_TEMPLATES as usize / 2
            {
                return build.too_large();
            }
        }
        build.made.summary.templates = build.made.templates.len() / 2;
        build.made
    }
}

/// What is shared by number.
#[derive(Default)]
struct Sets<'t> {
    /// First entry of each set of hosts that was added already.
    hosts: Vec<(&'t Arc<Hosts>, u32)>,
    entries: u32,
    origins: AHashMap<&'t Origins, (u32, u32)>,
    names: AHashMap<*const u8, u32>,
    templates: AHashMap<Pieces, u32>,
}

struct Build<'t> {
    table: &'t Table,
    made: KernelTable,
    sets: Sets<'t>,
}

impl<'t> Build<'t> {
    fn add(&mut self, kind: u16, of: u32, text: &[u8], value: Value) -> bool {
        key(kind, of, text).is_some_and(|key| self.made.terms.insert(key, value).is_none())
    }

    fn too_large(self) -> KernelTable {
        let reason = format!(
            "the policies need {} entries and {} answers, and more than {} and {} do not fit in the kernel: workers \
             answer them all",
            self.made.terms.len(),
            self.made.templates.len() / 2,
            MAX_TERMS / 2,
            MAX_TEMPLATES / 4
        );
        KernelTable {
            summary: Summary { too_large: Some(reason), ..Summary::default() },
            ..KernelTable::default()
        }
    }

    fn listener(&mut self, id: ListenerId, own: &Own, hosts: &'t Arc<Hosts>) {
        let of = u32::from(id.0);
        let known = self.sets.hosts.iter().find(|(known, _)| Arc::ptr_eq(known, hosts));
        let base = if let Some((_, base)) = known {
            *base
        } else {
            let base = self.sets.entries;
            self.sets.entries += hosts.entries();
            self.sets.hosts.push((hosts, base));
            base
        };
        hosts.each_host(|host| match host {
            HostEntry::Exact(name, entry) => self.host(term::HOST, of, name, hosts, base, entry),
            HostEntry::Below { suffix, one, more } => {
                for (kind, entry) in [(term::HOST_BELOW, one), (term::HOST_FAR_BELOW, more)] {
                    if let Some(entry) = entry {
                        self.host(kind, of, suffix, hosts, base, entry);
                    }
                }
            }
            HostEntry::Any(entry) => {
                self.host(term::ANY_HOST, of, b"", hosts, base, entry);
                // Its own addresses count as any host, unless a policy lists them; those of IPv6 have many spellings.
                for literal in own.literals().filter(|literal| !literal.starts_with(b"[")) {
                    if key(term::HOST, of, literal).is_some_and(|key| !self.made.terms.contains_key(&key)) {
                        self.host(term::HOST, of, literal, hosts, base, entry);
                    }
                }
            }
        });
    }

    fn host(&mut self, kind: u16, of: u32, text: &[u8], hosts: &'t Arc<Hosts>, base: u32, entry: u32) {
        let mut routes = Routes { host: base + entry, ..Routes::default() };
        let regex = hosts.has_regexes(entry);
        if regex {
            routes.flags |= routes_flags::REGEX;
            for target in hosts.regex_targets(entry) {
                self.leave(target, "its host has paths by regular expression");
            }
        }
        hosts.each_route(entry, |exact, path, target| {
            if regex {
                self.leave(target, "its host has paths by regular expression");
            }
            if path.len() >= MAX_TEXT as usize {
                routes.flags |= routes_flags::LONG;
                self.leave(target, "a path is longer than the kernel compares");
                return;
            }
            let (kind, lengths) = if exact {
                (term::PATH, &mut routes.exact)
            } else {
                (term::PATH_BELOW, &mut routes.prefixes)
            };
            *lengths |= 1 << path.len();
            if target.is_by_method() {
                self.leave_split(hosts, target);
            }
            let rule = self.rule(target);
            self.made.summary.paths += usize::from(self.add(kind, routes.host, path, rule.value()));
        });
        self.made.summary.hosts += usize::from(self.add(kind, of, text, routes.value()));
    }

    /// Marks the questions to which an answer was learned as a worker's, and all else on their paths as the proxy's. A worker
    /// that cannot answer turns its client away: so only the very bytes of a question count, as browsers write it.
    fn learned(&mut self, id: ListenerId, own: &Own, hosts: &Hosts) {
        let Some(learned) = self.table.learned() else { return };
        let of = u32::from(id.0);
        for question in learned.questions().filter(|question| question.listener == id) {
            let Question { target, method, origin, headers, host: named, .. } = question;
            let path = question.path();
            let mut buffer = None;
            let Some(host) = own.parse(question.host_name().as_bytes(), &mut buffer) else { continue };
            let Some(key) = key(term::HOST, of, host.name).filter(|_| path.len() < MAX_TEXT as usize) else {
                continue;
            };
            let mut routes = match (self.made.terms.get(&key), hosts.find(&host, false)) {
                // Where policies share a path by method, or a pattern has the host, too much would be the proxy's.
                (_, Some((entry, hit))) if hit != HostHit::Exact || hosts.is_by_method(entry) => continue,
                (Some(known), _) => Routes::of(known),
                (None, _) => {
                    self.sets.entries += 1;
                    Routes { host: self.sets.entries - 1, ..Routes::default() }
                }
            };
            if routes.flags & routes_flags::REGEX != 0 {
                continue;
            }
            let label = learned.label(id, host.name, host.literal.is_some()).unwrap_or_default();
            routes.exact |= 1 << path.len();
            self.made.terms.insert(key, routes.value());
            if let Some(key) = self::key(term::PATH, routes.host, path.as_bytes()) {
                let rule = Rule { flags: rule_flags::LEARNED, label: label.0, ..Rule::default() };
                self.made.summary.paths += usize::from(self.made.terms.insert(key, rule.value()).is_none());
            }
            let [target, method, origin, headers, named] =
                [target, method, origin, headers, named].map(|t| t.as_bytes());
            let mut text = [0; MAX_TEXT as usize / 8];
            text[0] = decide::question(of, target, method, origin, headers, named);
            let question = Term { kind: term::LEARNED, of: routes.host, text, ..Term::default() };
            self.made.terms.insert(question, Value::default());
        }
    }

    /// Says of the policies that share a path by method that they are not wholly the kernel's.
    fn leave_split(&mut self, hosts: &Hosts, target: Target) {
        for policy in hosts.policies_of(target) {
            self.leave(Target { policy, ..target }, "it shares a path with another policy, by method");
        }
    }

    /// Says of a policy that it is not wholly the kernel's.
    fn leave(&mut self, target: Target, why: &'static str) {
        if let Some(name) = self.table.policy_name(target.policy) {
            self.made.summary.left.entry(Arc::clone(name)).or_insert(why);
        }
    }

    fn rule(&mut self, target: Target) -> Rule {
        let mut rule = Rule { label: target.label.0, ..Rule::default() };
        let table = self.table;
        if target.policy == CONFLICT {
            rule.flags = rule_flags::PASSES;
            return rule;
        }
        // One that depends on the method is of no policy, and asks.
        let Some(core) = table.core(target.policy) else { return rule };
        if core.gate.is_some() {
            rule.flags = rule_flags::PASSES;
            return rule;
        }
        let Some(allowed) = self.template(&core.allowed) else {
            self.leave(target, "its answer echoes what was asked for, or is too long");
            return rule;
        };
        rule.allowed = allowed;
        rule.flags = rule_flags::DECIDES;
        match core.on_denied {
            OnDenied::Pass => rule.flags |= rule_flags::DENIED_PASS,
            OnDenied::Answer => match self.template(&core.denied) {
                Some(denied) => rule.denied = denied,
                None => rule.flags |= rule_flags::DENIED_ASK,
            },
        }
        self.origins(core, &mut rule);
        if rule.flags & rule_flags::MORE_ORIGINS != 0 {
            self.leave(
                target,
                "origins match by prefix, suffix, part or regular expression, or without regard to case",
            );
        }
        match &core.methods {
            Methods::Unchecked => rule.flags |= rule_flags::ALL_METHODS,
            Methods::Listed { usual, others } => {
                rule.methods = u32::from(*usual);
                if others.is_some() {
                    self.leave(target, "it allows unusual methods");
                }
            }
        }
        self.names(core, &mut rule);
        rule
    }

    fn origins(&mut self, core: &'t Core, rule: &mut Rule) {
        if let Some((set, flags)) = self.sets.origins.get(&core.origins) {
            rule.origins = *set;
            rule.flags |= flags;
            return;
        }
        let plain = core.origins.plain();
        let set = self.sets.origins.len() as u32;
        let mut flags = 0;
        for origin in &plain.exact {
            self.made.summary.origins += usize::from(self.add(term::ORIGIN, set, origin, [0; 8]));
        }
        for (https, end) in &plain.below {
            let kind = if *https { term::HTTPS_BELOW } else { term::HTTP_BELOW };
            self.made.summary.origins += usize::from(self.add(kind, set, end, [0; 8]));
        }
        for (yes, flag) in [
            (plain.all, rule_flags::ALL_ORIGINS),
            (!plain.below.is_empty(), rule_flags::ORIGINS_BELOW),
            (plain.one_label, rule_flags::ONE_LABEL),
            (plain.more, rule_flags::MORE_ORIGINS),
        ] {
            if yes {
                flags |= flag;
            }
        }
        self.sets.origins.insert(&core.origins, (set, flags));
        rule.origins = set;
        rule.flags |= flags;
    }

    fn names(&mut self, core: &'t Core, rule: &mut Rule) {
        let Some(names) = &core.headers else {
            rule.flags |= rule_flags::ALL_NAMES;
            return;
        };
        // Equal lists are one and the same in a compiled table.
        let at = Arc::as_ptr(names).cast::<u8>();
        if let Some(set) = self.sets.names.get(&at) {
            rule.names = *set;
            return;
        }
        let set = self.sets.names.len() as u32;
        for (position, name) in (0..).zip(names.iter()) {
            let value = [position, 0, 0, 0, 0, 0, 0, 0];
            self.made.summary.names += usize::from(self.add(term::NAME, set, name, value));
        }
        self.sets.names.insert(at, set);
        rule.names = set;
    }

    /// The number of a template; the next one closes.
    fn template(&mut self, template: &Template) -> Option<u32> {
        let keep = template.pieces(Connection::KeepAlive)?;
        let close = template.pieces(Connection::Close)?;
        if close.front.len() > MAX_FRONT || close.middle.len() > MAX_MIDDLE || close.tail.len() >= MAX_TAIL {
            return None;
        }
        if let Some(number) = self.sets.templates.get(&keep) {
            return Some(*number);
        }
        let number = self.made.templates.len() as u32;
        self.made.templates.push(keep.clone());
        self.made.templates.push(close);
        self.sets.templates.insert(keep, number);
        Some(number)
    }
}

#[cfg(test)]
pub(crate) mod samples;
#[cfg(test)]
pub(crate) mod tests;
