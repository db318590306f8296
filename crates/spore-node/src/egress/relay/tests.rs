//! Half-close, back-pressure, idling and the first message, over pipes in memory.

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
