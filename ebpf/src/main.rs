//! The TC programs of preflightd: entry points only.
//!
//! `steer` defers the handshake of new connections and gives each to a worker or to the proxy; `observe` only counts, and
//! needs less of the kernel. On any target but BPF this is an empty program, so that editors and lints can read it like
//! every other crate.
#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(asm_experimental_arch))]
#![expect(
    clippy::inline_always,
    reason = "a call costs the verifier and the stack more than the bytes it saves"
)]
#![cfg_attr(not(target_arch = "bpf"), expect(dead_code, reason = "entry points are for BPF"))]

mod answer;
mod answered;
mod handshake;
mod kernel;
mod maps;
mod packet;
mod reply;
mod sockets;
mod sweep;
mod verdict;

use aya_ebpf::{bindings::__sk_buff, macros::classifier, programs::TcContext};
use packet::{Frame, Packet};
use preflightd_common::{abi::event, tcp::flags};

/// Hands the packet to the next program: `TCX_NEXT`, and under clsact `TC_ACT_UNSPEC`, the next filter.
const NEXT: i32 = -1;

/// One packet in so many is timed, for that takes as long as the rest.
const SAMPLED: u64 = 64;

/// TC ingress: defers, decides, gives.
#[classifier]
#[inline(always)]
#[expect(clippy::needless_pass_by_value, reason = "the macro passes it so")]
fn steer(ctx: TcContext) -> i32 {
    ingress(ctx.skb.skb, true)
}

/// TC ingress: counts what connections open with, and touches nothing.
#[classifier]
#[expect(clippy::needless_pass_by_value, reason = "the macro passes it so")]
fn observe(ctx: TcContext) -> i32 {
    ingress(ctx.skb.skb, false)
}

/// Attached nowhere: sweeps `PENDING` when the daemon runs it.
#[classifier]
fn sweep_pending(_: TcContext) -> i32 {
    sweep::sweep();
    0
}

/// Does nothing: what any program costs, for benchmarks.
#[classifier]
fn empty(_: TcContext) -> i32 {
    NEXT
}

#[inline(always)]
fn ingress(skb: *mut __sk_buff, deferring: bool) -> i32 {
    const HANDSHAKE: u8 = flags::SYN | flags::ACK | flags::RST | flags::FIN;
    let mut packet = Packet::default();
    let frame = packet::read(skb, &mut packet);
    if frame == Frame::Other {
        return NEXT;
    }
    if !maps::is_served(packet.flow.server_port) {
        return NEXT;
    }
    let is_syn = packet.flags & HANDSHAKE == flags::SYN;
    if frame == Frame::Fragment {
        return if is_syn && deferring { handshake::fragmented_syn() } else { NEXT };
    }
    let timed = maps::count(event::Packet).is_multiple_of(SAMPLED);
    let start = if timed { maps::now() } else { 0 };
    let answers = if timed { maps::count_by(event::KernelAnswer, 0) } else { 0 };
    let verdict = if is_syn {
        handshake::syn(skb, &packet, deferring)
    } else {
        verdict::segment(skb, &packet, deferring)
    };
    if timed {
        let took = maps::now() - start;
        maps::count_by(event::SampledNs, took);
        maps::count(event::Sampled);
        if deferring && maps::count_by(event::KernelAnswer, 0) != answers {
            maps::count_by(event::AnswerNs, took);
            maps::count(event::AnswerSampled);
        }
    }
    verdict
}

/// Some helpers of the kernel are for GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
