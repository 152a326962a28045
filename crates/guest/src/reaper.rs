//! The one place that reaps children, so that no exit is missed and no pid is signalled twice.
//!
//! A thread waits for zombies without reaping them, then reaps each one under the table's lock.
//! Whoever starts a child does so under the same lock: the child cannot be reaped before it is in
//! the table, and a signal cannot reach a pid that was handed to someone else in the meantime.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use nix::unistd::Pid;
use tokio::sync::watch;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It returned this status, 0..=255.
    Code(i32),
    /// This signal killed it.
    Signal(i32),
}

impl Exit {
    /// What a shell would show: the status, or 128 + signal.
    pub fn shell_code(self) -> u32 {
        let code = match self {
            Exit::Code(code) => code,
            Exit::Signal(signal) => 128 + signal,
        };
        u32::try_from(code).unwrap_or(u32::MAX)
    }

    /// The same, but `u32::MAX` for a signal, as processes outside of containers are reported.
    pub fn utility_code(self) -> u32 {
        match self {
            Exit::Code(_) => self.shell_code(),
            Exit::Signal(_) => u32::MAX,
        }
    }
}

/// A process whose exit will be told once, to everyone who asks, however late.
#[derive(Clone, Debug)]
pub struct Watched {
    pid: Pid,
    exit: watch::Receiver<Option<(Exit, SystemTime)>>,
}

impl Watched {
    /// The process's id as PID 1 sees it.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// How it ended, if it has.
    pub fn exit(&self) -> Option<Exit> {
        self.exit.borrow().map(|(exit, _)| exit)
    }

    /// When it was found to have ended, by the guest's clock.
    pub fn exited_at(&self) -> Option<SystemTime> {
        self.exit.borrow().map(|(_, at)| at)
    }

    /// Waits for the end. Waits for ever when the reaper's thread is gone, which only happens
    /// together with the whole guest.
    pub async fn wait(&mut self) -> Exit {
        let told = self.exit.wait_for(Option::is_some).await.ok().and_then(|exit| *exit);
        match told {
            Some((exit, _)) => exit,
            None => std::future::pending().await,
        }
    }
}

#[derive(Default)]
struct Table {
    watched: HashMap<i32, watch::Sender<Option<(Exit, SystemTime)>>>,
    reaped_orphans: u64,
}

struct Shared {
    table: Mutex<Table>,
    started: Condvar,
}

/// Handle on the reaper; clones share it.
#[derive(Clone)]
pub struct Reaper {
    shared: Arc<Shared>,
}

impl Reaper {
    /// Starts the reaping thread. A process has at most one: it reaps *every* child.
    pub fn start() -> io::Result<Reaper> {
        let shared = Arc::new(Shared { table: Mutex::default(), started: Condvar::new() });
        let thread = Arc::clone(&shared);
        std::thread::Builder::new().name("reaper".into()).spawn(move || {
            loop {
                thread.reap_one();
            }
        })?;
        Ok(Reaper { shared })
    }

    /// Starts a child that cannot exit unseen.
    pub fn spawn(&self, command: &mut Command) -> io::Result<Watched> {
        let mut table = self.shared.lock();
        let child = command.spawn()?;
        let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
        Ok(self.watch(&mut table, pid))
    }

    /// The same for a command whose streams are piped: our ends of stdin, stdout and stderr.
    pub fn spawn_with_pipes(&self, command: &mut Command) -> io::Result<(Watched, [Option<OwnedFd>; 3])> {
        let mut table = self.shared.lock();
        let child = command.spawn()?;
        let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
        let streams = [
            child.stdin.map(OwnedFd::from),
            child.stdout.map(OwnedFd::from),
            child.stderr.map(OwnedFd::from),
        ];
        Ok((self.watch(&mut table, pid), streams))
    }

    /// Watches a process that is, or is about to become, a child of this process. The caller
    /// sees to it that it cannot be reaped before this call, e.g. by holding back its parent.
    pub fn adopt(&self, pid: i32) -> Watched {
        let mut table = self.shared.lock();
        self.watch(&mut table, pid)
    }

    /// Sends a signal to a watched process that has not been reaped; `ESRCH` otherwise, also when
    /// its pid is another one's by now.
    pub fn signal(&self, watched: &Watched, signal: i32) -> Result<(), Errno> {
        let _table = self.shared.lock();
        if watched.exit().is_some() {
            return Err(Errno::ESRCH);
        }
        // Real-time signals are welcome too, which nix's enum does not know.
        // SAFETY: kill(2) takes no pointers; the pid is a child that has not been reaped, and will
        // not be while the table is locked.
        Errno::result(unsafe { libc::kill(watched.pid.as_raw(), signal) }).map(drop)
    }

    /// How many processes were reaped that nobody watched.
    pub fn reaped_orphans(&self) -> u64 {
        self.shared.lock().reaped_orphans
    }

    fn watch(&self, table: &mut Table, pid: i32) -> Watched {
        let (sender, exit) = watch::channel(None);
        table.watched.insert(pid, sender);
        self.shared.started.notify_all();
        Watched { pid: Pid::from_raw(pid), exit }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Table> {
        // Nothing in here leaves the table half-changed, so a panic elsewhere does not matter.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // Not nix's calls: of a process that a real-time signal killed they only say EINVAL, and it would be found
    // for ever.
    fn reap_one(&self) {
        // SAFETY: an all-zero siginfo_t is a valid one.
        let mut told: libc::siginfo_t = unsafe { std::mem::zeroed() };
        // SAFETY: waitid fills `told`, which outlives the call.
        let done = unsafe { libc::waitid(libc::P_ALL, 0, &raw mut told, libc::WEXITED | libc::WNOWAIT) };
        match Errno::result(done) {
            // SAFETY: waitid succeeded, so the field of a child's end is the one that is filled.
            Ok(_) => self.reap(unsafe { told.si_pid() }),
            Err(Errno::ECHILD) => {
                // No child, hence nobody's orphan either, until one is started. The limit only
                // guards against a child that was started behind the reaper's back.
                let table = self.lock();
                drop(self.started.wait_timeout(table, Duration::from_millis(200)));
            }
            Err(_) => {}
        }
    }

    fn reap(&self, pid: i32) {
        let mut table = self.lock();
        let mut status = 0;
        // SAFETY: waitpid writes one int, which outlives the call.
        if unsafe { libc::waitpid(pid, &raw mut status, libc::WNOHANG) } != pid {
            // Reaped by whoever started it while the lock was ours to wait for.
            return;
        }
        let exit = match libc::WIFEXITED(status) {
            true => Exit::Code(libc::WEXITSTATUS(status)),
            false => Exit::Signal(libc::WTERMSIG(status)),
        };
        match table.watched.remove(&pid) {
            Some(sender) => drop(sender.send_replace(Some((exit, SystemTime::now())))),
            None => table.reaped_orphans += 1,
        }
    }
}
