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

pub use app::AppFolder;
pub use platform::{Platform, available};
pub use visitor::{Answer, Visitor};
