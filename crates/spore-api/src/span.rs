//! Spans of time on the wire: comparable inside, milliseconds with a fraction outside.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use utoipa::ToSchema;

/// A time in microseconds inside, in milliseconds with three decimals on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ToSchema)]
#[schema(value_type = f64)]
pub struct Ms(pub u64);

impl Serialize for Ms {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[expect(clippy::cast_precision_loss, reason = "a wake is far below 2^52 us")]
        let ms = self.0 as f64 / 1000.0;
        serializer.serialize_f64(ms)
    }
}

impl<'de> Deserialize<'de> for Ms {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let ms = f64::deserialize(deserializer)?;
        if !(0.0..=1e12).contains(&ms) {
            return Err(serde::de::Error::custom("a time outside 0 to 1e12 ms"));
        }
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "the range was checked above"
        )]
        let us = (ms * 1000.0).round() as u64;
        Ok(Self(us))
    }
}
