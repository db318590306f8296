//! What an app prints.

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

/// One line, or a note about lines that are missing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LogLine {
    /// RFC 3339, UTC, by the guest's clock.
    pub at: String,
    /// Which VM printed it.
    pub vm: String,
    /// Which release.
    pub release: u64,
    /// Where it was printed.
    pub from: LogSource,
    /// Without the line's end; secret values are replaced by `***`.
    pub text: String,
}

/// Where a line comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum LogSource {
    /// The app's standard output.
    Stdout,
    /// Its standard error.
    Stderr,
    /// Spore itself: lines dropped, started, stopped.
    Platform,
}

/// Which lines.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub struct LogQuery {
    /// The last so many; 100 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tail: Option<u32>,
    /// Whether to go on with what comes.
    #[serde(default)]
    pub follow: bool,
}
