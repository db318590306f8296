//! Packets of the control socket: one JSON message each, with descriptors or without.
//!
//! Never interprets a message. Never waits: whoever does not read what it asked for is not served.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::retry_on_intr;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendFlags, SocketFlags,
};
use spore_wire::launch::FDS_MAX;
use spore_wire::vmm::{FromVmm, PACKET_BYTES_MAX, ToVmm};
use zeroize::Zeroizing;

/// Why a connection is over.
#[derive(Debug, thiserror::Error)]
pub enum PacketError {
    /// The socket failed.
    #[error("the control socket failed")]
    Socket(#[from] io::Error),
    /// The other side is gone.
    #[error("the other side closed the control socket")]
    Closed,
    /// A packet was cut on its way.
    #[error("a packet of over {PACKET_BYTES_MAX} bytes")]
    TooLarge,
    /// Descriptors of a packet are missing, and nobody knows which.
    #[error(
        "not all descriptors of a packet came: there were over {FDS_MAX}, or the VMM may open no \
         more"
    )]
    Descriptors,
    /// What came is no message of this generation.
    #[error("a packet that is no message of this generation")]
    Malformed(#[source] serde_json::Error),
}

/// A connected socket.
#[derive(Debug)]
pub struct Connection(OwnedFd);

impl Connection {
    /// The next of those who wait at a listening socket, if anybody does.
    pub fn accept(listener: BorrowedFd<'_>) -> io::Result<Option<Self>> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        match retry_on_intr(|| rustix::net::accept_with(listener, flags)) {
            Ok(socket) => Ok(Some(Self(socket))),
            // Nobody, or nobody any more.
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::CONNABORTED) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// A message, and the descriptors that came with it. Its bytes are wiped: there are keys among
    /// them.
    pub fn receive(&self) -> Result<(ToVmm, Vec<OwnedFd>), PacketError> {
        let mut bytes = Zeroizing::new(vec![0; self.comes()?.min(PACKET_BYTES_MAX)]);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = retry_on_intr(|| {
            let into = &mut [IoSliceMut::new(&mut bytes)];
            rustix::net::recvmsg(&self.0, into, &mut control, RecvFlags::CMSG_CLOEXEC)
        });
        let received = received.map_err(io::Error::from)?;
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(more) = message {
                fds.extend(more);
            }
        }
        if received.flags.contains(ReturnFlags::TRUNC) {
            return Err(PacketError::TooLarge);
        }
        if received.flags.contains(ReturnFlags::CTRUNC) {
            return Err(PacketError::Descriptors);
        }
        if received.bytes == 0 {
            return Err(PacketError::Closed);
        }
        let message = bytes.get(..received.bytes).unwrap_or_default();
        let message = serde_json::from_slice(message).map_err(PacketError::Malformed)?;
        Ok((message, fds))
    }

    /// The length of the next packet: room for the longest would cost every VMM more memory, and
    /// more time to wipe it, than all else about a request.
    fn comes(&self) -> io::Result<usize> {
        let mut none = RecvAncillaryBuffer::default();
        let flags = RecvFlags::PEEK | RecvFlags::TRUNC | RecvFlags::CMSG_CLOEXEC;
        let seen = retry_on_intr(|| {
            let into = &mut [IoSliceMut::new(&mut [])];
            rustix::net::recvmsg(&self.0, into, &mut none, flags)
        });
        Ok(seen?.bytes)
    }

    /// Tells something. Whoever has not read what was told before is an error.
    pub fn send(&self, message: &FromVmm) -> Result<(), PacketError> {
        let bytes = serde_json::to_vec(message).map_err(PacketError::Malformed)?;
        let mut none = SendAncillaryBuffer::default();
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let from = &[IoSlice::new(&bytes)];
        let sent = retry_on_intr(|| rustix::net::sendmsg(&self.0, from, &mut none, flags));
        sent.map_err(io::Error::from)?;
        Ok(())
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
