//! What every call passes before a handler sees it.
//!
//! ```text
//!   request ─▶ name (request id) ─▶ place (Host, Origin) ─▶ caller (token) ─▶ body type ─▶ handler
//! ```
//!
//! A web page can make a browser call 127.0.0.1, even under a name of its own (DNS rebinding), and
//! send forms without being asked first. So the Host must be one of ours, a foreign Origin is
//! refused, nothing is allowed to cross origins, and a body must be of a type that no form has.

use axum::extract::{FromRequestParts, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use http::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, HOST, ORIGIN, TRANSFER_ENCODING};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Method};
use spore_api::error::ErrorCode;
use spore_api::name::AccountName;
use subtle::ConstantTimeEq as _;
use tokio::sync::watch;

use super::error::Fault;
use super::{Api, Shared};
use crate::clock::next_id;
use crate::converge::sandbox::Left;
use crate::store::record::account::{TokenRecord, token_key};
use crate::store::record::load;

/// Who calls. The composition root puts one into the extensions of a request that came over the
/// unix socket, after it has checked the peer's user (SO_PEERCRED).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Whose objects it sees.
    pub account: AccountName,
    /// How it was recognised.
    pub by: CallerBy,
}

impl Caller {
    /// That it may collect what of all accounts nobody needs.
    pub(super) fn may_collect(&self, what: &str) -> Result<(), Fault> {
        if self.account == AccountName::default_account() {
            return Ok(());
        }
        let message = format!("only the host's own account may collect the {what} of all");
        Err(Fault::new(ErrorCode::Forbidden, message))
    }
}

/// How a caller was recognised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallerBy {
    /// Over TCP, by a token.
    Token,
    /// Over the unix socket, by its user.
    Socket {
        /// The peer's.
        uid: u32,
    },
}

impl FromRequestParts<Shared> for Caller {
    type Rejection = Fault;

    async fn from_request_parts(parts: &mut Parts, _: &Shared) -> Result<Self, Fault> {
        let caller = parts.extensions.get::<Self>().cloned();
        caller.ok_or_else(unauthorized)
    }
}

/// Finishes a call that changes something even when its caller leaves: what it has committed must
/// be followed by what the commit promises. What is done only for the caller is told that it left.
pub(super) async fn finish(mut request: Request, next: Next) -> Response {
    if request.method().is_safe() {
        return next.run(request).await;
    }
    // Dropped with this call.
    let (_waits, left) = watch::channel(());
    request.extensions_mut().insert(Left::new(left));
    match tokio::spawn(next.run(request)).await {
        Ok(response) => response,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_cancelled) => {
            Fault::new(ErrorCode::Stopping, "the daemon is stopping").into_response()
        }
    }
}

/// Gives the call an id, and a failure its body.
pub(super) async fn name(State(api): State<Shared>, request: Request, next: Next) -> Response {
    let request_id = next_id(&*api.converge.inner.chance);
    let mut response = next.run(request).await;
    if let Some(fault) = response.extensions_mut().remove::<Fault>() {
        fault.log(&request_id);
        let status = response.status();
        let kept = response.headers().clone();
        response = (status, axum::Json(fault.public(&request_id))).into_response();
        for (name, value) in &kept {
            if name != CONTENT_LENGTH && name != CONTENT_TYPE {
                response.headers_mut().insert(name, value.clone());
            }
        }
        if fault.code == ErrorCode::Unauthorized {
            let scheme = HeaderValue::from_static("Bearer");
            response
                .headers_mut()
                .insert(http::header::WWW_AUTHENTICATE, scheme);
        }
    }
    api.converge
        .inner
        .metrics
        .answered(response.status().as_u16());
    let headers = response.headers_mut();
    if let Ok(value) = HeaderValue::from_str(&request_id) {
        headers.insert("x-request-id", value);
    }
    let nosniff = HeaderValue::from_static("nosniff");
    headers.insert(http::header::X_CONTENT_TYPE_OPTIONS, nosniff);
    let no_store = HeaderValue::from_static("no-store");
    headers.insert(http::header::CACHE_CONTROL, no_store);
    response
}

/// Refuses calls that a web page or a rebound name could have caused.
pub(super) async fn place(
    State(api): State<Shared>,
    request: Request,
    next: Next,
) -> Result<Response, Fault> {
    let by_socket = request.extensions().get::<Caller>().is_some();
    let headers = request.headers();
    let hosts: Vec<_> = headers.get_all(HOST).iter().collect();
    let known = match hosts.as_slice() {
        [host] => host.to_str().is_ok_and(|host| api.is_own_host(host)),
        _ => false,
    };
    if !by_socket && !known {
        let shown: Vec<_> = hosts
            .iter()
            .map(|h| String::from_utf8_lossy(h.as_bytes()))
            .collect();
        let port = api.converge.inner.config.api_port;
        let message = format!(
            "the Host {shown:?} is not this API: call it as 127.0.0.1:{port} or localhost:{port}"
        );
        return Err(Fault::new(ErrorCode::Forbidden, message));
    }
    let own = |origin: &HeaderValue| {
        let origin = origin.to_str().ok();
        origin
            .and_then(|o| o.strip_prefix("http://"))
            .is_some_and(|host| api.is_own_host(host))
    };
    if !headers.get_all(ORIGIN).iter().all(own) {
        let message = "the call comes from a web page of another origin: that is not allowed";
        return Err(Fault::new(ErrorCode::Forbidden, message));
    }
    Ok(next.run(request).await)
}

impl Api {
    fn is_own_host(&self, host: &str) -> bool {
        let config = &self.shared_config();
        let port = config.api_port.to_string();
        let Some((name, given)) = host.rsplit_once(':') else {
            return false;
        };
        let name = name.to_ascii_lowercase();
        let own = ["127.0.0.1", "localhost", "[::1]"].contains(&name.as_str())
            || config
                .api_hosts
                .iter()
                .any(|host| host.eq_ignore_ascii_case(&name));
        own && given == port
    }
}

/// Finds out who calls.
pub(super) async fn caller(
    State(api): State<Shared>,
    mut request: Request,
    next: Next,
) -> Result<Response, Fault> {
    let open = request.method() == Method::GET && request.uri().path() == "/healthz";
    if request.extensions().get::<Caller>().is_none() && !open {
        let token = bearer(request.headers()).ok_or_else(unauthorized)?;
        let account = api.account_of(token).await?.ok_or_else(unauthorized)?;
        let by = CallerBy::Token;
        request.extensions_mut().insert(Caller { account, by });
    }
    Ok(next.run(request).await)
}

impl Api {
    async fn account_of(&self, token: &str) -> Result<Option<AccountName>, Fault> {
        let inner = &self.converge.inner;
        // Hashes are of one length, so the comparison tells nothing of the token's.
        let given = blake3::hash(token.as_bytes());
        let ours = blake3::hash(inner.config.token.as_bytes());
        let is_ours: bool = given.as_bytes().ct_eq(ours.as_bytes()).into();
        if is_ours && !inner.config.token.is_empty() {
            return Ok(Some(AccountName::default_account()));
        }
        let stored = load::<TokenRecord>(&*inner.store, &token_key(token)).await?;
        Ok(stored.map(|stored| stored.record.account))
    }
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}

fn unauthorized() -> Fault {
    let message = "the call needs `Authorization: Bearer TOKEN`; the token is in /etc/spore/token \
                   and ~/.config/spore/token";
    Fault::new(ErrorCode::Unauthorized, message)
}

/// Lets only JSON bodies in.
pub(super) async fn json_only(request: Request, next: Next) -> Result<Response, Fault> {
    body_type(&request, "application/json")?;
    Ok(next.run(request).await)
}

/// Lets only zstd streams in.
pub(super) async fn zstd_only(request: Request, next: Next) -> Result<Response, Fault> {
    body_type(&request, "application/zstd")?;
    Ok(next.run(request).await)
}

/// Lets only plain bytes in.
pub(super) async fn bytes_only(request: Request, next: Next) -> Result<Response, Fault> {
    body_type(&request, "application/octet-stream")?;
    Ok(next.run(request).await)
}

/// An empty body needs no type; one that is named must be right even then, since a form without
/// fields is empty.
fn body_type(request: &Request, wanted: &str) -> Result<(), Fault> {
    let headers = request.headers();
    let empty = !headers.contains_key(TRANSFER_ENCODING)
        && headers
            .get(CONTENT_LENGTH)
            .is_none_or(|length| length == "0");
    let mut types = headers.get_all(CONTENT_TYPE).iter();
    let given = match (types.next(), types.next()) {
        (None, _) if empty => return Ok(()),
        (None, _) => "no type",
        (Some(one), None) => one.to_str().unwrap_or("unreadable"),
        (Some(_), Some(_)) => "several types",
    };
    let essence = given.split(';').next().unwrap_or_default().trim();
    if essence.eq_ignore_ascii_case(wanted) {
        return Ok(());
    }
    let shown: String = given.chars().take(80).collect();
    let message = format!("the body is of `{shown}`; this route takes `{wanted}`");
    Err(Fault::new(ErrorCode::UnsupportedMediaType, message))
}
