//! What can go wrong between a command and its answer.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// QEMU's own refusal of a command.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("QEMU refused `{command}`: {desc} ({class})")]
pub struct CommandError {
    /// The command that was refused.
    pub command: String,
    /// QMP's error class; nearly always `GenericError`.
    pub class: String,
    /// QEMU's text for people.
    pub desc: String,
}

/// A command that has no answer, or a refusal for one.
#[derive(Debug, Clone, thiserror::Error)]
pub enum QmpError {
    /// There is nothing to talk to at the path.
    #[error("cannot connect to the QMP socket {path}: {reason}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The system's error.
        reason: Arc<std::io::Error>,
    },
    /// The peer's first line is not QMP's greeting.
    #[error("the peer on the QMP socket does not speak QMP: {reason}")]
    Greeting {
        /// What came instead.
        reason: String,
    },
    /// QEMU said no.
    #[error(transparent)]
    Refused(#[from] CommandError),
    /// No answer came in time; the command may still take effect.
    #[error("QEMU did not answer `{command}` within {after:?}; its main loop may be blocked, see qemu.log")]
    Timeout {
        /// The command.
        command: String,
        /// How long was waited.
        after: Duration,
    },
    /// The connection ended; the command may or may not have taken effect.
    #[error("the QMP connection is closed: {reason}")]
    Closed {
        /// Why it ended.
        reason: Arc<str>,
    },
    /// The answer is not of the documented shape.
    #[error("QEMU answered `{command}` in a shape that is not known: {reason}")]
    Answer {
        /// The command.
        command: String,
        /// What is missing or wrong.
        reason: String,
    },
}

impl QmpError {
    /// QEMU's refusal, when this is one.
    pub fn refusal(&self) -> Option<&CommandError> {
        match self {
            QmpError::Refused(refusal) => Some(refusal),
            _ => None,
        }
    }
}
