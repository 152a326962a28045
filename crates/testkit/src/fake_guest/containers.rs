//! The fake guest's containers: what the bridge asks of them.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dunlin_bridge::guest::{Failure, Handler, ShutdownKind};
use dunlin_bridge::hresult::HResult;
use dunlin_bridge::message::{
    ContainerConfig, FilesAnswer, FilesStep, GuestPid, Modification, NegotiateRequest, ProcessExit,
    ProcessParameters, PropertyType, UTILITY_VM, VsockStdioRelaySettings,
};
use dunlin_link::guest::GuestLink;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::Script;
use super::process::Process;

const SIGKILL: i32 = 9;
const SIGTERM: i32 = 15;
const FIRST_PID: u32 = 100;

#[derive(Debug)]
pub(super) struct Containers {
    state: Mutex<State>,
    link: watch::Receiver<GuestLink>,
}

#[derive(Debug)]
struct State {
    containers: HashMap<String, Container>,
    inits: HashMap<String, Script>,
    init: Script,
    exec: Script,
    next_pid: u32,
    journal: Vec<String>,
}

#[derive(Debug)]
struct Container {
    init: Option<GuestPid>,
    processes: HashMap<GuestPid, Process>,
    frozen: watch::Sender<bool>,
}

fn unknown(container: &str) -> Failure {
    Failure::new(HResult::SYSTEM_NOT_FOUND, format!("container {container} is not known"))
}

impl State {
    fn container(&mut self, id: &str) -> Result<&mut Container, Failure> {
        self.containers.get_mut(id).ok_or_else(|| unknown(id))
    }

    fn process(&mut self, id: &str, pid: GuestPid) -> Result<&mut Process, Failure> {
        self.container(id)?
            .processes
            .get_mut(&pid)
            .ok_or_else(|| Failure::new(HResult::NOT_FOUND, format!("process {pid} of {id} is not known")))
    }
}

impl Containers {
    pub(super) fn new(init: Script, link: watch::Receiver<GuestLink>) -> Containers {
        Containers {
            state: Mutex::new(State {
                containers: HashMap::new(),
                inits: HashMap::new(),
                init,
                exec: Script::default(),
                next_pid: FIRST_PID,
                journal: Vec::new(),
            }),
            link,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn asked(&self, what: &str, container: &str) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        state.journal.push(format!("{what} {container}"));
        state
    }

    pub(super) fn script_init(&self, container: &str, script: Script) {
        self.lock().inits.insert(container.to_owned(), script);
    }

    pub(super) fn script_execs(&self, script: Script) {
        self.lock().exec = script;
    }

    pub(super) fn journal(&self) -> Vec<String> {
        self.lock().journal.clone()
    }

    pub(super) fn kill_all(&self) {
        self.lock().containers.clear();
    }
}

impl Handler for Containers {
    async fn negotiated(&self, _: &NegotiateRequest) {
        self.lock().journal.push("negotiate".to_owned());
    }

    async fn create(&self, container: String, _: ContainerConfig) -> Result<(), Failure> {
        let mut state = self.asked("create", &container);
        if state.containers.contains_key(&container) {
            let text = format!("container {container} exists");
            return Err(Failure::new(HResult::SYSTEM_ALREADY_EXISTS, text));
        }
        let frozen = watch::Sender::new(false);
        state.containers.insert(container, Container { init: None, processes: HashMap::new(), frozen });
        Ok(())
    }

    async fn start(&self, container: String) -> Result<(), Failure> {
        self.asked("start", &container).container(&container).map(drop)
    }

    async fn shutdown(&self, container: String, kind: ShutdownKind) -> Result<(), Failure> {
        let mut state = self.asked("shutdown", &container);
        let target = state.container(&container)?;
        let signal = match kind {
            ShutdownKind::Graceful => SIGTERM,
            ShutdownKind::Forced => SIGKILL,
        };
        for process in target.processes.values_mut() {
            process.signal(signal);
            process.give_up_output();
        }
        Ok(())
    }

    async fn execute(
        &self,
        container: String,
        parameters: ProcessParameters,
        stdio: VsockStdioRelaySettings,
    ) -> Result<GuestPid, Failure> {
        let mut state = self.asked("execute", &container);
        let script = if parameters.oci_process.is_some() {
            state.exec.clone()
        } else {
            state.inits.get(&container).unwrap_or(&state.init).clone()
        };
        let pid = GuestPid(state.next_pid);
        state.next_pid += 1;
        let target = state.container(&container)?;
        let init = parameters.oci_process.is_none();
        if init && target.init.replace(pid).is_some() {
            let text = format!("the init of {container} was started before");
            return Err(Failure::new(HResult::INVALID_STATE, text));
        }
        let process = Process::spawn(script, stdio, init, &self.link, target.frozen.subscribe());
        target.processes.insert(pid, process);
        Ok(pid)
    }

    async fn wait(
        &self,
        container: String,
        pid: GuestPid,
        timeout: Option<Duration>,
    ) -> Result<ProcessExit, Failure> {
        let mut exit = self.asked("wait", &container).process(&container, pid)?.exit();
        let ended = async { exit.wait_for(Option::is_some).await.ok().and_then(|exit| *exit) };
        let ended = match timeout {
            Some(timeout) => tokio::time::timeout(timeout, ended)
                .await
                .map_err(|_| Failure::new(HResult::TIMEOUT, format!("process {pid} still runs")))?,
            None => ended.await,
        };
        ended.ok_or_else(|| Failure::new(HResult::NOT_FOUND, format!("process {pid} was deleted")))
    }

    async fn signal(&self, container: String, pid: GuestPid, signal: i32) -> Result<(), Failure> {
        let mut state = self.asked("signal", &container);
        if state.process(&container, pid)?.signal(signal) {
            return Ok(());
        }
        Err(Failure::new(HResult::NOT_FOUND, format!("process {pid} has ended")))
    }

    async fn resize(&self, container: String, pid: GuestPid, _: u16, _: u16) -> Result<(), Failure> {
        self.asked("resize", &container).process(&container, pid).map(drop)
    }

    async fn properties(&self, container: String, _: Vec<PropertyType>) -> Result<Value, Failure> {
        let mut state = self.asked("properties", &container);
        let target = state.container(&container)?;
        let list: Vec<Value> = target.processes.keys().map(|pid| json!({ "ProcessId": pid.0 })).collect();
        Ok(json!({ "ProcessList": list, "LCOWMetrics": {} }))
    }

    async fn modify(&self, container: String, modification: Modification) -> Result<(), Failure> {
        let kind = format!("{:?}", modification.resource);
        let kind = kind.split(['(', ' ']).next().unwrap_or_default();
        let mut state = self.asked(&format!("{:?} {kind}", modification.request_type), &container);
        if container == UTILITY_VM { Ok(()) } else { state.container(&container).map(drop) }
    }

    async fn files(&self, place: String, step: FilesStep) -> Result<FilesAnswer, Failure> {
        let kind = format!("{step:?}");
        let kind = kind.split(['(', ' ']).next().unwrap_or_default();
        drop(self.asked(&format!("files {kind}"), &place));
        // It has no files: whatever it is told to show is shown.
        Ok(FilesAnswer { shown: true, ..FilesAnswer::default() })
    }

    async fn pause(&self, container: String) -> Result<(), Failure> {
        self.asked("pause", &container).container(&container)?.frozen.send_replace(true);
        Ok(())
    }

    async fn resume(&self, container: String) -> Result<(), Failure> {
        self.asked("resume", &container).container(&container)?.frozen.send_replace(false);
        Ok(())
    }

    async fn dump_stacks(&self) -> Result<String, Failure> {
        Ok(self.journal().join("\n"))
    }

    async fn delete_state(&self, container: String) -> Result<(), Failure> {
        let mut state = self.asked("delete", &container);
        state.containers.remove(&container).map(drop).ok_or_else(|| unknown(&container))
    }
}
