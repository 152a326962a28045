//! Files of the host that are put into the guest: Dunlin's own request, for guests of version 2.
//!
//! ```text
//! Make ──> Compare ──> Stage, Stage, … ──> Show ──> (Compare …) ──> Remove
//! ```
//!
//! What a host sends is always the whole list of what there shall be; the guest says what it lacks, takes that in chunks
//! where nobody sees it, and shows all of it at once.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{RequestBase, ResponseBase, is_false};

/// Entries that one copy may have: the list of a copy and the answer about it must fit their frames.
pub const ENTRIES_MAX: usize = 4096;
/// Most bytes of content in one Stage.
pub const STAGE_MAX: usize = 192 * 1024;
/// Most bytes of content in one answer to Read: encoded, it must fit a guest's frame.
pub const READ_MAX: usize = 32 * 1024;

/// The request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct FilesRequest {
    #[expect(missing_docs, reason = "the base of every request")]
    #[serde(flatten)]
    pub base: RequestBase,
    /// Which copy or directory: its path in the guest.
    pub place: String,
    /// What to do.
    pub step: FilesStep,
}

/// What to do with a copy, or with a directory of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FilesStep {
    /// Make an empty copy. One that is there stays as it is.
    Make(FilesRoom),
    /// Say what is lacking to show these entries.
    Compare(FilesList),
    /// Take a part of a file's content.
    Stage(FilePart),
    /// Be these entries, and no others.
    Show(FilesList),
    /// Give content of a copy that is a single file.
    Read(FileOffset),
    /// Make a directory that a pod's containers share. One that is there stays as it is.
    Directory(PodDirectory),
    /// Take it away. One that is not there is gone already.
    Remove,
}

/// What a copy may become at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct FilesRoom {
    /// Bytes of all contents.
    pub bytes: u64,
    /// Entries, at most [`ENTRIES_MAX`].
    pub entries: u32,
}

/// All that a copy is to hold.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct FilesList {
    /// The root first (its path is empty), each other one after its directory. A root that is a file is alone.
    pub entries: Vec<FileEntry>,
}

/// A file, directory or symbolic link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct FileEntry {
    /// Relative to the copy's root.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub path: String,
    /// What it is.
    pub kind: FileKind,
    /// Permission bits, 0 to 0o7777.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last change of content, seconds since 1970.
    pub mtime: i64,
    /// Nanoseconds within that second.
    #[serde(default)]
    pub mtime_nanos: u32,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileKind {
    /// A directory.
    Directory,
    /// A regular file.
    File {
        /// Bytes.
        size: u64,
        /// SHA-256 of the content, lower-case hex.
        digest: String,
    },
    /// A symbolic link.
    Link {
        /// Where it leads, as it was written.
        target: String,
    },
}

/// A part of a file's content. The first one has offset 0; each next begins where the last ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct FilePart {
    /// SHA-256 of the whole content, lower-case hex.
    pub digest: String,
    /// Bytes before this part.
    pub offset: u64,
    /// At most [`STAGE_MAX`] bytes.
    pub data: Base64,
}

/// Where to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct FileOffset {
    /// Bytes from the beginning.
    pub offset: u64,
}

/// A directory that a pod's containers share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct PodDirectory {
    /// Permission bits, 0 to 0o7777.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// In memory, of this size in bytes at most; 0: half of the machine's. None: where the path lies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct FilesResponse {
    #[expect(missing_docs, reason = "the base of every answer")]
    #[serde(flatten)]
    pub base: ResponseBase,
    /// What was asked for.
    #[serde(flatten)]
    pub answer: FilesAnswer,
}

/// What a guest answers beside success.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct FilesAnswer {
    /// To Compare: these entries, and no others, were shown last.
    #[serde(default, skip_serializing_if = "is_false")]
    pub shown: bool,
    /// To Compare: numbers of the entries whose content is to be staged; each content once.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lacking: Vec<u32>,
    /// To Read: at most [`READ_MAX`] bytes; none at the end.
    #[serde(default, skip_serializing_if = "Base64::is_empty")]
    pub data: Base64,
}

/// Bytes, base64 in JSON.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Base64(pub Vec<u8>);

impl Base64 {
    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Serialize for Base64 {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Base64 {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Base64, D::Error> {
        let text = String::deserialize(deserializer)?;
        STANDARD.decode(text).map(Base64).map_err(D::Error::custom)
    }
}
