//! Writes the beginning of a copy-on-write disk: qcow2 version 3, around LUKS1 where it has a key.
//!
//! Called for every start and capture, before any guest saw the file. Pure: it makes bytes from a
//! size, a key and a seed, and opens nothing. Never reads such a file: once a guest had it, only
//! its VMM does.
//!
//! `qemu-img create` makes the same in seconds of processor time, since it measures how many rounds
//! a weak passphrase would need; this key has 256 random bits, so that few rounds are as good.
//!
//! ```text
//!   cluster 0        1 … n              n+1             n+2                n+3
//!   header,      LUKS header and    refcount table   refcount block   L1 table (a hole)
//!   extension    the key's stripes
//! ```
//!
//! Without a key there are no clusters 1 … n, and no extension.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use aes::Aes256;
use aes::cipher::{BlockCipherEncrypt as _, KeyInit as _};
use data_encoding::HEXLOWER;
use sha2::{Digest as _, Sha256};
use thiserror::Error;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// What QEMU allocates at once; its default.
pub const CLUSTER_BYTES: u64 = 64 * 1024;

/// The largest disk: what one cluster of L1 table reaches.
pub const OVERLAY_BYTES_MAX: u64 = CLUSTER_BYTES / 8 * L1_ENTRY_BYTES;

/// What one entry of the L1 table reaches: an L2 table of one cluster, full of clusters.
const L1_ENTRY_BYTES: u64 = CLUSTER_BYTES / 8 * CLUSTER_BYTES;

const SECTOR_BYTES: usize = 512;
const SECTOR_BYTES_U64: u64 = 512;

/// The key of the disk's contents: two AES-256 keys, as XTS wants them.
const MASTER_BYTES: usize = 64;

/// Over how many stripes LUKS spreads the master key, so that a disk forgets it for certain.
const STRIPES: usize = 4000;

/// Where the stripes of key slot 0 are, in sectors from the LUKS header.
const SLOT_SECTORS: u32 = 8;

/// The sectors of one key slot, rounded up to 4 KiB.
const SLOT_STEP_SECTORS: u32 = 504;

const SLOTS: u32 = 8;

/// Rounds of PBKDF2: the least that LUKS allows. They slow down who guesses passphrases, and nobody
/// guesses 256 random bits.
const ROUNDS: u32 = 1000;

/// The key of one disk layer, from random bytes.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct DiskKey([u8; 32]);

impl DiskKey {
    /// A new key from the kernel's random numbers.
    ///
    /// # Errors
    /// When the kernel gives none.
    pub fn random() -> Result<Self, getrandom::Error> {
        let mut key = Self([0; 32]);
        getrandom::fill(&mut key.0)?;
        Ok(key)
    }

    /// The key with exactly these bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The bytes, for the one place that wraps or files them.
    #[must_use]
    pub const fn expose(&self) -> &[u8; 32] {
        &self.0
    }

    /// As QEMU is told it: a LUKS passphrase must be text, so these are hexadecimal digits.
    #[must_use]
    pub fn passphrase(&self) -> Zeroizing<String> {
        Zeroizing::new(HEXLOWER.encode(&self.0))
    }
}

impl std::fmt::Debug for DiskKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DiskKey(***)")
    }
}

/// Why there is no overlay.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum OverlayError {
    /// Not a size that a disk of this format can have.
    #[error(
        "a scratch disk of {0} bytes cannot be made: {SECTOR_BYTES_U64} to {OVERLAY_BYTES_MAX}, in \
         steps of {SECTOR_BYTES_U64}, are possible"
    )]
    Size(u64),
}

/// An empty disk's file: what is not in a part is a hole.
#[derive(Debug)]
pub struct Overlay {
    /// How long the file is.
    pub bytes: u64,
    /// What is where, in the order of places.
    pub parts: Vec<(u64, Vec<u8>)>,
}

impl Overlay {
    /// Writes it to an empty file.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn write_to(&self, file: &File) -> io::Result<()> {
        file.set_len(self.bytes)?;
        for (at, part) in &self.parts {
            file.write_all_at(part, *at)?;
        }
        Ok(())
    }
}

/// The file of an empty disk of `size` bytes whose contents `key` opens. Everything random in it
/// comes from `seed`, which is used once and never kept: it is worth as much as the key.
///
/// # Errors
/// [`OverlayError::Size`].
pub fn overlay(size: u64, key: &DiskKey, seed: &[u8; 32]) -> Result<Overlay, OverlayError> {
    check_size(size)?;
    let luks = Luks::new(key, seed);
    let luks_bytes = u64::from(SLOT_SECTORS + SLOTS * SLOT_STEP_SECTORS) * SECTOR_BYTES_U64;
    let stripes_at = u64::from(SLOT_SECTORS) * SECTOR_BYTES_U64;
    let mut made = lay_out(size, luks_bytes);
    let behind_the_header = [
        (CLUSTER_BYTES, luks.header),
        (CLUSTER_BYTES + stripes_at, luks.stripes),
    ];
    made.parts.splice(1..1, behind_the_header);
    Ok(made)
}

/// The file of an empty disk of `size` bytes that anybody can read.
///
/// # Errors
/// [`OverlayError::Size`].
pub fn clear(size: u64) -> Result<Overlay, OverlayError> {
    check_size(size)?;
    Ok(lay_out(size, 0))
}

const fn check_size(size: u64) -> Result<(), OverlayError> {
    if size == 0 || size > OVERLAY_BYTES_MAX || !size.is_multiple_of(SECTOR_BYTES_U64) {
        return Err(OverlayError::Size(size));
    }
    Ok(())
}

/// Everything but the LUKS header, which goes behind the first cluster.
fn lay_out(size: u64, luks_bytes: u64) -> Overlay {
    let table = 1 + luks_bytes.div_ceil(CLUSTER_BYTES);
    let (block, l1) = (table + 1, table + 2);
    let clusters = l1 + 1;
    let header = header(size, [l1, table].map(|at| at * CLUSTER_BYTES), luks_bytes);
    let counts = std::iter::repeat_n(1_u16.to_be_bytes(), usize::try_from(clusters).unwrap_or(0));
    Overlay {
        bytes: clusters * CLUSTER_BYTES,
        parts: vec![
            (0, header),
            (
                table * CLUSTER_BYTES,
                (block * CLUSTER_BYTES).to_be_bytes().to_vec(),
            ),
            (block * CLUSTER_BYTES, counts.flatten().collect()),
        ],
    }
}

/// The header of qcow2 version 3, with the extension that says where the LUKS header is if there is
/// one. It names no backing file: whoever opens the disk says what is below it.
fn header(size: u64, [l1_at, refcounts_at]: [u64; 2], luks_bytes: u64) -> Vec<u8> {
    const VERSION: u32 = 3;
    const CRYPT_LUKS: u32 = 2;
    const REFCOUNT_16_BITS: u32 = 4;
    const HEADER_BYTES: u32 = 104;
    const EXTENSION_LUKS: u32 = 0x0537_be77;
    let l1_entries = u32::try_from(size.div_ceil(L1_ENTRY_BYTES)).unwrap_or(u32::MAX);
    let mut bytes = b"QFI\xfb".to_vec();
    let put_u32 = |bytes: &mut Vec<u8>, value: u32| bytes.extend(value.to_be_bytes());
    let put_u64 = |bytes: &mut Vec<u8>, value: u64| bytes.extend(value.to_be_bytes());
    put_u32(&mut bytes, VERSION);
    // No backing file: neither a name's place nor its length.
    put_u64(&mut bytes, 0);
    put_u32(&mut bytes, 0);
    put_u32(&mut bytes, CLUSTER_BYTES.trailing_zeros());
    put_u64(&mut bytes, size);
    put_u32(&mut bytes, if luks_bytes > 0 { CRYPT_LUKS } else { 0 });
    put_u32(&mut bytes, l1_entries);
    put_u64(&mut bytes, l1_at);
    put_u64(&mut bytes, refcounts_at);
    // One cluster of refcount table, no snapshots inside, no features.
    put_u32(&mut bytes, 1);
    put_u32(&mut bytes, 0);
    for _snapshots_and_features in 0..4 {
        put_u64(&mut bytes, 0);
    }
    put_u32(&mut bytes, REFCOUNT_16_BITS);
    put_u32(&mut bytes, HEADER_BYTES);
    if luks_bytes > 0 {
        put_u32(&mut bytes, EXTENSION_LUKS);
        put_u32(&mut bytes, 16);
        put_u64(&mut bytes, CLUSTER_BYTES);
        put_u64(&mut bytes, luks_bytes);
    }
    // The end of the extensions.
    put_u64(&mut bytes, 0);
    bytes
}

/// A LUKS1 header (aes-256, xts-plain64, sha256) with its key in slot 0.
struct Luks {
    header: Vec<u8>,
    stripes: Vec<u8>,
}

impl Luks {
    fn new(key: &DiskKey, seed: &[u8; 32]) -> Self {
        const SLOT_ACTIVE: u32 = 0x00ac_71f3;
        const SLOT_INACTIVE: u32 = 0x0000_dead;
        const UUID: &[u8] = b"00000000-0000-4000-8000-000000000000";
        let mut random = blake3::Hasher::new_derive_key("spore disk overlay v1")
            .update(seed)
            .finalize_xof();
        let mut master = Zeroizing::new([0_u8; MASTER_BYTES]);
        let (mut master_salt, mut slot_salt) = ([0_u8; 32], [0_u8; 32]);
        random.fill(&mut *master);
        random.fill(&mut master_salt);
        random.fill(&mut slot_salt);
        let mut noise = Zeroizing::new(vec![0_u8; MASTER_BYTES * (STRIPES - 1)]);
        random.fill(&mut noise);

        let mut master_digest = [0_u8; 20];
        pbkdf2::pbkdf2_hmac::<Sha256>(&*master, &master_salt, ROUNDS, &mut master_digest);
        let mut header = b"LUKS\xba\xbe\0\x01".to_vec();
        put_text(&mut header, b"aes", 32);
        put_text(&mut header, b"xts-plain64", 32);
        put_text(&mut header, b"sha256", 32);
        header.extend((SLOT_SECTORS + SLOTS * SLOT_STEP_SECTORS).to_be_bytes());
        header.extend([0, 0, 0, 64]);
        header.extend(master_digest);
        header.extend(master_salt);
        header.extend(ROUNDS.to_be_bytes());
        put_text(&mut header, UUID, 40);
        for slot in 0..SLOTS {
            let (state, rounds, salt) = match slot {
                0 => (SLOT_ACTIVE, ROUNDS, slot_salt),
                _ => (SLOT_INACTIVE, 0, [0; 32]),
            };
            header.extend(state.to_be_bytes());
            header.extend(rounds.to_be_bytes());
            header.extend(salt);
            header.extend((SLOT_SECTORS + slot * SLOT_STEP_SECTORS).to_be_bytes());
            header.extend([0, 0, 0x0f, 0xa0]);
        }

        let mut slot_key = Zeroizing::new([0_u8; MASTER_BYTES]);
        let passphrase = key.passphrase();
        pbkdf2::pbkdf2_hmac::<Sha256>(passphrase.as_bytes(), &slot_salt, ROUNDS, &mut *slot_key);
        let mut stripes = spread(&master, &noise);
        xts_encrypt(&slot_key, &mut stripes);
        Self { header, stripes }
    }
}

fn put_text(bytes: &mut Vec<u8>, text: &[u8], width: usize) {
    let end = bytes.len() + width;
    bytes.extend(text);
    bytes.resize(end, 0);
}

/// LUKS' anti-forensic split: all of the stripes give the key, and all but one give nothing. Padded
/// to whole sectors.
fn spread(master: &[u8; MASTER_BYTES], noise: &[u8]) -> Vec<u8> {
    let mut last = Zeroizing::new([0_u8; MASTER_BYTES]);
    for stripe in noise.chunks_exact(MASTER_BYTES) {
        exclusive_or(&mut *last, stripe);
        for (number, half) in (0_u32..).zip(last.chunks_mut(32)) {
            let hash = Sha256::new()
                .chain_update(number.to_be_bytes())
                .chain_update(&*half)
                .finalize();
            half.copy_from_slice(&hash);
        }
    }
    exclusive_or(&mut *last, master);
    let mut stripes = Vec::with_capacity((MASTER_BYTES * STRIPES).next_multiple_of(SECTOR_BYTES));
    stripes.extend(noise);
    stripes.extend(*last);
    stripes.resize(stripes.len().next_multiple_of(SECTOR_BYTES), 0);
    stripes
}

fn exclusive_or(into: &mut [u8], with: &[u8]) {
    for (byte, with) in into.iter_mut().zip(with) {
        *byte ^= with;
    }
}

/// AES-256 in XTS mode over whole sectors, of which the first has number 0 (IEEE 1619).
fn xts_encrypt(key: &[u8; MASTER_BYTES], sectors: &mut [u8]) {
    let (data_key, tweak_key) = key.split_at(32);
    let cipher = |half: &[u8]| Aes256::new_from_slice(half).expect("half of 64 bytes is 32");
    let (data, tweaks) = (cipher(data_key), cipher(tweak_key));
    for (number, sector) in (0_u128..).zip(sectors.chunks_exact_mut(SECTOR_BYTES)) {
        let mut tweak = aes::Block::from(number.to_le_bytes());
        tweaks.encrypt_block(&mut tweak);
        let mut tweak = u128::from_le_bytes(tweak.into());
        for block in sector.chunks_exact_mut(16) {
            exclusive_or(block, &tweak.to_le_bytes());
            data.encrypt_block(block.try_into().expect("chunks are of 16 bytes"));
            exclusive_or(block, &tweak.to_le_bytes());
            // Times x, modulo x^128 + x^7 + x^2 + x + 1.
            tweak = (tweak << 1) ^ ((tweak >> 127) * 0x87);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::path::Path;
    use std::process::{Command, Output};

    use proptest::prelude::*;

    use super::{
        CLUSTER_BYTES, DiskKey, OVERLAY_BYTES_MAX, Overlay, OverlayError, clear, overlay,
        xts_encrypt,
    };

    fn key() -> DiskKey {
        DiskKey::from_bytes([0xab; 32])
    }

    #[test]
    fn xts_is_what_ieee_1619_says() {
        // Vector 10 has data unit 0xff: the first 255 sectors are only counted.
        let hex = |text: &str| data_encoding::HEXLOWER.decode(text.as_bytes()).unwrap();
        let key = [
            "2718281828459045235360287471352662497757247093699959574966967627",
            "3141592653589793238462643383279502884197169399375105820974944592",
        ];
        let key: [u8; 64] = hex(&key.concat()).try_into().unwrap();
        let mut sectors = vec![0_u8; 256 * 512];
        let last = &mut sectors[255 * 512..];
        for (byte, value) in last.iter_mut().zip((0..=255_u8).cycle()) {
            *byte = value;
        }
        xts_encrypt(&key, &mut sectors);
        let last = &sectors[255 * 512..];
        let first_blocks = hex(concat!(
            "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b",
            "5d31e276f8fe4a8d66b317f9ac683f44680a86ac35adfc3345befecb4bb188fd"
        ));
        assert_eq!(last[..64], first_blocks);
        assert_eq!(
            last[496..],
            hex("c4f36ffda9fcea70b9c6e693e148c151")[..],
            "{:02x?}",
            &last[496..]
        );
    }

    #[test]
    fn the_same_seed_gives_the_same_disk_and_another_seed_another() {
        let hash = |seed: u8| {
            let made = overlay(1 << 30, &key(), &[seed; 32]).unwrap();
            let mut hasher = blake3::Hasher::new();
            for (at, part) in &made.parts {
                hasher.update(&at.to_le_bytes()).update(part);
            }
            (made.bytes, hasher.finalize().to_hex().to_string())
        };
        assert_ne!(hash(1), hash(2));
        // Disks with older bytes are open in running VMs: what changes here must still be read.
        let golden = include_str!("overlay.golden");
        let (bytes, hash) = hash(1);
        assert_eq!(format!("{bytes} {hash}\n"), golden);
    }

    #[test]
    fn only_sizes_that_the_format_can_have_are_made() {
        for size in [0, 1, 511, OVERLAY_BYTES_MAX + 512, u64::MAX] {
            let refused = overlay(size, &key(), &[0; 32]).unwrap_err();
            assert_eq!(refused, OverlayError::Size(size));
            assert_eq!(clear(size).unwrap_err(), OverlayError::Size(size));
        }
        overlay(OVERLAY_BYTES_MAX, &key(), &[0; 32]).unwrap();
        overlay(512, &key(), &[0; 32]).unwrap();
    }

    #[test]
    fn a_key_is_not_printed() {
        assert_eq!(format!("{:?}", key()), "DiskKey(***)");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(8))]

        #[test]
        fn parts_follow_each_other_inside_the_file(
            sectors in 1..=OVERLAY_BYTES_MAX / 512,
            seed: [u8; 32],
        ) {
            let made = overlay(sectors * 512, &key(), &seed).unwrap();
            let mut free_from = 0;
            for (at, part) in &made.parts {
                prop_assert!(*at >= free_from);
                free_from = at + part.len() as u64;
            }
            prop_assert!(free_from <= made.bytes);
            prop_assert_eq!(made.bytes % CLUSTER_BYTES, 0);
            // The stripes are the bulk: nothing else may grow.
            let written: usize = made.parts.iter().map(|(_at, part)| part.len()).sum();
            prop_assert!(written < 260 * 1024, "{}", written);
        }
    }

    fn tool(program: &str, args: &[&str]) -> Option<Output> {
        match Command::new(program).args(args).output() {
            Ok(output) => Some(output),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                println!("SKIPPED: {program} is missing: run `cargo xtask deps`");
                None
            }
            Err(error) => panic!("{program}: {error}"),
        }
    }

    fn said(output: &Output) -> String {
        let streams = [&output.stdout[..], &output.stderr[..]].concat();
        String::from_utf8_lossy(&streams).into_owned()
    }

    /// A disk of 64 MiB in `folder`, and the two options that open it.
    fn disk(folder: &Path, made: &Overlay) -> [String; 2] {
        let (disk, secret) = (folder.join("disk.qcow2"), folder.join("key"));
        made.write_to(&File::create(&disk).unwrap()).unwrap();
        std::fs::write(&secret, key().passphrase().as_bytes()).unwrap();
        [
            format!("secret,id=k,file={}", secret.display()),
            format!(
                "driver=qcow2,encrypt.key-secret=k,file.filename={}",
                disk.display()
            ),
        ]
    }

    #[test]
    fn qemu_finds_no_fault_and_reads_what_it_wrote() {
        let folder = tempfile::tempdir().unwrap();
        let made = overlay(64 << 20, &key(), &[7; 32]).unwrap();
        let [secret, image] = disk(folder.path(), &made);
        let check = ["check", "--object", &secret, "--image-opts", &image];
        let Some(first) = tool("qemu-img", &check) else {
            return;
        };
        assert!(first.status.success(), "{}", said(&first));
        let io = |commands: &[&str]| {
            let mut args = vec!["--object", secret.as_str(), "--image-opts"];
            commands
                .iter()
                .for_each(|command| args.extend(["-c", *command]));
            args.push(&image);
            let output = tool("qemu-io", &args)?;
            assert!(output.status.success(), "{}", said(&output));
            assert!(!said(&output).contains("failed"), "{}", said(&output));
            Some(())
        };
        let Some(()) = io(&["write -P 0x5a 1M 3M", "write -P 0xa5 63M 1M"]) else {
            return;
        };
        let _read = io(&[
            "read -P 0x5a 1M 3M",
            "read -P 0xa5 63M 1M",
            "read -P 0 8M 1M",
        ]);
        let after = tool("qemu-img", &check).unwrap();
        assert!(after.status.success(), "{}", said(&after));
        // What was written is in no place of the file as it was.
        let bytes = std::fs::read(folder.path().join("disk.qcow2")).unwrap();
        assert!(bytes.len() > 4 << 20);
        assert!(
            !bytes
                .windows(64)
                .any(|run| run.iter().all(|byte| *byte == 0x5a))
        );
    }

    #[test]
    fn qemu_finds_no_fault_with_a_clear_disk() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.qcow2");
        let made = clear(64 << 20).unwrap();
        made.write_to(&File::create(&path).unwrap()).unwrap();
        let path = path.to_str().unwrap();
        for (program, args) in [
            ("qemu-img", &["check", path][..]),
            ("qemu-io", &["-c", "write -P 0x5a 63M 1M", path]),
            ("qemu-io", &["-c", "read -P 0x5a 63M 1M", path]),
            ("qemu-img", &["check", path]),
        ] {
            let Some(output) = tool(program, args) else {
                return;
            };
            assert!(output.status.success(), "{}", said(&output));
            assert!(!said(&output).contains("failed"), "{}", said(&output));
        }
    }

    #[test]
    fn another_key_does_not_open_it() {
        let folder = tempfile::tempdir().unwrap();
        let made = overlay(64 << 20, &key(), &[7; 32]).unwrap();
        let [secret, image] = disk(folder.path(), &made);
        let other = DiskKey::from_bytes([0xac; 32]);
        std::fs::write(folder.path().join("key"), other.passphrase().as_bytes()).unwrap();
        let args = [
            "--object",
            &secret,
            "--image-opts",
            "-c",
            "read 0 512",
            &image,
        ];
        let Some(output) = tool("qemu-io", &args) else {
            return;
        };
        assert!(
            said(&output).contains("nvalid password"),
            "{}",
            said(&output)
        );
    }
}
