//! A copy of a VM's scratch disk as it stood at one instant, made by its VMM while the guest runs.
//!
//! Called by the task that owns the monitor. QEMU copies what the VM has written since it began to
//! a file of the node's, each block before the guest changes it, so that the copy is of the instant
//! at which it was begun. The disk itself goes on as it is: it grows no layer, and its key is in no
//! snapshot. Nothing here reads a disk.
//!
//! ```text
//!   add ──begin, guest paused──▶ held back ──hasten, guest runs──▶ copying ──▶ over ──conclude──▶
//!    └─────────────────────────────┴──────────── forget ────────────┴──────────┘
//! ```
//!
//! The job is held back until the guest runs again: it works in the loop in which QEMU obeys, and
//! would keep the guest still for as long as its first blocks take.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::arguments::{LAYER, SCRATCH, layer};
use super::qmp::Qmp;
use crate::hypervisor::fork::Below;

/// What descriptors of a capture are marked with.
pub(super) const MARK: &str = "capture";

const JOB: &str = "j";
const TARGET: &str = "t";
const TARGET_FILE: &str = "tf";
const TARGET_KEY: &str = "kt";

/// From so many layers on a copy is of everything, so that chains do not grow beyond: each layer
/// costs a VMM two descriptors and a little time at its start.
const LAYERS_MAX: usize = 12;

/// How long a copy that nobody wants may take to end.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(10);

/// How often it is asked whether it has.
const CANCEL_STEP: Duration = Duration::from_millis(5);

/// Gives QEMU the file to copy to, with nothing below it.
pub(super) async fn add(qmp: &mut Qmp, to: BorrowedFd<'_>, key: Option<&str>) -> io::Result<()> {
    let number = qmp.add_fd(to, MARK).await?;
    if let Some(key) = key {
        let secret = json!({"qom-type": "secret", "id": TARGET_KEY, "data": key});
        qmp.execute("object-add", secret).await?;
    }
    let file = json!({
        "driver": "file", "node-name": TARGET_FILE, "filename": format!("/dev/fdset/{number}"),
        "locking": "off", "auto-read-only": false, "cache": {"no-flush": true},
        "discard": "unmap",
    });
    qmp.execute("blockdev-add", file).await?;
    let node = layer(
        TARGET,
        TARGET_FILE,
        None,
        key.map(|_key| TARGET_KEY.to_owned()),
    );
    qmp.execute("blockdev-add", node).await?;
    Ok(())
}

/// What a copy of the disk would be over, unless it is `given`, and how many bytes it would have.
pub(super) async fn extent(qmp: &mut Qmp, given: Option<Below>) -> io::Result<(Below, u64)> {
    let nodes = qmp.execute("query-named-block-nodes", json!({"flat": true}));
    let nodes = nodes.await?;
    let below = given.unwrap_or_else(|| below_with(&nodes));
    Ok((below, bytes_with(&nodes, below)))
}

/// What the host's disk has of the layers that are copied.
fn bytes_with(nodes: &Value, below: Below) -> u64 {
    let nodes = nodes.as_array().into_iter().flatten();
    let is_copied = |node: &&Value| {
        let name = node.get("node-name").and_then(Value::as_str);
        name.is_some_and(|name| {
            name == SCRATCH || below == Below::Nothing && name.starts_with(LAYER)
        })
    };
    nodes
        .filter(is_copied)
        .filter_map(|node| node.pointer("/image/actual-size")?.as_u64())
        .sum()
}

/// On an empty file system there is no copy: another host, or another version of `mkfs.ext4`, has
/// another one.
fn below_with(nodes: &Value) -> Below {
    let names = nodes.as_array().into_iter().flatten();
    let names = names.filter_map(|node| node.get("node-name")?.as_str());
    let numbers = names.filter_map(|name| name.strip_prefix(LAYER)?.parse::<usize>().ok());
    match numbers.count() {
        1..LAYERS_MAX => Below::Source,
        _ => Below::Nothing,
    }
}

/// Begins the copy, held back. The guest is paused.
pub(super) async fn begin(qmp: &mut Qmp, below: Below) -> io::Result<()> {
    let sync = match below {
        Below::Source => "top",
        Below::Nothing => "full",
    };
    let job = json!({
        "job-id": JOB, "device": SCRATCH, "target": TARGET, "sync": sync, "speed": 1,
        "auto-dismiss": false,
    });
    qmp.execute("blockdev-backup", job).await.map(drop)
}

/// Lets it copy as fast as it can. One with nothing to copy is over, and refuses.
pub(super) async fn hasten(qmp: &mut Qmp) -> io::Result<()> {
    let speed = json!({"device": JOB, "speed": 0});
    qmp.refusable("block-job-set-speed", speed).await.map(drop)
}

/// Whether the copy has everything.
pub(super) async fn is_over(qmp: &mut Qmp) -> io::Result<bool> {
    let gone = || io::Error::other("the copy is not there any more");
    let job = job(qmp).await?.ok_or_else(gone)?;
    match job.get("error").and_then(Value::as_str) {
        Some(error) => Err(io::Error::other(error.to_owned())),
        None => Ok(is_concluded(&job)),
    }
}

/// Writes what of the copy is not in its file yet, and lets go of it.
pub(super) async fn conclude(qmp: &mut Qmp) -> io::Result<()> {
    qmp.execute("job-dismiss", json!({"id": JOB})).await?;
    for node in [TARGET, TARGET_FILE] {
        let node = json!({"node-name": node});
        qmp.execute("blockdev-del", node).await?;
    }
    forget(qmp).await
}

/// Removes what an earlier capture left, however far it came.
pub(super) async fn forget(qmp: &mut Qmp) -> io::Result<()> {
    let since = Instant::now();
    while let Some(job) = job(qmp).await? {
        let id = json!({"id": JOB});
        if is_concluded(&job) {
            qmp.execute("job-dismiss", id).await?;
            break;
        }
        if since.elapsed() > CANCEL_TIMEOUT {
            return Err(io::Error::other(format!("the copy does not end: {job}")));
        }
        // It may end meanwhile.
        qmp.refusable("job-cancel", id).await?;
        sleep(CANCEL_STEP).await;
    }
    for node in [TARGET, TARGET_FILE] {
        let node = json!({"node-name": node});
        qmp.refusable("blockdev-del", node).await?;
    }
    qmp.refusable("object-del", json!({"id": TARGET_KEY}))
        .await?;
    let sets = qmp.execute("query-fdsets", json!({})).await?;
    for set in sets.as_array().into_iter().flatten() {
        let fds = set.get("fds").and_then(Value::as_array);
        let is_ours = |fd: &Value| fd.get("opaque").and_then(Value::as_str) == Some(MARK);
        if fds.is_some_and(|fds| fds.iter().any(is_ours)) {
            let id = json!({"fdset-id": set.get("fdset-id")});
            qmp.refusable("remove-fd", id).await?;
        }
    }
    Ok(())
}

/// Whether a copy is there.
pub(super) async fn is_there(qmp: &mut Qmp) -> io::Result<bool> {
    Ok(job(qmp).await?.is_some())
}

async fn job(qmp: &mut Qmp) -> io::Result<Option<Value>> {
    let jobs = qmp.execute("query-jobs", json!({})).await?;
    let mut jobs = jobs.as_array().into_iter().flatten();
    let is_it = |job: &&Value| job.get("id").and_then(Value::as_str) == Some(JOB);
    Ok(jobs.find(is_it).cloned())
}

fn is_concluded(job: &Value) -> bool {
    job.get("status").and_then(Value::as_str) == Some("concluded")
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{LAYERS_MAX, below_with, bytes_with};
    use crate::hypervisor::fork::Below;

    #[test]
    fn a_copy_is_over_the_sources_layers_until_they_are_too_many() {
        let nodes = |layers: usize| -> Value {
            let others = ["d2", "f2", "d0", "fb", "b", "label"].map(str::to_owned);
            let layers = (0..layers).flat_map(|n| [format!("l{n}"), format!("g{n}")]);
            let node = |name: String| json!({"node-name": name, "drv": "qcow2"});
            others.into_iter().chain(layers).map(node).collect()
        };
        for (layers, below) in [
            (0, Below::Nothing),
            (1, Below::Source),
            (LAYERS_MAX - 1, Below::Source),
            (LAYERS_MAX, Below::Nothing),
            (LAYERS_MAX + 3, Below::Nothing),
        ] {
            assert_eq!(below_with(&nodes(layers)), below, "{layers}");
        }
        assert_eq!(below_with(&Value::Null), Below::Nothing);
    }

    #[test]
    fn what_is_copied_is_the_top_layer_or_all_of_them() {
        let node =
            |name: &str, bytes: u64| json!({"node-name": name, "image": {"actual-size": bytes}});
        let nodes = json!([node("d0", 1), node("d2", 2), node("l0", 4), node("g0", 8)]);
        assert_eq!(bytes_with(&nodes, Below::Source), 2);
        assert_eq!(bytes_with(&nodes, Below::Nothing), 6);
        assert_eq!(bytes_with(&Value::Null, Below::Nothing), 0);
    }
}
