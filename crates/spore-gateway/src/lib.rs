//! Spore's data plane: every request of every visitor passes through here.
//!
//! Run as a process of its own, unprivileged, by the binary's internal verb `spore gateway`. It
//! gets routes and connected sockets from the daemon (`spore_wire::gateway`) and never opens a
//! connection, a file, a store or a key by itself.
//!
//! # The phases of a request
//!
//! ```text
//!  client ──▶ listen ──▶ forward ──▶ header   host, framing, hop-by-hop
//!                          │ ─────▶ route     host → app
//!                          │ ─────▶ wake      Cold/Waking/Warm/Closing; waits here, body unread
//!                          │ ─────▶ pool      an idle connection of this VM, or
//!                          │ ─────▶ feed      a new one: Connect ──▶ daemon ──▶ Connected + fd
//!                          ▼
//!                       exchange ──▶ body ──▶ client; the last byte ends `activity`
//!                          │ ─────▶ relay     after 101: bytes both ways, in the client's task
//!                          │
//!                          └─────▶ page      when there is no answer of the app
//! ```
//!
//! # What holds
//!
//! - A request that waits has its body unread; it is sent once, or not at all.
//! - A connection to an app belongs to one VM and dies with it.
//! - No lock is held across an await. No body is buffered whole.
//! - A daemon that dies takes nothing along: what is warm goes on, what waits is asked for again.
//!
//! One thread serves best when the runtime is a current-thread one: a warm request is then one
//! chain of polls without a hand-over.
#![forbid(unsafe_code)]

mod activity;
mod body;
mod counts;
mod feed;
mod forward;
mod header;
mod limits;
mod listen;
pub mod packet;
mod page;
mod pool;
mod relay;
mod request_id;
mod route;
mod socket;
pub mod wake;

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::net::{TcpListener, UnixListener};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use limits::Limits;
pub use route::HostTable;

/// What a gateway is started with; everything else comes from the daemon.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// What it may hold.
    pub limits: Limits,
    /// What it calls itself towards daemons, in at most a few hundred bytes; they know by it
    /// whether to replace it.
    pub stamp: String,
}

/// Why a gateway did not start.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A socket that it was given is unusable.
    #[error("the gateway cannot use the socket for {socket} that it was given")]
    Socket {
        /// Which one.
        socket: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The kernel gave no random bytes.
    #[error("the kernel gave the gateway no random bytes")]
    Random(#[source] getrandom::Error),
}

/// All that the parts of one gateway share.
#[derive(Debug)]
pub(crate) struct Gateway {
    limits: Arc<Limits>,
    stamp: String,
    /// The visitors' socket once more, for daemons; `None` once it quits.
    listener: Mutex<Option<Arc<OwnedFd>>>,
    routes: route::Routes,
    apps: route::Apps,
    feed: Arc<feed::Feed>,
    ids: request_id::RequestIds,
    quit: CancellationToken,
    drain: Mutex<Duration>,
}

/// Serves until the daemon says `Quit`, then drains.
///
/// `listener` is bound and listens for visitors. `control_listener` is a bound, listening unix
/// `SOCK_SEQPACKET` socket for daemons.
///
/// # Errors
/// Only before it serves: an unusable socket, no random bytes.
pub async fn run(
    config: Config,
    listener: std::net::TcpListener,
    control_listener: OwnedFd,
) -> Result<(), RunError> {
    let socket = |socket| move |source| RunError::Socket { socket, source };
    listener.set_nonblocking(true).map_err(socket("visitors"))?;
    let again = listener.try_clone().map_err(socket("visitors"))?;
    let listener = TcpListener::from_std(listener).map_err(socket("visitors"))?;
    let control = std::os::unix::net::UnixListener::from(control_listener);
    control.set_nonblocking(true).map_err(socket("daemons"))?;
    let control = UnixListener::from_std(control).map_err(socket("daemons"))?;
    let gateway = Arc::new(Gateway {
        limits: Arc::new(config.limits),
        stamp: config.stamp,
        listener: Mutex::new(Some(Arc::new(again.into()))),
        routes: route::Routes::default(),
        apps: route::Apps::default(),
        feed: Arc::new(feed::Feed::new()),
        ids: request_id::RequestIds::new().map_err(RunError::Random)?,
        quit: CancellationToken::new(),
        drain: Mutex::new(Duration::ZERO),
    });
    let tasks = TaskTracker::new();
    let daemons = tokio::spawn(feed::serve(Arc::clone(&gateway), control));
    let sweeper = tokio::spawn(sweep(Arc::downgrade(&gateway)));
    let quit = gateway.quit.clone();
    listen::accept(Arc::clone(&gateway), listener, quit, tasks.clone()).await;
    tasks.close();
    let drain = *lock(&gateway.drain);
    if tokio::time::timeout(drain, tasks.wait()).await.is_err() {
        tracing::warn!(connections = tasks.len(), "cut what did not end in time");
    }
    sweeper.abort();
    daemons.abort();
    Ok(())
}

impl Gateway {
    /// Stops accepting; what is in flight has `drain_ms` to end.
    fn quit(&self, drain_ms: u64) {
        *lock(&self.drain) = Duration::from_millis(drain_ms);
        drop(lock(&self.listener).take());
        self.quit.cancel();
    }

    /// A host of this app was forgotten; whoever waits for it is told when it was the last one.
    fn forget_unrouted(&self, app: &Arc<wake::App>) {
        if app.routes.load(std::sync::atomic::Ordering::Relaxed) == 0 {
            app.unrouted();
            self.feed.settle_wake(app.key());
            self.apps.forget_blank(app);
        }
    }
}

/// Closes idle connections that have become old or useless.
async fn sweep(gateway: Weak<Gateway>) {
    let mut clock = tokio::time::interval(limits::SWEEP_PACE);
    loop {
        clock.tick().await;
        let Some(gateway) = gateway.upgrade() else {
            return;
        };
        for app in gateway.apps.all() {
            app.sweep(&gateway.limits);
        }
    }
}

/// Takes a lock whatever happened to whoever held it before: every holder leaves the data whole.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
