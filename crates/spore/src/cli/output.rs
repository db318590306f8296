//! The one place that prints.
//!
//! Used by every verb. Results go to standard output, everything about the way there to standard
//! error, so that a result can be piped. Colours only on a terminal that wants them. Text that
//! comes from an app cannot drive the terminal: control characters are taken out.

use std::borrow::Cow;
use std::io::{self, BufRead as _, IsTerminal as _, Write as _};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget};
use serde::Serialize;
use spore_api::page::Page;

use super::failure::Failure;
use crate::config::{Colour, Screen};

/// How results are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// For people.
    Text,
    /// For programs: the types of the interface.
    Json,
}

/// How a piece of text looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Look {
    Plain,
    Strong,
    Faint,
    Good,
    Bad,
    Pending,
}

/// A cell of a table.
#[derive(Clone, Debug)]
pub(crate) struct Cell {
    text: String,
    look: Look,
}

/// Where and how to print.
#[derive(Clone, Debug)]
pub(crate) struct Output {
    format: Format,
    result: Stream,
    aside: Stream,
}

/// One of the two standard streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stream {
    Pipe,
    PlainTerminal,
    ColourTerminal,
}

impl Stream {
    fn of(is_terminal: bool, colour: Colour) -> Self {
        match (is_terminal, colour) {
            (false, _) => Self::Pipe,
            (true, Colour::Never) => Self::PlainTerminal,
            (true, Colour::Auto) => Self::ColourTerminal,
        }
    }

    fn paint(self, look: Look, text: &str) -> String {
        let code = match look {
            Look::Plain => return text.to_owned(),
            Look::Strong => "1",
            Look::Faint => "2",
            Look::Good => "32",
            Look::Bad => "31",
            Look::Pending => "33",
        };
        match self {
            Self::ColourTerminal => format!("\x1b[{code}m{text}\x1b[0m"),
            Self::Pipe | Self::PlainTerminal => text.to_owned(),
        }
    }
}

impl Output {
    /// The standard streams of this process.
    pub(crate) fn new(format: Format, screen: &Screen) -> Self {
        Self {
            format,
            result: Stream::of(io::stdout().is_terminal(), screen.colour),
            aside: Stream::of(io::stderr().is_terminal(), screen.colour),
        }
    }

    /// How results are written.
    pub(crate) fn format(&self) -> Format {
        self.format
    }

    /// Whether a person reads the results.
    pub(crate) fn is_terminal(&self) -> bool {
        self.result != Stream::Pipe
    }

    /// Whether a person can be asked.
    pub(crate) fn can_ask(&self) -> bool {
        self.aside != Stream::Pipe && io::stdin().is_terminal()
    }

    /// Text as it looks among the results.
    pub(crate) fn paint(&self, look: Look, text: &str) -> String {
        self.result.paint(look, text)
    }

    /// One line of the result.
    pub(crate) fn line(&self, text: &str) -> io::Result<()> {
        let mut stdout = io::stdout().lock();
        writeln!(stdout, "{text}")
    }

    /// A piece of the result as it is.
    pub(crate) fn bytes(&self, bytes: &[u8]) -> io::Result<()> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(bytes)?;
        stdout.flush()
    }

    /// A piece of a program's standard error as it is.
    pub(crate) fn aside_bytes(&self, bytes: &[u8]) -> io::Result<()> {
        io::stderr().lock().write_all(bytes)
    }

    /// A result for programs, over several lines.
    pub(crate) fn json<T: Serialize>(&self, value: &T) -> io::Result<()> {
        let mut text = serde_json::to_vec_pretty(value)?;
        text.push(b'\n');
        self.bytes(&text)
    }

    /// A result for programs, on one line of many.
    pub(crate) fn json_line<T: Serialize>(&self, value: &T) -> io::Result<()> {
        let mut text = serde_json::to_vec(value)?;
        text.push(b'\n');
        self.bytes(&text)
    }

    /// One line about the way there. Nobody is left to tell when it cannot be written.
    pub(crate) fn note(&self, text: &str) {
        let mut stderr = io::stderr().lock();
        writeln!(stderr, "{text}").ok();
    }

    /// A line about the way there with the time that it took.
    pub(crate) fn step(&self, text: &str, took: Option<Duration>) {
        let took = took.map(time_text).unwrap_or_default();
        let took = self.aside.paint(Look::Faint, &took);
        self.note(format!("  {text:<44} {took}").trim_end());
    }

    /// A warning.
    pub(crate) fn warn(&self, text: &str) {
        let mark = self.aside.paint(Look::Pending, "warning:");
        self.note(&format!("{mark} {text}"));
    }

    /// A progress bar; hidden unless a person watches.
    pub(crate) fn bar(&self) -> ProgressBar {
        match (self.aside, self.format) {
            (Stream::Pipe, _) | (_, Format::Json) => ProgressBar::hidden(),
            _ => ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(10)),
        }
    }

    /// All there are of a kind: a page for programs, a row each for people, or this note.
    pub(crate) fn list<T: Serialize>(
        &self,
        items: &[T],
        headings: &[&str],
        row: impl Fn(&T) -> Vec<Cell>,
        none: &str,
    ) -> io::Result<()> {
        if self.format == Format::Json {
            let items = items.iter().collect();
            return self.json(&Page { items, next: None });
        }
        if items.is_empty() {
            self.note(none);
            return Ok(());
        }
        let rows: Vec<Vec<Cell>> = items.iter().map(row).collect();
        self.table(headings, &rows)
    }

    /// Rows under headings, aligned; the last column may be as wide as it likes.
    pub(crate) fn table(&self, headings: &[&str], rows: &[Vec<Cell>]) -> io::Result<()> {
        let mut widths: Vec<usize> = headings.iter().map(|text| text.len()).collect();
        for row in rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.text.chars().count());
            }
        }
        let head: Vec<Cell> = headings
            .iter()
            .map(|text| Cell::new(*text).look(Look::Faint))
            .collect();
        for row in std::iter::once(&head).chain(rows) {
            let mut line = String::new();
            for (index, (cell, width)) in row.iter().zip(&widths).enumerate() {
                line.push_str(&self.result.paint(cell.look, &cell.text));
                if index + 1 < row.len() {
                    let space = width + 3 - cell.text.chars().count();
                    line.push_str(&" ".repeat(space));
                }
            }
            self.line(line.trim_end())?;
        }
        Ok(())
    }

    /// Names with their values, aligned.
    pub(crate) fn facts(&self, facts: &[(&str, Cell)]) -> io::Result<()> {
        let width = facts.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        for (name, cell) in facts {
            let name = self.result.paint(Look::Faint, &format!("{name:<width$}"));
            self.line(&format!(
                "{name}   {}",
                self.result.paint(cell.look, &cell.text)
            ))?;
        }
        Ok(())
    }

    /// Asks a question that is answered with yes or no; anything but yes is no.
    pub(crate) fn ask(&self, question: &str) -> io::Result<bool> {
        let mut stderr = io::stderr().lock();
        write!(stderr, "{question} [y/N] ")?;
        stderr.flush()?;
        let mut answer = String::new();
        io::stdin().lock().read_line(&mut answer)?;
        Ok(matches!(
            answer.trim().to_ascii_lowercase().as_str(),
            "y" | "yes"
        ))
    }

    /// What failed, why, and what to do.
    pub(crate) fn failure(&self, failure: &Failure) {
        if self.format == Format::Json {
            let text = serde_json::to_string(&failure.report).unwrap_or_default();
            self.note(&text);
            return;
        }
        let mark = self.aside.paint(Look::Bad, "error:");
        for (index, part) in failure.chain.iter().enumerate() {
            let part = harmless(part);
            let text = match index {
                0 => format!("{mark} {part}"),
                _ => format!("  {}", part.replace('\n', "\n  ")),
            };
            self.note(&text);
        }
    }

    /// Help, version and what is wrong with a command line, as the parser words them.
    pub(crate) fn parser(&self, error: &clap::Error) {
        let text = error.render();
        let (stream, is_result) = match error.use_stderr() {
            true => (self.aside, false),
            false => (self.result, true),
        };
        let text = match stream {
            Stream::ColourTerminal => text.ansi().to_string(),
            Stream::Pipe | Stream::PlainTerminal => text.to_string(),
        };
        // Nobody is left to tell when it cannot be written.
        match is_result {
            true => self.bytes(text.as_bytes()).ok(),
            false => self.aside_bytes(text.as_bytes()).ok(),
        };
    }
}

impl Cell {
    /// A cell without control characters.
    pub(crate) fn new(text: impl AsRef<str>) -> Self {
        let text = harmless(text.as_ref()).replace(['\n', '\t'], " ");
        Self {
            text,
            look: Look::Plain,
        }
    }

    /// The same cell with another look.
    pub(crate) fn look(mut self, look: Look) -> Self {
        self.look = look;
        self
    }
}

/// Text without what would drive a terminal: of control characters only line ends and tabs stay.
pub(crate) fn harmless(text: &str) -> Cow<'_, str> {
    let is_bad = |letter: char| letter.is_control() && letter != '\n' && letter != '\t';
    if !text.contains(is_bad) {
        return Cow::Borrowed(text);
    }
    Cow::Owned(
        text.chars()
            .map(|letter| if is_bad(letter) { '\u{fffd}' } else { letter })
            .collect(),
    )
}

/// A number of bytes in three digits.
pub(crate) fn bytes_text(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    // Tenths of the unit, in whole numbers.
    let mut tenths = u128::from(bytes) * 10 / 1024;
    let mut unit = 0;
    while tenths >= 10_240 && unit + 1 < UNITS.len() {
        tenths /= 1024;
        unit += 1;
    }
    format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit])
}

/// A time in three digits.
pub(crate) fn time_text(time: Duration) -> String {
    let ms = time.as_millis();
    match ms {
        0..1000 => format!("{ms} ms"),
        1000..60_000 => format!("{}.{} s", ms / 1000, ms % 1000 / 100),
        60_000..3_600_000 => format!("{} min {} s", ms / 60_000, ms % 60_000 / 1000),
        3_600_000..86_400_000 => format!("{} h {} min", ms / 3_600_000, ms % 3_600_000 / 60_000),
        _ => format!("{} d {} h", ms / 86_400_000, ms % 86_400_000 / 3_600_000),
    }
}

/// An RFC 3339 time to the second, with a space: `2026-01-02 03:04:05Z`.
pub(crate) fn moment(text: &str) -> String {
    let (day, clock) = text.split_once('T').unwrap_or((text, ""));
    match clock.get(..8) {
        Some(clock) => format!("{day} {clock}Z"),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{bytes_text, harmless, moment, time_text};

    #[test]
    fn numbers_are_short() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (1024 * 1024 * 200, "200.0 MiB"),
            (u64::MAX, "16777215.9 TiB"),
        ] {
            assert_eq!(bytes_text(bytes), text);
        }
        for (ms, text) in [
            (3, "3 ms"),
            (1250, "1.2 s"),
            (61_000, "1 min 1 s"),
            (7_200_000, "2 h 0 min"),
            (90_000_000, "1 d 1 h"),
        ] {
            assert_eq!(time_text(Duration::from_millis(ms)), text);
        }
        assert_eq!(moment("2026-01-02T03:04:05.678Z"), "2026-01-02 03:04:05Z");
        assert_eq!(moment("soon"), "soon");
    }

    #[test]
    fn an_apps_text_cannot_drive_the_terminal() {
        assert_eq!(harmless("a\tb\nc"), "a\tb\nc");
        assert_eq!(harmless("\x1b]0;owned\x07"), "\u{fffd}]0;owned\u{fffd}");
        assert_eq!(harmless("\u{9b}31m\r"), "\u{fffd}31m\u{fffd}");
    }
}
