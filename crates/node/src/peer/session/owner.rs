//! The task that owns an arriving move: what is done, in which turn, and how it is undone.

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dunlin_wire::Any;
use dunlin_wire::handover::Stream;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{ABANDONED, Aborted, Ask, Created, POLITE, SETTLE, SessionError, Stage, Streams};
use crate::config::NodeConfig;
use crate::containerd::arrivals::Arrivals;
use crate::images::serve as images;
use crate::network::cni::CniError;
use crate::network::cni::made::Memory;
use crate::network::{contract, namespaces};
use crate::peer::preflight::describe;
use crate::proto::{Nic, SandboxFacts};
use crate::shim::process;
use crate::shim::start::{StartError, start};
use crate::shim::{Shim, ShimHome};

/// The task's own state.
pub(super) struct Owner {
    pub(super) id: String,
    pub(super) config: Arc<NodeConfig>,
    pub(super) home: ShimHome,
    pub(super) cwd: PathBuf,
    pub(super) arrivals: Arrivals,
    pub(super) stage: Stage,
    /// A shim may be there on our account.
    pub(super) started: bool,
    pub(super) shim: watch::Sender<Option<Shim>>,
    pub(super) told: watch::Sender<&'static str>,
    pub(super) abort: CancellationToken,
    pub(super) streams: watch::Sender<Streams>,
    pub(super) facts: SandboxFacts,
    pub(super) created: Created,
}

impl Owner {
    /// True when what came was told to run, and did.
    pub(super) async fn run(
        mut self,
        mut queue: mpsc::Receiver<Ask>,
        mut watching: watch::Receiver<usize>,
    ) -> bool {
        loop {
            let ask = tokio::select! {
                ask = queue.recv() => ask,
                () = abandoned(&mut watching) => None,
            };
            // Or the handle is gone from the table, which is so only after the session is over.
            let Some(ask) = ask else {
                self.left_alone().await;
                break;
            };
            if self.answer(ask).await {
                break;
            }
        }
        self.stage == Stage::Running
    }

    /// True when the session is over.
    async fn answer(&mut self, ask: Ask) -> bool {
        match ask {
            Ask::Import(config, reply) => {
                let result = self.import(config).await;
                let _ = reply.send(result);
            }
            Ask::CreateTasks(reply) => {
                let result = self.create_tasks().await;
                let _ = reply.send(result);
            }
            Ask::Prepare(limit, reply) => {
                let result = self.prepare(limit).await;
                let _ = reply.send(result);
            }
            Ask::Transfer(timeout, reply) => {
                let result = self.transfer(timeout).await;
                let _ = reply.send(result);
            }
            Ask::Adopt(stream, socket) => self.adopt(stream, socket).await,
            Ask::Run(handoff, reply) => {
                let result = self.resume(handoff).await;
                let _ = reply.send(result);
                // Only now: the guest stood still until the answer was on its way.
                self.settle().await;
            }
            Ask::Abort(reply) => {
                let aborted = self.abort().await;
                let over = aborted.stopped;
                let _ = reply.send(aborted);
                return over;
            }
            Ask::Cleanup(reply) => {
                let result = self.cleanup().await;
                let over = result.is_ok();
                let _ = reply.send(result);
                return over;
            }
        }
        false
    }

    fn enter(&mut self, stage: Stage) {
        self.stage = stage;
        self.told.send_replace(stage.word());
        tracing::info!(session = self.id, stage = stage.word(), "arriving move");
    }

    fn out_of_turn(&self, asked: &'static str) -> SessionError {
        SessionError::OutOfTurn { session: self.id.clone(), stage: self.stage.word(), asked }
    }

    fn connected(&self, asked: &'static str) -> Result<Shim, SessionError> {
        self.shim.borrow().clone().ok_or_else(|| self.out_of_turn(asked))
    }

    async fn import(&mut self, config: Any) -> Result<(), SessionError> {
        match self.stage {
            Stage::Fresh => {}
            Stage::Imported => return Ok(()),
            _ => return Err(self.out_of_turn("Import")),
        }
        let abort = self.abort.clone();
        unless(&abort, &self.id.clone(), self.import_now(config)).await?;
        self.enter(Stage::Imported);
        Ok(())
    }

    async fn import_now(&mut self, config: Any) -> Result<(), SessionError> {
        self.make_networks().await?;
        let starting = start(&self.config, &self.home, &self.cwd);
        // Noted first: an Abort may come before `start` has answered.
        self.started = true;
        if let Err(error) = starting.await {
            // Somebody else's shim must outlive our refusal.
            self.started = !matches!(error, StartError::Running { .. });
            return Err(error.into());
        }
        let shim = Shim::connect(&self.home, &self.id).await?;
        self.shim.send_replace(Some(shim.clone()));
        Ok(shim.import(config, &images::socket(&self.config)).await?)
    }

    /// The namespaces that are not there, where this node is to make them.
    async fn make_networks(&self) -> Result<(), SessionError> {
        let Some(cni) = &self.config.cni else { return Ok(()) };
        let mode = self.facts.network();
        for pod in self.facts.networks.iter().filter(|pod| !pod.destination.is_empty()) {
            if !self.networks().make(cni, &self.id, pod, mode).await? {
                continue;
            }
            let path = &pod.destination;
            let there = namespaces::interfaces(path.as_ref())
                .await
                .map_err(|source| CniError::Namespace { path: path.into(), source })?;
            let mismatches = contract::settle(pod, &there, mode, path).1;
            if !mismatches.is_empty() {
                let made = format!("{}, whose network `{}` made {path},", self.config.name, cni.network);
                return Err(SessionError::Network(describe(&made, &mismatches)));
            }
        }
        Ok(())
    }

    fn networks(&self) -> Memory {
        Memory::of(&self.config.state_dir)
    }

    async fn create_tasks(&mut self) -> Result<Created, SessionError> {
        match self.stage {
            Stage::Imported => {}
            Stage::Created => return Ok(self.created.clone()),
            _ => return Err(self.out_of_turn("CreateTasks")),
        }
        let creating = Box::pin(async { Ok(self.arrivals.create().await?) });
        match unless(&self.abort, &self.id, creating).await {
            Ok(pids) => self.created.pids = pids,
            Err(error) => {
                // Undone by the Abort that must follow: only a shim that has stopped gives its tasks back.
                self.enter(Stage::HalfMade);
                return Err(error);
            }
        }
        self.created.nics = self.nics().await;
        self.enter(Stage::Created);
        Ok(self.created.clone())
    }

    /// What became of the NICs: the shim has compared by now and would have refused.
    async fn nics(&self) -> Vec<Nic> {
        let mut nics = Vec::new();
        for pod in &self.facts.networks {
            let path = match self.arrivals.namespace(&pod.pod).await {
                Some(path) => path,
                None => pod.destination.clone(),
            };
            match namespaces::interfaces(path.as_ref()).await {
                Ok(there) => nics.extend(contract::settle(pod, &there, self.facts.network(), &path).0),
                Err(error) => {
                    tracing::warn!(session = self.id, pod = pod.pod, %error, "its NICs are told without their addresses here");
                    nics.extend(contract::expected(pod, self.facts.network()));
                }
            }
        }
        nics
    }

    async fn prepare(&mut self, downtime_limit_ms: u32) -> Result<(), SessionError> {
        match self.stage {
            Stage::Created => {}
            Stage::Prepared => return Ok(()),
            _ => return Err(self.out_of_turn("Prepare")),
        }
        let shim = self.connected("Prepare")?;
        unless(&self.abort, &self.id, async { Ok(shim.prepare(downtime_limit_ms).await?) }).await?;
        self.enter(Stage::Prepared);
        Ok(())
    }

    async fn adopt(&mut self, stream: Stream, socket: TcpStream) {
        let handed = match self.connected("a stream") {
            Ok(shim) => {
                use std::os::fd::AsFd;
                // The socket stays ours, and open, until the shim has its own copy.
                unless(&self.abort, &self.id, async { Ok(shim.hand_over(socket.as_fd(), stream).await?) })
                    .await
            }
            Err(error) => Err(error),
        };
        self.streams.send_modify(|streams| match handed {
            Ok(()) => {
                streams.adopted.insert(stream);
            }
            Err(error) => {
                tracing::warn!(session = self.id, %stream, %error, "a stream did not reach the shim");
                streams.broken.get_or_insert((stream, error.to_string()));
            }
        });
    }

    async fn transfer(&mut self, timeout: Duration) -> Result<(), SessionError> {
        match self.stage {
            Stage::Prepared => {}
            Stage::Receiving => return Ok(()),
            _ => return Err(self.out_of_turn("Transfer")),
        }
        let shim = self.connected("Transfer")?;
        unless(&self.abort, &self.id, async { Ok(shim.transfer(timeout).await?) }).await?;
        self.enter(Stage::Receiving);
        Ok(())
    }

    async fn resume(&mut self, handoff: Option<Any>) -> Result<(), SessionError> {
        match self.stage {
            Stage::Receiving | Stage::Doubtful => {}
            Stage::Running => return Ok(()),
            _ => return Err(self.out_of_turn("Run")),
        }
        let shim = self.connected("Run")?;
        self.enter(Stage::Doubtful);
        shim.resume(false, handoff).await?;
        self.enter(Stage::Running);
        Ok(())
    }

    async fn cleanup(&mut self) -> Result<Vec<String>, SessionError> {
        match self.stage {
            Stage::Running => {}
            Stage::Aborted => return Ok(Vec::new()),
            _ => return Err(self.out_of_turn("Cleanup")),
        }
        let warnings = self.connected("Cleanup")?.cleanup().await?;
        for warning in &warnings {
            tracing::warn!(session = self.id, warning, "it runs, and something was not done");
        }
        self.settle().await;
        let _ = tokio::fs::remove_dir_all(&self.cwd).await;
        Ok(warnings)
    }

    /// Takes the session's label from what runs here. Tried after Run and at Cleanup; the node's
    /// next start is the last resort.
    async fn settle(&mut self) {
        if self.stage != Stage::Running {
            return;
        }
        self.networks().settle(&self.id);
        match tokio::time::timeout(SETTLE, self.arrivals.settle()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(session = self.id, %error, "its label stays for now"),
            Err(_) => {
                tracing::warn!(session = self.id, "its label stays for now: containerd does not answer")
            }
        }
    }

    async fn abort(&mut self) -> Aborted {
        if self.stage == Stage::Running {
            let warning =
                format!("session {} runs on {}; it cannot be taken back", self.id, self.config.name);
            return Aborted { stopped: false, warnings: vec![warning], runs: true };
        }
        if self.stage == Stage::Aborted {
            return Aborted { stopped: true, ..Aborted::default() };
        }
        let stopped = self.stop_shim().await;
        if !stopped {
            let warning = format!(
                "the shim of sandbox `{}` could not be ended; its pid is in {}/shim.pid",
                self.home.sandbox(),
                self.home.path().display()
            );
            return Aborted { stopped: false, warnings: vec![warning], runs: false };
        }
        let mut warnings = self.arrivals.remove().await;
        // After the shim: its machine is connected to them.
        warnings.extend(self.networks().release_session(&self.id).await);
        let _ = tokio::fs::remove_dir_all(&self.cwd).await;
        self.enter(Stage::Aborted);
        Aborted { stopped: true, warnings, runs: false }
    }

    /// Asks the shim to stop, then sees to it that neither it nor a child of its is left.
    async fn stop_shim(&mut self) -> bool {
        if !self.started {
            return true;
        }
        let shim = self.shim.send_replace(None);
        // Known before it is asked to leave: afterwards nobody could tell whose the machine was.
        let process = self.home.process();
        if let Some(shim) = shim {
            let politely = async {
                for result in [shim.cancel().await, shim.stop().await, shim.cleanup().await.map(drop)] {
                    // Each may be out of turn, depending on how far the shim came.
                    if let Err(error) = result {
                        tracing::debug!(session = self.id, %error, "on the way back");
                    }
                }
                if let Err(error) = self.arrivals.delete_tasks().await {
                    tracing::debug!(session = self.id, %error, "on the way back");
                }
            };
            // A shim that hangs is ended like one that answers.
            let _ = tokio::time::timeout(POLITE, politely).await;
        }
        let ended = match process {
            Some(process) => process::end(process).await,
            // It wrote no pid, or has left: nobody may listen at its address.
            None => self.home.listening().await.is_none(),
        };
        if ended {
            self.home.forget();
            self.started = false;
        }
        ended
    }

    /// Nobody asks any more.
    async fn left_alone(&mut self) {
        if self.stage == Stage::Running {
            tracing::warn!(session = self.id, "the source is silent; the container stays here");
            // The shim keeps the session: it is what tells a source that comes back, also after this node's end.
            self.settle().await;
            let _ = tokio::fs::remove_dir_all(&self.cwd).await;
            return;
        }
        tracing::warn!(session = self.id, stage = self.stage.word(), "the source is silent; aborting");
        for warning in self.abort().await.warnings {
            tracing::warn!(session = self.id, warning, "left behind");
        }
    }
}

/// `work`, cut short by an Abort.
async fn unless<T>(
    abort: &CancellationToken,
    id: &str,
    work: impl Future<Output = Result<T, SessionError>>,
) -> Result<T, SessionError> {
    tokio::select! {
        biased;
        () = abort.cancelled() => Err(SessionError::Aborted(id.to_owned())),
        result = work => result,
    }
}

/// Ends when nobody has watched and nothing was asked for [`ABANDONED`].
async fn abandoned(watching: &mut watch::Receiver<usize>) {
    let mut deadline = Instant::now() + ABANDONED;
    loop {
        let watched = *watching.borrow_and_update() > 0;
        tokio::select! {
            changed = watching.changed() => {
                if changed.is_err() {
                    return tokio::time::sleep_until(deadline).await;
                }
                deadline = Instant::now() + ABANDONED;
            }
            () = tokio::time::sleep_until(deadline), if !watched => return,
        }
    }
}
