//! Envelopes and messages that no domain type can express: each payload of the tree, tampered with
//! where it stands.

use protobuf::{EnumOrUnknown, UnknownValue};

use super::super::SavedTree;
use super::full::{digest, full};
use crate::Any;
use crate::envelope::{Payload, open, seal};
use crate::saved;

/// Where each payload stands in the full tree, as an error names it.
const PLACES: [&str; 9] = [
    "config",
    "config.vm",
    "config.vm.scsi",
    "config.vm.plan9",
    "config.vm.vpci",
    "config.pods[0]",
    "config.pods[0].network",
    "config.pods[0].containers[1]",
    "config.pods[0].containers[1].processes[\"sh\"]",
];

/// The full tree with the payload at `place` changed, and everything above it sealed anew.
fn tampered(place: &str, change: impl FnOnce(&mut Any)) -> Any {
    let mut config = full().seal().unwrap();
    let mut migration: saved::Migration = open(&config, &"").unwrap();
    let mut vm: saved::Vm = open(&migration.vm, &"").unwrap();
    let mut pod: saved::Pod = open(&migration.pods[0], &"").unwrap();
    let mut container: saved::Container = open(&pod.containers[1], &"").unwrap();
    match place {
        "config" => {
            change(&mut config);
            return config;
        }
        "config.vm" => change(migration.vm.as_mut().unwrap()),
        "config.vm.scsi" => change(vm.scsi.as_mut().unwrap()),
        "config.vm.plan9" => change(vm.plan9.as_mut().unwrap()),
        "config.vm.vpci" => change(vm.vpci.as_mut().unwrap()),
        "config.pods[0]" => change(&mut migration.pods[0]),
        "config.pods[0].network" => change(pod.network.as_mut().unwrap()),
        "config.pods[0].containers[1]" => change(&mut pod.containers[1]),
        _ => change(container.processes.get_mut("sh").unwrap()),
    }
    if place.ends_with("\"]") {
        pod.containers[1] = seal(container);
    }
    if place.starts_with("config.vm.") {
        migration.vm = Some(seal(vm)).into();
    }
    if place.starts_with("config.pods[0].") {
        migration.pods[0] = seal(pod);
    }
    seal(migration)
}

fn refusal(place: &str, change: impl FnOnce(&mut Any)) -> String {
    let error = SavedTree::open(&tampered(place, change)).expect_err(place).to_string();
    assert!(error.starts_with(&format!("{place}: ")), "{place}: {error}");
    error
}

#[test]
fn nothing_changed_is_nothing_refused() {
    for place in PLACES {
        assert_eq!(SavedTree::open(&tampered(place, |_| ())).unwrap(), full(), "{place}");
    }
}

#[test]
fn unknown_urls() {
    for place in PLACES {
        for (url, part) in [
            ("", "got nothing"),
            ("type.dunlin.dev/dunlin.turbo.v1", "does not know"),
            ("type.dunlin.dev/dunlin.handoff.v1", "the handoff payload"),
            ("type.microsoft.com/hcsshim.controller.vm.save.v1.Payload", "another shim"),
        ] {
            let error = refusal(place, |any| url.clone_into(&mut any.type_url));
            assert!(error.contains(part), "{error}");
        }
        let error = refusal(place, |any| any.type_url = any.type_url.replace(".v1", ".v2"));
        assert!(error.contains("does not know"), "{error}");
    }
}

#[test]
fn unknown_versions() {
    for place in PLACES {
        // An older one, the next, and none.
        for change in [1, -1, i8::MAX] {
            let mut version = 0;
            let error = refusal(place, |any| {
                assert!(any.value[0] == 8 && matches!(any.value[1], 1 | 2), "the version comes first");
                version = any.value[1].wrapping_add_signed(change) & 127;
                any.value[1] = version;
            });
            assert!(error.contains(&format!("schema version {version} ")), "{error}");
        }
    }
}

#[test]
fn unknown_fields() {
    for place in PLACES {
        // Field 99 is 1.
        let error = refusal(place, |any| any.value.splice(2..2, [0x98, 6, 1]).for_each(drop));
        assert!(error.contains("field 99"), "{error}");
    }
}

#[test]
fn truncated_payloads() {
    for place in PLACES {
        let mut length = 0;
        drop(tampered(place, |any| length = any.value.len()));
        // Every beginning of the small ones; of the large ones enough to hit what stands in them.
        for cut in
            (0..length).step_by(1 + length / 100).chain([length - 1, length - 2, length - 3, length - 4])
        {
            refusal(place, |any| any.value.truncate(cut));
        }
    }
}

#[test]
fn oversized_payloads() {
    for (place, cap) in [
        ("config", saved::Migration::CAP),
        ("config.vm", saved::Vm::CAP),
        ("config.vm.scsi", saved::Scsi::CAP),
        ("config.vm.plan9", saved::Plan9::CAP),
        ("config.vm.vpci", saved::Vpci::CAP),
        ("config.pods[0].network", saved::Network::CAP),
        ("config.pods[0].containers[1]", saved::Container::CAP),
        (PLACES[8], saved::Process::CAP),
    ] {
        let error = refusal(place, |any| any.value.resize(cap + 1, 0));
        assert!(error.contains(&format!("{} bytes are more than the {cap}", cap + 1)), "{error}");
    }
}

/// Changes one message of type T.
fn message<T: Payload>(any: &mut Any, change: impl FnOnce(&mut T)) {
    let mut message: T = open(any, &"").unwrap();
    change(&mut message);
    *any = seal(message);
}

fn refused<T: Payload>(place: &str, parts: &[&str], change: impl FnOnce(&mut T)) {
    let error = SavedTree::open(&tampered(place, |any| message(any, change))).expect_err(place).to_string();
    for part in parts {
        assert!(error.contains(part), "{parts:?}: {error}");
    }
}

#[test]
fn unknown_stages_kinds_and_roles() {
    macro_rules! unknown {
        ($($place:expr, $message:ident, $part:literal, $change:expr;)*) => {$(
            refused::<saved::$message>($place, &[$place, "value 17 of", $part], $change);
        )*};
    }
    unknown! {
        PLACES[1], Vm, "VmStage", |vm| vm.stage = EnumOrUnknown::from_i32(17);
        PLACES[2], Scsi, "DiskStage", |scsi| scsi.disks.get_mut(&0).unwrap().stage = EnumOrUnknown::from_i32(17);
        PLACES[2], Scsi, "DiskKind", |scsi| scsi.disks.get_mut(&0).unwrap().kind = EnumOrUnknown::from_i32(17);
        PLACES[2], Scsi, "MountStage", |scsi| {
            scsi.disks.get_mut(&0).unwrap().mounts.get_mut(&0).unwrap().stage = EnumOrUnknown::from_i32(17);
        };
        PLACES[3], Plan9, "ShareStage", |plan9| {
            plan9.shares.get_mut("/srv/data").unwrap().stage = EnumOrUnknown::from_i32(17);
        };
        PLACES[3], Plan9, "ShareMountStage", |plan9| {
            let share = plan9.shares.get_mut("/srv/data").unwrap();
            share.mount.as_mut().unwrap().stage = EnumOrUnknown::from_i32(17);
        };
        PLACES[4], Vpci, "VpciStage", |vpci| {
            vpci.devices.values_mut().for_each(|device| device.stage = EnumOrUnknown::from_i32(17));
        };
        PLACES[6], Network, "NetworkStage", |network| network.stage = EnumOrUnknown::from_i32(17);
        PLACES[7], Container, "ContainerStage", |container| container.stage = EnumOrUnknown::from_i32(17);
        PLACES[7], Container, "ContainerRole", |container| container.role = EnumOrUnknown::from_i32(17);
        PLACES[8], Process, "ProcessStage", |process| process.stage = EnumOrUnknown::from_i32(17);
    }
}

#[test]
fn what_must_be_there() {
    refused::<saved::Migration>("config", &["config.vm: missing"], |config| config.vm = None.into());
    refused::<saved::Vm>("config.vm", &["vm.scsi: missing"], |vm| vm.scsi = None.into());
    refused::<saved::Vm>("config.vm", &["vm.options: missing"], |vm| vm.options = None.into());
    refused::<saved::Container>(PLACES[7], &["init process", "missing"], |container| {
        container.processes.remove("");
    });
    refused::<saved::Container>(PLACES[7], &["containers[1].role: missing"], |container| {
        container.role = saved::ContainerRole::CONTAINER_ROLE_UNSPECIFIED.into();
    });
    refused::<saved::Pod>(PLACES[5], &["containers[0].processes[\"\"].bundle: missing"], |pod| {
        pod.bundle_directory.clear();
    });
    refused::<saved::Pod>(PLACES[5], &["containers[1].rootfs_path", "absolute"], |pod| {
        pod.root_directory.clear()
    });
    refused::<saved::Container>(PLACES[7], &["layers[0]", "the mount of SCSI reservation"], |container| {
        container.layers[0].reservation_id = vec![7; 16];
        container.layers[0].guest_path.clear();
    });
    refused::<saved::Process>(PLACES[8], &["\"sh\"].pid: missing"], |process| process.pid = 0);
    refused::<saved::Process>(PLACES[8], &["\"sh\"].exited_at: missing"], |process| {
        process.stage = saved::ProcessStage::PROCESS_STAGE_TERMINATED.into();
    });
}

#[test]
fn malformed_fields() {
    let scsi = "config.vm.scsi";
    refused::<saved::Scsi>(scsi, &["scsi.disks[0].digest", "missing"], |scsi| {
        scsi.disks.get_mut(&0).unwrap().digest.clear();
    });
    refused::<saved::Scsi>(scsi, &["scsi.disks[1].digest", "writable"], |scsi| {
        scsi.disks.get_mut(&1).unwrap().digest = digest('d').to_string();
    });
    refused::<saved::Scsi>(scsi, &["scsi.disks[0].token", "read-only"], |scsi| {
        let token = scsi.disks[&64].token.clone();
        scsi.disks.get_mut(&0).unwrap().token = token;
    });
    refused::<saved::Scsi>(scsi, &["scsi.disks[64].token.id", "has 15 bytes", "16"], |scsi| {
        scsi.disks.get_mut(&64).unwrap().token.as_mut().unwrap().id.pop();
    });
    refused::<saved::Scsi>(scsi, &["scsi.disks[64].token.value", "has 33 bytes", "32"], |scsi| {
        scsi.disks.get_mut(&64).unwrap().token.as_mut().unwrap().value.push(0);
    });
    refused::<saved::Scsi>(scsi, &["scsi.disks[64].directory", "3 is none of the 2"], |scsi| {
        scsi.disks.get_mut(&64).unwrap().directory = 3;
    });
    refused::<saved::Scsi>(scsi, &["scsi.directories[1]", "5000 bytes"], |scsi| {
        scsi.directories[1] = "d".repeat(5000);
    });
    let long = |place: &mut String| *place = "d".repeat(5000);
    refused::<saved::Pod>(PLACES[5], &["bundle_directory", "4096"], |pod| long(&mut pod.bundle_directory));
    refused::<saved::Pod>(PLACES[5], &["root_directory", "4096"], |pod| long(&mut pod.root_directory));
    refused::<saved::Scsi>(scsi, &["scsi.disks[300]", "does not exist"], |scsi| {
        let disk = scsi.disks.remove(&1).unwrap();
        scsi.disks.insert(300, disk);
    });
    refused::<saved::Scsi>(scsi, &["reservations[0].slot", "does not exist"], |scsi| {
        scsi.reservations[0].slot = 256;
    });
    refused::<saved::Scsi>(scsi, &["reservations[0].reservation_id", "16 bytes"], |scsi| {
        scsi.reservations[0].reservation_id.pop();
    });
    refused::<saved::Scsi>(scsi, &["reservations[7]", "already stands"], |scsi| {
        let first = scsi.reservations[0].clone();
        scsi.reservations.push(first);
    });
    refused::<saved::Plan9>("config.vm.plan9", &["plan9.reservations[2]", "already stands"], |plan9| {
        let first = plan9.reservations[0].clone();
        plan9.reservations.push(first);
    });
    refused::<saved::Network>(PLACES[6], &["network.endpoints[", "root_port", "256"], |network| {
        network.endpoints.values_mut().for_each(|endpoint| endpoint.root_port = 256);
    });
    let of_nic = |parts: &[&str], change: fn(&mut saved::Endpoint)| {
        refused::<saved::Network>(PLACES[6], parts, |network| {
            network.endpoints.values_mut().for_each(change)
        });
    };
    of_nic(&[".addresses[0]", "10.1.2.3/33", "IP address"], |nic| nic.addresses[0] = "10.1.2.3/33".into());
    of_nic(&[".addresses[1]", "IP address"], |nic| nic.addresses[1].clear());
    of_nic(&[".routes[0].destination", "default"], |nic| nic.routes[0].destination = "default".into());
    of_nic(&[".routes[0].gateway", "10.1.2.1/24"], |nic| nic.routes[0].gateway = "10.1.2.1/24".into());
    of_nic(&[".neighbours[0].address", "gw"], |nic| nic.neighbours[0].address = "gw".into());
    of_nic(&[".neighbours[0].mac", "hex"], |nic| nic.neighbours[0].mac.clear());
    of_nic(&[".mtu", "0 is outside"], |nic| nic.mtu = 0);
    let container = PLACES[7];
    refused::<saved::Container>(container, &["containers[1].container_id", "identifier"], |container| {
        container.container_id = "../../etc".into();
    });
    refused::<saved::Container>(container, &["containers[1].guest_container_id"], |container| {
        container.guest_container_id = "a/b".into();
    });
    refused::<saved::Container>(container, &["processes[\"../e\"]", "identifier"], |container| {
        let process = container.processes.remove("sh").unwrap();
        container.processes.insert("../e".into(), process);
    });
    for held in ["scsi_reservations", "plan9_reservations"] {
        refused::<saved::Container>(container, &[held, "already stands"], |container| {
            let list = match held {
                "scsi_reservations" => &mut container.scsi_reservations,
                _ => &mut container.plan9_reservations,
            };
            list.push(list[0].clone());
        });
    }
    refused::<saved::Container>(container, &["vpci_devices[1]", "already stands"], |container| {
        container.vpci_devices.push(container.vpci_devices[0].clone());
    });
    refused::<saved::Container>(container, &["layers[0].reservation_id", "16 bytes"], |container| {
        container.layers[0].reservation_id = b"short".to_vec();
    });
    refused::<saved::Container>(container, &["io_retry_timeout", "negative"], |container| {
        container.io_retry_timeout.mut_or_insert_default().seconds = -1;
    });
    refused::<saved::Container>(
        container,
        &["copies[\"/etc/app\"].guest_path", "plain absolute path"],
        |container| {
            container.copies[0].guest_path = "/run/mounts/../../etc".into();
        },
    );
    refused::<saved::Container>(container, &["copies[\"etc\"]", "plain absolute path"], |container| {
        container.copies[1].destination = "etc".into();
    });
    refused::<saved::Container>(container, &["copies[2]", "/etc/app"], |container| {
        container.copies.push(container.copies[0].clone());
    });
    refused::<saved::Container>(container, &["disk_volumes[0].reservation_id", "16 bytes"], |container| {
        container.disk_volumes[0].reservation_id.pop();
    });
    let process = PLACES[8];
    refused::<saved::Process>(process, &[process, "has an exit"], |process| process.exit_code = 1);
    refused::<saved::Process>(process, &[process, "was not created"], |process| {
        process.stage = saved::ProcessStage::PROCESS_STAGE_NOT_CREATED.into();
    });
    refused::<saved::Process>(process, &[process, "exited_at is no time"], |process| {
        process.stage = saved::ProcessStage::PROCESS_STAGE_TERMINATED.into();
        process.exited_at.mut_or_insert_default().nanos = 1_000_000_000;
    });
    refused::<saved::Process>(process, &["io_retry_timeout", "no duration"], |process| {
        process.io_retry_timeout.mut_or_insert_default().nanos = -1;
    });
    refused::<saved::Vm>("config.vm", &["compat_info"], |vm| vm.compat_info.clear());
}

#[test]
fn leftovers_deep_inside_are_found() {
    refused::<saved::Scsi>("config.vm.scsi", &["disks: [65] mounts: [1] field 77"], |scsi| {
        let mount = scsi.disks.get_mut(&65).unwrap().mounts.get_mut(&1).unwrap();
        mount.special_fields.mut_unknown_fields().add_value(77, UnknownValue::Varint(1));
    });
    refused::<saved::Vm>("config.vm", &["options: confidential: field 9"], |vm| {
        let confidential = vm.options.as_mut().unwrap().confidential.as_mut().unwrap();
        confidential.special_fields.mut_unknown_fields().add_value(9, UnknownValue::Varint(1));
    });
    refused::<saved::Plan9>("config.vm.plan9", &["shares: [/srv/data] mount: field 9"], |plan9| {
        let mount = plan9.shares.get_mut("/srv/data").unwrap().mount.as_mut().unwrap();
        mount.special_fields.mut_unknown_fields().add_value(9, UnknownValue::Varint(1));
    });
}
