//! The daemon's end of the gateway's feed: finds or starts the gateway, carries messages.
//!
//! ```text
//!   control ──Door::send──▶ queue ──▶ gateway
//!   control ◀──door_event──────────── gateway
//!   node    ◀──connect──── Connect ── gateway,  Connected + descriptor ──▶ gateway
//! ```
//!
//! Decides nothing. When the gateway ends it is started again; when the link breaks it is made
//! again, and control tells the new session everything.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use spore_control::Control;
use spore_control::door::Door;
use spore_gateway::packet::{PacketError, PacketSocket};
use spore_node::node::{Node, VmError};
use spore_wire::gateway::{FromGateway, ToGateway};
use spore_wire::generation::{GENERATION, is_served};
use spore_wire::id::VmId;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::gateway_process::GatewayProcess;

/// The pause before a broken link is made again.
const RELINK_PAUSE: Duration = Duration::from_millis(50);

/// The longest pause, when the gateway cannot be started at all.
const RELINK_PAUSE_MAX: Duration = Duration::from_secs(5);

/// How long a gateway of another generation may finish what is in flight.
const REPLACE_DRAIN_MS: u64 = 5_000;

/// How long a VM may take to accept a connection, the rest of its way to ready included when the
/// daemon has just adopted it.
const CONNECT_PATIENCE: Duration = Duration::from_secs(20);

/// How long a gateway may take to answer a hello.
const HELLO_PATIENCE: Duration = Duration::from_secs(5);

/// What the link sends: a message, with a descriptor or without.
type Outgoing = (ToGateway, Option<OwnedFd>);

/// Control's way to the gateway.
#[derive(Debug)]
pub(crate) struct DoorQueue(mpsc::UnboundedSender<Outgoing>);

/// The link itself; [`Link::run`] keeps it up.
#[derive(Debug)]
pub(crate) struct Link {
    process: GatewayProcess,
    queue: mpsc::UnboundedReceiver<Outgoing>,
    answers: mpsc::UnboundedSender<Outgoing>,
}

impl Door for DoorQueue {
    fn send(&self, message: ToGateway) {
        if self.0.send((message, None)).is_err() {
            tracing::debug!("the gateway's link is closed; the daemon is stopping");
        }
    }
}

/// A queue for control and the link that empties it.
pub(crate) fn link(process: GatewayProcess) -> (Arc<DoorQueue>, Link) {
    let (sender, queue) = mpsc::unbounded_channel();
    let link = Link {
        process,
        queue,
        answers: sender.clone(),
    };
    (Arc::new(DoorQueue(sender)), link)
}

impl Link {
    /// Keeps the link up until `stop`; the gateway goes on without it.
    pub(crate) async fn run(mut self, control: Arc<Control>, node: Node, stop: CancellationToken) {
        let mut pause = RELINK_PAUSE;
        loop {
            tokio::select! {
                linked = self.greet() => match linked {
                    Ok((socket, hello)) => {
                        pause = RELINK_PAUSE;
                        // What was queued before this session is told again behind its hello.
                        while self.queue.try_recv().is_ok() {}
                        control.door_event(hello);
                        tokio::select! {
                            error = self.session(&socket, &control, &node) => {
                                tracing::warn!(%error, "the link to the gateway broke");
                            }
                            () = stop.cancelled() => return,
                        }
                    }
                    Err(error) => {
                        tracing::warn!(error = %format!("{error:#}"), "no link to the gateway");
                        pause = (pause * 2).min(RELINK_PAUSE_MAX);
                    }
                },
                () = stop.cancelled() => return,
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = stop.cancelled() => return,
            }
        }
    }

    /// A connection to a gateway that serves this daemon, and what it said first.
    async fn greet(&self) -> Result<(PacketSocket, FromGateway)> {
        let socket = self.socket()?;
        let hello = ToGateway::Hello {
            generation: GENERATION,
        };
        socket.send(&hello, None).await?;
        let mut buffer = Vec::new();
        let answer = socket.receive::<FromGateway>(&mut buffer);
        let Ok(answer) = tokio::time::timeout(HELLO_PATIENCE, answer).await else {
            self.process.kill()?;
            bail!("the gateway did not answer within {HELLO_PATIENCE:?}; it is replaced");
        };
        let (hello, _none) = answer?;
        let FromGateway::Hello { generation, .. } = &hello else {
            bail!("the gateway did not begin with a hello");
        };
        if !is_served(*generation) {
            let generation = *generation;
            let quit = ToGateway::Quit {
                drain_ms: REPLACE_DRAIN_MS,
            };
            socket.send(&quit, None).await?;
            bail!("the gateway speaks generation {generation}; it is replaced");
        }
        Ok((socket, hello))
    }

    fn socket(&self) -> Result<PacketSocket> {
        if let Some(socket) = self.process.connect()? {
            return Ok(PacketSocket::new(socket)?);
        }
        // A gateway that does not listen any more is no use to anybody.
        self.process.kill()?;
        self.process.start()?;
        let socket = self
            .process
            .connect()?
            .context("the gateway that was started is not there")?;
        Ok(PacketSocket::new(socket)?)
    }

    /// Serves one session until the link breaks.
    async fn session(
        &mut self,
        socket: &PacketSocket,
        control: &Control,
        node: &Node,
    ) -> PacketError {
        let mut buffer = Vec::new();
        loop {
            tokio::select! {
                outgoing = self.queue.recv() => {
                    let Some((message, fd)) = outgoing else { return PacketError::Closed };
                    match socket.send(&message, fd.as_ref()).await {
                        Ok(()) => {}
                        // One message that cannot be said must not end what all apps live by.
                        Err(PacketError::TooLarge) => {
                            tracing::error!("a message to the gateway was too large and is lost");
                        }
                        Err(error) => return error,
                    }
                }
                received = socket.receive::<FromGateway>(&mut buffer) => match received {
                    Ok((FromGateway::Connect { id, vm }, _none)) => {
                        self.connect(id, vm, node.clone());
                    }
                    Ok((message, _none)) => control.door_event(message),
                    Err(error) => return error,
                }
            }
        }
    }

    /// Connects to a VM beside the session, so that a slow guest holds up nobody else.
    fn connect(&self, id: u64, vm: VmId, node: Node) {
        let answers = self.answers.clone();
        tokio::spawn(async move {
            let connected = tokio::time::timeout(CONNECT_PATIENCE, node.connect(vm)).await;
            let answer = match connected {
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
            if answers.send(answer).is_err() {
                tracing::debug!("the gateway's link is closed; the daemon is stopping");
            }
        });
    }
}

fn failed(id: u64, reason: &str, gone: bool) -> Outgoing {
    let reason = reason.to_owned();
    (ToGateway::ConnectFailed { id, reason, gone }, None)
}
