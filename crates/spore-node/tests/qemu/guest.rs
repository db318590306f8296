//! Guests of a few bytes: an initramfs whose init says a word and then waits or powers off.
//!
//! So these tests need a kernel, but neither the agent nor an image.

/// What the init writes to the console first.
pub(crate) const WORD: &str = "spore-test-init-is-up";

/// About what the kernel leaves of a guest of 128 MiB.
pub(crate) const FILL_MIB: u32 = 72;

/// What the init does then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Then {
    /// Sleeps for ever.
    Wait,
    /// Asks the kernel to power off.
    PowerOff,
    /// Ends, so that the kernel panics.
    End,
    /// Writes to every page of [`FILL_MIB`], then sleeps for ever.
    Fill,
}

/// Where the program lies in memory; its code follows the two headers of 64 and 56 bytes.
const BASE: u64 = 0x40_0000;
const CODE_AT: u64 = 120;

/// A cpio archive (newc) with `/init`.
pub(crate) fn initramfs(then: Then) -> Vec<u8> {
    let mut archive = Vec::new();
    entry(&mut archive, "init", 0o100_755, &program(then));
    entry(&mut archive, "TRAILER!!!", 0, &[]);
    archive
}

fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, data: &[u8]) {
    let size = u32::try_from(data.len()).unwrap();
    let name_size = u32::try_from(name.len() + 1).unwrap();
    let fields = [1, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
    archive.extend_from_slice(b"070701");
    for field in fields {
        archive.extend_from_slice(format!("{field:08X}").as_bytes());
    }
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend_from_slice(data);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

/// A static x86-64 ELF program.
fn program(then: Then) -> Vec<u8> {
    let code = code(then);
    let size = CODE_AT + u64::try_from(code.len()).unwrap();
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    for half in [2_u16, 62] {
        elf.extend_from_slice(&half.to_le_bytes());
    }
    elf.extend_from_slice(&1_u32.to_le_bytes());
    for word in [BASE + CODE_AT, 64, 0] {
        elf.extend_from_slice(&word.to_le_bytes());
    }
    elf.extend_from_slice(&0_u32.to_le_bytes());
    for half in [64_u16, 56, 1, 64, 0, 0] {
        elf.extend_from_slice(&half.to_le_bytes());
    }
    // One segment, loaded whole, readable and executable.
    for half in [1_u32, 5] {
        elf.extend_from_slice(&half.to_le_bytes());
    }
    for word in [0, BASE, BASE, size, size, 0x1000] {
        elf.extend_from_slice(&word.to_le_bytes());
    }
    elf.extend_from_slice(&code);
    elf
}

/// mmap(NULL, len, READ | WRITE, PRIVATE | ANONYMOUS, -1, 0), a byte to each page, then pause().
fn fill_code() -> Vec<u8> {
    let bytes = FILL_MIB << 20;
    let mut code = vec![0xb8, 9, 0, 0, 0, 0x31, 0xff, 0xbe];
    code.extend_from_slice(&bytes.to_le_bytes());
    code.extend_from_slice(&[0xba, 3, 0, 0, 0, 0x41, 0xba, 0x22, 0, 0, 0]);
    code.extend_from_slice(&[0x49, 0xc7, 0xc0, 0xff, 0xff, 0xff, 0xff, 0x45, 0x31, 0xc9]);
    code.extend_from_slice(&[0x0f, 0x05, 0xb9]);
    code.extend_from_slice(&(bytes / 4096).to_le_bytes());
    code.extend_from_slice(&[
        0xc6, 0, 1, 0x48, 0x05, 0, 0x10, 0, 0, 0xff, 0xc9, 0x75, 0xf3,
    ]);
    code.extend_from_slice(&[0xb8, 34, 0, 0, 0, 0x0f, 0x05, 0xeb, 0xf7]);
    code
}

fn code(then: Then) -> Vec<u8> {
    let message = format!("{WORD}\n");
    let fill = fill_code();
    let rest: &[u8] = match then {
        Then::Fill => &fill,
        // reboot(MAGIC1, MAGIC2, POWER_OFF, NULL), then pause().
        Then::PowerOff => &[
            0xb8, 0xa9, 0, 0, 0, 0xbf, 0xad, 0xde, 0xe1, 0xfe, 0xbe, 0x69, 0x19, 0x12, 0x28, 0xba,
            0xdc, 0xfe, 0x21, 0x43, 0x4d, 0x31, 0xd2, 0x0f, 0x05, 0xb8, 34, 0, 0, 0, 0x0f, 0x05,
            0xeb, 0xf7,
        ],
        // pause() again and again.
        Then::Wait => &[0xb8, 34, 0, 0, 0, 0x0f, 0x05, 0xeb, 0xf7],
        // exit(0).
        Then::End => &[0xb8, 60, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05],
    };
    // write(1, message, len): the message lies behind the code.
    let mut code = vec![0xb8, 1, 0, 0, 0, 0xbf, 1, 0, 0, 0, 0x48, 0x8d, 0x35];
    let behind_the_address = u32::try_from(5 + 2 + rest.len()).unwrap();
    code.extend_from_slice(&behind_the_address.to_le_bytes());
    code.push(0xba);
    code.extend_from_slice(&u32::try_from(message.len()).unwrap().to_le_bytes());
    code.extend_from_slice(&[0x0f, 0x05]);
    code.extend_from_slice(rest);
    code.extend_from_slice(message.as_bytes());
    code
}
