//! The only mapping from failures to HTTP.
//!
//! A handler answers a [`Fault`]; the outermost guard gives it its request id and its body. Each
//! family of errors is matched exhaustively: a new kind of failure does not compile until somebody
//! has decided whose fault it is.

use axum::response::{IntoResponse, Response};
use http::StatusCode;
use spore_api::error::{ApiError, Blame, ErrorCode};
use spore_api::name::NameError;

use crate::converge::RemovalError;
use crate::converge::deploy::DeployError;
use crate::converge::image::{CollectError, KeepError};
use crate::converge::life::Failure;
use crate::converge::repeat::RepeatError;
use crate::converge::sandbox::SandboxError;
use crate::converge::snapshot::SnapshotError;
use crate::domain::RuleError;
use crate::domain::app::RollbackError;
use crate::nodes::NodesError;
use crate::secrets::SecretsError;
use crate::store::{CommitError, StoreError};
use spore_wire::cause::chain;

/// A call that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    pub(crate) code: ErrorCode,
    /// For the caller.
    pub(crate) message: String,
    /// For the log only: causes that tell of the platform's inside.
    pub(crate) cause: Option<String>,
}

impl Fault {
    pub(crate) fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            cause: None,
        }
    }

    pub(crate) fn no_app(app: &impl core::fmt::Display) -> Self {
        let message = format!("there is no app `{app}`: `spore ps` lists them");
        Self::new(ErrorCode::NotFound, message)
    }

    /// The public error, with the id that finds it in the logs.
    pub(crate) fn public(&self, request_id: &str) -> ApiError {
        let mut error = ApiError::new(self.code, self.message.clone());
        request_id.clone_into(&mut error.request_id);
        error
    }

    /// Logged as loud as its blame demands.
    pub(crate) fn log(&self, request_id: &str) {
        let (code, message, cause) = (self.code, &self.message, &self.cause);
        match self.code.blame() {
            Blame::Platform => tracing::error!(request_id, ?code, message, ?cause, "a call failed"),
            Blame::App => tracing::warn!(request_id, ?code, message, "a call failed"),
            Blame::Caller => tracing::debug!(request_id, ?code, message, "a call was refused"),
        }
    }
}

impl IntoResponse for Fault {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.code.status());
        let mut response = status
            .unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
            .into_response();
        response.extensions_mut().insert(self);
        response
    }
}

impl From<RuleError> for Fault {
    fn from(error: RuleError) -> Self {
        let code = match &error {
            RuleError::Invalid { .. } => ErrorCode::Invalid,
            RuleError::NotInThisVersion { .. } => ErrorCode::NotInThisVersion,
            RuleError::Quota { .. } | RuleError::ImageBytes { .. } => ErrorCode::QuotaExceeded,
        };
        Self::new(code, error.to_string())
    }
}

impl From<NameError> for Fault {
    fn from(error: NameError) -> Self {
        Self::new(ErrorCode::Invalid, error.to_string())
    }
}

impl From<StoreError> for Fault {
    fn from(error: StoreError) -> Self {
        let code = match &error {
            StoreError::DiskFull => ErrorCode::DiskFull,
            StoreError::TooLarge { .. } => ErrorCode::TooLarge,
            StoreError::Stopping => ErrorCode::Stopping,
            StoreError::InUse { .. }
            | StoreError::Open { .. }
            | StoreError::Engine { .. }
            | StoreError::Newer { .. }
            | StoreError::Record(_) => ErrorCode::Internal,
        };
        Self::platform(code, &error)
    }
}

impl From<CommitError> for Fault {
    fn from(error: CommitError) -> Self {
        match error {
            CommitError::Conflict { .. } => {
                let message = "somebody else changed this at the same time: look, then try again";
                Self::new(ErrorCode::Conflict, message)
            }
            CommitError::Store(error) => error.into(),
        }
    }
}

impl From<SecretsError> for Fault {
    fn from(error: SecretsError) -> Self {
        match error {
            SecretsError::Store(error) => error.into(),
            SecretsError::WrongKey { .. }
            | SecretsError::Damaged { .. }
            | SecretsError::DamagedSnapshotKey { .. } => {
                Self::new(ErrorCode::Internal, error.to_string())
            }
            SecretsError::Random(_) | SecretsError::Seal => {
                Self::platform(ErrorCode::Internal, &error)
            }
        }
    }
}

impl From<DeployError> for Fault {
    fn from(error: DeployError) -> Self {
        let message = error.to_string();
        match error {
            DeployError::UnderWay { .. }
            | DeployError::Contended { .. }
            | DeployError::Moved { .. }
            | DeployError::Removing(_) => Self::new(ErrorCode::Conflict, message),
            DeployError::NoApp { .. } => Self::new(ErrorCode::NotFound, message),
            DeployError::Repeat(error) => error.into(),
            DeployError::Rule(error) => error.into(),
            DeployError::Rollback(error) => {
                let code = match error {
                    RollbackError::Missing { .. } => ErrorCode::NotFound,
                    RollbackError::Serves { .. } | RollbackError::NeverHealthy { .. } => {
                        ErrorCode::Conflict
                    }
                    RollbackError::NoneBefore => ErrorCode::NoRelease,
                };
                Self::new(code, message)
            }
            DeployError::Store(error) => error.into(),
        }
    }
}

impl From<RemovalError> for Fault {
    fn from(error: RemovalError) -> Self {
        let code = match error {
            RemovalError::NoApp { .. } => ErrorCode::NotFound,
            RemovalError::Slow { ref why, .. } => why.code,
            RemovalError::Store(error) => return error.into(),
            RemovalError::Log { .. } => ErrorCode::Internal,
        };
        Self::platform(code, &error)
    }
}

impl From<NodesError> for Fault {
    fn from(error: NodesError) -> Self {
        let code = match &error {
            NodesError::NoCapacity { .. } => ErrorCode::NoCapacity,
            NodesError::Busy { .. } => ErrorCode::TooManyRequests,
            NodesError::NoVm { .. } => ErrorCode::AppFailed,
            NodesError::NotFound { .. } => ErrorCode::NotFound,
            NodesError::Invalid { .. } => ErrorCode::Invalid,
            NodesError::TooLarge { .. } => ErrorCode::TooLarge,
            NodesError::OverQuota { .. } | NodesError::SnapshotQuota { .. } => {
                ErrorCode::QuotaExceeded
            }
            NodesError::Conflict { .. } => ErrorCode::Conflict,
            NodesError::Snapshot { .. } => ErrorCode::SnapshotUnusable,
            NodesError::DiskFull { .. } => ErrorCode::DiskFull,
            NodesError::Timeout { .. } => ErrorCode::Timeout,
            NodesError::Image { .. } | NodesError::Failed { .. } => ErrorCode::Internal,
        };
        Self::new(code, error.to_string())
    }
}

impl From<SandboxError> for Fault {
    fn from(error: SandboxError) -> Self {
        let code = match &error {
            SandboxError::Missing(_) => ErrorCode::NotFound,
            SandboxError::NotOpen(_) => ErrorCode::Conflict,
        };
        Self::new(code, error.to_string())
    }
}

impl From<SnapshotError> for Fault {
    fn from(error: SnapshotError) -> Self {
        let message = error.to_string();
        let code = match error {
            SnapshotError::Missing { .. }
            | SnapshotError::Nothing { .. }
            | SnapshotError::NoApp { .. } => ErrorCode::NotFound,
            SnapshotError::Ambiguous { .. } => ErrorCode::Invalid,
            SnapshotError::TagTaken { .. }
            | SnapshotError::HoldsSecrets { .. }
            | SnapshotError::Suspended { .. }
            | SnapshotError::NeededBySandboxes { .. }
            | SnapshotError::NeededByApp { .. } => ErrorCode::Conflict,
            SnapshotError::NotYours { .. } => ErrorCode::Forbidden,
            SnapshotError::Damaged { .. } | SnapshotError::NoKey { .. } => {
                ErrorCode::SnapshotUnusable
            }
            SnapshotError::ForksAtOnce => ErrorCode::TooManyRequests,
            SnapshotError::NotAll(failure) | SnapshotError::Source(failure) => failure.code,
            SnapshotError::Left => ErrorCode::BadRequest,
            SnapshotError::Repeat(error) => return error.into(),
            SnapshotError::Sandbox(error) => return error.into(),
            SnapshotError::Rule(error) => return error.into(),
            SnapshotError::Name(error) => return error.into(),
            SnapshotError::Store(error) => return error.into(),
            SnapshotError::Nodes(error) => return error.into(),
            SnapshotError::Secrets(error) => return error.into(),
        };
        Self::new(code, message)
    }
}

impl From<RepeatError> for Fault {
    fn from(error: RepeatError) -> Self {
        let code = match error {
            RepeatError::Mismatch => ErrorCode::IdempotencyMismatch,
            RepeatError::UnderWay => ErrorCode::TooManyRequests,
            RepeatError::Store(error) => return error.into(),
        };
        Self::new(code, error.to_string())
    }
}

impl From<CollectError> for Fault {
    fn from(error: CollectError) -> Self {
        match error {
            CollectError::Store(error) => error.into(),
            CollectError::Nodes(error) => error.into(),
        }
    }
}

impl From<KeepError> for Fault {
    fn from(error: KeepError) -> Self {
        match error {
            KeepError::Rule(error) => error.into(),
            KeepError::Store(error) => error.into(),
            KeepError::Nodes(error) => error.into(),
            KeepError::NoSource => Self::new(ErrorCode::Invalid, error.to_string()),
        }
    }
}

impl From<Failure> for Fault {
    fn from(failure: Failure) -> Self {
        Self::new(failure.code, failure.message)
    }
}

impl Fault {
    fn platform(code: ErrorCode, error: &dyn core::error::Error) -> Self {
        let cause = error.source().map(chain);
        Self {
            code,
            message: error.to_string(),
            cause,
        }
    }
}
