//! What only the Sandbox API knows of a sandbox.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use protobuf::well_known_types::any::Any;
use tokio::sync::watch;

use super::{Ended, KILLED};
use crate::config::Config;

/// What CreateSandbox said.
#[derive(Debug)]
pub(super) struct Made {
    pub(super) at: SystemTime,
    pub(super) bundle: PathBuf,
    pub(super) options: Option<Any>,
    pub(super) annotations: HashMap<String, String>,
    pub(super) netns_path: String,
    /// The host's, with what the sandbox's annotations change.
    pub(super) config: Config,
    pub(super) stopped: bool,
}

/// What only the Sandbox API knows of a sandbox.
#[derive(Debug)]
pub(crate) struct Record {
    pub(super) born: SystemTime,
    pub(super) made: Mutex<Option<Made>>,
    pub(super) ended: watch::Sender<Option<Ended>>,
    /// StopSandbox has taken the machine and says itself when it is gone.
    pub(super) stopping: AtomicBool,
    /// The machine has died; whoever saw it says so as soon as its tasks' ends are this host's to tell.
    pub(super) dying: AtomicBool,
}

impl Record {
    pub(crate) fn new() -> Record {
        Record {
            born: SystemTime::now(),
            made: Mutex::new(None),
            ended: watch::Sender::new(None),
            stopping: AtomicBool::new(false),
            dying: AtomicBool::new(false),
        }
    }

    /// The machine is the Sandbox API's to end: it outlives its last container.
    pub(crate) fn holds_machine(&self) -> bool {
        self.made().as_ref().is_some_and(|made| !made.stopped)
    }

    /// Only ShutdownSandbox ends the shim: whoever stopped the sandbox asks for its status yet.
    pub(crate) fn holds_shim(&self) -> bool {
        self.made().is_some()
    }

    /// The network namespace that CreateSandbox named.
    pub(in crate::sandbox) fn netns_path(&self) -> Option<String> {
        let made = self.made();
        made.as_ref().map(|made| made.netns_path.clone()).filter(|path| !path.is_empty())
    }

    /// The first end counts.
    pub(crate) fn end(&self, code: u32) {
        self.ended.send_if_modified(|ended| {
            let first = ended.is_none();
            if first {
                *ended = Some(Ended { code, at: SystemTime::now() });
            }
            first
        });
    }

    /// The machine is gone, by itself; whether the sandbox has ended is not known yet.
    pub(in crate::sandbox) fn dies(&self) {
        self.dying.store(true, Ordering::Relaxed);
    }

    /// And it has.
    pub(in crate::sandbox) fn died(&self) {
        self.end(KILLED);
        self.dying.store(false, Ordering::Relaxed);
    }

    /// What CreateSandbox said of the sandbox; empty without one.
    pub(crate) fn annotations(&self) -> BTreeMap<String, String> {
        let made = self.made();
        made.iter().flat_map(|made| made.annotations.clone()).collect()
    }

    pub(super) fn made(&self) -> MutexGuard<'_, Option<Made>> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
