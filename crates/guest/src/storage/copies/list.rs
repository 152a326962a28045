//! Which lists of entries a copy takes. Nothing here touches a file.

use std::collections::HashMap;

use dunlin_bridge::message::{FileEntry, FileKind, FilesRoom};

const NAME_MAX: usize = 255;
const PATH_MAX: usize = 4096;

/// A list that a copy does not take.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ListError {
    /// There is no root, or it is no file or directory, or it is not alone where it must be.
    #[error("the first entry of a copy is its root, a directory or a single file; send the whole list")]
    Root,
    /// A path that leaves the copy, or names nothing.
    #[error("entry {0:?} is no plain path below the copy's root; send it relative, without `.` and `..`")]
    Path(String),
    /// An entry whose directory is not before it in the list.
    #[error("entry {0:?} comes without its directory; send each directory before what is in it")]
    NoDirectory(String),
    /// An entry twice.
    #[error("entry {0:?} stands twice in the list; send each path once")]
    Twice(String),
    /// Bits, a digest, a time or a link's target have a shape that no file has.
    #[error("entry {0:?} has a {1} that no file has; send what the host's file has")]
    Shape(String, &'static str),
    /// More than was made room for.
    #[error("the list has {0} entries with {1} bytes, the copy was made for {2} with {3}; make another copy")]
    Room(usize, u64, u32, u64),
}

/// Whether a copy with this room takes these entries.
pub fn check(entries: &[FileEntry], room: FilesRoom) -> Result<(), ListError> {
    let Some((root, rest)) = entries.split_first() else { return Err(ListError::Root) };
    let alone = match root.kind {
        FileKind::Directory => false,
        FileKind::File { .. } => true,
        FileKind::Link { .. } => return Err(ListError::Root),
    };
    if !root.path.is_empty() || alone && !rest.is_empty() {
        return Err(ListError::Root);
    }
    let mut directories = HashMap::from([("", true)]);
    let mut bytes = 0u64;
    for entry in entries {
        shape(entry)?;
        if let FileKind::File { size, .. } = entry.kind {
            bytes = bytes.saturating_add(size);
        }
    }
    for entry in rest {
        let path = entry.path.as_str();
        if !plain(path) {
            return Err(ListError::Path(shown(path)));
        }
        let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
        if directories.get(parent) != Some(&true) {
            return Err(ListError::NoDirectory(shown(path)));
        }
        if directories.insert(path, entry.kind == FileKind::Directory).is_some() {
            return Err(ListError::Twice(shown(path)));
        }
    }
    let fits = u32::try_from(entries.len()).is_ok_and(|count| count <= room.entries) && bytes <= room.bytes;
    if fits { Ok(()) } else { Err(ListError::Room(entries.len(), bytes, room.entries, room.bytes)) }
}

/// Whether a text is a SHA-256 as hosts write it, and thus also a file's name.
pub fn is_digest(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

fn shape(entry: &FileEntry) -> Result<(), ListError> {
    let wrong = |what| Err(ListError::Shape(shown(&entry.path), what));
    if entry.mode > 0o7777 {
        return wrong("mode");
    }
    if entry.mtime_nanos >= 1_000_000_000 {
        return wrong("time");
    }
    match &entry.kind {
        FileKind::Directory => Ok(()),
        FileKind::File { digest, .. } if is_digest(digest) => Ok(()),
        FileKind::File { .. } => wrong("digest"),
        FileKind::Link { target } => {
            let fits = !target.is_empty() && target.len() < PATH_MAX && !target.contains('\0');
            if fits { Ok(()) } else { wrong("target") }
        }
    }
}

fn plain(path: &str) -> bool {
    let part = |part: &str| !matches!(part, "" | "." | "..") && part.len() <= NAME_MAX;
    path.len() < PATH_MAX && !path.contains('\0') && path.split('/').all(part)
}

fn shown(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::{directory, file, link};
    use super::*;

    const ROOM: FilesRoom = FilesRoom { bytes: 10, entries: 4 };

    #[test]
    fn a_tree_and_a_single_file_are_taken() {
        check(&[directory(""), directory("a"), file("a/b", "x"), link("c", "/any/../where")], ROOM).unwrap();
        check(&[file("", "0123456789")], ROOM).unwrap();
    }

    #[test]
    fn nothing_leaves_its_place() {
        for path in ["/a", "../a", "a/../b", "a/", "a//b", ".", "./a", "a/.", "", "a\0b"] {
            let list = [directory(""), directory("a"), file(path, "x")];
            let error = check(&list, ROOM).unwrap_err();
            assert!(matches!(error, ListError::Path(_)), "{path:?}: {error}");
        }
        let long = "n".repeat(256);
        assert!(matches!(check(&[directory(""), file(&long, "")], ROOM), Err(ListError::Path(_))));
    }

    #[test]
    fn below_a_link_or_a_file_there_is_nothing() {
        for above in [link("a", "/etc"), file("a", "x")] {
            let list = [directory(""), above, file("a/passwd", "x")];
            assert_eq!(check(&list, ROOM).unwrap_err(), ListError::NoDirectory("a/passwd".into()));
        }
        let late = [directory(""), file("a/b", "x"), directory("a")];
        assert_eq!(check(&late, ROOM).unwrap_err(), ListError::NoDirectory("a/b".into()));
        let twice = [directory(""), link("a", "b"), directory("a")];
        assert_eq!(check(&twice, ROOM).unwrap_err(), ListError::Twice("a".into()));
    }

    #[test]
    fn the_root_is_first_and_no_link() {
        for list in
            [vec![], vec![link("", "/etc")], vec![file("a", "x")], vec![file("", "x"), file("a", "x")]]
        {
            assert_eq!(check(&list, ROOM).unwrap_err(), ListError::Root, "{list:?}");
        }
    }

    #[test]
    fn shapes_and_room() {
        let mut entry = file("", "x");
        entry.mode = 0o10_000;
        assert!(matches!(check(&[entry], ROOM), Err(ListError::Shape(_, "mode"))));
        let digest = FileKind::File { size: 1, digest: "../../etc/passwd".into() };
        assert!(matches!(
            check(&[FileEntry { kind: digest, ..file("", "") }], ROOM),
            Err(ListError::Shape(_, "digest"))
        ));
        assert!(matches!(check(&[file("", "01234567890")], ROOM), Err(ListError::Room(1, 11, 4, 10))));
        let many = [directory(""), file("a", ""), file("b", ""), file("c", ""), file("d", "")];
        assert!(matches!(check(&many, ROOM), Err(ListError::Room(5, 0, 4, 10))));
    }
}
