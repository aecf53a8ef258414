//! `cargo xtask lint`: the quick checks before a commit.

use anyhow::Result;

use crate::sh;

/// Check the formatting, and clippy without a warning
#[derive(clap::Args)]
pub(crate) struct Arguments {}

/// Runs both checks.
///
/// # Errors
/// If one of them finds something.
pub(crate) fn run(_: &Arguments) -> Result<()> {
    format()?;
    clippy()
}

/// `cargo fmt --check` over every crate, the eBPF crate too.
///
/// # Errors
/// If a file is not formatted.
pub(crate) fn format() -> Result<()> {
    sh::run(sh::cargo().args(["fmt", "--all", "--check"]))
}

/// Clippy over every target of every crate, the eBPF crate too (for the host: it has no other clippy).
///
/// # Errors
/// If there is a warning.
pub(crate) fn clippy() -> Result<()> {
    sh::run(sh::cargo().args(["clippy", "--workspace", "--all-targets", "--locked", "--", "-Dwarnings"]))
}
