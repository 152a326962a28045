//! `start`: one server process a sandbox, its address on standard output.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, IntoRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use thiserror::Error;

use super::args::Args;
use super::bootstrap::Caller;
use super::directory::{DirectoryError, StateDirectory};
use super::join::{self, Join};
use super::server::LISTENER_FD;
use super::serving::serves;
use crate::config::Config;
use crate::sandbox::bundle;

/// No server was started.
#[derive(Debug, Error)]
pub(crate) enum StartError {
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    #[error("a shim for {namespace}/{id} is running already at {address}; delete that task first")]
    Running { namespace: String, id: String, address: String },
    #[error(
        "the container is to join sandbox {sandbox}, whose shim does not answer in {path}; start or import the sandbox first"
    )]
    NoSandbox { sandbox: String, path: PathBuf },
    #[error("the sandbox to join, {value:?}, is not an id; correct the container's annotations")]
    SandboxId { value: String },
    #[error("cannot listen on {path}: {source}")]
    Listen { path: PathBuf, source: std::io::Error },
    #[error("cannot write {path}: {source}")]
    Write { path: PathBuf, source: std::io::Error },
    #[error("cannot start the shim's server: {0}")]
    Spawn(std::io::Error),
}

/// Gives the address of the server for this container: that of the sandbox it joins,
/// or that of a new one.
pub(crate) fn start(args: &Args, caller: &Caller, config: &Config) -> Result<String, StartError> {
    // The working directory is the bundle; a node that prepares a destination has none, and a sandbox
    // made through the Sandbox API may have one without a spec.
    let annotations = bundle::annotations(std::path::Path::new(".")).unwrap_or_default();
    let address = match join::of(&annotations, &args.id) {
        Some(join) => existing(args, config, &join)?,
        None => spawn(args, caller, config)?,
    };
    // containerd reads it again when it restarts.
    write("address".into(), &address)?;
    Ok(address)
}

fn existing(args: &Args, config: &Config, join: &Join) -> Result<String, StartError> {
    let sandbox = &join.sandbox;
    if !join::is_id(sandbox) {
        return Err(StartError::SandboxId { value: sandbox.clone() });
    }
    let directory = StateDirectory::new(&config.state_dir, &args.namespace, sandbox);
    let address = join::live_address(&directory).ok_or_else(|| StartError::NoSandbox {
        sandbox: sandbox.clone(),
        path: directory.path().to_owned(),
    })?;
    if join.heads_pod {
        // The pod's containers will look for it under the pod's own name.
        let own = StateDirectory::new(&config.state_dir, &args.namespace, &args.id);
        own.create()?;
        write(own.address_file(), &address)?;
    }
    Ok(address)
}

fn spawn(args: &Args, caller: &Caller, config: &Config) -> Result<String, StartError> {
    let directory = StateDirectory::new(&config.state_dir, &args.namespace, &args.id);
    directory.create()?;
    let socket = directory.shim_socket();
    let address = format!("unix://{}", socket.display());
    if serves(&socket) {
        return Err(StartError::Running { namespace: args.namespace.clone(), id: args.id.clone(), address });
    }
    // Nobody serves there: it is what a dead shim left.
    let _ = std::fs::remove_file(&socket);
    let listener =
        UnixListener::bind(&socket).map_err(|source| StartError::Listen { path: socket.clone(), source })?;
    let log = open_log(directory.shim_log())?;
    let error_log = log.try_clone().map_err(StartError::Spawn)?;

    let mut command = Command::new(std::env::current_exe().map_err(StartError::Spawn)?);
    command
        .args(["-namespace", &args.namespace, "-id", &args.id, "-address", &args.address])
        .args(["-publish-binary", &args.publish_binary])
        .args(args.debug.then_some("-debug"))
        .arg("serve")
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(error_log)
        .process_group(0);
    if let Some(address) = &caller.ttrpc_address {
        command.env("TTRPC_ADDRESS", address);
    }
    let inherited = listener.as_raw_fd();
    // SAFETY: between fork and exec only dup2 and setsid run, both async-signal-safe;
    // `inherited` stays open in the parent until `spawn` returned.
    unsafe {
        command.pre_exec(move || {
            // Already a group leader of its own: a failing setsid loses nothing.
            libc::setsid();
            if libc::dup2(inherited, LISTENER_FD) < 0 {
                return Err(std::io::Error::last_os_error());
            }
            if inherited == LISTENER_FD {
                libc::fcntl(LISTENER_FD, libc::F_SETFD, 0);
            }
            Ok(())
        });
    }
    let child = command.spawn().map_err(StartError::Spawn)?;
    write(directory.pid_file(), &child.id().to_string())?;
    write(directory.address_file(), &address)?;
    // The server lives on without us; dropping `Child` neither waits nor kills.
    drop(child);
    let _ = listener.into_raw_fd();
    Ok(address)
}

fn open_log(path: PathBuf) -> Result<File, StartError> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&path)
        .map_err(|source| StartError::Write { path, source })
}

fn write(path: PathBuf, line: &str) -> Result<(), StartError> {
    std::fs::write(&path, line).map_err(|source| StartError::Write { path, source })
}
