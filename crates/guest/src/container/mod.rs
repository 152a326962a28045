//! Containers and their processes: what exists, and what may be asked of it now.
//!
//! ```text
//!  Create ──> created (init parked) ──ExecuteProcess──> running ──init ends──> ended ──Delete──> gone
//! ```
//!
//! Processes are never forgotten before their container's state is deleted, so an exit can be asked
//! for again after a reconnect and by the host that a move leads to. Of two with the same pid the later
//! one is meant; pids begin anew only after all others, so they bound how many there are.

mod bundle;
mod create;
mod error;
pub mod pod;
mod process;
mod request;
pub mod spec;
mod teardown;
pub mod user;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::Value;
use tokio::sync::{mpsc, watch};

pub use create::Config;
pub use error::ContainerError;
pub use process::Process;
pub use request::{Execute, process_list};
use spec::Role;

use crate::cgroup::tree::Cgroup;
use crate::network::Networks;
use crate::oci::client::Client;
use crate::path::ContainerId;
use crate::reaper::{Reaper, Watched};
use crate::stdio::Dialer;

/// How a container's init came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// By itself, or by a signal that was sent to the process.
    Unexpected,
    /// After ShutdownGraceful.
    Graceful,
    /// After ShutdownForced.
    Forced,
}

/// A container's init has ended and its output is delivered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Which container.
    pub container: ContainerId,
    /// How.
    pub how: Ending,
}

/// All containers of the guest, and the processes outside of them. Clones share it.
#[derive(Clone)]
pub struct Containers {
    shared: Arc<Shared>,
}

struct Shared {
    table: Mutex<HashMap<ContainerId, Slot>>,
    utility: Mutex<HashMap<u32, Arc<Process>>>,
    reaper: Reaper,
    client: Client,
    dialer: Dialer,
    networks: Networks,
    ended: mpsc::UnboundedSender<Ended>,
}

#[derive(Clone)]
enum Slot {
    Creating,
    Ready(Arc<Container>),
}

/// One container.
struct Container {
    id: ContainerId,
    pod: ContainerId,
    role: Role,
    bundle: PathBuf,
    root: PathBuf,
    scratch: Option<PathBuf>,
    /// The init's OCI process, from which an exec inherits what it does not say.
    process: Value,
    cgroup: Cgroup,
    /// Turns true when output that nobody takes shall no longer hold back an exit.
    stop: watch::Sender<bool>,
    state: Mutex<State>,
}

struct State {
    phase: Phase,
    init: Watched,
    processes: HashMap<u32, Arc<Process>>,
    killed: Option<Ending>,
}

enum Phase {
    /// The init is parked; its streams wait for ExecuteProcess.
    Created { io: create::RawIo },
    /// ExecuteProcess is at work.
    Starting,
    /// The init was started; whether it still runs is the reaper's to know.
    Started,
}

impl Containers {
    /// `ended` gets one message for each container whose init has ended; it holds as many as there
    /// are containers.
    pub fn new(
        reaper: Reaper,
        client: Client,
        dialer: Dialer,
        networks: Networks,
        ended: mpsc::UnboundedSender<Ended>,
    ) -> Containers {
        Containers {
            shared: Arc::new(Shared {
                table: Mutex::default(),
                utility: Mutex::default(),
                reaper,
                client,
                dialer,
                networks,
                ended,
            }),
        }
    }

    fn find(&self, id: &str) -> Result<Arc<Container>, ContainerError> {
        let unknown = || ContainerError::Unknown(id.to_owned());
        let id = ContainerId::parse(id).map_err(|_| unknown())?;
        match lock(&self.shared.table).get(&id) {
            Some(Slot::Ready(container)) => Ok(Arc::clone(container)),
            Some(Slot::Creating) => Err(ContainerError::StillCreating(id)),
            None => Err(unknown()),
        }
    }
}

impl Container {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn process(&self, pid: u32) -> Result<Arc<Process>, ContainerError> {
        self.lock()
            .processes
            .get(&pid)
            .cloned()
            .ok_or_else(|| ContainerError::NoProcess { owner: format!("container {}", self.id), pid })
    }

    /// Whether the init was started and has not ended.
    fn running(&self) -> bool {
        let state = self.lock();
        matches!(state.phase, Phase::Started) && state.init.exit().is_none()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change below is complete in itself, so a panic elsewhere leaves nothing half-done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ContainerError> + Send + 'static,
) -> Result<T, ContainerError> {
    tokio::task::spawn_blocking(work).await.unwrap_or(Err(ContainerError::Lost))
}

fn pid_number(pid: i32) -> u32 {
    u32::try_from(pid).unwrap_or(0)
}
