//! Brings an app's output from its agent into the app's log, masked.
//!
//! Run by the VM's actor beside everything else; reads from the last line kept on, over as many
//! sessions as it takes. Never runs before the secrets to mask are known.

use core::time::Duration;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use spore_wire::guest::{LOG_LINE_BYTES_MAX, LogBatch};
use spore_wire::id::VmId;
use spore_wire::node::Owner;

use super::guest::AgentLink;
use super::mask::Masker;
use crate::log::{AppLog, LogLine};

/// The lines of a failed app that are shown.
pub(crate) const LAST_LINES_MAX: usize = 20;

/// The last lines of one VM, masked.
#[derive(Clone, Debug, Default)]
pub(crate) struct LastLines(Arc<Mutex<VecDeque<String>>>);

impl LastLines {
    pub(crate) fn push(&self, text: &str) {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() == LAST_LINES_MAX {
            lines.pop_front();
        }
        lines.push_back(text.chars().take(1000).collect());
    }

    pub(crate) fn get(&self) -> Vec<String> {
        let lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().cloned().collect()
    }
}

/// Collects one VM's output.
pub(crate) struct Collector {
    pub(crate) vm: VmId,
    pub(crate) owner: Owner,
    pub(crate) link: AgentLink,
    pub(crate) log: Arc<AppLog>,
    pub(crate) masker: Arc<Masker>,
    pub(crate) last_lines: LastLines,
}

impl Collector {
    /// Collects until it is dropped, or the agent says that there will be no more.
    pub(crate) async fn run(self) {
        const WAIT: Duration = Duration::from_secs(30);
        let log = Arc::clone(&self.log);
        let vm = self.vm;
        let blocking = tokio::task::spawn_blocking(move || log.last_sequence(vm));
        let mut last = blocking.await.unwrap_or(0);
        loop {
            let stream = match self.link.logs(last, WAIT).await {
                Ok(stream) => stream,
                Err(error) => {
                    tracing::debug!(%vm, %error, "the app's output is not to be had");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    continue;
                }
            };
            loop {
                match stream.next().await {
                    Ok(Some(batch)) => last = self.keep(batch, last).await,
                    Ok(None) => {
                        tokio::time::sleep(Duration::from_secs(1)).await;
                        break;
                    }
                    Err(_session_over) => break,
                }
            }
        }
    }

    /// Masks and writes one batch; gives the number of the last line kept.
    async fn keep(&self, batch: LogBatch, mut last: u64) -> u64 {
        let mut dropped = batch.dropped;
        let mut lines = Vec::with_capacity(batch.records.len());
        for record in batch.records {
            // A guest that counts backwards repeats itself.
            if record.sequence <= last {
                continue;
            }
            last = record.sequence;
            let mut text = self.masker.mask(&record.text);
            text.truncate(text.floor_char_boundary(LOG_LINE_BYTES_MAX));
            self.last_lines.push(&text);
            lines.push(LogLine {
                vm: self.vm,
                release: self.owner.release,
                sequence: record.sequence,
                at_us: record.at_us,
                from: record.from,
                text,
                dropped: core::mem::take(&mut dropped),
            });
        }
        let log = Arc::clone(&self.log);
        let written = tokio::task::spawn_blocking(move || log.append(&lines)).await;
        if let Err(error) = written {
            tracing::warn!(vm = %self.vm, %error, "a batch of an app's output is lost");
        }
        last
    }
}
