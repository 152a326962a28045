use std::time::Duration;

/// A reading of the owner's monotonic clock: time since its start. Never compared between hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Moment(pub Duration);

impl Moment {
    /// The moment `wait` later.
    #[must_use]
    pub fn after(self, wait: Duration) -> Moment {
        Moment(self.0.saturating_add(wait))
    }

    /// The moment `ago` earlier; the clock's start, if that is later.
    #[must_use]
    pub fn before(self, ago: Duration) -> Moment {
        Moment(self.0.saturating_sub(ago))
    }

    /// Time from `earlier` to this; zero when it is the later one.
    pub fn since(self, earlier: Moment) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}
