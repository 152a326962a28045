//! Runs a program to its end, within a deadline, and keeps what it wrote.

use std::{
    io::Read,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// A program that has ended.
#[derive(Debug)]
pub struct Run {
    /// What was run.
    pub command: String,
    /// Its exit code; -1 when a signal ended it.
    pub code: i32,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
    /// How long it ran.
    pub took: Duration,
}

impl Run {
    /// Runs `command` with nothing on its standard input.
    ///
    /// # Panics
    /// When it cannot be started or has not ended after `deadline`.
    pub fn new(mut command: Command, deadline: Duration) -> Run {
        let shown = format!("{command:?}").replace('"', "");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().unwrap_or_else(|error| panic!("cannot start {shown}: {error}"));
        Run::finish(child, &shown, deadline)
    }

    /// Waits for a started program whose outputs are pipes.
    ///
    /// # Panics
    /// When it has not ended after `deadline`; it is killed then.
    pub fn finish(mut child: Child, shown: &str, deadline: Duration) -> Run {
        let since = Instant::now();
        let mut out = child.stdout.take();
        let mut err = child.stderr.take();
        let out = thread::spawn(move || read(out.as_mut()));
        let err = thread::spawn(move || read(err.as_mut()));
        let status = loop {
            if let Some(status) = child.try_wait().expect("a child can be waited for") {
                break status;
            }
            if since.elapsed() > deadline {
                let _ = child.kill();
                let _ = child.wait();
                // Not joined: a process it left behind may hold its pipes.
                panic!("`{shown}` had not ended after {deadline:?}");
            }
            thread::sleep(Duration::from_millis(2));
        };
        Run {
            command: shown.to_owned(),
            code: status.code().unwrap_or(-1),
            stdout: out.join().expect("reading does not panic"),
            stderr: err.join().expect("reading does not panic"),
            took: since.elapsed(),
        }
    }

    /// Asks for exit code 0 and gives the standard output.
    ///
    /// # Panics
    /// Otherwise, with all that it wrote.
    #[track_caller]
    pub fn ok(self) -> String {
        assert!(
            self.code == 0,
            "`{}` failed with {}:\n{}{}",
            self.command,
            self.code,
            self.stdout,
            self.stderr
        );
        self.stdout
    }

    /// Asks for failure and gives all that it wrote.
    ///
    /// # Panics
    /// When it succeeded, with all that it wrote.
    #[track_caller]
    pub fn fails(self) -> String {
        assert!(self.code != 0, "`{}` succeeded:\n{}{}", self.command, self.stdout, self.stderr);
        self.stdout + &self.stderr
    }

    /// Asks for failure that mentions each of `words` (in any case).
    ///
    /// # Panics
    /// When it succeeded or is silent about one of them.
    #[track_caller]
    pub fn fails_naming(self, words: &[&str]) -> String {
        let command = self.command.clone();
        let text = self.fails();
        for word in words {
            assert!(
                text.to_lowercase().contains(&word.to_lowercase()),
                "`{command}` failed without naming `{word}`:\n{text}"
            );
        }
        text
    }
}

fn read(stream: Option<&mut impl Read>) -> String {
    let mut bytes = Vec::new();
    if let Some(stream) = stream {
        let _ = stream.read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
