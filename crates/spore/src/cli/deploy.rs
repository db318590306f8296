//! `spore deploy`: a folder becomes a release, which goes live when it is healthy.
//!
//! ```text
//!   manifest ─▶ (dir: image) ─▶ upload ─▶ release ─▶ operation ─▶ URL, or the app's last lines
//! ```

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::Args;
use serde::Serialize;
use spore_api::app::App;
use spore_api::image::ImageFrom;
use spore_api::log::{LogLine, LogQuery};
use spore_api::name::{AppName, ImageName};
use spore_api::operation::{Operation, OperationState};
use spore_api::release::{CreateRelease, ReleaseState};

use super::Context;
use super::logs::shown;
use super::output::{Format, Look};
use super::status::template_text;
use super::steps::Steps;
use super::upload::{build, upload};
use crate::manifest::{ImageChoice, Manifest};
use crate::pack::FolderKind;

/// The most lines of a failed app that are shown.
const LAST_LINES: usize = 20;
/// The lines that these are looked for in.
const LINES_ASKED: u32 = 200;

/// Deploy a folder and print its URL
#[derive(Debug, Args)]
pub(super) struct Deploy {
    /// The app's folder, with its spore.toml
    #[arg(default_value = ".")]
    folder: PathBuf,
}

/// What a deployment came to, for programs.
#[derive(Serialize)]
struct Deployed<'a> {
    operation: &'a Operation,
    app: &'a App,
}

impl Deploy {
    pub(super) async fn run(self, context: &Context) -> Result<u8> {
        let manifest = Manifest::read(&self.folder)?;
        let mut steps = Steps::new(&context.output);
        let app = manifest.name.clone();
        let (image, apart) = match &manifest.image {
            ImageChoice::Named(image) => (image.clone(), None),
            ImageChoice::Folder(root) => {
                let root = self.folder.join(root);
                let source = upload(context, &mut steps, &root, FolderKind::Root, None).await?;
                let name: ImageName = format!("{app}/rootfs").parse()?;
                let from = ImageFrom::Source { source: source.id };
                build(context, &mut steps, name.clone(), from).await?;
                (name, Some(root))
            }
        };
        let folder = self.folder.as_path();
        let source = upload(
            context,
            &mut steps,
            folder,
            FolderKind::App,
            apart.as_deref(),
        )
        .await?;
        let release = CreateRelease {
            spec: manifest.spec(image),
            source: Some(source.id),
        };
        let what = || format!("cannot deploy {app}");
        let begun = context
            .client
            .create_release(&app, &release)
            .await
            .with_context(what)?;
        steps.next_operation();
        let ended = context.client.wait(begun, |now| steps.follow(now)).await;
        steps.clear();
        let ended = ended.with_context(|| {
            format!("cannot follow the deployment of {app}; `spore status {app}` tells how it went")
        })?;
        finish(context, &app, ended).await
    }
}

/// Tells how a deployment or rollback ended.
pub(super) async fn finish(context: &Context, name: &AppName, ended: Operation) -> Result<u8> {
    let output = &context.output;
    if ended.state == OperationState::Failed {
        if output.format() == Format::Text {
            tell_last_lines(context, name).await;
        }
        let what = match ended.kind.as_str() {
            "rollback" => format!("{name} was not rolled back"),
            _ => format!("{name} was not deployed"),
        };
        return match ended.error {
            Some(error) => Err(error).context(what),
            None => {
                Err(anyhow::anyhow!("the daemon gives no reason; look into its log").context(what))
            }
        };
    }
    let app = context.client.app(name).await;
    let app = app.with_context(|| format!("{name} is deployed, but cannot be shown"))?;
    match output.format() {
        Format::Json => output.json(&Deployed {
            operation: &ended,
            app: &app,
        })?,
        Format::Text => {
            let release = ended
                .result
                .or_else(|| app.release.map(|number| number.to_string()));
            let release = release
                .map(|number| format!(", release {number},"))
                .unwrap_or_default();
            output.note(&format!("{name}{release} is live"));
            output.line(&output.paint(Look::Strong, &app.url))?;
            let template = app.vm.as_ref().and_then(|vm| vm.template);
            if let Some(template) = template {
                output.note(&format!("template {}", template_text(template)));
            }
        }
    }
    Ok(0)
}

/// What the app printed before it failed. That there is nothing, or that it cannot be had, must
/// not hide the failure itself.
async fn tell_last_lines(context: &Context, name: &AppName) {
    let Ok(lines) = last_lines(context, name).await else {
        return;
    };
    if lines.is_empty() {
        context.output.note("the app printed nothing");
        return;
    }
    context.output.note("the app's last lines:");
    for line in lines {
        context
            .output
            .note(&format!("  {}", shown(&context.output, &line)));
    }
}

/// The last lines of the newest release if that is the one that failed: the one that serves
/// prints into the same log.
async fn last_lines(context: &Context, name: &AppName) -> Result<Vec<LogLine>> {
    let releases = context.client.releases(name).await?;
    let failed = releases
        .iter()
        .filter(|release| release.state == ReleaseState::Failed);
    let failed = failed.map(|release| release.number).max();
    let query = LogQuery {
        tail: Some(LINES_ASKED),
        follow: false,
    };
    let mut stream = context.client.logs(name, &query).await?;
    let mut lines = Vec::new();
    while let Some(line) = stream.next().await? {
        if failed.is_none_or(|number| number == line.release) {
            lines.push(line);
        }
    }
    let surplus = lines.len().saturating_sub(LAST_LINES);
    Ok(lines.split_off(surplus))
}
