//! The moves that leave this host: at most one a sandbox, each driven by a task of its own.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dunlin_migration::coordinator::{Coordinator, Deadlines};
use dunlin_wire::ids::SessionId;
use tokio::sync::{broadcast, mpsc, oneshot, watch};

use super::carrier::{Hands, Limits, Means};
use super::drive::{CANCELS, CancelRequest, Carrier, drive};
use super::told::{Asides, Names, TOLD, Teller, ending};
use crate::config::NodeConfig;
use crate::containerd::Containerd;
use crate::containerd::facts::{FactsError, Gathered, NetworkWish, gather, sandbox_named};
use crate::images::exports::Exports;
use crate::peer::remote::{PeerError, Remote};
use crate::peer::tls::Keys;
use crate::proto::{MigrateRequest, MoveEvent, SessionRow};
use crate::shim::ShimError;

/// Bound of a transfer when the caller names none.
const TRANSFER: Duration = Duration::from_secs(7200);

/// Why a move did not begin, or could not be turned back.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MoveError {
    /// Not among the peers.
    #[error("unknown node {name}; known: {known}")]
    UnknownNode {
        /// As asked.
        name: String,
        /// The peers' names.
        known: String,
    },
    /// The node itself.
    #[error("container `{container}` is on {node} already")]
    Here {
        /// The container.
        container: String,
        /// This node.
        node: String,
    },
    /// It moves already.
    #[error(
        "container `{container}` is moving already, in session {session} to {to}; wait for it, or `dunlin cancel {container}`"
    )]
    Busy {
        /// The container.
        container: String,
        /// The session that runs.
        session: String,
        /// Its destination.
        to: String,
    },
    /// Nothing to cancel.
    #[error(
        "no move of container `{container}` in namespace `{namespace}` is running here; `dunlin status` lists the moves"
    )]
    NotMoving {
        /// The container.
        container: String,
        /// Its namespace.
        namespace: String,
    },
    /// Too late, in the coordinator's words.
    #[error("{0}")]
    TooLate(String),
    /// The daemon is going down.
    #[error("the node is shutting down; begin the move again when it is back")]
    Closing,
    /// The container cannot move.
    #[error(transparent)]
    Facts(#[from] FactsError),
    /// Its shim cannot be asked.
    #[error(transparent)]
    Shim(#[from] ShimError),
    /// The peer's entry cannot be used.
    #[error(transparent)]
    Peer(#[from] PeerError),
}

/// Namespace and sandbox.
type Key = (String, String);

/// The table of moves.
#[derive(Clone)]
pub(crate) struct Moves {
    config: Arc<NodeConfig>,
    containerd: Containerd,
    keys: Option<Arc<Keys>>,
    table: Arc<Mutex<Table>>,
    running: watch::Sender<usize>,
    /// What the destinations may read of the images here.
    exports: Exports,
}

#[derive(Default)]
struct Table {
    moves: HashMap<Key, Entry>,
    closing: bool,
}

struct Entry {
    session: String,
    to: String,
    /// As it was asked for.
    asked: String,
    /// Empty until they were gathered.
    containers: Vec<String>,
    phase: watch::Receiver<&'static str>,
    cancels: mpsc::Sender<CancelRequest>,
}

/// A move that began.
pub(crate) struct Begun {
    pub(crate) names: Names,
    pub(crate) events: broadcast::Receiver<MoveEvent>,
}

impl Moves {
    pub(crate) fn new(
        config: Arc<NodeConfig>,
        containerd: Containerd,
        keys: Option<Arc<Keys>>,
        exports: Exports,
    ) -> Moves {
        Moves { config, containerd, keys, table: Arc::default(), running: watch::channel(0).0, exports }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Checks what can be checked on this host and begins.
    pub(crate) async fn begin(&self, request: &MigrateRequest) -> Result<Begun, MoveError> {
        let MigrateRequest { namespace, container, to, .. } = request;
        if *to == self.config.name {
            return Err(MoveError::Here { container: container.clone(), node: to.clone() });
        }
        let peer = self
            .config
            .peer(to)
            .ok_or_else(|| MoveError::UnknownNode { name: to.clone(), known: self.config.peer_names() })?;
        let session = SessionId::new(uuid::Uuid::new_v4().to_string())
            .unwrap_or_else(|_| unreachable!("a UUID is a session id"));
        let mut names = Names {
            session: session.to_string(),
            namespace: namespace.clone(),
            container: container.clone(),
            sandbox: sandbox_named(&self.containerd, namespace, container).await?,
            containers: Vec::new(),
            stays: Vec::new(),
            from: self.config.name.clone(),
            to: to.clone(),
        };
        let (phase_sender, phase) = watch::channel("planned");
        let (cancels, cancel_requests) = mpsc::channel(CANCELS);
        // Booked before its containers are looked at, so that two callers cannot both find it free.
        let booking = self.book(&names, phase, cancels)?;
        let wish = NetworkWish { mode: request.network(), namespaces: request.namespaces.clone() };
        let Gathered { sandbox: facts, stays } =
            gather(&self.containerd, namespace, &names.sandbox, container, &wish).await?;
        (names.containers, names.stays) = (facts.ids(), stays);
        booking.note(&names.containers);
        let remote = Remote::new(peer, self.keys.as_deref(), &self.config.name, session.as_str())?;
        let limits = Limits {
            transfer: if request.timeout_ms == 0 {
                TRANSFER
            } else {
                Duration::from_millis(request.timeout_ms)
            },
            downtime_ms: request.downtime_limit_ms,
            copy_shared_disks: request.copy_shared_disks,
        };
        let means = Means {
            config: Arc::clone(&self.config),
            containerd: self.containerd.clone(),
            exports: self.exports.clone(),
        };
        let (events, receiver) = broadcast::channel(TOLD);
        let told = events.clone();
        let hands = Arc::new(Hands::new(means, session, facts, remote, limits, told));
        hands.reachable().await?;

        let coordinator = Coordinator::new(Deadlines { transfer: limits.transfer, ..Deadlines::default() });
        let told = names.clone();
        tokio::spawn(async move {
            let mut teller = Teller::new(events.clone(), phase_sender);
            let carrier: Arc<dyn Carrier> = Arc::clone(&hands) as Arc<dyn Carrier>;
            let report = drive(coordinator, carrier, cancel_requests, &mut teller).await;
            let asides =
                Asides { warnings: hands.warnings(), nics: hands.nics(), fetched_bytes: hands.fetched() };
            let last = ending(&told, &report, teller.furthest(), asides);
            tracing::info!(session = told.session, ending = ?last.event, "the move ended");
            // Free before it is told: whoever hears the end may begin the next move.
            drop(booking);
            let _ = events.send(last);
        });
        Ok(Begun { names, events: receiver })
    }

    fn book(
        &self,
        names: &Names,
        phase: watch::Receiver<&'static str>,
        cancels: mpsc::Sender<CancelRequest>,
    ) -> Result<Booking, MoveError> {
        let key = (names.namespace.clone(), names.sandbox.clone());
        let mut table = self.table();
        if table.closing {
            return Err(MoveError::Closing);
        }
        if let Some(entry) = table.moves.get(&key) {
            return Err(MoveError::Busy {
                container: names.container.clone(),
                session: entry.session.clone(),
                to: entry.to.clone(),
            });
        }
        let entry = Entry {
            session: names.session.clone(),
            to: names.to.clone(),
            asked: names.container.clone(),
            containers: Vec::new(),
            phase,
            cancels,
        };
        table.moves.insert(key.clone(), entry);
        self.running.send_modify(|count| *count += 1);
        Ok(Booking { moves: self.clone(), key })
    }

    /// Asks a move to turn back; answers its session once the coordinator has agreed.
    pub(crate) async fn cancel(&self, namespace: &str, container: &str) -> Result<String, MoveError> {
        let found = {
            let table = self.table();
            let entry = table.find(namespace, container);
            entry.map(|entry| (entry.session.clone(), entry.cancels.clone()))
        };
        let not_moving = || MoveError::NotMoving { container: container.into(), namespace: namespace.into() };
        let (session, cancels) = found.ok_or_else(not_moving)?;
        let (reply, answer) = oneshot::channel();
        cancels.send(reply).await.map_err(|_| not_moving())?;
        match answer.await {
            Ok(Ok(())) => Ok(session),
            Ok(Err(too_late)) => Err(MoveError::TooLate(too_late.to_string())),
            Err(_) => Err(not_moving()),
        }
    }

    /// Refuses new moves, cancels those that can be, and waits for all.
    pub(crate) async fn close(&self, limit: Duration) {
        let keys: Vec<Key> = {
            let mut table = self.table();
            table.closing = true;
            table.moves.keys().cloned().collect()
        };
        let mut running = self.running.subscribe();
        let ending = async {
            for (namespace, sandbox) in keys {
                tracing::warn!(namespace, sandbox, "shutting down: the move is cancelled");
                if let Err(error) = self.cancel(&namespace, &sandbox).await {
                    tracing::warn!(%error, "waiting for the move to end");
                }
            }
            let _ = running.wait_for(|count| *count == 0).await;
        };
        if tokio::time::timeout(limit, ending).await.is_err() {
            tracing::error!(
                "moves are still running; their containers may need `dunlin status` after a restart"
            );
        }
    }

    /// The session that moves `container`, if any.
    pub(crate) fn session_of(&self, namespace: &str, container: &str) -> Option<String> {
        self.table().find(namespace, container).map(|entry| entry.session.clone())
    }

    /// For `dunlin status`.
    pub(crate) fn rows(&self) -> Vec<SessionRow> {
        let table = self.table();
        let row = |((namespace, sandbox), entry): (&Key, &Entry)| SessionRow {
            session: entry.session.clone(),
            direction: "outgoing".into(),
            namespace: namespace.clone(),
            sandbox: sandbox.clone(),
            containers: entry.containers.clone(),
            peer: entry.to.clone(),
            phase: (*entry.phase.borrow()).into(),
        };
        table.moves.iter().map(row).collect()
    }
}

impl Table {
    /// The move that `name` takes part in: a sandbox, a container of it, or what was asked for.
    fn find(&self, namespace: &str, name: &str) -> Option<&Entry> {
        let named = |((space, sandbox), entry): &(&Key, &Entry)| {
            space == namespace
                && (sandbox == name || entry.asked == name || entry.containers.iter().any(|id| id == name))
        };
        self.moves.iter().find(named).map(|(_, entry)| entry)
    }
}

/// A sandbox's place in the table, given back when dropped.
struct Booking {
    moves: Moves,
    key: Key,
}

impl Booking {
    /// Which containers move.
    fn note(&self, containers: &[String]) {
        if let Some(entry) = self.moves.table().moves.get_mut(&self.key) {
            entry.containers = containers.to_vec();
        }
    }
}

impl Drop for Booking {
    fn drop(&mut self) {
        self.moves.table().moves.remove(&self.key);
        self.moves.running.send_modify(|count| *count -= 1);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn names(session: &str, sandbox: &str, asked: &str) -> Names {
        Names {
            session: session.into(),
            namespace: "default".into(),
            container: asked.into(),
            sandbox: sandbox.into(),
            containers: Vec::new(),
            stays: Vec::new(),
            from: "a".into(),
            to: "b".into(),
        }
    }

    #[tokio::test]
    async fn a_sandbox_moves_once_and_is_found_by_each_of_its_names() {
        let text = "name=\"a\"\nlisten=\"127.0.0.1:1\"\ndata_listen=\"127.0.0.1:2\"";
        let config = Arc::new(NodeConfig::parse(Path::new("a"), text).unwrap());
        let moves = Moves::new(config, Containerd::unreachable(), None, Exports::default());
        let book = |session, sandbox, asked| {
            let (phase, (cancels, requests)) = (watch::channel("planned").1, mpsc::channel(CANCELS));
            moves.book(&names(session, sandbox, asked), phase, cancels).map(|booking| (booking, requests))
        };
        let (booking, mut requests) = book("s-1", "pod", "web").unwrap();
        let _other = book("s-2", "alone", "alone").unwrap();
        // Before its containers are known, and after.
        assert_eq!(moves.session_of("default", "web").as_deref(), Some("s-1"));
        assert_eq!(moves.session_of("default", "side"), None);
        booking.note(&["pod".into(), "side".into(), "web".into()]);
        for name in ["pod", "side", "web"] {
            assert_eq!(moves.session_of("default", name).as_deref(), Some("s-1"), "{name}");
            assert_eq!(moves.session_of("k8s.io", name), None, "{name}");
        }
        let busy = book("s-3", "pod", "side").err().unwrap();
        assert!(matches!(&busy, MoveError::Busy { session, .. } if session == "s-1"), "{busy}");
        let row = moves.rows().into_iter().find(|row| row.session == "s-1").unwrap();
        assert_eq!((row.sandbox.as_str(), row.containers.join(" ").as_str()), ("pod", "pod side web"));

        let cancelled = tokio::spawn(async move { requests.recv().await.unwrap().send(Ok(())) });
        assert_eq!(moves.cancel("default", "side").await.unwrap(), "s-1");
        cancelled.await.unwrap().unwrap();
        drop(booking);
        assert!(matches!(moves.cancel("default", "web").await, Err(MoveError::NotMoving { .. })));
        assert!(book("s-3", "pod", "side").is_ok());
    }
}
