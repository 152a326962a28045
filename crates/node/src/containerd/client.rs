//! Typed calls to containerd: each carries its namespace and a deadline, each failure says what
//! was asked of whom.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

use containerd_client::services::v1 as api;
use containerd_client::services::v1::snapshots as snap;
use containerd_client::tonic::transport::Channel;
use containerd_client::tonic::{Code, Request, Response, Status};
use containerd_client::types::Mount;
use containerd_client::types::v1::Process;

/// Metadata calls.
pub(super) const SHORT: Duration = Duration::from_secs(10);
/// Calls that stop a shim.
pub(super) const LONG: Duration = Duration::from_secs(60);
/// A task whose layers have to be built first.
const BUILD: Duration = Duration::from_secs(570);

/// Why a call to containerd failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ContainerdError {
    /// Nobody listens.
    #[error(
        "containerd does not answer on {socket}: {reason}; is it running, and does `containerd` in the node's configuration name its socket?"
    )]
    Unreachable {
        /// The socket.
        socket: PathBuf,
        /// The transport's words.
        reason: String,
    },
    /// The thing is not there.
    #[error("containerd: {action}: not found: {reason}")]
    NotFound {
        /// What was asked.
        action: String,
        /// containerd's words.
        reason: String,
    },
    /// The thing is there already.
    #[error("containerd: {action}: exists already: {reason}")]
    Exists {
        /// What was asked.
        action: String,
        /// containerd's words.
        reason: String,
    },
    /// Any other refusal.
    #[error("containerd: {action}: {reason} ({code:?})")]
    Refused {
        /// What was asked.
        action: String,
        /// containerd's words.
        reason: String,
        /// Its class.
        code: Code,
    },
    /// No answer in time.
    #[error("containerd: {action}: no answer within {} s; see containerd's log", waited.as_secs())]
    Late {
        /// What was asked.
        action: String,
        /// The deadline.
        waited: Duration,
    },
    /// An answer without its subject.
    #[error("containerd: {action}: the answer lacks `{field}`; is this containerd 1.6 or newer?")]
    Incomplete {
        /// What was asked.
        action: String,
        /// The missing field.
        field: &'static str,
    },
    /// The namespace cannot be sent as a header.
    #[error("`{0}` is no containerd namespace")]
    Namespace(String),
}

impl ContainerdError {
    /// True when the subject was not there.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, ContainerdError::NotFound { .. })
    }
}

/// Turns "it was not there" into `None`.
pub(crate) fn optional<T>(result: Result<T, ContainerdError>) -> Result<Option<T>, ContainerdError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

/// A connection to one containerd; a clone shares it.
#[derive(Debug, Clone)]
pub(crate) struct Containerd {
    pub(super) channel: Channel,
    socket: PathBuf,
}

impl Containerd {
    /// Connects, and connects again by itself when containerd restarts.
    pub(crate) async fn connect(socket: &Path) -> Result<Containerd, ContainerdError> {
        let unreachable = |reason: String| ContainerdError::Unreachable { socket: socket.to_owned(), reason };
        let connecting = containerd_client::connect(socket);
        let channel = tokio::time::timeout(SHORT, connecting)
            .await
            .map_err(|_| unreachable(format!("no connection within {} s", SHORT.as_secs())))?
            .map_err(|error| unreachable(root_cause(&error)))?;
        Ok(Containerd { channel, socket: socket.to_owned() })
    }

    /// For tests of what comes before any call.
    #[cfg(test)]
    pub(crate) fn unreachable() -> Containerd {
        use containerd_client::tonic::transport::Endpoint;
        let channel = Endpoint::from_static("unix:/nonexistent/containerd.sock").connect_lazy();
        Containerd { channel, socket: "/nonexistent/containerd.sock".into() }
    }

    /// Its CRI plugin, over the same connection; whether there is one shows at the first call.
    pub(crate) fn cri(&self) -> crate::cri::client::Cri {
        crate::cri::client::Cri::new(self.channel.clone(), &self.socket)
    }

    /// containerd's version.
    pub(crate) async fn version(&self) -> Result<String, ContainerdError> {
        let mut client = api::version_client::VersionClient::new(self.channel.clone());
        let answer = self.call(SHORT, "version".into(), client.version(())).await?;
        Ok(answer.version)
    }

    /// Every namespace.
    pub(crate) async fn namespaces(&self) -> Result<Vec<String>, ContainerdError> {
        let mut client = api::namespaces_client::NamespacesClient::new(self.channel.clone());
        let request = api::ListNamespacesRequest { filter: String::new() };
        let answer = self.call(SHORT, "list namespaces".into(), client.list(request)).await?;
        Ok(answer.namespaces.into_iter().map(|namespace| namespace.name).collect())
    }

    /// Container `id`.
    pub(crate) async fn container(
        &self,
        namespace: &str,
        id: &str,
    ) -> Result<api::Container, ContainerdError> {
        let action = format!("get container `{id}` in namespace `{namespace}`");
        let mut client = api::containers_client::ContainersClient::new(self.channel.clone());
        let request = in_namespace(namespace, api::GetContainerRequest { id: id.into() })?;
        let answer = self.call(SHORT, action.clone(), client.get(request)).await?;
        answer.container.ok_or(ContainerdError::Incomplete { action, field: "container" })
    }

    /// Every container of `namespace`.
    pub(crate) async fn containers(&self, namespace: &str) -> Result<Vec<api::Container>, ContainerdError> {
        let mut client = api::containers_client::ContainersClient::new(self.channel.clone());
        let request = in_namespace(namespace, api::ListContainersRequest { filters: Vec::new() })?;
        let action = format!("list containers of namespace `{namespace}`");
        Ok(self.call(SHORT, action, client.list(request)).await?.containers)
    }

    /// The containers of `namespace` that carry the label `key`.
    pub(crate) async fn containers_labelled(
        &self,
        namespace: &str,
        key: &str,
    ) -> Result<Vec<api::Container>, ContainerdError> {
        let mut client = api::containers_client::ContainersClient::new(self.channel.clone());
        let request = api::ListContainersRequest { filters: vec![format!("labels.{key:?}")] };
        let action = format!("list containers of namespace `{namespace}` that carry {key}");
        let listed = self.call(SHORT, action, client.list(in_namespace(namespace, request)?)).await?;
        Ok(listed.containers)
    }

    /// Takes the label `key` from container `id`.
    pub(crate) async fn remove_label(
        &self,
        namespace: &str,
        id: &str,
        key: &str,
    ) -> Result<(), ContainerdError> {
        let action = format!("remove the label {key} of container `{id}` in namespace `{namespace}`");
        let mut client = api::containers_client::ContainersClient::new(self.channel.clone());
        // A label that is named by the mask and absent from the record is removed; no other is touched.
        let mask = prost_types::FieldMask { paths: vec![format!("labels.{key}")] };
        let container = api::Container { id: id.into(), ..api::Container::default() };
        let request = api::UpdateContainerRequest { container: Some(container), update_mask: Some(mask) };
        self.call(SHORT, action, client.update(in_namespace(namespace, request)?)).await.map(drop)
    }

    /// Makes a container; nothing runs yet.
    pub(crate) async fn create_container(
        &self,
        namespace: &str,
        container: api::Container,
    ) -> Result<(), ContainerdError> {
        let action = format!("create container `{}` in namespace `{namespace}`", container.id);
        let mut client = api::containers_client::ContainersClient::new(self.channel.clone());
        let request = in_namespace(namespace, api::CreateContainerRequest { container: Some(container) })?;
        self.call(SHORT, action, client.create(request)).await.map(drop)
    }

    /// Removes a container's record.
    pub(crate) async fn delete_container(&self, namespace: &str, id: &str) -> Result<(), ContainerdError> {
        let action = format!("delete container `{id}` in namespace `{namespace}`");
        let mut client = api::containers_client::ContainersClient::new(self.channel.clone());
        let request = in_namespace(namespace, api::DeleteContainerRequest { id: id.into() })?;
        self.call(SHORT, action, client.delete(request)).await.map(drop)
    }

    /// What a snapshot stands on.
    pub(crate) async fn snapshot(
        &self,
        namespace: &str,
        snapshotter: &str,
        key: &str,
    ) -> Result<snap::Info, ContainerdError> {
        let action = format!("stat snapshot `{key}` of {snapshotter} in namespace `{namespace}`");
        let mut client = snap::snapshots_client::SnapshotsClient::new(self.channel.clone());
        let request = snap::StatSnapshotRequest { snapshotter: snapshotter.into(), key: key.into() };
        let answer = self.call(SHORT, action.clone(), client.stat(in_namespace(namespace, request)?)).await?;
        answer.info.ok_or(ContainerdError::Incomplete { action, field: "info" })
    }

    /// Makes a writable snapshot on `parent`, with `labels`.
    pub(crate) async fn prepare_snapshot(
        &self,
        namespace: &str,
        snapshotter: &str,
        key: &str,
        parent: &str,
        labels: std::collections::HashMap<String, String>,
    ) -> Result<Vec<Mount>, ContainerdError> {
        let action = format!("prepare snapshot `{key}` of {snapshotter} on `{parent}`");
        let mut client = snap::snapshots_client::SnapshotsClient::new(self.channel.clone());
        let request = snap::PrepareSnapshotRequest {
            snapshotter: snapshotter.into(),
            key: key.into(),
            parent: parent.into(),
            labels,
        };
        Ok(self.call(SHORT, action, client.prepare(in_namespace(namespace, request)?)).await?.mounts)
    }

    /// Removes a snapshot.
    pub(crate) async fn remove_snapshot(
        &self,
        namespace: &str,
        snapshotter: &str,
        key: &str,
    ) -> Result<(), ContainerdError> {
        let action = format!("remove snapshot `{key}` of {snapshotter} in namespace `{namespace}`");
        let mut client = snap::snapshots_client::SnapshotsClient::new(self.channel.clone());
        let request = snap::RemoveSnapshotRequest { snapshotter: snapshotter.into(), key: key.into() };
        self.call(SHORT, action, client.remove(in_namespace(namespace, request)?)).await.map(drop)
    }

    /// The task of container `id`, as its shim tells it.
    pub(crate) async fn task(&self, namespace: &str, id: &str) -> Result<Process, ContainerdError> {
        let action = format!("get the task of `{id}` in namespace `{namespace}`");
        let mut client = api::tasks_client::TasksClient::new(self.channel.clone());
        let request = api::GetRequest { container_id: id.into(), exec_id: String::new() };
        let answer = self.call(SHORT, action.clone(), client.get(in_namespace(namespace, request)?)).await?;
        answer.process.ok_or(ContainerdError::Incomplete { action, field: "process" })
    }

    /// Every task of `namespace`.
    pub(crate) async fn tasks(&self, namespace: &str) -> Result<Vec<Process>, ContainerdError> {
        let mut client = api::tasks_client::TasksClient::new(self.channel.clone());
        let request = in_namespace(namespace, api::ListTasksRequest { filter: String::new() })?;
        Ok(self
            .call(SHORT, format!("list tasks of namespace `{namespace}`"), client.list(request))
            .await?
            .tasks)
    }

    /// Makes a task, which starts or finds the shim. Answers the init's pid.
    pub(crate) async fn create_task(
        &self,
        namespace: &str,
        request: api::CreateTaskRequest,
    ) -> Result<u32, ContainerdError> {
        let action = format!("create the task of `{}` in namespace `{namespace}`", request.container_id);
        let mut client = api::tasks_client::TasksClient::new(self.channel.clone());
        Ok(self.call(BUILD, action, client.create(in_namespace(namespace, request)?)).await?.pid)
    }

    /// Deletes a task that has stopped.
    pub(crate) async fn delete_task(&self, namespace: &str, id: &str) -> Result<(), ContainerdError> {
        let action = format!("delete the task of `{id}` in namespace `{namespace}`");
        let mut client = api::tasks_client::TasksClient::new(self.channel.clone());
        let request = api::DeleteTaskRequest { container_id: id.into() };
        self.call(LONG, action, client.delete(in_namespace(namespace, request)?)).await.map(drop)
    }

    pub(super) async fn call<T, F>(
        &self,
        limit: Duration,
        action: String,
        call: F,
    ) -> Result<T, ContainerdError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        match tokio::time::timeout(limit, call).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(self.failed(action, &status)),
            Err(_) => Err(ContainerdError::Late { action, waited: limit }),
        }
    }

    fn failed(&self, action: String, status: &Status) -> ContainerdError {
        let reason = status.message().to_owned();
        match status.code() {
            Code::NotFound => ContainerdError::NotFound { action, reason },
            Code::AlreadyExists => ContainerdError::Exists { action, reason },
            // A shim's own failure also comes as Unavailable; only the transport has a source.
            Code::Unavailable if std::error::Error::source(status).is_some() => {
                ContainerdError::Unreachable { socket: self.socket.clone(), reason: root_cause(status) }
            }
            code => ContainerdError::Refused { action, reason, code },
        }
    }
}

/// The innermost words of an error chain: the outer ones of a transport say nothing.
pub(crate) fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

pub(super) fn in_namespace<T>(namespace: &str, message: T) -> Result<Request<T>, ContainerdError> {
    let mut request = Request::new(message);
    let value = namespace.parse().map_err(|_| ContainerdError::Namespace(namespace.to_owned()))?;
    request.metadata_mut().insert("containerd-namespace", value);
    Ok(request)
}
