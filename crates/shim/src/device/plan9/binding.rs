//! From a mount of an OCI spec to a directory in the guest.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use dunlin_bridge::message::{MappedDirectory, Modification, Resource};
use dunlin_link::host::PortListener;
use dunlin_wire::ids::ReservationId;
use dunlin_wire::tree::SavedPlan9;
use serde_json::Value;

use super::error::{Plan9Error, Tie};
use super::rules::{Config, Rules};
use super::server::{self, Root, Server};
use super::table::{Holder, Plan9, mount_point};
use super::{mount, share};
use crate::controller::NotNow;
use crate::vm::VmError;

/// Sandbox annotation: directories of the host are shared read-only or not at all.
const READ_ONLY_SHARES: &str = "io.microsoft.virtualmachine.fileshares.disablewritable";

/// The machine that directories are shared with.
pub(crate) trait Machine {
    /// Whether the guest's kernel has a 9P client. Known once the bridge is negotiated.
    fn has_9p(&self) -> bool;

    /// Listens on a port of the link that nobody had before.
    fn listen(&self) -> Result<PortListener, VmError>;

    /// Has the guest change something of itself.
    fn modify(&self, what: &Modification) -> impl Future<Output = Result<(), VmError>> + Send;
}

/// A sandbox's shares: the table, their servers, and their mounts in the guest.
#[derive(Debug, Default)]
pub(crate) struct Shares {
    owned: Mutex<Owned>,
    /// One share is made or taken away at a time: two containers that start together may want the same one.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Owned {
    table: Plan9,
    /// By directory.
    served: BTreeMap<String, Served>,
}

#[derive(Debug)]
struct Served {
    rules: Rules,
    port: u32,
    _server: Server,
}

/// Whether a mount of a spec is a directory or file of this host: a bind mount of a path. What the guest has of its own is
/// named by a scheme, as in `sandbox://`; a path that exists in the guest alone would lead one container to
/// another's files, and is looked for on this host like any other.
fn is_host_share(mount: &Value) -> bool {
    let bind = text(mount, "type") == "bind" || options(mount).any(|o| matches!(o, "bind" | "rbind"));
    bind && !text(mount, "source").contains("://")
}

fn text<'a>(mount: &'a Value, key: &str) -> &'a str {
    mount.get(key).and_then(Value::as_str).unwrap_or_default()
}

fn options(mount: &Value) -> impl Iterator<Item = &str> {
    mount.get("options").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str)
}

impl Shares {
    /// Heeds what the annotations of the machine's first container say about writing. An unreadable value counts as
    /// not said.
    pub(crate) fn heed(&self, annotations: &HashMap<String, String>) {
        let value = annotations.get(READ_ONLY_SHARES).map(|value| value.to_ascii_lowercase());
        if matches!(value.as_deref(), Some("1" | "t" | "true")) {
            self.owned().table.forbid_writing();
        }
    }

    /// Whether the sandbox has writable shares turned off.
    pub(crate) fn read_only(&self) -> bool {
        self.owned().table.guest_read_only()
    }

    /// Shares every host directory and file among a container's mounts with the machine and points those mounts at
    /// the guest's paths; other mounts stay as they are. `whys`: by the mounts' places in the container, why they are not
    /// copied. Gives the reservations, for [`Shares::release`]. When it
    /// fails, nothing of it is left; the machine must be up.
    pub(crate) async fn share_mounts<M: Machine + Sync>(
        &self,
        machine: &M,
        container: &str,
        mounts: &mut [Value],
        whys: &BTreeMap<String, String>,
    ) -> Result<Vec<ReservationId>, Plan9Error> {
        let mut reservations = Vec::new();
        for mount in mounts.iter_mut().filter(|mount| is_host_share(mount)) {
            match self.share_mount(machine, container, mount, whys).await {
                Ok((reservation, guest_path)) => {
                    mount["source"] = Value::String(guest_path);
                    reservations.push(reservation);
                }
                Err(error) => {
                    if let Err(undo) = self.release(machine, &reservations).await {
                        tracing::warn!(container, error = %undo, "a share of a container that was not made stays");
                    }
                    return Err(error);
                }
            }
        }
        Ok(reservations)
    }

    /// Gives uses back, as when their container is deleted: what nobody uses any more is unmounted in the guest and no
    /// longer served. Goes on after a failure and gives the first; every reservation is gone afterwards.
    pub(crate) async fn release<M: Machine + Sync>(
        &self,
        machine: &M,
        reservations: &[ReservationId],
    ) -> Result<(), Plan9Error> {
        let mut result = Ok(());
        for id in reservations {
            let released = self.release_one(machine, id).await;
            if result.is_ok() {
                result = released;
            }
        }
        result
    }

    /// Gives uses back without a guest to ask: the machine has ended, or never ran here.
    pub(crate) fn forget(&self, reservations: &[ReservationId]) -> Result<(), Plan9Error> {
        let mut result = Ok(());
        for id in reservations {
            let forgotten = self.owned().give_back(id);
            if result.is_ok() {
                result = forgotten;
            }
        }
        result
    }

    /// Refused by the mount's name while the sandbox is tied to this host. To be asked before anything is frozen.
    pub(crate) fn check_migratable(&self) -> Result<(), Tie> {
        self.owned().table.check_migratable()
    }

    /// See [`Plan9::save`].
    pub(crate) fn save(&self) -> Result<SavedPlan9, NotNow> {
        self.owned().table.save()
    }

    /// A destination's table, inert: see [`Plan9::import`]. What was here before is forgotten.
    pub(crate) fn adopt(&self, saved: SavedPlan9) -> Result<(), NotNow> {
        let table = Plan9::import(saved)?;
        *self.owned() = Owned { table, ..Owned::default() };
        Ok(())
    }

    /// See [`Plan9::patch`].
    pub(crate) fn patch(&self, here: &BTreeMap<String, String>) -> Result<(), Plan9Error> {
        self.owned().table.patch(here)
    }

    /// See [`Plan9::resume`].
    pub(crate) fn resume(&self) -> Result<(), NotNow> {
        self.owned().table.resume()
    }

    /// See [`Plan9::abort`].
    pub(crate) fn abort(&self) -> Result<(), NotNow> {
        self.owned().table.abort()
    }

    async fn share_mount<M: Machine + Sync>(
        &self,
        machine: &M,
        container: &str,
        mount: &Value,
        whys: &BTreeMap<String, String>,
    ) -> Result<(ReservationId, String), Plan9Error> {
        let holder = Holder {
            container: container.to_owned(),
            source: text(mount, "source").to_owned(),
            destination: text(mount, "destination").to_owned(),
            why: whys.get(text(mount, "destination")).cloned().unwrap_or_default(),
        };
        if !machine.has_9p() {
            let Holder { source: host, destination, .. } = holder;
            return Err(Plan9Error::NoClient { host, destination });
        }
        let read_only = options(mount).any(|option| matches!(option, "ro" | "rro"));
        let place = Place::find(&holder, read_only).await?;
        let _turn = self.turn.lock().await;
        let (id, config) = self.owned().table.reserve(&place.directory, &place.config, holder)?;
        // Given back also when this future is dropped half-way.
        let mut undo = Undo { shares: self, reservation: Some(id) };
        let guest_path = self.bring_up(machine, &id, &config).await?;
        undo.reservation = None;
        let source = match place.file {
            Some(file) => format!("{guest_path}/{file}"),
            None => guest_path,
        };
        Ok((id, source))
    }

    /// Serves and mounts the share of a reservation, where that was not done before. Gives the guest's path.
    async fn bring_up<M: Machine + Sync>(
        &self,
        machine: &M,
        id: &ReservationId,
        config: &Config,
    ) -> Result<String, Plan9Error> {
        let (path, name, served, mounted) = {
            let owned = self.owned();
            let (path, share) = owned.table.share(id)?;
            let mounted = share.mount.as_ref().is_some_and(|mount| mount.stage == mount::State::Mounted);
            (path.to_owned(), share.name.clone(), share.stage == share::State::Added, mounted)
        };
        if !served {
            let serving = serve(machine, &path, &name, config).await?;
            let mut owned = self.owned();
            owned.table.add(id)?;
            owned.served.insert(path.clone(), serving);
        }
        let (port, read_only) = {
            let owned = self.owned();
            let served = owned.served.get(&path).ok_or_else(|| Plan9Error::Unknown(id.to_string()))?;
            served.rules.set(config.clone());
            (served.port, owned.table.guest_read_only())
        };
        if !mounted {
            let directory = MappedDirectory {
                mount_path: mount_point(&name),
                port: i32::try_from(port).unwrap_or(i32::MAX),
                share_name: name,
                read_only,
            };
            let add = Modification::add(Resource::MappedDirectory(directory));
            machine.modify(&add).await.map_err(|source| {
                self.owned().table.fail(id);
                Plan9Error::Machine { path, source: Box::new(source) }
            })?;
        }
        self.owned().table.map(id)
    }

    async fn release_one<M: Machine + Sync>(
        &self,
        machine: &M,
        id: &ReservationId,
    ) -> Result<(), Plan9Error> {
        let _turn = self.turn.lock().await;
        let (path, name, last) = {
            let mut owned = self.owned();
            let (path, share) = owned.table.share(id)?;
            let (path, name) = (path.to_owned(), share.name.clone());
            (path, name, owned.table.unmap(id)?)
        };
        let unmounted = if last {
            let directory = MappedDirectory { mount_path: mount_point(&name), ..MappedDirectory::default() };
            machine.modify(&Modification::remove(Resource::MappedDirectory(directory))).await
        } else {
            Ok(())
        };
        // A mount that stays in the guest finds no server any more, and its name is not used again.
        self.owned().give_back(id)?;
        unmounted.map_err(|source| Plan9Error::Machine { path, source: Box::new(source) })
    }

    fn owned(&self) -> MutexGuard<'_, Owned> {
        self.owned.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Owned {
    fn give_back(&mut self, id: &ReservationId) -> Result<(), Plan9Error> {
        if let Some(path) = self.table.release(id)? {
            self.served.remove(&path);
        }
        Ok(())
    }
}

/// Gives a reservation back when dropped, unless it was taken out.
struct Undo<'a> {
    shares: &'a Shares,
    reservation: Option<ReservationId>,
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        if let Some(id) = self.reservation.take()
            && let Err(error) = self.shares.owned().give_back(&id)
        {
            tracing::warn!(%error, "a host share that was not made stays in the table");
        }
    }
}

/// What of the host a mount wants.
struct Place {
    /// Canonical.
    directory: String,
    config: Config,
    /// Only this file in it.
    file: Option<String>,
}

impl Place {
    async fn find(holder: &Holder, read_only: bool) -> Result<Place, Plan9Error> {
        let (host, destination) = (holder.source.clone(), holder.destination.clone());
        let given = PathBuf::from(&host);
        if !given.is_absolute() {
            return Err(Plan9Error::Malformed { host, destination, what: "the source is not absolute" });
        }
        let looked = tokio::task::spawn_blocking(move || {
            let path = std::fs::canonicalize(given)?;
            std::fs::metadata(&path).map(|metadata| (path, metadata.file_type()))
        });
        let found = looked.await.map_err(std::io::Error::other).and_then(|found| found);
        let (path, kind) = match found {
            Ok(found) => found,
            Err(source) => return Err(Plan9Error::Source { host, destination, source }),
        };
        let utf8 = |text: Option<&str>| text.map(str::to_owned);
        let malformed =
            |what| Plan9Error::Malformed { host: host.clone(), destination: destination.clone(), what };
        if kind.is_dir() {
            let directory = utf8(path.to_str()).ok_or_else(|| malformed("its path is not UTF-8"))?;
            return Ok(Place { directory, config: Config { read_only, allowed: None }, file: None });
        }
        if !kind.is_file() {
            return Err(Plan9Error::Kind { host, destination });
        }
        let directory = utf8(path.parent().and_then(Path::to_str));
        let file = utf8(path.file_name().and_then(std::ffi::OsStr::to_str));
        let (Some(directory), Some(file)) = (directory, file) else {
            return Err(malformed("its path is not UTF-8"));
        };
        let allowed = Some([file.clone()].into());
        Ok(Place { directory, config: Config { read_only, allowed }, file: Some(file) })
    }
}

async fn serve<M: Machine>(
    machine: &M,
    path: &str,
    name: &str,
    config: &Config,
) -> Result<Served, Plan9Error> {
    let directory = PathBuf::from(path);
    let opened = tokio::task::spawn_blocking(move || Root::open(&directory)).await;
    let root = opened
        .map_err(std::io::Error::other)
        .and_then(|root| root)
        .map_err(|source| Plan9Error::Serve { path: path.into(), source })?;
    let listener = machine
        .listen()
        .map_err(|source| Plan9Error::Machine { path: path.to_owned(), source: Box::new(source) })?;
    let port = listener.port();
    let rules = Rules::new(config.clone());
    let server = server::serve(listener, root, name.to_owned(), rules.clone());
    Ok(Served { rules, port, _server: server })
}

#[cfg(test)]
#[path = "binding_tests.rs"]
mod tests;
