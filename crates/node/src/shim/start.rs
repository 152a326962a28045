//! Starts a shim for an arriving sandbox with the command line that containerd itself uses.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::process::Command;

use super::ShimHome;
use crate::config::NodeConfig;

/// `start` forks a server and leaves.
const START: Duration = Duration::from_secs(15);
/// After it left, what it wrote is in the pipe; a server that keeps the pipe open is not waited for.
const DRAIN: Duration = Duration::from_millis(500);
/// Bytes kept of each output.
const OUTPUT: u64 = 16 * 1024;

/// Why no shim was started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    /// One serves this sandbox already.
    #[error(
        "a shim for sandbox `{sandbox}` runs already ({address}); delete its containers, or `dunlin cancel` the move that brought it"
    )]
    Running {
        /// The sandbox.
        sandbox: String,
        /// Where it listens.
        address: String,
    },
    /// The directory that it is started in.
    #[error("cannot make {path}: {reason}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// The system's words.
        reason: std::io::Error,
    },
    /// The binary could not be run.
    #[error("cannot run {binary}: {reason}; set `shim` in the node's configuration to the shim's path")]
    Spawn {
        /// The binary.
        binary: PathBuf,
        /// The system's words.
        reason: std::io::Error,
    },
    /// It ran and failed.
    #[error("{binary} start failed ({status}): {output}")]
    Failed {
        /// The binary.
        binary: PathBuf,
        /// Its exit status, or what else went wrong.
        status: String,
        /// What it said.
        output: String,
    },
}

/// Starts a shim that will serve `home` and waits until it has said where it listens.
pub(crate) async fn start(config: &NodeConfig, home: &ShimHome, cwd: &Path) -> Result<(), StartError> {
    if let Some(address) = home.address() {
        let path = address.strip_prefix("unix://").unwrap_or(&address);
        if tokio::net::UnixStream::connect(path).await.is_ok() {
            return Err(StartError::Running { sandbox: home.sandbox().into(), address });
        }
        // Left by a shim that died: it would lead containerd to nobody.
        home.forget();
    }
    tokio::fs::create_dir_all(cwd)
        .await
        .map_err(|reason| StartError::Directory { path: cwd.to_owned(), reason })?;
    let binary = config.shim.clone();
    let mut command = Command::new(&binary);
    command
        .arg("-namespace")
        .arg(home.namespace())
        .arg("-address")
        .arg(&config.containerd)
        .arg("-publish-binary")
        .arg(&config.publish_binary)
        .arg("-id")
        .arg(home.sandbox())
        .arg("start")
        .current_dir(cwd)
        .env("TTRPC_ADDRESS", format!("{}.ttrpc", config.containerd.display()))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    if let Some(shim_config) = &config.shim_config {
        command.env("DUNLIN_CONFIG", shim_config);
    }
    let failed =
        |status: String, output: String| StartError::Failed { binary: binary.clone(), status, output };
    let mut child = command.spawn().map_err(|reason| StartError::Spawn { binary: binary.clone(), reason })?;
    let stdout = child.stdout.take().map(|pipe| tokio::spawn(read_some(pipe)));
    let stderr = child.stderr.take().map(|pipe| tokio::spawn(read_some(pipe)));
    let status = match tokio::time::timeout(START, child.wait()).await {
        Ok(Ok(status)) => status,
        Ok(Err(error)) => return Err(failed(error.to_string(), String::new())),
        Err(_) => return Err(failed(format!("no end within {} s", START.as_secs()), String::new())),
    };
    let (stdout, stderr) = (drained(stdout).await, drained(stderr).await);
    if !status.success() {
        let said = if stderr.is_empty() { stdout } else { stderr };
        return Err(failed(status.to_string(), said));
    }
    if home.address().is_none() {
        let reason = format!("it wrote no address into {} (it said: {stdout})", home.path().display());
        return Err(failed(reason, stderr));
    }
    Ok(())
}

async fn read_some(pipe: impl tokio::io::AsyncRead + Unpin) -> String {
    let mut bytes = Vec::new();
    let _ = pipe.take(OUTPUT).read_to_end(&mut bytes).await;
    String::from_utf8_lossy(&bytes).trim().to_owned()
}

async fn drained(reader: Option<tokio::task::JoinHandle<String>>) -> String {
    let Some(mut reader) = reader else { return String::new() };
    match tokio::time::timeout(DRAIN, &mut reader).await {
        Ok(text) => text.unwrap_or_default(),
        Err(_) => {
            reader.abort();
            String::new()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    struct Place(PathBuf);
    impl Place {
        fn new(name: &str) -> Place {
            let path = std::env::temp_dir().join(format!("dunlin-node-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&path).unwrap();
            Place(path)
        }
        fn config(&self, script: &str) -> NodeConfig {
            let (text, shim) = (self.0.join("shim.txt"), self.0.join("shim"));
            std::fs::write(&text, format!("#!/bin/sh\n{script}\n")).unwrap();
            // Copied by another process: a fork of this one, made while the file is open for
            // writing, would make it "text file busy".
            assert!(std::process::Command::new("cp").arg(&text).arg(&shim).status().unwrap().success());
            std::fs::set_permissions(&shim, std::fs::Permissions::from_mode(0o755)).unwrap();
            let text = format!(
                "name=\"a\"\nlisten=\"127.0.0.1:1\"\ndata_listen=\"127.0.0.1:2\"\nshim={shim:?}\nstate_dir={:?}",
                self.0.join("state")
            );
            NodeConfig::parse(Path::new("t"), &text).unwrap()
        }
        fn home(&self) -> ShimHome {
            ShimHome::new(&self.0.join("state"), "ns", "s1")
        }
    }
    impl Drop for Place {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[tokio::test]
    async fn the_shim_gets_containerds_own_command_line() {
        let place = Place::new("start");
        let script = format!(
            "mkdir -p {0}/state/ns/s1; echo \"$@\" \"$TTRPC_ADDRESS\" > {0}/said; pwd >> {0}/said; echo unix:///x > {0}/state/ns/s1/address",
            place.0.display()
        );
        let cwd = place.0.join("cwd");
        start(&place.config(&script), &place.home(), &cwd).await.unwrap();
        let said = std::fs::read_to_string(place.0.join("said")).unwrap();
        assert_eq!(
            said,
            format!(
                "-namespace ns -address /run/containerd/containerd.sock -publish-binary containerd -id s1 start \
                 /run/containerd/containerd.sock.ttrpc\n{}\n",
                cwd.display()
            )
        );
    }

    #[tokio::test]
    async fn a_shim_that_fails_is_quoted() {
        let place = Place::new("fails");
        let error =
            start(&place.config("echo no kernel >&2; exit 3"), &place.home(), &place.0).await.unwrap_err();
        assert!(error.to_string().contains("no kernel"), "{error}");
        assert!(error.to_string().contains("exit status: 3"), "{error}");
    }

    #[tokio::test]
    async fn a_shim_without_an_address_is_a_failure() {
        let place = Place::new("silent");
        let error = start(&place.config("exit 0"), &place.home(), &place.0).await.unwrap_err();
        assert!(error.to_string().contains("wrote no address"), "{error}");
    }

    #[tokio::test]
    async fn a_missing_binary_names_the_setting() {
        let place = Place::new("missing");
        let mut config = place.config("exit 0");
        config.shim = "/nonexistent/shim".into();
        let error = start(&config, &place.home(), &place.0).await.unwrap_err();
        assert!(error.to_string().contains("set `shim`"), "{error}");
    }
}
