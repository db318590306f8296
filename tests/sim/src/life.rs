//! One seeded life of a platform: a plan of faults, visitors and an owner, then calm, then a look.
//!
//! Run by the program and the tests. The last part is the proof: once nothing goes wrong any more
//! and a while has passed, journal, machine and control agree, what is idle sleeps, and whatever
//! may be woken wakes.

use core::time::Duration;
use std::collections::BTreeSet;

use anyhow::{Context as _, Result};
use spore_node::hypervisor::sim::FaultPlan;
use tokio::time::Instant;

use crate::chance::Chance;
use crate::link::Wires;
use crate::trace::{Print, Verdict};
use crate::visit::Body;
use crate::world::{BROKEN, CANARY, GOOD, World, spec};

/// The apps of every life.
pub(crate) const APPS: [&str; 4] = ["ant", "bee", "cat", "dog"];

/// How many things happen in a life.
const STEPS: u64 = 45;

/// The name of the secret that releases may ask for.
const SECRET: &str = "KEY";

/// The longest idle time of an app, in milliseconds.
const IDLE_MS: u64 = 15_000;

/// How long everything may take to come to rest: the longest of wake, drain, stop and repair, one
/// after the other.
const REST: Duration = Duration::from_secs(400);

/// Lives the life of `seed` on virtual time.
///
/// # Errors
/// When the simulation itself cannot go on.
pub fn live(seed: u64, print: Print) -> Result<Verdict> {
    on_virtual_time(async { Life::begin(seed, print).await?.whole().await })
}

/// Runs on a clock that moves only when everybody waits.
///
/// # Errors
/// The future's.
pub fn on_virtual_time<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .context("no runtime")?;
    runtime.block_on(future)
}

/// Whether apps are suspended in the life of this seed: in every fourth.
#[must_use]
pub fn suspends(seed: u64) -> bool {
    seed.is_multiple_of(4)
}

/// A life under way.
pub(crate) struct Life {
    pub(crate) world: World,
    pub(crate) chance: Chance,
    /// When the gateway comes back.
    gateway_back: Option<Instant>,
    /// Whether apps may keep what they hold in memory. Then files are written on threads, whose
    /// order no seed decides.
    suspends: bool,
}

impl Life {
    async fn begin(seed: u64, print: Print) -> Result<Self> {
        let mut chance = Chance::new(seed, "life");
        // A VM takes 288 MiB: from three at once, so that the host is full now and then.
        let memory_mib = 288 * (3 + chance.below(6));
        let mut world = World::new(seed, memory_mib, Wires::Memory, print).await?;
        world.start_daemon(None).await?;
        for app in APPS {
            let secret = format!("/apps/{app}/secrets/{SECRET}");
            let value = serde_json::json!({"value": format!("{CANARY}-{app}")});
            world.call("PUT", &secret, Some(&value)).await;
        }
        Ok(Self {
            world,
            chance,
            gateway_back: None,
            suspends: suspends(seed),
        })
    }

    async fn whole(mut self) -> Result<Verdict> {
        for app in APPS {
            self.deploy(app, &GOOD);
            tokio::time::sleep(self.chance.span(4000)).await;
        }
        for _step in 0..STEPS {
            self.step().await?;
            self.live_releases_are_good().await?;
        }
        self.calm().await?;
        self.rest().await?;
        self.visitors_notice_nothing().await?;
        self.rest().await?;
        self.failed_wakes_are_told().await?;
        self.rest().await?;
        self.secrets_stay_inside()?;
        Ok(self.world.trace.verdict())
    }

    fn plan(&mut self) -> FaultPlan {
        let chance = &mut self.chance;
        FaultPlan {
            prepare: chance.permille(80),
            boot: chance.permille(80),
            release: chance.permille(200),
            policy: chance.permille(40),
            slow: chance.permille(120),
            dies: chance.permille(200),
            silent: chance.permille(40),
            malformed: chance.permille(60),
            breaks: chance.permille(150),
        }
    }

    async fn step(&mut self) -> Result<()> {
        if self.gateway_back.is_some_and(|at| at <= Instant::now()) {
            self.gateway_back = None;
            self.world.start_gateway();
        }
        self.daemon_again().await?;
        let app = *self.chance.pick(&APPS);
        match self.chance.below(100) {
            0..=29 => self.burst(app),
            30..=37 => self.deploy(app, &GOOD),
            38..=43 => self.deploy(app, &BROKEN),
            44..=47 => self.order("POST", &format!("/apps/{app}/rollback"), true),
            48..=51 => self.order("POST", &format!("/apps/{app}/stop"), false),
            52..=53 => self.order("POST", &format!("/apps/{app}/restart"), false),
            54..=55 => self.order("POST", &format!("/apps/{app}/disable"), false),
            56..=58 => self.order("POST", &format!("/apps/{app}/enable"), false),
            59..=60 => self.order("POST", &format!("/apps/{app}/wake"), false),
            61..=62 => self.secret(app),
            63..=68 => self.vm_dies(),
            69..=73 => {
                let plan = self.plan();
                self.world.trace.say(format!("from now on: {plan:?}"));
                self.world.ground.host.set_plan(plan);
            }
            74..=76 => self.world.ground.host.set_plan(FaultPlan::default()),
            77..=82 => self.crash_soon(),
            83..=85 => {
                if let Some(daemon) = &self.world.daemon {
                    self.world.trace.count("link breaks");
                    daemon.breaks.now();
                }
            }
            86..=87 => self.end_gateway(),
            _ => {}
        }
        let pause = if self.chance.happens(150) {
            40_000
        } else {
            4_000
        };
        tokio::time::sleep(self.chance.span(pause)).await;
        Ok(())
    }

    fn burst(&mut self, app: &str) {
        let count = if self.chance.happens(150) {
            60
        } else {
            1 + self.chance.below(4)
        };
        for _request in 0..count {
            let slow = self.chance.happens(150);
            let body = Body {
                pieces: u32::from(slow) * 8,
                pause: self.chance.span(3_000),
            };
            self.world.visit(app, body);
        }
    }

    fn deploy(&mut self, app: &str, programs: &[&str]) {
        let program = *self.chance.pick(programs);
        let secrets: &[&str] = if self.chance.happens(400) {
            &[SECRET]
        } else {
            &[]
        };
        // One app may never sleep: there is always room for a second one and for its switch.
        let never = app == "ant" && self.chance.happens(300);
        let mode = match never {
            true => "never",
            false if self.suspends && self.chance.happens(700) => "suspend",
            false => "stop",
        };
        let idle_ms = 1_000 + self.chance.below(IDLE_MS - 1_000);
        let body = spec(program, idle_ms, mode, secrets);
        self.world.trace.say(format!("{app} is to run {program}"));
        let path = format!("/apps/{app}/releases");
        self.world.order("POST", &path, Some(&body));
    }

    fn order(&self, method: &str, path: &str, has_body: bool) {
        let empty = serde_json::json!({});
        self.world.order(method, path, has_body.then_some(&empty));
    }

    fn secret(&mut self, app: &str) {
        let number = self.chance.below(100);
        let value = serde_json::json!({"value": format!("{CANARY}-{app}-{number}")});
        let path = format!("/apps/{app}/secrets/{SECRET}");
        self.world.order("PUT", &path, Some(&value));
    }

    fn vm_dies(&mut self) {
        let host = &self.world.ground.host;
        let running: Vec<_> = host.running().into_keys().collect();
        if running.is_empty() {
            return;
        }
        let vm = *self.chance.pick(&running);
        if self.chance.happens(300) {
            self.world.trace.say(format!("the session of {vm} breaks"));
            host.break_session(vm);
        } else {
            self.world.trace.say(format!("{vm} crashes"));
            self.world.trace.count("vm crashes");
            host.crash_vm(vm);
        }
    }

    fn crash_soon(&mut self) {
        if let Some(daemon) = &self.world.daemon {
            let passes = 1 + self.chance.below(60);
            self.world
                .trace
                .say(format!("the daemon is to end in {passes} passes"));
            daemon.fuse.blow_after(u32::try_from(passes).unwrap_or(1));
        }
    }

    fn end_gateway(&mut self) {
        if self.gateway_back.is_none() {
            self.world.end_gateway();
            self.gateway_back = Some(Instant::now() + self.chance.span(5_000));
        }
    }

    /// A daemon that ended is started again, and may end on its way up.
    async fn daemon_again(&mut self) -> Result<()> {
        let over = |world: &World| world.daemon.as_ref().is_none_or(|of| of.fuse.is_blown());
        if !over(&self.world) {
            return Ok(());
        }
        self.world.end_daemon().await;
        self.world.end_daemon().await;
        let passes = self.chance.happens(300).then(|| 1 + self.chance.below(30));
        let passes = passes.map(|passes| u32::try_from(passes).unwrap_or(1));
        self.world.start_daemon(passes).await
    }

    /// A broken release never serves.
    async fn live_releases_are_good(&self) -> Result<()> {
        for app in APPS {
            let Some(record) = self.world.record(app).await? else {
                continue;
            };
            let Some(number) = record.release else {
                continue;
            };
            let release = self.world.release(app, number).await?;
            let program = release.map(|release| release.rules.command[0].clone());
            if program
                .as_deref()
                .is_none_or(|program| !GOOD.contains(&program))
            {
                let text = format!("{app}: release {number} is live and runs {program:?}");
                self.world.trace.violation(text);
            }
        }
        Ok(())
    }

    /// Nothing goes wrong any more; every app is enabled and has a release that works.
    async fn calm(&mut self) -> Result<()> {
        self.world.trace.say("calm");
        self.world.ground.host.set_plan(FaultPlan::default());
        if self.gateway_back.take().is_some() {
            self.world.start_gateway();
        }
        if let Some(daemon) = &self.world.daemon
            && !daemon.fuse.is_blown()
        {
            daemon.fuse.blow_after(u32::MAX);
        } else {
            self.world.end_daemon().await;
            self.world.start_daemon(None).await?;
        }
        self.world.visitors_leave().await;
        // What is being tried is decided, and breakers have run out.
        tokio::time::sleep(REST).await;
        for app in APPS {
            self.world
                .call("POST", &format!("/apps/{app}/enable"), None)
                .await;
            let record = self.world.record(app).await?;
            if record.is_none_or(|record| record.release.is_none()) {
                self.deploy(app, &GOOD);
                tokio::time::sleep(Duration::from_secs(120)).await;
                let record = self.world.record(app).await?;
                if record.is_none_or(|record| record.release.is_none()) {
                    let text = format!("{app}: a good release does not go live in calm");
                    self.world.trace.violation(text);
                }
            }
        }
        Ok(())
    }

    /// After a while: what may sleep sleeps, and everybody agrees on what runs.
    async fn rest(&self) -> Result<()> {
        tokio::time::sleep(REST).await;
        let world = &self.world;
        let running = world.ground.watcher.running();
        let mut real = BTreeSet::new();
        for app in APPS {
            let vms = running.get(app).cloned().unwrap_or_default();
            real.extend(vms.iter().map(|(vm, _)| *vm));
            let record = world.record(app).await?;
            if record
                .as_ref()
                .is_some_and(|record| record.deploying.is_some())
            {
                world.trace.violation(format!("{app}: a deploy never ends"));
            }
            let sleeps = self.sleeps(app).await?;
            if sleeps && !vms.is_empty() {
                world
                    .trace
                    .violation(format!("{app}: idle, and {vms:?} run"));
            }
            let mut believed = world.believed(app);
            believed.sort_unstable();
            let mut has: Vec<_> = vms.iter().map(|(vm, _)| *vm).collect();
            has.sort_unstable();
            if believed != has {
                let text = format!("{app}: control believes {believed:?}, there are {has:?}");
                world.trace.violation(text);
            }
        }
        let journal: BTreeSet<_> = world.journal()?.into_iter().collect();
        let all: BTreeSet<_> = world.ground.host.running().into_keys().collect();
        if journal != all || all != real {
            let text = format!("the journal has {journal:?}, {all:?} run, {real:?} are owned");
            world.trace.violation(text);
        }
        if real.is_empty() && !world.ground.host.leftovers().is_empty() {
            let left = world.ground.host.leftovers();
            world.trace.violation(format!("there is left: {left:?}"));
        }
        Ok(())
    }

    pub(crate) async fn sleeps(&self, app: &str) -> Result<bool> {
        let number = self.world.record(app).await?.and_then(|of| of.release);
        let Some(number) = number else {
            return Ok(true);
        };
        let release = self.world.release(app, number).await?;
        Ok(release.is_none_or(|release| release.rules.sleeps))
    }

    /// No file of the platform holds a secret.
    fn secrets_stay_inside(&self) -> Result<()> {
        let mut folders = vec![self.world.ground.folder.path().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(&folder)? {
                let path = entry?.path();
                if path.is_dir() {
                    folders.push(path);
                } else if holds(&std::fs::read(&path)?, CANARY.as_bytes()) {
                    let text = format!("a secret is in {}", path.display());
                    self.world.trace.violation(text);
                }
            }
        }
        Ok(())
    }
}

fn holds(bytes: &[u8], wanted: &[u8]) -> bool {
    bytes.windows(wanted.len()).any(|window| window == wanted)
}
