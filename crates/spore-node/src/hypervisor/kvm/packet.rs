//! Packets of the sockets to VMMs and to the zygote: one JSON message each, with descriptors or
//! without. Never interprets a message.
//!
//! Everything that is read counts as written by a tenant: a packet has a limit, and descriptors
//! that nobody asked for are closed by the kernel.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use spore_wire::launch::FDS_MAX;
use tokio::io::Interest;
use tokio::net::UnixStream;
use zeroize::Zeroizing;

/// A connected `SOCK_SEQPACKET` socket.
#[derive(Debug)]
pub(super) struct PacketSocket {
    /// Called a stream by the runtime, which has no name for packets.
    socket: UnixStream,
    bytes_max: usize,
}

impl PacketSocket {
    /// Around a socket whose packets have at most so many bytes. Must be called inside a runtime.
    pub(super) fn new(socket: OwnedFd, bytes_max: usize) -> io::Result<Self> {
        let socket = std::os::unix::net::UnixStream::from(socket);
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket: UnixStream::from_std(socket)?,
            bytes_max,
        })
    }

    /// Sends a message; its bytes are wiped, since there may be keys among them.
    pub(super) async fn send<M: Serialize + Sync>(
        &self,
        message: &M,
        fds: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let bytes = Zeroizing::new(serde_json::to_vec(message)?);
        if bytes.len() > self.bytes_max || fds.len() > FDS_MAX {
            return Err(io::Error::other("a request that is too large for a packet"));
        }
        let send = || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() {
                control.push(SendAncillaryMessage::ScmRights(fds));
            }
            let slices = [IoSlice::new(&bytes)];
            let flags = SendFlags::NOSIGNAL;
            Ok(sendmsg(&self.socket, &slices, &mut control, flags)?)
        };
        self.socket.async_io(Interest::WRITABLE, send).await?;
        Ok(())
    }

    /// Receives a message, and at most one descriptor with it. Safe to cancel.
    pub(super) async fn receive<M: DeserializeOwned>(&self) -> io::Result<(M, Option<OwnedFd>)> {
        let mut bytes = vec![0; self.bytes_max];
        let read = || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let into = &mut [IoSliceMut::new(&mut bytes)];
            let flags = RecvFlags::CMSG_CLOEXEC;
            let got = recvmsg(&self.socket, into, &mut control, flags)?;
            let mut fds = Vec::new();
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(more) = message {
                    fds.extend(more);
                }
            }
            Ok((got.bytes, got.flags, fds.into_iter().next()))
        };
        let (count, flags, fd) = self.socket.async_io(Interest::READABLE, read).await?;
        if count == 0 {
            return Err(io::ErrorKind::NotConnected.into());
        }
        if flags.contains(ReturnFlags::TRUNC) {
            return Err(io::Error::other("a packet that is too large"));
        }
        let message = bytes.get(..count).unwrap_or_default();
        let message = serde_json::from_slice(message)
            .map_err(|error| io::Error::other(format!("a packet that is no message: {error}")))?;
        Ok((message, fd))
    }
}
