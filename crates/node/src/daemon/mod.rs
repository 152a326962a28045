//! `dunlin node`: both ends of every move that this host takes part in.
//!
//! ```text
//!   cli --unix--> local --> moves --> drive (one task a move: the coordinator) --> carrier
//!                                                                      |-- source shim, containerd
//!                                                                      `-- peer::remote, data::dial
//!   other node --TCP--> peer::service, data::listen --> peer::incoming
//! ```

pub(crate) mod carrier;
pub(crate) mod drive;
pub(crate) mod local;
pub(crate) mod moves;
pub(crate) mod serve;
pub(crate) mod told;
