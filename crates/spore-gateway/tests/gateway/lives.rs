//! Stories of VMs that come and go, and of daemons that do.

use std::net::SocketAddr;
use std::time::Duration;

use spore_gateway::Limits;
use spore_wire::gateway::{FromGateway, ToGateway};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket};

use crate::app::App;
use crate::client::{Client, request};
use crate::daemon::{HANG, Reap, Rig, awake, key, patient, route, serving, vm};

#[tokio::test]
async fn a_recycled_vm_never_answers_for_another_app() {
    let rig = Rig::start();
    let daemon = rig.daemon(vec![route("one"), route("two")]).await;
    let one = App::start("one").await;
    let two = App::start("two").await;
    let mut clients = Vec::new();
    for _ in 0..4 {
        clients.push(Client::connect(rig.address).await);
    }
    // Both apps trade the same two servers back and forth: whatever address one app's VM
    // had, the next VM of the other has.
    for round in 0..100_u8 {
        let (of_one, of_two) = (vm(2 * round), vm(2 * round + 1));
        let (first, second) = if round % 2 == 0 {
            (&one, &two)
        } else {
            (&two, &one)
        };
        daemon.on_wake("one", of_one, first.address);
        daemon.on_wake("two", of_two, second.address);
        for client in &mut clients {
            for (name, server) in [("one", first), ("two", second)] {
                let expected = if std::ptr::eq(server, &raw const one) {
                    "one"
                } else {
                    "two"
                };
                assert_eq!(client.get(name, "/tag").await.text(), expected);
            }
        }
        if round % 3 == 0 {
            daemon.gone("one", of_one);
            daemon.gone("two", of_two);
            // The answer to a reap is said after what came before it was obeyed.
            assert_eq!(daemon.reap("two", of_two, false).await, Reap::Reaped);
        } else {
            assert_eq!(daemon.reap("one", of_one, false).await, Reap::Reaped);
            assert_eq!(daemon.reap("two", of_two, false).await, Reap::Reaped);
        }
    }
    assert_eq!(daemon.wakes("one"), 100);
    // Kept connections were used: four requests, one connection, for each VM.
    assert!(one.connections() <= 110, "{}", one.connections());
}

#[tokio::test]
async fn reap_is_busy_while_an_answer_flows_and_force_waits_for_it() {
    let (rig, daemon, app) = serving(patient()).await;
    let mut client = Client::connect(rig.address).await;
    client.send(request("GET", "app", "/slow")).await;
    app.asked("/slow").await;
    assert_eq!(daemon.reap("app", vm(1), false).await, Reap::Busy);
    daemon.say(ToGateway::Reap {
        app: key("app"),
        vm: vm(1),
        force: true,
    });
    // Admission is closed now: the next request wakes the next VM.
    let next = App::start("next").await;
    daemon.on_wake("app", vm(2), next.address);
    daemon
        .heard(1, |heard| matches!(heard, FromGateway::Busy { .. }))
        .await;
    let mut other = Client::connect(rig.address).await;
    loop {
        if other.get("app", "/tag").await.text() == "next" {
            break;
        }
    }
    let reaped = |heard: &FromGateway| matches!(heard, FromGateway::Reaped { .. });
    assert_eq!(daemon.count(reaped), 0);
    app.go_on();
    assert_eq!(client.answer().await.text(), "app");
    daemon.heard(1, reaped).await;
}

#[tokio::test]
async fn activity_is_reported_when_an_app_becomes_busy_and_idle() {
    let (rig, daemon, app) = serving(patient()).await;
    let mut client = Client::connect(rig.address).await;
    client.send(request("GET", "app", "/slow")).await;
    daemon
        .heard(
            1,
            |heard| matches!(heard, FromGateway::Activity(of) if of.in_flight == 1),
        )
        .await;
    app.asked("/slow").await;
    app.go_on();
    client.answer().await;
    daemon
        .heard(
            1,
            |heard| matches!(heard, FromGateway::Activity(of) if of.in_flight == 0),
        )
        .await;
}

#[tokio::test]
async fn a_vm_that_dies_under_a_request_is_a_502_and_was_asked_once() {
    let (rig, daemon, app) = serving(patient()).await;
    let mut client = Client::connect(rig.address).await;
    client.send(request("GET", "app", "/hang")).await;
    app.asked("/hang").await;
    let next = App::start("next").await;
    daemon.on_wake("app", vm(2), next.address);
    daemon.gone("app", vm(1));
    let answer = client.answer().await;
    assert_eq!(answer.status, 502);
    assert!(answer.text().contains("vm_died"), "{}", answer.text());
    assert_eq!((app.requests("/hang"), next.requests("/hang")), (1, 0));
    daemon
        .heard(
            1,
            |heard| matches!(heard, FromGateway::Counts(counts) if counts.vm_died == 1),
        )
        .await;
    assert_eq!(client.get("app", "/tag").await.text(), "next");
}

/// A body that is on its way must not hide the end of its VM: the client could pause for as long as
/// it likes.
#[tokio::test]
async fn a_vm_that_dies_under_a_streaming_body_is_a_502_at_once() {
    for head in [
        "Content-Length: 1000\r\n\r\nhalf",
        "Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
        "Content-Length: 1000\r\nConnection: close\r\n\r\nhalf",
    ] {
        for end in ["gone", "closed"] {
            let (rig, daemon, app) = serving(patient()).await;
            let mut client = Client::connect(rig.address).await;
            client
                .send(format!(
                    "POST /hang HTTP/1.1\r\nHost: app.localhost\r\n{head}"
                ))
                .await;
            app.asked("/hang").await;
            let code = if end == "gone" {
                daemon.gone("app", vm(1));
                "vm_died"
            } else {
                drop(app);
                "app_closed_connection"
            };
            let ended = async {
                let answer = client.answer().await;
                assert_eq!(answer.status, 502, "{head}");
                assert!(answer.text().contains(code), "{head}: {}", answer.text());
                assert_eq!(client.rest().await, b"");
            };
            let ended = tokio::time::timeout(HANG, ended).await;
            assert!(ended.is_ok(), "{end} under {head}");
        }
    }
}

#[tokio::test]
async fn an_answer_that_has_begun_is_cut_when_its_vm_dies() {
    let (rig, daemon, _app) = serving(patient()).await;
    let mut client = Client::connect(rig.address).await;
    client.send(request("GET", "app", "/sse")).await;
    client.head().await;
    daemon.gone("app", vm(1));
    let rest = String::from_utf8(client.rest().await).unwrap();
    assert!(!rest.ends_with("0\r\n\r\n"), "looks complete: {rest:?}");
}

#[tokio::test]
async fn an_answer_without_a_length_is_not_complete_when_its_vm_dies() {
    let rig = Rig::start();
    let daemon = rig.daemon(vec![route("app")]).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    daemon.on_wake("app", vm(1), listener.local_addr().unwrap());
    let mut client = Client::connect(rig.address).await;
    client.send(request("GET", "app", "/")).await;
    let (mut stream, _) = listener.accept().await.unwrap();
    stream
        .write_all(b"HTTP/1.1 200 OK\r\n\r\nhalf")
        .await
        .unwrap();
    let head = client.head().await;
    assert!(head.contains("transfer-encoding: chunked"), "{head}");
    daemon.gone("app", vm(1));
    let rest = String::from_utf8(client.rest().await).unwrap();
    assert!(!rest.ends_with("0\r\n\r\n"), "looks complete: {rest:?}");
}

#[tokio::test]
async fn a_kept_connection_that_the_app_closed_is_replaced_without_an_error() {
    let rig = Rig::start();
    let daemon = rig.daemon(vec![route("app")]).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    daemon.on_wake("app", vm(1), listener.local_addr().unwrap());
    let server = tokio::spawn(async move {
        // Answers as if the connection were kept, then closes it.
        for _ in 0..3 {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut piece = [0; 4096];
            assert!(stream.read(&mut piece).await.unwrap() > 0);
            stream
                .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                .await
                .unwrap();
        }
    });
    let mut client = Client::connect(rig.address).await;
    for _ in 0..3 {
        assert_eq!(client.get("app", "/").await.text(), "ok");
        // The closing has arrived once the loopback had a moment.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    server.await.unwrap();
}

#[tokio::test]
async fn an_app_that_closes_without_an_answer_is_a_502_and_was_asked_once() {
    let rig = Rig::start();
    let daemon = rig.daemon(vec![route("app")]).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    daemon.on_wake("app", vm(1), listener.local_addr().unwrap());
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut piece = [0; 4096];
        assert!(stream.read(&mut piece).await.unwrap() > 0);
        drop(stream);
        let again = tokio::time::timeout(Duration::from_millis(300), listener.accept()).await;
        assert!(again.is_err(), "the request was sent twice");
    });
    let mut client = Client::connect(rig.address).await;
    let answer = client.get("app", "/").await;
    assert_eq!(answer.status, 502);
    assert!(answer.text().contains("app_closed_connection"));
    server.await.unwrap();
}

#[tokio::test]
async fn without_a_daemon_what_is_warm_goes_on_and_what_waits_is_asked_again() {
    let rig = Rig::start();
    let first = rig.daemon(vec![route("warm"), route("cold")]).await;
    let warm = App::start("warm").await;
    let cold = App::start("cold").await;
    first.on_wake("warm", vm(1), warm.address);
    let mut client = Client::connect(rig.address).await;
    assert_eq!(client.get("warm", "/tag").await.text(), "warm");
    drop(first);
    assert_eq!(client.get("warm", "/tag").await.text(), "warm");
    assert_eq!(warm.connections(), 1);
    let mut waiting = Client::connect(rig.address).await;
    waiting.send(request("GET", "cold", "/tag")).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    let second = rig.daemon(vec![route("warm"), route("cold")]).await;
    assert_eq!(second.warm.len(), 1);
    assert_eq!(
        (&second.warm[0].app, second.warm[0].vm),
        (&key("warm"), vm(1))
    );
    second
        .heard(1, |heard| matches!(heard, FromGateway::Wake { .. }))
        .await;
    second.awake("cold", vm(2), cold.address);
    assert_eq!(waiting.answer().await.text(), "cold");
    assert_eq!(second.wakes("cold"), 1);
}

#[tokio::test]
async fn a_connection_that_was_asked_of_a_dead_daemon_is_asked_of_the_next() {
    let rig = Rig::start();
    let first = rig.daemon(vec![route("app")]).await;
    let app = App::start("app").await;
    // Awake, but the daemon dies before it has connected.
    first.say(awake(key("app"), vm(1)));
    let idle = |heard: &FromGateway| matches!(heard, FromGateway::Activity(_));
    first.heard(1, idle).await;
    drop(first);
    let mut client = Client::connect(rig.address).await;
    client.send(request("GET", "app", "/tag")).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    let second = rig.daemon(vec![route("app")]).await;
    second.place(vm(1), app.address);
    assert_eq!(client.answer().await.text(), "app");
}

#[tokio::test]
async fn the_newest_daemon_has_the_session_and_its_table_is_the_table() {
    let rig = Rig::start();
    let first = rig.daemon(vec![route("old"), route("both")]).await;
    let app = App::start("app").await;
    let second = rig.daemon(vec![route("both")]).await;
    second.on_wake("both", vm(1), app.address);
    let mut client = Client::connect(rig.address).await;
    assert_eq!(client.get("both", "/tag").await.text(), "app");
    assert_eq!(client.get("old", "/tag").await.status, 404);
    assert_eq!(first.wakes("both"), 0);
    let hosts = vec!["both.localhost".to_owned()];
    second.say(ToGateway::Unroute { hosts });
    assert_eq!(second.reap("nobody", vm(9), false).await, Reap::Reaped);
    assert_eq!(client.get("both", "/tag").await.status, 404);
}

#[tokio::test]
async fn quit_ends_the_gateway_after_what_is_in_flight() {
    let (rig, daemon, app) = serving(patient()).await;
    let mut idle = Client::connect(rig.address).await;
    idle.get("app", "/tag").await;
    let mut busy = Client::connect(rig.address).await;
    busy.send(request("GET", "app", "/slow")).await;
    app.asked("/slow").await;
    daemon.say(ToGateway::Quit { drain_ms: 120_000 });
    assert_eq!(idle.rest().await, b"");
    app.go_on();
    assert_eq!(busy.answer().await.text(), "app");
    rig.ended().await;
}

#[tokio::test]
async fn the_next_gateway_has_the_same_door_and_nobody_is_refused() {
    let (old, first, app) = serving(patient()).await;
    let address = old.address;
    let mut busy = Client::connect(address).await;
    busy.send(request("GET", "app", "/slow")).await;
    app.asked("/slow").await;
    let mut fresh = Client::connect(address).await;
    // Who comes in later is answered, so the fresh connection is the old gateway's.
    let mut behind = Client::connect(address).await;
    assert_eq!(behind.get("app", "/tag").await.text(), "app");
    let listener = std::net::TcpListener::from(first.listener.try_clone().unwrap());
    first.say(ToGateway::Quit { drain_ms: 120_000 });
    // The session goes on while what is in flight ends, so that its VM is known to be busy.
    assert_eq!(first.reap("app", vm(1), false).await, Reap::Busy);
    fresh.send(request("GET", "app", "/tag")).await;
    let answer = fresh.answer().await;
    assert_eq!(answer.text(), "app");
    assert_eq!(answer.header("connection").unwrap(), "close");
    let mut between = Client::connect(address).await;
    between.send(request("GET", "app", "/tag")).await;
    app.go_on();
    assert_eq!(busy.answer().await.text(), "app");
    old.ended().await;
    let mut later = Client::connect(address).await;
    later.send(request("GET", "app", "/tag")).await;
    let new = Rig::on(listener, patient());
    let second = new.daemon(vec![route("app")]).await;
    second.on_wake("app", vm(1), app.address);
    assert_eq!(between.answer().await.text(), "app");
    assert_eq!(later.answer().await.text(), "app");
}

#[tokio::test]
async fn slow_and_silent_clients_are_cut() {
    let short = Duration::from_millis(200);
    let (rig, daemon, app) = serving(Limits {
        // The heads that are meant to come in time have this long.
        head_timeout: Duration::from_secs(5),
        keep_alive_timeout: short,
        body_stall_timeout: short,
        answer_stall_timeout: short,
        connections_per_client_max: 7,
        ..patient()
    })
    .await;
    let mut silent = Client::connect(rig.address).await;
    let mut slow_head = Client::connect(rig.address).await;
    slow_head.send("GET / HTT").await;
    let dripping = Client::connect(rig.address).await;
    let dripped = tokio::spawn(drip(dripping));
    let mut kept = Client::connect(rig.address).await;
    kept.get("app", "/tag").await;
    let mut slow_body = Client::connect(rig.address).await;
    slow_body
        .send("POST /sink HTTP/1.1\r\nHost: app.localhost\r\nContent-Length: 9\r\n\r\nhalf")
        .await;
    // Silence of the app is no fault of the client's.
    let mut events = Client::connect(rig.address).await;
    events.send(request("GET", "app", "/sse")).await;
    let mut no_reader = Client::connect(rig.address).await;
    no_reader.send(request("GET", "app", "/flood")).await;
    let mut one_too_many = Client::connect(rig.address).await;
    assert_eq!(one_too_many.rest().await, b"");
    for client in [&mut silent, &mut slow_head, &mut kept, &mut slow_body] {
        assert_eq!(client.rest().await, b"");
    }
    let dripped = tokio::time::timeout(HANG, dripped).await;
    dripped.expect("a head is cut that never ends").unwrap();
    tokio::time::sleep(4 * short).await;
    events.head().await;
    assert_eq!(events.bytes(14).await, b"9\r\ndata: 1\n\n\r\n");
    app.go_on();
    assert_eq!(events.bytes(14).await, b"9\r\ndata: 2\n\n\r\n");
    app.go_on();
    assert_eq!(events.bytes(5).await, b"0\r\n\r\n");
    // The flood was cut before anybody read it.
    daemon.reaped("app", vm(1)).await;
    no_reader.rest().await;
}

/// Sends a head byte by byte for as long as it is listened to.
async fn drip(mut client: Client) {
    while client.stream.write_all(b"x").await.is_ok() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// An address that refuses connections for as long as the socket lives.
fn refusing() -> (TcpSocket, SocketAddr) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = socket.local_addr().unwrap();
    (socket, address)
}

const fn is_connect(heard: &FromGateway) -> bool {
    matches!(heard, FromGateway::Connect { .. })
}

#[tokio::test]
async fn a_request_waits_for_an_app_that_is_started_again_and_is_sent_once() {
    let (rig, daemon, app) = serving(patient()).await;
    let (_socket, crashed) = refusing();
    daemon.on_wake("app", vm(1), crashed);
    let mut client = Client::connect(rig.address).await;
    let visit = tokio::spawn(async move { client.get("app", "/tag").await });
    let tried = daemon.heard(3, is_connect);
    let tried = tokio::time::timeout(HANG, tried).await;
    tried.expect("a refused connection is tried again");
    daemon.place(vm(1), app.address);
    let answer = visit.await.unwrap();
    assert_eq!((answer.status, answer.text()), (200, "app"));
    assert_eq!((app.requests("/tag"), daemon.wakes("app")), (1, 1));
}

#[tokio::test]
async fn an_app_that_never_listens_is_a_502_in_the_end_and_at_once_from_then_on() {
    let limits = Limits {
        refused_patience: Duration::from_millis(400),
        ..patient()
    };
    let (rig, daemon, app) = serving(limits).await;
    let (_socket, deaf) = refusing();
    daemon.on_wake("app", vm(1), deaf);
    let mut client = Client::connect(rig.address).await;
    let answer = client.get("app", "/tag").await;
    assert_eq!(answer.status, 502);
    assert!(
        answer.text().contains("app_not_listening"),
        "{}",
        answer.text()
    );
    let tried = daemon.count(is_connect);
    assert!(tried > 1, "{tried}");
    // The patience is the app's, not each request's: nobody else waits in vain.
    tokio::time::sleep(Duration::from_millis(400)).await;
    assert_eq!(client.get("app", "/tag").await.status, 502);
    assert_eq!(daemon.count(is_connect), tried + 1);
    // Once it accepted, it has that patience again.
    daemon.place(vm(1), app.address);
    assert_eq!(client.get("app", "/tag").await.status, 200);
    drop(app);
    daemon.place(vm(1), deaf);
    // The closing has arrived once the loopback had a moment.
    tokio::time::sleep(Duration::from_millis(50)).await;
    let before = daemon.count(is_connect);
    assert_eq!(client.get("app", "/tag").await.status, 502);
    assert!(daemon.count(is_connect) > before + 1);
}

#[tokio::test]
async fn a_refused_request_follows_its_app_to_the_next_vm() {
    for force in [false, true] {
        let (rig, daemon, app) = serving(patient()).await;
        let (_socket, crashed) = refusing();
        daemon.on_wake("app", vm(1), crashed);
        let mut client = Client::connect(rig.address).await;
        let visit = tokio::spawn(async move { client.get("app", "/tag").await });
        daemon.heard(1, is_connect).await;
        daemon.on_wake("app", vm(2), app.address);
        if force {
            assert_eq!(daemon.reap("app", vm(1), force).await, Reap::Reaped);
        } else {
            assert_eq!(daemon.reap("app", vm(1), force).await, Reap::Busy);
            daemon.gone("app", vm(1));
        }
        assert_eq!(visit.await.unwrap().status, 200);
        assert_eq!((app.requests("/tag"), daemon.wakes("app")), (1, 2));
    }
}
