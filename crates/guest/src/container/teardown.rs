//! Removes a container's state. The entry goes first; whatever fails after that is still tried in full.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::error::ContainerError;
use super::{Container, Containers, Slot, blocking, lock, pod};
use crate::cgroup::tree;
use crate::oci::STATE_ROOT;
use crate::storage::copies;
use crate::storage::mounts::unmount_all;

/// How long the processes of a cgroup may take to be gone.
pub(super) const CGROUP_DEADLINE: Duration = Duration::from_secs(5);

impl Containers {
    /// Kills what still runs in a container and deletes all that belongs to it: cgroup, bundle,
    /// scratch directory. The first failure is returned; the container is gone either way.
    pub async fn delete(&self, id: &str) -> Result<(), ContainerError> {
        let container = self.find(id)?;
        lock(&self.shared.table).remove(&container.id);
        container.stop.send_replace(true);
        self.take_down(container).await
    }

    /// Deletes all that belongs to a container which is in the table no more, or not yet.
    pub(super) async fn take_down(&self, container: Arc<Container>) -> Result<(), ContainerError> {
        let last_of_pod = !lock(&self.shared.table)
            .values()
            .any(|slot| matches!(slot, Slot::Ready(other) if other.pod == container.pod));
        let id = container.id.clone();
        let removed = blocking(move || {
            let steps = [
                container
                    .cgroup
                    .remove(CGROUP_DEADLINE)
                    .map_err(ContainerError::at("remove", container.cgroup.dir())),
                remove_tree(&Path::new(STATE_ROOT).join(container.id.as_str())),
                remove_files(&container),
            ];
            if last_of_pod {
                tree::remove_pod(&container.pod);
                copies::remove_directories(&container.pod);
            }
            steps.into_iter().collect()
        })
        .await;
        // After its processes, so that none of them sees its network go.
        self.shared.networks.release(&id).await;
        removed
    }
}

fn remove_files(container: &Container) -> Result<(), ContainerError> {
    // Whatever the host left mounted would otherwise be emptied instead of unmounted.
    unmount_all(&container.root)?;
    pod::unmount(&container.bundle)?;
    unmount_all(&container.bundle)?;
    if let Some(scratch) = &container.scratch {
        remove_tree(scratch)?;
    }
    remove_tree(&container.bundle)?;
    // The pod's directory goes with its last container.
    if let Some(pod) = container.bundle.parent() {
        let _ = fs::remove_dir(pod);
    }
    Ok(())
}

pub(super) fn remove_tree(path: &Path) -> Result<(), ContainerError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(ContainerError::at("delete", path)(error))
        }
        _ => Ok(()),
    }
}
