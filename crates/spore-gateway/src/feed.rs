//! The daemon's link: routes, wakes, connections and reaps come and go here.
//!
//! `lib.rs` runs [`serve`]; everybody else speaks through [`Feed`], which keeps what must survive a
//! daemon: connections that requests still wait for are asked for again in the next session.
//! Never blocks a request on the daemon: what is said is queued.
//!
//! # A session
//!
//! ```text
//!   accept ──▶ Hello received ──▶ Hello sent, wakes and connects asked for again ──▶ served
//!     ▲              │ another first word, or a generation that is not served           │
//!     └──────────────┴───────────── closed, or replaced by a newer connection ◀─────────┘
//! ```

use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use spore_wire::gateway::{Activity, AppKey, FromGateway, PACKET_BYTES_MAX, ToGateway};
use spore_wire::generation::{GENERATION, is_served};
use spore_wire::id::VmId;
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Duration, Instant};

use crate::Gateway;
use crate::counts::Counters;
use crate::limits::{ACCEPT_PAUSE, ACTIVITY_PACE, COUNTS_PACE, FEED_QUEUE_MAX, FEED_STALL_TIMEOUT};
use crate::lock;
use crate::packet::{PacketError, PacketSocket};
use crate::socket::tune;
use crate::wake::{App, ReapMode};

/// What is to be said to the daemon, and what is waited for from it.
#[derive(Debug)]
pub(crate) struct Feed {
    epoch: Instant,
    inner: Mutex<Inner>,
    changed: Mutex<Vec<Arc<App>>>,
    change: Notify,
    counters: Counters,
}

#[derive(Debug, Default)]
struct Inner {
    session: Option<Session>,
    /// Apps whose wake the daemon of this session was asked for and has not answered.
    asked: HashSet<AppKey>,
    next_connect: u64,
    connects: HashMap<u64, PendingConnect>,
}

#[derive(Clone, Debug)]
struct Session {
    queue: mpsc::UnboundedSender<FromGateway>,
    queued: Arc<AtomicUsize>,
}

/// A session's reading end of the queue.
#[derive(Debug)]
struct Beginning {
    queue: mpsc::UnboundedReceiver<FromGateway>,
    queued: Arc<AtomicUsize>,
    /// Connections with a smaller id were not asked for in this session.
    connects_before: u64,
}

#[derive(Debug)]
struct PendingConnect {
    vm: VmId,
    sender: oneshot::Sender<Result<TcpStream, ConnectError>>,
}

/// Why there is no connection to a VM.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    /// The daemon tried and failed.
    #[error("the app does not accept connections: {0}")]
    Failed(String),
    /// The daemon passed something that is no stream.
    #[error("the daemon passed an unusable socket")]
    Unusable(#[source] std::io::Error),
    /// The VM is gone.
    #[error("the VM is gone")]
    Gone,
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error(transparent)]
    Packet(#[from] PacketError),
    #[error("the daemon did not begin with a hello")]
    NoHello,
    #[error("the daemon speaks generation {0}, this gateway {GENERATION}; start a new gateway")]
    Generation(u32),
    #[error("the daemon does not read what it is told")]
    Deaf,
}

impl Feed {
    pub(crate) fn new() -> Self {
        Self {
            epoch: Instant::now(),
            inner: Mutex::new(Inner::default()),
            changed: Mutex::new(Vec::new()),
            change: Notify::new(),
            counters: Counters::default(),
        }
    }

    pub(crate) const fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Milliseconds since the gateway began.
    pub(crate) fn now_ms(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Queues a message. Without a session it is dropped: a new one begins with all that counts.
    pub(crate) fn send(&self, message: FromGateway) {
        lock(&self.inner).send(message);
    }

    /// Puts an app on the list of those whose activity changed.
    pub(crate) fn list_changed(&self, app: Arc<App>) {
        lock(&self.changed).push(app);
        self.change.notify_one();
    }

    /// A new connection to a VM. Waits through sessions; the caller sets the deadline.
    pub(crate) async fn connect(&self, vm: VmId) -> Result<TcpStream, ConnectError> {
        let (sender, receiver) = oneshot::channel();
        let id = {
            let mut inner = lock(&self.inner);
            let id = inner.next_connect;
            inner.next_connect += 1;
            inner.connects.insert(id, PendingConnect { vm, sender });
            inner.send(FromGateway::Connect { id, vm });
            id
        };
        let pending = Pending { feed: self, id };
        let result = receiver.await.unwrap_or(Err(ConnectError::Gone));
        drop(pending);
        result
    }

    fn connected(&self, id: u64, fd: Option<OwnedFd>, dead_peer_timeout: Duration) {
        let Some(pending) = lock(&self.inner).connects.remove(&id) else {
            return;
        };
        let stream = fd
            .ok_or_else(|| std::io::Error::other("no descriptor came with it"))
            .and_then(|fd| stream_of(fd, dead_peer_timeout));
        // Whoever asked may have left; the socket closes then.
        drop(pending.sender.send(stream.map_err(ConnectError::Unusable)));
    }

    fn connect_gone(&self, id: u64) {
        if let Some(pending) = lock(&self.inner).connects.remove(&id) {
            // An error means that the request has gone too.
            drop(pending.sender.send(Err(ConnectError::Gone)));
        }
    }

    fn connect_failed(&self, id: u64, reason: String) {
        let pending = lock(&self.inner).connects.remove(&id);
        if let Some(pending) = pending {
            drop(pending.sender.send(Err(ConnectError::Failed(reason))));
        }
    }

    fn connects_gone(&self, vm: VmId) {
        let gone: Vec<_> = {
            let mut inner = lock(&self.inner);
            inner
                .connects
                .extract_if(|_, pending| pending.vm == vm)
                .collect()
        };
        for (_, pending) in gone {
            drop(pending.sender.send(Err(ConnectError::Gone)));
        }
    }

    /// A wake of this app is no longer waited for: the next one is said again.
    pub(crate) fn settle_wake(&self, app: &AppKey) {
        lock(&self.inner).asked.remove(app);
    }

    /// Begins a session: everything said from now on goes to it.
    fn begin(&self) -> Beginning {
        let (queue, receiver) = mpsc::unbounded_channel();
        let queued = Arc::default();
        let mut inner = lock(&self.inner);
        inner.session = Some(Session {
            queue,
            queued: Arc::clone(&queued),
        });
        inner.asked.clear();
        Beginning {
            queue: receiver,
            queued,
            connects_before: inner.next_connect,
        }
    }

    /// Asks again for every connection that somebody waits for and that was asked for before.
    fn repeat_connects(&self, before: u64) {
        let mut inner = lock(&self.inner);
        let pending = inner.connects.iter();
        let again: Vec<_> = pending
            .filter(|(id, _)| **id < before)
            .map(|(id, pending)| (*id, pending.vm))
            .collect();
        for (id, vm) in again {
            inner.push(FromGateway::Connect { id, vm });
        }
    }

    fn end(&self) {
        lock(&self.inner).session = None;
    }
}

impl Inner {
    fn send(&mut self, message: FromGateway) {
        if self.session.is_none() {
            return;
        }
        if let FromGateway::Wake { app, .. } = &message
            && !self.asked.insert(app.clone())
        {
            return;
        }
        self.push(message);
    }

    fn push(&mut self, message: FromGateway) {
        let Some(session) = &self.session else {
            return;
        };
        if session.queued.fetch_add(1, Ordering::Relaxed) >= FEED_QUEUE_MAX {
            // The writer finds its queue closed and ends the session.
            self.session = None;
            return;
        }
        // A session whose end is not noticed yet loses it, as it would on its way.
        drop(session.queue.send(message));
    }
}

/// Forgets a connection that nobody waits for any more.
struct Pending<'a> {
    feed: &'a Feed,
    id: u64,
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        let pending = lock(&self.feed.inner).connects.remove(&self.id);
        drop(pending);
    }
}

fn stream_of(fd: OwnedFd, dead_peer_timeout: Duration) -> std::io::Result<TcpStream> {
    if rustix::net::sockopt::socket_type(&fd)? != rustix::net::SocketType::STREAM {
        return Err(std::io::Error::other("not a stream socket"));
    }
    let stream = std::net::TcpStream::from(fd);
    stream.set_nonblocking(true)?;
    let stream = TcpStream::from_std(stream)?;
    tune(&stream, dead_peer_timeout)?;
    Ok(stream)
}

/// Accepts daemons until cancelled; the newest one has the session.
pub(crate) async fn serve(gateway: Arc<Gateway>, listener: UnixListener) {
    let mut current: Option<JoinHandle<()>> = None;
    loop {
        let daemon = match accept(&listener).await {
            Ok(Some(daemon)) => daemon,
            Ok(None) => continue,
            Err(error) => {
                // Out of descriptors, most likely: they come back when connections end.
                tracing::warn!(%error, "could not accept a daemon");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        if let Some(replaced) = current.take() {
            replaced.abort();
            // Its last step must be over before the next session begins.
            drop(replaced.await);
        }
        let gateway = Arc::clone(&gateway);
        current = Some(tokio::spawn(async move {
            let result = session(&gateway, PacketSocket::accepted(daemon)).await;
            gateway.feed.end();
            match result {
                Ok(()) => {}
                Err(SessionError::Packet(PacketError::Closed)) => {
                    tracing::info!("the daemon left; what is warm goes on");
                }
                Err(error) => {
                    let error: &dyn std::error::Error = &error;
                    tracing::warn!(error, "the daemon's session ended");
                }
            }
        }));
    }
}

/// The next connection; `None` when it is not root's or the gateway's own user's.
async fn accept(listener: &UnixListener) -> std::io::Result<Option<UnixStream>> {
    let (socket, _) = listener.accept().await?;
    let peer = rustix::net::sockopt::socket_peercred(&socket)?.uid;
    if peer.is_root() || peer == rustix::process::geteuid() {
        return Ok(Some(socket));
    }
    tracing::warn!(uid = peer.as_raw(), "refused a daemon that is not root");
    Ok(None)
}

async fn session(gateway: &Arc<Gateway>, socket: PacketSocket) -> Result<(), SessionError> {
    let mut buffer = Vec::new();
    let (hello, _) = socket.receive::<ToGateway>(&mut buffer).await?;
    let ToGateway::Hello { generation } = hello else {
        return Err(SessionError::NoHello);
    };
    if !is_served(generation) {
        return refuse(gateway, &socket, generation).await;
    }
    gateway.routes.begin_table();
    let beginning = gateway.feed.begin();
    greet(gateway, &socket).await?;
    for app in gateway.apps.all() {
        app.session_began();
    }
    gateway.feed.repeat_connects(beginning.connects_before);
    tokio::select! {
        result = read(gateway, &socket, buffer) => result,
        result = write(gateway, &socket, beginning) => result,
    }
}

/// Tells a daemon of another generation which one this gateway is, and hears nothing of it but
/// that it should make room for another gateway.
async fn refuse(
    gateway: &Gateway,
    socket: &PacketSocket,
    generation: u32,
) -> Result<(), SessionError> {
    say_hello(gateway, socket, Vec::new()).await?;
    let mut buffer = Vec::new();
    if let (ToGateway::Quit { drain_ms }, _) = socket.receive(&mut buffer).await? {
        gateway.quit(drain_ms);
    }
    Err(SessionError::Generation(generation))
}

/// Answers the hello. What is warm and does not fit the packet follows as plain activity.
async fn greet(gateway: &Gateway, socket: &PacketSocket) -> Result<(), SessionError> {
    let now_ms = gateway.feed.now_ms();
    let mut warm = Vec::new();
    let mut rest = Vec::new();
    let mut room = (PACKET_BYTES_MAX - 256).saturating_sub(gateway.stamp.len());
    for app in gateway.apps.all() {
        for activity in app.activities(now_ms) {
            // The names, the id and at most 200 bytes of JSON around them.
            let bytes = activity.app.0.len() + 26 + 200;
            if bytes <= room {
                room -= bytes;
                warm.push(activity);
            } else {
                rest.push(activity);
            }
        }
    }
    say_hello(gateway, socket, warm).await?;
    for activity in rest {
        say(socket, &FromGateway::Activity(activity)).await?;
    }
    Ok(())
}

async fn say_hello(
    gateway: &Gateway,
    socket: &PacketSocket,
    warm: Vec<Activity>,
) -> Result<(), SessionError> {
    let hello = FromGateway::Hello {
        generation: GENERATION,
        warm,
        stamp: gateway.stamp.clone(),
    };
    let listener = lock(&gateway.listener).clone();
    let sent = socket.send(&hello, listener.as_deref());
    let sent = tokio::time::timeout(FEED_STALL_TIMEOUT, sent).await;
    Ok(sent.map_err(|_elapsed| SessionError::Deaf)??)
}

async fn read(
    gateway: &Arc<Gateway>,
    socket: &PacketSocket,
    mut buffer: Vec<u8>,
) -> Result<(), SessionError> {
    loop {
        let (message, fd) = socket.receive::<ToGateway>(&mut buffer).await?;
        obey(gateway, message, fd);
    }
}

fn obey(gateway: &Arc<Gateway>, message: ToGateway, fd: Option<OwnedFd>) {
    match message {
        ToGateway::Hello { .. } => {}
        ToGateway::Routes { set } => {
            for route in set {
                let app = gateway.apps.obtain(&route.app, &gateway.feed);
                gateway.routes.set(route, app);
            }
        }
        ToGateway::RoutesEnd => {
            for app in gateway.routes.end_table() {
                gateway.forget_unrouted(&app);
            }
        }
        ToGateway::Unroute { hosts } => {
            for host in hosts {
                if let Some(app) = gateway.routes.remove(&host) {
                    gateway.forget_unrouted(&app);
                }
            }
        }
        ToGateway::Awake { app, vm, phases } => {
            gateway.feed.settle_wake(&app);
            gateway.apps.obtain(&app, &gateway.feed).awake(vm, phases);
        }
        ToGateway::WakeFailed { app, failure } => {
            gateway.feed.settle_wake(&app);
            if let Some(app) = gateway.apps.get(&app) {
                app.wake_failed(failure);
            }
        }
        ToGateway::Connected { id } => {
            let timeout = gateway.limits.dead_peer_timeout;
            gateway.feed.connected(id, fd, timeout);
        }
        ToGateway::ConnectFailed { id, gone: true, .. } => gateway.feed.connect_gone(id),
        ToGateway::ConnectFailed { id, reason, .. } => gateway.feed.connect_failed(id, reason),
        ToGateway::Reap { app, vm, force } => {
            let mode = if force {
                ReapMode::Force
            } else {
                ReapMode::IfIdle
            };
            match gateway.apps.get(&app) {
                Some(app) => app.reap(vm, mode),
                // An app that was never routed here has nothing in flight.
                None => gateway.feed.send(FromGateway::Reaped { app, vm }),
            }
        }
        ToGateway::Gone { app, vm, reason } => {
            tracing::info!(%app, %vm, reason, "a VM is gone");
            if let Some(app) = gateway.apps.get(&app) {
                app.gone(vm);
                gateway.apps.forget_blank(&app);
            }
            gateway.feed.connects_gone(vm);
        }
        ToGateway::Quit { drain_ms } => gateway.quit(drain_ms),
    }
}

async fn write(
    gateway: &Gateway,
    socket: &PacketSocket,
    mut beginning: Beginning,
) -> Result<(), SessionError> {
    let mut counts = tokio::time::interval(COUNTS_PACE);
    counts.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut activity_at = Instant::now();
    loop {
        tokio::select! {
            // In the order of events: an app that was busy at a reap and is idle now says so last.
            biased;
            message = beginning.queue.recv() => {
                let message = message.ok_or(SessionError::Deaf)?;
                beginning.queued.fetch_sub(1, Ordering::Relaxed);
                say(socket, &message).await?;
            }
            () = listed_at(&gateway.feed, activity_at) => {
                report_activity(&gateway.feed, socket).await?;
                activity_at = Instant::now() + ACTIVITY_PACE;
            }
            _ = counts.tick() => {
                if let Some(taken) = gateway.feed.counters.take()
                    && let Err(error) = say(socket, &FromGateway::Counts(taken.clone())).await
                {
                    gateway.feed.counters.put_back(&taken);
                    return Err(error);
                }
            }
        }
    }
}

/// Ends when an app is on the list of changed ones, but not before `at`.
async fn listed_at(feed: &Feed, at: Instant) {
    tokio::time::sleep_until(at).await;
    while lock(&feed.changed).is_empty() {
        feed.change.notified().await;
    }
}

async fn report_activity(feed: &Feed, socket: &PacketSocket) -> Result<(), SessionError> {
    let changed = std::mem::take(&mut *lock(&feed.changed));
    let now_ms = feed.now_ms();
    for app in changed {
        for activity in app.report(now_ms) {
            say(socket, &FromGateway::Activity(activity)).await?;
        }
    }
    Ok(())
}

async fn say(socket: &PacketSocket, message: &FromGateway) -> Result<(), SessionError> {
    let sent = tokio::time::timeout(FEED_STALL_TIMEOUT, socket.send(message, None));
    Ok(sent.await.map_err(|_elapsed| SessionError::Deaf)??)
}
