//! Container operations, each carried out by a short-lived process of its own.
//!
//! libcontainer forks, changes namespaces and waits for children as if it were the only code in the
//! process. PID 1 has threads and a reaper, so it never calls it: it starts itself again as
//! `dunlin-guest oci` and talks to that process over fd 3.
//!
//! ```text
//!  PID 1                          dunlin-guest oci                  container's process
//!    │ spawn, request line ──────────>│
//!    │                                │── libcontainer: create / exec ──>│
//!    │<────────────── answer {pid} ───│                                  │
//!    │ reaper.adopt(pid)              │ (waits)                          │
//!    │ one byte ─────────────────────>│ exits                            │
//!    │<──────────────────── re-parented to PID 1 ────────────────────────│
//! ```
//!
//! The process stays a child (or zombie) of the short-lived one until the byte arrives, so PID 1
//! cannot reap it before it knows its pid.

pub mod client;
pub mod helper;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Where libcontainer keeps each container's state.
pub const STATE_ROOT: &str = "/run/dunlin/oci";

/// The control socket's descriptor in the short-lived process.
pub const CONTROL_FD: i32 = 3;

/// One operation, as a line of JSON on [`CONTROL_FD`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Create a container from a bundle and leave its init parked before the exec.
    Create {
        /// The container's id.
        id: String,
        /// Directory with `config.json`.
        bundle: PathBuf,
        /// Unix socket that takes the pty's master; present exactly when the spec has a terminal.
        console: Option<PathBuf>,
    },
    /// Let a created container's init go on to its exec.
    Start {
        /// The container's id.
        id: String,
    },
    /// Start a further process in a running container.
    Exec {
        /// The container's id.
        id: String,
        /// File with the OCI process document.
        process: PathBuf,
        /// As in `Create`.
        console: Option<PathBuf>,
    },
}

/// The answer, as a line of JSON on [`CONTROL_FD`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// A process exists; it is handed over when PID 1 sends one byte.
    Process {
        /// Its pid in PID 1's namespace.
        pid: i32,
    },
    /// Done, and no process came of it.
    Done,
    /// Not done.
    Failed {
        /// Why, with all causes.
        error: String,
    },
}
