//! Which devices of the host a container's spec asks for.
//!
//! Two ways, and both may be used at once: annotations `io.dunlin.vpci.<anything>` = `<address>`, and entries
//! of `windows.devices` with the id `<address>` and the idType `vpci-instance-id` or `vpci`, as orchestrators of utility
//! VMs write them. An address is the host's, as in `0000:03:00.0`; `/<n>` after it asks for the n-th virtual function of
//! that device, counted from 1.

use dunlin_qemu::PciAddress;
use serde_json::Value;

use super::binding::Assigned;
use super::error::VpciError;

const ANNOTATION: &str = "io.dunlin.vpci.";
/// Root ports of the container's devices, as in `2,3`; the guest's name for it.
const PORTS: &str = "io.dunlin.vpci-ports";
const KINDS: [&str; 2] = ["vpci-instance-id", "vpci"];

/// A device that is asked for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct HostDevice {
    pub(crate) address: PciAddress,
    /// 0 is the device itself.
    pub(crate) function: u32,
}

impl HostDevice {
    pub(super) fn parse(text: &str) -> Result<HostDevice, VpciError> {
        let (address, function) = match text.split_once('/') {
            None => (text, 0),
            Some((address, number)) => {
                let index = number.parse().ok().filter(|index| *index > 0);
                let wrong = || VpciError::Index { id: text.to_owned(), what: number.to_owned() };
                (address, index.ok_or_else(wrong)?)
            }
        };
        Ok(HostDevice { address: address.trim().parse()?, function })
    }
}

impl std::fmt::Display for HostDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.function {
            0 => write!(f, "{}", self.address),
            function => write!(f, "{}/{function}", self.address),
        }
    }
}

/// The devices that a spec asks for, as containerd gave it. Each once.
pub(crate) fn devices_of(spec: &Value) -> Result<Vec<HostDevice>, VpciError> {
    let mut devices = Vec::new();
    let annotations = spec.get("annotations").and_then(Value::as_object);
    for (_, value) in annotations.into_iter().flatten().filter(|(key, _)| key.starts_with(ANNOTATION)) {
        devices.push(HostDevice::parse(value.as_str().unwrap_or_default())?);
    }
    let listed = spec.pointer("/windows/devices").and_then(Value::as_array);
    for device in listed.into_iter().flatten() {
        let text = |key: &str| device.get(key).and_then(Value::as_str).unwrap_or_default();
        if !KINDS.contains(&text("idType")) {
            return Err(VpciError::Kind { id: text("id").to_owned(), kind: text("idType").to_owned() });
        }
        devices.push(HostDevice::parse(text("id"))?);
    }
    devices.sort();
    match devices.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(VpciError::Twice { id: pair[0].to_string() }),
        None => Ok(devices),
    }
}

/// Tells the guest, in the container's spec, behind which root ports its devices are: it adds their device nodes. What a
/// spec said of it before is not the guest's to hear.
pub(crate) fn tell_ports(spec: &mut Value, devices: &[Assigned]) {
    let Some(spec) = spec.as_object_mut() else { return };
    let annotations = spec.entry("annotations").or_insert_with(|| Value::Object(serde_json::Map::new()));
    let Some(annotations) = annotations.as_object_mut() else { return };
    annotations.remove(PORTS);
    if !devices.is_empty() {
        let ports: Vec<String> = devices.iter().map(|device| device.port.to_string()).collect();
        annotations.insert(PORTS.to_owned(), Value::String(ports.join(",")));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn both_ways_of_asking_are_heard() {
        let spec = json!({
            "annotations": {"io.dunlin.vpci.gpu": "0000:03:00.0", "io.dunlin.other": "x"},
            "windows": {"devices": [
                {"id": "05:00.0/2", "idType": "vpci-instance-id"},
                {"id": "0000:06:00.0", "idType": "vpci"},
            ]},
        });
        let devices: Vec<String> = devices_of(&spec).unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(devices, ["0000:03:00.0", "0000:05:00.0/2", "0000:06:00.0"]);
        assert_eq!(devices_of(&json!({})).unwrap(), []);
    }

    #[test]
    fn what_cannot_be_meant_is_refused_by_name() {
        let listed = |id: &str, kind: &str| json!({"windows": {"devices": [{"id": id, "idType": kind}]}});
        for (spec, word) in [
            (listed("0000:03:00.0", "gpu"), "gpu"),
            (listed("class/5B45201D-F2F2-4F3B-85BB-30FF1F953599", "class"), "class"),
            (listed("PCIP\\VEN_10DE", "vpci"), "PCIP"),
            (listed("0000:03:00.0/x", "vpci"), "0000:03:00.0/x"),
            (listed("0000:03:00.0/0", "vpci"), "0000:03:00.0/0"),
            (
                json!({"annotations": {"io.dunlin.vpci.a": "03:00.0", "io.dunlin.vpci.b": "0000:03:00.0"}}),
                "twice",
            ),
            (json!({"annotations": {"io.dunlin.vpci.a": 3}}), "address"),
        ] {
            let error = devices_of(&spec).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn the_guest_is_told_the_ports_and_nothing_that_a_spec_made_up() {
        let mut spec = json!({"annotations": {"io.dunlin.vpci-ports": "0,1", "a": "b"}});
        tell_ports(&mut spec, &[]);
        assert_eq!(spec, json!({"annotations": {"a": "b"}}));
        let assigned = |port| Assigned { id: "x".into(), port: dunlin_qemu::RootPort::new(port).unwrap() };
        tell_ports(&mut spec, &[assigned(3), assigned(2)]);
        assert_eq!(spec["annotations"]["io.dunlin.vpci-ports"], "3,2");
        let mut bare = json!({});
        tell_ports(&mut bare, &[assigned(3)]);
        assert_eq!(bare["annotations"]["io.dunlin.vpci-ports"], "3");
    }
}
