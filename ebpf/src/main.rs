//! The TC programs of preflightd: entry points only.
//!
//! On any target but BPF this is an empty program, so that editors and lints can read it like every other crate.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![expect(
    clippy::inline_always,
    reason = "a call costs the verifier and the stack more than the bytes it saves"
)]

mod maps;
mod packet;

use aya_ebpf::{macros::classifier, programs::TcContext};
use preflightd_common::abi::uncounted;

/// Hands the packet to the next program: `TCX_NEXT`, and under clsact `TC_ACT_UNSPEC`, the next filter.
const NEXT: i32 = -1;

/// TC ingress: counts the TCP packets to the served ports, and lets every packet go on.
#[classifier]
#[expect(clippy::needless_pass_by_value, reason = "the macro passes it so")]
fn count_served(ctx: TcContext) -> i32 {
    match packet::tcp_destination(&ctx) {
        Ok(port) => {
            if !maps::count(port, ctx.len()) {
                maps::skip(uncounted::OTHER_PORT);
            }
        }
        Err(slot) => maps::skip(slot),
    }
    NEXT
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
