//! The system calls that rustix does not offer as safe functions.
//!
//! Called by [`crate::launch`], [`crate::reap`], [`crate::thaw`], [`crate::view`],
//! [`crate::folder`] and [`crate::exec`]. Holds no state and no policy.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use rustix::process::Pid;
use rustix::thread::UnshareFlags;

/// `_IOW('R', 0x03, int[2])` of `<linux/random.h>`.
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
/// `_IO('R', 0x07)` of `<linux/random.h>`.
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

/// The most bytes of entropy given to the kernel at once; it needs 32.
pub const ENTROPY_BYTES_MAX: usize = 512;

/// `struct rand_pool_info` of `<linux/random.h>`, with room for the bytes.
#[repr(C)]
struct RandPoolInfo {
    entropy_bits: libc::c_int,
    bytes: libc::c_int,
    buffer: [u8; ENTROPY_BYTES_MAX],
}

/// Mixes `bytes` into the kernel's pool, credits them, and makes the generator use them at once.
///
/// # Errors
/// Whatever the kernel answers; `EINVAL` for more than [`ENTROPY_BYTES_MAX`] bytes.
pub fn add_entropy(random: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<()> {
    let invalid = || io::Error::from_raw_os_error(libc::EINVAL);
    let mut info = RandPoolInfo {
        entropy_bits: libc::c_int::try_from(bytes.len() * 8).map_err(|_e| invalid())?,
        bytes: libc::c_int::try_from(bytes.len()).map_err(|_e| invalid())?,
        buffer: [0; ENTROPY_BYTES_MAX],
    };
    let room = info.buffer.get_mut(..bytes.len()).ok_or_else(invalid)?;
    room.copy_from_slice(bytes);
    // SAFETY: `info` is a valid rand_pool_info whose `bytes` bytes are initialised, and lives
    // across the call; the kernel only reads it.
    let added = unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const info) };
    info.buffer.fill(0);
    std::hint::black_box(&info.buffer);
    answer(added)?;
    // SAFETY: this request takes no argument.
    answer(unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) })
}

/// Gives the calling thread a mount namespace of its own.
///
/// # Errors
/// Whatever the kernel answers.
pub fn unshare_mounts() -> io::Result<()> {
    // SAFETY: the file table stays shared (no `FILES`), which is the only hazard of this call.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.map_err(io::Error::from)
}

/// Gives the calling thread a root and a working directory of its own, without which it may not
/// enter another mount namespace.
///
/// # Errors
/// Whatever the kernel answers.
pub fn unshare_root() -> io::Result<()> {
    // SAFETY: the file table stays shared (no `FILES`), which is the only hazard of this call.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }.map_err(io::Error::from)
}

/// Blocks SIGCHLD and gives a descriptor that is readable while one is pending. To be called
/// before the first other thread starts, since threads inherit the mask.
///
/// # Errors
/// Whatever the kernel answers.
pub fn child_signals() -> io::Result<OwnedFd> {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `set` is valid for writing a signal set, which sigemptyset does in full.
    answer(unsafe { libc::sigemptyset(set.as_mut_ptr()) })?;
    // SAFETY: sigemptyset has initialised it and did not fail.
    let mut set = unsafe { set.assume_init() };
    // SAFETY: `set` is an initialised signal set.
    answer(unsafe { libc::sigaddset(&raw mut set, libc::SIGCHLD) })?;
    // SAFETY: `set` is initialised; the old mask is not wanted.
    answer(unsafe { libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) })?;
    let flags = libc::SFD_CLOEXEC | libc::SFD_NONBLOCK;
    // SAFETY: `set` is initialised, and -1 asks for a new descriptor.
    let fd = unsafe { libc::signalfd(-1, &raw const set, flags) };
    answer(fd)?;
    // SAFETY: the kernel has just given us this descriptor, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Lets the child of `command` keep `fds`, under the same numbers. The caller keeps them open
/// until the child is spawned.
pub fn inherit(command: &mut Command, fds: &[BorrowedFd<'_>]) {
    let numbers: Vec<RawFd> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
    let keep = move || {
        for number in &numbers {
            // SAFETY: F_SETFD reads no memory; a wrong number is answered with EBADF.
            answer(unsafe { libc::fcntl(*number, libc::F_SETFD, 0) })?;
        }
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec and makes only fcntl calls, which are
    // async-signal-safe; it allocates nothing unless it fails with a plain OS error.
    unsafe { command.pre_exec(keep) };
}

/// Takes over a descriptor that the parent left open for us, and closes it at the next exec.
///
/// # Errors
/// `EBADF` when there is no such descriptor.
pub fn take_inherited(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_SETFD reads no memory; a wrong number is answered with EBADF.
    answer(unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    // SAFETY: it is open, and the parent left it for exactly this call: each number is named once
    // in what the parent says, and nothing else in this fresh process owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Sends any signal, real-time ones included, to a process group; 0 only asks whether there is one.
///
/// # Errors
/// `ESRCH` when the group is gone, `EINVAL` for a number that is no signal.
pub fn signal_group(leader: Pid, signal: i32) -> io::Result<()> {
    // SAFETY: kill takes plain numbers; `leader` is positive, so this names one group only.
    answer(unsafe { libc::kill(-leader.as_raw_nonzero().get(), signal) })
}

fn answer(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use super::{ENTROPY_BYTES_MAX, RNDADDENTROPY, RNDRESEEDCRNG, add_entropy, take_inherited};

    #[test]
    fn the_request_numbers_are_those_of_the_kernels_header() {
        let write = 1 << 30 | 8 << 16 | u64::from(b'R') << 8;
        assert_eq!(RNDADDENTROPY, write | 3);
        assert_eq!(RNDRESEEDCRNG, u64::from(b'R') << 8 | 7);
    }

    #[test]
    fn too_much_entropy_is_refused_before_the_kernel_is_asked() {
        let null = std::fs::File::open("/dev/null").unwrap();
        let error = add_entropy(null.as_fd(), &[1; ENTROPY_BYTES_MAX + 1]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    }

    #[test]
    fn a_descriptor_that_is_not_open_is_not_taken() {
        assert!(take_inherited(1_000_000).is_err());
    }
}
