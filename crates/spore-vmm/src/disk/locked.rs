//! A disk whose sectors are encrypted where they lie: AES-256 in XTS mode (IEEE 1619), each sector
//! of 512 bytes with its number as the tweak, as dm-crypt's `aes-xts-plain64` has them.
//!
//! Protects what is on the host's disk from whoever finds it there later, not from this process,
//! which has the key. It does not tell whether a sector was changed: what is read was anything's.

use std::fmt;
use std::io;

use aes::Aes256;
use aes::cipher::KeyInit as _;
use xts_mode::{Xts128, get_tweak_default};

use super::{Access, Disk, SECTOR_BYTES};

/// One key for the data and one for the tweaks.
pub const KEY_BYTES: usize = 64;

const SECTOR: usize = 512;

/// How much is encrypted at once.
const PIECE_BYTES: usize = 64 * 1024;

/// The disk.
pub struct Locked {
    disk: Box<dyn Disk>,
    cipher: Xts128<Aes256>,
    /// What is being encrypted; nothing until something is.
    piece: Vec<u8>,
}

impl fmt::Debug for Locked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Locked")
            .field("disk", &self.disk)
            .finish_non_exhaustive()
    }
}

impl Locked {
    /// Around the disk with the encrypted sectors.
    #[must_use]
    pub fn new(disk: Box<dyn Disk>, key: &[u8; KEY_BYTES]) -> Self {
        let (data, tweaks) = key.split_at(KEY_BYTES / 2);
        let cipher = |half: &[u8]| Aes256::new_from_slice(half).expect("half of 64 bytes is 32");
        Self {
            disk,
            cipher: Xts128::new(cipher(data), cipher(tweaks)),
            piece: Vec::new(),
        }
    }
}

/// The number of the sector that a range of whole sectors begins with.
fn first_sector(at: u64, bytes: usize) -> io::Result<u128> {
    if at.is_multiple_of(SECTOR_BYTES) && bytes.is_multiple_of(SECTOR) {
        Ok(u128::from(at / SECTOR_BYTES))
    } else {
        Err(io::ErrorKind::InvalidInput.into())
    }
}

impl Disk for Locked {
    fn bytes(&self) -> u64 {
        self.disk.bytes()
    }

    fn access(&self) -> Access {
        self.disk.access()
    }

    /// Of whole sectors.
    fn read(&mut self, at: u64, into: &mut [u8]) -> io::Result<()> {
        let first = first_sector(at, into.len())?;
        self.disk.read(at, into)?;
        self.cipher
            .decrypt_area(into, SECTOR, first, get_tweak_default);
        Ok(())
    }

    /// Of whole sectors.
    fn write(&mut self, mut at: u64, from: &[u8]) -> io::Result<()> {
        first_sector(at, from.len())?;
        for part in from.chunks(PIECE_BYTES) {
            self.piece.clear();
            self.piece.extend_from_slice(part);
            let first = first_sector(at, part.len())?;
            self.cipher
                .encrypt_area(&mut self.piece, SECTOR, first, get_tweak_default);
            self.disk.write(at, &self.piece)?;
            at += part.len() as u64;
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.disk.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::{KEY_BYTES, Locked, PIECE_BYTES};
    use crate::disk::tests::file;
    use crate::disk::{Access, Disk as _, Raw};

    fn bytes(hex: &str) -> Vec<u8> {
        let pair = |at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
        (0..hex.len()).step_by(2).map(pair).collect()
    }

    fn locked(size: u64, key: &[u8; KEY_BYTES]) -> (Locked, std::os::fd::OwnedFd) {
        let (file, again) = file(size);
        let raw = Raw::new(file, Access::ReadWrite).unwrap();
        (Locked::new(Box::new(raw), key), again)
    }

    #[test]
    fn sectors_are_as_ieee_1619_has_them() {
        // Vector 10: data unit 0xff.
        let key = bytes(concat!(
            "2718281828459045235360287471352662497757247093699959574966967627",
            "3141592653589793238462643383279502884197169399375105820974944592",
        ));
        let (mut disk, file) = locked(256 * 512, &key.try_into().unwrap());
        let plain: Vec<u8> = (0..=255).cycle().take(512).collect();
        disk.write(255 * 512, &plain).unwrap();
        let mut there = [0; 512];
        rustix::io::pread(&file, &mut there, 255 * 512).unwrap();
        let first = "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b";
        assert_eq!(there[..32], bytes(first));
        assert_eq!(there[496..], bytes("c4f36ffda9fcea70b9c6e693e148c151"));
        let mut read = [0; 512];
        disk.read(255 * 512, &mut read).unwrap();
        assert_eq!(read[..], plain);
    }

    #[test]
    fn what_was_written_is_read_wherever_it_is_cut() {
        let (mut disk, _file) = locked(4 * PIECE_BYTES as u64, &[7; KEY_BYTES]);
        let plain: Vec<u8> = (0..251).cycle().take(2 * PIECE_BYTES + 1024).collect();
        disk.write(512, &plain).unwrap();
        let mut read = vec![0; plain.len()];
        for (at, part) in (512..).step_by(1536).zip(read.chunks_mut(1536)) {
            disk.read(at, part).unwrap();
        }
        assert!(read == plain);
    }

    #[test]
    fn the_same_is_not_the_same_in_another_sector_or_with_another_key() {
        let there = |key: u8| {
            let (mut disk, file) = locked(1024, &[key; KEY_BYTES]);
            disk.write(0, &[0; 1024]).unwrap();
            let mut there = [0; 1024];
            rustix::io::pread(&file, &mut there, 0).unwrap();
            there
        };
        let one = there(1);
        assert_ne!(one[..512], one[512..]);
        assert_ne!(one, there(2));
    }

    #[test]
    fn parts_of_sectors_are_refused() {
        let (mut disk, _file) = locked(1024, &[1; KEY_BYTES]);
        let invalid = io::ErrorKind::InvalidInput;
        assert_eq!(disk.write(1, &[0; 512]).unwrap_err().kind(), invalid);
        assert_eq!(disk.write(0, &[0; 100]).unwrap_err().kind(), invalid);
        assert_eq!(disk.read(0, &mut [0; 100]).unwrap_err().kind(), invalid);
    }
}
