//! A sandbox's own record, which containerd 1.7 and newer keep of one that was made through the Sandbox API, and
//! what their controller knows of its shim.
//!
//! The controller learns of a shim only by `Create`, which runs the shim's `start`. On a destination the spec
//! that it is given leads `start` to the shim that waits already, as a task's does, and the shim answers
//! CreateSandbox for a sandbox that is arriving. 1.7 reads that spec from the record, so the record has it for
//! as long as `Create` takes.
//!
//! ```text
//!   store (annotated spec) -> controller Create -> store (the source's spec) -> ... -> settle
//!                    \___________\___________________\____-> shut down, remove
//! ```
//!
//! CRI keeps the records of its own pods; those are none of this module's.

use containerd_client::types::Sandbox;
use prost::Message;
use prost_types::Any;
use tokio::time::{Instant, sleep};

use super::arrival::{ArrivalError, Place, annotate};
use super::client::{Containerd, ContainerdError, optional};
use super::departure::POLL;
use super::sandboxes::Said;
use super::{RUNTIME, SANDBOX, SESSION};
use crate::proto::{Mismatch, SandboxFacts};

/// containerd's controller for shims. 1.7 has no other and keeps no name.
const SHIM: &str = "shim";
/// Of a record without a spec, while the controller is told of it.
const SPEC: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";

/// Source: the record of sandbox `id`, as it travels. `None`: containerd keeps none, or is older than records.
pub(crate) async fn gather(
    containerd: &Containerd,
    namespace: &str,
    id: &str,
) -> Result<Option<Vec<u8>>, ContainerdError> {
    let found = match containerd.sandbox(namespace, id).await {
        Err(error) if error.is_no_service() => None,
        found => found?,
    };
    Ok(found.map(|record| travelling(record).encode_to_vec()))
}

/// Without what is this host's: when it was made, and of which move.
fn travelling(mut record: Sandbox) -> Sandbox {
    record.labels.remove(SESSION);
    Sandbox { created_at: None, updated_at: None, ..record }
}

/// What was said beside the record that came with `facts`, as it is to be said here. Err: in words, why it cannot be.
pub(crate) fn said(facts: &SandboxFacts) -> Result<Said, String> {
    let network = facts.networks.iter().find(|network| network.pod == facts.record_network);
    if network.is_none() && !facts.record_network.is_empty() {
        let (id, pod) = (&facts.id, &facts.record_network);
        return Err(format!("the network of sandbox `{id}` is that of `{pod}`, which came without one"));
    }
    let options = match facts.record_options.as_slice() {
        [] => None,
        bytes => Some(
            Any::decode(bytes)
                .map_err(|error| format!("the options of sandbox `{}` cannot be read: {error}", facts.id))?,
        ),
    };
    Ok(Said { netns_path: network.map(|network| network.destination.clone()).unwrap_or_default(), options })
}

/// The record that came with `facts`, if one did. Err: in words, why it cannot be kept.
pub(crate) fn read(facts: &SandboxFacts) -> Result<Option<Sandbox>, String> {
    let stray = facts.containers.iter().find(|container| container.in_record);
    if facts.record.is_empty() {
        return match stray {
            Some(container) => {
                Err(format!("container `{}` is of a sandbox's record, and none came with it", container.id))
            }
            None => Ok(None),
        };
    }
    let id = &facts.id;
    let wrong = |what: &str| Err(format!("the record of sandbox `{id}` {what}"));
    let record = match Sandbox::decode(facts.record.as_slice()) {
        Ok(record) => travelling(record),
        Err(error) => return wrong(&format!("cannot be read: {error}")),
    };
    if record.sandbox_id != *id {
        return wrong(&format!("is of another, `{}`", record.sandbox_id));
    }
    let runtime = record.runtime.as_ref().map_or("", |runtime| &runtime.name);
    if runtime != RUNTIME {
        return wrong(&format!("names the runtime `{runtime}`, not {RUNTIME}"));
    }
    if let Err(reason) = leading(&record, id) {
        return wrong(&format!("has a spec that cannot be annotated: {reason}"));
    }
    let sandboxer = sandboxer(&record).to_owned();
    Ok(Some(Sandbox { sandboxer, ..record }))
}

/// The controller of a record's sandbox.
pub(crate) fn sandboxer(record: &Sandbox) -> &str {
    if record.sandboxer.is_empty() { SHIM } else { &record.sandboxer }
}

/// The spec that leads `start` to the shim that waits for `sandbox`.
fn leading(record: &Sandbox, sandbox: &str) -> Result<Any, String> {
    let (type_url, spec) = match &record.spec {
        Some(spec) => (spec.type_url.clone(), spec.value.as_slice()),
        None => (SPEC.to_owned(), &b"{}"[..]),
    };
    Ok(Any { type_url, value: annotate(spec, &[(SANDBOX, sandbox)])? })
}

/// What stands in the way of the record of `facts` here; nothing is made.
pub(crate) async fn obstacles(
    containerd: &Containerd,
    facts: &SandboxFacts,
) -> Result<Vec<Mismatch>, ContainerdError> {
    let (namespace, id) = (&facts.namespace, &facts.id);
    let found = |destination: String, way_out: String| {
        Ok(vec![Mismatch {
            field: "sandbox record".into(),
            source: id.clone(),
            destination,
            way_out,
            container: String::new(),
        }])
    };
    let record = match read(facts) {
        Ok(None) => return Ok(Vec::new()),
        Ok(Some(record)) => record,
        Err(reason) => {
            return found(reason, "make the sandbox anew, with a JSON spec and this runtime".into());
        }
    };
    if let Err(reason) = said(facts) {
        return found(reason, "move it between nodes of the same version".into());
    }
    let sandboxer = &record.sandboxer;
    match containerd.sandbox(namespace, id).await {
        Ok(None) => {}
        Ok(Some(_)) => {
            let way_out = "delete it there (Delete of containerd's sandbox store)";
            return found(format!("exists already in namespace {namespace}"), way_out.into());
        }
        Err(error) if error.is_no_service() => {
            return found(
                "its containerd has no sandbox store".into(),
                "choose a destination with containerd 1.7 or newer, or move containers that were made without the Sandbox \
                 API"
                .into(),
            );
        }
        Err(error) => return Err(error),
    }
    match containerd.has_sandbox(namespace, id, sandboxer).await {
        Ok(false) => Ok(Vec::new()),
        Ok(true) => found(
            format!("controller {sandboxer} runs one of that name"),
            "shut it down there (Shutdown of containerd's sandbox controller)".into(),
        ),
        Err(ContainerdError::Unreachable { socket, reason }) => {
            Err(ContainerdError::Unreachable { socket, reason })
        }
        Err(error) => found(
            error.to_string(),
            format!("configure the sandbox controller `{sandboxer}` in the destination's containerd"),
        ),
    }
}

/// The record of one arriving sandbox.
#[derive(Debug)]
pub(crate) struct RecordArrival {
    containerd: Containerd,
    place: Place,
    record: Sandbox,
    said: Said,
    /// It may exist on our account.
    made: bool,
    /// So may what the controller keeps.
    told: bool,
}

impl RecordArrival {
    /// Nothing is made yet.
    pub(crate) fn new(containerd: Containerd, place: Place, record: Sandbox, said: Said) -> RecordArrival {
        RecordArrival { containerd, place, record, said, made: false, told: false }
    }

    /// Keeps the record, and makes the waiting shim known to the controller, once. Before the first container
    /// that names the sandbox.
    pub(crate) async fn create(&mut self) -> Result<(), ArrivalError> {
        let Place { namespace, sandbox, session } = &self.place;
        let wrong = |reason| ArrivalError::Spec { id: sandbox.clone(), reason };
        let mut kept = self.record.clone();
        kept.labels.insert(SESSION.into(), session.clone());
        let led = Sandbox { spec: Some(leading(&self.record, sandbox).map_err(wrong)?), ..kept.clone() };
        self.made = true;
        self.containerd.store_sandbox(namespace, led.clone()).await?;
        self.told = true;
        if let Err(error) = self.containerd.create_sandbox(namespace, led, self.said.clone()).await {
            if matches!(error, ContainerdError::Exists { .. }) {
                // Somebody else's shim must outlive our refusal.
                (self.made, self.told) = (false, false);
                self.containerd.forget_sandbox(namespace, sandbox).await?;
                return Err(error.into());
            }
            // 1.7 has created it by then, and fails to tell its own subscribers.
            let known = self.containerd.has_sandbox(namespace, sandbox, &kept.sandboxer).await;
            if !known.unwrap_or(false) {
                return Err(error.into());
            }
            tracing::debug!(session, sandbox, %error, "created all the same");
        }
        if kept.spec.is_some() {
            return Ok(self.containerd.update_sandbox(namespace, kept, "spec").await?);
        }
        // A spec that is not there cannot be written.
        self.containerd.forget_sandbox(namespace, sandbox).await?;
        Ok(self.containerd.store_sandbox(namespace, kept).await?)
    }

    /// Has the controller end the shim, which then takes what it keeps away. Safe to repeat.
    pub(crate) async fn shut_down(&self) -> Result<(), ContainerdError> {
        if !self.told {
            return Ok(());
        }
        let Place { namespace, sandbox, .. } = &self.place;
        let shutting = self.containerd.shut_sandbox_down(namespace, sandbox, &self.record.sandboxer);
        optional(shutting.await).map(drop)
    }

    /// The sandbox runs here: this node does not answer for its record any more. Safe to repeat.
    pub(crate) async fn settle(&mut self) -> Result<(), ContainerdError> {
        if !self.made {
            return Ok(());
        }
        optional(settle(&self.containerd, &self.place.namespace, self.record.clone()).await)?;
        (self.made, self.told) = (false, false);
        Ok(())
    }

    /// Removes what was made, after the shim is gone; containerd may take until `deadline` to notice that.
    /// Safe to repeat; says what was left.
    pub(crate) async fn remove(&mut self, deadline: Instant) -> Option<String> {
        if !self.made {
            return None;
        }
        let left = remove(&self.containerd, &self.place, &self.record.sandboxer, deadline).await.err();
        self.made = left.is_some();
        left
    }
}

/// Takes the session's label from a record.
pub(crate) async fn settle(
    containerd: &Containerd,
    namespace: &str,
    mut record: Sandbox,
) -> Result<(), ContainerdError> {
    record.labels.remove(SESSION);
    containerd.update_sandbox(namespace, record, &format!("labels.{SESSION}")).await
}

/// Removes the record that the session of `place` made, and what the controller keeps of the sandbox.
pub(crate) async fn remove(
    containerd: &Containerd,
    place: &Place,
    sandboxer: &str,
    deadline: Instant,
) -> Result<(), String> {
    let Place { namespace, sandbox, session } = place;
    let told = |error: ContainerdError| error.to_string();
    let Some(record) = containerd.sandbox(namespace, sandbox).await.map_err(told)? else { return Ok(()) };
    if record.labels.get(SESSION) != Some(session) {
        return Ok(());
    }
    end(containerd, namespace, sandbox, sandboxer, deadline).await
}

/// Source, after its containers: the shim that the machine has left ends, and the record goes. Safe to repeat.
pub(crate) async fn depart(
    containerd: &Containerd,
    facts: &SandboxFacts,
    deadline: Instant,
) -> Result<(), String> {
    match read(facts)? {
        Some(record) => end(containerd, &facts.namespace, &facts.id, &record.sandboxer, deadline).await,
        None => Ok(()),
    }
}

/// Both the controller's part and the record.
async fn end(
    containerd: &Containerd,
    namespace: &str,
    id: &str,
    sandboxer: &str,
    deadline: Instant,
) -> Result<(), String> {
    // A shim that is gone is told as a failure until containerd has noticed.
    while let Err(error) = optional(containerd.shut_sandbox_down(namespace, id, sandboxer).await) {
        if Instant::now() >= deadline {
            return Err(format!("{error}; the sandbox controller's Shutdown of `{id}` ends what is left"));
        }
        sleep(POLL).await;
    }
    optional(containerd.forget_sandbox(namespace, id).await).map(drop).map_err(|error| {
        format!("{error}; the sandbox store's Delete of `{id}` removes the record that is left")
    })
}

#[cfg(test)]
mod tests {
    use containerd_client::types::sandbox::Runtime;
    use prost_types::Timestamp;

    use super::*;
    use crate::proto::{ContainerFacts, PodNetwork};

    fn record(spec: &str) -> Sandbox {
        Sandbox {
            sandbox_id: "s1".into(),
            runtime: Some(Runtime { name: RUNTIME.into(), options: None }),
            spec: Some(Any { type_url: "spec".into(), value: spec.as_bytes().to_vec() }),
            labels: [("who".to_owned(), "me".to_owned()), (SESSION.to_owned(), "earlier".to_owned())].into(),
            created_at: Some(Timestamp::default()),
            updated_at: Some(Timestamp::default()),
            sandboxer: "another".into(),
            ..Sandbox::default()
        }
    }

    fn of(record: &Sandbox) -> SandboxFacts {
        SandboxFacts { id: "s1".into(), record: record.encode_to_vec(), ..SandboxFacts::default() }
    }

    #[test]
    fn a_record_comes_without_what_was_the_other_hosts() {
        let come = read(&of(&record("{}"))).unwrap().unwrap();
        assert_eq!((come.created_at, come.updated_at), (None, None));
        assert_eq!(come.labels, [("who".to_owned(), "me".to_owned())].into());
        assert_eq!(come.sandboxer, "another");
        // 1.7 keeps no name, and 2 wants one.
        let nameless = Sandbox { sandboxer: String::new(), ..record("{}") };
        assert_eq!(read(&of(&nameless)).unwrap().unwrap().sandboxer, SHIM);
        assert_eq!(read(&SandboxFacts::default()), Ok(None));
    }

    #[test]
    fn what_only_create_sandbox_said_is_said_again() {
        let options = Any { type_url: "options".into(), value: vec![1, 2] };
        let network =
            PodNetwork { pod: "c1".into(), destination: "/run/netns/there".into(), ..PodNetwork::default() };
        let facts = SandboxFacts {
            networks: vec![network],
            record_network: "c1".into(),
            record_options: options.encode_to_vec(),
            ..of(&record("{}"))
        };
        let told = Said { netns_path: "/run/netns/there".into(), options: Some(options) };
        assert_eq!(said(&facts), Ok(told));
        // The pod's own spec names it then.
        let by_spec =
            SandboxFacts { record_network: String::new(), record_options: Vec::new(), ..facts.clone() };
        assert_eq!(said(&by_spec), Ok(Said::default()));
        let error = said(&SandboxFacts { record_network: "c2".into(), ..facts.clone() }).unwrap_err();
        assert!(error.contains("`s1`") && error.contains("`c2`"), "{error}");
        let error = said(&SandboxFacts { record_options: vec![0xff], ..facts }).unwrap_err();
        assert!(error.contains("options of sandbox `s1`"), "{error}");
    }

    #[test]
    fn a_record_that_cannot_be_this_sandboxs_is_refused_by_name() {
        let other = Runtime { name: "io.containerd.runc.v2".into(), options: None };
        for (facts, reason) in [
            (of(&Sandbox { sandbox_id: "s2".into(), ..record("{}") }), "another, `s2`"),
            (of(&Sandbox { runtime: Some(other), ..record("{}") }), "io.containerd.runc.v2"),
            (of(&Sandbox { runtime: None, ..record("{}") }), "the runtime ``"),
            (of(&record("[]")), "cannot be annotated"),
            (SandboxFacts { record: vec![0xff], ..of(&record("{}")) }, "cannot be read"),
        ] {
            let refused = read(&facts).unwrap_err();
            assert!(refused.contains("`s1`") && refused.contains(reason), "{refused}");
        }
        let stray = ContainerFacts { id: "c1".into(), in_record: true, ..ContainerFacts::default() };
        let facts = SandboxFacts { containers: vec![stray], ..SandboxFacts::default() };
        assert!(read(&facts).unwrap_err().contains("`c1`"));
    }

    #[test]
    fn the_spec_that_start_reads_leads_to_the_waiting_shim() {
        let json = |spec: Any| serde_json::from_slice::<serde_json::Value>(&spec.value).unwrap();
        let led = json(leading(&record(r#"{"a":1,"annotations":{"b":"c"}}"#), "s1").unwrap());
        assert_eq!(led, serde_json::json!({ "a": 1, "annotations": { "b": "c", SANDBOX: "s1" } }));
        let led = json(leading(&Sandbox { spec: None, ..record("{}") }, "s1").unwrap());
        assert_eq!(led, serde_json::json!({ "annotations": { SANDBOX: "s1" } }));
    }
}
