//! Typed calls to containerd's Sandbox services: the store keeps records, the controller speaks with their shims.

use containerd_client::services::v1::sandbox as api;
use containerd_client::tonic::Code;
use containerd_client::tonic::transport::Channel;
use containerd_client::types::Sandbox;
use prost_types::Any;

use super::client::{Containerd, ContainerdError, LONG, SHORT, in_namespace, optional};

/// CreateSandbox's words that no record keeps.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Said {
    /// Of the network namespace on that host; empty: none.
    pub(crate) netns_path: String,
    pub(crate) options: Option<Any>,
}

impl ContainerdError {
    /// True when containerd has no such service: it is older than what was asked.
    pub(crate) fn is_no_service(&self) -> bool {
        matches!(self, ContainerdError::Refused { code: Code::Unimplemented, .. })
    }
}

impl Containerd {
    fn sandbox_store(&self) -> api::store_client::StoreClient<Channel> {
        api::store_client::StoreClient::new(self.channel.clone())
    }

    fn sandbox_controller(&self) -> api::controller_client::ControllerClient<Channel> {
        api::controller_client::ControllerClient::new(self.channel.clone())
    }

    /// The record of sandbox `id`, if there is one.
    pub(crate) async fn sandbox(
        &self,
        namespace: &str,
        id: &str,
    ) -> Result<Option<Sandbox>, ContainerdError> {
        let action = format!("get the record of sandbox `{id}` in namespace `{namespace}`");
        let request = in_namespace(namespace, api::StoreGetRequest { sandbox_id: id.into() })?;
        let answer = self.call(SHORT, action, self.sandbox_store().get(request)).await;
        Ok(optional(answer)?.and_then(|answer| answer.sandbox))
    }

    /// The records of `namespace` that carry the label `key`; none where containerd keeps no records.
    pub(crate) async fn sandboxes_labelled(
        &self,
        namespace: &str,
        key: &str,
    ) -> Result<Vec<Sandbox>, ContainerdError> {
        let action = format!("list sandboxes of namespace `{namespace}` that carry {key}");
        let request = api::StoreListRequest { filters: vec![format!("labels.{key:?}")] };
        let request = in_namespace(namespace, request)?;
        match self.call(SHORT, action, self.sandbox_store().list(request)).await {
            Ok(listed) => Ok(listed.list),
            Err(error) if error.is_no_service() => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// Keeps a record; nothing runs of it.
    pub(crate) async fn store_sandbox(
        &self,
        namespace: &str,
        sandbox: Sandbox,
    ) -> Result<(), ContainerdError> {
        let action =
            format!("create the record of sandbox `{}` in namespace `{namespace}`", sandbox.sandbox_id);
        let request = in_namespace(namespace, api::StoreCreateRequest { sandbox: Some(sandbox) })?;
        self.call(SHORT, action, self.sandbox_store().create(request)).await.map(drop)
    }

    /// Writes one field of a record: `spec`, or `labels.<key>`, which goes when `sandbox` has none.
    pub(crate) async fn update_sandbox(
        &self,
        namespace: &str,
        sandbox: Sandbox,
        field: &str,
    ) -> Result<(), ContainerdError> {
        let action = format!("write {field} of sandbox `{}` in namespace `{namespace}`", sandbox.sandbox_id);
        let request = api::StoreUpdateRequest { sandbox: Some(sandbox), fields: vec![field.into()] };
        let request = in_namespace(namespace, request)?;
        self.call(SHORT, action, self.sandbox_store().update(request)).await.map(drop)
    }

    /// Removes a record; what runs of it runs on.
    pub(crate) async fn forget_sandbox(&self, namespace: &str, id: &str) -> Result<(), ContainerdError> {
        let action = format!("delete the record of sandbox `{id}` in namespace `{namespace}`");
        let request = in_namespace(namespace, api::StoreDeleteRequest { sandbox_id: id.into() })?;
        self.call(SHORT, action, self.sandbox_store().delete(request)).await.map(drop)
    }

    /// Has the controller find or start the shim of `sandbox`, and tell it CreateSandbox.
    pub(crate) async fn create_sandbox(
        &self,
        namespace: &str,
        sandbox: Sandbox,
        said: Said,
    ) -> Result<(), ContainerdError> {
        let action = format!("create sandbox `{}` in namespace `{namespace}`", sandbox.sandbox_id);
        let request = api::ControllerCreateRequest {
            sandbox_id: sandbox.sandbox_id.clone(),
            sandboxer: sandbox.sandboxer.clone(),
            sandbox: Some(sandbox),
            netns_path: said.netns_path,
            options: said.options,
            ..api::ControllerCreateRequest::default()
        };
        let request = in_namespace(namespace, request)?;
        self.call(LONG, action, self.sandbox_controller().create(request)).await.map(drop)
    }

    /// Whether the controller `sandboxer` has a shim for sandbox `id`.
    pub(crate) async fn has_sandbox(
        &self,
        namespace: &str,
        id: &str,
        sandboxer: &str,
    ) -> Result<bool, ContainerdError> {
        let action = format!("ask controller `{sandboxer}` for sandbox `{id}` in namespace `{namespace}`");
        let request = api::ControllerStatusRequest {
            sandbox_id: id.into(),
            verbose: false,
            sandboxer: sandboxer.into(),
        };
        let request = in_namespace(namespace, request)?;
        let status = self.call(SHORT, action, self.sandbox_controller().status(request)).await?;
        // Of one that it does not know it says all but a state.
        Ok(!status.state.is_empty())
    }

    /// What CreateSandbox said of sandbox `id`, and the container that has its network cards, by its shim.
    pub(crate) async fn said_of_sandbox(
        &self,
        namespace: &str,
        id: &str,
        sandboxer: &str,
    ) -> Result<(Said, Option<String>), ContainerdError> {
        let action = format!("ask controller `{sandboxer}` about sandbox `{id}` in namespace `{namespace}`");
        let request = api::ControllerStatusRequest {
            sandbox_id: id.into(),
            verbose: true,
            sandboxer: sandboxer.into(),
        };
        let request = in_namespace(namespace, request)?;
        let mut status = self.call(SHORT, action, self.sandbox_controller().status(request)).await?;
        let netns_path = status.info.remove("network.namespace").unwrap_or_default();
        Ok((Said { netns_path, options: status.extra }, status.info.remove("network.pod")))
    }

    /// Ends the shim of sandbox `id`, and what the controller keeps of it.
    pub(crate) async fn shut_sandbox_down(
        &self,
        namespace: &str,
        id: &str,
        sandboxer: &str,
    ) -> Result<(), ContainerdError> {
        let action = format!("shut sandbox `{id}` of namespace `{namespace}` down");
        let request = api::ControllerShutdownRequest { sandbox_id: id.into(), sandboxer: sandboxer.into() };
        let request = in_namespace(namespace, request)?;
        self.call(LONG, action, self.sandbox_controller().shutdown(request)).await.map(drop)
    }
}
