use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::Index;

use super::*;
use crate::envelope::{open, seal};

/// The bytes of version 1.
const GOLDEN: &str = "08 01 \
    12 0f  0a 03 77 65 62  18 00  2a 06 08 03 12 02 6f 6b \
    12 14  0a 03 77 65 62  12 02 73 68  18 ac 02  20 07  2a 04 08 05 18 01 \
    1a 1f  0a 03 6e 69 63  12 18 01 01 01 01 01 01 01 01 01 01 01 01 01 01 01 01 01 01 01 01 01 01 01 01 \
    a0 06 4a";

fn key(container: &str, exec: &str) -> HandoffKey {
    HandoffKey { container: ContainerId::new(container).unwrap(), exec: exec.into() }
}

fn full() -> Handoff {
    let init = StreamPositions {
        stdout: Some(0),
        stderr: None,
        stdin: Some(InputPosition { acknowledged: 3, pending: b"ok".to_vec(), closed: false }),
    };
    let shell = StreamPositions {
        stdout: Some(300),
        stderr: Some(7),
        stdin: Some(InputPosition { acknowledged: 5, pending: Vec::new(), closed: true }),
    };
    Handoff {
        processes: [(key("web", ""), init), (key("web", "sh"), shell)].into(),
        frames: [("nic".to_owned(), vec![vec![1; 24]])].into(),
    }
}

fn golden() -> Vec<u8> {
    GOLDEN.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect()
}

#[test]
fn golden_bytes() {
    let sealed = full().seal().unwrap();
    assert_eq!(sealed.type_url, "type.dunlin.dev/dunlin.handoff.v1");
    assert_eq!(sealed.value, golden());
    assert_eq!(Handoff::open(&Any { value: golden(), ..sealed }).unwrap(), full());
}

fn refused(parts: &[&str], change: impl FnOnce(&mut saved::Handoff)) {
    let mut message: saved::Handoff = open(&full().seal().unwrap(), &"").unwrap();
    change(&mut message);
    let error = Handoff::open(&seal(message)).unwrap_err().to_string();
    for part in parts {
        assert!(error.contains(part), "{parts:?}: {error}");
    }
}

#[test]
fn what_contradicts_itself_is_refused_by_name() {
    refused(&["handoff.processes[2]", "process \"sh\" of container web", "twice"], |message| {
        let again = message.processes[1].clone();
        message.processes.push(again);
    });
    refused(&["handoff.processes[0].guest_container_id", "identifier"], |message| {
        message.processes[0].guest_container_id = "../web".into();
    });
    refused(&["handoff.processes[1].exec_id", "identifier"], |message| {
        message.processes[1].exec_id = "a/b".into();
    });
    refused(&["handoff.processes[0].stdin.pending", "524289", "524288"], |message| {
        message.processes[0].stdin.as_mut().unwrap().pending = vec![0; PENDING_MAX + 1];
    });
    refused(&["handoff.processes[0].stdin", "beyond"], |message| {
        message.processes[0].stdin.as_mut().unwrap().acknowledged = u64::MAX - 1;
    });
    refused(&["handoff.nics[1]", "nic", "twice"], |message| {
        let again = message.nics[0].clone();
        message.nics.push(again);
    });
    refused(&["handoff.nics[0].frames[1]", "23 bytes", "24 to 65563"], |message| {
        message.nics[0].frames.push(vec![0; 23]);
    });
    refused(&["handoff.nics[0].frames[0]", "65564 bytes"], |message| {
        message.nics[0].frames[0] = vec![0; FRAME_MAX + 1];
    });
    refused(&["handoff.nics", "1048600 bytes of frames", "1048576"], |message| {
        message.nics[0].frames.extend((0..16).map(|_| vec![0; 1 << 16]));
    });
    refused(&["handoff.nics", "513", "512"], |message| {
        let card = |n| saved::NicFrames { nic_id: format!("{n}"), ..saved::NicFrames::default() };
        message.nics = (0..513).map(card).collect();
    });
    refused(&["handoff.processes", "16385", "16384"], |message| {
        message.processes = vec![message.processes[0].clone(); HANDOFF_PROCESSES_MAX + 1];
    });
}

#[test]
fn what_cannot_be_opened_is_not_sealed() {
    let mut handoff = full();
    let stdin = |pending| InputPosition { acknowledged: 0, pending: vec![0; pending], closed: false };
    let process = |pending| StreamPositions { stdin: Some(stdin(pending)), ..StreamPositions::default() };
    handoff.processes.insert(key("db", ""), process(PENDING_MAX));
    assert_eq!(Handoff::open(&handoff.seal().unwrap()).unwrap(), handoff);
    handoff.processes.insert(key("db", ""), process(PENDING_MAX + 1));
    assert!(matches!(handoff.seal(), Err(HandoffError::TooMany { count: 524_289, .. })));
    // Each within its own limit, together beyond the payload's.
    handoff.processes = (0..12).map(|n| (key(&format!("c{n}"), ""), process(PENDING_MAX))).collect();
    let error = handoff.seal().unwrap_err().to_string();
    assert!(error.contains("more than the 3145728"), "{error}");
    handoff.processes = [(key("web", "no exec"), process(0))].into();
    assert!(matches!(handoff.seal(), Err(HandoffError::Field(_))));
}

#[test]
fn the_envelope_is_judged_first() {
    let sealed = full().seal().unwrap();
    for cut in 0..sealed.value.len() {
        let value = sealed.value[..cut].to_vec();
        let error = Handoff::open(&Any { value, ..sealed.clone() }).unwrap_err().to_string();
        assert!(error.starts_with("handoff: "), "{cut}: {error}");
    }
    let mut other = sealed.clone();
    other.value[1] = 2;
    assert!(Handoff::open(&other).unwrap_err().to_string().contains("schema version 2"));
    let oversized = Any { value: vec![0; HANDOFF_MAX + 1], ..sealed.clone() };
    assert!(Handoff::open(&oversized).unwrap_err().to_string().contains("3145729 bytes"));
    let other = Any { type_url: saved::Vm::type_url(), ..sealed };
    assert!(Handoff::open(&other).unwrap_err().to_string().contains("the vm payload"));
}

fn handoff() -> impl Strategy<Value = Handoff> {
    let key = ("[a-z]{1,3}", "([a-z0-9]{1,3})?").prop_map(|(container, exec)| key(&container, &exec));
    let pending = vec(any::<u8>(), 0..20);
    let stdin = (0..u64::MAX - 20, pending, any::<bool>())
        .prop_map(|(acknowledged, pending, closed)| InputPosition { acknowledged, pending, closed });
    let position = || option::of(prop_oneof![Just(0), any::<u64>()]);
    let positions = (position(), position(), option::of(stdin))
        .prop_map(|(stdout, stderr, stdin)| StreamPositions { stdout, stderr, stdin });
    let frames = btree_map("[a-z]{1,3}", vec(vec(any::<u8>(), 24..60), 0..4), 0..3);
    (btree_map(key, positions, 0..6), frames).prop_map(|(processes, frames)| Handoff { processes, frames })
}

fn taken_whole_or_refused(any: &Any) {
    if let Ok(handoff) = Handoff::open(any) {
        assert_eq!(Handoff::open(&handoff.seal().unwrap()).unwrap(), handoff);
    }
}

proptest! {
    #[test]
    fn seal_then_open_is_identity(handoff in handoff()) {
        let sealed = handoff.seal().unwrap();
        prop_assert_eq!(&Handoff::open(&sealed).unwrap(), &handoff);
        prop_assert_eq!(handoff.seal().unwrap(), sealed);
    }

    #[test]
    fn no_bytes_panic(value in vec(any::<u8>(), 0..100)) {
        for prefix in [&[][..], &[8, 1]] {
            let value = [prefix, &value].concat();
            taken_whole_or_refused(&Any { type_url: Handoff::type_url(), value, ..Any::default() });
        }
    }

    #[test]
    fn changed_bytes_never_panic(handoff in handoff(), at in any::<Index>(), byte in any::<u8>(), cut in 0..3usize) {
        let mut any = handoff.seal().unwrap();
        let at = at.index(any.value.len());
        let end = (at + cut).min(any.value.len());
        any.value.splice(at..end, [byte]);
        taken_whole_or_refused(&any);
    }
}
