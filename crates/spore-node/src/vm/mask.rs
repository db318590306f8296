//! Takes an app's secret values out of what the platform keeps of its output.
//!
//! Made once per VM, where it may block, before its app can know a secret; used by the log
//! collector before anything is written or handed out, and for what a failure quotes. Never prints
//! a value itself.
//!
//! What is masked, and what is not:
//!
//! - A value as it is, of many lines line by line, and in JSON, percent, base64 and hexadecimal.
//!   A longer one is met in pieces of [`PIECE_BYTES`], so most of a part of it is masked too.
//! - Across two records where the agent had to cut a line; not across lines that an app printed.
//! - Not: values and lines under [`MASKED_BYTES_MIN`], blank ones, and what an app prints in
//!   another shape or in smaller pieces. Shapes beyond [`PATTERN_BYTES_MAX`] in all are left out,
//!   other shapes before plain ones, and the daemon's log says so.

use core::fmt;
use std::ops::Range;
use std::sync::Arc;

use aho_corasick::{AhoCorasick, AhoCorasickKind, BuildError, Input, MatchKind};
use data_encoding::{BASE64, BASE64_NOPAD, BASE64URL_NOPAD, HEXLOWER};
use spore_wire::guest::AppSecrets;
use spore_wire::secret::SecretBytes;
use thiserror::Error;
use tokio::sync::OnceCell;
use tokio::task::JoinError;
use zeroize::Zeroizing;

/// Shorter values are left alone: taking out every `7` would leave no log.
pub const MASKED_BYTES_MIN: usize = 4;

/// Longer values are met piece by piece. It bounds the work of a search, which looks at a byte at
/// most once per match that it lies in, and what of a cut line waits for the rest.
pub const PIECE_BYTES: usize = 64;

/// The most bytes of all shapes of a VM's values; each takes some 16 bytes of memory. All secrets
/// of an app fit one message, so their plain shapes always fit.
pub const PATTERN_BYTES_MAX: usize = 1024 * 1024;

/// What stands where a value was.
pub const MASK: &str = "***";

/// The values to take out.
#[derive(Clone, Default)]
pub struct Masker {
    /// `None` knows no value. It holds the values in a form of its own, which cannot be zeroized.
    pieces: Option<AhoCorasick>,
    /// Of the longest piece.
    longest: usize,
}

/// What was withheld of a cut line, since a value may begin there.
#[derive(Default)]
pub struct Cut {
    text: Zeroizing<String>,
    /// So many of its bytes belong to a value that began before it.
    masked: usize,
}

/// Whether a record's line goes on in the next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LineEnd {
    /// It ends here.
    Here,
    /// It was cut.
    Later,
}

impl fmt::Debug for Masker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pieces = self.pieces.as_ref().map_or(0, AhoCorasick::patterns_len);
        write!(f, "Masker({pieces} pieces)")
    }
}

impl fmt::Debug for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cut({} bytes)", self.text.len())
    }
}

impl Masker {
    /// Knows these values. Takes a while where there are many, so it is called where it may block.
    ///
    /// # Errors
    /// Too much for one automaton, which [`PATTERN_BYTES_MAX`] excludes.
    pub fn new<'a>(secrets: impl Iterator<Item = &'a SecretBytes>) -> Result<Self, BuildError> {
        let mut pieces = Pieces::default();
        pieces.add(&secrets.map(SecretBytes::expose).collect::<Vec<_>>());
        if pieces.left_out > 0 {
            let left_out = pieces.left_out;
            tracing::warn!(left_out, "shapes of large secrets are not masked in logs");
        }
        if pieces.held.is_empty() {
            return Ok(Self::default());
        }
        let longest = pieces.held.iter().map(|piece| piece.len()).max();
        let automaton = AhoCorasick::builder()
            .kind(Some(AhoCorasickKind::ContiguousNFA))
            .match_kind(MatchKind::LeftmostLongest)
            .prefilter(false)
            .build(pieces.held.iter().map(|piece| piece.as_bytes()))?;
        Ok(Self {
            pieces: Some(automaton),
            longest: longest.unwrap_or(0),
        })
    }

    /// The text without the values.
    #[must_use]
    pub fn mask(&self, text: &str) -> String {
        self.mask_part(&mut Cut::default(), text, LineEnd::Here)
    }

    /// A part of a line without the values, behind what `cut` withheld of the part before. Gives
    /// and withholds in all what [`Self::mask`] would give of the whole line.
    #[must_use]
    pub fn mask_part(&self, cut: &mut Cut, part: &str, end: LineEnd) -> String {
        if self.pieces.is_none() {
            return part.to_owned();
        }
        let mut text = core::mem::take(&mut cut.text);
        text.push_str(part);
        let before = core::mem::take(&mut cut.masked);
        // Whatever begins before this point has its end in this text.
        let given = match end {
            LineEnd::Here => text.len(),
            LineEnd::Later => {
                text.floor_char_boundary((text.len() + 1).saturating_sub(self.longest))
            }
        };
        if given == 0 {
            *cut = Cut {
                text,
                masked: before,
            };
            return String::new();
        }
        let mut masked = String::with_capacity(given);
        let mut at = 0;
        for span in self.spans(&text, before) {
            if span.start >= given {
                break;
            }
            masked.push_str(&text[at..span.start]);
            masked.push_str(MASK);
            at = span.end;
        }
        masked.push_str(text.get(at..given).unwrap_or_default());
        cut.masked = at.saturating_sub(given);
        cut.text.push_str(&text[given..]);
        masked
    }

    /// Where values are, in order and apart; the first `before` bytes belong to one.
    fn spans(&self, text: &str, before: usize) -> Vec<Range<usize>> {
        let mut spans: Vec<Range<usize>> = Vec::new();
        spans.extend((before > 0).then_some(0..before));
        let mut from = 0;
        while let Some(found) = self
            .pieces
            .as_ref()
            .and_then(|pieces| pieces.find(Input::new(text).range(from..)))
        {
            // From the next byte on: another value may begin inside this one.
            from = found.start() + 1;
            match spans.last_mut() {
                Some(last) if last.end >= found.start() => last.end = last.end.max(found.end()),
                _ => spans.push(found.range()),
            }
        }
        spans
    }
}

/// The masker of one VM, made once and off the runtime; clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Masking(Arc<OnceCell<Masker>>);

/// Why nothing can be masked: then nothing of an app's output is kept.
#[derive(Debug, Error)]
pub(crate) enum MaskError {
    /// It was too much for one automaton.
    #[error("cannot mask the app's secrets")]
    Build(#[from] BuildError),
    /// The worker ended.
    #[error("the worker that prepares the masking of secrets ended")]
    Worker(#[from] JoinError),
}

impl Masking {
    /// The masker of these values, made by whoever asks first.
    pub(crate) async fn made(&self, secrets: Arc<AppSecrets>) -> Result<Masker, MaskError> {
        let make = || async {
            if secrets.environment.is_empty() && secrets.files.is_empty() {
                return Ok(Masker::default());
            }
            let work = move || {
                let values = secrets.environment.iter().chain(&secrets.files);
                Masker::new(values.map(|(_name, value)| value))
            };
            Ok(tokio::task::spawn_blocking(work).await??)
        };
        self.0.get_or_try_init(make).await.cloned()
    }

    /// The text without the values. Before the masker is made no app knows them.
    pub(crate) fn mask(&self, text: &str) -> String {
        let masker = self.0.get();
        masker.map_or_else(|| text.to_owned(), |masker| masker.mask(text))
    }
}

/// The pieces of all values.
#[derive(Default)]
struct Pieces {
    held: Vec<Zeroizing<String>>,
    bytes: usize,
    left_out: usize,
}

impl Pieces {
    /// Plain shapes of all values come before other shapes of any.
    fn add(&mut self, values: &[&[u8]]) {
        for shape in SHAPES {
            for value in values {
                self.add_shape(value, shape);
                // A log is made of lines, so a value of many lines is never met whole.
                for line in value.split(|byte| *byte == b'\n') {
                    let line = line.strip_suffix(b"\r").unwrap_or(line);
                    if line.len() < value.len() {
                        self.add_shape(line, shape);
                    }
                }
            }
        }
        self.held
            .sort_unstable_by(|one, other| one.as_str().cmp(other));
        self.held.dedup();
    }

    fn add_shape(&mut self, value: &[u8], shape: fn(&[u8]) -> String) {
        if value.len() < MASKED_BYTES_MIN || value.trim_ascii().is_empty() {
            return;
        }
        let text = Zeroizing::new(shape(value));
        if self.bytes + text.len() > PATTERN_BYTES_MAX {
            self.left_out += 1;
            return;
        }
        self.bytes += text.len();
        let mut rest = text.as_str();
        while rest.len() > PIECE_BYTES {
            let (piece, later) = rest.split_at(rest.floor_char_boundary(PIECE_BYTES));
            self.add_piece(piece);
            rest = later;
        }
        // The last piece is as long as the others: a short one would be met everywhere.
        let last = text.len().saturating_sub(PIECE_BYTES);
        self.add_piece(&text[text.ceil_char_boundary(last)..]);
    }

    fn add_piece(&mut self, piece: &str) {
        if !piece.trim().is_empty() {
            self.held.push(Zeroizing::new(piece.to_owned()));
        }
    }
}

/// How a value may be printed, the likeliest first.
const SHAPES: [fn(&[u8]) -> String; 7] = [
    plain,
    json,
    |value| BASE64.encode(value),
    |value| BASE64_NOPAD.encode(value),
    |value| BASE64URL_NOPAD.encode(value),
    percent,
    |value| HEXLOWER.encode(value),
];

/// A line, with what is not UTF-8 replaced as the agent does. What has many lines is never met.
fn plain(value: &[u8]) -> String {
    if value.contains(&b'\n') {
        return String::new();
    }
    String::from_utf8_lossy(value).into_owned()
}

/// As inside the quotes of a JSON string.
fn json(value: &[u8]) -> String {
    let text = Zeroizing::new(String::from_utf8_lossy(value).into_owned());
    let quoted = serde_json::to_string(text.as_str()).map(Zeroizing::new);
    let quoted = quoted.unwrap_or_default();
    let inside = quoted
        .strip_prefix('"')
        .and_then(|rest| rest.strip_suffix('"'));
    inside.unwrap_or_default().to_owned()
}

/// As in a form or a query: everything but unreserved characters.
fn percent(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() * 3);
    for byte in bytes {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            text.push(char::from(*byte));
        } else {
            text.push_str(&format!("%{byte:02X}"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, prop, prop_assert_eq, proptest};
    use spore_wire::secret::SecretBytes;

    use super::{Cut, LineEnd, MASK, Masker, PATTERN_BYTES_MAX, PIECE_BYTES};

    fn masker(values: &[&[u8]]) -> Masker {
        let secrets: Vec<SecretBytes> = values
            .iter()
            .map(|value| SecretBytes::new(value.to_vec()))
            .collect();
        Masker::new(secrets.iter()).unwrap()
    }

    #[test]
    fn a_value_is_taken_out_in_every_known_shape() {
        let masker = masker(&[b"hunter2 & \"co\""]);
        let text = "plain hunter2 & \"co\", json hunter2 & \\\"co\\\", \
                    url hunter2%20%26%20%22co%22, base64 aHVudGVyMiAmICJjbyI=";
        assert_eq!(
            masker.mask(text),
            "plain ***, json ***, url ***, base64 ***"
        );
    }

    #[test]
    fn a_value_of_many_lines_is_taken_out_of_each_line() {
        let masker = masker(&[b"-----BEGIN\nMIIEow\n-----END"]);
        assert_eq!(masker.mask("x MIIEow y"), "x *** y");
    }

    #[test]
    fn the_longer_of_two_values_goes_first() {
        let masker = masker(&[b"token", b"token-and-more"]);
        assert_eq!(masker.mask("token-and-more token"), "*** ***");
    }

    #[test]
    fn a_value_too_short_to_hide_is_left() {
        assert_eq!(masker(&[b"7"]).mask("7 of 17"), "7 of 17");
    }

    #[test]
    fn two_values_that_share_bytes_are_both_taken_out() {
        let masker = masker(&[b"secret-abcd", b"abcd-other"]);
        assert_eq!(masker.mask("<secret-abcd-other>"), "<***>");
    }

    #[test]
    fn a_long_value_is_taken_out_whole_and_in_its_pieces() {
        let letters = (b'a'..b'x').cycle();
        let value: Vec<u8> = letters.take(10 * PIECE_BYTES + 7).collect();
        let masker = masker(&[&value]);
        let text = String::from_utf8(value).unwrap();
        assert_eq!(masker.mask(&format!("<{text}>")), "<***>");
        let half = masker.mask(&text[..5 * PIECE_BYTES + 1]);
        assert!(half.len() < PIECE_BYTES, "{half}");
    }

    #[test]
    fn blank_values_and_lines_are_left() {
        let masker = masker(&[b"        ", b"first-line\n          \nlast-line"]);
        assert_eq!(masker.mask("a          b first-line"), "a          b ***");
    }

    #[test]
    fn a_value_across_a_cut_is_taken_out_and_nothing_else_is_lost() {
        let masker = masker(&[b"hunter2-and-more"]);
        let line = "the password is hunter2-and-more, is it not";
        for at in 0..line.len() {
            let mut cut = Cut::default();
            let mut given = masker.mask_part(&mut cut, &line[..at], LineEnd::Later);
            given.push_str(&masker.mask_part(&mut cut, &line[at..], LineEnd::Here));
            let given = given.replace("******", MASK);
            assert_eq!(given, "the password is ***, is it not", "cut at {at}");
        }
    }

    #[test]
    fn plain_shapes_of_the_most_secrets_fit_and_the_rest_is_left_out() {
        let lines = |seed: u64| -> Vec<u8> {
            let line =
                |n: u64| format!("{:064x}\n", (n ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            (0..3000).flat_map(|n| line(n).into_bytes()).collect()
        };
        let values: Vec<Vec<u8>> = (0..4).map(|seed| lines(seed << 40)).collect();
        assert!(values.iter().map(Vec::len).sum::<usize>() < PATTERN_BYTES_MAX);
        let borrowed: Vec<&[u8]> = values.iter().map(Vec::as_slice).collect();
        let masker = masker(&borrowed);
        for value in values {
            let text = String::from_utf8(value).unwrap();
            for line in text.lines().step_by(500) {
                assert_eq!(masker.mask(line), MASK);
            }
        }
    }

    #[test]
    fn values_made_to_share_everything_cost_no_more_than_others() {
        // Every suffix of every one is another one: what an automaton must not list per state.
        let values: Vec<Vec<u8>> = (4..PIECE_BYTES)
            .flat_map(|length| {
                [
                    vec![b'a'; length],
                    [vec![b'b'], vec![b'a'; length]].concat(),
                ]
            })
            .collect();
        let borrowed: Vec<&[u8]> = values.iter().map(Vec::as_slice).collect();
        let masker = masker(&borrowed);
        let memory = masker.pieces.as_ref().unwrap().memory_usage();
        assert!(memory < 64 * 1024, "{memory} bytes");
        assert_eq!(masker.mask(&"a".repeat(8192)), MASK);
    }

    proptest! {
        #[test]
        fn a_line_in_parts_loses_what_a_whole_one_loses(
            values in prop::collection::vec(prop::collection::vec(b'a'..b'd', 4..9), 0..6),
            text in prop::collection::vec(b'a'..b'd', 0..200),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..5),
        ) {
            let borrowed: Vec<&[u8]> = values.iter().map(Vec::as_slice).collect();
            let masker = masker(&borrowed);
            let mut hidden = vec![false; text.len()];
            for value in &values {
                for at in 0..text.len().saturating_sub(value.len() - 1) {
                    if text[at..].starts_with(value) {
                        hidden[at..at + value.len()].fill(true);
                    }
                }
            }
            let left: String = text.iter().zip(&hidden)
                .filter(|(_, hidden)| !**hidden).map(|(byte, _)| char::from(*byte)).collect();
            let text = String::from_utf8(text).unwrap();
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(text.len() + 1)).collect();
            cuts.sort_unstable();
            let (mut cut, mut given, mut from) = (Cut::default(), String::new(), 0);
            for to in cuts {
                given.push_str(&masker.mask_part(&mut cut, &text[from..to], LineEnd::Later));
                from = to;
            }
            given.push_str(&masker.mask_part(&mut cut, &text[from..], LineEnd::Here));
            prop_assert_eq!(given.replace('*', ""), left.clone());
            prop_assert_eq!(masker.mask(&text).replace('*', ""), left);
        }
    }

    #[test]
    fn debug_shows_no_value() {
        assert!(!format!("{:?}", masker(&[b"hunter2"])).contains("hunter2"));
    }
}
