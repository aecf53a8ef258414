//! The interfaces of a network namespace, what leaves by them, and when that changes; asked of the kernel by netlink.
//!
//! rtnetlink's messages over a plain socket: its own connections leave out what they cannot decode, which here must
//! make a route unsure instead of unseen.
#![forbid(unsafe_code)]

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    fmt,
    future::poll_fn,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::{Duration, Instant},
};

use rtnetlink::{
    MulticastGroup,
    packet_core::{
        NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkBuffer, NetlinkMessage, NetlinkPayload,
    },
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        address::{AddressAttribute, AddressMessage},
        link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage},
        route::{RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteType},
        rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage},
    },
    sys::{AsyncSocket as _, Socket, SocketAddr, TokioSocket, protocols::NETLINK_ROUTE},
};
use tokio::{
    runtime::Handle,
    time::{sleep, timeout},
};

use super::{Error, netns::Netns};

/// The table of the node's own addresses, `RT_TABLE_LOCAL`.
const TABLE_LOCAL: u32 = 255;
/// The table of ordinary routes, `RT_TABLE_MAIN`.
const TABLE_MAIN: u32 = 254;
/// The table that is asked last, `RT_TABLE_DEFAULT`; it is usually empty.
const TABLE_DEFAULT: u32 = 253;
/// The loopback interface's number, in every namespace.
const LOOPBACK: u32 = 1;
/// So many routes of a family are kept; a node with more of them is a router.
const MOST_ROUTES: usize = 4096;
/// How often a dump that changed on the way is begun anew.
const ATTEMPTS: usize = 5;
/// How long the namespace must be quiet before a change is told.
const QUIET: Duration = Duration::from_millis(100);
/// A change is told after this time even if there is no quiet, as with routes of a busy routing daemon.
const LATEST: Duration = Duration::from_secs(1);

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its number in its namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// The largest IP packet, in bytes.
    pub mtu: u32,
    /// It is switched on (`IFF_UP`), with or without a carrier.
    pub up: bool,
    /// Its frames have an Ethernet header, and go to neighbours: also bridges, bonds, VLANs, veth; but no dummy.
    pub ethernet: bool,
    /// It is the loopback interface.
    pub loopback: bool,
    /// Its addresses, without their prefix lengths.
    pub addresses: Vec<IpAddr>,
    /// The number of the bridge, bond or VRF that it is a port of.
    pub master: Option<u32>,
    /// Every IPv4 route leaves by it, so what came in by it is surely answered out of it.
    ///
    /// Routes of all tables count, but for `local` and those by loopback. A route by several interfaces, through a
    /// tunnel, or to nowhere (`blackhole`) makes it unsure, as does a policy rule to nowhere, or what cannot be read.
    pub symmetric_v4: bool,
    /// The same for IPv6. Link-local routes do not count: such peers are answered on their own link.
    pub symmetric_v6: bool,
}

impl Interface {
    /// Whether it has an address that is reachable beyond its link: no loopback, link-local, multicast or unspecified.
    pub fn has_global_address(&self) -> bool {
        self.has_global_address_of(true) || self.has_global_address_of(false)
    }

    /// The same for IPv4, or else for IPv6.
    pub fn has_global_address_of(&self, v4: bool) -> bool {
        self.addresses.iter().any(|address| match address {
            IpAddr::V4(address) => {
                let special = address.is_loopback() || address.is_link_local() || address.is_multicast();
                v4 && !special && !address.is_broadcast() && !address.is_unspecified()
            }
            IpAddr::V6(address) => {
                let special = address.is_loopback() || address.is_unicast_link_local();
                !v4 && !special && !address.is_multicast() && !address.is_unspecified()
            }
        })
    }
}

/// By which interface the kernel answers whom: its unicast routes, for longest-prefix matching.
///
/// The longest prefix that holds a client's address tells what the kernel would do with a packet to it from any of the
/// node's own addresses, if neither marks, a type of service nor a socket bound to an interface decide. A client that no
/// prefix holds is not surely answered at all. Not in here are the node's own addresses, broadcasts, and link-local
/// IPv6, where the same prefix is on every link.
///
/// The neighbours are not looked at: where IPv6 is not forwarded, the kernel prefers any other route, even a shorter
/// one, to that by a router which does not answer on its link.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Routes {
    /// One for each prefix; those of a family that is not sure are left out.
    pub routes: Vec<Route>,
    /// The IPv4 routes are all there, and nothing else decides: no policy rule chooses among tables.
    pub sure_v4: bool,
    /// The same for IPv6, where also no route is for some sources only.
    pub sure_v6: bool,
}

/// Where packets to a prefix go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// The prefix's first address.
    pub address: IpAddr,
    /// How many of its bits count.
    pub length: u8,
    /// The number of the interface that they leave by; 0 if that is not surely one, or none.
    pub index: u32,
}

/// The interfaces in `netns`, by number. Blocks for as long as the kernel needs to list its routes.
///
/// # Errors
/// If the namespace cannot be entered, or the kernel refuses to tell.
pub fn list(netns: &Netns) -> Result<Vec<Interface>, Error> {
    Ok(look(netns)?.0)
}

/// The routes in `netns`. Blocks like [`list`].
///
/// # Errors
/// If the namespace cannot be entered, or the kernel refuses to tell.
pub fn routes(netns: &Netns) -> Result<Routes, Error> {
    Ok(look(netns)?.1)
}

/// [`list`] and [`routes`], for which the kernel is asked once.
///
/// # Errors
/// If the namespace cannot be entered, or the kernel refuses to tell.
pub fn look(netns: &Netns) -> Result<(Vec<Interface>, Routes), Error> {
    netns.enter(|| {
        look_here().map_err(Error::new(
            "list interfaces and routes",
            "allow netlink sockets (AF_NETLINK in seccomp or RestrictAddressFamilies)",
        ))
    })?
}

/// Those that are steered if none is named: Ethernet, up, with an address that is reachable beyond its link, and no
/// port of another one.
pub fn automatic(all: &[Interface]) -> Vec<&Interface> {
    let fits = |interface: &&Interface| {
        interface.ethernet
            && interface.up
            && !interface.loopback
            && interface.master.is_none()
            && interface.has_global_address()
    };
    all.iter().filter(fits).collect()
}

/// Tells when interfaces, addresses, routes or policy rules of a namespace change.
pub struct Watch {
    socket: TokioSocket,
    /// A change was seen, but not told yet.
    seen: bool,
}

impl Watch {
    /// Watches from now on. Belongs to the tokio runtime that it is called in, which must have I/O and time enabled.
    ///
    /// # Errors
    /// If the namespace cannot be entered, the kernel refuses, or this is no tokio runtime.
    pub fn new(netns: &Netns) -> Result<Self, Error> {
        let remedy = "allow netlink sockets (AF_NETLINK in seccomp or RestrictAddressFamilies)";
        let failed = |error: io::Error| Error::new("watch interfaces and routes", remedy)(error);
        let runtime = Handle::try_current().map_err(|error| failed(io::Error::other(error)))?;
        let open = move || -> io::Result<TokioSocket> {
            let _inside = runtime.enter();
            let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
            socket.socket_mut().bind_auto()?;
            for group in [
                MulticastGroup::Link,
                MulticastGroup::Ipv4Ifaddr,
                MulticastGroup::Ipv6Ifaddr,
                MulticastGroup::Ipv4Route,
                MulticastGroup::Ipv6Route,
                MulticastGroup::Ipv4Rule,
                MulticastGroup::Ipv6Rule,
                MulticastGroup::Nexthop,
            ] {
                socket.socket_ref().add_membership(group as u32)?;
            }
            Ok(socket)
        };
        let socket = netns.enter(open)?.map_err(failed)?;
        Ok(Self { socket, seen: false })
    }

    /// Waits for a change, and then until it has been quiet for a moment (100 ms, at most a second). May be dropped
    /// and called again: no change is lost.
    pub async fn changed(&mut self) {
        if !self.seen {
            self.message().await;
            self.seen = true;
        }
        let begun = Instant::now();
        while begun.elapsed() < LATEST && timeout(QUIET, self.message()).await.is_ok() {}
        self.seen = false;
    }

    /// Waits for one message, whatever it says.
    async fn message(&self) {
        let mut ignored = [0; 16];
        match poll_fn(|task| self.socket.poll_recv(task, &mut &mut ignored[..])).await {
            Ok(()) => {}
            // Messages were lost, so there were some.
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
            Err(error) => {
                // Not expected at all. Anything may have changed, but never turn in circles.
                tracing::warn!("cannot read changes of interfaces: {error}");
                sleep(LATEST).await;
            }
        }
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").field("seen", &self.seen).finish_non_exhaustive()
    }
}

/// Where the packets of a family may go.
#[derive(Debug, Default, PartialEq, Eq)]
struct Exits {
    interfaces: BTreeSet<u32>,
    /// There are other ways, or such that we do not understand.
    unsure: bool,
}

impl Exits {
    fn only_by(&self, index: u32) -> bool {
        !self.unsure && self.interfaces.len() == 1 && self.interfaces.contains(&index)
    }
}

/// [`list`] for the calling thread's namespace.
pub(super) fn read() -> io::Result<Vec<Interface>> {
    Ok(look_here()?.0)
}

/// [`look`] for the calling thread's namespace.
fn look_here() -> io::Result<(Vec<Interface>, Routes)> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;

    let links = dump(
        &socket,
        &RouteNetlinkMessage::GetLink(LinkMessage::default()),
        |interfaces: &mut Vec<_>, message| {
            if let RouteNetlinkMessage::NewLink(link) = message {
                interfaces.push(interface(link));
            }
        },
    )?;
    let mut interfaces = links.found;
    interfaces.sort_unstable_by_key(|interface| interface.index);
    let addresses = dump(
        &socket,
        &RouteNetlinkMessage::GetAddress(AddressMessage::default()),
        |addresses: &mut Vec<_>, message| {
            if let RouteNetlinkMessage::NewAddress(address) = message {
                addresses.extend(own_address(&address));
            }
        },
    )?;
    if links.unreadable + addresses.unreadable > 0 {
        tracing::warn!(
            links = links.unreadable,
            addresses = addresses.unreadable,
            "some interfaces or addresses cannot be decoded: they count as not there"
        );
    }
    for (index, address) in addresses.found {
        if let Ok(i) = interfaces.binary_search_by_key(&index, |interface| interface.index) {
            interfaces[i].addresses.push(address);
        }
    }

    let loopbacks: BTreeSet<_> = interfaces.iter().filter(|i| i.loopback).map(|i| i.index).collect();
    let first = interfaces.iter().find(|interface| interface.index == LOOPBACK);
    let lo = first.map_or("lo", |interface| &interface.name);
    let (v4, routes_v4) = family(&socket, AddressFamily::Inet, &loopbacks, lo)?;
    let (v6, routes_v6) = family(&socket, AddressFamily::Inet6, &loopbacks, lo)?;
    let (sure_v4, sure_v6) = (routes_v4.is_some(), routes_v6.is_some());
    let routes = [routes_v4, routes_v6].into_iter().flatten().flatten().collect();
    for interface in &mut interfaces {
        // What comes in by loopback was sent by the node itself.
        interface.symmetric_v4 = interface.loopback || v4.only_by(interface.index);
        interface.symmetric_v6 = interface.loopback || v6.only_by(interface.index);
    }
    Ok((interfaces, Routes { routes, sure_v4, sure_v6 }))
}

fn interface(link: LinkMessage) -> Interface {
    let loopback = link.header.flags.contains(LinkFlags::Loopback);
    let mut interface = Interface {
        index: link.header.index,
        name: String::new(),
        mtu: 0,
        up: link.header.flags.contains(LinkFlags::Up),
        // Without ARP there is no wire: dummy, kube-ipvs0.
        ethernet: link.header.link_layer_type == LinkLayerType::Ether
            && !link.header.flags.contains(LinkFlags::Noarp),
        loopback,
        addresses: Vec::new(),
        master: None,
        symmetric_v4: false,
        symmetric_v6: false,
    };
    for attribute in link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => interface.name = name,
            LinkAttribute::Mtu(mtu) => interface.mtu = mtu,
            LinkAttribute::Controller(master) => interface.master = Some(master),
            _ => {}
        }
    }
    interface
}

/// An interface's number and its own address; `Address` is the peer's if there is `Local` too.
fn own_address(message: &AddressMessage) -> Option<(u32, IpAddr)> {
    let local = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    let address = local.or_else(|| {
        message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })
    })?;
    Some((message.header.index, address))
}

/// Where the packets of a family may go, and its routes if these are sure.
fn family(
    socket: &Socket,
    family: AddressFamily,
    loopbacks: &BTreeSet<u32>,
    lo: &str,
) -> io::Result<(Exits, Option<Vec<Route>>)> {
    let mut request = RouteMessage::default();
    request.header.address_family = family;
    let routes = dump(
        socket,
        &RouteNetlinkMessage::GetRoute(request),
        |(exits, tables): &mut (Exits, Tables), message| {
            // A kernel without IPv6 lists all families instead.
            if let RouteNetlinkMessage::NewRoute(route) = message
                && route.header.address_family == family
            {
                follow(exits, &route, loopbacks);
                tables.add(&route);
            }
        },
    )?;
    let mut request = RuleMessage::default();
    request.header.family = family;
    let rules = dump(
        socket,
        &RouteNetlinkMessage::GetRule(request),
        |(to_nowhere, rules): &mut (bool, Vec<_>), message| {
            // For the exits, any other rule only chooses among tables, all of which were read.
            if let RouteNetlinkMessage::NewRule(rule) = message
                && rule.header.family == family
            {
                use RuleAction::{Goto, Nop, ToTable};
                *to_nowhere |= !matches!(rule.header.action, ToTable | Goto | Nop);
                rules.push(rule);
            }
        },
    );
    let (to_nowhere, order, rules_sure) = match rules {
        // A kernel without policy rules, or without the family: it asks `main` after `local`, and no other.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EAFNOSUPPORT)) => {
            (false, Some(vec![TABLE_LOCAL, TABLE_MAIN]), true)
        }
        rules => {
            let Dump { found: (to_nowhere, rules), unreadable, whole } = rules?;
            (to_nowhere, order(&rules, &routes.found.1, lo), whole && unreadable == 0)
        }
    };
    let sure = routes.whole && routes.unreadable == 0 && rules_sure;
    let (mut exits, tables) = routes.found;
    exits.unsure |= to_nowhere || !sure;
    let matching = match order.as_deref() {
        _ if !sure => None,
        Some([TABLE_LOCAL, TABLE_MAIN]) => tables.matching(false),
        Some([TABLE_LOCAL, TABLE_MAIN, TABLE_DEFAULT]) => tables.matching(true),
        _ => None,
    };
    Ok((exits, matching))
}

/// The routing tables of a family, as far as they matter for [`Routes`].
#[derive(Debug, Default)]
struct Tables {
    main: BTreeMap<(IpAddr, u8), Best>,
    /// Asked where nothing in `main` matches.
    default: BTreeMap<(IpAddr, u8), Best>,
    /// Each table with a route, and whether one of them leads elsewhere than to the node itself.
    any: BTreeMap<u32, bool>,
    /// A longest prefix of `main` and `default` alone does not tell.
    unsure: bool,
}

/// The best route to a prefix in a table.
#[derive(Debug)]
struct Best {
    priority: u32,
    index: u32,
    /// Another one is for some types of service only.
    split: bool,
}

impl Tables {
    fn add(&mut self, route: &RouteMessage) {
        use RouteType::{Anycast, Broadcast, Local, Multicast, Unicast};
        let RouteHeader { address_family, kind, flags, destination_prefix_length: length, .. } = route.header;
        // What the kernel learned of one destination, as its path MTU: by the same interface as its route.
        if flags.contains(RouteFlags::Cloned) {
            return;
        }
        let mut table = u32::from(route.header.table);
        let (mut address, full) = match address_family {
            AddressFamily::Inet => (IpAddr::from(Ipv4Addr::UNSPECIFIED), 32),
            _ => (IpAddr::from(Ipv6Addr::UNSPECIFIED), 128),
        };
        let (mut index, mut priority, mut addressed) = (0, 0, length == 0);
        let mut by_source = route.header.source_prefix_length != 0;
        // Passed over in favour of others, or not checked by the kernel when it was added.
        let odd = RouteFlags::Dead | RouteFlags::Linkdown | RouteFlags::Unresolved | RouteFlags::Onlink;
        let mut odd = flags.intersects(odd) || kind != Unicast;
        for attribute in &route.attributes {
            match attribute {
                RouteAttribute::Table(number) => table = *number,
                RouteAttribute::Priority(number) => priority = *number,
                RouteAttribute::Oif(number) => index = *number,
                RouteAttribute::Destination(RouteAddress::Inet(destination)) if full == 32 => {
                    (address, addressed) = ((*destination).into(), true);
                }
                RouteAttribute::Destination(RouteAddress::Inet6(destination)) if full == 128 => {
                    (address, addressed) = ((*destination).into(), true);
                }
                RouteAttribute::Source(_) => by_source = true,
                // How it gets there, or what is told of it, but not by which interface.
                RouteAttribute::Gateway(_)
                | RouteAttribute::Via(_)
                | RouteAttribute::PrefSource(_)
                | RouteAttribute::Preference(_)
                | RouteAttribute::Metrics(_)
                | RouteAttribute::CacheInfo(_)
                | RouteAttribute::Expires(_)
                | RouteAttribute::Realm(_) => {}
                // Several hops, a tunnel, a next hop object, or what is not known.
                _ => odd = true,
            }
        }
        let to_self = matches!(kind, Local | Broadcast | Anycast | Multicast);
        *self.any.entry(table).or_default() |= !to_self;
        let link_local =
            matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local()) && length >= 10 && addressed;
        let best = match table {
            TABLE_MAIN => &mut self.main,
            TABLE_DEFAULT => &mut self.default,
            TABLE_LOCAL => {
                self.unsure |= !to_self && !link_local && !address.is_multicast();
                self.unsure |= by_source;
                return;
            }
            _ => return,
        };
        self.unsure |= by_source || !addressed || length > full;
        if link_local || self.unsure {
            return;
        }
        let split = route.header.tos != 0;
        let new = Best { priority, index: if odd || split { 0 } else { index }, split };
        let room = best.len() < MOST_ROUTES;
        match best.entry((address, length)) {
            Entry::Occupied(mut best) => best.get_mut().or(&new),
            Entry::Vacant(entry) if room => _ = entry.insert(new),
            Entry::Vacant(_) => self.unsure = true,
        }
    }

    /// The routes for longest-prefix matching over `main`, and then `default` if it is asked; nothing if not sure.
    fn matching(mut self, default_too: bool) -> Option<Vec<Route>> {
        if self.unsure {
            return None;
        }
        if default_too {
            for ((address, length), best) in self.default {
                // Also a route that throws is taken for a match: it makes unsure.
                let hidden =
                    (0..=length).any(|shorter| self.main.contains_key(&(masked(address, shorter), shorter)));
                if !hidden {
                    self.main.insert((address, length), best);
                }
            }
        }
        let route = |((address, length), best): ((IpAddr, u8), Best)| {
            let index = if best.split { 0 } else { best.index };
            Route { address, length, index }
        };
        (self.main.len() <= MOST_ROUTES).then(|| self.main.into_iter().map(route).collect())
    }
}

impl Best {
    /// Keeps the better of two to the same prefix.
    fn or(&mut self, other: &Self) {
        self.split |= other.split;
        match other.priority.cmp(&self.priority) {
            Ordering::Less => (self.priority, self.index) = (other.priority, other.index),
            Ordering::Equal if other.index != self.index => self.index = 0,
            Ordering::Equal | Ordering::Greater => {}
        }
    }
}

/// The first `length` bits of an address.
fn masked(address: IpAddr, length: u8) -> IpAddr {
    let length = u32::from(length);
    match address {
        IpAddr::V4(v4) => {
            let mask = u32::MAX.checked_shl(32_u32.saturating_sub(length)).unwrap_or_default();
            Ipv4Addr::from_bits(v4.to_bits() & mask).into()
        }
        IpAddr::V6(v6) => {
            let mask = u128::MAX.checked_shl(128_u32.saturating_sub(length)).unwrap_or_default();
            Ipv6Addr::from_bits(v6.to_bits() & mask).into()
        }
    }
}

/// The tables that are asked for every packet of the node's own, in turn; nothing if a rule may decide otherwise.
fn order(rules: &[RuleMessage], tables: &Tables, lo: &str) -> Option<Vec<u32>> {
    let mut order = Vec::new();
    for rule in rules {
        if never_decides(rule, tables, lo) {
            continue;
        }
        let mut table = u32::from(rule.header.table);
        let plain = rule.attributes.iter().all(|attribute| match attribute {
            RuleAttribute::Table(number) => {
                table = *number;
                true
            }
            RuleAttribute::Priority(_) | RuleAttribute::Protocol(_) => true,
            RuleAttribute::SuppressPrefixLen(length) => *length == u32::MAX,
            _ => false,
        });
        let header = &rule.header;
        let all = header.src_len == 0 && header.dst_len == 0 && header.tos == 0;
        if !plain
            || !all
            || header.action != RuleAction::ToTable
            || !(header.flags - RuleFlags::Permanent).is_empty()
        {
            return None;
        }
        order.push(table);
    }
    Some(order)
}

/// Whether a rule surely does not change where packets of the node's own go.
fn never_decides(rule: &RuleMessage, tables: &Tables, lo: &str) -> bool {
    let mut table = u32::from(rule.header.table);
    let (mut forwarded, mut mark, mut mask, mut master) = (false, 0, u32::MAX, false);
    for attribute in &rule.attributes {
        match attribute {
            // Packets of the node's own come from loopback.
            RuleAttribute::Iifname(name) => forwarded = name != lo,
            RuleAttribute::FwMark(number) => mark = *number,
            RuleAttribute::FwMask(number) => mask = *number,
            RuleAttribute::Table(number) => table = *number,
            RuleAttribute::L3MDev(_) => master = true,
            _ => {}
        }
    }
    let inverted = rule.header.flags.contains(RuleFlags::Invert);
    match rule.header.action {
        RuleAction::Nop => true,
        _ if forwarded => !inverted,
        RuleAction::ToTable if !master && table != 0 => match tables.any.get(&table) {
            // The base tables count in any case: whether they are asked, and when.
            _ if (TABLE_DEFAULT..=TABLE_LOCAL).contains(&table) => false,
            None => true,
            // As for TPROXY: what is marked goes to the node itself, and nothing by another interface.
            Some(elsewhere) => !elsewhere && !inverted && mark & mask != 0,
        },
        _ => false,
    }
}

/// Adds where a route leads.
fn follow(exits: &mut Exits, route: &RouteMessage, loopbacks: &BTreeSet<u32>) {
    let RouteHeader { kind, destination_prefix_length, .. } = route.header;
    let mut table = u32::from(route.header.table);
    let (mut to, mut link_local) = (BTreeSet::new(), false);
    let (mut tunnel, mut priority) = (false, 0);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Priority(number) => priority = *number,
            RouteAttribute::Oif(index) => _ = to.insert(*index),
            RouteAttribute::MultiPath(hops) => {
                to.extend(hops.iter().map(|hop| hop.interface_index));
                let is_tunnel = |attribute: &_| matches!(attribute, RouteAttribute::Encap(_));
                tunnel |= hops.iter().flat_map(|hop| &hop.attributes).any(is_tunnel);
            }
            RouteAttribute::Encap(_) => tunnel = true,
            RouteAttribute::Destination(RouteAddress::Inet6(address)) => {
                link_local = address.is_unicast_link_local() && destination_prefix_length >= 10;
            }
            _ => {}
        }
    }
    if table == TABLE_LOCAL || link_local {
        return;
    }
    match kind {
        RouteType::Unicast => {
            // No interface: a next hop object that the kernel does not resolve for us.
            exits.unsure |= tunnel || to.is_empty();
            exits.interfaces.extend(to.difference(loopbacks));
        }
        // To ourselves, to many, or on to the next table.
        RouteType::Local
        | RouteType::Broadcast
        | RouteType::Anycast
        | RouteType::Multicast
        | RouteType::Throw => {}
        // What IPv6 kernels have at the very end of a table.
        RouteType::Unreachable if priority == u32::MAX && destination_prefix_length == 0 => {}
        _ => exits.unsure = true,
    }
}

/// What the kernel listed.
#[derive(Debug, Default)]
struct Dump<S> {
    found: S,
    /// Messages that could not be decoded.
    unreadable: usize,
    /// Nothing changed while it was listed.
    whole: bool,
}

/// Asks for a list, of which `take` gets each message. One that changed meanwhile is asked for again, a few times.
fn dump<S: Default>(
    socket: &Socket,
    request: &RouteNetlinkMessage,
    take: impl Fn(&mut S, RouteNetlinkMessage),
) -> io::Result<Dump<S>> {
    let mut dump = Dump::default();
    for sequence in 1..=ATTEMPTS {
        dump = dump_once(socket, request, sequence as u32, &take)?;
        if dump.whole {
            break;
        }
    }
    Ok(dump)
}

fn dump_once<S: Default>(
    socket: &Socket,
    request: &RouteNetlinkMessage,
    sequence: u32,
    take: &impl Fn(&mut S, RouteNetlinkMessage),
) -> io::Result<Dump<S>> {
    let mut message = NetlinkMessage::from(request.clone());
    message.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    message.header.sequence_number = sequence;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    socket.send(&bytes, 0)?;

    let mut dump = Dump { whole: true, ..Dump::default() };
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        let mut rest = &datagram[..];
        while !rest.is_empty() {
            let header = NetlinkBuffer::new_checked(rest).map_err(io::Error::other)?;
            let (length, flags, number) =
                (header.length() as usize, header.flags(), header.sequence_number());
            let decoded = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&rest[..length]);
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            if number != sequence {
                continue;
            }
            dump.whole &= flags & NLM_F_DUMP_INTR == 0;
            match decoded.map(|message| message.payload) {
                Ok(NetlinkPayload::InnerMessage(message)) => take(&mut dump.found, message),
                Ok(NetlinkPayload::Done(done)) if done.code < 0 => {
                    return Err(io::Error::from_raw_os_error(-done.code));
                }
                Ok(NetlinkPayload::Done(_)) => return Ok(dump),
                Ok(NetlinkPayload::Error(error)) => return Err(error.to_io()),
                Ok(_) => {}
                Err(error) => {
                    tracing::debug!("cannot decode what the kernel tells of interfaces: {error}");
                    dump.unreadable += 1;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{process::Command, thread};

    use rtnetlink::packet_route::{
        route::{RouteNextHop, RouteProtocol},
        rule::RulePortRange,
    };

    use super::*;
    use crate::steer::netns::tests::{Scratch, have_root};

    fn route(kind: RouteType, table: u8, attributes: Vec<RouteAttribute>) -> RouteMessage {
        let mut route = RouteMessage::default();
        route.header.kind = kind;
        route.header.table = table;
        route.attributes = attributes;
        route
    }

    fn by(index: u32) -> Vec<RouteAttribute> {
        vec![RouteAttribute::Oif(index)]
    }

    #[test]
    fn only_routes_by_one_interface_are_sure() {
        use RouteType::{BlackHole, Local, Multicast, Unicast, Unreachable};
        let hops = |indices: &[u32]| {
            let hop = |index: &u32| {
                let mut hop = RouteNextHop::default();
                hop.interface_index = *index;
                hop
            };
            vec![RouteAttribute::MultiPath(indices.iter().map(hop).collect())]
        };
        let to = |index, address: &str, length| {
            let mut attributes = by(index);
            let address = address.parse().expect("an address");
            attributes.push(RouteAttribute::Destination(RouteAddress::Inet6(address)));
            let mut route = route(Unicast, 254, attributes);
            route.header.destination_prefix_length = length;
            route
        };
        let lowest = vec![RouteAttribute::Oif(LOOPBACK), RouteAttribute::Priority(u32::MAX)];
        let big_table = vec![RouteAttribute::Oif(3), RouteAttribute::Table(1000)];
        for (name, more, want) in [
            ("the one route", vec![], true),
            ("a second by the same", vec![route(Unicast, 254, by(2))], true),
            ("another interface", vec![route(Unicast, 254, by(3))], false),
            ("another interface in another table", vec![route(Unicast, 100, by(3))], false),
            ("another interface in a table of a large number", vec![route(Unicast, 252, big_table)], false),
            ("the local table", vec![route(Unicast, 255, by(3))], true),
            ("loopback", vec![route(Unicast, 254, by(LOOPBACK))], true),
            ("to ourselves (TPROXY)", vec![route(Local, 100, by(LOOPBACK))], true),
            ("multicast", vec![route(Multicast, 254, by(3))], true),
            ("two hops by the same", vec![route(Unicast, 254, hops(&[2, 2]))], true),
            ("two hops by two", vec![route(Unicast, 254, hops(&[2, 3]))], false),
            ("a next hop object", vec![route(Unicast, 254, vec![RouteAttribute::NhId(1)])], false),
            ("to nowhere", vec![route(BlackHole, 254, vec![])], false),
            ("unreachable", vec![route(Unreachable, 254, by(LOOPBACK))], false),
            ("the end of an IPv6 table", vec![route(Unreachable, 254, lowest)], true),
            ("link-local of another", vec![to(3, "fe80::", 64)], true),
            ("more than link-local", vec![to(3, "fe80::", 9)], false),
            ("global by another", vec![to(3, "2001:db8::", 32)], false),
        ] {
            let mut exits = Exits::default();
            follow(&mut exits, &route(Unicast, 254, by(2)), &[LOOPBACK].into());
            for route in &more {
                follow(&mut exits, route, &[LOOPBACK].into());
            }
            assert_eq!(exits.only_by(2), want, "{name}");
        }
        assert!(!Exits::default().only_by(2), "no route at all");
    }

    /// A route of `table` to a prefix, as `ip` would write it.
    fn to(table: u8, prefix: &str, mut attributes: Vec<RouteAttribute>) -> RouteMessage {
        let (address, length) = prefix.split_once('/').expect("a prefix");
        let address = address.parse().expect("an address");
        let (family, address, any) = match address {
            IpAddr::V4(v4) => (AddressFamily::Inet, RouteAddress::Inet(v4), v4.is_unspecified()),
            IpAddr::V6(v6) => (AddressFamily::Inet6, RouteAddress::Inet6(v6), v6.is_unspecified()),
        };
        if !any {
            attributes.push(RouteAttribute::Destination(address));
        }
        let mut route = route(RouteType::Unicast, table, attributes);
        route.header.address_family = family;
        route.header.destination_prefix_length = length.parse().expect("a length");
        route
    }

    fn main(prefix: &str, index: u32) -> RouteMessage {
        to(254, prefix, by(index))
    }

    fn last(prefix: &str, index: u32) -> RouteMessage {
        to(253, prefix, by(index))
    }

    fn metric(prefix: &str, index: u32, metric: u32) -> RouteMessage {
        to(254, prefix, vec![RouteAttribute::Oif(index), RouteAttribute::Priority(metric)])
    }

    fn with(mut route: RouteMessage, change: impl FnOnce(&mut RouteMessage)) -> RouteMessage {
        change(&mut route);
        route
    }

    fn kind(kind: RouteType, route: RouteMessage) -> RouteMessage {
        with(route, |route| route.header.kind = kind)
    }

    fn flags(flags: RouteFlags, route: RouteMessage) -> RouteMessage {
        with(route, |route| route.header.flags = flags)
    }

    fn tables(routes: &[RouteMessage]) -> Tables {
        let mut tables = Tables::default();
        for route in routes {
            tables.add(route);
        }
        tables
    }

    #[test]
    fn a_prefix_has_the_interface_that_the_kernel_takes() {
        use RouteAttribute::{Encap, EncapType, Gateway, MultiPath, NhId, Oif, Source, Table};
        use RouteType::{Anycast, BlackHole, Local, Multicast, Prohibit, Throw, Unreachable};
        let hop = |index| {
            let mut hop = RouteNextHop::default();
            hop.interface_index = index;
            hop
        };
        let gateway = || Gateway(RouteAddress::Inet([192, 0, 2, 254].into()));
        let encap =
            vec![Oif(2), EncapType(rtnetlink::packet_route::route::RouteLwEnCapType::Ip), Encap(vec![])];
        let source = Source(RouteAddress::Inet6("2001:db8:1::".parse().expect("an address")));
        let unknown = RouteAttribute::Other(rtnetlink::packet_core::DefaultNla::new(99, vec![0; 4]));
        for (name, routes, want) in [
            ("nothing", vec![], Some("")),
            ("one", vec![main("0.0.0.0/0", 2)], Some("0.0.0.0/0 2")),
            (
                "one per prefix, IPv6 too",
                vec![main("::/0", 2), main("2001:db8::/32", 3), main("2001:db8::/48", 4)],
                Some("::/0 2, 2001:db8::/32 3, 2001:db8::/48 4"),
            ),
            ("by a router", vec![to(254, "10.0.0.0/8", vec![Oif(2), gateway()])], Some("10.0.0.0/8 2")),
            (
                "a table in an attribute",
                vec![
                    to(252, "10.0.0.0/8", vec![Oif(2), Table(1000)]),
                    to(0, "11.0.0.0/8", vec![Oif(2), Table(254)]),
                ],
                Some("11.0.0.0/8 2"),
            ),
            ("by none", vec![to(254, "10.0.0.0/8", vec![])], Some("10.0.0.0/8 0")),
            (
                "several hops",
                vec![to(254, "10.0.0.0/8", vec![MultiPath(vec![hop(2), hop(3)])])],
                Some("10.0.0.0/8 0"),
            ),
            ("a next hop object", vec![to(254, "10.0.0.0/8", vec![Oif(2), NhId(1)])], Some("10.0.0.0/8 0")),
            ("a tunnel", vec![to(254, "10.0.0.0/8", encap)], Some("10.0.0.0/8 0")),
            ("unknown", vec![to(254, "10.0.0.0/8", vec![Oif(2), unknown])], Some("10.0.0.0/8 0")),
            ("nowhere", vec![kind(BlackHole, main("10.0.0.0/8", 0))], Some("10.0.0.0/8 0")),
            ("unreachable", vec![kind(Unreachable, main("::/0", LOOPBACK))], Some("::/0 0")),
            ("prohibited", vec![kind(Prohibit, main("::/0", LOOPBACK))], Some("::/0 0")),
            ("to itself", vec![kind(Local, main("10.0.0.0/8", LOOPBACK))], Some("10.0.0.0/8 0")),
            ("down", vec![flags(RouteFlags::Dead, main("10.0.0.0/8", 2))], Some("10.0.0.0/8 0")),
            ("no carrier", vec![flags(RouteFlags::Linkdown, main("10.0.0.0/8", 2))], Some("10.0.0.0/8 0")),
            ("unchecked", vec![flags(RouteFlags::Onlink, main("10.0.0.0/8", 2))], Some("10.0.0.0/8 0")),
            (
                "learned of a destination",
                vec![main("0.0.0.0/0", 2), flags(RouteFlags::Cloned, main("10.0.0.1/32", 3))],
                Some("0.0.0.0/0 2"),
            ),
            (
                "the lower metric",
                vec![
                    metric("10.0.0.0/8", 2, 200),
                    metric("10.0.0.0/8", 3, 100),
                    metric("10.0.0.0/8", 4, 300),
                ],
                Some("10.0.0.0/8 3"),
            ),
            (
                "no metric is the lowest",
                vec![metric("10.0.0.0/8", 2, 1), main("10.0.0.0/8", 3)],
                Some("10.0.0.0/8 3"),
            ),
            (
                "a lower metric to nowhere",
                vec![
                    main("10.0.0.0/8", 2),
                    kind(BlackHole, to(254, "11.0.0.0/8", vec![])),
                    metric("11.0.0.0/8", 2, 1),
                ],
                Some("10.0.0.0/8 2, 11.0.0.0/8 0"),
            ),
            ("a tie", vec![metric("::/0", 2, 1024), metric("::/0", 3, 1024)], Some("::/0 0")),
            (
                "a tie of three",
                vec![metric("::/0", 2, 1024), metric("::/0", 3, 1024), metric("::/0", 3, 1024)],
                Some("::/0 0"),
            ),
            ("a tie by one", vec![metric("::/0", 2, 1024), metric("::/0", 2, 1024)], Some("::/0 2")),
            (
                "a tie that does not matter",
                vec![metric("::/0", 2, 1024), metric("::/0", 3, 1024), metric("::/0", 4, 100)],
                Some("::/0 4"),
            ),
            (
                "a type of service",
                vec![
                    main("10.0.0.0/8", 2),
                    with(metric("10.0.0.0/8", 2, 5), |route| route.header.tos = 8),
                    with(main("11.0.0.0/8", 2), |route| route.header.tos = 8),
                    metric("11.0.0.0/8", 2, 0),
                ],
                Some("10.0.0.0/8 0, 11.0.0.0/8 0"),
            ),
            (
                "link-local",
                vec![
                    main("fe80::/64", 2),
                    main("fe80::/64", 3),
                    main("fe80::/9", 3),
                    main("169.254.0.0/16", 2),
                ],
                Some("169.254.0.0/16 2, fe80::/9 3"),
            ),
            (
                "the default table where main has nothing",
                vec![
                    main("10.0.0.0/8", 2),
                    last("10.0.0.0/8", 3),
                    last("10.1.0.0/16", 3),
                    last("0.0.0.0/0", 3),
                ],
                Some("0.0.0.0/0 3, 10.0.0.0/8 2"),
            ),
            (
                "the default table after a default route",
                vec![main("::/0", 2), last("2001:db8::/32", 3), last("2001:db8::1/128", 3)],
                Some("::/0 2"),
            ),
            (
                "on to the default table",
                vec![kind(Throw, main("10.0.0.0/8", 0)), last("10.1.0.0/16", 3)],
                Some("10.0.0.0/8 0"),
            ),
            (
                "other tables",
                vec![
                    main("::/0", 2),
                    to(100, "2001:db8::/32", by(3)),
                    kind(Local, to(255, "2001:db8::1/128", by(2))),
                    kind(Anycast, to(255, "2001:db8::/128", by(2))),
                    kind(Multicast, to(255, "ff00::/8", by(2))),
                    to(255, "ff00::/8", by(3)),
                ],
                Some("::/0 2"),
            ),
            ("more in the local table", vec![main("0.0.0.0/0", 2), to(255, "10.0.0.0/8", by(3))], None),
            (
                "for some sources",
                vec![main("::/0", 2), to(254, "2001:db8::/32", vec![Oif(2), source.clone()])],
                None,
            ),
            (
                "for some sources by length",
                vec![with(main("2001:db8::/32", 2), |route| route.header.source_prefix_length = 48)],
                None,
            ),
            (
                "for some sources in a table that is not asked",
                vec![main("::/0", 2), to(100, "2001:db8::/32", vec![Oif(2), source])],
                Some("::/0 2"),
            ),
            (
                "a length alone",
                vec![with(main("0.0.0.0/0", 2), |r| r.header.destination_prefix_length = 8)],
                None,
            ),
            ("too long", vec![main("10.0.0.0/33", 2)], None),
        ] {
            let told = |routes: Vec<Route>| {
                let told = routes
                    .iter()
                    .map(|Route { address, length, index }| format!("{address}/{length} {index}"));
                told.collect::<Vec<_>>().join(", ")
            };
            // The order of the kernel's list says nothing.
            for turned in 0..routes.len().max(1) {
                let mut routes = routes.clone();
                routes.rotate_left(turned);
                assert_eq!(
                    tables(&routes).matching(true).map(told).as_deref(),
                    want,
                    "{name}, turned {turned}"
                );
            }
        }
        let both = tables(&[last("0.0.0.0/0", 3), main("10.0.0.0/8", 2)]);
        let routes = both.matching(false).expect("sure");
        assert_eq!(routes.len(), 1, "the default table is not asked: {routes:?}");
    }

    #[test]
    fn too_many_routes_are_not_sure() {
        let many = |table, count: usize| {
            let prefix = move |i| format!("10.{}.{}.0/24", i / 256 % 256, i % 256);
            (0..count).map(move |i| to(table, &prefix(i), by(2))).collect::<Vec<_>>()
        };
        let most = many(254, MOST_ROUTES);
        assert_eq!(tables(&most).matching(true).expect("sure").len(), MOST_ROUTES);
        let twice = [most.clone(), most.clone()].concat();
        assert!(tables(&twice).matching(true).is_some(), "the same again");
        let more = many(254, MOST_ROUTES + 1);
        assert!(tables(&more).matching(true).is_none());
        let both = [most, many(253, MOST_ROUTES - 1), vec![last("0.0.0.0/0", 2)]].concat();
        assert!(tables(&both).matching(false).is_some());
        assert!(tables(&both).matching(true).is_none(), "one more in the default table");
    }

    #[test]
    fn rules_that_may_decide_are_not_sure() {
        use RuleAction::{Blackhole, Goto, Nop, ToTable};
        use RuleAttribute::{
            FwMark, FwMask, Iifname, L3MDev, Oifname, SourcePortRange, SuppressPrefixLen, Table,
        };
        let rule = |table: u8, mut attributes: Vec<RuleAttribute>| {
            attributes.push(RuleAttribute::Protocol(RouteProtocol::Kernel));
            if !attributes.iter().any(|attribute| matches!(attribute, SuppressPrefixLen(_))) {
                attributes.push(SuppressPrefixLen(u32::MAX));
            }
            let mut rule = RuleMessage::default();
            (rule.header.table, rule.header.action, rule.attributes) = (table, ToTable, attributes);
            rule
        };
        let plain = |table: u8| rule(table, vec![Table(table.into()), RuleAttribute::Priority(7)]);
        let acts = |action, mut rule: RuleMessage| {
            rule.header.action = action;
            rule
        };
        let inverted = |mut rule: RuleMessage| {
            rule.header.flags = RuleFlags::Invert;
            rule
        };
        let of = |change: fn(&mut RuleMessage)| {
            let mut rule = plain(254);
            change(&mut rule);
            rule
        };
        let ports = || RulePortRange { start: 8080, end: 8080 };
        let iif = |name: &str| vec![Iifname(name.to_owned())];
        let mark = |mark, mask| vec![FwMark(mark), FwMask(mask)];
        // 100 leads away, 101 to the node itself, and 102 is empty.
        let tables = tables(&[
            main("0.0.0.0/0", 2),
            to(100, "0.0.0.0/0", by(3)),
            kind(RouteType::Local, to(101, "0.0.0.0/0", by(LOOPBACK))),
        ]);
        let all: Option<&[u32]> = Some(&[255, 254, 253]);
        for (name, more, want) in [
            ("none", vec![], all),
            ("large number", vec![rule(252, vec![Table(1000)])], all),
            ("of a full table", vec![plain(100)], Some(&[100, 255, 254, 253])),
            ("main first", vec![plain(254)], Some(&[254, 255, 254, 253])),
            ("of an empty table", vec![plain(102)], all),
            ("of an empty table by port", vec![rule(102, vec![SourcePortRange(ports())])], all),
            ("of an interface's own table", vec![rule(0, vec![Table(0), L3MDev(true)])], None),
            ("of an empty table for a VRF", vec![rule(102, vec![L3MDev(true)])], None),
            ("nothing", vec![acts(Nop, plain(0))], all),
            ("to nowhere", vec![acts(Blackhole, plain(0))], None),
            ("to another rule", vec![acts(Goto, plain(0))], None),
            ("from", vec![of(|rule| rule.header.src_len = 32)], None),
            ("to", vec![of(|rule| rule.header.dst_len = 8)], None),
            ("type of service", vec![of(|rule| rule.header.tos = 8)], None),
            ("not", vec![inverted(plain(254))], None),
            ("out of", vec![rule(100, vec![Oifname("eth1".to_owned())])], None),
            ("no default route", vec![rule(254, vec![SuppressPrefixLen(0)])], None),
            ("by port", vec![rule(100, vec![SourcePortRange(ports())])], None),
            ("what is forwarded", vec![rule(100, iif("eth1"))], all),
            ("what is forwarded, to nowhere", vec![acts(Blackhole, rule(0, iif("eth1")))], all),
            ("what is not forwarded", vec![inverted(rule(100, iif("eth1")))], None),
            ("its own packets", vec![rule(100, iif("lo"))], None),
            ("what is marked", vec![rule(100, mark(1, u32::MAX))], None),
            ("what is marked, to itself", vec![rule(101, mark(1, u32::MAX))], all),
            ("what is not marked, to itself", vec![inverted(rule(101, mark(1, u32::MAX)))], None),
            ("any mark, to itself", vec![rule(101, mark(0, 0))], None),
            ("all to itself", vec![rule(101, vec![SourcePortRange(ports())])], None),
            ("marked, of main", vec![rule(254, mark(1, 1))], None),
        ] {
            let rules: Vec<_> = more.into_iter().chain([plain(255), plain(254), plain(253)]).collect();
            assert_eq!(order(&rules, &tables, "lo").as_deref(), want, "{name}");
        }
        let renamed = [rule(100, iif("lo")), plain(255), plain(254)];
        assert_eq!(
            order(&renamed, &tables, "loop").as_deref(),
            Some(&[255, 254][..]),
            "loopback has another name"
        );
    }

    #[test]
    fn automatic_ones_are_reachable_ethernets() {
        let plain = Interface {
            index: 2,
            name: "eth0".to_owned(),
            mtu: 1500,
            up: true,
            ethernet: true,
            loopback: false,
            addresses: vec!["192.0.2.1".parse().expect("an address")],
            master: None,
            symmetric_v4: true,
            symmetric_v6: true,
        };
        let with = |addresses: &[&str]| Interface {
            addresses: addresses.iter().map(|a| a.parse().expect("an address")).collect(),
            ..plain.clone()
        };
        for (name, interface, want) in [
            ("plain", plain.clone(), true),
            ("down", Interface { up: false, ..plain.clone() }, false),
            ("a tunnel", Interface { ethernet: false, ..plain.clone() }, false),
            ("loopback", Interface { loopback: true, ..plain.clone() }, false),
            ("a bridge's port", Interface { master: Some(9), ..plain.clone() }, false),
            ("no address", with(&[]), false),
            ("link-local", with(&["169.254.1.1", "fe80::1"]), false),
            ("private", with(&["10.0.0.1"]), true),
            ("IPv6 alone", with(&["fe80::1", "2001:db8::1"]), true),
            ("unique local", with(&["fd00::1"]), true),
        ] {
            assert_eq!(!automatic(&[interface]).is_empty(), want, "{name}");
        }
    }

    #[test]
    fn lists_what_ip_made() {
        if !have_root() {
            return;
        }
        let scratch = Scratch::new("list");
        let listed = |name: &str| {
            let all = list(&scratch.open()).expect("the list");
            assert!(all.is_sorted_by_key(|interface| interface.index));
            all.into_iter().find(|interface| interface.name == name).expect("the interface")
        };
        let symmetric = |name: &str| {
            let interface = listed(name);
            (interface.symmetric_v4, interface.symmetric_v6)
        };
        let lo = listed("lo");
        assert!(lo.loopback && lo.up && !lo.ethernet && lo.symmetric_v4 && lo.symmetric_v6, "{lo:?}");

        scratch.ip("link add one type veth peer name two");
        assert!(!listed("one").up);
        for command in [
            "link set one mtu 9000",
            "address add 192.0.2.1/24 dev one",
            "address add 2001:db8::1/64 dev one nodad",
            "link set one up",
            "link set two up",
            "route add default via 192.0.2.254",
            "-6 route add default via 2001:db8::ffff",
        ] {
            scratch.ip(command);
        }
        let one = listed("one");
        assert!(one.up && one.ethernet && !one.loopback && one.master.is_none(), "{one:?}");
        assert_eq!(one.mtu, 9000);
        for address in ["192.0.2.1", "2001:db8::1"] {
            assert!(one.addresses.contains(&address.parse().expect("an address")), "{one:?}");
        }
        assert_eq!(symmetric("one"), (true, true));
        assert_eq!(symmetric("two"), (false, false), "no route");
        let all = list(&scratch.open()).expect("the list");
        let names: Vec<_> = automatic(&all).iter().map(|interface| interface.name.as_str()).collect();
        assert_eq!(names, ["one"]);

        scratch.ip("route add 198.51.100.0/24 dev two table 300");
        assert_eq!(symmetric("one"), (false, true), "another way in another table");
        scratch.ip("route flush table 300");
        assert_eq!(symmetric("one"), (true, true));
        scratch.ip("-6 rule add from 2001:db8:1::/48 blackhole");
        assert_eq!(symmetric("one"), (true, false), "a rule to nowhere");

        scratch.ip("link add bridge type bridge");
        scratch.ip("link set two master bridge");
        assert_eq!(listed("two").master, Some(listed("bridge").index));
    }

    /// What `ip route get` says of packets from `source`: the interface, or nothing if there is no way.
    fn route_get(scratch: &Scratch, address: IpAddr, source: &str) -> Option<String> {
        let command = format!("route get {address} from {source}");
        let output = scratch
            .open()
            .enter(|| Command::new("ip").args(command.split(' ')).output())
            .expect("entered")
            .expect("ip can be run");
        let output = output.status.success().then(|| String::from_utf8(output.stdout).expect("text"))?;
        let mut words = output.split_whitespace().skip_while(|word| *word != "dev");
        Some(words.nth(1).expect("an interface").to_owned())
    }

    #[test]
    fn routes_are_what_ip_says() {
        const V4: [&str; 2] = ["192.0.2.1", "198.51.100.1"];
        const V6: [&str; 2] = ["2001:db8:1::1", "2001:db8:2::1"];
        if !have_root() {
            return;
        }
        let scratch = Scratch::new("routes");
        // Compares: for each address the interface, `-` for unsure, or nothing if no prefix holds it.
        let check = |when: &str, wanted: &[(&str, &str)]| {
            let (all, routes) = look(&scratch.open()).expect("the list");
            assert_eq!(list(&scratch.open()).expect("the list"), all, "{when}");
            for (address, want) in wanted {
                let address: IpAddr = address.parse().expect("an address");
                let holds = |route: &&Route| {
                    route.address.is_ipv4() == address.is_ipv4()
                        && masked(address, route.length) == route.address
                };
                let found = routes.routes.iter().filter(holds).max_by_key(|route| route.length);
                let name = found.map_or("", |route| {
                    all.iter().find(|interface| interface.index == route.index).map_or("-", |i| &i.name)
                });
                assert_eq!(name, *want, "{when}: {address}: {routes:?}");
                for source in if address.is_ipv4() { V4 } else { V6 } {
                    let kernel = route_get(&scratch, address, source);
                    match name {
                        "" => assert_eq!(kernel, None, "{when}: {address} from {source}"),
                        "-" => {}
                        name => {
                            assert_eq!(kernel.as_deref(), Some(name), "{when}: {address} from {source}");
                        }
                    }
                }
            }
            (routes.sure_v4, routes.sure_v6)
        };
        for name in ["one", "two"] {
            scratch.ip(&format!("link add {name} type veth peer name {name}-peer"));
            scratch.ip(&format!("link set {name} up"));
            scratch.ip(&format!("link set {name}-peer up"));
        }
        for command in [
            "address add 192.0.2.1/24 dev one",
            "address add 198.51.100.1/24 dev two",
            "address add 2001:db8:1::1/64 dev one nodad",
            "address add 2001:db8:2::1/64 dev two nodad",
        ] {
            scratch.ip(command);
        }
        // The kernel tells of a carrier a little later.
        let settled = |name: &str, number: usize| {
            let by_one = |routes: &Routes| routes.routes.iter().filter(|route| route.index != 0).count();
            let begun = Instant::now();
            while by_one(&routes(&scratch.open()).expect("the routes")) != number {
                assert!(begun.elapsed() < Duration::from_secs(20), "{name}");
                thread::sleep(Duration::from_millis(20));
            }
        };
        settled("carriers", 4);
        let connected = [
            ("192.0.2.7", "one"),
            ("198.51.100.7", "two"),
            ("203.0.113.1", ""),
            ("2001:db8:1::7", "one"),
            ("2001:db8:2::7", "two"),
            ("2001:db8:3::7", ""),
        ];
        assert_eq!(check("connected", &connected), (true, true));

        // Asked after `main`; for IPv6 it is not asked.
        scratch.ip("route add 203.0.113.0/24 via 198.51.100.254 table default");
        scratch.ip("route add 192.0.2.128/25 via 198.51.100.254 table default");
        scratch.ip("-6 route add 2001:db8:3::/64 via 2001:db8:2::ff table default");
        let default =
            [("192.0.2.200", "one"), ("203.0.113.1", "two"), ("203.0.114.1", ""), ("2001:db8:3::7", "")];
        assert_eq!(check("table default", &default), (true, true));
        scratch.ip("-6 rule add pref 32767 lookup default");
        assert_eq!(check("IPv6 table default", &[("2001:db8:3::7", "two")]), (true, true));

        for command in [
            "route add default via 192.0.2.254",
            "route add default via 198.51.100.254 metric 100",
            "route add 10.0.0.0/8 via 198.51.100.254",
            "route add 10.1.0.0/16 via 192.0.2.254 metric 20",
            "route append 10.1.0.0/16 via 198.51.100.254 metric 10",
            "route add 10.2.0.0/16 via 192.0.2.254",
            "route append 10.2.0.0/16 via 198.51.100.254",
            "route add blackhole 10.3.0.0/16",
            "route add unreachable 10.3.1.0/24",
            "route add 10.4.0.0/16 nexthop via 192.0.2.254 nexthop via 198.51.100.254",
            "route add 10.5.0.0/16 tos 8 via 192.0.2.254",
            "route add throw 10.6.0.0/16",
            "nexthop add id 5 via 192.0.2.254 dev one",
            "route add 10.7.0.0/16 nhid 5",
            "route add 10.8.0.0/16 via 10.255.0.1 dev two onlink",
            "route add 10.9.0.0/16 via inet6 2001:db8:1::ff dev one",
            "-6 route add default via 2001:db8:1::ff",
            "-6 route add default via 2001:db8:2::ff metric 2000",
            "-6 route add 2001:db8:10::/44 via 2001:db8:2::ff",
            "-6 route add 2001:db8:11::/48 via 2001:db8:1::ff",
            "-6 route add blackhole 2001:db8:12::/48",
            "-6 route add 2001:db8:13::/48 nexthop via 2001:db8:1::ff nexthop via 2001:db8:2::ff",
        ] {
            scratch.ip(command);
        }
        let all = [
            ("192.0.2.7", "one"),
            ("203.0.113.1", "one"),
            ("198.51.100.7", "two"),
            ("8.8.8.8", "one"),
            ("9.255.255.255", "one"),
            ("10.0.0.0", "two"),
            ("10.1.2.3", "two"),
            ("10.2.0.1", "-"),
            ("10.3.0.1", "-"),
            ("10.3.1.1", "-"),
            ("10.4.0.1", "-"),
            ("10.5.0.1", "-"),
            ("10.6.0.1", "-"),
            ("10.7.0.1", "-"),
            ("10.8.0.1", "-"),
            ("10.9.0.1", "one"),
            ("10.255.255.255", "two"),
            ("11.0.0.0", "one"),
            ("2001:db8:1::7", "one"),
            ("2001:db8:2::7", "two"),
            ("2001:db8:3::7", "one"),
            ("2001:db8:10::1", "two"),
            ("2001:db8:11::1", "one"),
            ("2001:db8:12::1", "-"),
            ("2001:db8:13::1", "-"),
            ("2001:db8:1f::1", "two"),
            ("2001:db8:20::1", "one"),
        ];
        assert_eq!(check("all kinds", &all), (true, true));
        let link_local = routes(&scratch.open()).expect("the routes").routes;
        assert!(
            !link_local.iter().any(|route| route.address.to_string().starts_with("fe80")),
            "{link_local:?}"
        );

        let known = routes(&scratch.open()).expect("the routes");
        let (one, two) = {
            let all = list(&scratch.open()).expect("the list");
            let number = |name: &str| all.iter().find(|i| i.name == name).expect("the interface").index;
            let count = |index| known.routes.iter().filter(|route| route.index == index).count();
            (count(number("one")), count(number("two")))
        };
        scratch.ip("link set two-peer down");
        settled("no carrier", one);
        let no_carrier = [("198.51.100.7", "-"), ("10.0.0.1", "-"), ("8.8.8.8", "one"), ("10.9.0.1", "one")];
        assert_eq!(check("no carrier", &no_carrier), (true, true));
        scratch.ip("link set two-peer up");
        settled("a carrier again", one + two);

        scratch.ip("rule add iif one lookup main");
        scratch.ip("rule add from 192.0.2.1 lookup 300");
        scratch.ip("route add local default dev lo table 301");
        scratch.ip("rule add fwmark 1 lookup 301");
        assert_eq!(check("rules that do not matter", &all), (true, true));

        scratch.ip("route add default via 198.51.100.254 table 300");
        assert_eq!(check("its table is not empty anymore", &[]), (false, true));
        let left = routes(&scratch.open()).expect("the routes");
        assert!(
            !left.routes.is_empty() && left.routes.iter().all(|route| route.address.is_ipv6()),
            "{left:?}"
        );
        scratch.ip("rule delete from 192.0.2.1");
        assert_eq!(check("no rule anymore", &all), (true, true));

        scratch.ip("-6 rule add from 2001:db8:2::1 lookup main suppress_prefixlength 0");
        assert_eq!(check("an IPv6 rule", &all[..10]), (true, false));
        scratch.ip("-6 rule delete from 2001:db8:2::1");
        scratch.ip("-6 route add 2001:db8:14::/48 from 2001:db8:2::/64 via 2001:db8:2::ff");
        assert_eq!(check("a route for some sources", &all[..10]), (true, false));
        scratch.ip("-6 route delete 2001:db8:14::/48 from 2001:db8:2::/64");
        assert_eq!(check("none of these anymore", &all), (true, true));

        let many = (0..MOST_ROUTES).map(|i| format!("route add 172.16.{}.{}/32 dev one\n", i / 256, i % 256));
        scratch.ip_batch(&many.collect::<String>());
        assert_eq!(check("many", &all[18..]), (false, true));
    }

    #[tokio::test]
    async fn changes_are_told_once_and_quiet_is_quiet() {
        if !have_root() {
            return;
        }
        let scratch = Scratch::new("watch");
        scratch.ip("link add one type veth peer name two");
        let mut watch = Watch::new(&scratch.open()).expect("the watch");
        let soon = Duration::from_secs(20);
        for (name, change) in [
            ("link", "link set one up"),
            ("address", "address add 192.0.2.1/24 dev one"),
            ("route", "route add 198.51.100.0/24 dev one"),
            ("IPv6 route in another table", "-6 route add 2001:db8::/32 dev one table 300"),
            ("rule", "rule add from 192.0.2.7 lookup 300"),
            ("link gone", "link delete one"),
        ] {
            scratch.ip(change);
            // A wait that is given up loses nothing.
            let _ = timeout(Duration::from_millis(1), watch.changed()).await;
            timeout(soon, watch.changed()).await.unwrap_or_else(|_| panic!("{name}: not seen"));
        }
        // What IPv6 says of its own a little later.
        while timeout(Duration::from_secs(3), watch.changed()).await.is_ok() {}

        // More messages than the socket holds.
        watch.socket.socket_ref().set_rx_buf_sz(1_u32).expect("a small buffer");
        let routes = (0..500).map(|i| format!("route add blackhole 198.18.{}.{}\n", i / 250, i % 250));
        scratch.ip_batch(&routes.collect::<String>());
        timeout(soon, watch.changed()).await.expect("lost messages are a change");
    }
}
