//! A QEMU that runs, held by its actor.
//!
//! Made by the driver's `attach`. One task per VM watches process and monitor; it alone speaks QMP:
//!
//! ```text
//!   Watching ──SHUTDOWN (guest's end)──▶ reads the console, `quit` ──▶ Watching
//!       │ ├────asked to read the console, pause, capture, resume ──▶ does it ──▶ Watching
//!       │ └────egress proxy gone──▶ says that the VM is unsound ──▶ Watching
//!       └──process gone──▶ Over (exit published)
//! ```
//!
//! A command that QEMU does not answer in time leaves a connection on which answers would be taken
//! for those of other commands, so it is closed and the next command has a new one.
//!
//! When the last holder lets go the task ends and its connection closes, so that the next daemon
//! or `attach` can connect; the VM goes on. Never restarts anything.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use rustix::io::{Errno, pread};
use rustix::process::{WaitId, WaitIdOptions, waitid};
use serde_json::{Value, json};
use spore_wire::id::VmId;
use tokio::io::unix::AsyncFd;
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{Mutex, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use zeroize::Zeroizing;

use super::arguments::{CONSOLE, CONSOLE_BYTES};
use super::capture::{Ready, step};
use super::copy;
use super::in_memory::LOG_BYTES;
use super::qmp::Qmp;
use super::{AGENT_SOCKET, ENDING, QMP_SOCKET, SAVE, open_log};
use crate::cgroup::kill_process;
use crate::disk::overlay::DiskKey;
use crate::egress::launch::EgressLauncher;
use crate::hypervisor::fork::{Afterwards, Below, Capture, CaptureError, PauseError, Turn};
use crate::hypervisor::proxy::EgressProxy;
use crate::hypervisor::room::Rooms;
use crate::hypervisor::{AgentStream, AttachError, PolicyError, Prepared, Vm, VmExit, VmStats};
use crate::net::policy::Policy;
use crate::sys;

/// How long the monitor of a VM that runs may take to greet. Another client that is just gone
/// makes it wait a little.
const GREETING_TIMEOUT: Duration = Duration::from_secs(10);

/// How much of the console and of QEMU's own output a reason holds: a kernel's panic fits in.
const TAIL_LINES: usize = 40;

/// The characters that are kept of one of them: this text travels through messages and logs.
const TAIL_LINE_CHARS: usize = 160;

/// What a VM needs of its driver.
#[derive(Debug)]
pub(super) struct VmHost {
    pub(super) rooms: Arc<Rooms>,
    pub(super) egress: EgressLauncher,
}

/// A VM.
#[derive(Debug)]
pub(super) struct QemuVm {
    pub(super) rooms: Arc<Rooms>,
    pub(super) vm: VmId,
    pub(super) pid: u32,
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
    /// Not to hold the copy back any more.
    Hasten,
    /// Whether the copy is whole; it is let go of then.
    Copied(oneshot::Sender<io::Result<bool>>),
    /// To let go of what a capture was prepared with.
    Forget,
}

/// The files of a capture.
#[derive(Debug)]
pub(super) struct Handed {
    /// For what its devices are.
    pub(super) state: File,
    /// For the copy of its scratch disk, where it has one.
    pub(super) scratch: Option<File>,
    /// What that file is locked with.
    pub(super) key: Option<Zeroizing<String>>,
    /// What that copy is over, where that is not the VMM's to say.
    pub(super) below: Option<Below>,
}

impl QemuVm {
    /// Connects to the monitor and starts watching.
    pub(super) async fn attach(
        host: VmHost,
        vm: VmId,
        prepared: &Prepared,
        pid: u32,
        pidfd: OwnedFd,
    ) -> Result<Self, AttachError> {
        let silent = |what| move |source| AttachError::Silent { what, source };
        let VmHost { rooms, egress } = host;
        let machine = rooms.machine(vm).map_err(silent("record"))?;
        let proxy = prepared.egress_uid.map(|uid| EgressProxy {
            launcher: egress,
            rooms: Arc::clone(&rooms),
            vm,
            namespace: prepared.namespace.clone(),
            uid,
            vmm_uid: prepared.uid,
            grants: machine.egress.clone(),
        });
        let kept = match &proxy {
            Some(proxy) => proxy.kept().await,
            None => Ok(None),
        };
        let kept = kept.map_err(|error| silent("egress proxy")(io::Error::other(error)))?;
        let kept = kept.map(watched).transpose();
        let pidfd = Arc::new(sys::watch(pidfd).map_err(silent("pidfd"))?);
        let log = open_log(pid).map_err(|_gone| AttachError::Gone(pid))?;
        let socket = rooms.folder(vm).join(QMP_SOCKET);
        let monitor = tokio::select! {
            biased;
            _readable = pidfd.readable() => return Err(AttachError::Gone(pid)),
            monitor = Qmp::connect(&socket, GREETING_TIMEOUT) => monitor,
        };
        let (publish, exit) = watch::channel(None);
        let (cause, unsound) = watch::channel(None);
        let (orders, asked) = mpsc::channel(4);
        let watcher = Watcher {
            rooms: Arc::clone(&rooms),
            vm,
            pidfd: Arc::clone(&pidfd),
            monitor: Some(monitor.map_err(silent("monitor"))?),
            log,
            tail: Tail::default(),
            proxy: kept.map_err(silent("egress proxy"))?,
            cause,
            asked,
            stands: None,
            handed: None,
            copy: Copy::MayBeThere,
        };
        Ok(Self {
            watcher: tokio::spawn(watcher.run(publish)),
            policy: if machine.egress.is_empty() {
                Policy::Open
            } else {
                Policy::OpenWithEgress
            },
            namespace: prepared.namespace.clone(),
            rooms,
            vm,
            pid,
            pidfd,
            exit,
            unsound,
            orders,
            proxy: proxy.map(Arc::new),
            ready: Mutex::default(),
            turn: Arc::default(),
            copying: Arc::default(),
        })
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.rooms.folder(self.vm).join(name)
    }
}

impl Drop for QemuVm {
    fn drop(&mut self) {
        self.watcher.abort();
    }
}

#[async_trait]
impl Vm for QemuVm {
    async fn agent(&self) -> io::Result<Box<dyn AgentStream>> {
        Ok(Box::new(
            UnixStream::connect(self.socket(AGENT_SOCKET)).await?,
        ))
    }

    async fn connect(&self, port: u16) -> io::Result<TcpStream> {
        self.rooms.namespaces().connect(&self.namespace, port).await
    }

    async fn open_network(&self) -> Result<(), PolicyError> {
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
struct Watcher {
    rooms: Arc<Rooms>,
    vm: VmId,
    pidfd: Arc<AsyncFd<OwnedFd>>,
    /// `None` once it hung up.
    monitor: Option<Qmp>,
    log: OwnedFd,
    /// What the console said last.
    tail: Tail,
    /// The egress proxy, once it serves.
    proxy: Option<Arc<AsyncFd<OwnedFd>>>,
    /// Why the VM must not go on.
    cause: watch::Sender<Option<String>>,
    asked: mpsc::Receiver<Order>,
    /// Whether the guest was told to stand still; `None` is not known.
    stands: Option<bool>,
    /// The number of the file for what its devices are, and what the copy of its disk will be over.
    handed: Option<(u64, Option<Below>)>,
    copy: Copy,
}

/// How far a copy of the scratch disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Copy {
    /// There is nothing of one.
    None,
    /// There may be one that nobody waits for, or what was made for it.
    MayBeThere,
    /// It is held back.
    HeldBack,
}

impl Watcher {
    async fn run(mut self, publish: watch::Sender<Option<VmExit>>) {
        // The guest may have ended while nobody was connected.
        if self.is_shut_down().await {
            self.quit().await;
        }
        self.end_old_copy().await;
        loop {
            let pidfd = Arc::clone(&self.pidfd);
            tokio::select! {
                biased;
                _readable = pidfd.readable() => break,
                event = next_event(&mut self.monitor) => match event {
                    Ok(event) if event == "SHUTDOWN" => self.quit().await,
                    Ok(_event) => {}
                    // It hangs up when it ends; what else it means, the pidfd tells.
                    Err(_hung_up) => self.monitor = None,
                },
                () = ended(self.proxy.clone()) => self.miss_proxy(),
                Some(order) = self.asked.recv() => self.obey(order).await,
            }
        }
        let exit = self.exit();
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
            Order::Pause(answer) => drop(answer.send(self.pause().await)),
            Order::Resume(answer) => {
                drop(answer.send(self.resume().await));
                self.hasten().await;
            }
            Order::Prepare(handed, answer) => drop(answer.send(self.prepare(handed).await)),
            Order::Capture(answer) => drop(answer.send(self.capture().await)),
            Order::Hasten => self.hasten().await,
            Order::Copied(answer) => drop(answer.send(self.is_copied().await)),
            Order::Forget => self.forget().await,
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

    /// The monitor, connected anew where the last command on it was given up.
    async fn monitor(&mut self) -> io::Result<&mut Qmp> {
        if self.monitor.as_ref().is_some_and(|qmp| !qmp.is_in_step()) {
            // QEMU greets the next client once this one is gone.
            self.monitor = None;
            let socket = self.rooms.folder(self.vm).join(QMP_SOCKET);
            self.monitor = Some(Qmp::connect(&socket, GREETING_TIMEOUT).await?);
        }
        let hung_up = || io::Error::from(io::ErrorKind::NotConnected);
        self.monitor.as_mut().ok_or_else(hung_up)
    }

    async fn execute(&mut self, command: &str) -> io::Result<Value> {
        self.monitor().await?.execute(command, json!({})).await
    }

    async fn status(&mut self) -> io::Result<String> {
        let told = self.execute("query-status").await?;
        let status = told.get("status").and_then(Value::as_str);
        Ok(status.unwrap_or_default().to_owned())
    }

    async fn is_shut_down(&mut self) -> bool {
        self.status().await.is_ok_and(|status| status == "shutdown")
    }

    async fn pause(&mut self) -> io::Result<()> {
        self.stands = None;
        self.execute("stop").await?;
        self.stands = Some(true);
        Ok(())
    }

    async fn resume(&mut self) -> io::Result<()> {
        self.stands = None;
        self.execute("cont").await?;
        self.stands = Some(false);
        Ok(())
    }

    /// Files go over the connection: QEMU opens no path.
    async fn prepare(&mut self, handed: Handed) -> io::Result<(Below, u64)> {
        let left = std::mem::replace(&mut self.copy, Copy::MayBeThere);
        self.handed = None;
        let monitor = self.monitor().await?;
        if left != Copy::None {
            copy::forget(monitor).await?;
        }
        let state = monitor.add_fd(handed.state.as_fd(), copy::MARK).await?;
        let mut over = None;
        if let Some(scratch) = &handed.scratch {
            let key = handed.key.as_ref().map(|key| key.as_str());
            copy::add(monitor, scratch.as_fd(), key).await?;
            over = Some(copy::extent(monitor, handed.below).await?);
        }
        self.handed = Some((state, over.map(|(below, _bytes)| below)));
        Ok(over.unwrap_or((Below::Nothing, 0)))
    }

    async fn capture(&mut self) -> Result<(), CaptureError> {
        if self.stands != Some(true) {
            let status = self.status().await;
            let status = status.map_err(step("asking for its status"))?;
            if status != "paused" {
                return Err(CaptureError::NotPaused(status));
            }
        }
        let unprepared = || io::Error::other("nothing was prepared for a capture");
        let handed = self.handed.take().ok_or_else(unprepared);
        let (state, over) = handed.map_err(step("saving its devices"))?;
        let monitor = self.monitor().await.map_err(step("saving its devices"))?;
        let arguments = json!({"filename": format!("/dev/fdset/{state}"), "live": false});
        let saved = monitor.execute(SAVE, arguments).await;
        saved.map_err(step("saving its devices"))?;
        if let Some(over) = over {
            let begun = copy::begin(monitor, over).await;
            begun.map_err(step("copying its scratch disk"))?;
            self.copy = Copy::HeldBack;
        }
        Ok(())
    }

    async fn hasten(&mut self) {
        if self.copy != Copy::HeldBack {
            return;
        }
        self.copy = Copy::MayBeThere;
        let hastened = match self.monitor().await {
            Ok(monitor) => copy::hasten(monitor).await,
            Err(error) => Err(error),
        };
        if let Err(error) = hastened {
            tracing::warn!(vm = %self.vm, %error, "the copy of the scratch disk is held back");
        }
    }

    async fn is_copied(&mut self) -> io::Result<bool> {
        let monitor = self.monitor().await?;
        if !copy::is_over(monitor).await? {
            return Ok(false);
        }
        copy::conclude(monitor).await?;
        self.copy = Copy::None;
        Ok(true)
    }

    async fn forget(&mut self) {
        self.handed = None;
        let forgotten = match self.monitor().await {
            Ok(monitor) => copy::forget(monitor).await,
            Err(error) => Err(error),
        };
        match forgotten {
            Ok(()) => self.copy = Copy::None,
            // The next capture tries again.
            Err(error) => tracing::warn!(vm = %self.vm, %error, "a copy of a disk is left"),
        }
    }

    /// A daemon that died may have left one, which nobody waits for and which may be held back.
    async fn end_old_copy(&mut self) {
        let there = match self.monitor().await {
            Ok(monitor) => copy::is_there(monitor).await,
            Err(error) => Err(error),
        };
        if there.is_ok_and(|there| there) {
            self.forget().await;
        }
    }

    /// The guest has ended: keeps what it last said and lets QEMU go.
    async fn quit(&mut self) {
        self.read_console().await;
        let asked = self.execute("quit").await;
        // It answers and ends, or ends before its answer is read, or does not listen.
        let ended = timeout(ENDING, self.pidfd.readable()).await.is_ok();
        if !ended && let Err(failed) = kill_process(self.pidfd.get_ref()) {
            tracing::error!(vm = %self.vm, ?asked, %failed, "cannot end the VMM");
        }
    }

    async fn read_console(&mut self) {
        let read = match self.monitor().await {
            Ok(monitor) => monitor.read_ring(CONSOLE, CONSOLE_BYTES).await,
            Err(error) => Err(error),
        };
        match read {
            Ok(bytes) => self.tail.add(&bytes),
            Err(error) => tracing::warn!(vm = %self.vm, %error, "cannot read the console"),
        }
    }

    fn exit(&self) -> VmExit {
        let name = self.vm.to_string();
        let out_of_memory = self
            .rooms
            .cgroups()
            .was_out_of_memory(&name)
            .unwrap_or(false);
        let mut reason = how_it_ended("the VMM", &self.pidfd);
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

/// A console's last lines, read piece by piece.
#[derive(Debug, Default)]
struct Tail {
    lines: Vec<String>,
    /// Whether the last piece ended in the middle of a line.
    is_cut: bool,
}

impl Tail {
    fn add(&mut self, piece: &[u8]) {
        let mut lines = last_lines(piece).into_iter();
        let goes_on = self.is_cut && !piece.starts_with(b"\n") && !piece.starts_with(b"\r\n");
        if goes_on
            && let Some(begun) = self.lines.last_mut()
            && let Some(rest) = lines.next()
        {
            let whole = begun.chars().chain(rest.chars());
            *begun = whole.take(TAIL_LINE_CHARS).collect();
        }
        self.lines.extend(lines);
        let surplus = self.lines.len().saturating_sub(TAIL_LINES);
        self.lines.drain(..surplus);
        if let Some(last) = piece.last() {
            self.is_cut = *last != b'\n';
        }
    }
}

async fn next_event(monitor: &mut Option<Qmp>) -> io::Result<String> {
    match monitor {
        Some(monitor) => monitor.next_event().await,
        None => std::future::pending().await,
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

/// The last lines of a VMM's own output.
pub(super) fn log_tail(log: &OwnedFd) -> String {
    let mut bytes = vec![0; usize::try_from(LOG_BYTES).unwrap_or(0)];
    let mut len = 0;
    while let Ok(read @ 1..) = pread(log, &mut bytes[len..], len as u64) {
        len += read;
    }
    // The file has its full size from the start: what was not written is zero.
    let written = bytes[..len]
        .split(|byte| *byte == 0)
        .next()
        .unwrap_or_default();
    last_lines(written).join("\n")
}

/// The last lines of what a tenant may have written, without control characters.
fn last_lines(bytes: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(bytes);
    let clean = |line: &str| {
        let shown = line.chars().filter(|c| !c.is_control());
        shown.take(TAIL_LINE_CHARS).collect::<String>()
    };
    let lines: Vec<String> = text
        .lines()
        .map(clean)
        .filter(|line| !line.is_empty())
        .collect();
    let skipped = lines.len().saturating_sub(TAIL_LINES);
    lines.into_iter().skip(skipped).collect()
}

#[cfg(test)]
mod tests {
    use super::{TAIL_LINE_CHARS, TAIL_LINES, Tail, last_lines};

    #[test]
    fn a_line_that_is_read_in_pieces_is_one_line() {
        let mut tail = Tail::default();
        for piece in [
            "one\r\ntw",
            "",
            "o\r",
            "\nthree\n",
            "four",
            "\nfive\n\n",
            "six",
        ] {
            tail.add(piece.as_bytes());
        }
        assert_eq!(tail.lines, ["one", "two", "three", "four", "five", "six"]);
        tail.add(&[b'x'; 300]);
        assert_eq!(tail.lines[5].len(), TAIL_LINE_CHARS);
        tail.add("\nmore".repeat(50).as_bytes());
        assert_eq!(tail.lines.len(), TAIL_LINES);
    }

    #[test]
    fn a_tail_is_short_whatever_the_guest_wrote() {
        let tail = last_lines(&[0xff; 64 * 1024]);
        assert_eq!(tail.len(), 1);
        assert_eq!(tail[0].chars().count(), TAIL_LINE_CHARS);
    }

    #[test]
    fn a_tail_is_the_last_lines_without_control_characters() {
        let mut text = String::new();
        for number in 0..50 {
            text.push_str(&format!("\x1b[1mline {number}\r\n\n"));
        }
        let tail = last_lines(text.as_bytes());
        assert_eq!(tail.len(), 40);
        assert_eq!(tail[0], "[1mline 10");
        assert_eq!(tail[39], "[1mline 49");
    }

    #[test]
    fn bytes_that_are_no_text_do_no_harm() {
        assert_eq!(last_lines(&[0xff, b'\n', b'a']), ["\u{fffd}", "a"]);
        assert_eq!(last_lines(b""), Vec::<String>::new());
    }
}
