//! What the eBPF program and user space share: one source for both sides.
#![cfg_attr(not(test), no_std)]
#![deny(unsafe_code)]

pub mod abi;
pub mod preflight;
