//! The host's side of an agent's channel: keeps a session open and hands out typed requests.
//!
//! Made by the VM's actor once it holds the VMM; used by it and, through the node, by whoever runs
//! programs and reads files in the guest. Everything from the guest is hostile: see [`session`].
//!
//! ```text
//!   Connecting ──session──▶ Up ──session over──▶ Connecting
//!       │ too many failures in a row, or the time for the first word is up
//!       ▼
//!     Lost(reason)
//! ```
//!
//! A session that ended soon after it began counts as a failure, so that an agent that greets well
//! and then breaks the protocol does not go on for ever.

mod inbox;
pub mod request;
pub mod session;

use core::time::Duration;
use std::sync::Arc;

pub(crate) use spore_wire::cause::chain;
use spore_wire::guest::{AgentError, AgentErrorCode, AgentHello, Event};
use thiserror::Error;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::hypervisor::Vm;
use crate::vm::tasks::{Scope, Tasks};

pub use request::{ExecStream, FileReader, FileWriter, LogStream};
pub use session::SessionTimes;
use session::{Session, SessionError, StreamError};

/// A session that lived this long was a good one.
const GOOD_SESSION: Duration = Duration::from_secs(30);

/// The most characters of a guest's text that are told on.
const TEXT_CHARS_MAX: usize = 400;

/// What the link tells the actor.
#[derive(Debug)]
pub enum LinkEvent {
    /// A session began.
    Up(AgentHello),
    /// The agent told something unasked.
    News(Event),
    /// There will be no more sessions.
    Lost(String),
}

/// How patient a link is.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Within a session.
    pub times: SessionTimes,
    /// From now to the agent's first word.
    pub first: Duration,
    /// Failures in a row after that.
    pub failures_max: u32,
}

/// Why something asked of a guest was not done.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum GuestError {
    /// There is no session, or it ended under the request.
    #[error("the guest's agent cannot be reached: {0}")]
    Unreachable(String),
    /// It took too long.
    #[error("the guest's agent did not answer within {0:?}: the guest may be overloaded")]
    Timeout(Duration),
    /// The agent refused.
    #[error("{message}")]
    Refused {
        /// For programs.
        code: AgentErrorCode,
        /// For people, by the agent.
        message: String,
    },
    /// Too much at once.
    #[error("too many requests are under way in this VM: wait until some are done")]
    TooMany,
    /// The request does not fit a message.
    #[error("the request is over 1 MiB: make its command, environment or secrets smaller")]
    TooLarge,
    /// The agent answered something else.
    #[error("the guest's agent gave an answer that does not fit: {0}")]
    Protocol(&'static str),
}

impl From<StreamError> for GuestError {
    fn from(error: StreamError) -> Self {
        match error {
            StreamError::Over(reason) => Self::Unreachable(reason),
            StreamError::TooMany => Self::TooMany,
            StreamError::TooLarge => Self::TooLarge,
        }
    }
}

impl From<AgentError> for GuestError {
    fn from(error: AgentError) -> Self {
        Self::Refused {
            code: error.code,
            message: clean(&error.message),
        }
    }
}

/// A guest's text, fit to be shown: short, one line, no control characters.
#[must_use]
pub fn clean(text: &str) -> String {
    text.chars()
        .take(TEXT_CHARS_MAX)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

#[derive(Clone, Debug)]
enum LinkState {
    Connecting,
    Up(Session),
    Lost(String),
}

/// The way to one VM's agent; clones share it. The last one gone ends its sessions.
#[derive(Clone, Debug)]
pub struct AgentLink {
    state: watch::Receiver<LinkState>,
    _scope: Arc<Scope>,
}

impl AgentLink {
    /// Begins to connect.
    pub(crate) fn new(
        vm: Arc<dyn Vm>,
        patience: Patience,
        tasks: &Tasks,
    ) -> (Self, mpsc::Receiver<LinkEvent>) {
        let (events, receiver) = mpsc::channel(64);
        let (publish, state) = watch::channel(LinkState::Connecting);
        let scope = tasks.scope();
        let run = Run {
            vm,
            patience,
            tasks: scope.tasks().clone(),
            events,
            publish,
        };
        scope.tasks().spawn(run.keep());
        let link = Self {
            state,
            _scope: Arc::new(scope),
        };
        (link, receiver)
    }

    /// The session, once there is one.
    pub(crate) async fn session(&self, wait: Duration) -> Result<Session, GuestError> {
        let mut state = self.state.clone();
        let settled = state.wait_for(|state| !matches!(state, LinkState::Connecting));
        let settled = tokio::time::timeout(wait, settled)
            .await
            .map_err(|_e| GuestError::Unreachable("it does not answer".to_owned()))?
            .map_err(|_e| GuestError::Unreachable("the VM is ending".to_owned()))?
            .clone();
        match settled {
            LinkState::Up(session) => Ok(session),
            LinkState::Lost(reason) => Err(GuestError::Unreachable(reason)),
            LinkState::Connecting => Err(GuestError::Unreachable("it is away".to_owned())),
        }
    }
}

/// The task that keeps a session open.
struct Run {
    vm: Arc<dyn Vm>,
    patience: Patience,
    tasks: Tasks,
    events: mpsc::Sender<LinkEvent>,
    publish: watch::Sender<LinkState>,
}

impl Run {
    async fn keep(self) {
        let begun = Instant::now();
        let mut failures = 0_u32;
        let mut broken = 0_u32;
        let mut spoke = false;
        loop {
            let reason = match self.one_session().await {
                Ok((reason, lived)) => {
                    spoke = true;
                    failures = if lived >= GOOD_SESSION {
                        1
                    } else {
                        failures + 1
                    };
                    reason
                }
                Err(error) => {
                    failures += 1;
                    let text = chain(&error);
                    broken += u32::from(error.is_breach());
                    let hopeless = matches!(error, SessionError::Generation(_));
                    if hopeless || broken > self.patience.failures_max {
                        return self.lose(text).await;
                    }
                    text
                }
            };
            let too_late = !spoke && begun.elapsed() >= self.patience.first;
            let too_often = spoke && failures > self.patience.failures_max;
            if too_late || too_often {
                return self.lose(reason).await;
            }
            tracing::debug!(%reason, failures, "the agent's session is over");
            // The first words are awaited eagerly: a waking visitor pays for every pause here.
            let pause = if spoke { failures.min(10) * 100 } else { 50 };
            tokio::time::sleep(Duration::from_millis(u64::from(pause))).await;
        }
    }

    async fn lose(self, reason: String) {
        self.publish.send_replace(LinkState::Lost(reason.clone()));
        // The actor may have ended; then nobody needs to know.
        drop(self.events.send(LinkEvent::Lost(reason)).await);
    }

    /// One session from beginning to end: why it ended and how long it lived.
    async fn one_session(&self) -> Result<(String, Duration), SessionError> {
        let stream = tokio::time::timeout(self.patience.times.hello, self.vm.agent())
            .await
            .map_err(|_e| SessionError::Silent)?
            .map_err(SessionError::Channel)?;
        let (news, mut told) = mpsc::channel(16);
        let (session, hello) =
            Session::open(stream, self.patience.times, &self.tasks, news).await?;
        let begun = Instant::now();
        // The actor knows of the session before anybody can use it.
        if self.events.send(LinkEvent::Up(hello)).await.is_err() {
            session.close();
            return Err(SessionError::Closed);
        }
        self.publish.send_replace(LinkState::Up(session.clone()));
        let reason = loop {
            tokio::select! {
                biased;
                Some(event) = told.recv() => {
                    if self.events.send(LinkEvent::News(event)).await.is_err() {
                        session.close();
                    }
                }
                reason = session.over() => break reason,
            }
        };
        self.publish.send_replace(LinkState::Connecting);
        Ok((reason, begun.elapsed()))
    }
}

#[cfg(test)]
mod tests;
