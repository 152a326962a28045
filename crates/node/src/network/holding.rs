//! Source: while the destination makes a pod's namespace, plugins there may tell the network that the pod's addresses
//! have come to them. The pod still runs here, so this is said again, many times, until they are done.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use dunlin_net::announce::{Announcer, frames};
use dunlin_net::{Namespace, NetError, view};
use tokio_util::task::AbortOnDropHandle;

use crate::proto::PodNetwork;

/// A client waits at least 200 ms before it sends again; within that it should have heard us.
const EVERY: Duration = Duration::from_millis(20);
/// Nobody makes a namespace for so long.
const AT_MOST: Duration = Duration::from_secs(120);

/// Announces until dropped.
pub(crate) type Holding = AbortOnDropHandle<()>;

/// Begins to announce the addresses of `pod` from its own interfaces.
pub(crate) async fn hold(pod: &PodNetwork) -> Result<Holding, NetError> {
    let namespace = Namespace::open(Path::new(&pod.namespace))?;
    let there = view::interfaces(&namespace.netlink()?).await?;
    let mut announcers = Vec::new();
    for interface in &pod.interfaces {
        let Some(found) = there.iter().find(|found| found.name == interface.name) else { continue };
        let addresses: Vec<IpAddr> = found.addresses.iter().map(|net| net.addr()).collect();
        let mac = parse_mac(&interface.mac).unwrap_or(found.mac);
        announcers.push((Announcer::open(&namespace, found.index)?, frames(mac, &addresses)));
    }
    Ok(AbortOnDropHandle::new(tokio::spawn(async move {
        let deadline = tokio::time::Instant::now() + AT_MOST;
        while tokio::time::Instant::now() < deadline {
            for (announcer, frames) in &announcers {
                if let Err(error) = announcer.send(frames) {
                    tracing::debug!(%error, "an announcement was not sent");
                }
            }
            tokio::time::sleep(EVERY).await;
        }
    })))
}

/// Six pairs of hexadecimal digits with `:` between.
fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let bytes: Option<Vec<u8>> = text.split(':').map(|pair| u8::from_str_radix(pair, 16).ok()).collect();
    bytes?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mac_is_six_bytes() {
        assert_eq!(parse_mac("02:00:00:0a:ff:10"), Some([2, 0, 0, 10, 255, 16]));
        assert!(
            ["", "02:00", "02:00:00:00:00:zz", "02:00:00:00:00:00:00"]
                .map(parse_mac)
                .iter()
                .all(Option::is_none)
        );
    }
}
