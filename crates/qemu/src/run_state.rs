//! QMP's run states.

use std::fmt;

/// What the machine as a whole is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RunState {
    /// Made, never run.
    Prelaunch,
    /// Waiting for, or loading, an incoming stream.
    InMigrate,
    /// Running.
    Running,
    /// Stopped by `stop`, or loaded and not yet continued.
    Paused,
    /// Stopped for the last part of an outgoing migration.
    FinishMigrate,
    /// Sent away; continuing here makes a second copy.
    PostMigrate,
    /// Powered off or reset by the guest.
    Shutdown,
    /// A device met an I/O error and stopped the machine.
    IoError,
    /// QEMU itself met an error.
    InternalError,
    /// The guest's kernel panicked.
    GuestPanicked,
    /// A state that this version of Dunlin does not know; treat it as a failure.
    Unknown(String),
}

impl From<&str> for RunState {
    fn from(text: &str) -> RunState {
        match text {
            "prelaunch" => RunState::Prelaunch,
            "inmigrate" => RunState::InMigrate,
            "running" => RunState::Running,
            "paused" => RunState::Paused,
            "finish-migrate" => RunState::FinishMigrate,
            "postmigrate" => RunState::PostMigrate,
            "shutdown" => RunState::Shutdown,
            "io-error" => RunState::IoError,
            "internal-error" => RunState::InternalError,
            "guest-panicked" => RunState::GuestPanicked,
            other => RunState::Unknown(other.to_owned()),
        }
    }
}

impl fmt::Display for RunState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            RunState::Prelaunch => "prelaunch",
            RunState::InMigrate => "inmigrate",
            RunState::Running => "running",
            RunState::Paused => "paused",
            RunState::FinishMigrate => "finish-migrate",
            RunState::PostMigrate => "postmigrate",
            RunState::Shutdown => "shutdown",
            RunState::IoError => "io-error",
            RunState::InternalError => "internal-error",
            RunState::GuestPanicked => "guest-panicked",
            RunState::Unknown(other) => other,
        })
    }
}
