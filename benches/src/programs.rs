//! Where the programs and the image under measurement are, and which build they are of.

use std::env;
use std::path::PathBuf;

use crate::BenchError;

/// What is measured.
#[derive(Debug, Clone)]
pub struct Programs {
    /// Directory of `dunlin` and `containerd-shim-dunlin-v2`.
    pub bin_dir: PathBuf,
    /// Directory of `vmlinuz` and `initramfs.cpio.lz4`.
    pub image_dir: PathBuf,
}

impl Programs {
    /// `$DUNLIN_BIN_DIR` and `$DUNLIN_IMAGE_DIR`, else `debug` and `image` of the target directory that this
    /// program was built in.
    ///
    /// # Errors
    /// [`BenchError::Missing`] names the first file that is not there.
    pub fn find() -> Result<Programs, BenchError> {
        let own = env::current_exe().map_err(BenchError::io("find this program"))?;
        // target/<profile>/deps/<program>
        let target = own.ancestors().nth(3).map_or_else(|| PathBuf::from("target"), PathBuf::from);
        let from = |name: &str, default: PathBuf| env::var_os(name).map_or(default, PathBuf::from);
        let programs = Programs {
            bin_dir: from("DUNLIN_BIN_DIR", target.join("debug")),
            image_dir: from("DUNLIN_IMAGE_DIR", target.join("image")),
        };
        for (path, remedy) in [
            (programs.bin_dir.join("dunlin"), "make build"),
            (programs.bin_dir.join("containerd-shim-dunlin-v2"), "make build"),
            (programs.kernel(), "make image"),
            (programs.initramfs(), "make image"),
        ] {
            if !path.is_file() {
                return Err(BenchError::Missing { path, remedy });
            }
        }
        Ok(programs)
    }

    /// The guest's kernel.
    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        self.image_dir.join("vmlinuz")
    }

    /// The guest's initramfs.
    #[must_use]
    pub fn initramfs(&self) -> PathBuf {
        self.image_dir.join("initramfs.cpio.lz4")
    }

    /// Whether these are built as they are shipped: limits hold for those alone.
    #[must_use]
    pub fn as_shipped(&self) -> bool {
        self.bin_dir.file_name().is_some_and(|name| name == "release")
    }

    /// Lines for the head of an output: profiles and paths.
    #[must_use]
    pub fn describe(&self) -> String {
        let profile = self.bin_dir.file_name().map_or_else(|| "?".into(), |name| name.to_string_lossy());
        let own = if cfg!(debug_assertions) { "debug" } else { "optimised" };
        format!(
            "programs  {} (profile {profile}); this program: {own}\nimage     {}",
            self.bin_dir.display(),
            self.image_dir.display()
        )
    }
}

/// Load average of the last minute and the number of processors: figures of a busy machine say little.
#[must_use]
pub fn load() -> String {
    let average = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let processors = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    format!("{} on {processors} processor(s)", average.split(' ').next().unwrap_or("?"))
}
