//! What of steering works on this node: each condition by itself, what was found, what it costs where it is not met,
//! and what to do about it.
#![forbid(unsafe_code)]

use std::{
    fs,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
};

use aya::util::KernelVersion;
use caps::{CapSet, Capability};
use serde::Serialize;

use super::{
    firewall,
    interfaces::{self, Interface},
    listeners::{Listeners, Listening},
    netns::Netns,
    object::{ASSIGN, BTF},
    sysctl::Sysctls,
};

/// `BPF_FS_MAGIC` of `linux/magic.h`.
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;
/// The smallest MTUs with which a SYN-ACK can offer what the kernel asks of an MSS: 536 and 1220 bytes.
const LEAST_MTU_V4: u32 = 576;
const LEAST_MTU_V6: u32 = 1280;

/// What shall be steered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Where the proxy listens; `0.0.0.0` stands for any address.
    pub addresses: Vec<SocketAddr>,
    /// The proxy's network namespace, as [`Netns::open`] takes it.
    pub netns: String,
    /// The interfaces; none: those that are found by themselves.
    pub interfaces: Vec<String>,
    /// Where maps and links are pinned.
    pub pin_dir: PathBuf,
    /// Rules of the firewall are no reason to refuse.
    pub ignore_firewall: bool,
}

impl Default for Target {
    fn default() -> Self {
        Self {
            addresses: Vec::new(),
            netns: String::new(),
            interfaces: Vec::new(),
            pin_dir: PathBuf::from("/sys/fs/bpf/preflightd"),
            ignore_firewall: false,
        }
    }
}

/// How a condition is met.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// It is.
    Ok,
    /// It is not, and less works for it.
    Limited,
    /// It is not, and without it nothing works.
    Missing,
}

/// For what a condition must be met.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum NeededFor {
    /// To steer.
    Steer,
    /// Even to observe, and so to steer.
    Observe,
}

/// One condition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was looked at.
    pub name: String,
    /// How it is met.
    pub status: Status,
    /// For what it is needed, where it is missing.
    pub needed_for: NeededFor,
    /// What was found.
    pub found: String,
    /// What does not work for it; empty if it is met.
    pub costs: String,
    /// What to do about it; empty if it is met.
    pub remedy: String,
}

/// All conditions.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// In the order in which they should be met.
    pub checks: Vec<Check>,
}

impl Report {
    /// Nothing that steering needs is missing.
    pub fn can_steer(&self) -> bool {
        self.checks.iter().all(|check| check.status != Status::Missing)
    }

    /// Nothing is missing that even observing needs.
    pub fn can_observe(&self) -> bool {
        let stops = |check: &Check| check.status == Status::Missing && check.needed_for == NeededFor::Observe;
        !self.checks.iter().any(stops)
    }

    fn ok(&mut self, name: impl Into<String>, found: impl Into<String>) {
        self.checks.push(Check {
            name: name.into(),
            status: Status::Ok,
            needed_for: NeededFor::Steer,
            found: found.into(),
            costs: String::new(),
            remedy: String::new(),
        });
    }

    fn limited(
        &mut self,
        name: impl Into<String>,
        found: impl Into<String>,
        costs: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        self.ok(name, found);
        self.spoil(Status::Limited, NeededFor::Steer, costs.into(), remedy.into());
    }

    fn missing(
        &mut self,
        needed_for: NeededFor,
        name: impl Into<String>,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        self.ok(name, found);
        let costs = match needed_for {
            NeededFor::Steer => "nothing can be steered",
            NeededFor::Observe => "nothing can be steered or observed",
        };
        self.spoil(Status::Missing, needed_for, costs.to_owned(), remedy.into());
    }

    fn spoil(&mut self, status: Status, needed_for: NeededFor, costs: String, remedy: String) {
        if let Some(check) = self.checks.last_mut() {
            *check = Check { status, needed_for, costs, remedy, ..check.clone() };
        }
    }
}

/// Looks at everything, without changing anything. Blocks, for as long as programs that list firewall rules need.
pub fn probe(target: &Target) -> Report {
    let mut report = Report::default();
    kernel(&mut report);
    io_uring(&mut report);
    let netns = Netns::open(&target.netns);
    let own = netns.as_ref().is_ok_and(Netns::is_own);
    capabilities(&mut report, own);
    pin_dir(&mut report, &target.pin_dir);
    let entered = netns.and_then(|netns| netns.enter(|| network(target)));
    match entered {
        Ok(checks) => report.checks.extend(checks.checks),
        Err(error) => {
            let remedy = "name the proxy's namespace: a path, or the number of one of its processes";
            report.missing(NeededFor::Observe, "network namespace", error.to_string(), remedy);
        }
    }
    report
}

fn kernel(report: &mut Report) {
    let name = "kernel";
    let types = btf_rs::Btf::from_file(BTF);
    let has_function = types.as_ref().is_ok_and(|types| {
        let named = types.resolve_types_by_name(ASSIGN).unwrap_or_default();
        named.iter().any(|found| matches!(found, btf_rs::Type::Func(_)))
    });
    match KernelVersion::current() {
        Ok(version) => {
            let release = rustix::system::uname().release().to_string_lossy().into_owned();
            let hook = if version >= KernelVersion::new(6, 6, 0) { "TCX" } else { "clsact" };
            let found = format!("{release}, attaches by {hook}");
            if version < KernelVersion::new(5, 17, 0) {
                let remedy =
                    "run Linux 5.17 or later to observe (the programs call bpf_loop), 6.9 or later to steer";
                report.missing(NeededFor::Observe, name, found, remedy);
            } else if has_function || version >= KernelVersion::new(6, 9, 0) {
                report.ok(name, found);
            } else {
                let remedy = "run Linux 6.9 or later: Debian 13 (6.12), Ubuntu 24.04 with its HWE kernel (6.11 or \
                              later), RHEL 10 (6.12), Amazon Linux 2023 with kernel6.12, Fedora. Too old are Debian 12 \
                              (6.1), Ubuntu 22.04 (5.15), Ubuntu 24.04 as first released (6.8) and RHEL 9 (5.14); \
                              there mode = \"observe\" works, and listeners with an upstream do";
                report.missing(NeededFor::Steer, name, found, remedy);
            }
        }
        Err(error) => {
            let found = format!("its version cannot be read: {error}");
            report.missing(NeededFor::Observe, name, found, "mount /proc");
        }
    }
    match types {
        Ok(_) => {
            report.ok("type information", BTF);
            if has_function {
                report.ok("kernel function", ASSIGN);
            } else {
                let remedy = "run Linux 6.9 or later, built with CONFIG_BPF_SYSCALL, CONFIG_SYN_COOKIES and \
                     CONFIG_DEBUG_INFO_BTF";
                let found = format!("the kernel has no {ASSIGN}");
                report.missing(NeededFor::Steer, "kernel function", found, remedy);
            }
        }
        Err(error) => {
            let found = format!("{BTF}: {}", with_causes(&error));
            let remedy = "run a kernel with CONFIG_DEBUG_INFO_BTF, and let /sys be seen";
            report.missing(NeededFor::Steer, "type information", found, remedy);
        }
    }
}

fn io_uring(report: &mut Report) {
    let Err(error) = io_uring::IoUring::new(2) else {
        return report.ok("io_uring", "the workers can use it");
    };
    let disabled = fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
    let found = match disabled.trim() {
        "" | "0" => format!("{error}"),
        value => format!("{error}; kernel.io_uring_disabled = {value}"),
    };
    report.limited(
        "io_uring",
        found,
        "the workers use epoll, which costs more CPU time",
        "set kernel.io_uring_disabled = 0 and allow io_uring in the seccomp profile",
    );
}

fn capabilities(report: &mut Report, own_netns: bool) {
    let mut needed = vec![Capability::CAP_BPF, Capability::CAP_NET_ADMIN, Capability::CAP_PERFMON];
    if !own_netns {
        needed.push(Capability::CAP_SYS_ADMIN);
    }
    let effective = caps::read(None, CapSet::Effective).unwrap_or_default();
    for capability in needed {
        let name = capability.to_string();
        // The kernel takes CAP_SYS_ADMIN for these two as well.
        let covered = matches!(capability, Capability::CAP_BPF | Capability::CAP_PERFMON)
            && effective.contains(&Capability::CAP_SYS_ADMIN);
        if effective.contains(&capability) {
            report.ok(name, "held");
        } else if covered {
            report.ok(name, "covered by CAP_SYS_ADMIN");
        } else {
            let remedy = match capability {
                Capability::CAP_SYS_ADMIN => {
                    "run as root or with it, since the proxy's network namespace is another one; or run inside that"
                }
                _ => "run as root, or grant it (systemd: AmbientCapabilities=; Kubernetes: capabilities.add)",
            };
            report.missing(NeededFor::Observe, name, "not held", remedy);
        }
    }
    // Capabilities of a user namespace are no good to bpf(2).
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let numbers: Vec<_> = map.split_whitespace().collect();
    if !numbers.is_empty() && numbers != ["0", "0", "4294967295"] {
        report.missing(
            NeededFor::Observe,
            "user namespace",
            "this process is not in the first one, where the kernel wants those capabilities",
            "run without a user namespace (Kubernetes: hostUsers: true; no rootless container)",
        );
    }
}

fn pin_dir(report: &mut Report, dir: &Path) {
    let there = dir.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let name = format!("bpffs at {}", dir.display());
    match rustix::fs::statfs(there) {
        Ok(stat) if u64::try_from(stat.f_type).is_ok_and(|magic| magic & 0xffff_ffff == BPF_FS_MAGIC) => {
            report.ok(name, format!("{} is on a BPF file system", there.display()));
        }
        Ok(_) => report.missing(
            NeededFor::Steer,
            name,
            format!("{} is on another file system", there.display()),
            "mount -t bpf bpf /sys/fs/bpf (Kubernetes: let the host mount it, and mount that into the pod)",
        ),
        Err(error) => {
            let found = format!("{}: {error}", there.display());
            report.missing(NeededFor::Steer, name, found, "mount -t bpf bpf /sys/fs/bpf");
        }
    }
}

/// What depends on the network namespace: that of the calling thread.
fn network(target: &Target) -> Report {
    let mut report = Report::default();
    let sysctls = sysctls(&mut report);
    listeners(&mut report, &target.addresses);
    let names = match interfaces::read() {
        Ok(all) => steered_interfaces(&mut report, target, &all, sysctls.as_ref()),
        Err(error) => {
            let remedy = "allow netlink sockets (AF_NETLINK in seccomp or RestrictAddressFamilies)";
            report.missing(NeededFor::Observe, "interfaces", error.to_string(), remedy);
            Vec::new()
        }
    };
    firewall_rules(&mut report, target, &names);
    plain_text(&mut report, &target.addresses);
    report
}

fn sysctls(report: &mut Report) -> Option<Sysctls> {
    let sysctls = match Sysctls::read() {
        Ok(sysctls) => sysctls,
        Err(error) => {
            let remedy = "mount /proc with /proc/sys readable";
            report.missing(NeededFor::Steer, "kernel settings", error.to_string(), remedy);
            return None;
        }
    };
    let name = "net.ipv4.tcp_syncookies";
    if sysctls.syncookies == 0 {
        let remedy = format!("sysctl -w {name}=1, in the proxy's network namespace");
        report.missing(NeededFor::Steer, name, "0, or not in this kernel", remedy);
    } else {
        report.ok(name, sysctls.syncookies.to_string());
    }
    for (name, on, costs) in [
        (
            "net.ipv4.tcp_window_scaling",
            sysctls.window_scaling,
            "windows of steered flows stay below 64 KiB, as without us",
        ),
        ("net.ipv4.tcp_timestamps", sysctls.timestamps, "steered flows have no timestamps, as without us"),
        ("net.ipv4.tcp_sack", sysctls.sack, "steered flows recover more slowly from losses, as without us"),
    ] {
        if on {
            report.ok(name, "on");
        } else {
            report.limited(name, "off", costs, format!("sysctl -w {name}=1"));
        }
    }
    let (scale, window) = (sysctls.rcv_wscale(), sysctls.syn_window());
    report.ok("receive window", format!("scale {scale}, {window} bytes at first, as the kernel's own"));
    if sysctls.bpf_stats {
        let costs = "every packet costs more: the kernel takes the time of each eBPF program";
        report.limited("kernel.bpf_stats_enabled", "on", costs, "sysctl -w kernel.bpf_stats_enabled=0");
    }
    Some(sysctls)
}

fn listeners(report: &mut Report, addresses: &[SocketAddr]) {
    if addresses.is_empty() {
        let costs = "neither the proxy's listeners nor the firewall were looked at";
        return report.limited(
            "listener",
            "no port was named",
            costs,
            "name a configuration with steer = true, or --port",
        );
    }
    let listeners = match Listeners::read() {
        Ok(listeners) => listeners,
        Err(error) => {
            let costs = "it is not known who listens, or by MPTCP";
            return report.limited("listener", error.to_string(), costs, "mount /proc");
        }
    };
    for &address in addresses {
        let name = format!("listener {address}");
        let mut listening = listeners.on(address);
        if listening == Listening::Nobody && address.ip() == Ipv4Addr::UNSPECIFIED {
            // A port alone may be one of IPv6 alone.
            listening = listeners.on((Ipv6Addr::UNSPECIFIED, address.port()).into());
        }
        match listening {
            Listening::Tcp => report.ok(name, "the proxy listens"),
            Listening::Nobody => report.limited(
                name,
                "nobody listens in this network namespace",
                "nothing is deferred: the kernel refuses connections as before",
                "start the proxy, or name its network namespace (netns)",
            ),
            Listening::Mptcp => report.missing(
                NeededFor::Steer,
                name,
                "it listens by MPTCP, which takes no steered flow",
                "have it listen by TCP: GODEBUG=multipathtcp=0 for programs in Go (1.24 and later: Traefik, Caddy), \
                 or sysctl -w net.mptcp.enabled=0 before it starts",
            ),
            Listening::Unclear => report.limited(
                name,
                "somebody listens; whether by MPTCP, the kernel does not tell",
                "if by MPTCP, nothing is steered",
                "load the module mptcp_diag",
            ),
        }
    }
}

/// Returns the names of those that would be steered.
fn steered_interfaces(
    report: &mut Report,
    target: &Target,
    all: &[Interface],
    sysctls: Option<&Sysctls>,
) -> Vec<String> {
    let mut steered = Vec::new();
    for name in &target.interfaces {
        match all.iter().find(|interface| interface.name == *name) {
            Some(interface) => steered.push(interface),
            None => report.missing(
                NeededFor::Observe,
                format!("interface {name}"),
                "there is none of this name",
                "look it up (`ip link`), in the proxy's network namespace",
            ),
        }
    }
    if target.interfaces.is_empty() {
        steered = interfaces::automatic(all);
        if steered.is_empty() {
            report.missing(
                NeededFor::Observe,
                "interfaces",
                "no Ethernet interface is up and has a global address",
                "name the interfaces, or the network namespace that they are in (netns)",
            );
        }
    }
    for interface in &steered {
        this_interface(report, interface, sysctls);
    }
    steered.iter().map(|interface| interface.name.clone()).collect()
}

fn this_interface(report: &mut Report, interface: &Interface, sysctls: Option<&Sysctls>) {
    let name = format!("interface {}", interface.name);
    let Interface { mtu, .. } = *interface;
    if !interface.ethernet && !interface.loopback {
        let remedy = "name an interface whose frames have an Ethernet header (`ip link`)";
        return report.missing(NeededFor::Observe, name, "it is no Ethernet", remedy);
    }
    if interface.up && mtu >= LEAST_MTU_V6 {
        report.ok(&*name, format!("up, MTU {mtu}"));
    } else if !interface.up {
        report.limited(
            &*name,
            "it is down",
            "nothing arrives by it",
            format!("ip link set {} up", interface.name),
        );
    } else if mtu >= LEAST_MTU_V4 {
        let costs = format!("IPv6 flows are not deferred: they need an MTU of {LEAST_MTU_V6}");
        report.limited(&*name, format!("MTU {mtu}"), costs, "raise the MTU if IPv6 is used");
    } else {
        let remedy = format!("raise the MTU to {LEAST_MTU_V4} for IPv4, {LEAST_MTU_V6} for IPv6");
        report.missing(NeededFor::Steer, &*name, format!("MTU {mtu}"), remedy);
    }
    let lookup_v4 = sysctls.is_some_and(|sysctls| sysctls.lo_forwarding_v4);
    let lookup_v6 = sysctls.is_some_and(|sysctls| sysctls.lo_forwarding_v6);
    for (family, symmetric, lookup, number) in
        [("IPv4", interface.symmetric_v4, lookup_v4, 4), ("IPv6", interface.symmetric_v6, lookup_v6, 6)]
    {
        if !interface.has_global_address_of(family == "IPv4") {
            continue;
        }
        let name = format!("{family} routes of {}", interface.name);
        if symmetric {
            report.ok(name, "every route leaves by it");
        } else if lookup {
            report.limited(
                name,
                "some routes leave by others, or to nowhere",
                "the way back is looked up for each flow, which costs time",
                "nothing to do, unless steering all interfaces costs too much",
            );
        } else {
            report.limited(
                name,
                "some routes leave by others, or to nowhere",
                format!("{family} flows that come in by it are not deferred"),
                format!(
                    "sysctl -w net.ipv{number}.conf.lo.forwarding=1: then the way back of each flow can be looked up; \
                     only what arrives by loopback may be forwarded for it"
                ),
            );
        }
    }
}

fn firewall_rules(report: &mut Report, target: &Target, names: &[String]) {
    let mut ports: Vec<_> = target.addresses.iter().map(SocketAddr::port).collect();
    ports.sort_unstable();
    ports.dedup();
    if ports.is_empty() {
        return;
    }
    let obstacles = match firewall::obstacles_at(&ports, names) {
        Ok(obstacles) => obstacles,
        Err(error) => {
            let remedy = "allow netlink sockets (AF_NETLINK in seccomp or RestrictAddressFamilies)";
            return report.missing(NeededFor::Steer, "firewall", error.to_string(), remedy);
        }
    };
    if obstacles.is_empty() {
        report.ok("firewall", "no rule stands in the way");
    }
    for obstacle in obstacles {
        let found = format!("{}: {}", obstacle.place, obstacle.what);
        if target.ignore_firewall {
            let costs = "ignored, as configured: steered flows bypass the rule, or end at it";
            report.limited("firewall", found, costs, obstacle.remedy);
        } else {
            report.missing(NeededFor::Steer, "firewall", found, obstacle.remedy);
        }
    }
}

/// What cannot be seen from here.
fn plain_text(report: &mut Report, addresses: &[SocketAddr]) {
    if let Some(address) = addresses.iter().find(|address| matches!(address.port(), 443 | 8443)) {
        report.limited(
            "plain text",
            format!("{address} is usually TLS"),
            "TLS flows are recognised by their first bytes, and their port is left alone",
            "steer only ports on which HTTP/1.1 arrives in plain text, as behind a TLS-terminating load balancer",
        );
    } else {
        report.ok(
            "plain text",
            "cannot be seen from here: on the served ports HTTP/1.1 must arrive in plain text; ports with TLS, HTTP/2 \
             or the PROXY protocol are recognised by their first bytes, and left alone",
        );
    }
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::steer::netns::tests::{Scratch, have_root};

    fn check<'a>(report: &'a Report, name: &str) -> &'a Check {
        let found = report.checks.iter().find(|check| check.name == name);
        found.unwrap_or_else(|| panic!("{name}: {report:?}"))
    }

    #[test]
    fn what_is_missing_decides() {
        let mut report = Report::default();
        assert!(report.can_steer() && report.can_observe());
        report.ok("a", "");
        report.limited("b", "", "", "");
        assert!(report.can_steer() && report.can_observe());
        report.missing(NeededFor::Steer, "c", "", "");
        assert!(!report.can_steer() && report.can_observe());
        report.missing(NeededFor::Observe, "d", "", "");
        assert!(!report.can_steer() && !report.can_observe());
    }

    #[test]
    fn only_what_is_met_has_no_remedy() {
        let report = probe(&Target {
            addresses: vec!["127.0.0.1:9".parse().expect("an address")],
            interfaces: vec!["no-such-one".to_owned()],
            pin_dir: PathBuf::from("/proc/no/such/directory"),
            ..Target::default()
        });
        for check in &report.checks {
            let met = check.status == Status::Ok;
            assert_eq!((check.costs.is_empty(), check.remedy.is_empty()), (met, met), "{check:?}");
            assert!(!check.found.is_empty(), "{check:?}");
        }
        for (name, status) in [
            ("interface no-such-one", Status::Missing),
            ("bpffs at /proc/no/such/directory", Status::Missing),
            ("listener 127.0.0.1:9", Status::Limited),
        ] {
            assert_eq!(check(&report, name).status, status, "{name}");
        }
        let gone = probe(&Target { netns: "/run/netns/no-such-one".to_owned(), ..Target::default() });
        assert!(check(&gone, "network namespace").found.contains("ip netns list"), "{gone:?}");
        assert!(!gone.can_observe());
    }

    #[test]
    fn looks_into_the_proxys_namespace() {
        if !have_root() {
            return;
        }
        let scratch = Scratch::new("probe");
        for command in [
            "link add one type veth peer name two",
            "link set two up",
            "link set one up",
            "address add 192.0.2.1/24 dev one",
        ] {
            scratch.ip(command);
        }
        let listener = scratch.open().enter(|| std::net::TcpListener::bind("0.0.0.0:80"));
        let _listener = listener.expect("entered").expect("a listener");
        let target = Target {
            addresses: vec!["0.0.0.0:80".parse().expect("an address")],
            netns: scratch.path(),
            ..Target::default()
        };
        let report = probe(&target);
        for name in [
            "CAP_SYS_ADMIN",
            "net.ipv4.tcp_syncookies",
            "listener 0.0.0.0:80",
            "interface one",
            "IPv4 routes of one",
            "firewall",
        ] {
            assert_eq!(check(&report, name).status, Status::Ok, "{name}: {report:?}");
        }

        scratch.sysctl("net/ipv4/tcp_syncookies", "0");
        scratch.ip("link set one mtu 1000");
        scratch.ip("route add 198.51.100.0/24 dev two");
        let report = probe(&target);
        for (name, status) in [
            ("net.ipv4.tcp_syncookies", Status::Missing),
            ("interface one", Status::Limited),
            ("IPv4 routes of one", Status::Limited),
        ] {
            assert_eq!(check(&report, name).status, status, "{name}: {report:?}");
        }
        assert!(check(&report, "IPv4 routes of one").costs.contains("not deferred"));
        scratch.sysctl("net/ipv4/conf/lo/forwarding", "1");
        let report = probe(&target);
        assert!(check(&report, "IPv4 routes of one").costs.contains("looked up"));
        assert!(!report.can_steer());
    }
}
