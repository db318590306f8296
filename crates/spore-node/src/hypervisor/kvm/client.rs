//! A client of a VMM's control socket (`spore_wire::vmm`).
//!
//! Used by the `kvm` driver. The VMM serves one client at a time, the newest. Everything that it
//! says counts as written by a tenant who took it over: nothing is more than text and numbers.
//! Never starts or kills a process.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use spore_wire::generation::{GENERATION, GENERATION_VMMS, is_vmm_served};
use spore_wire::vmm::{CopyState, FromVmm, PACKET_BYTES_MAX, ToVmm, VmmState};
use tokio::time::{sleep, timeout};

use super::packet::PacketSocket;

/// How long one request may take, beside what it says itself; each is milliseconds of work.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// When to try again to be let in by a VMM at whose socket too many wait.
const LET_IN_AGAIN: Duration = Duration::from_millis(20);

/// Events that wait to be taken; more are forgotten, oldest first.
const EVENTS_MAX: usize = 16;

/// What a VMM may tell unasked between two answers: that its guest has ended, and that a copy is
/// over, now and when somebody connects. One that was taken over could tell things as fast as it
/// can, and whoever listens would do nothing else.
const UNASKED_MAX: usize = 8;

/// The characters of its words that are kept: they are in errors, which travel further.
const WORDS_CHARS_MAX: usize = 1000;

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
    /// How much it has told unasked since its last answer.
    unasked: usize,
    /// A request was given up half way: what comes next belongs to it.
    is_out_of_step: bool,
}

impl Client {
    /// Connects, and hears how far the VMM is.
    pub(super) async fn connect(path: &Path, wait: Duration) -> io::Result<Self> {
        let connected = async {
            let socket = PacketSocket::new(let_in(path).await?, PACKET_BYTES_MAX)?;
            let greeting = match socket.receive().await?.0 {
                FromVmm::Hello { generation, .. } if !is_vmm_served(generation) => {
                    return Err(of_another(generation));
                }
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
                unasked: 0,
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
                    FromVmm::Failed { why } => return Ok(Err(plain(&why))),
                    event => {
                        self.count()?;
                        self.remember(event);
                    }
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
        self.unasked = 0;
        if answer.is_ok() && matches!(request, ToVmm::Copy { .. } | ToVmm::CancelCopy) {
            // What was told of copies before the answer is of one that is gone.
            let is_copied = |event: &FromVmm| matches!(event, FromVmm::Copied { .. });
            self.events.retain(|event| !is_copied(event));
        }
        answer.map_err(io::Error::other)
    }

    /// The next thing that the VMM tells unasked. Safe to cancel. An error is the connection's end.
    pub(super) async fn next_event(&mut self) -> io::Result<FromVmm> {
        if let Some(event) = self.events.pop_front() {
            return Ok(event);
        }
        let event = self.hear().await?;
        self.count()?;
        Ok(event)
    }

    async fn hear(&self) -> io::Result<FromVmm> {
        Ok(match self.socket.receive().await?.0 {
            FromVmm::Copied { why } => FromVmm::Copied {
                why: why.map(|why| plain(&why)),
            },
            message => message,
        })
    }

    /// Counts what was told unasked.
    fn count(&mut self) -> io::Result<()> {
        self.unasked += 1;
        if self.unasked > UNASKED_MAX {
            let text = format!("the VMM told more than {UNASKED_MAX} things that nobody asked for");
            return Err(io::Error::other(text));
        }
        Ok(())
    }

    fn remember(&mut self, event: FromVmm) {
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }
}

/// A connection, as soon as there is room for one more among those that wait. Never waits in the
/// kernel: a VMM that lets nobody in would have a thread of the runtime each time.
async fn let_in(path: &Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let address = SocketAddrUnix::new(path)?;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    loop {
        match connect(&socket, &address) {
            // The queue is full (unix(7)); there is nothing that tells when it is not.
            Err(Errno::AGAIN) => sleep(LET_IN_AGAIN).await,
            Err(Errno::INTR) => {}
            connected => {
                connected?;
                return Ok(socket);
            }
        }
    }
}

fn of_another(generation: u32) -> io::Error {
    let served = match GENERATION_VMMS == GENERATION {
        true => format!("{GENERATION} is"),
        false => format!("{GENERATION_VMMS} to {GENERATION} are"),
    };
    io::Error::other(format!(
        "the VMM speaks generation {generation}, and {served} served: end this VM, or go back to \
         the Spore that started it"
    ))
}

fn unexpected(message: &FromVmm) -> io::Error {
    let said = plain(&format!("{message:?}"));
    io::Error::other(format!("the VMM said {said} where it should greet"))
}

/// A VMM's words without what a terminal would obey, and not more than an error needs.
fn plain(words: &str) -> String {
    let words = words.chars().take(WORDS_CHARS_MAX);
    words
        .map(|letter| if letter.is_control() { ' ' } else { letter })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::time::Duration;

    use rustix::net::{
        AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
    };
    use serde_json::{Value, json};
    use spore_wire::generation::{GENERATION, GENERATION_VMMS};
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

    /// A VMM in a thread, behind a socket; what it says is given by `speak`.
    async fn connected(
        speak: impl FnOnce(OwnedFd) + Send + 'static,
    ) -> (Client, std::thread::JoinHandle<()>) {
        let (client, vmm) = greeted(GENERATION, speak).await;
        (client.unwrap(), vmm)
    }

    /// The same for a VMM of any generation.
    async fn greeted(
        generation: u32,
        speak: impl FnOnce(OwnedFd) + Send + 'static,
    ) -> (std::io::Result<Client>, std::thread::JoinHandle<()>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vmm");
        let kind = SocketType::SEQPACKET;
        let flags = SocketFlags::CLOEXEC;
        let listener = rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None).unwrap();
        rustix::net::bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&listener, 1).unwrap();
        let vmm = std::thread::spawn(move || {
            let socket = rustix::net::accept(&listener).unwrap();
            let hello = json!({"type": "hello", "generation": generation, "state": "running"});
            say(&socket, &[hello]);
            speak(socket);
        });
        let client = Client::connect(&path, Duration::from_secs(10)).await;
        (client, vmm)
    }

    #[tokio::test]
    async fn a_vmm_of_a_later_spore_is_not_taken_up() {
        for generation in [GENERATION_VMMS - 1, GENERATION + 1] {
            let (refused, vmm) = greeted(generation, drop).await;
            let refused = refused.unwrap_err().to_string();
            let begins = format!("the VMM speaks generation {generation}, and ");
            assert!(refused.starts_with(&begins), "{refused}");
            vmm.join().unwrap();
        }
    }

    /// Tells of copies until nobody listens.
    fn flood(socket: &OwnedFd) {
        let copied = json!({"type": "copied", "why": null}).to_string();
        let flags = SendFlags::NOSIGNAL;
        while rustix::net::send(socket, copied.as_bytes(), flags).is_ok() {}
    }

    #[tokio::test]
    async fn a_vmm_that_never_stops_telling_is_not_listened_to() {
        let (mut client, vmm) = connected(|socket| flood(&socket)).await;
        let listen = async {
            let mut heard = 0;
            while client.next_event().await.is_ok() {
                heard += 1;
            }
            heard
        };
        let heard = tokio::time::timeout(Duration::from_secs(5), listen).await;
        assert_eq!(heard.unwrap(), super::UNASKED_MAX);
        drop(client);
        vmm.join().unwrap();

        let (mut client, vmm) = connected(|socket| flood(&socket)).await;
        let asked = client.ask(&ToVmm::Resume, &[], Duration::ZERO);
        let asked = tokio::time::timeout(Duration::from_secs(5), asked).await;
        let refused = asked.unwrap().unwrap_err().to_string();
        assert!(refused.contains("nobody asked for"), "{refused}");
        assert!(!client.is_in_step());
        drop(client);
        vmm.join().unwrap();
    }

    /// A thread of the runtime that waited in the kernel would be lost to everybody.
    #[test]
    fn a_vmm_that_lets_nobody_in_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vmm");
        let kind = SocketType::SEQPACKET;
        let flags = SocketFlags::CLOEXEC;
        let listener = rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None).unwrap();
        rustix::net::bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&listener, 1).unwrap();
        let (sender, told) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread();
            let runtime = { runtime }.enable_all().build().unwrap();
            for _ in 0..5 {
                let connected = Client::connect(&path, Duration::from_millis(50));
                let refused = runtime.block_on(connected).unwrap_err();
                sender.send(refused.to_string()).unwrap();
            }
        });
        for _ in 0..5 {
            let refused = told.recv_timeout(Duration::from_secs(5)).unwrap();
            assert_eq!(refused, "the VMM did not speak within 50ms");
        }
    }

    #[tokio::test]
    async fn a_vmms_words_are_plain_and_short() {
        let (mut client, vmm) = connected(|socket| {
            hear(&socket);
            let why = format!("\u{1b}]0;owned\u{7}\n{}", "x".repeat(20_000));
            say(&socket, &[json!({"type": "failed", "why": why})]);
            say(&socket, &[json!({"type": "copied", "why": "\u{9b}31mred"})]);
        })
        .await;
        let refused = client.ask(&ToVmm::Resume, &[], Duration::ZERO).await;
        let why = refused.unwrap_err().to_string();
        assert!(why.starts_with(" ]0;owned  xxx"), "{why:.40}");
        assert_eq!(why.chars().count(), super::WORDS_CHARS_MAX);
        match client.next_event().await.unwrap() {
            FromVmm::Copied { why } => assert_eq!(why.as_deref(), Some(" 31mred")),
            other => panic!("{other:?}"),
        }
        vmm.join().unwrap();
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
