//! Leaves out log lines of which too many come.
//!
//! Wrapped by `log/mod.rs` around whatever formats lines: a visitor can bring lines about, and must
//! not wash away what else there is to read. What is written for a debugger only is not throttled.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use tracing::callsite::Identifier;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::FmtContext;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::registry::LookupSpan;

use super::LogFormat;

/// Lines of one kind that may come at once.
const BURST: u32 = 100;

/// The time after which one more of a kind may come.
const PACE: Duration = Duration::from_secs(1);

/// Leaves out lines of which too many came, and says with the next one how many those were. Lines
/// of one kind are those that one place in the program writes.
#[derive(Debug)]
pub(super) struct Throttled<F> {
    lines: F,
    format: LogFormat,
    throttle: Mutex<Throttle<Identifier>>,
}

#[derive(Debug)]
struct Throttle<K>(HashMap<K, Kind>);

#[derive(Debug)]
struct Kind {
    /// When the last one that was let through would have been due at the steady pace.
    due: Instant,
    left_out: u64,
}

impl<F> Throttled<F> {
    pub(super) fn new(lines: F, format: LogFormat) -> Self {
        let throttle = Mutex::new(Throttle(HashMap::new()));
        Self {
            lines,
            format,
            throttle,
        }
    }
}

impl<K: Eq + Hash> Throttle<K> {
    /// Whether one more line may come: then how many were left out before it.
    fn admit(&mut self, kind: K, now: Instant) -> Option<u64> {
        let kind = self.0.entry(kind).or_insert(Kind {
            due: now,
            left_out: 0,
        });
        let due = kind.due.max(now) + PACE;
        if due > now + PACE * BURST {
            kind.left_out = kind.left_out.saturating_add(1);
            return None;
        }
        kind.due = due;
        Some(std::mem::take(&mut kind.left_out))
    }
}

impl<S, N, F> FormatEvent<S, N> for Throttled<F>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
    N: for<'writer> FormatFields<'writer> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> std::fmt::Result {
        if *event.metadata().level() > Level::INFO {
            return self.lines.format_event(context, writer, event);
        }
        let kind = event.metadata().callsite();
        let mut throttle = self.throttle.lock().unwrap_or_else(PoisonError::into_inner);
        let admitted = throttle.admit(kind, Instant::now());
        drop(throttle);
        let Some(left_out) = admitted else {
            return Ok(());
        };
        if left_out > 0 {
            let note = format!("{left_out} lines like the next were left out");
            writeln!(writer, "{}", self.format.note(&note))?;
        }
        self.lines.format_event(context, writer, event)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::Mutex;

    use tokio::time::Instant;
    use tracing_subscriber::fmt::format::Format;

    use super::{BURST, PACE, Throttle, Throttled};
    use crate::log::{LogFormat, open};

    #[test]
    fn a_burst_passes_then_the_pace_holds_and_the_missing_are_counted() {
        let mut throttle = Throttle(HashMap::new());
        let began = Instant::now();
        for _line in 0..BURST {
            assert_eq!(throttle.admit("a", began), Some(0));
        }
        for _line in 0..5 {
            assert_eq!(throttle.admit("a", began), None);
        }
        assert_eq!(throttle.admit("b", began), Some(0));
        assert_eq!(throttle.admit("a", began + PACE), Some(5));
        assert_eq!(throttle.admit("a", began + PACE), None);
        assert_eq!(throttle.admit("a", began + 10 * PACE * BURST), Some(1));
    }

    #[test]
    fn a_visitor_who_repeats_himself_writes_few_lines() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.log");
        let subscriber = tracing_subscriber::fmt()
            .event_format(Throttled::new(Format::default(), LogFormat::Text))
            .with_writer(Mutex::new(open(&path).unwrap()))
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            for number in 0..10_000 {
                tracing::info!(number, "somebody asked");
            }
            tracing::info!("another line");
        });
        let text = std::fs::read_to_string(&path).unwrap();
        let lines = text.lines().count();
        assert!(lines < 200, "{lines}");
        assert!(text.contains("another line"), "{text}");
    }
}
