//! Images: root file systems, content-addressed, with names that people give.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::name::ImageName;

/// An image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Image {
    /// Its name.
    pub name: ImageName,
    /// 64 hexadecimal digits: its content.
    pub id: String,
    /// The file's size.
    pub bytes: u64,
    /// When its content was made: RFC 3339, UTC.
    pub created_at: String,
    /// Apps whose releases use it.
    pub used_by: u64,
}

/// `POST /api/v1/images`: builds an image and gives it the name, replacing what had it. Answers an
/// operation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BuildImage {
    /// The name it gets.
    pub name: ImageName,
    /// What it is made from.
    pub from: ImageFrom,
}

/// What an image is made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum ImageFrom {
    /// Debian packages and what they need.
    Packages {
        /// Names as apt knows them.
        packages: Vec<String>,
    },
    /// The packages of the base image of that name, as new as there are.
    Base,
    /// A folder, from `POST /api/v1/sources?kind=root`.
    Source {
        /// Its id.
        source: String,
    },
}

/// `POST /api/v1/images/gc`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct GcRequest {
    /// Only tell what would be removed.
    pub dry_run: bool,
}

/// What a collection removed or would remove.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GcReport {
    /// Image ids.
    pub removed: Vec<String>,
    /// Their bytes.
    pub bytes: u64,
    /// Whether nothing was removed in truth.
    pub dry_run: bool,
}
