//! One boot of the rig: QEMU's arguments, the command's output passed on, and how it ended. Called
//! by `rig`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};

use super::pin;
use crate::progress::say;

const QEMU: &str = "qemu-system-x86_64";

/// The exit code of timeout(1) when the time was over.
const TIMEOUT_CODE: i32 = 124;

/// What guest/rig/init puts before the reason for which it gives up.
const REFUSAL: &str = "rig: ";

/// The kernel ends the machine on a panic, and panics on what it could only guess to survive.
/// `tsc=reliable`: the emulated processors share one counter, and KVM keeps time as on a machine
/// with a good one. The rest saves seconds of boot, on a machine that guards nothing.
const APPEND: &str = "console=ttyS0 quiet panic=-1 oops=panic reboot=t tsc=reliable \
     mitigations=off nokaslr audit=0 random.trust_cpu=on raid=noautodetect cryptomgr.notests";

/// What is booted.
#[derive(Debug)]
pub(super) struct Boot<'a> {
    pub(super) vmlinux: &'a Path,
    pub(super) initramfs: &'a Path,
    /// Becomes `/out`.
    pub(super) out: &'a Path,
    pub(super) cpus: u32,
    pub(super) memory_mib: u32,
    pub(super) limit_s: u32,
}

/// How a boot ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// The command ended with this code.
    Code(u8),
    /// The machine could not be made a host; why.
    Refused(String),
    /// Its time was over.
    Hung,
    /// With none of these: its kernel panicked.
    Early,
}

impl Boot<'_> {
    /// Boots, passes the command's output on and waits for the end.
    pub(super) fn run(&self, console: &Path) -> Result<Ended> {
        let mut child = self
            .command(console)?
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start QEMU")?;
        let mut stdout = child.stdout.take().context("QEMU has no output")?;
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let keep = || pin::keep(&self.pid(), self.cpus, &is_over);
            let kept = scope.spawn(keep);
            let copied = io::copy(&mut stdout, &mut io::stdout().lock());
            is_over.store(true, Ordering::SeqCst);
            if let Ok(Err(error)) = kept.join() {
                // It is slower then, and nothing else.
                say(format!("{error:#}"));
            }
            copied
        })?;
        let status = child.wait()?;
        if status.code() == Some(TIMEOUT_CODE) {
            return Ok(Ended::Hung);
        }
        if !status.success() {
            bail!("QEMU ended with {status}");
        }
        let console =
            fs::read(console).with_context(|| format!("QEMU wrote no {}", console.display()))?;
        let code = fs::read_to_string(self.out.join("code")).ok();
        ended(code.as_deref(), &String::from_utf8_lossy(&console))
    }

    /// Where QEMU writes its number, until it ends.
    fn pid(&self) -> PathBuf {
        self.out.join("pid")
    }

    fn command(&self, console: &Path) -> Result<Command> {
        let mut qemu = Command::new("timeout");
        qemu.args(["--foreground", &self.limit_s.to_string(), QEMU])
            .args(["-name", "rig,debug-threads=on", "-pidfile"])
            .arg(self.pid())
            .args(["-M", "q35", "-accel", "tcg,thread=multi"])
            .args(["-cpu", "max,+svm", "-smp", &self.cpus.to_string()])
            .args(["-m", &self.memory_mib.to_string(), "-nodefaults"])
            .args(["-no-user-config", "-display", "none", "-no-reboot"])
            .args(["-append", APPEND, "-kernel"])
            .arg(self.vmlinux)
            .arg("-initrd")
            .arg(self.initramfs)
            .args(["-virtfs", &share(Path::new("/"), "host,readonly=on")?])
            .args(["-virtfs", &share(self.out, "results")?])
            .args(["-serial", &format!("file:{}", text(console)?)])
            // A file, and not `stdio`, which would be closed with our empty input.
            .args(["-chardev", "file,id=talk,path=/dev/stdout"])
            .args(["-device", "virtio-serial-pci"])
            .args(["-device", "virtserialport,chardev=talk,name=talk"]);
        Ok(qemu)
    }
}

/// A folder of this machine, with all that is mounted below it, under a tag.
fn share(folder: &Path, tag: &str) -> Result<String> {
    // QEMU's own way to say a comma within a value.
    let path = text(folder)?.replace(',', ",,");
    Ok(format!(
        "local,path={path},security_model=none,multidevs=remap,mount_tag={tag}"
    ))
}

fn text(path: &Path) -> Result<&str> {
    path.to_str()
        .with_context(|| format!("{} is no UTF-8", path.display()))
}

/// What an ended machine left.
fn ended(code: Option<&str>, console: &str) -> Result<Ended> {
    if let Some(code) = code {
        let code = code.trim();
        let number = code
            .parse()
            .with_context(|| format!("the rig left the exit code {code:?}"))?;
        return Ok(Ended::Code(number));
    }
    let refusal = console.lines().find_map(|line| line.strip_prefix(REFUSAL));
    Ok(match refusal {
        Some(why) => Ended::Refused(format!("the rig is no host: {}", why.trim())),
        None => Ended::Early,
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{Ended, ended, share};

    #[test]
    fn a_machine_ends_with_a_code_a_reason_or_early() {
        let panic = "[    4.2] Kernel panic - not syncing: Fatal exception\r\n";
        assert_eq!(ended(Some("7\n"), panic).unwrap(), Ended::Code(7));
        assert_eq!(ended(None, panic).unwrap(), Ended::Early);
        let refused = ended(None, "insmod: bad\r\nrig: cannot load 03-kvm.ko\r\n").unwrap();
        let why = "the rig is no host: cannot load 03-kvm.ko".to_owned();
        assert_eq!(refused, Ended::Refused(why));
        let error = ended(Some("none"), "").unwrap_err().to_string();
        assert!(error.contains("\"none\""), "{error}");
    }

    #[test]
    fn a_comma_in_a_path_ends_no_value() {
        let share = share(Path::new("/a,b"), "results").unwrap();
        assert!(share.starts_with("local,path=/a,,b,security"), "{share}");
    }
}
