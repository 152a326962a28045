//! What containerd tells a shim that it starts, and the form in which it takes the answer, by version:
//!
//! | containerd | says | takes |
//! |---|---|---|
//! | 1.6 | flags, `TTRPC_ADDRESS` | the address |
//! | 1.7 | also `MAX_SHIM_VERSION=2`; the runtime's options on standard input | the address, or JSON up to version 2 |
//! | 2.0 to 2.2 | the same as 1.7 | the address, or JSON up to version 3 |
//! | 2.3 on | `BootstrapParams` on standard input; the rest still, for how long is open | `BootstrapResult` |
//!
//! Version 3 says that the shim has the Sandbox API: containerd then sends the containers of a sandbox to
//! its shim without asking `start` for each. 2.0 to 2.2 do not say that they know it; but only they keep a
//! sandbox's bundle in [`SANDBOX_BUNDLES`], and elsewhere the version makes no difference to them.

use std::io::{IsTerminal, Read};
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};

use super::args::{Args, ArgsError};

/// The directory, in the path of a bundle, of containerd 2's controller of sandboxes.
const SANDBOX_BUNDLES: &str = "io.containerd.sandbox.controller.v1.shim";
/// The Sandbox API and Task version 3.
const VERSION: i32 = 3;
const PROTOCOL: &str = "ttrpc";
/// Options and extensions are a few KiB.
const INPUT_MAX: u64 = 4 * 1024 * 1024;
/// For a caller that neither writes nor closes.
const INPUT_WAIT: Duration = Duration::from_secs(2);
/// `LogLevel` of containerd's message: this and lower is debugging.
const DEBUG_LEVEL: i32 = -4;

/// The form of the answer to `start`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// The address alone, which means version 2.
    Address,
    /// `{"version":3, ..}`.
    Json,
    /// The message of containerd 2.3.
    Message,
}

/// Who called `start`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Caller {
    pub(crate) form: Form,
    /// Path of containerd's ttrpc socket, when the caller's message tells it.
    pub(crate) ttrpc_address: Option<String>,
}

impl Caller {
    /// Reads what the caller says besides its flags, and completes `args` by it.
    pub(crate) fn learn(args: &mut Args) -> Result<Caller, ArgsError> {
        let max_version = std::env::var("MAX_SHIM_VERSION").ok().and_then(|text| text.parse().ok());
        let bundle = std::env::current_dir().unwrap_or_default();
        let caller = Caller::of(args, &standard_input(), max_version, &bundle);
        args.check_ids()?;
        Ok(caller)
    }

    fn of(args: &mut Args, input: &[u8], max_version: Option<i32>, bundle: &Path) -> Caller {
        if let Some(params) = bootstrap_params(args, input) {
            args.namespace.clone_from(&params.namespace);
            args.id.clone_from(&params.instance_id);
            args.debug |= params.log_level.value() <= DEBUG_LEVEL;
            if args.address.is_empty() {
                socket_path(&params.containerd_grpc_address).clone_into(&mut args.address);
            }
            if args.publish_binary.is_empty() {
                args.publish_binary.clone_from(&params.containerd_binary);
            }
            let ttrpc = socket_path(&params.containerd_ttrpc_address);
            let ttrpc_address = (!ttrpc.is_empty()).then(|| ttrpc.to_owned());
            return Caller { form: Form::Message, ttrpc_address };
        }
        let sandbox = bundle.components().any(|part| part.as_os_str() == SANDBOX_BUNDLES);
        let form = if sandbox || max_version >= Some(VERSION) { Form::Json } else { Form::Address };
        Caller { form, ttrpc_address: None }
    }

    /// What `start` writes on standard output.
    pub(crate) fn answer(&self, address: &str) -> Vec<u8> {
        match self.form {
            Form::Address => address.as_bytes().to_vec(),
            Form::Json => serde_json::json!({"version": VERSION, "address": address, "protocol": PROTOCOL})
                .to_string()
                .into_bytes(),
            Form::Message => {
                let result = BootstrapResult {
                    version: VERSION,
                    address: address.to_owned(),
                    protocol: PROTOCOL.to_owned(),
                    ..BootstrapResult::default()
                };
                result.write_to_bytes().unwrap_or_default()
            }
        }
    }
}

/// The answer to `-info`: what this runtime is. `options` are given back as they came.
pub(crate) fn info() -> Vec<u8> {
    let options = Any::parse_from_bytes(&standard_input()).ok().filter(|any| !any.type_url.is_empty());
    let version =
        RuntimeVersion { version: env!("CARGO_PKG_VERSION").to_owned(), ..RuntimeVersion::default() };
    let info = RuntimeInfo {
        name: "io.containerd.dunlin.v2".to_owned(),
        version: MessageField::some(version),
        options: options.into(),
        ..RuntimeInfo::default()
    };
    info.write_to_bytes().unwrap_or_default()
}

/// The message of containerd 2.3. Older ones send an Any with the runtime's options, which reads as this
/// message too, with a type's name where the id is: only the flags' own ids make it one.
fn bootstrap_params(args: &Args, input: &[u8]) -> Option<BootstrapParams> {
    let params = BootstrapParams::parse_from_bytes(input).ok()?;
    let same = |flag: &str, told: &str| !told.is_empty() && (flag.is_empty() || flag == told);
    let ours = same(&args.id, &params.instance_id)
        && same(&args.namespace, &params.namespace)
        && !params.containerd_version.is_empty();
    ours.then_some(params)
}

fn socket_path(address: &str) -> &str {
    address.strip_prefix("unix://").unwrap_or(address)
}

/// What the caller wrote, or nothing when it is a terminal or says nothing in time.
fn standard_input() -> Vec<u8> {
    if std::io::stdin().is_terminal() {
        return Vec::new();
    }
    let (sender, input) = mpsc::sync_channel(1);
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let read = std::io::stdin().take(INPUT_MAX).read_to_end(&mut bytes);
        // Received or not: whoever asked may have given up.
        let _ = sender.send(if read.is_ok() { bytes } else { Vec::new() });
    });
    input.recv_timeout(INPUT_WAIT).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TASK: &str = "/run/containerd/io.containerd.runtime.v2.task/default/c1";
    const SANDBOX: &str = "/run/containerd/io.containerd.sandbox.controller.v1.shim/default/c1";

    fn args() -> Args {
        Args { namespace: "default".to_owned(), id: "c1".to_owned(), ..Args::default() }
    }

    fn params() -> BootstrapParams {
        BootstrapParams {
            instance_id: "c1".to_owned(),
            namespace: "default".to_owned(),
            containerd_version: "2.3.4".to_owned(),
            containerd_grpc_address: "unix:///run/c.sock".to_owned(),
            containerd_ttrpc_address: "/run/c.sock.ttrpc".to_owned(),
            ..BootstrapParams::default()
        }
    }

    #[test]
    fn each_containerd_gets_an_answer_that_it_takes() {
        let options = Any { type_url: "x/y.Options".to_owned(), value: vec![10, 1, 65], ..Any::default() };
        let options = options.write_to_bytes().unwrap();
        for (input, max, bundle, form) in [
            // 1.6, then 1.7 and 2.1 without and with options of the runtime.
            (&[][..], None, TASK, Form::Address),
            (&[], Some(2), TASK, Form::Address),
            (&options, Some(2), TASK, Form::Address),
            // 2.1's sandbox, a caller that says that it knows version 3, and 2.3.
            (&options, Some(2), SANDBOX, Form::Json),
            (&[], Some(3), TASK, Form::Json),
            (&params().write_to_bytes().unwrap(), Some(2), TASK, Form::Message),
            // Neither message.
            (b"\xff\xff\xff", Some(2), TASK, Form::Address),
        ] {
            assert_eq!(
                Caller::of(&mut args(), input, max, Path::new(bundle)).form,
                form,
                "{input:?} {bundle}"
            );
        }
    }

    #[test]
    fn a_caller_that_gives_no_flags_is_known_by_its_message() {
        let mut flags = Args::default();
        let message = params().write_to_bytes().unwrap();
        let caller = Caller::of(&mut flags, &message, None, Path::new(TASK));
        assert_eq!((flags.namespace.as_str(), flags.id.as_str()), ("default", "c1"));
        assert_eq!(flags.address, "/run/c.sock");
        assert_eq!(caller.ttrpc_address.as_deref(), Some("/run/c.sock.ttrpc"));
    }

    #[test]
    fn a_message_for_another_container_is_none() {
        let message =
            BootstrapParams { instance_id: "other".to_owned(), ..params() }.write_to_bytes().unwrap();
        let mut flags = args();
        assert_eq!(Caller::of(&mut flags, &message, None, Path::new(TASK)).form, Form::Address);
        assert_eq!(flags.id, "c1");
    }

    #[test]
    fn the_answers_say_what_containerd_reads() {
        let caller = |form| Caller { form, ttrpc_address: None };
        assert_eq!(caller(Form::Address).answer("unix:///s"), b"unix:///s");
        let json: serde_json::Value =
            serde_json::from_slice(&caller(Form::Json).answer("unix:///s")).unwrap();
        assert_eq!(json, serde_json::json!({"version": 3, "address": "unix:///s", "protocol": "ttrpc"}));
        let message = BootstrapResult::parse_from_bytes(&caller(Form::Message).answer("unix:///s")).unwrap();
        assert_eq!(
            (message.version, message.address.as_str(), message.protocol.as_str()),
            (3, "unix:///s", "ttrpc")
        );
    }
}
