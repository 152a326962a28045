//! Leaves the initramfs for a tmpfs, so that `pivot_root` works, and frees the initramfs' memory.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;

use nix::mount::{MsFlags, mount};
use nix::unistd::{chdir, chroot, execv};

use super::{BootError, SECOND_STAGE};

const NEW_ROOT: &str = "/newroot";
const PROGRAM: &str = "/sbin/dunlin-guest";

/// Ends in the second stage's exec.
pub(super) fn move_to_tmpfs() -> Result<Infallible, BootError> {
    let step = |what: &str| BootError::at(what.to_owned());
    fs::create_dir_all(NEW_ROOT).map_err(step("create the new root"))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("tmpfs"), NEW_ROOT, Some("tmpfs"), flags, Some("mode=0755"))
        .map_err(io::Error::from)
        .map_err(step("mount the new root"))?;
    for dir in ["dev", "proc", "sys", "sbin", "run", "tmp", "etc", "root"] {
        fs::create_dir_all(format!("{NEW_ROOT}/{dir}")).map_err(step("fill the new root"))?;
    }
    let program = format!("{NEW_ROOT}{PROGRAM}");
    fs::copy("/init", &program).map_err(step("copy the guest agent"))?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).map_err(step("copy the guest agent"))?;
    for dir in ["/dev", "/proc", "/sys"] {
        let target = format!("{NEW_ROOT}{dir}");
        mount(Some(dir), target.as_str(), None::<&str>, MsFlags::MS_MOVE, None::<&str>)
            .map_err(io::Error::from)
            .map_err(BootError::at(format!("move {dir}")))?;
    }
    // The initramfs stays mounted below for ever; emptied, it costs nothing.
    let _ = fs::remove_dir_all("/lib");
    let _ = fs::remove_file("/init");

    chdir(NEW_ROOT).map_err(io::Error::from).map_err(step("enter the new root"))?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .map_err(io::Error::from)
        .map_err(step("move the new root over /"))?;
    chroot(".").map_err(io::Error::from).map_err(step("chroot"))?;
    chdir("/").map_err(io::Error::from).map_err(step("chdir to /"))?;

    let arguments = [PROGRAM, SECOND_STAGE].map(|text| CString::new(text).unwrap_or_default());
    execv(&arguments[0], &arguments).map_err(io::Error::from).map_err(step("start the second stage"))
}
