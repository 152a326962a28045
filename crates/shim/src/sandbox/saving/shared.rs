//! Disks on shared storage in a move: tokens out and answers in, and whose the files are meanwhile.
//!
//! ```text
//!  export: tokens left -> before anything is sent: answers read, files lent -> away
//!                                                                          `-> back: files this host's again
//! ```

use std::collections::BTreeMap;
use std::path::PathBuf;

use dunlin_migration::refusal::Refusal;
use dunlin_wire::ids::Slot;
use dunlin_wire::tree::DiskToken;

use crate::device::scsi::{Storage, storage};
use crate::rootfs::scratch;
use crate::sandbox::Sandbox;

impl Sandbox {
    /// Source, before the tables are saved: a token beside each shared disk. Disks that are to be copied although
    /// they are shared get none.
    pub(super) fn leave_tokens(&self) -> Result<(), Refusal> {
        self.clear_tokens();
        let shared: Vec<(Slot, PathBuf)> = {
            let mut inner = self.inner();
            let copy = inner.transfer.as_ref().is_some_and(|options| options.copy_shared);
            inner.scsi.copy_shared(copy);
            let disks = inner.scsi.disks().filter(|(_, disk)| disk.is_handed_over());
            disks.filter_map(|(slot, disk)| Some((slot, disk.path.clone()?))).collect()
        };
        let mut tokens = BTreeMap::new();
        let mut failed = None;
        for (slot, path) in shared {
            match storage::leave(&path) {
                Ok(token) => drop(tokens.insert(slot, token)),
                Err(error) => failed = Some(Refusal::precondition(format!("disk {slot}: {error}"))),
            }
        }
        // Also after a failure: what was left is cleared away by what is noted here.
        self.inner().scsi.set_tokens(tokens);
        failed.map_or(Ok(()), Err)
    }

    /// Source: nothing goes on until the destination has answered each token. From here on the files may be its.
    pub(in crate::sandbox) fn hand_over_shared(&self) -> Result<(), String> {
        for (slot, path, token) in self.tokens() {
            storage::answered(&path, &token).map_err(|error| format!("disk {slot}: {error}"))?;
        }
        self.clear_tokens();
        let lent = self.inner().scsi.lend();
        for file in lent {
            scratch::disown(&self.directory.ledger(), &file).map_err(|error| {
                format!(
                    "{}: it cannot be handed over: its entry in {} stays ({error})",
                    file.display(),
                    self.directory.ledger().display()
                )
            })?;
        }
        Ok(())
    }

    /// Either side, when it is decided that the machine runs here: the shared files are this host's.
    pub(in crate::sandbox) fn take_back_shared(&self) {
        self.clear_tokens();
        let own = self.inner().scsi.take_back();
        for file in own {
            scratch::own(&self.directory.ledger(), &file);
        }
    }

    pub(super) fn clear_tokens(&self) {
        for (_, path, token) in self.tokens() {
            storage::clear(&path, &token);
        }
        self.inner().scsi.set_tokens(BTreeMap::new());
    }

    fn tokens(&self) -> Vec<(Slot, PathBuf, DiskToken)> {
        let inner = self.inner();
        let tokens = inner.scsi.tokens().iter();
        tokens
            .filter_map(|(slot, token)| {
                let disk = inner.scsi.disk(*slot).filter(|disk| disk.storage == Storage::Shared)?;
                Some((*slot, disk.path.clone()?, *token))
            })
            .collect()
    }
}
