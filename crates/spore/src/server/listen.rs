//! The API's two doors: a unix socket for root and the invoking user, TCP for holders of the token.
//!
//! Called by the daemon. Accepts, says who called, hands the connection to the router; decides
//! nothing about what a caller may do.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// The most API connections at once; more wait to be accepted.
const CONNECTIONS_MAX: usize = 512;

/// How long a caller may take to send a request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the listener rests after accept(2) failed, as when descriptors ran out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Something that connections come from.
pub(crate) trait Accept: Send + 'static {
    /// What a connection is.
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// The next connection.
    fn next(&self) -> impl Future<Output = std::io::Result<Self::Stream>> + Send;
}

impl Accept for TcpListener {
    type Stream = TcpStream;

    async fn next(&self) -> std::io::Result<TcpStream> {
        let (stream, _peer) = self.accept().await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}

impl Accept for UnixListener {
    type Stream = UnixStream;

    async fn next(&self) -> std::io::Result<UnixStream> {
        Ok(self.accept().await?.0)
    }
}

/// Serves `router` on `listener` until `stop`; `caller` tells who a connection is, and its answer
/// becomes an extension of each request. `None` closes the connection.
pub(crate) async fn serve<L, C, F>(listener: L, router: Router, caller: F, stop: CancellationToken)
where
    L: Accept,
    C: Clone + Send + Sync + 'static,
    F: Fn(&L::Stream) -> Option<C> + Send,
{
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let connections = TaskTracker::new();
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else {
            break;
        };
        let stream = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.next() => accepted,
        };
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept an API connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Some(caller) = caller(&stream) else {
            continue;
        };
        let router = router.clone().layer(axum::Extension(caller));
        let stop = stop.clone();
        connections.spawn(async move {
            serve_connection(stream, router, stop).await;
            drop(permit);
        });
    }
    connections.close();
    connections.wait().await;
}

async fn serve_connection<S>(stream: S, router: Router, stop: CancellationToken)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT);
    let connection = builder
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
        .with_upgrades();
    let mut connection = std::pin::pin!(connection);
    let served = tokio::select! {
        served = connection.as_mut() => served,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            // A request under way may end; a stream that never would is cut with the daemon.
            match tokio::time::timeout(Duration::from_secs(2), connection).await {
                Ok(served) => served,
                Err(_elapsed) => return,
            }
        }
    };
    if let Err(error) = served {
        tracing::debug!(%error, "an API connection ended early");
    }
}

/// Binds the API's unix socket, replacing what a dead daemon left.
///
/// # Errors
/// When the path cannot be bound.
pub(crate) fn bind_unix(path: &Path) -> Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot replace {}", path.display()));
        }
        _gone => {}
    }
    let listener =
        UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
    // Anybody may connect; who is admitted is decided by the peer's credentials.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666))
        .with_context(|| format!("cannot open {} to callers", path.display()))?;
    Ok(listener)
}

/// Binds a TCP address.
///
/// # Errors
/// When it is taken or not ours; the message says what to do.
pub(crate) async fn bind_tcp(address: std::net::SocketAddr, key: &str) -> Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| {
        format!(
            "cannot listen on {address}: if another program has this port, stop it or set `{key}` \
             to another one in the configuration"
        )
    })
}
