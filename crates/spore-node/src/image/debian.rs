//! Root file systems from Debian packages, built without privileges.
//!
//! Called by the node's server for `ImageRecipe::Packages` and by the build task that makes base
//! images. Maintainer scripts of packages run in mmdebstrap's own user namespace, as a user that
//! owns nothing on the host, never as root. The result goes to the packer as a stream; no tree is
//! left on the host.

use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use spore_wire::node::{ImageInfo, ImageKind};
use thiserror::Error;

use super::job::Job;
use super::pack::PackRequest;
use super::packer::{BuildError, Packer};
use super::store::{Filing, ImageStore};

/// Packages of a named image, on top of Debian's essential ones.
const RECIPES: &[(&str, &[&str])] = &[
    ("debian/base", &["ca-certificates", "netbase", "tzdata"]),
    (
        "debian/node",
        &["ca-certificates", "netbase", "nodejs", "tzdata"],
    ),
    (
        "debian/python3",
        &["ca-certificates", "netbase", "python3", "tzdata"],
    ),
];

/// The Debian release that images are made of.
pub const SUITE: &str = "bookworm";

/// The most packages that one image may ask for.
pub const PACKAGES_MAX: usize = 200;

/// What no app reads and every image would carry. Licences stay.
const EXCLUDED: &[&str] = &[
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/lintian/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/man/*",
];

/// The app's user gets a name and a home, since programs look both up.
const APP_USER: &str = r#"echo "app:x:1000:1000::/home/app:/bin/sh" >>"$1/etc/passwd" &&
echo "app:x:1000:" >>"$1/etc/group" && echo "app:!:19000::::::" >>"$1/etc/shadow" &&
mkdir -p "$1/home/app" "$1/app" && chown 1000:1000 "$1/home/app""#;

/// What an image cannot use and must not carry from the machine that built it.
const CLEANUP: &str = r#"rm -rf "$1/var/cache/apt" "$1/var/lib/apt/lists" "$1/var/log/apt" \
"$1/var/log/dpkg.log" "$1/var/log/bootstrap.log" "$1/var/cache/ldconfig" \
"$1/var/cache/debconf/"*-old "$1/var/lib/dpkg/"*-old "$1/etc/hostname" "$1/etc/resolv.conf" &&
: >"$1/etc/machine-id""#;

/// How images are built from packages on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DebianBuilder {
    /// The user that mmdebstrap runs as; needs a range in `/etc/subuid` and `/etc/subgid`.
    pub user: String,
    /// Where a build's files are while it runs; all may enter it, since the user's whole range of
    /// uids must.
    pub scratch: PathBuf,
    /// Whose builds these are: a folder that no other builder of this host has. Builders share the
    /// scratch folder, and none may sweep what is another's.
    pub owner: PathBuf,
}

/// Why nothing was built.
#[derive(Debug, Error)]
pub enum DebianError {
    /// There is no recipe of that name.
    #[error("there is no base image `{0}`: debian/base, debian/node and debian/python3 are known")]
    Recipe(String),
    /// Not a package's name.
    #[error("`{0}` is not a Debian package's name")]
    Package(String),
    /// Too many packages.
    #[error("{0} packages are more than an image may ask for ({PACKAGES_MAX})")]
    TooMany(usize),
    /// The build user is not there.
    #[error("user {0} is not on this machine: `cargo xtask deps` makes it, `useradd` does too")]
    NoUser(String),
    /// mmdebstrap or its folder could not be started.
    #[error("cannot start mmdebstrap: {what}; is it installed?")]
    Start {
        /// Which step.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// mmdebstrap failed.
    #[error("mmdebstrap failed ({status}): {log}")]
    Failed {
        /// Exit code or signal.
        status: String,
        /// Its last lines.
        log: String,
    },
    /// The stream could not be packed.
    #[error(transparent)]
    Build(#[from] BuildError),
}

/// The packages of a named base image.
///
/// # Errors
/// [`DebianError::Recipe`].
pub fn recipe(name: &str) -> Result<Vec<String>, DebianError> {
    let found = RECIPES.iter().find(|(known, _)| *known == name);
    let (_, packages) = found.ok_or_else(|| DebianError::Recipe(name.to_owned()))?;
    Ok(packages
        .iter()
        .map(|package| (*package).to_owned())
        .collect())
}

impl DebianBuilder {
    /// Builds a root image of Debian's essential packages and `packages`.
    ///
    /// # Errors
    /// [`DebianError`]; nothing is left then, in the store or outside.
    pub fn build(
        &self,
        packages: &[String],
        packer: &Packer,
        store: &ImageStore,
        filing: Filing,
        job: &Job,
    ) -> Result<ImageInfo, DebianError> {
        check(packages)?;
        let user = nix::unistd::User::from_name(&self.user)
            .ok()
            .flatten()
            .ok_or_else(|| DebianError::NoUser(self.user.clone()))?;
        let start = |what| move |source| DebianError::Start { what, source };
        let scratch = tempfile::Builder::new()
            .prefix(&self.prefix())
            .tempdir_in(&self.scratch)
            .map_err(start("make its folder"))?;
        nix::unistd::chown(scratch.path(), Some(user.uid), Some(user.gid))
            .map_err(|errno| start("give it its folder")(errno.into()))?;
        let mut command = command(packages);
        command
            .env_clear()
            .env(
                "PATH",
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            )
            .env("HOME", scratch.path())
            .env("TMPDIR", scratch.path())
            .env("LC_ALL", "C.UTF-8")
            .current_dir(scratch.path())
            .process_group(0);
        if rustix::process::geteuid().is_root() {
            // Without supplementary groups: the standard library clears them for root.
            command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
        }
        let mut bootstrap = Bootstrap::start(&mut command, job)?;
        let request = PackRequest::of(ImageKind::Root);
        let packed = packer.pack(store, request, &mut bootstrap, filing, job);
        let own_failure = bootstrap.failure.take();
        bootstrap.end();
        if let Err(error) = scratch.close() {
            // Something of a build that was ended may still write there; the next start removes it.
            tracing::warn!(%error, "the folder of an image build is left for now");
        }
        match (own_failure, job.ended()) {
            (Some(error), None) => Err(error),
            (_, Some(why)) => Err(BuildError::Ended(why).into()),
            (None, None) => Ok(packed?),
        }
    }

    /// How the names of its folders begin.
    fn prefix(&self) -> String {
        let owner = blake3::hash(self.owner.as_os_str().as_encoded_bytes()).to_hex();
        format!("spore-build-{}-", &owner[..16])
    }

    /// Removes folders of builds that a killed daemon left. Legal while nothing is built, once what
    /// was is ended.
    ///
    /// # Errors
    /// When one cannot be removed.
    pub fn sweep(&self) -> io::Result<()> {
        let prefix = self.prefix();
        for entry in std::fs::read_dir(&self.scratch)? {
            let entry = entry?;
            let name = entry.file_name();
            if name.to_str().is_some_and(|name| name.starts_with(&prefix)) {
                remove_folder(&entry.path())?;
            }
        }
        Ok(())
    }
}

/// Removes a folder, which never leads elsewhere: links in it are not followed.
fn remove_folder(path: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(path) {
        // Anybody may make a file or a link of the name.
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => std::fs::remove_file(path),
        other => other,
    }
}

/// Only names: apt takes `/`, `=`, `+`, `-`, `?` and `~` for releases, versions and patterns.
fn check(packages: &[String]) -> Result<(), DebianError> {
    if packages.len() > PACKAGES_MAX {
        return Err(DebianError::TooMany(packages.len()));
    }
    let is_name = |name: &str| {
        (2..=128).contains(&name.len())
            && name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
            && name.ends_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '+')
            && name
                .bytes()
                .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'+' | b'-'))
    };
    match packages.iter().find(|name| !is_name(name)) {
        Some(name) => Err(DebianError::Package(name.chars().take(128).collect())),
        None => Ok(()),
    }
}

/// mmdebstrap behind a shell that waits for a line: until then it is put where it belongs. A
/// daemon that dies before it says so ends the wait, and nothing starts.
fn command(packages: &[String]) -> Command {
    let mut command = Command::new("/bin/sh");
    command.args([
        "-c",
        "read -r go && exec mmdebstrap \"$@\" </dev/null",
        "sh",
    ]);
    // Guests mount a devtmpfs, so /dev stays empty: an image may have no device nodes.
    command.args([
        "--mode=unshare",
        "--variant=essential",
        "--format=tar",
        "--quiet",
    ]);
    command.arg("--skip=output/dev,output/mknod");
    command.args(EXCLUDED.iter().map(|option| format!("--dpkgopt={option}")));
    if !packages.is_empty() {
        command.arg(format!("--include={}", packages.join(",")));
    }
    command.arg(format!("--customize-hook={APP_USER}"));
    command.arg(format!("--customize-hook={CLEANUP}"));
    command.args([SUITE, "-"]);
    command
}

/// mmdebstrap at work, read as its tar stream. Its failure is an error of the stream, so that a
/// half-built system is never packed.
struct Bootstrap {
    child: Child,
    stdout: ChildStdout,
    log: Option<std::thread::JoinHandle<String>>,
    failure: Option<DebianError>,
}

impl Bootstrap {
    fn start(command: &mut Command, job: &Job) -> Result<Self, DebianError> {
        let start = |what| move |source| DebianError::Start { what, source };
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(start("run it"))?;
        let gone = || start("its output")(io::ErrorKind::BrokenPipe.into());
        let stdout = child.stdout.take().ok_or_else(gone)?;
        let stderr = child.stderr.take().ok_or_else(gone)?;
        let log = std::thread::spawn(move || last_lines(stderr));
        let mut stdin = child.stdin.take().ok_or_else(gone)?;
        let this = Self {
            child,
            stdout,
            log: Some(log),
            failure: None,
        };
        let placed = job.place(&this.child);
        placed.map_err(start("put it into its cgroup"))?;
        stdin.write_all(b"go\n").map_err(start("let it go"))?;
        Ok(this)
    }

    /// Kills what is left of it, with everything that it started.
    fn end(&mut self) {
        let group = i32::try_from(self.child.id())
            .ok()
            .and_then(rustix::process::Pid::from_raw);
        if let Some(group) = group
            && matches!(self.child.try_wait(), Ok(None))
        {
            let killed = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
            let ended = self.child.wait();
            tracing::debug!(?killed, ?ended, "mmdebstrap was killed");
        }
    }
}

impl Drop for Bootstrap {
    fn drop(&mut self) {
        self.end();
    }
}

impl Read for Bootstrap {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.stdout.read(buffer)?;
        if count > 0 || buffer.is_empty() || self.failure.is_some() {
            return Ok(count);
        }
        let status = self.child.wait()?;
        if status.success() {
            return Ok(0);
        }
        let log = self
            .log
            .take()
            .and_then(|log| log.join().ok())
            .unwrap_or_default();
        self.failure = Some(DebianError::Failed {
            status: status.to_string(),
            log,
        });
        Err(io::Error::other("mmdebstrap failed"))
    }
}

/// The last lines of what is said, whatever it is.
fn last_lines(mut from: impl Read) -> String {
    const KEPT_BYTES: usize = 4096;
    let mut kept = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(count) = from.read(&mut buffer) {
        let Some(read) = buffer.get(..count).filter(|read| !read.is_empty()) else {
            break;
        };
        kept.extend_from_slice(read);
        let surplus = kept.len().saturating_sub(KEPT_BYTES);
        kept.drain(..surplus);
    }
    String::from_utf8_lossy(&kept).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::process::CommandExt;
    use std::process::Command;

    use super::{Bootstrap, DebianBuilder, DebianError, check, command, last_lines, recipe};
    use crate::cgroup::Cgroups;
    use crate::image::job::{BUILD_LIMITS, Ended, Job};

    #[test]
    fn base_images_have_recipes() {
        assert!(
            recipe("debian/python3")
                .unwrap()
                .contains(&"python3".to_owned())
        );
        assert!(matches!(recipe("debian/../x"), Err(DebianError::Recipe(_))));
    }

    #[test]
    fn only_plain_names_of_packages_reach_apt() {
        check(&["g++".to_owned(), "libpython3.11-stdlib".to_owned()]).unwrap();
        for name in [
            "",
            "-y",
            "a/unstable",
            "a=1",
            "?all",
            "~n.",
            "a,b",
            "a b",
            "./a.deb",
            "a-",
        ] {
            let refused = check(&[name.to_owned()]);
            assert!(matches!(refused, Err(DebianError::Package(_))), "{name}");
        }
    }

    #[test]
    fn the_number_of_packages_is_bounded() {
        let many = vec!["python3".to_owned(); 201];
        assert!(matches!(check(&many), Err(DebianError::TooMany(201))));
    }

    #[test]
    fn mmdebstrap_never_runs_in_a_mode_that_needs_root() {
        let command = command(&["python3".to_owned()]);
        assert_eq!(command.get_program(), "/bin/sh");
        let arguments: Vec<_> = command.get_args().map(|a| a.to_string_lossy()).collect();
        assert!(arguments.contains(&"--mode=unshare".into()));
        assert!(arguments.contains(&"--include=python3".into()));
    }

    #[test]
    fn what_a_killed_build_left_is_swept_and_what_is_anothers_stays() {
        let scratch = tempfile::tempdir().unwrap();
        let builder = |owner: &str| DebianBuilder {
            user: "nobody".to_owned(),
            scratch: scratch.path().to_owned(),
            owner: owner.into(),
        };
        let ours = builder("/ours");
        let path = |name: String| scratch.path().join(name);
        let left = path(format!("{}left", ours.prefix()));
        let link = path(format!("{}link", ours.prefix()));
        let other = path(format!("{}left", builder("/others").prefix()));
        let precious = path("precious".to_owned());
        for folder in [&left, &other, &precious] {
            std::fs::create_dir(folder).unwrap();
            std::fs::write(folder.join("file"), "x").unwrap();
        }
        std::os::unix::fs::symlink(&precious, left.join("out")).unwrap();
        std::os::unix::fs::symlink(&precious, &link).unwrap();
        ours.sweep().unwrap();
        assert!(!left.exists() && link.symlink_metadata().is_err());
        assert!(other.join("file").exists() && precious.join("file").exists());
    }

    #[test]
    fn a_build_is_ended_with_everything_that_it_started() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: cgroups are root's");
            return;
        }
        let parent = format!("spore-build-test-{}", std::process::id());
        let cgroups = Cgroups::open(&parent).unwrap();
        let job = Job::begin(&cgroups, &BUILD_LIMITS).unwrap();
        let name = cgroups.list().unwrap().remove(0);
        let is_a_vms = name.parse::<spore_wire::id::VmId>().is_ok();
        assert!(
            !is_a_vms,
            "else no start of a daemon ends what is left of it"
        );
        let mut command = Command::new("/bin/sh");
        // One that left the group and the session of the first, as maintainer scripts do.
        let busy = "read -r go; setsid sleep 1000 & sleep 1000 & wait";
        command.args(["-c", busy]).process_group(0);
        let mut bootstrap = Bootstrap::start(&mut command, &job).unwrap();
        while cgroups.members(&name).unwrap().len() < 2 {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        job.ender().end(Ended::Timeout(1));
        job.ender().end(Ended::Cancelled);
        assert!(bootstrap.read(&mut [0]).is_err());
        assert_eq!(job.ended(), Some(Ended::Timeout(1)));
        // Its output ends with its last process, which leaves the cgroup a moment later; the job
        // kills again and waits for that when it ends.
        let emptied = (0..2000).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(5));
            cgroups.members(&name).unwrap().is_empty()
        });
        assert!(emptied);
        // What is started for a job that was ended does not live either.
        let late = Bootstrap::start(&mut command, &job);
        assert!(matches!(late, Err(DebianError::Start { .. })));
        drop(bootstrap);
        drop(job);
        cgroups.remove_parent().unwrap();
    }

    #[test]
    fn only_the_end_of_a_long_log_is_kept() {
        let log = format!("{}the end", "x".repeat(100_000));
        let kept = last_lines(log.as_bytes());
        assert!(kept.ends_with("the end") && kept.len() <= 4096);
    }
}
