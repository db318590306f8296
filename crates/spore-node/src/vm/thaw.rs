//! The thaw: what a guest renews, and is given, before its tenant runs and its network is open.
//!
//! The future of [`super::state::VmEffect::Thaw`]. Fails closed: a guest that did not answer for
//! every step is ended, and one that is not whole never comes to know a secret of its app.

use core::time::Duration;
use std::sync::Arc;

use data_encoding::HEXLOWER;
use spore_wire::generation::{GENERATION, GENERATION_FORKS};
use spore_wire::guest::{AppSecrets, HOST_ADDRESS, Thaw, ThawStep};
use spore_wire::node::VmFailureKind;
use spore_wire::secret::SecretBytes;
use thiserror::Error;
use tokio::time::Instant;

use super::actor::{Actor, Host};
use super::effect::{Outcome, failed, guest, is_named, secrets_of};
use super::guest::{AgentLink, GuestError, chain};
use super::state::VmEvent;
use crate::journal::{Record, SecretsKept};

/// How far a guest's clock may be off when its tenant begins, the way of the answer included: the
/// agent may have been kept waiting between the reading of the time and its setting.
const CLOCK_LAG_MAX: Duration = Duration::from_millis(40);

/// How often it is set for that; a host where the last is late too is overloaded, and says so in
/// its log.
const CLOCK_TRIES: u32 = 5;

/// From here on the tenant is not let run, since certificates and tokens go by the second: a host
/// where each answer takes longer tries on, for as long as an answer may take.
const CLOCK_LAG_WRONG: Duration = Duration::from_secs(1);

/// The effect of an actor whose agent answers.
pub(super) fn begin(actor: &Actor, link: AgentLink) -> impl Future<Output = Outcome> + use<> {
    let hello = actor.hello.borrow().as_ref().map(|hello| hello.generation);
    let generation = hello.unwrap_or(GENERATION);
    let (host, record) = (Arc::clone(&actor.host), actor.record.clone());
    let (told, masking) = (actor.secrets.subscribe(), actor.masking.clone());
    async move {
        let limits = host.config.limits;
        match secrets_of(&record, told, &masking, &limits).await {
            Ok(secrets) => {
                let renewal = Renewal {
                    host,
                    record,
                    link,
                    generation,
                    secrets,
                };
                renewal.run().await
            }
            Err(outcome) => outcome,
        }
    }
}

/// Why a guest is not what it must be before its tenant runs.
#[derive(Debug, Error)]
enum ThawError {
    #[error("no random bytes for the guest")]
    Random(#[source] getrandom::Error),
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error("the guest's agent did not renew {0:?}: rebuild the VM with this version's agent")]
    Withheld(ThawStep),
    #[error(
        "the guest's clock was {} ms off when it had been set {tries} times: the host is \
         overloaded, or the guest does not set it",
        lag.as_millis()
    )]
    Clock { lag: Duration, tries: u32 },
}

/// One guest that is to be renewed.
struct Renewal {
    host: Arc<Host>,
    record: Record,
    link: AgentLink,
    /// What its agent speaks.
    generation: u32,
    secrets: Arc<AppSecrets>,
}

impl Renewal {
    async fn run(&self) -> Outcome {
        let limit = self.host.config.limits.answer;
        let mut last = String::new();
        for _attempt in 0..3 {
            match self.renew().await {
                Ok(()) => return VmEvent::Thawed.into(),
                Err(ThawError::Guest(error @ GuestError::Unreachable(_))) => {
                    // The last answer may have been lost, not the work.
                    let done = self.link.status(limit).await.is_ok_and(|status| {
                        let name = status.incarnation.as_deref();
                        status.thawed && !status.frozen && is_named(name, self.record.start.vm)
                    });
                    if done {
                        return VmEvent::Thawed.into();
                    }
                    last = guest(&error);
                }
                Err(ThawError::Guest(error @ GuestError::TooLarge)) => {
                    let message = format!("the app cannot be started: {error}");
                    return failed(VmFailureKind::App, message);
                }
                Err(ThawError::Guest(error)) => return failed(VmFailureKind::Thaw, guest(&error)),
                Err(error) => return failed(VmFailureKind::Thaw, chain(&error)),
            }
        }
        failed(VmFailureKind::Thaw, last)
    }

    /// One try. What an earlier one renewed is renewed again: the tenant's processes stand still
    /// until every step was answered for.
    async fn renew(&self) -> Result<(), ThawError> {
        let limit = self.host.config.limits.answer;
        // The time is read once the way is open, as late as possible.
        drop(self.link.session(limit).await?);
        let steps = match self.generation < GENERATION_FORKS {
            true => Vec::new(),
            false => self.host.config.thaw_steps.clone(),
        };
        let mut thaw = self.fresh(steps)?;
        let mut required = self.required();
        let begun = Instant::now();
        for tries in 1_u32.. {
            let told_ns = thaw.realtime_ns;
            let Some(thawed) = self.link.thaw(thaw, limit).await? else {
                return self.renewed_by_the_first();
            };
            let is_done = |step: &ThawStep| thawed.done.iter().any(|(done, _us)| done == step);
            if let Some(withheld) = required.iter().find(|step| !is_done(step)) {
                return Err(ThawError::Withheld(*withheld));
            }
            required = vec![ThawStep::Clock];
            let lag = Duration::from_nanos(self.realtime_ns().abs_diff(thawed.realtime_ns));
            if lag <= CLOCK_LAG_MAX {
                break;
            }
            if tries >= CLOCK_TRIES && lag < CLOCK_LAG_WRONG {
                let lag_ms = lag.as_millis();
                tracing::warn!(vm = %self.record.start.vm, lag_ms, "a guest's clock is off");
                break;
            }
            // Before what it was told: it was not set, and the way of the answer is no excuse.
            let is_unset = thawed.realtime_ns < told_ns;
            if tries >= CLOCK_TRIES && (is_unset || begun.elapsed() >= limit) {
                return Err(ThawError::Clock { lag, tries });
            }
            thaw = self.fresh(vec![ThawStep::Clock])?;
        }
        let name = self.record.start.vm.to_string();
        let hooks = self.host.config.limits.hooks;
        let late = self.link.unfreeze(name, hooks, limit).await?;
        if late > 0 {
            let vm = self.record.start.vm;
            tracing::warn!(%vm, late, "processes of a fork may not know it");
        }
        Ok(())
    }

    /// What must be done, which is not what was asked for: nothing that asks for less gets by with
    /// it. Who has no secrets to be given needs no agent that takes them, which a snapshot of an
    /// earlier version may lack.
    fn required(&self) -> Vec<ThawStep> {
        let has_secrets = self.record.secrets == SecretsKept::Elsewhere;
        let all = ThawStep::ALL.into_iter();
        all.filter(|step| *step != ThawStep::Secrets || has_secrets)
            .collect()
    }

    /// Whether an agent that names no steps was enough: one of generation 1, of a VM that was
    /// booted for an app without secrets, which it takes from no thaw.
    fn renewed_by_the_first(&self) -> Result<(), ThawError> {
        if self.generation >= GENERATION_FORKS || !self.record.start.source.is_boot() {
            return Err(GuestError::Protocol("no steps in the answer to a thaw").into());
        }
        match self.record.secrets {
            SecretsKept::None => Ok(()),
            SecretsKept::Elsewhere => Err(ThawError::Withheld(ThawStep::Secrets)),
        }
    }

    fn realtime_ns(&self) -> u64 {
        u64::try_from(self.host.config.clock.realtime().as_nanos()).unwrap_or(u64::MAX)
    }

    /// What a VM must not share with another, new each time, and with their step the app's secrets.
    /// An agent of generation 1 is asked for all it knows and holds nothing.
    fn fresh(&self, steps: Vec<ThawStep>) -> Result<Thaw, ThawError> {
        let mut entropy = vec![0_u8; 64];
        getrandom::fill(&mut entropy).map_err(ThawError::Random)?;
        let mut machine_id = [0_u8; 16];
        getrandom::fill(&mut machine_id).map_err(ThawError::Random)?;
        let gives =
            self.record.secrets == SecretsKept::Elsewhere && steps.contains(&ThawStep::Secrets);
        let start = &self.record.start;
        Ok(Thaw {
            realtime_ns: self.realtime_ns(),
            entropy: SecretBytes::new(entropy),
            hostname: start.owner.app.clone(),
            machine_id: HEXLOWER.encode(&machine_id),
            resolver: (!start.egress.is_empty()).then_some(HOST_ADDRESS),
            folder: start.folder.map(|image| image.to_string()),
            incarnation: start.vm.to_string(),
            hold: !steps.is_empty(),
            steps,
            secrets: gives.then(|| AppSecrets::clone(&self.secrets)),
        })
    }
}
