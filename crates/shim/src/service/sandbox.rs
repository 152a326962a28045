//! containerd's Sandbox service, version 1.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use containerd_shim_protos::sandbox_api as api;
use containerd_shim_protos::sandbox_async::{Sandbox as SandboxCalls, create_sandbox};
use containerd_shim_protos::types::platform::Platform;
use protobuf::MessageField;
use ttrpc::r#async::{Service, TtrpcContext};

use super::status::{status, timestamp};
use super::uncut;
use crate::sandbox::Sandbox;
use crate::sandbox::api::NewSandbox;
use crate::sandbox::error::SandboxError;

/// The service for a ttrpc server.
pub(crate) fn services(sandbox: &Arc<Sandbox>) -> HashMap<String, Service> {
    create_sandbox(Arc::new(SandboxService { sandbox: Arc::clone(sandbox) }))
}

struct SandboxService {
    sandbox: Arc<Sandbox>,
}

impl SandboxService {
    /// The sandbox, when it is the one that is asked for.
    fn of(&self, call: &'static str, id: &str) -> ttrpc::Result<&Arc<Sandbox>> {
        answer(call, self.sandbox.is_sandbox(id))?;
        Ok(&self.sandbox)
    }
}

fn answer<T>(call: &'static str, result: Result<T, SandboxError>) -> ttrpc::Result<T> {
    result.map_err(|error| {
        tracing::warn!(call, %error, "refused");
        status(&error)
    })
}

/// The processor's name as Go knows it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

#[async_trait]
impl SandboxCalls for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        req: api::CreateSandboxRequest,
    ) -> ttrpc::Result<api::CreateSandboxResponse> {
        let new = NewSandbox {
            id: req.sandbox_id,
            bundle: req.bundle_path.into(),
            rootfs: !req.rootfs.is_empty(),
            options: req.options.into_option(),
            netns_path: req.netns_path,
            annotations: req.annotations,
        };
        answer("CreateSandbox", self.sandbox.create_sandbox(new))?;
        Ok(api::CreateSandboxResponse::default())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        req: api::StartSandboxRequest,
    ) -> ttrpc::Result<api::StartSandboxResponse> {
        let sandbox = self.of("StartSandbox", &req.sandbox_id)?;
        let sandbox = Arc::clone(sandbox);
        let started = answer("StartSandbox", uncut(async move { sandbox.start_sandbox().await }).await)?;
        Ok(api::StartSandboxResponse {
            pid: started.pid,
            created_at: MessageField::some(timestamp(started.created_at)),
            ..api::StartSandboxResponse::default()
        })
    }

    async fn platform(
        &self,
        _: &TtrpcContext,
        req: api::PlatformRequest,
    ) -> ttrpc::Result<api::PlatformResponse> {
        self.of("Platform", &req.sandbox_id)?;
        let platform = Platform {
            os: "linux".to_owned(),
            architecture: architecture().to_owned(),
            ..Platform::default()
        };
        Ok(api::PlatformResponse {
            platform: MessageField::some(platform),
            ..api::PlatformResponse::default()
        })
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        req: api::StopSandboxRequest,
    ) -> ttrpc::Result<api::StopSandboxResponse> {
        let sandbox = self.of("StopSandbox", &req.sandbox_id)?;
        let timeout = Duration::from_secs(req.timeout_secs.into());
        answer("StopSandbox", sandbox.stop_sandbox(timeout).await)?;
        Ok(api::StopSandboxResponse::default())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        req: api::WaitSandboxRequest,
    ) -> ttrpc::Result<api::WaitSandboxResponse> {
        let sandbox = self.of("WaitSandbox", &req.sandbox_id)?;
        let ended = answer("WaitSandbox", sandbox.wait_sandbox().await)?;
        Ok(api::WaitSandboxResponse {
            exit_status: ended.code,
            exited_at: MessageField::some(timestamp(ended.at)),
            ..api::WaitSandboxResponse::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        req: api::SandboxStatusRequest,
    ) -> ttrpc::Result<api::SandboxStatusResponse> {
        let status = self.of("SandboxStatus", &req.sandbox_id)?.sandbox_status(req.verbose);
        Ok(api::SandboxStatusResponse {
            sandbox_id: req.sandbox_id,
            pid: status.pid,
            state: status.standing.cri_state().to_owned(),
            info: status.info.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
            created_at: MessageField::some(timestamp(status.created_at)),
            exited_at: status.ended.map(|ended| timestamp(ended.at)).into(),
            // Who moves the sandbox passes them on.
            extra: status.options.into(),
            ..api::SandboxStatusResponse::default()
        })
    }

    async fn ping_sandbox(
        &self,
        _: &TtrpcContext,
        req: api::PingRequest,
    ) -> ttrpc::Result<api::PingResponse> {
        answer("PingSandbox", self.of("PingSandbox", &req.sandbox_id)?.ping_sandbox())?;
        Ok(api::PingResponse::default())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        req: api::ShutdownSandboxRequest,
    ) -> ttrpc::Result<api::ShutdownSandboxResponse> {
        self.of("ShutdownSandbox", &req.sandbox_id)?.shutdown_sandbox().await;
        Ok(api::ShutdownSandboxResponse::default())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        req: api::SandboxMetricsRequest,
    ) -> ttrpc::Result<api::SandboxMetricsResponse> {
        let figures =
            answer("SandboxMetrics", self.of("SandboxMetrics", &req.sandbox_id)?.sandbox_metrics())?;
        let mut response = api::SandboxMetricsResponse::default();
        let metric = response.metrics.mut_or_insert_default();
        metric.timestamp = MessageField::some(timestamp(SystemTime::now()));
        metric.id = req.sandbox_id;
        metric.data = MessageField::some(figures);
        Ok(response)
    }
}
