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
use spore_gateway::packet::PacketSocket;
use spore_node::node::Node;
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

/// How long a VM may take to accept a connection.
const CONNECT_PATIENCE: Duration = Duration::from_secs(10);

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
            let socket = self.socket();
            let ended = match socket {
                Ok(socket) => tokio::select! {
                    ended = self.session(&socket, &control, &node) => ended,
                    () = stop.cancelled() => return,
                },
                Err(error) => Err(error),
            };
            match ended {
                Ok(()) => pause = RELINK_PAUSE,
                Err(error) => {
                    tracing::warn!(error = %format!("{error:#}"), "no link to the gateway");
                    pause = (pause * 2).min(RELINK_PAUSE_MAX);
                }
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = stop.cancelled() => return,
            }
        }
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

    /// One session; `Ok` when it was served and then broke.
    async fn session(
        &mut self,
        socket: &PacketSocket,
        control: &Control,
        node: &Node,
    ) -> Result<()> {
        let mut buffer = Vec::new();
        socket
            .send(
                &ToGateway::Hello {
                    generation: GENERATION,
                },
                None,
            )
            .await?;
        let (hello, _none) = socket.receive::<FromGateway>(&mut buffer).await?;
        let FromGateway::Hello { generation, .. } = &hello else {
            bail!("the gateway did not begin with a hello");
        };
        if !is_served(*generation) {
            let generation = *generation;
            socket
                .send(
                    &ToGateway::Quit {
                        drain_ms: REPLACE_DRAIN_MS,
                    },
                    None,
                )
                .await?;
            bail!("the gateway speaks generation {generation}; it is replaced");
        }
        // What was queued before this session is told again behind its hello.
        while self.queue.try_recv().is_ok() {}
        control.door_event(hello);
        loop {
            tokio::select! {
                outgoing = self.queue.recv() => {
                    let Some((message, fd)) = outgoing else { return Ok(()) };
                    socket.send(&message, fd.as_ref()).await?;
                }
                received = socket.receive::<FromGateway>(&mut buffer) => {
                    let message = match received {
                        Ok((message, _none)) => message,
                        Err(error) => {
                            tracing::warn!(%error, "the link to the gateway broke");
                            return Ok(());
                        }
                    };
                    if let FromGateway::Connect { id, vm } = message {
                        self.connect(id, vm, node.clone());
                    } else {
                        control.door_event(message);
                    }
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
                    Err(error) => failed(id, &error.to_string()),
                },
                Ok(Err(error)) => failed(id, &error.to_string()),
                Err(_elapsed) => failed(id, "the app does not accept connections"),
            };
            if answers.send(answer).is_err() {
                tracing::debug!("the gateway's link is closed; the daemon is stopping");
            }
        });
    }
}

fn failed(id: u64, reason: &str) -> Outgoing {
    (
        ToGateway::ConnectFailed {
            id,
            reason: reason.to_owned(),
        },
        None,
    )
}
