//! Who calls: a request says, and its certificate must agree.

use rustls_pki_types::{CertificateDer, ServerName};
use tonic::{Request, Status};

use crate::proto::{
    AbortRequest, AwaitStreamRequest, ImportRequest, PreflightRequest, PrepareRequest, ReadImageRequest,
    RunRequest, SessionRequest, TransferRequest, WatchRequest,
};

/// A request that names the node that makes it.
pub(super) trait Called {
    fn from(&self) -> &str;
}

macro_rules! called {
    ($($request:ty),* $(,)?) => {
        $(impl Called for $request {
            fn from(&self) -> &str {
                &self.from
            }
        })*
    };
}

called!(
    AbortRequest,
    AwaitStreamRequest,
    ImportRequest,
    PreflightRequest,
    PrepareRequest,
    ReadImageRequest,
    RunRequest,
    SessionRequest,
    TransferRequest,
    WatchRequest,
);

/// The request, when its caller is who it says. Without keys nobody can tell, and everybody is believed.
pub(super) fn verified<T: Called>(request: Request<T>) -> Result<T, Status> {
    let shown = request.peer_certs();
    let from = request.get_ref().from();
    match shown.as_deref().map(|chain| chain.first()) {
        None => {}
        Some(Some(certificate)) if names(certificate, from) => {}
        Some(_) => {
            return Err(Status::permission_denied(format!(
                "the caller says that it is node `{from}`, and its certificate does not; `name` in a node's \
                 configuration must be in its certificate"
            )));
        }
    }
    Ok(request.into_inner())
}

/// Whether a certificate was issued for the node `name`.
fn names(certificate: &CertificateDer<'_>, name: &str) -> bool {
    let (Ok(certificate), Ok(name)) =
        (webpki::EndEntityCert::try_from(certificate), ServerName::try_from(name))
    else {
        return false;
    };
    certificate.verify_is_valid_for_subject_name(&name).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_speaks_for_its_own_names() {
        let key = rcgen::KeyPair::generate().unwrap();
        let made = rcgen::CertificateParams::new(vec!["a".to_owned()]).unwrap().self_signed(&key).unwrap();
        assert!(names(made.der(), "a"));
        assert!(!names(made.der(), "b"));
        assert!(!names(made.der(), ""));
        assert!(!names(&CertificateDer::from(b"nothing".as_slice()), "a"));
    }

    #[test]
    fn without_keys_a_caller_is_believed() {
        let request = SessionRequest { session: "s".into(), from: "a".into() };
        assert_eq!(verified(Request::new(request)).unwrap().session, "s");
    }
}
