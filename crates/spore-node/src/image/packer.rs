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
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;

use command_fds::{CommandFdExt, FdMapping};
use spore_wire::node::ImageInfo;
use thiserror::Error;

use super::pack::PackRequest;
use super::store::{ImageStore, StoreError};
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
    /// The worker could not be started or fed.
    #[error("cannot {what} the image worker")]
    Worker {
        /// Start, feed.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The archive stopped coming.
    #[error("the archive could not be read to its end: send it again")]
    Source(#[source] io::Error),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Packer {
    /// Packs `archive` (tar or tar.zst) into an image of `store`.
    ///
    /// # Errors
    /// [`BuildError`]; nothing is left in the store then.
    pub fn pack(
        &self,
        store: &ImageStore,
        request: PackRequest,
        archive: &mut dyn Read,
        made_at_s: u64,
    ) -> Result<ImageInfo, BuildError> {
        let worker = |what| move |source| BuildError::Worker { what, source };
        let staged = store.stage()?;
        let image = staged.file().try_clone().map_err(worker("start"))?;
        let mut child = self.start(image.into(), store.spool()?.into())?;
        let outputs = collect(&mut child);
        let fed = self.feed(&mut child, request, archive);
        let status = match &fed {
            // The archive ended in the middle: what the worker made of it is of no interest.
            Err(BuildError::Source(_)) => child.kill().and_then(|()| child.wait()),
            _ => child.wait(),
        }
        .map_err(worker("wait for"))?;
        let [answer, log] = outputs.map(|output| output.join().unwrap_or_default());
        let answer = match (serde_json::from_slice(&answer), fed) {
            (_, Err(error @ BuildError::Source(_))) => return Err(error),
            (Ok(answer), _) => answer,
            // A worker that is gone cannot be fed; why it is gone says more.
            (Err(_), _) => {
                let log = String::from_utf8_lossy(&log).trim().to_owned();
                return Err(BuildError::Died {
                    status: status.to_string(),
                    log,
                });
            }
        };
        match answer {
            Answer::Packed(packed) if status.success() => {
                Ok(staged.commit(request.kind, packed.entries, made_at_s)?)
            }
            Answer::Packed(_) => Err(BuildError::Died {
                status: status.to_string(),
                log: String::new(),
            }),
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
    ) -> Result<(), BuildError> {
        let feed = |source| BuildError::Worker {
            what: "feed",
            source,
        };
        let Some(mut stdin) = child.stdin.take() else {
            return Err(feed(io::ErrorKind::BrokenPipe.into()));
        };
        let request = WorkerRequest {
            pack: request,
            uid: self.uid,
        };
        let text = serde_json::to_vec(&request).map_err(|error| feed(error.into()))?;
        let length = u32::try_from(text.len()).unwrap_or(u32::MAX).to_le_bytes();
        stdin
            .write_all(&length)
            .and_then(|()| stdin.write_all(&text))
            .map_err(feed)?;
        let mut buffer = vec![0; 128 * 1024];
        loop {
            let count = match archive.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(BuildError::Source(error)),
            };
            stdin
                .write_all(buffer.get(..count).unwrap_or_default())
                .map_err(feed)?;
        }
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
