//! Does a move's work for real: the source's shim and containerd on this host, the destination
//! through its node, the streams between.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use dunlin_migration::coordinator::{Event, Failure, FailureKind, Outcome, Record, Work};
use dunlin_wire::Any;
use dunlin_wire::handover::{Preamble, Stream, Token};
use dunlin_wire::ids::{SessionId, Slot};
use dunlin_wire::service::NotificationsResponse;
use dunlin_wire::tree::SavedTree;
use tokio::sync::{broadcast, mpsc};
use tokio_util::task::AbortOnDropHandle;
use ttrpc::r#async::ClientStreamReceiver;

use super::drive::Carrier;
use crate::config::NodeConfig;
use crate::containerd::{Containerd, departure};
use crate::data::dial::dial;
use crate::images::exports::{Exported, Exports};
use crate::network::cni::made::Memory;
use crate::network::holding::{self, Holding};
use crate::network::{GuestNic, as_the_guest_has_it, contract};
use crate::peer::preflight::host_facts;
use crate::peer::remote::{Notices, Remote, notice};
use crate::proto::move_event::Event as Told;
use crate::proto::{MoveEvent, NetworkPlan, Nic, SandboxFacts};
use crate::shim::process::Process;
use crate::shim::{Shim, ShimError, ShimHome};

/// A lost watch of the destination is opened again so often before the peer counts as lost.
const WATCH_RETRIES: u32 = 3;
const WATCH_PAUSE: Duration = Duration::from_secs(1);

/// What a caller may choose.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Bound of the transfer.
    pub(crate) transfer: Duration,
    /// Blackout target, milliseconds; zero: the shim's own.
    pub(crate) downtime_ms: u32,
    /// Disks on shared storage are copied all the same.
    pub(crate) copy_shared_disks: bool,
}

/// What a node has for all of its moves.
pub(crate) struct Means {
    pub(crate) config: Arc<NodeConfig>,
    pub(crate) containerd: Containerd,
    pub(crate) exports: Exports,
}

/// One move's hands.
pub(crate) struct Hands {
    config: Arc<NodeConfig>,
    containerd: Containerd,
    session: SessionId,
    facts: SandboxFacts,
    home: ShimHome,
    /// The source's shim as it was when the move began.
    process: Option<Process>,
    remote: Remote,
    limits: Limits,
    /// Those who watch the move.
    told: broadcast::Sender<MoveEvent>,
    exports: Exports,
    learned: Mutex<Learned>,
}

/// What one piece of work leaves to a later one.
#[derive(Default)]
struct Learned {
    disks: Vec<Slot>,
    token: Option<Token>,
    /// Dropped with the move, which ends them.
    watches: Vec<AbortOnDropHandle<()>>,
    warnings: Vec<String>,
    nics: Vec<Nic>,
    /// The guest's network cards as the saved state has them, each with its pod.
    guests: Vec<(String, GuestNic)>,
    /// The network is told where the pods are, until the destination has made what it makes.
    holdings: Vec<Holding>,
    /// The images can be read until the move is over.
    exported: Option<Exported>,
    fetched: u64,
}

impl Hands {
    pub(crate) fn new(
        means: Means,
        session: SessionId,
        facts: SandboxFacts,
        remote: Remote,
        limits: Limits,
        told: broadcast::Sender<MoveEvent>,
    ) -> Hands {
        let Means { config, containerd, exports } = means;
        let home = ShimHome::new(&config.state_dir, &facts.namespace, &facts.id);
        let process = home.process();
        let learned = Mutex::default();
        Hands { config, containerd, session, facts, home, process, remote, limits, told, exports, learned }
    }

    /// Whether the source's shim can be asked at all; a move that cannot begin says so at once.
    pub(crate) async fn reachable(&self) -> Result<(), ShimError> {
        Shim::connect(&self.home, self.session.as_str()).await.map(drop)
    }

    /// What was left behind on the way back, or was not done on the destination.
    pub(crate) fn warnings(&self) -> Vec<String> {
        self.learned().warnings.clone()
    }

    /// What became of every NIC, as far as the destination has told.
    pub(crate) fn nics(&self) -> Vec<Nic> {
        self.learned().nics.clone()
    }

    /// Bytes of images that the destination had to read from here.
    pub(crate) fn fetched(&self) -> u64 {
        self.learned().fetched
    }

    fn learned(&self) -> std::sync::MutexGuard<'_, Learned> {
        self.learned.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn shim(&self) -> Result<Shim, Failure> {
        Shim::connect(&self.home, self.session.as_str()).await.map_err(|error| self.failure(&error))
    }

    fn failure(&self, error: &ShimError) -> Failure {
        let kind = match error {
            ShimError::Refused { no_session: true, .. } => FailureKind::NoSession,
            ShimError::Refused { .. } => FailureKind::Refused,
            // QEMU dies with its shim, so a shim that is gone has no machine any more.
            ShimError::NoAddress { .. } | ShimError::Connect { .. } | ShimError::NoAnswer { .. }
                if self.process.is_some_and(|process| !process.lives()) =>
            {
                FailureKind::Gone
            }
            ShimError::NoAddress { .. } | ShimError::Connect { .. } => FailureKind::Refused,
            ShimError::NoAnswer { .. } => FailureKind::Silent,
        };
        Failure::new(kind, error.to_string())
    }

    fn done(&self, result: Result<(), ShimError>) -> Result<Outcome, Failure> {
        result.map(|()| Outcome::Done).map_err(|error| self.failure(&error))
    }

    async fn export(&self) -> Result<Outcome, Failure> {
        let exported =
            self.shim().await?.export(self.limits.downtime_ms, self.limits.copy_shared_disks).await;
        let config = exported.map_err(|error| match error {
            // The shim names what cannot move and why; the user is to read just that.
            ShimError::Refused { reason, .. } => Failure::new(FailureKind::Refused, reason),
            error => self.failure(&error),
        })?;
        // Read here as well as there: a state that cannot be imported is better told before it travels.
        let tree = SavedTree::open(&config)
            .map_err(|error| Failure::new(FailureKind::Refused, format!("the exported state: {error}")))?;
        let disks: Vec<Slot> = tree.mirrored_slots().into_iter().collect();
        let guests = tree.pods.iter().flat_map(|pod| {
            let endpoints = pod.network.iter().flat_map(|network| network.endpoints.values());
            endpoints.map(|endpoint| (pod.pod_id.to_string(), GuestNic::saved(endpoint)))
        });
        let guests = guests.collect();
        let exported = self.exports.open(self.session.as_str(), self.remote.name(), &tree);
        {
            let mut learned = self.learned();
            learned.exported = Some(exported);
            learned.disks.clone_from(&disks);
            learned.guests = guests;
        }
        Ok(Outcome::Exported { config, disks })
    }

    async fn preflight(&self) -> Result<Outcome, Failure> {
        let nics = self.remote.preflight(host_facts(&self.config).await, self.facts.clone()).await?;
        if !nics.is_empty() {
            self.learned().nics.clone_from(&nics);
            // Nobody may be watching.
            let _ = self.told.send(MoveEvent { event: Some(Told::Network(NetworkPlan { nics })) });
        }
        Ok(Outcome::Done)
    }

    async fn create_tasks(&self) -> Result<Outcome, Failure> {
        let created = self.remote.create_tasks().await?;
        let mut learned = self.learned();
        learned.nics = created.nics;
        learned.fetched = created.fetched_bytes;
        learned.holdings.clear();
        Ok(Outcome::Done)
    }

    /// The facts with the guest's own cards: after a move the interfaces beside the machine are others.
    fn facts_of_the_guest(&self) -> SandboxFacts {
        let mut facts = self.facts.clone();
        let learned = self.learned();
        for network in &mut facts.networks {
            let of_pod = learned.guests.iter().filter(|(pod, _)| *pod == network.pod);
            let nics: Vec<GuestNic> = of_pod.map(|(_, nic)| nic.clone()).collect();
            as_the_guest_has_it(&mut network.interfaces, &nics);
        }
        facts
    }

    /// Where the destination makes a namespace with the addresses of this one, the network hears from both.
    async fn hold(&self, facts: &SandboxFacts) {
        let expected = |pod: &str| {
            self.learned().nics.iter().any(|nic| nic.pod == pod && nic.fate == contract::EXPECTED)
        };
        for pod in facts.networks.iter().filter(|network| expected(&network.pod)) {
            match holding::hold(pod).await {
                Ok(held) => self.learned().holdings.push(held),
                Err(error) => {
                    tracing::warn!(pod = pod.pod, %error, "its addresses are not announced while the destination makes its namespace")
                }
            }
        }
    }

    async fn import(&self, config: Any) -> Result<Outcome, Failure> {
        let disks = self.learned().disks.clone();
        let streams = disks.into_iter().map(Stream::Disk).chain([Stream::Memory]).collect();
        let facts = self.facts_of_the_guest();
        self.hold(&facts).await;
        let token = self.remote.import(facts, config, streams).await?;
        self.learned().token = Some(token);
        Ok(Outcome::Done)
    }

    async fn connect(&self, disks: Vec<Slot>, events: &mpsc::Sender<Event>) -> Result<Outcome, Failure> {
        // Open before anything moves: the first words of a transfer are the ones that explain a failure.
        self.watch_destination(events).await?;
        self.watch_source(events).await?;
        let token = self.learned().token.clone();
        let token = token.ok_or_else(|| {
            Failure::new(FailureKind::Refused, "the destination gave no token for its data port")
        })?;
        for stream in disks.into_iter().map(Stream::Disk).chain([Stream::Memory]) {
            let preamble = Preamble { session: self.session.clone(), token: token.clone(), stream };
            let socket = dial(self.remote.data_address(), &preamble)
                .await
                .map_err(|error| Failure::new(FailureKind::Refused, error.to_string()))?;
            {
                use std::os::fd::AsFd;
                // Ours stays open until the shim has its own.
                let handed = self.shim().await?.hand_over(socket.as_fd(), stream).await;
                handed.map_err(|error| self.failure(&error))?;
            }
            self.remote.await_stream(stream).await?;
        }
        Ok(Outcome::Done)
    }

    async fn watch_source(&self, events: &mpsc::Sender<Event>) -> Result<(), Failure> {
        let mut told = self.shim().await?.notifications(0).await.map_err(|error| self.failure(&error))?;
        let (home, events, session) = (self.home.clone(), events.clone(), self.session.clone());
        let watch = tokio::spawn(async move {
            let mut heard = 0;
            loop {
                let response = match told.recv().await {
                    Ok(Some(response)) => response,
                    Ok(None) => return,
                    Err(error) => {
                        tracing::warn!(%session, %error, "the source's notifications broke off");
                        // Without them the transfer stalls, which ends it.
                        let Some(again) = listen_again(&home, &session, heard).await else { return };
                        told = again;
                        continue;
                    }
                };
                heard = response.message_id;
                match notice(&response) {
                    Ok(notice) => {
                        if events.send(Event::SourceNotification(notice)).await.is_err() {
                            return;
                        }
                    }
                    Err(reason) => {
                        tracing::warn!(%session, reason, "no news in a notification of the source")
                    }
                }
            }
        });
        self.learned().watches.push(AbortOnDropHandle::new(watch));
        Ok(())
    }

    async fn watch_destination(&self, events: &mpsc::Sender<Event>) -> Result<(), Failure> {
        let mut notices = self.remote.watch(0).await?;
        let (remote, events) = (self.remote.clone(), events.clone());
        let watch = tokio::spawn(async move {
            loop {
                let lost = match notices.next().await {
                    Ok(Some(notice)) => {
                        if events.send(Event::DestinationNotification(notice)).await.is_err() {
                            return;
                        }
                        continue;
                    }
                    // The session is over there, which is said elsewhere.
                    Ok(None) => return,
                    Err(lost) => lost,
                };
                let Some(again) = watch_again(&remote, notices.heard()).await else {
                    let _ = events.send(Event::PeerLost(lost.message)).await;
                    return;
                };
                notices = again;
            }
        });
        self.learned().watches.push(AbortOnDropHandle::new(watch));
        Ok(())
    }

    async fn remove_objects(&self) -> Result<Outcome, Failure> {
        let mut left = departure::remove(&self.containerd, &self.facts).await;
        if left.is_empty() {
            // What this node once made for the pod goes with it.
            let memory = Memory::of(&self.config.state_dir);
            for network in &self.facts.networks {
                let released = memory.release(network.namespace.as_ref()).await;
                left.extend(released.err().map(|error| error.to_string()));
            }
        }
        if left.is_empty() {
            return Ok(Outcome::Done);
        }
        Err(Failure::new(FailureKind::Refused, left.join("; ")))
    }

    async fn abort_destination(&self) -> Result<Outcome, Failure> {
        self.learned().holdings.clear();
        let left = self.remote.abort(&self.facts).await?;
        let name = self.remote.name();
        self.learned().warnings.extend(left.into_iter().map(|warning| format!("on {name}: {warning}")));
        Ok(Outcome::Done)
    }
}

#[async_trait]
impl Carrier for Hands {
    async fn carry(&self, work: Work, events: &mpsc::Sender<Event>) -> Result<Outcome, Failure> {
        let done = |()| Outcome::Done;
        match work {
            Work::Preflight => self.preflight().await,
            Work::SourceExport => self.export().await,
            Work::DestinationImport { config } => self.import(config).await,
            Work::DestinationCreateTasks => self.create_tasks().await,
            Work::DestinationPrepare => self.remote.prepare(self.limits.downtime_ms).await.map(done),
            Work::ConnectStreams { disks } => self.connect(disks, events).await,
            Work::SourceTransfer => {
                let shim = self.shim().await?;
                self.done(shim.transfer(self.limits.transfer).await)
            }
            Work::DestinationTransfer => self.remote.transfer(self.limits.transfer).await.map(done),
            // In memory for now: the record is as durable as this process.
            Work::Record(Record::Committed { .. }) => {
                tracing::info!(session = %self.session, to = self.remote.name(), "committed");
                Ok(Outcome::Done)
            }
            Work::DestinationRun { handoff } => self.remote.run(handoff).await.map(done),
            Work::SourceStop => {
                let shim = self.shim().await?;
                self.done(shim.stop().await)
            }
            Work::SourceRemoveContainerdObjects => self.remove_objects().await,
            Work::SourceCleanup => {
                let shim = self.shim().await?;
                self.done(shim.cleanup().await.map(drop))
            }
            Work::DestinationCleanup => {
                let undone = self.remote.cleanup().await?;
                let name = self.remote.name();
                self.learned().warnings.extend(undone.iter().map(|warning| format!("on {name}: {warning}")));
                Ok(Outcome::Done)
            }
            Work::DestinationAbort => self.abort_destination().await,
            Work::SourceCancel => {
                let shim = self.shim().await?;
                self.done(shim.cancel().await)
            }
            Work::SourceResume { destination_stopped } => {
                let shim = self.shim().await?;
                self.done(shim.resume(destination_stopped, None).await)
            }
        }
    }
}

/// Nothing is missed in between: the shim keeps what it tells.
async fn watch_again(remote: &Remote, heard: u32) -> Option<Notices> {
    for _ in 0..WATCH_RETRIES {
        tokio::time::sleep(WATCH_PAUSE).await;
        if let Ok(notices) = remote.watch(heard).await {
            return Some(notices);
        }
    }
    None
}

async fn listen_again(
    home: &ShimHome,
    session: &SessionId,
    heard: u32,
) -> Option<ClientStreamReceiver<NotificationsResponse>> {
    for _ in 0..WATCH_RETRIES {
        tokio::time::sleep(WATCH_PAUSE).await;
        if let Ok(shim) = Shim::connect(home, session.as_str()).await
            && let Ok(told) = shim.notifications(heard).await
        {
            return Some(told);
        }
    }
    None
}

#[cfg(test)]
mod tests;
