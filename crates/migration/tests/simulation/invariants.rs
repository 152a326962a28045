//! What must hold in every world, by name.

use dunlin_migration::coordinator::Phase;
use dunlin_migration::session::{StateId, TaskCall};

use crate::shim::Vm;
use crate::world::World;

/// Invariant 1: never two guests at a time.
pub(crate) fn at_most_one_running_copy(world: &World) {
    let both = world.source.vm == Vm::Running && world.destination.vm == Vm::Running;
    assert!(!both, "at_most_one_running_copy: both run\n{}", world.trace());
    let before = world.destination.ever_ran && !world.recorded;
    assert!(!before, "at_most_one_running_copy: the destination ran before the record\n{}", world.trace());
    // Whoever reads the record after a crash of the coordinator will tell the destination to run.
    let could = matches!(world.destination.vm, Vm::Loaded | Vm::Running);
    let twin = world.committed && world.source.vm == Vm::Running && could;
    assert!(!twin, "at_most_one_running_copy: recorded, and both can run\n{}", world.trace());
}

/// Invariant 2: nobody but a crash takes the source's machine before the destination's guest was seen running.
pub(crate) fn at_least_one_copy_survives(world: &World) {
    let lost = world.source.stopped_on_purpose && !world.destination.ever_ran;
    assert!(!lost, "at_least_one_copy_survives: the only copy was stopped\n{}", world.trace());
}

/// Invariant 3: the destination knows where the streams stood, at the first attempt and at each other, from the
/// coordinator and from its record.
pub(crate) fn who_runs_there_has_this_transfer_s_handoff(world: &World) {
    for given in &world.ran_with {
        assert!(
            given.is_some() && *given == world.handoff && *given == world.recorded_handoff,
            "who_runs_there_has_this_transfer_s_handoff: {given:?}, not {:?}; recorded {:?}\n{}",
            world.handoff,
            world.recorded_handoff,
            world.trace()
        );
    }
}

/// Invariant 3: a task has ended when it runs nowhere, and not before.
pub(crate) fn no_end_is_told_of_what_runs_elsewhere(world: &World) {
    let runs = world.source.told_the_end() && world.destination.vm == Vm::Running;
    assert!(!runs, "no_end_is_told_of_what_runs_elsewhere\n{}", world.trace());
}

/// Invariant 3: nor is the end of what ran nowhere else kept back.
pub(crate) fn every_end_is_told(world: &World) {
    let source = &world.source;
    let lost = source.alive && source.crashed && !world.destination.ever_ran && world.phase().is_final();
    let told = source.told_the_end();
    assert!(!lost || told, "every_end_is_told: {:?}\n{}", source.exits, world.trace());
}

/// Invariant 4: whoever waited was told, and no state that should pass stayed.
pub(crate) fn every_wait_ends(world: &World) {
    let phase = world.phase();
    assert!(phase.is_final(), "every_wait_ends: still in {phase}\n{}", world.trace());
    for (name, shim) in [("source", &world.source), ("destination", &world.destination)] {
        let passing = [StateId::SourcePrepared, StateId::SocketWaiting, StateId::Cancelling];
        let state = shim.session.view().id();
        assert!(
            !shim.alive || !passing.contains(&state),
            "every_wait_ends: {name} still in {state}\n{}",
            world.trace()
        );
        assert!(
            !shim.alive || shim.waiting.is_empty(),
            "every_wait_ends: calls to the {name} without an answer: {:?}\n{}",
            shim.waiting,
            world.trace()
        );
    }
}

/// Invariant 5: a move that was undone leaves the source's guest running, with every API and no session.
pub(crate) fn cancel_leaves_source_running(world: &World) {
    if world.phase() != Phase::RolledBack || world.source.crashed {
        return;
    }
    let source = &world.source;
    assert_eq!(source.vm, Vm::Running, "cancel_leaves_source_running: its guest\n{}", world.trace());
    for call in TaskCall::ALL {
        assert_eq!(source.session.gate(call), Ok(()), "cancel_leaves_source_running\n{}", world.trace());
    }
    if !world.last_report().leftovers.iter().any(|text| text.contains("clean up the source")) {
        let state = source.session.view().id();
        assert_eq!(state, StateId::Idle, "cancel_leaves_source_running: session\n{}", world.trace());
    }
}

/// What each end promises.
pub(crate) fn the_end_is_what_it_says(world: &World) {
    let (source, destination) = (&world.source, &world.destination);
    match world.phase() {
        Phase::Done => {
            assert!(destination.ever_ran, "Done, and it never ran\n{}", world.trace());
            assert!(
                destination.vm == Vm::Running || destination.crashed,
                "Done, and it does not run\n{}",
                world.trace()
            );
            assert_ne!(source.vm, Vm::Running, "Done, and the source runs\n{}", world.trace());
        }
        Phase::RolledBack => {
            assert_ne!(destination.vm, Vm::Running, "RolledBack, and it runs\n{}", world.trace());
        }
        Phase::Failed => {
            let excused = source.crashed || world.work_fails;
            assert!(excused, "Failed without a reason\n{}", world.trace());
        }
        phase => panic!("no end: {phase}\n{}", world.trace()),
    }
}
