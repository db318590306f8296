//! Packs a tar stream into a SquashFS file. Called by `worker.rs` in the confined process.
//!
//! Opens no path and needs no privilege: it reads one stream and writes to two files that it was
//! given, the image and a spool. SquashFS wants all names before it can be finished and tar gives
//! them in any order, so contents wait in the spool, and memory holds names only.
//!
//! A hard link becomes a second file with the same content, stored once: what a guest sees above
//! an overlay is the same, since overlayfs breaks hard links of a lower layer on first write.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use backhand::compression::{CompressionOptions, Compressor, Lz4, Zstd};
use backhand::{FilesystemCompressor, FilesystemWriter, NodeHeader};
use serde::{Deserialize, Serialize};
use spore_wire::node::ImageKind;
use thiserror::Error;

use super::entry::{self, Attributes, EntryError, Node, PackLimits};

/// The first bytes of a zstd frame (RFC 8878).
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// The largest window that a zstd frame may ask us to allocate: 128 MiB, what `zstd -19 --long`
/// uses.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

/// The most bytes of a stream that may say something about one entry: headers with long names,
/// attributes, a map of holes. They are kept in memory until the entry comes.
const HEADER_BYTES_MAX: u64 = 1024 * 1024;

/// The only version of LZ4 that SquashFS has (Linux `fs/squashfs/lz4_wrapper.c`).
const LZ4_VERSION: u32 = 1;

/// How an image is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackRequest {
    /// What it is for.
    pub kind: ImageKind,
    /// How much it may hold.
    pub limits: PackLimits,
    /// How its blocks are compressed.
    pub compression: Compression,
    /// The size of a block before compression: a power of two from 4 KiB to 1 MiB.
    pub block_bytes: u32,
}

/// How blocks are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Compression {
    /// Fast to read, larger.
    Lz4,
    /// Slower to read, smaller.
    Zstd,
}

impl PackRequest {
    /// How an image of this kind is made by default (docs/adr/0002-images-are-squashfs.md).
    #[must_use]
    pub const fn of(kind: ImageKind) -> Self {
        Self {
            kind,
            limits: PackLimits::of(kind),
            compression: Compression::Lz4,
            block_bytes: 128 * 1024,
        }
    }
}

/// What was packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Packed {
    /// Files, folders and links.
    pub entries: u64,
    /// Bytes of all files before compression.
    pub total_bytes: u64,
}

/// Why nothing was packed.
#[derive(Debug, Error)]
pub enum PackError {
    /// An entry is not allowed.
    #[error(transparent)]
    Entry(#[from] EntryError),
    /// The stream is no tar archive, or ends too early.
    #[error("the upload is not a whole tar or tar.zst archive: send it again")]
    Stream(#[source] io::Error),
    /// The headers of an entry are longer than any name needs.
    #[error(
        "the archive says more than {HEADER_BYTES_MAX} bytes about one entry: shorten its name, \
         or leave out its attributes"
    )]
    Header,
    /// A hard link to something that did not come before.
    #[error("`{link}` is a hard link to `{target}`, which is no earlier file of the archive")]
    LinkTarget {
        /// The link.
        link: String,
        /// What it names.
        target: String,
    },
    /// A file is used as a folder.
    #[error("`{0}` lies below something that is no folder")]
    NoFolder(String),
    /// Too many entries.
    #[error("more than {0} files and folders: leave some out")]
    TooManyEntries(u64),
    /// A file is too large.
    #[error("`{path}` is larger than {max} bytes: leave it out or keep it on a volume")]
    FileTooLarge {
        /// Which.
        path: String,
        /// The limit.
        max: u64,
    },
    /// All files together are too large.
    #[error("more than {0} bytes in all: leave some out or keep them on a volume")]
    TooLarge(u64),
    /// The block size is none that SquashFS has.
    #[error("a block of {0} bytes is not a power of two from 4 KiB to 1 MiB")]
    BlockSize(u32),
    /// The spool cannot be written or read: the disk is full, or a limit was hit.
    #[error("cannot keep the archive's content: free space on the data disk")]
    Spool(#[source] io::Error),
    /// The image cannot be written.
    #[error("cannot write the image: free space on the data disk")]
    Image(#[source] backhand::BackhandError),
    /// The image cannot be written to its end.
    #[error("cannot write the image: free space on the data disk")]
    Flush(#[source] io::Error),
}

/// Where a file's content is in the spool.
#[derive(Clone, Copy, Debug)]
struct Extent {
    offset: u64,
    bytes: u64,
}

/// An accepted entry, by its path in a [`BTreeMap`], which sorts folders before what is in them.
#[derive(Debug)]
enum Content {
    Folder,
    File(Extent),
    Symlink(PathBuf),
}

/// Everything that was read, before the image is written.
struct Tree {
    nodes: BTreeMap<PathBuf, (Content, Attributes)>,
    root: Attributes,
    total_bytes: u64,
}

/// A folder that no entry describes, as tar makes it.
const IMPLIED: Attributes = Attributes {
    mode: 0o755,
    uid: 0,
    gid: 0,
    mtime_s: 0,
};

/// What a guest mounts on: a root image has them even when its archive does not (Debian's without
/// device nodes has no `/dev`).
const MOUNT_POINTS: &[&str] = &["app", "dev", "proc", "run", "sys", "tmp"];

/// Packs the tar or tar.zst of `stream` into `image`, which is empty, by way of `spool`, likewise.
///
/// # Errors
/// [`PackError`]; the image is then worthless.
pub fn pack(
    request: &PackRequest,
    stream: impl Read,
    spool: &File,
    image: &File,
) -> Result<Packed, PackError> {
    let block = request.block_bytes;
    if !block.is_power_of_two() || !(4096..=1024 * 1024).contains(&block) {
        return Err(PackError::BlockSize(block));
    }
    let tree = read(request, decompressed(stream)?, spool)?;
    let packed = Packed {
        // The root counts too.
        entries: u64::try_from(tree.nodes.len())
            .unwrap_or(u64::MAX)
            .saturating_add(1),
        total_bytes: tree.total_bytes,
    };
    write(request, &tree, spool, image)?;
    Ok(packed)
}

/// The stream without its compression, if it has one that we know.
fn decompressed<'a>(stream: impl Read + 'a) -> Result<Box<dyn Read + 'a>, PackError> {
    let mut stream = BufReader::with_capacity(256 * 1024, stream);
    let mut magic = Vec::with_capacity(ZSTD_MAGIC.len());
    stream
        .by_ref()
        .take(4)
        .read_to_end(&mut magic)
        .map_err(PackError::Stream)?;
    let is_zstd = magic == ZSTD_MAGIC;
    let whole = io::Cursor::new(magic).chain(stream);
    if !is_zstd {
        return Ok(Box::new(whole));
    }
    let mut decoder =
        zstd::Decoder::with_buffer(BufReader::new(whole)).map_err(PackError::Stream)?;
    decoder
        .window_log_max(ZSTD_WINDOW_LOG_MAX)
        .map_err(PackError::Stream)?;
    Ok(Box::new(decoder))
}

/// Reads the whole archive: names into memory, contents into the spool.
fn read(request: &PackRequest, stream: impl Read, spool: &File) -> Result<Tree, PackError> {
    let limits = &request.limits;
    let mut tree = Tree {
        nodes: BTreeMap::new(),
        root: IMPLIED,
        total_bytes: 0,
    };
    let mut spooled = Spool {
        out: BufWriter::with_capacity(256 * 1024, spool),
        bytes: 0,
    };
    let meter = Meter::default();
    let mut archive = tar::Archive::new(Metered {
        inner: stream,
        meter: meter.clone(),
    });
    let mut entries = archive.entries().map_err(PackError::Stream)?;
    for count in 1_u64.. {
        meter.allow(HEADER_BYTES_MAX);
        let Some(entry) = entries.next() else { break };
        let mut entry = entry.map_err(|error| match meter.is_spent() {
            true => PackError::Header,
            false => PackError::Stream(error),
        })?;
        if count > limits.entries_max {
            return Err(PackError::TooManyEntries(limits.entries_max));
        }
        meter.allow(u64::MAX);
        let path = entry::image_path(&entry.path().map_err(PackError::Stream)?)?;
        let link = entry
            .link_name()
            .map_err(PackError::Stream)?
            .map(std::borrow::Cow::into_owned);
        let (node, attributes) =
            entry::judge(request.kind, &path, entry.header(), link.as_deref())?;
        if path.as_os_str().is_empty() {
            tree.root = attributes;
            continue;
        }
        let (content, attributes) = match node {
            Node::Folder => (Content::Folder, attributes),
            Node::Symlink(target) => (Content::Symlink(target), attributes),
            Node::HardLink(target) => linked(&tree, &path, &target)?,
            Node::File => {
                let left = limits.total_bytes_max - tree.total_bytes;
                let extent = spooled.keep(&mut entry, &path, limits, left)?;
                tree.total_bytes += extent.bytes;
                (Content::File(extent), attributes)
            }
        };
        insert(&mut tree, limits, path, content, attributes)?;
    }
    spooled.out.flush().map_err(PackError::Spool)?;
    if request.kind == ImageKind::Root {
        for folder in MOUNT_POINTS {
            let entry = tree.nodes.entry(PathBuf::from(folder));
            entry.or_insert((Content::Folder, IMPLIED));
        }
    }
    Ok(tree)
}

/// How many bytes a stream may still give, shared by who reads it and who says so.
#[derive(Clone, Default)]
struct Meter(Rc<Cell<u64>>);

impl Meter {
    fn allow(&self, bytes: u64) {
        self.0.set(bytes);
    }

    fn is_spent(&self) -> bool {
        self.0.get() == 0
    }
}

/// A stream that fails where its meter is spent.
struct Metered<R> {
    inner: R,
    meter: Meter,
}

impl<R: Read> Read for Metered<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.meter.0.get();
        if left == 0 {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let most = usize::try_from(left)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let (wanted, _) = buffer.split_at_mut(most);
        let count = self.inner.read(wanted)?;
        self.meter
            .allow(left - u64::try_from(count).unwrap_or(left));
        Ok(count)
    }
}

/// What another name of an earlier file has.
fn linked(tree: &Tree, link: &Path, target: &Path) -> Result<(Content, Attributes), PackError> {
    match tree.nodes.get(target) {
        Some((Content::File(extent), attributes)) => Ok((Content::File(*extent), *attributes)),
        _ => Err(PackError::LinkTarget {
            link: link.to_string_lossy().into_owned(),
            target: target.to_string_lossy().into_owned(),
        }),
    }
}

/// Adds an entry and the folders above it; a later entry of the same name replaces an earlier one,
/// as when tar unpacks.
fn insert(
    tree: &mut Tree,
    limits: &PackLimits,
    path: PathBuf,
    content: Content,
    attributes: Attributes,
) -> Result<(), PackError> {
    for folder in path
        .ancestors()
        .skip(1)
        .take_while(|folder| !folder.as_os_str().is_empty())
    {
        match tree.nodes.get(folder) {
            Some((Content::Folder, _)) => break,
            Some(_) => return Err(PackError::NoFolder(path.to_string_lossy().into_owned())),
            None => {
                tree.nodes
                    .insert(folder.to_path_buf(), (Content::Folder, IMPLIED));
            }
        }
    }
    let was_folder = matches!(tree.nodes.get(&path), Some((Content::Folder, _)));
    if was_folder && !matches!(content, Content::Folder) {
        return Err(PackError::NoFolder(path.to_string_lossy().into_owned()));
    }
    tree.nodes.insert(path, (content, attributes));
    // Folders that no entry describes count too: one long path can imply two thousand.
    if u64::try_from(tree.nodes.len()).unwrap_or(u64::MAX) > limits.entries_max {
        return Err(PackError::TooManyEntries(limits.entries_max));
    }
    Ok(())
}

/// Contents one behind the other.
struct Spool<'a> {
    out: BufWriter<&'a File>,
    bytes: u64,
}

impl Spool<'_> {
    /// Keeps what `entry` has, at most `left` bytes.
    fn keep(
        &mut self,
        entry: &mut impl Read,
        path: &Path,
        limits: &PackLimits,
        left: u64,
    ) -> Result<Extent, PackError> {
        let most = left.min(limits.file_bytes_max);
        let offset = self.bytes;
        let mut bytes = 0_u64;
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let count = entry.read(&mut buffer).map_err(PackError::Stream)?;
            let Some(read) = buffer.get(..count).filter(|read| !read.is_empty()) else {
                break;
            };
            bytes += u64::try_from(count).unwrap_or(u64::MAX);
            if bytes > most && most == left {
                return Err(PackError::TooLarge(limits.total_bytes_max));
            }
            if bytes > most {
                let path = path.to_string_lossy().into_owned();
                return Err(PackError::FileTooLarge {
                    path,
                    max: limits.file_bytes_max,
                });
            }
            self.out.write_all(read).map_err(PackError::Spool)?;
        }
        self.bytes += bytes;
        Ok(Extent { offset, bytes })
    }
}

/// Reads one content out of the spool; only while it is packed, so that no reader holds a
/// descriptor.
struct ExtentReader<'a> {
    spool: &'a File,
    rest: Extent,
}

impl Read for ExtentReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.rest.bytes)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let (wanted, _) = buffer.split_at_mut(most);
        let count = self.spool.read_at(wanted, self.rest.offset)?;
        if count == 0 && most > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let read = u64::try_from(count).unwrap_or(u64::MAX);
        self.rest.offset += read;
        self.rest.bytes -= read;
        Ok(count)
    }
}

/// Writes the image.
fn write(request: &PackRequest, tree: &Tree, spool: &File, image: &File) -> Result<(), PackError> {
    let options = match request.compression {
        Compression::Lz4 => (
            Compressor::Lz4,
            CompressionOptions::Lz4(Lz4 {
                version: LZ4_VERSION,
                flags: 0,
            }),
        ),
        Compression::Zstd => (
            Compressor::Zstd,
            CompressionOptions::Zstd(Zstd {
                compression_level: 15,
            }),
        ),
    };
    let compressor =
        FilesystemCompressor::new(options.0, Some(options.1)).map_err(PackError::Image)?;
    let mut writer = FilesystemWriter::default();
    writer.set_compressor(compressor);
    writer.set_block_size(request.block_bytes);
    writer.set_root_mode(tree.root.mode);
    writer.set_root_uid(tree.root.uid);
    writer.set_root_gid(tree.root.gid);
    // The superblock's time says nothing that matters and would change the image's hash.
    writer.set_time(0);
    for (path, (content, attributes)) in &tree.nodes {
        let header = NodeHeader {
            permissions: attributes.mode,
            uid: attributes.uid,
            gid: attributes.gid,
            mtime: attributes.mtime_s,
        };
        match content {
            Content::Folder => writer.push_dir(path, header),
            Content::Symlink(target) => writer.push_symlink(target, path, header),
            Content::File(extent) => writer.push_file(
                ExtentReader {
                    spool,
                    rest: *extent,
                },
                path,
                header,
            ),
        }
        .map_err(PackError::Image)?;
    }
    let mut out = BufWriter::with_capacity(1024 * 1024, image);
    let (_, bytes) = writer.write(&mut out).map_err(PackError::Image)?;
    out.flush().map_err(PackError::Flush)?;
    // A duplicate is written and then written over; the last one may reach beyond the end.
    image.set_len(bytes).map_err(PackError::Flush)
}

#[cfg(test)]
mod tests;
