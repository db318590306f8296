//! Packets of the zygote's socket: one JSON message each, with descriptors or without. Never
//! interprets a message.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use spore_wire::zygote::{FDS_MAX, FromZygote, PACKET_BYTES_MAX};

/// What came.
#[derive(Debug)]
pub(super) enum Received {
    /// A whole packet.
    Packet(Vec<u8>, Vec<OwnedFd>),
    /// One over a limit; what came of it is gone.
    TooLarge,
    /// The other side is gone.
    Closed,
}

/// The socket to the node.
#[derive(Debug)]
pub(super) struct Node(OwnedFd);

impl Node {
    /// Behind a connected `SOCK_SEQPACKET` socket.
    pub(super) const fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// The next packet; waits for one.
    pub(super) fn receive(&self) -> io::Result<Received> {
        let mut bytes = vec![0; PACKET_BYTES_MAX];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = retry_on_intr(|| {
            let into = &mut [IoSliceMut::new(&mut bytes)];
            rustix::net::recvmsg(&self.0, into, &mut control, RecvFlags::CMSG_CLOEXEC)
        });
        let received = match received {
            Ok(received) => received,
            // It went without reading what it was told.
            Err(Errno::CONNRESET) => return Ok(Received::Closed),
            Err(error) => return Err(error.into()),
        };
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(more) = message {
                fds.extend(more);
            }
        }
        let cut = ReturnFlags::TRUNC | ReturnFlags::CTRUNC;
        // There may be room for one more than was asked for.
        Ok(if received.flags.intersects(cut) || fds.len() > FDS_MAX {
            Received::TooLarge
        } else if received.bytes == 0 {
            // An empty packet is the end too: nobody sends one.
            Received::Closed
        } else {
            bytes.truncate(received.bytes);
            Received::Packet(bytes, fds)
        })
    }

    /// Tells something; waits for a node that reads slowly. One that is gone is found so by
    /// [`receive`](Self::receive).
    pub(super) fn tell(&self, message: &FromZygote, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let bytes = serde_json::to_vec(message)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = fd.as_slice();
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let from = &[IoSlice::new(&bytes)];
        let flags = SendFlags::NOSIGNAL;
        match retry_on_intr(|| rustix::net::sendmsg(&self.0, from, &mut control, flags)) {
            Ok(_) | Err(Errno::PIPE | Errno::CONNRESET) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for Node {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
