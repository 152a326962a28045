//! Resolves a user's name against the container's own `/etc/passwd` and `/etc/group`.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::Path;

use serde_json::{Value, json};

/// Largest passwd or group file that is read, in bytes.
const FILE_BOUND: u64 = 1 << 20;

/// A user's name led nowhere.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum UserError {
    /// No such user, and the name is no number either.
    #[error("user {0:?} is not in the container's /etc/passwd; use a name or a number that is")]
    NoUser(String),
    /// No such group, and the name is no number either.
    #[error("group {0:?} is not in the container's /etc/group; use a name or a number that is")]
    NoGroup(String),
}

/// Replaces `username` in an OCI user by `uid`, `gid` and `additionalGids`. `name` may be
/// `user`, `uid`, `user:group` or any mixture. A user without `username` stays as it is.
pub fn resolve(user: &mut Value, root: &Path) -> Result<(), UserError> {
    let Some(name) = user["username"].as_str().filter(|name| !name.is_empty()).map(str::to_owned) else {
        return Ok(());
    };
    let passwd = read_in(root, "etc/passwd").unwrap_or_default();
    let group = read_in(root, "etc/group").unwrap_or_default();
    let found = lookup(&name, &passwd, &group)?;
    let kept = user["additionalGids"].as_array().cloned().unwrap_or_default();
    let mut more: Vec<u64> =
        kept.iter().filter_map(Value::as_u64).chain(found.groups.iter().map(|gid| u64::from(*gid))).collect();
    more.sort_unstable();
    more.dedup();
    let umask = user["umask"].clone();
    *user = json!({"uid": found.uid, "gid": found.gid, "additionalGids": more});
    if !umask.is_null() {
        user["umask"] = umask;
    }
    Ok(())
}

#[derive(Debug, PartialEq, Eq)]
struct Found {
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
}

fn lookup(name: &str, passwd: &str, group: &str) -> Result<Found, UserError> {
    let (user, wanted_group) = match name.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (name, None),
    };
    let number: Option<u32> = user.parse().ok();
    let line = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|fields| {
        fields.len() >= 4 && (fields[0] == user || (number.is_some() && fields[2].parse().ok() == number))
    });
    let (uid, primary, login) = match &line {
        Some(fields) => (
            fields[2].parse().map_err(|_| UserError::NoUser(user.to_owned()))?,
            fields[3].parse().unwrap_or(0),
            Some(fields[0]),
        ),
        None => (number.ok_or_else(|| UserError::NoUser(user.to_owned()))?, 0, None),
    };
    let groups =
        || group.lines().map(|line| line.split(':').collect::<Vec<_>>()).filter(|fields| fields.len() >= 3);
    let gid = match wanted_group {
        None => primary,
        Some(wanted) => groups()
            .find(|fields| fields[0] == wanted)
            .and_then(|fields| fields[2].parse().ok())
            .or_else(|| wanted.parse().ok())
            .ok_or_else(|| UserError::NoGroup(wanted.to_owned()))?,
    };
    let member_of = |fields: &Vec<&str>| {
        fields.get(3).is_some_and(|members| members.split(',').any(|member| Some(member) == login))
    };
    // A group that was asked for explicitly is the only one.
    let mut more: Vec<u32> = match wanted_group {
        Some(_) => Vec::new(),
        None => groups().filter(member_of).filter_map(|fields| fields[2].parse().ok()).collect(),
    };
    more.retain(|other| *other != gid);
    Ok(Found { uid, gid, groups: more })
}

/// Reads a file below `root`, resolving symbolic links as the container would: never out of it.
fn read_in(root: &Path, relative: &str) -> io::Result<String> {
    let root = File::open(root)?;
    let path = CString::new(relative)?;
    // SAFETY: open_how is plain data, for which zero is a valid value everywhere.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = u64::from((libc::O_RDONLY | libc::O_CLOEXEC | libc::O_NONBLOCK).unsigned_abs());
    how.resolve = libc::RESOLVE_IN_ROOT;
    // SAFETY: the descriptor, the path and `how` outlive the call, and the size is that of `how`.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_openat2,
            root.as_raw_fd(),
            path.as_ptr(),
            &raw const how,
            size_of::<libc::open_how>(),
        )
    };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the kernel has just opened this descriptor for us.
    let file = unsafe { File::from_raw_fd(fd) };
    if !file.metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut bytes = Vec::new();
    file.take(FILE_BOUND).read_to_end(&mut bytes)?;
    // A comment in another encoding, or one that the bound cuts, is nobody's name.
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34:web:/srv:/bin/sh\nbad:x\n";
    const GROUP: &str = "root:x:0:\nwww:x:34:\nlogs:x:50:web,other\ntape:x:51:other\n";

    #[test]
    fn names_numbers_and_groups() {
        let of = |name| lookup(name, PASSWD, GROUP);
        assert_eq!(of("web"), Ok(Found { uid: 33, gid: 34, groups: vec![50] }));
        assert_eq!(of("33"), Ok(Found { uid: 33, gid: 34, groups: vec![50] }));
        assert_eq!(of("web:tape"), Ok(Found { uid: 33, gid: 51, groups: vec![] }));
        assert_eq!(of("1000:1001"), Ok(Found { uid: 1000, gid: 1001, groups: vec![] }));
        assert_eq!(of("1000"), Ok(Found { uid: 1000, gid: 0, groups: vec![] }));
        assert_eq!(of("nobody"), Err(UserError::NoUser("nobody".into())));
        assert_eq!(of("web:nobody"), Err(UserError::NoGroup("nobody".into())));
    }

    #[test]
    fn lines_in_another_encoding_hide_nobody() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        let passwd =
            [b"jose:x:7:8:Jos\xe9:/:/bin/sh\n".as_slice(), b"\xff\xfe:x:9:9::/:\n", PASSWD.as_bytes()];
        fs::write(root.path().join("etc/passwd"), passwd.concat()).unwrap();
        fs::write(root.path().join("etc/group"), [b"\xe9quipe:x:60:web\n", GROUP.as_bytes()].concat())
            .unwrap();
        for (name, uid, groups) in [("jose", 7, json!([])), ("web", 33, json!([50, 60]))] {
            let mut user = json!({"username": name});
            resolve(&mut user, root.path()).unwrap();
            assert_eq!((&user["uid"], &user["additionalGids"]), (&json!(uid), &groups), "{name}");
        }
    }

    #[test]
    fn links_do_not_lead_out_of_the_container() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("real")).unwrap();
        fs::write(root.path().join("real/passwd"), PASSWD).unwrap();
        symlink("/real", root.path().join("etc")).unwrap();
        let mut user = json!({"username": "web", "umask": 18});
        resolve(&mut user, root.path()).unwrap();
        assert_eq!(user, json!({"uid": 33, "gid": 34, "additionalGids": [], "umask": 18}));

        let evil = tempfile::tempdir().unwrap();
        symlink("/etc", evil.path().join("etc")).unwrap();
        let mut user = json!({"username": "root"});
        assert_eq!(resolve(&mut user, evil.path()), Err(UserError::NoUser("root".into())));
    }
}
