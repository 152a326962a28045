//! What all requests and all answers share.

use std::collections::BTreeMap;

use serde::de::{DeserializeOwned, Error as _};
use serde::ser::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::hresult::HResult;

/// The container id of requests about the VM itself.
pub const UTILITY_VM: &str = "00000000-0000-0000-0000-000000000000";
/// The activity of requests that belong to none.
pub const NULL_ACTIVITY: &str = "00000000-0000-0000-0000-000000000000";

/// The fields that every request begins with. A bare one is the whole request of Start, Shutdown*,
/// DumpStacks, DeleteContainerState, PauseContainer and ResumeContainer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct RequestBase {
    /// The guest's id of the container; empty when negotiating.
    #[serde(default)]
    pub container_id: String,
    /// A GUID that the answer repeats.
    #[serde(default)]
    pub activity_id: String,
    /// W3C trace context.
    #[serde(rename = "otsc", default, skip_serializing_if = "BTreeMap::is_empty")]
    pub trace_context: BTreeMap<String, String>,
}

impl RequestBase {
    /// A request about `container`, of no activity.
    #[must_use]
    pub fn of(container: &str) -> RequestBase {
        RequestBase {
            container_id: container.to_owned(),
            activity_id: NULL_ACTIVITY.to_owned(),
            trace_context: BTreeMap::new(),
        }
    }
}

/// The fields that every answer begins with.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ResponseBase {
    /// Success or what kind of failure.
    pub result: HResult,
    /// The request's; absent when that was empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub activity_id: String,
    /// For people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub error_message: String,
    /// One for each failure on the way.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub error_records: Vec<ErrorRecord>,
}

/// Where in the guest a failure arose.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ErrorRecord {
    /// What kind of failure.
    pub result: HResult,
    /// For people.
    #[serde(default)]
    pub message: String,
    /// Guest stack, when known.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub stack_trace: String,
    /// The program.
    #[serde(default)]
    pub module_name: String,
    /// Source file; may be empty.
    #[serde(default)]
    pub file_name: String,
    /// Source line, 0xFFFFFFFF when unknown.
    #[serde(default)]
    pub line: u32,
    /// Function, when known.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub function_name: String,
}

/// A document that travels as the text of a JSON string.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StrJson<T>(pub T);

impl<T: Serialize> Serialize for StrJson<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&serde_json::to_string(&self.0).map_err(S::Error::custom)?)
    }
}

impl<'de, T: DeserializeOwned> Deserialize<'de> for StrJson<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        serde_json::from_str(&text).map(StrJson).map_err(D::Error::custom)
    }
}
