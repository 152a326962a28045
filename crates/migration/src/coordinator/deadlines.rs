use std::time::Duration;

/// How long each wait of a move may take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deadlines {
    /// Comparing the hosts.
    pub preflight: Duration,
    /// Freezing and saving.
    pub export: Duration,
    /// Starting the destination's shim and taking in.
    pub import: Duration,
    /// Containerd's objects on the destination: layers may have to be built.
    pub create_tasks: Duration,
    /// The receiving machine.
    pub prepare: Duration,
    /// All streams.
    pub connect: Duration,
    /// The answer to a TransferSandbox.
    pub begin_transfer: Duration,
    /// Disks and memory, as a whole.
    pub transfer: Duration,
    /// Without news from the source while transferring: another phase, or other figures.
    pub stall: Duration,
    /// From the guest's pause to both sides' DONE.
    pub blackout: Duration,
    /// The commit record.
    pub commit: Duration,
    /// One attempt to run on the destination.
    pub run: Duration,
    /// One attempt to stop the source.
    pub stop_source: Duration,
    /// One attempt of each clean-up.
    pub clean_up: Duration,
    /// One attempt to cancel, abort or resume on the way back.
    pub undo: Duration,
    /// How long, before the decision, a destination that does not confirm its abort holds back
    /// the source.
    pub abort: Duration,
    /// How often the source's stop, and each clean-up, is tried before it becomes a leftover.
    pub attempts: u32,
    /// How often the source's resume is tried before the move has failed.
    pub resume_attempts: u32,
    /// First pause before a retry; doubles up to `backoff_max`.
    pub backoff: Duration,
    /// Longest pause before a retry.
    pub backoff_max: Duration,
}

impl Default for Deadlines {
    fn default() -> Deadlines {
        let seconds = Duration::from_secs;
        Deadlines {
            preflight: seconds(15),
            export: seconds(60),
            import: seconds(60),
            create_tasks: seconds(600),
            prepare: seconds(60),
            connect: seconds(30),
            begin_transfer: seconds(10),
            transfer: seconds(7200),
            stall: seconds(120),
            blackout: seconds(30),
            commit: seconds(10),
            run: seconds(150),
            stop_source: seconds(60),
            clean_up: seconds(60),
            undo: seconds(150),
            abort: seconds(20),
            attempts: 5,
            resume_attempts: 10,
            backoff: Duration::from_millis(100),
            backoff_max: seconds(5),
        }
    }
}

impl Deadlines {
    /// Pause before retry number `attempt`, from 0 on.
    pub(super) fn pause(&self, attempt: u32) -> Duration {
        let factor = 1u32.checked_shl(attempt.min(16)).unwrap_or(u32::MAX);
        self.backoff.saturating_mul(factor).min(self.backoff_max)
    }
}
