//! Packets of the daemon's socket: one JSON message each, at most one descriptor with it.
//!
//! Called by `feed.rs`, and by the tests and the example that play the daemon. Never interprets a
//! message.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use spore_wire::gateway::PACKET_BYTES_MAX;
use tokio::io::Interest;
use tokio::net::UnixStream;

/// Why a packet could not be sent or received; the session is over then.
#[derive(Debug, thiserror::Error)]
pub enum PacketError {
    /// The socket failed.
    #[error("the socket between daemon and gateway failed")]
    Socket(#[source] std::io::Error),
    /// The other side closed it.
    #[error("the other side closed the socket between daemon and gateway")]
    Closed,
    /// A packet is too large to send or was cut on its way.
    #[error("a packet of over {PACKET_BYTES_MAX} bytes")]
    TooLarge,
    /// A packet that is not a message of this generation.
    #[error("a packet that is no message of this generation")]
    Malformed(#[source] serde_json::Error),
}

/// One end of a `SOCK_SEQPACKET` connection.
#[derive(Debug)]
pub struct PacketSocket {
    /// Called a stream by the runtime, which has no name for packets; only its readiness is used.
    socket: UnixStream,
}

impl PacketSocket {
    /// Takes a connected socket. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// When the runtime cannot watch it.
    pub fn new(fd: OwnedFd) -> Result<Self, PacketError> {
        let socket = std::os::unix::net::UnixStream::from(fd);
        socket.set_nonblocking(true).map_err(PacketError::Socket)?;
        let socket = UnixStream::from_std(socket).map_err(PacketError::Socket)?;
        Ok(Self { socket })
    }

    pub(crate) const fn accepted(socket: UnixStream) -> Self {
        Self { socket }
    }

    /// Receives one message, and the descriptor that came with it, if one did. A second
    /// descriptor is closed. Safe to cancel.
    ///
    /// # Errors
    /// Any [`PacketError`]; the session is over then.
    pub async fn receive<M: DeserializeOwned>(
        &self,
        buffer: &mut Vec<u8>,
    ) -> Result<(M, Option<OwnedFd>), PacketError> {
        buffer.resize(PACKET_BYTES_MAX, 0);
        let (bytes, fd) = self
            .socket
            .async_io(Interest::READABLE, || receive_one(&self.socket, buffer))
            .await
            .map_err(PacketError::Socket)??;
        let message = serde_json::from_slice(&buffer[..bytes]).map_err(PacketError::Malformed)?;
        Ok((message, fd))
    }

    /// Sends one message, with a descriptor when `fd` is given.
    ///
    /// # Errors
    /// Any [`PacketError`] but `Malformed`, except for a message that has no JSON form.
    pub async fn send<M: Serialize + Sync>(
        &self,
        message: &M,
        fd: Option<&OwnedFd>,
    ) -> Result<(), PacketError> {
        let bytes = serde_json::to_vec(message).map_err(PacketError::Malformed)?;
        if bytes.len() > PACKET_BYTES_MAX {
            return Err(PacketError::TooLarge);
        }
        self.socket
            .async_io(Interest::WRITABLE, || {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                let fds = fd.map(|fd| [fd.as_fd()]);
                if let Some(fds) = &fds {
                    control.push(SendAncillaryMessage::ScmRights(fds));
                }
                let slices = [IoSlice::new(&bytes)];
                let sent =
                    rustix::net::sendmsg(&self.socket, &slices, &mut control, SendFlags::NOSIGNAL)?;
                Ok(sent)
            })
            .await
            .map_err(PacketError::Socket)?;
        Ok(())
    }
}

/// The outer error is the socket's, retried when it would block; the inner one the packet's.
fn receive_one(
    socket: &UnixStream,
    buffer: &mut [u8],
) -> std::io::Result<Result<(usize, Option<OwnedFd>), PacketError>> {
    // Room for two, so that a second descriptor is seen and closed rather than left behind.
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::net::recvmsg(
        socket,
        &mut [IoSliceMut::new(buffer)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let mut fd = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            for received in fds {
                fd.get_or_insert(received);
            }
        }
    }
    if received.flags.contains(ReturnFlags::TRUNC) {
        return Ok(Err(PacketError::TooLarge));
    }
    if received.bytes == 0 {
        return Ok(Err(PacketError::Closed));
    }
    Ok(Ok((received.bytes, fd)))
}
