//! `spore sandbox`: VMs that were forked from a snapshot.

use anyhow::{Context as _, Result};
use clap::{Args, Subcommand};
use spore_api::name::SandboxId;
use spore_api::sandbox::{self, RollbackSandbox, SandboxState};

use super::Context;
use super::exec::{AFTER_HELP, Program, Target};
use super::output::{Cell, Format, Look, moment};

/// List sandboxes, run programs in them, roll them back, remove them
#[derive(Debug, Args)]
pub(super) struct Sandbox {
    #[command(subcommand)]
    verb: SandboxVerb,
}

#[derive(Debug, Subcommand)]
enum SandboxVerb {
    Ls(Ls),
    Exec(Exec),
    Rollback(Rollback),
    Rm(Rm),
}

/// List sandboxes
#[derive(Debug, Args)]
struct Ls {}

/// Run a program in a sandbox
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
struct Exec {
    /// The sandbox's id
    sandbox: SandboxId,
    #[command(flatten)]
    program: Program,
}

/// Bring a sandbox back to a snapshot, under the same id
#[derive(Debug, Args)]
struct Rollback {
    /// The sandbox's id
    sandbox: SandboxId,
    /// The snapshot; the one that it began from when absent
    #[arg(long, value_name = "TAG|ID")]
    to: Option<String>,
}

/// Remove sandboxes with everything in them
#[derive(Debug, Args)]
struct Rm {
    /// Their ids
    #[arg(required = true, value_name = "SANDBOX")]
    sandboxes: Vec<SandboxId>,
}

impl Sandbox {
    pub(super) async fn run(self, context: &Context) -> Result<u8> {
        match self.verb {
            SandboxVerb::Ls(_) => list(context).await,
            SandboxVerb::Exec(verb) => {
                let target = Target::Sandbox(verb.sandbox);
                verb.program.run(context, &target).await
            }
            SandboxVerb::Rollback(verb) => verb.run(context).await,
            SandboxVerb::Rm(verb) => verb.run(context).await,
        }
    }
}

async fn list(context: &Context) -> Result<u8> {
    let sandboxes = context.client.sandboxes().await;
    let items = sandboxes.context("cannot list the sandboxes")?;
    let output = &context.output;
    let headings = ["ID", "STATE", "FROM", "BOUNDARY", "OPENED"];
    let none = "no sandboxes. Open some: spore fork APP|TAG -n 3";
    output.list(&items, &headings, row, none)?;
    for sandbox in &items {
        if let Some(reason) = &sandbox.ended
            && output.format() == Format::Text
        {
            let reason = super::output::harmless(reason);
            output.note(&format!("{} has ended: {reason}", sandbox.id));
        }
    }
    Ok(0)
}

fn row(sandbox: &sandbox::Sandbox) -> Vec<Cell> {
    let (text, look) = match sandbox.state {
        SandboxState::Opening => ("opening", Look::Pending),
        SandboxState::Open => ("open", Look::Good),
        SandboxState::RollingBack => ("rolling back", Look::Pending),
        SandboxState::Closing => ("closing", Look::Pending),
        SandboxState::Ended => ("ended", Look::Bad),
    };
    vec![
        Cell::new(sandbox.id.as_str()),
        Cell::new(text).look(look),
        Cell::new(&sandbox.from),
        Cell::new(sandbox.boundary_text.as_deref().unwrap_or("-")),
        Cell::new(moment(&sandbox.created_at)),
    ]
}

impl Rollback {
    async fn run(self, context: &Context) -> Result<u8> {
        let id = self.sandbox;
        let to = RollbackSandbox { to: self.to };
        let back = context.client.rollback_sandbox(&id, &to).await;
        let back = back.with_context(|| format!("cannot roll {id} back"))?;
        let output = &context.output;
        match (output.format(), &to.to) {
            (Format::Json, _) => output.json(&back)?,
            (Format::Text, Some(name)) => output.line(&format!("{id} is back at {name}"))?,
            (Format::Text, None) => output.line(&format!("{id} is back where it began"))?,
        }
        Ok(0)
    }
}

impl Rm {
    async fn run(self, context: &Context) -> Result<u8> {
        for id in &self.sandboxes {
            let removed = context.client.remove_sandbox(id).await;
            removed.with_context(|| format!("cannot remove the sandbox {id}"))?;
            let done = super::steps::Done::new("removed", id.as_str());
            let output = &context.output;
            match output.format() {
                Format::Json => output.json_line(&done)?,
                Format::Text => output.line(&format!("{id} is removed"))?,
            }
        }
        Ok(0)
    }
}
