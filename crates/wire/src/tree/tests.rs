mod arbitrary;
mod full;
mod golden;
mod refusals;
mod tampered;

use std::collections::BTreeSet;

use self::full::{full, slot};
use super::*;

#[test]
fn what_is_sealed_opens_and_names_its_writable_disks() {
    let sealed = full().seal().unwrap();
    let opened = SavedTree::open(&sealed).unwrap();
    assert_eq!(opened, full());
    assert_eq!(opened.mirrored_slots(), BTreeSet::from([slot(1), slot(65)]));
    assert_eq!(opened.containers().count(), 3);
    let execs: Vec<&str> = opened.pods[0].containers[1].processes().map(|(id, _)| id).collect();
    assert_eq!(execs, ["", "logs", "sh"]);
}

#[test]
fn equal_trees_have_equal_bytes() {
    assert_eq!(full().seal().unwrap(), full().seal().unwrap());
}

#[test]
fn what_was_never_used_has_no_payload() {
    let mut tree = full();
    tree.vm.plan9 = SavedPlan9::default();
    tree.vm.vpci = SavedVpci::default();
    for container in tree.pods.iter_mut().flat_map(|pod| &mut pod.containers) {
        container.plan9_reservations.clear();
        container.vpci_devices.clear();
    }
    tree.pods[0].network = None;
    let sealed = tree.clone().seal().unwrap();
    for name in ["plan9", "vpci", "network"] {
        let url = format!("type.dunlin.dev/dunlin.{name}.v1");
        let there = |any: &Any| any.value.windows(url.len()).any(|bytes| bytes == url.as_bytes());
        assert!(!there(&sealed), "{name}");
        assert!(there(&full().seal().unwrap()), "{name}");
    }
    assert_eq!(SavedTree::open(&sealed).unwrap(), tree);
}

#[test]
fn the_first_of_each_stage_is_the_payloads_zero() {
    use protobuf::Enum;

    use crate::saved;
    macro_rules! begins {
        ($($name:ident at $first:ident;)*) => {$(
            assert_eq!($name::default(), $name::$first);
            for (at, kind) in $name::ALL.iter().enumerate() {
                assert_eq!(saved::$name::from(*kind).value(), i32::try_from(at).unwrap());
                assert_eq!($name::from(saved::$name::from(*kind)), *kind);
            }
            assert_eq!($name::ALL.len(), saved::$name::VALUES.len());
        )*};
    }
    begins! {
        VmStage at NotCreated;
        NetworkStage at NotConfigured;
        ContainerStage at NotCreated;
        DiskStage at Reserved;
        DiskKind at VirtualDisk;
        MountStage at Reserved;
        ShareStage at Reserved;
        ShareMountStage at Reserved;
        VpciStage at Reserved;
    }
    assert_eq!(saved::ProcessStage::default(), saved::ProcessStage::PROCESS_STAGE_NOT_CREATED);
}

/// Each stage of each controller comes back, wherever it stands.
#[test]
fn every_stage_survives() {
    let survives = |change: &dyn Fn(&mut SavedTree)| {
        let mut tree = full();
        change(&mut tree);
        assert_eq!(SavedTree::open(&tree.clone().seal().unwrap()).unwrap(), tree);
    };
    for stage in VmStage::ALL {
        survives(&|tree| tree.vm.stage = *stage);
    }
    for stage in ContainerStage::ALL {
        survives(&|tree| tree.pods[0].containers[1].stage = *stage);
    }
    for stage in NetworkStage::ALL {
        survives(&|tree| {
            let network = tree.pods[0].network.as_mut().unwrap();
            network.stage = *stage;
            if *stage == NetworkStage::NotConfigured {
                network.endpoints.clear();
            }
        });
    }
    for (stage, kind) in DiskStage::ALL.iter().zip(DiskKind::ALL.iter().cycle()) {
        survives(&|tree| {
            let disk = tree.vm.scsi.disks.get_mut(&slot(65)).unwrap();
            (disk.stage, disk.kind) = (*stage, *kind);
        });
    }
    for stage in MountStage::ALL {
        survives(&|tree| {
            let disk = tree.vm.scsi.disks.get_mut(&slot(65)).unwrap();
            disk.mounts.get_mut(&1).unwrap().stage = *stage;
        });
    }
    for stage in ShareStage::ALL {
        survives(&|tree| tree.vm.plan9.shares.values_mut().for_each(|share| share.stage = *stage));
    }
    for stage in ShareMountStage::ALL {
        survives(&|tree| {
            let share = tree.vm.plan9.shares.get_mut(full::SHARED).unwrap();
            share.mount.as_mut().unwrap().stage = *stage;
        });
    }
    for stage in VpciStage::ALL {
        survives(&|tree| tree.vm.vpci.devices.values_mut().for_each(|device| device.stage = *stage));
    }
    for role in [ContainerRole::Sandbox, ContainerRole::Standalone] {
        survives(&|tree| tree.pods[1].containers[0].role = role);
    }
}

#[test]
fn a_reserved_mount_needs_no_path() {
    let mut tree = full();
    let disk = tree.vm.scsi.disks.get_mut(&slot(65)).unwrap();
    let mount = disk.mounts.get_mut(&1).unwrap();
    (mount.stage, mount.guest_path) = (MountStage::Reserved, String::new());
    assert_eq!(SavedTree::open(&tree.clone().seal().unwrap()).unwrap(), tree);
}

#[test]
fn what_is_too_large_to_arrive_is_not_sealed() {
    let mut tree = full();
    tree.pods[0].containers[1].init.oci_process = vec![b' '; 4 << 20];
    let error = tree.seal().unwrap_err().to_string();
    assert!(error.starts_with("config.pods[0].containers[1].processes[\"\"]: 4194"), "{error}");
    // Each fits, and all of them do not.
    let mut tree = full();
    for process in tree.pods[0].containers[1].execs.values_mut() {
        process.oci_process = vec![b' '; (4 << 20) - 1024];
    }
    tree.pods[0].containers[1].init.oci_process = vec![b' '; 1 << 20];
    let error = tree.seal().unwrap_err().to_string();
    assert!(error.starts_with("config.pods[0].containers[1]: 9"), "{error}");
}
