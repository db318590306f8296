//! Stories of connections that leave HTTP behind.

use std::net::SocketAddr;
use std::time::Duration;

use socket2::{SockFilter, SockRef};
use spore_gateway::Limits;
use spore_wire::gateway::ToGateway;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::client::Client;
use crate::daemon::{HANG, Reap, patient, serving, vm};

/// A client whose connection has switched.
async fn upgraded(gateway: SocketAddr) -> Client {
    let mut client = Client::connect(gateway).await;
    client
        .send(
            "GET /upgrade HTTP/1.1\r\nHost: app.localhost\r\nConnection: upgrade\r\n\
             Upgrade: anything/1\r\n\r\nearly",
        )
        .await;
    assert_eq!(client.answer().await.status, 101);
    client
}

/// An app that switches and then does what the story wants.
async fn switching(listener: &TcpListener) -> TcpStream {
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    let answer = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\n\
        Upgrade: anything/1\r\n\r\n";
    stream.write_all(answer).await.unwrap();
    stream
}

/// From now on this end's kernel answers nothing, as if its host had lost its power.
fn die(stream: &TcpStream) {
    // A classic BPF program of one instruction: return 0, keep no byte of the packet.
    let drop_all = SockFilter::new(0x06, 0, 0, 0);
    SockRef::from(stream).attach_filter(&[drop_all]).unwrap();
}

/// Writes until the gateway takes nothing more, and tells when it has hung up.
async fn flood(stream: &mut TcpStream) {
    let piece = vec![b'x'; 64 * 1024];
    while stream.write_all(&piece).await.is_ok() {}
}

#[tokio::test]
async fn a_websocket_echoes_through_a_wake_and_keeps_its_app_awake() {
    let (rig, daemon, _app) = serving(patient()).await;
    let mut client = Client::connect(rig.address).await;
    client
        .send(
            "GET /upgrade HTTP/1.1\r\nHost: app.localhost\r\nConnection: Upgrade\r\n\
             Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        )
        .await;
    let answer = client.answer().await;
    assert_eq!(answer.status, 101);
    assert_eq!(answer.header("upgrade").unwrap(), "websocket");
    assert!(answer.header("server-timing").is_some());
    // Masked text frames, as a browser sends them; the app gives the bytes back.
    for frame in [
        &b"\x81\x85\x01\x02\x03\x04igoph"[..],
        b"\x89\x80\x01\x02\x03\x04",
    ] {
        client.send(frame).await;
        assert_eq!(client.bytes(frame.len()).await, frame);
    }
    assert_eq!(daemon.reap("app", vm(1), false).await, Reap::Busy);
    client.stream.shutdown().await.unwrap();
    assert_eq!(client.rest().await, b"");
    loop {
        if daemon.reap("app", vm(1), false).await == Reap::Reaped {
            break;
        }
    }
}

#[tokio::test]
async fn an_upgraded_connection_ends_with_its_vm() {
    let (rig, daemon, _app) = serving(patient()).await;
    let mut client = upgraded(rig.address).await;
    assert_eq!(client.bytes(5).await, b"early");
    daemon.gone("app", vm(1));
    assert_eq!(client.rest().await, b"");
}

#[tokio::test]
async fn an_upgraded_connection_keeps_its_place_until_it_ends() {
    let (rig, daemon, _app) = serving(Limits {
        connections_per_client_max: 2,
        ..patient()
    })
    .await;
    let first = upgraded(rig.address).await;
    let _second = upgraded(rig.address).await;
    let mut third = Client::connect(rig.address).await;
    assert_eq!(third.rest().await, b"", "a third has no place");
    drop(first);
    loop {
        let mut next = Client::connect(rig.address).await;
        // A refused one may break off while it is spoken to.
        let request = crate::client::request("GET", "app", "/tag")
            .replace("Host", "Connection: close\r\nHost");
        next.stream.write_all(request.as_bytes()).await.ok();
        if !next.rest().await.is_empty() {
            break;
        }
    }
    assert_eq!(daemon.reap("app", vm(1), false).await, Reap::Busy);
}

#[tokio::test]
async fn quit_leaves_upgraded_connections_a_moment_and_ends_them() {
    let (rig, daemon, _app) = serving(Limits {
        relay_grace: Duration::from_secs(5),
        ..patient()
    })
    .await;
    let mut client = upgraded(rig.address).await;
    assert_eq!(client.bytes(5).await, b"early");
    daemon.say(ToGateway::Quit { drain_ms: 60_000 });
    client.send("what is on its way").await;
    assert_eq!(client.rest().await, b"what is on its way");
    let ended = tokio::time::timeout(HANG, rig.ended()).await;
    assert!(ended.is_ok(), "the drain waits for what never ends");
}

#[tokio::test]
async fn an_end_that_takes_nothing_is_cut() {
    let limits = Limits {
        relay_stall_timeout: Duration::from_millis(400),
        ..patient()
    };
    // The app echoes, and nobody reads the echo.
    let (rig, daemon, _app) = serving(limits.clone()).await;
    let mut client = upgraded(rig.address).await;
    flood(&mut client.stream).await;
    daemon.reaped("app", vm(1)).await;
    // The app does not read.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    daemon.on_wake("app", vm(1), listener.local_addr().unwrap());
    let (mut client, _deaf) = tokio::join!(upgraded(rig.address), switching(&listener));
    flood(&mut client.stream).await;
    daemon.reaped("app", vm(1)).await;
}

#[tokio::test]
async fn silence_ends_no_upgraded_connection() {
    let (rig, daemon, _app) = serving(Limits {
        relay_stall_timeout: Duration::from_millis(50),
        keep_alive_timeout: Duration::from_millis(50),
        answer_stall_timeout: Duration::from_millis(50),
        dead_peer_timeout: Duration::from_secs(1),
        ..patient()
    })
    .await;
    let mut client = upgraded(rig.address).await;
    assert_eq!(client.bytes(5).await, b"early");
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    assert_eq!(daemon.reap("app", vm(1), false).await, Reap::Busy);
    client.send("still").await;
    assert_eq!(client.bytes(5).await, b"still");
}

#[tokio::test]
async fn a_peer_that_died_without_a_word_keeps_no_app_awake() {
    let limits = Limits {
        dead_peer_timeout: Duration::from_secs(2),
        ..patient()
    };
    let (rig, daemon, _app) = serving(limits).await;
    let mut client = upgraded(rig.address).await;
    assert_eq!(client.bytes(5).await, b"early");
    die(&client.stream);
    daemon.reaped("app", vm(1)).await;

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    daemon.on_wake("app", vm(1), listener.local_addr().unwrap());
    let (mut client, app) = tokio::join!(upgraded(rig.address), switching(&listener));
    die(&app);
    assert_eq!(client.rest().await, b"");
    daemon.reaped("app", vm(1)).await;
    // Bytes that wait for it do not hide that it is dead.
    let (mut client, app) = tokio::join!(upgraded(rig.address), switching(&listener));
    die(&app);
    client.send("is anybody there?").await;
    assert_eq!(client.rest().await, b"");
    daemon.reaped("app", vm(1)).await;
}
