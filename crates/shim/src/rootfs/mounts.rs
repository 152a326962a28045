//! What containerd's snapshotters say about a root file system.

use std::path::PathBuf;

use containerd_shim_protos::api::Mount;

use super::RootfsError;

/// Where the erofs snapshotter keeps a layer, beside the directory on which it mounts it.
const EROFS_LAYER: &str = "layer.erofs";

/// One layer, as the snapshotter keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Layer {
    /// A tree of files, which becomes an image.
    Directory(PathBuf),
    /// An EROFS image, which is attached as it is.
    Image(PathBuf),
    /// A whole root file system, attached as it is, below the writable layer: the blockfile snapshotter's file.
    Ext4 {
        file: PathBuf,
        /// An active snapshot's. Else it is a committed one's, which others read.
        writable: bool,
    },
}

impl Layer {
    /// Of its image, as mount(2) names it.
    pub(crate) fn filesystem(&self) -> &'static str {
        match self {
            Layer::Directory(_) | Layer::Image(_) => "erofs",
            Layer::Ext4 { .. } => "ext4",
        }
    }
}

/// Reads the mounts. An overlay's upper directory is taken as one more layer when it has content,
/// as a snapshot that was written to before the container started has.
///
/// Topmost first; the writable layer is always ours.
pub(crate) fn layers(mounts: &[Mount]) -> Result<Vec<Layer>, RootfsError> {
    let [mount] = mounts else {
        return match mounts.last() {
            None => Err(RootfsError::None),
            Some(mount) => {
                Err(RootfsError::Kind { kind: format!("{} (one of {})", mount.type_, mounts.len()) })
            }
        };
    };
    match mount.type_.as_str() {
        "overlay" => {
            let option = |name: &str| {
                mount.options.iter().find_map(|option| option.strip_prefix(name)?.strip_prefix('='))
            };
            let lower = option("lowerdir").ok_or(RootfsError::NoLower)?;
            let mut layers: Vec<Layer> = lower.split(':').map(|path| lower_layer(path.into())).collect();
            if let Some(upper) = option("upperdir").map(PathBuf::from)
                && !is_empty(&upper)?
            {
                layers.insert(0, Layer::Directory(upper));
            }
            Ok(layers)
        }
        "bind" => Ok(vec![Layer::Directory(PathBuf::from(&mount.source))]),
        "erofs" => Ok(vec![Layer::Image(PathBuf::from(&mount.source))]),
        "ext4" => {
            let file = PathBuf::from(&mount.source);
            let meta = std::fs::metadata(&file);
            let meta = meta.map_err(|source| RootfsError::Layer { path: file.clone(), source })?;
            if !meta.is_file() {
                return Err(RootfsError::Device { path: file });
            }
            Ok(vec![Layer::Ext4 { file, writable: !mount.options.iter().any(|option| option == "ro") }])
        }
        "xfs" => Err(RootfsError::Xfs { path: PathBuf::from(&mount.source) }),
        kind => Err(RootfsError::Kind { kind: kind.to_owned() }),
    }
}

/// The erofs snapshotter mounts `<snapshot>/layer.erofs` on `<snapshot>/fs`.
fn lower_layer(directory: PathBuf) -> Layer {
    let image = directory.with_file_name(EROFS_LAYER);
    let theirs = directory.file_name().is_some_and(|name| name == "fs") && image.is_file();
    if theirs { Layer::Image(image) } else { Layer::Directory(directory) }
}

fn is_empty(directory: &PathBuf) -> Result<bool, RootfsError> {
    let mut entries = std::fs::read_dir(directory)
        .map_err(|source| RootfsError::Layer { path: directory.clone(), source })?;
    Ok(entries.next().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
        Mount {
            type_: kind.to_owned(),
            source: source.to_owned(),
            options: options.iter().map(|&o| o.to_owned()).collect(),
            ..Mount::default()
        }
    }

    #[test]
    fn overlay_layers_keep_their_order_and_an_empty_upper_is_left_out() {
        let upper = tempfile::tempdir().unwrap();
        let upper_option = format!("upperdir={}", upper.path().display());
        let overlay =
            [mount("overlay", "overlay", &["index=off", "workdir=/w", &upper_option, "lowerdir=/b:/a"])];
        assert_eq!(layers(&overlay).unwrap(), ["/b", "/a"].map(|path| Layer::Directory(path.into())));
        std::fs::write(upper.path().join("f"), "x").unwrap();
        assert_eq!(layers(&overlay).unwrap()[0], Layer::Directory(upper.path().into()));
    }

    #[test]
    fn a_bind_mount_is_one_layer() {
        let bind = [mount("bind", "/s/fs", &["rw", "rbind"])];
        assert_eq!(layers(&bind).unwrap(), [Layer::Directory("/s/fs".into())]);
    }

    #[test]
    fn the_erofs_snapshotters_images_are_taken_as_they_are() {
        let at = tempfile::tempdir().unwrap();
        let snapshot = |name: &str, image: bool| {
            let fs = at.path().join(name).join("fs");
            std::fs::create_dir_all(&fs).unwrap();
            if image {
                std::fs::write(fs.with_file_name("layer.erofs"), "x").unwrap();
            }
            fs
        };
        let (top, bottom) = (snapshot("2", true), snapshot("1", false));
        let lower = format!("lowerdir={}:{}", top.display(), bottom.display());
        let found = layers(&[mount("overlay", "overlay", &[&lower])]).unwrap();
        let image = at.path().join("2/layer.erofs");
        assert_eq!(found, [Layer::Image(image.clone()), Layer::Directory(bottom)]);
        let view = [mount("erofs", &image.display().to_string(), &["ro", "loop"])];
        assert_eq!(layers(&view).unwrap(), [Layer::Image(image)]);
    }

    #[test]
    fn a_whole_ext4_is_one_layer_when_it_is_a_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let source = file.path().display().to_string();
        for (option, writable) in [("rw", true), ("ro", false)] {
            let found = layers(&[mount("ext4", &source, &["loop", option])]).unwrap();
            assert_eq!(found, [Layer::Ext4 { file: file.path().into(), writable }]);
        }
        let device = layers(&[mount("ext4", "/dev/null", &["rw"])]).unwrap_err().to_string();
        assert!(device.contains("/dev/null") && device.contains("devmapper"), "{device}");
        let missing = layers(&[mount("ext4", "/no/such/snapshot", &["rw", "loop"])]).unwrap_err().to_string();
        assert!(missing.contains("/no/such/snapshot"), "{missing}");
    }

    #[test]
    fn other_mounts_are_refused_by_name() {
        let error = layers(&[mount("btrfs", "/dev/x", &[])]).unwrap_err().to_string();
        assert!(error.contains("btrfs") && error.contains("overlayfs"), "{error}");
        let error = layers(&[mount("xfs", "/b/1", &["rw", "loop"])]).unwrap_err().to_string();
        assert!(error.contains("/b/1") && error.contains("fs_type"), "{error}");
        assert!(matches!(layers(&[]), Err(RootfsError::None)));
        assert!(matches!(layers(&[mount("overlay", "", &["ro"])]), Err(RootfsError::NoLower)));
    }
}
