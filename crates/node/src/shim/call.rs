//! Calls to a shim's Migration service, each with its deadline.

use std::path::PathBuf;
use std::time::Duration;

use dunlin_migration::session::ALREADY_RESUMED;
use dunlin_wire::handover::{ProtocolInfo, Stream};
use dunlin_wire::service::{
    CancelRequest, CleanupRequest, CreateDuplicateSocketRequest, FinalizeAction, FinalizeSandboxRequest,
    ImportSandboxRequest, InitializeOptions, MemoryTransferThrottleParams, MemoryTransport,
    NotificationsRequest, NotificationsResponse, PrepareAndExportSandboxRequest, PrepareSandboxRequest,
    TransferSandboxRequest,
};
use dunlin_wire::service_ttrpc::MigrationClient;
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use ttrpc::r#async::{Client, ClientStreamReceiver};
use ttrpc::context;

use super::ShimHome;

/// Calls that only change a shim's records.
const SHORT: Duration = Duration::from_secs(15);
/// A shim waits for its guest's answers before it forgets a session, for 30 s at most.
const CLEANUP: Duration = Duration::from_secs(45);
/// Calls that start, stop or re-attach a virtual machine.
const LONG: Duration = Duration::from_secs(150);
/// Connecting to a unix socket of this host.
const CONNECT: Duration = Duration::from_secs(5);

/// Why a shim could not be asked, or what it answered.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ShimError {
    /// No address file.
    #[error(
        "there is no shim for sandbox `{sandbox}`: {path} holds no address; does `state_dir` in the node's configuration equal the shim's own?"
    )]
    NoAddress {
        /// The sandbox.
        sandbox: String,
        /// The directory that was looked into.
        path: PathBuf,
    },
    /// Nobody listens.
    #[error("the shim of sandbox `{sandbox}` does not answer on {address}: {reason}; see shim.log in {path}")]
    Connect {
        /// The sandbox.
        sandbox: String,
        /// The address.
        address: String,
        /// The transport's words.
        reason: String,
        /// Its directory.
        path: PathBuf,
    },
    /// It answered with an error.
    #[error("the shim of sandbox `{sandbox}` refused {call}: {reason}")]
    Refused {
        /// The sandbox.
        sandbox: String,
        /// The method.
        call: &'static str,
        /// Its words.
        reason: String,
        /// It does not know the session.
        no_session: bool,
    },
    /// It did not answer in time, or the connection broke.
    #[error("the shim of sandbox `{sandbox}` gave no answer to {call}: {reason}; see shim.log in {path}")]
    NoAnswer {
        /// The sandbox.
        sandbox: String,
        /// The method.
        call: &'static str,
        /// The transport's words.
        reason: String,
        /// Its directory.
        path: PathBuf,
    },
}

impl ShimError {
    /// The shim is there and has no such session.
    pub(crate) fn is_no_session(&self) -> bool {
        matches!(self, ShimError::Refused { no_session: true, .. })
    }

    /// It was told to run before, and did.
    pub(crate) fn is_resumed(&self) -> bool {
        matches!(self, ShimError::Refused { reason, .. } if reason.contains(ALREADY_RESUMED))
    }

    /// Whether what was asked may have been done, or be done later.
    pub(crate) fn is_silence(&self) -> bool {
        matches!(self, ShimError::NoAnswer { .. })
    }
}

/// A connection to one shim, for one session.
#[derive(Clone)]
pub(crate) struct Shim {
    client: MigrationClient,
    session: String,
    home: ShimHome,
}

impl std::fmt::Debug for Shim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shim")
            .field("session", &self.session)
            .field("home", &self.home)
            .finish_non_exhaustive()
    }
}

impl Shim {
    /// Connects to the shim that `home` names.
    pub(crate) async fn connect(home: &ShimHome, session: &str) -> Result<Shim, ShimError> {
        let address = home.address().ok_or_else(|| ShimError::NoAddress {
            sandbox: home.sandbox().into(),
            path: home.path().into(),
        })?;
        let failed = |reason: String| ShimError::Connect {
            sandbox: home.sandbox().into(),
            address: address.clone(),
            reason,
            path: home.path().into(),
        };
        let client = tokio::time::timeout(CONNECT, Client::connect(&address))
            .await
            .map_err(|_| failed(format!("no connection within {} s", CONNECT.as_secs())))?
            .map_err(|error| failed(error.to_string()))?;
        Ok(Shim { client: MigrationClient::new(client), session: session.into(), home: home.clone() })
    }

    /// Source: freezes and hands out the saved state.
    pub(crate) async fn export(
        &self,
        downtime_limit_ms: u32,
        copy_shared_disks: bool,
    ) -> Result<Any, ShimError> {
        let options = InitializeOptions { copy_shared_disks, ..options(downtime_limit_ms) };
        let request = PrepareAndExportSandboxRequest {
            session_id: self.session.clone(),
            init_options: MessageField::some(options),
            ..Default::default()
        };
        let answer = self.client.prepare_and_export_sandbox(context::with_duration(LONG), &request).await;
        Ok(self.done("PrepareAndExportSandbox", answer)?.config.unwrap_or_default())
    }

    /// Destination: hands in the saved state. `images`: where this node serves images.
    pub(crate) async fn import(&self, config: Any, images: &std::path::Path) -> Result<(), ShimError> {
        let request = ImportSandboxRequest {
            session_id: self.session.clone(),
            sandbox_id: self.home.sandbox().into(),
            config: MessageField::some(config),
            images_socket: images.display().to_string(),
            ..Default::default()
        };
        let answer = self.client.import_sandbox(context::with_duration(LONG), &request).await;
        self.done("ImportSandbox", answer).map(drop)
    }

    /// Destination: makes the machine that will receive.
    pub(crate) async fn prepare(&self, downtime_limit_ms: u32) -> Result<(), ShimError> {
        let request = PrepareSandboxRequest {
            session_id: self.session.clone(),
            init_options: MessageField::some(options(downtime_limit_ms)),
            ..Default::default()
        };
        let answer = self.client.prepare_sandbox(context::with_duration(LONG), &request).await;
        self.done("PrepareSandbox", answer).map(drop)
    }

    /// Both: gives the shim its own copy of descriptor `fd` of this process. The caller keeps
    /// `fd` open until this returns.
    pub(crate) async fn hand_over(
        &self,
        fd: std::os::fd::BorrowedFd<'_>,
        stream: Stream,
    ) -> Result<(), ShimError> {
        use std::os::fd::AsRawFd;
        let pid = std::process::id().cast_signed();
        let info = ProtocolInfo { pid, fd: fd.as_raw_fd(), stream };
        let request = CreateDuplicateSocketRequest {
            session_id: self.session.clone(),
            protocol_info: info.to_bytes(),
            ..Default::default()
        };
        let answer = self.client.create_duplicate_socket(context::with_duration(SHORT), &request).await;
        self.done("CreateDuplicateSocket", answer).map(drop)
    }

    /// Both: lets the transfer begin; `timeout` bounds the shim's wait for its socket.
    pub(crate) async fn transfer(&self, timeout: Duration) -> Result<(), ShimError> {
        let timeout = protobuf::well_known_types::duration::Duration {
            seconds: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            nanos: timeout.subsec_nanos().cast_signed(),
            ..Default::default()
        };
        let request = TransferSandboxRequest {
            session_id: self.session.clone(),
            timeout: MessageField::some(timeout),
            ..Default::default()
        };
        let answer = self.client.transfer_sandbox(context::with_duration(SHORT), &request).await;
        self.done("TransferSandbox", answer).map(drop)
    }

    /// Both: this side runs from now on. `destination_stopped` vouches, on a source whose
    /// transfer completed, that the destination cannot run. `handoff`, for a destination: what the
    /// source told with its DONE.
    pub(crate) async fn resume(
        &self,
        destination_stopped: bool,
        handoff: Option<Any>,
    ) -> Result<(), ShimError> {
        self.finalize(FinalizeAction::FINALIZE_ACTION_RESUME, destination_stopped, handoff).await
    }

    /// Both: this side stops for good.
    pub(crate) async fn stop(&self) -> Result<(), ShimError> {
        self.finalize(FinalizeAction::FINALIZE_ACTION_STOP, false, None).await
    }

    async fn finalize(
        &self,
        action: FinalizeAction,
        destination_stopped: bool,
        handoff: Option<Any>,
    ) -> Result<(), ShimError> {
        let request = FinalizeSandboxRequest {
            session_id: self.session.clone(),
            action: action.into(),
            destination_stopped,
            handoff: handoff.into(),
            ..Default::default()
        };
        let answer = self.client.finalize_sandbox(context::with_duration(LONG), &request).await;
        self.done("FinalizeSandbox", answer).map(drop)
    }

    /// Both: stops moving.
    pub(crate) async fn cancel(&self) -> Result<(), ShimError> {
        let request = CancelRequest { session_id: self.session.clone(), ..Default::default() };
        let answer = self.client.cancel(context::with_duration(LONG), &request).await;
        self.done("Cancel", answer).map(drop)
    }

    /// Both: forgets the session. Answers what a destination was not able to do though it runs.
    pub(crate) async fn cleanup(&self) -> Result<Vec<String>, ShimError> {
        let request = CleanupRequest { session_id: self.session.clone(), ..Default::default() };
        let answer = self.client.cleanup(context::with_duration(CLEANUP), &request).await;
        self.done("Cleanup", answer).map(|answer| answer.warnings)
    }

    /// Both: what happens after the notification `after`, or from the first one on with 0. The stream has no
    /// deadline of its own; the phase that waits for it has.
    pub(crate) async fn notifications(
        &self,
        after: u32,
    ) -> Result<ClientStreamReceiver<NotificationsResponse>, ShimError> {
        let request = NotificationsRequest {
            session_id: self.session.clone(),
            after_message_id: Some(after),
            ..Default::default()
        };
        let opening = self.client.notifications(context::Context::default(), &request);
        match tokio::time::timeout(SHORT, opening).await {
            Ok(answer) => self.done("Notifications", answer),
            Err(_) => Err(self.silent("Notifications", format!("nothing within {} s", SHORT.as_secs()))),
        }
    }

    fn done<T>(&self, call: &'static str, answer: ttrpc::Result<T>) -> Result<T, ShimError> {
        answer.map_err(|error| match error {
            ttrpc::Error::RpcStatus(status) => {
                // Calls that name a session answer InvalidArgument when it is another's; theirs is
                // the only argument that could be wrong.
                let names_session =
                    !matches!(call, "PrepareAndExportSandbox" | "ImportSandbox" | "CreateDuplicateSocket");
                let no_session = names_session && status.code() == ttrpc::Code::INVALID_ARGUMENT;
                ShimError::Refused {
                    sandbox: self.home.sandbox().into(),
                    call,
                    reason: status.message,
                    no_session,
                }
            }
            error => self.silent(call, error.to_string()),
        })
    }

    fn silent(&self, call: &'static str, reason: String) -> ShimError {
        ShimError::NoAnswer {
            sandbox: self.home.sandbox().into(),
            call,
            reason,
            path: self.home.path().into(),
        }
    }
}

/// Options of both sides; a limit of zero leaves the choice to the shim.
fn options(downtime_limit_ms: u32) -> InitializeOptions {
    let throttle = MemoryTransferThrottleParams {
        target_blackout_transfer_time: Some(downtime_limit_ms),
        ..Default::default()
    };
    InitializeOptions {
        memory_transport: MemoryTransport::MEMORY_TRANSPORT_TCP.into(),
        memory_transfer_throttle_params: (downtime_limit_ms > 0).then_some(throttle).into(),
        ..Default::default()
    }
}
