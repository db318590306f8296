//! The files of an app's secrets, in `/run/secrets` (a tmpfs of its own).
//!
//! Put there by [`crate::runner`]: for nobody when a thaw gives them, for the app's user when the
//! app is started. Keeps no value, and quotes none.

use rustix::fs::{AtFlags, Dir, Gid, Mode, OFlags, Uid, fchmod, fchown, openat, unlinkat};
use rustix::io::Errno;
use spore_wire::guest::{AgentError, AgentErrorCode};
use spore_wire::secret::SecretBytes;

use crate::guest::{Guest, path_error};
use crate::user::Identity;

/// Where they are.
const FOLDER: &str = "/run/secrets";

/// Replaces what is there by these files. They and their folder are `owner`'s; `None` keeps
/// everybody but the agent out of the folder.
///
/// # Errors
/// `Invalid`, with the name of a file; else whatever the kernel answers.
pub fn put(
    guest: &Guest,
    files: &[(String, SecretBytes)],
    owner: Option<&Identity>,
) -> Result<(), AgentError> {
    let failed = |errno| path_error(FOLDER, errno);
    let (uid, gid) = owner.map_or((0, 0), |owner| (owner.uid, owner.gid));
    let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
    let folder = guest.open(FOLDER, OFlags::RDONLY | OFlags::DIRECTORY)?;
    // An unprivileged agent (a test of the session loop) has no other user to give them to.
    let privileged = rustix::process::geteuid().is_root();
    if privileged {
        fchown(&folder, uid, gid).map_err(failed)?;
    }
    for entry in Dir::read_from(&folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            match unlinkat(&folder, name, AtFlags::empty()) {
                Ok(()) | Err(Errno::ISDIR | Errno::NOENT) => {}
                Err(errno) => return Err(failed(errno)),
            }
        }
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
    let mode = Mode::from_raw_mode(0o400);
    for (name, value) in files {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if name.is_empty() || name.starts_with('.') || !name.chars().all(plain) {
            return Err(AgentError {
                code: AgentErrorCode::Invalid,
                message: format!("secret file `{name}`: use letters, digits, `.`, `_`, `-`"),
            });
        }
        let file = openat(&folder, name, flags | OFlags::CLOEXEC, mode).map_err(failed)?;
        let mut rest = value.expose();
        while !rest.is_empty() {
            let bytes = rustix::io::write(&file, rest).map_err(failed)?;
            rest = &rest[bytes..];
        }
        fchmod(&file, mode).map_err(failed)?;
        if privileged {
            fchown(&file, uid, gid).map_err(failed)?;
        }
    }
    Ok(())
}
