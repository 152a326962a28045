//! PCI devices of the host that containers use, passed through with VFIO.
//!
//! ```text
//! OCI spec ── spec ──> binding ──> table    which device, who uses it, how it stands   (pure)
//!                         ├─────> QEMU      vfio-pci on a free PCIe root port
//!                         └─────> guest     VPCIDevice: waits for it behind that port
//! ```
//!
//! [`Devices`] is the whole: a sandbox has one. [`devices_of`] reads what the spec of a container asks for, as
//! containerd gave it; [`Devices::check`] refuses before a machine is made what this host cannot hand out;
//! [`Devices::assign`] plugs in, and the ids that it gives belong to the container, also in its saved form
//! (`vpci_devices`). [`Devices::release`] takes them back, [`Devices::forget`] when there is no machine to ask. A move
//! asks [`Devices::check_migratable`] first and is refused by the device's name.
//!
//! Invariants: a device is in the machine once; the host's drivers are its administrator's: nothing is bound here; a
//! sandbox with a device stays on this host and says why before anything of it is frozen.

mod binding;
mod device;
mod error;
mod spec;
mod table;

pub(crate) use binding::{Devices, Machine};
pub(crate) use error::VpciError;
pub(crate) use spec::{devices_of, tell_ports};
