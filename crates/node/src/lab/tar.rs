//! Writes tar archives (POSIX ustar) that have the same bytes each time: every owner is
//! root and every time the epoch.

/// An archive under construction.
#[derive(Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
}

const BLOCK: usize = 512;

impl Archive {
    /// A directory with mode 0755.
    pub(crate) fn directory(&mut self, path: &str) {
        self.header(&format!("{path}/"), 0o755, 0, b'5', "");
    }

    /// A file.
    pub(crate) fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.header(path, mode, content.len(), b'0', "");
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    /// A symbolic link.
    pub(crate) fn symlink(&mut self, path: &str, target: &str) {
        self.header(path, 0o777, 0, b'2', target);
    }

    /// The finished archive.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.bytes.resize(self.bytes.len() + 2 * BLOCK, 0);
        self.bytes
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(BLOCK), 0);
    }

    fn header(&mut self, path: &str, mode: u32, size: usize, kind: u8, target: &str) {
        assert!(path.len() <= 100 && target.len() <= 100, "ustar names are at most 100 bytes");
        let mut header = [0_u8; BLOCK];
        let mut put = |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
        put(0, path);
        put(100, &format!("{mode:07o}"));
        put(108, "0000000");
        put(116, "0000000");
        put(124, &format!("{size:011o}"));
        put(136, "00000000000");
        put(148, "        ");
        put(157, target);
        put(257, "ustar");
        put(263, "00");
        put(265, "root");
        put(297, "root");
        header[156] = kind;
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.bytes.extend_from_slice(&header);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::Write,
        process::{Command, Stdio},
    };

    #[test]
    fn tar_reads_what_it_wrote() {
        let mut archive = Archive::default();
        archive.directory("bin");
        archive.file("bin/tool", 0o755, &[b'x'; 700]);
        archive.symlink("bin/sh", "tool");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % BLOCK, 0);
        let mut tar = Command::new("tar")
            .args(["--utc", "-tvf", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("tar is installed");
        tar.stdin.take().expect("piped").write_all(&bytes).expect("tar reads");
        let listing = String::from_utf8(tar.wait_with_output().expect("tar ends").stdout).expect("text");
        let lines: Vec<String> =
            listing.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        assert_eq!(
            lines,
            [
                "drwxr-xr-x root/root 0 1970-01-01 00:00 bin/",
                "-rwxr-xr-x root/root 700 1970-01-01 00:00 bin/tool",
                "lrwxrwxrwx root/root 0 1970-01-01 00:00 bin/sh -> tool",
            ]
        );
    }
}
