//! One running exec: its process, its input and its output.
//!
//! Owned by a stream of [`crate::agent`], which calls [`Exec::pump`] each turn. Never blocks: input
//! waits in a buffer that the host's credit bounds, output stays in the kernel's pipe until the
//! host has given credit for it.
//!
//! It is over when its first process has ended and everything that it wrote until then was sent.
//! What it left in the background lives on, without an output. A rehearsal says nothing, and leaves
//! nothing behind.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Gid, OFlags, Uid, fchown, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::Pid;
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use spore_wire::guest::{
    AgentError, AgentErrorCode, AgentMessage, Exec as Request, Exit, OutputKind, WindowSize,
};

use crate::cgroup::Group;
use crate::guest::{Environment, Guest, base_environment, refused, set};
use crate::interest::{Interest, Ready};
use crate::launch::{Launch, Stdios};
use crate::session::{Outbox, Window};
use crate::sys;
use crate::user::Identity;

/// The most bytes read at once.
const READ_BYTES: usize = 16 * 1024;

/// The most reads of one stream in one turn, so that it leaves room for others.
const READS_PER_TURN: usize = 4;

/// What a terminal's line discipline takes for the end of input (`VEOF`, control-D).
const END_OF_INPUT: u8 = 4;

/// One running exec.
#[derive(Debug)]
pub struct Exec {
    pid: Pid,
    group: Option<Group>,
    stdin: Option<OwnedFd>,
    input: VecDeque<u8>,
    input_ended: bool,
    outputs: Vec<(OutputKind, OwnedFd)>,
    said: Option<OutputKind>,
    kind: Kind,
    kill_at_ms: Option<u64>,
    timed_out: bool,
    exit: Option<Exit>,
}

/// How it is fed and heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Pipes,
    Terminal,
    /// By nobody; what it leaves is killed, and waited for.
    Rehearsal,
}

/// How often a rehearsal that was killed is looked at until nothing of it is left.
const ENDING_STEP_MS: u64 = 5;

impl Exec {
    /// Starts it. `app` is the app's environment and folder, if there is one.
    ///
    /// # Errors
    /// As the agent is to answer them; nothing is left running.
    pub fn start(
        guest: &mut Guest,
        name: &str,
        request: &Request,
        app: Option<(&Environment, &str)>,
        now_ms: u64,
    ) -> Result<Self, AgentError> {
        let identity = guest.identity(request.user.as_deref())?;
        let mut environment = base_environment(&identity);
        let mut directory = "/";
        if let Some((inherited, folder)) = app {
            environment.extend(inherited.clone());
            directory = folder;
        }
        if request.pty.is_some() {
            environment.insert("TERM".into(), "xterm-256color".into());
        }
        if request.user.is_some() {
            environment.insert("HOME".into(), identity.home.clone().into());
        }
        for (name, value) in &request.environment {
            set(&mut environment, name, value.as_bytes())?;
        }
        let owner = (identity.uid, identity.gid);
        let ends = match request.pty {
            Some(size) => Ends::terminal(guest, size, owner),
            None => Ends::pipes(),
        };
        let plan = Plan {
            argv: &request.argv,
            environment,
            directory: request.directory.as_deref().unwrap_or(directory),
            identity,
            timeout_ms: request.timeout_ms,
        };
        plan.begin(guest, name, ends, now_ms)
    }

    /// Starts a rehearsal: nobody feeds or hears it.
    ///
    /// # Errors
    /// As [`Exec::start`].
    pub fn rehearse(
        guest: &mut Guest,
        name: &str,
        argv: &[String],
        timeout_ms: u64,
        now_ms: u64,
    ) -> Result<Self, AgentError> {
        let identity = guest.identity(None)?;
        let plan = Plan {
            argv,
            environment: base_environment(&identity),
            directory: "/",
            identity,
            timeout_ms: Some(timeout_ms),
        };
        plan.begin(guest, name, Ends::none(), now_ms)
    }

    /// Its first process.
    #[must_use]
    pub const fn pid(&self) -> Pid {
        self.pid
    }

    /// Notes how the first process ended.
    pub const fn ended(&mut self, exit: Exit) {
        self.exit = Some(exit);
    }

    /// Takes input from the host.
    pub fn input(&mut self, bytes: &[u8]) {
        self.input.extend(bytes);
    }

    /// The host has no more input.
    pub fn end_input(&mut self) {
        if self.kind == Kind::Terminal && !self.input_ended {
            self.input.push_back(END_OF_INPUT);
        }
        self.input_ended = true;
    }

    /// Gives the terminal a new size; without a terminal there is none to change.
    ///
    /// # Errors
    /// Whatever the kernel answers.
    pub fn resize(&self, size: WindowSize) -> io::Result<()> {
        match (&self.stdin, self.kind) {
            (Some(terminal), Kind::Terminal) => Ok(tcsetwinsize(terminal, winsize(size))?),
            _ => Ok(()),
        }
    }

    /// Sends a signal to its process group. One that is gone is no failure.
    ///
    /// # Errors
    /// `Invalid` for a number that is no signal.
    pub fn signal(&self, signal: i32) -> Result<(), AgentError> {
        if !(1..=64).contains(&signal) {
            return Err(AgentError {
                code: AgentErrorCode::Invalid,
                message: format!("{signal} is not a signal: 1 to 64 are"),
            });
        }
        match sys::signal_group(self.pid, signal) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            result => result.map_err(|error| refused("send the signal", &error)),
        }
    }

    /// Kills everything of it, in whatever state it is.
    pub fn abandon(mut self, guest: &mut Guest) -> io::Result<()> {
        match self.group.take() {
            Some(group) => guest.discard(group),
            None => Ok(()),
        }
    }

    /// What it waits for.
    pub fn interest<'a>(
        &'a self,
        interest: &mut Interest<'a>,
        window: &Window,
        room: bool,
        now_ms: u64,
    ) {
        if room && window.may_send() > 0 {
            for (_kind, fd) in &self.outputs {
                interest.read(fd);
            }
        }
        if let Some(stdin) = &self.stdin
            && !self.input.is_empty()
        {
            interest.write(stdin);
        }
        if let Some(at) = self.kill_at_ms {
            interest.at(at);
        }
        if self.kind == Kind::Rehearsal && self.exit.is_some() {
            interest.at(now_ms + ENDING_STEP_MS);
        }
    }

    /// Moves what can be moved. Gives how it ended once everything was sent.
    pub fn pump(
        &mut self,
        stream: u32,
        window: &mut Window,
        outbox: &mut Outbox,
        ready: &Ready,
        now_ms: u64,
    ) -> Option<Exit> {
        if self.kill_at_ms.is_some_and(|at| at <= now_ms) && self.exit.is_none() {
            self.kill_at_ms = None;
            self.timed_out = true;
            if let Some(group) = &self.group {
                // The stream ends with the process; a kernel that refuses the kill leaves it open,
                // and the host's own deadline ends the VM.
                drop(group.kill());
            }
        }
        if let Some(credit) = self.feed(window) {
            outbox.message(stream, &AgentMessage::Credit { bytes: credit });
        }
        let drained = match self.kind {
            Kind::Rehearsal => self.exit.is_some() && self.is_gone(),
            Kind::Pipes | Kind::Terminal => self.send(stream, window, outbox, ready),
        };
        match self.exit {
            Some(_) if self.timed_out && drained => Some(Exit::Timeout),
            Some(exit) if drained => Some(exit),
            _ => None,
        }
    }

    /// Kills what is left. True when nothing is.
    fn is_gone(&self) -> bool {
        let Some(group) = &self.group else {
            return true;
        };
        // Asked again at the next turn, and by the host's own deadline at last.
        drop(group.kill());
        group.is_empty()
    }

    /// Hands the group back once [`Exec::pump`] has given an end.
    pub fn finish(mut self, guest: &mut Guest) {
        if let Some(group) = self.group.take() {
            guest.leftovers.push(group);
            guest.sweep();
        }
    }

    /// Writes input and says how much the host may send again.
    fn feed(&mut self, window: &mut Window) -> Option<u32> {
        let mut used = 0;
        while let Some(stdin) = &self.stdin
            && !self.input.is_empty()
        {
            let (first, second) = self.input.as_slices();
            let part = if first.is_empty() { second } else { first };
            match rustix::io::write(stdin, part) {
                Ok(bytes) => {
                    self.input.drain(..bytes);
                    used += bytes;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                // Nobody reads any more; a shell would let the bytes go too.
                Err(_gone) => {
                    used += self.input.len();
                    self.input.clear();
                    if self.kind == Kind::Pipes {
                        self.stdin = None;
                    }
                }
            }
        }
        if self.stdin.is_none() {
            used += self.input.len();
            self.input.clear();
        }
        if self.input_ended && self.input.is_empty() && self.kind == Kind::Pipes {
            self.stdin = None;
        }
        window.used(used)
    }

    /// Sends output. True when nothing is left to send.
    fn send(
        &mut self,
        stream: u32,
        window: &mut Window,
        outbox: &mut Outbox,
        ready: &Ready,
    ) -> bool {
        let mut buffer = [0; READ_BYTES];
        let mut at = 0;
        let mut drained = true;
        while let Some((kind, fd)) = self.outputs.get(at) {
            if self.exit.is_none() && !ready.is(fd) {
                drained = false;
                at += 1;
                continue;
            }
            let kind = *kind;
            let mut reads = 0;
            let closed = loop {
                let limit = window.may_send().min(READ_BYTES);
                if limit == 0 || !outbox.has_room() || reads == READS_PER_TURN {
                    drained = false;
                    break false;
                }
                reads += 1;
                match rustix::io::read(fd, &mut buffer[..limit]) {
                    Ok(0) => break true,
                    Ok(bytes) => {
                        if self.said.replace(kind) != Some(kind) {
                            outbox.message(stream, &AgentMessage::Output { of: kind });
                        }
                        outbox.data(stream, &buffer[..bytes]);
                        window.sent(bytes);
                    }
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => break false,
                    // A terminal whose last process is gone says EIO.
                    Err(_) => break true,
                }
            };
            if closed {
                self.outputs.remove(at);
            } else {
                at += 1;
            }
        }
        drained
    }
}

/// What is started, as whom and where.
struct Plan<'a> {
    argv: &'a [String],
    environment: Environment,
    directory: &'a str,
    identity: Identity,
    timeout_ms: Option<u64>,
}

impl Plan<'_> {
    fn begin(
        self,
        guest: &mut Guest,
        name: &str,
        ends: io::Result<Ends>,
        now_ms: u64,
    ) -> Result<Exec, AgentError> {
        let identity = &self.identity;
        guest.settle(identity)?;
        let Ends {
            kind,
            stdin,
            outputs,
            theirs,
        } = ends.map_err(|error| refused("make the exec's pipes or terminal", &error))?;
        let mut group = guest
            .groups
            .group(name)
            .map_err(|error| refused("make the exec's group", &io::Error::other(error)))?;
        let launch = Launch {
            argv: self.argv,
            environment: &self.environment,
            secrets: &[],
            directory: self.directory,
            uid: identity.uid,
            gid: identity.gid,
            groups: &identity.groups,
            procs: group.procs(),
            stdio: theirs,
        };
        let pid = match guest.start(&mut group, launch) {
            Ok(pid) => pid,
            Err(error) => {
                guest.leftovers.push(group);
                return Err(error);
            }
        };
        Ok(Exec {
            pid,
            group: Some(group),
            stdin,
            input: VecDeque::new(),
            input_ended: false,
            outputs,
            said: None,
            kind,
            kill_at_ms: self.timeout_ms.map(|ms| now_ms.saturating_add(ms)),
            timed_out: false,
            exit: None,
        })
    }
}

/// Our ends of an exec's input and output, and its own.
struct Ends {
    kind: Kind,
    stdin: Option<OwnedFd>,
    outputs: Vec<(OutputKind, OwnedFd)>,
    theirs: Stdios,
}

impl Ends {
    fn none() -> io::Result<Self> {
        let nowhere = || File::options().write(true).open("/dev/null");
        Ok(Self {
            kind: Kind::Rehearsal,
            stdin: None,
            outputs: Vec::new(),
            theirs: Stdios::Pipes {
                stdin: None,
                stdout: nowhere()?.into(),
                stderr: nowhere()?.into(),
            },
        })
    }

    fn pipes() -> io::Result<Self> {
        let (stdin_theirs, stdin) = pipe_with(PipeFlags::CLOEXEC)?;
        let (out, stdout) = pipe_with(PipeFlags::CLOEXEC)?;
        let (err, stderr) = pipe_with(PipeFlags::CLOEXEC)?;
        // Only our ends: the flag belongs to the open file, and a program that finds its own
        // input non-blocking is surprised.
        for ours in [&stdin, &out, &err] {
            nonblocking(ours)?;
        }
        Ok(Self {
            kind: Kind::Pipes,
            stdin: Some(stdin),
            outputs: vec![(OutputKind::Stdout, out), (OutputKind::Stderr, err)],
            theirs: Stdios::Pipes {
                stdin: Some(stdin_theirs),
                stdout,
                stderr,
            },
        })
    }

    fn terminal(guest: &Guest, size: WindowSize, owner: (u32, u32)) -> io::Result<Self> {
        // The multiplexer of the tenant's own devpts, so that the terminal has a name in there.
        let flags = OFlags::RDWR | OFlags::NONBLOCK;
        let ours = guest
            .open("/dev/pts/ptmx", flags)
            .or_else(|_none| guest.open("/dev/ptmx", flags))
            .map_err(|error| io::Error::other(error.message))?;
        unlockpt(&ours)?;
        let peer = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let theirs = ioctl_tiocgptpeer(&ours, peer)?;
        if rustix::process::geteuid().is_root() {
            let (uid, gid) = (Uid::from_raw(owner.0), Gid::from_raw(owner.1));
            fchown(&theirs, Some(uid), Some(gid))?;
        }
        tcsetwinsize(&ours, winsize(size))?;
        let stdin = ours.try_clone()?;
        Ok(Self {
            kind: Kind::Terminal,
            stdin: Some(stdin),
            outputs: vec![(OutputKind::Stdout, ours)],
            theirs: Stdios::Terminal(theirs),
        })
    }
}

/// Makes reads and writes of `fd` answer at once.
///
/// # Errors
/// Whatever the kernel answers.
pub fn nonblocking(fd: &impl AsFd) -> io::Result<()> {
    Ok(fcntl_setfl(fd, fcntl_getfl(fd)? | OFlags::NONBLOCK)?)
}

fn winsize(size: WindowSize) -> Winsize {
    Winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}
