//! One session with a gateway: what is said to it, what is heard, connections made for it.
//!
//! Run by `door.rs`. Everything here has an end with the session. The gateway faces the internet:
//! what it asks for is bounded here too.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use spore_gateway::packet::{PacketError, PacketSocket};
use spore_node::node::{Node, VmError};
use spore_wire::gateway::{FromGateway, ToGateway};
use spore_wire::id::VmId;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Messages that may wait for the gateway to read: many times the table of routes of 100,000 apps.
const QUEUE_MAX: usize = 16_384;

/// How long the gateway may leave one message unread.
const SEND_PATIENCE: Duration = Duration::from_secs(10);

/// How long a VM may take to accept a connection, the rest of its way to ready included when the
/// daemon has just adopted it.
const CONNECT_PATIENCE: Duration = Duration::from_secs(20);

/// Connections to one VM that may be in the making: as many as a gateway has requests in flight for
/// one. A VM that accepts none must not fill the daemon.
const CONNECTS_PER_VM_MAX: u32 = 2_048;

/// What the link sends: a message, with a descriptor or without.
type Outgoing = (ToGateway, Option<OwnedFd>);

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionError {
    #[error(transparent)]
    Packet(#[from] PacketError),
    #[error("the gateway does not read what it is told")]
    Deaf,
}

/// A way to say something in one session.
#[derive(Clone, Debug)]
pub(super) struct Speaker {
    queue: mpsc::Sender<Outgoing>,
    deaf: CancellationToken,
}

impl Speaker {
    fn new() -> (Self, mpsc::Receiver<Outgoing>) {
        let (queue, receiver) = mpsc::channel(QUEUE_MAX);
        let deaf = CancellationToken::new();
        (Self { queue, deaf }, receiver)
    }

    /// Queues a message. When there is no room the session ends, since a message must not be lost
    /// inside one.
    pub(super) fn say(&self, message: ToGateway, fd: Option<OwnedFd>) {
        if let Err(mpsc::error::TrySendError::Full(_)) = self.queue.try_send((message, fd)) {
            self.deaf.cancel();
        }
    }
}

/// One session.
#[derive(Debug)]
pub(super) struct Session {
    socket: PacketSocket,
    said: mpsc::Receiver<Outgoing>,
    speaker: Speaker,
    connecting: Connecting,
    node: Node,
}

impl Session {
    /// A session on a socket that was greeted, and how to speak in it.
    pub(super) fn begin(socket: PacketSocket, node: Node) -> (Speaker, Self) {
        let (speaker, said) = Speaker::new();
        let session = Self {
            socket,
            said,
            speaker: speaker.clone(),
            connecting: Connecting::default(),
            node,
        };
        (speaker, session)
    }

    /// Serves until the link breaks; connections are made here, all else is told to `hear`.
    pub(super) async fn run(mut self, hear: impl Fn(FromGateway)) -> SessionError {
        let mut buffer = Vec::new();
        loop {
            tokio::select! {
                said = self.said.recv() => {
                    let Some((message, fd)) = said else { return PacketError::Closed.into() };
                    let sent = self.socket.send(&message, fd.as_ref());
                    match tokio::time::timeout(SEND_PATIENCE, sent).await {
                        Ok(Ok(())) => {}
                        // One message that cannot be said must not end what all apps live by.
                        Ok(Err(PacketError::TooLarge)) => {
                            tracing::error!("a message to the gateway was too large and is lost");
                        }
                        Ok(Err(error)) => return error.into(),
                        Err(_elapsed) => return SessionError::Deaf,
                    }
                }
                heard = self.socket.receive::<FromGateway>(&mut buffer) => match heard {
                    Ok((FromGateway::Connect { id, vm }, _none)) => self.connect(id, vm),
                    Ok((message, _none)) => hear(message),
                    Err(error) => return error.into(),
                },
                () = self.speaker.deaf.cancelled() => return SessionError::Deaf,
            }
        }
    }

    /// Connects to a VM beside the session, so that a slow guest holds up nobody else.
    fn connect(&self, id: u64, vm: VmId) {
        let speaker = self.speaker.clone();
        let Some(place) = self.connecting.take(vm) else {
            let (message, fd) = failed(id, "too many connections to it are in the making", false);
            return speaker.say(message, fd);
        };
        let node = self.node.clone();
        tokio::spawn(async move {
            let connected = tokio::time::timeout(CONNECT_PATIENCE, node.connect(vm)).await;
            let (message, fd) = match connected {
                Ok(Ok(stream)) => match stream.into_std() {
                    Ok(stream) => (ToGateway::Connected { id }, Some(OwnedFd::from(stream))),
                    Err(error) => failed(id, &error.to_string(), false),
                },
                Ok(Err(error)) => {
                    let gone = matches!(error, VmError::Unknown(_) | VmError::NotReady { .. });
                    failed(id, &error.to_string(), gone)
                }
                Err(_elapsed) => failed(id, "the app does not accept connections", false),
            };
            drop(place);
            speaker.say(message, fd);
        });
    }
}

fn failed(id: u64, reason: &str, gone: bool) -> Outgoing {
    let reason = reason.to_owned();
    (ToGateway::ConnectFailed { id, reason, gone }, None)
}

/// How many connections are in the making, by VM.
#[derive(Clone, Debug, Default)]
struct Connecting(Arc<Mutex<HashMap<VmId, u32>>>);

/// One of them.
#[derive(Debug)]
struct Place {
    all: Connecting,
    vm: VmId,
}

impl Connecting {
    fn take(&self, vm: VmId) -> Option<Place> {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(vm).or_insert(0);
        if *count >= CONNECTS_PER_VM_MAX {
            return None;
        }
        *count += 1;
        let all = self.clone();
        Some(Place { all, vm })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.all.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.vm) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.vm);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::PoisonError;

    use spore_wire::gateway::ToGateway;
    use spore_wire::id::VmId;

    use super::{CONNECTS_PER_VM_MAX, Connecting, QUEUE_MAX, Speaker};

    #[test]
    fn a_session_ends_before_a_message_is_lost_in_it() {
        let (speaker, mut said) = Speaker::new();
        for _message in 0..QUEUE_MAX {
            speaker.say(ToGateway::RoutesEnd, None);
        }
        assert!(!speaker.deaf.is_cancelled());
        speaker.say(ToGateway::RoutesEnd, None);
        assert!(speaker.deaf.is_cancelled());
        assert!(said.try_recv().is_ok());
    }

    #[test]
    fn a_vm_that_accepts_nothing_takes_only_its_own_places() {
        let connecting = Connecting::default();
        let (deaf, other) = (VmId::from_bytes([1; 16]), VmId::from_bytes([2; 16]));
        let mut places = Vec::new();
        for _connect in 0..CONNECTS_PER_VM_MAX {
            places.push(connecting.take(deaf).unwrap());
        }
        assert!(connecting.take(deaf).is_none());
        assert!(connecting.take(other).is_some());
        places.pop();
        assert!(connecting.take(deaf).is_some());
        drop(places);
        let left = connecting.0.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(left.is_empty(), "{left:?}");
    }
}
