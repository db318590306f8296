//! A daemon that is killed at every instant between two effects, on real VMs.
//!
//! Two lanes, each with a host of its own, take the kill points one after the other: the program
//! `node_daemon.rs` lives a VM's life and kills itself at the point, then the same program without
//! a point takes over. Whether the VM must go on is read from the journal and the process that the
//! first one left; a life that goes on is the same guest with the same app in its memory.

use std::collections::VecDeque;
use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::process::Signal;
use spore_node::hypervisor::Identity;
use spore_node::hypervisor::process::start_time;
use spore_node::journal::Journal;
use spore_node::vm::state::{Milestone, VmEffect};
use spore_wire::guest::Readiness;
use spore_wire::id::{ImageId, SnapshotId, VmId};
use spore_wire::node::{Owner, Process, Purpose, Resources, Source, StartVm, VmPhase};

use crate::driver::is_kvm;
use crate::guest::Then;
use crate::host::{HANG, TestHost, base_image, new_id};
use crate::orders::{Answer, End, Orders, Point, Room, Sighting, Task};

/// A server that says a number made at its start, how often it was asked, and how often an app was
/// started in this guest.
const APP: &str = r#"
open(my $random, "<", "/dev/urandom"); read($random, my $bytes, 8);
open(my $starts, "+>>", "/tmp/starts"); syswrite($starts, "x\n");
seek($starts, 0, 0); my $started = () = <$starts>;
socket(my $server, PF_INET, SOCK_STREAM, 0);
setsockopt($server, SOL_SOCKET, SO_REUSEADDR, 1);
bind($server, sockaddr_in($ENV{PORT}, INADDR_ANY)) or die "bind: $!";
listen($server, 16);
for (my $count = 1; accept(my $client, $server); $count++) {
    syswrite($client, unpack("H*", $bytes) . " $count $started\n");
}
"#;

/// Kill points at which a VM goes on: behind the journal of its identity, before it is ended.
const GOING_ON_MIN: usize = 20 + 5 + 8 + 4;

/// Kill points that are under way at once.
const LANES: usize = 2;

/// What a lane needs, besides its host.
struct World {
    initramfs: PathBuf,
    image: PathBuf,
}

/// What became of the VM at one kill point.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    WentOn,
    Removed,
}

#[test]
fn daemon_sigkill_at_every_effect_readopts_the_same_vm() {
    let mut hosts = Vec::new();
    while hosts.len() < LANES {
        let Some(host) = TestHost::new(Then::Wait) else {
            return;
        };
        hosts.push(host);
    }
    let deps = hosts[0].config.kernel.ancestors().nth(2).unwrap();
    let world = World {
        initramfs: deps.join("guest/initramfs.cpio"),
        image: base_image(deps).unwrap_or_default(),
    };
    if !world.initramfs.is_file() || !world.image.is_file() {
        println!("SKIPPED: no initramfs or base image: run `make deps`");
        return;
    }
    // A farewell is met only by a VM that fails and lives: the simulated machine has such.
    let points = VmEffect::ALL
        .into_iter()
        .filter(|effect| *effect != VmEffect::Farewell)
        .flat_map(|effect| [(effect, Point::Before), (effect, Point::After)]);
    let todo = Mutex::new(points.collect::<VecDeque<_>>());
    let total = todo.lock().unwrap().len();
    let fates: Vec<Fate> = thread::scope(|scope| {
        let lanes: Vec<_> = hosts
            .iter()
            .map(|host| scope.spawn(|| lane(host, &world, &todo)))
            .collect();
        let done = lanes.into_iter().map(|lane| lane.join().unwrap());
        done.flatten().collect()
    });
    assert_eq!(fates.len(), total);
    let going_on = fates.iter().filter(|fate| **fate == Fate::WentOn).count();
    println!("{total} kill points, the same VM went on at {going_on}");
    assert!(going_on >= GOING_ON_MIN, "{going_on} of {total}");
}

fn lane(host: &TestHost, world: &World, todo: &Mutex<VecDeque<(VmEffect, Point)>>) -> Vec<Fate> {
    let mut fates = Vec::new();
    loop {
        let next = todo
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front();
        let Some((effect, point)) = next else {
            return fates;
        };
        let fate = die_at(host, world, effect, point);
        println!("{} {point:?}: {fate:?}", effect.name());
        fates.push(fate);
    }
}

/// One kill point: the death, the next daemon, and what is left then.
fn die_at(host: &TestHost, world: &World, effect: VmEffect, point: Point) -> Fate {
    let what = format!("{} {point:?}", effect.name());
    let vm = new_id();
    let task = Task::DieAt {
        start: Box::new(start(vm, effect)),
        effect: effect.name().to_owned(),
        point,
        end: match effect {
            VmEffect::Journal(Milestone::EndingFailed) => End::Crash,
            effect if effect.is_of_suspends() => End::Suspend,
            effect if effect.is_of_captures() => End::Take,
            _ => End::Stop,
        },
    };
    let (first, status, log) = run_daemon(host, world, task);
    let died = status.signal() == Some(Signal::KILL.as_raw());
    assert!(died, "{what}: {status}\n{log}");

    let record = Journal::open(&node_runtime(host), if is_kvm() { "kvm" } else { "qemu" })
        .and_then(|journal| journal.read_all())
        .unwrap()
        .remove(&vm)
        .and_then(Result::ok);
    let milestone = record.as_ref().map(|record| record.milestone);
    let identity = record.and_then(|record| record.identity);
    let lives = identity.as_ref().is_some_and(is_alive);
    let like = Box::new(counter(vm));
    let (second, status, log) = run_daemon(host, world, Task::GoOn { like });
    // One that was being suspended is its snapshot, if that was whole, or itself.
    let is_suspended = second.suspended > 0;
    let goes_on = lives && !is_suspended && milestone.is_some_and(is_adopted);
    let journaled = format!("{what}, journaled {milestone:?}, alive: {lives}");
    assert!(status.success(), "{journaled}: {status}\n{log}");
    assert_eq!(second.adopted, goes_on, "{journaled}\n{log}");
    assert_eq!(left(host), Vec::<String>::new(), "{journaled}\n{log}");
    if !goes_on && !is_suspended {
        return Fate::Removed;
    }
    assert_eq!(second.ended, Some(VmPhase::Stopped), "{journaled}\n{log}");
    if milestone == Some(Milestone::Draining) {
        // It was on its way to its end, which it reached.
        return Fate::Removed;
    }
    if first.boot_id.is_some() && goes_on {
        assert_eq!(second.boot_id, first.boot_id, "{journaled}");
    }
    let answer = second.answer.unwrap();
    assert_eq!(answer.starts, 1, "{journaled}: {answer:?}");
    if let Some(Answer { token, count, .. }) = first.answer {
        assert_eq!(answer.token, token, "{journaled}");
        assert!(
            answer.count > count,
            "{journaled}: {answer:?} after {count}"
        );
    }
    Fate::WentOn
}

/// What a next daemon must make of a VM that runs and is journaled so.
const fn is_adopted(milestone: Milestone) -> bool {
    matches!(
        milestone,
        Milestone::Booted
            | Milestone::Forked
            | Milestone::Running
            | Milestone::Thawed
            | Milestone::Open
            | Milestone::Started
            | Milestone::Sealing
            | Milestone::Draining
    )
}

fn is_alive(identity: &Identity) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", identity.pid)).unwrap_or_default();
    let zombie = stat
        .rsplit_once(')')
        .is_some_and(|(_, rest)| rest.trim_start().starts_with('Z'));
    !zombie && start_time(identity.pid).is_ok_and(|time| time == identity.start_time)
}

fn node_runtime(host: &TestHost) -> PathBuf {
    host.runtime("../node")
}

/// What the host has besides empty folders, now that no daemon runs.
fn left(host: &TestHost) -> Vec<String> {
    let mut left = host.left();
    left.extend(host.namespaces());
    for entry in fs::read_dir(node_runtime(host).join("vms")).unwrap() {
        left.push(entry.unwrap().path().display().to_string());
    }
    left
}

/// Runs the daemon to its end; gives what it saw, how it ended and what it logged.
fn run_daemon(
    host: &TestHost,
    world: &World,
    task: Task,
) -> (Sighting, std::process::ExitStatus, String) {
    let root = host.runtime("..");
    let room = &host.config.room;
    let orders = Orders {
        room: Room {
            runtime_dir: room.runtime_dir.clone(),
            data_dir: room.data_dir.clone(),
            cgroup_parent: room.cgroup_parent.clone(),
            uid_first: room.uid_first,
            uid_count: room.uid_count,
        },
        kernel: host.config.kernel.clone(),
        initramfs: world.initramfs.clone(),
        launcher: env!("CARGO_BIN_EXE_spore-node-jail").into(),
        runtime: node_runtime(host),
        logs: root.join("logs"),
        image: world.image.clone(),
        task,
        sighting: root.join("sighting.json"),
    };
    fs::create_dir_all(host.runtime("")).unwrap();
    let path = root.join("orders.json");
    fs::write(&path, serde_json::to_vec(&orders).unwrap()).unwrap();
    fs::write(&orders.sighting, b"{\"adopted\":false}").unwrap();
    let log = root.join("daemon.log");
    let mut daemon = Command::new(env!("CARGO_BIN_EXE_spore-node-daemon"))
        .arg(&path)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    let pause = Duration::from_millis(10);
    let mut waited = Duration::ZERO;
    let status = loop {
        if let Some(status) = daemon.try_wait().unwrap() {
            break status;
        }
        if waited > HANG {
            daemon.kill().unwrap();
            break daemon.wait().unwrap();
        }
        thread::sleep(pause);
        waited += pause;
    };
    let sighting = serde_json::from_slice(&fs::read(&orders.sighting).unwrap()).unwrap();
    let log = fs::read(&log).unwrap();
    (sighting, status, String::from_utf8_lossy(&log).into_owned())
}

/// A VM that meets `effect`: what only forks have is met by a fork.
fn start(vm: VmId, effect: VmEffect) -> StartVm {
    StartVm {
        source: match effect.is_of_forks() {
            true => Source::Snapshot(SnapshotId::from_bytes([1; 16])),
            false => Source::Boot,
        },
        ..counter(vm)
    }
}

/// A VM whose app is [`APP`].
pub(crate) fn counter(vm: VmId) -> StartVm {
    StartVm {
        vm,
        owner: Owner {
            account: "me".to_owned(),
            app: "counter".to_owned(),
            release: 1,
            secrets_version: 0,
        },
        image: ImageId::from_hash([1; 32]),
        folder: None,
        resources: Resources {
            cpus: 1,
            memory_mib: 128,
            disk_mib: 64,
        },
        process: Some(Process {
            command: ["perl", "-MSocket", "-e", APP].map(str::to_owned).to_vec(),
            environment: Vec::new(),
            secret_environment: Vec::new(),
            secret_files: Vec::new(),
            user: None,
            port: 8000,
            ready: Readiness::Port,
            ready_timeout_ms: 300_000,
            stop_grace_ms: 2000,
            has_hooks: false,
        }),
        egress: Vec::new(),
        source: Source::Boot,
        keys: Vec::new(),
        purpose: Purpose::Serve,
        trace: None,
    }
}
