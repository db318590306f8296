//! What every store must do: one suite, run against each engine.

use core::time::Duration;

use super::embedded::EmbeddedStore;
use super::lease::{Leased, give_back, take};
use super::memory::MemoryStore;
use super::{
    Change, CommitError, LIST_ITEMS_MAX, Order, Range, Store, StoreError, Transaction, every,
};

fn put(key: &str, value: &str) -> Transaction {
    Transaction::default().put(key, value.as_bytes().to_vec())
}

/// Runs every case against a fresh store.
pub(super) async fn suite(store: &dyn Store) {
    reads_what_was_written(store).await;
    commits_all_or_nothing(store).await;
    lists_in_order_and_in_pages(store).await;
    an_answer_is_bounded_and_every_entry_comes_all_the_same(store).await;
    one_of_many_writers_wins(store).await;
    watches_a_prefix(store).await;
    leases_have_one_owner(store).await;
    refuses_what_is_too_large(store).await;
}

async fn reads_what_was_written(store: &dyn Store) {
    assert_eq!(store.get("a/1").await.unwrap(), None);
    let first = store.commit(put("a/1", "x")).await.unwrap();
    let entry = store.get("a/1").await.unwrap().unwrap();
    assert_eq!(
        (entry.version, entry.value.as_slice()),
        (first, b"x".as_slice())
    );
    let second = store.commit(put("a/1", "")).await.unwrap();
    assert!(second > first && first > 0);
    assert!(store.get("a/1").await.unwrap().unwrap().value.is_empty());
    store
        .commit(Transaction::default().delete("a/1").delete("a/2"))
        .await
        .unwrap();
    assert_eq!(store.get("a/1").await.unwrap(), None);
}

async fn commits_all_or_nothing(store: &dyn Store) {
    let version = store.commit(put("b/1", "x")).await.unwrap();
    let stale = put("b/2", "y").when("b/1", version + 1000);
    let error = store.commit(stale).await.unwrap_err();
    assert!(matches!(error, CommitError::Conflict { key } if key == "b/1"));
    assert_eq!(store.get("b/2").await.unwrap(), None);
    store
        .commit(put("b/2", "y").when("b/1", version).when("b/2", 0))
        .await
        .unwrap();
    let twice = put("b/2", "z").when("b/2", 0);
    assert!(matches!(
        store.commit(twice).await,
        Err(CommitError::Conflict { .. })
    ));
    let both = put("b/3", "x").delete("b/2").put("b/2", b"last".to_vec());
    store.commit(both).await.unwrap();
    assert_eq!(store.get("b/2").await.unwrap().unwrap().value, b"last");
}

async fn lists_in_order_and_in_pages(store: &dyn Store) {
    for key in ["c/2", "c/10", "c/1", "c", "c0", "d/1"] {
        store.commit(put(key, key)).await.unwrap();
    }
    let keys = |range: Range| async move {
        let entries = store.list(range).await.unwrap();
        entries.into_iter().map(|e| e.key).collect::<Vec<_>>()
    };
    let all = every(store, "c/").await.unwrap();
    let all: Vec<_> = all.into_iter().map(|entry| entry.key).collect();
    assert_eq!(all, ["c/1", "c/10", "c/2"]);
    assert_eq!(store.count("c/").await.unwrap(), 3);
    let page = |after: Option<&str>, order| Range {
        prefix: "c/".to_owned(),
        after: after.map(str::to_owned),
        limit: 2,
        order,
    };
    assert_eq!(keys(page(None, Order::Rising)).await, ["c/1", "c/10"]);
    assert_eq!(keys(page(Some("c/10"), Order::Rising)).await, ["c/2"]);
    assert_eq!(keys(page(Some("c/15"), Order::Rising)).await, ["c/2"]);
    assert_eq!(keys(page(None, Order::Falling)).await, ["c/2", "c/10"]);
    assert_eq!(keys(page(Some("c/10"), Order::Falling)).await, ["c/1"]);
    assert_eq!(
        keys(page(Some("c/1"), Order::Falling)).await,
        Vec::<String>::new()
    );
}

async fn an_answer_is_bounded_and_every_entry_comes_all_the_same(store: &dyn Store) {
    let count = LIST_ITEMS_MAX + 1;
    let keys = (0..count).map(|n| format!("many/{n:06}"));
    let write = |all: Transaction, key| all.put(key, Vec::new());
    let written = store.commit(keys.fold(Transaction::default(), write)).await;
    written.unwrap();
    let range = Range {
        prefix: "many/".to_owned(),
        after: None,
        limit: usize::MAX,
        order: Order::Rising,
    };
    assert_eq!(store.list(range).await.unwrap().len(), LIST_ITEMS_MAX);
    let all = every(store, "many/").await.unwrap();
    assert_eq!(all.len(), count);
    assert!(all.is_sorted_by(|a, b| a.key < b.key));
}

async fn one_of_many_writers_wins(store: &dyn Store) {
    store.commit(put("e/n", "0")).await.unwrap();
    let add = || async {
        loop {
            let entry = store.get("e/n").await.unwrap().unwrap();
            let n: u32 = String::from_utf8(entry.value).unwrap().parse().unwrap();
            let next = put("e/n", &(n + 1).to_string()).when("e/n", entry.version);
            if store.commit(next).await.is_ok() {
                return;
            }
        }
    };
    futures_util::future::join_all((0..20).map(|_| add())).await;
    assert_eq!(store.get("e/n").await.unwrap().unwrap().value, b"20");
}

async fn watches_a_prefix(store: &dyn Store) {
    let mut watch = store.watch("f/");
    store.commit(put("g/1", "x")).await.unwrap();
    let put_at = store.commit(put("f/1", "x")).await.unwrap();
    let deleted_at = store
        .commit(Transaction::default().delete("f/1"))
        .await
        .unwrap();
    let key = "f/1".to_owned();
    let put = Change::Put {
        key: key.clone(),
        version: put_at,
    };
    assert_eq!(watch.next().await, Some(put));
    let deleted = Change::Delete {
        key,
        version: deleted_at,
    };
    assert_eq!(watch.next().await, Some(deleted));

    let mut slow = store.watch("f/");
    for _ in 0..1100 {
        let refused = Transaction::default()
            .put("f/2", Vec::new())
            .when("f/none", 7);
        store.commit(refused).await.unwrap_err();
    }
    let many = (0..1100).fold(Transaction::default(), |t, _| t.put("f/2", Vec::new()));
    store.commit(many).await.unwrap();
    assert_eq!(slow.next().await, Some(Change::Missed));
}

async fn leases_have_one_owner(store: &dyn Store) {
    let span = Duration::from_secs(10);
    let ends_at_ms = 11_000;
    let ours = Leased::Ours { ends_at_ms };
    assert_eq!(
        take(store, "control", "one", span, 1000).await.unwrap(),
        ours
    );
    let theirs = take(store, "control", "two", span, 10_999).await.unwrap();
    assert!(matches!(theirs, Leased::Theirs(held) if held.owner == "one"));
    give_back(store, "control", "two").await.unwrap();
    let renewed = take(store, "control", "one", span, 5000).await.unwrap();
    assert_eq!(renewed, Leased::Ours { ends_at_ms: 15_000 });
    let over = take(store, "control", "two", span, 15_000).await.unwrap();
    assert_eq!(over, Leased::Ours { ends_at_ms: 25_000 });
    give_back(store, "control", "two").await.unwrap();
    let free = take(store, "control", "one", span, 16_000).await.unwrap();
    assert_eq!(free, Leased::Ours { ends_at_ms: 26_000 });
}

async fn refuses_what_is_too_large(store: &dyn Store) {
    let long = put(&"k".repeat(600), "");
    let error = store.commit(long).await.unwrap_err();
    assert!(matches!(
        error,
        CommitError::Store(StoreError::TooLarge { .. })
    ));
}

#[cfg(test)]
mod tests {
    use super::{EmbeddedStore, MemoryStore, StoreError, put, suite};
    use crate::store::Store as _;

    #[tokio::test]
    async fn the_store_in_memory_conforms() {
        suite(&MemoryStore::default()).await;
    }

    #[tokio::test]
    async fn the_embedded_store_conforms_and_is_for_its_owner_only() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.redb");
        let store = EmbeddedStore::open(&path).await.unwrap();
        suite(&store).await;
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[tokio::test]
    async fn a_second_daemon_on_the_same_folder_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.redb");
        let first = EmbeddedStore::open(&path).await.unwrap();
        first.commit(put("a", "1")).await.unwrap();
        let error = EmbeddedStore::open(&path).await.unwrap_err();
        assert!(matches!(error, StoreError::InUse { .. }), "{error}");
        assert!(
            error.to_string().contains("another Spore daemon"),
            "{error}"
        );
        drop(first);
        let again = EmbeddedStore::open(&path).await.unwrap();
        assert_eq!(again.get("a").await.unwrap().unwrap().value, b"1");
    }

    #[tokio::test]
    async fn a_file_that_is_no_store_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.redb");
        std::fs::write(&path, b"not a store".repeat(1000)).unwrap();
        let error = EmbeddedStore::open(&path).await.unwrap_err();
        assert!(matches!(error, StoreError::Open { .. }), "{error}");
    }
}
