//! What is packed reads back, by `backhand` and by squashfs-tools; what must not enter does not.

use std::fs::File;
use std::io::{BufReader, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use backhand::{FilesystemReader, InnerNode};
use proptest::prelude::{ProptestConfig, any, proptest};
use spore_wire::node::ImageKind::{self, Folder, Root};
use tar::{Builder, EntryType, Header};

use super::{Compression, PackError, PackRequest, Packed, pack};

/// One entry of an archive.
struct Part {
    path: &'static str,
    kind: EntryType,
    mode: u32,
    body: Vec<u8>,
    link: &'static str,
}

fn part(path: &'static str, kind: EntryType, mode: u32) -> Part {
    Part {
        path,
        kind,
        mode,
        body: Vec::new(),
        link: "",
    }
}

fn file(path: &'static str, body: impl Into<Vec<u8>>) -> Part {
    Part {
        body: body.into(),
        ..part(path, EntryType::Regular, 0o644)
    }
}

fn link(path: &'static str, kind: EntryType, target: &'static str) -> Part {
    Part {
        link: target,
        ..part(path, kind, 0o644)
    }
}

fn archive(parts: &[Part]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for part in parts {
        let mut header = Header::new_gnu();
        header.set_entry_type(part.kind);
        header.set_mode(part.mode);
        header.set_uid(10);
        header.set_gid(20);
        header.set_mtime(1_700_000_001);
        header.set_size(u64::try_from(part.body.len()).unwrap());
        // Written by hand, since the crate refuses to make the archives that are tested here.
        header.as_gnu_mut().unwrap().name[..part.path.len()].copy_from_slice(part.path.as_bytes());
        header.as_gnu_mut().unwrap().linkname[..part.link.len()]
            .copy_from_slice(part.link.as_bytes());
        header.set_cksum();
        builder.append(&header, part.body.as_slice()).unwrap();
    }
    builder.into_inner().unwrap()
}

struct Image {
    file: tempfile::NamedTempFile,
    packed: Packed,
}

fn try_pack(request: &PackRequest, stream: &[u8]) -> Result<Image, PackError> {
    let file = tempfile::NamedTempFile::new().unwrap();
    let spool = tempfile::tempfile().unwrap();
    let packed = pack(request, stream, &spool, file.as_file())?;
    Ok(Image { file, packed })
}

fn packed(kind: ImageKind, parts: &[Part]) -> Image {
    try_pack(&PackRequest::of(kind), &archive(parts)).unwrap()
}

fn refused(kind: ImageKind, parts: &[Part]) -> PackError {
    try_pack(&PackRequest::of(kind), &archive(parts))
        .err()
        .expect("refused")
}

/// Path, kind, mode, uid, mtime and content of an entry.
type Entry = (PathBuf, &'static str, u16, u32, u32, Vec<u8>);

/// All entries, as an independent reader sees them.
fn read_back(image: &Image) -> Vec<Entry> {
    let reader = BufReader::new(File::open(image.file.path()).unwrap());
    let system = FilesystemReader::from_reader(reader).unwrap();
    let mut found = Vec::new();
    for node in system.files() {
        let (kind, body) = match &node.inner {
            InnerNode::File(file) => {
                let mut body = Vec::new();
                system.file(file).reader().read_to_end(&mut body).unwrap();
                ("file", body)
            }
            InnerNode::Symlink(link) => {
                ("symlink", link.link.as_os_str().as_encoded_bytes().into())
            }
            InnerNode::Dir(_) => ("folder", Vec::new()),
            _ => ("other", Vec::new()),
        };
        let header = node.header;
        found.push((
            node.fullpath.clone(),
            kind,
            header.permissions,
            header.uid,
            header.mtime,
            body,
        ));
    }
    found
}

fn paths(image: &Image) -> Vec<String> {
    read_back(image)
        .into_iter()
        .map(|entry| entry.0.display().to_string())
        .collect()
}

#[test]
fn a_root_image_reads_back_with_owners_modes_times_and_contents() {
    let long = vec![7_u8; 300_000];
    let image = packed(
        Root,
        &[
            part("./", EntryType::Directory, 0o755),
            part("./usr", EntryType::Directory, 0o751),
            Part {
                mode: 0o4755,
                ..file("./usr/su", long.clone())
            },
            link("./usr/sh", EntryType::Symlink, "/bin/dash"),
        ],
    );
    let found = read_back(&image);
    let su = found
        .iter()
        .find(|entry| entry.0 == Path::new("/usr/su"))
        .unwrap();
    assert_eq!(
        (su.1, su.2, su.3, su.4, &su.5),
        ("file", 0o4755, 10, 1_700_000_001, &long)
    );
    let sh = found
        .iter()
        .find(|entry| entry.0 == Path::new("/usr/sh"))
        .unwrap();
    assert_eq!(
        (sh.1, sh.5.as_slice()),
        ("symlink", b"/bin/dash".as_slice())
    );
    let usr = found
        .iter()
        .find(|entry| entry.0 == Path::new("/usr"))
        .unwrap();
    assert_eq!((usr.1, usr.2), ("folder", 0o751));
    assert_eq!(image.packed.total_bytes, 300_000);
}

#[test]
fn folders_that_no_entry_describes_are_made() {
    let image = packed(Folder, &[file("a/b/c.txt", "hello")]);
    assert_eq!(paths(&image), ["/", "/a", "/a/b", "/a/b/c.txt"]);
    assert_eq!(image.packed.entries, 4);
}

#[test]
fn a_root_image_has_what_a_guest_mounts_on_and_a_folder_only_what_it_was_given() {
    let root = packed(Root, &[file("bin/sh", "#!")]);
    let expected = [
        "/", "/app", "/bin", "/bin/sh", "/dev", "/proc", "/run", "/sys", "/tmp",
    ];
    assert_eq!(paths(&root), expected);
    assert_eq!(paths(&packed(Folder, &[])), ["/"]);
}

#[test]
fn a_hard_link_has_the_content_of_its_target_and_stores_it_once() {
    let noise: Vec<u8> = (0..400_000_u32)
        .map(|n| u8::try_from(n.wrapping_mul(2_654_435_761) >> 24).unwrap())
        .collect();
    let single = packed(Root, &[file("one", noise.clone())]);
    let linked = packed(
        Root,
        &[
            file("one", noise.clone()),
            link("two", EntryType::Link, "one"),
        ],
    );
    let found = read_back(&linked);
    assert_eq!(found.iter().filter(|entry| entry.5 == noise).count(), 2);
    let size = |image: &Image| image.file.as_file().metadata().unwrap().len();
    assert!(size(&linked) < size(&single) + 8192);
}

#[test]
fn a_hard_link_to_what_did_not_come_before_is_refused() {
    let error = refused(
        Root,
        &[link("two", EntryType::Link, "one"), file("one", "1")],
    );
    assert!(matches!(error, PackError::LinkTarget { .. }), "{error}");
}

#[test]
fn the_later_of_two_entries_counts_as_in_tar() {
    let image = packed(Folder, &[file("f", "old"), file("f", "new")]);
    assert_eq!(read_back(&image)[1].5, b"new");
}

#[test]
fn a_file_is_no_folder_and_a_folder_no_file() {
    let below = refused(Folder, &[file("f", "x"), file("f/g", "y")]);
    assert!(matches!(below, PackError::NoFolder(_)), "{below}");
    let above = refused(Folder, &[file("d/g", "x"), file("d", "y")]);
    assert!(matches!(above, PackError::NoFolder(_)), "{above}");
}

#[test]
fn what_leads_out_or_is_a_device_is_refused() {
    for parts in [
        [file("/etc/passwd", "x")],
        [file("../x", "x")],
        [file("a/../../x", "x")],
        [part("dev/null", EntryType::Char, 0o666)],
        [part("fifo", EntryType::Fifo, 0o644)],
        [part("dev/sda", EntryType::Block, 0o600)],
        [link("l", EntryType::Link, "/etc/shadow")],
        [link("l", EntryType::Link, "../shadow")],
        [Part {
            mode: 0o4755,
            ..file("setuid", "x")
        }],
    ] {
        let error = refused(Folder, &parts);
        assert!(
            matches!(error, PackError::Entry(_)),
            "{}: {error}",
            parts[0].path
        );
    }
}

#[test]
fn a_symlink_that_points_out_is_kept_as_a_text_and_never_followed() {
    let image = packed(
        Folder,
        &[
            link("out", EntryType::Symlink, "../../etc"),
            link("abs", EntryType::Symlink, "/etc"),
        ],
    );
    assert_eq!(paths(&image), ["/", "/abs", "/out"]);
    let through = refused(
        Folder,
        &[
            link("out", EntryType::Symlink, "/etc"),
            file("out/passwd", "x"),
        ],
    );
    assert!(matches!(through, PackError::NoFolder(_)), "{through}");
}

#[test]
fn every_limit_is_named_when_it_is_hit() {
    let mut request = PackRequest::of(Folder);
    request.limits.entries_max = 3;
    request.limits.file_bytes_max = 10;
    request.limits.total_bytes_max = 15;
    let outcome = |parts: &[Part]| try_pack(&request, &archive(parts)).err();
    assert!(outcome(&[file("a", [0; 10])]).is_none());
    let large = outcome(&[file("a", [0; 11])]).unwrap();
    assert!(
        matches!(large, PackError::FileTooLarge { max: 10, .. }),
        "{large}"
    );
    let total = outcome(&[file("a", [0; 10]), file("b", [0; 10])]).unwrap();
    assert!(matches!(total, PackError::TooLarge(15)), "{total}");
    let many = outcome(&[file("a", ""), file("b", ""), file("c", ""), file("d", "")]).unwrap();
    assert!(matches!(many, PackError::TooManyEntries(3)), "{many}");
    let implied = outcome(&[file("a/b/c/d", "")]).unwrap();
    assert!(matches!(implied, PackError::TooManyEntries(3)), "{implied}");
    request.block_bytes = 5000;
    assert!(matches!(
        try_pack(&request, b"").err(),
        Some(PackError::BlockSize(5000))
    ));
}

/// Gives the same bytes for ever, and counts them.
struct Endless<'a> {
    piece: &'a [u8],
    given: usize,
}

impl Read for Endless<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let at = self.given % self.piece.len();
        let count = (&self.piece[at..]).read(buffer)?;
        self.given += count;
        Ok(count)
    }
}

#[test]
fn a_stream_without_end_is_given_up_at_the_limit() {
    let mut request = PackRequest::of(Folder);
    request.limits.entries_max = 100;
    let whole = archive(&[file("f", "")]);
    // Without the two blocks of zeros that end an archive.
    let piece = &whole[..512];
    let mut stream = Endless { piece, given: 0 };
    let (spool, image) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    let error = pack(&request, &mut stream, &spool, &image).unwrap_err();
    assert!(matches!(error, PackError::TooManyEntries(100)), "{error}");
    assert!(stream.given < 1024 * 1024, "{}", stream.given);
}

#[test]
fn a_bomb_takes_no_more_disk_than_an_image_may_have() {
    let mut request = PackRequest::of(Folder);
    request.limits.total_bytes_max = 1024 * 1024;
    request.limits.file_bytes_max = 2 * 1024 * 1024;
    let bomb = zstd::encode_all(archive(&[file("f", vec![0; 64 << 20])]).as_slice(), 3).unwrap();
    assert!(bomb.len() < 64 * 1024);
    let (spool, image) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    let error = pack(&request, bomb.as_slice(), &spool, &image).unwrap_err();
    assert!(matches!(error, PackError::TooLarge(1_048_576)), "{error}");
    assert!(spool.metadata().unwrap().len() <= 1024 * 1024);
    assert_eq!(image.metadata().unwrap().len(), 0);
}

#[test]
fn headers_that_say_megabytes_about_one_entry_are_refused_before_they_fill_the_memory() {
    for kind in [
        EntryType::GNULongName,
        EntryType::GNULongLink,
        EntryType::XHeader,
    ] {
        let long = Part {
            body: vec![b'n'; 3 << 20],
            ..part("././@LongLink", kind, 0o644)
        };
        let error = refused(Folder, &[long, file("f", "x")]);
        assert!(matches!(error, PackError::Header), "{kind:?}: {error}");
    }
}

#[test]
fn names_may_be_any_bytes_and_as_long_as_linux_takes_them() {
    let odd: [&[u8]; 4] = [b"tab\tnew\nline", b"not \xff utf-8", b"-rf", b"\x1b[31m"];
    let longest = [b'n'; 255];
    let mut builder = Builder::new(Vec::new());
    for name in odd.into_iter().chain([longest.as_slice()]) {
        let mut header = Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(0);
        let path = Path::new(std::ffi::OsStr::from_bytes(name));
        builder
            .append_data(&mut header, path, std::io::empty())
            .unwrap();
    }
    let image = try_pack(&PackRequest::of(Folder), &builder.into_inner().unwrap()).unwrap();
    let found: Vec<_> = read_back(&image).into_iter().map(|entry| entry.0).collect();
    for name in odd.into_iter().chain([longest.as_slice()]) {
        let path = Path::new("/").join(std::ffi::OsStr::from_bytes(name));
        assert!(found.contains(&path), "{path:?} is not in {found:?}");
    }
    let mut builder = Builder::new(Vec::new());
    let mut header = Header::new_gnu();
    header.set_size(0);
    let too_long = "n".repeat(256);
    builder
        .append_data(&mut header, too_long, std::io::empty())
        .unwrap();
    let error = try_pack(&PackRequest::of(Folder), &builder.into_inner().unwrap()).err();
    assert!(matches!(error, Some(PackError::Entry(_))), "{error:?}");
}

/// A sparse file of GNU tar: `data` at `offset`, holes around it, `bytes` in all.
fn sparse(offset: u64, data: &[u8], bytes: u64) -> Vec<u8> {
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::GNUSparse);
    header.set_mode(0o644);
    header.set_size(u64::try_from(data.len()).unwrap());
    let gnu = header.as_gnu_mut().unwrap();
    gnu.name[..6].copy_from_slice(b"sparse");
    gnu.realsize = octal(bytes);
    gnu.sparse[0].offset = octal(offset);
    gnu.sparse[0].numbytes = octal(u64::try_from(data.len()).unwrap());
    // GNU tar ends the map with the end of the file.
    gnu.sparse[1].offset = octal(bytes);
    gnu.sparse[1].numbytes = octal(0);
    header.set_cksum();
    let mut builder = Builder::new(Vec::new());
    builder.append(&header, data).unwrap();
    builder.into_inner().unwrap()
}

fn octal(number: u64) -> [u8; 12] {
    let mut field = [0; 12];
    field[..11].copy_from_slice(format!("{number:011o}").as_bytes());
    field
}

#[test]
fn holes_of_a_sparse_file_are_zeros_and_count_as_bytes() {
    let archive = sparse(4096, &[7; 512], 8192);
    let image = try_pack(&PackRequest::of(Folder), &archive).unwrap();
    let mut expected = vec![0; 8192];
    expected[4096..4608].fill(7);
    assert_eq!(read_back(&image)[1].5, expected);
    let mut request = PackRequest::of(Folder);
    request.limits.file_bytes_max = 1024 * 1024;
    let huge = sparse(0, &[7; 512], 7 << 30);
    let error = try_pack(&request, &huge).err();
    assert!(
        matches!(error, Some(PackError::FileTooLarge { max: 1_048_576, .. })),
        "{error:?}"
    );
}

#[test]
fn a_cut_archive_is_refused_compressed_or_not() {
    let whole = archive(&[file("f", vec![1; 4000])]);
    let request = PackRequest::of(Folder);
    assert!(matches!(
        try_pack(&request, &whole[..3000]).err(),
        Some(PackError::Stream(_))
    ));
    let small = zstd::encode_all(whole.as_slice(), 3).unwrap();
    let cut = &small[..small.len() - 8];
    assert!(matches!(
        try_pack(&request, cut).err(),
        Some(PackError::Stream(_))
    ));
    assert!(matches!(
        try_pack(&request, &[0x42; 2048]).err(),
        Some(PackError::Stream(_))
    ));
}

#[test]
fn compressed_and_plain_archives_give_the_same_image() {
    let plain = archive(&[file("a", "alpha"), file("d/b", vec![9; 200_000])]);
    let small = zstd::encode_all(plain.as_slice(), 3).unwrap();
    let request = PackRequest::of(Folder);
    let bytes =
        |stream: &[u8]| std::fs::read(try_pack(&request, stream).unwrap().file.path()).unwrap();
    assert_eq!(bytes(&plain), bytes(&small));
}

#[test]
fn the_kernels_own_tools_read_ten_thousand_files_in_both_compressions() {
    let mut builder = Builder::new(Vec::new());
    for n in 0..10_000 {
        let mut header = Header::new_gnu();
        let body = format!("file {n}");
        header.set_mode(0o644);
        header.set_mtime(1_700_000_000 + n);
        header.set_size(u64::try_from(body.len()).unwrap());
        header.set_cksum();
        let path = format!("folder/{}/a-rather-long-name-{n}", n % 3);
        builder
            .append_data(&mut header, path, body.as_bytes())
            .unwrap();
    }
    let archive = builder.into_inner().unwrap();
    for compression in [Compression::Lz4, Compression::Zstd] {
        let request = PackRequest {
            compression,
            ..PackRequest::of(Folder)
        };
        let image = try_pack(&request, &archive).unwrap();
        assert_eq!(image.packed.entries, 10_005);
        let out = tempfile::tempdir().unwrap();
        let unsquashed = Command::new("unsquashfs")
            .args(["-quiet", "-no-progress", "-force", "-dest"])
            .arg(out.path())
            .arg(image.file.path())
            .output()
            .expect("squashfs-tools are installed by `cargo xtask deps`");
        assert!(unsquashed.status.success(), "{unsquashed:?}");
        let last = out.path().join("folder/0/a-rather-long-name-9999");
        assert_eq!(std::fs::read_to_string(&last).unwrap(), "file 9999");
        let found: usize = (0..3)
            .map(|n| {
                std::fs::read_dir(out.path().join(format!("folder/{n}")))
                    .unwrap()
                    .count()
            })
            .sum();
        assert_eq!(found, 10_000);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_stream_makes_the_packer_panic(noise in proptest::collection::vec(any::<u8>(), 0..4096)) {
        let packed = try_pack(&PackRequest::of(Folder), &noise);
        assert!(packed.is_err() || noise.iter().take(512).all(|byte| *byte == 0));
    }

    #[test]
    fn no_damage_makes_the_packer_panic(at in 0_usize..2048, byte in any::<u8>()) {
        let mut damaged = archive(&[file("d/f", vec![1; 600]), link("s", EntryType::Symlink, "d")]);
        damaged[at] = byte;
        drop(try_pack(&PackRequest::of(Root), &damaged));
    }
}
