//! Starting a container's init or one of its execs.

use std::sync::Arc;

use containerd_shim_protos::events::task::{TaskExecStarted, TaskStart};
use dunlin_migration::session::TaskCall;

use super::Sandbox;
use super::error::SandboxError;
use crate::container::{INIT, Op, State};
use crate::controller::Transitions;
use crate::hold::Hold;
use crate::process;

/// How a start is to go on.
enum Begin {
    /// In the guest.
    There {
        vm: Arc<crate::vm::Vm>,
        guest_id: String,
        stdio: process::io::Stdio,
        spec: Option<serde_json::Value>,
    },
    /// It ran on the source, and waits for its move: there is nothing to do.
    Arriving { pid: u32 },
}

impl Sandbox {
    /// Starts a container's init, or one of its execs. Gives the guest's pid.
    pub(crate) async fn start(self: &Arc<Self>, id: &str, exec_id: &str) -> Result<u32, SandboxError> {
        let (vm, guest_id, stdio, spec) = match self.begin(id, exec_id)? {
            Begin::There { vm, guest_id, stdio, spec } => (vm, guest_id, stdio, spec),
            Begin::Arriving { pid } => return Ok(pid),
        };
        match vm.start_process(&guest_id, spec, &stdio).await {
            Ok(started) => {
                let pid = started.pid;
                let begun = self
                    .inner()
                    .process_mut(id, exec_id)
                    .and_then(|process| Ok(process.started(pid, started.ports, started.streams)?));
                if let Err(ended) = begun {
                    // It was ended, and maybe deleted too, while the guest started it.
                    let _ = vm.signal(&guest_id, pid, 9).await;
                    return Err(ended);
                }
                if exec_id == INIT {
                    let mut inner = self.inner();
                    let container = inner.container_mut(id)?;
                    let what = container.what();
                    container.state.enter(Op::Started, what)?;
                }
                self.publish_start(id, exec_id, pid);
                self.watch_exit(&vm, guest_id, exec_id.to_owned(), pid);
                Ok(pid)
            }
            Err(error) => {
                if let Ok(process) = self.inner().process_mut(id, exec_id) {
                    process.failed();
                }
                Err(error.into())
            }
        }
    }

    fn begin(&self, id: &str, exec_id: &str) -> Result<Begin, SandboxError> {
        let mut inner = self.inner();
        let container = inner.container(id)?;
        // An orchestrator that makes its tasks through CRI starts each: that is when it believes in them.
        if container.hold == Hold::Patched && container.state == State::Running && exec_id == INIT {
            return Ok(Begin::Arriving { pid: container.init().map_or(0, process::Process::pid) });
        }
        drop(inner);
        self.mover.gate(TaskCall::Start)?;
        inner = self.inner();
        let vm = inner.vm(id)?;
        let container = inner.container_mut(id)?;
        let wanted = if exec_id == INIT { State::Created } else { State::Running };
        if container.state != wanted {
            let state = container.state.name();
            return Err(SandboxError::State { id: id.to_owned(), action: "start", state });
        }
        // What joins a frozen cgroup freezes before it can say that it started.
        if container.paused {
            return Err(SandboxError::State { id: id.to_owned(), action: "start", state: "paused" });
        }
        let guest_id = container.guest_id.clone();
        let process = inner.process_mut(id, exec_id)?;
        // The guest has the init's from the container's spec.
        let spec = process.spec.as_deref().filter(|_| exec_id != INIT);
        let spec = spec.map(serde_json::from_slice).transpose().map_err(|error| SandboxError::Invalid {
            id: id.to_owned(),
            message: format!("the spec of exec {exec_id} is not JSON: {error}"),
        })?;
        process.begin()?;
        Ok(Begin::There { vm, guest_id, stdio: process.stdio.clone(), spec })
    }

    fn publish_start(&self, id: &str, exec_id: &str, pid: u32) {
        if exec_id == INIT {
            self.publisher.publish(&TaskStart { container_id: id.to_owned(), pid, ..TaskStart::default() });
        } else {
            self.publisher.publish(&TaskExecStarted {
                container_id: id.to_owned(),
                exec_id: exec_id.to_owned(),
                pid,
                ..TaskExecStarted::default()
            });
        }
    }
}
