//! Directories and files of the host that containers use.
//!
//! ```text
//! OCI mounts ── binding ──> table     which directory, who uses it, how it stands      (pure)
//!                  ├──────> server    9P2000.L, one a share, on a port of the link
//!                  └──────> guest     MappedDirectory: mounts it below /run/mounts/plan9
//! ```
//!
//! [`Shares`] is the whole: a sandbox has one. At Create, once the machine is up,
//! [`Shares::share_mounts`] makes the shares of a spec's bind mounts and rewrites their sources to guest paths; the
//! reservations that it gives belong to the container, also in its saved form (`plan9_reservations`).
//! [`Shares::release`] takes them back when the container is deleted, [`Shares::forget`] when there is no machine to
//! ask. A move asks [`Shares::check_migratable`] first and is refused by the mount's name.
//!
//! A single file is a share of its directory that shows only that file. Read-only and writable users of one directory
//! share it: it is served writable once one of them may write, and each container's own mount keeps `ro`.
//!
//! Invariants: a directory is one share, however often it is used; a share's name is never used again; what a guest
//! can reach is what a share's root and rules give it; a sandbox with a share stays on this host and says why before
//! anything of it is frozen.

mod binding;
mod error;
mod mount;
mod rules;
mod server;
mod share;
mod table;

pub(crate) use binding::{Machine, Shares};
pub(crate) use error::Plan9Error;
