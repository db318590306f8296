//! Carries bytes between a guest's connection and the one dialled for it.
//!
//! Called by `proxy.rs`, once per connection. Holds one fixed buffer per direction and reads only
//! when the other side took what was read before, so a slow reader slows its writer and costs
//! nothing. Each direction ends on its own (half-close). Never ends TLS, never changes a byte.

use std::io;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, sleep_until, timeout};

use crate::egress::hello::{HELLO_BYTES_MAX, Hello, HelloRefusal, judge};

/// The bytes held per direction.
pub const BUFFER_BYTES: usize = 16 * 1024;

/// How long a first message may stay incomplete once its first byte came.
pub const HELLO_PATIENCE: Duration = Duration::from_secs(10);

/// How long nothing may move in either direction.
pub const IDLE_MAX: Duration = Duration::from_secs(30 * 60);

/// Why a relay ended before both sides closed.
#[derive(Debug, Error)]
pub enum RelayError {
    /// The client's first message does not agree with the grant.
    #[error(transparent)]
    Hello(#[from] HelloRefusal),
    /// Nothing moved for [`IDLE_MAX`].
    #[error("nothing moved for {} minutes", IDLE_MAX.as_secs() / 60)]
    Idle,
    /// A side is gone.
    #[error("the connection broke")]
    Broken(#[from] io::Error),
}

/// Relays until both directions ended. With `names`, the client's first message must agree with
/// one of them before a byte of it is sent on; the server may speak first meanwhile.
///
/// # Errors
/// [`RelayError`]; both connections must then be reset, since a side may have been cut short.
pub async fn relay<G, U>(guest: G, upstream: U, names: Option<&[&str]>) -> Result<(), RelayError>
where
    G: AsyncRead + AsyncWrite + Unpin,
    U: AsyncRead + AsyncWrite + Unpin,
{
    let (guest_read, guest_write) = tokio::io::split(guest);
    let (upstream_read, upstream_write) = tokio::io::split(upstream);
    let moved = Moved::now();
    let up = async {
        let (mut from, mut to) = (guest_read, upstream_write);
        if let Some(names) = names {
            let first = first_message(&mut from, names, &moved).await?;
            to.write_all(&first).await?;
        }
        pump(from, to, &moved).await
    };
    let down = pump(upstream_read, guest_write, &moved);
    let both = async { tokio::try_join!(up, down) };
    tokio::select! {
        ended = both => ended.map(|_both| ()),
        () = moved.idle() => Err(RelayError::Idle),
    }
}

/// Reads the client's bytes until they can be judged.
async fn first_message(
    from: &mut (impl AsyncRead + Unpin),
    names: &[&str],
    moved: &Moved,
) -> Result<Vec<u8>, RelayError> {
    let mut first = Vec::new();
    let mut deadline = None;
    loop {
        let mut piece = [0; 2048];
        let room = (HELLO_BYTES_MAX - first.len()).min(piece.len());
        let buffer = piece.get_mut(..room).unwrap_or_default();
        let read = from.read(buffer);
        let length = match deadline {
            None => read.await?,
            Some(deadline) => match tokio::time::timeout_at(deadline, read).await {
                Ok(length) => length?,
                Err(_elapsed) => return Err(HelloRefusal::Unreadable.into()),
            },
        };
        moved.touch();
        if length == 0 {
            // A client that ends in the middle of what must be checked said nothing that counts.
            return if first.is_empty() {
                Ok(first)
            } else {
                Err(HelloRefusal::Unreadable.into())
            };
        }
        first.extend_from_slice(buffer.get(..length).unwrap_or_default());
        deadline.get_or_insert_with(|| Instant::now() + HELLO_PATIENCE);
        match judge(&first, names) {
            Hello::Incomplete => {}
            Hello::Pass => return Ok(first),
            Hello::Refuse(why) => return Err(why.into()),
        }
    }
}

async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    moved: &Moved,
) -> Result<(), RelayError> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let length = from.read(&mut buffer).await?;
        moved.touch();
        if length == 0 {
            break;
        }
        to.write_all(buffer.get(..length).unwrap_or_default())
            .await?;
        moved.touch();
    }
    match to.shutdown().await {
        // The peer closed its side fully before; there is nobody left to tell.
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
        shut => Ok(shut?),
    }
}

/// When a byte moved last.
#[derive(Debug)]
struct Moved(Mutex<Instant>);

impl Moved {
    fn now() -> Self {
        Self(Mutex::new(Instant::now()))
    }

    fn touch(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    fn last(&self) -> Instant {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns once nothing moved for [`IDLE_MAX`].
    async fn idle(&self) {
        loop {
            let until = self.last() + IDLE_MAX;
            if until <= Instant::now() {
                return;
            }
            sleep_until(until).await;
        }
    }
}

/// Runs `dial` for at most `patience`.
///
/// # Errors
/// The dial's own error, or a time-out.
pub async fn within<T>(
    patience: Duration,
    dial: impl Future<Output = io::Result<T>>,
) -> io::Result<T> {
    timeout(patience, dial)
        .await
        .unwrap_or_else(|_elapsed| Err(io::ErrorKind::TimedOut.into()))
}

#[cfg(test)]
mod tests;
