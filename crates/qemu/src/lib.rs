//! One QEMU process: how it is started, spoken to, changed, moved and ended.
//!
//! ```text
//!  Document + LaunchOptions --command_line--> argv --process--> QEMU
//!                                                                |
//!  Qemu (owner) --disk, nic, vfio, mirror, migration--> qmp::QmpClient-+--> events
//! ```
//!
//! What holds here:
//! * A [`Document`] names no host path, so two hosts build the same machine from it.
//! * QEMU never outlives its [`Qemu`]: parent-death signal, SIGKILL on drop, and one thread that reaps it.
//! * QEMU has no network: an empty network namespace, and every peer arrives as a file descriptor.
//! * No file that a guest can make grow grows without end.
//! * Every call has a deadline, and the end of the process fails every call that is still open.
//!
//! This crate knows no pods, no containers and no migration sessions.

pub mod accel;
mod command_line;
mod disk;
mod document;
mod error;
mod event;
mod log_cap;
mod migration;
mod mirror;
mod nbd;
mod nic;
mod owner;
mod process;
pub mod qmp;
mod run_state;
mod usage;
pub mod version;
mod vfio;

pub use command_line::{ChannelEndpoint, HostPaths, LaunchOptions, Mode, command_line};
pub use disk::DiskSource;
pub use document::{Channel, Disk, Document, InvalidField, MacAddress, Nic, RootPort, Slot};
pub use error::{QemuError, SpawnError};
pub use event::{Event, EventStream, EventsLost, TimedEvent};
pub use migration::{MigrationInfo, MigrationOptions, MigrationStatus, RamProgress, Role, Throttle};
pub use mirror::{BlockJob, mirror_fault};
pub use nbd::{NbdClientStream, NotNbd};
pub use owner::Qemu;
pub use process::ExitReport;
pub use run_state::RunState;
pub use usage::Usage;
pub use vfio::{HostDevices, PciAddress, VfioError};
