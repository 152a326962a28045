//! What contradicts itself is refused, by a source and by a destination, with the place's name.

use std::time::Duration;

use super::super::*;
use super::full::{DEVICE, NIC, SHARED, container, full, prefix, process, reservation, slot};
use crate::ids::{ContainerId, ExecId, GuestPid, SandboxId};

type Change = fn(&mut SavedTree);

/// Breaks the tree in one place each: name, what the refusal says, how.
fn refused(rules: &[(&str, &[&str], Change)]) {
    for (name, parts, change) in rules {
        let mut tree = full();
        change(&mut tree);
        // Past the check of `seal`, as a source of another make would.
        let error = super::super::seal::migration(tree.clone()).and_then(|config| SavedTree::open(&config));
        let error = error.expect_err(name).to_string();
        for part in *parts {
            assert!(error.contains(part), "{name}: {error}");
        }
        let sealed = tree.seal().expect_err(name).to_string();
        assert_eq!(sealed, error, "{name}: what cannot be imported is not exported");
    }
}

fn web(tree: &mut SavedTree) -> &mut SavedContainer {
    &mut tree.pods[0].containers[1]
}

fn shell(tree: &mut SavedTree) -> &mut SavedProcess {
    web(tree).execs.get_mut(&ExecId::new("sh").unwrap()).unwrap()
}

fn alone(tree: &mut SavedTree) -> &mut SavedContainer {
    &mut tree.pods[1].containers[0]
}

fn share(tree: &mut SavedTree) -> &mut SavedShare {
    tree.vm.plan9.shares.get_mut(SHARED).unwrap()
}

fn other_share(tree: &mut SavedTree) -> &mut SavedShare {
    tree.vm.plan9.shares.get_mut("/srv/other").unwrap()
}

fn network(tree: &mut SavedTree) -> &mut SavedNetwork {
    tree.pods[0].network.as_mut().unwrap()
}

fn nic(tree: &mut SavedTree) -> &mut SavedEndpoint {
    network(tree).endpoints.get_mut(NIC).unwrap()
}

/// A network in the second pod whose card differs from the first's in everything but what is changed.
fn second_network(tree: &mut SavedTree, change: fn(&mut SavedEndpoint)) -> &mut SavedNetwork {
    let mut network = network(tree).clone();
    let mut nic = network.endpoints.remove(NIC).unwrap();
    (nic.mac, nic.root_port) = ("52:54:00:12:ab:02".into(), 2);
    change(&mut nic);
    network.endpoints.insert("another".into(), nic);
    tree.pods[1].network.insert(network)
}

fn disk(tree: &mut SavedTree, n: u32) -> &mut SavedDisk {
    tree.vm.scsi.disks.get_mut(&slot(n)).unwrap()
}

#[test]
fn dangling_references() {
    refused(&[
        ("layer", &["pods[0].containers[0].layers[0]", "SCSI reservation"], |tree| {
            tree.pods[0].containers[0].layers[0].reservation = reservation(77);
        }),
        ("scratch", &["pods[1].containers[0].scratch", "SCSI reservation"], |tree| {
            tree.vm.scsi.reservations.remove(&reservation(4));
        }),
        ("scratch elsewhere", &["containers[1].scratch.reservation_id", "SCSI reservation"], |tree| {
            tree.vm.scsi.reservations.remove(&reservation(3));
        }),
        ("disk", &["scsi.reservations[", "disk 64"], |tree| {
            tree.vm.scsi.disks.remove(&slot(64));
        }),
        ("held disk", &["containers[1].scsi_reservations", "SCSI reservation", "00063"], |tree| {
            web(tree).scsi_reservations.insert(reservation(99));
        }),
        (
            "disk of a mount",
            &["containers[1].disk_volumes[\"/data\"]", "SCSI reservation", "00003"],
            |tree| {
                web(tree).disk_volumes.insert("/data".into(), reservation(3));
            },
        ),
        ("held share", &["containers[1].plan9_reservations", "Plan9 reservation", "00063"], |tree| {
            web(tree).plan9_reservations.insert(reservation(99));
        }),
        ("a disk is no share", &["pods[1].containers[0].plan9_reservations"], |tree| {
            alone(tree).plan9_reservations.insert(reservation(3));
        }),
        ("held device", &["containers[1].vpci_devices", "VPCI device", DEVICE], |tree| {
            tree.vm.vpci.devices.clear();
        }),
        ("share", &["plan9.reservations[", "share /srv/data"], |tree| {
            tree.vm.plan9.shares.remove(SHARED);
        }),
    ]);
}

#[test]
fn what_stands_twice_among_pods() {
    refused(&[
        ("pod", &["pods[2]", "pod id pod", "pods[0]"], |tree| {
            let guest_pod_id = SandboxId::new("third").unwrap();
            let pod =
                SavedPod { containers: Vec::new(), network: None, guest_pod_id, ..tree.pods[0].clone() };
            tree.pods.push(pod);
        }),
        ("guest pod", &["pods[2]", "guest pod id pod-in-guest", "pods[0]"], |tree| {
            let pod_id = SandboxId::new("third").unwrap();
            let pod = SavedPod { containers: Vec::new(), network: None, pod_id, ..tree.pods[0].clone() };
            tree.pods.push(pod);
        }),
        ("copy", &["guest path /run/mounts/copies/web/0", "copies[\"/more\"]"], |tree| {
            web(tree).copies.insert("/more".into(), "/run/mounts/copies/web/0".into());
        }),
        ("copy over a disk", &["guest path /run/s2", "pods[1].containers[0].copies"], |tree| {
            alone(tree).copies.insert("/more".into(), "/run/s2".into());
        }),
        ("disk of two mounts", &["SCSI reservation", "disk_volumes[\"/more\"]"], |tree| {
            web(tree).disk_volumes.insert("/more".into(), reservation(5));
        }),
        ("container", &["container id pod", "containers[0]", "containers[1]"], |tree| {
            web(tree).container_id = ContainerId::new("pod").unwrap();
        }),
        ("container of another pod", &["container id web", "pods[0].containers[1]", "pods[1]"], |tree| {
            alone(tree).container_id = ContainerId::new("web").unwrap();
            tree.pods[1].pod_id = SandboxId::new("web").unwrap();
        }),
        ("guest container", &["guest container id pod-in-guest"], |tree| {
            web(tree).guest_container_id = ContainerId::new("pod-in-guest").unwrap();
        }),
        ("rootfs", &["rootfs path /run/web/rootfs", "pods[1].containers[0]"], |tree| {
            alone(tree).rootfs_path = "/run/web/rootfs".into();
        }),
        ("port", &["stdio port", "processes[\"sh\"]", "processes[\"\"]"], |tree| {
            let port = web(tree).init.stdout;
            shell(tree).stdout = port;
        }),
        ("wait", &["wait call id 20", "processes[\"sh\"]"], |tree| {
            shell(tree).wait_call_id = 20;
        }),
        ("pid", &["guest pid 20", "pods[1]"], |tree| {
            alone(tree).init.stage = ProcessStage::Running(GuestPid(20));
        }),
        ("layer's reservation", &["SCSI reservation", "pods[1].containers[0].layers[0]"], |tree| {
            alone(tree).layers[0].reservation = reservation(1);
        }),
        (
            "scratch",
            &["SCSI reservation", "pods[1].containers[0].scratch", "containers[1].scratch"],
            |tree| {
                alone(tree).scratch.as_mut().unwrap().reservation = reservation(3);
            },
        ),
        ("scratch held once more", &["SCSI reservation", "containers[1].scsi_reservations"], |tree| {
            web(tree).scsi_reservations.insert(reservation(3));
        }),
        ("held disk", &["SCSI reservation", "pods[1].containers[0].scsi_reservations"], |tree| {
            alone(tree).scsi_reservations.insert(reservation(5));
        }),
        ("held share", &["Plan9 reservation", "pods[1].containers[0].plan9_reservations"], |tree| {
            alone(tree).plan9_reservations.insert(reservation(20));
        }),
    ]);
}

#[test]
fn what_stands_twice_in_the_machines_tables_and_networks() {
    refused(&[
        ("writable disk used twice", &["disk 64", "stands at"], |tree| {
            let second = SavedReservation { slot: slot(64), partition: 0 };
            tree.vm.scsi.reservations.insert(reservation(9), second);
        }),
        ("mounts", &["guest path /run/s1", "disks[64].mounts[0].guest_path", "disks[1].mounts[0]"], |tree| {
            disk(tree, 64).mounts.get_mut(&0).unwrap().guest_path = "/run/s1".into();
            alone(tree).scratch.as_mut().unwrap().guest_path = "/run/s1".into();
        }),
        ("a share over a disk", &["guest path /run/data", "/srv/data", "disks[65].mounts[1]"], |tree| {
            share(tree).mount.as_mut().unwrap().guest_path = "/run/data".into();
        }),
        ("share name", &["share name 7", "/srv/other", "/srv/data"], |tree| {
            other_share(tree).name = "7".into();
        }),
        ("device", &["device 0000:03:00.0 function 2", "vpci.devices"], |tree| {
            let device = tree.vm.vpci.devices[DEVICE].clone();
            tree.vm.vpci.devices.insert("e0000000-0000-4000-8000-000000000001".into(), device);
        }),
        ("NIC", &["NIC a0000000", "pods[1].network", "pods[0].network"], |tree| {
            let network = second_network(tree, |_| ());
            let nic = network.endpoints.remove("another").unwrap();
            network.endpoints.insert(NIC.into(), nic);
        }),
        ("MAC", &["MAC address 52:54:00:12:ab:01", "pods[1].network", "pods[0].network"], |tree| {
            second_network(tree, |nic| nic.mac = "52:54:00:12:ab:01".into());
        }),
        ("root port", &["root port 1", "pods[1].network", "pods[0].network"], |tree| {
            second_network(tree, |nic| nic.root_port = 1);
        }),
    ]);
}

#[test]
fn roles_that_do_not_fit() {
    refused(&[
        ("two sandboxes", &["pods[0].containers[1].role", "sandbox container", "containers[0]"], |tree| {
            web(tree).role = ContainerRole::Sandbox;
        }),
        ("no sandbox", &["pods[0].containers", "no sandbox container"], |tree| {
            tree.pods[0].containers[0].role = ContainerRole::Workload;
        }),
        ("a lone workload", &["pods[1].containers", "no sandbox container"], |tree| {
            alone(tree).role = ContainerRole::Workload;
        }),
        ("not alone", &["pods[0].containers[1].role", "stands alone", "2 containers"], |tree| {
            web(tree).role = ContainerRole::Standalone;
        }),
        ("not alone with a workload", &["pods[1].containers[0].role", "stands alone"], |tree| {
            tree.pods[1].containers.push(container("late", 40));
        }),
        ("the guest's pod", &["pods[0].containers[0].guest_container_id", "pod-in-guest", "other"], |tree| {
            tree.pods[0].guest_pod_id = SandboxId::new("other").unwrap();
        }),
        ("the pod", &["pods[0].containers[0].container_id", "other"], |tree| {
            tree.pods[0].pod_id = SandboxId::new("other").unwrap();
        }),
        ("the guest's lone pod", &["pods[1].containers[0].guest_container_id"], |tree| {
            alone(tree).guest_container_id = ContainerId::new("other").unwrap();
        }),
    ]);
}

#[test]
fn contradictions_of_disks_and_processes() {
    refused(&[
        ("a copy and a disk", &["containers[1].disk_volumes[\"/etc/app\"]", "a copy and a disk"], |tree| {
            web(tree).disk_volumes.insert("/etc/app".into(), reservation(6));
        }),
        ("scratch on a read-only disk", &["scratch", "read-only"], |tree| {
            let unused = SavedReservation { slot: slot(0), partition: 0 };
            tree.vm.scsi.reservations.insert(reservation(9), unused);
            web(tree).scratch.as_mut().unwrap().reservation = reservation(9);
        }),
        ("layer on a writable disk", &["layers[0]", "writable"], |tree| {
            web(tree).layers[0].reservation = reservation(4);
        }),
        ("controller", &["disks[64]", "controller 1 of 1"], |tree| tree.vm.scsi.controllers = 1),
        ("no controller", &["num_controllers", "0 controllers"], |tree| tree.vm.scsi.controllers = 0),
        ("controllers", &["num_controllers", "5 controllers"], |tree| tree.vm.scsi.controllers = 5),
        ("next port", &["stdio port", "next free one"], |tree| tree.vm.next_port = StdioPort(0x4000_0002)),
        ("next id", &["wait call id", "next free one"], |tree| tree.vm.bridge_next_id = 5),
        ("tty with stderr", &["processes[\"\"]", "terminal"], |tree| web(tree).init.terminal = true),
        ("no pods", &["config.pods", "missing"], |tree| tree.pods.clear()),
        ("rootfs", &["rootfs_path", "plain absolute path"], |tree| {
            web(tree).rootfs_path = "/run/../etc".into();
        }),
        ("layer's path", &["layers[0].guest_path", "plain absolute path"], |tree| {
            web(tree).layers[0].guest_path = "run/l".into();
        }),
        ("mount without a path", &["disks[65].mounts[1].guest_path"], |tree| {
            disk(tree, 65).mounts.get_mut(&1).unwrap().guest_path.clear();
        }),
        ("empty mount option", &["disks[65].mounts[1].options[1]"], |tree| {
            disk(tree, 65).mounts.get_mut(&1).unwrap().options[1].clear();
        }),
        ("container's duration", &["containers[1].io_retry_timeout", "duration"], |tree| {
            web(tree).io_retry_timeout = Some(Duration::from_secs(u64::MAX));
        }),
        ("process's duration", &["processes[\"sh\"].io_retry_timeout", "duration"], |tree| {
            shell(tree).io_retry_timeout = Some(Duration::MAX);
        }),
        ("architecture", &["vm.options.architecture", "s390x", "amd64"], |tree| {
            tree.vm.options.architecture = "s390x".into();
        }),
    ]);
}

#[test]
fn contradictions_of_shares_devices_and_networks() {
    refused(&[
        ("name counter", &["shares[\"/srv/other\"].name", "8", "next free one"], |tree| {
            tree.vm.plan9.name_counter = 8;
        }),
        ("share name", &["shares[\"/srv/data\"].name", "decimal"], |tree| share(tree).name = "07".into()),
        ("no share name", &["shares[\"/srv/data\"].name", "decimal"], |tree| share(tree).name.clear()),
        ("writable share", &["shares[\"/srv/data\"].read_only"], |tree| share(tree).read_only = false),
        ("policy", &["plan9.no_writable_file_shares", "options"], |tree| {
            tree.vm.options.no_writable_file_shares = false;
        }),
        ("host path", &["plan9.shares[\"srv\"]", "plain absolute path"], |tree| {
            let share = other_share(tree).clone();
            tree.vm.plan9.shares.remove("/srv/other");
            tree.vm.plan9.shares.insert("srv".into(), share);
        }),
        ("allowed name", &["shares[\"/srv/data\"].allowed_names[0]", "file's name"], |tree| {
            share(tree).allowed_names[0] = "../hosts".into();
        }),
        ("share's mount", &["shares[\"/srv/data\"].mount.guest_path"], |tree| {
            share(tree).mount.as_mut().unwrap().guest_path.clear();
        }),
        ("device id", &["vpci.devices[nvme]", "UUID"], |tree| {
            let device = tree.vm.vpci.devices[DEVICE].clone();
            tree.vm.vpci.devices.insert("nvme".into(), device);
        }),
        ("instance", &["vpci.devices[", "instance_id"], |tree| {
            tree.vm.vpci.devices.get_mut(DEVICE).unwrap().instance_id.clear();
        }),
        ("held device's id", &["containers[1].vpci_devices[1]", "UUID"], |tree| {
            web(tree).vpci_devices.insert("nvme".into());
        }),
        ("not configured", &["pods[0].network", "1 endpoints"], |tree| {
            network(tree).stage = NetworkStage::NotConfigured;
        }),
        ("namespace", &["pods[0].network.namespace_id", "missing"], |tree| {
            network(tree).namespace_id.clear();
        }),
        ("MAC", &["network.endpoints[", ".mac", "hex"], |tree| nic(tree).mac = "52:54:00:12:AB:01".into()),
        ("short MAC", &[".mac", "hex"], |tree| nic(tree).mac = "52:54:00:12:ab".into()),
        ("group MAC", &[".mac", "one network card"], |tree| nic(tree).mac = "53:54:00:12:ab:01".into()),
        ("group MAC, by a letter", &[".mac", "one network card"], |tree| {
            nic(tree).mac = "0b:54:00:12:ab:01".into();
        }),
        ("zero MAC", &[".mac", "one network card"], |tree| nic(tree).mac = "00:00:00:00:00:00".into()),
        ("interface", &["network.endpoints[", ".name", "control"], |tree| nic(tree).name = "eth\n0".into()),
        ("endpoint", &["network.endpoints[", ".endpoint_id"], |tree| nic(tree).endpoint_id.clear()),
        ("MTU", &["network.endpoints[", ".mtu", "67", "68 to 65535"], |tree| nic(tree).mtu = 67),
        ("large MTU", &[".mtu", "65536"], |tree| nic(tree).mtu = 65_536),
        ("address twice", &[".addresses[2]", "10.1.2.3", "already stands at", ".addresses[0]"], |tree| {
            nic(tree).addresses.push(prefix("10.1.2.3/16"));
        }),
        ("source's family", &[".routes[1].source", "10.1.2.3", "another family"], |tree| {
            nic(tree).routes[1].source = Some([10, 1, 2, 3].into());
        }),
        ("neighbour's MAC", &[".neighbours[0].mac", "one network card"], |tree| {
            nic(tree).neighbours[0].1 = "ff:ff:ff:ff:ff:ff".into();
        }),
    ]);
}

#[test]
fn too_many() {
    refused(&[
        ("pods", &["config.pods", "17", "16"], |tree| {
            let ids = (2..17).map(|n| SandboxId::new(format!("p{n}")).unwrap());
            let empty = |id: SandboxId| SavedPod {
                pod_id: id.clone(),
                guest_pod_id: id,
                network: None,
                containers: Vec::new(),
            };
            tree.pods.extend(ids.map(empty));
        }),
        ("containers", &["pods[0].containers", "257", "256"], |tree| {
            let more = (100..355).map(|n| container(&format!("c{n}"), n));
            tree.pods[0].containers.extend(more);
        }),
        ("processes", &["pods[1].containers[0].processes", "1025", "1024"], |tree| {
            let more = (0..1024).map(|n| {
                let ended = ProcessStage::NotCreated;
                let none = SavedProcess { stage: ended, wait_call_id: 0, ..process(1, 1) };
                let exec = SavedProcess { stdout: None, stderr: None, ..none };
                (ExecId::new(format!("e{n}")).unwrap(), exec)
            });
            alone(tree).execs = more.collect();
        }),
        ("layers", &["pods[1].containers[0].layers", "257", "256"], |tree| {
            let layer = alone(tree).layers[0].clone();
            alone(tree).layers = vec![layer; 257];
        }),
        ("reservations", &["scsi.reservations", "16385", "16384"], |tree| {
            let image = SavedReservation { slot: slot(0), partition: 0 };
            tree.vm.scsi.reservations.extend((100..16_478).map(|n| (reservation(n), image)));
        }),
        ("share reservations", &["plan9.reservations", "16385", "16384"], |tree| {
            let more = (100..16_483).map(|n| (reservation(n), SHARED.to_owned()));
            tree.vm.plan9.reservations.extend(more);
        }),
        ("held disks", &["containers[1].scsi_reservations", "16385", "16384"], |tree| {
            web(tree).scsi_reservations.extend((100..16_483).map(reservation));
        }),
        ("held shares", &["containers[1].plan9_reservations", "16385", "16384"], |tree| {
            web(tree).plan9_reservations.extend((100..16_484).map(reservation));
        }),
        ("held devices", &["containers[1].vpci_devices", "65", "64"], |tree| {
            let more = (0..64).map(|n| format!("e0000000-0000-4000-8000-{n:012}"));
            web(tree).vpci_devices.extend(more);
        }),
        ("mounts", &["disks[65].mounts", "130", "129"], |tree| {
            let mount = disk(tree, 65).mounts[&1].clone();
            disk(tree, 65).mounts.extend((3..131).map(|partition| (partition, mount.clone())));
        }),
        ("mount options", &["disks[65].mounts[1].options", "65", "64"], |tree| {
            disk(tree, 65).mounts.get_mut(&1).unwrap().options = vec!["ro".into(); 65];
        }),
        ("shares", &["plan9.shares", "1025", "1024"], |tree| {
            let share = other_share(tree).clone();
            tree.vm.plan9.shares.extend((0..1023).map(|n| (format!("/srv/{n}"), share.clone())));
        }),
        ("allowed names", &["allowed_names", "1025", "1024"], |tree| {
            share(tree).allowed_names = vec!["a".into(); 1025];
        }),
        ("devices", &["vpci.devices", "65", "64"], |tree| {
            let device = tree.vm.vpci.devices[DEVICE].clone();
            let more = (0..64).map(|n| (format!("e0000000-0000-4000-8000-{n:012}"), device.clone()));
            tree.vm.vpci.devices.extend(more);
        }),
        ("endpoints", &["pods[0].network.endpoints", "33", "32"], |tree| {
            let one = nic(tree).clone();
            network(tree).endpoints.extend((0..32).map(|n| (format!("n{n}"), one.clone())));
        }),
        ("addresses", &[".addresses", "65", "64"], |tree| {
            nic(tree).addresses = (0..65).map(|n| prefix(&format!("10.0.0.{n}/8"))).collect();
        }),
        ("routes", &[".routes", "513", "512"], |tree| {
            let one = nic(tree).routes[1];
            nic(tree).routes = vec![one; 513];
        }),
        ("neighbours", &[".neighbours", "1025", "1024"], |tree| {
            let one = nic(tree).neighbours[0].clone();
            nic(tree).neighbours = vec![one; 1025];
        }),
    ]);
}
