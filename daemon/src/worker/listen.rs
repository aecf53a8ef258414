//! Opens the listening sockets of the workers.

use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use std::{
    io,
    net::SocketAddr,
    os::fd::{AsRawFd, OwnedFd},
};

/// Connections that may wait for a worker; the kernel caps it at `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// The kernel keeps a connection to itself until its first bytes are here, but no longer than so many seconds.
const DEFER_ACCEPT: libc::c_int = 1;

/// A bound, listening TCP socket for one worker. Any number may share the address (SO_REUSEPORT): the kernel deals
/// connections out to them. Port 0 takes a free port; further sockets then need that port's address.
///
/// # Errors
/// The address cannot be had: says which and what to do about it.
pub fn open(address: SocketAddr) -> io::Result<OwnedFd> {
    try_open(address).map_err(|error| explain(address, &error))
}

fn try_open(address: SocketAddr) -> io::Result<OwnedFd> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    if address.is_ipv6() {
        // An IPv4 listener of the same port is another listener, whose policies may be others.
        socket.set_only_v6(true)?;
    }
    // Accepted sockets inherit it: an answer behind an unacknowledged one must not wait (Nagle).
    socket.set_tcp_nodelay(true)?;
    socket.bind(&SockAddr::from(address))?;
    defer_accept(&socket)?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// TCP_DEFER_ACCEPT (tcp(7)); neither socket2 nor rustix has it.
fn defer_accept(socket: &Socket) -> io::Result<()> {
    let seconds = DEFER_ACCEPT;
    let len = size_of_val(&seconds) as libc::socklen_t;
    // SAFETY: the option's value is a c_int, read during the call.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_DEFER_ACCEPT,
            (&raw const seconds).cast(),
            len,
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn explain(address: SocketAddr, error: &io::Error) -> io::Error {
    let port = address.port();
    let help = match error.kind() {
        io::ErrorKind::AddrInUse => format!(
            "another process listens there: see `ss -ltnp 'sport = {port}'`, then stop it or choose another address"
        ),
        io::ErrorKind::AddrNotAvailable => {
            "no interface of this machine has that address: see `ip address`, or listen on 0.0.0.0 or [::]"
                .into()
        }
        io::ErrorKind::PermissionDenied => format!(
            "ports below net.ipv4.ip_unprivileged_port_start need CAP_NET_BIND_SERVICE: grant it, or choose a port \
             above {port}"
        ),
        _ => "see the error".into(),
    };
    io::Error::new(error.kind(), format!("cannot listen on {address}: {error}; {help}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn address(text: &str) -> SocketAddr {
        text.parse().expect("address")
    }

    #[test]
    fn several_workers_share_an_address() {
        for host in ["127.0.0.1:0", "[::1]:0"] {
            let first = TcpListener::from(open(address(host)).expect(host));
            let address = first.local_addr().expect(host);
            open(address).expect(host);
        }
    }

    #[test]
    fn both_families_share_a_port() {
        let first = TcpListener::from(open(address("0.0.0.0:0")).expect("v4"));
        let port = first.local_addr().expect("address").port();
        open(address(&format!("[::]:{port}"))).expect("v6");
    }

    #[test]
    fn errors_say_what_where_and_what_to_do() {
        let taken = TcpListener::bind("127.0.0.1:0").expect("bind");
        let taken = taken.local_addr().expect("address").to_string();
        for (at, kind, help) in [
            (taken.as_str(), io::ErrorKind::AddrInUse, "ss -ltnp"),
            ("192.0.2.1:8080", io::ErrorKind::AddrNotAvailable, "ip address"),
        ] {
            let error = open(address(at)).expect_err(at);
            assert_eq!(error.kind(), kind, "{at}");
            let text = error.to_string();
            assert!(text.contains(at) && text.contains(help), "{text}");
        }
    }
}
