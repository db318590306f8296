//! A disk that stops at any write, and what is found after it.
//!
//! Bytes written since the last sync survive a crash in part: none, all, or an arbitrary half of
//! the writes. Whatever survives, the store must open and hold exactly the commits that returned,
//! or one more that was under way.

use std::io;
use std::sync::{Arc, Mutex};

/// What is on the platter, and what was written since the last sync.
#[derive(Debug, Default)]
struct Disk {
    synced: Vec<u8>,
    current: Vec<u8>,
    pending: Vec<(u64, Vec<u8>)>,
    operations_left: u64,
    /// Bytes that it may hold; beyond them it is full.
    bytes_max: u64,
}

#[derive(Clone, Debug, Default)]
struct FailingBackend(Arc<Mutex<Disk>>);

impl FailingBackend {
    fn with_bytes(bytes: Vec<u8>, operations_left: u64) -> Self {
        let disk = Disk {
            synced: bytes.clone(),
            current: bytes,
            pending: Vec::new(),
            operations_left,
            bytes_max: u64::MAX,
        };
        Self(Arc::new(Mutex::new(disk)))
    }

    fn spend(disk: &mut Disk) -> io::Result<()> {
        match disk.operations_left.checked_sub(1) {
            Some(left) => {
                disk.operations_left = left;
                Ok(())
            }
            None => Err(io::Error::other("the disk is gone")),
        }
    }

    /// From now on there is so much room; what is there already stays.
    fn has_room_for(&self, bytes: u64) {
        self.0.lock().unwrap().bytes_max = bytes;
    }

    /// From now on so many operations succeed.
    fn works_for(&self, operations: u64) {
        self.0.lock().unwrap().operations_left = operations;
    }

    /// The bytes after a crash, when the pending writes that `survives` picks reached the platter.
    fn after_crash(&self, survives: impl Fn(usize) -> bool) -> Vec<u8> {
        let disk = self.0.lock().unwrap();
        let mut bytes = disk.synced.clone();
        bytes.resize(disk.current.len().max(bytes.len()), 0);
        for (index, (offset, data)) in disk.pending.iter().enumerate() {
            let start = usize::try_from(*offset).unwrap();
            if survives(index) && start + data.len() <= bytes.len() {
                bytes[start..start + data.len()].copy_from_slice(data);
            }
        }
        bytes
    }
}

impl redb::StorageBackend for FailingBackend {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().current.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let disk = self.0.lock().unwrap();
        let start = usize::try_from(offset).unwrap();
        out.copy_from_slice(&disk.current[start..start + out.len()]);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut disk = self.0.lock().unwrap();
        Self::spend(&mut disk)?;
        if len > disk.bytes_max {
            return Err(io::ErrorKind::StorageFull.into());
        }
        disk.current.resize(usize::try_from(len).unwrap(), 0);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut disk = self.0.lock().unwrap();
        Self::spend(&mut disk)?;
        disk.synced = disk.current.clone();
        disk.pending.clear();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut disk = self.0.lock().unwrap();
        Self::spend(&mut disk)?;
        let start = usize::try_from(offset).unwrap();
        disk.current[start..start + data.len()].copy_from_slice(data);
        disk.pending.push((offset, data.to_vec()));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::FailingBackend;
    use crate::store::embedded::EmbeddedStore;
    use crate::store::{Change, CommitError, Store as _, StoreError, Transaction};

    const COMMITS: u64 = 4;

    async fn write_some(store: &EmbeddedStore) -> u64 {
        for n in 1..=COMMITS {
            let value = n.to_string().into_bytes();
            let both = Transaction::default()
                .put("a", value.clone())
                .put("b", value);
            if store.commit(both).await.is_err() {
                return n - 1;
            }
        }
        COMMITS
    }

    async fn number(store: &EmbeddedStore, key: &str) -> u64 {
        let entry = store.get(key).await.unwrap();
        entry.map_or(0, |e| String::from_utf8(e.value).unwrap().parse().unwrap())
    }

    #[tokio::test]
    async fn a_store_goes_on_once_its_disk_does() {
        let disk = FailingBackend::with_bytes(Vec::new(), u64::MAX);
        let store = EmbeddedStore::on_backend(disk.clone()).unwrap();
        let put = |key: &str, bytes| Transaction::default().put(key, vec![7; bytes]);
        let first = store.commit(put("a", 10)).await.unwrap();
        let mut watch = store.watch("");

        disk.has_room_for(0);
        for _ in 0..3 {
            let full = store.commit(put("big", 8 << 20)).await;
            let is_full = matches!(full, Err(CommitError::Store(StoreError::DiskFull)));
            assert!(is_full, "{full:?}");
            assert_eq!(store.get("a").await.unwrap().unwrap().value, vec![7; 10]);
            assert_eq!(store.get("big").await.unwrap(), None);
        }
        disk.has_room_for(u64::MAX);
        let second = store.commit(put("big", 8 << 20)).await.unwrap();
        assert!(second > first);

        disk.works_for(2);
        assert!(store.commit(put("c", 10)).await.is_err());
        assert!(
            store.commit(put("c", 10)).await.is_err(),
            "the disk is gone"
        );
        disk.works_for(u64::MAX);
        store.commit(put("c", 11)).await.unwrap();
        assert_eq!(store.get("c").await.unwrap().unwrap().value, vec![7; 11]);
        for wanted in ["big", "c"] {
            let change = watch.next().await.unwrap();
            let goes_on = matches!(&change, Change::Put { key, .. } if key == wanted);
            assert!(goes_on, "{change:?}");
        }
    }

    #[tokio::test]
    async fn a_crash_at_any_write_leaves_whole_commits() {
        let made = FailingBackend::with_bytes(Vec::new(), u64::MAX);
        drop(EmbeddedStore::on_backend(made.clone()).unwrap());
        let fresh = made.after_crash(|_| true);
        let mut crashes = 0;
        for operations in 0.. {
            let disk = FailingBackend::with_bytes(fresh.clone(), operations);
            let Ok(store) = EmbeddedStore::on_backend(disk.clone()) else {
                continue;
            };
            let returned = write_some(&store).await;
            let survivors: [fn(usize) -> bool; 4] =
                [|_| false, |_| true, |n| n % 2 == 0, |n| n % 2 == 1];
            for survives in survivors {
                let after = FailingBackend::with_bytes(disk.after_crash(survives), u64::MAX);
                let store = EmbeddedStore::on_backend(after).unwrap();
                let (a, b) = (number(&store, "a").await, number(&store, "b").await);
                assert_eq!(a, b, "a commit is whole, after {operations} operations");
                assert!(
                    a == returned || a == returned + 1,
                    "{returned} returned, {a} found, after {operations} operations"
                );
                crashes += 1;
            }
            if returned == COMMITS {
                break;
            }
        }
        assert!(crashes > 20, "only {crashes} crashes were tried");
    }
}
