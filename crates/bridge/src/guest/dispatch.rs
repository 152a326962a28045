//! From a request's frame to the handler's method, and from its result to the answer's frame.

use std::time::Duration;

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Failure, Handler, ShutdownKind};
use crate::frame::{Frame, HEADER_LEN, MAX_FROM_GUEST};
use crate::hresult::HResult;
use crate::message::{
    CreateRequest, CreateResponse, DumpStacksResponse, ErrorRecord, ExecuteProcessRequest,
    ExecuteProcessResponse, FilesRequest, FilesResponse, INFINITE_MS, Modification, ModifyRequest,
    PropertiesRequest, PropertiesResponse, Request, RequestBase, ResizeConsoleRequest, ResponseBase,
    SchemaVersion, SignalProcessRequest, StrJson, WaitForProcessRequest, WaitForProcessResponse,
};

const SIGKILL: i32 = 9;
const LINE_UNKNOWN: u32 = u32::MAX;
/// Longest text of a failure: twice in the answer, each character six when escaped, it must fit a frame.
const MAX_MESSAGE: usize = 4 * 1024;

/// Runs a request and yields the whole answer.
pub(super) async fn run<H: Handler>(handler: &H, frame: &Frame) -> Bytes {
    match Request::from_message_type(frame.message) {
        None | Some(Request::NegotiateProtocol) => {
            let text = format!("this guest serves no message {:#010x} now", frame.message.0);
            failed(frame, &Failure::new(HResult::NOT_IMPLEMENTED, text))
        }
        Some(request) => {
            serve(handler, request, frame).await.unwrap_or_else(|failure| failed(frame, &failure))
        }
    }
}

fn read<T: DeserializeOwned>(frame: &Frame) -> Result<T, Failure> {
    serde_json::from_slice(&frame.body)
        .map_err(|error| Failure::new(HResult::INVALID_JSON, format!("the request cannot be read: {error}")))
}

async fn serve<H: Handler>(handler: &H, request: Request, frame: &Frame) -> Result<Bytes, Failure> {
    let RequestBase { container_id: container, activity_id, .. } = read(frame)?;
    let base = ResponseBase { activity_id, ..ResponseBase::default() };
    match request {
        Request::Create => {
            let config = read::<CreateRequest>(frame)?.container_config.0;
            if config.schema_version < SchemaVersion::V21 {
                let text = "the container's document is older than version 2.1";
                return Err(Failure::new(HResult::INVALID_JSON, text));
            }
            handler.create(container, config).await?;
            return Ok(encode(frame, &CreateResponse { base, ..CreateResponse::default() }));
        }
        Request::ExecuteProcess => {
            let settings = read::<ExecuteProcessRequest>(frame)?.settings;
            let stdio = settings.vsock_stdio_relay_settings.unwrap_or_default();
            let process_id = handler.execute(container, settings.process_parameters.0, stdio).await?;
            return Ok(encode(frame, &ExecuteProcessResponse { base, process_id }));
        }
        Request::WaitForProcess => {
            let wait: WaitForProcessRequest = read(frame)?;
            let timeout = (wait.timeout_in_ms != INFINITE_MS)
                .then(|| Duration::from_millis(u64::from(wait.timeout_in_ms)));
            let exit = handler.wait(container, wait.process_id, timeout).await?;
            return Ok(encode(frame, &WaitForProcessResponse::of(base, exit)));
        }
        Request::GetProperties => {
            let kinds = read::<PropertiesRequest>(frame)?.query.0.property_types;
            let properties = StrJson(handler.properties(container, kinds).await?);
            return Ok(encode(frame, &PropertiesResponse { base, properties }));
        }
        Request::DumpStacks => {
            let guest_stacks = handler.dump_stacks().await?;
            return Ok(encode(frame, &DumpStacksResponse { base, guest_stacks }));
        }
        Request::SignalProcess => {
            let request: SignalProcessRequest = read(frame)?;
            let signal = request.options.map_or(0, |options| options.signal);
            let signal = if signal == 0 { SIGKILL } else { signal };
            handler.signal(container, request.process_id, signal).await?;
        }
        Request::ResizeConsole => {
            let request: ResizeConsoleRequest = read(frame)?;
            handler.resize(container, request.process_id, request.height, request.width).await?;
        }
        Request::ModifySettings => {
            let request: ModifyRequest = read(frame)?;
            let modification = Modification::try_from(request.request)
                .map_err(|error| Failure::new(HResult::FAIL, error.to_string()))?;
            handler.modify(container, modification).await?;
        }
        Request::Files => {
            let request: FilesRequest = read(frame)?;
            let answer = handler.files(request.place, request.step).await?;
            return Ok(encode(frame, &FilesResponse { base, answer }));
        }
        Request::Start => handler.start(container).await?,
        Request::ShutdownGraceful => handler.shutdown(container, ShutdownKind::Graceful).await?,
        Request::ShutdownForced => handler.shutdown(container, ShutdownKind::Forced).await?,
        Request::DeleteContainerState => handler.delete_state(container).await?,
        Request::PauseContainer => handler.pause(container).await?,
        Request::ResumeContainer => handler.resume(container).await?,
        Request::NegotiateProtocol => {
            return Err(Failure::new(HResult::NOT_IMPLEMENTED, "the bridge has been negotiated already"));
        }
    }
    Ok(encode(frame, &base))
}

/// The frame of an answer. One that hosts would refuse for its size becomes a failure.
pub(super) fn encode<A: Serialize>(request: &Frame, answer: &A) -> Bytes {
    match serde_json::to_vec(answer) {
        Ok(body) if HEADER_LEN + body.len() <= MAX_FROM_GUEST => {
            Frame { message: request.message.response(), id: request.id, body: Bytes::from(body) }.encode()
        }
        Ok(body) => {
            let text =
                format!("the answer is {} bytes, hosts take {MAX_FROM_GUEST}; ask for less", body.len());
            failed(request, &Failure::new(HResult::FAIL, text))
        }
        Err(error) => {
            failed(request, &Failure::new(HResult::FAIL, format!("the answer is no JSON: {error}")))
        }
    }
}

/// The frame of a failed request's answer.
pub(super) fn failed(request: &Frame, failure: &Failure) -> Bytes {
    let activity_id = read::<RequestBase>(request).map(|base| base.activity_id).unwrap_or_default();
    let mut message = failure.message.clone();
    if message.len() > MAX_MESSAGE {
        let cut = (0..=MAX_MESSAGE).rev().find(|at| message.is_char_boundary(*at)).unwrap_or(0);
        message.truncate(cut);
    }
    let answer = ResponseBase {
        result: failure.hresult,
        activity_id: if activity_id.len() == 36 { activity_id } else { String::new() },
        error_message: message.clone(),
        error_records: vec![ErrorRecord {
            result: failure.hresult,
            message,
            module_name: "dunlin-guest".to_owned(),
            line: LINE_UNKNOWN,
            ..ErrorRecord::default()
        }],
    };
    // A bare answer of bounded texts always becomes JSON of a bounded size.
    let body = serde_json::to_vec(&answer).unwrap_or_default();
    Frame { message: request.message.response(), id: request.id, body: Bytes::from(body) }.encode()
}
