//! Ties the rooms together: link, bridge, log, containers.

mod device;
mod handler;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dunlin_bridge::guest::Server;
use dunlin_bridge::message::{ContainerNotification, GuestCapabilities, NotificationType};
use dunlin_bridge::{BRIDGE_PORT, LOG_PORT};
use dunlin_link::LinkStatus;
use dunlin_link::guest::GuestLink;
use dunlin_net::Namespace;
use tokio::io::AsyncWriteExt;
use tokio::sync::{mpsc, watch};

use crate::container::{Containers, Ended, Ending};
use crate::init::cmdline::CommandLine;
use crate::log::Queue;
use crate::network::Networks;
use crate::oci::client::Client;
use crate::reaper::Reaper;
use crate::stdio::Dialer;
use crate::storage::share::{self, Shares};
use handler::GuestHandler;

/// Pause after a dial that failed or a connection that ended.
const REDIAL: Duration = Duration::from_millis(100);
/// Requests that wait for disks, mounts and container operations, each on a thread.
const BLOCKING_THREADS: usize = 32;
/// Threads that move bytes and answer requests.
const WORKERS: usize = 2;

/// Serves the host until it asks for the machine to be powered off.
pub fn run(command_line: &CommandLine, queue: Queue) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(BLOCKING_THREADS)
        .enable_all()
        .build()?;
    let reaper = Reaper::start()?;
    runtime.block_on(async {
        let link = GuestLink::spawn(device::find(command_line.link).await);
        let for_log = link.clone();
        keep_running("log", move || ship_log(for_log.clone(), queue.clone()));
        let client = Client::new(PathBuf::from("/proc/self/exe"), reaper.clone());
        let for_stdio = link.clone();
        let dialer = Dialer::new(move |port| {
            let link = for_stdio.clone();
            async move { link.dial(port).await }
        });
        let (ended, ended_queue) = mpsc::unbounded_channel();
        let (power_off, mut powered_off) = watch::channel(false);
        let shares = Shares::new(dialer.clone());
        let networks = Networks::new(Namespace::own().map_err(io::Error::other)?);
        let containers = Containers::new(reaper, client, dialer, networks.clone(), ended);
        let mut capabilities = GuestCapabilities::dunlin();
        capabilities.guest_defined_capabilities.plan9_supported = share::supported();
        if command_line.stock {
            capabilities.guest_defined_capabilities.dunlin_version = None;
        }
        let handler = GuestHandler::new(containers, shares, networks, power_off);
        let server = Server::with_capabilities(Arc::new(handler), capabilities);
        tokio::spawn(tell_ends(server.clone(), ended_queue));
        keep_running("bridge", move || serve_bridge(link.clone(), server.clone()));
        let _ = powered_off.wait_for(|asked| *asked).await;
        Ok(())
    })
}

/// Runs a task that never ends, again after each panic.
fn keep_running<F, T>(name: &'static str, make: F)
where
    F: Fn() -> T + Send + 'static,
    T: Future<Output = ()> + Send + 'static,
{
    tokio::spawn(async move {
        while let Err(error) = tokio::spawn(make()).await {
            tracing::error!(%error, "the {name} task is started again");
            tokio::time::sleep(REDIAL).await;
        }
    });
}

async fn serve_bridge(link: GuestLink, server: Server<GuestHandler>) {
    let mut status = link.status();
    loop {
        wait_until_up(&mut status).await;
        if let Ok(stream) = link.dial(BRIDGE_PORT).await {
            tracing::info!("bridge connected");
            match server.serve(stream).await {
                // Never below a warning: the host waits for a sign on the log's port.
                Ok(()) => tracing::warn!("bridge connection ended"),
                Err(error) => tracing::warn!(%error, "bridge connection lost"),
            }
        }
        tokio::time::sleep(REDIAL).await;
    }
}

async fn tell_ends(server: Server<GuestHandler>, mut queue: mpsc::UnboundedReceiver<Ended>) {
    while let Some(Ended { container, how }) = queue.recv().await {
        let kind = match how {
            Ending::Unexpected => NotificationType::UnexpectedExit,
            Ending::Graceful => NotificationType::GracefulExit,
            Ending::Forced => NotificationType::ForcedExit,
        };
        server.notify(&ContainerNotification::exit(container.as_str(), kind));
    }
}

/// Sends the log's lines. A line whose sending failed is sent again on the next connection.
async fn ship_log(link: GuestLink, queue: Queue) {
    let mut status = link.status();
    let mut unsent: Option<String> = None;
    loop {
        wait_until_up(&mut status).await;
        if let Ok(mut stream) = link.dial(LOG_PORT).await {
            queue.set_shipping(true);
            loop {
                let line = match unsent.take() {
                    Some(line) => line,
                    None => queue.next().await,
                };
                if stream.write_all(line.as_bytes()).await.is_err() || stream.flush().await.is_err() {
                    unsent = Some(line);
                    break;
                }
            }
            queue.set_shipping(false);
        }
        tokio::time::sleep(REDIAL).await;
    }
}

/// Ends once there is a session; waits for ever when the link is gone for good.
async fn wait_until_up(status: &mut watch::Receiver<LinkStatus>) {
    let gone = status.wait_for(|status| matches!(status, LinkStatus::Up { .. })).await.is_err();
    if gone {
        std::future::pending::<()>().await;
    }
}
