//! ttrpc in, status out. Requests are translated and handed to the sandbox; nothing is decided here.

pub(crate) mod events;
pub(crate) mod migration;
pub(crate) mod sandbox;
pub(crate) mod status;
pub(crate) mod task;
