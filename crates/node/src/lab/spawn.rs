//! Processes of the lab's hosts, from outside: start the first, find it again, and put
//! further ones beside it.

use std::{
    fs::{self, File},
    io,
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
};

use std::os::unix::process::CommandExt;

use nix::sched::{CloneFlags, setns, unshare};

use super::{
    HostName,
    error::{FileContext, LabError, NamespaceContext},
    layout::{Layout, Record},
    network::{CLIENT_NETNS, netns_path},
};

#[expect(clippy::cast_possible_wrap, reason = "a small flag")]
const CLOSE_ON_EXEC: libc::c_int = libc::CLOSE_RANGE_CLOEXEC as libc::c_int;

/// Starts a host's first process in namespaces of its own (network by name; mount, PID
/// and host name new). Its output goes to `logs/host.log`.
pub(crate) fn start_host(layout: &Layout, record: &Record, host: HostName) -> Result<Child, LabError> {
    let program = record.bin_dir.join("dunlin");
    let log_path = layout.host(host).log("host");
    let log = File::create(&log_path).file("create", &log_path)?;
    let errors = log.try_clone().file("open", &log_path)?;
    let mut command = Command::new(&program);
    command
        .args(["lab", "host", "--dir"])
        .arg(layout.dir())
        .args(["--name", host.as_str()])
        .env_clear()
        .env("PATH", record.search_path())
        .env("HOME", "/root")
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(errors)
        .current_dir("/");
    for kept in ["RUST_LOG", "RUST_BACKTRACE"] {
        if let Some(value) = std::env::var_os(kept) {
            command.env(kept, value);
        }
    }
    // The lab outlives its starter: what that one has open, a lock for instance, is not the lab's to keep.
    // SAFETY: close_range is one system call, safe between fork and exec.
    unsafe {
        command.pre_exec(|| match libc::close_range(3, libc::c_uint::MAX, CLOSE_ON_EXEC) {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        });
    }
    let netns = netns_path(host.netns());
    in_thread(move || {
        let network = File::open(&netns).file("open", &netns)?;
        setns(network, CloneFlags::CLONE_NEWNET).namespace("enter the network namespace", host.netns())?;
        let private = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWUTS;
        unshare(private).namespace("make the namespaces of a host", host.as_str())?;
        spawn(&mut command)
    })
}

/// The process id, in our namespace, of a host's first process.
pub(crate) fn find_host(layout: &Layout, host: HostName) -> Option<i32> {
    hosts().into_iter().find(|found| found.dir == layout.dir() && found.name == host.as_str()).map(|h| h.pid)
}

/// A lab host that runs on this machine.
pub(crate) struct FoundHost {
    /// Its first process.
    pub(crate) pid: i32,
    /// Its lab's directory.
    pub(crate) dir: PathBuf,
    /// `a` or `b`.
    pub(crate) name: String,
}

/// All lab hosts on this machine, read from the process table: it knows them also when a
/// crash of `lab up` kept it from writing anything down.
pub(crate) fn hosts() -> Vec<FoundHost> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(read_host)
        .collect()
}

fn read_host(pid: i32) -> Option<FoundHost> {
    let arguments = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let mut words = arguments.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned());
    let program = words.next()?;
    if !program.ends_with("/dunlin") || words.next()? != "lab" || words.next()? != "host" {
        return None;
    }
    let (flag_dir, dir, flag_name, name) = (words.next()?, words.next()?, words.next()?, words.next()?);
    if flag_dir != "--dir" || flag_name != "--name" {
        return None;
    }
    // A child between fork and exec has the same arguments; only the first is 1 in its own namespace.
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let first =
        status.lines().find_map(|line| line.strip_prefix("NSpid:"))?.split_whitespace().last()? == "1";
    first.then(|| FoundHost { pid, dir: dir.into(), name })
}

/// Starts `command` among the processes of a host: in its network, mounts, PIDs and host name.
/// PATH begins with our programs and the chosen containerd's.
pub(crate) fn spawn_in_host(
    layout: &Layout,
    host: HostName,
    mut command: Command,
) -> Result<Child, LabError> {
    let pid = find_host(layout, host).ok_or(LabError::HostDown(host))?;
    if let Some(record) = layout.read_record()? {
        command.env("PATH", record.search_path());
    }
    in_thread(move || {
        // Entering a mount namespace is refused to a thread that shares its root and
        // working directory with others.
        unshare(CloneFlags::CLONE_FS).namespace("leave the shared working directory", "unshare")?;
        let kinds = [
            ("net", CloneFlags::CLONE_NEWNET),
            ("uts", CloneFlags::CLONE_NEWUTS),
            ("pid", CloneFlags::CLONE_NEWPID),
            ("mnt", CloneFlags::CLONE_NEWNS),
        ];
        let opened: Vec<_> = kinds
            .iter()
            .map(|(kind, flag)| {
                let path = format!("/proc/{pid}/ns/{kind}");
                File::open(&path).file("open", path).map(|file| (file, *flag))
            })
            .collect::<Result<_, _>>()?;
        for (file, flag) in opened {
            setns(file, flag).namespace("enter the namespaces of host", host.as_str())?;
        }
        spawn(&mut command)
    })
}

/// Starts `command` in the network of the client outside both hosts.
pub(crate) fn spawn_in_client(mut command: Command) -> Result<Child, LabError> {
    let netns = netns_path(CLIENT_NETNS);
    in_thread(move || {
        let network = File::open(&netns).map_err(|_| LabError::HostDown(HostName::A))?;
        setns(network, CloneFlags::CLONE_NEWNET).namespace("enter the network namespace", CLIENT_NETNS)?;
        spawn(&mut command)
    })
}

/// Runs `f` on a thread that ends with it: whatever namespaces it enters, ours stay.
fn in_thread<T: Send + 'static>(
    f: impl FnOnce() -> Result<T, LabError> + Send + 'static,
) -> Result<T, LabError> {
    thread::spawn(f).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn spawn(command: &mut Command) -> Result<Child, LabError> {
    command.spawn().map_err(|source: io::Error| {
        let program = command.get_program().to_string_lossy().into_owned();
        if source.kind() == io::ErrorKind::NotFound {
            return LabError::MissingProgram { program, package: "see README.md, Requirements" };
        }
        LabError::Spawn { command: program, source }
    })
}
