//! A container's root file system: read-only layers below, the scratch disk on top.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};

use super::StorageError;
use super::mounts::{remove_dir, unmount_all};
use crate::path::host_path;

/// Layers to combine, in the request's terms.
#[derive(Clone, Debug, Default)]
pub struct Layers {
    /// Where the root file system appears.
    pub root: String,
    /// Mounted layers, topmost first.
    pub layers: Vec<String>,
    /// Scratch directory; empty for a read-only root.
    pub scratch: String,
}

/// Composes the root file system. With a scratch directory that lies elsewhere, everything under
/// the bundle moves onto the scratch disk first.
pub fn add(request: &Layers) -> Result<(), StorageError> {
    let root = host_path(&request.root)?;
    let lower = lower_dirs(&request.layers)?;
    let scratch = match request.scratch.as_str() {
        "" => None,
        path => Some(host_path(path)?),
    };
    let mut data = format!("lowerdir={lower}");
    let mut flags = MsFlags::empty();
    match &scratch {
        Some(scratch) => {
            let upper = create_dir(&scratch.join("upper"))?;
            let work = create_dir(&scratch.join("work"))?;
            if let Some(bundle) = root.parent().filter(|bundle| !scratch.starts_with(bundle)) {
                bind_bundle(bundle, scratch)?;
            }
            data.push_str(&format!(",upperdir={},workdir={}", upper.display(), work.display()));
        }
        None => flags |= MsFlags::MS_RDONLY,
    }
    create_dir(&root)?;
    // Overlay wants at least two directories when nothing is writable.
    if scratch.is_none() && request.layers.len() == 1 {
        let bind = MsFlags::MS_BIND;
        mount(Some(lower.as_str()), &root, None::<&str>, bind, None::<&str>)
            .map_err(StorageError::at("bind the layer to", &root))?;
        return mount(
            None::<&str>,
            &root,
            None::<&str>,
            bind | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY,
            None::<&str>,
        )
        .map_err(StorageError::at("make read-only", &root));
    }
    mount(Some("overlay"), &root, Some("overlay"), flags, Some(data.as_str()))
        .map_err(StorageError::at("mount the layers on", &root))
}

/// Unmounts the root file system and deletes its directory. The bundle's bind stays until the
/// state of the container that is `bundle_in_use` is deleted; that of a container that was never created
/// goes at once, or the scratch disk would stay in use.
pub fn remove(request: &Layers, bundle_in_use: impl FnOnce(&Path) -> bool) -> Result<(), StorageError> {
    let root = host_path(&request.root)?;
    unmount_all(&root)?;
    remove_dir(&root)?;
    match root.parent() {
        Some(bundle) if !bundle_in_use(bundle) => unmount_all(bundle),
        _ => Ok(()),
    }
}

fn lower_dirs(layers: &[String]) -> Result<String, StorageError> {
    if layers.is_empty() {
        return Err(StorageError::Unsupported("a root file system without layers"));
    }
    let mut dirs = Vec::with_capacity(layers.len());
    for layer in layers {
        let dir = host_path(layer)?;
        // Both separate words in overlay's options.
        if layer.contains([':', ',']) {
            return Err(StorageError::Unsupported("a layer path with `:` or `,`"));
        }
        dirs.push(dir.to_string_lossy().into_owned());
    }
    Ok(dirs.join(":"))
}

fn bind_bundle(bundle: &Path, scratch: &Path) -> Result<(), StorageError> {
    let source = create_dir(&scratch.join("bundle"))?;
    create_dir(bundle)?;
    mount(Some(&source), bundle, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .map_err(StorageError::at("bind the scratch disk to", bundle))
}

/// Creates a directory and its parents, 0755.
pub(super) fn create_dir(path: &Path) -> Result<PathBuf, StorageError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path)
        .map_err(StorageError::at("create the directory", path))?;
    Ok(path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_keep_their_order_and_stay_in_bounds() {
        let lower = |paths: &[&str]| lower_dirs(&paths.iter().map(|p| (*p).to_owned()).collect::<Vec<_>>());
        assert_eq!(
            lower(&["/run/mounts/scsi/0_1_0", "/run/mounts/scsi/0_0_0"]).unwrap(),
            "/run/mounts/scsi/0_1_0:/run/mounts/scsi/0_0_0"
        );
        assert!(lower(&[]).is_err());
        assert!(lower(&["/etc"]).is_err());
        assert!(lower(&["/run/mounts/a:b"]).is_err());
        assert!(lower(&["/run/mounts/a,upperdir=/run/mounts/b"]).is_err());
    }

    #[test]
    fn scratch_and_root_must_be_in_bounds() {
        let request = Layers {
            root: "/run/gcs/pods/a/a/rootfs".into(),
            layers: vec!["/run/mounts/l".into()],
            scratch: "/tmp/x".into(),
        };
        assert!(matches!(add(&request), Err(StorageError::Path(_))));
        let request = Layers { root: "/".into(), ..request };
        assert!(matches!(add(&request), Err(StorageError::Path(_))));
    }
}
