//! The confined process that packs one image.
//!
//! Started by `packer.rs` through an internal verb of the program, first thing in `main`. It
//! confines itself before it reads a byte of the archive: no capability, own uid, empty root, no
//! network, limits. It never opens a path afterwards.
//!
//! | descriptor | what |
//! |---|---|
//! | 0 | the request (length as u32, then JSON), then the archive to its end |
//! | 1 | the answer: one JSON object, [`Answer`] |
//! | 2 | panics and the like, for the log |
//! | 3 | the image, empty |
//! | 4 | the spool, empty |

use std::error::Error as StdError;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::iter::successors;
use std::os::fd::{AsRawFd, RawFd};
use std::process::ExitCode;

use serde::{Deserialize, Serialize};
use spore_wire::cause::chain;
use thiserror::Error;

use super::pack::{PackError, PackRequest, Packed, pack};
use crate::confine::limits::ProcessLimits;
use crate::confine::{ConfineError, Confinement, Network, confine};

/// The image's descriptor.
pub const IMAGE_FD: RawFd = 3;

/// The spool's descriptor.
pub const SPOOL_FD: RawFd = 4;

/// The most bytes of a request.
const REQUEST_BYTES_MAX: u32 = 64 * 1024;

/// What the node asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerRequest {
    /// What to pack.
    pub pack: PackRequest,
    /// The uid and gid to run as; `None` stays what it is and is not confined, which only a
    /// process without privileges may ask for.
    pub uid: Option<u32>,
}

/// What the worker says at its end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Answer {
    /// The image is written.
    Packed(Packed),
    /// The archive is at fault: what is wrong with it.
    Refused {
        /// For people.
        message: String,
    },
    /// The data disk is full.
    Full,
    /// The platform is at fault.
    Failed {
        /// For people.
        message: String,
    },
}

/// Why the worker cannot work.
#[derive(Debug, Error)]
pub enum WorkerError {
    /// It was not started as `packer.rs` does.
    #[error("the image worker is started by the node only: {what}")]
    Start {
        /// What is missing.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The request is not readable.
    #[error("the image worker's request cannot be read")]
    Request(#[from] serde_json::Error),
    /// The request is longer than any.
    #[error("a request of {0} bytes is too long")]
    RequestLength(u32),
    /// Root must confine itself.
    #[error("the image worker must not run as root unconfined")]
    Root,
    /// It could not give up its privileges.
    #[error(transparent)]
    Confine(#[from] ConfineError),
    /// The archive or the disk.
    #[error(transparent)]
    Pack(#[from] PackError),
}

/// The verb's whole life: answers on standard output and says by its exit code whether it packed.
/// Legal only in a process with one thread that was started by `packer.rs`.
pub fn serve() -> ExitCode {
    let (answer, code) = match run() {
        Ok(packed) => (Answer::Packed(packed), ExitCode::SUCCESS),
        Err(error) => (answer(&error), ExitCode::FAILURE),
    };
    let text = serde_json::to_vec(&answer).unwrap_or_default();
    match io::stdout().write_all(&text) {
        Ok(()) => code,
        Err(_gone) => ExitCode::FAILURE,
    }
}

/// Whose fault an error is, with its causes.
fn answer(error: &WorkerError) -> Answer {
    let is_full = |cause: &(dyn StdError + 'static)| {
        let system = cause.downcast_ref::<io::Error>();
        system.is_some_and(|error| error.kind() == io::ErrorKind::StorageFull)
    };
    if successors(error.source(), |&cause| cause.source()).any(is_full) {
        return Answer::Full;
    }
    let message = chain(error);
    match error {
        WorkerError::Pack(
            PackError::Spool(_)
            | PackError::Image(_)
            | PackError::Flush(_)
            | PackError::BlockSize(_),
        ) => Answer::Failed { message },
        WorkerError::Pack(_) => Answer::Refused { message },
        _ => Answer::Failed { message },
    }
}

fn run() -> Result<Packed, WorkerError> {
    let mut stdin = io::stdin().lock();
    let request = read_request(&mut stdin)?;
    let image = reopen(IMAGE_FD, "no image on descriptor 3")?;
    let spool = reopen(SPOOL_FD, "no spool on descriptor 4")?;
    give_up(&request, &image, &spool)?;
    Ok(pack(&request.pack, stdin, &spool, &image)?)
}

fn read_request(stdin: &mut impl Read) -> Result<WorkerRequest, WorkerError> {
    let start = |source| WorkerError::Start {
        what: "no request on descriptor 0",
        source,
    };
    let mut length = [0; 4];
    stdin.read_exact(&mut length).map_err(start)?;
    let length = u32::from_le_bytes(length);
    if length > REQUEST_BYTES_MAX {
        return Err(WorkerError::RequestLength(length));
    }
    let mut text = Vec::new();
    stdin
        .take(u64::from(length))
        .read_to_end(&mut text)
        .map_err(start)?;
    Ok(serde_json::from_slice(&text)?)
}

/// An inherited descriptor as a file of one's own: opened again, since taking a number for a
/// descriptor needs unsafe code.
fn reopen(fd: RawFd, what: &'static str) -> Result<File, WorkerError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(format!("/proc/self/fd/{fd}"))
        .map_err(|source| WorkerError::Start { what, source })
}

fn give_up(request: &WorkerRequest, image: &File, spool: &File) -> Result<(), WorkerError> {
    match request.uid {
        None if rustix::process::geteuid().is_root() => Err(WorkerError::Root),
        // A test without root: nothing to give up.
        None => Ok(()),
        Some(uid) => Ok(confine(&Confinement {
            uid,
            keep: vec![image.as_raw_fd(), spool.as_raw_fd()],
            network: Network::Empty,
            limits: ProcessLimits {
                file_bytes: Some(request.pack.limits.total_bytes_max.saturating_mul(2)),
                ..ProcessLimits::PACKER
            },
        })?),
    }
}

#[cfg(test)]
mod tests {
    use spore_wire::node::ImageKind;

    use super::{PackRequest, WorkerError, WorkerRequest, read_request};

    #[test]
    fn a_request_is_read_to_its_end_and_no_further() {
        let request = WorkerRequest {
            pack: PackRequest::of(ImageKind::Folder),
            uid: Some(7),
        };
        let text = serde_json::to_vec(&request).unwrap();
        let mut bytes = u32::try_from(text.len()).unwrap().to_le_bytes().to_vec();
        bytes.extend(text);
        bytes.extend(b"the archive");
        let mut stream = bytes.as_slice();
        assert_eq!(read_request(&mut stream).unwrap(), request);
        assert_eq!(stream, b"the archive");
    }

    #[test]
    fn a_request_of_any_length_allocates_little() {
        let mut stream: &[u8] = &[0xff, 0xff, 0xff, 0xff];
        assert!(matches!(
            read_request(&mut stream),
            Err(WorkerError::RequestLength(u32::MAX))
        ));
    }
}
