//! A VM whose VMM runs, held by its actor.
//!
//! Made by a driver's `attach`. One task per VM watches process and monitor; it alone speaks to the
//! VMM:
//!
//! ```text
//!   Watching ──guest's end──▶ reads the console, lets the VMM go ──▶ Watching
//!       │ ├────asked to read the console, pause, capture, resume ──▶ does it ──▶ Watching
//!       │ └────egress proxy gone──▶ says that the VM is unsound ──▶ Watching
//!       └──process gone──▶ Over (exit published)
//! ```
//!
//! When the last holder lets go the task ends and its connection closes, so that the next daemon
//! or `attach` can connect; the VM goes on. Never restarts anything.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::sync::{Arc, Weak};
use std::time::Duration;

use async_trait::async_trait;
use rustix::io::Errno;
use rustix::process::{WaitId, WaitIdOptions, waitid};
use spore_wire::id::VmId;
use tokio::io::unix::AsyncFd;
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{Mutex, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::capture::Ready;
use super::tail::{Tail, log_tail};
use super::{AGENT_SOCKET, Ends, Handed, LENT_NOTE, Monitor, pages};
use crate::cgroup::kill_process;
use crate::disk::Disks;
use crate::disk::overlay::DiskKey;
use crate::egress::launch::EgressLauncher;
use crate::hypervisor::fork::{Afterwards, Below, Capture, CaptureError, PauseError, Turn};
use crate::hypervisor::memory_image::MemoryImage;
use crate::hypervisor::proxy::EgressProxy;
use crate::hypervisor::room::Rooms;
use crate::hypervisor::{
    AgentStream, AttachError, Machine, PolicyError, Prepared, Vm, VmExit, VmStats,
};
use crate::net::policy::Policy;
use crate::sys;

/// How long a VMM whose guest has ended, or whose monitor hung up, is given to end.
pub(in crate::hypervisor) const ENDING: Duration = Duration::from_secs(5);

/// What a VM needs of its driver.
#[derive(Debug)]
pub(in crate::hypervisor) struct VmHost {
    pub(in crate::hypervisor) rooms: Arc<Rooms>,
    pub(in crate::hypervisor) egress: EgressLauncher,
    pub(in crate::hypervisor) how: How,
    /// Where VMMs are another process's children.
    pub(in crate::hypervisor) ends: Option<Arc<dyn Ends>>,
    /// The memory whose first fork it is, to learn from it what forks write to.
    pub(in crate::hypervisor) teaches: Option<Weak<MemoryImage>>,
}

/// In what a driver's VMMs differ, seen from outside.
#[derive(Clone, Copy, Debug)]
pub(in crate::hypervisor) struct How {
    /// Opens the file of the guest's memory, of so many bytes, in the VMM of a pid.
    pub(in crate::hypervisor) open_memory: fn(u32, u64) -> io::Result<File>,
    /// Makes an empty layer of so many MiB, with a key or without.
    pub(in crate::hypervisor) new_layer: fn(&Disks, u32, Option<&DiskKey>) -> io::Result<File>,
    /// From how many bytes on a fork's own pages are read from a frozen copy of its VMM, and not in
    /// the pause. `None`: it makes none.
    pub(in crate::hypervisor) freeze_from: Option<u64>,
}

/// The process of a VMM, checked to be the one that the node has started.
#[derive(Debug)]
pub(in crate::hypervisor) struct Process {
    pub(in crate::hypervisor) pid: u32,
    pub(in crate::hypervisor) pidfd: OwnedFd,
}

/// A VM.
#[derive(Debug)]
pub(in crate::hypervisor) struct MonitoredVm {
    pub(super) rooms: Arc<Rooms>,
    pub(super) vm: VmId,
    pub(super) pid: u32,
    pub(super) uid: u32,
    pub(super) how: How,
    namespace: String,
    policy: Policy,
    pidfd: Arc<AsyncFd<OwnedFd>>,
    exit: watch::Receiver<Option<VmExit>>,
    unsound: watch::Receiver<Option<String>>,
    pub(super) orders: mpsc::Sender<Order>,
    /// Where it has grants.
    proxy: Option<Arc<EgressProxy>>,
    watcher: JoinHandle<()>,
    /// The next capture, where it was prepared for.
    pub(super) ready: Mutex<Option<Ready>>,
    /// Held from a capture's preparation to its end.
    pub(super) turn: Arc<Mutex<()>>,
    /// Held while its disk is copied.
    pub(super) copying: Arc<Mutex<()>>,
    /// Held while there is a frozen copy of its VMM.
    pub(super) freezing: Arc<Mutex<()>>,
    teaches: Option<Weak<MemoryImage>>,
}

/// What the task of a VM is asked.
#[derive(Debug)]
pub(super) enum Order {
    /// The console's last lines.
    Console(oneshot::Sender<Vec<String>>),
    /// To miss this process, its egress proxy, when it ends.
    Miss(OwnedFd),
    /// To let the guest stand still.
    Pause(oneshot::Sender<io::Result<()>>),
    /// To let it run.
    Resume(oneshot::Sender<io::Result<()>>),
    /// To get ready for a capture; what the copy of its disk will be over.
    Prepare(Handed, oneshot::Sender<io::Result<(Below, u64)>>),
    /// To write what its devices are, and to begin the copy of its disk.
    Capture(oneshot::Sender<Result<(), CaptureError>>),
    /// To make a copy of the VMM that stands still, by this socket and so long at most.
    Freeze(OwnedFd, Duration, oneshot::Sender<io::Result<()>>),
    /// Not to hold the copy back any more.
    Hasten,
    /// Whether the copy is whole; it is let go of then.
    Copied(oneshot::Sender<io::Result<bool>>),
    /// To let go of what a capture was prepared with.
    Forget,
}

impl MonitoredVm {
    /// Connects to the monitor and starts watching.
    pub(in crate::hypervisor) async fn attach<M: Monitor>(
        host: VmHost,
        vm: VmId,
        prepared: &Prepared,
        process: Process,
        connect: impl Future<Output = io::Result<M>> + Send,
    ) -> Result<Self, AttachError> {
        let silent = |what| move |source| AttachError::Silent { what, source };
        take_memory_back(&host.rooms, vm);
        let VmHost {
            rooms,
            egress,
            how,
            ends,
            teaches,
        } = host;
        let machine = rooms.machine(vm).map_err(silent("record"))?;
        let proxy = proxy_of(egress, &rooms, vm, prepared, &machine);
        let kept = match &proxy {
            Some(proxy) => proxy.kept().await,
            None => Ok(None),
        }
        .map_err(|error| silent("egress proxy")(io::Error::other(error)))?;
        let kept = kept.map(watched).transpose();
        let Process { pid, pidfd } = process;
        let pidfd = Arc::new(sys::watch(pidfd).map_err(silent("pidfd"))?);
        let log = open_log(pid).map_err(|_gone| AttachError::Gone(pid))?;
        let monitor = tokio::select! {
            biased;
            _readable = pidfd.readable() => return Err(AttachError::Gone(pid)),
            monitor = connect => monitor,
        };
        let (publish, exit) = watch::channel(None);
        let (cause, unsound) = watch::channel(None);
        let (orders, asked) = mpsc::channel(4);
        let watcher = Watcher {
            rooms: Arc::clone(&rooms),
            vm,
            pid,
            ends,
            pidfd: Arc::clone(&pidfd),
            monitor: monitor.map_err(silent("monitor"))?,
            log,
            tail: Tail::default(),
            proxy: kept.map_err(silent("egress proxy"))?,
            cause,
            asked,
        };
        Ok(Self {
            watcher: tokio::spawn(watcher.run(publish)),
            policy: policy_of(&machine),
            namespace: prepared.namespace.clone(),
            rooms,
            vm,
            pid,
            uid: prepared.uid,
            how,
            pidfd,
            exit,
            unsound,
            orders,
            proxy: proxy.map(Arc::new),
            ready: Mutex::default(),
            turn: Arc::default(),
            copying: Arc::default(),
            freezing: Arc::default(),
            teaches,
        })
    }
}

/// The egress proxy of a VM with grants.
fn proxy_of(
    launcher: EgressLauncher,
    rooms: &Arc<Rooms>,
    vm: VmId,
    prepared: &Prepared,
    machine: &Machine,
) -> Option<EgressProxy> {
    Some(EgressProxy {
        launcher,
        rooms: Arc::clone(rooms),
        vm,
        namespace: prepared.namespace.clone(),
        uid: prepared.egress_uid?,
        vmm_uid: prepared.uid,
        grants: machine.egress.clone(),
    })
}

/// An earlier daemon ended while it read a frozen copy, which is gone with it.
fn take_memory_back(rooms: &Rooms, vm: VmId) {
    let note = rooms.folder(vm).join(LENT_NOTE);
    if let Err(error) = rooms.cgroups().take_memory_back(&vm.to_string(), &note) {
        tracing::warn!(%vm, %error, "a VM keeps memory that it had for a while");
    }
}

impl Drop for MonitoredVm {
    fn drop(&mut self) {
        self.watcher.abort();
    }
}

impl MonitoredVm {
    /// Has the memory that it began from know what it has written to since: its agent has renewed
    /// it, and no program of its owner's has run. Later forks have those pages before they run.
    async fn teach(&self) {
        let image = self.teaches.as_ref().and_then(Weak::upgrade);
        let Some(image) = image.filter(|image| image.ahead().is_none()) else {
            return;
        };
        let (pid, bytes) = (self.pid, image.bytes());
        let own = tokio::task::spawn_blocking(move || pages::own(pid, bytes)).await;
        match own.map_err(io::Error::other).flatten() {
            Ok(runs) => image.note_ahead(runs),
            Err(error) => tracing::warn!(vm = %self.vm, %error, "what forks write to is not known"),
        }
    }
}

#[async_trait]
impl Vm for MonitoredVm {
    async fn agent(&self) -> io::Result<Box<dyn AgentStream>> {
        let socket = self.rooms.folder(self.vm).join(AGENT_SOCKET);
        Ok(Box::new(UnixStream::connect(socket).await?))
    }

    async fn connect(&self, port: u16) -> io::Result<TcpStream> {
        self.rooms.namespaces().connect(&self.namespace, port).await
    }

    async fn open_network(&self) -> Result<(), PolicyError> {
        self.teach().await;
        if let Some(proxy) = &self.proxy {
            let pidfd = proxy.ensure().await?;
            // A task that is over has published the VM's end.
            drop(self.orders.send(Order::Miss(pidfd)).await);
        }
        self.rooms
            .namespaces()
            .open_policy(&self.namespace, self.policy)
            .await
    }

    async fn pause(&self) -> Result<(), PauseError> {
        self.run_state("pause", Order::Pause).await
    }

    async fn resume(&self) -> Result<(), PauseError> {
        self.run_state("resume", Order::Resume).await
    }

    async fn prepare_capture(
        &self,
        key: Option<DiskKey>,
        below: Option<Below>,
    ) -> Result<Turn, CaptureError> {
        self.make_ready(key, below).await
    }

    async fn capture(&self, afterwards: Afterwards) -> Result<Capture, CaptureError> {
        self.take(afterwards).await
    }

    async fn stats(&self) -> io::Result<VmStats> {
        self.rooms.cgroups().stats(&self.vm.to_string())
    }

    async fn console_tail(&self) -> Vec<String> {
        let (answer, answered) = oneshot::channel();
        if self.orders.send(Order::Console(answer)).await.is_err() {
            return Vec::new();
        }
        answered.await.unwrap_or_default()
    }

    fn kill(&self) {
        if let Err(error) = kill_process(self.pidfd.get_ref()) {
            tracing::error!(vm = %self.vm, %error, "cannot kill the VMM");
        }
    }

    async fn exited(&self) -> VmExit {
        let mut exit = self.exit.clone();
        match exit.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(exit)) => exit.clone(),
            Ok(None) | Err(_) => VmExit {
                reason: "the task that watched the VMM ended".to_owned(),
                out_of_memory: false,
            },
        }
    }

    async fn unsound(&self) -> String {
        let mut unsound = self.unsound.clone();
        let said = unsound.wait_for(Option::is_some).await;
        match said.ok().and_then(|cause| cause.clone()) {
            Some(cause) => cause,
            // The task that watches ends with the VMM, which is told otherwise.
            None => core::future::pending().await,
        }
    }
}

/// The task of one VM.
#[derive(Debug)]
struct Watcher<M> {
    rooms: Arc<Rooms>,
    vm: VmId,
    pid: u32,
    ends: Option<Arc<dyn Ends>>,
    pidfd: Arc<AsyncFd<OwnedFd>>,
    monitor: M,
    log: OwnedFd,
    /// What the console said last.
    tail: Tail,
    /// The egress proxy, once it serves.
    proxy: Option<Arc<AsyncFd<OwnedFd>>>,
    /// Why the VM must not go on.
    cause: watch::Sender<Option<String>>,
    asked: mpsc::Receiver<Order>,
}

impl<M: Monitor> Watcher<M> {
    async fn run(mut self, publish: watch::Sender<Option<VmExit>>) {
        // The guest may have ended while nobody was connected.
        if self.monitor.is_over().await {
            self.quit().await;
        }
        if let Err(error) = self.monitor.end_old_copy().await {
            tracing::warn!(vm = %self.vm, %error, "a copy of a disk is left");
        }
        loop {
            let pidfd = Arc::clone(&self.pidfd);
            tokio::select! {
                biased;
                _readable = pidfd.readable() => break,
                () = self.monitor.guest_ended() => self.quit().await,
                () = ended(self.proxy.clone()) => self.miss_proxy(),
                Some(order) = self.asked.recv() => self.obey(order).await,
            }
        }
        let exit = self.exit().await;
        publish.send_replace(Some(exit));
    }

    async fn obey(&mut self, order: Order) {
        match order {
            Order::Console(answer) => {
                self.read_console().await;
                // Whoever asked may have given up.
                drop(answer.send(self.tail.lines.clone()));
            }
            Order::Miss(proxy) => match watched(proxy) {
                Ok(proxy) => self.proxy = Some(proxy),
                Err(error) => self.give_up(format!("its egress proxy cannot be watched: {error}")),
            },
            // Whoever asked may have given up.
            Order::Pause(answer) => drop(answer.send(self.monitor.pause().await)),
            Order::Resume(answer) => {
                drop(answer.send(self.monitor.resume().await));
                self.monitor.hasten().await;
            }
            Order::Prepare(handed, answer) => drop(answer.send(self.monitor.prepare(handed).await)),
            Order::Capture(answer) => drop(answer.send(self.monitor.capture().await)),
            Order::Freeze(socket, limit, answer) => {
                drop(answer.send(self.monitor.freeze(socket, limit).await));
            }
            Order::Hasten => self.monitor.hasten().await,
            Order::Copied(answer) => drop(answer.send(self.monitor.is_copied().await)),
            Order::Forget => {
                // The next capture tries again.
                if let Err(error) = self.monitor.forget().await {
                    tracing::warn!(vm = %self.vm, %error, "a copy of a disk is left");
                }
            }
        }
    }

    fn miss_proxy(&mut self) {
        if let Some(proxy) = self.proxy.take() {
            self.give_up(how_it_ended("its egress proxy", &proxy));
        }
    }

    fn give_up(&self, cause: String) {
        tracing::warn!(vm = %self.vm, cause, "the VM must not go on");
        self.cause.send_replace(Some(cause));
    }

    /// The guest has ended: keeps what it last said and lets the VMM go.
    async fn quit(&mut self) {
        self.read_console().await;
        let asked = self.monitor.quit().await;
        // It answers and ends, or ends before its answer is read, or does not listen.
        let ended = timeout(ENDING, self.pidfd.readable()).await.is_ok();
        if !ended && let Err(failed) = kill_process(self.pidfd.get_ref()) {
            tracing::error!(vm = %self.vm, ?asked, %failed, "cannot end the VMM");
        }
    }

    async fn read_console(&mut self) {
        match self.monitor.console().await {
            Ok(said) => self.tail.take(&said),
            Err(error) => tracing::warn!(vm = %self.vm, %error, "cannot read the console"),
        }
    }

    async fn exit(&mut self) -> VmExit {
        let name = self.vm.to_string();
        let out_of_memory = self
            .rooms
            .cgroups()
            .was_out_of_memory(&name)
            .unwrap_or(false);
        let told = match &self.ends {
            Some(ends) => ends.how(self.pid).await,
            None => None,
        };
        let mut reason = match told {
            Some(how) => format!("the VMM {how}"),
            None => how_it_ended("the VMM", &self.pidfd),
        };
        if let Some(cause) = &*self.cause.borrow() {
            reason = format!("{cause}; {reason}");
        }
        for (what, text) in [
            ("VMM", log_tail(&self.log)),
            ("console", self.tail.lines.join("\n")),
        ] {
            if !text.is_empty() {
                reason.push_str(&format!("\n{what}: {text}"));
            }
        }
        VmExit {
            reason,
            out_of_memory,
        }
    }
}

const fn policy_of(machine: &Machine) -> Policy {
    match machine.egress.is_empty() {
        true => Policy::Open,
        false => Policy::OpenWithEgress,
    }
}

fn watched(pidfd: OwnedFd) -> io::Result<Arc<AsyncFd<OwnedFd>>> {
    sys::watch(pidfd).map(Arc::new)
}

/// Resolves when the process is gone; never where there is none.
async fn ended(process: Option<Arc<AsyncFd<OwnedFd>>>) {
    match process {
        // Not to be watched any more is as bad as gone.
        Some(pidfd) => drop(pidfd.readable().await),
        None => std::future::pending().await,
    }
}

/// Reaps the process where it is a child of this daemon; init reaps it where it is not.
fn how_it_ended(what: &str, pidfd: &AsyncFd<OwnedFd>) -> String {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    match waitid(WaitId::PidFd(pidfd.get_ref().as_fd()), options) {
        Ok(Some(status)) => match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => format!("{what} ended with code {code}"),
            (None, Some(signal)) => format!("{what} was ended by signal {signal}"),
            (None, None) => format!("{what} ended"),
        },
        Ok(None) | Err(Errno::CHILD) => format!("{what} ended"),
        Err(error) => format!("{what} ended, how is not known: {error}"),
    }
}

/// The VMM's own output, opened again through the VMM.
pub(in crate::hypervisor) fn open_log(pid: u32) -> io::Result<OwnedFd> {
    Ok(File::open(format!(
        "/proc/{pid}/fd/{}",
        rustix::stdio::stderr().as_raw_fd()
    ))?
    .into())
}
