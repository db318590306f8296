//! The host's end of a console's port: a socket that listens, and one connection of it at a time.
//!
//! Behind traits, so that tests have hosts that take a byte at a time or break.

use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::net::{RecvFlags, SendFlags, Shutdown, SocketFlags};

/// Where hosts come from.
pub trait Door: Send + fmt::Debug {
    /// What is readable when somebody waits.
    fn descriptor(&self) -> &Arc<OwnedFd>;

    /// Lets one in, if somebody waits. Never waits itself.
    fn accept(&mut self) -> io::Result<Option<Box<dyn Peer>>>;
}

/// A host that is connected. Neither reading nor writing waits; reading no bytes is its end.
pub trait Peer: Read + Write + Send + fmt::Debug {
    /// What tells when it can be read from or written to.
    fn descriptor(&self) -> &Arc<OwnedFd>;

    /// Ends the connection for the host, whoever else still holds the descriptor.
    fn close(&mut self);
}

/// A listening socket. Who comes while another is connected waits in its queue.
#[derive(Debug)]
pub struct Listener(Arc<OwnedFd>);

impl Listener {
    /// Around a socket that listens.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Self(Arc::new(socket)))
    }
}

impl Door for Listener {
    fn descriptor(&self) -> &Arc<OwnedFd> {
        &self.0
    }

    fn accept(&mut self) -> io::Result<Option<Box<dyn Peer>>> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        match rustix::net::accept_with(&self.0, flags) {
            Ok(socket) => Ok(Some(Box::new(Stream(Arc::new(socket))))),
            Err(error) => match io::Error::from(error) {
                // Nobody, or nobody any more.
                error if is_nothing_now(&error) => Ok(None),
                error if error.kind() == io::ErrorKind::ConnectionAborted => Ok(None),
                error => Err(error),
            },
        }
    }
}

/// A connected socket.
#[derive(Debug)]
pub struct Stream(Arc<OwnedFd>);

impl Stream {
    /// Around a socket that is connected.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Self(Arc::new(socket)))
    }
}

impl Read for Stream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let (read, _) = rustix::net::recv(&self.0, into, RecvFlags::DONTWAIT)?;
        Ok(read)
    }
}

impl Write for Stream {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        // Without a signal: a host that is gone is an error like others.
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        Ok(rustix::net::send(&self.0, from, flags)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Peer for Stream {
    fn descriptor(&self) -> &Arc<OwnedFd> {
        &self.0
    }

    fn close(&mut self) {
        // It fails where the host has closed before.
        let _gone = rustix::net::shutdown(&self.0, Shutdown::Both);
    }
}

/// Whether an error only says to come back later: it is ready when it is asked again.
pub(super) fn is_nothing_now(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}
