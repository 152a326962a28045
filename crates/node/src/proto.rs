//! Messages and stubs of `proto/node.proto`, generated, and what is read from them everywhere.

#![allow(missing_docs, unreachable_pub, dead_code, clippy::all, clippy::pedantic)]

tonic::include_proto!("dunlin.node.v1");

/// The number that both nodes of a move must share.
pub(crate) const PROTOCOL: u32 = 5;

impl SandboxFacts {
    /// The containers' ids, in their order.
    pub(crate) fn ids(&self) -> Vec<String> {
        self.containers.iter().map(|container| container.id.clone()).collect()
    }
}
