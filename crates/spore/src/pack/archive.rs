//! A listing as a stream of `tar.zst`, made on a thread of its own.
//!
//! ```text
//!   thread: files ─▶ tar ─▶ zstd ─▶ pieces ══(a few at most)══▶ stream ─▶ upload
//! ```
//!
//! The same listing gives the same bytes: order, owner and modes are fixed, times are those of
//! the files. A reader that goes away ends the thread.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::Stream;
use tar::{Builder, EntryType, Header};
use tokio::sync::mpsc;

use super::{Item, Listing, PackError, What};

/// The bytes of one piece.
const PIECE_BYTES: usize = 256 * 1024;
/// The pieces that may wait for the upload.
const PIECES_WAITING: usize = 4;
/// Beyond it, source code hardly gets smaller and the upload waits for the processor.
const LEVEL: i32 = 3;

/// A folder on its way up.
#[derive(Debug)]
pub(crate) struct Archive {
    pieces: mpsc::Receiver<Result<Bytes, PackError>>,
}

impl Archive {
    /// Begins to pack. `read` counts the bytes of files that were read so far.
    pub(crate) fn start(listing: Listing, read: Arc<AtomicU64>) -> io::Result<Self> {
        let (sender, pieces) = mpsc::channel(PIECES_WAITING);
        std::thread::Builder::new()
            .name("pack".to_owned())
            .spawn(move || {
                let failures = sender.clone();
                let pieces = Pieces {
                    sender,
                    waiting: Vec::with_capacity(PIECE_BYTES),
                };
                if let Err(error) = pack(&listing, pieces, &read) {
                    // Nobody listens any more when the upload ended first; its own error is told.
                    drop(failures.blocking_send(Err(error)));
                }
            })?;
        Ok(Self { pieces })
    }
}

impl Stream for Archive {
    type Item = Result<Bytes, PackError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.pieces.poll_recv(context)
    }
}

fn pack(listing: &Listing, pieces: Pieces, read: &AtomicU64) -> Result<(), PackError> {
    let whole = |source| PackError::Write {
        path: listing.root.display().to_string(),
        source,
    };
    let encoder = zstd::Encoder::new(pieces, LEVEL).map_err(whole)?;
    let mut builder = Builder::new(encoder);
    for item in &listing.items {
        append(&mut builder, &listing.root, item, read)?;
    }
    let mut pieces = builder
        .into_inner()
        .and_then(zstd::Encoder::finish)
        .map_err(whole)?;
    pieces.flush().map_err(whole)
}

fn append<W: Write>(
    builder: &mut Builder<W>,
    root: &Path,
    item: &Item,
    read: &AtomicU64,
) -> Result<(), PackError> {
    let shown = || item.path.display().to_string();
    let write = |source| PackError::Write {
        path: shown(),
        source,
    };
    let mut header = Header::new_gnu();
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(item.modified);
    header.set_mode(item.mode);
    match &item.what {
        What::Folder => {
            header.set_entry_type(EntryType::Directory);
            header.set_size(0);
            builder
                .append_data(&mut header, &item.path, io::empty())
                .map_err(write)
        }
        What::Link { target } => {
            header.set_entry_type(EntryType::Symlink);
            header.set_mode(0o777);
            header.set_size(0);
            builder
                .append_link(&mut header, &item.path, target)
                .map_err(write)
        }
        What::File { bytes } => {
            let file = open(&root.join(&item.path)).map_err(|source| PackError::Read {
                path: shown(),
                source,
            })?;
            header.set_entry_type(EntryType::Regular);
            header.set_size(*bytes);
            let mut exact = Exact {
                file,
                left: *bytes,
                read,
                failure: None,
            };
            let appended = builder.append_data(&mut header, &item.path, &mut exact);
            match exact.failure.take() {
                Some(Failure::Short) => Err(PackError::Changed { path: shown() }),
                Some(Failure::Read(source)) => Err(PackError::Read {
                    path: shown(),
                    source,
                }),
                None => appended.map_err(write),
            }
        }
    }
}

/// A file that became a link or a pipe since it was listed is not followed and not waited for.
fn open(path: &Path) -> io::Result<File> {
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    let flags = flags.bits().cast_signed();
    OpenOptions::new().read(true).custom_flags(flags).open(path)
}

/// As many bytes of a file as were promised, or a failure that says which side it was on.
struct Exact<'a> {
    file: File,
    left: u64,
    read: &'a AtomicU64,
    failure: Option<Failure>,
}

enum Failure {
    Short,
    Read(io::Error),
}

impl Read for Exact<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        if most == 0 {
            return Ok(0);
        }
        let failed = || io::Error::other("the file could not be read");
        match self.file.read(&mut buffer[..most]) {
            Ok(0) => {
                self.failure = Some(Failure::Short);
                Err(failed())
            }
            Ok(count) => {
                self.left -= count as u64;
                self.read.fetch_add(count as u64, Ordering::Relaxed);
                Ok(count)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Err(error),
            Err(error) => {
                self.failure = Some(Failure::Read(error));
                Err(failed())
            }
        }
    }
}

/// Gathers bytes into pieces.
struct Pieces {
    sender: mpsc::Sender<Result<Bytes, PackError>>,
    waiting: Vec<u8>,
}

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.waiting.extend_from_slice(bytes);
        if self.waiting.len() >= PIECE_BYTES {
            self.flush()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let piece = std::mem::replace(&mut self.waiting, Vec::with_capacity(PIECE_BYTES));
        self.sender
            .blocking_send(Ok(piece.into()))
            .map_err(|_gone| io::Error::new(io::ErrorKind::BrokenPipe, "the upload has ended"))
    }
}
