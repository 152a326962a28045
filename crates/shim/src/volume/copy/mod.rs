//! Copies of this host's files in the guest, and how they follow their sources.
//!
//! ```text
//! Copies::make ── scan ──> put ──> guest            before the container is created
//!        follow ── watch ──> scan ──> put           from then on, one task a machine
//! ```
//!
//! In a move the source stops following when its table is frozen and goes on when it is freed. The content goes along in the
//! guest's memory; the destination is told the copies' places ([`Copies::place`]), and compares with its own files once the
//! machine runs there.
//!
//! Invariants: nothing is put while the table is held; what is put was one state of the source; a copy whose source is gone
//! or has grown too large keeps its last content.

mod follow;
mod put;
mod scan;
mod watch;

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dunlin_bridge::message::{ENTRIES_MAX, FileEntry, FileOffset, FilesRoom, FilesStep};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::error::VolumeError;
use super::plan::Direction;
use super::walk::Limits;
use crate::vm::VmError;
pub(crate) use put::Guest;
use put::{PutError, Speed, put};
use scan::{Cache, Scan, ScanError, scan};
use watch::Touched;

/// How long a freeze waits for a message to the guest that is under way.
const FREEZE_DEADLINE: Duration = Duration::from_secs(10);
/// Readings until what was read is what the guest has.
const ATTEMPTS: u32 = 10;
/// How long a container's end waits for what it leaves to this host.
const BACK_DEADLINE: Duration = Duration::from_secs(5);

/// A mount that is a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Source {
    /// The guest's id of the container.
    pub(crate) container: String,
    /// In the container.
    pub(crate) destination: String,
    /// On this host.
    pub(crate) path: PathBuf,
    pub(crate) direction: Direction,
}

/// A sandbox's copies.
#[derive(Debug)]
pub(crate) struct Copies {
    shared: Arc<Shared>,
    /// Of which machine, and who follows for it.
    task: Mutex<Option<(usize, JoinHandle<()>)>>,
}

#[derive(Debug)]
struct Shared {
    table: Mutex<Table>,
    /// The table has another content.
    changed: Notify,
    /// Whoever puts has it.
    turn: tokio::sync::Mutex<()>,
    limits: Limits,
}

#[derive(Debug, Default)]
struct Table {
    /// Nothing is put.
    held: bool,
    /// By their places in the guest.
    copies: BTreeMap<String, Copy>,
}

#[derive(Debug)]
struct Copy {
    source: Source,
    known: Cache,
    /// What the guest shows; None: it has to be asked.
    shown: Option<Vec<FileEntry>>,
    /// When it is looked at next.
    due: Instant,
    /// And not before, whatever happens to it.
    not_before: Instant,
    /// The last warning about it: said once.
    warned: Option<String>,
}

/// The place of a container's copy in the guest; `number` tells its copies apart.
pub(crate) fn place(container: &str, number: usize) -> String {
    format!("/run/mounts/copies/{container}/{number}")
}

/// What of a copy's place a container is given.
pub(crate) fn tree(place: &str) -> String {
    format!("{place}/tree")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Copies {
    pub(crate) fn new(limits: Limits) -> Copies {
        let shared = Shared {
            table: Mutex::default(),
            changed: Notify::new(),
            turn: tokio::sync::Mutex::default(),
            limits,
        };
        Copies { shared: Arc::new(shared), task: Mutex::default() }
    }

    /// Makes a copy in the guest and fills it. It is followed from now on, once [`Copies::follow`] was called.
    pub(crate) async fn make<G: Guest>(
        &self,
        guest: &G,
        place: &str,
        source: Source,
    ) -> Result<(), VolumeError> {
        if !guest.takes_files() {
            return Err(VolumeError::OldGuest);
        }
        let named = || (source.path.display().to_string(), source.destination.clone());
        let refused = |error| {
            let (host, destination) = named();
            VolumeError::Guest { host, destination, source: Box::new(error) }
        };
        let entries = u32::try_from(ENTRIES_MAX).unwrap_or(u32::MAX);
        let room = FilesRoom { bytes: self.shared.limits.mount, entries };
        guest.files(place, FilesStep::Make(room)).await.map_err(refused)?;
        for _ in 0..ATTEMPTS {
            let (path, limits) = (source.path.clone(), self.shared.limits);
            let read = tokio::task::spawn_blocking(move || scan(&path, limits, &Cache::new())).await;
            let (host, destination) = named();
            let read = match read {
                Ok(Ok(read)) => read,
                Ok(Err(ScanError::Restless)) => continue,
                Ok(Err(ScanError::Unfit(why))) => {
                    return Err(VolumeError::NotCopied { host, destination, why });
                }
                Ok(Err(ScanError::Missing(reason))) => {
                    return Err(VolumeError::Missing { host, destination, reason });
                }
                Err(error) => {
                    return Err(VolumeError::Missing { host, destination, reason: error.to_string() });
                }
            };
            match put(guest, place, &read, Speed::AtOnce, || false).await {
                Ok(()) => {
                    self.shared.insert(place, source, Some(read));
                    return Ok(());
                }
                Err(PutError::Changed | PutError::Held) => {}
                Err(PutError::Guest(error)) => return Err(refused(error)),
            }
        }
        let (host, destination) = named();
        Err(VolumeError::Restless { host, destination })
    }

    /// Destination: a copy that came with the machine has this source here. The guest is asked what it has once the table is
    /// free.
    pub(crate) fn place(&self, place: &str, source: Source) {
        lock(&self.shared.table).held = true;
        self.shared.insert(place, source, None);
    }

    /// Follows the sources as long as the machine runs; the task of a machine before it ends.
    pub(crate) fn follow<G: Guest>(&self, guest: &Arc<G>) {
        if lock(&self.shared.table).copies.is_empty() {
            return;
        }
        let machine = Arc::as_ptr(guest).addr();
        let mut task = lock(&self.task);
        if task.as_ref().is_some_and(|(of, task)| *of == machine && !task.is_finished()) {
            return;
        }
        let following = tokio::spawn(follow::follow(Arc::clone(&self.shared), Arc::downgrade(guest)));
        if let Some((_, before)) = task.replace((machine, following)) {
            before.abort();
        }
    }

    /// Has the guest take a container's copies away, the container being gone. `places`: all that it may have of them. Goes
    /// on after a failure and gives the first.
    pub(crate) async fn remove<G: Guest>(
        &self,
        guest: &G,
        container: &str,
        places: Vec<String>,
    ) -> Result<(), VmError> {
        self.forget(container);
        let mut result = Ok(());
        for place in places {
            let removed = guest.files(&place, FilesStep::Remove).await.map(drop);
            if result.is_ok() {
                result = removed;
            }
        }
        result
    }

    /// A container's copies are gone with its machine.
    pub(crate) fn forget(&self, container: &str) {
        lock(&self.shared.table).copies.retain(|_, copy| copy.source.container != container);
        self.shared.changed.notify_one();
    }

    /// Nothing is put any more, and nothing is on its way. May be repeated.
    pub(crate) async fn freeze(&self) -> Result<(), VolumeError> {
        lock(&self.shared.table).held = true;
        let waited = tokio::time::timeout(FREEZE_DEADLINE, self.shared.turn.lock()).await;
        waited.map(drop).map_err(|_| VolumeError::Busy)
    }

    /// The copies follow again; each is looked at at once. May be repeated.
    pub(crate) fn resume(&self) {
        {
            let mut table = lock(&self.shared.table);
            if !std::mem::take(&mut table.held) {
                return;
            }
            let now = Instant::now();
            table.copies.values_mut().for_each(|copy| copy.due = now);
        }
        self.shared.changed.notify_one();
    }

    /// Writes to this host what a container that has ended leaves to it.
    pub(crate) async fn write_back<G: Guest>(&self, guest: &G, container: &str) {
        for (place, source) in self.shared.of_container(container, Direction::BackToHost) {
            let done = tokio::time::timeout(BACK_DEADLINE, self.write_one_back(guest, &place, &source)).await;
            let error = match done {
                Ok(Ok(())) => continue,
                Ok(Err(error)) => error,
                Err(_) => format!("the guest did not give it within {} s", BACK_DEADLINE.as_secs()),
            };
            let path = source.path.display();
            tracing::warn!(container, %path, error, "what the container left is not on this host");
        }
    }

    async fn write_one_back<G: Guest>(&self, guest: &G, place: &str, source: &Source) -> Result<(), String> {
        let mut content = Vec::new();
        loop {
            let step = FilesStep::Read(FileOffset { offset: content.len() as u64 });
            let part = guest.files(place, step).await.map_err(|error| error.to_string())?.data.0;
            if part.is_empty() {
                break;
            }
            content.extend(part);
            // The guest may send what it likes.
            if content.len() as u64 > self.shared.limits.file {
                content.truncate(usize::try_from(self.shared.limits.file).unwrap_or(usize::MAX));
                break;
            }
        }
        let path = source.path.clone();
        let written = tokio::task::spawn_blocking(move || write(&path, &content)).await;
        written.map_err(|error| error.to_string())?.map_err(|error| error.to_string())
    }
}

/// Into the file that is there: whoever wants to read it has made it.
fn write(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let mut options = std::fs::File::options();
    let mut file = options.write(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(std::io::Error::other("it is no regular file any more"));
    }
    file.set_len(0)?;
    file.write_all(content)
}

impl Drop for Copies {
    fn drop(&mut self) {
        if let Some((_, task)) = lock(&self.task).take() {
            task.abort();
        }
    }
}

impl Shared {
    fn insert(&self, place: &str, source: Source, read: Option<Scan>) {
        let (known, shown) = match read {
            Some(read) => (read.cache, Some(read.entries)),
            None => (Cache::new(), None),
        };
        let now = Instant::now();
        let copy = Copy { source, known, shown, due: now, not_before: now, warned: None };
        lock(&self.table).copies.insert(place.to_owned(), copy);
        self.changed.notify_one();
    }

    fn held(&self) -> bool {
        lock(&self.table).held
    }

    fn of(&self, place: &str) -> Option<(PathBuf, Cache, Limits)> {
        let table = lock(&self.table);
        let copy = table.copies.get(place).filter(|_| !table.held)?;
        Some((copy.source.path.clone(), copy.known.clone(), self.limits))
    }

    fn of_container(&self, container: &str, direction: Direction) -> Vec<(String, Source)> {
        let table = lock(&self.table);
        let wanted = |copy: &Copy| copy.source.container == container && copy.source.direction == direction;
        let found = table.copies.iter().filter(|(_, copy)| wanted(copy));
        found.map(|(place, copy)| (place.clone(), copy.source.clone())).collect()
    }

    fn next_due(&self) -> Option<Instant> {
        let table = lock(&self.table);
        let followed = table.copies.values().filter(|copy| copy.followed());
        if table.held { None } else { followed.map(|copy| copy.due).min() }
    }

    /// A copy whose look is due.
    fn take_due(&self, now: Instant) -> Option<String> {
        let table = lock(&self.table);
        if table.held {
            return None;
        }
        let due = table.copies.iter().find(|(_, copy)| copy.followed() && copy.due <= now);
        due.map(|(place, _)| place.clone())
    }

    fn looked(&self, place: &str, due: Instant, not_before: Instant) {
        if let Some(copy) = lock(&self.table).copies.get_mut(place) {
            (copy.due, copy.not_before) = (due, not_before);
        }
    }

    /// Looks come no later than `at`, and not too soon after the last.
    fn touch(&self, touched: &Touched, at: Instant) {
        let mut table = lock(&self.table);
        let meant = |place: &String| match touched {
            Touched::All => true,
            Touched::These(these) => these.contains(place),
        };
        for (_, copy) in table.copies.iter_mut().filter(|(place, _)| meant(place)) {
            copy.due = copy.due.min(at).max(copy.not_before);
        }
    }

    fn shows(&self, place: &str, entries: &[FileEntry]) -> bool {
        lock(&self.table).copies.get(place).is_some_and(|copy| copy.shown.as_deref() == Some(entries))
    }

    fn rested(&self, place: &str, read: Scan, put: bool) {
        let mut table = lock(&self.table);
        let Some(copy) = table.copies.get_mut(place) else { return };
        if put {
            tracing::info!(place, source = %copy.source.path.display(), "a copy follows its source");
        }
        copy.known = read.cache;
        copy.shown = Some(read.entries);
        copy.warned = None;
    }

    fn warn_once(&self, place: &str, warning: &str) {
        let mut table = lock(&self.table);
        let Some(copy) = table.copies.get_mut(place) else { return };
        if copy.warned.as_deref() != Some(warning) {
            let (source, destination) = (copy.source.path.display(), &copy.source.destination);
            tracing::warn!(%source, destination, warning, "a copy does not follow its source");
            copy.warned = Some(warning.to_owned());
        }
    }
}

impl Copy {
    fn followed(&self) -> bool {
        self.source.direction == Direction::ToGuest
    }
}

#[cfg(test)]
mod tests;
