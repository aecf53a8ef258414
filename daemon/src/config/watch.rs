//! Sees changes of configuration files: edits, editors' renames, and swapped symbolic links as Kubernetes makes them.

use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use std::{
    collections::BTreeSet,
    fs,
    path::{Component, Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{sync::Notify, task::AbortHandle, time::timeout};

/// How long files must be quiet before they are read.
const QUIET: Duration = Duration::from_millis(200);
/// Links followed for one path.
const MAX_LINKS: usize = 40;

/// Watches a set of files and directories. Only directories are watched, because a file that is replaced by a rename
/// takes its watch with it.
#[derive(Debug)]
pub struct Watch {
    watcher: RecommendedWatcher,
    /// Told after each change, when the files have been quiet for a moment.
    settled: Arc<Notify>,
    settling: AbortHandle,
    wanted: Arc<Mutex<Wanted>>,
    directories: BTreeSet<PathBuf>,
}

/// What counts as a change.
#[derive(Debug, Default)]
struct Wanted {
    /// Files, and links on the way to them.
    entries: BTreeSet<PathBuf>,
    /// Directories of which every `*.toml` counts.
    directories: BTreeSet<PathBuf>,
}

impl Watch {
    /// Begins with nothing watched. Belongs to the tokio runtime that it is called in.
    ///
    /// # Errors
    /// The kernel gives no inotify instance (`fs.inotify.max_user_instances`).
    pub fn new() -> notify::Result<Self> {
        let changed = Arc::new(Notify::new());
        let wanted = Arc::new(Mutex::new(Wanted::default()));
        let watcher = notify::recommended_watcher({
            let (changed, wanted) = (changed.clone(), wanted.clone());
            move |event: notify::Result<Event>| {
                let relevant = event.as_ref().map_or(true, |event| {
                    wanted.lock().unwrap_or_else(PoisonError::into_inner).concerns(event)
                });
                if relevant {
                    changed.notify_one();
                }
            }
        })?;
        let settled = Arc::new(Notify::new());
        let told = settled.clone();
        let settling = tokio::spawn(async move {
            loop {
                changed.notified().await;
                while timeout(QUIET, changed.notified()).await.is_ok() {}
                told.notify_one();
            }
        });
        let settling = settling.abort_handle();
        Ok(Self { watcher, settled, settling, wanted, directories: BTreeSet::new() })
    }

    /// Watches these files and directories from now on, and no others.
    ///
    /// # Errors
    /// A directory cannot be watched; the others are.
    pub fn set(&mut self, paths: &[PathBuf]) -> notify::Result<()> {
        let mut wanted = Wanted::default();
        for path in paths {
            let path = std::path::absolute(path)?;
            let mut trail = trail(&path);
            if let Some(last) = trail.last()
                && last.is_dir()
            {
                wanted.directories.insert(last.clone());
            }
            wanted.entries.append(&mut trail.drain(..).collect());
        }
        let parents = wanted.entries.iter().filter_map(|path| path.parent().map(Path::to_owned));
        let directories: BTreeSet<_> = parents.chain(wanted.directories.iter().cloned()).collect();
        *self.wanted.lock().unwrap_or_else(PoisonError::into_inner) = wanted;
        for gone in self.directories.difference(&directories) {
            // It may be deleted, and its watch with it.
            let _ = self.watcher.unwatch(gone);
        }
        let mut result = Ok(());
        // A directory that was replaced under its old name needs a new watch: set all of them anew.
        for directory in &directories {
            let watched = self.watcher.watch(directory, RecursiveMode::NonRecursive);
            result = result.and(watched.map_err(|e| e.add_path(directory.clone())));
        }
        self.directories = directories;
        result
    }

    /// Waits for a change, and then until the files have been quiet for a moment. May be dropped and called again:
    /// no change is lost.
    pub async fn changed(&self) {
        self.settled.notified().await;
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.settling.abort();
    }
}

impl Wanted {
    fn concerns(&self, event: &Event) -> bool {
        // Our own reading is no change. An overflow has no paths: anything may have changed.
        !matches!(event.kind, EventKind::Access(_))
            && (event.paths.is_empty()
                || event.need_rescan()
                || event.paths.iter().any(|path| {
                    self.entries.contains(path)
                        || (path.extension().is_some_and(|e| e == "toml")
                            && path.parent().is_some_and(|parent| self.directories.contains(parent)))
                }))
    }
}

/// Every link on the way to an absolute path, and the file at the end of it, as real paths of their directories.
fn trail(path: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut rest: Vec<PathBuf> = Vec::new();
    let push_all = |rest: &mut Vec<PathBuf>, path: &Path| {
        rest.extend(path.components().rev().map(|c| PathBuf::from(c.as_os_str())));
    };
    push_all(&mut rest, path);
    let mut here = PathBuf::from("/");
    while let Some(part) = rest.pop() {
        match part.components().next() {
            Some(Component::ParentDir) => {
                here.pop();
                continue;
            }
            Some(Component::Normal(name)) => here.push(name),
            Some(Component::RootDir) => {
                here = PathBuf::from("/");
                continue;
            }
            _ => continue,
        }
        if let Ok(target) = fs::read_link(&here)
            && found.len() < MAX_LINKS
        {
            found.push(here.clone());
            here.pop();
            push_all(&mut rest, &target);
        }
    }
    found.push(here);
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A directory of its own, removed at the end.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("preflightd-watch-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            fs::create_dir_all(&path).expect("a scratch directory");
            Self(path.canonicalize().expect("the scratch directory"))
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn follows_links_one_by_one() {
        let dir = Scratch::new("trail");
        let at = |name: &str| dir.0.join(name);
        fs::create_dir(at("..v1")).expect("mkdir");
        fs::write(at("..v1/config.toml"), "").expect("write");
        symlink("..v1", at("..data")).expect("link");
        symlink("..data/config.toml", at("config.toml")).expect("link");
        assert_eq!(trail(&at("config.toml")), [at("config.toml"), at("..data"), at("..v1/config.toml")]);
        symlink("loop", at("loop")).expect("link");
        assert!(trail(&at("loop")).len() <= MAX_LINKS + 1);
    }

    #[tokio::test]
    async fn sees_every_way_of_changing_a_file() {
        let dir = Scratch::new("changes");
        let at = |name: &str| dir.0.join(name);
        fs::create_dir(at("..v1")).expect("mkdir");
        fs::write(at("..v1/config.toml"), "a").expect("write");
        symlink("..v1", at("..data")).expect("link");
        symlink("..data/config.toml", at("config.toml")).expect("link");
        fs::create_dir(at("policies")).expect("mkdir");
        fs::write(at("plain.toml"), "a").expect("write");
        let mut watch = Watch::new().expect("inotify");
        let paths = [at("config.toml"), at("plain.toml"), at("policies")];
        watch.set(&paths).expect("watches");
        let changes: [(&str, &dyn Fn()); 5] = [
            ("edited in place", &|| fs::write(at("plain.toml"), "b").expect("write")),
            ("renamed over", &|| {
                fs::write(at("plain.toml~"), "c").expect("write");
                fs::rename(at("plain.toml~"), at("plain.toml")).expect("rename");
            }),
            ("link swapped as a ConfigMap's", &|| {
                fs::create_dir(at("..v2")).expect("mkdir");
                fs::write(at("..v2/config.toml"), "b").expect("write");
                symlink("..v2", at("..tmp")).expect("link");
                fs::rename(at("..tmp"), at("..data")).expect("rename");
            }),
            ("policy added", &|| fs::write(at("policies/a.toml"), "").expect("write")),
            ("policy removed", &|| fs::remove_file(at("policies/a.toml")).expect("remove")),
        ];
        for (name, change) in changes {
            change();
            let seen = timeout(Duration::from_secs(20), watch.changed()).await;
            assert!(seen.is_ok(), "{name}: not seen");
            watch.set(&paths).expect("watches");
        }
    }

    #[test]
    fn neighbours_and_reading_are_no_changes() {
        let wanted = Wanted {
            entries: [PathBuf::from("/etc/p.toml")].into(),
            directories: [PathBuf::from("/etc/d")].into(),
        };
        let event = |kind: EventKind, path: &str| Event::new(kind).add_path(path.into());
        let modify = EventKind::Modify(notify::event::ModifyKind::Any);
        let access = EventKind::Access(notify::event::AccessKind::Read);
        for (path, kind, want) in [
            ("/etc/p.toml", modify, true),
            ("/etc/p.toml", access, false),
            ("/etc/passwd", modify, false),
            ("/etc/d/a.toml", modify, true),
            ("/etc/d/a.txt", modify, false),
        ] {
            assert_eq!(wanted.concerns(&event(kind, path)), want, "{path} {kind:?}");
        }
    }
}
