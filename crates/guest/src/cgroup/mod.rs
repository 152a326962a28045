//! Control groups (version 2) of pods and containers: `/pods/<pod>/<container>`.

pub mod limits;
pub mod stats;
pub mod tree;

/// Mount point of the hierarchy.
pub const ROOT: &str = "/sys/fs/cgroup";
