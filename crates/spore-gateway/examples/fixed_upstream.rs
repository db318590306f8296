//! A gateway in front of one fixed upstream, with the daemon's part played in the same process.
//!
//! Started by `bench/gateway.sh` as `fixed_upstream LISTEN UPSTREAM HOST [NAMESPACE]`. With a
//! namespace, sockets to the upstream are made inside it, on a thread of their own, as a node does.
//! Serves on one thread until it is killed. It is no way to run a real gateway: there is nothing to
//! wake.

use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use spore_gateway::Config;
use spore_gateway::packet::PacketSocket;
use spore_wire::gateway::{Admission, AppKey, FromGateway, Route, RoutePolicy, ToGateway};
use spore_wire::generation::GENERATION;
use spore_wire::id::VmId;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let mut next = |name| {
        arguments
            .next()
            .with_context(|| format!("{name} is missing"))
    };
    let listen = next("LISTEN")?;
    let upstream: SocketAddr = next("UPSTREAM")?.parse()?;
    let host = next("HOST")?;
    let namespace = next("NAMESPACE").ok();
    let folder = tempfile::tempdir()?;
    let address = SocketAddrUnix::new(folder.path().join("control.sock"))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async move {
        let control = packet_socket()?;
        rustix::net::bind(&control, &address)?;
        rustix::net::listen(&control, 4)?;
        let listener = std::net::TcpListener::bind(&listen)?;
        let daemon = packet_socket()?;
        rustix::net::connect(&daemon, &address)?;
        let played = play_daemon(daemon, upstream, host, namespace);
        let gateway = spore_gateway::run(Config::default(), listener, control);
        tokio::select! {
            result = gateway => result.context("the gateway ended"),
            result = played => result.context("the daemon ended"),
        }
    })
}

fn packet_socket() -> Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        flags,
        None,
    )?)
}

/// A connection to the upstream, made from the namespace when one is given.
fn connect(upstream: SocketAddr, namespace: Option<&str>) -> Result<OwnedFd> {
    if let Some(path) = namespace {
        let namespace = std::fs::File::open(path).context(path.to_owned())?;
        let network = Some(LinkNameSpaceType::Network);
        move_into_link_name_space(namespace.as_fd(), network).context("enter the namespace")?;
    }
    let stream = std::net::TcpStream::connect(upstream)?;
    stream.set_nonblocking(true)?;
    Ok(stream.into())
}

async fn play_daemon(
    fd: OwnedFd,
    upstream: SocketAddr,
    host: String,
    namespace: Option<String>,
) -> Result<()> {
    let socket = PacketSocket::new(fd)?;
    let app = AppKey::new("me", "fixed");
    let vm = VmId::random()?;
    let route = Route {
        host,
        app: app.clone(),
        policy: RoutePolicy {
            admission: Admission::Open,
            waiters_max: 1_000,
            wake_deadline_ms: 10_000,
        },
    };
    let generation = GENERATION;
    let phases = Vec::new();
    for message in [
        ToGateway::Hello { generation },
        ToGateway::Routes { set: vec![route] },
        ToGateway::RoutesEnd,
        ToGateway::Awake { app, vm, phases },
    ] {
        socket.send(&message, None).await?;
    }
    let mut buffer = Vec::new();
    loop {
        let (message, _) = socket.receive::<FromGateway>(&mut buffer).await?;
        if let FromGateway::Connect { id, .. } = message {
            let namespace = namespace.clone();
            // The thread ends with the connection, and its namespace with the thread.
            let made = std::thread::spawn(move || connect(upstream, namespace.as_deref()));
            let made = tokio::task::spawn_blocking(move || made.join()).await?;
            let fd = made.map_err(|_panic| anyhow::anyhow!("the connecting thread panicked"))??;
            socket.send(&ToGateway::Connected { id }, Some(&fd)).await?;
        }
    }
}
