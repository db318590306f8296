//! A client of a VMM's control socket (`spore_wire::vmm`).
//!
//! Used by the `kvm` driver. The VMM serves one client at a time, the newest. Everything that it
//! says counts as written by a tenant who took it over: packets have a limit, descriptors that come
//! with one are closed, and nothing is more than text and numbers. Never starts or kills a process.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::Duration;

use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, connect, recv, sendmsg, socket_with,
};
use spore_wire::launch::FDS_MAX;
use spore_wire::vmm::{FromVmm, PACKET_BYTES_MAX, ToVmm, VmmState};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::time::timeout;
use zeroize::Zeroizing;

/// How long one request may take, beside what it says itself; each is milliseconds of work.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Events that wait to be taken; more are forgotten, oldest first.
const EVENTS_MAX: usize = 16;

/// A connection.
#[derive(Debug)]
pub(super) struct Client {
    /// Called a stream by the runtime, which has no name for packets.
    socket: UnixStream,
    events: VecDeque<FromVmm>,
    /// How far the VMM was when this connected.
    state: VmmState,
    /// A request was given up half way: what comes next belongs to it.
    is_out_of_step: bool,
}

impl Client {
    /// Connects, and hears how far the VMM is.
    pub(super) async fn connect(path: &Path, wait: Duration) -> io::Result<Self> {
        let connected = async {
            let flags = SocketFlags::CLOEXEC;
            let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
            connect(&socket, &SocketAddrUnix::new(path)?)?;
            let socket = std::os::unix::net::UnixStream::from(socket);
            socket.set_nonblocking(true)?;
            let mut this = Self {
                socket: UnixStream::from_std(socket)?,
                events: VecDeque::new(),
                state: VmmState::Parked,
                is_out_of_step: false,
            };
            match this.receive().await? {
                FromVmm::Hello { state, .. } => this.state = state,
                other => return Err(unexpected(&other)),
            }
            Ok(this)
        };
        timeout(wait, connected).await.map_err(|_elapsed| {
            let text = format!("the VMM did not speak within {wait:?}");
            io::Error::new(io::ErrorKind::TimedOut, text)
        })?
    }

    /// How far the VMM was when this connected.
    pub(super) const fn state(&self) -> VmmState {
        self.state
    }

    /// Whether requests may be made; after one that was given up only a new connection helps.
    pub(super) const fn is_in_step(&self) -> bool {
        !self.is_out_of_step
    }

    /// Asks for something and waits until it is done; gives how many bytes were written to the file
    /// that went with it. One that takes too long, or is cancelled, is the last.
    pub(super) async fn ask(
        &mut self,
        request: &ToVmm,
        fds: &[BorrowedFd<'_>],
        more: Duration,
    ) -> io::Result<u64> {
        if self.is_out_of_step {
            return Err(io::Error::other(
                "an earlier request was given up, and its answer may still come",
            ));
        }
        self.is_out_of_step = true;
        let limit = REQUEST_TIMEOUT + more;
        let exchange = async {
            self.send(request, fds).await?;
            loop {
                match self.receive().await? {
                    FromVmm::Done { bytes } => return Ok(Ok(bytes)),
                    FromVmm::Failed { why } => return Ok(Err(why)),
                    event => self.remember(event),
                }
            }
        };
        let answer: io::Result<Result<u64, String>> =
            timeout(limit, exchange).await.map_err(|_elapsed| {
                let text = format!("the VMM gave no answer within {limit:?}");
                io::Error::new(io::ErrorKind::TimedOut, text)
            })?;
        let answer = answer?;
        self.is_out_of_step = false;
        answer.map_err(io::Error::other)
    }

    /// The next thing that the VMM tells unasked. Safe to cancel.
    pub(super) async fn next_event(&mut self) -> io::Result<FromVmm> {
        match self.events.pop_front() {
            Some(event) => Ok(event),
            None => self.receive().await,
        }
    }

    fn remember(&mut self, event: FromVmm) {
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    async fn send(&self, request: &ToVmm, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        // There may be keys in it.
        let bytes = Zeroizing::new(serde_json::to_vec(request)?);
        if bytes.len() > PACKET_BYTES_MAX || fds.len() > FDS_MAX {
            return Err(io::Error::other("a request that is too large for a packet"));
        }
        let send = || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() {
                control.push(SendAncillaryMessage::ScmRights(fds));
            }
            let slices = [IoSlice::new(&bytes)];
            Ok(sendmsg(
                &self.socket,
                &slices,
                &mut control,
                SendFlags::NOSIGNAL,
            )?)
        };
        self.socket.async_io(Interest::WRITABLE, send).await?;
        Ok(())
    }

    async fn receive(&self) -> io::Result<FromVmm> {
        let mut bytes = vec![0; PACKET_BYTES_MAX];
        let read = || {
            // Without room for descriptors the kernel closes those that come.
            let (read, whole) = recv(&self.socket, &mut *bytes, RecvFlags::TRUNC)?;
            Ok((read, whole))
        };
        let (read, whole) = self.socket.async_io(Interest::READABLE, read).await?;
        if whole == 0 {
            return Err(io::ErrorKind::NotConnected.into());
        }
        let message = bytes.get(..whole.min(read));
        let message = message.filter(|message| message.len() == whole);
        let too_large = || io::Error::other("the VMM sent a packet that is too large");
        let message = message.ok_or_else(too_large)?;
        serde_json::from_slice(message)
            .map_err(|error| io::Error::other(format!("the VMM sent what is no message: {error}")))
    }
}

fn unexpected(message: &FromVmm) -> io::Error {
    io::Error::other(format!("the VMM said {message:?} where it should greet"))
}
