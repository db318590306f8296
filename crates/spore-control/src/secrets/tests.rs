//! What the vault promises.

use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;

use spore_wire::secret::SecretBytes;

use super::{KeyFile, KeyFileError, Place, SecretsError, Vault};
use crate::clock::HostClock;
use crate::store::SharedStore;
use crate::store::memory::MemoryStore;

async fn vault(folder: &std::path::Path, store: &SharedStore) -> Vault {
    let key = KeyFile::open_or_make(&folder.join("key"), &**store)
        .await
        .unwrap();
    Vault::new(Arc::clone(store), Arc::new(key), Arc::new(HostClock))
}

#[tokio::test]
async fn a_value_opens_only_in_its_own_place() {
    let folder = tempfile::tempdir().unwrap();
    let store: SharedStore = Arc::new(MemoryStore::default());
    let vault = vault(folder.path(), &store).await;
    let (me, you) = ("me".parse().unwrap(), "you".parse().unwrap());
    let (notes, other) = ("notes".parse().unwrap(), "other".parse().unwrap());
    let (name, name2) = ("KEY".parse().unwrap(), "KEY2".parse().unwrap());
    let place = Place {
        account: &me,
        app: &notes,
        name: &name,
    };
    let value = SecretBytes::new(b"hunter2".to_vec());
    let record = vault.seal(place, 3, &value).await.unwrap();
    assert_eq!(vault.open(place, &record).await.unwrap(), value);
    for elsewhere in [
        Place {
            account: &you,
            ..place
        },
        Place {
            app: &other,
            ..place
        },
        Place {
            name: &name2,
            ..place
        },
    ] {
        assert!(vault.open(elsewhere, &record).await.is_err());
    }
    let mut older = record.clone();
    older.revision = 2;
    assert!(vault.open(place, &older).await.is_err());
    let mut changed = record.clone();
    changed.sealed.replace_range(
        40..41,
        if &record.sealed[40..41] == "A" {
            "B"
        } else {
            "A"
        },
    );
    assert!(vault.open(place, &changed).await.is_err());
    let again = vault.seal(place, 3, &value).await.unwrap();
    assert_ne!(again.sealed, record.sealed, "every seal has its own nonce");
}

#[tokio::test]
async fn a_lost_key_is_never_made_again_while_secrets_need_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("key");
    let store: SharedStore = Arc::new(MemoryStore::default());
    let (me, notes, name) = (
        "me".parse().unwrap(),
        "notes".parse().unwrap(),
        "KEY".parse().unwrap(),
    );
    let place = Place {
        account: &me,
        app: &notes,
        name: &name,
    };
    let first = vault(folder.path(), &store).await;
    let record = first
        .seal(place, 1, &SecretBytes::new(vec![1]))
        .await
        .unwrap();
    std::fs::remove_file(&path).unwrap();
    let error = KeyFile::open_or_make(&path, &*store).await.unwrap_err();
    assert!(matches!(error, KeyFileError::Lost { .. }), "{error}");
    assert!(!path.exists());

    std::fs::write(&path, [7; 32]).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    let second = vault(folder.path(), &store).await;
    let error = second.open(place, &record).await.unwrap_err();
    assert!(matches!(error, SecretsError::WrongKey { .. }), "{error}");
    assert!(error.to_string().contains("account `me`"), "{error}");
    let error = second
        .seal(place, 2, &SecretBytes::new(vec![1]))
        .await
        .unwrap_err();
    assert!(matches!(error, SecretsError::WrongKey { .. }), "{error}");
}

#[tokio::test]
async fn a_key_file_that_others_may_read_or_that_is_a_link_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("key");
    let store = MemoryStore::default();
    KeyFile::open_or_make(&path, &store).await.unwrap();
    let mode = std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o600);
    assert_eq!(
        std::fs::read_dir(folder.path()).unwrap().count(),
        1,
        "nothing is left beside"
    );
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
    let error = KeyFile::open_or_make(&path, &store).await.unwrap_err();
    assert!(
        matches!(error, KeyFileError::Mode { mode: 0o640, .. }),
        "{error}"
    );

    let link = folder.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    assert!(KeyFile::open_or_make(&link, &store).await.is_err());
    std::fs::write(folder.path().join("short"), [1; 31]).unwrap();
    let error = KeyFile::open_or_make(&folder.path().join("short"), &store)
        .await
        .unwrap_err();
    assert!(matches!(error, KeyFileError::Shape { .. }), "{error}");
}

#[tokio::test]
async fn a_key_file_of_another_user_is_refused() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: only root can give a file away");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("key");
    let store = MemoryStore::default();
    KeyFile::open_or_make(&path, &store).await.unwrap();
    std::os::unix::fs::chown(&path, Some(65_534), None).unwrap();
    let error = KeyFile::open_or_make(&path, &store).await.unwrap_err();
    assert!(
        matches!(error, KeyFileError::Owner { owner: 65_534, .. }),
        "{error}"
    );
}
