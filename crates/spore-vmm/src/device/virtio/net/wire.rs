//! The host's end of a network device: a tap, frame by frame.
//!
//! Behind a trait, so that tests have wires that are slow or broken.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;

/// The most bytes of a header before each frame.
pub const HEADER_BYTES_MAX: usize = 12;

/// Where frames go to and come from. Nothing here waits.
pub trait Wire: Send + fmt::Debug {
    /// What tells when there is a frame, or room for one.
    fn descriptor(&self) -> &Arc<OwnedFd>;

    /// Takes the next frame, as much of it as there is room for, and says how much that is.
    /// `WouldBlock` when there is none.
    fn receive(&mut self, into: &mut [u8]) -> io::Result<Received>;

    /// Sends a frame. `WouldBlock` when there is no room for it.
    fn send(&mut self, frame: &[u8]) -> io::Result<()>;
}

/// A frame that came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// One of so many bytes.
    Frame(usize),
    /// One that says of itself that it is not whole: its checksum is to be filled in, or it is to
    /// be cut. Nobody has asked the host for such.
    Unfinished,
}

/// A tap whose frames have a virtio header before them, or none.
#[derive(Debug)]
pub struct Tap {
    descriptor: Arc<OwnedFd>,
    header: usize,
    buffer: Vec<u8>,
}

impl Tap {
    /// Around a tap. `header` is how long the header of its frames is: 0 without IFF_VNET_HDR, and
    /// with it what TUNSETVNETHDRSZ has set, 10 at first. More than [`HEADER_BYTES_MAX`] is none.
    pub fn new(tap: OwnedFd, header: usize) -> io::Result<Self> {
        if ![0, 10, HEADER_BYTES_MAX].contains(&header) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        rustix::io::ioctl_fionbio(&tap, true)?;
        Ok(Self {
            descriptor: Arc::new(tap),
            header,
            buffer: Vec::new(),
        })
    }
}

impl Wire for Tap {
    fn descriptor(&self) -> &Arc<OwnedFd> {
        &self.descriptor
    }

    fn receive(&mut self, into: &mut [u8]) -> io::Result<Received> {
        self.buffer.resize(self.header + into.len(), 0);
        let count = rustix::io::read(&self.descriptor, &mut *self.buffer)?;
        let whole = self.buffer.get(..count).unwrap_or_default();
        let Some((header, frame)) = whole.split_at_checked(self.header) else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // Flags and type of segmentation (virtio 1.2, section 5.1.6). That the checksum was looked
        // at is no work for the guest.
        if let [flags, segments, ..] = header
            && (flags & 1 != 0 || *segments != 0)
        {
            return Ok(Received::Unfinished);
        }
        for (to, from) in into.iter_mut().zip(frame) {
            *to = *from;
        }
        Ok(Received::Frame(frame.len()))
    }

    fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        // Whatever the guest has written as its header, this frame is whole.
        self.buffer.clear();
        self.buffer.resize(self.header, 0);
        self.buffer.extend(frame);
        loop {
            match rustix::io::write(&self.descriptor, &self.buffer) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}
