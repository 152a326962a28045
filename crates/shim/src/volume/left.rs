//! What a volume leaves behind on the host that it moved away from.
//!
//! ```text
//!  source, ended after a completed move     disk.img -> disk.img.dunlin-left-<volume>-<time of its last change>
//!  the same volume runs on this host again  that file goes, unless somebody has changed it
//! ```
//!
//! A file that is no longer the volume does not bear its name: nobody starts the old content by mistake, and a move back
//! makes a new file as on any other host. So no file is ever written over, and one that was not left by this very volume,
//! or was changed since, is never removed.
//!
//! A volume is known by the reservation of its disk, which goes along with the machine and ends with its container.

use std::fs::{self, Metadata, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use dunlin_wire::ids::ReservationId;

const MARK: &str = ".dunlin-left-";

/// Gives a volume's file, which is this host's own no more, the name that says so.
pub(crate) fn set_aside(file: &Path, volume: &ReservationId) -> io::Result<PathBuf> {
    let meta = file.symlink_metadata()?;
    if !meta.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no file any more"));
    }
    let aside = name(file, volume, modified(&meta));
    // Nobody else gives such a name; the look is for a clock that was set back.
    if aside.symlink_metadata().is_ok() {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    fs::rename(file, &aside)?;
    Ok(aside)
}

/// Removes what a volume left here earlier, now that it runs here again in `file`, which takes over its owner and mode.
/// Gives those that somebody has changed since, which stay.
pub(crate) fn clear(file: &Path, volume: &ReservationId) -> io::Result<Vec<PathBuf>> {
    let mut changed = Vec::new();
    for entry in fs::read_dir(file.parent().unwrap_or(Path::new("/")))? {
        let path = entry?.path();
        let Some(left) = time_in(&path, file, volume) else { continue };
        let meta = path.symlink_metadata()?;
        if !meta.is_file() || modified(&meta) != left {
            changed.push(path);
            continue;
        }
        std::os::unix::fs::chown(file, Some(meta.uid()), Some(meta.gid()))?;
        fs::set_permissions(file, Permissions::from_mode(meta.mode() & 0o7777))?;
        fs::remove_file(path)?;
    }
    changed.sort();
    Ok(changed)
}

/// Nanoseconds since the epoch, as far as a name is concerned.
fn modified(meta: &Metadata) -> i128 {
    i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec())
}

fn name(file: &Path, volume: &ReservationId, modified: i128) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(format!("{MARK}{volume}-{modified}"));
    name.into()
}

/// The time in the name that `volume` gave `file` here; None: another name.
fn time_in(path: &Path, file: &Path, volume: &ReservationId) -> Option<i128> {
    let time: i128 = path.to_str()?.rsplit_once(&format!("{MARK}{volume}-"))?.1.parse().ok()?;
    (name(file, volume, time) == path).then_some(time)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;

    fn volume(digit: char) -> ReservationId {
        ReservationId::new("00000000-0000-0000-0000-00000000000x".replace('x', &digit.to_string())).unwrap()
    }

    struct Host {
        at: tempfile::TempDir,
        image: PathBuf,
    }

    impl Host {
        fn new() -> Host {
            let at = tempfile::tempdir().unwrap();
            let image = at.path().join("disk.img");
            fs::write(&image, "first").unwrap();
            Host { at, image }
        }

        fn names(&self) -> Vec<String> {
            let entries = fs::read_dir(self.at.path()).unwrap();
            let mut names: Vec<String> =
                entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        }
    }

    #[test]
    fn what_is_left_says_so_and_goes_when_the_same_volume_is_back() {
        let host = Host::new();
        fs::set_permissions(&host.image, Permissions::from_mode(0o640)).unwrap();
        let aside = set_aside(&host.image, &volume('1')).unwrap();
        let said = aside.file_name().unwrap().to_str().unwrap().to_owned();
        assert!(said.starts_with("disk.img.dunlin-left-00000000-0000-0000-0000-000000000001-"), "{said}");
        assert!(!host.image.exists() && fs::read(&aside).unwrap() == b"first");
        // It is back, in a file that the shim made.
        fs::write(&host.image, "second").unwrap();
        fs::set_permissions(&host.image, Permissions::from_mode(0o600)).unwrap();
        assert_eq!(clear(&host.image, &volume('1')).unwrap(), Vec::<PathBuf>::new());
        assert_eq!(host.names(), ["disk.img"]);
        assert_eq!(fs::read(&host.image).unwrap(), b"second");
        assert_eq!(fs::metadata(&host.image).unwrap().mode() & 0o7777, 0o640, "as the host had it");
    }

    #[test]
    fn what_somebody_changed_or_another_volume_left_stays() {
        let host = Host::new();
        let mine = set_aside(&host.image, &volume('1')).unwrap();
        fs::write(&host.image, "second").unwrap();
        let anothers = set_aside(&host.image, &volume('2')).unwrap();
        fs::write(&host.image, "third").unwrap();
        let of_another_file = name(&host.at.path().join("other.img"), &volume('1'), 7);
        fs::write(&of_another_file, "x").unwrap();
        let later = SystemTime::now() + Duration::from_millis(5);
        fs::File::options().write(true).open(&mine).unwrap().set_modified(later).unwrap();
        assert_eq!(clear(&host.image, &volume('1')).unwrap(), std::slice::from_ref(&mine));
        for kept in [&mine, &anothers, &of_another_file] {
            assert!(kept.exists(), "{}", kept.display());
        }
        assert_eq!(fs::read(&host.image).unwrap(), b"third");
    }

    #[test]
    fn only_a_file_is_set_aside_and_never_over_another() {
        let host = Host::new();
        let link = host.at.path().join("link");
        std::os::unix::fs::symlink(&host.image, &link).unwrap();
        for no_file in [link.as_path(), host.at.path(), Path::new("/dev/null"), Path::new("/no/such")] {
            assert!(set_aside(no_file, &volume('1')).is_err(), "{}", no_file.display());
        }
        let there = name(&host.image, &volume('1'), modified(&fs::metadata(&host.image).unwrap()));
        fs::write(&there, "precious").unwrap();
        assert_eq!(set_aside(&host.image, &volume('1')).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(
            (fs::read(&there).unwrap(), fs::read(&host.image).unwrap()),
            (b"precious".into(), b"first".into())
        );
    }
}
