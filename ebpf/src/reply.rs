//! What is sent in a packet's place: it is turned round, and leaves by the interface that it came in by.

use aya_ebpf::{
    bindings::__sk_buff,
    helpers::{bpf_l4_csum_replace, bpf_redirect, bpf_skb_change_tail, bpf_skb_store_bytes},
};
use preflightd_common::{
    abi::{DATE, MAX_FRONT, MAX_MIDDLE, MAX_TEXT},
    tcp::{self, Reply, fold},
    words::{load, opaque, store, word},
};

use crate::{
    maps::{self, Scratch},
    packet::{self, Packet},
};

/// What came of sending a reply: the program's verdict, or one of these. No `enum` with values: a function that is
/// called, not copied in, returns one number.
pub(crate) mod sent {
    /// No: the packet is as it was.
    pub(crate) const UNTOUCHED: i32 = -100;
    /// No: the packet is spoilt.
    pub(crate) const BROKEN: i32 = -101;
}

/// Sends a reply without data.
#[inline(always)]
pub(crate) fn send(skb: *mut __sk_buff, packet: &Packet, reply: &Reply) -> i32 {
    let Some(scratch) = maps::scratch() else { return sent::UNTOUCHED };
    scratch.reply = *reply;
    send_prepared(skb, packet, scratch)
}

/// Sends the reply in the scratch, without data.
#[inline(always)]
pub(crate) fn send_prepared(skb: *mut __sk_buff, packet: &Packet, scratch: &mut Scratch) -> i32 {
    scratch.body.length = 0;
    scratch.body.sum = 0;
    let end = write_headers(skb, packet);
    if end == 0 {
        return sent::UNTOUCHED;
    }
    finish(skb, packet, end, end)
}

/// Sends the reply in the scratch, with the answer that [`crate::answer::measure`] has measured.
///
/// Called, not copied in: so many times is too much for the verifier.
#[inline(never)]
pub(crate) fn send_answer(skb: *mut __sk_buff, packet: &Packet) -> i32 {
    let Some(scratch) = maps::scratch() else { return sent::UNTOUCHED };
    let (Some(pieces), Some(date)) =
        (maps::template(&scratch.body.template), maps::date(scratch.body.second))
    else {
        return sent::UNTOUCHED;
    };
    let headers = write_headers(skb, packet);
    if headers == 0 {
        return sent::UNTOUCHED;
    }
    // Each piece by whole words, and the next one over what those have too much. The bounds are the verifier's.
    let mut at = FRONT + (headers & 127);
    let mut i = 0;
    while i < MAX_FRONT as u32 {
        store(&mut scratch.frame, at + i, load(&pieces.front, i));
        i += 8;
    }
    at += pieces.front_length & 63;
    let mut i = 0;
    while i < 32 {
        store(&mut scratch.frame, at + i, load(&date.text, i));
        i += 8;
    }
    at += DATE;
    let mut i = 0;
    while i < MAX_MIDDLE as u32 {
        store(&mut scratch.frame, at + i, load(&pieces.middle, i));
        i += 8;
    }
    at += pieces.middle_length & 63;
    if scratch.body.origin_length != 0 {
        let mut i = 0;
        while i < MAX_TEXT {
            let text = word(&scratch.head, scratch.body.origin + i);
            store(&mut scratch.frame, at + i, text);
            i += 8;
        }
        at += scratch.body.origin_length & 127;
    }
    let total = headers + scratch.body.length;
    let sent = finish(skb, packet, at - FRONT, total);
    if sent < 0 {
        return sent;
    }
    let tail = opaque(pieces.tail_length) & 1023;
    if tail == 0 {
        return sent::BROKEN;
    }
    // SAFETY: a helper that checks its bounds.
    let failed = unsafe { bpf_skb_store_bytes(skb, at - FRONT, pieces.tail.as_ptr().cast(), tail, 0) };
    if failed != 0 { sent::BROKEN } else { sent }
}

/// Makes the frame `total` bytes long, writes the first `written` of them from the scratch, and has it sent.
///
/// The checksum there is that of the pseudo-header, which is right where the rest is still to be summed
/// (`CHECKSUM_PARTIAL`, as on veth and virtio), and is then changed by a difference that makes a whole one of it, which the
/// helper leaves be in just that case (`inet_proto_csum_replace_by_diff`).
///
/// Called, not copied in: so many times is too much for the verifier.
#[inline(never)]
fn finish(skb: *mut __sk_buff, packet: &Packet, written: u32, total: u32) -> i32 {
    let Some(scratch) = maps::scratch() else { return sent::UNTOUCHED };
    let bounded = opaque(written) & 511;
    if !(54..=496).contains(&bounded) {
        return sent::UNTOUCHED;
    }
    // SAFETY: the context, and helpers that check their bounds.
    unsafe {
        if (*skb).len != total && bpf_skb_change_tail(skb, total, 0) != 0 {
            return sent::UNTOUCHED;
        }
        let from = scratch.frame.as_ptr().add(FRONT as usize);
        let mut failed = bpf_skb_store_bytes(skb, 0, from.cast(), bounded, 0);
        failed |= bpf_l4_csum_replace(skb, packet.tcp + 16, 0, scratch.whole, 0);
        if failed != 0 {
            return sent::BROKEN;
        }
        bpf_redirect((*skb).ifindex, 0) as i32
    }
}

/// Where the frame begins in the scratch, and where what follows its Ethernet header does.
const FRONT: u32 = 2;
const IP: u32 = 16;

/// Writes the headers of the reply in the scratch for the data of the body there. Returns their length; 0: they cannot be.
///
/// Called, not copied in: so many times is too much for the verifier.
#[inline(never)]
fn write_headers(skb: *mut __sk_buff, packet: &Packet) -> u32 {
    let Some(scratch) = maps::scratch() else { return 0 };
    let mut addresses = [0_u16; 6];
    if !packet.plain || !packet::load(skb, 0, &mut addresses) {
        return 0;
    }
    let header = write_tcp(packet);
    let segment = header + scratch.body.length;
    let ethertype = if packet.v4 { packet::ETHERTYPE_IPV4 } else { packet::ETHERTYPE_IPV6 };
    // Receiver and sender change places.
    let [r0, r1, r2, s0, s1, s2] = addresses;
    let halves = |a: u16, b: u16, c: u16, d: u16| {
        let [a, b, c, d] = [a, b, c, d].map(u16::to_ne_bytes);
        u64::from_ne_bytes([a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1]])
    };
    store_native(&mut scratch.frame, 0, halves(0, s0, s1, s2));
    store_native(&mut scratch.frame, 8, halves(r0, r1, r2, ethertype.to_be()));
    let mut ip = [0; 10];
    let ip_length = if packet.v4 {
        tcp::ipv4_header(&packet.flow, (20 + segment) as u16, &mut ip);
        20
    } else {
        tcp::ipv6_header(&packet.flow, segment as u16, &mut ip);
        40
    };
    let mut i = 0;
    while i < 10 {
        store_native(&mut scratch.frame, IP + i * 4, pair(ip[i as usize], ip[i as usize + 1]));
        i += 2;
    }
    let mut i = 0;
    while i < 10 {
        let words = pair(scratch.new[i as usize], scratch.new[i as usize + 1]);
        store_native(&mut scratch.frame, IP + ip_length + i * 4, words);
        i += 2;
    }
    // Which lengths there are the verifier need not know: it would follow each apart.
    remembered(scratch, 14 + ip_length + header)
}

/// A number as it comes back from a map, of which the verifier knows nothing.
#[inline(always)]
fn remembered(scratch: &mut Scratch, number: u32) -> u32 {
    scratch.number = number;
    // SAFETY: just written; the compiler must not know.
    unsafe { core::ptr::read_volatile(&raw const scratch.number) }
}

/// Two words as they lie in memory.
#[inline(always)]
fn pair(first: u32, second: u32) -> u64 {
    let low_first = u64::from(first) | u64::from(second) << 32;
    if cfg!(target_endian = "little") { low_first } else { low_first.rotate_left(32) }
}

/// Eight bytes as they lie in memory.
#[inline(always)]
fn store_native(frame: &mut [u8; 512], at: u32, bytes: u64) {
    store(frame, at, u64::from_le(bytes));
}

/// Writes the TCP header into the scratch, and what makes its checksum a whole one. Returns its length.
#[inline(never)]
fn write_tcp(packet: &Packet) -> u32 {
    let Some(scratch) = maps::scratch() else { return 0 };
    let flow = &packet.flow;
    let header = scratch.reply.write(flow, 0, &mut scratch.new);
    let segment = header + scratch.body.length;
    let mut pseudo = u64::from(tcp::PROTOCOL.to_be()) + u64::from((segment as u16).to_be());
    let mut i = if packet.v4 { 3 } else { 0 };
    while i < 4 {
        pseudo += u64::from(flow.client[i]) + u64::from(flow.server[i]);
        i += 1;
    }
    let pseudo = fold(pseudo);
    let mut whole = u64::from(scratch.body.sum) + 2 * u64::from(pseudo);
    let mut i = 0;
    while i < 10 {
        whole += u64::from(scratch.new[i]);
        i += 1;
    }
    scratch.whole = u64::from(fold(whole));
    let [high, low] = (pseudo as u16).to_ne_bytes();
    scratch.new[4] = u32::from_ne_bytes([high, low, 0, 0]);
    remembered(scratch, header)
}
