//! Descriptors that this process was started with, by number. Called first thing in `main`, once.
#![expect(unsafe_code, reason = "a number becomes an owned descriptor")]

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::{FdFlags, fcntl_setfd};

/// Where the control socket is.
pub const CONTROL_FD: RawFd = 3;

/// Where `/dev/kvm` is.
pub const KVM_FD: RawFd = 4;

/// Why a descriptor is not there.
#[derive(Debug, thiserror::Error)]
pub enum InheritError {
    /// It was not given.
    #[error("descriptor {fd} was not given")]
    Missing {
        /// Its number.
        fd: RawFd,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// They were taken before.
    #[error("what this process was given is taken already")]
    Twice,
}

static TAKEN: AtomicBool = AtomicBool::new(false);

/// Takes what is at these numbers, each of which is above those of standard streams and there
/// once; nothing else of this process has opened anything yet.
pub fn take<const COUNT: usize>(fds: [RawFd; COUNT]) -> Result<[OwnedFd; COUNT], InheritError> {
    if TAKEN.swap(true, Ordering::SeqCst) {
        return Err(InheritError::Twice);
    }
    for fd in fds {
        // SAFETY: the number is not negative, and borrowing asks of it only that it is open while
        // it is used, which the one call here finds out.
        let given = unsafe { BorrowedFd::borrow_raw(fd) };
        fcntl_setfd(given, FdFlags::CLOEXEC).map_err(|error| InheritError::Missing {
            fd,
            source: error.into(),
        })?;
    }
    // SAFETY: each is open, as was just seen; it was opened by whoever started this process, and
    // nobody in it has taken it, by `TAKEN`.
    Ok(fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }))
}
