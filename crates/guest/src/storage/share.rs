//! Directories of the host, mounted over 9P.
//!
//! ```text
//! container ── kernel's 9P client ── socketpair ── relay ── link stream ── the host's server
//! ```
//!
//! The kernel speaks 9P over a descriptor, and the link is no descriptor: PID 1 carries the bytes between the two. When
//! the stream breaks, the share's files answer with an input/output error until the share is removed; PID 1 goes on.

use std::collections::HashMap;
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use tokio::task::JoinHandle;

use super::StorageError;
use super::mounts::{remove_dir, unmount_all};
use crate::path::host_path;
use crate::stdio::Dialer;

/// How long the host's server may take for its part of a mount or an unmount.
const SERVER_DEADLINE: Duration = Duration::from_secs(20);
/// Largest 9P message, bytes.
const MESSAGE_SIZE: u32 = 65_536;

/// A directory that the host wants mounted, in the request's terms.
#[derive(Clone, Debug, Default)]
pub struct ShareMount {
    /// Where.
    pub mount_path: String,
    /// The port of the host's server.
    pub port: i32,
    /// The server's name for the share.
    pub share_name: String,
    /// Mount read-only.
    pub read_only: bool,
}

/// The mounted shares. Clones are handles.
#[derive(Clone)]
pub struct Shares {
    dialer: Dialer,
    relays: Arc<Mutex<HashMap<PathBuf, JoinHandle<()>>>>,
}

/// Whether this guest's kernel has a 9P client.
pub fn supported() -> bool {
    fs::read_to_string("/proc/filesystems").is_ok_and(|list| lists_9p(&list))
}

fn lists_9p(filesystems: &str) -> bool {
    filesystems.lines().any(|line| line.split_whitespace().next_back() == Some("9p"))
}

impl Shares {
    /// No shares; servers are reached through the dialler.
    pub fn new(dialer: Dialer) -> Shares {
        Shares { dialer, relays: Arc::default() }
    }

    /// Dials the share's server and mounts the share.
    pub async fn add(&self, request: &ShareMount) -> Result<(), StorageError> {
        let target = host_path(&request.mount_path)?;
        let port = u32::try_from(request.port).map_err(|_| StorageError::BadPort(request.port))?;
        check_name(&request.share_name)?;
        if !supported() {
            return Err(StorageError::No9p);
        }
        if self.relays().contains_key(&target) {
            return Err(StorageError::ShareMounted(target));
        }
        let mut stream =
            self.dialer.dial(port).await.map_err(|source| StorageError::ShareServer { port, source })?;
        let pair = UnixStream::pair().and_then(|(kernel, ours)| {
            ours.set_nonblocking(true)?;
            Ok((kernel, tokio::net::UnixStream::from_std(ours)?))
        });
        let (kernel, mut ours) = pair.map_err(StorageError::at("make a socket pair for", &target))?;
        let relay = tokio::spawn(async move {
            if let Err(error) = tokio::io::copy_bidirectional(&mut stream, &mut ours).await {
                tracing::info!(port, %error, "a share's stream broke");
            }
        });
        let (asked, at) = (request.clone(), target.clone());
        let mut mounting = tokio::task::spawn_blocking(move || mount_share(&asked, &at, kernel));
        let mounted = match tokio::time::timeout(SERVER_DEADLINE, &mut mounting).await {
            Ok(mounted) => mounted,
            Err(_) => {
                // Without its stream the kernel gives up.
                relay.abort();
                mounting.await
            }
        };
        match mounted {
            Ok(Ok(())) => {
                self.relays().insert(target, relay);
                Ok(())
            }
            Ok(Err(error)) => {
                relay.abort();
                Err(error)
            }
            Err(_) => {
                relay.abort();
                Err(StorageError::Unsupported("a share whose mounting panicked"))
            }
        }
    }

    /// Unmounts the share and deletes its directory. Gone already is done already.
    pub async fn remove(&self, mount_path: &str) -> Result<(), StorageError> {
        let target = host_path(mount_path)?;
        let relay = self.relays().remove(&target);
        let at = target.clone();
        let mut unmounting =
            tokio::task::spawn_blocking(move || unmount_all(&at).and_then(|()| remove_dir(&at)));
        let unmounted = match tokio::time::timeout(SERVER_DEADLINE, &mut unmounting).await {
            Ok(unmounted) => unmounted,
            Err(_) => {
                // A server that does not answer must not hold the unmount up.
                if let Some(relay) = &relay {
                    relay.abort();
                }
                unmounting.await
            }
        };
        match unmounted {
            Ok(Ok(())) => {
                if let Some(relay) = relay {
                    relay.abort();
                }
                Ok(())
            }
            Ok(Err(error)) => {
                // Still in use: it goes on working, and can be removed later.
                if let Some(relay) = relay {
                    self.relays().insert(target, relay);
                }
                Err(error)
            }
            Err(_) => Err(StorageError::Unsupported("a share whose unmounting panicked")),
        }
    }

    fn relays(&self) -> MutexGuard<'_, HashMap<PathBuf, JoinHandle<()>>> {
        self.relays.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Names go into a list of mount options, so nothing may end one.
fn check_name(name: &str) -> Result<(), StorageError> {
    let fits = (1..=64).contains(&name.len())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c));
    if fits { Ok(()) } else { Err(StorageError::BadShareName(name.to_owned())) }
}

/// Blocks until the server has answered.
fn mount_share(request: &ShareMount, target: &Path, kernel: UnixStream) -> Result<(), StorageError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(target)
        .map_err(StorageError::at("create the directory", target))?;
    let flags = MsFlags::MS_NODEV | if request.read_only { MsFlags::MS_RDONLY } else { MsFlags::empty() };
    let data = options(&request.share_name, kernel.as_raw_fd());
    mount(Some("dunlin"), target, Some("9p"), flags, Some(data.as_str())).map_err(|errno| {
        let _ = fs::remove_dir(target);
        StorageError::at("mount the share on", target)(errno)
    })
}

/// `cache=mmap` keeps nothing but what is mapped, so that the host's changes are seen at once, and
/// lets programs map files for writing, which no caching at all does not.
fn options(name: &str, fd: i32) -> String {
    format!("trans=fd,rfdno={fd},wfdno={fd},msize={MESSAGE_SIZE},version=9p2000.L,cache=mmap,aname={name}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares() -> Shares {
        Shares::new(Dialer::new(|_| async {
            Err::<tokio::io::DuplexStream, _>(std::io::ErrorKind::ConnectionRefused.into())
        }))
    }

    #[tokio::test]
    async fn requests_are_checked_before_the_host_is_dialled() {
        let shares = shares();
        let ask = async |change: fn(&mut ShareMount)| {
            let mut request = ShareMount {
                mount_path: "/run/mounts/plan9/0".into(),
                share_name: "0".into(),
                ..ShareMount::default()
            };
            change(&mut request);
            shares.add(&request).await.unwrap_err()
        };
        assert!(matches!(ask(|r| r.mount_path = "/etc".into()).await, StorageError::Path(_)));
        assert!(matches!(ask(|r| r.port = -1).await, StorageError::BadPort(-1)));
        for name in ["", "0,trans=virtio", "a b", "a/b"] {
            assert!(matches!(check_name(name).unwrap_err(), StorageError::BadShareName(_)), "{name:?}");
        }
        assert!(matches!(shares.remove("/run/mounts/..").await.unwrap_err(), StorageError::Path(_)));
        shares.remove("/run/mounts/plan9/none").await.unwrap();
    }

    #[test]
    fn the_client_is_known_by_its_file_system() {
        assert!(lists_9p("nodev\tsysfs\n\text4\nnodev\t9p\n"));
        assert!(!lists_9p("nodev\tsysfs\n\text4\nnodev\t9pfoo\n"));
    }
}
