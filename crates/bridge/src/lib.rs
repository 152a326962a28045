//! The guest bridge: how a host asks a utility VM's guest to run containers, and how their stdio travels.
//!
//! ```text
//! host::Bridge --requests--> guest::Server --calls--> a Handler
//!              <--answers, exits--
//! stdio: one stream per stdin/stdout/stderr, resumable at any byte
//! ```
//!
//! Both ends outlive their connections: a connection is attached, breaks, and another one is attached; no
//! request runs twice and no answer is lost. Who runs containers, and what carries the streams, is not known here.

pub mod frame;
pub mod guest;
pub mod host;
pub mod hresult;
pub mod message;
pub mod stdio;

/// The port on the host that the guest dials for the bridge.
pub const BRIDGE_PORT: u32 = 0x4000_0000;
/// The first of the ports on the host for stdio streams; each stream takes the next one, none is used again.
pub const FIRST_STDIO_PORT: u32 = 0x4000_0001;
/// The port on the host that the guest dials for its log: lines of JSON.
pub const LOG_PORT: u32 = 109;
