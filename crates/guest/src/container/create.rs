//! From a host's configuration to a container whose init is parked. Blocks.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use nix::fcntl::OFlag;
use nix::unistd::{Gid, Uid, fchown, pipe2};
use serde_json::Value;
use tokio::sync::watch;

use super::bundle::{name_pod, write_json, write_pod_files};
use super::error::ContainerError;
use super::pod::PodMounts;
use super::spec::{Role, Surroundings, fit, role};
use super::teardown::{CGROUP_DEADLINE, remove_tree};
use super::{Container, Phase, State, user};
use crate::cgroup::tree::{self, Cgroup};
use crate::init::bring_up_in_namespace_of;
use crate::oci::client::{Client, Console, ProcessStdio};
use crate::oci::{Request, STATE_ROOT};
use crate::path::{ContainerId, host_path};
use crate::stdio::ProcessIo;
use crate::storage::pci;

const CONSOLE_DIR: &str = "/run/dunlin/consoles";

/// The host's description of a container.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// Bundle directory in the guest.
    pub bundle: String,
    /// OCI runtime spec.
    pub spec: Value,
    /// Directory on the scratch disk; empty when there is none.
    pub scratch: String,
}

/// What a workload takes from its pod's sandbox.
pub(super) struct Sandbox {
    pub(super) pid: i32,
    pub(super) dir: PathBuf,
}

/// Finds the sandbox of a pod.
pub(super) type FindSandbox<'a> = &'a dyn Fn(&ContainerId) -> Result<Sandbox, ContainerError>;

pub(super) fn create(
    client: &Client,
    id: &ContainerId,
    mut config: Config,
    find: FindSandbox<'_>,
) -> Result<Container, ContainerError> {
    let bundle = host_path(&config.bundle)?;
    let scratch = match config.scratch.as_str() {
        "" => None,
        path => Some(host_path(path)?),
    };
    let root = match config.spec["root"]["path"].as_str() {
        None | Some("") => bundle.join("rootfs"),
        Some(path) if path.starts_with('/') => host_path(path)?,
        Some(path) => host_path(&bundle.join(path).to_string_lossy())?,
    };
    let (role, pod) = role(&config.spec, id)?;
    let mut pod_mounts = None;
    let sandbox = match role {
        Role::Workload => Some(find(&pod)?),
        Role::Sandbox | Role::Standalone => {
            write_pod_files(&bundle, id, &config.spec)?;
            name_pod(&mut config.spec, id)?;
            None
        }
    };
    if role == Role::Sandbox {
        pod_mounts = Some(PodMounts::make(&bundle, &config.spec)?);
    }
    pci::give_nodes(&mut config.spec);
    let notes = fit(
        &mut config.spec,
        &Surroundings {
            id,
            pod: &pod,
            root: &root,
            pod_dir: sandbox.as_ref().map_or(&bundle, |sandbox| &sandbox.dir),
            sandbox_pid: sandbox.as_ref().map(|sandbox| sandbox.pid),
            exists: &|path: &Path| path.exists(),
        },
    )?;
    for left_out in notes {
        tracing::info!(container = %id, %left_out, "not for the guest");
    }
    let mut spec = config.spec;
    user::resolve(&mut spec["process"]["user"], &root)?;

    std::fs::create_dir_all(&bundle).map_err(ContainerError::at("create the directory", &bundle))?;
    write_json(&bundle.join("config.json"), &spec)?;
    let unfinished = Unfinished::of(&pod, id);
    let cgroups = tree::create_pod(&pod);
    cgroups.map_err(ContainerError::at("create the cgroup of pod", pod.as_str()))?;

    let started = spawn(client, &spec["process"], None, |console| Request::Create {
        id: id.to_string(),
        bundle: bundle.clone(),
        console,
    })?;
    let pid = started.watched.pid().as_raw();
    // A namespace that was joined has its loopback up already; then this changes nothing.
    if let Err(error) = bring_up_in_namespace_of(pid) {
        tracing::warn!(container = %id, %error, "loopback stays down");
    }
    unfinished.keep();
    if let Some(mounts) = pod_mounts {
        mounts.keep();
    }
    Ok(Container {
        id: id.clone(),
        cgroup: Cgroup::of(&pod, id),
        pod,
        role,
        bundle,
        root,
        scratch,
        process: spec["process"].take(),
        stop: watch::channel(false).0,
        state: Mutex::new(State {
            phase: Phase::Created { io: started.io },
            init: started.watched,
            processes: Default::default(),
            killed: None,
        }),
    })
}

/// What there is of a container outside of its bundle before it is one: a parked init in its cgroup, and libcontainer's
/// state. Both go when this is dropped before [`Unfinished::keep`].
///
/// libcontainer takes back what it made when it fails itself. It cannot when its process is killed, has no time left
/// or ends without an answer, and the name would be taken for ever, with an init that nobody knows.
struct Unfinished {
    pod: ContainerId,
    cgroup: Cgroup,
    state: PathBuf,
    kept: bool,
}

impl Unfinished {
    fn of(pod: &ContainerId, id: &ContainerId) -> Unfinished {
        let state = Path::new(STATE_ROOT).join(id.as_str());
        Unfinished { pod: pod.clone(), cgroup: Cgroup::of(pod, id), state, kept: false }
    }

    /// It is a container.
    fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        if let Err(error) = self.cgroup.remove(CGROUP_DEADLINE) {
            let dir = self.cgroup.dir().display();
            tracing::warn!(%dir, %error, "the cgroup of a container that was not created stays");
        }
        if let Err(error) = remove_tree(&self.state) {
            tracing::warn!(%error, "state of a container that was not created stays");
        }
        // Only when it has no other container's.
        tree::remove_pod(&self.pod);
    }
}

/// A process that exists, and our ends of its streams.
pub(super) struct Started {
    pub(super) watched: crate::reaper::Watched,
    pub(super) io: RawIo,
}

/// Our ends, not yet in the runtime.
#[derive(Debug)]
pub(super) enum RawIo {
    Pipes { stdin: OwnedFd, stdout: OwnedFd, stderr: OwnedFd },
    Terminal(OwnedFd),
}

impl RawIo {
    /// Must be called inside the runtime.
    pub(super) fn into_io(self) -> std::io::Result<ProcessIo> {
        match self {
            RawIo::Pipes { stdin, stdout, stderr } => {
                ProcessIo::pipes(Some(stdin), Some(stdout), Some(stderr))
            }
            RawIo::Terminal(master) => ProcessIo::terminal(master),
        }
    }
}

/// Starts a container's init or an exec, with pipes or a terminal as its document says.
pub(super) fn spawn(
    client: &Client,
    process: &Value,
    size: Option<(u16, u16)>,
    request: impl FnOnce(Option<PathBuf>) -> Request,
) -> Result<Started, ContainerError> {
    if process["terminal"] == true {
        let mut console = Console::listen(Path::new(CONSOLE_DIR), size.or(console_size(process)))?;
        let request = request(Some(console.path().to_owned()));
        let (watched, master) =
            client.start_process(&request, ProcessStdio::default(), Some(&mut console))?;
        let master = master.ok_or(ContainerError::Lost)?;
        return Ok(Started { watched, io: RawIo::Terminal(master) });
    }
    let (uid, gid) = (id_of(process, "uid"), id_of(process, "gid"));
    let pipe = || pipe2(OFlag::O_CLOEXEC).map_err(ContainerError::at("create a pipe for", "stdio"));
    let (stdin, our_stdin) = pipe()?;
    let (our_stdout, stdout) = pipe()?;
    let (our_stderr, stderr) = pipe()?;
    // So that a process that is not root can open /dev/stdout and the like.
    for fd in [&stdin, &stdout, &stderr] {
        let _ = fchown(fd.as_fd(), Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
    }
    let stdio = ProcessStdio { stdin: Some(stdin), stdout: Some(stdout), stderr: Some(stderr) };
    let (watched, _) = client.start_process(&request(None), stdio, None)?;
    Ok(Started { watched, io: RawIo::Pipes { stdin: our_stdin, stdout: our_stdout, stderr: our_stderr } })
}

/// Columns and rows that an OCI process asks for.
fn console_size(process: &Value) -> Option<(u16, u16)> {
    let number = |key: &str| process["consoleSize"][key].as_u64().and_then(|n| u16::try_from(n).ok());
    number("width").zip(number("height")).filter(|(columns, rows)| *columns > 0 && *rows > 0)
}

fn id_of(process: &Value, key: &str) -> u32 {
    process["user"][key].as_u64().and_then(|id| id.try_into().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use super::*;

    /// Where this machine has its cgroups of version 2. None without them, or without root.
    fn cgroup2() -> Option<PathBuf> {
        let mounts = fs::read_to_string("/proc/mounts").ok()?;
        let mut lines = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let found = lines.find(|fields| fields.get(2) == Some(&"cgroup2"))?;
        let dir = Path::new(found[1]).join(format!("dunlin-test-{}", std::process::id()));
        fs::create_dir(&dir).ok()?;
        Some(dir)
    }

    #[test]
    fn what_a_failed_create_leaves_is_killed_and_removed() {
        let Some(dir) = cgroup2() else {
            eprintln!("SKIPPED: this needs root and cgroups of version 2");
            return;
        };
        let states = tempfile::tempdir().unwrap();
        let unfinished = || {
            let state = states.path().join("c1");
            fs::create_dir_all(state.join("deeper")).unwrap();
            let pod = ContainerId::parse("no-such-pod").unwrap();
            Unfinished { pod, cgroup: Cgroup::at(dir.clone()), state, kept: false }
        };
        let mut parked = Command::new("sleep").arg("100").spawn().unwrap();
        fs::write(dir.join("cgroup.procs"), parked.id().to_string()).unwrap();
        unfinished().keep();
        assert!(parked.try_wait().unwrap().is_none() && states.path().join("c1").exists());
        // In the guest PID 1 reaps it.
        let reaper = std::thread::spawn(move || parked.wait().unwrap());
        drop(unfinished());
        assert_eq!(reaper.join().unwrap().signal(), Some(libc::SIGKILL));
        assert!(!dir.exists() && !states.path().join("c1").exists());
        // Nothing there is fine too: it failed before the fork.
        drop(unfinished());
    }
}
