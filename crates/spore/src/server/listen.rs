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
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_io_timeout::TimeoutStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::{Layer as _, ServiceExt as _};
use tower_http::timeout::RequestBodyTimeoutLayer;

use super::linger::Lingering;

/// What bounds what callers can hold of one door.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Connections at once; more wait to be accepted.
    pub(crate) connections_max: usize,
    /// How long a caller may take to send a request's head, and how long a connection may be
    /// silent between requests.
    pub(crate) head_timeout: Duration,
    /// How long a caller may send nothing of a body that is waited for.
    pub(crate) body_stall_timeout: Duration,
    /// How long a caller may take nothing of what is sent to it. Generous: somebody may look at a
    /// page of a followed log for a while before the terminal goes on.
    pub(crate) answer_stall_timeout: Duration,
    /// How long what is still sent of a body is taken after its request was answered without it.
    /// A connection that is closed under a sender may cost the sender the answer (RFC 9112, 9.6).
    pub(crate) linger_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections_max: 512,
            head_timeout: Duration::from_secs(10),
            body_stall_timeout: Duration::from_secs(60),
            answer_stall_timeout: Duration::from_secs(600),
            linger_timeout: Duration::from_secs(5),
        }
    }
}

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
pub(crate) async fn serve<L, C, F>(
    listener: L,
    limits: Limits,
    router: Router,
    caller: F,
    stop: CancellationToken,
) where
    L: Accept,
    C: Clone + Send + Sync + 'static,
    F: Fn(&L::Stream) -> Option<C> + Send,
{
    let room = Arc::new(Semaphore::new(limits.connections_max));
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
            serve_connection(stream, limits, router, stop).await;
            drop(permit);
        });
    }
    connections.close();
    connections.wait().await;
}

async fn serve_connection<S>(stream: S, limits: Limits, router: Router, stop: CancellationToken)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(limits.answer_stall_timeout));
    let service = RequestBodyTimeoutLayer::new(limits.body_stall_timeout).layer(router);
    let service = service.map_request(move |request: hyper::Request<Incoming>| {
        request.map(|body| Lingering::new(body, limits.linger_timeout))
    });
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head_timeout);
    let connection = builder
        .serve_connection(
            TokioIo::new(Box::pin(stream)),
            TowerToHyperService::new(service),
        )
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

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use axum::body::{Body, Bytes};
    use axum::http::StatusCode;
    use axum::routing::{get, post};
    use futures_util::{StreamExt as _, stream};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
    use tokio::sync::mpsc;
    use tokio::time::{Instant, timeout};

    use super::*;

    /// A door to which connections come from memory.
    struct Door(tokio::sync::Mutex<mpsc::UnboundedReceiver<DuplexStream>>);

    impl Accept for Door {
        type Stream = DuplexStream;

        async fn next(&self) -> std::io::Result<DuplexStream> {
            let next = self.0.lock().await.recv().await;
            next.ok_or_else(|| std::io::ErrorKind::NotConnected.into())
        }
    }

    const LIMITS: Limits = Limits {
        connections_max: 2,
        head_timeout: Duration::from_secs(5),
        body_stall_timeout: Duration::from_secs(20),
        answer_stall_timeout: Duration::from_secs(40),
        linger_timeout: Duration::from_secs(3),
    };

    /// Ways to the door. `ends` tells when each endless answer was given up.
    struct Street {
        door: mpsc::UnboundedSender<DuplexStream>,
        ends: Arc<Mutex<Vec<Instant>>>,
    }

    struct Ended(Arc<Mutex<Vec<Instant>>>);

    impl Drop for Ended {
        fn drop(&mut self) {
            self.0.lock().unwrap().push(Instant::now());
        }
    }

    impl Street {
        fn new() -> Self {
            let (door, comers) = mpsc::unbounded_channel();
            let ends = Arc::new(Mutex::default());
            let ended = Arc::clone(&ends);
            let endless = move || {
                let ended = Ended(Arc::clone(&ended));
                let piece = Bytes::from_static(&[b'x'; 1024]);
                let pieces = stream::repeat_with(move || {
                    let _held = &ended;
                    Ok::<_, std::io::Error>(piece.clone())
                });
                async { Body::from_stream(pieces) }
            };
            let router = Router::new()
                .route(
                    "/length",
                    post(|body: Bytes| async move { body.len().to_string() }),
                )
                .route("/endless", get(endless))
                .route(
                    "/refuse",
                    post(|body: Body| async move {
                        let _some = body.into_data_stream().next().await;
                        (StatusCode::INSUFFICIENT_STORAGE, "full")
                    }),
                );
            let door_end = Door(tokio::sync::Mutex::new(comers));
            let stop = CancellationToken::new();
            tokio::spawn(serve(door_end, LIMITS, router, |_| Some(()), stop));
            Self { door, ends }
        }

        fn connect(&self) -> DuplexStream {
            let (ours, theirs) = tokio::io::duplex(4096);
            self.door.send(theirs).unwrap();
            ours
        }
    }

    async fn until_closed(stream: &mut DuplexStream) -> String {
        let mut text = Vec::new();
        let closed = timeout(Duration::from_secs(3600), stream.read_to_end(&mut text)).await;
        closed.expect("it is never let go").unwrap();
        String::from_utf8(text).unwrap()
    }

    const UPLOAD: &[u8] = b"POST /length HTTP/1.1\r\nhost: x\r\ncontent-length: 30\r\n\r\n";

    #[tokio::test(start_paused = true)]
    async fn a_caller_that_sends_no_head_is_let_go() {
        let street = Street::new();
        let mut caller = street.connect();
        caller.write_all(b"POST /len").await.unwrap();
        let began = Instant::now();
        until_closed(&mut caller).await;
        assert_eq!(began.elapsed().as_secs(), LIMITS.head_timeout.as_secs());
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_may_be_slow_and_may_not_stop() {
        let street = Street::new();
        let mut slow = street.connect();
        slow.write_all(UPLOAD).await.unwrap();
        for _piece in 0..3 {
            tokio::time::sleep(LIMITS.body_stall_timeout - Duration::from_secs(1)).await;
            slow.write_all(b"0123456789").await.unwrap();
        }
        let text = until_closed(&mut slow).await;
        assert!(
            text.starts_with("HTTP/1.1 200") && text.ends_with("30"),
            "{text}"
        );

        let mut stopped = street.connect();
        stopped.write_all(UPLOAD).await.unwrap();
        stopped.write_all(b"0123").await.unwrap();
        let began = Instant::now();
        let text = until_closed(&mut stopped).await;
        assert!(!text.starts_with("HTTP/1.1 200"), "{text}");
        let until_closed = LIMITS.body_stall_timeout + LIMITS.linger_timeout;
        assert_eq!(began.elapsed().as_secs(), until_closed.as_secs());
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_may_be_taken_slowly_and_must_be_taken() {
        let street = Street::new();
        let mut caller = street.connect();
        let ask = b"GET /endless HTTP/1.1\r\nhost: x\r\n\r\n";
        caller.write_all(ask).await.unwrap();
        for _piece in 0..5 {
            tokio::time::sleep(LIMITS.answer_stall_timeout - Duration::from_secs(1)).await;
            caller.read_exact(&mut [0; 4096]).await.unwrap();
        }
        assert!(street.ends.lock().unwrap().is_empty());
        let stopped = Instant::now();
        tokio::time::sleep(LIMITS.answer_stall_timeout * 2).await;
        let ended = street.ends.lock().unwrap()[0] - stopped;
        assert_eq!(ended.as_secs(), LIMITS.answer_stall_timeout.as_secs());
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_reaches_a_caller_that_is_still_sending() {
        let street = Street::new();
        let mut caller = street.connect();
        let head = "POST /refuse HTTP/1.1\r\nhost: x\r\ncontent-length: 1048576\r\n\r\n";
        caller.write_all(head.as_bytes()).await.unwrap();
        let sent = caller.write_all(&[b'x'; 1024 * 1024]).await;
        sent.expect("the door was shut before all was sent");
        let mut text = [0; 16];
        caller.read_exact(&mut text).await.unwrap();
        assert!(text.starts_with(b"HTTP/1.1 507"), "{text:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_refused_caller_that_never_ends_is_let_go() {
        let street = Street::new();
        let mut caller = street.connect();
        let head = "POST /refuse HTTP/1.1\r\nhost: x\r\ncontent-length: 104857600\r\n\r\n";
        caller.write_all(head.as_bytes()).await.unwrap();
        let began = Instant::now();
        while caller.write_all(b"a little").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(100)).await;
            assert!(
                began.elapsed() < LIMITS.body_stall_timeout,
                "it is never let go"
            );
        }
        assert!(began.elapsed() >= LIMITS.linger_timeout);
    }

    #[tokio::test(start_paused = true)]
    async fn more_callers_than_there_is_room_for_wait() {
        let street = Street::new();
        let held = [street.connect(), street.connect()];
        let mut third = street.connect();
        third.write_all(UPLOAD).await.unwrap();
        third.write_all(&[b'x'; 30]).await.unwrap();
        let moment = LIMITS.head_timeout / 2;
        let early = timeout(moment, third.read_u8()).await;
        assert!(early.is_err(), "it was served while there was no room");
        drop(held);
        let text = until_closed(&mut third).await;
        assert!(text.starts_with("HTTP/1.1 200"), "{text}");
    }
}
