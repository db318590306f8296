//! Sources: folders uploaded as one stream of tar.zst.

use axum::Json as Answer;
use axum::extract::{Request, State};
use http::header::CONTENT_LENGTH;
use serde::Deserialize;
use spore_api::error::ErrorCode;
use spore_api::limits::SOURCE_BYTES_MAX;
use spore_api::release::Source;
use spore_wire::node::ImageKind;

use super::body::{Query, stream};
use super::error::Fault;
use super::{Caller, Shared};

/// What an upload is for.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct SourceQuery {
    /// `folder` (an app's folder, when absent) or `root` (a root file system).
    #[serde(default)]
    #[param(value_type = Option<String>)]
    kind: SourceKind,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
enum SourceKind {
    #[default]
    Folder,
    Root,
}

/// Makes an image of a folder. The same folder again is the same source.
#[utoipa::path(post, path = "/api/v1/sources", tag = "releases", params(SourceQuery),
    request_body(content = Vec<u8>, content_type = "application/zstd"),
    responses((status = 200, body = Source)))]
pub(super) async fn import(
    State(api): State<Shared>,
    caller: Caller,
    Query(query): Query<SourceQuery>,
    request: Request,
) -> Result<Answer<Source>, Fault> {
    let length = request
        .headers()
        .get(CONTENT_LENGTH)
        .and_then(|l| l.to_str().ok()?.parse().ok());
    if length.is_some_and(|length: u64| length > SOURCE_BYTES_MAX) {
        let message = format!("the upload is over {SOURCE_BYTES_MAX} bytes: leave something out");
        return Err(Fault::new(ErrorCode::TooLarge, message));
    }
    let kind = match query.kind {
        SourceKind::Folder => ImageKind::Folder,
        SourceKind::Root => ImageKind::Root,
    };
    let body = Box::new(stream(request.into_body(), SOURCE_BYTES_MAX));
    let info = api.converge.import(&caller.account, kind, body).await?;
    Ok(Answer(Source {
        id: info.id.to_string(),
        bytes: info.bytes,
        entries: info.entries,
    }))
}
