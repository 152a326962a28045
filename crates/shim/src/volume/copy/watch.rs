//! Which sources were touched: inotify where the host has some left, looking again and again elsewhere.

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use tokio::io::unix::AsyncFd;

/// How often sources are looked at of which nobody tells.
const UNTOLD: Duration = Duration::from_secs(1);
/// How often the others are, for what inotify does not tell (a network file system's other clients).
const TOLD: Duration = Duration::from_secs(15);

const WHAT: AddWatchFlags = AddWatchFlags::IN_MODIFY
    .union(AddWatchFlags::IN_ATTRIB)
    .union(AddWatchFlags::IN_CLOSE_WRITE)
    .union(AddWatchFlags::IN_MOVED_FROM)
    .union(AddWatchFlags::IN_MOVED_TO)
    .union(AddWatchFlags::IN_CREATE)
    .union(AddWatchFlags::IN_DELETE)
    .union(AddWatchFlags::IN_DELETE_SELF)
    .union(AddWatchFlags::IN_MOVE_SELF);

/// A watched source: all of some directories, and single names in others.
pub(super) type Wanted = BTreeSet<(PathBuf, Option<OsString>)>;

/// What of a copy's source is to be watched.
pub(super) fn wanted(source: &Path, root: &Path, directories: Vec<PathBuf>) -> Wanted {
    let mut wanted: Wanted = directories.into_iter().map(|path| (path, None)).collect();
    // What the source is called may become another thing, and a link on the way to it lead elsewhere.
    for path in [source, root] {
        if let (Some(parent), Some(name)) = (path.parent(), path.file_name()) {
            wanted.insert((parent.to_owned(), Some(name.to_owned())));
        }
    }
    wanted
}

/// Watches for a sandbox's copies; one a sandbox, since a host has few inotify instances.
#[derive(Debug)]
pub(super) struct Watcher {
    inotify: Option<(Inotify, AsyncFd<OwnedFd>)>,
    /// Which copies want to know of what.
    watches: HashMap<WatchDescriptor, Vec<(String, Option<OsString>)>>,
    /// What each copy has asked for, and whether all of it could be had.
    copies: HashMap<String, (Wanted, bool)>,
}

/// Who is to be looked at.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Touched {
    These(BTreeSet<String>),
    /// More happened than is told.
    All,
}

impl Watcher {
    /// Must be called in the runtime.
    pub(super) fn new() -> Watcher {
        let made = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC);
        let made = made.map_err(std::io::Error::from).and_then(|inotify| {
            use std::os::fd::AsFd;
            // The runtime waits on a descriptor of its own for the same queue.
            let descriptor = inotify.as_fd().try_clone_to_owned()?;
            // SAFETY: an owned descriptor stays the same one as long as it lives.
            let waiting = unsafe { AsyncFd::register(descriptor) }.map_err(std::io::Error::from)?;
            Ok((inotify, waiting))
        });
        let inotify = match made {
            Ok(made) => Some(made),
            Err(error) => {
                tracing::warn!(%error, "no inotify: sources of copies are looked at each second");
                None
            }
        };
        Watcher { inotify, watches: HashMap::new(), copies: HashMap::new() }
    }

    /// How long a copy may go without a look.
    pub(super) fn patience(&self, copy: &str) -> Duration {
        if self.copies.get(copy).is_some_and(|(_, whole)| *whole) { TOLD } else { UNTOLD }
    }

    /// Watches this for a copy, and nothing else. True: something of it is new, so what happened to it before is not told.
    pub(super) fn watch(&mut self, copy: &str, wanted: Wanted) -> bool {
        if self.copies.get(copy).is_some_and(|(present, whole)| *whole && *present == wanted) {
            return false;
        }
        let had = self.forget_uses(copy);
        let Some((inotify, _)) = &self.inotify else { return false };
        let mut whole = true;
        for (path, name) in &wanted {
            match inotify.add_watch(path, WHAT) {
                Ok(watch) => self.watches.entry(watch).or_default().push((copy.to_owned(), name.clone())),
                // It went meanwhile, which its directory tells.
                Err(Errno::ENOENT) => {}
                Err(error) => {
                    if whole {
                        tracing::warn!(path = %path.display(), %error, "not watched; it is looked at each second");
                    }
                    whole = false;
                }
            }
        }
        self.copies.insert(copy.to_owned(), (wanted, whole));
        self.drop_unused(had);
        true
    }

    /// Nobody wants to know of it any more.
    pub(super) fn forget(&mut self, copy: &str) {
        let had = self.forget_uses(copy);
        self.copies.remove(copy);
        self.drop_unused(had);
    }

    /// The copies that are watched for.
    pub(super) fn watched(&self) -> Vec<String> {
        self.copies.keys().cloned().collect()
    }

    /// Waits until something is told; for ever without inotify. May be dropped at any time.
    pub(super) async fn touched(&mut self) -> Touched {
        loop {
            let Some((inotify, waiting)) = &self.inotify else { return std::future::pending().await };
            let Ok(mut ready) = waiting.readable().await else { return std::future::pending().await };
            let events = match inotify.read_events() {
                Ok(events) => events,
                Err(Errno::EAGAIN) => {
                    ready.clear_ready();
                    continue;
                }
                Err(error) => {
                    tracing::warn!(%error, "inotify cannot be read");
                    ready.clear_ready();
                    return Touched::All;
                }
            };
            let mut touched = BTreeSet::new();
            for event in events {
                if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
                    return Touched::All;
                }
                let uses = self.watches.get(&event.wd).into_iter().flatten();
                let meant =
                    uses.filter(|(_, name)| name.is_none() || event.name.is_none() || *name == event.name);
                touched.extend(meant.map(|(copy, _)| copy.clone()));
                if event.mask.contains(AddWatchFlags::IN_IGNORED) {
                    // The watch is gone with what it was on; the next look makes others.
                    for (copy, _) in self.watches.remove(&event.wd).into_iter().flatten() {
                        if let Some((_, whole)) = self.copies.get_mut(&copy) {
                            *whole = false;
                        }
                    }
                }
            }
            if !touched.is_empty() {
                return Touched::These(touched);
            }
        }
    }

    fn forget_uses(&mut self, copy: &str) -> Vec<WatchDescriptor> {
        let mut had = Vec::new();
        for (watch, uses) in &mut self.watches {
            let before = uses.len();
            uses.retain(|(user, _)| user != copy);
            if uses.len() < before {
                had.push(*watch);
            }
        }
        had
    }

    fn drop_unused(&mut self, watches: Vec<WatchDescriptor>) {
        for watch in watches {
            if self.watches.get(&watch).is_some_and(Vec::is_empty) {
                self.watches.remove(&watch);
                if let Some((inotify, _)) = &self.inotify {
                    // Gone by itself is as good.
                    let _ = inotify.rm_watch(watch);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// What is told, which a busy machine may do late.
    async fn told(watcher: &mut Watcher) -> Option<Touched> {
        tokio::time::timeout(Duration::from_secs(30), watcher.touched()).await.ok()
    }

    /// What is told though there is nothing to tell.
    async fn quiet(watcher: &mut Watcher) -> Option<Touched> {
        tokio::time::timeout(Duration::from_millis(300), watcher.touched()).await.ok()
    }

    #[tokio::test]
    async fn only_those_who_want_to_know_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        fs::create_dir(&one).unwrap();
        fs::write(&two, "x").unwrap();
        let mut watcher = Watcher::new();
        assert!(watcher.watch("one", wanted(&one, &one, vec![one.clone()])));
        assert!(watcher.watch("two", wanted(&two, &two, Vec::new())));
        assert!(!watcher.watch("two", wanted(&two, &two, Vec::new())), "as before");
        let only = |copy: &str| Some(Touched::These([copy.to_owned()].into()));
        fs::write(one.join("a"), "x").unwrap();
        assert_eq!(told(&mut watcher).await, only("one"));
        while quiet(&mut watcher).await.is_some() {}
        fs::write(&two, "y").unwrap();
        assert_eq!(told(&mut watcher).await, only("two"));
        while quiet(&mut watcher).await.is_some() {}
        fs::write(dir.path().join("neither"), "x").unwrap();
        assert_eq!(quiet(&mut watcher).await, None);
        watcher.forget("two");
        fs::write(&two, "z").unwrap();
        assert_eq!(quiet(&mut watcher).await, None);
        // Another directory of the same name.
        fs::rename(&one, dir.path().join("gone")).unwrap();
        assert_eq!(told(&mut watcher).await, only("one"));
    }
}
