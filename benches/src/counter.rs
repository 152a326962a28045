//! The counter's lines as they arrive: when, and whether any is missing.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;

use crate::BenchError;

/// How often files and counts are looked at: the resolution of gaps of the lab's counters.
const LOOK: Duration = Duration::from_millis(2);

/// What a counter has written. Clones are handles to the same lines.
#[derive(Debug, Clone, Default)]
pub struct Lines(Arc<Mutex<Seen>>);

#[derive(Debug, Default)]
struct Seen {
    numbers: BTreeSet<u64>,
    /// When a number came that is higher than all before: the seam of a move may repeat some.
    arrivals: Vec<Instant>,
    pieces: Vec<(PathBuf, Vec<u8>)>,
}

impl Lines {
    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes one line, `<number> <uptime>`; any other only counts as a sign of life when it is the first.
    pub fn take(&self, line: &str) {
        let now = Instant::now();
        let Some(number) = line.split(' ').next().and_then(|word| word.parse().ok()) else { return };
        let mut seen = self.lock();
        if seen.numbers.last().is_none_or(|last| number > *last) {
            seen.arrivals.push(now);
        }
        seen.numbers.insert(number);
    }

    /// How many different numbers came.
    #[must_use]
    pub fn count(&self) -> usize {
        self.lock().numbers.len()
    }

    /// Numbers below the highest that never came.
    #[must_use]
    pub fn missing(&self) -> u64 {
        let seen = self.lock();
        let different = u64::try_from(seen.numbers.len()).unwrap_or(u64::MAX);
        seen.numbers.last().map_or(0, |last| last.saturating_sub(different))
    }

    /// The longest time between two neighbours of which the later came after `since`.
    #[must_use]
    pub fn longest_gap(&self, since: Instant) -> Duration {
        let seen = self.lock();
        let pairs = seen.arrivals.windows(2).filter(|pair| pair[1] >= since);
        pairs.map(|pair| pair[1] - pair[0]).max().unwrap_or_default()
    }

    /// Waits until `more` lines came after now.
    ///
    /// # Errors
    /// [`BenchError::Deadline`].
    pub async fn await_more(&self, more: usize, within: Duration) -> Result<(), BenchError> {
        let wanted = self.count() + more;
        let begin = Instant::now();
        while self.count() < wanted {
            if begin.elapsed() > within {
                let what = format!("line {wanted} of the counter ({} came)", self.count());
                return Err(BenchError::Deadline { what, within });
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    /// Follows a file that need not exist yet, until the task is aborted.
    pub(crate) fn follow(&self, path: PathBuf) -> JoinHandle<()> {
        let lines = self.clone();
        tokio::spawn(async move {
            let mut file = None;
            loop {
                lines.look(&path, &mut file);
                tokio::time::sleep(LOOK).await;
            }
        })
    }

    fn look(&self, path: &Path, file: &mut Option<File>) {
        if file.is_none() {
            *file = File::open(path).ok();
        }
        let Some(file) = file else { return };
        let mut bytes = Vec::new();
        // A failed read is repeated at the next look.
        if file.read_to_end(&mut bytes).is_err() || bytes.is_empty() {
            return;
        }
        for line in self.whole_lines(path, bytes) {
            self.take(&line);
        }
    }

    /// The whole lines of a file's next bytes; an unfinished one waits for its end.
    fn whole_lines(&self, path: &Path, bytes: Vec<u8>) -> Vec<String> {
        let mut seen = self.lock();
        let at = seen.pieces.iter().position(|(of, _)| of == path).unwrap_or_else(|| {
            seen.pieces.push((path.to_owned(), Vec::new()));
            seen.pieces.len() - 1
        });
        let piece = &mut seen.pieces[at].1;
        piece.extend(bytes);
        let Some(end) = piece.iter().rposition(|byte| *byte == b'\n') else { return Vec::new() };
        let whole: Vec<u8> = piece.drain(..=end).collect();
        String::from_utf8_lossy(&whole).lines().map(str::to_owned).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeats_are_no_arrivals_and_holes_are_missing() {
        let lines = Lines::default();
        for line in ["pid 1", "1 0.1", "2 0.2", "2 0.2", "5 0.5"] {
            lines.take(line);
        }
        assert_eq!((lines.count(), lines.missing()), (3, 2));
        assert_eq!(lines.lock().arrivals.len(), 3);
    }

    #[test]
    fn an_unfinished_line_waits_for_its_end() {
        let lines = Lines::default();
        let path = Path::new("a");
        assert!(lines.whole_lines(path, b"1 0.".to_vec()).is_empty());
        assert!(lines.whole_lines(Path::new("b"), b"7".to_vec()).is_empty());
        assert_eq!(lines.whole_lines(path, b"1\n2 0".to_vec()), ["1 0.1"]);
    }
}
