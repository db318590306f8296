//! The bookkeeping of a session: what the host said, what waits to be sent, how much may be under
//! way.
//!
//! Used by [`crate::agent`]. Pure: it is fed bytes and gives bytes.
//!
//! ```text
//!   port bytes ─▶ Inbox ─▶ Input ─▶ agent ─▶ Outbox ─▶ port bytes
//!                                     │
//!                          Window per stream: credit both ways
//! ```
//! [`Inbox`] survives every session: after bytes that are no frames it looks for the next `Hello`
//! and gives nothing else until then.

use std::collections::VecDeque;

use serde_json::Value;
use spore_wire::frame::{self, Decoder, FRAME_BYTES_MAX, Frame, FrameError, FrameKind, SYNC_MARK};
use spore_wire::guest::{
    AgentError, AgentErrorCode, AgentMessage, CREDIT_BYTES, HostHello, HostMessage, Request,
    WindowSize,
};

/// Output is produced only while less than this waits to be sent.
pub const OUTBOX_BYTES_SOFT: usize = 256 * 1024;

/// The port is read only while less than this waits to be sent: what the host asks makes answers.
pub const OUTBOX_BYTES_HARD: usize = 1024 * 1024;

/// Credit is given back in portions of at least this, or a byte would cost a frame.
const CREDIT_STEP_BYTES: u32 = 32 * 1024;

/// The operations that this agent knows, to tell an unknown one from a malformed one.
const OPERATIONS: [&str; 12] = [
    "status",
    "thaw",
    "freeze",
    "unfreeze",
    "rehearse",
    "start_app",
    "stop_app",
    "exec",
    "read_file",
    "write_file",
    "logs",
    "shutdown",
];

/// The operations whose values may be secret: what is wrong with them is not quoted.
const SECRET_OPERATIONS: [&str; 2] = ["thaw", "start_app"];

/// Something the host said.
#[derive(Debug)]
pub enum Input {
    /// A new session; the one before is over.
    Hello {
        /// As told.
        hello: HostHello,
        /// The bytes to write behind the mark.
        nonce: [u8; 16],
    },
    /// Are you there?
    Ping(u64),
    /// Opens a stream.
    Open(u32, Box<Request>),
    /// Would open a stream, but is to be answered with an error.
    Refuse(u32, AgentError),
    /// More may be sent.
    Credit(u32, u32),
    /// A new window size.
    Resize(u32, WindowSize),
    /// A signal.
    Signal(u32, i32),
    /// The stream is over.
    Cancel(u32),
    /// Bytes.
    Data(u32, Vec<u8>),
    /// No more bytes.
    End(u32),
    /// The session is over without a new one.
    Broken(FrameError),
}

/// Turns the port's bytes into what the host said.
#[derive(Debug, Default)]
pub struct Inbox {
    decoder: Decoder,
    in_session: bool,
}

impl Inbox {
    /// Takes bytes that were read.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.decoder.feed(bytes);
    }

    /// The next thing said, or `None` until more is fed.
    pub fn take(&mut self) -> Option<Input> {
        loop {
            let frame = match self.decoder.next_frame() {
                Ok(None) => return None,
                Ok(Some(frame)) => frame,
                // The rest of a frame that a dead daemon cut; its successor's hello follows.
                Err(FrameError::Checksum) => continue,
                Err(error) => {
                    self.decoder.skip();
                    if std::mem::take(&mut self.in_session) {
                        return Some(Input::Broken(error));
                    }
                    continue;
                }
            };
            let input = input(frame);
            if matches!(input, Some(Input::Hello { .. })) {
                self.in_session = true;
            }
            if self.in_session && input.is_some() {
                return input;
            }
        }
    }
}

fn input(frame: Frame) -> Option<Input> {
    let stream = frame.stream;
    match frame.kind {
        FrameKind::Data => return Some(Input::Data(stream, frame.payload)),
        FrameKind::End => return Some(Input::End(stream)),
        FrameKind::Message => {}
        // The decoder puts parts together.
        FrameKind::Part => return None,
    }
    let message = match serde_json::from_slice(&frame.payload) {
        Ok(message) => message,
        Err(error) => return refusal(stream, &frame.payload, &error),
    };
    Some(match message {
        HostMessage::Hello(hello) if stream == 0 => {
            let nonce = nonce(&hello.nonce)?;
            Input::Hello { hello, nonce }
        }
        HostMessage::Ping { token } if stream == 0 => Input::Ping(token),
        HostMessage::Request { request } if stream != 0 => Input::Open(stream, Box::new(request)),
        HostMessage::Credit { bytes } => Input::Credit(stream, bytes),
        HostMessage::Resize(size) => Input::Resize(stream, size),
        HostMessage::Signal { signal } => Input::Signal(stream, signal),
        HostMessage::Cancel => Input::Cancel(stream),
        // A message on the wrong kind of stream, or of a newer host: nobody waits for an answer.
        _ => return None,
    })
}

/// What to answer to a message that cannot be read, if it opens a stream.
fn refusal(stream: u32, payload: &[u8], error: &serde_json::Error) -> Option<Input> {
    let value: Value = serde_json::from_slice(payload).ok()?;
    if value.get("type")? != "request" || stream == 0 {
        return None;
    }
    let operation = value.pointer("/request/op").and_then(Value::as_str);
    let (code, message) = match operation {
        Some(known) if SECRET_OPERATIONS.contains(&known) => (
            AgentErrorCode::Invalid,
            format!("a `{known}` that is missing a value or has one of a wrong type"),
        ),
        Some(known) if OPERATIONS.contains(&known) => (
            AgentErrorCode::Invalid,
            format!("a malformed `{known}`: {error}"),
        ),
        _ => {
            let name: String = operation.unwrap_or("").chars().take(64).collect();
            let message = format!("operation `{name}` is unknown to this agent: rebuild the VM");
            (AgentErrorCode::Unknown, message)
        }
    };
    Some(Input::Refuse(stream, AgentError { code, message }))
}

fn nonce(text: &str) -> Option<[u8; 16]> {
    let mut bytes = [0; 16];
    if text.len() != 32 || !text.is_ascii() {
        return None;
    }
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(at * 2..at * 2 + 2)?, 16).ok()?;
    }
    Some(bytes)
}

/// Frames that wait to be written to the port.
#[derive(Debug, Default)]
pub struct Outbox {
    bytes: VecDeque<u8>,
    scratch: Vec<u8>,
}

impl Outbox {
    /// Drops everything that was for the session before and marks the beginning of a new one.
    pub fn begin(&mut self, nonce: [u8; 16]) {
        self.bytes.clear();
        self.bytes.extend(SYNC_MARK);
        self.bytes.extend(nonce);
    }

    /// Adds a message. One that does not fit a frame is a bug of the caller's limits, and becomes
    /// an error on the same stream instead of ending the VM. Gives the bytes that it takes, which
    /// only log records have to be paid for with credit.
    pub fn message(&mut self, stream: u32, message: &AgentMessage) -> usize {
        let text = serde_json::to_vec(message).unwrap_or_default();
        if text.is_empty() || text.len() > FRAME_BYTES_MAX {
            let error = AgentMessage::Error(AgentError {
                code: AgentErrorCode::TooMany,
                message: format!("an answer of {} bytes does not fit a frame", text.len()),
            });
            let text = serde_json::to_vec(&error).unwrap_or_default();
            self.frame(stream, FrameKind::Message, &text);
            return text.len();
        }
        self.frame(stream, FrameKind::Message, &text);
        text.len()
    }

    /// Adds bytes of a stream, in as many frames as they need.
    pub fn data(&mut self, stream: u32, bytes: &[u8]) {
        for part in bytes.chunks(FRAME_BYTES_MAX) {
            self.frame(stream, FrameKind::Data, part);
        }
    }

    /// Says that no more data follows.
    pub fn end(&mut self, stream: u32) {
        self.frame(stream, FrameKind::End, &[]);
    }

    /// What waits, as it is to be written next.
    #[must_use]
    pub fn waiting(&self) -> &[u8] {
        let (first, second) = self.bytes.as_slices();
        if first.is_empty() { second } else { first }
    }

    /// Notes that so much of [`Outbox::waiting`] was written.
    pub fn written(&mut self, bytes: usize) {
        self.bytes.drain(..bytes.min(self.bytes.len()));
        if self.bytes.is_empty() && self.bytes.capacity() > OUTBOX_BYTES_SOFT * 2 {
            self.bytes.shrink_to(OUTBOX_BYTES_SOFT);
        }
    }

    /// How much waits.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Whether streams may add output.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.bytes.len() < OUTBOX_BYTES_SOFT
    }

    fn frame(&mut self, stream: u32, kind: FrameKind, payload: &[u8]) {
        self.scratch.clear();
        match frame::encode(stream, kind, payload, &mut self.scratch) {
            Ok(()) => self.bytes.extend(&self.scratch),
            Err(_too_large) => debug_assert!(false, "callers cut what they send"),
        }
    }
}

/// How much may be under way on one stream, in each direction.
#[derive(Debug)]
pub struct Window {
    /// What we may still send.
    send: u32,
    /// What the host may still send.
    receive: u32,
    /// What was used up of what the host sent and not credited yet.
    used: u32,
}

impl Default for Window {
    fn default() -> Self {
        Self {
            send: CREDIT_BYTES,
            receive: CREDIT_BYTES,
            used: 0,
        }
    }
}

impl Window {
    /// How much may be sent now.
    #[must_use]
    pub const fn may_send(&self) -> usize {
        self.send as usize
    }

    /// Whether a whole frame may be sent now, as log records need it.
    #[must_use]
    pub const fn may_send_frame(&self) -> bool {
        self.send as usize >= FRAME_BYTES_MAX
    }

    /// Notes that so much was sent, at most [`Window::may_send`].
    pub fn sent(&mut self, bytes: usize) {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        self.send = self.send.saturating_sub(bytes);
    }

    /// The host lets us send more.
    pub const fn credited(&mut self, bytes: u32) {
        self.send = self.send.saturating_add(bytes);
    }

    /// Notes that so much came. False when the host had no credit for it.
    #[must_use]
    pub fn received(&mut self, bytes: usize) -> bool {
        let left = u32::try_from(bytes)
            .ok()
            .and_then(|bytes| self.receive.checked_sub(bytes));
        match left {
            Some(left) => {
                self.receive = left;
                true
            }
            None => false,
        }
    }

    /// Notes that so much of what came was used up, and says how much to credit, if it is time.
    pub fn used(&mut self, bytes: usize) -> Option<u32> {
        self.used = self
            .used
            .saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX))
            .min(CREDIT_BYTES - self.receive);
        (self.used >= CREDIT_STEP_BYTES).then(|| {
            let credit = std::mem::take(&mut self.used);
            self.receive += credit;
            credit
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{prop, prop_assert, proptest};
    use spore_wire::frame::{self, FrameKind, PREAMBLE_BYTES};
    use spore_wire::guest::{AgentErrorCode, CREDIT_BYTES};

    use super::{Inbox, Input, Outbox, Window};

    const HELLO: &str =
        r#"{"type":"hello","generation":1,"nonce":"00112233445566778899aabbccddeeff"}"#;

    fn message(stream: u32, text: &str) -> Vec<u8> {
        let mut out = Vec::new();
        frame::encode(stream, FrameKind::Message, text.as_bytes(), &mut out).unwrap();
        out
    }

    fn greeted() -> Inbox {
        let mut inbox = Inbox::default();
        inbox.feed(&[0; PREAMBLE_BYTES]);
        inbox.feed(&message(0, HELLO));
        assert!(matches!(inbox.take(), Some(Input::Hello { nonce, .. }) if nonce[15] == 0xff));
        inbox
    }

    #[test]
    fn nothing_counts_before_a_hello() {
        let mut inbox = Inbox::default();
        inbox.feed(&message(0, r#"{"type":"ping","token":1}"#));
        assert!(inbox.take().is_none());
        inbox.feed(&message(0, HELLO));
        assert!(matches!(inbox.take(), Some(Input::Hello { .. })));
    }

    #[test]
    fn a_hello_behind_garbage_in_the_same_read_is_found() {
        let mut inbox = greeted();
        let mut bytes = b"garbage".to_vec();
        bytes.extend_from_slice(&[0; PREAMBLE_BYTES]);
        bytes.extend_from_slice(&message(0, HELLO));
        inbox.feed(&bytes);
        assert!(matches!(inbox.take(), Some(Input::Broken(_))));
        assert!(matches!(inbox.take(), Some(Input::Hello { .. })));
    }

    #[test]
    fn an_unknown_operation_and_a_malformed_one_are_told_apart_and_no_secret_is_quoted() {
        let mut inbox = greeted();
        inbox.feed(&message(
            1,
            r#"{"type":"request","request":{"op":"teleport"}}"#,
        ));
        inbox.feed(&message(
            3,
            r#"{"type":"request","request":{"op":"exec","argv":7}}"#,
        ));
        inbox.feed(&message(
            5,
            r#"{"type":"request","request":{"op":"start_app","command":"hunter2"}}"#,
        ));
        inbox.feed(&message(0, r#"{"type":"of_tomorrow"}"#));
        let mut codes = Vec::new();
        while let Some(Input::Refuse(_stream, error)) = inbox.take() {
            assert!(!error.message.contains("hunter2"));
            codes.push(error.code);
        }
        use AgentErrorCode::{Invalid, Unknown};
        assert_eq!(codes, [Unknown, Invalid, Invalid]);
    }

    #[test]
    fn a_new_session_forgets_what_waited_for_the_old_one() {
        let mut outbox = Outbox::default();
        outbox.data(1, &[7; 200_000]);
        outbox.written(100);
        outbox.begin([3; 16]);
        assert_eq!(outbox.len(), 24);
        assert!(outbox.waiting().ends_with(&[3; 16]));
    }

    proptest! {
        #[test]
        fn a_host_that_keeps_to_its_credit_is_never_refused_and_never_starves(
            steps in prop::collection::vec((0_u32..80_000, 0_u32..80_000), 1..200),
        ) {
            let mut window = Window::default();
            let (mut credit, mut unused) = (CREDIT_BYTES, 0_u32);
            for (send, work_off) in steps {
                let send = send.min(credit);
                prop_assert!(window.received(send as usize));
                credit -= send;
                unused += send;
                let work_off = work_off.min(unused);
                unused -= work_off;
                credit += window.used(work_off as usize).unwrap_or(0);
                prop_assert!(credit <= CREDIT_BYTES);
                prop_assert!(credit + unused + super::CREDIT_STEP_BYTES > CREDIT_BYTES);
            }
            prop_assert!(!window.received(credit as usize + 1));
        }
    }
}
