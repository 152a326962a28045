//! Keeps the files that a guest can make grow from filling the host: its console, and QEMU's complaints about it.
//!
//! QEMU appends (`O_APPEND`), so a file that is cut to nothing under it simply begins anew.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval};

/// Largest a log becomes, give or take what is written between two looks.
const CAP: u64 = 8 << 20;
/// What is kept of a log that was cut, in `<name>.old`.
const KEPT: u64 = 1 << 20;
const LOOK: Duration = Duration::from_secs(1);

/// The task that looks after the logs; it ends with this.
#[derive(Debug)]
pub(crate) struct LogCap(JoinHandle<()>);

impl LogCap {
    pub(crate) fn on(logs: Vec<PathBuf>) -> LogCap {
        LogCap(tokio::spawn(async move {
            let mut looks = interval(LOOK);
            looks.set_missed_tick_behavior(MissedTickBehavior::Skip);
            loop {
                looks.tick().await;
                for log in &logs {
                    look_at(log).await;
                }
            }
        }))
    }
}

impl Drop for LogCap {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn look_at(log: &Path) {
    // Short logs are the rule: they cost one stat.
    if !tokio::fs::metadata(log).await.is_ok_and(|metadata| metadata.len() > CAP) {
        return;
    }
    let path = log.to_owned();
    let cut = tokio::task::spawn_blocking(move || cut(&path, KEPT)).await;
    match cut.map_err(io::Error::other).and_then(|result| result) {
        Ok(()) => {
            tracing::warn!(log = %log.display(), "a log grew beyond {CAP} bytes and was cut; its end is in `.old`")
        }
        Err(error) => tracing::error!(log = %log.display(), %error, "a log that is too large cannot be cut"),
    }
}

/// Keeps the last `kept` bytes beside the log and empties it.
fn cut(log: &Path, kept: u64) -> io::Result<()> {
    let mut file = File::options().read(true).write(true).open(log)?;
    let end = file.metadata()?.len();
    file.seek(SeekFrom::Start(end.saturating_sub(kept)))?;
    let mut tail = Vec::new();
    Read::by_ref(&mut file).take(kept).read_to_end(&mut tail)?;
    let mut old = log.as_os_str().to_owned();
    old.push(".old");
    // A full disk must not keep the log from being cut: that is what makes room.
    let saved = fs::write(old, tail);
    file.set_len(0)?;
    saved
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_cut_log_keeps_its_end_and_begins_anew_for_its_writer() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("console.log");
        let mut writer = File::options().create(true).append(true).open(&log).unwrap();
        writer.write_all(b"first line\nlast line\n").unwrap();
        cut(&log, 10).unwrap();
        assert_eq!(fs::read(directory.path().join("console.log.old")).unwrap(), b"last line\n");
        writer.write_all(b"next\n").unwrap();
        assert_eq!(fs::read(&log).unwrap(), b"next\n");
    }

    #[tokio::test]
    async fn only_a_log_beyond_the_cap_is_cut() {
        let directory = tempfile::tempdir().unwrap();
        let (large, small) = (directory.path().join("large"), directory.path().join("small"));
        File::create(&large).unwrap().set_len(CAP + 1).unwrap();
        File::create(&small).unwrap().set_len(CAP).unwrap();
        look_at(&large).await;
        look_at(&small).await;
        look_at(&directory.path().join("missing")).await;
        assert_eq!(fs::metadata(&large).unwrap().len(), 0);
        assert_eq!(fs::metadata(directory.path().join("large.old")).unwrap().len(), KEPT);
        assert_eq!(fs::metadata(&small).unwrap().len(), CAP);
    }
}
