//! NICs, hot-plugged into the PCIe root ports. A port's device is `nic-<n>`, its backend `net-<n>`.

use std::os::fd::OwnedFd;
use std::time::Duration;

use serde_json::json;

use crate::document::{MacAddress, RootPort};
use crate::error::QemuError;
use crate::owner::Qemu;

fn device_id(port: RootPort) -> String {
    format!("nic-{port}")
}

fn backend_id(port: RootPort) -> String {
    format!("net-{port}")
}

impl Qemu {
    /// Plugs a virtio NIC into a root port, backed by an open tap (of any network namespace).
    /// Works before the guest runs, while it runs, and while a stream is awaited.
    pub async fn attach_nic(&self, port: RootPort, mac: MacAddress, tap: OwnedFd) -> Result<(), QemuError> {
        let failed = |source| QemuError::AttachNic { port, source };
        let (backend, fd_name) = (backend_id(port), format!("tap-{port}"));
        self.qmp.pass_fd(&fd_name, tap).await.map_err(failed)?;
        let netdev = json!({ "type": "tap", "id": backend, "fd": fd_name });
        if let Err(error) = self.qmp.execute("netdev_add", netdev).await {
            self.qmp.forget_fd(&fd_name).await;
            return Err(failed(error));
        }
        let device = json!({
            "driver": "virtio-net-pci",
            "id": device_id(port),
            "bus": format!("rp{port}"),
            "addr": "0x0",
            "netdev": backend,
            "mac": mac.to_string(),
            // Nothing boots over it, and the ROM would be a file of this host's in the machine.
            "romfile": "",
            // Its host announces it. And QEMU 7.2 frees the timer of the guest's announcements when an arriving one is to
            // make none (`MigrationOptions::announce`), and crashes when the guest resets the card.
            "guest_announce": false,
        });
        if let Err(error) = self.qmp.execute("device_add", device).await {
            if let Err(undo) = self.qmp.execute("netdev_del", json!({ "id": backend })).await {
                tracing::warn!(%port, error = %undo, "the tap of a NIC that was not attached stays open");
            }
            return Err(failed(error));
        }
        Ok(())
    }

    /// Unplugs the NIC of a root port and closes its tap. The running guest has to let go of it within `deadline`;
    /// one that is not running, or has no driver for its slots, never does.
    pub async fn detach_nic(&self, port: RootPort, deadline: Duration) -> Result<(), QemuError> {
        let failed = |source| QemuError::DetachNic { port, source };
        self.unplug(&device_id(port), deadline, failed).await?;
        let removed = self.qmp.execute("netdev_del", json!({ "id": backend_id(port) })).await;
        removed.map(drop).map_err(failed)
    }
}
