//! Follows the counter's log on both hosts and notes when each line came.

use std::{
    fs::File,
    io::Read,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crate::lab::HostName;

/// How often the files are looked at: the resolution of the gap that the demo reports.
const LOOK: Duration = Duration::from_millis(1);

/// A line of the log.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    /// On whose host.
    pub(super) host: HostName,
    /// When it was there, to about a millisecond.
    pub(super) at: Instant,
    /// Without its end.
    pub(super) text: String,
}

/// Follows until dropped.
pub(super) struct Watch {
    lines: Arc<Mutex<Vec<Seen>>>,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Follows one file for each host, which need not exist yet.
    pub(super) fn start(files: Vec<(HostName, PathBuf)>) -> Watch {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let ended = Arc::new(AtomicBool::new(false));
        let (out, end) = (Arc::clone(&lines), Arc::clone(&ended));
        let thread = thread::spawn(move || {
            let mut tails: Vec<Tail> = files.into_iter().map(|(host, path)| Tail::new(host, path)).collect();
            while !end.load(Ordering::Relaxed) {
                for tail in &mut tails {
                    tail.look(&out);
                }
                thread::sleep(LOOK);
            }
        });
        Watch { lines, ended, thread: Some(thread) }
    }

    /// All lines so far, in the order in which they came.
    pub(super) fn lines(&self) -> Vec<Seen> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How many lines came on `host` so far.
    pub(super) fn count(&self, host: HostName) -> usize {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().filter(|line| line.host == host).count()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Tail {
    host: HostName,
    path: PathBuf,
    file: Option<File>,
    unfinished: Vec<u8>,
}

impl Tail {
    fn new(host: HostName, path: PathBuf) -> Self {
        Self { host, path, file: None, unfinished: Vec::new() }
    }

    fn look(&mut self, out: &Mutex<Vec<Seen>>) {
        if self.file.is_none() {
            self.file = File::open(&self.path).ok();
        }
        let Some(file) = &mut self.file else { return };
        let before = self.unfinished.len();
        // A failed read is repeated at the next look.
        if file.read_to_end(&mut self.unfinished).is_err() || self.unfinished.len() == before {
            return;
        }
        let at = Instant::now();
        let Some(end) = self.unfinished.iter().rposition(|byte| *byte == b'\n') else { return };
        let whole: Vec<u8> = self.unfinished.drain(..=end).collect();
        let mut out = out.lock().unwrap_or_else(PoisonError::into_inner);
        for line in String::from_utf8_lossy(&whole).lines() {
            out.push(Seen { host: self.host, at, text: line.to_owned() });
        }
    }
}
