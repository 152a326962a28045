//! Image bytes by digest, from node to node.
//!
//! ```text
//!  destination's shim --ttrpc, unix socket--> its node --Peer.ReadImage--> the source's node --> the image's file
//! ```
//!
//! What can be read is what a move exports: [`exports::Exports`] holds, for the time of a move that leaves, the files of
//! its read-only disks, and answers only the node that it goes to, a [`piece`] at a time. [`serve`] is the destination's side.

pub(crate) mod exports;
pub(crate) mod piece;
pub(crate) mod serve;

/// Most that one answer carries, bytes.
pub(crate) const CHUNK: u32 = 1 << 20;
