//! What is asked of the kernel beyond helpers: kernel functions, and fields of its structures.
//!
//! The loader puts in what the running kernel has: the id of each function (`call` with a magic number), the offset of
//! each field (a load with a magic offset). A field that the kernel lacks becomes a constant. The numbers are in
//! `preflightd_common::abi`'s neighbour on the other side, `steer::object`.

use aya_ebpf::bindings::{__sk_buff, bpf_sock, tcp_sock, tcp_timewait_sock};
#[cfg(target_arch = "bpf")]
use core::arch::asm;

/// `struct bpf_tcp_req_attrs` (include/net/tcp.h, since 6.9).
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct RequestAttributes {
    pub(crate) rcv_tsval: u32,
    pub(crate) rcv_tsecr: u32,
    pub(crate) mss: u16,
    pub(crate) rcv_wscale: u8,
    pub(crate) snd_wscale: u8,
    pub(crate) ecn_ok: u8,
    pub(crate) wscale_ok: u8,
    pub(crate) sack_ok: u8,
    pub(crate) tstamp_ok: u8,
    pub(crate) usec_ts_ok: u8,
    pub(crate) reserved: [u8; 3],
}

/// `bpf_sk_assign_tcp_reqsk` (net/core/filter.c): the kernel makes the connection from this very segment, on this
/// listener. 0, or a negative error: EINVAL for an MPTCP listener or attributes that its sysctls forbid.
#[inline(always)]
pub(crate) unsafe fn assign(
    skb: *mut __sk_buff,
    listener: *mut tcp_sock,
    attributes: &mut RequestAttributes,
) -> i32 {
    let attributes = core::ptr::from_mut(attributes);
    #[cfg(target_arch = "bpf")]
    {
        let result: u64;
        // SAFETY: the calling convention of BPF: arguments in r1 to r5, which are lost, the result in r0. The verifier
        // checks the arguments.
        unsafe {
            asm!(
                ".byte 0x85, 0x20, 0, 0",
                ".long 0x4b460001",
                inlateout("r1") skb => _,
                inlateout("r2") listener => _,
                inlateout("r3") attributes => _,
                inlateout("r4") size_of::<RequestAttributes>() => _,
                lateout("r0") result,
                lateout("r5") _,
            );
        }
        result as i32
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        let _ = (skb, listener, attributes);
        -1
    }
}

/// `bpf_rdonly_cast` (kernel/bpf/helpers.c, since 6.2): a socket that is known to be in TIME_WAIT, as what it is. The
/// helper `bpf_skc_to_tcp_timewait_sock` knows only sockets of `tcp_prot`, which those of a listener in a SOCKMAP are not.
#[inline(always)]
pub(crate) unsafe fn as_time_wait(socket: *mut bpf_sock) -> *mut tcp_timewait_sock {
    #[cfg(target_arch = "bpf")]
    {
        let result: u64;
        // SAFETY: as above; the second argument is the type's id.
        unsafe {
            asm!(
                "r2 = 0x4b460101",
                ".byte 0x85, 0x20, 0, 0",
                ".long 0x4b460002",
                inlateout("r1") socket => _,
                lateout("r0") result,
                out("r2") _,
                lateout("r3") _,
                lateout("r4") _,
                lateout("r5") _,
            );
        }
        result as *mut tcp_timewait_sock
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        socket.cast()
    }
}

macro_rules! field {
    ($(#[$doc:meta])* $name:ident: $of:ty, $width:literal, $magic:literal) => {
        $(#[$doc])*
        #[inline(always)]
        pub(crate) unsafe fn $name(of: *const $of) -> u64 {
            #[cfg(target_arch = "bpf")]
            {
                let value: u64;
                // SAFETY: a load through a pointer that the verifier knows, at an offset that the loader fills in.
                unsafe {
                    asm!(
                        concat!("{value} = *(", $width, " *)({of} + ", $magic, ")"),
                        value = out(reg) value,
                        of = in(reg) of,
                        options(readonly, nostack),
                    );
                }
                value
            }
            #[cfg(not(target_arch = "bpf"))]
            {
                let _ = of;
                0
            }
        }
    };
}

field!(
    /// `sock.sk_ack_backlog`: connections in the accept queue.
    ack_backlog: tcp_sock, "u32", "0x7a01"
);
field!(
    /// `sock.sk_max_ack_backlog`: room in the accept queue, less one.
    max_ack_backlog: tcp_sock, "u32", "0x7a02"
);
field!(
    /// `tcp_sock.is_mptcp`.
    is_mptcp: tcp_sock, "u8", "0x7a03"
);
field!(
    /// `inet_timewait_sock.tw_substate`: TIME_WAIT or FIN_WAIT2.
    tw_substate: tcp_timewait_sock, "u8", "0x7a04"
);
field!(
    /// `sock_common.skc_tw_rcv_nxt`, which a TIME_WAIT begins with.
    tw_rcv_nxt: tcp_timewait_sock, "u32", "0x7a05"
);
field!(
    /// `tcp_timewait_sock.tw_ts_recent_stamp`: 0 if the connection had no timestamps.
    tw_ts_recent_stamp: tcp_timewait_sock, "u32", "0x7a07"
);
field!(
    /// `tcp_timewait_sock.tw_ts_recent`.
    tw_ts_recent: tcp_timewait_sock, "u32", "0x7a06"
);
