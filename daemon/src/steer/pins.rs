//! What outlives a daemon: maps and links, pinned in a directory of bpffs.
//!
//! ```text
//! PIN_DIR/v2-4026531840/     version of the layout, and the network namespace's number
//!     PORTS, CONFIG, …       maps
//!     link-2                 the link on interface 2
//! ```
#![forbid(unsafe_code)]

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use aya::{
    maps::{Array, HashMap, Map, MapData},
    programs::links::{FdLink, PinnedLink},
};
use preflightd_common::abi::{Answered, Config, Flow, Pending, VERSION, stage, state};

use super::Error;

const LINK: &str = "link-";

/// The directory of one network namespace.
#[derive(Clone, Debug)]
pub(super) struct Pins {
    directory: PathBuf,
}

impl Pins {
    /// Makes the directory, if it is not there. `netns`: the namespace's inode number.
    pub(super) fn open(pin_dir: &Path, netns: u64) -> Result<Self, Error> {
        let directory = pin_dir.join(format!("v{VERSION}-{netns}"));
        let remedy =
            "mount bpffs (`mount -t bpf bpf /sys/fs/bpf`) and set steer.pin_dir to a directory in it";
        let failed = |error: io::Error| Error::new(format!("pin in {}", directory.display()), remedy)(error);
        clear_dead(pin_dir, netns, &directory);
        fs::create_dir_all(&directory).map_err(failed)?;
        if !is_bpffs(&directory).map_err(failed)? {
            // What was made must not look like pins.
            let _ = fs::remove_dir(&directory);
            return Err(failed(io::Error::other("this is no bpffs")));
        }
        Ok(Self { directory })
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Pins the link on an interface, in place of an earlier one.
    pub(super) fn pin(&self, index: u32, link: FdLink) -> Result<PinnedLink, Error> {
        let path = self.link(index);
        let _ = fs::remove_file(&path);
        link.pin(&path).map_err(Error::new(format!("pin the link {}", path.display()), super::PRIVILEGES))
    }

    /// The link that an earlier daemon left on an interface.
    pub(super) fn pinned(&self, index: u32) -> Option<PinnedLink> {
        PinnedLink::from_pin(self.link(index)).ok()
    }

    pub(super) fn unpin(&self, index: u32) {
        let _ = fs::remove_file(self.link(index));
    }

    /// Interfaces that have a pinned link.
    pub(super) fn linked(&self) -> Vec<u32> {
        let entries = fs::read_dir(&self.directory).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.strip_prefix(LINK)?.parse().ok()).collect()
    }

    fn link(&self, index: u32) -> PathBuf {
        self.directory.join(format!("{LINK}{index}"))
    }
}

/// Removes what nobody can take over: pins of namespaces that are gone (their numbers may come again), and those of other
/// versions for this namespace. Best effort: what stays only takes memory.
fn clear_dead(pin_dir: &Path, netns: u64, ours: &Path) {
    let entries = fs::read_dir(pin_dir).into_iter().flatten().flatten();
    for directory in entries.map(|entry| entry.path()).filter(|path| is_ours(path)) {
        let same = directory.to_str().is_some_and(|name| name.ends_with(&format!("-{netns}")));
        if (same && directory != ours) || has_only_dead_links(&directory) {
            let files = fs::read_dir(&directory).into_iter().flatten().flatten();
            for file in files {
                let _ = fs::remove_file(file.path());
            }
            let _ = fs::remove_dir(&directory);
            tracing::info!(directory = %directory.display(), "removed what an earlier daemon left");
        }
    }
}

fn has_only_dead_links(directory: &Path) -> bool {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let names = entries.filter(|entry| entry.file_name().to_str().is_some_and(|name| name.starts_with(LINK)));
    let links: Vec<_> =
        names.filter_map(|entry| PinnedLink::from_pin(entry.path()).ok()).map(FdLink::from).collect();
    let is_dead = |link: &FdLink| link.info().is_ok_and(|info| !is_linked(&info_of(info.id())));
    !links.is_empty() && links.iter().all(is_dead)
}

fn is_bpffs(path: &Path) -> io::Result<bool> {
    const BPF_FS_MAGIC: u64 = 0xcafe_4a11; // include/uapi/linux/magic.h
    Ok(u64::try_from(rustix::fs::statfs(path)?.f_type) == Ok(BPF_FS_MAGIC))
}

/// What [`detach`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Detached {
    /// Directories that were cleared.
    pub directories: Vec<PathBuf>,
    /// Links that were removed.
    pub links: usize,
    /// Connections whose client had our SYN-ACK and had not spoken, or that the kernel has answered on: the client learns by
    /// a reset when it speaks.
    pub waiting: usize,
}

/// Removes every link and map below `pin_dir`, of every version and namespace. First the programs are told to defer
/// nothing new, and get at most `grace` to finish what they began.
///
/// # Errors
/// A file cannot be removed.
pub fn detach(pin_dir: &Path, grace: Duration) -> Result<Detached, Error> {
    let mut done = Detached::default();
    let failed = |path: &Path| {
        let what = format!("remove {}", path.display());
        Error::new(what, "run as root, or as the user that the daemon runs as")
    };
    let entries = match fs::read_dir(pin_dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(done),
        Err(error) => return Err(failed(pin_dir)(error)),
    };
    let directories: Vec<_> =
        entries.flatten().map(|entry| entry.path()).filter(|path| is_ours(path)).collect();
    for directory in &directories {
        stop_deferring(directory);
    }
    if !directories.is_empty() {
        // A daemon that runs sees it by then, and has written for the last time.
        std::thread::sleep(Duration::from_millis(500));
        for directory in &directories {
            stop_deferring(directory);
        }
    }
    let until = Instant::now() + grace;
    for directory in &directories {
        done.waiting += wait_for_handshakes(directory, until) + answered(directory);
    }
    for directory in directories {
        let mut links = 0;
        for entry in fs::read_dir(&directory).map_err(failed(&directory))?.flatten() {
            let path = entry.path();
            let is_link = entry.file_name().to_str().is_some_and(|name| name.starts_with(LINK));
            links += usize::from(is_link);
            fs::remove_file(&path).map_err(failed(&path))?;
        }
        done.links += links;
        fs::remove_dir(&directory).map_err(failed(&directory))?;
        done.directories.push(directory);
    }
    Ok(done)
}

fn is_ours(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let Some((version, netns)) = name.strip_prefix('v').and_then(|rest| rest.split_once('-')) else {
        return false;
    };
    let number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    path.is_dir() && number(version) && number(netns)
}

/// Best effort: of another version of the layout nothing is known, and its links are removed all the same.
fn stop_deferring(directory: &Path) {
    if !is_of_this_version(directory) {
        return;
    }
    let open = |name: &str| MapData::from_pin(directory.join(name)).map(Map::Array);
    // A daemon that runs sees that it has been put out.
    if let Ok(map) = open("OWNER")
        && let Ok(mut owner) = Array::<_, u32>::try_from(map)
    {
        let _ = owner.set(0, 0, 0);
    }
    if let Ok(map) = open("CONFIG")
        && let Ok(mut config) = Array::<_, Config>::try_from(map)
        && let Ok(old) = config.get(&0, 0)
    {
        let _ = config.set(0, Config { state: state::OFF, ..old }, 0);
    }
}

/// Connections that still wait at `until`.
fn wait_for_handshakes(directory: &Path, until: Instant) -> usize {
    if !is_of_this_version(directory) {
        return 0;
    }
    let Ok(map) = MapData::from_pin(directory.join("PENDING")) else { return 0 };
    let Ok(map) = HashMap::<_, Flow, Pending>::try_from(Map::LruHashMap(map)) else { return 0 };
    loop {
        let waiting = |pending: &Pending| matches!(pending.stage, stage::DEFERRED | stage::ACKNOWLEDGED);
        let all: Vec<_> =
            map.iter().filter_map(Result::ok).map(|(_, pending)| pending).filter(waiting).collect();
        let handshakes = all.iter().filter(|pending| pending.stage == stage::DEFERRED).count();
        if handshakes == 0 || Instant::now() >= until {
            return all.len();
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Connections that the kernel has answered on, and that go on.
fn answered(directory: &Path) -> usize {
    if !is_of_this_version(directory) {
        return 0;
    }
    let Ok(map) = MapData::from_pin(directory.join("ANSWERED")) else { return 0 };
    let Ok(map) = HashMap::<_, Flow, Answered>::try_from(Map::HashMap(map)) else { return 0 };
    map.iter().filter_map(Result::ok).filter(|(_, answered)| answered.pending.stage == stage::OPEN).count()
}

/// Whether the maps there are laid out as ours.
fn is_of_this_version(directory: &Path) -> bool {
    let name = directory.file_name().and_then(|name| name.to_str());
    name.is_some_and(|name| name.starts_with(&format!("v{VERSION}-")))
}

/// The file in which the kernel tells of our descriptor of a TCX link (`tcx_link_fdinfo`, net/../bpf/tcx.c).
pub(super) fn info_of(link: u32) -> PathBuf {
    let wanted = format!("link_id:\t{link}\n");
    let entries = fs::read_dir("/proc/self/fdinfo").into_iter().flatten().flatten();
    let found = entries.map(|entry| entry.path()).find(|path| {
        fs::read_to_string(path).is_ok_and(|text| text.contains("link_type:\ttcx") && text.contains(&wanted))
    });
    found.unwrap_or_default()
}

/// Whether a link still hangs on its interface. What cannot be read is taken for well.
pub(super) fn is_linked(info: &Path) -> bool {
    match fs::read_to_string(info) {
        Ok(text) => !text.lines().any(|line| line == "ifindex:\t0"),
        Err(_) => true,
    }
}
