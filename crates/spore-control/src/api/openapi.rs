//! The contract as an OpenAPI document, made from the handlers and the types of `spore-api`.

use spore_api::error::ApiError;
use spore_api::exec::{ExecStart, WindowSize};
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
use utoipa::{Modify, OpenApi};

use super::{
    apps, exec, files, images, logs, operations, releases, sandboxes, secrets, snapshots, sources,
    status,
};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Spore",
        description = "Every app in its own microVM, asleep until called. Every failure is an \
                       ApiError; lists are pages; longer work is an operation.",
    ),
    paths(
        status::status, status::healthz, status::version, status::metrics,
        apps::list, apps::show, apps::remove, apps::stop, apps::wake, apps::restart,
        apps::enable, apps::disable,
        releases::create, releases::list, releases::rollback, sources::import,
        secrets::list, secrets::set, secrets::remove,
        logs::read, exec::exec, files::read, files::write,
        images::list, images::build, images::remove, images::collect,
        snapshots::list, snapshots::show, snapshots::remove, snapshots::compact,
        snapshots::collect, snapshots::checkpoint_app, snapshots::checkpoint_sandbox,
        sandboxes::fork, sandboxes::list, sandboxes::show, sandboxes::remove,
        sandboxes::rollback, sandboxes::exec,
        operations::show,
    ),
    components(schemas(ApiError, ExecStart, WindowSize)),
    security(("token" = [])),
    modifiers(&Token),
)]
struct Document;

struct Token;

impl Modify for Token {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let components = document.components.get_or_insert_default();
        let bearer = SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer));
        components.add_security_scheme("token", bearer);
    }
}

/// The document, as committed in `openapi/spore.json`.
///
/// # Panics
/// Never: the document has only string keys.
#[must_use]
pub fn openapi() -> String {
    let document = Document::openapi();
    let mut text = document
        .to_pretty_json()
        .expect("the document has only string keys and cannot fail to encode");
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::openapi;

    /// Set it to write the document instead of comparing it.
    const WRITE: &str = "SPORE_WRITE_OPENAPI";

    #[test]
    fn the_committed_document_is_the_contract() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../openapi/spore.json");
        if std::env::var_os(WRITE).is_some() {
            std::fs::write(path, openapi()).unwrap();
        }
        let committed = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            committed == openapi(),
            "openapi/spore.json has drifted: run this test with {WRITE}=1 and commit it"
        );
    }

    #[test]
    fn every_reference_in_the_document_leads_somewhere() {
        let document: serde_json::Value = serde_json::from_str(&openapi()).unwrap();
        let text = document.to_string();
        for reference in text.split("\"$ref\":\"#").skip(1) {
            let pointer = reference.split('"').next().unwrap();
            assert!(document.pointer(pointer).is_some(), "{pointer}");
        }
    }
}
