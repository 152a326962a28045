use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use dunlin_link::LinkStatus;
use dunlin_link::guest::{Device, GuestLink};
use dunlin_link::host::{Endpoint, HostLink};
use serde_json::json;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

/// A machine with a real link, whose guest does what a kernel does when it mounts: dials, agrees on a
/// version, attaches.
struct Fake {
    _directory: TempDir,
    guest: GuestLink,
    host: HostLink,
    next_port: AtomicU32,
    has_9p: bool,
    /// Refuse what is asked next.
    refuses: AtomicBool,
    asked: Mutex<Vec<String>>,
}

impl Fake {
    async fn up() -> Fake {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("link.sock");
        let guest = GuestLink::spawn(Device::UnixListener { path: socket.clone() });
        let host = HostLink::connect(Endpoint::VirtioSerial { socket }).await.unwrap();
        host.start();
        let mut status = guest.status();
        let up = status.wait_for(|status| matches!(status, LinkStatus::Up { .. }));
        tokio::time::timeout(Duration::from_secs(10), up).await.unwrap().unwrap();
        Fake {
            _directory: directory,
            guest,
            host,
            next_port: AtomicU32::new(0x4000_0001),
            has_9p: true,
            refuses: AtomicBool::new(false),
            asked: Mutex::default(),
        }
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }

    async fn attach(&self, port: u32, name: &str) -> bool {
        let Ok(mut stream) = self.guest.dial(port).await else { return false };
        let string =
            |text: &str| [&u16::try_from(text.len()).unwrap().to_le_bytes()[..], text.as_bytes()].concat();
        let version = [&[100u8, 255, 255][..], &65_536u32.to_le_bytes(), &string("9P2000.L")].concat();
        let attach = [
            &[104u8, 1, 0][..],
            &0u32.to_le_bytes(),
            &u32::MAX.to_le_bytes(),
            &string("root"),
            &string(name),
            &0u32.to_le_bytes(),
        ]
        .concat();
        let mut kinds = Vec::new();
        for message in [version, attach] {
            stream.write_u32_le(u32::try_from(message.len() + 4).unwrap()).await.unwrap();
            stream.write_all(&message).await.unwrap();
            let size = usize::try_from(stream.read_u32_le().await.unwrap()).unwrap();
            let mut answer = vec![0; size - 4];
            stream.read_exact(&mut answer).await.unwrap();
            kinds.push(answer[0]);
        }
        kinds == [101, 105]
    }
}

impl Machine for Fake {
    fn has_9p(&self) -> bool {
        self.has_9p
    }

    fn listen(&self) -> Result<PortListener, VmError> {
        Ok(self.host.listen(self.next_port.fetch_add(1, Ordering::Relaxed))?)
    }

    async fn modify(&self, what: &Modification) -> Result<(), VmError> {
        let Resource::MappedDirectory(directory) = &what.resource else { panic!("{what:?}") };
        self.asked.lock().unwrap().push(format!("{:?} {}", what.request_type, directory.mount_path));
        if self.refuses.swap(false, Ordering::Relaxed) {
            return Err(VmError::Ended { report: "refused by the test".into() });
        }
        if directory.port != 0 {
            assert!(self.attach(u32::try_from(directory.port).unwrap(), &directory.share_name).await);
        }
        Ok(())
    }
}

fn bind(source: &std::path::Path, destination: &str, option: &str) -> Value {
    json!({"type": "bind", "source": source.to_str().unwrap(), "destination": destination, "options": ["rbind", option]})
}

#[tokio::test]
async fn the_mounts_of_two_containers_become_one_share_and_go_with_the_last() {
    let (machine, shares) = (Fake::up().await, Shares::default());
    let dir = tempfile::tempdir().unwrap();
    let proc = json!({"type": "proc", "source": "proc", "destination": "/proc"});
    let mut one = vec![proc.clone(), bind(dir.path(), "/data", "ro")];
    let first = shares.share_mounts(&machine, "web", &mut one, &BTreeMap::new()).await.unwrap();
    assert_eq!(one[0], proc);
    assert_eq!(one[1]["source"], "/run/mounts/plan9/0");
    assert_eq!(one[1]["options"], json!(["rbind", "ro"]));
    let mut two = vec![bind(dir.path(), "/data", "rw")];
    let second = shares.share_mounts(&machine, "db", &mut two, &BTreeMap::new()).await.unwrap();
    assert_eq!(two[0]["source"], "/run/mounts/plan9/0");
    assert_eq!(machine.asked(), ["Add /run/mounts/plan9/0"], "mounted once");
    assert!(!shares.owned().served.values().next().unwrap().rules.get().read_only, "widened while served");
    let tie = shares.check_migratable().unwrap_err().to_string();
    assert!(tie.contains(dir.path().to_str().unwrap()) && tie.contains("/data"), "{tie}");

    shares.release(&machine, &first).await.unwrap();
    assert!(machine.asked().is_empty());
    shares.release(&machine, &second).await.unwrap();
    assert_eq!(machine.asked(), ["Remove /run/mounts/plan9/0"]);
    shares.check_migratable().unwrap();
    tokio::task::yield_now().await;
    assert!(machine.guest.dial(0x4000_0001).await.is_err(), "nobody listens any more");
    // The same directory again is another share.
    shares
        .share_mounts(&machine, "web", &mut [bind(dir.path(), "/data", "ro")], &BTreeMap::new())
        .await
        .unwrap();
    assert_eq!(machine.asked(), ["Add /run/mounts/plan9/1"]);
}

#[tokio::test]
async fn a_file_is_a_share_of_its_directory_that_shows_it_alone() {
    let (machine, shares) = (Fake::up().await, Shares::default());
    let dir = tempfile::tempdir().unwrap();
    for name in ["one", "two", "three"] {
        fs::write(dir.path().join(name), name).unwrap();
    }
    let mut mounts =
        vec![bind(&dir.path().join("one"), "/a", "ro"), bind(&dir.path().join("two"), "/b", "ro")];
    shares.share_mounts(&machine, "web", &mut mounts, &BTreeMap::new()).await.unwrap();
    assert_eq!(mounts[0]["source"], "/run/mounts/plan9/0/one");
    assert_eq!(mounts[1]["source"], "/run/mounts/plan9/0/two");
    let rules = shares.owned().served.values().next().unwrap().rules.get();
    assert_eq!(rules.allowed, Some(["one".to_owned(), "two".to_owned()].into()));
    assert!(rules.read_only);
}

#[tokio::test]
async fn what_cannot_be_shared_is_refused_by_name_and_leaves_nothing() {
    let (mut machine, shares) = (Fake::up().await, Shares::default());
    shares.heed(&[(READ_ONLY_SHARES.to_owned(), "TRUE".to_owned())].into());
    assert!(shares.read_only());
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("sock");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let good = bind(dir.path(), "/good", "ro");
    for (bad, word) in [
        (bind(&dir.path().join("none"), "/x", "ro"), "create it"),
        (bind(&socket, "/x", "ro"), "neither a directory"),
        (bind(dir.path(), "/x", "rw"), "`ro`"),
        (bind(std::path::Path::new("relative"), "/x", "ro"), "absolute"),
    ] {
        let mut mounts = vec![good.clone(), bad];
        let error = shares
            .share_mounts(&machine, "web", &mut mounts, &BTreeMap::new())
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains("/x") && error.contains(word), "{error}");
        shares.check_migratable().unwrap();
        assert!(shares.owned().served.is_empty());
    }
    machine.asked();
    machine.refuses = AtomicBool::new(true);
    let error =
        shares.share_mounts(&machine, "web", &mut [good.clone()], &BTreeMap::new()).await.unwrap_err();
    assert!(matches!(error, Plan9Error::Machine { .. }), "{error}");
    shares.check_migratable().unwrap();
    // A refusal breaks nothing for the next one.
    shares.share_mounts(&machine, "web", &mut [good.clone()], &BTreeMap::new()).await.unwrap();

    machine.has_9p = false;
    let error =
        shares.share_mounts(&machine, "db", &mut [good], &BTreeMap::new()).await.unwrap_err().to_string();
    assert!(error.contains("/good") && error.contains("KERNEL=generic"), "{error}");
}

#[tokio::test]
async fn a_release_that_the_guest_refuses_still_frees_the_directory() {
    let (machine, shares) = (Fake::up().await, Shares::default());
    let dir = tempfile::tempdir().unwrap();
    let held = shares
        .share_mounts(&machine, "web", &mut [bind(dir.path(), "/d", "rw")], &BTreeMap::new())
        .await
        .unwrap();
    machine.refuses.store(true, Ordering::Relaxed);
    assert!(shares.release(&machine, &held).await.is_err());
    shares.check_migratable().unwrap();
    let held = shares
        .share_mounts(&machine, "web", &mut [bind(dir.path(), "/d", "rw")], &BTreeMap::new())
        .await
        .unwrap();
    shares.forget(&held).unwrap();
    shares.check_migratable().unwrap();
    assert!(matches!(shares.forget(&held), Err(Plan9Error::Unknown(_))));
}

#[test]
fn the_guests_own_sources_are_no_shares() {
    let mount = |source: &str| bind(std::path::Path::new(source), "/d", "ro");
    for own in ["sandbox://a", "sandbox-tmp://shm", "uvm:///x"] {
        assert!(!is_host_share(&mount(own)), "{own}");
    }
    assert!(is_host_share(&mount("/srv")) && is_host_share(&mount("/run/mounts/plan9/0")));
    assert!(!is_host_share(&json!({"type": "tmpfs", "source": "tmpfs", "destination": "/t"})));
    assert!(is_host_share(
        &json!({"type": "none", "source": "/srv", "destination": "/t", "options": ["rbind"]})
    ));
}
