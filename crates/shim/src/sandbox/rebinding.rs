//! Network cards that have other addresses on this host: the guest is told while it runs already, and the move is not
//! over before it has answered.

use std::time::Duration;

use tokio::sync::watch;

/// The link is dialled and a request answered in this time, on a slow machine too. The node's call waits longer.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the guest has answered so far.
#[derive(Debug, Default)]
pub(crate) struct Rebinding {
    answers: watch::Sender<Answers>,
}

#[derive(Debug, Default)]
struct Answers {
    /// Cards of which nothing was heard.
    open: usize,
    warnings: Vec<String>,
}

impl Rebinding {
    /// The guest is to be told of so many cards.
    pub(super) fn begin(&self, cards: usize) {
        self.answers.send_replace(Answers { open: cards, warnings: Vec::new() });
    }

    /// It has answered to one; Err: pod, card and reason.
    pub(super) fn answered(&self, answer: Result<(), (String, String, String)>) {
        self.answers.send_modify(|answers| {
            answers.open = answers.open.saturating_sub(1);
            answers.warnings.extend(answer.err().map(|(pod, card, reason)| {
                format!(
                    "{card} of pod {pod} was to have this host's addresses, and the guest did not take them: {reason}; it \
                     may still have its former ones: move it again with --network rebind, or restart the pod"
                )
            }));
        });
    }

    /// Waits for the answers; gives what came to nothing, with what to do about it. Repeats give the same.
    pub(crate) async fn answers(&self) -> Vec<String> {
        let mut heard = self.answers.subscribe();
        let late = tokio::time::timeout(PATIENCE, heard.wait_for(|answers| answers.open == 0)).await.is_err();
        let answers = self.answers.borrow();
        let mut warnings = answers.warnings.clone();
        if late && answers.open > 0 {
            warnings.push(format!(
                "{} network cards were to have this host's addresses, and the guest has not answered within {} s: if it \
                 cannot be reached at them soon, move it again with --network rebind, or restart the pod",
                answers.open,
                PATIENCE.as_secs()
            ));
        }
        warnings
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[tokio::test(start_paused = true)]
    async fn the_answers_are_waited_for_and_a_refusal_is_told_with_what_to_do() {
        let rebinding = Arc::new(Rebinding::default());
        assert_eq!(rebinding.answers().await, [""; 0], "nothing was asked");
        rebinding.begin(2);
        let guest = Arc::clone(&rebinding);
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_secs(3)).await;
            guest.answered(Ok(()));
            tokio::time::sleep(Duration::from_secs(3)).await;
            guest.answered(Err(("web".into(), "eth0".into(), "no such card".into())));
        });
        let began = tokio::time::Instant::now();
        let warnings = rebinding.answers().await;
        assert_eq!(began.elapsed().as_secs(), 6);
        let [warning] = warnings.as_slice() else { panic!("{warnings:?}") };
        for word in ["eth0", "web", "no such card", "--network rebind"] {
            assert!(warning.contains(word), "{word}: {warning}");
        }
        assert_eq!(rebinding.answers().await, warnings, "told again");
    }

    #[tokio::test(start_paused = true)]
    async fn a_guest_that_says_nothing_is_not_waited_for_for_ever() {
        let rebinding = Rebinding::default();
        rebinding.begin(1);
        let began = tokio::time::Instant::now();
        let warnings = rebinding.answers().await;
        assert_eq!(began.elapsed(), PATIENCE);
        assert!(warnings[0].contains("30 s") && warnings[0].contains("--network rebind"), "{warnings:?}");
        rebinding.answered(Ok(()));
        assert_eq!(rebinding.answers().await, [""; 0]);
    }
}
