//! The simulated guest's agent: speaks the real protocol, badly when the plan says so.
//!
//! Started by the guest for each connection of the host. Knows four programs: `cat`, `echo ARGS`,
//! `print BYTES`, `exit CODE` and `sleep`; its files are in memory.

use core::time::Duration;
use std::collections::HashMap;
use std::sync::Arc;

use data_encoding::HEXLOWER_PERMISSIVE;
use spore_wire::frame::{Decoder, Frame, FrameError, FrameKind, HEADER_BYTES, SYNC_MARK, encode};
use spore_wire::generation::GENERATION_FORKS;
use spore_wire::guest::{
    AgentError, AgentErrorCode, AgentHello, AgentMessage, AgentStatus, AppStatus, CREDIT_BYTES,
    Event, Exec, Exit, HostMessage, LogBatch, OutputKind, Reply, Request, Thaw, ThawStep, Thawed,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::sync::{Semaphore, broadcast, mpsc};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::guest::{Guest, Life};
use super::lock;

/// What an app's clock may be late at its first instruction.
const CLOCK_LAG_MAX: Duration = Duration::from_millis(50);

/// What goes wrong in one session.
#[derive(Clone, Copy, Debug)]
pub(super) struct Trouble {
    pub(super) silent: bool,
    pub(super) malformed: bool,
    pub(super) breaks_after: Option<Duration>,
}

/// A stream that the host opened.
struct Open {
    data: mpsc::UnboundedSender<Option<Vec<u8>>>,
    credit: Arc<Semaphore>,
    cancel: CancellationToken,
}

/// What a request's task has.
struct Job {
    guest: Arc<Guest>,
    out: mpsc::UnboundedSender<Vec<u8>>,
    stream: u32,
    data: mpsc::UnboundedReceiver<Option<Vec<u8>>>,
    credit: Arc<Semaphore>,
}

fn frame(stream: u32, kind: FrameKind, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    if encode(stream, kind, payload, &mut out).is_err() {
        out.clear();
    }
    out
}

fn message(stream: u32, message: &AgentMessage) -> Vec<u8> {
    let json = serde_json::to_vec(message).unwrap_or_default();
    frame(stream, FrameKind::Message, &json)
}

/// Serves one connection until it ends.
pub(super) async fn serve(guest: Arc<Guest>, stream: DuplexStream, trouble: Trouble) {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let (out, mut waiting) = mpsc::unbounded_channel::<Vec<u8>>();
    let write = async {
        while let Some(bytes) = waiting.recv().await {
            if trouble.silent {
                continue;
            }
            if writer.write_all(&bytes).await.is_err() {
                break;
            }
        }
    };
    let read = async {
        let mut decoder = Decoder::new();
        let mut session = None;
        let mut buffer = vec![0; 32 * 1024];
        loop {
            match decoder.next_frame() {
                Ok(None) => match reader.read(&mut buffer).await {
                    Ok(0) | Err(_) => break,
                    Ok(got) => {
                        guest.resumed().await;
                        decoder.feed(&buffer[..got]);
                    }
                },
                Ok(Some(frame)) => take(&guest, &out, frame, &mut session, trouble),
                // What a daemon cut in the middle.
                Err(FrameError::Checksum) => {}
                Err(_) => break,
            }
        }
    };
    let breaks = async {
        match trouble.breaks_after {
            Some(after) => tokio::time::sleep(after).await,
            None => core::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        () = write => {}
        () = read => {}
        () = breaks => {}
    }
}

/// What the agent knows of a session; dropped, it ends everything that ran for it.
struct AgentSession {
    streams: HashMap<u32, Open>,
    highest: u32,
}

impl Drop for AgentSession {
    fn drop(&mut self) {
        for open in self.streams.values() {
            open.cancel.cancel();
        }
    }
}

fn take(
    guest: &Arc<Guest>,
    out: &mpsc::UnboundedSender<Vec<u8>>,
    frame: Frame,
    session: &mut Option<AgentSession>,
    trouble: Trouble,
) {
    let send = |bytes| drop(out.send(bytes));
    let host_message = match frame.kind {
        FrameKind::Message => serde_json::from_slice::<HostMessage>(&frame.payload).ok(),
        FrameKind::Data | FrameKind::End => {
            let open = session
                .as_ref()
                .and_then(|held| held.streams.get(&frame.stream));
            if let Some(open) = open {
                let bytes = (frame.kind == FrameKind::Data).then_some(frame.payload);
                drop(open.data.send(bytes));
            }
            return;
        }
        FrameKind::Part => unreachable!("a decoder puts parts together"),
    };
    match (host_message, session) {
        (Some(HostMessage::Hello(hello)), session) => {
            let nonce = HEXLOWER_PERMISSIVE.decode(hello.nonce.as_bytes());
            let mut greeting = SYNC_MARK.to_vec();
            greeting.extend(nonce.unwrap_or_default());
            greeting.extend(message(0, &AgentMessage::Hello(greet(guest))));
            if trouble.malformed {
                greeting.extend_from_slice(b"\xffrubbish");
            }
            send(greeting);
            *session = Some(AgentSession {
                streams: HashMap::new(),
                highest: 0,
            });
            tell_news(guest, out.clone());
        }
        (Some(HostMessage::Ping { token }), Some(_)) => {
            send(message(0, &AgentMessage::Pong { token }));
        }
        (Some(HostMessage::Request { request }), Some(held)) => {
            if frame.stream <= held.highest || frame.stream.is_multiple_of(2) {
                guest.violation("a stream's number does not rise");
            }
            held.highest = frame.stream;
            open(guest, out, frame.stream, request, held);
        }
        (Some(HostMessage::Credit { bytes }), Some(held)) => {
            if let Some(open) = held.streams.get(&frame.stream) {
                open.credit.add_permits(bytes as usize);
            }
        }
        (Some(HostMessage::Cancel), Some(held)) => {
            if let Some(open) = held.streams.remove(&frame.stream) {
                open.cancel.cancel();
            }
        }
        (Some(_), _) => {}
        (None, _) => guest.violation("the host sent no message"),
    }
}

fn greet(guest: &Guest) -> AgentHello {
    let generation = guest.generation();
    let state = lock(&guest.state);
    AgentHello {
        generation,
        version: "simulated".to_owned(),
        boot_id: guest.boot_id.clone(),
        thawed: state.life.is_thawed(),
        frozen: state.life.is_frozen(),
        incarnation: state.life.name(),
        app: state.app.clone(),
    }
}

fn tell_news(guest: &Arc<Guest>, out: mpsc::UnboundedSender<Vec<u8>>) {
    let mut news = guest.news.subscribe();
    // What changed between the hello and here is told once more.
    let app = lock(&guest.state).app.clone();
    let again = Event::App(app);
    drop(out.send(message(0, &AgentMessage::Event { event: again })));
    guest.spawn(async move {
        loop {
            let event = match news.recv().await {
                Ok(event) => event,
                Err(broadcast::error::RecvError::Lagged(_)) => continue,
                Err(broadcast::error::RecvError::Closed) => break,
            };
            if out
                .send(message(0, &AgentMessage::Event { event }))
                .is_err()
            {
                break;
            }
        }
    });
}

fn open(
    guest: &Arc<Guest>,
    out: &mpsc::UnboundedSender<Vec<u8>>,
    stream: u32,
    request: Request,
    session: &mut AgentSession,
) {
    let (data, receiver) = mpsc::unbounded_channel();
    let credit = Arc::new(Semaphore::new(CREDIT_BYTES as usize));
    let cancel = CancellationToken::new();
    let job = Job {
        guest: Arc::clone(guest),
        out: out.clone(),
        stream,
        data: receiver,
        credit: Arc::clone(&credit),
    };
    session.streams.insert(
        stream,
        Open {
            data,
            credit,
            cancel: cancel.clone(),
        },
    );
    guest.spawn(async move {
        cancel.run_until_cancelled(job.run(request)).await;
    });
}

fn error(code: AgentErrorCode, text: &str) -> AgentError {
    AgentError {
        code,
        message: text.to_owned(),
    }
}

impl Job {
    async fn run(mut self, request: Request) {
        let last = match self.answer(request).await {
            Ok(reply) => AgentMessage::Reply { reply },
            Err(error) => AgentMessage::Error(error),
        };
        self.send(message(self.stream, &last));
    }

    fn send(&self, bytes: Vec<u8>) {
        // A session that is over has nobody to tell.
        drop(self.out.send(bytes));
    }

    async fn answer(&mut self, request: Request) -> Result<Reply, AgentError> {
        let life = lock(&self.guest.state).life.clone();
        let is_of_life = matches!(
            request,
            Request::Status | Request::Thaw(_) | Request::Unfreeze { .. }
        );
        if !is_of_life && !matches!(life, Life::Running(_)) {
            // Who asks a VM that is being captured cannot know of it.
            if !matches!(life, Life::Frozen(_)) {
                self.guest
                    .violation("a request before the thaw, or while held");
            }
            return Err(error(AgentErrorCode::NotNow, "not thawed"));
        }
        match request {
            Request::Status => Ok(self.status()),
            Request::Thaw(thaw) => self.thaw(&life, thaw).await,
            Request::Freeze => {
                tokio::time::sleep(Duration::from_millis(2)).await;
                if !self.guest.stands_still() {
                    return Err(error(AgentErrorCode::Refused, "it does not stand still"));
                }
                lock(&self.guest.state).life = Life::Frozen(life.name().unwrap_or_default());
                Ok(Reply::Done)
            }
            Request::Unfreeze { incarnation, .. } => {
                if !life.is_frozen() || life.name() != Some(incarnation.clone()) {
                    self.guest.violation("unfrozen as what it is not");
                    return Err(error(AgentErrorCode::NotNow, "frozen as another"));
                }
                lock(&self.guest.state).life = Life::Running(incarnation);
                Ok(Reply::Done)
            }
            Request::StartApp(start) => self.start_app(start),
            Request::StopApp { .. } => {
                self.guest.stop_app();
                Ok(Reply::Done)
            }
            Request::Exec(exec) => self.exec(exec).await,
            Request::Rehearse { .. } => {
                if lock(&self.guest.state).app != AppStatus::Absent {
                    self.guest.violation("a rehearsal behind an app's start");
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
                Ok(Reply::Exit(Exit::Code { code: 0 }))
            }
            Request::ReadFile { path } => self.read_file(&path).await,
            Request::WriteFile(file) => {
                let bytes = self.take_all().await;
                lock(&self.guest.state).files.insert(file.path, bytes);
                Ok(Reply::Done)
            }
            Request::Logs { after } => self.logs(after).await,
            Request::Shutdown { .. } => {
                self.guest.stop_app();
                let guest = Arc::clone(&self.guest);
                self.guest.spawn(async move {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    guest.end_itself("powered off");
                });
                Ok(Reply::Done)
            }
            _ => Err(error(AgentErrorCode::Unknown, "not in this agent")),
        }
    }

    async fn thaw(&self, life: &Life, thaw: Thaw) -> Result<Reply, AgentError> {
        let legal = match life {
            Life::New => true,
            Life::Running(_) => false,
            Life::Frozen(name) => *name != thaw.incarnation,
            Life::Held(name) => *name == thaw.incarnation,
        };
        let is_of_old = thaw.steps.is_empty() && !thaw.hold;
        if is_of_old != (self.guest.generation() < GENERATION_FORKS) {
            self.guest
                .violation("thawed as an agent of another generation is");
        }
        if !legal {
            self.guest.violation("thawed twice");
            return Err(error(AgentErrorCode::NotNow, "thawed already"));
        }
        if thaw.secrets.is_some() && lock(&self.guest.state).network_open {
            self.guest
                .violation("secrets come once the network is open");
        }
        let begun = Instant::now();
        tokio::time::sleep(self.guest.delay() + Duration::from_millis(5)).await;
        let random = self.guest.renew_random(thaw.entropy.expose());
        let mut state = lock(&self.guest.state);
        state.random = random;
        state.clock_lag = begun.elapsed();
        state.hostname = thaw.hostname;
        let is_given = |step: &ThawStep| *step == ThawStep::Secrets && self.guest.does(*step);
        if let Some(secrets) = thaw.secrets
            && thaw.steps.iter().any(is_given)
        {
            state.secrets = secrets;
        }
        state.life = match thaw.hold {
            true => Life::Held(thaw.incarnation),
            false => Life::Running(thaw.incarnation),
        };
        drop(state);
        if self.guest.generation() < GENERATION_FORKS {
            return Ok(Reply::Done);
        }
        let does = |step: &ThawStep| self.guest.does(*step);
        let done = thaw.steps.into_iter().filter(does);
        Ok(Reply::Thawed(Thawed {
            done: done.map(|step| (step, 1)).collect(),
            realtime_ns: thaw.realtime_ns,
        }))
    }

    fn status(&self) -> Reply {
        let state = lock(&self.guest.state);
        Reply::Status(AgentStatus {
            uptime_ms: 1,
            thawed: state.life.is_thawed(),
            frozen: state.life.is_frozen(),
            incarnation: state.life.name(),
            app: state.app.clone(),
            memory_available_kib: 1024,
            processes: 1,
        })
    }

    fn start_app(&self, start: spore_wire::guest::StartApp) -> Result<Reply, AgentError> {
        {
            let state = lock(&self.guest.state);
            if state.app != AppStatus::Absent {
                drop(state);
                self.guest.violation("the app was started twice");
                return Err(error(AgentErrorCode::NotNow, "an app runs"));
            }
            if state.clock_lag > CLOCK_LAG_MAX {
                self.guest
                    .violation("the app was started with a wrong clock");
            }
            if !state.network_open {
                drop(state);
                self.guest
                    .violation("the app was started before the network");
            }
        }
        if start
            .command
            .first()
            .is_none_or(|program| program == "/none")
        {
            return Err(error(AgentErrorCode::NotFound, "no such program: /none"));
        }
        let told = [&start.secret_environment, &start.secret_files];
        if told
            .iter()
            .any(|told| told.as_ref().is_some_and(|told| !told.is_empty()))
        {
            self.guest.violation("secrets come with the app's start");
        }
        let secrets = lock(&self.guest.state).secrets.clone();
        for (name, value) in &secrets.environment {
            let text = String::from_utf8_lossy(value.expose()).into_owned();
            self.guest.print(&format!("{name} is {text}"));
        }
        self.guest.start_app(start);
        Ok(Reply::Done)
    }

    /// Sends bytes as fast as the host allows.
    async fn give(&self, of: OutputKind, bytes: &[u8]) {
        self.send(message(self.stream, &AgentMessage::Output { of }));
        for chunk in bytes.chunks(10_000) {
            let wanted = u32::try_from(chunk.len()).unwrap_or(u32::MAX);
            let Ok(permit) = self.credit.acquire_many(wanted).await else {
                return;
            };
            permit.forget();
            self.send(frame(self.stream, FrameKind::Data, chunk));
        }
    }

    /// The host's next bytes, with the credit for more.
    async fn next(&mut self) -> Option<Vec<u8>> {
        let bytes = self.data.recv().await??;
        let credit = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        self.send(message(
            self.stream,
            &AgentMessage::Credit { bytes: credit },
        ));
        Some(bytes)
    }

    async fn take_all(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        while let Some(bytes) = self.next().await {
            all.extend(bytes);
        }
        all
    }

    async fn exec(&mut self, exec: Exec) -> Result<Reply, AgentError> {
        let words: Vec<&str> = exec.argv.iter().map(String::as_str).collect();
        let mut code = 0;
        match words.as_slice() {
            ["cat"] => {
                while let Some(bytes) = self.next().await {
                    self.give(OutputKind::Stdout, &bytes).await;
                }
            }
            ["echo", rest @ ..] => {
                self.give(OutputKind::Stdout, rest.join(" ").as_bytes())
                    .await
            }
            ["print", count] => {
                let count = count.parse().unwrap_or(0);
                self.give(OutputKind::Stderr, &vec![b'x'; count]).await;
            }
            ["random"] => {
                let random = lock(&self.guest.state).random.to_string();
                self.give(OutputKind::Stdout, random.as_bytes()).await;
            }
            ["exit", wanted] => code = wanted.parse().unwrap_or(1),
            ["sleep"] => core::future::pending().await,
            _ => return Err(error(AgentErrorCode::NotFound, "no such program")),
        }
        Ok(Reply::Exit(Exit::Code { code }))
    }

    async fn read_file(&self, path: &str) -> Result<Reply, AgentError> {
        let held = lock(&self.guest.state).files.get(path).cloned();
        let Some(bytes) = held else {
            return Err(error(AgentErrorCode::NotFound, "no such file"));
        };
        self.give(OutputKind::Stdout, &bytes).await;
        Ok(Reply::File {
            bytes: u64::try_from(bytes.len()).unwrap_or(u64::MAX),
            mode: 0o644,
        })
    }

    async fn logs(&self, mut after: u64) -> Result<Reply, AgentError> {
        loop {
            let printed = self.guest.printed.notified();
            tokio::pin!(printed);
            printed.as_mut().enable();
            let records: Vec<_> = {
                let state = lock(&self.guest.state);
                let new = state
                    .records
                    .iter()
                    .filter(|record| record.sequence > after);
                new.take(50).cloned().collect()
            };
            if let Some(last) = records.last() {
                after = last.sequence;
                let batch = LogBatch {
                    records,
                    dropped: 0,
                };
                let bytes = message(self.stream, &AgentMessage::Logs(batch));
                let payload = u32::try_from(bytes.len() - HEADER_BYTES).unwrap_or(u32::MAX);
                if let Ok(permit) = self.credit.acquire_many(payload).await {
                    permit.forget();
                }
                self.send(bytes);
            } else {
                printed.await;
            }
        }
    }
}
