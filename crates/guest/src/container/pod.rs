//! Mounts of a pod that its containers may bind: made with its sandbox, taken away with its sandbox.
//!
//! ```text
//! <sandbox's bundle>/sandboxMounts            shared      sandbox://x
//!                   /sandboxTmpfsMounts       tmpfs       sandbox-tmp://x
//!                   /sandboxTmpfsMounts/shm   tmpfs 1777  sandbox-tmp://shm, the pod's /dev/shm
//! ```

use std::fs;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::Value;

use super::error::ContainerError;

/// A pod's shared memory unless its annotation says otherwise, KiB: as much as CRI gives.
const SHM_KIB: u64 = 64 * 1024;
const SHM_ANNOTATION: &str = "io.microsoft.lcow.shm.size-kb";
const MOUNTS: &str = "sandboxMounts";
const TMPFS_MOUNTS: &str = "sandboxTmpfsMounts";

/// The mounts of a pod that is being created; they go again when it is dropped before [`PodMounts::keep`].
pub(super) struct PodMounts {
    dir: PathBuf,
    kept: bool,
}

impl PodMounts {
    /// Makes them below the sandbox's bundle.
    pub(super) fn make(dir: &Path, spec: &Value) -> Result<PodMounts, ContainerError> {
        let mounts = PodMounts { dir: dir.to_owned(), kept: false };
        let no_devices = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        let shared = create_dir(dir.join(MOUNTS))?;
        mount(Some(&shared), &shared, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .map_err(ContainerError::at("bind to itself", &shared))?;
        share(&shared)?;
        let tmpfs = create_dir(dir.join(TMPFS_MOUNTS))?;
        mount(Some("tmpfs"), &tmpfs, Some("tmpfs"), no_devices, Some("mode=0755"))
            .map_err(ContainerError::at("mount a tmpfs on", &tmpfs))?;
        share(&tmpfs)?;
        let shm = create_dir(tmpfs.join("shm"))?;
        let options = format!("mode=1777,size={}k", shm_kib(spec));
        mount(Some("shm"), &shm, Some("tmpfs"), no_devices | MsFlags::MS_NOEXEC, Some(options.as_str()))
            .map_err(ContainerError::at("mount shared memory on", &shm))?;
        Ok(mounts)
    }

    /// The pod exists: [`unmount`] takes them away with it.
    pub(super) fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for PodMounts {
    fn drop(&mut self) {
        if !self.kept
            && let Err(error) = unmount(&self.dir)
        {
            tracing::warn!(%error, "mounts of a pod that was not created stay");
        }
    }
}

/// Takes them away with all that is mounted below. A bundle that has none is done already.
pub(super) fn unmount(dir: &Path) -> Result<(), ContainerError> {
    for name in [TMPFS_MOUNTS, MOUNTS] {
        let target = dir.join(name);
        // Containers may have propagated mounts of their own into them.
        match umount2(&target, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH) {
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(errno) => return Err(ContainerError::at("unmount", target)(errno)),
        }
    }
    Ok(())
}

fn create_dir(path: PathBuf) -> Result<PathBuf, ContainerError> {
    fs::create_dir_all(&path).map_err(ContainerError::at("create the directory", &path))?;
    Ok(path)
}

fn share(path: &Path) -> Result<(), ContainerError> {
    mount(None::<&str>, path, None::<&str>, MsFlags::MS_SHARED | MsFlags::MS_REC, None::<&str>)
        .map_err(ContainerError::at("share the mounts below", path))
}

fn shm_kib(spec: &Value) -> u64 {
    let Some(text) = spec["annotations"][SHM_ANNOTATION].as_str() else { return SHM_KIB };
    match text.parse() {
        Ok(kib) if kib > 0 => kib,
        _ => {
            tracing::warn!(text, "{SHM_ANNOTATION} is no number of KiB; shared memory has the usual size");
            SHM_KIB
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn shared_memory_has_the_size_asked_for() {
        let of = |size: &str| shm_kib(&json!({"annotations": {SHM_ANNOTATION: size}}));
        assert_eq!((of("128"), of("0"), of("many")), (128, SHM_KIB, SHM_KIB));
        assert_eq!(shm_kib(&json!({})), 65536);
    }

    #[test]
    fn a_bundle_without_mounts_is_done() {
        let dir = tempfile::tempdir().unwrap();
        if nix::unistd::geteuid().is_root() {
            unmount(dir.path()).unwrap();
        }
    }
}
