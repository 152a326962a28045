use proptest::prelude::*;
use protobuf::{EnumOrUnknown, Message, UnknownValue};

use super::*;
use crate::saved;

/// Field 1, varint 1: how each payload of version 1 begins.
const V1: &str = "0801";
/// And of version 2.
const V2: &str = "0802";

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn text(number: u8, value: &str) -> String {
    format!("{:02x}{:02x}{}", number << 3 | 2, value.len(), hex(value.as_bytes()))
}

/// The bytes of a version must be readable for as long as that version may be in flight.
fn golden<T: Payload + Clone + PartialEq>(payload: &T, url: &str, bytes: &str) {
    let any = seal(payload.clone());
    assert_eq!(any.type_url, url);
    let length = bytes.len() / 2;
    assert!(length < 128, "one byte says the length");
    assert_eq!(hex(&any.value), format!("{bytes}a006{length:02x}"), "{url}");
    assert_eq!(open::<T>(&any, &"here").unwrap(), *payload);
}

#[test]
fn golden_migration() {
    let mut payload = saved::Migration { schema_version: 1, ..Default::default() };
    let vm = Any { type_url: "u".into(), value: vec![7], ..Any::default() };
    payload.vm = Some(vm.clone()).into();
    payload.pods.push(vm);
    golden(
        &payload,
        "type.dunlin.dev/dunlin.migration.v1",
        &format!("{V1}1206{any}1a06{any}", any = "0a0175120107"),
    );
}

#[test]
fn golden_vm() {
    let payload = saved::Vm {
        schema_version: 2,
        vm_id: "pod@vm".into(),
        next_port: 0x4000_0004,
        bridge_next_id: 300,
        compat_info: b"{}".to_vec(),
        document: b"[]".to_vec(),
        plain_streams: true,
        ..Default::default()
    };
    let expected = format!("{V2}{}20848080800428ac0232027b7d3a025b5d6001", text(2, "pod@vm"));
    golden(&payload, "type.dunlin.dev/dunlin.vm.v1", &expected);
}

#[test]
fn golden_pod() {
    let payload = saved::Pod {
        schema_version: 2,
        pod_id: "p".into(),
        guest_pod_id: "g".into(),
        containers: vec![Any::default()],
        bundle_directory: "/b".into(),
        root_directory: "/r".into(),
        ..Default::default()
    };
    let directories = text(6, "/b") + &text(7, "/r");
    let expected = format!("{V2}{}{}2200{directories}", text(2, "p"), text(3, "g"));
    golden(&payload, "type.dunlin.dev/dunlin.pod.v1", &expected);
}

#[test]
fn golden_container() {
    let layer = saved::LayerReservation {
        reservation_id: b"r".to_vec(),
        guest_path: "/l".into(),
        ..Default::default()
    };
    let mut payload = saved::Container {
        schema_version: 2,
        container_id: "c".into(),
        guest_container_id: "g".into(),
        layers: vec![layer.clone()],
        scratch: Some(layer).into(),
        rootfs_path: "/r".into(),
        stage: saved::ContainerStage::CONTAINER_STAGE_RUNNING.into(),
        ..Default::default()
    };
    payload.processes.insert("e".into(), Any::default());
    let layer = "0a017212022f6c";
    let expected = format!(
        "{V2}{}{}2207{layer}2a07{layer}{}3a050a016512004002",
        text(2, "c"),
        text(3, "g"),
        text(6, "/r")
    );
    golden(&payload, "type.dunlin.dev/dunlin.container.v1", &expected);
}

#[test]
fn golden_process() {
    let mut payload = saved::Process {
        schema_version: 1,
        stage: saved::ProcessStage::PROCESS_STAGE_TERMINATED.into(),
        pid: 12,
        bundle: Some("/b".into()),
        oci_process_json: b"{}".to_vec(),
        stdin_port: 1,
        stdout_port: 2,
        stderr_port: 3,
        terminal: true,
        stdin_closed: true,
        exit_code: 137,
        wait_call_id: 9,
        ..Default::default()
    };
    payload.exited_at.mut_or_insert_default().seconds = 5;
    payload.io_retry_timeout.mut_or_insert_default().nanos = 7;
    let expected = format!(
        "{V1}1003180c{}{}3001380240034801500158890162020805680972021007",
        text(4, "/b"),
        text(5, "{}"),
    );
    golden(&payload, "type.dunlin.dev/dunlin.process.v1", &expected);
}

#[test]
fn golden_scsi() {
    let mut payload = saved::Scsi { schema_version: 2, num_controllers: 4, ..Default::default() };
    payload.directories.push("/s".into());
    let mut disk = saved::Disk {
        directory: 1,
        source_path: "d".into(),
        read_only: true,
        size_bytes: 4096,
        digest: "x".into(),
        ..Default::default()
    };
    let mount = saved::Mount {
        guest_path: "/m".into(),
        read_only: true,
        filesystem: "erofs".into(),
        ref_count: 2,
        ..Default::default()
    };
    disk.mounts.insert(0, mount);
    payload.disks.insert(65, disk);
    payload.reservations.push(saved::Reservation {
        reservation_id: b"r".to_vec(),
        slot: 65,
        ..Default::default()
    });
    let mount = format!("{}1001{}2002", text(1, "/m"), text(3, "erofs"));
    let entry = format!("080012{:02x}{mount}", mount.len() / 2);
    let disk = format!("{}1001188020{}2a{:02x}{entry}4801", text(1, "d"), text(4, "x"), entry.len() / 2);
    let entry = format!("084112{:02x}{disk}", disk.len() / 2);
    let expected = format!("{V2}10041a{:02x}{entry}22050a01721041{}", entry.len() / 2, text(5, "/s"));
    golden(&payload, "type.dunlin.dev/dunlin.scsi.v1", &expected);
}

#[test]
fn a_wrong_url_is_told_with_the_expected_one_and_whose_it_is() {
    let any = seal(saved::Pod::new());
    let error = open::<saved::Vm>(&any, &"config.vm").unwrap_err().to_string();
    for part in ["config.vm", "expected type.dunlin.dev/dunlin.vm.v1", "the pod payload"] {
        assert!(error.contains(part), "{error}");
    }
    for (url, part) in [
        ("", "got nothing"),
        ("type.dunlin.dev/dunlin.turbo.v1", "does not know"),
        ("type.microsoft.com/hcsshim.controller.vm.save.v1.Payload", "another shim"),
        ("type.googleapis.com/x", "none of ours"),
    ] {
        let any = Any { type_url: url.into(), ..Any::default() };
        let error = open::<saved::Vm>(&any, &"config.vm").unwrap_err();
        assert!(matches!(error, EnvelopeError::WrongType { .. }));
        assert!(error.to_string().contains(part), "{error}");
    }
}

#[test]
fn a_version_is_judged_before_the_rest_decodes() {
    let mut any = seal(saved::Scsi::new());
    // Version 3, in which field 3 became a number: as version 2 it would not decode.
    any.value = vec![0x08, 3, 0x1d, 1, 2, 3, 4];
    let error = open::<saved::Scsi>(&any, &"scsi").unwrap_err();
    assert!(matches!(error, EnvelopeError::UnknownVersion { given: 3, known: 2, .. }), "{error}");
    any.value = Vec::new();
    let error = open::<saved::Scsi>(&any, &"scsi").unwrap_err();
    assert!(matches!(error, EnvelopeError::UnknownVersion { given: 0, .. }), "{error}");
    any.value = vec![0x08, 2, 0x1a, 0xff];
    let error = open::<saved::Scsi>(&any, &"scsi").unwrap_err();
    assert!(matches!(error, EnvelopeError::Undecodable { .. }), "{error}");
}

#[test]
fn size_is_judged_before_anything_is_decoded() {
    let any =
        Any { type_url: saved::Migration::type_url(), value: vec![0xff; (16 << 20) + 1], ..Any::default() };
    let error = open::<saved::Migration>(&any, &"config").unwrap_err();
    assert!(matches!(error, EnvelopeError::TooLarge { cap: 16_777_216, .. }), "{error}");
}

#[test]
fn fields_are_counted_before_anything_is_decoded() {
    // Empty containers, of two bytes each.
    let pod = |count: usize| {
        let value = [&[8, 2][..], &[0x22, 0].repeat(count)].concat();
        open::<saved::Pod>(&Any { type_url: saved::Pod::type_url(), value, ..Any::default() }, &"pod")
            .unwrap_err()
    };
    let error = pod(FIELDS_MAX);
    assert!(matches!(error, EnvelopeError::TooManyFields { limit: FIELDS_MAX, .. }), "{error}");
    let error = pod(FIELDS_MAX - 1);
    assert!(matches!(error, EnvelopeError::CutShort { .. }), "{error}");
}

#[test]
fn leftovers_are_found_at_any_depth() {
    let leftover = |any: &Any| match open::<saved::Scsi>(any, &"scsi").unwrap_err() {
        EnvelopeError::Leftover { leftover, .. } => leftover,
        other => panic!("{other}"),
    };
    let mut top = saved::Scsi::new();
    top.special_fields.mut_unknown_fields().add_value(99, UnknownValue::Varint(1));
    assert_eq!(leftover(&seal(top.clone())), "field 99");

    let mut mount = saved::Mount::new();
    mount.special_fields.mut_unknown_fields().add_value(17, UnknownValue::Varint(1));
    let mut disk = saved::Disk::new();
    disk.mounts.insert(3, mount);
    let mut deep = saved::Scsi::new();
    deep.disks.insert(65, disk);
    assert_eq!(leftover(&seal(deep.clone())), "disks: [65] mounts: [3] field 17");

    let mut process = saved::Process::new();
    process.stage = EnumOrUnknown::from_i32(17);
    let error = open::<saved::Process>(&seal(process.clone()), &"p").unwrap_err().to_string();
    assert!(error.contains("stage: value 17 of ProcessStage"), "{error}");

    let mut any = seal(saved::Scsi::new());
    any.special_fields.mut_unknown_fields().add_value(3, UnknownValue::Varint(1));
    assert_eq!(leftover(&any), "field 3 of its envelope");
}

/// A payload with its last field, which counts the others' bytes.
fn counted<T: Payload>(value: &[u8]) -> Any {
    let count = u8::try_from(value.len()).unwrap();
    Any { type_url: T::type_url(), value: [value, &[0xa0, 6, count]].concat(), ..Any::default() }
}

#[test]
fn what_the_decoder_would_drop_is_a_leftover() {
    // A disk's map entry with a third field; num_controllers twice; a disk's slot twice; the version twice.
    for value in [
        &[8, 2, 0x1a, 6, 8, 1, 0x12, 0, 0x18, 5][..],
        &[8, 2, 0x10, 1, 0x10, 2],
        &[8, 2, 0x1a, 4, 8, 1, 0x12, 0, 0x1a, 4, 8, 1, 0x12, 0],
        &[8, 2, 8, 2],
        &[8, 2, 8, 1],
    ] {
        let error = open::<saved::Scsi>(&counted::<saved::Scsi>(value), &"scsi").unwrap_err();
        assert!(matches!(error, EnvelopeError::Leftover { .. }), "{error}");
    }
    let any = counted::<saved::Scsi>(&[8, 2, 0x1a, 4, 8, 1, 0x12, 0]);
    open::<saved::Scsi>(&any, &"scsi").unwrap();
}

#[test]
fn a_payload_cut_short_anywhere_is_refused() {
    let mut payload = saved::Pod { pod_id: "p".into(), guest_pod_id: "g".into(), ..Default::default() };
    payload.containers = vec![seal(saved::Container::new()), seal(saved::Container::new())];
    let whole = seal(payload);
    open::<saved::Pod>(&whole, &"pod").unwrap();
    let mut between_fields = 0;
    for length in 0..whole.value.len() {
        let value = whole.value[..length].to_vec();
        let error = open::<saved::Pod>(&Any { value, ..whole.clone() }, &"pod").unwrap_err();
        assert!(error.to_string().starts_with("pod: "), "{length}: {error}");
        between_fields += usize::from(matches!(error, EnvelopeError::CutShort { sealed: 0, .. }));
    }
    // After the version, each id, and each container and what its envelope holds.
    assert_eq!(between_fields, 9);
    let longer = [&whole.value[..2], &[0x12, 1, b'x'], &whole.value[2..]].concat();
    let error = open::<saved::Pod>(&Any { value: longer, ..whole }, &"pod").unwrap_err();
    assert!(matches!(error, EnvelopeError::Leftover { .. }), "{error}");
}

fn process() -> impl Strategy<Value = saved::Process> {
    (
        any::<Option<String>>(),
        any::<u32>(),
        proptest::collection::vec(any::<u8>(), 0..20),
        any::<[u32; 4]>(),
        0i32..4,
    )
        .prop_map(|(bundle, pid, json, numbers, stage)| {
            let mut message = saved::Process { schema_version: 1, bundle, pid, ..Default::default() };
            message.oci_process_json = json;
            message.stdin_port = numbers[0];
            message.stdout_port = numbers[1];
            message.exit_code = numbers[2];
            message.wait_call_id = numbers[3].into();
            message.stage = EnumOrUnknown::from_i32(stage);
            message
        })
}

proptest! {
    #[test]
    fn what_is_sealed_opens(process in process(), ids in proptest::collection::vec(".{0,6}", 0..5)) {
        prop_assert_eq!(&open::<saved::Process>(&seal(process.clone()), &"p").unwrap(), &process);
        let mut container = saved::Container { schema_version: 2, ..Default::default() };
        for id in ids {
            container.processes.insert(id, seal(process.clone()));
        }
        prop_assert_eq!(&open::<saved::Container>(&seal(container.clone()), &"c").unwrap(), &container);
        let mut pod = saved::Pod { schema_version: 2, ..Default::default() };
        pod.containers.push(seal(container.clone()));
        prop_assert_eq!(&open::<saved::Pod>(&seal(pod.clone()), &"p").unwrap(), &pod);
    }

    #[test]
    fn no_bytes_panic(value in proptest::collection::vec(any::<u8>(), 0..200)) {
        fn attempt<T: Payload>(value: &[u8]) {
            // Also with a good beginning, so that the rest is reached.
            for prefix in [&[][..], &[8, 1], &[8, 2]] {
                let value = [prefix, value].concat();
                let _ = open::<T>(&Any { type_url: T::type_url(), value, ..Any::default() }, &"here");
            }
        }
        attempt::<saved::Migration>(&value);
        attempt::<saved::Vm>(&value);
        attempt::<saved::Pod>(&value);
        attempt::<saved::Container>(&value);
        attempt::<saved::Process>(&value);
        attempt::<saved::Scsi>(&value);
        attempt::<saved::Network>(&value);
        attempt::<saved::Plan9>(&value);
        attempt::<saved::Vpci>(&value);
        attempt::<saved::Handoff>(&value);
        attempt::<saved::SandboxState>(&value);
    }

    #[test]
    fn a_flipped_byte_is_refused_or_another_value(at in any::<prop::sample::Index>(), process in process()) {
        let mut any = seal(process.clone());
        let at = at.index(any.value.len());
        any.value[at] ^= 1;
        if let Ok(other) = open::<saved::Process>(&any, &"p") {
            prop_assert_ne!(other.write_to_bytes().unwrap(), seal(process.clone()).value);
        }
    }
}
