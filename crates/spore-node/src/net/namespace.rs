//! One network namespace, held by a bind mount under the runtime folder.
//!
//! Made by the pool, opened by the drivers for one VM, removed when that VM is released. A
//! namespace is a name and two threads; nothing here remembers its state, the kernel does.

use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::mount::{UnmountFlags, mount_bind, unmount};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use rustix::thread::UnshareFlags;
use spore_wire::egress::PROXY_PORT;
use spore_wire::guest::{GUEST_ADDRESS, HOST_ADDRESS};
use tokio::net::{TcpSocket, TcpStream};

use super::policy::{self, DNS_PORT, Policy};
use super::tap;
use super::thread::NamespaceThread;
use crate::hypervisor::PolicyError;
use crate::sys;

/// Where namespaces are bound and which threads enter them.
#[derive(Clone, Debug)]
pub struct Namespaces {
    folder: PathBuf,
    /// Makes namespaces and sets policies: runs `nft`, some milliseconds each.
    slow: NamespaceThread,
    /// Makes sockets and opens taps: microseconds each, on the path of requests.
    quick: NamespaceThread,
}

/// The two sockets of an egress proxy, made inside the namespace.
#[derive(Debug)]
pub struct ProxySockets {
    /// Where TCP of the guest is redirected to.
    pub tcp: TcpListener,
    /// Where its DNS questions come.
    pub dns: UdpSocket,
}

impl Namespaces {
    /// Namespaces under `folder`, which is made if it is missing.
    ///
    /// # Errors
    /// When the folder or the threads cannot be made.
    pub fn open(folder: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&folder)?;
        Ok(Self {
            // The kernel names mounts by their real path.
            folder: folder.canonicalize()?,
            slow: NamespaceThread::start("netns-make")?,
            quick: NamespaceThread::start("netns-socket")?,
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Makes a namespace: loopback, a tap that is down, a policy that lets nothing pass.
    ///
    /// # Errors
    /// What the kernel or `nft` says; what was made by then bears the name and is removed by it.
    pub async fn make(&self, name: &str) -> io::Result<()> {
        let path = self.path(name);
        self.slow
            .run(move || {
                sys::unshare(UnshareFlags::NEWNET)?;
                disable_ip_v6_and_forwarding()?;
                policy::write(Policy::Closed)?;
                tap::make()?;
                File::options().write(true).create_new(true).open(&path)?;
                mount_bind("/proc/thread-self/ns/net", &path)?;
                Ok(())
            })
            .await
    }

    /// Makes no more: what is being made is there when this returns, or never will be. Blocks.
    pub fn end_making(&self) {
        self.slow.end();
    }

    /// Removes the namespace `name`; nothing to do if it is gone. What still runs inside keeps it
    /// alive without a name.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        let path = self.path(name);
        let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
        loop {
            match unmount(&path, flags) {
                Ok(()) => {}
                // Not a mount point, or nothing there.
                Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => break,
                Err(error) => return Err(error.into()),
            }
        }
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// The names of all namespaces, whole or half made.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn list(&self) -> io::Result<Vec<String>> {
        let names = fs::read_dir(&self.folder)?
            .map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()));
        names.collect()
    }

    /// Opens the tap of `name` for a VMM.
    ///
    /// # Errors
    /// What the kernel says.
    pub async fn open_tap(&self, name: &str) -> io::Result<OwnedFd> {
        self.quick.inside(&self.path(name), tap::open).await
    }

    /// Lets traffic pass as `wanted` says, and reads the policy back before and after the first
    /// packet may pass. Where the tap is up already, only reads it back.
    ///
    /// # Errors
    /// [`PolicyError`]; the caller kills the VM.
    pub async fn open_policy(&self, name: &str, wanted: Policy) -> Result<(), PolicyError> {
        let step = |what| move |source| PolicyError::Step { what, source };
        let work = move || {
            let open = || -> Result<(), PolicyError> {
                if !tap::is_up().map_err(step("reading the tap's state"))? {
                    policy::write(wanted).map_err(step("writing the rules"))?;
                    policy::verify(wanted)?;
                    tap::up().map_err(step("taking the tap up"))?;
                }
                policy::verify(wanted)
            };
            Ok(open())
        };
        self.slow
            .inside(&self.path(name), work)
            .await
            .map_err(step("entering the namespace"))?
    }

    /// Whether packets may pass in `name`.
    ///
    /// # Errors
    /// What the kernel says.
    pub async fn is_open(&self, name: &str) -> io::Result<bool> {
        self.quick.inside(&self.path(name), tap::is_up).await
    }

    /// A TCP connection from inside the namespace to the guest's `port`.
    ///
    /// # Errors
    /// What socket(2) and connect(2) say.
    pub async fn connect(&self, name: &str, port: u16) -> io::Result<TcpStream> {
        let make = || {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            Ok(socket_with(
                AddressFamily::INET,
                SocketType::STREAM,
                flags,
                None,
            )?)
        };
        let socket: OwnedFd = self.quick.inside(&self.path(name), make).await?;
        let socket = TcpSocket::from_std_stream(std::net::TcpStream::from(socket));
        let guest = SocketAddrV4::new(Ipv4Addr::from(GUEST_ADDRESS), port);
        let stream = socket.connect(SocketAddr::V4(guest)).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    /// The sockets that an egress proxy inherits.
    ///
    /// # Errors
    /// What the kernel says.
    pub async fn proxy_sockets(&self, name: &str) -> io::Result<ProxySockets> {
        let make = || {
            let host = Ipv4Addr::from(HOST_ADDRESS);
            Ok(ProxySockets {
                tcp: TcpListener::bind((host, PROXY_PORT))?,
                dns: UdpSocket::bind((host, DNS_PORT))?,
            })
        };
        self.quick.inside(&self.path(name), make).await
    }

    /// The folder in which namespaces are bound.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

/// A new namespace takes these settings from the host's own, so they are written whatever they are.
fn disable_ip_v6_and_forwarding() -> io::Result<()> {
    fs::write("/proc/sys/net/ipv4/ip_forward", "0")?;
    for which in ["all", "default", "lo"] {
        let path = format!("/proc/sys/net/ipv6/conf/{which}/disable_ipv6");
        match fs::write(path, "1") {
            // The host's kernel has no IPv6 at all.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => other?,
        }
    }
    Ok(())
}
