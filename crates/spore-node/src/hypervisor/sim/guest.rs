//! A simulated guest: its boot, its app, and how it ends.
//!
//! Made by the driver's `boot`; lives on tasks of its own, as a process does, until it is ended.

use core::time::Duration;
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use spore_wire::generation::{GENERATION, GENERATION_OLDEST_SERVED};
use spore_wire::guest::{
    AppSecrets, AppStatus, Event, Exit, LogRecord, OutputKind, StartApp, ThawStep,
};
use spore_wire::id::VmId;
use tokio::io::DuplexStream;
use tokio::sync::{Notify, broadcast, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{SimHost, agent, lock, web};
use crate::hypervisor::VmExit;
use crate::hypervisor::fork::ForkMemory;

/// One guest.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) vm: VmId,
    pub(super) pid: u32,
    pub(super) boot_id: String,
    pub(super) state: Mutex<GuestState>,
    /// News for the session, if there is one.
    pub(super) news: broadcast::Sender<Event>,
    /// Something was printed.
    pub(super) printed: Notify,
    pub(super) over: CancellationToken,
    booted_at: Instant,
    exit: watch::Sender<Option<VmExit>>,
    pub(super) unsound: watch::Sender<Option<String>>,
    pub(super) paused: watch::Sender<bool>,
    pub(super) memory_mib: u32,
    /// What it was forked from.
    pub(super) base: Option<ForkMemory>,
    session: Mutex<CancellationToken>,
    host: SimHost,
}

/// Everything of a guest that its forks begin with.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct GuestCopy {
    boot_id: String,
    life: Life,
    app: AppStatus,
    hostname: String,
    port: u16,
    random: u64,
    records: Vec<LogRecord>,
    files: HashMap<String, Vec<u8>>,
}

/// Whether its tenant may run, and under which name it was thawed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Life {
    #[default]
    New,
    Running(String),
    Frozen(String),
    Held(String),
}

impl Life {
    pub(super) const fn is_thawed(&self) -> bool {
        matches!(self, Self::Running(_) | Self::Held(_))
    }

    pub(super) const fn is_frozen(&self) -> bool {
        matches!(self, Self::Frozen(_) | Self::Held(_))
    }

    pub(super) fn name(&self) -> Option<String> {
        match self {
            Self::New => None,
            Self::Running(name) | Self::Frozen(name) | Self::Held(name) => Some(name.clone()),
        }
    }
}

/// What a guest knows.
#[derive(Debug, Default)]
pub(super) struct GuestState {
    pub(super) life: Life,
    pub(super) network_open: bool,
    pub(super) app: AppStatus,
    pub(super) hostname: String,
    /// What the app is told.
    pub(super) secrets: AppSecrets,
    pub(super) port: u16,
    /// How late its clock was set.
    pub(super) clock_lag: Duration,
    /// Stands for the kernel's random numbers: made of what the last thaw gave.
    pub(super) random: u64,
    pub(super) starts: u32,
    pub(super) records: Vec<LogRecord>,
    pub(super) files: HashMap<String, Vec<u8>>,
    web: Option<SocketAddr>,
    stop_app: Option<CancellationToken>,
}

impl Guest {
    pub(super) fn boot(host: &SimHost, vm: VmId, pid: u32, memory_mib: u32) -> Arc<Self> {
        let word = host.draw(vm, "boot id");
        let boot_ms = 100 + host.draw(vm, "kernel") % 700;
        let boot_id = format!(
            "{:08x}-{:04x}-4000-8000-{:012x}",
            word >> 32,
            (word >> 16) & 0xffff,
            pid
        );
        let guest = Self::new(host, vm, pid, memory_mib, boot_id);
        guest.live(boot_ms)
    }

    /// A guest that stands where the copied one stood; it waits to be resumed.
    pub(super) fn fork(
        host: &SimHost,
        vm: VmId,
        (pid, memory_mib): (u32, u32),
        memory: ForkMemory,
        copy: GuestCopy,
    ) -> Arc<Self> {
        let wake_ms = 20 + host.draw(vm, "translation") % 80;
        let mut guest = Self::new(host, vm, pid, memory_mib, copy.boot_id);
        guest.base = Some(memory);
        guest.paused.send_replace(true);
        *lock(&guest.state) = GuestState {
            life: copy.life,
            app: copy.app,
            hostname: copy.hostname,
            port: copy.port,
            random: copy.random,
            records: copy.records,
            files: copy.files,
            ..GuestState::default()
        };
        guest.live(wake_ms)
    }

    pub(super) fn copy(&self) -> GuestCopy {
        let state = lock(&self.state);
        GuestCopy {
            boot_id: self.boot_id.clone(),
            life: state.life.clone(),
            app: state.app.clone(),
            hostname: state.hostname.clone(),
            port: state.port,
            random: state.random,
            records: state.records.clone(),
            files: state.files.clone(),
        }
    }

    fn new(host: &SimHost, vm: VmId, pid: u32, memory_mib: u32, boot_id: String) -> Self {
        Self {
            vm,
            pid,
            boot_id,
            memory_mib,
            base: None,
            paused: watch::Sender::new(false),
            state: Mutex::default(),
            news: broadcast::channel(256).0,
            printed: Notify::new(),
            over: CancellationToken::new(),
            booted_at: Instant::now(),
            exit: watch::Sender::new(None),
            unsound: watch::Sender::new(None),
            session: Mutex::default(),
            host: host.clone(),
        }
    }

    /// From now on it takes its time to its first word, and dies when the plan says so.
    fn live(mut self, first_word_ms: u64) -> Arc<Self> {
        self.booted_at += Duration::from_millis(first_word_ms);
        let guest = Arc::new(self);
        let (host, vm) = (guest.host.clone(), guest.vm);
        if host.happens(vm, "dies", |plan| plan.dies) {
            let after = Duration::from_millis(host.draw(vm, "death") % 60_000);
            let dying = Arc::clone(&guest);
            guest.spawn(async move {
                tokio::time::sleep(after).await;
                dying.host.strike(vm);
                dying.end_itself("died by plan");
            });
        }
        guest
    }

    /// Runs as long as the guest does.
    pub(super) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let over = self.over.clone();
        drop(tokio::spawn(async move {
            over.run_until_cancelled(work).await;
        }));
    }

    /// What its agent speaks.
    pub(super) fn generation(&self) -> u32 {
        match lock(&self.host.world.held).oldest {
            true => GENERATION_OLDEST_SERVED,
            false => GENERATION,
        }
    }

    /// How long the agent is kept waiting this time.
    pub(super) fn delay(&self) -> Duration {
        let mut held = lock(&self.host.world.held);
        let by = held.delay;
        match held.delays.get_mut(&self.vm) {
            Some((by, times)) if *times > 0 => {
                *times -= 1;
                *by
            }
            _ => by,
        }
    }

    /// Whether its tenant's processes stand still when they are told to.
    pub(super) fn stands_still(&self) -> bool {
        !lock(&self.host.world.held).restless
    }

    /// What its agent does of a thaw.
    pub(super) fn does(&self, step: ThawStep) -> bool {
        lock(&self.host.world.held).withheld != Some(step)
    }

    /// What the kernel's random numbers are made of from now on; nobody else may have it.
    pub(super) fn renew_random(&self, entropy: &[u8]) -> u64 {
        let mixed = entropy
            .iter()
            .fold(0, |mixed, byte| super::mix(mixed ^ u64::from(*byte)));
        if !lock(&self.host.world.held).randoms.insert(mixed) {
            self.violation("it was thawed with another's entropy");
        }
        mixed
    }

    /// Waits while the guest is paused.
    pub(super) async fn resumed(&self) {
        let mut paused = self.paused.subscribe();
        // The sender is the guest's own.
        drop(paused.wait_for(|paused| !paused).await);
    }

    pub(super) fn is_alive(&self) -> bool {
        !self.over.is_cancelled()
    }

    pub(super) fn end(&self, reason: &str, out_of_memory: bool) {
        if self.is_alive() {
            self.over.cancel();
            self.exit.send_replace(Some(VmExit {
                reason: reason.to_owned(),
                out_of_memory,
            }));
        }
    }

    /// Ends without a daemon's doing.
    pub(super) fn end_itself(&self, reason: &str) {
        if self.is_alive() {
            self.host.note_death(self.vm);
            self.end(reason, false);
        }
    }

    pub(super) async fn exited(&self) -> VmExit {
        let mut exit = self.exit.subscribe();
        let exit = exit.wait_for(Option::is_some).await;
        exit.ok().and_then(|exit| exit.clone()).unwrap_or(VmExit {
            reason: "gone".to_owned(),
            out_of_memory: false,
        })
    }

    pub(super) fn break_session(&self) {
        lock(&self.session).cancel();
    }

    /// The newest connection has the agent.
    pub(super) fn connect_agent(self: &Arc<Self>, host: &SimHost) -> DuplexStream {
        let (ours, theirs) = tokio::io::duplex(256 * 1024);
        let token = CancellationToken::new();
        let before = core::mem::replace(&mut *lock(&self.session), token.clone());
        before.cancel();
        let vm = self.vm;
        let trouble = agent::Trouble {
            silent: host.happens(vm, "silent", |plan| plan.silent),
            malformed: host.happens(vm, "malformed", |plan| plan.malformed),
            breaks_after: host
                .happens(vm, "breaks", |plan| plan.breaks)
                .then(|| Duration::from_millis(host.draw(vm, "break") % 5000)),
        };
        if trouble.silent || trouble.malformed || trouble.breaks_after.is_some() {
            host.strike(vm);
        }
        let guest = Arc::clone(self);
        let booted_at = self.booted_at;
        self.spawn(async move {
            let serve = async {
                tokio::time::sleep_until(booted_at).await;
                guest.resumed().await;
                agent::serve(guest, theirs, trouble).await;
            };
            token.run_until_cancelled(serve).await;
        });
        ours
    }

    pub(super) fn violation(&self, text: &str) {
        self.host.violation(format!("{}: {text}", self.vm));
    }

    /// Where the app answers, if it does.
    pub(super) async fn web(self: &Arc<Self>, port: u16) -> io::Result<SocketAddr> {
        self.listens(port)?;
        if let Some(address) = lock(&self.state).web {
            return Ok(address);
        }
        let address = web::listen(self).await?;
        lock(&self.state).web = Some(address);
        Ok(address)
    }

    /// A connection to the app without a socket.
    pub(super) fn dial(self: &Arc<Self>) -> io::Result<DuplexStream> {
        let port = lock(&self.state).port;
        self.listens(port)?;
        Ok(web::dial(self))
    }

    fn listens(&self, port: u16) -> io::Result<()> {
        let state = lock(&self.state);
        let listens = matches!(state.app, AppStatus::Ready { .. }) && port == state.port;
        if !self.is_alive() || !state.network_open || !listens {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        Ok(())
    }

    pub(super) fn print(&self, text: &str) {
        let mut state = lock(&self.state);
        let sequence = u64::try_from(state.records.len()).unwrap_or(u64::MAX) + 1;
        state.records.push(LogRecord {
            sequence,
            at_us: 0,
            from: OutputKind::Stdout,
            text: text.to_owned(),
            continues: false,
        });
        drop(state);
        self.printed.notify_waiters();
    }

    fn app_is(&self, status: AppStatus) {
        lock(&self.state).app = status.clone();
        // Nobody listens: the next session's hello tells it.
        drop(self.news.send(Event::App(status)));
    }

    pub(super) fn start_app(self: &Arc<Self>, start: StartApp) {
        let stop = CancellationToken::new();
        {
            let mut state = lock(&self.state);
            state.port = start.port;
            state.stop_app = Some(stop.clone());
        }
        let guest = Arc::clone(self);
        self.spawn(async move {
            stop.run_until_cancelled(guest.run_app(start)).await;
        });
    }

    pub(super) fn stop_app(&self) {
        let stop = lock(&self.state).stop_app.take();
        if let Some(stop) = stop {
            stop.cancel();
            self.app_is(AppStatus::Stopped);
        }
    }

    async fn run_app(self: Arc<Self>, start: StartApp) {
        let hostname = lock(&self.state).hostname.clone();
        let program = start.command.first().map_or("", String::as_str);
        let script = self.host.script(&hostname, program);
        let deadline = Instant::now() + Duration::from_millis(start.ready_timeout_ms);
        let mut failures = 0;
        let mut pid = 100;
        loop {
            pid += 1;
            lock(&self.state).starts += 1;
            self.app_is(AppStatus::Starting { pid });
            for line in &script.lines {
                self.print(line);
            }
            let ends = async {
                match script.ends_after {
                    Some(after) => tokio::time::sleep(after).await,
                    None => core::future::pending().await,
                }
            };
            let lives = async {
                let wait = tokio::time::timeout_at(deadline, async {
                    match script.ready_after {
                        Some(after) => tokio::time::sleep(after).await,
                        None => core::future::pending().await,
                    }
                });
                if wait.await.is_ok() {
                    self.app_is(AppStatus::Ready { pid });
                    if let Some(for_ms) = script.keep_awake_ms {
                        drop(self.news.send(Event::KeepAwake { for_ms }));
                    }
                } else {
                    let reason = "nothing listens on its port".to_owned();
                    drop(self.news.send(Event::AppUnready { reason }));
                }
                core::future::pending::<()>().await;
            };
            tokio::select! {
                biased;
                () = ends => {}
                () = lives => {}
            }
            failures += 1;
            let wait_ms = (200_u64 << failures.min(8)).min(30_000);
            self.app_is(AppStatus::Backoff {
                failures,
                restart_in_ms: wait_ms,
                exit: Exit::Code { code: 3 },
            });
            tokio::time::sleep(Duration::from_millis(wait_ms)).await;
        }
    }
}
