//! The calls of the jail that have no safe wrapper: processes and signals, and descriptors by their
//! numbers. What they are for is said by those who call them.
#![expect(
    unsafe_code,
    reason = "processes are made, and descriptors put where a VMM looks for them"
)]

use std::ffi::{c_int, c_void};
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::ptr::{self, NonNull};

use rustix::io::Errno;
use rustix::thread::UnshareFlags;

/// Numbers from here on are free while descriptors change places.
const PARKED_FDS: RawFd = 128;

/// The stack of a spawner, and of the first thread of each VMM: as much as Linux gives a process,
/// of which only what is used takes memory.
const STACK_BYTES: usize = 8 * 1024 * 1024;

/// What no stack may grow into.
const GUARD_BYTES: usize = 64 * 1024;

/// Of <linux/sched.h>, since Linux 5.7; libc has it in a type that is too small.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

fn checked(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Which of two processes this is.
#[derive(Debug)]
pub(super) enum Copied {
    /// The new one.
    Copy,
    /// The one that asked, with the other's pid.
    Source(u32),
}

fn copied(pid: libc::c_long) -> io::Result<Copied> {
    Ok(match u32::try_from(checked(pid)?) {
        Ok(0) => Copied::Copy,
        Ok(pid) => Copied::Source(pid),
        Err(_over) => return Err(io::ErrorKind::InvalidData.into()),
    })
}

/// clone(2) with nothing but SIGCHLD: a copy of the process, with the calling thread alone. A list
/// lets through exactly this.
pub(super) fn copy() -> io::Result<Copied> {
    // SAFETY: without a stack and shared memory this is fork(2). The copy has one thread, and
    // whatever locks others held stay locked in it: its callers allocate nothing.
    copied(unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) })
}

/// fork(2), for a process with one thread.
pub(super) fn fork() -> io::Result<Copied> {
    // SAFETY: the zygote has one thread, so no lock is held by another.
    copied(unsafe { libc::fork() }.into())
}

/// A child of the calling process's parent, born in a cgroup if there is one; with its pidfd.
pub(super) fn sibling(cgroup: Option<BorrowedFd<'_>>) -> io::Result<(Copied, Option<OwnedFd>)> {
    let mut pidfd: RawFd = -1;
    // SAFETY: clone_args is plain integers, for which all zeros is a value.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = u64::from((libc::CLONE_PARENT | libc::CLONE_PIDFD).cast_unsigned());
    args.pidfd = (&raw mut pidfd).expose_provenance() as u64;
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = u64::from(cgroup.as_raw_fd().cast_unsigned());
    }
    // SAFETY: without a stack and shared memory this is fork(2), in a process with one thread; the
    // kernel reads `args`, and writes a number to `pidfd`, which lives.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of_val(&args)) };
    match copied(pid)? {
        // The number was written to the parent's memory after it was copied.
        Copied::Copy => Ok((Copied::Copy, None)),
        source @ Copied::Source(_) => {
            // SAFETY: the kernel has made the descriptor, and nobody else has seen its number.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            Ok((source, Some(pidfd)))
        }
    }
}

/// A stack with a guard below it.
#[derive(Debug)]
pub(super) struct Stack {
    base: NonNull<c_void>,
}

impl Stack {
    pub(super) fn new() -> io::Result<Self> {
        let bytes = STACK_BYTES + GUARD_BYTES;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_STACK;
        // SAFETY: a new mapping at an address that the kernel chooses overlaps nothing.
        let base = unsafe { libc::mmap(ptr::null_mut(), bytes, libc::PROT_NONE, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base).ok_or(io::ErrorKind::OutOfMemory)?;
        let stack = Self { base };
        let above = base.as_ptr().wrapping_byte_add(GUARD_BYTES);
        // SAFETY: the range is the upper part of the new mapping.
        let opened =
            unsafe { libc::mprotect(above, STACK_BYTES, libc::PROT_READ | libc::PROT_WRITE) };
        checked(opened.into())?;
        Ok(stack)
    }

    /// Where it begins: it grows down.
    fn top(&self) -> *mut c_void {
        self.base
            .as_ptr()
            .wrapping_byte_add(GUARD_BYTES + STACK_BYTES)
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        // SAFETY: the whole mapping is this value's own, and nobody runs on it: `aside` waits.
        let _gone = unsafe { libc::munmap(self.base.as_ptr(), STACK_BYTES + GUARD_BYTES) };
    }
}

/// Work, and what came of it.
struct Errand<F, T> {
    work: Option<F>,
    result: Option<T>,
}

extern "C" fn on_errand<F: FnOnce() -> T, T>(errand: *mut c_void) -> c_int {
    // SAFETY: `aside` passes its own `Errand`, which lives until this process has ended, and looks
    // at it only after that.
    let errand = unsafe { &mut *errand.cast::<Errand<F, T>>() };
    errand.result = errand.work.take().map(|work| work());
    0
}

/// Does `work` in a process that shares memory and descriptors with this one and has namespaces of
/// its own, while this one waits. `None` when that process was killed.
pub(super) fn aside<F: FnOnce() -> T, T>(stack: &mut Stack, work: F) -> io::Result<Option<T>> {
    let mut errand = Errand {
        work: Some(work),
        result: None,
    };
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_FILES | libc::SIGCHLD;
    let argument = (&raw mut errand).cast::<c_void>();
    // SAFETY: the process runs on a stack that nobody else uses, by `&mut`, and this one does not
    // go on before it has ended (CLONE_VFORK). So of two that share their memory one runs.
    let pid = unsafe { libc::clone(on_errand::<F, T>, stack.top(), flags, argument) };
    checked(pid.into())?;
    let mut status = 0;
    // SAFETY: a child of this process that nobody else waits for; `status` lives.
    checked(unsafe { libc::waitpid(pid, &raw mut status, 0) }.into())?;
    Ok(errand.result)
}

/// unshare(2), for a process with one thread.
pub(super) fn unshare(flags: UnshareFlags) -> Result<(), Errno> {
    // SAFETY: descriptors stay as they are: none of the callers asks for a table of its own.
    unsafe { rustix::thread::unshare_unsafe(flags) }
}

/// Ends the calling process, and nothing else: no destructor, no buffer.
pub(super) fn end(code: u8) -> ! {
    // SAFETY: it does not come back.
    unsafe { libc::_exit(code.into()) }
}

/// Puts the first of each pair where the second says, and closes every other descriptor of the
/// process, whoever owned it: for one that goes on with exactly these, and never comes back to
/// those who own others.
pub(super) fn place(pairs: &[(RawFd, RawFd)]) -> io::Result<()> {
    let mut parked = Vec::with_capacity(pairs.len());
    for (from, _) in pairs {
        // SAFETY: makes a descriptor, and changes none.
        let made = unsafe { libc::fcntl(*from, libc::F_DUPFD_CLOEXEC, PARKED_FDS) };
        checked(made.into())?;
        parked.push(made);
    }
    close_range(0, PARKED_FDS.cast_unsigned() - 1)?;
    for ((_, to), from) in pairs.iter().zip(&parked) {
        // SAFETY: what was at that number is closed, and those who owned it do not go on.
        checked(unsafe { libc::dup3(*from, *to, libc::O_CLOEXEC) }.into())?;
    }
    close_range(PARKED_FDS.cast_unsigned(), u32::MAX)
}

/// Closes every descriptor of the process but two, whoever owned it: for one that never comes back
/// to those who own others. Allocates nothing.
pub(super) fn close_all_but(one: RawFd, other: RawFd) -> io::Result<()> {
    let mut next = 0;
    for kept in [one.min(other), one.max(other)] {
        let kept = kept.cast_unsigned();
        if next < kept {
            close_range(next, kept - 1)?;
        }
        next = kept + 1;
    }
    close_range(next, u32::MAX)
}

fn close_range(first: u32, last: u32) -> io::Result<()> {
    // SAFETY: as said for those who call it.
    checked(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) })?;
    Ok(())
}

/// Whether there is a descriptor of this number.
pub(super) fn is_open(number: RawFd) -> bool {
    // SAFETY: only asks.
    unsafe { libc::fcntl(number, libc::F_GETFD) >= 0 }
}

/// Takes over what `place` has put at a number. Once for each.
pub(super) fn placed(number: RawFd) -> OwnedFd {
    // SAFETY: the callers have just placed it, and whoever owned what was there before does not go
    // on.
    unsafe { OwnedFd::from_raw_fd(number) }
}

/// Whether this process was started with an environment, which `/proc` would show for its life.
pub(super) fn has_environment() -> bool {
    unsafe extern "C" {
        static environ: *const *const libc::c_char;
    }
    // SAFETY: one thread, so nobody changes it.
    let list = unsafe { environ };
    // SAFETY: it is null or an array that a null ends.
    !list.is_null() && unsafe { !(*list).is_null() }
}

/// Takes the stack's next pages in one go instead of one fault each: a VMM uses about so many until
/// its guest runs.
pub(super) fn take_stack() {
    const BYTES: usize = 80 * 1024;
    const { assert!(BYTES < STACK_BYTES / 2) };
    let here = 0_u8;
    let end = (&raw const here).map_addr(|at| at & !0xfff).cast_mut();
    let from = end.wrapping_byte_sub(BYTES).cast::<c_void>();
    // SAFETY: below the calling frame is nothing yet, and the bytes of what is mapped stay as they
    // are. What cannot be had now is taken as it is used.
    let _taken = unsafe { libc::madvise(from, BYTES, libc::MADV_POPULATE_WRITE) };
}

/// Lets threads share the first one's heap: another for each takes memory, and its making opens a
/// file of `/sys` when there are many.
pub(super) fn one_heap() {
    // SAFETY: only sets a number in the allocator. It cannot fail with this one.
    let _set = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// A set with SIGCHLD alone, or with none.
fn signals(with_child: bool) -> libc::sigset_t {
    // SAFETY: sigset_t is plain integers, for which all zeros is a value.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: makes an empty set of what lives.
    unsafe { libc::sigemptyset(&raw mut set) };
    if with_child {
        // SAFETY: adds a signal that there is.
        unsafe { libc::sigaddset(&raw mut set, libc::SIGCHLD) };
    }
    set
}

/// A descriptor that tells of the ends of children from now on.
pub(super) fn children() -> io::Result<OwnedFd> {
    let set = signals(true);
    // SAFETY: the set lives; what was blocked before is not asked for.
    let blocked = unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const set, ptr::null_mut()) };
    checked(blocked.into())?;
    // SAFETY: the set lives, and a new descriptor is asked for.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    checked(fd.into())?;
    // SAFETY: the kernel has just made it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Lets all signals come as they came before [`children`].
pub(super) fn all_signals() -> io::Result<()> {
    let set = signals(false);
    // SAFETY: the set lives; what was blocked before is not asked for.
    let opened = unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const set, ptr::null_mut()) };
    checked(opened.into())?;
    Ok(())
}

/// Lets the kernel reap the children of the calling process.
pub(super) fn reap_none() -> io::Result<()> {
    // SAFETY: no handler is set: children that end are forgotten.
    let before = unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    if before == libc::SIG_ERR {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
