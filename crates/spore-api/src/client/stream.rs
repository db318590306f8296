//! Answers that come piece by piece: log lines and files.
//!
//! Made by the client's verbs. Neither holds more than one line or one piece in memory.

use bytes::{Buf as _, Bytes, BytesMut};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;

use super::call::decode;
use super::endpoint::Endpoint;
use super::error::CallError;
use crate::log::LogLine;

/// The most bytes of one line of a log stream.
const LINE_BYTES_MAX: usize = 1024 * 1024;

/// What an app prints, line by line.
#[derive(Debug)]
pub struct LogLines {
    bytes: FileBytes,
    pending: BytesMut,
}

/// A file, piece by piece.
#[derive(Debug)]
pub struct FileBytes {
    endpoint: Endpoint,
    call: String,
    body: Incoming,
}

impl LogLines {
    pub(super) fn new(endpoint: Endpoint, call: String, body: Incoming) -> Self {
        Self {
            bytes: FileBytes::new(endpoint, call, body),
            pending: BytesMut::new(),
        }
    }

    /// The next line; none at the end. It may be dropped while it waits and called again.
    pub async fn next(&mut self) -> Result<Option<LogLine>, CallError> {
        let mut searched = 0;
        loop {
            let end = self.pending[searched..]
                .iter()
                .position(|byte| *byte == b'\n');
            if let Some(end) = end.map(|end| end + searched) {
                let line = self.pending.split_to(end);
                self.pending.advance(1);
                searched = 0;
                // An empty line keeps a quiet connection open.
                if !line.is_empty() {
                    return decode(&self.bytes.call, &line).map(Some);
                }
                continue;
            }
            searched = self.pending.len();
            if searched > LINE_BYTES_MAX {
                let call = self.bytes.call.clone();
                return Err(CallError::TooLarge {
                    call,
                    limit: LINE_BYTES_MAX,
                });
            }
            match self.bytes.next().await? {
                Some(more) => self.pending.extend_from_slice(&more),
                None if self.pending.is_empty() => return Ok(None),
                None => {
                    let line = self.pending.split();
                    return decode(&self.bytes.call, &line).map(Some);
                }
            }
        }
    }
}

impl FileBytes {
    pub(super) fn new(endpoint: Endpoint, call: String, body: Incoming) -> Self {
        Self {
            endpoint,
            call,
            body,
        }
    }

    /// The next piece; none at the end. A connection that ends early is an error, not an end.
    pub async fn next(&mut self) -> Result<Option<Bytes>, CallError> {
        loop {
            let Some(frame) = self.body.frame().await else {
                return Ok(None);
            };
            let frame = frame.map_err(|source| CallError::Broken {
                endpoint: self.endpoint.clone(),
                call: self.call.clone(),
                source,
            })?;
            if let Ok(data) = frame.into_data() {
                return Ok(Some(data));
            }
        }
    }
}
