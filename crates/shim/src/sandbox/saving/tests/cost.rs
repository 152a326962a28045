//! What saving and importing a sandbox costs, by the number of its containers: `make bench` and
//!
//! `cargo test --profile bench -p dunlin-shim -- --ignored --nocapture saving_costs`, the former built as the release is
//! (link-time optimization: a tenth faster).
//!
//! A pod as CRI makes it, ids of 64 digits: each container has an init and an exec with an OCI process of about 1 KiB, a
//! mount that is copied, two shared layers, and a scratch disk while the machine has slots for them.
//! Saving is what PrepareAndExportSandbox does under the lock: checks, every controller, the rules that a destination has,
//! sealing, the configuration beside it, freezing. Importing is what ImportSandbox does with the bytes.

use std::hint::black_box;
use std::time::{Duration, Instant};

use dunlin_wire::tree::SavedTree;

use super::world::{Place, Shape, World, stdio};

/// How many containers; the limits hold for the last.
const SIZES: [u32; 4] = [32, 64, 128, 256];
const ROUNDS: usize = 51;
/// Save and import of the last.
const TIME_LIMIT: Duration = Duration::from_millis(10);
/// Of a container's time in the largest sandbox by that in the smallest.
const GROWTH_LIMIT: f64 = 1.5;
/// Bytes of a container besides its OCI process objects.
const BYTES_LIMIT: usize = 1024;

/// 64 hex digits, as CRI makes them.
fn long_id(kind: u32, number: u32) -> String {
    format!("{kind:08x}{number:08x}").repeat(4)
}

fn sandbox(at: &std::path::Path, containers: u32) -> World {
    let pod = long_id(1, 0);
    let shape = Shape {
        layers: vec![0, 1],
        scratch: Some(false),
        volumes: Vec::new(),
        copies: 1,
        stdio: stdio("init", [true; 3], false),
        process: serde_json::from_str(OCI_PROCESS).unwrap(),
        made: true,
    };
    let mut world = World::new(at, &pod);
    for number in 0..containers {
        let (id, place) = match number {
            0 => (pod.clone(), Place::Sandbox { network: true }),
            _ => (long_id(2, number), Place::Workload { pod: &pod }),
        };
        world.create(&id, place, &shape);
        assert!(world.start(&id, ""));
        let exec = long_id(3, number);
        assert!(world.exec(&id, &exec, stdio(&exec, [true; 3], false), shape.process.clone()));
        assert!(world.start(&id, &exec));
    }
    world
}

/// Medians of one size.
struct Figure {
    containers: u32,
    save: Duration,
    import: Duration,
    /// Sealed, without the OCI process objects.
    bytes: usize,
}

fn measure(at: &std::path::Path, containers: u32) -> Figure {
    let source = sandbox(at, containers);
    let (mut saves, mut imports) = (Vec::new(), Vec::new());
    let mut config = source.export().unwrap().config;
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        config = black_box(source.export().unwrap()).config;
        saves.push(begun.elapsed());
        let there = World::new(at, "s");
        let begun = Instant::now();
        there.import(black_box(&config)).unwrap();
        imports.push(begun.elapsed());
    }
    let tree = SavedTree::open(&config).unwrap();
    let processes = tree.containers().flat_map(|(_, container)| container.processes());
    let spec: usize = processes.map(|(_, process)| process.oci_process.len()).sum();
    Figure { containers, save: median(saves), import: median(imports), bytes: config.value.len() - spec }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

#[tokio::test]
#[ignore = "a figure: make bench"]
async fn saving_costs_a_container_little_and_all_of_them_no_more() {
    let at = tempfile::tempdir().unwrap();
    let ms = |time: Duration| time.as_secs_f64() * 1000.0;
    println!("Saved state, 2 processes a container, medians of {ROUNDS} rounds, ms");
    println!("{:>10}  {:>7}  {:>7}  {:>7}  {:>14}", "containers", "save", "import", "both", "us a container");
    let each = |figure: &Figure| ms(figure.save + figure.import) * 1000.0 / f64::from(figure.containers);
    let figures = SIZES.map(|containers| {
        let figure = measure(at.path(), containers);
        let (save, import) = (ms(figure.save), ms(figure.import));
        println!(
            "{containers:>10}  {save:>7.2}  {import:>7.2}  {:>7.2}  {:>14.1}",
            save + import,
            each(&figure)
        );
        figure
    });
    let (first, last) = (&figures[0], &figures[SIZES.len() - 1]);
    // What one more container adds; the machine and the pod themselves are in every size alike.
    let bytes = (last.bytes - first.bytes) / (SIZES[SIZES.len() - 1] - SIZES[0]) as usize;
    let growth = each(last) / each(first);
    println!("a container besides its OCI process objects: {bytes} bytes, limit {BYTES_LIMIT}");
    println!("a container's time in {} by that in {}: {growth:.2}, limit {GROWTH_LIMIT}", SIZES[3], SIZES[0]);
    assert!(bytes <= BYTES_LIMIT, "{bytes} bytes a container");
    if cfg!(debug_assertions) {
        println!("a debug build: its times say nothing of what is shipped, and hold for no limit");
        return;
    }
    let both = last.save + last.import;
    assert!(both <= TIME_LIMIT, "{both:?} for {} containers, limit {TIME_LIMIT:?}", last.containers);
    assert!(growth <= GROWTH_LIMIT, "the time of a container grows by {growth:.2}, limit {GROWTH_LIMIT}");
}

/// As containerd makes it for a container without options.
const OCI_PROCESS: &str = r#"{"user":{"uid":0,"gid":0,"additionalGids":[0,1,2,3,4,6,10,11,20,26,27]},"args":["/bin/sh","-c","while true; do date; sleep 1; done"],"env":["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin","HOSTNAME=web-0","KUBERNETES_SERVICE_PORT=443","KUBERNETES_PORT_443_TCP=tcp://10.96.0.1:443"],"cwd":"/","capabilities":{"bounding":["CAP_CHOWN","CAP_DAC_OVERRIDE","CAP_FSETID","CAP_FOWNER","CAP_MKNOD","CAP_NET_RAW","CAP_SETGID","CAP_SETUID","CAP_SETFCAP","CAP_SETPCAP","CAP_NET_BIND_SERVICE","CAP_SYS_CHROOT","CAP_KILL","CAP_AUDIT_WRITE"],"effective":["CAP_CHOWN","CAP_DAC_OVERRIDE","CAP_FSETID","CAP_FOWNER","CAP_MKNOD","CAP_NET_RAW","CAP_SETGID","CAP_SETUID","CAP_SETFCAP","CAP_SETPCAP","CAP_NET_BIND_SERVICE","CAP_SYS_CHROOT","CAP_KILL","CAP_AUDIT_WRITE"]},"rlimits":[{"type":"RLIMIT_NOFILE","hard":1024,"soft":1024}],"noNewPrivileges":true}"#;
