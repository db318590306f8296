//! Reading bodies, queries and paths: every refusal says which field and what would be right.

use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{FromRequest, FromRequestParts, Path, Request};
use futures_util::TryStreamExt as _;
use http::request::Parts;
use http_body_util::LengthLimitError;
use serde::de::DeserializeOwned;
use spore_api::error::ErrorCode;
use spore_api::limits::{IDEMPOTENCY_KEY_BYTES_MAX, JSON_BYTES_MAX};
use spore_api::name::AppName;
use spore_api::secret::PutSecret;
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio_util::io::StreamReader;
use zeroize::Zeroize as _;

use super::Shared;
use super::error::Fault;
use super::guard::Caller;
use crate::converge::AppRef;
use crate::converge::repeat::Repeatable;

/// A JSON body. An empty body counts as `{}`.
pub(super) struct Json<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequest<Shared> for Json<T> {
    type Rejection = Fault;

    async fn from_request(request: Request, _: &Shared) -> Result<Self, Fault> {
        let bytes = read(request.into_body()).await?;
        Ok(Self(parse(&bytes)?))
    }
}

/// A JSON body of a create, which may carry an `Idempotency-Key`.
pub(super) struct Create<T> {
    pub(super) value: T,
    pub(super) repeatable: Option<Repeatable>,
}

impl<T: DeserializeOwned> FromRequest<Shared> for Create<T> {
    type Rejection = Fault;

    async fn from_request(request: Request, _: &Shared) -> Result<Self, Fault> {
        let (parts, body) = request.into_parts();
        let bytes = read(body).await?;
        let value = parse(&bytes)?;
        let repeatable = repeatable(&parts, &bytes)?;
        Ok(Self { value, repeatable })
    }
}

/// A secret's value. Nothing of a malformed body is repeated in the answer, and the bytes that
/// were received are wiped.
pub(super) struct SecretValue(pub(super) PutSecret);

impl FromRequest<Shared> for SecretValue {
    type Rejection = Fault;

    async fn from_request(request: Request, _: &Shared) -> Result<Self, Fault> {
        let bytes = read(request.into_body()).await?;
        let parsed = serde_json::from_slice(&bytes);
        if let Ok(mut bytes) = bytes.try_into_mut() {
            bytes.as_mut().zeroize();
        }
        let wrong = |_error| {
            let message = "the body is not `{\"value\": \"…\"}` with a text and nothing else";
            Fault::new(ErrorCode::BadRequest, message)
        };
        parsed.map(Self).map_err(wrong)
    }
}

/// A query, with unknown names refused.
pub(super) struct Query<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequestParts<Shared> for Query<T> {
    type Rejection = Fault;

    async fn from_request_parts(parts: &mut Parts, _: &Shared) -> Result<Self, Fault> {
        match axum::extract::Query::try_from_uri(&parts.uri) {
            Ok(axum::extract::Query(query)) => Ok(Self(query)),
            Err(error) => Err(Fault::new(ErrorCode::BadRequest, error.body_text())),
        }
    }
}

/// The app that a path names, in the caller's account. Whether it exists is not looked at.
pub(super) struct InPath(pub(super) AppRef);

impl FromRequestParts<Shared> for InPath {
    type Rejection = Fault;

    async fn from_request_parts(parts: &mut Parts, api: &Shared) -> Result<Self, Fault> {
        let account = Caller::from_request_parts(parts, api).await?.account;
        let all = Path::<Vec<(String, String)>>::from_request_parts(parts, api).await;
        let Path(all) =
            all.map_err(|error| Fault::new(ErrorCode::BadRequest, error.body_text()))?;
        let app = all.into_iter().find(|(name, _)| name == "app");
        let text = app.map(|(_, value)| value).unwrap_or_default();
        let app: AppName = text.parse()?;
        Ok(Self(AppRef { account, app }))
    }
}

/// A body as a stream of at most `limit` bytes; reading beyond it fails.
pub(super) fn stream(body: Body, limit: u64) -> impl AsyncRead + Send + Unpin + 'static {
    let bytes = body.into_data_stream().map_err(std::io::Error::other);
    // One byte more than allowed shows that there was more.
    Limited {
        inner: StreamReader::new(bytes).take(limit + 1),
        limit,
    }
}

/// Fails instead of ending early when its limit is passed.
struct Limited<R> {
    inner: tokio::io::Take<R>,
    limit: u64,
}

impl<R: AsyncRead + Unpin> AsyncRead for Limited<R> {
    fn poll_read(
        mut self: core::pin::Pin<&mut Self>,
        context: &mut core::task::Context<'_>,
        buffer: &mut tokio::io::ReadBuf<'_>,
    ) -> core::task::Poll<std::io::Result<()>> {
        let polled = core::pin::Pin::new(&mut self.inner).poll_read(context, buffer);
        if self.inner.limit() == 0 {
            let message = format!("the body is over {} bytes: leave something out", self.limit);
            let error = std::io::Error::new(std::io::ErrorKind::FileTooLarge, message);
            return core::task::Poll::Ready(Err(error));
        }
        polled
    }
}

async fn read(body: Body) -> Result<Bytes, Fault> {
    to_bytes(body, JSON_BYTES_MAX).await.map_err(|error| {
        if error.into_inner().is::<LengthLimitError>() {
            let message = format!("the body is over {JSON_BYTES_MAX} bytes");
            return Fault::new(ErrorCode::TooLarge, message);
        }
        Fault::new(
            ErrorCode::BadRequest,
            "the body could not be read to its end",
        )
    })
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Fault> {
    let bytes = if bytes.is_empty() { b"{}" } else { bytes };
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let wrong = |path: &str, error: &serde_json::Error| {
        let code = match error.classify() {
            serde_json::error::Category::Data => ErrorCode::Invalid,
            _ => ErrorCode::BadRequest,
        };
        let mut text: String = error.to_string().chars().take(400).collect();
        if path != "." {
            text = format!("`{path}`: {text}");
        }
        Fault::new(code, text)
    };
    let value = serde_path_to_error::deserialize(&mut json)
        .map_err(|error| wrong(&error.path().to_string(), error.inner()))?;
    json.end().map_err(|error| wrong(".", &error))?;
    Ok(value)
}

fn repeatable(parts: &Parts, body: &[u8]) -> Result<Option<Repeatable>, Fault> {
    let Some(key) = parts.headers.get("idempotency-key") else {
        return Ok(None);
    };
    let key = key.to_str().unwrap_or_default();
    if !(1..=IDEMPOTENCY_KEY_BYTES_MAX).contains(&key.len()) {
        let message = format!(
            "the Idempotency-Key is not 1 to {IDEMPOTENCY_KEY_BYTES_MAX} printable characters"
        );
        return Err(Fault::new(ErrorCode::Invalid, message));
    }
    let mut hash = blake3::Hasher::new();
    for part in [parts.method.as_str(), parts.uri.path()] {
        hash.update(part.as_bytes()).update(b"\0");
    }
    hash.update(body);
    Ok(Some(Repeatable {
        key: key.to_owned(),
        fingerprint: hash.finalize().to_hex().to_string(),
    }))
}
