//! The rig of a story: a gateway, and a daemon that does what the story tells it.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use spore_gateway::packet::PacketSocket;
use spore_gateway::{Config, Limits};
use spore_wire::gateway::{
    Activity, Admission, AppKey, Counts, FromGateway, Phase, Route, RoutePolicy, ToGateway,
};
use spore_wire::generation::GENERATION;
use spore_wire::id::VmId;
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;

use crate::app::App;

/// Whatever takes longer never ends. Shorter than what the gateway waits for a stalled end.
pub(crate) const HANG: Duration = Duration::from_secs(40);

/// One gateway.
pub(crate) struct Rig {
    pub(crate) address: SocketAddr,
    control: PathBuf,
    run: JoinHandle<()>,
    _folder: tempfile::TempDir,
}

/// A daemon in session.
pub(crate) struct Daemon {
    say: mpsc::UnboundedSender<ToGateway>,
    world: Arc<World>,
    task: JoinHandle<()>,
    pub(crate) warm: Vec<Activity>,
    /// The socket that visitors come in by, as the gateway passed it on.
    pub(crate) listener: OwnedFd,
}

#[derive(Default)]
struct World {
    /// Which VM a wake of an app gives, at once.
    wakes: Mutex<HashMap<AppKey, VmId>>,
    addresses: Mutex<HashMap<VmId, SocketAddr>>,
    heard: Mutex<Vec<FromGateway>>,
    news: Notify,
}

pub(crate) fn vm(number: u8) -> VmId {
    VmId::from_bytes([number; 16])
}

pub(crate) fn key(name: &str) -> AppKey {
    AppKey::new("me", name)
}

pub(crate) fn route(name: &str) -> Route {
    Route {
        host: format!("{name}.localhost"),
        app: key(name),
        policy: RoutePolicy {
            admission: Admission::Open,
            waiters_max: 100,
            wake_deadline_ms: 30_000,
        },
    }
}

/// The gateway's limits, where none ends what a slow machine has not done yet.
pub(crate) fn patient() -> Limits {
    let long = Duration::from_secs(120);
    Limits {
        head_timeout: long,
        fresh_grace: long,
        idle_connection_age_max: long,
        refused_patience: long,
        first_table_timeout: long,
        ..Limits::default()
    }
}

/// A gateway with these limits, its daemon, and an app that VM 1 of a first wake leads to.
pub(crate) async fn serving(limits: Limits) -> (Rig, Daemon, App) {
    let rig = Rig::with_limits(limits);
    let daemon = rig.daemon(vec![route("app")]).await;
    let app = App::start("app").await;
    daemon.on_wake("app", vm(1), app.address);
    (rig, daemon, app)
}

impl Rig {
    pub(crate) fn start() -> Self {
        Self::with_limits(patient())
    }

    pub(crate) fn with_limits(limits: Limits) -> Self {
        Self::on(std::net::TcpListener::bind("127.0.0.1:0").unwrap(), limits)
    }

    /// A gateway whose visitors come in by this socket.
    pub(crate) fn on(listener: std::net::TcpListener, limits: Limits) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let control = folder.path().join("control.sock");
        let listening = packet_socket();
        rustix::net::bind(&listening, &SocketAddrUnix::new(&control).unwrap()).unwrap();
        rustix::net::listen(&listening, 8).unwrap();
        let address = listener.local_addr().unwrap();
        let run = tokio::spawn(async move {
            let config = Config {
                limits,
                stamp: "a stamp".into(),
            };
            spore_gateway::run(config, listener, listening)
                .await
                .unwrap();
        });
        Self {
            address,
            control,
            run,
            _folder: folder,
        }
    }

    /// A daemon connects, says hello and this whole table.
    pub(crate) async fn daemon(&self, routes: Vec<Route>) -> Daemon {
        let fd = packet_socket();
        rustix::net::connect(&fd, &SocketAddrUnix::new(&self.control).unwrap()).unwrap();
        let socket = PacketSocket::new(fd).unwrap();
        let generation = GENERATION;
        let hello = ToGateway::Hello { generation };
        socket.send(&hello, None).await.unwrap();
        let mut buffer = Vec::new();
        let (answer, listener) = socket.receive::<FromGateway>(&mut buffer).await.unwrap();
        let FromGateway::Hello { warm, stamp, .. } = answer else {
            panic!("{answer:?} is no hello");
        };
        assert_eq!(stamp, "a stamp");
        let (say, said) = mpsc::unbounded_channel();
        let world = Arc::new(World::default());
        let task = tokio::spawn(play(socket, said, Arc::clone(&world)));
        let daemon = Daemon {
            say,
            world,
            task,
            warm,
            listener: listener.expect("the listener comes with the hello"),
        };
        daemon.say(ToGateway::Routes { set: routes });
        daemon.say(ToGateway::RoutesEnd);
        daemon
    }

    /// Ends when the gateway has.
    pub(crate) async fn ended(self) {
        self.run.await.unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Daemon {
    pub(crate) fn say(&self, message: ToGateway) {
        self.say.send(message).unwrap();
    }

    /// Connections to this VM lead there from now on.
    pub(crate) fn place(&self, vm: VmId, address: SocketAddr) {
        self.world.addresses.lock().unwrap().insert(vm, address);
    }

    /// A wake of this app gives this VM at once.
    pub(crate) fn on_wake(&self, name: &str, vm: VmId, address: SocketAddr) {
        self.place(vm, address);
        self.world.wakes.lock().unwrap().insert(key(name), vm);
    }

    pub(crate) fn awake(&self, name: &str, vm: VmId, address: SocketAddr) {
        self.place(vm, address);
        self.say(awake(key(name), vm));
    }

    pub(crate) fn gone(&self, name: &str, vm: VmId) {
        let reason = "killed by the story".into();
        let app = key(name);
        self.say(ToGateway::Gone { app, vm, reason });
    }

    /// How often something was heard so far.
    pub(crate) fn count(&self, what: impl Fn(&FromGateway) -> bool) -> usize {
        let heard = self.world.heard.lock().unwrap();
        heard.iter().filter(|message| what(message)).count()
    }

    pub(crate) fn wakes(&self, name: &str) -> usize {
        self.count(|heard| matches!(heard, FromGateway::Wake { app, .. } if *app == key(name)))
    }

    /// Ends when something was heard at least so often.
    pub(crate) async fn heard(&self, times: usize, what: impl Fn(&FromGateway) -> bool) {
        loop {
            let news = self.world.news.notified();
            if self.count(&what) >= times {
                return;
            }
            news.await;
        }
    }

    /// Ends when the gateway counted so many of something, which it reports every second.
    pub(crate) async fn counted(&self, times: u64, what: impl Fn(&Counts) -> u64) {
        loop {
            let news = self.world.news.notified();
            let sum: u64 = {
                let heard = self.world.heard.lock().unwrap();
                let counts = heard.iter().filter_map(|message| match message {
                    FromGateway::Counts(counts) => Some(what(counts)),
                    _ => None,
                });
                counts.sum()
            };
            if sum >= times {
                return;
            }
            news.await;
        }
    }

    /// Ends when the app may sleep, in which case nothing is in flight.
    pub(crate) async fn reaped(&self, name: &str, vm: VmId) {
        let asked = async {
            while self.reap(name, vm, false).await == Reap::Busy {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let reaped = tokio::time::timeout(HANG, asked).await;
        assert!(reaped.is_ok(), "something is in flight for ever");
    }

    /// Asks to reap and gives the answer.
    pub(crate) async fn reap(&self, name: &str, vm: VmId, force: bool) -> Reap {
        let reaped = |heard: &FromGateway| match heard {
            FromGateway::Reaped { vm: of, .. } => *of == vm,
            _ => false,
        };
        let busy = |heard: &FromGateway| match heard {
            FromGateway::Busy { vm: of, .. } => *of == vm,
            _ => false,
        };
        let before = (self.count(reaped), self.count(busy));
        let app = key(name);
        self.say(ToGateway::Reap { app, vm, force });
        tokio::select! {
            () = self.heard(before.0 + 1, reaped) => Reap::Reaped,
            () = self.heard(before.1 + 1, busy) => Reap::Busy,
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Reap {
    Reaped,
    Busy,
}

pub(crate) fn awake(app: AppKey, vm: VmId) -> ToGateway {
    let phases = ["boot", "app"].map(|name| Phase {
        name: name.into(),
        us: 1_500,
    });
    ToGateway::Awake {
        app,
        vm,
        phases: phases.into(),
    }
}

fn packet_socket() -> OwnedFd {
    let flags = SocketFlags::CLOEXEC;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
}

async fn play(
    socket: PacketSocket,
    mut said: mpsc::UnboundedReceiver<ToGateway>,
    world: Arc<World>,
) {
    let mut buffer = Vec::new();
    loop {
        let heard = tokio::select! {
            Some(message) = said.recv() => {
                socket.send(&message, None).await.unwrap();
                continue;
            }
            // The gateway leaves when it was told to quit.
            heard = socket.receive::<FromGateway>(&mut buffer) => match heard {
                Ok((heard, _)) => heard,
                Err(_) => return,
            },
        };
        world.heard.lock().unwrap().push(heard.clone());
        world.news.notify_waiters();
        match heard {
            FromGateway::Wake { app, .. } => {
                let vm = world.wakes.lock().unwrap().get(&app).copied();
                if let Some(vm) = vm {
                    socket.send(&awake(app, vm), None).await.unwrap();
                }
            }
            FromGateway::Connect { id, vm } => connect(&socket, &world, id, vm).await,
            _ => {}
        }
    }
}

async fn connect(socket: &PacketSocket, world: &World, id: u64, vm: VmId) {
    let address = world.addresses.lock().unwrap().get(&vm).copied();
    let stream = match address {
        Some(address) => TcpStream::connect(address).await.ok(),
        None => None,
    };
    match stream {
        Some(stream) => {
            let fd = OwnedFd::from(stream.into_std().unwrap());
            let connected = ToGateway::Connected { id };
            socket.send(&connected, Some(&fd)).await.unwrap();
        }
        None => {
            let reason = "refused".into();
            let failed = ToGateway::ConnectFailed {
                id,
                reason,
                gone: false,
            };
            socket.send(&failed, None).await.unwrap();
        }
    }
}
