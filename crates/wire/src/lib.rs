//! What Dunlin's programs say to one another: ids, saved-state payloads and their
//! envelope, compatibility data, socket hand-over, and the generated protobuf.
//!
//! No I/O here, and no policy: a value either has the shape it claims or is refused
//! with the name of the field that is wrong.

pub mod compat;
pub mod envelope;
pub mod handoff;
pub mod handover;
pub mod ids;
pub mod sandbox_state;
pub mod tree;

/// Messages and stubs generated from `proto/`; never edited.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)]
pub mod generated {
    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}

/// The `Images` service's messages.
pub use generated::images;
/// The `Images` service's ttrpc stubs.
pub use generated::images_ttrpc;
/// The `Migration` service's messages.
pub use generated::migration as service;
/// The `Migration` service's ttrpc stubs.
pub use generated::migration_ttrpc as service_ttrpc;
/// The saved-state messages.
pub use generated::saved;
/// A payload with its type URL, opened by [`envelope::open`].
pub use protobuf::well_known_types::any::Any;
