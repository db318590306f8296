//! What the stories in `tests/` stand on: a platform of their own, a visitor, and a look at what
//! is left behind.
//!
//! Every story owns its folders, ports, uids and cgroup, so that stories run beside each other and
//! beside an installed Spore. Nothing here looks inside a daemon: it drives the program and the
//! public client, and reads `/proc` as an operator would.

pub mod addresses;
pub mod app;
pub mod cores;
pub mod leftovers;
pub mod memory;
pub mod namespace;
pub mod neighbour;
pub mod platform;
pub mod search;
pub mod visitor;

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::runtime::Handle;

pub use addresses::HostAddresses;
pub use app::AppFolder;
pub use namespace::Namespace;
pub use neighbour::Neighbour;
pub use platform::{Disk, Platform, Run, Site, available};
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

/// A part of a story that goes on beside others.
pub type Part<'p> = Pin<Box<dyn Future<Output = Result<()>> + Send + 'p>>;

/// Runs parts of a story beside each other, each on a thread of its own since the CLI blocks, and
/// fails with the first one that does, by its name.
///
/// # Errors
/// The failure of a part.
pub fn beside(parts: Vec<(&str, Part<'_>)>) -> Result<()> {
    let handle = &Handle::current();
    tokio::task::block_in_place(|| {
        std::thread::scope(|scope| {
            let mut threads = Vec::new();
            for (name, part) in parts {
                threads.push((name, scope.spawn(|| handle.block_on(part))));
            }
            // The scope waits for all of them, so none uses a platform that is gone.
            for (name, thread) in threads {
                match thread.join() {
                    Ok(result) => result.with_context(|| name.to_owned())?,
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            Ok(())
        })
    })
}

/// Waits until the node has so many templates.
///
/// # Errors
/// When it has another number after minutes.
pub async fn templates(platform: &Platform, count: u64) -> Result<()> {
    let there = || Ok(platform.json(&["status"])?["templates"]["ready"] == count);
    let waited = until(900, there).await;
    waited.with_context(|| platform.log_tail())
}
