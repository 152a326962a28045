//! Two model shims around the real `Session`, a model of the nodes around the real `Coordinator`, and a world that loses,
//! repeats, delays and reorders what crosses between hosts, kills machines, shims and hosts,
//! and cancels, each at any event. After every event the invariants are asked.

mod invariants;
mod shim;
mod world;

use proptest::prelude::*;

use dunlin_migration::coordinator::Phase;
use world::{Fault, Plan, World};

/// A world without faults brings the pod over.
#[test]
fn a_calm_move_ends_on_the_destination() {
    let mut world = World::new(&Plan { seed: 1, ..Plan::default() });
    world.run();
    assert_eq!(world.phase(), Phase::Done, "{}", world.trace());
    let report = world.last_report();
    assert!(report.blackout.is_some() && report.cause.is_none() && report.leftovers.is_empty(), "{report:?}");
}

/// Every single fault at every event of a calm move.
#[test]
fn each_fault_at_every_event() {
    for fault in Fault::ALL {
        for at in 0..160 {
            let plan = Plan { seed: at, faults: vec![(at, fault)], ..Plan::default() };
            World::new(&plan).run();
        }
    }
}

/// A cancel at every event before the decision leaves the source running, and both ends are seen.
#[test]
fn cancel_at_every_event() {
    let mut seen = std::collections::BTreeMap::new();
    for at in 0..160 {
        let plan = Plan { seed: at * 7, faults: vec![(at, Fault::Cancel)], ..Plan::default() };
        let mut world = World::new(&plan);
        world.run();
        *seen.entry(format!("{}", world.phase())).or_insert(0) += 1;
    }
    assert_eq!(seen.keys().map(String::as_str).collect::<Vec<_>>(), ["Done", "RolledBack"], "{seen:?}");
}

fn plans() -> impl Strategy<Value = Plan> {
    let fault = proptest::sample::select(Fault::ALL.to_vec());
    (
        any::<u64>(),
        prop_oneof![Just(0u8), 1u8..10, 10u8..40],
        prop_oneof![Just(0u8), 1u8..30],
        prop_oneof![Just(0u8), 1u8..20],
        prop_oneof![Just(0u8), 1u8..10],
        proptest::collection::vec((0u64..200, fault), 0..4),
    )
        .prop_map(|(seed, drop, repeat, slow, fail, faults)| Plan {
            seed,
            drop,
            repeat,
            slow,
            fail,
            faults,
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10_000, ..ProptestConfig::default() })]
    #[test]
    fn no_order_of_faults_breaks_an_invariant(plan in plans()) {
        World::new(&plan).run();
    }
}

/// The worlds of the property above are not all alike: each end is reached often enough.
#[test]
fn the_worlds_reach_every_end() {
    let mut seen = std::collections::BTreeMap::new();
    for seed in 0..600u64 {
        let fault = Fault::ALL[usize::try_from(seed).unwrap() % Fault::ALL.len()];
        let plan = Plan { seed, drop: 3, repeat: 10, slow: 5, fail: 2, faults: vec![(seed % 150, fault)] };
        let mut world = World::new(&plan);
        world.run();
        *seen.entry(format!("{}", world.phase())).or_insert(0u32) += 1;
        if world.resumed_after_commit() {
            *seen.entry("resumed after commit".to_owned()).or_insert(0) += 1;
        }
    }
    for end in ["Done", "RolledBack", "Failed", "resumed after commit"] {
        assert!(seen.get(end).is_some_and(|count| *count >= 3), "{end}: {seen:?}");
    }
}
