//! A visitor's request through the gateway: found, held, admitted, sent, answered.
//!
//! Follows the real gateway's `forward`, with bytes in memory. The task of a request belongs to the
//! gateway and is cut with it; whatever comes out, it is one [`Answer`].

use core::time::Duration;

use spore_wire::gateway::Admission;
use spore_wire::id::VmId;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::gateway::{ConnectError, Gateway, InFlight, PendingConnect, Refused, Target, Verdict};
use spore_wire::gateway::FromGateway;

use crate::link::Stream;

/// How long a request waits for the first table of routes.
const FIRST_TABLE: Duration = Duration::from_secs(10);

/// Requests in flight at once for one VM.
const IN_FLIGHT_MAX: u32 = 64;

/// The most bytes of an answer.
const ANSWER_BYTES_MAX: usize = 4096;

/// A body on its way: so many pieces with so long between them.
#[derive(Clone, Copy, Debug)]
pub struct Body {
    /// Pieces of ten bytes.
    pub pieces: u32,
    /// Before each piece.
    pub pause: Duration,
}

impl Body {
    /// No body.
    pub const NONE: Self = Self {
        pieces: 0,
        pause: Duration::ZERO,
    };
}

/// What a visitor gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The app's answer, with the VM that it names.
    Served(String),
    /// There is no such host.
    HostUnknown,
    /// The table of routes never came.
    TableMissing,
    /// The app is switched off.
    Disabled,
    /// It has no release.
    NoRelease,
    /// The gateway or control refused.
    Refused(Refused),
    /// It was not awake in time.
    WakeSlow,
    /// The app in this VM does not accept connections.
    ConnectFailed(VmId),
    /// No connection came in time.
    ConnectSlow,
    /// The VM ended under the request.
    VmDied(VmId),
    /// The app in this VM closed the connection without an answer.
    AppClosed(VmId),
    /// The gateway's process ended.
    Cut,
}

impl Answer {
    /// The VM that did not answer what it was sent, if that is what happened.
    #[must_use]
    pub const fn failed_in(&self) -> Option<VmId> {
        match self {
            Self::ConnectFailed(vm) | Self::VmDied(vm) | Self::AppClosed(vm) => Some(*vm),
            _ => None,
        }
    }
}

impl Gateway {
    /// Serves one request to `host`; one answer comes, whatever happens.
    pub async fn serve(&self, host: &str, body: Body) -> Answer {
        let (sender, receiver) = oneshot::channel();
        let gateway = self.clone();
        let host = host.to_owned();
        let over = self.0.over.clone();
        drop(tokio::spawn(async move {
            let forward = gateway.forward(&host, body);
            if let Some(answer) = over.run_until_cancelled(forward).await {
                drop(sender.send(answer));
            }
        }));
        receiver.await.unwrap_or(Answer::Cut)
    }

    async fn forward(&self, host: &str, body: Body) -> Answer {
        let target = match self.find(host).await {
            Ok(target) => target,
            Err(answer) => return answer,
        };
        match target.policy.admission {
            Admission::Open => {}
            Admission::Disabled => return Answer::Disabled,
            Admission::NoRelease => return Answer::NoRelease,
        }
        let limit = Duration::from_millis(target.policy.wake_deadline_ms);
        let deadline = Instant::now() + limit;
        loop {
            let mut waiter = self.enter(&target.app, &target.policy, IN_FLIGHT_MAX);
            let verdict = tokio::time::timeout_at(deadline, &mut waiter.receiver).await;
            let in_flight = match verdict {
                Ok(Ok(Verdict::Admitted(in_flight))) => in_flight,
                Ok(Ok(Verdict::Refused(why))) => return Answer::Refused(why),
                Ok(Err(_gone)) => {
                    let text = format!("{}: a request lost its place", target.app);
                    self.0.trace.violation(text);
                    return Answer::WakeSlow;
                }
                Err(_elapsed) => return Answer::WakeSlow,
            };
            drop(waiter);
            let (stream, kept) = match in_flight.incarnation.take() {
                Some(stream) => (stream, true),
                None => match self.open(&in_flight, deadline).await {
                    Ok(Some(stream)) => (stream, false),
                    // It ended meanwhile; nothing was sent, so the next one may be woken.
                    Ok(None) => continue,
                    Err(answer) => return answer,
                },
            };
            match exchange(&in_flight, stream, host, body).await {
                Exchange::Answered(answer) => return answer,
                Exchange::Unsent if !kept && !in_flight.incarnation.gone.is_cancelled() => {
                    return Answer::AppClosed(in_flight.vm);
                }
                Exchange::Unsent => {}
            }
        }
    }

    async fn find(&self, host: &str) -> Result<Target, Answer> {
        let known = || self.inner().routes.get(host).cloned();
        if let Some(target) = known() {
            return Ok(target);
        }
        let until = Instant::now() + FIRST_TABLE;
        while !self.inner().is_whole {
            let whole = self.0.became_whole.notified();
            if tokio::time::timeout_at(until, whole).await.is_err() {
                return Err(Answer::TableMissing);
            }
        }
        known().ok_or(Answer::HostUnknown)
    }

    async fn open(
        &self,
        in_flight: &InFlight,
        deadline: Instant,
    ) -> Result<Option<Stream>, Answer> {
        let (sender, receiver) = oneshot::channel();
        let vm = in_flight.vm;
        let id = {
            let mut inner = self.inner();
            let id = inner.next_connect;
            inner.next_connect += 1;
            inner.connects.insert(id, PendingConnect { vm, sender });
            inner.say(FromGateway::Connect { id, vm });
            id
        };
        let connected = tokio::select! {
            biased;
            () = in_flight.incarnation.gone.cancelled() => Ok(Ok(Err(ConnectError::Gone))),
            connected = tokio::time::timeout_at(deadline, receiver) => connected,
        };
        let pending = self.inner().connects.remove(&id);
        drop(pending);
        match connected {
            Ok(Ok(Ok(stream))) => Ok(Some(stream)),
            Ok(Ok(Err(ConnectError::Gone)) | Err(_)) => Ok(None),
            Ok(Ok(Err(ConnectError::Failed(reason)))) => {
                self.0.trace.say(format!("no connection to {vm}: {reason}"));
                Err(Answer::ConnectFailed(vm))
            }
            Err(_elapsed) => Err(Answer::ConnectSlow),
        }
    }
}

enum Exchange {
    Answered(Answer),
    /// Not a byte went out.
    Unsent,
}

async fn exchange(in_flight: &InFlight, mut stream: Stream, host: &str, body: Body) -> Exchange {
    let length = body.pieces * 10;
    let head = format!("POST / HTTP/1.1\r\nhost: {host}\r\ncontent-length: {length}\r\n\r\n");
    let gone = in_flight.incarnation.gone.clone();
    if gone.is_cancelled() || stream.write_all(head.as_bytes()).await.is_err() {
        return Exchange::Unsent;
    }
    let talk = async {
        for _piece in 0..body.pieces {
            tokio::time::sleep(body.pause).await;
            stream.write_all(b"0123456789").await.ok()?;
        }
        read_answer(&mut stream).await
    };
    let Some(answered) = gone.run_until_cancelled(talk).await else {
        return Exchange::Answered(Answer::VmDied(in_flight.vm));
    };
    Exchange::Answered(match answered {
        Some(tag) => {
            in_flight.incarnation.keep(stream);
            Answer::Served(tag)
        }
        None => Answer::AppClosed(in_flight.vm),
    })
}

async fn read_answer(stream: &mut Stream) -> Option<String> {
    let mut held = Vec::new();
    loop {
        let mut buffer = [0; 1024];
        let got = stream.read(&mut buffer).await.ok()?;
        if got == 0 || held.len() > ANSWER_BYTES_MAX {
            return None;
        }
        held.extend_from_slice(&buffer[..got]);
        let text = String::from_utf8_lossy(&held);
        let Some((head, body)) = text.split_once("\r\n\r\n") else {
            continue;
        };
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("content-length: "))?;
        if body.len() >= length.parse().ok()? {
            return Some(body.to_owned());
        }
    }
}

/// The VM that an answer names.
#[must_use]
pub fn tag(text: &str) -> Option<VmId> {
    text.parse().ok()
}
