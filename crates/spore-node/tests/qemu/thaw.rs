//! What a fork no longer has of its source when its tenant goes on, and what becomes of one that
//! kept something.

use std::fs;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use async_trait::async_trait;
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, eth, recv, socket_with};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use spore_node::config::{Config, Images, KillPoint, KillPoints};
use spore_node::hypervisor::Machine;
use spore_node::hypervisor::fork::Afterwards;
use spore_node::node::Node;
use spore_node::take::Take;
use spore_node::vm::state::VmEffect;
use spore_wire::guest::{Exec, Exit, Readiness, Reply, Request, StartApp, ThawStep, WriteFile};
use spore_wire::id::{ImageId, SnapshotId, VmId};
use spore_wire::node::{
    NodeEvent, Owner, Process, Purpose, Source, StartVm, StopMode, VmFailureKind, VmPhase, VmStatus,
};
use spore_wire::secret::SecretBytes;
use spore_wire::snapshot::SnapshotKind;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::{sleep, timeout};

use crate::driver::Driver;
use crate::fork::{boot_only, capture, fork_only};
use crate::host::{HANG, TestHost, image_named, new_id, patient};

/// A server with two connections: what comes over the one from outside is sent back, what goes over
/// the one inside is counted. It says what becomes of each in files, and prints how often it was
/// asked.
const CONNECTIONS: &str = r#"
use Socket; use IO::Select; $| = 1;
sub listening { my ($port, $host) = @_; socket(my $s, PF_INET, SOCK_STREAM, 0);
  setsockopt($s, SOL_SOCKET, SO_REUSEADDR, 1);
  bind($s, sockaddr_in($port, $host)) or die; listen($s, 4); $s }
my $inner = listening(9000, INADDR_LOOPBACK);
socket(my $near, PF_INET, SOCK_STREAM, 0);
connect($near, sockaddr_in(9000, INADDR_LOOPBACK)) or die; accept(my $far, $inner) or die;
my $server = listening(8000, INADDR_ANY);
accept(my $outside, $server) or die;
my ($count, $lines) = (0, 0); my $select = IO::Select->new($outside);
sub say_in { my ($name, $text) = @_; open(my $f, ">", "/tmp/$name.new"); print $f $text;
  close $f; rename "/tmp/$name.new", "/tmp/$name" }
while (1) {
  if ($select->can_read(0.02)) {
    my $got = sysread($outside, my $bytes, 100);
    if ($got) { $lines++; print "line $lines\nunfinished"; print " $lines\n"; print "begun";
      syswrite($outside, $bytes) }
    else { say_in("outside", defined $got ? "closed" : "lost: $!"); $select->remove($outside) }
  }
  syswrite($near, "x") or say_in("inside", "lost: $!");
  sysread($far, my $bytes, 1) or say_in("inside", "lost: $!"); $count++;
  say_in("count", $count);
}
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_fork_keeps_neither_its_sources_connections_to_outside_nor_its_lines() {
    let Some((host, machine)) = TestHost::with_agent() else {
        return;
    };
    let driver = host.driver().await;
    let mut source = boot_only(&driver, &machine).await;
    source.agent.thaw(source.vm, "source").await.unwrap();
    let rehearse = |script: &str| Request::Rehearse {
        argv: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
        timeout_ms: 60_000,
    };
    let leaving = rehearse("id -u > /tmp/rehearsed; echo noise; sleep 7777 & exit 3");
    let rehearsed = source.agent.ask(leaving).await;
    assert_eq!(rehearsed, Ok(Reply::Exit(Exit::Code { code: 3 })));
    let left = "cat /tmp/rehearsed; grep -l 777[7] /proc/[0-9]*/cmdline | wc -l";
    assert_eq!(source.agent.sh(left).await, "1000\n0");
    source.held.open_network().await.unwrap();
    let start = Request::StartApp(app(&["perl", "-e", CONNECTIONS]));
    assert_eq!(source.agent.ask(start).await, Ok(Reply::Done));
    let refused = source.agent.ask(rehearse("true")).await;
    assert!(refused.unwrap_err().message.contains("before"));
    let mut outside = until(async || source.held.connect(8000).await.ok()).await;
    let mut echo = async || {
        let mut byte = [0];
        outside.write_all(b"a").await.unwrap();
        let answer = timeout(HANG, outside.read_exact(&mut byte)).await;
        answer.unwrap().unwrap();
    };
    echo().await;
    let taken = capture(&mut source, Afterwards::GoesOn, None).await;

    let mut fork = fork_only(&driver, &machine, &taken.source, source.vm).await;
    fork.agent.thaw(fork.vm, "fork").await.unwrap();
    assert_eq!(fork.agent.sh("uname -n").await, "fork");
    let lost = until(async || some(fork.agent.sh("cat /tmp/outside 2>&1").await, "lost")).await;
    assert_eq!(lost, "lost: Software caused connection abort");
    let script = "before=$(cat /tmp/count); while [ $(cat /tmp/count) = $before ]; do sleep 0.1; \
        done; cat /tmp/inside 2>&1";
    let inside = fork.agent.sh(script).await;
    assert!(inside.contains("No such file"), "{inside}");
    let neighbour = fork.agent.sh("tail -n +2 /proc/net/arp").await;
    assert_eq!(
        neighbour.matches("02:53:50:00:00:01").count(),
        1,
        "{neighbour}"
    );
    assert_eq!(neighbour.lines().count(), 1, "{neighbour}");
    assert_eq!(fork.agent.logged().await, "");
    driver.release(fork.vm).await.unwrap();

    // What was not asked for was not done: so the steps are what did it.
    let mut less = fork_only(&driver, &machine, &taken.source, source.vm).await;
    let kept = [ThawStep::Names, ThawStep::Sockets, ThawStep::Logs];
    less.agent.thaw_without(less.vm, &kept).await.unwrap();
    assert_eq!(less.agent.sh("uname -n").await, "source");
    less.agent.sh(script).await;
    assert!(
        less.agent
            .sh("ls /tmp/outside 2>&1")
            .await
            .contains("No such file")
    );
    assert!(less.agent.logged().await.contains("unfinished 1"));
    driver.release(less.vm).await.unwrap();

    echo().await;
    // The byte may be back before the agent has read the line.
    until(async || some(source.agent.logged().await, "unfinished 2")).await;
    driver.release(source.vm).await.unwrap();
    assert_eq!(host.left(), Vec::<String>::new());
}

pub(crate) fn app(command: &[&str]) -> StartApp {
    StartApp {
        command: command.iter().map(|word| (*word).to_owned()).collect(),
        directory: "/".to_owned(),
        environment: Vec::new(),
        secret_environment: None,
        secret_files: None,
        user: None,
        port: 8000,
        ready: Readiness::Port,
        ready_timeout_ms: 60_000,
    }
}

pub(crate) fn some(text: String, word: &str) -> Option<String> {
    text.contains(word).then_some(text)
}

/// What `look` finds at last.
pub(crate) async fn until<T>(mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let found = async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(HANG, found).await.expect("it never came")
}

/// Sends packets to the host for as long as it runs.
const SENDER: &str = r#"use Socket; socket(S, PF_INET, SOCK_DGRAM, 17);
open(B, ">", "/tmp/begun"); my $to = sockaddr_in(9, inet_aton("10.42.0.1"));
while (1) { send(S, "x", 0, $to); select undef, undef, undef, 0.01 }"#;

/// An app that says what it was given.
const KNOWS: &str = r#"echo "$KEY $(cat /run/secrets/TOKEN)" > /tmp/knows
exec perl -e 'use Socket; socket(S, PF_INET, SOCK_STREAM, 0);
bind(S, sockaddr_in(8000, INADDR_ANY)); listen(S, 1); sleep 1000'"#;

fn with_secrets(mut start: StartVm) -> StartVm {
    let process = start.process.as_mut().unwrap();
    let value = |text: &str| SecretBytes::new(text.as_bytes().to_vec());
    process.secret_environment = vec![("KEY".to_owned(), value("canary-in-env"))];
    process.secret_files = vec![("TOKEN".to_owned(), value("canary-in-file"))];
    start
}

#[tokio::test(flavor = "multi_thread")]
async fn withheld_thaw_step_kills_the_fork() {
    let Some((host, machine)) = TestHost::with_agent() else {
        return;
    };
    let driver = host.driver().await;
    file_source_with(&host, &driver, &machine, &format!("perl -e '{SENDER}'")).await;
    let steps = ThawStep::ALL.into_iter().map(Some);
    for withheld in steps.chain([None]) {
        let watch = Arc::new(Watch::new(&host));
        let mut config = config(&host, &watch);
        config.thaw_steps.retain(|step| Some(*step) != withheld);
        let node = node(&driver, config, &machine).await;
        let start = with_secrets(start(&machine, &["/bin/sh", "-c", KNOWS]));
        let vm = start.vm;
        node.start(start).unwrap();
        if let Some(step) = withheld {
            let over = timeout(HANG, node.stopped(vm)).await.unwrap().unwrap();
            let failure = over.failure.unwrap();
            assert_eq!(failure.kind, VmFailureKind::Thaw, "{failure:?}");
            let words = format!("did not renew {step:?}");
            assert!(failure.message.contains(&words), "{failure:?}");
            let resumed = watch.when(VmEffect::Resume, KillPoint::Before);
            assert!(resumed.is_some(), "it was never listened to");
            assert_eq!(watch.packets(), 0, "without {step:?}");
            assert_eq!(watch.when(VmEffect::OpenNetwork, KillPoint::Before), None);
        } else {
            // One that was renewed whole does send, and is seen, but not before.
            until(async || (watch.packets() > 0).then_some(())).await;
            assert_eq!(watch.packets_before_network(), Some(0));
            assert_eq!(until_ready(&node, vm).await.phase, VmPhase::Ready);
            let knows = said(&node, vm, &["/bin/cat", "/tmp/knows"]).await;
            assert_eq!(knows, "canary-in-env canary-in-file");
            node.stop(vm, StopMode::Kill).await.unwrap();
            timeout(HANG, node.stopped(vm)).await.unwrap().unwrap();
        }
        node.detach().await;
        assert_eq!(host.left(), Vec::<String>::new());
    }
}

/// What the forks begin from.
const SOURCE: SnapshotId = SnapshotId::from_bytes([1; 16]);

/// What a guest's clock may be off.
const CLOCK_OFF: Duration = Duration::from_millis(50);

/// On a machine that others keep busy the agent may be kept waiting each time: a wrong mechanism is
/// late by the age of the source, however often.
const CLOCK_FORKS: u32 = 6;

/// Writes the time down when it first sees that it has jumped.
const JUMP: &str = "import time
off = lambda: time.time() - time.monotonic()
was = off()
open(\"/tmp/begun\", \"w\")
while abs(off() - was) < 1: time.sleep(0.0005)
print(time.time(), file=open(\"/tmp/jumped\", \"w\"), flush=True)";

const CLOCK_APP: &str = "import time
now = time.time()
import socket
print(now, file=open('/tmp/app', 'w'), flush=True)
server = socket.create_server(('0.0.0.0', 8000))
time.sleep(1000)";

/// A handshake with a server of the same process, whose certificate is in `/tmp/pem`.
const HANDSHAKE: &str = "import ssl
ours, theirs = ssl.MemoryBIO(), ssl.MemoryBIO()
server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
server.load_cert_chain('/tmp/pem')
client = ssl.create_default_context(cafile='/tmp/pem')
a = client.wrap_bio(ours, theirs, server_hostname='notes.test')
b = server.wrap_bio(theirs, ours, server_side=True)
done = 0
while done < 20:
    for end in (a, b):
        try: end.do_handshake()
        except ssl.SSLWantReadError: pass
    done += 1
print(a.version(), a.getpeercert()['notBefore'] != '')";

#[tokio::test(flavor = "multi_thread")]
async fn clock_is_right_before_the_apps_first_instruction() {
    let Some((host, mut machine)) = TestHost::with_agent() else {
        return;
    };
    let Some(python) = image_named(&host, "debian--python3") else {
        println!("SKIPPED: no image debian/python3: run `make deps`");
        return;
    };
    machine.image = python;
    machine.resources.memory_mib = 256;
    let driver = host.driver().await;
    file_source_with(&host, &driver, &machine, &format!("python3 -c '{JUMP}'")).await;
    sleep(Duration::from_secs(3)).await;
    let mut seen = Vec::new();
    for _fork in 0..CLOCK_FORKS {
        let watch = Arc::new(Watch::new(&host));
        let node = node(&driver, config(&host, &watch), &machine).await;
        let start = start(&machine, &["python3", "-c", CLOCK_APP]);
        let vm = start.vm;
        node.start(start).unwrap();
        let status = until_ready(&node, vm).await;
        assert_eq!(status.phase, VmPhase::Ready, "{status:?}");
        let at = |effect, point| watch.when(effect, point).unwrap();
        let thaw = at(VmEffect::Thaw, KillPoint::Before);
        let app = at(VmEffect::StartApp, KillPoint::Before);
        let ready = at(VmEffect::AwaitReady, KillPoint::After);
        // It may have to wait for a processor before it looks.
        let jumped = until(async || {
            let said = said(&node, vm, &["cat", "/tmp/jumped"]).await;
            (!said.contains("No such file")).then_some(said)
        });
        let jumped = jumped.await;
        let first = said(&node, vm, &["cat", "/tmp/app"]).await;
        let now = UNIX_EPOCH.elapsed().unwrap();
        let late = [off(&jumped, thaw, now), off(&first, app, ready)];
        if seen.is_empty() {
            shake_hands(&node, vm).await;
        }
        node.stop(vm, StopMode::Kill).await.unwrap();
        timeout(HANG, node.stopped(vm)).await.unwrap().unwrap();
        node.detach().await;
        assert_eq!(host.left(), Vec::<String>::new());
        for off in late {
            // Its source is older than that.
            assert!(off < Duration::from_secs(1), "{off:?}");
        }
        seen.push(late);
        if late.iter().all(|off| *off <= CLOCK_OFF) {
            println!("{seen:?}");
            return;
        }
    }
    unreachable!("the clock of no fork is right: {seen:?}");
}

/// How far a guest's time lies outside of when it was read.
fn off(said: &str, first: Duration, last: Duration) -> Duration {
    let time = Duration::from_secs_f64(said.parse().unwrap());
    first.saturating_sub(time).max(time.saturating_sub(last))
}

/// Issues a certificate now, which is not valid before now, and has it believed in the guest.
async fn shake_hands(node: &Node, vm: VmId) {
    let folder = tempfile::tempdir().unwrap();
    let pem = folder.path().join("pem");
    let made = Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
        ])
        .args(["-days", "1", "-subj", "/CN=notes.test"])
        .args(["-addext", "subjectAltName=DNS:notes.test"])
        .arg("-keyout")
        .arg(&pem)
        .arg("-out")
        .arg(folder.path().join("certificate"))
        .output();
    let Ok(made) = made else {
        println!("SKIPPED: no openssl to issue a certificate with");
        return;
    };
    assert!(made.status.success(), "{made:?}");
    let mut both = fs::read(&pem).unwrap();
    both.extend(fs::read(folder.path().join("certificate")).unwrap());
    let file = WriteFile {
        path: "/tmp/pem".to_owned(),
        mode: 0o600,
        user: None,
    };
    let writer = node.write_file(vm, file).await.unwrap();
    writer.send(&both).await.unwrap();
    writer.finish().await.unwrap();
    let shaken = said(node, vm, &["python3", "-c", HANDSHAKE]).await;
    assert_eq!(shaken, "TLSv1.3 True");
}

async fn said(node: &Node, vm: VmId, argv: &[&str]) -> String {
    let exec = Exec {
        argv: argv.iter().map(|word| (*word).to_owned()).collect(),
        environment: Vec::new(),
        directory: None,
        user: None,
        pty: None,
        timeout_ms: None,
    };
    let program = node.exec(vm, exec).await.unwrap();
    let mut said = Vec::new();
    while let Some((_of, bytes)) = program.next_output().await.unwrap() {
        said.extend(bytes);
    }
    String::from_utf8(said).unwrap().trim().to_owned()
}

async fn until_ready(node: &Node, vm: VmId) -> VmStatus {
    let mut watch = node.watch();
    let ready = async {
        loop {
            let NodeEvent::Vm(status) = watch.next().await;
            if status.vm == vm && status.phase >= VmPhase::Ready {
                return status;
            }
        }
    };
    timeout(HANG, ready).await.unwrap()
}

/// Files a source in which `command` runs, for no session and no app; it makes `/tmp/begun` once it
/// does.
async fn file_source_with(host: &TestHost, driver: &Driver, machine: &Machine, command: &str) {
    let watch = Arc::new(Watch::new(host));
    let node = node(driver, config(host, &watch), machine).await;
    let source = StartVm {
        process: None,
        source: Source::Boot,
        ..start(machine, &[])
    };
    let vm = source.vm;
    node.start(source).unwrap();
    let status = until_ready(&node, vm).await;
    assert_eq!(status.phase, VmPhase::Ready, "{status:?}");
    let begin = format!(
        "{command} > /dev/null 2>&1 & until [ -e /tmp/begun ]; do sleep 0.1; done; echo runs"
    );
    assert_eq!(said(&node, vm, &["/bin/sh", "-c", &begin]).await, "runs");
    let take = Take {
        id: SOURCE,
        kind: SnapshotKind::Template,
        key: None,
        made_at_s: UNIX_EPOCH.elapsed().unwrap().as_secs(),
    };
    node.take(vm, take).await.unwrap();
    timeout(HANG, node.stopped(vm)).await.unwrap().unwrap();
    node.detach().await;
}

fn start(machine: &Machine, command: &[&str]) -> StartVm {
    StartVm {
        vm: new_id(),
        owner: Owner {
            account: "me".to_owned(),
            app: "fork".to_owned(),
            release: 1,
            secrets_version: 0,
        },
        image: ImageId::from_hash([1; 32]),
        folder: None,
        resources: machine.resources,
        process: Some(Process {
            command: command.iter().map(|word| (*word).to_owned()).collect(),
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
        source: Source::Snapshot(SOURCE),
        keys: Vec::new(),
        purpose: Purpose::Serve,
        trace: None,
    }
}

fn config(host: &TestHost, watch: &Arc<Watch>) -> Config {
    let [node, logs, snapshots] =
        ["node", "logs", "snapshots"].map(|name| host.runtime("..").join(name));
    let mut config = Config::new(node, logs, snapshots, 8192);
    config.limits = patient();
    config.kill_points = Arc::clone(watch) as Arc<dyn KillPoints>;
    config
}

async fn node(driver: &Driver, config: Config, machine: &Machine) -> Node {
    let images = Arc::new(OneImage(machine.image.clone()));
    let opened = Node::open(config, driver.hypervisor(), images).await;
    opened.unwrap().0
}

/// The same file for every image.
#[derive(Debug)]
struct OneImage(PathBuf);

impl Images for OneImage {
    fn path(&self, _id: &ImageId) -> Option<PathBuf> {
        Some(self.0.clone())
    }
}

/// Notes when each effect of a fork begins and ends, and hears every packet of its namespace from
/// before its guest runs.
#[derive(Debug)]
struct Watch {
    vms: PathBuf,
    namespaces: PathBuf,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    points: Vec<(VmEffect, KillPoint, Duration)>,
    capture: Option<OwnedFd>,
    packets: usize,
    before_network: Option<usize>,
}

impl Watch {
    fn new(host: &TestHost) -> Self {
        Self {
            vms: host.runtime("vms"),
            namespaces: host.runtime("netns"),
            seen: Mutex::default(),
        }
    }

    fn edit<T>(&self, edit: impl FnOnce(&mut Seen) -> T) -> T {
        edit(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// By the host's clock.
    fn when(&self, effect: VmEffect, point: KillPoint) -> Option<Duration> {
        self.edit(|seen| {
            let mut points = seen.points.iter();
            let found = points.find(|(at, of, _when)| *at == effect && *of == point)?;
            Some(found.2)
        })
    }

    fn packets(&self) -> usize {
        self.edit(Seen::count)
    }

    fn packets_before_network(&self) -> Option<usize> {
        self.edit(|seen| seen.before_network)
    }
}

impl Seen {
    /// How many came until now.
    fn count(&mut self) -> usize {
        let Some(capture) = &self.capture else {
            return 0;
        };
        let mut frame = [0; 2048];
        loop {
            match recv(capture, &mut frame, RecvFlags::DONTWAIT) {
                Ok(_frame) => self.packets += 1,
                Err(Errno::AGAIN) => return self.packets,
                // Whoever holds the tap is told once that it has gone down.
                Err(Errno::NETDOWN) => {}
                Err(errno) => unreachable!("{errno}"),
            }
        }
    }
}

/// Hears every frame in the namespace at `path`.
fn capture_in(path: &Path) -> OwnedFd {
    let namespace = fs::File::open(path).unwrap();
    let open = move || {
        let kind = Some(LinkNameSpaceType::Network);
        move_into_link_name_space(namespace.as_fd(), kind).unwrap();
        let flags = SocketFlags::CLOEXEC;
        socket_with(
            AddressFamily::PACKET,
            SocketType::RAW,
            flags,
            Some(eth::ALL),
        )
        .unwrap()
    };
    std::thread::spawn(open).join().unwrap()
}

#[async_trait]
impl KillPoints for Watch {
    async fn reached(&self, vm: VmId, effect: VmEffect, point: KillPoint) {
        let now = UNIX_EPOCH.elapsed().unwrap();
        if (effect, point) == (VmEffect::Resume, KillPoint::Before) {
            let file = self.vms.join(vm.to_string()).join("namespace");
            let name = fs::read_to_string(file).unwrap();
            let capture = capture_in(&self.namespaces.join(name.trim()));
            self.edit(|seen| seen.capture = Some(capture));
        }
        self.edit(|seen| {
            if (effect, point) == (VmEffect::OpenNetwork, KillPoint::Before) {
                seen.before_network = Some(seen.count());
            }
            seen.points.push((effect, point, now));
        });
    }
}
