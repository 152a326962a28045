//! The same virtual machine as the shim's, run and moved by hand: no shim, no node, no containerd.

mod disks;
mod machine;
mod movement;
mod station;

use std::path::{Path, PathBuf};

pub use machine::Machine;
pub use movement::{DOWNTIME_LIMIT, Moved, Network, move_machine};
pub use station::ADDRESS;

use crate::BenchError;
use crate::programs::Programs;

/// The size of a machine; by default the lab's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Virtual processors.
    pub vcpus: u32,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// The writable disk, MiB.
    pub scratch_mib: u64,
}

impl Default for Shape {
    fn default() -> Shape {
        Shape { vcpus: 1, memory_mib: 256, scratch_mib: 1024 }
    }
}

/// A directory for everything of the bare side; removed when dropped.
#[derive(Debug)]
pub struct Ground {
    dir: PathBuf,
    programs: Programs,
    shape: Shape,
}

impl Ground {
    /// Makes the directory and the layer image in it.
    ///
    /// # Errors
    /// The directory, busybox or mkfs.erofs.
    pub async fn new(dir: &Path, programs: &Programs, shape: Shape) -> Result<Ground, BenchError> {
        let made = std::fs::create_dir_all(dir);
        made.map_err(BenchError::io(format!("create {}", dir.display())))?;
        let ground = Ground { dir: dir.to_owned(), programs: programs.clone(), shape };
        disks::layer(&ground.layer(), &ground.dir.join("tree")).await?;
        Ok(ground)
    }

    fn layer(&self) -> PathBuf {
        self.dir.join("layer.erofs")
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.dir) {
            eprintln!("{} could not be removed: {error}", self.dir.display());
        }
        crate::lab::remove_empty(&self.dir);
    }
}
