//! Standard input, read on a thread of its own.
//!
//! Used by `exec` and `cp`. A read may wait for a key that nobody presses: the thread ends with
//! the process, and nothing waits for it.

use std::io::{self, Read as _};

use tokio::sync::mpsc;

/// The bytes read at once.
const READ_BYTES: usize = 16 * 1024;
/// The pieces that may wait to be sent.
const PIECES_WAITING: usize = 4;

/// Begins to read; the end of the channel is the end of the input.
pub(super) fn read() -> io::Result<mpsc::Receiver<io::Result<Vec<u8>>>> {
    let (sender, receiver) = mpsc::channel(PIECES_WAITING);
    let read = move || {
        let mut stdin = io::stdin().lock();
        let mut buffer = vec![0; READ_BYTES];
        loop {
            let piece = match stdin.read(&mut buffer) {
                Ok(0) => return,
                Ok(count) => Ok(buffer[..count].to_vec()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => Err(error),
            };
            let failed = piece.is_err();
            if sender.blocking_send(piece).is_err() || failed {
                return;
            }
        }
    };
    drop(
        std::thread::Builder::new()
            .name("stdin".to_owned())
            .spawn(read)?,
    );
    Ok(receiver)
}
