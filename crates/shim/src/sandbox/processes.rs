//! What containerd asks of a container's processes.

use containerd_shim_protos::events::task::{TaskExecAdded, TaskPaused, TaskResumed};
use dunlin_migration::session::TaskCall;
use protobuf::well_known_types::any::Any;

use super::error::{Code, SandboxError};
use super::{Machine, Sandbox, exits};
use crate::container::{INIT, State, limits};
use crate::controller::Transitions;
use crate::process::io::Stdio;
use crate::process::{self, Exit, Process};
use crate::vm::stats;

const SIGKILL: u32 = 9;
/// Between two looks at whether the guest still stands still for a move.
const BLACKOUT_LOOK: std::time::Duration = std::time::Duration::from_millis(20);

impl Sandbox {
    /// Adds an exec; it starts with Start. `spec`: its OCI process, JSON.
    pub(crate) fn exec(
        &self,
        id: &str,
        exec_id: String,
        stdio: Stdio,
        spec: &[u8],
    ) -> Result<(), SandboxError> {
        self.mover.gate(TaskCall::Exec)?;
        stdio.check()?;
        let invalid = |message: String| SandboxError::Invalid { id: id.to_owned(), message };
        if exec_id.is_empty() || exec_id == id {
            return Err(invalid(format!("{exec_id:?} is no id for an exec; choose another")));
        }
        let mut spec: serde_json::Value = serde_json::from_slice(spec)
            .map_err(|error| invalid(format!("the exec's spec is not JSON: {error}")))?;
        let Some(object) = spec.as_object_mut() else {
            return Err(invalid("the exec's spec is not an OCI process".to_owned()));
        };
        object.insert("terminal".to_owned(), stdio.terminal.into());
        let mut inner = self.inner();
        inner.vm(id)?;
        let container = inner.container_mut(id)?;
        if container.state != State::Running {
            let state = container.state.name();
            return Err(SandboxError::State { id: id.to_owned(), action: "exec in it", state });
        }
        if container.processes.contains_key(&exec_id) {
            return Err(SandboxError::ProcessExists { id: id.to_owned(), exec_id });
        }
        let process = Process::new(
            exec_id.clone(),
            container.bundle.clone(),
            stdio,
            Some(spec.to_string().into_bytes()),
        );
        container.processes.insert(exec_id.clone(), process);
        drop(inner);
        self.publisher.publish(&TaskExecAdded {
            container_id: id.to_owned(),
            exec_id,
            ..TaskExecAdded::default()
        });
        Ok(())
    }

    /// Sends a signal; `all` to every process of the container. One that was never started just ends.
    pub(crate) async fn kill(
        &self,
        id: &str,
        exec_id: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), SandboxError> {
        self.mover.gate(TaskCall::Kill)?;
        if !(1..=64).contains(&signal) {
            let message = format!("{signal} is not a signal's number, 1 to 64");
            return Err(SandboxError::Invalid { id: id.to_owned(), message });
        }
        if all && exec_id != INIT {
            let message = "all processes are killed through the init, not through an exec".to_owned();
            return Err(SandboxError::Invalid { id: id.to_owned(), message });
        }
        let (vm, guest_id, pids) = {
            let inner = self.inner();
            let container = inner.container(id)?;
            let process = inner.process(id, exec_id)?;
            match process.state() {
                process::State::Created | process::State::Starting => {
                    drop(inner);
                    self.report_exit(id, exec_id, Exit { code: 128 + signal, ..exits::killed() });
                    return Ok(());
                }
                process::State::Terminated => {
                    return Err(SandboxError::ProcessGone { id: id.to_owned(), exec_id: exec_id.to_owned() });
                }
                process::State::Running => {}
            }
            let others = container.processes.values().filter(|process| all || process.exec_id == exec_id);
            let pids: Vec<u32> = others
                .filter(|process| process.state() == process::State::Running)
                .map(Process::pid)
                .collect();
            (inner.vm(id)?, container.guest_id.clone(), pids)
        };
        let mut delivered = false;
        for pid in pids {
            match vm.signal(&guest_id, pid, signal).await {
                Ok(there) => delivered |= there,
                // What can be ended by nothing else must end by this: so does a machine whose guest hears nothing.
                Err(error)
                    if signal == SIGKILL && exec_id == INIT && error.code() == Code::DeadlineExceeded =>
                {
                    tracing::error!(id, %error, "the guest does not answer: the machine is ended");
                    vm.qemu.kill();
                    return Ok(());
                }
                Err(error) => return Err(error.into()),
            }
        }
        // A frozen process takes SIGKILL only when it is thawed.
        if signal == SIGKILL && delivered && self.inner().container(id)?.paused {
            self.resume(id).await?;
        }
        if delivered {
            Ok(())
        } else {
            Err(SandboxError::ProcessGone { id: id.to_owned(), exec_id: exec_id.to_owned() })
        }
    }

    /// Waits for a process's end.
    pub(crate) async fn wait(&self, id: &str, exec_id: &str) -> Result<Exit, SandboxError> {
        let mut exits = self.inner().process(id, exec_id)?.exits();
        if let Ok(exit) = exits.wait_for(Option::is_some).await
            && let Some(exit) = *exit
        {
            return Ok(exit);
        }
        // The process is gone without an end that this host knows of.
        let inner = self.inner();
        match &inner.machine {
            Machine::MovedAway { session } => {
                Err(SandboxError::MovedAway { id: id.to_owned(), session: session.clone() })
            }
            _ => Err(SandboxError::NoProcess { id: id.to_owned(), exec_id: exec_id.to_owned() }),
        }
    }

    /// The guest's pids of the container.
    pub(crate) async fn pids(&self, id: &str) -> Result<Vec<u32>, SandboxError> {
        self.mover.gate(TaskCall::Pids)?;
        let (vm, guest_id) = self.running(id)?;
        Ok(vm.pids(&guest_id).await?)
    }

    /// Makes a running process's terminal another size, in characters.
    pub(crate) async fn resize(
        &self,
        id: &str,
        exec_id: &str,
        width: u32,
        height: u32,
    ) -> Result<(), SandboxError> {
        self.mover.gate(TaskCall::ResizePty)?;
        let (vm, guest_id, pid) = {
            let inner = self.inner();
            let process = inner.process(id, exec_id)?;
            if !process.stdio.terminal {
                let message = format!("process {exec_id:?} has no terminal to resize");
                return Err(SandboxError::Invalid { id: id.to_owned(), message });
            }
            match process.state() {
                process::State::Running => {}
                process::State::Terminated => {
                    return Err(SandboxError::ProcessGone { id: id.to_owned(), exec_id: exec_id.to_owned() });
                }
                other @ (process::State::Created | process::State::Starting) => {
                    let (action, state) = ("resize its terminal", other.name());
                    return Err(SandboxError::State { id: id.to_owned(), action, state });
                }
            }
            (inner.vm(id)?, inner.container(id)?.guest_id.clone(), process.pid())
        };
        let cells = |number: u32| u16::try_from(number).unwrap_or(u16::MAX);
        Ok(vm.resize(&guest_id, pid, cells(width), cells(height)).await?)
    }

    /// No more input comes from containerd's side.
    pub(crate) async fn close_stdin(&self, id: &str, exec_id: &str) -> Result<(), SandboxError> {
        loop {
            {
                let mut inner = self.inner();
                if let Machine::MovedAway { session } = &inner.machine {
                    return Err(SandboxError::MovedAway { id: id.to_owned(), session: session.clone() });
                }
                // At the pause the streams' positions are sealed: what is closed afterwards would be closed here alone.
                if !inner.blackout {
                    inner.process_mut(id, exec_id)?.close_stdin();
                    return Ok(());
                }
            }
            tokio::time::sleep(BLACKOUT_LOOK).await;
        }
    }

    pub(crate) async fn pause(&self, id: &str) -> Result<(), SandboxError> {
        let _under_way = Pausing::begin(self, id)?;
        self.mover.gate(TaskCall::Pause)?;
        let (vm, guest_id) = self.running(id)?;
        vm.pause(&guest_id).await?;
        self.inner().container_mut(id)?.paused = true;
        self.publisher.publish(&TaskPaused { container_id: id.to_owned(), ..TaskPaused::default() });
        Ok(())
    }

    pub(crate) async fn resume(&self, id: &str) -> Result<(), SandboxError> {
        let _under_way = Pausing::begin(self, id)?;
        self.mover.gate(TaskCall::Resume)?;
        let (vm, guest_id) = self.running(id)?;
        vm.resume(&guest_id).await?;
        self.inner().container_mut(id)?.paused = false;
        self.publisher.publish(&TaskResumed { container_id: id.to_owned(), ..TaskResumed::default() });
        Ok(())
    }

    /// Changes the container's limits. `resources`: OCI LinuxResources, JSON.
    pub(crate) async fn update(&self, id: &str, resources: &[u8]) -> Result<(), SandboxError> {
        self.mover.gate(TaskCall::Update)?;
        // A client that only has annotations to change sends none.
        let resources = if resources.is_empty() { b"{}" } else { resources };
        let resources: serde_json::Value =
            serde_json::from_slice(resources).map_err(|error| SandboxError::Invalid {
                id: id.to_owned(),
                message: format!("the resources are not OCI LinuxResources: {error}"),
            })?;
        let (vm, guest_id) = self.running(id)?;
        // All of it or nothing: what is refused leaves the other limits as they are.
        limits::check(&resources, &self.inner().container(id)?.resources)
            .map_err(|source| SandboxError::Limit { id: id.to_owned(), source })?;
        Ok(vm.update(&guest_id, resources).await?)
    }

    /// The guest's cgroup figures, as containerd's cgroup v1 metrics.
    pub(crate) async fn stats(&self, id: &str) -> Result<Any, SandboxError> {
        self.mover.gate(TaskCall::Stats)?;
        let (vm, guest_id) = self.running(id)?;
        let figures = vm.statistics(&guest_id).await?;
        stats::metrics(&figures).map_err(|message| SandboxError::Invalid { id: id.to_owned(), message })
    }

    /// The machine and the guest's id of a container whose init was started.
    fn running(&self, id: &str) -> Result<(std::sync::Arc<crate::vm::Vm>, String), SandboxError> {
        let inner = self.inner();
        let container = inner.container(id)?;
        let vm = inner.vm(id)?;
        match container.state {
            State::Running => Ok((vm, container.guest_id.clone())),
            other => Err(SandboxError::State { id: id.to_owned(), action: "do this", state: other.name() }),
        }
    }
}

/// A pause or resume under way. It is there before the gate is asked, which a move shuts before it asks who is under
/// way: one of the two sees the other.
struct Pausing<'a> {
    sandbox: &'a Sandbox,
    id: &'a str,
}

impl<'a> Pausing<'a> {
    fn begin(sandbox: &'a Sandbox, id: &'a str) -> Result<Pausing<'a>, SandboxError> {
        sandbox.inner().container_mut(id)?.pausing += 1;
        Ok(Pausing { sandbox, id })
    }
}

impl Drop for Pausing<'_> {
    fn drop(&mut self) {
        // Deleted meanwhile, it stands in nobody's way.
        if let Ok(container) = self.sandbox.inner().container_mut(self.id) {
            container.pausing = container.pausing.saturating_sub(1);
        }
    }
}
