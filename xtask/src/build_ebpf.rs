//! `cargo xtask build-ebpf`: builds the kernel's part alone.

use std::{env::consts::ARCH, fs};

use anyhow::{Context as _, Result, anyhow};

use crate::{ebpf_object, sh};

/// Build the eBPF object alone (every build of the daemon does so by itself)
#[derive(clap::Args)]
pub(crate) struct Arguments {}

/// Builds the object and says where it is.
///
/// # Errors
/// If its toolchain is missing, or the build fails.
pub(crate) fn run(_: &Arguments) -> Result<()> {
    let object = ebpf_object::build(sh::root(), ARCH, cfg!(target_endian = "little"))
        .map_err(|error| anyhow!(error))?;
    let size = fs::metadata(&object).with_context(|| format!("cannot read {}", object.display()))?.len();
    println!("{} ({size} bytes)", object.display());
    Ok(())
}
