//! The kernel's sockets: which one a segment meets, what it has room for, and the hand-over.

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_CURRENT_NETNS, bpf_sock, bpf_sock_tuple},
    helpers::{bpf_sk_release, bpf_skc_lookup_tcp, bpf_skc_to_tcp_sock},
};
use preflightd_common::{
    abi::{Pending, options},
    tcp::{Options, after},
};

use crate::{
    kernel::{self, RequestAttributes},
    packet::Packet,
};

/// `TCP_ESTABLISHED`, `TCP_TIME_WAIT`, `TCP_LISTEN` (include/net/tcp_states.h).
pub(crate) const ESTABLISHED: u32 = 1;
const TIME_WAIT: u32 = 6;
const LISTEN: u32 = 10;

/// The socket that the kernel would give the segment to; null: none. It must be released.
#[inline(always)]
fn lookup(skb: *mut __sk_buff, packet: &Packet) -> *mut bpf_sock {
    let netns = i64::from(BPF_F_CURRENT_NETNS).cast_unsigned();
    let flow = &packet.flow;
    // SAFETY: a tuple of the length that is told; both layouts are `struct bpf_sock_tuple`'s.
    unsafe {
        if packet.v4 {
            let ports = u32::from(flow.client_port) | u32::from(flow.server_port) << 16;
            let mut tuple = [flow.client[3], flow.server[3], u32::from_ne_bytes(ports.to_ne_bytes())];
            if cfg!(target_endian = "big") {
                tuple[2] = u32::from(flow.client_port) << 16 | u32::from(flow.server_port);
            }
            bpf_skc_lookup_tcp(skb.cast(), (&raw mut tuple).cast::<bpf_sock_tuple>(), 12, netns, 0)
        } else {
            let mut tuple = *flow;
            bpf_skc_lookup_tcp(skb.cast(), (&raw mut tuple).cast::<bpf_sock_tuple>(), 36, netns, 0)
        }
    }
}

/// What a segment meets.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Meets {
    Nothing,
    Listener(Listener),
    /// In TIME_WAIT; true: a SYN like this one makes the kernel give the place free.
    TimeWait(bool),
    Established,
    /// A connection that is not quite there, or nearly gone.
    Other,
}

/// A listening socket, by what it takes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Listener {
    Ready,
    /// Its accept queue is full.
    Full,
    /// It speaks MPTCP, and the kernel makes its connections itself only.
    Mptcp,
}

/// `syn`: the options of the SYN that asks, if it is one.
#[inline(always)]
pub(crate) fn meets(skb: *mut __sk_buff, packet: &Packet, syn: Option<&Options>) -> Meets {
    let socket = lookup(skb, packet);
    if socket.is_null() {
        return Meets::Nothing;
    }
    // SAFETY: not null, not released yet; the verifier knows both.
    unsafe {
        let meets = match (*socket).state {
            LISTEN => Meets::Listener(listener(socket)),
            ESTABLISHED => Meets::Established,
            TIME_WAIT => Meets::TimeWait(match syn {
                Some(options) => gives_way(socket, packet, options),
                None => false,
            }),
            _ => Meets::Other,
        };
        bpf_sk_release(socket.cast());
        meets
    }
}

#[inline(always)]
unsafe fn listener(socket: *mut bpf_sock) -> Listener {
    // SAFETY: the caller's.
    unsafe {
        let tcp = bpf_skc_to_tcp_sock(socket.cast());
        if tcp.is_null() || kernel::is_mptcp(tcp) != 0 {
            return Listener::Mptcp;
        }
        // `sk_acceptq_is_full` (include/net/sock.h).
        if kernel::ack_backlog(tcp) > kernel::max_ack_backlog(tcp) { Listener::Full } else { Listener::Ready }
    }
}

/// Whether the kernel would let this SYN end the TIME_WAIT: `tcp_timewait_state_process` (net/ipv4/tcp_minisocks.c),
/// RFC 6191 §2.
#[inline(always)]
unsafe fn gives_way(socket: *mut bpf_sock, packet: &Packet, syn: &Options) -> bool {
    // SAFETY: the caller's.
    unsafe {
        let waiting = kernel::as_time_wait(socket);
        if kernel::tw_substate(waiting) as u32 != TIME_WAIT {
            return false;
        }
        let newer = after(packet.seq, kernel::tw_rcv_nxt(waiting) as u32);
        // Without timestamps of its own it does not look at others.
        if syn.present & options::TIMESTAMPS == 0 || kernel::tw_ts_recent_stamp(waiting) as u32 == 0 {
            return newer;
        }
        let recent = kernel::tw_ts_recent(waiting) as u32;
        after(syn.ts_value, recent) || (syn.ts_value == recent && newer)
    }
}

/// What came of giving a segment to a listener.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Given {
    Yes,
    /// There is none.
    Gone,
    Full,
    /// The kernel refused, with this error.
    Refused(i32),
}

/// Gives the segment to the proxy's listener.
#[inline(always)]
pub(crate) fn give_to_proxy(
    skb: *mut __sk_buff,
    packet: &Packet,
    attributes: &mut RequestAttributes,
) -> Given {
    let socket = lookup(skb, packet);
    if socket.is_null() {
        return Given::Gone;
    }
    // SAFETY: as in `meets`.
    unsafe {
        let given = if (*socket).state == LISTEN { give(skb, socket, attributes) } else { Given::Gone };
        bpf_sk_release(socket.cast());
        given
    }
}

/// Gives the segment to a worker's listener, which this releases.
#[inline(always)]
pub(crate) fn give_to_worker(
    skb: *mut __sk_buff,
    worker: *mut bpf_sock,
    attributes: &mut RequestAttributes,
) -> Given {
    if worker.is_null() {
        return Given::Gone;
    }
    // SAFETY: as in `meets`.
    unsafe {
        let given = give(skb, worker, attributes);
        bpf_sk_release(worker.cast());
        given
    }
}

#[inline(always)]
unsafe fn give(skb: *mut __sk_buff, listener: *mut bpf_sock, attributes: &mut RequestAttributes) -> Given {
    // SAFETY: the caller's.
    unsafe {
        // The kernel function wants a `struct sock`, not the `sock_common` that a lookup returns.
        let tcp = bpf_skc_to_tcp_sock(listener.cast());
        if tcp.is_null() {
            return Given::Gone;
        }
        if kernel::ack_backlog(tcp) > kernel::max_ack_backlog(tcp) {
            return Given::Full;
        }
        match kernel::assign(skb, tcp, attributes) {
            0 => Given::Yes,
            error => Given::Refused(error),
        }
    }
}

/// What the kernel must know of a handshake that it did not make. `segment`: the options of the segment that the
/// connection is made from.
#[inline(always)]
pub(crate) fn attributes(pending: &Pending, segment: &Options) -> RequestAttributes {
    let agreed = |option: u8| u8::from(pending.options & option != 0);
    // A client that has agreed upon timestamps sends them always (RFC 7323 §3.2); one that does not goes on without.
    let timestamps = agreed(options::TIMESTAMPS) & u8::from(segment.present & options::TIMESTAMPS != 0);
    RequestAttributes {
        rcv_tsval: if timestamps == 0 { 0 } else { segment.ts_value },
        rcv_tsecr: if timestamps == 0 { 0 } else { segment.ts_echo },
        mss: pending.mss,
        rcv_wscale: pending.server_scale,
        snd_wscale: pending.client_scale,
        ecn_ok: agreed(options::ECN),
        wscale_ok: agreed(options::WINDOW_SCALE),
        sack_ok: agreed(options::SACK),
        tstamp_ok: timestamps,
        usec_ts_ok: 0,
        reserved: [0; 3],
    }
}
