//! A container that writes to its disk, reads back around every cache, and says what it has synced.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::{Container, Host, Lab, Run};

/// Built static by this crate's build script; see `tests/oracle`.
const PROGRAM: &str = concat!(env!("OUT_DIR"), "/oracle");
/// 8 MiB of blocks.
const BLOCKS: &str = "2048";
const SOON: Duration = Duration::from_secs(60);

/// A container whose init is the oracle.
pub struct Oracle<'a> {
    /// The container.
    pub container: Container<'a>,
    lab: &'a Lab,
    seed: String,
    file: String,
}

impl<'a> Oracle<'a> {
    /// Starts one on host a that writes to its own disk. `options`: more for `ctr run`.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start(lab: &'a Lab, id: &str, seed: u32, options: &[&str]) -> Oracle<'a> {
        Oracle::start_at(lab, id, seed, "/oracle.dat", options)
    }

    /// The same, writing to another file in the container.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start_at(lab: &'a Lab, id: &str, seed: u32, file: &str, options: &[&str]) -> Oracle<'a> {
        let container = Container::adopt(lab, id);
        for host in Host::ALL {
            let log = container.log_path(host);
            let _ = fs::remove_file(&log);
            fs::create_dir_all(log.parent().expect("a log has a directory")).expect("a directory for logs");
        }
        let uri = format!("file://{}", container.log_path(Host::A).display());
        let script = format!(
            "while [ ! -e /oracle ]; do usleep 20000; done; exec /oracle run {file} {BLOCKS} {seed} /stop"
        );
        let mut run = vec!["run", "-d", "--log-uri", &uri];
        run.extend(Container::RUN);
        run.extend(options);
        run.extend([Container::IMAGE, id, "sh", "-c", &script]);
        lab.ctr(Host::A, &run).ok();
        let put = "cat >/oracle.new && busybox chmod 755 /oracle.new && busybox mv /oracle.new /oracle";
        let mut command =
            lab.command_on(Host::A, &["ctr", "task", "exec", "--exec-id", "put", id, "sh", "-c", put]);
        let program = File::open(PROGRAM).expect("the build script made the oracle");
        command.stdin(program).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().expect("dunlin lab exec starts");
        Run::finish(child, "putting the oracle into its container", SOON).ok();
        let oracle = Oracle { container, lab, seed: seed.to_string(), file: file.to_owned() };
        oracle.await_more(1, SOON);
        oracle
    }

    fn said(&self) -> String {
        Host::ALL.map(|host| self.container.log(host)).concat()
    }

    /// The number of the last write that it said to be synced.
    ///
    /// # Panics
    /// When it has found a wrong block.
    #[track_caller]
    pub fn synced(&self) -> u64 {
        let said = self.said();
        assert!(!said.contains("ERROR"), "{}: {}", self.container.id, tail(&said));
        said.lines().filter_map(|line| line.strip_prefix("synced ")?.parse().ok()).max().unwrap_or(0)
    }

    /// Waits until it has synced `more` further writes, wherever it is.
    ///
    /// # Panics
    /// When it has not after `deadline`, or has found a wrong block.
    #[track_caller]
    pub fn await_more(&self, more: u64, deadline: Duration) {
        let (since, wanted) = (Instant::now(), self.synced() + more);
        loop {
            let synced = self.synced();
            if synced >= wanted {
                return;
            }
            assert!(since.elapsed() < deadline, "{} is at {synced}, not at {wanted}", self.container.id);
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Has it read every block once more and end. Gives its last words.
    ///
    /// # Panics
    /// When a block was ever wrong.
    #[track_caller]
    pub fn end(&self, host: Host) -> String {
        self.container.exec(host, "stop", &["touch", "/stop"]).ok();
        let since = Instant::now();
        while !self.said().contains("done: ") {
            assert!(since.elapsed() < SOON, "{} does not end: {}", self.container.id, tail(&self.said()));
            thread::sleep(Duration::from_millis(50));
        }
        let said = self.said();
        assert!(said.contains(", 0 errors") && !said.contains("ERROR"), "{}", tail(&said));
        said.lines().rfind(|line| line.starts_with("done: ")).unwrap_or_default().to_owned()
    }

    /// Whether all that it said to be synced is in its file on a disk image that no machine has open.
    ///
    /// # Panics
    /// When it is not, or the image cannot be read.
    #[track_caller]
    pub fn check_image(&self, image: &Path, pod: &str) -> String {
        let synced = self.synced().to_string();
        let out = self.lab.dir().join(format!("{}.dat", self.container.id));
        let inside = format!("/scratch/{pod}/{}/upper{}", self.container.id, self.file);
        let mut dump = Command::new("debugfs");
        dump.args(["-R", &format!("dump {inside} {}", out.display())]).arg(image);
        let dumped = Run::new(dump, SOON);
        assert!(out.exists(), "{inside} in {}: {dumped:?}", image.display());
        let mut check = Command::new(PROGRAM);
        check.arg("check").arg(&out).args([BLOCKS, &self.seed, &synced]);
        let checked = Run::new(check, SOON);
        let _ = fs::remove_file(out);
        checked.ok().trim().to_owned()
    }
}

/// Where a sandbox keeps a container's disk on a host, as this machine sees it.
pub fn scratch_image(lab: &Lab, host: Host, sandbox: &str, container: &str) -> PathBuf {
    lab.host_dir(host).join("data/scratch/default").join(sandbox).join(format!("{container}.raw"))
}

/// Bytes that a file takes on the host.
///
/// # Panics
/// When it is not there.
#[track_caller]
pub fn allocated(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).blocks() * 512
}

/// Whether a process holds QEMU's locks on an image: of its bytes from 100 on, one for each thing that it does with
/// the image, and from 200 on, one for each that it lets nobody else do.
///
/// # Panics
/// When the image cannot be opened.
#[track_caller]
pub fn is_locked(image: &Path) -> bool {
    use std::os::fd::AsRawFd;
    let file = File::options().read(true).write(true).open(image);
    let file = file.unwrap_or_else(|error| panic!("{}: {error}", image.display()));
    // SAFETY: a `flock` of zeroes is a valid one.
    let mut asked: libc::flock = unsafe { std::mem::zeroed() };
    asked.l_type = i16::try_from(libc::F_WRLCK).unwrap_or_default();
    (asked.l_start, asked.l_len) = (100, 200);
    // SAFETY: the lock is a valid one, alive for the call, which only looks for others'.
    let looked = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut asked) };
    assert_eq!(looked, 0, "{}: {}", image.display(), std::io::Error::last_os_error());
    i32::from(asked.l_type) != libc::F_UNLCK
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(12)..].join("\n")
}
