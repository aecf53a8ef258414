//! What is sent in a packet's place: it is turned round, and leaves by the interface that it came in by.

use aya_ebpf::{
    bindings::__sk_buff,
    helpers::{bpf_l4_csum_replace, bpf_redirect, bpf_skb_change_tail, bpf_skb_store_bytes},
};
use preflightd_common::{
    abi::DATE,
    tcp::{self, Reply, fold},
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
    match write_headers(skb, packet) {
        0 => redirect(skb),
        failed => failed,
    }
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
    let failed = write_headers(skb, packet);
    if failed != 0 {
        return failed;
    }
    let mut at = packet.tcp + tcp::length(&scratch.reply);
    let (origin, origin_length) = (scratch.body.origin, scratch.body.origin_length);
    let (front, middle, tail) = (pieces.front_length, pieces.middle_length, pieces.tail_length);
    // Bounds that the verifier sees; none is empty.
    let (front_bound, middle_bound, tail_bound) = (front & 63, middle & 127, tail & 1023);
    if front_bound == 0 || middle_bound == 0 || middle_bound > 96 || tail_bound == 0 {
        return sent::BROKEN;
    }
    // SAFETY: helpers that check their bounds.
    unsafe {
        let mut failed = bpf_skb_store_bytes(skb, at, pieces.front.as_ptr().cast(), front_bound, 0);
        at += front;
        failed |= bpf_skb_store_bytes(skb, at, date.text.as_ptr().cast(), DATE, 0);
        at += DATE;
        failed |= bpf_skb_store_bytes(skb, at, pieces.middle.as_ptr().cast(), middle_bound, 0);
        at += middle;
        if origin_length != 0 {
            let bounded = origin_length & 127;
            if bounded == 0 || bounded > 64 {
                return sent::BROKEN;
            }
            let from = scratch.head.as_ptr().add((origin & 2047) as usize);
            failed |= bpf_skb_store_bytes(skb, at, from.cast(), bounded, 0);
            at += origin_length;
        }
        failed |= bpf_skb_store_bytes(skb, at, pieces.tail.as_ptr().cast(), tail_bound, 0);
        if failed != 0 {
            return sent::BROKEN;
        }
    }
    redirect(skb)
}

#[inline(always)]
fn redirect(skb: *mut __sk_buff) -> i32 {
    // SAFETY: the context.
    unsafe { bpf_redirect((*skb).ifindex, 0) as i32 }
}

/// Makes room for the data of the body in the scratch, and writes the headers of the reply there. 0, or one of [`sent`].
///
/// The checksum is written as that of the pseudo-header, which is right where the rest is still to be summed
/// (`CHECKSUM_PARTIAL`, as on veth and virtio), and then changed by a difference that makes a whole one of it, which the
/// helper leaves be in just that case (`inet_proto_csum_replace_by_diff`).
///
/// Called, not copied in: so many times is too much for the verifier.
#[inline(never)]
fn write_headers(skb: *mut __sk_buff, packet: &Packet) -> i32 {
    let Some(scratch) = maps::scratch() else { return sent::UNTOUCHED };
    // Sender, then receiver: each goes where the other was.
    if !packet::load_part(skb, 6, &mut scratch.link, 6) {
        return sent::UNTOUCHED;
    }
    let Some((_, receiver)) = scratch.link.split_at_mut_checked(6) else { return sent::UNTOUCHED };
    let Some(receiver) = receiver.first_chunk_mut::<6>() else { return sent::UNTOUCHED };
    if !packet::load(skb, 0, receiver) {
        return sent::UNTOUCHED;
    }
    let header = write_tcp(packet);
    let segment = header + scratch.body.length;
    let whole = scratch.whole;
    let total = packet.tcp + segment;
    // SAFETY: the context, and helpers that check their bounds.
    unsafe {
        if (*skb).len != total && bpf_skb_change_tail(skb, total, 0) != 0 {
            return sent::UNTOUCHED;
        }
        let mut failed = bpf_skb_store_bytes(skb, 0, (&raw const scratch.link).cast(), 12, 0);
        if packet.v4 {
            tcp::ipv4_header(&packet.flow, (20 + segment) as u16, &mut scratch.ip);
            failed |= bpf_skb_store_bytes(skb, 14, (&raw const scratch.ip).cast(), 20, 0);
        } else {
            tcp::ipv6_header(&packet.flow, segment as u16, &mut scratch.ip);
            failed |= bpf_skb_store_bytes(skb, 14, (&raw const scratch.ip).cast(), 40, 0);
        }
        let bounded = header & 63;
        if bounded < 20 {
            return sent::BROKEN;
        }
        failed |= bpf_skb_store_bytes(skb, packet.tcp, (&raw const scratch.new).cast(), bounded, 0);
        failed |= bpf_l4_csum_replace(skb, packet.tcp + 16, 0, whole, 0);
        if failed != 0 { sent::BROKEN } else { 0 }
    }
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
    scratch.whole = (whole & 0xffff_ffff) + (whole >> 32);
    let [high, low] = (pseudo as u16).to_ne_bytes();
    scratch.new[4] = u32::from_ne_bytes([high, low, 0, 0]);
    header
}
