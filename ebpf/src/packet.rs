//! The header walk: from an Ethernet frame to a TCP segment.

use aya_ebpf::{
    bindings::__sk_buff,
    helpers::{bpf_skb_load_bytes, bpf_skb_pull_data},
};
use preflightd_common::{
    abi::{Flow, options},
    tcp::{Options, Walk},
    words::opaque,
};

use crate::maps::{self, Scratch};

pub(crate) const ETHERTYPE_IPV4: u16 = 0x0800;
pub(crate) const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERNET: usize = 14;
const IPV4: usize = 20;
const IPV6: usize = 40;
const TCP: usize = 20;
const IPPROTO_TCP: u8 = 6;
/// The frame is addressed to this machine, and to it alone.
const PACKET_HOST: u32 = 0;
/// No `Option`, for the same reason as with [`Frame`].
const TO_THE_END: u32 = u32::MAX;

/// A TCP segment. Aligned so that it is cleared by whole words.
#[derive(Default)]
#[repr(align(8))]
pub(crate) struct Packet {
    pub(crate) flow: Flow,
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    /// What the client takes, not scaled.
    pub(crate) window: u16,
    pub(crate) flags: u8,
    /// Accurate ECN's bit, next to the flags (RFC 9768 §3.1).
    pub(crate) accurate_ecn: bool,
    pub(crate) v4: bool,
    /// Its IP header has neither options nor extensions.
    pub(crate) plain: bool,
    /// The ECN field of the IP header (RFC 3168 §5).
    pub(crate) ecn: u8,
    /// Offset of the TCP header in the frame.
    pub(crate) tcp: u32,
    /// Its length, 20 to 60.
    pub(crate) header: u32,
    /// Bytes of data.
    pub(crate) data: u32,
}

/// What a frame is. Without values: the verifier refuses to copy what an absent one leaves unset.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Frame {
    /// Nothing of ours.
    Other,
    /// The first fragment of TCP: only ports and flags are known.
    Fragment,
    Segment,
}

/// The kernel keeps the first VLAN tag beside the packet (`skb_vlan_untag`). A frame of a VLAN is for the interface of
/// that VLAN, where it comes again without a tag; VLAN 0 is only a priority (IEEE 802.1Q §9.6).
#[inline(always)]
pub(crate) fn read(skb: *mut __sk_buff, packet: &mut Packet) -> Frame {
    // SAFETY: the context.
    let (ethertype, tagged, tag, addressed) =
        unsafe { ((*skb).protocol as u16, (*skb).vlan_present, (*skb).vlan_tci, (*skb).pkt_type) };
    if (tagged != 0 && tag & 0xfff != 0) || addressed != PACKET_HOST {
        return Frame::Other;
    }
    if ethertype == ETHERTYPE_IPV4.to_be() {
        read_ipv4(skb, packet)
    } else if ethertype == ETHERTYPE_IPV6.to_be() {
        read_ipv6(skb, packet)
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
fn read_ipv4(skb: *mut __sk_buff, packet: &mut Packet) -> Frame {
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
    let mapped = 0xffff_u32.to_be();
    packet.flow.client = [0, 0, mapped, word(12)];
    packet.flow.server = [0, 0, mapped, word(16)];
    let ip = u32::from(version & 15) * 4;
    // Zero in packets that GRO merged beyond 64 KiB.
    let total = u32::from(u16::from_be(half(2)));
    let length = if total == 0 { TO_THE_END } else { total.wrapping_sub(ip) };
    packet.v4 = true;
    packet.ecn = tos & 3;
    packet.tcp = ETHERNET as u32 + ip;
    let fragment = u16::from_be(half(6)) & 0x3fff;
    if version == 0x45 && fragment == 0 {
        // SAFETY: what was compared goes on with the TCP header.
        return segment(skb, unsafe { frame.byte_add(ETHERNET + IPV4) }, packet, length, true);
    }
    if fragment & 0x1fff != 0 || ip < IPV4 as u32 {
        return Frame::Other;
    }
    odd_segment(skb, packet, length, fragment != 0)
}

/// RFC 8200 §3.
#[inline(always)]
fn read_ipv6(skb: *mut __sk_buff, packet: &mut Packet) -> Frame {
    let frame = front::<{ ETHERNET + IPV6 + TCP }>(skb);
    if frame.is_null() {
        return Frame::Other;
    }
    let half = |at: usize| half(frame, ETHERNET + at);
    let word = |at: usize| word(frame, ETHERNET + at);
    let [next, _] = half(6).to_ne_bytes();
    let [version, class] = half(0).to_ne_bytes();
    if version >> 4 != 6 {
        return Frame::Other;
    }
    packet.flow.client = [word(8), word(12), word(16), word(20)];
    packet.flow.server = [word(24), word(28), word(32), word(36)];
    let mapped = |address: &[u32; 4]| address[0] == 0 && address[1] == 0 && address[2] == 0xffff_u32.to_be();
    if mapped(&packet.flow.client) || mapped(&packet.flow.server) {
        // Addresses of IPv4 have no business on a wire (RFC 4291 §2.5.5.2), and the kernel drops them.
        return Frame::Other;
    }
    let payload = u32::from(u16::from_be(half(4)));
    // Zero in jumbograms, as above.
    let length = if payload == 0 { TO_THE_END } else { payload };
    packet.v4 = false;
    packet.ecn = class >> 4 & 3;
    packet.tcp = (ETHERNET + IPV6) as u32;
    if next == IPPROTO_TCP {
        // SAFETY: as above.
        return segment(skb, unsafe { frame.byte_add(ETHERNET + IPV6) }, packet, length, true);
    }
    behind_extension(skb, packet, length, next)
}

/// One extension header: options, for each hop or the destination, or routing (RFC 8200 §4.3, §4.4, §4.6); and the first
/// fragment (§4.5).
#[inline(always)]
fn behind_extension(skb: *mut __sk_buff, packet: &mut Packet, length: u32, next: u8) -> Frame {
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const FRAGMENT: u8 = 44;
    const DESTINATION: u8 = 60;
    if !matches!(next, HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION) {
        return Frame::Other;
    }
    let mut extension = [0_u8; 4];
    if !load(skb, packet.tcp, &mut extension) || extension[0] != IPPROTO_TCP {
        return Frame::Other;
    }
    let fragment = next == FRAGMENT;
    if fragment && u16::from_be_bytes([extension[2], extension[3]]) >> 3 != 0 {
        return Frame::Other;
    }
    let skipped = if fragment { 8 } else { (u32::from(extension[1]) + 1) * 8 };
    let length = if length == TO_THE_END { TO_THE_END } else { length.wrapping_sub(skipped) };
    packet.tcp += skipped;
    odd_segment(skb, packet, length, fragment)
}

/// The segment behind something else than a plain IP header.
#[inline(always)]
fn odd_segment(skb: *mut __sk_buff, packet: &mut Packet, length: u32, fragment: bool) -> Frame {
    let mut header = [0_u16; TCP / 2];
    if !load(skb, packet.tcp, &mut header) {
        return Frame::Other;
    }
    if fragment {
        packet.flow.server_port = header[1];
        let [_, flags] = header[6].to_ne_bytes();
        packet.flags = flags;
        return Frame::Fragment;
    }
    segment(skb, header.as_ptr(), packet, length, false)
}

/// The TCP header (RFC 9293 §3.1) at `tcp`. `length`: bytes from there on, or [`TO_THE_END`] of the frame.
#[inline(always)]
fn segment(skb: *mut __sk_buff, tcp: *const u16, packet: &mut Packet, length: u32, plain: bool) -> Frame {
    let [offset, flags] = half(tcp, 12).to_ne_bytes();
    // SAFETY: the context.
    let there = unsafe { (*skb).len }.wrapping_sub(packet.tcp);
    let length = if length == TO_THE_END { there } else { length };
    let header = u32::from(offset >> 4) * 4;
    if header < TCP as u32 || length < header || length > there {
        return Frame::Other;
    }
    packet.flow.client_port = half(tcp, 0);
    packet.flow.server_port = half(tcp, 2);
    packet.seq = u32::from_be(word(tcp, 4));
    packet.ack = u32::from_be(word(tcp, 8));
    packet.window = u16::from_be(half(tcp, 14));
    packet.flags = flags;
    packet.accurate_ecn = offset & 1 != 0;
    packet.plain = plain;
    packet.header = header;
    packet.data = length - header;
    Frame::Segment
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
        if length == 12 {
            // What nearly every segment has (RFC 7323, appendix A).
            const USUAL: u32 = 0x0101_080a;
            let mut words = [0_u32; 3];
            if load(skb, self.tcp + TCP as u32, &mut words) && u32::from_be(words[0]) == USUAL {
                return Some(Options {
                    ts_value: u32::from_be(words[1]),
                    ts_echo: u32::from_be(words[2]),
                    present: options::TIMESTAMPS,
                    ..Options::default()
                });
            }
        }
        let scratch = maps::scratch()?;
        // The verifier wants to see the bounds.
        let bounded = opaque(length) & 63;
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
