//! The Kubernetes API server for the tests. No package index that the set-up may use has one to install, but Debian has
//! the complete source of an old one, and a Go compiler that can build it.
//!
//! All that the build needs is downloaded as apt's packages, checked by apt's signatures, and unpacked into a directory
//! that is removed afterwards: nothing is installed, and it needs no root. The binary stays in the user's cache, by its
//! version, for all checkouts; `.tools/kube-apiserver` leads to it. One on `PATH` is taken as it is.

use std::{
    env,
    ffi::OsStr,
    fs::{self, File},
    io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use super::{ByHand, tools, write_if_changed};
use crate::sh;

/// What it calls itself.
const VERSION: &str = "1.20.2";

/// Debian's source package `kubernetes`, without Debian's revision. Its patches are for kubectl and log lines.
const SOURCE: &str = "1.20.5+really1.20.2";

/// The compiler, and what replaces its namesakes among the sources' own copies: those read the runtime's maps by a layout
/// that Go has changed since, and crash.
const PACKAGES: &[&str] = &[
    "golang-1.19-go",
    "golang-1.19-src",
    "golang-github-json-iterator-go-dev",
    "golang-github-modern-go-reflect2-dev",
];
const REPLACED: &[&str] = &["github.com/json-iterator/go", "github.com/modern-go/reflect2"];

/// A comparison of a value with its type's zero that was never true but for pointers' sake, until Go had empty strings
/// share one place: since then it takes them for null, and objects with one would be refused.
const NEVER: &str = " || reflect.DeepEqual(reflect.Zero(reflect.TypeOf(data)), reflect.ValueOf(data))";
const HAVE_NEVER: &[&str] = &[
    "vendor/github.com/go-openapi/validate/type.go",
    "vendor/k8s.io/kube-openapi/pkg/validation/validate/type.go",
];

/// The API's types, whose description must be generated.
const TYPES: &str = "staging/src/k8s.io";
const NOT_SERVED: &[&str] = &["code-generator", "sample-apiserver"];

/// To be changed with whatever else changes the binary.
const RECIPE: &str = "recipe 2";

/// Puts it to `.tools/`, building it if that has not been done on this machine.
pub(super) fn install(by_hand: &mut ByHand) -> Result<()> {
    if sh::find("kube-apiserver").is_some() {
        return Ok(());
    }
    let cache = cache();
    fs::create_dir_all(&cache).with_context(|| format!("cannot create {}", cache.display()))?;
    let binary = cache.join(format!("kube-apiserver-{VERSION}"));
    // Another checkout may be at it.
    let lock =
        File::create(cache.join("kube-apiserver.lock")).context("cannot create a lock in the cache")?;
    lock.lock().context("cannot lock the cache")?;
    let made_for = cache.join(format!("kube-apiserver-{VERSION}.made-for"));
    let recipe = format!("{SOURCE}\n{PACKAGES:?}\n{RECIPE}\n");
    if !(binary.is_file() && fs::read_to_string(&made_for).is_ok_and(|was| was == recipe)) {
        println!("setup: missing kube-apiserver {VERSION}; building it takes about 5 minutes of CPU, once");
        let Some(built) = Build::begin(&cache)?.run()? else {
            by_hand.add(format!(
                "# put a kube-apiserver (of Kubernetes {VERSION} or later) on PATH: only Debian 12 has what it takes to \
                 build one"
            ));
            return Ok(());
        };
        fs::rename(built.binary(), &binary).context("cannot put kube-apiserver into the cache")?;
        write_if_changed(&made_for, &recipe)?;
    }
    link(&binary, &tools().join("kube-apiserver"))
}

/// A directory under the user's cache, or in the repository where the user has none.
fn cache() -> PathBuf {
    let of_user = env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let of_user = of_user.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cache")));
    of_user
        .filter(|path| path.is_absolute())
        .map_or_else(|| tools().join("cache"), |path| path.join("preflightd"))
}

fn link(target: &Path, link: &Path) -> Result<()> {
    if fs::read_link(link).is_ok_and(|was| was == target) {
        return Ok(());
    }
    match fs::remove_file(link) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot remove {}", link.display()));
        }
        _ => {}
    }
    let parent = link.parent().unwrap_or(link);
    fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
    symlink(target, link).with_context(|| format!("cannot make {}", link.display()))
}

/// The directory in which it is built. On a disk, since it grows to 2 GB, and gone with this value.
struct Build {
    directory: PathBuf,
}

impl Build {
    fn begin(cache: &Path) -> Result<Self> {
        let build = Self { directory: cache.join("kube-apiserver.build") };
        // Of a run that was interrupted.
        build.remove().with_context(|| format!("cannot remove {}", build.directory.display()))?;
        for part in ["apt/lists/partial", "apt/cache/archives/partial", "apt/sources", "packages", "root"] {
            fs::create_dir_all(build.path(part)).with_context(|| format!("cannot create {part}"))?;
        }
        fs::create_dir_all(build.sources()).context("cannot create a directory for the sources")?;
        Ok(build)
    }

    /// `None` if this system's packages have no part of it.
    fn run(self) -> Result<Option<Self>> {
        if !self.download()? {
            return Ok(None);
        }
        self.mend()?;
        self.describe_types()?;
        self.compile()?;
        Ok(Some(self))
    }

    /// Gets packages and sources, unpacked; false if apt does not have them.
    fn download(&self) -> Result<bool> {
        if sh::find("apt-get").is_none() || sh::find("dpkg-deb").is_none() {
            return Ok(false);
        }
        self.write_apt_sources()?;
        // A repository beside the distribution's that cannot be reached does not matter.
        if let Err(error) = sh::run(self.apt("apt-get").args(["update", "-q"])) {
            println!("setup: {error:#}; going on with what could be had");
        }
        let candidates = sh::output(self.apt("apt-cache").arg("policy").args(PACKAGES)).unwrap_or_default();
        let found =
            candidates.matches("Candidate:").count() - candidates.matches("Candidate: (none)").count();
        let sources = sh::output(self.apt("apt-cache").args(["showsrc", "kubernetes"])).unwrap_or_default();
        let version = sources
            .lines()
            .filter_map(|line| line.strip_prefix("Version: "))
            .find(|version| version.starts_with(&format!("{SOURCE}-")));
        let Some(version) = version.filter(|_| found == PACKAGES.len()) else { return Ok(false) };
        sh::run(self.apt("apt-get").args(["download", "-q"]).args(PACKAGES))?;
        for package in files(&self.path("packages"))? {
            sh::run(Command::new("dpkg-deb").arg("-x").arg(package).arg(self.path("root")))?;
        }
        let source = format!("kubernetes={version}");
        sh::run(self.apt("apt-get").args(["source", "-q", "--download-only", "--tar-only", &source]))?;
        let archive = self.path(&format!("packages/kubernetes_{SOURCE}.orig.tar.gz"));
        let mut tar = Command::new("tar");
        sh::run(tar.args(["-x", "--strip-components=1", "-f"]).arg(archive).arg("-C").arg(self.sources()))?;
        Ok(true)
    }

    /// The machine's own repositories, keys and all, for sources as well; what else apt is told stands as it is.
    fn write_apt_sources(&self) -> Result<()> {
        let own = [
            ("Dir::Etc::sourcelist", PathBuf::from("/dev/null")),
            ("Dir::Etc::sourceparts", self.path("apt/sources")),
            ("Dir::State::lists", self.path("apt/lists")),
            ("Dir::Cache", self.path("apt/cache")),
        ];
        let mut lines = own.map(|(option, place)| format!("{option} \"{}\";", place.display())).to_vec();
        // The directory is in the cache of this user, which apt's own cannot enter.
        lines.extend(["APT::Sandbox::User \"root\";", "Acquire::Languages \"none\";\n"].map(str::to_owned));
        fs::write(self.path("apt/apt.conf"), lines.join("\n")).context("cannot write apt's configuration")?;
        let place = |which: &str| {
            // One line: `RESULT='/etc/apt/sources.list'`.
            let found = sh::output(Command::new("apt-config").args(["shell", "RESULT", which]))?;
            found.trim_start_matches("RESULT=").trim_matches('\'').parse::<PathBuf>().ok()
        };
        let mut all = files(&place("Dir::Etc::sourceparts/d").unwrap_or_default()).unwrap_or_default();
        all.extend(place("Dir::Etc::sourcelist/f").filter(|file| file.is_file()));
        for file in all {
            let with_sources: fn(&str) -> String = match file.extension().and_then(OsStr::to_str) {
                Some("sources") => deb822_with_sources,
                Some("list") => lines_with_sources,
                _ => continue,
            };
            let name = file.file_name().unwrap_or_default();
            let text =
                fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
            fs::write(self.path("apt/sources").join(name), with_sources(&text))
                .context("cannot write apt's sources")?;
        }
        Ok(())
    }

    /// One of apt's programs, with lists of its own.
    fn apt(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.current_dir(self.path("packages")).arg(format!("-c={}", self.path("apt/apt.conf").display()));
        command
    }

    /// Changes what does not work with a Go that is newer than the sources.
    fn mend(&self) -> Result<()> {
        for library in REPLACED {
            let old = self.sources().join("vendor").join(library);
            fs::remove_dir_all(&old).with_context(|| format!("cannot remove {}", old.display()))?;
            sh::run(
                Command::new("cp")
                    .arg("-r")
                    .arg(self.path("root/usr/share/gocode/src").join(library))
                    .arg(old),
            )?;
        }
        for file in HAVE_NEVER {
            let path = self.sources().join(file);
            let text = fs::read_to_string(&path).with_context(|| format!("cannot read {file}"))?;
            ensure!(text.matches(NEVER).count() == 1, "{file} is not as expected");
            fs::write(&path, text.replace(NEVER, "")).with_context(|| format!("cannot write {file}"))?;
        }
        Ok(())
    }

    /// Generates the OpenAPI description of all types, as the sources' Makefile does: without it the server does not
    /// start, and Debian's sources lack it.
    fn describe_types(&self) -> Result<()> {
        let mut grep = Command::new("grep");
        grep.args(["-rl", "--include=*.go", "+k8s:openapi-gen=", TYPES]).current_dir(self.sources());
        let tagged = sh::output(&mut grep).context("found no API types in the sources")?;
        let mut packages: Vec<String> = tagged
            .lines()
            .filter_map(|file| Path::new(file).parent()?.strip_prefix(TYPES).ok())
            .filter(|package| !NOT_SERVED.iter().any(|unserved| package.starts_with(unserved)))
            .map(|package| format!("k8s.io/kubernetes/vendor/k8s.io/{}", package.display()))
            .collect();
        packages.sort();
        packages.dedup();
        let generator = self.path("openapi-gen");
        let source = "k8s.io/kubernetes/vendor/k8s.io/kube-openapi/cmd/openapi-gen";
        sh::run(self.go().args(["build", "-o"]).arg(&generator).arg(source))?;
        let mut generate = self.go_environment(Command::new(generator));
        generate
            .args(["-O", "zz_generated.openapi", "-p", "k8s.io/kubernetes/pkg/generated/openapi"])
            .args(["-h", "vendor/k8s.io/code-generator/hack/boilerplate.go.txt", "-r", "/dev/null", "-i"])
            .arg(packages.join(","));
        sh::run(&mut generate)
    }

    fn compile(&self) -> Result<()> {
        let version = |name: &str, value: &str| {
            format!("-X k8s.io/kubernetes/vendor/k8s.io/component-base/version.{name}={value}")
        };
        let mut flags = vec!["-s -w".to_owned(), version("gitVersion", &format!("v{VERSION}"))];
        let mut numbers = VERSION.split('.');
        for name in ["gitMajor", "gitMinor"] {
            flags.extend(numbers.next().map(|number| version(name, number)));
        }
        let mut build = self.go();
        build.args(["build", "-ldflags", &flags.join(" "), "-o"]).arg(self.binary());
        sh::run(build.arg("k8s.io/kubernetes/cmd/kube-apiserver"))?;
        let says = sh::output(Command::new(self.binary()).arg("--version")).unwrap_or_default();
        ensure!(says == format!("Kubernetes v{VERSION}"), "the kube-apiserver that was built says {says:?}");
        Ok(())
    }

    fn go(&self) -> Command {
        self.go_environment(Command::new(self.path("root/usr/lib/go-1.19/bin/go")))
    }

    /// Go as before its modules, and blind to the user's own settings.
    fn go_environment(&self, mut command: Command) -> Command {
        command
            .current_dir(self.sources())
            .env("GOROOT", self.path("root/usr/lib/go-1.19"))
            .env("GOPATH", self.path("go"))
            .env("GOCACHE", self.path("go-cache"))
            .env("GO111MODULE", "off")
            .env("GOENV", "off")
            .env("GOFLAGS", "")
            .env("CGO_ENABLED", "0");
        command
    }

    fn sources(&self) -> PathBuf {
        self.path("go/src/k8s.io/kubernetes")
    }

    fn binary(&self) -> PathBuf {
        self.path("kube-apiserver")
    }

    fn path(&self, part: &str) -> PathBuf {
        self.directory.join(part)
    }

    fn remove(&self) -> io::Result<()> {
        match fs::remove_dir_all(&self.directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

impl Drop for Build {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            println!("setup: remove {} by hand: {error}", self.directory.display());
        }
    }
}

/// `Types: deb` as `Types: deb deb-src`.
fn deb822_with_sources(text: &str) -> String {
    let line = |line: &str| match line.split_once(':') {
        Some((key, types))
            if key.eq_ignore_ascii_case("types") && types.split_whitespace().any(|t| t == "deb") =>
        {
            format!("{key}: deb deb-src\n")
        }
        _ => format!("{line}\n"),
    };
    text.lines().map(line).collect()
}

/// Every line that begins with `deb`, once more with `deb-src`.
fn lines_with_sources(text: &str) -> String {
    let line = |line: &str| match line.trim_start().strip_prefix("deb") {
        Some(rest) if rest.starts_with([' ', '\t']) => format!("deb{rest}\ndeb-src{rest}\n"),
        _ => format!("{line}\n"),
    };
    text.lines().map(line).collect()
}

fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))?;
    let mut files: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repositories_get_their_sources() {
        let deb822 =
            "# comment\nTypes: deb\nURIs: http://mirror.test/debian\nSigned-By: /a/key\n\nTypes: deb-src\n";
        assert_eq!(deb822_with_sources(deb822), deb822.replace("Types: deb\n", "Types: deb deb-src\n"));
        let lines = "# deb http://mirror.test off main\ndeb [signed-by=/a/key] http://mirror.test on main\n";
        assert_eq!(
            lines_with_sources(lines),
            format!("{lines}deb-src [signed-by=/a/key] http://mirror.test on main\n")
        );
    }
}
