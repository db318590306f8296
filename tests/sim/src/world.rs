//! A whole platform: machine, store, gateway, the daemon of the moment, visitors and an owner.
//!
//! Used by `life.rs` and by tests with a story of their own. Everything random comes in from
//! outside; the world only does and checks.

use core::time::Duration;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use spore_api::name::AccountName;
use spore_control::converge::AppRef;
use spore_control::secrets::KeyFile;
use spore_control::store::memory::MemoryStore;
use spore_control::store::record::app::{AppRecord, app_key};
use spore_control::store::record::image::{ImageOrigin, ImageRecord, image_key};
use spore_control::store::record::release::{ReleaseRecord, release_key};
use spore_control::store::record::{encode, load};
use spore_control::store::{SharedStore, Transaction};
use spore_node::hypervisor::sim::{AppScript, SimHost};
use spore_wire::id::{ImageId, VmId};
use tokio::time::Instant;

use crate::chance::{Chance, Ids, SimClock};
use crate::daemon::{BASE, Daemon, Ground, Told, timing};
use crate::fuse::Fuse;
use crate::gateway::Gateway;
use crate::link::{Address, Wires};
use crate::trace::{Print, Trace};
use crate::visit::{Answer, Body, tag};
use crate::watch::Watcher;

/// Programs that become ready and serve.
pub const GOOD: [&str; 3] = ["/bin/quick", "/bin/slow", "/bin/awake-a-while"];

/// Programs that never become ready.
pub const BROKEN: [&str; 4] = ["/none", "/bin/deaf", "/bin/ends", "/bin/late"];

/// A secret's value, which no file may hold.
pub const CANARY: &str = "canary-of-the-simulation";

/// What a request may take beyond its own body and the longest wait for a wake.
const SLACK: Duration = Duration::from_secs(20);

/// The platform.
#[derive(Debug)]
pub struct World {
    /// What outlives daemons.
    pub ground: Ground,
    /// The daemon, unless it is down.
    pub daemon: Option<Daemon>,
    /// The story.
    pub trace: Trace,
    seed: u64,
    daemons: u64,
    visits: Arc<Visits>,
}

/// Visitors' books.
#[derive(Debug, Default)]
struct Visits {
    begun: AtomicU64,
    answered: AtomicU64,
}

impl World {
    /// A platform without apps, with a gateway and without a daemon.
    ///
    /// # Errors
    /// When the host has no temp folder.
    pub async fn new(seed: u64, memory_mib: u64, wires: Wires, print: Print) -> Result<Self> {
        let trace = Trace::new(print);
        let host = SimHost::new(seed);
        for (program, script) in scripts() {
            host.set_script(program, script);
        }
        // Snapshots are written through to the disk, which a host that never goes down waits for
        // in vain.
        let folder = tempfile::tempdir_in("/dev/shm").or_else(|_no_such| tempfile::tempdir());
        let folder = folder.context("no temp folder")?;
        let store: SharedStore = Arc::new(MemoryStore::default());
        let keys = KeyFile::open_or_make(&folder.path().join("key"), &*store).await?;
        let image = ImageRecord {
            id: ImageId::from_hash([1; 32]),
            bytes: 10,
            created_at_ms: 0,
            origin: ImageOrigin::Base,
        };
        let key = image_key(&AccountName::default_account(), &"debian/base".parse()?);
        let made = Transaction::default().put(key, encode(&image));
        store.commit(made).await?;
        let address = Address::default();
        address.set(Some(Gateway::new(trace.clone())));
        let ground = Ground {
            watcher: Watcher::new(host.clone(), trace.clone()),
            host,
            store,
            keys: Arc::new(keys),
            folder,
            address,
            clock: Arc::new(SimClock::new()),
            ids: Arc::new(Ids::new(seed)),
            trace: trace.clone(),
            memory_mib,
            wires,
        };
        Ok(Self {
            ground,
            daemon: None,
            trace,
            seed,
            daemons: 0,
            visits: Arc::default(),
        })
    }

    /// Starts a daemon; with `passes`, its fuse blows after so many, perhaps on its way up.
    ///
    /// # Errors
    /// When it does not start although its fuse is whole.
    pub async fn start_daemon(&mut self, passes: Option<u32>) -> Result<()> {
        self.daemons += 1;
        let fuse = Arc::new(Fuse::new(self.trace.clone(), self.ground.watcher.clone()));
        if let Some(passes) = passes {
            fuse.blow_after(passes);
        }
        let chance = Chance::new(self.seed ^ self.daemons, "link");
        self.daemon = Daemon::start(&self.ground, fuse, chance).await?;
        Ok(())
    }

    /// Ends the daemon this instant.
    pub async fn end_daemon(&mut self) {
        if let Some(daemon) = self.daemon.take() {
            self.trace.say("the daemon ends");
            self.trace.count("daemon ends");
            daemon.end().await;
        }
    }

    /// The gateway's process ends; another listens when this is called again with a new one.
    pub fn end_gateway(&self) {
        if let Some(gateway) = self.ground.address.set(None) {
            self.trace.say("the gateway ends");
            self.trace.count("gateway ends");
            gateway.kill();
        }
    }

    /// A new gateway listens.
    pub fn start_gateway(&self) {
        let before = self
            .ground
            .address
            .set(Some(Gateway::new(self.trace.clone())));
        drop(before);
    }

    /// A visitor sends a request; nobody waits for its answer but the books.
    pub fn visit(&self, app: &str, body: Body) {
        let Some(gateway) = self.ground.address.get() else {
            return;
        };
        let visitor = self.visitor(gateway, app, body);
        drop(tokio::spawn(async move {
            visitor.await;
        }));
    }

    /// A visitor sends a request and waits.
    pub async fn ask(&self, app: &str) -> Option<Answer> {
        self.ask_with(app, Body::NONE).await
    }

    /// A visitor sends a request with a body and waits.
    pub fn ask_with(
        &self,
        app: &str,
        body: Body,
    ) -> impl Future<Output = Option<Answer>> + Send + use<> {
        let gateway = self.ground.address.get();
        let visitor = gateway.map(|gateway| self.visitor(gateway, app, body));
        async move { visitor?.await }
    }

    fn visitor(
        &self,
        gateway: Gateway,
        app: &str,
        body: Body,
    ) -> impl Future<Output = Option<Answer>> + Send + use<> {
        let number = self.visits.begun.fetch_add(1, Ordering::Relaxed);
        let (app, trace) = (app.to_owned(), self.trace.clone());
        let (visits, watcher) = (Arc::clone(&self.visits), self.ground.watcher.clone());
        trace.say(format!("request {number} to {app}"));
        async move {
            let limit = timing().wake_deadline + body.pause * body.pieces + SLACK;
            let host = format!("{app}.{BASE}");
            let serve = gateway.serve(&host, body);
            let Ok(answer) = tokio::time::timeout(limit, serve).await else {
                trace.violation(format!("request {number} to {app} was lost"));
                return None;
            };
            visits.answered.fetch_add(1, Ordering::Relaxed);
            trace.say(format!("request {number} to {app}: {answer:?}"));
            trace.count(kind(&answer));
            if let Answer::Served(text) = &answer {
                let owner = tag(text).and_then(|vm| watcher.owner(vm));
                if owner.as_ref().is_none_or(|owner| owner.app != app) {
                    trace.violation(format!("{app} was answered by {owner:?} ({text})"));
                }
            }
            if let Some(vm) = answer.failed_in().filter(|vm| !watcher.may_fail(*vm)) {
                trace.violation(format!(
                    "request {number} to {app} failed in {vm}, unharmed"
                ));
            }
            Some(answer)
        }
    }

    /// Waits until every visitor has an answer.
    pub async fn visitors_leave(&self) {
        let open = || {
            let begun = self.visits.begun.load(Ordering::Relaxed);
            begun - self.visits.answered.load(Ordering::Relaxed)
        };
        let until = Instant::now() + Duration::from_secs(300);
        while open() > 0 && Instant::now() < until {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        if open() > 0 {
            self.trace
                .violation(format!("{} requests were never answered", open()));
        }
    }

    /// The owner calls the API, beside everything else; the answer goes into the story.
    pub fn order(&self, method: &str, path: &str, body: Option<&Value>) {
        if let Some(daemon) = &self.daemon {
            let (call, trace) = (daemon.call(method, path, body), self.trace.clone());
            let what = format!("{method} {path}");
            trace.say(format!("owner: {what}"));
            drop(tokio::spawn(async move {
                let told = call.await;
                tell(&trace, &what, told.as_ref());
            }));
        }
    }

    /// The owner calls the API and waits.
    pub async fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Option<Told> {
        let daemon = self.daemon.as_ref()?;
        let told = daemon.call(method, path, body).await;
        tell(&self.trace, &format!("{method} {path}"), told.as_ref());
        told
    }

    /// An app's record.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn record(&self, app: &str) -> Result<Option<AppRecord>> {
        let key = app_key(&AccountName::default_account(), &app.parse()?);
        let stored = load::<AppRecord>(&*self.ground.store, &key).await?;
        Ok(stored.map(|stored| stored.record))
    }

    /// A release's record.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn release(&self, app: &str, number: u64) -> Result<Option<ReleaseRecord>> {
        let key = release_key(&AccountName::default_account(), &app.parse()?, number);
        let stored = load::<ReleaseRecord>(&*self.ground.store, &key).await?;
        Ok(stored.map(|stored| stored.record))
    }

    /// VMs that the journal names.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn journal(&self) -> Result<Vec<VmId>> {
        let mut vms = Vec::new();
        for entry in std::fs::read_dir(self.ground.folder.path().join("run/vms"))? {
            let name = entry?.file_name();
            vms.extend(name.to_str().and_then(|name| name.parse::<VmId>().ok()));
        }
        vms.sort_unstable();
        Ok(vms)
    }

    /// The VMs that control believes in.
    #[must_use]
    pub fn believed(&self, app: &str) -> Vec<VmId> {
        let (Some(daemon), Ok(name)) = (&self.daemon, app.parse()) else {
            return Vec::new();
        };
        let app = AppRef {
            account: AccountName::default_account(),
            app: name,
        };
        daemon.control.converge().with_life(&app, |life, _| {
            life.accepted().map(|(vm, _since)| vm).collect()
        })
    }
}

fn tell(trace: &Trace, what: &str, told: Option<&Told>) {
    match told {
        None => trace.note(format!("owner: {what}: the daemon ended")),
        Some(told) => {
            let status = told.status.as_u16();
            let text = match told.body.get("message").and_then(Value::as_str) {
                Some(message) => message.to_owned(),
                None => told.body["state"].to_string(),
            };
            trace.note(format!("owner: {what}: {status} {text}"));
            if told.status.is_server_error() && told.body["code"] == json!("internal") {
                trace.count("internal errors");
            }
        }
    }
}

/// The name of an answer's kind.
const fn kind(answer: &Answer) -> &'static str {
    match answer {
        Answer::Served(_) => "served",
        Answer::HostUnknown => "host unknown",
        Answer::TableMissing => "table missing",
        Answer::Disabled => "disabled",
        Answer::NoRelease => "no release",
        Answer::Refused(_) => "refused",
        Answer::WakeSlow => "wake slow",
        Answer::ConnectFailed(_) => "connect failed",
        Answer::ConnectSlow => "connect slow",
        Answer::VmDied(_) => "vm died",
        Answer::AppClosed(_) => "app closed",
        Answer::Cut => "cut",
    }
}

/// What a release asks for.
#[must_use]
pub fn spec(program: &str, idle_ms: u64, mode: &str, secrets: &[&str]) -> Value {
    json!({"spec": {
        "image": "debian/base",
        "command": [program],
        "port": 8000,
        "resources": {"cpus": 1, "memory_mib": 256, "disk_mib": 64},
        "idle": {"after_ms": idle_ms, "mode": mode},
        "health": {"timeout_ms": 10_000},
        "secrets": {"names": secrets, "files": []},
    }})
}

fn scripts() -> Vec<(&'static str, AppScript)> {
    let quiet = AppScript {
        lines: Vec::new(),
        ..AppScript::default()
    };
    let ready = |ms| AppScript {
        ready_after: Some(Duration::from_millis(ms)),
        ..quiet.clone()
    };
    let ends = AppScript {
        ready_after: None,
        ends_after: Some(Duration::from_millis(10)),
        ..quiet.clone()
    };
    let deaf = AppScript {
        ready_after: None,
        ..quiet.clone()
    };
    let awake = AppScript {
        keep_awake_ms: Some(40_000),
        ..quiet.clone()
    };
    vec![
        ("/bin/quick", ready(200)),
        ("/bin/slow", ready(6_000)),
        ("/bin/awake-a-while", awake),
        ("/bin/deaf", deaf),
        ("/bin/ends", ends),
        ("/bin/late", ready(30_000)),
    ]
}
