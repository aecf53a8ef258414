//! Firewall rules that stand in the way of steering.
//!
//! SYNs that the eBPF program answers never meet the firewall, and the first data segment meets it without a handshake
//! that connection tracking saw. What does meet it is the copy of a SYN with FIN that ends a TIME_WAIT. So these are led
//! through the rules as they are (nftables, iptables over nftables, and iptables of old): where one of them could be
//! dropped, sent elsewhere or handed to a program, there is an obstacle. Rules are understood as far as such packets
//! need; what is not understood counts as one that may match.
//!
//! Not looked at: IPVS, eBPF programs of others, and the bridge and ARP families.
#![forbid(unsafe_code)]

use std::{
    collections::{BTreeSet, HashMap},
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
    process::{Command, Stdio},
};

use serde::Serialize;

use super::{
    Error,
    interfaces::{self, Interface},
};

mod changes;
mod iptables;
mod nft;

/// How deep chains are followed; the kernel allows 16 jumps.
const MAX_DEPTH: usize = 20;

pub use changes::Changes;

/// A rule (or a chain's policy) that could keep packets from a served port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Obstacle {
    /// Table, chain, and the rule's text or handle.
    pub place: String,
    /// What it may do to which packets.
    pub what: String,
    /// What to do about it.
    pub remedy: String,
}

/// The obstacles to steering `ports` in the network namespace of the calling thread, for packets that arrive by the
/// interfaces that are steered if none is named.
///
/// Runs `nft`, and `iptables-save` where there is something for it to show: blocks for as long as these need.
///
/// # Errors
/// If the kernel does not tell its interfaces. Rules that cannot be read are an obstacle, not an error.
pub fn obstacles(ports: &[u16]) -> Result<Vec<Obstacle>, Error> {
    let interfaces = own_interfaces()?;
    let names: Vec<_> = interfaces::automatic(&interfaces).into_iter().map(|i| i.name.clone()).collect();
    Ok(find(ports, &names, &interfaces))
}

/// The same for packets that arrive by interfaces with these names; none: any name.
///
/// # Errors
/// As [`obstacles`].
pub fn obstacles_at(ports: &[u16], names: &[String]) -> Result<Vec<Obstacle>, Error> {
    Ok(find(ports, names, &own_interfaces()?))
}

fn own_interfaces() -> Result<Vec<Interface>, Error> {
    let remedy = "allow netlink sockets (AF_NETLINK in seccomp or RestrictAddressFamilies)";
    interfaces::read().map_err(Error::new("list interfaces", remedy))
}

fn find(ports: &[u16], names: &[String], interfaces: &[Interface]) -> Vec<Obstacle> {
    let addresses: Vec<_> = interfaces.iter().flat_map(|interface| &interface.addresses).copied().collect();
    let scene = Scene { ports, interfaces: names, addresses: &addresses, tracking: Tracking::read() };
    let mut unreadable = Vec::new();
    let chains = read(&mut unreadable);
    unreadable.extend(judge(&chains, &scene));
    unreadable
}

/// Every chain of every table; what cannot be read is told in `obstacles`.
fn read(obstacles: &mut Vec<Obstacle>) -> Vec<Chain> {
    let is_there = |path: &str| Path::new(path).exists();
    if !is_there("/proc/thread-self/net/netfilter") && !is_there("/proc/sys/net/netfilter") {
        return Vec::new();
    }
    let cannot_read = |what: &str, why: &str, remedy: &str| Obstacle {
        place: what.to_owned(),
        what: format!("cannot be read: {why}"),
        remedy: format!(
            "{remedy}, or set steer.firewall = \"ignore\" if nothing there concerns the served ports"
        ),
    };
    let mut chains = Vec::new();
    match run("nft", &["--json", "list", "ruleset"]) {
        Ok(Some(text)) => match nft::parse(&text) {
            Ok(parsed) => {
                chains = parsed.chains;
                for (family, programs) in [
                    (Family::V4, ["iptables-nft-save", "iptables-save"]),
                    (Family::V6, ["ip6tables-nft-save", "ip6tables-save"]),
                ] {
                    // nft shows iptables' own matches by name alone; without the other program they may match.
                    if parsed.opaque.contains(&family)
                        && let Some(text) = saved(&programs, true)
                    {
                        let better = iptables::parse(&text, family, "iptables-nft");
                        let is_better = |chain: &Chain| {
                            chain.family == Some(family)
                                && better.iter().any(|new| new.table_name() == chain.table_name())
                        };
                        chains.retain(|chain| !is_better(chain));
                        chains.extend(better);
                    }
                }
            }
            Err(error) => {
                let why = format!("`nft --json list ruleset` says what is not understood: {error}");
                obstacles.push(cannot_read("nftables", &why, "install a newer nft"));
            }
        },
        Ok(None) => {
            let why = "there is no program `nft`";
            obstacles.push(cannot_read("nftables", why, "install nft (package nftables)"));
        }
        Err(error) => {
            let why = format!("`nft --json list ruleset`: {error}");
            let remedy = "run as root or with CAP_NET_ADMIN, with an nft that has JSON";
            obstacles.push(cannot_read("nftables", &why, remedy));
        }
    }
    for (family, names, programs) in [
        (Family::V4, "/proc/thread-self/net/ip_tables_names", ["iptables-legacy-save", "iptables-save"]),
        (Family::V6, "/proc/thread-self/net/ip6_tables_names", ["ip6tables-legacy-save", "ip6tables-save"]),
    ] {
        match fs::read_to_string(names) {
            Ok(tables) if tables.trim().is_empty() => {}
            Ok(tables) => {
                if let Some(text) = saved(&programs, false) {
                    chains.extend(iptables::parse(&text, family, "iptables"));
                    continue;
                }
                let what = format!("iptables of old, tables {}", tables.trim().replace('\n', ", "));
                let why = format!("neither `{}` nor `{}` shows them", programs[0], programs[1]);
                obstacles.push(cannot_read(&what, &why, "install iptables"));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                obstacles.push(cannot_read(names, &error.to_string(), "run as root"));
            }
        }
    }
    chains
}

/// What the first of these programs that is of the right kind prints.
fn saved(programs: &[&str], nf_tables: bool) -> Option<String> {
    programs.iter().find_map(|program| {
        let text = run(program, &[]).ok()??;
        (text.contains("(nf_tables)") == nf_tables).then_some(text)
    })
}

/// Runs a program of an administrator; `None`: there is none of that name.
fn run(program: &str, arguments: &[&str]) -> io::Result<Option<String>> {
    for path in [program.to_owned(), format!("/usr/sbin/{program}"), format!("/sbin/{program}")] {
        let mut command = Command::new(&path);
        command.args(arguments).env("LC_ALL", "C").stdin(Stdio::null());
        let output = match command.output() {
            Ok(output) => output,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        if output.status.success() {
            return Ok(Some(String::from_utf8_lossy(&output.stdout).into_owned()));
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.lines().next().unwrap_or_default();
        return Err(io::Error::other(format!("{}: {said}", output.status)));
    }
    Ok(None)
}

/// Whether a packet is as a rule wants it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Truth {
    No,
    Maybe,
    Yes,
}

impl Truth {
    fn of(yes: bool) -> Self {
        if yes { Self::Yes } else { Self::No }
    }

    fn not(self) -> Self {
        match self {
            Self::No => Self::Yes,
            Self::Maybe => Self::Maybe,
            Self::Yes => Self::No,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Family {
    V4,
    V6,
}

impl Family {
    fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

/// In the order in which packets meet them. The eBPF program stands before all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Hook {
    Ingress,
    Prerouting,
    Input,
}

/// What a rule asks of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Test {
    /// The same for every packet that is led through, or not understood.
    Known(Truth),
    Family(Family),
    /// The port that the packet is for, from and to.
    Port(u16, u16),
    /// The TCP flags below the mask are these.
    Flags {
        mask: u8,
        value: u8,
    },
    /// One of these TCP flags is set.
    AnyFlag(u8),
    /// The state of connection tracking is one of these bits.
    State(u8),
    /// The name of the interface; `eth*` is a prefix.
    Interface(String),
    /// The address that the packet is for, from and to.
    To(IpAddr, IpAddr),
    /// The client's address, from and to.
    From(IpAddr, IpAddr),
    Mark {
        mask: u32,
        value: u32,
    },
    Any(Vec<Self>),
    All(Vec<Self>),
    Not(Box<Self>),
}

impl Test {
    const NEVER: Self = Self::Known(Truth::No);
    const MAYBE: Self = Self::Known(Truth::Maybe);
    const ALWAYS: Self = Self::Known(Truth::Yes);

    fn negated(self, not: bool) -> Self {
        if not { Self::Not(Box::new(self)) } else { self }
    }
}

/// States of connection tracking.
mod state {
    pub(super) const INVALID: u8 = 1;
    pub(super) const ESTABLISHED: u8 = 2;
    pub(super) const RELATED: u8 = 4;
    pub(super) const NEW: u8 = 8;
    pub(super) const UNTRACKED: u8 = 16;

    /// As both nft and iptables call them, whatever the case.
    pub(super) fn bit(name: &str) -> Option<u8> {
        let named = [
            ("invalid", INVALID),
            ("established", ESTABLISHED),
            ("related", RELATED),
            ("new", NEW),
            ("untracked", UNTRACKED),
        ];
        named.into_iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, bit)| bit)
    }
}

/// TCP flags.
mod flag {
    pub(super) const FIN: u8 = 1;
    pub(super) const SYN: u8 = 2;
    pub(super) const RST: u8 = 4;
    pub(super) const PSH: u8 = 8;
    pub(super) const ACK: u8 = 16;
    pub(super) const URG: u8 = 32;
    pub(super) const ECE: u8 = 64;
    pub(super) const CWR: u8 = 128;

    /// As both nft and iptables call them, whatever the case.
    pub(super) fn bit(name: &str) -> Option<u8> {
        let named = [
            ("fin", FIN),
            ("syn", SYN),
            ("rst", RST),
            ("psh", PSH),
            ("ack", ACK),
            ("urg", URG),
            ("ecn", ECE),
            ("ece", ECE),
            ("cwr", CWR),
        ];
        named.into_iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, bit)| bit)
    }
}

/// What a rule does.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Action {
    /// Sets the packet's mark.
    Mark,
    /// Keeps it from connection tracking.
    Untrack,
    Accept,
    Return,
    Jump(String),
    Goto(String),
    /// Stops it, in the words of this sentence: "may … TCP packets".
    Stop(&'static str),
    /// Sends it to another address or port.
    Divert(&'static str),
    /// Something that is not known here.
    Unclear(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    place: String,
    tests: Vec<Test>,
    actions: Vec<Action>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Chain {
    /// What tells its table from others.
    table: String,
    name: String,
    /// `None`: both.
    family: Option<Family>,
    base: Option<Base>,
    rules: Vec<Rule>,
}

impl Chain {
    fn table_name(&self) -> &str {
        self.table.rsplit(' ').next().unwrap_or_default()
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Base {
    hook: Hook,
    priority: i64,
    /// What its policy does is to drop.
    drops: bool,
    /// For [`Hook::Ingress`]: the interfaces; none: not known.
    devices: Vec<String>,
}

/// What the packets have in common.
#[derive(Clone, Copy, Debug)]
struct Scene<'a> {
    ports: &'a [u16],
    interfaces: &'a [String],
    /// All of the node's.
    addresses: &'a [IpAddr],
    tracking: Tracking,
}

/// How connection tracking takes a flow whose beginning it did not see.
#[derive(Clone, Copy, Debug)]
struct Tracking {
    /// For a new one (`nf_conntrack_tcp_loose`), else for an invalid one.
    loose: bool,
    /// Even if it still knows an earlier connection of these ports and addresses, in whose window the data is not
    /// (`nf_conntrack_tcp_be_liberal`).
    liberal: bool,
}

impl Tracking {
    /// Of the calling thread's network namespace.
    fn read() -> Self {
        // Missing: connection tracking is not there, and no rule can ask for it.
        let is_set = |name: &str| {
            let value = fs::read_to_string(format!("/proc/sys/net/netfilter/{name}"));
            value.map_or(true, |value| value.trim() != "0")
        };
        Self { loose: is_set("nf_conntrack_tcp_loose"), liberal: is_set("nf_conntrack_tcp_be_liberal") }
    }

    /// What a steered flow has to do with the firewall, and the state that tracking gives it.
    fn segments(self) -> Vec<(Segment, u8)> {
        let mut segments = vec![
            (Segment::Syn, state::NEW),
            (Segment::Data, if self.loose { state::NEW } else { state::INVALID }),
        ];
        if self.loose && !self.liberal {
            segments.push((Segment::LaterData, state::INVALID));
        }
        // Whatever the settings (`tcp_error` in net/netfilter/nf_conntrack_proto_tcp.c).
        segments.push((Segment::SynFin, state::INVALID));
        segments
    }
}

/// What is led through the rules, what matters most first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Segment {
    /// It does not meet the rules if the eBPF program answers it, but shows which clients they are against.
    Syn,
    /// The first one with data.
    Data,
    /// The same where tracking takes it for an earlier connection's: in TIME_WAIT it remembers that for two minutes.
    LaterData,
    /// The copy of a SYN that the eBPF program sends to the kernel to end a TIME_WAIT.
    SynFin,
}

/// A packet that is led through the rules.
#[derive(Clone, Debug)]
struct Packet<'a> {
    segment: Segment,
    port: u16,
    family: Family,
    interface: Option<&'a str>,
    /// The addresses that it may be for; none: not known.
    addresses: Vec<IpAddr>,
    /// What connection tracking says, as bits that are possible.
    states: u8,
    /// A rule may have set its mark; else that is 0.
    marked: bool,
}

impl Packet<'_> {
    /// The flags that are known, and which of them are set.
    fn flags(&self) -> (u8, u8) {
        use flag::{ACK, CWR, ECE, FIN, PSH, SYN};
        match self.segment {
            Segment::Syn => (!(ECE | CWR), SYN),
            Segment::Data | Segment::LaterData => (!(PSH | ECE | CWR), ACK),
            Segment::SynFin => (!(ECE | CWR), SYN | FIN),
        }
    }

    fn is(&self, test: &Test) -> Truth {
        match test {
            Test::Known(truth) => *truth,
            Test::Family(family) => Truth::of(self.family == *family),
            Test::Port(from, to) => Truth::of((*from..=*to).contains(&self.port)),
            Test::Flags { mask, value } => {
                let (known, set) = self.flags();
                if (set ^ value) & mask & known != 0 {
                    Truth::No
                } else if mask & !known == 0 {
                    Truth::Yes
                } else {
                    Truth::Maybe
                }
            }
            Test::AnyFlag(flags) => {
                let (known, set) = self.flags();
                if flags & set != 0 {
                    Truth::Yes
                } else if flags & !known == 0 {
                    Truth::No
                } else {
                    Truth::Maybe
                }
            }
            Test::State(states) => match (self.states & states, self.states & !states) {
                (0, _) => Truth::No,
                (_, 0) => Truth::Yes,
                _ => Truth::Maybe,
            },
            Test::Interface(name) => match (name.strip_suffix('*'), self.interface) {
                (Some(""), _) => Truth::Yes,
                (None, _) if name == "lo" => Truth::No,
                (_, None) => Truth::Maybe,
                (Some(prefix), Some(interface)) => Truth::of(interface.starts_with(prefix)),
                (None, Some(interface)) => Truth::of(interface == name),
            },
            Test::To(from, to) => {
                let inside = self.addresses.iter().filter(|a| (from..=to).contains(a)).count();
                if inside == self.addresses.len() && inside > 0 {
                    Truth::Yes
                } else if inside > 0 || (self.addresses.is_empty() && !is_nobodys(*from, *to)) {
                    Truth::Maybe
                } else {
                    Truth::No
                }
            }
            Test::From(from, to) => match () {
                () if Family::of(*from) != self.family || is_nobodys(*from, *to) => Truth::No,
                () if is_everybodys(*from, *to) => Truth::Yes,
                () => Truth::Maybe,
            },
            Test::Mark { .. } if self.marked => Truth::Maybe,
            Test::Mark { mask, value } => Truth::of(value & mask == 0),
            Test::Any(tests) => tests.iter().map(|test| self.is(test)).max().unwrap_or(Truth::No),
            Test::All(tests) => self.is_all(tests),
            Test::Not(test) => self.is(test).not(),
        }
    }

    fn is_all(&self, tests: &[Test]) -> Truth {
        let mut all = Truth::Yes;
        for test in tests {
            all = all.min(self.is(test));
            if all == Truth::No {
                break;
            }
        }
        all
    }
}

/// Addresses that no packet from the network rightly has: loopback, unspecified, multicast, reserved.
fn is_nobodys(from: IpAddr, to: IpAddr) -> bool {
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let (first, last) = (from.octets()[0], to.octets()[0]);
            (first == last && matches!(first, 0 | 127)) || first >= 224
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            to <= Ipv6Addr::LOCALHOST || (from.is_multicast() && to.is_multicast())
        }
        _ => true,
    }
}

fn is_everybodys(from: IpAddr, to: IpAddr) -> bool {
    from.is_unspecified()
        && match to {
            IpAddr::V4(to) => to == Ipv4Addr::BROADCAST,
            IpAddr::V6(to) => to.to_bits() == u128::MAX,
        }
}

/// What `text` names: an address, or a network (`10.0.0.0/8`); first and last.
fn network(text: &str) -> Option<(IpAddr, IpAddr)> {
    let (address, length) = match text.split_once('/') {
        Some((address, length)) => (address, Some(length)),
        None => (text, None),
    };
    let address: IpAddr = address.parse().ok()?;
    let bits = if address.is_ipv4() { 32_u32 } else { 128 };
    let length = match length {
        None => bits,
        Some(length) => match (length.parse::<u32>(), length.parse::<Ipv4Addr>()) {
            (Ok(length), _) => length,
            // As iptables may write it.
            (_, Ok(mask)) if mask.to_bits().count_zeros() == mask.to_bits().trailing_zeros() => {
                mask.to_bits().count_ones()
            }
            _ => return None,
        },
    };
    let host = bits.checked_sub(length)?;
    Some(match address {
        IpAddr::V4(address) => {
            let mask = u32::MAX.checked_shl(host).unwrap_or(0);
            let first = address.to_bits() & mask;
            (Ipv4Addr::from_bits(first).into(), Ipv4Addr::from_bits(first | !mask).into())
        }
        IpAddr::V6(address) => {
            let mask = u128::MAX.checked_shl(host).unwrap_or(0);
            let first = address.to_bits() & mask;
            (Ipv6Addr::from_bits(first).into(), Ipv6Addr::from_bits(first | !mask).into())
        }
    })
}

/// Leads every packet through all chains.
fn judge(chains: &[Chain], scene: &Scene<'_>) -> Vec<Obstacle> {
    let mut bases: Vec<_> =
        chains.iter().enumerate().filter_map(|(i, chain)| Some((i, chain.base.as_ref()?))).collect();
    bases.sort_by_key(|(_, base)| (base.hook, base.priority));
    let by_name: HashMap<_, _> =
        chains.iter().enumerate().map(|(i, chain)| ((&*chain.table, &*chain.name), i)).collect();

    let usable = |address: &&IpAddr| {
        !is_nobodys(**address, **address)
            && !matches!(address, IpAddr::V6(address) if address.is_unicast_link_local())
    };
    let usable: Vec<_> = scene.addresses.iter().filter(usable).copied().collect();
    let interfaces: Vec<_> = match scene.interfaces {
        [] => vec![None],
        names => names.iter().map(|name| Some(&**name)).collect(),
    };
    let mut found = Found::default();
    for family in [Family::V4, Family::V6] {
        let addresses: Vec<_> = usable.iter().filter(|a| Family::of(**a) == family).copied().collect();
        if addresses.is_empty() && !usable.is_empty() {
            // Nobody reaches the node by this family.
            continue;
        }
        for &interface in &interfaces {
            for &port in scene.ports {
                for (segment, states) in scene.tracking.segments() {
                    let addresses = addresses.clone();
                    let packet =
                        Packet { segment, port, family, interface, addresses, states, marked: false };
                    let mut walk =
                        Walk { chains, by_name: &by_name, packet, been: HashMap::new(), found: &mut found };
                    walk.through(&bases);
                }
            }
        }
    }
    found.obstacles(scene.tracking)
}

/// How a packet leaves a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Exit {
    /// It may go on behind the jump, or meet the policy.
    On,
    /// It was surely accepted.
    Accepted,
    /// It surely got no further.
    Stopped,
}

/// The way of one packet.
struct Walk<'a> {
    chains: &'a [Chain],
    by_name: &'a HashMap<(&'a str, &'a str), usize>,
    packet: Packet<'a>,
    /// Where it has been, and in which state.
    been: HashMap<(usize, bool, u8), Exit>,
    found: &'a mut Found,
}

impl<'a> Walk<'a> {
    fn through(&mut self, bases: &[(usize, &Base)]) {
        for &(i, base) in bases {
            let chain = &self.chains[i];
            let elsewhere = !base.devices.is_empty()
                && self.packet.interface.is_some_and(|name| base.devices.iter().all(|device| device != name));
            if chain.family.is_some_and(|family| family != self.packet.family) || elsewhere {
                continue;
            }
            match self.chain(i, 0) {
                Exit::Accepted => {}
                Exit::Stopped => return,
                Exit::On => {
                    if base.drops {
                        let place = format!("{}, chain {}, its policy", chain.table, chain.name);
                        self.found.add(place, Kind::Policy, "drop", &self.packet);
                        return;
                    }
                }
            }
        }
    }

    fn chain(&mut self, i: usize, depth: usize) -> Exit {
        let key = (i, self.packet.marked, self.packet.states);
        if let Some(exit) = self.been.get(&key) {
            return *exit;
        }
        if depth > MAX_DEPTH {
            return Exit::On;
        }
        let chain: &'a Chain = &self.chains[i];
        let exit = chain.rules.iter().find_map(|rule| self.rule(chain, rule, depth)).unwrap_or(Exit::On);
        self.been.insert(key, exit);
        exit
    }

    /// `None`: the packet may go on to the next rule.
    fn rule(&mut self, chain: &Chain, rule: &Rule, depth: usize) -> Option<Exit> {
        let matches = self.packet.is_all(&rule.tests);
        if matches == Truth::No {
            return None;
        }
        for action in &rule.actions {
            let exit = match action {
                Action::Mark => {
                    self.packet.marked = true;
                    continue;
                }
                Action::Untrack => {
                    // It may have been tracked all the same.
                    let sure = matches == Truth::Yes;
                    self.packet.states = if sure { 0 } else { self.packet.states } | state::UNTRACKED;
                    continue;
                }
                Action::Accept => Exit::Accepted,
                Action::Return => Exit::On,
                Action::Jump(target) => match self.target(chain, target, depth) {
                    Exit::On => continue,
                    exit => exit,
                },
                Action::Goto(target) => self.target(chain, target, depth),
                Action::Stop(how) => {
                    self.found.add(rule.place.clone(), Kind::Stop, how, &self.packet);
                    Exit::Stopped
                }
                Action::Divert(how) => {
                    self.found.add(rule.place.clone(), Kind::Divert, how, &self.packet);
                    Exit::Stopped
                }
                Action::Unclear(what) => {
                    let how = format!("do with `{what}` what is not known here to");
                    self.found.add(rule.place.clone(), Kind::Stop, &how, &self.packet);
                    continue;
                }
            };
            if matches == Truth::Yes {
                return Some(exit);
            }
        }
        None
    }

    fn target(&mut self, chain: &Chain, target: &str, depth: usize) -> Exit {
        self.by_name.get(&(&*chain.table, target)).map_or(Exit::On, |&i| self.chain(i, depth + 1))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Stop,
    Divert,
    Policy,
}

/// The places where packets may end, each once.
#[derive(Debug, Default)]
struct Found {
    places: Vec<Place>,
    by_name: HashMap<String, usize>,
}

#[derive(Debug)]
struct Place {
    name: String,
    kind: Kind,
    how: String,
    ports: BTreeSet<u16>,
    segments: BTreeSet<Segment>,
}

impl Found {
    fn add(&mut self, name: String, kind: Kind, how: &str, packet: &Packet<'_>) {
        let i = *self.by_name.entry(name).or_insert_with_key(|name| {
            let (name, how) = (name.clone(), how.to_owned());
            self.places.push(Place { name, kind, how, ports: BTreeSet::new(), segments: BTreeSet::new() });
            self.places.len() - 1
        });
        self.places[i].ports.insert(packet.port);
        self.places[i].segments.insert(packet.segment);
    }

    fn obstacles(self, tracking: Tracking) -> Vec<Obstacle> {
        let obstacle = |place: Place| Obstacle {
            what: format!("may {} {}", place.how, place.packets()),
            remedy: place.remedy(tracking),
            place: place.name,
        };
        self.places.into_iter().map(obstacle).collect()
    }
}

impl Place {
    /// Clients are meant, and not what steering makes of them.
    fn is_for_clients(&self) -> bool {
        self.segments.contains(&Segment::Syn)
    }

    /// What may end here, in words.
    fn packets(&self) -> String {
        let named: Vec<_> = self.ports.iter().map(u16::to_string).collect();
        let ports = format!("port{} {}", if named.len() == 1 { "" } else { "s" }, named.join(", "));
        if self.is_for_clients() {
            return format!("TCP packets to {ports}");
        }
        let has = |segment| self.segments.contains(&segment);
        let mut packets = Vec::new();
        if has(Segment::Data) {
            packets.push(format!(
                "the first data of a steered flow to {ports}, whose handshake the firewall did not see"
            ));
        } else if has(Segment::LaterData) {
            packets.push(format!(
                "the first data of a steered flow to {ports}, if tracking knows an earlier one of the same client's port"
            ));
        }
        if has(Segment::SynFin) {
            packets.push(format!(
                "the copy of a SYN to {ports} with FIN, which ends a TIME_WAIT (clients that reuse a port within a \
                 minute would hang)"
            ));
        }
        packets.join(", and ")
    }

    fn remedy(&self, tracking: Tracking) -> String {
        if self.is_for_clients() {
            let remedy = match self.kind {
                Kind::Divert => {
                    "steer the port that the rule sends clients to, where the proxy listens, or take this port out of \
                     the rule"
                }
                Kind::Policy => {
                    "accept the port for all clients before the chain's end; or, if steered flows may bypass it, set \
                     steer.firewall = \"ignore\""
                }
                Kind::Stop => {
                    "accept the port before this rule; or, if steered flows may bypass it, set \
                     steer.firewall = \"ignore\""
                }
            };
            return remedy.to_owned();
        }
        let place = if self.kind == Kind::Policy { "the chain's end" } else { "this rule" };
        let remedy = format!(
            "accept the port before {place}, without asking for a SYN or a state; or, if it is the state that decides, \
             exempt the port from tracking (notrack in raw); or, if such flows may be lost, set \
             steer.firewall = \"ignore\""
        );
        // The flags alone make the copy invalid, and a missing SYN is missing whatever the settings.
        let settings = match (tracking.loose, self.segments.first()) {
            (false, Some(Segment::Data)) => {
                "net.netfilter.nf_conntrack_tcp_loose = 1 and net.netfilter.nf_conntrack_tcp_be_liberal = 1"
            }
            (true, Some(Segment::LaterData)) => "net.netfilter.nf_conntrack_tcp_be_liberal = 1",
            _ => return remedy,
        };
        let helps = if self.segments.contains(&Segment::SynFin) { "for the data alone: " } else { "or set " };
        format!("{remedy}; {helps}{settings}")
    }
}

#[cfg(test)]
mod tests;
