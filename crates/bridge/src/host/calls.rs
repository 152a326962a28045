//! The calls of a host, one a request.

use std::time::Duration;

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{Bridge, BridgeError, CALL_DEADLINE, Registration, check};
use crate::frame::{Frame, MAX_FROM_HOST};
use crate::message::{
    ContainerConfig, CreateRequest, CreateResponse, DumpStacksResponse, ExecuteProcessRequest,
    ExecuteProcessResponse, ExecuteProcessSettings, FilesAnswer, FilesRequest, FilesResponse, FilesStep,
    GuestPid, INFINITE_MS, Modification, ModificationRequest, ModifyRequest, ProcessExit, ProcessParameters,
    PropertiesRequest, PropertiesResponse, PropertyQuery, PropertyType, Request, RequestBase,
    ResizeConsoleRequest, ResponseBase, SignalOptions, SignalProcessRequest, StrJson, UTILITY_VM,
    VsockStdioRelaySettings, WaitForProcessRequest, WaitForProcessResponse,
};

/// A wait that is under way in the guest. Dropping it stops waiting; the guest's answer is then thrown away.
#[derive(Debug)]
pub struct PendingWait {
    registration: Registration,
    deadline: Option<Duration>,
}

impl PendingWait {
    /// The request's id; part of what moves.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.registration.id
    }

    /// The process's end.
    ///
    /// # Errors
    /// [`BridgeError::Guest`] with `TIMEOUT` when the wait had a time and it ran out, with `NOT_FOUND` for an unknown
    /// process.
    pub async fn exit(self) -> Result<ProcessExit, BridgeError> {
        let answer: WaitForProcessResponse =
            answered("WaitForProcess", self.registration, self.deadline).await?;
        Ok(answer.exit())
    }
}

async fn answered<A: DeserializeOwned>(
    operation: &'static str,
    mut registration: Registration,
    deadline: Option<Duration>,
) -> Result<A, BridgeError> {
    let receiver = &mut registration.answer;
    let answer = match deadline {
        None => receiver.await,
        Some(after) => match tokio::time::timeout(after, receiver).await {
            Ok(answer) => answer,
            Err(_) => return Err(BridgeError::Deadline { operation, after }),
        },
    };
    let answer = answer.map_err(|_| BridgeError::Closed)?;
    check(operation, &answer)?;
    serde_json::from_slice(&answer).map_err(|source| BridgeError::Answer { operation, source })
}

impl Bridge {
    fn ask<B: Serialize>(
        &self,
        operation: &'static str,
        request: Request,
        body: &B,
    ) -> Result<Registration, BridgeError> {
        let mut body =
            serde_json::to_vec(body).map_err(|source| BridgeError::Encode { operation, source })?;
        body.push(b'\n');
        let size = body.len() + crate::frame::HEADER_LEN;
        if size > MAX_FROM_HOST {
            return Err(BridgeError::TooLarge { operation, size });
        }
        let id = self.take_id();
        let message = request.message_type();
        let frame = Frame { message, id, body: Bytes::from(body) }.encode();
        self.register(id, message, Some(frame))
    }

    async fn call<B: Serialize, A: DeserializeOwned>(
        &self,
        operation: &'static str,
        request: Request,
        body: &B,
    ) -> Result<A, BridgeError> {
        let registration = self.ask(operation, request, body)?;
        answered(operation, registration, Some(CALL_DEADLINE)).await
    }

    async fn plain(
        &self,
        operation: &'static str,
        request: Request,
        container: &str,
    ) -> Result<(), BridgeError> {
        self.call::<_, ResponseBase>(operation, request, &RequestBase::of(container)).await.map(drop)
    }

    /// Creates a container; its init is not started.
    ///
    /// # Errors
    /// [`BridgeError::Guest`] with `SYSTEM_ALREADY_EXISTS` when the id is taken.
    pub async fn create(&self, container: &str, config: &ContainerConfig) -> Result<(), BridgeError> {
        let body =
            CreateRequest { base: RequestBase::of(container), container_config: StrJson(config.clone()) };
        self.call::<_, CreateResponse>("Create", Request::Create, &body).await.map(drop)
    }

    /// Part of the protocol; guests do nothing on it. The init is started by [`Bridge::execute`].
    ///
    /// # Errors
    /// [`BridgeError`].
    pub async fn start(&self, container: &str) -> Result<(), BridgeError> {
        self.plain("Start", Request::Start, container).await
    }

    /// Starts the container's init (no OCI process in `parameters`) or another process in it.
    ///
    /// # Errors
    /// [`BridgeError::Guest`] with `SYSTEM_NOT_FOUND` for an unknown container.
    pub async fn execute(
        &self,
        container: &str,
        parameters: &ProcessParameters,
        stdio: Option<VsockStdioRelaySettings>,
    ) -> Result<GuestPid, BridgeError> {
        let body = ExecuteProcessRequest {
            base: RequestBase::of(container),
            settings: ExecuteProcessSettings {
                process_parameters: StrJson(parameters.clone()),
                vsock_stdio_relay_settings: stdio,
            },
        };
        let answer: ExecuteProcessResponse =
            self.call("ExecuteProcess", Request::ExecuteProcess, &body).await?;
        Ok(answer.process_id)
    }

    /// Asks for a process's exit and yields the wait, whose id can be saved before the answer comes.
    ///
    /// # Errors
    /// [`BridgeError::Closed`].
    pub fn begin_wait(
        &self,
        container: &str,
        pid: GuestPid,
        timeout: Option<Duration>,
    ) -> Result<PendingWait, BridgeError> {
        let timeout_in_ms = timeout.map_or(INFINITE_MS, |timeout| {
            u32::try_from(timeout.as_millis()).unwrap_or(INFINITE_MS).min(INFINITE_MS - 1)
        });
        let body = WaitForProcessRequest { base: RequestBase::of(container), process_id: pid, timeout_in_ms };
        let registration = self.ask("WaitForProcess", Request::WaitForProcess, &body)?;
        Ok(PendingWait { registration, deadline: timeout.map(|timeout| timeout + CALL_DEADLINE) })
    }

    /// Waits for a process's exit; for ever without a timeout. Dropping the future stops waiting.
    ///
    /// # Errors
    /// As [`PendingWait::exit`].
    pub async fn wait(
        &self,
        container: &str,
        pid: GuestPid,
        timeout: Option<Duration>,
    ) -> Result<ProcessExit, BridgeError> {
        self.begin_wait(container, pid, timeout)?.exit().await
    }

    /// Takes over a wait that another host has asked for under this id; its answer may already be here. Guests of
    /// ours drop such answers when a new host negotiates, other guests send them.
    ///
    /// # Errors
    /// [`BridgeError::Closed`].
    pub fn adopt_wait(&self, id: u64) -> Result<PendingWait, BridgeError> {
        let registration = self.register(id, Request::WaitForProcess.message_type(), None)?;
        Ok(PendingWait { registration, deadline: None })
    }

    /// Signals a process; SIGKILL without a signal.
    ///
    /// # Errors
    /// [`BridgeError::Guest`] with `NOT_FOUND` when the process is gone.
    pub async fn signal(
        &self,
        container: &str,
        pid: GuestPid,
        signal: Option<i32>,
    ) -> Result<(), BridgeError> {
        let body = SignalProcessRequest {
            base: RequestBase::of(container),
            process_id: pid,
            options: signal.map(|signal| SignalOptions { signal }),
        };
        self.call::<_, ResponseBase>("SignalProcess", Request::SignalProcess, &body).await.map(drop)
    }

    /// Sets the size of a process's terminal, in characters.
    ///
    /// # Errors
    /// [`BridgeError::Guest`] with `NOT_FOUND` when the process is gone.
    pub async fn resize(
        &self,
        container: &str,
        pid: GuestPid,
        height: u16,
        width: u16,
    ) -> Result<(), BridgeError> {
        let body = ResizeConsoleRequest { base: RequestBase::of(container), process_id: pid, height, width };
        self.call::<_, ResponseBase>("ResizeConsole", Request::ResizeConsole, &body).await.map(drop)
    }

    /// A container's properties, one document for all kinds asked for.
    ///
    /// # Errors
    /// [`BridgeError::Guest`].
    pub async fn properties(&self, container: &str, kinds: &[PropertyType]) -> Result<Value, BridgeError> {
        let body = PropertiesRequest {
            base: RequestBase::of(container),
            query: StrJson(PropertyQuery { property_types: kinds.to_vec() }),
        };
        let answer: PropertiesResponse = self.call("GetProperties", Request::GetProperties, &body).await?;
        Ok(answer.properties.0)
    }

    /// Changes the VM ([`UTILITY_VM`]) or a container.
    ///
    /// # Errors
    /// [`BridgeError::Guest`].
    pub async fn modify(&self, container: &str, modification: &Modification) -> Result<(), BridgeError> {
        const OPERATION: &str = "ModifySettings";
        let request = ModificationRequest::try_from(modification)
            .map_err(|source| BridgeError::Encode { operation: OPERATION, source })?;
        let body = ModifyRequest { base: RequestBase::of(container), request };
        self.call::<_, ResponseBase>(OPERATION, Request::ModifySettings, &body).await.map(drop)
    }

    /// Puts files into the guest, or takes them out. Only guests of ours, since version 2.
    ///
    /// # Errors
    /// [`BridgeError::Guest`] with `NOT_IMPLEMENTED` from other guests.
    pub async fn files(&self, place: &str, step: FilesStep) -> Result<FilesAnswer, BridgeError> {
        let body = FilesRequest { base: RequestBase::of(UTILITY_VM), place: place.to_owned(), step };
        let answer: FilesResponse = self.call("Files", Request::Files, &body).await?;
        Ok(answer.answer)
    }

    /// Freezes a container's processes. Only guests of ours.
    ///
    /// # Errors
    /// [`BridgeError::Guest`] with `NOT_IMPLEMENTED` from other guests.
    pub async fn pause(&self, container: &str) -> Result<(), BridgeError> {
        self.plain("PauseContainer", Request::PauseContainer, container).await
    }

    /// Thaws a container's processes. Only guests of ours.
    ///
    /// # Errors
    /// As [`Bridge::pause`].
    pub async fn resume(&self, container: &str) -> Result<(), BridgeError> {
        self.plain("ResumeContainer", Request::ResumeContainer, container).await
    }

    /// SIGTERM to the container's init; its streams are given up.
    ///
    /// # Errors
    /// [`BridgeError::Guest`] with `SYSTEM_NOT_FOUND` for an unknown container.
    pub async fn shutdown_graceful(&self, container: &str) -> Result<(), BridgeError> {
        self.plain("ShutdownGraceful", Request::ShutdownGraceful, container).await
    }

    /// SIGKILL to the container's init; its streams are given up.
    ///
    /// # Errors
    /// As [`Bridge::shutdown_graceful`].
    pub async fn shutdown_forced(&self, container: &str) -> Result<(), BridgeError> {
        self.plain("ShutdownForced", Request::ShutdownForced, container).await
    }

    /// Removes what the guest keeps of a stopped container.
    ///
    /// # Errors
    /// As [`Bridge::shutdown_graceful`].
    pub async fn delete_state(&self, container: &str) -> Result<(), BridgeError> {
        self.plain("DeleteContainerState", Request::DeleteContainerState, container).await
    }

    /// What the guest's tasks are at, as text.
    ///
    /// # Errors
    /// [`BridgeError`].
    pub async fn dump_stacks(&self) -> Result<String, BridgeError> {
        let body = RequestBase::of(UTILITY_VM);
        let answer: DumpStacksResponse = self.call("DumpStacks", Request::DumpStacks, &body).await?;
        Ok(answer.guest_stacks)
    }
}
