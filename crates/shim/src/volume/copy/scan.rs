//! What a copy shall hold: a source read as one state that really was.
//!
//! A tree is changed while it is read, and kubelet swaps a whole one by a link. So everything is looked at twice, before the
//! contents are read and after; only what was the same both times counts.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use dunlin_bridge::message::{FileEntry, FileKind};
use sha2::{Digest, Sha256};

use super::super::walk::{Found, Kind, Limits, NotCopied, Stamp, WalkError, walk};

/// Readings until one comes to rest.
const ATTEMPTS: u32 = 10;
const PAUSE: Duration = Duration::from_millis(20);
/// A file that changed this recently may change again without a new time: its digest is not kept.
const RACY: Duration = Duration::from_secs(2);

/// A source could not be read.
#[derive(Debug)]
pub(super) enum ScanError {
    Unfit(NotCopied),
    Missing(String),
    /// It changed each time.
    Restless,
}

/// Digests of files that have not changed since.
pub(super) type Cache = HashMap<String, (Stamp, String)>;

/// A source, read.
#[derive(Debug, Default)]
pub(super) struct Scan {
    /// The root, links followed.
    pub(super) root: PathBuf,
    pub(super) entries: Vec<FileEntry>,
    pub(super) cache: Cache,
}

impl Scan {
    /// Where an entry lies on this host.
    pub(super) fn path(&self, entry: &FileEntry) -> PathBuf {
        if entry.path.is_empty() { self.root.clone() } else { self.root.join(&entry.path) }
    }

    /// Every directory of it, and the root in any case.
    pub(super) fn directories(&self) -> Vec<PathBuf> {
        let directories = self.entries.iter().filter(|entry| entry.kind == FileKind::Directory);
        directories.map(|entry| self.path(entry)).collect()
    }
}

/// Reads a source. Blocks.
pub(super) fn scan(source: &Path, limits: Limits, known: &Cache) -> Result<Scan, ScanError> {
    for attempt in 0..ATTEMPTS {
        if attempt > 0 {
            std::thread::sleep(PAUSE);
        }
        match once(source, limits, known) {
            Ok(Some(scan)) => return Ok(scan),
            Ok(None) => {}
            // Only when nothing is there at all it is not there.
            Err(error) if error.vanished() && source.exists() => {}
            Err(WalkError::Unfit(why)) => return Err(ScanError::Unfit(why)),
            Err(WalkError::Io { path, source }) => {
                return Err(ScanError::Missing(format!("{}: {source}", path.display())));
            }
        }
    }
    Err(ScanError::Restless)
}

/// None: it changed meanwhile.
fn once(source: &Path, limits: Limits, known: &Cache) -> Result<Option<Scan>, WalkError> {
    let at = |path: &Path| {
        let path = path.to_owned();
        move |source| WalkError::Io { path, source }
    };
    let root = fs::canonicalize(source).map_err(at(source))?;
    let now = SystemTime::now();
    let before = walk(&root, limits)?;
    let mut scan = Scan { root: root.clone(), ..Scan::default() };
    for found in &before {
        let kind = match &found.kind {
            Kind::Directory => FileKind::Directory,
            Kind::Link { target } => FileKind::Link { target: target.clone() },
            Kind::File => {
                let path = if found.path.is_empty() { root.clone() } else { root.join(&found.path) };
                let digest = match known.get(&found.path) {
                    Some((stamp, digest)) if *stamp == found.stamp => digest.clone(),
                    _ => match digest_of(&path, limits.file).map_err(at(&path))? {
                        Some((size, digest)) if size == found.stamp.size => digest,
                        _ => return Ok(None),
                    },
                };
                if settled(&found.stamp, now) {
                    scan.cache.insert(found.path.clone(), (found.stamp, digest.clone()));
                }
                FileKind::File { size: found.stamp.size, digest }
            }
        };
        scan.entries.push(entry(found, kind));
    }
    let same = fs::canonicalize(source).map_err(at(source))? == root && walk(&root, limits)? == before;
    Ok(same.then_some(scan))
}

fn entry(found: &Found, kind: FileKind) -> FileEntry {
    let (mtime, nanos) = found.stamp.modified;
    FileEntry {
        path: found.path.clone(),
        kind,
        mode: found.stamp.mode,
        uid: found.stamp.uid,
        gid: found.stamp.gid,
        mtime,
        mtime_nanos: u32::try_from(nanos).unwrap_or(0),
    }
}

fn settled(stamp: &Stamp, now: SystemTime) -> bool {
    let (seconds, _) = stamp.changed.max(stamp.modified);
    let Ok(seconds) = u64::try_from(seconds) else { return true };
    now.duration_since(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)).is_ok_and(|age| age > RACY)
}

/// Size and digest; None when it has grown beyond `most`.
fn digest_of(path: &Path, most: u64) -> io::Result<Option<(u64, String)>> {
    let mut file = open(path)?.take(most + 1);
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 64 * 1024];
    let mut size = 0u64;
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        hash.update(&buffer[..read]);
        size += read as u64;
    }
    Ok((size <= most).then(|| (size, hex(&hash.finalize()))))
}

/// The content of an entry, when it is still what was read.
pub(super) fn content(path: &Path, size: u64, digest: &str) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    open(path)?.take(size + 1).read_to_end(&mut bytes)?;
    Ok((bytes.len() as u64 == size && hex(&Sha256::digest(&bytes)) == digest).then_some(bytes))
}

/// Never waits, and never leads elsewhere: what was a file may be a FIFO or a link by now.
fn open(path: &Path) -> io::Result<File> {
    let file = File::options().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::ErrorKind::InvalidData.into()) }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
    use std::time::Instant;

    use super::*;

    const LIMITS: Limits = Limits { file: 1 << 20, mount: 1 << 24 };

    #[test]
    fn a_digest_is_kept_only_of_what_has_settled() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a"), "one").unwrap();
        let first = scan(dir.path(), LIMITS, &Cache::new()).unwrap();
        assert!(first.cache.is_empty(), "it was written just now");
        let old = SystemTime::now() - Duration::from_secs(60);
        let stamp = Stamp::of(&fs::metadata(dir.path().join("a")).unwrap());
        assert!(!settled(&stamp, SystemTime::now()));
        assert!(settled(&stamp, SystemTime::now() + Duration::from_secs(60)));
        assert!(!settled(&stamp, old), "a time that is to come is no reason to trust");
        // What is known is believed while the stamp is the same.
        let known = Cache::from([("a".to_owned(), (stamp, "f".repeat(64)))]);
        let again = scan(dir.path(), LIMITS, &known).unwrap();
        assert!(matches!(&again.entries[1].kind, FileKind::File { digest, .. } if *digest == "f".repeat(64)));
        fs::write(dir.path().join("a"), "other").unwrap();
        let changed = scan(dir.path(), LIMITS, &known).unwrap();
        assert!(
            matches!(&changed.entries[1].kind, FileKind::File { size: 5, digest } if *digest != "f".repeat(64))
        );
    }

    #[test]
    fn content_is_given_only_as_it_was_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs::write(&path, "one").unwrap();
        let (size, digest) = digest_of(&path, 10).unwrap().unwrap();
        assert_eq!(content(&path, size, &digest).unwrap().unwrap(), b"one");
        fs::write(&path, "two").unwrap();
        assert_eq!(content(&path, size, &digest).unwrap(), None);
        fs::remove_file(&path).unwrap();
        symlink("/etc/passwd", &path).unwrap();
        assert!(content(&path, size, &digest).is_err(), "it leads elsewhere");
        assert_eq!(digest_of(Path::new("/etc/passwd"), 1).unwrap(), None);
    }

    /// kubelet's updates, as fast as they go: no scan has a link to a directory that it does not have, or two files of
    /// different updates.
    #[test]
    fn a_scan_is_never_torn() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().to_owned();
        let update = |round: u32| {
            let name = format!("..{round}");
            fs::create_dir(root.join(&name)).unwrap();
            for file in ["a", "b"] {
                fs::write(root.join(&name).join(file), format!("round {round}")).unwrap();
            }
            symlink(&name, root.join("..tmp")).unwrap();
            fs::rename(root.join("..tmp"), root.join("..data")).unwrap();
            if let Some(before) = round.checked_sub(1) {
                fs::remove_dir_all(root.join(format!("..{before}"))).unwrap();
            }
        };
        update(0);
        let done = Arc::new(AtomicBool::new(false));
        let whole = Arc::new(AtomicU32::new(0));
        let (source, over, counted) = (root.clone(), Arc::clone(&done), Arc::clone(&whole));
        let scanning = std::thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                let Ok(scan) = scan(&source, LIMITS, &Cache::new()) else { continue };
                let of = |path: &str| scan.entries.iter().find(|entry| entry.path == path);
                let Some(FileKind::Link { target }) = of("..data").map(|entry| &entry.kind) else {
                    panic!("no link: {:?}", scan.entries)
                };
                let [a, b] = ["a", "b"].map(|file| of(&format!("{target}/{file}")).map(|entry| &entry.kind));
                assert!(a.is_some() && a == b, "{a:?} {b:?}");
                counted.fetch_add(1, Ordering::Relaxed);
            }
        });
        let (mut round, since) = (0, Instant::now());
        // On a busy machine no scan may have found the time between two updates yet: they come slower and
        // slower then.
        while round < 299 || (whole.load(Ordering::Relaxed) == 0 && since.elapsed() < Duration::from_secs(30))
        {
            round += 1;
            update(round);
            std::thread::sleep(Duration::from_millis(u64::from(round % 4 + round.saturating_sub(299))));
        }
        done.store(true, Ordering::Relaxed);
        scanning.join().unwrap();
        assert!(whole.load(Ordering::Relaxed) > 0, "no scan came to rest");
    }
}
