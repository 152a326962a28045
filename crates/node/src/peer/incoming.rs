//! Destination: the table of moves that arrive, and the door for their data streams.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use dunlin_wire::handover::{Preamble, Stream, Token};
use tokio::net::TcpStream;

use super::admit;
use super::leftover::{self, Former};
use super::session::{Aborted, Beginning, Session};
use crate::config::NodeConfig;
use crate::containerd::Containerd;
use crate::containerd::arrival::{Arrival, Place};
use crate::containerd::arrivals::Arrivals;
use crate::containerd::record::{self, RecordArrival};
use crate::containerd::stdio::{self, StdioError};
use crate::cri::arrival::PodArrival;
use crate::cri::plan::{Plan, PlanError};
use crate::data::listen::Door;
use crate::network;
use crate::proto::{SandboxFacts, SessionRow};
use crate::shim::ShimHome;

/// Ended sessions of each kind that are remembered.
const REMEMBERED: usize = 1024;

/// A machine has so many places for disks, and each container has a disk of its own.
const MEMBERS: usize = 256;

/// Why a move may not begin here.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IncomingError {
    /// Nothing is known of it.
    #[error("session {0} is not known here; begin a new move")]
    Unknown(String),
    /// Nothing is left to do.
    #[error("session {0} is over: what it moved was told to run here, and did")]
    Ran(String),
    /// Another node's.
    #[error("session {session} belongs to node {owner}, not to {caller}")]
    NotYours {
        /// The session.
        session: String,
        /// Who began it.
        owner: String,
        /// Who asks.
        caller: String,
    },
    /// It was aborted before.
    #[error("session {0} was aborted here; begin a new move")]
    Aborted(String),
    /// The sandbox, or a container of it, is on its way in another session.
    #[error(
        "sandbox `{sandbox}`, or a container of it, is arriving already, in session {session}; wait for it, or cancel it on its source"
    )]
    Busy {
        /// The sandbox.
        sandbox: String,
        /// The other session.
        session: String,
    },
    /// An id or stream that cannot be used.
    #[error(transparent)]
    Stdio(#[from] StdioError),
    /// A pod that CRI cannot make here.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A field of the request.
    #[error("{0}")]
    Field(String),
}

/// All moves that arrive at this node.
#[derive(Debug, Clone)]
pub(crate) struct Incoming {
    config: Arc<NodeConfig>,
    containerd: Containerd,
    table: Arc<Mutex<Table>>,
}

#[derive(Debug, Default)]
struct Table {
    sessions: HashMap<String, Arc<Session>>,
    /// Must not be revived.
    aborted: Remembered,
    /// Are over, and run or ran here. A source that was cut off before it heard that must not take them for gone.
    ran: Remembered,
}

/// The last sessions that something happened to.
#[derive(Debug, Default)]
struct Remembered(VecDeque<String>);

impl Remembered {
    fn has(&self, id: &str) -> bool {
        self.0.iter().any(|known| known == id)
    }

    fn add(&mut self, id: &str) {
        if self.has(id) {
            return;
        }
        if self.0.len() == REMEMBERED {
            self.0.pop_front();
        }
        self.0.push_back(id.to_owned());
    }
}

impl Incoming {
    pub(crate) fn new(config: Arc<NodeConfig>, containerd: Containerd) -> Incoming {
        Incoming { config, containerd, table: Arc::default() }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The session `id`, when `caller` began it.
    pub(crate) fn find(&self, id: &str, caller: &str) -> Result<Arc<Session>, IncomingError> {
        let table = self.table();
        let Some(session) = table.sessions.get(id) else {
            return Err(match table.ran.has(id) {
                true => IncomingError::Ran(id.into()),
                false => IncomingError::Unknown(id.into()),
            });
        };
        owned(session, id, caller)?;
        Ok(Arc::clone(session))
    }

    /// The node that began session `id`; None: it is over, or never came here.
    pub(crate) fn source_of(&self, id: &str) -> Option<String> {
        self.table().sessions.get(id).map(|session| session.from().to_owned())
    }

    /// Finds or begins session `id`.
    pub(crate) fn begin(
        &self,
        id: &str,
        caller: &str,
        facts: SandboxFacts,
        streams: &[String],
    ) -> Result<Arc<Session>, IncomingError> {
        dunlin_wire::ids::SessionId::new(id).map_err(|error| IncomingError::Field(error.to_string()))?;
        stdio::plain(&facts.namespace)?;
        stdio::plain(&facts.id)?;
        check_members(&facts)?;
        let expected: BTreeSet<Stream> = streams
            .iter()
            .map(|stream| stream.parse::<Stream>().map_err(|error| IncomingError::Field(error.to_string())))
            .collect::<Result<_, _>>()?;
        let arrivals = self.arrivals(id, &facts)?;

        let mut table = self.table();
        if table.aborted.has(id) {
            return Err(IncomingError::Aborted(id.into()));
        }
        if table.ran.has(id) {
            return Err(IncomingError::Ran(id.into()));
        }
        if let Some(session) = table.sessions.get(id) {
            owned(session, id, caller)?;
            return Ok(Arc::clone(session));
        }
        if let Some((session, _)) =
            table.sessions.iter().find(|(_, session)| overlap(session.facts(), &facts))
        {
            return Err(IncomingError::Busy { sandbox: facts.id, session: session.clone() });
        }
        let beginning = Beginning {
            id: id.into(),
            from: caller.into(),
            token: fresh_token(),
            expected,
            config: Arc::clone(&self.config),
            arrivals,
            facts,
        };
        let (shared, key) = (Arc::clone(&self.table), id.to_owned());
        let session = Session::spawn(beginning, move |ran| {
            let mut table = shared.lock().unwrap_or_else(PoisonError::into_inner);
            table.sessions.remove(&key);
            if ran {
                table.ran.add(&key);
            }
        });
        table.sessions.insert(id.into(), Arc::clone(&session));
        Ok(session)
    }

    /// Nothing is made yet.
    fn arrivals(&self, session: &str, facts: &SandboxFacts) -> Result<Arrivals, IncomingError> {
        let (io, logs) = (&self.config.io_dir, &self.config.log_dir);
        let place =
            Place { namespace: facts.namespace.clone(), sandbox: facts.id.clone(), session: session.into() };
        if let Some(plan) = Plan::read(&facts.containers, logs)? {
            let note = network::spec::note(facts, &plan.source);
            let pod = PodArrival::new(self.containerd.cri(), plan, place.sandbox, place.session, note);
            return Ok(Arrivals::of_pod(self.containerd.clone(), pod));
        }
        let arrivals = facts.containers.iter().map(|container| {
            let wanted = container.stdio.unwrap_or_default();
            let streams = stdio::plan(&wanted, io, logs, &facts.namespace, &container.id)?;
            let container = network::spec::settled(container, facts);
            admit::paths(&container, &self.config.termination_logs).map_err(IncomingError::Field)?;
            Ok(Arrival::new(self.containerd.clone(), place.clone(), container, streams))
        });
        let record = record::read(facts).map_err(IncomingError::Field)?;
        let said = record::said(facts).map_err(IncomingError::Field)?;
        let record =
            record.map(|kept| RecordArrival::new(self.containerd.clone(), place.clone(), kept, said));
        Ok(Arrivals::new(record, arrivals.collect::<Result<_, IncomingError>>()?))
    }

    /// Ends session `id` and whatever a former life of this node left of it.
    pub(crate) async fn abort(
        &self,
        id: &str,
        caller: &str,
        namespace: &str,
        sandbox: &str,
    ) -> Result<Aborted, IncomingError> {
        dunlin_wire::ids::SessionId::new(id).map_err(|error| IncomingError::Field(error.to_string()))?;
        let session = match self.find(id, caller) {
            Ok(session) => Some(session),
            Err(IncomingError::Unknown(_)) => None,
            Err(ran @ IncomingError::Ran(_)) => {
                return Ok(Aborted { stopped: false, warnings: vec![ran.to_string()], runs: true });
            }
            Err(error) => return Err(error),
        };
        if let Some(session) = session
            && let Some(aborted) = session.abort().await
        {
            if aborted.stopped {
                self.table().aborted.add(id);
            }
            return Ok(aborted);
        }
        self.table().aborted.add(id);
        stdio::plain(namespace)?;
        stdio::plain(sandbox)?;
        let home = ShimHome::new(&self.config.state_dir, namespace, sandbox);
        let mut aborted = match leftover::end_shim(&home, id).await {
            Former::Gone | Former::NotHere => Aborted { stopped: true, ..Aborted::default() },
            Former::Runs(reason) => Aborted { stopped: false, warnings: vec![reason], runs: true },
            Former::Unclear(reason) => Aborted { stopped: false, warnings: vec![reason], runs: false },
        };
        if aborted.stopped {
            let left = leftover::remove_session(&self.config, &self.containerd, namespace, id).await;
            aborted.warnings.extend(left);
        }
        Ok(aborted)
    }

    /// For `dunlin status`.
    pub(crate) fn rows(&self) -> Vec<SessionRow> {
        let table = self.table();
        let row = |(id, session): (&String, &Arc<Session>)| SessionRow {
            session: id.clone(),
            direction: "incoming".into(),
            namespace: session.facts().namespace.clone(),
            sandbox: session.facts().id.clone(),
            containers: session.facts().ids(),
            peer: session.from().into(),
            phase: session.stage().into(),
        };
        table.sessions.iter().map(row).collect()
    }
}

/// A sandbox from elsewhere: neither empty, nor endless, nor one that names a container twice.
fn check_members(sandbox: &SandboxFacts) -> Result<(), IncomingError> {
    let count = sandbox.containers.len();
    if count == 0 || count > MEMBERS {
        let reason = format!("sandbox `{}` has {count} containers; 1 to {MEMBERS} can move", sandbox.id);
        return Err(IncomingError::Field(reason));
    }
    let mut seen = BTreeSet::new();
    if let Some(twice) = sandbox.containers.iter().find(|container| !seen.insert(&container.id)) {
        return Err(IncomingError::Field(format!("container `{}` is named twice", twice.id)));
    }
    let mut places = sandbox.networks.iter().map(|network| &network.destination);
    match places.find_map(|place| network::namespaces::admitted(place).err().filter(|_| !place.is_empty())) {
        Some(reason) => Err(IncomingError::Field(format!("a pod's network namespace: {reason}"))),
        None => Ok(()),
    }
}

/// Whether both want the same name in containerd, or the same shim.
fn overlap(one: &SandboxFacts, other: &SandboxFacts) -> bool {
    let shared = || {
        let mut ids = one.containers.iter().map(|container| &container.id);
        ids.any(|id| other.containers.iter().any(|container| container.id == *id))
    };
    one.namespace == other.namespace && (one.id == other.id || shared())
}

fn owned(session: &Session, id: &str, caller: &str) -> Result<(), IncomingError> {
    if session.from() == caller {
        return Ok(());
    }
    Err(IncomingError::NotYours { session: id.into(), owner: session.from().into(), caller: caller.into() })
}

/// 32 random bytes in hexadecimal.
fn fresh_token() -> Token {
    use std::fmt::Write;
    let bytes: [u8; 32] = rand::random();
    let mut text = String::with_capacity(64);
    for byte in bytes {
        let _ = write!(text, "{byte:02x}");
    }
    Token::new(text).unwrap_or_else(|_| unreachable!("64 hexadecimal digits are a token"))
}

#[async_trait]
impl Door for Incoming {
    fn admit(&self, preamble: &Preamble) -> Result<(), String> {
        let session = self.table().sessions.get(preamble.session.as_str()).cloned();
        // The same words for both: a caller must not learn which sessions exist.
        let unknown = || format!("session {} is unknown, or its token is another", preamble.session);
        let session = session.ok_or_else(unknown)?;
        if !session.token().matches(&preamble.token) {
            return Err(unknown());
        }
        session.admit(preamble.stream)
    }

    async fn adopt(&self, preamble: Preamble, socket: TcpStream) {
        let session = self.table().sessions.get(preamble.session.as_str()).cloned();
        if let Some(session) = session {
            session.adopt(preamble.stream, socket).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_ended_sessions_are_remembered_each_once() {
        let mut remembered = Remembered::default();
        for _ in 0..2 {
            for number in 0..=REMEMBERED {
                remembered.add(&number.to_string());
                remembered.add(&number.to_string());
            }
            assert_eq!(remembered.0.len(), REMEMBERED);
        }
        assert!(remembered.has("1") && remembered.has(&REMEMBERED.to_string()));
    }

    #[test]
    fn tokens_are_64_digits_and_never_alike() {
        let (a, b) = (fresh_token(), fresh_token());
        assert_eq!(a.expose().len(), 64);
        assert!(a.expose().bytes().all(|byte| byte.is_ascii_hexdigit()));
        assert!(!a.matches(&b));
    }
}
