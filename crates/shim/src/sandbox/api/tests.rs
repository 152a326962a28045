use super::*;
use crate::boot::directory::StateDirectory;
use crate::service::events::Publisher;

fn sandbox(at: &std::path::Path) -> Arc<Sandbox> {
    let mut config = Config { state_dir: at.join("run"), data_dir: at.join("data"), ..Config::default() };
    config.guest.kernel = "/nonexistent/vmlinuz".into();
    let directory = StateDirectory::new(&config.state_dir, "ns", "s");
    let nobody = at.join("nobody.sock").display().to_string();
    let publisher = Publisher::spawn("ns".to_owned(), nobody);
    Sandbox::new("ns".to_owned(), "s".to_owned(), config, directory, publisher)
}

fn new(id: &str) -> NewSandbox {
    NewSandbox {
        id: id.to_owned(),
        bundle: "/nonexistent/bundle".into(),
        rootfs: false,
        options: None,
        netns_path: String::new(),
        annotations: HashMap::new(),
    }
}

fn refusal<T>(result: Result<T, SandboxError>) -> Code {
    match result {
        Ok(_) => panic!("it was not refused"),
        Err(error) => error.code(),
    }
}

#[tokio::test]
async fn a_sandbox_is_created_once_and_by_its_own_name() {
    let at = tempfile::tempdir().unwrap();
    let sandbox = sandbox(at.path());
    assert_eq!(refusal(sandbox.create_sandbox(new("other"))), Code::NotFound);
    assert_eq!(
        refusal(sandbox.create_sandbox(NewSandbox { rootfs: true, ..new("s") })),
        Code::InvalidArgument
    );
    assert_eq!(refusal(sandbox.start_sandbox().await), Code::FailedPrecondition);
    assert!(!sandbox.api.holds_shim());
    sandbox.create_sandbox(new("s")).unwrap();
    assert!(sandbox.api.holds_machine() && sandbox.api.holds_shim());
    assert_eq!(refusal(sandbox.create_sandbox(new("s"))), Code::AlreadyExists);
    assert_eq!(sandbox.sandbox_status(false).info["state"], "created");
}

#[tokio::test]
async fn a_sandbox_that_is_stopped_before_its_start_has_ended() {
    let at = tempfile::tempdir().unwrap();
    let sandbox = sandbox(at.path());
    sandbox.create_sandbox(new("s")).unwrap();
    let waiter = tokio::spawn({
        let sandbox = Arc::clone(&sandbox);
        async move { sandbox.wait_sandbox().await }
    });
    sandbox.stop_sandbox(Duration::from_secs(5)).await.unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(5), waiter).await.unwrap().unwrap().unwrap();
    assert_eq!(ended.code, 0);
    sandbox.stop_sandbox(Duration::from_secs(5)).await.unwrap();
    assert_eq!(refusal(sandbox.start_sandbox().await), Code::FailedPrecondition);
    assert_eq!(refusal(sandbox.ping_sandbox()), Code::Unavailable);
    assert_eq!(refusal(sandbox.sandbox_metrics()), Code::Unavailable);
    // Nor does a container bring the machine back.
    assert!(sandbox.machine_config(&sandbox.config).is_err() && !sandbox.api.holds_machine());
}

#[tokio::test]
async fn a_machine_that_cannot_be_made_ends_its_sandbox() {
    let at = tempfile::tempdir().unwrap();
    let sandbox = sandbox(at.path());
    let annotations = HashMap::from([(
        "io.microsoft.virtualmachine.computetopology.memory.sizeinmb".to_owned(),
        "256".to_owned(),
    )]);
    sandbox.create_sandbox(NewSandbox { annotations, ..new("s") }).unwrap();
    assert_eq!(sandbox.machine_config(&sandbox.config).unwrap().vm.memory_mib, 256);
    let error = sandbox.start_sandbox().await.unwrap_err().to_string();
    assert!(error.contains("/nonexistent/vmlinuz"), "{error}");
    let ended = tokio::time::timeout(Duration::from_secs(5), sandbox.wait_sandbox()).await.unwrap().unwrap();
    assert_eq!(ended.code, KILLED);
    assert_eq!(sandbox.sandbox_status(true).standing, Standing::Stopped);
}

#[test]
fn cri_is_told_that_a_pod_is_ready_for_as_long_as_it_is_this_hosts() {
    for (standing, ready) in [
        (Standing::Absent, false),
        (Standing::Created, false),
        (Standing::Starting, false),
        (Standing::Ready, true),
        (Standing::Migrating, true),
        (Standing::Arriving, false),
        (Standing::MovedAway, false),
        (Standing::Stopped, false),
    ] {
        let word = if ready { "SANDBOX_READY" } else { "SANDBOX_NOTREADY" };
        assert_eq!(standing.cri_state(), word, "{}", standing.name());
    }
}
