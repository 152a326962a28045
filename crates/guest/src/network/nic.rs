//! One NIC: finding it, putting it into a pod's namespace, taking it back.

use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use dunlin_net::view::{self, Link};
use dunlin_net::{Handle, Namespace, configure};

use super::adapter::Adapter;
use super::error::NetworkError;

/// The kernel puts the first number that is free in its place.
const ANY_NAME: &str = "eth%d";
/// Pause between two looks for a NIC: short at first, when it is about to come.
const LOOKS: [Duration; 2] = [Duration::from_millis(5), Duration::from_millis(20)];

/// A NIC that was found once.
#[derive(Debug)]
pub(super) struct Nic {
    pub(super) adapter: Adapter,
    pub(super) mac: [u8; 6],
    /// What it came with, bytes.
    pub(super) native_mtu: u32,
    /// Whether it is in its pod's namespace, configured.
    pub(super) placed: bool,
}

/// Waits for the NIC of this address to be in a namespace; it may only just be being plugged in.
pub(super) async fn wait_for(
    namespace: &Namespace,
    mac: [u8; 6],
    limit: Duration,
) -> Result<Link, NetworkError> {
    let handle = namespace.netlink()?;
    let begin = Instant::now();
    loop {
        if let Some(link) = view::find_by_mac(&handle, mac).await? {
            let waited = begin.elapsed();
            tracing::info!(name = %link.name, milliseconds = %waited.as_millis(), "NIC found");
            return Ok(link);
        }
        let waited = begin.elapsed();
        if waited > limit {
            return Err(NetworkError::Missing { mac, seconds: limit.as_secs() });
        }
        tokio::time::sleep(LOOKS[usize::from(waited > Duration::from_millis(500))]).await;
    }
}

impl Nic {
    /// Moves it from the guest's own namespace into its pod's, unless that is the same or it is there, and configures
    /// it. Another call goes on where one failed.
    pub(super) async fn place(&mut self, own: &Namespace, home: &Namespace) -> Result<(), NetworkError> {
        let handle = home.netlink()?;
        let link = match view::find_by_mac(&handle, self.mac).await? {
            Some(link) => link,
            None => self.fetch(own, home, &handle).await?,
        };
        self.configure(home, &handle, link).await?;
        self.placed = true;
        Ok(())
    }

    async fn fetch(&self, own: &Namespace, home: &Namespace, handle: &Handle) -> Result<Link, NetworkError> {
        let ours = own.netlink()?;
        let missing = || NetworkError::Missing { mac: self.mac, seconds: 0 };
        let link = view::find_by_mac(&ours, self.mac).await?.ok_or_else(missing)?;
        let name = self.adapter.name.as_deref().unwrap_or(ANY_NAME);
        configure::move_as(&ours, link.index, home, name).await?;
        view::find_by_mac(handle, self.mac).await?.ok_or_else(missing)
    }

    /// Gives it what its adapter says, where it is.
    pub(super) async fn reconfigure(&self, home: &Namespace) -> Result<(), NetworkError> {
        let handle = home.netlink()?;
        let missing = || NetworkError::Missing { mac: self.mac, seconds: 0 };
        let link = view::find_by_mac(&handle, self.mac).await?.ok_or_else(missing)?;
        self.configure(home, &handle, link).await
    }

    async fn configure(&self, home: &Namespace, handle: &Handle, link: Link) -> Result<(), NetworkError> {
        let Adapter { id, addresses, name, .. } = &self.adapter;
        if addresses.is_empty() {
            tracing::warn!(%id, name = %link.name, "the NIC has no IPConfigs and so no address: this guest asks no DHCP server");
        }
        let v6 = addresses.iter().any(|address| address.addr().is_ipv6());
        home.run(|| settle(&link.name, v6, !addresses.is_empty()))??;
        let wanted = self.adapter.wanted(name.clone(), self.native_mtu);
        configure::apply(handle, link.index, &wanted).await?;
        tracing::info!(%id, was = %link.name, ?wanted, "NIC configured");
        Ok(())
    }

    /// Moves it back from its pod's namespace into the guest's own, down and without addresses. One that is gone, or
    /// that was there all along, is only switched off.
    pub(super) async fn send_back(&mut self, own: &Namespace, home: &Namespace) -> Result<(), NetworkError> {
        self.placed = false;
        let handle = home.netlink()?;
        let Some(link) = view::find_by_mac(&handle, self.mac).await? else { return Ok(()) };
        if own.id() == home.id() {
            return Ok(configure::take_down(&handle, link.index).await?);
        }
        Ok(configure::move_as(&handle, link.index, own, ANY_NAME).await?)
    }
}

/// Sets how IPv6 behaves on an interface of the calling thread's namespace.
fn settle(name: &str, v6: bool, addressed: bool) -> Result<(), NetworkError> {
    let set = |key: &str, value: &str, needed: bool| {
        let path = Path::new("/proc/sys/net/ipv6/conf").join(name).join(key);
        match fs::write(&path, value) {
            // A kernel without IPv6.
            Err(source) if source.kind() == io::ErrorKind::NotFound && !needed => Ok(()),
            Err(source) => Err(NetworkError::Write { path, source }),
            Ok(()) => Ok(()),
        }
    };
    if v6 {
        set("disable_ipv6", "0", true)?;
    }
    // The interface that this NIC stands for has the same link-local address, and answers for it now and then.
    set("accept_dad", "0", v6)?;
    // What the host's network plugin gave is all that the pod shall have.
    set("accept_ra", if addressed { "0" } else { "1" }, false)
}
