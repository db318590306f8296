//! The last lines of what a tenant may have written: a guest's console, and its VMM's own output.

use std::os::fd::OwnedFd;

use rustix::io::pread;

use super::Said;
use super::in_memory::LOG_BYTES;

/// How much of the console and of the VMM's own output a reason holds: a kernel's panic fits in.
const TAIL_LINES: usize = 40;

/// The characters that are kept of one of them: this text travels through messages and logs.
const TAIL_LINE_CHARS: usize = 160;

/// A console's last lines, read piece by piece.
#[derive(Debug, Default)]
pub(super) struct Tail {
    pub(super) lines: Vec<String>,
    /// Whether the last piece ended in the middle of a line.
    is_cut: bool,
}

impl Tail {
    /// Takes what a console said.
    pub(super) fn take(&mut self, said: &Said) {
        match said {
            Said::Next(piece) => self.add(piece),
            Said::Last(all) => {
                *self = Self::default();
                self.add(all);
            }
        }
    }

    fn add(&mut self, piece: &[u8]) {
        let mut lines = last_lines(piece).into_iter();
        let goes_on = self.is_cut && !piece.starts_with(b"\n") && !piece.starts_with(b"\r\n");
        if goes_on
            && let Some(begun) = self.lines.last_mut()
            && let Some(rest) = lines.next()
        {
            let whole = begun.chars().chain(rest.chars());
            *begun = whole.take(TAIL_LINE_CHARS).collect();
        }
        self.lines.extend(lines);
        let surplus = self.lines.len().saturating_sub(TAIL_LINES);
        self.lines.drain(..surplus);
        if let Some(last) = piece.last() {
            self.is_cut = *last != b'\n';
        }
    }
}

/// The last lines of a VMM's own output.
pub(in crate::hypervisor) fn log_tail(log: &OwnedFd) -> String {
    let mut bytes = vec![0; usize::try_from(LOG_BYTES).unwrap_or(0)];
    let mut len = 0;
    while let Ok(read @ 1..) = pread(log, &mut bytes[len..], len as u64) {
        len += read;
    }
    // The file has its full size from the start: what was not written is zero.
    let written = bytes[..len]
        .split(|byte| *byte == 0)
        .next()
        .unwrap_or_default();
    last_lines(written).join("\n")
}

/// The last lines of what a tenant may have written, without control characters.
fn last_lines(bytes: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(bytes);
    let clean = |line: &str| {
        let shown = line.chars().filter(|c| !c.is_control());
        shown.take(TAIL_LINE_CHARS).collect::<String>()
    };
    let lines: Vec<String> = text
        .lines()
        .map(clean)
        .filter(|line| !line.is_empty())
        .collect();
    let skipped = lines.len().saturating_sub(TAIL_LINES);
    lines.into_iter().skip(skipped).collect()
}

#[cfg(test)]
mod tests {
    use super::{TAIL_LINE_CHARS, TAIL_LINES, Tail, last_lines};

    #[test]
    fn a_line_that_is_read_in_pieces_is_one_line() {
        let mut tail = Tail::default();
        for piece in [
            "one\r\ntw",
            "",
            "o\r",
            "\nthree\n",
            "four",
            "\nfive\n\n",
            "six",
        ] {
            tail.add(piece.as_bytes());
        }
        assert_eq!(tail.lines, ["one", "two", "three", "four", "five", "six"]);
        tail.add(&[b'x'; 300]);
        assert_eq!(tail.lines[5].len(), TAIL_LINE_CHARS);
        tail.add("\nmore".repeat(50).as_bytes());
        assert_eq!(tail.lines.len(), TAIL_LINES);
    }

    #[test]
    fn a_tail_is_short_whatever_the_guest_wrote() {
        let tail = last_lines(&[0xff; 64 * 1024]);
        assert_eq!(tail.len(), 1);
        assert_eq!(tail[0].chars().count(), TAIL_LINE_CHARS);
    }

    #[test]
    fn a_tail_is_the_last_lines_without_control_characters() {
        let mut text = String::new();
        for number in 0..50 {
            text.push_str(&format!("\x1b[1mline {number}\r\n\n"));
        }
        let tail = last_lines(text.as_bytes());
        assert_eq!(tail.len(), 40);
        assert_eq!(tail[0], "[1mline 10");
        assert_eq!(tail[39], "[1mline 49");
    }

    #[test]
    fn bytes_that_are_no_text_do_no_harm() {
        assert_eq!(last_lines(&[0xff, b'\n', b'a']), ["\u{fffd}", "a"]);
        assert_eq!(last_lines(b""), Vec::<String>::new());
    }
}
