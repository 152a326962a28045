//! Ends a shim and everything it started, and knows when that is true.
//!
//! A pid may be used again between looking and killing, so a process is a pid *and* its start
//! time; descendants are noted before the first signal, for nobody finds an orphan's parent.

use std::path::Path;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::time::{Instant, sleep};

/// After SIGTERM.
const GRACE: Duration = Duration::from_secs(3);
/// After SIGKILL.
const GONE: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(20);

/// One process that cannot be mistaken for another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Process {
    pid: i32,
    start: u64,
}

#[derive(Debug, Clone, Copy)]
struct Stat {
    process: Process,
    parent: i32,
    zombie: bool,
}

impl Process {
    /// The process `pid`, while it lives.
    pub(crate) fn find(pid: i32) -> Option<Process> {
        read_stat(pid).filter(|stat| !stat.zombie).map(|stat| stat.process)
    }

    /// Whether it still runs; a zombie does not.
    pub(crate) fn lives(self) -> bool {
        Process::find(self.pid) == Some(self)
    }

    /// Whether its command line holds `word` as an argument of its own.
    pub(crate) fn has_argument(self, word: &str) -> bool {
        let line = std::fs::read(format!("/proc/{}/cmdline", self.pid)).unwrap_or_default();
        self.lives() && line.split(|byte| *byte == 0).any(|argument| argument == word.as_bytes())
    }

    /// Itself and all it started, directly or not.
    fn family(self) -> Vec<Process> {
        let everyone = all();
        let mut family = vec![self];
        let mut next = 0;
        while let Some(parent) = family.get(next).copied() {
            next += 1;
            let children = everyone.iter().filter(|stat| stat.parent == parent.pid).map(|stat| stat.process);
            family.extend(
                children.filter(|child| child.start >= parent.start && *child != parent).collect::<Vec<_>>(),
            );
        }
        family
    }

    fn signal(self, signal: Signal) {
        if self.lives() {
            let _ = kill(Pid::from_raw(self.pid), signal);
        }
    }
}

/// Ends `process` and its descendants: politely, then not. True when none of them lives.
pub(crate) async fn end(process: Process) -> bool {
    let family = process.family();
    process.signal(Signal::SIGTERM);
    if all_gone(&family, GRACE).await {
        return true;
    }
    for member in &family {
        member.signal(Signal::SIGKILL);
    }
    all_gone(&family, GONE).await
}

async fn all_gone(family: &[Process], limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    while family.iter().any(|member| member.lives()) {
        if Instant::now() >= deadline {
            return false;
        }
        sleep(POLL).await;
    }
    true
}

fn all() -> Vec<Stat> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter_map(read_stat)
        .filter(|stat| !stat.zombie)
        .collect()
}

/// proc(5), `/proc/<pid>/stat`: the name is in parentheses and may itself hold some.
fn read_stat(pid: i32) -> Option<Stat> {
    let text = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat")).ok()?;
    let mut fields = text.get(text.rfind(')')? + 1..)?.split_ascii_whitespace();
    let state = fields.next()?;
    let parent = fields.next()?.parse().ok()?;
    // Field 22, counted from 1; state was field 3 and the parent 4.
    let start = fields.nth(17)?.parse().ok()?;
    Some(Stat { process: Process { pid, start }, parent, zombie: matches!(state, "Z" | "X" | "x") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_shell_and_its_child_are_ended_together() {
        // The shell ignores SIGTERM, so the second signal is tried as well.
        let mut shell = std::process::Command::new("sh")
            .args(["-c", "trap '' TERM; sleep 300 & wait; wait"])
            .spawn()
            .unwrap();
        let process = Process::find(shell.id().cast_signed()).unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        // Between its fork and its exec the child still has the shell's arguments.
        let child = loop {
            assert!(Instant::now() < deadline, "the shell started nothing");
            match process.family()[..] {
                [_, child] if child.has_argument("300") => break child,
                _ => sleep(POLL).await,
            }
        };
        assert!(!child.has_argument("30"));
        let ended = end(process).await;
        shell.wait().unwrap();
        assert!(ended);
        assert!(!child.lives());
        assert!(!process.lives());
    }

    #[test]
    fn another_start_time_is_another_process() {
        let me = Process::find(std::process::id().cast_signed()).unwrap();
        assert!(me.lives());
        assert!(!Process { start: me.start + 1, ..me }.lives());
    }
}
