//! Two nodes in one process, with certificates made for the occasion.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use dunlin_migration::coordinator::FailureKind;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tokio::net::TcpListener;
use tonic::transport::server::TcpIncoming;

use super::*;
use crate::config::{NodeConfig, PeerConfig};
use crate::containerd::Containerd;
use crate::daemon::serve::peer_server;
use crate::images::exports::Exports;
use crate::images::serve::Fetched;
use crate::peer::incoming::Incoming;
use crate::peer::remote::Remote;
use crate::peer::service::PeerService;
use crate::proto::peer_server::PeerServer;

struct Authority {
    dir: tempfile::TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Authority {
        let dir = tempfile::tempdir().unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        std::fs::write(dir.path().join("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
        Authority { dir, issuer: Issuer::new(params, key) }
    }

    fn files(&self, name: &str) -> TlsConfig {
        let path = |end: &str| self.dir.path().join(format!("{name}.{end}"));
        let key = KeyPair::generate().unwrap();
        let certificate =
            CertificateParams::new(vec![name.to_owned()]).unwrap().signed_by(&key, &self.issuer).unwrap();
        std::fs::write(path("pem"), certificate.pem()).unwrap();
        std::fs::write(path("key"), key.serialize_pem()).unwrap();
        std::fs::set_permissions(path("key"), std::fs::Permissions::from_mode(0o600)).unwrap();
        TlsConfig { ca: self.dir.path().join("ca.pem"), cert: path("pem"), key: path("key") }
    }

    fn keys(&self, name: &str) -> Keys {
        Keys::load(&self.files(name)).unwrap()
    }
}

/// Serves the peers of node b; everything it is asked for is unknown to it.
async fn node_b(keys: Option<Keys>) -> SocketAddr {
    let text = "name = \"b\"\nlisten = \"127.0.0.1:1\"\ndata_listen = \"127.0.0.1:2\"";
    let config = Arc::new(NodeConfig::parse(Path::new("b"), text).unwrap());
    let containerd = Containerd::unreachable();
    let incoming = Incoming::new(Arc::clone(&config), containerd.clone());
    let (exports, fetched) = (Exports::default(), Fetched::default());
    let service = PeerServer::new(PeerService::new(config, containerd, incoming, exports, fetched));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = peer_server(keys.as_ref()).unwrap().add_service(service);
    tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
    address
}

async fn asked(address: SocketAddr, name: &str, keys: Option<&Keys>) -> FailureKind {
    let peer = PeerConfig { name: name.into(), address, data_address: address };
    Remote::new(&peer, keys, "a", "no-such-session").unwrap().run(None).await.unwrap_err().kind
}

#[tokio::test]
async fn nodes_of_one_authority_hear_each_other() {
    let authority = Authority::new();
    let address = node_b(Some(authority.keys("b"))).await;
    // The service itself answered: it has no such session.
    assert_eq!(asked(address, "b", Some(&authority.keys("a"))).await, FailureKind::NoSession);
}

#[tokio::test]
async fn strangers_do_not_get_a_word_in() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let address = node_b(Some(ours.keys("b"))).await;
    assert_eq!(asked(address, "b", None).await, FailureKind::Silent, "plain text");
    assert_eq!(asked(address, "b", Some(&theirs.keys("a"))).await, FailureKind::Silent, "another authority");
    // Believes in the right authority, but shows a certificate of its own.
    let forged = TlsConfig { ca: ours.files("a").ca, ..theirs.files("a") };
    let forged = Keys::load(&forged).unwrap();
    assert_eq!(asked(address, "b", Some(&forged)).await, FailureKind::Silent, "a forged certificate");
    // The right authority, but not the node that was meant.
    assert_eq!(asked(address, "c", Some(&ours.keys("a"))).await, FailureKind::Silent, "another name");
}

#[tokio::test]
async fn without_keys_it_is_plain_text() {
    let address = node_b(None).await;
    assert_eq!(asked(address, "b", None).await, FailureKind::NoSession);
}

#[test]
fn keys_that_cannot_be_used_are_named() {
    let authority = Authority::new();
    let files = authority.files("a");
    let missing = TlsConfig { cert: "/nonexistent.pem".into(), ..files.clone() };
    let error = Keys::load(&missing).unwrap_err().to_string();
    assert!(error.starts_with("tls.cert: cannot read /nonexistent.pem"), "{error}");
    let swapped = TlsConfig { key: files.cert.clone(), ..files.clone() };
    let error = Keys::load(&swapped).unwrap_err().to_string();
    assert!(error.starts_with("tls.key: ") && error.contains("PRIVATE KEY"), "{error}");
    std::fs::set_permissions(&files.key, std::fs::Permissions::from_mode(0o644)).unwrap();
    let error = Keys::load(&files).unwrap_err().to_string();
    assert!(error.contains("chmod 600"), "{error}");
}
