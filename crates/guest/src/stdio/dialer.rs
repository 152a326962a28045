//! How a relay reaches the host, without knowing what carries it.

use std::io;
use std::pin::Pin;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};

/// A duplex byte stream.
pub trait Stream: AsyncRead + AsyncWrite + Send {}
impl<T: AsyncRead + AsyncWrite + Send> Stream for T {}

/// A stream of any kind.
pub type BoxedStream = Pin<Box<dyn Stream>>;
type Dialing = Pin<Box<dyn Future<Output = io::Result<BoxedStream>> + Send>>;

/// Opens streams to ports on the host; clones share it.
#[derive(Clone)]
pub struct Dialer {
    dial: Arc<dyn Fn(u32) -> Dialing + Send + Sync>,
}

impl Dialer {
    /// Wraps whatever can dial a port.
    pub fn new<F, T, S>(dial: F) -> Dialer
    where
        F: Fn(u32) -> T + Send + Sync + 'static,
        T: Future<Output = io::Result<S>> + Send + 'static,
        S: Stream + 'static,
    {
        Dialer {
            dial: Arc::new(move |port| {
                let dialing = dial(port);
                Box::pin(async move { dialing.await.map(|stream| Box::pin(stream) as BoxedStream) })
            }),
        }
    }

    /// Opens one stream; fails at once when the host does not listen or is away.
    pub async fn dial(&self, port: u32) -> io::Result<BoxedStream> {
        (self.dial)(port).await
    }
}
