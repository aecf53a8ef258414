//! The packet socket below a [`super::Wire`].

use std::{io, os::fd::AsRawFd as _};

use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, Socket, Type};

use crate::netns::Netns;

/// A packet socket on an interface: frames with a `virtio_net_hdr` in front, none of our own.
///
/// # Errors
/// No such interface, or no right to open packet sockets (root).
pub fn packet_socket(netns: &Netns, interface: &str, receive: bool) -> io::Result<Socket> {
    netns.enter(|| {
        // Bound with a protocol only at the end, so that nothing of another interface comes in.
        let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(0)))?;
        let index = rustix::net::netdevice::name_to_index(&socket, interface)?;
        for option in [libc::PACKET_VNET_HDR, libc::PACKET_IGNORE_OUTGOING] {
            let on: libc::c_int = 1;
            // SAFETY: both options take an int, which lives until the call returns.
            let result = unsafe {
                libc::setsockopt(
                    socket.as_raw_fd(),
                    libc::SOL_PACKET,
                    option,
                    (&raw const on).cast(),
                    size_of_val(&on) as libc::socklen_t,
                )
            };
            if result != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        socket.set_recv_buffer_size(8 << 20)?;
        let protocol = if receive { (libc::ETH_P_ALL as u16).to_be() } else { 0 };
        socket.bind(&link_address(index, protocol))?;
        Ok(socket)
    })
}

fn link_address(index: u32, protocol: u16) -> SockAddr {
    let mut storage = SockAddrStorage::zeroed();
    // SAFETY: `sockaddr_ll` is one of the platform's socket addresses.
    let link: &mut libc::sockaddr_ll = unsafe { storage.view_as() };
    link.sll_family = libc::AF_PACKET as u16;
    link.sll_protocol = protocol;
    link.sll_ifindex = index.cast_signed();
    // SAFETY: the storage holds a `sockaddr_ll`, and the length is its length.
    unsafe { SockAddr::new(storage, size_of::<libc::sockaddr_ll>() as libc::socklen_t) }
}
