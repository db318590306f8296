//! The folder of images: `<blake3>.img` with `<blake3>.json` beside it, and names.
//!
//! Called by `packer.rs`, by the node's server and by the drivers, which open [`ImageStore::path`].
//! Blocking: daemons call it through `spawn_blocking`. Never looks into an image, and never decides
//! which images are needed: garbage collection is told what to keep.
//!
//! ```text
//!   staging/XXXXXX ──fsync, hash──▶ <blake3>.img ──rename──▶ <blake3>.json ──fsync folder──▶ there
//! ```
//!
//! An image exists once its `.json` does, so a crash leaves either a whole image or a file that
//! [`ImageStore::sweep`] removes. Files are never written again; the time of the `.json` says when
//! the image was last filed, since the same content filed again is wanted again. Filing and
//! removing exclude each other.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use spore_wire::id::ImageId;
use spore_wire::node::{ImageInfo, ImageKind};
use tempfile::NamedTempFile;
use thiserror::Error;

/// Where unfinished files are.
const STAGING: &str = "staging";

/// Where names are: one file each, with the image's id.
const NAMES: &str = "names";

/// The longest name of an image.
const NAME_BYTES_MAX: usize = 100;

/// A folder of images.
#[derive(Clone, Debug)]
pub struct ImageStore {
    folder: PathBuf,
    /// Held while an image is filed or removed.
    filing: Arc<Mutex<()>>,
}

/// Whether a collection removes anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GcMode {
    /// Only says what would be removed.
    DryRun,
    /// Removes.
    Remove,
}

/// Why the store could not do something.
#[derive(Debug, Error)]
pub enum StoreError {
    /// There is no such image.
    #[error("there is no image {0}: `spore image ls` shows what there is")]
    Missing(ImageId),
    /// The file is not what its name says.
    #[error("image {id} is damaged (its content is {found}): remove it and build it again")]
    Damaged {
        /// What it should be.
        id: ImageId,
        /// What it is.
        found: ImageId,
    },
    /// A name that cannot be a file's name.
    #[error("`{0}` is no image name: `group/name` of a-z, 0-9, `.` and `-` is expected")]
    Name(String),
    /// It is larger than whoever wants it may have.
    #[error("the image has {bytes} bytes, and at most {max} are allowed")]
    OverBudget {
        /// How many it has.
        bytes: u64,
        /// How many there may be.
        max: u64,
    },
    /// A file of the store cannot be read or written.
    #[error("cannot {what} {path}")]
    File {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The description of an image is not what this version writes.
    #[error("{path} cannot be read: remove the image and build it again")]
    Info {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        source: serde_json::Error,
    },
}

/// What an image that is filed must keep to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filing {
    /// Now, in seconds since the Unix epoch.
    pub at_s: u64,
    /// The most bytes of a new one. What is there already takes none.
    pub bytes_max: u64,
}

/// An image that is being written; dropped, nothing is left of it.
#[derive(Debug)]
pub struct Staged<'a> {
    store: &'a ImageStore,
    file: NamedTempFile,
}

impl ImageStore {
    /// The store in `folder`, made if it is not there.
    ///
    /// # Errors
    /// [`StoreError::File`].
    pub fn open(folder: impl Into<PathBuf>) -> Result<Self, StoreError> {
        let folder = folder.into();
        for part in [folder.clone(), folder.join(STAGING), folder.join(NAMES)] {
            fs::create_dir_all(&part).map_err(file("make", &part))?;
        }
        Ok(Self {
            folder,
            filing: Arc::default(),
        })
    }

    fn filing(&self) -> MutexGuard<'_, ()> {
        self.filing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes what a crash left: unfinished files, halves of images, names of nothing. Legal only
    /// while nobody stages: at the daemon's start.
    ///
    /// # Errors
    /// [`StoreError::File`].
    pub fn sweep(&self) -> Result<(), StoreError> {
        for path in entries(&self.folder.join(STAGING))? {
            fs::remove_file(&path).map_err(file("remove", &path))?;
        }
        for path in entries(&self.folder)? {
            let other = match path.extension().and_then(|extension| extension.to_str()) {
                Some("img") => "json",
                Some("json") => "img",
                _ => continue,
            };
            if !path.with_extension(other).exists() {
                fs::remove_file(&path).map_err(file("remove", &path))?;
            }
        }
        for (name, id) in self.names()? {
            if !self.info_path(id).exists() {
                self.forget_name(&name)?;
            }
        }
        Ok(())
    }

    /// A new, empty file for an image.
    ///
    /// # Errors
    /// [`StoreError::File`].
    pub fn stage(&self) -> Result<Staged<'_>, StoreError> {
        let folder = self.folder.join(STAGING);
        let file = NamedTempFile::new_in(&folder).map_err(file("make a file in", &folder))?;
        Ok(Staged { store: self, file })
    }

    /// A file without a name, on the same disk, for contents under way.
    ///
    /// # Errors
    /// [`StoreError::File`].
    pub fn spool(&self) -> Result<File, StoreError> {
        let folder = self.folder.join(STAGING);
        tempfile::tempfile_in(&folder).map_err(file("make a file in", &folder))
    }

    /// What is known of an image.
    ///
    /// # Errors
    /// [`StoreError::Missing`] and the like.
    pub fn get(&self, id: ImageId) -> Result<ImageInfo, StoreError> {
        let path = self.info_path(id);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(StoreError::Missing(id));
            }
            Err(error) => return Err(file("read", &path)(error)),
        };
        serde_json::from_slice(&bytes).map_err(|source| StoreError::Info { path, source })
    }

    /// The image's file, whether or not it is there.
    #[must_use]
    pub fn path(&self, id: ImageId) -> PathBuf {
        self.folder.join(format!("{id}.img"))
    }

    /// Reads the whole image and compares it with its name.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] and the like.
    pub fn verify(&self, id: ImageId) -> Result<ImageInfo, StoreError> {
        let info = self.get(id)?;
        let path = self.path(id);
        let content = File::open(&path).map_err(file("open", &path))?;
        let found = hash(&content).map_err(file("read", &path))?;
        if found == id {
            Ok(info)
        } else {
            Err(StoreError::Damaged { id, found })
        }
    }

    /// All images, in the order of their ids.
    ///
    /// # Errors
    /// [`StoreError::File`] and [`StoreError::Info`].
    pub fn list(&self) -> Result<Vec<ImageInfo>, StoreError> {
        let mut ids: Vec<ImageId> = entries(&self.folder)?
            .iter()
            .filter(|path| {
                path.extension()
                    .is_some_and(|extension| extension == "json")
            })
            .filter_map(|path| path.file_stem()?.to_str()?.parse().ok())
            .collect();
        ids.sort_unstable();
        ids.into_iter().map(|id| self.get(id)).collect()
    }

    /// Removes an image and the names that point to it. A VM that has it open keeps it.
    ///
    /// # Errors
    /// [`StoreError::Missing`] and [`StoreError::File`].
    pub fn remove(&self, id: ImageId) -> Result<(), StoreError> {
        let _alone = self.filing();
        self.get(id)?;
        self.remove_filed(id)
    }

    fn remove_filed(&self, id: ImageId) -> Result<(), StoreError> {
        for (name, named) in self.names()? {
            if named == id {
                self.forget_name(&name)?;
            }
        }
        // The description first: without it, what is left is swept.
        for path in [self.info_path(id), self.path(id)] {
            fs::remove_file(&path).map_err(file("remove", &path))?;
        }
        sync_folder(&self.folder)
    }

    /// Removes, or only names, every image that is neither in `keep` nor has a name, and was last
    /// filed before `filed_before_s`: of a younger one, whoever wants it may not have said so yet.
    ///
    /// # Errors
    /// [`StoreError::File`] and [`StoreError::Info`].
    pub fn gc(
        &self,
        keep: &BTreeSet<ImageId>,
        filed_before_s: u64,
        mode: GcMode,
    ) -> Result<Vec<ImageInfo>, StoreError> {
        let _alone = self.filing();
        let named: BTreeSet<ImageId> = self.names()?.into_iter().map(|(_, id)| id).collect();
        let mut garbage = Vec::new();
        for image in self.list()? {
            let is_wanted = keep.contains(&image.id) || named.contains(&image.id);
            if !is_wanted && self.filed_at_s(image.id)? < filed_before_s {
                garbage.push(image);
            }
        }
        if mode == GcMode::Remove {
            for image in &garbage {
                self.remove_filed(image.id)?;
            }
        }
        Ok(garbage)
    }

    fn filed_at_s(&self, id: ImageId) -> Result<u64, StoreError> {
        let path = self.info_path(id);
        let filed = fs::metadata(&path).and_then(|found| found.modified());
        let filed = filed.map_err(file("look at", &path))?;
        let since = filed.duration_since(SystemTime::UNIX_EPOCH);
        Ok(since.map_or(0, |since| since.as_secs()))
    }

    /// Points a name such as `debian/python3` to an image.
    ///
    /// # Errors
    /// [`StoreError::Name`], [`StoreError::Missing`] and [`StoreError::File`].
    pub fn set_name(&self, name: &str, id: ImageId) -> Result<(), StoreError> {
        self.get(id)?;
        let path = self.name_path(name)?;
        let staging = self.folder.join(STAGING);
        let mut staged =
            NamedTempFile::new_in(&staging).map_err(file("make a file in", &staging))?;
        writeln!(staged, "{id}").map_err(file("write", &path))?;
        publish(staged, &path)?;
        sync_folder(&self.folder.join(NAMES))
    }

    /// Takes a name away; its image stays. Nothing to do if it is not there.
    ///
    /// # Errors
    /// [`StoreError::Name`] and [`StoreError::File`].
    pub fn forget_name(&self, name: &str) -> Result<(), StoreError> {
        let path = self.name_path(name)?;
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(file("remove", &path)(error))
            }
            _ => Ok(()),
        }
    }

    /// The image that a name points to, if it does.
    ///
    /// # Errors
    /// [`StoreError::Name`] and [`StoreError::File`].
    pub fn resolve(&self, name: &str) -> Result<Option<ImageId>, StoreError> {
        let path = self.name_path(name)?;
        match fs::read_to_string(&path) {
            Ok(text) => Ok(text.trim().parse().ok()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(file("read", &path)(error)),
        }
    }

    /// All names with their images.
    ///
    /// # Errors
    /// [`StoreError::File`].
    pub fn names(&self) -> Result<Vec<(String, ImageId)>, StoreError> {
        let mut names = Vec::new();
        for path in entries(&self.folder.join(NAMES))? {
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
                continue;
            };
            let name = name.replace("--", "/");
            if let Some(id) = self.resolve(&name)? {
                names.push((name, id));
            }
        }
        names.sort();
        Ok(names)
    }

    fn info_path(&self, id: ImageId) -> PathBuf {
        self.folder.join(format!("{id}.json"))
    }

    /// A name's file: `/` becomes `--`, which no name has.
    fn name_path(&self, name: &str) -> Result<PathBuf, StoreError> {
        let is_part = |part: &str| {
            part.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
                && part
                    .bytes()
                    .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-'))
                && !part.contains("--")
                && !part.ends_with('-')
        };
        if name.len() > NAME_BYTES_MAX || !name.split('/').all(is_part) {
            return Err(StoreError::Name(
                name.chars().take(NAME_BYTES_MAX).collect(),
            ));
        }
        Ok(self.folder.join(NAMES).join(name.replace('/', "--")))
    }
}

impl Staged<'_> {
    /// The file to write to.
    #[must_use]
    pub fn file(&self) -> &File {
        self.file.as_file()
    }

    /// Hashes what was written and files it. The same content twice is one image, whose first
    /// description stays.
    ///
    /// # Errors
    /// [`StoreError::File`] and [`StoreError::OverBudget`].
    pub fn commit(
        self,
        kind: ImageKind,
        entries: u64,
        filing: Filing,
    ) -> Result<ImageInfo, StoreError> {
        let Self {
            store,
            file: staged,
        } = self;
        let content = staged.as_file();
        let bytes = content
            .metadata()
            .map_err(file("look at", staged.path()))?
            .len();
        let id = hash(content).map_err(file("read", staged.path()))?;
        // Before others have to wait: it may be large.
        content.sync_all().map_err(file("sync", staged.path()))?;
        let _alone = store.filing();
        let path = store.info_path(id);
        let filed_at = SystemTime::UNIX_EPOCH + Duration::from_secs(filing.at_s);
        if let Ok(there) = store.get(id) {
            let filed = File::open(&path).and_then(|info| info.set_modified(filed_at));
            filed.map_err(file("change", &path))?;
            return Ok(there);
        }
        if bytes > filing.bytes_max {
            let max = filing.bytes_max;
            return Err(StoreError::OverBudget { bytes, max });
        }
        publish(staged, &store.path(id))?;
        let info = ImageInfo {
            id,
            kind,
            bytes,
            entries,
            made_at_s: filing.at_s,
        };
        let staging = store.folder.join(STAGING);
        let mut described =
            NamedTempFile::new_in(&staging).map_err(file("make a file in", &staging))?;
        let text = serde_json::to_vec(&info).map_err(|source| StoreError::Info {
            path: path.clone(),
            source,
        })?;
        described.write_all(&text).map_err(file("write", &path))?;
        let filed = described.as_file().set_modified(filed_at);
        filed.map_err(file("change", &path))?;
        publish(described, &path)?;
        sync_folder(&store.folder)?;
        Ok(info)
    }
}

/// Syncs a file and gives it its name.
fn publish(staged: NamedTempFile, path: &Path) -> Result<(), StoreError> {
    // Who may see the files is decided by the store's folder; the files say only "read".
    let mode = fs::Permissions::from_mode(0o444);
    staged
        .as_file()
        .set_permissions(mode)
        .map_err(file("change", path))?;
    staged.as_file().sync_all().map_err(file("sync", path))?;
    staged
        .persist(path)
        .map_err(|error| file("write", path)(error.error))?;
    Ok(())
}

fn sync_folder(folder: &Path) -> Result<(), StoreError> {
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(file("sync", folder))
}

/// The paths of a folder's files; folders are left out.
fn entries(folder: &Path) -> Result<Vec<PathBuf>, StoreError> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).map_err(file("list", folder))? {
        let path = entry.map_err(file("list", folder))?.path();
        if !path.is_dir() {
            paths.push(path);
        }
    }
    Ok(paths)
}

/// The content's name, read from its start whatever the file's position is.
fn hash(content: &File) -> io::Result<ImageId> {
    use std::os::unix::fs::FileExt;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1024 * 1024];
    let mut offset = 0;
    loop {
        let count = content.read_at(&mut buffer, offset)?;
        let Some(read) = buffer.get(..count).filter(|read| !read.is_empty()) else {
            return Ok(ImageId::from_hash(*hasher.finalize().as_bytes()));
        };
        hasher.update(read);
        offset += u64::try_from(count).unwrap_or(0);
    }
}

fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    move |source| StoreError::File {
        what,
        path: path.to_path_buf(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::io::Write;

    use spore_wire::id::ImageId;
    use spore_wire::node::{ImageInfo, ImageKind};

    use super::{Filing, GcMode, ImageStore, StoreError};

    fn store() -> (tempfile::TempDir, ImageStore) {
        let dir = tempfile::tempdir().unwrap();
        let store = ImageStore::open(dir.path().join("images")).unwrap();
        (dir, store)
    }

    fn put(store: &ImageStore, content: &[u8], at_s: u64) -> ImageInfo {
        let bytes_max = u64::MAX;
        file(store, content, Filing { at_s, bytes_max }).unwrap()
    }

    fn file(store: &ImageStore, content: &[u8], filing: Filing) -> Result<ImageInfo, StoreError> {
        let staged = store.stage().unwrap();
        staged.file().write_all(content).unwrap();
        staged.commit(ImageKind::Folder, 3, filing)
    }

    #[test]
    fn an_image_is_found_by_its_content() {
        let (_dir, store) = store();
        let info = put(&store, b"content", 7);
        assert_eq!(
            info.id,
            ImageId::from_hash(*blake3::hash(b"content").as_bytes())
        );
        assert_eq!((info.bytes, info.entries, info.made_at_s), (7, 3, 7));
        assert_eq!(store.get(info.id).unwrap(), info);
        assert_eq!(store.verify(info.id).unwrap(), info);
        assert_eq!(fs::read(store.path(info.id)).unwrap(), b"content");
    }

    #[test]
    fn the_same_content_twice_is_one_image() {
        let (_dir, store) = store();
        let first = put(&store, b"content", 7);
        assert_eq!(put(&store, b"content", 8), first);
        assert_eq!(store.list().unwrap(), [first]);
    }

    #[test]
    fn a_changed_file_does_not_verify() {
        let (_dir, store) = store();
        let info = put(&store, b"content", 7);
        fs::remove_file(store.path(info.id)).unwrap();
        fs::write(store.path(info.id), b"tampered").unwrap();
        assert!(matches!(
            store.verify(info.id),
            Err(StoreError::Damaged { .. })
        ));
    }

    #[test]
    fn what_a_crash_left_is_swept_and_whole_images_stay() {
        let (dir, store) = store();
        let whole = put(&store, b"whole", 1);
        let orphan = dir.path().join(format!("images/{}.img", "ab".repeat(32)));
        let staged = dir.path().join("images/staging/left");
        fs::write(&orphan, b"half").unwrap();
        fs::write(&staged, b"half").unwrap();
        let half = put(&store, b"content lost", 1);
        store.set_name("debian/whole", whole.id).unwrap();
        store.set_name("debian/half", half.id).unwrap();
        fs::remove_file(store.path(half.id)).unwrap();
        store.sweep().unwrap();
        assert!(!orphan.exists() && !staged.exists());
        assert_eq!(store.list().unwrap(), std::slice::from_ref(&whole));
        assert_eq!(
            store.names().unwrap(),
            [("debian/whole".to_owned(), whole.id)]
        );
    }

    #[test]
    fn a_dropped_stage_leaves_nothing() {
        let (dir, store) = store();
        drop(store.stage().unwrap());
        assert_eq!(
            fs::read_dir(dir.path().join("images/staging"))
                .unwrap()
                .count(),
            0
        );
    }

    #[test]
    fn a_collection_keeps_what_is_named_or_needed_and_a_dry_run_keeps_all() {
        let (_dir, store) = store();
        let named = put(&store, b"named", 1);
        let needed = put(&store, b"needed", 1);
        let garbage = put(&store, b"garbage", 1);
        store.set_name("debian/base", named.id).unwrap();
        let keep = BTreeSet::from([needed.id]);
        assert_eq!(
            store.gc(&keep, 2, GcMode::DryRun).unwrap(),
            std::slice::from_ref(&garbage)
        );
        assert_eq!(store.list().unwrap().len(), 3);
        assert_eq!(store.gc(&keep, 2, GcMode::Remove).unwrap(), [garbage]);
        assert_eq!(store.list().unwrap().len(), 2);
    }

    #[test]
    fn a_new_image_keeps_to_its_budget_and_one_that_is_there_takes_none() {
        let (dir, store) = store();
        let within = |bytes_max| Filing { at_s: 1, bytes_max };
        let over = file(&store, b"content", within(6)).unwrap_err();
        assert!(
            matches!(over, StoreError::OverBudget { bytes: 7, max: 6 }),
            "{over}"
        );
        assert!(store.list().unwrap().is_empty());
        let staged = fs::read_dir(dir.path().join("images/staging")).unwrap();
        assert_eq!(staged.count(), 0);
        let there = file(&store, b"content", within(7)).unwrap();
        assert_eq!(file(&store, b"content", within(0)).unwrap(), there);
    }

    #[test]
    fn what_was_filed_just_now_is_no_garbage_even_when_it_was_there_long_ago() {
        let (_dir, store) = store();
        let first = put(&store, b"content", 100);
        let collect = |before| store.gc(&BTreeSet::new(), before, GcMode::Remove).unwrap();
        assert!(collect(100).is_empty());
        // Uploaded again: whoever did is about to say what for.
        assert_eq!(put(&store, b"content", 500), first);
        assert!(collect(500).is_empty());
        assert_eq!(store.verify(first.id).unwrap(), first);
        assert_eq!(collect(501), [first]);
        assert!(store.list().unwrap().is_empty());
    }

    #[test]
    fn filing_and_collecting_the_same_content_at_once_leaves_all_of_it_or_nothing() {
        let (_dir, store) = store();
        std::thread::scope(|scope| {
            let filing = scope.spawn(|| (0..50).for_each(|_| _ = put(&store, b"content", 1)));
            while !filing.is_finished() {
                store.gc(&BTreeSet::new(), 2, GcMode::Remove).unwrap();
            }
        });
        for image in store.list().unwrap() {
            assert_eq!(store.verify(image.id).unwrap(), image);
        }
        store.sweep().unwrap();
        let last = put(&store, b"content", 1);
        assert_eq!(store.verify(last.id).unwrap(), last);
    }

    #[test]
    fn a_name_moves_and_goes_with_its_image() {
        let (_dir, store) = store();
        let (old, new) = (put(&store, b"old", 1), put(&store, b"new", 2));
        store.set_name("debian/python3", old.id).unwrap();
        store.set_name("debian/python3", new.id).unwrap();
        assert_eq!(store.resolve("debian/python3").unwrap(), Some(new.id));
        assert_eq!(
            store.names().unwrap(),
            [("debian/python3".to_owned(), new.id)]
        );
        store.remove(new.id).unwrap();
        assert_eq!(store.resolve("debian/python3").unwrap(), None);
        assert!(matches!(store.remove(new.id), Err(StoreError::Missing(_))));
    }

    #[test]
    fn a_name_cannot_leave_the_folder() {
        let (_dir, store) = store();
        let info = put(&store, b"content", 7);
        for name in [
            "../x", "", "/etc", "a/../b", "a//b", "A", "a--b", ".hidden", "a/",
        ] {
            assert!(
                matches!(store.set_name(name, info.id), Err(StoreError::Name(_))),
                "{name}"
            );
        }
    }
}
