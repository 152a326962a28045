//! ttrpc in, status out. Requests are translated and handed to the sandbox; nothing is decided here.

pub(crate) mod events;
pub(crate) mod migration;
pub(crate) mod sandbox;
pub(crate) mod status;
pub(crate) mod task;

/// Runs `work` to its end even when its caller's time is up or the connection is gone: ttrpc drops a handler then, and
/// what is half created, started or deleted would stay so.
async fn uncut<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    match tokio::spawn(work).await {
        Ok(done) => done,
        Err(ended) if ended.is_panic() => std::panic::resume_unwind(ended.into_panic()),
        // Only with the runtime, and then nobody waits for an answer.
        Err(_) => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test(start_paused = true)]
    async fn work_goes_on_when_its_caller_leaves() {
        let (done, wait) = tokio::sync::oneshot::channel();
        let work = uncut(async move {
            tokio::time::sleep(Duration::from_secs(5)).await;
            let _ = done.send(());
        });
        tokio::time::timeout(Duration::from_secs(1), work).await.unwrap_err();
        wait.await.expect("done all the same");
    }
}
