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

use super::hello::{HELLO_BYTES_MAX, Hello, HelloRefusal, judge};

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
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio::task::JoinHandle;
    use tokio::time::{Duration, advance};

    use super::{BUFFER_BYTES, HELLO_PATIENCE, HelloRefusal, IDLE_MAX, RelayError, relay};

    const NAMES: Option<&[&str]> = Some(&["api.example.com"]);

    type Relay = JoinHandle<Result<(), RelayError>>;

    fn start(names: Option<&'static [&'static str]>) -> (DuplexStream, DuplexStream, Relay) {
        let (guest, inner) = duplex(64);
        let (upstream, outer) = duplex(64);
        (guest, upstream, tokio::spawn(relay(inner, outer, names)))
    }

    #[tokio::test]
    async fn each_direction_ends_on_its_own() {
        let (mut guest, mut upstream, relay) = start(None);
        guest.write_all(b"question").await.unwrap();
        guest.shutdown().await.unwrap();
        let mut heard = Vec::new();
        upstream.read_to_end(&mut heard).await.unwrap();
        assert_eq!(heard, b"question");
        upstream.write_all(b"answer after the end").await.unwrap();
        upstream.shutdown().await.unwrap();
        let mut answer = Vec::new();
        guest.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"answer after the end");
        relay.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_slow_reader_stops_its_writer() {
        let (mut guest, _upstream, _relay) = start(None);
        let mut taken = 0;
        loop {
            let wrote = tokio::time::timeout(Duration::from_millis(200), guest.write(&[0; 64]));
            match wrote.await {
                Ok(length) => taken += length.unwrap(),
                Err(_full) => break,
            }
            assert!(taken < 4 * BUFFER_BYTES, "the relay takes without end");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_relay_ends_and_a_moving_one_does_not() {
        let (mut guest, mut upstream, relay) = start(None);
        let mut byte = [0];
        for _beat in 0..4 {
            advance(IDLE_MAX - Duration::from_secs(1)).await;
            guest.write_all(b"x").await.unwrap();
            upstream.read_exact(&mut byte).await.unwrap();
        }
        assert!(!relay.is_finished());
        assert!(matches!(relay.await.unwrap(), Err(RelayError::Idle)));
    }

    #[tokio::test]
    async fn a_wrong_host_is_cut_before_a_byte_went_out() {
        let (mut guest, mut upstream, relay) = start(NAMES);
        guest
            .write_all(b"GET / HTTP/1.1\r\nHost: evil.test\r\n\r\n")
            .await
            .unwrap();
        let ended = relay.await.unwrap();
        assert!(matches!(
            ended,
            Err(RelayError::Hello(HelloRefusal::OtherHost))
        ));
        let mut heard = Vec::new();
        upstream.read_to_end(&mut heard).await.unwrap();
        assert!(heard.is_empty());
    }

    #[tokio::test]
    async fn a_server_may_speak_first() {
        let (mut guest, mut upstream, _relay) = start(NAMES);
        upstream.write_all(b"220 ready\r\n").await.unwrap();
        let mut greeting = [0; 11];
        guest.read_exact(&mut greeting).await.unwrap();
        guest.write_all(b"EHLO me\r\n").await.unwrap();
        let mut heard = [0; 9];
        upstream.read_exact(&mut heard).await.unwrap();
        assert_eq!(&heard, b"EHLO me\r\n");
    }

    #[tokio::test(start_paused = true)]
    async fn a_first_message_that_stays_incomplete_is_cut() {
        let (mut guest, _upstream, relay) = start(NAMES);
        guest.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
        let before = tokio::time::Instant::now();
        let ended = relay.await.unwrap();
        assert!(matches!(
            ended,
            Err(RelayError::Hello(HelloRefusal::Unreadable))
        ));
        assert_eq!(before.elapsed().as_secs(), HELLO_PATIENCE.as_secs());
    }
}
