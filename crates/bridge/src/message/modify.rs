//! ModifySettings: disks, layers, mounts, adapters, limits.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

use super::{NetworkAdapter, RequestBase, is_false, is_zero};

/// ModifySettings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ModifyRequest {
    #[expect(missing_docs, reason = "the base of every request")]
    #[serde(flatten)]
    pub base: RequestBase,
    /// What to change.
    pub request: ModificationRequest,
}

/// What to change, settings not yet read.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ModificationRequest {
    /// Absent means Add.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_type: Option<RequestType>,
    /// Names the kind of `settings`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub resource_type: String,
    /// By resource type.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub settings: Value,
}

/// Add, Remove, …
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names are the protocol's")]
pub enum RequestType {
    #[default]
    Add,
    Remove,
    PreAdd,
    Update,
}

/// A change to the VM or to a container.
#[derive(Debug, Clone, PartialEq)]
pub struct Modification {
    /// Add, Remove, …
    pub request_type: RequestType,
    /// Of what.
    pub resource: Resource,
}

/// What is added, removed or updated.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "the names are the protocol's")]
pub enum Resource {
    MappedVirtualDisk(MappedVirtualDisk),
    ScsiDevice(ScsiDevice),
    CombinedLayers(CombinedLayers),
    MappedDirectory(MappedDirectory),
    VpciDevice(VpciDevice),
    Network(NetworkAdapter),
    ContainerConstraints(ContainerConstraints),
    PodCgroupMemoryLimit,
    SecurityPolicy(SecurityPolicy),
    SecurityPolicyFragment(SecurityPolicyFragment),
}

/// A modification cannot be understood.
#[derive(Debug, Error)]
pub enum ModificationError {
    /// The guest does not know the kind of resource.
    #[error(
        "resource type {0:?} is not known to this guest; it takes disks, layers, directories, adapters, limits and policies"
    )]
    UnknownResource(String),
    /// The settings are not those of the resource.
    #[error("settings of {resource} cannot be read: {source}")]
    Settings {
        /// The resource type.
        resource: &'static str,
        /// What is wrong with them.
        source: serde_json::Error,
    },
}

impl Modification {
    /// An addition.
    #[must_use]
    pub fn add(resource: Resource) -> Modification {
        Modification { request_type: RequestType::Add, resource }
    }

    /// An update of what is there.
    #[must_use]
    pub fn update(resource: Resource) -> Modification {
        Modification { request_type: RequestType::Update, resource }
    }

    /// A removal.
    #[must_use]
    pub fn remove(resource: Resource) -> Modification {
        Modification { request_type: RequestType::Remove, resource }
    }
}

impl TryFrom<ModificationRequest> for Modification {
    type Error = ModificationError;

    fn try_from(request: ModificationRequest) -> Result<Modification, ModificationError> {
        let settings = request.settings;
        let resource = match request.resource_type.as_str() {
            "MappedVirtualDisk" => Resource::MappedVirtualDisk(read("MappedVirtualDisk", settings)?),
            "SCSIDevice" => Resource::ScsiDevice(read("SCSIDevice", settings)?),
            "CombinedLayers" => Resource::CombinedLayers(read("CombinedLayers", settings)?),
            "MappedDirectory" => Resource::MappedDirectory(read("MappedDirectory", settings)?),
            "VPCIDevice" => Resource::VpciDevice(read("VPCIDevice", settings)?),
            "Network" => Resource::Network(read("Network", settings)?),
            "ContainerConstraints" => Resource::ContainerConstraints(read("ContainerConstraints", settings)?),
            "PodCgroupMemoryLimit" => Resource::PodCgroupMemoryLimit,
            "SecurityPolicy" => Resource::SecurityPolicy(read("SecurityPolicy", settings)?),
            "SecurityPolicyFragment" => {
                Resource::SecurityPolicyFragment(read("SecurityPolicyFragment", settings)?)
            }
            other => return Err(ModificationError::UnknownResource(other.to_owned())),
        };
        Ok(Modification { request_type: request.request_type.unwrap_or_default(), resource })
    }
}

fn read<T: DeserializeOwned>(resource: &'static str, settings: Value) -> Result<T, ModificationError> {
    let settings = if settings.is_null() { Value::Object(serde_json::Map::new()) } else { settings };
    serde_json::from_value(settings).map_err(|source| ModificationError::Settings { resource, source })
}

impl TryFrom<&Modification> for ModificationRequest {
    type Error = serde_json::Error;

    fn try_from(modification: &Modification) -> Result<ModificationRequest, serde_json::Error> {
        let (name, settings) = match &modification.resource {
            Resource::MappedVirtualDisk(s) => ("MappedVirtualDisk", serde_json::to_value(s)?),
            Resource::ScsiDevice(s) => ("SCSIDevice", serde_json::to_value(s)?),
            Resource::CombinedLayers(s) => ("CombinedLayers", serde_json::to_value(s)?),
            Resource::MappedDirectory(s) => ("MappedDirectory", serde_json::to_value(s)?),
            Resource::VpciDevice(s) => ("VPCIDevice", serde_json::to_value(s)?),
            Resource::Network(s) => ("Network", serde_json::to_value(s)?),
            Resource::ContainerConstraints(s) => ("ContainerConstraints", serde_json::to_value(s)?),
            Resource::PodCgroupMemoryLimit => ("PodCgroupMemoryLimit", Value::Null),
            Resource::SecurityPolicy(s) => ("SecurityPolicy", serde_json::to_value(s)?),
            Resource::SecurityPolicyFragment(s) => ("SecurityPolicyFragment", serde_json::to_value(s)?),
        };
        Ok(ModificationRequest {
            request_type: Some(modification.request_type),
            resource_type: name.to_owned(),
            settings,
        })
    }
}

/// A SCSI disk, and where to mount it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
#[expect(clippy::struct_excessive_bools, reason = "independent flags of the wire format")]
pub struct MappedVirtualDisk {
    /// Empty: the disk is only waited for.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub mount_path: String,
    /// 0 to 63.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub lun: u8,
    /// 0 to 3.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub controller: u8,
    /// 0 is the whole disk.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub partition: u64,
    /// Mount read-only.
    #[serde(default, skip_serializing_if = "is_false")]
    pub read_only: bool,
    /// Behind dm-crypt with a throw-away key.
    #[serde(default, skip_serializing_if = "is_false")]
    pub encrypted: bool,
    /// Mount options.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
    /// Make `mount_path` a link to the device instead.
    #[serde(default, skip_serializing_if = "is_false")]
    pub block_dev: bool,
    /// Format when the file system differs from `filesystem`.
    #[serde(default, skip_serializing_if = "is_false")]
    pub ensure_filesystem: bool,
    /// Type of the file system; empty: probe.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub filesystem: String,
}

/// A SCSI address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ScsiDevice {
    /// 0 to 3.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub controller: u8,
    /// 0 to 63.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub lun: u8,
}

/// An overlay.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct CombinedLayers {
    /// The container it is for.
    #[serde(rename = "ContainerID", default, skip_serializing_if = "String::is_empty")]
    pub container_id: String,
    /// Where it is mounted.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub container_root_path: String,
    /// Topmost first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<Layer>,
    /// Directory for what is written; empty: read-only.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub scratch_path: String,
}

/// A read-only layer.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Layer {
    /// Unused by Linux guests.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub id: String,
    /// Its mount in the guest.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub path: String,
}

/// A directory of the host.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct MappedDirectory {
    /// Where it is mounted.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub mount_path: String,
    /// The server's port.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub port: i32,
    /// The server's name for it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub share_name: String,
    /// Mount read-only.
    #[serde(default, skip_serializing_if = "is_false")]
    pub read_only: bool,
}

/// A passed-through PCI device.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct VpciDevice {
    /// The host's GUID of it.
    #[serde(rename = "VMBusGUID", default, skip_serializing_if = "String::is_empty")]
    pub vmbus_guid: String,
    /// Dunlin's: the PCIe root port that it is plugged into, 0 to 3. A machine of QEMU's has no VMBus to
    /// find the device by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root_port: Option<u8>,
}

/// New limits of a container.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ContainerConstraints {
    /// OCI Linux resources.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub linux: Value,
}

/// Policy of a confidential guest.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
#[expect(missing_docs, reason = "the names are the protocol's")]
pub struct SecurityPolicy {
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub enforcer_type: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub encoded_security_policy: String,
}

/// Addition to such a policy.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
#[expect(missing_docs, reason = "the names are the protocol's")]
pub struct SecurityPolicyFragment {
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub fragment: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub media_type: String,
}
