//! One 9P session: the client's file ids and what is done with them.
//!
//! Requests are answered one after the other, so that a flush always finds its request done.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use nix::errno::Errno;

use super::files::{self, Node, Owner, qid};
use super::message::{self, HEADER, IO_OVERHEAD, Name, Qid, Reply, Request};
use crate::device::plan9::rules::{Config, Rules};

/// The dialect served.
const VERSION: &[u8] = b"9P2000.L";
/// Largest message taken, bytes.
pub(super) const MAX_MESSAGE: u32 = 128 * 1024;
/// Smallest message size that the protocol's answers fit into.
const MIN_MESSAGE: u32 = 4096;
/// Files that a client may hold at a time; each is a descriptor or two of this process.
const MAX_FIDS: usize = 4096;
/// P9_GETATTR_BASIC: everything up to the number of blocks.
const BASIC_ATTRIBUTES: u64 = 0x7ff;
const AT_REMOVEDIR: u32 = 0x200;
const LOCK_SUCCESS: u8 = 0;
const LOCK_UNLOCKED: u8 = 2;

/// What a file id stands for.
#[derive(Debug)]
struct Fid {
    node: Arc<Node>,
    open: Option<Opened>,
    /// Who attached: new files are theirs.
    uid: u32,
    /// It is the share's root itself.
    root: bool,
}

#[derive(Debug)]
enum Opened {
    File(File),
    Directory(File),
}

/// A client's session with one share.
#[derive(Debug)]
pub(super) struct Session {
    root: Arc<Node>,
    root_device: u64,
    name: String,
    rules: Rules,
    message_size: u32,
    max_fids: usize,
    fids: HashMap<u32, Fid>,
}

impl Session {
    /// A session that has not agreed on a version yet. `name`: what the client must attach to.
    pub(super) fn new(root: Arc<Node>, name: String, rules: Rules) -> Result<Session, Errno> {
        let root_device = root.stat()?.st_dev;
        let limit = usize::try_from(files::raise_descriptor_limit()).unwrap_or(MAX_FIDS);
        // The rest of the process needs descriptors too.
        let max_fids = MAX_FIDS.min(limit / 4);
        let fids = HashMap::new();
        Ok(Session { root, root_device, name, rules, message_size: MAX_MESSAGE, max_fids, fids })
    }

    /// Answers one frame, given without its size. None: it is no frame, and the session is to end.
    pub(super) fn answer(&mut self, frame: &[u8]) -> Option<Vec<u8>> {
        let (tag, request) = message::parse(frame)?;
        let answered = request.and_then(|(kind, request)| {
            let mut reply = Reply::to(kind, tag);
            self.serve(request, &mut reply).map(|()| reply.finish())
        });
        Some(answered.unwrap_or_else(|errno| Reply::error(tag, errno)))
    }

    fn serve(&mut self, request: Request<'_>, reply: &mut Reply) -> Result<(), Errno> {
        match request {
            Request::Version { msize, version } => self.version(msize, version, reply),
            Request::Attach { fid, name, uid } => self.attach(fid, name, uid, reply),
            Request::Flush => Ok(()),
            Request::Walk { fid, new_fid, names } => self.walk(fid, new_fid, &names, reply),
            Request::Open { fid, flags } => self.open(fid, flags.cast_signed(), reply),
            Request::Create { fid, name, flags, mode, gid } => {
                self.create(fid, name, flags.cast_signed(), mode, gid, reply)
            }
            Request::Read { fid, offset, count } => self.read(fid, offset, count, reply),
            Request::Write { fid, offset, data } => self.write(fid, offset, data, reply),
            Request::Clunk { fid } => self.fids.remove(&fid).map(drop).ok_or(Errno::EBADF),
            Request::Remove { fid } => {
                // The id goes in any case; removal by name is what Linux asks for first.
                self.fids.remove(&fid).ok_or(Errno::EBADF)?;
                Err(Errno::EOPNOTSUPP)
            }
            Request::StatFs { fid } => self.statfs(fid, reply),
            Request::Symlink { dir, name, target, gid } => {
                let (parent, owner) = self.parent(dir, gid)?;
                let made = parent.symlink(name, &message::path(target)?, owner)?;
                self.reply_qid(&made, reply)
            }
            Request::MakeNode { dir, name, mode, gid } => {
                let (parent, owner) = self.parent(dir, gid)?;
                let made = parent.make_node(name, mode, owner)?;
                self.reply_qid(&made, reply)
            }
            Request::MakeDir { dir, name, mode, gid } => {
                let (parent, owner) = self.parent(dir, gid)?;
                let made = parent.make_dir(name, mode, owner)?;
                self.reply_qid(&made, reply)
            }
            Request::ReadLink { fid } => {
                use std::os::unix::ffi::OsStrExt;
                reply.string(self.fid(fid)?.node.read_link()?.as_bytes());
                Ok(())
            }
            Request::GetAttributes { fid } => self.attributes(fid, reply),
            Request::SetAttributes { fid, change } => {
                self.writable()?;
                let fid = self.fid(fid)?;
                if fid.root && self.rules.get().allowed.is_some() {
                    return Err(Errno::EPERM);
                }
                fid.node.set(change)
            }
            Request::ReadDir { fid, offset, count } => self.read_dir(fid, offset, count, reply),
            Request::Sync { fid, data_only } => self.sync(fid, data_only),
            // Locks hold in the machine, whose kernel has granted them already; a share is one machine's.
            Request::Lock => {
                reply.u8(LOCK_SUCCESS);
                Ok(())
            }
            Request::GetLock { start, length, process, client } => {
                reply.u8(LOCK_UNLOCKED);
                reply.u64(start);
                reply.u64(length);
                reply.u32(process);
                reply.string(client);
                Ok(())
            }
            Request::Link { dir, fid, name } => {
                let (parent, _) = self.parent(dir, 0)?;
                parent.link(name, &self.fid(fid)?.node)
            }
            Request::RenameAt { from, name, to, new_name } => {
                let (from, _) = self.parent(from, 0)?;
                let (to, _) = self.parent(to, 0)?;
                from.rename(name, &to, new_name)
            }
            Request::UnlinkAt { dir, name, flags } => {
                let (parent, _) = self.parent(dir, 0)?;
                parent.unlink(name, flags & AT_REMOVEDIR != 0)
            }
            Request::AttributeWalk | Request::Other => Err(Errno::EOPNOTSUPP),
        }
    }

    fn version(&mut self, msize: u32, version: &[u8], reply: &mut Reply) -> Result<(), Errno> {
        self.fids.clear();
        if msize < MIN_MESSAGE {
            return Err(Errno::EINVAL);
        }
        self.message_size = msize.min(MAX_MESSAGE);
        reply.u32(self.message_size);
        reply.string(if version == VERSION { VERSION } else { b"unknown" });
        Ok(())
    }

    fn attach(&mut self, fid: u32, name: &[u8], uid: u32, reply: &mut Reply) -> Result<(), Errno> {
        if name != self.name.as_bytes() {
            return Err(Errno::ENOENT);
        }
        let root = self.root.clone();
        self.reply_qid(&root, reply)?;
        self.add(fid, Fid { node: root, open: None, uid, root: true })
    }

    fn walk(&mut self, fid: u32, new_fid: u32, names: &[Name<'_>], reply: &mut Reply) -> Result<(), Errno> {
        let from = self.fid(fid)?;
        let (uid, mut node, mut root) = (from.uid, from.node.clone(), from.root);
        let config = self.rules.get();
        let mut qids = Vec::with_capacity(names.len());
        for name in names {
            let next = if root && !config.shows(name.as_os_str()) {
                Err(Errno::ENOENT)
            } else {
                node.child(*name).and_then(|node| Ok((qid(&node.stat()?, self.root_device), node)))
            };
            match next {
                Ok((qid, child)) => {
                    qids.push(qid);
                    (node, root) = (Arc::new(child), false);
                }
                Err(errno) if qids.is_empty() => return Err(errno),
                // Fewer qids than names say where the walk ended; the new id is not set then.
                Err(_) => break,
            }
        }
        let whole = qids.len() == names.len();
        reply.u16(u16::try_from(qids.len()).unwrap_or(0));
        for qid in qids {
            reply.qid(qid);
        }
        if !whole {
            return Ok(());
        }
        if new_fid == fid {
            self.fids.insert(fid, Fid { node, open: None, uid, root });
            return Ok(());
        }
        self.add(new_fid, Fid { node, open: None, uid, root })
    }

    fn open(&mut self, fid: u32, flags: i32, reply: &mut Reply) -> Result<(), Errno> {
        if flags & libc::O_ACCMODE != libc::O_RDONLY || flags & libc::O_TRUNC != 0 {
            self.writable()?;
        }
        let node = self.fid(fid)?.node.clone();
        let stat = node.stat()?;
        let file = node.open(flags)?;
        let opened = match files::file_type(&stat) {
            nix::sys::stat::SFlag::S_IFDIR => Opened::Directory(file),
            _ => Opened::File(file),
        };
        reply.qid(qid(&stat, self.root_device));
        reply.u32(self.message_size - IO_OVERHEAD);
        self.fid_mut(fid)?.open = Some(opened);
        Ok(())
    }

    fn create(
        &mut self,
        fid: u32,
        name: Name<'_>,
        flags: i32,
        mode: u32,
        gid: u32,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let (parent, owner) = self.parent(fid, gid)?;
        let (node, file) = parent.create(name, flags, mode, owner)?;
        let stat = node.stat()?;
        reply.qid(qid(&stat, self.root_device));
        reply.u32(self.message_size - IO_OVERHEAD);
        let open = match files::file_type(&stat) {
            nix::sys::stat::SFlag::S_IFDIR => Opened::Directory(file),
            _ => Opened::File(file),
        };
        // The id of the directory becomes the new file's.
        self.fids.insert(fid, Fid { node: Arc::new(node), open: Some(open), uid: owner.uid, root: false });
        Ok(())
    }

    fn read(&self, fid: u32, offset: u64, count: u32, reply: &mut Reply) -> Result<(), Errno> {
        let Some(Opened::File(file)) = &self.fid(fid)?.open else { return Err(Errno::EBADF) };
        reply.data(self.room(count), |room| file.read_at(room, offset).map_err(|error| errno(&error)))
    }

    fn write(&self, fid: u32, offset: u64, data: &[u8], reply: &mut Reply) -> Result<(), Errno> {
        self.writable()?;
        let Some(Opened::File(file)) = &self.fid(fid)?.open else { return Err(Errno::EBADF) };
        let written = file.write_at(data, offset).map_err(|error| errno(&error))?;
        reply.u32(u32::try_from(written).unwrap_or(u32::MAX));
        Ok(())
    }

    fn read_dir(&self, fid: u32, offset: u64, count: u32, reply: &mut Reply) -> Result<(), Errno> {
        let fid = self.fid(fid)?;
        let Some(Opened::Directory(directory)) = &fid.open else { return Err(Errno::EBADF) };
        let config = self.rules.get();
        let visible = |name: &std::ffi::OsStr| !fid.root || name == "." || name == ".." || config.shows(name);
        let device = fid.node.stat()?.st_dev;
        let room = self.room(count);
        let mut list = Vec::with_capacity(room);
        let mut from = offset;
        // A batch of which nothing may be seen is not the directory's end.
        'batches: loop {
            let batch = files::read_dir(directory, from)?;
            if batch.is_empty() {
                break;
            }
            for entry in batch {
                from = entry.next;
                if !visible(&entry.name) {
                    continue;
                }
                if !append(&mut list, &entry, room, device, self.root_device) {
                    break 'batches;
                }
            }
            if !list.is_empty() {
                break;
            }
        }
        if list.is_empty() && room < 32 {
            return Err(Errno::EINVAL);
        }
        reply.u32(u32::try_from(list.len()).unwrap_or(0));
        reply.bytes(&list);
        Ok(())
    }

    fn sync(&self, fid: u32, data_only: bool) -> Result<(), Errno> {
        let done = match &self.fid(fid)?.open {
            Some(Opened::File(file) | Opened::Directory(file)) if data_only => file.sync_data(),
            Some(Opened::File(file) | Opened::Directory(file)) => file.sync_all(),
            None => return Err(Errno::EBADF),
        };
        done.map_err(|error| errno(&error))
    }

    fn statfs(&self, fid: u32, reply: &mut Reply) -> Result<(), Errno> {
        /// V9FS_MAGIC.
        const KIND: u32 = 0x0102_1997;
        const NAME_MAX: u32 = 255;
        let figures = self.fid(fid)?.node.statfs()?;
        reply.u32(KIND);
        reply.u32(u32::try_from(figures.block_size()).unwrap_or(MIN_MESSAGE));
        reply.u64(figures.blocks());
        reply.u64(figures.blocks_free());
        reply.u64(figures.blocks_available());
        reply.u64(figures.files());
        reply.u64(figures.files_free());
        reply.u64(self.root_device);
        reply.u32(NAME_MAX);
        Ok(())
    }

    fn attributes(&self, fid: u32, reply: &mut Reply) -> Result<(), Errno> {
        let stat = self.fid(fid)?.node.stat()?;
        reply.u64(BASIC_ATTRIBUTES);
        reply.qid(qid(&stat, self.root_device));
        for number in [stat.st_mode, stat.st_uid, stat.st_gid] {
            reply.u32(number);
        }
        reply.u64(stat.st_nlink);
        // No number of a host's device means anything in a guest.
        reply.u64(0);
        for number in [
            stat.st_size,
            stat.st_blksize,
            stat.st_blocks,
            stat.st_atime,
            stat.st_atime_nsec,
            stat.st_mtime,
            stat.st_mtime_nsec,
            stat.st_ctime,
            stat.st_ctime_nsec,
        ] {
            reply.u64(number.cast_unsigned());
        }
        // Birth time, generation, data version: not told.
        for _ in 0..4 {
            reply.u64(0);
        }
        Ok(())
    }

    /// A directory whose names are to change. Refused where the share is read-only, and at the root of a share that
    /// shows single files: those names are not the guest's to give or take.
    fn parent(&self, fid: u32, gid: u32) -> Result<(Arc<Node>, Owner), Errno> {
        self.writable()?;
        let fid = self.fid(fid)?;
        if fid.root && self.rules.get().allowed.is_some() {
            return Err(Errno::EPERM);
        }
        Ok((fid.node.clone(), Owner { uid: fid.uid, gid }))
    }

    fn writable(&self) -> Result<(), Errno> {
        let config: Arc<Config> = self.rules.get();
        if config.read_only { Err(Errno::EROFS) } else { Ok(()) }
    }

    fn fid(&self, fid: u32) -> Result<&Fid, Errno> {
        self.fids.get(&fid).ok_or(Errno::EBADF)
    }

    fn fid_mut(&mut self, fid: u32) -> Result<&mut Fid, Errno> {
        self.fids.get_mut(&fid).ok_or(Errno::EBADF)
    }

    fn add(&mut self, number: u32, fid: Fid) -> Result<(), Errno> {
        if self.fids.len() >= self.max_fids {
            return Err(Errno::EMFILE);
        }
        if self.fids.contains_key(&number) {
            return Err(Errno::EINVAL);
        }
        self.fids.insert(number, fid);
        Ok(())
    }

    fn reply_qid(&self, node: &Node, reply: &mut Reply) -> Result<(), Errno> {
        reply.qid(qid(&node.stat()?, self.root_device));
        Ok(())
    }

    /// Bytes of data that an answer may have.
    fn room(&self, count: u32) -> usize {
        let header = u32::try_from(HEADER).unwrap_or(u32::MAX) + 4;
        usize::try_from(count.min(self.message_size - header)).unwrap_or(0)
    }
}

/// Appends an entry if it fits. `device`: the directory's file system.
fn append(list: &mut Vec<u8>, entry: &files::Entry, room: usize, device: u64, root_device: u64) -> bool {
    use std::os::unix::ffi::OsStrExt;
    let name = entry.name.as_bytes();
    if list.len() + 13 + 8 + 1 + 2 + name.len() > room {
        return false;
    }
    let kind = match entry.kind {
        libc::DT_DIR => Qid::DIRECTORY,
        libc::DT_LNK => Qid::SYMLINK,
        _ => Qid::FILE,
    };
    let path = files::path_number(entry.inode, device, root_device);
    list.push(kind);
    list.extend(0u32.to_le_bytes());
    list.extend(path.to_le_bytes());
    list.extend(entry.next.to_le_bytes());
    list.push(entry.kind);
    list.extend(u16::try_from(name.len()).unwrap_or(0).to_le_bytes());
    list.extend(name);
    true
}

fn errno(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}
