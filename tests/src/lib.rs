//! Drives a lab from outside through the built programs, as a user would, for the
//! end-to-end tests in `e2e/`.

mod bulk;
mod command;
mod container;
mod containerd;
mod counter;
pub mod cri;
mod exits;
mod lab;
mod machine;
pub mod network;
mod numbered;
mod oracle;
mod pods;
mod streams;
mod terminal;

pub use bulk::Bulk;
pub use command::Run;
pub use container::Container;
pub use containerd::{Background, Containerd, Ended, Stdio, Template};
pub use containerd_client::tonic::{Code, Status};
pub use counter::{Counted, count};
pub use cri::Pod;
pub use exits::{Announced, Answered, Exits};
pub use lab::{Host, Lab, Observer, Programs};
pub use machine::Traces;
pub use network::{Echo, PodNet};
pub use numbered::{Chatty, Checker, last_line, line};
pub use oracle::{Oracle, allocated, is_locked, scratch_image};
pub use pods::{Pods, Process, Work};
pub use streams::{Feeder, Reader};
pub use terminal::Terminal;
