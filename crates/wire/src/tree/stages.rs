//! Where each controller is in its life, and what kind of thing it is, with the payloads' own enums.
//! The first of each stage is where a controller begins, and the payload's zero.

use crate::saved;

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident { $($(#[$of:meta])* $variant:ident = $number:ident,)* })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $name {
            $($(#[$of])* $variant,)*
        }

        impl $name {
            /// Every one, the payload's zero first.
            pub const ALL: &'static [$name] = &[$($name::$variant),*];
        }

        impl Default for $name {
            fn default() -> $name {
                saved::$name::default().into()
            }
        }

        impl From<saved::$name> for $name {
            fn from(message: saved::$name) -> $name {
                match message {
                    $(saved::$name::$number => $name::$variant,)*
                }
            }
        }

        impl From<$name> for saved::$name {
            fn from(kind: $name) -> saved::$name {
                match kind {
                    $($name::$variant => saved::$name::$number,)*
                }
            }
        }
    )*};
}

kinds! {
    /// The machine.
    VmStage {
        /// Not built.
        NotCreated = VM_STAGE_NOT_CREATED,
        /// Built, not started.
        Created = VM_STAGE_CREATED,
        /// Runs.
        Running = VM_STAGE_RUNNING,
        /// Has ended.
        Terminated = VM_STAGE_TERMINATED,
        /// Failed half-way.
        Invalid = VM_STAGE_INVALID,
    }
    /// A pod's network.
    NetworkStage {
        /// Nothing set up.
        NotConfigured = NETWORK_STAGE_NOT_CONFIGURED,
        /// The guest has its cards.
        Configured = NETWORK_STAGE_CONFIGURED,
        /// Failed half-way.
        Invalid = NETWORK_STAGE_INVALID,
        /// Taken down.
        TornDown = NETWORK_STAGE_TORN_DOWN,
    }
    /// A container.
    ContainerStage {
        /// Known, not in the guest.
        NotCreated = CONTAINER_STAGE_NOT_CREATED,
        /// In the guest, its init not started.
        Created = CONTAINER_STAGE_CREATED,
        /// Its init runs.
        Running = CONTAINER_STAGE_RUNNING,
        /// Its init has ended.
        Stopped = CONTAINER_STAGE_STOPPED,
        /// Failed half-way.
        Invalid = CONTAINER_STAGE_INVALID,
    }
    /// A SCSI disk.
    DiskStage {
        /// Has a slot.
        Reserved = DISK_STAGE_RESERVED,
        /// Plugged in.
        Attached = DISK_STAGE_ATTACHED,
        /// The guest has let go of it.
        Ejected = DISK_STAGE_EJECTED,
        /// Pulled out.
        Detached = DISK_STAGE_DETACHED,
    }
    /// What a SCSI disk is on the host.
    DiskKind {
        /// An image file.
        VirtualDisk = DISK_KIND_VIRTUAL_DISK,
        /// A block device.
        PassThrough = DISK_KIND_PASS_THROUGH,
    }
    /// A SCSI disk's mount in the guest.
    MountStage {
        /// Asked for.
        Reserved = MOUNT_STAGE_RESERVED,
        /// There.
        Mounted = MOUNT_STAGE_MOUNTED,
        /// Gone.
        Unmounted = MOUNT_STAGE_UNMOUNTED,
    }
    /// A Plan9 share.
    ShareStage {
        /// Has a name.
        Reserved = SHARE_STAGE_RESERVED,
        /// Served.
        Added = SHARE_STAGE_ADDED,
        /// Failed half-way.
        Invalid = SHARE_STAGE_INVALID,
        /// No longer served.
        Removed = SHARE_STAGE_REMOVED,
    }
    /// A Plan9 share's mount in the guest.
    ShareMountStage {
        /// Asked for.
        Reserved = SHARE_MOUNT_STAGE_RESERVED,
        /// There.
        Mounted = SHARE_MOUNT_STAGE_MOUNTED,
        /// Failed half-way.
        Invalid = SHARE_MOUNT_STAGE_INVALID,
        /// Gone.
        Unmounted = SHARE_MOUNT_STAGE_UNMOUNTED,
    }
    /// A passed-through PCI device.
    VpciStage {
        /// Has its id.
        Reserved = VPCI_STAGE_RESERVED,
        /// Plugged in, the guest has not seen it yet.
        Assigned = VPCI_STAGE_ASSIGNED,
        /// The guest has it.
        Ready = VPCI_STAGE_READY,
        /// Plugged in, and the guest failed to take it.
        AssignedInvalid = VPCI_STAGE_ASSIGNED_INVALID,
        /// Pulled out.
        Removed = VPCI_STAGE_REMOVED,
    }
}

/// What a container is in its pod. Its message has a zero that says nothing and is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ContainerRole {
    /// Holds the pod: its network and its id.
    Sandbox,
    /// Works in a pod that has a sandbox container.
    Workload,
    /// A pod of its own.
    Standalone,
}

impl ContainerRole {
    pub(crate) fn from_message(message: saved::ContainerRole) -> Option<ContainerRole> {
        match message {
            saved::ContainerRole::CONTAINER_ROLE_UNSPECIFIED => None,
            saved::ContainerRole::CONTAINER_ROLE_SANDBOX => Some(ContainerRole::Sandbox),
            saved::ContainerRole::CONTAINER_ROLE_WORKLOAD => Some(ContainerRole::Workload),
            saved::ContainerRole::CONTAINER_ROLE_STANDALONE => Some(ContainerRole::Standalone),
        }
    }

    pub(crate) fn message(self) -> saved::ContainerRole {
        match self {
            ContainerRole::Sandbox => saved::ContainerRole::CONTAINER_ROLE_SANDBOX,
            ContainerRole::Workload => saved::ContainerRole::CONTAINER_ROLE_WORKLOAD,
            ContainerRole::Standalone => saved::ContainerRole::CONTAINER_ROLE_STANDALONE,
        }
    }
}
