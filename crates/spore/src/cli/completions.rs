//! `spore completions`: a script that teaches a shell the verbs. It calls no daemon.

use anyhow::Result;
use clap::{Args, Command, CommandFactory as _};
use clap_complete::Shell;

use super::Cli;
use super::output::Output;

/// Print a script that completes verbs in a shell
#[derive(Debug, Args)]
#[command(after_help = "\
bash: spore completions bash > ~/.local/share/bash-completion/completions/spore
zsh:  spore completions zsh > ~/.zfunc/_spore
fish: spore completions fish > ~/.config/fish/completions/spore.fish")]
pub(super) struct Completions {
    /// Which shell
    shell: Shell,
}

impl Completions {
    pub(super) fn run(self, output: &Output) -> Result<u8> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut shown(), "spore", &mut script);
        output.bytes(&script)?;
        Ok(0)
    }
}

/// The command line without the verbs that only the daemon calls.
fn shown() -> Command {
    let all = Cli::command();
    let verbs = all.get_subcommands().filter(|verb| !verb.is_hide_set());
    Command::new("spore")
        .args(all.get_arguments().cloned())
        .subcommands(verbs.cloned())
}
