//! A frozen copy of a VMM, for a checkpoint: the guest's memory as it stood, in a process that does
//! nothing. The node reads it from outside, as it reads a VMM's, while the guest goes on.
//!
//! The copy has one thread, which lets go of every descriptor but [`super::LIFE_FD`] and the socket
//! that it was made with, goes into its own list ([`super::seccomp::Cell::Copy`]), says one byte
//! and waits until nobody holds the other end. It allocates nothing: whoever held the allocator's
//! lock is not in it. What is mapped for KVM is not in it either (`kvm/vm.rs`), so that it does not
//! keep the VM after its VMM.
//!
//! Who has taken a VMM over can make such copies too. They are in its jail and its cgroup, and no
//! more than its limit of processes.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, write};

use super::LIFE_FD;
use super::seccomp::{self, Cell};
use super::sys::{self, Copied};

/// Makes a copy of the calling process that ends when the other end of `socket` is closed, or after
/// `limit`; gives its pid. Nobody needs to wait for it.
///
/// # Errors
/// When there is no memory or no process for it.
pub fn freeze(socket: BorrowedFd<'_>, limit: Duration) -> io::Result<u32> {
    match sys::copy()? {
        Copied::Source(pid) => Ok(pid),
        Copied::Copy => stand(socket, limit),
    }
}

/// What the copy does. Whatever fails, it ends, which whoever waits for it sees.
fn stand(socket: BorrowedFd<'_>, limit: Duration) -> ! {
    // For operators, who look for VMs.
    let _unnamed = rustix::thread::set_name(c"spore-frozen");
    let alone = sys::close_all_but(LIFE_FD, socket.as_raw_fd()).is_ok();
    if alone && seccomp::enter(Cell::Copy).is_ok() && write(socket, &[1]).is_ok() {
        // That the other end is closed is always told.
        let mut watched = [PollFd::from_borrowed_fd(socket, PollFlags::empty())];
        let limit = Timespec::try_from(limit).ok();
        while poll(&mut watched, limit.as_ref()) == Err(Errno::INTR) {}
    }
    sys::end(0)
}
