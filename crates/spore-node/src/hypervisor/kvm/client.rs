//! A client of a VMM's control socket (`spore_wire::vmm`).
//!
//! Used by the `kvm` driver. The VMM serves one client at a time, the newest. Everything that it
//! says counts as written by a tenant who took it over: nothing is more than text and numbers.
//! Never starts or kills a process.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use spore_wire::vmm::{CopyState, FromVmm, PACKET_BYTES_MAX, ToVmm, VmmState};
use tokio::time::timeout;

use super::packet::PacketSocket;

/// How long one request may take, beside what it says itself; each is milliseconds of work.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Events that wait to be taken; more are forgotten, oldest first.
const EVENTS_MAX: usize = 16;

/// How a VMM was when somebody connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Greeting {
    /// How far it was.
    pub(super) state: VmmState,
    /// How far a copy of its scratch disk was.
    pub(super) copy: CopyState,
    /// Layers that the disk was launched with, without its own.
    pub(super) layers: usize,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Client {
    socket: PacketSocket,
    events: VecDeque<FromVmm>,
    greeting: Greeting,
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
            let socket = PacketSocket::new(socket, PACKET_BYTES_MAX)?;
            let greeting = match socket.receive().await?.0 {
                FromVmm::Hello {
                    state,
                    copy,
                    layers,
                    ..
                } => Greeting {
                    state,
                    copy,
                    layers,
                },
                other => return Err(unexpected(&other)),
            };
            Ok(Self {
                socket,
                events: VecDeque::new(),
                greeting,
                is_out_of_step: false,
            })
        };
        timeout(wait, connected).await.map_err(|_elapsed| {
            let text = format!("the VMM did not speak within {wait:?}");
            io::Error::new(io::ErrorKind::TimedOut, text)
        })?
    }

    /// How the VMM was when this connected.
    pub(super) const fn greeting(&self) -> Greeting {
        self.greeting
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
            self.socket.send(request, fds).await?;
            loop {
                match self.hear().await? {
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
            None => self.hear().await,
        }
    }

    async fn hear(&self) -> io::Result<FromVmm> {
        Ok(self.socket.receive().await?.0)
    }

    fn remember(&mut self, event: FromVmm) {
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }
}

fn unexpected(message: &FromVmm) -> io::Error {
    io::Error::other(format!("the VMM said {message:?} where it should greet"))
}
