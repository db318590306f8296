//! `spore exec`, `spore sandbox exec` and `spore shell`: a program beside an app, or in a sandbox.
//!
//! ```text
//!   standard input ─thread─▶ ┐                       ┌─▶ standard output, standard error
//!   signals, window size ──▶ ┴─▶ writer   reader ─▶──┤
//!                                                    └─▶ exit code
//! ```
//!
//! Writer and reader are apart: a program that neither reads nor is read cannot hold both up.

use std::fmt;
use std::io::{self, IsTerminal as _};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use rustix::termios::{self, OptionalActions, Termios};
use serde::Serialize;
use spore_api::client::{ExecError, ExecEvent, ExecInput, ExecOutput};
use spore_api::exec::{ExecExit, ExecStart, WindowSize};
use spore_api::name::{AppName, SandboxId};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use super::failure::{TIMED_OUT, UsageError};
use super::output::{Format, bytes_text};
use super::{Context, OneApp, stdin};
use crate::document::parse_span;

/// What `shell` runs: the best shell that the image has.
const SHELL: &str = "if command -v bash >/dev/null 2>&1; then exec bash; else exec sh; fi";

/// What `--help` says below the options.
pub(super) const AFTER_HELP: &str = "It ends with the program's own exit code, or 128 and the \
    signal's number. With --json it prints exit, stdout and stderr when the program has ended.";

/// The most bytes of each output that `--json` holds until the program's end.
const JSON_OUTPUT_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Run a program beside an app
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct Exec {
    /// The app's name
    app: AppName,
    #[command(flatten)]
    program: Program,
}

/// What to run, and how.
#[derive(Debug, Args)]
pub(super) struct Program {
    /// Program and arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
    /// Add a variable
    #[arg(long, short, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Where to run it [default: /app]
    #[arg(long, short = 'w', value_name = "FOLDER")]
    workdir: Option<String>,
    /// Whom to run it as [default: the app's user]
    #[arg(long, short)]
    user: Option<String>,
    /// Kill it after so long, as 30s or 5m
    #[arg(long, value_name = "TIME")]
    timeout: Option<String>,
    /// No terminal for the program, even if there is one here
    #[arg(long, short = 'T')]
    no_tty: bool,
}

/// Open a shell beside an app
#[derive(Debug, Args)]
pub(super) struct Shell {
    #[command(flatten)]
    which: OneApp,
    /// Whom to be [default: the app's user]
    #[arg(long, short)]
    user: Option<String>,
}

/// What a program said, and how it ended: all that `--json` prints.
#[derive(Debug, Serialize)]
struct Told {
    exit: ExecExit,
    /// What is not UTF-8 is replaced by U+FFFD.
    stdout: String,
    stderr: String,
}

/// What a program has said until now.
#[derive(Debug, Default)]
struct Said {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

impl Said {
    fn told(&self, exit: ExecExit) -> Told {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Told {
            exit,
            stdout: text(&self.stdout),
            stderr: text(&self.stderr),
        }
    }
}

/// Where a program runs.
#[derive(Clone, Debug)]
pub(super) enum Target {
    /// Beside an app.
    App(AppName),
    /// In a sandbox.
    Sandbox(SandboxId),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::App(app) => app.fmt(f),
            Self::Sandbox(sandbox) => sandbox.fmt(f),
        }
    }
}

impl Exec {
    pub(super) async fn run(self, context: &Context) -> Result<u8> {
        self.program.run(context, &Target::App(self.app)).await
    }
}

impl Program {
    /// Runs it; answers its exit code.
    pub(super) async fn run(self, context: &Context, target: &Target) -> Result<u8> {
        let mut start = ExecStart {
            argv: self.command,
            environment: Vec::new(),
            directory: self.workdir,
            user: self.user,
            pty: None,
            timeout_ms: None,
        };
        for text in self.env {
            let Some((name, value)) = text.split_once('=').filter(|(name, _)| !name.is_empty())
            else {
                return Err(UsageError::Variable { text }.into());
            };
            start.environment.push((name.to_owned(), value.to_owned()));
        }
        if let Some(text) = self.timeout {
            let span = parse_span(&text).and_then(|span| match span {
                Duration::ZERO => Err("it is zero".to_owned()),
                span => Ok(span),
            });
            let span = span.map_err(|problem| UsageError::Time { text, problem })?;
            start.timeout_ms = Some(u64::try_from(span.as_millis()).unwrap_or(u64::MAX));
        }
        let what = format!("cannot run {} in {target}", start.argv.join(" "));
        if context.output.format() == Format::Json {
            return told(context, target, start, what).await;
        }
        let wants_terminal =
            !self.no_tty && io::stdin().is_terminal() && io::stdout().is_terminal();
        let exit = session(context, target, start, wants_terminal, what, None).await?;
        Ok(code_of(context, exit))
    }
}

impl Shell {
    pub(super) async fn run(self, context: &Context) -> Result<u8> {
        let start = ExecStart {
            argv: ["/bin/sh", "-c", SHELL].map(str::to_owned).to_vec(),
            environment: Vec::new(),
            directory: None,
            user: self.user,
            pty: None,
            timeout_ms: None,
        };
        let wants_terminal = io::stdin().is_terminal() && io::stdout().is_terminal();
        let target = Target::App(self.which.app);
        let what = format!("cannot open a shell in {target}");
        let exit = session(context, &target, start, wants_terminal, what, None).await?;
        Ok(code_of(context, exit))
    }
}

/// Runs a program to its end and says what became of it, for programs.
async fn told(context: &Context, target: &Target, start: ExecStart, what: String) -> Result<u8> {
    let mut said = Said::default();
    let exit = session(context, target, start, false, what, Some(&mut said)).await?;
    context.output.json(&said.told(exit))?;
    Ok(number_of(exit))
}

/// What this process ends with.
fn code_of(context: &Context, exit: ExecExit) -> u8 {
    if exit == ExecExit::Timeout {
        context.output.note("its time was up");
    }
    number_of(exit)
}

fn number_of(exit: ExecExit) -> u8 {
    match exit {
        ExecExit::Code { code } => code,
        ExecExit::Signal { signal } => u8::try_from(128 + signal).unwrap_or(u8::MAX),
        ExecExit::Timeout => TIMED_OUT,
    }
}

/// What the program says goes to the standard streams as it comes, or is kept in `said`.
async fn session(
    context: &Context,
    target: &Target,
    mut start: ExecStart,
    wants_terminal: bool,
    what: String,
    said: Option<&mut Said>,
) -> Result<ExecExit> {
    if wants_terminal {
        start.pty = Some(window());
        if let Some(terminal) = &context.screen.terminal {
            start
                .environment
                .insert(0, ("TERM".to_owned(), terminal.clone()));
        }
    }
    let what = || what.clone();
    let session = match target {
        Target::App(app) => context.client.exec(app, &start).await,
        Target::Sandbox(sandbox) => context.client.exec_in_sandbox(sandbox, &start).await,
    };
    let (input, output) = session.with_context(what)?;
    let signals = Signals::listen().context("cannot listen for signals")?;
    let typed = stdin::read().context("cannot read standard input")?;
    // Restored when it is dropped, on every way out of here.
    let raw = if wants_terminal {
        Some(RawTerminal::enter()?)
    } else {
        None
    };
    let exit = tokio::select! {
        exit = read(context, output, said) => exit,
        // It ends only when the connection does, and then the reader knows why.
        () = write(input, typed, signals) => Err(ExecError::Closed.into()),
    };
    drop(raw);
    exit.with_context(what)
}

async fn read(
    context: &Context,
    mut output: ExecOutput,
    mut said: Option<&mut Said>,
) -> Result<ExecExit> {
    loop {
        match (said.as_deref_mut(), output.next().await?) {
            (_, ExecEvent::Exit(exit)) => return Ok(exit),
            (None, ExecEvent::Stdout(bytes)) => context.output.bytes(&bytes)?,
            (None, ExecEvent::Stderr(bytes)) => context.output.aside_bytes(&bytes)?,
            (Some(said), ExecEvent::Stdout(bytes)) => keep(&mut said.stdout, &bytes)?,
            (Some(said), ExecEvent::Stderr(bytes)) => keep(&mut said.stderr, &bytes)?,
        }
    }
}

fn keep(kept: &mut Vec<u8>, bytes: &[u8]) -> Result<()> {
    ensure!(
        kept.len() + bytes.len() <= JSON_OUTPUT_BYTES_MAX,
        "it printed more than the {} that --json holds, and was ended: leave --json out, or have \
         it write to a file",
        bytes_text(JSON_OUTPUT_BYTES_MAX as u64)
    );
    kept.extend_from_slice(bytes);
    Ok(())
}

async fn write(
    mut input: ExecInput,
    mut typed: mpsc::Receiver<io::Result<Vec<u8>>>,
    mut signals: Signals,
) {
    let mut open = true;
    loop {
        let sent = tokio::select! {
            bytes = typed.recv(), if open => match bytes {
                Some(Ok(bytes)) => input.stdin(&bytes).await,
                // An input that cannot be read has ended for the program too.
                Some(Err(_)) | None => {
                    open = false;
                    input.close_stdin().await
                }
            },
            event = signals.next() => match event {
                SignalEvent::Resized => input.resize(window()).await,
                SignalEvent::For(number) => input.signal(number).await,
            },
        };
        if sent.is_err() {
            // The reader finds the same end, and what was said before it.
            std::future::pending::<()>().await;
        }
    }
}

/// Signals that are meant for the program. With a terminal Ctrl-C is a key and comes as a byte.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hang_up: Signal,
    window: Signal,
}

/// What the next signal means.
enum SignalEvent {
    /// The window has another size.
    Resized,
    /// The program should get this number.
    For(i32),
}

impl Signals {
    fn listen() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
            window: signal(SignalKind::window_change())?,
        })
    }

    async fn next(&mut self) -> SignalEvent {
        let kind = tokio::select! {
            _ = self.interrupt.recv() => SignalKind::interrupt(),
            _ = self.terminate.recv() => SignalKind::terminate(),
            _ = self.hang_up.recv() => SignalKind::hangup(),
            _ = self.window.recv() => return SignalEvent::Resized,
        };
        SignalEvent::For(kind.as_raw_value())
    }
}

fn window() -> WindowSize {
    let size = termios::tcgetwinsize(io::stdout()).ok();
    match size.filter(|size| size.ws_row > 0 && size.ws_col > 0) {
        Some(size) => WindowSize {
            rows: size.ws_row,
            columns: size.ws_col,
        },
        None => WindowSize {
            rows: 24,
            columns: 80,
        },
    }
}

/// The terminal without echo and lines, so that every key goes to the program.
#[derive(Debug)]
struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    fn enter() -> Result<Self> {
        let before = termios::tcgetattr(io::stdin()).context("cannot read the terminal's mode")?;
        let mut raw = before.clone();
        raw.make_raw();
        termios::tcsetattr(io::stdin(), OptionalActions::Now, &raw)
            .context("cannot set the terminal's mode")?;
        Ok(Self { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // A terminal that is gone needs no mode.
        termios::tcsetattr(io::stdin(), OptionalActions::Now, &self.before).ok();
    }
}
