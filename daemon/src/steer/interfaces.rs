//! The interfaces of a network namespace, what leaves by them, and when that changes; asked of the kernel by netlink.
//!
//! rtnetlink's messages over a plain socket: its own connections leave out what they cannot decode, which here must
//! make a route unsure instead of unseen.
#![forbid(unsafe_code)]

use std::{
    collections::BTreeSet,
    fmt,
    future::poll_fn,
    io,
    net::IpAddr,
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
        route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType},
        rule::{RuleAction, RuleMessage},
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
    /// Its frames have an Ethernet header: also bridges, bonds, VLANs, veth.
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

/// The interfaces in `netns`, by number. Blocks for as long as the kernel needs to list its routes.
///
/// # Errors
/// If the namespace cannot be entered, or the kernel refuses to tell.
pub fn list(netns: &Netns) -> Result<Vec<Interface>, Error> {
    netns.enter(|| {
        read().map_err(Error::new(
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
    let v4 = exits(&socket, AddressFamily::Inet, &loopbacks)?;
    let v6 = exits(&socket, AddressFamily::Inet6, &loopbacks)?;
    for interface in &mut interfaces {
        // What comes in by loopback was sent by the node itself.
        interface.symmetric_v4 = interface.loopback || v4.only_by(interface.index);
        interface.symmetric_v6 = interface.loopback || v6.only_by(interface.index);
    }
    Ok(interfaces)
}

fn interface(link: LinkMessage) -> Interface {
    let loopback = link.header.flags.contains(LinkFlags::Loopback);
    let mut interface = Interface {
        index: link.header.index,
        name: String::new(),
        mtu: 0,
        up: link.header.flags.contains(LinkFlags::Up),
        ethernet: link.header.link_layer_type == LinkLayerType::Ether,
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

fn exits(socket: &Socket, family: AddressFamily, loopbacks: &BTreeSet<u32>) -> io::Result<Exits> {
    let mut request = RouteMessage::default();
    request.header.address_family = family;
    let routes = dump(socket, &RouteNetlinkMessage::GetRoute(request), |exits: &mut Exits, message| {
        // A kernel without IPv6 lists all families instead.
        if let RouteNetlinkMessage::NewRoute(route) = message
            && route.header.address_family == family
        {
            follow(exits, &route, loopbacks);
        }
    })?;
    let mut request = RuleMessage::default();
    request.header.family = family;
    let rules = dump(socket, &RouteNetlinkMessage::GetRule(request), |to_nowhere: &mut bool, message| {
        // Any other rule only chooses among tables, all of which were read.
        if let RouteNetlinkMessage::NewRule(rule) = message
            && rule.header.family == family
        {
            use RuleAction::{Goto, Nop, ToTable};
            *to_nowhere |= !matches!(rule.header.action, ToTable | Goto | Nop);
        }
    });
    let rules = match rules {
        // A kernel without policy rules, or without the family.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EAFNOSUPPORT)) => {
            Dump::default()
        }
        rules => rules?,
    };
    let mut exits = routes.found;
    exits.unsure |= !routes.whole || routes.unreadable > 0;
    exits.unsure |= rules.found || !rules.whole || rules.unreadable > 0;
    Ok(exits)
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
    use rtnetlink::packet_route::route::RouteNextHop;

    use super::*;
    use crate::steer::netns::tests::{Scratch, have_root};

    const LOOPBACK: u32 = 1;

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
