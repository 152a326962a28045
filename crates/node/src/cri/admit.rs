//! Which pods CRI can make again on another host, and what of a configuration is kept there.
//!
//! The source asks before anything is touched, the destination before it asks its own CRI: a peer is
//! not trusted with paths. A log directory is kept below the place that is meant for them and replaced
//! elsewhere; a container's log path must stay inside it; the files that CRI itself gives each
//! container are the destination's own; what kubelet keeps for this pod, by its uid, is looked for at the same path here.
//! Everything else that names a file or device of the host is refused, another pod's part of kubelet's directory too.

use std::path::{Component, Path};

use super::api;
use super::client::name_of_pod;

/// Where orchestrators keep pods' logs.
const POD_LOGS: &str = "/var/log/pods";
/// Where kubelet keeps the volumes and files of its pods.
pub(crate) const KUBELET_PODS: &str = "/var/lib/kubelet/pods";
/// What CRI gives a container of itself, and an orchestrator may give in its stead. The machine holds the
/// pod's own, so on the destination nothing is needed of the host.
const POD_FILES: [&str; 4] = ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/dev/shm"];

/// Why a pod cannot be made again on another host.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum AdmitError {
    /// Without a name.
    #[error("{what} has no name in its CRI configuration, which cannot be made again")]
    NoMetadata {
        /// What.
        what: String,
    },
    /// A directory or file of the host.
    #[error(
        "container `{container}` has {host_path} of its host mounted on {path}, which is not on another host; put the data into the image or into the container, or into a volume of kubelet's"
    )]
    Mount {
        /// Its name.
        container: String,
        /// On the host.
        host_path: String,
        /// In the container.
        path: String,
    },
    /// What kubelet keeps for another pod.
    #[error(
        "container `{container}` has {host_path} mounted on {path}, which kubelet keeps for another pod than this one, whose uid is `{uid}`; a pod may bring its own volumes only"
    )]
    OtherPod {
        /// Its name.
        container: String,
        /// On the host.
        host_path: String,
        /// In the container.
        path: String,
        /// Of the pod that arrives.
        uid: String,
    },
    /// A device of the host.
    #[error("container `{container}` has the device {device} of its host, which is not on another host")]
    Device {
        /// Its name.
        container: String,
        /// On the host.
        device: String,
    },
    /// A log path that leaves the pod's directory.
    #[error(
        "container `{container}` writes its log to `{path}`, which is not inside of its pod's log directory"
    )]
    LogPath {
        /// Its name.
        container: String,
        /// Relative to the pod's directory.
        path: String,
    },
}

/// The pod as this host may make it; `log_root` is for one that has its logs in a place of the other host.
pub(crate) fn pod(
    mut config: api::PodSandboxConfig,
    log_root: &Path,
) -> Result<api::PodSandboxConfig, AdmitError> {
    let Some(metadata) = config.metadata.as_ref().filter(|metadata| !metadata.name.is_empty()) else {
        return Err(AdmitError::NoMetadata { what: format!("pod `{}`", name_of_pod(&config)) });
    };
    if !config.log_directory.is_empty() && !is_inside(Path::new(POD_LOGS), &config.log_directory) {
        let words = [&metadata.namespace, &metadata.name, &metadata.uid].map(|word| plain(word));
        config.log_directory = log_root.join(words.join("_")).display().to_string();
    }
    Ok(config)
}

/// The container as this host may make it, in the pod with the uid `pod`.
pub(crate) fn container(
    mut config: api::ContainerConfig,
    pod: &str,
) -> Result<api::ContainerConfig, AdmitError> {
    let name = config.metadata.clone().unwrap_or_default().name;
    if name.is_empty() {
        return Err(AdmitError::NoMetadata { what: "a container".into() });
    }
    config.mounts.retain(|mount| !POD_FILES.contains(&mount.container_path.as_str()));
    let of_kubelet =
        |mount: &&api::Mount| mount.image.is_none() && is_inside(Path::new(KUBELET_PODS), &mount.host_path);
    if let Some(mount) = config.mounts.iter().find(|mount| !of_kubelet(mount)) {
        let image = mount.image.as_ref().map(|image| format!("the image {}", image.image));
        return Err(AdmitError::Mount {
            container: name,
            host_path: image.unwrap_or_else(|| mount.host_path.clone()),
            path: mount.container_path.clone(),
        });
    }
    // A uid that is no name names no directory.
    let own = Path::new(KUBELET_PODS).join(pod);
    let has_own = matches!(Path::new(pod).components().collect::<Vec<_>>()[..], [Component::Normal(_)]);
    if let Some(mount) = config.mounts.iter().find(|mount| !has_own || !is_inside(&own, &mount.host_path)) {
        return Err(AdmitError::OtherPod {
            container: name,
            host_path: mount.host_path.clone(),
            path: mount.container_path.clone(),
            uid: pod.to_owned(),
        });
    }
    let host = config.devices.iter().map(|device| &device.host_path);
    let named = config.cdi_devices.iter().map(|device| &device.name);
    if let Some(device) = host.chain(named).next() {
        return Err(AdmitError::Device { container: name, device: device.clone() });
    }
    let stays_inside =
        Path::new(&config.log_path).components().all(|part| matches!(part, Component::Normal(_)));
    if !stays_inside {
        return Err(AdmitError::LogPath { container: name, path: config.log_path });
    }
    Ok(config)
}

/// Below `root`, and not by way of `..`.
pub(crate) fn is_inside(root: &Path, path: &str) -> bool {
    let path = Path::new(path);
    path != root
        && path.starts_with(root)
        && path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)))
}

/// A word as part of a directory's name.
fn plain(word: &str) -> String {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.');
    word.chars().map(|c| if good(c) { c } else { '-' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn a_pod(log_directory: &str) -> api::PodSandboxConfig {
        api::PodSandboxConfig {
            metadata: Some(api::PodSandboxMetadata {
                name: "web".into(),
                uid: "u/1".into(),
                namespace: "shop".into(),
                attempt: 0,
            }),
            log_directory: log_directory.into(),
            ..Default::default()
        }
    }

    fn a_container() -> api::ContainerConfig {
        api::ContainerConfig {
            metadata: Some(api::ContainerMetadata { name: "one".into(), attempt: 0 }),
            log_path: "one/0.log".into(),
            ..Default::default()
        }
    }

    #[test]
    fn logs_stay_where_logs_belong_and_nowhere_else() {
        let logs =
            |directory: &str| pod(a_pod(directory), Path::new("/var/log/dunlin")).unwrap().log_directory;
        assert_eq!(logs("/var/log/pods/shop_web_u1"), "/var/log/pods/shop_web_u1");
        assert_eq!(logs(""), "", "a pod without logs gets none");
        for elsewhere in ["/etc", "/var/log/pods", "/var/log/pods/../../etc/x", "/tmp/x", "var/log/pods/x"] {
            assert_eq!(logs(elsewhere), "/var/log/dunlin/shop_web_u-1", "{elsewhere}");
        }
    }

    #[test]
    fn a_log_path_cannot_climb() {
        assert_eq!(container(a_container(), "u").unwrap().log_path, "one/0.log");
        for path in ["../x.log", "/etc/passwd", "a/../../b"] {
            let config = api::ContainerConfig { log_path: path.into(), ..a_container() };
            assert!(matches!(container(config, "u"), Err(AdmitError::LogPath { .. })), "{path}");
        }
    }

    #[test]
    fn what_is_of_the_host_is_refused_by_name() {
        let mount = |path: &str| api::Mount {
            container_path: path.into(),
            host_path: "/srv/data".into(),
            ..Default::default()
        };
        let given = api::ContainerConfig { mounts: vec![mount("/etc/hosts")], ..a_container() };
        assert_eq!(container(given, "u").unwrap().mounts, []);
        let data = api::ContainerConfig { mounts: vec![mount("/data")], ..a_container() };
        let error = container(data, "u").unwrap_err().to_string();
        assert!(error.contains("/srv/data") && error.contains("/data") && error.contains("`one`"), "{error}");
        let of_kubelet = |uid: &str, path: &str| {
            let mount = api::Mount { host_path: format!("/var/lib/kubelet/pods/{path}"), ..mount("/data") };
            container(api::ContainerConfig { mounts: vec![mount], ..a_container() }, uid)
        };
        const SECRET: &str = "u/volumes/kubernetes.io~secret/s";
        assert_eq!(of_kubelet("u", SECRET).unwrap().mounts.len(), 1);
        for climbing in ["../../../../etc/shadow", "u/../../x", "u/../v/x", ""] {
            assert!(matches!(of_kubelet("u", climbing), Err(AdmitError::Mount { .. })), "{climbing}");
        }
        // Another pod's, the pod's whole directory, and a uid that would make everybody's its own.
        for (uid, path) in
            [("v", SECRET), ("u", "u2/x"), ("u", "u"), ("", SECRET), (".", SECRET), ("u/volumes", SECRET)]
        {
            let error = of_kubelet(uid, path).unwrap_err();
            assert!(matches!(&error, AdmitError::OtherPod { .. }), "{uid} {path}: {error}");
            assert!(
                error.to_string().contains(path) && error.to_string().contains(&format!("`{uid}`")),
                "{error}"
            );
        }
        let device = api::Device { host_path: "/dev/kvm".into(), ..Default::default() };
        let device = api::ContainerConfig { devices: vec![device], ..a_container() };
        assert!(container(device, "u").unwrap_err().to_string().contains("/dev/kvm"));
        let nameless = api::ContainerConfig { metadata: None, ..a_container() };
        assert!(matches!(container(nameless, "u"), Err(AdmitError::NoMetadata { .. })));
    }
}
