//! Apps: which release a rollback goes to, and which releases are kept.

use spore_api::limits::{APPS_PER_ACCOUNT_MAX, RELEASES_KEPT};

use super::RuleError;
use crate::store::record::release::{ReleaseRecord, StoredState};

/// Why there is nothing to roll back to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RollbackError {
    /// No such release.
    #[error(
        "there is no release {wanted}: only the last {kept} are kept, and `spore status` lists them"
    )]
    Missing {
        /// Which was asked for.
        wanted: u64,
        /// How many are kept.
        kept: usize,
    },
    /// It serves already.
    #[error("release {wanted} serves already")]
    Serves {
        /// Which was asked for.
        wanted: u64,
    },
    /// It never became healthy.
    #[error("release {wanted} never became healthy: roll back to one that was, or deploy again")]
    NeverHealthy {
        /// Which was asked for.
        wanted: u64,
    },
    /// There is none before the current.
    #[error("there is no healthy release before the current one: deploy one that works")]
    NoneBefore,
}

/// The release that a rollback goes to. `wanted`: `None` is the healthy one before the current.
///
/// # Errors
/// When there is none.
pub fn rollback_to(
    releases: &[ReleaseRecord],
    live: Option<u64>,
    wanted: Option<u64>,
) -> Result<u64, RollbackError> {
    let Some(wanted) = wanted else {
        let before = |r: &&ReleaseRecord| live.is_none_or(|live| r.number < live);
        let healthy = |r: &&ReleaseRecord| r.state == StoredState::Retired;
        let newest = releases
            .iter()
            .filter(healthy)
            .filter(before)
            .map(|r| r.number)
            .max();
        return newest.ok_or(RollbackError::NoneBefore);
    };
    let Some(release) = releases.iter().find(|r| r.number == wanted) else {
        let kept = RELEASES_KEPT;
        return Err(RollbackError::Missing { wanted, kept });
    };
    match release.state {
        _ if live == Some(wanted) => Err(RollbackError::Serves { wanted }),
        StoredState::Retired => Ok(wanted),
        StoredState::Live => Err(RollbackError::Serves { wanted }),
        StoredState::Pending | StoredState::Failed => Err(RollbackError::NeverHealthy { wanted }),
    }
}

/// Which releases are forgotten: all but the last [`RELEASES_KEPT`], and never one that serves or
/// is being tried.
#[must_use]
pub fn forgotten(releases: &[ReleaseRecord], live: Option<u64>) -> Vec<u64> {
    let mut numbers: Vec<_> = releases.iter().map(|r| (r.number, r.state)).collect();
    numbers.sort_unstable_by_key(|(number, _)| core::cmp::Reverse(*number));
    let old = numbers.into_iter().skip(RELEASES_KEPT);
    old.filter(|(number, state)| Some(*number) != live && *state != StoredState::Pending)
        .map(|(number, _)| number)
        .collect()
}

/// Whether an account with `used` apps may have one more.
///
/// # Errors
/// When it may not.
pub const fn one_more_app(used: u64) -> Result<(), RuleError> {
    let most = APPS_PER_ACCOUNT_MAX as u64;
    if used < most {
        return Ok(());
    }
    Err(RuleError::Quota {
        what: "apps",
        used,
        most,
    })
}

#[cfg(test)]
mod tests {
    use super::{RollbackError, forgotten, rollback_to};
    use crate::domain::release::sample;
    use crate::store::record::release::{ReleaseRecord, StoredState};

    fn releases(states: &[StoredState]) -> Vec<ReleaseRecord> {
        let one = |(index, state): (usize, &StoredState)| {
            let mut record = sample(index as u64 + 1);
            record.state = *state;
            record
        };
        states.iter().enumerate().map(one).collect()
    }

    #[test]
    fn a_rollback_skips_what_never_was_healthy() {
        use StoredState::{Failed, Live, Retired};
        let all = releases(&[Retired, Retired, Failed, Live]);
        assert_eq!(rollback_to(&all, Some(4), None), Ok(2));
        assert_eq!(rollback_to(&all, Some(4), Some(1)), Ok(1));
        let wanted = 3;
        let error = Err(RollbackError::NeverHealthy { wanted });
        assert_eq!(rollback_to(&all, Some(4), Some(3)), error);
        assert!(rollback_to(&all, Some(4), Some(4)).is_err());
        assert!(rollback_to(&all, Some(4), Some(9)).is_err());
        assert!(rollback_to(&releases(&[Live]), Some(1), None).is_err());
    }

    #[test]
    fn a_second_rollback_goes_further_back() {
        use StoredState::{Live, Retired};
        let all = releases(&[Retired, Live, Retired]);
        assert_eq!(rollback_to(&all, Some(2), None), Ok(1));
    }

    #[test]
    fn the_live_release_is_never_forgotten() {
        let mut states = vec![StoredState::Retired; 30];
        states[0] = StoredState::Live;
        let gone = forgotten(&releases(&states), Some(1));
        assert_eq!(gone.len(), 9);
        assert!(!gone.contains(&1));
    }
}
