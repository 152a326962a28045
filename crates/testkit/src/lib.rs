//! Doubles that speak the real wire. For tests only; never shipped.

pub mod fake_guest;
pub mod fake_qemu;

pub use fake_guest::{FakeGuest, Fault, Faults, Finish, Script};
pub use fake_qemu::FakeQemu;
