//! Tells when rules change, so that nobody waits for the next look.

use std::io;

use rtnetlink::sys::{Socket, SocketAddr, constants::NETLINK_NETFILTER};

/// `NFNLGRP_NFTABLES` (include/uapi/linux/netfilter/nfnetlink.h).
const NFTABLES: u32 = 7;

/// Hears of changes of nf_tables, iptables-nft among them. The legacy iptables tell nobody.
pub struct Changes(Socket);

impl Changes {
    /// In the network namespace of the calling thread, from now on.
    ///
    /// # Errors
    /// The kernel has no nf_tables, or `CAP_NET_ADMIN` is missing.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        socket.add_membership(NFTABLES)?;
        socket.set_non_blocking(true)?;
        Ok(Self(socket))
    }

    /// Whether there was one since the last call. Does not wait.
    pub fn seen(&self) -> bool {
        let mut seen = false;
        // More than one table needs at a time; the rest is seen by the next call.
        for _ in 0..1024 {
            match self.0.recv(&mut &mut [0_u8; 64][..], 0) {
                Ok(_) => seen = true,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // Also too many at once (ENOBUFS): there were some.
                Err(_) => return true,
            }
        }
        seen
    }
}

impl std::fmt::Debug for Changes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Changes").finish_non_exhaustive()
    }
}
