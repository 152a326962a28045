//! The bytes of each payload's version. They must be readable for as long as that version may be in flight: who
//! changes one of these files makes the next version. `v1`: what no release has written.

use super::super::SavedTree;
use super::full::{DEVICE, full};
use crate::Any;
use crate::envelope::{Payload, open};
use crate::saved;

fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<u8> = hex.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
    let pair = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    digits.chunks(2).map(pair).collect()
}

/// As the files have it: 32 bytes a line.
fn hex(bytes: &[u8]) -> String {
    let line = |line: &[u8]| line.iter().map(|byte| format!("{byte:02x}")).collect::<String>() + "\n";
    bytes.chunks(32).map(line).collect()
}

/// The sealed bytes are the golden ones, and those open as the same message.
fn golden<T: Payload + PartialEq>(sealed: &Any, name: &str, file: &str) -> T {
    assert_eq!(sealed.type_url, format!("type.dunlin.dev/dunlin.{name}.v1"));
    assert_eq!(hex(&sealed.value), file, "tests/golden/{name}.hex");
    let any = Any { type_url: sealed.type_url.clone(), value: bytes(file), ..Any::default() };
    open(&any, &name).unwrap()
}

macro_rules! golden {
    ($sealed:expr, $message:ident, $name:literal) => {
        golden::<saved::$message>(
            $sealed,
            $name,
            include_str!(concat!("../../../tests/golden/", $name, ".hex")),
        )
    };
}

#[test]
fn golden_bytes_of_every_payload() {
    let sealed = full().seal().unwrap();
    let migration = golden!(&sealed, Migration, "migration");
    let vm = golden!(&migration.vm, Vm, "vm");
    let scsi = golden!(&vm.scsi, Scsi, "scsi");
    assert_eq!(scsi.reservations.len(), 7);
    let plan9 = golden!(&vm.plan9, Plan9, "plan9");
    assert_eq!(plan9.name_counter, 9);
    let vpci = golden!(&vm.vpci, Vpci, "vpci");
    assert!(vpci.devices.contains_key(DEVICE));
    let pod = golden!(&migration.pods[0], Pod, "pod");
    let network = golden!(&pod.network, Network, "network");
    assert_eq!(network.namespace_id, "ns-1");
    let container = golden!(&pod.containers[1], Container, "container");
    let process = golden!(&container.processes["logs"], Process, "process");
    assert_eq!(process.exit_code, 137);
}

#[test]
fn the_golden_tree_opens() {
    let value = bytes(include_str!("../../../tests/golden/migration.hex"));
    let any = Any { type_url: saved::Migration::type_url(), value, ..Any::default() };
    assert_eq!(SavedTree::open(&any).unwrap(), full());
}

#[test]
fn a_tree_of_an_older_version_is_refused_by_it() {
    let value = bytes(include_str!("../../../tests/golden/v1/migration.hex"));
    let any = Any { type_url: saved::Migration::type_url(), value, ..Any::default() };
    let refused = SavedTree::open(&any).unwrap_err().to_string();
    for part in ["config.vm:", "schema version 1", "reads 2", "same Dunlin version"] {
        assert!(refused.contains(part), "{refused}");
    }
}
