//! Tests of workers without a machine: each counts, and waits in a channel that a kick ends.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use super::{Kick, Order, PauseError, Post, Workers};
use crate::end::End;

/// Long enough that only a worker that is lost takes it.
const LIMIT: Duration = Duration::from_secs(20);

/// A place to wait in until one is kicked.
#[derive(Debug, Default)]
struct Wait {
    kicked: Mutex<bool>,
    changed: Condvar,
}

impl Wait {
    fn wait(&self) {
        let kicked = self.kicked.lock().unwrap();
        drop(self.changed.wait_while(kicked, |kicked| !*kicked).unwrap());
    }
}

impl Kick for Arc<Wait> {
    fn kick(&self, _thread: &JoinHandle<()>) {
        *self.kicked.lock().unwrap() = true;
        self.changed.notify_all();
    }

    fn take_back(&self) {
        *self.kicked.lock().unwrap() = false;
    }
}

/// Does one piece of work after the other until it is to end.
fn go_on(post: &Post, mut work: impl FnMut()) {
    loop {
        if post.is_called() && post.stand() == Order::End {
            return;
        }
        work();
    }
}

/// A worker that waits for kicks and counts how often it went on, and one that counts as fast as
/// it can.
fn start(workers: &Workers) -> [Arc<AtomicU64>; 2] {
    let counts = [Arc::default(), Arc::<AtomicU64>::default()];
    let [waited, counted] = counts.clone();
    let wait = Arc::new(Wait::default());
    let kick = Arc::clone(&wait);
    let waiter = move |post: Post| {
        go_on(&post, || {
            waited.fetch_add(1, Ordering::SeqCst);
            wait.wait();
        });
    };
    workers.start("waiter", kick, waiter).unwrap();
    let counter = move |post: Post| {
        go_on(&post, || {
            counted.fetch_add(1, Ordering::SeqCst);
        });
    };
    let kick = Arc::new(Wait::default());
    workers.start("counter", kick, counter).unwrap();
    counts
}

fn read(counts: &[Arc<AtomicU64>; 2]) -> [u64; 2] {
    counts.each_ref().map(|count| count.load(Ordering::SeqCst))
}

fn moves_on(count: &AtomicU64) {
    let before = count.load(Ordering::SeqCst);
    while count.load(Ordering::SeqCst) == before {
        std::thread::yield_now();
    }
}

#[test]
fn something_is_done_only_while_all_stand_still() {
    let workers = Workers::new();
    let counts = start(&workers);
    workers.resume();
    moves_on(&counts[1]);
    assert_eq!(workers.while_still(|| ()), None);
    workers.pause(LIMIT).unwrap();
    std::thread::scope(|scope| {
        let done = workers.while_still(|| {
            let before = read(&counts);
            // Has to wait for its turn.
            scope.spawn(|| workers.resume());
            std::thread::sleep(Duration::from_millis(20));
            read(&counts) == before
        });
        assert_eq!(done, Some(true));
    });
    moves_on(&counts[1]);
    workers.end(End::Stopped);
    assert_eq!(workers.while_still(|| ()), None);
}

#[test]
fn nothing_runs_before_it_is_told_to_nor_while_it_stands_still() {
    let workers = Workers::new();
    let counts = start(&workers);
    workers.pause(LIMIT).unwrap();
    assert_eq!(read(&counts), [0, 0]);
    for _ in 0..200 {
        workers.resume();
        moves_on(&counts[1]);
        workers.pause(LIMIT).unwrap();
        let still = read(&counts);
        std::thread::yield_now();
        assert_eq!(read(&counts), still);
    }
    workers.pause(LIMIT).unwrap();
    workers.end(End::Stopped);
    assert!(matches!(*workers.wait(), End::Stopped));
}

#[test]
fn orders_that_follow_each_other_at_once_are_never_lost() {
    let workers = Workers::new();
    let _counts = start(&workers);
    for _ in 0..2000 {
        workers.resume();
        workers.pause(LIMIT).unwrap();
    }
}

#[test]
fn the_first_reason_is_the_one_that_is_told() {
    let workers = Workers::new();
    let _counts = start(&workers);
    workers.resume();
    workers.end(End::Reset);
    workers.end(End::PowerOff);
    assert!(matches!(*workers.wait(), End::Reset));
    assert!(matches!(*workers.wait(), End::Reset), "again");
    workers.resume();
    let paused = workers.pause(LIMIT);
    assert!(matches!(paused, Err(PauseError::Ended(end)) if matches!(*end, End::Reset)));
}

#[test]
fn a_worker_that_panics_ends_all() {
    let workers = Workers::new();
    let _counts = start(&workers);
    let broken = |post: Post| {
        let order = post.stand();
        panic!("told to {order:?}");
    };
    workers
        .start("broken", Arc::new(Wait::default()), broken)
        .unwrap();
    workers.resume();
    let end = workers.wait();
    assert!(matches!(&*end, End::Panic { worker } if worker == "broken"));
}

#[test]
fn a_worker_ends_all_from_inside() {
    let workers = Workers::new();
    let counts = start(&workers);
    let ender = |post: Post| {
        if post.stand() == Order::Run {
            post.end(End::PowerOff);
        }
    };
    workers
        .start("ender", Arc::new(Wait::default()), ender)
        .unwrap();
    assert!(workers.ended().is_none());
    workers.resume();
    assert!(matches!(*workers.wait(), End::PowerOff));
    let last = read(&counts);
    assert_eq!(read(&counts), last);
}

#[test]
fn who_does_not_stand_still_is_named_and_all_go_on() {
    let workers = Workers::new();
    let counts = start(&workers);
    let free = Arc::new(AtomicBool::new(false));
    let held = Arc::clone(&free);
    let begun = Arc::new(AtomicBool::new(false));
    let begins = Arc::clone(&begun);
    let stuck = move |post: Post| {
        assert_eq!(post.stand(), Order::Run);
        begins.store(true, Ordering::SeqCst);
        while !held.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        go_on(&post, || std::thread::sleep(Duration::from_millis(1)));
    };
    workers
        .start("stuck", Arc::new(Wait::default()), stuck)
        .unwrap();
    workers.pause(LIMIT).unwrap();
    workers.resume();
    moves_on(&counts[1]);
    while !begun.load(Ordering::SeqCst) {
        std::thread::yield_now();
    }
    let late = workers.pause(Duration::from_millis(20)).unwrap_err();
    assert!(
        late.to_string()
            .starts_with("stuck did not stand still within 20 ms"),
        "{late}"
    );
    moves_on(&counts[1]);
    free.store(true, Ordering::SeqCst);
    workers.pause(LIMIT).unwrap();
}

#[test]
fn dropping_the_machine_ends_its_workers_running_or_not() {
    for runs in [false, true] {
        let workers = Workers::new();
        let counts = start(&workers);
        if runs {
            workers.resume();
        }
        drop(workers);
        // Theirs are gone with them.
        assert!(counts.iter().all(|count| Arc::strong_count(count) == 1));
    }
}
