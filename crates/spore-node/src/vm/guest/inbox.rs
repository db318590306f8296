//! What a guest made us hold for one stream, and how much work it may make us do.
//!
//! Used by the session alone. Every field is bounded: bytes and log batches by credit, the rest by
//! nature. What an agent may rightly say without end (news, log) is taken at a pace; what
//! no agent says in number ends the session.

use core::time::Duration;
use std::collections::VecDeque;

use spore_wire::frame::{FRAME_BYTES_MAX, HEADER_BYTES};
use spore_wire::guest::{AgentError, CREDIT_BYTES, LogBatch, OutputKind, Reply};
use tokio::time::Instant;

use super::session::SessionError;

/// News that a guest may tell in a burst, and how long each one beyond costs it.
const NEWS_BURST: u32 = 100;
const NEWS_INTERVAL: Duration = Duration::from_millis(10);

/// Unasked bytes that are taken at once, and how many a second beyond. Bytes that a stream's credit
/// paid for cost nothing of it.
const PACE_BURST: u64 = 4 * 1024 * 1024;
const PACE_A_SECOND: u64 = 4 * 1024 * 1024;

/// The shortest pause of a guest that said too much.
const PAUSE_MS_MIN: u64 = 5;

/// What a frame costs beside its bytes.
const FRAME_COST: usize = 64;

/// Bytes without use, frames that carry them included, that a session may begin with: an agent has
/// none to speak of.
pub(super) const WASTE_BYTES_MAX: usize = 1024 * 1024;

/// Added for each stream that this side cancelled: what was under way for it is nobody's. More than
/// fits the agent's outbox and the buffers on the way.
pub(super) const LATE_BYTES: usize = 4 * 1024 * 1024;

/// What a frame was worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Worth {
    /// It was paid for by credit.
    Paid,
    /// An agent may say it without end.
    Unasked,
    /// Nothing came of it.
    Waste,
}

/// What a frame with so much payload costs a guest.
pub(super) const fn cost(worth: Worth, payload: usize) -> usize {
    match worth {
        Worth::Paid => FRAME_COST,
        Worth::Unasked | Worth::Waste => FRAME_COST + HEADER_BYTES + payload,
    }
}

/// What came on a stream and was not taken yet. `bytes` holds at most [`CREDIT_BYTES`].
#[derive(Debug)]
pub(super) struct Inbox {
    pub(super) bytes: VecDeque<u8>,
    /// Which output the next so many bytes are of.
    pub(super) runs: VecDeque<(OutputKind, usize)>,
    pub(super) of: OutputKind,
    /// What the agent may still send.
    pub(super) allowed: usize,
    /// Taken, but not given back as credit yet.
    pub(super) owed: usize,
    /// What we may still send.
    pub(super) credit: usize,
    /// Whether log batches may come.
    pub(super) asked: Asked,
    /// With what each took of the credit.
    pub(super) logs: VecDeque<(LogBatch, usize)>,
    pub(super) logs_dropped: u64,
    /// Whether `of` was told and no byte has come since.
    of_is_news: bool,
    pub(super) ended: bool,
    pub(super) outcome: Option<Result<Reply, AgentError>>,
}

/// How much a guest may say: beyond it everything costs the guest time, since its channel is not
/// read meanwhile. Another VM's session has its own task and waits for nothing.
pub(super) struct Budget {
    news: u32,
    news_at: Instant,
    bytes: u64,
    bytes_at: Instant,
}

impl Budget {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Self {
            news: NEWS_BURST,
            news_at: now,
            bytes: PACE_BURST,
            bytes_at: now,
        }
    }

    pub(super) async fn spend_news(&mut self) {
        if self.news_at.elapsed() >= NEWS_INTERVAL * NEWS_BURST {
            self.news = NEWS_BURST;
            self.news_at = Instant::now();
        }
        if self.news == 0 {
            tokio::time::sleep(NEWS_INTERVAL).await;
        } else {
            self.news -= 1;
        }
    }

    pub(super) async fn spend(&mut self, cost: usize) {
        let cost = u64::try_from(cost).unwrap_or(u64::MAX);
        if cost > self.bytes {
            let us = u64::try_from(self.bytes_at.elapsed().as_micros()).unwrap_or(u64::MAX);
            let earned = us.saturating_mul(PACE_A_SECOND) / 1_000_000;
            self.bytes = self.bytes.saturating_add(earned).min(PACE_BURST);
            self.bytes_at = Instant::now();
        }
        if let Some(missing) = cost.checked_sub(self.bytes).filter(|missing| *missing > 0) {
            // A pause too short for a timer would never end a flood of small frames.
            let ms = (missing.saturating_mul(1000) / PACE_A_SECOND).max(PAUSE_MS_MIN);
            tokio::time::sleep(Duration::from_millis(ms)).await;
            self.bytes = self.bytes.saturating_add(ms * PACE_A_SECOND / 1000);
            self.bytes_at = Instant::now();
        }
        self.bytes = self.bytes.saturating_sub(cost);
    }
}

/// What a stream was opened for, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// Log records.
    Logs,
    /// Anything else.
    Other,
}

impl Inbox {
    pub(super) const fn new(asked: Asked) -> Self {
        Self {
            bytes: VecDeque::new(),
            runs: VecDeque::new(),
            of: OutputKind::Stdout,
            allowed: CREDIT_BYTES as usize,
            owed: 0,
            credit: CREDIT_BYTES as usize,
            asked,
            logs: VecDeque::new(),
            logs_dropped: 0,
            of_is_news: false,
            ended: false,
            outcome: None,
        }
    }

    pub(super) fn push(&mut self, payload: &[u8]) -> Result<Worth, SessionError> {
        if payload.len() > self.allowed {
            return Err(SessionError::Protocol("more bytes than were allowed"));
        }
        if self.ended {
            return Err(SessionError::Protocol("bytes after the end"));
        }
        if payload.is_empty() {
            return Ok(Worth::Waste);
        }
        self.of_is_news = false;
        self.allowed -= payload.len();
        self.bytes.extend(payload);
        match self.runs.back_mut() {
            Some((of, length)) if *of == self.of => *length += payload.len(),
            _ => self.runs.push_back((self.of, payload.len())),
        }
        Ok(Worth::Paid)
    }

    pub(super) const fn end(&mut self) -> Worth {
        if self.ended {
            return Worth::Waste;
        }
        self.ended = true;
        Worth::Unasked
    }

    pub(super) const fn switch(&mut self, of: OutputKind) -> Worth {
        self.of = of;
        if self.of_is_news {
            return Worth::Waste;
        }
        self.of_is_news = true;
        Worth::Unasked
    }

    /// An agent gives back what it was sent and no more.
    pub(super) fn credit(&mut self, bytes: u32) -> Worth {
        let most = CREDIT_BYTES as usize;
        let credit = self.credit.saturating_add(bytes as usize);
        self.credit = credit.min(most);
        if bytes == 0 || credit > most {
            Worth::Waste
        } else {
            Worth::Unasked
        }
    }

    /// Log records are paid for by credit, which bounds what waits here and on the way, and by the
    /// pace, which bounds how many come in a second.
    pub(super) fn push_logs(
        &mut self,
        batch: LogBatch,
        payload: usize,
    ) -> Result<Worth, SessionError> {
        if self.asked != Asked::Logs {
            return Err(SessionError::Protocol("log records that nobody asked for"));
        }
        let Some(allowed) = self.allowed.checked_sub(payload) else {
            return Err(SessionError::Protocol("more log than was allowed"));
        };
        self.allowed = allowed;
        if batch.records.is_empty() {
            self.logs_dropped = self.logs_dropped.saturating_add(batch.dropped);
            self.owed += payload;
            return Ok(Worth::Waste);
        }
        self.logs.push_back((batch, payload));
        Ok(Worth::Unasked)
    }

    /// The oldest log records that wait.
    pub(super) fn pop_logs(&mut self) -> Option<LogBatch> {
        let (mut batch, payload) = self.logs.pop_front()?;
        self.owed += payload;
        let dropped = core::mem::take(&mut self.logs_dropped);
        batch.dropped = batch.dropped.saturating_add(dropped);
        Some(batch)
    }

    /// How much to give back now: nothing until there is enough of it, or when it is over.
    pub(super) fn give(&mut self) -> Option<u32> {
        let open = self.outcome.is_none() && !self.ended;
        if !open || self.owed < CREDIT_BYTES as usize / 4 {
            return None;
        }
        let owed = core::mem::take(&mut self.owed);
        self.allowed += owed;
        Some(u32::try_from(owed).unwrap_or(CREDIT_BYTES))
    }

    pub(super) fn pop(&mut self) -> Option<(OutputKind, Vec<u8>)> {
        let (of, length) = self.runs.front_mut()?;
        let of = *of;
        let take = (*length).min(FRAME_BYTES_MAX);
        *length -= take;
        if *length == 0 {
            self.runs.pop_front();
        }
        self.owed += take;
        Some((of, self.bytes.drain(..take).collect()))
    }
}
