//! What must hold between the parts.

mod devices;
mod pods;

use std::collections::HashMap;
use std::fmt::{Display, Write};
use std::hash::Hash;
use std::rc::Rc;

use super::{SavedTree, TreeError};
use crate::ids::StdioPort;

const EXPORT_AGAIN: &str = "export again";

pub(super) fn cross_references(tree: &SavedTree) -> Result<(), TreeError> {
    let mut names = Names::default();
    devices::scsi(tree, &mut names)?;
    devices::plan9(tree, &mut names)?;
    devices::vpci(tree)?;
    for (at, pod) in tree.pods.iter().enumerate() {
        pods::pod(tree, pod, &below("config", format_args!(".pods[{at}]")), &mut names)?;
    }
    Ok(())
}

/// What may stand once in a machine.
#[derive(Default)]
struct Names<'a> {
    pods: Claims<&'a str>,
    guest_pods: Claims<&'a str>,
    containers: Claims<&'a str>,
    guest_containers: Claims<&'a str>,
    /// Of mounts: one at the place of another hides it.
    guest_paths: Claims<&'a str>,
    rootfs_paths: Claims<&'a str>,
    /// One holder each: who lets go of it would take it from the other.
    scsi_reservations: Claims<&'a str>,
    plan9_reservations: Claims<&'a str>,
    nics: Claims<&'a str>,
    macs: Claims<&'a str>,
    root_ports: Claims<u8>,
    ports: Claims<StdioPort>,
    waits: Claims<u64>,
    pids: Claims<u32>,
}

/// Who stands where. Nothing is put into words before something stands twice.
struct Claims<T>(HashMap<T, Rc<str>>);

impl<T> Default for Claims<T> {
    fn default() -> Self {
        Claims(HashMap::new())
    }
}

impl<T: Hash + Eq + Display + Copy> Claims<T> {
    fn claim(&mut self, what: &'static str, key: T, place: &Rc<str>) -> Result<(), TreeError> {
        match self.0.insert(key, Rc::clone(place)) {
            None => Ok(()),
            Some(first) => Err(TreeError::Twice {
                place: place.to_string(),
                what,
                name: key.to_string(),
                first: first.to_string(),
            }),
        }
    }
}

/// A place below another.
fn below(place: &str, step: std::fmt::Arguments<'_>) -> Rc<str> {
    let mut text = String::with_capacity(place.len() + 80);
    text.push_str(place);
    // A string takes everything.
    let _ = text.write_fmt(step);
    text.into()
}

fn contradiction(place: &str, reason: String) -> TreeError {
    TreeError::Contradiction { place: place.to_owned(), reason, remedy: EXPORT_AGAIN }
}

fn dangling(place: String, what: &'static str, name: &str) -> TreeError {
    TreeError::Dangling { place, what, name: name.chars().take(80).collect() }
}
