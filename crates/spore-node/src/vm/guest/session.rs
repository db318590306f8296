//! One session with an agent: frames, streams, credits and the watchdog.
//!
//! Opened by the link (`vm/guest/mod.rs`) over a fresh connection; used by the typed requests in
//! `vm/guest/request.rs`. Every byte is a stranger's: what the guest can make us hold is bounded by
//! credits, what it can make us do by a budget (see `vm/guest/inbox.rs`), and a word out of place
//! or too many without use end the session, never the daemon.
//!
//! ```text
//!   connected ──preamble, Hello──▶ scanning ──mark, Hello──▶ open ──▶ over(reason)
//! ```

use core::time::Duration;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use data_encoding::HEXLOWER;
use spore_wire::frame::{
    Decoder, FRAME_BYTES_MAX, Frame, FrameError, FrameKind, HEADER_BYTES, MESSAGE_BYTES_MAX,
    PREAMBLE_BYTES, encode, encode_message,
};
use spore_wire::generation::{GENERATION, is_served};
use spore_wire::guest::{
    AgentError, AgentHello, AgentMessage, Event, HostHello, HostMessage, LogBatch, OutputKind,
    Reply, Request,
};
use thiserror::Error;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

use super::inbox::{Asked, Budget, Inbox, LATE_BYTES, WASTE_BYTES_MAX, Worth, cost};
use crate::hypervisor::AgentStream;
use crate::vm::tasks::Tasks;

/// The most streams that this host opens in one session; the agent allows more.
pub const STREAMS_OPEN_MAX: usize = 64;

/// Bytes before the mark of a session: more than an agent's outbox and the buffers on the way hold.
const SCAN_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Bytes that may have come and make no whole frame.
const UNFRAMED_BYTES_MAX: usize = 4 * (FRAME_BYTES_MAX + HEADER_BYTES);

/// Frames that wait to be written.
const FRAMES_WAITING_MAX: usize = 16;

/// How long a session waits for its agent.
#[derive(Clone, Copy, Debug)]
pub struct SessionTimes {
    /// For the answer to `Hello`.
    pub hello: Duration,
    /// Between pings.
    pub ping: Duration,
    /// Without any answer to a ping, before the session is over.
    pub silence: Duration,
}

impl Default for SessionTimes {
    fn default() -> Self {
        Self {
            hello: Duration::from_secs(5),
            ping: Duration::from_secs(10),
            silence: Duration::from_secs(40),
        }
    }
}

/// Why a session did not begin or is over.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SessionError {
    /// The connection broke.
    #[error("the agent's channel broke")]
    Channel(#[source] std::io::Error),
    /// It was closed.
    #[error("the agent's channel was closed")]
    Closed,
    /// Nothing came in time.
    #[error("the agent is silent")]
    Silent,
    /// Bytes that are no frames.
    #[error("the agent sent bytes that are no frames")]
    Frame(#[source] FrameError),
    /// A frame that is no message.
    #[error("the agent sent a message that cannot be read")]
    Message(#[source] serde_json::Error),
    /// A message out of place.
    #[error("the agent broke the protocol: {0}")]
    Protocol(&'static str),
    /// An agent of another age.
    #[error(
        "the agent is of generation {0}, which is not served: rebuild the image with this version"
    )]
    Generation(u32),
    /// The kernel gave no random bytes.
    #[error("no random bytes for a nonce")]
    Random(#[source] getrandom::Error),
}

impl SessionError {
    /// Whether the agent said what no agent says, rather than nothing.
    pub(crate) const fn is_breach(&self) -> bool {
        matches!(self, Self::Frame(_) | Self::Message(_) | Self::Protocol(_))
    }
}

/// An open session; clones are the same session.
#[derive(Clone, Debug)]
pub struct Session {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    streams: Mutex<Streams>,
    frames: mpsc::Sender<Zeroizing<Vec<u8>>>,
    cancels: mpsc::UnboundedSender<u32>,
    over: CancellationToken,
    reason: Mutex<Option<String>>,
}

#[derive(Debug)]
struct Streams {
    next: u32,
    open: HashMap<u32, Arc<StreamState>>,
    /// The cost of frames without use that the guest may still send.
    waste_left: usize,
}

#[derive(Debug)]
struct StreamState {
    inbox: Mutex<Inbox>,
    changed: Notify,
}

/// One request under way; dropping it cancels it.
#[derive(Debug)]
pub(crate) struct Stream {
    shared: Arc<Shared>,
    state: Arc<StreamState>,
    id: u32,
}

/// Why a request cannot go on.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub(crate) enum StreamError {
    #[error("{0}")]
    Over(String),
    #[error("{STREAMS_OPEN_MAX} requests are under way")]
    TooMany,
    #[error("a message over {MESSAGE_BYTES_MAX} bytes")]
    TooLarge,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every critical section leaves its value whole, so a poisoned one is still usable.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn message_frame(stream: u32, message: &HostMessage) -> Result<Zeroizing<Vec<u8>>, StreamError> {
    let json = serde_json::to_vec(message).map_err(|_e| StreamError::TooLarge)?;
    let json = Zeroizing::new(json);
    let frames = json.len() / FRAME_BYTES_MAX + 1;
    let mut frame = Vec::with_capacity(json.len() + frames * HEADER_BYTES);
    encode_message(stream, &json, &mut frame).map_err(|_e| StreamError::TooLarge)?;
    Ok(Zeroizing::new(frame))
}

impl Session {
    /// Begins a session over a fresh connection. `news` gets what the agent tells unasked.
    pub(crate) async fn open(
        stream: Box<dyn AgentStream>,
        times: SessionTimes,
        tasks: &Tasks,
        news: mpsc::Sender<Event>,
    ) -> Result<(Self, AgentHello), SessionError> {
        let (mut reader, mut writer) = tokio::io::split(stream);
        let mut nonce = [0_u8; 16];
        getrandom::fill(&mut nonce).map_err(SessionError::Random)?;
        let mut greeting = vec![0_u8; PREAMBLE_BYTES];
        let hello = HostMessage::Hello(HostHello {
            generation: GENERATION,
            nonce: HEXLOWER.encode(&nonce),
        });
        let frame = message_frame(0, &hello).map_err(|_e| SessionError::Protocol("hello"))?;
        greeting.extend_from_slice(&frame);
        let mut decoder = Decoder::after_mark(nonce);
        // Reading while writing: a guest whose own output is stuck would not read ours.
        let write = async {
            writer
                .write_all(&greeting)
                .await
                .map_err(SessionError::Channel)?;
            writer.flush().await.map_err(SessionError::Channel)
        };
        let both = async { tokio::try_join!(write, read_hello(&mut reader, &mut decoder)) };
        let ((), hello) = tokio::time::timeout(times.hello, both)
            .await
            .map_err(|_e| SessionError::Silent)??;
        let (frames, frames_waiting) = mpsc::channel(FRAMES_WAITING_MAX);
        let (cancels, cancels_waiting) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            streams: Mutex::new(Streams {
                next: 1,
                open: HashMap::new(),
                waste_left: WASTE_BYTES_MAX,
            }),
            frames,
            cancels,
            over: CancellationToken::new(),
            reason: Mutex::new(None),
        });
        let run = Run {
            shared: Arc::clone(&shared),
            times,
            news,
            pong: Mutex::new(Instant::now()),
        };
        let ends = OverOnDrop(Arc::clone(&shared));
        tasks.spawn(async move {
            let reason = tokio::select! {
                biased;
                error = run.read(reader, decoder) => error,
                error = write_frames(writer, frames_waiting, cancels_waiting) => error,
                error = run.watch() => error,
                () = run.shared.over.cancelled() => SessionError::Closed,
            };
            run.shared.end(&reason);
            drop(ends);
        });
        Ok((Self { shared }, hello))
    }

    /// Resolves when the session is over, with the reason.
    pub(crate) async fn over(&self) -> String {
        self.shared.over.cancelled().await;
        self.shared.reason()
    }

    /// Ends the session.
    pub(crate) fn close(&self) {
        self.shared.end(&SessionError::Closed);
    }

    /// Begins a request.
    pub(crate) async fn request(&self, request: Request) -> Result<Stream, StreamError> {
        let shared = &self.shared;
        // Room in the queue comes first, so that ids rise in the order they are written.
        let permit = tokio::select! {
            biased;
            permit = shared.frames.reserve() => permit.map_err(|_e| shared.is_over())?,
            () = shared.over.cancelled() => return Err(shared.is_over()),
        };
        let mut streams = lock(&shared.streams);
        if streams.open.len() >= STREAMS_OPEN_MAX {
            return Err(StreamError::TooMany);
        }
        let id = streams.next;
        let asked = match request {
            Request::Logs { .. } => Asked::Logs,
            _ => Asked::Other,
        };
        let frame = message_frame(id, &HostMessage::Request { request })?;
        let Some(next) = id.checked_add(2) else {
            return Err(StreamError::TooMany);
        };
        streams.next = next;
        let state = Arc::new(StreamState::new(asked));
        streams.open.insert(id, Arc::clone(&state));
        permit.send(frame);
        drop(streams);
        Ok(Stream {
            shared: Arc::clone(shared),
            state,
            id,
        })
    }
}

/// Ends the session when its task is dropped from outside.
struct OverOnDrop(Arc<Shared>);

impl Drop for OverOnDrop {
    fn drop(&mut self) {
        self.0.end(&SessionError::Closed);
    }
}

impl Shared {
    fn end(&self, reason: &SessionError) {
        let mut held = lock(&self.reason);
        if held.is_none() {
            *held = Some(crate::vm::guest::chain(reason));
        }
        drop(held);
        self.over.cancel();
    }

    fn reason(&self) -> String {
        lock(&self.reason).clone().unwrap_or_default()
    }

    fn is_over(&self) -> StreamError {
        StreamError::Over(self.reason())
    }

    async fn send(&self, frame: Zeroizing<Vec<u8>>) -> Result<(), StreamError> {
        tokio::select! {
            biased;
            sent = self.frames.send(frame) => sent.map_err(|_e| self.is_over()),
            () = self.over.cancelled() => Err(self.is_over()),
        }
    }
}

impl StreamState {
    fn new(asked: Asked) -> Self {
        Self {
            inbox: Mutex::new(Inbox::new(asked)),
            changed: Notify::new(),
        }
    }
}

async fn read_hello(
    reader: &mut ReadHalf<Box<dyn AgentStream>>,
    decoder: &mut Decoder,
) -> Result<AgentHello, SessionError> {
    let mut buffer = vec![0_u8; 16 * 1024];
    let mut scanned = 0;
    loop {
        if let Some(frame) = decoder.next_frame().map_err(SessionError::Frame)? {
            let message = decode(&frame)?;
            let AgentMessage::Hello(hello) = message else {
                return Err(SessionError::Protocol("the first word is not a hello"));
            };
            if frame.stream != 0 {
                return Err(SessionError::Protocol("a hello on a stream"));
            }
            return check_hello(hello);
        }
        let got = reader
            .read(&mut buffer)
            .await
            .map_err(SessionError::Channel)?;
        if got == 0 {
            return Err(SessionError::Closed);
        }
        scanned += got;
        if scanned > SCAN_BYTES_MAX {
            return Err(SessionError::Protocol("too much before its first word"));
        }
        decoder.feed(&buffer[..got]);
    }
}

fn check_hello(hello: AgentHello) -> Result<AgentHello, SessionError> {
    if !is_served(hello.generation) {
        return Err(SessionError::Generation(hello.generation));
    }
    let boot_id = hello.boot_id.as_bytes();
    let is_boot_id = boot_id.len() == 36
        && boot_id
            .iter()
            .all(|byte| byte.is_ascii_hexdigit() || *byte == b'-');
    if !is_boot_id {
        return Err(SessionError::Protocol("a boot id that is none"));
    }
    Ok(hello)
}

fn decode(frame: &Frame) -> Result<AgentMessage, SessionError> {
    if frame.kind != FrameKind::Message {
        return Err(SessionError::Protocol("bytes on the session's own stream"));
    }
    serde_json::from_slice(&frame.payload).map_err(SessionError::Message)
}

async fn write_frames(
    mut writer: WriteHalf<Box<dyn AgentStream>>,
    mut frames: mpsc::Receiver<Zeroizing<Vec<u8>>>,
    mut cancels: mpsc::UnboundedReceiver<u32>,
) -> SessionError {
    loop {
        // Frames first: a cancel must not overtake the request that it ends.
        let frame = tokio::select! {
            biased;
            Some(frame) = frames.recv() => frame,
            Some(stream) = cancels.recv() => match message_frame(stream, &HostMessage::Cancel) {
                Ok(frame) => frame,
                Err(_too_large) => return SessionError::Protocol("cancel"),
            },
            else => return SessionError::Closed,
        };
        if let Err(error) = writer.write_all(&frame).await {
            return SessionError::Channel(error);
        }
        if let Err(error) = writer.flush().await {
            return SessionError::Channel(error);
        }
    }
}

/// What the session's task runs.
struct Run {
    shared: Arc<Shared>,
    times: SessionTimes,
    news: mpsc::Sender<Event>,
    pong: Mutex<Instant>,
}

impl Run {
    /// Pings, and ends the session when nothing comes back.
    async fn watch(&self) -> SessionError {
        let mut token = 0_u64;
        loop {
            tokio::time::sleep(self.times.ping).await;
            if lock(&self.pong).elapsed() > self.times.silence {
                return SessionError::Silent;
            }
            token += 1;
            if let Ok(frame) = message_frame(0, &HostMessage::Ping { token }) {
                // A full queue means that the guest does not read: then no pong comes either.
                drop(self.shared.frames.try_send(frame));
            }
        }
    }

    async fn read(
        &self,
        mut reader: ReadHalf<Box<dyn AgentStream>>,
        mut decoder: Decoder,
    ) -> SessionError {
        let mut buffer = vec![0_u8; 32 * 1024];
        let mut budget = Budget::new();
        // Between frames a decoder passes over zeros, and it holds a frame's parts.
        let mut unframed = 0_usize;
        loop {
            loop {
                match decoder.next_frame() {
                    Ok(None) => break,
                    Ok(Some(frame)) => {
                        unframed = unframed.saturating_sub(HEADER_BYTES + frame.payload.len());
                        if let Err(error) = self.take(frame, &mut budget).await {
                            return error;
                        }
                    }
                    Err(error) => return SessionError::Frame(error),
                }
            }
            if unframed > UNFRAMED_BYTES_MAX {
                return SessionError::Protocol("bytes that make no frame");
            }
            match reader.read(&mut buffer).await {
                Ok(0) => return SessionError::Closed,
                Ok(got) => {
                    unframed += got;
                    decoder.feed(&buffer[..got]);
                }
                Err(error) => return SessionError::Channel(error),
            }
        }
    }

    async fn take(&self, frame: Frame, budget: &mut Budget) -> Result<(), SessionError> {
        let payload = frame.payload.len();
        if frame.stream != 0 {
            let worth = self.take_on_stream(frame)?;
            budget.spend(cost(worth, payload)).await;
            return Ok(());
        }
        budget.spend_news().await;
        budget.spend(cost(Worth::Unasked, payload)).await;
        match decode(&frame)? {
            AgentMessage::Pong { .. } => {
                *lock(&self.pong) = Instant::now();
                Ok(())
            }
            AgentMessage::Event { event } => {
                // The link that listens is gone only when the session is about to be.
                self.news
                    .send(event)
                    .await
                    .map_err(|_e| SessionError::Closed)
            }
            _ => Err(SessionError::Protocol("a message out of place")),
        }
    }

    fn take_on_stream(&self, frame: Frame) -> Result<Worth, SessionError> {
        let mut streams = lock(&self.shared.streams);
        if frame.stream.is_multiple_of(2) || frame.stream >= streams.next {
            return Err(SessionError::Protocol("a stream that was never opened"));
        }
        let payload = frame.payload.len();
        let worth = match streams.open.get(&frame.stream).cloned() {
            Some(state) => {
                let mut inbox = lock(&state.inbox);
                let worth = take_in(&mut inbox, &frame)?;
                if inbox.outcome.is_some() {
                    streams.open.remove(&frame.stream);
                }
                drop(inbox);
                state.changed.notify_waiters();
                worth
            }
            // What is still under way for a cancelled stream is nobody's.
            None => Worth::Waste,
        };
        if worth == Worth::Waste {
            let left = streams.waste_left.checked_sub(cost(worth, payload));
            streams.waste_left = left.ok_or(SessionError::Protocol("too much without use"))?;
        }
        Ok(worth)
    }
}

fn take_in(inbox: &mut Inbox, frame: &Frame) -> Result<Worth, SessionError> {
    match frame.kind {
        FrameKind::Data => inbox.push(&frame.payload),
        FrameKind::End => Ok(inbox.end()),
        FrameKind::Part => Err(SessionError::Protocol("a part of a message")),
        FrameKind::Message => match decode(frame)? {
            AgentMessage::Credit { bytes } => Ok(inbox.credit(bytes)),
            AgentMessage::Output { of } => Ok(inbox.switch(of)),
            AgentMessage::Logs(batch) => inbox.push_logs(batch, frame.payload.len()),
            AgentMessage::Reply { reply } => {
                inbox.outcome = Some(Ok(reply));
                Ok(Worth::Unasked)
            }
            AgentMessage::Error(error) => {
                inbox.outcome = Some(Err(error));
                Ok(Worth::Unasked)
            }
            _ => Err(SessionError::Protocol("a message out of place")),
        },
    }
}

impl Stream {
    /// Waits until `take` gives something.
    async fn when<T>(
        &self,
        mut take: impl FnMut(&mut Inbox) -> Option<T>,
    ) -> Result<T, StreamError> {
        loop {
            let changed = self.state.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if let Some(taken) = take(&mut lock(&self.state.inbox)) {
                return Ok(taken);
            }
            tokio::select! {
                biased;
                () = changed => {}
                () = self.shared.over.cancelled() => {
                    // What came before the end counts.
                    return take(&mut lock(&self.state.inbox))
                        .ok_or_else(|| self.shared.is_over());
                }
            }
        }
    }

    /// The next bytes, or `None` when there will be no more.
    pub(crate) async fn next(&self) -> Result<Option<(OutputKind, Vec<u8>)>, StreamError> {
        let chunk = self
            .when(|inbox| match inbox.pop() {
                Some(chunk) => Some(Some(chunk)),
                None if inbox.ended || inbox.outcome.is_some() => Some(None),
                None => None,
            })
            .await?;
        self.give_back().await?;
        Ok(chunk)
    }

    /// Gives what was taken back as credit, if it is time.
    async fn give_back(&self) -> Result<(), StreamError> {
        let given = lock(&self.state.inbox).give();
        match given {
            Some(bytes) => self.tell(&HostMessage::Credit { bytes }).await,
            None => Ok(()),
        }
    }

    /// The next log records; `None` when the agent ended the stream.
    pub(crate) async fn next_logs(&self) -> Result<Option<LogBatch>, StreamError> {
        let batch = self
            .when(|inbox| match inbox.pop_logs() {
                Some(batch) => Some(Some(batch)),
                None if inbox.outcome.is_some() => Some(None),
                None => None,
            })
            .await?;
        self.give_back().await?;
        Ok(batch)
    }

    /// How the request ended.
    pub(crate) async fn outcome(&self) -> Result<Result<Reply, AgentError>, StreamError> {
        self.when(|inbox| inbox.outcome.clone()).await
    }

    /// Sends bytes, as fast as the agent takes them. Bytes after the request's end are dropped,
    /// as a pipe without a reader drops them.
    pub(crate) async fn send(&self, mut bytes: &[u8]) -> Result<(), StreamError> {
        const CHUNK: usize = 16 * 1024;
        while !bytes.is_empty() {
            let wanted = bytes.len().min(CHUNK);
            let may = self
                .when(|inbox| {
                    if inbox.outcome.is_some() {
                        return Some(0);
                    }
                    let may = inbox.credit.min(wanted);
                    inbox.credit -= may;
                    (may > 0).then_some(may)
                })
                .await?;
            if may == 0 {
                return Ok(());
            }
            let (now, later) = bytes.split_at(may);
            let mut frame = Vec::with_capacity(may + HEADER_BYTES);
            encode(self.id, FrameKind::Data, now, &mut frame)
                .map_err(|_e| StreamError::TooLarge)?;
            self.shared.send(Zeroizing::new(frame)).await?;
            bytes = later;
        }
        Ok(())
    }

    /// Says that no more bytes come.
    pub(crate) async fn end(&self) -> Result<(), StreamError> {
        let mut frame = Vec::new();
        encode(self.id, FrameKind::End, &[], &mut frame).map_err(|_e| StreamError::TooLarge)?;
        self.shared.send(Zeroizing::new(frame)).await
    }

    /// Sends a message on this stream.
    pub(crate) async fn tell(&self, message: &HostMessage) -> Result<(), StreamError> {
        self.shared.send(message_frame(self.id, message)?).await
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let open = {
            let mut streams = lock(&self.shared.streams);
            let open = streams.open.remove(&self.id).is_some();
            if open {
                let most = STREAMS_OPEN_MAX * LATE_BYTES;
                streams.waste_left = (streams.waste_left + LATE_BYTES).min(most);
            }
            open
        };
        if open && self.shared.cancels.send(self.id).is_err() {
            // The session's task is gone, by its end or the daemon's, and the stream with it.
            tracing::trace!(stream = self.id, "a stream outlived its session");
        }
    }
}
