//! A program beside an app, as its two directions.
//!
//! Made by [`Client::exec`]. The wire is described in [`crate::exec`]. Input and output are apart,
//! so that a slow reader never holds up what is typed.

use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt as _, StreamExt as _};
use http::header::{
    CONNECTION, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL,
    SEC_WEBSOCKET_VERSION, UPGRADE,
};
use http::{Method, StatusCode};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use thiserror::Error;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::client::generate_key;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error as WebSocketError, Message};

use super::Client;
use super::call::{Call, empty};
use super::error::CallError;
use crate::error::ApiError;
use crate::exec::{Channel, ExecExit, ExecStart, SUBPROTOCOL, WindowSize};
use crate::name::{AppName, SandboxId};

/// The most bytes of one message.
const MESSAGE_BYTES_MAX: usize = 1024 * 1024;
/// The most bytes of input that go out as one message.
const STDIN_PIECE_BYTES: usize = 64 * 1024;

type Socket = WebSocketStream<TokioIo<Upgraded>>;

/// Why a program could not be run or followed.
#[derive(Debug, Error)]
pub enum ExecError {
    /// The call for it came to nothing.
    #[error(transparent)]
    Call(#[from] CallError),
    /// The daemon ended it, and says why.
    #[error(transparent)]
    Api(ApiError),
    /// What answers speaks another protocol.
    #[error(
        "the answer to {call} is no `{SUBPROTOCOL}` session (status {status}). `spore` and its \
         daemon may be of different versions: compare `spore --version` with `spore status`"
    )]
    Handshake {
        /// Method and path.
        call: String,
        /// The HTTP status.
        status: u16,
    },
    /// The connection could not be taken over.
    #[error("the connection ended before the session began; try again")]
    Upgrade {
        /// What happened on the connection.
        source: hyper::Error,
    },
    /// The connection ended, or broke the protocol.
    #[error(
        "the connection ended before the program did. What it does now is unknown; look with \
         `spore status APP`"
    )]
    Broken {
        /// What happened on the connection.
        source: Box<WebSocketError>,
    },
    /// It closed without saying how the program ended.
    #[error(
        "the session was closed before the program ended: the app was stopped or its VM died. \
         Look with `spore logs APP`"
    )]
    Closed,
    /// A message has a shape that this version does not know.
    #[error("a message of the session cannot be read: {problem}")]
    Message {
        /// What was wrong.
        problem: String,
    },
}

/// What comes from a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExecEvent {
    /// From its standard output, or its pty.
    Stdout(Bytes),
    /// From its standard error.
    Stderr(Bytes),
    /// It ended; nothing follows.
    Exit(ExecExit),
}

/// The way to a program.
#[derive(Debug)]
pub struct ExecInput {
    sink: SplitSink<Socket, Message>,
}

/// The way from a program.
#[derive(Debug)]
pub struct ExecOutput {
    stream: SplitStream<Socket>,
}

impl Client {
    /// Runs a program beside an app; wakes the app if it sleeps.
    pub async fn exec(
        &self,
        app: &AppName,
        start: &ExecStart,
    ) -> Result<(ExecInput, ExecOutput), ExecError> {
        self.session(format!("/api/v1/apps/{app}/exec"), start)
            .await
    }

    /// Runs a program in a sandbox.
    pub async fn exec_in_sandbox(
        &self,
        sandbox: &SandboxId,
        start: &ExecStart,
    ) -> Result<(ExecInput, ExecOutput), ExecError> {
        let path = format!("/api/v1/sandboxes/{sandbox}/exec");
        self.session(path, start).await
    }

    async fn session(
        &self,
        path: String,
        start: &ExecStart,
    ) -> Result<(ExecInput, ExecOutput), ExecError> {
        let call = Call::get(path);
        let key = generate_key();
        let request = self
            .request(&Method::GET, &call.path)
            .header(CONNECTION, "Upgrade")
            .header(UPGRADE, "websocket")
            .header(SEC_WEBSOCKET_VERSION, "13")
            .header(SEC_WEBSOCKET_PROTOCOL, SUBPROTOCOL)
            .header(SEC_WEBSOCKET_KEY, &key)
            .body(empty())
            .map_err(|source| CallError::Request { source })?;
        let response = self.send(request, &call.named(), call.timeout).await?;
        let status = response.status();
        if status.is_client_error() || status.is_server_error() {
            return Err(self.refusal(&call.named(), response).await.into());
        }
        let head = |name| {
            response
                .headers()
                .get(name)
                .map(http::HeaderValue::as_bytes)
        };
        let accepted = head(SEC_WEBSOCKET_ACCEPT)
            == Some(derive_accept_key(key.as_bytes()).as_bytes())
            && head(SEC_WEBSOCKET_PROTOCOL) == Some(SUBPROTOCOL.as_bytes());
        if status != StatusCode::SWITCHING_PROTOCOLS || !accepted {
            return Err(ExecError::Handshake {
                call: call.named(),
                status: status.as_u16(),
            });
        }
        let upgraded = hyper::upgrade::on(response).await;
        let upgraded = upgraded.map_err(|source| ExecError::Upgrade { source })?;
        let config = WebSocketConfig::default()
            .max_message_size(Some(MESSAGE_BYTES_MAX))
            .max_frame_size(Some(MESSAGE_BYTES_MAX));
        let socket =
            Socket::from_raw_socket(TokioIo::new(upgraded), Role::Client, Some(config)).await;
        let (sink, stream) = socket.split();
        let mut input = ExecInput { sink };
        let start = serde_json::to_string(start).expect("the contract's types are all JSON");
        input.send(Message::text(start)).await?;
        Ok((input, ExecOutput { stream }))
    }
}

impl ExecInput {
    /// Writes to the program's standard input.
    pub async fn stdin(&mut self, bytes: &[u8]) -> Result<(), ExecError> {
        for piece in bytes.chunks(STDIN_PIECE_BYTES) {
            self.send(framed(Channel::Stdin, piece)).await?;
        }
        Ok(())
    }

    /// Closes the program's standard input.
    pub async fn close_stdin(&mut self) -> Result<(), ExecError> {
        self.send(framed(Channel::Stdin, &[])).await
    }

    /// Tells the size of the terminal.
    pub async fn resize(&mut self, size: WindowSize) -> Result<(), ExecError> {
        let json = serde_json::to_vec(&size).expect("the contract's types are all JSON");
        self.send(framed(Channel::Resize, &json)).await
    }

    /// Sends a signal to the program's group.
    pub async fn signal(&mut self, signal: i32) -> Result<(), ExecError> {
        self.send(framed(Channel::Signal, signal.to_string().as_bytes()))
            .await
    }

    async fn send(&mut self, message: Message) -> Result<(), ExecError> {
        self.sink.send(message).await.map_err(broken)
    }
}

impl ExecOutput {
    /// What comes next. It may be dropped while it waits and called again.
    pub async fn next(&mut self) -> Result<ExecEvent, ExecError> {
        loop {
            let message = match self.stream.next().await {
                Some(message) => message.map_err(broken)?,
                None => return Err(ExecError::Closed),
            };
            match message {
                Message::Binary(bytes) => {
                    if let Some(event) = event_of(&bytes)? {
                        return Ok(event);
                    }
                }
                Message::Close(_) => return Err(ExecError::Closed),
                // Pings are answered underneath; text is not part of this direction.
                _ => {}
            }
        }
    }
}

/// The event of a message; none for a channel that a later version may add.
fn event_of(bytes: &Bytes) -> Result<Option<ExecEvent>, ExecError> {
    let Some(first) = bytes.first() else {
        return Ok(None);
    };
    let rest = bytes.slice(1..);
    Ok(match Channel::from_byte(*first) {
        Some(Channel::Stdout) => Some(ExecEvent::Stdout(rest)),
        Some(Channel::Stderr) => Some(ExecEvent::Stderr(rest)),
        Some(Channel::Exit) => Some(ExecEvent::Exit(read(&rest)?)),
        Some(Channel::Error) => return Err(ExecError::Api(read(&rest)?)),
        Some(Channel::Stdin | Channel::Resize | Channel::Signal) | None => None,
    })
}

fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ExecError> {
    serde_json::from_slice(bytes).map_err(|error| ExecError::Message {
        problem: error.to_string(),
    })
}

fn framed(channel: Channel, bytes: &[u8]) -> Message {
    let mut message = Vec::with_capacity(bytes.len() + 1);
    message.push(channel as u8);
    message.extend_from_slice(bytes);
    Message::binary(message)
}

fn broken(error: WebSocketError) -> ExecError {
    match error {
        WebSocketError::ConnectionClosed | WebSocketError::AlreadyClosed => ExecError::Closed,
        error => ExecError::Broken {
            source: Box::new(error),
        },
    }
}
