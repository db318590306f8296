//! The daemon's end of the gateway's feed: finds or starts the gateway, carries messages.
//!
//! ```text
//!   control ──Door::send──▶ queue ──▶ gateway
//!   control ◀──door_event──────────── gateway
//!   node    ◀──connect──── Connect ── gateway,  Connected + descriptor ──▶ gateway
//! ```
//!
//! Decides nothing. When the gateway ends it is started again; when the link breaks it is made
//! again, and control tells the new session everything. What is queued belongs to one session and
//! goes with it, an open connection above all: to another gateway its number may mean another app.
//!
//! # Another gateway than this daemon would start
//!
//! An installed version or a changed address makes one (`GatewayProcess::stamp`). It is told to
//! quit and keeps its session while it finishes what is in flight, so that its waiting requests are
//! woken for and its busy VMs are not reaped. Visitors who come meanwhile wait in the visitors'
//! socket, which stays open, for the next gateway.

mod session;

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use spore_control::Control;
use spore_control::door::Door;
use spore_node::node::Node;
use spore_wire::gateway::{FromGateway, ToGateway};
use spore_wire::generation::is_served;
use tokio_util::sync::CancellationToken;

use self::session::{Session, Speaker};
use super::gateway_process::{GatewayProcess, Greeted};

/// The pause before a broken link is made again.
const RELINK_PAUSE: Duration = Duration::from_millis(50);

/// The longest pause, when the gateway cannot be started at all.
const RELINK_PAUSE_MAX: Duration = Duration::from_secs(5);

/// How long a gateway that is replaced may finish what is in flight. New visitors wait for as long.
const REPLACE_DRAIN: Duration = Duration::from_secs(5);

/// Control's way to the gateway: to the session there is, or nowhere.
#[derive(Debug, Default)]
pub(crate) struct DoorQueue(Mutex<Option<Speaker>>);

impl Door for DoorQueue {
    fn send(&self, message: ToGateway) {
        let speaker = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Without a session it is lost: the next one is told everything.
        if let Some(speaker) = &*speaker {
            speaker.say(message, None);
        }
    }
}

impl DoorQueue {
    fn lead_to(&self, speaker: Option<Speaker>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = speaker;
    }
}

/// The link itself; [`Link::run`] keeps it up.
#[derive(Debug)]
pub(crate) struct Link {
    process: GatewayProcess,
    door: Arc<DoorQueue>,
    /// The visitors' socket, once there is one: it outlives every gateway.
    listener: Option<OwnedFd>,
}

/// Whether a gateway is to stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Term {
    Stays,
    Leaves,
}

/// A queue for control and the link that empties it.
pub(crate) fn link(process: GatewayProcess) -> (Arc<DoorQueue>, Link) {
    let door = Arc::new(DoorQueue::default());
    let link = Link {
        process,
        door: Arc::clone(&door),
        listener: None,
    };
    (door, link)
}

impl Link {
    /// Keeps the link up until `stop`; the gateway goes on without it.
    pub(crate) async fn run(mut self, control: Arc<Control>, node: Node, stop: CancellationToken) {
        let kept = async {
            let mut pause = RELINK_PAUSE;
            loop {
                match self.serve(&control, &node).await {
                    Ok(()) => pause = RELINK_PAUSE,
                    Err(error) => {
                        tracing::warn!(error = %format!("{error:#}"), "no link to the gateway");
                        pause = (pause * 2).min(RELINK_PAUSE_MAX);
                    }
                }
                tokio::time::sleep(pause).await;
            }
        };
        tokio::select! {
            () = kept => {}
            () = stop.cancelled() => {}
        }
    }

    /// One session, from the greeting to the end of the link.
    async fn serve(&mut self, control: &Control, node: &Node) -> Result<()> {
        let (greeted, term) = self.open().await?;
        let (speaker, session) = Session::begin(greeted.socket, node.clone());
        // Before control hears of the session: what it says then must arrive.
        self.door.lead_to(Some(speaker));
        control.door_event(greeted.hello);
        let ended = session.run(|message| control.door_event(message));
        if term == Term::Stays {
            let error = ended.await;
            self.door.lead_to(None);
            tracing::warn!(%error, "the link to the gateway broke");
            return Ok(());
        }
        let patience = REPLACE_DRAIN + Duration::from_secs(1);
        let ended = tokio::time::timeout(patience, ended).await;
        self.door.lead_to(None);
        if ended.is_err() {
            tracing::warn!("the gateway did not end in time");
        }
        self.process.see_off(Duration::ZERO)?;
        tracing::info!("the gateway made room for another one");
        Ok(())
    }

    /// A gateway that serves this daemon, found or started; or one that still has to leave.
    async fn open(&mut self) -> Result<(Greeted, Term)> {
        let found = match self.process.greet().await {
            Ok(found) => found,
            Err(error) => {
                // One that does not listen any more is no use to anybody.
                self.process.kill()?;
                return Err(error.context("the gateway is replaced"));
            }
        };
        let Some(mut greeted) = found else {
            return self.start().await;
        };
        let had = greeted.listener.take().or_else(|| self.listener.take());
        let FromGateway::Hello {
            generation, stamp, ..
        } = &greeted.hello
        else {
            return Ok((greeted, Term::Stays));
        };
        if is_served(*generation) && *stamp == self.process.stamp()? {
            self.listener = had;
            return Ok((greeted, Term::Stays));
        }
        // Made before the old one is told to go: a taken port leaves things as they are. One that
        // passes no socket on has its own until it ends.
        self.listener = had
            .map(|had| self.process.listener(Some(had)))
            .transpose()?;
        tracing::info!(stamp, "another gateway is found; it makes room");
        greeted.quit(REPLACE_DRAIN).await;
        if is_served(*generation) {
            return Ok((greeted, Term::Leaves));
        }
        drop(greeted);
        self.process.see_off(REPLACE_DRAIN)?;
        self.start().await
    }

    async fn start(&mut self) -> Result<(Greeted, Term)> {
        self.process.kill()?;
        let listener = self.process.listener(self.listener.take())?;
        let started = self.process.start(&listener);
        self.listener = Some(listener);
        started?;
        let greeted = self.process.greet().await?;
        let greeted = greeted.context("the gateway that was started is not there")?;
        Ok((greeted, Term::Stays))
    }
}
