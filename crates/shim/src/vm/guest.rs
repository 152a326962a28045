//! What the machine's guest is asked, in the sandbox's words; and where things lie in it.

use dunlin_bridge::host::BridgeError;
use dunlin_bridge::hresult::HResult;
use dunlin_bridge::message::{
    CombinedLayers, ContainerConfig, ContainerConstraints, GuestPid, Layer, MappedVirtualDisk, Modification,
    PropertyType, Resource, SchemaVersion, ScsiDevice, UTILITY_VM,
};
use dunlin_wire::ids::Slot;
use serde_json::Value;

use super::{Vm, VmError};
use crate::device::scsi::Disk;

/// The container's bundle in the guest.
pub(crate) fn bundle_path(pod: &str, container: &str) -> String {
    format!("/run/gcs/pods/{pod}/{container}")
}

/// The container's root file system in the guest.
pub(crate) fn rootfs_path(pod: &str, container: &str) -> String {
    format!("{}/rootfs", bundle_path(pod, container))
}

/// The container's part of a scratch disk that is mounted at `mount`.
pub(crate) fn scratch_path(mount: &str, pod: &str, container: &str) -> String {
    format!("{mount}/scratch/{pod}/{container}")
}

impl Vm {
    /// Has the guest mount a whole attached disk, or link its device node.
    pub(crate) async fn mount_disk(&self, slot: Slot, guest_path: &str, disk: &Disk) -> Result<(), VmError> {
        let disk = MappedVirtualDisk {
            mount_path: guest_path.to_owned(),
            lun: slot.lun(),
            controller: slot.controller(),
            read_only: disk.read_only(),
            filesystem: disk.filesystem.clone(),
            options: disk.mount.options.clone(),
            block_dev: disk.mount.block_device,
            ..MappedVirtualDisk::default()
        };
        let modification = Modification::add(Resource::MappedVirtualDisk(disk));
        self.bridge.modify(UTILITY_VM, &modification).await.map_err(asked("mounting a disk"))
    }

    /// Composes the root file system. `layers`: mounted, topmost first.
    pub(crate) async fn combine_layers(
        &self,
        container: &str,
        rootfs: &str,
        layers: impl Iterator<Item = String>,
        scratch: &str,
    ) -> Result<(), VmError> {
        let layers = CombinedLayers {
            container_id: container.to_owned(),
            container_root_path: rootfs.to_owned(),
            layers: layers.map(|path| Layer { path, ..Layer::default() }).collect(),
            scratch_path: scratch.to_owned(),
        };
        let modification = Modification::add(Resource::CombinedLayers(layers));
        self.bridge.modify(UTILITY_VM, &modification).await.map_err(asked("composing the root file system"))
    }

    /// Takes the root file system apart again.
    pub(crate) async fn separate_layers(&self, container: &str, rootfs: &str) -> Result<(), VmError> {
        let layers = CombinedLayers {
            container_id: container.to_owned(),
            container_root_path: rootfs.to_owned(),
            ..CombinedLayers::default()
        };
        let modification = Modification::remove(Resource::CombinedLayers(layers));
        self.bridge
            .modify(UTILITY_VM, &modification)
            .await
            .map_err(asked("taking the root file system apart"))
    }

    /// Has the guest forget a container. One that it does not know is forgotten already.
    pub(crate) async fn delete_container(&self, container: &str) -> Result<(), VmError> {
        match self.bridge.delete_state(container).await {
            Ok(()) | Err(BridgeError::Guest { hresult: HResult::SYSTEM_NOT_FOUND, .. }) => Ok(()),
            Err(error) => Err(asked("deleting the container's state")(error)),
        }
    }

    /// Has the guest unmount a whole disk.
    pub(crate) async fn unmount_disk(&self, slot: Slot, guest_path: &str) -> Result<(), VmError> {
        let disk = MappedVirtualDisk {
            mount_path: guest_path.to_owned(),
            lun: slot.lun(),
            controller: slot.controller(),
            ..MappedVirtualDisk::default()
        };
        let modification = Modification::remove(Resource::MappedVirtualDisk(disk));
        self.bridge.modify(UTILITY_VM, &modification).await.map_err(asked("unmounting a disk"))
    }

    /// Has the guest let go of a disk, before QEMU does.
    pub(crate) async fn eject_disk(&self, slot: Slot) -> Result<(), VmError> {
        let device = ScsiDevice { controller: slot.controller(), lun: slot.lun() };
        let modification = Modification::remove(Resource::ScsiDevice(device));
        self.bridge.modify(UTILITY_VM, &modification).await.map_err(asked("ejecting a disk"))
    }

    pub(crate) async fn create_container(
        &self,
        pod: &str,
        container: &str,
        spec: Value,
        scratch: &str,
    ) -> Result<(), VmError> {
        let config = ContainerConfig {
            schema_version: SchemaVersion::V21,
            oci_bundle_path: bundle_path(pod, container),
            oci_specification: spec,
            scratch_dir_path: scratch.to_owned(),
        };
        self.bridge.create(container, &config).await.map_err(asked("creating the container"))
    }

    /// False: the process has ended already.
    pub(crate) async fn signal(&self, container: &str, pid: u32, signal: u32) -> Result<bool, VmError> {
        let number = i32::try_from(signal).unwrap_or(i32::MAX);
        match self.bridge.signal(container, GuestPid(pid), Some(number)).await {
            Ok(()) => Ok(true),
            Err(BridgeError::Guest { hresult: HResult::NOT_FOUND, .. }) => Ok(false),
            Err(error) => Err(asked("sending a signal")(error)),
        }
    }

    pub(crate) async fn pids(&self, container: &str) -> Result<Vec<u32>, VmError> {
        let properties = self
            .bridge
            .properties(container, &[PropertyType::ProcessList])
            .await
            .map_err(asked("listing processes"))?;
        let list = properties.get("ProcessList").and_then(Value::as_array);
        let pid = |process: &Value| u32::try_from(process.get("ProcessId")?.as_u64()?).ok();
        Ok(list.into_iter().flatten().filter_map(pid).collect())
    }

    pub(crate) async fn statistics(&self, container: &str) -> Result<Value, VmError> {
        self.bridge
            .properties(container, &[PropertyType::Statistics])
            .await
            .map_err(asked("reading statistics"))
    }

    pub(crate) async fn resize(
        &self,
        container: &str,
        pid: u32,
        width: u16,
        height: u16,
    ) -> Result<(), VmError> {
        self.bridge
            .resize(container, GuestPid(pid), height, width)
            .await
            .map_err(asked("resizing the terminal"))
    }

    pub(crate) async fn pause(&self, container: &str) -> Result<(), VmError> {
        self.bridge.pause(container).await.map_err(asked("pausing the container"))
    }

    pub(crate) async fn resume(&self, container: &str) -> Result<(), VmError> {
        self.bridge.resume(container).await.map_err(asked("resuming the container"))
    }

    pub(crate) async fn update(&self, container: &str, resources: Value) -> Result<(), VmError> {
        let constraints = ContainerConstraints { linux: resources };
        let modification = Modification::add(Resource::ContainerConstraints(constraints));
        self.bridge.modify(container, &modification).await.map_err(asked("changing the limits"))
    }
}

/// Names what the guest was asked when it said no.
pub(super) fn asked(action: &'static str) -> impl Fn(BridgeError) -> VmError {
    move |source| VmError::Guest { action, source }
}
