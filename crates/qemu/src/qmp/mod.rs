//! A small QMP client: one unix socket, commands matched to answers by id, events to every subscriber.
//!
//! ```text
//!  execute() --Outgoing--> writer task --> QEMU --> reader task --+--> the caller that waits for this id
//!                                                                 +--> event subscribers
//! ```
//!
//! JSON is kept as `serde_json::Value`. Generated types for the whole schema would refuse any value that a newer
//! QEMU adds to an enum, and the two dozen commands used here are typed where they are used.

mod client;
mod error;
mod frame;
mod message;
mod send;

pub use client::QmpClient;
pub use error::{CommandError, QmpError};
pub use message::{RawEvent, Timestamp};

#[cfg(test)]
mod tests;
