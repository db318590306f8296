//! The virtio-serial port as the session loop uses it: never blocking, whether a host is there or
//! not.
//!
//! Called by [`crate::agent`].
//!
//! While no host is connected, poll reports a hang-up of the port all the time, and read gives 0
//! bytes. Waiting for it by level would be a busy loop, so it is watched by edge (epoll), and the
//! epoll descriptor is what the loop waits for. The driver wakes the port's waiters when the host
//! connects, sends, or has taken what was written (virtio_console.c of Linux 6.1).

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;

use crate::clock;

/// A port and what is known of it.
#[derive(Debug)]
pub struct Port {
    fd: OwnedFd,
    edges: OwnedFd,
    may_read: bool,
    may_write: bool,
}

impl Port {
    /// Takes over the port.
    ///
    /// # Errors
    /// When it cannot be made non-blocking or watched.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
        let edges = epoll::create(CreateFlags::CLOEXEC)?;
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::ET;
        epoll::add(&edges, &fd, EventData::new_u64(0), flags)?;
        Ok(Self {
            fd,
            edges,
            may_read: true,
            may_write: true,
        })
    }

    /// What to wait for.
    #[must_use]
    pub const fn edges(&self) -> &OwnedFd {
        &self.edges
    }

    /// Takes note of an edge, if there was one.
    pub fn notice(&mut self) {
        let mut events = Vec::with_capacity(4);
        let buffer = rustix::buffer::spare_capacity(&mut events);
        if matches!(epoll::wait(&self.edges, buffer, Some(&clock::timeout(0))), Ok(n) if n > 0) {
            self.may_read = true;
            self.may_write = true;
        }
    }

    /// Whether reading may give something before the next edge.
    #[must_use]
    pub const fn may_read(&self) -> bool {
        self.may_read
    }

    /// Reads what there is; 0 when there is nothing now.
    pub fn read(&mut self, buffer: &mut [u8]) -> usize {
        if !self.may_read {
            return 0;
        }
        match again(|| rustix::io::read(&self.fd, &mut *buffer)) {
            // No host: 0. Nothing to read: EAGAIN. Either way the next edge tells.
            Ok(0) | Err(_) => {
                self.may_read = false;
                0
            }
            Ok(bytes) => bytes,
        }
    }

    /// Writes what there is room for; 0 when there is none now.
    pub fn write(&mut self, bytes: &[u8]) -> usize {
        if !self.may_write || bytes.is_empty() {
            return 0;
        }
        match again(|| rustix::io::write(self.fd.as_fd(), bytes)) {
            Ok(0) | Err(_) => {
                self.may_write = false;
                0
            }
            Ok(bytes) => bytes,
        }
    }
}

fn again<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            result => return result,
        }
    }
}
