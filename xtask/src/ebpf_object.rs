//! Builds the eBPF object by a cargo within cargo. One source for `cargo xtask build-ebpf` and the daemon's build
//! script, which compiles this file too; hence the standard library only.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Builds the object for this machine's byte order and `arch` (as in `CARGO_CFG_TARGET_ARCH`), and returns its path.
///
/// # Errors
/// If the toolchain that `cargo xtask setup` installs is missing, or the build fails.
pub(crate) fn build(root: &Path, arch: &str, little_endian: bool) -> Result<PathBuf, String> {
    let (rustc, linker) = toolchain(root)?;
    let target = if little_endian { "bpfel-unknown-none" } else { "bpfeb-unknown-none" };
    // A target directory of its own, as the outer cargo holds the lock of its own one; and the same for every profile,
    // so that `core` is compiled once.
    let target_dir = root.join("target/ebpf");
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for (name, _) in env::vars_os() {
        let name = name.to_string_lossy();
        if is_of_the_outer_build(&name) {
            cargo.env_remove(&*name);
        }
    }
    let rustflags = [
        &format!("--cfg=bpf_target_arch=\"{arch}\""),
        "-Ctarget-cpu=v3",
        "-Cdebuginfo=2", // what --btf makes the type information from
        "-Clink-arg=--btf",
        "-Clink-arg=--disable-expand-memcpy-in-order", // else what is cleared is cleared by a call, byte by byte
    ]
    .join("\x1f");
    let status = cargo
        .current_dir(root)
        .args(["build", "--quiet", "--locked", "--package=preflightd-ebpf", "--bins", "--release"])
        .args(["-Zbuild-std=core", "--target", target, "--target-dir"])
        .arg(&target_dir)
        .env("RUSTC", &rustc)
        .env("RUSTC_BOOTSTRAP", "1") // -Zbuild-std on a stable compiler
        .env("RUSTC_WRAPPER", "")
        .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", &linker)
        .env("CARGO_TARGET_BPFEB_UNKNOWN_NONE_LINKER", &linker)
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags)
        .status()
        .map_err(|error| format!("cannot run cargo for the eBPF object: {error}"))?;
    if !status.success() {
        return Err(format!(
            "the eBPF object does not build with {} ({status}); if its toolchain changed, run `cargo xtask setup`",
            rustc.display()
        ));
    }
    Ok(target_dir.join(target).join("release/preflightd-ebpf"))
}

/// The compiler and the linker: `EBPF_RUSTC` and `EBPF_LINKER`, else what `cargo xtask setup` chose.
fn toolchain(root: &Path) -> Result<(PathBuf, PathBuf), String> {
    let rustc = match env::var_os("EBPF_RUSTC") {
        Some(path) => PathBuf::from(path),
        None => PathBuf::from(fs::read_to_string(root.join(".tools/rustc")).unwrap_or_default().trim()),
    };
    let linker = env::var_os("EBPF_LINKER").map_or_else(|| root.join(".tools/bin/bpf-linker"), PathBuf::from);
    for (what, path) in [("compiler", &rustc), ("linker", &linker)] {
        if !path.is_file() {
            let path =
                if path.as_os_str().is_empty() { "none is chosen".into() } else { path.to_string_lossy() };
            return Err(format!("the eBPF {what} is missing ({path}): run `cargo xtask setup`"));
        }
    }
    Ok((rustc, linker))
}

/// Compilers, wrappers, flags and profiles of the outer build (clippy, loom, fuzzing) are not for this one.
fn is_of_the_outer_build(name: &str) -> bool {
    let cargo = name.starts_with("CARGO_") && !matches!(name, "CARGO_HOME" | "CARGO_NET_OFFLINE");
    let rust = name.starts_with("RUST") && !matches!(name, "RUSTUP_HOME" | "RUST_BACKTRACE");
    cargo || rust
}
