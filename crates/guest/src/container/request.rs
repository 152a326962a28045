//! What a host may ask of containers and processes.

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use dunlin_bridge::message::ProcessExit;
use nix::errno::Errno;
use serde_json::{Map, Value, json};

use super::create::{Sandbox, create, spawn};
use super::error::ContainerError;
use super::process::LAST_WORDS;
use super::spec::{Role, fit_process};
use super::{
    Config, Container, Containers, Ended, Ending, Phase, Process, Slot, blocking, bundle, lock, pid_number,
    user,
};
use crate::cgroup::{limits, stats};
use crate::network::NamespaceKey;
use crate::oci::Request;
use crate::path::ContainerId;
use crate::reaper::{Exit, Watched};
use crate::stdio::{Ports, ProcessIo, Relays};

/// How long freezing may take before it is undone.
const FREEZE_DEADLINE: Duration = Duration::from_secs(5);
const EXEC_DIR: &str = "/run/dunlin/exec";

/// A process to start.
#[derive(Clone, Debug, Default)]
pub struct Execute {
    /// OCI process; none for the container's init.
    pub process: Option<Value>,
    /// Outside of containers: the command and its arguments.
    pub command: Vec<String>,
    /// Outside of containers: where it starts.
    pub directory: String,
    /// Outside of containers: its environment.
    pub environment: BTreeMap<String, String>,
    /// Where its streams go.
    pub ports: Ports,
    /// Columns and rows of its terminal.
    pub console: Option<(u16, u16)>,
}

impl Containers {
    /// Creates a container and parks its init.
    pub async fn create(&self, id: &str, config: Config) -> Result<(), ContainerError> {
        let id = ContainerId::parse(id)?;
        {
            let mut table = lock(&self.shared.table);
            if table.contains_key(&id) {
                return Err(ContainerError::Exists(id));
            }
            table.insert(id.clone(), Slot::Creating);
        }
        let this = self.clone();
        let for_work = id.clone();
        let network = NamespaceKey::of(&config.spec, &id);
        let mut created =
            blocking(move || create(&this.shared.client, &for_work, config, &|pod| this.sandbox(pod))).await;
        if let Ok(container) = created {
            created = self.connect(container, &network).await;
        }
        let mut table = lock(&self.shared.table);
        match created {
            Ok(container) => {
                table.insert(id, Slot::Ready(Arc::new(container)));
                Ok(())
            }
            Err(error) => {
                table.remove(&id);
                Err(error)
            }
        }
    }

    /// Gives the network namespace of a pod's first container its NICs, before any program of the container's runs.
    async fn connect(
        &self,
        container: Container,
        network: &NamespaceKey,
    ) -> Result<Container, ContainerError> {
        if container.role == Role::Workload {
            return Ok(container);
        }
        let pid = container.lock().init.pid().as_raw();
        match self.shared.networks.attach(network, &container.id, &container.bundle, pid).await {
            Ok(()) => Ok(container),
            Err(error) => {
                if let Err(error) = self.take_down(Arc::new(container)).await {
                    tracing::warn!(%error, "something of a container that got no network stays");
                }
                Err(error.into())
            }
        }
    }

    fn sandbox(&self, pod: &ContainerId) -> Result<Sandbox, ContainerError> {
        let sandbox = match lock(&self.shared.table).get(pod) {
            Some(Slot::Ready(container)) if container.role != Role::Workload => Arc::clone(container),
            _ => return Err(ContainerError::NoPod(pod.clone())),
        };
        let init = sandbox.lock().init.clone();
        // Its namespaces went with it, and its pid may be another one's.
        if init.exit().is_some() {
            return Err(ContainerError::PodEnded(pod.clone()));
        }
        Ok(Sandbox { pid: init.pid().as_raw(), dir: sandbox.bundle.clone() })
    }

    /// Whether this directory is the bundle of a container.
    pub fn has_bundle(&self, bundle: &Path) -> bool {
        lock(&self.shared.table).iter().any(|(id, slot)| match slot {
            // Not known yet which it is; hosts name it after its container.
            Slot::Creating => bundle.ends_with(id.as_str()),
            Slot::Ready(container) => container.bundle == bundle,
        })
    }

    /// Fails when there is no such container; starting is ExecuteProcess' work.
    pub fn check(&self, id: &str) -> Result<(), ContainerError> {
        self.find(id).map(drop)
    }

    /// Starts the container's init, or a further process in it. Returns its pid.
    pub async fn execute(&self, id: &str, what: Execute) -> Result<u32, ContainerError> {
        let container = self.find(id)?;
        match what.process {
            None => self.start_init(container, what.ports).await,
            Some(process) => self.exec(container, process, what.ports, what.console).await,
        }
    }

    async fn start_init(&self, container: Arc<Container>, ports: Ports) -> Result<u32, ContainerError> {
        let (io, watched) = {
            let mut state = container.lock();
            if state.init.exit().is_some() && matches!(state.phase, Phase::Created { .. }) {
                return Err(ContainerError::NotRunning(container.id.clone()));
            }
            match std::mem::replace(&mut state.phase, Phase::Starting) {
                Phase::Created { io } => (io, state.init.clone()),
                other => {
                    state.phase = other;
                    return Err(ContainerError::AlreadyStarted(container.id.clone()));
                }
            }
        };
        let pid = watched.pid().as_raw();
        let io = io.into_io().map_err(ContainerError::at("take over the stdio of", container.id.as_str()))?;
        let terminal = io.pty();
        let relays = Relays::connect(io, &ports, &self.shared.dialer, container.stop.subscribe());
        let (cgroup, ended, this) =
            (container.cgroup.clone(), self.shared.ended.clone(), Arc::downgrade(&container));
        let id = container.id.clone();
        let init = watched.clone();
        let process = Process::supervise(
            watched,
            terminal,
            relays,
            move || {
                // Nothing of a container outlives its init.
                if let Err(error) = cgroup.kill() {
                    tracing::warn!(%error, "rest of the container is not killed");
                }
            },
            move |_| {
                let killed = this.upgrade().and_then(|container| container.lock().killed);
                let _ = ended.send(Ended { container: id, how: killed.unwrap_or(Ending::Unexpected) });
            },
        );
        let (client, name) = (self.shared.client.clone(), container.id.to_string());
        let started = blocking(move || Ok(client.call(&Request::Start { id: name })?)).await;
        let mut state = container.lock();
        state.phase = Phase::Started;
        state.processes.insert(pid_number(pid), Arc::new(process));
        drop(state);
        if let Err(error) = started {
            let _ = self.shared.reaper.signal(&init, libc::SIGKILL);
            return Err(error);
        }
        Ok(pid_number(pid))
    }

    async fn exec(
        &self,
        container: Arc<Container>,
        mut process: Value,
        ports: Ports,
        console: Option<(u16, u16)>,
    ) -> Result<u32, ContainerError> {
        if !container.running() {
            return Err(ContainerError::NotRunning(container.id.clone()));
        }
        inherit(&mut process, &container.process);
        fit_process(&mut process)?;
        let (client, target) = (self.shared.client.clone(), Arc::clone(&container));
        let started = blocking(move || {
            user::resolve(&mut process["user"], &target.root)?;
            let file = ExecFile::write(&process)?;
            spawn(&client, &process, console, |console| Request::Exec {
                id: target.id.to_string(),
                process: file.path.clone(),
                console,
            })
        })
        .await?;
        let pid = started.watched.pid().as_raw();
        let io = started
            .io
            .into_io()
            .map_err(ContainerError::at("take over the stdio of", container.id.as_str()))?;
        let terminal = io.pty();
        let relays = Relays::connect(io, &ports, &self.shared.dialer, container.stop.subscribe());
        let process = Process::supervise(started.watched, terminal, relays, || {}, |_| {});
        container.lock().processes.insert(pid_number(pid), Arc::new(process));
        Ok(pid_number(pid))
    }

    /// Starts a process outside of containers, for debugging. Returns its pid.
    pub async fn execute_in_utility_vm(&self, what: Execute) -> Result<u32, ContainerError> {
        let (program, arguments) = what.command.split_first().ok_or(ContainerError::NoCommand)?;
        let mut command = Command::new(program);
        command.args(arguments).env_clear().envs(&what.environment);
        if !what.directory.is_empty() {
            command.current_dir(&what.directory);
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // SAFETY: only async-signal-safe calls between fork and exec: open, write, close, setsid.
        unsafe { command.pre_exec(leave_pid_one) };
        let failed = |error| ContainerError::at("start", PathBuf::from(program))(error);
        let (watched, streams) = self.shared.reaper.spawn_with_pipes(&mut command).map_err(failed)?;
        let [stdin, stdout, stderr] = streams;
        let io = ProcessIo::pipes(stdin, stdout, stderr).map_err(failed)?;
        let (_, never) = tokio::sync::watch::channel(false);
        let relays = Relays::connect(io, &what.ports, &self.shared.dialer, never);
        let pid = pid_number(watched.pid().as_raw());
        let process = Process::supervise(watched, None, relays, || {}, |_| {});
        lock(&self.shared.utility).insert(pid, Arc::new(process));
        Ok(pid)
    }

    /// Waits for a process outside of containers; after that it is forgotten.
    pub async fn wait_in_utility_vm(
        &self,
        pid: u32,
        milliseconds: Option<u32>,
    ) -> Result<ProcessExit, ContainerError> {
        let process = lock(&self.shared.utility).get(&pid).cloned();
        let process =
            process.ok_or_else(|| ContainerError::NoProcess { owner: "the utility VM".to_owned(), pid })?;
        let exit = wait_for(&process, pid, milliseconds).await?;
        lock(&self.shared.utility).remove(&pid);
        Ok(ProcessExit { code: exit.utility_code(), at: process.ended_at() })
    }

    /// Waits for a container's process, for ever or up to a time.
    pub async fn wait(
        &self,
        id: &str,
        pid: u32,
        milliseconds: Option<u32>,
    ) -> Result<ProcessExit, ContainerError> {
        let process = self.find(id)?.process(pid)?;
        let exit = wait_for(&process, pid, milliseconds).await?;
        Ok(ProcessExit { code: exit.shell_code(), at: process.ended_at() })
    }

    /// Sends a signal to one process; 0 stands for SIGKILL.
    pub fn signal(&self, id: &str, pid: u32, signal: i32) -> Result<(), ContainerError> {
        let container = self.find(id)?;
        let process = container.process(pid)?;
        let signal = if signal == 0 { libc::SIGKILL } else { signal };
        if signal == libc::SIGKILL {
            // Also one that has ended already and is still being listened to.
            process.kill_told();
        }
        self.deliver(&container, process.watched(), signal)
    }

    fn deliver(&self, container: &Container, watched: &Watched, signal: i32) -> Result<(), ContainerError> {
        let pid = watched.pid().as_raw();
        match self.shared.reaper.signal(watched, signal) {
            Ok(()) => Ok(()),
            Err(Errno::ESRCH) => Err(ContainerError::NoProcess {
                owner: format!("container {}", container.id),
                pid: pid_number(pid),
            }),
            Err(errno) => Err(ContainerError::at("signal", format!("process {pid}"))(errno)),
        }
    }

    /// Asks the init to end (SIGTERM), or ends the whole container (SIGKILL).
    pub fn shut_down(&self, id: &str, forced: bool) -> Result<(), ContainerError> {
        let container = self.find(id)?;
        if !container.running() {
            return Err(ContainerError::NotRunning(container.id.clone()));
        }
        let init = container.lock().init.clone();
        self.deliver(&container, &init, if forced { libc::SIGKILL } else { libc::SIGTERM })?;
        container.lock().killed = Some(if forced { Ending::Forced } else { Ending::Graceful });
        // What it says last is still delivered, unless the host stays away.
        tokio::spawn(async move {
            let mut init = container.lock().init.clone();
            init.wait().await;
            tokio::time::sleep(LAST_WORDS).await;
            container.stop.send_replace(true);
        });
        Ok(())
    }

    /// Sets the size of a process's terminal, in characters.
    pub fn resize(&self, id: &str, pid: u32, columns: u16, rows: u16) -> Result<(), ContainerError> {
        let process = self.find(id)?.process(pid)?;
        let terminal = process.terminal().ok_or(ContainerError::NoTerminal(pid))?;
        terminal
            .resize(columns, rows)
            .map_err(ContainerError::at("resize the terminal of", format!("process {pid}")))
    }

    /// Pids of everything that runs in a container.
    pub fn pids(&self, id: &str) -> Result<Vec<u32>, ContainerError> {
        let container = self.find(id)?;
        container.cgroup.pids().map_err(ContainerError::at("list", container.cgroup.dir()))
    }

    /// A container's statistics in the shape of cgroup version 1.
    pub fn statistics(&self, id: &str) -> Result<Value, ContainerError> {
        Ok(stats::read_v1(self.find(id)?.cgroup.dir()))
    }

    /// Changes a container's limits to those given in OCI Linux resources.
    pub fn constrain(&self, id: &str, resources: &Value) -> Result<(), ContainerError> {
        let container = self.find(id)?;
        let done = limits::update(container.cgroup.dir(), resources)?;
        tracing::info!(container = %container.id, limits = ?done, "limits changed");
        Ok(())
    }

    /// Freezes or thaws all processes of a container; returns when they are.
    pub async fn freeze(&self, id: &str, frozen: bool) -> Result<(), ContainerError> {
        let container = self.find(id)?;
        if !container.running() {
            return Err(ContainerError::NotRunning(container.id.clone()));
        }
        blocking(move || {
            container.cgroup.freeze(frozen, FREEZE_DEADLINE).map_err(|source| ContainerError::Freeze {
                action: if frozen { "pause" } else { "resume" },
                id: container.id.clone(),
                source,
            })
        })
        .await
    }
}

async fn wait_for(process: &Process, pid: u32, milliseconds: Option<u32>) -> Result<Exit, ContainerError> {
    let exit = match milliseconds {
        None => process.wait().await,
        Some(milliseconds) => {
            tokio::time::timeout(Duration::from_millis(milliseconds.into()), process.wait())
                .await
                .map_err(|_| ContainerError::StillRunning { pid, milliseconds })?
        }
    };
    exit.ok_or(ContainerError::Lost)
}

/// Fills in what an exec's document leaves to the container's init.
fn inherit(process: &mut Value, init: &Value) {
    let Some(fields) = process.as_object_mut() else { return };
    for key in ["user", "rlimits", "capabilities", "noNewPrivileges", "cwd"] {
        let absent = match fields.get(key) {
            None | Some(Value::Null) => true,
            Some(Value::Object(map)) => map.is_empty(),
            Some(_) => false,
        };
        if absent && !init[key].is_null() {
            fields.insert(key.to_owned(), init[key].clone());
        }
    }
}

/// Async-signal-safe: PID 1's protection from the out-of-memory killer is not inherited.
fn leave_pid_one() -> std::io::Result<()> {
    // SAFETY: the path and the byte are static; the descriptor is used only when open succeeded.
    unsafe {
        let fd = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if fd >= 0 {
            libc::write(fd, c"0".as_ptr().cast(), 1);
            libc::close(fd);
        }
        libc::setsid();
    }
    Ok(())
}

/// An exec's document on disk, for as long as the exec takes.
struct ExecFile {
    path: PathBuf,
}

impl ExecFile {
    fn write(process: &Value) -> Result<ExecFile, ContainerError> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let dir = Path::new(EXEC_DIR);
        std::fs::create_dir_all(dir).map_err(ContainerError::at("create the directory", dir))?;
        let path = dir.join(format!("{}.json", NUMBER.fetch_add(1, Ordering::Relaxed)));
        bundle::write_json(&path, process)?;
        Ok(ExecFile { path })
    }
}

impl Drop for ExecFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// The answer's part for a list of pids.
pub fn process_list(pids: &[u32]) -> Map<String, Value> {
    let list = pids.iter().map(|pid| json!({"ProcessId": pid})).collect();
    Map::from_iter([("ProcessList".to_owned(), Value::Array(list))])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exec_inherits_what_it_does_not_say() {
        let init = json!({"user": {"uid": 5}, "rlimits": [1], "cwd": "/srv", "env": ["A=1"]});
        let mut process = json!({"args": ["id"], "user": {}, "cwd": "/"});
        inherit(&mut process, &init);
        assert_eq!(process, json!({"args": ["id"], "user": {"uid": 5}, "rlimits": [1], "cwd": "/"}));
    }

    #[test]
    fn lists_of_processes() {
        assert_eq!(
            Value::Object(process_list(&[3, 4])).to_string(),
            r#"{"ProcessList":[{"ProcessId":3},{"ProcessId":4}]}"#
        );
    }
}
