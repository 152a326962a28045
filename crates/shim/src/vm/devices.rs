//! What ties the machine to this host: directories that are shared with its guest, and devices of the host.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::time::Duration;

use dunlin_bridge::message::{FilesAnswer, FilesStep, Modification, Resource, UTILITY_VM, VpciDevice};
use dunlin_link::host::PortListener;
use dunlin_qemu::{PciAddress, RootPort};

use super::guest::asked;
use super::{Vm, VmError};
use crate::device::{plan9, vpci};
use crate::volume;

impl plan9::Machine for Vm {
    fn has_9p(&self) -> bool {
        self.guest.has_9p.load(Ordering::Relaxed)
    }

    fn listen(&self) -> Result<PortListener, VmError> {
        Ok(self.link.listen(self.next_port.fetch_add(1, Ordering::Relaxed))?)
    }

    async fn modify(&self, what: &Modification) -> Result<(), VmError> {
        self.bridge.modify(UTILITY_VM, what).await.map_err(asked("sharing a directory of the host"))
    }
}

/// A running guest lets go of a device within a second; a loaded host is slower.
pub(super) const UNPLUG_DEADLINE: Duration = Duration::from_secs(20);

impl vpci::Machine for Vm {
    fn taken_ports(&self) -> BTreeSet<u8> {
        self.nics().iter().map(|nic| nic.root_port.index()).collect()
    }

    async fn plug(&self, port: RootPort, address: PciAddress) -> Result<(), VmError> {
        Ok(self.qemu.attach_host_device(port, address).await?)
    }

    async fn wait_for(&self, port: RootPort, id: &str) -> Result<(), VmError> {
        let device = VpciDevice { vmbus_guid: id.to_owned(), root_port: Some(port.index()) };
        let add = Modification::add(Resource::VpciDevice(device));
        self.bridge.modify(UTILITY_VM, &add).await.map_err(asked("waiting for a passed-through device"))
    }

    async fn unplug(&self, port: RootPort) -> Result<(), VmError> {
        Ok(self.qemu.detach_host_device(port, UNPLUG_DEADLINE).await?)
    }
}

impl volume::Guest for Vm {
    fn takes_files(&self) -> bool {
        self.bridge.capabilities().is_some_and(|guest| guest.takes_files())
    }

    async fn files(&self, place: &str, step: FilesStep) -> Result<FilesAnswer, VmError> {
        self.bridge.files(place, step).await.map_err(asked("putting files into the guest"))
    }

    fn gone(&self) -> bool {
        self.ended.borrow().is_some()
    }
}
