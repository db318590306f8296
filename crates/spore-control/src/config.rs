//! What control is told at its start. Read from nowhere here: the composition root fills it in.

use core::fmt;
use core::time::Duration;

use spore_wire::node::STOP_GRACE_DEFAULT;
use zeroize::Zeroizing;

/// Settings of the control plane.
#[derive(Clone)]
pub struct Config {
    /// The domain under which apps answer: `localhost`.
    pub base: String,
    /// Where the gateway listens, for URLs and status.
    pub gateway: core::net::SocketAddr,
    /// The scheme and port of app URLs, such as `("http", 8080)`.
    pub public: (&'static str, u16),
    /// The TCP port of the API: a Host must name it.
    pub api_port: u16,
    /// Further host names under which the API may be called; usually none.
    pub api_hosts: Vec<String>,
    /// The token of the account `me`.
    pub token: Zeroizing<String>,
    /// Spore's version.
    pub version: String,
    /// Warnings for the operator, shown by `spore status`.
    pub warnings: Vec<String>,
    /// Policy of wakes, reaps and deploys.
    pub timing: Timing,
    /// The most bytes of images that one account may have.
    pub image_bytes_max: u64,
    /// The most requests that the gateway holds for one wake.
    pub waiters_max: u32,
}

/// Spans that the reconcilers act by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// How long a request may wait for a wake.
    pub wake_deadline: Duration,
    /// What a start may take beyond the app's own time to become ready.
    pub boot_allowance: Duration,
    /// How long an old VM may finish what is in flight when another takes over.
    pub drain: Duration,
    /// How long the gateway may take to answer a reap.
    pub reap_answer: Duration,
    /// Between SIGTERM and SIGKILL.
    pub stop_grace: Duration,
    /// The first pause after a failed start; it doubles.
    pub backoff_least: Duration,
    /// The longest pause after failed starts.
    pub backoff_most: Duration,
    /// A VM that lived so long was healthy: its end is not part of a crash loop.
    pub healthy_after: Duration,
    /// How often everything is looked at again without a signal.
    pub repair: Duration,
    /// How often images that nothing needs are removed.
    pub collect: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            wake_deadline: Duration::from_secs(60),
            boot_allowance: Duration::from_secs(120),
            drain: Duration::from_secs(30),
            reap_answer: Duration::from_secs(10),
            stop_grace: STOP_GRACE_DEFAULT,
            backoff_least: Duration::from_secs(1),
            backoff_most: Duration::from_secs(60),
            healthy_after: Duration::from_secs(60),
            repair: Duration::from_secs(30),
            collect: Duration::from_secs(60 * 60),
        }
    }
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config")
            .field("base", &self.base)
            .field("gateway", &self.gateway)
            .field("api_port", &self.api_port)
            .finish_non_exhaustive()
    }
}
