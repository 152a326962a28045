//! Copies against a guest that is a table in memory.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::symlink;

use dunlin_bridge::message::{Base64, FileKind, FilesAnswer};
use sha2::{Digest, Sha256};

use super::*;
use crate::vm::VmError;

const LIMITS: Limits = Limits { file: 1 << 20, mount: 2 << 20 };
const PLACE: &str = "/run/mounts/copies/c/0";
const SOON: Duration = Duration::from_secs(30);

/// Shows what it is told, if it has all of it.
#[derive(Default)]
struct Shown {
    staged: HashMap<String, Vec<u8>>,
    shown: Vec<FileEntry>,
    contents: HashMap<String, Vec<u8>>,
    messages: u32,
    made: bool,
    removed: bool,
}

#[derive(Default)]
struct Fake(Mutex<Shown>);

impl Guest for Fake {
    fn takes_files(&self) -> bool {
        true
    }

    fn gone(&self) -> bool {
        false
    }

    async fn files(&self, place: &str, step: FilesStep) -> Result<FilesAnswer, VmError> {
        assert_eq!(place, PLACE);
        let mut fake = lock(&self.0);
        fake.messages += 1;
        let mut answer = FilesAnswer::default();
        match step {
            FilesStep::Make(_) => fake.made = true,
            FilesStep::Compare(list) => {
                answer.shown = fake.shown == list.entries;
                for (number, entry) in list.entries.iter().enumerate() {
                    if let FileKind::File { digest, .. } = &entry.kind
                        && !fake.contents.contains_key(digest)
                    {
                        answer.lacking.push(u32::try_from(number).unwrap());
                    }
                }
            }
            FilesStep::Stage(part) => {
                let staged = fake.staged.entry(part.digest).or_default();
                assert_eq!(staged.len() as u64, part.offset, "parts follow one another");
                assert!(part.data.0.len() <= STAGE_MAX_OF_TESTS);
                staged.extend(part.data.0);
            }
            FilesStep::Show(list) => {
                let staged: Vec<(String, Vec<u8>)> = fake.staged.drain().collect();
                for (digest, content) in staged {
                    let found: String = Sha256::digest(&content).iter().map(|b| format!("{b:02x}")).collect();
                    assert_eq!(found, digest, "a content is what it is called");
                    fake.contents.insert(digest, content);
                }
                fake.shown = list.entries;
            }
            FilesStep::Read(at) => {
                let content = fake.content("").unwrap_or_default();
                let from = usize::try_from(at.offset).unwrap().min(content.len());
                answer.data = Base64(content[from..].iter().copied().take(7).collect());
            }
            FilesStep::Directory(_) => panic!("no directory"),
            FilesStep::Remove => fake.removed = true,
        }
        Ok(answer)
    }
}

const STAGE_MAX_OF_TESTS: usize = dunlin_bridge::message::STAGE_MAX;

impl Shown {
    fn content(&self, path: &str) -> Option<Vec<u8>> {
        let entry = self.shown.iter().find(|entry| entry.path == path)?;
        match &entry.kind {
            FileKind::File { digest, .. } => self.contents.get(digest).cloned(),
            FileKind::Link { target } => Some(target.clone().into_bytes()),
            FileKind::Directory => None,
        }
    }
}

impl Fake {
    fn shows(&self, path: &str) -> Option<String> {
        lock(&self.0).content(path).map(|content| String::from_utf8(content).unwrap())
    }

    fn messages(&self) -> u32 {
        lock(&self.0).messages
    }

    async fn await_shown(&self, path: &str, content: Option<&str>) {
        let since = Instant::now();
        while self.shows(path).as_deref() != content {
            assert!(since.elapsed() < SOON, "{path:?} is {:?}, not {content:?}", self.shows(path));
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

fn source(path: &Path, direction: Direction) -> Source {
    Source { container: "c".into(), destination: "/data".into(), path: path.to_owned(), direction }
}

async fn copied(path: &Path) -> (Copies, Arc<Fake>) {
    let (copies, guest) = (Copies::new(LIMITS), Arc::new(Fake::default()));
    copies.make(guest.as_ref(), PLACE, source(path, Direction::ToGuest)).await.unwrap();
    copies.follow(&guest);
    (copies, guest)
}

#[tokio::test]
async fn a_copy_follows_files_links_and_removals() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::write(at("a"), "one").unwrap();
    let large = "0123456789".repeat(60_000);
    fs::write(at("large"), &large).unwrap();
    let (copies, guest) = copied(dir.path()).await;
    assert_eq!(
        (guest.shows("a"), guest.shows("large")),
        (Some("one".into()), Some(large)),
        "before anything runs"
    );
    fs::write(at("a"), "two").unwrap();
    guest.await_shown("a", Some("two")).await;
    fs::create_dir(at("sub")).unwrap();
    fs::write(at("sub/b"), "three").unwrap();
    guest.await_shown("sub/b", Some("three")).await;
    // In a directory that was not there when it began.
    fs::write(at("sub/b"), "four").unwrap();
    guest.await_shown("sub/b", Some("four")).await;
    symlink("sub/b", at("way")).unwrap();
    guest.await_shown("way", Some("sub/b")).await;
    fs::remove_file(at("a")).unwrap();
    guest.await_shown("a", None).await;
    copies.remove(guest.as_ref(), "c", vec![PLACE.to_owned()]).await.unwrap();
    assert!(lock(&guest.0).removed);
}

#[tokio::test]
async fn a_single_file_is_followed_when_another_takes_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    fs::write(&path, "one").unwrap();
    let (_copies, guest) = copied(&path).await;
    fs::write(dir.path().join("new"), "two").unwrap();
    fs::rename(dir.path().join("new"), &path).unwrap();
    guest.await_shown("", Some("two")).await;
    fs::write(&path, "three").unwrap();
    guest.await_shown("", Some("three")).await;
}

#[tokio::test]
async fn nothing_is_put_while_it_is_frozen() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    fs::write(&path, "one").unwrap();
    let (copies, guest) = copied(dir.path()).await;
    copies.freeze().await.unwrap();
    let before = guest.messages();
    fs::write(&path, "two").unwrap();
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(guest.messages(), before);
    copies.resume();
    guest.await_shown("a", Some("two")).await;
}

#[tokio::test]
async fn what_grows_too_large_or_goes_keeps_its_last_content() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    fs::write(&path, "one").unwrap();
    let (_copies, guest) = copied(dir.path()).await;
    fs::write(&path, vec![b'x'; (1 << 20) + 1]).unwrap();
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(guest.shows("a").as_deref(), Some("one"));
    fs::write(&path, "two").unwrap();
    guest.await_shown("a", Some("two")).await;
    fs::remove_dir_all(dir.path()).unwrap();
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(guest.shows("a").as_deref(), Some("two"));
    fs::create_dir(dir.path()).unwrap();
    fs::write(&path, "three").unwrap();
    // It is followed again.
    guest.await_shown("a", Some("three")).await;
}

#[tokio::test]
async fn what_arrives_is_compared_with_the_files_of_this_host() {
    let (there, here) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::write(there.path().join("a"), "there").unwrap();
    fs::write(here.path().join("a"), "here").unwrap();
    let (copies, guest) = copied(there.path()).await;
    copies.freeze().await.unwrap();
    let arrived = Copies::new(LIMITS);
    arrived.place(PLACE, source(here.path(), Direction::ToGuest));
    arrived.follow(&guest);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(guest.shows("a").as_deref(), Some("there"), "nothing before the machine runs here");
    arrived.resume();
    guest.await_shown("a", Some("here")).await;
    // Alike on both: one question, and nothing is put.
    let alike = Copies::new(LIMITS);
    let before = guest.messages();
    arrived.forget("c");
    alike.place(PLACE, source(here.path(), Direction::ToGuest));
    alike.follow(&guest);
    alike.resume();
    let since = Instant::now();
    while guest.messages() == before {
        assert!(since.elapsed() < SOON, "it does not ask");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(guest.messages(), before + 1);
}

#[tokio::test]
async fn what_a_container_leaves_goes_to_the_host_and_never_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    fs::write(&path, "").unwrap();
    let (copies, guest) = (Copies::new(LIMITS), Arc::new(Fake::default()));
    copies.make(guest.as_ref(), PLACE, source(&path, Direction::BackToHost)).await.unwrap();
    copies.follow(&guest);
    {
        let mut fake = lock(&guest.0);
        let FileKind::File { digest, .. } = fake.shown[0].kind.clone() else { panic!("a file") };
        fake.contents.insert(digest, b"why it ended".to_vec());
    }
    copies.write_back(guest.as_ref(), "another").await;
    assert_eq!(fs::read_to_string(&path).unwrap(), "");
    copies.write_back(guest.as_ref(), "c").await;
    assert_eq!(fs::read_to_string(&path).unwrap(), "why it ended");
    let before = guest.messages();
    fs::write(&path, "the host's").unwrap();
    tokio::time::sleep(Duration::from_millis(400)).await;
    assert_eq!(guest.messages(), before, "it is not followed");
    // What is no file any more is not written through.
    fs::remove_file(&path).unwrap();
    symlink(dir.path().join("elsewhere"), &path).unwrap();
    fs::write(dir.path().join("elsewhere"), "kept").unwrap();
    copies.write_back(guest.as_ref(), "c").await;
    assert_eq!(fs::read_to_string(dir.path().join("elsewhere")).unwrap(), "kept");
}
