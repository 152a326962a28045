//! Typed calls to containerd's CRI plugin, each with a deadline.

use std::collections::HashMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

use containerd_client::tonic::transport::Channel;
use containerd_client::tonic::{Code, Response, Status};

use super::api;
use super::api::runtime_service_client::RuntimeServiceClient;
use crate::containerd::client::root_cause;

/// Questions.
const SHORT: Duration = Duration::from_secs(10);
/// Calls that end processes, and one that makes a container without starting it.
const LONG: Duration = Duration::from_secs(60);
/// Calls that make a task, whose layers may have to be built first.
const BUILD: Duration = Duration::from_secs(570);

/// Why a call to the CRI plugin failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CriError {
    /// containerd serves no CRI.
    #[error(
        "containerd on {socket} does not serve CRI: {reason}; enable its CRI plugin (`disabled_plugins`), and see its log for why the plugin did not load"
    )]
    NotServed {
        /// The socket.
        socket: PathBuf,
        /// Its words.
        reason: String,
    },
    /// Nobody listens.
    #[error("containerd does not answer on {socket}: {reason}; is it running?")]
    Unreachable {
        /// The socket.
        socket: PathBuf,
        /// The transport's words.
        reason: String,
    },
    /// The thing is not there.
    #[error("CRI: {action}: not found: {reason}")]
    NotFound {
        /// What was asked.
        action: String,
        /// The plugin's words.
        reason: String,
    },
    /// Any other refusal.
    #[error("CRI: {action}: {reason}")]
    Refused {
        /// What was asked.
        action: String,
        /// The plugin's words.
        reason: String,
    },
    /// No answer in time.
    #[error("CRI: {action}: no answer within {} s; see containerd's log", waited.as_secs())]
    Late {
        /// What was asked.
        action: String,
        /// The deadline.
        waited: Duration,
    },
    /// An answer without its subject.
    #[error("CRI: {action}: the answer lacks `{field}`; is this containerd 1.6 or newer?")]
    Incomplete {
        /// What was asked.
        action: String,
        /// The missing field.
        field: &'static str,
    },
}

/// The CRI plugin of one containerd; a clone shares its connection.
#[derive(Debug, Clone)]
pub(crate) struct Cri {
    runtime: RuntimeServiceClient<Channel>,
    socket: PathBuf,
}

/// What the plugin says of a pod or container, with its own account of it.
#[derive(Debug, Clone)]
pub(crate) struct Described<T> {
    /// Its status.
    pub(crate) status: T,
    /// JSON, the value of `info`.
    pub(crate) account: String,
}

impl Cri {
    /// Over a connection that exists; `socket` is only named in errors.
    pub(crate) fn new(channel: Channel, socket: &Path) -> Cri {
        Cri { runtime: RuntimeServiceClient::new(channel), socket: socket.to_owned() }
    }

    /// Makes a pod and starts its sandbox container. Answers the pod's id.
    pub(crate) async fn run_pod(
        &self,
        config: api::PodSandboxConfig,
        handler: &str,
    ) -> Result<String, CriError> {
        let action = format!("run pod `{}`", name_of_pod(&config));
        let request = api::RunPodSandboxRequest { config: Some(config), runtime_handler: handler.to_owned() };
        let mut runtime = self.runtime.clone();
        let answer = self.call(BUILD, action.clone(), Box::pin(runtime.run_pod_sandbox(request))).await?;
        present(answer.pod_sandbox_id, action, "pod_sandbox_id")
    }

    /// Ends a pod and all its containers and removes them. A pod that is not there is removed.
    pub(crate) async fn remove_pod(&self, pod: &str) -> Result<(), CriError> {
        let request = api::RemovePodSandboxRequest { pod_sandbox_id: pod.to_owned() };
        let mut runtime = self.runtime.clone();
        let removing = runtime.remove_pod_sandbox(request);
        match self.call(LONG, format!("remove pod `{pod}`"), removing).await {
            Ok(_) | Err(CriError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// A pod, with the plugin's account of it.
    pub(crate) async fn pod(&self, pod: &str) -> Result<Described<api::PodSandboxStatus>, CriError> {
        let action = format!("describe pod `{pod}`");
        let request = api::PodSandboxStatusRequest { pod_sandbox_id: pod.to_owned(), verbose: true };
        let mut runtime = self.runtime.clone();
        let answer = self.call(SHORT, action.clone(), runtime.pod_sandbox_status(request)).await?;
        described(answer.status, answer.info, action)
    }

    /// All pods.
    pub(crate) async fn pods(&self) -> Result<Vec<api::PodSandbox>, CriError> {
        let mut runtime = self.runtime.clone();
        let listing = runtime.list_pod_sandbox(api::ListPodSandboxRequest::default());
        Ok(self.call(SHORT, "list pods".into(), listing).await?.items)
    }

    /// Makes a container of `pod`; nothing runs yet. Answers its id.
    pub(crate) async fn create_container(
        &self,
        pod: &str,
        config: api::ContainerConfig,
        pod_config: api::PodSandboxConfig,
    ) -> Result<String, CriError> {
        let name = config.metadata.clone().unwrap_or_default().name;
        let action = format!("create container `{name}` in pod `{pod}`");
        let request = api::CreateContainerRequest {
            pod_sandbox_id: pod.to_owned(),
            config: Some(config),
            sandbox_config: Some(pod_config),
        };
        let mut runtime = self.runtime.clone();
        let answer = self.call(LONG, action.clone(), Box::pin(runtime.create_container(request))).await?;
        present(answer.container_id, action, "container_id")
    }

    /// Makes the container's task and starts it.
    pub(crate) async fn start_container(&self, container: &str) -> Result<(), CriError> {
        let request = api::StartContainerRequest { container_id: container.to_owned() };
        let mut runtime = self.runtime.clone();
        let starting = runtime.start_container(request);
        self.call(BUILD, format!("start container `{container}`"), starting).await.map(drop)
    }

    /// A container, with the plugin's account of it.
    pub(crate) async fn container(
        &self,
        container: &str,
    ) -> Result<Described<api::ContainerStatus>, CriError> {
        let action = format!("describe container `{container}`");
        let request = api::ContainerStatusRequest { container_id: container.to_owned(), verbose: true };
        let mut runtime = self.runtime.clone();
        let answer = self.call(SHORT, action.clone(), runtime.container_status(request)).await?;
        described(answer.status, answer.info, action)
    }

    async fn call<T, F>(&self, limit: Duration, action: String, call: F) -> Result<T, CriError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        match tokio::time::timeout(limit, call).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(self.failed(action, &status)),
            Err(_) => Err(CriError::Late { action, waited: limit }),
        }
    }

    fn failed(&self, action: String, status: &Status) -> CriError {
        let reason = status.message().to_owned();
        match status.code() {
            Code::Unimplemented => CriError::NotServed { socket: self.socket.clone(), reason },
            Code::NotFound => CriError::NotFound { action, reason },
            Code::Unavailable if std::error::Error::source(status).is_some() => {
                CriError::Unreachable { socket: self.socket.clone(), reason: root_cause(status) }
            }
            _ => CriError::Refused { action, reason },
        }
    }
}

/// `namespace/name` of a pod, for people.
pub(crate) fn name_of_pod(config: &api::PodSandboxConfig) -> String {
    let metadata = config.metadata.clone().unwrap_or_default();
    format!("{}/{}", metadata.namespace, metadata.name)
}

fn present(id: String, action: String, field: &'static str) -> Result<String, CriError> {
    if id.is_empty() { Err(CriError::Incomplete { action, field }) } else { Ok(id) }
}

fn described<T>(
    status: Option<T>,
    mut info: HashMap<String, String>,
    action: String,
) -> Result<Described<T>, CriError> {
    let Some(status) = status else {
        return Err(CriError::Incomplete { action, field: "status" });
    };
    match info.remove("info") {
        Some(account) => Ok(Described { status, account }),
        None => Err(CriError::Incomplete { action, field: "info" }),
    }
}
