//! The reconcilers with a scripted node and gateway, on paused time.

use core::time::Duration;
use std::sync::Arc;

use spore_wire::gateway::{Activity, FromGateway, ToGateway};
use spore_wire::id::VmId;
use spore_wire::node::{Source, StartVm, VmFailureKind};
use spore_wire::secret::SecretBytes;

use super::AppRef;
use super::deploy::{DeployError, Named, NewRelease};
use super::removal::RemovalError;
use super::snapshot::SnapshotError;
use crate::clock::{HostClock, KernelChance};
use crate::fake::{Act, FakeDoor, FakeNodes, MoodyStore, config};
use crate::nodes::{CollectMode, Dependents, NodesError};
use crate::operations::{Operations, Outcome};
use crate::secrets::{KeyFile, KeyProvider};
use crate::store::memory::MemoryStore;
use crate::store::record::app::{AppRecord, app_key};
use crate::store::record::former_secret::{FORMER_SECRETS, FormerSecretRecord, former_secret_key};
use crate::store::record::image::{ImageOrigin, ImageRecord, image_key};
use crate::store::record::operation::{OperationRecord, StoredOperationState, operation_key};
use crate::store::record::release::StoredState;
use crate::store::record::secret::SecretRecord;
use crate::store::record::{encode, load};
use crate::store::{SharedStore, Transaction, every};
use crate::{Control, Parts};

/// A control plane in a test.
struct Bench {
    control: Control,
    nodes: FakeNodes,
    door: FakeDoor,
    store: SharedStore,
    keys: Arc<dyn KeyProvider>,
    _folder: Option<tempfile::TempDir>,
}

fn app(name: &str) -> AppRef {
    AppRef {
        account: "me".parse().unwrap(),
        app: name.parse().unwrap(),
    }
}

impl Bench {
    async fn new() -> Self {
        Self::on(Arc::new(MemoryStore::default())).await
    }

    async fn on(store: SharedStore) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        let keys = Arc::new(KeyFile::open_or_make(&path, &*store).await.unwrap());
        let (nodes, door) = (FakeNodes::new(), FakeDoor::default());
        let control = start(&store, &nodes, &door, keys.clone()).await;
        Self {
            control,
            nodes,
            door,
            store,
            keys,
            _folder: Some(folder),
        }
    }

    /// The daemon ends without a word, and another starts over the same store and node.
    async fn crash(self) -> Self {
        self.control.driver.abort();
        let door = FakeDoor::default();
        let control = start(&self.store, &self.nodes, &door, Arc::clone(&self.keys)).await;
        Self {
            control,
            door,
            ..self
        }
    }

    async fn deploy(&self, app: &AppRef) -> OperationRecord {
        let new = release(|_| {});
        let id = self
            .control
            .converge()
            .deploy(app, &new, None)
            .await
            .unwrap();
        self.over(app, &id).await
    }

    async fn over(&self, app: &AppRef, id: &str) -> OperationRecord {
        let operations = &self.control.converge().inner.operations;
        let mut after = 0;
        loop {
            let wait = Duration::from_secs(600);
            let record = operations
                .wait(&app.account, id, after, wait)
                .await
                .unwrap()
                .unwrap();
            if record.state != StoredOperationState::Running {
                return record;
            }
            after = record.revision;
        }
    }

    async fn live(&self, app: &AppRef) -> Option<u64> {
        self.control
            .converge()
            .app_record(app)
            .await
            .unwrap()
            .unwrap()
            .record
            .release
    }

    async fn settle(&self, ms: u64) {
        tokio::time::sleep(Duration::from_millis(ms)).await;
    }
}

async fn start(
    store: &SharedStore,
    nodes: &FakeNodes,
    door: &FakeDoor,
    keys: Arc<dyn KeyProvider>,
) -> Control {
    let parts = Parts {
        store: Arc::clone(store),
        nodes: Arc::new(nodes.clone()),
        door: Arc::new(door.clone()),
        keys,
        clock: Arc::new(HostClock),
        chance: Arc::new(KernelChance),
    };
    let control = Control::start(config(), parts).await.unwrap();
    let image = ImageRecord {
        id: crate::domain::release::sample(1).image,
        bytes: 10,
        created_at_ms: 0,
        origin: ImageOrigin::Own,
    };
    let write = Transaction::default().put(image_at(), encode(&image));
    store.commit(write).await.unwrap();
    door.attach(control.converge());
    control
}

/// Where the image of all releases here is recorded.
fn image_at() -> String {
    let me = "me".parse().unwrap();
    image_key(&me, &"debian/python3".parse().unwrap())
}

fn release(change: impl FnOnce(&mut NewRelease)) -> NewRelease {
    let sample = crate::domain::release::sample(1);
    let mut new = NewRelease {
        rules: sample.rules,
        image: Named {
            id: sample.image,
            bytes: 10,
            key: image_at(),
        },
        folder: None,
    };
    change(&mut new);
    new
}

#[tokio::test(start_paused = true)]
async fn a_release_is_made_only_of_what_is_still_there() {
    let bench = Bench::new().await;
    let notes = app("notes");
    let deploy = async |new: NewRelease| {
        bench
            .control
            .converge()
            .deploy(&app("notes"), &new, None)
            .await
    };
    // Written again with the same content, as by another upload of it: that is no change.
    let entry = bench.store.get(&image_at()).await.unwrap().unwrap();
    let again = Transaction::default().put(image_at(), entry.value);
    bench.store.commit(again).await.unwrap();
    let id = deploy(release(|_| {})).await.unwrap();
    bench.over(&notes, &id).await;
    let other = release(|new| new.image.id = spore_wire::id::ImageId::from_hash([9; 32]));
    let moved = deploy(other).await.unwrap_err();
    assert!(matches!(moved, DeployError::Moved { .. }), "{moved}");
    let gone = Transaction::default().delete(image_at());
    bench.store.commit(gone).await.unwrap();
    let moved = deploy(release(|_| {})).await.unwrap_err();
    assert!(moved.to_string().contains("deploy again"), "{moved}");
    assert_eq!(bench.live(&notes).await, Some(1));
}

#[tokio::test(start_paused = true)]
async fn deploy_wake_reap_wake() {
    let bench = Bench::new().await;
    let notes = app("notes");
    let done = bench.deploy(&notes).await;
    assert_eq!(done.state, StoredOperationState::Succeeded, "{done:?}");
    assert_eq!(done.result.as_deref(), Some("1"));
    assert!(
        done.steps.iter().all(|step| step.1.is_some()) && done.steps.len() >= 2,
        "{done:?}"
    );
    let first = bench.door.request(&notes).await.unwrap();
    let revision = bench.store.commit(Transaction::default()).await.unwrap();

    bench.settle(59_000).await;
    assert_eq!(bench.nodes.running().len(), 1);
    bench.settle(2_000).await;
    assert!(bench.nodes.running().is_empty(), "idle implies reaped");
    assert!(
        bench
            .control
            .converge()
            .with_life(&notes, |life, _| life.is_asleep())
    );

    let second = bench.door.request(&notes).await.unwrap();
    assert_ne!(first, second, "a VM's id is used once");
    let unchanged = bench.store.commit(Transaction::default()).await.unwrap();
    assert_eq!(
        unchanged,
        revision + 1,
        "a warm wake writes nothing durable"
    );
    let waited = bench.door.sent().into_iter().any(|message| {
        matches!(message, ToGateway::Awake { vm, phases, .. } if vm == second && phases.len() == 2)
    });
    assert!(waited, "who waited is told the phases");
    assert_eq!(bench.nodes.state.lock().unwrap().most_at_once["notes"], 1);
}

#[tokio::test(start_paused = true)]
async fn fifty_waiters_are_one_start() {
    let bench = Bench::new().await;
    let notes = app("notes");
    bench.deploy(&notes).await;
    bench.control.converge().sleep(&notes).await.unwrap();
    let before = bench.nodes.starts();
    let wakes = (0..50).map(|_| bench.control.converge().wake(&notes));
    let woken = futures_util::future::join_all(wakes).await;
    let first = woken[0].clone().unwrap();
    assert!(woken.into_iter().all(|vm| vm == Ok(first)));
    assert_eq!(bench.nodes.starts(), before + 1);
}

#[tokio::test(start_paused = true)]
async fn a_busy_app_is_not_reaped_until_its_next_idle_edge() {
    let bench = Bench::new().await;
    let notes = app("notes");
    bench.deploy(&notes).await;
    let vm = bench.door.request(&notes).await.unwrap();
    bench.door.busy(&notes, vm, 1);
    bench.settle(500_000).await;
    assert_eq!(bench.nodes.running().len(), 1);
    bench.door.busy(&notes, vm, 0);
    bench.settle(59_000).await;
    assert_eq!(bench.nodes.running().len(), 1);
    bench.settle(2_000).await;
    assert!(bench.nodes.running().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_keep_awake_lease_and_a_hold_keep_an_app_awake() {
    let bench = Bench::new().await;
    let notes = app("notes");
    bench.deploy(&notes).await;
    let vm = bench.door.request(&notes).await.unwrap();
    bench.nodes.set(vm, |status| status.awake_for_ms = 300_000);
    bench.settle(299_000).await;
    assert_eq!(bench.nodes.running().len(), 1);
    let hold = bench.control.converge().hold(&notes);
    bench.nodes.set(vm, |status| status.awake_for_ms = 0);
    bench.settle(100_000).await;
    assert_eq!(bench.nodes.running().len(), 1);
    drop(hold);
    bench.settle(59_000).await;
    assert_eq!(bench.nodes.running().len(), 1);
    bench.settle(2_000).await;
    assert!(bench.nodes.running().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_broken_release_leaves_the_old_one_serving_and_tells_the_last_lines() {
    let bench = Bench::new().await;
    let notes = app("notes");
    bench.deploy(&notes).await;
    let old = bench.door.request(&notes).await.unwrap();
    for (number, act) in [
        (2, Act::Crash),
        (3, Act::Hang),
        (4, Act::NoRoom),
        (5, Act::Broken),
    ] {
        bench.nodes.act("notes", number, act);
        let serving = bench.door.request(&notes).await.unwrap();
        bench.door.busy(&notes, serving, 1);
        let failed = bench.deploy(&notes).await;
        assert_eq!(failed.state, StoredOperationState::Failed, "{failed:?}");
        let (_, message) = failed.error.unwrap();
        if act == Act::Crash {
            assert!(message.contains("KeyError: 'X'"), "{message}");
        }
        assert_eq!(bench.live(&notes).await, Some(1));
        assert_eq!(bench.door.request(&notes).await.unwrap(), old);
        bench.settle(60_000).await;
        assert_eq!(
            bench.nodes.running(),
            [(old, 1)],
            "nothing of release {number} is left"
        );
    }
    let releases = bench.control.converge().releases(&notes).await.unwrap();
    let failed = releases
        .iter()
        .filter(|r| r.state == StoredState::Failed)
        .count();
    assert_eq!(failed, 4);
}

#[tokio::test(start_paused = true)]
async fn a_good_release_takes_over_and_the_old_vm_drains() {
    let bench = Bench::new().await;
    let notes = app("notes");
    bench.deploy(&notes).await;
    let old = bench.door.request(&notes).await.unwrap();
    bench.door.busy(&notes, old, 1);
    let done = bench.deploy(&notes).await;
    assert_eq!(done.result.as_deref(), Some("2"));
    let new = bench.door.request(&notes).await.unwrap();
    assert_ne!(old, new);
    bench.settle(5_000).await;
    assert_eq!(
        bench.nodes.running().len(),
        2,
        "a request in flight may end"
    );
    bench.control.door_event(FromGateway::Reaped {
        app: notes.key(),
        vm: old,
    });
    bench.settle(1_000).await;
    assert_eq!(bench.nodes.running(), [(new, 2)]);

    bench.door.busy(&notes, new, 1);
    let id = bench
        .control
        .converge()
        .rollback(&notes, None, None)
        .await
        .unwrap();
    let back = bench.over(&notes, &id).await;
    assert_eq!(back.result.as_deref(), Some("1"), "{back:?}");
    bench.settle(31_000).await;
    assert_eq!(
        bench.nodes.running().len(),
        1,
        "what does not end in time is stopped"
    );
    assert_eq!(bench.live(&notes).await, Some(1));
    let states: Vec<_> = bench.control.converge().releases(&notes).await.unwrap();
    let states: Vec<_> = states.iter().map(|release| release.state).collect();
    assert_eq!(states, [StoredState::Live, StoredState::Retired]);
}

#[tokio::test(start_paused = true)]
async fn one_deploy_at_a_time() {
    let bench = Bench::new().await;
    let notes = app("notes");
    bench.nodes.act("notes", 1, Act::Ready(5_000));
    let new = release(|_| {});
    let converge = bench.control.converge();
    let both = futures_util::future::join_all([
        converge.deploy(&notes, &new, None),
        converge.deploy(&notes, &new, None),
    ]);
    let begun: Vec<_> = both.await;
    let refused = begun
        .iter()
        .filter(|r| matches!(r, Err(DeployError::UnderWay { .. })))
        .count();
    assert_eq!((refused, begun.len()), (1, 2));
    let id = begun.into_iter().find_map(Result::ok).unwrap();
    assert_eq!(
        bench.over(&notes, &id).await.state,
        StoredOperationState::Succeeded
    );
}

#[tokio::test(start_paused = true)]
async fn a_deploy_that_a_crash_interrupts_is_failed_and_nothing_of_it_is_left() {
    let mut bench = Bench::new().await;
    let notes = app("notes");
    bench.deploy(&notes).await;
    let old = bench.door.request(&notes).await.unwrap();
    bench.nodes.act("notes", 2, Act::Hang);
    let converge = bench.control.converge();
    let id = converge
        .deploy(&notes, &release(|_| {}), None)
        .await
        .unwrap();
    bench.settle(1_000).await;
    assert_eq!(bench.nodes.running().len(), 2);

    bench = bench.crash().await;
    let record = bench.over(&notes, &id).await;
    assert_eq!(record.state, StoredOperationState::Failed);
    assert!(record.error.unwrap().1.contains("deploy again"));
    bench.settle(1_000).await;
    assert_eq!(
        bench.nodes.running(),
        [(old, 1)],
        "the old VM is adopted, the new one stopped"
    );
    let releases = bench.control.converge().releases(&notes).await.unwrap();
    assert_eq!(releases[1].state, StoredState::Failed);
    assert_eq!(bench.door.request(&notes).await.unwrap(), old);
    assert_eq!(
        bench.deploy(&notes).await.state,
        StoredOperationState::Succeeded
    );
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_deploy_that_the_store_refuses_blocks_no_other() {
    for another_deploy in [true, false] {
        let store = MoodyStore::new();
        let bench = Bench::on(store.clone()).await;
        let notes = app("notes");
        bench.deploy(&notes).await;
        bench.nodes.act("notes", 2, Act::Crash);
        let converge = bench.control.converge();
        let begun = converge.deploy(&notes, &release(|_| {}), None).await;
        let id = begun.unwrap();
        store.fills(true);
        let told = bench.over(&notes, &id).await;
        assert!(
            told.error.unwrap().1.contains("KeyError"),
            "who waits hears why"
        );
        let refused = converge.deploy(&notes, &release(|_| {}), None).await;
        assert!(matches!(refused, Err(DeployError::Store(_))), "{refused:?}");
        store.fills(false);
        if another_deploy {
            let done = bench.deploy(&notes).await;
            assert_eq!(done.state, StoredOperationState::Succeeded);
        } else {
            bench.settle(31_000).await;
            let record = converge.app_record(&notes).await.unwrap().unwrap().record;
            assert_eq!(record.deploying, None, "the repair writes it down");
        }
        let key = operation_key(&notes.account, &id);
        let stored = load::<OperationRecord>(&*bench.store, &key).await.unwrap();
        let (_, message) = stored.unwrap().record.error.unwrap();
        assert!(message.contains("KeyError"), "{message}");
        let releases = converge.releases(&notes).await.unwrap();
        assert_eq!(releases[1].state, StoredState::Failed);
        assert!(converge.inner.operations.unwritten().is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn a_promotion_that_the_store_refuses_fails_its_deploy_and_blocks_no_other() {
    let store = MoodyStore::new();
    let bench = Bench::on(store.clone()).await;
    let notes = app("notes");
    bench.deploy(&notes).await;
    let old = bench.door.request(&notes).await.unwrap();
    bench.door.busy(&notes, old, 1);
    let converge = bench.control.converge();
    let begun = converge.deploy(&notes, &release(|_| {}), None).await;
    store.fills(true);
    let told = bench.over(&notes, &begun.unwrap()).await;
    assert_eq!(told.state, StoredOperationState::Failed);
    assert_eq!(bench.door.request(&notes).await.unwrap(), old);
    store.fills(false);
    let done = bench.deploy(&notes).await;
    assert_eq!(done.result.as_deref(), Some("3"), "{done:?}");
}

#[tokio::test(start_paused = true)]
async fn the_end_of_other_work_that_the_store_refuses_is_written_down_later() {
    let store = MoodyStore::new();
    let bench = Bench::on(store.clone()).await;
    let operations = &bench.control.converge().inner.operations;
    let me = &app("notes").account;
    let record = Operations::record("image_build", "mine", None, 0);
    let key = operation_key(me, "abc");
    let write = Transaction::default().put(&key, encode(&record));
    bench.store.commit(write).await.unwrap();
    operations.begin(me, "abc", record);
    store.fills(true);
    let outcome = Outcome::Succeeded {
        result: "x".to_owned(),
    };
    assert!(operations.finish(me, "abc", outcome).await.is_err());
    let told = operations.wait(me, "abc", 0, Duration::ZERO).await.unwrap();
    assert_eq!(told.unwrap().result.as_deref(), Some("x"));
    store.fills(false);
    bench.settle(31_000).await;
    let stored = load::<OperationRecord>(&*bench.store, &key).await.unwrap();
    assert_eq!(stored.unwrap().record.result.as_deref(), Some("x"));
}

#[tokio::test(start_paused = true)]
async fn a_mark_of_a_deploy_that_nobody_runs_is_taken_away() {
    for restart in [true, false] {
        let mut bench = Bench::new().await;
        let notes = app("notes");
        bench.deploy(&notes).await;
        let mut pending = crate::domain::release::sample(2);
        pending.state = StoredState::Pending;
        let mut record = AppRecord::new(0);
        (record.release, record.next_release) = (Some(1), 3);
        // Its operation is not even there.
        record.deploying = Some("gone".to_owned());
        let at = crate::store::record::release::release_key(&notes.account, &notes.app, 2);
        let write = Transaction::default()
            .put(app_key(&notes.account, &notes.app), encode(&record))
            .put(at, encode(&pending));
        bench.store.commit(write).await.unwrap();
        if restart {
            bench = bench.crash().await;
            let record = bench.control.converge().app_record(&notes).await.unwrap();
            assert_eq!(record.unwrap().record.deploying, None);
        }
        let done = bench.deploy(&notes).await;
        assert_eq!(done.result.as_deref(), Some("3"), "{done:?}");
        let releases = bench.control.converge().releases(&notes).await.unwrap();
        assert_eq!(releases[1].state, StoredState::Failed);
    }
}

/// What the store has of an app.
async fn left_of(bench: &Bench, name: &str) -> Vec<String> {
    let all = every(&*bench.store, "").await.unwrap();
    let keys = all.into_iter().map(|entry| entry.key);
    let of_app = |key: &String| key.split('/').nth(2) == Some(name);
    keys.filter(of_app).collect()
}

#[tokio::test(start_paused = true)]
async fn a_removal_goes_on_after_a_slow_stop_a_stubborn_log_and_a_crash() {
    let mut bench = Bench::new().await;
    let notes = app("notes");
    bench.deploy(&notes).await;
    bench.nodes.state.lock().unwrap().stops_hang = true;
    let slow = bench.control.converge().remove(&notes).await;
    assert!(matches!(slow, Err(RemovalError::Slow { .. })), "{slow:?}");
    let again = bench
        .control
        .converge()
        .deploy(&notes, &release(|_| {}), None)
        .await;
    assert!(matches!(again, Err(DeployError::Removing(_))), "{again:?}");
    bench.nodes.state.lock().unwrap().stops_hang = false;
    bench.nodes.state.lock().unwrap().logs_stay = true;
    bench.settle(120_000).await;
    assert!(
        bench.nodes.running().is_empty(),
        "the stop is asked for again"
    );
    let stays = bench.control.converge().remove(&notes).await;
    assert!(matches!(stays, Err(RemovalError::Log { .. })), "{stays:?}");

    bench = bench.crash().await;
    assert!(!left_of(&bench, "notes").await.is_empty());
    bench.nodes.state.lock().unwrap().logs_stay = false;
    bench.settle(31_000).await;
    assert_eq!(left_of(&bench, "notes").await, Vec::<String>::new());
    assert_eq!(bench.nodes.state.lock().unwrap().logs_forgotten, ["notes"]);
    let none = bench.control.converge().remove(&notes).await;
    assert!(matches!(none, Err(RemovalError::NoApp { .. })), "{none:?}");
    let done = bench.deploy(&notes).await;
    assert_eq!(
        done.result.as_deref(),
        Some("1"),
        "a new app of the old name"
    );
    bench.settle(100_000).await;
    assert_eq!(bench.nodes.state.lock().unwrap().logs_forgotten, ["notes"]);
}

#[tokio::test(start_paused = true)]
async fn an_app_that_is_removed_while_its_first_release_is_tried_leaves_nothing() {
    let bench = Bench::new().await;
    let notes = app("notes");
    bench.nodes.act("notes", 1, Act::Hang);
    let converge = bench.control.converge();
    converge
        .deploy(&notes, &release(|_| {}), None)
        .await
        .unwrap();
    bench.settle(100).await;
    assert_eq!(bench.nodes.running().len(), 1);
    converge.remove(&notes).await.unwrap();
    assert!(bench.nodes.running().is_empty());
    assert_eq!(left_of(&bench, "notes").await, Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn a_gateway_that_comes_back_is_told_everything_and_forgets_what_is_over() {
    let bench = Bench::new().await;
    let notes = app("notes");
    bench.deploy(&notes).await;
    let vm = bench.door.request(&notes).await.unwrap();
    let gone = VmId::from_bytes([9; 16]);
    bench.door.state.lock().unwrap().sent.clear();
    let warm = |vm| Activity {
        app: notes.key(),
        vm,
        in_flight: 0,
        idle_ms: 10,
    };
    let warm = vec![warm(vm), warm(gone)];
    bench.control.door_event(FromGateway::Hello {
        generation: 1,
        warm,
        stamp: String::new(),
    });
    bench.settle(10).await;
    let sent = bench.door.sent();
    let at = |wanted: fn(&ToGateway) -> bool| sent.iter().position(wanted).unwrap();
    let end = at(|m| matches!(m, ToGateway::RoutesEnd));
    assert!(at(|m| matches!(m, ToGateway::Routes { .. })) < end);
    assert!(end < at(|m| matches!(m, ToGateway::Awake { .. })));
    let told_gone = |m: &ToGateway| matches!(m, ToGateway::Gone { vm, .. } if *vm == gone);
    assert!(sent.iter().any(told_gone), "{sent:?}");
    assert!(
        !sent
            .iter()
            .any(|m| matches!(m, ToGateway::Gone { vm: v, .. } if *v == vm))
    );
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_dies_or_vanishes_is_told_and_the_next_request_wakes_another() {
    let bench = Bench::new().await;
    let notes = app("notes");
    bench.deploy(&notes).await;
    let first = bench.door.request(&notes).await.unwrap();
    bench.nodes.die(first, VmFailureKind::Died);
    bench.settle(1_100).await;
    let second = bench.door.request(&notes).await.unwrap();
    assert_ne!(first, second);
    bench.nodes.vanish(second);
    bench.settle(65_000).await;
    let third = bench.door.request(&notes).await.unwrap();
    assert_ne!(second, third);
    let gone = |vm| {
        let told = bench.door.sent();
        told.iter()
            .any(|m| matches!(m, ToGateway::Gone { vm: v, .. } if *v == vm))
    };
    assert!(gone(first) && gone(second) && !gone(third));
}

#[tokio::test(start_paused = true)]
async fn a_storm_of_failures_loses_no_wake_and_ends_in_a_healthy_app() {
    let bench = Bench::new().await;
    let notes = app("notes");
    bench.deploy(&notes).await;
    bench.control.converge().sleep(&notes).await.unwrap();
    for round in 0..40 {
        let act = [Act::Crash, Act::Broken, Act::NoRoom, Act::Die(3)][round % 4];
        bench.nodes.act("notes", 1, act);
        let asked = tokio::time::timeout(Duration::from_secs(200), bench.door.request(&notes));
        let answer = asked.await.expect("every wake is answered");
        if let Err(failure) = answer {
            assert!(!failure.message.contains("KeyError"), "{failure:?}");
            assert!(failure.retry_after_s >= 1);
        }
        bench.settle(200).await;
    }
    bench.nodes.act("notes", 1, Act::Ready(10));
    bench.settle(61_000).await;
    bench.door.request(&notes).await.unwrap();
    assert_eq!(bench.nodes.running().len(), 1);
    assert_eq!(bench.nodes.state.lock().unwrap().most_at_once["notes"], 1);
}

#[tokio::test(start_paused = true)]
async fn an_app_that_never_sleeps_is_revived_and_survives_a_restart() {
    let mut bench = Bench::new().await;
    let notes = app("notes");
    let new = release(|new| new.rules.sleeps = false);
    let id = bench
        .control
        .converge()
        .deploy(&notes, &new, None)
        .await
        .unwrap();
    bench.over(&notes, &id).await;
    bench.settle(1_000_000).await;
    let (vm, _) = bench.nodes.running()[0];
    bench.nodes.die(vm, VmFailureKind::Died);
    bench.settle(5_000).await;
    let (vm, _) = bench.nodes.running()[0];
    bench.nodes.vanish(vm);
    bench = bench.crash().await;
    bench.settle(5_000).await;
    assert_eq!(
        bench.nodes.running().len(),
        1,
        "it is started without a request"
    );
    bench.control.converge().sleep(&notes).await.unwrap();
    bench.settle(100_000).await;
    assert!(
        bench.nodes.running().is_empty(),
        "its owner put it to sleep"
    );
}

#[tokio::test(start_paused = true)]
async fn vms_of_nobody_are_stopped() {
    let mut bench = Bench::new().await;
    let notes = app("notes");
    bench.deploy(&notes).await;
    let key = app_key(&notes.account, &notes.app);
    bench
        .store
        .commit(Transaction::default().delete(key))
        .await
        .unwrap();
    assert_eq!(bench.nodes.running().len(), 1);
    bench = bench.crash().await;
    bench.settle(1_000).await;
    assert!(bench.nodes.running().is_empty());
}

/// Bytes of this process that are in memory.
fn resident_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = text.split_whitespace().nth(1).unwrap().parse().unwrap();
    pages * 4096
}

#[tokio::test(start_paused = true)]
async fn a_thousand_sleeping_apps_cost_no_slot_and_little_memory() {
    let bench = Bench::new().await;
    let before = resident_bytes();
    for n in 0..1000 {
        let app = app(&format!("app-{n}"));
        let mut record = AppRecord::new(0);
        record.release = Some(1);
        record.next_release = 2;
        let release = crate::domain::release::sample(1);
        let at = crate::store::record::release::release_key(&app.account, &app.app, 1);
        let write = Transaction::default()
            .put(app_key(&app.account, &app.app), encode(&record))
            .put(at, encode(&release));
        bench.store.commit(write).await.unwrap();
        bench.control.converge().refresh(&app).await.unwrap();
    }
    bench.settle(100).await;
    assert_eq!(bench.control.converge().slot_count(), 0);
    let grown = resident_bytes().saturating_sub(before);
    println!(
        "1,000 sleeping apps, store in memory included: {} KiB",
        grown / 1024
    );
    assert!(grown < 64 * 1024 * 1024, "{grown} bytes");
}

impl Bench {
    async fn record(&self, app: &AppRef) -> AppRecord {
        let stored = self.control.converge().app_record(app).await;
        stored.unwrap().unwrap().record
    }

    async fn wake(&self, app: &AppRef) -> StartVm {
        self.control.converge().wake(app).await.unwrap();
        let state = self.nodes.state.lock().unwrap();
        state.starts.last().unwrap().clone()
    }

    /// As `spore secret set` does.
    async fn secret_changes(&self, app: &AppRef) {
        let key = app_key(&app.account, &app.app);
        let mut record = self.record(app).await;
        record.secrets_changed = true;
        let write = Transaction::default().put(key, encode(&record));
        self.store.commit(write).await.unwrap();
    }

    fn notes(&self) -> Vec<String> {
        self.nodes.state.lock().unwrap().notes.clone()
    }

    async fn keys(&self) -> usize {
        every(&*self.store, "snapshot-key/").await.unwrap().len()
    }

    /// What the last VM that the node was asked for begins from.
    fn last_source(&self) -> Source {
        let state = self.nodes.state.lock().unwrap();
        state.starts.last().unwrap().source
    }

    fn snapshots(&self) -> usize {
        self.nodes.state.lock().unwrap().snapshots.ids().len()
    }
}

/// An app that was idle for its time and is suspended.
async fn suspended() -> (Bench, AppRef) {
    let (bench, notes) = (Bench::new().await, app("notes"));
    let new = release(|new| new.rules.suspends = true);
    let converge = bench.control.converge();
    let id = converge.deploy(&notes, &new, None).await.unwrap();
    bench.over(&notes, &id).await;
    bench.settle(61_000).await;
    assert_eq!(bench.nodes.running(), []);
    (bench, notes)
}

#[tokio::test(start_paused = true)]
async fn an_idle_app_is_suspended_and_its_next_vm_goes_on_from_there_once() {
    let (mut bench, notes) = suspended().await;
    for _round in 0..3 {
        let kept = bench.record(&notes).await.suspended.unwrap();
        assert_eq!((bench.snapshots(), bench.keys().await), (1, 1));
        // What an app goes on from is nothing to collect.
        let converge = bench.control.converge();
        let collected = converge.collect_snapshots(CollectMode::Remove).await;
        assert_eq!(collected.unwrap().len(), 0);
        bench = bench.crash().await;
        let start = bench.wake(&notes).await;
        assert_eq!(start.source, Source::Suspended(kept.snapshot));
        bench.settle(10).await;
        assert_eq!(bench.record(&notes).await.suspended, None);
        assert_eq!((bench.snapshots(), bench.keys().await), (0, 0));
        assert_eq!(bench.notes(), Vec::<String>::new());
        bench.settle(61_000).await;
    }
    assert!(bench.nodes.state.lock().unwrap().stops.is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_an_app_is_suspended_in_is_not_removed_under_it() {
    let (bench, notes) = suspended().await;
    let kept = bench.record(&notes).await.suspended.unwrap().snapshot;
    let (converge, id) = (bench.control.converge(), kept.to_string());
    for dependents in [Dependents::Keep, Dependents::Remove] {
        let removed = converge.remove_snapshot(&notes.account, &id, dependents);
        let refused = removed.await.unwrap_err();
        assert!(
            matches!(refused, SnapshotError::NeededByApp { .. }),
            "{refused}"
        );
    }
    assert_eq!((bench.snapshots(), bench.keys().await), (1, 1));
    let start = bench.wake(&notes).await;
    assert_eq!(start.source, Source::Suspended(kept));
}

#[tokio::test(start_paused = true)]
async fn an_app_that_may_hold_a_secret_that_was_is_stopped_and_nothing_goes_on_from_it() {
    let (bench, notes) = suspended().await;
    bench.secret_changes(&notes).await;
    let start = bench.wake(&notes).await;
    assert_eq!(start.source.snapshot(), None);
    assert_eq!((bench.snapshots(), bench.keys().await), (0, 0));

    bench.secret_changes(&notes).await;
    bench.settle(61_000).await;
    assert_eq!(bench.nodes.running(), []);
    assert_eq!(bench.record(&notes).await.suspended, None);
    let told = bench.notes().join("; ");
    assert!(told.contains("a secret was changed"), "{told}");

    bench.wake(&notes).await;
    bench.settle(61_000).await;
    let kept = bench.record(&notes).await.suspended;
    assert!(kept.is_some(), "it has the new one");
}

#[tokio::test(start_paused = true)]
async fn an_app_that_cannot_be_suspended_is_stopped_and_its_owner_is_told() {
    let (bench, notes) = (Bench::new().await, app("notes"));
    let message = "the account's snapshots have no room".to_owned();
    bench.nodes.state.lock().unwrap().snapshots.refuses =
        Some(NodesError::SnapshotQuota { message });
    let new = release(|new| new.rules.suspends = true);
    let converge = bench.control.converge();
    let id = converge.deploy(&notes, &new, None).await.unwrap();
    bench.over(&notes, &id).await;
    bench.settle(61_000).await;
    assert_eq!(bench.nodes.running(), []);
    assert_eq!(bench.record(&notes).await.suspended, None);
    assert_eq!(bench.keys().await, 0);
    let told = bench.notes().join("; ");
    assert!(
        told.contains("not suspended") && told.contains("no room"),
        "{told}"
    );
    assert!(!matches!(
        bench.wake(&notes).await.source,
        Source::Suspended(_)
    ));
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_gone_on_from_is_tried_twice_and_then_the_app_begins_anew() {
    let (bench, notes) = suspended().await;
    bench.nodes.act("notes", 1, Act::Hang);
    let (converge, app) = (bench.control.converge().clone(), notes.clone());
    let wake = tokio::spawn(async move { converge.wake(&app).await });
    for tries in 1..=2 {
        bench.settle(10).await;
        let (vm, _) = bench.nodes.running()[0];
        let source = bench.nodes.state.lock().unwrap().vms[&vm].source;
        assert!(matches!(source, Source::Suspended(_)), "{tries}");
        bench.nodes.shelve_again();
        if tries == 2 {
            bench.nodes.act("notes", 1, Act::Ready(1));
        }
        bench.nodes.die(vm, VmFailureKind::Snapshot);
    }
    wake.await.unwrap().unwrap();
    let source = bench.last_source();
    assert_eq!(source, Source::Boot);
    bench.settle(10).await;
    assert_eq!(bench.record(&notes).await.suspended, None);
    assert_eq!((bench.snapshots(), bench.keys().await), (0, 0));
    let told = bench.notes().join("; ");
    assert!(told.contains("started anew"), "{told}");
}

#[tokio::test(start_paused = true)]
async fn what_is_suspended_goes_with_its_app_and_with_a_new_release() {
    let (bench, notes) = suspended().await;
    bench.control.converge().remove(&notes).await.unwrap();
    assert_eq!((bench.snapshots(), bench.keys().await), (0, 0));

    let (bench, notes) = suspended().await;
    assert_eq!(
        bench.deploy(&notes).await.state,
        StoredOperationState::Succeeded
    );
    let source = bench.last_source();
    assert!(
        !matches!(source, Source::Suspended(_)),
        "it is another release"
    );
    bench.settle(10).await;
    assert_eq!(bench.record(&notes).await.suspended, None);
    assert_eq!((bench.snapshots(), bench.keys().await), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_release_that_fails_leaves_what_is_suspended_as_it_is() {
    let (bench, notes) = suspended().await;
    bench.nodes.act("notes", 2, Act::Crash);
    bench.deploy(&notes).await;
    let kept = bench.record(&notes).await.suspended.unwrap();
    let start = bench.wake(&notes).await;
    assert_eq!(start.source, Source::Suspended(kept.snapshot));
}

impl Bench {
    async fn set(&self, app: &AppRef, name: &str, value: &str) {
        let value = SecretBytes::new(value.as_bytes().to_vec());
        let name = name.parse().unwrap();
        let set = self.control.converge().set_secret(app, &name, &value).await;
        set.unwrap();
    }

    async fn unset(&self, app: &AppRef, name: &str) {
        let name = name.parse().unwrap();
        let removed = self.control.converge().remove_secret(app, &name).await;
        removed.unwrap();
    }

    /// Deploys a release that wants `KEY` and, as a file, `CERT`.
    async fn deploy_with_secrets(&self, app: &AppRef) {
        let new = release(|new| {
            new.rules.secret_names = vec!["KEY".parse().unwrap()];
            new.rules.secret_files = vec!["CERT".parse().unwrap()];
        });
        let id = self.control.converge().deploy(app, &new, None).await;
        self.over(app, &id.unwrap()).await;
    }

    /// What the node was told of a VM's secrets, each time.
    fn told(&self, vm: VmId) -> Vec<String> {
        let state = self.nodes.state.lock().unwrap();
        let starts = state.starts.iter().filter(|start| start.vm == vm);
        let told = starts.map(|start| {
            let process = start.process.as_ref().unwrap();
            let all = process.secret_environment.iter();
            let all = all.chain(&process.secret_files).map(|(name, value)| {
                let value = String::from_utf8_lossy(value.expose()).into_owned();
                format!("{name}={value}")
            });
            all.collect::<Vec<_>>().join(" ")
        });
        told.collect()
    }

    /// The values that are kept although they are not given any more.
    async fn former(&self) -> Vec<String> {
        let entries = every(&*self.store, FORMER_SECRETS).await.unwrap();
        entries.into_iter().map(|entry| entry.key).collect()
    }

    async fn revision(&self) -> u64 {
        self.store.commit(Transaction::default()).await.unwrap()
    }

    async fn next_daemon(self) -> Self {
        let next = self.crash().await;
        next.settle(100).await;
        next
    }
}

/// An app that serves and was given `KEY=one CERT=cert`.
async fn given() -> (Bench, AppRef, VmId) {
    let (bench, notes) = (Bench::new().await, app("notes"));
    bench.set(&notes, "KEY", "one").await;
    bench.set(&notes, "CERT", "cert").await;
    bench.deploy_with_secrets(&notes).await;
    let (vm, _) = bench.nodes.running()[0];
    assert_eq!(bench.told(vm), ["KEY=one CERT=cert"]);
    assert_eq!(bench.former().await, Vec::<String>::new());
    (bench, notes, vm)
}

#[tokio::test(start_paused = true)]
async fn a_vm_is_reminded_of_the_values_that_it_was_given() {
    let (bench, notes, vm) = given().await;
    bench.set(&notes, "KEY", "two").await;
    let bench = bench.next_daemon().await;
    assert_eq!(bench.told(vm), ["KEY=one CERT=cert"; 2]);

    bench.set(&notes, "KEY", "three").await;
    bench.settle(100).await;
    let kept = bench.former().await;
    assert_eq!(kept, ["former-secret/me/notes/KEY/2"], "`two` is nowhere");
    let bench = bench.next_daemon().await;
    assert_eq!(bench.told(vm), ["KEY=one CERT=cert"; 3]);

    let fresh = bench.control.converge().restart(&notes).await.unwrap();
    assert_eq!(bench.told(fresh), ["KEY=three CERT=cert"]);
    bench.settle(100).await;
    assert_eq!(bench.former().await, Vec::<String>::new());
    let bench = bench.next_daemon().await;
    assert_eq!(bench.told(fresh), ["KEY=three CERT=cert"; 2]);
}

#[tokio::test(start_paused = true)]
async fn a_vm_is_reminded_of_a_secret_that_was_removed_until_it_sleeps() {
    let (bench, notes, vm) = given().await;
    let before = bench.revision().await;
    bench.unset(&notes, "KEY").await;
    assert_eq!(bench.revision().await, before + 2, "it is one commit");
    bench.unset(&notes, "CERT").await;
    bench.set(&notes, "CERT", "other").await;
    let bench = bench.next_daemon().await;
    assert_eq!(bench.told(vm), ["KEY=one CERT=cert"; 2]);
    assert_eq!(bench.former().await.len(), 2);

    bench.control.converge().sleep(&notes).await.unwrap();
    bench.settle(100).await;
    assert_eq!(bench.former().await, Vec::<String>::new());
    let starts = bench.nodes.starts();
    let refused = bench.control.converge().wake(&notes).await.unwrap_err();
    assert!(refused.message.contains("spore secret set notes KEY"));
    assert_eq!(bench.nodes.starts(), starts, "what was is given to nobody");
}

#[tokio::test(start_paused = true)]
async fn each_of_two_vms_is_reminded_of_its_own_values() {
    let (bench, notes, old) = given().await;
    bench.set(&notes, "KEY", "two").await;
    // A release that is tried and fails leaves the old VM with what it has.
    bench.nodes.act("notes", 2, Act::Crash);
    bench.deploy_with_secrets(&notes).await;
    let bench = bench.next_daemon().await;
    assert_eq!(bench.told(old), ["KEY=one CERT=cert"; 2]);

    // One that serves beside it for a while has the values of its own start.
    bench.door.busy(&notes, old, 1);
    bench.deploy_with_secrets(&notes).await;
    let vms = bench.nodes.running();
    let (new, _) = *vms.iter().find(|(vm, _)| *vm != old).unwrap();
    assert_eq!(vms.len(), 2, "the old one drains");
    bench.set(&notes, "KEY", "three").await;
    bench.settle(100).await;
    let kept = bench.former().await;
    let [one, two] = ["KEY/2", "KEY/3"].map(|it| format!("former-secret/me/notes/{it}"));
    assert_eq!(kept, [one, two.clone()]);
    bench.settle(40_000).await;
    assert_eq!(bench.nodes.running().len(), 1);
    assert_eq!(bench.former().await, [two]);
    let bench = bench.next_daemon().await;
    assert_eq!(bench.told(new), ["KEY=two CERT=cert"; 2]);
}

#[tokio::test(start_paused = true)]
async fn a_vm_whose_values_are_not_known_any_more_is_told_none() {
    let (bench, notes, vm) = given().await;
    bench.set(&notes, "KEY", "two").await;
    for key in bench.former().await {
        let forget = Transaction::default().delete(key);
        bench.store.commit(forget).await.unwrap();
    }
    let bench = bench.next_daemon().await;
    assert_eq!(bench.told(vm), ["KEY=one CERT=cert"]);
    let told = bench.notes().join("; ");
    assert!(told.contains("spore stop notes"), "{told}");
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_is_newer_than_the_store_is_told_none() {
    let (bench, notes, vm) = given().await;
    // As when the store was put back from a backup.
    let mut record = bench.record(&notes).await;
    record.secrets_version = 1;
    let key = app_key(&notes.account, &notes.app);
    let write = Transaction::default().put(key, encode(&record));
    bench.store.commit(write).await.unwrap();
    let bench = bench.next_daemon().await;
    assert_eq!(bench.told(vm), ["KEY=one CERT=cert"]);
}

#[tokio::test(start_paused = true)]
async fn what_secrets_were_goes_with_the_vm_that_held_them_and_with_the_app() {
    let (bench, notes, vm) = given().await;
    bench.set(&notes, "KEY", "two").await;
    assert_eq!(bench.former().await.len(), 1);
    // It ends while no daemon looks.
    bench.nodes.vanish(vm);
    let bench = bench.next_daemon().await;
    assert_eq!(bench.former().await, Vec::<String>::new());
    assert!(!bench.record(&notes).await.secrets_changed);

    bench.control.converge().wake(&notes).await.unwrap();
    bench.set(&notes, "KEY", "three").await;
    assert_eq!(bench.former().await.len(), 1);
    bench.control.converge().remove(&notes).await.unwrap();
    assert_eq!(bench.former().await, Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn of_values_that_nobody_held_none_is_kept() {
    let (bench, notes, vm) = given().await;
    let big = "x".repeat(65_000);
    for round in 0..40 {
        bench.set(&notes, "KEY", &format!("{big}{round}")).await;
    }
    bench.settle(100).await;
    assert_eq!(bench.former().await, ["former-secret/me/notes/KEY/2"]);
    let bench = bench.next_daemon().await;
    assert_eq!(bench.told(vm), ["KEY=one CERT=cert"; 2]);
}

#[tokio::test(start_paused = true)]
async fn where_too_much_is_kept_a_change_goes_on_and_the_vm_is_told_nothing() {
    let (bench, notes, vm) = given().await;
    let name = "OTHER".parse().unwrap();
    for until in 1000..1512 {
        let secret = SecretRecord {
            revision: 1,
            sealed: String::new(),
            updated_at_ms: 0,
            since: 0,
        };
        let record = encode(&FormerSecretRecord { secret, until });
        let key = former_secret_key(&notes.account, &notes.app, &name, until);
        let write = Transaction::default().put(key, record);
        bench.store.commit(write).await.unwrap();
    }
    bench.set(&notes, "KEY", "two").await;
    assert_eq!(bench.former().await.len(), 512);
    let bench = bench.next_daemon().await;
    assert_eq!(bench.told(vm), ["KEY=one CERT=cert"]);
    bench.control.converge().restart(&notes).await.unwrap();
    bench.settle(100).await;
    assert_eq!(bench.former().await, Vec::<String>::new());
}
