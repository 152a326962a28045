//! Source: the destination's node, as this one calls it.

use std::time::Duration;

use dunlin_migration::coordinator::{Failure, FailureKind};
use dunlin_migration::notice::Notice;
use dunlin_wire::Any;
use dunlin_wire::handover::{Stream, Token};
use dunlin_wire::service::NotificationsResponse;
use protobuf::Message;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

use super::preflight::describe;
use super::tls::Keys;
use crate::config::PeerConfig;
use crate::containerd::client::root_cause;
use crate::proto::peer_client::PeerClient;
use crate::proto::{self, AbortRequest, SandboxFacts, SessionRequest};

const CONNECT: Duration = Duration::from_secs(5);
/// A silent connection is asked for a sign of life, and given up.
const KEEPALIVE: Duration = Duration::from_secs(5);
/// Saved states are well below; the service's default is 4 MiB.
pub(crate) const MESSAGE_MAX: usize = 32 << 20;

/// The peer could not be set up.
#[derive(Debug, thiserror::Error)]
#[error("peer {name} at {address}: {reason}")]
pub(crate) struct PeerError {
    name: String,
    address: std::net::SocketAddr,
    reason: String,
}

/// One peer, for one session.
#[derive(Debug, Clone)]
pub(crate) struct Remote {
    client: PeerClient<Channel>,
    peer: PeerConfig,
    /// This node's name.
    from: String,
    session: String,
}

impl Remote {
    /// Dials when first used, and again after a break.
    pub(crate) fn new(
        peer: &PeerConfig,
        keys: Option<&Keys>,
        from: &str,
        session: &str,
    ) -> Result<Remote, PeerError> {
        let wrong = |error: tonic::transport::Error| PeerError {
            name: peer.name.clone(),
            address: peer.address,
            reason: root_cause(&error),
        };
        let scheme = if keys.is_some() { "https" } else { "http" };
        let mut endpoint = Endpoint::from_shared(format!("{scheme}://{}", peer.address))
            .map_err(wrong)?
            .connect_timeout(CONNECT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE)
            .keep_alive_while_idle(true);
        if let Some(keys) = keys {
            endpoint = endpoint.tls_config(keys.client(&peer.name)).map_err(wrong)?;
        }
        let client = PeerClient::new(endpoint.connect_lazy())
            .max_decoding_message_size(MESSAGE_MAX)
            .max_encoding_message_size(MESSAGE_MAX);
        Ok(Remote { client, peer: peer.clone(), from: from.into(), session: session.into() })
    }

    /// The peer's name.
    pub(crate) fn name(&self) -> &str {
        &self.peer.name
    }

    /// Where its data streams go.
    pub(crate) fn data_address(&self) -> std::net::SocketAddr {
        self.peer.data_address
    }

    /// Whether it answers at all, in words for `dunlin status`; empty is well.
    pub(crate) async fn problem(&self) -> String {
        let mut client = self.client.clone();
        // A session that cannot exist: any answer of the service is a sign of life.
        let asking = client.cleanup(Request::new(self.session()));
        match tokio::time::timeout(CONNECT, asking).await {
            Ok(Ok(_)) => String::new(),
            Ok(Err(status)) if kind(&status) != FailureKind::Silent => String::new(),
            Ok(Err(status)) => self.failure(&status).message,
            Err(_) => format!("no answer within {} s", CONNECT.as_secs()),
        }
    }

    fn session(&self) -> SessionRequest {
        SessionRequest { session: self.session.clone(), from: self.from.clone() }
    }

    /// Compares the hosts; answers what will become of every NIC.
    pub(crate) async fn preflight(
        &self,
        host: proto::HostFacts,
        sandbox: SandboxFacts,
    ) -> Result<Vec<proto::Nic>, Failure> {
        let request = proto::PreflightRequest {
            session: self.session.clone(),
            from: self.from.clone(),
            protocol: proto::PROTOCOL,
            host: Some(host),
            sandbox: Some(sandbox),
        };
        let answer = self.client.clone().preflight(request).await.map_err(|status| self.failure(&status))?;
        let answer = answer.into_inner();
        if answer.name != self.peer.name {
            let message = format!(
                "the node at {} is called {}, not {}; correct `address` or `name` under [[peers]] here",
                self.peer.address, answer.name, self.peer.name
            );
            return Err(Failure::new(FailureKind::Refused, message));
        }
        if !answer.mismatches.is_empty() {
            return Err(Failure::new(FailureKind::Refused, describe(&self.peer.name, &answer.mismatches)));
        }
        Ok(answer.nics)
    }

    /// Hands over the saved state; answers the token of the data streams.
    pub(crate) async fn import(
        &self,
        sandbox: SandboxFacts,
        config: Any,
        streams: Vec<Stream>,
    ) -> Result<Token, Failure> {
        let request = proto::ImportRequest {
            session: self.session.clone(),
            from: self.from.clone(),
            sandbox: Some(sandbox),
            config_type: config.type_url,
            config: config.value,
            streams: streams.iter().map(Stream::to_string).collect(),
        };
        let answer = self.client.clone().import(request).await.map_err(|status| self.failure(&status))?;
        Token::new(answer.into_inner().token)
            .map_err(|error| Failure::new(FailureKind::Refused, format!("node {}: {error}", self.peer.name)))
    }

    /// Answers what became of every NIC, and how many bytes of images the destination had to read from this host.
    pub(crate) async fn create_tasks(&self) -> Result<proto::CreateTasksResponse, Failure> {
        let answer = self.client.clone().create_tasks(self.session()).await;
        answer.map(tonic::Response::into_inner).map_err(|status| self.failure(&status))
    }

    /// The other way, by a destination: a part of an image of the session's.
    pub(crate) async fn read_image(
        &self,
        digest: &str,
        offset: u64,
        length: u32,
        sparse: bool,
    ) -> Result<proto::ReadImageResponse, Failure> {
        let request = proto::ReadImageRequest {
            session: self.session.clone(),
            from: self.from.clone(),
            digest: digest.into(),
            offset,
            length,
            sparse,
        };
        let answer = self.client.clone().read_image(request).await;
        answer.map(tonic::Response::into_inner).map_err(|status| self.failure(&status))
    }

    pub(crate) async fn prepare(&self, downtime_limit_ms: u32) -> Result<(), Failure> {
        let request = proto::PrepareRequest {
            session: self.session.clone(),
            from: self.from.clone(),
            downtime_limit_ms,
        };
        self.done(self.client.clone().prepare(request).await)
    }

    pub(crate) async fn await_stream(&self, stream: Stream) -> Result<(), Failure> {
        let request = proto::AwaitStreamRequest {
            session: self.session.clone(),
            from: self.from.clone(),
            stream: stream.to_string(),
        };
        self.done(self.client.clone().await_stream(request).await)
    }

    pub(crate) async fn transfer(&self, timeout: Duration) -> Result<(), Failure> {
        let request = proto::TransferRequest {
            session: self.session.clone(),
            from: self.from.clone(),
            timeout_ms: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX),
        };
        self.done(self.client.clone().transfer(request).await)
    }

    /// Lets the machine run; `handoff` is the source's shim's, for the destination's.
    pub(crate) async fn run(&self, handoff: Option<Any>) -> Result<(), Failure> {
        let handoff = handoff.unwrap_or_default();
        let request = proto::RunRequest {
            session: self.session.clone(),
            from: self.from.clone(),
            handoff_type: handoff.type_url,
            handoff: handoff.value,
        };
        self.done(self.client.clone().run(request).await)
    }

    /// Answers what was not done there though it runs.
    pub(crate) async fn cleanup(&self) -> Result<Vec<String>, Failure> {
        let answer = self.client.clone().cleanup(self.session()).await;
        answer.map(|answer| answer.into_inner().warnings).map_err(|status| self.failure(&status))
    }

    /// Ends well only when the machine does not run there and never will. Answers what was left.
    pub(crate) async fn abort(&self, sandbox: &SandboxFacts) -> Result<Vec<String>, Failure> {
        let request = AbortRequest {
            session: self.session.clone(),
            from: self.from.clone(),
            namespace: sandbox.namespace.clone(),
            sandbox_id: sandbox.id.clone(),
        };
        let answer = self.client.clone().abort(request).await.map_err(|status| self.failure(&status))?;
        let answer = answer.into_inner();
        let words = || format!("node {}: {}", self.peer.name, answer.warnings.join("; "));
        if answer.runs {
            return Err(Failure::new(FailureKind::Runs, words()));
        }
        if !answer.stopped {
            return Err(Failure::new(FailureKind::Silent, words()));
        }
        Ok(answer.warnings)
    }

    /// What the destination's shim tells after the notification `after`; from the first one on with 0.
    pub(crate) async fn watch(&self, after: u32) -> Result<Notices, Failure> {
        let request = proto::WatchRequest {
            session: self.session.clone(),
            from: self.from.clone(),
            after_message_id: after,
        };
        let answer = self.client.clone().watch(request).await.map_err(|status| self.failure(&status))?;
        Ok(Notices { stream: answer.into_inner(), remote: self.clone(), heard: after })
    }

    fn done<T>(&self, answer: Result<T, Status>) -> Result<(), Failure> {
        answer.map(drop).map_err(|status| self.failure(&status))
    }

    fn failure(&self, status: &Status) -> Failure {
        let kind = kind(status);
        let message = if kind == FailureKind::Silent && std::error::Error::source(status).is_some() {
            down(&self.peer, &root_cause(status))
        } else {
            format!("node {}: {}", self.peer.name, status.message())
        };
        Failure::new(kind, message)
    }
}

/// A node that does not answer: where it should, and how to look.
fn down(peer: &PeerConfig, reason: &str) -> String {
    format!(
        "node {} does not answer at {}: {reason}; check that `dunlin node` runs there, its `listen`, the keys of both \
         nodes and the firewall between (`nc -vz {} {}`)",
        peer.name,
        peer.address,
        peer.address.ip(),
        peer.address.port()
    )
}

/// What a status of the `Peer` service allows one to conclude.
pub(crate) fn kind(status: &Status) -> FailureKind {
    match status.code() {
        Code::NotFound => FailureKind::NoSession,
        Code::FailedPrecondition
        | Code::InvalidArgument
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::Unauthenticated
        | Code::Unimplemented
        | Code::OutOfRange
        | Code::ResourceExhausted => FailureKind::Refused,
        // Broken off anywhere: what was asked may have been done.
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::Aborted
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss => FailureKind::Silent,
    }
}

/// The destination's notifications.
pub(crate) struct Notices {
    stream: tonic::Streaming<proto::Notification>,
    remote: Remote,
    heard: u32,
}

impl Notices {
    /// The next one that this build can read; `None` when the destination has no more to tell.
    pub(crate) async fn next(&mut self) -> Result<Option<Notice>, Failure> {
        loop {
            let Some(told) = self.stream.message().await.map_err(|status| self.remote.failure(&status))?
            else {
                return Ok(None);
            };
            let node = self.remote.name();
            match NotificationsResponse::parse_from_bytes(&told.response) {
                Ok(told) => {
                    self.heard = told.message_id;
                    match notice(&told) {
                        Ok(notice) => return Ok(Some(notice)),
                        Err(reason) => tracing::warn!(node, reason, "no news in a notification"),
                    }
                }
                Err(error) => tracing::warn!(node, %error, "skipped a notification"),
            }
        }
    }

    /// The id of the last one, for a watch that goes on after it.
    pub(crate) fn heard(&self) -> u32 {
        self.heard
    }
}

/// What a shim told, or in words why it says nothing to a coordinator.
pub(crate) fn notice(told: &NotificationsResponse) -> Result<Notice, String> {
    let missed = told.notification.missed;
    if missed > 0 {
        return Err(format!("{missed} before it are not kept any more"));
    }
    Notice::from_wire(&told.notification).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_clear_no_is_a_refusal() {
        assert_eq!(kind(&Status::failed_precondition("no")), FailureKind::Refused);
        assert_eq!(kind(&Status::not_found("no")), FailureKind::NoSession);
        for status in
            [Status::unavailable(""), Status::unknown(""), Status::cancelled(""), Status::internal("")]
        {
            assert_eq!(kind(&status), FailureKind::Silent, "{status}");
        }
    }

    #[tokio::test]
    async fn a_node_that_is_down_is_named_with_its_address_and_a_check() {
        let free = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let peer = PeerConfig { name: "b".into(), address: free, data_address: free };
        let remote = Remote::new(&peer, None, "a", "s").unwrap();
        let failure = remote.run(None).await.unwrap_err();
        assert_eq!(failure.kind, FailureKind::Silent);
        let expected = format!("node b does not answer at {free}: ");
        assert!(failure.message.starts_with(&expected), "{}", failure.message);
        assert!(
            failure.message.contains(&format!("nc -vz 127.0.0.1 {}", free.port())),
            "{}",
            failure.message
        );
    }
}
