//! Makes templates: boots a VM, shows it what programs read first, or has a release's app become
//! ready in it, and keeps it as it stands.
//!
//! One at a time, each behind the start that missed it: whoever waits for that VM should not wait
//! for the template too.

use core::time::Duration;

use spore_wire::cause::chain;
use spore_wire::guest::Exec;
use spore_wire::id::{SnapshotId, VmId};
use spore_wire::node::{Owner, Purpose, Source, StartVm, StopMode, TemplateStage, VmPhase};
use spore_wire::snapshot::SnapshotKind;
use thiserror::Error;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::{BUILDER, Wanted};
use crate::node::{Node, StartError, VmError};
use crate::take::{Take, TakeError};

/// How long a template waits for the VM whose start missed it.
const BEHIND_MAX: Duration = Duration::from_secs(600);

/// How long a template's VM may take to boot.
const BOOT_MAX: Duration = Duration::from_secs(300);

/// How long a rehearsal may take.
const REHEARSAL_MAX: Duration = Duration::from_secs(60);

/// Run once in a template's VM where the image has them, as no account's: what an app of that
/// language reads from the disk at its start is in memory then.
const REHEARSALS: [&[&str]; 2] = [
    &[
        "python3",
        "-c",
        "import asyncio, http.server, json, socketserver, sqlite3, ssl, threading, uuid",
    ],
    &[
        "node",
        "-e",
        "require('http'); require('crypto'); require('tls')",
    ],
];

/// Why there is no template.
#[derive(Debug, Error)]
enum BuildError {
    #[error("the kernel gives no random numbers")]
    Random(#[source] getrandom::Error),
    #[error("its VM was not started")]
    Start(#[from] StartError),
    #[error("its VM did not come up: {0}")]
    Ended(String),
    #[error("its VM took too long")]
    Late,
    #[error("its VM could not be asked")]
    Vm(#[from] VmError),
    #[error("its VM could not be kept")]
    Take(#[from] TakeError),
}

/// Builds what is wanted, until nobody is left who wants.
pub(crate) async fn build_all(node: Node, mut queue: mpsc::Receiver<Wanted>) {
    while let Some(wanted) = queue.recv().await {
        let begun = Instant::now();
        let behind = tokio::time::timeout(BEHIND_MAX, settled(&node, wanted.behind)).await;
        if wanted.release.is_some() && behind == Ok(VmPhase::Failed) {
            // What did not work once is not tried again behind everybody's back.
            node.templates().index().build_dropped(wanted.key);
            continue;
        }
        node.templates()
            .index()
            .building(wanted.key, TemplateStage::Booting);
        let built = build(&node, &wanted).await;
        let took = begun.elapsed();
        let image = wanted.plan.image;
        let gone = match built {
            Ok(id) => {
                tracing::info!(%id, %image, ?took, "a template is ready");
                node.templates()
                    .index()
                    .built(wanted.key, id, Instant::now())
            }
            Err(error) => {
                tracing::warn!(%image, error = %chain(&error), "a template was not built");
                node.templates()
                    .index()
                    .build_failed(wanted.key, Instant::now());
                Vec::new()
            }
        };
        for id in gone {
            node.forget_template(&wanted.account, id).await;
        }
    }
}

/// Waits until a VM is ready or over.
async fn settled(node: &Node, vm: VmId) -> VmPhase {
    let mut watch = node.watch();
    loop {
        match node.status(vm).map(|status| status.phase) {
            None => return VmPhase::Stopped,
            Some(phase) if phase >= VmPhase::Ready => return phase,
            Some(_on_its_way) => {}
        }
        watch.next().await;
    }
}

async fn build(node: &Node, wanted: &Wanted) -> Result<SnapshotId, BuildError> {
    let chance = &node.host().config.chance;
    let bits = || chance.bits().map_err(BuildError::Random);
    let (vm, id) = (VmId::from_bytes(bits()?), SnapshotId::from_bytes(bits()?));
    node.start(start_of(wanted, vm))?;
    let built = boot_and_take(node, vm, id, wanted).await;
    if built.is_err() {
        // Unless it ended by itself.
        drop(node.stop(vm, StopMode::Kill).await);
        drop(tokio::time::timeout(BOOT_MAX, node.stopped(vm)).await);
    }
    built.map(|()| id)
}

fn start_of(wanted: &Wanted, vm: VmId) -> StartVm {
    if let Some(release) = &wanted.release {
        return StartVm {
            vm,
            source: Source::Boot,
            purpose: Purpose::Template,
            trace: None,
            ..(**release).clone()
        };
    }
    StartVm {
        vm,
        owner: Owner {
            account: wanted.account.clone(),
            app: BUILDER.to_owned(),
            release: 0,
            secrets_version: 0,
        },
        image: wanted.plan.image,
        folder: None,
        resources: wanted.plan.resources,
        process: None,
        egress: Vec::new(),
        source: Source::Boot,
        keys: Vec::new(),
        purpose: Purpose::Template,
        trace: None,
    }
}

async fn boot_and_take(
    node: &Node,
    vm: VmId,
    id: SnapshotId,
    wanted: &Wanted,
) -> Result<(), BuildError> {
    let release = wanted.release.as_deref();
    let process = release.and_then(|release| release.process.as_ref());
    let app_max = process.map_or(0, |process| process.ready_timeout_ms);
    let up_max = BOOT_MAX + Duration::from_millis(app_max);
    let up = tokio::time::timeout(up_max, settled(node, vm)).await;
    if up.map_err(|_late| BuildError::Late)? != VmPhase::Ready {
        let failure = node.status(vm).and_then(|status| status.failure);
        let why = failure.map_or_else(|| "it was stopped".to_owned(), |failure| failure.message);
        return Err(BuildError::Ended(why));
    }
    if release.is_none() {
        for argv in REHEARSALS {
            rehearse(node, vm, argv).await?;
        }
    }
    let take = Take {
        id,
        kind: SnapshotKind::Template,
        key: None,
        made_at_s: node.host().config.clock.realtime().as_secs(),
    };
    node.templates()
        .index()
        .building(wanted.key, TemplateStage::Writing);
    node.take(vm, take).await?;
    Ok(())
}

/// How it ends does not matter: an image need not have the program.
async fn rehearse(node: &Node, vm: VmId, argv: &[&str]) -> Result<(), BuildError> {
    let exec = Exec {
        argv: argv.iter().map(|&word| word.to_owned()).collect(),
        environment: Vec::new(),
        directory: Some("/".to_owned()),
        user: None,
        pty: None,
        timeout_ms: u64::try_from(REHEARSAL_MAX.as_millis()).ok(),
    };
    let program = match node.exec(vm, exec).await {
        Ok(program) => program,
        Err(VmError::Guest(error)) => {
            tracing::debug!(%vm, error = %chain(&error), "nothing to rehearse");
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    while let Ok(Some(_output)) = program.next_output().await {}
    let ended = program.wait().await;
    tracing::debug!(%vm, ?argv, ?ended, "rehearsed");
    Ok(())
}
