//! What the VM costs the host.

use std::io;

use nix::sys::time::TimeValLike;
use nix::time::{ClockId, clock_getcpuclockid, clock_gettime};
use nix::unistd::{Pid, SysconfVar, sysconf};

/// Resource figures of one QEMU process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// CPU time of all its threads since it started, nanoseconds.
    pub cpu_time_nanos: u64,
    /// Resident memory, bytes.
    pub resident_bytes: u64,
}

/// The process must not have been reaped.
pub(crate) fn of_process(pid: i32) -> io::Result<Usage> {
    // /proc/<pid>/stat counts in ticks of 10 ms; this clock is the same count in nanoseconds.
    let clock: ClockId = clock_getcpuclockid(Pid::from_raw(pid))?;
    let cpu_time = clock_gettime(clock)?.num_nanoseconds();
    let statm = std::fs::read_to_string(format!("/proc/{pid}/statm"))?;
    let pages: u64 = statm
        .split_whitespace()
        .nth(1)
        .and_then(|pages| pages.parse().ok())
        .ok_or_else(|| io::Error::other(format!("/proc/{pid}/statm reads {statm:?}")))?;
    let page = sysconf(SysconfVar::PAGE_SIZE)?.and_then(|size| u64::try_from(size).ok()).unwrap_or(4096);
    Ok(Usage {
        cpu_time_nanos: u64::try_from(cpu_time).map_err(io::Error::other)?,
        resident_bytes: pages * page,
    })
}
