//! From what a spec asks for to devices in the machine.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use dunlin_qemu::{HostDevices, PciAddress, RootPort};
use dunlin_wire::tree::SavedVpci;

use super::device::{Op, State};
use super::error::{Tie, VpciError};
use super::spec::HostDevice;
use super::table::Vpci;
use crate::controller::NotNow;
use crate::vm::VmError;

/// The machine that devices are handed to.
pub(crate) trait Machine {
    /// Root ports that have something else in them.
    fn taken_ports(&self) -> BTreeSet<u8>;

    /// Plugs the host's device in.
    fn plug(&self, port: RootPort, address: PciAddress) -> impl Future<Output = Result<(), VmError>> + Send;

    /// Waits until the guest has seen what is in the port. `id`: the name that both ends know it by.
    fn wait_for(&self, port: RootPort, id: &str) -> impl Future<Output = Result<(), VmError>> + Send;

    /// Pulls out what is in the port; the guest has to let go of it.
    fn unplug(&self, port: RootPort) -> impl Future<Output = Result<(), VmError>> + Send;
}

/// A sandbox's passed-through devices.
#[derive(Debug, Default)]
pub(crate) struct Devices {
    table: Mutex<Vpci>,
    host: HostDevices,
    /// One device comes or goes at a time.
    turn: tokio::sync::Mutex<()>,
}

/// A device of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Assigned {
    /// The guest's name of it, a UUID.
    pub(crate) id: String,
    /// Behind which root port the guest finds it.
    pub(crate) port: RootPort,
}

impl Devices {
    /// Devices of a host that tells of them elsewhere.
    #[cfg(test)]
    pub(crate) fn of(host: HostDevices) -> Devices {
        Devices { host, ..Devices::default() }
    }

    /// Whether this host can hand all of them out. To be asked before a machine is made.
    pub(crate) async fn check(&self, devices: &[HostDevice]) -> Result<(), VpciError> {
        let (host, devices) = (self.host.clone(), devices.to_vec());
        let checked = tokio::task::spawn_blocking(move || {
            devices.iter().try_for_each(|device| host.check(host.function(device.address, device.function)?))
        });
        checked.await.unwrap_or(Ok(())).map_err(VpciError::Host)
    }

    /// Hands the devices to the machine and waits until its guest has each. When it fails, none of them is left there.
    pub(crate) async fn assign<M: Machine + Sync>(
        &self,
        machine: &M,
        container: &str,
        devices: &[HostDevice],
    ) -> Result<Vec<Assigned>, VpciError> {
        self.check(devices).await?;
        let mut assigned = Vec::new();
        for device in devices {
            match self.assign_one(machine, container, device).await {
                Ok(one) => assigned.push(one),
                Err(error) => {
                    let ids: Vec<String> = assigned.into_iter().map(|one: Assigned| one.id).collect();
                    if let Err(undo) = self.release(machine, container, &ids).await {
                        tracing::warn!(container, error = %undo, "a device of a container that was not made stays");
                    }
                    return Err(error);
                }
            }
        }
        Ok(assigned)
    }

    /// Gives a container's uses back; what nobody uses any more is pulled out. Goes on after a failure and gives the first.
    /// A device that the guest does not let go of stays in the table, because it stays in the machine.
    pub(crate) async fn release<M: Machine + Sync>(
        &self,
        machine: &M,
        container: &str,
        ids: &[String],
    ) -> Result<(), VpciError> {
        let mut result = Ok(());
        for id in ids {
            let released = self.release_one(machine, container, id).await;
            if result.is_ok() {
                result = released;
            }
        }
        result
    }

    /// Gives a container's uses back without a machine to ask.
    pub(crate) fn forget(&self, container: &str, ids: &[String]) -> Result<(), VpciError> {
        let mut table = self.table();
        for id in ids {
            if table.release(id, container)? {
                table.remove(id)?;
            }
        }
        Ok(())
    }

    /// The root ports that devices are in.
    pub(crate) fn ports(&self) -> BTreeSet<u8> {
        self.table().ports()
    }

    /// Refused by the device's name while the sandbox is tied to this host. To be asked before anything is frozen.
    pub(crate) fn check_migratable(&self) -> Result<(), Tie> {
        self.table().check_migratable()
    }

    /// See [`Vpci::save`].
    pub(crate) fn save(&self) -> Result<SavedVpci, NotNow> {
        self.table().save()
    }

    /// A destination's table, inert: see [`Vpci::import`]. What was here before is forgotten.
    pub(crate) fn adopt(&self, saved: SavedVpci) -> Result<(), NotNow> {
        *self.table() = Vpci::import(saved)?;
        Ok(())
    }

    /// See [`Vpci::patch`].
    pub(crate) fn patch(&self, here: &BTreeMap<String, HostDevice>) -> Result<(), VpciError> {
        self.table().patch(here)
    }

    /// See [`Vpci::resume`].
    pub(crate) fn resume(&self) -> Result<(), NotNow> {
        self.table().resume()
    }

    /// See [`Vpci::abort`].
    pub(crate) fn abort(&self) -> Result<(), NotNow> {
        self.table().abort()
    }

    async fn assign_one<M: Machine + Sync>(
        &self,
        machine: &M,
        container: &str,
        device: &HostDevice,
    ) -> Result<Assigned, VpciError> {
        let function = self.host.function(device.address, device.function)?;
        let turn = self.turn.lock().await;
        let (id, port, stage) = {
            let mut table = self.table();
            let id = table.reserve(device, container, &machine.taken_ports())?;
            let (present, port) = table.device(&id)?;
            let (stage, port) = (present.stage, port.ok_or_else(|| VpciError::Unknown(id.clone()))?);
            (id, port, stage)
        };
        if stage == State::Ready {
            return Ok(Assigned { id, port });
        }
        let failed = |source| VpciError::Machine { id: device.to_string(), source: Box::new(source) };
        if let Err(error) = machine.plug(port, function).await {
            // Nothing was plugged in, so nothing stays.
            self.forget(container, std::slice::from_ref(&id))?;
            return Err(failed(error));
        }
        self.table().enter(&id, Op::Assign)?;
        if let Err(error) = machine.wait_for(port, &id).await {
            self.table().enter(&id, Op::Fail)?;
            drop(turn);
            if let Err(undo) = self.release_one(machine, container, &id).await {
                tracing::warn!(device = %device, error = %undo, "a device that the guest did not take stays plugged in");
            }
            return Err(failed(error));
        }
        self.table().enter(&id, Op::Ready)?;
        Ok(Assigned { id, port })
    }

    async fn release_one<M: Machine + Sync>(
        &self,
        machine: &M,
        container: &str,
        id: &str,
    ) -> Result<(), VpciError> {
        let _turn = self.turn.lock().await;
        let plugged = {
            let mut table = self.table();
            if !table.release(id, container)? {
                return Ok(());
            }
            let (device, port) = table.device(id)?;
            port.filter(|_| matches!(device.stage, State::Assigned | State::Ready | State::AssignedInvalid))
        };
        if let Some(port) = plugged
            && let Err(source) = machine.unplug(port).await
        {
            self.table().enter(id, Op::Fail)?;
            return Err(VpciError::Machine { id: id.to_owned(), source: Box::new(source) });
        }
        self.table().remove(id)
    }

    fn table(&self) -> MutexGuard<'_, Vpci> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
#[path = "binding_tests.rs"]
mod tests;
