//! The migration protocol without input or output: two machines that are told what happened
//! and answer with what to do.
//!
//! ```text
//!   node (source host)                         shim (each host)
//!   ┌─────────────┐  calls of the Migration   ┌─────────┐  effects   ┌────┐
//!   │ coordinator │ ────── service ─────────> │ session │ ─────────> │ VM │
//!   └─────────────┘ <──── notifications ───── └─────────┘ <───────── └────┘
//!                                                        completions
//! ```
//!
//! [`session::Session`] is one shim's side of a move; [`coordinator::Coordinator`] is the whole
//! move, on the source's node. Both are `step(now, event) -> Effects`: no await, no clock, no
//! lock. The same code is tested by itself, simulated with losses and crashes, and run.
//!
//! Invariants held here, by the names that `tests/simulation.rs` gives them:
//! at_most_one_running_copy, at_least_one_copy_survives, every_wait_ends,
//! cancel_leaves_source_running.

pub mod coordinator;
pub mod notice;
pub mod refusal;
pub mod session;

mod effects;
mod moment;

pub use effects::Effects;
pub use moment::Moment;
