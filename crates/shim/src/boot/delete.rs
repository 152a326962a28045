//! `delete`: containerd's connection to a container's shim has ended, and it wants nothing of the container
//! left. It calls also after an orderly end.

use std::path::Path;
use std::time::{Duration, SystemTime};

use containerd_shim_protos::api::DeleteResponse;
use protobuf::{Message, MessageField};

use super::args::Args;
use super::directory::{StateDirectory, clear_scratch, remove_tree};
use super::join;
use super::serving::serves;
use crate::config::Config;
use crate::sandbox::bundle;
use crate::service::status::timestamp;

/// What the shell reports for a process that SIGKILL ended.
const KILLED: u32 = 128 + 9;

/// containerd 1.6 asks here first and looks then whether it still has the task: of one that it is about to forget after an
/// orderly Delete it would tell an exit with 137. Nobody waits for the answer.
const FORGETTING: Duration = Duration::from_millis(100);

/// Removes the files of what is dead and gives the response for standard output.
///
/// The machine needs no kill: QEMU dies with the shim that started it. A shim that is alive serves other
/// containers, or is about to clear its directory itself: nothing is taken away from it.
pub(crate) fn delete(args: &Args, config: &Config) -> Vec<u8> {
    let bundle = if args.bundle.is_empty() { Path::new(".") } else { Path::new(&args.bundle) };
    clear(args, config, bundle);
    std::thread::sleep(FORGETTING);
    let response = DeleteResponse {
        exit_status: KILLED,
        exited_at: MessageField::some(timestamp(SystemTime::now())),
        ..DeleteResponse::default()
    };
    response.write_to_bytes().unwrap_or_default()
}

fn clear(args: &Args, config: &Config, bundle: &Path) {
    clear_if_dead(args, config, &args.id);
    // The bundle may be gone already: then only its own name is left to go by.
    let annotations = bundle::annotations(bundle).unwrap_or_default();
    let Some(join) = join::of(&annotations, &args.id) else { return };
    let own = StateDirectory::new(&config.state_dir, &args.namespace, &args.id);
    // No shim was ever started in it: it only leads to the sandbox.
    if join.heads_pod && !own.pid_file().exists() {
        remove_tree(own.path());
    }
    if join.sandbox != args.id && join::is_id(&join.sandbox) {
        clear_if_dead(args, config, &join.sandbox);
    }
}

/// A directory that only leads to a living sandbox counts as alive.
fn clear_if_dead(args: &Args, config: &Config, sandbox: &str) {
    let directory = StateDirectory::new(&config.state_dir, &args.namespace, sandbox);
    if join::live_address(&directory).is_none() && !serves(&directory.shim_socket()) {
        clear_scratch(config, &directory, &args.namespace, sandbox);
        remove_tree(directory.path());
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::super::directory::scratch_directory;
    use super::*;

    struct Host {
        at: tempfile::TempDir,
        config: Config,
    }

    impl Host {
        fn new() -> Host {
            let at = tempfile::tempdir().unwrap();
            let config = Config {
                state_dir: at.path().join("run"),
                data_dir: at.path().join("data"),
                ..Config::default()
            };
            Host { at, config }
        }

        /// A sandbox's files; somebody answers there for as long as the listener is kept.
        fn sandbox(&self, id: &str) -> (StateDirectory, UnixListener) {
            let directory = StateDirectory::new(&self.config.state_dir, "ns", id);
            directory.create().unwrap();
            let socket = directory.shim_socket();
            let listener = UnixListener::bind(&socket).unwrap();
            std::fs::write(directory.address_file(), format!("unix://{}", socket.display())).unwrap();
            std::fs::write(directory.pid_file(), "1").unwrap();
            std::fs::create_dir_all(scratch_directory(&self.config, "ns", id)).unwrap();
            (directory, listener)
        }

        fn delete(&self, id: &str, annotations: &serde_json::Value) {
            let bundle = self.at.path().join("bundle");
            std::fs::create_dir_all(&bundle).unwrap();
            let spec = serde_json::json!({"annotations": annotations}).to_string();
            std::fs::write(bundle.join("config.json"), spec).unwrap();
            let args = Args {
                namespace: "ns".to_owned(),
                id: id.to_owned(),
                bundle: bundle.display().to_string(),
                ..Args::default()
            };
            let response = DeleteResponse::parse_from_bytes(&delete(&args, &self.config)).unwrap();
            assert_eq!(response.exit_status, 137);
        }

        fn scratch_exists(&self, id: &str) -> bool {
            scratch_directory(&self.config, "ns", id).exists()
        }
    }

    #[test]
    fn a_container_that_goes_leaves_the_sandbox_of_the_others_alone() {
        let host = Host::new();
        let (directory, listener) = host.sandbox("p");
        let of_p = serde_json::json!({"io.kubernetes.cri.sandbox-id": "p"});
        host.delete("c", &of_p);
        host.delete("p", &of_p);
        assert!(directory.address_file().exists() && host.scratch_exists("p"));
        drop(listener);
        host.delete("c", &of_p);
        assert!(!directory.path().exists() && !host.scratch_exists("p"));
    }

    #[test]
    fn only_what_is_this_hosts_goes() {
        let host = Host::new();
        let (directory, listener) = host.sandbox("p");
        let [mine, lent] = ["mine.raw", "lent.raw"].map(|name| {
            let file = scratch_directory(&host.config, "ns", "p").join(name);
            std::fs::write(&file, "x").unwrap();
            crate::rootfs::scratch::own(&directory.ledger(), &file);
            file
        });
        crate::rootfs::scratch::disown(&directory.ledger(), &lent).unwrap();
        drop(listener);
        host.delete("p", &serde_json::json!({}));
        assert!(!directory.path().exists() && !mine.exists() && lent.exists());
    }

    #[test]
    fn what_leads_to_a_sandbox_goes_and_the_sandbox_stays() {
        let host = Host::new();
        let (sandbox, _listener) = host.sandbox("p");
        let pod = StateDirectory::new(&host.config.state_dir, "ns", "v");
        pod.create().unwrap();
        std::fs::copy(sandbox.address_file(), pod.address_file()).unwrap();
        let of_v = serde_json::json!({"io.kubernetes.cri.sandbox-id": "v"});
        host.delete("c", &of_v);
        assert!(pod.path().exists());
        host.delete(
            "v",
            &serde_json::json!({"io.kubernetes.cri.sandbox-id": "p", "io.microsoft.cri.virtual-pod-id": "v"}),
        );
        assert!(!pod.path().exists());
        assert!(sandbox.address_file().exists() && host.scratch_exists("p"));
    }

    #[test]
    fn an_annotation_names_no_directory_elsewhere() {
        let host = Host::new();
        let precious = host.at.path().join("run/precious");
        std::fs::create_dir_all(&precious).unwrap();
        host.delete("c", &serde_json::json!({"io.kubernetes.cri.sandbox-id": "../precious"}));
        assert!(precious.exists());
    }
}
