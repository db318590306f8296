//! Images: root file systems and app folders, one read-only SquashFS file each.
//!
//! Called by the node's server (`spore_wire::node`) and by the build task that makes base images.
//! The host never mounts, checks or reads into an image: what a tenant sent is looked at only by
//! the confined process of [`worker`], and afterwards only by guests.
//!
//! ```text
//!   tar or tar.zst ──▶ packer.rs ──pipe──▶ worker.rs (confined) ──fd──▶ store.rs ──▶ <blake3>.img
//!   (upload, or debian.rs)                  └─ entry.rs (rules), pack.rs (SquashFS)
//! ```
//!
//! | module | what |
//! |---|---|
//! | [`workshop`] | all image work of a daemon: how much at once, how long |
//! | [`job`] | the processes of one piece of work: their cgroup, and the end of them all |
//! | [`store`] | the folder of images: staged, synced, renamed, verified, collected |
//! | [`packer`] | the node's side of packing: starts the worker, feeds it, files what it made |
//! | [`worker`] | the confined process |
//! | [`pack`] | tar stream to SquashFS, without any privilege or path |
//! | [`entry`] | which tar entries are accepted, and as what |
//! | [`debian`] | root file systems from Debian packages, built without privileges |

pub mod debian;
pub mod entry;
pub mod job;
pub mod pack;
pub mod packer;
pub mod store;
pub mod worker;
pub mod workshop;
