//! What the app prints, as numbered lines in a bounded ring.
//!
//! Fed by [`crate::runner`], read by log streams of [`crate::agent`]. Pure: no clock, no IO. Memory
//! is bounded by [`LOG_RING_BYTES`] and one unfinished line per output, however much an app prints.

use std::collections::VecDeque;

use spore_wire::guest::{LOG_LINE_BYTES_MAX, LOG_RING_BYTES, LogBatch, LogRecord, OutputKind};

/// What one record costs beside its text.
const RECORD_OVERHEAD_BYTES: usize = 120;

/// The most bytes of one encoded batch: it must fit a frame beside its envelope.
const BATCH_BYTES_MAX: usize = 60 * 1024;

/// A line, or a part of one that was too long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Without its end.
    pub text: String,
    /// Whether the next part follows.
    pub continues: bool,
}

impl From<String> for Line {
    /// A whole line.
    fn from(text: String) -> Self {
        Self {
            text,
            continues: false,
        }
    }
}

/// The last lines of the app, oldest first.
#[derive(Debug, Default)]
pub struct LogRing {
    records: VecDeque<LogRecord>,
    bytes: usize,
    last: u64,
}

impl LogRing {
    /// Adds one line and drops the oldest ones for which there is no more room.
    pub fn push(&mut self, at_us: u64, from: OutputKind, line: Line) {
        let Line { text, continues } = line;
        self.last += 1;
        self.bytes += text.len() + RECORD_OVERHEAD_BYTES;
        self.records.push_back(LogRecord {
            sequence: self.last,
            at_us,
            from,
            text,
            continues,
        });
        while self.bytes > LOG_RING_BYTES
            && let Some(oldest) = self.records.pop_front()
        {
            self.bytes -= oldest.text.len() + RECORD_OVERHEAD_BYTES;
        }
    }

    /// The sequence number of the newest record; 0 when there was none.
    #[must_use]
    pub const fn last(&self) -> u64 {
        self.last
    }

    /// The next records after `cursor`, as many as fit one frame, and moves the cursor behind
    /// them. `None` when there is nothing new.
    pub fn batch(&self, cursor: &mut u64) -> Option<LogBatch> {
        let first = self.records.front()?.sequence;
        if *cursor >= self.last {
            return None;
        }
        let from = first.max(*cursor + 1);
        let mut batch = LogBatch {
            records: Vec::new(),
            dropped: from - (*cursor + 1),
        };
        let skip = usize::try_from(from - first).unwrap_or(usize::MAX);
        let mut bytes = 0;
        for record in self.records.iter().skip(skip) {
            bytes += encoded_bytes(&record.text) + RECORD_OVERHEAD_BYTES;
            if bytes > BATCH_BYTES_MAX && !batch.records.is_empty() {
                break;
            }
            *cursor = record.sequence;
            batch.records.push(record.clone());
        }
        Some(batch)
    }
}

/// An upper limit of what `text` takes as a JSON string.
fn encoded_bytes(text: &str) -> usize {
    text.bytes()
        .map(|byte| match byte {
            b'"' | b'\\' => 2,
            0..=31 | 127 => 6,
            _ => 1,
        })
        .sum()
}

/// Cuts one output into lines of at most [`LOG_LINE_BYTES_MAX`] bytes.
#[derive(Debug, Default)]
pub struct LineCutter {
    partial: Vec<u8>,
}

impl LineCutter {
    /// Drops what is of an unfinished line.
    pub fn forget(&mut self) {
        self.partial.clear();
    }

    /// Takes bytes of the output and gives every line that is whole to `line`.
    pub fn feed(&mut self, mut bytes: &[u8], mut line: impl FnMut(Line)) {
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            self.extend(&bytes[..end], &mut line);
            self.flush_line(&mut line);
            bytes = &bytes[end + 1..];
        }
        self.extend(bytes, &mut line);
    }

    /// Gives what is left when the output has ended.
    pub fn finish(&mut self, mut line: impl FnMut(Line)) {
        if !self.partial.is_empty() {
            self.flush_line(&mut line);
        }
    }

    fn extend(&mut self, bytes: &[u8], line: &mut impl FnMut(Line)) {
        for part in bytes.chunks(LOG_LINE_BYTES_MAX) {
            self.partial.extend_from_slice(part);
            while self.partial.len() > LOG_LINE_BYTES_MAX {
                let at = cut_at(&self.partial);
                let rest = self.partial.split_off(at);
                emit(&self.partial, true, line);
                self.partial = rest;
            }
        }
    }

    fn flush_line(&mut self, line: &mut impl FnMut(Line)) {
        if self.partial.last() == Some(&b'\r') {
            self.partial.pop();
        }
        emit(&self.partial, false, line);
        self.partial.clear();
    }
}

/// Where to cut a line that is too long: not in the middle of a character.
fn cut_at(bytes: &[u8]) -> usize {
    let continues = |at: usize| bytes.get(at).is_some_and(|byte| byte & 0xc0 == 0x80);
    (LOG_LINE_BYTES_MAX - 3..=LOG_LINE_BYTES_MAX)
        .rev()
        .find(|at| !continues(*at))
        .unwrap_or(LOG_LINE_BYTES_MAX)
}

/// Gives the text of `bytes`, in several parts when replacing bad bytes has made it too long.
fn emit(bytes: &[u8], continues: bool, line: &mut impl FnMut(Line)) {
    let text = String::from_utf8_lossy(bytes);
    let mut rest = text.as_ref();
    while rest.len() > LOG_LINE_BYTES_MAX {
        let at = rest.floor_char_boundary(LOG_LINE_BYTES_MAX);
        line(Line {
            text: rest[..at].to_owned(),
            continues: true,
        });
        rest = &rest[at..];
    }
    line(Line {
        text: rest.to_owned(),
        continues,
    });
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, prop, prop_assert, prop_assert_eq, proptest};
    use spore_wire::frame::FRAME_BYTES_MAX;
    use spore_wire::guest::{
        AgentMessage, LOG_LINE_BYTES_MAX, LOG_RING_BYTES, LogBatch, OutputKind,
    };

    use super::{Line, LineCutter, LogRing};

    fn lines(parts: &[&[u8]]) -> Vec<String> {
        let mut cutter = LineCutter::default();
        let mut out = Vec::new();
        for part in parts {
            cutter.feed(part, |line| out.push(line));
        }
        cutter.finish(|line| out.push(line));
        let goes_on = out.last().is_some_and(|line| line.continues);
        assert!(!goes_on, "the last part says that another follows");
        out.into_iter().map(|line| line.text).collect()
    }

    #[test]
    fn lines_are_whole_however_they_come() {
        assert_eq!(
            lines(&[b"a", b"b\nc\r\n", b"\n", b"end"]),
            ["ab", "c", "", "end"]
        );
    }

    #[test]
    fn a_long_line_is_cut_between_characters() {
        let text = "ä".repeat(LOG_LINE_BYTES_MAX);
        let parts = lines(&[text.as_bytes()]);
        assert_eq!(parts.concat(), text);
        assert!(parts.iter().all(|part| part.len() <= LOG_LINE_BYTES_MAX));
    }

    #[test]
    fn every_part_of_a_cut_line_but_the_last_says_that_it_goes_on() {
        let mut cutter = LineCutter::default();
        let mut out = Vec::new();
        cutter.feed(&vec![0xff; LOG_LINE_BYTES_MAX + 10], |line| out.push(line));
        cutter.feed(b"\nwhole\n", |line| out.push(line));
        let goes_on: Vec<bool> = out.iter().map(|line| line.continues).collect();
        let (ends, parts) = goes_on.split_last().unwrap();
        let (last, parts) = parts.split_last().unwrap();
        assert!(!ends && !last, "{goes_on:?}");
        assert!(parts.len() > 1 && parts.iter().all(|goes_on| *goes_on));
    }

    #[test]
    fn a_flood_costs_no_more_than_the_ring() {
        let mut ring = LogRing::default();
        for _line in 0..20_000 {
            ring.push(1, OutputKind::Stdout, "x".repeat(500).into());
        }
        assert!(ring.bytes <= LOG_RING_BYTES);
        let mut cursor = 0;
        let batch = ring.batch(&mut cursor).unwrap();
        assert_eq!(batch.dropped + 1, batch.records[0].sequence);
        assert!(batch.dropped > 18_000);
    }

    #[test]
    fn the_worst_line_still_fits_a_frame() {
        let mut ring = LogRing::default();
        for _line in 0..30 {
            let text = "\u{1}".repeat(LOG_LINE_BYTES_MAX);
            let continues = true;
            ring.push(1, OutputKind::Stderr, Line { text, continues });
        }
        let mut cursor = 0;
        while let Some(batch) = ring.batch(&mut cursor) {
            let text = serde_json::to_vec(&AgentMessage::Logs(batch)).unwrap();
            assert!(text.len() <= FRAME_BYTES_MAX, "{}", text.len());
        }
        assert_eq!(cursor, 30);
    }

    proptest! {
        #[test]
        fn every_record_is_delivered_or_counted(
            pushes in prop::collection::vec((0_usize..9000, any::<bool>()), 0..300),
        ) {
            let mut ring = LogRing::default();
            let (mut cursor, mut seen, mut dropped) = (0, 0, 0);
            let mut take = |batch: LogBatch| {
                dropped += batch.dropped;
                seen += batch.records.len() as u64;
            };
            for (len, read) in &pushes {
                ring.push(1, OutputKind::Stdout, "y".repeat(*len).into());
                if *read && let Some(batch) = ring.batch(&mut cursor) {
                    take(batch);
                }
            }
            while let Some(batch) = ring.batch(&mut cursor) {
                take(batch);
            }
            prop_assert_eq!(seen + dropped, pushes.len() as u64);
            prop_assert!(ring.bytes <= LOG_RING_BYTES);
        }

        #[test]
        fn cutting_bounds_every_line_and_loses_no_character(
            parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..9000), 0..6),
        ) {
            let whole: Vec<u8> = parts.concat();
            let borrowed: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
            let out = lines(&borrowed);
            prop_assert!(out.iter().all(|line| line.len() <= LOG_LINE_BYTES_MAX));
            let newlines = whole.iter().filter(|byte| **byte == b'\n').count();
            prop_assert!(out.len() >= newlines);
        }
    }
}
