//! One task a machine: copies follow their sources.

use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::time::Instant;

use super::put::{Guest, PutError, Speed, put};
use super::scan::{ScanError, scan};
use super::watch::{Watcher, wanted};
use super::{Shared, lock};

/// From the first sign of a change to the look at it: changes come in heaps.
const SETTLE: Duration = Duration::from_millis(50);
/// Between two looks at one source.
const GAP: Duration = Duration::from_millis(250);
/// After a guest that could not, or a source that does not rest.
const RETRY: Duration = Duration::from_secs(2);
/// Without anything due.
const IDLE: Duration = Duration::from_secs(60);

/// Follows until the machine has ended.
pub(super) async fn follow<G: Guest>(shared: Arc<Shared>, guest: Weak<G>) {
    let mut watcher = Watcher::new();
    loop {
        let due = shared.next_due().unwrap_or_else(|| Instant::now() + IDLE);
        tokio::select! {
            () = shared.changed.notified() => {}
            touched = watcher.touched() => shared.touch(&touched, Instant::now() + SETTLE),
            () = tokio::time::sleep_until(due) => {}
        }
        for place in watcher.watched() {
            if !lock(&shared.table).copies.contains_key(&place) {
                watcher.forget(&place);
            }
        }
        while let Some(place) = shared.take_due(Instant::now()) {
            let Some(guest) = guest.upgrade().filter(|guest| !guest.gone()) else { return };
            let again = look(&shared, guest.as_ref(), &mut watcher, &place).await;
            let now = Instant::now();
            shared.looked(&place, now + again, now + GAP);
        }
        if guest.upgrade().is_none_or(|guest| guest.gone()) {
            return;
        }
    }
}

/// One look at a source; what has changed is put. Gives when the next look is due.
async fn look<G: Guest>(shared: &Arc<Shared>, guest: &G, watcher: &mut Watcher, place: &str) -> Duration {
    // Whoever freezes the table waits for this.
    let _turn = shared.turn.lock().await;
    let Some((source, known, limits)) = shared.of(place) else { return IDLE };
    let path = source.clone();
    let read = tokio::task::spawn_blocking(move || scan(&path, limits, &known)).await;
    let read = match read {
        Ok(Ok(read)) => read,
        Ok(Err(ScanError::Restless)) => return GAP,
        Ok(Err(ScanError::Unfit(why))) => {
            shared.warn_once(
                place,
                &format!("it is not followed any more: {why}; the guest keeps what it has"),
            );
            return RETRY;
        }
        Ok(Err(ScanError::Missing(why))) => {
            shared.warn_once(place, &format!("{why}; the guest keeps what it has"));
            return RETRY;
        }
        Err(_) => return RETRY,
    };
    let fresh = watcher.watch(place, wanted(&source, &read.root, read.directories()));
    if shared.shows(place, &read.entries) {
        shared.rested(place, read, false);
        // What happened between the look and a new watch was not told.
        return if fresh { GAP } else { watcher.patience(place) };
    }
    match put(guest, place, &read, Speed::Paced, || shared.held()).await {
        Ok(()) => {
            shared.rested(place, read, true);
            GAP
        }
        Err(PutError::Changed) => GAP,
        // Looked at anew when the table is free again.
        Err(PutError::Held) => GAP,
        Err(PutError::Guest(error)) => {
            shared.warn_once(place, &format!("the guest does not take it: {error}"));
            RETRY
        }
    }
}
