//! Turns a release into a VM's start: the only place where secrets are opened.

use spore_api::error::ErrorCode;
use spore_api::limits::{COMMAND_BYTES_MAX, SECRETS_BYTES_PER_APP_MAX, SECRETS_PER_APP_MAX};
use spore_wire::cause::chain;
use spore_wire::frame::MESSAGE_BYTES_MAX;
use spore_wire::guest::Readiness;
use spore_wire::id::{TraceId, VmId};
use spore_wire::node::{Owner, Process, Purpose, Resources, Source, StartVm, StopMode, TemplateOf};

use super::given::GivenError;
use super::life::{Begin, Failure};
use super::{AppRef, Converge};
use crate::nodes::NodesError;
use crate::store::StoreError;
use crate::store::record::image::{ImageOrigin, ImageRecord, image_key};
use crate::store::record::load;
use crate::store::record::release::{ReleaseRecord, Rules, StoredWarm};

/// What a start message has beside secrets, command and environment: what Spore sets itself, a
/// health path, names of fields.
const START_REST_BYTES: usize = 16 * 1024;

/// A secret's name, its quotes and the padding of its value.
const SECRET_NAME_BYTES: usize = 80;

// Whatever the API let in, a VM can be told.
const _: () = assert!(
    2 * SECRETS_BYTES_PER_APP_MAX.div_ceil(3) * 4
        + SECRETS_PER_APP_MAX * SECRET_NAME_BYTES
        + COMMAND_BYTES_MAX
        + START_REST_BYTES
        <= MESSAGE_BYTES_MAX
);

/// Why a VM is not even asked for.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error("release {release} is not there any more: deploy again")]
    NoRelease { release: u64 },
    #[error(transparent)]
    Given(#[from] GivenError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Converge {
    /// Asks the node for a VM of this release.
    pub(super) async fn start(
        &self,
        app: &AppRef,
        vm: VmId,
        (release, begin): (u64, Begin),
        trace: Option<TraceId>,
    ) -> Result<(), Failure> {
        // A VM that is alone leaves nobody who holds what its app's secrets were.
        let unheld = self.forget_unheld(app, Some(vm)).await;
        unheld.map_err(|error| unasked(&error.into()))?;
        let start = self.start_vm(app, vm, release, None).await;
        let mut start = start.map_err(|error| unasked(&error))?;
        start.trace = trace;
        if begin == Begin::Cold {
            start.source = Source::Boot;
        }
        if let Some((id, keys)) = self.goes_on_from(app, vm, release, begin).await? {
            let goes_on = StartVm {
                source: Source::Suspended(id),
                keys,
                ..start.clone()
            };
            match self.ask(goes_on).await {
                Err(error @ NodesError::Snapshot { .. }) => {
                    let why = error.to_string();
                    self.begins_anew(app, vm, release, &why).await?;
                }
                asked => return asked.map_err(|error| refused(&error)),
            }
        }
        self.begin(start).await
    }

    /// Has the node begin a VM. One that it may have begun although it did not say so is stopped.
    pub(super) async fn begin(&self, start: StartVm) -> Result<(), Failure> {
        self.ask(start).await.map_err(|error| refused(&error))
    }

    async fn ask(&self, start: StartVm) -> Result<(), NodesError> {
        let vm = start.vm;
        let Err(error) = self.inner.nodes.start(start).await else {
            return Ok(());
        };
        if matches!(
            error,
            NodesError::Timeout { .. } | NodesError::Failed { .. }
        ) {
            // The node may have begun all the same. Should it say so later, it is stopped again.
            let stopped = self.inner.nodes.stop(vm, StopMode::Kill).await;
            tracing::debug!(%vm, ?stopped, "stopped a start that failed");
        }
        Err(error)
    }

    /// Tells the node the secrets that a VM was given which it adopted: its journal holds none, and
    /// without them it neither starts the app nor keeps what the app prints.
    pub(super) async fn remind(
        &self,
        app: &AppRef,
        vm: VmId,
        release: u64,
        secrets_version: u64,
    ) -> Result<(), Failure> {
        let start = self.start_vm(app, vm, release, Some(secrets_version)).await;
        // A VM that ended meanwhile must not be started by a word meant for it.
        let status = self.inner.nodes.status(vm).await;
        let gone = status
            .map_err(|error| refused(&error))?
            .is_none_or(|status| status.phase.is_over());
        if gone {
            return Ok(());
        }
        let start = match start {
            Ok(start) => start,
            Err(error) => {
                let why = chain(&error);
                let text = format!("what it prints is not kept since the daemon's start: {why}");
                self.note(app, vm, release, text).await;
                return Err(unasked(&error));
            }
        };
        if !start.has_secrets() {
            return Ok(());
        }
        let told = self.inner.nodes.start(start).await;
        told.map_err(|error| refused(&error))
    }

    /// The start of a new VM; or, with the version of its secrets, of one that was started before.
    async fn start_vm(
        &self,
        app: &AppRef,
        vm: VmId,
        number: u64,
        secrets_version: Option<u64>,
    ) -> Result<StartVm, StartError> {
        let release = self.release(app, number).await?;
        let release = release.ok_or(StartError::NoRelease { release: number })?;
        let given = self.given(app, &release.rules, secrets_version).await?;
        let mut process = self.process(&release);
        process.secret_environment = given.environment;
        process.secret_files = given.files;
        let template = self.template_of(app, &release).await?;
        let rules = release.rules;
        Ok(StartVm {
            vm,
            owner: Owner {
                account: app.account.to_string(),
                app: app.app.to_string(),
                release: number,
                secrets_version: given.version,
            },
            image: release.image,
            folder: release.folder,
            resources: resources_of(&rules),
            process: Some(process),
            egress: rules.egress,
            source: Source::Template(template),
            keys: Vec::new(),
            purpose: Purpose::Serve,
            trace: None,
        })
    }

    /// Every account may share what was made of the platform's image: there is nothing of anybody
    /// in it.
    async fn template_of(
        &self,
        app: &AppRef,
        release: &ReleaseRecord,
    ) -> Result<TemplateOf, StoreError> {
        if release.rules.warm == StoredWarm::Ready {
            return Ok(TemplateOf::Release);
        }
        let key = image_key(&app.account, &release.rules.image_name);
        let named = load::<ImageRecord>(&*self.inner.store, &key).await?;
        let is_base = named.is_some_and(|named| {
            named.record.origin == ImageOrigin::Base && named.record.id == release.image
        });
        Ok(if is_base {
            TemplateOf::Everybody
        } else {
            TemplateOf::Account
        })
    }

    fn process(&self, release: &ReleaseRecord) -> Process {
        let rules = &release.rules;
        let grace = self.inner.config.timing.stop_grace.as_millis();
        Process {
            command: rules.command.clone(),
            environment: rules.environment.clone(),
            secret_environment: Vec::new(),
            secret_files: Vec::new(),
            user: None,
            port: rules.port,
            ready: match &rules.health_path {
                Some(path) => Readiness::Http { path: path.clone() },
                None => Readiness::Port,
            },
            ready_timeout_ms: rules.health_timeout_ms,
            stop_grace_ms: u64::try_from(grace).unwrap_or(u64::MAX),
            has_hooks: rules.warm == StoredWarm::Ready,
        }
    }
}

/// What a VM of a release gets of its host.
pub(super) const fn resources_of(rules: &Rules) -> Resources {
    Resources {
        cpus: rules.cpus,
        memory_mib: rules.memory_mib,
        disk_mib: rules.disk_mib,
    }
}

fn unasked(error: &StartError) -> Failure {
    let code = match error {
        StartError::NoRelease { .. } => ErrorCode::NoRelease,
        StartError::Given(GivenError::NoSecret { .. }) => ErrorCode::AppFailed,
        StartError::Given(_) | StartError::Store(_) => ErrorCode::Internal,
    };
    Failure::new(code, chain(error))
}

pub(super) fn refused(error: &NodesError) -> Failure {
    let code = match error {
        NodesError::NoCapacity { .. } | NodesError::Busy { .. } => ErrorCode::NoCapacity,
        NodesError::DiskFull { .. } => ErrorCode::DiskFull,
        NodesError::Timeout { .. } => ErrorCode::Timeout,
        NodesError::NotFound { .. } | NodesError::Invalid { .. } => ErrorCode::AppFailed,
        NodesError::Conflict { .. } => ErrorCode::Conflict,
        NodesError::Snapshot { .. } => ErrorCode::SnapshotUnusable,
        NodesError::SnapshotQuota { .. } => ErrorCode::QuotaExceeded,
        NodesError::NoVm { .. }
        | NodesError::TooLarge { .. }
        | NodesError::OverQuota { .. }
        | NodesError::Image { .. }
        | NodesError::Failed { .. } => ErrorCode::Internal,
    };
    Failure::new(code, error.to_string())
}
