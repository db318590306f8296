//! What the machine asks of its actor, by name and in the order of a life.
//!
//! Made by the transitions in [`super`], carried out by `vm/actor.rs` and `vm/effect.rs`. Each is a
//! kill point of the tests, which enumerate [`VmEffect::ALL`].

use super::Milestone;

/// What the actor has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum VmEffect {
    /// Write the journal.
    Journal(Milestone),
    /// Remove the journal.
    RemoveJournal,
    /// Tell whoever watches.
    Report,
    /// Wait for a turn to boot. Asks.
    TakeTurn,
    /// Make the host's side. Asks; is not cut off.
    Prepare,
    /// Start the VMM. Asks; is not cut off.
    Boot,
    /// Start the VMM with a source's guest, paused. Asks; is not cut off.
    Fork,
    /// Take hold of the VMM. Asks.
    Attach,
    /// Let a guest run that is paused: a fork's, or one that was captured. Asks.
    Resume,
    /// Open the agent's session. Asks.
    ConnectAgent,
    /// Renew the guest. Asks.
    Thaw,
    /// Remove what only this VM may begin from: it has. Asks.
    DropSource,
    /// Open the network. Asks.
    OpenNetwork,
    /// Start the app. Asks.
    StartApp,
    /// Wait for the app. Asks.
    AwaitReady,
    /// Let the tenant's processes stand still. Asks.
    Freeze,
    /// Let the guest stand still. Asks.
    Pause,
    /// Copy what makes the VM what it is. Asks.
    Capture,
    /// Put what was captured on the disk. Asks.
    Seal,
    /// Let the tenant's processes run. Asks.
    Unfreeze,
    /// Ask the guest to power off and wait for it. Asks.
    Shutdown,
    /// Wait for control, which was told of the end, to stop the VM; not for long. Asks.
    Farewell,
    /// Kill the VMM.
    Kill,
    /// Remove everything. Asks.
    Release,
}

impl VmEffect {
    /// Every effect, in the order of a life: what a test that kills the daemon enumerates.
    pub const ALL: [Self; 35] = [
        Self::Journal(Milestone::Preparing),
        Self::TakeTurn,
        Self::Prepare,
        Self::Journal(Milestone::Prepared),
        Self::Boot,
        Self::Journal(Milestone::Booted),
        Self::Fork,
        Self::Journal(Milestone::Forked),
        Self::Attach,
        Self::Journal(Milestone::Running),
        Self::Resume,
        Self::ConnectAgent,
        Self::Thaw,
        Self::Journal(Milestone::Thawed),
        Self::DropSource,
        Self::OpenNetwork,
        Self::Journal(Milestone::Open),
        Self::StartApp,
        Self::Journal(Milestone::Started),
        Self::AwaitReady,
        Self::Freeze,
        Self::Pause,
        Self::Capture,
        Self::Journal(Milestone::Sealing),
        Self::Seal,
        Self::Unfreeze,
        Self::Report,
        Self::Journal(Milestone::Draining),
        Self::Shutdown,
        Self::Journal(Milestone::EndingStopped),
        Self::Journal(Milestone::EndingFailed),
        Self::Farewell,
        Self::Kill,
        Self::Release,
        Self::RemoveJournal,
    ];

    /// Its name, unique among [`Self::ALL`].
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Journal(Milestone::Preparing) => "journal_preparing",
            Self::Journal(Milestone::Prepared) => "journal_prepared",
            Self::Journal(Milestone::Booted) => "journal_booted",
            Self::Journal(Milestone::Forked) => "journal_forked",
            Self::Journal(Milestone::Running) => "journal_running",
            Self::Journal(Milestone::Thawed) => "journal_thawed",
            Self::Journal(Milestone::Open) => "journal_open",
            Self::Journal(Milestone::Started) => "journal_started",
            Self::Journal(Milestone::Sealing) => "journal_sealing",
            Self::Journal(Milestone::Draining) => "journal_draining",
            Self::Journal(Milestone::EndingStopped) => "journal_ending_stopped",
            Self::Journal(Milestone::EndingFailed) => "journal_ending_failed",
            Self::RemoveJournal => "remove_journal",
            Self::Report => "report",
            Self::TakeTurn => "take_turn",
            Self::Prepare => "prepare",
            Self::Boot => "boot",
            Self::Fork => "fork",
            Self::Attach => "attach",
            Self::Resume => "resume",
            Self::ConnectAgent => "connect_agent",
            Self::Thaw => "thaw",
            Self::DropSource => "drop_source",
            Self::OpenNetwork => "open_network",
            Self::StartApp => "start_app",
            Self::AwaitReady => "await_ready",
            Self::Freeze => "freeze",
            Self::Pause => "pause",
            Self::Capture => "capture",
            Self::Seal => "seal",
            Self::Unfreeze => "unfreeze",
            Self::Shutdown => "shutdown",
            Self::Farewell => "farewell",
            Self::Kill => "kill",
            Self::Release => "release",
        }
    }

    /// Whether only a fork has it.
    #[must_use]
    pub const fn is_of_forks(self) -> bool {
        matches!(
            self,
            Self::Fork | Self::Resume | Self::Journal(Milestone::Forked | Milestone::Running)
        )
    }

    /// Whether only a VM that is captured has it.
    #[must_use]
    pub const fn is_of_captures(self) -> bool {
        let goes_on = matches!(
            self,
            Self::Freeze | Self::Pause | Self::Capture | Self::Unfreeze
        );
        goes_on || self.is_of_suspends()
    }

    /// Whether only a VM that is suspended has it.
    #[must_use]
    pub const fn is_of_suspends(self) -> bool {
        matches!(self, Self::Seal | Self::Journal(Milestone::Sealing))
    }

    /// Whether its result comes back as an event.
    #[must_use]
    pub const fn asks(self) -> bool {
        !matches!(
            self,
            Self::Journal(_) | Self::RemoveJournal | Self::Report | Self::Kill
        )
    }
}
