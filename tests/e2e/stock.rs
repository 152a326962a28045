//! A guest whose agent does not resume streams: its pod moves all the same, and what that costs is what is told.

use std::{
    fs,
    path::Path,
    thread,
    time::{Duration, SystemTime},
};

use dunlin_tests::{Background, Container, Containerd, Exits, Host, Lab, Run, Stdio, count};
use nix::sys::stat::Mode;

use crate::{
    Case,
    refusals::Changed,
    rollback::{SlowNetwork, move_in_transfer},
};

pub(crate) const CASES: &[Case] =
    &[("stock::a_plain_guest_moves_at_the_told_price", a_plain_guest_moves_at_the_told_price)];

const ID: &str = "s-plain";
const SOON: Duration = Duration::from_secs(30);
/// What a guest repeats at most.
const TAIL: u64 = 128 << 10;

fn stock_agents(lab: &Lab) -> Changed {
    Changed::new(&lab.host_dir(Host::A).join("etc/config.toml"), |text| {
        let text = String::from_utf8_lossy(text);
        text.replace("[guest]\n", "[guest]\nkernel_arguments = \"dunlin.extensions=none\"\n").into_bytes()
    })
}

fn size(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |meta| meta.len())
}

fn a_plain_guest_moves_at_the_told_price(lab: &Lab) {
    let (background, exits) = (Background::start(), Exits::default());
    let [on_a, on_b] = Host::ALL.map(|host| Containerd::connect(lab, host, &background));
    for containerd in [&on_a, &on_b] {
        exits.listen(containerd);
    }
    let stock = stock_agents(lab);
    let container = Container::start(lab, Host::A, ID, &["/bin/counter"]);
    drop(stock);
    container.await_lines(Host::A, 100, SOON);

    // An exec that waits for its input's end, and one that says nothing.
    let template = on_a.template(lab);
    let fifo = |name: &str| {
        let path = format!("/run/{ID}-{name}");
        let there = lab.run_path(Host::A, &path);
        let _ = fs::remove_file(&there);
        nix::unistd::mkfifo(&there, Mode::from_bits_truncate(0o600)).expect("a FIFO");
        path
    };
    let exec = |name: &str, script: &str, stdio: &Stdio| {
        let args = ["sh", "-c", script].map(str::to_owned);
        on_a.exec(&template, ID, name, &args, stdio);
        on_a.start(ID, name);
    };
    let reads = Stdio { stdin: fifo("in"), stdout: fifo("out"), ..Stdio::default() };
    exec("reader", "cat >/heard; exit 9", &reads);
    let quiet = Stdio { stdout: fifo("quiet"), ..Stdio::default() };
    exec("quiet", "while [ ! -e /go ]; do sleep 0.1; done; exit 7", &quiet);
    let feed = |text: &str| fs::write(lab.run_path(Host::A, &reads.stdin), text).expect("it is read");
    feed("before a cancel");

    // A move that turns back breaks no connection, and costs nothing.
    let (slow, since) = (SlowNetwork::new(), SystemTime::now());
    let child = move_in_transfer(lab, ID);
    lab.on(Host::A, &["dunlin", "cancel", ID]).ok();
    Run::finish(child, "dunlin migrate", Duration::from_secs(180)).fails_naming(&["cancel"]);
    drop(slow);
    exits.set_aside_arrivals(Host::B, since);
    feed(", and after it");
    container.await_lines(Host::A, 50, SOON);
    let stayed = container.counted(Host::A);
    assert!(
        stayed.missing.is_empty() && stayed.repeated.is_empty() && stayed.damaged.is_empty(),
        "{stayed:?}"
    );

    let before = container.identity(Host::A, "who-a");
    thread::sleep(Duration::from_secs(1));

    let told = lab.migrate(Host::A, ID, "b");
    assert_eq!(told.code, 0, "{}{}", told.stdout, told.stderr);
    let said = format!("{}{}", told.stdout, told.stderr);
    for words in ["exec reader", "exec quiet", "repetition, of 128 KiB at most", "does not resume streams"] {
        assert!(said.contains(words), "no {words:?} in {said}");
    }
    container.assert_only_on(Host::B);
    assert_eq!(container.identity(Host::B, "who-b"), before, "another process than before");
    container.await_lines(Host::B, 100, SOON);

    // Its input ended with the connection, and so did it: told once, by the host that has the task.
    let reader = exits.await_one_of(Host::B, ID, "reader", SOON);
    assert_eq!(reader.ended.code, 9);
    assert_eq!(container.exec(Host::B, "heard", &["cat", "/heard"]).ok(), "before a cancel, and after it");
    // The other lives on, and its exit is known.
    assert_eq!(exits.announced(ID, "quiet").len(), 0);
    container.exec(Host::B, "go", &["touch", "/go"]).ok();
    assert_eq!(exits.await_one_of(Host::B, ID, "quiet", SOON).ended.code, 7);

    let [there, here] = [Host::A, Host::B].map(|host| container.log_path(host));
    let both = count(&(container.log(Host::A) + &container.log(Host::B)));
    println!(
        "    {} lines, {} of them twice; {} bytes before the move, {} after",
        both.last,
        both.repeated.len(),
        size(&there),
        size(&here)
    );
    assert!(both.missing.is_empty() && both.damaged.is_empty(), "{both:?}");
    assert!(!both.repeated.is_empty() && size(&there) < TAIL, "nothing was repeated: {both:?}");

    // And back. What the guest repeats now begins with the repetition before.
    let told = lab.migrate(Host::B, ID, "a");
    assert_eq!(told.code, 0, "{}{}", told.stdout, told.stderr);
    container.assert_only_on(Host::A);
    container.await_lines(Host::A, 50, SOON);
    on_a.kill(ID, "", 9);
    assert_eq!(exits.await_one(ID, "", SOON).ended.code, 137);
    thread::sleep(Duration::from_secs(1));
    for (exec, code) in [("", 137), ("reader", 9), ("quiet", 7)] {
        let all = exits.announced(ID, exec);
        assert!(all.len() == 1 && all[0].ended.code == code, "{exec}: {all:?}");
    }
    assert_eq!(on_a.delete(ID, "").code, 137);
    for name in ["in", "out", "quiet"] {
        let _ = fs::remove_file(lab.run_path(Host::A, &format!("/run/{ID}-{name}")));
    }
}
