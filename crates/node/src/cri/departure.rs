//! Source, after the pod runs elsewhere: it goes from CRI's memory too.
//!
//! CRI removes a pod by killing its containers and waiting for their ends, and here nothing ends: the
//! processes live on, on the other host. So the tasks go first, through containerd; the shim publishes no
//! exit for them. CRI sees its waits break, writes its "unknown" status (255) to containers that it is
//! about to forget, and then removes the pod as one that has stopped.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::client::Cri;

/// From the tasks' end to CRI's having seen it.
const SEEN: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(100);

/// Removes pod `id`, whose tasks are gone. Safe to repeat; says what was left and how to remove it.
pub(crate) async fn remove(cri: &Cri, id: &str) -> Result<(), String> {
    let deadline = Instant::now() + SEEN;
    loop {
        match cri.remove_pod(id).await {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() >= deadline => {
                return Err(format!("{error}; `crictl rmp -f {id}` removes the pod that is left"));
            }
            Err(_) => sleep(POLL).await,
        }
    }
}
