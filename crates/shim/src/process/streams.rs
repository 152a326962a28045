//! The tasks that carry a process's streams between the link and this host, and where each stream
//! stands. Holding them for a move's switchover is exact: after it no byte is handed on or read.

use std::fs::File;
use std::io::Read;
use std::sync::{Mutex, PoisonError};

use dunlin_bridge::stdio::{Resume, Sender};
use dunlin_wire::handoff::{InputPosition, StreamPositions};
use tokio::task::JoinHandle;

use super::dam::Dam;
use super::fifos::Unread;

/// Bytes of input that may be under way while a move is prepared: they travel with the handoff.
const INPUT_LIMIT: usize = 4 * 1024;

/// A process's connected streams; they end with this value.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    tasks: Vec<JoinHandle<()>>,
    stdout: Option<Resume>,
    stderr: Option<Resume>,
    stdin: Option<Sender>,
    /// Our write end of the input FIFO.
    stdin_kept: Option<File>,
    /// Its read end.
    stdin_rest: Option<File>,
    /// Keeps its writers out while the streams are held.
    dam: Mutex<Dam>,
    /// Output FIFOs.
    fifos: Vec<File>,
}

/// One of the two outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Output {
    Stdout,
    Stderr,
}

impl Streams {
    pub(crate) fn add_task(&mut self, task: JoinHandle<()>) {
        self.tasks.push(task);
    }

    /// An output that can be resumed at any byte.
    pub(crate) fn set_output(&mut self, output: Output, taken: Resume) {
        match output {
            Output::Stdout => self.stdout = Some(taken),
            Output::Stderr => self.stderr = Some(taken),
        }
    }

    /// An input that can be resumed at any byte, and the FIFO that it reads.
    pub(crate) fn set_input(&mut self, sender: Sender, rest: File) {
        self.stdin = Some(sender);
        self.stdin_rest = Some(rest);
    }

    pub(crate) fn keep_stdin(&mut self, write_end: File) {
        self.stdin_kept = Some(write_end);
    }

    pub(crate) fn keep_fifo(&mut self, fifo: Option<File>) {
        self.fifos.extend(fifo);
    }

    /// No more input will come from this host.
    pub(crate) fn close_stdin(&mut self) {
        self.stdin_kept = None;
    }

    #[cfg(test)]
    pub(crate) fn stdin_is_open(&self) -> bool {
        self.stdin_kept.is_some()
    }

    /// A move begins: little input may be under way. Undone by [`Streams::release`].
    pub(crate) fn narrow(&self) {
        if let Some(sender) = &self.stdin {
            sender.limit(INPUT_LIMIT);
        }
    }

    /// Stops every stream and tells where it stands; what the input FIFO still holds is taken along. None: its writers
    /// could not be kept out, so what they write now would be lost; all is stopped nevertheless.
    pub(crate) fn hold(&self, stdin_closed: bool) -> Option<StreamPositions> {
        let mut whole = true;
        let stdin = self.stdin.as_ref().map(|sender| {
            // Read again below, with what the FIFO holds.
            let _ = sender.hold();
            let mut rest = Vec::new();
            whole = self.rest_of_input(&mut rest);
            sender.append(&rest);
            let position = sender.position();
            InputPosition {
                acknowledged: position.acknowledged,
                pending: position.pending,
                closed: stdin_closed || position.source_ended,
            }
        });
        let (stdout, stderr) =
            (self.stdout.as_ref().and_then(Resume::hold), self.stderr.as_ref().and_then(Resume::hold));
        whole.then_some(StreamPositions { stdout, stderr, stdin })
    }

    /// What the input FIFO holds; from now on it takes no more. False when it may.
    fn rest_of_input(&self, rest: &mut Vec<u8>) -> bool {
        let Some(mut fifo) = self.stdin_rest.as_ref() else { return true };
        match &self.stdin_kept {
            Some(write_end) => {
                self.dam.lock().unwrap_or_else(PoisonError::into_inner).close(fifo, write_end, rest)
            }
            // Its end was told: non-blocking, it ends with "would block", or with 0 when every writer is gone.
            None => {
                let _ = fifo.read_to_end(rest);
                true
            }
        }
    }

    /// The streams go on here. Repeats do nothing.
    pub(crate) fn release(&self) {
        if let Some(fifo) = &self.stdin_rest {
            self.dam.lock().unwrap_or_else(PoisonError::into_inner).open(fifo);
        }
        for output in [&self.stdout, &self.stderr].into_iter().flatten() {
            output.release();
        }
        if let Some(sender) = &self.stdin {
            sender.release();
            sender.limit(dunlin_bridge::stdio::RETAINED);
        }
    }

    /// The process has ended and all its output was taken. What FIFOs hold and nobody has read yet is kept.
    pub(crate) fn finish(mut self) -> Option<Unread> {
        Unread::keep(std::mem::take(&mut self.fifos))
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}
