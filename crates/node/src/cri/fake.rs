//! A CRI plugin in memory, on the real wire.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::net::TcpListener;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Endpoint, Server};
use tonic::{Request, Response, Status};

use super::api::runtime_service_server::{RuntimeService, RuntimeServiceServer};
use super::api::{self, *};
use super::client::Cri;
use crate::containerd::RUNTIME;

/// What it holds and how it behaves.
#[derive(Debug)]
pub(super) struct State {
    /// By id.
    pub(super) pods: HashMap<String, api::PodSandboxConfig>,
    /// By id: the pod's id, the configuration.
    pub(super) containers: HashMap<String, (String, api::ContainerConfig)>,
    /// Every call that changes something, in order.
    pub(super) calls: Vec<String>,
    /// The call (by its begin) that fails.
    pub(super) fails: Option<&'static str>,
    /// Removals that fail before one succeeds.
    pub(super) busy: u32,
    /// Whether pods' and containers' annotations reach the spec.
    pub(super) passes: [bool; 2],
    /// The runtime's type.
    pub(super) runtime: String,
}

#[derive(Clone)]
pub(super) struct FakeCri(Arc<Mutex<State>>);

impl FakeCri {
    /// Serves on a port of its own; gives a client of it.
    pub(super) async fn serve() -> (FakeCri, Cri) {
        let state = State {
            pods: HashMap::new(),
            containers: HashMap::new(),
            calls: Vec::new(),
            fails: None,
            busy: 0,
            passes: [true, true],
            runtime: RUNTIME.into(),
        };
        let fake = FakeCri(Arc::new(Mutex::new(state)));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = Server::builder().add_service(RuntimeServiceServer::new(fake.clone()));
        tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
        let channel = Endpoint::from_shared(format!("http://{address}")).unwrap().connect_lazy();
        (fake, Cri::new(channel, Path::new("/fake.sock")))
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, call: String) -> Result<MutexGuard<'_, State>, Status> {
        let mut state = self.state();
        let fails = state.fails.is_some_and(|fails| call.starts_with(fails));
        state.calls.push(call.clone());
        if fails { Err(Status::unknown(format!("{call} fails, as the test wants"))) } else { Ok(state) }
    }
}

fn account(state: &State, annotations: &HashMap<String, String>, passes: bool) -> HashMap<String, String> {
    let annotations = if passes { annotations.clone() } else { HashMap::new() };
    let account =
        serde_json::json!({ "runtimeType": state.runtime, "runtimeSpec": { "annotations": annotations } });
    HashMap::from([("info".into(), account.to_string())])
}

#[tonic::async_trait]
impl RuntimeService for FakeCri {
    async fn version(&self, _: Request<VersionRequest>) -> Result<Response<VersionResponse>, Status> {
        Ok(Response::new(VersionResponse::default()))
    }

    async fn run_pod_sandbox(
        &self,
        request: Request<RunPodSandboxRequest>,
    ) -> Result<Response<RunPodSandboxResponse>, Status> {
        let request = request.into_inner();
        let mut state = self.change(format!("run with {}", request.runtime_handler))?;
        let id = format!("pod-{}", state.pods.len());
        state.pods.insert(id.clone(), request.config.unwrap_or_default());
        Ok(Response::new(RunPodSandboxResponse { pod_sandbox_id: id }))
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<StopPodSandboxRequest>,
    ) -> Result<Response<StopPodSandboxResponse>, Status> {
        drop(self.change(format!("stop {}", request.into_inner().pod_sandbox_id))?);
        Ok(Response::new(StopPodSandboxResponse {}))
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<RemovePodSandboxRequest>,
    ) -> Result<Response<RemovePodSandboxResponse>, Status> {
        let id = request.into_inner().pod_sandbox_id;
        let mut state = self.change(format!("remove {id}"))?;
        if state.busy > 0 {
            state.busy -= 1;
            return Err(Status::unknown("container is still running, to stop first"));
        }
        state.pods.remove(&id);
        state.containers.retain(|_, (pod, _)| *pod != id);
        Ok(Response::new(RemovePodSandboxResponse {}))
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<PodSandboxStatusRequest>,
    ) -> Result<Response<PodSandboxStatusResponse>, Status> {
        let id = request.into_inner().pod_sandbox_id;
        let state = self.state();
        let config = state.pods.get(&id).ok_or_else(|| Status::not_found("no such pod"))?;
        let info = account(&state, &config.annotations, state.passes[0]);
        let status = PodSandboxStatus { id, ..Default::default() };
        Ok(Response::new(PodSandboxStatusResponse { status: Some(status), info }))
    }

    async fn list_pod_sandbox(
        &self,
        _: Request<ListPodSandboxRequest>,
    ) -> Result<Response<ListPodSandboxResponse>, Status> {
        let state = self.state();
        let items = state.pods.iter().map(|(id, config)| PodSandbox {
            id: id.clone(),
            metadata: config.metadata.clone(),
            labels: config.labels.clone(),
            ..Default::default()
        });
        Ok(Response::new(ListPodSandboxResponse { items: items.collect() }))
    }

    async fn create_container(
        &self,
        request: Request<CreateContainerRequest>,
    ) -> Result<Response<CreateContainerResponse>, Status> {
        let request = request.into_inner();
        let config = request.config.unwrap_or_default();
        let name = config.metadata.clone().unwrap_or_default().name;
        let mut state = self.change(format!("create {name} in {}", request.pod_sandbox_id))?;
        let id = format!("container-{}", state.containers.len());
        state.containers.insert(id.clone(), (request.pod_sandbox_id, config));
        Ok(Response::new(CreateContainerResponse { container_id: id }))
    }

    async fn start_container(
        &self,
        request: Request<StartContainerRequest>,
    ) -> Result<Response<StartContainerResponse>, Status> {
        drop(self.change(format!("start {}", request.into_inner().container_id))?);
        Ok(Response::new(StartContainerResponse {}))
    }

    async fn stop_container(
        &self,
        request: Request<StopContainerRequest>,
    ) -> Result<Response<StopContainerResponse>, Status> {
        drop(self.change(format!("stop {}", request.into_inner().container_id))?);
        Ok(Response::new(StopContainerResponse {}))
    }

    async fn remove_container(
        &self,
        request: Request<RemoveContainerRequest>,
    ) -> Result<Response<RemoveContainerResponse>, Status> {
        drop(self.change(format!("remove {}", request.into_inner().container_id))?);
        Ok(Response::new(RemoveContainerResponse {}))
    }

    async fn list_containers(
        &self,
        _: Request<ListContainersRequest>,
    ) -> Result<Response<ListContainersResponse>, Status> {
        Ok(Response::new(ListContainersResponse::default()))
    }

    async fn container_status(
        &self,
        request: Request<ContainerStatusRequest>,
    ) -> Result<Response<ContainerStatusResponse>, Status> {
        let id = request.into_inner().container_id;
        let state = self.state();
        let (_, config) = state.containers.get(&id).ok_or_else(|| Status::not_found("no such container"))?;
        let info = account(&state, &config.annotations, state.passes[1]);
        let status = ContainerStatus { id, ..Default::default() };
        Ok(Response::new(ContainerStatusResponse { status: Some(status), info }))
    }

    async fn update_container_resources(
        &self,
        _: Request<UpdateContainerResourcesRequest>,
    ) -> Result<Response<UpdateContainerResourcesResponse>, Status> {
        Ok(Response::new(UpdateContainerResourcesResponse::default()))
    }

    async fn exec_sync(&self, _: Request<ExecSyncRequest>) -> Result<Response<ExecSyncResponse>, Status> {
        Ok(Response::new(ExecSyncResponse::default()))
    }
}
