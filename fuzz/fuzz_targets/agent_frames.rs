//! What a hostile agent sends: the host's decoder, and the messages in its frames.
#![no_main]

use libfuzzer_sys::fuzz_target;
use spore_wire::frame::{Decoder, FRAME_BYTES_MAX, FrameError, FrameKind, SYNC_MARK};
use spore_wire::guest::AgentMessage;

const NONCE: [u8; 16] = [7; 16];

fuzz_target!(|input: (bool, Vec<Vec<u8>>)| {
    let (marked, pieces) = input;
    let mut decoder = Decoder::after_mark(NONCE);
    if marked {
        decoder.feed(&SYNC_MARK);
        decoder.feed(&NONCE);
    }
    for piece in pieces {
        decoder.feed(&piece);
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => {
                    if frame.kind == FrameKind::Message {
                        drop(serde_json::from_slice::<AgentMessage>(&frame.payload));
                    } else {
                        assert!(frame.payload.len() <= FRAME_BYTES_MAX);
                    }
                }
                Ok(None) => break,
                Err(FrameError::Checksum) => {}
                Err(_session_over) => return,
            }
        }
    }
});
