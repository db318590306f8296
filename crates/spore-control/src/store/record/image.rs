//! Images: the names that an account gave to contents.

use serde::{Deserialize, Serialize};
use spore_api::name::{AccountName, ImageName};
use spore_wire::id::ImageId;

use super::Record;

/// A named image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// Its content.
    pub id: ImageId,
    /// The file's size.
    pub bytes: u64,
    /// When its content was made, in milliseconds since the Unix epoch.
    pub created_at_ms: i64,
    /// Whose choice it was.
    #[serde(default)]
    pub origin: ImageOrigin,
}

/// Whose choice the content behind a name was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageOrigin {
    /// The platform's: a newer installation brings a newer one.
    #[default]
    Base,
    /// The account's own: nobody else replaces it.
    Own,
}

impl Record for ImageRecord {
    const KIND: &'static str = "image";
    const VERSION: u32 = 1;
}

/// All images begin with it.
pub const IMAGES: &str = "image/";

/// The key of an image. A name may hold one slash; an account holds none, so no two are alike.
#[must_use]
pub fn image_key(account: &AccountName, name: &ImageName) -> String {
    format!("{IMAGES}{account}/{name}")
}

/// The keys of an account's images begin with it.
#[must_use]
pub fn images_of(account: &AccountName) -> String {
    format!("{IMAGES}{account}/")
}

/// The name in an image's key.
#[must_use]
pub fn name_of(key: &str) -> Option<ImageName> {
    key.strip_prefix(IMAGES)?.split_once('/')?.1.parse().ok()
}
