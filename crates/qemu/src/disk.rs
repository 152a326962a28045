//! Disks, hot-plugged by slot. A slot's node is `disk-<c>-<l>`, its device `scsi-<c>-<l>`.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;
use tokio::time::timeout_at;

use crate::document::Slot;
use crate::error::QemuError;
use crate::event::Event;
use crate::owner::Qemu;
use crate::qmp::QmpError;

/// virtio-scsi releases a disk without the guest's consent, so this covers QEMU's own work only.
const RELEASE_DEADLINE: Duration = Duration::from_secs(5);

/// Where a disk's bytes are on this host: a raw image, or a block device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskSource {
    /// The image file or the block device's node; QEMU is told which it is when it is attached.
    pub path: PathBuf,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// Go around the host's page cache (`O_DIRECT`).
    ///
    /// Off by default: layers are read by many sandboxes through one cache, not every file system has
    /// `O_DIRECT` (tmpfs, some overlays), and migration copies the bytes through this QEMU, so no second host reads
    /// the file behind the cache. Turn it on for images on storage that both hosts share.
    pub direct: bool,
}

impl DiskSource {
    /// An image that the guest may write.
    pub fn writable(path: impl Into<PathBuf>) -> DiskSource {
        DiskSource { path: path.into(), read_only: false, direct: false }
    }

    /// An image that the guest may only read.
    pub fn read_only(path: impl Into<PathBuf>) -> DiskSource {
        DiskSource { path: path.into(), read_only: true, direct: false }
    }
}

pub(crate) fn node_name(slot: Slot) -> String {
    format!("disk-{slot}")
}

fn device_id(slot: Slot) -> String {
    format!("scsi-{slot}")
}

impl Qemu {
    /// Plugs a disk into a slot; works before the guest runs, while it runs, and while a stream is awaited.
    pub async fn attach_disk(&self, slot: Slot, source: &DiskSource) -> Result<(), QemuError> {
        let failed = |error| QemuError::AttachDisk { slot, path: source.path.clone(), source: error };
        self.qmp.execute("blockdev-add", node(slot, source).map_err(failed)?).await.map_err(failed)?;
        let device = json!({
            "driver": "scsi-hd",
            "id": device_id(slot),
            "bus": format!("scsi{}.0", slot.controller()),
            "channel": 0,
            "scsi-id": 0,
            "lun": slot.lun(),
            "drive": node_name(slot),
            // A full host file system is an I/O error in the guest; QEMU's own choice, to stop the machine, would
            // leave it standing until somebody makes room and knows to let it go on.
            "werror": "report",
            "rerror": "report",
        });
        if let Err(error) = self.qmp.execute("device_add", device).await {
            if let Err(undo) = self.close_node(&node_name(slot)).await {
                tracing::warn!(%slot, error = %undo, "the image of a disk that was not attached stays open");
            }
            return Err(failed(error));
        }
        Ok(())
    }

    /// Unplugs the disk of a slot and closes its image.
    pub async fn detach_disk(&self, slot: Slot) -> Result<(), QemuError> {
        let failed = |source| QemuError::DetachDisk { slot, source };
        self.unplug(&device_id(slot), RELEASE_DEADLINE, failed).await?;
        self.close_node(&node_name(slot)).await.map_err(failed)
    }

    pub(crate) async fn close_node(&self, name: &str) -> Result<(), QmpError> {
        self.qmp.execute("blockdev-del", json!({ "node-name": name })).await.map(drop)
    }

    /// `device_del`, and then the event that says it has happened.
    pub(crate) async fn unplug(
        &self,
        id: &str,
        within: Duration,
        failed: impl FnOnce(QmpError) -> QemuError,
    ) -> Result<(), QemuError> {
        let deadline = Instant::now() + within;
        let mut events = self.events();
        self.qmp.execute("device_del", json!({ "id": id })).await.map_err(failed)?;
        let not_released = || QemuError::NotReleased { device: id.to_owned(), after: within };
        loop {
            match timeout_at(deadline, events.next()).await {
                Err(_) => return Err(not_released()),
                Ok(Some(Ok(event))) => {
                    if let Event::DeviceDeleted { device: Some(device) } = event.event
                        && device == id
                    {
                        return Ok(());
                    }
                }
                // The event may be among those that were lost.
                Ok(Some(Err(_))) if !self.has_device(id).await => return Ok(()),
                Ok(Some(Err(_))) => {}
                Ok(None) => {
                    return Err(QemuError::Control {
                        action: "follow the events of",
                        source: QmpError::Closed { reason: "QEMU hung up".into() },
                    });
                }
            }
        }
    }

    async fn has_device(&self, id: &str) -> bool {
        let listed = self.qmp.execute("qom-list", json!({ "path": "/machine/peripheral" })).await;
        let listed = listed.ok().and_then(|answer| answer.as_array().cloned()).unwrap_or_default();
        listed.iter().any(|entry| entry.get("name").and_then(Value::as_str) == Some(id))
    }
}

fn node(slot: Slot, source: &DiskSource) -> Result<Value, QmpError> {
    let filename = source.path.to_str().ok_or_else(|| QmpError::Answer {
        command: "blockdev-add".to_owned(),
        reason: "QMP is JSON: a path must be UTF-8".to_owned(),
    })?;
    use std::os::unix::fs::FileTypeExt;
    // One that is not there is left for QEMU to refuse.
    let device = std::fs::metadata(&source.path).is_ok_and(|meta| meta.file_type().is_block_device());
    let mut node = json!({
        "node-name": node_name(slot),
        "driver": "raw",
        "read-only": source.read_only,
        "cache": { "direct": source.direct },
        "discard": "unmap",
        "file": {
            "driver": if device { "host_device" } else { "file" },
            "filename": filename,
            "read-only": source.read_only,
            "cache": { "direct": source.direct },
            "discard": "unmap",
        },
    });
    if !source.read_only {
        // Zeroes that the guest or a mirror writes make holes, so a sparse image stays sparse on its way.
        node["detect-zeroes"] = json!("unmap");
    }
    Ok(node)
}
