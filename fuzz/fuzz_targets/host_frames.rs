//! What comes to the agent through its port, which a dead daemon may have cut anywhere. The agent
//! is a guest's first process: it must not panic, and it must find the next daemon's session.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use spore_guest::session::{Inbox, Input};
use spore_wire::frame::{PREAMBLE_BYTES, encode_message};
use spore_wire::generation::GENERATION;
use spore_wire::guest::{HostHello, HostMessage};

/// A nonce that nothing before it is likely to have.
const NONCE: [u8; 16] = *b"the next session";

static SESSION: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let hello = HostMessage::Hello(HostHello {
        generation: GENERATION,
        nonce: NONCE.iter().map(|byte| format!("{byte:02x}")).collect(),
    });
    let hello = serde_json::to_vec(&hello).expect("plain values");
    let mut session = vec![0; PREAMBLE_BYTES];
    encode_message(0, &hello, &mut session).expect("it is short");
    session
});

fuzz_target!(|pieces: Vec<Vec<u8>>| {
    let mut inbox = Inbox::default();
    for piece in &pieces {
        inbox.feed(piece);
        while inbox.take().is_some() {}
    }
    inbox.feed(&SESSION);
    while let Some(input) = inbox.take() {
        if matches!(input, Input::Hello { nonce, .. } if nonce == NONCE) {
            return;
        }
    }
    panic!("no session is found behind what came before");
});
