//! The API token: made once, at first start.
//!
//! Called by the daemon. The token is 32 random bytes in lower-case base32, in a file of mode 0600
//! that is written beside its place, fsynced and renamed, so that it is there whole or not at all.
//! Never printed, never in argv or an environment. Root never writes below a user's home.

use std::fs::{DirBuilder, File};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::unistd::User;
use zeroize::Zeroizing;

/// More than any token; what a wrong standard input can make us keep.
const TOKEN_BYTES_MAX: u64 = 4096;

/// The token in `path`, made now when there is none.
///
/// # Errors
/// When the file is readable by others, empty, or cannot be written; the message says what to do.
pub(crate) fn ensure(path: &Path) -> Result<Zeroizing<String>> {
    if !path.exists() {
        let mut bytes = Zeroizing::new([0_u8; 32]);
        getrandom::fill(bytes.as_mut()).context("the kernel gives no random bytes")?;
        let text = data_encoding::BASE32_NOPAD
            .encode(bytes.as_ref())
            .to_ascii_lowercase();
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)
                .with_context(|| format!("cannot make {}", folder.display()))?;
        }
        place(path, &Zeroizing::new(text))?;
    }
    let mut file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mode = file.metadata()?.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        bail!(
            "{} has mode {mode:o}, so others can read the API token: `chmod 600` it, and delete \
             it first if somebody may have read it (a new one is made at the next start)",
            path.display()
        );
    }
    let mut text = Zeroizing::new(String::new());
    file.read_to_string(&mut text)
        .with_context(|| format!("cannot read {}", path.display()))?;
    let token = Zeroizing::new(text.trim().to_owned());
    if token.len() < 32 {
        bail!(
            "{} holds {} characters, no token: delete it and start again for a new one",
            path.display(),
            token.len()
        );
    }
    Ok(token)
}

/// Gives `user` a copy of the token, in `~/.config/spore/token`. A process with the user's own
/// rights writes it, since whoever owns the home can put links and folders in the way of root.
///
/// # Errors
/// When it cannot be written; the message says why.
pub(crate) fn give(token: &Zeroizing<String>, user: &User, program: &Path) -> Result<()> {
    let mut writer = Command::new(program)
        .arg("keep-token")
        .arg(&user.dir)
        .env_clear()
        .current_dir("/")
        .uid(user.uid.as_raw())
        .gid(user.gid.as_raw())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("start the process that writes it")?;
    let mut stdin = writer.stdin.take().context("its standard input")?;
    // When it ended at once, what it said is worth more than the broken pipe.
    let told = stdin.write_all(token.as_bytes());
    drop(stdin);
    let output = writer.wait_with_output().context("wait for it")?;
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
    }
    told.context("hand it over")
}

/// Writes the token that `input` gives to `home/.config/spore/token`, as whoever this process is.
///
/// # Errors
/// When it cannot be written.
pub(crate) fn keep(home: &Path, input: impl Read) -> Result<()> {
    let mut text = Zeroizing::new(String::new());
    input
        .take(TOKEN_BYTES_MAX)
        .read_to_string(&mut text)
        .context("read the token")?;
    let folder = home.join(".config/spore");
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&folder)
        .with_context(|| format!("cannot make {}", folder.display()))?;
    place(&folder.join("token"), &text)
}

/// Writes the token so that it is there whole or not at all.
fn place(path: &Path, token: &Zeroizing<String>) -> Result<()> {
    let folder = path.parent().context("the token's path has no folder")?;
    let mut staged = tempfile::NamedTempFile::new_in(folder)
        .with_context(|| format!("cannot write in {}", folder.display()))?;
    writeln!(staged, "{}", token.as_str())?;
    staged.as_file().sync_all()?;
    staged
        .persist(path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    File::open(folder)?
        .sync_all()
        .with_context(|| format!("cannot sync {}", folder.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    use super::{ensure, keep};

    #[test]
    fn a_token_is_made_once_and_private() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("etc/token");
        let token = ensure(&path).unwrap();
        assert_eq!(token.len(), 52);
        assert_eq!(ensure(&path).unwrap(), token);
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
    }

    #[test]
    fn a_token_that_others_can_read_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        ensure(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        let refused = ensure(&path).unwrap_err().to_string();
        assert!(refused.contains("chmod 600"), "{refused}");
    }

    #[test]
    fn a_copy_is_private_and_replaces_what_a_link_leads_to_never() {
        let home = tempfile::tempdir().unwrap();
        let folder = home.path().join(".config/spore");
        keep(home.path(), b"first".as_slice()).unwrap();
        let path = folder.join("token");
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "first\n");
        assert_eq!((mode(&path), mode(&folder)), (0o600, 0o700));

        let elsewhere = home.path().join("elsewhere");
        std::fs::write(&elsewhere, "kept").unwrap();
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &path).unwrap();
        keep(home.path(), b"second".as_slice()).unwrap();
        assert_eq!(std::fs::read_to_string(&elsewhere).unwrap(), "kept");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "second\n");
        let names = std::fs::read_dir(&folder).unwrap();
        assert_eq!(names.count(), 1, "nothing else is left there");
    }
}
