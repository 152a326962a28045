//! QEMU as a process: confined, tied to our life, reaped by one thread that does nothing else.
//!
//! The thread that starts the process waits for it. Linux sends the parent-death signal when the *thread*
//! that forked ends, so a pool's thread that is retired when idle would take the VM with it.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::thread;
use std::time::Duration;

use nix::libc;
use tokio::sync::{oneshot, watch};

/// Bytes kept of the end of QEMU's log.
const TAIL: u64 = 4096;

/// How QEMU ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExitReport {
    /// Exit status, when it exited.
    pub status: Option<i32>,
    /// Number of the signal that ended it, when one did.
    pub signal: Option<i32>,
    /// End of what it wrote to stdout and stderr, at most 4 KiB.
    pub stderr_tail: String,
}

impl fmt::Display for ExitReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.status, self.signal) {
            (_, Some(signal)) => write!(f, "killed by signal {signal}")?,
            (Some(status), None) => write!(f, "exit status {status}")?,
            (None, None) => write!(f, "its exit status is unknown")?,
        }
        if self.stderr_tail.is_empty() {
            write!(f, ", it wrote nothing")
        } else {
            write!(f, ", it wrote: {}", self.stderr_tail)
        }
    }
}

/// The part of a log that one process wrote.
#[derive(Debug, Clone)]
pub(crate) struct LogTail {
    path: PathBuf,
    begin: u64,
}

impl LogTail {
    /// What is in the file already belongs to an earlier process.
    pub(crate) fn of(path: PathBuf, log: &File) -> io::Result<LogTail> {
        Ok(LogTail { begin: log.metadata()?.len(), path })
    }

    pub(crate) fn read(&self) -> String {
        let read = || -> io::Result<Vec<u8>> {
            let mut log = File::open(&self.path)?;
            let end = log.metadata()?.len();
            // A log that was cut meanwhile holds nothing of an earlier process.
            let begin = if end < self.begin { 0 } else { self.begin };
            log.seek(SeekFrom::Start(begin.max(end.saturating_sub(TAIL))))?;
            let mut bytes = Vec::new();
            log.take(TAIL).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        match read() {
            Ok(bytes) => String::from_utf8_lossy(&bytes).trim().to_owned(),
            Err(error) => format!("({} cannot be read: {error})", self.path.display()),
        }
    }
}

/// A started process. Dropping it kills; the thread behind it reaps.
#[derive(Debug)]
pub(crate) struct Process {
    pid: i32,
    pidfd: OwnedFd,
    exited: watch::Receiver<Option<ExitReport>>,
}

impl Process {
    /// Starts `command` with the confinement of this module; `tail` supplies the text of its exit report.
    pub(crate) async fn start(mut command: Command, tail: LogTail) -> io::Result<Process> {
        confine(&mut command);
        let (started, receiver) = oneshot::channel();
        thread::Builder::new().name("qemu-keeper".to_owned()).spawn(move || keep(command, &tail, started))?;
        receiver.await.map_err(|_| io::Error::other("the thread that starts QEMU ended"))?
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    pub(crate) fn exited(&self) -> watch::Receiver<Option<ExitReport>> {
        self.exited.clone()
    }

    /// SIGKILL. A process that is gone already is fine.
    pub(crate) fn kill(&self) -> io::Result<()> {
        // SAFETY: pidfd_send_signal takes a descriptor that we own, a signal number, no siginfo and no flags.
        let result = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.pidfd.as_raw_fd(),
                libc::SIGKILL,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        match result {
            0 => Ok(()),
            _ => match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
                error => Err(error),
            },
        }
    }

    /// How it ended, or `None` when it did not within `deadline`.
    pub(crate) async fn wait(&self, deadline: Duration) -> Option<ExitReport> {
        let mut exited = self.exited.clone();
        let ended = exited.wait_for(Option::is_some);
        tokio::time::timeout(deadline, ended).await.ok()?.ok()?.clone()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.exited.borrow().is_none()
            && let Err(error) = self.kill()
        {
            tracing::error!(pid = self.pid, %error, "QEMU could not be killed");
        }
    }
}

/// The keeper thread, from fork to reaping.
fn keep(mut command: Command, tail: &LogTail, started: oneshot::Sender<io::Result<Process>>) {
    let (mut child, pidfd) = match command.spawn().and_then(with_pidfd) {
        Ok(spawned) => spawned,
        Err(error) => {
            // The caller may have stopped waiting; there is no process that it could miss.
            drop(started.send(Err(error)));
            return;
        }
    };
    // Closes our copies of the log.
    drop(command);
    let (exit, exited) = watch::channel(None);
    let pid = child.id().cast_signed();
    // A caller that has gone away leaves the `Process` in the returned error, and dropping it kills.
    drop(started.send(Ok(Process { pid, pidfd, exited })));
    let report = match child.wait() {
        Ok(status) => report(status, tail.read()),
        Err(error) => {
            tracing::error!(pid, %error, "waiting for QEMU failed");
            ExitReport { status: None, signal: None, stderr_tail: tail.read() }
        }
    };
    exit.send_replace(Some(report));
}

fn report(status: ExitStatus, stderr_tail: String) -> ExitReport {
    ExitReport { status: status.code(), signal: status.signal(), stderr_tail }
}

/// The descriptor cannot name another process: the child is ours and not reaped yet.
fn with_pidfd(mut child: Child) -> io::Result<(Child, OwnedFd)> {
    // SAFETY: pidfd_open takes a process id and no flags.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_open, child.id(), 0) };
    match i32::try_from(result) {
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(fd) if fd >= 0 => Ok((child, unsafe { OwnedFd::from_raw_fd(fd) })),
        _ => {
            let error = io::Error::last_os_error();
            child.kill()?;
            child.wait()?;
            Err(error)
        }
    }
}

fn confine(command: &mut Command) {
    let parent = std::process::id().cast_signed();
    // A signal from a terminal is for us; we end QEMU in order.
    command.process_group(0);
    // SAFETY: between fork and exec only async-signal-safe calls are made: prctl, getppid and unshare,
    // none of which allocates or takes a lock.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(io::Error::last_os_error());
            }
            // The parent may have died before the request took hold; then nobody would send the signal.
            if libc::getppid() != parent {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            if libc::unshare(libc::CLONE_NEWNET) != 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
}
