//! Real QEMU processes, no guest kernel: a firmware that finds nothing to boot, or a boot sector of a few bytes.
//!
//! Needs root (network namespaces, taps) and qemu-system-x86.

mod common;
mod lifecycle;
mod migration;
mod peers;
