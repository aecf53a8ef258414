//! What the eBPF programs and user space share: one source for both sides.
#![cfg_attr(not(test), no_std)]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]
#![deny(unsafe_code)]
#![expect(
    clippy::inline_always,
    reason = "for eBPF, a call costs the verifier and the stack more than it saves"
)]

pub mod abi;
pub mod cookie;
pub mod decide;
pub mod head;
pub mod preflight;
pub mod tcp;
pub mod words;
