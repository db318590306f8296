//! Files read and written for the host, inside the tenant's root.
//!
//! Owned by a stream of [`crate::agent`]. Plain files only, a bounded part per turn. A file is
//! written beside its place and renamed when it is whole, so nobody ever sees half of it.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;

use rustix::fs::{AtFlags, Gid, Mode, OFlags, Uid, fchmod, fchown, openat, renameat, unlinkat};
use spore_wire::guest::{AgentError, AgentErrorCode, Reply, WriteFile};

use crate::guest::{Guest, path_error, refused};
use crate::session::{Outbox, Window};

const READ_BYTES: usize = 32 * 1024;
const READS_PER_TURN: usize = 4;

/// A file on its way to the host.
#[derive(Debug)]
pub struct FileReader {
    file: File,
    path: String,
    bytes: u64,
}

impl FileReader {
    /// Opens it.
    ///
    /// # Errors
    /// As the agent is to answer them.
    pub fn open(guest: &Guest, path: &str) -> Result<Self, AgentError> {
        Ok(Self {
            file: guest.open_file(path)?,
            path: path.to_owned(),
            bytes: 0,
        })
    }

    /// Whether it can go on now.
    #[must_use]
    pub fn can_go_on(window: &Window, room: bool) -> bool {
        room && window.may_send() > 0
    }

    /// Sends a part. Gives the answer once the file is sent whole.
    ///
    /// # Errors
    /// As the agent is to answer them.
    pub fn pump(
        &mut self,
        stream: u32,
        window: &mut Window,
        outbox: &mut Outbox,
    ) -> Result<Option<Reply>, AgentError> {
        let mut buffer = vec![0; READ_BYTES];
        for _read in 0..READS_PER_TURN {
            let limit = window.may_send().min(READ_BYTES);
            if limit == 0 || !outbox.has_room() {
                break;
            }
            match self.file.read(&mut buffer[..limit]) {
                Ok(0) => {
                    outbox.end(stream);
                    let metadata = self.file.metadata();
                    let metadata = metadata.map_err(|error| self.failed(&error))?;
                    return Ok(Some(Reply::File {
                        bytes: self.bytes,
                        mode: metadata.permissions().mode() & 0o7777,
                    }));
                }
                Ok(bytes) => {
                    outbox.data(stream, &buffer[..bytes]);
                    window.sent(bytes);
                    self.bytes += bytes as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.failed(&error)),
            }
        }
        Ok(None)
    }

    fn failed(&self, error: &io::Error) -> AgentError {
        refused(&format!("read `{}`", self.path), error)
    }
}

/// A file on its way from the host.
#[derive(Debug)]
pub struct FileWriter {
    folder: OwnedFd,
    name: String,
    temporary: Option<String>,
    file: File,
    path: String,
}

impl FileWriter {
    /// Makes the temporary file. `unique` is used once in the agent's life.
    ///
    /// # Errors
    /// As the agent is to answer them.
    pub fn create(guest: &Guest, request: &WriteFile, unique: u64) -> Result<Self, AgentError> {
        let path = request.path.as_str();
        let invalid = |message: String| AgentError {
            code: AgentErrorCode::Invalid,
            message,
        };
        if request.mode > 0o777 {
            return Err(invalid(format!("mode {:o} is over 777", request.mode)));
        }
        let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
        if matches!(name, "" | "." | "..") {
            return Err(invalid(format!(
                "path `{path}` does not end in a file's name"
            )));
        }
        let owner = guest.identity(request.user.as_deref())?;
        guest.settle(&owner)?;
        let folder = guest.open(&format!("{folder}/"), OFlags::PATH | OFlags::DIRECTORY)?;
        let temporary = format!(".spore-write-{unique}");
        let failed = |errno| path_error(path, errno);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let mode = Mode::from_raw_mode(0o600);
        let file =
            openat(&folder, temporary.as_str(), flags | OFlags::CLOEXEC, mode).map_err(failed)?;
        // From here on the drop of `writer` takes the temporary file away.
        let writer = Self {
            folder,
            name: name.to_owned(),
            temporary: Some(temporary),
            file: File::from(file),
            path: path.to_owned(),
        };
        if rustix::process::geteuid().is_root() {
            let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
            fchown(&writer.file, Some(uid), Some(gid)).map_err(failed)?;
        }
        fchmod(&writer.file, Mode::from_raw_mode(request.mode)).map_err(failed)?;
        Ok(writer)
    }

    /// Writes a part.
    ///
    /// # Errors
    /// As the agent is to answer them; the stream is over then.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), AgentError> {
        self.file
            .write_all(bytes)
            .map_err(|error| refused(&format!("write `{}`", self.path), &error))
    }

    /// Puts the whole file in its place.
    ///
    /// # Errors
    /// As the agent is to answer them; the file is not there then.
    pub fn finish(mut self) -> Result<(), AgentError> {
        if let Some(temporary) = &self.temporary {
            renameat(
                &self.folder,
                temporary.as_str(),
                &self.folder,
                self.name.as_str(),
            )
            .map_err(|errno| path_error(&self.path, errno))?;
        }
        self.temporary = None;
        Ok(())
    }
}

impl Drop for FileWriter {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            // A disk that refuses this has refused the write too, which was answered.
            let _refused = unlinkat(&self.folder, temporary.as_str(), AtFlags::empty());
        }
    }
}
