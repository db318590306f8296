//! The API token: made once, at first start.
//!
//! Called by the daemon. The token is 32 random bytes in lower-case base32, in a file of mode 0600
//! that is written beside its place, fsynced and renamed, so that it is there whole or not at all.
//! Never printed, never in argv or an environment.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use zeroize::Zeroizing;

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
        place(path, &Zeroizing::new(text), None)?;
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

/// Writes the token to `home/.config/spore/token`, owned by whoever owns `home`.
///
/// # Errors
/// When it cannot be written.
pub(crate) fn copy_to_home(token: &Zeroizing<String>, home: &Path) -> Result<PathBuf> {
    let owner = std::fs::metadata(home)
        .with_context(|| format!("cannot look at the home folder {}", home.display()))?;
    let mut folder = home.to_path_buf();
    for part in [".config", "spore"] {
        folder.push(part);
        match std::fs::create_dir(&folder) {
            Ok(()) => fchown(File::open(&folder)?, Some(owner.uid()), Some(owner.gid()))?,
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                // The owner of the home could have put a link here to make root write elsewhere.
                let found = std::fs::symlink_metadata(&folder)?;
                if !found.is_dir() || found.uid() != owner.uid() {
                    bail!("{} is not a folder of the home's owner", folder.display());
                }
            }
            Err(error) => {
                return Err(error).with_context(|| format!("cannot make {}", folder.display()));
            }
        }
    }
    let path = folder.join("token");
    place(&path, token, Some((owner.uid(), owner.gid())))?;
    Ok(path)
}

fn place(path: &Path, token: &Zeroizing<String>, owner: Option<(u32, u32)>) -> Result<()> {
    let folder = path.parent().context("the token's path has no folder")?;
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let staged = path.with_extension("new");
    match std::fs::remove_file(&staged) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot remove {}", staged.display()));
        }
        _gone => {}
    }
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    let mut file = options
        .open(&staged)
        .with_context(|| format!("cannot write {}", staged.display()))?;
    writeln!(file, "{}", token.as_str())?;
    if let Some((uid, gid)) = owner {
        fchown(&file, Some(uid), Some(gid))?;
    }
    file.sync_all()?;
    std::fs::rename(&staged, path).with_context(|| format!("cannot write {}", path.display()))?;
    File::open(folder)?
        .sync_all()
        .with_context(|| format!("cannot sync {}", folder.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::{copy_to_home, ensure};

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
    fn a_link_in_the_home_is_not_followed() {
        let home = tempfile::tempdir().unwrap();
        let token = ensure(&home.path().join("token")).unwrap();
        std::os::unix::fs::symlink("/tmp", home.path().join(".config")).unwrap();
        assert!(copy_to_home(&token, home.path()).is_err());
    }

    #[test]
    fn the_copy_is_in_the_home() {
        let home = tempfile::tempdir().unwrap();
        let token = ensure(&home.path().join("token")).unwrap();
        let path = copy_to_home(&token, home.path()).unwrap();
        assert_eq!(
            std::fs::read_to_string(path).unwrap().trim(),
            token.as_str()
        );
    }
}
