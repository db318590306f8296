//! The session loop: one thread that serves the host, the app and everything that runs for the
//! host.
//!
//! Made and run by [`crate::init`] as PID 1, and by tests over a socket pair. It waits for
//! everything at once and never for one thing alone: a host that is away, an app that floods its
//! log and a program that does not read its input each cost bounded memory and nothing else.
//!
//! ```text
//!   no session ──Hello──▶ session ──Hello──▶ the next session (what ran for the old one is killed)
//!        ▲                  │                 the app goes on
//!        └────bad bytes─────┘
//!   not thawed ──Thaw──▶ thawed      before that every request but Status is NotNow (freeze.rs)
//!   running ──Shutdown──▶ stopping the app ──▶ answer, sync, power off
//! ```

pub mod freeze;
mod stream;

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::os::fd::OwnedFd;

use rustix::process::Pid;
use spore_wire::generation::GENERATION;
use spore_wire::guest::{
    AgentError, AgentErrorCode, AgentHello, AgentMessage, AgentStatus, AppStatus, Event,
    Exec as ExecRequest, Exit, Reply, Request, Thaw, ThawStep,
};
use thiserror::Error;

use self::freeze::Life;
use self::stream::{Job, Stream};
use crate::clock;
use crate::exec::Exec;
use crate::face::{Face, Wish};
use crate::file::{FileReader, FileWriter};
use crate::guest::{Guest, refused};
use crate::hook::HOOKS_MS;
use crate::interest::{Interest, Ready};
use crate::memory::MemoryWatch;
use crate::port::Port;
use crate::runner::Runner;
use crate::session::{Inbox, Input, OUTBOX_BYTES_HARD, Outbox, Window};

/// The most news kept for a host that does not read; the app's status is in the next hello anyway.
const NEWS_MAX: usize = 64;

/// How long the last answer may take to leave before the power goes.
const FAREWELL_MS_MAX: u64 = 1_000;

/// How often it is looked whether the tenant's processes stand still, which takes them a moment.
const STILLNESS_STEP_MS: u64 = 1;

const READ_BYTES: usize = 64 * 1024;

/// What only the real machine can do; a test has its own.
pub trait Machine {
    /// Whether the values of a thaw make sense; asked before any of them is used.
    ///
    /// # Errors
    /// `Invalid`, with the value.
    fn check(&self, thaw: &Thaw) -> Result<(), AgentError>;

    /// Renews one thing that a VM must not share with another.
    ///
    /// # Errors
    /// Why it could not be renewed; the host then ends the VM.
    fn renew(&mut self, guest: &Guest, step: ThawStep, thaw: &Thaw) -> Result<(), AgentError>;

    /// Writes everything out and ends the VM.
    fn power_off(&mut self);
}

/// Why there is no agent.
#[derive(Debug, Error)]
pub enum AgentStartError {
    /// The port is unusable.
    #[error("cannot use the agent's port")]
    Port(#[source] std::io::Error),
    /// The second face has no socket.
    #[error("cannot listen on the tenant's agent socket")]
    Face(#[source] std::io::Error),
}

/// The agent.
#[derive(Debug)]
pub struct Agent<M> {
    port: Port,
    inbox: Inbox,
    outbox: Outbox,
    guest: Guest,
    machine: M,
    app: Runner,
    face: Option<Face>,
    in_session: bool,
    life: Life,
    streams: BTreeMap<u32, Stream>,
    last_stream: u32,
    /// With which stream the last turn began.
    first_pumped: u32,
    /// Used once each, for names.
    unique: u64,
    news: VecDeque<Event>,
    memory: MemoryWatch,
    awake_until_ms: u64,
    leaving: Option<Leaving>,
}

/// A shutdown under way.
#[derive(Debug)]
enum Leaving {
    StoppingApp { stream: u32 },
    Answering { until_ms: u64 },
}

impl<M: Machine> Agent<M> {
    /// An agent that speaks through `port`.
    ///
    /// # Errors
    /// [`AgentStartError`].
    pub fn new(port: OwnedFd, guest: Guest, machine: M) -> Result<Self, AgentStartError> {
        let face = match &guest.face {
            Some(path) => Some(Face::listen(path).map_err(AgentStartError::Face)?),
            None => None,
        };
        Ok(Self {
            port: Port::new(port).map_err(AgentStartError::Port)?,
            inbox: Inbox::default(),
            outbox: Outbox::default(),
            memory: MemoryWatch::new(&guest.groups),
            guest,
            machine,
            app: Runner::default(),
            face,
            in_session: false,
            life: Life::New,
            streams: BTreeMap::new(),
            last_stream: 0,
            first_pumped: 0,
            unique: 0,
            news: VecDeque::new(),
            awake_until_ms: 0,
            leaving: None,
        })
    }

    /// Serves until the machine was powered off.
    pub fn run(&mut self) {
        while self.turn() {}
    }

    fn turn(&mut self) -> bool {
        let ready = self.wait();
        let now_ms = clock::monotonic_ms();
        self.port.notice();
        self.collect(now_ms);
        self.listen(now_ms);
        self.await_stillness(now_ms);
        // Whoever stands still is neither late nor ready, and what is started would stand still.
        if !self.life.is_still() {
            self.app.pump(&mut self.guest, now_ms);
            self.hear_wishes(now_ms);
            self.await_hooks(now_ms);
        }
        self.watch_memory(&ready, now_ms);
        self.tell_news();
        self.pump_streams(&ready, now_ms);
        self.answer_stopped(now_ms);
        self.flush();
        !self.is_over(now_ms)
    }

    fn wait(&self) -> Ready {
        let now_ms = clock::monotonic_ms();
        let mut interest = Interest::default();
        interest.read(self.port.edges());
        if self.port.may_read() && self.outbox.len() < OUTBOX_BYTES_HARD {
            interest.at(now_ms);
        }
        for fd in self.guest.reaper.fds() {
            interest.read_borrowed(fd);
        }
        if !self.life.is_still() {
            self.app.interest(&mut interest, now_ms);
            if let Some(face) = &self.face {
                face.interest(&mut interest);
            }
        }
        self.memory.interest(&mut interest);
        let room = self.outbox.has_room();
        for stream in self.streams.values() {
            match &stream.job {
                Job::Exec(exec) => exec.interest(&mut interest, &stream.window, room, now_ms),
                Job::Read(_) if FileReader::can_go_on(&stream.window, room) => interest.at(now_ms),
                Job::Logs { cursor }
                    if room
                        && stream.window.may_send_frame()
                        && *cursor < self.app.log().last() =>
                {
                    interest.at(now_ms);
                }
                Job::Freeze => interest.at(now_ms + STILLNESS_STEP_MS),
                Job::Hooks { until_ms, .. } => interest.at(*until_ms),
                Job::Read(_) | Job::Logs { .. } | Job::Write(_) | Job::StopApp => {}
            }
        }
        if let Some(Leaving::Answering { until_ms }) = self.leaving {
            interest.at(until_ms);
        }
        interest.wait(now_ms)
    }

    fn collect(&mut self, now_ms: u64) {
        let ended = self.guest.reaper.collect();
        if ended.is_empty() {
            return;
        }
        for (pid, exit) in ended {
            if !self.app.ended(&mut self.guest, pid, exit, now_ms) {
                self.exec_ended(pid, exit);
            }
        }
        self.guest.sweep();
    }

    fn exec_ended(&mut self, pid: Pid, exit: Exit) {
        for stream in self.streams.values_mut() {
            if let Job::Exec(exec) = &mut stream.job
                && exec.pid() == pid
            {
                exec.ended(exit);
                return;
            }
        }
    }

    fn listen(&mut self, now_ms: u64) {
        if !self.port.may_read() {
            return;
        }
        let mut buffer = vec![0; READ_BYTES];
        while self.outbox.len() < OUTBOX_BYTES_HARD {
            let bytes = self.port.read(&mut buffer);
            if bytes == 0 {
                return;
            }
            self.inbox.feed(&buffer[..bytes]);
            while let Some(input) = self.inbox.take() {
                self.hear(input, now_ms);
            }
        }
    }

    fn hear(&mut self, input: Input, now_ms: u64) {
        match input {
            Input::Hello { nonce, .. } => self.begin_session(nonce, now_ms),
            Input::Broken(_) => self.end_session(),
            Input::Ping(token) => {
                self.outbox.message(0, &AgentMessage::Pong { token });
            }
            Input::Open(stream, request) => self.open(stream, *request, now_ms),
            Input::Refuse(stream, error) => match self.admit(stream) {
                Ok(()) => self.fail(stream, error),
                Err(error) => self.fail(stream, error),
            },
            Input::Credit(stream, bytes) => {
                if let Some(stream) = self.streams.get_mut(&stream) {
                    stream.window.credited(bytes);
                }
            }
            Input::Cancel(stream) => self.cancel(stream),
            Input::Data(stream, bytes) => self.data(stream, &bytes),
            Input::End(stream) => self.end(stream),
            Input::Resize(stream, size) => {
                let resized = match self.exec(stream) {
                    Some(exec) => exec.resize(size),
                    None => Ok(()),
                };
                if let Err(error) = resized {
                    self.fail(stream, refused("resize the terminal", &error));
                }
            }
            Input::Signal(stream, signal) => {
                if let Some(exec) = self.exec(stream)
                    && let Err(error) = exec.signal(signal)
                {
                    self.fail(stream, error);
                }
            }
        }
    }

    fn begin_session(&mut self, nonce: [u8; 16], now_ms: u64) {
        self.end_session();
        self.in_session = true;
        self.last_stream = 0;
        self.outbox.begin(nonce);
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let hello = AgentHello {
            generation: GENERATION,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            boot_id: boot_id.trim().to_owned(),
            thawed: self.life.is_thawed(),
            frozen: self.life.is_frozen(),
            incarnation: self.life.name().map(str::to_owned),
            app: self.app.status(now_ms),
        };
        self.outbox.message(0, &AgentMessage::Hello(hello));
        // The daemon before this one may have died before it acted on these.
        self.news
            .retain(|event| !matches!(event, Event::App(_) | Event::KeepAwake { .. }));
        let for_ms = self.awake_until_ms.saturating_sub(now_ms);
        if for_ms > 0 {
            self.news.push_back(Event::KeepAwake { for_ms });
        }
    }

    /// Everything that runs for the session ends; the app does not.
    fn end_session(&mut self) {
        self.in_session = false;
        while let Some((_number, stream)) = self.streams.pop_first() {
            self.abandon(stream.job);
        }
        if let Some(Leaving::StoppingApp { stream }) = &mut self.leaving {
            // Nobody is left to be answered; the shutdown itself goes on.
            *stream = 0;
        }
    }

    fn open(&mut self, stream: u32, request: Request, now_ms: u64) {
        let opened = self.admit(stream).and_then(|()| self.legal(&request));
        let done = opened.and_then(|()| self.begin(stream, request, now_ms));
        match done {
            Ok(Begun::Reply(reply)) => self.reply(stream, reply),
            Ok(Begun::Job(job)) => {
                let window = Window::default();
                self.streams.insert(stream, Stream { window, job });
            }
            Ok(Begun::Leaving) => {}
            Err(error) => self.fail(stream, error),
        }
    }

    fn legal(&self, request: &Request) -> Result<(), AgentError> {
        if self.leaving.is_some() && !matches!(request, Request::Status) {
            return Err(AgentError {
                code: AgentErrorCode::NotNow,
                message: "the VM is being shut down".to_owned(),
            });
        }
        self.life.admits(request)
    }

    fn begin(&mut self, stream: u32, request: Request, now_ms: u64) -> Result<Begun, AgentError> {
        match request {
            Request::Status => Ok(Begun::Reply(Reply::Status(self.status(now_ms)))),
            Request::Thaw(thaw) => self.thaw(thaw).map(Begun::Reply),
            Request::Freeze => self.freeze(now_ms),
            Request::Unfreeze {
                incarnation,
                hooks_ms,
            } => self.unfreeze(incarnation, hooks_ms.unwrap_or(HOOKS_MS), now_ms),
            Request::StartApp(start) => {
                self.app.start(&mut self.guest, start, now_ms)?;
                Ok(Begun::Reply(Reply::Done))
            }
            Request::StopApp { grace_ms } => {
                self.app.stop(&mut self.guest, grace_ms, now_ms);
                Ok(Begun::Job(Job::StopApp))
            }
            Request::Exec(exec) => self.begin_exec(&exec, now_ms),
            Request::Rehearse { argv, timeout_ms } => self.rehearse(&argv, timeout_ms, now_ms),
            Request::ReadFile { path } => {
                FileReader::open(&self.guest, &path).map(|job| Begun::Job(Job::Read(job)))
            }
            Request::WriteFile(request) => {
                self.unique += 1;
                FileWriter::create(&self.guest, &request, self.unique)
                    .map(|job| Begun::Job(Job::Write(job)))
            }
            Request::Logs { after } => Ok(Begun::Job(Job::Logs {
                cursor: after.min(self.app.log().last()),
            })),
            Request::Shutdown { grace_ms } => {
                self.leaving = Some(Leaving::StoppingApp { stream });
                self.app.stop(&mut self.guest, grace_ms, now_ms);
                Ok(Begun::Leaving)
            }
            _ => Err(AgentError {
                code: AgentErrorCode::Unknown,
                message: "this agent does not know the operation: rebuild the VM".to_owned(),
            }),
        }
    }

    fn begin_exec(&mut self, exec: &ExecRequest, now_ms: u64) -> Result<Begun, AgentError> {
        self.unique += 1;
        let name = format!("exec-{}", self.unique);
        let app = self.app.surroundings();
        let exec = Exec::start(&mut self.guest, &name, exec, app, now_ms)?;
        Ok(Begun::Job(Job::Exec(Box::new(exec))))
    }

    fn rehearse(&mut self, argv: &[String], ms: u64, now_ms: u64) -> Result<Begun, AgentError> {
        if self.app.status(now_ms) != AppStatus::Absent {
            return Err(AgentError {
                code: AgentErrorCode::NotNow,
                message: "an app was started already: a rehearsal comes before it".to_owned(),
            });
        }
        self.unique += 1;
        let name = format!("exec-{}", self.unique);
        let exec = Exec::rehearse(&mut self.guest, &name, argv, ms, now_ms)?;
        Ok(Begun::Job(Job::Exec(Box::new(exec))))
    }

    fn status(&self, now_ms: u64) -> AgentStatus {
        AgentStatus {
            uptime_ms: now_ms,
            thawed: self.life.is_thawed(),
            frozen: self.life.is_frozen(),
            incarnation: self.life.name().map(str::to_owned),
            app: self.app.status(now_ms),
            memory_available_kib: crate::procfs::memory_kib("MemAvailable").unwrap_or(0),
            processes: crate::procfs::processes(),
        }
    }

    fn hear_wishes(&mut self, now_ms: u64) {
        let wishes = match &mut self.face {
            Some(face) => face.pump(now_ms),
            None => return,
        };
        for wish in wishes {
            match wish {
                Wish::KeepAwake { for_ms } => {
                    self.awake_until_ms = now_ms.saturating_add(for_ms);
                    self.add_news(Event::KeepAwake { for_ms });
                }
                Wish::Ready => self.app.declare_ready(now_ms),
                Wish::AfterFork => {}
            }
        }
    }

    fn watch_memory(&mut self, ready: &Ready, now_ms: u64) {
        let seen = self.memory.look(ready, now_ms);
        if let Some(group) = seen.ended {
            self.app.was_starved(&group);
        }
        if let Some(event) = seen.event {
            self.add_news(event);
        }
    }

    fn add_news(&mut self, event: Event) {
        if self.news.len() >= NEWS_MAX {
            self.news.pop_front();
        }
        self.news.push_back(event);
    }

    fn tell_news(&mut self) {
        for event in self.app.take_news() {
            self.add_news(event);
        }
        if !self.in_session {
            return;
        }
        while self.outbox.has_room()
            && let Some(event) = self.news.pop_front()
        {
            self.outbox.message(0, &AgentMessage::Event { event });
        }
    }

    fn answer_stopped(&mut self, now_ms: u64) {
        if !self.app.take_stopped() {
            return;
        }
        let waiting: Vec<u32> = self
            .streams
            .iter()
            .filter(|(_number, stream)| matches!(stream.job, Job::StopApp))
            .map(|(number, _stream)| *number)
            .collect();
        for number in waiting {
            self.reply(number, Reply::Done);
        }
        if let Some(Leaving::StoppingApp { stream }) = self.leaving {
            if stream != 0 {
                self.reply(stream, Reply::Done);
            }
            while let Some((_number, stream)) = self.streams.pop_first() {
                self.abandon(stream.job);
            }
            let until_ms = now_ms + FAREWELL_MS_MAX;
            self.leaving = Some(Leaving::Answering { until_ms });
        }
    }

    fn flush(&mut self) {
        loop {
            let bytes = self.port.write(self.outbox.waiting());
            if bytes == 0 {
                return;
            }
            self.outbox.written(bytes);
        }
    }

    fn is_over(&mut self, now_ms: u64) -> bool {
        let Some(Leaving::Answering { until_ms }) = self.leaving else {
            return false;
        };
        if !self.outbox.is_empty() && now_ms < until_ms {
            return false;
        }
        self.machine.power_off();
        true
    }
}

/// What a request began.
enum Begun {
    Reply(Reply),
    Job(Job),
    Leaving,
}
