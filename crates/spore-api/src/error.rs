//! The one shape of every failure, and the list of codes.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What every failed call answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// For programs; stable.
    pub code: ErrorCode,
    /// For people: the field, the value, what would be right, what to do next.
    pub message: String,
    /// Whose fault it is.
    pub blame: Blame,
    /// Whether the same call may succeed later.
    pub retry: Retry,
    /// Finds the call in the logs.
    pub request_id: String,
}

/// Whose fault a failure is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Blame {
    /// The call is wrong; another call is needed.
    Caller,
    /// The app is wrong: its code, its manifest, its resources.
    App,
    /// Spore or its host.
    Platform,
}

/// Whether the same call may succeed later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Retry {
    /// No: it will fail again.
    Never,
    /// Yes, as it is, after a while.
    Later,
    /// Yes, once something else was changed.
    AfterChange,
}

macro_rules! codes {
    ($($(#[$doc:meta])* $code:ident = $status:literal, $blame:ident, $retry:ident;)*) => {
        /// Every code that a call may answer.
        #[derive(
            Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
            ToSchema,
        )]
        #[serde(rename_all = "snake_case")]
        #[non_exhaustive]
        pub enum ErrorCode { $($(#[$doc])* $code,)* }

        impl ErrorCode {
            /// All of them, in the order of their definition.
            pub const ALL: &'static [Self] = &[$(Self::$code,)*];

            /// The HTTP status that goes with it.
            #[must_use]
            pub const fn status(self) -> u16 {
                match self { $(Self::$code => $status,)* }
            }

            /// Whose fault it is.
            #[must_use]
            pub const fn blame(self) -> Blame {
                match self { $(Self::$code => Blame::$blame,)* }
            }

            /// Whether trying again helps.
            #[must_use]
            pub const fn retry(self) -> Retry {
                match self { $(Self::$code => Retry::$retry,)* }
            }
        }
    };
}

codes! {
    /// A body, query or path is malformed.
    BadRequest = 400, Caller, Never;
    /// A value is outside its limits or contradicts another.
    Invalid = 422, Caller, Never;
    /// The manifest asks for something that this version does not do.
    NotInThisVersion = 422, Caller, Never;
    /// No token, or a wrong one.
    Unauthorized = 401, Caller, AfterChange;
    /// The Host or Origin of the call is not allowed.
    Forbidden = 403, Caller, AfterChange;
    /// No such object in this account.
    NotFound = 404, Caller, Never;
    /// The route exists, not with this method.
    MethodNotAllowed = 405, Caller, Never;
    /// The object is in a state in which this cannot be done.
    Conflict = 409, Caller, AfterChange;
    /// The same Idempotency-Key was used with another call.
    IdempotencyMismatch = 409, Caller, Never;
    /// The body is over its limit.
    TooLarge = 413, Caller, Never;
    /// The body is not of a type that this route takes.
    UnsupportedMediaType = 415, Caller, Never;
    /// A quota of the account is used up.
    QuotaExceeded = 429, Caller, AfterChange;
    /// Too many calls.
    TooManyRequests = 429, Caller, Later;
    /// The app ended, was not ready in its time, or could not be started.
    AppFailed = 502, App, AfterChange;
    /// The app is disabled.
    AppDisabled = 409, Caller, AfterChange;
    /// The app has no healthy release.
    NoRelease = 409, Caller, AfterChange;
    /// The snapshot is damaged, or of another kind of host.
    SnapshotUnusable = 500, Platform, AfterChange;
    /// The host has no room for another VM now.
    NoCapacity = 503, Platform, Later;
    /// Something did not answer in its time.
    Timeout = 504, Platform, Later;
    /// The host's disk is full.
    DiskFull = 507, Platform, AfterChange;
    /// The platform is stopping.
    Stopping = 503, Platform, Later;
    /// A fault of the platform; the logs have the request id.
    Internal = 500, Platform, Later;
}

impl ApiError {
    /// An error whose blame and retry are those of its code. `request_id` is filled in at the edge.
    #[must_use]
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            blame: code.blame(),
            retry: code.retry(),
            request_id: String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Blame, ErrorCode};

    #[test]
    fn blame_and_status_agree() {
        for code in ErrorCode::ALL {
            let by_caller = (400..500).contains(&code.status());
            assert_eq!(by_caller, code.blame() == Blame::Caller, "{code:?}");
        }
    }
}
