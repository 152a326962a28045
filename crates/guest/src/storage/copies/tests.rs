//! A copy in a temporary directory, without its tmpfs: what it shows, and what is seen on the way.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use dunlin_bridge::message::{FileKind, FilesList};
use sha2::{Digest, Sha256};

use super::*;

fn entry(path: &str, kind: FileKind, mode: u32) -> FileEntry {
    // The owner is whoever runs the tests.
    let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
    FileEntry { path: path.to_owned(), kind, mode, uid, gid, mtime: 1_700_000_000, mtime_nanos: 5 }
}

pub(super) fn directory(path: &str) -> FileEntry {
    entry(path, FileKind::Directory, 0o755)
}

fn digest(content: &str) -> String {
    Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(super) fn file(path: &str, content: &str) -> FileEntry {
    entry(path, FileKind::File { size: content.len() as u64, digest: digest(content) }, 0o644)
}

pub(super) fn link(path: &str, target: &str) -> FileEntry {
    entry(path, FileKind::Link { target: target.to_owned() }, 0o777)
}

/// A copy at a place of the test's own.
struct Copied {
    copies: Copies,
    path: PathBuf,
    _directory: tempfile::TempDir,
}

impl Copied {
    fn new() -> Copied {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("copy");
        fs::create_dir_all(path.join("stage")).unwrap();
        let room = FilesRoom { bytes: 1 << 20, entries: 100 };
        let copies = Copies::default();
        let copy = Copy { room, shown: Vec::new() };
        lock(&copies.table).insert(path.clone(), Arc::new(Mutex::new(copy)));
        Copied { copies, path, _directory: directory }
    }

    fn tree(&self, path: &str) -> PathBuf {
        self.path.join("tree").join(path)
    }

    fn compare(&self, entries: &[FileEntry]) -> (bool, Vec<u32>) {
        let copy = self.copies.find(&self.path).unwrap();
        let copy = lock(&copy);
        (copy.shown == entries, show::lacking(&self.path.join("stage"), &copy.shown, entries))
    }

    /// All contents staged that are lacking, then shown.
    fn put(&self, entries: &[FileEntry], contents: &[&str]) -> Vec<u32> {
        let (_, lacking) = self.compare(entries);
        for content in contents {
            let part =
                FilePart { digest: digest(content), offset: 0, data: Base64(content.as_bytes().into()) };
            stage(&self.path.join("stage"), &part).unwrap();
        }
        self.show(entries).unwrap();
        lacking
    }

    fn show(&self, entries: &[FileEntry]) -> Result<(), StorageError> {
        let copy = self.copies.find(&self.path).unwrap();
        let mut copy = lock(&copy);
        list::check(entries, copy.room)?;
        show_in(&self.path, &mut copy, entries.to_vec())
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.tree(path)).unwrap()
    }
}

#[test]
fn a_tree_is_shown_with_modes_times_and_links() {
    let copied = Copied::new();
    let list = [
        directory(""),
        entry("secret", FileKind::Directory, 0o700),
        entry("secret/key", FileKind::File { size: 3, digest: digest("key") }, 0o400),
        file("same", "key"),
        link("way", "secret/key"),
    ];
    assert_eq!(copied.put(&list, &["key"]), [2], "each content is wanted once");
    assert_eq!(
        (copied.read("secret/key"), copied.read("same"), copied.read("way")),
        ("key".into(), "key".into(), "key".into())
    );
    let meta = |path: &str| fs::symlink_metadata(copied.tree(path)).unwrap();
    assert_eq!((meta("secret").mode() & 0o7777, meta("secret/key").mode() & 0o7777), (0o700, 0o400));
    for path in ["", "secret", "secret/key", "same", "way"] {
        assert_eq!((meta(path).mtime(), meta(path).mtime_nsec()), (1_700_000_000, 5), "{path}");
    }
    assert_eq!(fs::read_link(copied.tree("way")).unwrap(), Path::new("secret/key"));
    assert_eq!(copied.compare(&list), (true, vec![]));
    assert_eq!(fs::read_dir(copied.path.join("stage")).unwrap().count(), 0, "the stage is empty again");
}

#[test]
fn contents_change_places_and_things_change_their_kind() {
    let copied = Copied::new();
    copied.put(
        &[directory(""), file("a", "one"), file("b", "two"), directory("c"), file("c/d", "x")],
        &["one", "two", "x"],
    );
    // Nothing is staged: all of it is there already, elsewhere.
    let list =
        [directory(""), file("a", "two"), directory("b"), file("b/e", "one"), file("c", "x"), link("f", "a")];
    assert_eq!(copied.put(&list, &[]), Vec::<u32>::new());
    assert_eq!(
        (copied.read("a"), copied.read("b/e"), copied.read("c"), copied.read("f")),
        ("two".into(), "one".into(), "x".into(), "two".into())
    );
    copied.put(&[directory(""), file("f", "two")], &[]);
    let left: Vec<_> =
        fs::read_dir(copied.tree("")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["f"]);
}

#[test]
fn a_content_that_is_another_is_not_shown() {
    let copied = Copied::new();
    copied.put(&[directory(""), file("a", "one")], &["one"]);
    let part = FilePart { digest: digest("two"), offset: 0, data: Base64(b"eww".into()) };
    stage(&copied.path.join("stage"), &part).unwrap();
    let error = copied.show(&[directory(""), file("a", "two")]).unwrap_err().to_string();
    assert!(error.contains("stage it again"), "{error}");
    assert_eq!(copied.read("a"), "one");
    assert_eq!(copied.compare(&[directory(""), file("a", "one")]), (true, vec![]));
    copied.put(&[directory(""), file("a", "two")], &["two"]);
    assert_eq!(copied.read("a"), "two");
}

#[test]
fn parts_follow_one_another() {
    let copied = Copied::new();
    let at = copied.path.join("stage");
    let part = |offset, data: &[u8]| FilePart { digest: digest("abcd"), offset, data: Base64(data.into()) };
    stage(&at, &part(0, b"abx")).unwrap();
    // From the beginning again.
    stage(&at, &part(0, b"ab")).unwrap();
    assert!(matches!(stage(&at, &part(3, b"d")), Err(StorageError::BadPart(_))));
    stage(&at, &part(2, b"cd")).unwrap();
    copied.show(&[file("", "abcd")]).unwrap();
    assert_eq!(fs::read_to_string(copied.path.join("tree")).unwrap(), "abcd");
    let bad = FilePart { digest: "../../x".into(), ..part(0, b"") };
    assert!(matches!(stage(&at, &bad), Err(StorageError::BadPart(_))));
}

#[test]
fn a_single_file_keeps_being_the_same_file() {
    let copied = Copied::new();
    let tree = copied.path.join("tree");
    copied.put(&[file("", "a longer content")], &["a longer content"]);
    // As a container has it mounted.
    let (open, inode) = (File::open(&tree).unwrap(), fs::metadata(&tree).unwrap().ino());
    copied.put(&[file("", "short")], &["short"]);
    assert_eq!(fs::metadata(&tree).unwrap().ino(), inode);
    let mut seen = vec![0; 100];
    let length = open.read_at(&mut seen, 0).unwrap();
    assert_eq!(&seen[..length], b"short");
    assert_eq!(read(&tree, 2).unwrap(), b"ort");
    assert_eq!(read(&tree, 5).unwrap(), b"");
}

/// What kubelet does: a new directory, the link `..data` swapped to it, the old one gone. A reader that goes through the
/// link never finds one file of one update and another of the next.
#[test]
fn a_swap_of_links_is_never_seen_half_done() {
    let copied = Arc::new(Copied::new());
    let of = |round: u32| {
        let (dir, content) = (format!("..{round}"), format!("round {round}"));
        let list = [
            directory(""),
            directory(&dir),
            file(&format!("{dir}/a"), &content),
            file(&format!("{dir}/b"), &content),
            link("..data", &dir),
            link("a", "..data/a"),
            link("b", "..data/b"),
        ];
        (list, content)
    };
    let (list, content) = of(0);
    copied.put(&list, &[&content]);
    let done = Arc::new(AtomicBool::new(false));
    let updates = Arc::new(AtomicUsize::new(0));
    let reader = {
        let (copied, done, updates) = (Arc::clone(&copied), Arc::clone(&done), Arc::clone(&updates));
        std::thread::spawn(move || {
            let mut seen = HashSet::new();
            while !done.load(Ordering::Relaxed) {
                // One directory for both, as a program does that opens `..data` once.
                let data =
                    copied.tree("").join(fs::read_link(copied.tree("..data")).expect("the link is there"));
                let both = [data.join("a"), data.join("b")].map(fs::read_to_string);
                match both {
                    [Ok(a), Ok(b)] => {
                        assert_eq!(a, b, "a torn update");
                        assert!(a.starts_with("round "), "{a:?}");
                        seen.insert(a);
                        updates.store(seen.len(), Ordering::Relaxed);
                    }
                    // The old directory went meanwhile, as on any host.
                    [a, b] => {
                        for error in [a, b].into_iter().filter_map(Result::err) {
                            assert_eq!(error.kind(), io::ErrorKind::NotFound);
                        }
                    }
                }
            }
        })
    };
    let (mut round, since) = (0, Instant::now());
    // On a busy machine the reader may not have had its turn yet.
    while round < 199 || (updates.load(Ordering::Relaxed) < 2 && since.elapsed() < Duration::from_secs(30)) {
        round += 1;
        let (list, content) = of(round);
        copied.put(&list, &[&content]);
    }
    done.store(true, Ordering::Relaxed);
    reader.join().unwrap();
    assert!(updates.load(Ordering::Relaxed) > 1, "the reader saw nothing change");
    assert_eq!(copied.read("a"), format!("round {round}"));
}

#[test]
fn files_have_places_of_their_own() {
    let copies = Copies::default();
    let room = FilesRoom { bytes: 1, entries: 1 };
    for place in ["/etc", "/run/mounts/scsi/0_0_0", "/run/mounts/copies", "/run/gcs/pods/a/a/rootfs/etc"] {
        assert!(copies.step(place, FilesStep::Make(room)).is_err(), "{place}");
        assert!(copies.step(place, FilesStep::Remove).is_err(), "{place}");
    }
    let disk = PodDirectory { mode: 0o777, uid: 0, gid: 0, memory_bytes: None };
    let memory = PodDirectory { memory_bytes: Some(1 << 20), ..disk };
    for (place, directory) in [
        ("/run/gcs/pods/a/a/rootfs", disk),
        ("/run/mounts/empty-dir/a/b", disk),
        ("/run/gcs/pods/a/a/empty-dir/b", memory),
        ("/run/mounts/copies/empty-dir/b", disk),
        ("/run/mounts/empty-dir", memory),
    ] {
        let error = copies.step(place, FilesStep::Directory(directory)).unwrap_err();
        assert!(matches!(error, StorageError::NotForFiles(_)), "{place}: {error}");
    }
    let list = FilesList { entries: vec![directory("")] };
    let missing = copies.step("/run/mounts/copies/c/0", FilesStep::Show(list)).unwrap_err();
    assert!(matches!(missing, StorageError::NoCopy(_)), "{missing}");
}
