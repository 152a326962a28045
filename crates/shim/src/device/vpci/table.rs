//! Which devices of the host are in the machine, and who uses them. Nothing here touches one.

use std::collections::{BTreeMap, BTreeSet};

use dunlin_qemu::RootPort;
use dunlin_wire::tree::{SavedVpci, SavedVpciDevice};

use super::device::{Op, State};
use super::error::{Tie, VpciError};
use super::spec::HostDevice;
use crate::controller::{NotNow, Transitions};
use crate::hold::{Hold, Step};

/// The table. What it says of a device is what is saved of it; users and ports are this host's.
#[derive(Debug, Default)]
pub(crate) struct Vpci {
    /// Its part in a move.
    hold: Hold,
    table: SavedVpci,
    holders: BTreeMap<String, Vec<String>>,
    ports: BTreeMap<String, RootPort>,
}

const WHAT: &str = "the table of passed-through devices";

fn name(device: &SavedVpciDevice) -> String {
    match device.virtual_function_index {
        0 => device.instance_id.clone(),
        function => format!("{}/{function}", device.instance_id),
    }
}

impl Vpci {
    /// Takes a use of a device; several containers of the machine may use one. `taken`: root ports that have something
    /// else. Gives the guest's name of the device, a UUID.
    pub(crate) fn reserve(
        &mut self,
        device: &HostDevice,
        container: &str,
        taken: &BTreeSet<u8>,
    ) -> Result<String, VpciError> {
        self.free("reserve")?;
        let instance_id = device.address.to_string();
        let present = self.table.devices.iter_mut().find(|(_, present)| {
            present.instance_id == instance_id && present.virtual_function_index == device.function
        });
        if let Some((id, present)) = present {
            if matches!(present.stage, State::AssignedInvalid | State::Removed) {
                // A broken one takes nobody in.
                let mut stage = present.stage;
                stage.enter(Op::Ready, format!("device {device}"))?;
            }
            present.ref_count = present.ref_count.saturating_add(1);
            let id = id.clone();
            self.holders.entry(id.clone()).or_default().push(container.to_owned());
            return Ok(id);
        }
        // From the last one down: network cards take them from the first one up.
        let free = (0..4)
            .rev()
            .find(|port| !taken.contains(port) && self.ports.values().all(|used| used.index() != *port));
        let port = free.and_then(|port| RootPort::new(port).ok());
        let port = port.ok_or_else(|| VpciError::NoPort { id: device.to_string() })?;
        let id = uuid::Uuid::new_v4().to_string();
        let saved = SavedVpciDevice {
            instance_id,
            virtual_function_index: device.function,
            stage: State::Reserved,
            ref_count: 1,
        };
        self.table.devices.insert(id.clone(), saved);
        self.holders.insert(id.clone(), vec![container.to_owned()]);
        self.ports.insert(id.clone(), port);
        Ok(id)
    }

    /// A device: how it stands and its root port; none for one that was imported.
    pub(crate) fn device(&self, id: &str) -> Result<(&SavedVpciDevice, Option<RootPort>), VpciError> {
        let device = self.table.devices.get(id).ok_or_else(|| VpciError::Unknown(id.to_owned()))?;
        Ok((device, self.ports.get(id).copied()))
    }

    /// The root ports that devices are in.
    pub(crate) fn ports(&self) -> BTreeSet<u8> {
        self.ports.values().map(|port| port.index()).collect()
    }

    /// See the table of [`super::device`].
    pub(crate) fn enter(&mut self, id: &str, op: Op) -> Result<(), VpciError> {
        let device = self.table.devices.get_mut(id).ok_or_else(|| VpciError::Unknown(id.to_owned()))?;
        let what = format!("device {}", name(device));
        Ok(device.stage.enter(op, what)?)
    }

    /// One use less. True: it was the last one, and the device is to be unplugged.
    pub(crate) fn release(&mut self, id: &str, container: &str) -> Result<bool, VpciError> {
        self.free("release")?;
        let device = self.table.devices.get_mut(id).ok_or_else(|| VpciError::Unknown(id.to_owned()))?;
        if let Some(holders) = self.holders.get_mut(id)
            && let Some(at) = holders.iter().position(|holder| holder == container)
        {
            holders.remove(at);
        }
        device.ref_count = device.ref_count.saturating_sub(1);
        Ok(device.ref_count == 0)
    }

    /// The device is out of the machine, or there is no machine any more.
    pub(crate) fn remove(&mut self, id: &str) -> Result<(), VpciError> {
        self.free("release")?;
        self.enter(id, Op::Remove)?;
        self.table.devices.remove(id);
        self.holders.remove(id);
        self.ports.remove(id);
        Ok(())
    }

    /// Refused, with the device's name, while there is one: it stays in this host.
    pub(crate) fn check_migratable(&self) -> Result<(), Tie> {
        let Some((id, device)) = self.table.devices.first_key_value() else { return Ok(()) };
        Err(match self.holders.get(id).and_then(|holders| holders.first()) {
            Some(container) => Tie::Device { container: container.clone(), id: name(device) },
            None => Tie::Left { id: name(device) },
        })
    }

    /// The saved table; from now on it stays as it is. May be repeated.
    pub(crate) fn save(&mut self) -> Result<SavedVpci, NotNow> {
        self.hold.enter(Step::Save, WHAT)?;
        self.each(Op::Save)?;
        Ok(self.table.clone())
    }

    /// A table from a payload, inert until it is resumed.
    pub(crate) fn import(saved: SavedVpci) -> Result<Vpci, NotNow> {
        let mut vpci = Vpci { table: saved, ..Vpci::default() };
        vpci.hold.enter(Step::Import, WHAT)?;
        vpci.each(Op::Import)?;
        Ok(vpci)
    }

    /// Destination: the source's devices are these on this host, by the guest's names. None has to be.
    pub(crate) fn patch(&mut self, here: &BTreeMap<String, HostDevice>) -> Result<(), VpciError> {
        if let Some(unknown) = here.keys().find(|id| !self.table.devices.contains_key(*id)) {
            return Err(VpciError::Unknown(unknown.clone()));
        }
        if self.hold != Hold::Patched {
            self.hold.enter(Step::Patch, WHAT)?;
        }
        self.each(Op::Patch)?;
        for (id, device) in here {
            if let Some(saved) = self.table.devices.get_mut(id) {
                saved.instance_id = device.address.to_string();
                saved.virtual_function_index = device.function;
            }
        }
        Ok(())
    }

    /// The table may change again. An imported device is in the source's machine and not in this one, so it is broken
    /// here. May be repeated.
    pub(crate) fn resume(&mut self) -> Result<(), NotNow> {
        let arrived = self.hold == Hold::Patched;
        self.hold.enter(Step::Resume, WHAT)?;
        self.each(Op::Resume)?;
        if arrived {
            for device in self.table.devices.values_mut() {
                device.stage = device.stage.after(Op::Fail).unwrap_or(device.stage);
            }
        }
        Ok(())
    }

    /// Ends what was imported, so that it can be released; what was saved stays as it is. May be repeated.
    pub(crate) fn abort(&mut self) -> Result<(), NotNow> {
        let imported = self.hold.arriving();
        self.hold.enter(Step::Abort, WHAT)?;
        if imported { self.each(Op::Abort) } else { Ok(()) }
    }

    /// While it takes part in a move, it stays as it is.
    fn free(&self, op: &'static str) -> Result<(), NotNow> {
        match self.hold {
            Hold::Free => Ok(()),
            held => Err(NotNow { what: WHAT.to_owned(), state: held.name(), op }),
        }
    }

    fn each(&mut self, op: Op) -> Result<(), NotNow> {
        for device in self.table.devices.values_mut() {
            let what = format!("device {}", name(device));
            device.stage.enter(op, what)?;
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
