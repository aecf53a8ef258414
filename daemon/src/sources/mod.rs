//! Where policies come from, beside the configuration's own files.
#![forbid(unsafe_code)]

pub mod kubernetes;
