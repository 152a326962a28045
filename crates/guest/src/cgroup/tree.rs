//! One container's cgroup: who is in it, freezing, killing, removal.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::ROOT;
use crate::path::ContainerId;

/// Controllers that containers get, as far as the kernel has them.
const CONTROLLERS: [&str; 5] = ["cpu", "cpuset", "io", "memory", "pids"];
const POLL: Duration = Duration::from_millis(5);

/// Enables the controllers at the root and creates `/pods`, enabled too.
pub fn prepare() -> io::Result<()> {
    enable_controllers(Path::new(ROOT))?;
    create_enabled(&Path::new(ROOT).join("pods"))
}

/// Creates a pod's cgroup, so that its containers' limits can nest in it.
pub fn create_pod(pod: &ContainerId) -> io::Result<()> {
    create_enabled(&Path::new(ROOT).join("pods").join(pod.as_str()))
}

/// Removes a pod's cgroup once it has no containers left; otherwise leaves it.
pub fn remove_pod(pod: &ContainerId) {
    let _ = fs::remove_dir(Path::new(ROOT).join("pods").join(pod.as_str()));
}

fn create_enabled(dir: &Path) -> io::Result<()> {
    match fs::create_dir(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    enable_controllers(dir)
}

fn enable_controllers(dir: &Path) -> io::Result<()> {
    let there = fs::read_to_string(dir.join("cgroup.controllers"))?;
    for controller in CONTROLLERS.iter().filter(|name| there.split_whitespace().any(|c| c == **name)) {
        fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}"))?;
    }
    Ok(())
}

/// A container's cgroup. It need not exist yet, or any more.
#[derive(Clone, Debug)]
pub struct Cgroup {
    dir: PathBuf,
}

impl Cgroup {
    /// The cgroup of a container in a pod.
    pub fn of(pod: &ContainerId, container: &ContainerId) -> Cgroup {
        Cgroup::at(Path::new(ROOT).join("pods").join(pod.as_str()).join(container.as_str()))
    }

    /// The cgroup in this directory.
    pub fn at(dir: PathBuf) -> Cgroup {
        Cgroup { dir }
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// `cgroupsPath` for an OCI spec.
    pub fn spec_path(pod: &ContainerId, container: &ContainerId) -> String {
        format!("/pods/{pod}/{container}")
    }

    /// Pids in this cgroup and below it, in PID 1's namespace.
    pub fn pids(&self) -> io::Result<Vec<u32>> {
        let mut pids = Vec::new();
        collect_pids(&self.dir, &mut pids)?;
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }

    /// Whether any process is in it. A cgroup that does not exist has none.
    pub fn populated(&self) -> bool {
        flag(&self.dir.join("cgroup.events"), "populated").unwrap_or(false)
    }

    /// Kills every process in it with SIGKILL.
    pub fn kill(&self) -> io::Result<()> {
        match fs::write(self.dir.join("cgroup.kill"), "1") {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            done => done,
        }
    }

    /// Freezes or thaws, and waits until the kernel says so. When freezing does not come about
    /// within `deadline`, everything is thawed again and `TimedOut` returned.
    pub fn freeze(&self, frozen: bool, deadline: Duration) -> io::Result<()> {
        let file = self.dir.join("cgroup.freeze");
        fs::write(&file, if frozen { "1" } else { "0" })?;
        let end = Instant::now() + deadline;
        while flag(&self.dir.join("cgroup.events"), "frozen") != Some(frozen) {
            if Instant::now() >= end {
                if frozen {
                    let _ = fs::write(&file, "0");
                }
                return Err(io::ErrorKind::TimedOut.into());
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// Kills what is left in it and removes it with everything below.
    pub fn remove(&self, deadline: Duration) -> io::Result<()> {
        let end = Instant::now() + deadline;
        loop {
            self.kill()?;
            match remove_tree(&self.dir) {
                Ok(()) => return Ok(()),
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < end => {
                    std::thread::sleep(POLL);
                }
                Err(error) => return Err(error),
            }
        }
    }
}

fn collect_pids(dir: &Path, into: &mut Vec<u32>) -> io::Result<()> {
    let text = match fs::read_to_string(dir.join("cgroup.procs")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        // A threaded cgroup has no processes of its own to list.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => String::new(),
        text => text?,
    };
    // 0 stands for a process outside of the reader's pid namespace.
    into.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()).filter(|pid| *pid != 0));
    for child in child_dirs(dir)? {
        collect_pids(&child, into)?;
    }
    Ok(())
}

fn remove_tree(dir: &Path) -> io::Result<()> {
    let children = match child_dirs(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        children => children?,
    };
    for child in children {
        remove_tree(&child)?;
    }
    match fs::remove_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

fn child_dirs(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut children = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            children.push(entry.path());
        }
    }
    Ok(children)
}

/// A `key 0|1` line of a flat keyed file.
fn flag(file: &Path, key: &str) -> Option<bool> {
    let text = fs::read_to_string(file).ok()?;
    super::stats::keyed(&text, key).map(|value| value != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pids_of_nested_groups_and_none_of_a_missing_one() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("inner");
        fs::create_dir(&inner).unwrap();
        fs::write(dir.path().join("cgroup.procs"), "12\n0\n7\n").unwrap();
        fs::write(inner.join("cgroup.procs"), "7\n9\n").unwrap();
        assert_eq!(Cgroup::at(dir.path().into()).pids().unwrap(), [7, 9, 12]);
        assert_eq!(Cgroup::at(dir.path().join("gone")).pids().unwrap(), [0u32; 0]);
    }

    #[test]
    fn freezing_that_does_not_come_about_is_undone() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("cgroup.events"), "populated 1\nfrozen 0\n").unwrap();
        let group = Cgroup::at(dir.path().into());
        assert!(group.populated());
        let error = group.freeze(true, Duration::from_millis(20)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(fs::read_to_string(dir.path().join("cgroup.freeze")).unwrap(), "0");
    }
}
