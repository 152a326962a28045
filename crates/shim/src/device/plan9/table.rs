//! Which directories of the host are shared with the machine, and who uses them. Nothing here touches a file or the
//! guest.

use std::collections::{BTreeMap, BTreeSet};

use dunlin_wire::ids::ReservationId;
use dunlin_wire::tree::{SHARES_MAX, SavedPlan9, SavedShare, SavedShareMount};

use super::error::{Plan9Error, Tie};
use super::rules::Config;
use super::{mount, share};
use crate::controller::{NotNow, Transitions};
use crate::hold::{Hold, Step};

/// Who uses a share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Holder {
    /// containerd's id.
    pub(crate) container: String,
    /// The mount's source as the spec has it.
    pub(crate) source: String,
    /// The mount's place in the container.
    pub(crate) destination: String,
    /// Why it is shared and not copied.
    pub(crate) why: String,
}

/// The table. What it says of a share is what is saved of it.
#[derive(Debug, Default)]
pub(crate) struct Plan9 {
    /// Its part in a move.
    hold: Hold,
    table: SavedPlan9,
    /// Of the reservations that were made here; an imported one's is not known.
    holders: BTreeMap<ReservationId, Holder>,
}

/// The table, for errors.
const WHAT: &str = "the table of host shares";

/// Where the guest has a share mounted.
pub(crate) fn mount_point(name: &str) -> String {
    format!("/run/mounts/plan9/{name}")
}

fn config_of(share: &SavedShare) -> Config {
    let allowed = share.restrict.then(|| share.allowed_names.iter().cloned().collect());
    Config { read_only: share.read_only, allowed }
}

fn set_config(share: &mut SavedShare, config: Config) {
    share.read_only = config.read_only;
    share.restrict = config.allowed.is_some();
    share.allowed_names = config.allowed.into_iter().flatten().collect();
}

impl Plan9 {
    /// From now on no share may be written to. For the time before the first one.
    pub(crate) fn forbid_writing(&mut self) {
        self.table.no_writable_file_shares = true;
    }

    /// Takes a use of a directory; the first one makes the share. Later ones can widen it: from read-only to writable,
    /// from single files to all. Gives the reservation and the share's configuration from now on.
    pub(crate) fn reserve(
        &mut self,
        path: &str,
        config: &Config,
        holder: Holder,
    ) -> Result<(ReservationId, Config), Plan9Error> {
        self.free("reserve")?;
        if self.table.no_writable_file_shares && !config.read_only {
            let Holder { source: host, destination, .. } = holder;
            return Err(Plan9Error::Writable { host, destination });
        }
        let id = ReservationId::random();
        let full = self.table.shares.len() >= SHARES_MAX;
        let config = match self.table.shares.get_mut(path) {
            Some(share) => {
                // A broken or removed one takes nobody in.
                let mut stage = share.stage;
                stage.enter(share::Op::Add, what(path))?;
                let mut wider = config_of(share);
                wider.widen(config);
                set_config(share, wider.clone());
                wider
            }
            None if full => return Err(Plan9Error::Full),
            None => {
                let mut share = SavedShare {
                    name: self.table.name_counter.to_string(),
                    read_only: false,
                    restrict: false,
                    allowed_names: Vec::new(),
                    stage: share::State::Reserved,
                    mount: None,
                };
                set_config(&mut share, config.clone());
                self.table.name_counter += 1;
                self.table.shares.insert(path.to_owned(), share);
                config.clone()
            }
        };
        self.table.reservations.insert(id, path.to_owned());
        self.holders.insert(id, holder);
        Ok((id, config))
    }

    /// A share's name, how it stands, and how its mount does.
    pub(crate) fn share(&self, id: &ReservationId) -> Result<(&str, &SavedShare), Plan9Error> {
        let unknown = || Plan9Error::Unknown(id.to_string());
        let path = self.table.reservations.get(id).ok_or_else(unknown)?;
        let share = self.table.shares.get(path).ok_or_else(unknown)?;
        Ok((path, share))
    }

    /// Whether the guest mounts shares read-only. What each container may do is kept by its own mount, and by the
    /// server for all of them: this one cannot change once it is there.
    pub(crate) fn guest_read_only(&self) -> bool {
        self.table.no_writable_file_shares
    }

    /// The share is served now. May be repeated.
    pub(crate) fn add(&mut self, id: &ReservationId) -> Result<(), Plan9Error> {
        let (path, share) = self.share_mut(id)?;
        Ok(share.stage.enter(share::Op::Add, what(&path))?)
    }

    /// The guest has the share mounted for this use too. Gives where.
    pub(crate) fn map(&mut self, id: &ReservationId) -> Result<String, Plan9Error> {
        let read_only = self.guest_read_only();
        let (path, share) = self.share_mut(id)?;
        let name = share.name.clone();
        let mount = share.mount.get_or_insert_with(|| SavedShareMount {
            read_only,
            stage: mount::State::Reserved,
            ref_count: 0,
            guest_path: mount_point(&name),
        });
        mount.stage.enter(mount::Op::Map, format!("the guest's mount of {path}"))?;
        mount.ref_count = mount.ref_count.saturating_add(1);
        Ok(mount.guest_path.clone())
    }

    /// Adding or mapping went wrong half-way: nobody else gets the share.
    pub(crate) fn fail(&mut self, id: &ReservationId) {
        if let Ok((_, share)) = self.share_mut(id) {
            fail(share);
        }
    }

    /// One use of the mount less. True: it was the last, and the guest is to unmount it.
    pub(crate) fn unmap(&mut self, id: &ReservationId) -> Result<bool, Plan9Error> {
        let (path, share) = self.share_mut(id)?;
        let Some(mount) = share.mount.as_mut() else { return Ok(false) };
        mount.ref_count = mount.ref_count.saturating_sub(1);
        if mount.ref_count > 0 || mount.stage == mount::State::Unmounted {
            return Ok(false);
        }
        mount.stage.enter(mount::Op::Unmap, format!("the guest's mount of {path}"))?;
        Ok(true)
    }

    /// Gives a use back. Some: it was the last; the share has left the table, and its server is to end.
    pub(crate) fn release(&mut self, id: &ReservationId) -> Result<Option<String>, Plan9Error> {
        self.free("release")?;
        let path = self.table.reservations.remove(id).ok_or_else(|| Plan9Error::Unknown(id.to_string()))?;
        self.holders.remove(id);
        if self.table.reservations.values().any(|used| *used == path) {
            return Ok(None);
        }
        if let Some(mut share) = self.table.shares.remove(&path) {
            share.stage.enter(share::Op::Remove, what(&path))?;
        }
        Ok(Some(path))
    }

    /// Refused, with the mount's name, while anything is shared: a directory of this host stays here.
    pub(crate) fn check_migratable(&self) -> Result<(), Tie> {
        if let Some((id, host)) = self.table.reservations.first_key_value() {
            return Err(match self.holders.get(id) {
                Some(Holder { container, source, destination, why }) => Tie::Mount {
                    why: why.clone(),
                    container: container.clone(),
                    host: source.clone(),
                    destination: destination.clone(),
                },
                None => Tie::Share { host: host.clone() },
            });
        }
        match self.table.shares.keys().next() {
            Some(host) => Err(Tie::Share { host: host.clone() }),
            None => Ok(()),
        }
    }

    /// The saved table; from now on it stays as it is. May be repeated.
    pub(crate) fn save(&mut self) -> Result<SavedPlan9, NotNow> {
        self.hold.enter(Step::Save, WHAT)?;
        self.each(share::Op::Save, mount::Op::Save)?;
        Ok(self.table.clone())
    }

    /// A table from a payload, inert until it is resumed.
    pub(crate) fn import(saved: SavedPlan9) -> Result<Plan9, NotNow> {
        let mut plan9 = Plan9 { table: saved, ..Plan9::default() };
        plan9.hold.enter(Step::Import, WHAT)?;
        plan9.each(share::Op::Import, mount::Op::Import)?;
        Ok(plan9)
    }

    /// Destination: the source's directories are these on this host, by their paths there. None has to be.
    pub(crate) fn patch(&mut self, here: &BTreeMap<String, String>) -> Result<(), Plan9Error> {
        let mut targets = BTreeSet::new();
        for (source, path) in here {
            let taken = !targets.insert(path) || source != path && self.table.shares.contains_key(path);
            if taken || !self.table.shares.contains_key(source) {
                return Err(Plan9Error::Unknown(if taken { path } else { source }.clone()));
            }
        }
        if self.hold != Hold::Patched {
            self.hold.enter(Step::Patch, WHAT)?;
        }
        self.each(share::Op::Patch, mount::Op::Patch)?;
        for (source, path) in here {
            if let Some(share) = self.table.shares.remove(source) {
                self.table.shares.insert(path.clone(), share);
            }
            for used in self.table.reservations.values_mut().filter(|used| *used == source) {
                used.clone_from(path);
            }
        }
        Ok(())
    }

    /// The table may change again. What was imported and mounted spoke to a server on the source, so it is broken here.
    /// May be repeated.
    pub(crate) fn resume(&mut self) -> Result<(), NotNow> {
        let arrived = self.hold == Hold::Patched;
        self.hold.enter(Step::Resume, WHAT)?;
        self.each(share::Op::Resume, mount::Op::Resume)?;
        if arrived {
            for share in self.table.shares.values_mut().filter(|share| share.stage == share::State::Added) {
                fail(share);
            }
        }
        Ok(())
    }

    /// Ends what was imported, so that it can be released; what was saved stays as it is. May be repeated.
    pub(crate) fn abort(&mut self) -> Result<(), NotNow> {
        let imported = self.hold.arriving();
        self.hold.enter(Step::Abort, WHAT)?;
        if imported {
            self.each(share::Op::Abort, mount::Op::Abort)?;
        }
        Ok(())
    }

    /// While it takes part in a move, it stays as it is.
    fn free(&self, op: &'static str) -> Result<(), NotNow> {
        match self.hold {
            Hold::Free => Ok(()),
            held => Err(NotNow { what: WHAT.to_owned(), state: held.name(), op }),
        }
    }

    fn each(&mut self, op: share::Op, mount_op: mount::Op) -> Result<(), NotNow> {
        for (path, share) in &mut self.table.shares {
            share.stage.enter(op, what(path))?;
            if let Some(mount) = &mut share.mount {
                mount.stage.enter(mount_op, format!("the guest's mount of {path}"))?;
            }
        }
        Ok(())
    }

    fn share_mut(&mut self, id: &ReservationId) -> Result<(String, &mut SavedShare), Plan9Error> {
        let unknown = || Plan9Error::Unknown(id.to_string());
        let path = self.table.reservations.get(id).ok_or_else(unknown)?.clone();
        let share = self.table.shares.get_mut(&path).ok_or_else(unknown)?;
        Ok((path, share))
    }
}

fn what(path: &str) -> String {
    format!("the share of {path}")
}

/// A state that cannot fail any more is past it: nothing to do.
fn fail(share: &mut SavedShare) {
    share.stage = share.stage.after(share::Op::Fail).unwrap_or(share.stage);
    if let Some(mount) = &mut share.mount {
        mount.stage = mount.stage.after(mount::Op::Fail).unwrap_or(mount.stage);
    }
}

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
