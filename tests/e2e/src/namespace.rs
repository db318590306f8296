//! Networks of a story's own: namespaces without a name, which are gone with the story's process.

use std::fs::File;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// A network namespace.
#[derive(Debug)]
pub struct Namespace(File);

impl Namespace {
    /// A new one, with its loopback up.
    ///
    /// # Errors
    /// When the kernel or `unshare` refuses.
    pub fn make() -> Result<Self> {
        // Lives until the namespace is held here.
        let mut holder = Command::new("unshare")
            .args(["--net", "sh", "-c", "echo made; exec sleep 60"])
            .stdout(Stdio::piped())
            .spawn()
            .context("run unshare")?;
        let mut made = [0; 5];
        let said = holder.stdout.take().context("a pipe");
        let said = said.and_then(|mut out| Ok(std::io::Read::read_exact(&mut out, &mut made)?));
        let held = File::open(format!("/proc/{}/ns/net", holder.id()));
        holder.kill()?;
        holder.wait()?;
        said.context("make a network namespace")?;
        let this = Self(held?);
        this.ip("link set lo up")?;
        Ok(this)
    }

    /// Joins two by a pair of interfaces with these addresses.
    ///
    /// # Errors
    /// When `ip` refuses.
    pub fn join(&self, own: &str, other: &Self, its: &str) -> Result<()> {
        let path = other.path();
        self.ip(&format!(
            "link add veth0 type veth peer name veth1 netns {path}"
        ))?;
        for (namespace, link, address) in [(self, "veth0", own), (other, "veth1", its)] {
            namespace.ip(&format!("address add {address} dev {link}"))?;
            namespace.ip(&format!("link set {link} up"))?;
        }
        Ok(())
    }

    /// Runs `ip` with these words in it.
    ///
    /// # Errors
    /// When it fails.
    pub fn ip(&self, words: &str) -> Result<()> {
        let mut command = self.command(Path::new("ip"));
        let output = command.args(words.split(' ')).output().context("run ip")?;
        ensure!(output.status.success(), "ip {words}: {output:?}");
        Ok(())
    }

    /// A program that will run in it.
    #[must_use]
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path())).arg(program);
        command
    }

    /// Does something on a thread of its own in it; sockets that are made there belong to it.
    ///
    /// # Errors
    /// When it cannot be entered.
    ///
    /// # Panics
    /// When `inside` does.
    pub fn enter<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> Result<T> {
        let within = || {
            move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Network))?;
            Ok::<_, anyhow::Error>(inside())
        };
        let ended = std::thread::scope(|scope| scope.spawn(within).join());
        ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }
}
