//! `spore snapshot`: frozen VMs.

use anyhow::{Context as _, Result};
use clap::{Args, Subcommand};
use spore_api::image::GcRequest;
use spore_api::snapshot::{self, RemoveSnapshot, SnapshotKind};

use super::Context;
use super::output::{Cell, Format, Look, bytes_text, moment};

/// List, show, remove and compact snapshots
#[derive(Debug, Args)]
pub(super) struct Snapshot {
    #[command(subcommand)]
    verb: SnapshotVerb,
}

#[derive(Debug, Subcommand)]
enum SnapshotVerb {
    Ls(Ls),
    Info(Info),
    Rm(Rm),
    Compact(Compact),
    Gc(Gc),
}

/// List snapshots, the platform's own too
#[derive(Debug, Args)]
struct Ls {}

/// Show one snapshot
#[derive(Debug, Args)]
struct Info {
    #[command(flatten)]
    which: OneSnapshot,
}

/// Remove a snapshot and its tag
#[derive(Debug, Args)]
struct Rm {
    #[command(flatten)]
    which: OneSnapshot,
    /// The snapshots that continue it go as well
    #[arg(long)]
    cascade: bool,
}

/// Make a snapshot stand alone, so that what it continues can be removed
#[derive(Debug, Args)]
struct Compact {
    #[command(flatten)]
    which: OneSnapshot,
}

/// Remove what no tag names and no sandbox needs
#[derive(Debug, Args)]
struct Gc {
    /// Only tell what would go
    #[arg(long)]
    dry_run: bool,
}

/// A snapshot, as verbs name one.
#[derive(Debug, Args)]
struct OneSnapshot {
    /// Its tag or its id
    #[arg(value_name = "TAG|ID")]
    snapshot: String,
}

impl Snapshot {
    pub(super) async fn run(self, context: &Context) -> Result<u8> {
        match self.verb {
            SnapshotVerb::Ls(_) => list(context).await,
            SnapshotVerb::Info(verb) => verb.run(context).await,
            SnapshotVerb::Rm(verb) => verb.run(context).await,
            SnapshotVerb::Compact(verb) => verb.run(context).await,
            SnapshotVerb::Gc(verb) => verb.run(context).await,
        }
    }
}

async fn list(context: &Context) -> Result<u8> {
    let snapshots = context.client.snapshots().await;
    let items = snapshots.context("cannot list the snapshots")?;
    let headings = ["TAG", "ID", "OF", "SIZE", "DEPTH", "SANDBOXES", "TAKEN"];
    let none = "no snapshots yet. Take one: spore checkpoint APP --tag TAG";
    context.output.list(&items, &headings, row, none)?;
    Ok(0)
}

fn row(snapshot: &snapshot::Snapshot) -> Vec<Cell> {
    let taken = match (&snapshot.damage, &snapshot.created_at) {
        (Some(_), _) => Cell::new("damaged").look(Look::Bad),
        (None, Some(at)) => Cell::new(moment(at)),
        (None, None) => Cell::new("-"),
    };
    vec![
        Cell::new(tags(snapshot)),
        Cell::new(&snapshot.id),
        Cell::new(of(snapshot)),
        Cell::new(bytes_text(snapshot.bytes)),
        Cell::new(snapshot.depth.to_string()),
        Cell::new(snapshot.sandboxes.to_string()),
        taken,
    ]
}

fn tags(snapshot: &snapshot::Snapshot) -> String {
    let tags: Vec<&str> = snapshot.tags.iter().map(|tag| tag.as_str()).collect();
    if tags.is_empty() {
        "-".to_owned()
    } else {
        tags.join(", ")
    }
}

fn of(snapshot: &snapshot::Snapshot) -> &str {
    snapshot.taken_of.as_deref().unwrap_or("-")
}

impl Info {
    async fn run(self, context: &Context) -> Result<u8> {
        let name = self.which.snapshot;
        let shown = context.client.snapshot(&name).await;
        let shown = shown.with_context(|| format!("cannot show the snapshot {name}"))?;
        show(context, &shown)
    }
}

fn show(context: &Context, shown: &snapshot::Snapshot) -> Result<u8> {
    let output = &context.output;
    if output.format() == Format::Json {
        output.json(shown)?;
        return Ok(0);
    }
    let kind = shown.kind.map_or("-", |kind| match kind {
        SnapshotKind::Template => "template",
        SnapshotKind::Checkpoint => "checkpoint",
        SnapshotKind::Suspend => "of a suspended app",
    });
    let continues = match &shown.parent {
        Some(parent) => format!("{parent} ({} in all)", shown.depth),
        None => "nothing".to_owned(),
    };
    let gets = shown.resources.map_or_else(
        || "-".to_owned(),
        |gets| {
            let (cpus, memory, disk) = (gets.cpus, gets.memory_mib, gets.disk_mib);
            format!("{cpus} vCPU, {memory} MiB of memory, {disk} MiB of disk")
        },
    );
    let mut facts = vec![
        ("id", Cell::new(&shown.id)),
        ("tag", Cell::new(tags(shown))),
        ("account", Cell::new(shown.account.as_str())),
        ("kind", Cell::new(kind)),
        ("of", Cell::new(of(shown))),
        (
            "taken",
            Cell::new(shown.created_at.as_deref().map_or("-".to_owned(), moment)),
        ),
        ("a VM gets", Cell::new(gets)),
        ("size", Cell::new(bytes_text(shown.bytes))),
        (
            "encrypted",
            Cell::new(if shown.encrypted { "yes" } else { "no" }),
        ),
        ("continues", Cell::new(continues)),
        ("continued by", Cell::new(list_or_nothing(&shown.children))),
        ("sandboxes", Cell::new(shown.sandboxes.to_string())),
    ];
    if let Some(damage) = &shown.damage {
        facts.push(("damage", Cell::new(damage).look(Look::Bad)));
    }
    output.facts(&facts)?;
    Ok(0)
}

fn list_or_nothing(ids: &[String]) -> String {
    match ids {
        [] => "nothing".to_owned(),
        ids => ids.join(", "),
    }
}

impl Rm {
    async fn run(self, context: &Context) -> Result<u8> {
        let name = self.which.snapshot;
        let cascade = self.cascade;
        let how = RemoveSnapshot { cascade };
        let removed = context.client.remove_snapshot(&name, how).await;
        let removed = removed.with_context(|| format!("cannot remove the snapshot {name}"))?;
        let output = &context.output;
        match output.format() {
            Format::Json => output.json(&removed)?,
            Format::Text => output.line(&match removed.removed.len() {
                0 | 1 => format!("{name} is removed"),
                more => format!("{name} is removed, with {} that continued it", more - 1),
            })?,
        }
        Ok(0)
    }
}

impl Compact {
    async fn run(self, context: &Context) -> Result<u8> {
        let name = self.which.snapshot;
        let compacted = context.client.compact_snapshot(&name).await;
        let shown = compacted.with_context(|| format!("cannot compact the snapshot {name}"))?;
        let output = &context.output;
        match output.format() {
            Format::Json => output.json(&shown)?,
            Format::Text => output.line(&format!(
                "{name} stands alone and takes {}",
                bytes_text(shown.bytes)
            ))?,
        }
        Ok(0)
    }
}

impl Gc {
    async fn run(self, context: &Context) -> Result<u8> {
        let dry_run = self.dry_run;
        let request = GcRequest { dry_run };
        let report = context.client.collect_snapshots(request).await;
        let report = report.context("cannot collect unused snapshots")?;
        super::image::collected(context, &report, |id| id)
    }
}
