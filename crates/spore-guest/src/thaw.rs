//! What a VM must renew before a tenant's first instruction: the app's folder, entropy, clock,
//! names, boot id, neighbour, connections.
//!
//! [`Real`] is the machine of [`crate::init`]; a step that fails fails the thaw, and the host ends
//! the VM. Entropy comes before whatever may use the kernel's random numbers.

use std::fs::File;
use std::io::{self, Write as _};
use std::net::Ipv4Addr;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;

use rustix::fs::{AtFlags, Mode, OFlags, fchmod, openat, renameat, unlinkat};
use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};
use rustix::system::{RebootCommand, reboot, sethostname};
use rustix::time::{ClockId, Timespec, clock_settime};
use spore_wire::cause::chain;
use spore_wire::guest::{AgentError, AgentErrorCode, Thaw, ThawStep};

use crate::agent::Machine;
use crate::folder::Folder;
use crate::guest::{Guest, path_error, refused};
use crate::view::{BOOT_ID_FILE, ViewError};
use crate::{console, net, sockets, sys};

/// The least entropy that is taken.
const ENTROPY_BYTES_MIN: usize = 32;

/// The longest name of an incarnation.
const INCARNATION_BYTES_MAX: usize = 64;

const NANOSECONDS: u64 = 1_000_000_000;

/// The longest name of a folder.
const FOLDER_BYTES_MAX: usize = 128;

/// The VM itself.
#[derive(Debug, Default)]
pub struct Real {
    folder: Folder,
}

impl Machine for Real {
    fn check(&self, thaw: &Thaw) -> Result<(), AgentError> {
        check(thaw)
    }

    fn renew(&mut self, guest: &Guest, step: ThawStep, thaw: &Thaw) -> Result<(), AgentError> {
        match step {
            ThawStep::Folder => self.show_folder(guest, thaw.folder.as_deref()),
            ThawStep::Entropy => renew_entropy(thaw.entropy.expose()),
            ThawStep::Clock => set_clock(thaw.realtime_ns),
            ThawStep::Names => set_names(guest, thaw),
            ThawStep::BootId => renew_boot_id(),
            ThawStep::Neighbour => net::renew_neighbour().map_err(|error| failed(&error)),
            ThawStep::Sockets => sockets::end_outside()
                .map_err(|error| refused("end the connections to outside", &error)),
            unknown => Err(AgentError {
                code: AgentErrorCode::Unknown,
                message: format!("thaw step {unknown:?}: this agent does not know it"),
            }),
        }
    }

    fn power_off(&mut self) {
        rustix::fs::sync();
        // On QEMU's microvm a power-off only halts, and none of the kernel's usual ways to reset is
        // there. A triple fault always ends the machine, which is started with -no-reboot.
        if let Err(error) = std::fs::write("/sys/kernel/reboot/type", "triple") {
            console::say(&format!("cannot choose the way to reset: {error}"));
        }
        if let Err(errno) = reboot(RebootCommand::Restart) {
            console::say(&format!("cannot end the VM: {}", io::Error::from(errno)));
        }
    }
}

impl Real {
    fn show_folder(&mut self, guest: &Guest, wanted: Option<&str>) -> Result<(), AgentError> {
        let Some(tenant) = &guest.launcher.namespace else {
            return Err(failed(&ViewError::Thread));
        };
        let shown = self.folder.show(tenant.as_fd(), wanted);
        shown.map_err(|error| failed(&error))
    }
}

/// Why a step was not done.
fn failed(error: &dyn std::error::Error) -> AgentError {
    AgentError {
        code: AgentErrorCode::Refused,
        message: chain(error),
    }
}

fn renew_entropy(entropy: &[u8]) -> Result<(), AgentError> {
    File::open("/dev/urandom")
        .and_then(|random| sys::add_entropy(random.as_fd(), entropy))
        .map_err(|error| refused("renew the kernel's entropy", &error))
}

fn set_clock(realtime_ns: u64) -> Result<(), AgentError> {
    let now = Timespec {
        tv_sec: i64::try_from(realtime_ns / NANOSECONDS).unwrap_or(i64::MAX),
        tv_nsec: i64::try_from(realtime_ns % NANOSECONDS).unwrap_or(0),
    };
    clock_settime(ClockId::Realtime, now).map_err(|errno| refused("set the clock", &errno.into()))
}

fn set_names(guest: &Guest, thaw: &Thaw) -> Result<(), AgentError> {
    sethostname(thaw.hostname.as_bytes())
        .map_err(|errno| refused("set the host name", &errno.into()))?;
    for (name, text, mode) in files(thaw) {
        put(guest, name, &text, mode)?;
    }
    Ok(())
}

/// The kernel's own boot id is the same in every fork; what the tenant reads in its place is a file
/// of ours ([`crate::view`]), written over in place since the tenant's mount is of this inode.
fn renew_boot_id() -> Result<(), AgentError> {
    let failed = |error: io::Error| refused("renew the boot id", &error);
    let mut bytes = [0_u8; 16];
    getrandom(&mut bytes, GetRandomFlags::empty()).map_err(|errno| failed(errno.into()))?;
    let file = File::options().write(true).open(BOOT_ID_FILE);
    file.and_then(|file| file.write_all_at(boot_id_text(bytes).as_bytes(), 0))
        .map_err(failed)
}

/// A random UUID (RFC 9562, version 4) as the kernel writes its own.
fn boot_id_text(mut bytes: [u8; 16]) -> String {
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let number = u128::from_be_bytes(bytes);
    let text = format!("{number:032x}");
    let parts = [
        &text[..8],
        &text[8..12],
        &text[12..16],
        &text[16..20],
        &text[20..],
    ];
    format!("{}\n", parts.join("-"))
}

fn check(thaw: &Thaw) -> Result<(), AgentError> {
    let invalid = |message: String| AgentError {
        code: AgentErrorCode::Invalid,
        message,
    };
    let bytes = thaw.entropy.expose().len();
    if !(ENTROPY_BYTES_MIN..=sys::ENTROPY_BYTES_MAX).contains(&bytes) {
        return Err(invalid(format!(
            "{bytes} bytes of entropy: 32 to 512 are taken"
        )));
    }
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
    let hostname = &thaw.hostname;
    if hostname.is_empty() || hostname.len() > 64 || !hostname.chars().all(plain) {
        return Err(invalid(format!(
            "host name `{hostname}`: 1 to 64 letters, digits, `-` and `.` are expected"
        )));
    }
    let incarnation = &thaw.incarnation;
    let named = |c: char| c.is_ascii_alphanumeric() || c == '-';
    if incarnation.len() > INCARNATION_BYTES_MAX || !incarnation.chars().all(named) {
        return Err(invalid(format!(
            "incarnation `{}`: at most 64 letters, digits and `-` are expected",
            incarnation.escape_debug()
        )));
    }
    if let Some(folder) = &thaw.folder
        && (folder.len() > FOLDER_BYTES_MAX || !folder.chars().all(named))
    {
        return Err(invalid(format!(
            "folder `{}`: at most 128 letters, digits and `-` are expected",
            folder.escape_debug()
        )));
    }
    let digit = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
    if thaw.machine_id.len() != 32 || !thaw.machine_id.chars().all(digit) {
        return Err(invalid(
            "machine id: 32 digits 0-9 and a-f are expected".to_owned(),
        ));
    }
    Ok(())
}

/// The files of `/etc` that name this VM.
fn files(thaw: &Thaw) -> [(&'static str, String, u32); 4] {
    let hostname = &thaw.hostname;
    let hosts = format!(
        "127.0.0.1\tlocalhost\n{}\t{hostname}\n",
        net::guest_address()
    );
    let resolver = match thaw.resolver {
        Some(address) => format!(
            "nameserver {}\noptions timeout:5\n",
            Ipv4Addr::from(address)
        ),
        None => "# This app has no [egress]: there is no resolver to ask.\n".to_owned(),
    };
    [
        ("machine-id", format!("{}\n", thaw.machine_id), 0o444),
        ("hostname", format!("{hostname}\n"), 0o644),
        ("hosts", hosts, 0o644),
        ("resolv.conf", resolver, 0o644),
    ]
}

/// Replaces a file of the tenant's `/etc`, whatever the image has there; a link is not followed.
fn put(guest: &Guest, name: &str, text: &str, mode: u32) -> Result<(), AgentError> {
    let failed = |errno| path_error(&format!("/etc/{name}"), errno);
    match rustix::fs::mkdirat(&guest.root, "etc", Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(failed(errno)),
    }
    let folder = guest.open("/etc", OFlags::PATH | OFlags::DIRECTORY)?;
    let temporary = ".spore-thaw";
    match unlinkat(&folder, temporary, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(errno) => return Err(failed(errno)),
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
    let file = openat(
        &folder,
        temporary,
        flags | OFlags::CLOEXEC,
        Mode::from_raw_mode(0o600),
    )
    .map_err(failed)?;
    fchmod(&file, Mode::from_raw_mode(mode)).map_err(failed)?;
    File::from(file)
        .write_all(text.as_bytes())
        .map_err(|error| refused(&format!("write /etc/{name}"), &error))?;
    renameat(&folder, temporary, &folder, name).map_err(failed)
}

#[cfg(test)]
mod tests {
    use spore_wire::guest::{AgentErrorCode, Thaw};
    use spore_wire::secret::SecretBytes;

    use super::{boot_id_text, check, files};

    fn thaw() -> Thaw {
        Thaw {
            realtime_ns: 1,
            entropy: SecretBytes::new(vec![7; 32]),
            hostname: "notes".to_owned(),
            machine_id: "0123456789abcdef0123456789abcdef".to_owned(),
            resolver: Some([10, 42, 0, 1]),
            folder: Some("0a-1".to_owned()),
            incarnation: "abc".to_owned(),
            steps: Vec::new(),
            hold: false,
            secrets: None,
        }
    }

    #[test]
    fn a_thaw_that_would_write_nonsense_is_refused_before_anything_is_done() {
        assert!(check(&thaw()).is_ok());
        let wrong = [
            Thaw {
                entropy: SecretBytes::new(vec![7; 31]),
                ..thaw()
            },
            Thaw {
                entropy: SecretBytes::new(vec![7; 513]),
                ..thaw()
            },
            Thaw {
                hostname: "a b".to_owned(),
                ..thaw()
            },
            Thaw {
                hostname: "x\n127.0.0.1 bank".to_owned(),
                ..thaw()
            },
            Thaw {
                machine_id: "0123".to_owned(),
                ..thaw()
            },
            Thaw {
                incarnation: "a\nb".to_owned(),
                ..thaw()
            },
            Thaw {
                incarnation: "a".repeat(65),
                ..thaw()
            },
            Thaw {
                folder: Some("../a".to_owned()),
                ..thaw()
            },
            Thaw {
                folder: Some("a".repeat(129)),
                ..thaw()
            },
        ];
        for thaw in wrong {
            assert_eq!(check(&thaw).unwrap_err().code, AgentErrorCode::Invalid);
        }
    }

    #[test]
    fn a_boot_id_is_a_random_uuid_with_the_bits_of_one() {
        let expected = "ffffffff-ffff-4fff-bfff-ffffffffffff\n";
        assert_eq!(boot_id_text([0xff; 16]), expected);
        assert_eq!(
            boot_id_text([0; 16]),
            "00000000-0000-4000-8000-000000000000\n"
        );
    }

    #[test]
    fn the_resolver_is_named_only_when_there_is_one() {
        let [_, _, hosts, resolver] = files(&thaw());
        assert_eq!(hosts.1, "127.0.0.1\tlocalhost\n10.42.0.2\tnotes\n");
        assert!(resolver.1.starts_with("nameserver 10.42.0.1\n"));
        let [_, _, _, none] = files(&Thaw {
            resolver: None,
            ..thaw()
        });
        assert!(!none.1.contains("nameserver"));
    }
}
