//! Forks of processes that run: what each draws and calls itself is its own.

use std::collections::BTreeSet;
use std::sync::Arc;

use spore_node::snapshot::NoStorePoints;
use spore_wire::id::VmId;
use spore_wire::node::{Source, StartVm};

use crate::host::{TestHost, image_named, new_id};
use crate::kill_points::counter;
use crate::takes::{Daemon, new_snapshot, nothing_is_left};

/// How many words of a VM's are its own.
const PYTHON_OWN: usize = 11;

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

fn python(source: Source, environment: &[(&str, &str)]) -> StartVm {
    let mut start = counter(new_id());
    start.resources.memory_mib = 256;
    start.source = source;
    let process = start.process.as_mut().unwrap();
    process.command = ["python3", "-c", include_str!("individuals.py")]
        .map(str::to_owned)
        .to_vec();
    let environment = environment.iter();
    process.environment = environment
        .map(|&(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    start
}

#[tokio::test(flavor = "multi_thread")]
async fn a_python_process_that_hears_of_its_fork_is_its_own_and_none_can_hold_it_up() {
    let Some((host, _machine)) = TestHost::with_agent() else {
        return;
    };
    let Some(image) = image_named(&host, "debian--python3") else {
        println!("SKIPPED: no image debian/python3: run `make deps`");
        return;
    };
    let daemon = Daemon::open(&host, &image, Arc::new(NoStorePoints)).await;
    let source = python(Source::Boot, &[("ONE_THAT_NEVER_ANSWERS", "1")]);
    let vm = source.vm;
    daemon.ready(source).await;
    let mut seen = Seen::default();
    let shared = seen.add(&daemon.hear(vm).await, PYTHON_OWN);
    assert_eq!(shared.len(), 1, "the source is no fork: {shared:?}");
    let snapshot = new_snapshot();
    daemon.take(vm, snapshot).await.unwrap();

    let mut drawn = BTreeSet::new();
    drawn.insert(parts(&daemon.hear(vm).await).1);
    let mut forks: Vec<VmId> = Vec::new();
    for _fork in 0..2 {
        let start = python(Source::Snapshot(snapshot), &[]);
        let fork = start.vm;
        daemon.ready(start).await;
        forks.push(fork);
        let mut shared = seen.add(&daemon.hear(fork).await, PYTHON_OWN);
        // It was told by its name, once, and before anybody could ask it.
        assert_eq!(shared.pop(), Some(fork.to_string()));
        drawn.insert(shared);
    }
    // A generator that no hook knows is in the memory that they share: the rest is the hook's work.
    assert_eq!(drawn.len(), 1, "{drawn:?}");
    let lines = daemon.node.log_tail("me", "counter", 100).unwrap();
    let late = "1 of 2 processes did not say within 1000 ms that they know of the fork";
    let told = lines.iter().filter(|line| line.text.contains(late));
    assert_eq!(told.count(), 2, "{lines:#?}");

    for vm in [vm].into_iter().chain(forks) {
        daemon.stop(vm).await;
    }
    daemon.close().await;
    nothing_is_left(&host);
}
