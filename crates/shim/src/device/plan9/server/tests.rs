use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use nix::errno::Errno;
use tempfile::TempDir;

use super::*;
use crate::device::plan9::rules::Config;

const READ_WRITE: i32 = libc::O_RDWR;

/// A client that speaks to a session without a stream.
struct Client {
    session: Session,
    tag: u16,
}

type Answer = Result<Vec<u8>, Errno>;

impl Client {
    fn of(directory: &TempDir, config: Config) -> Client {
        let root = Root::open(directory.path()).unwrap();
        let mut client =
            Client { session: Session::new(root.0, "7".into(), Rules::new(config)).unwrap(), tag: 0 };
        let version = client.ask(100, &[&8192u32.to_le_bytes(), &string("9P2000.L")]).unwrap();
        assert_eq!(version, [&8192u32.to_le_bytes()[..], &string("9P2000.L")].concat());
        client.attach(0, "7", 0).unwrap();
        client
    }

    fn writable(directory: &TempDir) -> Client {
        Client::of(directory, Config { read_only: false, allowed: None })
    }

    /// Sends a request, gives the answer's body.
    fn ask(&mut self, kind: u8, parts: &[&[u8]]) -> Answer {
        self.tag += 1;
        let frame = [&[kind][..], &self.tag.to_le_bytes(), &parts.concat()].concat();
        let answer = self.session.answer(&frame).unwrap();
        assert_eq!(answer[..4], u32::try_from(answer.len()).unwrap().to_le_bytes());
        assert_eq!(answer[5..7], self.tag.to_le_bytes());
        if answer[4] == 7 {
            let number = i32::from_le_bytes(answer[7..11].try_into().unwrap());
            return Err(Errno::from_raw(number));
        }
        assert_eq!(answer[4], kind + 1);
        Ok(answer[7..].to_vec())
    }

    fn attach(&mut self, fid: u32, name: &str, uid: u32) -> Answer {
        self.ask(
            104,
            &[
                &fid.to_le_bytes(),
                &u32::MAX.to_le_bytes(),
                &string("root"),
                &string(name),
                &uid.to_le_bytes(),
            ],
        )
    }

    fn walk(&mut self, from: u32, to: u32, names: &[&str]) -> Answer {
        let count = u16::try_from(names.len()).unwrap();
        let names: Vec<u8> = names.iter().flat_map(|name| string(name)).collect();
        self.walk_raw(from, to, count, &names)
    }

    fn walk_raw(&mut self, from: u32, to: u32, count: u16, names: &[u8]) -> Answer {
        self.ask(110, &[&from.to_le_bytes(), &to.to_le_bytes(), &count.to_le_bytes(), names])
    }

    fn open(&mut self, fid: u32, flags: i32) -> Answer {
        self.ask(12, &[&fid.to_le_bytes(), &flags.to_le_bytes()])
    }

    fn create(&mut self, dir: u32, name: &str, mode: u32) -> Answer {
        let flags = READ_WRITE | libc::O_CREAT;
        self.ask(
            14,
            &[
                &dir.to_le_bytes(),
                &string(name),
                &flags.to_le_bytes(),
                &mode.to_le_bytes(),
                &5u32.to_le_bytes(),
            ],
        )
    }

    fn make_dir(&mut self, dir: u32, name: &str) -> Answer {
        let mode = 0o755u32.to_le_bytes();
        self.ask(72, &[&dir.to_le_bytes(), &string(name), &mode, &0u32.to_le_bytes()])
    }

    fn write(&mut self, fid: u32, offset: u64, data: &[u8]) -> Answer {
        let count = u32::try_from(data.len()).unwrap();
        self.ask(118, &[&fid.to_le_bytes(), &offset.to_le_bytes(), &count.to_le_bytes(), data])
    }

    fn read(&mut self, fid: u32, offset: u64, count: u32) -> Answer {
        let answer = self.ask(116, &[&fid.to_le_bytes(), &offset.to_le_bytes(), &count.to_le_bytes()])?;
        assert_eq!(answer[..4], u32::try_from(answer.len() - 4).unwrap().to_le_bytes());
        Ok(answer[4..].to_vec())
    }

    fn clunk(&mut self, fid: u32) {
        self.ask(120, &[&fid.to_le_bytes()]).unwrap();
    }

    fn unlink(&mut self, dir: u32, name: &str, flags: u32) -> Answer {
        self.ask(76, &[&dir.to_le_bytes(), &string(name), &flags.to_le_bytes()])
    }

    fn rename(&mut self, dir: u32, name: &str, new_name: &str) -> Answer {
        self.ask(74, &[&dir.to_le_bytes(), &string(name), &dir.to_le_bytes(), &string(new_name)])
    }

    fn symlink(&mut self, dir: u32, name: &str, target: &str) -> Answer {
        self.ask(16, &[&dir.to_le_bytes(), &string(name), &string(target), &0u32.to_le_bytes()])
    }

    /// Tsetattr: bits, mode, size; owner and times as given.
    fn set(&mut self, fid: u32, valid: u32, mode: u32, size: u64, modified: u64) -> Answer {
        self.ask(
            26,
            &[
                &fid.to_le_bytes(),
                &valid.to_le_bytes(),
                &mode.to_le_bytes(),
                &[0; 8],
                &size.to_le_bytes(),
                &[0; 16],
                &modified.to_le_bytes(),
                &[0; 8],
            ],
        )
    }

    /// All names of the directory behind `fid`, read in pieces of `count` bytes.
    fn names(&mut self, fid: u32, count: u32) -> Vec<String> {
        let (mut names, mut offset) = (Vec::new(), 0u64);
        loop {
            let answer =
                self.ask(40, &[&fid.to_le_bytes(), &offset.to_le_bytes(), &count.to_le_bytes()]).unwrap();
            assert!(answer.len() <= 4 + usize::try_from(count).unwrap());
            let mut list = &answer[4..];
            if list.is_empty() {
                names.sort();
                return names;
            }
            while !list.is_empty() {
                offset = u64::from_le_bytes(list[13..21].try_into().unwrap());
                let length = usize::from(u16::from_le_bytes([list[22], list[23]]));
                names.push(String::from_utf8(list[24..24 + length].to_vec()).unwrap());
                list = &list[24 + length..];
            }
        }
    }
}

fn string(text: &str) -> Vec<u8> {
    [&u16::try_from(text.len()).unwrap().to_le_bytes()[..], text.as_bytes()].concat()
}

#[test]
fn a_file_is_created_written_read_and_removed() {
    let dir = tempfile::tempdir().unwrap();
    let mut client = Client::writable(&dir);
    client.make_dir(0, "sub").unwrap();
    client.walk(0, 1, &["sub"]).unwrap();
    client.create(1, "new", 0o4640).unwrap();
    assert_eq!(client.write(1, 0, b"hello").unwrap(), 5u32.to_le_bytes());
    assert_eq!(client.write(1, 5, b" world").unwrap(), 6u32.to_le_bytes());
    client.ask(50, &[&1u32.to_le_bytes(), &0u32.to_le_bytes()]).unwrap();
    let path = dir.path().join("sub/new");
    assert_eq!(fs::read(&path).unwrap(), b"hello world");
    let meta = fs::metadata(&path).unwrap();
    assert_eq!((meta.mode() & 0o7777, meta.gid()), (0o4640, 5), "set-id bits survive the change of owner");
    assert_eq!(client.read(1, 6, 100).unwrap(), b"world");
    assert_eq!(client.read(1, 11, 100).unwrap(), b"");

    client.set(1, 8, 0, 5, 0).unwrap();
    client.set(1, 1 | 0x20 | 0x100, 0o600, 0, 1_000_000).unwrap();
    let meta = fs::metadata(&path).unwrap();
    assert_eq!((meta.len(), meta.mode() & 0o7777, meta.mtime()), (5, 0o600, 1_000_000));
    let attributes = client.ask(24, &[&1u32.to_le_bytes(), &u64::MAX.to_le_bytes()]).unwrap();
    assert_eq!(attributes.len(), 153);
    assert_eq!(u64::from_le_bytes(attributes[49..57].try_into().unwrap()), 5, "size");

    client.walk(0, 2, &["sub"]).unwrap();
    client.rename(2, "new", "old").unwrap();
    // The open file is the same one under another name.
    assert_eq!(client.read(1, 0, 5).unwrap(), b"hello");
    assert_eq!(client.unlink(0, "sub", 0x200), Err(Errno::ENOTEMPTY));
    client.unlink(2, "old", 0).unwrap();
    assert_eq!(client.read(1, 0, 5).unwrap(), b"hello", "an open file outlives its name");
    client.clunk(1);
    assert_eq!(client.read(1, 0, 5), Err(Errno::EBADF));
    client.unlink(0, "sub", 0x200).unwrap();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn nothing_leads_out_of_the_share() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), "no").unwrap();
    let dir = tempfile::tempdir().unwrap();
    symlink(outside.path(), dir.path().join("way")).unwrap();
    symlink(outside.path().join("secret"), dir.path().join("file")).unwrap();
    let mut client = Client::writable(&dir);
    for name in ["..", ".", "", "/etc", "way/secret"] {
        assert_eq!(client.walk(0, 1, &[name]), Err(Errno::EINVAL), "{name:?}");
    }
    // A link is a file of its own: it can be read as one, not followed.
    client.walk(0, 1, &["way"]).unwrap();
    let target = client.ask(22, &[&1u32.to_le_bytes()]).unwrap();
    assert_eq!(target, string(outside.path().to_str().unwrap()));
    assert_eq!(client.walk(1, 2, &["secret"]), Err(Errno::ENOTDIR));
    assert_eq!(client.open(1, libc::O_RDONLY), Err(Errno::ENXIO));
    client.walk(0, 3, &["file"]).unwrap();
    assert_eq!(client.open(3, READ_WRITE), Err(Errno::ENXIO));
    assert_eq!(client.set(3, 8, 0, 0, 0), Err(Errno::EINVAL), "no truncation through a link");
    assert_eq!(client.set(3, 1, 0o777, 0, 0), Err(Errno::EOPNOTSUPP));
    // A create where a link lies does not write behind it.
    client.walk_raw(0, 4, 0, &[]).unwrap();
    assert_eq!(client.create(4, "file", 0o644), Err(Errno::ENXIO));
    assert_eq!(fs::read(outside.path().join("secret")).unwrap(), b"no");
    // A walk that fails half-way sets no id.
    fs::create_dir(dir.path().join("a")).unwrap();
    let names = [string("a"), string("b")].concat();
    let half = client.walk_raw(0, 5, 2, &names).unwrap();
    assert_eq!(half[..2], 1u16.to_le_bytes());
    assert_eq!(client.open(5, 0), Err(Errno::EBADF));
}

#[test]
fn a_read_only_share_refuses_every_change() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("f"), "text").unwrap();
    let mut client = Client::of(&dir, Config { read_only: true, allowed: None });
    client.walk(0, 1, &["f"]).unwrap();
    for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_RDONLY | libc::O_TRUNC] {
        assert_eq!(client.open(1, flags), Err(Errno::EROFS));
    }
    client.open(1, libc::O_RDONLY).unwrap();
    assert_eq!(client.read(1, 0, 10).unwrap(), b"text");
    let refused = [
        client.write(1, 0, b"x"),
        client.set(1, 1, 0o777, 0, 0),
        client.make_dir(0, "d"),
        client.unlink(0, "f", 0),
        client.rename(0, "f", "g"),
        client.symlink(0, "l", "f"),
        client.create(0, "n", 0o644),
        client.ask(70, &[&0u32.to_le_bytes(), &1u32.to_le_bytes(), &string("h")]),
        client.ask(18, &[&0u32.to_le_bytes(), &string("p"), &0o10644u32.to_le_bytes(), &[0; 12]]),
    ];
    assert!(refused.iter().all(|answer| *answer == Err(Errno::EROFS)), "{refused:?}");
    assert_eq!(fs::read(dir.path().join("f")).unwrap(), b"text");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_share_of_single_files_shows_no_other() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["shown", "hidden"] {
        fs::write(dir.path().join(name), name).unwrap();
    }
    let allowed = Some(["shown".to_owned()].into());
    let mut client = Client::of(&dir, Config { read_only: false, allowed });
    assert_eq!(client.walk(0, 1, &["hidden"]), Err(Errno::ENOENT));
    client.walk(0, 1, &["shown"]).unwrap();
    client.open(1, READ_WRITE).unwrap();
    client.write(1, 0, b"SHOWN").unwrap();
    assert_eq!(fs::read(dir.path().join("shown")).unwrap(), b"SHOWN");
    client.walk_raw(0, 2, 0, &[]).unwrap();
    client.open(2, libc::O_RDONLY).unwrap();
    assert_eq!(client.names(2, 4000), [".", "..", "shown"]);
    let refused = [
        client.unlink(0, "shown", 0),
        client.rename(0, "shown", "other"),
        client.make_dir(0, "d"),
        client.set(0, 1, 0o777, 0, 0),
        client.symlink(0, "l", "shown"),
    ];
    assert!(refused.iter().all(|answer| *answer == Err(Errno::EPERM)), "{refused:?}");
}

#[test]
fn a_large_directory_is_read_in_pieces_without_loss() {
    let dir = tempfile::tempdir().unwrap();
    let mut wanted = vec![".".to_owned(), "..".to_owned()];
    for number in 0..700 {
        let name = format!("a-file-with-a-long-name-{number:04}");
        fs::write(dir.path().join(&name), "").unwrap();
        wanted.push(name);
    }
    wanted.sort();
    let mut client = Client::writable(&dir);
    client.walk_raw(0, 1, 0, &[]).unwrap();
    client.open(1, libc::O_RDONLY).unwrap();
    assert_eq!(client.names(1, 8192 - 11), wanted);
    assert_eq!(client.names(1, 200), wanted);
}

#[test]
fn devices_are_not_made_and_fifos_not_opened() {
    let dir = tempfile::tempdir().unwrap();
    let mut client = Client::writable(&dir);
    let mut make = |name: &str, mode: u32| {
        client.ask(18, &[&0u32.to_le_bytes(), &string(name), &mode.to_le_bytes(), &[0; 12]])
    };
    assert_eq!(make("block", 0o60_644), Err(Errno::EPERM));
    assert_eq!(make("char", 0o20_644), Err(Errno::EPERM));
    make("fifo", 0o10_640).unwrap();
    assert_eq!(fs::metadata(dir.path().join("fifo")).unwrap().permissions().mode() & 0o777, 0o640);
    client.walk(0, 1, &["fifo"]).unwrap();
    assert_eq!(client.open(1, libc::O_RDONLY), Err(Errno::ENXIO), "it would block for ever");
}

#[test]
fn ids_are_bounded_and_belong_to_one_file() {
    let dir = tempfile::tempdir().unwrap();
    let mut client = Client::writable(&dir);
    assert_eq!(client.attach(9, "8", 0), Err(Errno::ENOENT), "another share's name");
    assert_eq!(client.attach(0, "7", 0), Err(Errno::EINVAL), "the id is taken");
    let mut taken = 1u32;
    while client.walk_raw(0, taken, 0, &[]).is_ok() {
        taken += 1;
        assert!(taken < 5000);
    }
    assert_eq!(client.walk_raw(0, taken, 0, &[]), Err(Errno::EMFILE));
    client.clunk(1);
    client.walk_raw(0, 1, 0, &[]).unwrap();
    // A new version forgets every id.
    client.ask(100, &[&8192u32.to_le_bytes(), &string("9P2000.L")]).unwrap();
    assert_eq!(client.walk_raw(0, 2, 0, &[]), Err(Errno::EBADF));
    assert_eq!(
        client.ask(100, &[&8192u32.to_le_bytes(), &string("9P2000")]).unwrap()[4..],
        string("unknown")
    );
}

#[test]
fn no_bytes_of_a_guest_make_a_session_panic() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("f"), "text").unwrap();
    let mut client = Client::writable(&dir);
    client.walk(0, 1, &["f"]).unwrap();
    client.open(1, libc::O_RDONLY).unwrap();
    let mut state = 0x2545_F491_4F6C_DD1Du64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let kinds = [
        8, 12, 14, 16, 18, 22, 24, 26, 30, 40, 50, 52, 54, 70, 72, 74, 76, 100, 104, 108, 110, 116, 118, 120,
        122, 200,
    ];
    for kind in kinds.into_iter().cycle().take(20_000) {
        let mut frame = vec![kind, 1, 0];
        for _ in 0..random()[0] % 6 {
            let [a, b, ..] = random();
            frame.extend([a % 3, 0, 0, 0, b]);
        }
        if let Some(answer) = client.session.answer(&frame) {
            assert!(answer.len() <= usize::try_from(MAX_MESSAGE).unwrap());
        }
    }
}

#[tokio::test]
async fn a_session_runs_over_a_stream_and_ends_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let root = Root::open(dir.path()).unwrap();
    let session =
        Session::new(root.0, "0".into(), Rules::new(Config { read_only: true, allowed: None })).unwrap();
    let (mut guest, host) = tokio::io::duplex(1024);
    let served = tokio::spawn(converse(host, session));
    let body = [&[100u8, 255, 255][..], &8192u32.to_le_bytes(), &string("9P2000.L")].concat();
    guest.write_u32_le(u32::try_from(body.len() + 4).unwrap()).await.unwrap();
    guest.write_all(&body).await.unwrap();
    let size = guest.read_u32_le().await.unwrap();
    let mut answer = vec![0; usize::try_from(size).unwrap() - 4];
    guest.read_exact(&mut answer).await.unwrap();
    assert_eq!(answer[0], 101);
    drop(guest);
    served.await.unwrap().unwrap();

    let root = Root::open(dir.path()).unwrap();
    let session =
        Session::new(root.0, "0".into(), Rules::new(Config { read_only: true, allowed: None })).unwrap();
    let (mut guest, host) = tokio::io::duplex(1024);
    guest.write_u32_le(MAX_MESSAGE + 1).await.unwrap();
    let error = converse(host, session).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData, "nothing is allocated for it");
}
