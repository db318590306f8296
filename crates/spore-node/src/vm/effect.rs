//! The effects that take time: what each one does, and the event that tells of it.
//!
//! Begun by the VM's actor, which drops the future when the effect is overtaken. Never changes the
//! VM's state or its journal: results are data that the actor keeps.

use core::time::Duration;
use std::sync::Arc;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use spore_wire::guest::{AgentHello, AppSecrets, AppStatus, StartApp};
use spore_wire::id::VmId;
use spore_wire::node::{FAREWELL_MAX, Process, STOP_GRACE_DEFAULT, Source, VmFailureKind};
use spore_wire::snapshot::SnapshotInfo;
use tokio::sync::{OwnedSemaphorePermit, watch};

use super::actor::{Actor, Host};
use super::capture;
use super::guest::{AgentLink, GuestError, chain};
use super::mask::Masking;
use super::state::{AgentSeen, AppSeen, Failure, VmEffect, VmEvent, Work};
use super::thaw;
use crate::config::VmLimits;
use crate::hypervisor::fork::{Capture, ForkError};
use crate::hypervisor::{AttachError, BootError, Identity, Prepared, Vm, VmExit};
use crate::journal::{Record, SecretsKept};
use crate::snapshot::key::Keys;
use crate::snapshots::{Inherited, Wanted};
use crate::take::TakeError;

/// What an effect gave besides its event.
pub(super) enum Gain {
    Nothing,
    Turn(OwnedSemaphorePermit),
    Prepared(Prepared),
    Identity(Identity),
    /// The same of a fork, and what it has of what it began from.
    Forked(Identity, Inherited),
    Vm(Arc<dyn Vm>),
    /// What a capture gave, or why it gave nothing.
    Capture(Result<Capture, TakeError>),
    /// What was sealed, or why nothing was.
    Sealed(Result<Box<SnapshotInfo>, TakeError>),
}

/// How an effect ended.
pub(super) struct Outcome {
    pub(super) event: VmEvent,
    pub(super) gain: Gain,
}

impl From<VmEvent> for Outcome {
    fn from(event: VmEvent) -> Self {
        Self {
            event,
            gain: Gain::Nothing,
        }
    }
}

/// What the agent last said of the app.
#[derive(Clone, Debug, Default)]
pub(super) struct AppView {
    pub(super) status: AppStatus,
    pub(super) unready: Option<String>,
}

pub(super) fn failed(kind: VmFailureKind, message: String) -> Outcome {
    VmEvent::Failed(Failure { kind, message }).into()
}

/// The future of an asking effect.
pub(super) fn begin(actor: &Actor, effect: VmEffect) -> BoxFuture<'static, Outcome> {
    let host = Arc::clone(&actor.host);
    let record = actor.record.clone();
    let limits = host.config.limits;
    match effect {
        VmEffect::TakeTurn => take_turn(host).boxed(),
        VmEffect::Prepare => prepare(host, record).boxed(),
        VmEffect::Boot => boot(host, record).boxed(),
        VmEffect::Fork => fork(host, record, actor.keys.clone()).boxed(),
        VmEffect::Attach => attach(host, record).boxed(),
        VmEffect::Release => release(host, record, actor.releases).boxed(),
        VmEffect::ConnectAgent => connect_agent(actor.hello.subscribe(), record).boxed(),
        VmEffect::Resume => resume(actor.vm.clone(), limits).boxed(),
        VmEffect::Farewell => farewell().boxed(),
        VmEffect::AwaitReady => await_ready(actor.app.subscribe(), record, limits).boxed(),
        VmEffect::DropSource => drop_source(host, record).boxed(),
        VmEffect::Freeze | VmEffect::Pause | VmEffect::Capture | VmEffect::Unfreeze => {
            capture::begin(actor, effect)
        }
        VmEffect::Seal => unreachable!("the actor gives what is sealed away"),
        VmEffect::Thaw | VmEffect::OpenNetwork | VmEffect::StartApp | VmEffect::Shutdown => {
            let (Some(vm), Some(link)) = (actor.vm.clone(), actor.link.clone()) else {
                unreachable!("{effect:?} without a VM that was attached");
            };
            match effect {
                VmEffect::Thaw => thaw::begin(actor, link).boxed(),
                VmEffect::OpenNetwork => {
                    let hello = actor.hello.borrow();
                    let app = hello.as_ref().map(|hello| &hello.app);
                    let runs = app.is_some_and(|app| *app != AppStatus::Absent);
                    let work = match work_of(&record) {
                        Work::App if runs && !record.start.source.is_boot() => Work::Inherited,
                        work => work,
                    };
                    open_network(vm, work, limits).boxed()
                }
                VmEffect::StartApp => {
                    let masking = actor.masking.clone();
                    start_app(record, link, actor.secrets.subscribe(), masking, limits).boxed()
                }
                _ => shutdown(record, vm, link, limits).boxed(),
            }
        }
        VmEffect::Journal(_) | VmEffect::RemoveJournal | VmEffect::Report | VmEffect::Kill => {
            unreachable!("{effect:?} asks nothing")
        }
    }
}

async fn take_turn(host: Arc<Host>) -> Outcome {
    match Arc::clone(&host.turns).acquire_owned().await {
        Ok(permit) => Outcome {
            event: VmEvent::TurnTaken,
            gain: Gain::Turn(permit),
        },
        Err(_closed) => failed(
            VmFailureKind::Boot,
            "the node is ending: start the VM again once it is back".to_owned(),
        ),
    }
}

async fn prepare(host: Arc<Host>, record: Record) -> Outcome {
    let limit = host.config.limits.prepare;
    let work = host.hypervisor.prepare(record.start.vm, &record.machine);
    match tokio::time::timeout(limit, work).await {
        Ok(Ok(prepared)) => Outcome {
            event: VmEvent::Prepared,
            gain: Gain::Prepared(prepared),
        },
        Ok(Err(error)) => failed(VmFailureKind::Boot, chain(&error)),
        Err(_elapsed) => failed(VmFailureKind::Boot, slow("preparing the host", limit)),
    }
}

async fn boot(host: Arc<Host>, record: Record) -> Outcome {
    let Some(prepared) = &record.prepared else {
        unreachable!("a boot before anything was prepared");
    };
    let limit = host.config.limits.boot;
    let work = host
        .hypervisor
        .boot(record.start.vm, &record.machine, prepared);
    match tokio::time::timeout(limit, work).await {
        Ok(Ok(identity)) => Outcome {
            event: VmEvent::Booted,
            gain: Gain::Identity(identity),
        },
        Ok(Err(error @ BootError::Image { .. })) => failed(VmFailureKind::Image, chain(&error)),
        Ok(Err(error)) => failed(VmFailureKind::Boot, chain(&error)),
        Err(_elapsed) => failed(VmFailureKind::Boot, slow("starting the VMM", limit)),
    }
}

async fn fork(host: Arc<Host>, record: Record, keys: Keys) -> Outcome {
    let Some(prepared) = &record.prepared else {
        unreachable!("a fork before anything was prepared");
    };
    let shape = host.hypervisor.shape(&record.machine);
    let Some(wanted) = Wanted::of(&record.start, keys, shape) else {
        let message = "this node does not know what the VM is to begin from: update it".to_owned();
        return failed(VmFailureKind::Snapshot, message);
    };
    let start = &record.start;
    let limit = host.config.limits.boot + start.resources.copying();
    let work = async {
        let from = host.snapshots.source(wanted).await;
        let found = from.map_err(|error| failed(VmFailureKind::Snapshot, chain(&error)))?;
        let forked = host
            .hypervisor
            .fork(start.vm, &record.machine, prepared, &found.from);
        let forked = forked.await.map_err(|error| {
            let kind = match &error {
                ForkError::Start(BootError::Image { .. }) => VmFailureKind::Image,
                ForkError::Start(_) => VmFailureKind::Boot,
                _ => VmFailureKind::Snapshot,
            };
            failed(kind, chain(&error))
        });
        forked.map(|identity| Gain::Forked(identity, found.inherited))
    };
    match tokio::time::timeout(limit, work).await {
        Ok(Ok(gain)) => Outcome {
            event: VmEvent::Forked,
            gain,
        },
        Ok(Err(outcome)) => outcome,
        Err(_elapsed) => failed(VmFailureKind::Boot, slow("forking the VM", limit)),
    }
}

/// A snapshot that only this VM may begin from has served: what is in it lives on in the VM alone.
async fn drop_source(host: Arc<Host>, record: Record) -> Outcome {
    let start = &record.start;
    if let Source::Suspended(id) = start.source {
        let dropped = host
            .snapshots
            .drop_claimed(&start.owner.account, id, start.vm);
        if let Err(error) = dropped.await {
            // Its claim keeps everybody from it until it is collected.
            tracing::warn!(%id, error = %chain(&error), "what a VM went on from is left");
        }
    }
    VmEvent::SourceDropped.into()
}

async fn resume(vm: Option<Arc<dyn Vm>>, limits: VmLimits) -> Outcome {
    let Some(vm) = vm else {
        unreachable!("a VM that was not attached is resumed");
    };
    match tokio::time::timeout(limits.answer, vm.resume()).await {
        Ok(Ok(())) => VmEvent::Resumed.into(),
        Ok(Err(error)) => failed(VmFailureKind::Boot, chain(&error)),
        Err(_elapsed) => {
            let message = slow("letting the guest run", limits.answer);
            failed(VmFailureKind::Boot, message)
        }
    }
}

async fn attach(host: Arc<Host>, record: Record) -> Outcome {
    let (Some(prepared), Some(identity)) = (&record.prepared, &record.identity) else {
        return failed(
            VmFailureKind::Died,
            "the journal names no process: start another VM".to_owned(),
        );
    };
    let limit = host.config.limits.boot;
    let work = host.hypervisor.attach(record.start.vm, prepared, identity);
    match tokio::time::timeout(limit, work).await {
        Ok(Ok(vm)) => Outcome {
            event: VmEvent::Attached,
            gain: Gain::Vm(vm),
        },
        Ok(Err(error @ (AttachError::Gone(_) | AttachError::AnotherBoot))) => {
            failed(VmFailureKind::Died, chain(&error))
        }
        Ok(Err(error)) => failed(VmFailureKind::Boot, chain(&error)),
        Err(_elapsed) => failed(VmFailureKind::Boot, slow("reaching the VMM", limit)),
    }
}

async fn release(host: Arc<Host>, record: Record, tried: u32) -> Outcome {
    const LIMIT: Duration = Duration::from_secs(60);
    if tried > 0 {
        let pause = 2_u64.saturating_pow(tried.min(5)).min(30);
        tokio::time::sleep(Duration::from_secs(pause)).await;
    }
    let vm = record.start.vm;
    match tokio::time::timeout(LIMIT, host.hypervisor.release(vm)).await {
        Ok(Ok(())) => VmEvent::Released.into(),
        Ok(Err(error)) => {
            tracing::error!(%vm, error = %chain(&error), "something of a VM is left; tried again");
            VmEvent::ReleaseFailed.into()
        }
        Err(_elapsed) => {
            tracing::error!(%vm, "releasing a VM takes over {LIMIT:?}; tried again");
            VmEvent::ReleaseFailed.into()
        }
    }
}

async fn connect_agent(mut hello: watch::Receiver<Option<AgentHello>>, record: Record) -> Outcome {
    let vm = record.start.vm;
    // The link tells the actor when it gives up, so this wait needs no end of its own.
    let said = match hello.wait_for(Option::is_some).await {
        Ok(said) => said.clone(),
        Err(_gone) => None,
    };
    match said {
        Some(hello) => VmEvent::AgentUp(AgentSeen {
            // One that is held was renewed by a daemon that did not live to let it run; one that
            // says another's name is a fork of that one.
            thawed: hello.thawed && !hello.frozen && is_named(hello.incarnation.as_deref(), vm),
            frozen: hello.frozen && is_named(hello.incarnation.as_deref(), vm),
            work: work_of(&record),
            app: seen(&hello.app),
        })
        .into(),
        None => failed(VmFailureKind::Boot, "the VM is ending".to_owned()),
    }
}

const fn work_of(record: &Record) -> Work {
    match record.start.process {
        Some(_) => Work::App,
        None => Work::Nothing,
    }
}

/// Whether an agent speaks as this VM; one of generation 1 says no name, and is never a fork.
pub(super) fn is_named(incarnation: Option<&str>, vm: VmId) -> bool {
    incarnation.is_none_or(|name| name == vm.to_string())
}

pub(super) const fn seen(app: &AppStatus) -> AppSeen {
    match app {
        AppStatus::Absent => AppSeen::Absent,
        AppStatus::Starting { .. } | AppStatus::Backoff { .. } => AppSeen::Starting,
        AppStatus::Ready { .. } => AppSeen::Ready,
        AppStatus::Stopped => AppSeen::Stopped,
    }
}

async fn open_network(vm: Arc<dyn Vm>, work: Work, limits: VmLimits) -> Outcome {
    match tokio::time::timeout(limits.answer, vm.open_network()).await {
        Ok(Ok(())) => VmEvent::NetworkOpen(work).into(),
        Ok(Err(error)) => failed(VmFailureKind::Policy, chain(&error)),
        Err(_elapsed) => failed(
            VmFailureKind::Policy,
            slow("opening the network", limits.answer),
        ),
    }
}

/// What [`Work::App`] means.
fn process_of(record: &Record) -> &Process {
    let process = record.start.process.as_ref();
    process.unwrap_or_else(|| unreachable!("a VM without an app waits for one"))
}

/// The app's secrets, once they are known and can be masked: whoever knows them may print them.
pub(super) async fn secrets_of(
    record: &Record,
    mut told: watch::Receiver<Option<Arc<AppSecrets>>>,
    masking: &Masking,
    limits: &VmLimits,
) -> Result<Arc<AppSecrets>, Outcome> {
    let secrets = if record.secrets == SecretsKept::None {
        Arc::default()
    } else {
        let told = told.wait_for(Option::is_some);
        match tokio::time::timeout(limits.secrets, told).await {
            Ok(Ok(told)) => told.clone().unwrap_or_default(),
            _ => {
                return Err(failed(
                    VmFailureKind::Thaw,
                    "the node was restarted before the app started, and was not told the app's \
                     secrets again: start another VM"
                        .to_owned(),
                ));
            }
        }
    };
    match masking.made(Arc::clone(&secrets)).await {
        Ok(_masker) => Ok(secrets),
        Err(error) => Err(failed(VmFailureKind::Thaw, chain(&error))),
    }
}

async fn start_app(
    record: Record,
    link: AgentLink,
    told: watch::Receiver<Option<Arc<AppSecrets>>>,
    masking: Masking,
    limits: VmLimits,
) -> Outcome {
    // The thaw gave them; but one by a daemon before this one, which could mask what the app says.
    if let Err(outcome) = secrets_of(&record, told, &masking, &limits).await {
        return outcome;
    }
    let process = process_of(&record);
    let mut last = None;
    for _attempt in 0..3 {
        let start = start_of(&record, process);
        match link.start_app(start, limits.answer).await {
            Ok(()) => return VmEvent::AppStarted.into(),
            Err(error @ GuestError::Unreachable(_)) => {
                // The answer may have been lost, not the work.
                let status = link.status(limits.answer).await;
                if status.is_ok_and(|status| status.app != AppStatus::Absent) {
                    return VmEvent::AppStarted.into();
                }
                last = Some(error);
            }
            Err(error @ (GuestError::Refused { .. } | GuestError::TooLarge)) => {
                let message = format!("the app cannot be started: {error}");
                return failed(VmFailureKind::App, message);
            }
            Err(error) => return failed(VmFailureKind::Thaw, guest(&error)),
        }
    }
    failed(
        VmFailureKind::Thaw,
        last.map_or_else(String::new, |error| guest(&error)),
    )
}

/// The app's process as the agent is told: the one place that says what Spore promises an app to
/// find, which wins over what a release sets; the time zone is only a default. `HOME` and `PATH`
/// are the agent's, which knows the image and the user.
fn start_of(record: &Record, process: &Process) -> StartApp {
    let owner = &record.start.owner;
    let set = [
        ("PORT", process.port.to_string()),
        ("SPORE_APP", owner.app.clone()),
        ("SPORE_RELEASE", owner.release.to_string()),
    ];
    let mut environment: Vec<(String, String)> = process
        .environment
        .iter()
        .filter(|(name, _value)| set.iter().all(|(taken, _)| taken != name))
        .cloned()
        .collect();
    if environment.iter().all(|(taken, _)| taken != "TZ") {
        environment.push(("TZ".to_owned(), "UTC".to_owned()));
    }
    environment.extend(set.map(|(name, value)| (name.to_owned(), value)));
    if process.has_hooks {
        give_hooks(&mut environment);
    }
    let none = (record.secrets == SecretsKept::None).then(Vec::new);
    StartApp {
        command: process.command.clone(),
        directory: match record.start.folder {
            Some(_) => "/app".to_owned(),
            None => "/".to_owned(),
        },
        environment,
        secret_environment: none.clone(),
        secret_files: none,
        user: process.user.clone(),
        port: process.port,
        ready: process.ready.clone(),
        ready_timeout_ms: process.ready_timeout_ms,
    }
}

/// Where the agent shows the ready-made hooks of forks, and the variable by which an interpreter
/// finds its own, with what stands between it and the app's own value.
const HOOKS: [(&str, &str, &str); 2] = [
    ("PYTHONPATH", "/run/spore/lib", ":"),
    (
        "NODE_OPTIONS",
        "--require=/run/spore/lib/spore_after_fork.js",
        " ",
    ),
];

fn give_hooks(environment: &mut Vec<(String, String)>) {
    for (name, hook, between) in HOOKS {
        match environment.iter_mut().find(|(taken, _)| taken == name) {
            Some((_name, value)) => *value = format!("{hook}{between}{value}"),
            None => environment.push((name.to_owned(), hook.to_owned())),
        }
    }
}

async fn await_ready(
    mut app: watch::Receiver<AppView>,
    record: Record,
    limits: VmLimits,
) -> Outcome {
    let process = process_of(&record);
    let within = Duration::from_millis(process.ready_timeout_ms);
    let decided = async {
        loop {
            match verdict(&app.borrow_and_update(), &limits) {
                Verdict::Ready => return None,
                Verdict::Failed(message) => return Some(message),
                Verdict::Unknown => {}
            }
            if app.changed().await.is_err() {
                return Some("the VM is ending".to_owned());
            }
        }
    };
    let limit = within.saturating_add(limits.ready_slack);
    match tokio::time::timeout(limit, decided).await {
        Ok(None) => VmEvent::AppReady.into(),
        Ok(Some(message)) => {
            // Its last lines are on their way beside the news of its end.
            tokio::time::sleep(Duration::from_millis(300)).await;
            failed(VmFailureKind::App, message)
        }
        Err(_elapsed) => failed(
            VmFailureKind::App,
            format!(
                "the app was not ready on port {} within {within:?}: check that it listens there",
                process.port
            ),
        ),
    }
}

enum Verdict {
    Ready,
    Failed(String),
    Unknown,
}

fn verdict(view: &AppView, limits: &VmLimits) -> Verdict {
    match &view.status {
        AppStatus::Ready { .. } => Verdict::Ready,
        AppStatus::Backoff { failures, exit, .. } if *failures >= limits.app_start_failures_max => {
            Verdict::Failed(format!(
                "the app ended {failures} times before it was ready, last with {exit}: see its \
                 last lines"
            ))
        }
        AppStatus::Stopped => Verdict::Failed("the app was stopped from inside".to_owned()),
        _ => view.unready.as_ref().map_or(Verdict::Unknown, |reason| {
            Verdict::Failed(format!("the app was not ready in its time: {reason}"))
        }),
    }
}

async fn shutdown(record: Record, vm: Arc<dyn Vm>, link: AgentLink, limits: VmLimits) -> Outcome {
    let process = record.start.process.as_ref();
    let grace = process.map_or(STOP_GRACE_DEFAULT, |process| {
        Duration::from_millis(process.stop_grace_ms)
    });
    let limit = grace.saturating_add(limits.shutdown_slack);
    let asked = link.shutdown(grace, limit).await;
    if let Err(error) = asked {
        tracing::info!(vm = %record.start.vm, %error, "the guest was not asked to power off");
        return VmEvent::ShutDown.into();
    }
    // Whether it went or must be killed, the release comes next.
    drop(tokio::time::timeout(limits.shutdown_slack, vm.exited()).await);
    VmEvent::ShutDown.into()
}

/// A stop by control ends this wait early.
async fn farewell() -> Outcome {
    tokio::time::sleep(FAREWELL_MAX).await;
    VmEvent::FarewellOver.into()
}

/// Why a VM that was not asked to end is gone.
pub(super) fn exit_failure(exit: VmExit) -> Failure {
    let message = if exit.out_of_memory {
        format!(
            "the host's kernel killed the VM for exceeding its memory ({}): give it more",
            exit.reason
        )
    } else {
        format!("the VM ended by itself: {}", exit.reason)
    };
    Failure {
        kind: VmFailureKind::Died,
        message,
    }
}

pub(super) fn guest(error: &GuestError) -> String {
    format!("the guest could not be made ready: {}", chain(error))
}

pub(super) fn slow(what: &str, limit: Duration) -> String {
    format!("{what} took over {limit:?}: the host may be overloaded")
}
