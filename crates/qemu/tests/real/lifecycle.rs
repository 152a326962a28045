//! Starting, changing and ending a real QEMU.

use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use crate::common::{Host, SOON, busy_boot_disk, document, slot, tap};
use dunlin_qemu::qmp::QmpError;
use dunlin_qemu::version::{machine_supported, version};
use dunlin_qemu::{
    DiskSource, Event, MacAddress, Mode, PciAddress, Qemu, QemuError, RootPort, RunState, SpawnError,
};
use serde_json::json;

fn gone(pid: i32) -> bool {
    !std::path::Path::new(&format!("/proc/{pid}")).exists()
}

async fn becomes_gone(pid: i32) {
    let begin = std::time::Instant::now();
    while !gone(pid) {
        assert!(begin.elapsed() < SOON, "process {pid} is still there");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_machine_starts_runs_pauses_and_shuts_down() {
    let host = Host::new();
    let qemu = host.spawn(&document(), Mode::Boot).await;
    assert_eq!(qemu.status().await.unwrap(), RunState::Prelaunch);
    let mut events = qemu.events();
    qemu.cont().await.unwrap();
    assert_eq!(qemu.status().await.unwrap(), RunState::Running);
    qemu.stop().await.unwrap();
    assert_eq!(qemu.status().await.unwrap(), RunState::Paused);
    let resumed = events.next().await.unwrap().unwrap();
    assert_eq!(resumed.event, Event::Resume);
    let stopped = events.next().await.unwrap().unwrap();
    assert_eq!(stopped.event, Event::Stop);
    assert!(stopped.time >= resumed.time && stopped.time.unix_nanos().unwrap() > 1_700_000_000_000_000_000);

    let usage = qemu.usage().unwrap();
    assert!(usage.cpu_time_nanos > 1_000_000, "{usage:?}");
    assert!(usage.resident_bytes > 4 << 20, "{usage:?}");

    let (pid, exited) = (qemu.pid(), qemu.exited());
    assert!(exited.borrow().is_none());
    let report = qemu.shutdown(SOON).await.unwrap();
    assert_eq!((report.status, report.signal), (Some(0), None), "{report}");
    assert_eq!(exited.borrow().as_ref(), Some(&report));
    assert!(gone(pid), "reaped, not a zombie");
    assert!(!host.path("qmp.sock").exists() && !host.path("link.sock").exists());
    assert!(
        matches!(events.next().await, Some(Ok(event)) if matches!(event.event, Event::Shutdown { guest: false, .. }))
    );
}

#[tokio::test]
async fn it_is_confined() {
    let host = Host::new();
    let qemu = host.spawn(&document(), Mode::Boot).await;
    let own = std::fs::read_link("/proc/self/ns/net").unwrap();
    assert_ne!(std::fs::read_link(format!("/proc/{}/ns/net", qemu.pid())).unwrap(), own);
    let interfaces = std::fs::read_to_string(format!("/proc/{}/net/dev", qemu.pid())).unwrap();
    let names: Vec<&str> =
        interfaces.lines().skip(2).filter_map(|line| line.split(':').next()).map(str::trim).collect();
    assert!(!names.contains(&"eth0"), "{names:?}");
    let status = std::fs::read_to_string(format!("/proc/{}/status", qemu.pid())).unwrap();
    assert!(status.lines().any(|line| line.split_whitespace().eq(["Seccomp:", "2"])), "{status}");
}

#[tokio::test]
async fn disks_come_and_go_in_every_corner_and_every_state() {
    let host = Host::new();
    let image = DiskSource::writable(host.disk("a.raw", &vec![7; 1 << 20]));
    for mode in [Mode::Boot, Mode::Incoming] {
        let qemu = host.spawn(&document(), mode).await;
        for place in [slot(0, 0), slot(1, 5), slot(3, 63)] {
            qemu.attach_disk(place, &image).await.unwrap();
            qemu.detach_disk(place).await.unwrap();
        }
        if mode == Mode::Boot {
            qemu.cont().await.unwrap();
            for place in [slot(0, 0), slot(1, 5), slot(3, 63)] {
                qemu.attach_disk(place, &image).await.unwrap();
                qemu.detach_disk(place).await.unwrap();
            }
        }
        let nodes = qemu.qmp().execute("query-named-block-nodes", json!({"flat": true})).await.unwrap();
        assert_eq!(nodes, json!([]), "every image is closed");
        qemu.shutdown(SOON).await.unwrap();
    }
}

#[tokio::test]
async fn a_disk_that_cannot_be_attached_leaves_nothing_behind() {
    let host = Host::new();
    let qemu = host.spawn(&document(), Mode::Boot).await;
    let missing = DiskSource::read_only(host.path("missing.raw"));
    let error = qemu.attach_disk(slot(0, 1), &missing).await.unwrap_err();
    assert!(error.to_string().contains("missing.raw"), "{error}");
    let QemuError::AttachDisk { source: QmpError::Refused(refusal), .. } = error else { panic!("{error:?}") };
    assert!(refusal.desc.contains("No such file"), "{refusal}");

    let image = DiskSource::read_only(host.disk("a.raw", &[0; 4096]));
    qemu.attach_disk(slot(0, 1), &image).await.unwrap();
    assert!(matches!(qemu.attach_disk(slot(0, 1), &image).await, Err(QemuError::AttachDisk { .. })));
    qemu.detach_disk(slot(0, 1)).await.unwrap();
    assert!(matches!(qemu.detach_disk(slot(0, 1)).await, Err(QemuError::DetachDisk { .. })));

    // The node is accepted, the device is not: its address is taken by one that is not ours.
    qemu.qmp()
        .execute("blockdev-add", json!({"node-name": "squatter", "driver": "null-co", "size": 4096}))
        .await
        .unwrap();
    let squatter = json!({"driver": "scsi-hd", "id": "squatter", "bus": "scsi0.0", "channel": 0, "scsi-id": 0, "lun": 9,
        "drive": "squatter"});
    qemu.qmp().execute("device_add", squatter).await.unwrap();
    let error = qemu.attach_disk(slot(0, 9), &image).await.unwrap_err();
    let QemuError::AttachDisk { source: QmpError::Refused(refusal), .. } = error else { panic!("{error:?}") };
    assert_eq!(refusal.command, "device_add");
    let nodes =
        qemu.qmp().execute("query-named-block-nodes", json!({"flat": true})).await.unwrap().to_string();
    assert!(!nodes.contains("disk-0-9"), "{nodes}");
}

#[tokio::test]
async fn a_read_only_disk_is_read_only_and_a_writable_one_is_locked() {
    let host = Host::new();
    let qemu = host.spawn(&document(), Mode::Boot).await;
    let path = host.disk("a.raw", &[0; 4096]);
    qemu.attach_disk(slot(0, 0), &DiskSource::read_only(&path)).await.unwrap();
    let nodes = qemu.qmp().execute("query-named-block-nodes", json!({"flat": true})).await.unwrap();
    assert!(nodes.as_array().unwrap().iter().all(|node| node["ro"] == json!(true)), "{nodes}");
    qemu.detach_disk(slot(0, 0)).await.unwrap();

    qemu.attach_disk(slot(0, 0), &DiskSource::writable(&path)).await.unwrap();
    let other = Host::new();
    let second = other.spawn(&document(), Mode::Boot).await;
    let error = second.attach_disk(slot(0, 0), &DiskSource::writable(&path)).await.unwrap_err();
    let QemuError::AttachDisk { source: QmpError::Refused(refusal), .. } = error else { panic!("{error:?}") };
    assert!(refusal.desc.contains("lock"), "{refusal}");
}

#[tokio::test]
async fn a_nic_sits_on_its_root_port_and_stays_until_the_guest_lets_go() {
    let host = Host::new();
    let qemu = host.spawn(&document(), Mode::Boot).await;
    let mac: MacAddress = "52:54:00:00:00:01".parse().unwrap();
    let port = RootPort::new(2).unwrap();
    qemu.attach_nic(port, mac, tap()).await.unwrap();
    for (property, expected) in [("mac", "52:54:00:00:00:01"), ("parent_bus", "/machine/peripheral/rp2/rp2")]
    {
        let request = json!({"path": "/machine/peripheral/nic-2", "property": property});
        let seen = qemu.qmp().execute("qom-get", request).await.unwrap();
        assert_eq!(seen, json!(expected));
    }
    let taken = qemu.attach_nic(port, mac, tap()).await;
    assert!(matches!(taken, Err(QemuError::AttachNic { .. })), "{taken:?}");

    // A guest that has never run has nobody who could let go.
    let kept = qemu.detach_nic(port, Duration::from_millis(100)).await;
    assert!(matches!(kept, Err(QemuError::NotReleased { ref device, .. }) if device == "nic-2"), "{kept:?}");
    // What is not a tap is refused, and the port stays free.
    let (not_a_tap, _other) = crate::common::stream_pair();
    let port = RootPort::new(0).unwrap();
    assert!(matches!(qemu.attach_nic(port, mac, not_a_tap).await, Err(QemuError::AttachNic { .. })));
    qemu.attach_nic(port, mac, tap()).await.unwrap();
}

/// No device can be handed out on most hosts; that QEMU looks for the one it was told shows that it
/// understood the rest.
#[tokio::test]
async fn a_host_device_that_is_not_there_is_refused_and_leaves_its_port_free() {
    let host = Host::new();
    let qemu = host.spawn(&document(), Mode::Boot).await;
    let port = RootPort::new(1).unwrap();
    let address: PciAddress = "ffff:ff:1f.7".parse().unwrap();
    let error = qemu.attach_host_device(port, address).await.unwrap_err();
    let QemuError::AttachDevice { source: QmpError::Refused(refusal), .. } = error else {
        panic!("{error:?}")
    };
    assert!(refusal.desc.contains("ffff:ff:1f.7"), "{refusal}");
    let error = qemu.detach_host_device(port, SOON).await.unwrap_err();
    assert!(matches!(error, QemuError::DetachDevice { .. }), "{error:?}");
    qemu.attach_nic(port, "52:54:00:00:00:01".parse().unwrap(), tap()).await.unwrap();
}

#[tokio::test]
async fn a_killed_qemu_is_reported_and_fails_what_is_open() {
    let host = Host::new();
    let qemu = host.spawn(&document(), Mode::Boot).await;
    let mut exited = qemu.exited();
    let mut events = qemu.events();
    qemu.kill();
    let report =
        tokio::time::timeout(SOON, exited.wait_for(Option::is_some)).await.unwrap().unwrap().clone().unwrap();
    assert_eq!((report.status, report.signal), (None, Some(9)));
    assert!(matches!(qemu.status().await, Err(QemuError::Control { source: QmpError::Closed { .. }, .. })));
    assert!(events.next().await.is_none());
    assert!(matches!(qemu.usage(), Err(QemuError::Ended(ended)) if ended == report));
    let again = qemu.shutdown(SOON).await.unwrap();
    assert_eq!(again, report);
}

#[tokio::test]
async fn dropping_the_owner_ends_and_reaps_the_process() {
    let host = Host::new();
    let qemu = host.spawn(&document(), Mode::Boot).await;
    let (pid, socket) = (qemu.pid(), host.path("qmp.sock"));
    assert!(socket.exists());
    drop(qemu);
    assert!(!socket.exists());
    becomes_gone(pid).await;
}

#[tokio::test]
async fn a_late_owner_leaves_the_sockets_of_the_next_machine_alone() {
    let host = Host::new();
    let first = host.spawn(&document(), Mode::Boot).await;
    let mut exited = first.exited();
    first.kill();
    tokio::time::timeout(SOON, exited.wait_for(Option::is_some)).await.unwrap().unwrap();
    let second = host.spawn(&document(), Mode::Boot).await;
    drop(first);
    assert!(host.path("qmp.sock").exists() && host.path("link.sock").exists());
    assert_eq!(second.status().await.unwrap(), RunState::Prelaunch);
}

#[tokio::test]
async fn a_guest_that_resets_ends_qemu_and_says_why() {
    let host = Host::new();
    let qemu = host.spawn(&document(), Mode::Boot).await;
    let (mut events, mut exited) = (qemu.events(), qemu.exited());
    qemu.cont().await.unwrap();
    qemu.qmp().execute("system_reset", json!({})).await.unwrap();
    let report =
        tokio::time::timeout(SOON, exited.wait_for(Option::is_some)).await.unwrap().unwrap().clone().unwrap();
    assert_eq!(report.status, Some(0), "{report}");
    let mut shutdown = None;
    while let Some(Ok(event)) = events.next().await {
        if let Event::Shutdown { guest, reason } = event.event {
            shutdown = Some((guest, reason));
        }
    }
    assert_eq!(shutdown, Some((false, "host-qmp-system-reset".to_owned())));
}

#[tokio::test]
async fn what_cannot_start_says_why() {
    let host = Host::new();
    let mut options = host.options();
    options.binary = "/nonexistent/qemu".into();
    let missing = Qemu::spawn(&options, &document(), Mode::Boot).await.unwrap_err();
    assert!(missing.to_string().contains("qemu-system-x86"), "{missing}");

    let mut wrong_machine = document();
    wrong_machine.machine = "pc-q35-99.9".into();
    let error = Qemu::spawn(&host.options(), &wrong_machine, Mode::Boot).await.unwrap_err();
    let SpawnError::EndedEarly { report } = &error else { panic!("{error:?}") };
    assert_eq!(report.status, Some(1));
    assert!(error.to_string().contains("unsupported machine type"), "{error}");

    // The log grows from start to start; a report holds its own process's words only.
    let mut wrong_cpu = document();
    wrong_cpu.cpu = "Abacus".into();
    let error = Qemu::spawn(&host.options(), &wrong_cpu, Mode::Boot).await.unwrap_err();
    assert!(
        error.to_string().contains("Abacus") && !error.to_string().contains("unsupported machine"),
        "{error}"
    );

    let mut no_kernel = host.options();
    no_kernel.paths.kernel = Some("/nonexistent/vmlinuz".into());
    let error = Qemu::spawn(&no_kernel, &document(), Mode::Boot).await.unwrap_err();
    assert!(error.to_string().contains("vmlinuz"), "{error}");

    let mut no_directory = host.options();
    no_directory.paths.qemu_log = "/nonexistent/qemu.log".into();
    let error = Qemu::spawn(&no_directory, &document(), Mode::Boot).await.unwrap_err();
    assert!(matches!(error, SpawnError::OpenLog { .. }), "{error:?}");
}

#[tokio::test]
async fn a_qemu_that_never_answers_is_killed_at_the_deadline() {
    let host = Host::new();
    let script = silent_qemu(&host);
    let mut options = host.options();
    options.binary = script;
    // A shell has started and spoken by then.
    options.start_deadline = Duration::from_secs(5);
    let error = Qemu::spawn(&options, &document(), Mode::Boot).await.unwrap_err();
    assert!(matches!(error, SpawnError::NoAnswer { .. }), "{error:?}");
    assert!(error.to_string().contains("waiting for Godot"), "{error}");
    assert!(gone(pid_of_silent(&host).await));
}

#[tokio::test]
async fn a_start_that_is_no_longer_awaited_leaves_no_process() {
    let host = Host::new();
    let mut options = host.options();
    options.binary = silent_qemu(&host);
    let document = document();
    // The start is dropped as soon as its process is known.
    let pid = tokio::select! {
        started = Qemu::spawn(&options, &document, Mode::Boot) => panic!("{:?}", started.err()),
        pid = pid_of_silent(&host) => pid,
    };
    becomes_gone(pid).await;
}

/// A program that starts like QEMU and never listens; it leaves its process id in `pid`.
fn silent_qemu(host: &Host) -> std::path::PathBuf {
    let (text, script) = (host.path("silent.txt"), host.path("silent"));
    std::fs::write(&text, "#!/bin/sh\necho $$ >\"${0%/*}/pid\"\necho waiting for Godot\nexec sleep 60\n")
        .unwrap();
    // Copied by another process: a fork of this one, made while the file is open for writing, would
    // make it "text file busy".
    assert!(std::process::Command::new("cp").arg(&text).arg(&script).status().unwrap().success());
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    script
}

/// Waits until a [`silent_qemu`] has left its process id.
async fn pid_of_silent(host: &Host) -> i32 {
    let begin = std::time::Instant::now();
    loop {
        let text = std::fs::read_to_string(host.path("pid")).unwrap_or_default();
        if text.ends_with('\n') {
            return text.trim().parse().unwrap();
        }
        assert!(begin.elapsed() < SOON, "it has not started");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Not a test of its own: what [`the_death_of_its_owner_ends_qemu`] runs in a second process.
#[tokio::test]
#[ignore = "run by another test in a process of its own"]
async fn owner_that_dies() {
    let host = Host::new();
    let qemu = host.spawn(&document(), Mode::Boot).await;
    println!("qemu={}", qemu.pid());
    std::fs::remove_dir_all(host.path("")).unwrap();
    nix::sys::signal::kill(nix::unistd::getpid(), nix::sys::signal::Signal::SIGKILL).unwrap();
}

#[tokio::test]
async fn the_death_of_its_owner_ends_qemu() {
    let owner = tokio::process::Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "--nocapture", "lifecycle::owner_that_dies"])
        .output()
        .await
        .unwrap();
    assert_eq!(owner.status.signal(), Some(9), "{owner:?}");
    let printed = String::from_utf8(owner.stdout).unwrap();
    let pid = printed.split("qemu=").nth(1).and_then(|rest| rest.split_whitespace().next()).unwrap();
    // Reaping an orphan is up to init, and not every init does.
    let stat = format!("/proc/{pid}/stat");
    let dead = || std::fs::read_to_string(&stat).map_or(true, |stat| stat.contains(") Z "));
    let begin = std::time::Instant::now();
    while !dead() {
        assert!(begin.elapsed() < SOON, "QEMU outlives its owner");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn the_installed_qemu_tells_what_it_is() {
    let binary = std::path::Path::new("qemu-system-x86_64");
    let version = version(binary).await.unwrap();
    assert!(version.major >= 7, "{version}");
    assert!(machine_supported(binary, "pc-q35-7.2").await.unwrap());
    assert!(!machine_supported(binary, "pc-q35-99.9").await.unwrap());
}

#[tokio::test]
async fn the_guest_really_runs() {
    let host = Host::new();
    let qemu = host.spawn(&document(), Mode::Boot).await;
    qemu.attach_disk(slot(0, 0), &DiskSource::read_only(host.disk("boot.raw", &busy_boot_disk())))
        .await
        .unwrap();
    qemu.cont().await.unwrap();
    let begin = std::time::Instant::now();
    // The guest's loop burns a CPU; an idle firmware would not.
    while qemu.usage().unwrap().cpu_time_nanos < 1_500_000_000 {
        assert!(begin.elapsed() < SOON, "{:?}", qemu.usage());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
