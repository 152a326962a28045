//! The one task that steps the session, and how each effect is begun.

use std::collections::HashMap;
use std::fmt::{self, Debug, Display, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use dunlin_migration::Moment;
use dunlin_migration::refusal::Refusal;
use dunlin_migration::session::{CallId, Completion, Effect, Event, Machine, Saved, Side};
use dunlin_wire::handover::Stream;
use dunlin_wire::ids::Epoch;
use dunlin_wire::service::{InitializeOptions, Origin};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::{Input, Reply, Request};
use crate::sandbox::Sandbox;
use crate::sandbox::saving::ImagesAt;

/// Most that PrepareAndExport answers, bytes: what one ttrpc message carries, less its frame.
const EXPORT_MAX: usize = (4 << 20) - (64 << 10);
/// How much of an event or effect is logged; some carry whole payloads.
const LOGGED: usize = 400;

/// Starts the driver; it ends with the sandbox.
pub(in crate::sandbox) fn spawn(sandbox: &Arc<Sandbox>, inputs: mpsc::UnboundedReceiver<Input>) {
    let driver = Driver {
        sandbox: Arc::clone(sandbox),
        started: Instant::now(),
        wake: None,
        next_call: 0,
        replies: HashMap::new(),
        requests: HashMap::new(),
        sockets: HashMap::new(),
        transfer: None,
    };
    tokio::spawn(driver.run(inputs));
}

/// A transfer's task and the way to stop it.
pub(super) struct Transfer {
    pub(super) cancel: tokio_util::sync::CancellationToken,
    pub(super) task: JoinHandle<()>,
}

struct Driver {
    sandbox: Arc<Sandbox>,
    started: Instant,
    wake: Option<Instant>,
    next_call: u64,
    replies: HashMap<CallId, Reply>,
    requests: HashMap<CallId, Request>,
    /// With the session they were handed over for.
    sockets: HashMap<Stream, (Epoch, OwnedFd)>,
    transfer: Option<Transfer>,
}

impl Driver {
    async fn run(mut self, mut inputs: mpsc::UnboundedReceiver<Input>) {
        loop {
            let wake = self.wake.unwrap_or_else(|| Instant::now() + Duration::from_secs(3600));
            let event = tokio::select! {
                input = inputs.recv() => match input {
                    Some(Input::Event(event)) => event,
                    Some(Input::Call(call, request, reply)) => {
                        let id = CallId(self.next_call);
                        self.next_call += 1;
                        self.replies.insert(id, reply);
                        self.requests.insert(id, request);
                        Event::Call(id, call)
                    }
                    None => return,
                },
                () = tokio::time::sleep_until(wake) => {
                    self.wake = None;
                    Event::Tick
                }
            };
            let now = Moment(self.started.elapsed());
            tracing::debug!(event = %Brief(&event), "session event");
            let effects = self.sandbox.mover.session().step(now, event).into_vec();
            for effect in effects {
                self.carry_out(effect);
            }
            self.sandbox.note_machine();
        }
    }

    fn carry_out(&mut self, effect: Effect) {
        tracing::debug!(effect = %Brief(&effect), "session effect");
        match effect {
            Effect::Reply(call, answer) => {
                if let Some(Request::Subscribe(after, sender)) = self.requests.remove(&call)
                    && answer.is_ok()
                {
                    // In the step that let it through, so that it is this session's.
                    let _ = sender.send(self.sandbox.mover.hub.subscribe(after));
                }
                if let Some(reply) = self.replies.remove(&call) {
                    // The caller may have gone away.
                    let _ = reply.send(answer);
                }
            }
            Effect::InitializeSource { epoch, call } => {
                self.sandbox.mover.hub.begin();
                let options = self.options(call);
                self.task(epoch, move |sandbox| async move {
                    Completion::VmInitialized(sandbox.initialize_source(options).await)
                });
            }
            Effect::Save { epoch } => {
                self.task(
                    epoch,
                    |sandbox| async move { Completion::Saved(sandbox.save().await.and_then(fits)) },
                );
            }
            Effect::Import { epoch, call, sandbox: _, config } => {
                self.sandbox.mover.hub.begin();
                let session = self.sandbox.mover.session().active().map(|(id, ..)| id.to_string());
                let images = match (self.requests.remove(&call), session) {
                    (Some(Request::Images(socket)), Some(session)) if !socket.is_empty() => {
                        Some(ImagesAt { socket: socket.into(), session })
                    }
                    _ => None,
                };
                self.task(epoch, move |sandbox| async move {
                    Completion::Imported(sandbox.import(&config, images).await)
                });
            }
            Effect::Patch { epoch, call, source, container: _ } => {
                let request = self.requests.remove(&call);
                self.task(epoch, move |sandbox| async move {
                    let result = match request {
                        Some(Request::Patch(task)) => sandbox.patch_container(*task, &source).await,
                        _ => Err(Refusal::unknown(
                            "the request to create the container is gone; create it again",
                        )),
                    };
                    Completion::ContainerPatched { source, result }
                });
            }
            Effect::CreateDestinationVm { epoch, call } => {
                let options = self.options(call);
                self.task(epoch, move |sandbox| async move {
                    Completion::VmCreated(sandbox.create_destination(options).await)
                });
            }
            Effect::AdoptSocket { epoch, call, stream } => {
                let result = match self.requests.remove(&call) {
                    Some(Request::Socket(Ok(socket))) => {
                        self.sockets.insert(stream, (epoch, socket));
                        Ok(())
                    }
                    Some(Request::Socket(Err(refusal))) => Err(refusal),
                    _ => Err(Refusal::unknown("the socket is gone; hand it over again")),
                };
                self.sandbox.mover.done(epoch, Completion::SocketAdopted { stream, result });
            }
            Effect::StartTransfer { epoch, side } => self.start_transfer(epoch, side),
            Effect::CancelTransfer { epoch, side } => {
                let transfer = self.transfer.take();
                self.task(epoch, move |sandbox| async move {
                    let result = match side {
                        Side::Source => sandbox.cancel_source(transfer).await,
                        Side::Destination => sandbox.cancel_destination(transfer).await,
                    };
                    Completion::CancelDone(result)
                });
            }
            Effect::ResumeSource { epoch, rebuild: _ } => {
                self.task(epoch, |sandbox| async move { Completion::Resumed(sandbox.resume_source().await) });
            }
            Effect::RunDestination { epoch, handoff } => {
                self.task(epoch, |sandbox| async move {
                    Completion::Resumed(sandbox.run_destination(handoff).await)
                });
            }
            Effect::StopVm { epoch, side } => {
                let session =
                    self.sandbox.mover.session().active().map(|(id, ..)| id.to_string()).unwrap_or_default();
                self.task(epoch, move |sandbox| async move {
                    let ended = match side {
                        Side::Source => sandbox.move_away(session).await,
                        Side::Destination => sandbox.stop_machine("the move to this host was stopped").await,
                    };
                    Completion::Stopped(ended.map_err(|error| Refusal::unknown(error.to_string())))
                });
            }
            Effect::AbortMigrated { epoch: _ } => self.sandbox.abort_migrated(),
            Effect::CloseSockets { epoch } => self.sockets.retain(|_, (of, _)| *of != epoch),
            Effect::Thaw { epoch } => {
                if !self.frozen_by_another(epoch) {
                    self.sandbox.thaw();
                }
            }
            Effect::Notify { epoch: _, notice } => {
                let origin = match self.sandbox.mover.session().active() {
                    Some((_, _, Side::Source)) => Origin::ORIGIN_SOURCE,
                    Some((_, _, Side::Destination)) => Origin::ORIGIN_DESTINATION,
                    None => Origin::ORIGIN_UNSPECIFIED,
                };
                self.sandbox.mover.hub.publish(notice.to_wire(origin));
            }
            Effect::EndNotifications { epoch: _ } => self.sandbox.mover.hub.end(),
            Effect::WakeAt(moment) => self.wake = self.started.checked_add(moment.0),
        }
    }

    /// Whether a session after that of `epoch` holds the sandbox: what ends late of the one before must not open it.
    fn frozen_by_another(&self, epoch: Epoch) -> bool {
        let session = self.sandbox.mover.session();
        let another =
            session.active().is_some_and(|(_, present, side)| present != epoch && side == Side::Source);
        another && session.view().machine() == Some(Machine::Frozen)
    }

    fn options(&mut self, call: CallId) -> Option<InitializeOptions> {
        match self.requests.remove(&call) {
            Some(Request::Options(options)) => options,
            _ => None,
        }
    }

    /// Runs work whose end the session is told.
    fn task<W, F>(&self, epoch: Epoch, work: W)
    where
        W: FnOnce(Arc<Sandbox>) -> F,
        F: Future<Output = Completion> + Send + 'static,
    {
        let sandbox = Arc::clone(&self.sandbox);
        let completion = work(Arc::clone(&sandbox));
        tokio::spawn(async move { sandbox.mover.done(epoch, completion.await) });
    }

    fn start_transfer(&mut self, epoch: Epoch, side: Side) {
        let sockets = self.sockets.drain().map(|(stream, (_, socket))| (stream, socket)).collect();
        let cancel = tokio_util::sync::CancellationToken::new();
        let sandbox = Arc::clone(&self.sandbox);
        let stop = cancel.clone();
        let task = tokio::spawn(async move {
            let completion = match side {
                Side::Source => sandbox.send_away(epoch, sockets, &stop).await,
                Side::Destination => match sandbox.receive(epoch, sockets, &stop).await {
                    Ok(progress) => Completion::TransferCompleted { progress, handoff: None },
                    Err(fault) => Completion::TransferFailed(fault),
                },
            };
            sandbox.mover.done(epoch, completion);
        });
        self.transfer = Some(Transfer { cancel, task });
    }
}

/// An export that one answer of the service can carry.
fn fits(saved: Saved) -> Result<Saved, Refusal> {
    let state = saved.sandbox_state.as_ref().map_or(0, |state| state.value.len());
    let bytes = saved.config.value.len() + state;
    if bytes <= EXPORT_MAX {
        return Ok(saved);
    }
    Err(Refusal::precondition(format!(
        "the saved state takes {bytes} bytes, of which {state} are the sandbox's configuration, and one answer carries \
         {EXPORT_MAX}; delete ended containers and execs, or spread the containers over more sandboxes"
    )))
}

/// The first of what is to be logged; the rest is not even written out.
struct Brief<'a, T>(&'a T);

impl<T: Debug> Display for Brief<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut cut = Cut { to: f, left: LOGGED };
        if write!(cut, "{:?}", self.0).is_err() {
            f.write_str("...")?;
        }
        Ok(())
    }
}

struct Cut<'a, 'b> {
    to: &'a mut fmt::Formatter<'b>,
    left: usize,
}

impl Write for Cut<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if text.len() > self.left {
            return Err(fmt::Error);
        }
        self.left -= text.len();
        self.to.write_str(text)
    }
}

#[cfg(test)]
mod tests {
    use dunlin_wire::Any;

    use super::*;

    fn any(bytes: usize) -> Any {
        Any { value: vec![1; bytes], ..Any::default() }
    }

    #[test]
    fn an_export_too_large_for_an_answer_is_refused_with_its_size() {
        let saved = |config, state| Saved {
            config: any(config),
            sandbox_state: Some(any(state)),
            disks: std::collections::BTreeSet::new(),
        };
        assert!(fits(saved(EXPORT_MAX - 1, 1)).is_ok());
        let refusal = fits(saved(EXPORT_MAX, 1)).unwrap_err();
        assert!(refusal.message.contains(&(EXPORT_MAX + 1).to_string()), "{refusal}");
    }

    #[test]
    fn a_payload_is_not_logged_whole() {
        assert_eq!(Brief(&Event::Tick).to_string(), "Tick");
        let text = Brief(&any(1 << 20)).to_string();
        assert!(text.starts_with("Any {") && text.ends_with("...") && text.len() < 500, "{text}");
    }
}
