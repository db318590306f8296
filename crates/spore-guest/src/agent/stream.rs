//! What was begun for the host and is not over: one stream each, with its credit.
//!
//! Part of the session loop. A stream ends with one answer, and its number is not used again.

use spore_wire::guest::{AgentError, AgentErrorCode, AgentMessage, Reply, STREAMS_MAX};

use super::freeze::Life;
use super::{Agent, Machine};
use crate::exec::Exec;
use crate::file::{FileReader, FileWriter};
use crate::interest::Ready;
use crate::runner::Runner;
use crate::session::{Outbox, Window};

#[derive(Debug)]
pub(super) struct Stream {
    pub(super) window: Window,
    pub(super) job: Job,
}

#[derive(Debug)]
pub(super) enum Job {
    Exec(Box<Exec>),
    Read(FileReader),
    Write(FileWriter),
    Logs {
        cursor: u64,
    },
    StopApp,
    Freeze,
    /// Waits for the processes that were told of a fork.
    Hooks {
        until_ms: u64,
        within_ms: u64,
    },
}

impl<M: Machine> Agent<M> {
    pub(super) fn exec(&mut self, stream: u32) -> Option<&mut Exec> {
        match self.streams.get_mut(&stream) {
            Some(Stream {
                job: Job::Exec(exec),
                ..
            }) => Some(exec),
            _ => None,
        }
    }

    pub(super) fn abandon(&mut self, job: Job) {
        match job {
            Job::Exec(exec) => {
                if let Err(error) = exec.abandon(&mut self.guest) {
                    crate::console::say(&format!("cannot kill an exec: {error}"));
                }
            }
            // Nobody waits for the copy any more.
            Job::Freeze => {
                if let Life::Freezing { name, .. } = &self.life {
                    let name = name.clone();
                    self.go_on(name);
                }
            }
            Job::Read(_) | Job::Write(_) | Job::Logs { .. } | Job::StopApp | Job::Hooks { .. } => {}
        }
    }

    pub(super) fn cancel(&mut self, stream: u32) {
        if let Some(stream) = self.streams.remove(&stream) {
            self.abandon(stream.job);
        }
    }

    pub(super) fn fail(&mut self, stream: u32, error: AgentError) {
        self.cancel(stream);
        self.outbox.message(stream, &AgentMessage::Error(error));
    }

    pub(super) fn reply(&mut self, stream: u32, reply: Reply) {
        self.streams.remove(&stream);
        self.outbox.message(stream, &AgentMessage::Reply { reply });
    }

    /// Whether a stream may be opened; a number is used once.
    pub(super) fn admit(&mut self, stream: u32) -> Result<(), AgentError> {
        if stream.is_multiple_of(2) || stream <= self.last_stream {
            return Err(AgentError {
                code: AgentErrorCode::Invalid,
                message: format!(
                    "stream {stream} cannot be opened: an odd number over {} can",
                    self.last_stream
                ),
            });
        }
        self.last_stream = stream;
        if self.streams.len() >= STREAMS_MAX {
            return Err(AgentError {
                code: AgentErrorCode::TooMany,
                message: format!("{STREAMS_MAX} streams are open: wait until one has ended"),
            });
        }
        Ok(())
    }

    pub(super) fn data(&mut self, number: u32, bytes: &[u8]) {
        let Some(stream) = self.streams.get_mut(&number) else {
            return;
        };
        if !stream.window.received(bytes.len()) {
            let error = AgentError {
                code: AgentErrorCode::TooMany,
                message: "more bytes than there was credit for".to_owned(),
            };
            self.fail(number, error);
            return;
        }
        match &mut stream.job {
            Job::Exec(exec) => exec.input(bytes),
            Job::Write(file) => match file.write(bytes) {
                Ok(()) => {
                    if let Some(bytes) = stream.window.used(bytes.len()) {
                        self.outbox.message(number, &AgentMessage::Credit { bytes });
                    }
                }
                Err(error) => self.fail(number, error),
            },
            Job::Read(_) | Job::Logs { .. } | Job::StopApp | Job::Freeze | Job::Hooks { .. } => {}
        }
    }

    pub(super) fn end(&mut self, number: u32) {
        match self.streams.get_mut(&number) {
            Some(Stream {
                job: Job::Exec(exec),
                ..
            }) => exec.end_input(),
            Some(Stream {
                job: Job::Write(_), ..
            }) => {
                if let Some(Stream {
                    job: Job::Write(file),
                    ..
                }) = self.streams.remove(&number)
                {
                    match file.finish() {
                        Ok(()) => self.reply(number, Reply::Done),
                        Err(error) => self.fail(number, error),
                    }
                }
            }
            _ => {}
        }
    }

    pub(super) fn pump_streams(&mut self, ready: &Ready, now_ms: u64) {
        let mut over = Vec::new();
        // Each turn begins behind the stream with which the last one began, so that one which
        // fills the outbox does not starve those of higher numbers.
        let first = self.first_pumped.wrapping_add(1);
        let numbers = self
            .streams
            .range(first..)
            .chain(self.streams.range(..first));
        let numbers: Vec<u32> = numbers.map(|(number, _stream)| *number).collect();
        self.first_pumped = numbers.first().copied().unwrap_or(0);
        for number in numbers {
            if let Some(stream) = self.streams.get_mut(&number)
                && let Some(end) = pump(number, stream, &mut self.outbox, &self.app, ready, now_ms)
            {
                over.push((number, end));
            }
        }
        for (number, end) in over {
            if let Some(Stream {
                job: Job::Exec(exec),
                ..
            }) = self.streams.remove(&number)
            {
                exec.finish(&mut self.guest);
            }
            match end {
                Ok(reply) => self.reply(number, reply),
                Err(error) => self.fail(number, error),
            }
        }
    }
}

fn pump(
    number: u32,
    stream: &mut Stream,
    outbox: &mut Outbox,
    app: &Runner,
    ready: &Ready,
    now_ms: u64,
) -> Option<Result<Reply, AgentError>> {
    let window = &mut stream.window;
    match &mut stream.job {
        Job::Exec(exec) => exec
            .pump(number, window, outbox, ready, now_ms)
            .map(|exit| Ok(Reply::Exit(exit))),
        Job::Read(file) => file.pump(number, window, outbox).transpose(),
        Job::Logs { cursor } => {
            // Bounded by credit and not by the port: its queue holds 32 MiB of the kernel's memory
            // (1,024 buffers of up to 32 KiB), while the host takes its time.
            while outbox.has_room()
                && window.may_send_frame()
                && let Some(batch) = app.log().batch(cursor)
            {
                window.sent(outbox.message(number, &AgentMessage::Logs(batch)));
            }
            None
        }
        Job::Write(_) | Job::StopApp | Job::Freeze | Job::Hooks { .. } => None,
    }
}
