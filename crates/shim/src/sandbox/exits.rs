//! The end of a process: learnt from the guest, reported once, by the host that owns the task.
//!
//! While a move is under way both hosts may learn of an exit: the source before the switchover, the
//! destination after it, from the guest's own record. The gate decides: held while moving, open again
//! after a roll-back, shut for good when the task is another host's. The end of a machine goes through it as well: a source
//! that dies after its state was complete elsewhere has ended no task.

use std::sync::Arc;
use std::time::SystemTime;

use containerd_shim_protos::events::task::TaskExit;
use dunlin_bridge::host::{BridgeError, PendingWait};
use dunlin_bridge::message::GuestPid;
use dunlin_wire::tree::ContainerRole;
use protobuf::MessageField;

use super::Sandbox;
use crate::container::{self, INIT};
use crate::controller::Transitions;
use crate::pod;
use crate::process::Exit;
use crate::service::status::timestamp;
use crate::vm::Vm;

/// Whether this host reports exits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gate {
    Open,
    /// A move is under way: whoever owns the task at its end reports.
    Held,
    /// The task is another host's.
    Shut,
}

/// What a process is said to have ended with when its machine is gone.
pub(crate) fn killed() -> Exit {
    Exit { code: 128 + 9, at: SystemTime::now() }
}

impl Sandbox {
    /// Waits in the background for a process's end. The container is named by the guest's id, which
    /// stays when containerd's changes.
    pub(crate) fn watch_exit(self: &Arc<Self>, vm: &Arc<Vm>, guest_id: String, exec_id: String, pid: u32) {
        let sandbox = Arc::clone(self);
        let vm = Arc::clone(vm);
        let mut waiting = self.ask_exit(&vm, &guest_id, &exec_id, pid);
        tokio::spawn(async move {
            let exit = loop {
                match waiting {
                    Ok(asked) => tokio::select! {
                        exit = asked.exit() => break exit,
                        () = vm.answers_dropped() => {}
                    },
                    Err(error) => break Err(error),
                }
                waiting = sandbox.ask_exit(&vm, &guest_id, &exec_id, pid);
            };
            let exit = match exit {
                // The guest knows when; one that does not say is taken at its answer.
                Ok(exit) => Exit { code: exit.code, at: exit.at.unwrap_or_else(SystemTime::now) },
                // The machine's own end is reported by `machine_exited`.
                Err(BridgeError::Closed) => return,
                Err(error) => {
                    tracing::error!(guest_id, pid, %error, "the guest cannot tell how the process ended");
                    Exit { code: 255, at: SystemTime::now() }
                }
            };
            if !sandbox.owns_exits().await {
                return;
            }
            if exec_id == INIT {
                // Whoever is told of the end looks for it.
                sandbox.copies.write_back(vm.as_ref(), &guest_id).await;
            }
            let id = sandbox.inner().id_of_guest(&guest_id);
            if let Some(id) = id {
                sandbox.report_exit(&id, &exec_id, exit);
            }
        });
    }

    fn ask_exit(&self, vm: &Vm, guest_id: &str, exec_id: &str, pid: u32) -> Result<PendingWait, BridgeError> {
        let waiting = vm.bridge.begin_wait(guest_id, GuestPid(pid), None)?;
        let mut inner = self.inner();
        if let Some(id) = inner.id_of_guest(guest_id)
            && let Ok(process) = inner.process_mut(&id, exec_id)
        {
            process.wait_call_id = waiting.id();
        }
        Ok(waiting)
    }

    /// Whether exits are this host's to report. While a move is under way nobody knows, and this waits.
    pub(super) async fn owns_exits(&self) -> bool {
        let mut gate = self.gate.subscribe();
        let decided = gate.wait_for(|gate| *gate != Gate::Held).await.map(|gate| *gate);
        matches!(decided, Ok(Gate::Open))
    }

    /// What ran in a machine that is gone. Container id, exec id.
    pub(super) fn report_killed(&self, running: Vec<(String, String)>) {
        for (id, exec_id) in running {
            self.report_exit(&id, &exec_id, killed());
        }
    }

    /// Records and publishes an end; the second of the same process is nobody's news.
    pub(crate) fn report_exit(&self, id: &str, exec_id: &str, exit: Exit) {
        let event = {
            let mut inner = self.inner();
            let Ok(container) = inner.container_mut(id) else { return };
            let Some(process) = container.processes.get_mut(exec_id) else { return };
            if !process.terminate(exit) {
                return;
            }
            let pid = process.pid();
            if exec_id == INIT {
                // What is being made or deleted stays so; its process has ended all the same.
                let _ = container.state.enter(container::Op::Exited, "");
                container.paused = false;
            }
            let pod =
                (exec_id == INIT && container.role != ContainerRole::Workload).then(|| container.pod.clone());
            if let Some(pod) = pod.and_then(|pod| inner.pods.get_mut(&pod)) {
                let _ = pod.state.enter(pod::Op::Ended, "");
            }
            TaskExit {
                container_id: id.to_owned(),
                // containerd names the init's process like its container.
                id: if exec_id == INIT { id } else { exec_id }.to_owned(),
                pid,
                exit_status: exit.code,
                exited_at: MessageField::some(timestamp(exit.at)),
                ..TaskExit::default()
            }
        };
        tracing::info!(id, exec_id, code = exit.code, "process ended");
        self.publisher.publish(&event);
    }
}
