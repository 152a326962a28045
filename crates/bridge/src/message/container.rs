//! Negotiation, containers, properties and the exit notification.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{RequestBase, ResponseBase, StrJson, is_false};
use crate::hresult::HResult;

/// The only protocol version in use.
pub const PROTOCOL_VERSION: u32 = 4;
/// What our guest advertises of our extensions: since 2 files can be put into it.
pub const DUNLIN_VERSION: u32 = 2;

/// NegotiateProtocol. The last two fields are Dunlin's; other guests ignore them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct NegotiateRequest {
    #[expect(missing_docs, reason = "the base of every request")]
    #[serde(flatten)]
    pub base: RequestBase,
    /// Lowest version that the host speaks.
    pub minimum_version: u32,
    /// Highest version that the host speaks.
    pub maximum_version: u32,
    /// The host's wall clock, nanoseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_time_unix_nanos: Option<i64>,
    /// GUID of the host's bridge object; request ids are unique within it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_instance: Option<String>,
}

/// Answer to NegotiateProtocol.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct NegotiateResponse {
    #[expect(missing_docs, reason = "the base of every answer")]
    #[serde(flatten)]
    pub base: ResponseBase,
    /// The version to speak from now on.
    pub version: u32,
    /// What the guest can do.
    pub capabilities: GuestCapabilities,
}

/// What a guest can do.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct GuestCapabilities {
    /// The host must send Create for the VM itself on a cold boot.
    #[serde(default, skip_serializing_if = "is_false")]
    pub send_host_create_message: bool,
    /// As above, and Start.
    #[serde(default, skip_serializing_if = "is_false")]
    pub send_host_start_message: bool,
    /// Versions of the container document.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub supported_schema_versions: Vec<SchemaVersion>,
    /// "Linux".
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub runtime_os_type: String,
    /// Must be present on the wire.
    pub guest_defined_capabilities: GuestDefinedCapabilities,
}

impl GuestCapabilities {
    /// What Dunlin's Linux guest advertises.
    #[must_use]
    pub fn dunlin() -> GuestCapabilities {
        GuestCapabilities {
            send_host_create_message: false,
            send_host_start_message: false,
            supported_schema_versions: vec![SchemaVersion::V21],
            runtime_os_type: "Linux".to_owned(),
            guest_defined_capabilities: GuestDefinedCapabilities {
                namespace_add_request_supported: true,
                signal_process_supported: true,
                dump_stacks_supported: true,
                delete_container_state_supported: true,
                dunlin_version: Some(DUNLIN_VERSION),
                plan9_supported: false,
            },
        }
    }

    /// Whether the guest speaks our extensions (repeated ids, resumable stdio, pause).
    #[must_use]
    pub fn speaks_dunlin(&self) -> bool {
        self.guest_defined_capabilities.dunlin_version.is_some_and(|version| version >= 1)
    }

    /// Whether files can be put into the guest.
    #[must_use]
    pub fn takes_files(&self) -> bool {
        self.guest_defined_capabilities.dunlin_version.is_some_and(|version| version >= 2)
    }
}

/// The part of the capabilities that each kind of guest defines for itself.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
#[expect(clippy::struct_excessive_bools, reason = "independent flags of the wire format")]
pub struct GuestDefinedCapabilities {
    /// Network adapters can be added and removed.
    #[serde(default)]
    pub namespace_add_request_supported: bool,
    /// SignalProcess is served.
    #[serde(default)]
    pub signal_process_supported: bool,
    /// DumpStacks is served.
    #[serde(default)]
    pub dump_stacks_supported: bool,
    /// DeleteContainerState is served.
    #[serde(default)]
    pub delete_container_state_supported: bool,
    /// Version of our extensions; absent on other guests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dunlin_version: Option<u32>,
    /// Dunlin's: the kernel has a 9P client, so that MappedDirectory can be added.
    #[serde(default, skip_serializing_if = "is_false")]
    pub plan9_supported: bool,
}

/// Version of the container document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
#[expect(missing_docs, reason = "two numbers")]
pub struct SchemaVersion {
    #[serde(default)]
    pub major: u32,
    #[serde(default)]
    pub minor: u32,
}

impl SchemaVersion {
    /// The lowest that guests take and the one that hosts send.
    pub const V21: SchemaVersion = SchemaVersion { major: 2, minor: 1 };
}

/// Create.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct CreateRequest {
    #[expect(missing_docs, reason = "the base of every request")]
    #[serde(flatten)]
    pub base: RequestBase,
    /// The container's document.
    pub container_config: StrJson<ContainerConfig>,
}

/// Answer to Create.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct CreateResponse {
    #[expect(missing_docs, reason = "the base of every answer")]
    #[serde(flatten)]
    pub base: ResponseBase,
    /// Unused.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub selected_version: String,
    /// Always 0.
    #[serde(default)]
    pub selected_protocol_version: u32,
}

/// The container's document.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ContainerConfig {
    /// At least 2.1.
    pub schema_version: SchemaVersion,
    /// Bundle directory in the guest.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub oci_bundle_path: String,
    /// OCI runtime specification; null when absent.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub oci_specification: Value,
    /// Directory on the scratch disk in the guest.
    #[serde(default)]
    pub scratch_dir_path: String,
}

/// Answer to DumpStacks.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct DumpStacksResponse {
    #[expect(missing_docs, reason = "the base of every answer")]
    #[serde(flatten)]
    pub base: ResponseBase,
    /// Text.
    #[serde(default)]
    pub guest_stacks: String,
}

/// GetProperties.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct PropertiesRequest {
    #[expect(missing_docs, reason = "the base of every request")]
    #[serde(flatten)]
    pub base: RequestBase,
    /// Which ones.
    pub query: StrJson<PropertyQuery>,
}

/// Which properties are wanted.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct PropertyQuery {
    /// Unknown kinds are ignored.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub property_types: Vec<PropertyType>,
}

/// A kind of property.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum PropertyType {
    /// `{"ProcessList":[{"ProcessId":n}]}`
    ProcessList,
    /// `{"LCOWMetrics":{…}}`, cgroup v1 shape.
    Statistics,
    /// A kind that we do not know.
    #[serde(other)]
    Unknown,
}

/// Answer to GetProperties.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct PropertiesResponse {
    #[expect(missing_docs, reason = "the base of every answer")]
    #[serde(flatten)]
    pub base: ResponseBase,
    /// The document asked for.
    pub properties: StrJson<Value>,
}

/// How a container ended, or what else happened to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names are the protocol's")]
pub enum NotificationType {
    None,
    /// After SIGTERM.
    GracefulExit,
    /// After SIGKILL.
    ForcedExit,
    /// By itself.
    UnexpectedExit,
    Reboot,
    Constructed,
    Started,
    Paused,
    #[serde(other)]
    Unknown,
}

/// What a guest says unasked: a container has ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ContainerNotification {
    #[expect(missing_docs, reason = "the base of every request")]
    #[serde(flatten)]
    pub base: RequestBase,
    /// What happened.
    #[serde(rename = "Type")]
    pub kind: NotificationType,
    /// Always "None".
    #[serde(default)]
    pub operation: String,
    /// Always success.
    #[serde(default)]
    pub result: HResult,
    /// Must be absent rather than empty: other hosts read the text as JSON.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result_info: Option<StrJson<Value>>,
}

impl ContainerNotification {
    /// The end of `container`.
    #[must_use]
    pub fn exit(container: &str, kind: NotificationType) -> ContainerNotification {
        ContainerNotification {
            base: RequestBase::of(container),
            kind,
            operation: "None".to_owned(),
            result: HResult::OK,
            result_info: None,
        }
    }
}
