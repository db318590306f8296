//! The node's side of packing: starts the confined worker, feeds it an archive and files what it
//! made.
//!
//! Called by the node's server for uploads, and by `debian.rs`. Blocking: daemons call it through
//! `spawn_blocking`. Never reads the archive itself: bytes pass through, and the image's name is
//! the hash that this side computes.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;

use command_fds::{CommandFdExt, FdMapping};
use spore_wire::node::ImageInfo;
use thiserror::Error;

use super::job::{Ended, Job, UPLOAD_LIMITS};
use super::pack::PackRequest;
use super::store::{Filing, ImageStore, StoreError};
use super::worker::{Answer, IMAGE_FD, SPOOL_FD, WorkerRequest};

/// The most bytes of the worker's answer and of its log that are kept.
const OUTPUT_BYTES_MAX: u64 = 64 * 1024;

/// How the worker is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packer {
    /// The program, usually this one.
    pub program: PathBuf,
    /// The internal verb that calls [`super::worker::serve`].
    pub arguments: Vec<OsString>,
    /// The uid that it runs as, never used by anything else. `None` is for tests without root.
    pub uid: Option<u32>,
}

/// Why there is no new image.
#[derive(Debug, Error)]
pub enum BuildError {
    /// The archive is at fault.
    #[error("{0}")]
    Refused(String),
    /// The data disk is full.
    #[error("the data disk is full: `spore image gc` or a larger disk helps")]
    Full,
    /// The worker said what the platform lacks.
    #[error("cannot pack the image: {0}")]
    Failed(String),
    /// The worker ended without an answer: a limit was hit, or a bug.
    #[error(
        "the image worker ended early ({status}): make the archive smaller, or report it: {log}"
    )]
    Died {
        /// Exit code or signal.
        status: String,
        /// Its last words.
        log: String,
    },
    /// Somebody ended the work.
    #[error("the image is not made: {0}")]
    Ended(#[from] Ended),
    /// The kernel ended the worker.
    #[error(
        "packing takes more memory than a worker gets ({} MiB): fewer files or shorter names \
         take less",
        UPLOAD_LIMITS.memory_bytes / (1024 * 1024)
    )]
    OutOfMemory,
    /// The worker could not be started or limited.
    #[error("cannot {what} the image worker")]
    Worker {
        /// Start, limit.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The archive stopped coming; the cause's kind says whether it was over a limit.
    #[error("the archive could not be read to its end: send it again")]
    Source(#[source] io::Error),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Packer {
    /// Packs `archive` (tar or tar.zst) into an image of `store`, by a worker in `job`.
    ///
    /// # Errors
    /// [`BuildError`]; nothing is left in the store then.
    pub fn pack(
        &self,
        store: &ImageStore,
        request: PackRequest,
        archive: &mut dyn Read,
        filing: Filing,
        job: &Job,
    ) -> Result<ImageInfo, BuildError> {
        let worker = |what| move |source| BuildError::Worker { what, source };
        let staged = store.stage()?;
        let image = staged.file().try_clone().map_err(worker("start"))?;
        let mut child = self.start(image.into(), store.spool()?.into())?;
        let outputs = collect(&mut child);
        // It has read nothing yet, so nothing of it is elsewhere.
        let fed = match job.place(&child) {
            Ok(()) => self.feed(&mut child, request, archive),
            Err(error) => Err(Unfed::NotPlaced(error)),
        };
        // What a worker makes of half an archive is of no interest; one that is gone, or reads
        // what there is to its end, says more by how it ended.
        let killed = match &fed {
            Err(Unfed::NotPlaced(_) | Unfed::Source(_)) => child.kill(),
            Ok(()) | Err(Unfed::Gone(_)) => Ok(()),
        };
        let status = killed.and_then(|()| child.wait());
        let [answer, log] = outputs.map(|output| output.join().unwrap_or_default());
        if let Some(why) = job.ended() {
            return Err(why.into());
        }
        let status = status.map_err(worker("wait for"))?;
        match fed {
            Ok(()) => {}
            Err(Unfed::Source(error)) => return Err(BuildError::Source(error)),
            Err(Unfed::NotPlaced(error)) => return Err(worker("limit")(error)),
            Err(Unfed::Gone(error)) => tracing::debug!(%error, "the image worker left early"),
        }
        let Ok(answer) = serde_json::from_slice(&answer) else {
            return Err(died(status, &log, job));
        };
        match answer {
            Answer::Packed(packed) if status.success() => {
                Ok(staged.commit(request.kind, packed.entries, filing)?)
            }
            Answer::Packed(_) => Err(died(status, &[], job)),
            Answer::Refused { message } => Err(BuildError::Refused(message)),
            Answer::Full => Err(BuildError::Full),
            Answer::Failed { message } => Err(BuildError::Failed(message)),
        }
    }

    fn start(&self, image: OwnedFd, spool: OwnedFd) -> Result<Child, BuildError> {
        let mut command = Command::new(&self.program);
        command
            .args(&self.arguments)
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
            .fd_mappings(vec![
                FdMapping {
                    parent_fd: image,
                    child_fd: IMAGE_FD,
                },
                FdMapping {
                    parent_fd: spool,
                    child_fd: SPOOL_FD,
                },
            ])
            .map_err(|collision| BuildError::Worker {
                what: "pass descriptors to",
                source: io::Error::other(collision),
            })?;
        command.spawn().map_err(|source| BuildError::Worker {
            what: "start",
            source,
        })
    }

    /// Writes the request and the archive, and closes the pipe.
    fn feed(
        &self,
        child: &mut Child,
        request: PackRequest,
        archive: &mut dyn Read,
    ) -> Result<(), Unfed> {
        let Some(mut stdin) = child.stdin.take() else {
            return Err(Unfed::Gone(io::ErrorKind::BrokenPipe.into()));
        };
        let request = WorkerRequest {
            pack: request,
            uid: self.uid,
        };
        let text = serde_json::to_vec(&request).map_err(|error| Unfed::Gone(error.into()))?;
        let length = u32::try_from(text.len()).unwrap_or(u32::MAX).to_le_bytes();
        stdin
            .write_all(&length)
            .and_then(|()| stdin.write_all(&text))
            .map_err(Unfed::Gone)?;
        let mut buffer = vec![0; 128 * 1024];
        loop {
            let count = match archive.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Unfed::Source(error)),
            };
            stdin
                .write_all(buffer.get(..count).unwrap_or_default())
                .map_err(Unfed::Gone)?;
        }
    }
}

/// Why a worker did not get its whole archive.
enum Unfed {
    /// It could not be put into its job.
    NotPlaced(io::Error),
    /// The archive broke off.
    Source(io::Error),
    /// It does not read any more.
    Gone(io::Error),
}

/// A worker that ended without an answer.
fn died(status: ExitStatus, log: &[u8], job: &Job) -> BuildError {
    if job.was_out_of_memory() {
        return BuildError::OutOfMemory;
    }
    BuildError::Died {
        status: status.to_string(),
        log: String::from_utf8_lossy(log).trim().to_owned(),
    }
}

/// Reads the worker's answer and its log while it is fed, so that no pipe fills up.
fn collect(child: &mut Child) -> [JoinHandle<Vec<u8>>; 2] {
    let answer = child
        .stdout
        .take()
        .map(|pipe| Box::new(pipe) as Box<dyn Read + Send>);
    let log = child
        .stderr
        .take()
        .map(|pipe| Box::new(pipe) as Box<dyn Read + Send>);
    [answer, log].map(|pipe| {
        std::thread::spawn(move || {
            let mut text = Vec::new();
            if let Some(mut pipe) = pipe {
                let kept = pipe.by_ref().take(OUTPUT_BYTES_MAX).read_to_end(&mut text);
                let rest = kept.and_then(|_count| io::copy(&mut pipe, &mut io::sink()));
                tracing::trace!(?rest, "the image worker's pipe ended");
            }
            text
        })
    })
}
