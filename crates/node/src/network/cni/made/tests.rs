//! Against a plugin that is a script: it notes how it was called and answers as it is told.

use std::os::unix::fs::PermissionsExt;

use serde_json::json;

use super::*;
use crate::proto::Interface;

struct Host {
    dir: tempfile::TempDir,
    config: CniConfig,
}

impl Host {
    /// A network of two plugins; the second does what `second` says.
    fn new(second: &str) -> Host {
        let dir = tempfile::tempdir().unwrap();
        let config = CniConfig {
            conf_dir: dir.path().join("conf"),
            bin_dir: dir.path().join("bin"),
            network: "pods".into(),
            interfaces: [("net1".to_owned(), "storage".to_owned())].into(),
        };
        std::fs::create_dir_all(&config.conf_dir).unwrap();
        std::fs::create_dir_all(&config.bin_dir).unwrap();
        let list = json!({ "cniVersion": "0.4.0", "name": "pods", "plugins": [
            { "type": "first", "capabilities": { "ips": true } }, { "type": "second" }] });
        std::fs::write(config.conf_dir.join("1.conflist"), list.to_string()).unwrap();
        let one = json!({ "cniVersion": "0.4.0", "name": "storage", "type": "first" });
        std::fs::write(config.conf_dir.join("2.conf"), one.to_string()).unwrap();
        let calls = dir.path().join("calls");
        for (name, rest) in [("first", "echo '{\"from\":\"first\"}'"), ("second", second)] {
            let program = config.bin_dir.join(name);
            let script = format!(
                "#!/bin/sh\nread -r conf\necho \"{name} $CNI_COMMAND $CNI_IFNAME $CNI_ARGS $conf\" >>{}\n{rest}\n",
                calls.display()
            );
            let text = dir.path().join(format!("{name}.txt"));
            std::fs::write(&text, script).unwrap();
            // Copied by another process: a fork of this one, made while the file is open for
            // writing, would make it "text file busy".
            assert!(std::process::Command::new("cp").arg(&text).arg(&program).status().unwrap().success());
            std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        Host { dir, config }
    }

    fn calls(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.dir.path().join("calls")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    fn attached(&self, name: &str, network: &str, ip: &str) -> Attached {
        Attached {
            name: name.into(),
            network: Network::find(&self.config.conf_dir, network).unwrap(),
            wanted: Wanted { ips: vec![ip.into()], mac: "02:00:00:00:00:05".into() },
            result: json!({ "from": "second" }),
        }
    }

    fn record(&self) -> Record {
        Record {
            path: self.dir.path().join("netns"),
            session: "s-1".into(),
            settled: false,
            interfaces: vec![self.attached("eth0", "pods", "10.0.0.5/24")],
            container: "dunlin-s-1-netns".into(),
            bin_dir: self.config.bin_dir.clone(),
        }
    }
}

#[tokio::test]
async fn a_release_calls_every_plugin_in_reverse_with_the_last_result_once() {
    let host = Host::new("echo");
    let memory = Memory::of(host.dir.path());
    let record = host.record();
    memory.write(&record).unwrap();
    assert_eq!(memory.unsettled(), [(record.path.clone(), "s-1".to_owned())]);
    assert!(memory.release(&record.path).await.unwrap());
    let calls = host.calls();
    assert_eq!(calls.len(), 2, "{calls:?}");
    assert!(calls[0].starts_with("second DEL eth0 IgnoreUnknown=1;IP=10.0.0.5/24;MAC=02:00:00:00:00:05 {"));
    assert!(calls[1].starts_with("first DEL eth0 IgnoreUnknown=1;MAC=02:00:00:00:00:05 {"), "{calls:?}");
    assert!(calls.iter().all(|call| call.contains(r#""prevResult":{"from":"second"}"#)), "{calls:?}");
    assert!(!memory.release(&record.path).await.unwrap(), "it was remembered twice");
    assert_eq!(host.calls().len(), 2);
}

#[tokio::test]
async fn what_a_plugin_refuses_is_told_in_its_words_and_stays_remembered() {
    let host = Host::new(r#"echo '{"code":7,"msg":"no addresses","details":"left"}'; exit 1"#);
    let memory = Memory::of(host.dir.path());
    let record = host.record();
    memory.write(&record).unwrap();
    let error = memory.release(&record.path).await.unwrap_err().to_string();
    assert!(error.contains("`second` refused DEL: no addresses left"), "{error}");
    assert_eq!(memory.release_session("another").await, Vec::<String>::new());
    assert_eq!(memory.release_session("s-1").await.len(), 1);
    // What has settled is not the session's to remove.
    memory.settle("s-1");
    assert_eq!(memory.release_session("s-1").await, Vec::<String>::new());
    assert_eq!(memory.unsettled(), []);
}

#[tokio::test]
async fn a_namespace_of_somebody_else_is_neither_made_nor_removed() {
    let host = Host::new("echo");
    let memory = Memory::of(host.dir.path());
    let there = host.dir.path().join("there");
    std::fs::write(&there, "").unwrap();
    let mut pod = PodNetwork { destination: there.display().to_string(), ..PodNetwork::default() };
    assert!(!memory.make(&host.config, "s", &pod, NetworkMode::Keep).await.unwrap());
    assert!(!memory.release(&there).await.unwrap());
    // The second interface without a network of its own is more than is configured.
    pod.destination = host.dir.path().join("absent").display().to_string();
    pod.interfaces = ["eth0", "net1", "net2"].map(named).into();
    let error = memory.make(&host.config, "s", &pod, NetworkMode::Keep).await.unwrap_err().to_string();
    for word in ["`net2`", "eth0's", "cni.interfaces", "absent"] {
        assert!(error.contains(word), "{word}: {error}");
    }
    assert_eq!(host.calls(), Vec::<String>::new());
}

fn named(name: &str) -> Interface {
    Interface { name: name.into(), ..Interface::default() }
}

#[test]
fn each_interface_has_the_network_that_is_named_for_it_and_one_has_the_other() {
    let host = Host::new("echo");
    let of = |names: &[&str]| {
        let interfaces = names.iter().map(|name| named(name)).collect();
        let found = networks(&host.config, &PodNetwork { interfaces, ..PodNetwork::default() });
        found.map(|found| found.into_iter().map(|network| network.name).collect::<Vec<String>>())
    };
    assert_eq!(of(&["eth0", "net1"]).unwrap(), ["pods", "storage"]);
    assert_eq!(of(&["net1", "ens3"]).unwrap(), ["storage", "pods"], "in whatever order");
    assert_eq!(of(&["net1"]).unwrap(), ["storage"]);
    assert_eq!(of(&[]).unwrap(), [""; 0]);
}

#[tokio::test]
async fn several_interfaces_are_released_the_last_one_first() {
    let host = Host::new("echo");
    let memory = Memory::of(host.dir.path());
    let mut record = host.record();
    record.interfaces.push(host.attached("net1", "storage", "10.9.0.5/24"));
    memory.write(&record).unwrap();
    assert!(memory.release(&record.path).await.unwrap());
    let calls = host.calls();
    let calls: Vec<String> =
        calls.iter().map(|call| call.splitn(4, ' ').take(3).collect::<Vec<_>>().join(" ")).collect();
    assert_eq!(calls, ["first DEL net1", "second DEL eth0", "first DEL eth0"]);
}
