//! 9P2000.L on the wire: `size[4] type[1] tag[2] body`, integers little-endian, strings with two
//! bytes of length before them.
//!
//! What a guest sends is untrusted: everything is bounds-checked, and a frame that says less or more than
//! its type has is refused.

use std::ffi::OsStr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use nix::errno::Errno;

/// `size[4] type[1] tag[2]`.
pub(super) const HEADER: usize = 7;
/// Bytes of an Rread or Rwrite beside the data, with room to spare.
pub(super) const IO_OVERHEAD: u32 = 24;
/// The answer to everything that failed.
const RLERROR: u8 = 7;
/// Names in one Twalk, by the protocol.
const MAX_WALK: usize = 16;
/// `NAME_MAX` of Linux.
const MAX_NAME: usize = 255;

/// A request, by type number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Request<'a> {
    Version {
        msize: u32,
        version: &'a [u8],
    },
    Attach {
        fid: u32,
        name: &'a [u8],
        uid: u32,
    },
    Flush,
    Walk {
        fid: u32,
        new_fid: u32,
        names: Vec<Name<'a>>,
    },
    Open {
        fid: u32,
        flags: u32,
    },
    Create {
        fid: u32,
        name: Name<'a>,
        flags: u32,
        mode: u32,
        gid: u32,
    },
    Read {
        fid: u32,
        offset: u64,
        count: u32,
    },
    Write {
        fid: u32,
        offset: u64,
        data: &'a [u8],
    },
    Clunk {
        fid: u32,
    },
    Remove {
        fid: u32,
    },
    StatFs {
        fid: u32,
    },
    Symlink {
        dir: u32,
        name: Name<'a>,
        target: &'a [u8],
        gid: u32,
    },
    MakeNode {
        dir: u32,
        name: Name<'a>,
        mode: u32,
        gid: u32,
    },
    ReadLink {
        fid: u32,
    },
    GetAttributes {
        fid: u32,
    },
    SetAttributes {
        fid: u32,
        change: Change,
    },
    AttributeWalk,
    ReadDir {
        fid: u32,
        offset: u64,
        count: u32,
    },
    Sync {
        fid: u32,
        data_only: bool,
    },
    Lock,
    GetLock {
        start: u64,
        length: u64,
        process: u32,
        client: &'a [u8],
    },
    Link {
        dir: u32,
        fid: u32,
        name: Name<'a>,
    },
    MakeDir {
        dir: u32,
        name: Name<'a>,
        mode: u32,
        gid: u32,
    },
    RenameAt {
        from: u32,
        name: Name<'a>,
        to: u32,
        new_name: Name<'a>,
    },
    UnlinkAt {
        dir: u32,
        name: Name<'a>,
        flags: u32,
    },
    /// A type that this server does not serve; the client falls back or reports it.
    Other,
}

/// One path component: not empty, not `.` or `..`, no `/`, no NUL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Name<'a>(&'a OsStr);

impl<'a> Name<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Result<Name<'a>, Errno> {
        match bytes {
            // The client resolves both by itself; a server that followed `..` could be led out of a share.
            b"" | b"." | b".." => Err(Errno::EINVAL),
            long if long.len() > MAX_NAME => Err(Errno::ENAMETOOLONG),
            odd if odd.iter().any(|byte| matches!(byte, b'/' | 0)) => Err(Errno::EINVAL),
            name => Ok(Name(OsStr::from_bytes(name))),
        }
    }

    pub(super) fn as_os_str(self) -> &'a OsStr {
        self.0
    }
}

/// Tsetattr: what is to change. None stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Change {
    pub(super) mode: Option<u32>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) size: Option<u64>,
    pub(super) accessed: Option<Time>,
    pub(super) modified: Option<Time>,
}

/// A file time to be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Time {
    /// The host's clock.
    Now,
    At {
        seconds: i64,
        nanos: i64,
    },
}

/// A request with the number of its type, or why its body is refused.
pub(super) type Parsed<'a> = Result<(u8, Request<'a>), Errno>;

/// Reads one frame without its size. The tag is given also when the body is refused.
pub(super) fn parse(frame: &[u8]) -> Option<(u16, Parsed<'_>)> {
    let mut body = Body(frame);
    let kind = body.u8().ok()?;
    let tag = body.u16().ok()?;
    let request = request(kind, &mut body);
    let request = match request {
        Ok(Request::Other) => Ok(Request::Other),
        Ok(_) if !body.0.is_empty() => Err(Errno::EINVAL),
        other => other,
    };
    Some((tag, request.map(|request| (kind, request))))
}

fn request<'a>(kind: u8, body: &mut Body<'a>) -> Result<Request<'a>, Errno> {
    Ok(match kind {
        8 => Request::StatFs { fid: body.u32()? },
        12 => Request::Open { fid: body.u32()?, flags: body.u32()? },
        14 => Request::Create {
            fid: body.u32()?,
            name: body.name()?,
            flags: body.u32()?,
            mode: body.u32()?,
            gid: body.u32()?,
        },
        16 => Request::Symlink {
            dir: body.u32()?,
            name: body.name()?,
            target: body.string()?,
            gid: body.u32()?,
        },
        18 => {
            let (dir, name, mode) = (body.u32()?, body.name()?, body.u32()?);
            let _device = (body.u32()?, body.u32()?);
            Request::MakeNode { dir, name, mode, gid: body.u32()? }
        }
        22 => Request::ReadLink { fid: body.u32()? },
        24 => {
            let fid = body.u32()?;
            let _mask = body.u64()?;
            Request::GetAttributes { fid }
        }
        26 => Request::SetAttributes { fid: body.u32()?, change: change(body)? },
        30 => {
            let _fids = (body.u32()?, body.u32()?);
            body.string()?;
            Request::AttributeWalk
        }
        40 => Request::ReadDir { fid: body.u32()?, offset: body.u64()?, count: body.u32()? },
        50 => {
            let fid = body.u32()?;
            // Old clients leave the flag out.
            let data_only = if body.0.is_empty() { false } else { body.u32()? != 0 };
            Request::Sync { fid, data_only }
        }
        52 => {
            let _lock = (body.u32()?, body.u8()?, body.u32()?, body.u64()?, body.u64()?, body.u32()?);
            body.string()?;
            Request::Lock
        }
        54 => {
            let _fid_and_kind = (body.u32()?, body.u8()?);
            Request::GetLock {
                start: body.u64()?,
                length: body.u64()?,
                process: body.u32()?,
                client: body.string()?,
            }
        }
        70 => Request::Link { dir: body.u32()?, fid: body.u32()?, name: body.name()? },
        72 => Request::MakeDir { dir: body.u32()?, name: body.name()?, mode: body.u32()?, gid: body.u32()? },
        74 => Request::RenameAt {
            from: body.u32()?,
            name: body.name()?,
            to: body.u32()?,
            new_name: body.name()?,
        },
        76 => Request::UnlinkAt { dir: body.u32()?, name: body.name()?, flags: body.u32()? },
        100 => Request::Version { msize: body.u32()?, version: body.string()? },
        104 => {
            let (fid, _auth) = (body.u32()?, body.u32()?);
            let _user = body.string()?;
            Request::Attach { fid, name: body.string()?, uid: body.u32()? }
        }
        108 => {
            body.u16()?;
            Request::Flush
        }
        110 => {
            let (fid, new_fid, count) = (body.u32()?, body.u32()?, usize::from(body.u16()?));
            if count > MAX_WALK {
                return Err(Errno::EINVAL);
            }
            Request::Walk { fid, new_fid, names: (0..count).map(|_| body.name()).collect::<Result<_, _>>()? }
        }
        116 => Request::Read { fid: body.u32()?, offset: body.u64()?, count: body.u32()? },
        118 => {
            let (fid, offset, count) = (body.u32()?, body.u64()?, body.u32()?);
            let data = body.take(usize::try_from(count).map_err(|_| Errno::EINVAL)?)?;
            Request::Write { fid, offset, data }
        }
        120 => Request::Clunk { fid: body.u32()? },
        122 => Request::Remove { fid: body.u32()? },
        _ => Request::Other,
    })
}

fn change(body: &mut Body<'_>) -> Result<Change, Errno> {
    let valid = body.u32()?;
    let has = |bit: u32| valid & bit != 0;
    let (mode, uid, gid, size) = (body.u32()?, body.u32()?, body.u32()?, body.u64()?);
    let mut time = |set: u32, at: u32| -> Result<Option<Time>, Errno> {
        let (seconds, nanos) = (body.u64()?.cast_signed(), body.u64()?.cast_signed());
        Ok(has(set).then_some(if has(at) { Time::At { seconds, nanos } } else { Time::Now }))
    };
    let (accessed, modified) = (time(0x10, 0x80)?, time(0x20, 0x100)?);
    Ok(Change {
        mode: has(1).then_some(mode),
        uid: has(2).then_some(uid),
        gid: has(4).then_some(gid),
        size: has(8).then_some(size),
        accessed,
        modified,
    })
}

struct Body<'a>(&'a [u8]);

impl<'a> Body<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], Errno> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(Errno::EINVAL)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Errno> {
        self.take(N)?.try_into().map_err(|_| Errno::EINVAL)
    }

    fn u8(&mut self) -> Result<u8, Errno> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn u16(&mut self) -> Result<u16, Errno> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, Errno> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Errno> {
        self.array().map(u64::from_le_bytes)
    }

    fn string(&mut self) -> Result<&'a [u8], Errno> {
        let length = self.u16()?;
        self.take(length.into())
    }

    fn name(&mut self) -> Result<Name<'a>, Errno> {
        Name::new(self.string()?)
    }
}

/// A file's identity for the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Qid {
    pub(super) kind: u8,
    pub(super) version: u32,
    pub(super) path: u64,
}

impl Qid {
    pub(super) const DIRECTORY: u8 = 0x80;
    pub(super) const SYMLINK: u8 = 0x02;
    pub(super) const FILE: u8 = 0;
}

/// An answer being written.
#[derive(Debug)]
pub(super) struct Reply(Vec<u8>);

impl Reply {
    /// The answer to a request of type `kind`.
    pub(super) fn to(kind: u8, tag: u16) -> Reply {
        let mut reply = Reply(vec![0; 4]);
        reply.u8(kind.wrapping_add(1));
        reply.u16(tag);
        reply
    }

    /// The whole frame that tells a failure.
    pub(super) fn error(tag: u16, errno: Errno) -> Vec<u8> {
        let mut reply = Reply::to(RLERROR - 1, tag);
        reply.u32((errno as i32).unsigned_abs());
        reply.finish()
    }

    /// The frame, its size filled in.
    pub(super) fn finish(mut self) -> Vec<u8> {
        // No answer is larger than a message size that fits 32 bits.
        let size = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        self.0[..4].copy_from_slice(&size.to_le_bytes());
        self.0
    }

    pub(super) fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    pub(super) fn u16(&mut self, value: u16) {
        self.0.extend(value.to_le_bytes());
    }

    pub(super) fn u32(&mut self, value: u32) {
        self.0.extend(value.to_le_bytes());
    }

    pub(super) fn u64(&mut self, value: u64) {
        self.0.extend(value.to_le_bytes());
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend(bytes);
    }

    /// Cut at the length that fits; file names and link targets are far below it.
    pub(super) fn string(&mut self, text: &[u8]) {
        let length = u16::try_from(text.len()).unwrap_or(u16::MAX);
        self.u16(length);
        self.bytes(&text[..length.into()]);
    }

    pub(super) fn qid(&mut self, qid: Qid) {
        self.u8(qid.kind);
        self.u32(qid.version);
        self.u64(qid.path);
    }

    /// `count[4]` and as much data as `fill` puts into the room for it.
    pub(super) fn data(
        &mut self,
        room: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<usize, Errno>,
    ) -> Result<(), Errno> {
        let begin = self.0.len();
        self.0.resize(begin + 4 + room, 0);
        let count = fill(&mut self.0[begin + 4..])?.min(room);
        self.0.truncate(begin + 4 + count);
        self.0[begin..begin + 4].copy_from_slice(&u32::try_from(count).unwrap_or(0).to_le_bytes());
        Ok(())
    }
}

/// A link's target as a path.
pub(super) fn path(bytes: &[u8]) -> Result<PathBuf, Errno> {
    if bytes.is_empty() || bytes.contains(&0) {
        return Err(Errno::EINVAL);
    }
    Ok(PathBuf::from(std::ffi::OsString::from_vec(bytes.to_vec())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_walk_is_read_and_its_names_are_checked() {
        let frame = |names: &[&[u8]]| {
            let mut frame = vec![110, 5, 0, 1, 0, 0, 0, 2, 0, 0, 0];
            frame.extend(u16::try_from(names.len()).unwrap().to_le_bytes());
            for name in names {
                frame.extend(u16::try_from(name.len()).unwrap().to_le_bytes());
                frame.extend(*name);
            }
            frame
        };
        let good = frame(&[b"a", b"b c"]);
        let (tag, request) = parse(&good).unwrap();
        let names = vec![Name::new(b"a").unwrap(), Name::new(b"b c").unwrap()];
        assert_eq!((tag, request), (5, Ok((110, Request::Walk { fid: 1, new_fid: 2, names }))));
        for bad in [&b".."[..], b".", b"", b"a/b", b"/etc", b"a\0b"] {
            assert_eq!(parse(&frame(&[bad])).unwrap().1, Err(Errno::EINVAL), "{bad:?}");
        }
        assert_eq!(parse(&frame(&[&[b'x'; 256]])).unwrap().1, Err(Errno::ENAMETOOLONG));
        let many = vec![&b"a"[..]; MAX_WALK + 1];
        assert_eq!(parse(&frame(&many)).unwrap().1, Err(Errno::EINVAL));
    }

    #[test]
    fn short_and_long_bodies_are_refused_and_their_tag_is_known() {
        let whole = [120u8, 9, 0, 7, 0, 0, 0];
        assert_eq!(parse(&whole).unwrap(), (9, Ok((120, Request::Clunk { fid: 7 }))));
        for length in 3..whole.len() {
            assert_eq!(parse(&whole[..length]).unwrap(), (9, Err(Errno::EINVAL)));
        }
        let mut long = whole.to_vec();
        long.push(0);
        assert_eq!(parse(&long).unwrap().1, Err(Errno::EINVAL));
        assert_eq!(parse(&whole[..2]), None);
        // A write that announces more than it brings.
        let write = [118u8, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255, 1];
        assert_eq!(parse(&write).unwrap().1, Err(Errno::EINVAL));
    }

    #[test]
    fn answers_have_their_size_first() {
        let mut reply = Reply::to(116, 3);
        reply
            .data(10, |room| {
                room[..2].copy_from_slice(b"hi");
                Ok(2)
            })
            .unwrap();
        assert_eq!(reply.finish(), [13, 0, 0, 0, 117, 3, 0, 2, 0, 0, 0, b'h', b'i']);
        assert_eq!(Reply::error(3, Errno::EROFS), [11, 0, 0, 0, 7, 3, 0, 30, 0, 0, 0]);
    }
}
