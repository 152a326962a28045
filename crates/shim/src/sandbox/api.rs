//! The sandbox as containerd's Sandbox API sees it: a machine that is there before its first container and
//! after its last.
//!
//! ```text
//! (absent) --create--> created --start--> ready --stop--> stopped
//!                         |                 |--QEMU ends--> stopped
//!                         |                 |--a move-----> moved-away
//!                         +--stop--> stopped
//! arriving (a destination) --create--> arriving --> ready | stopped
//! ```
//!
//! What it calls ready is told by the machine and the migration session; [`Record`] holds only what neither
//! knows. A sandbox that came with its first Task call, or over the wire, answers all but `start` alike.

mod record;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use dunlin_migration::session::{Side, TaskCall};
use protobuf::well_known_types::any::Any;
use thiserror::Error;

use self::record::Made;
pub(crate) use self::record::Record;
use super::error::{Code, SandboxError};
use super::{Machine, Sandbox, bundle};
use crate::config::Config;
use crate::vm::{Vm, state, stats};

/// QEMU and the guest's link end within this, or are killed.
const STOP_DEADLINE: Duration = Duration::from_secs(30);
/// What a sandbox is said to have ended with that nobody stopped.
const KILLED: u32 = 128 + 9;

/// containerd's CreateSandbox, translated.
#[derive(Debug)]
pub(crate) struct NewSandbox {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    /// A root file system was given.
    pub(crate) rootfs: bool,
    pub(crate) options: Option<Any>,
    /// Path of the pod's network namespace on this host; empty: none.
    pub(crate) netns_path: String,
    pub(crate) annotations: HashMap<String, String>,
}

/// The answer to StartSandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Started {
    /// QEMU's.
    pub(crate) pid: u32,
    pub(crate) created_at: SystemTime,
}

/// A sandbox's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ended {
    /// 0 when it was stopped or moved away, 137 when its machine died or never ran.
    pub(crate) code: u32,
    pub(crate) at: SystemTime,
}

/// Where a sandbox stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// Neither created nor with a machine.
    Absent,
    Created,
    Starting,
    Ready,
    /// On its way to another host, and still this one's.
    Migrating,
    /// On its way to this host.
    Arriving,
    MovedAway,
    Stopped,
}

impl Standing {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Standing::Absent => "absent",
            Standing::Created => "created",
            Standing::Starting => "starting",
            Standing::Ready => "ready",
            Standing::Migrating => "migrating",
            Standing::Arriving => "arriving",
            Standing::MovedAway => "moved-away",
            Standing::Stopped => "stopped",
        }
    }

    /// CRI knows two words and takes every other for the second; a pod that it takes for not ready is killed.
    pub(crate) fn cri_state(self) -> &'static str {
        match self {
            Standing::Ready | Standing::Migrating => "SANDBOX_READY",
            Standing::Absent
            | Standing::Created
            | Standing::Starting
            | Standing::Arriving
            | Standing::MovedAway
            | Standing::Stopped => "SANDBOX_NOTREADY",
        }
    }
}

/// The answer to SandboxStatus.
#[derive(Debug)]
pub(crate) struct SandboxStatus {
    pub(crate) standing: Standing,
    /// QEMU's; 0 without a machine.
    pub(crate) pid: u32,
    pub(crate) created_at: SystemTime,
    pub(crate) ended: Option<Ended>,
    /// `state` always, `migration.*` during a move, the rest when asked for more.
    pub(crate) info: BTreeMap<&'static str, String>,
    /// CreateSandbox's, when asked for more.
    pub(crate) options: Option<Any>,
}

/// The Sandbox API cannot be served as asked.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum ApiError {
    #[error("sandbox {asked}: this shim serves sandbox {id}; ask its own")]
    Other { asked: String, id: String },
    #[error("sandbox {id} was created already; start it, or shut it down and create it anew")]
    Exists { id: String },
    #[error(
        "sandbox {id} has begun without CreateSandbox, with a container or a move; there is nothing to create"
    )]
    Begun { id: String },
    #[error("sandbox {id} was not created; call CreateSandbox first")]
    NotCreated { id: String },
    #[error("sandbox {id} is {state}; it starts once, after CreateSandbox")]
    NotNow { id: String, state: &'static str },
    #[error("sandbox {id}: a root file system was given, and a virtual machine has its own; leave it out")]
    Rootfs { id: String },
    #[error("sandbox {id} has not ended within {seconds} s; call StopSandbox again to wait for it")]
    Slow { id: String, seconds: u64 },
    #[error("sandbox {id} has no running virtual machine, it is {state}")]
    NoMachine { id: String, state: &'static str },
    #[error("sandbox {id}: its figures cannot be read: {message}")]
    Figures { id: String, message: String },
}

impl ApiError {
    pub(crate) fn code(&self) -> Code {
        match self {
            ApiError::Other { .. } => Code::NotFound,
            ApiError::Exists { .. } => Code::AlreadyExists,
            ApiError::Begun { .. } | ApiError::NotCreated { .. } | ApiError::NotNow { .. } => {
                Code::FailedPrecondition
            }
            ApiError::Rootfs { .. } => Code::InvalidArgument,
            ApiError::Slow { .. } => Code::DeadlineExceeded,
            ApiError::NoMachine { .. } => Code::Unavailable,
            ApiError::Figures { .. } => Code::Unknown,
        }
    }
}

impl Sandbox {
    /// Refuses an id that is not this sandbox's.
    pub(crate) fn is_sandbox(&self, asked: &str) -> Result<(), SandboxError> {
        if asked == self.id {
            return Ok(());
        }
        Err(ApiError::Other { asked: asked.to_owned(), id: self.id.clone() }.into())
    }

    /// Takes what containerd says of the sandbox before its machine; before that of an arriving one, whose machine is
    /// what the saved state says. The bundle may be without a spec.
    pub(crate) fn create_sandbox(&self, new: NewSandbox) -> Result<(), SandboxError> {
        self.is_sandbox(&new.id)?;
        let arrives = self.standing() == Standing::Arriving;
        self.mover.gate(if arrives { TaskCall::Create } else { TaskCall::Start })?;
        let id = || self.id.clone();
        if new.rootfs {
            return Err(ApiError::Rootfs { id: id() }.into());
        }
        let mut annotations = match new.bundle.join("config.json").exists() {
            true => bundle::annotations(&new.bundle)?,
            false => HashMap::new(),
        };
        annotations.extend(new.annotations);
        let config = self.config.clone().with_annotations(&annotations)?;
        let begun = {
            let inner = self.inner();
            !matches!(inner.machine, Machine::Absent) || !inner.containers.is_empty()
        };
        let mut made = self.api.made();
        if made.is_some() {
            return Err(ApiError::Exists { id: id() }.into());
        }
        if begun && !arrives {
            return Err(ApiError::Begun { id: id() }.into());
        }
        *made = Some(Made {
            at: SystemTime::now(),
            bundle: new.bundle,
            options: new.options,
            annotations,
            netns_path: new.netns_path,
            config,
            stopped: false,
        });
        Ok(())
    }

    /// Boots the machine, without a container.
    pub(crate) async fn start_sandbox(self: &Arc<Self>) -> Result<Started, SandboxError> {
        self.mover.gate(TaskCall::Start)?;
        let (config, created_at) = match &*self.api.made() {
            None => return Err(ApiError::NotCreated { id: self.id.clone() }.into()),
            Some(made) => (made.config.clone(), made.at),
        };
        let standing = self.standing();
        if standing != Standing::Created {
            return Err(ApiError::NotNow { id: self.id.clone(), state: standing.name() }.into());
        }
        let id = self.id.clone();
        let machine = async {
            let path = self.api.netns_path().unwrap_or_default();
            self.connect_early(&path).await?;
            self.machine(&id, &config).await
        };
        let vm = machine.await.inspect_err(|_| self.api.end(KILLED))?;
        self.note_machine();
        Ok(Started { pid: pid_of(&vm), created_at })
    }

    /// What the machine is made by: CreateSandbox's word comes before the first container's. A sandbox that was
    /// stopped gets none any more.
    pub(super) fn machine_config(&self, of_container: &Config) -> Result<Config, SandboxError> {
        match &*self.api.made() {
            None => Ok(of_container.clone()),
            Some(made) if made.stopped => {
                Err(ApiError::NotNow { id: self.id.clone(), state: Standing::Stopped.name() }.into())
            }
            Some(made) => Ok(made.config.clone()),
        }
    }

    /// Ends the machine and with it every process, also in the middle of a move. Returns when it is gone;
    /// a zero timeout is the default of 30 s. May be repeated.
    pub(crate) async fn stop_sandbox(self: &Arc<Self>, timeout: Duration) -> Result<(), SandboxError> {
        if let Some(made) = self.api.made().as_mut() {
            made.stopped = true;
        }
        if let Some((machine, running)) = self.take_machine() {
            let sandbox = Arc::clone(self);
            // Not cut short by a caller who goes away.
            tokio::spawn(async move {
                // A move that is under way fails, and ends what it had brought.
                sandbox.mover.machine_exited("the sandbox was stopped".to_owned());
                if let Err(error) = sandbox.end_machine(machine).await {
                    tracing::error!(%error, "the sandbox is stopped all the same");
                }
                let stopped = Arc::clone(&sandbox);
                let reports = async move {
                    if stopped.owns_exits().await {
                        stopped.report_killed(running);
                    }
                };
                match sandbox.mover.left() {
                    // What its tasks' end is, the move says later.
                    true => drop(tokio::spawn(reports)),
                    false => reports.await,
                }
                sandbox.api.end(0);
            });
        }
        let timeout = if timeout.is_zero() { STOP_DEADLINE } else { timeout };
        let mut ended = self.api.ended.subscribe();
        match tokio::time::timeout(timeout, ended.wait_for(Option::is_some)).await {
            Ok(_) => Ok(()),
            Err(_) => Err(ApiError::Slow { id: self.id.clone(), seconds: timeout.as_secs() }.into()),
        }
    }

    /// The machine, when it is here, and the processes that end with it; none twice.
    #[expect(clippy::type_complexity, reason = "used once, beside its definition")]
    fn take_machine(&self) -> Option<(Option<Arc<Vm>>, Vec<(String, String)>)> {
        let mut inner = self.inner();
        let vm = match &inner.machine {
            Machine::Absent | Machine::Starting | Machine::Imported | Machine::Preparing => None,
            Machine::Running(vm) | Machine::Incoming(vm) => Some(Arc::clone(vm)),
            Machine::MovedAway { .. } | Machine::Gone { .. } => return None,
        };
        self.api.stopping.store(true, Ordering::Relaxed);
        let gone = Machine::Gone { reason: "the sandbox was stopped".to_owned() };
        // Every state that is left may end.
        inner.set_machine(state::Op::End, gone).ok()?;
        inner.blackout = false;
        // Those that wait for their move are ended by the session, which learns of the machine's end.
        let mine = inner.containers.values().filter(|container| !container.hold.arriving());
        let running = mine
            .flat_map(|container| container.processes.keys().map(|exec| (container.id.clone(), exec.clone())))
            .collect();
        Some((vm, running))
    }

    /// Waits for the sandbox's end: its machine's, or that it never gets one. A machine that moved away has
    /// ended here.
    pub(crate) async fn wait_sandbox(&self) -> Result<Ended, SandboxError> {
        self.note_machine();
        let mut ended = self.api.ended.subscribe();
        let found = match ended.wait_for(Option::is_some).await {
            Ok(found) => *found,
            Err(_) => None,
        };
        Ok(found.unwrap_or_else(|| Ended { code: KILLED, at: SystemTime::now() }))
    }

    /// Ends the sandbox if it runs, and then the shim.
    pub(crate) async fn shutdown_sandbox(self: &Arc<Self>) {
        if let Err(error) = self.stop_sandbox(Duration::ZERO).await {
            tracing::error!(%error, "the shim ends all the same");
        }
        self.shutdown_if_empty(true);
    }

    pub(crate) fn sandbox_status(&self, verbose: bool) -> SandboxStatus {
        self.note_machine();
        let standing = self.standing();
        let mut info = BTreeMap::from([("state", standing.name().to_owned())]);
        if let Some((session, state, side)) = self.mover.standing() {
            let side = match side {
                Side::Source => "source",
                Side::Destination => "destination",
            };
            info.insert("migration.session", session);
            info.insert("migration.state", state.to_string());
            info.insert("migration.side", side.to_owned());
        }
        let (pid, containers, connected) = {
            let inner = self.inner();
            let ids: Vec<&str> = inner.containers.keys().map(String::as_str).collect();
            let pid = match &inner.machine {
                Machine::Running(vm) | Machine::Incoming(vm) => pid_of(vm),
                Machine::Absent
                | Machine::Starting
                | Machine::Imported
                | Machine::Preparing
                | Machine::MovedAway { .. }
                | Machine::Gone { .. } => 0,
            };
            if verbose && let Machine::Gone { reason } = &inner.machine {
                info.insert("reason", reason.clone());
            }
            let connected = inner.pods.values().find(|pod| !pod.network.endpoints().is_empty());
            (pid, ids.join(" "), connected.map(|pod| pod.id.clone()))
        };
        let made = self.api.made();
        if verbose {
            info.insert("containers", containers);
            info.insert("directory", self.directory.path().display().to_string());
            if let Some(made) = &*made {
                info.insert("bundle", made.bundle.display().to_string());
                info.insert("network.namespace", made.netns_path.clone());
                // Whose the cards in it are, to the guest.
                info.extend(connected.map(|pod| ("network.pod", pod)));
                info.insert("memory.mib", made.config.vm.memory_mib.to_string());
                info.insert("processors", made.config.vcpus().to_string());
                if let Some(options) = &made.options {
                    info.insert("options", options.type_url.clone());
                }
            }
        }
        let created_at = made.as_ref().map_or(self.api.born, |made| made.at);
        let options = made.as_ref().filter(|_| verbose).and_then(|made| made.options.clone());
        SandboxStatus { standing, pid, created_at, ended: *self.api.ended.borrow(), info, options }
    }

    /// Alive means that there is, or will be, a machine here.
    pub(crate) fn ping_sandbox(&self) -> Result<(), SandboxError> {
        let standing = self.standing();
        match standing {
            Standing::MovedAway | Standing::Stopped => {
                Err(ApiError::NoMachine { id: self.id.clone(), state: standing.name() }.into())
            }
            Standing::Absent
            | Standing::Created
            | Standing::Starting
            | Standing::Ready
            | Standing::Migrating
            | Standing::Arriving => Ok(()),
        }
    }

    /// What the machine costs this host, as containerd's cgroup v1 metrics.
    pub(crate) fn sandbox_metrics(&self) -> Result<Any, SandboxError> {
        let id = || self.id.clone();
        let vm = self.inner().vm(&self.id);
        let Ok(vm) = vm else {
            return Err(ApiError::NoMachine { id: id(), state: self.standing().name() }.into());
        };
        let failed = |message: String| ApiError::Figures { id: id(), message };
        let usage = vm.qemu.usage().map_err(|error| failed(error.to_string()))?;
        let limit = vm.document.memory_mib.saturating_mul(1 << 20);
        stats::of_machine(usage, limit).map_err(|message| failed(message).into())
    }

    /// Learns of the sandbox's end, or that it has not ended after all, wherever that was decided.
    pub(crate) fn note_machine(&self) {
        let over = self.over();
        let inner = self.inner();
        let ended = match &inner.machine {
            // Taken out, and not seen gone.
            Machine::MovedAway { .. } | Machine::Gone { .. } if inner.ending.is_some() => return,
            Machine::Gone { .. } if self.api.stopping.load(Ordering::Relaxed) => return,
            Machine::Gone { .. } if self.api.dying.load(Ordering::Relaxed) => return,
            Machine::MovedAway { .. } | Machine::Gone { .. } => Some(0),
            Machine::Absent | Machine::Imported | Machine::Preparing if over => Some(KILLED),
            Machine::Absent | Machine::Imported | Machine::Preparing => return,
            Machine::Starting | Machine::Running(_) | Machine::Incoming(_) => None,
        };
        drop(inner);
        match ended {
            Some(code) => self.api.end(code),
            None => {
                self.api.ended.send_if_modified(|ended| ended.take().is_some());
            }
        }
    }

    /// A destination whose move has ended without a machine.
    fn over(&self) -> bool {
        self.mover.gate(TaskCall::Start).is_err() && self.mover.gate(TaskCall::Delete).is_ok()
    }

    fn standing(&self) -> Standing {
        let arriving = self.mover.standing().is_some_and(|(_, _, side)| side == Side::Destination);
        let moving = self.mover.gate(TaskCall::Start).is_err();
        let over = self.over();
        let made = self.api.made().as_ref().map(|made| made.stopped);
        match &self.inner().machine {
            Machine::Running(_) if moving && !over => Standing::Migrating,
            Machine::Running(_) => Standing::Ready,
            Machine::Imported | Machine::Preparing if over => Standing::Stopped,
            Machine::Imported | Machine::Preparing | Machine::Incoming(_) => Standing::Arriving,
            Machine::Starting => Standing::Starting,
            Machine::MovedAway { .. } => Standing::MovedAway,
            // Its tasks may run elsewhere: until that is said, it is on its way.
            Machine::Gone { .. } if moving && !over => Standing::Migrating,
            Machine::Gone { .. } => Standing::Stopped,
            Machine::Absent if over => Standing::Stopped,
            Machine::Absent if arriving => Standing::Arriving,
            Machine::Absent => match made {
                Some(true) => Standing::Stopped,
                Some(false) => Standing::Created,
                None => Standing::Absent,
            },
        }
    }
}

fn pid_of(vm: &Vm) -> u32 {
    u32::try_from(vm.qemu.pid()).unwrap_or(0)
}
