//! Takes the guest's redirected connections, asks the policy, dials and relays.
//!
//! Run by `serve` beside the resolver. The wanted destination is what the kernel remembered when
//! it redirected the connection (`SO_ORIGINAL_DST`), never something the guest says. A connection
//! that is refused, or breaks, is reset: the guest's program sees an error, not an empty answer.
//!
//! ```text
//!   accepted ──▶ place free? ──▶ destination known? ──▶ policy ──▶ dialled ──▶ relayed ──▶ closed
//!                   │ no            │ no                  │ refused   │ failed     │ cut
//!                   └───────────────┴─────────────────────┴───────────┴────────────┴──▶ reset
//! ```

use std::io;
use std::net::SocketAddrV4;
use std::sync::Arc;
use std::time::Duration;

use socket2::SockRef;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Shared;
use super::policy::Verdict;
use super::relay::{RelayError, relay, within};
use super::tally::Event;

/// How long a dial may take.
const DIAL_PATIENCE: Duration = Duration::from_secs(10);

/// The kernel's buffer per socket and direction, before the kernel doubles it for its own needs.
/// Automatic tuning would grow each to several MiB, for a peer that only has to stop reading.
const SOCKET_BUFFER_BYTES: u32 = 256 * 1024;

/// How long accepting pauses after it failed, which it does when descriptors or memory ran out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves `listener` until the process ends, `connections_max` connections at a time.
pub async fn serve(shared: Arc<Shared>, listener: TcpListener, connections_max: u32) {
    let places = Arc::new(Semaphore::new(
        usize::try_from(connections_max).unwrap_or(1),
    ));
    loop {
        let guest = match listener.accept().await {
            Ok((guest, _from)) => guest,
            Err(_gone_or_full) => {
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            shared.tally.count(Event::TooMany);
            reset(&guest);
            continue;
        };
        admit(&shared, guest, place);
    }
}

/// Decides on one connection, and starts it if it is granted.
fn admit(shared: &Arc<Shared>, guest: TcpStream, place: OwnedSemaphorePermit) {
    let Some(to) = original_destination(&guest) else {
        shared.tally.count(Event::NoDestination);
        reset(&guest);
        return;
    };
    let names = match shared.decide(to) {
        Verdict::Address => None,
        Verdict::Names(names) => Some(names),
        Verdict::Refused => {
            shared.tally.refuse(Event::NotGranted, to);
            reset(&guest);
            return;
        }
    };
    let shared = Arc::clone(shared);
    tokio::spawn(async move {
        let names = names.map(|names| {
            names
                .iter()
                .filter_map(|name| shared.policy.name(*name))
                .collect::<Vec<_>>()
        });
        carry(&shared, guest, to, names.as_deref()).await;
        drop(place);
    });
}

async fn carry(shared: &Shared, mut guest: TcpStream, to: SocketAddrV4, names: Option<&[&str]>) {
    let mut upstream = match within(DIAL_PATIENCE, dial(to)).await {
        Ok(upstream) => upstream,
        Err(_unreachable) => {
            shared.tally.count(Event::DialFailed);
            reset(&guest);
            return;
        }
    };
    shared.tally.count(Event::Dialled);
    let prepared = bound_buffers(&guest).and_then(|()| guest.set_nodelay(true));
    let ended = match prepared {
        Ok(()) => relay(&mut guest, &mut upstream, names).await,
        Err(error) => Err(error.into()),
    };
    if let Err(why) = ended {
        match why {
            RelayError::Hello(_why) => shared.tally.refuse(Event::HelloRefused, to),
            RelayError::Idle => shared.tally.count(Event::Idle),
            RelayError::Broken(_error) => {}
        }
        reset(&guest);
        reset(&upstream);
    }
}

async fn dial(to: SocketAddrV4) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES)?;
    socket.set_send_buffer_size(SOCKET_BUFFER_BYTES)?;
    // A peer that vanished without a word is noticed, and its place freed.
    socket.set_keepalive(true)?;
    socket.set_nodelay(true)?;
    socket.connect(to.into()).await
}

fn bound_buffers(guest: &TcpStream) -> io::Result<()> {
    let socket = SockRef::from(guest);
    let bytes = usize::try_from(SOCKET_BUFFER_BYTES).unwrap_or(usize::MAX);
    socket.set_recv_buffer_size(bytes)?;
    socket.set_send_buffer_size(bytes)?;
    socket.set_keepalive(true)
}

/// Where the guest wanted to go before the redirection.
fn original_destination(guest: &TcpStream) -> Option<SocketAddrV4> {
    SockRef::from(guest)
        .original_dst_v4()
        .ok()?
        .as_socket_ipv4()
}

/// Makes the coming close a reset. Where the option cannot be set, an ordinary close follows.
fn reset(stream: &TcpStream) {
    let _closed_anyway = stream.set_zero_linger();
}
