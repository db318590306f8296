//! Forks of processes that run: what each draws and calls itself is its own.

use core::time::Duration;
use std::collections::BTreeSet;

use futures_util::future::join_all;
use spore_wire::id::{SnapshotId, VmId};
use spore_wire::node::{Source, StartVm, StopMode};

use crate::host::{HANG, TestHost, image_named, new_id};
use crate::kill_points::counter;
use crate::takes::{Daemon, new_snapshot, nothing_is_left};

/// What VMs said that nobody else may say.
#[derive(Default)]
struct Seen(BTreeSet<String>);

impl Seen {
    /// Takes in what a VM said of itself; gives what it knows to share with its siblings.
    fn add(&mut self, said: &str, own: usize) -> Vec<String> {
        let (first, shared) = parts(said);
        assert_eq!(first.len(), own, "{said}");
        for word in first {
            assert!(word.len() > 8, "{word} is no chance: {said}");
            let is_new = self.0.insert(word.clone());
            assert!(is_new, "{word} was said before: {said}");
        }
        shared
    }
}

/// What a VM said of itself, and what it knows to share.
fn parts(said: &str) -> (Vec<String>, Vec<String>) {
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect();
    let (own, shared) = said.split_once(" | ").expect(said);
    (words(own), words(shared))
}

/// An app that says such a line.
#[derive(Clone, Copy)]
struct Speaker {
    image: &'static str,
    command: [&'static str; 3],
    own: usize,
}

const PYTHON: Speaker = Speaker {
    image: "debian--python3",
    command: ["python3", "-c", include_str!("individuals.py")],
    own: 11,
};

const NODE: Speaker = Speaker {
    image: "debian--node",
    command: ["node", "-e", include_str!("individuals.js")],
    own: 10,
};

impl Speaker {
    fn start(self, source: Source) -> StartVm {
        let mut start = counter(new_id());
        start.resources.memory_mib = 256;
        start.source = source;
        let process = start.process.as_mut().unwrap();
        process.command = self.command.map(str::to_owned).to_vec();
        process.has_hooks = true;
        process.ready_timeout_ms = 300_000;
        start
    }

    /// A daemon that gives processes of a fork so long to say that they know of it.
    async fn daemon(self, host: &TestHost, hooks: Duration) -> Option<Daemon> {
        let Some(image) = image_named(host, self.image) else {
            println!("SKIPPED: no image {}: run `make deps`", self.image);
            return None;
        };
        Some(Daemon::open_with(host, &image, |config| config.limits.hooks = hooks).await)
    }

    /// A snapshot of a VM in which it is ready, or was not started yet.
    async fn snapshot(self, daemon: &Daemon, mode: Mode) -> SnapshotId {
        let mut source = self.start(Source::Boot);
        if mode == Mode::Boot {
            source.process = None;
        }
        let vm = source.vm;
        daemon.ready(source).await;
        let snapshot = new_snapshot();
        daemon.take(vm, snapshot).await.unwrap();
        daemon.stop(vm).await;
        snapshot
    }
}

/// Where forks begin.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mode {
    /// Before the app is started.
    Boot,
    /// Where it was ready.
    Ready,
}

#[tokio::test(flavor = "multi_thread")]
async fn a_python_process_that_hears_of_its_fork_is_its_own_and_none_can_hold_it_up() {
    beside_one_that_never_answers(PYTHON, 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_thread_of_a_node_process_hears_of_its_fork_beside_a_process_that_is_busy() {
    let with_thread = Speaker {
        own: NODE.own + 3,
        ..NODE
    };
    beside_one_that_never_answers(with_thread, 3).await;
}

/// How long forks wait for the process that never answers: long enough for the others on the
/// slowest machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// What draws in forks of a speaker's VM is each fork's own, and the log says that one of its
/// processes is late.
async fn beside_one_that_never_answers(speaker: Speaker, processes: usize) {
    let Some((host, _machine)) = TestHost::with_agent() else {
        return;
    };
    let Some(daemon) = speaker.daemon(&host, PATIENCE).await else {
        return;
    };
    let mut source = speaker.start(Source::Boot);
    let process = source.process.as_mut().unwrap();
    process.environment = vec![("ONE_THAT_NEVER_ANSWERS".to_owned(), "1".to_owned())];
    let vm = source.vm;
    daemon.ready(source).await;
    let mut seen = Seen::default();
    let shared = seen.add(&daemon.hear(vm).await, speaker.own);
    assert_eq!(shared.len(), 1, "the source is no fork: {shared:?}");
    let snapshot = new_snapshot();
    daemon.take(vm, snapshot).await.unwrap();

    let mut drawn = BTreeSet::new();
    drawn.insert(parts(&daemon.hear(vm).await).1);
    let mut forks: Vec<VmId> = Vec::new();
    for _fork in 0..2 {
        let start = speaker.start(Source::Snapshot(snapshot));
        let fork = start.vm;
        daemon.ready(start).await;
        forks.push(fork);
        let mut shared = seen.add(&daemon.hear(fork).await, speaker.own);
        // It was told by its name, once, and before anybody could ask it.
        assert_eq!(shared.pop(), Some(fork.to_string()));
        drawn.insert(shared);
    }
    // What no hook knows is in the memory that they share: the rest is the hook's work.
    assert_eq!(drawn.len(), 1, "{drawn:?}");
    let lines = daemon.node.log_tail("me", "counter", 100).unwrap();
    let within = PATIENCE.as_millis();
    let late = format!(
        "1 of {processes} processes did not say within {within} ms that they know of the fork"
    );
    let told = lines.iter().filter(|line| line.text.contains(&late));
    assert_eq!(told.count(), 2, "{lines:#?}");

    for vm in [vm].into_iter().chain(forks) {
        daemon.stop(vm).await;
    }
    daemon.close().await;
    nothing_is_left(&host);
}

/// How many forks there are of each; starting an app takes ten times as long as having it.
const FORKS: [(Speaker, Mode, usize); 4] = [
    (NODE, Mode::Ready, 46),
    (NODE, Mode::Boot, 4),
    (PYTHON, Mode::Ready, 46),
    (PYTHON, Mode::Boot, 4),
];

/// Forks that run at once: more of them take turns on a small machine's processors all the same.
const AT_ONCE: usize = 4;

#[tokio::test(flavor = "multi_thread")]
async fn hundred_forks_are_hundred_individuals() {
    let Some((host, _machine)) = TestHost::with_agent() else {
        return;
    };
    let mut seen = Seen::default();
    let mut count = 0;
    for (speaker, mode, forks) in FORKS {
        let Some(daemon) = speaker.daemon(&host, HANG).await else {
            return;
        };
        let snapshot = speaker.snapshot(&daemon, mode).await;
        let mut memories = BTreeSet::new();
        for first in (0..forks).step_by(AT_ONCE) {
            let batch = first..forks.min(first + AT_ONCE);
            let said = join_all(batch.map(|_fork| said_by_fork(&daemon, speaker, snapshot)));
            for (vm, said) in said.await {
                let mut shared = seen.add(&said, speaker.own);
                if mode == Mode::Ready {
                    assert_eq!(shared.pop(), Some(vm.to_string()), "it was not told");
                }
                memories.insert(shared);
                count += 1;
            }
        }
        // Those of a running process go on in one memory, and the others began by themselves.
        if mode == Mode::Ready {
            assert_eq!(memories.len(), 1, "{memories:?}");
        }
        println!("{forks} forks {mode:?} of {}", speaker.image);
        daemon.close().await;
        nothing_is_left(&host);
    }
    assert_eq!(count, 100);
}

/// Forks one, and ends it once it has spoken.
async fn said_by_fork(daemon: &Daemon, speaker: Speaker, from: SnapshotId) -> (VmId, String) {
    let start = speaker.start(Source::Snapshot(from));
    let vm = start.vm;
    daemon.ready(start).await;
    let said = daemon.hear(vm).await;
    daemon.node.stop(vm, StopMode::Kill).await.unwrap();
    daemon.node.stopped(vm).await.unwrap();
    (vm, said)
}
