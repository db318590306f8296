//! What the person at the terminal sees. Called by every task; never decides anything.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a build tool speaks to the terminal"
)]

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use rustix::time::{ClockId, clock_gettime};

use crate::command;

/// Says one line.
pub(crate) fn say(line: impl AsRef<str>) {
    println!("{}", line.as_ref());
}

/// Says the chain of an error.
pub(crate) fn failed(error: &anyhow::Error) {
    eprintln!("error: {error:#}");
}

/// Says what is about to take time, does it, and says how long it took. On a terminal, the time so
/// far is shown meanwhile.
pub(crate) fn step<T>(what: &str, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    println!("==> {what}");
    let start = now();
    // A question of sudo's must not be written over.
    let ticker = if command::root_is_free() {
        ticker(what)
    } else {
        ProgressBar::hidden()
    };
    let outcome = work();
    ticker.finish_and_clear();
    let outcome = outcome?;
    let took = now().saturating_sub(start);
    if took >= Duration::from_secs(1) {
        println!("    {what}: {:.1} s", took.as_secs_f64());
    }
    Ok(outcome)
}

/// A line that shows the time a step takes; indicatif hides it where there is no terminal.
fn ticker(what: &str) -> ProgressBar {
    let style = ProgressStyle::with_template("    {spinner} {msg}: {elapsed}");
    let ticker = ProgressBar::new_spinner().with_message(what.to_owned());
    if let Ok(style) = style {
        ticker.set_style(style);
    }
    ticker.enable_steady_tick(Duration::from_millis(250));
    ticker
}

/// The monotonic clock, for durations shown to people.
fn now() -> Duration {
    let now = clock_gettime(ClockId::Monotonic);
    Duration::new(
        u64::try_from(now.tv_sec).unwrap_or(0),
        u32::try_from(now.tv_nsec).unwrap_or(0),
    )
}
