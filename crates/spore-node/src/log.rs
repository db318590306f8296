//! What apps print: files per app, rotated, with a tail and a way to follow.
//!
//! Fed by the log collector of each VM (`vm/collect.rs`) with masked lines only; read by the node
//! for `logs`. `<logs>/ACCOUNT/APP/app.log` and two older files of at most [`LOG_FILE_BYTES`] each;
//! one line is one JSON object. Reads and writes block, so callers are on a thread that may. Never
//! holds up an app for a reader: what cannot be written or followed is dropped, and counted.

use std::collections::{HashMap, VecDeque};
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::ops::ControlFlow;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use serde::{Deserialize, Serialize};
use spore_wire::guest::OutputKind;
use spore_wire::id::VmId;
use thiserror::Error;
use tokio::sync::Notify;

/// The most bytes of one file.
pub const LOG_FILE_BYTES: u64 = 10 * 1024 * 1024;

/// Files per app, the newest included.
pub const LOG_FILES: usize = 3;

/// The most lines that a tail gives.
pub const LOG_TAIL_LINES_MAX: usize = 10_000;

/// The most bytes of their text; a tail of long lines has fewer of them.
pub const LOG_TAIL_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Bytes of lines that may wait for one follower; then it is told how many it missed.
pub const FOLLOW_BYTES_MAX: usize = 512 * 1024;

/// Bytes that are written at once.
const PAGE_BYTES_MAX: usize = 64 * 1024;

/// Bytes that are read at once.
const BLOCK_BYTES: u64 = 64 * 1024;

/// One line of an app.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// Which VM printed it.
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
    /// Whether it is the platform's own word, and not the app's.
    #[serde(default, skip_serializing_if = "core::ops::Not::not")]
    pub of_platform: bool,
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

/// The log of one app; the VMs of the app share it.
#[derive(Debug)]
pub struct AppLog {
    folder: PathBuf,
    file_bytes: u64,
    writer: Mutex<Writer>,
}

#[derive(Debug, Default)]
struct Writer {
    file: Option<File>,
    bytes: u64,
    dropped: u64,
    /// A write was cut off: the next line begins on its own.
    torn: bool,
    followers: Vec<Weak<Queue>>,
}

/// Lines on their way to the file.
#[derive(Debug, Default)]
struct Page {
    bytes: Vec<u8>,
    /// Those in it, and those that they say were dropped.
    lines: u64,
}

/// Every line of an app from some point on.
#[derive(Debug)]
pub struct Follow {
    queue: Arc<Queue>,
}

/// What a follower is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Followed {
    /// The next line.
    Line(Arc<LogLine>),
    /// So many lines were not waited for: the follower is too slow. They are in the file.
    Missed(u64),
}

#[derive(Debug, Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    lines: VecDeque<Arc<LogLine>>,
    bytes: usize,
    missed: u64,
    is_over: bool,
}

impl Follow {
    /// What comes next; `None` when the log was removed. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Option<Followed> {
        loop {
            if let Some(next) = lock(&self.queue.waiting).take() {
                return next;
            }
            // One permit is kept when nobody waits, so no line falls between.
            self.queue.changed.notified().await;
        }
    }
}

impl Waiting {
    /// `None` when there is nothing yet.
    fn take(&mut self) -> Option<Option<Followed>> {
        if self.missed > 0 {
            return Some(Some(Followed::Missed(core::mem::take(&mut self.missed))));
        }
        match self.lines.pop_front() {
            Some(line) => {
                self.bytes -= line.weight();
                Some(Some(Followed::Line(line)))
            }
            None => self.is_over.then_some(None),
        }
    }

    fn add(&mut self, line: Arc<LogLine>) {
        self.bytes += line.weight();
        self.lines.push_back(line);
        while self.bytes > FOLLOW_BYTES_MAX
            && let Some(oldest) = self.lines.pop_front()
        {
            self.bytes -= oldest.weight();
            self.missed += 1;
        }
    }
}

impl LogLine {
    /// What it takes of memory.
    const fn weight(&self) -> usize {
        self.text.len() + size_of::<Self>()
    }
}

impl Writer {
    fn tell(&mut self, line: LogLine) {
        if self.followers.is_empty() {
            return;
        }
        let line = Arc::new(line);
        self.each_follower(|waiting| waiting.add(Arc::clone(&line)));
    }

    fn each_follower(&mut self, mut act: impl FnMut(&mut Waiting)) {
        self.followers.retain(|follower| {
            let Some(queue) = follower.upgrade() else {
                return false;
            };
            act(&mut lock(&queue.waiting));
            queue.changed.notify_one();
            true
        });
    }
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
        writer.each_follower(|waiting| waiting.is_over = true);
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
    pub fn append(&self, lines: Vec<LogLine>) {
        let mut writer = lock(&self.writer);
        let mut page = Page::default();
        for mut line in lines {
            let dropped = core::mem::take(&mut writer.dropped);
            line.dropped = line.dropped.saturating_add(dropped);
            self.add(&mut writer, &mut page, &line);
            writer.tell(line);
        }
        self.flush(&mut writer, &mut page);
    }

    fn add(&self, writer: &mut Writer, page: &mut Page, line: &LogLine) {
        let mut bytes = match serde_json::to_vec(line) {
            Ok(bytes) => bytes,
            Err(error) => {
                tracing::error!(%error, "a line of an app's log cannot be encoded");
                return;
            }
        };
        bytes.push(b'\n');
        let most = PAGE_BYTES_MAX.min(usize::try_from(self.file_bytes).unwrap_or(usize::MAX));
        if page.bytes.len() + bytes.len() > most {
            self.flush(writer, page);
        }
        page.bytes.extend_from_slice(&bytes);
        page.lines = page.lines.saturating_add(line.dropped).saturating_add(1);
    }

    fn flush(&self, writer: &mut Writer, page: &mut Page) {
        let page = core::mem::take(page);
        if page.bytes.is_empty() {
            return;
        }
        let Err(error) = self.write(writer, &page.bytes) else {
            return;
        };
        writer.file = None;
        writer.torn = true;
        if writer.dropped == 0 {
            let folder = self.folder.display();
            tracing::warn!(%folder, %error, "an app's log cannot be written");
        }
        writer.dropped = writer.dropped.saturating_add(page.lines);
    }

    fn write(&self, writer: &mut Writer, page: &[u8]) -> io::Result<()> {
        let length = u64::try_from(page.len()).unwrap_or(u64::MAX);
        let mut file = match writer.file.take() {
            Some(file) => file,
            None => self.open(writer)?,
        };
        if writer.bytes > 0 && writer.bytes.saturating_add(length) > self.file_bytes {
            self.rotate()?;
            file = self.open(writer)?;
        }
        if core::mem::take(&mut writer.torn) && writer.bytes > 0 {
            file.write_all(b"\n")?;
            writer.bytes += 1;
        }
        file.write_all(page)?;
        writer.bytes += length;
        writer.file = Some(file);
        Ok(())
    }

    fn open(&self, writer: &mut Writer) -> io::Result<File> {
        let file = fs::OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(self.path(0))?;
        writer.bytes = file.metadata()?.len();
        Ok(file)
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
    pub fn follow(&self, lines: usize) -> Result<(Vec<LogLine>, Follow), LogError> {
        let mut writer = lock(&self.writer);
        let tail = self.tail_locked(lines)?;
        let queue = Arc::new(Queue::default());
        writer.followers.push(Arc::downgrade(&queue));
        Ok((tail, Follow { queue }))
    }

    fn tail_locked(&self, lines: usize) -> Result<Vec<LogLine>, LogError> {
        let lines = lines.min(LOG_TAIL_LINES_MAX);
        let mut tail = VecDeque::new();
        let mut bytes = 0;
        if lines > 0 {
            self.read_back(|line| {
                bytes += line.weight();
                tail.push_front(line);
                if tail.len() >= lines || bytes >= LOG_TAIL_BYTES_MAX {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            })?;
        }
        Ok(tail.into())
    }

    /// The number of the last line kept of this VM; 0 when there is none.
    #[must_use]
    pub fn last_sequence(&self, vm: VmId) -> u64 {
        let _writer = lock(&self.writer);
        let mut last = 0;
        let read = self.read_back(|line| {
            if line.vm == vm {
                last = line.sequence;
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        });
        if let Err(error) = read {
            let folder = self.folder.display();
            tracing::warn!(%folder, %error, "an app's log cannot be read");
        }
        last
    }

    /// Gives every line to `visit`, the last one first, until it has enough.
    fn read_back(&self, mut visit: impl FnMut(LogLine) -> ControlFlow<()>) -> Result<(), LogError> {
        for number in 0..LOG_FILES {
            let path = self.path(number);
            match read_file_back(&path, &mut visit) {
                Ok(ControlFlow::Continue(())) => {}
                Ok(ControlFlow::Break(())) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(source) => return Err(LogError::File { path, source }),
            }
        }
        Ok(())
    }
}

/// The lines of one file from its end on, a block at a time; a line that does not read (the daemon
/// died in its middle) is left out.
fn read_file_back(
    path: &Path,
    visit: &mut impl FnMut(LogLine) -> ControlFlow<()>,
) -> io::Result<ControlFlow<()>> {
    let file = File::open(path)?;
    let mut at = file.metadata()?.len();
    // The line that the blocks so far begin in the middle of.
    let mut begun = Vec::new();
    while at > 0 {
        let from = at.saturating_sub(BLOCK_BYTES);
        let mut block = vec![0; usize::try_from(at - from).map_err(io::Error::other)?];
        file.read_exact_at(&mut block, from)?;
        at = from;
        block.append(&mut begun);
        let whole = if from == 0 {
            0
        } else {
            let first_end = block.iter().position(|byte| *byte == b'\n');
            first_end.map_or(block.len(), |end| end + 1)
        };
        for line in block[whole..].rsplit(|byte| *byte == b'\n') {
            if let Ok(line) = serde_json::from_slice(line)
                && visit(line).is_break()
            {
                return Ok(ControlFlow::Break(()));
            }
        }
        block.truncate(whole);
        begun = block;
    }
    Ok(ControlFlow::Continue(()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use spore_wire::guest::OutputKind;
    use spore_wire::id::VmId;

    use super::{FOLLOW_BYTES_MAX, Followed, LOG_TAIL_BYTES_MAX, LogLine, LogStore, is_name};

    fn line(sequence: u64) -> LogLine {
        LogLine {
            vm: VmId::from_bytes([1; 16]),
            release: 1,
            sequence,
            at_us: 0,
            from: OutputKind::Stdout,
            text: format!("line {sequence}"),
            of_platform: false,
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
            log.append(vec![line(number)]);
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

    #[tokio::test]
    async fn a_follower_misses_nothing_between_tail_and_stream() {
        let folder = tempfile::tempdir().unwrap();
        let store = LogStore::new(folder.path().to_owned());
        let log = store.app("me", "notes").unwrap();
        log.append(vec![line(1), line(2)]);
        let (tail, mut follow) = log.follow(1).unwrap();
        log.append(vec![line(3)]);
        assert_eq!(texts(&tail), ["line 2"]);
        assert_eq!(follow.next().await, Some(Followed::Line(line(3).into())));
        store.remove("me", "notes").unwrap();
        assert_eq!(follow.next().await, None);
    }

    #[tokio::test]
    async fn a_slow_follower_holds_bounded_memory_and_is_told_its_gap() {
        let folder = tempfile::tempdir().unwrap();
        let store = LogStore::new(folder.path().to_owned());
        let log = store.app("me", "notes").unwrap();
        let (_tail, mut follow) = log.follow(0).unwrap();
        let long = |sequence| LogLine {
            text: "x".repeat(8192),
            ..line(sequence)
        };
        for sequence in 1..=1000 {
            log.append(vec![long(sequence)]);
        }
        let held = super::lock(&follow.queue.waiting).bytes;
        assert!(held <= FOLLOW_BYTES_MAX, "{held} bytes wait");
        let Some(Followed::Missed(missed)) = follow.next().await else {
            panic!("a gap comes first");
        };
        assert!(missed > 900, "{missed}");
        assert_eq!(
            follow.next().await,
            Some(Followed::Line(long(missed + 1).into()))
        );
    }

    #[test]
    fn a_tail_of_long_lines_is_bounded_in_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let store = LogStore::new(folder.path().to_owned());
        let log = store.app("me", "notes").unwrap();
        for sequence in 1..=1000 {
            let text = format!("{sequence}{}", "x".repeat(8000));
            log.append(vec![LogLine {
                text,
                ..line(sequence)
            }]);
        }
        let tail = log.tail(usize::MAX).unwrap();
        let bytes: usize = tail.iter().map(|line| line.text.len()).sum();
        assert!(bytes <= LOG_TAIL_BYTES_MAX + 10_000, "{bytes}");
        let numbers: Vec<u64> = tail.iter().map(|line| line.sequence).collect();
        let first = 1001 - u64::try_from(numbers.len()).unwrap();
        assert_eq!(numbers, (first..=1000).collect::<Vec<_>>());
    }

    #[test]
    fn a_tail_reads_lines_of_every_length_across_blocks() {
        let folder = tempfile::tempdir().unwrap();
        let store = LogStore::new(folder.path().to_owned());
        let log = store.app("me", "notes").unwrap();
        let lines: Vec<LogLine> = (1..=300)
            .map(|sequence| LogLine {
                text: "y".repeat(usize::try_from(sequence * 7919 % 5003).unwrap()),
                ..line(sequence)
            })
            .collect();
        log.append(lines.clone());
        assert_eq!(log.tail(1000).unwrap(), lines);
        assert_eq!(log.tail(7).unwrap(), lines[293..]);
    }

    #[test]
    fn lines_that_could_not_be_written_are_counted_on_the_next_one() {
        let folder = tempfile::tempdir().unwrap();
        let log = LogStore::new(folder.path().to_owned())
            .app("me", "notes")
            .unwrap();
        let path = folder.path().join("me/notes/app.log");
        fs::create_dir(&path).unwrap();
        log.append(vec![line(1), line(2)]);
        fs::remove_dir(&path).unwrap();
        log.append(vec![line(3)]);
        assert_eq!(log.tail(10).unwrap()[0].dropped, 2);
    }

    #[test]
    fn a_line_after_a_torn_one_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let store = LogStore::new(folder.path().to_owned());
        let log = store.app("me", "notes").unwrap();
        fs::write(folder.path().join("me/notes/app.log"), b"{\"vm\":\"aaa").unwrap();
        super::lock(&log.writer).torn = true;
        log.append(vec![line(1)]);
        assert_eq!(texts(&log.tail(10).unwrap()), ["line 1"]);
    }

    #[test]
    fn a_half_written_line_is_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let log = LogStore::new(folder.path().to_owned())
            .app("me", "notes")
            .unwrap();
        fs::write(folder.path().join("me/notes/app.log"), b"{\"vm\":\"aaa\n").unwrap();
        log.append(vec![line(1)]);
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
        store.app("me", "notes").unwrap().append(vec![line(1)]);
        store.remove("me", "notes").unwrap();
        store.remove("me", "notes").unwrap();
        assert!(!folder.path().join("me/notes").exists());
    }
}
