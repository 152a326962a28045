//! Network namespaces of a Linux host and the interfaces in them: what they are, and making them so.
//! Knows no pods, no machines and no hosts but this one.
//!
//! ```text
//! namespace   opening one, working inside it, a netlink connection into it
//! view        what its interfaces are
//! configure   giving an interface a name, MTU, addresses, routes, neighbours; moving it to another namespace
//! tap         an interface whose other end is a file descriptor
//! redirect    all that comes in on an interface goes out of a tap, and back
//! device      one interface's switches, at hand when there is no time
//! announce    telling the network where a station is now
//! tail        frames that came while nobody read them
//! ```
//!
//! A namespace belongs to a thread. Nothing here changes the caller's: what has to happen inside a namespace happens
//! on a thread that ends with the work.

pub mod announce;
pub mod configure;
pub mod device;
mod error;
mod interface;
pub mod namespace;
mod packet;
pub mod redirect;
pub mod tail;
pub mod tap;
pub mod view;

pub use announce::Announcer;
pub use configure::Wanted;
pub use device::Control;
pub use error::NetError;
pub use interface::{Interface, Neighbour, Route, mac_text, missing};
pub use namespace::{Namespace, NamespaceId};
pub use rtnetlink::Handle;
pub use tail::{Injector, Tail};
pub use tap::Tap;
