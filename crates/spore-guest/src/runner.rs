//! The app as it runs: does what [`crate::app`] decides, and tells it what happened.
//!
//! Owned by [`crate::agent`], which calls [`Runner::pump`] each turn. Holds the app's captured
//! output, its readiness check and its relay. Never blocks, except for the moment of a spawn.

use std::io;
use std::net::SocketAddrV4;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use spore_wire::guest::{
    AgentError, AgentErrorCode, AppSecrets, AppStatus, Event, Exit, OutputKind, Readiness, StartApp,
};

use crate::app::{AppEffect, AppEvent, AppLife, AppState};
use crate::cgroup::Group;
use crate::exec::nonblocking;
use crate::guest::{Environment, Guest, base_environment, check_variable, refused, set};
use crate::interest::Interest;
use crate::launch::{Launch, Stdios};
use crate::log::{LineCutter, LogRing};
use crate::probe::{HttpProbe, Verdict};
use crate::socket_table::{Listeners, Reach};
use crate::user::Identity;
use crate::{clock, forward, secrets};

/// The name of the app's group.
const GROUP: &str = "app";

/// How often an ending app is looked at until nothing of it is left.
const ENDING_STEP_MS: u64 = 5;

const READ_BYTES: usize = 64 * 1024;

/// The most reads of one output in one turn: a flood must leave room for the host's requests.
const READS_PER_TURN: usize = 4;

/// The app, its output and what watches it.
#[derive(Debug)]
pub struct Runner {
    life: AppLife,
    plan: Option<Plan>,
    /// What it knows, each time that it is started.
    secrets: AppSecrets,
    group: Option<Group>,
    /// What the group had counted when the app was started last.
    oom_kills: u64,
    /// It stalled for want of memory and was ended for that.
    starved: bool,
    captures: Vec<Capture>,
    check: Option<Check>,
    /// Health requests whose status is known and whose answer is still coming.
    answered: Vec<HttpProbe>,
    relay: Option<Relay>,
    log: LogRing,
    news: Vec<Event>,
    stopped: bool,
    buffer: Vec<u8>,
}

/// What is started, again and again.
#[derive(Debug)]
struct Plan {
    start: StartApp,
    identity: Identity,
    public: Environment,
}

#[derive(Debug)]
struct Capture {
    from: OutputKind,
    fd: OwnedFd,
    cutter: LineCutter,
}

/// The readiness check of one start.
#[derive(Debug)]
struct Check {
    began_ms: u64,
    next_ms: u64,
    probe: Option<HttpProbe>,
    /// The app said itself that it is ready.
    declared: bool,
    seen: String,
}

#[derive(Debug)]
struct Relay {
    pid: Pid,
    inside: SocketAddrV4,
}

impl Default for Runner {
    fn default() -> Self {
        Self {
            life: AppLife::default(),
            plan: None,
            secrets: AppSecrets::default(),
            group: None,
            oom_kills: 0,
            starved: false,
            captures: Vec::new(),
            check: None,
            answered: Vec::new(),
            relay: None,
            log: LogRing::default(),
            news: Vec::new(),
            stopped: false,
            buffer: vec![0; READ_BYTES],
        }
    }
}

impl Runner {
    /// What the host is told.
    #[must_use]
    pub fn status(&self, now_ms: u64) -> AppStatus {
        self.life.status(now_ms)
    }

    /// What it printed.
    #[must_use]
    pub const fn log(&self) -> &LogRing {
        &self.log
    }

    /// Drops what was printed until now, which a fork's source tells: also what nobody has read yet
    /// and a line's beginning. The app stands still, so there is an end to it.
    pub fn forget_log(&mut self) {
        for capture in &mut self.captures {
            while rustix::io::read(&capture.fd, &mut self.buffer[..]).is_ok_and(|bytes| bytes > 0) {
            }
            capture.cutter.forget();
        }
        self.log = LogRing::default();
    }

    /// Adds a line of the agent's own to what the app printed.
    pub fn say(&mut self, text: &str) {
        let line = text.to_owned().into();
        self.log
            .push(clock::realtime_us(), OutputKind::Stderr, line);
    }

    /// Environment (without secrets) and folder for those who run beside it.
    #[must_use]
    pub fn surroundings(&self) -> Option<(&Environment, &str)> {
        self.plan
            .as_ref()
            .map(|plan| (&plan.public, plan.start.directory.as_str()))
    }

    /// What happened since the last call.
    pub fn take_news(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.news)
    }

    /// Whether a stop was completed since the last call.
    pub fn take_stopped(&mut self) -> bool {
        std::mem::take(&mut self.stopped)
    }

    /// Puts secrets in place before there is an app: the files, for nobody yet, and the environment
    /// for when it is started.
    ///
    /// # Errors
    /// `Refused` for an app that runs with others, or by the kernel; `Invalid`, with the name.
    pub fn give_secrets(&mut self, guest: &Guest, given: AppSecrets) -> Result<(), AgentError> {
        if self.life.may_start() {
            secrets::put(guest, &given.files, None)?;
            self.secrets = given;
        } else if self.secrets != given {
            return Err(AgentError {
                code: AgentErrorCode::Refused,
                message: "the app runs with other secrets than these: start it anew".to_owned(),
            });
        }
        Ok(())
    }

    /// Starts an app.
    ///
    /// # Errors
    /// `NotNow` when one runs; else as the agent is to answer them, and nothing runs then.
    pub fn start(
        &mut self,
        guest: &mut Guest,
        mut start: StartApp,
        now_ms: u64,
    ) -> Result<(), AgentError> {
        if !self.life.may_start() {
            return Err(AgentError {
                code: AgentErrorCode::NotNow,
                message: "an app runs already: stop it first".to_owned(),
            });
        }
        let (environment, files) = (start.secret_environment.take(), start.secret_files.take());
        if environment.is_some() || files.is_some() {
            self.secrets = AppSecrets {
                environment: environment.unwrap_or_default(),
                files: files.unwrap_or_default(),
            };
        }
        for (name, value) in &self.secrets.environment {
            check_variable(name, value.expose())?;
        }
        let plan = Plan::new(guest, start)?;
        secrets::put(guest, &self.secrets.files, Some(&plan.identity))?;
        let before = self.plan.replace(plan);
        match self.spawn(guest, now_ms) {
            Ok(()) => Ok(()),
            Err(error) => {
                self.plan = before;
                Err(error)
            }
        }
    }

    /// Stops it; [`Runner::take_stopped`] tells when nothing is left.
    pub fn stop(&mut self, guest: &mut Guest, grace_ms: u64, now_ms: u64) {
        self.step(guest, now_ms, AppEvent::Stop { grace_ms });
    }

    /// The app says that it is ready.
    pub fn declare_ready(&mut self, now_ms: u64) {
        if let Some(check) = &mut self.check {
            check.declared = true;
            check.probe = None;
            check.began_ms = now_ms;
            check.next_ms = now_ms;
        }
    }

    /// A process ended. False when it is none of the app's.
    pub fn ended(&mut self, guest: &mut Guest, pid: Pid, exit: Exit, now_ms: u64) -> bool {
        if let Some(relay) = &self.relay
            && relay.pid == pid
        {
            let inside = relay.inside;
            self.relay = None;
            // Nothing but a broken listener ends it; what then fails is seen by visitors.
            if matches!(self.life.state(), AppState::Ready { .. }) {
                let _reached = self.ensure_relay(guest, inside);
            }
            return true;
        }
        let Ok(number) = u32::try_from(pid.as_raw_nonzero().get()) else {
            return false;
        };
        let ours = match self.life.state() {
            AppState::Starting { pid, .. } | AppState::Ready { pid, .. } => pid == number,
            AppState::Ending { pid, .. } => pid == Some(number),
            AppState::Absent | AppState::Backoff { .. } | AppState::Stopped => false,
        };
        if ours {
            // Its last words first: they say why.
            self.capture();
            self.log_end(exit);
            self.step(guest, now_ms, AppEvent::Exited { pid: number, exit });
        }
        ours
    }

    /// What it waits for.
    pub fn interest<'a>(&'a self, interest: &mut Interest<'a>, now_ms: u64) {
        for capture in &self.captures {
            interest.read(&capture.fd);
        }
        if let Some(at) = self.life.deadline_ms() {
            interest.at(at);
        }
        if matches!(self.life.state(), AppState::Ending { pid: None, .. }) {
            interest.at(now_ms + ENDING_STEP_MS);
        }
        for probe in &self.answered {
            probe.interest(interest);
        }
        if let Some(check) = &self.check {
            match &check.probe {
                Some(probe) => probe.interest(interest),
                None => interest.at(check.next_ms),
            }
        }
    }

    /// Goes on as far as it can.
    pub fn pump(&mut self, guest: &mut Guest, now_ms: u64) {
        self.capture();
        self.answered.retain_mut(|probe| !probe.has_left(now_ms));
        if self.is_ready_now(guest, now_ms) {
            self.check = None;
            self.step(guest, now_ms, AppEvent::BecameReady);
        }
        if matches!(self.life.state(), AppState::Ending { pid: None, .. })
            && self.group.as_ref().is_none_or(Group::is_empty)
        {
            self.step(guest, now_ms, AppEvent::GroupGone);
        }
        self.step(guest, now_ms, AppEvent::Tick);
    }

    fn step(&mut self, guest: &mut Guest, now_ms: u64, event: AppEvent) {
        for effect in self.life.step(now_ms, event) {
            match effect {
                AppEffect::Spawn => self.respawn(guest, now_ms),
                AppEffect::Terminate => self.terminate(),
                AppEffect::Kill => self.kill(),
                AppEffect::Release => self.release(),
                AppEffect::Tell => self.news.push(Event::App(self.life.status(now_ms))),
                AppEffect::TellUnready => {
                    let reason = self.check.as_ref().map(|check| check.seen.clone());
                    self.news.push(Event::AppUnready {
                        reason: reason.unwrap_or_default(),
                    });
                }
                AppEffect::AnswerStopped => self.stopped = true,
            }
        }
    }

    fn respawn(&mut self, guest: &mut Guest, now_ms: u64) {
        // What was killed may take a moment to go, and holds its port until then.
        if self.group.as_ref().is_some_and(|group| !group.is_empty()) {
            return;
        }
        if let Err(error) = self.spawn(guest, now_ms) {
            let text = format!(
                "spore: the app could not be started again: {}",
                error.message
            );
            self.log
                .push(clock::realtime_us(), OutputKind::Stderr, text.into());
            self.step(guest, now_ms, AppEvent::SpawnFailed);
        }
    }

    /// Notes, for its end, that a group was ended for want of memory.
    pub fn was_starved(&mut self, group: &Group) {
        self.starved |= self.group.as_ref() == Some(group);
    }

    /// Says in the app's own log how it ended, unless it was told to.
    fn log_end(&mut self, exit: Exit) {
        if matches!(self.life.state(), AppState::Ending { .. }) {
            return;
        }
        let kills = self.group.as_ref().map_or(0, Group::oom_kills);
        let why = if self.starved || kills > self.oom_kills {
            ": it wanted more memory than its VM has (`resources.memory`)"
        } else {
            ""
        };
        let text = format!("spore: the app ended with {exit}{why}");
        self.log
            .push(clock::realtime_us(), OutputKind::Stderr, text.into());
    }

    fn spawn(&mut self, guest: &mut Guest, now_ms: u64) -> Result<(), AgentError> {
        let Some(plan) = &self.plan else {
            return Ok(());
        };
        let (captures, stdout, stderr) =
            captures().map_err(|error| refused("make the app's pipes", &error))?;
        let mut group = guest
            .groups
            .group(GROUP)
            .map_err(|error| refused("make the app's group", &io::Error::other(error)))?;
        let launch = Launch {
            argv: &plan.start.command,
            environment: &plan.public,
            secrets: &self.secrets.environment,
            directory: &plan.start.directory,
            uid: plan.identity.uid,
            gid: plan.identity.gid,
            groups: &plan.identity.groups,
            procs: group.procs(),
            stdio: Stdios::Pipes {
                stdin: None,
                stdout,
                stderr,
            },
        };
        self.oom_kills = group.oom_kills();
        self.starved = false;
        let pid = guest.start(&mut group, launch)?;
        self.group = Some(group);
        self.captures.extend(captures);
        self.check = Some(Check {
            began_ms: now_ms,
            next_ms: now_ms,
            probe: None,
            declared: false,
            seen: String::new(),
        });
        let spawned = AppEvent::Spawned {
            pid: u32::try_from(pid.as_raw_nonzero().get()).unwrap_or(0),
            ready_timeout_ms: plan.start.ready_timeout_ms,
        };
        self.step(guest, now_ms, spawned);
        Ok(())
    }

    fn terminate(&mut self) {
        let AppState::Ending { pid: Some(pid), .. } = self.life.state() else {
            return;
        };
        let Some(leader) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
            return;
        };
        // One that has just ended answers ESRCH, and its end is on its way to us.
        let _gone = kill_process_group(leader, Signal::TERM);
    }

    fn kill(&mut self) {
        if let Some(group) = &self.group
            && let Err(error) = group.kill()
        {
            let text = format!("spore: the kernel refused to kill the app: {error}");
            self.log
                .push(clock::realtime_us(), OutputKind::Stderr, text.into());
        }
    }

    fn release(&mut self) {
        self.check = None;
        if let Some(relay) = self.relay.take() {
            // It is our child and not collected yet, so the number is still its own.
            let _gone = kill_process(relay.pid, Signal::KILL);
        }
    }

    fn capture(&mut self) {
        let log = &mut self.log;
        let buffer = &mut self.buffer;
        self.captures.retain_mut(|capture| {
            let from = capture.from;
            for _read in 0..READS_PER_TURN {
                match rustix::io::read(&capture.fd, &mut buffer[..]) {
                    Ok(bytes) if bytes > 0 => {
                        let now_us = clock::realtime_us();
                        capture
                            .cutter
                            .feed(&buffer[..bytes], |line| log.push(now_us, from, line));
                    }
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => return true,
                    Ok(_) | Err(_) => {
                        let now_us = clock::realtime_us();
                        capture.cutter.finish(|line| log.push(now_us, from, line));
                        return false;
                    }
                }
            }
            true
        });
    }

    fn is_ready_now(&mut self, guest: &mut Guest, now_ms: u64) -> bool {
        let (Some(check), Some(plan)) = (&mut self.check, &self.plan) else {
            return false;
        };
        if let Some(probe) = &mut check.probe {
            let verdict = probe.pump(now_ms);
            if verdict != Verdict::Waiting
                && let Some(mut probe) = check.probe.take()
            {
                probe.leave(now_ms);
                self.answered.push(probe);
            }
            match verdict {
                Verdict::Waiting => return false,
                Verdict::Healthy => return true,
                Verdict::Unhealthy(seen) => {
                    check.seen = seen;
                    check.next_ms = now_ms + step_ms(now_ms.saturating_sub(check.began_ms));
                }
            }
        }
        if check.next_ms > now_ms {
            return false;
        }
        check.next_ms = now_ms + step_ms(now_ms.saturating_sub(check.began_ms));
        let port = plan.start.port;
        let listeners = match Listeners::read() {
            Ok(listeners) => listeners,
            Err(error) => {
                check.seen = format!("cannot read the guest's socket table: {error}");
                return false;
            }
        };
        let inside = match listeners.reach(port, guest.address) {
            Reach::Closed => {
                check.seen = nothing_listens(port, &listeners);
                return false;
            }
            Reach::Outside => SocketAddrV4::new(guest.address, port),
            Reach::Loopback(address) => {
                let inside = SocketAddrV4::new(address, port);
                if let Err(error) = self.ensure_relay(guest, inside) {
                    if let Some(check) = &mut self.check {
                        check.seen = format!(
                            "the app listens on {inside} only, and port {port} cannot be relayed: \
                             {error}; listen on 0.0.0.0"
                        );
                    }
                    return false;
                }
                inside
            }
        };
        self.ask_health(inside, now_ms)
    }

    /// The port accepts: true when that is enough, else begins to ask the health path.
    fn ask_health(&mut self, inside: SocketAddrV4, now_ms: u64) -> bool {
        let (Some(check), Some(plan)) = (&mut self.check, &self.plan) else {
            return false;
        };
        match &plan.start.ready {
            Readiness::Port => true,
            Readiness::Http { .. } if check.declared => true,
            Readiness::Http { path } => {
                match HttpProbe::start(inside, path, now_ms) {
                    Ok(probe) => check.probe = Some(probe),
                    Err(error) => check.seen = format!("cannot connect to {inside}: {error}"),
                }
                false
            }
        }
    }

    fn ensure_relay(&mut self, guest: &mut Guest, inside: SocketAddrV4) -> io::Result<()> {
        if self.relay.is_some() {
            return Ok(());
        }
        let pid = forward::start(&guest.launcher.program, guest.address, inside)?;
        guest.reaper.expect(pid)?;
        self.relay = Some(Relay { pid, inside });
        Ok(())
    }
}

impl Plan {
    fn new(guest: &Guest, start: StartApp) -> Result<Self, AgentError> {
        if start.port == 0 {
            return Err(AgentError {
                code: AgentErrorCode::Invalid,
                message: "port 0 is no port: 1 to 65535 are".to_owned(),
            });
        }
        if let Readiness::Http { path } = &start.ready
            && (!path.starts_with('/') || path.contains(|c: char| c <= ' ' || c == '\u{7f}'))
        {
            return Err(AgentError {
                code: AgentErrorCode::Invalid,
                message: format!("health path `{path}` must begin with `/` and have no space"),
            });
        }
        let identity = guest.identity(start.user.as_deref())?;
        guest.settle(&identity)?;
        let mut public = base_environment(&identity);
        set(&mut public, "PORT", start.port.to_string().as_bytes())?;
        for (name, value) in &start.environment {
            set(&mut public, name, value.as_bytes())?;
        }
        Ok(Self {
            start,
            identity,
            public,
        })
    }
}

/// Two captured outputs and the app's ends of them.
fn captures() -> io::Result<(Vec<Capture>, OwnedFd, OwnedFd)> {
    let (out, stdout) = pipe_with(PipeFlags::CLOEXEC)?;
    let (err, stderr) = pipe_with(PipeFlags::CLOEXEC)?;
    let mut captures = Vec::new();
    for (from, fd) in [(OutputKind::Stdout, out), (OutputKind::Stderr, err)] {
        nonblocking(&fd)?;
        captures.push(Capture {
            from,
            fd,
            cutter: LineCutter::default(),
        });
    }
    Ok((captures, stdout, stderr))
}

/// The pause between two looks at an app that has been starting for `since_ms`. A wake waits for
/// this, so it is short at first; one look costs a fraction of a millisecond.
const fn step_ms(since_ms: u64) -> u64 {
    match since_ms {
        0..200 => 3,
        200..5_000 => 10,
        5_000..30_000 => 50,
        _ => 250,
    }
}

fn nothing_listens(port: u16, listeners: &Listeners) -> String {
    let others: Vec<String> = listeners.ports().iter().map(u16::to_string).collect();
    if others.is_empty() {
        return format!("nothing listens on port {port}: does the app use $PORT?");
    }
    format!(
        "nothing listens on port {port}, but on {}: does the app use $PORT?",
        others.join(", ")
    )
}
