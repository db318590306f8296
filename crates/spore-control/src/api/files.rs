//! Files of an app: read and written as bytes; a sleeping app is woken.

use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::Response;
use futures_util::TryStreamExt as _;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, StatusCode};
use spore_api::error::ErrorCode;
use spore_api::exec::FileQuery;
use spore_api::limits::SOURCE_BYTES_MAX;
use spore_wire::guest::WriteFile;
use tokio_util::io::ReaderStream;

use super::Shared;
use super::body::{InPath, Query, stream};
use super::error::Fault;
use crate::converge::AppRef;

/// The most bytes of a path.
const PATH_BYTES_MAX: usize = 4096;

/// Permission bits of a written file when nobody says.
const MODE_DEFAULT: u32 = 0o644;

/// Sends a file.
#[utoipa::path(get, path = "/api/v1/apps/{app}/files", tag = "files",
    params(("app" = String, Path), FileQuery),
    responses((status = 200, content_type = "application/octet-stream")))]
pub(super) async fn read(
    State(api): State<Shared>,
    InPath(app): InPath,
    Query(query): Query<FileQuery>,
) -> Result<Response, Fault> {
    check(&query)?;
    exists(&api, &app).await?;
    let hold = api.converge.hold(&app);
    let vm = api.converge.wake(&app).await?;
    let file = api.converge.inner.nodes.read_file(vm, query.path).await?;
    // The app is held until the last byte is sent, or the client is gone.
    let bytes = ReaderStream::new(file).inspect_ok(move |_| {
        let _held = &hold;
    });
    let mut response = Response::new(Body::from_stream(bytes));
    let kind = HeaderValue::from_static("application/octet-stream");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    Ok(response)
}

/// Writes a file, whole or not at all.
#[utoipa::path(put, path = "/api/v1/apps/{app}/files", tag = "files",
    params(("app" = String, Path), FileQuery),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses((status = 204)))]
pub(super) async fn write(
    State(api): State<Shared>,
    InPath(app): InPath,
    Query(query): Query<FileQuery>,
    request: Request,
) -> Result<StatusCode, Fault> {
    let mode = check(&query)?;
    exists(&api, &app).await?;
    let _hold = api.converge.hold(&app);
    let vm = api.converge.wake(&app).await?;
    let file = WriteFile {
        path: query.path,
        mode,
        user: None,
    };
    let body = Box::new(stream(request.into_body(), SOURCE_BYTES_MAX));
    api.converge.inner.nodes.write_file(vm, file, body).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn exists(api: &Shared, app: &AppRef) -> Result<(), Fault> {
    match api.converge.app_record(app).await? {
        Some(_) => Ok(()),
        None => Err(Fault::no_app(&app.app)),
    }
}

fn check(query: &FileQuery) -> Result<u32, Fault> {
    let path = &query.path;
    if !path.starts_with('/') || path.contains('\0') || path.len() > PATH_BYTES_MAX {
        let shown: String = path.chars().take(80).collect();
        let message = format!(
            "`path` is `{}`: an absolute path of at most {PATH_BYTES_MAX} bytes is needed, such \
             as /app/data.txt",
            shown.escape_default()
        );
        return Err(Fault::new(ErrorCode::Invalid, message));
    }
    let Some(mode) = &query.mode else {
        return Ok(MODE_DEFAULT);
    };
    match u32::from_str_radix(mode, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => {
            let shown: String = mode.chars().take(20).collect();
            let message =
                format!("`mode` is `{shown}`: 0 to 777 in octal are allowed, such as 644");
            Err(Fault::new(ErrorCode::Invalid, message))
        }
    }
}
