//! Why a mount cannot be a volume.

use thiserror::Error;

use super::walk::NotCopied;
use crate::vm::VmError;

/// A mount that cannot be had, by its name.
#[derive(Debug, Error)]
pub(crate) enum VolumeError {
    #[error("the mount of {host} on {destination}: {reason}; create it on this host, or leave the mount out")]
    Missing { host: String, destination: String, reason: String },
    #[error(
        "the mount of {host} on {destination}: the guest has no file system of the type {kind:?}; leave it out, or put the data into the image"
    )]
    Filesystem { host: String, destination: String, kind: String },
    #[error(
        "the mount of {host} on {destination}: its source is {what}, which a virtual machine cannot be given; leave it out"
    )]
    Kind { host: String, destination: String, what: &'static str },
    #[error(
        "the mount of {host} on {destination} is not copied into the guest because {why}, and the guest's kernel has no 9P client to reach it with; use an image built with KERNEL=generic, stay within the limits, or leave the mount out"
    )]
    NotShareable { host: String, destination: String, why: NotCopied },
    #[error(
        "the mount of {host} on {destination} cannot be copied here: {why}; a pod that moves needs it small and whole on both hosts"
    )]
    NotCopied { host: String, destination: String, why: NotCopied },
    #[error(
        "the mount on {destination} is a {there} on the source and none here; give the container the same mounts on both hosts"
    )]
    Another { destination: String, there: &'static str },
    #[error(
        "the mount of {host} on {destination} does not come to rest: it changed each time it was read; create the container again"
    )]
    Restless { host: String, destination: String },
    #[error("the guest takes no files of the host; use an image of the same Dunlin version as this shim")]
    OldGuest,
    #[error("the mount of {host} on {destination}: {source}")]
    Guest { host: String, destination: String, source: Box<VmError> },
    #[error("the mount of {host} on {destination} cannot be used as a disk: {source}")]
    Disk { host: String, destination: String, source: std::io::Error },
    #[error(
        "the mount of {host} on {destination}: the device has {here} bytes here and {there} on the source; give both hosts one of the same size"
    )]
    DeviceSize { host: String, destination: String, here: u64, there: u64 },
    #[error(
        "the mount of {host} on {destination}: on the device here is {what}, which the move would write over; fill it with zeroes (blkdiscard --zeroout), name it in volumes.overwrite of this host's configuration, or give this host another device"
    )]
    DeviceTaken { host: String, destination: String, what: String },
    #[error(
        "the mount of {host} on {destination}: this host uses the device here; unmount it, or give this host another device"
    )]
    DeviceInUse { host: String, destination: String },
    #[error(
        "the mount of {host} on {destination} cannot be made here: {reason}; an image that moves must not be there already, or be on storage that both hosts share (disks.shared)"
    )]
    NoPlace { host: String, destination: String, reason: String },
    #[error(
        "the mount of {host} on {destination}: {reason}; a read-only disk must have the same bytes on both hosts"
    )]
    OtherImage { host: String, destination: String, reason: String },
    #[error(
        "the mount of {here} on {destination}: it is one disk with that of another container on the source, which has {there} here; give both the same source"
    )]
    TwoPlaces { destination: String, here: String, there: String },
    #[error("copies of host files are still being written; retry the move")]
    Busy,
}
