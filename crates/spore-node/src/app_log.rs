//! What control may ask of an app's log: its lines, and one of the platform's own.
//!
//! The files are `log.rs`'s; the app's lines come from its VM's collector.

use spore_wire::guest::OutputKind;
use spore_wire::id::VmId;
use spore_wire::node::Owner;

use crate::log::{Follow, LogError, LogLine};
use crate::node::Node;

impl Node {
    /// The last lines of an app, over all its VMs. Blocks, as everything about logs.
    ///
    /// # Errors
    /// [`LogError`].
    pub fn log_tail(
        &self,
        account: &str,
        app: &str,
        lines: usize,
    ) -> Result<Vec<LogLine>, LogError> {
        self.host().logs.app(account, app)?.tail(lines)
    }

    /// The last lines of an app and every line after them. A follower that is too slow is told how
    /// many it missed.
    ///
    /// # Errors
    /// [`LogError`].
    pub fn log_follow(
        &self,
        account: &str,
        app: &str,
        lines: usize,
    ) -> Result<(Vec<LogLine>, Follow), LogError> {
        self.host().logs.app(account, app)?.follow(lines)
    }

    /// Adds a line of the platform's own to an app's log. Blocks.
    ///
    /// # Errors
    /// [`LogError`].
    pub fn note(&self, owner: &Owner, vm: VmId, text: String) -> Result<(), LogError> {
        let log = self.host().logs.app(&owner.account, &owner.app)?;
        let at_us = self.host().config.clock.realtime().as_micros();
        log.append(vec![LogLine {
            vm,
            release: owner.release,
            // What the VM printed goes on where it was.
            sequence: log.last_sequence(vm),
            at_us: u64::try_from(at_us).unwrap_or(u64::MAX),
            from: OutputKind::Stderr,
            text,
            of_platform: true,
            dropped: 0,
        }]);
        Ok(())
    }

    /// Removes the log of an app that is gone.
    ///
    /// # Errors
    /// [`LogError`].
    pub fn log_remove(&self, account: &str, app: &str) -> Result<(), LogError> {
        self.host().logs.remove(account, app)
    }
}
