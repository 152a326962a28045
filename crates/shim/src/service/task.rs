//! containerd's Task service, versions 2 and 3: one service under two names.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api;
use containerd_shim_protos::shim_async::{Task, create_task};
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::empty::Empty;
use ttrpc::r#async::{Service, TtrpcContext};

use super::status::{status, timestamp};
use super::uncut;
use crate::process::io::Stdio;
use crate::sandbox::error::SandboxError;
use crate::sandbox::{Sandbox, create::NewTask, status::Phase};

const VERSION_2: &str = "containerd.task.v2.Task";
const VERSION_3: &str = "containerd.task.v3.Task";

/// The service for a ttrpc server. Version 3 is version 2 renamed, message for message.
pub(crate) fn services(sandbox: &Arc<Sandbox>) -> HashMap<String, Service> {
    [VERSION_2, VERSION_3]
        .into_iter()
        .filter_map(|name| {
            let service: Arc<dyn Task + Send + Sync> = Arc::new(TaskService { sandbox: Arc::clone(sandbox) });
            Some((name.to_owned(), create_task(service).remove(VERSION_3)?))
        })
        .collect()
}

struct TaskService {
    sandbox: Arc<Sandbox>,
}

fn answer<T>(call: &'static str, id: &str, result: Result<T, SandboxError>) -> ttrpc::Result<T> {
    result.map_err(|error| {
        tracing::warn!(call, id, %error, "refused");
        status(&error)
    })
}

fn wire_status(phase: Phase) -> api::Status {
    match phase {
        Phase::Created => api::Status::CREATED,
        Phase::Running => api::Status::RUNNING,
        Phase::Paused => api::Status::PAUSED,
        Phase::Stopped => api::Status::STOPPED,
    }
}

#[async_trait]
impl Task for TaskService {
    async fn state(&self, _: &TtrpcContext, req: api::StateRequest) -> ttrpc::Result<api::StateResponse> {
        let state = answer("State", &req.id, self.sandbox.state(&req.id, &req.exec_id))?;
        Ok(api::StateResponse {
            id: req.id,
            exec_id: req.exec_id,
            bundle: state.bundle.display().to_string(),
            pid: state.pid,
            status: wire_status(state.phase).into(),
            stdin: state.stdio.stdin,
            stdout: state.stdio.stdout,
            stderr: state.stdio.stderr,
            terminal: state.stdio.terminal,
            exit_status: state.exit.map_or(0, |exit| exit.code),
            exited_at: state.exit.map(|exit| timestamp(exit.at)).into(),
            ..api::StateResponse::default()
        })
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        req: api::CreateTaskRequest,
    ) -> ttrpc::Result<api::CreateTaskResponse> {
        let id = req.id.clone();
        let task = NewTask {
            id: req.id,
            bundle: req.bundle.into(),
            rootfs: req.rootfs,
            stdio: Stdio { stdin: req.stdin, stdout: req.stdout, stderr: req.stderr, terminal: req.terminal },
            checkpoint: req.checkpoint,
        };
        let sandbox = Arc::clone(&self.sandbox);
        let pid = answer("Create", &id, uncut(async move { sandbox.create(task).await }).await)?;
        Ok(api::CreateTaskResponse { pid, ..api::CreateTaskResponse::default() })
    }

    async fn start(&self, _: &TtrpcContext, req: api::StartRequest) -> ttrpc::Result<api::StartResponse> {
        let (sandbox, id, exec) = (Arc::clone(&self.sandbox), req.id.clone(), req.exec_id);
        let pid = answer("Start", &req.id, uncut(async move { sandbox.start(&id, &exec).await }).await)?;
        Ok(api::StartResponse { pid, ..api::StartResponse::default() })
    }

    async fn delete(&self, _: &TtrpcContext, req: api::DeleteRequest) -> ttrpc::Result<api::DeleteResponse> {
        let (sandbox, id, exec) = (Arc::clone(&self.sandbox), req.id.clone(), req.exec_id);
        let deleted = uncut(async move { sandbox.delete(&id, &exec).await }).await;
        let (pid, exit) = answer("Delete", &req.id, deleted)?;
        Ok(api::DeleteResponse {
            pid,
            exit_status: exit.code,
            exited_at: MessageField::some(timestamp(exit.at)),
            ..api::DeleteResponse::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, req: api::PidsRequest) -> ttrpc::Result<api::PidsResponse> {
        let pids = answer("Pids", &req.id, self.sandbox.pids(&req.id).await)?;
        let processes =
            pids.into_iter().map(|pid| api::ProcessInfo { pid, ..api::ProcessInfo::default() }).collect();
        Ok(api::PidsResponse { processes, ..api::PidsResponse::default() })
    }

    async fn pause(&self, _: &TtrpcContext, req: api::PauseRequest) -> ttrpc::Result<Empty> {
        let (sandbox, id) = (Arc::clone(&self.sandbox), req.id.clone());
        answer("Pause", &req.id, uncut(async move { sandbox.pause(&id).await }).await)?;
        Ok(Empty::default())
    }

    async fn resume(&self, _: &TtrpcContext, req: api::ResumeRequest) -> ttrpc::Result<Empty> {
        let (sandbox, id) = (Arc::clone(&self.sandbox), req.id.clone());
        answer("Resume", &req.id, uncut(async move { sandbox.resume(&id).await }).await)?;
        Ok(Empty::default())
    }

    async fn checkpoint(&self, _: &TtrpcContext, req: api::CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        let what =
            "a checkpoint to files (move the running container with `dunlin migrate` instead)".to_owned();
        answer("Checkpoint", &req.id, Err(SandboxError::Unsupported { id: req.id.clone(), what }))
    }

    async fn kill(&self, _: &TtrpcContext, req: api::KillRequest) -> ttrpc::Result<Empty> {
        let (sandbox, id, exec) = (Arc::clone(&self.sandbox), req.id.clone(), req.exec_id);
        let killed = uncut(async move { sandbox.kill(&id, &exec, req.signal, req.all).await }).await;
        answer("Kill", &req.id, killed)?;
        Ok(Empty::default())
    }

    async fn exec(&self, _: &TtrpcContext, req: api::ExecProcessRequest) -> ttrpc::Result<Empty> {
        let stdio =
            Stdio { stdin: req.stdin, stdout: req.stdout, stderr: req.stderr, terminal: req.terminal };
        let spec = req.spec.into_option().unwrap_or_default().value;
        answer("Exec", &req.id, self.sandbox.exec(&req.id, req.exec_id, stdio, &spec))?;
        Ok(Empty::default())
    }

    async fn resize_pty(&self, _: &TtrpcContext, req: api::ResizePtyRequest) -> ttrpc::Result<Empty> {
        let resized = self.sandbox.resize(&req.id, &req.exec_id, req.width, req.height).await;
        answer("ResizePty", &req.id, resized)?;
        Ok(Empty::default())
    }

    async fn close_io(&self, _: &TtrpcContext, req: api::CloseIORequest) -> ttrpc::Result<Empty> {
        if req.stdin {
            answer("CloseIO", &req.id, self.sandbox.close_stdin(&req.id, &req.exec_id).await)?;
        }
        Ok(Empty::default())
    }

    async fn update(&self, _: &TtrpcContext, req: api::UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let resources = req.resources.into_option().unwrap_or_default().value;
        answer("Update", &req.id, self.sandbox.update(&req.id, &resources).await)?;
        Ok(Empty::default())
    }

    async fn wait(&self, _: &TtrpcContext, req: api::WaitRequest) -> ttrpc::Result<api::WaitResponse> {
        let exit = answer("Wait", &req.id, self.sandbox.wait(&req.id, &req.exec_id).await)?;
        Ok(api::WaitResponse {
            exit_status: exit.code,
            exited_at: MessageField::some(timestamp(exit.at)),
            ..api::WaitResponse::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, req: api::StatsRequest) -> ttrpc::Result<api::StatsResponse> {
        let stats: Any = answer("Stats", &req.id, self.sandbox.stats(&req.id).await)?;
        Ok(api::StatsResponse { stats: MessageField::some(stats), ..api::StatsResponse::default() })
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        req: api::ConnectRequest,
    ) -> ttrpc::Result<api::ConnectResponse> {
        Ok(api::ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: self.sandbox.state(&req.id, "").map_or(0, |state| state.pid),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..api::ConnectResponse::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, req: api::ShutdownRequest) -> ttrpc::Result<Empty> {
        self.sandbox.shutdown_if_empty(req.now);
        Ok(Empty::default())
    }
}
