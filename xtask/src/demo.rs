//! `cargo xtask demo`: preflightd beside a real nginx, live, on a fresh machine.

use std::{os::unix::process::CommandExt as _, process::Command};

use anyhow::{Context as _, Result};

use crate::{setup, sh};

/// Set up, build, and run preflightd on a mixed load, live: beside a real nginx whose port it steers, or before it where
/// the kernel or the privileges are not enough for that
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Passed on, such as --seconds 30, --stay (until Ctrl-C) or --loopback (no namespaces, no steering)
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<String>,
}

/// Sets up, builds in release, and becomes the demo.
///
/// # Errors
/// If the set-up is incomplete or the build fails.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    setup::run(&setup::Arguments::for_demo())?;
    sh::run(sh::cargo().args([
        "build",
        "--release",
        "--package=preflightd",
        "--package=preflightd-tests",
        "--bin=preflightd",
        "--bin=preflightd-demo",
    ]))?;
    let demo = sh::root().join("target/release/preflightd-demo");
    // In place of this process, so that Ctrl-C finds only one to wait for.
    let error = Command::new(&demo).args(&arguments.rest).exec();
    Err(error).with_context(|| format!("cannot run {}", demo.display()))
}
