//! `spore server`: the daemon, from its first look at the host to its last.
//!
//! ```text
//!   folders → lock → token, keys → store → node (adopts VMs) → control → API, gateway's link
//!                                                                   │ SIGTERM
//!   listeners closed ◀── control stopped ◀── node detached ◀────────┘   VMs and gateway go on
//! ```

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{Uid, User};
use spore_api::name::{AccountName, ImageName};
use spore_control::api::{Caller, CallerBy};
use spore_control::clock::{HostClock, KernelChance};
use spore_control::config::{Config as ControlConfig, Timing};
use spore_control::secrets::KeyFile;
use spore_control::store::embedded::EmbeddedStore;
use spore_control::{Control, Parts as ControlParts};
use spore_node::confine::limits::no_core_file;
use tokio::net::{TcpStream, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use zeroize::Zeroizing;

use super::host::Host;
use super::lock::DaemonLock;
use super::parts::{self, Parts};
use super::{door, listen, token, up};
use crate::config::ServerConfig;
use crate::log;

/// The most requests that wait for one wake.
const WAITERS_MAX: u32 = 1_000;

/// What a start may take beside the guest's boot: disks, namespace, the VMM itself.
const BOOT_SLACK: Duration = Duration::from_secs(30);

/// How long the end of the daemon may take before it ends anyway.
const STOP_PATIENCE: Duration = Duration::from_secs(10);

/// What the command line says beyond the configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ServerOptions {
    /// A user besides root who may use the API's socket.
    pub(crate) admit_uid: Option<u32>,
    /// The socket of systemd, which waits for the daemon to be ready (sd_notify(3)).
    pub(crate) supervisor: Option<PathBuf>,
}

/// Runs the daemon until it is told to end.
///
/// # Errors
/// When it cannot start; the message says what is missing and what to do.
pub(crate) fn serve(config: &ServerConfig, options: &ServerOptions) -> Result<()> {
    let file = log::LogFile::of_stderr(&up::daemon_log(config), config.log.format);
    log::to_stderr(&config.log, file);
    harden()?;
    parts::folders(config)?;
    let program = up::trusted_program()?;
    let lock = DaemonLock::take(&config.runtime_dir)?;
    let token = token::ensure(&config.config_dir.join("token"))?;
    if let Some(uid) = options.admit_uid {
        give_token(&token, uid, &program);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("start the daemon's runtime")?;
    let served = runtime.block_on(run(config, options, token, program));
    runtime.shutdown_timeout(STOP_PATIENCE);
    drop(lock);
    served
}

/// What the daemon must be before it holds a token, a key or a secret.
pub(crate) fn harden() -> Result<()> {
    // VMs' namespaces are held by mounts: in a mount namespace of its own the daemon would lose
    // them to its successor.
    let own = std::fs::read_link("/proc/self/ns/mnt").context("look at the mount namespace")?;
    match std::fs::read_link("/proc/1/ns/mnt") {
        Ok(first) => ensure!(
            own == first,
            "the daemon runs in a mount namespace of its own, so its successor could not reach \
             the VMs: start it without unshare, and its systemd unit without Protect*, Private*"
        ),
        // A container may hide its first process; whoever made it decides about its mounts.
        Err(error) => tracing::debug!(%error, "the first process cannot be compared with"),
    }
    // No core file may hold a key.
    no_core_file()?;
    let (_soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("read limits")?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("raise the limit of open files")
}

fn give_token(token: &Zeroizing<String>, uid: u32, program: &Path) {
    let user = User::from_uid(Uid::from_raw(uid)).ok().flatten();
    let Some(user) = user else {
        tracing::warn!(uid, "no such user; nobody but root gets the token");
        return;
    };
    match token::give(token, &user, program) {
        Ok(()) => tracing::info!(user = user.name, "the user has a copy of the token"),
        Err(error) => tracing::warn!(
            user = user.name,
            error = %format!("{error:#}"),
            "the user gets no copy of the token; the socket admits them all the same"
        ),
    }
}

/// Tells systemd how the daemon is; a start that it is not told of times out.
fn tell_supervisor(socket: Option<&Path>, state: &str) {
    let Some(socket) = socket else {
        return;
    };
    let told = UnixDatagram::unbound().and_then(|from| from.send_to(state.as_bytes(), socket));
    if let Err(error) = told {
        tracing::warn!(%error, socket = %socket.display(), state, "systemd cannot be told");
    }
}

async fn run(
    config: &ServerConfig,
    options: &ServerOptions,
    token: Zeroizing<String>,
    program: PathBuf,
) -> Result<()> {
    let stop = CancellationToken::new();
    // Asked for first: a signal during a long start ends it cleanly too.
    let mut terminate = signal(SignalKind::terminate()).context("watch SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("watch SIGINT")?;
    let tcp = listen::bind_tcp(config.api, "api").await?;
    let parts = parts::open(config, program).await?;
    let adopted = parts.adoption.adopted.len();
    for (vm, reason) in &parts.adoption.released {
        tracing::warn!(%vm, reason, "a VM of an earlier daemon was removed");
    }
    for what in &parts.adoption.swept.removed {
        tracing::warn!(what, "a leftover of an earlier daemon was removed");
    }
    tracing::info!(adopted, "the node is open");
    let (door, link) = door::link(parts::gateway(config, &parts.program));
    let control = start_control(config, &parts, token, door).await?;
    let unix = listen::bind_unix(&config.runtime_dir.join("api.sock"))?;
    let tasks = TaskTracker::new();
    tasks.spawn(link.run(Arc::clone(&control), parts.node.clone(), stop.clone()));
    let by_token = |_stream: &TcpStream| Some(ByToken);
    tasks.spawn(listen::serve(
        tcp,
        listen::Limits::default(),
        control.router(),
        by_token,
        stop.clone(),
    ));
    let admitted = options.admit_uid;
    let by_uid = move |stream: &UnixStream| caller(stream, admitted);
    tasks.spawn(listen::serve(
        unix,
        listen::Limits::default(),
        control.router(),
        by_uid,
        stop.clone(),
    ));
    tracing::info!(api = %config.api, gateway = %config.gateway, "Spore is up");
    tell_supervisor(options.supervisor.as_deref(), "READY=1");
    tokio::select! {
        _term = terminate.recv() => {}
        _int = interrupt.recv() => {}
    }
    tracing::info!("the daemon ends; VMs and the gateway go on");
    tell_supervisor(options.supervisor.as_deref(), "STOPPING=1");
    stop.cancel();
    tasks.close();
    if tokio::time::timeout(STOP_PATIENCE, tasks.wait())
        .await
        .is_err()
    {
        tracing::warn!("API calls were cut");
    }
    parts.node.detach().await;
    // Whoever still has it is a call that was cut, and goes with the runtime.
    if let Some(control) = Arc::into_inner(control)
        && tokio::time::timeout(STOP_PATIENCE, control.stop())
            .await
            .is_err()
    {
        tracing::warn!("control did not end in its time");
    }
    Ok(())
}

/// Marks a connection whose caller is known by its token only.
#[derive(Clone, Copy, Debug)]
struct ByToken;

/// Who is at the other end of the unix socket, as the kernel says; `None` is nobody we know.
fn caller(stream: &UnixStream, admitted: Option<u32>) -> Option<Caller> {
    let credentials = stream.peer_cred().ok()?;
    let uid = credentials.uid();
    if uid == 0 || Some(uid) == admitted {
        let account = AccountName::default_account();
        return Some(Caller {
            account,
            by: CallerBy::Socket { uid },
        });
    }
    tracing::info!(uid, "a user who is not admitted called the API's socket");
    None
}

async fn start_control(
    config: &ServerConfig,
    parts: &Parts,
    token: Zeroizing<String>,
    door: Arc<door::DoorQueue>,
) -> Result<Arc<Control>> {
    let store = EmbeddedStore::open(&config.data_dir.join("store.redb")).await?;
    let store = Arc::new(store);
    let keys = KeyFile::open_or_make(&config.config_dir.join("secrets.key"), &*store).await?;
    let host = Host {
        node: parts.node.clone(),
        images: parts.images.clone(),
        workshop: parts.workshop.clone(),
    };
    let control = Control::start(
        control_config(config, token),
        ControlParts {
            store,
            nodes: Arc::new(host),
            door,
            keys: Arc::new(keys),
            clock: Arc::new(HostClock),
            chance: Arc::new(KernelChance),
        },
    )
    .await?;
    seed_images(config, parts, &control).await?;
    Ok(Arc::new(control))
}

fn control_config(config: &ServerConfig, token: Zeroizing<String>) -> ControlConfig {
    ControlConfig {
        base: config.base.clone(),
        gateway: config.gateway,
        public: ("http", config.gateway.port()),
        api_port: config.api.port(),
        api_hosts: Vec::new(),
        token,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        warnings: vec![
            "QEMU's software emulation is confined like a process but is not a security boundary"
                .to_owned(),
        ],
        timing: Timing {
            boot_allowance: config.boot_timeout + BOOT_SLACK,
            ..Timing::default()
        },
        image_bytes_max: config.image_quota_mib * 1024 * 1024,
        waiters_max: WAITERS_MAX,
    }
}

/// Gives control the base images that came with the installation, under the names they were built
/// with, where they are newer than what has the name.
async fn seed_images(config: &ServerConfig, parts: &Parts, control: &Control) -> Result<()> {
    // Names are control's; those that an earlier version kept here would keep old images for ever.
    for (name, _) in parts.images.names().context("the image store")? {
        parts.images.forget_name(&name).context("the image store")?;
    }
    for (name, info) in parts::installed_images(&config.base_images)? {
        let Ok(name) = name.parse::<ImageName>() else {
            tracing::warn!(name, "an installed image's name is none; it is left alone");
            continue;
        };
        if control.wants_base(&name, &info).await? {
            parts::copy_installed(&parts.images, &config.base_images, &info)?;
            let named = control.ensure_image(&name, &info).await;
            named.context("name the base images")?;
        }
    }
    Ok(())
}
