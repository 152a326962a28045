//! Destination: all containers of an arriving sandbox, made in order and removed in the reverse one;
//! a pod of CRI's through CRI.
//!
//! ```text
//!   Planned --create--> Whole --settle--> (theirs)
//!      \                 |
//!       `--> Half --------+--delete_tasks, remove--> nothing
//! ```

use std::time::Duration;

use tokio::time::Instant;

use super::SESSION;
use super::arrival::{Arrival, ArrivalError};
use super::client::{Containerd, ContainerdError, optional};
use super::record::RecordArrival;
use crate::cri::NAMESPACE;
use crate::cri::arrival::{PodArrival, Renamed};
use crate::network::namespaces;

/// How long containerd may take to notice, for all of them, that their shim is gone.
const TASKS_GONE: Duration = Duration::from_secs(30);

/// The containers of one arriving sandbox.
#[derive(Debug)]
pub(crate) enum Arrivals {
    /// Made here, in this order, after the sandbox's own record, if it has one.
    Each(Option<Box<RecordArrival>>, Vec<Arrival>),
    /// Made by CRI.
    Pod(Box<ArrivingPod>),
}

/// A pod that CRI makes, and the names that it gave.
#[derive(Debug)]
pub(crate) struct ArrivingPod {
    containerd: Containerd,
    pod: PodArrival,
    renamed: Vec<Renamed>,
}

impl Arrivals {
    /// Nothing is made yet.
    pub(crate) fn new(record: Option<RecordArrival>, members: Vec<Arrival>) -> Arrivals {
        Arrivals::Each(record.map(Box::new), members)
    }

    /// Nothing is made yet.
    pub(crate) fn of_pod(containerd: Containerd, pod: PodArrival) -> Arrivals {
        Arrivals::Pod(Box::new(ArrivingPod { containerd, pod, renamed: Vec::new() }))
    }

    /// Makes each in turn, once; the first failure ends it, and what exists by then waits for
    /// [`Arrivals::remove`]. Answers the inits' pids.
    pub(crate) async fn create(&mut self) -> Result<Vec<u32>, ArrivalError> {
        let mut pids = Vec::new();
        match self {
            Arrivals::Each(record, members) => {
                if let Some(record) = record {
                    record.create().await?;
                }
                for arrival in members {
                    pids.push(arrival.create().await?);
                }
            }
            Arrivals::Pod(arriving) => {
                let ArrivingPod { containerd, pod, renamed } = &mut **arriving;
                *renamed = pod.create().await?;
                for Renamed { source, id } in renamed {
                    let pid = containerd.task(NAMESPACE, id).await?.pid;
                    tracing::info!(source, id, pid, "made through CRI");
                    pids.push(pid);
                }
            }
        }
        Ok(pids)
    }

    /// The network namespace that CRI gave pod `source`, as the source calls it; `None` for one that it did
    /// not make, or that has none.
    pub(crate) async fn namespace(&self, source: &str) -> Option<String> {
        let Arrivals::Pod(arriving) = self else { return None };
        let made = arriving.renamed.iter().find(|made| made.source == source)?;
        let container = arriving.containerd.container(NAMESPACE, &made.id).await.ok()?;
        let spec: serde_json::Value = serde_json::from_slice(&container.spec?.value).ok()?;
        namespaces::named(&spec).map(str::to_owned)
    }

    /// Deletes the tasks while their shim can still answer, the last one first: the sandbox's own
    /// container is the last that a shim lets go, unless it has a record. Goes on after a failure and tells the first. A pod is
    /// removed as a whole.
    pub(crate) async fn delete_tasks(&mut self) -> Result<(), ContainerdError> {
        match self {
            Arrivals::Each(record, members) => {
                let mut result = Ok(());
                for arrival in members.iter_mut().rev() {
                    result = result.and(arrival.delete_task().await);
                }
                if let Some(record) = record {
                    result = result.and(record.shut_down().await);
                }
                result
            }
            Arrivals::Pod(arriving) => {
                for reason in arriving.pod.remove().await {
                    tracing::debug!(reason, "on the way back");
                }
                Ok(())
            }
        }
    }

    /// They run here: nothing of them is removed by this node any more. Safe to repeat; goes on
    /// after a failure and tells the first.
    pub(crate) async fn settle(&mut self) -> Result<(), ContainerdError> {
        let mut result = Ok(());
        match self {
            Arrivals::Each(record, members) => {
                for arrival in members {
                    result = result.and(arrival.settle().await);
                }
                if let Some(record) = record {
                    result = result.and(record.settle().await);
                }
            }
            Arrivals::Pod(arriving) => {
                for Renamed { id, .. } in &arriving.renamed {
                    let removing = arriving.containerd.remove_label(NAMESPACE, id, SESSION);
                    result = result.and(optional(removing.await).map(drop));
                }
                if result.is_ok() {
                    arriving.pod.settle();
                }
            }
        }
        result
    }

    /// Removes what was made, after the shim is gone, the last one first. Safe to repeat; says
    /// what was left.
    pub(crate) async fn remove(&mut self) -> Vec<String> {
        let deadline = Instant::now() + TASKS_GONE;
        let mut left = Vec::new();
        match self {
            Arrivals::Each(record, members) => {
                for arrival in members.iter_mut().rev() {
                    left.extend(arrival.remove(deadline).await);
                }
                if let Some(record) = record {
                    left.extend(record.remove(deadline).await);
                }
            }
            Arrivals::Pod(arriving) => left.extend(arriving.pod.remove().await),
        }
        left
    }
}
