//! Images: built, listed, removed, collected.

use std::collections::{BTreeMap, BTreeSet};

use axum::Json as Answer;
use axum::extract::{Path, State};
use http::StatusCode;
use spore_api::error::ErrorCode;
use spore_api::image::{BuildImage, GcReport, GcRequest, Image, ImageFrom};
use spore_api::name::{AccountName, ImageName};
use spore_api::operation::Operation;
use spore_api::page::{Page, PageQuery};
use spore_wire::id::ImageId;
use spore_wire::node::ImageRecipe;

use super::body::{Create, Json, Query};
use super::error::Fault;
use super::operations::running;
use super::page::page;
use super::{Caller, Shared};
use crate::clock::rfc3339;
use crate::converge::image::ImageFromWhat;
use crate::domain::image::{package_names, source_id};
use crate::nodes::CollectMode;
use crate::store::record::decode;
use crate::store::record::image::{ImageRecord, image_key, images_of, name_of};
use crate::store::record::release::{ReleaseRecord, app_of, releases_of_account};
use crate::store::{Order, StoreError, Transaction, every};

/// Lists the account's images.
#[utoipa::path(get, path = "/api/v1/images", tag = "images", params(PageQuery),
    responses((status = 200, body = Page<Image>)))]
pub(super) async fn list(
    State(api): State<Shared>,
    caller: Caller,
    Query(query): Query<PageQuery>,
) -> Result<Answer<Page<Image>>, Fault> {
    let prefix = images_of(&caller.account);
    let (entries, next) = page(&api, &query, prefix, Order::Rising).await?;
    let users = users(&api, &caller.account).await?;
    let mut items = Vec::with_capacity(entries.len());
    for entry in &entries {
        let record: ImageRecord = decode(entry).map_err(StoreError::from)?;
        items.extend(name_of(&entry.key).map(|name| public(name, &record, &users)));
    }
    Ok(Answer(Page { items, next }))
}

/// Builds an image and gives it the name.
#[utoipa::path(post, path = "/api/v1/images", tag = "images",
    params(("Idempotency-Key" = Option<String>, Header)),
    request_body = BuildImage, responses((status = 202, body = Operation)))]
pub(super) async fn build(
    State(api): State<Shared>,
    caller: Caller,
    body: Create<BuildImage>,
) -> Result<(StatusCode, Answer<Operation>), Fault> {
    let name = body.value.name;
    if name.as_str() == "gc" {
        let message = "`name` is `gc`: that is a route of its own; take another name";
        return Err(Fault::new(ErrorCode::Invalid, message));
    }
    let from = match body.value.from {
        ImageFrom::Packages { packages } => {
            package_names(&packages)?;
            ImageFromWhat::Recipe(ImageRecipe::Packages { packages })
        }
        ImageFrom::Base => ImageFromWhat::Recipe(ImageRecipe::Base {
            name: name.to_string(),
        }),
        ImageFrom::Source { source } => ImageFromWhat::Source(source_id(&source)?),
    };
    let account = &caller.account;
    let id = api
        .converge
        .build_image(account, &name, from, body.repeatable.as_ref())
        .await?;
    running(&api, account, &id).await
}

/// Takes a name away. Releases that use the image keep it.
#[utoipa::path(delete, path = "/api/v1/images/{name}", tag = "images",
    params(("name" = String, Path)), responses((status = 204)))]
pub(super) async fn remove(
    State(api): State<Shared>,
    caller: Caller,
    Path(name): Path<String>,
) -> Result<StatusCode, Fault> {
    let name: ImageName = name.parse()?;
    let key = image_key(&caller.account, &name);
    let Some(stored) = api.converge.inner.store.get(&key).await? else {
        let message = format!("there is no image `{name}`: `spore image ls` lists them");
        return Err(Fault::new(ErrorCode::NotFound, message));
    };
    let transaction = Transaction::default()
        .when(&key, stored.version)
        .delete(&key);
    api.converge.inner.store.commit(transaction).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Removes images that nothing names.
#[utoipa::path(post, path = "/api/v1/images/gc", tag = "images",
    request_body = GcRequest, responses((status = 200, body = GcReport)))]
pub(super) async fn collect(
    State(api): State<Shared>,
    caller: Caller,
    Json(request): Json<GcRequest>,
) -> Result<Answer<GcReport>, Fault> {
    caller.may_collect("images")?;
    let mode = CollectMode::of(request.dry_run);
    let removed = api.converge.collect_images(mode).await?;
    Ok(Answer(GcReport {
        bytes: removed.iter().map(|image| image.bytes).sum(),
        removed: removed.iter().map(|image| image.id.to_string()).collect(),
        dry_run: request.dry_run,
    }))
}

type Users = BTreeMap<ImageId, BTreeSet<String>>;

/// Which apps of the account use which image in one of their releases.
async fn users(api: &Shared, account: &AccountName) -> Result<Users, Fault> {
    let mut users = Users::new();
    for entry in every(&*api.converge.inner.store, &releases_of_account(account)).await? {
        let release: ReleaseRecord = decode(&entry).map_err(StoreError::from)?;
        let app = app_of(&entry.key).unwrap_or_default().to_owned();
        users.entry(release.image).or_default().insert(app);
    }
    Ok(users)
}

fn public(name: ImageName, record: &ImageRecord, users: &Users) -> Image {
    Image {
        name,
        id: record.id.to_string(),
        bytes: record.bytes,
        created_at: rfc3339(record.created_at_ms),
        used_by: users.get(&record.id).map_or(0, |apps| apps.len() as u64),
    }
}
