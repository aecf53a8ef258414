//! Builds the eBPF object and lays it into `OUT_DIR`, where `steer` embeds it.
#![forbid(unsafe_code)]

use std::{
    env, fs,
    path::{Path, PathBuf},
};

#[path = "../xtask/src/ebpf_object.rs"]
mod ebpf_object;

fn main() {
    let root = PathBuf::from(variable("CARGO_MANIFEST_DIR")).join("..");
    // Emitted in every case: with no such line, cargo would watch the whole package.
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_EBPF").is_none() {
        return;
    }
    for input in ["ebpf", "common", "Cargo.toml", "Cargo.lock", ".tools/rustc"] {
        let input = root.join(input);
        // A path that does not exist counts as changed, each time.
        if input.exists() {
            println!("cargo::rerun-if-changed={}", input.display());
        }
    }
    println!("cargo::rerun-if-env-changed=EBPF_RUSTC");
    println!("cargo::rerun-if-env-changed=EBPF_LINKER");
    if let Err(error) = embed(&root) {
        println!("cargo::error={error}");
    }
}

fn embed(root: &Path) -> Result<(), String> {
    let root = root.canonicalize().map_err(|error| format!("cannot find {}: {error}", root.display()))?;
    let little_endian = variable("CARGO_CFG_TARGET_ENDIAN") == "little";
    let object = ebpf_object::build(&root, &variable("CARGO_CFG_TARGET_ARCH"), little_endian)?;
    let copy = Path::new(&variable("OUT_DIR")).join("preflightd-ebpf");
    fs::copy(&object, &copy)
        .map_err(|error| format!("cannot copy {} to {}: {error}", object.display(), copy.display()))?;
    Ok(())
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|error| panic!("cargo did not set {name} for the build script: {error}"))
}
