//! What a guest does on each request.

use std::time::Duration;

use serde_json::Value;

use crate::hresult::HResult;
use crate::message::{
    ContainerConfig, FilesAnswer, FilesStep, GuestPid, Modification, NegotiateRequest, ProcessExit,
    ProcessParameters, PropertyType, VsockStdioRelaySettings,
};

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The code; hosts act on it.
    pub hresult: HResult,
    /// For people: the thing, the reason, the way out.
    pub message: String,
}

impl Failure {
    /// A failure with a code.
    pub fn new(hresult: HResult, message: impl Into<String>) -> Failure {
        Failure { hresult, message: message.into() }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} [{}]", self.message, self.hresult)
    }
}

impl std::error::Error for Failure {}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Failure {
        Failure::new(HResult::FAIL, error.to_string())
    }
}

/// Which signal ends a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShutdownKind {
    /// SIGTERM.
    Graceful,
    /// SIGKILL.
    Forced,
}

/// What a guest does on each request. Each call runs in a task of its own, so they come concurrently and none may
/// rely on an earlier one having ended. `container` is [`crate::message::UTILITY_VM`] for the VM itself.
pub trait Handler: Send + Sync + 'static {
    /// A host is about to be served: set the clock if it is off. Runs before the host can ask for anything.
    fn negotiated(&self, host: &NegotiateRequest) -> impl Future<Output = ()> + Send;

    /// Create a container; its init is parked.
    fn create(
        &self,
        container: String,
        config: ContainerConfig,
    ) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Nothing in Linux guests beyond a check that the container is known.
    fn start(&self, container: String) -> impl Future<Output = Result<(), Failure>> + Send;

    /// End a container.
    fn shutdown(
        &self,
        container: String,
        kind: ShutdownKind,
    ) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Start the init (no OCI process in the parameters) or another process.
    fn execute(
        &self,
        container: String,
        parameters: ProcessParameters,
        stdio: VsockStdioRelaySettings,
    ) -> impl Future<Output = Result<GuestPid, Failure>> + Send;

    /// The exit once the process has ended and its output is drained; `TIMEOUT` when the time runs out before.
    fn wait(
        &self,
        container: String,
        pid: GuestPid,
        timeout: Option<Duration>,
    ) -> impl Future<Output = Result<ProcessExit, Failure>> + Send;

    /// Send a signal, never 0.
    fn signal(
        &self,
        container: String,
        pid: GuestPid,
        signal: i32,
    ) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Set a terminal's size in characters.
    fn resize(
        &self,
        container: String,
        pid: GuestPid,
        height: u16,
        width: u16,
    ) -> impl Future<Output = Result<(), Failure>> + Send;

    /// The properties asked for, one object; unknown kinds are left out.
    fn properties(
        &self,
        container: String,
        kinds: Vec<PropertyType>,
    ) -> impl Future<Output = Result<Value, Failure>> + Send;

    /// Add, remove or update a resource.
    fn modify(
        &self,
        container: String,
        modification: Modification,
    ) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Put files into the guest, or take them out. `place`: a path in the guest.
    fn files(
        &self,
        place: String,
        step: FilesStep,
    ) -> impl Future<Output = Result<FilesAnswer, Failure>> + Send;

    /// Freeze a container.
    fn pause(&self, container: String) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Thaw a container.
    fn resume(&self, container: String) -> impl Future<Output = Result<(), Failure>> + Send;

    /// What is under way, as text.
    fn dump_stacks(&self) -> impl Future<Output = Result<String, Failure>> + Send;

    /// Remove what is kept of a container.
    fn delete_state(&self, container: String) -> impl Future<Output = Result<(), Failure>> + Send;
}
