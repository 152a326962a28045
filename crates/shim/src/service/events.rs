//! Task events to containerd, in order, over its ttrpc socket.

use std::collections::VecDeque;
use std::time::{Duration, SystemTime};

use containerd_shim_protos::events::task as event;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use protobuf::well_known_types::any::Any;
use protobuf::{MessageField, MessageFull};
use tokio::sync::mpsc;

use super::status::timestamp;

/// Events that wait for a containerd that is away. A sandbox makes a handful; more than
/// this means that nobody has listened for very long, and the oldest go first.
const BACKLOG: usize = 1024;
const FORWARD_DEADLINE: Duration = Duration::from_secs(5);
const RETRY: Duration = Duration::from_millis(500);

/// An event, the topic that containerd files it under, and its name there. The name is written down: to ask the message
/// for it builds descriptors of all that it imports, which stay for good.
pub(crate) trait TaskEvent: MessageFull {
    const TOPIC: &'static str;
    const NAME: &'static str;
}

macro_rules! topics {
    ($($message:ident => $topic:literal),* $(,)?) => {
        $(impl TaskEvent for event::$message {
            const TOPIC: &'static str = $topic;
            const NAME: &'static str = concat!("containerd.events.", stringify!($message));
        })*

        #[cfg(test)]
        #[test]
        fn an_event_is_named_as_containerd_names_it() {
            $(assert_eq!(<event::$message as TaskEvent>::NAME, event::$message::descriptor().full_name());)*
        }
    };
}
topics! {
    TaskCreate => "/tasks/create",
    TaskStart => "/tasks/start",
    TaskExit => "/tasks/exit",
    TaskDelete => "/tasks/delete",
    TaskExecAdded => "/tasks/exec-added",
    TaskExecStarted => "/tasks/exec-started",
    TaskPaused => "/tasks/paused",
    TaskResumed => "/tasks/resumed",
}

/// Hands events to the task that forwards them.
#[derive(Debug, Clone)]
pub(crate) struct Publisher {
    namespace: String,
    queue: mpsc::UnboundedSender<Envelope>,
}

impl Publisher {
    /// `address`: path of containerd's ttrpc socket.
    pub(crate) fn spawn(namespace: String, address: String) -> Publisher {
        // Unbounded towards the forwarder, which itself keeps at most BACKLOG: publishing
        // never blocks the sandbox.
        let (queue, events) = mpsc::unbounded_channel();
        tokio::spawn(forward_all(address, events));
        Publisher { namespace, queue }
    }

    pub(crate) fn publish<E: TaskEvent>(&self, event: &E) {
        let any = Any {
            type_url: <E as TaskEvent>::NAME.to_owned(),
            value: event.write_to_bytes().unwrap_or_default(),
            ..Any::default()
        };
        tracing::debug!(topic = E::TOPIC, "event");
        let envelope = Envelope {
            timestamp: MessageField::some(timestamp(SystemTime::now())),
            namespace: self.namespace.clone(),
            topic: E::TOPIC.to_owned(),
            event: MessageField::some(any),
            ..Envelope::default()
        };
        // The forwarder lives as long as the runtime.
        let _ = self.queue.send(envelope);
    }
}

async fn forward_all(address: String, mut events: mpsc::UnboundedReceiver<Envelope>) {
    let mut waiting = VecDeque::new();
    let mut client: Option<EventsClient> = None;
    loop {
        if waiting.is_empty() {
            match events.recv().await {
                Some(envelope) => waiting.push_back(envelope),
                None => return,
            }
        }
        while let Ok(envelope) = events.try_recv() {
            waiting.push_back(envelope);
        }
        while waiting.len() > BACKLOG {
            waiting.pop_front();
            tracing::warn!("containerd takes no events; the oldest is dropped");
        }
        if client.is_none() {
            match Client::connect(&format!("unix://{address}")).await {
                Ok(connected) => client = Some(EventsClient::new(connected)),
                Err(error) => {
                    tracing::debug!(%address, %error, "containerd's event socket is away");
                    tokio::time::sleep(RETRY).await;
                    continue;
                }
            }
        }
        let (Some(connection), Some(envelope)) = (&client, waiting.front()) else { continue };
        let request =
            ForwardRequest { envelope: MessageField::some(envelope.clone()), ..ForwardRequest::default() };
        let context = ttrpc::context::with_duration(FORWARD_DEADLINE);
        match connection.forward(context, &request).await {
            Ok(_) => {
                waiting.pop_front();
            }
            Err(ttrpc::Error::RpcStatus(status)) => {
                // containerd took it and said no; it would say so again.
                tracing::warn!(topic = envelope.topic, message = status.message(), "event refused");
                waiting.pop_front();
            }
            Err(error) => {
                tracing::debug!(%error, "event not delivered yet");
                client = None;
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}
