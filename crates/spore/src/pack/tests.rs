//! What goes up of a folder, what stays, and what is refused.

use std::fs;
use std::io::Read as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::StreamExt as _;
use tempfile::{TempDir, tempdir};

use super::{Archive, FolderKind, Listing, PackError};

fn folder(files: &[(&str, &str)]) -> TempDir {
    let folder = tempdir().unwrap();
    for (path, text) in files {
        write(folder.path(), path, text);
    }
    folder
}

fn write(folder: &Path, path: &str, text: &str) {
    let path = folder.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

fn list(folder: &Path) -> Result<Listing, PackError> {
    Listing::read(folder, FolderKind::App, None)
}

fn paths(listing: &Listing) -> Vec<String> {
    listing
        .items
        .iter()
        .map(|item| item.path.display().to_string())
        .collect()
}

async fn packed(listing: Listing) -> Vec<u8> {
    let mut archive = Archive::start(listing, Arc::default()).unwrap();
    let mut bytes = Vec::new();
    while let Some(piece) = archive.next().await {
        bytes.extend_from_slice(&piece.unwrap());
    }
    bytes
}

#[test]
fn ignored_files_stay_without_a_git_repository() {
    let folder = folder(&[
        (".gitignore", "*.log\nbuild/\n"),
        (".sporeignore", "notes.txt\n"),
        ("app.py", ""),
        ("a.log", ""),
        ("build/x", ""),
        ("sub/notes.txt", ""),
        ("sub/.gitignore", "*.tmp"),
        ("sub/a.tmp", ""),
    ]);
    let listing = list(folder.path()).unwrap();
    assert_eq!(
        paths(&listing),
        [
            ".gitignore",
            ".sporeignore",
            "app.py",
            "sub",
            "sub/.gitignore"
        ]
    );
    assert!(listing.left_out.is_empty());
}

#[test]
fn private_files_stay_and_are_named() {
    let folder = folder(&[
        ("app.py", ""),
        (".git/config", ""),
        (".env", ""),
        (".env.local", ""),
        ("tls/server.PEM", ""),
        ("tls/server.key", ""),
        ("tls/readme", ""),
        ("id_rsa.pub", ""),
    ]);
    let listing = list(folder.path()).unwrap();
    assert_eq!(paths(&listing), ["app.py", "tls", "tls/readme"]);
    let left = [
        ".env",
        ".env.local",
        ".git",
        "id_rsa.pub",
        "tls/server.PEM",
        "tls/server.key",
    ];
    assert_eq!(listing.left_out, left);
}

#[test]
fn links_inside_go_and_links_that_lead_out_are_refused_by_name() {
    let parent = folder(&[("outside", ""), ("app/sub/app.py", "")]);
    let app = parent.path().join("app");
    symlink("sub/app.py", app.join("good")).unwrap();
    symlink("../sub/app.py", app.join("sub/also-good")).unwrap();
    symlink("nowhere", app.join("dangling")).unwrap();
    assert_eq!(list(&app).unwrap().files(), 4);
    for (target, words) in [
        ("../../outside", "outside of the folder"),
        ("x/../../../outside", "outside of the folder"),
        ("/etc/passwd", "outside of the folder"),
        (app.join("sub").to_str().unwrap(), "Make it relative"),
    ] {
        symlink(target, app.join("sub/bad")).unwrap();
        let error = list(&app);
        fs::remove_file(app.join("sub/bad")).unwrap();
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("sub/bad is a link to") && error.contains(words),
            "{error}"
        );
    }
    symlink("../outside", app.join("bad")).unwrap();
    assert!(matches!(list(&app), Err(PackError::LinkOut { .. })));
}

#[test]
fn a_link_that_leads_out_through_another_link_is_refused() {
    let parent = folder(&[("x/y/z", ""), ("app/deep/er/file", "")]);
    let app = parent.path().join("app");
    // As it is spelled it stays inside; as the file system sees it, `up/..` is the parent.
    symlink("deep/er", app.join("up")).unwrap();
    symlink("up/../../../x", app.join("odd")).unwrap();
    assert!(matches!(list(&app), Err(PackError::LinkOut { .. })));
}

#[test]
fn sockets_and_pipes_are_refused_by_name() {
    let folder = folder(&[("app.py", "")]);
    let socket = UnixListener::bind(folder.path().join("s.sock")).unwrap();
    let error = list(folder.path()).unwrap_err().to_string();
    assert!(error.contains("s.sock is a socket"), "{error}");
    drop(socket);
    write(folder.path(), ".sporeignore", "*.sock");
    list(folder.path()).unwrap();
}

#[test]
fn an_empty_folder_is_refused() {
    let folder = tempdir().unwrap();
    assert!(matches!(list(folder.path()), Err(PackError::Empty { .. })));
    write(folder.path(), ".env", "");
    assert!(matches!(list(folder.path()), Err(PackError::Empty { .. })));
}

#[test]
fn a_root_folder_inside_an_app_is_not_packed_twice() {
    let folder = folder(&[
        ("app.py", ""),
        ("rootfs/bin/sh", ""),
        ("rootfs/etc/ssl/x.pem", ""),
    ]);
    let root = folder.path().join("rootfs");
    let listing = Listing::read(folder.path(), FolderKind::App, Some(&root)).unwrap();
    assert_eq!(paths(&listing), ["app.py"]);
    symlink("/bin/sh", root.join("bin/bash")).unwrap();
    let listing = Listing::read(&root, FolderKind::Root, None).unwrap();
    assert!(paths(&listing).contains(&"etc/ssl/x.pem".to_owned()));
    assert!(paths(&listing).contains(&"bin/bash".to_owned()));
}

#[tokio::test]
async fn what_goes_up_can_be_unpacked_and_is_normal() {
    let folder = folder(&[("app.py", "print(1)"), ("run.sh", "#!"), ("empty", "")]);
    let long = format!("{}/{}", "d".repeat(120), "f".repeat(120));
    write(folder.path(), &long, "long");
    symlink("app.py", folder.path().join("link")).unwrap();
    fs::set_permissions(
        folder.path().join("app.py"),
        fs::Permissions::from_mode(0o600),
    )
    .unwrap();
    fs::set_permissions(
        folder.path().join("run.sh"),
        fs::Permissions::from_mode(0o710),
    )
    .unwrap();
    let bytes = packed(list(folder.path()).unwrap()).await;
    let mut archive = tar::Archive::new(zstd::Decoder::new(bytes.as_slice()).unwrap());
    let mut seen = Vec::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let header = entry.header().clone();
        assert_eq!((header.uid().unwrap(), header.gid().unwrap()), (0, 0));
        let path = entry.path().unwrap().display().to_string();
        let mut text = String::new();
        entry.read_to_string(&mut text).unwrap();
        seen.push((path, header.mode().unwrap(), text));
    }
    let modified = fs::metadata(folder.path().join("app.py")).unwrap();
    assert!(modified.modified().is_ok());
    assert_eq!(seen[0], ("app.py".to_owned(), 0o644, "print(1)".to_owned()));
    assert_eq!(seen[2], (long, 0o644, "long".to_owned()));
    assert_eq!(seen[3].0, "empty");
    assert_eq!((seen[4].0.as_str(), seen[4].1), ("link", 0o777));
    assert_eq!((seen[5].0.as_str(), seen[5].1), ("run.sh", 0o755));
}

#[tokio::test]
async fn the_same_folder_is_the_same_upload_and_keeps_its_times() {
    let folder = folder(&[("b", "2"), ("a", "1"), ("c/d", "3")]);
    for path in ["a", "b", "c/d", "c"] {
        let file = fs::File::open(folder.path().join(path)).unwrap();
        let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_700_000_000);
        file.set_modified(time).unwrap();
    }
    let first = packed(list(folder.path()).unwrap()).await;
    let second = packed(list(folder.path()).unwrap()).await;
    assert_eq!(first, second);
    let mut archive = tar::Archive::new(zstd::Decoder::new(first.as_slice()).unwrap());
    for entry in archive.entries().unwrap() {
        assert_eq!(entry.unwrap().header().mtime().unwrap(), 1_700_000_000);
    }
}

#[tokio::test]
async fn ten_thousand_files_go_up() {
    let folder = tempdir().unwrap();
    for index in 0..10_000 {
        let place = folder.path().join(format!("d{}", index % 100));
        fs::create_dir_all(&place).unwrap();
        fs::write(place.join(format!("f{index}")), format!("{index}")).unwrap();
    }
    let listing = list(folder.path()).unwrap();
    assert_eq!(listing.files(), 10_000);
    let bytes = packed(listing).await;
    let mut archive = tar::Archive::new(zstd::Decoder::new(bytes.as_slice()).unwrap());
    assert_eq!(archive.entries().unwrap().count(), 10_100);
}

#[tokio::test]
async fn a_file_that_shrinks_or_goes_is_an_error_with_its_name() {
    let folder = folder(&[("a", "aaaa"), ("b", "bbbb")]);
    let listing = list(folder.path()).unwrap();
    write(folder.path(), "b", "b");
    let read = Arc::new(AtomicU64::new(0));
    let mut archive = Archive::start(listing, Arc::clone(&read)).unwrap();
    let mut last = None;
    while let Some(piece) = archive.next().await {
        last = Some(piece);
    }
    let error = last.unwrap().unwrap_err().to_string();
    assert!(error.starts_with("b changed while it was read"), "{error}");
    assert_eq!(read.load(Ordering::Relaxed), 5);
    let listing = list(folder.path()).unwrap();
    fs::remove_file(folder.path().join("a")).unwrap();
    let error = Archive::start(listing, Arc::default())
        .unwrap()
        .next()
        .await
        .unwrap();
    assert!(matches!(error, Err(PackError::Read { path, .. }) if path == "a"));
}

#[test]
fn a_folder_that_is_not_there_or_is_none_is_said() {
    let parent = folder(&[("file", "")]);
    for name in ["missing", "file/below"] {
        let error = list(&parent.path().join(name)).unwrap_err();
        assert!(matches!(&error, PackError::Read { path, .. } if path.ends_with(name)));
        assert!(error.to_string().starts_with("cannot read"), "{error}");
    }
}

#[tokio::test]
async fn odd_names_set_ids_hard_links_and_holes_go_up_as_what_they_are() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt as _;
    let folder = folder(&[("twice", "same"), ("set", "x")]);
    let odd: [&[u8]; 3] = [b"a\tb\nc", b"not \xff utf-8", b"-rf"];
    for name in odd {
        fs::write(folder.path().join(OsStr::from_bytes(name)), "odd").unwrap();
    }
    fs::hard_link(folder.path().join("twice"), folder.path().join("again")).unwrap();
    let set = folder.path().join("set");
    fs::set_permissions(&set, fs::Permissions::from_mode(0o6755)).unwrap();
    let holes = fs::File::create(folder.path().join("holes")).unwrap();
    holes.set_len(1 << 20).unwrap();
    let bytes = packed(list(folder.path()).unwrap()).await;
    let mut archive = tar::Archive::new(zstd::Decoder::new(bytes.as_slice()).unwrap());
    let mut seen = std::collections::BTreeMap::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        assert_eq!(entry.header().entry_type(), tar::EntryType::Regular);
        let (path, mode) = (entry.path_bytes().to_vec(), entry.header().mode().unwrap());
        let mut text = Vec::new();
        entry.read_to_end(&mut text).unwrap();
        seen.insert(path, (mode, text));
    }
    for name in odd {
        assert_eq!(seen[name].1, b"odd");
    }
    assert_eq!(seen[b"twice".as_slice()], seen[b"again".as_slice()]);
    assert_eq!(seen[b"set".as_slice()].0, 0o755);
    assert_eq!(seen[b"holes".as_slice()].1, vec![0; 1 << 20]);
}

#[test]
fn a_device_node_is_refused_by_name() {
    let folder = folder(&[("app.py", "")]);
    let (kind, mode) = (rustix::fs::FileType::CharacterDevice, 0o600.into());
    let null = rustix::fs::makedev(1, 3);
    let path = folder.path().join("null");
    if rustix::fs::mknodat(rustix::fs::CWD, &path, kind, mode, null).is_err() {
        println!("SKIPPED: only root makes device nodes");
        return;
    }
    let error = list(folder.path()).unwrap_err().to_string();
    assert!(error.contains("null is a device"), "{error}");
}

#[test]
fn a_folder_that_fits_here_fits_on_the_node() {
    use spore_api::limits::{SOURCE_ENTRIES_MAX, SOURCE_UNPACKED_BYTES_MAX};
    use spore_node::image::entry::PackLimits;
    let node = PackLimits::of(spore_wire::node::ImageKind::Folder);
    // The node counts the folder itself too, if the archive has it; this side never sends it.
    assert_eq!(node.entries_max, SOURCE_ENTRIES_MAX);
    assert_eq!(node.total_bytes_max, SOURCE_UNPACKED_BYTES_MAX);
    assert_eq!(node.file_bytes_max, SOURCE_UNPACKED_BYTES_MAX);
}
