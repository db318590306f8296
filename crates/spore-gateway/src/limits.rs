//! Every limit of the gateway, named, with its origin.
//!
//! Read by all other modules through [`Limits`]; tests make the numbers small. Never enforces
//! anything itself.

use std::time::Duration;

/// Numbers that bound what clients, apps and the daemon can make the gateway hold.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Client connections at once; more wait in the kernel's backlog.
    pub connections_max: usize,
    /// Connections of one client address; more are closed at accept. Generous, since many
    /// people may share an address, and everybody does behind a local proxy.
    pub connections_per_client_max: u32,
    /// Bytes of a request's head; beyond it the answer is 431. A cookie may be 4 KiB and browsers
    /// send dozens.
    pub head_bytes_max: usize,
    /// Header fields of a request; beyond it the answer is 431.
    pub headers_max: usize,
    /// How long a request's head may take from its first byte, and how long a fresh connection may
    /// stay silent.
    pub head_timeout: Duration,
    /// How long a connection may be silent between requests.
    pub keep_alive_timeout: Duration,
    /// How long a client may send nothing of a body that the app waits for.
    pub body_stall_timeout: Duration,
    /// How long a client may take nothing of an answer that waits for it.
    pub answer_stall_timeout: Duration,
    /// How long a client that was answered before it had sent all may go on sending.
    pub linger_timeout: Duration,
    /// How long either end of an upgraded connection may take nothing of what waits for it.
    pub relay_stall_timeout: Duration,
    /// How long upgraded connections go on once the gateway quits: they have no end of their own
    /// to wait for, only bytes that are on their way.
    pub relay_grace: Duration,
    /// How long a connection that has brought no request yet may bring its first one once the
    /// gateway quits: its visitor would take the closing for an answer.
    pub fresh_grace: Duration,
    /// How long a client's or an app's kernel may give no sign of life.
    pub dead_peer_timeout: Duration,
    /// Requests and upgrades in flight at once for one VM; beyond it the answer is 503.
    pub in_flight_max: u32,
    /// Idle connections kept for one VM.
    pub idle_connections_max: usize,
    /// How long an idle connection to an app is kept: below the five seconds after which common
    /// servers close theirs, since a request that meets the closing cannot be sent again.
    pub idle_connection_age_max: Duration,
    /// How long requests wait for an app that refuses every connection, from its first refusal on:
    /// its agent starts a crashed one again, at first within a second.
    pub refused_patience: Duration,
    /// How long a request waits for the first table of routes, which is not there in the moment
    /// after a start.
    pub first_table_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections_max: 16_384,
            connections_per_client_max: 4_096,
            head_bytes_max: 32 * 1024,
            headers_max: 100,
            head_timeout: Duration::from_secs(10),
            keep_alive_timeout: Duration::from_secs(75),
            body_stall_timeout: Duration::from_secs(60),
            answer_stall_timeout: Duration::from_secs(60),
            linger_timeout: Duration::from_secs(2),
            relay_stall_timeout: Duration::from_secs(60),
            relay_grace: Duration::from_secs(1),
            fresh_grace: Duration::from_secs(1),
            dead_peer_timeout: Duration::from_secs(120),
            in_flight_max: 2_048,
            idle_connections_max: 128,
            idle_connection_age_max: Duration::from_secs(4),
            refused_patience: Duration::from_secs(5),
            first_table_timeout: Duration::from_secs(10),
        }
    }
}

/// The most bytes that one direction of one connection buffers: two of these per hop.
pub(crate) const BUFFER_BYTES_MAX: usize = 128 * 1024;

/// The most bytes buffered in each direction of an upgraded connection.
pub(crate) const UPGRADE_BUFFER_BYTES: usize = 16 * 1024;

/// The longest host of a URL (RFC 1035).
pub(crate) const HOST_BYTES_MAX: usize = 253;

/// The shortest time between two reports of one app's activity.
pub(crate) const ACTIVITY_PACE: Duration = Duration::from_millis(50);

/// The time between two reports of counters.
pub(crate) const COUNTS_PACE: Duration = Duration::from_secs(1);

/// Messages that may wait for the daemon to read; a daemon that reads nothing loses its session.
pub(crate) const FEED_QUEUE_MAX: usize = 262_144;

/// How long the daemon may leave one message unread before its session is ended.
pub(crate) const FEED_STALL_TIMEOUT: Duration = Duration::from_secs(10);

/// How long accepting pauses after it failed.
pub(crate) const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The first pause before a refused connection is tried again; it doubles each time.
pub(crate) const REFUSED_PAUSE_MIN: Duration = Duration::from_millis(50);

/// The longest pause before a refused connection is tried again.
pub(crate) const REFUSED_PAUSE_MAX: Duration = Duration::from_millis(500);

/// How often a waiting request looks whether its client is still there. A client whose request
/// has an unread body is not seen leaving otherwise.
pub(crate) const CLIENT_CHECK_PACE: Duration = Duration::from_millis(250);

/// What `Retry-After` says when the queue or an app is full.
pub(crate) const RETRY_FULL_S: u32 = 5;

/// What `Retry-After` says when a wake took too long: most of it is done by then.
pub(crate) const RETRY_DEADLINE_S: u32 = 10;

/// The time between two sweeps over idle connections.
pub(crate) const SWEEP_PACE: Duration = Duration::from_secs(1);

/// The most phases shown in `Server-Timing`.
pub(crate) const PHASES_MAX: usize = 16;
