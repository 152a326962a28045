//! The server process: one ttrpc server on the inherited socket until the sandbox is done.

use std::os::fd::FromRawFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use thiserror::Error;
use ttrpc::r#async::Server;
use ttrpc::r#async::transport::Listener;

use super::args::Args;
use super::directory::StateDirectory;
use crate::config::Config;
use crate::sandbox::Sandbox;
use crate::service::events::Publisher;
use crate::service::{migration, sandbox as sandbox_service, task};

/// Where `start` leaves the listening socket.
pub(crate) const LISTENER_FD: i32 = 3;

/// The server cannot serve.
#[derive(Debug, Error)]
pub(crate) enum ServeError {
    #[error("descriptor {LISTENER_FD} is not the listening socket that `start` leaves: {0}")]
    Listener(std::io::Error),
    #[error("the ttrpc server failed: {0}")]
    Ttrpc(#[from] ttrpc::Error),
}

/// Serves until containerd's Shutdown finds the sandbox empty.
pub(crate) async fn serve(args: Args, config: Config) -> Result<(), ServeError> {
    let directory = StateDirectory::new(&config.state_dir, &args.namespace, &args.id);
    // SAFETY: `start` put the listener at this descriptor and nothing else in this process owns it.
    let listener = unsafe { UnixListener::from_raw_fd(LISTENER_FD) };
    // QEMU must not inherit it: the socket would look alive for as long as QEMU outlives a dead shim.
    nix::fcntl::fcntl(&listener, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))
        .map_err(|error| ServeError::Listener(error.into()))?;
    listener.set_nonblocking(true).map_err(ServeError::Listener)?;
    let listener = Listener::try_from(listener).map_err(ServeError::Listener)?;

    let publisher = Publisher::spawn(args.namespace.clone(), ttrpc_address(&args));
    let sandbox = Sandbox::new(args.namespace, args.id, config, directory, publisher);
    let mut server = Server::new()
        .add_listener(listener)
        .register_service(task::services(&sandbox))
        .register_service(sandbox_service::services(&sandbox))
        .register_service(migration::services(&sandbox));
    server.start().await?;
    tracing::info!(pid = std::process::id(), "serving");

    sandbox.finished().await;
    tracing::info!("shutting down");
    // The reply to Shutdown itself still has to leave.
    let _ = tokio::time::timeout(std::time::Duration::from_secs(2), server.shutdown()).await;
    Arc::clone(&sandbox).close().await;
    Ok(())
}

/// containerd's event socket: the variable that it sets, else its gRPC socket's neighbour.
fn ttrpc_address(args: &Args) -> String {
    std::env::var("TTRPC_ADDRESS").unwrap_or_else(|_| format!("{}.ttrpc", args.address))
}
