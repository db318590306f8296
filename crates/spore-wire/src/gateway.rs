//! Daemon and gateway: routes one way, wakes the other, connected sockets by descriptor passing.
//!
//! Spoken over a unix `SOCK_SEQPACKET` socket that the *gateway* listens on, in a folder only root
//! can enter, so that a new daemon connects to the gateway its predecessor left. One packet is one
//! JSON message of at most [`PACKET_BYTES_MAX`] bytes. Two messages carry exactly one descriptor
//! (SCM_RIGHTS): [`ToGateway::Connected`] a socket to an app, [`FromGateway::Hello`] the socket
//! that the gateway listens on for visitors, so that the next gateway can listen on the same one. A
//! newer connection replaces the older one.
//!
//! # Session
//!
//! ```text
//!   daemon                                        gateway
//!    │ Hello{generation} ───────────────────────▶  │
//!    │ ◀────────── Hello{generation, warm} + fd    │  what it still has from before
//!    │ Routes.. (whole table), RoutesEnd ───────▶  │  hosts not named are forgotten
//!    │                                             │  request for a sleeping app
//!    │ ◀──────────────────── Wake{app}             │  once, however many wait
//!    │ Awake{app, vm, ..} | WakeFailed ─────────▶  │
//!    │ ◀──────────────────── Connect{id, vm}       │
//!    │ Connected{id} + fd | ConnectFailed{id} ──▶  │
//!    │ ◀──────────────────── Activity{app, ..}     │  on the edge busy/idle
//!    │ Reap{app, vm} ───────────────────────────▶  │  closes admission iff nothing in flight
//!    │ ◀──────────────────── Reaped | Busy         │
//!    │ Gone{app, vm, reason} ───────────────────▶  │  the VM died or was stopped
//! ```
//!
//! While no daemon is connected the gateway goes on serving over the connections it has; what needs
//! a new one waits, within the deadline of its request.

use serde::{Deserialize, Serialize};

use crate::id::{TraceId, VmId};

/// The most bytes of one packet.
pub const PACKET_BYTES_MAX: usize = 64 * 1024;

/// The key of an app on this channel: `account/app`, both validated names.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct AppKey(pub String);

impl AppKey {
    /// The key of `app` in `account`; both are validated names, which have no slash.
    #[must_use]
    pub fn new(account: &str, app: &str) -> Self {
        Self(format!("{account}/{app}"))
    }
}

impl core::fmt::Display for AppKey {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(&self.0)
    }
}

/// What the daemon says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToGateway {
    /// Begins a session.
    Hello {
        /// [`crate::generation::GENERATION`] of the daemon.
        generation: u32,
    },
    /// Routes to add or replace, by host.
    Routes {
        /// Any number that fits a packet.
        set: Vec<Route>,
    },
    /// The table is whole; after a `Hello`, routes not named since are forgotten.
    RoutesEnd,
    /// Hosts that lead nowhere any more.
    Unroute {
        /// As in [`Route::host`].
        hosts: Vec<String>,
    },
    /// An app has a VM that may be connected to. Answers `Wake`, and is told unasked too, after
    /// a `Hello` for every app that is awake and when an app was woken by somebody else.
    Awake {
        /// Whose.
        app: AppKey,
        /// The VM.
        vm: VmId,
        /// What took how long, in the order it happened; empty when nobody waited.
        phases: Vec<Phase>,
    },
    /// The app could not be woken; those who wait get an answer now.
    WakeFailed {
        /// Whose.
        app: AppKey,
        /// Why.
        failure: WakeFailure,
    },
    /// A connected TCP socket, sent with the packet, answers `Connect`.
    Connected {
        /// From `Connect`.
        id: u64,
    },
    /// There is no connection.
    ConnectFailed {
        /// From `Connect`.
        id: u64,
        /// For people; no addresses.
        reason: String,
        /// Whether the VM is gone: the next one may be asked for.
        #[serde(default)]
        gone: bool,
    },
    /// Asks to close admission to this VM iff nothing is in flight.
    Reap {
        /// Whose.
        app: AppKey,
        /// The VM.
        vm: VmId,
        /// Whether to close even when requests are in flight (a stop that was asked for, a VM
        /// that its node ends); what is in flight goes on until it ends or the VM does.
        force: bool,
    },
    /// The VM is gone; its connections are dead.
    Gone {
        /// Whose.
        app: AppKey,
        /// The VM.
        vm: VmId,
        /// For people.
        reason: String,
    },
    /// Stop accepting, finish what is in flight within `drain_ms`, end.
    Quit {
        /// Then connections are cut.
        drain_ms: u64,
    },
}

/// What the gateway says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum FromGateway {
    /// Answers the daemon's hello.
    Hello {
        /// [`crate::generation::GENERATION`] of the gateway.
        generation: u32,
        /// The VMs that it believes awake, with their activity.
        warm: Vec<Activity>,
        /// What its daemon told it to call itself: program and configuration. A daemon that would
        /// start another one replaces it.
        #[serde(default)]
        stamp: String,
    },
    /// A request came for an app that is not awake.
    Wake {
        /// Whose.
        app: AppKey,
        /// The first request that waits.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        trace: Option<TraceId>,
    },
    /// A connection to a VM's port is wanted.
    Connect {
        /// Chosen by the gateway, never twice in a session.
        id: u64,
        /// The VM.
        vm: VmId,
    },
    /// An app became busy or idle.
    Activity(Activity),
    /// Admission is closed and nothing is in flight: answers `Reap`.
    Reaped {
        /// Whose.
        app: AppKey,
        /// The VM.
        vm: VmId,
    },
    /// Requests are in flight, admission stays open: answers `Reap`.
    Busy {
        /// Whose.
        app: AppKey,
        /// The VM.
        vm: VmId,
    },
    /// Counters since the last report, about once a second and only when something happened.
    Counts(Counts),
}

/// Where a host leads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Lower case, without port.
    pub host: String,
    /// Whose.
    pub app: AppKey,
    /// How requests are treated.
    pub policy: RoutePolicy,
}

/// How requests to a host are treated.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoutePolicy {
    /// Whether the app may be woken.
    pub admission: Admission,
    /// The most requests that may wait for one wake.
    pub waiters_max: u32,
    /// How long a request may wait for a wake.
    pub wake_deadline_ms: u64,
}

/// Whether requests for an app are let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Admission {
    /// Yes; it is woken when it sleeps.
    Open,
    /// No: the owner disabled it.
    Disabled,
    /// No: it has no healthy release yet.
    NoRelease,
}

/// One timed step of a wake.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Phase {
    /// A token of RFC 9110 (it becomes a `Server-Timing` metric name): `boot`, `thaw`, `app`.
    pub name: String,
    /// How long it took.
    pub us: u64,
}

/// Why an app could not be woken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WakeFailure {
    /// For programs, as in the public list of error codes.
    pub code: String,
    /// For visitors: no names of hosts, paths or owners.
    pub message: String,
    /// When trying again may help.
    pub retry_after_s: u32,
}

/// A VM and how busy it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Activity {
    /// Whose.
    pub app: AppKey,
    /// The VM.
    pub vm: VmId,
    /// Requests and upgraded connections that have begun and not ended.
    pub in_flight: u32,
    /// How long it has been idle; 0 while something is in flight.
    pub idle_ms: u64,
}

/// What the gateway counted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Answers by status class: index 1 is 1xx, 5 is 5xx; 0 counts requests that got no answer.
    pub by_class: [u64; 6],
    /// Requests that waited for a wake.
    pub waited: u64,
    /// Requests refused because too many waited.
    pub refused_full: u64,
    /// Requests whose VM died under them.
    pub vm_died: u64,
}
