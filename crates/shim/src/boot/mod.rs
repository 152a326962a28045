//! How containerd starts a shim, and how one ends: `start` makes a server and answers with its
//! address, `delete` clears what a dead one left. Neither knows what a sandbox does.

pub(crate) mod args;
pub(crate) mod bootstrap;
pub(crate) mod delete;
pub(crate) mod directory;
mod join;
pub(crate) mod server;
mod serving;
pub(crate) mod start;
