//! Packs the initramfs: a newc archive whose bytes depend on its inputs only. Called by `guest`;
//! `rig` packs its own with the same pieces.
//!
//! Entries are sorted, times are 0, owners are root, inode numbers count up. Uncompressed: in
//! QEMU's software emulation unpacking costs more than the 3 MB that compression would save.

use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, bail};
use cpio::newc::{Builder, ModeFileType, trailer};

/// Folders that PID 1 mounts on or reads.
const FOLDERS: &[&str] = &["dev", "hooks", "modules", "proc", "sys"];

/// A name, a mode and bytes.
pub(crate) type Entry = (String, u32, Vec<u8>);

/// Writes the archive of `/init`, `/modules` and what is shown to tenants of `/hooks`.
pub(crate) fn pack(init: &Path, modules: &Path, hook: &Path, out: impl Write) -> Result<()> {
    let mut files = self::modules(modules)?;
    files.push(("init".to_owned(), 0o755, read(init)?));
    let name = hook.file_name().and_then(|name| name.to_str());
    let name = name.with_context(|| format!("{} names no file", hook.display()))?;
    files.push((format!("hooks/{name}"), 0o644, read(hook)?));
    files.extend(FOLDERS.iter().map(|name| folder(name)));
    files.sort();
    write(&files, out)
}

/// A kernel's modules and their `order`, under `modules/`.
pub(crate) fn modules(modules: &Path) -> Result<Vec<Entry>> {
    let order = fs::read_to_string(modules.join("order"))
        .with_context(|| format!("{} has no `order`", modules.display()))?;
    let mut files = Vec::new();
    for name in order.lines() {
        if name.contains('/') || !name.ends_with(".ko") {
            bail!("`order` names {name:?}, which is no module file");
        }
        files.push((format!("modules/{name}"), 0o644, read(&modules.join(name))?));
    }
    files.push(("modules/order".to_owned(), 0o644, order.into_bytes()));
    Ok(files)
}

/// An empty folder.
pub(crate) fn folder(name: &str) -> Entry {
    (name.to_owned(), 0o40755, Vec::new())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Writes sorted entries; a mode with the folder bit is a folder.
pub(crate) fn write(files: &[Entry], mut out: impl Write) -> Result<()> {
    for (number, (name, mode, bytes)) in (1..).zip(files) {
        let kind = if mode & 0o40000 == 0 {
            ModeFileType::Regular
        } else {
            ModeFileType::Directory
        };
        let size =
            u32::try_from(bytes.len()).with_context(|| format!("{name} is larger than 4 GiB"))?;
        let mut entry = Builder::new(name)
            .ino(number)
            .uid(0)
            .gid(0)
            .mtime(0)
            .nlink(1)
            .mode(mode & 0o7777)
            .set_mode_file_type(kind)
            .write(&mut out, size);
        entry.write_all(bytes)?;
        entry.finish()?;
    }
    trailer(&mut out)?.flush()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;
    use std::io::Read;

    use super::pack;

    fn fixture() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let modules = dir.path().join("modules");
        fs::create_dir(&modules).unwrap();
        fs::write(dir.path().join("init"), b"static program").unwrap();
        fs::write(dir.path().join("addon.node"), b"compiled").unwrap();
        fs::write(modules.join("00-virtio_ring.ko"), b"ring").unwrap();
        fs::write(modules.join("01-virtio.ko"), b"virtio!").unwrap();
        fs::write(modules.join("order"), "00-virtio_ring.ko\n01-virtio.ko\n").unwrap();
        dir
    }

    fn packed(dir: &tempfile::TempDir) -> Vec<u8> {
        let mut archive = Vec::new();
        pack(
            &dir.path().join("init"),
            &dir.path().join("modules"),
            &dir.path().join("addon.node"),
            &mut archive,
        )
        .unwrap();
        archive
    }

    #[test]
    fn the_archive_reads_back() {
        let archive = packed(&fixture());
        let mut rest = archive.as_slice();
        let mut found = BTreeMap::new();
        loop {
            let mut reader = cpio::newc::Reader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                break;
            }
            assert_eq!(reader.entry().mtime(), 0);
            let name = reader.entry().name().to_owned();
            let mode = reader.entry().mode();
            let mut bytes = Vec::new();
            reader.read_to_end(&mut bytes).unwrap();
            found.insert(name, (mode, bytes));
            rest = reader.finish().unwrap();
        }
        assert_eq!(found["init"], (0o100_755, b"static program".to_vec()));
        assert_eq!(
            found["modules/01-virtio.ko"],
            (0o100_644, b"virtio!".to_vec())
        );
        assert_eq!(found["modules"].0, 0o40_755);
        assert_eq!(found["hooks/addon.node"], (0o100_644, b"compiled".to_vec()));
        assert_eq!(found.len(), 10);
    }

    #[test]
    fn the_same_inputs_give_the_same_bytes() {
        assert_eq!(packed(&fixture()), packed(&fixture()));
    }

    #[test]
    fn a_listed_module_that_is_missing_is_named() {
        let dir = fixture();
        fs::remove_file(dir.path().join("modules/01-virtio.ko")).unwrap();
        let error = pack(
            &dir.path().join("init"),
            &dir.path().join("modules"),
            &dir.path().join("addon.node"),
            Vec::new(),
        );
        assert!(format!("{:#}", error.unwrap_err()).contains("01-virtio.ko"));
    }
}
