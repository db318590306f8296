//! Quotas, names and collections, with a scripted node and on paused time.

use core::time::Duration;
use std::sync::Arc;

use spore_api::error::ErrorCode;
use spore_api::name::{AccountName, ImageName};
use spore_wire::id::ImageId;
use spore_wire::node::{ImageInfo, ImageKind, ImageRecipe};

use super::{ImageFromWhat, KeepError};
use crate::clock::{HostClock, KernelChance};
use crate::config::Config;
use crate::fake::{FakeDoor, FakeNodes, config};
use crate::nodes::CollectMode;
use crate::operations::Outcome;
use crate::secrets::KeyFile;
use crate::store::memory::MemoryStore;
use crate::store::record::encode;
use crate::store::record::image::{ImageOrigin, ImageRecord, image_key};
use crate::store::record::load;
use crate::store::record::source::{SourceRecord, source_key};
use crate::store::{SharedStore, Transaction};
use crate::{Control, Parts};

const MIB: usize = 1024 * 1024;

struct Bench {
    control: Control,
    nodes: FakeNodes,
    store: SharedStore,
    _folder: tempfile::TempDir,
}

impl Bench {
    async fn new(image_bytes_max: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store: SharedStore = Arc::new(MemoryStore::default());
        let path = folder.path().join("key");
        let keys = KeyFile::open_or_make(&path, &*store).await.unwrap();
        let nodes = FakeNodes::new();
        let parts = Parts {
            store: Arc::clone(&store),
            nodes: Arc::new(nodes.clone()),
            door: Arc::new(FakeDoor::default()),
            keys: Arc::new(keys),
            clock: Arc::new(HostClock),
            chance: Arc::new(KernelChance),
        };
        let config = Config {
            image_bytes_max: u64::try_from(image_bytes_max).unwrap(),
            ..config()
        };
        Self {
            control: Control::start(config, parts).await.unwrap(),
            nodes,
            store,
            _folder: folder,
        }
    }

    /// Uploads so many bytes, which are its content and, in this node, its image.
    async fn upload(&self, of: u8, bytes: usize) -> Result<ImageInfo, KeepError> {
        let body = Box::new(std::io::Cursor::new(vec![of; bytes]));
        let converge = self.control.converge();
        converge.import(&me(), ImageKind::Folder, body).await
    }

    async fn build(&self, recipe: ImageRecipe) -> Outcome {
        let from = ImageFromWhat::Recipe(recipe);
        let converge = self.control.converge();
        converge.made(&me(), &python(), from, "operation").await
    }

    async fn named(&self) -> Option<ImageRecord> {
        let key = image_key(&me(), &python());
        let stored = load::<ImageRecord>(&*self.store, &key).await.unwrap();
        stored.map(|stored| stored.record)
    }
}

fn me() -> AccountName {
    AccountName::default_account()
}

fn python() -> ImageName {
    "debian/python3".parse().unwrap()
}

fn base() -> ImageRecipe {
    ImageRecipe::Base {
        name: python().to_string(),
    }
}

fn packages() -> ImageRecipe {
    let packages = vec!["python3".to_owned()];
    ImageRecipe::Packages { packages }
}

fn installed(of: u8, made_at_s: u64) -> ImageInfo {
    ImageInfo {
        id: ImageId::from_hash([of; 32]),
        kind: ImageKind::Root,
        bytes: 10,
        entries: 1,
        made_at_s,
    }
}

#[tokio::test(start_paused = true)]
async fn an_account_has_a_quota_of_image_bytes_and_is_told_the_figures() {
    let bench = Bench::new(4 * MIB).await;
    bench.upload(1, 3 * MIB).await.unwrap();
    let refused = bench.upload(2, 2 * MIB).await.unwrap_err();
    let text = refused.to_string();
    assert_eq!(refused.code(), ErrorCode::QuotaExceeded);
    for figure in ["take 3 MiB of the 4 MiB", "takes 2 MiB more", "image_quota"] {
        assert!(text.contains(figure), "{text}");
    }
    bench.upload(3, MIB).await.unwrap();
    // What it has already takes nothing more.
    bench.upload(1, 3 * MIB).await.unwrap();
    assert!(bench.upload(4, 1).await.is_err());
    let Outcome::Failed { code, message } = bench.build(packages()).await else {
        panic!("built beyond the quota");
    };
    assert_eq!(code, ErrorCode::QuotaExceeded);
    assert!(message.contains("nothing is left"), "{message}");
    let recipes = bench.nodes.state.lock().unwrap().recipes.len();
    assert_eq!(recipes, 0, "the node was not even asked");
}

#[tokio::test(start_paused = true)]
async fn of_two_uploads_at_once_that_do_not_both_fit_one_is_refused() {
    let bench = Bench::new(4 * MIB).await;
    let (one, other) = tokio::join!(bench.upload(1, 3 * MIB), bench.upload(2, 3 * MIB));
    assert!(one.is_ok() != other.is_ok(), "{one:?} {other:?}");
}

#[tokio::test(start_paused = true)]
async fn a_newer_installation_moves_a_base_images_name_and_an_older_one_does_not() {
    let bench = Bench::new(MIB).await;
    let install = async |info: ImageInfo| {
        let wanted = bench.control.wants_base(&python(), &info).await.unwrap();
        bench.control.ensure_image(&python(), &info).await.unwrap();
        let named = bench.named().await.unwrap();
        assert_eq!(wanted, named.id == info.id);
        named.id
    };
    let (old, new) = (installed(1, 100), installed(2, 200));
    assert_eq!(install(old.clone()).await, old.id);
    assert_eq!(install(new.clone()).await, new.id);
    assert_eq!(install(old).await, new.id);
    assert_eq!(install(new.clone()).await, new.id);
}

#[tokio::test(start_paused = true)]
async fn a_base_image_is_built_anew_under_its_name_and_ones_own_is_never_replaced() {
    let bench = Bench::new(MIB).await;
    let old = installed(1, 100);
    bench.control.ensure_image(&python(), &old).await.unwrap();
    assert!(matches!(
        bench.build(base()).await,
        Outcome::Succeeded { .. }
    ));
    assert_eq!(bench.nodes.state.lock().unwrap().recipes, [base()]);
    let built = bench.named().await.unwrap();
    assert_ne!(built.id, old.id);
    assert_eq!(built.origin, ImageOrigin::Base);
    let later = installed(2, u64::from(u32::MAX));
    assert!(bench.control.wants_base(&python(), &later).await.unwrap());
    assert!(matches!(
        bench.build(packages()).await,
        Outcome::Succeeded { .. }
    ));
    assert_eq!(bench.named().await.unwrap().origin, ImageOrigin::Own);
    assert!(!bench.control.wants_base(&python(), &later).await.unwrap());
    bench.control.ensure_image(&python(), &later).await.unwrap();
    assert_ne!(bench.named().await.unwrap().id, later.id);
}

#[tokio::test(start_paused = true)]
async fn old_uploads_are_forgotten_and_fresh_ones_kept() {
    let bench = Bench::new(MIB).await;
    let fresh = bench.upload(1, 10).await.unwrap();
    let old = SourceRecord {
        kind: ImageKind::Folder,
        bytes: 10,
        entries: 1,
        created_at_ms: 0,
    };
    let key = source_key(&me(), ImageId::from_hash([9; 32]));
    let write = Transaction::default().put(&key, encode(&old));
    bench.store.commit(write).await.unwrap();
    let kept = async |mode| {
        let converge = bench.control.converge();
        converge.collect_images(mode).await.unwrap();
        let kept = bench.nodes.state.lock().unwrap().kept.take().unwrap();
        (kept, bench.store.get(&key).await.unwrap().is_some())
    };
    let only = std::collections::BTreeSet::from([fresh.id]);
    assert_eq!(kept(CollectMode::DryRun).await, (only.clone(), true));
    assert_eq!(kept(CollectMode::Remove).await, (only, false));
}

#[tokio::test(start_paused = true)]
async fn unused_images_are_collected_without_being_asked() {
    let bench = Bench::new(MIB).await;
    tokio::time::sleep(Duration::from_secs(59 * 60)).await;
    assert!(bench.nodes.state.lock().unwrap().kept.is_none());
    tokio::time::sleep(Duration::from_secs(2 * 60)).await;
    assert!(bench.nodes.state.lock().unwrap().kept.is_some());
}
