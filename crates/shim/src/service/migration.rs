//! The Migration service: requests are checked for shape and handed to the mover.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use dunlin_migration::refusal::Refusal;
use dunlin_migration::session::{Action, Answer, Call};
use dunlin_wire::handover::ProtocolInfo;
use dunlin_wire::ids::{SandboxId, SessionId};
use dunlin_wire::service;
use dunlin_wire::service_ttrpc::{Migration, create_migration};
use ttrpc::r#async::{ServerStreamSender, Service, TtrpcContext};

use super::status::status;
use crate::sandbox::Sandbox;
use crate::sandbox::moving::{Request, socket};

/// The service for a ttrpc server.
pub(crate) fn services(sandbox: &Arc<Sandbox>) -> HashMap<String, Service> {
    create_migration(Arc::new(MigrationService { sandbox: Arc::clone(sandbox) }))
}

struct MigrationService {
    sandbox: Arc<Sandbox>,
}

impl MigrationService {
    async fn call(
        &self,
        name: &'static str,
        call: Result<Call, Refusal>,
        request: Request,
    ) -> ttrpc::Result<Answer> {
        let answer = match call {
            Ok(call) => self.sandbox.mover.call(call, request).await,
            Err(refusal) => Err(refusal),
        };
        answer.map_err(|refusal| refused(name, refusal))
    }
}

fn refused(call: &'static str, refusal: Refusal) -> ttrpc::Error {
    tracing::warn!(call, error = %refusal, "refused");
    status(&refusal.into())
}

fn session(text: String) -> Result<SessionId, Refusal> {
    SessionId::new(text).map_err(Refusal::from)
}

#[async_trait]
impl Migration for MigrationService {
    async fn prepare_and_export_sandbox(
        &self,
        _: &TtrpcContext,
        req: service::PrepareAndExportSandboxRequest,
    ) -> ttrpc::Result<service::PrepareAndExportSandboxResponse> {
        let call = session(req.session_id).map(|session| Call::PrepareAndExport { session });
        let options = Request::Options(req.init_options.into_option());
        let (config, sandbox_state) = match self.call("PrepareAndExportSandbox", call, options).await? {
            Answer::Exported { config, sandbox_state } => (Some(config), sandbox_state),
            Answer::Empty | Answer::Patched(_) => (None, None),
        };
        Ok(service::PrepareAndExportSandboxResponse {
            config: config.into(),
            sandbox_state: sandbox_state.into(),
            ..Default::default()
        })
    }

    async fn import_sandbox(
        &self,
        _: &TtrpcContext,
        req: service::ImportSandboxRequest,
    ) -> ttrpc::Result<service::ImportSandboxResponse> {
        let call = || {
            let session = session(req.session_id)?;
            let sandbox = SandboxId::new(req.sandbox_id)?;
            let config = req.config.into_option().ok_or_else(|| {
                Refusal::invalid("config: absent; pass what PrepareAndExportSandbox answered on the source")
            })?;
            Ok(Call::Import { session, sandbox, config })
        };
        let images = Request::Images(req.images_socket.clone());
        self.call("ImportSandbox", call(), images).await?;
        Ok(service::ImportSandboxResponse::default())
    }

    async fn prepare_sandbox(
        &self,
        _: &TtrpcContext,
        req: service::PrepareSandboxRequest,
    ) -> ttrpc::Result<service::PrepareSandboxResponse> {
        let call = session(req.session_id).map(|session| Call::PrepareSandbox { session });
        self.call("PrepareSandbox", call, Request::Options(req.init_options.into_option())).await?;
        Ok(service::PrepareSandboxResponse::default())
    }

    async fn transfer_sandbox(
        &self,
        _: &TtrpcContext,
        req: service::TransferSandboxRequest,
    ) -> ttrpc::Result<service::TransferSandboxResponse> {
        let timeout = req.timeout.into_option().unwrap_or_default();
        let timeout = match u64::try_from(timeout.seconds) {
            Ok(seconds) if timeout.nanos >= 0 => {
                Duration::new(seconds, timeout.nanos.unsigned_abs().min(999_999_999))
            }
            _ => Duration::ZERO,
        };
        let call = session(req.session_id).map(|session| Call::Transfer { session, timeout });
        self.call("TransferSandbox", call, Request::None).await?;
        Ok(service::TransferSandboxResponse::default())
    }

    async fn finalize_sandbox(
        &self,
        _: &TtrpcContext,
        req: service::FinalizeSandboxRequest,
    ) -> ttrpc::Result<service::FinalizeSandboxResponse> {
        let call = || {
            let action = Action::from_wire(req.action.value())?;
            let session = session(req.session_id)?;
            let handoff = req.handoff.into_option();
            Ok(Call::Finalize { session, action, destination_stopped: req.destination_stopped, handoff })
        };
        self.call("FinalizeSandbox", call(), Request::None).await?;
        Ok(service::FinalizeSandboxResponse::default())
    }

    async fn notifications(
        &self,
        _: &TtrpcContext,
        req: service::NotificationsRequest,
        stream: ServerStreamSender<service::NotificationsResponse>,
    ) -> ttrpc::Result<()> {
        let subscription = match session(req.session_id) {
            Ok(session) => self.sandbox.mover.subscribe(session, req.after_message_id).await,
            Err(refusal) => Err(refusal),
        };
        let mut subscription = subscription.map_err(|refusal| refused("Notifications", refusal))?;
        while let Some(message) = subscription.next().await {
            stream.send(&message).await?;
        }
        Ok(())
    }

    async fn create_duplicate_socket(
        &self,
        _: &TtrpcContext,
        req: service::CreateDuplicateSocketRequest,
    ) -> ttrpc::Result<service::CreateDuplicateSocketResponse> {
        let fetched = || {
            let handover = ProtocolInfo::parse(&req.protocol_info)
                .map_err(|error| Refusal::invalid(error.to_string()))?;
            let session = session(req.session_id)?;
            Ok((Call::AdoptSocket { session, stream: handover.stream }, handover))
        };
        let (call, request) = match fetched() {
            Ok((call, handover)) => (Ok(call), Request::Socket(socket::fetch(&handover))),
            Err(refusal) => (Err(refusal), Request::None),
        };
        self.call("CreateDuplicateSocket", call, request).await?;
        Ok(service::CreateDuplicateSocketResponse::default())
    }

    async fn cancel(
        &self,
        _: &TtrpcContext,
        req: service::CancelRequest,
    ) -> ttrpc::Result<service::CancelResponse> {
        let call = session(req.session_id).map(|session| Call::Cancel { session });
        self.call("Cancel", call, Request::None).await?;
        Ok(service::CancelResponse::default())
    }

    async fn cleanup(
        &self,
        _: &TtrpcContext,
        req: service::CleanupRequest,
    ) -> ttrpc::Result<service::CleanupResponse> {
        // Before the session goes: a caller that hears nothing asks again.
        let mut warnings = self.sandbox.rebinding.answers().await;
        warnings.extend(self.sandbox.inner().losses.iter().cloned());
        let call = session(req.session_id).map(|session| Call::Cleanup { session });
        self.call("Cleanup", call, Request::None).await?;
        Ok(service::CleanupResponse { warnings, ..Default::default() })
    }
}
