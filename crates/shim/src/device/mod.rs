//! The devices of a sandbox, one controller a kind.

pub(crate) mod plan9;
pub(crate) mod scsi;
pub(crate) mod vpci;
