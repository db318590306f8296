//! Programs run beside an app, over a WebSocket.
//!
//! `GET /api/v1/apps/{app}/exec` with the subprotocol [`SUBPROTOCOL`]. The first message is text:
//! an [`ExecStart`]. Then binary messages, whose first byte is a [`Channel`]; the last is `Exit`.
//! The shape follows Kubernetes' remote command protocol, so its tools' habits carry over.

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

/// The WebSocket subprotocol.
pub const SUBPROTOCOL: &str = "spore.exec.v1";

/// The first byte of a binary message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Channel {
    /// To the program; an empty rest closes it.
    Stdin = 0,
    /// From the program, or its pty.
    Stdout = 1,
    /// From the program.
    Stderr = 2,
    /// From the server, JSON [`ExecExit`]; the last message.
    Exit = 3,
    /// To the server, JSON [`WindowSize`].
    Resize = 4,
    /// To the server, JSON number: a signal for the program's group.
    Signal = 5,
    /// From the server, JSON [`crate::error::ApiError`]; the last message.
    Error = 6,
}

impl Channel {
    /// The channel of a first byte.
    #[must_use]
    pub const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Stdin),
            1 => Some(Self::Stdout),
            2 => Some(Self::Stderr),
            3 => Some(Self::Exit),
            4 => Some(Self::Resize),
            5 => Some(Self::Signal),
            6 => Some(Self::Error),
            _ => None,
        }
    }
}

/// What to run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExecStart {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Added to the app's environment (without its secrets).
    #[serde(default)]
    pub environment: Vec<(String, String)>,
    /// `/app` when absent.
    #[serde(default)]
    pub directory: Option<String>,
    /// The app's user when absent.
    #[serde(default)]
    pub user: Option<String>,
    /// A terminal of this size; pipes when absent.
    #[serde(default)]
    pub pty: Option<WindowSize>,
    /// Killed after so long; never when absent.
    #[serde(default)]
    pub timeout_ms: Option<u64>,
}

/// The size of a terminal, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WindowSize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "by", rename_all = "snake_case")]
pub enum ExecExit {
    /// It returned.
    Code {
        /// 0 to 255.
        code: u8,
    },
    /// A signal ended it.
    Signal {
        /// As in signal(7).
        signal: i32,
    },
    /// Its time was up.
    Timeout,
}

/// Which file: `GET` sends it as `application/octet-stream`, `PUT` takes it so; the folder must
/// exist.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub struct FileQuery {
    /// Absolute, as the app sees it.
    pub path: String,
    /// Permission bits in octal for `PUT`; 644 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
}
