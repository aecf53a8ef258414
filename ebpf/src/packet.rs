//! The header walk: from an Ethernet frame to a TCP segment.

use aya_ebpf::{
    bindings::__sk_buff,
    helpers::{bpf_skb_load_bytes, bpf_skb_pull_data},
};
use preflightd_common::{
    abi::Flow,
    tcp::{Options, Walk},
};

use crate::maps::{self, Scratch};

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERNET: usize = 14;
const IPV4: usize = 20;
const IPV6: usize = 40;
const TCP: usize = 20;
const IPPROTO_TCP: u8 = 6;

/// A TCP segment behind a plain IP header.
pub(crate) struct Packet {
    pub(crate) flow: Flow,
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    pub(crate) flags: u8,
    /// Accurate ECN's bit, next to the flags (RFC 9768 §3.1).
    pub(crate) accurate_ecn: bool,
    pub(crate) v4: bool,
    /// The ECN field of the IP header (RFC 3168 §5).
    pub(crate) ecn: u8,
    /// Offset of the TCP header in the frame.
    pub(crate) tcp: u32,
    /// Its length, 20 to 60.
    pub(crate) header: u32,
    /// Bytes of data.
    pub(crate) data: u32,
}

/// What a frame is.
pub(crate) enum Frame {
    /// Nothing of ours.
    Other,
    /// TCP to this port (network order) behind IP options or in fragments; true: it is a SYN.
    Odd(u16, bool),
    Segment(Packet),
}

/// Frames are seen behind the first VLAN tag, which the kernel keeps beside the packet (`skb_vlan_untag`). A second one
/// makes a frame something else.
#[inline(always)]
pub(crate) fn read(skb: *mut __sk_buff) -> Frame {
    // SAFETY: the context.
    let ethertype = unsafe { (*skb).protocol } as u16;
    if ethertype == ETHERTYPE_IPV4.to_be() {
        read_ipv4(skb)
    } else if ethertype == ETHERTYPE_IPV6.to_be() {
        read_ipv6(skb)
    } else {
        Frame::Other
    }
}

/// The first `N` bytes of the frame; null: it is shorter.
#[inline(always)]
fn front<const N: usize>(skb: *mut __sk_buff) -> *const u16 {
    // SAFETY: the context; packet pointers are compared before they are used, as the verifier wants.
    unsafe {
        let start = (*skb).data as usize;
        if start + N <= (*skb).data_end as usize {
            return start as *const u16;
        }
        // Some drivers leave the headers outside the linear part.
        if (*skb).len < N as u32 || bpf_skb_pull_data(skb, N as u32) != 0 {
            return core::ptr::null();
        }
        let start = (*skb).data as usize;
        if start + N <= (*skb).data_end as usize { start as *const u16 } else { core::ptr::null() }
    }
}

/// RFC 791 §3.1.
#[inline(always)]
fn read_ipv4(skb: *mut __sk_buff) -> Frame {
    let frame = front::<{ ETHERNET + IPV4 + TCP }>(skb);
    if frame.is_null() {
        return Frame::Other;
    }
    let half = |at: usize| half(frame, ETHERNET + at);
    let word = |at: usize| word(frame, ETHERNET + at);
    let [version, tos] = half(0).to_ne_bytes();
    let [_, protocol] = half(8).to_ne_bytes();
    if protocol != IPPROTO_TCP || version >> 4 != 4 {
        return Frame::Other;
    }
    let fragment = u16::from_be(half(6));
    if version != 0x45 || fragment & 0x3fff != 0 {
        return odd_ipv4(skb, version, fragment);
    }
    let mapped = 0xffff_u32.to_be();
    let flow = Flow {
        client: [0, 0, mapped, word(12)],
        server: [0, 0, mapped, word(16)],
        client_port: half(20),
        server_port: half(22),
    };
    // Zero in packets that GRO merged beyond 64 KiB.
    let total = u32::from(u16::from_be(half(2)));
    segment(skb, frame, flow, true, tos & 3, if total == 0 { None } else { Some(total - IPV4 as u32) })
}

#[inline(always)]
fn odd_ipv4(skb: *mut __sk_buff, version: u8, fragment: u16) -> Frame {
    let header = u32::from(version & 15) * 4;
    let mut tcp = [0_u8; 14];
    if fragment & 0x1fff != 0 || header < IPV4 as u32 || !load(skb, ETHERNET as u32 + header, &mut tcp) {
        return Frame::Other;
    }
    Frame::Odd(u16::from_ne_bytes([tcp[2], tcp[3]]), tcp[13] & 0x17 == 0x02)
}

/// RFC 8200 §3. Extension headers are not walked.
#[inline(always)]
fn read_ipv6(skb: *mut __sk_buff) -> Frame {
    let frame = front::<{ ETHERNET + IPV6 + TCP }>(skb);
    if frame.is_null() {
        return Frame::Other;
    }
    let half = |at: usize| half(frame, ETHERNET + at);
    let word = |at: usize| word(frame, ETHERNET + at);
    let [next, _] = half(6).to_ne_bytes();
    let [version, class] = half(0).to_ne_bytes();
    if next != IPPROTO_TCP || version >> 4 != 6 {
        return Frame::Other;
    }
    let flow = Flow {
        client: [word(8), word(12), word(16), word(20)],
        server: [word(24), word(28), word(32), word(36)],
        client_port: half(40),
        server_port: half(42),
    };
    let payload = u32::from(u16::from_be(half(4)));
    // Zero in jumbograms, as above.
    segment(skb, frame, flow, false, class >> 4 & 3, if payload == 0 { None } else { Some(payload) })
}

/// The TCP header (RFC 9293 §3.1); `length`: bytes from there on, `None`: to the end of the frame.
#[inline(always)]
fn segment(
    skb: *mut __sk_buff,
    frame: *const u16,
    flow: Flow,
    v4: bool,
    ecn: u8,
    length: Option<u32>,
) -> Frame {
    let at = ETHERNET + if v4 { IPV4 } else { IPV6 };
    let [offset, flags] = half(frame, at + 12).to_ne_bytes();
    // SAFETY: the context.
    let there = unsafe { (*skb).len }.wrapping_sub(at as u32);
    let length = length.unwrap_or(there);
    let header = u32::from(offset >> 4) * 4;
    if header < TCP as u32 || length < header || length > there {
        return Frame::Other;
    }
    Frame::Segment(Packet {
        flow,
        seq: u32::from_be(word(frame, at + 4)),
        ack: u32::from_be(word(frame, at + 8)),
        flags,
        accurate_ecn: offset & 1 != 0,
        v4,
        ecn,
        tcp: at as u32,
        header,
        data: length - header,
    })
}

/// Two bytes at an even offset that was compared with the frame's end, in memory order.
#[inline(always)]
fn half(frame: *const u16, at: usize) -> u16 {
    // SAFETY: within what `front` compared; frames begin at even addresses.
    unsafe { *frame.add(at / 2) }
}

/// Four bytes, as [`half`].
#[inline(always)]
fn word(frame: *const u16, at: usize) -> u32 {
    let (first, second) = (half(frame, at).to_ne_bytes(), half(frame, at + 2).to_ne_bytes());
    u32::from_ne_bytes([first[0], first[1], second[0], second[1]])
}

impl Packet {
    /// Offset of its data in the frame.
    #[inline(always)]
    pub(crate) fn data_at(&self) -> u32 {
        self.tcp + self.header
    }

    /// Its TCP options. `None`: they cannot be read.
    #[inline(always)]
    pub(crate) fn options(&self, skb: *mut __sk_buff) -> Option<Options> {
        let length = self.header - TCP as u32;
        if length == 0 {
            return Some(Options::default());
        }
        let scratch = maps::scratch()?;
        // The verifier wants to see the bounds.
        let bounded = length & 63;
        if bounded == 0
            || bounded > 40
            || !load_part(skb, self.tcp + TCP as u32, &mut scratch.options, bounded)
        {
            return None;
        }
        scratch.walk = Walk::new(bounded);
        maps::repeat(preflightd_common::tcp::MAX_STEPS, option_step, scratch);
        Some(scratch.walk.found)
    }
}

unsafe extern "C" fn option_step(_: u32, scratch: *mut *mut Scratch) -> i64 {
    // SAFETY: `repeat` hands over what it was given.
    let scratch = unsafe { &mut **scratch };
    i64::from(!scratch.walk.step(&scratch.options))
}

/// Fills `to` from the frame; false: it is shorter.
#[inline(always)]
pub(crate) fn load<T>(skb: *mut __sk_buff, at: u32, to: &mut T) -> bool {
    // SAFETY: as many bytes as `to` has.
    unsafe {
        bpf_skb_load_bytes(skb.cast_const().cast(), at, core::ptr::from_mut(to).cast(), size_of::<T>() as u32)
            == 0
    }
}

/// Fills the first `length` bytes of `to`, which the caller has bounded by its size, and not 0.
#[inline(always)]
pub(crate) fn load_part<T>(skb: *mut __sk_buff, at: u32, to: &mut T, length: u32) -> bool {
    // SAFETY: the verifier refuses a length beyond `to`.
    unsafe { bpf_skb_load_bytes(skb.cast_const().cast(), at, core::ptr::from_mut(to).cast(), length) == 0 }
}
