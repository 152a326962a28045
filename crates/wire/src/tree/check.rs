//! What must hold of a tree: the shapes that its fields may have, and what is between its parts. Asked by a source before
//! it tells and by a destination before it takes, so that neither refuses what the other allows.

mod devices;
mod pods;

use std::collections::HashMap;
use std::fmt::Display;
use std::hash::Hash;

use super::shape::{self, limit, missing, shown};
use super::{PODS_MAX, SavedTree, TreeError};
use crate::envelope::Place;
use crate::ids::{ReservationId, StdioPort};

const EXPORT_AGAIN: &str = "export again";

pub(super) fn all(tree: &SavedTree) -> Result<(), TreeError> {
    // All is well nearly always, and then nobody asks where anything stands.
    whole(tree, Names::new(false)).or_else(|_| whole(tree, Names::new(true)))
}

fn whole<'a>(tree: &'a SavedTree, mut names: Names<'a>) -> Result<(), TreeError> {
    machine(tree)?;
    devices::scsi(tree, &mut names)?;
    devices::plan9(tree, &mut names)?;
    devices::vpci(tree)?;
    if tree.pods.is_empty() {
        return Err(missing(&"config.pods"));
    }
    limit(&"config.pods", tree.pods.len(), PODS_MAX)?;
    for (at, pod) in tree.pods.iter().enumerate() {
        pods::pod(tree, pod, &format_args!("config.pods[{at}]"), &mut names)?;
    }
    Ok(())
}

fn machine(tree: &SavedTree) -> Result<(), TreeError> {
    let options = &tree.vm.options;
    if options.has_architecture() {
        return Ok(());
    }
    let reason = format!("{:?} is neither amd64 nor arm64", shown(&options.architecture));
    Err(shape::contradiction(&"config.vm.options.architecture", reason))
}

/// What may stand once in a machine.
struct Names<'a> {
    /// The first place of each is kept, for the error that names it.
    told: bool,
    pods: Claims<&'a str>,
    guest_pods: Claims<&'a str>,
    containers: Claims<&'a str>,
    guest_containers: Claims<&'a str>,
    /// Of mounts: one at the place of another hides it.
    guest_paths: Claims<&'a str>,
    rootfs_paths: Claims<&'a str>,
    /// One holder each: who lets go of it would take it from the other.
    scsi_reservations: Claims<ReservationId>,
    plan9_reservations: Claims<ReservationId>,
    nics: Claims<&'a str>,
    macs: Claims<&'a str>,
    root_ports: Claims<u8>,
    ports: Claims<StdioPort>,
    waits: Claims<u64>,
    pids: Claims<u32>,
}

impl Names<'_> {
    fn new(told: bool) -> Self {
        Names {
            told,
            pods: Claims::new(told),
            guest_pods: Claims::new(told),
            containers: Claims::new(told),
            guest_containers: Claims::new(told),
            guest_paths: Claims::new(told),
            rootfs_paths: Claims::new(told),
            scsi_reservations: Claims::new(told),
            plan9_reservations: Claims::new(told),
            nics: Claims::new(told),
            macs: Claims::new(told),
            root_ports: Claims::new(told),
            ports: Claims::new(told),
            waits: Claims::new(told),
            pids: Claims::new(told),
        }
    }
}

/// Who stands where.
struct Claims<T> {
    told: bool,
    /// Their places, or nothing: see [`Names::told`].
    first: HashMap<T, String>,
}

impl<T: Hash + Eq + Display + Copy> Claims<T> {
    fn new(told: bool) -> Self {
        Claims { told, first: HashMap::new() }
    }

    fn claim(&mut self, what: &'static str, key: T, place: Place<'_>) -> Result<(), TreeError> {
        let here = if self.told { place.to_string() } else { String::new() };
        match self.first.insert(key, here) {
            None => Ok(()),
            Some(first) => {
                Err(TreeError::Twice { place: place.to_string(), what, name: key.to_string(), first })
            }
        }
    }
}

fn contradiction(place: Place<'_>, reason: String) -> TreeError {
    TreeError::Contradiction { place: place.to_string(), reason, remedy: EXPORT_AGAIN }
}

fn dangling(place: Place<'_>, what: &'static str, name: impl Display) -> TreeError {
    TreeError::Dangling { place: place.to_string(), what, name: name.to_string().chars().take(80).collect() }
}
