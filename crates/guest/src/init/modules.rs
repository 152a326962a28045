//! Loads the kernel modules that the image brings, in the order that it gives.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use super::BootError;

const DIRECTORY: &str = "/lib/dunlin";

/// Loads every module of `modules.order`. One that is there already is no failure.
pub(super) fn load_all() -> Result<(), BootError> {
    let order = Path::new(DIRECTORY).join("modules.order");
    let text = fs::read_to_string(&order).map_err(BootError::at(format!("read {}", order.display())))?;
    for name in in_order(&text) {
        let path = Path::new(DIRECTORY).join(name);
        let step = || format!("load module {}", path.display());
        let file = File::open(&path).map_err(BootError::at(step()))?;
        match finit_module(&file) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
            // A driver whose device is not in this machine.
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
            Err(error) => return Err(BootError::at(step())(error)),
        }
    }
    Ok(())
}

/// File names, one a line; blank lines, comments and anything with a `/` are passed over.
fn in_order(text: &str) -> impl Iterator<Item = &str> {
    text.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#') && !line.contains('/'))
}

fn finit_module(file: &File) -> io::Result<()> {
    let parameters: &CStr = c"";
    // SAFETY: the descriptor and the string outlive the call; the kernel checks the module itself.
    let done = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), parameters.as_ptr(), 0) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_is_kept_and_paths_are_not_followed() {
        let text = "virtio_ring.ko\n\n# later\nvirtio.ko\n../evil.ko\n  sd_mod.ko  \n";
        let names: Vec<_> = in_order(text).collect();
        assert_eq!(names, ["virtio_ring.ko", "virtio.ko", "sd_mod.ko"]);
    }
}
