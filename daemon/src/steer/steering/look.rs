//! What the daemon must see of the namespace: interfaces, routes, settings, links, firewall rules.

use std::{
    net::{IpAddr, Ipv4Addr},
    path::PathBuf,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use aya::programs::{
    LinkOrder, SchedClassifier, TcAttachType,
    links::{FdLink, PinnedLink},
    tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcError},
};
use preflightd_common::abi::{self, config_flags};

use super::{
    super::{
        Error, firewall,
        interfaces::{self, Interface, Routes},
        maps::words,
        object,
        pins::{info_of, is_linked},
        sysctl::Sysctls,
    },
    Result, Steering,
};
use crate::config::{Firewall, Position, SteerMode};

/// How often firewall rules are looked at.
const FIREWALL: Duration = Duration::from_secs(10);

/// For the first look at firewall rules.
const PATIENCE: Duration = Duration::from_secs(10);

/// An interface that has the program.
pub(super) struct Attached {
    pub(super) name: String,
    /// Where the kernel tells of the link; empty: there is no link to look at.
    info: PathBuf,
    /// Somebody else took the program off.
    pub(super) removed: bool,
    _link: Option<PinnedLink>,
}

impl Steering {
    /// Looks at interfaces, settings and links, and attaches where the program is missing.
    pub(super) fn look(&mut self, first: bool) -> Result<()> {
        self.times.look = Instant::now();
        let (known, routes) = interfaces::look(&self.netns)?;
        if routes != self.routes {
            // Not sure until all of them are told.
            self.routes = Routes::default();
            self.config.flags &= !(config_flags::ROUTES_V4 | config_flags::ROUTES_V6);
            self.maps.set_config(self.config)?;
            self.maps.set_routes(&for_trie(&routes))?;
            self.routes = routes;
        }
        self.known = known;
        // Now and then as if nothing were known: a predecessor may have written after us.
        self.served = None;
        if let Ok(Ok(sysctls)) = self.netns.enter(Sysctls::read) {
            self.sysctls = sysctls;
        }
        let named = self.options.interfaces.clone();
        let wanted: Vec<Interface> = if named.is_empty() {
            interfaces::automatic(&self.known).into_iter().cloned().collect()
        } else {
            self.known.iter().filter(|interface| named.contains(&interface.name)).cloned().collect()
        };
        for name in &named {
            let there = self.known.iter().find(|interface| interface.name == *name);
            let why = match there {
                Some(interface) if interface.ethernet || interface.loopback => continue,
                Some(_) => "its frames are not Ethernet's, and the programs would not understand them",
                None => "there is none",
            };
            if first {
                let remedy = "check steer.interfaces against `ip link`, or leave it out";
                return Err(Error::new(format!("steer on the interface {name}"), remedy)(why));
            }
        }
        let table = self.known.iter().map(|interface| (interface.index, for_programs(interface))).collect();
        self.maps.set_interfaces(&table)?;
        self.attached.retain(|index, attached| {
            let now = self.known.iter().find(|interface| interface.index == *index);
            match now {
                // It may have another name now.
                Some(interface) => attached.name.clone_from(&interface.name),
                None => {
                    if let Some(pins) = &self.pins {
                        pins.unpin(*index);
                    }
                }
            }
            now.is_some()
        });
        for attached in self.attached.values_mut() {
            attached.removed |= !is_linked(&attached.info);
        }
        if self.options.mode == SteerMode::Off && self.attached.is_empty() {
            return Ok(());
        }
        for interface in &wanted {
            if self.attached.contains_key(&interface.index) {
                continue;
            }
            match self.attach(interface) {
                Ok(attached) => {
                    tracing::info!(interface = interface.name, program = self.program, "attached");
                    self.attached.insert(interface.index, attached);
                }
                // One that vanished meanwhile is no reason to give up.
                Err(error) if first && named.contains(&interface.name) => return Err(error),
                Err(error) => tracing::warn!(%error, "an interface stays without the program"),
            }
        }
        // What an earlier daemon left elsewhere.
        if first && let Some(pins) = &self.pins {
            for index in pins.linked().into_iter().filter(|index| !self.attached.contains_key(index)) {
                pins.unpin(index);
            }
        }
        Ok(())
    }

    /// Puts the program on an interface: into the link that an earlier daemon left there, else by a new one.
    pub(super) fn attach(&mut self, interface: &Interface) -> Result<Attached> {
        let name = interface.name.clone();
        let what = format!("attach to the ingress of {name}");
        let remedy = "run as root, or with CAP_BPF and CAP_NET_ADMIN";
        let program: &mut SchedClassifier = object::program(&mut self.ebpf, self.program);
        let Some(pins) = &self.pins else {
            let attach = || {
                match tc::qdisc_add_clsact(&name) {
                    Ok(()) | Err(TcError::AlreadyAttached) => {}
                    Err(error) => return Err(Error::new(what.clone(), remedy)(error)),
                }
                let options = TcAttachOptions::Netlink(NlOptions::default());
                program
                    .attach_with_options(&name, TcAttachType::Ingress, options)
                    .map_err(Error::new(what.clone(), remedy))?;
                Ok(())
            };
            self.netns.enter(attach)??;
            return Ok(Attached { name, info: PathBuf::new(), removed: false, _link: None });
        };
        let adopted = pins.pinned(interface.index).and_then(|pinned| {
            let link = SchedClassifierLink::try_from(FdLink::from(pinned)).ok()?;
            // Refused where the interface is another one than then.
            let id = program.attach_to_link(link).ok()?;
            program.take_link(id).ok()
        });
        let is_new = adopted.is_none();
        let link = if let Some(link) = adopted {
            link
        } else {
            let order = match self.options.position {
                Position::First => LinkOrder::first(),
                Position::Last => LinkOrder::last(),
            };
            let attach = || {
                program.attach_with_options(&name, TcAttachType::Ingress, TcAttachOptions::TcxOrder(order))
            };
            let id = self.netns.enter(attach)?.map_err(Error::new(what.clone(), remedy))?;
            program.take_link(id).map_err(Error::new(what.clone(), remedy))?
        };
        let link = FdLink::try_from(link).map_err(Error::new(what.clone(), remedy))?;
        let id = link.info().map_err(Error::new(what, remedy))?.id();
        let link = if is_new {
            Some(pins.pin(interface.index, link)?)
        } else {
            // One descriptor of it, so that its place in /proc is known.
            drop(link);
            pins.pinned(interface.index)
        };
        Ok(Attached { name, info: info_of(id), removed: false, _link: link })
    }

    /// Looks at the firewall on a thread of its own; `now`: waits for it.
    pub(super) fn look_at_firewall(&mut self, now: bool) -> Result<()> {
        if self.options.mode != SteerMode::Steer || self.options.firewall == Firewall::Ignore {
            return Ok(());
        }
        let changed = self.looking.is_none() && self.changes.as_ref().is_some_and(firewall::Changes::seen);
        if now || changed || (self.looking.is_none() && self.times.firewall.elapsed() >= FIREWALL) {
            self.times.firewall = Instant::now();
            let (tell, told) = mpsc::channel();
            let (netns, ports) = (self.netns.clone(), self.rows.keys().copied().collect::<Vec<_>>());
            let names = self.options.interfaces.clone();
            let look = move || {
                let found = match netns.enter(|| {
                    if names.is_empty() {
                        firewall::obstacles(&ports)
                    } else {
                        firewall::obstacles_at(&ports, &names)
                    }
                }) {
                    Ok(Ok(found)) => Ok(found
                        .into_iter()
                        .map(|found| format!("{}: {}; {}", found.place, found.what, found.remedy))
                        .collect()),
                    Ok(Err(error)) | Err(error) => Err(error.to_string()),
                };
                let _ = tell.send(found);
            };
            thread::Builder::new()
                .name("firewall".into())
                .spawn(look)
                .map_err(Error::new("look at the firewall", "allow another thread"))?;
            self.looking = Some(told);
        }
        let Some(looking) = &self.looking else { return Ok(()) };
        let found = if now {
            looking.recv_timeout(PATIENCE).unwrap_or_else(|error| {
                Err(format!("the firewall's rules could not be read in time: {error}"))
            })
        } else {
            match looking.try_recv() {
                Ok(found) => found,
                Err(mpsc::TryRecvError::Empty) => return Ok(()),
                Err(mpsc::TryRecvError::Disconnected) => Err("the look at the firewall broke off".into()),
            }
        };
        self.looking = None;
        // What cannot be read may hold anything.
        self.obstacles = found.unwrap_or_else(|error| vec![error]);
        Ok(())
    }
}

/// Routes as their map has them: addresses of IPv4 behind 96 bits.
fn for_trie(routes: &Routes) -> Vec<([u32; 4], u32, u32)> {
    let prefix = |route: &interfaces::Route| {
        let front = if route.address.is_ipv4() { 96 } else { 0 };
        (words(route.address), front + u32::from(route.length), route.index)
    };
    // An IPv4 client without a route must not meet the default route of IPv6.
    let no_ipv4 = (words(IpAddr::V4(Ipv4Addr::UNSPECIFIED)), 96, 0);
    std::iter::once(no_ipv4).chain(routes.routes.iter().map(prefix)).collect()
}

/// What the programs must know of an interface.
fn for_programs(interface: &Interface) -> abi::Interface {
    // Lengths of an IP and a TCP header without options.
    let mss = |headers: u32| u16::try_from(interface.mtu.saturating_sub(headers)).unwrap_or(u16::MAX);
    abi::Interface {
        mss_v4: mss(40).max(536),
        mss_v6: mss(60).max(1220),
        symmetric_v4: u16::from(interface.symmetric_v4 || interface.loopback),
        symmetric_v6: u16::from(interface.symmetric_v6 || interface.loopback),
    }
}
