//! Keys between nodes: both sides show a certificate of the same authority.

use std::path::{Path, PathBuf};

use tonic::transport::{Certificate, ClientTlsConfig, Identity, ServerTlsConfig};

use crate::config::TlsConfig;

/// Why keys cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    /// A file could not be read.
    #[error("tls.{key}: cannot read {path}: {reason}")]
    Read {
        /// ca, cert or key.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's words.
        reason: std::io::Error,
    },
    /// A file holds something else.
    #[error("tls.{key}: {path} holds no PEM block `{block}`")]
    Content {
        /// ca, cert or key.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// What was looked for.
        block: &'static str,
    },
    /// A key that its owner alone should read.
    #[error("tls.key: {path} can be read by others (mode {mode:o}); `chmod 600 {path}`")]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
}

/// What a node shows and whom it believes.
#[derive(Debug, Clone)]
pub(crate) struct Keys {
    ca: Certificate,
    identity: Identity,
}

impl Keys {
    /// Reads the three files.
    pub(crate) fn load(config: &TlsConfig) -> Result<Keys, TlsError> {
        use std::os::unix::fs::PermissionsExt;
        let ca = read("ca", &config.ca, "CERTIFICATE")?;
        let cert = read("cert", &config.cert, "CERTIFICATE")?;
        let key = read("key", &config.key, "PRIVATE KEY")?;
        let mode = std::fs::metadata(&config.key)
            .map_err(|reason| TlsError::Read { key: "key", path: config.key.clone(), reason })?
            .permissions()
            .mode()
            & 0o777;
        if mode & 0o077 != 0 {
            return Err(TlsError::Exposed { path: config.key.clone(), mode });
        }
        Ok(Keys { ca: Certificate::from_pem(ca), identity: Identity::from_pem(cert, key) })
    }

    /// A caller must show a certificate.
    pub(crate) fn server(&self) -> ServerTlsConfig {
        ServerTlsConfig::new().identity(self.identity.clone()).client_ca_root(self.ca.clone())
    }

    /// The certificate that answers must carry `name`.
    pub(crate) fn client(&self, name: &str) -> ClientTlsConfig {
        ClientTlsConfig::new()
            .identity(self.identity.clone())
            .ca_certificate(self.ca.clone())
            .domain_name(name)
    }
}

fn read(key: &'static str, path: &Path, block: &'static str) -> Result<String, TlsError> {
    let text = std::fs::read_to_string(path).map_err(|reason| TlsError::Read {
        key,
        path: path.to_owned(),
        reason,
    })?;
    // `BEGIN EC PRIVATE KEY` and `BEGIN RSA PRIVATE KEY` are keys, too.
    if !text.lines().any(|line| line.starts_with("-----BEGIN ") && line.contains(block)) {
        return Err(TlsError::Content { key, path: path.to_owned(), block });
    }
    Ok(text)
}

#[cfg(test)]
mod tests;
