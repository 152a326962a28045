//! A guest without a VM: the real link and the real bridge, and containers that are a few tasks in memory.
//!
//! ```text
//! HostLink --unix socket--> GuestLink --port 0x40000000--> bridge Server --> Containers --> Process
//! ```

mod containers;
mod faults;
mod process;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use dunlin_bridge::BRIDGE_PORT;
use dunlin_bridge::guest::Server;
use dunlin_bridge::message::{ContainerNotification, GuestCapabilities, NotificationType};
use dunlin_link::guest::{Device, GuestLink};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use containers::Containers;
pub use faults::{Fault, Faults};

const REDIAL: Duration = Duration::from_millis(50);
/// Bytes between the bridge and the link.
const PUMP: usize = 64 * 1024;

/// What a fake process does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Script {
    /// Lines that it prints: "0\n", "1\n", …
    pub lines: u64,
    /// Pause after each line. Zero: as fast as the output takes them.
    pub every: Duration,
    /// What it does after the last line.
    pub then: Finish,
}

/// How a fake process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// By itself, with this code.
    Exit(u32),
    /// Copies its input to its output, and ends with 0 when the input does.
    Cat,
    /// Only by a signal.
    Wait,
}

impl Default for Script {
    fn default() -> Script {
        Script { lines: 0, every: Duration::ZERO, then: Finish::Wait }
    }
}

impl Script {
    /// Counts to `lines`, then exits with `code`.
    #[must_use]
    pub fn count(lines: u64, every: Duration, code: u32) -> Script {
        Script { lines, every, then: Finish::Exit(code) }
    }
}

/// A running fake guest. Dropping it hangs up; processes end.
#[derive(Debug)]
pub struct FakeGuest {
    link: Arc<watch::Sender<GuestLink>>,
    containers: Arc<Containers>,
    server: Server<Containers>,
    bridge: JoinHandle<()>,
}

impl FakeGuest {
    /// Listens on `socket` as QEMU's chardev would. Containers run `script` as their init unless told otherwise.
    #[must_use]
    pub fn start(socket: &Path, script: Script) -> FakeGuest {
        FakeGuest::start_with(socket, script, &Faults::default())
    }

    /// The same with answers that meet faults.
    #[must_use]
    pub fn start_with(socket: &Path, script: Script, faults: &Faults) -> FakeGuest {
        let link = Arc::new(watch::Sender::new(spawn_link(socket)));
        let containers = Arc::new(Containers::new(script, link.subscribe()));
        let mut capabilities = GuestCapabilities::dunlin();
        if faults.is_plain() {
            capabilities.guest_defined_capabilities.dunlin_version = None;
        }
        let server = Server::with_capabilities(containers.clone(), capabilities);
        let bridge = tokio::spawn(serve(link.subscribe(), server.clone(), faults.clone()));
        FakeGuest { link, containers, server, bridge }
    }

    /// What the inits of containers of this id run, from their next start on.
    pub fn script_init(&self, container: &str, script: Script) {
        self.containers.script_init(container, script);
    }

    /// What later execs run, in all containers.
    pub fn script_execs(&self, script: Script) {
        self.containers.script_execs(script);
    }

    /// The requests served so far, as "create c", "execute c", …, in the order of their arrival.
    #[must_use]
    pub fn journal(&self) -> Vec<String> {
        self.containers.journal()
    }

    /// Hangs up and goes on under another socket, processes and all: what a live migration does to a guest.
    pub fn move_to(&self, socket: &Path) {
        self.link.send_replace(spawn_link(socket));
    }

    /// Tells the host that a container has ended.
    pub fn notify_exit(&self, container: &str) {
        self.server.notify(&ContainerNotification::exit(container, NotificationType::UnexpectedExit));
    }
}

impl Drop for FakeGuest {
    fn drop(&mut self) {
        self.bridge.abort();
        self.containers.kill_all();
    }
}

fn spawn_link(socket: &Path) -> GuestLink {
    GuestLink::spawn(Device::UnixListener { path: socket.to_owned() })
}

async fn serve(link: watch::Receiver<GuestLink>, server: Server<Containers>, faults: Faults) {
    loop {
        let current = link.borrow().clone();
        let dialled = current.dial(BRIDGE_PORT).await;
        // The link ends with its last handle.
        drop(current);
        match dialled {
            Ok(stream) => {
                let (bridge, pump) = tokio::io::duplex(PUMP);
                let (mut from_host, to_host) = tokio::io::split(stream);
                let (answers, mut requests) = tokio::io::split(pump);
                let ended = tokio::select! {
                    ended = server.serve(bridge) => ended.map_err(|error| error.to_string()),
                    ended = faults.carry(answers, to_host) => ended.map_err(|error| error.to_string()),
                    ended = tokio::io::copy(&mut from_host, &mut requests) => {
                        ended.map(drop).map_err(|error| error.to_string())
                    }
                };
                if let Err(error) = ended {
                    tracing::debug!(%error, "the fake guest's bridge was cut");
                }
            }
            Err(_) => tokio::time::sleep(REDIAL).await,
        }
    }
}
