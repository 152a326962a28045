//! What a guest may see and do in a share. It can widen while the share is served.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::sync::{Arc, Mutex, PoisonError};

/// How a directory is shared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Config {
    /// Nothing below it can be changed.
    pub(crate) read_only: bool,
    /// Some: only these names of the directory itself are shown, and none can be added, renamed or removed.
    pub(crate) allowed: Option<BTreeSet<String>>,
}

impl Config {
    /// Whether a name in the share's root is there for the guest.
    pub(crate) fn shows(&self, name: &OsStr) -> bool {
        self.allowed.as_ref().is_none_or(|allowed| name.to_str().is_some_and(|name| allowed.contains(name)))
    }

    /// Both this and `other` are possible afterwards. What a container of its own may not do is kept from it
    /// by its mount: the guest as a whole is one tenant.
    pub(crate) fn widen(&mut self, other: &Config) {
        self.read_only &= other.read_only;
        match (&mut self.allowed, &other.allowed) {
            (Some(allowed), Some(more)) => allowed.extend(more.iter().cloned()),
            (allowed, _) => *allowed = None,
        }
    }
}

/// The configuration that a server looks at with each request. Clones are handles.
#[derive(Debug, Clone)]
pub(crate) struct Rules(Arc<Mutex<Arc<Config>>>);

impl Rules {
    pub(crate) fn new(config: Config) -> Rules {
        Rules(Arc::new(Mutex::new(Arc::new(config))))
    }

    pub(crate) fn get(&self) -> Arc<Config> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set(&self, config: Config) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(read_only: bool, names: &[&str]) -> Config {
        let allowed = (!names.is_empty()).then(|| names.iter().map(|name| (*name).to_owned()).collect());
        Config { read_only, allowed }
    }

    #[test]
    fn a_share_only_widens() {
        let mut one = config(true, &["a"]);
        one.widen(&config(true, &["b"]));
        assert_eq!(one, config(true, &["a", "b"]));
        assert!(one.shows(OsStr::new("a")) && !one.shows(OsStr::new("c")));
        one.widen(&config(false, &["a"]));
        assert_eq!(one, config(false, &["a", "b"]));
        one.widen(&config(true, &[]));
        assert_eq!(one, config(false, &[]), "the whole directory, and writable as before");
        assert!(one.shows(OsStr::new("c")));
    }
}
