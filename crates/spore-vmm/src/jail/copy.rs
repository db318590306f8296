//! A copy of a VMM for a checkpoint: its memory as it stood, in a process that only writes it
//! somewhere.
//!
//! The copy has the VMM's descriptors and one thread. It lets go of all of them but what it writes
//! to and [`super::LIFE_FD`], goes into its own list ([`super::seccomp::Cell::Copy`]), and
//! ends by [`end`]. It allocates nothing: whoever held the allocator's lock is not in it.

use std::io;

use super::sys;
pub use super::sys::Copied;

/// Copies the calling process. Of its threads the copy has the calling one.
///
/// # Errors
/// When there is no memory or no process for it.
pub fn make() -> io::Result<Copied> {
    sys::copy()
}

/// Ends the calling process at once, with no regard for what the VMM would do at its end.
pub fn end(code: u8) -> ! {
    sys::end(code)
}
