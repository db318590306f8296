//! `spore secret`: values that an app gets and nobody can read back.
//!
//! A value comes from standard input, a prompt or a file, never from the command line, where every
//! process of the host could read it.

use std::ffi::OsString;
use std::io::{self, IsTerminal as _, Read as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::{Args, Subcommand};
use serde::Serialize;
use spore_api::limits::SECRET_BYTES_MAX;
use spore_api::name::{AppName, SecretName};
use spore_api::secret::PutSecret;
use thiserror::Error;
use zeroize::{Zeroize as _, Zeroizing};

use super::failure::UsageError;
use super::output::{Cell, Format, moment};
use super::steps::Done;
use super::{Context, OneApp};

/// The most bytes of a file with secrets.
const FILE_BYTES_MAX: u64 = 1024 * 1024;

/// Set, list and remove secrets of an app
#[derive(Debug, Args)]
pub(super) struct Secret {
    #[command(subcommand)]
    verb: SecretVerb,
}

#[derive(Debug, Subcommand)]
enum SecretVerb {
    Set(Set),
    Ls(Ls),
    Rm(Rm),
}

/// Set a secret; the value comes from standard input or a prompt
#[derive(Debug, Args)]
#[command(after_help = "\
spore secret set notes API_KEY               asks for the value
spore secret set notes API_KEY < key.txt     one line end at the end is taken off
spore secret set notes --env-file secrets    NAME=VALUE lines")]
struct Set {
    /// The app's name
    app: AppName,
    /// The secret's name
    #[arg(required_unless_present = "env_file", conflicts_with = "env_file")]
    name: Option<SecretName>,
    /// Taken so that it can be refused without being repeated
    #[arg(hide = true)]
    value: Option<OsString>,
    /// A file of NAME=VALUE lines; each becomes a secret
    #[arg(long, value_name = "FILE")]
    env_file: Option<PathBuf>,
    /// Restart the app if it is awake, so that it finds the value now
    #[arg(long)]
    restart: bool,
}

/// List names of secrets
#[derive(Debug, Args)]
struct Ls {
    #[command(flatten)]
    which: OneApp,
}

/// Remove a secret
#[derive(Debug, Args)]
struct Rm {
    /// The app's name
    app: AppName,
    /// The secret's name
    name: SecretName,
    /// Restart the app if it is awake, so that it loses the value now
    #[arg(long)]
    restart: bool,
}

/// Why a value cannot be taken. None of these repeats a value.
#[derive(Debug, Error)]
enum ValueError {
    #[error("the value is empty. Type or pipe one: `spore secret set APP NAME < FILE`")]
    Empty,
    #[error("the value has more than {SECRET_BYTES_MAX} bytes, which is the most")]
    TooLarge,
    #[error("the value is not UTF-8 text. Encode it, for instance with base64")]
    NotText,
    #[error("the value has a NUL character, which no variable can hold. Encode it, as with base64")]
    Nul,
    #[error("cannot read the value from standard input")]
    Input { source: io::Error },
    #[error("cannot read {path}: check its owner and mode")]
    File { path: PathBuf, source: io::Error },
    #[error("{path} has more than {FILE_BYTES_MAX} bytes, which is the most")]
    FileTooLarge { path: PathBuf },
    #[error("{path}:{line}: this is not a NAME=VALUE line")]
    Line { path: PathBuf, line: usize },
    #[error("{path}:{line}: the name is not allowed: {problem}")]
    Name {
        path: PathBuf,
        line: usize,
        problem: String,
    },
    #[error("{path}:{line}: the value has no closing quote")]
    Quote { path: PathBuf, line: usize },
    #[error("{path} has no NAME=VALUE line")]
    NoLines { path: PathBuf },
}

type Value = Zeroizing<String>;

#[derive(Serialize)]
struct WasSet<'a> {
    set: &'a [SecretName],
}

impl Secret {
    pub(super) async fn run(self, context: &Context) -> Result<u8> {
        match self.verb {
            SecretVerb::Set(verb) => verb.run(context).await,
            SecretVerb::Ls(verb) => verb.run(context).await,
            SecretVerb::Rm(verb) => verb.run(context).await,
        }
    }
}

impl Set {
    async fn run(self, context: &Context) -> Result<u8> {
        if self.value.is_some() {
            return Err(UsageError::ValueInSight.into());
        }
        let app = &self.app;
        let pairs = match (&self.name, &self.env_file) {
            (Some(name), _) => vec![(name.clone(), read_value(app, name)?)],
            (None, Some(path)) => read_file(path)?,
            (None, None) => Vec::new(),
        };
        let mut names = Vec::new();
        for (name, mut value) in pairs {
            let mut secret = PutSecret {
                value: std::mem::take(&mut value),
            };
            let sent = context.client.put_secret(app, &name, &secret).await;
            secret.value.zeroize();
            sent.with_context(|| format!("cannot set {name} of {app}"))?;
            names.push(name);
        }
        let when = restart(context, app, self.restart).await?;
        let output = &context.output;
        match output.format() {
            Format::Json => output.json(&WasSet { set: &names })?,
            Format::Text => {
                for name in &names {
                    output.line(&format!("{name} of {app} is set"))?;
                }
                output.note(when);
            }
        }
        Ok(0)
    }
}

impl Ls {
    async fn run(self, context: &Context) -> Result<u8> {
        let (app, output) = (self.which.app, &context.output);
        let secrets = context.client.secrets(&app).await;
        let secrets = secrets.with_context(|| format!("cannot list the secrets of {app}"))?;
        let row = |secret: &spore_api::secret::Secret| {
            let used = if secret.used { "yes" } else { "no" };
            vec![
                Cell::new(secret.name.as_str()),
                Cell::new(moment(&secret.updated_at)),
                Cell::new(used),
            ]
        };
        let none = format!("{app} has no secrets. Set one: spore secret set {app} NAME");
        output.list(&secrets, &["NAME", "SET", "USED"], row, &none)?;
        Ok(0)
    }
}

impl Rm {
    async fn run(self, context: &Context) -> Result<u8> {
        let (app, name) = (&self.app, &self.name);
        let removed = context.client.remove_secret(app, name).await;
        removed.with_context(|| format!("cannot remove {name} of {app}"))?;
        let when = restart(context, app, self.restart).await?;
        if context.output.format() == Format::Text {
            context.output.note(when);
        }
        let text = format!("{name} of {app} is removed");
        Done::new("removed", name.as_str()).print(&context.output, &text)
    }
}

/// Restarts the app if that is wanted and it has a VM; says when a change takes effect.
async fn restart(context: &Context, app: &AppName, wanted: bool) -> Result<&'static str> {
    if !wanted {
        return Ok("it takes effect at the next start; `--restart` makes that now");
    }
    let what = || format!("it is done, but {app} cannot be restarted");
    let now = context.client.app(app).await.with_context(what)?;
    if now.vm.is_none() {
        return Ok("the app sleeps; the next start finds it so");
    }
    context.client.restart(app).await.with_context(what)?;
    Ok("the app is restarted")
}

fn read_value(app: &AppName, name: &SecretName) -> Result<Value> {
    let input = |source| ValueError::Input { source };
    let value = if io::stdin().is_terminal() {
        let prompt = format!("value of {name} for {app} (not shown): ");
        Value::new(rpassword::prompt_password(prompt).map_err(input)?)
    } else {
        // One byte over the limit and one line end tell that it is too large.
        let mut bytes = Zeroizing::new(Vec::with_capacity(SECRET_BYTES_MAX + 3));
        let most = SECRET_BYTES_MAX as u64 + 3;
        io::stdin()
            .lock()
            .take(most)
            .read_to_end(&mut bytes)
            .map_err(input)?;
        let text = std::str::from_utf8(&bytes).map_err(|_error| ValueError::NotText)?;
        let text = text.strip_suffix('\n').unwrap_or(text);
        Value::new(text.strip_suffix('\r').unwrap_or(text).to_owned())
    };
    Ok(checked(value)?)
}

fn checked(value: Value) -> Result<Value, ValueError> {
    if value.is_empty() {
        return Err(ValueError::Empty);
    }
    if value.len() > SECRET_BYTES_MAX {
        return Err(ValueError::TooLarge);
    }
    if value.contains('\0') {
        return Err(ValueError::Nul);
    }
    Ok(value)
}

fn read_file(path: &Path) -> Result<Vec<(SecretName, Value)>, ValueError> {
    let file = |source| ValueError::File {
        path: path.to_owned(),
        source,
    };
    let mut bytes = Zeroizing::new(Vec::new());
    let opened = std::fs::File::open(path).map_err(file)?;
    opened
        .take(FILE_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(file)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(ValueError::FileTooLarge {
            path: path.to_owned(),
        });
    }
    let text = std::str::from_utf8(&bytes).map_err(|_error| ValueError::NotText)?;
    let mut pairs = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        pairs.push(pair(path, index + 1, line)?);
    }
    if pairs.is_empty() {
        return Err(ValueError::NoLines {
            path: path.to_owned(),
        });
    }
    Ok(pairs)
}

fn pair(path: &Path, line: usize, text: &str) -> Result<(SecretName, Value), ValueError> {
    let path = || path.to_owned();
    let text = text.strip_prefix("export ").unwrap_or(text);
    let (name, value) = text
        .split_once('=')
        .ok_or_else(|| ValueError::Line { path: path(), line })?;
    let name: SecretName = name.trim().parse().map_err(|_error| ValueError::Name {
        path: path(),
        line,
        problem: "1 to 64 of A-Z, a-z, 0-9 and _, and not PORT, HOME, PATH, TZ, LD_… or SPORE_…"
            .to_owned(),
    })?;
    let value = value.trim();
    let quote = value
        .chars()
        .next()
        .filter(|letter| matches!(letter, '"' | '\''));
    let value = match quote {
        Some(quote) => {
            let rest = &value[1..];
            rest.strip_suffix(quote)
                .ok_or_else(|| ValueError::Quote { path: path(), line })?
        }
        None => value,
    };
    Ok((name, checked(Value::new(value.to_owned()))?))
}

#[cfg(test)]
mod tests {
    use super::read_file;

    fn read(text: &str) -> Result<Vec<(String, String)>, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("env");
        std::fs::write(&path, text).unwrap();
        let pairs = read_file(&path).map_err(|error| error.to_string())?;
        Ok(pairs
            .into_iter()
            .map(|(name, value)| (name.to_string(), value.to_string()))
            .collect())
    }

    #[test]
    fn a_file_of_variables_is_read_as_a_shell_would() {
        let text = "# keys\n\nA=1\nexport B = \"x y\" \nC='#='\nD=a=b\n";
        let pairs = read(text).unwrap();
        let expected = [("A", "1"), ("B", "x y"), ("C", "#="), ("D", "a=b")];
        assert_eq!(
            pairs,
            expected.map(|(name, value)| (name.to_owned(), value.to_owned()))
        );
    }

    #[test]
    fn what_is_wrong_is_told_by_line_and_never_with_the_value() {
        for (text, words) in [
            ("A=1\nhunter2", "env:2: this is not a NAME=VALUE line"),
            ("hunter2!=1", "env:1: the name is not allowed"),
            ("A=\"hunter2", "env:1: the value has no closing quote"),
            ("A=", "the value is empty"),
            ("A=hunter2\0", "NUL"),
            ("# none", "has no NAME=VALUE line"),
        ] {
            let error = read(text).unwrap_err();
            assert!(
                error.contains(words) && !error.contains("hunter2"),
                "{text:?}: {error}"
            );
        }
    }
}
