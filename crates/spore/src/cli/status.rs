//! `spore status`: the platform, or one app with its VM and releases.

use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Args;
use spore_api::app::{App, AppTemplate};
use spore_api::name::AppName;
use spore_api::release::{Release, ReleaseState};

use super::Context;
use super::output::{Cell, Format, Look, bytes_text, moment, time_text};
use super::ps::state;

/// The most releases that are shown.
const RELEASES_SHOWN: usize = 5;

/// Show the platform, or one app
#[derive(Debug, Args)]
pub(super) struct Status {
    /// The app's name; the platform when absent
    app: Option<AppName>,
}

impl Status {
    pub(super) async fn run(self, context: &Context) -> Result<u8> {
        match self.app {
            Some(app) => one(context, &app).await,
            None => platform(context).await,
        }
    }
}

async fn platform(context: &Context) -> Result<u8> {
    let status = context
        .client
        .status()
        .await
        .context("cannot tell how Spore is")?;
    let output = &context.output;
    if output.format() == Format::Json {
        output.json(&status)?;
        return Ok(0);
    }
    let memory = format!(
        "{} of {} MiB given",
        status.memory_mib_used, status.memory_mib_total
    );
    let templates = format!(
        "{} ready; {} starts began from one, {} were booted",
        status.templates.ready, status.templates.hits, status.templates.misses
    );
    let memories = &status.memories;
    let memories = format!(
        "{} of {}; {} forks found theirs there, {} read it",
        bytes_text(memories.bytes),
        bytes_text(memories.budget_bytes),
        memories.hits,
        memories.misses
    );
    output.facts(&[
        ("version", Cell::new(&status.version)),
        (
            "boundary",
            boundary(&status.boundary, &status.boundary_text),
        ),
        ("hypervisor", Cell::new(&status.hypervisor)),
        ("kernel", Cell::new(&status.kernel)),
        (
            "gateway",
            Cell::new(format!("{} for *.{}", status.gateway, status.base)),
        ),
        ("apps", Cell::new(status.apps.to_string())),
        ("vms", Cell::new(status.vms.to_string())),
        ("memory", Cell::new(memory)),
        ("templates", Cell::new(templates)),
        ("snapshot memory", Cell::new(memories)),
        (
            "up",
            Cell::new(time_text(Duration::from_millis(status.uptime_ms))),
        ),
    ])?;
    for warning in &status.warnings {
        output.warn(warning);
    }
    Ok(0)
}

fn boundary(boundary: &str, text: &str) -> Cell {
    let look = if boundary == "none" {
        Look::Pending
    } else {
        Look::Good
    };
    Cell::new(text).look(look)
}

async fn one(context: &Context, name: &AppName) -> Result<u8> {
    let what = || format!("cannot tell how {name} is");
    let app = context.client.app(name).await.with_context(what)?;
    let output = &context.output;
    if output.format() == Format::Json {
        output.json(&app)?;
        return Ok(0);
    }
    let releases = context.client.releases(name).await.with_context(what)?;
    output.facts(&facts(&app))?;
    if !releases.is_empty() {
        output.line("")?;
        let rows: Vec<Vec<Cell>> = newest(releases).iter().map(row).collect();
        output.table(&["RELEASE", "STATE", "IMAGE", "MADE"], &rows)?;
    }
    Ok(0)
}

fn facts(app: &App) -> Vec<(&'static str, Cell)> {
    let mut facts = vec![
        ("name", Cell::new(app.name.as_str()).look(Look::Strong)),
        ("url", Cell::new(&app.url)),
        ("state", state(app.state)),
        ("made", Cell::new(moment(&app.created_at))),
    ];
    if let Some(release) = app.release {
        facts.push(("release", Cell::new(release.to_string())));
    }
    if let Some(vm) = &app.vm {
        facts.push(("vm", Cell::new(&vm.id)));
        facts.push(("boundary", boundary(&vm.boundary, &vm.boundary_text)));
        if !vm.phases.is_empty() {
            facts.push(("wake", Cell::new(super::power::phases(vm))));
        }
        if let Some(template) = vm.template {
            facts.push(("template", Cell::new(template_text(template))));
        }
        if vm.awake_for_ms > 0 {
            let time = time_text(Duration::from_millis(vm.awake_for_ms));
            facts.push((
                "kept awake",
                Cell::new(format!("for {time}, by the app itself")),
            ));
        }
    }
    if let Some(failure) = &app.last_failure {
        facts.push(("last failure", Cell::new(failure).look(Look::Bad)));
    }
    facts
}

/// What a template's stage means for the next wake.
pub(super) const fn template_text(template: AppTemplate) -> &'static str {
    match template {
        AppTemplate::Waiting => "to be built, in the background; the next wake boots until then",
        AppTemplate::Booting => "being built: its VM boots; the next wake boots until then",
        AppTemplate::Writing => "being built: it is written; the next wake boots until then",
        AppTemplate::Ready => "ready: the next wake forks it",
        AppTemplate::Failed => "not built, and tried again later; the daemon's log says why",
    }
}

fn newest(mut releases: Vec<Release>) -> Vec<Release> {
    releases.sort_by_key(|release| std::cmp::Reverse(release.number));
    releases.truncate(RELEASES_SHOWN);
    releases
}

fn row(release: &Release) -> Vec<Cell> {
    let (text, look) = match release.state {
        ReleaseState::Pending => ("pending", Look::Pending),
        ReleaseState::Live => ("live", Look::Good),
        ReleaseState::Retired => ("retired", Look::Faint),
        ReleaseState::Failed => ("failed", Look::Bad),
    };
    vec![
        Cell::new(release.number.to_string()),
        Cell::new(text).look(look),
        Cell::new(release.spec.image.as_str()),
        Cell::new(moment(&release.created_at)),
    ]
}
