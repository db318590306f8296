//! What may be asked of an agent, typed: one method per request of the contract.
//!
//! Used by the VM's actor and by the node for exec, files and logs. Never repeats a request: what
//! was under way when a session ended has failed, and whoever asked decides.

use core::future::Future;
use core::time::Duration;

use spore_wire::guest::{
    AgentStatus, Exec, Exit, HostMessage, LogBatch, OutputKind, Reply, Request, StartApp, Thaw,
    Thawed, WindowSize, WriteFile,
};

use super::session::{Stream, StreamError};
use super::{AgentLink, GuestError};

/// What the end of a rehearsal may take beyond its time.
const REHEARSAL_SLACK: Duration = Duration::from_secs(10);

/// A program that runs in the guest. Dropping it kills the program. Share it behind an `Arc` to
/// feed and read it from two tasks.
#[derive(Debug)]
pub struct ExecStream(Stream);

/// A file that is being read.
#[derive(Debug)]
pub struct FileReader(Stream);

/// A file that is being written; dropped before [`FileWriter::finish`], it is not written.
#[derive(Debug)]
pub struct FileWriter(Stream);

/// Log records as they come.
#[derive(Debug)]
pub struct LogStream(Stream);

async fn within<T>(
    limit: Duration,
    work: impl Future<Output = Result<T, GuestError>>,
) -> Result<T, GuestError> {
    tokio::time::timeout(limit, work)
        .await
        .map_err(|_e| GuestError::Timeout(limit))?
}

impl AgentLink {
    /// The agent as it is.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn status(&self, limit: Duration) -> Result<AgentStatus, GuestError> {
        match within(limit, self.ask(Request::Status, limit)).await? {
            Reply::Status(status) => Ok(status),
            _ => Err(GuestError::Protocol("no status in the answer to a status")),
        }
    }

    /// What was renewed; `None` from an agent of generation 1, which renews all it knows.
    pub(crate) async fn thaw(
        &self,
        thaw: Thaw,
        limit: Duration,
    ) -> Result<Option<Thawed>, GuestError> {
        match within(limit, self.ask(Request::Thaw(thaw), limit)).await? {
            Reply::Done => Ok(None),
            Reply::Thawed(thawed) => Ok(Some(thawed)),
            _ => Err(GuestError::Protocol("neither `done` nor what was thawed")),
        }
    }

    /// Lets the tenant's processes stand still.
    pub(crate) async fn freeze(&self, limit: Duration) -> Result<(), GuestError> {
        self.do_it(Request::Freeze, limit).await
    }

    /// Lets the tenant's processes run, of the VM of this name. Gives how many of them had not said
    /// within `hooks` that they know of the fork.
    pub(crate) async fn unfreeze(
        &self,
        name: String,
        hooks: Duration,
        limit: Duration,
    ) -> Result<u32, GuestError> {
        let request = Request::Unfreeze {
            incarnation: name,
            hooks_ms: Some(millis(hooks)),
        };
        let limit = limit.saturating_add(hooks);
        match within(limit, self.ask(request, limit)).await? {
            Reply::Done => Ok(0),
            Reply::Resumed(resumed) => Ok(resumed.late),
            _ => Err(GuestError::Protocol("neither `done` nor who was late")),
        }
    }

    pub(crate) async fn start_app(
        &self,
        start: StartApp,
        limit: Duration,
    ) -> Result<(), GuestError> {
        self.do_it(Request::StartApp(start), limit).await
    }

    pub(crate) async fn shutdown(
        &self,
        grace: Duration,
        limit: Duration,
    ) -> Result<(), GuestError> {
        let grace_ms = millis(grace);
        self.do_it(Request::Shutdown { grace_ms }, limit).await
    }

    /// Stops the app and leaves the guest running.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn stop_app(&self, grace: Duration, limit: Duration) -> Result<(), GuestError> {
        let grace_ms = millis(grace);
        self.do_it(Request::StopApp { grace_ms }, limit).await
    }

    /// Runs a program.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn exec(&self, exec: Exec, limit: Duration) -> Result<ExecStream, GuestError> {
        self.begin(Request::Exec(exec), limit).await.map(ExecStream)
    }

    /// Runs a program once, before an app is started, for what it leaves in the guest's memory.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn rehearse(&self, argv: Vec<String>, limit: Duration) -> Result<Exit, GuestError> {
        let timeout_ms = millis(limit);
        let request = Request::Rehearse { argv, timeout_ms };
        // The agent ends it in time and answers then.
        let limit = limit.saturating_add(REHEARSAL_SLACK);
        match within(limit, self.ask(request, limit)).await? {
            Reply::Exit(exit) => Ok(exit),
            _ => Err(GuestError::Protocol("no exit in the answer to a rehearsal")),
        }
    }

    /// Reads a file.
    ///
    /// # Errors
    /// [`GuestError`]; that the file is not there shows when it is read.
    pub async fn read_file(&self, path: String, limit: Duration) -> Result<FileReader, GuestError> {
        self.begin(Request::ReadFile { path }, limit)
            .await
            .map(FileReader)
    }

    /// Writes a file.
    ///
    /// # Errors
    /// [`GuestError`]; a wrong path shows when it is finished.
    pub async fn write_file(
        &self,
        file: WriteFile,
        limit: Duration,
    ) -> Result<FileWriter, GuestError> {
        self.begin(Request::WriteFile(file), limit)
            .await
            .map(FileWriter)
    }

    /// Streams log records that come after number `after`.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn logs(&self, after: u64, limit: Duration) -> Result<LogStream, GuestError> {
        self.begin(Request::Logs { after }, limit)
            .await
            .map(LogStream)
    }

    async fn begin(&self, request: Request, limit: Duration) -> Result<Stream, GuestError> {
        within(limit, async {
            let session = self.session(limit).await?;
            Ok(session.request(request).await?)
        })
        .await
    }

    async fn ask(&self, request: Request, limit: Duration) -> Result<Reply, GuestError> {
        let stream = self.begin(request, limit).await?;
        Ok(stream.outcome().await??)
    }

    async fn do_it(&self, request: Request, limit: Duration) -> Result<(), GuestError> {
        match within(limit, self.ask(request, limit)).await? {
            Reply::Done => Ok(()),
            _ => Err(GuestError::Protocol("more than `done` in an answer")),
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl ExecStream {
    /// Feeds the program's stdin, as fast as it reads.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn send_stdin(&self, bytes: &[u8]) -> Result<(), GuestError> {
        Ok(self.0.send(bytes).await?)
    }

    /// Closes the program's stdin.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn close_stdin(&self) -> Result<(), GuestError> {
        Ok(self.0.end().await?)
    }

    /// Tells the program's terminal its size.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn resize(&self, size: WindowSize) -> Result<(), GuestError> {
        Ok(self.0.tell(&HostMessage::Resize(size)).await?)
    }

    /// Sends a signal to the program's process group.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn signal(&self, signal: i32) -> Result<(), GuestError> {
        Ok(self.0.tell(&HostMessage::Signal { signal }).await?)
    }

    /// The next output, or `None` when there is no more. Output that is not taken stops the
    /// program when [`spore_wire::guest::CREDIT_BYTES`] are waiting.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn next_output(&self) -> Result<Option<(OutputKind, Vec<u8>)>, GuestError> {
        Ok(self.0.next().await?)
    }

    /// How it ended; take all output first, or it may never end.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn wait(&self) -> Result<Exit, GuestError> {
        match self.0.outcome().await?? {
            Reply::Exit(exit) => Ok(exit),
            _ => Err(GuestError::Protocol("no exit in the answer to an exec")),
        }
    }
}

impl FileReader {
    /// The next bytes, or `None` at the end; call [`Self::finish`] then.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn next(&self) -> Result<Option<Vec<u8>>, GuestError> {
        Ok(self.0.next().await?.map(|(_of, bytes)| bytes))
    }

    /// Whether it was sent whole: its size and permission bits.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn finish(&self) -> Result<(u64, u32), GuestError> {
        match self.0.outcome().await?? {
            Reply::File { bytes, mode } => Ok((bytes, mode & 0o777)),
            _ => Err(GuestError::Protocol("no file in the answer to a read")),
        }
    }
}

impl FileWriter {
    /// Sends the next bytes.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn send(&self, bytes: &[u8]) -> Result<(), GuestError> {
        Ok(self.0.send(bytes).await?)
    }

    /// The file is whole; waits until it is written.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn finish(&self) -> Result<(), GuestError> {
        match self.0.end().await {
            // The agent may have refused before the end; its answer says why.
            Ok(()) | Err(StreamError::Over(_)) => {}
            Err(error) => return Err(error.into()),
        }
        match self.0.outcome().await?? {
            Reply::Done => Ok(()),
            _ => Err(GuestError::Protocol("more than `done` in an answer")),
        }
    }
}

impl LogStream {
    /// The next records, or `None` when the agent ended the stream.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn next(&self) -> Result<Option<LogBatch>, GuestError> {
        Ok(self.0.next_logs().await?)
    }
}
