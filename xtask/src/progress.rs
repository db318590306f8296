//! What the person at the terminal sees. Called by every task; never decides anything.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a build tool speaks to the terminal"
)]

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Says one line.
pub(crate) fn say(line: impl AsRef<str>) {
    println!("{}", line.as_ref());
}

/// Says the chain of an error.
pub(crate) fn failed(error: &anyhow::Error) {
    eprintln!("error: {error:#}");
}

/// Says what is about to take time, does it, and says how long it took.
pub(crate) fn step<T>(what: &str, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    println!("==> {what}");
    let start = now();
    let outcome = work()?;
    let took = now().saturating_sub(start);
    if took >= Duration::from_secs(1) {
        println!("    {what}: {:.1} s", took.as_secs_f64());
    }
    Ok(outcome)
}

/// The monotonic clock, for durations shown to people.
fn now() -> Duration {
    let now = clock_gettime(ClockId::Monotonic);
    Duration::new(
        u64::try_from(now.tv_sec).unwrap_or(0),
        u32::try_from(now.tv_nsec).unwrap_or(0),
    )
}
