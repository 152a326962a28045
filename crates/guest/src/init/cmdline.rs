//! What the host says on the kernel command line.

use std::fs;

/// Channel to the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LinkChannel {
    /// The virtio-serial port `dunlin.link.0`.
    #[default]
    Serial,
    /// vsock, the guest listening on port 1024.
    Vsock,
}

/// The words of the command line that the guest knows; it ignores all others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommandLine {
    /// `dunlin.link=serial|vsock`.
    pub link: LinkChannel,
    /// `dunlin.extensions=none`: nothing is said of what other agents cannot do, streams that resume above all. To try what
    /// hosts and orchestrators make of such a guest.
    pub stock: bool,
}

impl CommandLine {
    /// Reads `/proc/cmdline`; unreadable is as good as empty.
    pub fn read() -> CommandLine {
        CommandLine::parse(&fs::read_to_string("/proc/cmdline").unwrap_or_default())
    }

    /// Parses a kernel command line. The last of repeated words counts.
    pub fn parse(text: &str) -> CommandLine {
        let mut line = CommandLine::default();
        for word in text.split_ascii_whitespace() {
            match word {
                "dunlin.link=vsock" => line.link = LinkChannel::Vsock,
                "dunlin.link=serial" => line.link = LinkChannel::Serial,
                "dunlin.extensions=none" => line.stock = true,
                _ => {}
            }
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extensions_are_told_unless_said_otherwise() {
        assert!(!CommandLine::parse("quiet dunlin.extensions=all").stock);
        assert!(CommandLine::parse("quiet dunlin.extensions=none\n").stock);
    }

    #[test]
    fn link_is_serial_unless_told() {
        assert_eq!(CommandLine::parse("quiet console=ttyS0").link, LinkChannel::Serial);
        assert_eq!(CommandLine::parse("quiet dunlin.link=vsock panic=-1\n").link, LinkChannel::Vsock);
        assert_eq!(CommandLine::parse("xdunlin.link=vsock").link, LinkChannel::Serial);
    }
}
