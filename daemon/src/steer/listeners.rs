//! Who listens on TCP ports, and whether by MPTCP, whose listeners take no steered flow.
#![forbid(unsafe_code)]

use std::{
    fs::File,
    io::{self, BufReader},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
};

use rtnetlink::{
    packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer},
    sys::{Socket, SocketAddr as NetlinkAddr, protocols::NETLINK_SOCK_DIAG},
};

/// `SOCK_DIAG_BY_FAMILY` of `linux/sock_diag.h`.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// `INET_DIAG_REQ_PROTOCOL` of `linux/inet_diag.h`: a protocol whose number needs more than a byte.
const REQ_PROTOCOL: u16 = 3;
/// `sizeof(struct nlmsghdr)`.
const HEADER: usize = 16;
/// `sizeof(struct inet_diag_req_v2)`.
const REQUEST: usize = 56;
/// `linux/socket.h`, in the one byte that it has in messages.
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
/// `TCP_LISTEN` of `net/tcp_states.h`.
const TCP_LISTEN: u8 = 10;

/// The listening TCP sockets of a network namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listeners {
    /// All of them; also the TCP part of each MPTCP listener.
    pub tcp: Vec<SocketAddr>,
    /// Those that listen by MPTCP. `None`: the kernel has MPTCP but does not tell.
    pub mptcp: Option<Vec<SocketAddr>>,
}

/// What listens on a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listening {
    /// Nobody.
    Nobody,
    /// Ordinary TCP.
    Tcp,
    /// Only MPTCP, or MPTCP for some of the addresses.
    Mptcp,
    /// TCP at least, and the kernel does not tell whether by MPTCP.
    Unclear,
}

impl Listeners {
    /// Those in the network namespace of the calling thread.
    ///
    /// # Errors
    /// If `/proc/net/tcp` or `tcp6` cannot be read. A kernel without IPv6 has none for that.
    pub fn read() -> io::Result<Self> {
        let mut tcp = Vec::new();
        for name in ["tcp", "tcp6"] {
            let path = format!("/proc/thread-self/net/{name}");
            match File::open(&path) {
                Ok(file) => tcp.extend(listening(BufReader::new(file))?),
                Err(error) if name == "tcp6" && error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    return Err(io::Error::new(error.kind(), format!("cannot read {path}: {error}")));
                }
            }
        }
        let mptcp = if Path::new("/proc/sys/net/mptcp").exists() {
            let listeners = mptcp(AF_INET).and_then(|mut listeners| {
                listeners.extend(mptcp(AF_INET6)?);
                Ok(listeners)
            });
            listeners.inspect_err(|error| tracing::debug!("cannot list MPTCP listeners: {error}")).ok()
        } else {
            Some(Vec::new())
        };
        Ok(Self { tcp, mptcp })
    }

    /// What listens where a flow to `address` ends up: on that very address or on all, IPv6 sockets for both families.
    /// An unspecified address asks for the port on any address of its family.
    pub fn on(&self, address: SocketAddr) -> Listening {
        let takes = |listener: &&SocketAddr| {
            let (its, wanted) = (listener.ip().to_canonical(), address.ip());
            listener.port() == address.port()
                && (its == wanted
                    // Whether an IPv6 socket is for IPv6 alone is not told: taken for both.
                    || (its.is_unspecified() && (its.is_ipv4() == wanted.is_ipv4() || its.is_ipv6()))
                    || (wanted.is_unspecified() && its.is_ipv4() == wanted.is_ipv4()))
        };
        if !self.tcp.iter().any(|listener| takes(&listener)) {
            return Listening::Nobody;
        }
        match &self.mptcp {
            Some(mptcp) if mptcp.iter().any(|listener| takes(&listener)) => Listening::Mptcp,
            Some(_) => Listening::Tcp,
            None => Listening::Unclear,
        }
    }
}

/// `/proc/net/tcp` and `tcp6`, which begin with those that listen.
fn listening(lines: impl io::BufRead) -> io::Result<Vec<SocketAddr>> {
    let mut found = Vec::new();
    for line in lines.lines().skip(1) {
        let line = line?;
        let mut words = line.split_whitespace();
        let (local, state) = (words.nth(1), words.nth(1));
        if state != Some("0A") {
            break;
        }
        found.extend(local.and_then(address));
    }
    Ok(found)
}

/// `0100007F:0050`: the address as words in the byte order of the machine.
fn address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let word = |at: usize| {
        let word = u32::from_str_radix(address.get(at..at + 8)?, 16).ok()?;
        Some(word.to_ne_bytes())
    };
    let ip: IpAddr = match address.len() {
        8 => Ipv4Addr::from(word(0)?).into(),
        32 => {
            let words = [word(0)?, word(8)?, word(16)?, word(24)?];
            Ipv6Addr::from(<[u8; 16]>::try_from(words.concat()).ok()?).into()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

/// The listeners that `net/mptcp/mptcp_diag.c` tells of a family.
///
/// # Minimum kernel version
/// 5.19; older ones tell of connections alone.
fn mptcp(family: u8) -> io::Result<Vec<SocketAddr>> {
    let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
    socket.bind_auto()?;
    socket.connect(&NetlinkAddr::new(0, 0))?;

    let attribute_length = 8_u16;
    let length = HEADER + REQUEST + usize::from(attribute_length);
    let mut message = Vec::with_capacity(length);
    message.extend((length as u32).to_ne_bytes());
    message.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    message.extend((NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    message.extend([0; 8]); // Sequence and port numbers.
    // The protocol's byte is overridden by the attribute.
    message.extend([family, 0, 0, 0]);
    message.extend((1_u32 << TCP_LISTEN).to_ne_bytes());
    message.resize(HEADER + REQUEST, 0); // Any socket.
    message.extend(attribute_length.to_ne_bytes());
    message.extend(REQ_PROTOCOL.to_ne_bytes());
    message.extend(libc::IPPROTO_MPTCP.to_ne_bytes());
    socket.send(&message, 0)?;

    let mut found = Vec::new();
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        let mut rest = &datagram[..];
        while !rest.is_empty() {
            let header = NetlinkBuffer::new_checked(rest).map_err(io::Error::other)?;
            let (length, kind) = (header.length() as usize, header.message_type());
            let payload = rest.get(HEADER..length).unwrap_or_default();
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            match kind {
                NLMSG_DONE | NLMSG_ERROR => {
                    let code = payload.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                    return if code < 0 { Err(io::Error::from_raw_os_error(-code)) } else { Ok(found) };
                }
                SOCK_DIAG_BY_FAMILY => found.extend(told(payload)),
                _ => {}
            }
        }
    }
}

/// `struct inet_diag_msg`: family, state, two more bytes, both ports and both addresses as on the wire.
fn told(message: &[u8]) -> Option<SocketAddr> {
    let port = u16::from_be_bytes(*message.get(4..)?.first_chunk()?);
    let ip: IpAddr = if *message.first()? == AF_INET {
        Ipv4Addr::from(*message.get(8..)?.first_chunk::<4>()?).into()
    } else {
        Ipv6Addr::from(*message.get(8..)?.first_chunk::<16>()?).into()
    };
    Some(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use socket2::{Domain, Protocol, Type};

    use super::*;

    #[test]
    fn reads_what_proc_prints() {
        let text = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid\n\
            0: 0100007F:07E8 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1213 1\n\
            1: 00000000000000000000000001000000:0050 00000000000000000000000000000000:0000 0A 00000000:00000000\n\
            2: 0100007F:0051 0100007F:A0B4 01 00000000:00000000 00:00000000 00000000     0        0 1213 1\n";
        if cfg!(target_endian = "big") {
            return;
        }
        let found = listening(text.as_bytes()).expect("lines");
        let want: Vec<SocketAddr> =
            ["127.0.0.1:2024", "[::1]:80"].iter().map(|a| a.parse().expect("an address")).collect();
        assert_eq!(found, want);
    }

    #[test]
    fn a_flow_finds_the_listener_that_takes_it() {
        let all = |addresses: &[&str]| -> Vec<SocketAddr> {
            addresses.iter().map(|a| a.parse().expect("an address")).collect()
        };
        let tcp = all(&["0.0.0.0:80", "192.0.2.1:81", "[::]:82", "[::1]:83", "0.0.0.0:90", "192.0.2.1:91"]);
        let known = Listeners { tcp: tcp.clone(), mptcp: Some(all(&["0.0.0.0:90", "192.0.2.1:91"])) };
        for (address, want) in [
            ("192.0.2.1:80", Listening::Tcp),
            ("0.0.0.0:80", Listening::Tcp),
            ("[::]:80", Listening::Nobody),
            ("192.0.2.1:81", Listening::Tcp),
            ("192.0.2.2:81", Listening::Nobody),
            ("0.0.0.0:81", Listening::Tcp),
            ("192.0.2.1:82", Listening::Tcp),
            ("[2001:db8::1]:82", Listening::Tcp),
            ("[2001:db8::1]:83", Listening::Nobody),
            ("192.0.2.1:90", Listening::Mptcp),
            ("0.0.0.0:91", Listening::Mptcp),
            ("192.0.2.1:99", Listening::Nobody),
        ] {
            assert_eq!(known.on(address.parse().expect("an address")), want, "{address}");
        }
        let unclear = Listeners { tcp, mptcp: None };
        assert_eq!(unclear.on("0.0.0.0:80".parse().expect("an address")), Listening::Unclear);
    }

    #[test]
    fn sees_its_own_sockets() {
        let tcp = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let address = tcp.local_addr().expect("its address");
        assert_eq!(Listeners::read().expect("read").on(address), Listening::Tcp);

        // A kernel may be without it, or have it switched off.
        for (any, bind) in [(Domain::IPV4, "127.0.0.1:0"), (Domain::IPV6, "[::1]:0")] {
            let Ok(mptcp) = socket2::Socket::new(any, Type::STREAM, Some(Protocol::MPTCP)) else { continue };
            let bind: SocketAddr = bind.parse().expect("an address");
            if mptcp.bind(&bind.into()).is_err() {
                continue;
            }
            mptcp.listen(1).expect("it listens");
            let address = mptcp.local_addr().expect("its address").as_socket().expect("an IP address");
            assert_eq!(Listeners::read().expect("read").on(address), Listening::Mptcp, "{address}");
        }
    }
}
