//! A pod that CRI is to make again: read from the facts that travel, checked, and put in order.

use std::path::Path;

use prost::Message;

use super::admit::{self, AdmitError};
use super::api;
use crate::proto::ContainerFacts;
use crate::proto::cri_facts::Part;

/// Why the facts are no pod that can be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PlanError {
    /// Bytes that are not the message.
    #[error("the CRI configuration of `{id}` cannot be decoded: {reason}; are both nodes of one version?")]
    Undecodable {
        /// The container.
        id: String,
        /// The decoder's words.
        reason: String,
    },
    /// Some from CRI, some not.
    #[error(
        "`{id}` was not made through CRI and shares the virtual machine of a pod that was; remove it, then move the pod"
    )]
    Stranger {
        /// The container.
        id: String,
    },
    /// Not one pod.
    #[error("{count} CRI pods share one virtual machine; only one can be moved through CRI")]
    Pods {
        /// How many.
        count: usize,
    },
    /// A process namespace shared with a container that does not move.
    #[error(
        "container `{id}` looks into the processes of container `{target}`, which does not move with it; remove `{id}` first"
    )]
    Target {
        /// The container.
        id: String,
        /// Whose processes.
        target: String,
    },
    /// Something that is only on its host.
    #[error(transparent)]
    Admit(#[from] AdmitError),
}

/// A pod to be made again.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Plan {
    /// The sandbox container's id on the source.
    pub(crate) source: String,
    /// What the pod is made with, without anything of a move.
    pub(crate) config: api::PodSandboxConfig,
    /// The runtime handler.
    pub(crate) handler: String,
    /// Its containers, each after the one whose processes it looks into.
    pub(crate) containers: Vec<PlannedContainer>,
}

/// A container of it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct PlannedContainer {
    /// Its id on the source.
    pub(crate) source: String,
    /// What it is made with, without anything of a move.
    pub(crate) config: api::ContainerConfig,
}

impl Plan {
    /// Reads `members`, all containers of one sandbox. `None`: CRI made none of them. `log_root` is where
    /// this host keeps the logs of pods that had theirs in a place of another host.
    pub(crate) fn read(members: &[ContainerFacts], log_root: &Path) -> Result<Option<Plan>, PlanError> {
        if members.iter().all(|member| member.cri.is_none()) {
            return Ok(None);
        }
        let mut pods = Vec::new();
        let mut containers = Vec::new();
        for member in members {
            let undecodable = |error: prost::DecodeError| PlanError::Undecodable {
                id: member.id.clone(),
                reason: error.to_string(),
            };
            match member.cri.as_ref().and_then(|cri| cri.part.as_ref()) {
                Some(Part::Pod(pod)) => {
                    let config = api::PodSandboxConfig::decode(pod.config.as_slice()).map_err(undecodable)?;
                    pods.push((member.id.clone(), admit::pod(config, log_root)?, pod.handler.clone()));
                }
                Some(Part::Container(container)) => {
                    let config =
                        api::ContainerConfig::decode(container.config.as_slice()).map_err(undecodable)?;
                    containers.push(PlannedContainer { source: member.id.clone(), config });
                }
                None => return Err(PlanError::Stranger { id: member.id.clone() }),
            }
        }
        let count = pods.len();
        let (Some((source, config, handler)), 1) = (pods.pop(), count) else {
            return Err(PlanError::Pods { count });
        };
        let uid = config.metadata.as_ref().map_or("", |metadata| &metadata.uid);
        for container in &mut containers {
            container.config = admit::container(std::mem::take(&mut container.config), uid)?;
        }
        Ok(Some(Plan { source, config, handler, containers: in_order(containers)? }))
    }
}

/// Each container after the one whose processes it looks into; otherwise as they came.
fn in_order(mut waiting: Vec<PlannedContainer>) -> Result<Vec<PlannedContainer>, PlanError> {
    let mut ordered: Vec<PlannedContainer> = Vec::with_capacity(waiting.len());
    while !waiting.is_empty() {
        let known = |container: &PlannedContainer| match target_of(&container.config) {
            Some(target) => ordered.iter().any(|made| made.source == target),
            None => true,
        };
        let (ready, rest): (Vec<_>, Vec<_>) = waiting.into_iter().partition(known);
        if ready.is_empty() {
            let blocked = rest.into_iter().next();
            let (id, target) = blocked
                .map(|container| {
                    let target = target_of(&container.config).unwrap_or_default().to_owned();
                    (container.source, target)
                })
                .unwrap_or_default();
            return Err(PlanError::Target { id, target });
        }
        ordered.extend(ready);
        waiting = rest;
    }
    Ok(ordered)
}

/// The container whose processes `config` looks into, if it does.
pub(crate) fn target_of(config: &api::ContainerConfig) -> Option<&str> {
    let options = config.linux.as_ref()?.security_context.as_ref()?.namespace_options.as_ref()?;
    (options.pid == api::NamespaceMode::Target as i32).then_some(options.target_id.as_str())
}

/// Has `config` look into `target`'s processes, as the container is called here.
pub(crate) fn set_target(config: &mut api::ContainerConfig, target: &str) {
    let options = config
        .linux
        .as_mut()
        .and_then(|linux| linux.security_context.as_mut())
        .and_then(|context| context.namespace_options.as_mut());
    if let Some(options) = options {
        options.target_id = target.to_owned();
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::proto::{CriContainer, CriFacts, CriPod};

    pub(in crate::cri) fn pod_facts(id: &str) -> ContainerFacts {
        let config = api::PodSandboxConfig {
            metadata: Some(api::PodSandboxMetadata {
                name: "web".into(),
                uid: "u1".into(),
                namespace: "shop".into(),
                attempt: 1,
            }),
            ..Default::default()
        };
        let pod = CriPod { config: config.encode_to_vec(), handler: "dunlin".into() };
        ContainerFacts {
            id: id.into(),
            cri: Some(CriFacts { part: Some(Part::Pod(pod)) }),
            ..ContainerFacts::default()
        }
    }

    pub(in crate::cri) fn container_facts(id: &str, target: Option<&str>) -> ContainerFacts {
        let options = target.map(|target| api::NamespaceOption {
            pid: api::NamespaceMode::Target as i32,
            target_id: target.into(),
            ..Default::default()
        });
        let context = api::LinuxContainerSecurityContext { namespace_options: options, ..Default::default() };
        let config = api::ContainerConfig {
            metadata: Some(api::ContainerMetadata { name: format!("name-of-{id}"), attempt: 0 }),
            image: Some(api::ImageSpec { image: "demo".into(), ..Default::default() }),
            linux: Some(api::LinuxContainerConfig { security_context: Some(context), resources: None }),
            ..Default::default()
        };
        let container = CriContainer { config: config.encode_to_vec() };
        ContainerFacts {
            id: id.into(),
            cri: Some(CriFacts { part: Some(Part::Container(container)) }),
            ..ContainerFacts::default()
        }
    }

    fn read(members: &[ContainerFacts]) -> Result<Option<Plan>, String> {
        Plan::read(members, Path::new("/logs")).map_err(|error| error.to_string())
    }

    #[test]
    fn a_pod_is_its_sandbox_and_its_containers_each_after_its_target() {
        let members = [
            pod_facts("s"),
            container_facts("debug", Some("b")),
            container_facts("a", None),
            container_facts("b", None),
        ];
        let plan = read(&members).unwrap().unwrap();
        assert_eq!((plan.source.as_str(), plan.handler.as_str()), ("s", "dunlin"));
        let order: Vec<&str> = plan.containers.iter().map(|container| container.source.as_str()).collect();
        assert_eq!(order, ["a", "b", "debug"]);
        assert_eq!(read(&[ContainerFacts::default()]), Ok(None));
    }

    #[test]
    fn what_is_not_one_whole_pod_is_refused_by_name() {
        let error = |members: &[ContainerFacts]| read(members).unwrap_err();
        assert!(error(&[container_facts("a", None)]).starts_with("0 CRI pods"));
        assert!(error(&[pod_facts("s"), pod_facts("t")]).starts_with("2 CRI pods"));
        let stranger = ContainerFacts { id: "x".into(), ..ContainerFacts::default() };
        assert!(error(&[pod_facts("s"), stranger]).starts_with("`x` was not made through CRI"));
        let lost = error(&[pod_facts("s"), container_facts("a", Some("gone"))]);
        assert!(lost.contains("`gone`"), "{lost}");
        let mut damaged = pod_facts("s");
        damaged.cri =
            Some(CriFacts { part: Some(Part::Pod(CriPod { config: vec![0xff], handler: String::new() })) });
        assert!(error(&[damaged]).contains("cannot be decoded"));
    }
}
