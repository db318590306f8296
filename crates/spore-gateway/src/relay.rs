//! Connections that changed their protocol: bytes both ways, until one end is over.
//!
//! Made by `forward.rs` with the answer that switches; run by `listen.rs` in the task of the
//! client's connection, so that the connection keeps its place, counts for the drain and holds its
//! app awake for as long as bytes may come. Never looks into the bytes.
//!
//! # What ends a relay
//!
//! Both ends have closed, one broke off, the VM is gone, one end took nothing of what
//! waited for it for too long, a peer stopped answering the kernel's probes (`socket.rs`), or the
//! gateway quits: then a moment is left for what is on its way. Silence ends nothing.

use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

use crate::activity::InFlight;
use crate::limits::{Limits, UPGRADE_BUFFER_BYTES};
use crate::pool::Upstream;
use crate::socket::SocketHandle;

/// One upgraded connection, with all that must live as long as it does.
#[derive(Debug)]
pub(crate) struct Relay {
    pub(crate) client_side: OnUpgrade,
    pub(crate) app_side: OnUpgrade,
    pub(crate) upstream: Upstream,
    pub(crate) in_flight: InFlight,
}

impl Relay {
    /// Carries bytes until an end. `client` is the socket below the client's side.
    pub(crate) async fn run(
        self,
        client: &SocketHandle,
        limits: &Limits,
        quit: &CancellationToken,
    ) {
        let app = self.upstream.socket();
        let incarnation = self.in_flight.incarnation();
        let quitting = async {
            quit.cancelled().await;
            tokio::time::sleep(limits.relay_grace).await;
        };
        let carried = carry(self.client_side, self.app_side, self.upstream, limits);
        tokio::select! {
            () = carried => {}
            () = incarnation.gone() => self.in_flight.count_death(),
            () = stalled([client, &app], limits.relay_stall_timeout) => {
                tracing::debug!("an upgraded connection was closed: nobody takes its bytes");
            }
            () = quitting => {}
        }
    }
}

async fn carry(client_side: OnUpgrade, app_side: OnUpgrade, upstream: Upstream, limits: &Limits) {
    let driver = upstream.detach();
    let both = async { tokio::join!(client_side, app_side) };
    // An app may switch before it has read the request's body, which then never ends.
    let switched = tokio::time::timeout(limits.head_timeout, both).await;
    let Ok((Ok(client), Ok(app))) = switched else {
        return;
    };
    drop(driver);
    let mut client = TokioIo::new(client);
    let mut app = TokioIo::new(app);
    let copied = tokio::io::copy_bidirectional_with_sizes(
        &mut client,
        &mut app,
        UPGRADE_BUFFER_BYTES,
        UPGRADE_BUFFER_BYTES,
    );
    // An end that breaks off is an end: there is nobody left to tell.
    drop(copied.await);
}

/// Ends when one of the sockets has taken nothing for `limit` although something waits for it.
async fn stalled(sockets: [&SocketHandle; 2], limit: Duration) {
    let mut clock = tokio::time::interval((limit / 4).max(Duration::from_millis(10)));
    clock.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut seen = sockets.map(|socket| (socket.written_bytes(), Instant::now()));
    loop {
        let now = clock.tick().await;
        for (socket, (written_bytes, since)) in sockets.iter().zip(&mut seen) {
            let written = socket.written_bytes();
            if !socket.is_write_blocked() || written != *written_bytes {
                (*written_bytes, *since) = (written, now);
            } else if now - *since >= limit {
                return;
            }
        }
    }
}
