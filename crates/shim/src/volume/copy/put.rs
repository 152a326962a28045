//! From what was read of a source to what the guest shows.

use std::time::Duration;

use dunlin_bridge::message::{
    Base64, FileEntry, FileKind, FilePart, FilesAnswer, FilesList, FilesStep, STAGE_MAX,
};

use super::scan::{self, Scan};
use crate::vm::VmError;

/// Bytes a second that following a source takes of the link at most.
const PACE: u64 = 8 << 20;

/// A guest that files are put into.
pub(crate) trait Guest: Send + Sync + 'static {
    /// Whether it takes them. Known once the bridge is negotiated.
    fn takes_files(&self) -> bool;

    /// See [`dunlin_bridge::host::Bridge::files`].
    fn files(
        &self,
        place: &str,
        step: FilesStep,
    ) -> impl Future<Output = Result<FilesAnswer, VmError>> + Send;

    /// The machine has ended: nobody will answer.
    fn gone(&self) -> bool;
}

/// What stopped a put.
#[derive(Debug)]
pub(super) enum PutError {
    Guest(VmError),
    /// The source changed under it: to be read again.
    Changed,
    /// It was told to stop.
    Held,
}

/// Whether to hurry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Speed {
    /// A container waits for it.
    AtOnce,
    /// It runs, and so does everything else on the link.
    Paced,
}

/// Has the guest show what was read. `held`: asked before each message; once it is true no more are sent.
pub(super) async fn put<G: Guest>(
    guest: &G,
    place: &str,
    read: &Scan,
    speed: Speed,
    held: impl Fn() -> bool,
) -> Result<(), PutError> {
    let ask = async |step| {
        if held() {
            return Err(PutError::Held);
        }
        guest.files(place, step).await.map_err(PutError::Guest)
    };
    let list = || FilesList { entries: read.entries.clone() };
    let answer = ask(FilesStep::Compare(list())).await?;
    if answer.shown {
        return Ok(());
    }
    for number in answer.lacking {
        let entry = usize::try_from(number).ok().and_then(|number| read.entries.get(number));
        // A number that was not asked about would make the guest fail later; it is not trusted to be one.
        let Some((entry, size, digest)) = entry.and_then(file) else { continue };
        let (path, of) = (read.path(entry), digest.to_owned());
        let content = tokio::task::spawn_blocking(move || scan::content(&path, size, &of)).await;
        let Ok(Ok(Some(content))) = content else { return Err(PutError::Changed) };
        let mut offset = 0;
        loop {
            let end = content.len().min(offset + STAGE_MAX);
            let data = content[offset..end].to_vec();
            let sent = data.len() as u64;
            let part = FilePart { digest: digest.to_owned(), offset: offset as u64, data: Base64(data) };
            ask(FilesStep::Stage(part)).await?;
            if speed == Speed::Paced {
                tokio::time::sleep(Duration::from_micros(sent * 1_000_000 / PACE)).await;
            }
            offset = end;
            if offset == content.len() {
                break;
            }
        }
    }
    ask(FilesStep::Show(list())).await.map(drop)
}

fn file(entry: &FileEntry) -> Option<(&FileEntry, u64, &str)> {
    match &entry.kind {
        FileKind::File { size, digest } => Some((entry, *size, digest)),
        FileKind::Directory | FileKind::Link { .. } => None,
    }
}
