//! Processes: start, wait, signal, resize.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{RequestBase, ResponseBase, StrJson, is_false};

/// A process's id in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct GuestPid(pub u32);

impl std::fmt::Display for GuestPid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// A wait without an end, milliseconds.
pub const INFINITE_MS: u32 = u32::MAX;

/// ExecuteProcess.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ExecuteProcessRequest {
    #[expect(missing_docs, reason = "the base of every request")]
    #[serde(flatten)]
    pub base: RequestBase,
    /// What to run and how its streams travel.
    pub settings: ExecuteProcessSettings,
}

/// What to run and how its streams travel.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ExecuteProcessSettings {
    /// What to run.
    pub process_parameters: StrJson<ProcessParameters>,
    /// The ports that the guest dials.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_stdio_relay_settings: Option<VsockStdioRelaySettings>,
}

/// The ports that the guest dials for a process's streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct VsockStdioRelaySettings {
    /// Port of the input.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub std_in: Option<u32>,
    /// Port of the output, or of the terminal's one output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub std_out: Option<u32>,
    /// Port of the error output; absent for a terminal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub std_err: Option<u32>,
    /// Dunlin's: the streams speak the protocol of [`crate::stdio`].
    #[serde(default, skip_serializing_if = "is_false")]
    pub resumable: bool,
}

/// What to run.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
#[expect(clippy::struct_excessive_bools, reason = "independent flags of the wire format")]
pub struct ProcessParameters {
    /// OCI process to execute inside the container. None: start the container's init.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oci_process: Option<Value>,
    /// The guest dials the input port.
    #[serde(default, skip_serializing_if = "is_false")]
    pub create_std_in_pipe: bool,
    /// The guest dials the output port.
    #[serde(default, skip_serializing_if = "is_false")]
    pub create_std_out_pipe: bool,
    /// The guest dials the error output port.
    #[serde(default, skip_serializing_if = "is_false")]
    pub create_std_err_pipe: bool,
    /// Of VM processes, split at blanks; `command_args` wins.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub command_line: String,
    /// Of VM processes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub command_args: Vec<String>,
    /// Of VM processes.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub working_directory: String,
    /// Of VM processes.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub environment: BTreeMap<String, String>,
    /// VM processes: allocate a terminal.
    #[serde(default, skip_serializing_if = "is_false")]
    pub emulate_console: bool,
    /// Run in the VM even though a container is named.
    #[serde(rename = "CreateInUtilityVM", default, skip_serializing_if = "is_false")]
    pub create_in_utility_vm: bool,
    /// Height and width in characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console_size: Option<[u16; 2]>,
}

/// Answer to ExecuteProcess.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ExecuteProcessResponse {
    #[expect(missing_docs, reason = "the base of every answer")]
    #[serde(flatten)]
    pub base: ResponseBase,
    /// The process.
    pub process_id: GuestPid,
}

/// WaitForProcess.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct WaitForProcessRequest {
    #[expect(missing_docs, reason = "the base of every request")]
    #[serde(flatten)]
    pub base: RequestBase,
    /// The process.
    pub process_id: GuestPid,
    /// Milliseconds; [`INFINITE_MS`] waits for ever.
    pub timeout_in_ms: u32,
}

/// Answer to WaitForProcess.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct WaitForProcessResponse {
    #[expect(missing_docs, reason = "the base of every answer")]
    #[serde(flatten)]
    pub base: ResponseBase,
    /// The status, or 128 + the signal.
    pub exit_code: u32,
    /// Dunlin's: when the process ended by the guest's clock; nanoseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exited_at_unix_nanos: Option<u64>,
}

impl WaitForProcessResponse {
    /// The answer that says so.
    #[must_use]
    pub fn of(base: ResponseBase, exit: ProcessExit) -> WaitForProcessResponse {
        let since = exit.at.and_then(|at| at.duration_since(UNIX_EPOCH).ok());
        WaitForProcessResponse {
            base,
            exit_code: exit.code,
            exited_at_unix_nanos: since.and_then(|since| u64::try_from(since.as_nanos()).ok()),
        }
    }

    /// What it says.
    #[must_use]
    pub fn exit(&self) -> ProcessExit {
        let since = self.exited_at_unix_nanos.map(Duration::from_nanos);
        ProcessExit { code: self.exit_code, at: since.map(|since| UNIX_EPOCH + since) }
    }
}

/// A process's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessExit {
    /// The status, or 128 + the signal.
    pub code: u32,
    /// When it ended by the guest's clock; None from guests that do not say.
    pub at: Option<SystemTime>,
}

/// SignalProcess.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct SignalProcessRequest {
    #[expect(missing_docs, reason = "the base of every request")]
    #[serde(flatten)]
    pub base: RequestBase,
    /// The process.
    pub process_id: GuestPid,
    /// None is SIGKILL.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub options: Option<SignalOptions>,
}

/// Which signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct SignalOptions {
    /// Linux number; 0 is SIGKILL.
    #[serde(default, skip_serializing_if = "super::is_zero")]
    pub signal: i32,
}

/// ResizeConsole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ResizeConsoleRequest {
    #[expect(missing_docs, reason = "the base of every request")]
    #[serde(flatten)]
    pub base: RequestBase,
    /// The process.
    pub process_id: GuestPid,
    /// Rows.
    pub height: u16,
    /// Columns.
    pub width: u16,
}
