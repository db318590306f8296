//! A folder on its way to the daemon: listed, packed and sent, with what stays behind named.
//!
//! Used by `deploy` for an app's folder and by `image build` and `deploy` for root file systems.

use std::error::Error as StdError;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use anyhow::{Context as _, Result};
use spore_api::client::{CallError, SourceKind};
use spore_api::image::{BuildImage, ImageFrom};
use spore_api::name::ImageName;
use spore_api::operation::{Operation, OperationState};
use spore_api::release::Source;

use super::Context;
use super::output::{Format, bytes_text};
use super::steps::Steps;
use crate::pack::{Archive, FolderKind, Listing, PackError};

/// The most names of files left behind that are told.
const LEFT_OUT_SHOWN: usize = 8;

/// Lists a folder, tells what stays, and sends the rest.
pub(super) async fn upload(
    context: &Context,
    steps: &mut Steps<'_>,
    folder: &Path,
    kind: FolderKind,
    apart: Option<&Path>,
) -> Result<Source> {
    let listing = Listing::read(folder, kind, apart)
        .with_context(|| format!("cannot pack {}", folder.display()))?;
    tell_left_out(context, &listing);
    let (files, bytes) = (listing.files(), listing.bytes);
    let count = Arc::new(AtomicU64::new(0));
    let archive = Archive::start(listing, Arc::clone(&count));
    let archive = archive.context("cannot pack: the system gives no thread")?;
    let kind = match kind {
        FolderKind::App => SourceKind::App,
        FolderKind::Root => SourceKind::Root,
    };
    let work = context.client.upload(kind, archive);
    let done = |_source: &Source| {
        let noun = if files == 1 { "file" } else { "files" };
        format!("uploaded {files} {noun}, {}", bytes_text(bytes))
    };
    let sent = steps
        .during("uploading", Some((&count, bytes)), work, done)
        .await;
    sent.map_err(own_failure)
        .with_context(|| format!("cannot upload {}", folder.display()))
}

fn tell_left_out(context: &Context, listing: &Listing) {
    if listing.left_out.is_empty() || context.output.format() == Format::Json {
        return;
    }
    let shown = listing
        .left_out
        .iter()
        .take(LEFT_OUT_SHOWN)
        .cloned()
        .collect::<Vec<_>>();
    let more = match listing.left_out.len().saturating_sub(LEFT_OUT_SHOWN) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    context.output.step(
        &format!("left out, as likely private: {}{more}", shown.join(", ")),
        None,
    );
}

/// An upload that ended because of this side: the reason is deep inside of what HTTP reports.
fn own_failure(error: CallError) -> anyhow::Error {
    let mut cause: Option<&(dyn StdError + 'static)> = error.source();
    while let Some(inner) = cause {
        if let Some(pack) = inner.downcast_ref::<PackError>() {
            let text = pack.to_string();
            return match pack.source() {
                Some(source) => anyhow::anyhow!("{source}").context(text),
                None => anyhow::anyhow!(text),
            };
        }
        cause = inner.source();
    }
    error.into()
}

/// Makes an image and waits for it.
pub(super) async fn build(
    context: &Context,
    steps: &mut Steps<'_>,
    name: ImageName,
    from: ImageFrom,
) -> Result<Operation> {
    let what = format!("cannot build the image {name}");
    let begun = context.client.build_image(&BuildImage { name, from }).await;
    let begun = begun.with_context(|| what.clone())?;
    steps.next_operation();
    let ended = context.client.wait(begun, |now| steps.follow(now)).await;
    steps.clear();
    let ended = ended.with_context(|| what.clone())?;
    match (ended.state, ended.error.clone()) {
        (OperationState::Failed, Some(error)) => Err(error).context(what),
        (OperationState::Failed, None) => {
            Err(anyhow::anyhow!("the daemon gives no reason; look into its log").context(what))
        }
        _ => Ok(ended),
    }
}
