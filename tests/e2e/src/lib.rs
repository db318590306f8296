//! What the stories in `tests/` stand on: a platform of their own, a visitor, and a look at what
//! is left behind.
//!
//! Every story owns its folders, ports, uids and cgroup, so that stories run beside each other and
//! beside an installed Spore. Nothing here looks inside a daemon: it drives the program and the
//! public client, and reads `/proc` as an operator would.

pub mod app;
pub mod leftovers;
pub mod platform;
pub mod visitor;

use std::time::Duration;

use anyhow::{Result, bail};

pub use app::AppFolder;
pub use platform::{Disk, Platform, Run, available};
pub use visitor::{Answer, Visitor, raw};

/// Asks until the answer is yes, at most so many seconds.
///
/// # Errors
/// When the question fails, or the answer stays no.
pub async fn until(seconds: u32, mut question: impl FnMut() -> Result<bool>) -> Result<()> {
    for _try in 0..seconds * 10 {
        if question()? {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    bail!("not within {seconds} s")
}
