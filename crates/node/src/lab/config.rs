//! What the lab writes for its hosts: keys, and the files of containerd, shim and node.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

use super::{
    HostName, containerd, cri,
    error::{FileContext, LabError},
    layout::{HostLayout, Layout, Record},
};

const NODE_PORT: u16 = 7701;
const DATA_PORT: u16 = 7702;

/// Writes the files of both hosts below their `etc` directories.
pub(crate) fn write(layout: &Layout, record: &Record) -> Result<(), LabError> {
    let authority = Authority::new()?;
    for name in HostName::ALL {
        let host = layout.host(name);
        authority.write_keys(&host)?;
        for (path, text) in [
            (host.containerd_config(), containerd::config(&host, &record.containerd_version)),
            (host.shim_config(), shim_toml(record)),
            (host.node_config(), node_toml(&host)),
        ] {
            fs::write(&path, text).file("write", path)?;
        }
        for (name, network) in [
            ("10-pods0.conflist", cri::pod_network()),
            ("20-moved.conflist", cri::moved_network()),
            ("30-moved-aside.conflist", cri::moved_aside_network()),
        ] {
            let path = host.cni_config().join(name);
            fs::write(&path, network.to_string()).file("write", path)?;
        }
    }
    Ok(())
}

/// A string as TOML writes it.
pub(crate) fn quoted(path: &Path) -> String {
    toml::Value::String(path.display().to_string()).to_string()
}

/// A small machine: 256 MiB, one processor.
fn shim_toml(record: &Record) -> String {
    format!(
        "state_dir = \"/run/dunlin\"\n\
         data_dir = \"/var/lib/dunlin\"\n\
         [guest]\n\
         kernel = {kernel}\n\
         initramfs = {initramfs}\n\
         [vm]\n\
         accelerator = \"auto\"\n\
         vcpus = 1\n\
         memory_mib = 256\n\
         [disks]\n\
         scratch_mib = 1024\n",
        kernel = quoted(&record.image_dir.join(KERNEL)),
        initramfs = quoted(&record.image_dir.join(INITRAMFS)),
    )
}

/// The guest kernel's file name in an image directory.
pub(crate) const KERNEL: &str = "vmlinuz";
/// The initramfs's file name in an image directory.
pub(crate) const INITRAMFS: &str = "initramfs.cpio.lz4";

fn node_toml(host: &HostLayout) -> String {
    let (own, peer) = (host.host, host.host.other());
    format!(
        "name = \"{own}\"\n\
         listen = \"{address}:{NODE_PORT}\"\n\
         data_listen = \"{address}:{DATA_PORT}\"\n\
         socket = \"/run/dunlin/node.sock\"\n\
         state_dir = \"/run/dunlin\"\n\
         shim_config = \"/etc/dunlin/config.toml\"\n\
         log_dir = {log_dir}\n\
         termination_logs = \"/run\"\n\
         [tls]\n\
         ca = \"/etc/dunlin/ca.pem\"\n\
         cert = \"/etc/dunlin/node.pem\"\n\
         key = \"/etc/dunlin/node.key\"\n\
         [[peers]]\n\
         name = \"{peer}\"\n\
         address = \"{peer_address}:{NODE_PORT}\"\n\
         data_address = \"{peer_address}:{DATA_PORT}\"\n",
        address = own.address(),
        peer_address = peer.address(),
        log_dir = quoted(&host.logs().join("containers")),
    )
}

/// The lab's certificate authority; its key is never written down.
struct Authority {
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Result<Self, LabError> {
        let failed = |source| LabError::Certificate { subject: "the lab's authority".to_owned(), source };
        let mut parameters = CertificateParams::new(Vec::<String>::new()).map_err(failed)?;
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        parameters.distinguished_name.push(DnType::CommonName, "dunlin lab");
        let key = KeyPair::generate().map_err(failed)?;
        let certificate = parameters.self_signed(&key).map_err(failed)?.pem();
        Ok(Self { certificate, issuer: Issuer::new(parameters, key) })
    }

    /// `ca.pem`, `node.pem` and `node.key` of one host; the certificate names the node and its address.
    fn write_keys(&self, host: &HostLayout) -> Result<(), LabError> {
        let name = host.host;
        let failed = |source| LabError::Certificate { subject: format!("node {name}"), source };
        let names = vec![name.as_str().to_owned(), name.address().to_owned()];
        let mut parameters = CertificateParams::new(names).map_err(failed)?;
        parameters.distinguished_name.push(DnType::CommonName, name.as_str());
        parameters.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().map_err(failed)?;
        let certificate = parameters.signed_by(&key, &self.issuer).map_err(failed)?;
        for (file, text, mode) in [
            ("ca.pem", self.certificate.clone(), 0o644),
            ("node.pem", certificate.pem(), 0o644),
            ("node.key", key.serialize_pem(), 0o600),
        ] {
            let path = host.etc().join(file);
            fs::write(&path, text).file("write", &path)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).file("restrict", path)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_node_reads_what_the_lab_writes() {
        let layout = Layout::new(Path::new("/var/tmp/a \"quoted\" lab")).expect("an absolute path");
        for name in HostName::ALL {
            let text = node_toml(&layout.host(name));
            let config = crate::config::NodeConfig::parse(Path::new("node.toml"), &text).expect("accepted");
            assert_eq!(config.name, name.as_str());
            assert!(config.peer(name.other().as_str()).is_some());
        }
    }

    #[test]
    fn the_packaged_example_is_accepted() {
        let text = include_str!("../../../../packaging/node.toml");
        crate::config::NodeConfig::parse(Path::new("node.toml"), text).expect("accepted");
    }
}
