//! The two directions of a relay: the bridge's streams over the guest's dialler.

use std::time::Duration;

use dunlin_bridge::stdio::{self, Dial, Drained, Resume, Sender, plain};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::Carriage;
use super::dialer::{BoxedStream, Dialer};
use super::tap::{ReadNow, Tap};

/// Pause between attempts to reach a host that knows no resuming.
const REDIAL: Duration = Duration::from_millis(100);

/// Carries a process's output to a port on the host. Ends when all is delivered, or on `stop`.
/// Without a port the output is read and forgotten, so that the process does not block.
pub(super) fn output<R>(
    mut reader: Tap<R>,
    port: Option<u32>,
    carriage: Carriage,
    dialer: Dialer,
    mut stop: watch::Receiver<bool>,
) -> JoinHandle<()>
where
    R: AsyncRead + ReadNow + Send + Unpin + 'static,
{
    tokio::spawn(async move {
        let Some(port) = port else {
            forget(&mut reader).await;
            return;
        };
        if carriage == Carriage::Resumable {
            let dial = Dial(|| dialer.dial(port));
            let drained = stdio::send(&Sender::default(), &mut reader, dial, stopped(&mut stop)).await;
            if let Drained::Stopped { pending, .. } = drained {
                tracing::info!(port, pending, "output is given up: the container was told to end");
            }
        } else {
            tokio::select! {
                sent = plain_output(&mut reader, port, carriage, &dialer) => {
                    if let Err(error) = sent {
                        tracing::info!(port, %error, "output is given up: the host cannot resume");
                    }
                }
                () = stopped(&mut stop) => {}
            }
        }
        // Whoever writes may go on writing, and is not to be held up.
        forget(&mut reader).await;
    })
}

/// Carries input from a port on the host to a process, and ends it where the host ends it.
pub(super) fn input<W>(
    writer: W,
    port: u32,
    carriage: Carriage,
    dialer: Dialer,
    mut stop: watch::Receiver<bool>,
) -> JoinHandle<()>
where
    W: AsyncWrite + Send + Unpin + 'static,
{
    tokio::spawn(async move {
        let carry = async {
            if carriage == Carriage::Resumable {
                let dial = Dial(|| dialer.dial(port));
                // The writer is dropped at the end, which is what ends the process's input.
                // A host that missed the last acknowledgement keeps the bytes until the process ends: nobody
                // waits for them, so there is no reason to dial it again.
                if let Err(error) = stdio::receive(dial, writer, &Resume::at(0)).await {
                    tracing::debug!(port, %error, "input ends");
                }
            } else {
                let _ = plain::receive(dial(port, &dialer).await, writer).await;
            }
        };
        tokio::select! {
            () = carry => {}
            () = stopped(&mut stop) => {}
        }
    })
}

/// Ends when told to stop; never when nobody can tell any more.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    if stop.wait_for(|stop| *stop).await.is_err() {
        std::future::pending::<()>().await;
    }
}

async fn plain_output<R: AsyncRead + Unpin>(
    reader: R,
    port: u32,
    carriage: Carriage,
    dialer: &Dialer,
) -> std::io::Result<u64> {
    match carriage {
        Carriage::Replaying => plain::send_replaying(reader, Dial(|| dialer.dial(port))).await,
        Carriage::Resumable | Carriage::Once => plain::send(reader, dial(port, dialer).await).await,
    }
}

async fn forget<R: AsyncRead + Unpin>(reader: &mut R) {
    let _ = tokio::io::copy(reader, &mut tokio::io::sink()).await;
}

async fn dial(port: u32, dialer: &Dialer) -> BoxedStream {
    loop {
        match dialer.dial(port).await {
            Ok(stream) => return stream,
            Err(_) => tokio::time::sleep(REDIAL).await,
        }
    }
}
