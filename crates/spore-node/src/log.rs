//! What apps print: files per app, rotated, with a tail and a way to follow.
//!
//! Fed by the log collector of each VM (`vm/collect.rs`) with masked lines only; read by the node
//! for `logs`. `<logs>/ACCOUNT/APP/app.log` and two older files of at most [`LOG_FILE_BYTES`] each;
//! one line is one JSON object. Never holds up an app: what cannot be written is dropped, counted.

use std::collections::{HashMap, VecDeque};
use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use spore_wire::guest::OutputKind;
use spore_wire::id::VmId;
use thiserror::Error;
use tokio::sync::broadcast;

/// The most bytes of one file.
pub const LOG_FILE_BYTES: u64 = 10 * 1024 * 1024;

/// Files per app, the newest included.
pub const LOG_FILES: usize = 3;

/// The most lines that a tail gives.
pub const LOG_TAIL_LINES_MAX: usize = 10_000;

/// Lines that may wait for one follower; then it is told how many it missed.
const FOLLOW_LINES_MAX: usize = 4096;

/// One line of an app.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// Which incarnation printed it.
    pub vm: VmId,
    /// Of which release.
    pub release: u64,
    /// The agent's number for it.
    pub sequence: u64,
    /// Microseconds since the Unix epoch, by the guest's clock.
    pub at_us: u64,
    /// Which output.
    pub from: OutputKind,
    /// Masked.
    pub text: String,
    /// Lines that were dropped before this one.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub dropped: u64,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "the signature is serde's"
)]
const fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// Why an app's log cannot be used.
#[derive(Debug, Error)]
pub enum LogError {
    /// A name that must not become a part of a path.
    #[error("`{0}` is not a name of an account or app")]
    Name(String),
    /// A file or folder.
    #[error("cannot use the log {path}: check the log folder's space and owner")]
    File {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Whether `name` is one of an account or app, `[a-z][a-z0-9-]{0,39}`: checked again here, since it
/// becomes a part of a path.
#[must_use]
pub fn is_name(name: &str) -> bool {
    let bytes = name.as_bytes();
    matches!(bytes.first(), Some(b'a'..=b'z'))
        && bytes.len() <= 40
        && bytes
            .iter()
            .all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'))
}

/// The logs of all apps of this node.
#[derive(Debug)]
pub struct LogStore {
    folder: PathBuf,
    file_bytes: u64,
    apps: Mutex<HashMap<PathBuf, Arc<AppLog>>>,
}

/// The log of one app; the incarnations of the app share it.
#[derive(Debug)]
pub struct AppLog {
    folder: PathBuf,
    file_bytes: u64,
    writer: Mutex<Writer>,
    followers: broadcast::Sender<LogLine>,
}

#[derive(Debug, Default)]
struct Writer {
    file: Option<File>,
    bytes: u64,
    dropped: u64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every critical section leaves its value whole, so a poisoned one is still usable.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl LogStore {
    /// The logs below this folder.
    #[must_use]
    pub fn new(folder: PathBuf) -> Self {
        Self {
            folder,
            file_bytes: LOG_FILE_BYTES,
            apps: Mutex::new(HashMap::new()),
        }
    }

    /// The log of an app. Makes its folder.
    ///
    /// # Errors
    /// [`LogError`].
    pub fn app(&self, account: &str, app: &str) -> Result<Arc<AppLog>, LogError> {
        for name in [account, app] {
            if !is_name(name) {
                return Err(LogError::Name(name.chars().take(64).collect()));
            }
        }
        let folder = self.folder.join(account).join(app);
        let mut apps = lock(&self.apps);
        if let Some(log) = apps.get(&folder) {
            return Ok(Arc::clone(log));
        }
        let made = fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder);
        if let Err(source) = made {
            return Err(LogError::File {
                path: folder,
                source,
            });
        }
        let log = Arc::new(AppLog {
            folder: folder.clone(),
            file_bytes: self.file_bytes,
            writer: Mutex::new(Writer::default()),
            followers: broadcast::channel(FOLLOW_LINES_MAX).0,
        });
        apps.insert(folder, Arc::clone(&log));
        Ok(log)
    }

    /// Removes the log of an app. Idempotent.
    ///
    /// # Errors
    /// [`LogError`].
    pub fn remove(&self, account: &str, app: &str) -> Result<(), LogError> {
        let log = self.app(account, app)?;
        let mut writer = lock(&log.writer);
        lock(&self.apps).remove(&log.folder);
        writer.file = None;
        match fs::remove_dir_all(&log.folder) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(source) => Err(LogError::File {
                path: log.folder.clone(),
                source,
            }),
        }
    }
}

impl AppLog {
    /// Appends lines. What cannot be written is counted, and the count goes with the next line
    /// that can.
    pub fn append(&self, lines: &[LogLine]) {
        let mut writer = lock(&self.writer);
        for line in lines {
            let mut line = line.clone();
            line.dropped = line.dropped.saturating_add(writer.dropped);
            match self.write(&mut writer, &line) {
                Ok(()) => writer.dropped = 0,
                Err(error) => {
                    writer.file = None;
                    if writer.dropped == 0 {
                        let folder = self.folder.display();
                        tracing::warn!(%folder, %error, "an app's log cannot be written");
                    }
                    writer.dropped = writer.dropped.saturating_add(1);
                }
            }
            // Nobody follows: then nobody misses it.
            drop(self.followers.send(line));
        }
    }

    fn write(&self, writer: &mut Writer, line: &LogLine) -> io::Result<()> {
        let mut bytes = serde_json::to_vec(line)?;
        bytes.push(b'\n');
        let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        if writer.file.is_none() {
            let file = fs::OpenOptions::new()
                .append(true)
                .create(true)
                .mode(0o600)
                .open(self.path(0))?;
            writer.bytes = file.metadata()?.len();
            writer.file = Some(file);
        }
        if writer.bytes > 0 && writer.bytes.saturating_add(length) > self.file_bytes {
            self.rotate()?;
            writer.file = None;
            writer.bytes = 0;
            return self.write(writer, line);
        }
        if let Some(file) = &mut writer.file {
            file.write_all(&bytes)?;
            writer.bytes += length;
        }
        Ok(())
    }

    fn rotate(&self) -> io::Result<()> {
        for number in (0..LOG_FILES - 1).rev() {
            match fs::rename(self.path(number), self.path(number + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    fn path(&self, number: usize) -> PathBuf {
        match number {
            0 => self.folder.join("app.log"),
            older => self.folder.join(format!("app.log.{older}")),
        }
    }

    /// The last lines, oldest first.
    ///
    /// # Errors
    /// [`LogError::File`].
    pub fn tail(&self, lines: usize) -> Result<Vec<LogLine>, LogError> {
        let _writer = lock(&self.writer);
        self.tail_locked(lines)
    }

    /// The last lines, and every line after them: none twice, none missed between.
    ///
    /// # Errors
    /// [`LogError::File`].
    pub fn follow(
        &self,
        lines: usize,
    ) -> Result<(Vec<LogLine>, broadcast::Receiver<LogLine>), LogError> {
        let _writer = lock(&self.writer);
        let receiver = self.followers.subscribe();
        Ok((self.tail_locked(lines)?, receiver))
    }

    fn tail_locked(&self, lines: usize) -> Result<Vec<LogLine>, LogError> {
        let lines = lines.min(LOG_TAIL_LINES_MAX);
        let mut tail = VecDeque::new();
        for number in 0..LOG_FILES {
            if tail.len() >= lines {
                break;
            }
            let path = self.path(number);
            let older = match read_last(&path, lines - tail.len()) {
                Ok(older) => older,
                Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                Err(source) => return Err(LogError::File { path, source }),
            };
            for line in older.into_iter().rev() {
                tail.push_front(line);
            }
        }
        Ok(tail.into())
    }

    /// The number of the last line kept of this incarnation; 0 when there is none.
    #[must_use]
    pub fn last_sequence(&self, vm: VmId) -> u64 {
        let lines = self.tail(LOG_TAIL_LINES_MAX).unwrap_or_default();
        let last = lines.iter().rev().find(|line| line.vm == vm);
        last.map_or(0, |line| line.sequence)
    }
}

/// The last whole lines of one file; a line that does not read (the daemon died in its middle) is
/// left out.
fn read_last(path: &Path, lines: usize) -> io::Result<VecDeque<LogLine>> {
    let mut last = VecDeque::new();
    for line in BufReader::new(File::open(path)?).split(b'\n') {
        if let Ok(line) = serde_json::from_slice(&line?) {
            if last.len() == lines {
                last.pop_front();
            }
            last.push_back(line);
        }
    }
    Ok(last)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use spore_wire::guest::OutputKind;
    use spore_wire::id::VmId;

    use super::{LogLine, LogStore, is_name};

    fn line(sequence: u64) -> LogLine {
        LogLine {
            vm: VmId::from_bytes([1; 16]),
            release: 1,
            sequence,
            at_us: 0,
            from: OutputKind::Stdout,
            text: format!("line {sequence}"),
            dropped: 0,
        }
    }

    fn texts(lines: &[LogLine]) -> Vec<String> {
        lines.iter().map(|line| line.text.clone()).collect()
    }

    #[test]
    fn rotation_keeps_three_files_and_the_newest_lines() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = LogStore::new(folder.path().to_owned());
        store.file_bytes = 1000;
        let log = store.app("me", "notes").unwrap();
        for number in 1..=100 {
            log.append(&[line(number)]);
        }
        let files = fs::read_dir(folder.path().join("me/notes")).unwrap();
        let sizes: Vec<u64> = files
            .map(|file| file.unwrap().metadata().unwrap().len())
            .collect();
        assert_eq!(sizes.len(), 3);
        assert!(sizes.iter().all(|size| *size <= 1000), "{sizes:?}");
        let tail = log.tail(12).unwrap();
        assert_eq!(
            texts(&tail),
            (89..=100).map(|n| format!("line {n}")).collect::<Vec<_>>()
        );
        assert_eq!(log.last_sequence(VmId::from_bytes([1; 16])), 100);
    }

    #[test]
    fn a_follower_misses_nothing_between_tail_and_stream() {
        let folder = tempfile::tempdir().unwrap();
        let log = LogStore::new(folder.path().to_owned())
            .app("me", "notes")
            .unwrap();
        log.append(&[line(1), line(2)]);
        let (tail, mut follow) = log.follow(1).unwrap();
        log.append(&[line(3)]);
        assert_eq!(texts(&tail), ["line 2"]);
        assert_eq!(follow.try_recv().unwrap().text, "line 3");
    }

    #[test]
    fn lines_that_could_not_be_written_are_counted_on_the_next_one() {
        let folder = tempfile::tempdir().unwrap();
        let log = LogStore::new(folder.path().to_owned())
            .app("me", "notes")
            .unwrap();
        let path = folder.path().join("me/notes/app.log");
        fs::create_dir(&path).unwrap();
        log.append(&[line(1), line(2)]);
        fs::remove_dir(&path).unwrap();
        log.append(&[line(3)]);
        assert_eq!(log.tail(10).unwrap()[0].dropped, 2);
    }

    #[test]
    fn a_half_written_line_is_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let log = LogStore::new(folder.path().to_owned())
            .app("me", "notes")
            .unwrap();
        fs::write(folder.path().join("me/notes/app.log"), b"{\"vm\":\"aaa\n").unwrap();
        log.append(&[line(1)]);
        assert_eq!(texts(&log.tail(10).unwrap()), ["line 1"]);
    }

    #[test]
    fn a_name_that_is_a_path_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let store = LogStore::new(folder.path().to_owned());
        for name in ["..", "", "a/b", "/etc", "A", "1a", &"a".repeat(41)] {
            assert!(!is_name(name) && store.app("me", name).is_err(), "{name}");
        }
        assert!(store.remove("..", "notes").is_err());
    }

    #[test]
    fn a_removed_log_is_gone_and_may_be_removed_again() {
        let folder = tempfile::tempdir().unwrap();
        let store = LogStore::new(folder.path().to_owned());
        store.app("me", "notes").unwrap().append(&[line(1)]);
        store.remove("me", "notes").unwrap();
        store.remove("me", "notes").unwrap();
        assert!(!folder.path().join("me/notes").exists());
    }
}
