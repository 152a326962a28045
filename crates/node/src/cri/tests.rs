//! A pod that arrives and goes back, each call failing in turn.

use std::path::Path;

use super::arrival::{CriArrivalError, PodArrival, Renamed, obstacles};
use super::fake::FakeCri;
use super::plan::Plan;
use super::plan::tests::{container_facts, pod_facts};
use super::{api, client, departure};
use crate::containerd::{SANDBOX, SESSION, SOURCE_CONTAINER};

fn plan() -> Plan {
    let members = [pod_facts("s"), container_facts("a", None), container_facts("debug", Some("a"))];
    Plan::read(&members, Path::new("/logs")).unwrap().unwrap()
}

async fn arriving() -> (FakeCri, client::Cri, PodArrival) {
    let (fake, cri) = FakeCri::serve().await;
    let arrival = PodArrival::new(cri.clone(), plan(), "first".into(), "session-1".into(), None);
    (fake, cri, arrival)
}

/// A pod that is nobody's business here.
fn another(fake: &FakeCri) {
    let metadata = api::PodSandboxMetadata { name: "other".into(), ..Default::default() };
    let config = api::PodSandboxConfig {
        metadata: Some(metadata),
        labels: [(SESSION.into(), "session-0".into())].into(),
        ..Default::default()
    };
    fake.state().pods.insert("another".into(), config);
}

#[tokio::test]
async fn every_container_is_made_in_order_and_told_whom_it_continues() {
    let (fake, _, mut arrival) = arriving().await;
    let renamed = arrival.create().await.unwrap();
    let pair = |source: &str, id: &str| Renamed { source: source.into(), id: id.into() };
    assert_eq!(renamed, [pair("s", "pod-0"), pair("a", "container-0"), pair("debug", "container-1")]);
    let state = fake.state();
    assert_eq!(
        state.calls,
        [
            "run with dunlin",
            "create name-of-a in pod-0",
            "start container-0",
            "create name-of-debug in pod-0",
            "start container-1",
        ]
    );
    let pod = &state.pods["pod-0"];
    assert_eq!(
        (pod.annotations[SOURCE_CONTAINER].as_str(), pod.annotations[SANDBOX].as_str()),
        ("s", "first")
    );
    let (_, debug) = &state.containers["container-1"];
    assert_eq!(debug.annotations[SOURCE_CONTAINER], "debug");
    assert_eq!(debug.labels[SESSION], "session-1");
    assert_eq!(super::plan::target_of(debug), Some("container-0"), "the target by its name here");
}

#[tokio::test]
async fn whatever_fails_all_that_was_made_goes_and_nothing_else() {
    for fails in [
        Some("run"),
        Some("create name-of-a"),
        Some("start container-0"),
        Some("create name-of-debug"),
        Some("start container-1"),
        None,
    ] {
        let (fake, _, mut arrival) = arriving().await;
        another(&fake);
        fake.state().fails = fails;
        assert_eq!(arrival.create().await.is_err(), fails.is_some(), "{fails:?}");
        assert_eq!(arrival.remove().await, Vec::<String>::new(), "{fails:?}");
        let state = fake.state();
        assert_eq!(state.pods.keys().collect::<Vec<_>>(), ["another"], "{fails:?}");
        assert!(state.containers.is_empty(), "{fails:?}");
    }
}

#[tokio::test]
async fn nothing_is_started_that_the_shim_would_take_for_new() {
    for (passes, setting, started) in
        [([false, true], "pod_annotations", 1), ([true, false], "container_annotations", 2)]
    {
        let (fake, _, mut arrival) = arriving().await;
        fake.state().passes = passes;
        let error = arrival.create().await.unwrap_err();
        assert!(matches!(error, CriArrivalError::Annotation { .. }));
        assert!(error.to_string().contains(setting), "{error}");
        let state = fake.state();
        assert_eq!(state.calls.len(), started, "{:?}", state.calls);
        assert!(state.calls.iter().all(|call| !call.starts_with("start")), "{:?}", state.calls);
    }
    let (fake, _, mut arrival) = arriving().await;
    fake.state().runtime = "io.containerd.runc.v2".into();
    let error = arrival.create().await.unwrap_err().to_string();
    assert!(error.contains("io.containerd.runc.v2") && error.contains("runtime_type"), "{error}");
}

#[tokio::test]
async fn what_cannot_be_removed_is_named_with_the_way_out_and_tried_again() {
    let (fake, _, mut arrival) = arriving().await;
    arrival.create().await.unwrap();
    // For as long as anybody waits for it.
    fake.state().busy = 10_000;
    let left = arrival.remove().await;
    assert_eq!(left.len(), 1, "{left:?}");
    assert!(left[0].contains("crictl rmp -f pod-0"), "{left:?}");
    // CRI has not yet noticed that the containers have ended.
    fake.state().busy = 3;
    assert_eq!(arrival.remove().await, Vec::<String>::new());
    let calls = fake.state().calls.len();
    assert_eq!(arrival.remove().await, Vec::<String>::new());
    assert_eq!(fake.state().calls.len(), calls, "nothing is asked once all is gone");
}

#[tokio::test]
async fn a_pod_of_the_same_name_is_an_obstacle() {
    let (fake, cri) = FakeCri::serve().await;
    another(&fake);
    assert_eq!(obstacles(&cri, &plan()).await.unwrap(), []);
    fake.state().pods.insert("old".into(), plan().config);
    let found = obstacles(&cri, &plan()).await.unwrap();
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].way_out.contains("crictl rmp -f old"), "{found:?}");
}

#[tokio::test]
async fn a_leaving_pod_is_asked_for_until_cri_has_seen_its_end() {
    let (fake, cri, mut arrival) = arriving().await;
    arrival.create().await.unwrap();
    fake.state().busy = 3;
    departure::remove(&cri, "pod-0").await.unwrap();
    assert!(fake.state().pods.is_empty());
    departure::remove(&cri, "pod-0").await.unwrap();
}
