//! Connections to one VM of an app: made for it, kept for it, dead with it.
//!
//! Called by `forward.rs` (take, put) and `wake/mod.rs` (retire, cut). An [`Incarnation`] owns its
//! connections, so none can be found under another's name; nothing here knows an address.
//!
//! A connection is driven by the task that uses it, not by a task of its own: one request is one
//! chain of polls in the client's task. Only a connection whose answer began before the request's
//! body was read gets a task, since then both directions must move independently.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Poll, Waker};

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use spore_wire::id::VmId;
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::body::RequestBody;
use crate::limits::{BUFFER_BYTES_MAX, Limits};
use crate::lock;
use crate::socket::{Socket, SocketHandle};

/// One VM and what leads to it.
#[derive(Debug)]
pub(crate) struct Incarnation {
    vm: VmId,
    idle: Mutex<Vec<Upstream>>,
    sockets: Mutex<HashMap<u64, SocketHandle>>,
    next_socket: AtomicU64,
    retired: AtomicBool,
    /// The first refusal since the app accepted a connection.
    refused_since: Mutex<Option<Instant>>,
    gone: CancellationToken,
}

/// hyper's connection future, which hands over its stream when the protocol changes; its type has
/// no public name.
type Driver = Pin<Box<dyn Future<Output = hyper::Result<()>> + Send>>;

/// One HTTP connection to an app.
pub(crate) struct Upstream {
    send: SendRequest<RequestBody>,
    /// `None` once the connection is over.
    driver: Option<Driver>,
    incarnation: Weak<Incarnation>,
    socket: u64,
    handle: SocketHandle,
    idle_since: Option<Instant>,
}

/// Why a request got no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExchangeError {
    /// The connection was closed before a byte of the request was written; here it is.
    #[error("the connection closed before the request was sent")]
    Unsent(Box<Request<RequestBody>>),
    /// It was closed, or broke the protocol, after that.
    #[error("the connection failed after the request was sent")]
    Sent(#[source] hyper::Error),
}

impl Incarnation {
    pub(crate) fn new(vm: VmId) -> Self {
        Self {
            vm,
            idle: Mutex::new(Vec::new()),
            sockets: Mutex::new(HashMap::new()),
            next_socket: AtomicU64::new(0),
            retired: AtomicBool::new(false),
            refused_since: Mutex::new(None),
            gone: CancellationToken::new(),
        }
    }

    pub(crate) const fn vm(&self) -> VmId {
        self.vm
    }

    pub(crate) fn is_gone(&self) -> bool {
        self.gone.is_cancelled()
    }

    /// Ends when the VM is gone.
    pub(crate) async fn gone(&self) {
        self.gone.cancelled().await;
    }

    /// Keeps no idle connections from now on.
    pub(crate) fn retire(&self) {
        self.retired.store(true, Ordering::Release);
        let idle = std::mem::take(&mut *lock(&self.idle));
        drop(idle);
    }

    /// Whether it serves no longer, or not for now.
    pub(crate) fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Acquire)
    }

    /// A connection was refused; gives since when all were.
    pub(crate) fn refused(&self) -> Instant {
        *lock(&self.refused_since).get_or_insert_with(Instant::now)
    }

    /// Admits again after the daemon changed its mind about a reap.
    pub(crate) fn reopen(&self) {
        self.retired.store(false, Ordering::Release);
    }

    /// Ends every connection, whoever uses it.
    pub(crate) fn cut(&self) {
        self.gone.cancel();
        self.retire();
        let sockets = std::mem::take(&mut *lock(&self.sockets));
        for socket in sockets.into_values() {
            socket.cut();
        }
    }

    /// An idle connection that is still open, the most recently used first.
    pub(crate) fn take(&self) -> Option<Upstream> {
        loop {
            let mut upstream = lock(&self.idle).pop()?;
            if upstream.is_usable() {
                return Some(upstream);
            }
        }
    }

    /// Keeps a connection for the next request, when it can serve one.
    pub(crate) fn put(&self, mut upstream: Upstream, limits: &Limits) {
        if self.is_retired() || !upstream.is_usable() {
            return;
        }
        upstream.idle_since = Some(Instant::now());
        let mut idle = lock(&self.idle);
        // Looked at again under the lock, since `retire` empties the list under it.
        if idle.len() < limits.idle_connections_max && !self.is_retired() {
            idle.push(upstream);
        } else {
            drop(idle);
            drop(upstream);
        }
    }

    /// Drops idle connections that are too old or that the app closed.
    pub(crate) fn sweep(&self, limits: &Limits) {
        let now = Instant::now();
        let mut dead = Vec::new();
        {
            let mut idle = lock(&self.idle);
            let mut index = 0;
            while index < idle.len() {
                let upstream = &mut idle[index];
                let young = upstream
                    .idle_since
                    .is_some_and(|since| now - since < limits.idle_connection_age_max);
                if young && upstream.is_usable() {
                    index += 1;
                } else {
                    dead.push(idle.remove(index));
                }
            }
        }
        drop(dead);
    }

    /// Speaks HTTP on a fresh connection. `None` when the VM is gone meanwhile.
    pub(crate) async fn adopt(
        self: &Arc<Self>,
        stream: TcpStream,
    ) -> Option<Result<Upstream, hyper::Error>> {
        *lock(&self.refused_since) = None;
        let socket = Socket::new(stream);
        let id = self.next_socket.fetch_add(1, Ordering::Relaxed);
        let handle = socket.handle();
        lock(&self.sockets).insert(id, handle.clone());
        let registration = Registration {
            incarnation: Arc::downgrade(self),
            socket: id,
        };
        // Asked after the registration: `cut` either finds the socket or is seen here.
        if self.is_gone() {
            return None;
        }
        let mut builder = http1::Builder::new();
        builder.max_buf_size(BUFFER_BYTES_MAX);
        let handshake = builder.handshake::<_, RequestBody>(TokioIo::new(socket));
        let (send, driver) = match handshake.await {
            Ok(parts) => parts,
            Err(error) => return Some(Err(error)),
        };
        std::mem::forget(registration);
        Some(Ok(Upstream {
            send,
            driver: Some(Box::pin(driver.with_upgrades())),
            incarnation: Arc::downgrade(self),
            socket: id,
            handle,
            idle_since: None,
        }))
    }
}

/// Takes a socket out of the list of those to cut.
struct Registration {
    incarnation: Weak<Incarnation>,
    socket: u64,
}

impl Drop for Registration {
    fn drop(&mut self) {
        if let Some(incarnation) = self.incarnation.upgrade() {
            drop(lock(&incarnation.sockets).remove(&self.socket));
        }
    }
}

impl Upstream {
    /// Moves the connection on. True while it is open.
    fn drive(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(driver) = &mut self.driver else {
            return false;
        };
        if driver.as_mut().poll(cx).is_ready() {
            self.driver = None;
            return false;
        }
        true
    }

    /// The socket below, to be watched.
    pub(crate) fn socket(&self) -> SocketHandle {
        self.handle.clone()
    }

    /// Whether the app has not closed it and the last exchange is over.
    fn is_usable(&mut self) -> bool {
        let mut cx = Context::from_waker(Waker::noop());
        self.drive(&mut cx) && self.send.is_ready()
    }

    /// Sends one request and waits for the head of its answer.
    pub(crate) async fn exchange(
        &mut self,
        request: Request<RequestBody>,
    ) -> Result<Response<Incoming>, ExchangeError> {
        let mut answer = std::pin::pin!(self.send.try_send_request(request));
        let driver = &mut self.driver;
        let result = std::future::poll_fn(|cx| {
            if let Some(connection) = driver
                && connection.as_mut().poll(cx).is_ready()
            {
                *driver = None;
            }
            // Only the driver can complete the answer, and it was just polled in this very task:
            // a wake-up would merely poll both once more.
            let mut quiet = Context::from_waker(Waker::noop());
            answer.as_mut().poll(&mut quiet)
        })
        .await;
        result.map_err(|mut failed| match failed.take_message() {
            Some(request) => ExchangeError::Unsent(Box::new(request)),
            None => ExchangeError::Sent(failed.into_error()),
        })
    }

    /// The next piece of an answer's body, moving the connection on as needed.
    pub(crate) fn poll_body(
        &mut self,
        cx: &mut Context<'_>,
        body: &mut Incoming,
    ) -> Poll<Option<Result<http_body::Frame<bytes::Bytes>, hyper::Error>>> {
        use http_body::Body as _;
        let mut quiet = Context::from_waker(Waker::noop());
        if let Poll::Ready(frame) = Pin::new(&mut *body).poll_frame(&mut quiet) {
            return Poll::Ready(frame);
        }
        if self.drive(cx) {
            Pin::new(body).poll_frame(&mut quiet)
        } else {
            Pin::new(body).poll_frame(cx)
        }
    }

    /// Gives the connection a task of its own, until the exchange is over.
    pub(crate) fn detach(mut self) -> Detached {
        let task = tokio::spawn(std::future::poll_fn(move |cx| {
            if self.drive(cx) {
                Poll::Pending
            } else {
                Poll::Ready(())
            }
        }));
        Detached(task.abort_handle())
    }
}

/// A connection with a task of its own; it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Detached(tokio::task::AbortHandle);

impl Drop for Detached {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        drop(Registration {
            incarnation: self.incarnation.clone(),
            socket: self.socket,
        });
    }
}

impl std::fmt::Debug for Upstream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Upstream")
            .field("socket", &self.socket)
            .field("open", &self.driver.is_some())
            .finish_non_exhaustive()
    }
}
