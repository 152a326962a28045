//! Destination: a pod that arrives, made through CRI and removed through it.
//!
//! ```text
//!   RunPodSandbox -> (CreateContainer -> StartContainer) for each -> Whole
//!          \______________\______________________\______________ remove: RemovePodSandbox
//! ```
//!
//! CRI starts what it makes. That starts nothing, because the shim knows what waits for its move; but
//! only if it was told, by annotations that CRI passes on when it is set to. So each spec is looked at as
//! soon as it exists: the sandbox container's before any other is made, a container's before it is
//! started. Invariant: only what bears this move's label is ever removed.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use super::api;
use super::client::{Cri, CriError};
use super::plan::{Plan, set_target, target_of};
use super::stored::{self, StoredError};
use crate::containerd::{RUNTIME, SANDBOX, SESSION, SOURCE_CONTAINER};
use crate::network::NETWORK;
use crate::proto::Mismatch;

/// A pod whose making was cut short may show a moment after.
const AFTERMATH: Duration = Duration::from_millis(700);

/// For CRI to notice that a pod's shim has ended: containerd gives its clearing away 5 s.
const AGREES: Duration = Duration::from_secs(6);
const AGAIN: Duration = Duration::from_millis(100);

/// Why the pod could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CriArrivalError {
    /// The plugin refused.
    #[error(transparent)]
    Cri(#[from] CriError),
    /// Its account of what it made cannot be used.
    #[error(transparent)]
    Stored(#[from] StoredError),
    /// The runtime handler does not pass annotations on.
    #[error(
        "containerd's runtime handler `{handler}` does not pass the annotation {annotation} on to {what}; give `{setting} = [\"io.microsoft.*\", \"io.dunlin.*\", \"dev.dunlin.*\"]` in that handler's configuration"
    )]
    Annotation {
        /// The handler.
        handler: String,
        /// The missing annotation.
        annotation: &'static str,
        /// pods, containers.
        what: &'static str,
        /// The key in containerd's configuration.
        setting: &'static str,
    },
    /// The runtime handler is another runtime's.
    #[error(
        "containerd's runtime handler `{handler}` is {runtime} here; give `runtime_type = \"{RUNTIME}\"` in that handler's configuration"
    )]
    Runtime {
        /// The handler.
        handler: String,
        /// What it is.
        runtime: String,
    },
}

/// A container of the source under its new name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Renamed {
    /// On the source.
    pub(crate) source: String,
    /// Here.
    pub(crate) id: String,
}

/// One arriving pod.
#[derive(Debug)]
pub(crate) struct PodArrival {
    cri: Cri,
    plan: Plan,
    /// The sandbox whose shim waits.
    sandbox: String,
    session: String,
    /// The pod's own annotation about its network: key and value.
    note: Option<(&'static str, String)>,
    /// CRI may have made something on our account.
    asked: bool,
}

/// What stands in the way of `plan` here; nothing is made.
pub(crate) async fn obstacles(cri: &Cri, plan: &Plan) -> Result<Vec<Mismatch>, CriError> {
    let pods = match cri.pods().await {
        Ok(pods) => pods,
        Err(error @ CriError::NotServed { .. }) => {
            return Ok(vec![Mismatch {
                field: "CRI".into(),
                source: "a pod made through CRI".into(),
                destination: error.to_string(),
                way_out: "enable containerd's CRI plugin on the destination".into(),
                ..Mismatch::default()
            }]);
        }
        Err(error) => return Err(error),
    };
    let taken = pods.into_iter().find(|pod| pod.metadata == plan.config.metadata);
    Ok(taken
        .map(|pod| {
            let name = super::client::name_of_pod(&plan.config);
            Mismatch {
                field: "pod".into(),
                source: name.clone(),
                destination: format!("{name} with the same uid and attempt exists already, as {}", pod.id),
                way_out: format!("remove it there: `crictl rmp -f {}`", pod.id),
                container: plan.source.clone(),
            }
        })
        .into_iter()
        .collect())
}

impl PodArrival {
    /// Nothing is made yet.
    pub(crate) fn new(
        cri: Cri,
        plan: Plan,
        sandbox: String,
        session: String,
        note: Option<(&'static str, String)>,
    ) -> PodArrival {
        PodArrival { cri, plan, sandbox, session, note, asked: false }
    }

    /// Makes the pod and all its containers, once; the first failure ends it, and what exists by then
    /// waits for [`PodArrival::remove`]. Answers every container of the source with its id here.
    pub(crate) async fn create(&mut self) -> Result<Vec<Renamed>, CriArrivalError> {
        self.asked = true;
        let mut config = self.plan.config.clone();
        self.mark(&mut config.labels, &mut config.annotations, &self.plan.source);
        if let Some((key, value)) = &self.note {
            config.annotations.insert((*key).to_owned(), value.clone());
        }
        let pod = self.cri.run_pod(config, &self.plan.handler).await?;
        let account = self.cri.pod(&pod).await?.account;
        let made = stored::spec(&pod, &account)?;
        self.check(&made, &self.plan.source, "pods", "pod_annotations")?;
        // What only describes the network may be lost on the way; a wish may not.
        if let Some((key @ NETWORK, value)) = &self.note
            && made.annotation(key) != Some(value)
        {
            return Err(self.unheard(NETWORK, "pods", "pod_annotations"));
        }

        let mut renamed = vec![Renamed { source: self.plan.source.clone(), id: pod.clone() }];
        for container in &self.plan.containers {
            let source = &container.source;
            let mut config = container.config.clone();
            self.mark(&mut config.labels, &mut config.annotations, source);
            let target = target_of(&config).map(str::to_owned);
            if let Some(target) = renamed.iter().find(|made| Some(&made.source) == target.as_ref()) {
                set_target(&mut config, &target.id);
            }
            // The pod's own configuration: CRI gives its annotations to the container too, and those of
            // the move are each container's own.
            let id = self.cri.create_container(&pod, config, self.plan.config.clone()).await?;
            let account = self.cri.container(&id).await?.account;
            self.check(&stored::spec(&id, &account)?, source, "containers", "container_annotations")?;
            self.cri.start_container(&id).await?;
            renamed.push(Renamed { source: source.clone(), id });
        }
        Ok(renamed)
    }

    fn mark(
        &self,
        labels: &mut HashMap<String, String>,
        annotations: &mut HashMap<String, String>,
        source: &str,
    ) {
        labels.insert(SESSION.into(), self.session.clone());
        annotations.insert(SANDBOX.into(), self.sandbox.clone());
        annotations.insert(SOURCE_CONTAINER.into(), source.to_owned());
    }

    /// A container that the shim would take for a new one must not be started.
    fn check(
        &self,
        made: &stored::Made,
        source: &str,
        what: &'static str,
        setting: &'static str,
    ) -> Result<(), CriArrivalError> {
        let handler = self.plan.handler.clone();
        if made.runtime != RUNTIME {
            return Err(CriArrivalError::Runtime { handler, runtime: made.runtime.clone() });
        }
        let wanted = [(SANDBOX, self.sandbox.as_str()), (SOURCE_CONTAINER, source)];
        match wanted.into_iter().find(|(key, value)| made.annotation(key) != Some(*value)) {
            Some((annotation, _)) => Err(self.unheard(annotation, what, setting)),
            None => Ok(()),
        }
    }

    fn unheard(
        &self,
        annotation: &'static str,
        what: &'static str,
        setting: &'static str,
    ) -> CriArrivalError {
        CriArrivalError::Annotation { handler: self.plan.handler.clone(), annotation, what, setting }
    }

    /// It runs here: nothing of it is removed by this node any more.
    pub(crate) fn settle(&mut self) {
        self.asked = false;
    }

    /// Removes what was made, whether its shim still answers or not. Safe to repeat; says what was left.
    pub(crate) async fn remove(&mut self) -> Vec<String> {
        if !self.asked {
            return Vec::new();
        }
        let mut left = remove_session(&self.cri, &self.session).await;
        if left.is_empty() {
            tokio::time::sleep(AFTERMATH).await;
            left = remove_session(&self.cri, &self.session).await;
        }
        self.asked = !left.is_empty();
        left
    }
}

/// Removes every pod that `session` made. Says what was left.
///
/// CRI learns a while after the shim's end that its containers have ended, and until then refuses ("container is still
/// running, to stop first"): it is asked until it agrees, but not for ever.
pub(crate) async fn remove_session(cri: &Cri, session: &str) -> Vec<String> {
    let deadline = Instant::now() + AGREES;
    loop {
        let left = remove_session_once(cri, session).await;
        if left.is_empty() || Instant::now() >= deadline {
            return left;
        }
        tokio::time::sleep(AGAIN).await;
    }
}

async fn remove_session_once(cri: &Cri, session: &str) -> Vec<String> {
    let pods = match cri.pods().await {
        Ok(pods) => pods,
        Err(error) => {
            return vec![format!(
                "cannot look for pods of session {session}: {error}; `crictl pods` lists them"
            )];
        }
    };
    let mut left = Vec::new();
    for api::PodSandbox { id, labels, .. } in pods {
        if labels.get(SESSION).is_some_and(|made_by| made_by == session)
            && let Err(error) = cri.remove_pod(&id).await
        {
            left.push(format!("{error}; `crictl rmp -f {id}` removes the pod that is left"));
        }
    }
    left
}
