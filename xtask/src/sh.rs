//! Running other programs, and where things are.

use std::{
    env,
    ffi::OsStr,
    fmt::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};

/// The root of the repository.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask/ lies in the repository")
}

/// Whether this is an automatic run, in which nothing may be left out.
pub(crate) fn in_ci() -> bool {
    env::var("CI").is_ok_and(|value| !matches!(&*value, "" | "0" | "false"))
}

/// Whether this process may install packages, make namespaces and load eBPF programs.
pub(crate) fn is_root() -> bool {
    output(Command::new("id").arg("-u")).as_deref() == Some("0")
}

/// The cargo that runs this program.
pub(crate) fn cargo() -> Command {
    Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// Cargo of a rustup toolchain, as `cargo +nightly`.
pub(crate) fn cargo_of(toolchain: &str) -> Command {
    let mut cargo = Command::new("rustup");
    // What the outer cargo told this process is about the outer toolchain.
    cargo.args(["run", toolchain, "cargo"]).env_remove("CARGO").env_remove("RUSTUP_TOOLCHAIN");
    cargo
}

/// Prints the command and runs it from the root of the repository.
///
/// # Errors
/// If it does not start or does not succeed.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let line = show(command);
    println!("$ {line}");
    let status = at_root(command).status().with_context(|| format!("cannot run `{line}`"))?;
    ensure!(status.success(), "`{line}` failed ({status})");
    Ok(())
}

/// Runs a command quietly and returns what it prints, trimmed; `None` if it cannot run or does not succeed.
pub(crate) fn output(command: &mut Command) -> Option<String> {
    let output = at_root(command).stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The command as one would type it.
pub(crate) fn show(command: &Command) -> String {
    let mut line = String::new();
    for (name, value) in command.get_envs() {
        if let Some(value) = value {
            let _ = write!(line, "{}='{}' ", name.display(), value.display());
        }
    }
    let program = Path::new(command.get_program());
    let _ = write!(line, "{}", program.file_name().unwrap_or(program.as_os_str()).display());
    for argument in command.get_args() {
        let _ = match argument.to_string_lossy() {
            plain if !plain.contains([' ', '(', '*', '&', '|']) => write!(line, " {plain}"),
            special => write!(line, " '{special}'"),
        };
    }
    line
}

/// Where a program lies on `PATH`, or in the directories for administrators, which users often lack there.
pub(crate) fn find(program: impl AsRef<OsStr>) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|directory| directory.join(program.as_ref()))
        .find(|file| file.is_file())
}

fn at_root(command: &mut Command) -> &mut Command {
    if command.get_current_dir().is_none() {
        command.current_dir(root());
    }
    command
}
