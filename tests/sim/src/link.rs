//! The link between a daemon and the gateway: messages take their time, and a break loses them.
//!
//! Run by each daemon; keeps the session up as the program's own link does: a hello each way, what
//! was queued before is dropped, control is told that the door is back.

use core::time::Duration;
use std::sync::{Arc, Mutex, PoisonError};

use spore_control::Control;
use spore_control::door::Door;
use spore_node::hypervisor::AgentStream;
use spore_node::hypervisor::sim::SimHost;
use spore_node::node::{Node, VmError};
use spore_wire::gateway::{FromGateway, ToGateway};
use spore_wire::generation::GENERATION;
use spore_wire::id::VmId;
use spore_wire::node::VmPhase;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::chance::Chance;
use crate::fuse::Fuse;
use crate::gateway::Gateway;
use crate::trace::Trace;
use crate::watch::Watcher;

/// Until a broken link is made again.
const RELINK_PAUSE: Duration = Duration::from_millis(50);

/// The longest way of a message, in milliseconds.
const LATENCY_MS: u64 = 4;

/// A connection to an app.
pub type Stream = Box<dyn AgentStream>;

/// From a daemon to the gateway.
pub(crate) enum Down {
    Message(ToGateway),
    Connected(u64, Stream),
}

/// How connections to apps are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wires {
    /// In memory: the same in every run.
    Memory,
    /// Sockets of the loopback, made by the node itself.
    Sockets,
}

/// The gateway of the moment, if there is one: what a daemon finds at its socket's path.
#[derive(Clone, Debug, Default)]
pub struct Address(Arc<Mutex<Option<Gateway>>>);

impl Address {
    /// Who listens.
    #[must_use]
    pub fn get(&self) -> Option<Gateway> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Replaces who listens; answers who did.
    pub fn set(&self, gateway: Option<Gateway>) -> Option<Gateway> {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        core::mem::replace(&mut held, gateway)
    }
}

/// Control's way to the gateway.
#[derive(Debug)]
pub struct DoorQueue {
    queue: mpsc::UnboundedSender<Down>,
    fuse: Arc<Fuse>,
    watcher: Watcher,
    trace: Trace,
}

impl Door for DoorQueue {
    fn send(&self, message: ToGateway) {
        if self.fuse.passes(|| format!("{message:?}")) {
            if let ToGateway::Reap {
                vm, force: true, ..
            } = &message
            {
                self.watcher.forced(*vm);
            }
            self.trace.say(format!("to the gateway: {message:?}"));
            drop(self.queue.send(Down::Message(message)));
        }
    }
}

impl core::fmt::Debug for Down {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Message(message) => write!(f, "{message:?}"),
            Self::Connected(id, _) => write!(f, "Connected {id}"),
        }
    }
}

/// Keeps the link up.
pub(crate) struct Link {
    pub(crate) address: Address,
    pub(crate) node: Node,
    pub(crate) host: SimHost,
    pub(crate) wires: Wires,
    pub(crate) fuse: Arc<Fuse>,
    pub(crate) trace: Trace,
    pub(crate) chance: Chance,
    queue: mpsc::UnboundedReceiver<Down>,
    answers: mpsc::UnboundedSender<Down>,
}

/// A queue for control, and the rest of what a link needs.
pub(crate) fn queue(fuse: &Arc<Fuse>, watcher: &Watcher, trace: &Trace) -> (Arc<DoorQueue>, Ends) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let door = DoorQueue {
        queue: sender.clone(),
        fuse: Arc::clone(fuse),
        watcher: watcher.clone(),
        trace: trace.clone(),
    };
    (Arc::new(door), Ends(receiver, sender))
}

/// The ends of a queue that the link has.
pub(crate) struct Ends(mpsc::UnboundedReceiver<Down>, mpsc::UnboundedSender<Down>);

impl Link {
    #[expect(
        clippy::too_many_arguments,
        reason = "each is one thing that a link touches"
    )]
    pub(crate) fn new(
        ends: Ends,
        address: Address,
        node: Node,
        host: SimHost,
        wires: Wires,
        fuse: Arc<Fuse>,
        trace: Trace,
        chance: Chance,
    ) -> Self {
        Self {
            address,
            node,
            host,
            wires,
            fuse,
            trace,
            chance,
            queue: ends.0,
            answers: ends.1,
        }
    }

    /// Until the daemon is over. `breaks` is asked for the token that breaks each session.
    pub(crate) async fn run(mut self, control: Arc<Control>, breaks: Breaks) {
        let fuse = Arc::clone(&self.fuse);
        let run = async {
            loop {
                if let Some(gateway) = self.address.get() {
                    let broken = breaks.next();
                    let session = self.session(&gateway, &control);
                    broken.run_until_cancelled(session).await;
                    self.trace.say("the link is down");
                }
                tokio::time::sleep(RELINK_PAUSE).await;
            }
        };
        tokio::select! {
            biased;
            () = fuse.is_over() => {}
            () = run => {}
        }
    }

    async fn session(&mut self, gateway: &Gateway, control: &Arc<Control>) {
        let (to_gateway, down) = mpsc::unbounded_channel();
        let (up, mut from_gateway) = mpsc::unbounded_channel();
        let generation = GENERATION;
        let hello = Down::Message(ToGateway::Hello { generation });
        drop(to_gateway.send(hello));
        gateway.accept(down, up);
        let (mut down_chance, mut up_chance) = (self.chance.clone(), self.chance.clone());
        self.chance.next();
        let Some(hello @ FromGateway::Hello { .. }) = from_gateway.recv().await else {
            return;
        };
        // What was queued before this session is told again behind its hello.
        while self.queue.try_recv().is_ok() {}
        self.trace.say(format!("from the gateway: {hello:?}"));
        control.door_event(hello);
        let context = (self.node.clone(), self.host.clone(), self.wires);
        let answers = self.answers.clone();
        let (fuse, trace) = (Arc::clone(&self.fuse), self.trace.clone());
        let send = async {
            while let Some(message) = self.queue.recv().await {
                tokio::time::sleep(down_chance.span(LATENCY_MS)).await;
                if to_gateway.send(message).is_err() {
                    return;
                }
            }
        };
        let receive = async {
            while let Some(message) = from_gateway.recv().await {
                tokio::time::sleep(up_chance.span(LATENCY_MS)).await;
                if !fuse.passes(|| format!("{message:?}")) {
                    return;
                }
                trace.say(format!("from the gateway: {message:?}"));
                if let FromGateway::Connect { id, vm } = message {
                    let (context, answers) = (context.clone(), answers.clone());
                    drop(tokio::spawn(async move {
                        let answer = connect(id, vm, context).await;
                        drop(answers.send(answer));
                    }));
                } else {
                    control.door_event(message);
                }
            }
        };
        tokio::select! {
            biased;
            () = send => {}
            () = receive => {}
        }
    }
}

async fn connect(id: u64, vm: VmId, (node, host, wires): (Node, SimHost, Wires)) -> Down {
    let failed =
        |reason: String, gone| Down::Message(ToGateway::ConnectFailed { id, reason, gone });
    match wires {
        Wires::Sockets => match node.connect(vm).await {
            Ok(stream) => Down::Connected(id, Box::new(stream)),
            Err(error @ (VmError::Unknown(_) | VmError::NotReady { .. })) => {
                failed(error.to_string(), true)
            }
            Err(error) => failed(error.to_string(), false),
        },
        Wires::Memory => match settled(&node, vm).await {
            Some(VmPhase::Ready) => match host.dial(vm) {
                Ok(stream) => Down::Connected(id, Box::new(stream)),
                Err(error) => failed(error.to_string(), false),
            },
            phase => failed(format!("it is {phase:?}"), true),
        },
    }
}

/// The phase of a VM once it is ready or will never be, as `Node::connect` waits for it.
async fn settled(node: &Node, vm: VmId) -> Option<VmPhase> {
    let mut watch = node.watch();
    loop {
        match node.status(vm).map(|status| status.phase) {
            Some(phase) if phase < VmPhase::Ready => {
                watch.next().await;
            }
            phase => return phase,
        }
    }
}

/// Breaks the session of the moment when it is told to.
#[derive(Clone, Debug, Default)]
pub struct Breaks(Arc<Mutex<CancellationToken>>);

impl Breaks {
    fn next(&self) -> CancellationToken {
        let token = CancellationToken::new();
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = token.clone();
        token
    }

    /// Breaks it.
    pub fn now(&self) {
        let held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.cancel();
    }
}
