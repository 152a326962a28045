//! Streams between hosts: one TCP connection for memory and one for each writable disk.
//!
//! ```text
//!   source node --DUNLIN1 session token stream--> destination node
//!               <--OK------------------------------
//!   each then gives its end to its shim and closes its own copy
//! ```
//!
//! Nothing is read beyond the preamble's line and nothing is written beyond the answer: every
//! byte after them belongs to the shims.

pub(crate) mod dial;
pub(crate) mod listen;
