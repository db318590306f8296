//! Why a call came to nothing, in words that say what to do.
//!
//! Made by the client for whoever calls it. It never holds a token or a body that was sent.

use std::io;

use thiserror::Error;

use super::endpoint::Endpoint;
use crate::error::ApiError;

/// Why a call came to nothing.
#[derive(Debug, Error)]
pub enum CallError {
    /// The daemon answered, and refused.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// Nobody answers there. Nothing was sent.
    #[error("cannot reach Spore at {endpoint}. Is the daemon running? Start it with `spore up`")]
    Unreachable {
        /// Where it was looked for.
        endpoint: Endpoint,
        /// What the system says.
        source: io::Error,
    },
    /// The socket is there, but this user may not use it. Nothing was sent.
    #[error(
        "user may not use {endpoint}: it admits root and the user who started Spore. Use `sudo`, \
         or set SPORE_HOST=127.0.0.1:8889 and SPORE_TOKEN"
    )]
    Denied {
        /// The socket.
        endpoint: Endpoint,
        /// What the system says.
        source: io::Error,
    },
    /// The connection ended in the middle of a call.
    #[error(
        "the connection to {endpoint} ended before {call} was answered. Look with `spore status` \
         whether the daemon still runs, then try again"
    )]
    Broken {
        /// Whom it led to.
        endpoint: Endpoint,
        /// Method and path.
        call: String,
        /// What happened on the connection.
        source: hyper::Error,
    },
    /// No answer within the time that the call may take.
    #[error(
        "{endpoint} did not answer {call} within {seconds} s. Look at the daemon's log in \
         /var/log/spore"
    )]
    Silent {
        /// Whom was asked.
        endpoint: Endpoint,
        /// Method and path.
        call: String,
        /// How long was waited.
        seconds: u64,
    },
    /// What was to be sent could not be read.
    #[error("the upload was given up: what was to be sent could not be read")]
    Upload {
        /// Holds the reader's own error.
        source: hyper::Error,
    },
    /// The answer is not one of Spore's.
    #[error(
        "{endpoint} answered {call} with status {status} and no error of Spore's: {text:?}. Does \
         another program listen there? Set SPORE_HOST to the daemon's address"
    )]
    NotSpore {
        /// Who answered.
        endpoint: Endpoint,
        /// Method and path.
        call: String,
        /// The HTTP status.
        status: u16,
        /// The beginning of the body.
        text: String,
    },
    /// The answer has a shape that this version does not know.
    #[error(
        "the answer to {call} cannot be read. `spore` and its daemon may be of different versions: \
         compare `spore --version` with `spore status`"
    )]
    Decode {
        /// Method and path.
        call: String,
        /// What was wrong.
        source: serde_json::Error,
    },
    /// The answer is larger than any of its kind should be.
    #[error("the answer to {call} is larger than {limit} bytes, which no answer of Spore's is")]
    TooLarge {
        /// Method and path.
        call: String,
        /// The limit.
        limit: usize,
    },
    /// The request cannot be put into HTTP: the token has a character that no header may have.
    #[error("the call cannot be sent: look for stray characters in SPORE_TOKEN or the token file")]
    Request {
        /// What was wrong.
        source: http::Error,
    },
    /// The system gives no random bytes for a key.
    #[error("the system gives no random bytes: is /dev/urandom there?")]
    Random {
        /// What the system says.
        source: getrandom::Error,
    },
}

impl CallError {
    /// The daemon's own error, if it answered with one.
    #[must_use]
    pub fn api(&self) -> Option<&ApiError> {
        match self {
            Self::Api(error) => Some(error),
            _ => None,
        }
    }
}
