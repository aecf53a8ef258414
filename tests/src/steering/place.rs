//! Where things are in a lab: addresses, links, listening sockets, the BPF file system.
#![forbid(unsafe_code)]

use std::{
    env,
    fs::{self, File},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    process::Command,
};

use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    link::{Link, Trouble},
    netns::Netns,
    wire::Mac,
};

/// The addresses of a link between a client and the node, IPv4 and IPv6.
pub(super) struct Addresses {
    pub(super) node: [IpAddr; 2],
    pub(super) client: [IpAddr; 2],
    /// The address that belongs to no kernel.
    pub(super) wire: [IpAddr; 2],
    /// The client's and the node's hardware address.
    pub(super) macs: (Mac, Mac),
}

/// The addresses of client `i`'s link.
pub(super) fn addresses(i: usize) -> Addresses {
    let i = u8::try_from(i).expect("few clients");
    let host = |host: u8| {
        let v6 = Ipv6Addr::from([0xfd00, 0x78, u16::from(i), 0, 0, 0, 0, u16::from(host)]);
        [Ipv4Addr::from([10, 78, i, host]).into(), v6.into()]
    };
    let mac = |host: u8| [2, 0, 0, 0x78, i, host];
    Addresses { node: host(1), client: host(2), wire: host(3), macs: (mac(2), mac(1)) }
}

/// Links client `i` to the node, by a bad link where there is to be trouble, and tells the node where the wire's addresses
/// are.
pub(super) fn link(
    node: &Netns,
    client: &Netns,
    i: usize,
    mtu: u32,
    trouble: Option<Trouble>,
) -> Option<Link> {
    let Addresses { node: n, client: c, wire, macs } = addresses(i);
    let with_length = |a: [IpAddr; 2]| [format!("{}/24", a[0]), format!("{}/64", a[1])];
    let (at_node, at_client) = (with_length(n), with_length(c));
    let (at_node, at_client) = (at_node.each_ref().map(|a| &**a), at_client.each_ref().map(|a| &**a));
    let (node_end, client_end) = (format!("n{i}"), format!("c{i}"));
    let bad = trouble
        .map(|trouble| Link::new([(node, &node_end, &at_node), (client, &client_end, &at_client)], trouble));
    if bad.is_none() {
        node.link(&node_end, &at_node, client, &client_end, &at_client);
    }
    let text = |mac: Mac| mac.map(|byte| format!("{byte:02x}")).join(":");
    client.ip(&format!("link set c{i} address {} mtu {mtu}", text(macs.0)));
    node.ip(&format!("link set n{i} address {} mtu {mtu}", text(macs.1)));
    for address in wire {
        node.ip(&format!("neighbour replace {address} lladdr {} dev n{i} nud permanent", text(macs.0)));
    }
    bad
}

/// A listening socket in a namespace; on `[::]` for both IP versions.
pub(super) fn listen(netns: &Netns, address: SocketAddr, protocol: Protocol) -> TcpListener {
    netns.enter(|| {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(protocol))
            .expect("a listening socket");
        socket.set_reuse_address(true).expect("SO_REUSEADDR");
        if address.is_ipv6() {
            socket.set_only_v6(false).expect("IPV6_V6ONLY");
        }
        socket.bind(&address.into()).unwrap_or_else(|e| panic!("binding {address}: {e}"));
        socket.listen(4096).expect("listening");
        socket.into()
    })
}

/// Mounts the BPF file system where it is not.
pub(super) fn mount_bpffs() {
    // One test at a time: a second mount would hide what is pinned in the first.
    let lock = File::create(env::temp_dir().join("preflightd-tests-bpffs.lock")).expect("a lock file");
    lock.lock().expect("locking it");
    let mounts = fs::read_to_string("/proc/self/mounts").expect("/proc/self/mounts");
    if mounts.lines().any(|line| line.split(' ').nth(1) == Some("/sys/fs/bpf")) {
        return;
    }
    let status = Command::new("mount").args(["-t", "bpf", "bpf", "/sys/fs/bpf"]).status();
    assert!(status.is_ok_and(|s| s.success()), "cannot mount the BPF file system on /sys/fs/bpf");
}
