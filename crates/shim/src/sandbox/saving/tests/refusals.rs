//! What a payload can say and this version cannot keep is refused by its place, before anything is taken in.

use std::time::Duration;

use dunlin_migration::refusal::Code;
use dunlin_wire::ids::GuestPid;
use dunlin_wire::tree::{
    Confidential, ProcessStage, SavedContainer, SavedDisk, SavedMount, SavedTree, VmStage,
};
use serde_json::json;

use super::world::{Place, Shape, World, stdio};

fn shape() -> Shape {
    Shape {
        layers: vec![0],
        scratch: Some(false),
        volumes: Vec::new(),
        copies: 0,
        stdio: stdio("init", [false, true, true], false),
        process: json!({"args": ["sh"]}),
        made: true,
    }
}

fn disk(tree: &mut SavedTree, writable: bool) -> &mut SavedDisk {
    let of_kind = |disk: &&mut SavedDisk| disk.access.is_writable() == writable;
    tree.vm.scsi.disks.values_mut().find(of_kind).unwrap()
}

fn mount(tree: &mut SavedTree) -> &mut SavedMount {
    disk(tree, true).mounts.get_mut(&0).unwrap()
}

fn container(tree: &mut SavedTree) -> &mut SavedContainer {
    &mut tree.pods[0].containers[1]
}

type Change = fn(&mut SavedTree);

#[tokio::test]
async fn what_cannot_be_kept_is_refused_by_its_place() {
    let at = tempfile::tempdir().unwrap();
    let mut source = World::new(at.path(), "pod");
    source.create("pod", Place::Sandbox { network: true }, &shape());
    source.create("web", Place::Workload { pod: "pod" }, &shape());
    for id in ["pod", "web"] {
        assert!(source.start(id, ""));
    }
    assert!(source.exec("web", "sh", stdio("sh", [true; 3], false), json!({"args": ["sh"]})));
    let tree = SavedTree::open(&source.export().unwrap().config).unwrap();
    let rules: &[(&str, Change)] = &[
        ("vm.options.confidential", |tree| tree.vm.options.confidential = Some(Confidential::default())),
        ("vm.options.scratch_encryption", |tree| tree.vm.options.scratch_encryption = true),
        ("vm.options.policy_based_routing", |tree| tree.vm.options.policy_based_routing = true),
        ("vm.options.fully_physically_backed", |tree| tree.vm.options.fully_physically_backed = true),
        ("vm.scsi.disks[1].mounts[0].encrypted", |tree| mount(tree).encrypted = true),
        ("vm.scsi.disks[1].mounts[0].ensure_filesystem", |tree| mount(tree).ensure_filesystem = true),
        ("vm.scsi.disks[1].mounts[0].read_only", |tree| mount(tree).read_only = true),
        ("vm.scsi.disks[0].mounts[0].read_only", |tree| {
            disk(tree, false).mounts.get_mut(&0).unwrap().read_only = false;
        }),
        ("pods[0].network.policy_based_routing", |tree| {
            tree.pods[0].network.as_mut().unwrap().policy_based_routing = true;
        }),
        ("pods[0].network.namespace_supported", |tree| {
            tree.pods[0].network.as_mut().unwrap().namespace_supported = false;
        }),
        ("pods[0].containers[1].io_retry_timeout", |tree| {
            container(tree).io_retry_timeout = Some(Duration::from_secs(60));
        }),
        ("pods[0].containers[1].processes[\"\"].io_retry_timeout", |tree| {
            container(tree).init.io_retry_timeout = Some(Duration::ZERO);
        }),
        ("pods[0].containers[1].processes[\"sh\"].io_retry_timeout", |tree| {
            let exec = container(tree).execs.values_mut().next().unwrap();
            exec.io_retry_timeout = Some(Duration::from_secs(1));
        }),
        ("pods[0].containers[1].processes[\"sh\"].stage", |tree| {
            container(tree).execs.values_mut().next().unwrap().stage = ProcessStage::Created(GuestPid(9));
        }),
    ];
    for (place, change) in rules {
        let mut changed = tree.clone();
        change(&mut changed);
        let there = World::new(at.path(), "pod");
        let refusal = there.import(&changed.seal().expect("the payload can say it")).expect_err(place);
        assert_eq!(refusal.code, Code::FailedPrecondition, "{place}");
        let text = refusal.to_string();
        assert!(
            text.contains(&format!("{place}: ")) && text.contains("move it to a host that can"),
            "{text}"
        );
        assert!(there.sandbox.inner().containers.is_empty(), "{place}: nothing was taken in");
    }
    let mut ended = tree.clone();
    ended.vm.stage = VmStage::Terminated;
    let there = World::new(at.path(), "pod");
    let refusal = there.import(&ended.seal().unwrap()).unwrap_err();
    assert!(refusal.code == Code::InvalidArgument && refusal.to_string().contains("vm.stage"), "{refusal}");
    there.import(&tree.seal().unwrap()).unwrap();
}
