//! `spore image`: root file systems.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::{Args, Subcommand};
use spore_api::image::{self, GcReport, GcRequest, ImageFrom};
use spore_api::name::ImageName;

use super::Context;
use super::output::{Cell, Format, bytes_text, moment};
use super::steps::{Done, Steps};
use super::upload;
use crate::pack::FolderKind;

/// The digits of an id that are shown to people.
const ID_DIGITS: usize = 12;

/// List, build and remove images
#[derive(Debug, Args)]
pub(super) struct Image {
    #[command(subcommand)]
    verb: ImageVerb,
}

#[derive(Debug, Subcommand)]
enum ImageVerb {
    Ls(Ls),
    Build(Build),
    Rm(Rm),
    Gc(Gc),
}

/// List images
#[derive(Debug, Args)]
struct Ls {}

/// Build an image from Debian packages or from a folder
#[derive(Debug, Args)]
struct Build {
    /// The name it gets; what had it before loses it
    name: ImageName,
    /// Debian packages, with what they need; without them and --dir a base image is built anew
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "PACKAGE,…",
        conflicts_with = "dir"
    )]
    packages: Vec<String>,
    /// A folder that holds a root file system
    #[arg(long, value_name = "FOLDER")]
    dir: Option<PathBuf>,
}

/// Take an image's name away; its bytes go with the next gc
#[derive(Debug, Args)]
struct Rm {
    /// The image's name
    name: ImageName,
}

/// Remove what no image, app or release uses
#[derive(Debug, Args)]
struct Gc {
    /// Only tell what would go
    #[arg(long)]
    dry_run: bool,
}

impl Image {
    pub(super) async fn run(self, context: &Context) -> Result<u8> {
        match self.verb {
            ImageVerb::Ls(_) => list(context).await,
            ImageVerb::Build(verb) => verb.run(context).await,
            ImageVerb::Rm(verb) => verb.run(context).await,
            ImageVerb::Gc(verb) => verb.run(context).await,
        }
    }
}

async fn list(context: &Context) -> Result<u8> {
    let images = context
        .client
        .images()
        .await
        .context("cannot list the images")?;
    let headings = ["NAME", "ID", "SIZE", "APPS", "MADE"];
    let none = "no images yet. Build one: spore image build NAME --packages python3";
    context.output.list(&images, &headings, row, none)?;
    Ok(0)
}

fn row(image: &image::Image) -> Vec<Cell> {
    vec![
        Cell::new(image.name.as_str()),
        Cell::new(short(&image.id)),
        Cell::new(bytes_text(image.bytes)),
        Cell::new(image.used_by.to_string()),
        Cell::new(moment(&image.created_at)),
    ]
}

fn short(id: &str) -> &str {
    id.get(..ID_DIGITS).unwrap_or(id)
}

impl Build {
    async fn run(self, context: &Context) -> Result<u8> {
        let output = &context.output;
        let mut steps = Steps::new(output);
        let from = match &self.dir {
            Some(folder) => {
                let kind = FolderKind::Root;
                let source = upload::upload(context, &mut steps, folder, kind, None).await?;
                ImageFrom::Source { source: source.id }
            }
            None if self.packages.is_empty() => ImageFrom::Base,
            None => ImageFrom::Packages {
                packages: self.packages,
            },
        };
        let ended = upload::build(context, &mut steps, self.name.clone(), from).await?;
        match output.format() {
            Format::Json => output.json(&ended)?,
            Format::Text => output.line(&format!(
                "{} is {}",
                self.name,
                short(ended.result.as_deref().unwrap_or("built"))
            ))?,
        }
        Ok(0)
    }
}

impl Rm {
    async fn run(self, context: &Context) -> Result<u8> {
        let removed = context.client.remove_image(&self.name).await;
        removed.with_context(|| format!("cannot remove the image {}", self.name))?;
        let text = format!("{} is removed; `spore image gc` frees its bytes", self.name);
        Done::new("removed", self.name.as_str()).print(&context.output, &text)
    }
}

impl Gc {
    async fn run(self, context: &Context) -> Result<u8> {
        let report = context
            .client
            .collect_images(GcRequest {
                dry_run: self.dry_run,
            })
            .await;
        let report = report.context("cannot collect unused images")?;
        collected(context, &report, short)
    }
}

/// Tells what a collection removed; `shown` is how an id looks.
pub(super) fn collected(
    context: &Context,
    report: &GcReport,
    shown: impl Fn(&str) -> &str,
) -> Result<u8> {
    let output = &context.output;
    if output.format() == Format::Json {
        output.json(report)?;
        return Ok(0);
    }
    for id in &report.removed {
        output.line(shown(id))?;
    }
    let verb = if report.dry_run {
        "would free"
    } else {
        "freed"
    };
    output.note(&format!("{verb} {}", bytes_text(report.bytes)));
    Ok(0)
}
