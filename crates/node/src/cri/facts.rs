//! Source: what CRI made a container with, in the form in which it travels.

use prost::Message;

use super::admit::{self, AdmitError};
use super::client::{Cri, CriError};
use super::stored::{self, StoredError};
use crate::containerd::{SANDBOX, SESSION, SOURCE_CONTAINER};
use crate::network::{NETWORK, NICS};
use crate::proto;
use crate::proto::cri_facts::Part;

/// Why a pod cannot be made again elsewhere.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CriFactsError {
    /// The plugin failed.
    #[error(transparent)]
    Cri(#[from] CriError),
    /// Its account cannot be used.
    #[error(transparent)]
    Stored(#[from] StoredError),
    /// Something that is only on this host.
    #[error(transparent)]
    Admit(#[from] AdmitError),
    /// A label that is not known.
    #[error("container `{id}` is a `{kind}` to CRI, which this version of dunlin does not know")]
    Kind {
        /// The container.
        id: String,
        /// The label's value.
        kind: String,
    },
}

/// Asks the plugin for `id`, whose label says `kind`. Whether its containers can be made again elsewhere shows with the whole
/// pod: see [`plan`](super::plan).
pub(crate) async fn gather(cri: &Cri, kind: &str, id: &str) -> Result<proto::CriFacts, CriFactsError> {
    let part = match kind {
        "sandbox" => {
            let pod = cri.pod(id).await?;
            let mut config = stored::pod(id, &pod.account)?;
            admit::pod(config.clone(), std::path::Path::new("/"))?;
            forget_moves(&mut config.labels, &mut config.annotations);
            Part::Pod(proto::CriPod { config: config.encode_to_vec(), handler: pod.status.runtime_handler })
        }
        "container" => {
            let container = cri.container(id).await?;
            let mut config = stored::container(id, &container.account)?;
            forget_moves(&mut config.labels, &mut config.annotations);
            Part::Container(proto::CriContainer { config: config.encode_to_vec() })
        }
        other => return Err(CriFactsError::Kind { id: id.into(), kind: other.into() }),
    };
    Ok(proto::CriFacts { part: Some(part) })
}

/// What an earlier move left on them is not the pod's own.
fn forget_moves(
    labels: &mut std::collections::HashMap<String, String>,
    annotations: &mut std::collections::HashMap<String, String>,
) {
    labels.remove(SESSION);
    for key in [SOURCE_CONTAINER, SANDBOX, NETWORK, NICS] {
        annotations.remove(key);
    }
}
