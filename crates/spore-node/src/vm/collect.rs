//! Brings an app's output from its agent into the app's log, masked.
//!
//! Run by the VM's actor beside everything else; reads from the last line kept on, over as many
//! sessions as it takes. Never runs before the secrets to mask are known.

use core::time::Duration;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use spore_wire::guest::{AppSecrets, LOG_LINE_BYTES_MAX, LogBatch, OutputKind};
use spore_wire::id::VmId;
use spore_wire::node::Owner;

use super::guest::AgentLink;
use super::mask::{Cut, LineEnd, MaskError, Masker, Masking};
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
    pub(crate) masking: Masking,
    pub(crate) secrets: Arc<AppSecrets>,
    pub(crate) last_lines: LastLines,
    /// Whether an earlier daemon may have kept lines of this VM.
    pub(crate) history: History,
}

/// What is in the log of this VM when a collector begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum History {
    /// Nothing.
    None,
    /// What an earlier daemon kept.
    Some,
}

impl Collector {
    /// Collects until it is dropped.
    pub(crate) async fn run(self) {
        const WAIT: Duration = Duration::from_secs(30);
        let vm = self.vm;
        let (link, keeper) = match self.keeper().await {
            Ok(begun) => begun,
            Err(error) => {
                tracing::error!(%vm, %error, "an app's output is not kept");
                return;
            }
        };
        let keeper = Arc::new(Mutex::new(keeper));
        loop {
            let last = lock(&keeper).last;
            let stream = match link.logs(last, WAIT).await {
                Ok(stream) => stream,
                Err(error) => {
                    tracing::debug!(%vm, %error, "the app's output is not to be had");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    continue;
                }
            };
            loop {
                match stream.next().await {
                    Ok(Some(batch)) => keep(&keeper, batch).await,
                    Ok(None) => {
                        tokio::time::sleep(Duration::from_secs(1)).await;
                        break;
                    }
                    Err(_session_over) => break,
                }
            }
        }
    }

    async fn keeper(self) -> Result<(AgentLink, Keeper), MaskError> {
        let masker = self.masking.made(self.secrets).await?;
        let (log, vm) = (Arc::clone(&self.log), self.vm);
        let last = match self.history {
            History::None => 0,
            History::Some => {
                let blocking = tokio::task::spawn_blocking(move || log.last_sequence(vm));
                blocking.await.unwrap_or(0)
            }
        };
        let keeper = Keeper {
            vm,
            release: self.owner.release,
            log: self.log,
            masker,
            last_lines: self.last_lines,
            last,
            stdout: Output::default(),
            stderr: Output::default(),
        };
        Ok((self.link, keeper))
    }
}

/// Masks and writes a batch, on a thread that may take its time: an app that prints as fast as it
/// can holds up no other. The next batch waits for it, and the guest for that.
async fn keep(keeper: &Arc<Mutex<Keeper>>, batch: LogBatch) {
    let keeper = Arc::clone(keeper);
    let kept = tokio::task::spawn_blocking(move || lock(&keeper).keep(batch)).await;
    if let Err(error) = kept {
        tracing::warn!(%error, "a batch of an app's output is lost");
    }
}

fn lock(keeper: &Mutex<Keeper>) -> MutexGuard<'_, Keeper> {
    keeper.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes lines of the log from an agent's records.
struct Keeper {
    vm: VmId,
    release: u64,
    log: Arc<AppLog>,
    masker: Masker,
    last_lines: LastLines,
    /// The number of the last record taken in.
    last: u64,
    stdout: Output,
    stderr: Output,
}

/// One of an app's two outputs.
#[derive(Default)]
struct Output {
    /// Of a line whose rest is still to come.
    cut: Cut,
    /// When that was printed.
    at_us: u64,
}

impl Keeper {
    fn keep(&mut self, batch: LogBatch) {
        let mut lines = Lines {
            of: self.line(),
            lines: Vec::with_capacity(batch.records.len()),
        };
        let mut dropped = batch.dropped;
        for record in batch.records {
            // A guest that counts backwards repeats itself.
            if record.sequence <= self.last {
                continue;
            }
            if dropped > 0 || record.sequence != self.last + 1 {
                self.end_cuts(&mut lines);
            }
            self.last = record.sequence;
            let end = if record.continues {
                LineEnd::Later
            } else {
                LineEnd::Here
            };
            let (output, masker) = self.output(record.from);
            output.at_us = record.at_us;
            let text = masker.mask_part(&mut output.cut, &record.text, end);
            if end == LineEnd::Here || !text.is_empty() {
                lines.of = LogLine {
                    sequence: record.sequence,
                    at_us: record.at_us,
                    from: record.from,
                    of_platform: false,
                    dropped: core::mem::take(&mut dropped),
                    ..lines.of
                };
                lines.add(&text);
            }
        }
        for line in &lines.lines {
            self.last_lines.push(&line.text);
        }
        self.log.append(lines.lines);
    }

    /// The rest of a line that was cut will not come: what waits for it is given as it is.
    fn end_cuts(&mut self, lines: &mut Lines) {
        for from in [OutputKind::Stdout, OutputKind::Stderr] {
            let sequence = self.last;
            let (output, masker) = self.output(from);
            let text = masker.mask_part(&mut output.cut, "", LineEnd::Here);
            if !text.is_empty() {
                lines.of.sequence = sequence;
                lines.of.at_us = output.at_us;
                lines.of.from = from;
                lines.add(&text);
            }
        }
    }

    fn output(&mut self, from: OutputKind) -> (&mut Output, &Masker) {
        let output = match from {
            OutputKind::Stdout => &mut self.stdout,
            OutputKind::Stderr => &mut self.stderr,
        };
        (output, &self.masker)
    }

    const fn line(&self) -> LogLine {
        LogLine {
            vm: self.vm,
            release: self.release,
            sequence: self.last,
            at_us: 0,
            from: OutputKind::Stdout,
            text: String::new(),
            of_platform: false,
            dropped: 0,
        }
    }
}

/// Lines under way to the log.
struct Lines {
    /// What the next one says beside its text.
    of: LogLine,
    lines: Vec<LogLine>,
}

impl Lines {
    /// One record's text, in as many lines as it takes: what was withheld comes before it, and a
    /// hostile guest may send more than a line at once.
    fn add(&mut self, mut text: &str) {
        loop {
            let (line, rest) = text.split_at(text.floor_char_boundary(LOG_LINE_BYTES_MAX));
            self.lines.push(LogLine {
                text: line.to_owned(),
                ..self.of.clone()
            });
            self.of.dropped = 0;
            text = rest;
            if text.is_empty() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use spore_wire::guest::{LOG_LINE_BYTES_MAX, LogBatch, LogRecord, OutputKind};
    use spore_wire::id::VmId;
    use spore_wire::secret::SecretBytes;

    use super::{Keeper, LastLines, Output};
    use crate::log::{AppLog, LogStore};
    use crate::vm::mask::Masker;

    fn keeper(folder: &std::path::Path) -> (Keeper, Arc<AppLog>) {
        let store = LogStore::new(folder.to_owned());
        let log = store.app("me", "notes").unwrap();
        let secret = SecretBytes::new(b"hunter2-and-more".to_vec());
        let keeper = Keeper {
            vm: VmId::from_bytes([1; 16]),
            release: 1,
            log: Arc::clone(&log),
            masker: Masker::new([&secret].into_iter()).unwrap(),
            last_lines: LastLines::default(),
            last: 0,
            stdout: Output::default(),
            stderr: Output::default(),
        };
        (keeper, log)
    }

    fn record(sequence: u64, from: OutputKind, text: &str, continues: bool) -> LogRecord {
        LogRecord {
            sequence,
            at_us: sequence,
            from,
            text: text.to_owned(),
            continues,
        }
    }

    fn batch(records: Vec<LogRecord>) -> LogBatch {
        LogBatch {
            records,
            dropped: 0,
        }
    }

    fn kept(log: &AppLog) -> Vec<(u64, String, u64)> {
        let lines = log.tail(100).unwrap().into_iter();
        lines
            .map(|line| (line.sequence, line.text, line.dropped))
            .collect()
    }

    #[test]
    fn a_secret_across_two_batches_is_masked_and_each_output_has_its_own_line() {
        let folder = tempfile::tempdir().unwrap();
        let (mut keeper, log) = keeper(folder.path());
        let (out, err) = (OutputKind::Stdout, OutputKind::Stderr);
        let long = "x".repeat(LOG_LINE_BYTES_MAX - 5);
        let first = format!("{long}hunte");
        keeper.keep(batch(vec![
            record(1, out, &first, true),
            record(2, err, "between", false),
        ]));
        keeper.keep(batch(vec![record(3, out, "r2-and-more!", false)]));
        let texts: Vec<String> = kept(&log).into_iter().map(|line| line.1).collect();
        assert_eq!(texts[1], "between");
        assert_eq!(format!("{}{}", texts[0], texts[2]), format!("{long}***!"));
        let last = keeper.last_lines.get();
        assert_eq!(last.len(), 3);
        assert!(!last.concat().contains("and-more"), "{last:?}");
    }

    #[test]
    fn what_waits_for_a_rest_that_was_dropped_is_given_before_the_gap() {
        let folder = tempfile::tempdir().unwrap();
        let (mut keeper, log) = keeper(folder.path());
        let out = OutputKind::Stdout;
        keeper.keep(batch(vec![record(1, out, "short", true)]));
        assert_eq!(kept(&log), []);
        keeper.keep(LogBatch {
            dropped: 7,
            records: vec![
                record(9, out, "later", false),
                record(9, out, "again", false),
            ],
        });
        let wanted = [(1, "short".to_owned(), 0), (9, "later".to_owned(), 7)];
        assert_eq!(kept(&log), wanted);
    }

    #[test]
    fn a_record_over_the_limit_becomes_several_lines() {
        let folder = tempfile::tempdir().unwrap();
        let (mut keeper, log) = keeper(folder.path());
        let text = "ä".repeat(LOG_LINE_BYTES_MAX);
        keeper.keep(batch(vec![record(1, OutputKind::Stdout, &text, false)]));
        let lines = log.tail(100).unwrap();
        let sizes = lines.iter().map(|line| line.text.len());
        assert!(sizes.max() <= Some(LOG_LINE_BYTES_MAX) && lines.len() == 2);
        assert_eq!(
            lines.into_iter().map(|line| line.text).collect::<String>(),
            text
        );
    }
}
