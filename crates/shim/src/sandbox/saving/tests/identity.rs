//! A sandbox in any state that it can reach comes back as it was, or its export is refused and changes nothing;
//! bytes of any kind are taken or refused.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use dunlin_wire::Any;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::json;

use super::world::{Place, Shape, World, stdio};
use crate::container::State;
use crate::process::Exit;

/// What happens to a sandbox.
#[derive(Debug, Clone)]
enum Step {
    Create(Shape, Where),
    Start(Index),
    /// Asked of the guest, which has not answered.
    Begin(Index),
    Exec(Index, [bool; 3], bool),
    Exit(Index, u32, u64),
    CloseStdin(Index),
    Pause(Index),
    PlugAndUnplug,
}

#[derive(Debug, Clone)]
enum Where {
    Sandbox(bool),
    Standalone(bool),
    Workload(Index),
}

fn shape() -> impl Strategy<Value = Shape> {
    let disks = (vec(0..3u8, 0..3), option::of(any::<bool>()), vec(option::of(0..2u8), 0..2), 0..3usize);
    (disks, any::<[bool; 3]>(), any::<bool>(), prop::bool::weighted(0.97)).prop_map(
        |((layers, scratch, volumes, copies), streams, terminal, made)| Shape {
            layers,
            scratch,
            volumes,
            copies,
            stdio: stdio("init", streams, terminal),
            process: json!({"args": ["/bin/sh", "-c", "ä \u{0} \""], "terminal": terminal, "user": {"uid": 0}}),
            made,
        },
    )
}

fn step() -> impl Strategy<Value = Step> {
    let place = prop_oneof![
        any::<bool>().prop_map(Where::Sandbox),
        any::<bool>().prop_map(Where::Standalone),
        any::<Index>().prop_map(Where::Workload),
    ];
    prop_oneof![
        4 => (shape(), place).prop_map(|(shape, place)| Step::Create(shape, place)),
        6 => any::<Index>().prop_map(Step::Start),
        1 => prop::bool::weighted(0.2).prop_flat_map(|really| {
            any::<Index>().prop_map(move |at| if really { Step::Begin(at) } else { Step::Start(at) })
        }),
        4 => (any::<Index>(), any::<[bool; 3]>(), any::<bool>())
            .prop_map(|(at, streams, terminal)| Step::Exec(at, streams, terminal)),
        2 => (any::<Index>(), 0..256u32, any::<u64>()).prop_map(|(at, code, nanos)| Step::Exit(at, code, nanos)),
        1 => any::<Index>().prop_map(Step::CloseStdin),
        1 => any::<Index>().prop_map(Step::Pause),
        1 => Just(Step::PlugAndUnplug),
    ]
}

/// What cannot be done now is not done.
fn go(world: &mut World, number: usize, step: &Step) {
    let any_of = |at: &Index, world: &World| {
        let all = world.processes();
        (!all.is_empty()).then(|| at.get(&all).clone())
    };
    match step {
        Step::Create(shape, place) => {
            let id = format!("c{number}");
            let ready: Vec<String> = {
                let inner = world.sandbox.inner();
                let ready = |container: &&crate::container::Container| {
                    inner.pods[&container.pod].state == crate::pod::State::Ready
                };
                let with_sandbox = inner
                    .containers
                    .values()
                    .filter(|container| container.role == dunlin_wire::tree::ContainerRole::Sandbox);
                with_sandbox.filter(ready).map(|container| container.id.clone()).collect()
            };
            match place {
                Where::Sandbox(network) => world.create(&id, Place::Sandbox { network: *network }, shape),
                Where::Workload(at) if !ready.is_empty() => {
                    world.create(&id, Place::Workload { pod: at.get::<String>(&ready) }, shape);
                }
                Where::Standalone(network) => {
                    world.create(&id, Place::Standalone { network: *network }, shape);
                }
                Where::Workload(_) => world.create(&id, Place::Standalone { network: false }, shape),
            }
        }
        Step::Start(at) => {
            if let Some((id, exec)) = any_of(at, world) {
                world.start(&id, &exec);
            }
        }
        Step::Begin(at) => {
            if let Some((id, exec)) = any_of(at, world) {
                let mut inner = world.sandbox.inner();
                let wanted = if exec.is_empty() { State::Created } else { State::Running };
                if inner.container(&id).unwrap().state == wanted {
                    let _ = inner.process_mut(&id, &exec).unwrap().begin();
                }
            }
        }
        Step::Exec(at, streams, terminal) => {
            if let Some((id, _)) = any_of(at, world) {
                let exec = format!("e{number}");
                let stdio = stdio(&exec, *streams, *terminal);
                world.exec(&id, &exec, stdio, json!({"args": ["ls"], "terminal": terminal}));
            }
        }
        Step::Exit(at, code, nanos) => {
            if let Some((id, exec)) = any_of(at, world) {
                let at = SystemTime::UNIX_EPOCH + Duration::from_nanos(*nanos);
                world.exit(&id, &exec, Exit { code: *code, at });
            }
        }
        Step::CloseStdin(at) => {
            if let Some((id, exec)) = any_of(at, world) {
                world.sandbox.inner().process_mut(&id, &exec).unwrap().close_stdin();
            }
        }
        Step::Pause(at) => {
            if let Some((id, _)) = any_of(at, world) {
                let mut inner = world.sandbox.inner();
                let container = inner.container_mut(&id).unwrap();
                container.paused |= container.state == State::Running;
            }
        }
        Step::PlugAndUnplug => world.plug_and_unplug(),
    }
}

fn with_runtime<T>(f: impl FnOnce(&std::path::Path) -> T) -> T {
    let at = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _inside = runtime.enter();
    f(at.path())
}

/// One of each kind, so that every part of a payload is there to be broken.
fn one_of_each(at: &std::path::Path) -> World {
    let shape = Shape {
        layers: vec![0, 1],
        scratch: Some(true),
        volumes: vec![None, Some(1)],
        copies: 2,
        stdio: stdio("init", [true; 3], false),
        process: json!({"args": ["sh"]}),
        made: true,
    };
    let mut world = World::new(at, "pod");
    world.create("pod", Place::Sandbox { network: true }, &shape);
    world.create("web", Place::Workload { pod: "pod" }, &shape);
    world.create("alone", Place::Standalone { network: true }, &shape);
    world.start("pod", "");
    world.start("web", "");
    for exec in ["a", "b", "c"] {
        world.exec("web", exec, stdio(exec, [true, true, false], true), json!({"args": [exec]}));
    }
    world.start("web", "a");
    world.start("web", "b");
    world.exit(
        "web",
        "b",
        Exit { code: 3, at: SystemTime::UNIX_EPOCH + Duration::from_nanos(1_500_000_001) },
    );
    world
}

#[test]
fn one_of_each_comes_back() {
    with_runtime(|at| {
        let source = one_of_each(at);
        let exported = source.export().unwrap();
        let mut there = World::new(&at.join("there"), "pod");
        there.import(&exported.config).unwrap();
        assert_eq!(there.holds(), BTreeSet::from(["Imported".to_owned()]));
        assert!(there.export().is_err(), "nobody's to save yet");
        there.arrive(&source);
        let again = there.export().unwrap();
        assert_eq!((again.config, again.state), (exported.config, exported.state));
        let mut once_more = World::new(&at.join("once-more"), "pod");
        once_more.import(&source.export().unwrap().config).unwrap();
        once_more.arrive(&there);
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn save_then_import_is_identity(steps in vec(step(), 1..40)) {
        with_runtime(|at| {
            let mut source = World::new(at, "s");
            for (number, step) in steps.iter().enumerate() {
                go(&mut source, number, step);
            }
            prop_assume!(!source.processes().is_empty() && source.sandbox.inner().pods.len() <= 16);
            let exported = match source.export() {
                Err(refusal) => {
                    prop_assert!(source.is_busy(), "{refusal}");
                    prop_assert_eq!(source.holds(), BTreeSet::from(["Free".to_owned()]), "nothing is frozen");
                    return Ok(());
                }
                Ok(exported) => exported,
            };
            prop_assert!(!source.is_busy());
            prop_assert_eq!(source.holds(), BTreeSet::from(["Source".to_owned()]));
            let mut there = World::new(&at.join("there"), "s");
            there.import(&exported.config).unwrap();
            there.arrive(&source);
            prop_assert_eq!(there.holds(), BTreeSet::from(["Free".to_owned()]));
            let again = there.export().unwrap();
            prop_assert_eq!(again.config, exported.config);
            prop_assert_eq!(again.state, exported.state);
            Ok(())
        })?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn changed_bytes_never_panic_the_importer(
        changes in vec((any::<Index>(), vec(any::<u8>(), 0..4), 0..4usize), 1..3),
        flips in vec((any::<Index>(), 0..8u8), 0..3),
        value in option::weighted(0.1, vec(any::<u8>(), 0..300)),
    ) {
        thread_local! {
            // Made once: what is changed is a copy.
            static CONFIG: Any = with_runtime(|at| one_of_each(at).export().unwrap().config);
        }
        let mut config = CONFIG.with(Clone::clone);
        match value {
            Some(value) => config.value = value,
            None if flips.is_empty() => {
                for (at, bytes, cut) in changes {
                    let at = at.index(config.value.len());
                    let end = (at + cut).min(config.value.len());
                    config.value.splice(at..end, bytes);
                }
            }
            // In place, so that all lengths hold and what is inside is reached.
            None => for (at, bit) in flips {
                let at = at.index(config.value.len());
                config.value[at] ^= 1 << bit;
            }
        }
        with_runtime(|at| {
            let there = World::new(at, "s");
            let taken = there.import(&config).is_ok();
            prop_assert_eq!(taken, !there.sandbox.inner().containers.is_empty(), "all or nothing");
            Ok(())
        })?;
    }
}
