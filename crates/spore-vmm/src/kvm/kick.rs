//! Calls a processor back from its guest, from another thread and without a gap.
//!
//! A signal ends KVM_RUN; one that comes just before KVM_RUN would be lost. So first a byte is set
//! that KVM looks at when it enters the guest, in the page that it shares with this process, and
//! then the signal is sent:
//!
//! ```text
//!   set, signal, enter   the byte: KVM_RUN comes back at once
//!   enter, set, signal   the signal: KVM_RUN comes back
//!   set, enter, signal   the byte; the signal finds nobody in the guest and does nothing
//! ```
//!
//! The byte stays set until the processor's thread has seen why it was called.
#![expect(
    unsafe_code,
    reason = "a byte of the page that KVM shares with this process is set from another thread"
)]

use std::ffi::{c_int, c_void};
use std::mem::offset_of;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use kvm_bindings::kvm_run;
use rustix::mm::{MapFlags, ProtFlags};
use vmm_sys_util::signal::{Killable as _, SIGRTMIN, register_signal_handler};

use super::KvmError;
use crate::worker::Kick;

/// A page, of which `kvm_run` is the first part.
const MAPPED_BYTES: usize = 4096;

const _: () = assert!(offset_of!(kvm_run, immediate_exit) < MAPPED_BYTES);

/// The byte of one processor. Its mapping keeps the processor's file open.
#[derive(Debug)]
pub struct Recall {
    page: NonNull<c_void>,
}

// SAFETY: the page is mapped until the value is dropped, whichever thread does so.
unsafe impl Send for Recall {}
// SAFETY: all that is done with the page is atomic access to one byte of it.
unsafe impl Sync for Recall {}

impl Recall {
    /// The byte of the processor behind a descriptor.
    pub(super) fn new(vcpu: BorrowedFd<'_>) -> Result<Self, KvmError> {
        let failed = |source: rustix::io::Errno| KvmError::Ioctl {
            ioctl: "mmap of a processor",
            source: source.into(),
        };
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses overlaps nothing.
        let page = unsafe {
            rustix::mm::mmap(
                ptr::null_mut(),
                MAPPED_BYTES,
                protection,
                MapFlags::SHARED,
                vcpu,
                0,
            )
        };
        let page = NonNull::new(page.map_err(failed)?);
        let page = page.ok_or_else(|| failed(rustix::io::Errno::NOMEM))?;
        Ok(Self { page })
    }

    fn byte(&self) -> &AtomicU8 {
        let base = self.page.as_ptr().cast::<u8>();
        // SAFETY: the offset is inside of the page (asserted above).
        let byte = unsafe { base.add(offset_of!(kvm_run, immediate_exit)) };
        // SAFETY: the page is mapped while `self` lives; in this mapping of it nobody has another
        // reference, and through others it is only read by the kernel and written as a whole byte.
        unsafe { AtomicU8::from_ptr(byte) }
    }

    /// Lets KVM_RUN come back without entering the guest, from now on or no longer.
    pub fn set(&self, wanted: bool) {
        self.byte().store(u8::from(wanted), Ordering::SeqCst);
    }

    /// Lets the guest's processor, which runs on `thread`, come back to us.
    pub fn call(&self, thread: &JoinHandle<()>) {
        self.set(true);
        // An ended thread is not in the guest either.
        let _called = thread.kill(SIGRTMIN());
    }
}

impl Kick for Recall {
    fn kick(&self, thread: &JoinHandle<()>) {
        self.call(thread);
    }

    fn take_back(&self) {
        self.set(false);
    }
}

/// The byte of a processor that is not there yet: nobody is in its guest.
impl Kick for Arc<OnceLock<Recall>> {
    fn kick(&self, thread: &JoinHandle<()>) {
        if let Some(recall) = self.get() {
            recall.kick(thread);
        }
    }

    fn take_back(&self) {
        if let Some(recall) = self.get() {
            recall.take_back();
        }
    }
}

impl Drop for Recall {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own and no reference into it outlives it.
        let unmapped = unsafe { rustix::mm::munmap(self.page.as_ptr(), MAPPED_BYTES) };
        debug_assert!(unmapped.is_ok(), "a whole mapping can be unmapped");
    }
}

/// Does nothing: that it is called ends KVM_RUN.
extern "C" fn nothing(_signal: c_int, _info: *mut libc::siginfo_t, _context: *mut c_void) {}

/// Makes the signal that processors are called by one that ends no process. Once, before any runs;
/// again does no harm.
pub fn take_signal() -> Result<(), KvmError> {
    register_signal_handler(SIGRTMIN(), nothing).map_err(|error| KvmError::Ioctl {
        ioctl: "sigaction",
        source: error.into(),
    })
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;
    use std::time::Duration;

    use rustix::fs::MemfdFlags;

    use super::{Recall, take_signal};

    #[test]
    fn a_call_sets_the_byte_and_ends_a_wait() {
        take_signal().unwrap();
        let file = rustix::fs::memfd_create("run", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 4096).unwrap();
        let recall = Recall::new(file.as_fd()).unwrap();
        let byte = || {
            let mut bytes = [0; 3];
            rustix::io::pread(&file, &mut bytes, 0).unwrap();
            bytes
        };
        let (end, begin) = rustix::pipe::pipe().unwrap();
        let thread = std::thread::spawn(move || {
            let mut byte = [0];
            let read = rustix::io::read(&end, &mut byte);
            assert_eq!(read, Err(rustix::io::Errno::INTR));
        });
        // Whether it waits already is not seen from here: it is called until it has ended.
        while !thread.is_finished() {
            recall.call(&thread);
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(byte(), [0, 1, 0]);
        recall.call(&thread);
        recall.set(false);
        assert_eq!(byte(), [0, 0, 0]);
        thread.join().unwrap();
        drop(begin);
    }
}
