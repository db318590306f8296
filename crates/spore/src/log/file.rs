//! A log file that stays small, with the one before it.
//!
//! Made by the daemon for itself and for the gateway, which sees no folder: all of it works on open
//! descriptors. Never touches a file that somebody else gave as standard error, nor the journal.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context, Result};

use super::LogFormat;

/// The most bytes of one file; there are two, the newest and the one before.
const FILE_BYTES: u64 = 10 * 1024 * 1024;

/// Opens a log file for reading and appending; for root and the group, as the one before it.
///
/// # Errors
/// When it cannot be opened.
pub(crate) fn open(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.create(true).read(true).append(true).mode(0o640);
    let file = options.open(path);
    file.with_context(|| format!("cannot open {}", path.display()))
}

/// Opens the file that takes what a log file has too much of.
///
/// # Errors
/// When it cannot be opened.
pub(crate) fn open_older(path: &Path) -> Result<File> {
    let mut older = path.as_os_str().to_owned();
    older.push(".1");
    let mut options = OpenOptions::new();
    options.create(true).truncate(false).write(true).mode(0o640);
    let file = options.open(&older);
    file.with_context(|| format!("cannot open {}", Path::new(&older).display()))
}

/// A log file and the one before it.
#[derive(Debug)]
pub(crate) struct LogFile {
    /// Open for reading and appending. Others may append too.
    newest: File,
    older: File,
    bytes_max: u64,
    format: LogFormat,
    /// Lines that could not be written since the last one that could.
    lost: u64,
}

impl LogFile {
    /// The file that standard error is, when it is the one at `path`.
    pub(crate) fn of_stderr(path: &Path, format: LogFormat) -> Option<Self> {
        let stderr = File::from(rustix::io::dup(io::stderr()).ok()?).metadata();
        let stderr = stderr.ok()?;
        let named = std::fs::symlink_metadata(path).ok()?;
        let same = (stderr.dev(), stderr.ino()) == (named.dev(), named.ino());
        if !same || !named.is_file() {
            return None;
        }
        Some(Self::new(open(path).ok()?, open_older(path).ok()?, format))
    }

    /// Standard error, which must be a file open for reading and appending, and the one before it.
    ///
    /// # Errors
    /// When there is no standard error.
    pub(crate) fn inherited(older: OwnedFd, format: LogFormat) -> Result<Self> {
        let newest = rustix::io::dup(io::stderr()).context("the log")?;
        Ok(Self::new(File::from(newest), File::from(older), format))
    }

    const fn new(newest: File, older: File, format: LogFormat) -> Self {
        Self {
            newest,
            older,
            bytes_max: FILE_BYTES,
            format,
            lost: 0,
        }
    }

    fn append(&mut self, line: &[u8]) -> io::Result<()> {
        let length = u64::try_from(line.len()).unwrap_or(u64::MAX);
        let bytes = self.newest.metadata()?.len();
        if bytes > 0 && bytes.saturating_add(length) > self.bytes_max {
            self.turn_over()?;
        }
        if self.lost > 0 {
            let lost = format!("{} lines could not be written here", self.lost);
            writeln!(self.newest, "{}", self.format.note(&lost))?;
            self.lost = 0;
        }
        self.newest.write_all(line)
    }

    /// Copied and emptied, not renamed: other processes go on appending to the same file.
    fn turn_over(&mut self) -> io::Result<()> {
        self.older.set_len(0)?;
        self.older.rewind()?;
        self.newest.rewind()?;
        // Somebody else who appends could make this endless.
        let mut most = io::Read::take(&self.newest, 2 * self.bytes_max);
        io::copy(&mut most, &mut self.older)?;
        self.newest.set_len(0)
    }
}

impl Write for LogFile {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        // Whoever logs has no use for the error, and must not be held up by it.
        if self.append(line).is_err() {
            self.lost = self.lost.saturating_add(1);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::io::Write as _;

    use super::{LogFile, open, open_older};
    use crate::log::LogFormat;

    #[test]
    fn a_log_keeps_two_small_files_and_the_newest_lines() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.log");
        let mut log = LogFile::new(
            open(&path).unwrap(),
            open_older(&path).unwrap(),
            LogFormat::Text,
        );
        log.bytes_max = 100;
        // A panic, or another process, appends past this value.
        let mut other = open(&path).unwrap();
        for number in 0..1000 {
            writeln!(log, "line {number}").unwrap();
            if number % 10 == 0 {
                writeln!(other, "other {number}").unwrap();
            }
        }
        let older = std::fs::read_to_string(folder.path().join("a.log.1")).unwrap();
        let newest = std::fs::read_to_string(&path).unwrap();
        for text in [&older, &newest] {
            assert!(text.len() <= 120, "{text}");
        }
        let both = older + &newest;
        assert!(both.ends_with("line 999\n"), "{both}");
        let lines = both.lines().filter(|line| line.starts_with("line "));
        let numbers: Vec<u32> = lines.map(|line| line[5..].parse().unwrap()).collect();
        assert!(numbers.len() > 8 && numbers.is_sorted(), "{both}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn lines_that_could_not_be_written_are_counted_on_the_next_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.log");
        let full = OpenOptions::new().append(true).open("/dev/full").unwrap();
        let mut log = LogFile::new(full, open_older(&path).unwrap(), LogFormat::Json);
        for _line in 0..3 {
            log.write_all(b"lost\n").unwrap();
        }
        log.newest = open(&path).unwrap();
        log.write_all(b"kept\n").unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(
            text,
            "{\"message\":\"3 lines could not be written here\"}\nkept\n"
        );
    }
}
