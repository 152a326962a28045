//! The sandbox: the one owner of its machine, disks, pods, containers and processes.
//!
//! ```text
//!  create     a container into its pod, the machine with the first     teardown   and out again
//!  lifecycle  start                                                    processes  exec, kill, pids, stdio
//!  exits      every end of a process, once                             status     what State answers
//!  streams    where every stdio stream stands at a switchover
//!  moving     carries out the migration session's effects
//!  saving     payloads out and in
//!  volumes    a container's mounts
//!  network    the pods' NICs: when they are connected, told to the guest, let speak
//!  api        the machine without a container, for the Sandbox API
//! ```
//!
//! Invariants:
//! * State is changed under `Inner`'s lock, which is never held across an await; a state like
//!   `Creating` keeps others out while work is done without the lock.
//! * An exit is reported once, by the side that owns the task (`exits::Gate`).
//! * The machine's handle leaves `Inner` before the machine is stopped.
//! * The machine's state changes only through [`Inner::set_machine`], which holds it against its table.

pub(crate) mod api;
pub(crate) mod bundle;
pub(crate) mod create;
pub(crate) mod error;
pub(crate) mod exits;
#[cfg(test)]
mod fault_tests;
mod guest_spec;
mod lifecycle;
pub(crate) mod moving;
mod network;
mod processes;
mod rebinding;
mod saving;
pub(crate) mod status;
mod streams;
mod teardown;
mod volumes;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::boot::directory::{StateDirectory, clear_scratch, scratch_directory};
use crate::config::Config;
use crate::container::{self, Container};
use crate::controller::{NotNow, Transitions};
use crate::device::plan9::Shares;
use crate::device::scsi::Scsi;
use crate::device::vpci::Devices;
use crate::network::wire::Wires;
use crate::pod::Pod;
use crate::process::Process;
use crate::rootfs::store::Store;
use crate::service::events::Publisher;
use crate::vm::{StillThere, Vm, state};
use crate::volume::Copies;
use error::SandboxError;
use exits::Gate;
use moving::Mover;
use rebinding::Rebinding;

/// The virtual machine as the sandbox sees it. Its states and what changes them: [`state::State`].
#[derive(Debug, Clone)]
pub(crate) enum Machine {
    /// None yet.
    Absent,
    /// Being made.
    Starting,
    /// Runs, or is paused by QEMU in the last phase of a move.
    Running(Arc<Vm>),
    /// On a destination: known from a payload.
    Imported,
    /// On a destination: being made.
    Preparing,
    /// On a destination: made, and receiving.
    Incoming(Arc<Vm>),
    /// On a source: its state is complete elsewhere.
    MovedAway { session: String },
    /// Ended.
    Gone { reason: String },
}

impl Machine {
    fn state(&self) -> state::State {
        match self {
            Machine::Absent => state::State::NotCreated,
            Machine::Starting => state::State::Starting,
            Machine::Running(_) => state::State::Running,
            Machine::Imported => state::State::Imported,
            Machine::Preparing => state::State::Preparing,
            Machine::Incoming(_) => state::State::Receiving,
            Machine::MovedAway { .. } => state::State::MovedAway,
            Machine::Gone { .. } => state::State::Terminated,
        }
    }

    /// Its handle, when there is a QEMU.
    fn into_vm(self) -> Option<Arc<Vm>> {
        match self {
            Machine::Running(vm) | Machine::Incoming(vm) => Some(vm),
            Machine::Absent
            | Machine::Starting
            | Machine::Imported
            | Machine::Preparing
            | Machine::MovedAway { .. }
            | Machine::Gone { .. } => None,
        }
    }
}

/// Everything that changes.
#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) machine: Machine,
    pub(crate) scsi: Scsi,
    /// By containerd's id of their sandbox container.
    pub(crate) pods: BTreeMap<String, Pod>,
    /// By containerd's id.
    pub(crate) containers: BTreeMap<String, Container>,
    /// The guest stands still for the last phase of a move.
    pub(crate) blackout: bool,
    pub(crate) imported: Option<saving::Imported>,
    /// What the last arrival here cost its streams, for people.
    pub(crate) losses: Vec<String>,
    /// A machine that was taken out, until QEMU is seen to be gone.
    pub(crate) ending: Option<Arc<Vm>>,
    /// On a source: how the move that is being prepared is to go.
    pub(crate) transfer: Option<moving::options::TransferOptions>,
}

impl Inner {
    pub(crate) fn container(&self, id: &str) -> Result<&Container, SandboxError> {
        self.containers.get(id).ok_or_else(|| SandboxError::NoContainer { id: id.to_owned() })
    }

    pub(crate) fn container_mut(&mut self, id: &str) -> Result<&mut Container, SandboxError> {
        self.containers.get_mut(id).ok_or_else(|| SandboxError::NoContainer { id: id.to_owned() })
    }

    pub(crate) fn process(&self, id: &str, exec_id: &str) -> Result<&Process, SandboxError> {
        let missing = || SandboxError::NoProcess { id: id.to_owned(), exec_id: exec_id.to_owned() };
        self.container(id)?.processes.get(exec_id).ok_or_else(missing)
    }

    pub(crate) fn process_mut(&mut self, id: &str, exec_id: &str) -> Result<&mut Process, SandboxError> {
        let missing = || SandboxError::NoProcess { id: id.to_owned(), exec_id: exec_id.to_owned() };
        self.container_mut(id)?.processes.get_mut(exec_id).ok_or_else(missing)
    }

    /// Containerd's id of the container that the guest knows by this one.
    pub(crate) fn id_of_guest(&self, guest_id: &str) -> Option<String> {
        self.containers.values().find(|container| container.guest_id == guest_id).map(|c| c.id.clone())
    }

    /// The running machine, or why there is none. `id`: whose request it is.
    pub(crate) fn vm(&self, id: &str) -> Result<Arc<Vm>, SandboxError> {
        let reason = match &self.machine {
            Machine::Running(vm) => return Ok(Arc::clone(vm)),
            Machine::MovedAway { session } => {
                return Err(SandboxError::MovedAway { id: id.to_owned(), session: session.clone() });
            }
            Machine::Absent => "it was not created yet".to_owned(),
            Machine::Starting => "it is starting".to_owned(),
            Machine::Imported | Machine::Preparing | Machine::Incoming(_) => {
                "it is being received from another host".to_owned()
            }
            Machine::Gone { reason } => reason.clone(),
        };
        Err(SandboxError::NoMachine { reason })
    }

    /// The machine's next state. Refused, and nothing changed, when `op` does not lead from the present one to it.
    pub(crate) fn set_machine(&mut self, op: state::Op, next: Machine) -> Result<Machine, NotNow> {
        let mut state = self.machine.state();
        state.enter(op, "the virtual machine")?;
        if state != next.state() {
            return Err(NotNow {
                what: format!("the virtual machine (on its way to {})", next.state().name()),
                state: self.machine.state().name(),
                op: "change",
            });
        }
        Ok(std::mem::replace(&mut self.machine, next))
    }
}

/// One sandbox; one a process.
#[derive(Debug)]
pub(crate) struct Sandbox {
    pub(crate) namespace: String,
    pub(crate) id: String,
    pub(crate) config: Config,
    pub(crate) directory: StateDirectory,
    pub(crate) publisher: Publisher,
    pub(crate) store: Store,
    /// Directories of this host that containers use.
    pub(crate) shares: Shares,
    /// Files of this host that were copied into the guest.
    pub(crate) copies: Copies,
    /// Devices of this host that containers use.
    pub(crate) devices: Devices,
    /// What connects the pods' NICs to this host.
    pub(crate) wires: Wires,
    /// What the guest was told of its cards when it came to run here.
    pub(crate) rebinding: Rebinding,
    inner: Mutex<Inner>,
    /// One boots the machine, the others wait for it.
    booting: tokio::sync::Mutex<()>,
    /// One plugs a disk: an image that is being mounted is shared only when it is.
    plugging: tokio::sync::Mutex<()>,
    /// Who reports exits now.
    pub(crate) gate: watch::Sender<Gate>,
    pub(crate) mover: Mover,
    /// What the Sandbox API said.
    pub(crate) api: api::Record,
    finished: CancellationToken,
}

impl Sandbox {
    pub(crate) fn new(
        namespace: String,
        id: String,
        config: Config,
        directory: StateDirectory,
        publisher: Publisher,
    ) -> Arc<Sandbox> {
        let e2fsck = config.disks.mkfs_ext4.with_file_name("e2fsck");
        let store = Store::new(&config.data_dir, config.disks.mkfs_erofs.clone(), e2fsck);
        let copies = Copies::new(config.volumes.limits());
        let (mover, events) = Mover::new();
        let sandbox = Arc::new(Sandbox {
            namespace,
            id,
            config,
            directory,
            publisher,
            store,
            shares: Shares::default(),
            copies,
            devices: Devices::default(),
            wires: Wires::default(),
            rebinding: Rebinding::default(),
            inner: Mutex::new(Inner {
                machine: Machine::Absent,
                scsi: Scsi::default(),
                pods: BTreeMap::new(),
                containers: BTreeMap::new(),
                blackout: false,
                imported: None,
                losses: Vec::new(),
                ending: None,
                transfer: None,
            }),
            booting: tokio::sync::Mutex::new(()),
            plugging: tokio::sync::Mutex::new(()),
            gate: watch::Sender::new(Gate::Open),
            mover,
            api: api::Record::new(),
            finished: CancellationToken::new(),
        });
        moving::spawn(&sandbox, events);
        sandbox
    }

    pub(crate) fn inner(&self) -> MutexGuard<'_, Inner> {
        // A panic elsewhere leaves the tables whole: every change is one assignment.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where this sandbox's scratch disk for a container is.
    pub(crate) fn scratch_path(&self, guest_id: &str) -> PathBuf {
        scratch_directory(&self.config, &self.namespace, &self.id).join(format!("{guest_id}.raw"))
    }

    /// Resolves when the shim is to end.
    pub(crate) async fn finished(&self) {
        self.finished.cancelled().await;
    }

    /// Ends the shim when it has nothing left to do, or when asked to end at once.
    pub(crate) fn shutdown_if_empty(&self, now: bool) {
        if now || (self.inner().containers.is_empty() && !self.api.holds_shim()) {
            self.finished.cancel();
        }
    }

    /// Stops the machine and removes the sandbox's files.
    pub(crate) async fn close(self: Arc<Self>) {
        if self.mover.left() {
            // The addresses are another host's.
            self.leave_wires();
        }
        if let Err(error) = self.stop_machine("the shim was shut down").await {
            tracing::error!(%error, "the shim ends all the same");
        }
        self.wires.take_off_all().await;
        clear_scratch(&self.config, &self.directory, &self.namespace, &self.id);
        let _ = tokio::fs::remove_dir_all(self.directory.path()).await;
    }

    /// Takes the machine out of the sandbox and ends it. Nothing to end is no error. Ok: there is no QEMU any more.
    pub(crate) async fn stop_machine(&self, reason: &str) -> Result<(), StillThere> {
        let vm = {
            let mut inner = self.inner();
            let gone = Machine::Gone { reason: reason.to_owned() };
            match &inner.machine {
                Machine::MovedAway { .. } | Machine::Gone { .. } => None,
                _ => inner.set_machine(state::Op::End, gone).ok().and_then(Machine::into_vm),
            }
        };
        self.end_machine(vm).await
    }

    /// Ends a machine that was taken out of the sandbox, and with it one that an earlier attempt could not end.
    pub(crate) async fn end_machine(&self, vm: Option<Arc<Vm>>) -> Result<(), StillThere> {
        let vm = {
            let mut inner = self.inner();
            if let Some(vm) = vm {
                inner.ending = Some(vm);
            }
            inner.ending.clone()
        };
        if let Some(vm) = vm {
            vm.stop().await?;
            let ended = |present: &Arc<Vm>| Arc::ptr_eq(present, &vm);
            drop(self.inner().ending.take_if(|present| ended(present)));
        }
        self.note_machine();
        Ok(())
    }

    /// QEMU ended by itself: every process in it has ended, unless it runs elsewhere.
    pub(crate) fn machine_exited(self: &Arc<Self>, vm: &Arc<Vm>, report: &str) {
        let mut inner = self.inner();
        let mine = match &inner.machine {
            Machine::Running(present) | Machine::Incoming(present) => Arc::ptr_eq(present, vm),
            _ => false,
        };
        if !mine {
            return;
        }
        let received = matches!(inner.machine, Machine::Incoming(_));
        inner.machine = Machine::Gone { reason: format!("QEMU ended: {report}") };
        inner.blackout = false;
        let running: Vec<(String, String)> = inner
            .containers
            .values()
            // Of one that is being made containerd knows nothing yet.
            .filter(|container| !container.hold.arriving() && container.state != container::State::Creating)
            .flat_map(|container| container.processes.keys().map(|exec| (container.id.clone(), exec.clone())))
            .collect();
        drop(inner);
        tracing::error!(report, "QEMU ended by itself");
        if received {
            self.api.end(exits::killed().code);
            self.mover.machine_exited(report.to_owned());
            return;
        }
        self.api.dies();
        self.mover.machine_exited(report.to_owned());
        let sandbox = Arc::clone(self);
        tokio::spawn(async move {
            if sandbox.owns_exits().await {
                sandbox.api.died();
                sandbox.report_killed(running);
            }
        });
    }
}
