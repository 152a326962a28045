//! Between nodes.
//!
//! ```text
//!   source node                          destination node
//!   remote (client) --gRPC, mutual TLS--> service -> incoming -> session (one task a move)
//!   data::dial -------TCP, token--------> data::listen -> incoming --^
//! ```
//!
//! The caller is not trusted with paths: it sends ids, kinds and bytes; every path is made here
//! from this node's own configuration.

mod admit;
mod caller;
pub(crate) mod incoming;
pub(crate) mod leftover;
pub(crate) mod preflight;
pub(crate) mod remote;
pub(crate) mod service;
pub(crate) mod session;
pub(crate) mod tls;
