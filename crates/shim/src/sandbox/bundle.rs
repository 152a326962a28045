//! The bundle directory that containerd makes for a container: `config.json`, the OCI spec.

use std::collections::HashMap;
use std::path::Path;

use serde_json::Value;

use super::error::SandboxError;

/// On a container that a migration created: the container's id on the source.
pub(crate) const SOURCE_ANNOTATION: &str = "io.microsoft.migration.source-container-id";
/// With it: the sandbox whose shim has imported that container.
pub(crate) const SANDBOX_ANNOTATION: &str = "io.dunlin.migration.sandbox-id";

/// The runtime's name in containerd.
pub(crate) const RUNTIME: &str = "io.containerd.dunlin.v2";

/// A spec is a few tens of KiB; a file beyond this is not one.
const SPEC_MAX: u64 = 16 * 1024 * 1024;

/// Reads a bundle's spec.
pub(crate) fn spec(bundle: &Path) -> Result<Value, SandboxError> {
    let path = bundle.join("config.json");
    let failed = |message: String| SandboxError::Bundle { path: path.display().to_string(), message };
    let meta = std::fs::metadata(&path).map_err(|error| failed(format!("cannot read it: {error}")))?;
    if meta.len() > SPEC_MAX {
        return Err(failed(format!("{} bytes are more than a spec has ({SPEC_MAX})", meta.len())));
    }
    let text = std::fs::read(&path).map_err(|error| failed(format!("cannot read it: {error}")))?;
    serde_json::from_slice(&text).map_err(|error| failed(format!("not an OCI runtime spec: {error}")))
}

/// The annotations of a bundle's spec.
pub(crate) fn annotations(bundle: &Path) -> Result<HashMap<String, String>, SandboxError> {
    Ok(annotations_of(&spec(bundle)?))
}

/// The annotations of a spec; values that are not text do not count.
pub(crate) fn annotations_of(spec: &Value) -> HashMap<String, String> {
    let Some(annotations) = spec.get("annotations").and_then(Value::as_object) else { return HashMap::new() };
    annotations.iter().filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect()
}

/// The network namespace that a spec joins by path.
pub(crate) fn network_namespace(spec: &Value) -> Option<String> {
    let namespaces = spec["linux"]["namespaces"].as_array()?;
    let network = namespaces.iter().find(|namespace| namespace["type"] == "network")?;
    network["path"].as_str().filter(|path| !path.is_empty()).map(str::to_owned)
}
