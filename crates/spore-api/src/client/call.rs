//! One call: opened, sent, answered, and sent again where that is safe.
//!
//! Used by every verb of the client. Each call has a connection of its own, so that what was sent
//! is always known:
//!
//! ```text
//!   connect ──refused──▶ nothing was sent: again, whatever the call
//!      │
//!    send ──broken────▶ unknown: again only if the call may be repeated
//!      │
//!   answer ──Later────▶ refused: again only if the call may be repeated
//! ```

use std::error::Error as StdError;
use std::io;
use std::time::Duration;

use bytes::Bytes;
use data_encoding::HEXLOWER;
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST, RETRY_AFTER, USER_AGENT};
use http::{Method, Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use super::Client;
use super::error::CallError;
use crate::error::{ApiError, Retry};

/// What may go wrong inside a body.
pub(super) type BodyError = Box<dyn StdError + Send + Sync>;
/// A body that is sent.
pub(super) type Body = UnsyncBoxBody<Bytes, BodyError>;

/// The most bytes of an answer that is read as a whole.
const ANSWER_BYTES_MAX: usize = 16 * 1024 * 1024;
/// How often a call is sent at most.
const TRIES_MAX: u32 = 4;
/// After so long no further try begins.
const RETRY_WINDOW: Duration = Duration::from_secs(15);
/// The longest pause that a server may ask for between two tries.
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// Whether a call may be sent twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Repeat {
    /// Twice is the same as once, by its nature or by its key.
    Safe,
    /// It acts anew each time.
    Once,
}

/// A call, before it is sent.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) method: Method,
    pub(super) path: String,
    pub(super) repeat: Repeat,
    pub(super) timeout: Duration,
    /// JSON; absent for none.
    pub(super) json: Option<Vec<u8>>,
    /// The `Idempotency-Key`; absent for none.
    pub(super) key: Option<String>,
}

/// How long an answer may take: a wake may be held for a minute by the daemon itself.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(150);

impl Call {
    pub(super) fn new(method: Method, path: impl Into<String>, repeat: Repeat) -> Self {
        let path = path.into();
        Self {
            method,
            path,
            repeat,
            timeout: ANSWER_TIMEOUT,
            json: None,
            key: None,
        }
    }

    /// A read: it may always be repeated.
    pub(super) fn get(path: impl Into<String>) -> Self {
        Self::new(Method::GET, path, Repeat::Safe)
    }

    pub(super) fn with_json<T: serde::Serialize>(mut self, value: &T) -> Self {
        let json = serde_json::to_vec(value).expect("the contract's types are all JSON");
        self.json = Some(json);
        self
    }

    /// A create gets a key of its own: with it a second try makes nothing new.
    pub(super) fn with_new_key(mut self) -> Result<Self, CallError> {
        let mut bytes = [0_u8; 16];
        getrandom::fill(&mut bytes).map_err(|source| CallError::Random { source })?;
        self.key = Some(HEXLOWER.encode(&bytes));
        self.repeat = Repeat::Safe;
        Ok(self)
    }

    pub(super) fn named(&self) -> String {
        format!("{} {}", self.method, self.path)
    }
}

impl Client {
    /// Sends a call and reads its answer as `T`.
    pub(super) async fn ask<T: DeserializeOwned>(&self, call: Call) -> Result<T, CallError> {
        let response = self.run(&call).await?;
        let bytes = self.whole(&call.named(), response).await?;
        decode(&call.named(), &bytes)
    }

    /// Sends a call whose answer says nothing but that it was done.
    pub(super) async fn tell(&self, call: Call) -> Result<(), CallError> {
        let response = self.run(&call).await?;
        self.whole(&call.named(), response).await.map(drop)
    }

    /// Sends a call until it is answered with success, or may not be sent again.
    pub(super) async fn run(&self, call: &Call) -> Result<Response<Incoming>, CallError> {
        let began = Instant::now();
        let mut tries = 1;
        loop {
            let body = call
                .json
                .clone()
                .map_or_else(empty, |json| full(json.into()));
            let mut request = self.request(&call.method, &call.path);
            if call.json.is_some() {
                request = request.header(CONTENT_TYPE, "application/json");
            }
            if let Some(key) = &call.key {
                request = request.header("idempotency-key", key);
            }
            let request = request
                .body(body)
                .map_err(|source| CallError::Request { source })?;
            let (failure, pause) = match self.send(request, &call.named(), call.timeout).await {
                Ok(response) if response.status().is_success() => return Ok(response),
                Ok(response) => {
                    let pause = retry_after(&response);
                    (self.refusal(&call.named(), response).await, pause)
                }
                Err(failure) => (failure, None),
            };
            let more = tries < TRIES_MAX && began.elapsed() < RETRY_WINDOW;
            if !more || !may_repeat(&failure, call.repeat) {
                return Err(failure);
            }
            let pause = pause.unwrap_or_else(|| Duration::from_millis(100) * 2_u32.pow(tries - 1));
            tokio::time::sleep(pause.min(PAUSE_MAX)).await;
            tries += 1;
        }
    }

    /// A request with what every one of them carries.
    pub(super) fn request(&self, method: &Method, path: &str) -> http::request::Builder {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, self.endpoint.authority())
            .header(USER_AGENT, concat!("spore/", env!("CARGO_PKG_VERSION")))
            .header(
                ACCEPT,
                "application/json, application/x-ndjson, application/octet-stream",
            );
        match &self.token {
            Some(token) => request.header(AUTHORIZATION, format!("Bearer {token}")),
            None => request,
        }
    }

    /// Opens a connection and sends one request over it; answers as soon as the head is there.
    pub(super) async fn send(
        &self,
        request: Request<Body>,
        call: &str,
        timeout: Duration,
    ) -> Result<Response<Incoming>, CallError> {
        let stream = self
            .endpoint
            .connect()
            .await
            .map_err(|source| self.no_way_in(source))?;
        let broken = |source: hyper::Error| CallError::Broken {
            endpoint: self.endpoint.clone(),
            call: call.to_owned(),
            source,
        };
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(broken)?;
        // Ends with the answer's body; a failure shows there too, so it is not looked at here.
        drop(tokio::spawn(connection.with_upgrades()));
        match tokio::time::timeout(timeout, sender.send_request(request)).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(source)) if source.is_user() => Err(CallError::Upload { source }),
            Ok(Err(source)) => Err(broken(source)),
            Err(_elapsed) => Err(CallError::Silent {
                endpoint: self.endpoint.clone(),
                call: call.to_owned(),
                seconds: timeout.as_secs(),
            }),
        }
    }

    /// What a status other than success means.
    pub(super) async fn refusal(&self, call: &str, response: Response<Incoming>) -> CallError {
        let status = response.status().as_u16();
        let bytes = match self.whole(call, response).await {
            Ok(bytes) => bytes,
            Err(error) => return error,
        };
        serde_json::from_slice::<ApiError>(&bytes).map_or_else(
            |_not_json| CallError::NotSpore {
                endpoint: self.endpoint.clone(),
                call: call.to_owned(),
                status,
                text: String::from_utf8_lossy(&bytes).chars().take(200).collect(),
            },
            CallError::Api,
        )
    }

    pub(super) async fn whole(
        &self,
        call: &str,
        response: Response<Incoming>,
    ) -> Result<Bytes, CallError> {
        match Limited::new(response.into_body(), ANSWER_BYTES_MAX)
            .collect()
            .await
        {
            Ok(body) => Ok(body.to_bytes()),
            Err(error) => Err(match error.downcast::<hyper::Error>() {
                Ok(source) => CallError::Broken {
                    endpoint: self.endpoint.clone(),
                    call: call.to_owned(),
                    source: *source,
                },
                Err(_over) => CallError::TooLarge {
                    call: call.to_owned(),
                    limit: ANSWER_BYTES_MAX,
                },
            }),
        }
    }

    fn no_way_in(&self, source: io::Error) -> CallError {
        let endpoint = self.endpoint.clone();
        if source.kind() == io::ErrorKind::PermissionDenied {
            return CallError::Denied { endpoint, source };
        }
        CallError::Unreachable { endpoint, source }
    }
}

fn may_repeat(failure: &CallError, repeat: Repeat) -> bool {
    match failure {
        // A daemon that restarts leaves its socket behind for a moment; nothing was sent.
        CallError::Unreachable { source, .. } => source.kind() == io::ErrorKind::ConnectionRefused,
        CallError::Broken { .. } => repeat == Repeat::Safe,
        CallError::Api(error) => repeat == Repeat::Safe && error.retry == Retry::Later,
        _ => false,
    }
}

fn retry_after(response: &Response<Incoming>) -> Option<Duration> {
    let seconds = response
        .headers()
        .get(RETRY_AFTER)?
        .to_str()
        .ok()?
        .parse()
        .ok()?;
    Some(Duration::from_secs(seconds))
}

pub(super) fn decode<T: DeserializeOwned>(call: &str, bytes: &[u8]) -> Result<T, CallError> {
    serde_json::from_slice(bytes).map_err(|source| CallError::Decode {
        call: call.to_owned(),
        source,
    })
}

pub(super) fn empty() -> Body {
    full(Bytes::new())
}

pub(super) fn full(bytes: Bytes) -> Body {
    Full::new(bytes)
        .map_err(|never| match never {})
        .boxed_unsync()
}

/// A value as it stands in a query: all but unreserved characters as `%XX` (RFC 3986).
pub(super) fn quoted(text: &str) -> String {
    use core::fmt::Write as _;
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            out.push(char::from(byte));
        } else {
            write!(out, "%{byte:02X}").expect("a String takes all");
        }
    }
    out
}
