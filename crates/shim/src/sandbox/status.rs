//! What containerd is told of a task: always answered, also in the middle of a move.

use std::path::PathBuf;

use super::error::SandboxError;
use super::{Machine, Sandbox};
use crate::container;
use crate::process::io::Stdio;
use crate::process::{Exit, State};

/// A task's state in containerd's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Created,
    Running,
    Paused,
    Stopped,
}

/// The answer to State.
#[derive(Debug)]
pub(crate) struct TaskState {
    pub(crate) bundle: PathBuf,
    pub(crate) pid: u32,
    pub(crate) phase: Phase,
    pub(crate) stdio: Stdio,
    pub(crate) exit: Option<Exit>,
}

impl Sandbox {
    pub(crate) fn state(&self, id: &str, exec_id: &str) -> Result<TaskState, SandboxError> {
        let inner = self.inner();
        let container = inner.container(id)?;
        let process = inner.process(id, exec_id)?;
        let machine_runs = matches!(inner.machine, Machine::Running(_));
        let phase = match process.state() {
            State::Terminated => Phase::Stopped,
            // It runs elsewhere; here it can only be deleted.
            _ if container.state == container::State::Away => Phase::Stopped,
            // A destination has it, and does not run it yet.
            _ if container.hold.arriving() => Phase::Created,
            State::Created | State::Starting => Phase::Created,
            State::Running if container.paused || inner.blackout || !machine_runs => Phase::Paused,
            State::Running => Phase::Running,
        };
        Ok(TaskState {
            bundle: process.bundle.clone(),
            pid: process.pid(),
            phase,
            stdio: process.stdio.clone(),
            exit: process.ended(),
        })
    }
}
