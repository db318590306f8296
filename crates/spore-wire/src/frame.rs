//! The outer frame of the agent's channel: a byte stream in, frames out, whatever came before.
//!
//! Called by `spore-guest` and by `spore-node`'s guest channel. Never reads or writes itself: it
//! is fed bytes and gives frames (sans-IO), so both the blocking and the async side use it.
//!
//! # The frame
//!
//! ```text
//!   0      1      2        4              8            12             16
//!   ┌──────┬──────┬────────┬──────────────┬────────────┬──────────────┬─────────┐
//!   │ 0xa5 │flags │ zero   │ stream (LE)  │ len (LE)   │ crc32 (LE)   │ payload │
//!   └──────┴──────┴────────┴──────────────┴────────────┴──────────────┴─────────┘
//! ```
//!
//! A message of the host that does not fit one frame is sent as `Part` frames and a last `Message`
//! frame, back to back, all on its stream: up to [`MESSAGE_BYTES_MAX`] bytes. An agent's messages
//! always fit one frame, so a host holds no more than that for a hostile one.
//!
//! `crc32` (IEEE 802.3) covers bytes 0..12 and the payload. It is not a protection against an
//! attacker; it tells a frame cut by a dead daemon from a whole one.
//!
//! # Why resynchronisation is needed
//!
//! A virtio-serial port is one byte stream that outlives the daemon at its host end. A daemon that
//! dies in the middle of a write leaves half a frame behind, and one that dies in the middle of a
//! read leaves the guest's half. So a session begins like this:
//!
//! 1. The host writes [`PREAMBLE_BYTES`] zero bytes, then a `Hello` frame with a random nonce. The
//!    zeros complete whatever half frame the agent's decoder is in (its checksum fails, it is
//!    dropped); between frames zeros are skipped.
//! 2. The agent writes [`SYNC_MARK`] and the nonce, then its own `Hello`. The host discards
//!    everything before that mark: the nonce was not known to whatever wrote the bytes before it.

use thiserror::Error;

/// The most payload bytes of one frame; the first limit on what a peer can make us allocate.
pub const FRAME_BYTES_MAX: usize = 64 * 1024;

/// The most bytes of one message of the host: what an app is started with, secrets included.
pub const MESSAGE_BYTES_MAX: usize = 1024 * 1024;

/// The bytes before a frame's payload.
pub const HEADER_BYTES: usize = 16;

/// Zero bytes that a host writes before its `Hello`: enough to end any half frame.
pub const PREAMBLE_BYTES: usize = FRAME_BYTES_MAX + HEADER_BYTES;

/// What the agent writes before the nonce and its `Hello`.
pub const SYNC_MARK: [u8; 8] = *b"\xa5SPORE\x00\xa5";

const MAGIC: u8 = 0xa5;

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameKind {
    /// One message, JSON.
    Message,
    /// Bytes of the stream.
    Data,
    /// The sender will send no more data on this stream; the payload is empty.
    End,
    /// The beginning or middle of a message whose last piece comes as `Message`. A decoder puts
    /// them together and never gives one out.
    Part,
}

impl FrameKind {
    const fn to_flags(self) -> u8 {
        match self {
            Self::Message => 0,
            Self::Data => 1,
            Self::End => 2,
            Self::Part => 3,
        }
    }

    const fn from_flags(flags: u8) -> Option<Self> {
        match flags {
            0 => Some(Self::Message),
            1 => Some(Self::Data),
            2 => Some(Self::End),
            3 => Some(Self::Part),
            _ => None,
        }
    }
}

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// The stream it belongs to; 0 is the session itself.
    pub stream: u32,
    /// What it carries.
    pub kind: FrameKind,
    /// At most [`FRAME_BYTES_MAX`] bytes; of a message that came in parts, [`MESSAGE_BYTES_MAX`].
    pub payload: Vec<u8>,
}

/// Why a byte stream cannot be read as frames. The session ends; the VM does not.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum FrameError {
    /// A byte between frames that starts none.
    #[error("byte {0:#04x} where a frame should begin")]
    NotAFrame(u8),
    /// A payload over the limit.
    #[error("frame of {0} bytes; at most {FRAME_BYTES_MAX} are allowed")]
    TooLarge(usize),
    /// A message over the limit, or in parts where none are allowed.
    #[error("message of at least {0} bytes, more than is allowed")]
    MessageTooLarge(usize),
    /// Flags of a later generation, or damage.
    #[error("frame with unknown flags {0:#04x}")]
    UnknownFlags(u8),
    /// A frame cut in the middle and completed by other bytes.
    #[error("frame with a wrong checksum")]
    Checksum,
}

/// Appends one frame to `out`.
///
/// # Errors
/// [`FrameError::TooLarge`]; nothing is appended then.
pub fn encode(
    stream: u32,
    kind: FrameKind,
    payload: &[u8],
    out: &mut Vec<u8>,
) -> Result<(), FrameError> {
    let len = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    if payload.len() > FRAME_BYTES_MAX {
        return Err(FrameError::TooLarge(payload.len()));
    }
    let mut header = [0_u8; 12];
    header[0] = MAGIC;
    header[1] = kind.to_flags();
    header[4..8].copy_from_slice(&stream.to_le_bytes());
    header[8..12].copy_from_slice(&len.to_le_bytes());
    let checksum = checksum(&header, payload);
    out.reserve(HEADER_BYTES + payload.len());
    out.extend_from_slice(&header);
    out.extend_from_slice(&checksum.to_le_bytes());
    out.extend_from_slice(payload);
    Ok(())
}

/// Appends one message to `out`, in as many frames as it takes.
///
/// # Errors
/// [`FrameError::MessageTooLarge`]; nothing is appended then.
pub fn encode_message(stream: u32, payload: &[u8], out: &mut Vec<u8>) -> Result<(), FrameError> {
    if payload.len() > MESSAGE_BYTES_MAX {
        return Err(FrameError::MessageTooLarge(payload.len()));
    }
    let last = payload.len().saturating_sub(1) / FRAME_BYTES_MAX * FRAME_BYTES_MAX;
    let (parts, rest) = payload.split_at(last);
    for part in parts.chunks(FRAME_BYTES_MAX) {
        encode(stream, FrameKind::Part, part, out)?;
    }
    encode(stream, FrameKind::Message, rest, out)
}

/// Turns received bytes into frames.
///
/// ```text
///   Scanning ──mark and nonce seen──▶ Between ──header──▶ Inside ──payload──▶ Between
/// ```
/// A guest's decoder starts in `Between`, a host's in `Scanning`.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    consumed: usize,
    scan_for: Option<Vec<u8>>,
    is_host: bool,
    /// The stream and the bytes of a message whose last piece has not come.
    parts: Option<(u32, Vec<u8>)>,
}

impl Decoder {
    /// A decoder for the agent's side: frames may begin at once.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A decoder for the host's side: everything before [`SYNC_MARK`] and `nonce` is discarded.
    #[must_use]
    pub fn after_mark(nonce: [u8; 16]) -> Self {
        let mut mark = SYNC_MARK.to_vec();
        mark.extend_from_slice(&nonce);
        Self {
            buffer: Vec::new(),
            consumed: 0,
            scan_for: Some(mark),
            is_host: true,
            parts: None,
        }
    }

    /// Takes received bytes. Holds at most one frame's worth beyond what was given at once.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.consumed);
        self.consumed = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame, or `None` until more bytes are fed.
    ///
    /// # Errors
    /// After [`FrameError::Checksum`] the decoder stands behind the bad frame and can go on; after
    /// any other the session must end.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        loop {
            let frame = match self.next_piece() {
                Ok(Some(frame)) => frame,
                Ok(None) => return Ok(None),
                Err(error) => {
                    self.parts = None;
                    return Err(error);
                }
            };
            if let Some(whole) = self.assemble(frame)? {
                return Ok(Some(whole));
            }
        }
    }

    /// Puts the pieces of a message together; gives everything else as it is.
    fn assemble(&mut self, frame: Frame) -> Result<Option<Frame>, FrameError> {
        // Pieces come back to back: whatever else comes means that the rest never will.
        let parts = self
            .parts
            .take()
            .filter(|(stream, _)| *stream == frame.stream);
        match (frame.kind, parts) {
            (FrameKind::Part, parts) => {
                let (stream, mut bytes) = parts.unwrap_or((frame.stream, Vec::new()));
                bytes.extend_from_slice(&frame.payload);
                // What a host decodes comes from a guest, which has no reason to send parts.
                let most = if self.is_host {
                    FRAME_BYTES_MAX
                } else {
                    MESSAGE_BYTES_MAX
                };
                if bytes.len() >= most {
                    return Err(FrameError::MessageTooLarge(bytes.len()));
                }
                self.parts = Some((stream, bytes));
                Ok(None)
            }
            (FrameKind::Message, Some((stream, mut bytes))) => {
                bytes.extend_from_slice(&frame.payload);
                if bytes.len() > MESSAGE_BYTES_MAX {
                    return Err(FrameError::MessageTooLarge(bytes.len()));
                }
                Ok(Some(Frame {
                    stream,
                    kind: FrameKind::Message,
                    payload: bytes,
                }))
            }
            _ => Ok(Some(frame)),
        }
    }

    fn next_piece(&mut self) -> Result<Option<Frame>, FrameError> {
        if !self.scan() {
            return Ok(None);
        }
        let rest = &self.buffer[self.consumed..];
        let zeros = rest.iter().take_while(|byte| **byte == 0).count();
        self.consumed += zeros;
        let rest = &rest[zeros..];
        if let Some(first) = rest.first()
            && *first != MAGIC
        {
            return Err(FrameError::NotAFrame(*first));
        }
        let Some(header) = rest.first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let len = field(header, 8) as usize;
        if len > FRAME_BYTES_MAX {
            return Err(FrameError::TooLarge(len));
        }
        let Some(payload) = rest.get(HEADER_BYTES..HEADER_BYTES + len) else {
            return Ok(None);
        };
        let stream = field(header, 4);
        let expected = field(header, 12);
        let found = checksum(&header[..12], payload);
        let kind = FrameKind::from_flags(header[1]);
        let flags = header[1];
        let payload = payload.to_vec();
        self.consumed += HEADER_BYTES + len;
        if found != expected {
            return Err(FrameError::Checksum);
        }
        let kind = kind.ok_or(FrameError::UnknownFlags(flags))?;
        Ok(Some(Frame {
            stream,
            kind,
            payload,
        }))
    }

    /// Passes over one byte. After an error that ended the session, an agent looks for the next
    /// session's preamble and `Hello` this way; they may already have been fed.
    pub fn skip(&mut self) {
        self.consumed = (self.consumed + 1).min(self.buffer.len());
    }

    /// True once frames may be read.
    fn scan(&mut self) -> bool {
        let Some(mark) = &self.scan_for else {
            return true;
        };
        let rest = &self.buffer[self.consumed..];
        if let Some(at) = rest.windows(mark.len()).position(|window| window == mark) {
            self.consumed += at + mark.len();
            self.scan_for = None;
            return true;
        }
        // The mark may be cut by the end of what has come so far.
        self.consumed += rest.len().saturating_sub(mark.len() - 1);
        false
    }
}

fn field(header: &[u8; HEADER_BYTES], at: usize) -> u32 {
    u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
}

fn checksum(header: &[u8], payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(header);
    hasher.update(payload);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, prop, prop_assert_eq, proptest};

    use super::{
        Decoder, FRAME_BYTES_MAX, Frame, FrameError, FrameKind, HEADER_BYTES, MESSAGE_BYTES_MAX,
        PREAMBLE_BYTES, SYNC_MARK, checksum, encode, encode_message,
    };

    fn whole(stream: u32, kind: FrameKind, payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        encode(stream, kind, payload, &mut out).unwrap();
        out
    }

    #[test]
    fn crc_is_the_ieee_one() {
        assert_eq!(checksum(b"1234", b"56789"), 0xcbf4_3926);
    }

    #[test]
    fn a_payload_over_the_limit_is_refused_and_nothing_written() {
        let mut out = vec![7];
        let payload = vec![0; FRAME_BYTES_MAX + 1];
        let refused = encode(1, FrameKind::Data, &payload, &mut out);
        assert_eq!(refused, Err(FrameError::TooLarge(FRAME_BYTES_MAX + 1)));
        assert_eq!(out, [7]);
    }

    #[test]
    fn the_preamble_ends_a_half_frame_wherever_it_was_cut() {
        let cut = whole(3, FrameKind::Data, &[0x5a; 1000]);
        let hello = whole(0, FrameKind::Message, b"{}");
        for at in [1, 2, 11, 15, 16, 17, 500, cut.len() - 1] {
            let mut decoder = Decoder::new();
            decoder.feed(&cut[..at]);
            decoder.feed(&[0; PREAMBLE_BYTES]);
            decoder.feed(&hello);
            let frame = loop {
                match decoder.next_frame() {
                    Ok(Some(frame)) => break frame,
                    Ok(None) => panic!("the hello was swallowed, cut at {at}"),
                    Err(error) => assert_eq!(error, FrameError::Checksum, "cut at {at}"),
                }
            };
            assert_eq!(frame.payload, b"{}");
        }
    }

    #[test]
    fn a_large_message_comes_whole_and_an_unfinished_one_is_forgotten() {
        let large = vec![b'x'; 3 * FRAME_BYTES_MAX + 5];
        let mut bytes = Vec::new();
        encode_message(7, &large, &mut bytes).unwrap();
        let mut decoder = Decoder::new();
        decoder.feed(&bytes[..2 * FRAME_BYTES_MAX + 2 * HEADER_BYTES]);
        assert_eq!(decoder.next_frame(), Ok(None));
        // The daemon died between two parts; its successor says hello.
        decoder.feed(&[0; PREAMBLE_BYTES]);
        decoder.feed(&whole(0, FrameKind::Message, b"hello"));
        assert_eq!(decoder.next_frame().unwrap().unwrap().payload, b"hello");
        decoder.feed(&bytes);
        let frame = decoder.next_frame().unwrap().unwrap();
        assert_eq!(
            (frame.stream, frame.kind, frame.payload),
            (7, FrameKind::Message, large)
        );
    }

    #[test]
    fn a_message_of_whole_frames_ends_with_a_full_one() {
        for len in [
            0,
            1,
            FRAME_BYTES_MAX,
            2 * FRAME_BYTES_MAX,
            MESSAGE_BYTES_MAX,
        ] {
            let mut bytes = Vec::new();
            encode_message(1, &vec![1; len], &mut bytes).unwrap();
            let mut decoder = Decoder::new();
            decoder.feed(&bytes);
            assert_eq!(decoder.next_frame().unwrap().unwrap().payload.len(), len);
            assert_eq!(decoder.next_frame(), Ok(None));
        }
        let mut out = Vec::new();
        assert!(encode_message(1, &vec![1; MESSAGE_BYTES_MAX + 1], &mut out).is_err());
        assert!(out.is_empty());
    }

    #[test]
    fn a_host_takes_no_message_in_parts_beyond_one_frame() {
        let mut decoder = Decoder::after_mark([1; 16]);
        decoder.feed(&SYNC_MARK);
        decoder.feed(&[1; 16]);
        decoder.feed(&whole(1, FrameKind::Part, &[b'x'; FRAME_BYTES_MAX]));
        let refused = decoder.next_frame();
        assert_eq!(refused, Err(FrameError::MessageTooLarge(FRAME_BYTES_MAX)));
    }

    #[test]
    fn a_host_discards_everything_before_its_own_mark() {
        let nonce = [9; 16];
        let mut bytes = whole(1, FrameKind::Data, b"of the dead daemon")[5..].to_vec();
        bytes.extend_from_slice(&SYNC_MARK);
        bytes.extend_from_slice(&[8; 16]);
        bytes.extend_from_slice(&whole(1, FrameKind::Data, b"of another session"));
        bytes.extend_from_slice(&SYNC_MARK);
        bytes.extend_from_slice(&nonce);
        bytes.extend_from_slice(&whole(0, FrameKind::Message, b"mine"));
        let mut decoder = Decoder::after_mark(nonce);
        let mut frames = Vec::new();
        for byte in bytes {
            decoder.feed(&[byte]);
            while let Some(frame) = decoder.next_frame().unwrap() {
                frames.push(frame.payload);
            }
        }
        assert_eq!(frames, [b"mine".to_vec()]);
    }

    proptest! {
        #[test]
        fn a_hello_is_found_behind_any_garbage(
            garbage in prop::collection::vec(any::<u8>(), 0..2000),
            step in 100_usize..70_000,
        ) {
            let mut bytes = garbage;
            bytes.extend_from_slice(&[0; PREAMBLE_BYTES]);
            bytes.extend_from_slice(&whole(0, FrameKind::Message, b"hello"));
            let mut decoder = Decoder::new();
            let mut last = None;
            for part in bytes.chunks(step) {
                decoder.feed(part);
                loop {
                    match decoder.next_frame() {
                        Ok(None) => break,
                        Ok(Some(frame)) => last = Some(frame.payload),
                        Err(FrameError::Checksum) => {}
                        Err(_) => decoder.skip(),
                    }
                }
            }
            prop_assert_eq!(last, Some(b"hello".to_vec()));
        }

        #[test]
        fn frames_read_back_however_they_are_cut(
            frames in prop::collection::vec(
                (any::<u32>(), 0_u8..3, prop::collection::vec(any::<u8>(), 0..300)), 0..20),
            step in 1_usize..97,
        ) {
            let mut sent = Vec::new();
            let mut bytes = Vec::new();
            for (stream, flags, payload) in frames {
                let kind = FrameKind::from_flags(flags).unwrap();
                encode(stream, kind, &payload, &mut bytes).unwrap();
                sent.push(Frame { stream, kind, payload });
            }
            let mut decoder = Decoder::new();
            let mut received = Vec::new();
            for part in bytes.chunks(step) {
                decoder.feed(part);
                while let Some(frame) = decoder.next_frame().unwrap() {
                    received.push(frame);
                }
            }
            prop_assert_eq!(received, sent);
        }

        #[test]
        fn no_bytes_make_the_decoder_panic(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            let mut decoder = Decoder::new();
            decoder.feed(&bytes);
            for _step in 0..3000 {
                match decoder.next_frame() {
                    Ok(None) | Err(FrameError::NotAFrame(_) | FrameError::TooLarge(_)) => break,
                    Ok(Some(_)) | Err(_) => {}
                }
            }
        }
    }
}
