//! Programs beside an app or in a sandbox, over a WebSocket as `spore_api::exec` describes it.
//!
//! ```text
//!   client                      here                        node
//!     │ upgrade ─────────────────▶ │ (guards passed, app exists)
//!     │ text: ExecStart ─────────▶ │ hold, wake, exec ────────▶ │
//!     │ binary: stdin, resize ───▶ │ ─────────────────────────▶ │
//!     │ ◀─── binary: stdout, stderr│ ◀───────────────────────── │
//!     │ ◀──── binary: exit | error │ close
//! ```
//!
//! A client that goes away ends the program. An app is held, so it is not reaped meanwhile; a
//! sandbox must be open.

use core::time::Duration;

use axum::extract::State;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::response::Response;
use bytes::Bytes;
use serde::Serialize;
use spore_api::error::ErrorCode;
use spore_api::exec::{Channel, ExecExit, ExecStart, SUBPROTOCOL, WindowSize};
use spore_api::limits::{COMMAND_PART_BYTES_MAX, COMMAND_PARTS_MAX};
use spore_wire::guest::{Exec, Exit};

use super::Shared;
use super::body::InPath;
use super::error::Fault;
use super::files::exists;
use crate::clock::next_id;
use crate::converge::AppRef;
use crate::converge::sandbox::SandboxRef;
use crate::nodes::{ExecInput, ExecOutput, ExecSession};

/// The most bytes of one message of a client.
const MESSAGE_BYTES_MAX: usize = 256 * 1024;

/// How long a client may take to say what to run.
const START_WAIT: Duration = Duration::from_secs(30);

/// How long a client that still sends is listened to once it was told the end: a connection that is
/// closed with something unread takes back what was said last.
const FAREWELL: Duration = Duration::from_secs(10);

/// Runs a program beside an app.
#[utoipa::path(get, path = "/api/v1/apps/{app}/exec", tag = "exec",
    params(("app" = String, Path)), responses((status = 101, body = ExecExit)))]
pub(super) async fn exec(
    State(api): State<Shared>,
    InPath(app): InPath,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, Fault> {
    exists(&api, &app).await?;
    upgraded(api, Beside::App(app), upgrade)
}

/// Where a program runs.
#[derive(Clone, Debug)]
pub(super) enum Beside {
    /// Beside an app.
    App(AppRef),
    /// In a sandbox.
    Sandbox(SandboxRef),
}

/// Serves a program over what the call becomes.
pub(super) fn upgraded(
    api: Shared,
    beside: Beside,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, Fault> {
    let upgrade = upgrade.map_err(|error| {
        let message = format!("this route is a WebSocket of {SUBPROTOCOL}: {error}");
        Fault::new(ErrorCode::BadRequest, message)
    })?;
    let upgrade = upgrade
        .protocols([SUBPROTOCOL])
        .max_message_size(MESSAGE_BYTES_MAX)
        .max_frame_size(MESSAGE_BYTES_MAX);
    Ok(upgrade.on_upgrade(move |socket| serve(api, beside, socket)))
}

async fn serve(api: Shared, beside: Beside, mut socket: WebSocket) {
    if let Err(fault) = run(&api, &beside, &mut socket).await {
        let request_id = next_id(&*api.converge.inner.chance);
        fault.log(&request_id);
        let error = fault.public(&request_id);
        if let Some(message) = message(Channel::Error, &error) {
            // A client that is gone needs no reason.
            drop(socket.send(message).await);
        }
    }
    drop(socket.send(Message::Close(None)).await);
    let unread = async { while let Some(Ok(_thrown_away)) = socket.recv().await {} };
    drop(tokio::time::timeout(FAREWELL, unread).await);
}

async fn run(api: &Shared, beside: &Beside, socket: &mut WebSocket) -> Result<(), Fault> {
    let first = tokio::time::timeout(START_WAIT, socket.recv()).await;
    let Ok(Some(Ok(first))) = first else {
        let message = "nothing was asked in time: the first message says what to run";
        return Err(Fault::new(ErrorCode::BadRequest, message));
    };
    let exec = start(&first)?;
    let (_hold, vm) = match beside {
        Beside::App(app) => {
            let hold = api.converge.hold(app);
            (Some(hold), api.converge.wake(app).await?)
        }
        Beside::Sandbox(sandbox) => (None, api.converge.open_sandbox(sandbox)?),
    };
    let session = api.converge.inner.nodes.exec(vm, exec).await?;
    relay(api, socket, session).await
}

async fn relay(api: &Shared, socket: &mut WebSocket, session: ExecSession) -> Result<(), Fault> {
    let ExecSession { input, mut output } = session;
    let stopped = super::stopping(api.stopped.clone());
    tokio::pin!(stopped);
    // What the program has not taken yet; no more is read from the client meanwhile.
    let mut waiting: Option<ExecInput> = None;
    loop {
        tokio::select! {
            told = output.recv() => {
                if outgoing(socket, told).await? == Then::End {
                    return Ok(());
                }
            }
            permit = input.reserve(), if waiting.is_some() => {
                match (permit, waiting.take()) {
                    (Ok(permit), Some(message)) => permit.send(message),
                    // The program takes nothing any more; its exit is on the way.
                    (Err(_), _) => tracing::debug!("input after the program's end is dropped"),
                    (Ok(_), None) => {}
                }
            }
            message = socket.recv(), if waiting.is_none() => match message {
                Some(Ok(Message::Binary(bytes))) => waiting = Some(incoming(&bytes)?),
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                Some(Ok(Message::Text(_))) => {
                    let message = "only the first message is text";
                    return Err(Fault::new(ErrorCode::BadRequest, message));
                }
                Some(Ok(Message::Close(_)) | Err(_)) | None => return Ok(()),
            },
            () = &mut stopped => {
                let message = "the daemon is stopping: run it again in a moment";
                return Err(Fault::new(ErrorCode::Stopping, message));
            }
        }
    }
}

#[derive(PartialEq, Eq)]
enum Then {
    GoOn,
    End,
}

async fn outgoing(socket: &mut WebSocket, told: Option<ExecOutput>) -> Result<Then, Fault> {
    let (sent, then) = match told {
        Some(ExecOutput::Stdout(bytes)) => (bytes_of(Channel::Stdout, &bytes), Then::GoOn),
        Some(ExecOutput::Stderr(bytes)) => (bytes_of(Channel::Stderr, &bytes), Then::GoOn),
        Some(ExecOutput::Exit(exit)) => {
            let exit = match exit {
                Exit::Code { code } => ExecExit::Code { code },
                Exit::Signal { signal } => ExecExit::Signal { signal },
                Exit::Timeout => ExecExit::Timeout,
            };
            let Some(message) = message(Channel::Exit, &exit) else {
                return Ok(Then::End);
            };
            (message, Then::End)
        }
        Some(ExecOutput::Failed(error)) => return Err(error.into()),
        None => {
            let message = "the VM ended under the program: run it again";
            return Err(Fault::new(ErrorCode::AppFailed, message));
        }
    };
    // A client that is gone ends the session: dropping it ends the program.
    Ok(match socket.send(sent).await {
        Ok(()) => then,
        Err(_gone) => Then::End,
    })
}

fn start(message: &Message) -> Result<Exec, Fault> {
    let Message::Text(text) = message else {
        let message = "the first message is the text of an ExecStart";
        return Err(Fault::new(ErrorCode::BadRequest, message));
    };
    let start: ExecStart = serde_json::from_str(text.as_str()).map_err(|error| {
        let message = format!("the first message is not an ExecStart: {error}");
        Fault::new(ErrorCode::BadRequest, message)
    })?;
    let texts = start
        .environment
        .iter()
        .flat_map(|(name, value)| [name, value]);
    let fits = |text: &String| text.len() <= COMMAND_PART_BYTES_MAX && !text.contains('\0');
    let named = start
        .argv
        .first()
        .is_some_and(|program| !program.is_empty());
    let few = start.argv.len() <= COMMAND_PARTS_MAX && start.environment.len() <= COMMAND_PARTS_MAX;
    if !named || !few || !start.argv.iter().chain(texts).all(fits) {
        let message = format!(
            "`argv` names a program and has at most {COMMAND_PARTS_MAX} parts of at most \
             {COMMAND_PART_BYTES_MAX} bytes without NUL; `environment` likewise"
        );
        return Err(Fault::new(ErrorCode::Invalid, message));
    }
    Ok(Exec {
        argv: start.argv,
        environment: start.environment,
        directory: start.directory,
        user: start.user,
        pty: start.pty.map(window),
        timeout_ms: start.timeout_ms,
    })
}

fn incoming(bytes: &Bytes) -> Result<ExecInput, Fault> {
    let wrong =
        |what: &str| Fault::new(ErrorCode::BadRequest, format!("a message is wrong: {what}"));
    let (channel, rest) = bytes.split_first().ok_or_else(|| wrong("it is empty"))?;
    match Channel::from_byte(*channel) {
        Some(Channel::Stdin) if rest.is_empty() => Ok(ExecInput::StdinEnd),
        Some(Channel::Stdin) => Ok(ExecInput::Stdin(bytes.slice(1..))),
        Some(Channel::Resize) => {
            let size: WindowSize = serde_json::from_slice(rest).map_err(|_e| wrong("no size"))?;
            Ok(ExecInput::Resize(window(size)))
        }
        Some(Channel::Signal) => match serde_json::from_slice(rest) {
            Ok(signal @ 1..=64) => Ok(ExecInput::Signal(signal)),
            _ => Err(wrong("a signal is a number from 1 to 64")),
        },
        _ => Err(wrong("its channel is not for clients")),
    }
}

const fn window(size: WindowSize) -> spore_wire::guest::WindowSize {
    spore_wire::guest::WindowSize {
        rows: size.rows,
        columns: size.columns,
    }
}

fn bytes_of(channel: Channel, bytes: &Bytes) -> Message {
    let mut message = Vec::with_capacity(bytes.len() + 1);
    message.push(channel as u8);
    message.extend_from_slice(bytes);
    Message::Binary(message.into())
}

fn message(channel: Channel, value: &impl Serialize) -> Option<Message> {
    let json = serde_json::to_vec(value).ok()?;
    Some(bytes_of(channel, &json.into()))
}
