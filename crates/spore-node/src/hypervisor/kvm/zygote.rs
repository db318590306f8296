//! The process that VMMs are copied from (`spore-vmm zygote`), as the node has it.
//!
//! Started with the driver, and anew when it is gone: VMMs go on without it, and only the next one
//! needs another. It is jailed before it is asked for anything. What it says of ends is kept until
//! it is asked for, since the node is not the parent of these processes.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use command_fds::{CommandFdExt as _, FdMapping};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use spore_wire::generation::GENERATION;
use spore_wire::zygote::{
    ExitedBy, FdRole, FromZygote, KVM_FD, PACKET_BYTES_MAX, SOCKET_FD, ToZygote,
};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::timeout;

use super::packet::PacketSocket;
use crate::cgroup::kill_process;
use crate::hypervisor::monitored;

/// How long a zygote may take until it is jailed, and to make a VMM; some milliseconds each.
const LIMIT: Duration = Duration::from_secs(30);

/// Ends that nobody has asked for; more are forgotten, oldest first.
const ENDS_MAX: usize = 4096;

/// How long it is waited for that a zygote tells of an end that a pidfd has told.
const END_LIMIT: Duration = Duration::from_secs(2);

/// How zygotes are started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ZygoteConfig {
    /// `spore-vmm`.
    pub(super) program: PathBuf,
    /// `/dev/kvm`.
    pub(super) device: PathBuf,
    /// Its own uid, and how many there are from that on.
    pub(super) uids: (u32, u32),
}

/// A VMM that is on its way into its jail.
#[derive(Debug)]
pub(super) struct Spawned {
    pub(super) pid: u32,
    /// The first process of its pid namespace.
    pub(super) init: u32,
    /// The VMM's.
    pub(super) pidfd: OwnedFd,
}

impl Spawned {
    /// Ends it, of which there is no use.
    pub(super) fn kill(&self) {
        if let Err(error) = kill_process(&self.pidfd) {
            tracing::error!(pid = self.pid, %error, "a VMM that is nobody's cannot be ended");
        }
    }
}

/// Zygotes, one at a time.
#[derive(Debug)]
pub(super) struct Zygotes {
    config: ZygoteConfig,
    running: tokio::sync::Mutex<Option<Zygote>>,
    ends: Arc<Ends>,
}

/// One that runs.
#[derive(Debug)]
struct Zygote {
    orders: mpsc::Sender<Order>,
}

/// One VMM that is asked for.
#[derive(Debug)]
struct Order {
    uid: u32,
    fds: Vec<(FdRole, OwnedFd)>,
    answer: oneshot::Sender<io::Result<Spawned>>,
}

/// How VMMs ended.
#[derive(Debug, Default)]
pub(super) struct Ends {
    told: Mutex<BTreeMap<u32, ExitedBy>>,
    changed: Notify,
}

impl Ends {
    fn tell(&self, pid: u32, by: ExitedBy) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.len() >= ENDS_MAX {
            told.pop_first();
        }
        told.insert(pid, by);
        drop(told);
        self.changed.notify_waiters();
    }

    fn forget(&self, pid: u32) -> Option<ExitedBy> {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.remove(&pid)
    }
}

#[async_trait]
impl monitored::Ends for Ends {
    async fn how(&self, pid: u32) -> Option<String> {
        let wait = async {
            loop {
                let changed = self.changed.notified();
                if let Some(by) = self.forget(pid) {
                    return by;
                }
                changed.await;
            }
        };
        Some(match timeout(END_LIMIT, wait).await.ok()? {
            ExitedBy::Code { code } => format!("ended with code {code}"),
            ExitedBy::Signal { signal } => format!("was ended by signal {signal}"),
        })
    }
}

impl Zygotes {
    pub(super) fn new(config: ZygoteConfig) -> Self {
        Self {
            config,
            running: tokio::sync::Mutex::default(),
            ends: Arc::default(),
        }
    }

    /// How VMMs ended.
    pub(super) const fn ends(&self) -> &Arc<Ends> {
        &self.ends
    }

    /// A VMM with a uid and descriptors, in its jail or on its way there. Starts a zygote if there
    /// is none, or none any more.
    pub(super) async fn spawn(&self, uid: u32, fds: Vec<(FdRole, OwnedFd)>) -> io::Result<Spawned> {
        let mut running = self.running.lock().await;
        let zygote = match running.take().filter(|zygote| !zygote.orders.is_closed()) {
            Some(zygote) => zygote,
            None => self.start().await?,
        };
        let (answer, answered) = oneshot::channel();
        let order = Order { uid, fds, answer };
        let sent = zygote.orders.send(order).await;
        *running = Some(zygote);
        drop(running);
        sent.map_err(|_ended| gone())?;
        let answered = timeout(LIMIT, answered).await;
        let answered = answered.map_err(|_elapsed| io::Error::from(io::ErrorKind::TimedOut))?;
        answered.map_err(|_ended| gone())?
    }

    async fn start(&self) -> io::Result<Zygote> {
        let (socket, child) = exec(&self.config)?;
        let socket = PacketSocket::new(socket, PACKET_BYTES_MAX)?;
        let ready = timeout(LIMIT, socket.receive::<FromZygote>()).await;
        let ready = ready.map_err(|_elapsed| io::Error::from(io::ErrorKind::TimedOut));
        match ready.flatten() {
            Ok((FromZygote::Ready { generation }, _)) if generation == GENERATION => {}
            Ok((other, _)) => return Err(io::Error::other(format!("a zygote said {other:?}"))),
            Err(error) => return Err(ended(child, &error).await),
        }
        let (orders, ordered) = mpsc::channel(16);
        let ends = Arc::clone(&self.ends);
        tokio::spawn(serve(socket, ordered, ends, child));
        Ok(Zygote { orders })
    }
}

fn gone() -> io::Error {
    io::Error::other("the process that VMMs are made from is gone; the next start makes another")
}

/// Starts the process, with its standard error in a pipe that is read only if it fails at once.
fn exec(config: &ZygoteConfig) -> io::Result<(OwnedFd, Child)> {
    let (ours, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    let kvm = File::options().read(true).write(true).open(&config.device);
    let kvm = kvm.map_err(|error| {
        let text = format!("{} cannot be opened: {error}", config.device.display());
        io::Error::new(error.kind(), text)
    })?;
    let (first, count) = config.uids;
    let mut command = Command::new(&config.program);
    command
        .args(["zygote", "--uids", &format!("{first}+{count}")].map(OsString::from))
        .env_clear()
        .current_dir("/")
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mapped = command.fd_mappings(vec![
        FdMapping {
            parent_fd: theirs,
            child_fd: SOCKET_FD,
        },
        FdMapping {
            parent_fd: kvm.into(),
            child_fd: KVM_FD,
        },
    ]);
    mapped.map_err(io::Error::other)?;
    Ok((ours, command.spawn()?))
}

/// What a zygote said that ended before it was ready.
async fn ended(child: Child, error: &io::Error) -> io::Error {
    let text = tokio::task::spawn_blocking(move || {
        let mut child = child;
        // Without its socket it ends, if it has not.
        child.kill()?;
        child.wait_with_output()
    });
    let said = match text.await {
        Ok(Ok(output)) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        _ => String::new(),
    };
    io::Error::other(format!("no zygote: {error}; {said}"))
}

/// Speaks with a zygote until it is gone or nobody asks any more.
async fn serve(
    socket: PacketSocket,
    mut ordered: mpsc::Receiver<Order>,
    ends: Arc<Ends>,
    mut child: Child,
) {
    let mut asked: BTreeMap<u64, oneshot::Sender<io::Result<Spawned>>> = BTreeMap::new();
    let mut next = 0;
    loop {
        tokio::select! {
            heard = socket.receive::<FromZygote>() => match heard {
                Ok((message, pidfd)) => hear(message, pidfd, &mut asked, &ends),
                Err(_gone) => break,
            },
            order = ordered.recv() => {
                let Some(Order { uid, fds, answer }) = order else { break };
                next += 1;
                let roles = fds.iter().map(|(role, _fd)| *role).collect();
                let open: Vec<BorrowedFd<'_>> = fds.iter().map(|(_role, fd)| fd.as_fd()).collect();
                let request = ToZygote::Spawn { request: next, uid, fds: roles };
                match socket.send(&request, &open).await {
                    Ok(()) => drop(asked.insert(next, answer)),
                    // Whoever asked may have given up.
                    Err(error) => drop(answer.send(Err(error))),
                }
            }
        }
    }
    drop(socket);
    // It ends without its socket.
    let waited = tokio::task::spawn_blocking(move || child.wait()).await;
    tracing::debug!(?waited, "a zygote ended");
}

fn hear(
    message: FromZygote,
    pidfd: Option<OwnedFd>,
    asked: &mut BTreeMap<u64, oneshot::Sender<io::Result<Spawned>>>,
    ends: &Ends,
) {
    match message {
        FromZygote::Spawned { request, pid, init } => {
            // The end of an earlier process with that number is nobody's any more.
            ends.forget(pid);
            let spawned = pidfd.map(|pidfd| Spawned { pid, init, pidfd });
            let spawned = spawned.ok_or_else(|| io::Error::other("a VMM came without a pidfd"));
            let unheard = match asked.remove(&request) {
                Some(answer) => answer.send(spawned).err(),
                None => Some(spawned),
            };
            // Whoever asked has given up: it is in no VM's cgroup, and nobody's.
            if let Some(Ok(spawned)) = unheard {
                spawned.kill();
            }
        }
        FromZygote::Refused { request, why } => {
            let answer = request.and_then(|request| asked.remove(&request));
            match answer {
                Some(answer) => drop(answer.send(Err(io::Error::other(why)))),
                None => tracing::error!(why, "a zygote refused what nobody asked for"),
            }
        }
        FromZygote::Ended { pid, by } => ends.tell(pid, by),
        FromZygote::Ready { .. } | FromZygote::Gone { .. } => {}
    }
}
