//! `spore cp`: one file between here and an app.

use std::ffi::OsString;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use clap::Args;
use futures_util::Stream;
use futures_util::stream::unfold;
use spore_api::client::FileBytes;
use spore_api::exec::FileQuery;
use spore_api::name::AppName;
use thiserror::Error;
use tokio::fs::{self, File, OpenOptions};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};

use super::failure::UsageError;
use super::output::{Format, bytes_text};
use super::{Context, stdin};

/// The bytes of one piece of an upload.
const PIECE_BYTES: usize = 64 * 1024;

/// Copy a file into an app or out of it
#[derive(Debug, Args)]
#[command(after_help = "\
spore cp notes:/app/notes.db .     out
spore cp notes.db notes:/tmp/      in
spore cp notes:/etc/hosts -        to standard output

A folder goes through tar: spore exec notes tar c /app | tar x")]
pub(super) struct Cp {
    /// APP:/path, a file here, or - for standard input
    from: String,
    /// APP:/path, a file or folder here, or - for standard output
    to: String,
}

/// One side of a copy.
#[derive(Debug, PartialEq, Eq)]
enum Side {
    App { app: AppName, path: String },
    Here(PathBuf),
    Standard,
}

/// Why a copy did not come about.
#[derive(Debug, Error)]
enum CopyError {
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("cannot write {path}")]
    Write { path: PathBuf, source: io::Error },
    #[error(
        "{path} is not a file. A folder goes through tar: `tar c FOLDER | spore exec APP tar x`"
    )]
    NotFile { path: PathBuf },
    #[error("{path} has no file name to give to the copy; add one")]
    NoName { path: String },
}

impl Cp {
    pub(super) async fn run(self, context: &Context) -> Result<u8> {
        let what = format!("cannot copy {} to {}", self.from, self.to);
        match (side(&self.from)?, side(&self.to)?) {
            (Side::App { app, path }, to) if !matches!(to, Side::App { .. }) => {
                fetch(context, &app, path, to).await.context(what)
            }
            (from, Side::App { app, path }) if !matches!(from, Side::App { .. }) => {
                send(context, from, &app, path).await.context(what)
            }
            _ => Err(UsageError::CopySides.into()),
        }
    }
}

fn side(text: &str) -> Result<Side, UsageError> {
    if text == "-" {
        return Ok(Side::Standard);
    }
    let wrong = || UsageError::CopySide {
        text: text.to_owned(),
    };
    match text.split_once(':') {
        // As with scp, a slash before the colon makes it a path here.
        Some((app, path)) if !app.contains('/') => {
            let app: AppName = app.parse().map_err(|_error| wrong())?;
            if !path.starts_with('/') {
                return Err(wrong());
            }
            Ok(Side::App {
                app,
                path: path.to_owned(),
            })
        }
        _ if text.is_empty() => Err(wrong()),
        _ => Ok(Side::Here(PathBuf::from(text))),
    }
}

async fn fetch(context: &Context, app: &AppName, path: String, to: Side) -> Result<u8> {
    let name = path
        .rsplit('/')
        .next()
        .filter(|name| !name.is_empty())
        .map(str::to_owned);
    let query = FileQuery {
        path: path.clone(),
        mode: None,
    };
    let mut file = context.client.read_file(app, &query).await?;
    let Side::Here(mut target) = to else {
        while let Some(piece) = file.next().await? {
            context.output.bytes(&piece)?;
        }
        return Ok(0);
    };
    if fs::metadata(&target)
        .await
        .is_ok_and(|found| found.is_dir())
    {
        target.push(name.ok_or(CopyError::NoName { path })?);
    }
    let bytes = save(&mut file, &target).await?;
    tell(context, &target.display().to_string(), bytes);
    Ok(0)
}

/// Writes beside the target first: what is cut off must not look like the whole.
async fn save(file: &mut FileBytes, target: &Path) -> Result<u64> {
    let part = beside(target);
    let write = |source| CopyError::Write {
        path: target.to_owned(),
        source,
    };
    let mut out = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(&part)
        .await
        .map_err(write)?;
    let result = async {
        let mut bytes = 0;
        while let Some(piece) = file.next().await? {
            out.write_all(&piece).await.map_err(write)?;
            bytes += piece.len() as u64;
        }
        out.flush().await.map_err(write)?;
        fs::rename(&part, target).await.map_err(write)?;
        anyhow::Ok(bytes)
    };
    let result = result.await;
    if result.is_err() {
        // The first failure is the one to tell.
        fs::remove_file(&part).await.ok();
    }
    result
}

fn beside(target: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(target.file_name().unwrap_or_default());
    name.push(format!(".spore-{}", std::process::id()));
    target.with_file_name(name)
}

async fn send(context: &Context, from: Side, app: &AppName, mut path: String) -> Result<u8> {
    let Side::Here(source) = from else {
        if path.ends_with('/') {
            return Err(CopyError::NoName { path }.into());
        }
        let query = FileQuery {
            path: path.clone(),
            mode: None,
        };
        context
            .client
            .write_file(app, &query, standard_input()?)
            .await?;
        return Ok(0);
    };
    let read = |error| CopyError::Read {
        path: source.clone(),
        source: error,
    };
    let found = fs::metadata(&source).await.map_err(read)?;
    if !found.is_file() {
        return Err(CopyError::NotFile { path: source }.into());
    }
    if path.ends_with('/') {
        let name = source.file_name().and_then(|name| name.to_str());
        path.push_str(name.ok_or_else(|| CopyError::NoName { path: path.clone() })?);
    }
    let is_program = found.permissions().mode() & 0o111 != 0;
    let mode = if is_program { "755" } else { "644" };
    let query = FileQuery {
        path: path.clone(),
        mode: Some(mode.to_owned()),
    };
    let file = File::open(&source).await.map_err(read)?;
    context.client.write_file(app, &query, pieces(file)).await?;
    tell(context, &format!("{app}:{path}"), found.len());
    Ok(0)
}

fn tell(context: &Context, target: &str, bytes: u64) {
    if context.output.format() == Format::Text {
        context
            .output
            .note(&format!("{target}   {}", bytes_text(bytes)));
    }
}

fn standard_input() -> Result<impl Stream<Item = io::Result<Bytes>> + Send + 'static> {
    let typed = stdin::read().context("cannot read standard input")?;
    Ok(unfold(typed, |mut typed| async {
        let piece = typed.recv().await?;
        Some((piece.map(Bytes::from), typed))
    }))
}

/// A file as a stream of pieces.
fn pieces<R>(reader: R) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static
where
    R: AsyncRead + Send + Unpin + 'static,
{
    unfold(Some(reader), |reader| async {
        let mut reader = reader?;
        let mut piece = Vec::with_capacity(PIECE_BYTES);
        match reader.read_buf(&mut piece).await {
            Ok(0) => None,
            Ok(_count) => Some((Ok(piece.into()), Some(reader))),
            Err(error) => Some((Err(error), None)),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::{Side, side};

    #[test]
    fn sides_of_a_copy_are_told_apart() {
        let app = |path: &str| Side::App {
            app: "notes".parse().unwrap(),
            path: path.to_owned(),
        };
        assert_eq!(side("notes:/a:b").unwrap(), app("/a:b"));
        assert_eq!(side("-").unwrap(), Side::Standard);
        assert_eq!(side("./a:b").unwrap(), Side::Here("./a:b".into()));
        assert_eq!(side("a.txt").unwrap(), Side::Here("a.txt".into()));
        for wrong in ["", "notes:", "notes:a", "No:/a", ":/a"] {
            assert!(side(wrong).is_err(), "{wrong}");
        }
    }
}
