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
        if answer.is_ok() && matches!(request, ToVmm::Copy { .. } | ToVmm::CancelCopy) {
            // What was told of copies before the answer is of one that is gone.
            let is_copied = |event: &FromVmm| matches!(event, FromVmm::Copied { .. });
            self.events.retain(|event| !is_copied(event));
        }
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

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::time::Duration;

    use rustix::net::{
        AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
    };
    use serde_json::{Value, json};
    use spore_wire::launch::{FdIndex, Layer};
    use spore_wire::vmm::{Below, CopyOf, CopyState, FromVmm, ToVmm};

    use super::Client;

    /// What a VMM says, in the order in which it is asked.
    fn say(socket: &OwnedFd, messages: &[Value]) {
        for message in messages {
            let message = message.to_string();
            rustix::net::send(socket, message.as_bytes(), SendFlags::empty()).unwrap();
        }
    }

    fn hear(socket: &OwnedFd) {
        let (count, _) = rustix::net::recv(socket, &mut [0; 4096], RecvFlags::empty()).unwrap();
        assert_ne!(count, 0);
    }

    #[tokio::test]
    async fn what_is_told_of_a_copy_that_is_gone_is_not_told_of_the_next_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vmm");
        let kind = SocketType::SEQPACKET;
        let flags = SocketFlags::CLOEXEC;
        let listener = rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None).unwrap();
        rustix::net::bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&listener, 1).unwrap();
        let vmm = std::thread::spawn(move || {
            let socket = rustix::net::accept(&listener).unwrap();
            let whole = json!({"type": "copied", "why": null});
            let hello = json!({"type": "hello", "generation": 2, "state": "running",
                "copy": "over"});
            let done = json!({"type": "done", "bytes": 0});
            say(&socket, &[hello, whole.clone()]);
            hear(&socket);
            say(&socket, std::slice::from_ref(&done));
            hear(&socket);
            let failed = json!({"type": "copied", "why": "no room"});
            say(&socket, &[whole, done, failed]);
        });
        let mut client = Client::connect(&path, Duration::from_secs(10))
            .await
            .unwrap();
        assert_eq!(client.greeting().copy, CopyState::Over);
        let copy = ToVmm::Copy {
            to: Layer {
                file: FdIndex(0),
                key: None,
            },
            below: Below::Source,
            of: CopyOf::Frozen,
        };
        for request in [&ToVmm::CancelCopy, &copy] {
            client.ask(request, &[], Duration::ZERO).await.unwrap();
        }
        match client.next_event().await.unwrap() {
            FromVmm::Copied { why } => assert_eq!(why.as_deref(), Some("no room")),
            other => panic!("{other:?}"),
        }
        vmm.join().unwrap();
    }
}
