//! Trees of any shape come back as they were; bytes of any kind are taken or refused.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::super::*;
use super::full::{compat, digest, full, prefix, reservation, slot, token};
use crate::envelope::Payload;
use crate::ids::{ContainerId, ExecId, GuestPid, ReservationId, SandboxId};
use crate::saved;

/// A machine in the making: hands out what may stand once.
struct Machine {
    scsi: SavedScsi,
    plan9: SavedPlan9,
    devices: Vec<String>,
    cards: u8,
    next: u32,
}

impl Machine {
    fn next(&mut self) -> u32 {
        self.next += 1;
        self.next
    }

    /// A disk of its own, mounted at its partition, and the use of it.
    fn plug(&mut self, shape: &DiskShape) -> Option<SavedLayer> {
        let at = slot(u32::try_from(self.scsi.disks.len()).ok().filter(|at| *at < 256)?);
        let number = self.next();
        let reserved = shape.mount.0 == MountStage::Reserved && shape.unmounted;
        let mount = SavedMount {
            guest_path: if reserved { String::new() } else { format!("/m/{}/{number}", shape.text) },
            read_only: shape.digest.is_some(),
            filesystem: shape.text.clone(),
            stage: shape.mount.0,
            encrypted: shape.flags.0,
            options: shape.options.clone(),
            ensure_filesystem: shape.flags.1,
            block_device: shape.flags.2,
            ref_count: number,
        };
        let guest_path = if mount.guest_path.is_empty() || shape.flags.0 {
            format!("/elsewhere/{number}")
        } else {
            mount.guest_path.clone()
        };
        let access = match shape.digest {
            Some(c) => DiskAccess::ReadOnly { digest: digest(c) },
            None if shape.shared => DiskAccess::Shared { token: token(number.to_le_bytes()[0] / 2) },
            None => DiskAccess::Writable,
        };
        let disk = SavedDisk {
            source_path: match shape.flags.1 {
                true => format!("/disks/{}/{number}", shape.text.len()),
                false => shape.text.clone(),
            },
            size: shape.size,
            access,
            stage: shape.stage,
            kind: shape.mount.1,
            mounts: [(shape.partition, mount)].into(),
        };
        self.scsi.disks.insert(at, disk);
        let id = reservation(self.next());
        self.scsi.reservations.insert(id, SavedReservation { slot: at, partition: shape.partition });
        Some(SavedLayer { reservation: id, guest_path })
    }

    fn reserve_share(&mut self, which: &Index) -> Option<ReservationId> {
        let paths: Vec<&String> = self.plan9.shares.keys().collect();
        let path = (!paths.is_empty()).then(|| which.get(&paths).to_string())?;
        let id = reservation(self.next());
        self.plan9.reservations.insert(id, path);
        Some(id)
    }
}

#[derive(Debug, Clone)]
struct DiskShape {
    digest: Option<char>,
    text: String,
    size: u64,
    stage: DiskStage,
    mount: (MountStage, DiskKind),
    unmounted: bool,
    flags: (bool, bool, bool),
    options: Vec<String>,
    partition: u64,
    shared: bool,
}

fn disk(digest: impl Strategy<Value = Option<char>>) -> impl Strategy<Value = DiskShape> {
    let mount = (select(MountStage::ALL), select(DiskKind::ALL));
    let rest = (any::<bool>(), any::<(bool, bool, bool)>(), vec("[^\0]{1,9}", 0..4), any::<(u64, bool)>());
    (digest, "[a-zä ]{1,8}", any::<u64>(), select(DiskStage::ALL), mount, rest).prop_map(
        |(digest, text, size, stage, mount, (unmounted, flags, options, (partition, shared)))| DiskShape {
            digest,
            text,
            size,
            stage,
            mount,
            unmounted,
            flags,
            options,
            partition,
            shared,
        },
    )
}

fn duration() -> impl Strategy<Value = Option<Duration>> {
    let seconds = prop_oneof![Just(0), 0..1000u64, Just(i64::MAX.cast_unsigned())];
    option::of((seconds, 0..1_000_000_000u32).prop_map(|(seconds, nanos)| Duration::new(seconds, nanos)))
}

#[derive(Debug, Clone)]
struct ProcessShape {
    stage: u8,
    exit: (u32, i64, u32, bool),
    text: String,
    oci_process: Vec<u8>,
    io_retry_timeout: Option<Duration>,
    streams: (bool, bool, bool),
    flags: (bool, bool, bool),
}

fn process() -> impl Strategy<Value = ProcessShape> {
    let exit = (any::<u32>(), any::<i64>(), 0..1_000_000_000u32, any::<bool>());
    let flags = (any::<(bool, bool, bool)>(), any::<(bool, bool, bool)>());
    (0..4u8, exit, ".{0,12}", vec(any::<u8>(), 0..40), duration(), flags).prop_map(
        |(stage, exit, text, oci_process, io_retry_timeout, (streams, flags))| ProcessShape {
            stage,
            exit,
            text,
            oci_process,
            io_retry_timeout,
            streams,
            flags,
        },
    )
}

impl ProcessShape {
    fn build(&self, machine: &mut Machine, init_bundle: Option<&str>) -> SavedProcess {
        let (closed, terminal, waited) = self.flags;
        let pid = GuestPid(machine.next());
        let (code, at_seconds, at_nanos, had_pid) = self.exit;
        let mut port = |there: bool| there.then(|| StdioPort(machine.next()));
        SavedProcess {
            stage: match self.stage {
                0 => ProcessStage::NotCreated,
                1 => ProcessStage::Created(pid),
                2 => ProcessStage::Running(pid),
                _ => {
                    ProcessStage::Terminated(had_pid.then_some(pid), SavedExit { code, at_seconds, at_nanos })
                }
            },
            bundle: init_bundle.filter(|_| waited).map_or_else(|| self.text.clone(), str::to_owned),
            oci_process: self.oci_process.clone(),
            io_retry_timeout: self.io_retry_timeout,
            stdin: port(self.streams.0),
            stdout: port(self.streams.1),
            stderr: port(self.streams.2 && !terminal),
            stdin_closed: closed,
            terminal,
            wait_call_id: if waited { machine.next().into() } else { 0 },
        }
    }
}

#[derive(Debug, Clone)]
struct ContainerShape {
    stage: ContainerStage,
    flags: (bool, bool, bool),
    io_retry_timeout: Option<Duration>,
    layers: Vec<DiskShape>,
    scratch: Option<DiskShape>,
    others: Vec<DiskShape>,
    shares: Vec<Index>,
    devices: Vec<Index>,
    init: ProcessShape,
    execs: Vec<ProcessShape>,
}

fn container() -> impl Strategy<Value = ContainerShape> {
    let image = || select(vec![Some('a'), Some('b'), Some('c')]);
    let disks = (
        vec(disk(image()), 0..3),
        option::of(disk(Just(None))),
        vec(disk(select(vec![None, Some('d')])), 0..2),
    );
    let held = (vec(any::<Index>(), 0..3), vec(any::<Index>(), 0..2));
    let processes = (process(), vec(process(), 0..3));
    (select(ContainerStage::ALL), any::<(bool, bool, bool)>(), duration(), disks, held, processes).prop_map(
        |(stage, flags, io_retry_timeout, (layers, scratch, others), (shares, devices), (init, execs))| {
            ContainerShape {
                stage,
                flags,
                io_retry_timeout,
                layers,
                scratch,
                others,
                shares,
                devices,
                init,
                execs,
            }
        },
    )
}

impl ContainerShape {
    fn build(&self, machine: &mut Machine, name: &str, guest: &str, role: ContainerRole) -> SavedContainer {
        let (paused, layers_combined, usual) = self.flags;
        let mut init = self.init.build(machine, None);
        if usual {
            init.bundle = format!("/bundles/{}/{name}", self.layers.len());
        }
        let execs = self.execs.iter().enumerate().map(|(at, exec)| {
            (ExecId::new(format!("exec-{at}")).unwrap(), exec.build(machine, Some(&init.bundle)))
        });
        let execs = execs.collect();
        let devices = self.devices.iter().filter(|_| !machine.devices.is_empty());
        let vpci_devices = devices.map(|device| device.get(&machine.devices).clone()).collect();
        let layers = self.layers.iter().filter_map(|layer| machine.plug(layer)).collect();
        let scratch = self.scratch.as_ref().and_then(|scratch| machine.plug(scratch));
        let others = self.others.iter().filter_map(|other| machine.plug(other));
        let scsi_reservations: BTreeSet<ReservationId> = others.map(|layer| layer.reservation).collect();
        SavedContainer {
            container_id: ContainerId::new(name).unwrap(),
            guest_container_id: ContainerId::new(guest).unwrap(),
            role,
            stage: self.stage,
            paused,
            io_retry_timeout: self.io_retry_timeout,
            layers,
            scratch,
            layers_combined,
            rootfs_path: if usual { format!("/run/{guest}/rootfs") } else { format!("/run/{guest}") },
            plan9_reservations: self.shares.iter().filter_map(|share| machine.reserve_share(share)).collect(),
            vpci_devices,
            copies: self
                .shares
                .iter()
                .enumerate()
                .map(|(at, _)| (format!("/etc/{at}"), format!("/run/copies/{guest}/{at}")))
                .collect(),
            disk_volumes: scsi_reservations
                .iter()
                .enumerate()
                .map(|(at, id)| (format!("/data/{at}"), *id))
                .collect(),
            scsi_reservations,
            init,
            execs,
        }
    }
}

/// What the source's host and the guest call it.
type Card = (String, String);

#[derive(Debug, Clone)]
struct PodShape {
    containers: Vec<ContainerShape>,
    standalone: bool,
    network: Option<(NetworkStage, Vec<Card>, bool, bool)>,
}

fn pod() -> impl Strategy<Value = PodShape> {
    let card = ("[^\\p{Cc}]{1,12}", "[^\\p{Cc}]{1,12}");
    let network = (select(NetworkStage::ALL), vec(card, 0..3), any::<bool>(), any::<bool>());
    (vec(container(), 0..4), any::<bool>(), option::of(network))
        .prop_map(|(containers, standalone, network)| PodShape { containers, standalone, network })
}

impl PodShape {
    fn build(&self, machine: &mut Machine, name: &str) -> SavedPod {
        let renamed = self.standalone;
        let guest = if renamed { format!("{name}-guest") } else { name.to_owned() };
        let standalone = self.standalone && self.containers.len() == 1;
        let containers = self.containers.iter().enumerate().map(|(at, container)| match at {
            0 if standalone => container.build(machine, name, &guest, ContainerRole::Standalone),
            0 => container.build(machine, name, &guest, ContainerRole::Sandbox),
            _ => {
                let name = format!("{name}.{at}");
                let guest = if renamed { format!("{name}-guest") } else { name.clone() };
                container.build(machine, &name, &guest, ContainerRole::Workload)
            }
        });
        let containers = containers.collect();
        let network = self.network.as_ref().map(|(stage, cards, routing, supported)| {
            let cards = if *stage == NetworkStage::NotConfigured { &[][..] } else { cards };
            let endpoints: BTreeMap<_, _> = cards
                .iter()
                .map(|(endpoint_id, name)| {
                    let number = machine.next();
                    machine.cards += 1;
                    let endpoint = SavedEndpoint {
                        endpoint_id: endpoint_id.clone(),
                        mac: format!("52:54:00:00:{:02x}:{:02x}", number >> 8 & 255, number & 255),
                        name: name.clone(),
                        root_port: 255 - machine.cards,
                        mtu: 68 + number,
                        addresses: vec![prefix(&format!("10.{}.{}.1/24", number >> 8 & 255, number & 255))],
                        routes: vec![SavedRoute {
                            destination: prefix("fd00::/8"),
                            gateway: number.is_multiple_of(2).then(|| "fe80::1".parse().unwrap()),
                            source: number.is_multiple_of(3).then(|| "fd00::7".parse().unwrap()),
                            metric: number,
                            on_link: number.is_multiple_of(5),
                        }],
                        neighbours: Vec::new(),
                    };
                    (format!("nic {number}"), endpoint)
                })
                .collect();
            SavedNetwork {
                namespace_id: if endpoints.is_empty() { String::new() } else { format!("ns of {name}") },
                policy_based_routing: *routing,
                namespace_supported: *supported,
                stage: *stage,
                endpoints,
            }
        });
        SavedPod {
            pod_id: SandboxId::new(name).unwrap(),
            guest_pod_id: SandboxId::new(guest).unwrap(),
            network,
            containers,
        }
    }
}

type Mounted = Option<(bool, ShareMountStage, u32)>;

fn share() -> impl Strategy<Value = (String, bool, bool, Vec<String>, ShareStage, Mounted)> {
    let mount = option::of((any::<bool>(), select(ShareMountStage::ALL), any::<u32>()));
    let names = vec("[a-zä][^/\0]{0,8}", 0..3);
    ("[a-zä ]{0,9}", any::<bool>(), any::<bool>(), names, select(ShareStage::ALL), mount)
}

fn options() -> impl Strategy<Value = SandboxOptions> {
    let confidential = option::of((".{0,30}", ".{0,9}", ".{0,9}"));
    (any::<[bool; 4]>(), select(vec!["amd64", "arm64"]), confidential).prop_map(
        |(flags, architecture, confidential)| SandboxOptions {
            no_writable_file_shares: flags[0],
            scratch_encryption: flags[1],
            policy_based_routing: flags[2],
            architecture: architecture.into(),
            fully_physically_backed: flags[3],
            confidential: confidential.map(|(policy, enforcer, reference)| Confidential {
                security_policy: policy,
                security_policy_enforcer: enforcer,
                reference_info_file: reference,
            }),
        },
    )
}

/// Any valid tree.
pub(super) fn tree() -> impl Strategy<Value = SavedTree> {
    let device = ("[^\\p{Cc}]{1,12}", any::<u32>(), select(VpciStage::ALL), any::<u32>());
    let tables = (vec(share(), 0..4), vec(device, 0..4), 1..=4u8);
    let machine = (".{0,12}", select(VmStage::ALL), options(), vec(any::<u8>(), 0..64), any::<bool>());
    (machine, tables, vec(pod(), 1..4)).prop_map(
        |((vm_id, stage, options, document, plain_streams), (shares, devices, controllers), pods)| {
            let mut vpci = SavedVpci::default();
            for (at, (instance, virtual_function_index, stage, ref_count)) in devices.into_iter().enumerate()
            {
                let device = SavedVpciDevice {
                    instance_id: format!("{at} {instance}"),
                    virtual_function_index,
                    stage,
                    ref_count,
                };
                vpci.devices.insert(format!("e0000000-0000-4000-8000-{at:012}"), device);
            }
            let mut plan9 = SavedPlan9::default();
            for (at, (path, read_only, restrict, allowed_names, stage, mount)) in
                shares.into_iter().enumerate()
            {
                let share = SavedShare {
                    name: (2 * at).to_string(),
                    read_only: read_only || options.no_writable_file_shares,
                    restrict,
                    allowed_names,
                    stage,
                    mount: mount.map(|(read_only, stage, ref_count)| SavedShareMount {
                        read_only,
                        stage,
                        ref_count,
                        guest_path: format!("/shares/{at}"),
                    }),
                };
                plan9.no_writable_file_shares = options.no_writable_file_shares;
                plan9.name_counter = 2 * at as u64 + 1;
                plan9.shares.insert(format!("/srv/{path}/{at}"), share);
            }
            let scsi = SavedScsi { controllers, ..SavedScsi::default() };
            let devices = vpci.devices.keys().cloned().collect();
            let mut machine = Machine { scsi, plan9, devices, cards: 0, next: 0 };
            let pods: Vec<SavedPod> = pods
                .iter()
                .enumerate()
                .map(|(at, pod)| pod.build(&mut machine, &format!("pod{at}")))
                .collect();
            SavedTree {
                vm: SavedVm {
                    vm_id,
                    stage,
                    options,
                    next_port: StdioPort(machine.next + 1),
                    bridge_next_id: u64::from(machine.next) + 1,
                    plain_streams,
                    compat: compat(),
                    document,
                    scsi: machine.scsi,
                    vpci,
                    plan9: machine.plan9,
                },
                pods,
            }
        },
    )
}

/// What was let through can be saved again, and is the same.
fn taken_whole_or_refused(any: &Any) {
    if let Ok(tree) = SavedTree::open(any) {
        let again = tree.clone().seal().expect("what was imported can be exported");
        assert_eq!(SavedTree::open(&again).unwrap(), tree);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn save_then_import_is_identity(tree in tree()) {
        let sealed = tree.clone().seal().unwrap();
        let opened = SavedTree::open(&sealed).unwrap();
        prop_assert_eq!(&opened, &tree);
        prop_assert_eq!(opened.clone().seal().unwrap(), sealed);
        let writable: BTreeSet<Slot> = tree.vm.scsi.disks.iter()
            .filter(|(_, disk)| disk.access == DiskAccess::Writable).map(|(slot, _)| *slot).collect();
        prop_assert_eq!(opened.mirrored_slots(), writable);
    }

    #[test]
    fn no_bytes_panic_the_importer(value in vec(any::<u8>(), 0..300)) {
        // Also with a good beginning, so that the rest is reached.
        for prefix in [&[][..], &[8, 1], &[8, 1, 0x12]] {
            let value = [prefix, &value].concat();
            let any = Any { type_url: saved::Migration::type_url(), value, ..Any::default() };
            taken_whole_or_refused(&any);
        }
    }

    #[test]
    fn changed_bytes_never_panic(tree in tree(), at in any::<Index>(), bytes in vec(any::<u8>(), 0..6), cut in 0..6usize) {
        let mut any = tree.seal().unwrap();
        let at = at.index(any.value.len());
        let end = (at + cut).min(any.value.len());
        any.value.splice(at..end, bytes);
        taken_whole_or_refused(&any);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// In place, so that all lengths hold and what is inside is reached.
    #[test]
    fn flipped_bits_never_panic(flips in vec((any::<Index>(), 0..8u8), 1..3)) {
        let mut any = full().seal().unwrap();
        for (at, bit) in flips {
            let at = at.index(any.value.len());
            any.value[at] ^= 1 << bit;
        }
        taken_whole_or_refused(&any);
    }
}
