//! Why a host's call on its guest fails.

use std::time::Duration;

use thiserror::Error;

use crate::frame::{FrameError, MAX_FROM_HOST};
use crate::hresult::HResult;
use crate::message::PROTOCOL_VERSION;

/// What a bridge cannot do, and why.
#[derive(Debug, Error)]
pub enum BridgeError {
    /// The guest has answered with a failure.
    #[error("{operation} failed in the guest: {message} [{hresult}]")]
    Guest {
        /// What was asked.
        operation: &'static str,
        /// The guest's code.
        hresult: HResult,
        /// The guest's words.
        message: String,
    },
    /// No answer in time.
    #[error("{operation} was not answered by the guest within {}s; look at the guest's log", after.as_secs())]
    Deadline {
        /// What was asked.
        operation: &'static str,
        /// The time allowed.
        after: Duration,
    },
    /// The bridge has been closed.
    #[error("the bridge to the guest is closed: the VM is being stopped or has moved away")]
    Closed,
    /// The connection broke, or sent what is no frame, before negotiation was through.
    #[error("the connection to the guest broke while negotiating: {0}; the guest will connect again")]
    ConnectionLost(#[source] FrameError),
    /// The guest speaks another version.
    #[error(
        "the guest chose version {version} of the bridge, this host speaks {PROTOCOL_VERSION} only; use the guest image of this release"
    )]
    Version {
        /// The guest's choice.
        version: u32,
    },
    /// The guest's answer is not what was asked for.
    #[error("the guest's answer to {operation} cannot be read: {source}")]
    Answer {
        /// What was asked.
        operation: &'static str,
        /// What is wrong with the answer.
        source: serde_json::Error,
    },
    /// The request cannot be written as JSON.
    #[error("{operation} cannot be written as JSON: {source}")]
    Encode {
        /// What was to be asked.
        operation: &'static str,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// The request is larger than a guest takes.
    #[error(
        "{operation} is {size} bytes, a guest takes at most {MAX_FROM_HOST}; shorten the container's specification"
    )]
    TooLarge {
        /// What was to be asked.
        operation: &'static str,
        /// Its size with the header.
        size: usize,
    },
}

impl BridgeError {
    /// The guest's code, when the guest has answered.
    #[must_use]
    pub fn hresult(&self) -> Option<HResult> {
        match self {
            BridgeError::Guest { hresult, .. } => Some(*hresult),
            _ => None,
        }
    }
}
