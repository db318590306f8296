//! Takes the ELF kernel out of a bzImage. Called by `deps/kernel.rs`; reads bytes, opens nothing.
//!
//! QEMU starts an ELF kernel through its PVH entry, which saves the decompression in the
//! guest. The boot protocol (Linux, Documentation/arch/x86/boot.rst) says where the payload is, so
//! nothing is searched for.

use std::io::{Read, Seek, Write};
use std::process::{Command, Stdio};

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

/// What a stream of xz(1) begins with.
const XZ: [u8; 6] = *b"\xfd7zXZ\0";

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

/// Decompresses the payload: an LZ4 legacy frame or a stream of xz(1), then its length as four
/// bytes.
fn decompress(payload: &[u8]) -> Result<Vec<u8>> {
    let (stream, length) = payload
        .split_last_chunk::<4>()
        .context("the payload ends before its length")?;
    let expected = u64::from(u32::from_le_bytes(*length));
    ensure!(
        expected <= VMLINUX_BYTES_MAX,
        "a kernel of {expected} bytes is too large"
    );
    let mut vmlinux = Vec::with_capacity(usize::try_from(expected)?);
    if stream.starts_with(&LZ4_LEGACY) {
        lz4_flex::frame::FrameDecoder::new(stream)
            .take(VMLINUX_BYTES_MAX)
            .read_to_end(&mut vmlinux)
            .context("cannot decompress the kernel")?;
    } else if stream.starts_with(&XZ) {
        unxz(stream, &mut vmlinux)?;
    } else {
        bail!(
            "the kernel is compressed with something other than LZ4 and xz (it starts with \
             {:02x?}): one of Debian's is expected",
            payload.get(..4).unwrap_or(payload)
        );
    }
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

/// Decompresses a stream with xz(1), which also unpacks the kernel's modules.
fn unxz(stream: &[u8], out: &mut Vec<u8>) -> Result<()> {
    let mut file = tempfile::tempfile()?;
    file.write_all(stream)?;
    file.rewind()?;
    let mut xz = Command::new("xz")
        .arg("-dc")
        .stdin(file)
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start `xz`")?;
    let stdout = xz.stdout.take().context("`xz` has no output")?;
    stdout.take(VMLINUX_BYTES_MAX).read_to_end(out)?;
    let status = xz.wait()?;
    ensure!(status.success(), "`xz -dc` failed: {status}");
    Ok(())
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
        let mut stream = LZ4_LEGACY.to_vec();
        stream.extend(u32::try_from(block.len()).unwrap().to_le_bytes());
        stream.extend(&block);
        image_of(stream, elf)
    }

    /// The same of a stream that is compressed already.
    fn image_of(mut payload: Vec<u8>, elf: &[u8]) -> Vec<u8> {
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
    fn a_stream_of_xz_is_read_too() {
        // `printf '\177ELF of a kernel' | xz --check=crc32`.
        let stream = [
            0xfd, 0x37, 0x7a, 0x58, 0x5a, 0x00, 0x00, 0x01, 0x69, 0x22, 0xde, 0x36, 0x02, 0x00,
            0x21, 0x01, 0x16, 0x00, 0x00, 0x00, 0x74, 0x2f, 0xe5, 0xa3, 0x01, 0x00, 0x0f, 0x7f,
            0x45, 0x4c, 0x46, 0x20, 0x6f, 0x66, 0x20, 0x61, 0x20, 0x6b, 0x65, 0x72, 0x6e, 0x65,
            0x6c, 0x00, 0x09, 0x9f, 0x96, 0x88, 0x00, 0x01, 0x24, 0x10, 0xe9, 0x44, 0xd9, 0xcc,
            0x90, 0x42, 0x99, 0x0d, 0x01, 0x00, 0x00, 0x00, 0x00, 0x01, 0x59, 0x5a,
        ];
        let elf = b"\x7fELF of a kernel";
        assert_eq!(extract(&image_of(stream.to_vec(), elf)).unwrap(), elf);
        let cut = stream[..30].to_vec();
        let error = extract(&image_of(cut, elf)).unwrap_err().to_string();
        assert!(error.contains("`xz -dc` failed"), "{error}");
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
