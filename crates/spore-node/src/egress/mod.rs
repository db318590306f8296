//! The egress proxy: the only way out of a VM, one process per VM that has grants.
//!
//! There is no route out of a VM's namespace. Inside it, TCP is redirected to a listener and UDP
//! port 53 to a socket; both were made by the node and belong to this process, which itself stays
//! in the host's network namespace, without any privilege, and dials. Never a part of the daemon:
//! it outlives the daemon and dies with its VM. Never told anything after its start: another
//! policy is another proxy.
//!
//! ```text
//!     guest ──tap──▶ nft: redirect tcp to :3128, udp 53 to :53   (the VM's namespace)
//!                          │                    │
//!                     descriptor 3         descriptor 4
//!                          ▼                    ▼
//!      proxy.rs: accept, SO_ORIGINAL_DST    resolver.rs: granted names only ──▶ host's resolvers
//!                          │                    │
//!                          └──▶ policy.rs ◀─────┘ what was handed out
//!                                  │ granted
//!                                  ▼
//!      dial (the host's namespace), relay.rs, hello.rs: SNI or Host must agree with the name
//! ```
//!
//! # How it is started
//!
//! [`launch`](launch::EgressLauncher::launch) does all of this; it is the contract of the verb:
//!
//! - argv: `spore egress --uid UID`, as root, in the host's namespaces. `UID` is a uid (and gid) of
//!   this VM's own, above all not the one that its VMM runs as, and not 0.
//! - descriptor 0: the blob as JSON, until end of file.
//! - descriptor 1: a pipe. `ready` and a newline are written once the process is confined and the
//!   blob is accepted, after which both pipes are replaced by `/dev/null`. End of file without it
//!   means that the start failed; the reason is on descriptor 2.
//! - descriptor 2: the log, a file opened for appending. Not a pipe: the proxy outlives its
//!   reader, and a full pipe would stop it. What is written is bounded (`tally`).
//! - descriptor 3: the listening TCP socket on [`PROXY_PORT`](spore_wire::egress::PROXY_PORT), and
//!   descriptor 4: the UDP socket on port 53, both made inside the VM's namespace. The listener
//!   must have been made *before* the redirection is, the redirection before the tap goes up.
//! - The caller puts the process into the VM's cgroup before it writes the blob, and kills it with
//!   that. It needs no other end: SIGTERM and SIGKILL are alike to it.
//!
//! [`main`] must run before anything of the program made a thread, above all a runtime.

pub mod blob;
pub mod cage;
pub mod hello;
pub mod host;
pub mod launch;
pub mod message;
pub mod policy;
pub mod proxy;
pub mod relay;
pub mod resolver;
pub mod tally;

use std::fs::File;
use std::io::{self, Read};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use socket2::{SockRef, Type};
use spore_wire::egress::{DNS_FD, EgressBlob, TCP_FD};
use thiserror::Error;
use tokio::net::{TcpListener, UdpSocket};
use tokio::time::Instant;
use tracing::info;

use blob::BlobError;
use cage::CageError;
use policy::{Admitted, NameIndex, Policy, Verdict};
use resolver::Resolver;
use tally::{SUMMARY_EVERY, Tally};

/// What is written to standard output when the proxy serves.
pub const READY: &[u8] = b"ready\n";

/// Why a proxy ends; it never does once it serves.
#[derive(Debug, Error)]
pub enum EgressError {
    /// The sockets that a node passes are missing or of another kind.
    #[error("descriptor {fd} is not {expected}: `spore egress` is started by the node only")]
    Inherit {
        /// Its number.
        fd: i32,
        /// What it must be.
        expected: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The process kept a privilege.
    #[error(transparent)]
    Cage(#[from] CageError),
    /// The blob is refused.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// A step of the start failed.
    #[error("cannot start the egress proxy: {what}")]
    Start {
        /// Which.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// What the tasks of one proxy share.
#[derive(Debug)]
pub struct Shared {
    /// What may be dialled.
    pub policy: Policy,
    /// What is counted.
    pub tally: Tally,
    admitted: Mutex<Admitted>,
    started: Instant,
}

impl Shared {
    /// The state of a proxy that starts now.
    #[must_use]
    pub fn new(policy: Policy) -> Self {
        Self {
            policy,
            tally: Tally::default(),
            admitted: Mutex::default(),
            started: Instant::now(),
        }
    }

    /// What to do with a connection to `to`, now.
    #[must_use]
    pub fn decide(&self, to: SocketAddrV4) -> Verdict {
        // The table is changed in one step that cannot panic half-way.
        let admitted = self.admitted.lock().unwrap_or_else(PoisonError::into_inner);
        self.policy.decide(to, &admitted, self.started.elapsed())
    }

    /// Remembers that `addresses` are about to be handed out for `name`.
    pub fn admit(&self, name: NameIndex, addresses: &[Ipv4Addr], lifetime: Duration) {
        let now = self.started.elapsed();
        let mut admitted = self.admitted.lock().unwrap_or_else(PoisonError::into_inner);
        admitted.record(name, addresses, lifetime, now);
    }
}

/// The verb `spore egress`: confines the process, reads `blob` to its end and serves for ever.
///
/// The module's documentation says how the process must be started.
///
/// # Errors
/// [`EgressError`] when it cannot start; the process must then end with a failure.
pub fn main(uid: u32, blob: impl Read) -> Result<(), EgressError> {
    let tcp = inherit(TCP_FD, "a listening TCP socket")?;
    let dns = inherit(DNS_FD, "a UDP socket")?;
    let null = File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .map_err(start("/dev/null"))?;
    // The inherited numbers are closed here, as is everything that nobody announced.
    cage::enter(uid, &[tcp.as_raw_fd(), dns.as_raw_fd(), null.as_raw_fd()])?;
    let (tcp, dns) = check_sockets(tcp, dns)?;
    // Another subscriber, if the program has one, serves as well.
    let _other = tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_ansi(false)
        .with_target(false)
        .try_init();
    let blob = blob::read(blob)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .map_err(start("runtime"))?;
    cage::seal()?;
    runtime.block_on(async {
        let tcp = TcpListener::from_std(tcp).map_err(start("TCP socket"))?;
        let dns = UdpSocket::from_std(dns).map_err(start("UDP socket"))?;
        announce(&null)?;
        drop(null);
        serve(blob, tcp, dns).await;
        Ok(())
    })
}

async fn serve(blob: EgressBlob, tcp: TcpListener, dns: UdpSocket) {
    let policy = Policy::new(&blob.grants, &blob.host_addresses);
    info!(vm = %blob.vm, grants = blob.grants.len(), "egress proxy serves");
    let shared = Arc::new(Shared::new(policy));
    let resolver = Resolver::new(Arc::clone(&shared), blob.resolvers);
    let summaries = async {
        let mut beat = tokio::time::interval(SUMMARY_EVERY);
        loop {
            beat.tick().await;
            shared.tally.summarize();
        }
    };
    tokio::join!(
        proxy::serve(Arc::clone(&shared), tcp, blob.connections_max),
        resolver.serve(dns),
        summaries,
    );
}

/// Takes over an inherited descriptor under a new number, as far as Rust is concerned without
/// claiming that nobody else uses the old one: the kernel is asked for a copy of it.
fn inherit(fd: i32, expected: &'static str) -> Result<OwnedFd, EgressError> {
    let own = |source: rustix::io::Errno| EgressError::Inherit {
        fd,
        expected,
        source: source.into(),
    };
    let itself = Pid::from_raw(i32::try_from(std::process::id()).unwrap_or_default());
    let itself = itself.ok_or_else(|| own(rustix::io::Errno::SRCH))?;
    let pidfd = pidfd_open(itself, PidfdFlags::empty()).map_err(own)?;
    pidfd_getfd(&pidfd, fd, PidfdGetfdFlags::empty()).map_err(own)
}

/// Makes sure that the sockets are what they are taken for.
fn check_sockets(
    tcp: OwnedFd,
    dns: OwnedFd,
) -> Result<(std::net::TcpListener, std::net::UdpSocket), EgressError> {
    let is_listener = |socket: SockRef<'_>| {
        Ok(socket.r#type()? == Type::STREAM
            && socket.is_listener()?
            && socket.local_addr()?.as_socket_ipv4().is_some())
    };
    let is_datagram = |socket: SockRef<'_>| {
        Ok(socket.r#type()? == Type::DGRAM && socket.local_addr()?.as_socket_ipv4().is_some())
    };
    let check = |fd: i32, expected, is_one: io::Result<bool>| {
        let wrong = || io::ErrorKind::InvalidInput.into();
        is_one
            .and_then(|is_one| if is_one { Ok(()) } else { Err(wrong()) })
            .map_err(|source| EgressError::Inherit {
                fd,
                expected,
                source,
            })
    };
    check(
        TCP_FD,
        "a listening TCP socket for IPv4",
        is_listener(SockRef::from(&tcp)),
    )?;
    check(
        DNS_FD,
        "a UDP socket for IPv4",
        is_datagram(SockRef::from(&dns)),
    )?;
    let (tcp, dns) = (
        std::net::TcpListener::from(tcp),
        std::net::UdpSocket::from(dns),
    );
    tcp.set_nonblocking(true).map_err(start("TCP socket"))?;
    dns.set_nonblocking(true).map_err(start("UDP socket"))?;
    Ok((tcp, dns))
}

/// Tells the node that the proxy serves, then lets go of both pipes to it.
fn announce(null: &File) -> Result<(), EgressError> {
    let failed = |error: rustix::io::Errno| start("announce")(error.into());
    rustix::io::write(rustix::stdio::stdout(), READY).map_err(failed)?;
    rustix::stdio::dup2_stdin(null).map_err(failed)?;
    rustix::stdio::dup2_stdout(null).map_err(failed)
}

fn start(what: &'static str) -> impl FnOnce(io::Error) -> EgressError {
    move |source| EgressError::Start { what, source }
}
