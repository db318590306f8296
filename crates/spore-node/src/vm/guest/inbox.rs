//! What a guest made us hold for one stream, and how much news it may tell.
//!
//! Used by the session alone. Every field is bounded: bytes by credit, log batches by number, the
//! rest by nature.

use core::time::Duration;
use std::collections::VecDeque;

use spore_wire::frame::FRAME_BYTES_MAX;
use spore_wire::guest::{AgentError, CREDIT_BYTES, LogBatch, OutputKind, Reply};
use tokio::time::Instant;

use super::session::SessionError;

/// Log batches that wait for their reader; more are dropped and counted.
const LOG_BATCHES_MAX: usize = 16;

/// News that a guest may tell in a burst, and how long each one beyond costs it.
const NEWS_BURST: u32 = 100;
const NEWS_INTERVAL: Duration = Duration::from_millis(10);

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
    pub(super) logs: VecDeque<LogBatch>,
    pub(super) logs_dropped: u64,
    pub(super) ended: bool,
    pub(super) outcome: Option<Result<Reply, AgentError>>,
}

/// How much news a guest may tell: beyond it each one costs the guest time, since its channel is
/// not read meanwhile. Another VM's session has its own task and waits for nothing.
pub(super) struct Budget {
    left: u32,
    at: Instant,
}

impl Budget {
    pub(super) fn new() -> Self {
        Self {
            left: NEWS_BURST,
            at: Instant::now(),
        }
    }

    pub(super) async fn spend(&mut self) {
        if self.at.elapsed() >= NEWS_INTERVAL * NEWS_BURST {
            *self = Self::new();
        }
        if self.left == 0 {
            tokio::time::sleep(NEWS_INTERVAL).await;
        } else {
            self.left -= 1;
        }
    }
}

impl Inbox {
    pub(super) const fn new() -> Self {
        Self {
            bytes: VecDeque::new(),
            runs: VecDeque::new(),
            of: OutputKind::Stdout,
            allowed: CREDIT_BYTES as usize,
            owed: 0,
            credit: CREDIT_BYTES as usize,
            logs: VecDeque::new(),
            logs_dropped: 0,
            ended: false,
            outcome: None,
        }
    }

    pub(super) fn push(&mut self, payload: &[u8]) -> Result<(), SessionError> {
        if payload.len() > self.allowed {
            return Err(SessionError::Protocol("more bytes than were allowed"));
        }
        if self.ended {
            return Err(SessionError::Protocol("bytes after the end"));
        }
        if payload.is_empty() {
            return Ok(());
        }
        self.allowed -= payload.len();
        self.bytes.extend(payload);
        match self.runs.back_mut() {
            Some((of, length)) if *of == self.of => *length += payload.len(),
            _ => self.runs.push_back((self.of, payload.len())),
        }
        Ok(())
    }

    pub(super) fn push_logs(&mut self, batch: LogBatch) {
        if self.logs.len() < LOG_BATCHES_MAX {
            self.logs.push_back(batch);
        } else {
            let records = u64::try_from(batch.records.len()).unwrap_or(u64::MAX);
            self.logs_dropped = self
                .logs_dropped
                .saturating_add(batch.dropped)
                .saturating_add(records);
        }
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
