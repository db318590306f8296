//! Takes the ELF kernel out of a bzImage. Called by `deps/kernel.rs`; reads bytes, opens nothing.
//!
//! QEMU's microvm starts an ELF kernel through its PVH entry, which saves the decompression in the
//! guest. The boot protocol (Linux, Documentation/arch/x86/boot.rst) says where the payload is, so
//! nothing is searched for.

use std::io::Read;

use anyhow::{Context, Result, bail, ensure};

/// `boot_flag` and `HdrS` of the setup header.
const MAGIC_OFFSET: usize = 0x202;
const SETUP_SECTORS_OFFSET: usize = 0x1f1;
const PROTOCOL_OFFSET: usize = 0x206;
const PAYLOAD_OFFSET_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH_OFFSET: usize = 0x24c;

/// The protocol version that brought payload_offset.
const PROTOCOL_MIN: u16 = 0x0208;

/// The frame magic that `lz4 -l` writes.
const LZ4_LEGACY: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];

/// More than any kernel; what a damaged file can make us allocate.
const VMLINUX_BYTES_MAX: u64 = 512 * 1024 * 1024;

/// The ELF file inside `image`.
pub(crate) fn extract(image: &[u8]) -> Result<Vec<u8>> {
    ensure!(
        image.get(MAGIC_OFFSET..MAGIC_OFFSET + 4) == Some(b"HdrS"),
        "not a bzImage: no `HdrS` at 0x202"
    );
    let protocol = u16::try_from(number(image, PROTOCOL_OFFSET, 2)?)?;
    ensure!(
        protocol >= PROTOCOL_MIN,
        "boot protocol {protocol:#x} is older than 0x208"
    );
    let sectors = match number(image, SETUP_SECTORS_OFFSET, 1)? {
        0 => 4,
        sectors => sectors,
    };
    let start = (sectors + 1) * 512 + number(image, PAYLOAD_OFFSET_OFFSET, 4)?;
    let end = start + number(image, PAYLOAD_LENGTH_OFFSET, 4)?;
    let payload = image
        .get(usize::try_from(start)?..usize::try_from(end)?)
        .with_context(|| format!("payload {start}..{end} is beyond the file's end"))?;
    decompress(payload)
}

/// Decompresses the payload: an LZ4 legacy frame, then its length as four bytes.
fn decompress(payload: &[u8]) -> Result<Vec<u8>> {
    if !payload.starts_with(&LZ4_LEGACY) {
        bail!(
            "the kernel is compressed with something other than LZ4 (it starts with {:02x?}): \
             Debian's cloud kernel is expected",
            payload.get(..4).unwrap_or(payload)
        );
    }
    let (frame, length) = payload
        .split_last_chunk::<4>()
        .context("the payload ends before its length")?;
    let expected = u64::from(u32::from_le_bytes(*length));
    ensure!(
        expected <= VMLINUX_BYTES_MAX,
        "a kernel of {expected} bytes is too large"
    );
    let mut vmlinux = Vec::with_capacity(usize::try_from(expected)?);
    lz4_flex::frame::FrameDecoder::new(frame)
        .take(VMLINUX_BYTES_MAX)
        .read_to_end(&mut vmlinux)
        .context("cannot decompress the kernel")?;
    ensure!(
        u64::try_from(vmlinux.len())? == expected,
        "the kernel has {} bytes where {expected} are announced",
        vmlinux.len()
    );
    ensure!(
        vmlinux.starts_with(b"\x7fELF"),
        "the payload is not an ELF file"
    );
    Ok(vmlinux)
}

/// A little-endian number of `bytes` bytes.
fn number(image: &[u8], offset: usize, bytes: usize) -> Result<u64> {
    let field = image
        .get(offset..offset + bytes)
        .with_context(|| format!("the file ends before {offset:#x}"))?;
    Ok(field
        .iter()
        .rev()
        .fold(0, |value, byte| value << 8 | u64::from(*byte)))
}

#[cfg(test)]
mod tests {
    use super::{LZ4_LEGACY, extract};

    /// A bzImage of one setup sector whose payload is `elf`, compressed as the kernel's build does.
    fn image(elf: &[u8]) -> Vec<u8> {
        let block = lz4_flex::block::compress(elf);
        let mut payload = LZ4_LEGACY.to_vec();
        payload.extend(u32::try_from(block.len()).unwrap().to_le_bytes());
        payload.extend(&block);
        payload.extend(u32::try_from(elf.len()).unwrap().to_le_bytes());
        let mut image = vec![0; 1024];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
        image[0x248..0x24c].copy_from_slice(&16_u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
        image.extend([0; 16]);
        image.extend(payload);
        image
    }

    #[test]
    fn the_elf_file_comes_out_as_it_went_in() {
        let mut elf = b"\x7fELF".to_vec();
        elf.extend((0..100_000_u32).flat_map(|n| (n / 7).to_le_bytes()));
        assert_eq!(extract(&image(&elf)).unwrap(), elf);
    }

    #[test]
    fn a_cut_or_foreign_file_is_refused_with_a_reason() {
        let whole = image(b"\x7fELF and more");
        let cut = &whole[..whole.len() - 6];
        assert!(
            extract(cut)
                .unwrap_err()
                .to_string()
                .contains("beyond the file's end")
        );
        assert!(
            extract(b"MZ")
                .unwrap_err()
                .to_string()
                .contains("not a bzImage")
        );
        let mut gzip = whole;
        gzip[1040..1042].copy_from_slice(&[0x1f, 0x8b]);
        assert!(
            extract(&gzip)
                .unwrap_err()
                .to_string()
                .contains("other than LZ4")
        );
    }

    #[test]
    fn a_payload_that_is_no_elf_file_is_refused() {
        assert!(
            extract(&image(b"hello, hello, hello"))
                .unwrap_err()
                .to_string()
                .contains("ELF")
        );
    }
}
