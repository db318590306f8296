//! Client connections: accepted, counted, watched for stalling, served until they end.
//!
//! Called by `lib.rs`. TLS will end here too. Never looks into a request.
//!
//! # Who watches a connection
//!
//! ```text
//!   silent ──first byte──▶ head ──complete──▶ request ──answered──▶ silent
//!     │ keep_alive_timeout   │ head_timeout      │ body_stall, answer_stall
//!     └──────────────────────┴───────────────────┴──▶ closed
//! ```
//! A slow clock looks at counters, so that a fast request sets no timer at all. A connection that
//! leaves HTTP behind keeps its task and its places; `relay.rs` watches it from then on.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::header::HeaderValue;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::body::BodyProgress;
use crate::header::ClientHeaders;
use crate::limits::{ACCEPT_PAUSE, BUFFER_BYTES_MAX, Limits};
use crate::relay::Relay;
use crate::socket::{Socket, SocketHandle, tune};
use crate::{Gateway, forward, lock};

/// One client's connection, as its requests know it.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) headers: ClientHeaders,
    socket: SocketHandle,
    /// Requests begun; odd while one is being answered, even between them.
    turns: AtomicU64,
    body: Mutex<Option<Arc<BodyProgress>>>,
    has_body: AtomicBool,
    /// What the connection goes on as once the answer that says so is written.
    relay: Mutex<Option<Relay>>,
}

impl Client {
    fn new(address: IpAddr, socket: SocketHandle) -> Self {
        let text = address.to_canonical().to_string();
        let address = HeaderValue::try_from(text);
        Self {
            headers: ClientHeaders {
                address: address.unwrap_or(HeaderValue::from_static("unknown")),
                scheme: HeaderValue::from_static("http"),
            },
            socket,
            turns: AtomicU64::new(0),
            body: Mutex::new(None),
            has_body: AtomicBool::new(false),
            relay: Mutex::new(None),
        }
    }

    /// Lets the connection be watched for a client that stops sending the body it began.
    pub(crate) fn watch_body(&self, progress: Option<&Arc<BodyProgress>>) {
        // Most requests have no body and follow one that had none.
        if progress.is_some() || self.has_body.load(Ordering::Relaxed) {
            *lock(&self.body) = progress.cloned();
            self.has_body.store(progress.is_some(), Ordering::Relaxed);
        }
    }

    /// Whether the client has closed its side.
    pub(crate) async fn is_gone(&self) -> bool {
        self.socket.is_peer_gone().await
    }

    /// Lets the connection go on as something else than HTTP behind the answer being given.
    pub(crate) fn upgrade(&self, relay: Relay) {
        *lock(&self.relay) = Some(relay);
    }

    /// Closes the connection.
    pub(crate) fn end(&self) {
        self.socket.cut();
    }

    /// Ends when the connection is to take no further request: when the gateway quits, or a moment
    /// later on a connection that was accepted for a first request which is still on its way.
    async fn quit(&self, quit: &CancellationToken, fresh_grace: Duration) {
        quit.cancelled().await;
        if self.turns.load(Ordering::Relaxed) == 0 {
            tokio::time::sleep(fresh_grace).await;
        }
    }

    /// Whether the last request was answered before all of its body was read.
    fn is_body_left(&self) -> bool {
        let body = lock(&self.body);
        body.as_ref().is_some_and(|progress| !progress.is_ended())
    }

    /// Takes what a client still sends that has been answered already, and throws it away. Closed
    /// at once, the connection would be reset under the answer, which the client might never see
    /// (RFC 9112, 9.6).
    async fn linger(&self, timeout: Duration) {
        drop(tokio::time::timeout(timeout, self.socket.swallow()).await);
    }

    fn is_body_starved(&self) -> bool {
        lock(&self.body)
            .as_ref()
            .is_some_and(|progress| progress.is_starved() && !progress.is_ended())
    }
}

/// Accepts clients until `quit`.
pub(crate) async fn accept(
    gateway: Arc<Gateway>,
    listener: TcpListener,
    quit: CancellationToken,
    tasks: TaskTracker,
) {
    let room = Arc::new(Semaphore::new(gateway.limits.connections_max));
    let per_client = Arc::new(PerClient::default());
    loop {
        let permit = tokio::select! {
            permit = Arc::clone(&room).acquire_owned() => permit,
            () = quit.cancelled() => return,
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = quit.cancelled() => return,
        };
        let (stream, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "could not accept a client");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let place = PerClient::take(
            &per_client,
            address.ip(),
            gateway.limits.connections_per_client_max,
        );
        // Closed without a word: a client with that many connections reads none of them.
        let Some(place) = place else { continue };
        let connection = Connection {
            gateway: Arc::clone(&gateway),
            quit: quit.clone(),
            _permit: permit.ok(),
            _place: place,
        };
        tasks.spawn(connection.serve(stream, address));
    }
}

struct Connection {
    gateway: Arc<Gateway>,
    quit: CancellationToken,
    _permit: Option<OwnedSemaphorePermit>,
    _place: Place,
}

impl Connection {
    async fn serve(self, stream: TcpStream, address: SocketAddr) {
        if let Err(error) = tune(&stream, self.gateway.limits.dead_peer_timeout) {
            tracing::debug!(%error, "a client's connection ended at once");
            return;
        }
        let socket = Socket::new(stream);
        let client = Arc::new(Client::new(address.ip(), socket.handle()));
        let service = service_fn(|request| {
            let turn = Turn::begin(&client);
            let gateway = &self.gateway;
            async move { Ok::<_, Infallible>(forward::serve(gateway, turn, request).await) }
        });
        let limits = &self.gateway.limits;
        let connection = http1::Builder::new()
            .max_buf_size(BUFFER_BYTES_MAX)
            .max_header_size(limits.head_bytes_max)
            .max_headers(limits.headers_max)
            .serve_connection(TokioIo::new(socket), service)
            .with_upgrades();
        let mut connection = pin!(connection);
        let mut watch = Watch::new(&client, limits);
        let mut clock = tokio::time::interval(watch.pace());
        clock.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut quitting = false;
        let mut quit = pin!(client.quit(&self.quit, limits.fresh_grace));
        loop {
            tokio::select! {
                biased;
                result = connection.as_mut() => {
                    if let Err(error) = result {
                        tracing::debug!(%error, "a client's connection broke off");
                        if error.is_parse() {
                            client.linger(limits.linger_timeout).await;
                        }
                        return;
                    }
                    break;
                }
                _ = clock.tick() => {
                    if let Some(stall) = watch.look(Instant::now()) {
                        tracing::debug!(?stall, "a client's connection was closed");
                        return;
                    }
                }
                () = quit.as_mut(), if !quitting => {
                    quitting = true;
                    connection.as_mut().graceful_shutdown();
                }
            }
        }
        let relay = lock(&client.relay).take();
        if let Some(relay) = relay {
            Box::pin(relay.run(&client.socket, limits, &self.quit)).await;
        } else if client.is_body_left() {
            client.linger(limits.linger_timeout).await;
        }
    }
}

/// Marks that a request is being answered, until the last byte of the answer is on its way.
#[derive(Debug)]
pub(crate) struct Turn(Arc<Client>);

impl Turn {
    fn begin(client: &Arc<Client>) -> Self {
        client.turns.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(client))
    }

    pub(crate) fn client(&self) -> &Client {
        &self.0
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.turns.fetch_add(1, Ordering::Relaxed);
    }
}

/// What a stalled connection is closed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stall {
    Silent,
    Head,
    Body,
    Answer,
}

/// What the slow clock saw last.
struct Watch<'a> {
    client: &'a Client,
    limits: &'a Limits,
    read_bytes: u64,
    written_bytes: u64,
    turns: u64,
    /// Since when this doing, or not doing, goes on.
    since: Option<(Doing, Instant)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
    Silent,
    Head,
    AwaitBody,
    AwaitReader,
    Fine,
}

impl<'a> Watch<'a> {
    const fn new(client: &'a Client, limits: &'a Limits) -> Self {
        Self {
            client,
            limits,
            read_bytes: 0,
            written_bytes: 0,
            turns: 0,
            since: None,
        }
    }

    /// A quarter of the shortest limit, so that none is missed by more than that.
    fn pace(&self) -> Duration {
        let limits = self.limits;
        let shortest = limits
            .head_timeout
            .min(limits.keep_alive_timeout)
            .min(limits.body_stall_timeout)
            .min(limits.answer_stall_timeout);
        (shortest / 4).max(Duration::from_millis(10))
    }

    fn look(&mut self, now: Instant) -> Option<Stall> {
        let socket = &self.client.socket;
        let read_bytes = socket.read_bytes();
        let written_bytes = socket.written_bytes();
        let turns = self.client.turns.load(Ordering::Relaxed);
        let read_more = read_bytes != self.read_bytes;
        let wrote_more = written_bytes != self.written_bytes;
        let turned = turns != self.turns;
        let before = self.since.map(|(doing, _)| doing);
        let doing = if socket.is_write_blocked() {
            Doing::AwaitReader
        } else if turns % 2 == 1 {
            if self.client.is_body_starved() {
                Doing::AwaitBody
            } else {
                Doing::Fine
            }
        } else if wrote_more {
            // The body of an answer flows after its turn.
            Doing::Fine
        } else if !turned && (read_more || before == Some(Doing::Head)) || turns == 0 {
            Doing::Head
        } else {
            Doing::Silent
        };
        self.read_bytes = read_bytes;
        self.written_bytes = written_bytes;
        self.turns = turns;
        let moved = match doing {
            Doing::AwaitReader => wrote_more,
            Doing::AwaitBody => read_more,
            Doing::Head => turned,
            Doing::Silent => false,
            Doing::Fine => true,
        };
        let since = match self.since {
            Some((same, since)) if same == doing && !moved => since,
            _ => now,
        };
        self.since = Some((doing, since));
        let (limit, stall) = match doing {
            Doing::Silent => (self.limits.keep_alive_timeout, Stall::Silent),
            Doing::Head => (self.limits.head_timeout, Stall::Head),
            Doing::AwaitBody => (self.limits.body_stall_timeout, Stall::Body),
            Doing::AwaitReader => (self.limits.answer_stall_timeout, Stall::Answer),
            Doing::Fine => return None,
        };
        (now - since >= limit).then_some(stall)
    }
}

/// Connections by client address.
#[derive(Debug, Default)]
struct PerClient(Mutex<HashMap<IpAddr, u32>>);

impl PerClient {
    fn take(this: &Arc<Self>, address: IpAddr, max: u32) -> Option<Place> {
        let address = household(address);
        let mut counts = lock(&this.0);
        let count = counts.entry(address).or_insert(0);
        if *count >= max {
            return None;
        }
        *count += 1;
        drop(counts);
        Some(Place {
            counts: Arc::clone(this),
            address,
        })
    }
}

/// The address that a client is counted by: a household or a rented machine has as many IPv6
/// addresses as it likes below one /64.
fn household(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let network = u128::from(address) >> 64 << 64;
            IpAddr::V6(network.into())
        }
        address @ IpAddr::V4(_) => address,
    }
}

/// One connection's place among those of its client.
#[derive(Debug)]
struct Place {
    counts: Arc<PerClient>,
    address: IpAddr,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = lock(&self.counts.0);
        if let Some(count) = counts.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::household;

    #[test]
    fn a_client_is_counted_by_what_it_cannot_change_at_will() {
        for (address, counted) in [
            ("192.0.2.7", "192.0.2.7"),
            ("::ffff:192.0.2.7", "192.0.2.7"),
            ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
            ("2001:db8:1:2:ffff::", "2001:db8:1:2::"),
        ] {
            let address: IpAddr = address.parse().unwrap();
            assert_eq!(household(address), counted.parse::<IpAddr>().unwrap());
        }
    }
}
