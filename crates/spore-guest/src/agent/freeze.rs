//! Whether the tenant's processes may run: before the first thaw, running, or standing still.
//!
//! Part of the session loop, which asks [`Life`] before it begins anything. A fork begins with its
//! source's memory, so it wakes up as `Frozen` under its source's name, and only a thaw under a
//! name of its own makes it another VM.
//!
//! ```text
//!   New ──Thaw──▶ Running ──Freeze──▶ Freezing ──all stand still──▶ Frozen
//!    │               ▲  ▲                │ too slow, cancelled        │  │
//!    │               │  └────────────────┘◀──Unfreeze(same name)──────┘  │
//!    └──Thaw, hold──▶ Held ──Unfreeze(same name)──▶ Running              │
//!                     ▲ └─Thaw(same name)─▶ Held                         │
//!                     └────Thaw(another name), hold──────────────────────┘
//! ```

use spore_wire::guest::{
    AgentError, AgentErrorCode, Reply, Request, Resumed, Thaw, ThawStep, Thawed,
};

use super::{Agent, Begun, Job, Machine, Stream};
use crate::clock;
use crate::guest::refused;

/// How long the tenant's processes may take to stand still.
pub const FREEZE_MS_MAX: u64 = 2_000;

/// Where a VM stands between two thaws.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Life {
    /// Booted, and nothing renewed.
    #[default]
    New,
    /// The tenant's processes run; nameless when a host of generation 1 has thawed it.
    Running(Option<String>),
    /// They were told to stand still.
    Freezing {
        /// Of the VM.
        name: String,
        /// When it is given up, in [`crate::clock::monotonic_ms`].
        until_ms: u64,
    },
    /// They stand still, of a VM of this name or of a fork of it.
    Frozen(String),
    /// Renewed under this name; they stand still until the host lets them run.
    Held(String),
}

impl Life {
    /// Whether what must be renewed was, and the VM was not frozen since.
    #[must_use]
    pub const fn is_thawed(&self) -> bool {
        matches!(
            self,
            Self::Running(_) | Self::Freezing { .. } | Self::Held(_)
        )
    }

    /// Whether the tenant's processes stand still.
    #[must_use]
    pub const fn is_frozen(&self) -> bool {
        matches!(self, Self::Frozen(_) | Self::Held(_))
    }

    /// Whether nothing may be started for the tenant or ended for being late: it may stand still.
    #[must_use]
    pub const fn is_still(&self) -> bool {
        self.is_frozen() || matches!(self, Self::Freezing { .. })
    }

    /// What the last thaw named this VM.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        match self {
            Self::New => None,
            Self::Running(name) => name.as_deref(),
            Self::Freezing { name, .. } | Self::Frozen(name) | Self::Held(name) => Some(name),
        }
    }

    /// Whether `request` may be begun now.
    ///
    /// # Errors
    /// `NotNow`, with what is in the way.
    pub fn admits(&self, request: &Request) -> Result<(), AgentError> {
        let refused = match (self, request) {
            (_, Request::Status) => return Ok(()),
            (Self::New, Request::Thaw(_)) => return Ok(()),
            (Self::Frozen(name), Request::Thaw(thaw)) if thaw.incarnation == *name => {
                format!("this VM was frozen as {name}: unfreeze it, or thaw its fork by a new name")
            }
            (Self::Frozen(_), Request::Thaw(thaw)) if thaw.incarnation.is_empty() => {
                "a fork is thawed under a name of its own: this thaw has none".to_owned()
            }
            (Self::Frozen(_), Request::Thaw(_)) => return Ok(()),
            (Self::Held(name), Request::Thaw(thaw)) if thaw.incarnation == *name => return Ok(()),
            (_, Request::Thaw(_)) => "this VM has been thawed already".to_owned(),
            (Self::Frozen(name) | Self::Held(name), Request::Unfreeze { incarnation, .. }) => {
                if incarnation == name {
                    return Ok(());
                }
                format!("this VM was frozen as {name}, not as {incarnation}: thaw it first")
            }
            (Self::New, _) => "this VM has not been thawed: send `thaw` first".to_owned(),
            (Self::Running(_), Request::Unfreeze { .. }) => "this VM is not frozen".to_owned(),
            (Self::Running(None), Request::Freeze) => {
                "this VM was thawed without a name and cannot be copied: start it anew".to_owned()
            }
            (Self::Running(_), _) => return Ok(()),
            (Self::Freezing { .. }, _) => "this VM is being frozen: wait".to_owned(),
            (Self::Frozen(_) | Self::Held(_), _) => {
                "this VM is frozen: unfreeze it first".to_owned()
            }
        };
        Err(AgentError {
            code: AgentErrorCode::NotNow,
            message: refused,
        })
    }
}

impl<M: Machine> Agent<M> {
    /// Renews what is wanted, in the order of the steps, and only then lets the tenant run.
    pub(super) fn thaw(&mut self, mut thaw: Thaw) -> Result<Reply, AgentError> {
        self.machine.check(&thaw)?;
        let still = |error| refused("hold the tenant's processes", &error);
        if thaw.hold {
            self.guest.groups.freeze().map_err(still)?;
        }
        let wanted = |step: &ThawStep| thaw.steps.is_empty() || thaw.steps.contains(step);
        let mut done = Vec::new();
        for step in ThawStep::ALL.into_iter().filter(wanted) {
            let begun_us = clock::monotonic_us();
            match step {
                ThawStep::Logs => self.app.forget_log(),
                ThawStep::Secrets => {
                    if let Some(secrets) = thaw.secrets.take() {
                        self.app.give_secrets(&self.guest, secrets)?;
                    }
                }
                step => self.machine.renew(&self.guest, step, &thaw)?,
            }
            done.push((step, clock::monotonic_us().saturating_sub(begun_us)));
        }
        if thaw.hold {
            self.life = Life::Held(thaw.incarnation);
        } else {
            let running = self.guest.groups.unfreeze();
            running.map_err(|error| refused("let the tenant's processes run", &error))?;
            let named = !thaw.incarnation.is_empty();
            self.life = Life::Running(named.then_some(thaw.incarnation));
        }
        if thaw.steps.is_empty() {
            // A host of generation 1 knows no other answer.
            return Ok(Reply::Done);
        }
        Ok(Reply::Thawed(Thawed {
            done,
            realtime_ns: clock::realtime_ns(),
        }))
    }

    pub(super) fn freeze(&mut self, now_ms: u64) -> Result<Begun, AgentError> {
        let name = self.life.name().unwrap_or_default().to_owned();
        let told = self.guest.groups.freeze();
        told.map_err(|error| refused("freeze the tenant's processes", &error))?;
        let until_ms = now_ms + FREEZE_MS_MAX;
        self.life = Life::Freezing { name, until_ms };
        Ok(Begun::Job(Job::Freeze))
    }

    /// Answers a freeze once the tenant's processes stand still, or never will.
    pub(super) fn await_stillness(&mut self, now_ms: u64) {
        let Life::Freezing { name, until_ms } = &self.life else {
            return;
        };
        let (name, until_ms) = (name.clone(), *until_ms);
        let is_freeze = |stream: &Stream| matches!(stream.job, Job::Freeze);
        let mut streams = self.streams.iter();
        let Some((&number, _)) = streams.find(|(_number, stream)| is_freeze(stream)) else {
            return;
        };
        match self.guest.groups.is_frozen() {
            Ok(true) => {
                self.life = Life::Frozen(name);
                self.reply(number, Reply::Done);
            }
            Ok(false) if now_ms < until_ms => {}
            Ok(false) => {
                let message = format!(
                    "the tenant's processes do not stand still within {FREEZE_MS_MAX} ms: try again"
                );
                let code = AgentErrorCode::Refused;
                self.fail(number, AgentError { code, message });
            }
            Err(error) => {
                let error = refused("see whether the tenant's processes stand still", &error);
                self.fail(number, error);
            }
        }
    }

    /// Lets the tenant's processes run. Those of a fork that asked for it hear of it first thing,
    /// also those whose question came while nobody listened.
    pub(super) fn unfreeze(
        &mut self,
        name: String,
        within_ms: u64,
        now_ms: u64,
    ) -> Result<Begun, AgentError> {
        let mut told = 0;
        if matches!(self.life, Life::Held(_)) {
            self.hear_wishes(now_ms);
            told = self
                .face
                .as_mut()
                .map_or(0, |face| face.hooks().tell(&name));
        }
        let running = self.guest.groups.unfreeze();
        running.map_err(|error| refused("let the tenant's processes run", &error))?;
        self.life = Life::Running(Some(name));
        if told == 0 {
            return Ok(Begun::Reply(Reply::Done));
        }
        Ok(Begun::Job(Job::Hooks {
            until_ms: now_ms.saturating_add(within_ms),
            within_ms,
        }))
    }

    /// Answers once every process that was told of a fork has said that it is done, or is late.
    pub(super) fn await_hooks(&mut self, now_ms: u64) {
        let mut streams = self.streams.iter();
        let found = streams.find_map(|(&number, stream)| match stream.job {
            Job::Hooks {
                until_ms,
                within_ms,
            } => Some((number, until_ms, within_ms)),
            _ => None,
        });
        let (Some((number, until_ms, within_ms)), Some(face)) = (found, &mut self.face) else {
            return;
        };
        let (busy, done) = (face.hooks().busy(), face.hooks().done());
        if busy > 0 && now_ms < until_ms {
            return;
        }
        let late = u32::try_from(busy).unwrap_or(u32::MAX);
        if late > 0 {
            self.app.say(&format!(
                "spore: {late} of {} processes did not say within {within_ms} ms that they know \
                 of the fork",
                late + done
            ));
        }
        self.reply(number, Reply::Resumed(Resumed { done, late }));
    }

    /// Gives a freeze up.
    pub(super) fn go_on(&mut self, name: String) {
        if let Err(error) = self.guest.groups.unfreeze() {
            crate::console::say(&format!("cannot let the tenant's processes run: {error}"));
        }
        self.life = Life::Running(Some(name));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use spore_wire::guest::Request;

    use super::Life;

    fn thaw(name: &str) -> Request {
        serde_json::from_value(json!({"op": "thaw", "realtime_ns": 1, "entropy": "AAEC",
            "hostname": "a", "machine_id": "0", "resolver": null, "incarnation": name}))
        .unwrap()
    }

    fn unfreeze(name: &str) -> Request {
        Request::Unfreeze {
            incarnation: name.to_owned(),
            hooks_ms: None,
        }
    }

    fn lives() -> [Life; 6] {
        let name = "source".to_owned();
        [
            Life::New,
            Life::Running(Some(name.clone())),
            Life::Running(None),
            Life::Freezing {
                name: name.clone(),
                until_ms: 1,
            },
            Life::Frozen(name.clone()),
            Life::Held(name),
        ]
    }

    /// Which of [`lives`] admit the request.
    fn admitting(request: &Request) -> Vec<usize> {
        let lives = lives();
        let admitting = lives.iter().enumerate();
        admitting
            .filter(|(_number, life)| life.admits(request).is_ok())
            .map(|(number, _life)| number)
            .collect()
    }

    #[test]
    fn a_vm_is_renewed_under_its_own_name_only_and_never_twice() {
        assert_eq!(admitting(&thaw("source")), [0, 5]);
        assert_eq!(admitting(&thaw("fork")), [0, 4]);
        assert_eq!(admitting(&thaw("")), [0]);
    }

    #[test]
    fn only_the_vm_that_was_frozen_or_held_goes_on_without_a_thaw() {
        assert_eq!(admitting(&unfreeze("source")), [4, 5]);
        assert_eq!(admitting(&unfreeze("fork")), Vec::<usize>::new());
        assert_eq!(admitting(&Request::Freeze), [1]);
    }

    #[test]
    fn everything_else_waits_until_the_tenant_runs() {
        assert_eq!(admitting(&Request::Status), [0, 1, 2, 3, 4, 5]);
        assert_eq!(admitting(&Request::StopApp { grace_ms: 1 }), [1, 2]);
        assert_eq!(admitting(&Request::Logs { after: 0 }), [1, 2]);
    }

    #[test]
    fn what_stands_still_is_not_told_as_thawed_but_when_it_was_held() {
        let seen = lives().map(|life| (life.is_thawed(), life.is_frozen(), life.is_still()));
        let expected = [
            (false, false, false),
            (true, false, false),
            (true, false, false),
            (true, false, true),
            (false, true, true),
            (true, true, true),
        ];
        assert_eq!(seen, expected);
        assert_eq!(Life::Frozen("a".to_owned()).name(), Some("a"));
    }
}
