//! The command line: one file per verb, dispatched here.
//!
//! Called by `main.rs` only. A verb gets a [`Context`] and answers an exit code; it prints through
//! `output.rs` and decides nothing about the platform: the daemon does. A new verb is a file, a
//! variant of [`Verb`] and an arm of [`dispatch`]; a verb of the daemon itself needs no context and
//! is run before one is made, as `completions` is.

mod checkpoint;
mod completions;
mod cp;
mod deploy;
mod doctor;
mod exec;
mod failure;
mod fork;
mod image;
mod logs;
mod open;
mod output;
mod platform;
mod power;
mod ps;
mod rm;
mod rollback;
mod sandbox;
mod secret;
mod snapshot;
mod status;
mod stdin;
mod steps;
mod upload;

use std::process::ExitCode;
use std::str::FromStr;

use anyhow::{Context as _, Result};
use clap::error::ErrorKind;
use clap::{Args, Parser, Subcommand};
use spore_api::client::Client;
use spore_api::name::AppName;

use self::failure::{Failure, is_closed_pipe};
use self::output::{Format, Output};
use crate::config::{CliConfig, Screen, environment};

const AFTER_HELP: &str = "\
Exit codes: 0 done, 1 failed, 2 wrong command line, 3 the app failed; `exec` and `shell` end with
the program's own.

Environment: SPORE_HOST (daemon, as --host), SPORE_TOKEN (for a daemon over TCP; else the file
~/.config/spore/token), NO_COLOR.";

/// Host apps, each in its own microVM: asleep until called.
#[derive(Debug, Parser)]
#[command(
    name = "spore",
    version,
    after_help = AFTER_HELP,
    max_term_width = 100,
    disable_help_subcommand = true,
    arg_required_else_help = true
)]
pub(crate) struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Args)]
struct Global {
    /// Print results as JSON, errors too
    #[arg(long, global = true)]
    json: bool,
    /// Where the daemon is: unix:/path, address:port [default: unix:/run/spore/api.sock]
    #[arg(long, global = true, value_name = "ADDRESS")]
    host: Option<String>,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Up(platform::Up),
    Down(platform::Down),
    Deploy(deploy::Deploy),
    Ps(ps::Ps),
    Status(status::Status),
    Open(open::Open),
    Logs(logs::Logs),
    Exec(exec::Exec),
    Shell(exec::Shell),
    Cp(cp::Cp),
    Wake(power::Wake),
    Stop(power::Stop),
    Enable(power::Enable),
    Disable(power::Disable),
    Rollback(rollback::Rollback),
    Rm(rm::Rm),
    Secret(secret::Secret),
    Image(image::Image),
    Checkpoint(checkpoint::Checkpoint),
    Fork(fork::Fork),
    Sandbox(sandbox::Sandbox),
    Snapshot(snapshot::Snapshot),
    Completions(completions::Completions),
    Doctor(doctor::Doctor),
    Server(platform::Server),
    #[command(hide = true)]
    Gateway(platform::Gateway),
    #[command(hide = true)]
    Egress(platform::Egress),
    #[command(hide = true)]
    KeepToken(platform::KeepToken),
    #[command(hide = true)]
    KvmProbe(doctor::KvmProbe),
    /// The launcher of one VMM (started by the daemon)
    #[command(hide = true)]
    Jail,
    /// The packer of one image (started by the daemon)
    #[command(hide = true)]
    ImagePack,
}

/// An app, as most verbs name one.
#[derive(Debug, Args)]
pub(crate) struct OneApp {
    /// The app's name
    app: AppName,
}

/// A number from one on, as an option has it.
fn counting<N>(text: &str) -> Result<N, &'static str>
where
    N: FromStr + PartialEq + From<u8>,
{
    let number = text.parse().ok().filter(|number| *number != N::from(0));
    number.ok_or("it must be a whole number from 1 on")
}

/// What a verb works with.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) client: Client,
    pub(crate) output: Output,
    pub(crate) screen: Screen,
}

/// Runs the command line of this process.
pub(crate) fn main() -> ExitCode {
    let screen = Screen::read(&environment);
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return refused(&error, &screen),
    };
    let format = if cli.global.json {
        Format::Json
    } else {
        Format::Text
    };
    let output = Output::new(format, &screen);
    match run(cli, &output) {
        Ok(exit) => exit,
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            let failure = Failure::of(&error);
            output.failure(&failure);
            ExitCode::from(failure.exit)
        }
    }
}

/// Ends a call whose command line the parser does not take, and prints help and version.
fn refused(error: &clap::Error, screen: &Screen) -> ExitCode {
    // What stands behind `--` is another program's.
    let mut arguments = std::env::args_os().take_while(|argument| argument != "--");
    let format = match arguments.any(|argument| argument == "--json") {
        true => Format::Json,
        false => Format::Text,
    };
    let output = Output::new(format, screen);
    if format == Format::Json && error.use_stderr() {
        output.failure(&Failure::of_parser(error));
    } else if error.kind() == ErrorKind::MissingSubcommand {
        // The parser's own words would list the verbs that are not for people.
        output.note("error: no verb is given. `spore --help` lists them");
    } else {
        output.parser(error);
    }
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(failure::USAGE))
}

fn run(cli: Cli, output: &Output) -> Result<ExitCode> {
    let verb = match local(cli.verb, output)? {
        Local::Done(exit) => return Ok(exit),
        Local::Remote(verb) => verb,
    };
    let config = CliConfig::read(cli.global.host.as_deref(), &environment)?;
    let mut client = Client::new(config.endpoint);
    if let Some(token) = config.token {
        if !client.endpoint().is_local() {
            output.warn("the token goes over the network unencrypted; an SSH tunnel is safer");
        }
        client = client.with_token(token);
    }
    let context = Context {
        client,
        output: output.clone(),
        screen: config.screen,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start: the system gives no event queue")?;
    let result = runtime.block_on(Box::pin(dispatch(verb, &context)));
    // A read of standard input may still wait for a key that nobody presses.
    runtime.shutdown_background();
    result.map(ExitCode::from)
}

/// What became of a verb that may need no daemon to talk to.
enum Local {
    /// It needed none, and ended so.
    Done(ExitCode),
    /// It needs one.
    Remote(Verb),
}

/// Runs the verbs of the daemon itself.
fn local(verb: Verb, output: &Output) -> Result<Local> {
    let exit = match verb {
        Verb::Up(verb) => verb.run(output)?.into(),
        Verb::Down(verb) => verb.run(output)?.into(),
        Verb::Server(verb) => verb.run()?.into(),
        Verb::Gateway(verb) => verb.run()?,
        Verb::Egress(verb) => verb.run()?,
        Verb::KeepToken(verb) => verb.run()?,
        Verb::Jail => crate::server::jail(),
        Verb::ImagePack => crate::server::image_pack(),
        Verb::Completions(verb) => verb.run(output)?.into(),
        Verb::Doctor(verb) => verb.run(output)?.into(),
        Verb::KvmProbe(verb) => verb.run(output)?.into(),
        verb => return Ok(Local::Remote(verb)),
    };
    Ok(Local::Done(exit))
}

async fn dispatch(verb: Verb, context: &Context) -> Result<u8> {
    match verb {
        Verb::Deploy(verb) => verb.run(context).await,
        Verb::Ps(verb) => verb.run(context).await,
        Verb::Status(verb) => verb.run(context).await,
        Verb::Open(verb) => verb.run(context).await,
        Verb::Logs(verb) => verb.run(context).await,
        Verb::Exec(verb) => verb.run(context).await,
        Verb::Shell(verb) => verb.run(context).await,
        Verb::Cp(verb) => verb.run(context).await,
        Verb::Wake(verb) => verb.run(context).await,
        Verb::Stop(verb) => verb.run(context).await,
        Verb::Enable(verb) => verb.run(context).await,
        Verb::Disable(verb) => verb.run(context).await,
        Verb::Rollback(verb) => verb.run(context).await,
        Verb::Rm(verb) => verb.run(context).await,
        Verb::Secret(verb) => verb.run(context).await,
        Verb::Image(verb) => verb.run(context).await,
        Verb::Checkpoint(verb) => verb.run(context).await,
        Verb::Fork(verb) => verb.run(context).await,
        Verb::Sandbox(verb) => verb.run(context).await,
        Verb::Snapshot(verb) => verb.run(context).await,
        Verb::Up(_)
        | Verb::Down(_)
        | Verb::Server(_)
        | Verb::Gateway(_)
        | Verb::Egress(_)
        | Verb::KeepToken(_)
        | Verb::Jail
        | Verb::ImagePack
        | Verb::Doctor(_)
        | Verb::KvmProbe(_)
        | Verb::Completions(_) => unreachable!("`local` runs the verbs that need no daemon"),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
