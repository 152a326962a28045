//! The guest's own mounts.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};

use super::BootError;

struct Mount {
    kind: &'static str,
    target: &'static str,
    flags: MsFlags,
    data: &'static str,
}

const NO_EXEC: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);

const EARLY: [Mount; 3] = [
    Mount { kind: "devtmpfs", target: "/dev", flags: MsFlags::MS_NOSUID, data: "mode=0755" },
    Mount { kind: "proc", target: "/proc", flags: NO_EXEC, data: "" },
    Mount { kind: "sysfs", target: "/sys", flags: NO_EXEC, data: "" },
];

const LATE: [Mount; 5] = [
    Mount {
        kind: "devpts",
        target: "/dev/pts",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        data: "mode=0620,gid=5,ptmxmode=0666",
    },
    Mount { kind: "tmpfs", target: "/dev/shm", flags: NO_EXEC, data: "mode=1777" },
    Mount {
        kind: "tmpfs",
        target: "/run",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV),
        data: "mode=0755",
    },
    Mount {
        kind: "tmpfs",
        target: "/tmp",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV),
        data: "mode=1777",
    },
    Mount { kind: "cgroup2", target: "/sys/fs/cgroup", flags: NO_EXEC, data: "" },
];

/// What the first stage needs: device nodes, processes, devices.
pub(super) fn early() -> Result<(), BootError> {
    EARLY.iter().try_for_each(put)
}

/// What containers need beyond that, and the directories that the host may use.
pub(super) fn late() -> Result<(), BootError> {
    LATE.iter().try_for_each(put)?;
    // Mounts that containers propagate go nowhere unless they ask for it.
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        .map_err(io::Error::from)
        .map_err(BootError::at("make / private"))?;
    for dir in ["/run/gcs", "/run/mounts", "/run/dunlin", crate::oci::STATE_ROOT, "/etc", "/root"] {
        fs::create_dir_all(dir).map_err(BootError::at(format!("create {dir}")))?;
    }
    for (target, name) in [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ] {
        if !Path::new(name).exists() {
            symlink(target, name).map_err(BootError::at(format!("link {name}")))?;
        }
    }
    Ok(())
}

fn put(what: &Mount) -> Result<(), BootError> {
    let step = || format!("mount {} on {}", what.kind, what.target);
    fs::create_dir_all(what.target).map_err(BootError::at(step()))?;
    match mount(Some(what.kind), what.target, Some(what.kind), what.flags, Some(what.data)) {
        // The kernel mounted /dev itself.
        Ok(()) | Err(Errno::EBUSY) => Ok(()),
        Err(errno) => Err(BootError::at(step())(errno.into())),
    }
}
