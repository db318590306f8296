//! Host and agent: what may be said on the agent's channel.
//!
//! Spoken by `spore-node` (host) and `spore-guest` (agent, PID 1), inside the frames of
//! [`crate::frame`]. Messages are JSON objects tagged by `type`; unknown fields are ignored, so
//! that a newer host can talk to an agent frozen in a snapshot. Neither side believes the other:
//! the host treats every message as written by a tenant.
//!
//! # Session
//!
//! ```text
//!   host                                         agent
//!    │ zeros (preamble)                            │
//!    │ [0] Hello{generation, nonce} ─────────────▶ │  drops whatever session was before
//!    │ ◀───────────── mark, nonce, [0] Hello{...}  │
//!    │ [n] a Request, n odd and rising ──────────▶ │
//!    │ ◀──────────────────────── [n] Reply or Error│  a request ends with Reply or Error
//!    │ ◀──────────────────────────────── [0] Event │  unasked news
//! ```
//!
//! # Fork
//!
//! ```text
//!   booted ──Thaw──▶ running ──Freeze──▶ frozen ──Unfreeze(its own name)──▶ running
//!                                          │ copied
//!                                          ▼
//!                                    fork: frozen ──Thaw(a new name)──▶ running
//!                                                        └─hold──▶ frozen ──Unfreeze──▶ running
//! ```
//!
//! Only the host opens streams. A request that carries or returns bytes uses `Data` frames on its
//! stream, at most [`CREDIT_BYTES`] ahead of the receiver's `Credit` messages, in each direction,
//! so one stream cannot starve the others. The payload of a `Logs` message counts as such bytes;
//! no other message does. `End` closes the sender's direction. `Cancel` ends a
//! stream from the host's side: the agent kills what it started for it and answers nothing more.

use serde::{Deserialize, Serialize};

use crate::secret::SecretBytes;

/// The bytes that a sender may have under way on one stream before it waits for `Credit`.
pub const CREDIT_BYTES: u32 = 256 * 1024;

/// The most streams that may be open in one session.
pub const STREAMS_MAX: usize = 256;

/// The most bytes of one log record's text; a longer line is cut into several records.
pub const LOG_LINE_BYTES_MAX: usize = 8 * 1024;

/// The bytes of log that the agent keeps for a host that is away; older records are dropped and
/// counted.
pub const LOG_RING_BYTES: usize = 512 * 1024;

/// The virtio-serial port that carries this channel; the guest sees it in
/// `/sys/class/virtio-ports/*/name`.
pub const PORT_NAME: &str = "spore.agent";

/// The address of the guest's only interface, the same in every VM.
pub const GUEST_ADDRESS: [u8; 4] = [10, 42, 0, 2];

/// The host's side of the tap, the same in every VM.
pub const HOST_ADDRESS: [u8; 4] = [10, 42, 0, 1];

/// The network of the tap is `10.42.0.0/30`.
pub const ADDRESS_PREFIX: u8 = 30;

/// The user that a process runs as when nobody names one.
pub const DEFAULT_UID: u32 = 1000;

/// What the host says.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[non_exhaustive]
pub enum HostMessage {
    /// Begins a session, on stream 0. Legal at any time; ends the session before.
    Hello(HostHello),
    /// Asks whether the agent is there, on stream 0; answered by [`AgentMessage::Pong`].
    Ping {
        /// Given back in the answer.
        token: u64,
    },
    /// Opens a stream with one request. Legal once per stream.
    Request {
        /// What is asked.
        request: Request,
    },
    /// Lets the agent send so many more bytes on this stream.
    Credit {
        /// Added to what may be under way.
        bytes: u32,
    },
    /// The window of a running exec with a pty has a new size.
    Resize(WindowSize),
    /// Sends a signal to a running exec's process group.
    Signal {
        /// The number, as in signal(7).
        signal: i32,
    },
    /// Ends this stream: what runs for it is killed.
    Cancel,
}

/// The host's greeting.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostHello {
    /// [`crate::generation::GENERATION`] of the host.
    pub generation: u32,
    /// 32 hexadecimal digits, random: the agent writes its 16 bytes behind the mark.
    pub nonce: String,
}

/// What the agent says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[non_exhaustive]
pub enum AgentMessage {
    /// Answers the host's hello, on stream 0.
    Hello(AgentHello),
    /// Answers a ping, on stream 0.
    Pong {
        /// From the ping.
        token: u64,
    },
    /// News, on stream 0.
    Event {
        /// What happened.
        event: Event,
    },
    /// Lets the host send so many more bytes on this stream.
    Credit {
        /// Added to what may be under way.
        bytes: u32,
    },
    /// Part of a stream: the data frames that follow are of this output, until the next one.
    Output {
        /// Which of the two.
        of: OutputKind,
    },
    /// Log records, on a stream opened by [`Request::Logs`].
    Logs(LogBatch),
    /// The request succeeded; ends the stream.
    Reply {
        /// What was asked for.
        reply: Reply,
    },
    /// The request failed; ends the stream.
    Error(AgentError),
}

/// The agent's greeting.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentHello {
    /// [`crate::generation::GENERATION`] of the agent.
    pub generation: u32,
    /// The version of the agent's package, for people.
    pub version: String,
    /// The guest's `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
    /// Whether this VM has been thawed since it was booted or forked, and is not frozen since.
    pub thawed: bool,
    /// Whether the tenant's processes stand still; a fork of a frozen VM says what its source said.
    #[serde(default)]
    pub frozen: bool,
    /// What the last thaw named this VM: a fork that says another's name has not been thawed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub incarnation: Option<String>,
    /// The app as it is now.
    pub app: AppStatus,
}

/// What the host may ask.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Request {
    /// Answered by [`Reply::Status`].
    Status,
    /// Renews what a VM must not share with another. Legal once after a boot or fork, before
    /// anything else but `Status`, and again while it is held; every other request is refused until
    /// it has succeeded. Answered by [`Reply::Thawed`], or by `Done` where it names no steps.
    Thaw(Thaw),
    /// Makes the tenant's processes stand still, so that the VM can be copied. Legal once thawed
    /// under a name, with no shutdown under way. Answered when they do; session and streams stay.
    Freeze,
    /// Lets the tenant's processes run: of a source that goes on, or after a thaw that held them.
    /// Legal when frozen, by the VM of that name alone: a fork of it has to be thawed instead.
    /// Answered by `Done`, or by [`Reply::Resumed`] where processes had asked to hear of a fork.
    Unfreeze {
        /// As in [`Thaw::incarnation`].
        incarnation: String,
        /// How long all processes that asked to hear of a fork may take together, in milliseconds;
        /// `None` for what the agent thinks right.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        hooks_ms: Option<u64>,
    },
    /// Starts the app and keeps it running. Legal when none runs.
    StartApp(StartApp),
    /// Stops the app: SIGTERM, then SIGKILL to whatever is left. Answered when nothing is left.
    StopApp {
        /// Between the two signals.
        grace_ms: u64,
    },
    /// Runs a program. Data frames are its stdin; its output comes back as `Output` and data.
    Exec(Exec),
    /// Runs a program once, so that a fork finds what it read in memory: as [`DEFAULT_UID`] in `/`,
    /// with no input, its output dropped. Legal before an app was started. Answered by
    /// [`Reply::Exit`] when nothing of it is left: what outlives its first process is killed.
    Rehearse {
        /// Program and arguments.
        argv: Vec<String>,
        /// After this it is killed.
        timeout_ms: u64,
    },
    /// Reads a file, sent as data frames, answered by [`Reply::File`].
    ReadFile {
        /// Absolute, as the app sees it.
        path: String,
    },
    /// Writes a file from data frames until `End`; complete or not at all.
    WriteFile(WriteFile),
    /// Streams log records from `after` on, as `Logs` messages, until cancelled.
    Logs {
        /// The sequence number of the last record already had; 0 for none.
        after: u64,
    },
    /// Stops the app, syncs and powers off. Answered before the power goes.
    Shutdown {
        /// Between SIGTERM and SIGKILL.
        grace_ms: u64,
    },
}

/// What every VM renews before a tenant's first instruction.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Thaw {
    /// Nanoseconds since the Unix epoch, read as late as possible.
    pub realtime_ns: u64,
    /// At least 32 fresh random bytes for the guest's kernel (RNDADDENTROPY, RNDRESEEDCRNG).
    pub entropy: SecretBytes,
    /// The guest's host name.
    pub hostname: String,
    /// 32 hexadecimal digits for `/etc/machine-id` (machine-id(5)).
    pub machine_id: String,
    /// The address of the resolver that the guest may ask; `None` without egress.
    pub resolver: Option<[u8; 4]>,
    /// What is on the disk of the app's folder, by a name that differs where the content does;
    /// `None` where nothing is. Not named, it is hidden: a fork keeps nothing of its source's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub folder: Option<String>,
    /// The VM's id as text, new for each fork; empty from a host of generation 1.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub incarnation: String,
    /// What is to be renewed; done in the order of [`ThawStep`], whatever the order here. Empty
    /// from a host of generation 1, and then everything is.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<ThawStep>,
    /// Whether the tenant's processes stay frozen until `Unfreeze`.
    #[serde(default, skip_serializing_if = "core::ops::Not::not")]
    pub hold: bool,
    /// What the app may know; `None` where there is nothing to give. A fork keeps what its source
    /// was given, and one whose app runs with something else is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secrets: Option<AppSecrets>,
}

/// What an app knows that nobody else may.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppSecrets {
    /// Names and values, added to the app's environment whenever it is started.
    pub environment: Vec<(String, SecretBytes)>,
    /// Names and values, written to `/run/secrets/NAME` (tmpfs).
    pub files: Vec<(String, SecretBytes)>,
}

/// A part of a thaw. The host ends a VM whose answer lacks one that it knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ThawStep {
    /// What is at `/app`: that of [`Thaw::folder`]. One of the same name stays as it is.
    Folder,
    /// The kernel's random numbers; before whatever may use them.
    Entropy,
    /// The clock of the day.
    Clock,
    /// Host name, machine id, `hosts` and `resolv.conf`.
    Names,
    /// What the tenant reads as the kernel's boot id.
    BootId,
    /// The host's address on the link.
    Neighbour,
    /// The end of connections to outside, whose other ends are a source's. Those inside the guest
    /// stay.
    Sockets,
    /// What was printed before, which is a source's to tell. A fork's records are numbered anew.
    Logs,
    /// What [`Thaw::secrets`] gives is in place. Last, since a guest that is not renewed must not
    /// come to know any.
    Secrets,
    /// One of a later generation, which this side does not know and has not done.
    #[serde(other)]
    Unknown,
}

impl ThawStep {
    /// Every step that this build knows, in the order in which they are done.
    pub const ALL: [Self; 9] = [
        Self::Folder,
        Self::Entropy,
        Self::Clock,
        Self::Names,
        Self::BootId,
        Self::Neighbour,
        Self::Sockets,
        Self::Logs,
        Self::Secrets,
    ];
}

/// The app's process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StartApp {
    /// Program and arguments; the program is looked up in the `PATH` of `environment`.
    pub command: Vec<String>,
    /// The working directory, as the app sees it.
    pub directory: String,
    /// Names and values that are no secrets.
    pub environment: Vec<(String, String)>,
    /// As in [`AppSecrets::environment`]; `None` where the thaw gave the secrets. An agent that
    /// takes none from a thaw refuses a start without this field, instead of an app without them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_environment: Option<Vec<(String, SecretBytes)>>,
    /// As in [`AppSecrets::files`], in the same way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_files: Option<Vec<(String, SecretBytes)>>,
    /// `name`, `uid` or `uid:gid`, as in the image; `None` is [`DEFAULT_UID`].
    pub user: Option<String>,
    /// The port on which it will listen.
    pub port: u16,
    /// When it counts as ready.
    pub ready: Readiness,
    /// How long it may take to become ready; then [`Event::AppUnready`] is told.
    pub ready_timeout_ms: u64,
}

/// When an app counts as ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "by", rename_all = "snake_case")]
pub enum Readiness {
    /// When its port accepts a connection.
    Port,
    /// When a GET of this path on its port answers 2xx.
    Http {
        /// Begins with `/`.
        path: String,
    },
}

/// A program to run beside the app.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Added to the app's own environment (without its secrets).
    pub environment: Vec<(String, String)>,
    /// `None` is the app's working directory.
    pub directory: Option<String>,
    /// As in [`StartApp::user`].
    pub user: Option<String>,
    /// A terminal of this size; `None` gives pipes.
    pub pty: Option<WindowSize>,
    /// After this it is killed; `None` never.
    pub timeout_ms: Option<u64>,
}

/// The size of a terminal, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// A file to write.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriteFile {
    /// Absolute, as the app sees it; the folder must exist.
    pub path: String,
    /// Permission bits, at most `0o777`.
    pub mode: u32,
    /// As in [`StartApp::user`]; the owner of the file.
    pub user: Option<String>,
}

/// Where output comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutputKind {
    /// Standard output, or the pty.
    Stdout,
    /// Standard error.
    Stderr,
}

/// What a request gave.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "of", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Reply {
    /// It was done; there is nothing to tell.
    Done,
    /// The answer to `Status`.
    Status(AgentStatus),
    /// The VM is thawed.
    Thawed(Thawed),
    /// The tenant's processes run, and those that had asked for it know that they are a fork's.
    Resumed(Resumed),
    /// An exec or rehearsal ended.
    Exit(Exit),
    /// A file was sent whole.
    File {
        /// Its bytes.
        bytes: u64,
        /// Its permission bits.
        mode: u32,
    },
}

/// What a thaw has renewed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Thawed {
    /// The steps that were done and how many microseconds each took.
    pub done: Vec<(ThawStep, u64)>,
    /// The guest's clock at the end, in nanoseconds since the Unix epoch.
    pub realtime_ns: u64,
}

/// What became of the processes that had asked to hear of a fork.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resumed {
    /// How many said that they have done what a fork has to do.
    pub done: u32,
    /// How many had not within the agent's limit.
    pub late: u32,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "by", rename_all = "snake_case")]
pub enum Exit {
    /// It returned.
    Code {
        /// 0 to 255.
        code: u8,
    },
    /// A signal ended it.
    Signal {
        /// As in signal(7).
        signal: i32,
    },
    /// Its time was up and it was killed.
    Timeout,
}

impl core::fmt::Display for Exit {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Code { code } => write!(f, "exit code {code}"),
            Self::Signal { signal } => write!(f, "signal {signal}"),
            Self::Timeout => f.write_str("its time up"),
        }
    }
}

/// The agent as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentStatus {
    /// Since the guest's kernel started.
    pub uptime_ms: u64,
    /// As in [`AgentHello::thawed`].
    pub thawed: bool,
    /// As in [`AgentHello::frozen`].
    #[serde(default)]
    pub frozen: bool,
    /// As in [`AgentHello::incarnation`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub incarnation: Option<String>,
    /// The app.
    pub app: AppStatus,
    /// `MemAvailable` of the guest.
    pub memory_available_kib: u64,
    /// Processes in the guest, the agent aside.
    pub processes: u32,
}

/// The app's process as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum AppStatus {
    /// Nobody has started it.
    #[default]
    Absent,
    /// It runs and is not ready yet.
    Starting {
        /// In the guest.
        pid: u32,
    },
    /// It runs and is ready.
    Ready {
        /// In the guest.
        pid: u32,
    },
    /// It ended and will be started again.
    Backoff {
        /// Ends since the last time it was ready.
        failures: u32,
        /// Until the next start.
        restart_in_ms: u64,
        /// How the last one ended.
        exit: Exit,
    },
    /// It was stopped.
    Stopped,
}

/// What the agent tells unasked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Event {
    /// The app has a new status.
    App(AppStatus),
    /// The app was not ready within its time. It goes on running.
    AppUnready {
        /// What was seen instead, for people.
        reason: String,
    },
    /// Something inside asks that the VM is not reaped for so long from now; 0 takes it back.
    KeepAwake {
        /// At most one day.
        for_ms: u64,
    },
    /// The kernel killed a process of the app for want of memory.
    OutOfMemory {
        /// Since boot.
        kills: u64,
    },
}

/// Some lines of the app.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogBatch {
    /// In the order of `sequence`.
    pub records: Vec<LogRecord>,
    /// Records that were dropped since the last batch, because nobody read them in time.
    pub dropped: u64,
}

/// One line of the app.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogRecord {
    /// From 1 on, rising, without gaps unless records were dropped.
    pub sequence: u64,
    /// Microseconds since the Unix epoch, by the guest's clock.
    pub at_us: u64,
    /// Which output.
    pub from: OutputKind,
    /// Without the line's end; bytes that are not UTF-8 are replaced by U+FFFD.
    pub text: String,
    /// Whether the line was cut and goes on in the next record of the same output.
    #[serde(default, skip_serializing_if = "core::ops::Not::not")]
    pub continues: bool,
}

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentError {
    /// For programs.
    pub code: AgentErrorCode,
    /// For people: the value that was wrong and what would be right.
    pub message: String,
}

/// The kinds of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum AgentErrorCode {
    /// The request is not legal now.
    NotNow,
    /// A value in the request is wrong.
    Invalid,
    /// A file, user or program is not there.
    NotFound,
    /// The guest's kernel refused.
    Refused,
    /// A limit of the session was reached.
    TooMany,
    /// The agent does not know the request: it is of an older generation.
    Unknown,
}
