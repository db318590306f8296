//! What an app printed, a JSON object per line.

use axum::body::Body;
use axum::extract::State;
use axum::response::Response;
use bytes::Bytes;
use futures_util::stream;
use http::header::CONTENT_TYPE;
use spore_api::error::ErrorCode;
use spore_api::log::{LogLine, LogQuery};
use tokio::sync::{mpsc, watch};

use super::Shared;
use super::body::{InPath, Query};
use super::error::Fault;
use crate::nodes::{AfterTail, LogsWanted};

/// Lines that are sent when nobody says how many.
const TAIL_DEFAULT: u32 = 100;

/// The most lines of one answer without `follow`.
const TAIL_MAX: u32 = 100_000;

/// Streams an app's log. It works while the app sleeps.
#[utoipa::path(get, path = "/api/v1/apps/{app}/logs", tag = "logs",
    params(("app" = String, Path), LogQuery),
    responses((status = 200, body = LogLine, content_type = "application/x-ndjson")))]
pub(super) async fn read(
    State(api): State<Shared>,
    InPath(app): InPath,
    Query(query): Query<LogQuery>,
) -> Result<Response, Fault> {
    let tail = query.tail.unwrap_or(TAIL_DEFAULT);
    if tail > TAIL_MAX {
        let message = format!("`tail` is {tail}: at most {TAIL_MAX} lines are allowed");
        return Err(Fault::new(ErrorCode::Invalid, message));
    }
    if api.converge.app_record(&app).await?.is_none() {
        return Err(Fault::no_app(&app.app));
    }
    let wanted = LogsWanted {
        account: app.account.to_string(),
        app: app.app.to_string(),
        tail,
        then: if query.follow {
            AfterTail::Follow
        } else {
            AfterTail::End
        },
    };
    let lines = api.converge.inner.nodes.logs(wanted).await?;
    let mut response = Response::new(body(lines, api.stopped.clone()));
    let kind = http::HeaderValue::from_static("application/x-ndjson");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    Ok(response)
}

fn body(lines: mpsc::Receiver<LogLine>, stopped: watch::Receiver<bool>) -> Body {
    let next = |(mut lines, stopped): (mpsc::Receiver<LogLine>, watch::Receiver<bool>)| async {
        let line = tokio::select! {
            line = lines.recv() => line?,
            () = super::stopping(stopped.clone()) => return None,
        };
        let bytes = serde_json::to_vec(&line).map(|mut bytes| {
            bytes.push(b'\n');
            Bytes::from(bytes)
        });
        Some((bytes, (lines, stopped)))
    };
    Body::from_stream(stream::unfold((lines, stopped), next))
}
