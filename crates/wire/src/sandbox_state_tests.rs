use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::*;
use crate::envelope::{open, seal};
use crate::tree::Confidential;

const GOLDEN: &str = include_str!("../tests/golden/sandboxstate.hex");

fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<u8> = hex.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
    let pair = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    digits.chunks(2).map(pair).collect()
}

fn container(id: &str, role: ContainerRole, resources: &str) -> ContainerState {
    ContainerState {
        container_id: ContainerId::new(id).unwrap(),
        guest_container_id: ContainerId::new(format!("{id}-guest")).unwrap(),
        role,
        annotations: [("io.kubernetes.cri.container-name".to_owned(), id.to_owned())].into(),
        resources: resources.into(),
    }
}

/// Its bytes are the golden ones.
fn full() -> SandboxState {
    SandboxState {
        namespace: "k8s.io".into(),
        sandbox_id: SandboxId::new("pod").unwrap(),
        runtime: "io.containerd.dunlin.v2".into(),
        options: SandboxOptions {
            no_writable_file_shares: true,
            scratch_encryption: true,
            policy_based_routing: true,
            architecture: "amd64".into(),
            fully_physically_backed: true,
            confidential: Some(Confidential {
                security_policy: "cG9saWN5".into(),
                security_policy_enforcer: "rego".into(),
                reference_info_file: "reference.cose".into(),
            }),
        },
        annotations: [("a".to_owned(), "1".to_owned()), ("b".to_owned(), String::new())].into(),
        memory_mib: 512,
        vcpus: 2,
        machine: "pc-q35-7.2".into(),
        cpu: "Nehalem-v1".into(),
        scratch_mib: 1024,
        pods: vec![PodState {
            pod_id: SandboxId::new("pod").unwrap(),
            guest_pod_id: SandboxId::new("pod-guest").unwrap(),
            hostname: "web-0".into(),
            containers: vec![
                container("pod", ContainerRole::Sandbox, ""),
                container("web", ContainerRole::Workload, r#"{"memory":{"limit":1048576}}"#),
            ],
        }],
    }
}

#[test]
fn golden_bytes() {
    let sealed = full().seal().unwrap();
    assert_eq!(sealed.type_url, "type.dunlin.dev/dunlin.sandboxstate.v1");
    assert_eq!(sealed.value, bytes(GOLDEN));
    assert_eq!(SandboxState::open(&Any { value: bytes(GOLDEN), ..sealed }).unwrap(), full());
}

fn refused(parts: &[&str], change: impl FnOnce(&mut saved::SandboxState)) {
    let mut message: saved::SandboxState = open(&full().seal().unwrap(), &"").unwrap();
    change(&mut message);
    let error = SandboxState::open(&seal(message)).unwrap_err().to_string();
    for part in parts {
        assert!(error.contains(part), "{parts:?}: {error}");
    }
}

#[test]
fn what_contradicts_itself_is_refused_by_name() {
    refused(&["sandbox_state.namespace", "identifier"], |state| state.namespace = "a b".into());
    refused(&["sandbox_state.sandbox_id", "empty"], |state| state.sandbox_id.clear());
    refused(&["sandbox_state.options", "missing"], |state| state.options = None.into());
    refused(&["options.architecture", "neither amd64 nor arm64"], |state| {
        state.options.mut_or_insert_default().architecture = "riscv64".into();
    });
    refused(&["sandbox_state.pods", "17", "16"], |state| state.pods = vec![state.pods[0].clone(); 17]);
    refused(&["sandbox_state.pods[1]", "pod pod", "twice"], |state| {
        state.pods = vec![state.pods[0].clone(); 2];
    });
    refused(&["pods[0].pod_id", "identifier"], |state| state.pods[0].pod_id = "..".into());
    refused(&["pods[0].guest_pod_id", "identifier"], |state| state.pods[0].guest_pod_id = "..".into());
    refused(&["pods[0].containers", "257", "256"], |state| {
        state.pods[0].containers = vec![state.pods[0].containers[0].clone(); 257];
    });
    refused(&["pods[0].containers[2]", "container web", "twice"], |state| {
        let again = state.pods[0].containers[1].clone();
        state.pods[0].containers.push(again);
    });
    refused(&["containers[1].role", "missing"], |state| {
        state.pods[0].containers[1].role = saved::ContainerRole::CONTAINER_ROLE_UNSPECIFIED.into();
    });
    refused(&["role: value 9 of ContainerRole"], |state| {
        state.pods[0].containers[1].role = protobuf::EnumOrUnknown::from_i32(9);
    });
    refused(&["containers[1].resources", "JSON object"], |state| {
        state.pods[0].containers[1].resources = b"[1]".to_vec();
    });
    refused(&["containers[0].guest_container_id"], |state| {
        state.pods[0].containers[0].guest_container_id.clear();
    });
    refused(&["containers[0].container_id"], |state| state.pods[0].containers[0].container_id.clear());
}

#[test]
fn the_envelope_is_judged_first() {
    let sealed = full().seal().unwrap();
    for cut in 0..sealed.value.len() {
        let value = sealed.value[..cut].to_vec();
        let error = SandboxState::open(&Any { value, ..sealed.clone() }).unwrap_err().to_string();
        assert!(error.starts_with("sandbox_state: "), "{cut}: {error}");
    }
    let mut other = sealed.clone();
    other.value[1] = 1;
    assert!(SandboxState::open(&other).unwrap_err().to_string().contains("schema version 1"));
    let cap = saved::SandboxState::CAP;
    let oversized = Any { value: vec![0; cap + 1], ..sealed.clone() };
    assert!(SandboxState::open(&oversized).unwrap_err().to_string().contains("bytes are more than"));
    let other = Any { type_url: saved::Vm::type_url(), ..sealed };
    assert!(SandboxState::open(&other).unwrap_err().to_string().contains("the vm payload"));
    let mut large = full();
    large.annotations.insert("large".into(), "x".repeat(cap));
    assert!(matches!(large.seal(), Err(SandboxStateError::Envelope(EnvelopeError::TooLarge { .. }))));
}

fn annotations() -> impl Strategy<Value = BTreeMap<String, String>> {
    btree_map(".{0,8}", ".{0,8}", 0..4)
}

fn state() -> impl Strategy<Value = SandboxState> {
    let role = select(vec![ContainerRole::Sandbox, ContainerRole::Workload, ContainerRole::Standalone]);
    let resources = select(vec!["", "{}", r#"{"cpu":{"shares":2}}"#]);
    let container = (role, annotations(), resources);
    let pod = (".{0,8}", vec(container, 0..4));
    let names = ("[a-z]{1,8}", ".{0,9}", ".{0,9}", ".{0,9}");
    let options = (any::<[bool; 5]>(), select(vec!["amd64", "arm64"]), ".{0,9}");
    let sizes = any::<(u64, u32, u64)>();
    (names, options, annotations(), sizes, vec(pod, 0..3)).prop_map(
        |(names, (flags, architecture, policy), annotations, (memory_mib, vcpus, scratch_mib), pods)| {
            let (namespace, runtime, machine, cpu) = names;
            let options = SandboxOptions {
                no_writable_file_shares: flags[0],
                scratch_encryption: flags[1],
                policy_based_routing: flags[2],
                architecture: architecture.to_owned(),
                fully_physically_backed: flags[3],
                confidential: flags[4]
                    .then(|| Confidential { security_policy: policy, ..Confidential::default() }),
            };
            let pods = pods.into_iter().enumerate().map(|(p, (hostname, containers))| {
                let containers =
                    containers.into_iter().enumerate().map(|(c, (role, annotations, resources))| {
                        ContainerState {
                            annotations,
                            ..super::tests::container(&format!("c{p}-{c}"), role, resources)
                        }
                    });
                PodState {
                    pod_id: SandboxId::new(format!("p{p}")).unwrap(),
                    guest_pod_id: SandboxId::new(format!("g{p}")).unwrap(),
                    hostname,
                    containers: containers.collect(),
                }
            });
            SandboxState {
                namespace,
                sandbox_id: SandboxId::new("s").unwrap(),
                runtime,
                options,
                annotations,
                memory_mib,
                vcpus,
                machine,
                cpu,
                scratch_mib,
                pods: pods.collect(),
            }
        },
    )
}

fn taken_whole_or_refused(any: &Any) {
    if let Ok(state) = SandboxState::open(any) {
        assert_eq!(SandboxState::open(&state.seal().unwrap()).unwrap(), state);
    }
}

proptest! {
    #[test]
    fn seal_then_open_is_identity(state in state()) {
        let sealed = state.seal().unwrap();
        prop_assert_eq!(&SandboxState::open(&sealed).unwrap(), &state);
        prop_assert_eq!(state.seal().unwrap(), sealed);
    }

    #[test]
    fn no_bytes_panic(value in vec(any::<u8>(), 0..100)) {
        for prefix in [&[][..], &[8, 2]] {
            let value = [prefix, &value].concat();
            taken_whole_or_refused(&Any { type_url: SandboxState::type_url(), value, ..Any::default() });
        }
    }

    #[test]
    fn changed_bytes_never_panic(state in state(), at in any::<Index>(), byte in any::<u8>(), cut in 0..3usize) {
        let mut any = state.seal().unwrap();
        let at = at.index(any.value.len());
        let end = (at + cut).min(any.value.len());
        any.value.splice(at..end, [byte]);
        taken_whole_or_refused(&any);
    }
}
