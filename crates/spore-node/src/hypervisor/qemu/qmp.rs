//! A client of QEMU's monitor (QMP): JSON lines over a unix socket.
//!
//! Used by the `qemu` driver. QEMU accepts one client at a time; the next one waits until this one
//! hangs up. Everything it says counts as written by a tenant who took it over: lines have a limit,
//! and nothing of them is more than text. Never starts or kills a process.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::Duration;

use data_encoding::BASE64;
use futures_util::StreamExt;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::timeout;
use tokio_util::codec::{FramedRead, LinesCodec};

/// The most bytes of one line; a whole console ring fits in.
const LINE_BYTES_MAX: usize = 256 * 1024;

/// Events that wait to be taken; more are forgotten, oldest first.
const EVENTS_MAX: usize = 64;

/// How long one command may take; each is microseconds of work for QEMU's main loop.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection.
#[derive(Debug)]
pub(super) struct Qmp {
    lines: FramedRead<OwnedReadHalf, LinesCodec>,
    write: OwnedWriteHalf,
    events: VecDeque<String>,
    /// How the last exchange left the stream.
    step: Step,
}

/// Whether the stream can still be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Every command has its answer.
    In,
    /// A command was given up half way: what comes next belongs to it, if it was sent whole.
    Out,
}

impl Qmp {
    /// Connects, waits for the greeting and leaves negotiation mode.
    pub(super) async fn connect(path: &Path, wait: Duration) -> io::Result<Self> {
        let connect = async {
            let (read, write) = UnixStream::connect(path).await?.into_split();
            let lines = FramedRead::new(read, LinesCodec::new_with_max_length(LINE_BYTES_MAX));
            let mut this = Self {
                lines,
                write,
                events: VecDeque::new(),
                step: Step::In,
            };
            let greeting = this.read().await?;
            if greeting.get("QMP").is_none() {
                return Err(io::Error::other("QMP: no greeting"));
            }
            this.execute("qmp_capabilities", json!({})).await?;
            Ok(this)
        };
        timeout(wait, connect)
            .await
            .map_err(|_elapsed| io::Error::from(io::ErrorKind::TimedOut))?
    }

    /// Whether commands may be given; after one that was given up only a new connection helps.
    pub(super) fn is_in_step(&self) -> bool {
        self.step == Step::In
    }

    /// Gives QEMU a descriptor, and gives the number under which it has it in `/dev/fdset`; `mark`
    /// is told again where it lists them.
    pub(super) async fn add_fd(&mut self, fd: BorrowedFd<'_>, mark: &str) -> io::Result<u64> {
        let arguments = json!({"opaque": mark});
        let added = self.exchange("add-fd", arguments, Some(fd)).await?;
        let number = added.get("fdset-id").and_then(Value::as_u64);
        number.ok_or_else(|| io::Error::other("QMP add-fd: no number in the answer"))
    }

    /// One command and what it returns. One that takes too long, or is cancelled, is the last one.
    pub(super) async fn execute(&mut self, command: &str, arguments: Value) -> io::Result<Value> {
        self.exchange(command, arguments, None).await
    }

    /// One command that QEMU may refuse, since what it is about may be gone: whether it did it.
    pub(super) async fn refusable(&mut self, command: &str, arguments: Value) -> io::Result<bool> {
        match self.exchange(command, arguments, None).await {
            Ok(_done) => Ok(true),
            // Answered, so that the connection is as good as before.
            Err(_refused) if self.is_in_step() => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn exchange(
        &mut self,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
    ) -> io::Result<Value> {
        if !self.is_in_step() {
            return Err(io::Error::other(format!(
                "QMP {command}: an earlier command was given up, and its answer may still come"
            )));
        }
        self.step = Step::Out;
        let mut line = json!({"execute": command, "arguments": arguments}).to_string();
        line.push('\n');
        let exchange = async {
            let mut line = line.as_bytes();
            if let Some(fd) = fd {
                line = &line[self.send_with(line, fd).await?..];
            }
            self.write.write_all(line).await?;
            loop {
                let mut answer = self.read().await?;
                if let Some(value) = answer.get_mut("return") {
                    return Ok(Ok(value.take()));
                }
                if let Some(error) = answer.get("error") {
                    return Ok(Err(format!("QMP {command}: {error}")));
                }
                self.remember(&answer);
            }
        };
        let answer: io::Result<Result<Value, String>> = timeout(COMMAND_TIMEOUT, exchange)
            .await
            .map_err(|_elapsed| {
                let text = format!("QMP {command}: no answer within {COMMAND_TIMEOUT:?}");
                io::Error::new(io::ErrorKind::TimedOut, text)
            })?;
        let answer = answer?;
        self.step = Step::In;
        answer.map_err(io::Error::other)
    }

    /// Sends the beginning of `line` with a descriptor; gives how much of it.
    async fn send_with(&self, line: &[u8], fd: BorrowedFd<'_>) -> io::Result<usize> {
        let socket: &UnixStream = self.write.as_ref();
        let fds = [fd];
        let send = || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            if !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            let flags = SendFlags::NOSIGNAL;
            Ok(sendmsg(
                socket,
                &[IoSlice::new(line)],
                &mut ancillary,
                flags,
            )?)
        };
        socket.async_io(Interest::WRITABLE, send).await
    }

    /// The next event's name. May be cancelled.
    pub(super) async fn next_event(&mut self) -> io::Result<String> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(event);
            }
            let said = self.read().await?;
            self.remember(&said);
        }
    }

    /// Everything that is in the ring of the character device `device`, which is then empty.
    pub(super) async fn read_ring(&mut self, device: &str, bytes: usize) -> io::Result<Vec<u8>> {
        let arguments = json!({"device": device, "size": bytes, "format": "base64"});
        let read = self.execute("ringbuf-read", arguments).await?;
        let text = read.as_str().unwrap_or_default();
        BASE64.decode(text.as_bytes()).map_err(io::Error::other)
    }

    fn remember(&mut self, said: &Value) {
        if let Some(event) = said.get("event").and_then(Value::as_str) {
            if self.events.len() == EVENTS_MAX {
                self.events.pop_front();
            }
            self.events.push_back(event.to_owned());
        }
    }

    async fn read(&mut self) -> io::Result<Value> {
        match self.lines.next().await {
            Some(Ok(line)) => Ok(serde_json::from_str(&line)?),
            Some(Err(error)) => Err(io::Error::other(error)),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    use tokio::net::UnixListener;
    use tokio::time::timeout;

    use super::Qmp;

    /// A monitor that greets, then answers each line with the next of `answers`.
    async fn monitor(listener: UnixListener, answers: Vec<String>) {
        let (stream, _) = listener.accept().await.unwrap();
        let (read, mut write) = stream.into_split();
        let mut lines = BufReader::new(read).lines();
        write.write_all(b"{\"QMP\": {}}\r\n").await.unwrap();
        for answer in answers {
            lines.next_line().await.unwrap().unwrap();
            write.write_all(answer.as_bytes()).await.unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_comes_too_late_is_nobodys() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qmp.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let server = tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let (read, mut write) = stream.into_split();
            let mut lines = BufReader::new(read).lines();
            write.write_all(b"{\"QMP\": {}}\r\n").await.unwrap();
            lines.next_line().await.unwrap().unwrap();
            write.write_all(b"{\"return\": {}}\r\n").await.unwrap();
            // The first command is answered only when there is a second one, or nobody.
            lines.next_line().await.unwrap().unwrap();
            drop(lines.next_line().await);
            drop(write.write_all(b"{\"return\": \"of the first\"}\r\n").await);
        });
        let mut qmp = Qmp::connect(&path, Duration::from_secs(60)).await.unwrap();
        let late = qmp.execute("query-status", json!({})).await.unwrap_err();
        assert!(late.to_string().contains("no answer within"), "{late}");
        assert!(!qmp.is_in_step());
        let refused = qmp.execute("quit", json!({})).await.unwrap_err();
        assert!(refused.to_string().contains("given up"), "{refused}");
        drop(qmp);
        server.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_cancelled_command_is_the_last_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qmp.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let nothing = String::new();
        let answers = vec!["{\"return\": {}}\r\n".to_owned(), nothing.clone(), nothing];
        let server = tokio::spawn(monitor(listener, answers));
        let mut qmp = Qmp::connect(&path, Duration::from_secs(60)).await.unwrap();
        let cut = timeout(Duration::from_secs(1), qmp.execute("stop", json!({})));
        assert!(cut.await.is_err());
        let refused = qmp.execute("quit", json!({})).await.unwrap_err();
        assert!(refused.to_string().contains("given up"), "{refused}");
        server.abort();
    }

    #[tokio::test]
    async fn events_between_command_and_answer_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qmp.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let answers = vec![
            "{\"return\": {}}\r\n".to_owned(),
            "{\"event\": \"RESUME\"}\r\n{\"event\": \"SHUTDOWN\"}\r\n{\"return\": \"aGk=\"}\r\n"
                .to_owned(),
            "{\"error\": {\"class\": \"GenericError\"}}\r\n".to_owned(),
        ];
        let server = tokio::spawn(monitor(listener, answers));
        let mut qmp = Qmp::connect(&path, Duration::from_secs(10)).await.unwrap();
        assert_eq!(qmp.read_ring("console", 100).await.unwrap(), b"hi");
        let refused = qmp.execute("quit", json!({})).await.unwrap_err();
        assert!(refused.to_string().contains("GenericError"), "{refused}");
        assert_eq!(qmp.next_event().await.unwrap(), "RESUME");
        assert_eq!(qmp.next_event().await.unwrap(), "SHUTDOWN");
        server.await.unwrap();
        assert!(qmp.next_event().await.is_err());
    }
}
