//! The typed client: the Rust SDK, and what the CLI is made of.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use spore_api::client::Client;
//!
//! let client = Client::new("unix:/run/spore/api.sock".parse()?);
//! for app in client.apps().await? {
//!     println!("{} {}", app.name, app.url);
//! }
//! # Ok(()) }
//! ```
//!
//! It speaks HTTP/1.1 over a unix socket, where the kernel says who calls, or over TCP with a
//! token. It reads no file and no environment: whoever makes it says where and as whom. A call
//! that makes something carries an `Idempotency-Key`, so that it can be sent again after a broken
//! connection and still act once.

mod call;
mod endpoint;
mod error;
mod exec;
mod sandbox;
mod stream;
#[cfg(test)]
mod tests;

use core::fmt;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, TryStreamExt as _};
use http::Method;
use http::header::CONTENT_TYPE;
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use self::call::{Call, Repeat, decode, quoted};
pub use self::endpoint::{Endpoint, EndpointError};
pub use self::error::CallError;
pub use self::exec::{ExecError, ExecEvent, ExecInput, ExecOutput};
pub use self::stream::{FileBytes, LogLines};
use crate::app::{App, Rollback};
use crate::exec::FileQuery;
use crate::image::{BuildImage, GcReport, GcRequest, Image};
use crate::limits::PAGE_ITEMS_MAX;
use crate::log::LogQuery;
use crate::name::{AppName, ImageName, SecretName};
use crate::operation::{Operation, OperationState};
use crate::page::Page;
use crate::release::{CreateRelease, Release, Source};
use crate::secret::{PutSecret, Secret};
use crate::status::Status;

/// How long an upload may take: half a gigabyte over a slow line, and the image made of it.
const UPLOAD_TIMEOUT: Duration = Duration::from_secs(30 * 60);
/// How long the daemon may hold one question about an operation.
const OPERATION_WAIT_MS: u64 = 20_000;
/// How long an operation is asked for while nobody answers: a daemon restarts within it.
const OPERATION_PATIENCE: Duration = Duration::from_secs(60);

/// A daemon, and who calls it.
#[derive(Clone)]
pub struct Client {
    endpoint: Endpoint,
    token: Option<String>,
}

/// What an uploaded folder becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceKind {
    /// The folder of an app, under `/app`.
    App,
    /// A root file system, for an image.
    Root,
}

impl Client {
    /// A client without a token, as the unix socket needs none.
    #[must_use]
    pub fn new(endpoint: Endpoint) -> Self {
        Self {
            endpoint,
            token: None,
        }
    }

    /// The same client with a token, as TCP needs it.
    #[must_use]
    pub fn with_token(mut self, token: impl Into<String>) -> Self {
        self.token = Some(token.into());
        self
    }

    /// Where it calls.
    #[must_use]
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// The platform as it is.
    pub async fn status(&self) -> Result<Status, CallError> {
        self.ask(Call::get("/api/v1/status")).await
    }

    /// All apps.
    pub async fn apps(&self) -> Result<Vec<App>, CallError> {
        self.all("/api/v1/apps").await
    }

    /// One app.
    pub async fn app(&self, app: &AppName) -> Result<App, CallError> {
        self.ask(Call::get(app_path(app, ""))).await
    }

    /// Removes an app with its releases, secrets and logs.
    pub async fn remove_app(&self, app: &AppName) -> Result<(), CallError> {
        self.tell(Call::new(Method::DELETE, app_path(app, ""), Repeat::Safe))
            .await
    }

    /// Puts an app to sleep now; the next request wakes it.
    pub async fn stop(&self, app: &AppName) -> Result<App, CallError> {
        self.act(app, "/stop", Repeat::Safe).await
    }

    /// Wakes an app and waits until it is ready.
    pub async fn wake(&self, app: &AppName) -> Result<App, CallError> {
        self.act(app, "/wake", Repeat::Safe).await
    }

    /// Stops an app and wakes it again, so that it finds its present secrets.
    pub async fn restart(&self, app: &AppName) -> Result<App, CallError> {
        self.act(app, "/restart", Repeat::Once).await
    }

    /// Lets an app be woken again.
    pub async fn enable(&self, app: &AppName) -> Result<App, CallError> {
        self.act(app, "/enable", Repeat::Safe).await
    }

    /// Stops an app; nothing wakes it until it is enabled.
    pub async fn disable(&self, app: &AppName) -> Result<App, CallError> {
        self.act(app, "/disable", Repeat::Safe).await
    }

    /// Makes an earlier release live.
    pub async fn rollback(&self, app: &AppName, to: Rollback) -> Result<Operation, CallError> {
        let call = Call::new(Method::POST, app_path(app, "/rollback"), Repeat::Once);
        self.ask(call.with_json(&to).with_new_key()?).await
    }

    /// Releases of an app.
    pub async fn releases(&self, app: &AppName) -> Result<Vec<Release>, CallError> {
        self.all(&app_path(app, "/releases")).await
    }

    /// Makes a release; it goes live when healthy.
    pub async fn create_release(
        &self,
        app: &AppName,
        release: &CreateRelease,
    ) -> Result<Operation, CallError> {
        let call = Call::new(Method::POST, app_path(app, "/releases"), Repeat::Once);
        self.ask(call.with_json(release).with_new_key()?).await
    }

    /// Uploads a folder as a stream of `tar.zst`. It is sent once: a stream cannot be rewound.
    pub async fn upload<S, E>(&self, kind: SourceKind, bytes: S) -> Result<Source, CallError>
    where
        S: Stream<Item = Result<Bytes, E>> + Send + 'static,
        E: std::error::Error + Send + Sync + 'static,
    {
        let path = match kind {
            SourceKind::App => "/api/v1/sources",
            SourceKind::Root => "/api/v1/sources?kind=root",
        };
        let frames = bytes.map_ok(Frame::data).map_err(|error| error.into());
        let body = StreamBody::new(frames).boxed_unsync();
        let request = self
            .request(&Method::POST, path)
            .header(CONTENT_TYPE, "application/zstd");
        let request = request
            .body(body)
            .map_err(|source| CallError::Request { source })?;
        let named = format!("POST {path}");
        let response = self.send(request, &named, UPLOAD_TIMEOUT).await?;
        self.answer(&named, response).await
    }

    /// Names of an app's secrets.
    pub async fn secrets(&self, app: &AppName) -> Result<Vec<Secret>, CallError> {
        self.all(&app_path(app, "/secrets")).await
    }

    /// Sets a secret; it takes effect at the app's next start.
    pub async fn put_secret(
        &self,
        app: &AppName,
        name: &SecretName,
        secret: &PutSecret,
    ) -> Result<(), CallError> {
        let path = app_path(app, &format!("/secrets/{name}"));
        self.tell(Call::new(Method::PUT, path, Repeat::Safe).with_json(secret))
            .await
    }

    /// Forgets a secret.
    pub async fn remove_secret(&self, app: &AppName, name: &SecretName) -> Result<(), CallError> {
        let path = app_path(app, &format!("/secrets/{name}"));
        self.tell(Call::new(Method::DELETE, path, Repeat::Safe))
            .await
    }

    /// What an app printed, and prints if the query says so.
    pub async fn logs(&self, app: &AppName, query: &LogQuery) -> Result<LogLines, CallError> {
        let mut path = app_path(app, "/logs");
        path.push_str(if query.follow {
            "?follow=true"
        } else {
            "?follow=false"
        });
        if let Some(tail) = query.tail {
            path.push_str(&format!("&tail={tail}"));
        }
        let call = Call::get(path);
        let response = self.run(&call).await?;
        Ok(LogLines::new(
            self.endpoint.clone(),
            call.named(),
            response.into_body(),
        ))
    }

    /// A file inside an app.
    pub async fn read_file(&self, app: &AppName, file: &FileQuery) -> Result<FileBytes, CallError> {
        let call = Call::get(file_path(app, file));
        let response = self.run(&call).await?;
        Ok(FileBytes::new(
            self.endpoint.clone(),
            call.named(),
            response.into_body(),
        ))
    }

    /// Writes a file inside an app. It is sent once: a stream cannot be rewound.
    pub async fn write_file<S, E>(
        &self,
        app: &AppName,
        file: &FileQuery,
        bytes: S,
    ) -> Result<(), CallError>
    where
        S: Stream<Item = Result<Bytes, E>> + Send + 'static,
        E: std::error::Error + Send + Sync + 'static,
    {
        let path = file_path(app, file);
        let frames = bytes.map_ok(Frame::data).map_err(|error| error.into());
        let request = self
            .request(&Method::PUT, &path)
            .header(CONTENT_TYPE, "application/octet-stream")
            .body(StreamBody::new(frames).boxed_unsync())
            .map_err(|source| CallError::Request { source })?;
        let named = format!("PUT {path}");
        let response = self.send(request, &named, UPLOAD_TIMEOUT).await?;
        if response.status().is_success() {
            return Ok(());
        }
        Err(self.refusal(&named, response).await)
    }

    /// All images.
    pub async fn images(&self) -> Result<Vec<Image>, CallError> {
        self.all("/api/v1/images").await
    }

    /// Builds an image.
    pub async fn build_image(&self, image: &BuildImage) -> Result<Operation, CallError> {
        let call = Call::new(Method::POST, "/api/v1/images", Repeat::Once);
        self.ask(call.with_json(image).with_new_key()?).await
    }

    /// Takes an image's name away; its bytes go with the next collection.
    pub async fn remove_image(&self, image: &ImageName) -> Result<(), CallError> {
        let path = format!("/api/v1/images/{}", quoted(image.as_str()));
        self.tell(Call::new(Method::DELETE, path, Repeat::Safe))
            .await
    }

    /// Removes images that nothing uses.
    pub async fn collect_images(&self, request: GcRequest) -> Result<GcReport, CallError> {
        let call = Call::new(Method::POST, "/api/v1/images/gc", Repeat::Safe);
        self.ask(call.with_json(&request)).await
    }

    /// An operation as it is now.
    pub async fn operation(&self, id: &str) -> Result<Operation, CallError> {
        self.ask(Call::get(format!("/api/v1/operations/{}", quoted(id))))
            .await
    }

    /// Follows an operation to its end, and shows it at every change. An operation goes on in the
    /// daemon whether somebody watches or not, so a daemon that restarts is waited for.
    pub async fn wait(
        &self,
        operation: Operation,
        mut changed: impl FnMut(&Operation),
    ) -> Result<Operation, CallError> {
        let mut now = operation;
        let mut heard = Instant::now();
        changed(&now);
        while now.state == OperationState::Running {
            let (id, after) = (quoted(&now.id), now.revision);
            let path = format!("/api/v1/operations/{id}?wait_ms={OPERATION_WAIT_MS}&after={after}");
            match self.ask::<Operation>(Call::get(path)).await {
                Ok(next) => {
                    heard = Instant::now();
                    if next.revision != now.revision || next.state != now.state {
                        changed(&next);
                    }
                    now = next;
                }
                Err(CallError::Unreachable { .. } | CallError::Broken { .. })
                    if heard.elapsed() < OPERATION_PATIENCE =>
                {
                    tokio::time::sleep(Duration::from_millis(500)).await;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(now)
    }

    async fn act(&self, app: &AppName, verb: &str, repeat: Repeat) -> Result<App, CallError> {
        self.ask(Call::new(Method::POST, app_path(app, verb), repeat))
            .await
    }

    /// Every page of a list.
    async fn all<T: DeserializeOwned>(&self, path: &str) -> Result<Vec<T>, CallError> {
        let mut items = Vec::new();
        let mut cursor: Option<String> = None;
        loop {
            let mut page = format!("{path}?limit={PAGE_ITEMS_MAX}");
            if let Some(cursor) = &cursor {
                page.push_str(&format!("&cursor={}", quoted(cursor)));
            }
            let page: Page<T> = self.ask(Call::get(page)).await?;
            items.extend(page.items);
            // A page that repeats its own cursor would never end.
            if page.next.is_none() || page.next == cursor {
                return Ok(items);
            }
            cursor = page.next;
        }
    }

    async fn answer<T: DeserializeOwned>(
        &self,
        named: &str,
        response: http::Response<hyper::body::Incoming>,
    ) -> Result<T, CallError> {
        if !response.status().is_success() {
            return Err(self.refusal(named, response).await);
        }
        decode(named, &self.whole(named, response).await?)
    }
}

fn app_path(app: &AppName, rest: &str) -> String {
    format!("/api/v1/apps/{app}{rest}")
}

fn file_path(app: &AppName, file: &FileQuery) -> String {
    let mut path = app_path(app, &format!("/files?path={}", quoted(&file.path)));
    if let Some(mode) = &file.mode {
        path.push_str(&format!("&mode={}", quoted(mode)));
    }
    path
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let token = self.token.as_ref().map(|_token| "***");
        f.debug_struct("Client")
            .field("endpoint", &self.endpoint)
            .field("token", &token)
            .finish()
    }
}
