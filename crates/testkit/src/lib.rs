//! Doubles that speak the real wire. For tests only; never shipped.

pub mod fake_guest;

pub use fake_guest::{FakeGuest, Finish, Script};
