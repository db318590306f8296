//! The jail of VMMs and the zygote that makes them: what their processes have, what code in a
//! VMM's place can do, and what is left of them.
//!
//! This program is the zygote of its own tests too, with `guest.rs` in the VMM's place. A zygote
//! must have one thread, which is why libtest does not run these. It is their warden as well, who
//! ends what a test that is killed leaves behind.

#[cfg(test)]
mod attempt;
#[cfg(test)]
mod checkpoint;
#[cfg(test)]
mod guest;
#[cfg(test)]
mod launch;
#[cfg(test)]
mod node;
#[cfg(test)]
mod process;
#[cfg(test)]
mod scarce;
#[cfg(test)]
mod stories;
#[cfg(test)]
#[path = "../tiny/mod.rs"]
mod tiny;
#[cfg(test)]
mod warden;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Failed, Trial};

/// A test: its name, and what it does.
pub(crate) type Story = (&'static str, fn());

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    match arguments.next().as_deref() {
        Some("zygote") => return guest::zygote(&arguments.next().unwrap_or_default()),
        Some(warden::WARDEN) => return warden::main(),
        Some(warden::LEAVES) => return warden::leaves(),
        _ => {}
    }
    let trial = |(name, story): &Story| {
        let story = *story;
        let run = move || {
            stories::run(story);
            Ok::<(), Failed>(())
        };
        Trial::test(*name, run)
    };
    let mut trials: Vec<Trial> = stories::ALL.iter().map(trial).collect();
    // Figures for those who ask for them: `--ignored`.
    let measured = trial(&("measure_checkpoints", checkpoint::measure_checkpoints));
    trials.push(measured.with_ignored_flag(true));
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}
