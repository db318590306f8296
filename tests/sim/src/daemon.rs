//! One daemon: node and control over what outlives them, and the link to the gateway.
//!
//! Started by the world, again and again, on the same store, machine and folder. It ends by its
//! fuse and never says good-bye.

use core::time::Duration;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use axum::Router;
use axum::body::Body;
use http::{Request, StatusCode};
use http_body_util::BodyExt as _;
use serde_json::Value;
use spore_api::name::AccountName;
use spore_control::api::{Caller, CallerBy};
use spore_control::config::Timing;
use spore_control::secrets::KeyProvider;
use spore_control::store::SharedStore;
use spore_control::{Control, Parts};
use spore_node::config::{Config as NodeConfig, Images, KillPoints};
use spore_node::hypervisor::sim::SimHost;
use spore_node::node::Node;
use spore_wire::id::ImageId;
use tower::ServiceExt as _;

use crate::chance::{Chance, Ids, SimClock};
use crate::fuse::{Fuse, FusedStore};
use crate::link::{Address, Breaks, Link, Wires, queue};
use crate::nodes::SimNodes;
use crate::trace::Trace;
use crate::watch::Watcher;

/// The domain of every app.
pub const BASE: &str = "localhost";

/// What daemons are made of, and what outlives them.
pub struct Ground {
    /// The machine.
    pub host: SimHost,
    /// The truth.
    pub store: SharedStore,
    /// The outermost key.
    pub keys: Arc<dyn KeyProvider>,
    /// Where journals and logs are.
    pub folder: tempfile::TempDir,
    /// Where the gateway is.
    pub address: Address,
    /// The time of day.
    pub clock: Arc<SimClock>,
    /// Ids, never used twice.
    pub ids: Arc<Ids>,
    /// What always holds.
    pub watcher: Watcher,
    /// The story.
    pub trace: Trace,
    /// Memory that VMs may have.
    pub memory_mib: u64,
    /// How apps are connected to.
    pub wires: Wires,
}

impl core::fmt::Debug for Ground {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Ground")
    }
}

/// A daemon that runs.
#[derive(Debug)]
pub struct Daemon {
    /// Its end.
    pub fuse: Arc<Fuse>,
    /// Its node.
    pub node: Node,
    /// Its control.
    pub control: Arc<Control>,
    /// Breaks its link.
    pub breaks: Breaks,
    router: Router,
}

#[derive(Debug)]
struct AnyImage;

impl Images for AnyImage {
    fn path(&self, id: &ImageId) -> Option<std::path::PathBuf> {
        Some(Path::new("/images").join(id.to_string()))
    }
}

/// What the API answered.
#[derive(Clone, Debug)]
pub struct Told {
    /// Its status.
    pub status: StatusCode,
    /// Its body.
    pub body: Value,
}

impl Daemon {
    /// Starts one; `None` when its fuse blew on the way.
    ///
    /// # Errors
    /// When it cannot start although nothing went wrong.
    pub async fn start(ground: &Ground, fuse: Arc<Fuse>, chance: Chance) -> Result<Option<Self>> {
        let mut opened = None;
        let daemon = {
            let start = Self::begin(ground, &fuse, chance, &mut opened);
            tokio::select! {
                biased;
                () = fuse.is_over() => None,
                daemon = start => Some(daemon),
            }
        };
        if daemon.is_none()
            && let Some(node) = opened
        {
            node.detach().await;
        }
        daemon.transpose()
    }

    async fn begin(
        ground: &Ground,
        fuse: &Arc<Fuse>,
        chance: Chance,
        opened: &mut Option<Node>,
    ) -> Result<Self> {
        let trace = ground.trace.clone();
        let folder = ground.folder.path();
        let (run, log) = (folder.join("run"), folder.join("log"));
        let mut config = NodeConfig::new(run, log, folder.join("snapshots"), ground.memory_mib);
        config.capacity.memory_reserve_mib = 0;
        config.memory = Arc::new(ground.host.clone());
        config.kill_points = Arc::clone(fuse) as Arc<dyn KillPoints>;
        config.clock = Arc::clone(&ground.clock) as Arc<dyn spore_node::clock::Clock>;
        config.chance = Arc::clone(&ground.ids) as _;
        let hypervisor = Arc::new(ground.host.hypervisor());
        let open = Node::open(config, hypervisor, Arc::new(AnyImage));
        let (node, adoption) = open.await.context("the node does not open")?;
        *opened = Some(node.clone());
        trace.say(format!(
            "the node adopted {:?}, released {:?}, swept {:?}",
            adoption.adopted, adoption.released, adoption.swept.removed
        ));
        for _vm in &adoption.adopted {
            trace.count("adopted");
        }
        let (door, ends) = queue(fuse, &ground.watcher, &trace);
        let nodes = SimNodes {
            node: node.clone(),
            fuse: Arc::clone(fuse),
            store: Arc::clone(&ground.store),
            watcher: ground.watcher.clone(),
            trace: trace.clone(),
        };
        let parts = Parts {
            store: Arc::new(FusedStore {
                store: Arc::clone(&ground.store),
                fuse: Arc::clone(fuse),
            }),
            nodes: Arc::new(nodes),
            door,
            keys: Arc::clone(&ground.keys),
            clock: Arc::clone(&ground.clock) as _,
            chance: Arc::clone(&ground.ids) as _,
        };
        let control = Control::start(config_of(), parts).await;
        let control = Arc::new(control.context("control does not start")?);
        let breaks = Breaks::default();
        let link = Link::new(
            ends,
            ground.address.clone(),
            node.clone(),
            ground.host.clone(),
            ground.wires,
            Arc::clone(fuse),
            trace.clone(),
            chance,
        );
        drop(tokio::spawn(link.run(Arc::clone(&control), breaks.clone())));
        trace.say("the daemon is up");
        Ok(Self {
            fuse: Arc::clone(fuse),
            node,
            router: control.router(),
            control,
            breaks,
        })
    }

    /// It ends this instant.
    pub async fn end(self) {
        self.fuse.blow();
        self.node.detach().await;
    }

    /// Calls the API as the owner; `None` when the daemon ended first.
    pub fn call(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> impl Future<Output = Option<Told>> + Send + use<> {
        let text = body.map(Value::to_string);
        let builder = Request::builder()
            .method(method)
            .uri(format!("/api/v1{path}"))
            .header("host", "127.0.0.1:8889")
            .extension(Caller {
                account: AccountName::default_account(),
                by: CallerBy::Socket { uid: 0 },
            });
        let request = match text {
            None => builder.body(Body::empty()),
            Some(text) => builder
                .header("content-type", "application/json")
                .header("content-length", text.len())
                .body(Body::from(text)),
        };
        let (router, fuse) = (self.router.clone(), Arc::clone(&self.fuse));
        let call = async move {
            let Ok(response) = router.oneshot(request.ok()?).await;
            let status = response.status();
            let bytes = response.into_body().collect().await.ok()?.to_bytes();
            let body = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
            Some(Told { status, body })
        };
        async move {
            tokio::select! {
                biased;
                () = fuse.is_over() => None,
                told = call => told,
            }
        }
    }
}

fn config_of() -> spore_control::config::Config {
    spore_control::config::Config {
        base: BASE.to_owned(),
        gateway: core::net::SocketAddr::from(([127, 0, 0, 1], 8080)),
        public: ("http", 8080),
        api_port: 8889,
        api_hosts: Vec::new(),
        token: "a token of a simulation".to_owned().into(),
        version: "simulated".to_owned(),
        warnings: Vec::new(),
        timing: timing(),
        image_bytes_max: u64::MAX,
        waiters_max: 40,
    }
}

/// Policy as shipped, but for a shorter longest pause: a run waits for it more than once.
#[must_use]
pub fn timing() -> Timing {
    Timing {
        backoff_most: Duration::from_secs(20),
        ..Timing::default()
    }
}
